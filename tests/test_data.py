"""
python -m pytest tests/test_data.py

The corpus on disk, written whole or not at all and read back; batches as a pure function of config and step.
"""
import fcntl
import functools
import json
import multiprocessing
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
import data
from config import Config, UserError
from data import Corpus, TrainingSteps, Utterance, write_corpus

SMALL = dict(sample_rate=16000, n_fft=256, hop_length=64, win_length=256, n_mels=8, f_max=8000.0, mel_mean=-4.0, mel_std=2.0,
             silence_prob=0.5, max_silence_sec=0.1, batch_size=8, effective_batch_size=8, max_steps=12)
CFG = Config(**SMALL)
HOP = CFG.hop_length


def tokenise(text):
    return [byte + 3 for byte in text.encode()] + [1]


def noise(frames, seed=0):
    """A wav of `frames` hops and a bit, another for each seed."""
    return np.random.default_rng([frames, seed]).uniform(-1, 1, frames * HOP + 17).astype(np.float32)


def read_noise(source, sample_rate):
    """The read function of these corpora: 'frames seed' gives noise, 'bad' a reason not to."""
    if source.startswith("bad"):
        raise audio.AudioError(source)
    frames, seed = map(int, source.split())
    return noise(frames, seed)


def utterances(lengths, split="train"):
    return [Utterance(f"u{n:04d}", f"Text number {n}.", split, f"{frames} {n}") for n, frames in enumerate(lengths)]


def make(folder, lengths=(30, 41, 52, 33, 34, 45, 46, 37, 58, 39, 50, 31, 62, 43), cfg=CFG, **options):
    out = folder / "corpus"
    some = utterances(lengths)
    some += [Utterance(f"{s}{n}", f"Held out {n}.", s, f"{40 + n} 7") for s in ("val", "test") for n in range(2)]
    write_corpus(str(out), some, read_noise, cfg, workers=1, **options)
    return out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(str(make(tmp_path_factory.mktemp("data"), shard_utts=5)), CFG)


