"""The numbers of a run: metrics.jsonl, Weights & Biases, a line on the terminal, and curves.

    python metric.py .artifacts/local/demo --out curves.png
    python metric.py RUN_A RUN_B --out curves.svg --x hours --smooth 0.9    # several runs on the same axes
    python metric.py RUN_A RUN_B --table                     # the last and the best numbers of each run, in Markdown
"""
import argparse
import dataclasses
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from common import UserError, first_line, replacing, run_cli, tell, warn, write_file
from config import Config

FAILURES = 5  # a run ends when writes of one kind have failed this often in a row
MEDIA_PROMPTS = 8  # W&B gets audio and pictures of this many prompts; its table has all prompts
PANELS = {"loss": ["train/loss"], "flow loss": ["train/flow_loss", "val/flow_loss"],
          "duration loss": ["train/duration_loss", "val/duration_loss"],
          "share loss": ["train/share_loss", "val/share_loss"], "alignment loss": ["train/alignment_loss"],
          "alignment score": ["eval/alignment_score"], "error rates": ["eval/cer", "eval/wer"],
          "mel-cepstral distortion": ["eval/mcd"], "duration error": ["eval/duration_error"],
          "DNSMOS": ["eval/dnsmos", "eval/dnsmos_overall"], "likeness": ["eval/likeness"],
          "F0 spread, semitones": ["eval/f0_spread"], "F0 correlation": ["eval/f0_correlation"],
          "learning rate": ["optim/lr"], "gradient norm": ["optim/grad_norm"], "seconds per step": ["time/step_sec"]}


def peak_memory(cuda: bool) -> float:
    """The most memory that this process has used, in GiB: on its GPU, or else resident in main memory."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return (torch.cuda.max_memory_allocated() if cuda else resident) / 2**30


def provenance(cfg: Config, step: int, world: int, device, fingerprint: str) -> dict:
    """What this start of a run uses: code, packages, machine, corpus and config. Without git its values are None."""
    def git(*command):
        try:
            done = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
            return done.stdout.split("\n")
        except OSError:  # git is not installed
            return [""]
    commit = git("rev-parse", "HEAD")[0]
    versions = {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow", "soundfile", "soxr")}
    devices = [torch.cuda.get_device_name(n) for n in range(cfg.gpus)] or [platform.processor() or platform.machine()]
    return {"step": step, "time": time.time(), "command": sys.argv, "host": platform.node(),
            "commit": commit or None, "uncommitted": git("status", "--porcelain")[:-1] if commit else None,
            "python": platform.python_version(), "packages": versions, "cuda": torch.version.cuda, "device": device.type,
            "devices": devices, "ranks": world, "threads": torch.get_num_threads(), "corpus": fingerprint,
            "config": dataclasses.asdict(cfg)}


class Window:
    """Sums since the last logged line. Each rank sums the losses of its own part of each step.

    The losses are float32 and their sums float64, which hold such sums without rounding. So neither the number of ranks nor
    a stop and resume between two lines changes a mean. Call methods that take `ranks` (a distributed.Ranks) on every rank.
    """

    def __init__(self, names, device):
        self.names, self.losses = names, torch.zeros(len(names), dtype=torch.float64, device=device)
        self.counts = np.zeros(5)  # steps, skipped steps, frames, seconds, seconds of waiting for data

    def clear(self) -> None:
        self.losses.zero_()
        self.counts[:] = 0

    def add(self, losses: torch.Tensor, frames: int, seconds: float, waited: float, skipped: bool) -> None:
        """Add a step, but not its losses (names,) if the step was skipped."""
        self.counts += (1, skipped, frames, seconds, waited)
        if not skipped:
            self.losses += losses

    def total(self, ranks) -> torch.Tensor:
        """The summed losses of all ranks (names,)."""
        losses = self.losses.clone()
        if ranks.world > 1:
            torch.distributed.all_reduce(losses)
        return losses

    def means(self, ranks) -> dict[str, float]:
        """Each loss's mean over the steps that were not skipped; {} if all were."""
        counted = int(self.counts[0] - self.counts[1])
        return dict(zip(self.names, (self.total(ranks) / counted).tolist())) if counted else {}

    def rates(self) -> dict[str, float]:
        steps, _, frames, seconds, waited = self.counts.tolist()
        return {"time/step_sec": seconds / steps, "time/data_wait_sec": waited / steps,
                "perf/frames_per_sec": frames / seconds}

    def state(self, ranks) -> dict:
        return {"losses": self.total(ranks).tolist(), "counts": self.counts.tolist()}

    def load(self, state: dict, ranks) -> None:
        """Continue from what state() returned. Only rank 0 takes the losses, because they are those of all ranks."""
        self.counts[:] = state["counts"]
        losses = torch.tensor(state["losses"], dtype=torch.float64)
        self.losses.copy_(losses if ranks.rank == 0 else torch.zeros_like(losses))


