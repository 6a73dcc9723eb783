"""Text into pieces that the model can speak: sentences, cuts inside long sentences, and the silence after each piece."""
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from sentencex import get_sentence_boundaries

SENTENCE, PARAGRAPH, CUT = 0.25, 0.6, 0.1  # seconds of silence after a sentence, a paragraph, a part of a cut sentence
MOST_HELD = 1 << 16  # characters to keep in memory while no sentence ends


class Piece(NamedTuple):
    """A text to speak in one go, the number of the line it comes from, and the seconds of silence after it."""
    line: int
    text: str
    pause: float


def has_words(text: str) -> bool:
    return any(c.isalnum() for c in text)


def read_sentences(parts: Iterable[str]) -> Iterator[tuple[str, float]]:
    """The sentences of a text that arrives in parts, each with the silence after it. Only the end of the text is kept."""
    held = ""
    for part in itertools.chain(parts, [None]):
        held += part or ""
        found = get_sentence_boundaries("en", held) if held.strip() else []
        # The next part may continue the last two entries: a sentence, and the paragraph break after it.
        done = len(found) if part is None or len(held) > MOST_HELD else max(0, len(found) - 2)
        for n, sentence in enumerate(found[:done]):
            text = " ".join(sentence["text"].split())
            if has_words(text):
                yield text, PARAGRAPH if n + 1 < len(found) and found[n + 1]["is_paragraph_break"] else SENTENCE
        held = "".join(sentence["text"] for sentence in found[done:])


def cut(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in parts that fit. Each cut is the one nearest to the middle: after a clause, else at a space, else anywhere.

    Parts without words are left out.
    """
    if not has_words(text):
        return []
    if not fits(text):
        for mark in (r"(?<=[,;:–—])\s+", r"\s+", ""):
            cuts = [m.span() for m in re.finditer(mark, text) if 0 < m.start() and m.end() < len(text)]
            if cuts:
                left, right = min(cuts, key=lambda span: abs(sum(span) - len(text)))
                return cut(text[:left], fits) + cut(text[right:], fits)
    return [text]


def split_pieces(sentences: Iterable[tuple[str, float]], fits: Callable[[str], bool], line: int = 0) -> Iterator[Piece]:
    """Sentences with their pauses as pieces for which fits(text) is true."""
    for text, pause in sentences:
        *parts, last = cut(text, fits)
        yield from (Piece(line, part, CUT) for part in parts)
        yield Piece(line, last, pause)
