"""The grammar corpus (its grammar, its voice, its command), and the ctc judge that learns to transcribe it."""
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT
from demo import prepare  # data/demo/prepare.py
from hypothesis import given, settings
from hypothesis import strategies as st

import audio
from common import UserError
from config import Config
from corpus import Corpus, Utterance, hash_splits, write_corpus
from espeak import espeak_wav
from eval import ctc

CFG = Config()
SENTENCE = "The quiet fox waited gladly near the bridge."


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the grammar

def test_sentences_are_distinct_and_of_many_words():
    lines = prepare.sentences(4096 + 256, 1337)
    assert len(set(lines)) == len(lines) == 4352
    words = Counter(word for line in lines for word in line.lower().rstrip(".").split())
    assert len(words) >= 150 and min(words.values()) >= 5
    for line in lines:
        assert line[0].isupper() and line.endswith(".") and 4 <= len(line.split()) <= 13, line
        assert ctc.normalise_text(line) == line.lower().rstrip("."), line  # nothing that the judge cannot transcribe


def test_sentences_depend_on_their_seed():
    lines = prepare.sentences(300, 1)
    assert prepare.sentences(300, 1) == lines and prepare.sentences(100, 1) == lines[:100]
    assert len(set(lines) & set(prepare.sentences(300, 2))) < 10


def test_the_test_split_is_new():
    """Its sentences are none that an earlier version had, in any split; the other splits are as before."""
    utterances, before = prepare.grammar_utterances(300, 60, 7), prepare.sentences(360, 7)
    assert [u.text for u in utterances[:330]] == before[:330] and {u.split for u in utterances[330:]} == {"test"}
    test = [u.text for u in utterances[330:]]
    assert len(set(test)) == 30 and not set(test) & set(before)
    assert test == [u.text for u in prepare.grammar_utterances(300, 60, 7)[330:]]


# --- the voice

def test_the_voice_is_audible_and_takes_its_time():
    wav = espeak_wav(SENTENCE, 22050)
    assert wav.dtype == np.float32 and wav.ndim == 1 and 0.2 < np.abs(wav).max() <= 1
    assert 1.5 < len(wav) / 22050 < 5
    assert abs(len(espeak_wav(SENTENCE, 16000)) / 16000 - len(wav) / 22050) < 0.02
    twice = espeak_wav(f"{SENTENCE} {SENTENCE}", 22050)
    assert 1.7 < len(twice) / len(wav) < 2.5


def test_earlier_texts_do_not_change_the_voice():
    # otherwise a corpus would depend on the number of workers and on interruptions
    wav = espeak_wav(SENTENCE, 22050)
    for other in ("Alice.", "My uncle hid under the church.", SENTENCE):
        espeak_wav(other, 22050)
        assert np.array_equal(espeak_wav(SENTENCE, 22050), wav)


# --- the command

def test_the_corpus_has_the_sizes_of_the_flags(demo_corpus):
    corpus = Corpus(str(demo_corpus), CFG)
    assert Counter(corpus.splits) == {"train": 48, "val": 8, "test": 8}
    assert len(set(corpus.texts)) == 64 and len(set(corpus.ids)) == 64  # so nothing held out is trained on
    seconds = corpus.frames * CFG.hop_length / CFG.sample_rate
    assert seconds.min() > 0.8 and seconds.max() < 6 and corpus.stats["rejected"] == 0
    mean, std = corpus.mel_stats
    assert -7 < mean < -3 and 1 < std < 4
    assert not list(demo_corpus.parent.glob("*.partial"))


