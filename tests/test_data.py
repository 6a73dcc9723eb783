"""
python -m pytest tests/test_data.py

Batches are a pure function of config and step, on any number of ranks and loader threads.
"""
import dataclasses
import shutil
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_corpus import CFG, HOP, SMALL, make, tokenise

import audio
import data
from common import UserError
from config import Config
from corpus import Corpus, Utterance, write_corpus
from data import TrainingSteps, at_step
from text_encoder import byte_tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """14 training utterances, then 2 val and 2 test."""
    return Corpus(str(make(tmp_path_factory.mktemp("data"), shard_utts=5)), CFG)


def steps_of(corpus, rank=0, world=1, **options):
    return TrainingSteps(corpus, Config(**SMALL | options), tokenise, rank, world)


# --- what is trained on

def test_utterances_longer_than_block_size_are_left_out_and_counted(corpus):
    cfg = Config(**SMALL | dict(block_size=40, batch_size=4, effective_batch_size=4))
    fit = [i for i in range(14) if corpus.frames[i] <= 40]
    assert 4 < len(fit) < 14
    assert corpus.split("train", cfg).tolist() == data.training_rows(corpus, cfg, tokenise).tolist() == fit
    assert corpus.split("val", cfg).tolist() == [14] and corpus.split("nonsense", cfg).tolist() == []
    text = data.describe(corpus, cfg, tokenise)
    assert f"{len(fit)} training utterances" in text and f"left out: {14 - len(fit)} longer than 40 frames, 0 with" in text
    assert "1 val, 1 test" in text and "padding waste" in text


@pytest.mark.parametrize("options", [dict(batch_size=15, effective_batch_size=15), dict(block_size=31),
                                     dict(overfit_first_n_samples=7), dict(block_size=1)])
def test_too_few_utterances_for_a_batch_are_refused(corpus, options):
    with pytest.raises(UserError) as e:
        data.training_rows(corpus, Config(**SMALL | options), tokenise)
    assert all(word in str(e.value) for word in ("effective_batch_size", "block_size", "overfit_first_n_samples", str(corpus.dir)))


def test_texts_with_more_tokens_than_positions_are_left_out_counted_and_named(tmp_path, capsys):
    """Hindi takes three bytes a letter. The search cannot give each byte one of 43 positions a second."""
    def speak(*_):
        return np.random.default_rng(0).uniform(-0.5, 0.5, 22050).astype(np.float32)
    texts = {f"en_{n}": "a short text" for n in range(8)} | {f"hi_{n}": "बहुत लंबा वाक्य है यह" for n in range(4)}
    splits = {"en_7": "val", "hi_3": "val"}
    utterances = [Utterance(name, text, splits.get(name, "train"), name) for name, text in texts.items()]
    write_corpus(str(tmp_path / "few"), utterances, speak, Config(), workers=1)
    cfg = Config(**SMALL | dict(n_mels=80, batch_size=4, effective_batch_size=4, patch=2, hop_length=256, n_fft=1024, win_length=1024,
                                sample_rate=22050, f_max=8000.0, data_dir=str(tmp_path / "few"), silence_prob=0.0))
    corpus = Corpus(cfg.data_dir, cfg)
    assert data.training_rows(corpus, cfg, byte_tokens).tolist() == list(range(7))
    assert "0 longer than 1024 frames, 3 with more tokens than positions" in data.describe(corpus, cfg, byte_tokens)
    assert "1 val" in data.describe(corpus, cfg, byte_tokens)
    data.main([cfg.data_dir, "--patch", "2"])
    printed = capsys.readouterr().out
    assert "4 have more tokens than positions (patch = 2: 43 a second) and are left out: hi_0, hi_1, hi_2, hi_3" in printed
    data.main([cfg.data_dir, "--patch", "1"])
    assert "0 have more tokens" in capsys.readouterr().out
    for options in (dict(patch=1), dict(alignment_search=False)):
        assert len(data.training_rows(corpus, dataclasses.replace(cfg, **options), byte_tokens)) == 10
    many = [Utterance(u.utt_id, texts["hi_0"] if u.utt_id < "en_5" else u.text, u.split, "") for u in utterances]
    write_corpus(str(tmp_path / "many"), many, speak, Config(), workers=1)
    with pytest.raises(UserError, match=r"8 of 10 training texts .* have more tokens .*\(patch = 2: 43 a second\), such as .*set patch: 1"):
        data.training_rows(Corpus(str(tmp_path / "many"), cfg), cfg, byte_tokens)
    assert data.main([str(tmp_path / "many"), "--patch", "2"]) == 2 and "set patch: 1" in capsys.readouterr().err


