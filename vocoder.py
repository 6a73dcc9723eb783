"""Log-mels to sound: BigVGAN, Griffin-Lim, and Griffin-Lim on magnitudes that a small network learned from recordings."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from audio import hann, mel_inverse
from common import UserError, replacing
from config import AUDIO_FIELDS, Config

LEARNED = "vocoder.safetensors"  # the learned vocoder's file, beside a corpus or a voice
MOMENTUM = 0.99  # of fast Griffin-Lim
QUIET = 1e-4  # smallest magnitude that the network sees


# --- Griffin-Lim

def pseudo_inverse(log_mels: torch.Tensor, cfg: Config) -> torch.Tensor:
    """Magnitudes (…, T, bins) of log-mels (…, T, n_mels), by the pseudo-inverse of the mel filterbank. Some are negative."""
    return log_mels.float().exp() @ mel_inverse(cfg, log_mels.device).T


def griffin_lim(log_mels: torch.Tensor, cfg: Config, magnitudes: torch.Tensor | None = None,
                iterations: int = 32) -> np.ndarray:
    """Log-mel (frames, n_mels) to a wav (frames · hop_length,) by fast Griffin-Lim.

    It finds phases for `magnitudes` (frames, bins); by default they are the pseudo-inverse, clamped at zero. The momentum
    follows Perraudin, Balazs and Søndergaard, "A fast Griffin-Lim algorithm" (2013). The random start is fixed, so equal
    log-mels give equal wavs.
    """
    magnitude = (pseudo_inverse(log_mels, cfg).clamp(min=0) if magnitudes is None else magnitudes).T
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


class Magnitudes(nn.Module):
    """Log-mels to the magnitudes that a sound can have: a correction of the pseudo-inverse, which no sound has."""

    def __init__(self, cfg: Config, width: int, blocks: int):
        super().__init__()
        self.cfg = cfg
        self.inp = nn.Conv1d(cfg.n_mels, width, 7, padding=3)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, cfg.n_fft // 2 + 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, log_mels):
        """log_mels (B, T, n_mels) -> log magnitudes (B, T, bins)."""
        x = (log_mels + 5.5) / 2  # about the mean and deviation of speech
        x = self.blocks(self.inp(x.mT).mT)
        return pseudo_inverse(log_mels, self.cfg).clamp(min=QUIET).log() + self.out(self.norm(x))


def save_learned(net: Magnitudes, path, **facts) -> None:
    """Write the network in half precision, with its sizes, its log-mel's fields and `facts` about its training."""
    about = {k: getattr(net.cfg, k) for k in AUDIO_FIELDS} | facts
    about |= {"width": net.out.in_features, "blocks": len(net.blocks)}
    weights = {k: v.half() for k, v in net.state_dict().items()}
    with replacing(Path(path)) as tmp:
        tmp.write_bytes(safetensors.torch.save(weights, {"about": json.dumps(about)}))


def load_learned(path, device, cfg: Config) -> Magnitudes:
    """The network that `save_learned` wrote. Raises UserError if the file is damaged or of another log-mel than `cfg`'s."""
    if path is None:
        raise UserError(f"no learned vocoder ({LEARNED}) in {cfg.out_dir} or {cfg.data_dir}; train it with "
                        "train_vocoder.py, or use the griffinlim vocoder")
    damaged = UserError(f"{path} is not a learned vocoder, or it is damaged; train it again with train_vocoder.py, or use "
                        "the griffinlim vocoder")
    try:
        with safetensors.safe_open(path, "pt") as f:
            about, weights = json.loads(f.metadata()["about"]), {k: f.get_tensor(k).float() for k in f.keys()}
        theirs = {k: about[k] for k in AUDIO_FIELDS}
    except Exception:  # missing file, damaged header or JSON
        raise damaged from None
    refuse_other_log_mel(str(path), theirs, cfg)
    try:
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers do not change
            net = Magnitudes(cfg, about["width"], about["blocks"])
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
        return griffin_lim(mel, cfg, net(mel[None])[0].exp())
    return vocode
