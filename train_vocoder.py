"""Train the learned vocoder: on a corpus's recordings, then on a voice's own log-mels.

    python train_vocoder.py --data_dir data/joe_bigvgan       # from its recordings/; the result lies beside the corpus
    python train_vocoder.py --ckpt RUN/latest.pt              # then on the voice's log-mels; it lies beside the run
    python train_vocoder.py --data_dir data/ljspeech_bigvgan --recordings LJSpeech-1.1/wavs

A run without a GPU does the first by itself, before its first step. Three minutes each, or less, on two cores.
"""
import argparse
import dataclasses
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import audio
from checkpoint import load_checkpoint
from common import UserError, progress, run_cli, tell
from config import Config, parse_with_audio
from corpus import RECORDINGS, Corpus
from data import collate, training_rows
from model import TTS
from pitch import CANDIDATES, pitch
from vocoder import LEARNED, QUIET, SourceFilter, load_learned, save_learned, vocoder_kind

WIDTH, BLOCKS = 128, 4  # 0.77 million parameters
STEPS, BATCH, FRAMES = 2400, 16, 96
PEAK_LR, WARMUP = 1e-3, 30
PITCH = 0.2  # weight of the loss of the pitch
LOUD = 3.0  # weight of the error of the magnitudes' square roots, in which the loud harmonics count
BLUR, HISS = (0.8, 0.5), 0.3  # strongest smoothing over time and over bands, and strongest noise, of a blurred log-mel


def blur(log_mels: torch.Tensor) -> torch.Tensor:
    """Log-mels (B, T, n_mels), each smoothed and made noisy at random, as a model's are in its own way."""
    def strength(most):
        return most * torch.rand(len(log_mels), 1, 1)
    x = log_mels
    for turn, most in zip((lambda m: m.mT, lambda m: m), BLUR):
        x = torch.lerp(x, turn(F.avg_pool1d(F.pad(turn(log_mels), (1, 1), mode="replicate"), 3, 1)), strength(most))
    return x + strength(HISS) * torch.randn_like(x)


@torch.inference_mode()
def own_log_mels(model: TTS, corpus: Corpus, rows: list[int], seed: int) -> dict[int, torch.Tensor]:
    """The model's log-mels (frames, n_mels) of a corpus's utterances, in step with the recordings.

    They are its best guess from a noisy recording, x_t - t v, at times from 0.3 to 0.95. That guess is as smooth as what the
    model generates, and each frame keeps its place.
    """
    still = dataclasses.replace(model.cfg, silence_prob=0.0, text_condition_dropout=0.0)
    guessed, rows, generator = {}, sorted(rows, key=lambda i: corpus.frames[i]), torch.Generator().manual_seed(seed)
    for part in progress([rows[start:start + 16] for start in range(0, len(rows), 16)], desc="listening to the voice"):
        batch = collate(corpus, part, still, model.tokenise, seed)
        batch["t"] = torch.empty(len(part)).uniform_(0.3, 0.95, generator=generator)
        text = model.encode(batch["tokens"], batch["token_lengths"])
        share, alignment = model.durations(text, batch["token_lengths"])[1].exp(), None
        if model.cfg.alignment_search:
            alignment, share, _ = model.search(batch, text)
        x_t, velocity = model.flow(batch, text, share, alignment)
        for i, guess in zip(part, x_t - batch["t"][:, None, None] * velocity):
            guessed[i] = audio.denormalise(guess[:corpus.frames[i]], model.cfg).clone()
    return guessed


class Recording(NamedTuple):
    """What the vocoder learns from a recording of `frames` frames."""
    log_mel: torch.Tensor  # (frames, n_mels)
    log_magnitudes: torch.Tensor  # (frames, bins)
    f0: torch.Tensor  # (frames,) in Hz; between its neighbours where the recording is unvoiced
    voiced: torch.Tensor  # (frames,) bool
    own: torch.Tensor | None = None  # the voice's own log-mel of it (frames, n_mels)


