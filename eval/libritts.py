"""
python eval/libritts.py --source LibriTTS/test-clean

Writes a fixed sample of prompts, one a line, from your own copy of LibriTTS; the repo ships none of its text.
The same seed and the same corpus give the same bytes on every machine, so that error rates can be compared.
Defaults: --out eval/libritts_samples.txt, --num 128, --seed 1337.
"""
import argparse
import hashlib
import os
import sys
from pathlib import Path

SUFFIX = ".normalized.txt"  # SPEAKER/CHAPTER/SPEAKER_CHAPTER_PARA_SENT.normalized.txt
MIN_WORDS, MAX_WORDS = 4, 30
GET_IT = "get LibriTTS test-clean from https://www.openslr.org/60/, unpack it and pass its folder as --source"


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def find_transcripts(source):
    if not source.is_dir():
        found = "a file" if source.exists() else "nothing"
        fail(f"found {found} at {source}, expected a folder such as LibriTTS/test-clean; {GET_IT}")
    files = sorted(p for p in source.rglob("*") if p.is_file())  # ties must not show the file system's order
    transcripts = [p for p in files if p.name.endswith(SUFFIX) and p.name[0] != "."]  # Macs leave "._" twins
    if not transcripts:
        found = f"{len(files)} other file(s) such as {files[0].relative_to(source)}" if files else "no files"
        fail(f"found {found} under {source}, expected SPEAKER/CHAPTER/*{SUFFIX}; {GET_IT}")
    return transcripts


def sample_order(seed):
    # a hash and not a shuffle: one file more or less leaves the order of the others alone
    return lambda path: hashlib.sha1(f"{seed} {path.name.removesuffix(SUFFIX)}".encode()).digest()


def read_sentences(transcripts):
    sentences = {}  # keyed without case, so that a sentence read by two speakers is asked for once
    for path in transcripts:
        try:
            text = " ".join(path.read_text(encoding="utf-8").split())
        except (OSError, UnicodeDecodeError) as e:
            fail(f"found {path} unreadable ({e}), expected UTF-8 text; unpack the archive again")
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            sentences.setdefault(text.lower(), text)
    return list(sentences.values())


def main(argv=None):
    parser = argparse.ArgumentParser(description="write a fixed sample of prompts from a copy of LibriTTS")
    parser.add_argument("--source", type=Path, required=True, help="a folder such as LibriTTS/test-clean")
    parser.add_argument("--out", type=Path, default=Path("eval/libritts_samples.txt"))
    parser.add_argument("--num", type=int, default=128, help="how many sentences to write")
    parser.add_argument("--seed", type=int, default=1337, help="another seed, another sample")
    args = parser.parse_args(argv)
    if args.num < 1:
        fail(f"found --num {args.num}, expected at least 1; pass a larger --num")
    sentences = read_sentences(sorted(find_transcripts(args.source), key=sample_order(args.seed)))
    what = f"{len(sentences)} distinct sentences of {MIN_WORDS} to {MAX_WORDS} words"
    if len(sentences) < args.num:
        fail(f"found {what} under {args.source}, expected at least {args.num}; lower --num or {GET_IT}")
    tmp = args.out.parent / f".{args.out.name}.{os.getpid()}.tmp"
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        tmp.write_bytes("".join(s + "\n" for s in sentences[:args.num]).encode())  # the same bytes on Windows
        os.replace(tmp, args.out)
    except OSError as e:
        if tmp.exists():
            tmp.unlink()
        fail(f"cannot write {args.out} ({e}); pass another --out")
    print(f"wrote {args.num} of {what} to {args.out}")


if __name__ == "__main__":
    main()
