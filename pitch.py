"""The pitch (fundamental frequency, F0) of a recording, frame by frame."""
import functools

import numpy as np

from config import Config

SEMITONES = np.arange(0, 12 * np.log2(500 / 60), 0.25)
CANDIDATES = 60 * 2 ** (SEMITONES / 12)  # Hz
WINDOW = 0.093  # seconds of the spectra: the harmonics of a low voice are apart
HARMONICS, HIGHEST = 8, 4000.0  # number of harmonics that count, and the highest frequency in Hz
UNVOICED = 0.1  # score of an unvoiced frame
JUMP, SWITCH = 0.12, 0.1  # costs of a semitone's change, and of a change of voicing
QUIET = 0.02  # frames that are quieter than the loudest one by this factor are unvoiced


def best_path(scores: np.ndarray) -> np.ndarray:
    """The best candidate of each frame, or -1 for unvoiced, by Viterbi's algorithm. Scores are (frames, candidates)."""
    n = scores.shape[1]
    steps = np.abs(np.arange(n)[:, None] - np.arange(n)) * (SEMITONES[1] - SEMITONES[0])
    states = np.full((n + 1, n + 1), -SWITCH)  # from, to; the last state is unvoiced
    states[:n, :n], states[n, n] = -np.minimum(JUMP * steps, 1), 0
    scores = np.pad(scores, ((0, 0), (0, 1)), constant_values=UNVOICED)
    total, back = scores[0], []
    for frame in scores[1:]:
        reached = total[:, None] + states
        back.append(reached.argmax(axis=0))
        total = reached.max(axis=0) + frame
    path = [total.argmax()]
    for origin in back[::-1]:
        path.append(origin[path[-1]])
    path = np.array(path[::-1])
    return np.where(path == n, -1, path)


def between(path: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Where the scores (frames, candidates) peak around a path, in candidates: by a parabola through three of them."""
    middle, frames = path.clip(1, scores.shape[1] - 2), np.arange(len(path))
    left, top, right = (scores[frames, middle + n] for n in (-1, 0, 1))
    return middle + (0.5 * (left - right) / np.minimum(left - 2 * top + right, -1e-9)).clip(-1, 1)


@functools.lru_cache
def harmonic_kernel(window: int, sample_rate: int) -> np.ndarray:
    """Cosines (candidates, bins) that peak at each candidate's harmonics, over the bins of a spectrum below HIGHEST."""
    bins = np.arange(window // 2 + 1) * sample_rate / window
    harmonic = bins[bins < HIGHEST] / CANDIDATES[:, None]  # the bin's place among the candidate's harmonics
    kernel = np.where((harmonic > 0.25) & (harmonic < HARMONICS + 0.5), np.cos(2 * np.pi * harmonic), 0)
    kernel *= np.where(harmonic < 0.75, 0.5, 1) / np.sqrt(np.maximum(harmonic, 0.5))
    return kernel / np.linalg.norm(kernel, axis=1, keepdims=True)


def pitch(wav: np.ndarray, cfg: Config) -> np.ndarray:
    """The fundamental frequency (frames,) in Hz of a wav (samples,), one for each log-mel frame; NaN where it is unvoiced.

    A candidate's score is the correlation of the spectrum, in square roots of amplitudes, with a cosine that peaks at the
    candidate's harmonics and is lowest halfway between them, as in SWIPE (Camacho and Harris, JASA 2008). The spectrum's
    phases do not count, because Griffin-Lim's are rough: methods on the waveform lose most of the pitch of its copies
    of a low voice. The path is sought around the median of the frames' best candidates, against errors of an octave (after
    De Looze and Hirst, Speech Prosody 2008).
    """
    from librosa import stft  # here, because librosa loads slowly
    window = 2 ** round(np.log2(WINDOW * cfg.sample_rate))  # samples
    kernel = harmonic_kernel(window, cfg.sample_rate)
    centred = np.pad(wav, (0, cfg.hop_length))[cfg.hop_length // 2:]  # log_mel's frames lie half a hop later than librosa's
    amplitudes = np.abs(stft(centred, n_fft=window, hop_length=cfg.hop_length))
    amplitudes = amplitudes[:kernel.shape[1], :len(wav) // cfg.hop_length].T
    loudness = np.linalg.norm(amplitudes, axis=1, keepdims=True)
    roots = np.sqrt(amplitudes)
    scores = roots @ kernel.T / np.maximum(np.linalg.norm(roots, axis=1, keepdims=True), 1e-9)
    scores = np.where(loudness > max(QUIET * loudness.max(initial=0), 1e-3), scores, 0)
    voiced = scores.max(axis=1) > UNVOICED
    if not voiced.any():
        return np.full(len(scores), np.nan)
    middle = np.median(CANDIDATES[scores.argmax(axis=1)[voiced]])
    near = np.flatnonzero((CANDIDATES > 0.55 * middle) & (CANDIDATES < 1.9 * middle))
    scores = scores[:, near]
    path = best_path(scores)
    peaks = CANDIDATES[0] * 2 ** ((near[0] + between(path, scores)) * (SEMITONES[1] - SEMITONES[0]) / 12)
    return np.where(path >= 0, peaks, np.nan)