def start_wandb(cfg: Config):
    """A W&B run: offline in out_dir/wandb, or online at cfg.wandb_url. If W&B fails, warn and return None."""
    try:
        import wandb
        os.environ.setdefault("WANDB_SILENT", "true")
        if cfg.wandb_url:
            os.environ["WANDB_BASE_URL"] = cfg.wandb_url
        run = wandb.init(project=cfg.wandb_project, name=cfg.run_name, dir=cfg.out_dir, config=dataclasses.asdict(cfg),
                         mode="online" if cfg.wandb_url else "offline")
        run.define_metric("*", step_metric="step")
        return run
    except Exception as e:  # W&B raises errors of many types, and training can do without it
        warn(f"no W&B in this run ({type(e).__name__}: {first_line(e)}); metrics.jsonl has everything. "
             "--no_wandb silences this warning")


class Metrics:
    """Writes a run's numbers to metrics.jsonl, to W&B and to the terminal. Only rank 0 has one.

    `step` is that of the checkpoint from which the run continues. Later lines are dropped, because their steps are trained
    again. `logged` has the keys that are already logged for this step. Raises UserError if the folder cannot be written.
    """

    def __init__(self, cfg: Config, step: int = 0):
        self.cfg, self.path = cfg, Path(cfg.out_dir) / "metrics.jsonl"
        self.unwritten, self.failures = b"", {}  # bytes for metrics.jsonl; what failed -> how often in a row
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        self.logged = {key for row in kept if row["step"] == step for key in row}
        write_file(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = open(self.path, "ab", buffering=0)
        self.wandb = None if cfg.no_wandb else start_wandb(cfg)

    def attempt(self, what: str, write, *args) -> bool:
        """Call write(*args) and return whether it succeeded. Warn if not; the caller tries again at the next occasion.

        Raises UserError when `what` has failed FAILURES times in a row.
        """
        try:
            write(*args)
        except Exception as e:  # full disks, lost folders and W&B raise errors of many types
            self.failures[what] = self.failures.get(what, 0) + 1
            while e.__context__ and not isinstance(e, OSError):  # torch.save raises RuntimeError after the disk's OSError
                e = e.__context__
            problem = f"{what} could not be written ({type(e).__name__}: {first_line(e)})"
            if self.failures[what] >= FAILURES:
                raise UserError(f"{problem}, {FAILURES} times in a row. Make room in {self.cfg.out_dir} or repair what the "
                                "message names, then go on from the last good checkpoint with --resume latest"
                                + (", or without W&B: --no_wandb" if what == "W&B" else "")) from None
            warn(f"{problem}; training continues")
            return False
        self.failures[what] = 0
        return True

    def write_lines(self) -> None:
        while self.unwritten:  # a disk that gets full takes only part of a line
            self.unwritten = self.unwritten[self.file.write(self.unwritten):]

    def log(self, step: int, values: dict) -> None:
        self.unwritten += json.dumps({"step": step, "time": time.time(), **values}).encode() + b"\n"
        self.attempt("metrics.jsonl", self.write_lines)
        if self.wandb:
            self.attempt("W&B", self.wandb.log, {"step": step, **values})

    def best(self, key: str) -> float:
        """The smallest value of a figure so far, infinity if there is none."""
        return min((row[key] for row in read_metrics(self.path) if key in row), default=math.inf)

    def record_start(self, values: dict) -> None:
        """Add a line to runs.jsonl, which has one line for each start of the run. Raises UserError."""
        path = self.path.with_name("runs.jsonl")
        starts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        write_file(path, "\n".join([*starts, json.dumps(values)]) + "\n")
        if self.wandb:
            self.attempt("W&B", self.wandb.config.update, {k: v for k, v in values.items() if k != "config"})

    def media(self, step: int, folder: Path) -> None:
        """Show an evaluation in W&B: a table of all prompts, and audio and pictures of the first ones."""
        if self.wandb:
            self.attempt("W&B", lambda: self.wandb.log({"step": step, **wandb_media(folder)}))

    def line(self, step: int, last_step: int, values: dict) -> None:
        """Show the progress of training on the terminal."""
        left = datetime.timedelta(seconds=int(values["time/step_sec"] * (last_step - step)))
        loss, norm = values.get("train/loss", np.nan), values.get("optim/grad_norm", np.nan)
        tell(f"step {step}/{last_step} | loss {loss:.4f} | grad {norm:.2f} | lr {values['optim/lr']:.2e} | "
             f"{values['time/step_sec']:.3f} s/step | {values['perf/frames_per_sec']:,.0f} frames/s | {left} left")

    def close(self) -> None:
        self.failures.clear()  # a failure here is only a warning
        self.attempt("metrics.jsonl", self.write_lines)
        self.file.close()
        if self.wandb:
            self.attempt("W&B", self.wandb.finish)


def wandb_media(folder: Path) -> dict:
    import wandb
    from PIL import Image
    rows = [json.loads(line) for line in (folder / "wer.jsonl").read_text(encoding="utf-8").strip().split("\n")]
    columns, first = ["idx", "reference", "hypothesis", "wer", "cer", "predicted_seconds"], rows[:MEDIA_PROMPTS]
    found = {"eval/prompts": wandb.Table(columns=columns, data=[[row[key] for key in columns] for row in rows]),
             "eval/audio": [wandb.Audio(str(folder / row["audio"]), caption=row["reference"]) for row in first]}
    for key, field in (("eval/mel", "mel_png"), ("eval/attention_map", "attention_png")):
        pictures = [Image.open(folder / row[field]).convert("RGB") for row in first]
        size = [max(picture.size[side] for picture in pictures) for side in (0, 1)]  # W&B stretches all to one size: pad
        found[key] = [wandb.Image(picture.crop((0, 0, *size)), caption=row["reference"])
                      for picture, row in zip(pictures, first)]
    return found


# --- afterwards: curves and tables

def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file, [] if there is none. Broken lines are left out, such as one that is being written."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def curve(rows: list[dict], key: str, axis: str = "step") -> list[tuple]:
    """The points (row[axis], row[key]) of the rows in which both are finite numbers."""
    points = [(row.get(axis), row.get(key)) for row in rows]
    return [point for point in points if all(isinstance(value, (int, float)) and abs(value) < 1e300 for value in point)]


def read_runs(runs: list[str]) -> dict[str, list[dict]]:
    """Name of each run -> its lines in the order of their steps, with `hours` of training if known.

    Hours are the sum of time/step_sec, each the mean since the line before. They leave out evaluations and pauses, unlike
    the field `time`. If the first steps have no lines, they count like the next ones. Raises UserError.
    """
    found = {}
    for run in runs:
        path = Path(os.path.abspath(run), "metrics.jsonl" if os.path.isdir(run) else "")
        if not path.is_file():
            raise UserError(f"no metrics at {path}; expected the folder of a run")
        rows = sorted(read_metrics(path), key=lambda row: row["step"])
        steps, seconds = np.array([(0, 0), *curve(rows, "time/step_sec")], dtype=float).T
        hours = np.interp([row["step"] for row in rows], steps, np.cumsum(np.diff(steps, prepend=0) * seconds) / 3600)
        for row, hour in zip(rows, hours.tolist()):
            row["hours"] = hour if len(steps) > 1 else None
        found[path.parent.name if path.parent.name not in found else str(path)] = rows
    return found


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Exponential moving average, divided by the sum of its weights, so that it starts at the first value and not near 0."""
    from scipy.signal import lfilter
    return lfilter([1 - weight], [1, -weight], values) / (1 - weight ** np.arange(1, len(values) + 1))


def plot(runs: list[str], out: str, axis: str = "step", smooth: float = 0.0) -> None:
    """Draw the curves of one or several runs to an image file, in all panels that have data. Raises UserError.

    One run: a colour for each key. Several: a colour for each run, and a panel's second key is dashed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    if not 0 <= smooth < 1:
        raise UserError(f"--smooth {smooth}: expected a number from 0 (off) to below 1, such as 0.9")
    if Path(out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {out}: expected a name that ends in .png, .svg or .pdf")
    data, several = read_runs(runs), len(runs) > 1
    for name, rows in data.items():
        if not any(curve(rows, key, axis) for keys in PANELS.values() for key in keys):
            raise UserError(f"--x {axis}: no curves to draw in {name}; expected losses or error rates in metrics.jsonl, "
                            "for hours also time/step_sec")
    panels = {title: keys for title, keys in PANELS.items()
              if any(curve(rows, key, axis) for rows in data.values() for key in keys)}
    colours = colormaps["tab10"].colors if len(data) <= 10 else colormaps["turbo"](np.linspace(0.03, 0.97, len(data)))
    columns, lines = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines), layout="constrained")
    for place, (title, keys) in enumerate(panels.items(), 1):
        ax = figure.add_subplot(lines, columns, place, title=title, xlabel="hours of training" if axis == "hours" else axis)
        for n, rows in enumerate(data.values()):
            for k, key in enumerate(keys):
                x, y = np.array(curve(rows, key, axis), dtype=float).reshape(-1, 2).T
                style = {"color": colours[n if several else k], "linestyle": "--" if several and k else "-"}
                if smooth and not key.startswith(("val/", "eval/", "optim/lr")):
                    ax.plot(x, y, **style, linewidth=0.8, alpha=0.25)
                    y = smoothed(y, smooth)
                ax.plot(x, y, **style, linewidth=1.3, markersize=3, marker="o" if len(x) < 50 else None,
                        label=key if n == 0 else None)
        ax.set(xlim=(0, None), ylim=(None if "loss" in title else 0, None))
        if title == "error rates":
            ax.yaxis.set_major_formatter("{x:.0%}")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    if several:
        handles = [ax.plot([], [], color=colour, linewidth=3)[0] for colour, _ in zip(colours, data)]
        figure.legend(handles, data, loc="outside upper left", ncols=columns)
    with replacing(out) as tmp:
        figure.savefig(tmp, dpi=130, format=Path(out).suffix[1:])