# --- the order of an epoch

def padding(lengths, batches):
    return 1 - sum(lengths[b].sum() for b in batches) / sum(lengths[b].max() * len(b) for b in batches)


@given(st.lists(st.integers(1, 400), max_size=150), st.integers(1, 20), st.integers(0, 99), st.integers(0, 50), st.booleans())
def test_an_epoch_has_each_utterance_at_most_once(lengths, batch, seed, epoch, buckets):
    lengths = np.array(lengths, dtype=np.int64)
    before = lengths.copy()
    batches, again = (data.epoch_batches(lengths, batch, seed, epoch, buckets) for _ in range(2))
    assert len(batches) == len(lengths) // batch and all(b.shape == (batch,) for b in batches)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again)) and np.array_equal(lengths, before)
    rows = np.concatenate([*batches, np.empty(0, np.int64)])
    assert len(set(rows)) == len(rows) and set(rows) <= set(range(len(lengths)))


@pytest.mark.parametrize("buckets", [True, False])
def test_epochs_and_seeds_differ(buckets):
    lengths = np.random.default_rng(0).integers(80, 400, 203)
    orders = {tuple(np.concatenate(data.epoch_batches(lengths, 16, seed, epoch, buckets)))
              for seed in range(3) for epoch in range(5)}
    assert len(orders) == 15
    # The remainder of less than a batch differs between epochs, so no utterance is left out for good.
    assert set().union(*(set(order) for order in orders)) == set(range(203))
    # The composition of batches also differs, even if all lengths differ and nothing is left out.
    lengths = np.arange(100, 100 + 16 * 20)
    first, second = ({frozenset(b) for b in data.epoch_batches(lengths, 16, 0, epoch, buckets)} for epoch in (0, 1))
    assert len(first & second) < 5


def test_buckets_keep_padding_low_and_come_in_random_order():
    lengths = np.random.default_rng(0).integers(80, 401, 2000)
    batches = data.epoch_batches(lengths, 16, 0, 0)
    assert padding(lengths, batches) < 0.05 and padding(lengths, data.epoch_batches(lengths, 16, 0, 0, buckets=False)) > 0.25
    assert abs(np.corrcoef([lengths[b].mean() for b in batches], np.arange(len(batches)))[0, 1]) < 0.3


