"""LJSpeech 1.1 (or any folder in its layout) to a processed corpus.

    python data/ljspeech/prepare.py --out data/ljspeech_bigvgan                          # download (2.7 GB), then prepare
    python data/ljspeech/prepare.py --source LJSpeech-1.1 --out data/ljspeech_bigvgan    # from a folder that you have

The layout: metadata.csv with lines id|text|normalised text, and wavs/<id>.wav. Your own corpus in this layout works alike.
"""
import argparse
import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from audio import read_wav  # noqa: E402
from config import Config, UserError, first_line, run_cli  # noqa: E402
from data import Utterance, hash_splits, refuse_existing, write_corpus  # noqa: E402

HERE = Path(__file__).resolve().parent
URL = "https://data.keithito.com/data/speech/LJSpeech-1.1.tar.bz2"
SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"
BYTES = 2_748_572_632
ELSEWHERE = f"Or fetch LJSpeech-1.1.tar.bz2 ({BYTES / 1e9:.1f} GB) elsewhere, unpack it, and give --source FOLDER"


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def download(url: str, archive: Path, expected: str) -> None:
    """Fetch `url` to `archive`, going on with what an earlier call left; it gets its name once its SHA-256 is right.

    Raises UserError if the server cannot be reached or what came is not the expected file.
    """
    part = archive.with_name(archive.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            if have and reply.status != 206:  # the server does not resume: from the start
                have = 0
            size = have + int(reply.headers.get("Content-Length") or 0)
            with open(part, "ab" if have else "wb") as f, tqdm(
                    total=size or None, initial=have, unit="B", unit_scale=True, desc=f"downloading {archive.name}") as bar:
                while block := reply.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if part.stat().st_size < size:  # a dropped connection can look like an end
            raise ConnectionError(f"cut off after {part.stat().st_size} of {size} bytes")
    except urllib.error.HTTPError as e:
        if e.code != 416:  # 416: there is nothing left to fetch, so the file is whole or wrong; its hash will tell
            raise UserError(f"cannot download {url}: {e}. {ELSEWHERE}") from None
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise UserError(f"cannot download {url} ({getattr(e, 'reason', e)}). Run the same command again to go on. "
                        f"{ELSEWHERE}") from None
    found = sha256(part)
    if found != expected:
        part.unlink()
        raise UserError(f"what came from {url} has SHA-256 {found}, expected {expected}; it was deleted, try again")
    os.replace(part, archive)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack into a temporary folder beside `folder`, which gets its name when it is whole."""
    tmp = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    print(f"unpacking {archive.name} (minutes)", flush=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"cannot unpack {archive}: {first_line(e)}") from None
    inner = tmp / "LJSpeech-1.1"
    os.replace(inner if inner.is_dir() else tmp, folder)
    shutil.rmtree(tmp, ignore_errors=True)


def read_metadata(source: Path) -> list[Utterance]:
    """The utterances of an LJSpeech folder, in its order. Raises UserError if it is not one.

    metadata.csv has bare quotes in its texts, so it is split at its bars and not read as CSV. Lines without an id or a
    text come back with an empty text, which the writer lists among the rejected.
    """
    metadata = source / "metadata.csv"
    if not metadata.is_file():
        there = sorted(p.name for p in source.iterdir())[:5] if source.is_dir() else "no such folder"
        raise UserError(f"no metadata.csv in {source} (found: {there}); expected LJSpeech's layout: metadata.csv with lines "
                        "id|text|normalised text, and wavs/<id>.wav")
    try:
        lines = metadata.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{metadata} cannot be read as UTF-8 text: {e}") from None
    texts = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split("|")]
        utt_id = fields[0] or f"line_{number}"
        if utt_id in texts or "/" in utt_id or "\\" in utt_id or not utt_id.isprintable():
            raise UserError(f"{metadata}, line {number}: the id {utt_id!r} occurs twice or is not a plain file name")
        text = (fields + ["", ""])[2] or (fields + [""])[1]  # the normalised text, or the original one
        texts[utt_id] = " ".join(text.split())
    if not texts:
        raise UserError(f"{metadata} is empty; expected lines of id|text|normalised text")
    split = hash_splits(list(texts))
    return [Utterance(i, text, split[i], str(source / "wavs" / f"{i}.wav")) for i, text in texts.items()]


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    where = p.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, help="an unpacked folder in LJSpeech's layout")
    where.add_argument("--download", action="store_true", help="fetch LJSpeech 1.1 (the default without --source)")
    p.add_argument("--url", default=URL, help="another place to download from")
    p.add_argument("--sha256", default=SHA256, help="the archive's SHA-256")
    p.add_argument("--cache", type=Path, default=HERE, help="where the download goes")
    p.add_argument("--workers", type=int, help="processes; default: one a core")
    p.add_argument("--strict", action="store_true", help="refuse bad files instead of skipping them")
    p.add_argument("--force", action="store_true", help="replace an existing corpus")
    args = p.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers}: expected 1 or more")
    refuse_existing(args.out, args.force)  # before a long download
    source = args.source
    if source is None:
        source, archive = args.cache / "LJSpeech-1.1", args.cache / "LJSpeech-1.1.tar.bz2"
        if not source.is_dir():
            args.cache.mkdir(parents=True, exist_ok=True)
            if not archive.exists() or sha256(archive) != args.sha256:
                download(args.url, archive, args.sha256)
            unpack(archive, source)
    write_corpus(args.out, read_metadata(source), read_wav, Config(), args.workers, args.strict, args.force)


if __name__ == "__main__":
    run_cli(main)
