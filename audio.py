"""Wav files, BigVGAN's log-mel, and its normalisation over a corpus."""
import contextlib
import functools
import math
import os
import struct
import sys

import numpy as np
import soundfile
import soxr
import torch

from common import UserError, replacing
from config import Config

CLAMP = 1e-5
LOG_MEL_FLOOR = float(np.log(CLAMP))  # the log-mel of digital silence


class AudioError(UserError):
    """An unusable sound file. The message is only the reason, as the list of rejected files shows it."""


# --- wav files

def read_wav(path: str, sample_rate: int) -> np.ndarray:
    """Read a sound file as float32 mono (samples,) at `sample_rate`; channels are averaged, other rates resampled.

    Raises AudioError if the file is missing, unreadable, empty, truncated or not finite.
    """
    if not os.path.isfile(path):
        raise AudioError(f"missing file {path}")
    try:
        with open(path, "rb") as f:
            header = f.read(12)
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, MemoryError) as e:  # soundfile raises RuntimeErrors; damaged lengths ask for terabytes
        raise AudioError(f"unreadable file {path}: {e}") from None
    # libsndfile silently returns the part that is left of a truncated wav, so compare with the size in the RIFF header.
    announced, found = int.from_bytes(header[4:8], "little") + 8, os.path.getsize(path)
    if header[:4] == b"RIFF" and found < announced < 2**32:  # a stream's header announces the largest length
        raise AudioError(f"truncated file {path}: {found} of {announced} bytes")
    wav = resample(wav.mean(axis=1), rate, sample_rate) if len(wav) else wav
    if len(wav) == 0:
        raise AudioError(f"zero length in {path}")
    if not np.isfinite(wav).all():
        raise AudioError(f"not finite: samples of {path}")
    return wav


def resample(wav: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """(samples,) at `rate` Hz to (samples · new_rate / rate,) at `new_rate` Hz."""
    return wav if rate == new_rate else soxr.resample(wav, rate, new_rate).astype(np.float32)


def write_wav(path, wav: np.ndarray, sample_rate: int) -> None:
    """Write samples (samples,) as 16-bit PCM, clipped to [-1, 1]. Raises UserError, also for samples that are not finite."""
    with wav_stream(str(path), sample_rate) as append:
        append(wav)


def wav_header(samples: int, sample_rate: int) -> bytes:
    """The 44 bytes before the samples of a 16-bit mono wav file."""
    size = min(2 * samples, 0xFFFFFFFF - 36)
    return struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", size + 36, b"WAVEfmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2, 16,
                       b"data", size)


@contextlib.contextmanager
def wav_stream(path: str, sample_rate: int):
    """Write a 16-bit wav while it is made. The block gets a function that appends samples (n,), clipped to [-1, 1].

    A file gets its name when it is complete. The path "-" is standard output; there the header announces the largest
    possible length, because the length is not known yet. Raises UserError. (Not by libsndfile, which does not report a full
    disk and cannot write to a pipe.)
    """
    def append_to(f):
        def append(wav):
            if not np.isfinite(wav).all():
                raise UserError(f"cannot write {path}: the samples are not finite; the model diverged or its weights are "
                                "damaged")
            f.write((np.clip(wav, -1, 1) * 32767).round().astype("<i2").tobytes())
            f.flush()  # so that a listener at the other end of a pipe hears it now
        return append
    if path == "-":
        try:
            with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as f:
                f.write(wav_header(2**31, sample_rate))
                yield append_to(f)
        except OSError as e:  # the reader of the pipe has ended, or the disk is full
            raise UserError(f"cannot write to standard output: {e.strerror}") from None
        return
    with replacing(path) as tmp, open(tmp, "wb") as f:
        f.write(wav_header(0, sample_rate))
        yield append_to(f)
        samples = (f.tell() - 44) // 2
        f.seek(0)
        f.write(wav_header(samples, sample_rate))


# --- log-mel

