"""The sounds of a folder, what can name them, and the texts that lie beside them."""
import os
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import soundfile

SOUNDS = ({f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus", ".sph"}) - {".raw"}
TRANSCRIPTS = (".normalized.txt", ".txt", ".lab")  # endings of a text beside its sound; the first one is LibriTTS's


def list_files(folder: Path) -> list[str]:
    """Paths below the folder, relative to it, sorted. Not hidden files, nor processed corpora, which keep recordings."""
    found, seen = [], set()
    for top, folders, names in os.walk(folder, followlinks=True):
        if "mel_shards" in folders or os.path.realpath(top) in seen:  # a link can lead back up
            folders.clear()
            continue
        seen.add(os.path.realpath(top))
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        found += [os.path.relpath(os.path.join(top, name), folder) for name in names if not name.startswith(".")]
    return sorted(found)


def is_sound(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SOUNDS


def without_suffix(name: str) -> str:
    return os.path.splitext(name)[0] if is_sound(name) else name


def key(name: str) -> str:
    """A file name as it is compared: case does not matter, nor how accents are encoded (macOS takes letters apart)."""
    return unicodedata.normalize("NFC", name).casefold()


def index_sounds(files: list[str]) -> dict[str, list[str]]:
    """The sounds by the keys of their file names, with and without extension."""
    index = defaultdict(list)
    for path in filter(is_sound, files):
        name = key(os.path.basename(path))
        index[name].append(path)
        index[without_suffix(name)].append(path)
    return dict(index)


def find_sounds(cell: str, sounds: dict[str, list[str]], folder: Path) -> list[str]:
    """The sounds that a table's cell can mean: none, one, or several that are equally likely. `sounds`: see index_sounds.

    A cell is an id, a file name with any extension of a sound, or a path. The path can be that of another machine, because
    only its last parts are compared. A path to a sound outside the folder is taken too if it exists.
    """
    parts = [part for part in cell.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        return []
    name = key(parts[-1])
    found = sounds.get(name) or (is_sound(name) and sounds.get(without_suffix(name))) or []
    if not found and is_sound(name) and os.path.isfile(folder / cell):
        return [cell]

    def likeness(path: str) -> tuple:
        own = path.split("/")
        folders = list(zip(parts[-2::-1], own[-2::-1]))  # from the last one on
        same = next((n for n, (a, b) in enumerate(folders) if key(a) != key(b)), len(folders))
        return (path == f"wavs/{cell}.wav", same, path == "/".join(parts), own[-1].startswith(parts[-1]),
                path.endswith(".wav"))
    if len(found) > 1:
        best = max(map(likeness, found))
        found = [path for path in found if likeness(path) == best]
    return found


def pair_transcripts(files: list[str]) -> dict[str, str]:
    """sound -> its text: the file of the same name in the same folder, or else the only one of that name in another."""
    beside, anywhere = {}, defaultdict(list)
    for ending in TRANSCRIPTS:
        for path in files:
            if path.lower().endswith(ending):
                beside.setdefault(path[:-len(ending)], path)
    for stem in beside:
        anywhere[os.path.basename(stem)].append(beside[stem])
    pairs = {}
    for sound in filter(is_sound, files):
        stem = without_suffix(sound)
        same_name = anywhere.get(os.path.basename(stem), [])
        if path := beside.get(stem) or (same_name[0] if len(same_name) == 1 else None):
            pairs[sound] = path
    return pairs


def describe(files: list[str]) -> str:
    """A folder's contents, for an error: how many files of each kind, and the first sound."""
    kinds = Counter(os.path.splitext(path)[1].lower() or "without extension" for path in files)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4)) or "no files"
    example = next(filter(is_sound, files), None)
    return counts + (f"; the first sound is {example!r}" if example else
                     "; none of a sound that can be read, so convert them, e.g. ffmpeg -i x.m4a x.wav")
