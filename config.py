"""All settings of a run: one dataclass, filled from a YAML file and then from command-line flags.

    python config.py --config configs/demo.yaml                     # print the resolved config as YAML
    python config.py --config configs/demo.yaml --learning-rate 1e-3
    python config.py --config configs/demo.yaml,configs/bigvgan24k.yaml   # several files: later ones win
    python config.py --config configs/demo.yaml --get data_dir,gpus # print single values, one a line (run.sh uses this)
    python config.py --help                                         # every field with its meaning
"""
import argparse
import dataclasses
import difflib
import inspect
import math
import os
import sys
from typing import Literal, get_args, get_origin, get_type_hints

import yaml

from common import UserError, run_cli


@dataclasses.dataclass
class Config:
    # --- the run
    run_name: str = "run"
    out_dir: str = ""  # the folder for everything that the run writes; empty: .artifacts/local/<run_name>
    seed: int = 1337
    resume: str = ""  # "latest" (out_dir's newest checkpoint; a fresh start if there is none) or the path of a checkpoint
    # A voice (a run's checkpoint or an exported folder) from whose weights the run starts. The fields of SHAPE come from it
    init_from: str = ""
    gpus: int = 0  # number of this machine's GPUs to train on, one rank each; 0: train on the CPU
    nproc: int = 1  # number of CPU ranks (gloo) when gpus is 0
    # Of matrix products. auto: bfloat16 on CUDA, and on CPUs that are faster in it; else float32
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  # torch.compile the decoder

    # --- the corpus
    data_dir: str = "data/ljspeech_bigvgan"  # a processed corpus, written by the prepare script
    prepare_script: str = ""  # run.sh runs it if data_dir is missing, with --out, --source and the log-mel's fields
    block_size: int = 1024  # longest utterance in mel frames; longer ones are left out, never cropped
    silence_prob: float = 0.0  # chance that an utterance gets a tail of silence (frames at the log-mel floor)
    max_silence_sec: float = 0.5  # longest such tail
    overfit_first_n_samples: int = 0  # train only on the first n utterances of the training split; 0: on all
    loader_threads: int = 1  # threads per rank that make batches ahead of time
    length_buckets: bool = True  # batches of utterances of similar length; false: random batches (the baseline)

    # --- log-mel representation: that of BigVGAN at 22 kHz with 80 bands; must agree with the corpus's meta.json and with
    # the vocoder. The fields for 24 and 44.1 kHz are in configs/bigvgan24k.yaml and configs/bigvgan44k.yaml
    sample_rate: int = 22050
    n_fft: int = 1024
    hop_length: int = 256
    win_length: int = 1024
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0
    mel_mean: float | None = None  # None: the corpus's, from dataset_stats.json
    mel_std: float | None = None

    # --- text
    normalise: bool = True  # write out numbers, abbreviations, … in English words (normalise.py); false: other languages

    # --- text encoder: a Hugging Face name or folder, or "random": a small untrained encoder of ByT5's architecture
    text_encoder_name: str = "google/byt5-small"
    train_text_encoder: bool = False  # false: frozen
    text_encoder_width: int = 192  # this and the next two: for "random" only
    text_encoder_layers: int = 2
    text_encoder_heads: int = 3
    text_blocks: int = 3  # convolutions over the encoder's features, always trained; 0: none (the baseline)

    # --- mel decoder
    width: int = 1024
    layers: int = 8
    heads: int = 4
    patch: int = 1  # mel frames per decoder position: 2 halves the sequence and most of the cost
    mlp_ratio: float = 8 / 3  # SwiGLU's hidden width over width, rounded up to a multiple of 32
    time_conditioning: Literal["adaln", "additive"] = "adaln"  # additive: the baseline
    # Monotonic alignment search (arXiv 2005.11129) finds the token of each position. The decoder gets that token's features,
    # and the duration predictor learns each token's share of the time. false: the baseline
    alignment_search: bool = True
    # A token's rotary position in cross-attention: the middle of its share of the time (durations), n / N (normalized, arXiv
    # 2509.11084), or n, with frames counted likewise (absolute, the baseline)
    cross_rope: Literal["durations", "normalized", "absolute"] = "durations"
    rope_gamma: float = 60.0  # for the first two: the rotation in radians from the start to the end of the utterance
    self_rope: bool = True  # rotary positions in self-attention
    qk_norm: bool = True  # RMS-normalise queries and keys
    zero_init: bool = True  # start each branch's last matrix at zero, so that a block starts as the identity

    # --- the flow: t = 1 is noise, t = 0 is speech
    # The decoder predicts the mel without noise, from which the velocity follows, or the velocity itself (the baseline)
    predicts: Literal["mel", "velocity"] = "mel"
    timestep_logit_mean: float = 1.6  # training times are sigmoid(N(mean, std)); a mean above 0 favours times near noise,
    timestep_logit_std: float = 1.0  # which decide the words
    timestep_logit_mean_end: float | None = None  # the mean moves there over the last third of max_steps; None: it stays
    text_condition_dropout: float = 0.1  # chance that a sample trains without its text, for guidance
    duration_loss_weight: float = 0.1  # of duration_loss and of share_loss
    alignment_loss_weight: float = 1.0

    # --- optimisation
    effective_batch_size: int = 64  # utterances per optimiser step, over all ranks and accumulation steps
    batch_size: int = 64  # utterances per forward-backward, over all ranks together; divides effective_batch_size
    max_steps: int = 200_000
    max_epochs: int = 0  # 0: no limit
    max_train_seconds: float = 0.0  # training time without evaluations and compilation; 0: no limit
    learning_rate: float = 3e-3  # of Muon, for the matrices inside blocks
    adamw_learning_rate: float = 1e-3  # of AdamW, for everything else
    weight_decay: float = 0.0
    muon_momentum: float = 0.95
    warmup_steps: int = 50
    lr_decay: Literal["linear", "cosine", "constant"] = "linear"  # over max_steps
    min_lr_ratio: float = 0.0  # learning rate at the end of the decay, divided by its peak
    grad_clip: float = 1.0  # 0: off
    max_skipped_steps: int = 10  # the run ends after so many steps in a row whose gradient is not finite
    ema_decay: float = 0.99  # exponential moving average of the weights, used to evaluate and sample; 0: off

    # --- logging and checkpoints
    log_interval: int = 10
    val_interval: int = 250  # 0: never
    val_num_samples: int = 64
    checkpoint_interval: int = 1000  # 0: only at the end
    keep_checkpoints: int = 3  # number of numbered checkpoints to keep, besides latest.pt
    no_wandb: bool = False
    wandb_project: str = "nanoAudioDiffusion"
    wandb_url: str = ""  # empty: offline, in out_dir/wandb; the URL of a server: online

    # --- evaluation: synthesize prompts, transcribe them, count the errors
    eval_interval: int = 1000  # 0: never
    eval_num_samples: int = 64
    eval_prompts: str = "val"  # a text file with one prompt per line | val | test | overfit (the training utterances)
    eval_judge: Literal["auto", "whisper", "ctc", "none"] = "whisper"  # ctc: trained on the corpus itself; none: wavs only;
    # auto: whisper if its model can be loaded when the run starts, else ctc. The run's config.yaml has the choice
    eval_steps: int = 16  # Euler steps
    eval_cfg_scale: float = 1.5  # 1: no guidance, 0: no text
    eval_temperature: float = 0.4  # scale of the noise at the start
    eval_batch_size: int = 16
    # auto: the run's own learned one; else bigvgan on CUDA; on a CPU the corpus's learned one, else griffinlim
    eval_vocoder: Literal["auto", "bigvgan", "learned", "griffinlim"] = "auto"
    eval_vocoder_model: str = "nvidia/bigvgan_v2_22khz_80band_fmax8k_256x"  # hub id or local folder
    eval_whisper_model: str = "base.en"  # a name, or the path of a local .pt
    eval_language: str = "en"  # of the speech, for Whisper; another one needs a model of many languages, such as base
    eval_whisper_device: str = "auto"  # auto: the rank's device

    def __post_init__(self):
        self.out_dir = self.out_dir or os.path.join(".artifacts", "local", self.run_name)


