"""A voice on disk: a run's checkpoints, read without running code, and folders of safetensors for sharing."""
import hashlib
import json
import os
import shutil
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from config import FIELDS, REFUSED, Config, UserError, first_line, load_yaml, parse_value, to_yaml, validate
from model import TTS, load_tts


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
            isinstance(ckpt.get("config"), dict) and type(ckpt.get("step")) is int and
            isinstance(ckpt.get("characters", ""), str)):
        raise UserError(f"{path} is not a checkpoint of this project: expected the entries model and ema (names and "
                        "tensors), config (names and values), step (a whole number) and characters (a text)")
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

def export(model: TTS, step: int, folder: str, characters: str = "") -> None:
    """Write what sampling needs of a loaded checkpoint: model.safetensors, config.yaml and corpus.json, whole or not at all.

    A pretrained text encoder that was not trained stays out: its name brings it back. `characters` are those of the corpus's
    texts. Raises UserError.
    """
    out, cfg, state = Path(folder), model.cfg, model.saved_state()
    if os.path.exists(out):
        raise UserError(f"{folder} exists already; name another folder to export to, or delete it")
    weights = safetensors.torch.save(state)
    about = {"step": step, "mel_mean": cfg.mel_mean, "mel_std": cfg.mel_std, "text_encoder": cfg.text_encoder_name,
             "text_encoder_included": any(name.startswith("text_encoder.") for name in state),
             "characters": characters, "model_sha256": hashlib.sha256(weights).hexdigest()}
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
        return {"model": safetensors.torch.load(weights), "config": config, "step": about["step"],
                "characters": about.get("characters", "")}
    except Exception as e:  # of files, JSON, safetensors and missing entries
        raise UserError(f"{folder} is not what sample.py --export writes, or it is damaged ({type(e).__name__}: "
                        f"{first_line(e)}); to use a run's own checkpoint, name its latest.pt") from None
