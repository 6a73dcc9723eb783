"""The listening pages: one for each evaluation, and one for the run, on which a prompt is heard across its steps.

    python eval/page.py .artifacts/local/demo                      # all of a run's pages, made anew
    python eval/page.py .artifacts/local/demo/eval/step_00003200   # one evaluation's

An index.html opens from disk, without server or network. Sounds and pictures are linked by relative names, so that a folder
can be moved whole. Training and the evaluator write the pages as they go.
"""
import functools
import io
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path
from urllib.parse import quote

import jinja2
import numpy as np
from rapidfuzz.distance import Levenshtein  # comes with jiwer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import Config, UserError, run_cli  # noqa: E402
from metric import read_metrics, warn  # noqa: E402

COLUMNS = {"idx": "#", "reference": "Text", "wer": "WER", "cer": "CER", "predicted_seconds": "Predicted, s",
           "true_seconds": "True, s", "alignment": "Alignment", "mcd": "MCD, dB"}
NUMBERS = ("wer", "cer", "predicted_seconds", "true_seconds", "alignment", "mcd", "vocoded_wer", "vocoded_cer",
           "recording_wer", "recording_cer")
FILES = ("audio", "vocoded", "recording", "mel_png", "real_mel_png", "alignment_png")
PANELS = {"flow loss": {"train/flow_loss": "training", "val/flow_loss": "validation"},
          "error rates": {"eval/wer": "WER", "eval/cer": "CER"}, "alignment": {"eval/alignment": "mean"}}
MOST_POINTS = 400  # a curve is drawn with; more are averaged
ALIKE = 0.4  # words less similar than this are marked whole


# --- marks

def words(text: str) -> list[tuple[str, str]]:
    """A text in parts, as written and as compared: letters, digits and apostrophes in lower case; "" between words."""
    return [(part, "".join(map(comparable, part))) for part in re.split(r"([\s/–—-]+)", text) if part]


def comparable(c: str) -> str:
    return "'" if c in "'’" else c.casefold() if c.isalnum() or unicodedata.category(c)[0] == "M" else ""


def aligned(a: list[str], b: list[str]) -> list[tuple]:
    """Pairs (place in a, place in b), either None, in order: the fewest edits, as WER counts; of these, the most alike."""
    cost = [list(range(len(b) + 1))]
    pairing = []
    for i, x in enumerate(a):
        # as in the textbook, but that of two substitutions the one of more letters in common is the cheaper by a hair
        pairing.append([0 if x == y else 1 + 1e-4 * (1 - Levenshtein.normalized_similarity(x, y)) for y in b])
        cost.append([i + 1])
        for j, swap in enumerate(pairing[i]):
            cost[-1].append(min(cost[i][j] + swap, cost[i][j + 1] + 1, cost[i + 1][j] + 1))
    pairs, i, j = [], len(a), len(b)
    while i or j:
        if i and j and cost[i][j] == cost[i - 1][j - 1] + pairing[i - 1][j - 1]:
            i, j = i - 1, j - 1
            pairs.append((i, j))
        elif i and cost[i][j] == cost[i - 1][j] + 1:
            i -= 1
            pairs.append((i, None))
        else:
            j -= 1
            pairs.append((None, j))
    return pairs[::-1]


def letters(other: str, word: str) -> list[tuple[str, str]]:
    """The letters of `word` that `other` has too ("near"), and has not ("sub"); all "sub" if they are hardly alike."""
    a, b = [comparable(c) for c in other], [comparable(c) for c in word]
    places = [n for n, c in enumerate(b) if c]  # punctuation is never wrong
    a, b = [c for c in a if c], [c for c in b if c]
    if Levenshtein.normalized_similarity(a, b) < ALIKE:
        return [("sub", word)]
    kinds = ["near"] * len(word)
    for tag, _, _, lo, hi in Levenshtein.opcodes(a, b):
        for n in places[lo:hi] if tag != "equal" else ():
            kinds[n] = "sub"
    return list(zip(kinds, word))


