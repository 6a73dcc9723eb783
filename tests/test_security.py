"""Nobody gets in: files from elsewhere run no code, and whatever they hold ends in success or in one clear line."""
import ast
import contextlib
import dataclasses
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import bigvgan
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_audio import HPARAMS, save_bigvgan
from test_model import SMALL, small_model
from transformers import T5Config, T5EncoderModel

import audio
import config
import evaluator
import train
from checkpoint import export, load_checkpoint, read_checkpoint
from config import REFUSED, Config, UserError
from eval import ctc, page
from metric import read_metrics
from model import TTS, load_text_encoder

ROOT = Path(__file__).resolve().parents[1]
FUZZ = settings(suppress_health_check=list(HealthCheck))  # of which one minds a machine that is busy


def outcome(function, *args):
    """What a function gives, or None where it ends in a UserError; its message is one line, and not an endless one."""
    try:
        return function(*args)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 2000
        return None


# --- the project's own code

def called(node: ast.Call) -> str:
    """A call's dotted name; what it hangs on is `?` where that has none."""
    names, f = [], node.func
    while isinstance(f, ast.Attribute):
        names, f = [f.attr, *names], f.value
    return ".".join([f.id if isinstance(f, ast.Name) else "?", *names])


def dangers(source: str) -> list[str]:
    """What in a Python source could let a text or a file run code, or write where it should not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            names += [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) else []
            banned = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "commands"}
            found += [f"imports {n}" for n in names if n.split(".")[0] in banned or n in ("os.system", "os.popen", "torch.load", "yaml.load")]
        if not isinstance(node, ast.Call):
            continue
        name, given_ = called(node), {k.arg: k.value for k in node.keywords}

        def says(key, value, given_=given_):
            return isinstance(given_.get(key), ast.Constant) and given_[key].value is value
        if name in ("os.system", "os.popen", "eval", "exec", "compile", "__import__", "torch.jit.load", "torch.hub.load", "tempfile.mktemp",
                    "subprocess.getoutput", "subprocess.getstatusoutput", "shutil.unpack_archive"):
            found.append(name)
        if name.startswith("yaml.") and name.split(".")[1] in ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"):
            found.append(name)
        if "shell" in given_ and not says("shell", False):
            found.append(f"{name} with shell=")
        if "allow_pickle" in given_ and not says("allow_pickle", False):
            found.append(f"{name} with allow_pickle=")
        if "trust_remote_code" in given_ and not says("trust_remote_code", False):
            found.append(f"{name} with trust_remote_code=")
        if name == "torch.load" and not says("weights_only", True):
            found.append("torch.load without weights_only=True")
        if name.split(".")[-1] == "from_pretrained" and not says("trust_remote_code", False):
            found.append(f"{name} without trust_remote_code=False")
        if name.split(".")[-1] in ("extractall", "extract") and not (
                isinstance(given_.get("filter"), ast.Constant) and given_["filter"].value == "data"):
            found.append(f"{name} without filter='data'")
    return found


def test_the_projects_own_code_has_no_such_door():
    files = [p for p in ROOT.rglob("*.py") if not any(part.startswith(".") or part == "tests" for part in p.relative_to(ROOT).parts)]
    assert {"train.py", "sample.py", "audio.py", "ctc.py", "prepare.py"} <= {p.name for p in files}
    assert {str(p.relative_to(ROOT)): found for p in files if (found := dangers(p.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize("source", [
    "os.system(x)", "os.popen(x)", "from os import system", "subprocess.run(x, shell=True)", "subprocess.Popen(x, shell=y)", "eval(x)",
    "exec(x)", "__import__(x)", "import pickle", "from pickle import loads", "import marshal", "import os, shelve", "yaml.load(x)",
    "yaml.load(x, Loader=yaml.SafeLoader)", "yaml.unsafe_load(x)", "torch.load(x)", "torch.load(x, weights_only=False)",
    "torch.load(x, weights_only=w)", "from torch import load", "tarfile.open(x).extractall(y)", "t.extractall(y, filter='tar')",
    "t.extract(m)", "np.load(x, allow_pickle=True)", "AutoModel.from_pretrained(x)", "f(trust_remote_code=True)",
    "shutil.unpack_archive(x)", "torch.hub.load(x)", "subprocess.getoutput(x)"])
def test_the_check_sees_the_doors(source):
    assert dangers(f"if a:\n    def f():\n        return {source}" if "import " not in source else source)


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(x, weights_only=True)", "tar.extractall(x, filter='data')", "np.load(x)",
                                    "yaml.safe_load(x)", "subprocess.run([x], shell=False)", "re.compile(x)", "import torch, yaml"])
def test_the_check_lets_the_rest_pass(source):
    assert dangers(source) == []


def test_a_text_never_reaches_a_shell(checkpoint, tmp_path):
    text = f'a"; touch {tmp_path}/ran; $(touch {tmp_path}/ran) `touch {tmp_path}/ran` \'| touch {tmp_path}/ran'
    done = subprocess.run([sys.executable, "sample.py", "--ckpt", checkpoint, "--text", text, "--out", tmp_path / "$(touch ran).wav",
                           "--steps", "1", "--seconds", "0.1", "--device", "cpu"], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert os.listdir(tmp_path) == ["$(touch ran).wav"]


# --- files that would run code

class Evil:
    """When it is unpickled, a file of that name appears."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


