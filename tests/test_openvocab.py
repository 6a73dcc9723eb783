"""The open-vocabulary corpus: its text, its split, its voice, and its track at a tiny size."""
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from audio import AudioError
from config import Config, load_config
from data import SPLITS, Corpus
from eval import ctc

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("openvocab_prepare", ROOT / "data" / "openvocab" / "prepare.py")
openvocab = importlib.util.module_from_spec(spec)
sys.modules["openvocab_prepare"] = openvocab  # dataclasses look there
spec.loader.exec_module(openvocab)


def parts(text):
    return re.split(r"(?<=[.?!]) ", text)


@pytest.fixture(scope="module")
def sentences():
    return openvocab.prose()


def test_the_text_is_plain_prose_of_many_words(sentences):
    assert len(set(sentences)) == len(sentences) > 10_000
    words = {word for sentence in sentences for word in ctc.normalise_text(sentence).split()}
    assert len(words) > 5000
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,;'-]+[.?!]", sentence) for sentence in sentences)
    assert all(openvocab.FEWEST <= len(sentence) <= openvocab.MOST for sentence in sentences)
    assert parts(" ".join(sentences[:50])) == sentences[:50]


@given(st.integers(20, 300), st.integers(200, 800), st.integers(0, 9))
def test_held_out_sentences_are_in_no_training_utterance(sentences, count, some, seed):
    some = sentences[:some]
    made = openvocab.utterances(some, count, seed)
    assert made == openvocab.utterances(some, count, seed) and len(made) == len({u.utt_id for u in made}) == count
    said = {split: {part for u in made if u.split == split for part in parts(u.text)} for split in SPLITS}
    assert all(said[a] and not said[a] & said[b] for a in SPLITS for b in SPLITS if a != b)
    assert set.union(*said.values()) <= set(some)
    assert sum(u.split != "train" for u in made) <= max(2, count / 10)


def test_rate_and_pitch_vary_and_lengths_are_an_audiobooks(sentences):
    made = openvocab.utterances(sentences, 13_100, 1337)
    plans = [json.loads(u.source) for u in made]
    assert {split: sum(u.split == split for u in made) for split in SPLITS} == {"train": 12_500, "val": 100, "test": 500}
    assert min(p["wpm"] for p in plans) == 110 and max(p["wpm"] for p in plans) == 190
    assert min(p["pitch"] for p in plans) == 20 and max(p["pitch"] for p in plans) == 80
    assert 80 < np.mean([len(u.text) for u in made]) < 120  # LJSpeech: 100


def test_a_plan_is_spoken_as_it_says():
    plan = {"text": "Return the names of the old files.", "wpm": 110, "pitch": 20}
    slow, fast, high = (openvocab.read(json.dumps(plan | other), 22050) for other in ({}, {"wpm": 190}, {"pitch": 80}))
    assert len(slow) > 1.4 * len(fast)

    def brightness(wav):
        spectrum = np.abs(np.fft.rfft(wav))
        return spectrum @ np.arange(len(spectrum)) / spectrum.sum() / len(spectrum)
    assert abs(len(high) / len(slow) - 1) < 0.1 and brightness(high) > 1.02 * brightness(slow)
    for text in ("Go.", " ".join([plan["text"]] * 9)):
        with pytest.raises(AudioError, match="expected 1.0 to 10.0"):
            openvocab.read(json.dumps(plan | {"text": text}), 22050)


def test_the_track_runs_at_a_tiny_size_on_a_cpu(tmp_path, monkeypatch):
    """The commands as they are: corpus, judge, training, and the record's folder and row."""
    corpus = tmp_path / "tiny_bigvgan"
    run = [sys.executable, "data/openvocab/prepare.py", "--out", str(corpus), "--utterances", "24", "--workers", "2"]
    subprocess.run(run, cwd=ROOT, check=True, capture_output=True)
    cfg = load_config(["--config", str(ROOT / "configs/openvocab.yaml"), "--data_dir", str(corpus)])
    seconds = Corpus(str(corpus), cfg).frames * cfg.hop_length / cfg.sample_rate
    assert len(seconds) >= 23 and 1 <= seconds.min() < seconds.max() <= 10.1
    ctc.main(["--data_dir", str(corpus), "--judge_steps", "2", "--judge_width", "16"])
    assert ctc.load_judge(str(corpus), Config()).model.inp.out_channels == 16

    spec = importlib.util.spec_from_file_location("records_run", ROOT / "records" / "run.py")
    records = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(records)
    home = tmp_path / "records"  # what a run leaves stays out of the repo, so that the next one finds no folder taken
    monkeypatch.setattr(records, "HERE", home)
    home.mkdir()
    (home / "README.md").write_text("# Records\n\n| track | minutes |\n|---|---|\n\nNegative results.\n")
    small = ("--gpus 0 --width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 --text_encoder_layers 1 "
             "--effective_batch_size 4 --batch_size 4 --max_steps 2 --eval_interval 2 --val_interval 0 --eval_steps 1 "
             f"--loader_workers 0 --eval_num_samples 1 --data_dir {corpus}").split()
    records.main(["open-vocab-gpu", "--name", "tiny", "--idea", "none", "--seeds", "1", *small])
    row = (home / "README.md").read_text().splitlines()[4]
    assert row.startswith("| open-vocab-gpu | not reached | 0.0") and row.endswith("[log](tiny/) |")
    assert {p.name for p in (home / "tiny").iterdir()} == {"README.md", "config.yaml", "metrics_1337.jsonl", "runs_1337.jsonl"}
