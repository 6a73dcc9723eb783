"""An open-vocabulary corpus of LJSpeech's size: prose that comes with every Python, spoken by espeak-ng. No downloads.

    python data/openvocab/prepare.py --out data/openvocab_bigvgan                       # 13,100 utterances, 24 hours
    python data/openvocab/prepare.py --out data/small_bigvgan --utterances 600          # the same, smaller

The sentences are those of the docstrings of Python's standard library and of torch, on this machine: some 15,000, of
thousands of words. No held-out sentence is in a training utterance. An utterance has one or a few of them, 1 to 10 s in
all, at a rate and a pitch of its own.
"""
import argparse
import dataclasses
import hashlib
import json
import re
import sys
import sysconfig
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import audio  # noqa: E402
from config import Config, UserError, run_cli, waiting  # noqa: E402
from data import Utterance, refuse_existing, write_corpus  # noqa: E402
from espeak import speak  # noqa: E402

LIKE = r"[A-Z][a-z]*(?:[,;]? [A-Za-z][a-z]*(?:[-'][a-z]+)?)+[.?!]"  # words and commas alone: nothing that code looks like
FEWEST, MOST = 8, 140  # characters of a sentence
WPM = 110, 190  # words a minute
PITCH = 20, 80
CHARACTERS = 0.107  # a second, for each word a minute
PAUSE = 0.3  # seconds between two sentences
SHORTEST, LONGEST = 1.0, 10.0  # seconds of an utterance
HELD_OUT = 100, 500  # utterances of val and of test, as LJSpeech has them here


# --- the text

def docstrings(folder: Path):
    """What stands between triple quotes in the Python files below a folder, but in tests and in other packages."""
    for path in sorted(folder.rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(folder).parts):
            # not by ast, which takes half a minute for the same sentences
            yield from re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)


def prose() -> list[str]:
    """The distinct plain sentences of Python's and torch's docstrings, in the order of their SHA-1."""
    import torch
    found = {}
    for folder in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for text in waiting(docstrings(folder), desc=f"reading {folder}", unit=" docstrings"):
            for paragraph in re.split(r"\n\s*\n", text):
                for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                    if FEWEST <= len(sentence) <= MOST and re.fullmatch(LIKE, sentence):
                        found[sentence] = None
    return sorted(found, key=lambda sentence: hashlib.sha1(sentence.encode()).digest())


@dataclasses.dataclass
class Plan:
    """What espeak-ng is to say, and how."""
    text: str
    wpm: int
    pitch: int


def plan(sentences: list[str], count: int, rng: np.random.Generator) -> list[Plan]:
    """`count` utterances of these sentences; when all have been used they are shuffled and used again."""
    plans, left = [], []

    def seconds(text, wpm):
        return len(text) / (CHARACTERS * wpm) + PAUSE * (len(re.findall(r"[.?!] ", text)) + 1)
    for _ in range(count):
        left = left or list(rng.permutation(sentences))
        text = str(left.pop())
        # slower than its length allows, a sentence would be longer than 10 s; an estimate, so less is aimed at
        wpm, pitch = int(rng.integers(max(WPM[0], len(text) + 20), WPM[1] + 1)), int(rng.integers(PITCH[0], PITCH[1] + 1))
        aim = rng.triangular(SHORTEST, LONGEST, LONGEST)
        while left and seconds(text, wpm) < aim and seconds(f"{text} {left[-1]}", wpm) < 0.94 * LONGEST:
            text = f"{text} {left.pop()}"
        plans.append(Plan(text, wpm, pitch))
    return plans


def utterances(sentences: list[str], count: int, seed: int) -> list[Utterance]:
    """The corpus's utterances. Held-out sentences come first in the order of their SHA-1, so that another Python's files,
    which differ in some, leave the others where they are.
    """
    rng, result, start = np.random.default_rng(seed), [], 0
    most = max(1, count // 20)
    sizes = {"val": min(HELD_OUT[0], most), "test": min(HELD_OUT[1], most)}
    sizes["train"] = count - sum(sizes.values())
    for split, size in sizes.items():
        end = len(sentences) if split == "train" else start + min(3 * size, len(sentences) // 5)
        for n, what in enumerate(plan(sentences[start:end], size, rng)):
            result.append(Utterance(f"{split}_{n:06d}", what.text, split, json.dumps(dataclasses.asdict(what))))
        start = end
    return result


def read(source: str, sample_rate: int) -> np.ndarray:
    """The sound of a plan (samples,). Raises AudioError if it is not 1 to 10 s long."""
    what = json.loads(source)
    wav = speak(what["text"], sample_rate, what["wpm"], what["pitch"])
    if not SHORTEST <= len(wav) / sample_rate <= LONGEST:
        raise audio.AudioError(f"{len(wav) / sample_rate:.2f} s, expected {SHORTEST} to {LONGEST}")
    return wav


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--utterances", type=int, default=13_100, help="in all")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--workers", type=int, help="processes; default: one a core")
    p.add_argument("--strict", action="store_true", help="refuse utterances that are not 1 to 10 s instead of skipping them")
    p.add_argument("--force", action="store_true", help="replace an existing corpus")
    args = p.parse_args(argv)
    if not 20 <= args.utterances <= 100_000:
        raise UserError(f"--utterances {args.utterances}: expected 20 to 100000")
    refuse_existing(args.out, args.force)  # before all is read
    sentences = prose()
    if len(sentences) < 10_000:
        raise UserError(f"found {len(sentences)} plain sentences in the docstrings of {sysconfig.get_path('stdlib')} and of "
                        "torch, expected at least 10000; a Python whose standard library has no .py files cannot make "
                        "this corpus")
    write_corpus(args.out, utterances(sentences, args.utterances, args.seed), read, Config(), args.workers, args.strict,
                 args.force)


if __name__ == "__main__":
    run_cli(main)
