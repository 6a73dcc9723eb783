"""Likeness and naturalness of real speech."""
import dataclasses

import numpy as np
import pytest
import torch
from test_pitch import melody, tone

import audio
import vocoder
from config import Config
from eval import voice

CFG = Config()


def test_likeness_by_hand():
    """The reference is the mean of the copies, and without its own copy for a copy and a recording. Embeddings do not stay."""
    x, y = np.eye(256)[:2]
    rows = [{"embedding": x, "vocoded_embedding": x, "recording_embedding": y}, {"embedding": y, "vocoded_embedding": x},
            {"embedding": None, "vocoded_embedding": y}, {}]
    voice.compare_voices(rows)
    assert rows[0] == {"likeness": round(2 / 5**0.5, 4), "vocoded_likeness": round(0.5**0.5, 4), "recording_likeness": round(0.5**0.5, 4)}
    assert rows[1]["likeness"] == round(1 / 5**0.5, 4) and rows[2] == {"vocoded_likeness": 0} and rows[3] == {}
    alone = [{"embedding": x, "vocoded_embedding": x}]
    voice.compare_voices(alone)
    assert alone == [{"likeness": 1}]  # the only copy cannot be compared with others


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(voice.importlib.util, "find_spec", lambda name: None if name == "resemblyzer" else name)
    assert "no likeness in" in voice.missing_packages() and "eval/requirements.txt" in voice.missing_packages()
    monkeypatch.setattr(voice.importlib.util, "find_spec", lambda name: name)
    assert voice.missing_packages() == ""


@pytest.mark.slow
def test_naturalness_falls_with_noise():
    pytest.importorskip("speechmos")
    score, wav = voice.load_dnsmos(CFG), tone(melody(180, 2.0))
    noisy = wav + 0.2 * np.random.default_rng(0).standard_normal(len(wav)).astype(np.float32)
    clean, bad = score(wav), score(noisy)
    assert 1 <= bad["dnsmos"] < clean["dnsmos"] <= 5 and bad["dnsmos_overall"] < clean["dnsmos_overall"]
    assert score(np.tile(wav, 2)) == pytest.approx(clean, abs=0.02)  # a short wav is repeated
    assert score(np.zeros(22050, np.float32)) == {}


@pytest.mark.slow
def test_a_wav_is_more_like_itself_than_like_another_voice(demo_corpus):
    pytest.importorskip("resemblyzer")
    from corpus import Corpus
    corpus, embed = Corpus(str(demo_corpus), CFG), voice.load_embedder(CFG)
    a, b = (vocoder.griffin_lim(torch.from_numpy(corpus.mel(i).astype(np.float32)), CFG) for i in (0, 1))
    higher = audio.resample(a, 22050, 15000)  # the same words in another voice
    one, same, other = map(embed, (a, b, higher))
    assert np.linalg.norm(one) == pytest.approx(1, abs=1e-5) and one @ same > one @ other
    assert embed(np.zeros(22050, np.float32)) is None


def test_other_rates_have_their_pitch():
    cfg = dataclasses.replace(CFG, sample_rate=16000, hop_length=200)
    t = np.arange(16000) / 16000
    wav = sum(np.sin(2 * np.pi * 150 * k * t) / k for k in range(1, 15)).astype(np.float32) * 0.1
    f0 = voice.pitch(wav, cfg)
    assert len(f0) == 80 and np.nanmedian(f0) == pytest.approx(150, rel=0.015)
