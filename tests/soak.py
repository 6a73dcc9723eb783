"""Kill training and corpus preparation with SIGKILL at random moments, again and again: the outcome must not change.

    python tests/soak.py --kills 40                      # both; some ten minutes
    python tests/soak.py --kills 40 --what train --seed 7

After every kill what lies on disk is checked; in the end one start is left alone and must come to what an undisturbed
run came to, bit for bit. The first violation ends it with status 1, and leaves its folder there to be looked at.
tests/test_soak.py runs a short form of it with --quick: forks of this process, which has imported everything already,
instead of new ones.
"""
import argparse
import contextlib
import dataclasses
import functools
import json
import math
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
sys.path.insert(0, str(ROOT))

# Wide enough for a checkpoint of some megabytes, which takes long enough to be hit. Log and validation intervals that do
# not divide the checkpoint interval: what is between two lines of metrics.jsonl must survive a kill too.
TRAIN = ("--config configs/demo.yaml --heads 2 --layers 2 --text_encoder_width 32 --text_encoder_heads 2 "
         "--text_encoder_layers 1 --effective_batch_size 8 --batch_size 8 --log_interval 3 --val_interval 6 "
         "--val_num_samples 4 --checkpoint_interval 4 --keep_checkpoints 2 --eval_interval 0 --warmup_steps 2 --no_wandb "
         "--loader_workers 1 --resume latest").split()
RUN_FILES = r"config\.yaml|metrics\.jsonl|runs\.jsonl|lock|latest\.pt|ckpt_step_\d{8}\.pt"
LINES = {"train/loss", "val/flow_loss"}  # each kind of line of metrics.jsonl has one of these
FINISH = "the finish"  # of a preparation; the shards' rows go away there, so that a kill sends it back
PATIENCE = 600  # seconds for what takes a few, or a minute, on a machine that has other things to do


class Violation(Exception):
    """Something did not survive a kill."""


def check(holds, message: str) -> None:
    if not holds:
        raise Violation(message)


# --- programs that can be killed

def slow_renames() -> None:
    """From now on what is written keeps its temporary name for longer, so that even few kills are sure to hit it."""
    def slowly(rename, *names, **options):
        time.sleep(0.05)
        return rename(*names, **options)
    os.rename, os.replace = functools.partial(slowly, os.rename), functools.partial(slowly, os.replace)


