"""A run's numbers: a line of JSON each time, Weights & Biases if it is there, a line on the terminal, and curves.

    python metric.py .artifacts/local/demo --out curves.png
    python metric.py RUN_A RUN_B --out curves.svg --x hours --smooth 0.9    # several runs on the same axes
    python metric.py RUN_A RUN_B --table                     # the best and the last numbers of each, in Markdown
"""
import argparse
import dataclasses
import datetime
import errno
import json
import math
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from config import Config, UserError, first_line, run_cli

FAILURES = 5  # writes of one kind that fail in a row and end a run
MEDIA_PROMPTS = 8  # of an evaluation's prompts, how many go to W&B with sound and pictures; the table has all
PANELS = {"loss": ["train/loss"], "flow loss": ["train/flow_loss", "val/flow_loss"],
          "duration loss": ["train/duration_loss", "val/duration_loss"], "error rates": ["eval/cer", "eval/wer"],
          "alignment": ["eval/alignment"], "learning rate": ["optim/lr"], "gradient norm": ["optim/grad_norm"],
          "seconds a step": ["time/step_sec"]}


def tell(message: str, file=None) -> None:
    """Print a line to `file` (standard output); above the progress bar, where there is one."""
    tqdm.write(message, file)
    print(end="", file=file, flush=True)


def warn(message: str) -> None:
    tell(f"warning: {message}", sys.stderr)


