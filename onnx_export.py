"""A voice as ONNX graphs, to speak without torch.

    python sample.py --export DIR --onnx
    python DIR/speak_onnx.py --text "Hello." --out hello.wav

Each graph takes any batch and any lengths: text.onnx reads the text, decoder.onnx gives the velocity at one time,
vocoder.onnx turns a log-mel into sound. The loop is in speak_onnx.py, which is copied into DIR.
"""
import functools
import json
import logging
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from common import UserError, replacing
from model import TTS
from text_encoder import byte_tokens
from vocoder import LEARNED, find_learned, load_learned

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
`speak_onnx.py` shows how the graphs work together: the Euler steps with guidance.

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
| `vocoder.onnx` | in | `log_mel` | batch, frames, {n_mels} | natural logarithm |
| | out | `wav` | batch, frames · {hop} | |
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


def graphs(model: TTS) -> dict[str, tuple]:
    """Name -> the module, its example inputs, the names of their first axes (None: of fixed size), the outputs' names."""
    cfg, B, L, T = model.cfg, 3, 7, 12  # an example's sizes must be neither 1 nor equal, which export takes as constants
    token_lengths, mel_lengths = torch.tensor([L, L - 2, 3]), torch.tensor([T - 1, T, 5])
    of_text = {"tokens": torch.full((B, L), 100), "token_lengths": token_lengths}
    text, _, share = read_text(model, **of_text)
    of_decoder = {"x": torch.zeros(B, T, cfg.n_mels), "t": torch.full((B,), 0.5), "text": text, "share": share,
                  "mel_lengths": mel_lengths, "token_lengths": token_lengths, "no_text": torch.tensor([False, True, False])}
    batch, tokens, frames = ("batch",), ("batch", "tokens"), ("batch", "frames")
    vocoder = load_learned(find_learned(cfg), "cpu", cfg)
    return {
        "text": (Graph(read_text, model), of_text, [tokens, batch], ["text", "seconds", "share"]),
        "decoder": (Graph(velocity, model), of_decoder, [frames, batch, tokens, tokens, batch, batch, batch], ["velocity"]),
        "vocoder": (vocoder, {"log_mel": torch.zeros(B, T, cfg.n_mels)}, [frames], ["wav"]),
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
    if not find_learned(model.cfg):
        raise UserError(f"--onnx needs the voice's learned vocoder, but {model.cfg.out_dir} has no {LEARNED}; make it with "
                        "train_vocoder.py --ckpt, which takes some minutes and the recordings")
    if Path(folder).exists():
        raise UserError(f"{folder} exists already; name another folder to export to, or delete it")
    cfg = model.cfg
    voice = {name: getattr(cfg, name) for name in ("sample_rate", "hop_length", "n_mels", "mel_mean", "mel_std")}
    options = {name: getattr(cfg, f"eval_{name}") for name in ("steps", "cfg_scale", "temperature")}
    voice |= {"most_frames": cfg.block_size, "characters": characters, "options": options | {"seed": 0, "speed": 1.0}}
    readme = README.format(step=step, characters=characters, width=cfg.width, n_mels=cfg.n_mels, hop=cfg.hop_length)
    with replacing(folder) as tmp:
        tmp.mkdir(parents=True)
        for name, parts in graphs(model).items():
            write_graph(tmp / f"{name}.onnx", *parts)
        (tmp / "voice.json").write_text(json.dumps(voice, indent=1), encoding="utf-8")
        (tmp / "README.md").write_text(readme, encoding="utf-8")
        (tmp / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
