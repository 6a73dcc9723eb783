"""
python -m pytest tests/test_corpus.py

The corpus on disk: written whole or not at all, read back, and refused in one clear line if anything about it is wrong.
"""
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_common import full_disk

import audio
import corpus as corpus_module
import data
from common import UserError
from config import Config
from corpus import AUDIO_FIELDS, FRAMES_FILE, INDEX, SPLITS, Corpus, Utterance, hash_splits, write_corpus

SMALL = dict(sample_rate=16000, n_fft=256, hop_length=64, win_length=256, n_mels=8, f_max=8000.0, mel_mean=-4.0, mel_std=2.0,
             silence_prob=0.5, max_silence_sec=0.1, batch_size=8, effective_batch_size=8, max_steps=12)
CFG = Config(**SMALL)
HOP = CFG.hop_length
LOW, HIGH = audio.log_mel_range(CFG)
BAD = [Utterance("b1", "No sound.", "train", "bad luck"), Utterance("b2", " ", "train", "30 1"),
       Utterance("b3", "Too short.", "train", "0 1"), Utterance("b4", "As integers.", "train", "30 4 1e3"),
       Utterance("b5", "Beyond float32 when squared.", "train", "30 5 1e25")]


def tokenise(text):
    return [byte + 3 for byte in text.encode()] + [1]


def noise(frames, seed=0):
    """A wav of `frames` hops and a few samples more, different for each seed."""
    return np.random.default_rng([frames, seed]).uniform(-1, 1, frames * HOP + 17).astype(np.float32)


def read_noise(source, sample_rate):
    """The read function of these corpora. The source 'frames seed [gain]' gives noise, and 'bad' gives an AudioError."""
    if source.startswith("bad"):
        raise audio.AudioError(source)
    frames, seed, *gain = source.split()
    return noise(int(frames), int(seed)) * np.float32(gain[0] if gain else 1)


def utterances(lengths, split="train"):
    return [Utterance(f"u{n:04d}", f"Text number {n}.", split, f"{frames} {n}") for n, frames in enumerate(lengths)]


def write(out, job, read=read_noise, cfg=CFG, shard_utts=2, **options):
    return write_corpus(str(out), job, read, cfg, workers=1, shard_utts=shard_utts, **options)


def make(folder, lengths=(30, 41, 52, 33, 34, 45, 46, 37, 58, 39, 50, 31, 62, 43), **options):
    some = utterances(lengths)
    some += [Utterance(f"{s}{n}", f"Held out {n}.", s, f"{40 + n} 7") for s in ("val", "test") for n in range(2)]
    write(folder / "corpus", some, **options)
    return folder / "corpus"


def content(folder):
    """Every file below a folder: relative path -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A corpus of 18 utterances in 4 shards. Copy it before you write into it."""
    return make(tmp_path_factory.mktemp("whole"), shard_utts=5)


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "split=1" / "copy")  # Parquet's readers can take such a name for a partition


# --- splits

