"""Long recordings are cut at pauses, and only where the alignment is certain: on speech of the voice in the box."""
import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import audio
from align import search_alignment
from common import UserError
from config import Config
from corpus import Corpus, Utterance, hash_splits
from folder import prepare  # data/folder/prepare.py
from folder.prepare import VOICE
from silence import find_speech, part_times, read_part
from splitting import Cut, best_sums, choose_cuts, encode_text, load_voice, split_recording, text_gaps
from vocoder import LEARNED

FIRST, SECOND = "The train to Boston leaves at 9:15, but the bridge is closed.", "Could you lend me an umbrella?"
TEXT, RATE = f"{FIRST} {SECOND}", 22050


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The repository's example, 6 s long, which has both sentences."""
    wav = audio.read_wav(str(ROOT / "examples" / "joe.flac"), RATE)
    path = tmp_path_factory.mktemp("long") / "long.wav"
    audio.write_wav(path, wav, RATE)
    return path


def split(sound, text=TEXT, limit=5.0, trim=False):
    return split_recording(Utterance("long", text, "val", str(sound)), VOICE, limit, trim)


# --- parts of it

@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**16))
def test_the_best_path_is_that_of_the_search(T, L, seed):
    L = min(T, L)
    scores = np.random.default_rng(seed).standard_normal((T, L))
    through = best_sums(scores) + best_sums(scores[::-1, ::-1])[::-1, ::-1] - scores
    found = search_alignment(torch.from_numpy(scores)[None], torch.tensor([T]), torch.tensor([L]))[0].numpy()
    assert (through.argmax(axis=1) == found).all()
    np.testing.assert_allclose(through.max(axis=1), scores[np.arange(T), found].sum())


def test_gaps_of_a_text_are_those_between_what_is_written_out_by_itself():
    spoken, gaps = text_gaps("Pay $5 million by 9:15, or go", True)
    assert spoken == "Pay five million dollars by nine fifteen, or go."
    text = "Pay $5 million by 9:15, or go"
    assert [(text[:left], text[right:]) for left, right, _ in gaps] == [
        ("Pay", "$5 million by 9:15, or go"), ("Pay $5 million", "by 9:15, or go"), ("Pay $5 million by", "9:15, or go"),
        ("Pay $5 million by 9:15,", "or go"), ("Pay $5 million by 9:15, or", "go")]
    assert all(spoken.encode()[token:token + 1] == b" " for *_, token in gaps)


@given(st.lists(st.tuples(st.floats(0.3, 6), st.sampled_from(".,x")), min_size=1, max_size=12), st.floats(3, 12))
def test_chosen_cuts_give_pieces_within_the_limit_where_there_are_any(stretches, limit):
    text = "".join(mark + " " for _, mark in stretches)
    bounds = np.cumsum([seconds for seconds, _ in stretches])
    cuts = [Cut(end - 0.2, end, 2 * n + 1, 2 * n + 2, n) for n, end in enumerate(bounds[:-1])]
    chosen = choose_cuts(cuts, text, 0.0, bounds[-1], limit)
    edges = [0.0, *(cut.end for cut in chosen), bounds[-1]]
    if all(seconds + 0.4 <= limit for seconds, _ in stretches):
        assert max(np.diff(edges)) <= limit
    if bounds[-1] + 0.4 <= limit:
        assert chosen == []
    assert set(chosen) <= set(cuts) and chosen == sorted(chosen)


def test_a_text_longer_than_the_encoder_reads_is_encoded_in_parts():
    model = load_voice(VOICE)
    mels, seconds = encode_text(model, text := "a short word " * 100 + "end.")
    assert len(mels) == len(seconds) == len(text.encode()) + 1 > model.most_tokens
    short, _ = encode_text(model, text[:500])
    np.testing.assert_allclose(mels[:400], short[:400], atol=0.5)


# --- recordings

def test_a_long_recording_is_cut_at_the_pause_between_two_sentences(sound):
    pieces, how = split(sound)
    assert [(p.utt_id, p.text, p.split) for p in pieces] == [("long_1", FIRST, "val"), ("long_2", SECOND, "val")] and how == ""
    (_, end), (start, _) = (part_times(p.source) for p in pieces)
    wav = audio.read_wav(str(sound), RATE)
    pause = next((a, b) for (_, a), (b, _) in zip(find_speech(wav, RATE), find_speech(wav, RATE)[1:]) if a < end < b + 0.01)
    assert pause[0] < end <= start < pause[1]  # no speech is lost, and none is in both
    assert 0 < len(read_part(pieces[1].source, RATE)) < len(wav) - start * RATE + 1


@pytest.mark.parametrize("text", [
    "Nobody came back to the house. We had been waiting in the garden for more than an hour.", f"{SECOND} {FIRST}", "Yes. No."])
def test_a_wrong_text_is_not_cut(sound, text):
    assert split(sound, text)[0] == []


def test_pieces_stand_for_the_recording_in_corpus_and_report(sound, tmp_path, capsys):
    (tmp_path / "five_seconds.yaml").write_text("block_size: 430")
    folder = tmp_path / "voice"
    folder.mkdir()
    (folder / "long.wav").write_bytes(sound.read_bytes())
    wav = audio.read_wav(str(sound), RATE)
    for n in range(3):
        audio.write_wav(folder / f"short{n}.wav", wav[:(3 + n) * RATE // 2], RATE)
    (folder / "metadata.csv").write_text(f"long|{TEXT}\nshort0|The train\nshort1|The train to\nshort2|The train to Boston\n")
    flags = ["--source", str(folder), "--workers", "1", "--split_long", "--trim", "--config", str(tmp_path / "five_seconds.yaml")]
    prepare.main([*flags, "--out", str(tmp_path / "corpus"), "--report", str(tmp_path / "look")])
    out = capsys.readouterr().out
    assert "long: 2 pieces\n" in out and "1 of them are cut into 2 pieces" in out
    corpus = Corpus(str(tmp_path / "corpus"), Config())
    assert corpus.ids == ["long_1", "long_2", "short0", "short1", "short2"] and corpus.texts[:2] == [FIRST, SECOND]
    assert set(corpus.splits[:2]) == {hash_splits(["long", "short0", "short1", "short2"])["long"]}
    assert "long.wav#t=" in (tmp_path / "look" / "utterances.csv").read_text()
    (folder / "long_1.wav").write_bytes(sound.read_bytes()[:100_000])
    (folder / "metadata.csv").write_text(f"long|{TEXT}\nlong_1|The train\n")
    with pytest.raises(UserError, match="'long_1', which another recording has"):
        prepare.main([*flags, "--report", str(tmp_path / "look")])


def test_a_voice_that_cannot_align_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        load_voice(str(tmp_path / LEARNED))
