"""Text as it is typed to text as it is spoken: numbers, dates, money, abbreviations and letters become English words.

    python normalise.py 'Dr. Smith paid $45.50.'     # prints: Doctor Smith paid forty-five dollars and fifty cents.

The texts of a corpus go the same way as those that are typed, so a voice is trained on the words that it will be given. A
few digits in its texts would not teach it all numbers. For another language set normalise: false in the run's config. The
characters of the voice's texts decide only which other characters are replaced (`fold`).

num2words spells the numbers, and the patterns are ours. wetext 0.1.8 was tried first. Of 78 lines it read 15 wrongly, such
as "$45.50", "1990s" and telephone numbers, and raised an error on two.
"""
import functools
import re
import sys
import unicodedata
from collections.abc import Callable

from num2words import num2words

LETTERS = dict(zip("abcdefghijklmnopqrstuvwxyz", "ay bee see dee ee eff gee aitch eye jay kay ell em en oh pee cue ar ess "
                   "tee you vee w ex why zee".split())) | {"w": "double you"}
DIGITS = "zero one two three four five six seven eight nine".split()
MONTHS = "January February March April May June July August September October November December".split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
# One currency unit, several, one hundredth, several
MONEY = {"$": "dollar dollars cent cents", "US$": "US_dollar US_dollars cent cents",
         "C$": "Canadian_dollar Canadian_dollars cent cents", "A$": "Australian_dollar Australian_dollars cent cents",
         "NZ$": "New_Zealand_dollar New_Zealand_dollars cent cents", "HK$": "Hong_Kong_dollar Hong_Kong_dollars cent cents",
         "£": "pound pounds penny pence", "€": "euro euros cent cents",
         "¥": "yen yen sen sen", "₹": "rupee rupees paisa paise"}
SIGNS = "$£€¥₹"
CODES = {"USD": "$", "GBP": "£", "EUR": "€", "JPY": "¥", "INR": "₹"}
SCALES = {"k": "thousand", "K": "thousand", "m": "million", "M": "million", "mn": "million", "bn": "billion", "B": "billion",
          "b": "billion", "tn": "trillion", "T": "trillion"}
# unit: one, several
UNITS = {"%": "percent percent", "°C": "degree_Celsius degrees_Celsius", "°F": "degree_Fahrenheit degrees_Fahrenheit",
         "°": "degree degrees", "km/h": "kilometer_per_hour kilometers_per_hour", "mph": "mile_per_hour miles_per_hour",
         "m/s": "meter_per_second meters_per_second", "km²": "square_kilometer square_kilometers",
         "m²": "square_meter square_meters", "m³": "cubic_meter cubic_meters", "sq ft": "square_foot square_feet",
         "km": "kilometer kilometers", "cm": "centimeter centimeters", "mm": "millimeter millimeters",
         "m": "meter meters", "mi": "mile miles", "ft": "foot feet", "yd": "yard yards", "kg": "kilogram kilograms",
         "mg": "milligram milligrams", "g": "gram grams", "lb": "pound pounds", "lbs": "pound pounds", "oz": "ounce ounces",
         "ml": "milliliter milliliters", "mL": "milliliter milliliters", "l": "liter liters", "L": "liter liters",
         "GB": "gigabyte gigabytes", "MB": "megabyte megabytes", "KB": "kilobyte kilobytes", "kB": "kilobyte kilobytes",
         "TB": "terabyte terabytes", "Hz": "hertz hertz", "kHz": "kilohertz kilohertz", "MHz": "megahertz megahertz",
         "GHz": "gigahertz gigahertz", "kWh": "kilowatt_hour kilowatt_hours", "kW": "kilowatt kilowatts", "W": "watt watts",
         "V": "volt volts", "ms": "millisecond milliseconds", "sec": "second seconds", "s": "second seconds",
         "min": "minute minutes", "hrs": "hour hours", "hr": "hour hours", "h": "hour hours"}