@given(st.sets(st.text(max_size=8), max_size=100), st.integers(0, 9), st.integers(0, 9), st.randoms())
def test_hash_splits_do_not_depend_on_the_order(ids, val, test, random):
    ids = sorted(ids)
    splits = hash_splits(ids, val, test)
    count, most = Counter(splits.values()), max(1, len(ids) // 20)
    assert sorted(splits) == ids and set(count) <= set(SPLITS)
    assert count["val"] == min(val, most, len(ids)) and count["test"] == min(test, most, len(ids) - count["val"])
    random.shuffle(ids)
    assert hash_splits(ids, val, test) == splits


def test_hash_splits_of_ljspeech_and_of_the_smallest_corpora():
    splits = hash_splits([f"LJ{n // 300:03d}-{n % 300:04d}" for n in range(13_100)])
    assert Counter(splits.values()) == {"train": 12_500, "val": 100, "test": 500}
    # These must never change, so that all versions of the repo measure error rates on the same sentences.
    assert sorted(i for i, s in splits.items() if s == "val")[:3] == ["LJ001-0196", "LJ001-0204", "LJ001-0209"]
    for count in (3, 4, 39):
        assert Counter(hash_splits([f"line_{n:06d}" for n in range(count)]).values()) == {
            "train": count - 2, "val": 1, "test": 1}


# --- writing

@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=8)
def test_what_is_written_is_read(tmp_path_factory, lengths, shard_utts):
    out, job = tmp_path_factory.mktemp("corpus") / "x", utterances(lengths)
    stats, corpus = write(out, job, shard_utts=shard_utts), Corpus(str(out), CFG)
    mels = [audio.log_mel(noise(frames, n), CFG).numpy().astype(np.float16) for n, frames in enumerate(lengths)]
    assert len(corpus) == len(lengths) and corpus.frames.tolist() == lengths
    assert corpus.texts == [u.text for u in job] and corpus.splits == ["train"] * len(lengths)
    for i, mel in enumerate(mels):
        assert corpus.mel(i).dtype == np.float16 and np.array_equal(corpus.mel(i), mel)
    with pytest.raises(ValueError, match="read-only"):
        corpus.mel(0)[0, 0] = 1
    values = np.concatenate(mels).astype(np.float64)
    assert stats == corpus.stats and corpus.mel_stats == pytest.approx((values.mean(), values.std()))
    assert stats["num_frames"] == sum(lengths) and stats["num_utts"] == len(lengths) and stats["rejected"] == 0
    assert stats["seconds"] == pytest.approx(sum(lengths) * HOP / CFG.sample_rate)
    assert stats["byt5_tokens"]["total"] == sum(len(tokenise(u.text)) for u in job)
    assert corpus.characters == "".join(sorted(set("".join(u.text for u in job))))


def test_the_files_are_those_of_the_format(tmp_path):
    out = make(tmp_path, shard_utts=10)
    assert os.listdir(tmp_path) == ["corpus"]
    assert sorted(content(out)) == sorted(
        [f"mel_shards/shard_{n:03d}/{name}" for n in range(2)
         for name in (FRAMES_FILE, "lengths.int32.npy", "offsets.int64.npy", "meta.json")] +
        [f"metadata/{name}" for name in ("audio_index.parquet", "dataset_stats.json", "rejected.jsonl")])
    shard = out / "mel_shards" / "shard_001"
    meta = json.loads((shard / "meta.json").read_text())
    lengths, offsets = np.load(shard / "lengths.int32.npy"), np.load(shard / "offsets.int64.npy")
    assert {k: meta[k] for k in AUDIO_FIELDS} == {k: getattr(CFG, k) for k in AUDIO_FIELDS}
    assert meta["num_utts"] == len(lengths) == len(offsets) == 8 and meta["num_frames"] == lengths.sum()
    assert lengths.dtype == np.int32 and offsets.dtype == np.int64
    assert offsets.tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert (shard / FRAMES_FILE).stat().st_size == lengths.sum() * CFG.n_mels * 2
    rows = pq.read_table(out / "metadata" / "audio_index.parquet").to_pylist()
    assert len(rows) == 18 and set(rows[0]) == set(INDEX.names) and [r["utt_id"] for r in rows[:2]] == ["u0000", "u0001"]
    assert rows[0]["duration_sec"] == 30 * HOP / CFG.sample_rate


def test_bad_utterances_are_listed_and_left_out(tmp_path, capsys):
    some = utterances([30, 40])
    stats = write(tmp_path / "x", [*BAD[:2], some[0], *BAD[2:], some[1]])  # the first shard holds only bad ones
    assert stats["rejected"] == 5 and stats["num_utts"] == 2
    rejected = [json.loads(line) for line in (tmp_path / "x/metadata/rejected.jsonl").read_text().splitlines()]
    assert [(r["utt_id"], r["reason"].split(":")[0]) for r in rejected] == [
        ("b1", "bad luck"), ("b2", "empty text"), ("b3", "zero length"), ("b4", "too loud"), ("b5", "too loud")]
    assert "skipped b1: bad luck" in capsys.readouterr().out
    corpus = Corpus(str(tmp_path / "x"), CFG)
    assert corpus.ids == ["u0000", "u0001"] and corpus.frames.tolist() == [30, 40]
    assert np.array_equal(corpus.mel(1), audio.log_mel(noise(40, 1), CFG).half()) and corpus.check() == stats["sha256"]


