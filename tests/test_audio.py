"""
python -m pytest tests/test_audio.py

Sound files, BigVGAN's log-mel against the original, normalisation, and both vocoders on real speech.
"""
import json
import os
from pathlib import Path

import bigvgan
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
from config import Config, UserError

CFG = Config()
RATE, HOP = CFG.sample_rate, CFG.hop_length
TEXT = "The old teacher found a red lamp behind the station."


@pytest.fixture(scope="module")
def speech(demo_prepare):
    return demo_prepare.speak(TEXT, RATE)


def sine(rate=RATE, seconds=1.0, hertz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hertz / rate * np.arange(int(rate * seconds)))).astype(np.float32)


def frequency(wav, rate=RATE):
    """Of the strongest component, to a fraction of a hertz for a second of a pure tone."""
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), n=8 * len(wav)))
    return spectrum.argmax() * rate / (8 * len(wav))


def original_log_mel(wav):
    mel = bigvgan.meldataset.mel_spectrogram(torch.as_tensor(wav)[None], CFG.n_fft, CFG.n_mels, RATE, HOP, CFG.win_length,
                                             CFG.f_min, CFG.f_max, center=False)
    return mel[0].T


# --- log-mel

@pytest.mark.parametrize("kind", ["noise", "sine", "silence", "clicks", "full scale", "speech"])
def test_log_mel_is_the_original_one(kind, speech):
    rng = np.random.default_rng(0)
    clicks = np.zeros(30_000, np.float32)
    clicks[rng.integers(0, len(clicks), 20)] = 1
    wav = {"noise": rng.normal(0, 0.1, 40_000).clip(-1, 1).astype(np.float32), "sine": sine(), "clicks": clicks,
           "silence": np.zeros(20_000, np.float32), "full scale": np.sign(sine(level=1)), "speech": speech}[kind]
    mel = audio.log_mel(wav, CFG)
    assert mel.dtype == torch.float32 and mel.is_contiguous()
    torch.testing.assert_close(mel, original_log_mel(wav), atol=1e-4, rtol=0)
    assert mel.min() >= np.float32(audio.LOG_MEL_FLOOR)


def test_silence_is_the_floor():
    mel = audio.log_mel(np.zeros(5000, np.float32), CFG)
    # BigVGAN's 1e-9 inside the square root lifts silence above the clamp in the wide bands, by less than 2.5
    assert audio.LOG_MEL_FLOOR <= mel.min() and mel.max() < audio.LOG_MEL_FLOOR + 2.5