@pytest.mark.slow
def test_the_command_gives_the_same_bytes_with_two_workers(demo_corpus, tmp_path):
    out = str(tmp_path / "x")
    command = [sys.executable, "data/demo/prepare.py", "--out", out, "--train", "48", "--held-out", "16", "--workers", "2"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    first, second = content(demo_corpus), content(tmp_path / "x")  # the fixture had one worker
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    with pytest.raises(UserError, match="--force"):
        prepare.main(["--out", out])
    assert content(tmp_path / "x") == second


def test_another_seed_gives_another_corpus(demo_corpus, tmp_path):
    prepare.main(["--out", str(tmp_path / "x"), "--train", "5", "--held-out", "2", "--workers", "1", "--seed", "2"])
    corpus = Corpus(str(tmp_path / "x"), CFG)
    assert Counter(corpus.splits) == {"train": 5, "val": 1, "test": 1}
    assert not set(corpus.texts) & set(Corpus(str(demo_corpus), CFG).texts)


def test_the_users_own_lines(tmp_path, capsys):
    lines = ["Good morning.", "Twelve 12 twelves, isn't it?", "Ça va, señor?", *(f"Line {n}." for n in range(20))]
    (tmp_path / "lines.txt").write_text("\n\n  " + " \n\t\r\n".join(lines) + "\nGood morning.\n\n", encoding="utf-8")
    prepare.main(["--out", str(tmp_path / "x"), "--text", str(tmp_path / "lines.txt"), "--workers", "1"])
    corpus = Corpus(str(tmp_path / "x"), CFG)
    assert corpus.texts == lines  # in order, without the blank lines and the one that came twice
    assert dict(zip(corpus.ids, corpus.splits)) == hash_splits(corpus.ids) and set(corpus.splits) == {"train", "val", "test"}
    assert corpus.frames.min() > 20
    assert "23 utterances" in capsys.readouterr().out


@pytest.mark.parametrize("text, expected", [(None, "cannot read --text"), (b"", "0 distinct lines"), (b"\n \n\t\n", "0 distinct lines"),
                                            (b"\xff\xfe\x00bin\xc3\x28", "UTF-8")])
def test_unusable_text_files(tmp_path, text, expected):
    path = tmp_path / "lines.txt"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=expected):
        prepare.main(["--out", str(tmp_path / "x"), "--text", str(path), "--workers", "1"])
    assert not list(tmp_path.glob("x*"))


@pytest.mark.parametrize("args, expected", [
    (["--train", "0"], "--train 0"), (["--train", "-5"], "--train -5"),
    (["--held-out", "1"], "--held-out 1"), (["--train", "100000"], "100000"), (["--workers", "-1"], "workers")])
def test_impossible_numbers(tmp_path, args, expected):
    with pytest.raises(UserError, match=expected):
        prepare.main(["--out", str(tmp_path / "x"), "--train", "4", "--held-out", "2", "--workers", "1", *args])


# --- the judge: texts

@given(st.text())
@settings(max_examples=50)
def test_normalised_texts_are_of_the_alphabet(text):
    normal = ctc.normalise_text(text)
    assert set(normal) <= set(ctc.ALPHABET) and "  " not in normal and normal == normal.strip()
    assert ctc.normalise_text(normal) == normal == ctc.normalise_text(f"  {text.upper().lower()}\n") or not text.isascii()


@given(st.text(ctc.ALPHABET), st.text(ctc.ALPHABET))
def test_normalising_keeps_words(a, b):
    assert ctc.normalise_text(a).split() == a.split()
    assert ctc.normalise_text(f"{a}, {b}") == " ".join(f"{a} {b}".split())


def test_normalised_texts():
    assert ctc.normalise_text("  The KING’s dog -- isn't\nit? 12.") == "the king's dog isn't it 12"
    assert ctc.normalise_text("…") == ctc.normalise_text("日本") == ctc.normalise_text("") == ""


# --- the judge: speech

@pytest.fixture(scope="module")
def trained(demo_corpus, tmp_path_factory):
    """A copy of the corpus with a judge that was trained for a few steps."""
    folder = tmp_path_factory.mktemp("judge") / "corpus"
    shutil.copytree(demo_corpus, folder)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(ctc, "STEPS", 30)
        mp.setattr(ctc, "BATCH", 8)
        return folder, ctc.load_ctc_judge(str(folder), CFG)


def test_the_judge_is_saved_with_the_corpus_and_loads(trained):
    folder, judge = trained
    assert sorted(p.name for p in folder.iterdir()) == ["judge_ctc.pt", "mel_shards", "metadata"]
    written = (folder / "judge_ctc.pt").read_bytes()
    again = ctc.load_ctc_judge(str(folder), CFG)
    assert (folder / "judge_ctc.pt").read_bytes() == written
    state, other = judge.model.state_dict(), again.model.state_dict()
    assert state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)
    corpus = Corpus(str(folder), CFG)
    assert (again.mean, again.std) == corpus.mel_stats
    assert again.floor == judge.floor and again.floor["recordings"] == 16
    assert 0 <= again.floor["cer"] <= 2 and 0 <= again.floor["wer"] <= 2


