"""
python -m pytest tests/test_corpus_check.py

Corpora that are broken, vanish or have no room: each ends in one clear line, for training and for `python data.py DIR`.
"""
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data import BAD, CFG, FILES, LENGTHS, SMALL, content, kill_at, make, noise, read_noise, tokenise, utterances

import audio
import data
from config import Config, UserError
from data import Corpus, TrainingSteps, Utterance, write_corpus
from model import T5_TOKENS

ROOT = Path(__file__).resolve().parent.parent
LOW, HIGH = data.log_mel_range(CFG)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus of 18 utterances in 4 shards. Copy it before you write into it."""
    return make(tmp_path_factory.mktemp("whole"), shard_utts=5)


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "copy")


def edit_index(folder, change):
    """Rewrite the index after change(rows), which may return other rows."""
    path = folder / "metadata" / "audio_index.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows), path)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_stats(folder, **values):
    edit_json(folder / "metadata" / "dataset_stats.json", **values)


def edit_frames(folder, shard, change):
    """Rewrite a shard's frames after change(frames), an array (frames, n_mels)."""
    path = folder / "mel_shards" / f"shard_{shard:03d}" / "logmel.float16.memmap"
    frames = np.fromfile(path, np.float16).reshape(-1, CFG.n_mels)
    change(frames)
    frames.tofile(path)


def message(folder, cfg=CFG):
    """The line that training refuses a corpus with, before its first step; None if it does not."""
    try:
        corpus = Corpus(str(folder), cfg)
        corpus.check()
        corpus.check_texts(tokenise, T5_TOKENS)
    except UserError as e:
        assert str(folder) in str(e) and len(str(e).splitlines()) == 1
        return str(e)


def report(folder, *flags):
    """Exit status and output lines of `python data.py folder`, in this process."""
    out = io.StringIO()
    flags = [*(f"--{k}={v}" for k, v in SMALL.items() if k not in ("mel_mean", "mel_std")), *flags]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = data.main([str(folder), *flags])
    return status, out.getvalue().splitlines()


# --- what opening sees

def swap(rows):
    rows[3], rows[4] = rows[4], rows[3]


@pytest.mark.parametrize("change, needles", [
    (lambda rows: rows[7].update(text=" "), ["no text", "1 utterance(s): 'u0007'"]),
    (lambda rows: [r | {"text": ""} for r in rows], ["no text", "18 utterance(s)", "'u0004', …"]),
    (lambda rows: rows[8].update(utt_id="u0002"), ["an id that another", "'u0002', 'u0002'"]),
    (lambda rows: rows[8].update(split="dev"), ["split other than train, val, test", "'u0008'"]),
    (lambda rows: rows[8].update(num_frames=0), ["num_frames", "'u0008'"]),
    (lambda rows: rows[8].update(num_frames=-3), ["num_frames", "'u0008'"]),
    (lambda rows: rows[8].update(num_frames=2**62), ["num_frames", "'u0008'"]),
    (lambda rows: rows[8].update(duration_sec=-1.0), ["duration_sec", "'u0008'"]),
    (lambda rows: rows[8].update(duration_sec=float("nan")), ["duration_sec", "'u0008'"]),
    (lambda rows: rows[8].update(text="Another text."), ["another corpus's statistics", "byt5_tokens"]),
    (lambda rows: rows[15].update(split="test"), ["another corpus's statistics", "splits"]),
    (lambda rows: rows[3].update(row=4), ["disagree", "order"]),
    (lambda rows: rows[3].update(shard=1), ["disagree", "order"]),
    (lambda rows: rows[17].update(shard=4), ["disagree", "4 shards", "order"]),
    (lambda rows: rows[0].update(shard=-1), ["disagree", "order"]),
    (swap, ["disagree", "order"]),
    (lambda rows: rows[:-1], ["another corpus's statistics", "num_utts is 18, not 17"]),
    (lambda rows: [{k: v for k, v in r.items() if k != "text"} for r in rows], ["cannot be used", "text"]),
    (lambda rows: rows[3].update(text=None), ["cannot be used", "empty"]),
    (lambda rows: [r | {"num_frames": 1.5} for r in rows], ["cannot be used"]),
])
def test_an_index_that_is_wrong(folder, change, needles):
    edit_index(folder, change)
    line = message(folder)
    assert all(needle in line for needle in [*needles, "audio_index" if "stat" not in needles[0] else "dataset_stats"]), line
    status, lines = report(folder)
    assert status == 2 and f"error: {line}" in lines


