"""Sentences, cuts inside long sentences, and pauses."""
import itertools

from hypothesis import given
from hypothesis import strategies as st

from text import CUT, PARAGRAPH, SENTENCE, Piece, cut, read_sentences, split_pieces

BOOK = ("Mr. Smith went home at 5 p.m. on foot. He said: \"Stop it!\" Then he left... Did he?\n\nA new paragraph. … It is short, "
        "in a line\nthat goes on. — Ünïcode, too! No end")


@given(cuts=st.lists(st.integers(0, len(BOOK)), max_size=8).map(sorted))
def test_sentences_do_not_depend_on_how_the_text_arrives(cuts):
    parts = [BOOK[a:b] for a, b in zip([0, *cuts], [*cuts, len(BOOK)])]
    assert list(read_sentences(parts)) == [
        ("Mr. Smith went home at 5 p.m. on foot.", SENTENCE), ('He said: "Stop it!"', SENTENCE), ("Then he left...", SENTENCE),
        ("Did he?", PARAGRAPH), ("A new paragraph.", SENTENCE), ("… It is short, in a line that goes on.", SENTENCE),
        ("— Ünïcode, too!", SENTENCE), ("No end", SENTENCE)]


def test_an_endless_text_is_read_as_it_arrives():
    endless = read_sentences(itertools.repeat("One more sentence. And "))
    assert [next(endless)[0] for _ in range(500)][-1] == "And One more sentence."
    unbroken = read_sentences(itertools.repeat("word " * 100))  # no sentence ends
    assert 60_000 < len(next(unbroken)[0]) < 70_000
    assert list(read_sentences(["…", " \n\n", "!"])) == list(read_sentences([])) == []


@given(text=st.text(alphabet="ab ,;–é😀", min_size=1, max_size=60), most=st.integers(5, 16))
def test_parts_of_a_cut_text_fit_and_no_word_is_lost(text, most):
    parts = cut(text, lambda part: len(part.encode()) <= most)
    assert "".join(c for part in parts for c in part if c.isalnum()) == "".join(c for c in text if c.isalnum())
    assert all(len(part.encode()) <= most and any(c.isalnum() for c in part) for part in parts)


def test_cuts_are_after_clauses_then_between_words_then_anywhere():
    def fits(part):
        return len(part) < 15
    assert cut("one two, three four", fits) == ["one two,", "three four"]
    assert cut("one two three four", fits) == ["one two", "three four"]
    assert cut("o" * 20, fits) == ["o" * 10] * 2
    assert cut("o", lambda part: False) == ["o"] and cut("… " * 20, fits) == []


def test_pieces_keep_their_pauses():
    sentences = [("one two, three four", PARAGRAPH), ("Five.", SENTENCE)]
    assert list(split_pieces(sentences, lambda part: len(part) < 15, line=3)) == [
        Piece(3, "one two,", CUT), Piece(3, "three four", PARAGRAPH), Piece(3, "Five.", SENTENCE)]
