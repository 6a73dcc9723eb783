"""records/peers/matcha_tts.py: what it gives to Matcha-TTS, what it refuses, and, where the package is, a whole small run."""
import importlib.util
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import evaluator
from common import UserError
from config import Config
from corpus import Corpus
from records.peers import matcha_tts

HAS_MATCHA = importlib.util.find_spec("matcha") is not None
lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 20)), min_size=1, max_size=5)


@given(lengths)
def test_a_batch_is_padded_normalised_and_complete(sizes):
    cfg, rng = Config(mel_mean=-5.0, mel_std=2.0), np.random.default_rng(0)
    mels = [rng.normal(-5, 2, (frames, 80)).astype(np.float16) for frames, _ in sizes]
    tokens = [list(rng.integers(1, 178, count)) for _, count in sizes]
    batch = matcha_tts.make_batch(mels, tokens, cfg)
    for length, longest in ((batch["y"].shape[2], max(map(len, mels))), (batch["x"].shape[1], max(map(len, tokens)))):
        assert length % 16 == 0 and 0 <= length - longest < 16
    assert batch["x"].dtype == torch.int64
    assert batch["y_lengths"].tolist() == [len(mel) for mel in mels] and batch["x_lengths"].tolist() == [len(ids) for ids in tokens]
    for x, y, mel, ids in zip(batch["x"], batch["y"], mels, tokens):
        assert x[:len(ids)].tolist() == ids and not x[len(ids):].any() and not y[:, len(mel):].any()
        np.testing.assert_allclose(y[:, :len(mel)].T.numpy(), (mel.astype(np.float32) + 5) / 2, rtol=1e-6)


def test_batches_are_random_and_go_on_after_an_epoch(demo_corpus):
    cfg = Config(data_dir=str(demo_corpus), mel_mean=-5.0, mel_std=2.0)
    corpus, asked = Corpus(cfg.data_dir, cfg), []
    batches = matcha_tts.training_batches(corpus, cfg, lambda text: asked.append(text) or list(text.encode()))
    train = [text for text, split in zip(corpus.texts, corpus.splits) if split == "train"]
    assert asked == train  # all phonemes are made before the first batch, which the clock of training counts
    texts = []
    for _ in range(2):  # 48 utterances: one batch an epoch
        batch = next(batches)
        texts.append([bytes(x[:n].tolist()).decode() for x, n in zip(batch["x"], batch["x_lengths"])])
        frames = {text: count for text, count in zip(corpus.texts, corpus.frames)}
        assert [frames[text] for text in texts[-1]] == batch["y_lengths"].tolist()
    assert len(set(texts[0])) == len(set(texts[1])) == 32 and set(texts[0]) <= set(train) and texts[0] != texts[1]


@pytest.mark.parametrize("flags, complaint", [
    (["--at", "soon"], "--at soon: expected minutes"), (["--at", "5", "--minutes", "2"], "0 < at < minutes"),
    (["--minutes", "0"], "0 < at < minutes"), (["--learning_rat", "1"], "nearest valid key"), ([], "no processed corpus")])
def test_mistakes_are_refused_before_anything_is_trained(flags, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        matcha_tts.main(["--data_dir", str(tmp_path / "none"), "--out", str(tmp_path / "out"), *flags])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(HAS_MATCHA, reason="Matcha-TTS is installed")
def test_without_the_package_it_says_how_to_get_it(demo_corpus):
    with pytest.raises(UserError, match="start records/peers/matcha_tts.sh"):
        matcha_tts.main(["--data_dir", str(demo_corpus)])
    assert (ROOT / "records/peers/matcha_tts.sh").stat().st_mode & 0o111


def test_the_evaluator_lets_a_peer_speak(demo_corpus, tmp_path):
    """Figures, pictures and the page need no model of ours."""
    class Repeats:
        def speak(self, texts, cfg):
            return [torch.from_numpy(prompt.mel) for prompt in prompts], [[np.eye(10)] for _ in texts]
    cfg = Config(data_dir=str(demo_corpus), eval_judge="none", eval_num_samples=2, eval_vocoder="griffinlim", mel_mean=-5, mel_std=2)
    prompts = evaluator.load_prompts(cfg)
    summary = evaluator.evaluate(Repeats(), cfg, prompts, tmp_path, evaluator.Ranks(0, 1, torch.device("cpu")), 7, "peer.pt")
    assert summary["count"] == 2 and summary["mcd"] < 1e-6 and summary["duration_error"] == 0 and (tmp_path / "000001.wav").exists()


@pytest.mark.slow
def test_matcha_trains_and_is_evaluated(demo_corpus, tmp_path, monkeypatch):
    pytest.importorskip("matcha")
    monkeypatch.setattr(matcha_tts, "BATCH_SIZE", 4)
    clock = itertools.count()
    monkeypatch.setattr(matcha_tts, "time", SimpleNamespace(time=lambda: float(next(clock))))  # a step takes a second
    out = tmp_path / "out"
    small = ["--data_dir", str(demo_corpus), "--eval_judge", "none", "--eval_num_samples", "1", "--block_size", "200"]
    matcha_tts.main([*small, "--minutes", "0.1", "--at", "0.05", "--lr", "1e-3", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert [wav.parent.name for wav in sorted(out.glob("eval/*/000000.wav"))] == ["step_00000003", "step_00000006"]
    with pytest.raises(UserError, match="holds a run already"):
        matcha_tts.main([*small, "--out", str(out)])
    matcha_tts.main([*small, "--ckpt", str(out / "latest.pt"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again/000000.wav").read_bytes() == (out / "eval/step_00000006/000000.wav").read_bytes()
