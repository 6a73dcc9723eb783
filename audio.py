"""Wav files, BigVGAN's log-mel, normalisation over a corpus, and two vocoders: BigVGAN and Griffin-Lim."""
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
def hann(win_length, device) -> torch.Tensor:
    return torch.hann_window(win_length, device=device)


def mel_basis(cfg: Config, device) -> torch.Tensor:
    """Slaney-normalised mel filterbank (n_mels, n_fft // 2 + 1)."""
    return filterbank(cfg.sample_rate, cfg.n_fft, cfg.n_mels, cfg.f_min, cfg.f_max, str(device))


def log_mel(wav: torch.Tensor | np.ndarray, cfg: Config) -> torch.Tensor:
    """BigVGAN's log-mel of a wav (samples,) in [-1, 1]: (samples // hop_length, n_mels), natural logarithm.

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
    magnitude = torch.sqrt(torch.view_as_real(spec).pow(2).sum(-1) + 1e-9)  # (bins, frames)
    return torch.log(torch.clamp(mel_basis(cfg, wav.device) @ magnitude[:, :frames], min=CLAMP)).T.contiguous()


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


# --- vocoders

def griffin_lim(log_mels: torch.Tensor, cfg: Config, iterations: int = 32, momentum: float = 0.99) -> np.ndarray:
    """Log-mel (frames, n_mels) to a wav (frames · hop_length,) by fast Griffin-Lim.

    The pseudo-inverse of the mel filterbank, clamped at zero, gives the magnitudes. The momentum follows Perraudin, Balazs
    and Søndergaard, "A fast Griffin-Lim algorithm" (2013). The random start is fixed, so equal log-mels give equal wavs.
    """
    basis = mel_basis(cfg, log_mels.device)
    magnitude = (torch.linalg.pinv(basis) @ log_mels.float().T.exp()).clamp(min=0)  # (bins, frames)
    # log_mel's frames lie half a hop later than those of a centred STFT. Two extra frames let short input through.
    magnitude = torch.nn.functional.pad(magnitude, (0, 2))
    stft = dict(n_fft=cfg.n_fft, hop_length=cfg.hop_length, win_length=cfg.win_length,
                window=hann(cfg.win_length, str(log_mels.device)), center=True)
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(magnitude.shape, generator=generator).to(magnitude.device) * (2 * np.pi)
    phase, previous = torch.polar(torch.ones_like(angle), angle), torch.zeros((), dtype=torch.complex64)
    previous = previous.to(magnitude.device)
    for _ in range(iterations):
        rebuilt = torch.stft(torch.istft(magnitude * phase, **stft), return_complex=True, pad_mode="constant", **stft)
        phase = rebuilt - momentum / (1 + momentum) * previous
        phase = phase / (phase.abs() + 1e-16)
        previous = rebuilt
    wav = torch.istft(magnitude * phase, **stft)
    wav = torch.nn.functional.pad(wav, (cfg.hop_length // 2, 0))[:log_mels.shape[0] * cfg.hop_length]
    return wav.cpu().numpy()


def bigvgan_folder(model: str) -> str:
    """The folder of a BigVGAN: `model` itself, or the download of that hub id. Raises UserError if it cannot be had."""
    folder = model
    if not os.path.isdir(folder):
        try:
            from huggingface_hub import snapshot_download
            folder = snapshot_download(model, allow_patterns=["config.json", "bigvgan_generator.pt"])
        except Exception as e:  # offline, unknown id, gated, cut off: the hub raises many types
            raise UserError(f"cannot get the vocoder '{model}' from the Hugging Face hub ({type(e).__name__}). Download "
                            f"config.json and bigvgan_generator.pt (450 MB) of https://huggingface.co/{model} into a "
                            "folder and name that folder, or use the griffinlim vocoder") from None
    for name in ("config.json", "bigvgan_generator.pt"):
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"vocoder folder {folder} has no {name}; expected config.json and bigvgan_generator.pt")
    return folder


def load_bigvgan(model: str, device, cfg: Config):
    """BigVGAN's generator from a hub id, or from a folder with config.json and bigvgan_generator.pt.

    Built from BigVGAN's class, because its from_pretrained fails under huggingface_hub >= 1. Raises UserError if a part is
    missing or damaged, or if its log-mel differs from `cfg`'s.
    """
    try:
        import bigvgan
    except ImportError as e:
        raise UserError(f"the BigVGAN vocoder needs a package that is not installed ({e.name}): "
                        "pip install --no-deps bigvgan==2.4.1, or use the griffinlim vocoder") from None
    folder = bigvgan_folder(model)
    try:
        h = bigvgan.bigvgan.load_hparams_from_json(os.path.join(folder, "config.json"))
        theirs = dict(sample_rate=h.sampling_rate, n_fft=h.n_fft, hop_length=h.hop_size, win_length=h.win_size,
                      n_mels=h.num_mels, f_min=h.fmin, f_max=h.fmax or h.sampling_rate / 2)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}/config.json is not a BigVGAN config ({e}); download it again") from None
    wrong = [f"{k} {v} (config: {getattr(cfg, k)})" for k, v in theirs.items() if v != getattr(cfg, k)]
    if wrong:
        raise UserError(f"vocoder {model} expects another log-mel than the config's: {', '.join(wrong)}")
    try:
        generator = bigvgan.BigVGAN(h)
        state = torch.load(os.path.join(folder, "bigvgan_generator.pt"), map_location="cpu", weights_only=True)["generator"]
        if not any(key.endswith(("weight_g", "original0")) for key in state):  # saved without weight norm
            generator.remove_weight_norm()
            generator.load_state_dict(state)
        else:
            generator.load_state_dict(state)
            generator.remove_weight_norm()
    except Exception as e:  # torch and pickle raise many types
        raise UserError(f"{folder} does not hold the config.json and weights of a BigVGAN ({type(e).__name__})") from None
    return generator.eval().requires_grad_(False).to(device)


def vocoder_kind(kind: str, device) -> str:
    """`kind`, with auto resolved: bigvgan on a GPU, griffinlim on a CPU."""
    return kind if kind != "auto" else "bigvgan" if torch.device(device).type == "cuda" else "griffinlim"


def load_vocoder(kind: str, model: str, device, cfg: Config):
    """A function from a log-mel (frames, n_mels) tensor to a wav (frames · hop_length,) float32 array.

    `kind` is bigvgan, griffinlim or auto; `model` is BigVGAN's hub id or folder. Raises UserError.
    """
    if vocoder_kind(kind, device) == "griffinlim":
        return lambda mel: griffin_lim(mel.to(device), cfg)
    generator = load_bigvgan(model, device, cfg)

    @torch.inference_mode()
    def bigvgan_vocode(mel):
        return generator(mel.float().to(device).T[None])[0, 0].cpu().numpy()
    return bigvgan_vocode
