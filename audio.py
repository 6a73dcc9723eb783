"""Sound to log-mel and back: wav files, BigVGAN's log-mel, corpus normalisation, two vocoders.

    python audio.py in.wav --out copy.wav [--vocoder bigvgan|griffinlim] [--model FOLDER]   # a vocoder's copy of a file
"""
import argparse
import contextlib
import functools
import io
import os
import struct
import sys
import time

import numpy as np
import soundfile
import soxr
import torch
from librosa.filters import mel as mel_filterbank

from config import Config, UserError, announce_download, first_line, run_cli

CLAMP = 1e-5
LOWEST_RATE = 1000  # Hz; no speech has less, and resampling a damaged 1 would fill the memory
LOG_MEL_FLOOR = float(np.log(CLAMP))  # what digital silence looks like


class AudioError(UserError):
    """A sound file that cannot be used; the message is the reason alone, fit for a list of rejected files."""


# --- wav files

def read_wav(path: str, sample_rate: int) -> np.ndarray:
    """Read a sound file as float32 mono (samples,) at `sample_rate`, mixed down and resampled as needed.

    Raises AudioError if it is missing, unreadable, empty, not finite, of a rate too low for speech, or a wav or FLAC file
    that was cut off.
    """
    if not os.path.isfile(path):
        raise AudioError(f"missing file {path}")
    try:
        with open(path, "rb") as f:
            header = f.read(12)
        wav, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, RuntimeError, MemoryError) as e:  # soundfile's own are RuntimeErrors; damaged lengths ask for terabytes
        raise AudioError(f"unreadable file {path}: {e}") from None
    # libsndfile returns what there is of a cut-off wav without a word, so compare the size that RIFF announces.
    if header[:4] == b"RIFF" and struct.unpack("<I", header[4:8])[0] != 0xFFFFFFFF:
        announced, found = struct.unpack("<I", header[4:8])[0] + 8, os.path.getsize(path)
        if found < announced:
            raise AudioError(f"truncated file {path}: {found} of {announced} bytes")
    if rate < LOWEST_RATE:
        raise AudioError(f"sample rate {rate} Hz in {path}, expected at least {LOWEST_RATE}")
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
    """Write float samples (samples,) as 16-bit PCM, clipped to [-1, 1]; the file appears whole or not at all.

    Raises UserError if the samples are not finite or the file cannot be written.
    """
    if not np.isfinite(wav).all():
        raise UserError(f"cannot write {path}: the sound is not finite; the model has diverged or its weights are damaged")
    sound, tmp = io.BytesIO(), f"{path}.tmp"
    soundfile.write(sound, np.clip(wav, -1, 1), sample_rate, subtype="PCM_16", format="WAV")
    try:
        with open(tmp, "wb") as f:  # by us: of a full disk libsndfile would say no more than a failed assertion
            f.write(sound.getbuffer())
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror}; name a file in a folder that exists and has room") from None
    finally:
        if os.path.isfile(tmp):
            os.remove(tmp)


@contextlib.contextmanager
def wav_stream(path: str, sample_rate: int):
    """A wav of any length, written as it is made: within this, the value is a function that appends samples (n,).

    16-bit PCM, clipped to [-1, 1], to a file that gets its name when it is whole, or to a pipe with the path "-": there the
    header cannot know the length and says the most it can, as other programs' do. Raises UserError.
    """
    def header(size):
        size = min(size, 0xFFFFFFFF - 36)
        return struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", size + 36, b"WAVEfmt ", 16, 1, 1, sample_rate, 2 * sample_rate, 2,
                           16, b"data", size)

    def append(wav):
        if not np.isfinite(wav).all():
            raise UserError("the sound is not finite; the model has diverged or its weights are damaged")
        f.write((np.clip(wav, -1, 1) * 32767).round().astype("<i2").tobytes())
        if pipe:
            f.flush()  # whoever listens need not wait for more
    pipe, tmp = path == "-", f"{path}.tmp"
    try:
        f = os.fdopen(os.dup(sys.stdout.fileno()), "wb") if pipe else open(tmp, "wb")
        try:
            with f:
                f.write(header(0xFFFFFFFF))
                yield append
                if not pipe:
                    size = f.tell() - 44
                    f.seek(0)
                    f.write(header(size))
            if not pipe:
                os.replace(tmp, path)
        finally:
            if not pipe and os.path.isfile(tmp):
                os.remove(tmp)
    except BrokenPipeError:
        raise UserError("the program that reads this sound has closed the pipe") from None
    except OSError as e:
        raise UserError(f"cannot write {path}: {e.strerror or e}; name a file in a folder that exists and has "
                        "room") from None


# --- log-mel

@functools.lru_cache(maxsize=16)
def mel_basis(sample_rate, n_fft, n_mels, f_min, f_max, device) -> torch.Tensor:
    """Slaney-normalised mel filterbank (n_mels, n_fft // 2 + 1)."""
    basis = mel_filterbank(sr=sample_rate, n_fft=n_fft, n_mels=n_mels, fmin=f_min, fmax=f_max)
    return torch.from_numpy(basis).float().to(device)


