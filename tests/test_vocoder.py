"""
python -m pytest tests/test_vocoder.py

Griffin-Lim, BigVGAN and the learned vocoder on real speech.
"""
import json
from pathlib import Path

import bigvgan
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ljspeech_parts import BIGVGAN, config_of
from ljspeech_parts import save_bigvgan as save_small_bigvgan
from test_audio import TEXT, sine

import audio
import vocoder
from common import UserError
from config import AUDIO_FIELDS, Config
from espeak import espeak_wav
from pitch import pitch

CFG = Config()
HOP = CFG.hop_length


@pytest.fixture(scope="module")
def speech():
    return espeak_wav(TEXT, CFG.sample_rate)


# --- Griffin-Lim

@pytest.mark.parametrize("name", BIGVGAN)
def test_griffin_lim_gives_the_speech_of_its_log_mel(name):
    cfg = config_of(name)
    hop, speech = cfg.hop_length, espeak_wav(TEXT, cfg.sample_rate)
    mel = audio.log_mel(speech, cfg)
    wav = vocoder.griffin_lim(mel, cfg)
    assert wav.dtype == np.float32 and wav.shape == (len(mel) * hop,) and np.isfinite(wav).all()
    assert np.array_equal(wav, vocoder.griffin_lim(mel, cfg))
    copy = audio.log_mel(wav, cfg)
    # Measured on six sentences: differences of 0.13 to 0.18, correlations of 0.977 to 0.993. A shift by one frame gives 0.5.
    assert (copy - mel).abs().mean() < 0.25
    assert np.corrcoef(copy.numpy().ravel(), mel.numpy().ravel())[0, 1] > 0.97
    # The loudness of the copy follows that of the original within half a hop.
    energy = [np.convolve(x[:len(wav)] ** 2, np.ones(hop), "same") for x in (wav, speech)]
    lags = range(-hop, hop + 1, hop // 4)
    best = max(lags, key=lambda lag: np.corrcoef(np.roll(energy[0], lag), energy[1][:len(wav)])[0, 1])
    assert abs(best) <= hop // 2


@given(st.integers(1, 5), st.floats(audio.LOG_MEL_FLOOR, 2))
@settings(max_examples=6)
def test_griffin_lim_takes_a_few_frames(frames, level):
    wav = vocoder.griffin_lim(torch.full((frames, CFG.n_mels), level), CFG)
    assert wav.shape == (frames * HOP,) and np.isfinite(wav).all()


def test_the_vocoder_auto_depends_on_the_device_and_on_what_lies_there(tmp_path):
    cfg = Config(out_dir=str(tmp_path / "run"), data_dir=str(tmp_path / "corpus"))
    kind = vocoder.vocoder_kind
    assert kind(cfg, "cpu") == "griffinlim" and kind(cfg, "cuda:0") == "bigvgan"
    mel = audio.log_mel(sine(seconds=0.2), CFG)
    assert np.array_equal(vocoder.load_vocoder(cfg, "cpu")(mel), vocoder.griffin_lim(mel, CFG))
    for folder in ("corpus", "run"):  # the run's own comes first
        (tmp_path / folder).mkdir()
        (tmp_path / folder / vocoder.LEARNED).touch()
        assert kind(cfg, "cpu") == "learned" and kind(cfg, "cuda") == ("bigvgan" if folder == "corpus" else "learned")
        assert vocoder.find_learned(cfg) == tmp_path / folder / vocoder.LEARNED
    for name in ("bigvgan", "griffinlim", "learned"):
        cfg.eval_vocoder = name
        assert kind(cfg, "cpu") == kind(cfg, "cuda") == name


# --- BigVGAN

HPARAMS = {"sampling_rate": 22050, "n_fft": 1024, "hop_size": 256, "win_size": 1024, "num_mels": 80, "fmin": 0, "fmax": 8000,
           "resblock": "1", "upsample_rates": [16, 16], "upsample_kernel_sizes": [32, 32], "upsample_initial_channel": 16,
           "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]], "activation": "snakebeta",
           "snake_logscale": True, "use_tanh_at_final": False, "use_bias_at_final": False}


def small_bigvgan():
    """A random generator whose output is not tiny, a random log-mel, and the generator's output for it."""
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


def test_bigvgan_from_a_folder_gives_the_generators_output(tmp_path):
    generator, mel, expected = small_bigvgan()
    assert expected.shape == (7 * HOP,) and np.abs(expected).max() > 0.01
    with_norm = save_bigvgan(tmp_path / "with", {"generator": generator.state_dict()})
    generator.remove_weight_norm()
    without = save_bigvgan(tmp_path / "without", {"generator": generator.state_dict()})
    for folder in (with_norm, without):
        wav = vocoder.load_vocoder(Config(eval_vocoder="bigvgan", eval_vocoder_model=folder), "cpu")(mel)
        assert wav.dtype == np.float32
        np.testing.assert_allclose(wav, expected, atol=1e-5)


@pytest.mark.parametrize("name", BIGVGAN)
def test_each_published_bigvgan_loads_by_our_config_for_it_and_by_no_other(tmp_path, name):
    """Small random weights with the published config.json. One message names all fields that differ."""
    folder = save_small_bigvgan(tmp_path / "weights", name)
    for other in BIGVGAN:
        cfg = config_of(other, eval_vocoder="bigvgan", eval_vocoder_model=folder)
        if other == name:
            mel = audio.log_mel(espeak_wav(TEXT, cfg.sample_rate), cfg)
            wav = vocoder.load_vocoder(cfg, "cpu")(mel[:40])
            assert wav.dtype == np.float32 and wav.shape == (40 * cfg.hop_length,) and np.isfinite(wav).all() and np.ptp(wav) > 0.1
            continue
        with pytest.raises(UserError) as e:
            vocoder.load_vocoder(cfg, "cpu")
        theirs, message = config_of(name), str(e.value)
        wrong = [k for k in AUDIO_FIELDS if getattr(theirs, k) != getattr(cfg, k)]
        assert len(wrong) >= 3 and message.count("(config: ") == len(wrong) and "eval_vocoder_model" in message
        for k in wrong:
            assert f"{k} {getattr(theirs, k):g}" in message and f" (config: {getattr(cfg, k)})" in message


def test_a_missing_bigvgan_is_refused(tmp_path):
    for model in ("/no/such/folder", "nobody/nothing", ""):
        with pytest.raises(UserError, match="griffinlim"):
            vocoder.load_bigvgan(model, "cpu", CFG)
    folder = save_bigvgan(tmp_path / "a", None)
    with pytest.raises(UserError, match="has no bigvgan_generator.pt"):
        vocoder.load_bigvgan(folder, "cpu", CFG)
    (tmp_path / "a" / "config.json").rename(tmp_path / "a" / "bigvgan_generator.pt")
    with pytest.raises(UserError, match="has no config.json"):
        vocoder.load_bigvgan(folder, "cpu", CFG)


@pytest.mark.parametrize("key, value, field", [
    ("sampling_rate", 24000, "sample_rate"), ("n_fft", 2048, "n_fft"), ("hop_size", 128, "hop_length"),
    ("fmin", 40, "f_min"), ("win_size", 512, "win_length"), ("num_mels", 100, "n_mels"),
    ("fmax", 11025, "f_max"), ("fmax", None, "f_max")])
def test_a_bigvgan_of_another_log_mel_is_refused(tmp_path, key, value, field):
    folder = save_bigvgan(tmp_path / "other", b"", HPARAMS | {key: value})
    with pytest.raises(UserError) as e:
        vocoder.load_bigvgan(folder, "cpu", CFG)
    assert f"{field} {value or 11025.0} (config: {getattr(CFG, field)})" in str(e.value)
    assert str(e.value).count("(config: ") == 1


def test_damaged_weights_of_bigvgan_are_refused(tmp_path):
    state = small_bigvgan()[0].state_dict()
    whole = Path(save_bigvgan(tmp_path / "whole", {"generator": state})) / "bigvgan_generator.pt"
    short, reshaped = dict(list(state.items())[:-3]), state | {"conv_pre.bias": torch.zeros(3)}
    for damaged in (b"", b"garbage", b"PK\x03\x04", whole.read_bytes()[:5000], {}, {"generator": None}, {"generator": short},
                    {"generator": reshaped}, [1, 2], {"discriminator": state}):
        with pytest.raises(UserError, match="does not hold") as e:
            vocoder.load_bigvgan(save_bigvgan(tmp_path / "bad", damaged), "cpu", CFG)
        assert str(tmp_path / "bad") in str(e.value) and "\n" not in str(e.value)


def test_a_damaged_config_of_bigvgan_is_refused(tmp_path):
    for hparams in ("", "not json", "[1]", "{}", "42", json.dumps({**HPARAMS, "resblock": "3"}),
                    json.dumps({k: v for k, v in HPARAMS.items() if k != "upsample_rates"})):
        with pytest.raises(UserError, match="config.json"):
            vocoder.load_bigvgan(save_bigvgan(tmp_path / "bad", {"generator": {}}, hparams), "cpu", CFG)


# --- the learned vocoder

def random_net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = vocoder.SourceFilter(CFG, 16, 2)
        for part in (net.to_pitch, net.to_magnitudes):
            torch.nn.init.normal_(part.out.weight, std=0.05)
    return net


def knowing(f0: torch.Tensor, cfg: Config) -> vocoder.SourceFilter:
    """An untrained network that is told the pitch (T,), 0 where there is none. Its magnitudes are the pseudo-inverse."""
    net = vocoder.SourceFilter(cfg, 16, 2).requires_grad_(False)
    net.pitch = lambda log_mel: (f0.clamp(min=60)[None], f0[None] > 0)
    return net


def test_an_untrained_network_is_the_pseudo_inverse(speech):
    mel, net = audio.log_mel(speech, CFG), vocoder.SourceFilter(CFG, 16, 2)
    made = net.log_magnitudes(mel[None], torch.full((1, len(mel)), 100.0), torch.ones(1, len(mel), dtype=torch.bool))[0].exp()
    torch.testing.assert_close(made, vocoder.pseudo_inverse(mel, CFG).clamp(min=vocoder.QUIET))


@given(st.integers(1, 12), st.sampled_from([(1024, 256, 1024), (1024, 300, 900), (512, 128, 401), (2048, 512, 2048)]))
@settings(max_examples=12)
def test_frames_and_overlap_add_give_a_sound_back(frames, sizes):
    net = vocoder.SourceFilter(Config(**dict(zip(("n_fft", "hop_length", "win_length"), sizes))), 8, 2)
    wav = torch.randn(2, frames * sizes[1])
    weight = net.overlap_add((net.window ** 2).expand(1, frames, -1))
    torch.testing.assert_close(net.overlap_add(net.frames(wav) * net.window) / weight, wav, rtol=1e-4, atol=1e-4)


def test_the_frames_lie_where_those_of_the_log_mel_lie(speech):
    wav = torch.from_numpy(speech)[:len(speech) // HOP * HOP]
    spectra = torch.fft.rfft(vocoder.SourceFilter(CFG, 8, 2).frames(wav[None]))[0].abs()
    magnitudes = audio.magnitudes(wav.numpy(), CFG).T
    torch.testing.assert_close(spectra[2:-2], magnitudes[2:-2], rtol=1e-3, atol=1e-3)  # log_mel reflects the ends


@given(st.floats(60, 500), st.integers(8, 40))
@settings(max_examples=20)
def test_the_pulses_lie_a_period_apart_between_samples_too(hertz, frames):
    pulses = vocoder.SourceFilter(CFG, 8, 2).source(torch.full((1, frames), hertz))[0]
    at = torch.nonzero(pulses)[:, 0]
    first = torch.cat([torch.ones(1, dtype=torch.bool), at.diff() > 1])  # of a pulse's two samples
    groups = first.cumsum(0) - 1
    weight = torch.zeros(int(groups.max()) + 1).index_add(0, groups, pulses[at])
    place = torch.zeros(len(weight)).index_add(0, groups, pulses[at] * at) / weight
    torch.testing.assert_close(weight, torch.ones_like(weight), rtol=0, atol=1e-3)
    torch.testing.assert_close(place.diff(), torch.full((len(place) - 1,), CFG.sample_rate / hertz), rtol=0, atol=0.05)
    assert abs(pulses.sum() - frames * HOP * hertz / CFG.sample_rate) <= 1


@pytest.mark.slow  # librosa loads slowly
@pytest.mark.parametrize("name", ["", "bigvgan44k"])
def test_speech_has_the_pitch_and_the_log_mel_that_it_was_made_from(name):
    cfg = config_of(name) if name else CFG
    wav = espeak_wav(TEXT, cfg.sample_rate)
    mel, f0 = audio.log_mel(wav, cfg), np.nan_to_num(pitch(wav, cfg))
    made = knowing(torch.from_numpy(f0).float(), cfg)(mel[None])[0].numpy()
    assert made.shape == (len(mel) * cfg.hop_length,) and made.dtype == np.float32
    again = np.nan_to_num(pitch(made, cfg))
    both = (f0 > 0) & (again > 0)
    assert both.mean() > 0.8 * (f0 > 0).mean() and np.median(np.abs(np.log2(again[both] / f0[both]))) < 0.01
    copy = audio.log_mel(made, cfg)
    errors = {lag: (copy[5 + lag:len(mel) - 5 + lag] - mel[5:-5]).abs().mean().item() for lag in (-1, 0, 1)}
    assert errors[0] < 0.45 and errors[0] < 0.8 * min(errors[-1], errors[1])


@given(st.integers(1, 5), st.floats(audio.LOG_MEL_FLOOR, 2), st.sampled_from([-1e3, 0.0, 1e3]))
@settings(max_examples=12)
def test_the_learned_vocoder_takes_a_few_frames_however_sure_it_is(frames, level, bias):
    """With a sure unvoiced the pitch was 0 / 0, and all that followed was silent or broken."""
    net = random_net()
    net.to_pitch.out.bias.data[-1] = bias
    log_mel = torch.full((1, frames, CFG.n_mels), level)
    with torch.no_grad():
        f0, voiced = net.pitch(log_mel)
        wav = net(log_mel)
    assert wav.shape == (1, frames * HOP) and wav.isfinite().all()
    assert ((59 < f0) & (f0 < 510)).all() and (bias == 0 or (voiced == (bias < 0)).all())


def test_a_learned_vocoder_is_saved_in_half_precision_and_gives_the_same_sound(tmp_path, speech):
    mel, net = audio.log_mel(speech, CFG), random_net().eval()
    cfg = Config(out_dir=str(tmp_path))
    vocoder.save_learned(net, tmp_path / vocoder.LEARNED, recordings=3)
    assert (tmp_path / vocoder.LEARNED).stat().st_size < 2.2 * sum(p.numel() for p in net.parameters())
    vocode = vocoder.load_vocoder(cfg, "cpu")
    wav = vocode(mel)
    assert wav.dtype == np.float32 and wav.shape == (len(mel) * HOP,) and np.array_equal(wav, vocode(mel))
    loaded = vocoder.load_learned(tmp_path / vocoder.LEARNED, "cpu", cfg)
    with torch.no_grad():
        f0, voiced = net.pitch(mel[None])
        expected, made = (n.log_magnitudes(mel[None], f0, voiced) for n in (net, loaded))
    torch.testing.assert_close(made.exp(), expected.exp(), rtol=0.02, atol=1e-4)
    torch.testing.assert_close(loaded.pitch(mel[None])[0], f0, rtol=0.01, atol=0)
    assert not np.allclose(wav, vocoder.griffin_lim(mel, CFG), atol=1e-3)


def test_a_missing_damaged_or_foreign_learned_vocoder_is_refused(tmp_path):
    cfg = Config(out_dir=str(tmp_path), data_dir=str(tmp_path / "none"), eval_vocoder="learned")
    with pytest.raises(UserError, match="no learned vocoder .* train_vocoder.py"):
        vocoder.load_vocoder(cfg, "cpu")
    vocoder.save_learned(random_net(), tmp_path / vocoder.LEARNED)
    whole = (tmp_path / vocoder.LEARNED).read_bytes()
    with pytest.raises(UserError, match=r"f_max 8000.0 \(config: 11025"):
        vocoder.load_vocoder(Config(out_dir=str(tmp_path), f_max=11025.0, eval_vocoder="learned"), "cpu")
    for damaged in (b"", b"garbage", whole[:200], whole[:-100]):
        (tmp_path / vocoder.LEARNED).write_bytes(damaged)
        with pytest.raises(UserError, match="is not a learned vocoder, or it is damaged"):
            vocoder.load_vocoder(cfg, "cpu")
