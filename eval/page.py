"""The listening pages: one for each evaluation, and one for the run, where you hear a prompt at every step.

    python eval/page.py .artifacts/local/demo                      # write all pages of a run again
    python eval/page.py .artifacts/local/demo/eval/step_00003200   # the page of one evaluation

Training and the evaluator also write the pages. An index.html opens from disk, without a server or a network. It links audio
and pictures by relative names, so the whole folder can be moved.
"""
import argparse
import json
import math
import re
import unicodedata
from collections import Counter
from itertools import chain, groupby
from pathlib import Path
from urllib.parse import quote

import jinja2
from rapidfuzz.distance import Levenshtein  # comes with jiwer

from common import UserError, run_cli, warn, write_file
from eval.measures import SOUND, SOUND_NAMES
from metric import curve, read_metrics

COLUMNS = {"idx": "#", "text": "Text", "wer": "WER", "cer": "CER", "predicted_seconds": "Predicted, s",
           "recording_seconds": "Rec., s", "alignment_score": "Alignment score", "mcd": "MCD, dB", "dnsmos": "DNSMOS",
           "f0_spread": "F0 spread, st"}
NUMBERS = ("idx", "wer", "cer", "predicted_seconds", "recording_seconds", "alignment_score", "mcd", "vocoded_wer",
           "vocoded_cer", "recording_wer", "recording_cer", *SOUND_NAMES)
FILES = ("audio", "vocoded", "recording", "mel_png", "recording_mel_png", "attention_png")
PANELS = {"flow loss": {"train/flow_loss": "training", "val/flow_loss": "validation"},
          "error rates": {"eval/wer": "WER", "eval/cer": "CER"}, "alignment score": {"eval/alignment_score": "mean"},
          "DNSMOS, 1 to 5": {"eval/dnsmos": "P.808", "eval/dnsmos_overall": "overall"},
          "F0 and likeness": {"eval/f0_correlation": "F0 correlation", "eval/likeness": "likeness"}}
CURVE_POINTS = 400  # of a curve with more points, every second, third, … is shown
SIMILAR = 0.4  # two words that are less similar (0 to 1) are marked whole, without their common letters


# --- marks: where two texts differ

def comparable(character: str) -> str:
    """A letter, digit or apostrophe in lower case; "" for anything else, which the error rates ignore too."""
    if character in "'’":
        return "'"
    return character.casefold() if character.isalnum() or unicodedata.category(character).startswith("M") else ""


def letters(word: str, other: str) -> list[tuple[str, str]]:
    """The characters of a misheard word as (kind, character): "near" if `other` has them too, else "sub"."""
    a, b = ([comparable(character) for character in text] for text in (other, word))
    if Levenshtein.normalized_similarity(a, b) < SIMILAR:
        return [("sub", word)]
    return [("near" if tag == "equal" or not comparable(character) else "sub", character)
            for tag, _, _, start, end in Levenshtein.opcodes(a, b) for character in word[start:end]]


def marks(reference: str, hypothesis: str) -> list[list[tuple[str, str]]]:
    """How two texts differ: reference and hypothesis, each as a list of (kind, text). Joined, the texts give it back.

    Kinds: "" both have it; "del" only the reference has it; "ins" only the hypothesis has it; "near" and "sub" are equal and
    different letters of two words that correspond. The words are aligned with the fewest edits, as WER counts them.
    """
    parts = [[part for part in re.split(r"([\s/–—-]+)", text) if part] for text in (reference, hypothesis)]
    keys = [["".join(map(comparable, part)) for part in side] for side in parts]
    words = [[n for n, key in enumerate(side) if key] for side in keys]
    marked = [[[("", part)] for part in side] for side in parts]
    edits = Levenshtein.opcodes(*([key for key in side if key] for side in keys))
    for tag, start, end, other_start, other_end in edits:
        left, right = words[0][start:end], words[1][other_start:other_end]
        if tag == "replace":
            for n, m in zip(left, right):
                marked[0][n], marked[1][m] = letters(parts[0][n], parts[1][m]), letters(parts[1][m], parts[0][n])
        elif tag != "equal":
            for side, place, kind in (*((0, n, "del") for n in left), *((1, m, "ins") for m in right)):
                marked[side][place] = [(kind, parts[side][place])]
    return [[(kind, "".join(text for _, text in group)) for kind, group in groupby(chain(*side), key=lambda mark: mark[0])]
            for side in marked]


# --- reading an evaluation

def read_json(text: str):
    """JSON for a page: numbers are rounded, so that the page stays small, and NaN and infinity become None."""
    return json.loads(text, parse_float=lambda number: round(float(number), 5), parse_constant=lambda _: None)