@pytest.mark.parametrize("values, needle", [
    ({"num_utts": 17}, "num_utts is 17, not 18"), ({"num_frames": None}, "num_frames is None"),
    ({"seconds": 1.0}, "seconds is 1.0"), ({"byt5_tokens": {}}, "byt5_tokens"), ({"byt5_tokens": 7}, "byt5_tokens is 7"),
    ({"mel_mean": float("nan")}, "mel_mean"), ({"mel_std": 0.0}, "mel_std"), ({"mel_std": float("inf")}, "mel_std"),
    ({"mel_std": -2.0}, "mel_std"), ({"mel_mean": "-5"}, "mel_mean"), ({"mel_mean": None}, "mel_mean"),
    ({"mel_mean": 10**400}, "mel_mean"), ({"mel_mean": []}, "mel_mean"), ({"num_utts": 10**400}, "num_utts"),
    ({"seconds": 10**400}, "seconds"),
])
def test_statistics_that_cannot_be_the_corpus_s(folder, values, needle):
    edit_stats(folder, **values)
    with pytest.raises(UserError, match=needle) as e:
        Corpus(str(folder), CFG)
    assert "dataset_stats.json" in str(e.value) and "\n" not in str(e.value)


def test_the_statistics_of_another_corpus(folder, tmp_path):
    other = make(tmp_path / "other", [30, 41, 52])
    shutil.copy(other / "metadata" / "dataset_stats.json", folder / "metadata")
    line = message(folder)
    assert "another corpus's statistics" in line and "num_utts is 7, not 18" in line and "num_frames is" in line


def test_statistics_need_not_be_complete_nor_exact(folder):
    path = folder / "metadata" / "dataset_stats.json"
    stats = json.loads(path.read_text())
    for name in ("splits", "characters", "byt5_tokens", "seconds", "rejected"):  # a corpus of another version may lack them
        del stats[name]
    path.write_text(json.dumps(stats | {"mel_mean": stats["mel_mean"] + 1e-5, "mel_std": stats["mel_std"] - 1e-5}))
    assert message(folder) is None


@pytest.mark.parametrize("change, needle", [
    (lambda d: (d / "shard_001").rename(d / "shard_007"), "has a shard_002 but no shard_001"),
    (lambda d: shutil.rmtree(d / "shard_003"), "3 shards"),
    (lambda d: shutil.rmtree(d), "0 shards"),
    (lambda d: shutil.copytree(d / "shard_003", d / "shard_004"), "[0, 0]"),
    (lambda d: edit_json(d / "shard_002" / "meta.json", num_utts=6), "shard_002/meta.json has [6, "),
    (lambda d: edit_json(d / "shard_002" / "meta.json", n_mels="8\n"), "n_mels is '8\\n' (config: 8)"),
    (lambda d: np.save(d / "shard_001" / "offsets.int64.npy", np.arange(5)), "offsets.int64.npy has [0, 1,"),
    (lambda d: np.save(d / "shard_001" / "lengths.int32.npy", np.ones((2, 2))), "lengths.int32.npy cannot be used"),
    (lambda d: (d / "shard_001" / "logmel.float16.memmap").write_bytes(b"12"), "has 2 bytes, expected"),
    (lambda d: (d / "shard_001" / "logmel.float16.memmap").unlink(), "logmel.float16.memmap cannot be used"),
])
def test_shards_that_do_not_add_up(folder, change, needle):
    change(folder / "mel_shards")
    assert needle in message(folder)


def test_a_folder_named_like_a_partition_changes_nothing(whole, tmp_path):
    assert message(shutil.copytree(whole, tmp_path / "split=1" / "x")) is None


# --- frames