@given(st.integers(1, 20_000), st.integers(0, 9))
def test_log_mel_has_a_frame_a_hop(samples, seed):
    wav = np.random.default_rng(seed).uniform(-1, 1, samples).astype(np.float32)
    mel = audio.log_mel(wav, CFG)
    assert mel.shape == (max(1, samples // HOP), CFG.n_mels) and torch.isfinite(mel).all()


@given(st.integers(1, 3000), st.sampled_from([(2048, 256), (1024, 128), (512, 256), (256, 256), (64, 16)]))
def test_log_mel_has_a_frame_a_hop_whatever_the_window(samples, sizes):
    n_fft, hop = sizes
    cfg = Config(n_fft=n_fft, win_length=n_fft, hop_length=hop, n_mels=8)
    assert len(audio.log_mel(np.ones(samples, np.float32), cfg)) == max(1, samples // hop)


def test_log_mel_of_nothing_is_refused():
    for empty in (np.zeros(0, np.float32), torch.zeros(0)):
        with pytest.raises(audio.AudioError, match="zero length"):
            audio.log_mel(empty, CFG)


def test_log_mel_takes_arrays_tensors_and_lists_alike():
    wav = sine(seconds=0.1)
    expected = audio.log_mel(wav, CFG)
    for same in (torch.from_numpy(wav), wav.astype(np.float64), wav.tolist()):
        assert torch.equal(audio.log_mel(same, CFG), expected)


@given(st.lists(st.floats(-20, 5), min_size=1, max_size=20), st.floats(-10, 10), st.floats(0.1, 10))
def test_denormalise_undoes_normalise(values, mean, std):
    cfg = Config(mel_mean=mean, mel_std=std)
    mel = np.array(values)
    np.testing.assert_allclose(audio.denormalise(audio.normalise(mel, cfg), cfg), mel, atol=1e-9)
    np.testing.assert_allclose(audio.normalise(audio.denormalise(mel, cfg), cfg), mel, atol=1e-9)
    tensor = torch.tensor(values)
    torch.testing.assert_close(audio.denormalise(audio.normalise(tensor, cfg), cfg), tensor, atol=1e-4, rtol=1e-4)
    assert audio.normalise(tensor, cfg).dtype == torch.float32


# --- reading sound files

@pytest.mark.parametrize("subtype, tolerance", [("PCM_U8", 1 / 64), ("PCM_16", 1e-3), ("PCM_24", 1e-3), ("PCM_32", 1e-3),
                                                ("FLOAT", 1e-3), ("DOUBLE", 1e-3), ("ULAW", 0.05)])
@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
def test_read_wav_of_any_kind(tmp_path, subtype, tolerance, rate):
    left = sine(rate)
    for channels in (left, np.stack([left, left], 1), np.stack([left, 0 * left], 1)):
        soundfile.write(tmp_path / "x.wav", channels, rate, subtype=subtype)
        wav = audio.read_wav(str(tmp_path / "x.wav"), RATE)
        assert wav.dtype == np.float32 and wav.ndim == 1 and abs(len(wav) - RATE) <= 1
        level = 0.5 if channels is left or channels[:, 1].any() else 0.25  # one silent channel halves a mix
        assert abs(frequency(wav) - 440) < 0.5
        middle = slice(2000, 20_000)  # away from the resampler's edges
        np.testing.assert_allclose(wav[middle], sine(level=level)[:RATE][middle], atol=tolerance)


@pytest.mark.parametrize("name, options, tolerance", [("x.flac", {}, 1e-4), ("x.ogg", {"subtype": "VORBIS"}, 0.05)])
def test_other_formats(tmp_path, name, options, tolerance, speech):
    soundfile.write(tmp_path / name, speech, RATE, **options)
    wav = audio.read_wav(str(tmp_path / name), RATE)
    assert len(wav) == len(speech)
    assert np.abs(wav - speech).mean() < tolerance


def test_a_flac_cut_off_anywhere_is_refused(tmp_path):
    soundfile.write(tmp_path / "x.flac", sine(), RATE)
    content = (tmp_path / "x.flac").read_bytes()
    for cut in (0, 20, len(content) // 2, len(content) - 1):
        (tmp_path / "x.flac").write_bytes(content[:cut])
        with pytest.raises(audio.AudioError):
            audio.read_wav(str(tmp_path / "x.flac"), RATE)


def test_resampling_keeps_silence_and_odd_lengths():
    assert audio.resample(np.zeros(0, np.float32), 48000, RATE).shape == (0,)
    for samples in (1, 2, 3, 1001):
        assert abs(len(audio.resample(np.ones(samples, np.float32), 48000, RATE)) - samples * RATE / 48000) <= 1
    wav = sine()
    assert audio.resample(wav, RATE, RATE) is wav


@given(st.floats(0, 1, exclude_max=True))
def test_a_wav_cut_off_anywhere_is_refused(tmp_path_factory, fraction):
    path = tmp_path_factory.mktemp("cut") / "x.wav"
    audio.write_wav(path, sine(seconds=0.05), RATE)
    content = path.read_bytes()
    path.write_bytes(content[:int(fraction * len(content))])
    with pytest.raises(audio.AudioError, match="truncated|unreadable") as e:
        audio.read_wav(str(path), RATE)
    assert str(path) in str(e.value)


def test_bytes_behind_the_end_do_no_harm(tmp_path):
    path = tmp_path / "x.wav"
    audio.write_wav(path, sine(), RATE)
    path.write_bytes(path.read_bytes() + b"junk")
    assert len(audio.read_wav(str(path), RATE)) == RATE


def test_files_that_are_no_sound(tmp_path):
    def write(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    for name, bad in (("nan.wav", np.nan), ("inf.wav", np.inf)):
        wav = sine()
        wav[100] = bad
        soundfile.write(tmp_path / name, wav, RATE, subtype="FLOAT")
    (tmp_path / "folder.wav").mkdir()
    for path, reason in ((str(tmp_path / "none.wav"), "missing file"), (str(tmp_path / "folder.wav"), "missing file"),
                         (write("empty.wav", b""), "unreadable"), (write("riff.wav", b"RIFF"), "unreadable"),
                         (write("text.wav", b"This is no sound.\n" * 50), "unreadable"),
                         (str(tmp_path / "nothing.wav"), "zero length"),
                         (str(tmp_path / "nan.wav"), "not finite"), (str(tmp_path / "inf.wav"), "not finite")):
        with pytest.raises(audio.AudioError) as e:
            audio.read_wav(path, RATE)
        assert reason in str(e.value) and path in str(e.value) and "\n" not in str(e.value)


# --- writing them

@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=50))
def test_written_wavs_read_back(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("wav") / "x.wav"
    audio.write_wav(path, np.array(samples, np.float32), RATE)
    np.testing.assert_allclose(audio.read_wav(str(path), RATE), samples, atol=1 / 32767)
    assert os.listdir(path.parent) == ["x.wav"] and soundfile.info(path).subtype == "PCM_16"


def test_write_wav_clips(tmp_path):
    audio.write_wav(tmp_path / "x.wav", np.array([-5, -1.01, 0, 1.01, 5]), RATE)
    np.testing.assert_allclose(audio.read_wav(str(tmp_path / "x.wav"), RATE), [-1, -1, 0, 1, 1], atol=1 / 32767)


def test_write_wav_replaces_a_file_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x.wav"
    audio.write_wav(str(path), sine(), RATE)
    before = path.read_bytes()
    audio.write_wav(str(path), sine(seconds=0.5), RATE)
    assert len(path.read_bytes()) < len(before) and os.listdir(tmp_path) == ["x.wav"]
    for bad in (tmp_path / "none" / "x.wav", path / "x.wav", tmp_path):  # no such folder, a file for one, a folder
        with pytest.raises(UserError, match="cannot write") as e:
            audio.write_wav(str(bad), sine(), RATE)
        assert str(bad) in str(e.value)
    assert os.listdir(tmp_path) == ["x.wav"] and not os.path.exists(f"{tmp_path}.tmp")


# --- Griffin-Lim

def test_griffin_lim_speaks_what_it_is_given(speech):
    mel = audio.log_mel(speech, CFG)
    wav = audio.griffin_lim(mel, CFG)
    assert wav.dtype == np.float32 and wav.shape == (len(mel) * HOP,) and np.isfinite(wav).all()
    assert np.array_equal(wav, audio.griffin_lim(mel, CFG))
    copy = audio.log_mel(wav, CFG)
    # Measured on six sentences: 0.13 to 0.18, correlation 0.977 to 0.993; a shift by one frame costs 0.5 to 0.6.
    assert (copy - mel).abs().mean() < 0.25
    assert np.corrcoef(copy.numpy().ravel(), mel.numpy().ravel())[0, 1] > 0.97
    # In time too, not only in spectrum: the loudness of copy and original rises and falls together, to half a hop.
    energy = [np.convolve(x[:len(wav)] ** 2, np.ones(HOP), "same") for x in (wav, speech)]
    lags = range(-HOP, HOP + 1, HOP // 4)
    best = max(lags, key=lambda lag: np.corrcoef(np.roll(energy[0], lag), energy[1][:len(wav)])[0, 1])
    assert abs(best) <= HOP // 2


@given(st.integers(1, 5), st.floats(audio.LOG_MEL_FLOOR, 2))
@settings(max_examples=10)
def test_griffin_lim_of_a_few_frames(frames, level):
    wav = audio.griffin_lim(torch.full((frames, CFG.n_mels), level), CFG)
    assert wav.shape == (frames * HOP,) and np.isfinite(wav).all()


def test_vocoder_by_name():
    assert audio.vocoder_kind("auto", "cpu") == "griffinlim" and audio.vocoder_kind("auto", "cuda:0") == "bigvgan"
    assert audio.vocoder_kind("bigvgan", "cpu") == "bigvgan" and audio.vocoder_kind("griffinlim", "cuda") == "griffinlim"
    mel = audio.log_mel(sine(seconds=0.2), CFG)
    vocode = audio.load_vocoder("auto", "/no/such/folder", "cpu", CFG)
    assert np.array_equal(vocode(mel), audio.griffin_lim(mel, CFG))


# --- BigVGAN

HPARAMS = {"sampling_rate": 22050, "n_fft": 1024, "hop_size": 256, "win_size": 1024, "num_mels": 80, "fmin": 0, "fmax": 8000,
           "resblock": "1", "upsample_rates": [16, 16], "upsample_kernel_sizes": [32, 32], "upsample_initial_channel": 16,
           "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]], "activation": "snakebeta",
           "snake_logscale": True, "use_tanh_at_final": False, "use_bias_at_final": False}


def small_bigvgan():
    """A random generator whose output is not tiny, and what it says to a random mel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        generator = bigvgan.BigVGAN(bigvgan.env.AttrDict(HPARAMS)).eval()
        for name, p in generator.named_parameters():
            if name.endswith("weight_g"):  # weight norm's magnitudes
                p.data.mul_(20)
        mel = torch.randn(7, CFG.n_mels)
    with torch.inference_mode():
        return generator, mel, generator(mel.T[None])[0, 0].numpy()


def save_bigvgan(folder, state, hparams=HPARAMS):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(hparams if isinstance(hparams, str) else json.dumps(hparams))
    if isinstance(state, bytes):
        (folder / "bigvgan_generator.pt").write_bytes(state)
    elif state is not None:
        torch.save(state, folder / "bigvgan_generator.pt")
    return str(folder)


def test_bigvgan_from_a_folder_says_what_the_generator_says(tmp_path):
    generator, mel, expected = small_bigvgan()
    assert expected.shape == (7 * HOP,) and np.abs(expected).max() > 0.01
    with_norm = save_bigvgan(tmp_path / "with", {"generator": generator.state_dict()})
    generator.remove_weight_norm()
    without = save_bigvgan(tmp_path / "without", {"generator": generator.state_dict()})
    for folder in (with_norm, without):
        wav = audio.load_vocoder("bigvgan", folder, "cpu", CFG)(mel)
        assert wav.dtype == np.float32
        np.testing.assert_allclose(wav, expected, atol=1e-5)


def test_bigvgan_that_is_missing():
    for model in ("/no/such/folder", "nobody/nothing", ""):
        with pytest.raises(UserError, match="griffinlim"):
            audio.load_bigvgan(model, "cpu", CFG)


def test_bigvgan_folder_with_a_file_missing(tmp_path):
    folder = save_bigvgan(tmp_path / "a", None)
    with pytest.raises(UserError, match="has no bigvgan_generator.pt"):
        audio.load_bigvgan(folder, "cpu", CFG)
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "bigvgan_generator.pt")
    with pytest.raises(UserError, match="has no config.json"):
        audio.load_bigvgan(folder, "cpu", CFG)


@pytest.mark.parametrize("key, value, field", [
    ("sampling_rate", 24000, "sample_rate"), ("n_fft", 2048, "n_fft"), ("hop_size", 128, "hop_length"),
    ("fmin", 40, "f_min"), ("win_size", 512, "win_length"), ("num_mels", 100, "n_mels"),
    ("fmax", 11025, "f_max"), ("fmax", None, "f_max")])
def test_bigvgan_of_another_log_mel(tmp_path, key, value, field):
    folder = save_bigvgan(tmp_path / "other", b"", HPARAMS | {key: value})
    with pytest.raises(UserError) as e:
        audio.load_bigvgan(folder, "cpu", CFG)
    assert f"{field} {value or 11025.0} (config: {getattr(CFG, field)})" in str(e.value)
    assert str(e.value).count("(config: ") == 1


def test_bigvgan_with_garbage_for_weights(tmp_path):
    state = small_bigvgan()[0].state_dict()
    whole = Path(save_bigvgan(tmp_path / "whole", {"generator": state})) / "bigvgan_generator.pt"
    short = dict(list(state.items())[:-3])
    reshaped = state | {"conv_pre.bias": torch.zeros(3)}
    for garbage in (b"", b"garbage", b"PK\x03\x04", whole.read_bytes()[:5000], {}, {"generator": None}, {"generator": short},
                    {"generator": reshaped}, [1, 2], {"discriminator": state}):
        with pytest.raises(UserError, match="does not hold") as e:
            audio.load_bigvgan(save_bigvgan(tmp_path / "bad", garbage), "cpu", CFG)
        assert str(tmp_path / "bad") in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("hparams", ["", "not json", "[1]", "{}", "42", json.dumps({**HPARAMS, "resblock": "3"}),
                                     json.dumps({k: v for k, v in HPARAMS.items() if k != "upsample_rates"})],
                         ids=["empty", "text", "list", "no keys", "number", "unknown block", "no rates"])
def test_bigvgan_with_a_garbage_config(tmp_path, hparams):
    folder = save_bigvgan(tmp_path / "bad", {"generator": {}}, hparams)
    with pytest.raises(UserError, match="config.json"):
        audio.load_bigvgan(folder, "cpu", CFG)


# --- the command

def test_command_copies_a_file(tmp_path, capsys, speech):
    audio.write_wav(tmp_path / "in.wav", speech, RATE)
    audio.main([str(tmp_path / "in.wav"), "--out", str(tmp_path / "copy.wav"), "--vocoder", "griffinlim"])
    assert "copy.wav" in capsys.readouterr().out
    copy = audio.read_wav(str(tmp_path / "copy.wav"), RATE)
    assert len(copy) == len(speech) // HOP * HOP
    with pytest.raises(UserError, match="missing file"):
        audio.main([str(tmp_path / "none.wav"), "--out", str(tmp_path / "x.wav")])
