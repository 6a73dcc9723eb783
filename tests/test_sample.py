"""The sampler, its command line, and the checkpoints it reads."""
import copy
import dataclasses
import io
import itertools
import json
import os
import subprocess
import sys
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

import audio
import evaluator
from checkpoint import export, load_checkpoint, read_checkpoint
from config import UserError, from_flags
from sample import CUT, PARAGRAPH, SENTENCE, cut, pick_device, read_pieces, read_sentences, sample, text_noise
from sample import main as sample_main

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["One short line.", "This is a text that is quite a bit longer than the first one.", "And a third, of middle size."]


@pytest.fixture(scope="module")
def model():
    return small_model().eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "latest.pt"
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg)}, path)
    return path


@pytest.fixture(scope="module")
def patched():
    """Two frames a position: an utterance of an odd number of frames shares its last position with padding."""
    return small_model(patch=2).eval()


@given(patches=st.booleans(), order=st.permutations(range(3)), batch_size=st.integers(1, 4), scale=st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=12)
def test_an_utterance_does_not_depend_on_its_batch(model, patched, patches, order, batch_size, scale):
    model = patched if patches else model
    together = sample(model, [TEXTS[i] for i in order], steps=3, cfg_scale=scale, batch_size=batch_size)
    for i, mel in zip(order, together):
        alone, = sample(model, [TEXTS[i]], steps=3, cfg_scale=scale)
        torch.testing.assert_close(mel, alone, rtol=1e-3, atol=1e-3)


