"""A processed corpus on disk, and the batches made of it.

    python data.py data/demo_bigvgan    # check a corpus: what is wrong with it, or what it holds and how fast it loads

On disk (all of it written by `write_corpus`, all of it read by `Corpus`):

    mel_shards/shard_000/  logmel.float16.memmap (frames, n_mels), lengths.int32.npy, offsets.int64.npy, meta.json
    metadata/              audio_index.parquet (a row an utterance, in shard order), dataset_stats.json, rejected.jsonl

Everything random about a training sample (silence tail, noise, time, text dropout) is drawn from a generator seeded
with (seed, epoch, utterance), so a step's batch is a pure function of (config, step): ranks and restarts do not
change it.
"""
import atexit
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

import audio
from config import PROGRESS_SECONDS, Config, UserError, first_line, load_config, run_cli

AUDIO_FIELDS = "sample_rate n_fft hop_length win_length n_mels f_min f_max".split()
SHARD_FILES = "logmel.float16.memmap lengths.int32.npy offsets.int64.npy meta.json".split()
INDEX = pa.schema([("utt_id", pa.string()), ("text", pa.string()), ("split", pa.string()), ("duration_sec", pa.float64()),
                   ("num_frames", pa.int64()), ("shard", pa.int64()), ("row", pa.int64())])
SPLITS = ("train", "val", "test")
BLOCK_BYTES = 2**23  # of frames, read at a time when all are read
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)  # every float16, at the index that its bits are
AGAIN = "delete the corpus and prepare it again"
LOADER_TIMING_STEPS = 20


# --- writing

@dataclasses.dataclass
class Utterance:
    """One line of a raw corpus; `source` is what the corpus's read function takes: a wav's path, or a text."""
    utt_id: str
    text: str
    split: str
    source: str


