"""Any folder of recordings with their texts, to a processed corpus.

    python data/folder/prepare.py --source my_recordings --out data/mine_bigvgan

The texts are in a table (metadata.csv, .txt, .tsv, a filelist, JSON lines, …), or in x.txt or x.lab beside x.wav. Names,
separator, header and columns are found, the sounds wherever they lie below the folder. It prints how the table was read, and
asks in one line for what it cannot tell. The answers are flags:

    --metadata lists/train.txt    the table
    --columns audio,-,text        what each of its columns is: audio, text, speaker, or - (not read)
    --speaker anna                whose lines are taken
    --encoding latin-1            of the texts, if it is not UTF-8

Speech at 24 or 44.1 kHz: --config configs/bigvgan24k.yaml or bigvgan44k.yaml, here and for the training.

Look before you train: --report DIR, also without --out, writes a page with what the recordings hold, what stands out, such
as texts that may be wrong, and what training would leave out.

    --trim                        remove the silence at the ends beyond 0.2 s
    --split_long                  cut recordings longer than block_size at pauses, where the voice in the box can tell
                                  which words lie on each side
"""
import argparse
import functools
import os
import re
from dataclasses import replace
from pathlib import Path

from common import UserError, check_workers, run_cli
from config import parse_with_audio
from corpus import KEPT, Utterance, hash_splits, refuse_existing, write_corpus
from recordings import describe, find_sounds, index_sounds, is_sound, list_files, pair_transcripts, without_suffix
from report import write_report
from silence import read_part, split_source, without_silence
from transcripts import find_table, read_table, read_transcript

VOICE = str(Path(__file__).parents[2] / "voices" / "joe")  # aligns texts with recordings for --split_long


def locate(lines: list[tuple[str, str]], find) -> list[str]:
    """The path of each line's sound: (place, cell) -> path relative to the folder. Raises UserError.

    A missing sound gets the path where it is expected. For an id, that is beside the first sound that was found.
    """
    found, paths = [find(cell) for _, cell in lines], {}  # paths: path -> place
    if 2 * (count := sum(map(bool, found))) < len(lines):
        place, cell = next(line for line, candidates in zip(lines, found) if not candidates)
        raise UserError(f"only {count} of {len(lines)} lines name a sound that is there; {place} has {cell!r}. Name the "
                        "folder of the sounds with --source, or delete the lines that have no sound")
    folder, example = os.path.split(next(filter(None, found))[0])
    for (place, cell), candidates in zip(lines, found):
        if len(candidates) > 1:
            raise UserError(f"{place}: {cell!r} can be {' or '.join(map(repr, candidates[:3]))}; write the folder before "
                            "the name, or give --source the folder of the right sounds (and --metadata the table)")
        path = candidates[0] if candidates else cell or place.rpartition(", ")[2].replace(" ", "_")
        if not candidates and not is_sound(path) and not re.search(r"[/\\]", path):
            path = os.path.join(folder, path + os.path.splitext(example)[1])
        if path in paths:
            raise UserError(f"{place}: {cell!r} is {path}, which {paths[path]} names too; delete one of the two lines")
        paths[path] = place
    return list(paths)


def unique_ids(paths: list[str], places: list[str]) -> list[str]:
    """The sounds' names without extension; if some are equal, all with their folders, as folder_name. Raises UserError."""
    paths = [path.replace("\\", "/").strip("/") for path in paths]
    stems = [without_suffix(path) for path in paths]
    for ids in ([stem.split("/")[-1] for stem in stems], [stem.replace("/", "_") for stem in stems],
                [path.replace("/", "_") for path in paths]):
        if len(set(ids)) == len(ids):
            break
    seen = {}
    for utt_id, place in zip(ids, places):
        if utt_id in seen or not utt_id.isprintable():
            problem = f"is also that of {seen[utt_id]}" if utt_id in seen else "has characters that cannot be printed"
            raise UserError(f"{place}: the name {utt_id!r} {problem}; rename the sound")
        seen[utt_id] = place
    return ids


