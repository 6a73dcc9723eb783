"""Train a track of the speedrun with several seeds, keep the logs, and add a row to records/README.md.

    python records/run.py demo-cpu --name align --idea "alignment search" --max_steps 300 --eval_interval 300
    python records/run.py natural-cpu --name first --idea "…"       # reads the corpus aloud first, downloads Whisper
    python records/run.py ljspeech-gpu --name first --idea "…"      # downloads LJSpeech, ByT5, BigVGAN and Whisper

All other flags go to train.py. A missing corpus or judge is made first. A run's score is its minutes of training, without
evaluations and compilation, until the first evaluation at or below the track's error rate. Training evaluates on `val`. The
checkpoint that reached the target there is then evaluated once on `test`, and counts only if it reaches the target there
too. A record's score is the median.
"""
import argparse
import datetime
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from common import UserError, replacing, run_cli, write_file
from config import load_config
from corpus import RECORDINGS
from metric import read_metrics

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


class Track(NamedTuple):
    config: str
    flags: list[str]  # of the evaluations
    count: int  # number of prompts of `test`
    key: str  # the error rate that counts
    target: float
    above_recordings: bool = False  # whether the target is added to the error rate of the recordings


TRACKS = {
    "demo-cpu": Track("configs/grammar.yaml", "--eval_prompts val --eval_num_samples 128 --eval_judge ctc --eval_vocoder "
                      "griffinlim".split(), 128, "eval/cer", 0.05),
    "natural-cpu": Track("configs/demo.yaml", "--eval_prompts val --eval_num_samples 100 --eval_judge whisper "
                         "--eval_whisper_model tiny.en --eval_vocoder griffinlim".split(), 100, "eval/wer", 0.10, True),
    "ljspeech-gpu": Track("configs/ljspeech.yaml", "--gpus 1 --eval_prompts val --eval_num_samples 100 --eval_judge whisper "
                          "--eval_whisper_model base.en --eval_vocoder bigvgan".split(), 256, "eval/wer", 0.02, True),
}


def call(*command) -> None:
    """Run a Python command of this repository. Raises UserError if it fails; its own message is printed before that."""
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise UserError(f"{shlex.join(command)} failed; nothing was recorded")


def target(track: Track, flags: list[str], recordings: str, out: Path) -> float:
    """The error rate to reach. If it depends on the recordings' own rate, measure that on the same prompts."""
    if not track.above_recordings:
        return track.target
    call("evaluator.py", *flags, "--recordings", recordings, "--out_dir", str(out))
    return track.target + json.loads((out / "recordings.json").read_text())[track.key.removeprefix("eval/")]


def time_to_target(rows: list[dict], key: str, target: float) -> dict:
    """The score of a run from its metrics: minutes of training until `key` was at most `target` (None: never), step and rate
    of that evaluation or else of the last one, and minutes of the whole run. Raises UserError if there was no evaluation.
    """
    evaluations = [row for row in rows if key in row and "time/train_sec" in row]
    if not evaluations:
        raise UserError(f"no {key} in the run's metrics; expected an eval_interval of at most max_steps")
    reached = next((row for row in evaluations if row[key] <= target), None)
    shown = reached or evaluations[-1]
    return {"minutes": reached and reached["time/train_sec"] / 60, "step": shown["step"], "rate": shown[key],
            "target": target, "train_minutes": evaluations[-1]["time/train_sec"] / 60,
            "eval_minutes": sum(row["time/eval_sec"] for row in evaluations) / 60,
            "compile_minutes": sum(row.get("time/compile_sec", 0.0) for row in rows) / 60}


def confirm(track: Track, found: dict, out: Path, recordings: str) -> dict:
    """The score of a run that reached its target on `val`, with the rate and the target on `test`.

    There are no minutes unless that rate is at most that target.
    """
    if found["minutes"] is None:
        return found
    flags = ["--prompts", "test", "--num", str(track.count)]
    call("evaluator.py", "--ckpt", str(out / f"ckpt_step_{found['step']:08d}.pt"), *flags, "--out_dir", str(out / "test"))
    rate = json.loads((out / "test" / "summary.json").read_text())[track.key.removeprefix("eval/")]
    goal = target(track, [*flags, "--config", str(out / "config.yaml")], recordings, out / "test_recordings")
    return found | {"test_rate": rate, "test_target": goal, "minutes": found["minutes"] if rate <= goal else None}


