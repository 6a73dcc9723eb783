"""Every knob of a run: one dataclass, filled from a YAML file and then from command-line flags.

    python config.py --config configs/demo.yaml                     # print the resolved config as YAML
    python config.py --config configs/demo.yaml --learning-rate 1e-3
    python config.py --config configs/demo.yaml --get data_dir,gpus # print single values, a line each (run.sh does)
    python config.py --help                                         # every field with its meaning
"""
import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
import sys
import typing

import yaml
from tqdm import tqdm


class UserError(Exception):
    """A mistake the user can mend. Its message says what was found, what was expected and what to do, in one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).splitlines()))  # file names and values that it quotes may hold several


# What torch says of a file that only code could bring back. The operands are pickle's that call something by a name (EXT,
# NEWOBJ_EX, STACK_GLOBAL) and FRAME, with which a modern pickle begins.
CODE = re.compile(r"weights.only.*(GLOBAL|call reduce|new object|Can only build|TorchScript|"
                  r"Unsupported operand (13[0-2]|146|147|149)\b)", re.DOTALL)
REFUSED = "it holds more than tensors, numbers and texts; loading it could run code, so it was refused"
SIZES = {"google/byt5-small": "1.2 GB", "nvidia/bigvgan_v2_22khz_80band_fmax8k_256x": "450 MB"}  # of downloads


def first_line(e: BaseException) -> str:
    """An exception's message cut to its first line, or its type's name if it has none: fit for an error of one line.

    A refusal to run code becomes REFUSED: torch's own first line tells how to load the file in spite of it.
    """
    return REFUSED if CODE.search(str(e)) else next(iter(str(e).strip().splitlines()), "") or type(e).__name__


def announce_download(name: str) -> None:
    """Say on standard error what a first use of the Hugging Face repository `name` is about to fetch, and where to."""
    from huggingface_hub import constants, try_to_load_from_cache
    if not constants.HF_HUB_OFFLINE and not isinstance(try_to_load_from_cache(name, "config.json"), str):
        tqdm.write(f"downloading {name} ({SIZES.get(name, 'size unknown')}) to {constants.HF_HUB_CACHE}, once", sys.stderr)


PROGRESS_SECONDS = 1 if sys.stderr.isatty() else 20  # between two updates of a progress bar: few lines in a log file


def waiting(items=None, **about):
    """A progress bar on standard error (tqdm's, with its `about`), which comes when two seconds have passed."""
    return tqdm(items, delay=2, leave=False, mininterval=PROGRESS_SECONDS, **about)


def run_cli(main) -> None:
    """Run an entry point: a UserError ends in one line on stderr and exit status 2, never in a traceback."""
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as e:
        tqdm.write(f"error: {e}", sys.stderr)  # above a progress bar that is on the terminal still
        sys.exit(2)
    except KeyboardInterrupt:
        tqdm.write("stopped by Ctrl-C", sys.stderr)
        sys.exit(130)


@dataclasses.dataclass
class Config:
    # --- the run
    run_name: str = "run"
    out_dir: str = ""  # where everything the run writes goes; empty: .artifacts/local/<run_name>
    seed: int = 1337
    resume: str = ""  # "latest" (from out_dir, a fresh start if there is none) or the path of a checkpoint
    gpus: int = 0  # GPUs of this machine to train on, one rank each; 0: train on the CPU
    nproc: int = 1  # CPU ranks (gloo) when gpus is 0
    dtype: str = "auto"  # auto (bfloat16 autocast on CUDA, float32 on CPU) | float32 | bfloat16
    compile: bool = False  # torch.compile the decoder

    # --- the corpus
    data_dir: str = "data/ljspeech_bigvgan"  # a processed corpus, written by the prepare script
    prepare_script: str = ""  # what run.sh runs, with --out data_dir, when data_dir is missing
    block_size: int = 1024  # longest utterance in mel frames; longer ones are dropped, never cropped
    silence_prob: float = 0.0  # chance that an utterance gets a tail of silence (frames at the log-mel floor)
    max_silence_sec: float = 0.5  # longest such tail
    overfit_first_n_samples: int = 0  # train on the first n utterances of the training split only; 0: on all
    loader_workers: int = 1  # processes a rank that make batches ahead of time; 0: made when asked for
    length_buckets: bool = True  # batches of utterances of like length; off: random batches (the baseline's)

    # --- log-mel representation: BigVGAN's 22 kHz, 80-band one; must agree with the corpus's meta.json
    sample_rate: int = 22050
    n_fft: int = 1024
    hop_length: int = 256
    win_length: int = 1024
    n_mels: int = 80
    f_min: float = 0.0
    f_max: float = 8000.0
    mel_mean: float | None = None  # None: taken from the corpus's dataset_stats.json
    mel_std: float | None = None

    # --- text encoder: a Hugging Face name or folder, or "random": a small ByT5-shaped encoder that starts random
    text_encoder_name: str = "google/byt5-small"
    train_text_encoder: bool = False  # off: frozen
    text_encoder_width: int = 192  # the next three are for "random" only
    text_encoder_layers: int = 2
    text_encoder_heads: int = 3
    text_blocks: int = 3  # convolutions over the encoder's features that always train; 0: none (the baseline's)

    # --- mel decoder
    width: int = 1024
    layers: int = 8
    heads: int = 4
    patch: int = 1  # mel frames a position of the decoder: 2 halves the sequence, and with it most of the cost
    mlp_ratio: float = 8 / 3  # SwiGLU's hidden width over width, rounded up to a multiple of 32
    time_conditioning: str = "adaln"  # adaln | additive (the baseline's)
    # Learn which token each position says, by monotonic alignment search (arXiv 2005.11129), give the decoder that token's
    # features, and teach the duration predictor each token's share of the time. Off: the baseline's
    align: bool = True
    # Where a token sits for cross-attention's rotary positions: durations (the middle of its share of the time) |
    # normalized (n / N, arXiv 2509.11084) | absolute (n, with frames counted too; the baseline's)
    cross_rope: str = "durations"
    rope_gamma: float = 60.0  # for the first two: the end of the utterance turns by so many radians
    self_rope: bool = True  # rotary positions in self-attention
    qk_norm: bool = True  # RMS-normalise queries and keys
    zero_init: bool = True  # zero-initialise each branch's last matrix, so that a block starts as the identity

    # --- the flow: t = 1 is noise, t = 0 is speech
    timestep_logit_mean: float = 1.6  # training times are sigmoid(N(mean, std)); > 0 leans towards noise, where
    timestep_logit_std: float = 1.0  # the words are decided
    text_condition_dropout: float = 0.1  # chance that a sample trains without its text, for guidance
    duration_loss_weight: float = 0.1
    align_loss_weight: float = 1.0

    # --- optimisation
    effective_batch_size: int = 64  # utterances an optimiser step, over all ranks and accumulation steps
    batch_size: int = 64  # utterances a forward-backward, over all ranks together; divides effective_batch_size
    max_steps: int = 200_000
    max_epochs: int = 0  # 0: no limit
    max_train_seconds: float = 0.0  # training time without evaluations and compilation; 0: no limit
    learning_rate: float = 3e-3  # Muon's, for the matrices inside blocks
    adamw_learning_rate: float = 1e-3  # AdamW's, for everything else
    weight_decay: float = 0.0
    muon_momentum: float = 0.95
    warmup_steps: int = 50
    lr_decay: str = "linear"  # linear | cosine | constant, over max_steps
    min_lr_ratio: float = 0.0  # the learning rate at the end of the decay, over its peak
    grad_clip: float = 1.0  # 0: off
    max_skipped_steps: int = 10  # so many steps in a row with a loss or gradient that is not finite end the run
    ema_decay: float = 0.99  # exponential moving average of the weights, used to evaluate and sample; 0: off

    # --- logging and checkpoints
    log_interval: int = 10
    val_interval: int = 250  # 0: never
    val_num_samples: int = 64
    checkpoint_interval: int = 1000  # 0: only at the end
    keep_checkpoints: int = 3  # numbered checkpoints kept; latest.pt always is
    no_wandb: bool = False
    wandb_project: str = "nanoAudioDiffusion"
    wandb_url: str = ""  # empty: offline, in out_dir/wandb; a server's URL: online

    # --- evaluation: speak, listen, count the errors
    eval_interval: int = 1000  # 0: never
    eval_num_samples: int = 64
    eval_prompts: str = "val"  # a file with a prompt a line | val | test | overfit (the training utterances)
    eval_judge: str = "whisper"  # whisper | ctc (trained on the corpus itself, no download) | none (wavs only)
    eval_steps: int = 32  # Euler steps
    eval_cfg_scale: float = 2.0  # 1: no guidance, 0: no text
    eval_batch_size: int = 16
    eval_vocoder: str = "auto"  # auto (bigvgan on CUDA, else griffinlim) | bigvgan | griffinlim
    eval_vocoder_model: str = "nvidia/bigvgan_v2_22khz_80band_fmax8k_256x"  # hub id or local folder
    eval_whisper_model: str = "base.en"  # name, or path of a local .pt
    eval_whisper_device: str = "auto"  # auto: the rank's own

    def __post_init__(self):
        self.out_dir = self.out_dir or os.path.join(".artifacts", "local", self.run_name)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
HINTS = typing.get_type_hints(Config)
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "time_conditioning": ("adaln", "additive"),
    "cross_rope": ("normalized", "durations", "absolute"),
    "lr_decay": ("linear", "cosine", "constant"),
    "eval_judge": ("whisper", "ctc", "none"),
    "eval_vocoder": ("auto", "bigvgan", "griffinlim"),
}
POSITIVE = ("nproc block_size sample_rate n_fft hop_length win_length n_mels f_max text_encoder_width "
            "text_encoder_layers text_encoder_heads width layers heads patch mlp_ratio timestep_logit_std "
            "effective_batch_size batch_size max_steps max_skipped_steps learning_rate adamw_learning_rate log_interval "
            "val_num_samples keep_checkpoints eval_num_samples eval_steps eval_batch_size").split()