def train(net: SourceFilter, recordings: list[Recording], steps: int) -> float:
    """Train a network on recordings. Returns its mean loss of the magnitudes.

    Half of each batch has the voice's own log-mels, if there are any, and a quarter is blurred. The magnitudes are told the
    recording's pitch, so they need not average over pitches where a log-mel does not show it clearly. Their loss is the mean
    absolute error of their logarithms and of their square roots; that of the pitch is the cross-entropy.
    """
    rng, losses = np.random.default_rng(0), []
    recordings = [recording for recording in recordings if len(recording.f0) > FRAMES]
    if len(recordings) < BATCH:
        raise UserError(f"{len(recordings)} recordings are longer than {FRAMES} frames; the vocoder needs at least {BATCH}")
    opt = torch.optim.AdamW(net.parameters(), betas=(0.8, 0.95))
    for step in progress(range(steps), desc="training the vocoder", unit="step", leave=True):
        for group in opt.param_groups:
            group["lr"] = PEAK_LR * min(1, step / WARMUP) * (1 - step / steps)
        parts = []
        for recording in (recordings[i] for i in rng.integers(len(recordings), size=BATCH)):
            start = rng.integers(len(recording.f0) - FRAMES)
            heard = recording.log_mel if recording.own is None or len(parts) >= BATCH // 2 else recording.own
            parts.append([x[start:start + FRAMES] for x in (heard, *recording[1:4])])
        log_mels, target, f0, voiced = (torch.stack(part) for part in zip(*parts))
        blurred = slice(BATCH // 2, BATCH // 2 + BATCH // 4)
        log_mels[blurred] = blur(log_mels[blurred])
        made = net.log_magnitudes(log_mels, f0, voiced)
        loss = (made - target).abs().mean() + LOUD * ((made / 2).exp() - (target / 2).exp()).abs().mean()
        candidate = (f0.log()[..., None] - net.log_candidates).abs().argmin(dim=-1)
        candidate = candidate.where(voiced, len(CANDIDATES))
        of_pitch = F.cross_entropy(net.pitch_logits(log_mels).flatten(0, 1), candidate.flatten(), label_smoothing=0.05)
        opt.zero_grad()
        (loss + PITCH * of_pitch).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
    return float(np.mean(losses[-100:]))


def read_recordings(folder: Path, ids: list[str], cfg: Config) -> dict[str, Recording]:
    """The recordings <id>.wav that lie in `folder`, by id. Raises UserError if there is none."""
    found = {}
    for utt_id in progress([i for i in ids if (folder / f"{i}.wav").is_file()], desc=f"reading {folder}"):
        wav = audio.read_wav(str(folder / f"{utt_id}.wav"), cfg.sample_rate)
        f0, mel = pitch(wav, cfg), audio.log_mel(wav, cfg)
        voiced = ~np.isnan(f0)
        f0 = np.interp(np.arange(len(f0)), np.flatnonzero(voiced), f0[voiced]) if voiced.any() else np.full(len(f0), 100.0)
        found[utt_id] = Recording(mel, audio.magnitudes(wav, cfg).T.clamp(min=QUIET).log(), torch.tensor(f0).float(),
                                  torch.tensor(voiced))
    if not found:
        raise UserError(f"{folder} holds no recording of the training utterances, such as {ids[0]}.wav; name their folder "
                        "with --recordings")
    return found


def train_if_missing(cfg: Config, device) -> None:
    """Train a corpus's vocoder if it would be used and is not there, and there are recordings enough to learn from."""
    folder = Path(cfg.data_dir, RECORDINGS)
    if vocoder_kind(cfg, device) != "griffinlim" or cfg.eval_vocoder != "auto" or not folder.is_dir():
        return
    try:
        train_on_recordings(cfg.data_dir, cfg)
    except UserError as e:
        tell(f"the vocoder is Griffin-Lim, because {e}")


def train_on_recordings(data_dir: str, cfg: Config, recordings: Path | None = None) -> Path:
    """Train a vocoder on a corpus's recordings, and write it beside the corpus. Returns its path. Raises UserError."""
    corpus, start = Corpus(data_dir, cfg), time.time()
    ids = [corpus.ids[i] for i in corpus.split("train", cfg)]
    found = read_recordings(recordings or corpus.dir / RECORDINGS, ids, cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SourceFilter(cfg, WIDTH, BLOCKS)
        loss = train(net, list(found.values()), STEPS)
    path = corpus.dir / LEARNED
    save_learned(net, path, recordings=len(found), steps=STEPS, loss=round(loss, 4))
    tell(f"{path}: learned from {len(found)} recordings in {time.time() - start:.0f} s; mean loss {loss:.3f}")
    return path


def train_on_voice(ckpt: str, recordings: Path | None = None) -> Path:
    """Train a voice's vocoder further, on its own log-mels, and write it beside the checkpoint. Raises UserError."""
    start, (model, trained) = time.time(), load_checkpoint(ckpt, "cpu")
    cfg, folder = model.cfg, Path(model.cfg.out_dir)
    corpus = Corpus(cfg.data_dir, cfg)
    learned = corpus.dir / LEARNED
    if not learned.is_file():
        train_on_recordings(cfg.data_dir, cfg, recordings)
    ids = {corpus.ids[i]: int(i) for i in training_rows(corpus, cfg, model.tokenise)}
    found = read_recordings(recordings or corpus.dir / RECORDINGS, list(ids), cfg)
    for utt_id, recording in found.items():
        if (frames := len(recording.log_mel)) != (expected := int(corpus.frames[ids[utt_id]])):
            raise UserError(f"{utt_id}.wav has {frames} frames, expected {expected} as in {corpus.dir}, which was made from "
                            "another recording or a trimmed one; leave --recordings out, or name the folder of those")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = own_log_mels(model, corpus, [ids[i] for i in found], cfg.seed)
        net = load_learned(learned, "cpu", cfg).requires_grad_(True).train()
        loss = train(net, [recording._replace(own=own[ids[i]]) for i, recording in found.items()], STEPS // 2)
    facts = {"recordings": len(found), "steps": STEPS // 2, "loss": round(loss, 4), "voice_step": trained["step"]}
    save_learned(net, folder / LEARNED, **facts)
    tell(f"{folder / LEARNED}: learned from {len(found)} recordings and the voice in {time.time() - start:.0f} s; "
         f"mean loss {loss:.3f}")
    return folder / LEARNED


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--data_dir", help="a processed corpus; another log-mel than the default: its --config or fields")
    what.add_argument("--ckpt", help="a checkpoint file; its corpus must be where the config says")
    p.add_argument("--recordings", type=Path, help="folder with <utt_id>.wav; default: the corpus's recordings/")
    args = parse_with_audio(p, argv)
    if args.ckpt:
        train_on_voice(args.ckpt, args.recordings)
    else:
        train_on_recordings(args.data_dir, args.cfg, args.recordings)


if __name__ == "__main__":
    run_cli(main)
