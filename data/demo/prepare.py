"""The grammar corpus: sentences of a small grammar, read by espeak-ng. It needs no downloads, no recordings and one minute.

    python data/demo/prepare.py --out data/demo_bigvgan
    python data/demo/prepare.py --out data/mine_bigvgan --text lines.txt       # read your own lines instead
"""
import argparse
from pathlib import Path

import numpy as np

from common import UserError, run_cli
from config import parse_with_audio
from corpus import Utterance, hash_splits, write_corpus
from espeak import espeak_wav

# --- the grammar: 162 words

PEOPLE = ("teacher farmer doctor painter sailor singer driver baker lawyer student soldier queen king child brother sister "
          "mother uncle neighbor captain").split()
NAMES = "Alice Robert Helen Victor Emma Thomas Julia Nora".split()
ANIMALS = "dog cat horse rabbit eagle tiger monkey wolf".split()
THINGS = ("letter basket window bottle ladder mirror hammer camera candle ticket guitar jacket picture lamp clock box "
          "blanket bicycle chair map drum").split()
PLACES = ("river garden kitchen market bridge castle forest harbor island mountain office school village church library "
          "museum tower").split()
LOOKS = "old young quiet angry happy clever gentle proud tired brave honest strange".split()
QUALITIES = "red blue green yellow white black heavy broken wooden golden empty narrow".split()
ACTS = ("found carried painted dropped bought watched borrowed opened followed remembered touched washed covered needed "
        "lifted counted noticed").split()
MOVES = "walked waited slept danced sang worked laughed shouted".split()
PREPOSITIONS = "near behind beside inside under across".split()
TIMES = ("yesterday|today|tonight|this morning|last winter|before breakfast|after the storm|every evening|on Sunday|at noon|"
         "two weeks ago|for seven days").split("|")
MANNERS = "slowly quickly quietly gladly suddenly carefully".split()


def sentence(rng: np.random.Generator) -> str:
    """One sentence of five to eleven words."""
    def pick(words):
        return words[rng.integers(len(words))]

    def someone():
        kind = rng.integers(4)
        if kind == 0:
            return pick(NAMES)
        noun = pick(PEOPLE) if kind < 3 else pick(ANIMALS)
        return f"the {pick(LOOKS)} {noun}" if rng.random() < 0.6 else f"my {noun}"

    def something():
        return f"the {pick(QUALITIES)} {pick(THINGS)}" if rng.random() < 0.6 else f"her {pick(THINGS)}"

    def place():
        return f"{pick(PREPOSITIONS)} the {pick(PLACES)}"

    forms = (lambda: f"{someone()} {pick(ACTS)} {something()} {place()}",
             lambda: f"{someone()} {pick(MOVES)} {pick(MANNERS)} {place()}",
             lambda: f"{pick(TIMES)} {someone()} {pick(ACTS)} {something()}",
             lambda: f"{someone()} and {someone()} {pick(MOVES)} {place()}",
             lambda: f"{someone()} {pick(ACTS)} {something()} {pick(TIMES)}")
    words = pick(forms)()
    return words[0].upper() + words[1:] + "."


def sentences(count: int, seed, without: list[str] = ()) -> list[str]:
    """`count` distinct sentences, none of them in `without`, the same for the same seed (what default_rng takes)."""
    rng, seen = np.random.default_rng(seed), dict.fromkeys(without)
    while len(seen) < len(without) + count:
        seen[sentence(rng)] = None
    return list(seen)[len(without):]


def grammar_utterances(train: int, held_out: int, seed: int) -> list[Utterance]:
    """`train` training sentences, then `held_out` ones, of which the first half is val and the rest test.

    Earlier versions drew the test sentences after those of val, and settings were chosen by them. So these come from a
    generator of their own, and are none of the sentences that earlier versions had.
    """
    if train < 1 or held_out < 2 or train + held_out > 100_000:
        raise UserError(f"--train {train} --held-out {held_out}: expected at least 1 and 2, and at most 100000 together")
    splits = ["train"] * train + ["val"] * (held_out // 2) + ["test"] * (held_out - held_out // 2)
    texts = sentences(len(splits), seed)
    texts[train + held_out // 2:] = sentences(held_out - held_out // 2, [seed, 1], without=texts)
    return [Utterance(f"demo_{n:06d}", text, split, text) for n, (text, split) in enumerate(zip(texts, splits))]


def read_utterances(path: str) -> list[Utterance]:
    """The distinct lines of a text file, split by the hash of their numbers. Raises UserError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read --text {path}: {e}; expected a UTF-8 file with one utterance per line") from None
    texts = {f"line_{n:06d}": line for n, line in enumerate(dict.fromkeys(filter(None, lines)))}
    if len(texts) < 3:
        raise UserError(f"--text {path} has {len(texts)} distinct lines; expected at least 3: val and test take one each")
    splits = hash_splits(list(texts))
    return [Utterance(utt_id, text, splits[utt_id], text) for utt_id, text in texts.items()]


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder of the processed corpus")
    p.add_argument("--text", help="a file with one utterance per line, read instead of the grammar's sentences")
    p.add_argument("--train", type=int, default=4096, help="number of training sentences of the grammar")
    p.add_argument("--held-out", type=int, default=256, help="number of held-out ones, half val and half test")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--workers", type=int, help="number of processes; default: one per core")
    p.add_argument("--strict", action="store_true", help="refuse bad lines instead of skipping them")
    p.add_argument("--force", action="store_true", help="replace an existing corpus")
    args = parse_with_audio(p, argv)
    utterances = read_utterances(args.text) if args.text else grammar_utterances(args.train, args.held_out, args.seed)
    write_corpus(args.out, utterances, espeak_wav, args.cfg, args.workers, args.strict, args.force)


if __name__ == "__main__":
    run_cli(main)