def peak_memory(cuda: bool) -> float:
    """The most memory that this process has held, in GiB: the GPU's, or what was resident on the CPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if cuda else resident) / 2**30


def start_wandb(cfg: Config):
    """A W&B run (offline in out_dir/wandb, or online at cfg.wandb_url), or None with a warning: it never stops a run."""
    if cfg.no_wandb:
        return None
    try:
        import wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        if cfg.wandb_url:
            os.environ["WANDB_BASE_URL"] = cfg.wandb_url
        run = wandb.init(project=cfg.wandb_project, name=cfg.run_name, dir=cfg.out_dir, config=dataclasses.asdict(cfg),
                         mode="online" if cfg.wandb_url else "offline")
        run.define_metric("*", step_metric="step")
        return run
    except Exception as e:  # whatever W&B fails of, training does not
        warn(f"no W&B in this run ({type(e).__name__}: {first_line(e)}); metrics.jsonl "
             "has everything. --no_wandb silences this")
        return None


def provenance(cfg: Config, step: int, world: int, device, fingerprint: str) -> dict:
    """What a start of a run runs: code, packages, machine, corpus and config, as far as they can be told."""
    root = Path(__file__).parent

    def git(*words):
        try:
            return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True, timeout=30).stdout
        except (OSError, subprocess.SubprocessError):
            return None
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    versions = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow", "soundfile", "soxr")}
    names = [torch.cuda.get_device_name(n) for n in range(cfg.gpus)] or [platform.processor() or platform.machine()]
    return {"step": step, "time": time.time(), "command": sys.argv, "host": socket.gethostname(),
            "commit": commit and commit.strip(), "uncommitted": changes.splitlines() if changes is not None else None,
            "python": platform.python_version(), "packages": versions, "cuda": torch.version.cuda, "device": device.type,
            "devices": names, "ranks": world, "threads": torch.get_num_threads(), "corpus": fingerprint,
            "config": dataclasses.asdict(cfg)}


class Metrics:
    """Where a run's numbers go. `step` is that of the checkpoint a run goes on from; later lines are dropped first.

    `logged` has the keys that are there for that step already. A write that fails is a warning, and is tried again with
    the next; the fifth in a row that fails is a UserError.
    """

    def __init__(self, cfg: Config, step: int = 0):
        self.cfg, self.path, self.wandb = cfg, Path(cfg.out_dir) / "metrics.jsonl", start_wandb(cfg)
        self.unwritten, self.failures, self.bar = b"", {}, None
        kept = [row for row in read_metrics(self.path) if row["step"] <= step] if self.path.exists() and step else []
        self.logged = {key for row in kept if row["step"] == step for key in row}
        self.cer = next((row["eval/cer"] for row in reversed(kept) if "eval/cer" in row), None)
        tmp = self.path.with_name("metrics.jsonl.tmp")
        tmp.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(tmp, self.path)
        self.file = open(self.path, "ab", buffering=0)

    def attempt(self, what: str, write, *args) -> bool:
        """Whether write(*args) could be done. Raises UserError when `what` has failed FAILURES times in a row."""
        try:
            write(*args)
        except Exception as e:  # full disks, lost folders and W&B raise errors of many types
            self.failures[what] = self.failures.get(what, 0) + 1
            while e.__context__ and not isinstance(e, OSError):  # torch.save buries the disk's error
                e = e.__context__
            why = f"{what} could not be written ({type(e).__name__}: {first_line(e)})"
            if self.failures[what] >= FAILURES:
                raise UserError(f"{why}, the {FAILURES} last times; make room in {self.cfg.out_dir} or mend what the "
                                "message names, then go on from the last good checkpoint with --resume latest"
                                + (", or without W&B: --no_wandb" if what == "W&B" else "")) from None
            warn(f"{why}; going on")
            return False
        self.failures[what] = 0
        return True

    def _append(self) -> None:
        """Write what is due, unbuffered: a full disk may take a part of it, and the rest comes when there is room."""
        self.unwritten = self.unwritten[self.file.write(self.unwritten):]
        if self.unwritten:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def log(self, step: int, values: dict) -> None:
        self.cer = values.get("eval/cer", self.cer)
        self.unwritten += json.dumps({"step": step, "time": time.time(), **values}).encode() + b"\n"
        self.attempt("metrics.jsonl", self._append)
        if self.wandb:
            self.attempt("W&B", self.wandb.log, {"step": step, **values})

    def record_start(self, values: dict) -> None:
        """Add a line to runs.jsonl, which has one for each time that the run was started."""
        path = self.path.with_name("runs.jsonl")
        cut_off = path.exists() and not path.read_bytes().endswith(b"\n")  # a start that was killed as it wrote
        with open(path, "a", encoding="utf-8") as f:
            f.write("\n" * cut_off + json.dumps(values) + "\n")
        if self.wandb:
            self.attempt("W&B", self.wandb.config.update, {k: v for k, v in values.items() if k != "config"})

    def media(self, step: int, folder: Path) -> None:
        """Show an evaluation in W&B: sounds and pictures of its first prompts, where there are any, and a table of all."""
        if self.wandb:
            self.attempt("W&B", self._media, step, Path(folder))

    def _media(self, step, folder):
        import wandb
        from PIL import Image
        rows = [json.loads(line) for line in (folder / "wer.jsonl").read_text(encoding="utf-8").split("\n") if line]
        columns = ["idx", "reference", "hypothesis", "wer", "cer", "predicted_seconds"]
        shown = {"eval/prompts": wandb.Table(columns=columns, data=[[row.get(k) for k in columns] for row in rows])}
        for key, name in (("eval/audio", "audio"), ("eval/mel", "mel_png"), ("eval/alignment_map", "alignment_png")):
            files = [(folder / row[name], row["reference"]) for row in rows[:MEDIA_PROMPTS]
                     if row.get(name) and (folder / row[name]).is_file()]
            if name == "audio":
                shown[key] = [wandb.Audio(str(path), caption=text) for path, text in files]
            else:  # W&B shows a list of pictures in one size, so all get that of the largest
                pictures = [Image.open(path).convert("RGB") for path, _ in files]
                size = [max((picture.size[side] for picture in pictures), default=0) for side in (0, 1)]
                shown[key] = [wandb.Image(p.crop((0, 0, *size)), caption=text) for p, (_, text) in zip(pictures, files)]
        self.wandb.log({"step": step, **{key: value for key, value in shown.items() if value}})

    def line(self, step: int, last_step: int, values: dict) -> None:
        """Show where training is: on a terminal by its progress bar, in a log file by a line."""
        left = datetime.timedelta(seconds=int(values["time/step_sec"] * (last_step - step)))
        loss, norm = values.get("train/loss", math.nan), values.get("optim/grad_norm", math.nan)
        speed = f"{values['perf/frames_per_sec']:,.0f} frames/s"
        if sys.stdout.isatty():
            cer = "" if self.cer is None else f", CER {self.cer:.1%}"
            text = f"{left} left, loss {loss:.4f}{cer}, {speed}, {peak_memory(self.cfg.gpus > 0):.1f} GiB"
            self.bar = self.bar or tqdm(total=last_step, initial=step, desc=text, file=sys.stdout, dynamic_ncols=True,
                                        bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}")
            self.bar.n = step
            self.bar.set_description_str(text)
            return
        tell(f"step {step}/{last_step} | loss {loss:.4f} | grad {norm:.2f} | lr {values['optim/lr']:.2e} | "
             f"{values['time/step_sec']:.3f} s/step | {speed} | {left} left")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.unwritten:
            self.attempt("metrics.jsonl", self._append)
        self.file.close()
        if self.wandb:
            self.failures.clear()
            self.attempt("W&B", self.wandb.finish)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, also one that is still being written: a line cut off is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # also of numbers and brackets without end
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def read_runs(runs: list[str]) -> dict[str, tuple[Path, list[dict]]]:
    """A name for each run -> its folder and its lines in the order of their steps. Raises UserError."""
    found = {}
    for run in runs:
        path = Path(os.path.abspath(run), "metrics.jsonl" if os.path.isdir(run) else "")
        name = path.parent.name if path.parent.name not in found else str(path)
        try:
            found[name] = path.parent, sorted(read_metrics(path), key=lambda row: row["step"])
        except OSError as e:
            raise UserError(f"no metrics at {path} ({e.strerror}); expected the folder of a run") from None
    return found


def curve(at, rows: list[dict], key: str) -> list[tuple]:
    """(position, value) of the rows in which `key` is a finite number."""
    return [(x, row[key]) for x, row in zip(at, rows) if isinstance(row.get(key), (int, float)) and abs(row[key]) < 1e300]


def positions(folder: Path, rows: list[dict], x: str):
    """Where each row lies on the axis `x`: step, epoch or hours of training. None if the run does not say.

    Hours are added up from time/step_sec, the mean over the steps since the logged line before, also over a stop in between:
    it leaves out evaluations and pauses, which the clock in `time` counts. Steps from before a folder's lines took as long.
    """
    steps = [row["step"] for row in rows]
    if x == "step":
        return steps
    if x == "epoch":
        starts = read_metrics(folder / "runs.jsonl") if (folder / "runs.jsonl").is_file() else []
        per_epoch = [n for _, n in curve(starts, starts, "steps_per_epoch") if n > 0]
        return [step / per_epoch[-1] for step in steps] if per_epoch else None
    at, seconds = np.array([(0, 0), *curve(steps, rows, "time/step_sec")], dtype=float).T
    return np.interp(steps, at, np.cumsum(np.diff(at, prepend=0) * seconds) / 3600) if at[1:].size else None


def smoothed(values, weight: float) -> list[float]:
    """Exponential moving average, over the sum of its weights, so that it starts at the first value and not near 0."""
    sums = accumulate(values, lambda total, value: weight * total + value)
    return [total * (1 - weight) / (1 - weight**n) for n, total in enumerate(sums, 1)]


def plot(runs: list[str], out: str, x: str = "step", smooth: float = 0.0) -> None:
    """Curves of one or several runs, the panels that have data, to a PNG or SVG file. Raises UserError."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    if not 0 <= smooth < 1:
        raise UserError(f"--smooth {smooth}: expected 0 (off) up to, but not including, 1, such as 0.9")
    data = {name: (positions(folder, rows, x), rows) for name, (folder, rows) in read_runs(runs).items()}
    if dumb := [name for name, (at, _) in data.items() if at is None]:
        lack = "steps_per_epoch in runs.jsonl" if x == "epoch" else "time/step_sec in metrics.jsonl"
        raise UserError(f"--x {x}: no {lack} of {', '.join(dumb)}; use --x step")
    panels = {title: keys for title, keys in PANELS.items()
              if any(curve(at, rows, key) for at, rows in data.values() for key in keys)}
    if not panels:
        raise UserError(f"no curves to draw in {', '.join(runs)}: the metrics hold no losses and no error rates yet")
    several = len(data) > 1  # then colours tell runs apart, else keys
    colors = colormaps["tab10"].colors if len(data) <= 10 else colormaps["turbo"](np.linspace(0.03, 0.97, len(data)))
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    for place, (title, keys) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(lines, columns, place)
        for k, key in enumerate(keys):
            style = "--" if several and k else "-"
            ax.plot([], [], style, color="0.3" if several else colors[k], label=key)
            for n, (at, rows) in enumerate(data.values()):
                points = np.array(curve(at, rows, key), dtype=float).reshape(-1, 2)
                look = {"linestyle": style, "color": colors[n if several else k]}
                if smooth and not key.startswith(("val/", "eval/", "optim/lr")):
                    ax.plot(*points.T, **look, linewidth=0.8, alpha=0.25)
                    points[:, 1] = smoothed(points[:, 1], smooth)
                ax.plot(*points.T, **look, linewidth=1.3, markersize=3, marker="o" if len(points) < 50 else None)
        ax.set(title=title, xlabel="hours of training" if x == "hours" else x, xlim=(0, None),
               ylim=(None if "loss" in title else 0, None))
        if title == "error rates":
            ax.yaxis.set_major_formatter("{x:.0%}")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    if several:  # a $ would start a formula
        figure.legend([ax.plot([], [], color=color, linewidth=3)[0] for color, _ in zip(colors, data)],
                      [name.replace("$", r"\$") for name in data], loc="outside upper left", ncols=columns)
    try:
        figure.savefig(out, dpi=130)
    except (OSError, ValueError) as e:
        raise UserError(f"cannot write {out}: {e}") from None


