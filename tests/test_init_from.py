"""
python -m pytest tests/test_init_from.py

A run that starts from a voice: what it takes from there, what it refuses, and that it goes on without the voice.
"""
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_checkpoint import CORPUS
from test_model import small_model

import config
import train
import vocoder
from checkpoint import export, load_checkpoint, read_checkpoint, resume_checkpoint, save_checkpoint
from common import UserError
from config import SHAPE, from_flags, load_config, to_yaml
from corpus import Corpus
from data import TrainingSteps
from optim import make_optimizers, start_ema

SHAPED = dict(layers=1, patch=2, rope_gamma=20.0, predicts="velocity")  # none of them is the default
SHORT = ("--effective_batch_size 8 --batch_size 8 --log_interval 1 --val_interval 0 --eval_interval 0 --checkpoint_interval 2 "
         "--lr_decay constant --no_wandb --dtype float32").split()


def make_voice(out, **changes):
    """A run's folder with latest.pt, whose averages differ from its weights, and config.yaml; and the voice's export."""
    model = small_model(out_dir=str(out / "run"), **SHAPED | changes)
    (out / "run").mkdir(parents=True)
    ema = {name: p.detach() + 0.01 * torch.randn_like(p) for name, p in model.named_parameters() if p.requires_grad}
    save_checkpoint(model.cfg, model, make_optimizers(model, model.cfg), ema, 7, {"corpus": CORPUS, "characters": "abcž!"})
    (out / "run" / "config.yaml").write_text(to_yaml(model.cfg))
    export(load_checkpoint(str(out / "run" / "latest.pt"), "cpu")[0], 7, str(out / "export"), "abcž!")
    return {"checkpoint": out / "run" / "latest.pt", "export": out / "export"}


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    return make_voice(tmp_path_factory.mktemp("voice"))


@pytest.fixture(scope="module")
def corpus(demo_corpus, tmp_path_factory):
    """The small corpus with other statistics than the voice's."""
    folder = shutil.copytree(demo_corpus, tmp_path_factory.mktemp("corpus") / "mine")
    stats = folder / "metadata" / "dataset_stats.json"
    stats.write_text(json.dumps(json.loads(stats.read_text()) | {"mel_mean": -4.5, "mel_std": 1.5}))
    return folder


def arguments(voice, corpus, out, *flags):
    return [*SHORT, "--init_from", str(voice), "--data_dir", str(corpus), "--out_dir", str(out), *map(str, flags)]


def run(*args):
    train.main(arguments(*args))
    return read_checkpoint(str(args[2] / "latest.pt"))


def losses(out):
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


# --- the config

@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_the_shape_is_the_voices_and_all_else_the_runs(voices, tmp_path, kind):
    (tmp_path / "mine.yaml").write_text(f"init_from: {voices[kind]}\nbatch_size: 2\neffective_batch_size: 2\npatch: 2\n")
    cfg, theirs = load_config(["--config", str(tmp_path / "mine.yaml"), "--seed", "5"]), small_model(**SHAPED).cfg
    assert {k: getattr(cfg, k) for k in SHAPE} == {k: getattr(theirs, k) for k in SHAPE}
    assert cfg.train_text_encoder and cfg.mel_mean is None and cfg.seed == 5
    given = {"init_from", "batch_size", "effective_batch_size", "seed", "train_text_encoder", *SHAPE}
    assert all(getattr(cfg, k) == getattr(config.Config(), k) for k in config.FIELDS if k not in given)
    assert not load_config(["--init_from", str(voices[kind]), "--train_text_encoder", "false"]).train_text_encoder


def test_every_field_that_shapes_the_weights_is_taken():
    """The other fields that model.py reads decide what is trained, how it starts, how precisely it counts, and what is a loss."""
    text = (ROOT / "model.py").read_text()
    used = {k for k in config.FIELDS if re.search(rf"cfg\.{k}\b", text)}
    others = {"train_text_encoder", "zero_init", "dtype", "duration_loss_weight", "alignment_loss_weight"}
    assert used - set(SHAPE) == others and {"predicts", "rope_gamma", "mlp_ratio"} <= used


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_fields_that_cannot_fit_are_named_together(voices, kind):
    with pytest.raises(UserError) as e:
        load_config(["--init_from", str(voices[kind]), "--width", "384", "--heads", "5", "--predicts", "mel", "--n_mels", "80"])
    assert str(e.value) == (f"cannot start from {voices[kind]}: width is 32 in the voice, 384 here, heads is 2 in the voice, 5 here, "
                            "predicts is velocity in the voice, mel here; leave these fields out, they come from the voice")


