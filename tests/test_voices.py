"""The voice in the box: small enough, whole, and it speaks without any other file."""
import json
import shutil

import numpy as np
import soundfile
from test_house import ROOT

import vocoder
from checkpoint import load_checkpoint
from sample import VOICE
from sample import main as sample_main

FOLDER = ROOT / "voices" / "joe"


def test_the_voice_is_complete_and_small():
    assert str(FOLDER) == VOICE
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert files.keys() == {"model.safetensors", "config.yaml", "corpus.json", "vocoder.safetensors", "README.md"}
    assert sum(files.values()) <= 16e6
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(word in card for word in ("CC0", "WordNet", "WER", "configs/demo.yaml"))
    for name in ("config.yaml", "vocoder.safetensors"):  # no paths of the machine that made them
        data = (FOLDER / name).read_bytes()
        assert b"/root" not in data and b"/work" not in data and b"/home" not in data


def test_the_voice_speaks_at_once(tmp_path, monkeypatch, capsys):
    model, ckpt = load_checkpoint(VOICE, "cpu")
    assert vocoder.vocoder_kind(model.cfg, "cpu") == "learned" and json.loads((FOLDER / "corpus.json").read_text())["step"] > 0
    monkeypatch.chdir(tmp_path)
    sample_main(["--text", "Hi, how are you?", "--out", "hi.wav", "--device", "cpu"])
    wav, rate = soundfile.read("hi.wav")
    assert rate == 22050 and 0.5 < len(wav) / rate < 3 and np.abs(wav).max() > 0.05
    # a copy of the folder is all that it needs
    shutil.copytree(VOICE, tmp_path / "mine")
    sample_main(["--ckpt", "mine", "--text", "Hi, how are you?", "--out", "copy.wav", "--device", "cpu"])
    assert np.array_equal(soundfile.read("copy.wav")[0], wav)