AUDIO_FIELDS = "sample_rate n_fft hop_length win_length n_mels f_min f_max".split()
# The fields that give a model's weights their meaning. A run that starts from a voice takes them from there
SHAPE = AUDIO_FIELDS + ("text_encoder_name text_encoder_width text_encoder_layers text_encoder_heads text_blocks width "
                        "layers heads patch mlp_ratio time_conditioning alignment_search cross_rope rope_gamma self_rope "
                        "qk_norm predicts").split()
# What a config from before a field was there did, where that is not the field's default
BEFORE = {"predicts": "velocity"}
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
HINTS = get_type_hints(Config)
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
POSITIVE = ("nproc loader_threads block_size sample_rate n_fft hop_length win_length n_mels f_max text_encoder_width "
            "text_encoder_layers text_encoder_heads width layers heads patch mlp_ratio timestep_logit_std "
            "effective_batch_size batch_size max_steps max_skipped_steps learning_rate adamw_learning_rate log_interval "
            "val_num_samples keep_checkpoints eval_num_samples eval_steps eval_batch_size").split()
PROBABILITY = "silence_prob text_condition_dropout min_lr_ratio ema_decay muon_momentum".split()
NOT_NEGATIVE = ("seed gpus max_silence_sec overfit_first_n_samples f_min duration_loss_weight "
                "alignment_loss_weight text_blocks max_epochs max_train_seconds weight_decay warmup_steps grad_clip "
                "val_interval checkpoint_interval eval_interval eval_cfg_scale eval_temperature").split()


