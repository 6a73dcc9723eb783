"""
python -m pytest tests/test_config.py

Configs: every field survives YAML and flags, and every mistake in one gives one line that names the key.
"""
import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import config
from common import UserError
from config import AUDIO_FIELDS, CHOICES, FIELDS, HINTS, POSITIVE, PROBABILITY, Config

ROOT = Path(__file__).resolve().parent.parent
KINDS = {name: str if name in CHOICES else next(kind for kind in (bool, int, float, str)
                                                if kind is hint or kind in getattr(hint, "__args__", ()))
         for name, hint in HINTS.items()}
OF_KIND = {kind: sorted(name for name in FIELDS if KINDS[name] is kind) for kind in (bool, int, float, str)}
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


def write_yaml(folder, text):
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


@st.composite
def configs(draw):
    """Any valid Config: each field lies within its bounds, and the fields fit together."""
    values = {}
    for name in FIELDS:
        if name in CHOICES:
            values[name] = draw(st.sampled_from(CHOICES[name]))
        elif KINDS[name] is bool:
            values[name] = draw(st.booleans())
        elif KINDS[name] is str:
            values[name] = draw(WORDS)
        elif KINDS[name] is int:
            values[name] = draw(st.integers(int(name in POSITIVE), 10**6))
        elif name in PROBABILITY:
            values[name] = draw(st.floats(0, 1, exclude_max=True))
        else:
            values[name] = draw(st.floats(0, 1e6, exclude_min=name in POSITIVE))
    size = st.integers(1, 12)
    values["heads"] = draw(size)
    values["width"] = values["heads"] * 2 * draw(size)
    values["text_encoder_heads"] = draw(size)
    values["text_encoder_width"] = values["text_encoder_heads"] * draw(size)
    values["gpus"], values["nproc"] = draw(st.integers(0, 8)), draw(size)
    values["batch_size"] = (values["gpus"] or values["nproc"]) * draw(size)
    values["effective_batch_size"] = values["batch_size"] * draw(size)
    values["hop_length"] = draw(st.integers(1, 2000))
    values["n_fft"] = values["hop_length"] + 2 * draw(st.integers(0, 2000))
    values["win_length"] = draw(st.integers(1, values["n_fft"]))
    values["f_max"] = draw(st.floats(0, values["sample_rate"] / 2, exclude_min=True))
    values["f_min"] = draw(st.floats(0, values["f_max"], exclude_max=True))
    values["init_from"] = ""  # else it must be a voice: see "from a voice"
    values["mel_mean"] = draw(st.none() | st.floats(-50, 50))
    values["mel_std"] = draw(st.none() | st.floats(1e-6, 50))
    return Config(**values)


def as_flag(value):
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


@given(configs(), st.lists(st.sampled_from("-_"), min_size=1, max_size=4), st.booleans())
@settings(max_examples=15)
def test_every_field_survives_yaml_and_flags(tmp_path_factory, cfg, strokes, equals_sign):
    path = write_yaml(tmp_path_factory.mktemp("yaml"), config.to_yaml(cfg))
    assert config.load_config(["--config", path]) == cfg
    assert list(yaml.safe_load(Path(path).read_text())) == list(FIELDS)
    argv = []
    for n, (name, value) in enumerate(dataclasses.asdict(cfg).items()):
        key, value = "--" + name.replace("_", strokes[n % len(strokes)]), as_flag(value)
        argv += [f"{key}={value}"] if equals_sign or value.startswith("--") else [key, value]
    assume(not {"-h", "--help"} & set(argv))  # as the value of a text, which hypothesis finds in our own code
    assert config.load_config(argv) == cfg