FRACTIONS = {2: "half halves", 3: "third thirds", 4: "quarter quarters", 5: "fifth fifths", 6: "sixth sixths",
             8: "eighth eighths", 10: "tenth tenths", 16: "sixteenth sixteenths", 100: "hundredth hundredths"}
# Abbreviations with a full stop. At the end of the text the full stop stays.
ABBREVIATIONS = {"Mr": "Mister", "Mrs": "Missus", "Ms": "Miz", "Prof": "Professor", "Gen": "General", "Col": "Colonel",
                 "Capt": "Captain", "Lt": "Lieutenant", "Sgt": "Sergeant", "Rev": "Reverend", "Hon": "Honorable",
                 "Gov": "Governor", "Sen": "Senator", "Rep": "Representative", "Pres": "President", "Jr": "Junior",
                 "Sr": "Senior", "Ave": "Avenue", "Blvd": "Boulevard", "Rd": "Road", "Ln": "Lane", "Hwy": "Highway",
                 "Mt": "Mount", "lbs": "pounds", "vol": "volume", "vs": "versus", "etc": "et cetera", "e.g": "for example",
                 "i.e": "that is", "approx": "approximately", "dept": "department",
                 "Dept": "Department", "Inc": "Incorporated", "Ltd": "Limited", "Corp": "Corporation",
                 "Co": "Company", "et al": "and others", "cf": "compare", "est": "established", "Ph.D": "pee aitch dee"}
BEFORE_NUMBERS = {"No": "number", "no": "number", "Nos": "numbers", "nos": "numbers", "Vol": "volume", "vol": "volume",
                  "pp": "pages", "p": "page", "Fig": "figure", "fig": "figure", "Ch": "chapter", "ch": "chapter",
                  "Sec": "section", "sec": "section", "Apt": "apartment", "apt": "apartment", "ext": "extension"}
# Words in capitals that are no acronyms, among those short enough to look like one
SHORT_WORDS = set("act add age ago aim air all am an and any are arm art as ask at ate bad bag bar bat be bed bet big bit "
                  "box boy bug bus but buy by bye can cap car cat cow cry cup cut dad day did die dig do dog don dot due "
                  "ear eat egg end era eye fan far fat fee few fit fix fly fog for fun fur gap gas get go got gun guy had "
                  "has hat he her hey hi hid him his hit hot how hug ice if ill in ink inn is it its jam jar jet job joy "
                  "key kid lab law lay leg let lid lie lip log lot low mad man may me men mix mom mud mum my net new no nod "
                  "nor not now nut odd of off oh oil ok old on one or our out owe own pan pay pen pet pie pig pit pop pot "
                  "put raw ray red rib rid rob rod row rub rug run sad said saw say sea see set she sir sit six sky so son "
                  "stop sum sun tag tap tax tea ten the they this tie tin tip to toe ton too top toy try two up use war was "
                  "way we wet who why win with won yes yet you your zip zoo".split())
SAID_AS_WORDS = set("nasa nato aids gif ram rom pin sim opec fifa unesco unicef covid laser radar".split())
SPELLED = set("ymca yaml aarp asap ieee iphone api usa usb url uae eu uk us un id ai io ui ip ac".split())
# Words with a capital that stand before a saint, and not before a street's "St."
BEFORE_SAINTS = set("Mount Fort Port Lake Cape In At To From Near Visit Is Was And But Or Of On By With For As Dear Ask "
                    "Call See Meet Thanks".split())
LETTER_FOLLOWS = ("plan|vitamin|type|grade|option|section|group|letter|class|exhibit|gate|platform|part|point|row|team|unit|"
                  "appendix|answer|drive|block|size|note|hepatitis|apartment|building|terminal|zone|line|model")