def test_missing_voices_are_named(voices, tmp_path):
    for path in (tmp_path / "none.pt", tmp_path / "none"):
        with pytest.raises(UserError, match=f"no voice at {path}; expected a checkpoint .* voices/joe"):
            load_config(["--init_from", str(path)])
    shutil.copy(voices["checkpoint"], tmp_path / "alone.pt")
    with pytest.raises(UserError, match=rf"no {tmp_path}/config.yaml, .* sample.py --ckpt {tmp_path}/alone.pt --export FOLDER"):
        load_config(["--init_from", str(tmp_path / "alone.pt")])


def test_a_voice_from_before_a_field_was_there_is_built_as_it_was(voices, tmp_path):
    folder = shutil.copytree(voices["export"], tmp_path / "old")
    lines = (folder / "config.yaml").read_text().splitlines(keepends=True)
    (folder / "config.yaml").write_text("".join(line for line in lines if not line.startswith(("predicts", "init_from"))))
    assert load_config(["--init_from", str(folder)]).predicts == "velocity"
    assert resume_checkpoint(*state_of(load_config(["--init_from", str(folder)]), tmp_path / "new"), CORPUS)["step"] == 0


def test_an_evaluation_of_the_new_voice_does_not_need_the_first(voices):
    base = dataclasses.asdict(small_model(**SHAPED).cfg) | {"init_from": "gone"}
    assert from_flags({"eval_steps": "3"}, base).init_from == "gone"


# --- the start

def state_of(cfg, out):
    cfg.out_dir, cfg.mel_mean, cfg.mel_std = str(out), -4.5, 1.5
    torch.manual_seed(3)
    model = train.TTS(cfg)
    return cfg, model, make_optimizers(model, cfg), start_ema(model, cfg.ema_decay)


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_weights_and_averages_start_as_the_voices_averages(voices, tmp_path, kind):
    cfg, model, optimizers, ema = state_of(load_config(["--init_from", str(voices[kind])]), tmp_path)
    assert resume_checkpoint(cfg, model, optimizers, ema, CORPUS) == {"step": 0, "characters": "abcž!"}
    averages = read_checkpoint(str(voices["checkpoint"]))["ema"]
    tolerance = {"rtol": 0, "atol": 0} if kind == "checkpoint" else {"rtol": 1e-3, "atol": 1e-5}  # an export is in half precision
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), averages[name], **tolerance)
        assert torch.equal(ema[name], p) and ema[name].data_ptr() != p.data_ptr()
    assert all(not optimizer.state for optimizer in optimizers)


@pytest.mark.parametrize("kind", ["checkpoint", "export"])
def test_the_first_loss_is_the_voices_with_the_corpuss_statistics(voices, corpus, tmp_path, kind):
    ckpt = run(voices[kind], corpus, tmp_path, "--max_steps", 1)
    cfg = from_flags({}, ckpt["config"])
    assert (cfg.mel_mean, cfg.mel_std, cfg.patch, cfg.predicts, ckpt["step"]) == (-4.5, 1.5, 2, "velocity", 1)
    assert load_config(["--config", str(tmp_path / "config.yaml")], base={}) == cfg  # all of it is recorded
    model = load_checkpoint(str(voices[kind]), "cpu")[0]
    batch, = TrainingSteps(Corpus(str(corpus), cfg), cfg, model.tokenise, 0, 1)[0]
    with torch.no_grad():
        assert losses(tmp_path) == [pytest.approx(model(batch)["loss"].item(), rel=1e-5)]
    assert set("ž") <= set(ckpt["characters"]) and "!" not in ckpt["characters"]  # its letters, but not how its texts end


