"""A look at recordings before training: a page and a table of what they hold, what stands out, and what is left out.

data/folder/prepare.py --report DIR writes them: DIR/index.html, which opens from disk and plays the recordings where they
lie, and DIR/utterances.csv with one line for each utterance.
"""
import csv
import functools
import hashlib
import io
import os
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import quote

import numpy as np
import soundfile

import audio
from common import make_folder, map_processes, progress, write_file
from config import Config
from corpus import SPLITS, Utterance
from eval.page import TEMPLATES
from normalise import as_spoken
from silence import KEPT_SILENCE, find_speech, read_part, split_source
from text_encoder import load_tokeniser

SHOWN = 20  # rows of a table of the page; utterances.csv has all
RARE = 10  # a character that occurs less often is hardly learned
OUTLIER = 4.0  # deviations (of 1.48 MAD, which is one standard deviation of a normal distribution) from the median
SPECTRUM, DROP = 1024, 70  # samples of a spectrum; dB below its peak where the sound counts as ended
SILENT = -60.0  # dB of full scale: quieter speech is taken for none
QUIETER = 10.0  # dB from the median loudness
COLUMNS = ("utt_id split problem seconds frames words characters characters_per_second deviation leading_silence "
           "trailing_silence longest_pause loudness_db peak clipped sample_rate bandwidth_hz text source").split()


# --- one recording

def bandwidth(wav: np.ndarray, rate: int) -> float:
    """The frequency in Hz up to which a wav has sound: above it, the spectrum is DROP dB below its peak, or more.

    Each frequency counts with its 95th percentile over time, because only some sounds of speech are high. Speech that was
    upsampled ends at half its former rate: there the spectrum falls by 60 dB to the rounding errors.
    """
    wav = np.pad(wav, (0, max(0, SPECTRUM - len(wav))))
    frames = np.lib.stride_tricks.sliding_window_view(wav, SPECTRUM)[::SPECTRUM // 2] * np.hanning(SPECTRUM)
    power = np.percentile(np.abs(np.fft.rfft(frames)) ** 2, 95, axis=0)
    width = max(1, round(200 * SPECTRUM / rate))  # bins of 200 Hz together
    power = np.convolve(power, np.full(width, 1 / width), "same")
    return float(np.flatnonzero(power >= power.max() * 10 ** (-DROP / 10))[-1] * rate / SPECTRUM)


def clipped_samples(wav: np.ndarray) -> int:
    """Samples at the highest or lowest value of a wav, three or more in a row. Without clipping, a peak has one."""
    peak = np.abs(wav).max(initial=0)
    at_end = (np.abs(wav) >= 0.999 * peak) & (peak > 0.1)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], at_end, [False]]))).reshape(-1, 2)
    runs = edges[:, 1] - edges[:, 0]
    return int(runs[runs >= 3].sum())


def measure(source: str, cfg: Config) -> dict:
    """What a recording holds: the columns of utterances.csv that come from the sound alone, and a hash of its speech.

    The sound is read at its own rate. An unusable one gives only `problem`, the reason.
    """
    try:
        rate = soundfile.info(split_source(source)[0]).samplerate
    except (OSError, RuntimeError):
        rate = cfg.sample_rate
    try:
        wav = read_part(source, rate)
    except audio.AudioError as e:
        return {"problem": str(e)}
    seconds, speech = len(wav) / rate, find_speech(wav, rate)
    frames = round(len(wav) * cfg.sample_rate / rate) // cfg.hop_length
    row = {"seconds": seconds, "frames": frames, "sample_rate": rate, "peak": float(np.abs(wav).max())}
    if frames == 0:
        return row | {"problem": "shorter than one frame"}
    speech = speech or [(0.0, seconds)]
    start, end = speech[0][0], speech[-1][1]
    spoken = np.concatenate([wav[round(a * rate):round(b * rate)] for a, b in speech])
    pauses = [b - a for (_, a), (b, _) in zip(speech, speech[1:])]
    return row | {
        "leading_silence": start, "trailing_silence": seconds - end, "longest_pause": max(pauses, default=0.0),
        "loudness_db": 10 * np.log10(np.mean(spoken.astype(np.float64) ** 2) + 1e-10), "clipped": clipped_samples(wav),
        "bandwidth_hz": bandwidth(wav, rate),
        "sound": hashlib.sha1((wav[round(start * rate):round(end * rate)] * 32767).astype("<i2").tobytes()).hexdigest()}


