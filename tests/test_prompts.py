"""
python -m pytest tests/test_prompts.py

The prompt list that ships, and the script that samples one from the user's LibriTTS, on small real folders.
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
URL = "https://www.openslr.org/60/"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
CORPUS = {f"{100 + i % 5}_{200 + i % 3}_{i:06d}_000000": f"Speaker {word} reads the page aloud."
          for i, word in enumerate(NUMBERS)}


def write_corpus(folder, texts, order=None):
    """texts: utterance stem -> transcript; order: the stems in the order in which the files are made"""
    folder.mkdir()
    for stem in order or texts:
        speaker, chapter = stem.split("_")[:2]
        chapter_dir = folder / speaker / chapter
        chapter_dir.mkdir(parents=True, exist_ok=True)
        (chapter_dir / f"{stem}.original.txt").write_text("The original spelling is never what we want.")
        (chapter_dir / f"{stem}.normalized.txt").write_text(texts[stem], encoding="utf-8")
    return folder


def libritts(source, out, *args):
    command = [sys.executable, str(ROOT / "eval" / "libritts.py"), "--source", str(source), "--out", str(out)]
    return subprocess.run([*command, *args], capture_output=True, text=True, cwd=ROOT)


def sample(source, out, *args):
    result = libritts(source, out, *args)
    assert result.returncode == 0, result.stderr
    return out.read_bytes()


def assert_refused(result, out, *needles):
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for needle in needles:
        assert needle in result.stderr
    # neither the sample nor its temporary file
    assert not out.parent.exists() or os.listdir(out.parent) == []


def test_prompts_are_many_distinct_and_plain():
    text = (ROOT / "eval" / "prompts.txt").read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert len(lines) >= 100
    assert len({re.sub("[^a-z ]", "", line.lower()) for line in lines}) == len(lines)
    for line in lines:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.?!';:-]*[.?!]", line), line
        assert "  " not in line and 3 <= len(line.split()) <= 25, line


def test_order_of_creation_does_not_matter(tmp_path):
    forward = write_corpus(tmp_path / "a", CORPUS)
    backward = write_corpus(tmp_path / "b", CORPUS, order=sorted(CORPUS, reverse=True))
    expected = sample(forward, tmp_path / "a.txt", "--num", "6")
    assert sample(backward, tmp_path / "b.txt", "--num", "6") == expected


def test_two_runs_give_the_same_bytes_and_another_seed_others(tmp_path):
    source, out = write_corpus(tmp_path / "corpus", CORPUS), tmp_path / "new" / "samples.txt"
    first = sample(source, out, "--num", "6")
    assert sample(source, out, "--num", "6") == first
    assert sample(source, out, "--num", "6", "--seed", "1") != first
    assert os.listdir(out.parent) == ["samples.txt"]


def test_sample_of_a_known_corpus(tmp_path):
    # pinned, so that error rates of different versions of the repo stay comparable
    source = write_corpus(tmp_path / "corpus", CORPUS)
    lines = sample(source, tmp_path / "samples.txt", "--num", "3").decode().splitlines()
    assert lines == [f"Speaker {word} reads the page aloud." for word in ("three", "ten", "nine")]


def test_only_whole_distinct_sentences_of_the_right_length(tmp_path):
    texts = {"1_1_000001_000000": "  Four\twords \n are\u2028enough.\n",
             "1_1_000002_000000": "four words are enough.",
             "1_1_000003_000000": "Three are few.",
             "1_1_000004_000000": " ".join(["word"] * 30),
             "1_1_000005_000000": " ".join(["long"] * 31),
             "1_1_000006_000000": " \n",
             "1_1_000007_000000": "Café owners brew it daily."}
    source = write_corpus(tmp_path / "corpus", texts)
    (source / "1" / "1" / "._1_1_000001_000000.normalized.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    result = libritts(source, tmp_path / "samples.txt", "--num", "3")
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "samples.txt").read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    assert sorted(line.lower() for line in lines) == sorted(
        ["four words are enough.", " ".join(["word"] * 30), "café owners brew it daily."])
    assert result.stdout.startswith("wrote 3 of 3 ") and "samples.txt" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_missing_folder_is_refused(tmp_path):
    out = tmp_path / "out" / "samples.txt"
    assert_refused(libritts(tmp_path / "nowhere", out), out, "found nothing", "nowhere", URL)
    (tmp_path / "test-clean.tar.gz").write_bytes(b"")
    assert_refused(libritts(tmp_path / "test-clean.tar.gz", out), out, "found a file", URL)


def test_folder_without_transcripts_is_refused(tmp_path):
    out = tmp_path / "out" / "samples.txt"
    source = tmp_path / "LibriSpeech"
    source.mkdir()
    assert_refused(libritts(source, out), out, "found no files", ".normalized.txt", URL)
    (source / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR")
    result = libritts(source, out)
    assert_refused(result, out, "found 1 other file", "84-121123.trans.txt", ".normalized.txt", URL)


def test_unreadable_transcript_is_refused(tmp_path):
    out, source = tmp_path / "out" / "samples.txt", write_corpus(tmp_path / "corpus", CORPUS)
    (source / "broken.normalized.txt").write_bytes(b"half a fil\xff")
    assert_refused(libritts(source, out, "--num", "3"), out, "broken.normalized.txt", "UTF-8")


@pytest.mark.parametrize("num, needle", [("13", "found 12 "), ("0", "--num 0"), ("-1", "--num -1")])
def test_impossible_number_is_refused(tmp_path, num, needle):
    out = tmp_path / "out" / "samples.txt"
    assert_refused(libritts(write_corpus(tmp_path / "corpus", CORPUS), out, "--num", num), out, needle)


def test_failure_to_write_is_one_line_and_leaves_the_old_sample(tmp_path):
    source, out = write_corpus(tmp_path / "corpus", CORPUS), tmp_path / "out" / "samples.txt"
    before = sample(source, out, "--num", "6")
    too_many = libritts(source, out, "--num", "100")
    assert too_many.returncode == 2 and out.read_bytes() == before
    for bad in (out / "samples.txt", out.parent):  # a file where a folder is needed, and the other way round
        result = libritts(source, bad, "--num", "6")
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert os.listdir(out.parent) == ["samples.txt"] and sorted(os.listdir(tmp_path)) == ["corpus", "out"]