def hash_splits(ids: list[str], val: int = 100, test: int = 500) -> dict[str, str]:
    """id -> train, val or test: ids in the order of their SHA-1, the first `val`, the next `test`, and the rest.

    Neither held-out split takes more than a twentieth of the ids (but one), so that small corpora keep theirs.
    """
    most = max(1, len(ids) // 20)
    val, test = min(val, most), min(test, most)
    order = sorted(ids, key=lambda i: hashlib.sha1(i.encode()).hexdigest())
    return {i: "val" if n < val else "test" if n < val + test else "train" for n, i in enumerate(order)}


_worker = {}  # read function and config of this worker process


def _start_worker(read, cfg):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    torch.set_num_threads(1)
    _worker.update(read=read, cfg=cfg)


def _extract(utt: Utterance) -> np.ndarray | str:
    """The log-mel (frames, n_mels) float16 of an utterance, or the reason why it has none."""
    cfg = _worker["cfg"]
    try:
        if not utt.text.strip():
            return "empty text"
        wav = _worker["read"](utt.source, cfg.sample_rate)
        if len(wav) < cfg.hop_length:
            return f"zero length: {len(wav)} samples are less than one frame"
        mel = audio.log_mel(wav, cfg).numpy().astype(np.float16)
        low, high = log_mel_range(cfg)
        if not ((mel >= low) & (mel <= high)).all():
            return f"too loud: samples up to {np.abs(wav).max():.3g}, expected them within [-1, 1]"
        return mel
    except audio.AudioError as e:
        return str(e)


def log_mel_range(cfg: Config) -> tuple[np.float16, np.float16]:
    """The lowest and the highest log-mel of a sound: the floor, and what no samples within [-10, 10] can exceed.

    A bin's magnitude is at most the window's sum times the largest sample, and a band's is at most that times the sum
    of its weights. Ten times full scale (20 dB) leaves room for float files and resamplers that overshoot.
    """
    weights, window = audio.basis_for(cfg, "cpu").sum(1).max(), audio.hann(cfg.win_length, "cpu").sum()
    return np.float16(audio.LOG_MEL_FLOOR), np.float16(math.log(max(10 * window * weights, audio.CLAMP)))


@contextlib.contextmanager
def writing(partial: Path):
    """Within this, a full disk or a folder that cannot be written ends in a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {e.filename or f'to {partial}'} ({e.strerror or e}); finished shards are kept: when "
                        "that is mended, the same command goes on") from None


def npy(array: np.ndarray) -> bytes:
    """A .npy file's bytes. np.save and tofile into a file lose its end on a full disk, and say nothing."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_shard(shard: Path, mels: list[np.ndarray], rows: list[dict], cfg: Config) -> None:
    """Write one shard folder; it takes its name by a rename when it is whole."""
    tmp = shard.with_suffix(".tmp")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    lengths = np.array([len(m) for m in mels], dtype=np.int32)
    (tmp / "logmel.float16.memmap").write_bytes(b"".join(mels))
    (tmp / "lengths.int32.npy").write_bytes(npy(lengths))
    (tmp / "offsets.int64.npy").write_bytes(npy(np.cumsum(lengths, dtype=np.int64) - lengths))
    meta = {k: getattr(cfg, k) for k in AUDIO_FIELDS} | {"num_frames": int(lengths.sum()), "num_utts": len(mels)}
    (tmp / "meta.json").write_text(json.dumps(meta, indent=1))
    (tmp / "rows.json").write_text(json.dumps(rows))  # what a resumed run needs; gone in the finished corpus
    shutil.rmtree(shard, ignore_errors=True)
    os.rename(tmp, shard)


def refuse_existing(out_dir: str, force: bool) -> None:
    if os.path.exists(out_dir) and not force:
        raise UserError(f"{out_dir} exists already; use --force to make it anew, or another --out")


def next_result(results, children: set[int]):
    """The pool's next result. Raises UserError if a worker died: its task is lost, and the pool would wait for ever."""
    while True:
        try:
            return results.next(timeout=2)
        except multiprocessing.TimeoutError:
            if {p.pid for p in multiprocessing.active_children()} != children:
                raise UserError("a worker process was killed, perhaps for want of memory; run the same command again to "
                                "go on, with fewer --workers") from None


def write_corpus(out_dir: str, utterances: list[Utterance], read, cfg: Config, workers: int | None = None,
                 strict: bool = False, force: bool = False, shard_utts: int = 512) -> dict:
    """Turn utterances into a processed corpus at `out_dir`; returns its statistics.

    `read(source, sample_rate)` gives a wav (samples,) or raises AudioError. Work goes on in `out_dir`.partial, shard
    by shard; only a finished corpus gets its name, and a killed run goes on after its last whole shard. Bad
    utterances are listed in metadata/rejected.jsonl, or refused with `strict`. Raises UserError.
    """
    out, partial = Path(out_dir), Path(str(out_dir).rstrip("/") + ".partial")
    refuse_existing(out_dir, force)
    ids = [u.utt_id for u in utterances]
    if len(set(ids)) < len(ids):
        twice = next(i for i in ids if ids.count(i) > 1)
        raise UserError(f"utterance id {twice!r} occurs more than once; ids must be unique")
    if unknown := {u.split for u in utterances} - set(SPLITS):
        raise UserError(f"unknown split {min(unknown)!r}; expected {', '.join(SPLITS)}")
    job = hashlib.sha256(json.dumps([[getattr(cfg, k) for k in AUDIO_FIELDS], shard_utts,
                                     [dataclasses.astuple(u) for u in utterances]]).encode()).hexdigest()
    if workers is not None and workers < 1:
        raise UserError(f"workers = {workers}: must be at least 1")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = open(partial / "lock", "w")
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; name another --out") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is preparing {out}; wait for it or stop it") from None
    job_file = partial / "job"
    with writing(partial):
        if not job_file.exists() or job_file.read_text() != job:  # a new job, or the left-overs of another one
            for old in partial.iterdir():
                if old.name != "lock":
                    shutil.rmtree(old) if old.is_dir() else old.unlink()
            (partial / "mel_shards").mkdir()
            job_file.write_text(job)

    chunks = [utterances[i:i + shard_utts] for i in range(0, len(utterances), shard_utts)]
    shards = [partial / "mel_shards" / f"shard_{n:03d}" for n in range(len(chunks))]

    def done(shard):  # what was rejected is tried again: its file may have been mended since, and --strict must hear of it
        rows = shard / "rows.json"
        return rows.exists() and not any("reason" in row for row in json.loads(rows.read_text()))

    todo = [n for n, shard in enumerate(shards) if not done(shard)]
    if len(todo) < len(shards):
        print(f"resuming: {len(shards) - len(todo)} of {len(shards)} shards are done")
    pending = [u for n in todo for u in chunks[n]]
    # spawn, not fork: forking a process that has used OpenMP can hang its children
    pool = multiprocessing.get_context("spawn").Pool(
        min(workers or os.cpu_count(), max(1, len(pending))), _start_worker, (read, cfg)) if workers != 1 else None
    bar = tqdm(total=len(pending), unit="utt", desc=f"preparing {out}", mininterval=PROGRESS_SECONDS)
    try:
        if pool is None:
            _worker.update(read=read, cfg=cfg)
        results = pool.imap(_extract, pending) if pool else map(_extract, pending)
        children = {p.pid for p in multiprocessing.active_children()}
        for n in todo:
            mels, rows = [], []
            for utt in chunks[n]:
                mel = next(results) if pool is None else next_result(results, children)
                bar.update()
                row = dataclasses.asdict(utt)
                if isinstance(mel, str):
                    row["reason"] = mel
                    if strict:
                        raise UserError(f"{utt.utt_id}: {mel} (--strict refuses what is otherwise skipped)")
                else:
                    row |= {"duration_sec": len(mel) * cfg.hop_length / cfg.sample_rate, "num_frames": len(mel),
                            "shard": n, "row": len(mels)}
                    mels.append(mel)
                rows.append(row)
            with writing(partial):
                write_shard(shards[n], mels, rows, cfg)
    finally:
        bar.close()
        if pool:
            pool.terminate()

    rows = [row for shard in shards for row in json.loads((shard / "rows.json").read_text())]
    rejected = [{"utt_id": r["utt_id"], "source": r["source"], "reason": r["reason"]} for r in rows if "reason" in r]
    rows = [{k: v for k, v in r.items() if k != "source"} for r in rows if "reason" not in r]
    for r in rejected:
        print(f"skipped {r['utt_id']}: {r['reason']}")
    if not any(r["split"] == "train" for r in rows):
        raise UserError(f"none of {len(utterances)} utterances is a usable training one; nothing was written to {out}")
    metadata = partial / "metadata"
    with writing(partial):
        shutil.rmtree(metadata, ignore_errors=True)
        metadata.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), metadata / "audio_index.parquet")
        (metadata / "rejected.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rejected))
        counts = sum(value_counts(block) for shard in shards for block in blocks(shard / "logmel.float16.memmap"))
        columns = ([r[k] for r in rows] for k in ("text", "split", "num_frames", "duration_sec"))
        stats = frame_stats(counts) | index_stats(*columns) | {"rejected": len(rejected)}
        (metadata / "dataset_stats.json").write_text(json.dumps(stats, indent=1))
        if out.exists():
            shutil.rmtree(out)
        for name in [*(f"mel_shards/{shard.name}/rows.json" for shard in shards), "job", "lock"]:
            (partial / name).unlink()
        os.rename(partial, out)
    print(f"{out}: {stats['num_utts']} utterances, {stats['seconds'] / 3600:.2f} h, {len(rejected)} rejected, "
          f"mel mean {stats['mel_mean']:.4f} std {stats['mel_std']:.4f}")
    return stats


# --- statistics, for the writer and for checks

def blocks(path: Path):
    """A shard's values, flat float16 arrays of a few million, so that memory stays small."""
    with open(path, "rb") as f:
        while raw := f.read(BLOCK_BYTES):
            yield np.frombuffer(raw, np.float16)


def value_counts(block: np.ndarray) -> np.ndarray:
    """How often each float16 occurs (65536,): all that mean, deviation and checks need, exact and fast."""
    return np.bincount(block.view(np.uint16), minlength=2**16)


def frame_stats(counts: np.ndarray) -> dict:
    """Mean and standard deviation of all finite log-mel values, from their counts."""
    known = (counts > 0) & np.isfinite(HALVES)
    values, counts = HALVES[known].astype(np.float64), counts[known]
    mean = counts @ values / counts.sum()
    return {"mel_mean": float(mean), "mel_std": math.sqrt(counts @ (values - mean)**2 / counts.sum())}


def index_stats(texts: list[str], splits: list[str], frames: list[int], seconds: list[float]) -> dict:
    """Sizes, and ByT5 token counts (bytes + 1 a text)."""
    tokens = np.array([len(text.encode()) + 1 for text in texts])
    return {"num_utts": len(texts), "num_frames": sum(frames), "seconds": sum(seconds),
            "splits": {s: splits.count(s) for s in SPLITS},
            "byt5_tokens": {"total": int(tokens.sum()), "mean": float(tokens.mean()), "max": int(tokens.max()),
                            "p95": float(np.percentile(tokens, 95))},
            "characters": "".join(sorted(set("".join(texts))))}


# --- reading

def refuse(problem: str) -> None:
    raise UserError(problem) from None


def named(ids) -> str:
    """Some utterances in a message: how many, and the first five."""
    ids = list(ids)
    return f"{len(ids)} utterance(s): {', '.join(map(repr, ids[:5]))}{', …' * (len(ids) > 5)}"


def parsed(path: Path, parse):
    """parse(path). Raises UserError if it fails in any way: json, parquet and numpy raise errors of many types."""
    try:
        return parse(path)
    except Exception as e:
        raise UserError(f"{path} cannot be used ({type(e).__name__}: {first_line(e)}); {AGAIN}") from None


def read_json(path: Path) -> dict:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def read_index(path: Path) -> dict[str, list]:
    table = pq.read_table(path, partitioning=None).select(INDEX.names).cast(INDEX)
    if not len(table) or any(column.null_count for column in table.columns):
        raise ValueError("no rows, or empty fields in them")
    return table.to_pydict()


def agree(found, expected) -> bool:
    """Whether two statistics are the same but for rounding."""
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(agree(found.get(k), v) for k, v in expected.items())
    close = isinstance(found, float) and isinstance(expected, float)
    return found == expected or close and math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-3)


