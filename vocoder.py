"""Log-mels to sound: BigVGAN, Griffin-Lim, and a small network that learned from recordings."""
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from audio import hann, mel_inverse
from common import UserError, multiplies_bfloat16, replacing
from config import AUDIO_FIELDS, Config
from pitch import CANDIDATES

LEARNED = "vocoder.safetensors"  # the learned vocoder's file, beside a corpus or a voice
MOMENTUM = 0.99  # of fast Griffin-Lim
QUIET = 1e-4  # smallest magnitude that the network sees
NEAR = 3  # candidates on either side of the likeliest pitch that count in its mean
NOISE = 2**16  # samples of noise, repeated


# --- Griffin-Lim

def pseudo_inverse(log_mels: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Magnitudes (…, T, bins) of log-mels (…, T, n_mels), by the pseudo-inverse of the mel filterbank. Some are negative."""
    return log_mels.float().exp() @ mel_inverse(cfg, log_mels.device).T


def griffin_lim(log_mels: torch.Tensor, cfg: Config, iterations: int = 32) -> np.ndarray:
    """Log-mel (frames, n_mels) to a wav (frames · hop_length,) by fast Griffin-Lim.

    It finds phases for the pseudo-inverse, clamped at zero. The momentum follows Perraudin, Balazs and Søndergaard, "A fast
    Griffin-Lim algorithm" (2013). The random start is fixed, so equal log-mels give equal wavs.
    """
    magnitude = pseudo_inverse(log_mels, cfg).clamp(min=0).T
    # log_mel's frames lie half a hop later than those of a centred STFT. Two extra frames let short input through.
    magnitude = F.pad(magnitude, (0, 2))
    stft = dict(n_fft=cfg.n_fft, hop_length=cfg.hop_length, win_length=cfg.win_length,
                window=hann(cfg.win_length, str(log_mels.device)), center=True)
    generator = torch.Generator().manual_seed(0)
    angle = torch.rand(magnitude.shape, generator=generator).to(magnitude.device) * (2 * np.pi)
    phase, previous = torch.polar(torch.ones_like(angle), angle), torch.zeros((), dtype=torch.complex64)
    previous = previous.to(magnitude.device)
    for _ in range(iterations):
        rebuilt = torch.stft(torch.istft(magnitude * phase, **stft), return_complex=True, pad_mode="constant", **stft)
        phase = rebuilt - MOMENTUM / (1 + MOMENTUM) * previous
        phase = phase / (phase.abs() + 1e-16)
        previous = rebuilt
    wav = torch.istft(magnitude * phase, **stft)
    wav = F.pad(wav, (cfg.hop_length // 2, 0))[:log_mels.shape[0] * cfg.hop_length]
    return wav.cpu().numpy()


# --- BigVGAN

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
    refuse_other_log_mel(model, theirs, cfg)
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


# --- the learned vocoder

def scaled(log_mels: torch.Tensor) -> torch.Tensor:
    """Log-mels of speech, with a mean near 0 and a deviation near 1."""
    return (log_mels + 5.5) / 2


class Block(nn.Module):
    """A ConvNeXt block along time (arXiv 2201.03545), as in Vocos (arXiv 2306.00814)."""

    def __init__(self, width: int):
        super().__init__()
        self.along_time = nn.Conv1d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x):
        """x (B, T, width) -> (B, T, width)."""
        return x + self.mlp(self.norm(self.along_time(x.mT).mT))


class Convolutions(nn.Module):
    """Blocks over frames, from `inputs` to `outputs` numbers a frame, which are zero before training."""

    def __init__(self, inputs: int, width: int, blocks: int, outputs: int):
        super().__init__()
        self.inp = nn.Conv1d(inputs, width, 7, padding=3)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x):
        """x (B, T, inputs) -> (B, T, outputs), float32. In training, products are in bfloat16 where a CPU is faster so."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training and multiplies_bfloat16(x.device)):
            return self.out(self.norm(self.blocks(self.inp(x.mT).mT))).float()


class SourceFilter(nn.Module):
    """Log-mels to sound: pulses at the voice's pitch, or noise where it has none, with learned magnitudes.

    Griffin-Lim has to find phases, and its harmonics are rough. Those of pulses are smooth. The magnitudes are sharp because
    the network knows the pitch, which a model's log-mels show clearly, even where they blur the harmonics. As in neural
    source-filter models (arXiv 1904.12088), but in the spectrum.
    """

    def __init__(self, cfg: Config, width: int, blocks: int):
        super().__init__()
        self.cfg, bins = cfg, cfg.n_fft // 2 + 1
        self.to_pitch = Convolutions(cfg.n_mels, width // 2, blocks // 2, len(CANDIDATES) + 1)  # the last one: unvoiced
        self.to_magnitudes = Convolutions(cfg.n_mels + 2, width, blocks, 3 * bins)
        margin = cfg.n_fft - cfg.win_length
        constants = {"log_candidates": torch.tensor(CANDIDATES).log().float(),
                     "frequencies": torch.arange(bins) * (cfg.sample_rate / cfg.n_fft),
                     "noise": torch.randn(NOISE, generator=torch.Generator().manual_seed(0)),
                     "window": F.pad(torch.hann_window(cfg.win_length), (margin // 2, margin - margin // 2))}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def pitch_logits(self, log_mels):
        """log_mels (B, T, n_mels) -> logits (B, T, candidates + 1) of pitch.CANDIDATES, and of an unvoiced frame."""
        return self.to_pitch(scaled(log_mels))

    def pitch(self, log_mels):
        """log_mels (B, T, n_mels) -> the pitch in Hz (B, T), a guess where there is none, and voiced (B, T), bool."""
        logits = self.pitch_logits(log_mels)
        p = logits[..., :-1].softmax(dim=-1)  # not of all, where these could all be zero beside a sure unvoiced
        place = torch.arange(p.shape[-1], device=p.device)
        near = p * ((place - p.argmax(dim=-1, keepdim=True)).abs() <= NEAR)
        return ((near @ self.log_candidates) / near.sum(dim=-1)).exp(), logits.softmax(dim=-1)[..., -1] < 0.5

    def log_magnitudes(self, log_mels, f0, voiced):
        """log_mels (B, T, n_mels), their pitch f0 (B, T) in Hz and voiced (B, T), bool -> log magnitudes (B, T, bins).

        They are a correction of the pseudo-inverse, plus a ripple along the frequencies with a peak at each harmonic.
        """
        voiced = voiced[..., None].float()
        x = torch.cat([scaled(log_mels), voiced, 4 * voiced * (f0[..., None] / 100).log()], dim=-1)
        level, once, twice = self.to_magnitudes(x).chunk(3, dim=-1)
        angle = 2 * math.pi * self.frequencies / f0[..., None]
        ripple = voiced * (once * angle.cos() + twice * (2 * angle).cos())
        return pseudo_inverse(log_mels, self.cfg).clamp(min=QUIET).log() + level + ripple

    def source(self, f0):
        """f0 (B, T) in Hz -> pulses (B, T * hop_length), one at each start of a period, between samples where need be."""
        f0 = F.interpolate(f0[:, None], scale_factor=float(self.cfg.hop_length), mode="linear")[:, 0]
        turns = (f0.double() / self.cfg.sample_rate).cumsum(dim=1)
        whole = turns.floor()
        late = ((turns - whole)[:, 1:] / turns.diff(dim=1)).float()  # since the start, in samples
        starts = (whole.diff(dim=1) > 0).float()
        return F.pad(starts * late, (0, 1)) + F.pad(starts * (1 - late), (1, 0))

    def frames(self, wav):
        """wav (B, T * hop_length) -> windowed frames (B, T, n_fft), each with its hop in the middle, as log_mel's frames."""
        size, hop = self.cfg.n_fft, self.cfg.hop_length
        T, count, margin = wav.shape[1] // hop, -(-size // hop), (size - hop) // 2
        blocks = F.pad(wav, (margin, (count - 1) * hop - margin)).unflatten(1, (-1, hop))
        return torch.cat([blocks[:, n:n + T] for n in range(count)], dim=2)[..., :size] * self.window

    def overlap_add(self, frames):
        """Frames (B, T, n_fft) -> their sum (B, T * hop_length): the inverse of `frames`, but for the window."""
        size, hop = self.cfg.n_fft, self.cfg.hop_length
        T, count, margin = frames.shape[1], -(-size // hop), (size - hop) // 2
        blocks = F.pad(frames, (0, count * hop - size)).chunk(count, dim=2)
        total = sum(F.pad(block, (0, 0, n, count - 1 - n)) for n, block in enumerate(blocks))
        return total.flatten(1)[:, margin:margin + T * hop]

    def forward(self, log_mel):
        """log_mel (B, T, n_mels) -> wavs (B, T * hop_length)."""
        f0, voiced = self.pitch(log_mel)
        magnitudes = self.log_magnitudes(log_mel, f0, voiced).exp()
        pulses = self.source(f0)
        noise = self.noise[torch.arange(pulses.shape[1], device=f0.device) % NOISE][None]
        frames = torch.where(voiced[..., None], self.frames(pulses), self.frames(noise))
        weight = self.overlap_add((self.window ** 2).expand(1, log_mel.shape[1], -1)).clamp(min=1e-3)
        for _ in range(2):  # the second time with phases on which neighbouring frames agree
            spectra = torch.fft.rfft(frames)
            spectra = spectra * (magnitudes / spectra.abs().clamp(min=1e-6))
            wav = self.overlap_add(torch.fft.irfft(spectra) * self.window) / weight
            frames = self.frames(wav)
        return wav


def save_learned(net: SourceFilter, path, **facts) -> None:
    """Write the network in half precision, with its sizes, its log-mel's fields and `facts` about its training."""
    about = {k: getattr(net.cfg, k) for k in AUDIO_FIELDS} | facts
    about |= {"width": net.to_magnitudes.out.in_features, "blocks": len(net.to_magnitudes.blocks)}
    weights = {k: v.half() for k, v in net.state_dict().items()}
    with replacing(Path(path)) as tmp:
        tmp.write_bytes(safetensors.torch.save(weights, {"about": json.dumps(about)}))


def load_learned(path, device, cfg: Config) -> SourceFilter:
    """The network that `save_learned` wrote. Raises UserError if the file is damaged or of another log-mel than `cfg`'s."""
    if path is None:
        raise UserError(f"no learned vocoder ({LEARNED}) in {cfg.out_dir} or {cfg.data_dir}; train it with "
                        "train_vocoder.py, or use the griffinlim vocoder")
    damaged = UserError(f"{path} is not a learned vocoder, or it is damaged or of an earlier version; train it again with "
                        "train_vocoder.py, or use the griffinlim vocoder")
    try:
        with safetensors.safe_open(path, "pt") as f:
            about, weights = json.loads(f.metadata()["about"]), {k: f.get_tensor(k).float() for k in f.keys()}
        theirs = {k: about[k] for k in AUDIO_FIELDS}
    except Exception:  # missing file, damaged header or JSON
        raise damaged from None
    refuse_other_log_mel(str(path), theirs, cfg)
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers do not change
            net = SourceFilter(cfg, about["width"], about["blocks"])
        net.load_state_dict(weights)
    except Exception:  # sizes and weights of another network
        raise damaged from None
    return net.eval().requires_grad_(False).to(device)


def refuse_other_log_mel(model: str, theirs: dict, cfg: Config) -> None:
    wrong = [f"{k} {v} (config: {getattr(cfg, k)})" for k, v in theirs.items() if v != getattr(cfg, k)]
    if wrong:
        raise UserError(f"vocoder {model} expects another log-mel than the config's: {', '.join(wrong)}. Name one of the "
                        "config's log-mel with eval_vocoder_model, train one (train_vocoder.py), or use griffinlim")


# --- the choice

def find_learned(cfg: Config) -> Path | None:
    """The learned vocoder beside the voice, else beside its corpus, else None."""
    return next((path for folder in (cfg.out_dir, cfg.data_dir) if (path := Path(folder, LEARNED)).is_file()), None)


def vocoder_kind(cfg: Config, device) -> str:
    """cfg.eval_vocoder, with auto resolved: learned if the voice has its own; else bigvgan on a GPU; on a CPU learned if the
    corpus has one, else griffinlim.
    """
    if cfg.eval_vocoder != "auto":
        return cfg.eval_vocoder
    if Path(cfg.out_dir, LEARNED).is_file():
        return "learned"
    return "bigvgan" if torch.device(device).type == "cuda" else "learned" if find_learned(cfg) else "griffinlim"


def vocoder_name(cfg: Config, device) -> str:
    """The kind of the vocoder; with the start of its file's SHA-256 if it is a learned one, as several may be compared."""
    kind = vocoder_kind(cfg, device)
    return kind if kind != "learned" else f"learned {hashlib.sha256(find_learned(cfg).read_bytes()).hexdigest()[:8]}"


def load_vocoder(cfg: Config, device):
    """A function from a log-mel (frames, n_mels) tensor to a wav (frames · hop_length,) float32 array. Raises UserError."""
    kind = vocoder_kind(cfg, device)
    if kind == "griffinlim":
        return lambda mel: griffin_lim(mel.to(device), cfg)
    if kind == "learned":
        net = load_learned(find_learned(cfg), device, cfg)
    else:
        net = load_bigvgan(cfg.eval_vocoder_model, device, cfg)

    @torch.inference_mode()
    def vocode(mel):
        mel = mel.float().to(device)
        if kind == "bigvgan":
            return net(mel.T[None])[0, 0].cpu().numpy()
        return net(mel[None])[0].cpu().numpy()
    return vocode