@pytest.mark.parametrize("job, reason, options", [
    (BAD, "none of 5", {}), ([], "none of 0", {}), (utterances([30], "val"), "none of 1", {}),
    (utterances([30]) * 2, "'u0000' occurs 2 times", {}), ([*utterances([30]), BAD[0]], "b1: bad luck", {"strict": True})])
def test_a_corpus_that_cannot_be_used_is_not_written(tmp_path, job, reason, options):
    with pytest.raises(UserError, match=reason):
        write(tmp_path / "x", job, **options)
    assert not (tmp_path / "x").exists()


def test_rejected_files_are_tried_again(tmp_path):
    wavs, job = {}, utterances([30, 40, 50, 60])

    def read(source, sample_rate):
        if source not in wavs:
            raise audio.AudioError(f"missing file {source}")
        return wavs[source]
    for strict, reason in ((True, "u0000: missing file"), (False, "none of 4"), (True, "u0000: missing file")):
        with pytest.raises(UserError, match=reason):
            write(tmp_path / "x", job, read, strict=strict)
    wavs.update({u.source: noise(30) for u in job})
    assert write(tmp_path / "x", job, read)["num_utts"] == 4


def test_an_existing_corpus_is_replaced_only_with_force(tmp_path):
    out = make(tmp_path, [30, 40])
    before = content(out)
    with pytest.raises(UserError, match="--force"):
        make(tmp_path, [50])
    assert content(out) == before
    make(tmp_path, [50], force=True)
    assert Corpus(str(out), CFG).frames[0] == 50 and os.listdir(tmp_path) == ["corpus"]


def test_a_corpus_needs_a_folder_and_a_worker(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", tmp_path / "file"):
        with pytest.raises(UserError, match=str(out)):
            write(out, utterances([30]))
    with pytest.raises(UserError, match="workers = 0: must be at least 1"):
        write_corpus(f"{tmp_path}/new/x", utterances([30]), read_noise, CFG, workers=0)
    write(f"{tmp_path}/new/x/", utterances([30]))  # a slash at the end changes nothing
    assert os.listdir(tmp_path / "new") == ["x"] and len(Corpus(f"{tmp_path}/new/x/", CFG)) == 1


# --- interruptions and full disks

LENGTHS = [20, 31, 42, 23, 34]
JOB = [*utterances(LENGTHS), BAD[0]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "x"
    write(out, JOB)
    return content(out)


def interrupted_at(item):
    """A read function that is interrupted at its call number `item`, and the list of the sources that it was called with."""
    asked = []

    def read(source, sample_rate):
        asked.append(source)
        if len(asked) == item + 1:
            raise KeyboardInterrupt
        return read_noise(source, sample_rate)
    return read, asked


@pytest.mark.parametrize("item", range(len(JOB)))
def test_an_interrupted_preparation_goes_on_after_its_last_shard(tmp_path, undisturbed, item, capsys):
    out = tmp_path / "x"
    with pytest.raises(KeyboardInterrupt):
        write(out, JOB, interrupted_at(item)[0])
    assert not out.exists()
    with pytest.raises(UserError, match="unfinished"):
        Corpus(str(out), CFG)
    read, asked = interrupted_at(99)
    write(out, JOB, read)
    assert len(asked) == len(JOB) - item // 2 * 2  # utterances of finished shards are not read again
    assert ("resuming" in capsys.readouterr().out) == (item >= 2)
    assert content(out) == undisturbed and os.listdir(tmp_path) == ["x"]


OPERATIONS = [(Path, "mkdir"), (Path, "unlink"), (Path, "write_text"), (Path, "write_bytes"), (os, "rename"), (os, "replace"), (shutil, "rmtree"),
              (pq, "write_table")]


def fail_at(mp, moment, error):
    """Raise error() instead of doing the file operation number `moment`. Returns the list of the operations so far."""
    asked = []

    def wrap(original):
        def operation(*args, **kwargs):
            asked.append(original.__name__)
            if len(asked) == moment + 1:
                raise error()
            return original(*args, **kwargs)
        return operation
    for owner, name in OPERATIONS:
        mp.setattr(owner, name, wrap(getattr(owner, name)))
    return asked


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt, functools.partial(OSError, 30, "Read-only file system")],
                         ids=["killed", "read-only"])