class Program:
    """A script of the repo, in a process (and a process group) of its own; its output comes here through a pipe."""
    started = []

    def __init__(self, words: list[str], quick: bool):
        self.words, self.status, self.output, self.deadline = words, None, b"", time.monotonic() + PATIENCE
        self.pipe, theirs = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                os.setpgrp()
                os.chdir(ROOT)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(theirs, 1)
                os.dup2(theirs, 2)
                if not quick:
                    os.execv(sys.executable, [sys.executable, *words])
                slow_renames()
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
                status = 0
            except SystemExit as e:
                status = e.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            sys.stdout.flush()
            os._exit(status)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # it has done so itself
            os.setpgid(self.pid, self.pid)
        os.close(theirs)
        os.set_blocking(self.pipe, False)
        Program.started.append(self)

    def listen(self) -> bool:
        """Take in what it has said; False once no process is left that could say more."""
        while True:
            try:
                said = os.read(self.pipe, 1 << 16)
            except BlockingIOError:
                return True
            if not said:
                return False
            self.output += said

    def running(self) -> bool:
        """Whether it still runs. Raises Violation if it has failed, or takes too long."""
        self.listen()
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        said = self.output.decode(errors="replace")
        check(not self.status, f"{self.words} ended with {self.status} by itself:\n{said}")
        check(self.status == 0 or time.monotonic() < self.deadline, f"{self.words} takes more than {PATIENCE} s:\n{said}")
        return self.status is None

    def finish(self) -> None:
        while self.running():
            time.sleep(0.01)

    def freeze(self) -> None:
        """Stop it, so that it can be looked at; returns when it has stopped, or ended."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def kill(self, alone: bool) -> bool:
        """Kill it, with its group unless `alone`; False if it had finished before."""
        if not self.running():
            return False
        (os.kill if alone else os.killpg)(self.pid, signal.SIGKILL)
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status == -signal.SIGKILL

    def check_gone(self) -> None:
        """Its children must end by themselves when it was killed alone. Raises Violation."""
        deadline = time.monotonic() + PATIENCE
        while self.listen():
            check(time.monotonic() < deadline, f"processes that {self.words} started still run {PATIENCE} s after it")
            time.sleep(0.05)

    @classmethod
    def end_all(cls) -> None:
        for program in filter(cls.listen, cls.started):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(program.pid, signal.SIGKILL)


# --- one kill

@dataclasses.dataclass
class Job:
    """What can be killed: a command, what changes on disk when it gets to work, and what is there only while it writes."""
    command: list[str]
    root: Path  # the folder it works in; the rest lies in there
    watched: str
    writing: dict[str, str]  # name of an aim -> pattern of the paths that are there meanwhile
    startup: float = 0.0  # seconds until `watched` changes, in the undisturbed run
    span: float = 0.0  # seconds of work in which to kill it


def marks(root: Path, *patterns: str) -> dict[Path, tuple]:
    """What tells the files and folders that are there from others of the same name."""
    found = {}
    for pattern in patterns:
        with contextlib.suppress(FileNotFoundError):  # gone while it was looked at
            for path in root.glob(pattern):
                found[path] = path.stat().st_ino, path.stat().st_mtime_ns
    return found


def interrupt(job: Job, aim: str, nth: int, alone: bool, share: float, quick: bool) -> str | None:
    """Start the job and kill it; returns where that hit it, or None if it had finished before.

    `aim` is "start-up" (when this `share` of its usual time is over), "work" (likewise), or a key of job.writing: then it is
    killed in the midst of such a write, the `nth` or, if that was over too soon, a later one.
    """
    def fresh(name):
        return [path for path, mark in marks(job.root, job.writing[name]).items() if before.get(path) != mark]

    before, watched = marks(job.root, *job.writing.values()), marks(job.root, job.watched)
    program, start = Program(job.command, quick), time.monotonic()
    if aim not in job.writing:
        while aim == "work" and marks(job.root, job.watched) == watched and program.running():
            time.sleep(0.001)
        moment = start + share * job.startup if aim == "start-up" else time.monotonic() + share * job.span
        while time.monotonic() < moment and program.running():
            time.sleep(min(0.005, max(0.0, moment - time.monotonic())))
    seen, misses, was_there = 0, 0, False
    while aim in job.writing and program.running():
        there = bool(fresh(aim))
        seen, was_there = seen + (there and not was_there), there
        if there and seen >= nth:
            time.sleep(share * 0.02 / 2**misses)
            program.freeze()  # it could finish the write between this look and the kill
            if fresh(aim):
                break
            misses += 1
            os.kill(program.pid, signal.SIGCONT)
        time.sleep(0.0003)
    if not program.kill(alone):
        return None
    hit = next((f"{name}, in the midst of {path.relative_to(job.root)} ({size(path)})" for name in job.writing
                for path in fresh(name)), None)
    return hit or ("start-up" if marks(job.root, job.watched) == watched else "other work")


def size(path: Path) -> str:
    return f"{sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir())) / 1e6:.1f} MB so far"


def soak(name: str, job: Job, kills: int, rng: random.Random, quick: bool, state, finished, clear) -> Counter:
    """Kill the job `kills` times and let it finish; returns how often each part of it was hit.

    `state()` checks what a kill left and says how far it has come, or None if all was done; `finished()` checks the outcome,
    `clear()` removes it; all raise Violation. A job that finishes before its last kill is checked and begun anew.
    """
    write = next(iter(job.writing))
    aims = [write] + [rng.choice(["start-up", "work", "work", write, *job.writing]) for _ in range(kills - 1)]
    hits, missed, reached, furthest = Counter(), 0, 0, 0
    while sum(hits.values()) < kills:
        number = sum(hits.values()) + 1
        aim, alone = aims[number - 1], rng.random() < 0.5
        nth = 1 if aim == FINISH else rng.randint(2 if number == 1 else 1, 3)
        where, now = interrupt(job, aim, nth, alone, rng.random() / 2**missed, quick), None
        if where:
            hits[where.split(",")[0]] += 1
            missed = 0
            try:
                now = state()
                check(now is None or now >= reached or where.startswith(FINISH), f"it had come to {reached}, is back at {now}")
            except Violation as e:
                raise Violation(f"after kill {number} ({where}): {e}") from None
            print(f"{name}: kill {number}/{kills}{' (not its children)' if alone else ''} hit {where}; "
                  f"{'all' if now is None else now} done", flush=True)
        else:
            print(f"{name}: finished before kill {number} of {kills}", flush=True)
            missed += 1
            check(missed < 10, f"{name} finished {missed} times before {aim} could be hit; is that still {job.writing}?")
        if now is None:
            finished()
            clear()
            furthest = math.inf
        reached = now or 0
        furthest = max(furthest, reached)
    check(furthest, f"{kills} kills, and nothing was ever done")
    Program(job.command, quick).finish()
    finished()
    return hits


# --- training

def equal(a, b) -> bool:
    """Whether nested dicts, lists and tensors are the same, bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    if hasattr(a, "dtype"):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return type(a) is type(b) and a == b