def read_folder(folder: Path, metadata: Path | None = None, encoding: str | None = None, columns: str | None = None,
                speaker: str | None = None) -> list[Utterance]:
    """The utterances of a folder of recordings with their texts, in the table's order. Prints how the table was read.

    The splits are drawn by the ids' hashes. A line without a text or whose sound is missing becomes an utterance that
    write_corpus rejects. Raises UserError if the folder cannot be read so, or if something has to be asked.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; expected one with recordings and their texts")
    files = list_files(folder)
    find = functools.cache(functools.partial(find_sounds, sounds=index_sounds(files), folder=folder))
    pairs, others = pair_transcripts(files), {}
    if metadata is None:
        table, others = find_table(folder, files, pairs, find)
        metadata = table and folder / table
    elif not metadata.is_file():  # perhaps it is meant relative to the folder
        metadata = folder / metadata
    if metadata:
        lines, how = read_table(metadata, folder, describe(files), find, encoding, columns, speaker)
    elif columns or speaker:
        raise UserError(f"--columns and --speaker are for a table, but the texts of {folder} lie beside its sounds, such as "
                        f"{next(iter(pairs.values()))}; write --metadata FILE if there is a table")
    else:
        lines = [(str(folder / sound), sound, read_transcript(folder / pairs[sound], encoding) if sound in pairs else "")
                 for sound in filter(is_sound, files)]
        how = f"{folder}: no table; the text of {next(iter(pairs))} is in {next(iter(pairs.values()))}, and so on"
    paths = locate([(place, cell) for place, cell, _ in lines], find)
    print(f"{how}; {len(lines)} lines, {sum(os.path.isfile(folder / path) for path in paths)} sounds found")
    for path, count in others.items():
        print(f"not read: {folder / path}, which names {count} sounds")
    ids = unique_ids(paths, [place for place, _, _ in lines])
    split = hash_splits(ids)
    return [Utterance(utt_id, " ".join(text.split()), split[utt_id], str(folder / path))
            for utt_id, path, (_, _, text) in zip(ids, paths, lines)]


def add_flags(p: argparse.ArgumentParser) -> None:
    """The flags that data/ljspeech/prepare.py has too."""
    p.add_argument("--out", help="folder of the processed corpus")
    p.add_argument("--report", type=Path, metavar="DIR",
                   help="write a page and a table about the recordings; then --out is optional")
    p.add_argument("--trim", action="store_true", help="remove the silence at the ends of recordings beyond 0.2 s")
    p.add_argument("--split_long", nargs="?", const=VOICE, metavar="VOICE",
                   help="cut recordings longer than block_size at pauses; a voice aligns them with their texts (voices/joe)")
    p.add_argument("--metadata", type=Path, metavar="FILE", help="the table of texts; default: it is found in the folder")
    p.add_argument("--columns", help="what each column of the table is, for example audio,speaker,text (- : not read)")
    p.add_argument("--speaker", metavar="NAME", help="take only the lines of this speaker")
    p.add_argument("--encoding", help="of the texts; default: as the byte order mark says, or else utf-8")
    p.add_argument("--workers", type=int, help="number of processes; default: one per core")
    p.add_argument("--strict", action="store_true", help="refuse bad files instead of skipping them")
    p.add_argument("--force", action="store_true", help="replace an existing corpus")


def refuse_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is downloaded or read."""
    if not args.out and not args.report:
        raise UserError("nothing to do: write --out DIR for a corpus, or --report DIR to look at the recordings first")
    if args.out:
        refuse_existing(args.out, args.force)
    check_workers(args.workers)


def prepare(source: Path, args: argparse.Namespace) -> None:
    """Write the report and the corpus of a folder, as the flags say. Raises UserError."""
    utterances = read_folder(source, args.metadata, args.encoding, args.columns, args.speaker)
    if args.split_long:
        from splitting import split_long  # here, because it loads for seconds
        utterances = split_long(utterances, args.cfg, args.split_long, args.trim, args.workers)
    if args.trim:
        utterances = [u if split_source(u.source)[1] else replace(u, source=without_silence(u.source)) for u in utterances]
    if args.report:
        print(f"report: {write_report(args.report, source.resolve().name, utterances, args.cfg, args.workers)}")
    if args.out:
        write_corpus(args.out, utterances, read_part, args.cfg, args.workers, args.strict, args.force, recordings=KEPT)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--source", type=Path, required=True, help="the folder of recordings")
    add_flags(p)
    args = parse_with_audio(p, argv)
    refuse_flags(args)
    prepare(args.source, args)


if __name__ == "__main__":
    run_cli(main)
