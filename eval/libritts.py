"""Write a fixed sample of prompts, one per line, from your own copy of LibriTTS. This repository contains none of its text.

    python eval/libritts.py --source LibriTTS/test-clean

The same seed and corpus give the same bytes on every machine, so error rates can be compared.
"""
import argparse
import hashlib
from pathlib import Path

from common import UserError, make_folder, run_cli, write_file

SUFFIX = ".normalized.txt"  # SPEAKER/CHAPTER/SPEAKER_CHAPTER_PARAGRAPH_SENTENCE.normalized.txt
MIN_WORDS, MAX_WORDS = 4, 30
GET_IT = "get LibriTTS test-clean from https://www.openslr.org/60/, unpack it and pass its folder as --source"


def read_sentences(source: Path, seed: int) -> list[str]:
    """The distinct sentences of MIN_WORDS to MAX_WORDS words below `source`, in an order given by `seed`."""
    files = sorted(p for p in source.rglob("*" + SUFFIX) if not p.name.startswith("."))  # macOS adds ._ files
    if not files:
        raise UserError(f"found no */*/*{SUFFIX} in {source}; {GET_IT}")
    sentences = {}  # keyed by lower case, so that a sentence read by two speakers is used once
    # sorted by a hash, so that one file more or less does not change the order of the others
    for path in sorted(files, key=lambda p: hashlib.sha1(f"{seed} {p.name.removesuffix(SUFFIX)}".encode()).digest()):
        text = " ".join(path.read_text(encoding="utf-8").split())
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            sentences.setdefault(text.lower(), text)
    return list(sentences.values())


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", type=Path, required=True, help="a folder such as LibriTTS/test-clean")
    p.add_argument("--out", type=Path, default=Path("eval/libritts_samples.txt"))
    p.add_argument("--num", type=int, default=128, help="number of sentences")
    p.add_argument("--seed", type=int, default=1337, help="another seed gives another sample")
    args = p.parse_args(argv)
    sentences = read_sentences(args.source, args.seed)
    available = f"{len(sentences)} distinct sentences of {MIN_WORDS} to {MAX_WORDS} words"
    if not 1 <= args.num <= len(sentences):
        raise UserError(f"--num {args.num}: found {available} in {args.source}; lower --num (at least 1) or {GET_IT}")
    make_folder(args.out.parent)
    write_file(args.out, "".join(s + "\n" for s in sentences[:args.num]))
    print(f"wrote {args.num} of {available} to {args.out}")


if __name__ == "__main__":
    run_cli(main)