# --- all recordings

def deviations(characters: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """How far each utterance's rate of speech is from that of texts of about its length, in robust standard deviations.

    It compares log(characters / second) with the median of the tenth of the utterances (20 to 200) whose texts are closest
    in length, because short texts are spoken more slowly. A standard deviation is 1.48 times the MAD among these.
    """
    rates, order = np.log(characters / seconds), np.lexsort((seconds, characters))
    window = min(len(rates), int(np.clip(len(rates) // 10, 20, 200)))
    near = np.lib.stride_tricks.sliding_window_view(rates[order], window)
    middle = np.median(near, axis=1)
    spread = 1.4826 * np.median(np.abs(near - middle[:, None]), axis=1)
    place = np.clip(np.arange(len(rates)) - window // 2, 0, len(near) - 1)  # of the window around each utterance
    result = np.empty(len(rates))
    result[order] = (rates[order] - middle[place]) / np.maximum(spread[place], 0.05)
    return result


def read_rows(utterances: list[Utterance], cfg: Config, workers: int | None) -> list[dict]:
    """A row with COLUMNS for each utterance. The sounds are read once, by several processes."""
    spoken = [as_spoken(u.text) if cfg.normalise else u.text for u in utterances]
    tokenise, _ = load_tokeniser(cfg)
    sounds = map_processes(functools.partial(measure, cfg=cfg), [u.source for u in utterances], workers)
    rows = []
    for u, text, sound in zip(utterances, spoken, progress(sounds, total=len(utterances), unit="utt", desc="measuring")):
        row = dict.fromkeys(COLUMNS) | {"utt_id": u.utt_id, "split": u.split, "text": u.text, "source": u.source,
                                        "spoken": text, "words": len(text.split()), "characters": len(text)} | sound
        if not u.text.strip():
            row["problem"] = "empty text"
        elif row["problem"] is None and row["frames"] > cfg.block_size:
            row["problem"] = "longer than block_size"
        elif row["problem"] is None and cfg.alignment_search and len(tokenise(text)) > -(-row["frames"] // cfg.patch):
            row["problem"] = "more tokens than positions"
        rows.append(row)
    timed = [row for row in rows if row["characters"] and (row["loudness_db"] or SILENT) > SILENT]
    if timed:
        lengths = np.array([row["characters"] for row in timed])
        seconds = np.array([row["seconds"] - row["leading_silence"] - row["trailing_silence"] for row in timed])
        for row, rate, deviation in zip(timed, lengths / seconds, deviations(lengths, seconds)):
            row |= {"characters_per_second": rate, "deviation": deviation}
    return rows


def groups(rows: list[dict], key) -> list[list[dict]]:
    """Rows with the same key(row), if it is not None and there are several; the largest groups first."""
    found = defaultdict(list)
    for row in rows:
        if (value := key(row)) is not None:
            found[value].append(row)
    return sorted((group for group in found.values() if len(group) > 1), key=len, reverse=True)


def hours(rows: list[dict]) -> float:
    return sum(row["seconds"] or 0 for row in rows) / 3600


# --- the page

def duration(rows: list[dict]) -> str:
    """How long the rows' recordings are together, as text."""
    seconds = hours(rows) * 3600
    size, unit, digits = (3600, "h", 2) if seconds >= 3600 else (60, "min", 1) if seconds >= 60 else (1, "s", 1)
    return f"{seconds / size:.{digits}f} {unit}"


def histogram(title: str, values: list[float], unit: str, mark: tuple[float, str] | None = None,
              weights: list[float] | None = None) -> dict | None:
    """A chart: counts in 40 bins between the 0.5th and the 99.5th percentile; what lies beyond is in the outer bins.

    A `mark` is a value with its label. With `weights`, these are summed and not counted.
    """
    if not values:
        return None
    low, high = np.percentile(values, (0.5, 99.5))
    low, high = (min(low, mark[0]), max(high, 1.02 * mark[0])) if mark else (low, high)
    high = max(high, low + 1e-3)
    mark = mark and {"at": (mark[0] - low) / (high - low), "label": mark[1]}
    counts, _ = np.histogram(np.clip(values, low, high), bins=40, range=(low, high), weights=weights)
    low, middle, high, median = (f"{value:.{2 if abs(value) < 10 else 1}f}" for value in (
        low, (low + high) / 2, high, np.median(values)))
    return {"title": title, "unit": unit, "bars": (counts / counts.max()).tolist(), "axis": [low, middle, high],
            "median": median, "sums": [f"{count:.4g}" for count in counts], "mark": mark}


def section(name: str, finding: str, note: str, columns: dict, rows: list[dict], folder: Path) -> list[dict]:
    """A sentence about what stands out, and its table, as a list of one; empty without rows.

    `columns` are labels with functions from a row to the text of its cell.
    """
    shown = [{"label": row["utt_id"], "text": row["text"], "clip": clip(row["source"], folder),
              "cells": [cell(row) for cell in columns.values()]} for row in rows[:SHOWN]]
    return [{"name": name, "finding": finding, "note": note, "columns": list(columns), "rows": shown,
             "more": len(rows) - len(shown)}] if rows else []


def clip(source: str, folder: Path) -> str | None:
    """The address of a source's sound, relative to the page's folder. None if there is no such file."""
    path, fragment = split_source(source)
    if not os.path.isfile(path):
        return None
    relative = os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
    return quote(relative) + fragment.removesuffix("#trim")


def seconds_cell(row: dict) -> str:
    return "–" if row["seconds"] is None else f"{row['seconds']:.2f}"


def left_out_sections(rows: list[dict], cfg: Config, folder: Path) -> list[dict]:
    """What training leaves out: too long, more tokens than positions, or unusable."""
    def share(some):
        return f"{len(some)} of {len(rows)} recordings, {duration(some)} of {duration(rows)} ({hours(some) / total:.0%})"
    total, by_problem = hours(rows) or 1.0, defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    by_problem.pop(None, None)
    long = sorted(by_problem.pop("longer than block_size", []), key=lambda row: -row["frames"])
    crowded = by_problem.pop("more tokens than positions", [])
    bad = [row for some in by_problem.values() for row in some]
    silent = [row for row in rows if row["loudness_db"] is not None and row["loudness_db"] <= SILENT]
    limit = cfg.block_size * cfg.hop_length / cfg.sample_rate
    size = {"Seconds": seconds_cell, "Frames": lambda row: f"{row['frames']:,}"}
    return [
        *section("Too long", f"Longer than block_size = {cfg.block_size} frames ({limit:.1f} s), so training leaves "
                 f"them out: {share(long)}.", "--split_long cuts them at pauses. With block_size: "
                 f"{max((row['frames'] for row in long), default=0)} training takes them all, but needs more memory.",
                 size, long, folder),
        *section("Too fast for the model", f"Texts with more tokens than the model has positions (patch = {cfg.patch}), so "
                 f"training leaves them out: {share(crowded)}.", "Set patch: 1, or look whether the texts are right.",
                 size, crowded, folder),
        *section("Unusable", f"Cannot be used: {share(bad)}.", "Repair or delete them.",
                 {"Seconds": seconds_cell, "Problem": lambda row: row["problem"]}, bad, folder),
        *section("Silent", f"Silent, or nearly so: {share(silent)}.", "Training takes them if it is not said otherwise. "
                 "Delete their lines.", {"Seconds": seconds_cell, "Loudness, dB": lambda row: f"{row['loudness_db']:.1f}"},
                 silent, folder)]


def sound_sections(rows: list[dict], folder: Path) -> list[dict]:
    """Texts that may be wrong, silence, clipping and loudness. `rows` are those whose sound was measured."""
    odd = sorted((row for row in rows if abs(row["deviation"]) > OUTLIER), key=lambda row: -abs(row["deviation"]))

    def excess(row):
        return sum(max(0.0, row[end] - KEPT_SILENCE) for end in ("leading_silence", "trailing_silence"))
    silent = sorted((row for row in rows if excess(row) > 0.1), key=lambda row: -excess(row))
    clipped = sorted((row for row in rows if row["clipped"]), key=lambda row: -row["clipped"])
    middle = float(np.median([row["loudness_db"] for row in rows] or [0]))
    loud = sorted((row for row in rows if abs(row["loudness_db"] - middle) > QUIETER),
                  key=lambda row: -abs(row["loudness_db"] - middle))
    removed = sum(map(excess, rows))
    return [
        *section("Texts that may be wrong", f"Spoken much faster or slower than others of their length: {len(odd)}. "
                 "Listen: the text may be of another recording, or have words too many or too few.", "Deviation: in robust "
                 "standard deviations; above 0 the text is too long for the sound. utterances.csv has that of all.",
                 {"Deviation": lambda row: f"{row['deviation']:+.1f}", "Seconds": seconds_cell,
                  "Characters / s": lambda row: f"{row['characters_per_second']:.1f}"}, odd, folder),
        *section("Silence at the ends", f"Recordings with 0.1 s or more of silence at their ends beyond {KEPT_SILENCE} s: "
                 f"{len(silent)}.", f"--trim removes it, in all recordings {removed:.1f} s.",
                 {"Start, s": lambda row: f"{row['leading_silence']:.2f}",
                  "End, s": lambda row: f"{row['trailing_silence']:.2f}", "Seconds": seconds_cell}, silent, folder),
        *section("Clipping", f"Clipped recordings, whose highest samples lie in a row on one value: {len(clipped)}.",
                 "A few samples are not heard. Record again with less gain where there are many.",
                 {"Clipped samples": lambda row: f"{row['clipped']:,}", "Peak": lambda row: f"{row['peak']:.3f}",
                  "Seconds": seconds_cell}, clipped, folder),
        *section("Loudness", f"Recordings more than {QUIETER:g} dB louder or quieter than the median, {middle:.1f} dB: "
                 f"{len(loud)}.", "The model learns such differences as if they were of the text.",
                 {"Loudness, dB": lambda row: f"{row['loudness_db']:.1f}", "Seconds": seconds_cell}, loud, folder)]


def rate_section(rows: list[dict], cfg: Config) -> list[dict]:
    """The sample rates, and how high the sound in them goes. It stands out if that is less than the config's sound."""
    by_rate, table, dull = defaultdict(list), [], []
    for row in rows:
        by_rate[row["sample_rate"]].append(row)
    for rate, some in sorted(by_rate.items()):
        top = float(np.median([row["bandwidth_hz"] for row in some]))
        table.append({"label": f"{rate:,} Hz", "text": "", "clip": None,
                      "cells": [str(len(some)), duration(some), f"{top / 1000:.1f} kHz"]})
        if top < 0.9 * cfg.sample_rate / 2:
            origin = f", as after upsampling from {2 * top / 1000:.0f} kHz" if top < 0.45 * rate else ""
            dull.append(f"{len(some)} of {len(rows)} recordings, at {rate:,} Hz, have sound up to {top / 1000:.1f} kHz"
                        f"{origin}")
    if not dull and len(table) == 1:
        return []
    finding, note = "The recordings have several sample rates.", "All are resampled to that of the config."
    if dull:
        finding = (f"{'; '.join(dull)}. The config's sound, of {cfg.sample_rate:,} Hz, goes to "
                   f"{cfg.sample_rate / 2000:.1f} kHz and its log-mels to {cfg.f_max / 1000:.1f} kHz.")
        note = "The voice cannot have what its recordings lack: it will sound as dull as they do, or a vocoder makes it up."
    return [{"name": "Rate and bandwidth", "finding": finding, "note": note, "more": 0, "rows": table,
             "columns": ["Recordings", "Duration", "Sound up to (median)"]}]


def text_sections(rows: list[dict], folder: Path) -> list[dict]:
    """Texts and sounds that occur twice, and characters that are rare."""
    texts = groups(rows, lambda row: " ".join(row["text"].casefold().split()) or None)
    sounds = groups(rows, lambda row: row.get("sound"))
    place = {row["utt_id"]: group for group in texts + sounds for row in group}
    others = {"Also in": lambda row: ", ".join(other["utt_id"] for other in place[row["utt_id"]] if other is not row)[:80],
              "Seconds": seconds_cell}
    place = {row["utt_id"]: group for group in texts for row in group}
    same_text = section("Same text", f"Texts that occur more than once: {len(texts)}, in {sum(map(len, texts))} recordings.",
                        "That is no fault, unless a copy is held out: then the errors on it are those of a known text.",
                        others, [group[0] for group in texts], folder)
    place = {row["utt_id"]: group for group in sounds for row in group}
    same_sound = section("Same sound", f"Recordings that occur more than once: {len(sounds)}, in {sum(map(len, sounds))} "
                         "files.", "If their texts differ, one is wrong. Delete the copies.", others,
                         [group[0] for group in sounds], folder)
    counts, example = Counter(), {}
    for row in rows:
        counts.update(row["spoken"])
        for character in set(row["spoken"]) - example.keys():
            example[character] = row
    rare = sorted((count, character) for character, count in counts.items() if count < RARE)
    characters = [{"label": c if c.isprintable() else ascii(c), "cells": [f"U+{ord(c):04X}", str(count)],
                   "text": example[c]["text"], "clip": clip(example[c]["source"], folder)} for count, c in rare]
    found = f"Characters that occur fewer than {RARE} times: {len(rare)} of {len(counts)}, {' '.join(c for _, c in rare)}"
    return same_text + same_sound + ([{
        "name": "Rare characters", "finding": found, "columns": ["Code", "Times"], "rows": characters, "more": 0,
        "note": "As the texts are spoken, so with numbers written out. The voice hardly learns them; write them otherwise."
    }] if rare else [])


def write_table(path: Path, rows: list[dict]) -> None:
    """utterances.csv: COLUMNS, numbers with at most four digits after the point. Raises UserError."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS, extrasaction="ignore")
    table.writeheader()
    for row in rows:
        table.writerow({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    write_file(path, out.getvalue())


def write_report(folder: Path, name: str, utterances: list[Utterance], cfg: Config, workers: int | None = None) -> Path:
    """Measure the recordings of utterances and write index.html and utterances.csv. Returns the page's path.

    The sources are those of silence.read_part, so that the report is of what a corpus would hold. Raises UserError.
    """
    make_folder(folder)
    rows = read_rows(utterances, cfg, workers)
    heard = [row for row in rows if row["deviation"] is not None]
    kept = [row for row in rows if row["problem"] is None]
    limit = cfg.block_size * cfg.hop_length / cfg.sample_rate
    lasting = [row["seconds"] for row in rows if row["seconds"]]

    def values(column):
        return [row[column] for row in heard]

    def middle(column, form):
        return form.format(float(np.median(values(column)))) if heard else "–"
    tiles = {
        "Recordings": (duration(rows), f"{len(rows):,} recordings"),
        "Training would take": (duration(kept), f"{len(kept):,} recordings; " + ", ".join(
            f"{sum(row['split'] == split for row in kept):,} {split}" for split in SPLITS)),
        "Length": (f"{np.median(lasting):.1f} s" if lasting else "–",
                   f"median; {min(lasting):.1f} to {max(lasting):.1f} s" if lasting else ""),
        "Words": (f"{sum(row['words'] for row in rows):,}", f"{sum(row['characters'] for row in rows):,} characters, "
                  f"{len(set().union(*(row['spoken'] for row in rows)))} different"),
        "Characters / s": (middle("characters_per_second", "{:.1f}"), "median, without the silence at the ends"),
        "Loudness": (middle("loudness_db", "{:.1f} dB"), "median level of the speech, of full scale"),
        "Sample rate": (", ".join(f"{rate / 1000:g} kHz" for rate in sorted({row["sample_rate"] for row in heard})) or "–",
                        f"sound up to {middle('bandwidth_hz', '{:,.0f} Hz')} (median)")}
    silence = [row[end] for row in heard for end in ("leading_silence", "trailing_silence")]
    charts = [histogram("Length, by time", lasting, "s", (limit, "block_size"), lasting),
              histogram("Characters a second", values("characters_per_second"), ""),
              histogram("Silence at each end", silence, "s", (KEPT_SILENCE, "--trim")),
              histogram("Loudness", values("loudness_db"), "dB")]
    sections = [*left_out_sections(rows, cfg, folder), *sound_sections(heard, folder), *rate_section(heard, cfg),
                *text_sections(rows, folder)]
    write_table(folder / "utterances.csv", rows)
    write_file(folder / "index.html", TEMPLATES.get_template("report.html.j2").render(
        run=name, tiles=tiles, charts=list(filter(None, charts)), sections=sections))
    return folder / "index.html"