@pytest.mark.parametrize("text, name, value", [
    ("1e-3", "learning_rate", 1e-3), ("3", "learning_rate", 3.0), ("1_000", "max_steps", 1000),
    ("1e5", "max_steps", 100_000), ("2e0", "gpus", 2), (str(2**53 + 1), "seed", 2**53 + 1),  # no float holds 2**53 + 1
    ("0", "mel_mean", 0.0), ("-5.5", "mel_mean", -5.5), ("none", "mel_mean", None), ("null", "mel_std", None),
    ("1337", "run_name", "1337"), ("none", "run_name", "none"), ("true", "compile", True),
    ("no", "length_buckets", False), ("0", "qk_norm", False), ("FALSE", "qk_norm", False), ("1", "no_wandb", True)])
def test_values_of_flags(text, name, value):
    got = getattr(config.load_config([f"--{name}", text]), name)
    assert got == value and type(got) is type(value)


def test_values_of_yaml(tmp_path):
    path = write_yaml(tmp_path, "learning-rate: 1e-3\nmax-steps: 1e5\nmel_mean: null\nmel_std:\ncompile: yes\nf_max: 7600\n"
                                f"seed: {2**53 + 1}\n")
    cfg = config.load_config(["--config", path])
    assert (cfg.learning_rate, cfg.max_steps, cfg.mel_mean, cfg.mel_std, cfg.compile, cfg.f_max, cfg.seed) == \
        (1e-3, 100_000, None, None, True, 7600.0, 2**53 + 1)
    assert type(cfg.max_steps) is int and type(cfg.f_max) is float
    assert config.load_config(["--config", write_yaml(tmp_path, "# only a comment\n")]) == Config()


def test_flags_win_over_yaml_and_yaml_wins_over_the_base(tmp_path):
    path = write_yaml(tmp_path, "width: 64\nlayers: 2\n")
    cfg = config.load_config(["--config", path, "--layers", "5"], base={"width": 8, "layers": 9, "heads": 2})
    assert (cfg.width, cfg.layers, cfg.heads) == (64, 5, 2)


def test_later_files_win(tmp_path):
    for name, text in (("a", "width: 64\nlayers: 2\n"), ("b", "width: 32\n")):
        (tmp_path / f"{name}.yaml").write_text(text)
    for files, expected in (("b", (32, 8)), ("a,b", (32, 2)), ("b,a", (64, 2))):
        cfg = config.load_config(["--config", ",".join(str(tmp_path / f"{name}.yaml") for name in files.split(","))])
        assert (cfg.width, cfg.layers) == expected, files
    with pytest.raises(UserError, match="cannot read config"):
        config.load_config(["--config", f"{tmp_path / 'a.yaml'},"])


def test_a_boolean_flag_needs_no_value():
    cfg = config.load_config(["--compile", "--no-wandb", "--seed", "3", "--train-text-encoder"])
    assert cfg.compile and cfg.no_wandb and cfg.train_text_encoder and cfg.seed == 3


def test_out_dir_follows_the_run_name():
    assert config.load_config(["--run_name", "x"]).out_dir == ".artifacts/local/x"
    assert config.load_config(["--run_name", "x", "--out_dir", "y"]).out_dir == "y"


@pytest.mark.parametrize("key, near", [("learnin_rate", "learning_rate"), ("batchsize", "batch_size"), ("Seed", "seed"),
                                       ("hop", "hop_length"), ("eval-juge", "eval_judge")])
def test_an_unknown_key_gets_the_nearest_valid_key(tmp_path, key, near):
    for argv in (["--" + key, "1"], ["--config", write_yaml(tmp_path, f"{key}: 1")]):
        with pytest.raises(UserError) as e:
            config.load_config(argv)
        assert key.replace("-", "_") in str(e.value).replace("-", "_") and f"the nearest valid key is '{near}'" in str(e.value)


