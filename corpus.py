"""A processed corpus on disk: written by `write_corpus`, read and checked by `Corpus`.

    mel_shards/shard_000/  logmel.float16.memmap (frames, n_mels), lengths.int32.npy, offsets.int64.npy, meta.json
    metadata/              audio_index.parquet (one row per utterance, in shard order), dataset_stats.json, rejected.jsonl
    recordings/            <utt_id>.wav of some utterances, to judge them and to train a vocoder (optional)

Check one with `python data.py DIR`.
"""
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import math
import os
import string
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import audio
from common import UserError, check_workers, first_line, make_folder, map_processes, progress, remove, replacing
from config import AUDIO_FIELDS, Config
from normalise import as_spoken

FRAMES_FILE = "logmel.float16.memmap"
RECORDINGS = "recordings"  # the folder of kept wavs
KEPT = 400  # training recordings to keep for a vocoder: about a quarter of an hour
INDEX = pa.schema([("utt_id", pa.string()), ("text", pa.string()), ("split", pa.string()), ("duration_sec", pa.float64()),
                   ("num_frames", pa.int64()), ("shard", pa.int64()), ("row", pa.int64())])
SPLITS = ("train", "val", "test")
BLOCK_BYTES = 2**23  # bytes of frames in memory at a time when all are read
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)  # HALVES[i] is the float16 whose bits are the integer i
SHARDS_ARE_KEPT = "finished shards are kept: solve that, and run the same command again to go on"
PREPARE_AGAIN = "delete the corpus and prepare it again"


@dataclasses.dataclass
class Utterance:
    """One utterance of a raw corpus. `source` is the argument of the corpus's read function: a wav's path, or a text."""
    utt_id: str
    text: str
    split: str
    source: str