def test_the_fingerprint_is_of_the_content(whole, tmp_path):
    corpus = Corpus(str(whole), CFG)
    frames = np.concatenate([corpus.mel(i) for i in range(18)])
    index = [corpus.ids, corpus.texts, corpus.splits, corpus.frames.tolist()]
    fingerprint = corpus.check()
    assert fingerprint == hashlib.sha256(json.dumps(index).encode() + frames.tobytes()).hexdigest()
    assert Corpus(str(make(tmp_path, shard_utts=3)), CFG).check() == fingerprint  # whatever the shards


@pytest.mark.parametrize("name, value", [("utt_id", "other"), ("text", "Text number 6!"), ("split", "val")])
def test_another_index_has_another_fingerprint(whole, folder, name, value):
    edit_index(folder, lambda rows: rows[6].update({name: value}))
    rows = pq.read_table(folder / "metadata" / "audio_index.parquet").to_pydict()
    columns = (rows[k] for k in ("text", "split", "num_frames", "duration_sec"))
    edit_stats(folder, **data.index_stats(*columns))
    assert Corpus(str(folder), CFG).check() != Corpus(str(whole), CFG).check()


def test_another_value_has_another_fingerprint(whole, folder):
    def change(frames):
        frames[7, 3] += np.float16(0.25)
    edit_frames(folder, 2, change)
    assert Corpus(str(folder), CFG).check() != Corpus(str(whole), CFG).check()


@pytest.mark.parametrize("block", [2, 20, 16 * 41, 2**23])
@pytest.mark.parametrize("value, kind", [
    (np.nan, "NaN"), (-np.nan, "NaN"), (np.inf, "NaN"), (-np.inf, "NaN"), (np.nextafter(LOW, np.float16(-20)), "outside"),
    (np.nextafter(HIGH, np.float16(20)), "outside"), (-60000.0, "outside"), (60000.0, "outside")])
def test_frames_that_no_sound_has(folder, monkeypatch, value, kind, block):
    monkeypatch.setattr(data, "BLOCK_BYTES", block)
    corpus = Corpus(str(folder), CFG)
    bounds = np.cumsum(corpus.frames)[5:9] - corpus.frames[:5].sum()  # where the second shard's utterances end

    def change(frames):
        frames[bounds[0], 0] = frames[bounds[1] - 1, 7] = frames[-1, 7] = value  # first and last of one; last of the shard
    edit_frames(folder, 1, change)
    with pytest.raises(UserError) as e:
        corpus.check()
    assert f"log-mels {kind}" in str(e.value) and "2 utterance(s): 'u0006', 'u0009';" in str(e.value)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


def test_the_extremes_of_sound_are_allowed(folder):
    def change(frames):
        frames[0], frames[1] = LOW, HIGH
    edit_frames(folder, 1, change)
    corpus = Corpus(str(folder), CFG)
    problems = []
    corpus.check(problems.append)
    assert len(problems) <= 1 and "mel_mean" in str(problems)  # the statistics have changed, and nothing else is wrong


@pytest.mark.parametrize("cfg", [CFG, Config()])
def test_the_range_holds_what_sounds_can_be(cfg):
    low, high = data.log_mel_range(cfg)
    time_axis = np.arange(cfg.sample_rate) / cfg.sample_rate
    sounds = [np.sign(np.sin(2 * np.pi * f * time_axis)) for f in (50, 437, 3000)]
    sounds += [np.random.default_rng(0).choice([-1.0, 1.0], cfg.sample_rate), np.zeros(cfg.sample_rate), np.ones(cfg.sample_rate)]
    mels = [audio.log_mel(10 * s.astype(np.float32), cfg).half() for s in sounds]
    assert min(m.min() for m in mels) == low and max(m.max() for m in mels) <= high
    assert any((audio.log_mel(32768 * s.astype(np.float32), cfg).half() > high).any() for s in sounds)


