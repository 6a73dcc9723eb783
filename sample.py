"""Text to speech from a checkpoint. The repo's one sampler lives here: Euler steps with classifier-free guidance.

    python sample.py --ckpt .artifacts/local/demo/latest.pt --text "My brother painted the old bridge." --out x.wav
    python sample.py --ckpt RUN/latest.pt --text "…" --steps 50 --cfg_scale 2.0 --seed 7 --speed 1.2 --out x.wav
    python sample.py --ckpt RUN/latest.pt --file lines.txt --out DIR       # a wav a line, and a page to listen to
    python sample.py --ckpt RUN/latest.pt --out book.wav < book.txt        # of any length, a sentence at a time
    echo "Hello." | python sample.py --ckpt RUN/latest.pt --out - | aplay  # wav to a pipe
    python sample.py --ckpt RUN/latest.pt --serve                          # a page to type into, on 127.0.0.1
    python sample.py --ckpt RUN/latest.pt --export VOICE     # a folder to share: safetensors, which cannot hold code
    python sample.py --ckpt VOICE --text "…" --out x.wav
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sentencex import get_sentence_boundaries
from tqdm import tqdm

from audio import denormalise, load_vocoder, wav_stream
from checkpoint import export, load_checkpoint
from config import Config, UserError, first_line, run_cli, waiting
from eval.measures import clearest_head
from eval.page import draw, draw_mel, write_bytes, write_page
from model import TTS, autocast

SENTENCE, PARAGRAPH, CUT = 0.25, 0.6, 0.1  # seconds of silence behind each, and where a sentence was too long
MOST_HELD = 1 << 16  # characters without an end of a sentence that are kept to look for one
MOST_DRAWN = 60.0  # seconds of sound in a picture


def text_noise(text: str, frames: int, n_mels: int, seed: int) -> torch.Tensor:
    """Gaussian noise (frames, n_mels) that depends on (seed, text) alone, not on what else is in the batch."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")
    return torch.randn(frames, n_mels, generator=torch.Generator().manual_seed(key))


@torch.inference_mode()
def read_texts(model: TTS, texts: list[str], batch_size: int = 16) -> list[tuple]:
    """Of each text: its projected tokens (L, D), their shares of the time (L,), and the seconds it will last.

    Raises UserError for a text without a letter or digit, or longer than the text encoder reads.
    """
    for text in texts:
        if not any(c.isalnum() for c in text):
            raise UserError(f"nothing to say in the text {text!r}; expected some words")
        if any("\ud800" <= c <= "\udfff" for c in text):  # what Python makes of bytes that are not UTF-8
            raise UserError(f"the text {text!r} is not Unicode; expected UTF-8")
    tokens = [torch.tensor(model.tokenise(text)) for text in texts]
    for text, row in zip(texts, tokens):
        if model.most_tokens and len(row) > model.most_tokens:
            raise UserError(f"the text that begins {text[:30]!r} has {len(row)} tokens, more than the {model.most_tokens} "
                            "that the text encoder reads; split it into sentences and speak them one by one")
    device, read = next(model.parameters()).device, []
    for start in range(0, len(texts), batch_size):
        part = tokens[start:start + batch_size]
        lengths = torch.tensor([len(p) for p in part], device=device)
        with autocast(model.cfg, device):
            features = model.encode(torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device), lengths)
            log_seconds, log_share = model.durations(features, lengths)
        seconds = log_seconds.exp().tolist()
        if not all(map(math.isfinite, seconds)):
            raise UserError("the model predicts a duration that is not finite; it has diverged or its weights are damaged")
        read += [(f[:len(p)], share[:len(p)], s) for f, share, s, p in zip(features, log_share.exp(), seconds, part)]
    return read


