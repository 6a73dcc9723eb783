"""Text to speech from a checkpoint. This file holds the repo's one sampler: Euler steps with classifier-free guidance.

    python sample.py --text "Hi, how are you?" --out hi.wav                # the voice in the box, voices/joe
    python sample.py --ckpt .artifacts/local/demo/latest.pt --text "My brother painted the old bridge." --out x.wav
    python sample.py --ckpt RUN/latest.pt --file lines.txt --out DIR       # one wav per line, and a page to listen to them
    python sample.py --ckpt RUN/latest.pt --out book.wav < book.txt        # a text of any length
    echo "Hello." | python sample.py --ckpt RUN/latest.pt --out - | aplay  # to a pipe, one sentence after another
    python sample.py --ckpt RUN/latest.pt --serve                          # a web page to type into (serve.py)
    python sample.py --ckpt RUN/latest.pt --export VOICE     # a folder to share, with weights that cannot contain code
    python sample.py --export VOICE --onnx                   # the voice in the box for onnxruntime (onnx_export.py)
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from audio import denormalise, wav_stream
from checkpoint import export, load_checkpoint
from common import UserError, make_folder, pick_device, progress, run_cli, tell, warn, write_file
from config import CHOICES, Config
from eval.measures import clearest_head
from eval.page import write_page
from eval.picture import mel_png, save_map
from model import TTS, autocast
from normalise import as_spoken
from text import Piece, has_words, read_sentences, split_pieces
from vocoder import load_vocoder

VOICE = str(Path(__file__).with_name("voices") / "joe")  # the voice in the box
PLOTTED_SECONDS = 60.0  # of speech, at most, in the picture that --plot writes


# --- the sampler

def text_noise(text: str, frames: int, n_mels: int, seed: int) -> torch.Tensor:
    """Gaussian noise (frames, n_mels) that depends on the seed and the text, and not on the rest of the batch."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")
    return torch.randn(frames, n_mels, generator=torch.Generator().manual_seed(key))


