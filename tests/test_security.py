"""
python -m pytest tests/test_security.py

Files and texts from elsewhere run no code. Whatever bytes they hold, reading them succeeds or ends in one clear line.
"""
import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import warnings

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_checkpoint import EDITS, FUZZ, damage, outcome, run_state
from test_vocoder import save_bigvgan
from transformers import T5Config, T5EncoderModel

import audio
import config
import evaluator
import sample
import vocoder
from checkpoint import load_checkpoint, save_checkpoint
from common import UserError
from config import Config
from eval import ctc, judge
from metric import read_metrics
from text_encoder import load_text_encoder, load_tokeniser

# --- the project's own code

BANNED_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "commands"}
BANNED_CALLS = set("os.system os.popen eval exec compile __import__ torch.jit.load torch.hub.load tempfile.mktemp subprocess.getoutput "
                   "subprocess.getstatusoutput shutil.unpack_archive yaml.load yaml.load_all yaml.unsafe_load yaml.full_load "
                   "yaml.unsafe_load_all yaml.full_load_all".split())
REQUIRED = {"torch.load": "weights_only=True", "from_pretrained": "trust_remote_code=False", "extractall": "filter='data'",
            "extract": "filter='data'"}  # the call, or the method of any object -> an argument that it must have
ALLOWED = {"shell": "False", "allow_pickle": "False", "trust_remote_code": "False"}  # the only value of an argument


def dangers(source: str) -> list[str]:
    """What in a Python source could let a text or a file run code, or write outside of its folder."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            found += [name for name in names
                      if name.split(".")[0] in BANNED_MODULES or (module and name in BANNED_CALLS | REQUIRED.keys())]
        if isinstance(node, ast.Call):
            name, given_ = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            needed = REQUIRED.get(name) or REQUIRED.get(name.rsplit(".", 1)[-1])
            if name in BANNED_CALLS or (needed and needed not in [f"{k}={v}" for k, v in given_.items()]):
                found.append(name)
            found += [f"{name} with {k}=" for k, value in ALLOWED.items() if given_.get(k, value) != value]
    return found


@pytest.mark.slow
def test_the_code_has_no_dangerous_call():
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
def test_dangerous_calls_are_found(source):
    assert dangers(f"if a:\n    def f():\n        return {source}" if "import " not in source else source)


@pytest.mark.parametrize("source", ["model.eval()", "torch.load(x, weights_only=True)", "tar.extractall(x, filter='data')", "np.load(x)",
                                    "yaml.safe_load(x)", "subprocess.run([x], shell=False)", "re.compile(x)", "import torch, yaml"])
def test_other_calls_are_allowed(source):
    assert dangers(source) == []


# --- texts and files that would run code

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    save_checkpoint(*run_state(out), 3, {})
    return out / "latest.pt"


@pytest.mark.slow
def test_a_text_never_reaches_a_shell(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f'a"; touch {tmp_path}/ran; $(touch {tmp_path}/ran) `touch {tmp_path}/ran` \'| touch {tmp_path}/ran'
    sample.main(["--ckpt", str(checkpoint), "--text", text, "--out", "$(touch ran).wav", "--steps", "1", "--seconds", "0.1", "--device", "cpu"])
    assert os.listdir(tmp_path) == ["$(touch ran).wav"]


class Evil:
    """Its unpickling creates a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class OwnClass:
    pass


def evil_files(ran, state=None):
    """Pickles and archives that would run code: name -> bytes. With `state` the code is beside real weights."""
    def saved(thing, **how):
        file = io.BytesIO()
        torch.save(thing if state is None else {"model": thing, "config": {}, "step": 1, "generator": thing, "ema": state}, file, **how)
        return file.getvalue()
    script = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # torch deprecates these, but others still send them
        torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    return {"zip": saved(Evil(ran)), "legacy": saved(Evil(ran), _use_new_zipfile_serialization=False),
            "zip4": saved(Evil(ran), pickle_protocol=4), "own class": saved(OwnClass()), "script": script.getvalue(),
            "pickle0": pickle.dumps(Evil(ran), protocol=0), **{f"pickle{p}": pickle.dumps({"model": Evil(ran)}, protocol=p) for p in range(1, 6)}}