@functools.lru_cache(maxsize=16)
def filterbank(sample_rate, n_fft, n_mels, f_min, f_max, device) -> torch.Tensor:
    from librosa.filters import mel  # here, because it loads for a second
    basis = mel(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max)
    return torch.from_numpy(basis).float().to(device)


@functools.lru_cache(maxsize=16)
def inverse_filterbank(*fields) -> torch.Tensor:
    return torch.linalg.pinv(filterbank(*fields))


@functools.lru_cache(maxsize=16)
def hann(win_length, device) -> torch.Tensor:
    return torch.hann_window(win_length, device=device)


def basis_fields(cfg: Config, device) -> tuple:
    return cfg.sample_rate, cfg.n_fft, cfg.n_mels, cfg.f_min, cfg.f_max, str(device)


def mel_basis(cfg: Config, device) -> torch.Tensor:
    """Slaney-normalised mel filterbank (n_mels, n_fft // 2 + 1)."""
    return filterbank(*basis_fields(cfg, device))


def mel_inverse(cfg: Config, device) -> torch.Tensor:
    """Pseudo-inverse of the mel filterbank (n_fft // 2 + 1, n_mels)."""
    return inverse_filterbank(*basis_fields(cfg, device))


def magnitudes(wav: torch.Tensor | np.ndarray, cfg: Config) -> torch.Tensor:
    """Magnitudes (bins, samples // hop_length) of a wav (samples,) in [-1, 1], as BigVGAN's log-mel takes them.

    A wav shorter than one frame is padded with silence. Raises AudioError for an empty wav.
    """
    wav = torch.as_tensor(wav, dtype=torch.float32)
    if wav.numel() == 0:
        raise AudioError("zero length: no samples to take a log-mel of")
    pad = (cfg.n_fft - cfg.hop_length) // 2
    frames = max(1, len(wav) // cfg.hop_length)
    shortest = max(cfg.hop_length, pad + 1)  # reflection needs more samples than it pads
    if len(wav) < shortest:
        wav = torch.nn.functional.pad(wav, (0, shortest - len(wav)))
    wav = torch.nn.functional.pad(wav[None, None], (pad, pad), mode="reflect")[0, 0]
    spec = torch.stft(wav, cfg.n_fft, hop_length=cfg.hop_length, win_length=cfg.win_length,
                      window=hann(cfg.win_length, str(wav.device)), center=False, return_complex=True)
    return torch.sqrt(torch.view_as_real(spec).pow(2).sum(-1) + 1e-9)[:, :frames]


def log_mel(wav: torch.Tensor | np.ndarray, cfg: Config) -> torch.Tensor:
    """BigVGAN's log-mel of a wav (samples,) in [-1, 1]: (samples // hop_length, n_mels), natural logarithm.

    A wav shorter than one frame is padded with silence. Raises AudioError for an empty wav.
    """
    magnitude = magnitudes(wav, cfg)
    return torch.log(torch.clamp(mel_basis(cfg, magnitude.device) @ magnitude, min=CLAMP)).T.contiguous()


def log_mel_range(cfg: Config) -> tuple[np.float16, np.float16]:
    """The lowest and the highest log-mel value that a sound can have: the floor, and the bound for samples in [-10, 10].

    A bin's magnitude is at most the window's sum times the largest sample, and a band's value at most that times the sum of
    its weights. Ten times full scale (20 dB) leaves room for float files and resamplers that overshoot.
    """
    weights, window = mel_basis(cfg, "cpu").sum(1).max(), hann(cfg.win_length, "cpu").sum()
    return np.float16(LOG_MEL_FLOOR), np.float16(math.log(max(10 * window * weights, CLAMP)))


def normalise(log_mels, cfg: Config):
    """Log-mels to zero mean and unit variance over the corpus. Any shape; tensor or array."""
    return (log_mels - cfg.mel_mean) / cfg.mel_std


def denormalise(mels, cfg: Config):
    """The inverse of `normalise`."""
    return mels * cfg.mel_std + cfg.mel_mean
