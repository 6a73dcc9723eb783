"""LJSpeech 1.1 to a processed corpus: the download before data/folder/prepare.py.

    python data/ljspeech/prepare.py --out data/ljspeech_bigvgan                          # download (2.7 GB), then prepare
    python data/ljspeech/prepare.py --source LJSpeech-1.1 --out data/ljspeech_bigvgan    # from a folder that you have

Its layout is metadata.csv with lines id|text|normalised text, and wavs/<id>.wav. Other folders of recordings are read too.
"""
import argparse
import hashlib
import http.client
import tarfile
import urllib.request
from pathlib import Path

from common import UserError, first_line, make_folder, progress, replacing, run_cli
from config import parse_with_audio
from folder.prepare import add_flags, prepare, refuse_flags  # data/folder/prepare.py

NAME = "LJSpeech-1.1"  # of the archive's only folder, and of the folder that we unpack to
URL = f"https://data.keithito.com/data/speech/{NAME}.tar.bz2"
SHA256 = "be1a30453f28eb8dd26af4101ae40cbf2c50413b1bb21936cbcdc6fae3de8aa5"


def download(url: str, archive: Path, expected: str) -> None:
    """Fetch `url` to `archive`. Continue from the .part file that an interrupted call has left.

    The file gets its name when its SHA-256 is `expected`. Raises UserError if it is another, or if the download fails.
    """
    part = archive.with_name(archive.name + ".part")
    start = part.stat().st_size if part.exists() else 0
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=60) as reply:
            if reply.status != 206:  # not a partial reply, so the file comes from its beginning
                start = 0
            size = start + int(reply.headers.get("Content-Length") or 0)
            bar = progress(total=size or None, initial=start, unit="B", unit_scale=True, desc=f"downloading {archive.name}")
            with open(part, "ab" if start else "wb") as f, bar:
                while block := reply.read(1 << 20):
                    f.write(block)
                    bar.update(len(block))
        if part.stat().st_size < size:  # a dropped connection can look like the end of the file
            raise ConnectionError(f"cut off after {part.stat().st_size} of {size} bytes")
    except (OSError, ValueError, http.client.HTTPException) as e:
        if getattr(e, "code", 0) != 416:  # 416: the .part file is complete already, so only its hash has to be checked
            raise UserError(f"cannot download {url}: {e}. Run the same command again to continue. Or fetch {NAME}.tar.bz2 "
                            "(2.7 GB) elsewhere, unpack it, and give --source FOLDER") from None
    with open(part, "rb") as f:
        found = hashlib.file_digest(f, "sha256").hexdigest()
    if found != expected:
        part.unlink()
        raise UserError(f"the file from {url} has SHA-256 {found}, expected {expected}; it was deleted, try again")
    part.rename(archive)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the archive's folder LJSpeech-1.1 to `folder`. Raises UserError if that fails."""
    print(f"unpacking {archive.name} (minutes)", flush=True)
    with replacing(folder) as tmp:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(tmp, filter="data")
        except (tarfile.TarError, EOFError, OSError) as e:
            raise UserError(f"cannot unpack {archive}: {first_line(e)}; delete it if it is damaged") from None
        if (tmp / NAME).is_dir():  # move the archive's files up by one level
            for path in (tmp / NAME).iterdir():
                path.rename(tmp / path.name)
            (tmp / NAME).rmdir()


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    raw = p.add_mutually_exclusive_group()
    raw.add_argument("--source", type=Path, help="an unpacked LJSpeech, or another folder of recordings")
    raw.add_argument("--download", action="store_true", help="fetch LJSpeech 1.1 (the default without --source)")
    p.add_argument("--url", default=URL, help="another address of the archive")
    p.add_argument("--sha256", default=SHA256, help="the archive's SHA-256")
    p.add_argument("--cache", type=Path, default=Path(__file__).parent, help="folder for the archive and its contents")
    add_flags(p)
    args = parse_with_audio(p, argv)
    refuse_flags(args)  # before a long download
    source = args.source or args.cache / NAME
    if not args.source and not source.is_dir():
        archive = make_folder(args.cache) / f"{NAME}.tar.bz2"
        if not archive.exists():
            download(args.url, archive, args.sha256)
        unpack(archive, source)
    prepare(source, args)


if __name__ == "__main__":
    run_cli(main)
