"""Speech at 24 and 44.1 kHz, from a folder of recordings to sound: all by the fragments in configs/ and small random weights."""
import importlib.util
import json
import shutil

import ljspeech_parts as parts
import numpy as np
import pytest
import soundfile
from conftest import ROOT
from demo import prepare as demo  # data/demo/prepare.py

import audio
import checkpoint
import sample
import serve
import train
import train_vocoder
import vocoder
from common import UserError
from config import Config
from corpus import RECORDINGS, Corpus
from espeak import espeak_wav
from eval.judge import WHISPER_RATE, WhisperJudge
from folder import prepare  # data/folder/prepare.py

SMALL = ("--width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 --text_encoder_layers 1 --max_steps 2 "
         "--batch_size 4 --effective_batch_size 4 --val_interval 0 --eval_interval 2 --eval_judge whisper --eval_num_samples 1 "
         "--eval_steps 1 --eval_vocoder bigvgan --warmup_steps 1 --no_wandb").split()


@pytest.mark.parametrize("path", sorted((ROOT / "data").glob("*/prepare.py")), ids=lambda path: path.parent.name)
def test_every_preparation_takes_the_fields_of_the_log_mel(path, tmp_path):
    """Their mistakes are found first, before a download or a voice is loaded."""
    spec = importlib.util.spec_from_file_location(f"prepare_{path.parent.name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    needed = ["--source", str(tmp_path)] if path.parent.name == "folder" else []
    (tmp_path / "own.yaml").write_text("sample_rate: 16000\n")
    with pytest.raises(UserError, match="f_max = 8001.0: must lie above f_min = 0.0 and not above half the sample rate"):
        module.main(["--out", str(tmp_path / "x"), *needed, "--config", str(tmp_path / "own.yaml"), "--f-max", "8001"])


def test_the_grammar_is_read_in_any_log_mel(tmp_path):
    fields = {"sample_rate": 16000, "n_fft": 512, "hop_length": 128, "win_length": 512, "n_mels": 40, "f_min": 50.0, "f_max": 7600.0}
    demo.main(["--out", str(tmp_path / "corpus"), "--train", "2", "--held-out", "2", "--workers", "1",
               *(word for name, value in fields.items() for word in (f"--{name}", str(value)))])
    corpus = Corpus(tmp_path / "corpus", Config(**fields))
    corpus.check()
    wav = espeak_wav(corpus.texts[0], 16000)
    assert abs(len(corpus.mel(0)) - len(wav) / 128) < 1 and corpus.mel(0).shape[1] == 40


@pytest.fixture(scope="module", params=["bigvgan24k", "bigvgan44k"])
def run(request, tmp_path_factory):
    """A corpus of 20 recordings, a run of two steps with an evaluation, and their config."""
    folder, name = tmp_path_factory.mktemp("run"), request.param
    cfg = parts.config_of(name, eval_vocoder_model=parts.save_bigvgan(folder / "bigvgan", name),
                          data_dir=folder / "corpus", out_dir=folder / "run")
    parts.save_whisper(folder / "whisper.pt")
    for n in range(20):
        text = f"The {parts.NAMES[n % 12]} lamps were lit by {parts.NAMES[n // 2]} painters."
        (folder / f"{n}.txt").write_text(text)
        audio.write_wav(folder / f"{n}.wav", espeak_wav(text, cfg.sample_rate), cfg.sample_rate)
    fragment = str(ROOT / "configs" / f"{name}.yaml")
    prepare.main(["--source", str(folder), "--out", cfg.data_dir, "--config", fragment, "--workers", "1"])
    train.main(["--config", f"{ROOT}/configs/grammar.yaml,{fragment}", *SMALL, "--data_dir", cfg.data_dir, "--out_dir", cfg.out_dir,
                "--eval_vocoder_model", cfg.eval_vocoder_model, "--eval_whisper_model", str(folder / "whisper.pt")])
    return folder, cfg, fragment


@pytest.mark.slow
def test_the_corpus_has_the_frames_of_the_recordings(run):
    folder, cfg, _ = run
    corpus = Corpus(cfg.data_dir, cfg)
    corpus.check()
    assert len(corpus) == 20
    for i in (0, 7):
        wav = audio.read_wav(str(folder / f"{corpus.ids[i]}.wav"), cfg.sample_rate)
        np.testing.assert_allclose(corpus.mel(i), audio.log_mel(wav, cfg), atol=0.01)
        assert soundfile.info(folder / "corpus" / RECORDINGS / f"{corpus.ids[i]}.wav").samplerate == cfg.sample_rate


@pytest.mark.slow
def test_an_evaluation_has_sounds_of_the_rate_and_a_judge_that_heard_them(run):
    folder, cfg, _ = run
    out = folder / "run" / "eval" / "step_00000002"
    row, = map(json.loads, (out / "wer.jsonl").read_text().splitlines())
    for kind in ("audio", "vocoded", "recording"):
        assert soundfile.info(out / row[kind]).samplerate == cfg.sample_rate
    assert row["edits"] and row["mcd"] > 0 and row["recording_f0_mean"] > 60
    assert row["recording_seconds"] == pytest.approx(soundfile.info(out / row["recording"]).duration, abs=cfg.hop_length / cfg.sample_rate)
    assert json.loads((out / "summary.json").read_text())["vocoder"] == "bigvgan"


@pytest.mark.slow
def test_the_voice_speaks_at_its_rate_by_every_vocoder(run, monkeypatch, tmp_path):
    folder, cfg, fragment = run
    monkeypatch.setattr(train_vocoder, "STEPS", 2)
    monkeypatch.setattr(train_vocoder, "WIDTH", 8)
    with pytest.raises(UserError, match="disagrees with the config: sample_rate is"):
        train_vocoder.main(["--data_dir", cfg.data_dir])
    train_vocoder.main(["--data_dir", cfg.data_dir, "--config", fragment])
    model, ckpt = checkpoint.load_checkpoint(str(folder / "run" / "latest.pt"), "cpu")
    checkpoint.export(model, ckpt["step"], str(tmp_path / "voice"), ckpt["characters"])
    shutil.copy(folder / "corpus" / vocoder.LEARNED, tmp_path / "voice")
    for kind in ("griffinlim", "learned", "bigvgan"):
        out = tmp_path / f"{kind}.wav"
        sample.main(["--ckpt", str(tmp_path / "voice"), "--text", "Two lamps.", "--out", str(out), "--seconds", "0.5", "--steps", "1",
                     "--vocoder", kind, "--vocoder_model", cfg.eval_vocoder_model, "--device", "cpu", "--plot"])
        found, hop = soundfile.info(out), cfg.hop_length
        assert found.samplerate == cfg.sample_rate and found.frames == round(0.5 * cfg.sample_rate / hop) * hop


@pytest.mark.slow
def test_the_page_plays_at_the_rate(run):
    gr = pytest.importorskip("gradio", reason="no gradio here; pip install 'gradio>=6,<7'")
    folder, cfg, _ = run
    model, ckpt = checkpoint.load_checkpoint(str(folder / "run" / "latest.pt"), "cpu")
    page = serve.build_page(gr, model, lambda mel: vocoder.griffin_lim(mel, cfg), 1, 1.0, 0.4, ckpt["characters"], True)
    (rate, wav), _ = page.fn("Two lamps.", 1, 1.0, 0.4, 1.0, 0)
    assert rate == cfg.sample_rate and len(wav) % cfg.hop_length == 0 and len(wav) > 0


@pytest.mark.slow
def test_whisper_hears_the_same_tone_at_its_own_rate(run, monkeypatch):
    folder, cfg, _ = run
    judge, heard = WhisperJudge(str(folder / "whisper.pt"), "cpu"), []
    monkeypatch.setattr(judge.model, "transcribe", lambda wav, **_: heard.append(wav) or {"text": "", "segments": []})
    judge.transcribe([np.sin(2 * np.pi * 1000 * np.arange(cfg.sample_rate) / cfg.sample_rate).astype(np.float32)], cfg)
    spectrum = np.abs(np.fft.rfft(heard[0]))  # of one second: a bin is a hertz
    assert len(heard[0]) == WHISPER_RATE and spectrum.argmax() == 1000