def table_row(track: str, name: str, idea: str, runs: list[dict], date: str) -> str:
    """The record's row in the table. There is no median unless every seed reached the target on both splits."""
    minutes = [run["minutes"] for run in runs]
    score = "not reached" if None in minutes else f"**{statistics.median(minutes):.2f}**"
    each = ", ".join(f"{run['minutes'] or run['train_minutes']:.2f} ({run['rate']:.1%} at {run['step']}"
                     + (f"; test {run['test_rate']:.1%})" if "test_rate" in run else ")") for run in runs)
    return f"| {track} | {score} | {each} | {idea} | {date} | [log]({name}/) |"


def add_row(page: str, row: str) -> str:
    """The page with `row` at the end of its table of records, which ends at an empty line."""
    end = page.index("\n\n", page.index("| track | minutes |"))
    return f"{page[:end]}\n{row}{page[end:]}"


def write_record(folder: Path, idea: str, runs: list[dict]) -> None:
    """Keep the config, the logs, the command and the scores of a record's runs in `folder`."""
    with replacing(folder) as tmp:
        tmp.mkdir()
        shutil.copy(runs[0]["out"] / "config.yaml", tmp)
        for run in runs:
            shutil.copy(run["out"] / "metrics.jsonl", tmp / f"metrics_{run['seed']}.jsonl")
            shutil.copy(run.pop("out") / "runs.jsonl", tmp / f"runs_{run['seed']}.jsonl")
        command, scores = shlex.join(["python", *sys.argv]), json.dumps(runs, indent=1)
        (tmp / "README.md").write_text(f"# {folder.name}\n\n{idea}\n\n```bash\n{command}\n```\n\n```json\n{scores}\n```\n")


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)  # because --seed is a flag of train.py
    p.add_argument("track", choices=list(TRACKS))
    p.add_argument("--name", required=True, help="of the record's folder")
    p.add_argument("--idea", required=True, help="one sentence")
    p.add_argument("--seeds", type=int, default=3, help="number of runs")
    p.add_argument("--recordings", help="a folder of <utt_id>.wav; default: those that the corpus has kept")
    args, flags = p.parse_known_args(argv)
    track, folder, runs = TRACKS[args.track], HERE / args.name, []
    if folder.exists():
        raise UserError(f"{folder} exists already; give the record another --name")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected 1 or more")
    flags = ["--config", track.config, *track.flags, *flags]
    cfg = load_config(flags)
    if not (ROOT / cfg.data_dir).exists():
        if subprocess.run(["./run.sh", "prepare", *flags], cwd=ROOT).returncode:  # it also installs what the script needs
            raise UserError(f"the corpus {cfg.data_dir} could not be prepared; nothing was recorded")
    recordings = args.recordings or str(Path(cfg.data_dir, RECORDINGS))
    if cfg.eval_judge == "ctc" and not (ROOT / cfg.data_dir / "judge_ctc.pt").exists():
        call("eval/ctc.py", *flags)
    ranks = cfg.gpus or cfg.nproc
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"] if ranks > 1 else []
    for seed in range(1337, 1337 + args.seeds):
        out = HERE.parent / ".artifacts" / "records" / f"{args.name}_{seed}"
        seeded = [*flags, "--seed", str(seed)]
        goal = target(track, seeded, recordings, out.with_name(f"{out.name}_recordings"))
        call(*torchrun, "train.py", *seeded, "--run_name", out.name, "--out_dir", str(out), "--no_wandb",
             "--keep_checkpoints", "1000")
        found = time_to_target(read_metrics(out / "metrics.jsonl"), track.key, goal)
        runs.append(confirm(track, found, out, recordings) | {"seed": seed, "out": out})
    write_record(folder, args.idea, runs)
    row = table_row(args.track, args.name, args.idea, runs, datetime.date.today().isoformat())
    write_file(HERE / "README.md", add_row((HERE / "README.md").read_text(encoding="utf-8"), row))
    print(row)


if __name__ == "__main__":
    run_cli(main)