def table(runs: list[str]) -> str:
    """The last and the best numbers of each run, as a Markdown table. Raises UserError."""
    lines = ["| run | step | hours | train loss | val flow loss | best | CER | best | WER | best |", "|---" * 10 + "|"]
    for name, (folder, rows) in read_runs(runs).items():
        steps, hours = (positions(folder, rows, x) for x in ("step", "hours"))
        cells = [name.replace("|", r"\|"), str(max(steps, default="-")), "-" if hours is None else f"{hours[-1]:.2f}"]
        for key in ("train/loss", "val/flow_loss", "eval/cer", "eval/wer"):
            form, points = "{:.4f}" if "loss" in key else "{:.2%}", curve(steps, rows, key)
            best = min(points, key=lambda point: point[1], default=None)
            cells += [form.format(points[-1][1]), f"{form.format(best[1])} (step {best[0]})"] if points else ["-", "-"]
        del cells[4]  # the best training loss says nothing
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders, or metrics.jsonl files")
    p.add_argument("--out", help="draw the curves to this .png or .svg file")
    p.add_argument("--x", choices=("step", "epoch", "hours"), default="step", help="the horizontal axis (step)")
    p.add_argument("--smooth", type=float, default=0.0, help="weight of the past in the curves of training, such as 0.9")
    p.add_argument("--table", action="store_true", help="print the best and the last numbers of each run")
    args = p.parse_args(argv)
    if not args.out and not args.table:
        raise UserError("nothing to do: expected --out curves.png, or --table, or both")
    if args.table:
        print(table(args.runs))
    if args.out:
        plot(args.runs, args.out, args.x, args.smooth)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