@pytest.mark.parametrize("key, value, kind", [
    ("seed", "three", "int"), ("seed", "1.5", "int"), ("max_steps", "1e-3", "int"), ("width", "inf", "int"),
    ("width", "nan", "int"), ("seed", str(2**63), "int"), ("width", "true", "int"), ("learning_rate", "fast", "float"),
    ("learning_rate", "1e999", "float"), ("f_max", "none", "float"), ("mel_mean", "nan", "float"),
    ("compile", "maybe", "bool"), ("compile", "2", "bool"),
    ("seed", "[1]", "int"), ("run_name", "[1]", "str"), ("run_name", "{a: 1}", "str"), ("seed", "null", "int"),
    ("run_name", "null", "str"), ("mel_std", "{}", "float"), ("learning_rate", "true", "float"),
    ("compile", "null", "bool")])
def test_values_of_a_wrong_type_are_refused(tmp_path, key, value, kind):
    lines = [["--config", write_yaml(tmp_path, f"{key}: {value}")]]
    lines += [["--" + key, value]] if kind != "str" else []  # a flag's value is always a string
    for argv in lines:
        with pytest.raises(UserError, match=f"{key} = .* is not of type {kind}"):
            config.load_config(argv)


@pytest.mark.parametrize("text", [
    "- a\n- b\n", "just words", "42", "a: b: c", "key: [1", "\tseed: 1", "seed: 1\n  width: 2", "{[1]: 2}", "? {a: 1}\n: 2",
    "seed: !!python/object/apply:os.getcwd []", "1: 2", "null: 2", "seed: &a [*a]", "seed: *nowhere", b"\x00\x01\x02",
    b"\xff\xfe\xfa", b"\x89PNG\r\n\x1a\n\x00", "run_name: 2024-13-45", "seed: " + "1" * 400, "seed: " + "1" * 5000,
    "learning_rate: -" + "9" * 400])
def test_files_that_are_no_config_are_refused(tmp_path, text):
    path = write_yaml(tmp_path, text)
    with pytest.raises(UserError) as e:
        config.load_config(["--config", path])
    assert path in str(e.value) and "\n" not in str(e.value)


def test_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=f"{path}.* configs/"):
            config.load_config(["--config", str(path)])


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates() | st.binary(max_size=3)
VALUES = st.recursive(SCALARS, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2))


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=5), VALUES, max_size=3) | VALUES)
def test_any_yaml_gives_a_config_or_a_user_error(tmp_path_factory, values):
    path = write_yaml(tmp_path_factory.mktemp("yaml"), yaml.safe_dump(values))
    try:
        cfg = config.load_config(["--config", path])
    except UserError:
        return
    assert config.validate(cfg) is cfg


ODD_ONES = "0 -0 -1 1e400 1e308 -1e308 1e-400 nan -inf 1e5 1_0 ٣ 0x10 1j True none {} [] ~".split()
TEXTS = st.text() | st.sampled_from(ODD_ONES) | st.integers().map(str) | st.floats().map(str) | \
    st.integers(300, 6000).map(lambda n: "9" * n)


NUMBERS = OF_KIND[int] + OF_KIND[float]  # validate() computes with these, so most examples are about them


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), TEXTS, max_size=2), st.sampled_from(NUMBERS), TEXTS)
@settings(max_examples=50)
def test_any_flag_gives_a_config_or_a_user_error(flags, name, text):
    try:
        cfg = config.from_flags(flags | {name: text})
    except UserError as e:
        related = ("batch_size", "heads", "hop_length", "win_length", "f_max")  # the error may be about one of these
        assert "\n" not in str(e) and any(key in str(e) for key in (name, *flags, *related))
        return
    for name in FIELDS:
        value = getattr(cfg, name)
        assert type(value) is KINDS[name] or (value is None and name in ("mel_mean", "mel_std", "timestep_logit_mean_end")), name


