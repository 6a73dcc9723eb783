"""A voice as ONNX graphs, to speak without torch.

    python sample.py --export DIR --onnx
    python DIR/speak_onnx.py --text "Hello." --out hello.wav

Each graph takes any batch and any lengths: text.onnx reads the text, decoder.onnx gives the velocity at one time,
magnitudes.onnx and griffin_lim.onnx turn a log-mel into sound. The loops are in speak_onnx.py, which is copied into DIR.
"""
import functools
import json
import logging
import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from common import UserError, replacing
from config import Config
from model import TTS
from text_encoder import byte_tokens
from vocoder import MOMENTUM, find_learned, load_learned, pseudo_inverse

SCRIPT = Path(__file__).with_name("speak_onnx.py")
README = """# A voice as ONNX

Text to speech by onnxruntime, from nanoAudioDiffusion (step {step} of its training). Torch is not needed:

    pip install numpy onnxruntime soundfile
    python speak_onnx.py --text "Hello, how are you today?" --out hello.wav

Write the text as it is spoken: "nine fifteen" and not "9:15", "Doctor Smith" and not "Dr. Smith". The script writes nothing
out: it warns of digits and of all characters that the training texts do not have, and speaks something wrong there. In the
project, `python sample.py --show_text` prints a text as it is spoken. The training texts have these characters:

    {characters}

`voice.json` holds the rates, the log-mel's mean and deviation, the longest utterance in frames and the options' defaults.
`speak_onnx.py` shows how the graphs work together: the Euler steps with guidance, and the iterations of Griffin-Lim.

| graph | | name | shape | |
|---|---|---|---|---|
| `text.onnx` | in | `tokens` | batch, tokens | int64: each UTF-8 byte + 3, then 1; 0 beyond a text's end |
| | in | `token_lengths` | batch | int64; the largest is the number of tokens |
| | out | `text` | batch, tokens, {width} | features |
| | out | `seconds` | batch | duration of the speech |
| | out | `share` | batch, tokens | each token's share of it |
| `decoder.onnx` | in | `x` | batch, frames, {n_mels} | noisy log-mels, with mean 0 and deviation 1 over the corpus |
| | in | `t` | batch | time, from 1 (noise) to above 0 (speech) |
| | in | `text`, `share`, `token_lengths` | | as above |
| | in | `mel_lengths` | batch | int64; the largest is the number of frames |
| | in | `no_text` | batch | bool; without text, for guidance |
| | out | `velocity` | batch, frames, {n_mels} | |
| `magnitudes.onnx` | in | `log_mel` | batch, frames, {n_mels} | natural logarithm |
| | out | `magnitude` | batch, frames, {bins} | of the short-time Fourier transform |
| | out | `phase` | batch, 2, frames, {bins} | random ones to start with: cosines, sines |
| `griffin_lim.onnx` | in | `magnitude`, `phase` | | as above, or the last iteration's `next_phase` |
| | in | `previous` | batch, 2, frames, {bins} | the last iteration's `spectra`; zeros in the first |
| | out | `wav` | batch, frames · {hop} | the sound so far |
| | out | `next_phase`, `spectra` | batch, 2, frames, {bins} | for the next iteration |
"""


# --- the graphs

class Graph(nn.Module):
    """A function of a model and tensors as a module, because torch.export takes nothing else."""

    def __init__(self, function, model: TTS):
        super().__init__()
        self.model, self.forward = model, functools.partial(function, model)


def read_text(model: TTS, tokens, token_lengths):
    """Tokens (B, L) -> projected text (B, L, D), the utterance's seconds (B,), its tokens' shares of them (B, L)."""
    text = model.encode(tokens, token_lengths)
    log_seconds, log_share = model.durations(text, token_lengths)
    return text, log_seconds.exp(), log_share.exp()


def velocity(model: TTS, x, t, text, share, mel_lengths, token_lengths, no_text):
    """Velocity (B, frames, n_mels) of noisy mels x at times t (B,), without text where no_text (B,) is True.

    The largest of mel_lengths (B,) is the number of frames, and that of token_lengths (B,) the number of tokens.
    """
    patch, frames = model.cfg.patch, x.shape[1]
    positions = (frames + patch - 1) // patch
    x = F.pad(x, (0, 0, 0, patch))[:, :positions * patch]  # the decoder would pad by a remainder, which export refuses
    alignment, share = model.allot(share, mel_lengths, token_lengths)
    if alignment is not None:
        torch._check(alignment.shape[1] == positions)  # export cannot know: the size follows from mel_lengths' values
    token_positions, text = model.token_positions(share, token_lengths), model.condition(text, no_text)
    return model.decoder(x, t, text, token_positions, mel_lengths, token_lengths, alignment)[:, :frames]


