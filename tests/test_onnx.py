"""
python -m pytest tests/test_onnx.py

A voice as ONNX: its graphs compute what torch computes, and its script speaks without torch.
"""
import dataclasses
import subprocess
import sys

import numpy as np
import onnx
import pytest
import soundfile
import torch
from test_house import ROOT
from test_model import BASELINE, small_model

import onnx_export
import sample
import speak_onnx
import vocoder
from common import UserError
from eval import bench_onnx

pytestmark = pytest.mark.slow  # the exporter takes seconds
NAMES = ["text", "decoder", "vocoder"]
LINES = (ROOT / "eval" / "prompts.txt").read_text(encoding="utf-8").splitlines()[:50]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model that predicts the mel, in whose folder lies a learned vocoder with random weights."""
    model = small_model(patch=2, layers=1, block_size=256, out_dir=str(tmp_path_factory.mktemp("run"))).eval()
    assert model.cfg.predicts == "mel" and model.cfg.alignment_search
    torch.manual_seed(0)
    net = vocoder.SourceFilter(model.cfg, 16, 2)
    torch.nn.init.normal_(net.to_pitch.out.weight)
    net.to_pitch.out.weight.data[-1] *= 30  # about half of the frames are unvoiced
    torch.nn.init.normal_(net.to_magnitudes.out.weight, std=0.1)
    vocoder.save_learned(net, f"{model.cfg.out_dir}/{vocoder.LEARNED}")
    return model


@pytest.fixture(scope="module")
def checkpoint(model):
    path = f"{model.cfg.out_dir}/latest.pt"
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg),
                "characters": "abcdefghijklmnopqrstuvwxyzHW ?."}, path)
    return path


@pytest.fixture(scope="module")
def folder(checkpoint):
    """The folder that the command line writes."""
    folder = checkpoint.replace("latest.pt", "onnx")
    sample.main(["--ckpt", checkpoint, "--export", folder, "--onnx"])
    return folder


@pytest.fixture(scope="module")
def voice(folder):
    return speak_onnx.load_voice(folder)


@pytest.fixture
def script_noise(monkeypatch):
    """torch's sampler starts from the script's noise."""
    monkeypatch.setattr(sample, "text_noise", bench_onnx.script_noise)


def run(session, inputs):
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


@pytest.mark.parametrize("name", NAMES)
def test_the_graphs_are_valid_and_name_their_inputs_and_no_path_of_this_machine(folder, voice, name):
    path = f"{folder}/{name}.onnx"
    onnx.checker.check_model(path, full_check=True)
    readme = open(f"{folder}/README.md", encoding="utf-8").read()
    for value in voice[name].get_inputs() + voice[name].get_outputs():
        assert f"`{value.name}`" in readme and value.shape[0] == "batch"
    assert not any(part in open(path, "rb").read() for part in (str(ROOT).encode(), b"site-packages", b".py"))


@pytest.mark.parametrize("cfg_scale", [1.0, 1.5])
def test_fifty_texts_have_the_log_mels_of_torch(model, voice, script_noise, cfg_scale):
    options = dict(steps=2, cfg_scale=cfg_scale, temperature=0.4, seed=3, speed=4.0)  # so fast that none is cut
    of_torch = sample.sample(model, LINES, **options)
    assert len({len(mel) for mel in of_torch}) > 20  # many lengths, odd and even
    for text, mel in zip(LINES, of_torch):
        of_onnx, = speak_onnx.sample(voice, text, **options)
        assert of_onnx.shape == (1, *mel.shape) and of_onnx.dtype == np.float32
        assert np.abs(of_onnx[0] - mel.numpy()).max() < 1e-3


def decoder_inputs(model, token_lengths, mel_lengths):
    B, L, T, D = len(token_lengths), max(token_lengths), max(mel_lengths), model.cfg.width
    torch.manual_seed(B)
    token_lengths, mel_lengths = torch.tensor(token_lengths), torch.tensor(mel_lengths)
    share = torch.rand(B, L).masked_fill(torch.arange(L) >= token_lengths[:, None], 0)
    return {"x": torch.randn(B, T, model.cfg.n_mels), "t": torch.linspace(0.2, 1, B), "text": torch.randn(B, L, D),
            "share": share / share.sum(1, keepdim=True), "mel_lengths": mel_lengths, "token_lengths": token_lengths,
            "no_text": torch.arange(B) % 2 == 1}


SIZES = [([1], [1]), ([9], [33]), ([40, 3], [20, 64]), ([2, 17, 30, 5, 1], [100, 99, 3, 41, 2])]


def assert_decoder_equals_torch(model, session):
    for sizes in SIZES:
        inputs = decoder_inputs(model, *sizes)
        with torch.no_grad():
            velocity = onnx_export.velocity(model, **inputs)
        np.testing.assert_allclose(run(session, inputs)[0], velocity, atol=1e-4)


def test_the_decoder_takes_any_batch_and_lengths(model, voice):
    assert_decoder_equals_torch(model, voice["decoder"])


def test_a_decoder_without_alignment_that_predicts_velocity(model, tmp_path):
    model = small_model(**(BASELINE | {"layers": 1, "out_dir": model.cfg.out_dir})).eval()
    assert model.cfg.predicts == "velocity" and not model.cfg.alignment_search
    onnx_export.write_graph(tmp_path / "decoder.onnx", *onnx_export.graphs(model)["decoder"])
    assert_decoder_equals_torch(model, speak_onnx.onnxruntime.InferenceSession(tmp_path / "decoder.onnx"))


def test_a_batch_has_the_features_of_its_texts_and_their_durations(model, voice):
    tokens, lengths = torch.randint(3, 259, (3, 40)), torch.tensor([40, 1, 23])
    with torch.no_grad():
        expected = onnx_export.read_text(model, tokens, lengths)
    for value, of_torch in zip(run(voice["text"], {"tokens": tokens, "token_lengths": lengths}), expected):
        np.testing.assert_allclose(value, of_torch, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 9), (1, 200)])
def test_the_sound_is_that_of_the_learned_vocoder(model, voice, sizes):
    net = vocoder.load_learned(vocoder.find_learned(model.cfg), "cpu", model.cfg)
    torch.manual_seed(1)
    log_mel = torch.randn(*sizes, 80) - 5
    _, voiced = net.pitch(log_mel)
    assert sizes[1] == 1 or 0.1 < voiced.float().mean() < 0.9
    wav, = run(voice["vocoder"], {"log_mel": log_mel})
    assert wav.shape == (sizes[0], sizes[1] * model.cfg.hop_length) and wav.dtype == np.float32
    of_torch = net(log_mel).numpy()  # the rounding of the pitch adds up over the pulses, and this one jumps in every frame
    assert np.linalg.norm(wav - of_torch) < 0.01 * np.linalg.norm(of_torch)


def test_the_script_speaks_without_torch_and_warns_of_digits(folder, tmp_path):
    command = "import runpy, sys; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    wavs = []
    for text, seed in (("Hello there. Who are you?", "0"), ("Hello  there. Who are you?", "0"), ("Hello 7.", "1")):
        flags = ["--text", text, "--out", "x.wav", "--seed", seed, "--steps", "2"]
        result = subprocess.run([sys.executable, "-c", command, f"{folder}/speak_onnx.py", *flags], cwd=tmp_path, check=True,
                                capture_output=True, text=True)
        assert ("may say anything there: 7\n" in result.stderr) == ("7" in text)
        wav, rate = soundfile.read(tmp_path / "x.wav")
        assert rate == 22050 and len(wav) > 0.3 * rate and np.abs(wav).max() > 0
        wavs.append(wav)
    assert np.array_equal(wavs[0], wavs[1])
    empty = subprocess.run([sys.executable, f"{folder}/speak_onnx.py", "--text", " ", "--out", "empty.wav"], cwd=tmp_path,
                           capture_output=True, text=True)
    assert empty.returncode == 2 and "--text is empty; expected some words" in empty.stderr
    assert not (tmp_path / "empty.wav").exists()


def test_a_long_text_is_cut_at_spaces_into_parts_that_fit(voice):
    options = dict(steps=1, cfg_scale=1.0, temperature=0.4, seed=0, speed=1.0)
    mels = speak_onnx.sample(voice, " ".join(LINES[:6]), **options)
    assert len(mels) > 1 and all(mel.shape[1] <= voice["most_frames"] for mel in mels)
    assert [mel.shape[1] > voice["most_frames"] for mel in speak_onnx.sample(voice, 400 * "a", **options)] == [True]


def test_the_bench_compares_torch_onnx_and_int8(checkpoint, folder, tmp_path, capsys):
    (tmp_path / "lines.txt").write_text("Who are you?\nHello.\n")
    bench_onnx.main(["--ckpt", checkpoint, "--onnx", folder, "--eval_judge", "none", "--eval_prompts", str(tmp_path / "lines.txt"),
                     "--eval_steps", "1", "--dtype", "bfloat16", "--out_dir", str(tmp_path)])
    assert sample.text_noise is not bench_onnx.script_noise  # only while the bench speaks
    lines = capsys.readouterr().out.splitlines()
    difference, = (line for line in lines if "largest difference" in line)
    assert float(difference.split("median line ")[1]) < 1e-3  # a voice in bfloat16 is compared in float32 too
    assert [line.split(" |")[0] for line in lines[-3:]] == ["| torch", "| onnx", "| int8"]
    assert all(len(list((tmp_path / name).glob("*.wav"))) == 2 for name in ("torch", "onnx", "int8"))


@pytest.mark.parametrize("flags", [["--onnx", "nowhere"], ["--threads", "0"]])
def test_the_bench_refuses_what_it_cannot_compare(folder, flags):
    with pytest.raises(UserError, match="expected one thread or more, and a folder that sample.py --export --onnx wrote"):
        bench_onnx.main(["--onnx", folder, *flags])


def test_what_cannot_be_exported_is_refused(model, folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        onnx_export.export_onnx(model, 0, folder)
    with pytest.raises(UserError, match="expected --export DIR --onnx"):
        sample.main(["--text", "Hello.", "--out", "x.wav", "--onnx"])
    with pytest.raises(UserError, match=r"needs the voice's learned vocoder, .*make it with train_vocoder.py --ckpt"):
        onnx_export.export_onnx(small_model(), 0, str(tmp_path / "x"))
    other = small_model()
    other.tokenise = lambda text: [1]
    with pytest.raises(UserError, match="expected one that reads bytes"):
        onnx_export.export_onnx(other, 0, str(tmp_path / "x"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r'not installed \(onnxscript\): pip install "onnxscript'):
        onnx_export.export_onnx(model, 0, str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    def full(path, *_):
        path.write_bytes(b"a part")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(onnx_export, "write_graph", full)
    with pytest.raises(UserError, match="No space left"):
        onnx_export.export_onnx(model, 0, str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())