TOP_LEVEL = "com org net edu gov io co uk de fr eu us info dev ai tv me ca au nl ch app".split()
SOME_MONTH = "(" + "|".join(f"{m}|{m[:3]}\\.?" for m in MONTHS).replace("Sep\\.?", "Sept?\\.?") + ")"
AMOUNT = r"([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)"
SENTENCE_BEGINS = r"(?:Then|The|He|She|It|We|They|I|But|And|You|This|That)\b"
MONARCHS = "Henry|Edward|George|Louis|Charles|William|Elizabeth|James|Richard|John|Paul|Pius|Philip|Napoleon|Frederick"


# --- numbers

def digit_by_digit(text: str) -> str:
    return " ".join(DIGITS[int(c)] for c in text if c in "0123456789")


def american(words: str) -> str:
    """num2words' English without commas and without "and": two hundred five."""
    return words.replace(",", "").replace(" and ", " ")


def cardinal(text: str) -> str:
    """Digits, with commas between thousands and a decimal point or not, as words."""
    whole, point, decimals = text.replace(",", "").partition(".")
    plain = len(whole) > 1 and whole[0] == "0" or len(whole) > 15  # a code rather than a quantity
    words = digit_by_digit(whole) if plain else american(num2words(int(whole)))
    return f"{words} point {digit_by_digit(decimals)}" if point else words


def plain_digits(c: str) -> str:
    """A numeral such as ½ or a digit of another script in the digits 0 to 9."""
    return str(unicodedata.decimal(c)) if c.isdecimal() else unicodedata.normalize("NFKC", c).replace("⁄", "/")


def ordinal(number: int) -> str:
    return american(num2words(number, to="ordinal"))


def year(text: str) -> str:
    return american(num2words(int(text), to="year"))


def in_pairs(text: str) -> str:
    """The number of a house, room or flight: 221 as two twenty-one, 101 as one oh one, 2490 as twenty-four ninety."""
    if len(text) not in (3, 4) or text[0] == "0" or text.endswith("00"):
        return cardinal(text) if len(text) < 5 else digit_by_digit(text)
    last = "oh " + DIGITS[int(text[-1])] if text[-2] == "0" else cardinal(text[-2:])
    return f"{cardinal(text[:-2])} {last}"


def count(amount: str, words: str) -> str:
    """An amount with "one several" of what is counted, for example "foot feet"."""
    one, several = words.split()
    return f"{cardinal(amount)} {one if amount == '1' else several}".replace("_", " ")


# --- letters, addresses

def spell(text: str) -> str:
    """The names of the letters and digits of a text."""
    return " ".join(LETTERS.get(c) or DIGITS[int(c)] for c in text.lower() if c in LETTERS or c in "0123456789")


def say_label(label: str) -> str:
    """A part of an address: digits one by one, letters as a word if they look like one."""
    marks = {".": "dot", "-": "dash", "_": "underscore", "/": "slash", "+": "plus", "@": "at", ":": "colon",
             "?": "question mark", "=": "equals", "&": "and", "#": "hash", "%": "percent", "~": "tilde"}
    parts = re.findall(r"[A-Za-z]+|[0-9]|.", label)
    said = (marks.get(p) or (p if len(p) > 2 and re.search("[aeiouy]", p.lower()) else spell(p)) for p in parts)
    return " ".join(said)


def address(m: re.Match) -> str:
    text = m[0].rstrip("/.-")
    said = say_label(re.sub("^https?://", "", text, flags=re.IGNORECASE))
    return said + m[0][len(text):].replace("/", "")


def acronym(m: re.Match) -> str:
    """A word in capitals, in a text that is not all capitals: spelled, unless it can be read as a word.

    Other words are written in small letters, because corpora have few in capitals. NASA and its like stay.
    """
    word, ending = m[1].lower(), m[2] or ""
    if word == "ok":
        return "okay" + ending
    if word in SAID_AS_WORDS:
        return m[0]
    if word in SHORT_WORDS and not ending:
        return word
    spelled = word in SPELLED or len(word) < 4 or not re.search("[aeiouy]", word)
    return (spell(word) if spelled else word.capitalize()) + ending


