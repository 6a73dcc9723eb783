"""Kill training and corpus preparation with SIGKILL at random moments, again and again. The outcome must not change.

    python tests/soak.py --kills 40                      # 40 kills of each, about ten minutes
    python tests/soak.py --kills 40 --what train --seed 7

After each kill the files on disk are checked. At the end one start is left alone, and its result must equal that of an
undisturbed run, bit for bit. The first violation ends the soak with status 1 and keeps its folder. tests/test_soak.py uses
--quick: programs are forks of this process, which has imported everything already.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", WANDB_SILENT="true", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parents[1]
# Log and validation intervals do not divide the checkpoint interval, so that kills hit runs between two lines of metrics
TRAIN = ("--config configs/grammar.yaml --heads 2 --layers 2 --text_encoder_width 32 --text_encoder_heads 2 "
         "--text_encoder_layers 1 --effective_batch_size 8 --batch_size 8 --log_interval 3 --val_interval 6 "
         "--val_num_samples 4 --checkpoint_interval 4 --keep_checkpoints 2 --eval_interval 0 --warmup_steps 2 --no_wandb "
         "--resume latest").split()
RUN_FILES = r"config\.yaml|metrics\.jsonl|runs\.jsonl|lock|latest\.pt|ckpt_step_\d{8}\.pt"
LINES = {"train/loss", "val/flow_loss"}  # each kind of line of metrics.jsonl has one of these
FINISH = "the finish"  # the end of a preparation. It deletes the shards' rows, so a kill here can cost finished shards.
ANYTIME = "any time"
PATIENCE = 600  # seconds for what takes at most a minute, because the machine may be busy


class Violation(AssertionError):
    """A kill had an effect that it must not have."""


def check(holds, message: str) -> None:
    if not holds:
        raise Violation(message)


# --- programs that can be killed

class Program(multiprocessing.get_context("fork").Process):
    """A script of the repo in its own process and process group. Its output comes through a pipe."""
    started = []

    def __init__(self, words: list[str], quick: bool):
        super().__init__()
        self.words, self.quick, self.output, self.deadline = words, quick, b"", time.monotonic() + PATIENCE
        self.pipe, self.childs_pipe = os.pipe()
        self.start()
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child does this too
            os.setpgid(self.pid, self.pid)
        os.close(self.childs_pipe)
        os.set_blocking(self.pipe, False)
        Program.started.append(self)

    def run(self) -> None:
        """In the child: become the script, or with `quick` run it."""
        os.setpgrp()
        os.chdir(ROOT)
        os.dup2(self.childs_pipe, 1)
        os.dup2(self.childs_pipe, 2)
        if not self.quick:
            os.execv(sys.executable, [sys.executable, *self.words])

        def slowly(rename, *names, **options):  # temporary names stay a little longer, so few kills are sure to hit a write
            time.sleep(0.05)
            return rename(*names, **options)
        os.rename, os.replace = functools.partial(slowly, os.rename), functools.partial(slowly, os.replace)
        sys.argv = self.words
        runpy.run_path(self.words[0], run_name="__main__")

    def has_processes(self) -> bool:
        """Read the output. False if no process is left that could write more."""
        while True:
            try:
                part = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return True
            if not part:
                return False
            self.output += part

    def is_running(self) -> bool:
        """Raises Violation if the program has failed, or takes too long."""
        self.has_processes()
        alive = self.is_alive()
        check(not self.exitcode, f"{self.words} ended with status {self.exitcode}:\n{self.output.decode(errors='replace')}")
        check(not alive or time.monotonic() < self.deadline, f"{self.words} takes more than {PATIENCE} s")
        return alive

    def finish(self) -> float:
        """Wait until it has ended; returns the seconds."""
        start = time.monotonic()
        while self.is_running():
            time.sleep(0.01)
        return time.monotonic() - start

    def freeze(self) -> None:
        """Stop it until SIGCONT. Returns when it has stopped or ended."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def kill_it(self, alone: bool) -> bool:
        """Kill it, with its process group unless `alone`. False if it had finished before."""
        if not self.is_running():
            return False
        (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        self.join()
        return self.exitcode == -signal.SIGKILL

    @classmethod
    def check_all_ended(cls) -> None:
        """Children must end by themselves if only their parent was killed. Raises Violation."""
        deadline = time.monotonic() + PATIENCE
        while alive := [program.words for program in cls.started if program.has_processes()]:
            check(time.monotonic() < deadline, f"children of {alive} still run {PATIENCE} s after they were killed")
            time.sleep(0.05)

    @classmethod
    def end_all(cls) -> None:
        for program in filter(cls.has_processes, cls.started):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(program.pid, signal.SIGKILL)


# --- kills

@dataclasses.dataclass
class Job:
    """A command to kill, its folder, and the paths that exist only while it writes something: what -> pattern."""
    command: list[str]
    root: Path
    writing: dict[str, str]
    seconds: float = 0.0  # a kill at "any time" comes within so many seconds


def writes(job: Job, name: str) -> dict[Path, tuple]:
    """The paths that match job.writing[name], each with a mark that differs from that of an older path of this name."""
    found = {}
    with contextlib.suppress(FileNotFoundError):  # deleted between the two looks
        for path in job.root.glob(job.writing[name]):
            found[path] = path.stat().st_ino, path.stat().st_mtime_ns
    return found


def interrupt(job: Job, aim: str, nth: int, alone: bool, share: float, quick: bool) -> str | None:
    """Start the job and kill it. Returns what the kill hit, or None if the job had finished before.

    `aim` is ANYTIME (at this `share` of job.seconds) or a key of job.writing: then the kill hits the `nth` such write, or a
    later one if that was over too soon.
    """
    before = {name: writes(job, name) for name in job.writing}
    program, moment, seen, misses, was_there = Program(job.command, quick), time.monotonic() + share * job.seconds, 0, 0, False

    def new(name):
        return [path for path, mark in writes(job, name).items() if before[name].get(path) != mark]
    while program.is_running() and (aim != ANYTIME or time.monotonic() < moment):
        there = aim != ANYTIME and bool(new(aim))
        seen, was_there = seen + (there and not was_there), there
        if there and seen >= nth:
            time.sleep(share * 0.02 / 2**misses)
            program.freeze()  # or it could finish the write before the kill
            if new(aim):
                break
            misses += 1
            os.kill(program.pid, signal.SIGCONT)
        time.sleep(0.0003)
    if not program.kill_it(alone):
        return None
    return next((f"{name}, while it wrote {path.relative_to(job.root)}" for name in job.writing for path in new(name)), "other work")


def soak(name: str, job: Job, kills: int, rng: random.Random, quick: bool, state, finished, clear) -> Counter:
    """Kill the job `kills` times and then let it finish. Returns how often each part of it was hit.

    `state()` checks what a kill left and returns the progress, or None if the job is done. `finished()` checks the result.
    Both raise Violation. `clear()` deletes the result, because a job that finishes before its last kill starts again.
    """
    write, hits, misses, reached = next(iter(job.writing)), Counter(), 0, 0
    while sum(hits.values()) < kills:
        number = sum(hits.values()) + 1
        aim = write if number == 1 else rng.choice([ANYTIME, ANYTIME, write, *job.writing])
        nth = 1 if aim == FINISH else rng.randint(2 if number == 1 else 1, 3)
        where, progress = interrupt(job, aim, nth, rng.random() < 0.5, rng.random() / 2**misses, quick), None
        if where:
            hits[where.split(",")[0]] += 1
            misses = 0
            try:
                progress = state()
                check(progress is None or progress >= reached or where.startswith(FINISH), f"progress fell from {reached} to {progress}")
            except Violation as e:
                raise Violation(f"after kill {number} ({where}): {e}") from None
            print(f"{name}: kill {number}/{kills} hit {where}; {'all' if progress is None else progress} done", flush=True)
        else:
            print(f"{name}: finished before kill {number} of {kills}", flush=True)
            misses += 1
            check(misses < 10, f"{name} finished {misses} times before {aim} could be hit; is its pattern in {job.writing}?")
        if progress is None:
            finished()
            clear()
        reached = progress or 0
    Program(job.command, quick).finish()
    finished()
    return hits


# --- training

def read_lines(run: Path) -> dict[tuple, dict]:
    """(step, kind of line) -> the line's figures that depend on no clock. Raises Violation if a line is there twice, or broken."""
    found, path = {}, run / "metrics.jsonl"
    for text in path.read_text().split("\n")[:-1] if path.exists() else ():  # a kill may have cut the last line
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            raise Violation(f"metrics.jsonl has the broken line {text!r}") from None
        for kind in LINES & row.keys():
            check((row["step"], kind) not in found, f"metrics.jsonl has {kind} of step {row['step']} twice")
            found[row["step"], kind] = {k: v for k, v in row.items() if not k.startswith(("time", "perf/"))}
    return found


def read_run(run: Path, may_be_writing: bool = True) -> int:
    """Check the folder of a run; returns the step of its latest.pt, 0 if there is none. Raises Violation."""
    from checkpoint import read_checkpoint
    from common import UserError
    names = sorted(os.listdir(run)) if run.exists() else []
    temporary, numbered = [n for n in names if n.endswith(".tmp")], [n for n in names if re.fullmatch(r"ckpt_step_\d+\.pt", n)]
    check(len(temporary) <= may_be_writing, f"temporary files are left: {names}")
    unknown = [n for n in names if not re.fullmatch(RUN_FILES, n) and n not in temporary]
    check(not unknown, f"unknown files are in the run's folder: {unknown}")
    check(len(numbered) <= 2 + may_be_writing, f"more checkpoints than keep_checkpoints are left: {names}")
    steps = {}
    for name in [*numbered, "latest.pt"] if "latest.pt" in names else numbered:
        try:
            steps[name] = read_checkpoint(str(run / name))["step"]
        except UserError as e:
            raise Violation(str(e)) from None
        check(name in ("latest.pt", f"ckpt_step_{steps[name]:08d}.pt"), f"{name} is of step {steps[name]}")
    read_lines(run)
    return steps.get("latest.pt", 0)


def soak_training(folder: Path, kills: int, rng: random.Random, quick: bool) -> str:
    """Kill a training run; returns a summary. Raises Violation."""
    from torch.testing import assert_close

    from checkpoint import read_checkpoint
    corpus, undisturbed, run = folder / "corpus", folder / "undisturbed", folder / "run"
    steps, width = (12, 32) if quick else (5 * kills, 128)
    Program(["data/demo/prepare.py", "--out", str(corpus), "--train", "16", "--held-out", "8", "--workers", "1"], quick).finish()

    def job_in(run):
        return Job(["train.py", *TRAIN, "--width", str(width), "--max_steps", str(steps), "--data_dir", str(corpus),
                    "--out_dir", str(run)], run, {"a checkpoint's write": "ckpt_step_*.tmp", "its second name": "latest.pt.tmp"})
    job, seconds = job_in(run), Program(job_in(undisturbed).command, quick).finish()
    job.seconds = seconds / 2
    wanted, lines = read_checkpoint(str(undisturbed / "latest.pt")), read_lines(undisturbed)
    check({(s, "train/loss") for s in range(3, steps + 1, 3)} <= lines.keys(), f"the undisturbed run logged {sorted(lines)}")

    def finished():
        check(read_run(run, may_be_writing=False) == steps, f"the run did not reach step {steps}")
        ckpt, found = read_checkpoint(str(run / "latest.pt")), read_lines(run)
        for part in ("model", "ema", "optimizers", "step"):
            assert_close(ckpt[part], wanted[part], rtol=0, atol=0, msg=f"{part} of latest.pt differs from the undisturbed run's")
        different = sorted(k for k in found.keys() | lines.keys() if found.get(k) != lines.get(k))
        check(not different, f"metrics.jsonl differs from the undisturbed run's at {different[:6]}")

    hits = soak("training", job, kills, rng, quick, lambda: read_run(run), finished, lambda: shutil.rmtree(run))
    return (f"{kills} kills of a run of {steps} steps ({dict(hits)}): every checkpoint loaded after each, nothing piled up; "
            f"parameters, averages, optimiser state and {len(lines)} lines of metrics equal the undisturbed run's, bit for bit")


# --- corpus preparation

def prepare_in_small_shards(argv: list[str]) -> None:
    """data/demo/prepare.py with fewer utterances in a shard."""
    from demo import prepare
    prepare.write_corpus = functools.partial(prepare.write_corpus, shard_utts=int(argv[0]))
    prepare.main(argv[1:])


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def soak_preparation(folder: Path, kills: int, rng: random.Random, quick: bool) -> str:
    """Kill a corpus preparation; returns a summary. Raises Violation."""
    shards, shard_utts = (3, 6) if quick else (16, 16)
    undisturbed, out = folder / "undisturbed_corpus", folder / "killed" / "corpus"
    partial = out.with_name("corpus.partial")

    def job_in(out, workers):
        return Job(["tests/soak.py", "prepare", str(shard_utts), "--out", str(out), "--train", str(shards * shard_utts - 8),
                    "--held-out", "8", "--workers", str(workers)], partial, {"a shard's write": "mel_shards/*.tmp", FINISH: "metadata"})
    # the number of processes must not matter either
    job, seconds = job_in(out, 1 if quick else 2), Program(job_in(undisturbed, 1).command, quick).finish()
    job.seconds = seconds / 2
    wanted = read_files(undisturbed)
    check(len([n for n in wanted if n.endswith("memmap")]) == shards, f"the undisturbed preparation wrote {sorted(wanted)}")

    def state():
        if out.exists():
            return None
        if not (partial / "job").exists():  # killed at the very beginning or the very end: everything is made again
            return 0
        done = list((partial / "mel_shards").glob("shard_[0-9][0-9][0-9]"))
        unknown = {p.name for p in partial.iterdir()} - {"lock", "job", "mel_shards", "metadata"}
        temporary = {p.name for p in (partial / "mel_shards").glob("*")} - {p.name for p in done}
        check(not unknown and len(temporary) <= 1, f"{partial} holds {unknown | temporary}")
        return sum((shard / "rows.json").exists() for shard in done)

    def finished():
        check(os.listdir(out.parent) == ["corpus"], f"besides the corpus {os.listdir(out.parent)} are left")
        found = read_files(out)
        different = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        check(not different, f"the corpus differs from the undisturbed one in {different[:6]}")

    hits = soak("preparation", job, kills, rng, quick, state, finished, lambda: shutil.rmtree(out))
    return (f"{kills} kills of a preparation of {shards} shards ({dict(hits)}): the corpus is byte-identical to an "
            f"undisturbed one, in all {len(wanted)} files, and nothing else is left")


def main(argv: list[str]) -> None:
    if argv[:1] == ["prepare"]:
        return prepare_in_small_shards(argv[1:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=40, help="of each")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--what", choices=["train", "prepare", "both"], default="both")
    p.add_argument("--quick", action="store_true", help="start forks of this process, with smaller sizes")
    args = p.parse_args(argv)
    if args.kills < 1:
        p.error("--kills must be at least 1")
    if args.quick:  # imported once for all forks
        from transformers import T5EncoderModel  # noqa: F401

        import train  # noqa: F401
    folder, rng, summary = Path(tempfile.mkdtemp(prefix="soak_")), random.Random(args.seed), []
    try:
        for what, job in (("train", soak_training), ("prepare", soak_preparation)):
            if args.what in (what, "both"):
                start = time.monotonic()
                summary.append(f"{job(folder, args.kills, rng, args.quick)} ({time.monotonic() - start:.0f} s)")
        Program.check_all_ended()
    except AssertionError as e:
        print(f"violation: {e}\n(seed {args.seed}; see {folder})", file=sys.stderr)
        sys.exit(1)
    finally:
        Program.end_all()
    shutil.rmtree(folder)
    print("\n".join(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