def test_a_preparation_that_fails_between_any_two_file_operations_goes_on(tmp_path, undisturbed, error):
    for moment in range(200):
        out = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as mp:
            asked = fail_at(mp, moment, error)
            try:
                write(out, JOB)
            except KeyboardInterrupt:
                pass
            except UserError as e:
                assert "cannot write" in str(e) and "Read-only file system" in str(e) and str(out) in str(e), asked
        if len(asked) <= moment:
            break
        if not out.exists():  # only a failure to clean up leaves a whole corpus
            write(out, JOB)
        assert content(out) == undisturbed, f"failed after operation {moment} ({asked[-3:]})"
    assert moment > 25


# The largest files: job 64 bytes, frames about 1000 bytes per shard, .npy 136 and 144, rows.json about 300, index 4 kB.
@pytest.mark.parametrize("room", [0, 63, 100, 140, 250, 700, 900, 2000])
def test_a_full_disk_ends_a_preparation_in_one_line(tmp_path, undisturbed, room):
    out = tmp_path / "x"
    with full_disk(room), pytest.raises(UserError, match=f"cannot write {out}.partial.*File too large; finished shards"):
        write(out, JOB)
    assert not out.exists()
    done = len(list(Path(f"{out}.partial").glob("mel_shards/shard_???")))
    read, asked = interrupted_at(99)
    write(out, JOB, read)
    assert len(asked) <= len(JOB) - 2 * done + 2 and content(out) == undisturbed  # the shard with the bad one is made again


@pytest.mark.parametrize("frames, largest", [([300], 4800), ([0] * 400, 128 + 8 * 400)])  # bytes of the log-mels, the offsets
def test_a_full_disk_never_cuts_off_a_file_silently(tmp_path, frames, largest):
    """np.save and tofile can lose the end of a file on a full disk without an error, so nothing here uses them."""
    mels = [np.zeros((n, CFG.n_mels), np.float16) for n in frames]
    for room in range(0, 6000, 400):
        with full_disk(room), contextlib.suppress(UserError):
            corpus_module.write_shard(tmp_path / f"{room}", mels, [], CFG)
        assert (tmp_path / f"{room}").exists() == (room >= largest), room


@pytest.mark.parametrize("changed, cfg, shard_utts", [
    ({"source": "30 9"}, CFG, 2), ({"text": "Another text."}, CFG, 2), ({}, Config(**SMALL | {"f_max": 7000.0}), 2), ({}, CFG, 3)],
    ids=["source", "text", "config", "shards"])
def test_another_job_uses_nothing_of_an_unfinished_one(tmp_path, changed, cfg, shard_utts):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "x", utterances(LENGTHS), interrupted_at(4)[0])
    job = [dataclasses.replace(u, **changed) for u in utterances(LENGTHS)]
    for name in ("x", "y"):
        read, asked = interrupted_at(99)
        write(tmp_path / name, job, read, cfg, shard_utts)
        assert len(asked) == len(job)
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_two_processes_cannot_prepare_the_same_corpus(tmp_path):
    def read(source, sample_rate):
        if source == "42 2":  # in the second shard
            before = content(tmp_path)
            for job in (utterances(LENGTHS), utterances([30])):  # the same job, and another one
                with pytest.raises(UserError, match="another process is preparing"):
                    write(tmp_path / "x", job)
            assert content(tmp_path) == before
        return read_noise(source, sample_rate)
    write(tmp_path / "x", utterances(LENGTHS), read)
    assert Corpus(str(tmp_path / "x"), CFG).frames.tolist() == LENGTHS and os.listdir(tmp_path) == ["x"]


# --- opening: everything but the frames is checked

def edit_index(folder, change):
    """Rewrite the index after change(rows), which may return other rows."""
    path = folder / "metadata" / "audio_index.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(change(rows) or rows), path)