def calm(text: str) -> str:
    """A text in capitals for emphasis in small letters. Only what cannot be a word is spelled."""
    text = re.sub(r"\b(?:[B-DF-HJ-NP-TV-XZ]{2,}|FBI|CIA|USA|UK|EU|CEO)\b", lambda m: spell(m[0]), text)
    return re.sub(r"\bi\b", "I", text.lower())


# --- what a match becomes

def money(m: re.Match) -> str:
    one, several, cent, cents = MONEY[m[1]].split()
    whole, _, part = m[2].partition(".")
    if m[3]:
        return f"{cardinal(m[2])} {SCALES.get(m[3], m[3].lower())} {several}".replace("_", " ")
    if len(part) != 2:
        return count(m[2], f"{one} {several}")
    parts = [count(whole, f"{one} {several}")] if whole.strip("0,") or not int(part) else []
    parts += [count(part.lstrip("0"), f"{cent} {cents}")] if int(part) else []
    return " and ".join(parts)


def clock(m: re.Match) -> str:
    hour, minute, second, half = m[1], m[2] or "00", m[3], m[4]
    if int(hour) > 24 or int(minute) > 59:
        return m[0].replace(":", " ")
    words = cardinal(str(int(hour)))
    if minute != "00" or second:
        words += " " + (f"oh {DIGITS[int(minute[1])]}" if minute[0] == "0" else cardinal(minute))
    elif not half:
        words += " o'clock" if 1 <= int(hour) <= 12 else " hundred"
    words += f" and {count(str(int(second)), 'second seconds')}" if second else ""
    return words + (f" {spell(half[0])} em" if half else "") + full_stop(m, rf"(?!{'|'.join(WEEKDAYS + MONTHS)})[A-Z][a-z]")


def full_stop(m: re.Match, next_sentence: str = SENTENCE_BEGINS) -> str:
    """The full stop of an abbreviation, if a sentence ends with it."""
    ends = re.match(rf"[\"'”’)\s]*$|\s+{next_sentence}", m.string[m.end():])
    return "." if m[0].endswith(".") and ends else ""


def date(day: str, month: int, year_: str | None) -> str:
    return f"{MONTHS[month - 1]} {ordinal(int(day))}" + (f", {year(year_)}" if year_ else "")


def month_number(name: str) -> int:
    return next(n for n, month in enumerate(MONTHS, 1) if month.startswith(name[:3]))


def numeric_date(m: re.Match) -> str:
    """2024-05-17, or 5/17/2024 in the American order, or 17/5/2024 where that is the only way."""
    y, a, b = (m[1], m[2], m[3]) if m[1] else (m[6], m[4], m[5])
    month, day = (int(b), int(a)) if not m[1] and int(a) > 12 else (int(a), int(b))
    return date(str(day), month, y) if 1 <= month <= 12 and 1 <= day <= 31 else f"{int(a)} {int(b)} {int(y)}"


def decade(m: re.Match) -> str:
    if m[1] == "20" and m[2] == "0":
        return "two thousands"
    tens = cardinal(m[2] + "0").removesuffix("y") + "ies" if m[2] not in "01" else {"0": "hundreds", "1": "tens"}[m[2]]
    return f"{cardinal(m[1])} {tens}" if m[1] else tens


def fraction(m: re.Match) -> str:
    whole, over, under = m[1], int(m[2]), int(m[3])
    if (m[2], m[3]) in (("24", "7"), ("9", "11"), ("50", "50")):
        return f"{cardinal(m[2])} {cardinal(m[3])}"
    if under not in FRACTIONS or not 0 < over < under:
        return f"{whole or ''}{cardinal(m[2])} over {cardinal(m[3])}"
    one, several = FRACTIONS[under].split()
    article = "one" if not whole else "an" if one == "eighth" else "a"
    part = f"{cardinal(m[2])} {several}" if over > 1 else f"{article} {one}"
    return f"{cardinal(whole.strip())} and {part}" if whole else part


