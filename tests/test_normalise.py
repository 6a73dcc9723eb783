"""Text as typed to text as spoken: cases, laws, and the programs that use it."""
import dataclasses
import json
import re
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_model import small_model

import evaluator
import sample
from common import UserError
from config import Config
from corpus import Corpus, Utterance, write_corpus
from data import collate
from eval.hard import all_heard, read_hard_prompts
from normalise import as_spoken, fold, write_out
from text import read_sentences
from text_encoder import byte_tokens

ROMAN_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
CORPUS = " !',-.:;?" + ROMAN_LETTERS  # of a corpus whose numbers are spelled out
CASES = {
    "numbers": """
        I have 3 cats and 12 dogs. -> I have three cats and twelve dogs.
        There were 1,234 people. -> There were one thousand two hundred thirty-four people.
        It weighs 0.05 and not -5. -> It weighs zero point zero five and not minus five.
        The year 1984 was cold. -> The year nineteen eighty-four was cold.
        Agent 007 is in room 101. -> Agent zero zero seven is in room one oh one.
        Pages 10–20, 2-3 days. -> Pages ten to twenty, two to three days.
        10 x 10 = 100 -> Ten times ten equals one hundred
        Add 1/2 cup, then 3½ spoons. -> Add one half cup, then three and a half spoons.
        Open 24/7. -> Open twenty-four seven.
        Version 1.2.3, v2.0 -> Version one point two point three, version two point zero
        He won 3-1. -> He won three to one.
        5 - 3 = 2, write 500-1000 words -> Five minus three equals two, write five hundred to one thousand words
        The 2000s, .5 kg, +10000 -> The two thousands, zero point five kilograms, plus ten thousand
        Add 2 1/8 and 2 21/100. -> Add two and an eighth and two and twenty-one hundredths.
        An m² - - yes. -> An em squared, yes.
        Area: 5 m², ٣ cats. -> Area: five square meters, three cats.""",
    "money": """
        It costs $45.50. -> It costs forty-five dollars and fifty cents.
        £20 and €1 -> Twenty pounds and one euro
        $1.2 million was lost. -> One point two million dollars was lost.
        It was $0.99, not $1.00! -> It was ninety-nine cents, not one dollar!
        US$50, A$3 million, $.50 -> Fifty you ess dollars, three million Australian dollars, fifty cents
        AU$2 and CA$1 -> Two Australian dollars and one Canadian dollar
        Pay 20 USD or $3bn. -> Pay twenty dollars or three billion dollars.
        It costs $10-20, or $5/month. -> It costs ten dollars to twenty, or five dollars per month.""",
    "times and dates": """
        Come at 5 p.m. on Monday. -> Come at five pee em on Monday.
        Come at 5 p.m. Then eat. -> Come at five pee em. Then eat.
        From 9:05 am to 17:45 -> From nine oh five ay em to seventeen forty-five
        At 12:00 or 5:30pm. -> At twelve o'clock or five thirty pee em.
        Born on 12 March 1999. -> Born on the twelfth of March, nineteen ninety-nine.
        On March 3rd, 2021, it rained. -> On March third, twenty twenty-one, it rained.
        On Mon, Jan. 5 -> On Monday, January fifth
        2024-05-17 and 05/17/2024 -> May seventeenth, twenty twenty-four and May seventeenth, twenty twenty-four
        In the 1990s and the '60s. -> In the nineteen nineties and the sixties.
        We may march 5 miles. -> We may march five miles.""",
    "ordinals and units": """
        He came 1st, she came 22nd. -> He came first, she came twenty-second.
        Henry VIII saw World War II. -> Henry the eighth saw World War two.
        It is 3.5 km at 100 km/h. -> It is three point five kilometers at one hundred kilometers per hour.
        5'10" or 5 ft 6 in -> Five feet ten inches or five feet six inches
        -5°C, 1 kg, 50% -> Minus five degrees Celsius, one kilogram, fifty percent""",
    "abbreviations": """
        Dr. Smith lives at 221B Baker St. -> Doctor Smith lives at two twenty-one bee Baker Street.
        Hello Dr. Smith, I like Elm Dr. He saw Mount St. Helens. -> Hello Doctor Smith, I like Elm Drive. He saw Mount Saint Helens.
        Mr. and Mrs. Jones met St. John. -> Mister and Missus Jones met Saint John.
        Cats vs. dogs, e.g. Tom & co., etc. -> Cats versus dogs, for example Tom and co., et cetera.
        See p. 5, No. 7 and #8. No. -> See page five, number seven and number eight. No.
        J. K. Rowling wrote it. -> Jay kay Rowling wrote it.""",
    "acronyms and letters": """
        The U.S. and the USA signed. -> The you ess and the you ess ay signed.
        The FBI's CEO called NASA, OK? -> The eff bee eye's see ee oh called NASA, okay?
        MP3, 4G and COVID-19 -> Em pee three, four gee and COVID nineteen
        WARNING: DO NOT ENTER ROOM 5, I SAID -> Warning: do not enter room five, I said
        I did NOT say so. -> I did not say so.
        I ate it ALL, TOO. -> I ate it all, too.
        A -> Ay
        W? -> Double you?
        7 -> Seven
        Plan B, vitamin A, an A. -> Plan bee, vitamin ay, an ay.
        A man, a plan, I say. -> A man, a plan, I say.
        An x-ray of a T-shirt, isn't it? -> An ex-ray of a tee-shirt, isn't it?""",
    "addresses": """
        Visit www.example.com. -> Visit double you double you double you dot example dot com.
        See https://example.org/docs, now. -> See example dot org slash docs, now.
        Write to jane_doe2@mail.co.uk! -> Write to jane underscore doe two at mail dot see oh dot you kay!
        Call 555 0199. -> Call five five five, zero one nine nine.
        Call +1 (212) 555-0134. -> Call plus one, two one two, five five five, zero one three four.
        The zip code is 90210. -> The zip code is nine zero two one zero.""",
}