def test_the_first_voices_vocoder_is_not_used(voices, corpus, tmp_path):
    """The new voice sounds else, so its vocoder learns from its own recordings; without any it is Griffin-Lim."""
    folder = shutil.copytree(voices["export"], tmp_path / "voice")
    shutil.copy(ROOT / "voices" / "joe" / vocoder.LEARNED, folder)
    assert vocoder.vocoder_kind(load_checkpoint(str(folder), "cpu")[0].cfg, "cpu") == "learned"
    cfg = load_config(arguments(folder, corpus, tmp_path / "out"))
    assert vocoder.find_learned(cfg) is None and vocoder.vocoder_kind(cfg, "cpu") == "griffinlim"


def test_a_corpus_of_another_log_mel_is_refused(corpus, tmp_path):
    """It cannot be read as the voice's, nor can the voice be read as it."""
    voice = make_voice(tmp_path / "voice", n_mels=100, f_max=11025.0)["export"]
    with pytest.raises(UserError, match="n_mels is 80 .config: 100., f_max is .*; prepare the corpus with these fields .with init_from"):
        train.main(arguments(voice, corpus, tmp_path / "out"))
    with pytest.raises(UserError, match="n_mels is 100 in the voice, 80 here"):
        train.main(arguments(voice, corpus, tmp_path / "out", "--n_mels", 80))
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_checkpoint_beside_anothers_config_is_refused(voices, tmp_path):
    (tmp_path / "config.yaml").write_text((voices["export"] / "config.yaml").read_text().replace("rope_gamma: 20", "rope_gamma: 30"))
    shutil.copy(voices["checkpoint"], tmp_path)
    with pytest.raises(UserError, match="latest.pt: rope_gamma is 20.0 in the voice, 30.0 here"):
        resume_checkpoint(*state_of(load_config(["--init_from", str(tmp_path / "latest.pt")]), tmp_path / "out"), CORPUS)


def test_a_trained_pretrained_encoder_stays_trained(tmp_path):
    """Else the run's checkpoints would not have its weights: a frozen encoder is loaded by its name."""
    from transformers import T5Config, T5EncoderModel
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)).save_pretrained(tmp_path / "t5")
    voice = make_voice(tmp_path / "voice", text_encoder_name=str(tmp_path / "t5"))["checkpoint"]
    state = state_of(load_config(["--init_from", str(voice), "--train_text_encoder", "false"]), tmp_path / "out")
    with pytest.raises(UserError, match=f"train_text_encoder is True in {voice}, False here"):
        resume_checkpoint(*state, CORPUS)
    assert resume_checkpoint(*state_of(load_config(["--init_from", str(voice)]), tmp_path / "out"), CORPUS)["step"] == 0


# --- going on

@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_command_and_without_the_voice(voices, corpus, tmp_path):
    voice = shutil.copytree(voices["export"], tmp_path / "voice")
    undisturbed = run(voice, corpus, tmp_path / "whole", "--max_steps", 4)
    run(voice, corpus, tmp_path / "run", "--max_steps", 2, "--resume", "latest")
    shutil.rmtree(voice)
    ckpt = run(voice, corpus, tmp_path / "run", "--max_steps", 4, "--resume", "latest")
    for part in ("model", "ema"):
        torch.testing.assert_close(ckpt[part], undisturbed[part], rtol=0, atol=0)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") and ckpt["characters"] == undisturbed["characters"]
    ckpt = run(voice, corpus, tmp_path / "elsewhere", "--max_steps", 5, "--resume", tmp_path / "run" / "latest.pt")
    assert ckpt["step"] == 5 and ckpt["config"]["patch"] == 2
    with pytest.raises(UserError, match=f"init_from was '{voice}', is '{voices['export']}'"):
        run(voices["export"], corpus, tmp_path / "run", "--max_steps", 5, "--resume", "latest")
    with pytest.raises(UserError, match="holds a run already"):
        run(voices["export"], corpus, tmp_path / "run")


@pytest.mark.slow
def test_two_ranks_start_from_a_voice_as_one_does(voices, corpus, tmp_path):
    run(voices["export"], corpus, tmp_path / "one", "--max_steps", 2)
    flags = arguments(voices["export"], corpus, tmp_path / "two", "--max_steps", 2, "--nproc", 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
                ROOT / "train.py"]
    done = subprocess.run([*torchrun, *flags], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    assert "from " + str(voices["export"]) + " to step 2: 2 rank(s)" in done.stdout
    assert Path(tmp_path, "two", "config.yaml").read_text().count("patch: 2") == 1