class Thing:
    pass


def evil_files(ran, state=None):
    """Pickles and archives that would run code: name -> bytes. With `state`, the code hides beside real weights."""
    def saved(thing, **how):
        file = io.BytesIO()
        torch.save({"model": thing, "config": {}, "step": 1, "generator": thing, "ema": state or {}} if state is not None else thing, file, **how)
        return file.getvalue()
    script = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # torch deprecates what others still send
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    return {"zip": saved(Evil(ran)), "legacy": saved(Evil(ran), _use_new_zipfile_serialization=False),
            "zip4": saved(Evil(ran), pickle_protocol=4), "own class": saved(Thing()), "script": script.getvalue(),
            "pickle0": pickle.dumps(Evil(ran), protocol=0), **{f"pickle{p}": pickle.dumps({"model": Evil(ran)}, protocol=p) for p in range(1, 6)}}


@pytest.fixture(scope="module")
def model():
    return small_model().eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("ckpt") / "latest.pt"
    ema = {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    torch.save({"model": model.saved_state(), "ema": ema, "step": 3, "config": dataclasses.asdict(model.cfg)}, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("share") / "voice"
    export(load_checkpoint(str(checkpoint), "cpu")[0], 3, str(folder))
    return folder


@pytest.mark.parametrize("state", [None, {"w": torch.zeros(3)}], ids=["alone", "beside weights"])
def test_checkpoints_that_would_run_code_are_refused_and_say_so(tmp_path, state):
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    for name, data in evil_files(ran, state).items():
        path.write_bytes(data)
        for read in (read_checkpoint, lambda p: load_checkpoint(p, "cpu")):
            with pytest.raises(UserError) as e:
                read(str(path))
            assert str(e.value) == f"{path} cannot be read as a checkpoint: {REFUSED}", name
    assert not ran.exists()
    pickle.loads(evil_files(ran)["pickle4"])  # and it would have
    assert ran.exists()


def test_damaged_checkpoints_say_something_else(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for data in (b"", b"hello", b"\x80", b"PK\x03\x04", whole[:2000], whole[:-1], whole[200:], bytes(len(whole)), b"#!/bin/sh\ntouch ran\n"):
        (tmp_path / "x.pt").write_bytes(data)
        with pytest.raises(UserError, match="cut off, damaged") as e:
            read_checkpoint(str(tmp_path / "x.pt"))
        assert REFUSED not in str(e.value)


def test_the_command_line_says_it_in_one_line(tmp_path):
    (tmp_path / "x.pt").write_bytes(evil_files(tmp_path / "ran")["pickle4"])  # of which torch warns, too
    done = subprocess.run([sys.executable, "sample.py", "--ckpt", tmp_path / "x.pt", "--text", "a", "--out", tmp_path / "x.wav"],
                          cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and REFUSED in done.stderr, done.stderr
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.filterwarnings("ignore")  # torch's, about what is refused anyway
def test_so_are_judges_vocoders_and_text_encoders(tmp_path, demo_corpus):
    ran = tmp_path / "ran"
    t5 = tmp_path / "t5"
    T5EncoderModel(T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)).save_pretrained(t5)
    (t5 / "model.safetensors").unlink()
    corpus = tmp_path / "corpus"
    shutil.copytree(demo_corpus, corpus)
    for name, data in evil_files(ran).items():
        (tmp_path / "whisper.pt").write_bytes(data)
        (corpus / "judge_ctc.pt").write_bytes(data)
        (t5 / "pytorch_model.bin").write_bytes(data)
        folder = save_bigvgan(tmp_path / "bigvgan", data)
        for load in (lambda: evaluator.load_judge(Config(eval_whisper_model=str(tmp_path / "whisper.pt")), "cpu"),
                     lambda: ctc.load_judge(str(corpus), Config()),
                     lambda folder=folder: audio.load_bigvgan(folder, "cpu", Config()),
                     lambda: load_text_encoder(Config(text_encoder_name=str(t5)))):
            with pytest.raises(UserError) as e:
                load()
            assert REFUSED in str(e.value) and len(str(e.value).splitlines()) == 1, (name, str(e.value))
    assert not ran.exists()


def test_code_beside_a_text_encoder_is_not_run_even_by_a_user_who_says_yes(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForTextEncoding": "evil.M"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot load the text encoder"):
        load_text_encoder(Config(text_encoder_name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # BigVGAN's weight norm
def test_judges_and_vocoders_of_wrong_parts(tmp_path, demo_corpus):
    state = ctc.Recogniser(80).state_dict()
    whole = {"model": state, "mel_mean": -5.0, "mel_std": 2.0, "floor": {"cer": 0.1, "wer": 0.2, "recordings": 16}}
    corpus = tmp_path / "corpus"
    shutil.copytree(demo_corpus, corpus)
    torch.save(whole, corpus / "judge_ctc.pt")
    assert ctc.load_judge(str(corpus), Config()).floor["recordings"] == 16
    for wrong in ([], {}, whole | {"mel_mean": "x"}, whole | {"floor": {}}, whole | {"floor": None}, whole | {"model": None},
                  whole | {"model": {"inp.weight": 3}}, whole | {"mel_std": torch.ones(2)}, whole | {"floor": {"cer": "a", "wer": 1, "recordings": 1}}):
        torch.save(wrong, corpus / "judge_ctc.pt")
        with pytest.raises(UserError, match="is not a ctc judge") as e:
            ctc.load_judge(str(corpus), Config())
        assert len(str(e.value).splitlines()) == 1
    generator = bigvgan.BigVGAN(bigvgan.env.AttrDict(HPARAMS))
    for wrong in ({"generator": {"conv_pre.bias": "x"}}, {"generator": {1: 2}}, {"generator": [generator.state_dict()]}, "x"):
        assert outcome(audio.load_bigvgan, save_bigvgan(tmp_path / "v", wrong), "cpu", Config()) is None


# --- damaged checkpoints and folders: success or one line

EDITS = st.lists(st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "delete"]), st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=3)


def damage(data: bytes, edits) -> bytes:
    """Bytes with some of them changed, each edit (kind, where, value); `where` favours both ends, where the structure is."""
    data = bytearray(data)
    for kind, where, value in edits:
        i = min(int(len(data) * (4 * (where - 0.5) ** 3 + 0.5)), len(data) - 1)
        if not data:
            break
        if kind == "flip":
            data[i] ^= 1 << value % 8
        elif kind == "set":
            data[i] = value
        elif kind == "cut":
            del data[i:]
        elif kind == "insert":
            data[i:i] = bytes([value]) * (1 + value % 7)
        else:
            del data[i:i + 1 + value % 7]
    return bytes(data)


@pytest.mark.parametrize("legacy", [False, True])
@given(edits=EDITS)
@example(edits=[("cut", 0.0, 0)])  # nothing left
@example(edits=[("insert", 1.0, 6)])
@settings(FUZZ, max_examples=60)
def test_damaged_checkpoint_files(checkpoint, tmp_path, legacy, edits):
    if legacy:
        torch.save(torch.load(checkpoint, weights_only=True), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    else:
        shutil.copy(checkpoint, tmp_path / "c.pt")
    (tmp_path / "c.pt").write_bytes(damage((tmp_path / "c.pt").read_bytes(), edits))
    outcome(load_checkpoint, str(tmp_path / "c.pt"), "cpu")


def test_a_part_that_became_a_folder_is_noticed(checkpoint, tmp_path):
    """One bit of a zip entry's attributes, for which torch leaves the tensor's memory as it found it."""
    data = bytearray(checkpoint.read_bytes())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1500)
    data[entry + 38] ^= 16
    (tmp_path / "c.pt").write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(str(tmp_path / "c.pt"))


@given(where=st.floats(0, 1), bit=st.integers(0, 7))
@settings(FUZZ, max_examples=60)
def test_a_flipped_bit_is_noticed_or_harmless(checkpoint, tmp_path, where, bit):
    data = bytearray(checkpoint.read_bytes())
    data[min(int(where * len(data)), len(data) - 1)] ^= 1 << bit
    (tmp_path / "c.pt").write_bytes(data)
    found, whole = outcome(read_checkpoint, str(tmp_path / "c.pt")), read_checkpoint(str(checkpoint))
    if found is not None:
        assert found["config"] == whole["config"] and found["step"] == 3
        for part in ("model", "ema"):
            assert found[part].keys() == whole[part].keys() and all(torch.equal(found[part][k], whole[part][k]) for k in whole[part])


@given(name=st.sampled_from(["model.safetensors", "config.yaml", "corpus.json"]), edits=EDITS)
@example(name="model.safetensors", edits=[("flip", 0.5, 0)])  # amid the weights
@settings(FUZZ, max_examples=80)
def test_damaged_exported_folders(exported, tmp_path_factory, name, edits):
    folder = tmp_path_factory.mktemp("fuzz") / "voice"
    shutil.copytree(exported, folder)
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(after := damage(before, edits))
    found = outcome(load_checkpoint, str(folder), "cpu")
    if name == "model.safetensors" and after != before:
        assert found is None  # its SHA-256 tells


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "corpus.json"])
def test_incomplete_and_mixed_folders(exported, tmp_path, name):
    for change in ("missing", "empty", "folder", "another's"):
        folder = tmp_path / change
        shutil.copytree(exported, folder)
        if change == "another's":
            other = small_model(seed=1, mel_mean=-4.0, layers=3).eval()
            export(other, 9, str(tmp_path / "other"))
            shutil.copy(tmp_path / "other" / name, folder / name)
        else:
            (folder / name).unlink()
            if change == "empty":
                (folder / name).touch()
            elif change == "folder":
                (folder / name).mkdir()
        with pytest.raises(UserError, match="not what sample.py --export writes") as e:
            load_checkpoint(str(folder), "cpu")
        assert len(str(e.value).splitlines()) == 1 and str(folder) in str(e.value)
    with pytest.raises(UserError, match="latest.pt"):
        read_checkpoint(str(tmp_path))  # some other folder


@pytest.mark.parametrize("entry, value", [("step", "three"), ("step", None), ("step", 1.5), ("model_sha256", 3), ("mel_mean", None)])
def test_folders_whose_json_is_wrong(exported, tmp_path, entry, value):
    shutil.copytree(exported, tmp_path / "v")
    about = json.loads((exported / "corpus.json").read_text())
    (tmp_path / "v" / "corpus.json").write_text(json.dumps(about | {entry: value}))
    with pytest.raises(UserError):
        load_checkpoint(str(tmp_path / "v"), "cpu")
    for text in ("[]", "3", "[" * 100_000, "1" * 5000, json.dumps({k: v for k, v in about.items() if k != entry})):
        (tmp_path / "v" / "corpus.json").write_text(text)
        with pytest.raises(UserError, match="not what sample.py --export writes"):
            load_checkpoint(str(tmp_path / "v"), "cpu")


def test_training_does_not_go_on_from_an_exported_folder(exported, demo_corpus, tmp_path):
    with pytest.raises(UserError, match="holds no optimiser state"):
        train.main(["--config", str(ROOT / "configs" / "demo.yaml"), "--data_dir", str(demo_corpus), "--out_dir", str(tmp_path / "run"), "--no_wandb",
                    "--width", "32", "--heads", "2", "--layers", "1", "--effective_batch_size", "4", "--batch_size", "4", "--nproc", "1",
                    "--eval_interval", "0", "--resume", str(exported)])


# --- dicts of wrong types

ANYTHING = st.none() | st.booleans() | st.sampled_from([0, -1, 1, 2, 3, 1e300, -1e300, float("nan"), float("inf"), 0.5]) | st.text(max_size=4) \
    | st.lists(st.integers(0, 3), max_size=2) | st.dictionaries(st.text(max_size=2), st.integers(), max_size=1) | st.binary(max_size=2) \
    | st.builds(lambda shape: torch.ones(shape), st.lists(st.integers(0, 3), max_size=3)) \
    | st.sampled_from([torch.zeros(2, dtype=torch.complex64), torch.zeros(3, 3).to_sparse(), torch.zeros(2, dtype=torch.bool), ()])
HUGE = st.sampled_from([2**62, -2**62, 10**30])  # but not for what is built one by one
FIELD = st.sampled_from(sorted(config.FIELDS))


@given(field=FIELD, value=ANYTHING)
@example(field="width", value="x")
@example(field="width", value=torch.ones(2, 2))  # whose name has two lines
@example(field="width", value=torch.ones(1, dtype=torch.complex64))
@example(field="width", value=torch.ones(1, device="meta"))
@settings(FUZZ, max_examples=60)
def test_configs_of_any_type_in_a_checkpoint(checkpoint, tmp_path, field, value):
    ckpt = torch.load(checkpoint, weights_only=True)
    ckpt["config"][field] = value
    torch.save(ckpt, tmp_path / "c.pt")
    found = outcome(load_checkpoint, str(tmp_path / "c.pt"), "cpu")
    if found is not None:
        hint = config.HINTS[field]
        assert isinstance(getattr(found[0].cfg, field), hint)


@given(field=FIELD.filter(lambda f: "layers" not in f), value=HUGE)
@example(field="patch", value=2**62)
@example(field="width", value=2**62)
@settings(FUZZ, max_examples=20)
def test_configs_beyond_any_memory(checkpoint, tmp_path, field, value):
    ckpt = torch.load(checkpoint, weights_only=True)
    ckpt["config"][field] = value
    torch.save(ckpt, tmp_path / "c.pt")
    outcome(load_checkpoint, str(tmp_path / "c.pt"), "cpu")


@pytest.mark.parametrize("wrong", [None, "x", 3, [], torch.ones(2)])
def test_a_config_that_is_no_dict(checkpoint, tmp_path, wrong):
    torch.save(torch.load(checkpoint, weights_only=True) | {"config": wrong}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(str(tmp_path / "c.pt"), "cpu")


def test_what_the_message_of_a_wrong_config_says(checkpoint, tmp_path):
    whole = torch.load(checkpoint, weights_only=True)
    for change, message in (({"width": "x"}, "width = 'x' is not of type int"), ({"heads": 5}, "heads = 5: does not divide width = 32"),
                            ({"mel_mean": None}, "no mel_mean"), ({"from_the_future": 1}, "from_the_future"), ({3: 4}, "unknown config keys 3")):
        torch.save(whole | {"config": whole["config"] | change}, tmp_path / "c.pt")
        with pytest.raises(UserError) as e:
            load_checkpoint(str(tmp_path / "c.pt"), "cpu")
        assert message in str(e.value) and str(tmp_path / "c.pt") in str(e.value)


@given(data=st.data())
@settings(FUZZ, max_examples=60)
def test_checkpoints_with_wrong_entries(checkpoint, tmp_path, data):
    ckpt = torch.load(checkpoint, weights_only=True)
    for _ in range(data.draw(st.integers(1, 2))):
        part = data.draw(st.sampled_from(["model", "ema", "step", "config", "whole"]))
        if part == "whole":
            ckpt = data.draw(ANYTHING)
            break
        if part not in ckpt:
            continue
        action = data.draw(st.sampled_from(["drop", "replace", "inside"]))
        if action == "drop":
            del ckpt[part]
        elif action == "replace":
            ckpt[part] = data.draw(ANYTHING)
        elif isinstance(ckpt[part], dict) and ckpt[part]:
            key = data.draw(st.sampled_from(sorted(map(str, ckpt[part]))))
            if data.draw(st.booleans()):
                ckpt[part].pop(key, None)
            elif part != "config":
                ckpt[part][key] = data.draw(ANYTHING)
            else:
                ckpt[part][data.draw(st.text(max_size=3))] = 1
    torch.save(ckpt, tmp_path / "c.pt")
    outcome(load_checkpoint, str(tmp_path / "c.pt"), "cpu")


# --- the other readers

@pytest.mark.parametrize("text", ["seed: " + "[" * 100_000, "seed: !!timestamp x", "seed: !!bool x", "seed: !!int ''", "seed: !!float ''",
                                  "seed: !!binary '\xff'", "? !!set {a}\n: 1", "seed: !!python/object/apply:os.system ['true']",
                                  "width: " + "{a: " * 50 + "1" + "}" * 50, '"a\nb": 1', "width: 'a\n\n  b'"])
def test_yaml_that_means_harm(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text)
    assert outcome(config.load_yaml, str(tmp_path / "c.yaml")) is None


def test_lists_of_lists_of_lists_are_named_briefly(tmp_path):
    """A few lines of YAML name a value of 3 to the 13th parts, as forty would name one that no memory holds."""
    lines = ["seed: &a0 [x, x, x]"] + [f"seed: &a{n + 1} [*a{n}, *a{n}, *a{n}]" for n in range(12)]
    (tmp_path / "c.yaml").write_text("\n".join(lines))  # of a key that comes twice the last one counts
    with pytest.raises(UserError, match="is not of type int") as e:
        config.load_yaml(str(tmp_path / "c.yaml"))
    assert len(str(e.value)) < 500


@given(st.binary(max_size=300) | st.text().map(str.encode))
@example(b'{"step": 1, "x": ' + b"1" * 5000 + b"}\n{\"step\": 2}")
@example(b"[" * 100_000)
@example(b'{"step": "1"}\n{"step": null}\n[1]\n3\nnull')
@settings(FUZZ)
def test_metrics_of_any_bytes(tmp_path, data):
    (tmp_path / "m.jsonl").write_bytes(data)
    assert all(isinstance(row, dict) and isinstance(row["step"], int) for row in read_metrics(tmp_path / "m.jsonl"))


def test_a_broken_line_costs_no_other(tmp_path):
    for broken in ("1" * 5000, "[" * 100_000, '{"step": 9, "x": ' + "1" * 5000 + "}", "\ufffd", ""):
        (tmp_path / "m.jsonl").write_text('{"step": 1}\n' + broken + '\n{"step": 2}\n', encoding="utf-8")
        assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [1, 2]


@given(st.binary(max_size=300) | st.text(min_size=1).map(lambda t: t.encode(errors="replace")))
@example(b"\xef\xbb\xbfone prompt\n")
@example(b"")
@settings(FUZZ)
def test_prompts_of_any_bytes(tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    prompts = outcome(evaluator.load_prompts, Config(eval_prompts=str(tmp_path / "p.txt")), None)
    if prompts is not None:
        assert prompts and all(any(c.isalnum() for c in p) and p == p.strip() and p[0] != "\ufeff" for p, *_ in prompts)


def sound_files() -> dict[str, bytes]:
    wav, files = 0.1 * np.random.default_rng(0).standard_normal(3000), {}
    for kind, subtype in (("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("AIFF", "PCM_16"), ("OGG", "VORBIS"), ("AU", "PCM_16"), ("CAF", "PCM_16")):
        file = io.BytesIO()
        soundfile.write(file, wav, 22050, format=kind, subtype=subtype)
        files[f"{kind} {subtype}"] = file.getvalue()
    return files


SOUNDS = sound_files()


@given(data=st.binary(max_size=200) | st.tuples(st.sampled_from(sorted(SOUNDS)), EDITS).map(lambda x: damage(SOUNDS[x[0]], x[1])))
@example(b"RIFF")
@example(b"RIFF\x00\x00\x00")
@example(SOUNDS["FLAC PCM_16"][:21] + b"\xff" + SOUNDS["FLAC PCM_16"][22:])  # billions of samples, it says
@example(SOUNDS["WAV PCM_16"][:24] + b"\x01\x00\x00\x00" + SOUNDS["WAV PCM_16"][28:])  # at 1 Hz
@example(SOUNDS["WAV PCM_16"][:24] + b"\xff\xff\xff\x7f" + SOUNDS["WAV PCM_16"][28:])  # at 2 GHz
@example(SOUNDS["WAV FLOAT"][:-400] + np.full(100, 3.4e38, "<f4").tobytes())  # finite, but not for long
@settings(FUZZ, max_examples=150)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about sums beyond float32
def test_sounds_of_any_bytes(tmp_path, data):
    (tmp_path / "x.wav").write_bytes(data)
    try:
        wav = audio.read_wav(str(tmp_path / "x.wav"), 22050)
    except audio.AudioError as e:
        assert len(str(e).splitlines()) == 1
        return
    assert wav.ndim == 1 and len(wav) and wav.dtype == np.float32 and np.isfinite(wav).all() and len(wav) < 100_000


# --- outputs: whole or not at all

@contextlib.contextmanager
def full_disk(size: int):
    """Within this no file of this process grows beyond `size` bytes; writing more is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("samples", [12_000, 40_000, 400_000])  # one, few and many of a file's buffers
def test_a_wav_on_a_full_disk(tmp_path, samples, capfd):
    path = tmp_path / "x.wav"
    audio.write_wav(path, np.zeros(100), 22050)
    before = path.read_bytes()
    with full_disk(20_000), pytest.raises(UserError, match="cannot write .*x.wav") as e:
        audio.write_wav(path, np.zeros(samples), 22050)
    assert len(str(e.value).splitlines()) == 1 and capfd.readouterr() == ("", "")  # libsndfile's callbacks print what they raise
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.wav"]


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_an_export_on_a_full_disk(checkpoint, tmp_path, size):
    model, _ = load_checkpoint(str(checkpoint), "cpu")
    with full_disk(size), pytest.raises(UserError, match="cannot write .*voice") as e:
        export(model, 3, str(tmp_path / "voice"))
    assert len(str(e.value).splitlines()) == 1 and os.listdir(tmp_path) == []


def test_an_evaluation_on_a_full_disk(model, tmp_path):
    cfg = dataclasses.replace(model.cfg, eval_judge="none", eval_steps=1)
    with full_disk(100), pytest.raises(UserError, match="cannot write"):
        evaluator.evaluate(model, cfg, [evaluator.Prompt("one prompt")], tmp_path / "e", torch.device("cpu"), 1, "c")
    assert os.listdir(tmp_path / "e") == []
    with full_disk(100), pytest.raises(UserError, match="cannot write .*wer.jsonl"):
        page.write_text(tmp_path / "e" / "wer.jsonl", "x" * 200)
    assert os.listdir(tmp_path / "e") == []
    (tmp_path / "file").touch()
    for bad in (tmp_path / "file", tmp_path / "file" / "e"):
        with pytest.raises(UserError, match="name another out_dir"):
            evaluator.evaluate(model, cfg, [evaluator.Prompt("one prompt")], bad, torch.device("cpu"), 1, "c")


@pytest.mark.parametrize("write", ["wav", "export"])
def test_what_is_killed_before_its_end_leaves_nothing_under_the_final_name(checkpoint, tmp_path, write):
    """The process dies at the last moment, where it would give the file its name."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy, pathlib, audio, checkpoint
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = os.rename = pathlib.Path.rename = die
if {write!r} == "wav":
    audio.write_wav({str(tmp_path / "out")!r}, numpy.zeros(50000), 22050)
else:
    checkpoint.export(checkpoint.load_checkpoint({str(checkpoint)!r}, "cpu")[0], 3, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert done.returncode == -9 and not (tmp_path / "out").exists()
    if write == "wav":
        audio.write_wav(tmp_path / "out", np.zeros(50000), 22050)  # and the next one cleans up
        assert os.listdir(tmp_path) == ["out"]
    else:
        export(load_checkpoint(str(checkpoint), "cpu")[0], 3, str(tmp_path / "out"))
        assert read_checkpoint(str(tmp_path / "out"))["step"] == 3


def test_messages_are_one_line_whatever_they_quote(tmp_path):
    assert str(UserError("a\nb\r\nc\u2028d")) == "a b c d"
    with pytest.raises(UserError) as e:
        read_checkpoint(str(tmp_path / "two\nlines.pt"))
    assert len(str(e.value).splitlines()) == 1
    assert outcome(TTS, Config(**(SMALL | {"text_encoder_name": "a\nb"}))) is None