@torch.inference_mode()
def read_texts(model: TTS, texts: list[str], batch_size: int = 16) -> list[tuple]:
    """For each text: its projected tokens (L, D), their shares of the duration (L,), and the duration in seconds.

    Raises UserError for a text that has no letter or digit, or more tokens than the text encoder reads.
    """
    tokens = [torch.tensor(model.tokenise(text)) for text in texts]
    for text, row in zip(texts, tokens):
        if not has_words(text):
            raise UserError(f"nothing to say in the text {text!r}; expected some words")
        if len(row) > model.most_tokens:
            raise UserError(f"the text that begins {text[:30]!r} has {len(row)} tokens, more than the {model.most_tokens} "
                            "that the text encoder reads; split it into sentences and speak them one by one")
    device, read = next(model.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        part = tokens[start:start + batch_size]
        lengths = torch.tensor([len(row) for row in part], device=device)
        with autocast(model.cfg, device):
            features = model.encode(pad_sequence(part, batch_first=True).to(device), lengths)
            log_seconds, log_share = model.durations(features, lengths)
        seconds = log_seconds.exp().tolist()
        if not all(map(math.isfinite, seconds)):
            raise UserError("the model predicts a duration that is not finite; it has diverged or its weights are damaged")
        read += [(f[:len(p)], share[:len(p)], s) for f, share, s, p in zip(features, log_share.exp(), seconds, part)]
    return read


@torch.inference_mode()
def sample(model: TTS, texts: list[str], steps: int = 16, cfg_scale: float = 1.5, seed: int = 0,
           temperature: float = 0.4, seconds: float | None = None, batch_size: int = 16, attention_maps: list | None = None,
           speed: float = 1.0, desc: str | None = None) -> list[torch.Tensor]:
    """The texts as log-mels, each (frames, n_mels) float32 on the CPU.

    Each text lasts `seconds`, or its predicted duration divided by `speed`, and at most cfg.block_size frames. Texts of
    similar duration share a batch, on which a text's result depends by rounding only. Guidance w = `cfg_scale` uses the
    velocity without + w (with - without), with and without text (arXiv 2207.12598). `temperature` scales the noise at the
    start (Grad-TTS, arXiv 2105.06337): below 1 speech is cleaner and less varied. If a list is given as `attention_maps`,
    the cross-attention (positions, tokens) of each text's clearest head at the middle step is appended to it. `desc` is the
    name of a progress bar. Raises UserError for options out of range and for texts that `read_texts` refuses.
    """
    in_range = steps >= 1 and 0 <= cfg_scale < math.inf and 0 <= temperature < math.inf and 0 < speed < math.inf
    if not in_range or (seconds is not None and not 0 < seconds < math.inf):
        raise UserError(f"steps = {steps}, cfg_scale = {cfg_scale}, temperature = {temperature}, speed = {speed}, seconds = "
                        f"{seconds}: expected at least one step, guidance and temperature of 0 or more, and a speed and a "
                        "duration above 0")
    cfg, device, read = model.cfg, next(model.parameters()).device, read_texts(model, texts, batch_size)
    frames = [min(cfg.block_size, max(1, round((seconds or predicted / speed) * cfg.sample_rate / cfg.hop_length)))
              for _, _, predicted in read]
    # Shorter steps near noise, where the words are decided: sway sampling with coefficient -1 (arXiv 2410.06885)
    times = [math.cos(math.pi / 2 * k / steps) for k in range(steps + 1)]
    order = sorted(range(len(texts)), key=lambda i: frames[i])
    mels, clearest = [None] * len(texts), [None] * len(texts)
    bar = progress(total=len(texts) * steps, desc=desc, unit="step", disable=desc is None)
    for start in range(0, len(texts), batch_size):
        rows = order[start:start + batch_size]
        noise = [temperature * text_noise(texts[i], frames[i], cfg.n_mels, seed) for i in rows]
        x = pad_sequence(noise, batch_first=True).to(device)  # (B, T, n_mels)
        both = rows if cfg_scale == 1 else rows * 2  # with guidance, the second half of the batch is computed without text
        no_text = torch.arange(len(both), device=device) >= len(rows)
        features, share = (pad_sequence([read[i][part] for i in both], batch_first=True) for part in (0, 1))
        token_lengths = torch.tensor([len(read[i][0]) for i in both], device=device)
        mel_lengths = torch.tensor([frames[i] for i in both], device=device)
        with autocast(cfg, device):
            text, (alignment, share) = model.condition(features, no_text), model.allot(share, mel_lengths, token_lengths)
            token_positions = model.token_positions(share, token_lengths)
            for k in range(steps):
                t = torch.full(mel_lengths.shape, times[k], device=device)
                step_maps = [] if attention_maps is not None and k == steps // 2 else None
                velocity = model.decoder(x.repeat(len(both) // len(rows), 1, 1), t, text, token_positions, mel_lengths,
                                         token_lengths, alignment, step_maps).float()
                if step_maps:  # a list with (B, heads, positions, tokens) of each block
                    for i, of_text in zip(rows, torch.stack(step_maps, dim=1).cpu().numpy()):
                        clearest[i] = clearest_head(of_text[:, :, :math.ceil(frames[i] / cfg.patch), :len(read[i][0])])
                if cfg_scale != 1:
                    with_text, without = velocity.chunk(2)
                    velocity = without + cfg_scale * (with_text - without)
                x = x - (times[k] - times[k + 1]) * velocity
                bar.update(len(rows))
        for i, mel in zip(rows, x):
            mels[i] = denormalise(mel[:frames[i]].cpu(), cfg)
    bar.close()
    if attention_maps is not None:
        attention_maps += clearest
    return mels


# --- long texts

def fits(model: TTS, text: str, speed: float = 1.0) -> bool:
    """Whether a text is within the limits of the text encoder and of the longest utterance in training."""
    longest = model.cfg.block_size * model.cfg.hop_length / model.cfg.sample_rate  # seconds
    return len(model.tokenise(text)) <= model.most_tokens and read_texts(model, [text])[0][2] / speed <= longest


def read_pieces(model: TTS, texts: Iterable[Iterable[str]], speed: float = 1.0, whole: bool = False,
                characters: str = "", normalise: bool = False) -> Iterator[Piece]:
    """Texts, each an iterable of its parts, as pieces that the model can speak. Piece.line is the number of the text.

    A piece fits (see `fits`), or it is an uncut text with `whole`. With `normalise` it has the words to speak (`as_spoken`).
    Warns once of each character that is not one of `characters`, those of the training texts. Raises UserError if there is
    nothing to say.
    """
    known, piece, short = set(characters), None, functools.partial(fits, model, speed=speed)
    for n, parts in enumerate(texts):
        sentences = [("".join(parts), 0.0)] if whole else read_sentences(parts)
        if normalise:
            sentences = ((as_spoken(text, characters), pause) for text, pause in sentences)
        for piece in (Piece(n, *sentence) for sentence in sentences) if whole else split_pieces(sentences, short, n):
            if known and (unknown := sorted(set(piece.text) - known)):
                known.update(unknown)
                warn(f"the training texts do not contain {' '.join(map(repr, unknown))}; the model may say anything there")
            yield piece
    if piece is None:
        raise UserError("nothing to say; expected some words")


def synthesize(model: TTS, vocode, pieces: Iterable[Piece], batch_size: int, **options) -> Iterator[tuple]:
    """(piece, log-mel, wav) for each piece. `options` are those of `sample`.

    The first piece is a batch of its own, so that a listener soon hears something.
    """
    pieces, size = iter(pieces), 1
    while batch := list(itertools.islice(pieces, size)):
        for piece, mel in zip(batch, sample(model, [piece.text for piece in batch], batch_size=batch_size, **options)):
            yield piece, mel, vocode(mel)
        size = batch_size


# --- the command line

def add_voice_flags(p: argparse.ArgumentParser) -> None:
    """The flags that sample.py and serve.py share."""
    p.add_argument("--ckpt", default=VOICE, help="a checkpoint file, or a folder that --export wrote; default: voices/joe")
    p.add_argument("--steps", type=int, help="Euler steps; default: the run's eval_steps")
    p.add_argument("--cfg_scale", "--cfg-scale", type=float, help="guidance, 1: none; default: the run's eval_cfg_scale")
    p.add_argument("--temperature", type=float, help="scale of the noise at the start; default: the run's eval_temperature")
    p.add_argument("--vocoder", default="auto", choices=CHOICES["eval_vocoder"])
    p.add_argument("--vocoder_model", "--vocoder-model", help="BigVGAN's hub id or folder; default: eval_vocoder_model")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--no_normalise", "--no-normalise", action="store_true",
                   help="speak the text as it is, without writing out numbers, abbreviations and letters (normalise.py)")


def load_voice(args: argparse.Namespace) -> tuple:
    """The model, a function from log-mel to wav, and the checkpoint. Takes options that were not given from the config."""
    device = pick_device(args.device)
    model, ckpt = load_checkpoint(args.ckpt, device)
    cfg = model.cfg
    for name in ("steps", "cfg_scale", "temperature"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(cfg, f"eval_{name}"))
    args.normalise = cfg.normalise and not args.no_normalise
    cfg.eval_vocoder, cfg.eval_vocoder_model = args.vocoder, args.vocoder_model or cfg.eval_vocoder_model
    return model, load_vocoder(cfg, device), ckpt


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_voice_flags(p)
    task = p.add_mutually_exclusive_group()
    task.add_argument("--text", help="the text to speak; default: standard input")
    task.add_argument("--file", help="a text file; each line becomes its own wav")
    task.add_argument("--export", metavar="DIR", help="write a folder to share, and speak nothing")
    p.add_argument("--onnx", action="store_true", help="export for onnxruntime, which needs no torch: graphs and a script")
    task.add_argument("--serve", action="store_true", help="start serve.py, with its flags")
    p.add_argument("--out", help="the wav to write, or - for standard output; with --file the folder")
    p.add_argument("--seconds", type=float, help="duration of the whole text; default: predicted, sentence by sentence")
    p.add_argument("--speed", type=float, default=1.0, help="relative to the training recordings")
    p.add_argument("--num_samples", "--num-samples", type=int, default=1, help="takes: x_0.wav, x_1.wav, …; seeds count up")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--show_text", "--show-text", action="store_true", help="print the words of each piece as it is spoken")
    p.add_argument("--plot", nargs="?", const="", metavar="PNG", help="draw the log-mel; default: beside --out")
    args = p.parse_args(argv)
    if args.out is None and args.export is None:
        raise UserError("expected --out, to speak; or --export DIR, to write a folder to share; or --serve")
    if args.out is not None and args.file is None and Path(args.out).suffix.lower() not in ("", ".wav"):
        raise UserError(f"--out {args.out}: expected a name that ends in .wav, because only 16-bit wav is written")
    if args.onnx and args.export is None:
        raise UserError("--onnx without --export: expected --export DIR --onnx")
    if args.num_samples < 1 or (args.out == "-" and (args.num_samples > 1 or args.file is not None or args.plot == "")):
        raise UserError("expected at least one sample; --out - allows one, no --file, and --plot only with a file name")
    if all(source is None for source in (args.text, args.file, args.export)) and sys.stdin.isatty():
        raise UserError("nothing to say: give --text, --file, or a text on standard input")
    if any("\ud800" <= c <= "\udfff" for c in args.text or ""):  # Python's stand-ins for bytes that it cannot decode
        raise UserError(f"--text {args.text!r} is not UTF-8")
    return args


def read_lines(path: str | None) -> Iterator[str]:
    """The lines of a file, or of standard input if the path is None. Raises UserError."""
    try:
        # sys.stdin itself does not refuse other bytes in every locale
        with open(sys.stdin.fileno() if path is None else path, encoding="utf-8-sig", closefd=path is not None) as f:
            yield from f
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path or 'standard input'}: {e}; expected UTF-8 text") from None


