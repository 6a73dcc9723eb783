"""
python -m pytest tests/test_pitch.py

The pitch, on tones with a known answer and on speech, and its figures.
"""
import numpy as np
import pytest
from ljspeech_parts import config_of

import audio
import vocoder
from config import Config
from espeak import espeak_wav
from eval.voice import pitch_correlation, pitch_figures
from pitch import pitch

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
    f0 = pitch(tone(np.full(22050, hertz)), CFG)
    figures = pitch_figures(f0)
    assert len(f0) == 22050 // 256 and figures["f0_mean"] == pytest.approx(hertz, rel=0.015)
    assert figures["f0_spread"] < 0.15 and np.isnan(f0).mean() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bigvgan24k", "bigvgan44k"])
def test_a_low_voice_has_the_same_pitch_at_any_sample_rate(name):
    """Spectra of 46 ms (2,048 samples at 44.1 kHz) lost a third of this voice's frames."""
    cfg, wav = config_of(name), espeak_wav("The old teacher found a red lamp behind the station.", CFG.sample_rate, pitch=0)
    f0, other = pitch(wav, CFG), pitch(audio.resample(wav, CFG.sample_rate, cfg.sample_rate), cfg)
    assert abs(np.isnan(other).mean() - np.isnan(f0).mean()) < 0.05
    assert pitch_figures(other)["f0_mean"] == pytest.approx(pitch_figures(f0)["f0_mean"], rel=0.02)


@pytest.mark.slow
def test_transposing_moves_the_mean_and_neither_spread_nor_correlation():
    low, high = (pitch(tone(melody(middle)), CFG) for middle in (100, 150))
    a, b = pitch_figures(low), pitch_figures(high)
    assert b["f0_mean"] / a["f0_mean"] == pytest.approx(1.5, rel=0.02)
    truth = (12 * np.log2(melody(100))).std()
    assert a["f0_spread"] == pytest.approx(truth, abs=0.15) and b["f0_spread"] == pytest.approx(truth, abs=0.15)
    assert pitch_correlation(low, high, same_frames(low)) > 0.98
    assert pitch_correlation(low, low, same_frames(low)) == 1
    against = pitch(tone(100 ** 2 / melody(100)), CFG)  # it falls where the other rises
    assert pitch_correlation(low, against, same_frames(low)) < -0.9
    assert pitch_correlation(low, low.repeat(2), np.stack([np.arange(len(low)), 2 * np.arange(len(low))], axis=1)) == 1


@pytest.mark.slow
def test_noise_and_silence_have_no_pitch():
    noise = 0.1 * np.random.default_rng(0).standard_normal(22050).astype(np.float32)
    assert np.isnan(pitch(noise, CFG)).mean() > 0.9
    for wav in (np.zeros(22050, np.float32), np.zeros(100, np.float32)):
        f0 = pitch(wav, CFG)
        assert np.isnan(f0).all() and pitch_figures(f0) == {"f0_mean": None, "f0_spread": None}
        assert pitch_correlation(f0, f0, same_frames(f0)) is None


@pytest.mark.slow
def test_griffin_lim_keeps_the_pitch():
    wav = tone(melody(180))
    copy = vocoder.griffin_lim(audio.log_mel(wav, CFG), CFG)
    f0, copied = pitch(wav, CFG), pitch(copy, CFG)
    assert pitch_correlation(copied, f0, same_frames(f0)) > 0.9


@pytest.mark.slow
def test_the_pitch_lies_between_its_candidates_and_in_the_middle_of_the_frame():
    """A glide of 12 semitones a second: the candidates are a quarter of a semitone apart, and half a hop is 0.07 of one."""
    t = np.arange(22050) / CFG.sample_rate
    f0 = pitch(tone(100 * 2 ** t), CFG)
    truth = 100 * 2 ** ((np.arange(len(f0)) + 0.5) * CFG.hop_length / CFG.sample_rate)
    error = 12 * np.log2(f0 / truth)[10:-10]
    assert abs(np.nanmean(error)) < 0.03 and np.nanstd(error) < 0.06