def edit_json(path, remove=(), **values):
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | values).items() if k not in remove}))


def edit_stats(folder, **values):
    edit_json(folder / "metadata" / "dataset_stats.json", **values)


def edit_frames(folder, shard, change):
    """Rewrite a shard's frames after change(frames), an array (frames, n_mels)."""
    path = folder / "mel_shards" / f"shard_{shard:03d}" / FRAMES_FILE
    frames = np.fromfile(path, np.float16).reshape(-1, CFG.n_mels)
    change(frames)
    frames.tofile(path)


def refusal(folder):
    """The line with which training refuses a corpus before its first step, or None."""
    try:
        Corpus(str(folder), CFG).fingerprint()
    except UserError as e:
        assert str(folder) in str(e) and len(str(e).splitlines()) == 1
        return str(e)


def command(folder, *flags):
    """Exit status and output lines of `python data.py folder`, run in this process."""
    out = io.StringIO()
    flags = [*(f"--{k}={v}" for k, v in SMALL.items() if k not in ("mel_mean", "mel_std")), *flags]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = data.main([str(folder), *flags])
    return status, out.getvalue().splitlines()


def swap(rows):
    rows[3], rows[4] = rows[4], rows[3]


def of_index(change):
    return lambda folder: edit_index(folder, change)


def of_stats(**values):
    return lambda folder: edit_stats(folder, **values)


def of_shard(change):
    return lambda folder: change(folder / "mel_shards" / "shard_001")


@pytest.mark.parametrize("change, needle", [
    (of_index(lambda rows: rows[7].update(text=" ")), "has no text for 1 utterance(s), such as ['u0007'];"),
    (of_index(lambda rows: [r | {"text": ""} for r in rows]), "18 utterance(s), such as ['u0000', 'u0001', 'u0002', 'u0003', 'u0004'];"),
    (of_index(lambda rows: rows[8].update(utt_id="u0002")), "has a repeated id for 2 utterance(s), such as ['u0002', 'u0002'];"),
    (of_index(lambda rows: rows[8].update(split="dev")), "has a split other than train, val, test for 1 utterance(s), such as ['u0008'];"),
    (of_index(lambda rows: rows[8].update(num_frames=0)), "has a num_frames below 1 for 1 utterance(s), such as ['u0008'];"),
    (of_index(lambda rows: rows[8].update(num_frames=2**62)), "dataset_stats.json has {'num_utts': 18, 'num_frames': "),
    (of_index(lambda rows: rows[:-1]), "dataset_stats.json has {'num_utts': 18, "),
    (of_index(lambda rows: rows[3].update(row=4)), "does not list the utterances of each shard in order"),
    (of_index(lambda rows: rows[3].update(shard=1)), "does not list the utterances of each shard in order"),
    (of_index(swap), "does not list the utterances of each shard in order"),
    (of_index(lambda rows: rows[0].update(shard=-1)), "has a shard below 0 for 1 utterance(s), such as ['u0000'];"),
    (of_index(lambda rows: rows[17].update(shard=2**62, row=0)), "shard_4611686018427387904/meta.json cannot be used"),
    (of_index(lambda rows: [{k: v for k, v in r.items() if k != "text"} for r in rows]), "cannot be used"),
    (of_index(lambda rows: rows[3].update(text=None)), "cannot be used (ValueError: no rows, or empty fields"),
    (of_index(lambda rows: [r | {"num_frames": 1.5} for r in rows]), "cannot be used"),
    (of_stats(num_utts=17), "'num_utts': 17, "), (of_stats(num_utts=10**400), "'num_utts': 1000"),
    (of_stats(num_frames=None), "'num_frames': None"), (of_stats(mel_std=0.0), "the second positive"),
    (of_stats(mel_std=-2.0), "the second positive"),
    *((of_stats(**{name: value}), "expected finite numbers") for name in ("mel_mean", "mel_std")
      for value in (float("nan"), float("inf"), 10**400, "-5", None, [])),
    (of_shard(lambda shard: shard.rename(shard.with_name("shard_007"))), "shard_001/meta.json cannot be used"),
    (of_shard(lambda shard: shutil.rmtree(shard.parent)), "shard_000/meta.json cannot be used"),
    (of_shard(lambda shard: edit_json(shard / "meta.json", n_mels="8\n")), "n_mels is '8\\n' (config: 8)"),
    (of_shard(lambda shard: (shard / FRAMES_FILE).write_bytes(b"12")), "has 2 bytes, expected"),
    (of_shard(lambda shard: (shard / FRAMES_FILE).unlink()), "No such file or directory: "),
])
def test_a_corpus_whose_files_disagree_is_refused(folder, change, needle):
    change(folder)
    line, (status, lines) = refusal(folder), command(folder)
    assert status == 2 and f"error: {line}" in lines and any(needle in text for text in lines), lines