@functools.lru_cache(maxsize=1 << 16)  # a run's page is written anew after each evaluation
def marks(reference: str, hypothesis: str) -> tuple[list, list]:
    """What differs between two texts: each as a list of [kind, text] that joined gives it back.

    Kinds: "" agrees; "del" is missing from the hypothesis; "ins" is there too much; of a word that was heard as another,
    "near" are the letters that agree and "sub" those that do not.
    """
    said, heard = words(reference), words(hypothesis)
    places = [[n for n, (_, key) in enumerate(parts) if key] for parts in (said, heard)]
    marked = [[[("", written)] for written, _ in parts] for parts in (said, heard)]
    for i, j in aligned(*([key for _, key in parts if key] for parts in (said, heard))):
        left, right = None if i is None else places[0][i], None if j is None else places[1][j]
        if right is None:
            marked[0][left] = [("del", said[left][0])]
        elif left is None:
            marked[1][right] = [("ins", heard[right][0])]
        elif said[left][1] != heard[right][1]:
            marked[0][left] = letters(heard[right][0], said[left][0])
            marked[1][right] = letters(said[left][0], heard[right][0])
    return joined(marked[0]), joined(marked[1])


def joined(parts: list[list[tuple[str, str]]]) -> list[list[str]]:
    """The parts in one list, neighbours of one kind as one."""
    out = []
    for kind, text in (piece for part in parts for piece in part):
        if out and out[-1][0] == kind:
            out[-1][1] += text
        else:
            out.append([kind, text])
    return out


# --- what an evaluation's folder holds

def number(x) -> float | None:
    """A number that JSON can carry, with no more digits than anyone reads; None for anything else."""
    return round(x, 5) if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) else None


