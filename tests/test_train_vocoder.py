"""Training the learned vocoder on a corpus's recordings and on a voice's own log-mels."""
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from test_model import small_model

import audio
import train_vocoder
import vocoder
from common import UserError
from config import Config
from corpus import RECORDINGS, Corpus, Utterance, write_corpus
from espeak import espeak_wav

CFG = Config()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus of 24 spoken sentences, of which 18 training sentences and the held-out ones keep their recordings."""
    folder = tmp_path_factory.mktemp("vocoder") / "corpus"
    texts = [f"The {a} doctor painted the {b} bridge." for a in ("old", "young", "brave", "tired") for b in
             ("red", "blue", "green", "white", "black", "wooden")]
    utterances = [Utterance(f"u{n}", text, "val" if n == 22 else "test" if n == 23 else "train", text)
                  for n, text in enumerate(texts)]
    write_corpus(str(folder), utterances, espeak_wav, CFG, workers=1, recordings=18, shard_utts=10)
    return folder


def test_a_corpus_keeps_the_recordings_asked_for(corpus):
    kept = {path.stem for path in (corpus / RECORDINGS).iterdir()}
    assert kept == {f"u{n}" for n in (*range(18), 22, 23)}
    opened = Corpus(corpus, CFG)
    opened.check()  # they are no fault of a corpus
    mel = audio.log_mel(audio.read_wav(str(corpus / RECORDINGS / "u3.wav"), CFG.sample_rate), CFG).numpy()
    assert np.abs(mel - opened.mel(3)).mean() < 0.02  # 16 bits


def test_training_brings_pitch_and_magnitudes_nearer_to_the_recordings(corpus, monkeypatch):
    monkeypatch.setattr(train_vocoder, "STEPS", 80)
    monkeypatch.setattr(train_vocoder, "WIDTH", 32)
    seed = torch.random.get_rng_state()
    path = train_vocoder.train_on_recordings(str(corpus), CFG)
    assert torch.equal(seed, torch.random.get_rng_state())
    assert path == vocoder.find_learned(Config(data_dir=str(corpus), out_dir="/none"))
    net = vocoder.load_learned(path, "cpu", CFG)
    recording = train_vocoder.read_recordings(corpus / RECORDINGS, ["u22"], CFG)["u22"]  # not trained on
    log_mel, target, f0, voiced = (x[None] for x in recording[:4])
    plain = vocoder.SourceFilter(CFG, 8, 2)
    errors = [(made.log_magnitudes(log_mel, f0, voiced) - target).abs().mean().item() for made in (net, plain)]
    assert errors[0] < 0.9 * errors[1]
    heard, heard_voiced = net.pitch(log_mel)
    assert (heard_voiced == voiced).float().mean() > 0.8
    both = voiced & heard_voiced
    assert (12 * (heard / f0)[both].log2()).abs().median() < 2  # semitones; the voice moves over 12


def test_what_is_read_from_a_recording(corpus):
    recording = train_vocoder.read_recordings(corpus / RECORDINGS, ["u3"], CFG)["u3"]
    opened = Corpus(corpus, CFG)
    assert len({len(x) for x in recording[:4]}) == 1 and recording.own is None
    assert np.abs(recording.log_mel.numpy() - opened.mel(3)).mean() < 0.02
    assert 0.3 < recording.voiced.float().mean() < 0.95 and recording.f0.isfinite().all() and (recording.f0 > 50).all()


def test_a_voice_gets_a_vocoder_of_its_own(corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(train_vocoder, "STEPS", 20)
    monkeypatch.setattr(train_vocoder, "WIDTH", 32)
    model = small_model(data_dir=str(corpus), block_size=400, mel_mean=-5.0, mel_std=2.0)
    path = tmp_path / "run" / "latest.pt"
    path.parent.mkdir()
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg)}, path)
    found = train_vocoder.train_on_voice(str(path))
    assert found == path.parent / vocoder.LEARNED and found.read_bytes() != (corpus / vocoder.LEARNED).read_bytes()
    assert vocoder.find_learned(Config(out_dir=str(path.parent), data_dir=str(corpus))) == found
    shutil.copytree(corpus / RECORDINGS, tmp_path / "raw")  # the corpus's log-mels are cut at other frames than these
    wav = audio.read_wav(str(tmp_path / "raw" / "u3.wav"), 22050)
    audio.write_wav(tmp_path / "raw" / "u3.wav", np.concatenate([np.zeros(2560, np.float32), wav]), 22050)
    with pytest.raises(UserError, match=r"u3.wav has \d+ frames, expected \d+ as in .*leave --recordings out"):
        train_vocoder.train_on_voice(str(path), tmp_path / "raw")


def test_a_voices_own_log_mels_keep_their_frames(corpus):
    model, opened = small_model(block_size=400, mel_mean=-5.0, mel_std=2.0).eval(), Corpus(corpus, CFG)
    own = train_vocoder.own_log_mels(model, opened, [3, 0, 5], seed=1)
    assert set(own) == {0, 3, 5} and all(own[i].shape == opened.mel(i).shape for i in own)
    again = train_vocoder.own_log_mels(model, opened, [3, 0, 5], seed=1)
    assert all(torch.equal(own[i], again[i]) for i in own)
    # a decoder that knows the velocity gives the recordings back
    model.flow = lambda batch, *_: ((1 - (t := batch["t"][:, None, None])) * batch["mel"] + t * batch["noise"],
                                    batch["noise"] - batch["mel"])
    for i, mel in train_vocoder.own_log_mels(model, opened, [3, 0, 5], seed=1).items():
        np.testing.assert_allclose(mel, opened.mel(i), atol=1e-3)


def test_want_of_recordings_is_one_clear_error(corpus, tmp_path):
    with pytest.raises(UserError, match=r"holds no recording of the training utterances, such as u0.wav; .*--recordings"):
        train_vocoder.train_on_recordings(str(corpus), CFG, tmp_path)
    (tmp_path / "u0.wav").write_bytes((corpus / RECORDINGS / "u0.wav").read_bytes())
    with pytest.raises(UserError, match="1 recordings are longer than 96 frames; the vocoder needs at least 16"):
        train_vocoder.train_on_recordings(str(corpus), CFG, tmp_path)


def test_a_run_trains_the_vocoder_only_where_it_is_used_and_can_be(corpus, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train_vocoder, "STEPS", 2)
    monkeypatch.setattr(train_vocoder, "WIDTH", 8)
    cfg, learned = Config(data_dir=str(corpus), out_dir=str(tmp_path)), corpus / vocoder.LEARNED
    learned.unlink(missing_ok=True)
    for other, device in ((dataclasses.replace(cfg, eval_vocoder="griffinlim"), "cpu"), (cfg, "cuda"),
                          (dataclasses.replace(cfg, data_dir=str(tmp_path)), "cpu")):
        train_vocoder.train_if_missing(other, device)
    assert not learned.exists()
    train_vocoder.train_if_missing(cfg, "cpu")
    first = learned.read_bytes()
    train_vocoder.train_if_missing(cfg, "cpu")  # it is there
    assert learned.read_bytes() == first
    learned.unlink()
    monkeypatch.setattr(train_vocoder, "BATCH", 500)
    train_vocoder.train_if_missing(cfg, "cpu")  # a small corpus is no error
    assert not learned.exists() and "the vocoder is Griffin-Lim, because 18 recordings" in capsys.readouterr().out