def test_statistics_may_be_incomplete_and_a_little_inexact(folder):
    stats = json.loads((folder / "metadata" / "dataset_stats.json").read_text())
    edit_stats(folder, remove=("splits", "characters", "byt5_tokens", "seconds", "rejected", "sha256"),
               mel_mean=stats["mel_mean"] + 1e-5, mel_std=stats["mel_std"] - 1e-5)
    assert refusal(folder) is None and not command(folder)[0]


@pytest.mark.parametrize("name", [f"mel_shards/shard_001/{FRAMES_FILE}", "mel_shards/shard_001/meta.json",
                                  "metadata/audio_index.parquet", "metadata/dataset_stats.json"])
def test_a_file_that_is_cut_off_damaged_or_missing_is_refused(folder, name):
    path = folder / name
    before = path.read_bytes()
    for damaged in [*(before[:cut] for cut in range(0, len(before), max(1, len(before) // 12))), before[:-1], b"garbage", b"[]",
                    b"{}", b"null", b"[" * 10**5, b"\xff\x00" * len(before)]:
        path.write_bytes(damaged)
        assert refusal(folder), damaged
    path.unlink()
    assert refusal(folder)


@pytest.mark.parametrize("name, value", [("sample_rate", 22050), ("n_fft", 512), ("hop_length", 128), ("win_length", 200),
                                         ("n_mels", 16), ("f_min", 20.0), ("f_max", 7600.0)])
def test_a_corpus_of_another_log_mel_is_refused(whole, name, value):
    assert name in AUDIO_FIELDS
    with pytest.raises(UserError, match="meta.json") as e:
        Corpus(str(whole), Config(**SMALL | {name: value}))
    assert f"{name} is {getattr(CFG, name)} (config: {value})" in str(e.value) and str(e.value).count("(config: ") == 1


def test_a_missing_corpus_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"no processed corpus at {place} .*data/ljspeech/prepare.py --out {place}"):
            Corpus(str(place), Config(prepare_script="data/ljspeech/prepare.py"))


# --- checking every byte

def test_the_stored_fingerprint_is_that_of_the_content(whole, folder, tmp_path):
    corpus = Corpus(str(folder), CFG)
    index = [corpus.ids, corpus.texts, corpus.splits, corpus.frames.tolist()]
    frames = np.concatenate([corpus.mel(i) for i in range(18)])
    expected = hashlib.sha256(json.dumps(index).encode() + frames.tobytes()).hexdigest()
    assert corpus.stats["sha256"] == corpus.check() == expected
    assert json.loads((make(tmp_path, shard_utts=3) / "metadata/dataset_stats.json").read_text())["sha256"] == expected  # other shards
    fingerprint = hashlib.sha256(json.dumps(index).encode() + expected.encode()).hexdigest()
    corpus.paths[0].unlink()
    assert corpus.fingerprint() == fingerprint  # without reading the frames again
    edit_stats(folder, remove=["sha256"])
    shutil.copy(whole / "mel_shards" / "shard_000" / FRAMES_FILE, corpus.paths[0])
    assert Corpus(str(folder), CFG).fingerprint() == fingerprint  # of a corpus from another writer
    of_index(lambda rows: rows[6].update(text="Another text."))(folder)
    assert Corpus(str(folder), CFG).fingerprint() != fingerprint


def flip(frames):
    frames[7, 3] += np.float16(0.25)


def move_border(rows):
    rows[6]["num_frames"] += 1
    rows[7]["num_frames"] -= 1


@pytest.mark.parametrize("change, needle", [
    (lambda folder: edit_frames(folder, 2, flip), "sha256"), (of_index(lambda rows: rows[6].update(utt_id="other")), "sha256"),
    (of_index(lambda rows: rows[6].update(text="Another text.")), "sha256"), (of_index(lambda rows: rows[6].update(split="val")), "sha256"),
    (of_stats(mel_mean=-1.23), "mel_mean -1.23, found "), (of_stats(mel_std=1.23, remove=["sha256"]), "mel_std 1.23, found "),
    (of_stats(sha256="0" * 64), f"sha256 {'0' * 20}, found "), (of_index(move_border), "sha256")])
def test_a_change_that_opening_does_not_see_is_found_by_the_command(folder, change, needle):
    change(folder)
    Corpus(str(folder), CFG)
    status, (line,) = command(folder)
    assert status == 2 and line.startswith(f"error: {folder} is not as dataset_stats.json describes it: ") and needle in line


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, -60000.0, 60000.0, np.nextafter(LOW, np.float16(-20)),
                                   np.nextafter(HIGH, np.float16(20)), LOW, HIGH], ids=str)