def content(folder):
    """Every file under a folder: relative path -> bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- splits and batches: pure functions

@given(st.sets(st.text(max_size=8), max_size=200), st.integers(0, 20), st.integers(0, 20), st.randoms())
def test_hash_splits(ids, val, test, random):
    ids = sorted(ids)
    splits = data.hash_splits(ids, val, test)
    count = Counter(splits.values())
    most = max(1, len(ids) // 20)
    assert sorted(splits) == ids and set(count) <= {"train", "val", "test"}
    assert count["val"] == min(val, most, len(ids)) and count["test"] == min(test, most, len(ids) - count["val"])
    random.shuffle(ids)
    assert data.hash_splits(ids, val, test) == splits


def test_hash_splits_of_ljspeech():
    splits = data.hash_splits([f"LJ{n // 300:03d}-{n % 300:04d}" for n in range(13_100)])
    assert Counter(splits.values()) == {"train": 12_500, "val": 100, "test": 500}
    # pinned, so that error rates of different versions of the repo are of the same sentences
    assert sorted(i for i, s in splits.items() if s == "val")[:3] == ["LJ001-0196", "LJ001-0204", "LJ001-0209"]


def test_the_smallest_corpora_have_all_three_splits():
    for count in (3, 4, 39):
        assert Counter(data.hash_splits([f"line_{n:06d}" for n in range(count)]).values()) == {
            "train": count - 2, "val": 1, "test": 1}


@given(st.lists(st.integers(1, 400), max_size=150), st.integers(1, 20), st.integers(0, 99), st.integers(0, 50),
       st.booleans())
def test_epoch_batches(lengths, batch, seed, epoch, buckets):
    lengths = np.array(lengths, dtype=np.int64)
    before = lengths.copy()
    batches = data.epoch_batches(lengths, batch, seed, epoch, buckets)
    again = data.epoch_batches(lengths, batch, seed, epoch, buckets)
    assert len(batches) == len(lengths) // batch and all(b.shape == (batch,) for b in batches)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again)) and np.array_equal(lengths, before)
    rows = np.concatenate([*batches, np.empty(0, np.int64)])
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(len(lengths)))  # with the count: all but n % batch


@pytest.mark.parametrize("buckets", [True, False])
def test_epochs_and_seeds_differ(buckets):
    lengths = np.random.default_rng(0).integers(80, 400, 203)
    orders = {tuple(np.concatenate(data.epoch_batches(lengths, 16, seed, epoch, buckets)))
              for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
    # nobody stays out for good: what is left over is another handful in every epoch
    assert set().union(*(set(order) for order in orders)) == set(range(203))
    # and companions change, not only the batches' order: even if all lengths differ and nobody is left over
    lengths = np.arange(100, 100 + 16 * 20)
    first, second = ({frozenset(b) for b in data.epoch_batches(lengths, 16, 0, epoch, buckets)} for epoch in (0, 1))
    assert len(first & second) < 5


def padding(lengths, batches):
    return 1 - sum(lengths[b].sum() for b in batches) / sum(lengths[b].max() * len(b) for b in batches)


@pytest.mark.parametrize("seed", range(5))
def test_buckets_keep_padding_low(seed):
    lengths = np.random.default_rng(seed).integers(80, 401, 2000)
    assert padding(lengths, data.epoch_batches(lengths, 16, seed, 0)) < 0.05
    assert padding(lengths, data.epoch_batches(lengths, 16, seed, 0, buckets=False)) > 0.25


def test_batches_of_all_lengths_in_random_order():
    lengths = np.arange(80, 400)
    means = np.array([lengths[b].mean() for b in data.epoch_batches(lengths, 16, 0, 0)])
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.6  # not longest first


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@pytest.mark.parametrize("effective", [1, 6, 24])
def test_rank_rows_partition_a_step(effective):
    rows = np.random.default_rng(0).permutation(1000)[:effective]
    for batch in divisors(effective):
        for world in divisors(batch):
            cfg = Config(effective_batch_size=effective, batch_size=batch, nproc=world)
            parts = [data.rank_rows(rows, micro, rank, world, cfg)
                     for micro in range(effective // batch) for rank in range(world)]
            assert all(len(part) == batch // world for part in parts)
            assert np.array_equal(np.concatenate(parts), rows)


def test_padding_waste_is_that_of_the_forward_passes():
    frames = np.random.default_rng(1).integers(80, 401, 300)
    train = np.arange(10, 290)
    waste = {}
    for batch, world in ((64, 1), (64, 4), (16, 1)):
        cfg = Config(effective_batch_size=64, batch_size=batch, nproc=world)
        batches = data.epoch_batches(frames[train], 64, cfg.seed, 0)
        parts = [train[data.rank_rows(b, micro, rank, world, cfg)]
                 for b in batches for micro in range(64 // batch) for rank in range(world)]
        waste[batch, world] = data.padding_waste(frames, train, cfg)
        assert waste[batch, world] == pytest.approx(padding(frames, parts))
    assert waste[64, 4] == waste[16, 1] < waste[64, 1]


# --- collate

@given(st.lists(st.integers(0, 13), min_size=1, max_size=10), st.integers(0, 50))
def test_collate(corpus, indices, epoch):
    indices = np.array(indices)
    batch = data.collate(corpus, indices, CFG, tokenise, epoch)
    longest = int(batch["mel_lengths"].max())
    assert batch["mel"].shape == batch["noise"].shape == (len(indices), longest, CFG.n_mels)
    assert batch["mel"].dtype == batch["noise"].dtype == batch["t"].dtype == batch["seconds"].dtype == torch.float32
    assert batch["tokens"].dtype == torch.int64 and batch["drop_text"].dtype == torch.bool
    floor = audio.normalise(audio.LOG_MEL_FLOOR, CFG)
    for n, i in enumerate(indices):
        speech, frames = int(corpus.frames[i]), int(batch["mel_lengths"][n])
        tail = data.silence_frames(data.sample_rng(CFG, epoch, i), CFG)
        assert frames == speech + tail
        expected = (np.asarray(corpus.mel(i), np.float32) - CFG.mel_mean) / CFG.mel_std
        np.testing.assert_allclose(batch["mel"][n, :speech], expected, atol=1e-5)
        np.testing.assert_allclose(batch["mel"][n, speech:frames], floor, atol=1e-5)
        assert not batch["mel"][n, frames:].any() and not batch["noise"][n, frames:].any()
        assert batch["noise"][n, :frames].all()
        tokens = tokenise(corpus.texts[i])
        assert batch["tokens"][n, :batch["token_lengths"][n]].tolist() == tokens
        assert not batch["tokens"][n, len(tokens):].any()
        assert batch["seconds"][n] == pytest.approx(speech * HOP / CFG.sample_rate)
        assert 0 < batch["t"][n] < 1


@given(st.permutations(range(14)), st.integers(1, 14), st.integers(0, 5))
def test_a_sample_does_not_depend_on_its_company(corpus, order, size, epoch):
    batch = data.collate(corpus, np.array(order[:size]), CFG, tokenise, epoch)
    for n, i in enumerate(order[:size]):
        alone = data.collate(corpus, np.array([i]), CFG, tokenise, epoch)
        frames, tokens = int(alone["mel_lengths"][0]), int(alone["token_lengths"][0])
        for key in ("mel_lengths", "token_lengths", "seconds", "t", "drop_text"):
            assert batch[key][n] == alone[key][0], key
        for key, length in (("mel", frames), ("noise", frames), ("tokens", tokens)):
            assert torch.equal(batch[key][n, :length], alone[key][0]), key


def test_epochs_and_seeds_draw_anew(corpus):
    def noises(cfg, epoch):
        return data.collate(corpus, np.arange(4), cfg, tokenise, epoch)["noise"][:, :30]

    assert torch.equal(noises(CFG, 0), noises(CFG, 0))
    assert not torch.equal(noises(CFG, 0), noises(CFG, 1))
    assert not torch.equal(noises(CFG, 0), noises(Config(**SMALL, seed=1), 0))


def test_random_parts_have_the_distributions_of_the_config(corpus):
    cfg = Config(**SMALL | dict(silence_prob=0.3, text_condition_dropout=0.2, timestep_logit_mean=0.8,
                                timestep_logit_std=0.5))
    indices = np.arange(14)
    batches = [data.collate(corpus, indices, cfg, tokenise, epoch) for epoch in range(100)]
    t, drop, lengths = (torch.cat([b[key] for b in batches]) for key in ("t", "drop_text", "mel_lengths"))
    tails = lengths - torch.from_numpy(np.tile(corpus.frames[indices], 100))
    most = int(cfg.max_silence_sec * cfg.sample_rate / HOP)
    assert abs(torch.logit(t).mean() - 0.8) < 0.05 and abs(torch.logit(t).std() - 0.5) < 0.05
    assert abs(drop.float().mean() - 0.2) < 0.04
    assert abs((tails > 0).float().mean() - 0.3) < 0.05
    assert most / 3 < tails[tails > 0].float().mean() < most * 2 / 3 and tails.max() <= most
    values = torch.cat([b["noise"][0, :30].flatten() for b in batches])
    assert abs(values.mean()) < 0.03 and abs(values.std() - 1) < 0.03
    off = Config(**SMALL | dict(silence_prob=0.0, text_condition_dropout=0.0))
    batch = data.collate(corpus, indices, off, tokenise, 0)
    assert batch["mel_lengths"].tolist() == corpus.frames[indices].tolist() and not batch["drop_text"].any()


# --- steps

def test_steps_are_the_same_on_any_number_of_ranks(corpus):
    base = SMALL | dict(effective_batch_size=8)
    for step in (0, 1, 2, 5):
        expected = TrainingSteps(corpus, Config(**base), tokenise, 0, 1)[step][0]
        for batch, world in ((8, 2), (4, 1), (4, 2), (2, 2), (8, 8)):
            cfg = Config(**base | dict(batch_size=batch, nproc=world))
            parts = [TrainingSteps(corpus, cfg, tokenise, rank, world)[step] for rank in range(world)]
            parts = [parts[rank][micro] for micro in range(8 // batch) for rank in range(world)]
            for key in ("mel_lengths", "token_lengths", "seconds", "t", "drop_text"):
                assert torch.equal(torch.cat([p[key] for p in parts]), expected[key]), key
            assert all(p["frames"] == expected["frames"] and p["utterances"] == 8 for p in parts)
            n = 0
            for p in parts:
                for k, frames in enumerate(p["mel_lengths"]):
                    assert torch.equal(p["noise"][k, :frames], expected["noise"][n, :frames])
                    assert torch.equal(p["mel"][k, :frames], expected["mel"][n, :frames])
                    n += 1


def test_frames_count_the_silence_too(corpus):
    steps = TrainingSteps(corpus, Config(**SMALL | dict(silence_prob=1.0)), tokenise, 0, 1)
    for step in range(4):
        (batch,) = steps[step]
        speech = round(float(batch["seconds"].sum()) * CFG.sample_rate / HOP)
        assert int(batch["frames"]) == int(batch["mel_lengths"].sum()) > speech


def test_an_epoch_uses_the_training_utterances_once(corpus):
    cfg = Config(**SMALL | dict(batch_size=4, effective_batch_size=4, silence_prob=0.0))
    steps = TrainingSteps(corpus, cfg, tokenise, 0, 1)
    assert steps.steps_per_epoch == 3 and len(steps) == cfg.max_steps
    lengths = [n for step in range(3) for n in steps[step][0]["mel_lengths"].tolist()]
    assert not Counter(lengths) - Counter(corpus.frames[:14].tolist()) and len(lengths) == 12
    out_of_order = TrainingSteps(corpus, cfg, tokenise, 0, 1)
    for step in (7, 2, 5):  # no state but a cache
        assert torch.equal(out_of_order[step][0]["noise"], TrainingSteps(corpus, cfg, tokenise, 0, 1)[step][0]["noise"])


def test_overfit_trains_on_the_first_utterances_only(corpus):
    cfg = Config(**SMALL | dict(batch_size=3, effective_batch_size=3, overfit_first_n_samples=6, silence_prob=0.0))
    steps = TrainingSteps(corpus, cfg, tokenise, 0, 1)
    seen = {n for step in range(8) for n in steps[step][0]["mel_lengths"].tolist()}
    assert seen == set(corpus.frames[:6].tolist())


def assert_same_steps(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert len(x) == len(y)
        for p, q in zip(x, y):
            assert p.keys() == q.keys() and all(torch.equal(p[k], q[k]) for k in p)


def test_loader_workers_do_not_change_the_batches(corpus):
    steps = TrainingSteps(corpus, Config(**SMALL | dict(batch_size=4)), tokenise, 0, 1)
    plain = list(data.training_loader(steps, 0, workers=0))
    assert len(plain) == CFG.max_steps
    assert_same_steps(plain, list(data.training_loader(steps, 0, workers=1)))
    assert_same_steps(plain[5:], list(data.training_loader(steps, 5, workers=0)))
    assert_same_steps(plain[5:], list(data.training_loader(steps, 5, workers=1)))
    assert list(data.training_loader(steps, CFG.max_steps, workers=0)) == []


def test_a_loader_left_halfway_goes_away(corpus):
    before = set(multiprocessing.active_children())
    loader = iter(data.training_loader(TrainingSteps(corpus, CFG, tokenise, 0, 1), 0, workers=1))
    next(loader)
    del loader
    assert set(multiprocessing.active_children()) == before


# --- the corpus on disk

@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=15)
def test_what_is_written_is_read(tmp_path_factory, lengths, shard_utts):
    out = tmp_path_factory.mktemp("corpus") / "x"
    stats = write_corpus(str(out), utterances(lengths), read_noise, CFG, workers=1, shard_utts=shard_utts)
    corpus = Corpus(str(out), CFG)
    mels = [audio.log_mel(noise(frames, n), CFG).numpy().astype(np.float16) for n, frames in enumerate(lengths)]
    assert len(corpus) == len(lengths) and corpus.frames.tolist() == lengths
    assert corpus.texts == [u.text for u in utterances(lengths)] and corpus.splits == ["train"] * len(lengths)
    for i, mel in enumerate(mels):
        assert corpus.mel(i).dtype == np.float16 and np.array_equal(corpus.mel(i), mel)
    values = np.concatenate(mels).astype(np.float64)
    assert corpus.mel_stats == pytest.approx((values.mean(), values.std()))
    assert stats == corpus.stats
    assert stats["num_frames"] == sum(lengths) and stats["num_utts"] == len(lengths) and stats["rejected"] == 0
    assert stats["seconds"] == pytest.approx(sum(lengths) * HOP / CFG.sample_rate)
    assert stats["byt5_tokens"]["total"] == sum(len(tokenise(t)) for t in corpus.texts)


def test_files_are_those_of_the_format(tmp_path):
    out = make(tmp_path, shard_utts=10)
    assert os.listdir(tmp_path) == ["corpus"]
    assert sorted(content(out)) == sorted(
        [f"mel_shards/shard_{n:03d}/{name}" for n in range(2) for name in data.SHARD_FILES] +
        [f"metadata/{name}" for name in ("audio_index.parquet", "dataset_stats.json", "rejected.jsonl")])
    shard = out / "mel_shards" / "shard_001"
    meta = json.loads((shard / "meta.json").read_text())
    lengths, offsets = np.load(shard / "lengths.int32.npy"), np.load(shard / "offsets.int64.npy")
    assert {k: meta[k] for k in data.AUDIO_FIELDS} == {k: getattr(CFG, k) for k in data.AUDIO_FIELDS}
    assert meta["num_utts"] == len(lengths) == len(offsets) == 8 and meta["num_frames"] == lengths.sum()
    assert lengths.dtype == np.int32 and offsets.dtype == np.int64
    assert offsets.tolist() == [0, *np.cumsum(lengths)[:-1]]
    assert (shard / "logmel.float16.memmap").stat().st_size == lengths.sum() * CFG.n_mels * 2
    rows = pq.read_table(out / "metadata" / "audio_index.parquet").to_pylist()
    assert len(rows) == 18 and {"utt_id", "text", "split", "duration_sec", "num_frames"} <= set(rows[0])
    assert [r["utt_id"] for r in rows[:2]] == ["u0000", "u0001"]


def test_mels_are_read_only(corpus):
    with pytest.raises(ValueError, match="read-only"):
        corpus.mel(0)[0, 0] = 1


BAD = [Utterance("b1", "No sound.", "train", "bad luck"), Utterance("b2", "", "train", "30 1"),
       Utterance("b3", "Too short.", "train", "0 1")]


def test_bad_utterances_are_listed(tmp_path, capsys):
    some = utterances([30, 40])
    stats = write_corpus(str(tmp_path / "x"), [BAD[0], some[0], BAD[1], some[1], BAD[2]], read_noise, CFG, workers=1)
    assert stats["rejected"] == 3 and stats["num_utts"] == 2
    rejected = [json.loads(line) for line in (tmp_path / "x/metadata/rejected.jsonl").read_text().splitlines()]
    assert [(r["utt_id"], r["reason"].split(":")[0]) for r in rejected] == [
        ("b1", "bad luck"), ("b2", "empty text"), ("b3", "zero length")]
    assert "skipped b1: bad luck" in capsys.readouterr().out
    assert Corpus(str(tmp_path / "x"), CFG).ids == ["u0000", "u0001"]


def test_strict_refuses_bad_utterances(tmp_path):
    with pytest.raises(UserError, match="b1: bad luck"):
        write_corpus(str(tmp_path / "x"), [*utterances([30]), BAD[0]], read_noise, CFG, workers=1, strict=True)
    assert not (tmp_path / "x").exists()


def test_a_shard_of_bad_utterances_only(tmp_path):
    write_corpus(str(tmp_path / "x"), [*BAD[:2], *utterances([30, 40])], read_noise, CFG, workers=1, shard_utts=2)
    corpus = Corpus(str(tmp_path / "x"), CFG)
    assert corpus.frames.tolist() == [30, 40] and np.array_equal(corpus.mel(1), audio.log_mel(noise(40, 1), CFG).half())


def test_corpora_that_are_refused(tmp_path):
    out = tmp_path / "x"
    for some, reason in ((BAD, "none of 3"), ([], "none of 0"), (utterances([30], "val"), "none of 1"),
                         (utterances([30]) * 2, "'u0000' occurs more than once")):
        with pytest.raises(UserError, match=reason):
            write_corpus(str(out), some, read_noise, CFG, workers=1)
        assert not out.exists()


@pytest.mark.parametrize("strict", [False, True])
def test_refused_files_can_be_mended(tmp_path, strict):
    # the same list of files, at first without any, then with one, with an interruption, and with all
    wavs, job = {}, utterances([30, 40, 50, 60])

    def read(source, sample_rate):
        if source == "60 3" and len(wavs) == 1:
            raise KeyboardInterrupt
        if source not in wavs:
            raise audio.AudioError(f"missing file {source}")
        return wavs[source]

    def write(strict):
        return write_corpus(str(tmp_path / "x"), job, read, CFG, workers=1, shard_utts=2, strict=strict)

    with pytest.raises(UserError, match="missing file" if strict else "none of 4"):
        write(strict)
    wavs["30 0"] = noise(30)
    with pytest.raises(KeyboardInterrupt):
        write(strict=False)
    wavs.update({u.source: noise(int(u.source.split()[0])) for u in job})
    assert write(strict)["num_utts"] == 4


def test_an_existing_corpus_is_replaced_only_by_force(tmp_path):
    out = make(tmp_path, [30, 40])
    before = content(out)
    with pytest.raises(UserError, match="--force"):
        make(tmp_path, [50])
    assert content(out) == before
    make(tmp_path, [50], force=True)
    assert Corpus(str(out), CFG).frames[0] == 50 and os.listdir(tmp_path) == ["corpus"]


def test_places_where_no_corpus_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "x", tmp_path / "file"):
        with pytest.raises(UserError) as e:
            write_corpus(str(out), utterances([30]), read_noise, CFG, workers=1)
        assert str(out) in str(e.value)


def test_a_trailing_slash_changes_nothing(tmp_path):
    write_corpus(f"{tmp_path}/new/x/", utterances([30]), read_noise, CFG, workers=1)
    assert os.listdir(tmp_path / "new") == ["x"] and len(Corpus(f"{tmp_path}/new/x/", CFG)) == 1


# --- interruptions

LENGTHS = [20, 31, 42, 23, 34, 25, 36]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "x"
    write_corpus(str(out), [*utterances(LENGTHS), BAD[0]], read_noise, CFG, workers=1, shard_utts=2)
    return content(out)


def interrupted_at(item):
    """A read function that is interrupted at its call number `item`, and the list of what it was asked for."""
    asked = []

    def read(source, sample_rate):
        asked.append(source)
        if len(asked) == item + 1:
            raise KeyboardInterrupt
        return read_noise(source, sample_rate)
    return read, asked


@pytest.mark.parametrize("item", range(8))
def test_an_interrupted_run_goes_on_where_it_was(tmp_path, undisturbed, item, capsys):
    out, job = tmp_path / "x", [*utterances(LENGTHS), BAD[0]]
    read, _ = interrupted_at(item)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(str(out), job, read, CFG, workers=1, shard_utts=2)
    assert not out.exists()
    with pytest.raises(UserError, match="unfinished"):
        Corpus(str(out), CFG)
    read, asked = interrupted_at(99)
    write_corpus(str(out), job, read, CFG, workers=1, shard_utts=2)
    assert len(asked) == 8 - item // 2 * 2  # nothing of a whole shard is done twice
    assert ("resuming" in capsys.readouterr().out) == (item >= 2)
    assert content(out) == undisturbed and os.listdir(tmp_path) == ["x"]


def kill_at(mp, moment, error=KeyboardInterrupt):
    """Raise `error` instead of doing the file operation number `moment`; returns the list of those done."""
    done = []

    def wrap(owner, name):
        original = getattr(owner, name)

        @functools.wraps(original)
        def operation(*args, **kwargs):
            if len(done) == moment:
                done.append(f"{name} failed")
                raise error()
            done.append(name)
            return original(*args, **kwargs)
        mp.setattr(owner, name, operation)

    for owner, names in ((Path, ["mkdir", "unlink", "write_text", "write_bytes"]), (os, ["rename"]), (shutil, ["rmtree"]),
                         (pq, ["write_table"])):
        for name in names:
            wrap(owner, name)
    return done


def test_a_run_killed_between_any_two_file_operations_goes_on(tmp_path, undisturbed):
    job = [*utterances(LENGTHS), BAD[0]]
    broken = []
    for moment in range(200):
        out = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as mp:
            done = kill_at(mp, moment)
            try:
                write_corpus(str(out), job, read_noise, CFG, workers=1, shard_utts=2)
                break
            except KeyboardInterrupt:
                pass
        assert not out.exists()
        try:
            write_corpus(str(out), job, read_noise, CFG, workers=1, shard_utts=2)
            assert content(out) == undisturbed
        except Exception as e:
            broken.append(f"killed after operation {moment} ({done[-3:]}): {e!r}")
    assert moment > 30 and not broken, "\n".join(broken)


@pytest.mark.parametrize("change", ["source", "text", "config", "shards"])
def test_another_job_uses_nothing_of_an_unfinished_one(tmp_path, change):
    out, job, cfg, shard_utts = str(tmp_path / "x"), utterances(LENGTHS), CFG, 2
    read, _ = interrupted_at(5)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(out, job, read, CFG, workers=1, shard_utts=2)
    if change == "source":
        job = [Utterance(u.utt_id, u.text, u.split, u.source + "1") for u in job]
    elif change == "text":
        job = [Utterance(u.utt_id, u.text + "!", u.split, u.source) for u in job]
    elif change == "config":
        cfg = Config(**SMALL | dict(f_max=7000.0))
    else:
        shard_utts = 3
    read, asked = interrupted_at(99)
    write_corpus(out, job, read, cfg, workers=1, shard_utts=shard_utts)
    assert len(asked) == len(job)
    write_corpus(str(tmp_path / "y"), job, read, cfg, workers=1, shard_utts=shard_utts)
    assert content(tmp_path / "x") == content(tmp_path / "y")


def test_strict_holds_for_the_shards_of_an_unfinished_run_too(tmp_path):
    job = [*utterances([20, 30]), BAD[0], *utterances(LENGTHS)[2:]]
    read, _ = interrupted_at(5)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(str(tmp_path / "x"), job, read, CFG, workers=1, shard_utts=2)
    with pytest.raises(UserError, match="b1: bad luck"):
        write_corpus(str(tmp_path / "x"), job, read_noise, CFG, workers=1, shard_utts=2, strict=True)


def write_and_wait(out, pipe):
    def read(source, sample_rate):
        if source == "42 2":  # in the second shard
            pipe.send("busy")
            pipe.recv()
        return read_noise(source, sample_rate)
    write_corpus(out, utterances(LENGTHS), read, CFG, workers=1, shard_utts=2)


def test_two_processes_cannot_prepare_the_same_corpus(tmp_path):
    out = str(tmp_path / "x")
    here, there = multiprocessing.Pipe()
    other = multiprocessing.get_context("fork").Process(target=write_and_wait, args=(out, there), daemon=True)
    other.start()
    assert here.poll(60) and here.recv() == "busy"
    before = content(tmp_path)
    for job in (utterances(LENGTHS), utterances([30])):  # the same one, and another one
        with pytest.raises(UserError, match="another process is preparing"):
            write_corpus(out, job, read_noise, CFG, workers=1, shard_utts=2)
    assert content(tmp_path) == before
    here.send("go on")
    other.join(60)
    assert other.exitcode == 0 and Corpus(out, CFG).frames.tolist() == LENGTHS


def test_the_lock_of_a_dead_process_does_not_last(tmp_path):
    (tmp_path / "x.partial").mkdir()
    with open(tmp_path / "x.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            write_corpus(str(tmp_path / "x"), utterances([30]), read_noise, CFG, workers=1)
    write_corpus(str(tmp_path / "x"), utterances([30]), read_noise, CFG, workers=1)
    assert os.listdir(tmp_path) == ["x"]


# --- corpora that do not fit, or are broken

@pytest.mark.parametrize("name, value", [("sample_rate", 22050), ("n_fft", 512), ("hop_length", 128), ("win_length", 200),
                                         ("n_mels", 16), ("f_min", 20.0), ("f_max", 7600.0)])
def test_a_corpus_of_another_log_mel_is_refused(corpus, name, value):
    assert name in data.AUDIO_FIELDS
    with pytest.raises(UserError) as e:
        Corpus(str(corpus.dir), Config(**SMALL | {name: value}))
    assert f"{name} is {getattr(CFG, name)} (config: {value})" in str(e.value)
    assert "meta.json" in str(e.value) and str(e.value).count("(config: ") == 1


def test_block_size_drops_and_counts(corpus):
    cfg = Config(**SMALL | dict(block_size=40, batch_size=4, effective_batch_size=4))
    fit = [i for i in range(14) if corpus.frames[i] <= 40]
    assert 4 < len(fit) < 14
    assert corpus.split("train", cfg).tolist() == corpus.training_indices(cfg).tolist() == fit
    assert corpus.split("val", cfg).tolist() == [14] and corpus.split("nonsense", cfg).tolist() == []
    text = corpus.describe(cfg)
    assert f"{len(fit)} training utterances" in text and f"{14 - len(fit)} longer than 40 frames dropped" in text
    assert "1 val, 1 test" in text and "padding waste" in text


@pytest.mark.parametrize("options", [dict(batch_size=15, effective_batch_size=15), dict(block_size=31),
                                     dict(overfit_first_n_samples=7), dict(block_size=1)])
def test_too_few_utterances_for_a_batch(corpus, options):
    cfg = Config(**SMALL | options)
    with pytest.raises(UserError) as e:
        corpus.training_indices(cfg)
    for needle in ("effective_batch_size", "block_size", "overfit_first_n_samples", str(corpus.dir)):
        assert needle in str(e.value)


def test_a_corpus_that_is_not_there(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="no processed corpus") as e:
            Corpus(str(where), Config(prepare_script="data/ljspeech/prepare.py"))
        assert str(where) in str(e.value) and "data/ljspeech/prepare.py --out" in str(e.value)


FILES = [f"mel_shards/shard_001/{name}" for name in data.SHARD_FILES] + ["metadata/audio_index.parquet",
                                                                         "metadata/dataset_stats.json"]


def assert_refused(folder, needle=None):
    with pytest.raises(UserError, match=needle) as e:
        Corpus(str(folder), CFG)
    assert str(folder) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_off_missing_or_garbage_is_refused(tmp_path, corpus, name):
    folder = tmp_path / "copy"
    shutil.copytree(corpus.dir, folder)
    whole = (folder / name).read_bytes()
    for cut in [*range(0, len(whole), max(1, len(whole) // 25)), len(whole) - 1]:
        (folder / name).write_bytes(whole[:cut])
        assert_refused(folder)
    for garbage in (b"garbage", b"[]", b"{}", b"null", b"\xff\x00" * len(whole)):
        (folder / name).write_bytes(garbage)
        assert_refused(folder)
    (folder / name).unlink()
    assert_refused(folder)
    (folder / name).write_bytes(whole)
    assert len(Corpus(str(folder), CFG)) == len(corpus)


@pytest.mark.parametrize("change", ["lengths swapped", "lengths longer", "offsets", "negative offsets", "shard gone",
                                    "shards swapped"])
def test_files_that_disagree_are_refused(tmp_path, corpus, change):
    folder = tmp_path / "copy"
    shutil.copytree(corpus.dir, folder)
    shard = folder / "mel_shards" / "shard_001"
    lengths, offsets = np.load(shard / "lengths.int32.npy"), np.load(shard / "offsets.int64.npy")
    if change == "lengths swapped":
        np.save(shard / "lengths.int32.npy", lengths[::-1])
    elif change == "lengths longer":
        np.save(shard / "lengths.int32.npy", lengths + 1)
    elif change == "offsets":
        np.save(shard / "offsets.int64.npy", offsets + 1)
    elif change == "negative offsets":
        np.save(shard / "offsets.int64.npy", -offsets)
    elif change == "shard gone":
        shutil.rmtree(shard)
    else:
        shard.rename(folder / "tmp")
        (folder / "mel_shards" / "shard_002").rename(shard)
        (folder / "tmp").rename(folder / "mel_shards" / "shard_002")
    assert_refused(folder, "broken|disagree|prepare it again")


# --- the command

def test_command_describes_a_corpus(demo_corpus, capsys):
    data.main([str(demo_corpus), "--batch_size", "16", "--effective_batch_size", "16"])
    out = capsys.readouterr().out
    assert "48 training utterances" in out and "8 val, 8 test" in out and "frames/s" in out and '"num_utts": 64' in out
