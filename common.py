"""What every module shares: errors of one line, messages, progress bars, atomic writes, processes, devices."""
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path

from tqdm import tqdm

PROGRESS_SECONDS = 1 if sys.stderr.isatty() else 20  # between two updates of a progress bar: few lines in a log file


class UserError(Exception):
    """A mistake that the user can fix. The message says what was found, what was expected and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))  # quoted file names and values may contain line breaks


def first_line(e: BaseException) -> str:
    """The first line of an exception's message, or the name of its type if the message is empty."""
    return next(iter(str(e).strip().splitlines()), "") or type(e).__name__


def run_cli(main) -> None:
    """Run the entry point main(argv). A UserError prints one line on stderr and exits with status 2, without a traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        tell(f"error: {e}", sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        tell("stopped by Ctrl-C", sys.stderr)
        sys.exit(130)


def tell(message: str, file=None) -> None:
    """Print a line to `file` (default: standard output), above a progress bar if there is one."""
    tqdm.write(message, file)
    print(end="", file=file, flush=True)


def warn(message: str) -> None:
    tell(f"warning: {message}", sys.stderr)


def progress(items=None, **options) -> tqdm:
    """tqdm's progress bar with its `options`, on standard error. It appears when the work has taken two seconds."""
    return tqdm(items, **({"delay": 2, "leave": False, "mininterval": PROGRESS_SECONDS} | options))


def remove(path: Path) -> None:
    """Delete a file, a link or a folder with all that is in it. It need not exist."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing(path, hint: str = "name a folder that exists and has room"):
    """Give the block a temporary path. What it writes there gets the name `path` when the block ends without an error.

    So a file or a folder under its final name is always complete. Raises UserError, which ends with `hint`, if the system
    refuses a write.
    """
    path, tmp = Path(path), Path(f"{Path(path)}.tmp")
    try:
        remove(tmp)  # left by a process that was killed
        yield tmp
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; {hint}") from None
    finally:
        with contextlib.suppress(OSError):
            remove(tmp)


def write_file(path, data: str | bytes) -> None:
    """Write a whole file, or leave the old one in place. Raises UserError."""
    with replacing(path) as tmp:
        tmp.write_bytes(data.encode() if isinstance(data, str) else data)


def make_folder(path) -> Path:
    """Create a folder and its parents if they are missing. Raises UserError."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {path}: {e.strerror}; name another folder") from None
    return Path(path)


def check_workers(workers: int | None) -> None:
    """Raises UserError unless it is a number of processes, or None."""
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers}: must be at least 1")


_worker = {}  # of a worker process: the function that it applies


def _start_worker(function):
    import torch  # here, because config.py needs this module and should start without torch
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    torch.set_num_threads(1)
    _worker["function"] = function


def _work(item):
    return _worker["function"](item)


def map_processes(function, items: list, workers: int | None):
    """Yield function(item) of each item, in order, by `workers` processes (None: one per core; 1: this process).

    The function is sent to each process once. Raises UserError if a process is killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    processes = min(workers or os.cpu_count(), max(1, len(items)))
    # spawn, because forking a process that has used OpenMP can hang the children
    with multiprocessing.get_context("spawn").Pool(processes, _start_worker, (function,)) as pool:
        results, children = pool.imap(_work, items), set(multiprocessing.active_children())
        for _ in items:
            while True:
                try:
                    yield results.next(timeout=2)
                    break
                except multiprocessing.TimeoutError:  # the pool replaces a dead worker, but waits forever for its task
                    if set(multiprocessing.active_children()) != children:
                        raise UserError("a worker process was killed, perhaps because memory ran out; run the same command "
                                        "again to go on, with fewer --workers") from None


def multiplies_bfloat16(device) -> bool:
    """Whether a torch.device multiplies matrices sooner in bfloat16 than in float32: GPUs, CPUs with AMX, AMD's with AVX-512
    BF16.

    With torch 2.13 an AMD EPYC (Zen 5) multiplies 4.4 times as fast in bfloat16, because MKL, which does it in float32, is
    slow there. An Intel Xeon without AMX is three to four times slower in bfloat16, even if it has AVX-512 BF16.
    """
    import torch
    if device.type == "cuda":
        return True
    has = torch.cpu.get_capabilities()
    return has.get("amx_bf16", False) or (has.get("avx512_bf16", False) and "AMD" in has.get("cpu_name", ""))


def pick_device(name: str = "auto"):
    """The torch.device of auto, cpu, cuda or cuda:N. Raises UserError if this machine does not have it."""
    import torch  # here, because config.py needs this module and should start without torch
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: found {torch.cuda.device_count()} CUDA GPUs; use --device cpu")
        torch.empty(0, device=device)
    except RuntimeError as e:
        raise UserError(f"--device {name}: {first_line(e)}; expected auto, cpu or cuda") from None
    return device
