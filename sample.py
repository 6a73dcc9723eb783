"""Text to speech from a checkpoint. The repo's one sampler lives here: Euler steps with classifier-free guidance.

    python sample.py --ckpt .artifacts/local/demo/latest.pt --text "My brother painted the old bridge." --out x.wav
    python sample.py --ckpt RUN/latest.pt --text "…" --steps 50 --cfg_scale 2.0 --seed 7 --seconds 2.5 --out x.wav
    python sample.py --ckpt RUN/latest.pt --export VOICE     # a folder to share: safetensors, which cannot hold code
    python sample.py --ckpt VOICE --text "…" --out x.wav
"""
import argparse
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import time
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from audio import denormalise, load_vocoder, write_wav
from config import FIELDS, REFUSED, Config, UserError, first_line, load_yaml, parse_value, run_cli, to_yaml, validate
from eval.measures import clearest_head
from model import TTS, autocast, load_tts


def text_noise(text: str, frames: int, n_mels: int, seed: int) -> torch.Tensor:
    """Gaussian noise (frames, n_mels) that depends on (seed, text) alone, not on what else is in the batch."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {text}".encode()).digest()[:7], "big")
    return torch.randn(frames, n_mels, generator=torch.Generator().manual_seed(key))


@torch.inference_mode()
def sample(model: TTS, texts: list[str], steps: int = 32, cfg_scale: float = 2.0, seed: int = 0,
           seconds: float | None = None, batch_size: int = 16, maps: list | None = None) -> list[torch.Tensor]:
    """Speak texts: a list of log-mels, each (frames, n_mels) float32 on the CPU, in the order of `texts`.

    Durations are predicted unless `seconds` gives one for all; none exceeds cfg.block_size frames. Utterances of like
    length share a batch, and an utterance's outcome does not depend on its batch. `cfg_scale` w mixes velocities as
    without + w (with - without) (arXiv 2207.12598); at 1 the text-free half is not computed. A list given as `maps` gets
    each text's cross-attention at the middle step: (positions, tokens) of the head that tells it in the clearest order.
    Raises UserError for a text without a letter or digit or longer than the text encoder reads, and for numbers out of
    range.
    """
    cfg, device = model.cfg, next(model.parameters()).device
    for text in texts:
        if not any(c.isalnum() for c in text):
            raise UserError(f"nothing to say in the text {text!r}; expected some words")
        if any("\ud800" <= c <= "\udfff" for c in text):  # what Python makes of bytes that are not UTF-8
            raise UserError(f"the text {text!r} is not Unicode; expected UTF-8")
    if steps < 1 or not 0 <= cfg_scale < math.inf or (seconds is not None and not 0 < seconds < math.inf):
        raise UserError(f"steps = {steps}, cfg_scale = {cfg_scale}, seconds = {seconds}: expected at least one step, "
                        "guidance of 0 or more, and a duration above 0")
    if not texts:
        return []
    tokens = [torch.tensor(model.tokenise(text)) for text in texts]
    for text, row in zip(texts, tokens):
        if model.most_tokens and len(row) > model.most_tokens:
            raise UserError(f"the text that begins {text[:30]!r} has {len(row)} tokens, more than the {model.most_tokens} "
                            "that the text encoder reads; split it into sentences and speak them one by one")
    frames, features, positions = [], [], []
    for start in range(0, len(texts), batch_size):
        part = tokens[start:start + batch_size]
        lengths = torch.tensor([len(p) for p in part], device=device)
        with autocast(cfg, device):
            feature = model.encode(torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device), lengths)
            log_seconds, position = model.durations(feature, lengths)
        spoken = log_seconds.exp().tolist() if seconds is None else [seconds] * len(part)
        if not all(map(math.isfinite, spoken)):
            raise UserError("the model predicts a duration that is not finite; it has diverged or its weights are damaged")
        frames += [min(cfg.block_size, max(1, round(s * cfg.sample_rate / cfg.hop_length))) for s in spoken]
        features += [f[:len(p)] for f, p in zip(feature, part)]
        positions += [w[:len(p)] for w, p in zip(position, part)]
    order = sorted(range(len(texts)), key=lambda i: frames[i])
    mels, looks = [None] * len(texts), [None] * len(texts)
    for start in range(0, len(texts), batch_size):
        rows = order[start:start + batch_size]
        n = torch.tensor([frames[i] for i in rows], device=device)
        token_lengths = torch.tensor([len(tokens[i]) for i in rows], device=device)
        x = torch.nn.utils.rnn.pad_sequence([text_noise(texts[i], frames[i], cfg.n_mels, seed) for i in rows],
                                            batch_first=True).to(device)
        feature, where = (torch.nn.utils.rnn.pad_sequence([of[i] for i in rows], batch_first=True)
                          for of in (features, positions))
        drop = torch.zeros(len(rows), dtype=torch.bool, device=device)
        guided = cfg_scale != 1
        if guided:  # the half without text rides in the same batch
            drop = torch.cat([drop, ~drop])
            feature, where = feature.repeat(2, 1, 1), where.repeat(2, 1)
            n, token_lengths = n.repeat(2), token_lengths.repeat(2)
        with autocast(cfg, device):
            text = model.condition(feature, drop)
            for k in range(steps):
                t = torch.full(n.shape, 1 - k / steps, device=device)
                seen = [] if maps is not None and k == steps // 2 else None
                velocity = model.decoder(x.repeat(2, 1, 1) if guided else x, t, text, where, n, token_lengths, seen).float()
                for i, look in zip(rows, torch.stack(seen, dim=1).cpu().numpy() if seen else ()):  # the half with text
                    looks[i] = clearest_head(look[:, :, :-(-frames[i] // cfg.patch), :len(tokens[i])])
                if guided:
                    given, without = velocity.chunk(2)
                    velocity = without + cfg_scale * (given - without)
                x = x - velocity / steps
        for i, mel in zip(rows, x):
            mels[i] = denormalise(mel[:frames[i]].float().cpu(), cfg)
    if maps is not None:
        maps += looks
    return mels


# --- checkpoints, for reading

def read_checkpoint(path: str) -> dict:
    """What a checkpoint file or an exported folder holds, without running code from it. Raises UserError if it is neither.

    Its entries have the right types, save those of config, which `checkpoint_config` checks.
    """
    if os.path.isdir(path):
        ckpt = read_export(Path(path))
    elif not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; expected a file such as .artifacts/local/demo/latest.pt, "
                        "which training writes")
    else:
        try:
            if zipfile.is_zipfile(path):  # torch reads no checksums, and of what is marked as a folder nothing
                with zipfile.ZipFile(path) as parts:
                    if parts.testzip() or any(part.external_attr & 16 for part in parts.infolist()):
                        raise ValueError("a part is not what was written")
            with warnings.catch_warnings(action="ignore"):  # about files that are refused anyway
                ckpt = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # zip, pickle and torch errors of many types
            why = first_line(e)
            raise UserError(f"{path} cannot be read as a checkpoint: " + (why if why == REFUSED else (
                f"it is cut off, damaged, or not one of this project's ({type(e).__name__})"))) from None
    def weights(part):
        return isinstance(part, dict) and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in part.items())
    if not (isinstance(ckpt, dict) and weights(ckpt.get("model")) and weights(ckpt.get("ema", {})) and
            isinstance(ckpt.get("config"), dict) and type(ckpt.get("step")) is int):
        raise UserError(f"{path} is not a checkpoint of this project: expected the entries model and ema (names and "
                        "tensors), config (names and values) and step (a whole number)")
    return ckpt


def checkpoint_config(ckpt: dict, path: str) -> Config:
    """The config saved in a checkpoint. Raises UserError if this version of the code does not know a key or value of it."""
    unknown = [str(key) for key in ckpt["config"] if key not in FIELDS]
    if unknown:
        raise UserError(f"{path} was written by another version of the code: unknown config keys {', '.join(unknown)}")
    try:
        cfg = validate(Config(**{key: parse_value(key, value, "its config") for key, value in ckpt["config"].items()}))
    except UserError as e:
        raise UserError(f"{path} holds a config that cannot work: {e}") from None
    if cfg.mel_mean is None or cfg.mel_std is None:
        raise UserError(f"{path} holds no mel_mean and mel_std of a corpus in its config; training puts them there")
    return cfg


def load_checkpoint(path: str, device) -> tuple[TTS, dict]:
    """The model of a checkpoint, with its averaged weights if it has them, ready to sample; and the checkpoint."""
    ckpt = read_checkpoint(path)
    model = load_tts(checkpoint_config(ckpt, path), ckpt["model"], ckpt.get("ema"))
    return model.eval().to(device), ckpt


# --- folders for sharing

def export(model: TTS, step: int, folder: str) -> None:
    """Write what sampling needs of a loaded checkpoint: model.safetensors, config.yaml and corpus.json, whole or not at all.

    A pretrained text encoder that was not trained stays out: its name brings it back. Raises UserError.
    """
    out, cfg, state = Path(folder), model.cfg, model.saved_state()
    if os.path.exists(out):
        raise UserError(f"{folder} exists already; name another folder to export to, or delete it")
    weights = safetensors.torch.save(state)
    about = {"step": step, "mel_mean": cfg.mel_mean, "mel_std": cfg.mel_std, "text_encoder": cfg.text_encoder_name,
             "text_encoder_included": any(name.startswith("text_encoder.") for name in state),
             "model_sha256": hashlib.sha256(weights).hexdigest()}
    tmp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        tmp.mkdir(parents=True)
        (tmp / "model.safetensors").write_bytes(weights)
        (tmp / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
        (tmp / "corpus.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        tmp.rename(out)
    except OSError as e:
        raise UserError(f"cannot write {folder}: {first_line(e)}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def read_export(folder: Path) -> dict:
    """An exported folder as a checkpoint's entries. Raises UserError if a file is missing, damaged, or not the others'."""
    try:
        about, config = json.loads((folder / "corpus.json").read_bytes()), load_yaml(folder / "config.yaml")
        weights = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != about["model_sha256"]:
            raise ValueError("model.safetensors has another SHA-256 than corpus.json says")
        if any(about[name] != config.get(name) for name in ("mel_mean", "mel_std")):
            raise ValueError("mel_mean and mel_std of config.yaml are not those of corpus.json")
        return {"model": safetensors.torch.load(weights), "config": config, "step": about["step"]}
    except Exception as e:  # of files, JSON, safetensors and missing entries
        raise UserError(f"{folder} is not what sample.py --export writes, or it is damaged ({type(e).__name__}: "
                        f"{first_line(e)}); to use a run's own checkpoint, name its latest.pt") from None


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


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", required=True, help="a checkpoint file, or a folder that --export wrote")
    p.add_argument("--text")
    p.add_argument("--out", help="the wav file to write")
    p.add_argument("--export", metavar="DIR", help="write a folder for sharing, and speak nothing")
    p.add_argument("--steps", type=int, help="Euler steps; default: the run's eval_steps")
    p.add_argument("--cfg_scale", type=float, help="guidance: 1 is none; default: the run's eval_cfg_scale")
    p.add_argument("--seconds", type=float, help="duration; default: predicted")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--vocoder", default="auto", choices=["auto", "bigvgan", "griffinlim"])
    p.add_argument("--vocoder_model", help="BigVGAN's hub id or folder; default: the run's eval_vocoder_model")
    p.add_argument("--device", default="auto")
    # flags are written with - or _, but text given as a value may hold either
    args = p.parse_args([re.sub(r"^--[^ =]+(?==|$)", lambda flag: "--" + flag[0][2:].replace("-", "_"), a) for a in argv])
    if {args.text is None, args.out is None} != {args.export is not None}:
        raise UserError("expected --text and --out, to speak, or --export alone, to write a folder for sharing")
    device = pick_device(args.device)
    model, ckpt = load_checkpoint(args.ckpt, device)
    if args.export is not None:
        export(model, ckpt["step"], args.export)
        print(f"{args.export}: model.safetensors, config.yaml and corpus.json; speak with --ckpt {args.export}")
        return
    cfg = dataclasses.replace(model.cfg)
    vocode = load_vocoder(args.vocoder, args.vocoder_model or cfg.eval_vocoder_model, device, cfg)
    steps, cfg_scale = args.steps or cfg.eval_steps, cfg.eval_cfg_scale if args.cfg_scale is None else args.cfg_scale
    start = time.time()
    mel, = sample(model, [args.text], steps, cfg_scale, args.seed, args.seconds)
    sampled = time.time()
    wav = vocode(mel)
    done = time.time()
    write_wav(args.out, wav, cfg.sample_rate)
    if len(mel) == cfg.block_size:
        print(f"note: the speech was held to the longest utterance the model knows, {cfg.block_size} frames")
    spoken = len(wav) / cfg.sample_rate
    print(f"{args.out}: {spoken:.2f} s of speech in {done - start:.2f} s (sampler {sampled - start:.2f}, vocoder "
          f"{done - sampled:.2f}), real-time factor {(done - start) / spoken:.2f}")


if __name__ == "__main__":
    run_cli(main)