def read_evaluation(folder: Path, base: str = "") -> tuple[dict, list[dict]]:
    """An evaluation's summary and its prompts as read_row returns them. Raises UserError."""
    try:
        summary = read_json((folder / "summary.json").read_text(encoding="utf-8"))
        lines = (folder / "wer.jsonl").read_text(encoding="utf-8").split("\n")
        return summary, [read_row(read_json(line), folder, base) for line in lines if line]
    except OSError as e:
        raise UserError(f"cannot read {e.filename} ({e.strerror}); expected the folder of an evaluation, with wer.jsonl and "
                        "summary.json") from None
    except ValueError as e:
        raise UserError(f"summary.json or wer.jsonl in {folder} is damaged ({e}); evaluate again") from None


def read_row(row: dict, folder: Path, base: str) -> dict:
    """A line of wer.jsonl for a page: NUMBERS, links to FILES that start with `base`, and texts. What is missing is None.

    `text` is the reference; `reference` and `hypothesis` are the lists of marks(). `vocoded_hypothesis` and
    `recording_hypothesis` are such lists too, if the judge misheard the vocoder's copy or the recording.
    """
    text, shown = row["reference"], {key: row.get(key) for key in NUMBERS}
    for key in FILES:
        shown[key] = base + quote(row[key]) if row.get(key) and (folder / row[key]).is_file() else None
    heard = row.get("hypothesis")
    if heard is None or shown["wer"] == 0:  # nothing to mark: the judge's rules read other spellings as the same word
        marked = [[("", text)], None if heard is None else [("", heard)]]
    else:
        marked = marks(text, heard)
    shown |= {"text": text, "reference": marked[0], "hypothesis": marked[1]}
    return shown | {f"{kind}_hypothesis": marks(text, row[f"{kind}_hypothesis"])[1] if shown[f"{kind}_wer"] else None
                    for kind in ("vocoded", "recording")}


# --- writing the pages

def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.{2 if 0 < x < 0.01 else 1}f}\u202f%"


TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                               lstrip_blocks=True, undefined=jinja2.StrictUndefined)
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # not sorted: panels, curves and steps have an order
TEMPLATES.filters["percent"] = percent


def write_page(folder) -> Path:
    """Write an evaluation's index.html from its wer.jsonl and summary.json. Raises UserError."""
    folder = Path(folder).resolve()
    summary, rows = read_evaluation(folder)
    columns = {key: label for key, label in COLUMNS.items() if any(row[key] is not None for row in rows)}
    in_run = folder.parent.name == "eval" and (folder.parents[1] / "metrics.jsonl").is_file()
    write_file(folder / "index.html", TEMPLATES.get_template("page.html.j2").render(
        rows=rows, columns=columns, summary=summary, sound=SOUND, in_run=in_run,
        run=folder.parents[1].name if in_run else folder.name))
    return folder / "index.html"


def curves(metrics: list[dict]) -> list[dict]:
    """The panels of curves that have data, each with its title and, by label, its points (step, value)."""
    panels = []
    for title, keys in PANELS.items():
        lines = {label: curve(metrics, key) for key, label in keys.items()}
        lines = {label: points[::-math.ceil(len(points) / CURVE_POINTS) or 1][::-1] for label, points in lines.items()}
        if any(lines.values()):
            panels.append({"title": title, "lines": {label: line for label, line in lines.items() if line}})
    return panels


def write_run_page(run_dir) -> Path:
    """Write a run's index.html from its metrics.jsonl and its eval/step_*/, whichever are there. Raises UserError."""
    run = Path(run_dir).resolve()
    prompts, evaluations = {}, []
    for folder in sorted(run.glob("eval/step_*/")):
        base = f"eval/{quote(folder.name)}/"
        try:
            summary, rows = read_evaluation(folder, base)
        except UserError as e:  # it was stopped before its end, or goes on now
            warn(f"left out of the run's page: {e}")
            continue
        # The text identifies a prompt, because a run may continue with other prompts. Equal texts are told apart by order.
        seen, by_prompt = Counter(), {}
        for row in rows:
            text = row.pop("text")
            place = prompts.setdefault((text, seen[text]), len(prompts))
            by_prompt[place] = {key: value for key, value in row.items() if value is not None}
            seen[text] += 1
        evaluations.append({"step": summary["step"], "page": base + "index.html", "rows": by_prompt})
    metrics = read_metrics(run / "metrics.jsonl")
    if not evaluations and not metrics:
        raise UserError(f"{run_dir} holds neither a run (metrics.jsonl, eval/step_*/) nor an evaluation (wer.jsonl, "
                        "summary.json); expected a folder such as .artifacts/local/demo")
    data = {"prompts": [text for text, _ in prompts], "evaluations": evaluations, "panels": curves(metrics)}
    write_file(run / "index.html", TEMPLATES.get_template("run_page.html.j2").render(data=data, run=run.name))
    return run / "index.html"


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="the folder of a run or of an evaluation")
    folder = p.parse_args(argv).folder
    if (folder / "summary.json").is_file():
        print(write_page(folder))
        return
    for path in sorted(folder.glob("eval/*/summary.json")):
        write_page(path.parent)
    print(write_run_page(folder))


if __name__ == "__main__":
    run_cli(main)
