"""Run a track of the speedrun for several seeds, keep the logs, and add a row to records/README.md.

    python records/run.py demo-cpu --name align --idea "alignment search" --max_steps 300 --eval_interval 300
    python records/run.py demo-cpu --name baseline --idea "…" --config configs/demo_baseline.yaml --seeds 1

Words that are not this script's go to train.py. A run's score is its minutes of training, evaluations left out, until the
first evaluation at or under the track's error rate; a record's is the median of its seeds.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import UserError, run_cli  # noqa: E402
from metric import read_metrics  # noqa: E402

HERE = Path(__file__).resolve().parent
FIRST_SEED = 1337
# track -> its config, what it evaluates, the rate that counts and where it must come to
TRACKS = {
    "demo-cpu": ("configs/demo.yaml", ["--eval_prompts", "test", "--eval_num_samples", "128", "--eval_judge", "ctc",
                                       "--eval_vocoder", "griffinlim"], "eval/cer", 0.05),
}


def time_to_target(rows: list[dict], key: str, target: float) -> dict:
    """Of a run's metrics: minutes of training until `key` was at most `target` (None: never), its value and step there or at
    the end, minutes of training and of evaluation in all. Raises UserError if the run was never evaluated.
    """
    evaluations = [row for row in rows if key in row and "time/train_sec" in row]
    if not evaluations:
        raise UserError(f"no {key} in the run's metrics; expected an eval_interval of at most max_steps")
    reached = next((row for row in evaluations if row[key] <= target), None)
    last = evaluations[-1]
    shown = reached or last
    return {"minutes": reached and reached["time/train_sec"] / 60, "step": shown["step"], "rate": shown[key],
            "train_minutes": last["time/train_sec"] / 60,
            "eval_minutes": sum(row["time/eval_sec"] for row in evaluations) / 60}


def row(track: str, name: str, idea: str, runs: list[dict], date: str) -> str:
    """The record's line in the table; a median over seeds of which one never came there is none."""
    minutes = [run["minutes"] for run in runs]
    score = "not reached" if None in minutes else f"**{statistics.median(minutes):.2f}**"
    each = ", ".join(f"{run['train_minutes'] if run['minutes'] is None else run['minutes']:.2f} ({run['rate']:.1%} at "
                     f"{run['step']})" for run in runs)
    return f"| {track} | {score} | {each} | {idea} | {date} | [log]({name}/) |"


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("track", choices=list(TRACKS))
    p.add_argument("--name", required=True, help="of the record's folder")
    p.add_argument("--idea", required=True, help="one sentence")
    p.add_argument("--seeds", type=int, default=3)
    args, flags = p.parse_known_args(argv)
    config, evaluation, key, target = TRACKS[args.track]
    folder = HERE / args.name
    if folder.exists():
        raise UserError(f"{folder} exists already; give the record another --name")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected 1 or more")
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        out = HERE.parent / ".artifacts" / "records" / f"{args.name}_{seed}"
        command = [sys.executable, "train.py", *([] if "--config" in flags else ["--config", config]), *evaluation, *flags,
                   "--seed", str(seed), "--run_name", f"{args.name}_{seed}", "--out_dir", str(out), "--no_wandb"]
        if subprocess.run(command, cwd=HERE.parent).returncode:
            raise UserError(f"seed {seed} failed; nothing was recorded")
        runs.append(time_to_target(read_metrics(out / "metrics.jsonl"), key, target) | {"seed": seed, "out": out})
    folder.mkdir()
    for run in runs:
        shutil.copy(run["out"] / "metrics.jsonl", folder / f"metrics_{run['seed']}.jsonl")
        shutil.copy(run.pop("out") / "runs.jsonl", folder / f"runs_{run['seed']}.jsonl")
    shutil.copy(HERE.parent / ".artifacts" / "records" / f"{args.name}_{FIRST_SEED}" / "config.yaml", folder)
    line = row(args.track, args.name, args.idea, runs, datetime.date.today().isoformat())
    command, found = shlex.join(["python", *sys.argv]), json.dumps(runs, indent=1)
    (folder / "README.md").write_text(f"# {args.name}\n\n{args.idea}\n\n```bash\n{command}\n```\n\n"
                                      f"```json\n{found}\n```\n")
    with open(HERE / "README.md", "a", encoding="utf-8") as f:
        f.write(line + "\n")
    print(line)


if __name__ == "__main__":
    run_cli(main)