@pytest.mark.parametrize("group, line", [(group, line.strip()) for group, lines in CASES.items() for line in lines.split("\n") if line])
def test_what_is_spoken(group, line):
    typed, spoken = line.split(" -> ")
    assert write_out(typed) == spoken
    assert write_out(spoken) == spoken


def test_there_are_enough_cases():
    assert sum(lines.count("->") for lines in CASES.values()) >= 40


@pytest.mark.parametrize("typed, spoken", [
    ("“Stop it,” she said — and left…", "Stop it, she said, and left..."), ("It’s a dog – isn’t it", "It's a dog, isn't it."),
    ("The façade (a naïve one) fell.", "The facade, a naive one, fell."), ("Straße, Æsop and œuvre", "Strasse, Aesop and oeuvre."),
    ("ﬁne ｗｉｄｅ\u00a0words 🙂", "fine wide words."), ("He (Tom).", "He, Tom."), ("Привет", "Привет."), ("<b>Yes</b>", "bee Yes bee.")])
def test_characters_that_the_corpus_lacks_are_replaced(typed, spoken):
    assert as_spoken(typed, CORPUS) == spoken


def test_characters_of_the_corpus_stay():
    text = "“Café” — naïve… (é)"
    assert fold(text, CORPUS + "“”é—ï…()") == fold(text, "") == text
    assert fold("It’s “é”", ROMAN_LETTERS.lower() + "'") == "it's e"


@given(st.text(alphabet=CORPUS + "0123456789$£€%°&@#/()\"“”’—–…éüßÆ½²٣ #+=*x_", max_size=40))
@example("+1 212 555 0199")
@example("99/99/9999 99:99 0/0 $0.00 IIII. 1234567890123456789012345678901234567890")
def test_laws(text):
    spoken = as_spoken(text, CORPUS)
    if any(c.isalnum() for c in text):
        assert set(spoken) <= set(CORPUS) and any(c.isalnum() for c in spoken)
    assert any(c.isalnum() for c in text) == any(c.isalnum() for c in spoken)


@given(st.lists(st.sampled_from(" ".join(re.sub(" -> .*", "", lines) for lines in CASES.values()).split()), min_size=1, max_size=8))
def test_what_is_spoken_is_spoken_as_it_is(tokens):
    spoken = as_spoken(" ".join(tokens), CORPUS)
    assert as_spoken(spoken, CORPUS) == spoken


@given(st.text(max_size=60))
def test_no_text_is_refused(text):
    assert any(c.isalnum() for c in as_spoken(text, CORPUS)) == any(c.isalnum() for c in text)


@given(st.lists(st.from_regex("[a-z]{2,9}", fullmatch=True), min_size=1, max_size=8))
def test_plain_words_do_not_change(words):
    text = " ".join(words) + "."
    assert as_spoken(text, CORPUS) == text and as_spoken(text.capitalize(), CORPUS) == text.capitalize()


def test_a_long_text_takes_little_time_and_its_sentences_stay_whole():
    text = "Dr. Smith of the U.S. paid $45.50 for 3.5 kg at 5 p.m. Then he left. Write to jane@mail.com. " * 70
    assert len(text) > 6000
    start = time.process_time()
    spoken = [as_spoken(sentence, CORPUS) for sentence, _ in read_sentences([text])]
    assert time.process_time() - start < 1
    assert spoken[:3] == [
        "Doctor Smith of the you ess paid forty-five dollars and fifty cents for three point five kilograms at five pee em.",
        "Then he left.", "Write to jane at mail dot com."]


# --- the programs

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = small_model(block_size=256).eval()
    path = tmp_path_factory.mktemp("voice") / "latest.pt"
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg),
                "characters": CORPUS}, path)
    return path