class Corpus:
    """A processed corpus opened for reading. Raises UserError for one that is missing, broken, or not `cfg`'s.

    Opening looks at everything but the frames; `check` reads those. What is wrong goes to `report`, which raises it
    unless the caller's notes it and returns; then checking goes on as far as it can.
    """

    def __init__(self, data_dir: str, cfg: Config, report=refuse):
        self.dir, self.cfg = Path(data_dir), cfg
        self.stats_file, self.index_file = (self.dir / "metadata" / f for f in ("dataset_stats.json", "audio_index.parquet"))
        if not self.stats_file.is_file():
            found = "an unfinished one" if Path(f"{str(self.dir).rstrip('/')}.partial").exists() else "none"
            raise UserError(f"no processed corpus at {self.dir} (found {found}); run its prepare script first, e.g. "
                            f"python {cfg.prepare_script or 'data/demo/prepare.py'} --out {self.dir}")
        folders = sorted((self.dir / "mel_shards").glob("shard_*"), key=lambda folder: (len(folder.name), folder.name))
        metas = [self._meta(folder, n) for n, folder in enumerate(folders)]
        self.stats, index = parsed(self.stats_file, read_json), parsed(self.index_file, read_index)
        self.ids, self.texts, self.splits = index["utt_id"], index["text"], index["split"]
        self.frames = np.clip(index["num_frames"], 1, 2**31)  # what lies outside is reported
        self.bounds = np.concatenate([[0], np.cumsum(self.frames)])  # utterance i has the corpus's frames [i] to [i + 1]
        self.mel_stats = self.stats.get("mel_mean"), self.stats.get("mel_std")
        self._check_index(index, report)
        self.shard, row = np.array(index["shard"]), np.array(index["row"])
        starts = np.searchsorted(self.shard, np.arange(len(folders) + 1))  # shard n has the utterances [n] to [n + 1]
        in_order = (self.shard[1:] >= self.shard[:-1]).all() and self.shard[0] >= 0 and self.shard[-1] < len(folders)
        if not in_order or (row != np.arange(len(row)) - starts[self.shard]).any():
            raise UserError(f"{self.index_file} and the {len(folders)} shards beside it disagree: it must list each shard's "
                            f"utterances in order; {AGAIN}")
        self.shards = [self._open_shard(*job, report) for job in zip(folders, metas, starts, starts[1:])]

    def _meta(self, folder: Path, n: int) -> dict:
        if folder.name != f"shard_{n:03d}":
            raise UserError(f"{folder.parent} has a {folder.name} but no shard_{n:03d}; {AGAIN}")
        meta = parsed(folder / "meta.json", read_json)
        wrong = [f"{k} is {meta.get(k)!r} (config: {getattr(self.cfg, k)})" for k in AUDIO_FIELDS
                 if meta.get(k) != getattr(self.cfg, k)]
        if wrong:
            raise UserError(f"{folder / 'meta.json'} disagrees with the config: {', '.join(wrong)}; prepare the corpus "
                            "with these fields or set them as it has them")
        return meta

    def _check_index(self, index: dict, report) -> None:
        if not all(isinstance(v, int | float) and abs(v) < 1e4 for v in self.mel_stats) or self.mel_stats[1] <= 0:
            report(f"{self.stats_file}: mel_mean and mel_std are {self.mel_stats!r:.60}, expected finite numbers, the "
                   f"second positive; {AGAIN}")
        count, hop = Counter(self.ids), self.cfg.hop_length / self.cfg.sample_rate
        for what, wrong in {
                "no text": [not text.strip() for text in self.texts],
                "an id that another one has too": [count[i] > 1 for i in self.ids],
                f"a split other than {', '.join(SPLITS)}": [split not in SPLITS for split in self.splits],
                "an impossible num_frames": self.frames != index["num_frames"],
                "a duration_sec that is not its frames'":
                    ~(np.abs(np.array(index["duration_sec"]) - self.frames * hop) < 2 * hop)}.items():
            if any(wrong):
                report(f"{self.index_file} has {what} for {named(itertools.compress(self.ids, wrong))}; {AGAIN}")
        self._compare(index_stats(self.texts, self.splits, index["num_frames"], index["duration_sec"]), report)

    def _compare(self, expected: dict, report) -> None:
        wrong = [f"{k} is {self.stats.get(k)!r:.60}, not {v!r:.60}" for k, v in expected.items()
                 if (k in self.stats or k.startswith("num_")) and not agree(self.stats.get(k), v)]
        if wrong:
            report(f"{self.stats_file} holds another corpus's statistics ({'; '.join(wrong)}); {AGAIN}")

    def _open_shard(self, folder: Path, meta: dict, start: int, end: int, report):
        """The shard of the utterances from start to end: path and state of its frames, and which of the corpus's is
        its first; None if its files do not add up."""
        path, first = folder / "logmel.float16.memmap", int(self.bounds[start])
        utts, total = int(end - start), int(self.bounds[end]) - first
        try:
            lengths, offsets = (parsed(folder / name, lambda p: np.load(p).astype(np.int64, casting="safe").tolist())
                                for name in ("lengths.int32.npy", "offsets.int64.npy"))
            state = parsed(path, os.stat)
        except UserError as e:
            return report(str(e))
        wrong = [f"{folder / name} has {found!s:.60}, expected {expected!s:.60}; {AGAIN}" for name, found, expected in (
            ("meta.json", [meta.get("num_utts"), meta.get("num_frames")], [utts, total]),
            ("lengths.int32.npy", lengths, self.frames[start:end].tolist()),
            ("offsets.int64.npy", offsets, (self.bounds[start:end] - first).tolist()),
            (path.name, f"{state.st_size} bytes", f"{total * self.cfg.n_mels * 2} bytes")) if found != expected]
        for problem in wrong:
            report(problem)
        return None if wrong else (path, state, first)

    def _gone(self, path: Path, why) -> UserError:
        return UserError(f"the corpus at {self.dir} can no longer be read: {path}: {why}; bring it back or prepare it "
                         "again, and go on with the same command")

    def check(self, report=refuse) -> str:
        """Read every frame once; returns the corpus's fingerprint, the SHA-256 (hex) of its index and frames.

        Reports frames that no sound can have, and a mel_mean and mel_std that are not the frames'.
        """
        low, high = log_mel_range(self.cfg)
        kinds = {"NaN or infinite": ~np.isfinite(HALVES),
                 f"outside {low} to {high}": (HALVES < low) & (HALVES > -np.inf) | (HALVES > high) & (HALVES < np.inf)}
        bad, counts = {kind: set() for kind in kinds}, np.zeros(2**16, np.int64)
        digest = hashlib.sha256(json.dumps([self.ids, self.texts, self.splits, self.frames.tolist()]).encode())
        for path, state, first in filter(None, self.shards):
            position = first * self.cfg.n_mels
            try:
                for block in blocks(path):
                    digest.update(block)
                    of_block = value_counts(block)
                    counts += of_block
                    for kind, is_bad in kinds.items():
                        if of_block[is_bad].any():
                            at = position + np.flatnonzero(is_bad[block.view(np.uint16)])
                            bad[kind].update(np.searchsorted(self.bounds, at // self.cfg.n_mels, "right") - 1)
                    position += len(block)
            except (OSError, ValueError) as e:
                raise self._gone(path, getattr(e, "strerror", "") or e) from None
            if (position - first * self.cfg.n_mels) * 2 != state.st_size:
                raise self._gone(path, "it was cut off")
        for kind, rows in bad.items():
            if rows:
                report(f"{self.dir} has log-mels {kind} in {named(self.ids[i] for i in sorted(rows))}; {AGAIN}")
        if all(self.shards) and not any(bad.values()):
            self._compare(frame_stats(counts), report)
        return digest.hexdigest()

    def check_texts(self, tokenise, most_tokens: int | None, report=refuse) -> None:
        """Report texts of more tokens than the text encoder reads (None: no limit), where block_size lets them in."""
        if most_tokens is None:
            return
        tokens = {self.ids[i]: len(tokenise(self.texts[i])) for i in np.flatnonzero(self.frames <= self.cfg.block_size)}
        if too_long := [i for i, n in tokens.items() if n > most_tokens]:
            report(f"{self.index_file}: the text encoder reads {most_tokens} tokens, but there are up to "
                   f"{max(tokens.values())} in the texts of {named(too_long)}; shorten these, {AGAIN}")

    def __len__(self):
        return len(self.ids)

    def mel(self, i: int) -> np.ndarray:
        """Utterance i's log-mel, (frames, n_mels) float16, read-only. Raises UserError if its file has gone.

        A read and not a mapped file: one that is cut off under a running job would kill the process with SIGBUS.
        """
        path, state, first = self.shards[self.shard[i]]
        size = self.cfg.n_mels * 2
        try:
            with open(path, "rb") as f:
                f.seek((self.bounds[i] - first) * size)
                values = f.read(self.frames[i] * size)
                now = os.fstat(f.fileno())
        except OSError as e:
            raise self._gone(path, e.strerror) from None
        if len(values) < self.frames[i] * size or now.st_mtime_ns != state.st_mtime_ns:
            raise self._gone(path, "it was cut off or changed")
        return np.frombuffer(values, np.float16).reshape(-1, self.cfg.n_mels)

    def split(self, name: str, cfg: Config) -> np.ndarray:
        """Indices of a split's utterances that fit into `cfg.block_size`, in corpus order."""
        of_split = np.array([i for i, s in enumerate(self.splits) if s == name], dtype=np.int64)
        return of_split[self.frames[of_split] <= cfg.block_size]

    def training_indices(self, cfg: Config) -> np.ndarray:
        """The training split, cut to `overfit_first_n_samples` if that is set. Raises UserError if it is too small."""
        train = self.split("train", cfg)
        train = train[:cfg.overfit_first_n_samples or None]
        if len(train) < cfg.effective_batch_size:
            raise UserError(f"effective_batch_size = {cfg.effective_batch_size} but only {len(train)} training "
                            f"utterances of {self.dir} fit (block_size = {cfg.block_size} frames, "
                            f"overfit_first_n_samples = {cfg.overfit_first_n_samples}); lower it")
        return train

    def describe(self, cfg: Config) -> str:
        """One paragraph: utterances, hours, what is dropped, padding waste of the first epoch's batches."""
        train = self.training_indices(cfg)
        dropped = self.splits.count("train") - len(self.split("train", cfg))
        hours = self.frames[train].sum() * cfg.hop_length / cfg.sample_rate / 3600
        held_out = ", ".join(f"{len(self.split(s, cfg))} {s}" for s in ("val", "test"))
        waste = padding_waste(self.frames, train, cfg)
        return (f"corpus {self.dir}: {len(train)} training utterances ({hours:.2f} h), {held_out}; {dropped} longer than "
                f"{cfg.block_size} frames dropped; padding waste {waste:.1%}")


# --- batches

def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, buckets: bool = True) -> list[np.ndarray]:
    """One epoch's batches, each an array of `batch_size` positions into `lengths`; a pure function of its arguments.

    With `buckets`, batches hold utterances of like length, longest first, in random order; lengths are jittered by
    4 % so that every epoch groups them anew. The positions left over (fewer than a batch) are random ones.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))[:len(lengths) // batch_size * batch_size]
    if buckets:
        order = order[np.argsort(-lengths[order] * rng.uniform(0.98, 1.02, len(order)), kind="stable")]
    batches = order.reshape(-1, batch_size)
    return list(rng.permutation(batches)) if buckets else list(batches)


def rank_rows(step_rows: np.ndarray, micro: int, rank: int, world: int, cfg: Config) -> np.ndarray:
    """The part of a step's utterances that `rank` handles in accumulation step `micro`."""
    n = cfg.batch_size // world
    start = (micro * world + rank) * n
    return step_rows[start:start + n]


def padding_waste(frames: np.ndarray, train: np.ndarray, cfg: Config) -> float:
    """The share of frames in a forward-backward that is padding, in the first epoch, on the config's ranks."""
    world = cfg.gpus or cfg.nproc
    used = padded = 0
    for batch in epoch_batches(frames[train], cfg.effective_batch_size, cfg.seed, 0, cfg.length_buckets):
        for part in batch.reshape(-1, cfg.batch_size // world):
            lengths = frames[train][part]
            used, padded = used + lengths.sum(), padded + lengths.max() * len(lengths)
    return 1 - used / padded


def sample_rng(cfg: Config, epoch: int, i: int) -> np.random.Generator:
    return np.random.default_rng([cfg.seed, epoch, i])


def silence_frames(rng: np.random.Generator, cfg: Config) -> int:
    """Length of the silence to append to an utterance; uses two draws whatever comes of them."""
    chance, seconds = rng.random(), rng.random() * cfg.max_silence_sec
    return int(seconds * cfg.sample_rate / cfg.hop_length) if chance < cfg.silence_prob else 0


def collate(corpus: Corpus, indices, cfg: Config, tokenise, epoch: int) -> dict[str, torch.Tensor]:
    """Pad utterances into one batch, with everything that is random about them in it.

    mel, noise (B, T, n_mels) normalised, zero behind mel_lengths (B,); tokens (B, L), zero behind token_lengths (B,);
    seconds (B,) of speech without the silence tail; t (B,) in (0, 1); drop_text (B,) bool.
    """
    mels, noises, times, drops = [], [], [], []
    for i in indices:
        rng = sample_rng(cfg, epoch, int(i))
        tail = silence_frames(rng, cfg)
        times.append(cfg.timestep_logit_mean + cfg.timestep_logit_std * rng.standard_normal())
        drops.append(rng.random() < cfg.text_condition_dropout)
        mel = np.asarray(corpus.mel(i), np.float32)
        if tail:
            mel = np.concatenate([mel, np.full((tail, cfg.n_mels), audio.LOG_MEL_FLOOR, np.float32)])
        mels.append(torch.from_numpy(audio.normalise(mel, cfg)))
        noises.append(torch.from_numpy(rng.standard_normal(mel.shape, dtype=np.float32)))
    tokens = [torch.tensor(tokenise(corpus.texts[i])) for i in indices]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"mel": pad(mels, batch_first=True), "noise": pad(noises, batch_first=True),
            "mel_lengths": torch.tensor([len(m) for m in mels]),
            "tokens": pad(tokens, batch_first=True), "token_lengths": torch.tensor([len(t) for t in tokens]),
            "seconds": torch.tensor(corpus.frames[indices] * (cfg.hop_length / cfg.sample_rate), dtype=torch.float32),
            "t": torch.sigmoid(torch.tensor(times, dtype=torch.float32)), "drop_text": torch.tensor(drops)}


class TrainingSteps(torch.utils.data.Dataset):
    """Item n is step n's work for one rank: a list of batches, one an accumulation step.

    `frames` and `utterances` in each are the whole step's counts over all ranks, by which sums become means.
    """

    def __init__(self, corpus: Corpus, cfg: Config, tokenise, rank: int, world: int):
        self.corpus, self.cfg, self.tokenise, self.rank, self.world = corpus, cfg, tokenise, rank, world
        self.indices = corpus.training_indices(cfg)
        self.steps_per_epoch = len(self.indices) // cfg.effective_batch_size
        self._epoch, self._batches = -1, []

    def __len__(self):
        return self.cfg.max_steps

    def _rows(self, step: int) -> np.ndarray:
        cfg, epoch = self.cfg, step // self.steps_per_epoch
        if epoch != self._epoch:
            lengths = self.corpus.frames[self.indices]
            self._batches = epoch_batches(lengths, cfg.effective_batch_size, cfg.seed, epoch, cfg.length_buckets)
            self._epoch = epoch
        return self.indices[self._batches[step % self.steps_per_epoch]]

    def utterances(self, step: int) -> list[str]:
        """The ids of a step's utterances, on all ranks."""
        return [self.corpus.ids[i] for i in self._rows(step)]

    def __getitem__(self, step: int) -> list[dict]:
        cfg, epoch, rows = self.cfg, step // self.steps_per_epoch, self._rows(step)
        frames = int(self.corpus.frames[rows].sum())
        frames += sum(silence_frames(sample_rng(cfg, epoch, int(i)), cfg) for i in rows)
        micro_batches = []
        for micro in range(cfg.effective_batch_size // cfg.batch_size):
            mine = rank_rows(rows, micro, self.rank, self.world, cfg)
            batch = collate(self.corpus, mine, cfg, self.tokenise, epoch)
            micro_batches.append(batch | {"frames": torch.tensor(frames), "utterances": torch.tensor(len(rows))})
        return micro_batches


def _start_loader_worker(_):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # they reach the whole group; the trainer answers them
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)


def _kill_children() -> None:
    """At exit: multiprocessing ends what is left by SIGTERM, which loader workers ignore, and waits for it for ever."""
    for process in multiprocessing.active_children():
        process.kill()


def _share(batches: list[dict]) -> list[dict]:
    """Move batches to shared memory. torch does so in a thread whose failure would leave the trainer waiting for ever."""
    return [{k: v.share_memory_() for k, v in batch.items()} for batch in batches]


def training_loader(dataset: TrainingSteps, start: int, workers: int = 1, pin: bool = False):
    """Steps from `start` on, made ahead of time by `workers` processes (0: in this one, when asked for).

    A generator; its `next` raises UserError if the corpus can no longer be read, or if a worker dies.
    """
    # Keeps torch from answering a worker's death by raising out of a signal handler, wherever the trainer happens to be.
    torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = True
    atexit.register(_kill_children)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=range(start, len(dataset)), num_workers=workers,
                                         prefetch_factor=4 if workers else None, pin_memory=pin,
                                         collate_fn=_share if workers else None, worker_init_fn=_start_loader_worker)
    steps = None
    try:
        steps = iter(loader)
        yield from steps
    except UserError as e:  # a worker's comes at the end of its traceback
        raise UserError(str(e).rsplit("config.UserError: ", 1)[-1].strip()) from None
    except (RuntimeError, OSError, EOFError) as e:  # also of forking, and of a connection to one that has just died
        lines = str(e).strip().splitlines() or ["its connection ended"]
        of_code = lines[0].startswith("Caught ") or isinstance(e, RuntimeError) and not lines[0].startswith(
            ("DataLoader worker (pid", "Pin memory thread exited", "Too many open files"))
        if not workers or of_code and "</torch_" not in lines[-1]:  # that is a file in /dev/shm
            raise
        raise UserError(f"a data loader process died or had no room ({lines[-1].removeprefix('RuntimeError: ')}), perhaps "
                        "for want of memory or of space in /dev/shm; go on with --resume latest and fewer --loader_workers "
                        "(0: none), a smaller --batch_size, or more /dev/shm (docker run --shm-size)") from None
    finally:
        if workers and steps is not None:  # now: a garbage collector may close the queues first, and they would never end
            steps._shutdown_workers()