def read_evaluation(folder: Path, base: str = "") -> tuple[dict, list[dict]]:
    """An evaluation's summary, and its prompts as `read_row` has them. Raises UserError if the folder holds none."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        lines = (folder / "wer.jsonl").read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as e:
        raise UserError(f"cannot read {e.filename} ({e.strerror}); expected an evaluation's folder, with wer.jsonl and "
                        "summary.json") from None
    except ValueError as e:
        raise UserError(f"{folder / 'summary.json'} is damaged ({e}); evaluate anew") from None
    if not isinstance(summary, dict):
        raise UserError(f"{folder / 'summary.json'} is damaged (a {type(summary).__name__}); evaluate anew")
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off
        if isinstance(row, dict) and isinstance(row.get("reference"), str):
            rows.append(read_row(row, len(rows), folder, base))
    return summary, rows


def read_row(row: dict, n: int, folder: Path, base: str) -> dict:
    """Prompt n as the pages show it, from its line of wer.jsonl, with None for what is not there.

    NUMBERS; links to its FILES, starting with `base`; `text`; `reference` and `hypothesis` as `marks` gives them; and
    `vocoded_hypothesis` and `recording_hypothesis` where these were misheard.
    """
    said, shown = row["reference"], {"idx": n} | {key: number(row.get(key)) for key in NUMBERS}
    for key in FILES:
        there = isinstance(row.get(key), str) and os.path.isfile(folder / row[key])
        shown[key] = base + quote(row[key]) if there else None

    def compared(key):
        heard = row.get(key + "hypothesis")
        if isinstance(heard, str) and shown[key + "wer"] != 0:
            return marks(said, heard)
        return [["", said]], [["", heard]] if isinstance(heard, str) else None  # right, as the judge reads the two
    shown |= {"text": said, "reference": compared("")[0], "hypothesis": compared("")[1]}
    return shown | {f"{key}_hypothesis": compared(f"{key}_")[1] if shown[f"{key}_wer"] else None
                    for key in ("vocoded", "recording")}


def headline(summary: dict) -> list[dict]:
    """The numbers at the head of a page, each as text: its name, value, 95 % interval, and notes such as its floors."""
    judge = summary.get("judge_floor") or {}
    tiles = []
    for key, name in (("wer", "WER"), ("cer", "CER")) if number(summary.get("wer")) is not None else ():
        floors = {"vocoder copy": summary.get(f"vocoded_{key}"), "recording": summary.get(f"recording_{key}"),
                  "judge on recordings": judge.get(key) if isinstance(judge, dict) else None}
        tiles.append({"name": name, "value": percent(summary.get(key)),
                      "interval": " to ".join(percent(v) for v in summary.get(f"{key}_interval") or []),
                      "notes": [f"{floor}: {percent(v)}" for floor, v in floors.items() if number(v) is not None]})
    for key, name, text, beside in (
            ("alignment", "Alignment, 0 to 1", "{:.3f}", {}), ("mcd", "MCD", "{:.2f} dB", {}),
            ("duration_error", "Duration error", "{:.1%}", {"duration_bias": "bias {:+.1%}"}),
            ("speaking_rate", "Characters a second", "{:.1f}", {"real_speaking_rate": "recordings: {:.1f}"}),
            ("sampler_rtf", "Sampler RTF", "{:.3g}", {}), ("vocoder_rtf", "Vocoder RTF", "{:.3g}", {})):
        if number(summary.get(key)) is not None:
            tiles.append({"name": name, "value": text.format(summary[key]), "interval": "",
                          "notes": [note.format(summary[k]) for k, note in beside.items()
                                    if number(summary.get(k)) is not None]})
    return tiles


# --- files

def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises UserError."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_bytes(data)
        os.replace(tmp, path)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def draw(path: Path, values: np.ndarray, cfg: Config) -> str:
    """Write values (time, height) as a picture, a pixel each, low ones at the bottom; returns its name. Raises UserError."""
    from matplotlib.image import imsave
    mel = path.stem.endswith("mel")  # all log-mels share their colours, so that pictures compare
    low, high = (cfg.mel_mean - 2 * cfg.mel_std, cfg.mel_mean + 3 * cfg.mel_std) if mel else (0, None)
    png = io.BytesIO()
    imsave(png, values.T, vmin=low, vmax=high, cmap="magma" if mel else "viridis", origin="lower", format="png")
    write_bytes(path, png.getvalue())
    return path.name


def draw_mel(mel: np.ndarray, cfg: Config) -> bytes:
    """A log-mel (frames, n_mels) as a PNG with axes: seconds, and the middle of each band in Hz."""
    from librosa import mel_frequencies
    from matplotlib.figure import Figure
    seconds = len(mel) * cfg.hop_length / cfg.sample_rate
    figure = Figure(figsize=(min(24, 2 + 1.6 * seconds), 3), layout="constrained")
    ax = figure.add_subplot(xlabel="seconds", ylabel="Hz")
    ax.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, -0.5, cfg.n_mels - 0.5),
              vmin=cfg.mel_mean - 2 * cfg.mel_std, vmax=cfg.mel_mean + 3 * cfg.mel_std)
    ticks = np.linspace(0, cfg.n_mels - 1, 6).round().astype(int)
    hertz = mel_frequencies(cfg.n_mels + 2, fmin=cfg.f_min, fmax=cfg.f_max)[1:-1]
    ax.set_yticks(ticks, [f"{hertz[n]:.0f}" for n in ticks])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


# --- numbers as text

def percent(x) -> str:
    return "–" if number(x) is None else f"{100 * x:.{2 if 0 < x < 0.01 else 1}f}\u202f%"


def fixed(x, digits: int = 2) -> str:
    return "–" if number(x) is None else f"{x:.{digits}f}"


TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True,
                               lstrip_blocks=True, undefined=jinja2.StrictUndefined)
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # unsorted: the order of curves and steps
TEMPLATES.filters |= {"percent": percent, "fixed": fixed}


# --- the pages

def write_html(path: Path, template: str, **values) -> None:
    """Fill a template into a file, whole or not at all. Raises UserError if it cannot be written."""
    tmp = path.with_name(path.name + ".tmp")
    try:
        tmp.write_text(TEMPLATES.get_template(template).render(values), encoding="utf-8", errors="replace")
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}") from None


def write_page(folder) -> Path:
    """Write an evaluation's index.html from its wer.jsonl and summary.json. Raises UserError if it is not one."""
    folder = Path(folder).resolve()
    summary, rows = read_evaluation(folder)
    columns = {key: label for key, label in COLUMNS.items()
               if key not in NUMBERS or any(row[key] is not None for row in rows)}
    in_run = folder.parent.name == "eval" and (folder.parents[1] / "metrics.jsonl").is_file()
    facts = {key: summary[key] for key in ("ckpt", "prompts", "judge", "vocoder", "steps", "cfg_scale", "seed")
             if summary.get(key) is not None}
    write_html(folder / "index.html", "page.html.j2", rows=rows, columns=columns, tiles=headline(summary), facts=facts,
               step=summary.get("step"), run=folder.parents[1].name if in_run else folder.name, in_run=in_run)
    return folder / "index.html"


