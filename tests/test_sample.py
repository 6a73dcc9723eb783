"""The sampler, its command line, and exported folders."""
import contextlib
import copy
import dataclasses
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_model import small_model

import evaluator
import vocoder
from checkpoint import export, load_checkpoint
from common import UserError
from config import from_flags
from sample import main as sample_main
from sample import read_pieces, sample, text_noise
from text import CUT, PARAGRAPH, SENTENCE

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["One short line.", "This is a text that is quite a bit longer than the first one.", "And a third, of middle size."]
FAST = ["--steps", "1", "--vocoder", "griffinlim", "--device", "cpu"]


@pytest.fixture(scope="module")
def model():
    return small_model(block_size=256).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "latest.pt"
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg)}, path)
    return path


@pytest.fixture(scope="module")
def patched():
    """Two frames per position: an utterance with an odd number of frames shares its last position with padding."""
    return small_model(patch=2, block_size=256).eval()


@given(patches=st.booleans(), order=st.permutations(range(3)), batch_size=st.integers(1, 4), scale=st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=8)
def test_an_utterance_does_not_depend_on_its_batch(model, patched, patches, order, batch_size, scale):
    model = patched if patches else model
    together = sample(model, [TEXTS[i] for i in order], steps=2, cfg_scale=scale, batch_size=batch_size)
    for i, mel in zip(order, together):
        alone, = sample(model, [TEXTS[i]], steps=2, cfg_scale=scale)
        torch.testing.assert_close(mel, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_euler_integrates_a_straight_path_exactly(model, steps):
    """The velocity x1 - x0 of one fixed x0 leads to x0, whatever the number of steps and the guidance."""
    target = 0.25
    straight = copy.deepcopy(model)
    straight.decoder.forward = lambda x, t, *_: (x - target) / t[:, None, None]
    mel, = sample(straight, ["hello"], steps=steps, cfg_scale=2.0)
    torch.testing.assert_close(mel, torch.full_like(mel, target * 2.0 - 5.0), rtol=1e-4, atol=1e-4)


def test_steps_are_shorter_near_noise(model):
    """From t = 1 to t = 0, each step longer than the one before; together they cover the whole time."""
    seen, moving = [], copy.deepcopy(model)

    def velocity(x, t, *_):
        seen.append(t[0].item())
        return torch.ones_like(x)
    moving.decoder.forward = velocity
    mel, = sample(moving, ["hello"], steps=8, cfg_scale=1.0, temperature=1.0)
    lengths = -np.diff([*seen, 0.0])
    assert seen[0] == 1 and len(seen) == 8 and (np.diff(lengths) > 0).all() and lengths[0] < 0.02
    torch.testing.assert_close((mel + 5.0) / 2.0, text_noise("hello", len(mel), 80, 0) - 1.0, rtol=1e-4, atol=1e-4)


def test_guidance_mixes_the_two_velocities(model):
    halves = copy.deepcopy(model)  # velocity 1 with the text, 0 without
    halves.decoder.forward = lambda x, *_: torch.cat([torch.ones_like(x[:len(x) // 2]), torch.zeros_like(x[len(x) // 2:])])
    mel, = sample(halves, ["hello"], steps=4, cfg_scale=3.0, temperature=1.0)
    torch.testing.assert_close((mel + 5.0) / 2.0, text_noise("hello", len(mel), 80, 0) - 3.0, rtol=1e-4, atol=1e-4)


def test_the_temperature_scales_the_noise_at_the_start(model):
    still = copy.deepcopy(model)
    still.decoder.forward = lambda x, *_: torch.zeros_like(x)
    for temperature in (1.0, 0.4, 0.0):
        mel, = sample(still, ["hello"], steps=2, temperature=temperature)
        torch.testing.assert_close((mel + 5.0) / 2.0, temperature * text_noise("hello", len(mel), 80, 0), rtol=1e-4, atol=1e-4)


def test_attention_maps_come_in_the_order_of_the_texts(patched):
    maps = []
    mels = sample(patched, TEXTS, steps=2, attention_maps=maps, batch_size=2)
    assert [m.shape for m in maps] == [((len(mel) + 1) // 2, len(text) + 1) for mel, text in zip(mels, TEXTS)]
    for attention_map in maps:
        np.testing.assert_allclose(attention_map.sum(axis=1), 1, atol=1e-4)  # no weight on padding


def test_bfloat16_speaks_nearly_as_float32_does(patched):
    """Also with attention maps, which are for numpy, so in float32."""
    maps, fast = [], copy.deepcopy(patched)
    fast.cfg.dtype = "bfloat16"
    in_bfloat16 = sample(fast, TEXTS, steps=2, seconds=1.0, attention_maps=maps)
    for mel, fast_mel, of_text in zip(sample(patched, TEXTS, steps=2, seconds=1.0), in_bfloat16, maps, strict=True):
        assert 0 < (mel - fast_mel).abs().mean() < 0.05 * mel.std() and len(of_text) == 43
        np.testing.assert_allclose(of_text.sum(axis=1), 1, atol=1e-4)


def test_seeds_and_durations(model):
    a, b = (sample(model, ["hello"], steps=2, seed=s)[0] for s in (0, 1))
    assert a.shape == b.shape and not torch.equal(a, b)
    assert torch.equal(a, sample(model, ["hello"], steps=2, seed=0)[0])
    assert len(sample(model, ["hello"], steps=1, speed=2.0)[0]) == pytest.approx(len(a) / 2, abs=1)
    assert len(sample(model, ["hello"], steps=1, seconds=1.0)[0]) == 86
    assert len(sample(model, ["hello"], steps=1, seconds=999.0)[0]) == model.cfg.block_size
    assert sample(model, [], steps=1) == []


@pytest.mark.parametrize("options", [
    {"texts": [" .,!"]}, {"steps": 0}, {"temperature": -0.1}, {"temperature": float("inf")}, {"cfg_scale": -1}, {"cfg_scale": float("nan")}, {"cfg_scale": float("inf")}, {"seconds": 0},
    {"seconds": float("nan")}, {"seconds": float("inf")}, {"speed": 0}, {"speed": float("nan")}])
def test_options_out_of_range_are_refused(model, options):
    with pytest.raises(UserError, match="expected"):
        sample(model, **{"texts": ["a"]} | options)


def test_a_text_beyond_the_encoders_limit_is_refused(model):
    """ByT5's tokens are the bytes, and one for the end."""
    assert len(sample(model, ["a" * 1023], steps=1, seconds=0.1)) == 1
    with pytest.raises(UserError, match="1025 tokens, more than the 1024 .* split it"):
        sample(model, ["short", "ä" * 512], steps=1, seconds=0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_diverged_duration_is_one_clear_error(model, value):
    diverged = copy.deepcopy(model)
    diverged.duration[-1].bias.data.fill_(value)
    with pytest.raises(UserError, match="duration"):
        sample(diverged, ["hello"], steps=1)


# --- the command line

def test_a_text_becomes_a_wav(model, checkpoint, tmp_path, capsys):
    out = tmp_path / "new" / "x.wav"
    sample_main(["--ckpt", str(checkpoint), *FAST, "--text", "- Hello there, --you!", "--out", str(out), "--cfg-scale", "1.5", "--seconds", "0.5"])
    assert "real-time factor" in capsys.readouterr().out
    wav, rate = soundfile.read(out)
    assert rate == 22050 and len(wav) == 43 * 256 and np.isfinite(wav).all()
    sample_main(["--ckpt", str(checkpoint), *FAST, "--text", "Short.", "--out", str(out), "--seconds", "99"])
    assert soundfile.info(out).frames == model.cfg.block_size * 256 and "will last 2.97 s" in capsys.readouterr().err
    sample_main(["--ckpt", str(checkpoint), *FAST, "--text", "One short line.", "--out", str(out), "--speed", "2"])
    assert soundfile.info(out).frames == pytest.approx(len(sample(model, ["One short line."], steps=1)[0]) * 128, abs=256)


@pytest.mark.parametrize("flags, complaint", [
    ([], "expected --out"), (["--text", "a"], "expected --out"), (["--out", "x.wav"], "nothing to say: give --text"),
    (["--text", "a", "--out", "x.wav", "--num_samples", "0"], "expected at least one sample"),
    (["--text", "a", "--out", "-", "--num-samples", "2"], "--out - allows one"), (["--file", "lines.txt", "--out", "-"], "no --file"),
    (["--text", "a", "--out", "-", "--plot"], "--plot only with a file name"), (["--text", "a", "--out", "x.wav", "--speed", "0"], "speed = 0"),
    (["--text", "a", "--out", "x.wav", "--steps", "0"], "steps = 0"), (["--file", "none", "--out", "x"], "cannot read none"),
    (["--file", "latin1.txt", "--out", "x"], "cannot read latin1.txt: .* expected UTF-8"),
    (["--text", "caf\udce9", "--out", "x.wav"], "is not UTF-8"), (["--text", "…", "--out", "x.wav"], "nothing to say"),
    (["--text", "…", "--out", "x.wav", "--seconds", "1"], "nothing to say"), (["--text", "a", "--out", "lines.txt/x.wav"], "cannot write"),
    (["--text", "a", "--out", "x.flac"], "--out x.flac: expected a name that ends in .wav"),
    (["--ckpt", "none.pt", "--text", "a", "--out", "x.wav"], "no checkpoint")])
def test_mistakes_are_refused_and_leave_no_file(checkpoint, tmp_path, monkeypatch, flags, complaint):
    monkeypatch.chdir(tmp_path)
    Path("lines.txt").write_text("a\n")
    Path("latin1.txt").write_bytes(b"caf\xe9\n")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UserError, match=complaint):
        sample_main(["--ckpt", str(checkpoint), *flags])
    assert sorted(os.listdir(tmp_path)) == ["latin1.txt", "lines.txt"]


@contextlib.contextmanager
def standard_input(data: bytes, folder, monkeypatch):
    (folder / "stdin").write_bytes(data)
    with open(folder / "stdin") as f:
        monkeypatch.setattr("sys.stdin", f)
        yield


def test_standard_input_that_is_not_text_is_refused(checkpoint, tmp_path, monkeypatch):
    with standard_input(b"caf\xe9", tmp_path, monkeypatch), pytest.raises(UserError, match="cannot read standard input: .* expected UTF-8"):
        sample_main(["--ckpt", str(checkpoint), *FAST, "--out", str(tmp_path / "x.wav")])


@pytest.mark.parametrize("flags", [["--text", "a", "--file", "b"], ["--text", "a", "--export", "b"], ["--file", "a", "--export", "b"]])
def test_one_task_at_a_time(flags, capsys):
    with pytest.raises(SystemExit):
        sample_main(["--ckpt", "c", "--out", "o", *flags])
    assert "not allowed with argument" in capsys.readouterr().err


@pytest.mark.slow
def test_a_long_text_becomes_one_wav_of_pieces_and_pauses(model, checkpoint, tmp_path, monkeypatch, capsys):
    """Each piece sounds as it does alone. A sentence that would last too long is cut. Takes have seeds that count up."""
    text = "One short line. Two!\n\n" + "word " * 9 + "end."
    with standard_input(text.encode(), tmp_path, monkeypatch):
        sample_main(["--ckpt", str(checkpoint), *FAST, "--out", str(tmp_path / "x.wav"), "--num-samples", "2", "--plot"])
    pieces = list(read_pieces(model, [[text]]))
    assert " ".join(piece.text for piece in pieces).split() == text.split()
    assert [piece.pause for piece in pieces] == [SENTENCE, PARAGRAPH, *[CUT] * (len(pieces) - 3), SENTENCE] and len(pieces) > 3
    for take in (0, 1):
        expected = []
        for piece in pieces:
            mel, = sample(model, [piece.text], steps=1, seed=take)
            expected += [vocoder.griffin_lim(mel, model.cfg), np.zeros(round(piece.pause * 22050))]
        wav, _ = soundfile.read(tmp_path / f"x_{take}.wav", dtype="float32")
        np.testing.assert_allclose(wav, np.concatenate(expected[:-1]).clip(-1, 1), atol=0.05)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and "real-time factor" in capsys.readouterr().out


def test_a_pipe_gets_a_wav_and_nothing_else(checkpoint, tmp_path, monkeypatch, capfdbinary):
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1))
    with standard_input(b"One. Two.", tmp_path, monkeypatch):
        sample_main(["--ckpt", str(checkpoint), *FAST, "--out", "-"])
    out, err = capfdbinary.readouterr()
    wav, rate = soundfile.read(io.BytesIO(out))
    assert rate == 22050 and len(wav) > SENTENCE * rate and np.abs(wav).max() > 0 and b"real-time factor" in err


def test_a_reader_that_goes_away_is_one_line(checkpoint, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: writing))
    with pytest.raises(UserError, match="cannot write to standard output: Broken pipe"):
        sample_main(["--ckpt", str(checkpoint), *FAST, "--out", "-", "--text", "One. Two."])
    os.close(writing)


@pytest.mark.parametrize("takes", [1, 2])
def test_a_file_of_lines_becomes_numbered_wavs_and_a_page(checkpoint, tmp_path, capsys, takes):
    ckpt = torch.load(checkpoint, weights_only=True) | {"characters": "Onet .woTrhi"}
    torch.save(ckpt, tmp_path / "c.pt")
    (tmp_path / "lines.txt").write_text("One. Two.\n\n  Three <b>é</b>\né\n", encoding="utf-8")
    out = tmp_path / "out"
    sample_main(["--ckpt", str(tmp_path / "c.pt"), "--file", str(tmp_path / "lines.txt"), "--out", str(out), *FAST, "--num-samples", str(takes)])
    names = [f"{n:06d}" for n in range(3)] if takes == 1 else [f"{n:06d}_{take}" for n in range(3) for take in range(2)]
    assert sorted(os.listdir(out)) == sorted([name + end for name in names for end in (".wav", "_mel.png")] + ["index.html", "summary.json", "wer.jsonl"])
    html = (out / "index.html").read_text(encoding="utf-8")
    assert "Three &lt;b&gt;é&lt;/b&gt;" in html and names[2] + ".wav" in html and "WER</th" not in html and "tiles" in html
    rows = [json.loads(line) for line in (out / "wer.jsonl").read_text().splitlines()]
    assert [(row["idx"], row["audio"]) for row in rows] == [(n, name + ".wav") for n, name in enumerate(names)]
    for row in rows:
        assert soundfile.info(out / row["audio"]).duration == pytest.approx(row["predicted_seconds"])
    messages = capsys.readouterr().err
    assert messages.count("do not contain 'b';") == 1 and messages.count("warning") == 1


# --- folders for sharing

@pytest.fixture(scope="module")
def averaged_checkpoint(model, tmp_path_factory):
    """Averages that differ from the weights, also for the embeddings, which T5 has twice."""
    path = tmp_path_factory.mktemp("averaged") / "latest.pt"
    torch.manual_seed(1)
    ema = {name: p.detach() + 0.03 * torch.randn_like(p) for name, p in model.named_parameters()}
    torch.save({"model": model.saved_state(), "ema": ema, "step": 3, "config": dataclasses.asdict(model.cfg), "optimizers": [],
                "train_seconds": 1.5}, path)
    return path


def test_an_exported_folder_speaks_as_its_checkpoint_does(model, averaged_checkpoint, tmp_path):
    """An export differs by its half precision only, and an export of the export not at all. Without the averages much would."""
    raw = torch.load(averaged_checkpoint, weights_only=True) | {"ema": {}}
    torch.save(raw, tmp_path / "raw.pt")
    sample_main(["--ckpt", str(averaged_checkpoint), "--export", str(tmp_path / "voice")])
    sample_main(["--ckpt", str(tmp_path / "voice"), "--export", str(tmp_path / "again") + "/"])
    wavs = []
    for source in (averaged_checkpoint, tmp_path / "voice", tmp_path / "again", tmp_path / "raw.pt"):
        sample_main(["--ckpt", str(source), "--text", "The same text.", "--seed", "5", "--steps", "2", "--seconds", "0.5",
                     "--vocoder", "griffinlim", "--device", "cpu", "--out", str(tmp_path / "x.wav")])
        wavs.append(soundfile.read(tmp_path / "x.wav")[0])
    assert np.array_equal(wavs[1], wavs[2])
    assert 50 * np.abs(wavs[1] - wavs[0]).mean() < np.abs(wavs[3] - wavs[0]).mean()
    assert sorted(os.listdir(tmp_path)) == ["again", "raw.pt", "voice", "x.wav"]
    assert sorted(os.listdir(tmp_path / "voice")) == ["config.yaml", "corpus.json", "model.safetensors"]
    for name in os.listdir(tmp_path / "voice"):
        assert (tmp_path / "voice" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    about = json.loads((tmp_path / "voice" / "corpus.json").read_text())
    assert about | {"step": 3, "mel_mean": -5.0, "mel_std": 2.0} == about
    assert from_flags({"config": str(tmp_path / "voice" / "config.yaml")}) == model.cfg
    # the safetensors hold the averages
    weights, ema = load_file(tmp_path / "voice" / "model.safetensors"), torch.load(averaged_checkpoint, weights_only=True)["ema"]
    assert weights.keys() == ema.keys() and all(torch.equal(weights[k], ema[k].half()) for k in ema)


@pytest.mark.slow
def test_the_evaluator_takes_an_exported_folder(averaged_checkpoint, tmp_path):
    export(load_checkpoint(str(averaged_checkpoint), "cpu")[0], 3, str(tmp_path / "voice"))
    folders = tmp_path / "of_voice", tmp_path / "of_run"
    for source, folder in zip((tmp_path / "voice", averaged_checkpoint), folders):
        evaluator.main(["--ckpt", str(source), "--prompts", str(ROOT / "eval" / "prompts.txt"), "--num", "1", "--eval_steps", "1",
                        "--eval_judge", "none", "--eval_vocoder", "griffinlim", "--device", "cpu", "--out_dir", str(folder)])
        assert json.loads((folder / "summary.json").read_text())["step"] == 3
    a, b = (soundfile.read(folder / "000000.wav")[0] for folder in folders)
    assert np.corrcoef(a, b)[0, 1] > 0.9  # half precision


def test_export_never_overwrites(averaged_checkpoint, tmp_path):
    model, _ = load_checkpoint(str(averaged_checkpoint), "cpu")
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "mine").touch()
    (tmp_path / "file").touch()
    for folder in (tmp_path / "voice", tmp_path / "file", tmp_path):
        with pytest.raises(UserError, match="exists already"):
            export(model, 3, str(folder))
    with pytest.raises(UserError, match="cannot write"):
        export(model, 3, str(tmp_path / "file" / "voice"))
    assert sorted(os.listdir(tmp_path)) == ["file", "voice"] and os.listdir(tmp_path / "voice") == ["mine"]


def test_export_leaves_out_an_encoder_that_its_name_brings_back(tmp_path):
    from transformers import T5Config, T5EncoderModel
    encoder = str(tmp_path / "t5")
    T5EncoderModel(T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)).save_pretrained(encoder)
    for trained in (False, True):
        model, folder = small_model(text_encoder_name=encoder, train_text_encoder=trained).eval(), tmp_path / f"voice{trained}"
        export(model, 3, str(folder))
        assert any(k.startswith("text_encoder.") for k in load_file(folder / "model.safetensors")) == trained
        if not trained:
            with torch.no_grad():  # undo small_model's noise: from_pretrained will load what is on disk
                model.text_encoder.load_state_dict(small_model(text_encoder_name=encoder, train_text_encoder=False, shake=False).text_encoder.state_dict())
        mel, = sample(load_checkpoint(str(folder), "cpu")[0], ["hello"], steps=1)
        torch.testing.assert_close(mel, sample(model, ["hello"], steps=1)[0], atol=0.02, rtol=0.01)  # half precision


def test_averaged_weights_are_the_ones_that_speak(model, tmp_path):
    ema = {"no_text": torch.full_like(model.no_text.data, 7.0)}
    torch.save({"model": model.saved_state(), "ema": ema, "step": 3, "config": dataclasses.asdict(model.cfg)}, tmp_path / "c.pt")
    assert (load_checkpoint(str(tmp_path / "c.pt"), "cpu")[0].no_text == 7.0).all()