@pytest.mark.parametrize("flags, key, value", [
    ("--width 100 --heads 3", "heads", "3"), ("--width 1024 --heads 1024", "heads", "1024"),
    ("--width 6 --heads 2", "heads", "2"),
    ("--text_encoder_width 192 --text_encoder_heads 5", "text_encoder_heads", "5"),
    ("--batch_size 48 --effective_batch_size 64", "batch_size", "48"), ("--batch_size 128", "batch_size", "128"),
    ("--nproc 65", "batch_size", "64"), ("--gpus 65", "batch_size", "64"), ("--batch_size 1 --gpus 2", "batch_size", "1"),
    ("--f_max 11026", "f_max", "11026.0"), ("--sample_rate 8000", "f_max", "8000.0"), ("--f_min 8000", "f_max", "8000.0"),
    ("--f_min -1", "f_min", "-1.0"), ("--win_length 2048", "win_length", "2048"), ("--hop_length 255", "hop_length", "255"),
    ("--hop_length 2048", "hop_length", "2048"), ("--mel_std 0", "mel_std", "0.0"), ("--mel_std -1", "mel_std", "-1.0"),
    ("--ema_decay 1", "ema_decay", "1.0"),
    ("--dtype float16", "dtype", "'float16'"), ("--lr_decay=", "lr_decay", "''"), ("--eval_vocoder hifigan", "eval_vocoder", "'hifigan'"), ("--time_conditioning ADALN", "time_conditioning", "'ADALN'")])
def test_impossible_configs_are_refused(flags, key, value):
    with pytest.raises(UserError) as e:
        config.load_config(flags.split())
    assert f"{key} = {value}: " in str(e.value)


@pytest.mark.parametrize("value, names", [
    ("-1", set(OF_KIND[int] + OF_KIND[float]) - {"mel_mean", "timestep_logit_mean", "timestep_logit_mean_end", "rope_gamma"}), ("2", set(PROBABILITY)),
    ("0", {"loader_threads", "max_steps", "layers", "learning_rate", "adamw_learning_rate", "batch_size", "eval_steps"})])
def test_numbers_out_of_range_are_refused(value, names):
    for name in names:
        with pytest.raises(UserError, match=f"{name} = {value}"):
            config.from_flags({name: value})


@pytest.mark.parametrize("key, value", [("eval_judge", "wisper"), ("cross_rope", "absolut")])
def test_an_unknown_choice_is_told_the_valid_ones(key, value):
    with pytest.raises(UserError, match=f"{key} = '{value}': must be one of {', '.join(CHOICES[key])}"):
        config.load_config([f"--{key}", value])


def test_flags_take_any_mixture_of_hyphens_and_values_that_look_like_flags():
    argv = "--eval_cfg-scale=3 --train-text_encoder --mel_mean -4.8e0 --resume= --out_dir a=b --no_wandb false --seed 2".split()
    assert config.split_flags(argv) == {"eval_cfg_scale": "3", "train_text_encoder": True, "mel_mean": "-4.8e0", "resume": "",
                                        "out_dir": "a=b", "no_wandb": "false", "seed": "2"}
    assert config.from_flags(config.split_flags(argv)).mel_mean == -4.8


@pytest.mark.parametrize("argv", [["word"], ["-s", "1"], ["--"], ["--seed"], ["--seed", "--compile"], ["--config"], ["--=1"],
                                  ["--compile", "--out"], [""]])
def test_command_lines_that_are_refused(argv):
    with pytest.raises(UserError, match="command line"):
        config.load_config(argv)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_configs_of_the_repo_are_valid(path):
    cfg = config.load_config(["--config", str(path)])
    assert cfg.run_name == path.stem
    assert path.stem.startswith("bigvgan") or (ROOT / cfg.prepare_script).is_file()  # those go behind another config
    assert cfg.eval_prompts in ("val", "test", "overfit") or (ROOT / cfg.eval_prompts).is_file()