@functools.lru_cache(maxsize=16)
def hann(win_length, device) -> torch.Tensor:
    return torch.hann_window(win_length, device=device)


def basis_for(cfg: Config, device) -> torch.Tensor:
    return mel_basis(cfg.sample_rate, cfg.n_fft, cfg.n_mels, cfg.f_min, cfg.f_max, str(device))


def log_mel(wav: torch.Tensor | np.ndarray, cfg: Config) -> torch.Tensor:
    """BigVGAN's log-mel of a wav (samples,) in [-1, 1]: (samples // hop_length, n_mels), natural logarithm.

    Samples short of one frame are filled up with silence. Raises AudioError for an empty wav.
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
    return torch.log(torch.clamp(basis_for(cfg, wav.device) @ magnitude[:, :frames], min=CLAMP)).T.contiguous()


def normalise(log_mels, cfg: Config):
    """Log-mels to zero mean and unit variance over the corpus. Any shape; tensor or array."""
    return (log_mels - cfg.mel_mean) / cfg.mel_std


def denormalise(mels, cfg: Config):
    """The inverse of `normalise`."""
    return mels * cfg.mel_std + cfg.mel_mean


# --- vocoders

def griffin_lim(log_mels: torch.Tensor, cfg: Config, iterations: int = 32, momentum: float = 0.99) -> np.ndarray:
    """Log-mel (frames, n_mels) to a wav (frames · hop_length,) by fast Griffin-Lim.

    The mel filterbank is undone by its pseudo-inverse, clamped at zero; momentum is that of Perraudin, Balazs and
    Søndergaard, "A fast Griffin-Lim algorithm" (2013). The random start is fixed, so that copies repeat.
    """
    basis = basis_for(cfg, log_mels.device)
    magnitude = (torch.linalg.pinv(basis) @ log_mels.float().T.exp()).clamp(min=0)  # (bins, frames)
    # Frames of log_mel sit half a hop later than those of a centred STFT; two frames of slack serve short input.
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


def load_bigvgan(model: str, device, cfg: Config):
    """BigVGAN's generator from a hub id or a folder with config.json and bigvgan_generator.pt.

    Built from its public class, since its own from_pretrained fails under huggingface_hub >= 1. Raises UserError
    with what to install or download if anything is missing, or if its log-mel is another than `cfg`'s.
    """
    try:
        import bigvgan
    except ImportError as e:
        raise UserError(f"the BigVGAN vocoder needs a package that is not installed ({e.name}): "
                        "pip install --no-deps bigvgan==2.4.1, or use the griffinlim vocoder") from None
    folder = model
    if not os.path.isdir(folder):
        try:
            from huggingface_hub import snapshot_download
            announce_download(model)
            folder = snapshot_download(model, allow_patterns=["config.json", "bigvgan_generator.pt"])
        except Exception as e:  # the hub's failures are of many types: offline, unknown id, gated, cut off
            raise UserError(f"cannot get the vocoder '{model}' from the Hugging Face hub ({type(e).__name__}). Download "
                            f"config.json and bigvgan_generator.pt (450 MB) of https://huggingface.co/{model} into a "
                            "folder and name that folder, or use the griffinlim vocoder") from None
    for name in ("config.json", "bigvgan_generator.pt"):
        if not os.path.isfile(os.path.join(folder, name)):
            raise UserError(f"vocoder folder {folder} has no {name}; expected config.json and bigvgan_generator.pt")
    try:
        h = bigvgan.bigvgan.load_hparams_from_json(os.path.join(folder, "config.json"))
        theirs = dict(sample_rate=h.sampling_rate, n_fft=h.n_fft, hop_length=h.hop_size, win_length=h.win_size,
                      n_mels=h.num_mels, f_min=h.fmin, f_max=h.fmax or h.sampling_rate / 2)
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{folder}/config.json is not a BigVGAN's ({e}); download it again") from None
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
    except Exception as e:
        raise UserError(f"{folder} does not hold a BigVGAN's config.json and its weights: "
                        f"{first_line(e)}") from None
    return generator.eval().requires_grad_(False).to(device)


def vocoder_kind(kind: str, device) -> str:
    """'auto' resolved: BigVGAN where there is a GPU, Griffin-Lim where there is none."""
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


def main(argv: list[str]) -> None:
    cfg = Config()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("wav")
    p.add_argument("--out", required=True)
    p.add_argument("--vocoder", default="auto", choices=["auto", "bigvgan", "griffinlim"])
    p.add_argument("--model", default=cfg.eval_vocoder_model)
    args = p.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocode = load_vocoder(args.vocoder, args.model, device, cfg)
    mel = log_mel(read_wav(args.wav, cfg.sample_rate), cfg)
    vocode(mel[:8])  # a first call sets things up
    start = time.time()
    wav = vocode(mel)
    took = time.time() - start
    write_wav(args.out, wav, cfg.sample_rate)
    print(f"{args.out}: {len(wav) / cfg.sample_rate:.2f} s of sound in {took:.2f} s, "
          f"{len(wav) / cfg.sample_rate / took:.0f} x real time")


if __name__ == "__main__":
    run_cli(main)