def read_lines(run: Path) -> dict[tuple, dict]:
    """(step, kind of line) -> the line's numbers that depend on no clock. Raises Violation for one twice, or cut in two."""
    found = {}
    *whole, last = (run / "metrics.jsonl").read_text().split("\n") if (run / "metrics.jsonl").exists() else [""]
    for text in whole:  # `last` is empty, or what a kill cut off
        try:
            row = json.loads(text)
        except json.JSONDecodeError:
            raise Violation(f"metrics.jsonl holds the line {text!r}") from None
        for kind in LINES & row.keys():
            check((row["step"], kind) not in found, f"metrics.jsonl has {kind} of step {row['step']} twice")
            found[row["step"], kind] = {k: v for k, v in row.items() if not k.startswith(("time", "perf/"))}
    return found


def read_run(run: Path, may_be_writing: bool = True) -> int:
    """Check the folder of a run; the step of its latest.pt, 0 if there is none. Raises Violation."""
    from checkpoint import read_checkpoint
    from config import UserError
    names = sorted(os.listdir(run)) if run.exists() else []
    temporary = [n for n in names if n.endswith(".tmp")]
    check(len(temporary) <= may_be_writing, f"temporary files are left over: {names}")
    strange = [n for n in names if not re.fullmatch(RUN_FILES, n) and n not in temporary]
    check(not strange, f"{strange} lie in the run's folder")
    numbered = [n for n in names if n.startswith("ckpt_step_")]
    check(len(numbered) <= 2 + may_be_writing, f"more checkpoints are left than keep_checkpoints says: {names}")
    steps = {}
    for name in [*numbered, "latest.pt"]:
        if name in names:
            try:
                steps[name] = read_checkpoint(str(run / name))["step"]
            except UserError as e:
                raise Violation(str(e)) from None
            check(name == "latest.pt" or name == f"ckpt_step_{steps[name]:08d}.pt", f"{name} is of step {steps[name]}")
    read_lines(run)
    return steps.get("latest.pt", 0)


def soak_training(folder: Path, kills: int, rng: random.Random, quick: bool) -> str:
    """Kill a training run; returns what there is to say about it. Raises Violation."""
    from checkpoint import read_checkpoint
    corpus, steps, width = folder / "corpus", 16 if quick else 5 * kills, 32 if quick else 128
    Program(["data/demo/prepare.py", "--out", str(corpus), "--train", "16", "--held-out", "8", "--workers", "1"], quick).finish()

    def job_in(run):
        return Job(["train.py", *TRAIN, "--width", str(width), "--max_steps", str(steps), "--data_dir", str(corpus),
                    "--out_dir", str(run)], run, "metrics.jsonl", {"a checkpoint write": "ckpt.tmp"})

    undisturbed, run = folder / "undisturbed", folder / "run"
    job, (startup, work) = job_in(run), undisturbed_times(job_in(undisturbed), quick)
    job.startup, job.span = startup, 12 * work / steps  # three checkpoints' worth
    wanted, lines = read_checkpoint(str(undisturbed / "latest.pt")), read_lines(undisturbed)
    check({(s, "train/loss") for s in range(3, steps + 1, 3)} <= lines.keys(), f"the undisturbed run logged {sorted(lines)}")

    def finished():
        check(read_run(run, may_be_writing=False) == steps, f"it did not come to step {steps}")
        got = read_checkpoint(str(run / "latest.pt"))
        different = [k for k in ("model", "ema", "optimizers", "step") if not equal(got[k], wanted[k])]
        check(not different, f"{', '.join(different)} of latest.pt differ from the undisturbed run's")
        found = read_lines(run)
        different = sorted(k for k in found.keys() | lines.keys() if found.get(k) != lines.get(k))
        check(not different, f"metrics.jsonl differs from the undisturbed run's at {different[:6]}")

    hits = soak("training", job, kills, rng, quick, lambda: read_run(run), finished, lambda: shutil.rmtree(run))
    return (f"{kills} kills of a run of {steps} steps ({counted(hits)}): every checkpoint loaded after each, nothing piled up; "
            f"parameters, averages, optimiser state and {len(lines)} lines of metrics equal the undisturbed run's, bit for bit")