def table(runs: list[str]) -> str:
    """The last and the best numbers of each run, as a Markdown table. Raises UserError."""
    lines = ["| run | step | hours | train loss | val flow loss | best | CER | best | WER | best |", "|---" * 10 + "|"]
    for name, rows in read_runs(runs).items():
        hours = curve(rows, "hours")
        cells = [name, str(rows[-1]["step"]) if rows else "-", f"{hours[-1][1]:.2f}" if hours else "-"]
        for key in ("train/loss", "val/flow_loss", "eval/cer", "eval/wer"):
            points, text = curve(rows, key), "{:.4f}" if "loss" in key else "{:.2%}"
            cells.append(text.format(points[-1][1]) if points else "-")
            if key != "train/loss":  # the best training loss is that of the easiest batch
                step, value = min(points, key=lambda point: point[1], default=(0, 0))
                cells.append(f"{text.format(value)} (step {step})" if points else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="run folders, or metrics.jsonl files")
    p.add_argument("--out", help="draw the curves to this .png, .svg or .pdf file")
    p.add_argument("--x", choices=("step", "hours"), default="step", help="the horizontal axis (step)")
    p.add_argument("--smooth", type=float, default=0.0, help="smooth the training curves; weight of the past, such as 0.9")
    p.add_argument("--table", action="store_true", help="print the last and the best numbers; the default without --out")
    args = p.parse_args(argv)
    if args.table or not args.out:
        print(table(args.runs))
    if args.out:
        plot(args.runs, args.out, args.x, args.smooth)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    run_cli(main)