def show(pieces: Iterable[Piece], file) -> Iterator[Piece]:
    """The pieces, whose texts are printed to `file` as they pass."""
    for piece in pieces:
        tell(piece.text, file)
        yield piece


def write_speech(spoken: Iterable[tuple], args, lines: list[str], take: int, cfg: Config) -> Iterator[dict]:
    """Write one take: a wav for each line, piece by piece as they come, and pictures. Yields each wav's row of wer.jsonl."""
    for n, of_line in itertools.groupby(spoken, key=lambda item: item[0].line):
        path = Path(args.out) if args.file is None else Path(args.out, f"{n:06d}.wav")
        path = path if args.num_samples == 1 else path.with_stem(f"{path.stem}_{take}")
        seconds, pause, mels = 0.0, 0, []
        with wav_stream(str(path), cfg.sample_rate) as append:
            for piece, mel, wav in of_line:
                append(np.concatenate([np.zeros(pause, np.float32), wav]))
                if sum(map(len, mels)) * cfg.hop_length < PLOTTED_SECONDS * cfg.sample_rate:
                    mels.append(mel)
                seconds += (pause + len(wav)) / cfg.sample_rate
                pause = round(piece.pause * cfg.sample_rate)
        row = {"idx": n * args.num_samples + take, "audio": path.name, "reference": lines[n], "predicted_seconds": seconds}
        if args.file is not None:
            row["mel_png"] = save_map(path.with_name(f"{path.stem}_mel.png"), np.concatenate(mels), cfg)
        elif args.plot is not None and take == 0:
            write_file(args.plot or Path(args.out).with_suffix(".png"), mel_png(np.concatenate(mels), cfg))
        yield row