def test_frames_that_no_sound_can_have_are_found(folder, monkeypatch, value):
    def change(frames):
        frames[0, 0] = frames[70, 3] = frames[-1, 7] = value
    edit_frames(folder, 1, change)
    edit_stats(folder, remove=["mel_mean", "mel_std", "sha256"])
    corpus = Corpus(str(folder), CFG, lambda problem: None)
    for block in (20, 16 * 41, 2**23):
        monkeypatch.setattr(corpus_module, "BLOCK_BYTES", block)
        problems = []
        corpus.check(problems.append)
        found = f"{folder} has 3 log-mel values that are not within {LOW} to {HIGH}; delete the corpus and prepare it again"
        assert problems == ([] if LOW <= value <= HIGH else [found])


def test_the_command_tells_what_a_good_corpus_holds(whole):
    status, lines = command(whole, "--block_size", "45")
    text, corpus = "\n".join(lines), Corpus(str(whole), CFG)
    assert not status and '"num_utts": 18' in text and "0 were rejected" in text
    assert f"{sum(corpus.frames > 45)} of 18 utterances are longer than block_size = 45" in text
    assert f"found no problem; fingerprint {corpus.fingerprint()[:12]}" in text


def test_the_command_lists_all_problems(folder):
    edit_index(folder, lambda rows: (rows[2].update(text=""), rows[9].update(split="dev")) and None)

    def change(frames):
        frames[0, 0] = np.nan
    edit_frames(folder, 1, change)
    found = ["no text for 1 utterance(s), such as ['u0002']", "split other than train, val, test for 1 utterance(s), such as ['u0009']"]
    by_reading = [f"1 log-mel values that are not within {LOW} to {HIGH}", "is not as dataset_stats.json describes it: sha256 "]
    by_opening = [f"shard_000/{FRAMES_FILE} has 100 bytes", "f_max is 7000.0 (config: 8000.0)"]
    for needles in (found + by_reading, found + by_opening):  # the frames are read only if there are as many as there should be
        status, lines = command(folder)
        assert status == 2 and len(lines) == 4 and all(line.startswith("error: ") for line in lines)
        assert all(needle in line for needle, line in zip(needles, lines)), lines
        os.truncate(folder / "mel_shards" / "shard_000" / FRAMES_FILE, 100)
        edit_json(folder / "mel_shards" / "shard_002" / "meta.json", f_max=7000.0)


# --- a corpus that changes while it is open

@pytest.mark.parametrize("change, needle", [(Path.unlink, "No such file"), (lambda path: os.truncate(path, 1000), "cut off"),
                                            (lambda path: path.unlink() or path.mkdir(), "Is a directory")])
def test_a_corpus_that_vanishes_while_it_is_open_gives_one_line(folder, change, needle):
    corpus = Corpus(str(folder), CFG)
    path = corpus.paths[1]
    change(path)
    with pytest.raises(UserError, match=f"the corpus at {folder} can no longer be read: {path}: .*{needle}"):
        corpus.mel(7)
    assert np.array_equal(corpus.mel(0), audio.log_mel(noise(30, 0), CFG).half())
    with pytest.raises(UserError, match=f"{folder} (can no longer be read|is not as)"):
        corpus.check()