def roman(m: re.Match) -> str:
    values = [{"I": 1, "V": 5, "X": 10}[c] for c in m[2]]
    number = sum(-v if v < max(values[i:]) else v for i, v in enumerate(values))
    return f"{m[1]} the {ordinal(number)}" if re.fullmatch(MONARCHS, m[1]) else f"{m[1]} {cardinal(str(number))}"


def mixed(m: re.Match) -> str:
    """Letters and digits in one word, for example 221B, MP3 or A4."""
    return " ".join(in_pairs(p) if p.isdigit() else spell(p) if p.isupper() or len(p) == 1 else p
                    for p in re.findall("[A-Za-z]+|[0-9]+", m[0]))


def street_or_saint(m: re.Match) -> str:
    """A street or drive after a word with a capital, unless a name follows a doctor, or a saint's after BEFORE_SAINTS."""
    names, rest = {"St": ("Saint", "Street"), "Dr": ("Doctor", "Drive")}[m[2]], m.string[m.end():]
    before_name = re.match(rf"\s+(?!{SENTENCE_BEGINS})[A-Z]", rest)
    street = m[1] and not (before_name and (m[2] == "Dr" or m[1].strip() in BEFORE_SAINTS))
    return (m[1] or "") + (names[1] + full_stop(m, "[A-Z]") if street else names[0])


def telephone(m: re.Match) -> str:
    groups = re.findall("[0-9]+", m[0])
    if len("".join(groups)) < 7 or re.fullmatch("[0-9](00|50)-[0-9]{2}00", m[0]):  # +10000; 500-1000 words
        return m[0]
    return ("plus " if m[0].startswith("+") else "") + ", ".join(map(digit_by_digit, groups))


