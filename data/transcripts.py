"""Tables of recordings and their texts, of any layout: one of the folder's files, its separator, and what each column is.

One rule decides most of it: the column of the recordings is the one whose cells name sounds that lie below the folder. The
table is the file, and its separator the one, with which most sounds are named. What cannot be told that way is asked for in
one line. The answer is a flag of data/folder/prepare.py.

`find(cell)` is everywhere here the list of sounds that a cell can mean (recordings.find_sounds).
"""
import codecs
import csv
import json
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from common import UserError, first_line
from recordings import describe, is_sound

TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".list")
SEPARATORS = ("|", "\t", "==", ";", ",", "=", ":", " - ", " ")
QUOTING = (";", ",")  # with these, a field can stand in quotation marks. Not with bars: LJSpeech's texts have stray ones
ONCE = ("==", "=", ":", " - ", " ")  # these are common in texts, so only the first one of a line separates
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # UTF-16's mark is the beginning of UTF-32's
NAMES = {  # of columns in a header and of keys in JSON. Which column is the audio, its cells tell; its name tells a header
    "text": "text transcript transcription transcript_text sentence utterance prompt raw_text normalized_text "
            "normalised_text text_normalized normalized_transcription transcription_normalised transcription_normalized",
    "speaker": "speaker speaker_id speaker_name spk spk_id client_id",
    "-": "audio audio_file audio_path audio_filepath audio_filename file file_name filename filepath file_path path wav "
         "wav_file wav_path wav_filename sound clip recording id utt_id name duration",
}
ROLES = {name: role for role, names in NAMES.items() for name in names.split()}


@dataclass
class Table:
    """A table's rows as (line number, cells), its header or None, and the column that names the sounds."""
    separator: str
    rows: list[tuple[int, list[str]]]
    lines: dict[int, str]  # the rows' lines as they are
    header: list[str] | None
    audio: int
    named: int  # number of different sounds in that column


# --- text files

def read_text(path: Path, encoding: str | None = None) -> str:
    """A text file in the encoding that its byte order mark tells, else in UTF-8, unless `encoding` is given.

    Raises UserError, which asks for --encoding if the bytes are of another one.
    """
    try:
        raw = path.read_bytes()
        guess = next((name for mark, name in BOMS.items() if raw.startswith(mark)), "utf-8")
        if not encoding and guess == "utf-8" and b"\0" in raw:
            raise UserError(f"{path} is not UTF-8 text: it has zero bytes. If it is text, write --encoding "
                            f"utf-16-{'be' if raw[0] == 0 else 'le'}")
        return raw.decode(encoding or guess).removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        line = raw.rfind(b"\n", 0, e.start) + 1
        some = raw[max(line, e.start - 40):e.start + 40].split(b"\n")[0].strip()
        old = "cp1252" if re.search(rb"[\x80-\x9f]", raw) else "latin-1"
        raise UserError(f"{path}, line {raw.count(10, 0, e.start) + 1}: byte 0x{raw[e.start]:02x} is not "
                        f"{e.encoding.upper()}. Write --encoding {old} if {some.decode(old, 'replace')!r} is right, else "
                        "the name of the right encoding") from None
    except (OSError, LookupError, UnicodeError) as e:
        raise UserError(f"{path} cannot be read: {first_line(e)}; expected a text file, and as --encoding a name such as "
                        "utf-8, utf-16 or latin-1") from None


def text_lines(text: str) -> dict[int, str]:
    """number -> line, without empty ones. Not by str.splitlines, which also ends lines at U+2028 and the like."""
    lines = text.split("\n" if "\n" in text else "\r")
    return {number: line.strip("\r") for number, line in enumerate(lines, 1) if line.strip()}


def read_transcript(path: Path, encoding: str | None) -> str:
    """The text of a file that lies beside its sound. Raises UserError if it cannot be read or lists times."""
    text = read_text(path, encoding)
    lines = list(text_lines(text).values())
    if path.suffix.lower() == ".lab" and lines and all(re.match(r"\s*\d[\d.]*\s+\d", line) for line in lines):
        raise UserError(f"{path}: {lines[0]!r:.80} is a label with its times; expected the text that is spoken. Write "
                        "--metadata FILE if there is a table of texts")
    return text


# --- from text to rows