PROBABILITY = "silence_prob text_condition_dropout min_lr_ratio ema_decay muon_momentum".split()
NOT_NEGATIVE = ("seed gpus loader_workers max_silence_sec overfit_first_n_samples f_min duration_loss_weight "
                "align_loss_weight text_blocks max_epochs max_train_seconds weight_decay warmup_steps grad_clip "
                "val_interval checkpoint_interval eval_interval eval_cfg_scale").split()


def field_name(key: str, where: str) -> str:
    """The config field that `key` names (`-` and `_` alike). Raises UserError with the nearest name if none."""
    name = key.replace("-", "_")
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.0)[0]
        raise UserError(f"{where}: unknown config key '{key}'; the nearest valid key is '{near}' "
                        f"(python config.py --help lists all)")
    return name


def parse_value(name: str, value, where: str):
    """`value` (of YAML, or a flag's string) as the type of field `name`. Raises UserError if it is not one."""
    hint = HINTS[name]
    optional = type(None) in typing.get_args(hint)
    kind = typing.get_args(hint)[0] if optional else hint
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
            number = float(value)  # PyYAML reads 1e-3 as a string, so that float() must see strings too
            if kind is float and math.isfinite(number):
                return number
            if kind is int and abs(number) < 2**63 and number == int(number):
                try:
                    return int(value)  # exact, where a float of more than 2**53 is not
                except ValueError:
                    return int(number)  # of "1e5"
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        pass
    # reprlib: a few lines of YAML can hold lists of lists that would fill the memory when written out
    raise UserError(f"{where}: {name} = {reprlib.repr(value):.200} is not of type {kind.__name__}")