@pytest.mark.parametrize("name", ["bigvgan24k", "bigvgan44k"])
def test_a_fragment_changes_the_representation_and_nothing_else(name):
    names = {*AUDIO_FIELDS, "eval_vocoder_model", "block_size", "run_name", "out_dir", "data_dir"}
    fragment = ROOT / "configs" / f"{name}.yaml"
    assert set(yaml.safe_load(fragment.read_text())) <= names
    alone = config.load_config(["--config", str(fragment)])
    assert alone.eval_vocoder_model in fragment.read_text().split("\n")[0]  # the comment names the same one
    for base in ("ljspeech", "demo", "grammar"):
        below, path = config.load_config(["--config", str(ROOT / "configs" / f"{base}.yaml")]), ROOT / "configs" / f"{base}.yaml"
        both = config.load_config(["--config", f"{path},{fragment}"])
        assert {field for field in FIELDS if getattr(both, field) != getattr(below, field)} <= names
        assert {field: getattr(both, field) for field in AUDIO_FIELDS} == {field: getattr(alone, field) for field in AUDIO_FIELDS}


# --- the flags of preparation

def parse(*argv):
    p = argparse.ArgumentParser()
    p.add_argument("--out")
    return config.parse_with_audio(p, ["--out", "x", *argv])


def test_the_log_mel_comes_from_flags_over_files_over_the_defaults(tmp_path):
    path = write_yaml(tmp_path, "sample_rate: 24000\nn_mels: 100\nwidth: 64\n")
    assert parse().cfg == Config() and parse().out == "x"
    assert parse("--config", path).cfg == Config(sample_rate=24000, n_mels=100, width=64)
    cfg = parse("--config", path, "--n-mels=128", "--f_max", "12e3", "--hop_length", "300").cfg
    assert cfg == Config(sample_rate=24000, n_mels=128, width=64, f_max=12000.0, hop_length=300)
    every = {"sample_rate": 44100, "n_fft": 2048, "hop_length": 512, "win_length": 2048, "n_mels": 128, "f_min": 20.0, "f_max": 22050.0}
    assert list(every) == AUDIO_FIELDS
    assert parse(*(word for name, value in every.items() for word in (f"--{name}", str(value)))).cfg == Config(**every)


@pytest.mark.parametrize("argv, hint", [
    ("--n_mels many", "n_mels = 'many' is not of type int"), ("--n_mels 0", "n_mels = 0: must be greater than 0"),
    ("--sample_rate 8000", "f_max = 8000.0: must lie above"), ("--f_max nan", "f_max = 'nan' is not of type float"),
    ("--hop_length 2000", "hop_length = 2000: must not exceed n_fft"), ("--win-length 2048", "win_length = 2048"),
    ("--config none.yaml", "cannot read config none.yaml")])
def test_log_mels_that_cannot_be_are_refused(argv, hint):
    with pytest.raises(UserError, match=hint):
        parse(*argv.split())


# --- the command

def test_the_command_prints_a_config_that_loads_again(tmp_path):
    argv = ["--config", "configs/grammar.yaml", "--learning-rate", "1e-4"]
    result = subprocess.run([sys.executable, "config.py", *argv], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0 and result.stderr == ""
    expected = config.load_config(["--config", str(ROOT / "configs/grammar.yaml"), "--learning_rate", "1e-4"])
    assert config.load_config(["--config", write_yaml(tmp_path, result.stdout)]) == expected


def test_the_command_prints_single_values(capsys):
    config.main(["--config", str(ROOT / "configs/grammar.yaml"), "--get", "gpus,data_dir,width"])
    assert capsys.readouterr().out == "0\ndata/demo_bigvgan\n192\n"


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as e:
        config.main(["--help"])
    printed = capsys.readouterr().out
    assert not e.value.code and all(f"    {name}: " in printed for name in FIELDS)


@pytest.mark.parametrize("args, needle", [
    (["--sede", "1"], "'seed'"), (["--seed", "x"], "seed = 'x'"), (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--config", __file__], "test_config.py"), (["--heads", "3"], "heads = 3"), (["--get"], "--get"),
    (["--get", "sede"], "'seed'")])
def test_the_command_refuses_mistakes(args, needle, capsys):
    with pytest.raises(UserError, match=needle):
        config.main(args)
    assert capsys.readouterr().out == ""
