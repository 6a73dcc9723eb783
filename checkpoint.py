"""A voice on disk: a run's checkpoints, and exported folders of safetensors for sharing. Reading them runs no code."""
import dataclasses
import hashlib
import json
import os
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch

from common import UserError, first_line, replacing
from config import BEFORE, FIELDS, Config, field_name, load_yaml, parse_value, refuse_other_shape, to_yaml, validate
from model import TTS, load_tts
from vocoder import LEARNED, find_learned

# Fields that may change when a run is resumed; so may all eval_ fields
FREE_TO_CHANGE = ("run_name out_dir resume gpus nproc dtype compile data_dir prepare_script loader_threads batch_size "
                  "max_steps max_epochs max_train_seconds max_skipped_steps log_interval val_interval val_num_samples "
                  "checkpoint_interval keep_checkpoints no_wandb wandb_project wandb_url").split()


# --- reading

def read_checkpoint(path: str) -> dict:
    """The content of a checkpoint file or an exported folder. Raises UserError if it is neither."""
    if os.path.isdir(path):
        ckpt = read_export(Path(path))
    elif not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}; expected a file such as .artifacts/local/demo/latest.pt, "
                        "which training writes")
    else:
        try:
            if zipfile.is_zipfile(path):  # torch.load ignores the zip's checksums, so check them here
                with zipfile.ZipFile(path) as parts:
                    if damaged := parts.testzip():
                        raise ValueError(f"{damaged} is damaged")
            with warnings.catch_warnings(action="ignore"):  # torch's, about files that it refuses anyway
                ckpt = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:  # zip, pickle and torch raise many types
            raise UserError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is cut off or damaged, or has "
                            "more than tensors, numbers and texts, which could run code; use one that train.py wrote"
                            ) from None
    types = {"model": dict, "config": dict, "step": int}
    if not isinstance(ckpt, dict) or any(not isinstance(ckpt.get(name), kind) for name, kind in types.items()):
        raise UserError(f"{path} is not a checkpoint of this project: expected the entries {', '.join(types)}")
    return ckpt


def checkpoint_config(ckpt: dict, path: str) -> Config:
    """The config saved in a checkpoint. Raises UserError if this version of the code does not know a key or value of it."""
    try:
        cfg = validate(Config(**{field_name(key, "its config"): parse_value(key, value, "its config")
                                 for key, value in (BEFORE | ckpt["config"]).items()}))
    except UserError as e:
        raise UserError(f"{path} was written by another version of the code, or its config cannot work: {e}") from None
    if cfg.mel_mean is None or cfg.mel_std is None:
        raise UserError(f"{path} has no mel_mean and mel_std in its config; training puts the corpus's there")
    return cfg


def load_checkpoint(path: str, device) -> tuple[TTS, dict]:
    """The model of a checkpoint, with its averaged weights if it has them, ready to sample; and the checkpoint.

    Its config's out_dir is the checkpoint's folder, wherever that is now, because a vocoder may lie there.
    """
    ckpt = read_checkpoint(path)
    model = load_tts(checkpoint_config(ckpt, path), ckpt["model"], ckpt.get("ema"))
    model.cfg.out_dir = str(path if os.path.isdir(path) else Path(path).parent)
    return model.eval().to(device), ckpt


# --- a run's checkpoints

def save_checkpoint(cfg: Config, model: TTS, optimizers, ema: dict, step: int, rest: dict) -> None:
    """Write ckpt_step_<step>.pt and latest.pt, each complete or not at all, and delete old numbered ones.

    `rest` holds what else the run needs to go on. Raises UserError or RuntimeError, as the disk and torch.save do.
    """
    out = Path(cfg.out_dir)
    numbered = numbered_checkpoint(out, step)
    with replacing(numbered) as tmp, open(tmp, "wb") as f:
        torch.save({"model": model.saved_state(), "ema": ema, "optimizers": [o.state_dict() for o in optimizers],
                    "step": step, "config": dataclasses.asdict(cfg), **rest}, f)
        f.flush()
        os.fsync(f.fileno())  # without it, a power failure could leave the new name on an empty file
    link_checkpoint(numbered, out / "latest.pt")
    for old in sorted(out.glob("ckpt_step_*.pt"))[:-cfg.keep_checkpoints]:
        old.unlink()


def numbered_checkpoint(out: Path, step: int) -> Path:
    return out / f"ckpt_step_{step:08d}.pt"


def link_checkpoint(numbered: Path, name: Path) -> None:
    """Give a checkpoint a second name, in place of the file that has it."""
    with replacing(name) as tmp:
        try:
            os.link(numbered, tmp)
        except OSError:  # a file system without hard links
            tmp.write_bytes(numbered.read_bytes())


def last_checkpoint(out: Path) -> str:
    return str(out / "latest.pt") if (out / "latest.pt").exists() else "none yet"