def thin(points: list[tuple]) -> list[tuple]:
    """At most MOST_POINTS points, each the mean of its neighbours; the last stays."""
    size = math.ceil(len(points) / MOST_POINTS)
    chunks = [points[i:i + size] for i in range(0, len(points), size or 1)]
    return [(chunk[-1][0], number(sum(y for _, y in chunk) / len(chunk))) for chunk in chunks]


def curves(metrics: list[dict], evaluations: list[dict]) -> list[dict]:
    """The panels that have data: title and, by label, the points (step, value).

    Evaluations that the metrics do not know of are drawn from their own summaries.
    """
    panels = []
    for title, keys in PANELS.items():
        lines = {}
        for key, label in keys.items():
            points = {e["step"]: e[key.removeprefix("eval/")] for e in evaluations if key.startswith("eval/")}
            points |= {row["step"]: row[key] for row in metrics if number(row.get(key)) is not None}
            log = title.endswith("loss")  # drawn on a logarithmic axis
            lines[label] = thin(sorted((step, y) for step, y in points.items() if y is not None and (y > 0 or not log)))
        if any(lines.values()):
            panels.append({"title": title, "lines": {label: line for label, line in lines.items() if line}})
    return panels


def write_run_page(run_dir) -> Path:
    """Write a run's index.html over its metrics.jsonl and eval/step_*/, as far as they are there. Raises UserError."""
    run = Path(run_dir).resolve()
    if not run.is_dir():
        raise UserError(f"no folder at {run_dir}; expected a run's, such as .artifacts/local/demo")
    texts, evaluations = {}, []
    for folder in sorted(run.glob("eval/step_*/")):
        try:
            summary, rows = read_evaluation(folder, f"eval/{quote(folder.name)}/")
        except UserError as e:  # one that is being written, or was broken off, is no reason to show none
            warn(f"left out of the run's page: {e}")
            continue
        step = summary.get("step") if isinstance(summary.get("step"), int) else int("0" + re.sub(r"\D", "", folder.name))
        seen, said = {}, {}
        for row in rows:  # a prompt is known by its text, since a run may go on with others; the same text twice counts on
            text = row.pop("text")
            said[text] = said.get(text, -1) + 1
            seen[texts.setdefault((text, said[text]), len(texts))] = {k: v for k, v in row.items() if v is not None}
        evaluations.append({"step": step, "page": f"eval/{quote(folder.name)}/index.html", "rows": seen,
                            **{key: number(summary.get(key)) for key in ("wer", "cer", "alignment")}})
    evaluations.sort(key=lambda e: e["step"])
    metrics = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    if not evaluations and not metrics:
        raise UserError(f"{run_dir} holds neither a run (metrics.jsonl, eval/step_*/) nor an evaluation (wer.jsonl, "
                        "summary.json); expected a folder such as .artifacts/local/demo")
    data = {"prompts": [text for text, _ in texts], "evaluations": evaluations, "panels": curves(metrics, evaluations)}
    write_html(run / "index.html", "run_page.html.j2", data=data, run=run.name)
    return run / "index.html"


def main(argv: list[str]) -> None:
    if len(argv) != 1 or argv[0] in ("-h", "--help"):
        print(__doc__)
        if argv and argv[0] in ("-h", "--help"):
            return
        raise UserError(f"expected one folder, of a run or of an evaluation; found {len(argv)} words")
    folder = Path(argv[0])
    if (folder / "wer.jsonl").is_file() or (folder / "summary.json").is_file():
        print(write_page(folder))
        return
    made = write_run_page(folder)
    for path in sorted(folder.glob("eval/*/wer.jsonl")):
        try:
            write_page(path.parent)
        except UserError as e:
            warn(str(e))
    print(made)


if __name__ == "__main__":
    run_cli(main)