def main(argv: list[str]) -> int | None:
    from model import T5_TOKENS, byte_tokens  # this command stands for a run, which has a model; nothing else here knows it
    if argv and not argv[0].startswith("--"):
        argv = ["--data_dir", argv[0]] + argv[1:]
    cfg, problems = load_config(argv), []
    try:
        corpus = Corpus(cfg.data_dir, cfg, problems.append)
        fingerprint = corpus.check(problems.append)
        corpus.check_texts(byte_tokens, T5_TOKENS, problems.append)
    except UserError as e:  # checking cannot go on
        problems.append(str(e))
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        return 2
    cfg.mel_mean, cfg.mel_std = corpus.mel_stats
    ranks = cfg.gpus or cfg.nproc
    fitting = len(corpus.split("train", cfg)) // ranks * ranks
    if not fitting:
        raise UserError(f"no training utterance of {corpus.dir} is as short as block_size = {cfg.block_size} frames")
    cfg.effective_batch_size = cfg.batch_size = min(cfg.batch_size, fitting)
    print(corpus.describe(cfg))
    print(json.dumps({k: v for k, v in corpus.stats.items() if k != "characters"}))
    rejected = corpus.dir / "metadata" / "rejected.jsonl"
    rejected = len(rejected.read_bytes().splitlines()) if rejected.is_file() else 0
    print(f"{(corpus.frames > cfg.block_size).sum()} of {len(corpus)} utterances are longer than block_size = "
          f"{cfg.block_size} frames and left out; {rejected} were rejected at preparation (rejected.jsonl)")
    print(f"checked every frame, found nothing wrong; fingerprint {fingerprint[:12]}")
    steps = TrainingSteps(corpus, cfg, byte_tokens, 0, 1)
    steps[0]
    start = time.time()
    frames = sum(int(steps[n][0]["frames"]) for n in range(LOADER_TIMING_STEPS))
    seconds = time.time() - start
    print(f"loader, one process: {frames / seconds:,.0f} frames/s, {seconds / LOADER_TIMING_STEPS * 1e3:.1f} ms a batch "
          f"of {cfg.batch_size}")


if __name__ == "__main__":
    run_cli(main)