@pytest.mark.parametrize("name", ["mel_mean", "mel_std"])
def test_a_mean_or_deviation_that_is_not_the_frames_one(folder, name):
    stats = json.loads((folder / "metadata" / "dataset_stats.json").read_text())
    edit_stats(folder, **{name: stats[name] * 1.01})
    Corpus(str(folder), CFG)
    line = message(folder)
    assert "another corpus's statistics" in line and f"{name} is {stats[name] * 1.01:.6}"[:14] in line


def test_texts_longer_than_the_encoder_reads(whole):
    corpus = Corpus(str(whole), CFG)
    longest = max(len(tokenise(t)) for t in corpus.texts)
    few = [i for i, t in zip(corpus.ids, corpus.texts) if len(tokenise(t)) == longest]
    corpus.check_texts(tokenise, longest)
    corpus.check_texts(tokenise, None)
    with pytest.raises(UserError) as e:
        corpus.check_texts(tokenise, longest - 1)
    assert f"reads {longest - 1} tokens" in str(e.value) and f"up to {longest} " in str(e.value)
    assert f"{len(few)} utterance(s): '{few[0]}'" in str(e.value)
    # an utterance that block_size keeps out cannot disturb
    Corpus(str(whole), Config(**SMALL | {"block_size": 29})).check_texts(tokenise, 1)


# --- a corpus that changes while it is read

def frames_file(corpus, i):
    return corpus.shards[corpus.shard[i]][0]


@pytest.mark.parametrize("what", ["vanished", "cut off", "replaced"])
def test_a_corpus_that_goes_away(folder, what):
    corpus = Corpus(str(folder), CFG)
    path = frames_file(corpus, 6)
    before = corpus.mel(6).copy()
    if what == "vanished":
        path.unlink()
    elif what == "cut off":
        os.truncate(path, 1000)
    else:  # prepared anew: as long as before, and other frames in it
        frames = path.read_bytes()
        path.unlink()
        (path.parent / "new").write_bytes(frames[::-1])
        (path.parent / "new").rename(path)
        os.utime(path, (2, 2))
    with pytest.raises(UserError, match=f"the corpus at {folder} can no longer be read: {path}") as e:
        corpus.mel(7)
    assert "\n" not in str(e.value) and ("No such file" if what == "vanished" else "cut off or changed") in str(e.value)
    if what != "replaced":
        with pytest.raises(UserError, match="can no longer be read"):
            corpus.check()
    assert np.array_equal(corpus.mel(0), Corpus.mel(corpus, 0)) and before.shape == (corpus.frames[6], CFG.n_mels)


