"""The embedded corpus: a small grammar's sentences, spoken by espeak-ng. No downloads, no recordings, one minute.

    python data/demo/prepare.py --out data/demo_bigvgan
    python data/demo/prepare.py --out data/mine_bigvgan --text lines.txt       # speak your own lines instead
"""
import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from config import Config, UserError, run_cli  # noqa: E402
from data import Utterance, hash_splits, write_corpus  # noqa: E402
from espeak import speak  # noqa: E402

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

    kind = rng.integers(5)
    if kind == 0:
        words = f"{someone()} {pick(ACTS)} {something()} {place()}"
    elif kind == 1:
        words = f"{someone()} {pick(MOVES)} {pick(MANNERS)} {place()}"
    elif kind == 2:
        words = f"{pick(TIMES)} {someone()} {pick(ACTS)} {something()}"
    elif kind == 3:
        words = f"{someone()} and {someone()} {pick(MOVES)} {place()}"
    else:
        words = f"{someone()} {pick(ACTS)} {something()} {pick(TIMES)}"
    return words[0].upper() + words[1:] + "."


def sentences(count: int, seed: int) -> list[str]:
    """`count` distinct sentences, the same for the same seed."""
    rng, seen = np.random.default_rng(seed), {}
    while len(seen) < count:
        seen[sentence(rng)] = None
    return list(seen)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True)
    p.add_argument("--text", help="a file with a line an utterance, spoken instead of the grammar's sentences")
    p.add_argument("--train", type=int, default=4096, help="training sentences of the grammar")
    p.add_argument("--held-out", type=int, default=256, help="held-out ones, half val and half test")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--workers", type=int, help="processes; default: one a core")
    p.add_argument("--strict", action="store_true", help="refuse bad lines instead of skipping them")
    p.add_argument("--force", action="store_true", help="replace an existing corpus")
    args = p.parse_args(argv)
    if args.text:
        try:
            lines = [line.strip() for line in Path(args.text).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"cannot read --text {args.text}: {e}; expected a UTF-8 file, a line an utterance") from None
        lines = list(dict.fromkeys(line for line in lines if line))
        if len(lines) < 3:
            raise UserError(f"--text {args.text} holds {len(lines)} distinct lines; expected at least 3, a line an "
                            "utterance: one each goes into val and test")
        ids = [f"line_{n:06d}" for n in range(len(lines))]
        split = hash_splits(ids)
        utterances = [Utterance(i, line, split[i], line) for i, line in zip(ids, lines)]
    else:
        if args.train < 1 or args.held_out < 2 or args.train + args.held_out > 100_000:
            raise UserError(f"--train {args.train} --held-out {args.held_out}: expected at least 1 and 2, and at most "
                            "100000 together")
        first_test, first_val = args.train + args.held_out // 2, args.train
        utterances = [Utterance(f"demo_{n:06d}", line,
                                "train" if n < first_val else "val" if n < first_test else "test", line)
                      for n, line in enumerate(sentences(args.train + args.held_out, args.seed))]
    write_corpus(args.out, utterances, speak, Config(), args.workers, args.strict, args.force)


if __name__ == "__main__":
    run_cli(main)