def hash_splits(ids: list[str], val: int = 100, test: int = 500) -> dict[str, str]:
    """id -> train, val or test. The ids are sorted by their SHA-1: first `val`, then `test`, the rest is train.

    Each held-out split takes at most a twentieth of the ids (but at least one id), so that small corpora can train.
    """
    most = max(1, len(ids) // 20)
    val, test = min(val, most), min(test, most)
    order = sorted(ids, key=lambda i: hashlib.sha1(i.encode()).hexdigest())
    return {i: "val" if n < val else "test" if n < val + test else "train" for n, i in enumerate(order)}


# --- extraction

def _extract(utt: Utterance, read, cfg: Config, kept: dict[str, Path]) -> np.ndarray | str:
    """The log-mel (frames, n_mels) float16 of an utterance, or the reason why it is rejected.

    Its wav is written to kept[utt_id] if that is there.
    """
    try:
        if not utt.text.strip():
            return "empty text"
        wav = read(utt.source, cfg.sample_rate)
        if len(wav) < cfg.hop_length:
            return f"zero length: {len(wav)} samples are less than one frame"
        mel = audio.log_mel(wav, cfg).numpy().astype(np.float16)
        low, high = audio.log_mel_range(cfg)
        if not ((mel >= low) & (mel <= high)).all():
            return f"too loud: samples up to {np.abs(wav).max():.3g}, expected them within [-1, 1]"
        if utt.utt_id in kept:
            audio.write_wav(kept[utt.utt_id], wav, cfg.sample_rate)
        return mel
    except audio.AudioError as e:
        return str(e)


# --- writing

@contextlib.contextmanager
def writing(partial: Path):
    """Turn an OSError of the block, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(f"cannot write {e.filename or partial}: {e.strerror or e}; {SHARDS_ARE_KEPT}") from None


def npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file. np.save into a file can lose its end on a full disk without an error."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def write_shard(shard: Path, mels: list[np.ndarray], rows: list[dict], cfg: Config) -> None:
    """Write one shard folder. It gets its name when it is complete."""
    lengths = np.array([len(m) for m in mels], dtype=np.int32)
    meta = {k: getattr(cfg, k) for k in AUDIO_FIELDS} | {"num_frames": int(lengths.sum()), "num_utts": len(mels)}
    with replacing(shard, SHARDS_ARE_KEPT) as tmp:
        tmp.mkdir()
        (tmp / FRAMES_FILE).write_bytes(b"".join(mels))
        (tmp / "lengths.int32.npy").write_bytes(npy(lengths))
        (tmp / "offsets.int64.npy").write_bytes(npy(np.cumsum(lengths, dtype=np.int64) - lengths))
        (tmp / "meta.json").write_text(json.dumps(meta, indent=1))
        (tmp / "rows.json").write_text(json.dumps(rows))  # for a resumed preparation; deleted in the finished corpus
        remove(shard)


def refuse_existing(out_dir: str, force: bool) -> None:
    if os.path.exists(out_dir) and not force:
        raise UserError(f"{out_dir} exists already; use --force to replace it, or another --out")


def open_partial(out: Path, partial: Path, job: str):
    """Lock the folder of an unfinished preparation, and empty it unless it is of the same job. Returns the lock's file."""
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
        if not job_file.exists() or job_file.read_text() != job:
            for old in partial.iterdir():
                if old.name != "lock":
                    remove(old)
            (partial / "mel_shards").mkdir()
            job_file.write_text(job)
    return lock


def write_corpus(out_dir: str, utterances: list[Utterance], read, cfg: Config, workers: int | None = None,
                 strict: bool = False, force: bool = False, shard_utts: int = 512, recordings: int = 0) -> dict:
    """Turn utterances into a processed corpus at `out_dir`, and return its statistics.

    With `recordings`, keep the wavs of the first so many training utterances, and of val and test, in recordings/.

    `read(source, sample_rate)` returns a wav (samples,) or raises AudioError. The work is done in `out_dir`.partial, shard
    by shard. Only a finished corpus gets its name, and an interrupted preparation goes on after its last finished shard.
    Bad utterances are listed in metadata/rejected.jsonl; with `strict` the first one is an error. Raises UserError.
    """
    out, partial = Path(out_dir), Path(str(out_dir).rstrip("/") + ".partial")
    refuse_existing(out_dir, force)
    (repeated, count), = Counter(u.utt_id for u in utterances).most_common(1) or [("", 0)]
    if count > 1:
        raise UserError(f"utterance id {repeated!r} occurs {count} times; ids must be unique")
    check_workers(workers)
    train = [u.utt_id for u in utterances if u.split == "train"]
    ids = [*train[:recordings], *(u.utt_id for u in utterances if u.split != "train")] if recordings else []
    kept = {utt_id: partial / RECORDINGS / f"{utt_id}.wav" for utt_id in ids}
    job = hashlib.sha256(json.dumps([[getattr(cfg, k) for k in AUDIO_FIELDS], shard_utts, recordings,
                                     [dataclasses.astuple(u) for u in utterances]]).encode()).hexdigest()
    with open_partial(out, partial, job):
        if kept:
            make_folder(partial / RECORDINGS)
        chunks = [utterances[i:i + shard_utts] for i in range(0, len(utterances), shard_utts)]
        shards = [partial / "mel_shards" / f"shard_{n:03d}" for n in range(len(chunks))]
        # A shard with rejected utterances is made again, because their files may have been repaired
        todo = [n for n, shard in enumerate(shards) if not (shard / "rows.json").exists()
                or any("reason" in row for row in json.loads((shard / "rows.json").read_text()))]
        if len(todo) < len(shards):
            print(f"resuming: {len(shards) - len(todo)} of {len(shards)} shards are done")
        pending = [u for n in todo for u in chunks[n]]
        extract = functools.partial(_extract, read=read, cfg=cfg, kept=kept)
        with contextlib.closing(map_processes(extract, pending, workers)) as results, \
                progress(total=len(pending), unit="utt", desc=f"preparing {out}", delay=0, leave=True) as bar:
            for n in todo:
                mels, rows = [], []
                for utt in chunks[n]:
                    mel = next(results)
                    bar.update()
                    row = dataclasses.asdict(utt)
                    if isinstance(mel, str):
                        row["reason"] = mel
                        if strict:
                            raise UserError(f"{utt.utt_id}: {mel} (without --strict it is skipped)")
                    else:
                        row |= {"duration_sec": len(mel) * cfg.hop_length / cfg.sample_rate, "num_frames": len(mel),
                                "shard": n, "row": len(mels)}
                        mels.append(mel)
                    rows.append(row)
                write_shard(shards[n], mels, rows, cfg)
        return finish_corpus(out, partial, shards)


def finish_corpus(out: Path, partial: Path, shards: list[Path]) -> dict:
    """Write the metadata over finished shards and give the corpus its name. Returns the statistics."""
    rows = [row for shard in shards for row in json.loads((shard / "rows.json").read_text())]
    rejected = [{"utt_id": r["utt_id"], "source": r["source"], "reason": r["reason"]} for r in rows if "reason" in r]
    rows = [{k: v for k, v in r.items() if k != "source"} for r in rows if "reason" not in r]
    for r in rejected:
        print(f"skipped {r['utt_id']}: {r['reason']}")
    if not any(r["split"] == "train" for r in rows):
        raise UserError(f"none of {len(rows) + len(rejected)} utterances can be used for training; {out} was not written")
    metadata = partial / "metadata"
    with writing(partial):
        remove(metadata)
        metadata.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), metadata / "audio_index.parquet")
        (metadata / "rejected.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rejected))
        ids, texts, splits, frames, seconds = ([r[k] for r in rows] for k in (
            "utt_id", "text", "split", "num_frames", "duration_sec"))
        digest, counts = index_digest(ids, texts, splits, frames), np.zeros(2**16, np.int64)
        for block in itertools.chain.from_iterable(blocks(shard / FRAMES_FILE) for shard in shards):
            digest.update(block)
            counts += np.bincount(block.view(np.uint16), minlength=2**16)
        stats = frame_stats(counts) | index_stats(texts, splits, frames, seconds) | {
            "rejected": len(rejected), "sha256": digest.hexdigest()}
        (metadata / "dataset_stats.json").write_text(json.dumps(stats, indent=1))
        remove(out)
        for name in [*(f"mel_shards/{shard.name}/rows.json" for shard in shards), "job", "lock"]:
            (partial / name).unlink()
        os.rename(partial, out)
    print(f"{out}: {stats['num_utts']} utterances, {stats['seconds'] / 3600:.2f} h, {len(rejected)} rejected, "
          f"mel mean {stats['mel_mean']:.4f} std {stats['mel_std']:.4f}")
    return stats


# --- statistics, for the writer and for checks

def blocks(path: Path):
    """A shard's values as flat float16 arrays of BLOCK_BYTES, so that little memory is needed."""
    with open(path, "rb") as f:
        while raw := f.read(BLOCK_BYTES):
            yield np.frombuffer(raw, np.float16)


def frame_stats(counts: np.ndarray) -> dict:
    """Mean and standard deviation of all finite log-mel values, from the counts of each float16 value (65536,): exact."""
    known = (counts > 0) & np.isfinite(HALVES)
    values, counts = HALVES[known].astype(np.float64), counts[known]
    mean = counts @ values / counts.sum()
    return {"mel_mean": float(mean), "mel_std": math.sqrt(counts @ (values - mean)**2 / counts.sum())}


def index_stats(texts: list[str], splits: list[str], frames: list[int], seconds: list[float]) -> dict:
    """Sizes, and statistics of ByT5 tokens (bytes + 1 per text)."""
    tokens = np.array([len(text.encode()) + 1 for text in texts])
    return {"num_utts": len(texts), "num_frames": sum(frames), "seconds": sum(seconds),
            "splits": {s: splits.count(s) for s in SPLITS},
            "byt5_tokens": {"total": int(tokens.sum()), "mean": float(tokens.mean()), "max": int(tokens.max()),
                            "p95": float(np.percentile(tokens, 95))},
            "characters": "".join(sorted(set("".join(texts))))}


def index_digest(ids: list[str], texts: list[str], splits: list[str], frames: list[int]):
    """A running SHA-256 that has read the index."""
    return hashlib.sha256(json.dumps([ids, texts, splits, frames]).encode())


# --- reading

def refuse(problem: str) -> None:
    raise UserError(problem) from None


def read_index(path: Path) -> dict[str, list]:
    table = pq.read_table(path).select(INDEX.names).cast(INDEX)
    if not len(table) or any(column.null_count for column in table.columns):
        raise ValueError("no rows, or empty fields in them")
    return table.to_pydict()


def parsed(path: Path) -> dict:
    """A JSON or parquet file of a corpus. Raises UserError if it is damaged, for which the libraries raise many types."""
    try:
        return read_index(path) if path.suffix == ".parquet" else dict(json.loads(path.read_text(encoding="utf-8")))
    except Exception as e:
        raise UserError(f"{path} cannot be used ({type(e).__name__}: {first_line(e)}); {PREPARE_AGAIN}") from None


class Corpus:
    """A processed corpus opened for reading. Raises UserError if it is missing, broken, or has another log-mel than `cfg`.

    Opening checks everything but the frames, and `check` reads those too. Each problem goes to `report`, which raises it
    unless the caller collects problems; then the check goes on as far as it can.
    """

    def __init__(self, data_dir: str, cfg: Config, report=refuse):
        self.dir, self.cfg, self.is_whole = Path(data_dir), cfg, True
        self.stats_file, self.index_file = (self.dir / "metadata" / f for f in ("dataset_stats.json", "audio_index.parquet"))
        if not self.stats_file.is_file():
            found = "an unfinished one" if Path(f"{str(self.dir).rstrip('/')}.partial").exists() else "none"
            raise UserError(f"no processed corpus at {self.dir} (found {found}); run its prepare script first, e.g. "
                            f"python {cfg.prepare_script or 'data/demo/prepare.py'} --out {self.dir}")
        self.stats, index = parsed(self.stats_file), parsed(self.index_file)
        self.ids, self.texts, self.splits = index["utt_id"], index["text"], index["split"]
        self.frames, self.shard, row = (np.array(index[name]) for name in ("num_frames", "shard", "row"))  # (utterances,)
        self.bounds = np.concatenate([[0], np.cumsum(self.frames)])  # utterance i has the frames [bounds[i], bounds[i + 1])
        self.mel_stats = self.stats.get("mel_mean"), self.stats.get("mel_std")
        self.characters = self.stats.get("characters", "")  # all that occur in the texts
        self._check_index(report)
        numbers, starts, self.shard = np.unique(self.shard, return_index=True, return_inverse=True)  # of the shards in use
        if (np.diff(self.shard) < 0).any() or (row != np.arange(len(row)) - starts[self.shard]).any():
            raise UserError(f"{self.index_file} does not list the utterances of each shard in order; {PREPARE_AGAIN}")
        folders = [self.dir / "mel_shards" / f"shard_{n:03d}" for n in numbers]
        self.paths, self.first_frames = [folder / FRAMES_FILE for folder in folders], self.bounds[starts]
        for folder, start, end in zip(folders, starts, [*starts[1:], len(row)]):
            self._check_shard(folder, start, end, report)

    def _check_index(self, report) -> None:
        if not all(isinstance(v, int | float) and abs(v) < 1e4 for v in self.mel_stats) or self.mel_stats[1] <= 0:
            self.is_whole = False
            report(f"{self.stats_file}: mel_mean and mel_std are {self.mel_stats!r:.60}, expected finite numbers, the "
                   f"second positive; {PREPARE_AGAIN}")
        sizes = {"num_utts": len(self.ids), "num_frames": int(self.bounds[-1])}
        if (found := {name: self.stats.get(name) for name in sizes}) != sizes:
            report(f"{self.stats_file} has {found!s:.80}, but {self.index_file.name} {sizes}; {PREPARE_AGAIN}")
        count = Counter(self.ids)
        for problem, wrong in {"no text": [not text.strip() for text in self.texts],
                               "a repeated id": [count[i] > 1 for i in self.ids],
                               f"a split other than {', '.join(SPLITS)}": [split not in SPLITS for split in self.splits],
                               "a num_frames below 1": self.frames < 1, "a shard below 0": self.shard < 0}.items():
            if ids := list(itertools.compress(self.ids, wrong)):
                report(f"{self.index_file} has {problem} for {len(ids)} utterance(s), such as {ids[:5]}; {PREPARE_AGAIN}")

    def _check_shard(self, folder: Path, start: int, end: int, report) -> None:
        """Report where a shard's files disagree with the config or with the index's utterances from `start` to `end`."""
        total = int(self.bounds[end] - self.bounds[start])
        try:
            meta, size = parsed(folder / "meta.json"), os.path.getsize(folder / FRAMES_FILE)
            if wrong := [f"{k} is {meta.get(k)!r} (config: {getattr(self.cfg, k)})" for k in AUDIO_FIELDS
                         if meta.get(k) != getattr(self.cfg, k)]:
                raise UserError(f"{folder / 'meta.json'} disagrees with the config: {', '.join(wrong)}; prepare the corpus "
                                "with these fields (with init_from the voice's), or set them as the corpus has them")
            if size != total * self.cfg.n_mels * 2:
                raise UserError(f"{folder / FRAMES_FILE} has {size} bytes, expected {total * self.cfg.n_mels * 2} for the "
                                f"{end - start} utterances of {self.index_file.name}; {PREPARE_AGAIN}")
        except (OSError, UserError) as e:
            self.is_whole = False
            report(f"{e}; {PREPARE_AGAIN}" if isinstance(e, OSError) else str(e))

    def _gone(self, path: Path, why) -> UserError:
        return UserError(f"the corpus at {self.dir} can no longer be read: {path}: {why}; bring it back or prepare it "
                         "again, and go on with the same command")

    def fingerprint(self) -> str:
        """A SHA-256 (hex) of the index as it is and of the digest from preparation. Older corpora compute that one here."""
        digest = index_digest(self.ids, self.texts, self.splits, self.frames.tolist())
        digest.update((self.stats.get("sha256") or self.check()).encode())
        return digest.hexdigest()

    def check(self, report=refuse) -> str:
        """Read every frame; returns the SHA-256 of index and frames. The files must have the right sizes (`is_whole`).

        Reports log-mel values that no wav can have, and a mean, deviation or SHA-256 that differ from dataset_stats.json.
        """
        low, high = audio.log_mel_range(self.cfg)
        counts, digest = np.zeros(2**16, np.int64), index_digest(self.ids, self.texts, self.splits, self.frames.tolist())
        for path in self.paths:
            try:
                for block in blocks(path):
                    digest.update(block)
                    counts += np.bincount(block.view(np.uint16), minlength=2**16)
            except OSError as e:
                raise self._gone(path, e.strerror) from None
        if impossible := counts[~((HALVES >= low) & (HALVES <= high))].sum():  # also NaN
            report(f"{self.dir} has {impossible} log-mel values that are not within {low} to {high}; {PREPARE_AGAIN}")
        expected = frame_stats(counts) | {"sha256": digest.hexdigest()}
        wrong = [f"{name} {self.stats[name]!s:.20}, found {value!s:.20}" for name, value in expected.items()
                 if name in self.stats and self.stats[name] != value
                 and not (isinstance(value, float) and math.isclose(self.stats[name], value, abs_tol=1e-3))]
        if wrong:
            report(f"{self.dir} is not as {self.stats_file.name} describes it: {'; '.join(wrong)}; {PREPARE_AGAIN}")
        return digest.hexdigest()

    def __len__(self):
        return len(self.ids)

    @functools.cached_property
    def spoken(self) -> list[str]:
        """The texts as they are spoken: with cfg.normalise, numbers, abbreviations and letters are written out."""
        known = self.characters + string.ascii_letters  # a number's words can have letters that no text has
        return [as_spoken(text, known) for text in self.texts] if self.cfg.normalise else self.texts

    @property
    def spoken_characters(self) -> str:
        return "".join(sorted(set().union(*self.spoken)))

    def mel(self, i: int) -> np.ndarray:
        """Utterance i's log-mel, (frames, n_mels) float16, read-only. Raises UserError if its file is gone or cut off.

        A plain read, because a mapped file that is cut off under a running job kills the process with SIGBUS.
        """
        path, size = self.paths[self.shard[i]], self.cfg.n_mels * 2
        try:
            with open(path, "rb") as f:
                f.seek((self.bounds[i] - self.first_frames[self.shard[i]]) * size)
                values = f.read(self.frames[i] * size)
        except OSError as e:
            raise self._gone(path, e.strerror) from None
        if len(values) < self.frames[i] * size:
            raise self._gone(path, "it was cut off")
        return np.frombuffer(values, np.float16).reshape(-1, self.cfg.n_mels)

    def split(self, name: str, cfg: Config) -> np.ndarray:
        """Indices of a split's utterances that fit into `cfg.block_size`, in corpus order."""
        of_split = np.array([i for i, s in enumerate(self.splits) if s == name], dtype=np.int64)
        return of_split[self.frames[of_split] <= cfg.block_size]
