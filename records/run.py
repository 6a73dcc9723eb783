"""Run a track of the speedrun for several seeds, keep the logs, and add a row to records/README.md.

    python records/run.py demo-cpu --name align --idea "alignment search" --max_steps 300 --eval_interval 300
    python records/run.py demo-cpu --name baseline --idea "…" --config configs/demo_baseline.yaml --seeds 1
    python records/run.py open-vocab-gpu --name first --idea "…"
    python records/run.py ljspeech-gpu --name first --idea "…"      # downloads LJSpeech, ByT5, BigVGAN and Whisper

Words that are not this script's go to train.py. What is missing is made first: the corpus, its judge, and where the target
hangs on it, what the judge makes of the recordings. A run's score is its minutes of training until the first evaluation at
or under the track's error rate; evaluations and compilation are left out and reported. A record's is its seeds' median.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import Config, UserError, load_config, run_cli  # noqa: E402
from metric import read_metrics  # noqa: E402

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIRST_SEED = 1337


class Track(NamedTuple):
    config: str
    flags: list[str]  # what is evaluated, and how
    key: str  # the rate that counts
    target: float
    above_recordings: bool = False  # the target is that much above the recordings' own rate


TRACKS = {
    "demo-cpu": Track("configs/demo.yaml", "--eval_prompts test --eval_num_samples 128 --eval_judge ctc --eval_vocoder "
                      "griffinlim".split(), "eval/cer", 0.05),
    "open-vocab-gpu": Track("configs/openvocab.yaml", "--eval_prompts test --eval_num_samples 256 --eval_judge ctc "
                            "--eval_vocoder griffinlim".split(), "eval/cer", 0.05),
    "ljspeech-gpu": Track("configs/ljspeech.yaml", "--gpus 1 --eval_prompts test --eval_num_samples 256 --eval_judge "
                          "whisper --eval_whisper_model base.en --eval_vocoder bigvgan".split(), "eval/wer", 0.02, True),
}


def call(*command) -> None:
    """Run a command of this repo here. Raises UserError if it fails; its own message stands above that one."""
    if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
        raise UserError(f"{shlex.join(command)} failed; nothing was recorded")


def prepare(cfg: Config, flags: list[str]) -> None:
    """Make the corpus and its judge where they are missing."""
    if not (ROOT / cfg.data_dir).exists():
        if not cfg.prepare_script:
            raise UserError(f"no corpus at {cfg.data_dir}, and the config names no prepare_script that would make it")
        call(cfg.prepare_script, "--out", cfg.data_dir)
    if cfg.eval_judge == "ctc" and not (ROOT / cfg.data_dir / "judge_ctc.pt").exists():
        call("eval/ctc.py", *flags)


def target(track: Track, flags: list[str], recordings: str, out: Path) -> float:
    """The rate that a run must come to; where it hangs on the recordings, the judge hears those of the run's prompts."""
    if not track.above_recordings:
        return track.target
    call("evaluator.py", *flags, "--recordings", recordings, "--out_dir", str(out))
    return track.target + json.loads((out / "recordings.json").read_text())[track.key.removeprefix("eval/")]


def time_to_target(rows: list[dict], key: str, target: float) -> dict:
    """Of a run's metrics: minutes of training until `key` was at most `target` (None: never), its value and step there or at
    the end, minutes of training, of evaluation and of compilation in all. Raises UserError if the run was never evaluated.
    """
    evaluations = [row for row in rows if key in row and "time/train_sec" in row]
    if not evaluations:
        raise UserError(f"no {key} in the run's metrics; expected an eval_interval of at most max_steps")
    reached = next((row for row in evaluations if row[key] <= target), None)
    last = evaluations[-1]
    shown = reached or last
    return {"minutes": reached and reached["time/train_sec"] / 60, "step": shown["step"], "rate": shown[key],
            "target": target, "train_minutes": last["time/train_sec"] / 60,
            "eval_minutes": sum(row["time/eval_sec"] for row in evaluations) / 60,
            "compile_minutes": sum(row.get("time/compile_sec", 0.0) for row in rows) / 60}


def row(track: str, name: str, idea: str, runs: list[dict], date: str) -> str:
    """The record's line in the table; a median over seeds of which one never came there is none."""
    minutes = [run["minutes"] for run in runs]
    score = "not reached" if None in minutes else f"**{statistics.median(minutes):.2f}**"
    each = ", ".join(f"{run['train_minutes'] if run['minutes'] is None else run['minutes']:.2f} ({run['rate']:.1%} at "
                     f"{run['step']})" for run in runs)
    return f"| {track} | {score} | {each} | {idea} | {date} | [log]({name}/) |"


def add_row(page: str, line: str) -> str:
    """The page with one more line at the end of its table of records."""
    lines = page.splitlines()
    last = max(n for n, old in enumerate(lines) if old.startswith(("| track | minutes |", *(f"| {t} | " for t in TRACKS))))
    last += lines[last + 1].startswith("|---") if last + 1 < len(lines) else 0  # an empty table's rule
    return "\n".join([*lines[:last + 1], line, *lines[last + 1:]]) + "\n"


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)  # --seed is train.py's
    p.add_argument("track", choices=list(TRACKS))
    p.add_argument("--name", required=True, help="of the record's folder")
    p.add_argument("--idea", required=True, help="one sentence")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--recordings", default="data/ljspeech/LJSpeech-1.1/wavs", help="ljspeech-gpu: a folder of <utt_id>.wav")
    args, flags = p.parse_known_args(argv)
    track, folder = TRACKS[args.track], HERE / args.name
    if folder.exists():
        raise UserError(f"{folder} exists already; give the record another --name")
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: expected 1 or more")
    flags = ["--config", track.config, *track.flags, *flags]
    cfg = load_config(flags)
    prepare(cfg, flags)
    ranks, launch = cfg.gpus or cfg.nproc, ["train.py"]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--", "train.py"]
    runs = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.seeds):
        out = HERE.parent / ".artifacts" / "records" / f"{args.name}_{seed}"
        seeded = [*flags, "--seed", str(seed)]
        goal = target(track, seeded, args.recordings, out.with_name(f"{out.name}_recordings"))
        call(*launch, *seeded, "--run_name", f"{args.name}_{seed}", "--out_dir", str(out), "--no_wandb")
        runs.append(time_to_target(read_metrics(out / "metrics.jsonl"), track.key, goal) | {"seed": seed, "out": out})
    folder.mkdir()
    shutil.copy(runs[0]["out"] / "config.yaml", folder)
    for run in runs:
        shutil.copy(run["out"] / "metrics.jsonl", folder / f"metrics_{run['seed']}.jsonl")
        shutil.copy(run.pop("out") / "runs.jsonl", folder / f"runs_{run['seed']}.jsonl")
    line = row(args.track, args.name, args.idea, runs, datetime.date.today().isoformat())
    command, found = shlex.join(["python", *sys.argv]), json.dumps(runs, indent=1)
    (folder / "README.md").write_text(f"# {args.name}\n\n{args.idea}\n\n```bash\n{command}\n```\n\n"
                                      f"```json\n{found}\n```\n")
    page = HERE / "README.md"
    page.write_text(add_row(page.read_text(encoding="utf-8"), line), encoding="utf-8")
    print(line)


if __name__ == "__main__":
    run_cli(main)
