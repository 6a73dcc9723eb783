"""The measures of sound: pitch on tones with a known answer, likeness and naturalness on real speech."""
import dataclasses

import numpy as np
import pytest
import torch
from ljspeech_parts import config_of

import audio
import vocoder
from config import Config
from espeak import espeak_wav
from eval import voice

CFG = Config()


def tone(f0: np.ndarray, harmonics: int = 20) -> np.ndarray:
    """A wav with equal harmonics of a pitch (samples,) in Hz, weaker towards the top, as a voice has them."""
    phase = 2 * np.pi * np.cumsum(f0) / CFG.sample_rate
    wav = sum(np.sin(k * phase) / k for k in range(1, harmonics + 1))
    return (0.2 * wav / np.abs(wav).max()).astype(np.float32)


def same_frames(f0: np.ndarray) -> np.ndarray:
    return np.stack([np.arange(len(f0))] * 2, axis=1)


def melody(middle: float, seconds: float = 1.5, semitones: float = 3.0) -> np.ndarray:
    """A pitch (samples,) in Hz that moves around `middle` as a sine."""
    t = np.arange(int(seconds * CFG.sample_rate)) / CFG.sample_rate
    return middle * 2 ** (semitones / 12 * np.sin(2 * np.pi * t / 1.1))


@pytest.mark.slow  # librosa loads slowly
@pytest.mark.parametrize("hertz", [85, 120, 210, 330])
def test_a_monotone_has_its_pitch_and_no_spread(hertz):
    f0 = voice.pitch(tone(np.full(22050, hertz)), CFG)
    figures = voice.pitch_figures(f0)
    assert len(f0) == 22050 // 256 and figures["f0_mean"] == pytest.approx(hertz, rel=0.015)
    assert figures["f0_spread"] < 0.15 and np.isnan(f0).mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bigvgan24k", "bigvgan44k"])
def test_a_low_voice_has_the_same_pitch_at_any_sample_rate(name):
    """Spectra of 46 ms (2,048 samples at 44.1 kHz) lost a third of this voice's frames."""
    cfg, wav = config_of(name), espeak_wav("The old teacher found a red lamp behind the station.", CFG.sample_rate, pitch=0)
    f0, other = voice.pitch(wav, CFG), voice.pitch(audio.resample(wav, CFG.sample_rate, cfg.sample_rate), cfg)
    assert abs(np.isnan(other).mean() - np.isnan(f0).mean()) < 0.05
    assert voice.pitch_figures(other)["f0_mean"] == pytest.approx(voice.pitch_figures(f0)["f0_mean"], rel=0.02)


@pytest.mark.slow
def test_transposing_moves_the_mean_and_neither_spread_nor_correlation():
    low, high = (voice.pitch(tone(melody(middle)), CFG) for middle in (100, 150))
    a, b = voice.pitch_figures(low), voice.pitch_figures(high)
    assert b["f0_mean"] / a["f0_mean"] == pytest.approx(1.5, rel=0.02)
    truth = (12 * np.log2(melody(100))).std()
    assert a["f0_spread"] == pytest.approx(truth, abs=0.15) and b["f0_spread"] == pytest.approx(truth, abs=0.15)
    assert voice.pitch_correlation(low, high, same_frames(low)) > 0.98
    assert voice.pitch_correlation(low, low, same_frames(low)) == 1
    against = voice.pitch(tone(100 ** 2 / melody(100)), CFG)  # it falls where the other rises
    assert voice.pitch_correlation(low, against, same_frames(low)) < -0.9
    assert voice.pitch_correlation(low, low.repeat(2), np.stack([np.arange(len(low)), 2 * np.arange(len(low))], axis=1)) == 1


@pytest.mark.slow
def test_noise_and_silence_have_no_pitch():
    noise = 0.1 * np.random.default_rng(0).standard_normal(22050).astype(np.float32)
    assert np.isnan(voice.pitch(noise, CFG)).mean() > 0.9
    for wav in (np.zeros(22050, np.float32), np.zeros(100, np.float32)):
        f0 = voice.pitch(wav, CFG)
        assert np.isnan(f0).all() and voice.pitch_figures(f0) == {"f0_mean": None, "f0_spread": None}
        assert voice.pitch_correlation(f0, f0, same_frames(f0)) is None


@pytest.mark.slow
def test_griffin_lim_keeps_the_pitch():
    wav = tone(melody(180))
    copy = vocoder.griffin_lim(audio.log_mel(wav, CFG), CFG)
    f0, copied = voice.pitch(wav, CFG), voice.pitch(copy, CFG)
    assert voice.pitch_correlation(copied, f0, same_frames(f0)) > 0.9


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
