"""The prompt list that ships, and the script that samples one from the user's LibriTTS, on small real folders."""
import os
import re

import pytest
from conftest import ROOT

from common import UserError
from eval import libritts

URL = "https://www.openslr.org/60/"
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
CORPUS = {f"{100 + i % 5}_{200 + i % 3}_{i:06d}_000000": f"Speaker {word} reads the page aloud."
          for i, word in enumerate(NUMBERS)}


def write_corpus(folder, texts):
    """texts: utterance -> transcript, written in this order"""
    for utterance, text in texts.items():
        speaker, chapter = utterance.split("_")[:2]
        (folder / speaker / chapter).mkdir(parents=True, exist_ok=True)
        (folder / speaker / chapter / f"{utterance}.original.txt").write_text("The original spelling is not used.")
        (folder / speaker / chapter / f"{utterance}.normalized.txt").write_text(text, encoding="utf-8")
    return folder


def sample(source, out, *args):
    libritts.main(["--source", str(source), "--out", str(out), *args])
    return out.read_bytes()


def test_prompts_are_many_distinct_and_plain():
    text = (ROOT / "eval" / "prompts.txt").read_text(encoding="utf-8")
    assert text.endswith("\n")
    lines = text[:-1].split("\n")
    assert len(lines) >= 100
    assert len({re.sub("[^a-z ]", "", line.lower()) for line in lines}) == len(lines)
    for line in lines:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.?!';:-]*[.?!]", line), line
        assert "  " not in line and 3 <= len(line.split()) <= 25, line


def test_a_sample_depends_on_the_texts_and_the_seed_alone(tmp_path):
    source, out = write_corpus(tmp_path / "a", CORPUS), tmp_path / "new" / "samples.txt"
    first = sample(source, out, "--num", "6")
    # pinned, so that error rates of different versions of the repo stay comparable
    assert first.decode().splitlines()[:3] == [f"Speaker {word} reads the page aloud." for word in ("three", "ten", "nine")]
    assert sample(source, out, "--num", "6") == first and os.listdir(out.parent) == ["samples.txt"]
    assert sample(source, out, "--num", "6", "--seed", "1") != first
    backward = write_corpus(tmp_path / "b", dict(sorted(CORPUS.items(), reverse=True)))
    assert sample(backward, out, "--num", "6") == first


def test_only_whole_distinct_sentences_of_the_right_length(tmp_path, capsys):
    texts = {"1_1_000001_000000": "  Four\twords \n are\u2028enough.\n",
             "1_1_000002_000000": "four words are enough.",
             "1_1_000003_000000": "Three are few.",
             "1_1_000004_000000": " ".join(["word"] * 30),
             "1_1_000005_000000": " ".join(["long"] * 31),
             "1_1_000006_000000": " \n",
             "1_1_000007_000000": "Café owners brew it daily."}
    source = write_corpus(tmp_path / "corpus", texts)
    (source / "1" / "1" / "._1_1_000001_000000.normalized.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    lines = sample(source, tmp_path / "samples.txt", "--num", "3").decode("utf-8").split("\n")
    assert lines.pop() == ""
    assert sorted(line.lower() for line in lines) == sorted(
        ["four words are enough.", " ".join(["word"] * 30), "café owners brew it daily."])
    assert capsys.readouterr().out.startswith("wrote 3 of 3 ")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.write_bytes(b""), lambda p: p.mkdir(),
                                  lambda p: write_corpus(p, {"1_1_1_1": "x"}) and next(p.rglob("*.normalized.txt")).unlink()])
def test_a_source_without_transcripts_is_refused(tmp_path, make):
    make(tmp_path / "source")
    with pytest.raises(UserError, match=f"source; .*{URL}"):
        libritts.main(["--source", str(tmp_path / "source"), "--out", str(tmp_path / "out" / "samples.txt")])
    assert not (tmp_path / "out").exists()


def test_mistakes_leave_the_old_sample(tmp_path):
    source, out = write_corpus(tmp_path / "corpus", CORPUS), tmp_path / "out" / "samples.txt"
    before = sample(source, out, "--num", "6")
    for num in ("13", "0", "-1"):
        with pytest.raises(UserError, match=f"--num {num}: found 12 "):
            sample(source, out, "--num", num)
    for bad in (out / "samples.txt", out.parent):  # a file where a folder is needed, and the other way round
        with pytest.raises(UserError, match="cannot write"):
            sample(source, bad, "--num", "6")
    assert os.listdir(out.parent) == ["samples.txt"] and out.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["corpus", "out"]
