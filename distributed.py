"""Ranks: starting them, agreeing over them, stopping them, and the lock that reserves a folder for one run."""
import datetime
import errno
import fcntl
import os
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from common import UserError, make_folder, remove
from config import Config


class Ranks(NamedTuple):
    """This process's rank, the number of ranks, and this rank's device."""
    rank: int
    world: int
    device: torch.device


def start_ranks(cfg: Config) -> Ranks:
    """Join the process group that torchrun set up, if there is one. Raises UserError."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if cfg.gpus and local >= torch.cuda.device_count():
        raise UserError(f"gpus = {cfg.gpus} but this machine has {torch.cuda.device_count()} CUDA GPUs; use --gpus 0 for "
                        "the CPU, or configs/demo.yaml, which needs none")
    if cfg.batch_size < world:
        raise UserError(f"batch_size = {cfg.batch_size} is less than one utterance for each of {world} ranks")
    device = torch.device("cuda", local) if cfg.gpus else torch.device("cpu")
    if cfg.gpus:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:  # the timeout is what rank 0 may need alone to train the ctc judge, which takes a GPU minutes
        timeout = datetime.timedelta(minutes=30) if cfg.gpus else datetime.timedelta(hours=4)
        dist.init_process_group("nccl" if cfg.gpus else "gloo", timeout=timeout)
    return Ranks(rank, world, device)


def end_ranks(ranks: Ranks) -> None:
    """Leave the process group. With several ranks this also ends the process."""
    if ranks.world > 1:
        dist.destroy_process_group()
        # Gloo's threads survive this (torch 2.13). One that frees a tensor while Python shuts down can abort the process
        # ("terminate called without an active exception", one in hundreds of runs). So skip Python's shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def reduce_over_ranks(op, value: float, ranks: Ranks) -> float:
    """The sum, maximum or minimum (`op`, of dist.ReduceOp) of a number over all ranks."""
    if ranks.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=ranks.device)
    dist.all_reduce(tensor, op)
    return tensor.item()


def any_rank(condition, ranks: Ranks) -> bool:
    """Whether `condition` holds on at least one rank."""
    return bool(reduce_over_ranks(dist.ReduceOp.MAX, float(bool(condition)), ranks))


@contextmanager
def on_all_ranks(ranks: Ranks):
    """If any rank raises an error in this block, raise one on all ranks. Otherwise the others would hang in a collective."""
    error = None
    try:
        yield
    except Exception as e:
        error = e
    if any_rank(error, ranks):
        raise error or UserError("another rank failed; its message says why")


def check_same_step(step: int, ranks: Ranks) -> None:
    """Raise UserError on all ranks if they start from different steps."""
    if any_rank(reduce_over_ranks(dist.ReduceOp.MAX, step, ranks) != step, ranks):
        raise UserError(f"the ranks see different checkpoints (this one is at step {step}); out_dir must lie on a file "
                        "system that all machines share")


def check_ranks_agree(model: torch.nn.Module, ranks: Ranks) -> None:
    """Raise RuntimeError if the ranks' weights differ, which means that gradients were not averaged."""
    here = sum(p.detach().double().abs().sum() for p in model.parameters()).item()
    highest, lowest = (sign * reduce_over_ranks(dist.ReduceOp.MAX, sign * here, ranks) for sign in (1, -1))
    if highest != lowest:
        raise RuntimeError(f"the ranks' weights differ: absolute sums from {lowest} to {highest}")


def lock_folder(out: Path):
    """Lock a run's folder, so that only one run writes there, until the returned file is closed. Raises UserError."""
    try:
        lock = open(make_folder(out) / "lock", "a+")
    except OSError as e:
        raise UserError(f"cannot write to out_dir {out}: {e.strerror}; name another --out_dir") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):  # other errors come from file systems without locks
            lock.seek(0)
            raise UserError(f"{out} is in use by a run ({lock.read().strip()}); stop that one first (touch {out}/STOP), or "
                            "name another --run_name") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    for left in out.glob("*.tmp"):  # from a run that was killed while it wrote
        remove(left)
    return lock


@contextmanager
def stop_signals():
    """Collect the names of signals that ask for a stop, in the list that the block gets. A second Ctrl-C interrupts."""
    asked = []

    def on_signal(number, _):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(signal.Signals(number).name)
    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def agree_to_stop(cfg: Config, step: int, train_seconds: float, asked: list[str], ranks: Ranks) -> int:
    """0: go on, 1: max_train_seconds are over, 2: a signal or the file STOP asked for a stop. The same on all ranks."""
    if cfg.gpus and ranks.world > 1 and step % cfg.log_interval:
        return 0  # agreeing costs a synchronisation, so several GPUs do it only at logged steps
    if ranks.rank == 0 and (Path(cfg.out_dir) / "STOP").exists():
        asked.append(f"{cfg.out_dir}/STOP")
    stop = 2 if asked else int(0 < cfg.max_train_seconds <= train_seconds)
    return int(reduce_over_ranks(dist.ReduceOp.MAX, stop, ranks))