# The order matters: a rule sees what the rules before it left.
RULES: list[tuple[str, str | Callable]] = [
    (r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+", address),
    (r"\b(?:https?://|www\.)[^\s,;!?\"'()<>]*[^\s,;.:!?\"'()<>]", address),
    (rf"\b(?:[A-Za-z0-9-]+\.)+(?:{'|'.join(TOP_LEVEL)})\b(?:/[^\s,;!?\"'()<>]*[^\s,;.:!?\"'()<>])?(?![\w@])", address),
    (r"(?<![\w.])\.(?=[0-9])", "0."),
    (rf"(?<![\w.,{SIGNS}-])(?:\+[0-9]{{1,3}}[ -]?|1-)?(?:\([0-9]{{3}}\) ?|[0-9]{{3}}[ .-])?[0-9]{{3}}[ .-][0-9]{{4}}"
     r"(?![\w-]|[.,][0-9])", telephone),
    (r"\+[0-9]{1,3}(?:[ -]?[0-9]{2,4}){2,4}(?!\w)", telephone),
    (r"(?i)\b((?:zip|code|pin|account|extension)(?: code| number)?(?: is)?) ([0-9]{3,})\b",
     lambda m: f"{m[1]} {digit_by_digit(m[2])}"),
    (r"\b([Cc]all|[Dd]ial) ([0-9]{3})\b", lambda m: f"{m[1]} {digit_by_digit(m[2])}"),
    (r"\bAT&T\b", "ay tee and tee"),
    (r"_+", " "),
    # ranges of times, and ages
    (r"(?<=[0-9]) ?[-–] ?(?=[0-9]{1,2}(?::[0-9]{2})?(?: ?[AaPp]\.?[Mm]\b| ?o'clock))", " to "),
    (r"(?<=[0-9]:[0-9]{2}) ?[-–] ?(?=[0-9]{1,2}:)", " to "),
    (r"(?<=[0-9])-(?=[a-z]{3})", " "),
    # dates and times
    (r"(?<![\w/-])(?:([0-9]{4})-([0-9]{1,2})-([0-9]{1,2})|([0-9]{1,2})/([0-9]{1,2})/([0-9]{4}))(?![\w/-])", numeric_date),
    (rf"\b({'|'.join(d[:3] for d in WEEKDAYS)})\.?(?=,? (?:[0-9]|{SOME_MONTH}))",
     lambda m: next(d for d in WEEKDAYS if d.startswith(m[1]))),
    (rf"\b{SOME_MONTH} ([0-9]{{1,2}})(?:st|nd|rd|th)?(?:,? ([0-9]{{4}}))?(?![\w:])",
     lambda m: date(m[2], month_number(m[1]), m[3])),
    (rf"\b(?:the )?([0-9]{{1,2}})(?:st|nd|rd|th)?(?: of)? {SOME_MONTH}(?:,? ([0-9]{{4}}))?(?!\w)",
     lambda m: f"the {ordinal(int(m[1]))} of {MONTHS[month_number(m[2]) - 1]}" + (f", {year(m[3])}" if m[3] else "")),
    (rf"\b{SOME_MONTH}\.? ([0-9]{{4}})\b", lambda m: f"{MONTHS[month_number(m[1]) - 1]} {year(m[2])}"),
    (r"\b([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?(?: ?([AaPp])\.?[Mm]\b\.?)?(?![0-9])", clock),
    (r"\b([0-9]{1,2})()() ?([AaPp])\.?[Mm]\b\.?", clock),
    (r"(?<!\w)['’]?(1[0-9]|20)?([0-9])0['’]?s\b", decade),
    # money and units
    (r"(?<=[0-9]) - (?=[0-9.,]+ ?=)", " minus "),
    (rf"(?<=[0-9%]) ?[-–] ?(?=[{SIGNS}]?[0-9])", " to "),
    (rf"\b({'|'.join(CODES)}) ?{AMOUNT}", lambda m: CODES[m[1]] + m[2]),
    (rf"(?<![\w.]){AMOUNT} ?({'|'.join(CODES)})\b", lambda m: CODES[m[2]] + m[1]),
    (rf"(?<!\w)-(?=[{SIGNS}][0-9])|(?<![\w)])[-−](?={AMOUNT})", "minus "),
    (rf"\b([Aa]n? )\$({AMOUNT})(?= [a-z])", lambda m: f"{m[1]}{cardinal(m[2])} dollar"),  # a $100 bill
    (r"\b(?:CA|AU)(?=\$)", lambda m: m[0][0]),
    (rf"((?<!\w)(?:US|C|A|NZ|HK)\$|[{SIGNS}]) ?{AMOUNT}(?: ?(thousand|million|billion|trillion|k|K|mn|m|M|bn|b|B|tn|T)\b)?",
     money),
    (rf"(?<![\w.]){AMOUNT}¢", lambda m: count(m[1], "cent cents")),
    (r"(?<![\w/.])([0-9]+ )?([0-9]{1,3})/([0-9]{1,3})(?![\w/])", fraction),
    (r"(?<!\w)([0-9]+)(?:['’]([0-9]{1,2})(?!\w)[\"”]?|(?: ?ft\.? )([0-9]{1,2})(?:\"|”| ?in\b))",
     lambda m: f"{count(m[1], 'foot feet')} {count(m[2] or m[3], 'inch inches')}"),
    (rf"(?<![\w.]){AMOUNT}[ \u00a0-]?({'|'.join(sorted(map(re.escape, UNITS), key=len, reverse=True))})(?![\w/])",
     lambda m: count(m[1], UNITS[m[2]])),
    (r"\b((?:dollars?|euros?|pounds?|cents?|miles?|meters?))/(?=[a-z])", lambda m: f"{m[1]} per "),
    # numbers with a word beside them
    (r"(?:#|№ ?)(?=[0-9])", "number "),
    (rf"\b({'|'.join(BEFORE_NUMBERS)})\. ?(?=[0-9])", lambda m: BEFORE_NUMBERS[m[1]] + " "),
    (r"\b([Rr]oom|[Ff]light|[Ss]uite|[Hh]ighway|[Rr]oute|[Bb]us|[Gg]ate|[Aa]partment)( is)? ([0-9]{3,})\b",
     lambda m: f"{m[1]}{m[2] or ''} {in_pairs(m[3])}"),
    (r"\b([0-9]{3,4})(?= (?:[A-Z][a-z]+ )+(?:St|Street|Rd|Road|Ave|Avenue|Ln|Lane|Dr|Drive|Blvd|Boulevard)\b)",
     lambda m: in_pairs(m[1])),
    (r"\b([0-9][0-9,]*)(?:st|nd|rd|th)\b", lambda m: ordinal(int(m[1].replace(",", "")[:15]))),
    (r"\b[vV](?:\. ?)?(?=[0-9]+\.[0-9])", "version "),
    (r"\b([0-9]+(?:\.[0-9]+){2,})\b", lambda m: " point ".join(map(cardinal, m[1].split(".")))),
    (r"\b(?:[A-Za-z]+[0-9]+|[0-9]+[A-Za-z]+)(?:[A-Za-z0-9])*\b", mixed),
    (r"(?<=[0-9]) ?[x×*] ?(?=[0-9])", " times "),
    (r"(?<=[0-9]) ?\+ ?(?=[0-9])|(?<![\w)])\+(?=[0-9])", " plus "),
    (r"(?<=[0-9]) ?÷ ?(?=[0-9])", " divided by "),
    (r"(?<![\w.,])(1[1-9][0-9]{2}|20[0-9]{2})(?!\w|[.,][0-9])", lambda m: year(m[1])),
    (r"(?<=[A-Za-z])[-–](?=[0-9])", " "),
    (AMOUNT, lambda m: f" {cardinal(m[1])} "),
    # abbreviations, acronyms, letters
    (r"(\b[A-Z][a-z]+(?:['’]s)? )?\b(St|Dr)\.(?!\w)", street_or_saint),
    (rf"\b({'|'.join(map(re.escape, ABBREVIATIONS))})\.(?!\w)", lambda m: ABBREVIATIONS[m[1]] + full_stop(m)),
    (r"\b(?:[A-Za-z]\.){2,}(?!\w)", lambda m: spell(m[0]) + full_stop(m)),
    (r"\b(A)\. (?=[A-Z]\. )|\b([B-HJ-Z])\. (?=[A-Z])", lambda m: spell(m[1] or m[2]) + " "),
    ("²", " squared"), ("³", " cubed"),
    (r"\bw/o\b", "without"), (r"\bw/(?=\s|\w)", "with "),
    (r"\b([A-Z][a-z]+) ([IVX]{2,5}|V)\b", roman),
    (rf"(?i)\b((?:{LETTER_FOLLOWS})) ((?-i:A))\b(?! )", lambda m: f"{m[1]} ay"),
    (r"\b(an?) A\b(?= ?[.,;!?]|$)", lambda m: f"{m[1]} ay"),
    (r"(?<![\w'’.])([B-HJ-NP-Zb-hj-np-z])(?=-[a-z]{2}|(?![\w'’-]))", lambda m: spell(m[1])),
    (r" ?& ?", " and "),
    (r" ?@ ?", " at "), (r" ?= ?", " equals "), (r"%", " percent"), (r"(?<=\w) \+ (?=\w)", " plus "),
    (r"(?: +(?:-{1,3}|–))+ +| ?-{2,3} ?", ", "),
]
PATTERNS = [(re.compile(pattern), becomes) for pattern, becomes in RULES]
ACRONYM = re.compile(r"\b([A-Z]{2,})((?<=[A-Z])['’]?s)?\b(?!['’][A-Z])")


def shouts(text: str) -> bool:
    """Whether a text is in capitals for emphasis, and not an acronym."""
    words = [word.lower() for word in re.findall("[A-Z]{2,}", text) if word.lower() not in SAID_AS_WORDS | SPELLED]
    return not re.search("[a-z]", text) and any(len(word) > 4 or word in SHORT_WORDS for word in words)


def write_out(text: str) -> str:
    """An English text with all that is not a word written as words. What is in words already does not change."""
    typed, loud = text, shouts(text)
    if len(alone := re.sub(r"[\W_]", "", text)) == 1 and alone.lower() in LETTERS:
        text = text.replace(alone, spell(alone))
    text = re.sub(r"(?<=[0-9])(?=[¼½¾⅓⅔⅛])", " ", text)
    text = "".join(plain_digits(c) if c.isnumeric() and c not in "0123456789²³" else c for c in text)
    for pattern, becomes in PATTERNS:
        text = pattern.sub(becomes, text)
    text = calm(text) if loud else ACRONYM.sub(acronym, text)
    text = re.sub(r" +(?=[.,;:!?](?:\s|$))", "", re.sub(" {2,}", " ", text)).strip()
    return text if typed[:1].islower() else text[:1].upper() + text[1:]  # "7 of them" begins a sentence as words do


# --- characters

# What may stand for a character, best first. Brackets and dashes are heard as pauses, quotes not at all.
STANDS_FOR = {c: options for chars, options in {
    "‘’‛`´′ʼ": ("'", ""), "“”„‟″«»": ('"', ""), '"': ("",), "'": ("’", ""), "–—―": (", ", " "), "‐‑‒−": ("-", " "),
    "-": (" ",),
    "…": ("...", "."), "()[]{}": (", ", " "), ";": (",", ""), ":": (",", ""), "!": (".", ""), "?": (".", ""), ".,": ("",),
    "ß": ("ss",), "æ": ("ae",), "Æ": ("Ae",), "œ": ("oe",), "Œ": ("Oe",), "ø": ("o",), "Ø": ("O",), "ł": ("l",), "Ł": ("L",),
    "đð": ("d",), "ĐÐ": ("D",), "þ": ("th",), "Þ": ("Th",), "ı": ("i",)}.items() for c in chars}


@functools.lru_cache(4096)
def nearest(c: str, known: frozenset) -> str:
    """What stands for a character among the known ones: its like, its base letter, its other case, or nothing for a mark.

    The letters of other scripts have nothing that stands for them and come back as they are.
    """
    base = "".join(d for d in unicodedata.normalize("NFKD", c) if not unicodedata.combining(d))
    options = (c, *STANDS_FOR.get(c, ()), unicodedata.normalize("NFKC", c), base, c.swapcase(), base.swapcase())
    for option in options:
        if known.issuperset(option) and (option or c in STANDS_FOR):
            return option
    return c if c.isalnum() else "" if unicodedata.category(c)[0] == "M" else " "


def fold(text: str, characters: str) -> str:
    """A text in which the nearest of the corpus's `characters` stand for those that the corpus does not have."""
    known = frozenset(characters + " ")
    if not characters or known.issuperset(text):
        return text
    folded = "".join(nearest(c, known) for c in text)
    folded = re.sub(r" +(?=[.,;:!?])", "", re.sub(r"\s+", " ", folded))
    return re.sub(r",(?=[.,;:!?])|^[, ]+|[, ]+$", "", folded)


def as_spoken(text: str, characters: str = "") -> str:
    """What a voice should say for an English text. `characters` are those of the texts that it learned from, if known.

    A text without an end gets a full stop, as texts in corpora have. Words like "Yes" alone are too short without it.
    """
    plain = "".join(fold(c, characters) if c.isalpha() and not c.isascii() else c for c in text)
    spoken = fold(write_out(plain), characters)
    if not any(c.isalnum() for c in spoken):
        return text
    return spoken + "." if spoken[-1].isalnum() and "." in characters else spoken


if __name__ == "__main__":
    print(as_spoken(" ".join(sys.argv[1:])))