def steps_of(corpus, **options):
    return TrainingSteps(corpus, Config(**SMALL | options), tokenise, 0, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_whose_corpus_vanishes(folder, workers):
    corpus = Corpus(str(folder), CFG)
    loader = data.training_loader(steps_of(corpus, max_steps=1000), 0, workers)
    next(loader)
    shutil.rmtree(folder)
    with pytest.raises(UserError) as e:
        for _ in range(50):  # a few were made ahead of time
            next(loader)
    assert str(e.value).startswith(f"the corpus at {folder} can no longer be read: {folder}") and "\n" not in str(e.value)
    assert list(loader) == []


class Faulty(TrainingSteps):
    """Steps of which the third meets a fault in the process that makes it."""

    def __init__(self, corpus, fault):
        super().__init__(corpus, Config(**SMALL | {"max_steps": 1000}), tokenise, 0, 1)
        self.fault, self.home = fault, os.getpid()

    def __getitem__(self, step):
        if step == 2 and os.getpid() != self.home:
            self.fault()
        return super().__getitem__(step)


def no_room():
    """As if /dev/shm were full: files there can have a kilobyte and no more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))


@pytest.fixture
def impatient(monkeypatch):
    """torch looks after its workers every 5 s; here, more often."""
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(loader._try_get_data, "__defaults__", (0.2,))


@pytest.mark.parametrize("fault, found", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), ""), (lambda: os._exit(0), ""), (no_room, "File too large")])
def test_a_loader_process_that_dies(whole, impatient, fault, found):
    loader = data.training_loader(Faulty(Corpus(str(whole), CFG), fault), 0, workers=1)
    with pytest.raises(UserError, match="data loader process") as e:
        for _ in range(10):
            next(loader)
    assert found in str(e.value) and "/dev/shm" in str(e.value) and "--resume latest" in str(e.value)
    assert "\n" not in str(e.value)


def test_no_memory_for_a_loader_process(whole, monkeypatch):
    def fork():
        raise OSError(12, "Cannot allocate memory")
    monkeypatch.setattr(os, "fork", fork)
    loader = data.training_loader(steps_of(Corpus(str(whole), CFG)), 0, workers=1)
    with pytest.raises(UserError, match="data loader process .*Cannot allocate memory"):
        next(loader)


def test_a_death_is_told_when_the_next_batch_is_asked_for(whole, impatient):
    before, (here, there) = set(multiprocessing.active_children()), multiprocessing.Pipe()

    def die_when_told():
        there.recv()
        os.kill(os.getpid(), signal.SIGKILL)
    loader = data.training_loader(Faulty(Corpus(str(whole), CFG), die_when_told), 0, workers=1)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    here.send("now")
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
    for _ in range(1000):  # a handler of SIGCHLD would have run by now, in the middle of a step
        pass
    with pytest.raises(UserError, match="data loader process"):
        for _ in range(10):
            next(loader)


def test_an_error_of_the_code_keeps_its_traceback(whole):
    def bug():
        raise RuntimeError("a bug")
    loader = data.training_loader(Faulty(Corpus(str(whole), CFG), bug), 0, workers=1)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*a bug"):
        list(loader)
    assert not multiprocessing.active_children()


def test_a_failed_run_does_not_wait_for_its_loader(whole):
    script = """if True:
        import sys, data, test_corpus_check as t
        loader = data.training_loader(t.steps_of(data.Corpus(sys.argv[1], t.CFG), max_steps=1000), 0, workers=1)
        next(loader)
        cycle = [loader]
        cycle.append(cycle)  # as exceptions make them: nothing closes the loader before Python ends
        del loader, cycle
        sys.exit("failed")"""
    result = subprocess.run([sys.executable, "-c", script, str(whole)], cwd=ROOT, capture_output=True, text=True, timeout=120,
                            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert result.returncode == 1 and result.stderr.splitlines()[-1] == "failed"


def test_signals_to_the_group_leave_the_loader_alone(whole):
    before = set(multiprocessing.active_children())
    loader = data.training_loader(steps_of(Corpus(str(whole), CFG), max_steps=30), 0, workers=1)
    next(loader)
    (worker,) = set(multiprocessing.active_children()) - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker.pid, number)
    assert len(list(loader)) == 29


def test_a_step_s_utterances(whole):
    corpus = Corpus(str(whole), CFG)
    parts = [TrainingSteps(corpus, Config(**SMALL | {"batch_size": 4, "nproc": 2, "silence_prob": 0.0}), tokenise, rank, 2)
             for rank in range(2)]
    lengths = dict(zip(corpus.ids, corpus.frames.tolist()))
    for step in (3, 0, 1):
        names = parts[1].utterances(step)
        assert names == parts[0].utterances(step) and len(set(names)) == 8
        found = [n for micro in range(2) for part in parts for n in part[step][micro]["mel_lengths"].tolist()]
        assert [lengths[name] for name in names] == found


# --- preparation without room

JOB = [*utterances(LENGTHS), BAD[0]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "x"
    write_corpus(str(out), JOB, read_noise, CFG, workers=1, shard_utts=2)
    return content(out)


def prepare_in(pipe, out, limit):
    """Prepare in a process whose files can have `limit` bytes; send the error's line."""
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_corpus(out, JOB, read_noise, CFG, workers=1, shard_utts=2)
            pipe.send(None)
        except UserError as e:
            pipe.send(str(e))


# The largest files: job 64 bytes, frames up to 944 bytes a shard, .npy 136 and 144, rows.json about 300, index 4 kB.
@pytest.mark.parametrize("limit", [0, 63, 100, 140, 250, 700, 900, 2000])
def test_a_full_disk_ends_preparation_in_a_line(tmp_path, undisturbed, limit):
    out, (here, there) = tmp_path / "x", multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=prepare_in, args=(there, str(out), limit), daemon=True)
    process.start()
    assert here.poll(60)
    line = here.recv()
    process.join(60)
    assert process.exitcode == 0
    assert f"cannot write to {out}.partial (" in line and "File too large" in line and len(line.splitlines()) == 1
    assert "finished shards are kept" in line and "same command" in line and not out.exists()
    done = len(list(Path(f"{out}.partial").glob("mel_shards/shard_???")))
    read, asked = asking()
    write_corpus(str(out), JOB, read, CFG, workers=1, shard_utts=2)
    assert len(asked) <= 8 - 2 * done + 2 and content(out) == undisturbed  # the shard with the bad one is made again