def shown(checkpoint, tmp_path, capsys, *flags):
    sample.main(["--ckpt", str(checkpoint), "--text", "It’s 5 p.m. Pay $7.", "--out", str(tmp_path / "x.wav"), "--steps", "1",
                 "--vocoder", "griffinlim", "--device", "cpu", "--show_text", *flags])
    out, err = capsys.readouterr()
    return " ".join(line for line in out.splitlines() if "real-time" not in line), err


def test_sample_shows_what_it_speaks(checkpoint, tmp_path, capsys):
    spoken, messages = shown(checkpoint, tmp_path, capsys)
    assert spoken == "It's five pee em. Pay seven dollars." and "warning" not in messages
    assert shown(checkpoint, tmp_path, capsys, "--seconds", "1")[0] == spoken
    raw, warning = shown(checkpoint, tmp_path, capsys, "--no-normalise")
    assert raw == "It’s 5 p.m. Pay $7." and "do not contain '$' '5' '7' '’';" in warning
    ckpt = torch.load(checkpoint, weights_only=True)
    torch.save(ckpt | {"config": ckpt["config"] | {"normalise": False}}, tmp_path / "german.pt")
    assert shown(tmp_path / "german.pt", tmp_path, capsys)[0] == raw


def test_pieces_fit_as_they_are_spoken(checkpoint):
    model = small_model(block_size=256).eval()
    pieces = list(sample.read_pieces(model, [["It is " + "1234567, " * 8 + "1."]], characters=CORPUS, normalise=True))
    assert len(pieces) > 1 and all(sample.fits(model, piece.text) for piece in pieces)
    assert not any(c.isdigit() for piece in pieces for c in piece.text)


@pytest.mark.parametrize("normalise", ["true", "false"])
def test_evaluations_of_a_file_speak_the_words(checkpoint, tmp_path, normalise):
    (tmp_path / "prompts.txt").write_text("Pay $7.\nYes.\n")
    evaluator.main(["--ckpt", str(checkpoint), "--prompts", str(tmp_path / "prompts.txt"), "--out_dir", str(tmp_path / "out"),
                    "--eval_judge", "none", "--eval_steps", "1", "--eval_vocoder", "griffinlim", "--device", "cpu",
                    "--normalise", normalise])
    first, second = map(json.loads, (tmp_path / "out" / "wer.jsonl").read_text().splitlines())
    assert (first["reference"], second["reference"]) == ("Pay $7.", "Yes.") and "spoken" not in second
    assert first.get("spoken") == ("Pay seven dollars." if normalise == "true" else None)


# --- the table of hard lines

def test_the_hard_lines_can_be_heard(tmp_path):
    """If the judge wrote what was typed, or what is spoken, all words would be heard."""
    rows = read_hard_prompts("eval/hard_prompts.txt")
    groups = [group for group, _, _ in rows]
    assert len(rows) >= 60 and groups.count("letter") >= 8 and {"digit", "word", "money", "phone", "accent"} <= set(groups)
    assert len({text for _, text, _ in rows}) == len(rows)
    for group, text, words in rows:
        assert all_heard(words, as_spoken(text, CORPUS), group), (text, as_spoken(text, CORPUS))
        assert all_heard(words, text, group), text
        assert not all_heard(words, "", group) and not all_heard(words, "something else", group)
    (tmp_path / "bad.txt").write_text("number\tone two\n")
    with pytest.raises(UserError, match="expected in each line a group, a text and the words"):
        read_hard_prompts(str(tmp_path / "bad.txt"))


def test_words_are_heard_in_order_and_alone_in_some_groups():
    assert all_heard("five dollars", "It costs $5 now.", "money") and not all_heard("dollars five", "It costs $5.", "money")
    assert all_heard("b|bee", "B.", "letter") and not all_heard("b|bee", "It is B.", "letter")
    assert not all_heard("five five", "five", "number") and all_heard("five five", "55 5 5", "number")


def test_a_corpus_is_trained_and_evaluated_on_what_its_texts_mean(tmp_path):
    """The model reads the words that a typed text would become; the judge and the index keep the text as written."""
    texts = ["It costs $5.", "Room 12.", "Yes, it is.", "No."]
    utterances = [Utterance(f"u{n}", text, split, text) for n, (text, split) in enumerate(zip(texts, ("train", "train", "val", "test")))]
    write_corpus(str(tmp_path / "c"), utterances, lambda _, rate: np.random.default_rng(0).normal(size=20000).astype(np.float32) / 9,
                 Config(), workers=1)
    corpus = Corpus(str(tmp_path / "c"), Config())
    assert corpus.texts == texts and corpus.spoken == ["It costs five dollars.", "Room twelve.", "Yes, it is.", "No."]
    assert Corpus(str(tmp_path / "c"), Config(normalise=False)).spoken == texts
    batch = collate(corpus, [0], Config(mel_mean=0.0, mel_std=1.0), byte_tokens, 0)
    assert batch["tokens"][0].tolist() == byte_tokens("It costs five dollars.")