@pytest.mark.filterwarnings("ignore")  # torch's and transformers', about files that they refuse anyway
@pytest.mark.parametrize("kind", ["checkpoint", "whisper judge", "ctc judge", "vocoder", "text encoder"])
def test_files_with_code_are_refused_and_the_code_does_not_run(tmp_path, demo_corpus, recwarn, kind):
    ran, file, cfg = tmp_path / "ran", tmp_path / "file.pt", Config(text_encoder_name=str(tmp_path), eval_whisper_model=str(tmp_path / "file.pt"))
    if kind == "text encoder":
        T5EncoderModel(T5Config(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        file = tmp_path / "pytorch_model.bin"
    if kind == "ctc judge":
        shutil.copytree(demo_corpus, tmp_path / "corpus")
        file = tmp_path / "corpus" / "judge_ctc.pt"
    load = {"checkpoint": lambda: load_checkpoint(str(file), "cpu"), "whisper judge": lambda: judge.load_judge(cfg, "cpu"),
            "ctc judge": lambda: ctc.load_ctc_judge(str(tmp_path / "corpus"), cfg), "text encoder": lambda: load_text_encoder(cfg),
            "vocoder": lambda: vocoder.load_bigvgan(save_bigvgan(tmp_path / "bigvgan", file.read_bytes()), "cpu", cfg)}[kind]
    for name, data in (evil_files(ran) | {f"{name} beside": data for name, data in evil_files(ran, {"w": torch.zeros(3)}).items()}).items():
        file.write_bytes(data)
        with pytest.raises(UserError) as e:
            load()
        assert len(str(e.value).splitlines()) == 1, name
        if kind == "checkpoint":  # without the warnings that torch has about some of these
            assert "cannot be read as a checkpoint" in str(e.value) and "could run code" in str(e.value) and not recwarn.list, name
    assert not ran.exists()
    pickle.loads(evil_files(ran)["pickle4"])  # the code does run where nothing prevents it
    assert ran.exists()


def test_code_beside_a_text_encoder_does_not_run_even_if_the_user_says_yes(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForTextEncoding": "evil.M"}}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(UserError, match="cannot load the text encoder"):
        load_text_encoder(Config(text_encoder_name=str(tmp_path)))
    with pytest.raises(UserError, match="cannot load the text encoder"):
        load_tokeniser(Config(text_encoder_name=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.C", None]}, "tokenizer_class": "C"}))
    with contextlib.suppress(UserError):  # transformers may find another tokenizer for this folder
        load_tokeniser(Config(text_encoder_name=str(tmp_path)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", [
    "seed: " + "[" * 2_000, "seed: !!python/object/apply:os.mkdir [ran]", "seed: !!binary '\xff'", "? !!set {a}\n: 1",
    "\n".join(["seed: &a0 [x, x, x]"] + [f"seed: &a{n + 1} [*a{n}, *a{n}, *a{n}]" for n in range(12)])])  # 3 ** 13 values
def test_yaml_that_means_harm_is_refused(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    assert outcome(config.load_yaml, "c.yaml") is None and os.listdir(tmp_path) == ["c.yaml"]


# --- readers of any bytes

@given(st.binary(max_size=300) | st.text().map(str.encode))
@example(b'{"step": 1, "x": ' + b"1" * 5000 + b"}\n{\"step\": 2}")
@example(b"[" * 100_000)
@example(b'{"step": "1"}\n{"step": null}\n[1]\n3\nnull')
@settings(FUZZ)
def test_metrics_of_any_bytes(tmp_path, data):
    (tmp_path / "m.jsonl").write_bytes(data)
    assert all(isinstance(row, dict) and isinstance(row["step"], int) for row in read_metrics(tmp_path / "m.jsonl"))
    (tmp_path / "m.jsonl").write_bytes(b'{"step": 1}\n' + data.replace(b"\r", b"") + b'\n{"step": 2}\n')  # a broken line costs no other
    steps = [row["step"] for row in read_metrics(tmp_path / "m.jsonl")]
    assert steps[0] == 1 and steps[-1] == 2


@given(st.binary(max_size=300) | st.text(min_size=1).map(lambda t: t.encode(errors="replace")))
@example(b"\xef\xbb\xbfone prompt\n")
@example(b"")
@settings(FUZZ)
def test_prompts_of_any_bytes(tmp_path, data):
    (tmp_path / "p.txt").write_bytes(data)
    prompts = outcome(evaluator.load_prompts, Config(eval_prompts=str(tmp_path / "p.txt")), None)
    if prompts is not None:
        assert prompts and all(any(c.isalnum() for c in p) and p == p.strip() and p[0] != "\ufeff" for p, *_ in prompts)


def sound_file(kind: str, subtype: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.random.default_rng(0).standard_normal(3000), 22050, format=kind, subtype=subtype)
    return file.getvalue()


PCM, FLOAT, FLAC, AIFF, OGG = (sound_file(*kind.split()) for kind in ("WAV PCM_16", "WAV FLOAT", "FLAC PCM_16", "AIFF PCM_16", "OGG VORBIS"))


@given(data=st.binary(max_size=200) | st.builds(damage, st.sampled_from([PCM, FLOAT, FLAC, AIFF, OGG]), EDITS))
@example(b"RIFF\x00\x00\x00")
@example(FLAC[:21] + b"\xff" + FLAC[22:])  # its header announces billions of samples
@example(PCM[:24] + b"\xff\xff\xff\x7f" + PCM[28:])  # at 2 GHz
@example(FLOAT[:-400] + np.full(100, 3.4e38, "<f4").tobytes())  # finite, but resampling overflows
@settings(FUZZ, max_examples=40)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, about sums beyond float32
def test_sounds_of_any_bytes(tmp_path, data):
    (tmp_path / "x.wav").write_bytes(data)
    try:
        wav = audio.read_wav(str(tmp_path / "x.wav"), 22050)
    except audio.AudioError as e:
        assert len(str(e).splitlines()) == 1
        return
    assert wav.ndim == 1 and len(wav) and wav.dtype == np.float32 and np.isfinite(wav).all()