def asking():
    asked = []

    def read(source, sample_rate):
        asked.append(source)
        return read_noise(source, sample_rate)
    return read, asked


@pytest.mark.parametrize("frames, largest", [([300], 4800), ([0] * 400, 128 + 8 * 400)])  # of the log-mels, the offsets
def test_files_are_never_cut_off_in_silence(tmp_path, frames, largest):
    """np.save and tofile lose what is in C's buffer when a disk is full, without an error; nothing here uses them."""
    mels = [np.zeros((n, CFG.n_mels), np.float16) for n in frames]
    for size in range(0, 6000, 400):
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=shard_within, args=(there, tmp_path / f"{size}", size, mels))
        process.start()
        assert here.poll(60)
        written = here.recv()
        process.join(60)
        assert written == (size >= largest), size
        assert (tmp_path / f"{size}").exists() == written


def shard_within(pipe, shard, size, mels):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        data.write_shard(shard, mels, [], CFG)
        pipe.send(True)
    except OSError:
        pipe.send(False)


def test_a_folder_that_turns_read_only_at_any_moment(tmp_path, undisturbed):
    for moment in range(200):
        out = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as mp:
            done = kill_at(mp, moment, functools.partial(OSError, 30, "Read-only file system"))
            try:
                write_corpus(str(out), JOB, read_noise, CFG, workers=1, shard_utts=2)
                break
            except UserError as e:
                assert "cannot write" in str(e) and "(Read-only file system)" in str(e) or "cannot write to" in str(e), done
                assert "\n" not in str(e) and str(out) in str(e)
        assert not out.exists()
        write_corpus(str(out), JOB, read_noise, CFG, workers=1, shard_utts=2)
        assert content(out) == undisturbed, done
    assert moment > 30