def test_euler_integrates_a_known_velocity_exactly(model):
    """For the velocity x1 - x0 of one fixed x0, Euler lands on x0 whatever the number of steps, and guidance mixes as said."""
    target = 0.25
    straight = copy.deepcopy(model)
    straight.decoder.forward = lambda x, t, *_: (x - target) / t[:, None, None]
    for steps in (1, 2, 7):
        mel, = sample(straight, ["hello"], steps=steps, cfg_scale=2.0)
        torch.testing.assert_close(mel, torch.full_like(mel, target * 2.0 - 5.0), rtol=1e-4, atol=1e-4)
    halves = copy.deepcopy(model)  # velocity 1 with the text, 0 without
    halves.decoder.forward = lambda x, *_: torch.cat([torch.ones_like(x[:len(x) // 2]), torch.zeros_like(x[len(x) // 2:])])
    mel, = sample(halves, ["hello"], steps=4, cfg_scale=3.0)
    torch.testing.assert_close((mel + 5.0) / 2.0, text_noise("hello", len(mel), 80, 0) - 3.0, rtol=1e-4, atol=1e-4)


def test_seeds_and_durations(model):
    a, b = (sample(model, ["hello"], steps=2, seed=s)[0] for s in (0, 1))
    assert a.shape == b.shape and not torch.equal(a, b)
    assert torch.equal(a, sample(model, ["hello"], steps=2, seed=0)[0])
    assert len(sample(model, ["hello"], steps=1, seconds=1.0)[0]) == 86
    assert len(sample(model, ["hello"], steps=1, seconds=999.0)[0]) == model.cfg.block_size
    assert sample(model, [], steps=1) == []
    nan, inf = float("nan"), float("inf")
    for wrong in (dict(texts=[" .,!"]), dict(steps=0), dict(cfg_scale=-1), dict(cfg_scale=nan), dict(cfg_scale=inf), dict(seconds=0),
                  dict(seconds=nan), dict(seconds=inf), dict(texts=["caf\udce9"])):
        with pytest.raises(UserError):
            sample(model, **{"texts": ["a"]} | wrong)


def test_a_text_beyond_the_encoders_limit_is_refused(model):
    """ByT5's tokens are bytes and one for the end."""
    assert len(sample(model, ["a" * 1023], steps=1, seconds=0.1)) == 1
    with pytest.raises(UserError, match="1025 tokens, more than the 1024 .* split it"):
        sample(model, ["short", "ä" * 512], steps=1, seconds=0.1)
    unlimited = copy.copy(model)
    unlimited.most_tokens = None
    assert len(sample(unlimited, ["a" * 1100], steps=1, seconds=0.1)) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_diverged_duration_is_one_clear_error(model, value):
    diverged = copy.deepcopy(model)
    diverged.duration[-1].bias.data.fill_(value)
    with pytest.raises(UserError, match="duration"):
        sample(diverged, ["hello"], steps=1)


def speak(checkpoint, *flags):
    return subprocess.run([sys.executable, "sample.py", "--ckpt", str(checkpoint), *map(str, flags)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)


def test_command_line_speaks(checkpoint, tmp_path):
    out = tmp_path / "x.wav"
    done = speak(checkpoint, "--text", "- Hello there, --you!", "--out", out, "--steps", 2, "--cfg-scale", 1.5, "--seconds", 0.5,
                 "--vocoder", "griffinlim", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "real-time factor" in done.stdout
    wav, rate = soundfile.read(out)
    assert rate == 22050 and len(wav) == 43 * 256 and np.isfinite(wav).all()


def test_command_line_refuses(checkpoint, tmp_path):
    done = speak(checkpoint, "--text", "…", "--out", tmp_path / "x.wav")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nothing to say" in done.stderr
    assert not list(tmp_path.iterdir())
    done = speak(tmp_path / "none.pt", "--text", "a", "--out", tmp_path / "x.wav")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no checkpoint" in done.stderr


def test_command_line_wants_to_do_one_thing(checkpoint, tmp_path, monkeypatch):
    text, out, export_to = ["--text", "a"], ["--out", str(tmp_path / "x.wav")], ["--export", str(tmp_path / "v")]
    lines = tmp_path / "lines.txt"
    lines.write_text("a\n")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for flags, complaint in (
            ([], "expected --out with --text"), (text, "expected --out with --text"), (out, "nothing to say: give --text"),
            ([*text, *out, "--file", str(lines)], "expected --out with --text"), (export_to + text + out, "each go without"),
            (export_to + text, "each go without"), (export_to + out, "each go without"), ([*export_to, "--serve"], "each go without"),
            (["--serve", *out], "each go without"), ([*text, *out, "--num_samples", "0"], "--num_samples 0: expected 1 or more"),
            ([*text, "--out", "-", "--num-samples", "2"], "expected 1 or more, and 1 where"),
            (["--file", str(lines), "--out", "-"], "goes without --out -"), (["--file", str(lines), *out, "--plot"], "and --plot"),
            ([*text, "--out", "-", "--plot"], "needs a name"), ([*text, *out, "--speed", "0"], "speed = 0"),
            ([*text, *out, "--steps", "0"], "steps = 0"),
            (["--file", str(tmp_path / "none"), *out], "cannot read --file"), (["--text", " ", *out], "nothing to say in ' '")):
        with pytest.raises(UserError, match=complaint):
            sample_main(["--ckpt", str(checkpoint), *flags])
    assert os.listdir(tmp_path) == ["lines.txt"]


# --- long texts

BOOK = ("Mr. Smith went home at 5 p.m. on foot. He said: \"Stop it!\" Then he left... Did he?\n\nA new paragraph. It is short, "
        "in a line\nthat goes on. — Ünïcode, too! No end")


@given(cuts=st.lists(st.integers(0, len(BOOK)), max_size=8).map(sorted))
def test_sentences_do_not_depend_on_how_the_text_comes(cuts):
    parts = [BOOK[a:b] for a, b in zip([0, *cuts], [*cuts, len(BOOK)])]
    assert list(read_sentences(parts)) == [
        ("Mr. Smith went home at 5 p.m. on foot.", SENTENCE), ('He said: "Stop it!"', SENTENCE), ("Then he left...", SENTENCE),
        ("Did he?", PARAGRAPH), ("A new paragraph.", SENTENCE), ("It is short, in a line that goes on.", SENTENCE),
        ("— Ünïcode, too!", SENTENCE), ("No end", SENTENCE)]


def test_a_text_without_end_is_read_as_it_comes():
    endless = read_sentences(itertools.repeat("One more sentence. And "))
    assert [next(endless)[0] for _ in range(500)][-1] == "And One more sentence."
    unbroken = read_sentences(itertools.repeat("word " * 100))  # which never comes to the end of a sentence
    assert 60_000 < len(next(unbroken)[0]) < 70_000


@given(text=st.text(alphabet="ab ,;–é😀", min_size=1, max_size=60), most=st.integers(1, 12))
def test_what_is_too_long_is_cut_and_nothing_is_lost(text, most):
    parts = cut(text, lambda part: len(part.encode()) <= most + 4)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(len(part.encode()) <= most + 4 or len(part) == 1 for part in parts)


def test_cuts_are_behind_clauses_then_between_words():
    assert cut("one two, three four", lambda part: len(part) < 15) == ["one two,", "three four"]
    assert cut("one two three four", lambda part: len(part) < 15) == ["one two", "three four"]


def test_long_texts_become_one_wav_of_pieces_and_pauses(model, checkpoint, tmp_path, monkeypatch, capsys):
    """Each piece sounds as it does alone; a sentence too long for the text encoder is cut, and takes differ by their seeds."""
    flags = ["--ckpt", str(checkpoint), "--steps", "1", "--vocoder", "griffinlim", "--device", "cpu"]
    text = "One short line. Two!\n\n" + "word " * 60 + "end."
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    sample_main([*flags, "--out", str(tmp_path / "x.wav"), "--num-samples", "2", "--plot"])
    pieces = list(read_pieces(model, read_sentences([text]), 1.0))
    assert " ".join(piece.text for piece in pieces).split() == text.split()
    assert [piece.pause for piece in pieces] == [SENTENCE, PARAGRAPH, *[CUT] * (len(pieces) - 3), SENTENCE] and len(pieces) > 3
    for take in (0, 1):
        expected = []
        for piece in pieces:
            mel, = sample(model, [piece.text], steps=1, seed=take)
            expected += [audio.griffin_lim(mel, model.cfg), np.zeros(round(piece.pause * 22050))]
        wav, _ = soundfile.read(tmp_path / f"x_{take}.wav", dtype="float32")
        np.testing.assert_allclose(wav, np.concatenate(expected[:-1]).clip(-1, 1), atol=0.05)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and "real-time factor" in capsys.readouterr().out
    sample_main([*flags, "--out", str(tmp_path / "fast.wav"), "--text", "One short line.", "--speed", "2"])
    assert soundfile.info(tmp_path / "fast.wav").frames == pytest.approx(len(sample(model, ["One short line."], steps=1)[0]) * 128, abs=256)


def test_a_pipe_gets_a_wav_and_nothing_else(checkpoint, monkeypatch, capfdbinary):
    monkeypatch.setattr("sys.stdin", io.StringIO("One. Two."))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: 1))
    sample_main(["--ckpt", str(checkpoint), "--out", "-", "--steps", "1", "--device", "cpu"])
    out, err = capfdbinary.readouterr()
    wav, rate = soundfile.read(io.BytesIO(out))
    assert rate == 22050 and len(wav) > SENTENCE * rate and np.abs(wav).max() > 0 and b"real-time factor" in err


def test_a_reader_that_goes_away_is_one_line(checkpoint, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr("sys.stdout", SimpleNamespace(fileno=lambda: writing))
    with pytest.raises(UserError, match="closed the pipe"):
        sample_main(["--ckpt", str(checkpoint), "--out", "-", "--text", "One. Two.", "--steps", "1", "--device", "cpu"])
    os.close(writing)


def test_a_file_of_lines_becomes_numbered_wavs_and_a_page(checkpoint, tmp_path, capsys):
    ckpt = torch.load(checkpoint, weights_only=True) | {"characters": "Onet .woTrhi"}
    torch.save(ckpt, tmp_path / "c.pt")
    (tmp_path / "lines.txt").write_text("One. Two.\n\n  Three <b>é</b>\né\n", encoding="utf-8")
    sample_main(["--ckpt", str(tmp_path / "c.pt"), "--file", str(tmp_path / "lines.txt"), "--out", str(tmp_path / "out"), "--steps", "1",
                 "--device", "cpu"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [f"{n:06d}{end}" for n in range(3) for end in (".wav", "_mel.png")] + ["index.html", "summary.json", "wer.jsonl"])
    html = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Three &lt;b&gt;é&lt;/b&gt;" in html and "000002.wav" in html and "WER</th" not in html and "tiles" in html
    rows = [json.loads(line) for line in (tmp_path / "out" / "wer.jsonl").read_text().splitlines()]
    for row in rows:
        assert soundfile.info(tmp_path / "out" / row["audio"]).duration == pytest.approx(row["predicted_seconds"])
    said = capsys.readouterr().out
    assert said.count("have no '/' '<' '>' 'b' 'é';") == 1 and said.count("warning") == 1




# --- folders for sharing

@pytest.fixture(scope="module")
def averaged_checkpoint(model, tmp_path_factory):
    """Weights that were trained for a while: their averages are others, of the embeddings that T5 has twice, too."""
    path = tmp_path_factory.mktemp("averaged") / "latest.pt"
    torch.manual_seed(1)
    ema = {name: p.detach() + 0.03 * torch.randn_like(p) for name, p in model.named_parameters()}
    torch.save({"model": model.saved_state(), "ema": ema, "step": 3, "config": dataclasses.asdict(model.cfg), "optimizers": [],
                "train_seconds": 1.5}, path)
    return path


def test_an_exported_folder_speaks_as_its_checkpoint_does(model, averaged_checkpoint, tmp_path):
    """Bit for bit, and so does the folder's own export; without the averages it would sound another way."""
    raw = torch.load(averaged_checkpoint, weights_only=True) | {"ema": {}}
    torch.save(raw, tmp_path / "raw.pt")
    sample_main(["--ckpt", str(averaged_checkpoint), "--export", str(tmp_path / "voice")])
    sample_main(["--ckpt", str(tmp_path / "voice"), "--export", str(tmp_path / "again") + "/"])
    wavs = []
    for source in (averaged_checkpoint, tmp_path / "voice", tmp_path / "again", tmp_path / "raw.pt"):
        sample_main(["--ckpt", str(source), "--text", "The same text.", "--seed", "5", "--steps", "2", "--seconds", "0.5",
                     "--vocoder", "griffinlim", "--device", "cpu", "--out", str(tmp_path / "x.wav")])
        wavs.append((tmp_path / "x.wav").read_bytes())
    assert wavs[0] == wavs[1] == wavs[2] != wavs[3]
    assert sorted(os.listdir(tmp_path)) == ["again", "raw.pt", "voice", "x.wav"]
    assert sorted(os.listdir(tmp_path / "voice")) == ["config.yaml", "corpus.json", "model.safetensors"]
    for name in os.listdir(tmp_path / "voice"):
        assert (tmp_path / "voice" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    about = json.loads((tmp_path / "voice" / "corpus.json").read_text())
    assert about | {"step": 3, "mel_mean": -5.0, "mel_std": 2.0, "text_encoder": "random", "text_encoder_included": True} == about
    assert from_flags({"config": str(tmp_path / "voice" / "config.yaml")}) == model.cfg
    # anyone can read the weights, and they are the averages
    weights, ema = load_file(tmp_path / "voice" / "model.safetensors"), torch.load(averaged_checkpoint, weights_only=True)["ema"]
    assert weights.keys() == ema.keys() and all(torch.equal(weights[k], ema[k]) for k in ema)


def test_the_evaluator_takes_an_exported_folder(averaged_checkpoint, tmp_path):
    export(load_checkpoint(str(averaged_checkpoint), "cpu")[0], 3, str(tmp_path / "voice"))
    for source, where in ((tmp_path / "voice", tmp_path / "voice"), (averaged_checkpoint, averaged_checkpoint.parent)):
        evaluator.main(["--ckpt", str(source), "--prompts", str(ROOT / "eval" / "prompts.txt"), "--num", "2", "--eval_steps", "1",
                        "--eval_judge", "none", "--eval_vocoder", "griffinlim", "--device", "cpu"])
        assert json.loads((where / "eval" / "manual_00000003" / "summary.json").read_text())["step"] == 3
    for name in ("000000.wav", "000001.wav"):
        a, b = (folder / "eval" / "manual_00000003" / name for folder in (tmp_path / "voice", averaged_checkpoint.parent))
        assert a.read_bytes() == b.read_bytes()


def test_export_leaves_what_is_there_alone(averaged_checkpoint, tmp_path):
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
        about = json.loads((folder / "corpus.json").read_text())
        assert about["text_encoder_included"] == trained and about["text_encoder"] == encoder
        if not trained:
            with torch.no_grad():  # what from_pretrained brings back is what is on the disk
                model.text_encoder.load_state_dict(small_model(text_encoder_name=encoder, train_text_encoder=False, shake=False).text_encoder.state_dict())
        mel, = sample(load_checkpoint(str(folder), "cpu")[0], ["hello"], steps=1)
        assert torch.equal(mel, sample(model, ["hello"], steps=1)[0])


def test_broken_checkpoints_are_refused(checkpoint, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)
    cases = {"cut.pt": checkpoint.read_bytes()[:2000], "text.pt": b"hello", "empty.pt": b""}
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    torch.save({"model": Evil(), "config": {}, "step": 1}, tmp_path / "evil.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in (*cases, "evil.pt", "list.pt"):
        with pytest.raises(UserError):
            read_checkpoint(str(tmp_path / name))
    assert not (tmp_path / "ran").exists()
    ckpt = read_checkpoint(str(checkpoint))
    ckpt["config"]["from_the_future"] = 1
    torch.save(ckpt, tmp_path / "new.pt")
    with pytest.raises(UserError, match="from_the_future"):
        load_checkpoint(str(tmp_path / "new.pt"), "cpu")


def test_averaged_weights_are_the_ones_that_speak(model, tmp_path):
    ema = {"no_text": torch.full_like(model.no_text.data, 7.0)}
    torch.save({"model": model.saved_state(), "ema": ema, "step": 3, "config": dataclasses.asdict(model.cfg)}, tmp_path / "c.pt")
    assert (load_checkpoint(str(tmp_path / "c.pt"), "cpu")[0].no_text == 7.0).all()


def test_devices():
    assert pick_device("cpu").type == "cpu"
    for wrong in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=wrong):
            pick_device(wrong)