class Magnitudes(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, learned = cfg, find_learned(cfg)
        self.net = load_learned(learned, "cpu", cfg) if learned else None
        start = 2 * math.pi * torch.rand(64, cfg.n_fft // 2 + 1, generator=torch.Generator().manual_seed(0))
        self.register_buffer("start", torch.stack([start.cos(), start.sin()]))

    def forward(self, log_mel):
        """Log-mels (B, T, n_mels) -> magnitudes (B, T, bins), and random phases for a start (B, 2, T, bins), fixed numbers
        that repeat every 64 frames."""
        magnitude = self.net(log_mel).exp() if self.net is not None else pseudo_inverse(log_mel, self.cfg).clamp(min=0)
        phase = self.start[:, torch.arange(log_mel.shape[1]) % 64]
        return magnitude, phase.expand(log_mel.shape[0], -1, -1, -1)


class GriffinLim(nn.Module):
    """One iteration of `vocoder.griffin_lim`, by matrix products, because onnxruntime's Fourier transforms are slow.

    With time counted from a frame's centre, the real part of its spectrum depends only on the sum of its first half and its
    reversed second half, and the imaginary part only on their difference. That saves half of the products.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.size, self.hop, padding = cfg.n_fft, cfg.hop_length, cfg.n_fft - cfg.win_length
        bins = torch.arange(self.size // 2 + 1).double()
        time = torch.arange(self.size // 2).double() - (self.size - 1) / 2
        angles = 2 * math.pi / self.size * time[:, None] * bins
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", -angles.sin().float())
        weight = torch.where(bins % (self.size // 2) == 0, 1.0, 2.0) / self.size  # of each bin in the inverse transform
        self.register_buffer("weight", weight)
        window = torch.hann_window(cfg.win_length)
        self.register_buffer("window", F.pad(window, (padding // 2, padding - padding // 2)))

    def overlap_add(self, frames):
        """Frames (B, T, n_fft) -> their sum, each a hop later than the last, as blocks of a hop (B, T + more, hop)."""
        count = -(-self.size // self.hop)  # of blocks in a frame
        blocks = F.pad(frames, (0, count * self.hop - self.size)).chunk(count, dim=2)
        return sum(F.pad(block, (0, 0, n, count - 1 - n)) for n, block in enumerate(blocks))

    def forward(self, magnitude, phase, previous):
        """Magnitudes (B, T, bins) and phases (B, 2, T, bins), cosines and sines -> wavs (B, T * hop_length), the next
        phases, and the wavs' spectra, which the next iteration takes as `previous` (the first takes zeros)."""
        T, (real, imaginary) = magnitude.shape[1], ((magnitude * self.weight)[:, None] * phase).unbind(1)
        even, odd = real @ self.cos.T, imaginary @ self.sin.T
        frames = torch.cat([even + odd, (even - odd).flip(2)], dim=2) * self.window
        wav = self.overlap_add(frames) / self.overlap_add((self.window ** 2).expand(1, T, -1)).clamp(min=1e-8)
        frames = torch.cat([wav[:, n:n + T] for n in range(-(-self.size // self.hop))], dim=2)[..., :self.size] * self.window
        left, right = frames[..., :self.size // 2], frames[..., self.size // 2:].flip(2)
        spectra = torch.stack([(left + right) @ self.cos, (left - right) @ self.sin], dim=1)
        phase = spectra - MOMENTUM / (1 + MOMENTUM) * previous
        phase = phase / (phase * phase).sum(1, keepdim=True).sqrt().clamp(min=1e-16)  # the exporter would drop + 1e-16
        wav = wav.flatten(1)[:, (self.size - self.hop) // 2:][:, :T * self.hop]
        return wav, phase, spectra


def graphs(model: TTS) -> dict[str, tuple]:
    """Name -> the module, its example inputs, the names of their first axes (None: of fixed size), the outputs' names."""
    cfg, B, L, T = model.cfg, 3, 7, 12  # an example's sizes must be neither 1 nor equal, which export takes as constants
    token_lengths, mel_lengths = torch.tensor([L, L - 2, 3]), torch.tensor([T - 1, T, 5])
    of_text = {"tokens": torch.full((B, L), 100), "token_lengths": token_lengths}
    text, _, share = read_text(model, **of_text)
    of_decoder = {"x": torch.zeros(B, T, cfg.n_mels), "t": torch.full((B,), 0.5), "text": text, "share": share,
                  "mel_lengths": mel_lengths, "token_lengths": token_lengths, "no_text": torch.tensor([False, True, False])}
    spectra = torch.zeros(B, T, cfg.n_fft // 2 + 1), *torch.zeros(2, B, 2, T, cfg.n_fft // 2 + 1)
    batch, tokens, frames, parts = ("batch",), ("batch", "tokens"), ("batch", "frames"), ("batch", None, "frames")
    return {
        "text": (Graph(read_text, model), of_text, [tokens, batch], ["text", "seconds", "share"]),
        "decoder": (Graph(velocity, model), of_decoder, [frames, batch, tokens, tokens, batch, batch, batch], ["velocity"]),
        "magnitudes": (Magnitudes(cfg), {"log_mel": torch.zeros(B, T, cfg.n_mels)}, [frames], ["magnitude", "phase"]),
        "griffin_lim": (GriffinLim(cfg), dict(zip(["magnitude", "phase", "previous"], spectra)), [frames, parts, parts],
                        ["wav", "next_phase", "spectra"]),
    }


# --- operators that ONNX does not have, in others that it has

def running(reduce, x, worst):
    """The running maximum or minimum of x (B, n) along dim 1, and indices, which align.py does not use."""
    place = torch.arange(x.shape[1], device=x.device)
    best = reduce(x[:, None].where(place <= place[:, None], worst), dim=2)
    return best, torch.zeros_like(best)


def searchsorted(edges, values, **right):
    """How many of the edges (B, n) are at or below each value (B, m): searchsorted with right=True."""
    return (edges[:, None] <= values[..., None]).sum(dim=2)


REPLACED = {
    torch.ops.aten.cummax.default: lambda x, dim: running(torch.amax, x, torch.iinfo(x.dtype).min),
    torch.ops.aten.cummin.default: lambda x, dim: running(torch.amin, x, torch.iinfo(x.dtype).max),
    torch.ops.aten.searchsorted.Tensor: searchsorted,
}


# --- writing

@torch.no_grad()
def write_graph(path: Path, graph: nn.Module, example: dict, axes: list[tuple], outputs: list[str]) -> None:
    """Write a graph as an ONNX file, with weights beyond 1.5 GB in a file beside it."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    graph(**example)  # so that caches, such as the mel filterbank's, hold tensors and not the exporter's symbols
    axes = [{axis: name for axis, name in enumerate(names) if name} for names in axes]
    sizes = [dict.fromkeys(names, Dim.AUTO) for names in axes]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that this project does not use
    with warnings.catch_warnings(action="ignore"):  # torch's, about its own code
        program = torch.export.export(graph, tuple(example.values()), dynamic_shapes=sizes, strict=False)
        program = torch.onnx.export(program.run_decompositions(REPLACED), input_names=list(example), output_names=outputs,
                                    dynamic_shapes=axes, verbose=False)
    ClearMetadataAndDocStringPass()(program.model)  # the exporter notes this machine's paths at every node
    program.save(path)


def export_onnx(model: TTS, step: int, folder: str, characters: str = "") -> None:
    """Write a voice as ONNX graphs, with a README and a script that speaks. The folder is complete or not there.

    `characters` are those of the training texts. Raises UserError if packages are missing, if the folder exists, and for a
    text encoder whose tokens are not bytes.
    """
    try:
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as e:
        raise UserError(f'--onnx needs a package that is not installed ({e.name}): pip install "onnxscript>=0.7"') from None
    if model.tokenise is not byte_tokens:
        raise UserError(f"text_encoder_name: {model.cfg.text_encoder_name}: its tokeniser cannot be written as ONNX; "
                        "expected one that reads bytes: random, or a ByT5")
    if Path(folder).exists():
        raise UserError(f"{folder} exists already; name another folder to export to, or delete it")
    cfg = model.cfg
    voice = {name: getattr(cfg, name) for name in ("sample_rate", "hop_length", "n_mels", "mel_mean", "mel_std")}
    options = {name: getattr(cfg, f"eval_{name}") for name in ("steps", "cfg_scale", "temperature")}
    voice |= {"most_frames": cfg.block_size, "characters": characters, "options": options | {"seed": 0, "speed": 1.0}}
    readme = README.format(step=step, characters=characters, width=cfg.width, n_mels=cfg.n_mels, bins=cfg.n_fft // 2 + 1,
                           hop=cfg.hop_length)
    with replacing(folder) as tmp:
        tmp.mkdir(parents=True)
        for name, parts in graphs(model).items():
            write_graph(tmp / f"{name}.onnx", *parts)
        (tmp / "voice.json").write_text(json.dumps(voice, indent=1), encoding="utf-8")
        (tmp / "README.md").write_text(readme, encoding="utf-8")
        (tmp / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