@contextmanager
def naming_checkpoint(out: Path, step: int):
    """Append the last good checkpoint to the message of a UserError raised in this block."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e}; stopped at step {step}, the last good checkpoint is {last_checkpoint(out)}") from None


def find_resume(cfg: Config) -> str | None:
    """The path of the checkpoint to go on from, None for a fresh start. Raises UserError if out_dir holds another run."""
    latest, metrics = (os.path.join(cfg.out_dir, name) for name in ("latest.pt", "metrics.jsonl"))
    if cfg.resume == "latest":
        return latest if os.path.exists(latest) else None
    holds_run = os.path.exists(latest) or (os.path.exists(metrics) and os.path.getsize(metrics))
    if holds_run and not (cfg.resume and Path(cfg.resume).resolve().parent == Path(cfg.out_dir).resolve()):
        raise UserError(f"{cfg.out_dir} holds a run already; add --resume latest to go on with it, or name another "
                        "--run_name, or delete the folder")
    return cfg.resume or None


def start_from_voice(cfg: Config, model: TTS, ema: dict) -> dict:
    """Copy the weights of the voice cfg.init_from, averaged if it has averages, into model and averages.

    Returns the characters of the voice's texts as {"characters": str}. Raises UserError if the weights do not fit.
    """
    voice, ckpt = load_checkpoint(cfg.init_from, "cpu")
    refuse_other_shape(cfg.init_from, vars(voice.cfg), vars(cfg))  # than in the config.yaml beside it
    if voice.saved_state().keys() - model.saved_state().keys():  # checkpoints would lack the text encoder's weights
        raise UserError(f"train_text_encoder is True in {cfg.init_from}, False here; leave it out, and it will be True")
    model.load_state_dict(voice.state_dict())
    weights = dict(model.named_parameters())
    for name in ema:
        ema[name].copy_(weights[name].detach())
    return {"characters": ckpt.get("characters", "")}


def resume_checkpoint(cfg: Config, model: TTS, optimizers, ema: dict, corpus: str) -> dict:
    """Load the checkpoint that cfg.resume names into model, optimisers and averages, and return it.

    A fresh start returns {"step": 0}, and has the weights of the voice cfg.init_from, if there is one. `corpus` is the
    fingerprint of the corpus. Raises UserError if that or a field that shapes training has changed.
    """
    path = find_resume(cfg)
    if path is None:
        return {"step": 0} | (start_from_voice(cfg, model, ema) if cfg.init_from else {})
    ckpt = read_checkpoint(path)
    if "optimizers" not in ckpt:
        raise UserError(f"{path} holds no optimiser state; only checkpoints that train.py wrote can be resumed")
    before = {k: f.default for k, f in FIELDS.items()} | BEFORE | ckpt["config"]
    changed = [f"{k} was {v!r}, is {getattr(cfg, k, None)!r}" for k, v in before.items()
               if k not in FREE_TO_CHANGE and not k.startswith("eval_") and getattr(cfg, k, None) != v]
    if ckpt.get("corpus") != corpus:
        changed.append(f"the corpus was {str(ckpt.get('corpus'))[:12]}, is {corpus[:12]} (fingerprints)")
    if changed:
        raise UserError(f"cannot go on from {path}, these differ: {'; '.join(changed)}. Restore the old values, or start "
                        "another run")
    try:
        model.load_state_dict(ckpt["model"], strict=False)
        for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name in ema:
            ema[name].copy_(ckpt["ema"][name])
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot go on from {path}: it does not fit this version of the code ({type(e).__name__}: "
                        f"{first_line(e)[:120]})") from None
    return ckpt


# --- folders for sharing

def export(model: TTS, step: int, folder: str, characters: str = "") -> None:
    """Write the parts of a checkpoint that sampling needs: model.safetensors, config.yaml and corpus.json; and the learned
    vocoder if there is one. The weights are in half precision.

    A pretrained text encoder that was not trained is left out: it is loaded again by its name. `characters` are those of the
    corpus's texts. Raises UserError.
    """
    state = model.saved_state()
    # Paths of this machine mean nothing on another
    judge = model.cfg.eval_whisper_model if not os.path.exists(model.cfg.eval_whisper_model) else Config().eval_whisper_model
    cfg = dataclasses.replace(model.cfg, out_dir="", resume="", eval_whisper_model=judge)
    if os.path.exists(folder):
        raise UserError(f"{folder} exists already; name another folder to export to, or delete it")
    weights = safetensors.torch.save({name: weight.half() for name, weight in state.items()})
    learned = find_learned(model.cfg)
    about = {"step": step, "mel_mean": cfg.mel_mean, "mel_std": cfg.mel_std, "characters": characters,
             "model_sha256": hashlib.sha256(weights).hexdigest()}
    with replacing(Path(folder)) as tmp:
        tmp.mkdir(parents=True)
        (tmp / "model.safetensors").write_bytes(weights)
        (tmp / "config.yaml").write_text(to_yaml(cfg), encoding="utf-8")
        if learned:
            (tmp / LEARNED).write_bytes(learned.read_bytes())
        (tmp / "corpus.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def read_export(folder: Path) -> dict:
    """An exported folder as a checkpoint's entries. Raises UserError if a file is missing, damaged, or of another export."""
    try:
        about, config = json.loads((folder / "corpus.json").read_bytes()), load_yaml(folder / "config.yaml")
        weights = (folder / "model.safetensors").read_bytes()
        if hashlib.sha256(weights).hexdigest() != about["model_sha256"]:
            raise ValueError("model.safetensors does not have the SHA-256 of corpus.json")
        if any(about[name] != config.get(name) for name in ("mel_mean", "mel_std")):
            raise ValueError("mel_mean and mel_std of config.yaml are not those of corpus.json")
        state = {name: weight.float() for name, weight in safetensors.torch.load(weights).items()}
        return {"model": state, "config": config, "step": about["step"], "characters": about.get("characters", "")}
    except Exception as e:  # missing files and entries, damaged JSON and safetensors
        raise UserError(f"{folder} is not a folder that sample.py --export wrote, or it is damaged ({type(e).__name__}: "
                        f"{first_line(e)}); for a run's own checkpoint, name its latest.pt") from None