@torch.inference_mode()
def sample(model: TTS, texts: list[str], steps: int = 32, cfg_scale: float = 2.0, seed: int = 0,
           seconds: float | None = None, batch_size: int = 16, maps: list | None = None, speed: float = 1.0,
           progress: str | None = None) -> list[torch.Tensor]:
    """Speak texts: a list of log-mels, each (frames, n_mels) float32 on the CPU, in the order of `texts`.

    Durations are predicted, and divided by `speed`, unless `seconds` gives one for all; none exceeds cfg.block_size frames.
    Utterances of like length share a batch, and an utterance's outcome does not depend on its batch. `cfg_scale` w mixes
    velocities as without + w (with - without) (arXiv 2207.12598); at 1 the text-free half is not computed. A list given as
    `maps` gets each text's cross-attention at the middle step: (positions, tokens) of the head that tells it in the clearest
    order. A bar of the name `progress` shows what takes longer than two seconds. Raises UserError for a text that
    `read_texts` refuses, and for numbers out of range.
    """
    cfg, device = model.cfg, next(model.parameters()).device
    if (steps < 1 or not 0 <= cfg_scale < math.inf or not 0 < speed < math.inf
            or (seconds is not None and not 0 < seconds < math.inf)):
        raise UserError(f"steps = {steps}, cfg_scale = {cfg_scale}, speed = {speed}, seconds = {seconds}: expected at least "
                        "one step, guidance of 0 or more, and a speed and a duration above 0")
    read = read_texts(model, texts, batch_size)
    features, shares = [f for f, _, _ in read], [share for _, share, _ in read]
    spoken = [seconds or predicted / speed for _, _, predicted in read]
    frames = [min(cfg.block_size, max(1, round(s * cfg.sample_rate / cfg.hop_length))) for s in spoken]
    order = sorted(range(len(texts)), key=lambda i: frames[i])
    mels, looks = [None] * len(texts), [None] * len(texts)
    bar = waiting(total=len(texts) * steps, desc=progress, unit="step", disable=progress is None)
    for start in range(0, len(texts), batch_size):
        rows = order[start:start + batch_size]
        n = torch.tensor([frames[i] for i in rows], device=device)
        token_lengths = torch.tensor([len(features[i]) for i in rows], device=device)
        x = torch.nn.utils.rnn.pad_sequence([text_noise(texts[i], frames[i], cfg.n_mels, seed) for i in rows],
                                            batch_first=True).to(device)
        feature, share = (torch.nn.utils.rnn.pad_sequence([of[i] for i in rows], batch_first=True)
                          for of in (features, shares))
        drop = torch.zeros(len(rows), dtype=torch.bool, device=device)
        guided = cfg_scale != 1
        if guided:  # the half without text rides in the same batch
            drop = torch.cat([drop, ~drop])
            feature, share = feature.repeat(2, 1, 1), share.repeat(2, 1)
            n, token_lengths = n.repeat(2), token_lengths.repeat(2)
        with autocast(cfg, device):
            text, path = model.condition(feature, drop), model.path(share, n, token_lengths)
            where = model.positions(share, token_lengths)
            for k in range(steps):
                t = torch.full(n.shape, 1 - k / steps, device=device)
                seen = [] if maps is not None and k == steps // 2 else None
                noisy = x.repeat(2, 1, 1) if guided else x
                velocity = model.decoder(noisy, t, text, where, n, token_lengths, path, seen).float()
                for i, look in zip(rows, torch.stack(seen, dim=1).cpu().numpy() if seen else ()):  # the half with text
                    looks[i] = clearest_head(look[:, :, :-(-frames[i] // cfg.patch), :len(features[i])])
                if guided:
                    given, without = velocity.chunk(2)
                    velocity = without + cfg_scale * (given - without)
                x = x - velocity / steps
                bar.update(len(rows))
        for i, mel in zip(rows, x):
            mels[i] = denormalise(mel[:frames[i]].float().cpu(), cfg)
    bar.close()
    if maps is not None:
        maps += looks
    return mels


# --- long texts

class Piece(NamedTuple):
    """What is spoken in one go, of the line (from 0) of a file, with the seconds of silence behind it."""
    line: int
    text: str
    pause: float


def read_sentences(parts: Iterable[str]) -> Iterator[tuple[str, float]]:
    """The sentences of a text that comes in parts, each with the silence behind it; only the last ones stay in memory."""
    held = ""
    for part in itertools.chain(parts, [None]):
        held += part or ""
        found = get_sentence_boundaries("en", held) if held.strip() else []
        # what comes last may go on in the next part
        done = len(found) if part is None or len(held) > MOST_HELD else max(0, len(found) - 2)
        for n, sentence in enumerate(found[:done]):
            text = " ".join(sentence["text"].split())
            if any(c.isalnum() for c in text):
                yield text, PARAGRAPH if n + 1 < len(found) and found[n + 1]["is_paragraph_break"] else SENTENCE
        held = "".join(sentence["text"] for sentence in found[done:])


def cut(text: str, fits) -> list[str]:
    """A text in parts that fit: halved behind a clause where there is one, else between words, else anywhere."""
    if not fits(text):
        for mark in (r"(?<=[,;:–—])\s+", r"\s+", ""):
            cuts = [m.span() for m in re.finditer(mark, text) if 0 < m.start() and m.end() < len(text)]
            if cuts:
                left, right = min(cuts, key=lambda span: abs(sum(span) - len(text)))
                return cut(text[:left], fits) + cut(text[right:], fits)
    return [text]


def read_pieces(model: TTS, sentences: Iterable[tuple[str, float]], speed: float, line: int = 0) -> Iterator[Piece]:
    """Sentences as pieces that the text encoder reads whole and the model speaks within its longest utterance."""
    cfg = model.cfg
    longest = cfg.block_size * cfg.hop_length / cfg.sample_rate

    def fits(text):
        if model.most_tokens and len(model.tokenise(text)) > model.most_tokens:
            return False
        return not any(c.isalnum() for c in text) or read_texts(model, [text])[0][2] / speed <= longest
    for text, pause in sentences:
        parts = [part for part in cut(text, fits) if any(c.isalnum() for c in part)]
        yield from (Piece(line, part, CUT if n < len(parts) else pause) for n, part in enumerate(parts, 1))


def speak(model: TTS, vocode, pieces: Iterator[Piece], takes: int, seed: int, batch_size: int, **how) -> Iterator[tuple]:
    """(piece, log-mels, wavs) one after another, the last two with an entry for each of `takes`, whose seeds count up.

    The first piece goes alone, so that whoever listens to a pipe hears it soon; then they go by batches. `how` is sample's.
    """
    pieces, size = iter(pieces), 1
    while batch := list(itertools.islice(pieces, size)):
        texts = [piece.text for piece in batch]
        mels = [sample(model, texts, seed=seed + take, batch_size=batch_size, **how) for take in range(takes)]
        for n, piece in enumerate(batch):
            yield piece, [mel[n] for mel in mels], [vocode(mel[n]) for mel in mels]
        size = batch_size


# --- the command line

def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda or cuda:N as a device. Raises UserError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: found {torch.cuda.device_count()} CUDA GPUs; use --device cpu")
        torch.empty(0, device=device)
    except RuntimeError as e:
        raise UserError(f"--device {name}: {first_line(e)}; expected auto, cpu or cuda") from None
    return device


def read_stdin() -> Iterator[str]:
    """Standard input as it comes. Raises UserError if it is not text."""
    try:
        yield from iter(lambda: sys.stdin.readline(1 << 16), "")
    except UnicodeDecodeError as e:
        raise UserError(f"standard input is not UTF-8 text: {e}") from None


def read_lines(path: str) -> list[str]:
    """The lines of a file that have something to say. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read --file {path}: {e}; expected UTF-8 text, a line an utterance") from None
    lines = [" ".join(line.split()) for line in lines if any(c.isalnum() for c in line)]
    if not lines:
        raise UserError(f"--file {path} has nothing to say; expected a line an utterance")
    return lines


def parse(argv: list[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="a checkpoint file, or a folder that --export wrote")
    p.add_argument("--text", help="what to say; without it and --file, standard input")
    p.add_argument("--file", help="a text file: each line becomes a wav of its own")
    p.add_argument("--out", help="the wav file to write, - for standard output; with --file the folder")
    p.add_argument("--export", metavar="DIR", help="write a folder for sharing, and speak nothing")
    p.add_argument("--serve", action="store_true", help="a page to type into; needs gradio")
    p.add_argument("--host", default="127.0.0.1", help="where that page listens; 0.0.0.0 is everywhere")
    p.add_argument("--port", type=int, default=7860)
    p.add_argument("--steps", type=int, help="Euler steps; default: the run's eval_steps")
    p.add_argument("--cfg_scale", type=float, help="guidance: 1 is none; default: the run's eval_cfg_scale")
    p.add_argument("--seconds", type=float, help="duration of the text as a whole; default: predicted")
    p.add_argument("--speed", type=float, default=1.0, help="over that of the corpus")
    p.add_argument("--num_samples", type=int, default=1, help="so many takes, of seeds that count up: x_0.wav, x_1.wav, …")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--plot", nargs="?", const="", metavar="PNG", help="draw the log-mel; default: beside --out")
    p.add_argument("--vocoder", default="auto", choices=["auto", "bigvgan", "griffinlim"])
    p.add_argument("--vocoder_model", help="BigVGAN's hub id or folder; default: the run's eval_vocoder_model")
    p.add_argument("--device", default="auto")
    # flags are written with - or _, but text given as a value may hold either
    args = p.parse_args([re.sub(r"^--[^ =]+(?==|$)", lambda flag: "--" + flag[0][2:].replace("-", "_"), a) for a in argv])
    if args.export is not None or args.serve:
        if {args.text, args.file, args.out, args.plot} != {None} or (args.export is not None and args.serve):
            raise UserError("--export and --serve each go without the other, and without --text, --file, --out and --plot")
        return args
    if args.out is None or (args.text is not None and args.file is not None):
        raise UserError("expected --out with --text, with --file or with a text on standard input, to speak; or --export "
                        "DIR, to write a folder for sharing; or --serve")
    if args.text is None and args.file is None and sys.stdin.isatty():
        raise UserError("nothing to say: give --text, --file, or a text on standard input")
    if args.num_samples < 1 or (args.num_samples > 1 and args.out == "-"):
        raise UserError(f"--num_samples {args.num_samples}: expected 1 or more, and 1 where --out is a pipe")
    if args.file is not None and (args.out == "-" or args.seconds is not None or args.plot is not None):
        raise UserError("--file writes numbered wavs, pictures and a page into a folder; it goes without --out -, --seconds "
                        "and --plot")
    if args.plot == "" and args.out == "-":
        raise UserError("--plot beside a pipe needs a name: --plot x.png")
    return args


def warn_of_strangers(text: str, alphabet: set[str], say) -> None:
    """Say which characters of a text the model has never been trained on, each once."""
    if strange := sorted(set(text) - alphabet) if alphabet else []:
        alphabet.update(strange)
        say(f"warning: the corpus's texts have no {' '.join(map(repr, strange))}; how that is spoken is left to chance")


def take_name(out: str, take: int, takes: int) -> str:
    return out if takes == 1 else f"{Path(out).with_suffix('')}_{take}{Path(out).suffix}"


def main(argv: list[str]) -> None:
    args = parse(argv)
    device = pick_device(args.device)
    model, ckpt = load_checkpoint(args.ckpt, device)
    alphabet, cfg = set(ckpt.get("characters", "")), model.cfg
    if args.export is not None:
        export(model, ckpt["step"], args.export, ckpt.get("characters", ""))
        print(f"{args.export}: model.safetensors, config.yaml and corpus.json; speak with --ckpt {args.export}")
        return
    vocode = load_vocoder(args.vocoder, args.vocoder_model or cfg.eval_vocoder_model, device, cfg)
    steps, cfg_scale = (default if given is None else given for given, default in
                        ((args.steps, cfg.eval_steps), (args.cfg_scale, cfg.eval_cfg_scale)))
    if args.serve:
        import serve
        return serve.serve(model, vocode, steps, cfg_scale, args.host, args.port)

    def say(message):
        tqdm.write(message, sys.stderr if args.out == "-" else sys.stdout)

    how = {"steps": steps, "cfg_scale": cfg_scale, "seconds": args.seconds, "speed": args.speed}
    sample(model, [], **how)  # refuses what is out of range
    whole = args.seconds is not None
    if args.file is not None:
        lines = read_lines(args.file)
        pieces = (piece for n, line in enumerate(lines)
                  for piece in read_pieces(model, read_sentences([line]), args.speed, n))
    elif whole:
        pieces = [Piece(0, "".join(read_stdin()) if args.text is None else args.text, 0.0)]
    else:
        sentences = read_sentences([args.text] if args.text is not None else read_stdin())
        pieces = read_pieces(model, sentences, args.speed)
    start = time.time()
    spoken = speak(model, vocode, pieces, args.num_samples, args.seed, cfg.eval_batch_size, **how)
    bar = waiting(spoken, desc="speaking", unit=" sentences")
    if args.file is None:
        seconds, mels = write_one(args, bar, alphabet, say, cfg)
    else:
        seconds = write_many(args, lines, bar, alphabet, say, cfg)
    took = time.time() - start
    if whole and len(mels[0]) == cfg.block_size:
        say(f"note: the speech was held to the longest utterance the model knows, {cfg.block_size} frames")
    say(f"{args.out}: {seconds:.2f} s of speech in {took:.2f} s, real-time factor {took / seconds:.2f}")


def write_one(args, spoken, alphabet, say, cfg: Config) -> tuple[float, list]:
    """Write what is spoken to one wav, or to one a take. Returns the seconds of sound and the first log-mels."""
    seconds, mels = 0.0, []
    with contextlib.ExitStack() as files:
        adds = [files.enter_context(wav_stream(take_name(args.out, take, args.num_samples), cfg.sample_rate))
                for take in range(args.num_samples)]
        pause = 0
        for piece, piece_mels, wavs in spoken:
            warn_of_strangers(piece.text, alphabet, say)
            for add, wav in zip(adds, wavs):
                add(np.zeros(pause, np.float32))
                add(wav)
                seconds += (pause + len(wav)) / cfg.sample_rate
            pause = round(piece.pause * cfg.sample_rate)
            if sum(map(len, mels)) * cfg.hop_length < MOST_DRAWN * cfg.sample_rate:
                mels.append(piece_mels[0].numpy())
        if not mels:
            raise UserError(f"nothing to say in {'standard input' if args.text is None else repr(args.text)}; expected some "
                            "words")
    if args.plot is not None:
        write_bytes(Path(args.plot or Path(args.out).with_suffix(".png")), draw_mel(np.concatenate(mels), cfg))
    return seconds, mels


def write_many(args, lines: list[str], spoken, alphabet, say, cfg: Config) -> float:
    """Write a wav and a picture a line and take, and a page over them. Returns the seconds of sound."""
    out, seconds = Path(args.out), 0.0
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; name another --out") from None
    rows = []
    for n, of_line in itertools.groupby(spoken, key=lambda item: item[0].line):
        of_line = list(of_line)
        warn_of_strangers(lines[n], alphabet, say)
        for take in range(args.num_samples):
            name = take_name(f"{n:06d}.wav", take, args.num_samples)
            mel = np.concatenate([mels[take].numpy() for _, mels, _ in of_line])
            length = 0
            with wav_stream(str(out / name), cfg.sample_rate) as add:
                for k, (piece, _, wavs) in enumerate(of_line):
                    pause = round(piece.pause * cfg.sample_rate) if k + 1 < len(of_line) else 0
                    add(np.concatenate([wavs[take], np.zeros(pause, np.float32)]))
                    length += (len(wavs[take]) + pause) / cfg.sample_rate
            rows.append({"idx": len(rows), "audio": name, "reference": lines[n], "predicted_seconds": length,
                         "mel_png": draw(out / f"{Path(name).stem}_mel.png", mel, cfg)})
            seconds += length
    write_bytes(out / "wer.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    summary = {"ckpt": args.ckpt, "prompts": args.file, "count": len(rows), "seed": args.seed}
    write_bytes(out / "summary.json", json.dumps(summary, indent=1).encode())
    write_page(out)
    return seconds


if __name__ == "__main__":
    run_cli(main)
