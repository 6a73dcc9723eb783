"""
python -m pytest tests/test_audio.py

Sound files, the log-mel against BigVGAN's own code, normalisation, and both vocoders on speech.
"""
import os
import struct

import bigvgan
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from ljspeech_parts import BIGVGAN, config_of
from test_common import full_disk

import audio
from common import UserError
from config import Config
from espeak import espeak_wav

CFG = Config()
RATE, HOP = CFG.sample_rate, CFG.hop_length
TEXT = "The old teacher found a red lamp behind the station."


def sine(rate=RATE, seconds=1.0, hertz=440.0, level=0.5):
    return (level * np.sin(2 * np.pi * hertz / rate * np.arange(int(rate * seconds)))).astype(np.float32)


def frequency(wav):
    """The frequency of the strongest component in Hz, exact to a fraction of a hertz for a pure tone of one second."""
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav)), n=8 * len(wav)))
    return spectrum.argmax() * RATE / (8 * len(wav))


# --- log-mel

@pytest.mark.parametrize("name", BIGVGAN)
@pytest.mark.parametrize("kind", ["noise", "sine", "silence", "clicks", "full scale", "speech"])
def test_log_mel_equals_that_of_bigvgan(kind, name):
    """By each published config.json, and by our config for it."""
    cfg, rng, clicks = config_of(name), np.random.default_rng(0), np.zeros(30_000, np.float32)
    clicks[rng.integers(0, len(clicks), 20)] = 1
    wav = {"noise": rng.normal(0, 0.1, 40_000).clip(-1, 1).astype(np.float32), "sine": sine(cfg.sample_rate), "clicks": clicks,
           "silence": np.zeros(20_000, np.float32), "full scale": np.sign(sine(cfg.sample_rate, level=1)),
           "speech": espeak_wav(TEXT, cfg.sample_rate)}[kind]
    mel, hparams = audio.log_mel(wav, cfg), bigvgan.env.AttrDict(BIGVGAN[name])
    original = bigvgan.meldataset.get_mel_spectrogram(torch.as_tensor(wav)[None], hparams)[0].T
    assert mel.dtype == torch.float32 and mel.is_contiguous() and mel.shape == (len(wav) // hparams.hop_size, hparams.num_mels)
    torch.testing.assert_close(mel, original, atol=1e-4, rtol=0)
    assert mel.min() >= np.float32(audio.LOG_MEL_FLOOR)
    # BigVGAN adds 1e-9 inside the square root. In the wide bands this lifts silence above the clamp, by less than 2.5.
    assert kind != "silence" or mel.max() < audio.LOG_MEL_FLOOR + 2.5


@given(st.integers(1, 3000), st.sampled_from([(1024, 256), (2048, 256), (1024, 128), (512, 256), (256, 256), (64, 16)]))
def test_log_mel_has_one_frame_per_hop(samples, sizes):
    n_fft, hop = sizes
    cfg = Config(n_fft=n_fft, win_length=n_fft, hop_length=hop, n_mels=8)
    mel = audio.log_mel(np.random.default_rng(samples).uniform(-1, 1, samples).astype(np.float32), cfg)
    assert mel.shape == (max(1, samples // hop), 8) and torch.isfinite(mel).all()


def test_log_mel_takes_arrays_tensors_and_lists_but_nothing_empty():
    wav = sine(seconds=0.1)
    expected = audio.log_mel(wav, CFG)
    for same in (torch.from_numpy(wav), wav.astype(np.float64), wav.tolist()):
        assert torch.equal(audio.log_mel(same, CFG), expected)
    for empty in (wav[:0], torch.zeros(0)):
        with pytest.raises(audio.AudioError, match="zero length"):
            audio.log_mel(empty, CFG)


@pytest.mark.parametrize("cfg", [CFG, Config(sample_rate=16000, n_fft=256, hop_length=64, win_length=256, n_mels=8)],
                         ids=["default", "small"])
def test_the_log_mel_range_holds_all_sounds_up_to_ten_times_full_scale(cfg):
    low, high = audio.log_mel_range(cfg)
    seconds, ones = np.arange(cfg.sample_rate) / cfg.sample_rate, np.ones(cfg.sample_rate)
    sounds = [np.sign(np.sin(2 * np.pi * f * seconds)) for f in (50, 437, 3000)]
    sounds += [np.random.default_rng(0).choice([-1.0, 1.0], cfg.sample_rate), 0 * ones, ones]
    mels = [audio.log_mel(10 * s.astype(np.float32), cfg).half() for s in sounds]
    assert min(m.min() for m in mels) == low and max(m.max() for m in mels) <= high
    assert any((audio.log_mel(32768 * s.astype(np.float32), cfg).half() > high).any() for s in sounds)


@given(st.lists(st.floats(-20, 5), min_size=1, max_size=20), st.floats(-10, 10), st.floats(0.1, 10))
def test_denormalise_is_the_inverse_of_normalise(values, mean, std):
    cfg = Config(mel_mean=mean, mel_std=std)
    mel, tensor = np.array(values), torch.tensor(values)
    np.testing.assert_allclose(audio.normalise(mel, cfg) * std + mean, mel, atol=1e-9)
    np.testing.assert_allclose(audio.denormalise(audio.normalise(mel, cfg), cfg), mel, atol=1e-9)
    torch.testing.assert_close(audio.denormalise(audio.normalise(tensor, cfg), cfg), tensor, atol=1e-4, rtol=1e-4)
    assert audio.normalise(tensor, cfg).dtype == torch.float32


# --- reading sound files

@pytest.mark.parametrize("name, subtype, tolerance", [
    ("x.wav", "PCM_U8", 1 / 64), ("x.wav", "PCM_16", 1e-3), ("x.wav", "PCM_24", 1e-3), ("x.wav", "PCM_32", 1e-3),
    ("x.wav", "FLOAT", 1e-3), ("x.wav", "DOUBLE", 1e-3), ("x.wav", "ULAW", 0.05), ("x.flac", "PCM_16", 1e-3),
    ("x.ogg", "VORBIS", 0.05)])
def test_read_wav_reads_every_format_rate_and_number_of_channels(tmp_path, name, subtype, tolerance):
    for rate in (8000, 22050, 44100, 48000):
        left = sine(rate)
        for channels in (left, np.stack([left, left], 1), np.stack([left, 0 * left], 1)):
            soundfile.write(tmp_path / name, channels, rate, subtype=subtype)
            wav = audio.read_wav(str(tmp_path / name), RATE)
            assert wav.dtype == np.float32 and wav.ndim == 1 and abs(len(wav) - RATE) <= 1
            level = 0.5 if channels is left or channels[:, 1].any() else 0.25  # the mean with one silent channel
            assert abs(frequency(wav) - 440) < 0.5
            middle = slice(2000, 20_000)  # away from the edges, where the resampler is less exact
            np.testing.assert_allclose(wav[middle], sine(level=level)[:RATE][middle], atol=tolerance)


@pytest.mark.parametrize("name", ["x.wav", "x.flac"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path, name):
    path = tmp_path / name
    soundfile.write(path, sine(seconds=0.2), RATE)
    whole = path.read_bytes()
    for cut in [*range(0, 60, 3), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with pytest.raises(audio.AudioError, match=f"(truncated|unreadable|zero length).* {path}"):
            audio.read_wav(str(path), RATE)
    path.write_bytes(whole + b"junk")  # bytes after the end do no harm
    assert len(audio.read_wav(str(path), RATE)) == RATE // 5


def test_files_that_are_no_sound_are_refused(tmp_path):
    for name, samples in (("nothing", []), ("nan", [0, np.nan]), ("inf", [np.inf, 0])):
        soundfile.write(tmp_path / f"{name}.wav", np.array(samples), RATE, subtype="FLOAT")
    for name, content in (("empty", b""), ("riff", b"RIFF"), ("text", b"This is no sound.\n" * 50)):
        (tmp_path / f"{name}.wav").write_bytes(content)
    (tmp_path / "folder.wav").mkdir()
    for name, reason in (("none", "missing file"), ("folder", "missing file"), ("empty", "unreadable"), ("riff", "unreadable"),
                         ("text", "unreadable"), ("nothing", "zero length"), ("nan", "not finite"), ("inf", "not finite")):
        path = str(tmp_path / f"{name}.wav")
        with pytest.raises(audio.AudioError, match=reason) as e:
            audio.read_wav(path, RATE)
        assert path in str(e.value) and "\n" not in str(e.value)


def test_resampling_keeps_the_length_in_seconds():
    for samples in (0, 1, 2, 3, 1001):
        assert abs(len(audio.resample(np.ones(samples, np.float32), 48000, RATE)) - samples * RATE / 48000) <= 1
    wav = sine()
    assert audio.resample(wav, RATE, RATE) is wav


# --- writing sound files

def write_in_parts(path, wav, rate):
    with audio.wav_stream(str(path), rate) as append:
        for start in range(0, len(wav), 1000):
            append(wav[start:start + 1000])


WRITERS = pytest.mark.parametrize("write", [audio.write_wav, write_in_parts])


@WRITERS
def test_what_is_written_is_read_back_clipped(tmp_path, write):
    wav = np.concatenate([[-5, -1.01, -1, 1 / 32767, 0, 1, 1.01, 5], np.random.default_rng(0).uniform(-1.2, 1.2, 5000)])
    write(tmp_path / "x.wav", sine(), RATE)
    write(tmp_path / "x.wav", wav, RATE)  # replaces a longer file
    np.testing.assert_allclose(audio.read_wav(str(tmp_path / "x.wav"), RATE), wav.clip(-1, 1), atol=1.5 / 32767)
    assert os.listdir(tmp_path) == ["x.wav"] and soundfile.info(tmp_path / "x.wav").subtype == "PCM_16"


@WRITERS
def test_a_wav_is_written_whole_or_not_at_all(tmp_path, write):
    path = tmp_path / "x.wav"
    write(path, sine(), RATE)
    before = path.read_bytes()
    with full_disk(3000), pytest.raises(UserError, match=f"cannot write {path}: File too large"):
        write(path, sine(), RATE)
    with pytest.raises(UserError, match=f"cannot write {path}: the samples are not finite"):
        write(path, np.append(sine(), np.nan), RATE)
    for bad in (tmp_path / "none" / "x.wav", path / "x.wav", tmp_path):  # in no folder, in a file, in place of a folder
        with pytest.raises(UserError, match=f"cannot write {bad}: "):
            write(bad, sine(), RATE)
    assert os.listdir(tmp_path) == ["x.wav"] and path.read_bytes() == before and not os.path.exists(f"{tmp_path}.tmp")


def test_a_wav_on_standard_output_announces_the_largest_length(tmp_path, capfdbinary):
    write_in_parts("-", sine(), RATE)
    streamed = capfdbinary.readouterr().out
    write_in_parts(tmp_path / "x.wav", sine(), RATE)
    expected = (tmp_path / "x.wav").read_bytes()
    assert streamed[44:] == expected[44:] and struct.unpack("<I", streamed[40:44])[0] == 2**32 - 1 - 36
    assert streamed[8:40] == expected[8:40]