def split_line(line: str, separator: str) -> list[str]:
    """A line's cells. Raises csv.Error for a quotation mark that is not closed, or is closed before the field's end."""
    if separator in QUOTING:
        cells = next(csv.reader([line.strip()], delimiter=separator, strict=True, skipinitialspace=True))
    else:
        cells = line.split(separator, 1 if separator in ONCE else -1)
        if separator == "\t":  # spreadsheets quote a cell that has quotation marks, and double those
            cells = [cell[1:-1].replace('""', '"') if re.fullmatch(r'"([^"]|"")*"', cell) else cell for cell in cells]
    return [cell.strip() for cell in cells]


def read_json(path: Path, text: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The keys, and the rows of their values, of one JSON object a line, or of a list of objects. Raises UserError."""
    number, items = 1, {}
    try:
        if text.lstrip().startswith("["):
            items = dict(enumerate(json.loads(text), 1))
        else:
            for number, line in text_lines(text).items():
                items[number] = json.loads(line)
        keys = list(dict.fromkeys(name for number, item in items.items() for name in item.keys()))
    except (ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}, line {number}: {first_line(e)}; expected one JSON object in each line, such as "
                        '{"audio_filepath": "x.wav", "text": "Hello."}') from None

    def cell(value) -> str:
        value = value.get("path") if isinstance(value, dict) else value
        return "" if value is None else str(value).strip()
    return keys, [(number, [cell(item.get(name)) for name in keys]) for number, item in items.items()]


def audio_column(rows: list[tuple[int, list[str]]], find) -> tuple[int, int, int]:
    """Of the best column: how many different sounds it names, how many cells have a sound's extension, and -column."""
    named, in_full = defaultdict(set), Counter()
    for _, cells in rows:
        for column, cell in enumerate(cells):
            if found := find(cell):
                named[column].add(found[0])
                in_full[column] += is_sound(cell)
    return max(((len(named[c]), in_full[c], -c) for c in named), default=(0, 0, 0))


def parse_table(path: Path, text: str, find) -> Table:
    """Split a table at the separator with which it names the most sounds. Raises UserError."""
    if re.match(r'\s*(\[\s*)?\{\s*"', text):
        header, rows = read_json(path, text)
        named, _, column = audio_column(rows, find)
        return Table("JSON", rows, {}, header, -column, named)
    lines, best = text_lines(text), None
    for separator in SEPARATORS:
        rows = []
        for number, line in lines.items():
            try:
                rows.append((number, split_line(line, separator)))
            except csv.Error:
                rows.append((number, []))
        rank = audio_column(rows, find)
        if best is None or rank[:2] > best[0][:2]:
            best = rank, separator, rows
    (named, _, column), separator, rows = best
    audio, header = -column, None

    def names_sound(cells) -> bool:
        return len(cells) > audio and bool(find(cells[audio]))
    rows = [(number, cells) for number, cells in rows if names_sound(cells) or not lines[number].lstrip().startswith("#")]
    if rows and not names_sound(rows[0][1]) and any(role_of(cell) for cell in rows[0][1]):
        header = rows.pop(0)[1]
    for number, cells in rows:
        if not cells:
            raise UserError(f"{path}, line {number}: a quotation mark is not closed, or text follows it: "
                            f"{lines[number]!r:.80}. Write marks of the text twice, and the field within marks: "
                            f'x.wav{separator}"""No,"" he said."')
    return Table(separator, rows, lines, header, audio, named)


# --- from files to the table

def find_table(folder: Path, files: list[str], pairs: dict[str, str], find) -> tuple[str | None, dict[str, int]]:
    """The table's path, and how many sounds each other table names. None: the texts of `pairs` are to be taken.

    A metadata.* at the top is the table. Else texts beside half of the sounds or more are taken, else the table that names
    the most sounds. Raises UserError if there is none.
    """
    beside = set(pairs.values())
    tables = [path for path in files if path.lower().endswith(TABLES) and path not in beside]
    metadata = [path for path in tables if os.path.splitext(path)[0].lower() == "metadata"]
    if metadata:
        return min(metadata, key=lambda path: (TABLES.index(os.path.splitext(path)[1].lower()), path)), {}
    if 2 * len(pairs) >= sum(map(is_sound, files)) > 0:
        return None, {}
    named = {path: count_named(folder / path, find) for path in tables}
    order = sorted(filter(named.get, tables), key=lambda path: (-named[path], path.count("/"), path))
    if not order:
        raise UserError(f"no metadata.csv in {folder}, and no other table that names its sounds (found {describe(files)}). "
                        "Expected metadata.csv with lines id|text, or x.txt beside each x.wav; or write --metadata FILE")
    return order[0], {path: named[path] for path in order[1:]}


def count_named(path: Path, find) -> int:
    """How many sounds a file names, if it is a table."""
    try:
        try:
            text = read_text(path)
        except UserError:  # in another encoding, which does not matter here
            text = path.read_bytes().decode("latin-1")
        return parse_table(path, text, find).named
    except (OSError, UserError):
        return 0


# --- from rows to columns

def role_of(name: str) -> str | None:
    return ROLES.get(re.sub(r"[\s-]+", "_", name.casefold()))


def is_label(values: list[str]) -> bool:
    """Whether a column names a speaker, a language or the like: words, no decimals, that occur twice or more on average."""
    return 2 * len(set(values)) <= len(values) and not any(re.search(r"\s|^\d+[.,]\d+$", value) for value in values)


def alike(some: list[str], others: list[str]) -> bool:
    """Whether two columns are the same sentences: on average half of the words are in both. Phonemes are rarely words.

    Numbers do not count, because a normalised text writes them out.
    """
    shares = []
    for pair in zip(some, others):
        a, b = (set(re.findall(r"[^\W\d]+", value.casefold())) for value in pair)
        if a and b:
            shares.append(len(a & b) / min(len(a), len(b)))
    return bool(shares) and sum(shares) >= len(shares) / 2


def tell_columns(table: Table, width: int, place: str, cells: list[str]) -> list[str]:
    """The role of each column: audio, text, speaker or -. Of several texts the last that is not empty counts.

    The names in a header decide if one of them means a text, else the cells. Raises UserError, a question, if they cannot;
    it shows the line `cells`, at `place`.
    """
    names = [*(table.header or []), *[""] * width]
    roles = ["audio" if c == table.audio else role_of(names[c]) or "-" for c in range(width)]
    if "text" in roles:
        return roles
    values = {c: [row[c] if c < len(row) else "" for _, row in table.rows] for c in range(width) if roles[c] == "-"}
    values = {c: column for c, column in values.items() if any(column)}
    if not values:
        raise UserError(f"{place}: {cells!r:.200} has no text beside the sound's name; expected lines such as id|text")
    first = next(iter(values))
    if len(values) == 1 or all(alike(values[first], values[c]) for c in values):
        return ["text" if c in values else role for c, role in enumerate(roles)]
    labels = [c for c in values if is_label(values[c])]
    varying = [c for c in labels if len(set(values[c])) > 1]
    if "speaker" not in roles and labels:
        roles[(varying or labels)[0]] = "speaker"
    texts = [c for c in values if c not in labels and not all(re.fullmatch(r"[\d.,:]*", value) for value in values[c])]
    if not texts or len(varying) > 1 or not all(alike(values[texts[0]], values[c]) for c in texts[1:]):
        options = [",".join("text" if c == text else role for c, role in enumerate(roles)) for text in texts or values]
        raise UserError(f"{place}: {cells!r:.200}: which column is the text that is spoken? Write "
                        f"{' or '.join(map(as_flag, options[:3]))} (or other roles: audio, text, speaker, - for the rest)")
    return ["text" if c in texts else role for c, role in enumerate(roles)]


def as_flag(columns: str) -> str:
    return f"--columns{'=' if columns.startswith('-') else ' '}{columns}"  # else argparse takes the value for a flag


def given_columns(columns: str, width: int, place: str) -> list[str]:
    """The roles of --columns. Raises UserError."""
    roles = [role.strip() for role in columns.split(",")]
    if set(roles) - {"audio", "text", "speaker", "-"} or "text" not in roles or roles.count("audio") != 1 \
            or roles.count("speaker") > 1:
        raise UserError(f"--columns {columns}: expected a role for each column, with commas between: audio (once), text, "
                        "speaker, and - for what is not read; for example audio,-,text")
    if len(roles) < width:
        raise UserError(f"--columns {columns} has {len(roles)} columns, but {place} and most lines have {width}; write - "
                        "for a column that is not read")
    return roles


def fit_cells(cells: list[str], line: str, separator: str, roles: list[str], is_known: bool, place: str) -> list[str]:
    """A line's cells, one for each role. A separator within the text is put back, if the number of columns `is_known`."""
    width, is_plain = len(roles), [cell.strip() for cell in line.split(separator)] == cells  # no quotation marks count
    while len(cells) > width and not cells[-1]:
        cells = cells[:-1]
    if len(cells) <= width:
        return cells + [""] * (width - len(cells))
    hint = "take it out of the text" + (", or put the text within quotation marks" if separator in QUOTING else "")
    if roles[-1] == "text" and roles.count("text") == 1 and is_plain:
        if is_known:
            return cells[:width - 1] + [line.split(separator, width - 1)[-1].strip()]
        names = ",".join(roles)
        hint = f"write {as_flag(names)} if it is a part of the text, {as_flag(names)},text if another text follows it"
    raise UserError(f"{place} has {len(cells)} fields, {cells!r:.200}, and most lines {width}. The separator is "
                    f"{separator!r}; {hint}")


def of_speaker(rows: list[tuple[str, list[str]]], roles: list[str], speaker: str | None, path: Path) -> list:
    """The rows of one speaker. Raises UserError, a question, if there are several and none is named."""
    if "speaker" not in roles:
        if speaker is not None:
            raise UserError(f"--speaker {speaker}: {path} has no column of speakers (columns: {', '.join(roles)}); name it "
                            "with --columns, for example audio,speaker,text")
        return rows
    column = roles.index("speaker")  # the first of several
    counts = Counter(cells[column] for _, cells in rows)
    if speaker is None and len(counts) == 1:
        return rows
    if speaker not in counts:
        most, others = counts.most_common(5), ",".join("-" if role == "speaker" else role for role in roles)
        raise UserError(f"{path} has {len(counts)} speaker(s) in column {column + 1}: "
                        f"{', '.join(f'{name!r} ({n} lines)' for name, n in most)}{', …' * (len(counts) > 5)}. A model "
                        f"learns one: write --speaker {most[0][0]!r}, or {as_flag(others)} if these are no speakers")
    return [row for row in rows if row[1][column] == speaker]


def read_table(path: Path, folder: Path, contents: str, find, encoding: str | None, columns: str | None,
               speaker: str | None) -> tuple[list[tuple[str, str, str]], str]:
    """The lines of a table as (place, cell of the audio, text), and in words how it was read. Raises UserError.

    `contents` describes the files below `folder`; `encoding`, `columns` and `speaker` are the flags of folder/prepare.py.
    """
    table = parse_table(path, read_text(path, encoding), find)
    first = next(((n, cells) for n, cells in table.rows if len(cells) > table.audio and find(cells[table.audio])), None)
    if not first:
        found = f"line {table.rows[0][0]} is {table.rows[0][1]!r:.200}" if table.rows else "it has no lines"
        raise UserError(f"no line of {path} names a sound below {folder}: {found}, and the folder has {contents}. Expected "
                        "lines such as id|text; name the folder of the sounds with --source, the table with --metadata")
    width = len(table.header) if table.header else Counter(len(cells) for _, cells in table.rows).most_common(1)[0][0]
    width, place = max(width, table.audio + 1), f"{path}, line {first[0]}"
    roles = given_columns(columns, width, place) if columns else tell_columns(table, width, place, first[1])
    rows = []
    for number, cells in table.rows:
        place, is_known = f"{path}, line {number}", bool(columns or table.header)
        rows.append((place, fit_cells(cells, table.lines.get(number, ""), table.separator, roles, is_known, place)))
    rows = of_speaker(rows, roles, speaker, path)
    texts = [c for c, role in enumerate(roles) if role == "text"][::-1]
    lines = [(place, cells[roles.index("audio")], next((cells[c] for c in texts if cells[c]), "")) for place, cells in rows]
    names = f"header {table.header!r:.100}" if table.header else "no header"
    return lines, (f"{path}: separator {table.separator!r}, {names}; line {first[0]} is {first[1]!r:.200}\n"
                   f"columns: {', '.join(roles)}")