@pytest.mark.parametrize("gain", [1e3, 1e25])  # samples as 16-bit integers, and beyond what float32 can square
def test_sounds_that_no_corpus_may_hold_are_rejected(tmp_path, gain):
    def read(source, sample_rate):
        return noise(30) * np.float32(gain if source == "31 1" else 1)
    write_corpus(str(tmp_path / "x"), utterances([30, 31, 32]), read, CFG, workers=1)
    (rejected,) = (tmp_path / "x" / "metadata" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["reason"].startswith("too loud: samples up to")
    assert message(tmp_path / "x") is None


def test_blank_texts_and_unknown_splits_are_not_written(tmp_path):
    with pytest.raises(UserError, match="unknown split 'dev'; expected train, val, test"):
        write_corpus(str(tmp_path / "x"), [*JOB, Utterance("d", "Text.", "dev", "30 1")], read_noise, CFG, workers=1)
    stats = write_corpus(str(tmp_path / "x"), [*JOB, Utterance("d", " ", "train", "30 1")], read_noise, CFG, workers=1)
    assert stats["rejected"] == 2 and message(tmp_path / "x") is None


# --- the command

def test_the_command_on_a_good_corpus(whole):
    status, lines = report(whole, "--block_size", "45")
    text = "\n".join(lines)
    assert not status and "14 training utterances" not in text and "training utterances" in lines[0]
    longer = sum(Corpus(str(whole), CFG).frames > 45)
    assert f"{longer} of 18 utterances are longer than block_size = 45" in text and "0 were rejected" in text
    assert f"nothing wrong; fingerprint {Corpus(str(whole), CFG).check()[:12]}" in text and "frames/s" in text


def test_the_command_tells_all_that_is_wrong(folder):
    edit_index(folder, lambda rows: (rows[2].update(text=""), rows[9].update(split="dev")) and None)
    os.truncate(folder / "mel_shards" / "shard_000" / "logmel.float16.memmap", 100)
    np.save(folder / "mel_shards" / "shard_002" / "offsets.int64.npy", np.zeros(5, np.int64))

    def change(frames):
        frames[0, 0] = np.nan
    edit_frames(folder, 1, change)
    edit_frames(folder, 3, change)
    command = [sys.executable, "data.py", str(folder), *(f"--{k}={v}" for k, v in SMALL.items())]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and all(line.startswith("error: ") for line in lines), result
    for needle in ("no text for 1 utterance(s): 'u0002'", "split other than train, val, test for 1 utterance(s): 'u0009'",
                   "shard_000/logmel.float16.memmap has 100 bytes", "shard_002/offsets.int64.npy", "another corpus's",
                   "log-mels NaN or infinite in 2 utterance(s): 'u0005', 'val1'"):
        assert sum(needle in line for line in lines) == 1, (needle, lines)
    assert len(lines) == 6


# --- fuzz: whatever a file holds, there is success or one clear line

NASTY = [None, True, "", "x\ny", "5", -1, 0, 3, 2**31, 2**63, 10**400, 0.5, 1e300, float("nan"), float("inf"), [], {}, [[1]],
         {"a": None}, "\ud800", "\0"]
COLUMNS = data.INDEX.names


def mutate_json(draw, path):
    value = json.loads(path.read_text())
    inner = value
    while True:
        key = draw(st.sampled_from(sorted(inner)))
        if not isinstance(inner[key], dict) or draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = draw(st.sampled_from(NASTY))
    if draw(st.booleans()):
        del inner[key]
    path.write_text(draw(st.sampled_from([json.dumps(value), json.dumps(value), "[" * 10**5, f"[{json.dumps(value)}]",
                                          json.dumps(list(value.items()))])))


def mutate_parquet(draw, path):
    table = pq.read_table(path)
    kind = draw(st.sampled_from(["drop columns", "take rows", "value", "null", "type", "rename"]))
    name = draw(st.sampled_from(COLUMNS))
    n = table.column_names.index(name)
    if kind == "drop columns":
        table = table.drop_columns(draw(st.sets(st.sampled_from(COLUMNS), min_size=1)))
    elif kind == "take rows":
        table = table.take(draw(st.lists(st.integers(0, len(table) - 1), max_size=20)) or pa.array([], pa.int64()))
    elif kind == "rename":
        table = table.rename_columns([draw(st.sampled_from([c, name, "x"])) for c in table.column_names])
    elif kind == "type":
        to = draw(st.sampled_from([pa.string(), pa.large_string(), pa.binary(), pa.float32(), pa.int32(), pa.uint8(), "list",
                                   "dictionary", pa.null()]))
        column = table[name].combine_chunks()
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            column = (pa.array([[v] for v in column.to_pylist()]) if to == "list" else pc.dictionary_encode(column)
                      if to == "dictionary" else pa.nulls(len(table)) if to == pa.null() else column.cast(to))
        table = table.set_column(n, name, column)
    else:
        values = table[name].to_pylist()
        of_type = {str: st.text(max_size=5), int: st.integers(-2**63, 2**63 - 1) | st.integers(-3, 40), float: st.floats()}
        for row in draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=3)):
            values[row] = None if kind == "null" else draw(of_type[type(values[0])])
        table = table.set_column(n, name, pa.array(values, table.schema.field(name).type))
    pq.write_table(table, path)