def test_the_judge_learns(trained):
    # in 30 steps it learns to tell speech from silence, so its loss on held-out recordings is far below that of a new one
    folder, judge = trained
    corpus = Corpus(str(folder), CFG)
    torch.manual_seed(0)
    fresh = ctc.Recogniser(CFG.n_mels).eval()

    def loss(model):
        losses = []
        for i in corpus.split("val", CFG):
            mel = (torch.from_numpy(corpus.mel(i).astype(np.float32)) - judge.mean) / judge.std
            target = torch.tensor([[ctc.ALPHABET.index(c) + 1 for c in ctc.normalise_text(corpus.texts[i])]])
            scores, lengths = model(mel[None], torch.tensor([len(mel)]))
            losses.append(torch.nn.functional.ctc_loss(scores.transpose(0, 1), target, lengths,
                                                       torch.tensor([target.shape[1]])))
        return float(torch.stack(losses).mean())

    with torch.inference_mode():
        assert loss(judge.model) < loss(fresh) / 2


def test_transcripts_are_texts(trained):
    _, judge = trained
    wavs = [espeak_wav(SENTENCE, CFG.sample_rate), np.zeros(5000, np.float32), np.zeros(1, np.float32),
            np.random.default_rng(0).uniform(-1, 1, 30_000).astype(np.float32)]
    texts = judge.transcribe(wavs, CFG)
    assert len(texts) == 4 and all(isinstance(t, str) and ctc.normalise_text(t) == t for t in texts)
    assert texts == [judge.transcribe([w], CFG)[0] for w in wavs]
    assert judge.transcribe([], CFG) == []


def test_a_batch_is_transcribed_as_one_by_one(trained):
    folder, judge = trained
    corpus = Corpus(str(folder), CFG)
    mels = [corpus.mel(i) for i in range(40)]  # more than a batch
    texts = judge.transcribe_mels(mels)
    assert texts == [judge.transcribe_mels([m])[0] for m in mels]
    assert judge.transcribe_mels(mels[::-1]) == texts[::-1]