def validate(cfg: Config) -> Config:
    """Refuse values that cannot work, alone or together, with the key and its value. Returns `cfg`."""
    def refuse(key, why):
        raise UserError(f"{key} = {getattr(cfg, key)!r}: {why}")

    for key, choices in CHOICES.items():
        value = getattr(cfg, key)
        if value not in choices:
            near = difflib.get_close_matches(value, choices, n=1, cutoff=0.0)[0]
            refuse(key, f"must be one of {', '.join(choices)}; the nearest is '{near}'")
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
    if cfg.batch_size % world:
        refuse("batch_size", f"does not divide among {world} ranks (batch_size counts all ranks together)")
    if cfg.win_length > cfg.n_fft:
        refuse("win_length", f"must not exceed n_fft = {cfg.n_fft}")
    if (cfg.n_fft - cfg.hop_length) % 2 or cfg.hop_length > cfg.n_fft:
        refuse("hop_length", f"must not exceed n_fft = {cfg.n_fft} and differ from it by an even number")
    if not cfg.f_min < cfg.f_max <= cfg.sample_rate / 2:
        refuse("f_max", f"must lie above f_min = {cfg.f_min} and not above half the sample rate")
    if cfg.mel_std is not None and cfg.mel_std <= 0:
        refuse("mel_std", "must be greater than 0")
    if cfg.eval_interval and not cfg.eval_prompts:
        refuse("eval_prompts", "must be a file, val, test or overfit")
    return cfg