def mutate_bytes(draw, path, others):
    """Flip, cut, lengthen, replace or delete: what disks, copies and people do to files."""
    whole = path.read_bytes()
    kind = draw(st.sampled_from(["flip", "noise", "cut", "append", "another file's", "empty", "delete", "folder"]))
    place = draw(st.integers(0, max(0, len(whole) - 1)) | st.integers(max(0, len(whole) - 200), max(0, len(whole) - 1)))
    if kind == "flip":
        changed = bytearray(whole)
        changed[place:place + 1] = bytes(b ^ draw(st.integers(1, 255)) for b in changed[place:place + 1])
        whole = bytes(changed)
    elif kind == "noise":
        random.Random(place).shuffle(changed := bytearray(whole[place:place + 64]))
        whole = whole[:place] + bytes(changed) + whole[place + 64:]
    elif kind == "cut":
        whole = whole[:place]
    elif kind == "append":
        whole += draw(st.binary(min_size=1, max_size=64)) if draw(st.booleans()) else whole
    elif kind == "another file's":
        whole = draw(st.sampled_from(others)).read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "delete":
        path.write_bytes(b"" if kind == "empty" else whole)


def mutate(draw, path, files):
    if path.suffix == ".json" and draw(st.booleans()):
        mutate_json(draw, path)
    elif path.suffix == ".parquet" and draw(st.booleans()):
        mutate_parquet(draw, path)
    else:
        mutate_bytes(draw, path, files)


FUZZ = int(os.environ.get("FUZZ", 150))  # examples a test; FUZZ=20000 for a night


@contextlib.contextmanager
def restored(*paths):
    """Within this, files may be changed, deleted or replaced by folders."""
    before = {path: path.read_bytes() for path in paths}
    try:
        yield
    finally:
        for path, content in before.items():
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            path.write_bytes(content)


@pytest.fixture(scope="module")
def fuzzed(whole, tmp_path_factory):
    return shutil.copytree(whole, tmp_path_factory.mktemp("fuzzed") / "x")


@given(st.data())
@settings(max_examples=FUZZ)
def test_fuzzed_corpora(fuzzed, whole, choice):
    names = sorted(content(whole))
    chosen = choice.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    with restored(*(fuzzed / name for name in chosen)):
        for name in chosen:
            mutate(choice.draw, fuzzed / name, [whole / name for name in names])
        line = message(fuzzed)
        status, lines = report(fuzzed)
        assert (status == 2) == (line is not None), (line, lines)
        if line:
            assert all(text.startswith("error: ") for text in lines)
            assert any(text.startswith(f"error: {line.split(' at 0x')[0]}") for text in lines)
            return
        corpus = Corpus(str(fuzzed), CFG)
        mels = [corpus.mel(i) for i in range(len(corpus))]
        assert [m.shape for m in mels] == [(n, CFG.n_mels) for n in corpus.frames]
        batch = data.collate(corpus, np.arange(min(4, len(corpus))), CFG, tokenise, 0)
        assert torch.isfinite(batch["mel"]).all()


@given(st.data())
@settings(max_examples=FUZZ)
def test_a_corpus_fuzzed_while_it_is_open(fuzzed, whole, choice):
    corpus = Corpus(str(fuzzed), CFG)
    path = frames_file(corpus, 6)
    with restored(path):
        mutate_bytes(choice.draw, path, [whole / name for name in FILES])
        for call in [corpus.check, *(lambda i=i: corpus.mel(i) for i in range(len(corpus)))]:
            try:
                call()
            except UserError as e:
                assert len(str(e).splitlines()) == 1 and str(fuzzed) in str(e)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")) |
       st.lists(st.lists(st.text("a./\\\0\r\u2028\"' ", max_size=4), max_size=4).map("|".join)).map("\n".join).map(str.encode))
@example(b"\xef\xbb\xbf")
@example(b"a\rb|x\na\rb|y")
@settings(max_examples=FUZZ)
def test_fuzzed_metadata(tmp_path_factory, prepare, content):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "metadata.csv").write_bytes(content)
    try:
        some = prepare.read_metadata(folder)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and str(folder) in str(e)
    else:
        assert len({u.utt_id for u in some}) == len(some) > 0 and all(u.split in data.SPLITS for u in some)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), pytest.raises(UserError, match="none of"):
            write_corpus(str(folder / "x"), some, audio.read_wav, CFG, workers=1)  # no wavs: all are rejected, each in a line
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("ljspeech_prepare", ROOT / "data" / "ljspeech" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