def undisturbed_times(job: Job, quick: bool) -> tuple[float, float]:
    """Let the job run; its seconds of start-up and of work."""
    program, start = Program(job.command, quick), time.monotonic()
    while program.running() and not (job.root / job.watched).exists():
        time.sleep(0.001)
    at_work = time.monotonic()
    program.finish()
    return at_work - start, time.monotonic() - at_work


def counted(hits: Counter) -> str:
    return ", ".join(f"{count} in {where}" for where, count in hits.most_common())


# --- corpus preparation

def prepare_in_small_shards(argv: list[str]) -> None:
    """data/demo/prepare.py, except that a shard has fewer utterances."""
    sys.path.insert(0, str(ROOT / "data" / "demo"))  # as a module: worker processes must find what it reads with
    import prepare
    prepare.write_corpus = functools.partial(prepare.write_corpus, shard_utts=int(argv[0]))
    prepare.main(argv[1:])


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def soak_preparation(folder: Path, kills: int, rng: random.Random, quick: bool) -> str:
    """Kill a corpus preparation; returns what there is to say about it. Raises Violation."""
    shards, shard_utts = (3, 6) if quick else (16, 16)
    undisturbed, out = folder / "undisturbed_corpus", folder / "killed" / "corpus"
    partial = out.with_name("corpus.partial")

    def job_in(out, workers):
        return Job(["tests/soak.py", "prepare", str(shard_utts), "--out", str(out), "--train", str(shards * shard_utts - 8),
                    "--held-out", "8", "--workers", str(workers)], out.with_name(out.name + ".partial"), "mel_shards",
                   {"a shard's write": "mel_shards/*.tmp", FINISH: "metadata"})

    # The undisturbed one has one process, the others as many as there are cores: that must not matter either
    job, (startup, work) = job_in(out, 1 if quick else 2), undisturbed_times(job_in(undisturbed, 1), quick)
    job.startup, job.span = startup, 3 * work / shards
    wanted = read_files(undisturbed)
    check(len([n for n in wanted if n.endswith("memmap")]) == shards, f"the undisturbed one wrote {sorted(wanted)}")

    def state():
        if out.exists():  # whole, as `finished` will see, and killed before it could say so
            return None
        if not (partial / "job").exists():  # killed at the very beginning, or at the very end: all is made anew
            return 0
        done = list((partial / "mel_shards").glob("shard_[0-9][0-9][0-9]"))
        names = {p.name for p in partial.iterdir()} - {"lock", "job", "mel_shards", "metadata"}
        temporary = {p.name for p in (partial / "mel_shards").glob("*")} - {p.name for p in done}
        check(not names and len(temporary) <= 1, f"{partial} holds {names | temporary}")
        return sum((shard / "rows.json").exists() for shard in done)

    def finished():
        check(os.listdir(out.parent) == ["corpus"], f"besides the corpus {os.listdir(out.parent)} are left")
        got = read_files(out)
        different = sorted(n for n in got.keys() | wanted.keys() if got.get(n) != wanted.get(n))
        check(not different, f"the corpus differs from the undisturbed one in {different[:6]}")

    hits = soak("preparation", job, kills, rng, quick, state, finished, lambda: shutil.rmtree(out))
    return (f"{kills} kills of a preparation of {shards} shards ({counted(hits)}): the corpus is byte-identical to an "
            f"undisturbed one, in all {len(wanted)} files, and nothing else is left")


def main(argv: list[str]) -> None:
    if argv[:1] == ["prepare"]:
        return prepare_in_small_shards(argv[1:])
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=40, help="of each")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--what", choices=["train", "prepare", "both"], default="both")
    p.add_argument("--quick", action="store_true", help="start forks of this process; less of everything")
    args = p.parse_args(argv)
    if args.kills < 1:
        p.error("--kills must be at least 1")
    if args.quick:  # what a start imports, once for all
        from transformers import T5EncoderModel  # noqa: F401

        import train  # noqa: F401
    folder, rng, summary = Path(tempfile.mkdtemp(prefix="soak_")), random.Random(args.seed), []
    try:
        for what, job in (("train", soak_training), ("prepare", soak_preparation)):
            if args.what in (what, "both"):
                start = time.monotonic()
                summary.append(f"{job(folder, args.kills, rng, args.quick)} ({time.monotonic() - start:.0f} s)")
        for program in Program.started:
            program.check_gone()
    except Violation as e:
        print(f"violation: {e}\n(seed {args.seed}; see {folder})", file=sys.stderr)
        sys.exit(1)
    finally:
        Program.end_all()
    shutil.rmtree(folder)
    print("\n".join(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