def load_yaml(path: str) -> dict:
    """The mapping that a YAML file holds, with every key and value checked. Raises UserError."""
    try:
        with open(path, encoding="utf-8") as f:
            values = yaml.safe_load(f)
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read config {path}: {e}; the ones that come with the repo are in configs/") from None
    except Exception as e:  # of many types: a date like 2024-13-45, brackets nested a thousand deep
        raise UserError(f"{path} is not valid YAML: {' '.join(str(e).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; expected lines of 'key: value'")
    names = {str(key): field_name(str(key), path) for key in values}
    return {names[str(key)]: parse_value(names[str(key)], value, path) for key, value in values.items()}


def split_flags(argv: list[str], extra: tuple = ()) -> dict[str, str | bool]:
    """`--key value`, `--key=value` and a boolean's bare `--key` as a dict; `-` in keys becomes `_`.

    Keys are config fields, `config`, and a script's own ones in `extra`. Raises UserError for any other.
    """
    flags, i = {}, 0
    while i < len(argv):
        if not argv[i].startswith("--") or argv[i] == "--":
            raise UserError(f"command line: unexpected word {argv[i]!r}; flags look like --key value")
        key, eq, value = argv[i][2:].partition("=")
        key = key.replace("-", "_")
        if key not in ("config", *extra):
            field_name(key, "command line")
        if not eq:
            has_value = i + 1 < len(argv) and not argv[i + 1].startswith("--")
            if has_value:
                i += 1
                value = argv[i]
            elif HINTS.get(key) is bool:
                value = True
            else:
                raise UserError(f"command line: --{key} needs a value")
        flags[key] = value
        i += 1
    return flags


def from_flags(flags: dict, base: dict | None = None) -> Config:
    """A validated Config: defaults, then `base`, then the YAML file `flags["config"]`, then the other flags."""
    flags = dict(flags)
    values = dict(base or {})
    if "config" in flags:
        values.update(load_yaml(flags.pop("config")))
    for key, value in flags.items():
        name = field_name(key, "command line")
        values[name] = parse_value(name, value, "command line")
    return validate(Config(**values))


def load_config(argv: list[str], base: dict | None = None) -> Config:
    """The Config that a command line asks for. Raises UserError naming the key, the value and what is valid."""
    if "--help" in argv or "-h" in argv:
        print(inspect.getsource(Config).split("    def ")[0])
        sys.exit(0)
    return from_flags(split_flags(argv), base)


def to_yaml(cfg: Config) -> str:
    return yaml.safe_dump(dataclasses.asdict(cfg), sort_keys=False)


def main(argv: list[str]) -> None:
    keys = None
    if "--get" in argv:
        i = argv.index("--get")
        if i + 1 == len(argv):
            raise UserError("command line: --get needs config keys, separated by commas")
        keys = [field_name(key, "--get") for key in argv[i + 1].split(",")]
        argv = argv[:i] + argv[i + 2:]
    cfg = load_config(argv)
    print("\n".join(str(getattr(cfg, k)) for k in keys) if keys else to_yaml(cfg), end="" if not keys else "\n")


if __name__ == "__main__":
    run_cli(main)