def test_decoding_is_greedy_ctc_on_normalised_mels():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ctc.Recogniser(8).eval()
        for p in model.parameters():
            p.data.mul_(4)  # a new recogniser gives one symbol all the time, this one gives many
        mels = [torch.randn(n, 8) * 3 - 5 for n in (40, 90, 15)]
    judge = ctc.CTCJudge(model, {"mel_mean": -5.0, "mel_std": 3.0, "floor": {}})
    expected = []
    for mel in mels:
        with torch.inference_mode():
            best = model(((mel + 5) / 3)[None], torch.tensor([len(mel)]))[0][0].argmax(-1).tolist()
        text = "".join(ctc.ALPHABET[s - 1] for n, s in enumerate(best) if s and (n == 0 or s != best[n - 1]))
        expected.append(" ".join(text.split()))
    assert len("".join(expected)) > 20
    assert judge.transcribe_mels(mels) == judge.transcribe_mels([m.numpy() for m in mels]) == expected


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(0, 9))
def test_padding_does_not_change_the_scores(lengths, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ctc.Recogniser(8).eval()
        mels = [torch.randn(n, 8) for n in lengths]
    with torch.inference_mode():
        scores, out_lengths = model(torch.nn.utils.rnn.pad_sequence(mels, batch_first=True), torch.tensor(lengths))
        for n, mel in enumerate(mels):
            alone, length = model(mel[None], torch.tensor([len(mel)]))
            assert alone.shape[1] == int(length[0]) == int(out_lengths[n]) == (len(mel) + 1) // 2
            torch.testing.assert_close(scores[n, :length[0]], alone[0], atol=1e-4, rtol=0)


def test_training_repeats(trained, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.setattr(ctc, "STEPS", 3)
    monkeypatch.setattr(ctc, "BATCH", 4)
    states = []
    for name in "ab":
        torch.manual_seed(ord(name))
        before = torch.get_rng_state()
        ctc.train_judge(Corpus(str(folder), CFG), CFG, tmp_path / f"{name}.pt")
        assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers do not change
        states.append(torch.load(tmp_path / f"{name}.pt", weights_only=True))
    a, b = states
    assert a["floor"] == b["floor"] and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


def test_a_killed_training_leaves_no_judge(trained, tmp_path, monkeypatch):
    folder, _ = trained
    monkeypatch.setattr(ctc, "STEPS", 2)
    monkeypatch.setattr(ctc, "BATCH", 2)

    def half_written(saved, path):
        with open(path, "wb") as f:
            f.write(b"PK half a fi")
        raise KeyboardInterrupt
    with monkeypatch.context() as mp:
        mp.setattr(ctc.torch, "save", half_written)
        with pytest.raises(KeyboardInterrupt):
            ctc.train_judge(Corpus(str(folder), CFG), CFG, tmp_path / "judge_ctc.pt")
    assert not (tmp_path / "judge_ctc.pt").exists()
    ctc.train_judge(Corpus(str(folder), CFG), CFG, tmp_path / "judge_ctc.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["judge_ctc.pt"]


def test_a_broken_judge_is_refused(trained, tmp_path):
    folder = tmp_path / "corpus"
    shutil.copytree(trained[0], folder)
    path = folder / "judge_ctc.pt"
    whole, saved = path.read_bytes(), torch.load(path, weights_only=True)
    broken = [b"", b"garbage", b"PK\x03\x04", whole[:len(whole) // 2], whole[:-1], {}, [1], None, saved["model"],
              {"model": saved["model"]}, saved | {"model": {}}, saved | {"model": ctc.Recogniser(40).state_dict()}]
    for bad in broken:
        path.write_bytes(bad) if isinstance(bad, bytes) else torch.save(bad, path)
        with pytest.raises(UserError, match="is not a ctc judge") as e:
            ctc.load_ctc_judge(str(folder), CFG)
        assert str(path) in str(e.value) and "delete it" in str(e.value) and "\n" not in str(e.value)
    path.write_bytes(whole)
    assert ctc.load_ctc_judge(str(folder), CFG).floor == trained[1].floor


@pytest.mark.parametrize("kind", ["another script", "nothing held out", "silent held-out texts"])
def test_corpora_at_the_edge_of_what_a_judge_can_learn(tmp_path, monkeypatch, kind):
    # the result is a judge, or an error that says why there is none
    monkeypatch.setattr(ctc, "STEPS", 2)
    texts = {"train": "Привет, мир" if kind == "another script" else "Good morning"}
    if kind != "nothing held out":
        texts |= {"val": "…", "test": "…"}
    rng = np.random.default_rng(0)
    some = [Utterance(f"{split}{n}", text, split, "") for split, text in texts.items() for n in range(3)]

    def read(source, sample_rate):
        return rng.uniform(-1, 1, 20_000).astype(np.float32)
    write_corpus(str(tmp_path / "x"), some, read, CFG, workers=1)
    try:
        judge = ctc.load_ctc_judge(str(tmp_path / "x"), CFG)
    except UserError as e:
        assert str(tmp_path / "x") in str(e) and not (tmp_path / "x" / "judge_ctc.pt").exists()
        return
    assert kind != "another script"
    assert judge.transcribe([np.zeros(5000, np.float32)], CFG) != [None]


def test_the_judges_command(trained, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "corpus"
    shutil.copytree(trained[0], folder)
    monkeypatch.setattr(ctc, "STEPS", 2)
    monkeypatch.setattr(ctc, "BATCH", 4)
    ctc.main(["--data_dir", str(folder)])
    out = capsys.readouterr().out
    assert f"ctc judge of {folder}: CER " in out and "on 16 held-out recordings" in out
    with pytest.raises(UserError, match="no processed corpus"):
        ctc.main(["--data_dir", str(tmp_path / "none")])


def test_empty_wavs_are_refused(trained):
    with pytest.raises(audio.AudioError, match="zero length"):
        trained[1].transcribe([np.zeros(0, np.float32)], CFG)