def main(argv: list[str]) -> None:
    if "--serve" in argv:  # serve.py imports this file, so it is started and not imported
        flags = [flag for flag in argv if flag != "--serve"]
        os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("serve.py")), *flags])
    args = parse(argv)
    if args.export is not None:
        model, ckpt = load_checkpoint(args.ckpt, "cpu")
        write = export
        if args.onnx:
            from onnx_export import export_onnx as write  # here, because it needs packages that are optional
        write(model, ckpt["step"], args.export, ckpt.get("characters", ""))
        how = f"python {Path(args.export, 'speak_onnx.py')}" if args.onnx else f"--ckpt {args.export}"
        print(f"{args.export}: {', '.join(sorted(os.listdir(args.export)))}; speak with {how}")
        return
    model, vocode, ckpt = load_voice(args)
    cfg, out, start = model.cfg, Path(args.out), time.time()
    messages = sys.stderr if args.out == "-" else None
    options = {name: getattr(args, name) for name in ("steps", "cfg_scale", "temperature", "seconds", "speed")}
    sample(model, [], **options)  # raises UserError for options out of range
    if args.seconds is not None and args.seconds > (longest := cfg.block_size * cfg.hop_length / cfg.sample_rate):
        warn(f"--seconds {args.seconds} is more than the model's longest utterance; the speech will last {longest:.2f} s")
    lines = [args.text]
    if args.file is not None:
        lines = [" ".join(line.split()) for line in read_lines(args.file) if has_words(line)]
    texts = [read_lines(None) if line is None else [line] for line in lines]  # each one as an iterable of its parts
    pieces = read_pieces(model, texts, args.speed, args.seconds is not None, ckpt.get("characters", ""), args.normalise)
    if args.show_text:
        pieces = show(pieces, messages)
    make_folder(out if args.file is not None else out.parent)
    rows = []
    for take, copy in enumerate(itertools.tee(pieces, args.num_samples)):
        spoken = synthesize(model, vocode, copy, cfg.eval_batch_size, seed=args.seed + take, **options)
        rows += write_speech(progress(spoken, desc="synthesizing", unit=" sentences"), args, lines, take, cfg)
    if args.file is not None:
        rows.sort(key=lambda row: row["idx"])
        write_file(out / "wer.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        summary = {"ckpt": args.ckpt, "prompts": args.file, "count": len(rows), "seed": args.seed}
        write_file(out / "summary.json", json.dumps(summary, indent=1))
        write_page(out)
    seconds, took = sum(row["predicted_seconds"] for row in rows), time.time() - start
    tell(f"{args.out}: {seconds:.2f} s of speech in {took:.2f} s, real-time factor {took / seconds:.2f}",
         messages)


if __name__ == "__main__":
    run_cli(main)