def field_name(key: str, source: str) -> str:
    """The config field that `key` names; `-` counts as `_`. Raises UserError with the nearest name if there is none."""
    name = key.replace("-", "_")
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(f"{source}: unknown config key '{key}'; the nearest valid key is '{near}' "
                        f"(python config.py --help lists all)")
    return name


def parse_value(name: str, value, source: str):
    """`value` (from YAML, or the string of a flag) in the type of field `name`. Raises UserError if it does not fit."""
    hint = str if name in CHOICES else HINTS[name]
    optional = type(None) in get_args(hint)
    kind = get_args(hint)[0] if optional else hint
    if optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
        return None
    try:
        if kind is str and isinstance(value, str):
            return value
        if kind is bool:
            if isinstance(value, bool):
                return value
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[value.lower()]
        if kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            number = float(value)  # also for strings, since PyYAML reads 1e-3 as a string
            if kind is float and math.isfinite(number):
                return number
            if kind is int and abs(number) < 2**63 and number == int(number):
                try:
                    return int(value)  # exact, also beyond 2**53, where floats are not
                except ValueError:
                    return int(number)  # for "1e5"
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        pass
    raise UserError(f"{source}: {name} = {value!r:.80} is not of type {kind.__name__}")


def validate(cfg: Config) -> Config:
    """Return `cfg` if its values can work, alone and together. Raises UserError with the key and its value if not."""
    def refuse(key, why):
        raise UserError(f"{key} = {getattr(cfg, key)!r}: {why}")

    for key, choices in CHOICES.items():
        if getattr(cfg, key) not in choices:
            refuse(key, f"must be one of {', '.join(choices)}")
    for key in POSITIVE:
        if getattr(cfg, key) <= 0:
            refuse(key, "must be greater than 0")
    for key in NOT_NEGATIVE:
        if getattr(cfg, key) < 0:
            refuse(key, "must not be negative")
    for key in PROBABILITY:
        if not 0 <= getattr(cfg, key) <= 1:
            refuse(key, "must lie between 0 and 1")
    if cfg.ema_decay == 1:
        refuse("ema_decay", "would never move the averaged weights; must be less than 1")
    if cfg.width % cfg.heads:
        refuse("heads", f"does not divide width = {cfg.width}")
    if (cfg.width // cfg.heads) % 2:
        refuse("heads", f"gives an odd head size, {cfg.width // cfg.heads}; rotary positions need an even one")
    if cfg.text_encoder_width % cfg.text_encoder_heads:
        refuse("text_encoder_heads", f"does not divide text_encoder_width = {cfg.text_encoder_width}")
    if cfg.effective_batch_size % cfg.batch_size:
        refuse("batch_size", f"does not divide effective_batch_size = {cfg.effective_batch_size}; set "
                             f"effective_batch_size to a multiple of it")
    world = cfg.gpus or cfg.nproc
    if cfg.batch_size < world:
        refuse("batch_size", f"is less than one utterance for each of {world} ranks (batch_size counts all ranks together)")
    if cfg.win_length > cfg.n_fft:
        refuse("win_length", f"must not exceed n_fft = {cfg.n_fft}")
    if (cfg.n_fft - cfg.hop_length) % 2 or cfg.hop_length > cfg.n_fft:
        refuse("hop_length", f"must not exceed n_fft = {cfg.n_fft} and differ from it by an even number")
    if not cfg.f_min < cfg.f_max <= cfg.sample_rate / 2:
        refuse("f_max", f"must lie above f_min = {cfg.f_min} and not above half the sample rate")
    if cfg.mel_std is not None and cfg.mel_std <= 0:
        refuse("mel_std", "must be greater than 0")
    return cfg


def load_yaml(path: str) -> dict:
    """The mapping in a YAML file, with every key and value checked. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read config {path}: {e}; the ones that come with the repo are in configs/") from None
    except Exception as e:  # PyYAML raises many types, for example ValueError for the date 2024-13-45
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected lines of 'key: value'")
    return {(name := field_name(str(key), path)): parse_value(name, value, path) for key, value in values.items()}


def split_flags(argv: list[str], extra: tuple = ()) -> dict[str, str | bool]:
    """The flags `--key value`, `--key=value` and, for a boolean, `--key` as a dict; `-` in keys counts as `_`.

    A key is a config field, `config`, or one of a script's own in `extra`. Raises UserError for any other.
    """
    flags, words = {}, list(argv)
    while words:
        word, equals, value = words.pop(0).partition("=")
        name = word[2:].replace("-", "_")
        if not word.startswith("--"):
            raise UserError(f"command line: unexpected word {word!r}; flags look like --key value")
        if name not in ("config", *extra):
            field_name(name, "command line")
        if not equals and words and not words[0].startswith("--"):
            value = words.pop(0)
        elif not equals:
            if HINTS.get(name) is not bool:
                raise UserError(f"command line: --{name} needs a value")
            value = True
        flags[name] = value
    return flags


def refuse_other_shape(voice: str, theirs: dict, ours: dict) -> None:
    """Raise UserError if a field of SHAPE is another in `ours` than in `theirs`, the config of the voice."""
    if wrong := [f"{k} is {theirs[k]} in the voice, {ours[k]} here" for k in SHAPE if k in ours and ours[k] != theirs[k]]:
        raise UserError(f"cannot start from {voice}: {', '.join(wrong)}; leave these fields out, they come from the voice")


def voice_shape(given: dict) -> dict:
    """SHAPE and train_text_encoder of the voice that a run with the values `given` starts from. Raises UserError.

    They are read from the config.yaml that lies in an exported folder and beside a run's checkpoints. A run that goes on has
    its own, so the voice may be gone then.
    """
    voice, latest = given["init_from"], os.path.join(Config(**given).out_dir, "latest.pt")
    if resume := given.get("resume"):
        voice = resume if resume != "latest" else latest if os.path.exists(latest) else voice
    if not os.path.exists(voice):
        raise UserError(f"no voice at {voice}; expected a checkpoint such as .artifacts/local/demo/latest.pt, or a folder "
                        "that sample.py --export wrote, such as voices/joe")
    path = os.path.join(voice if os.path.isdir(voice) else os.path.dirname(voice), "config.yaml")
    if not os.path.isfile(path):
        raise UserError(f"no {path}, which says how {voice} is built; bring back the config.yaml of its run, or export the "
                        f"voice (python sample.py --ckpt {voice} --export FOLDER) and name that folder")
    theirs = {k: f.default for k, f in FIELDS.items()} | BEFORE | load_yaml(path)
    refuse_other_shape(voice, theirs, given)
    return {k: theirs[k] for k in (*SHAPE, "train_text_encoder")}


def from_flags(flags: dict, base: dict | None = None) -> Config:
    """A validated Config: defaults, then `base`, then the files of flags["config"], then the other flags.

    The files are YAML, as FILE,FILE; later ones win. Without a `base`, a run that starts from a
    voice (init_from) has the shape of that.
    """
    given = {}
    for path in flags["config"].split(",") if "config" in flags else ():
        given |= load_yaml(path)
    for name, value in flags.items():
        if name != "config":
            given[name] = parse_value(field_name(name, "command line"), value, "command line")
    if base is None and given.get("init_from"):
        base = voice_shape(given)
    return validate(Config(**((base or {}) | given)))


def load_config(argv: list[str], base: dict | None = None) -> Config:
    """The Config of a command line. Raises UserError with the key, its value and what is valid."""
    if "--help" in argv or "-h" in argv:
        print(inspect.getsource(Config).split("    def ")[0])
        sys.exit(0)
    return from_flags(split_flags(argv), base)


def parse_with_audio(p: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse a command line that writes or reads log-mels: `p`'s flags, and --config and each audio field.

    The attribute `cfg` of the result is the validated Config. Raises UserError.
    """
    group = p.add_argument_group("the log-mel")
    group.add_argument("--config", metavar="FILE", help="take the fields below from a config, or from several: FILE,FILE")
    for name in AUDIO_FIELDS:
        group.add_argument(f"--{name}", f"--{name.replace('_', '-')}", metavar="N", help=f"default: {FIELDS[name].default}")
    args = p.parse_args(argv)
    flags = {name: getattr(args, name) for name in ("config", *AUDIO_FIELDS)}
    args.cfg = from_flags({name: value for name, value in flags.items() if value is not None})
    return args


def to_yaml(cfg: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def main(argv: list[str]) -> None:
    flags = split_flags(argv, extra=("get",)) if "--get" in argv else {}
    if names := flags.pop("get", ""):
        cfg = from_flags(flags)
        print("\n".join(str(getattr(cfg, field_name(name, "--get"))) for name in names.split(",")))
    else:
        print(to_yaml(load_config(argv)), end="")


if __name__ == "__main__":
    run_cli(main)