def test_padding_waste_is_that_of_the_forward_passes():
    frames, train, waste = np.random.default_rng(1).integers(80, 401, 300), np.arange(10, 290), {}
    for batch, world in ((64, 1), (64, 4), (16, 1)):
        cfg = Config(effective_batch_size=64, batch_size=batch, nproc=world)
        parts = [train[data.rank_rows(b, micro, rank, world, cfg)] for b in data.epoch_batches(frames[train], 64, cfg.seed, 0)
                 for micro in range(64 // batch) for rank in range(world)]
        waste[batch, world] = data.padding_waste(frames, train, cfg)
        assert waste[batch, world] == pytest.approx(padding(frames, parts))
    assert waste[64, 4] == waste[16, 1] < waste[64, 1]


@given(batch=st.integers(1, 64), micros=st.integers(1, 4), world=st.integers(1, 64))
def test_ranks_share_a_step_evenly(batch, micros, world):
    """Any number of ranks up to the batch: each utterance goes to one of them, and their numbers differ by at most one."""
    cfg, world = Config(effective_batch_size=batch * micros, batch_size=batch), min(world, batch)
    parts = [data.rank_rows(np.arange(batch * micros), micro, rank, world, cfg) for micro in range(micros) for rank in range(world)]
    assert np.concatenate(parts).tolist() == list(range(batch * micros))
    sizes = {len(part) for part in parts}
    assert min(sizes) >= 1 and max(sizes) - min(sizes) <= 1


def test_the_longest_batch_needs_the_most_memory(corpus):
    options = dict(batch_size=4, effective_batch_size=4, silence_prob=1e-9, max_silence_sec=0.5)
    longest = steps_of(corpus, **options).longest()
    assert longest["speech_lengths"].tolist() == sorted(corpus.frames[:14])[:-5:-1]
    assert (longest["mel_lengths"] > longest["speech_lengths"]).sum() >= 3  # a tail can have less than one frame
    ranks = [steps_of(corpus, rank, 2, **options).longest() for rank in range(2)]
    assert torch.equal(torch.cat([part["mel_lengths"] for part in ranks]), longest["mel_lengths"])


# --- batches

@given(st.lists(st.integers(0, 13), min_size=1, max_size=8), st.integers(0, 50))
def test_a_batch_holds_padded_samples_that_do_not_depend_on_each_other(corpus, indices, epoch):
    indices = np.array(indices)
    batch = data.collate(corpus, indices, CFG, tokenise, epoch)
    assert batch["mel"].shape == batch["noise"].shape == (len(indices), batch["mel_lengths"].max(), CFG.n_mels)
    assert batch["mel"].dtype == batch["noise"].dtype == batch["t"].dtype == batch["seconds"].dtype == torch.float32
    assert batch["tokens"].dtype == torch.int64 and batch["drop_text"].dtype == torch.bool
    floor = audio.normalise(audio.LOG_MEL_FLOOR, CFG)
    for n, i in enumerate(indices):
        speech, frames, tokens = int(corpus.frames[i]), int(batch["mel_lengths"][n]), tokenise(corpus.spoken[i])
        assert frames == speech + data.silence_frames(data.sample_rng(CFG, epoch, i), CFG)
        expected = (np.asarray(corpus.mel(i), np.float32) - CFG.mel_mean) / CFG.mel_std
        np.testing.assert_allclose(batch["mel"][n, :speech], expected, atol=1e-5)
        np.testing.assert_allclose(batch["mel"][n, speech:frames], floor, atol=1e-5)
        assert not batch["mel"][n, frames:].any() and not batch["noise"][n, frames:].any()
        assert batch["tokens"][n, :batch["token_lengths"][n]].tolist() == tokens
        assert not batch["tokens"][n, len(tokens):].any()
        assert batch["speech_lengths"][n] == speech and 0 < batch["t"][n] < 1
        assert batch["seconds"][n] == pytest.approx(frames * HOP / CFG.sample_rate)  # the tail belongs to the utterance
        alone = data.collate(corpus, np.array([i]), CFG, tokenise, epoch)
        assert all(batch[key][n] == alone[key][0] for key in ("mel_lengths", "token_lengths", "seconds", "t", "drop_text"))
        assert torch.equal(batch["mel"][n, :frames], alone["mel"][0]) and torch.equal(batch["noise"][n, :frames], alone["noise"][0])


def test_random_parts_have_the_distributions_of_the_config(corpus):
    cfg = Config(**SMALL | dict(silence_prob=0.3, text_condition_dropout=0.2, timestep_logit_mean=0.8, timestep_logit_std=0.5))
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
    off = data.collate(corpus, indices, Config(**SMALL | dict(silence_prob=0.0, text_condition_dropout=0.0)), tokenise, 0)
    assert off["mel_lengths"].tolist() == corpus.frames[indices].tolist() and not off["drop_text"].any()
    for cfg, epoch, same in ((CFG, 0, True), (CFG, 1, False), (Config(**SMALL, seed=1), 0, False)):
        noise, other = (data.collate(corpus, indices, *args)["noise"][:, :30] for args in (
            (CFG, tokenise, 0), (cfg, tokenise, epoch)))
        assert torch.equal(noise, other) == same


# --- steps

def test_a_step_is_the_same_on_any_number_of_ranks(corpus):
    for step in (5, 0, 1):
        (expected,) = steps_of(corpus)[step]
        for batch, world in ((8, 2), (4, 1), (4, 2), (2, 2), (8, 8), (8, 3), (4, 3)):
            ranks = [steps_of(corpus, rank, world, batch_size=batch, nproc=world) for rank in range(world)]
            parts = [ranks[rank][step][micro] for micro in range(8 // batch) for rank in range(world)]
            for key in ("mel_lengths", "token_lengths", "seconds", "t", "drop_text"):
                assert torch.equal(torch.cat([p[key] for p in parts]), expected[key]), key
            assert all(p["frames"] == expected["mel_lengths"].sum() and p["utterances"] == 8 for p in parts)
            for key in ("noise", "mel"):
                rows = [row[:frames] for p in parts for row, frames in zip(p[key], p["mel_lengths"])]
                assert all(torch.equal(row, expected[key][n, :len(row)]) for n, row in enumerate(rows)), key
            names = ranks[-1].utterances(step)
            assert names == steps_of(corpus).utterances(step) and len(set(names)) == 8
        speech = [corpus.frames[corpus.ids.index(name)] for name in names]
        assert expected["speech_lengths"].tolist() == speech


def test_an_epoch_uses_the_training_utterances_once(corpus):
    options = dict(batch_size=4, effective_batch_size=4, silence_prob=0.0)
    steps = steps_of(corpus, **options)
    assert steps.steps_per_epoch == 3 and len(steps) == CFG.max_steps
    lengths = [n for step in range(3) for n in steps[step][0]["mel_lengths"].tolist()]
    assert not Counter(lengths) - Counter(corpus.frames[:14].tolist()) and len(lengths) == 12
    for step in (7, 2, 5):  # in any order: there is no state but a cache
        assert torch.equal(steps[step][0]["noise"], steps_of(corpus, **options)[step][0]["noise"])


def test_overfitting_trains_on_the_first_utterances_only(corpus):
    steps = steps_of(corpus, batch_size=3, effective_batch_size=3, overfit_first_n_samples=6, silence_prob=0.0)
    assert {n for step in range(8) for n in steps[step][0]["mel_lengths"].tolist()} == set(corpus.frames[:6].tolist())


# --- the loader

@pytest.mark.parametrize("threads", [1, 3])
def test_the_loader_yields_the_steps_in_order(corpus, threads):
    steps = steps_of(corpus, batch_size=4)
    for start in (0, 5, 11, 12):
        loaded = list(data.training_loader(steps, start, threads))
        assert len(loaded) == CFG.max_steps - start
        for n, batches in enumerate(loaded, start):
            for batch, expected in zip(batches, steps[n], strict=True):
                assert batch.keys() == expected.keys() and all(torch.equal(batch[k], expected[k]) for k in batch)


class Counted(TrainingSteps):
    """Steps that take `seconds` each and remember which were made. Step 15 meets a bug."""

    def __init__(self, corpus, seconds=0.0):
        super().__init__(corpus, Config(**SMALL | {"max_steps": 1000}), tokenise, 0, 1)
        self.made, self.seconds = [], seconds

    def __getitem__(self, step):
        self.made.append(step)
        time.sleep(self.seconds)
        if step == 15:
            raise ZeroDivisionError("a bug")
        return super().__getitem__(step)


def test_a_loader_works_a_few_steps_ahead_and_ends_its_threads(corpus):
    before, quick, slow = threading.active_count(), Counted(corpus), Counted(corpus, 0.2)
    loader, slow_loader = (data.training_loader(steps, 0, threads=2) for steps in (quick, slow))
    next(loader)
    next(slow_loader)
    assert threading.active_count() > before and 1 < len(quick.made) <= 2 * data.STEPS_AHEAD
    del loader, slow_loader  # left halfway: steps that are not yet begun are dropped
    assert threading.active_count() == before and len(slow.made) < 2 * data.STEPS_AHEAD
    with pytest.raises(ZeroDivisionError, match="a bug") as e:
        list(data.training_loader(quick, 10))
    assert e.traceback[-1].name == "__getitem__" and threading.active_count() == before


def test_a_corpus_that_vanishes_under_a_loader_gives_one_line(corpus, tmp_path):
    folder = shutil.copytree(corpus.dir, tmp_path / "copy")
    before, loader = threading.active_count(), data.training_loader(steps_of(Corpus(str(folder), CFG), max_steps=1000), 0)
    next(loader)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match=f"^the corpus at {folder} can no longer be read: {folder}.*: No such file"):
        for _ in range(50):  # a few steps were made before
            next(loader)
    assert list(loader) == [] and threading.active_count() == before


def test_the_times_move_in_the_last_third():
    cfg = Config(max_steps=300, timestep_logit_mean=1.6, timestep_logit_mean_end=0.4)
    assert [round(at_step(cfg, step).timestep_logit_mean, 6) for step in (0, 200, 250, 300)] == [1.6, 1.6, 1.0, 0.4]
    assert at_step(Config(max_steps=300), 299) == Config(max_steps=300)


def test_a_step_has_the_times_of_its_place_in_the_run(demo_corpus):
    plain = Config(data_dir=str(demo_corpus), mel_mean=-5.0, mel_std=2.0, effective_batch_size=8, batch_size=8, max_steps=30)
    moving = dataclasses.replace(plain, timestep_logit_mean_end=0.4)
    corpus = Corpus(str(demo_corpus), plain)
    for step, shift in ((3, 0.0), (29, 1.2 * (3 * 29 / 30 - 2))):
        a, b = (torch.logit(TrainingSteps(corpus, cfg, byte_tokens, 0, 1)[step][0]["t"]) for cfg in (plain, moving))
        torch.testing.assert_close(a - b, torch.full_like(a, shift), atol=1e-3, rtol=0)