# --- fuzzing: whatever a file holds, there is success or one clear line

NASTY = [None, True, "", "x\ny", "5", -1, 0, 3, 2**31, 2**63, 10**400, 0.5, 1e300, float("nan"), float("inf"), [], {}, [[1]],
         {"a": None}, "\ud800", "\0"]


def mutate_json(draw, path):
    value = json.loads(path.read_text())
    value[draw(st.sampled_from(sorted(value)))] = draw(st.sampled_from(NASTY))
    path.write_text(json.dumps(value))


def mutate_parquet(draw, path):
    """Change one cell, the type of a column, or the choice of rows."""
    table, name = pq.read_table(path), draw(st.sampled_from(INDEX.names))
    values = table[name].to_pylist()
    kind = draw(st.sampled_from(["cell", "cell", "list", pa.string(), pa.large_string(), pa.binary(), pa.float32(), pa.uint8()]))
    if draw(st.integers(0, 4)) == 0:
        table = table.take(draw(st.lists(st.integers(0, len(table) - 1), max_size=20)) or pa.array([], pa.int64()))
    elif kind == "cell":
        of_type = {str: st.text(max_size=5), int: st.integers(-2**63, 2**63 - 1) | st.integers(-3, 40), float: st.floats()}
        values[draw(st.integers(0, len(values) - 1))] = draw(st.none() | of_type[type(values[0])])
        table = table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))
    else:
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowNotImplementedError):
            column = pa.array([[v] for v in values]) if kind == "list" else table[name].cast(kind)
            table = table.set_column(table.column_names.index(name), name, column)
    pq.write_table(table, path)


def mutate_bytes(draw, path, others):
    """Flip, cut, lengthen, replace or delete, as disks, copies and people do it."""
    whole = path.read_bytes()
    place = draw(st.integers(0, max(0, len(whole) - 1)) | st.integers(max(0, len(whole) - 200), max(0, len(whole) - 1)))
    kinds = {"flip": whole[:place] + bytes(b ^ draw(st.integers(1, 255)) for b in whole[place:place + 1]) + whole[place + 1:],
             "reverse": whole[:place] + whole[place:place + 64][::-1] + whole[place + 64:], "cut": whole[:place],
             "append": whole + draw(st.binary(min_size=1, max_size=64)), "twice": whole * 2, "empty": b"",
             "replace": draw(st.sampled_from(others)).read_bytes(), "delete": None, "folder": None}
    kind = draw(st.sampled_from(sorted(kinds)))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind != "delete":
        path.write_bytes(kinds[kind])


def mutate(draw, path, others):
    special = {".json": mutate_json, ".parquet": mutate_parquet}.get(path.suffix)
    if special and draw(st.booleans()):
        special(draw, path)
    else:
        mutate_bytes(draw, path, others)


FUZZ = int(os.environ.get("FUZZ", 60))  # examples per test; FUZZ=20000 for a night


@pytest.mark.slow
@given(st.data())
@settings(max_examples=FUZZ)
def test_a_fuzzed_corpus_can_be_read_or_is_refused(tmp_path_factory, whole, choice):
    fuzzed = shutil.copytree(whole, tmp_path_factory.mktemp("fuzzed") / "x")
    names = sorted(content(whole))
    chosen = choice.draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    for name in chosen:
        mutate(choice.draw, fuzzed / name, [whole / name for name in names])
    line, (status, lines) = refusal(fuzzed), command(fuzzed)
    if status == 2:
        assert all(text.startswith("error: ") for text in lines)
        assert not line or any(text.startswith(f"error: {line.split(' at 0x')[0]}") for text in lines)
    else:
        assert line is None
    if line is None:
        corpus = Corpus(str(fuzzed), CFG)
        assert [corpus.mel(i).shape for i in range(len(corpus))] == [(n, CFG.n_mels) for n in corpus.frames]
