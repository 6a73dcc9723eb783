"""Folders of recordings as people have them: each is prepared, or refused in one line that says what to write.

The sounds are eight short sentences that espeak-ng reads. Each folder has them in another layout.
"""
import io
import json
import os
import shutil
import struct
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import example, given, settings
from hypothesis import strategies as st

import audio
from common import UserError
from config import Config
from corpus import SPLITS, Corpus, hash_splits
from espeak import espeak_wav
from folder import prepare  # data/folder/prepare.py
from folder.prepare import read_folder

RATE = 22050
SENTENCES = {  # text: phonemes
    "Good morning to you.": "ɡʊd mˈɔːɹnɪŋ tə juː",
    "The train leaves at nine, I think.": "ðə tɹˈeɪn lˈiːvz æt nˈaɪn aɪ θˈɪŋk",
    "Where is the station?": "wˌɛɹ ɪz ðə stˈeɪʃən",
    'He said "no" and left.': "hiː sˈɛd nˈoʊ ænd lˈɛft",
    "A red lamp; a green lamp.": "ɐ ɹˈɛd lˈæmp ɐ ɡɹˈiːn lˈæmp",
    "Nobody came back.": "nˈoʊbɑːdi kˈeɪm bˈæk",
    "Write: one = one.": "ɹˈaɪt wˈʌn ˈiːkwəlz wˈʌn",
    "Room 5 is free.": "ɹˈuːm fˈaɪv ɪz fɹˈiː",
}
TEXTS, PHONEMES = list(SENTENCES), list(SENTENCES.values())
NORMALISED = [text.replace("5", "five") for text in TEXTS]
IDS = [f"a_{n}" for n in range(len(TEXTS))]
EXPECTED = dict(zip(IDS, TEXTS))


@pytest.fixture(scope="module")
def wavs():
    return [espeak_wav(text, RATE, wpm=300) for text in TEXTS]


@pytest.fixture
def folder(tmp_path, wavs):
    """A function that writes sounds, by a pattern of their paths, and returns the folder."""
    def write(pattern: str, convert=lambda wav: (wav, RATE), subtype="PCM_16") -> Path:
        for n, wav in enumerate(wavs):
            path = tmp_path / "my voice" / pattern.format(n=n, id=IDS[n])
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, *convert(wav), subtype=subtype)
        return tmp_path / "my voice"
    return write


def lines(pattern: str, **columns) -> str:
    """A line for each sentence. A pattern can have {n}, {id}, {text}, {normalised}, {phonemes} and `columns`, lists."""
    columns = {"id": IDS, "text": TEXTS, "normalised": NORMALISED, "phonemes": PHONEMES} | columns
    return "".join(pattern.format(n=n, **{name: column[n] for name, column in columns.items()}) + "\n"
                   for n in range(len(TEXTS)))


def read(source: Path, **flags) -> tuple[dict[str, str], str]:
    """The texts by id, and what was printed."""
    out = io.StringIO()
    with redirect_stdout(out):
        utterances = read_folder(source, **flags)
    for u in utterances:
        assert Path(u.source).is_file() and u.split == hash_splits([u.utt_id for u in utterances])[u.utt_id]
    return {u.utt_id: u.text for u in utterances}, out.getvalue()


def question(source: Path, **flags) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        read(source, **flags)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and ("--" in message or str(source) in message), message
    return message


# --- ten folders that people described in bug reports

STEREO_48K = dict(convert=lambda wav: (np.stack([wav, wav], 1).repeat(2, 0), 2 * RATE), subtype="PCM_24")
AS_CSV = [text if "," not in text and '"' not in text else '"' + text.replace('"', '""') + '"' for text in TEXTS]
TEN = {  # name: (sounds, options of writing them, table, its text, what is printed)
    "wav and not wavs": ("wav/{id}.wav", {}, "metadata.csv", lines("{id}|{text}|{text}"), "columns: audio, text, text; "),
    "path, speaker, text": ("wav/{n}.wav", {}, "metadata.csv", lines("{dir}/{n}.wav|male1|{text}", dir=["wav", "Wav"] * 4),
                            "columns: audio, speaker, text; "),
    "filelist": ("wavs/{id}.wav", {}, "metadata.csv", lines("wavs/{id}.wav|{text}"), "columns: audio, text; "),
    "CRLF": ("wavs/{id}.wav", {}, "metadata.csv", lines("{id}.wav|{text}\r"), "columns: audio, text; "),
    "metadata.txt": ("wavs/{id}.wav", {}, "metadata.txt", lines("{id}|{text}"), "columns: audio, text; "),
    "FLAC of 24 bits": ("wavs/{id}.flac", STEREO_48K, "metadata.csv", lines("{id}|{text}|{text}"), "columns: audio, text, text; "),
    "equals signs": ("wavs/{id}.wav", {}, "metadata.csv", lines("wavs/{id}.wav=={text}"), "separator '==', no header; "),
    "CSV with a header": ("wavs/{id}.wav", {}, "metadata.csv", "file,text\n" + lines("{id}.wav,{csv}", csv=AS_CSV),
                          "separator ',', header ['file', 'text']; line 2 is "),
}


@pytest.mark.parametrize("name", TEN)
def test_folders_that_are_prepared(folder, tmp_path, capsys, name):
    pattern, options, table, text, printed = TEN[name]
    source = folder(pattern, **options)
    (source / table).write_bytes(text.encode())
    prepare.main(["--source", str(source), "--out", str(tmp_path / "corpus"), "--workers", "1", "--strict"])
    corpus, out = Corpus(str(tmp_path / "corpus"), Config()), capsys.readouterr().out
    assert corpus.texts == TEXTS and corpus.ids == [Path(pattern.format(n=n, id=IDS[n])).stem for n in range(8)]
    assert printed in out and "8 lines, 8 sounds found\n" in out and f"{source / table}: " in out
    sound = next(iter(sorted(source.rglob("*.wav")) or sorted(source.rglob("*.flac"))))
    np.testing.assert_allclose(corpus.mel(0), audio.log_mel(audio.read_wav(str(sound), RATE), Config()).numpy(), atol=0.01)


def test_phonemes_are_asked_about(folder, tmp_path):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text(lines("{id}.wav|{text}|{phonemes}"))
    message = question(source)
    assert "metadata.csv, line 1: ['a_0.wav', 'Good morning to you.', 'ɡʊd" in message
    assert "--columns audio,text,- or --columns audio,-,text" in message
    assert read(source, columns="audio,text,-")[0] == EXPECTED
    assert read(source, columns="audio,-,text")[0] == dict(zip(IDS, PHONEMES))
    assert "has 2 columns, but" in question(source, columns="audio,text")
    (source / "metadata.csv").write_text(lines("{n}.|{id}|{text}|me|{arpa}", arpa=["AH0 B AA1 T", "IY1 N"] * 4))
    flag = "--columns=-,audio,text,speaker,-"  # with a space, argparse would refuse it
    assert flag in question(source)
    prepare.main(["--source", str(source), "--out", str(tmp_path / "corpus"), "--workers", "1", flag])
    assert Corpus(str(tmp_path / "corpus"), Config()).texts == TEXTS


def test_latin_1_is_asked_about(folder):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_bytes(lines("{id}|{text}").replace("Good morning", "Olé, Señor").encode("latin-1"))
    message = question(source)
    assert "line 1: byte 0xe9 is not UTF-8. Write --encoding latin-1 if 'a_0|Olé, Señor to you.' is right" in message
    assert read(source, encoding="latin-1")[0]["a_0"] == "Olé, Señor to you."
    (source / "metadata.csv").write_bytes(lines("{id}|“{text}”").encode("cp1252"))
    assert "--encoding cp1252" in question(source) and "“Good" in question(source)
    assert "no-such" in question(source, encoding="no-such")


# --- their relatives

@pytest.mark.parametrize("table, content", [
    pytest.param("metadata.tsv", lines("{id}\t{text}"), id="tabs"),
    pytest.param("metadata.tsv", lines("{id}\t{csv}", csv=AS_CSV), id="tabs, quoted by a spreadsheet"),
    pytest.param("metadata.csv", "path;transcription\n" + lines("{id};{csv}", csv=[f'"{t}"' for t in AS_CSV]).replace(
        '""', '"').replace('"He said "no" and left."', '"He said ""no"" and left."'), id="semicolons, all quoted"),
    pytest.param("metadata.csv", "﻿" + lines("{id}|{text}"), id="byte order mark"),
    pytest.param("metadata.csv", lines("{id}|{text}").replace("\n", "\r"), id="line ends of old Macs"),
    pytest.param("metadata.csv", lines("{id}|{text}|"), id="bar at the end"),
    pytest.param("metadata.csv", lines("{id}||{text}"), id="empty column"),
    pytest.param("metadata.csv", lines("{text}|{id}"), id="text first"),
    pytest.param("metadata.csv", lines("{id} | {text}"), id="spaces about the bars"),
    pytest.param("metadata.csv", "# my voice\n\n" + lines("{id}|{text}\n"), id="comments and empty lines"),
    pytest.param("metadata.csv", lines("{n}|{id}|{text}|EN|{seconds}", seconds=[f"{n}.5" for n in range(8)]),
                 id="number, language and seconds"),
    pytest.param("metadata.csv", lines("{n}\t{id}.wav\t{text}"), id="numbers that could be ids"),
    pytest.param("Metadata.CSV", lines("D:\\data\\wavs\\{id}.wav|{text}"), id="paths of another machine"),
    pytest.param("metadata.csv", lines("DUMMY/{id}.mp3|{text}"), id="another folder and format"),
    pytest.param("metadata.csv", lines("{upper}.WAV|{text}", upper=[i.upper() for i in IDS]), id="another case"),
    pytest.param("metadata.csv", lines("{id}: {text}"), id="colons"),
    pytest.param("metadata.csv", lines("{id} {text}"), id="spaces"),
    pytest.param("metadata.csv", lines("{id} - {text}"), id="dashes"),
    pytest.param("train.txt", lines("{id}|{text}"), id="train.txt"),
    pytest.param("lists/anything.list", lines("{id}|me|EN|{text}"), id="a list in a folder"),
    pytest.param("metadata.csv", "speaker|text|file\n" + lines("me|{text}|{id}"), id="header in another order"),
    pytest.param("metadata.csv", "file,transcript,phones\n" + lines("{id},{csv},{phonemes}", csv=AS_CSV), id="header with phones"),
    pytest.param("manifest.json", "".join(json.dumps({"audio_filepath": f"/home/me/{i}.wav", "duration": 1.5, "text": t}) + "\n"
                                          for i, t in EXPECTED.items()), id="NeMo's manifest"),
    pytest.param("metadata.jsonl", "".join(json.dumps({"text": t, "audio": {"path": f"{i}.wav", "rate": 1}}) + "\n"
                                           for i, t in EXPECTED.items()), id="JSON with an audio object"),
    pytest.param("data.json", json.dumps([{"file": i, "words": t} for i, t in EXPECTED.items()], indent=1), id="a JSON list"),
])
def test_relatives(folder, table, content):
    source = folder("Wavs/{id}.wav")
    (source / table).parent.mkdir(exist_ok=True)
    (source / table).write_bytes(content.encode())
    texts, printed = read(source)
    assert texts == EXPECTED and "; 8 lines, 8 sounds found\n" in printed and str(source / table) in printed


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_byte_order_marks(folder, encoding):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_bytes(lines("{id}|“{text}”\r").encode(encoding))
    assert read(source)[0] == {i: f"“{t}”" for i, t in EXPECTED.items()}


def test_utf_16_without_a_mark_is_asked_about(folder):
    source = folder("wavs/{id}.wav")
    for encoding in ("utf-16-le", "utf-16-be"):
        (source / "metadata.csv").write_bytes(lines("{id}|{text}").encode(encoding))
        assert f"--encoding {encoding}" in question(source)
        assert read(source, encoding=encoding)[0] == EXPECTED


@pytest.mark.parametrize("sound, text", [
    ("{id}.wav", "{id}.txt"), ("{id}.wav", "{id}.lab"), ("wav48/a/{id}.flac", "txt/a/{id}.TXT"),
    ("84/1/{id}.wav", "84/1/{id}.normalized.txt"),
])
def test_texts_beside_the_sounds(folder, sound, text):
    source = folder(sound)
    for utt_id, words in EXPECTED.items():
        path = source / text.format(id=utt_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words.replace(" ", "\n", 1) + "\n")  # in two lines
    texts, printed = read(source)
    assert texts == EXPECTED and "no table; the text of " in printed and "a_0." in printed
    assert "--metadata" in question(source, columns="audio,text")
    if sound == "{id}.wav":
        path.write_bytes(b"caf\xe9")
        assert str(path) in question(source) and "--encoding latin-1" in question(source)
        path.write_text("0 250000 sil\n250000 500000 r\n")
        if path.suffix == ".lab":
            assert "'0 250000 sil'" in question(source)


def test_sounds_of_one_name_in_two_folders(folder):
    source = folder("anna/{n}.wav")
    shutil.copytree(source / "anna", source / "otto")
    (source / "metadata.csv").write_text(lines("anna/{n}.wav|{text}") + lines("otto/{n}.wav|{normalised}"))
    texts, _ = read(source)
    assert texts == {f"anna_{n}": t for n, t in enumerate(TEXTS)} | {f"otto_{n}": t for n, t in enumerate(NORMALISED)}
    (source / "metadata.csv").write_text(lines("{n}.wav|{text}"))  # which of the two?
    assert "line 1: '0.wav' can be 'anna/0.wav' or 'otto/0.wav'" in question(source)
    assert read(source / "otto", metadata=source / "metadata.csv")[0] == {f"{n}": t for n, t in enumerate(TEXTS)}
    shutil.move(source / "otto", source / "wavs")  # LJSpeech's place wins for an id
    (source / "metadata.csv").write_text(lines("{n}|{text}"))
    assert {Path(u.source).parent.name for u in read_folder(source)} == {"wavs"}


def test_speakers_are_asked_about(folder):
    source = folder("wavs/{id}.wav")
    for table, content in (("a.txt", lines("{id}|{who}|{text}", who=["anna"] * 5 + ["Otto"] * 3)),
                           ("b.csv", "client_id,path,sentence\n" + lines("{who},{id},{csv}", csv=AS_CSV, who=["anna"] * 5 + ["Otto"] * 3))):
        (source / table).write_text(content)
        message = question(source, metadata=Path(table))
        assert "2 speaker(s)" in message and "'anna' (5 lines), 'Otto' (3 lines)" in message and "--speaker 'anna'" in message
        texts, printed = read(source, metadata=Path(table), speaker="Otto")
        assert texts == dict(list(EXPECTED.items())[5:]) and "3 lines, 3 sounds found" in printed
        assert "'anna'" in question(source, metadata=Path(table), speaker="Hugo")
    assert read(source, metadata=Path("a.txt"), columns="audio,-,text")[0] == EXPECTED
    (source / "metadata.csv").write_text(lines("{id}|{text}"))
    assert "no column of speakers" in question(source, speaker="anna")


def test_bars_in_the_text(folder):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text(lines("{id}.wav|{text}").replace("Where is", "Where | is"))
    message = question(source)
    assert "metadata.csv, line 3 has 3 fields, ['a_2.wav', 'Where', 'is the station?'], and most lines 2" in message
    assert "--columns audio,text if" in message and "--columns audio,text,text if" in message
    assert read(source, columns="audio,text")[0]["a_2"] == "Where | is the station?"
    assert read(source, columns="audio,text,text")[0]["a_2"] == "is the station?"
    (source / "metadata.csv").write_text("file|text\n" + lines("{id}.wav|{text}").replace("Where is", "Where | is"))
    assert read(source)[0]["a_2"] == "Where | is the station?"  # the header says that there are two columns
    (source / "metadata.csv").write_text(lines("{id}|{text}|{normalised}").replace("Where is", "Where | is"))
    assert "line 3 has 5 fields" in question(source) and "take it out of the text" in question(source)
    (source / "metadata.csv").write_text("file,text\n" + lines("{id},{text}").replace("left.", "left, she said."))
    texts, _ = read(source)
    assert texts["a_1"] == TEXTS[1] and texts["a_3"] == 'He said "no" and left, she said.'
    (source / "metadata.csv").write_text("file,text\n" + lines("{id},{csv}", csv=AS_CSV).replace("\n", ',"or, so"\n', 1))
    assert "line 2 has 3 fields" in question(source) and "within quotation marks" in question(source)


def test_stray_quotation_marks(folder):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text(lines('{id}|"{text}|"{text}'))
    assert read(source)[0] == {i: f'"{t}' for i, t in EXPECTED.items()}
    (source / "metadata.csv").write_text("file,text\n" + lines("{id},{csv}", csv=AS_CSV).replace("Nobody", '"Nobody'))
    message = question(source)
    assert "metadata.csv, line 7: a quotation mark" in message and "'a_5,\"Nobody came back.'" in message


def test_short_and_odd_tables(folder):
    source = folder("wavs/{id}.wav")
    for text, expected in ((lines("{id}|{yes}|{yes}", yes=["Yes.", "No."] * 4), ["Yes.", "No."] * 4),  # are no labels
                           (lines("{id}|{yes}", yes=["yes", "no"] * 4), ["yes", "no"] * 4),
                           (lines("{id}|{n}"), [str(n) for n in range(8)]),
                           (lines("{id}|{n} and {n}|two and two"), ["two and two"] * 8)):
        (source / "metadata.csv").write_text(text)
        assert list(read(source)[0].values()) == expected
    (source / "metadata.csv").write_text(lines("{id}|{yes}|{n}", yes=["yes", "no"] * 4))
    assert "--columns audio,speaker,text" in question(source)
    assert list(read(source, columns="audio,text,-")[0].values()) == ["yes", "no"] * 4
    (source / "metadata.csv").write_text(lines("wavs/{id}.wav"))
    assert "line 1: ['wavs/a_0.wav'] has no text" in question(source)
    (source / "metadata.csv").write_text(lines("{text}") + lines("{text}|{id}"))  # most lines have no sound
    assert [u.text for u in read_folder(source)] == TEXTS * 2 and {u.utt_id for u in read_folder(source)} > set(IDS)


@pytest.mark.parametrize("columns, hint", [
    ("audio,words", "expected a role"), ("audio,audio,text", "audio (once)"), ("audio,text", "has 2 columns, but"),
])
def test_columns_that_cannot_be(folder, columns, hint):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text(lines("{id}|{text}|{text}"))
    assert hint in question(source, columns=columns) and columns in question(source, columns=columns)


# --- what is missing

def test_missing_sounds_and_texts_become_rejected_lines(folder, tmp_path):
    source = folder("wav/{id}.wav")
    (source / "wav" / "a_3.wav").unlink()
    (source / "metadata.csv").write_text(lines("{id}|{text}").replace(TEXTS[5], "") + "|Without an id.\n")
    with redirect_stdout(out := io.StringIO()):
        prepare.main(["--source", str(source), "--out", str(tmp_path / "corpus"), "--workers", "1"])
    rejected = [json.loads(line) for line in (tmp_path / "corpus/metadata/rejected.jsonl").read_text().splitlines()]
    assert {r["utt_id"]: r["reason"] for r in rejected} == {
        "a_3": f"missing file {source}/wav/a_3.wav", "a_5": "empty text", "line_9": f"missing file {source}/wav/line_9.wav"}
    assert "9 lines, 7 sounds found" in out.getvalue()
    assert Corpus(str(tmp_path / "corpus"), Config()).ids == [IDS[n] for n in (0, 1, 2, 4, 6, 7)]


def test_few_or_no_sounds_are_one_error(folder):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text("x1|One.\n" + lines("{id}|{text}") + "".join(f"x{n}|More.\n" for n in range(2, 9)) * 1)
    read_folder(source)  # half of them
    (source / "metadata.csv").write_text("x0|Zero.\n" + (source / "metadata.csv").read_text())
    message = question(source)
    assert "only 8 of 17 lines" in message and "line 1 has 'x0'" in message and "--source" in message
    (source / "metadata.csv").write_text("x1|One.\nx2|Two.\n")
    message = question(source)
    assert "no line of " in message and "['x1', 'One.']" in message and "8 .wav" in message and "'wavs/a_0.wav'" in message
    (source / "metadata.csv").write_text("\n")
    assert "it has no lines" in question(source)
    shutil.rmtree(source / "wavs")
    (source / "a_0.m4a").write_bytes(b"")
    (source / "metadata.csv").write_text(lines("{id}|{text}"))
    assert "1 .m4a" in question(source) and "ffmpeg" in question(source)


def test_folders_without_a_table(folder, tmp_path):
    source = folder("wavs/{id}.wav")
    (source / "README.txt").write_text("My voice.\n")
    message = question(source)
    assert "no metadata.csv" in message and "8 .wav, 1 .txt" in message and "--metadata" in message
    assert "nowhere" in question(tmp_path / "nowhere") and "lists/x.txt" in question(source, metadata=Path("lists/x.txt"))
    (source / "README.txt").unlink()
    (source / "train.txt").write_text("".join(lines("{id}|{text}").splitlines(True)[:6]))
    (source / "val.txt").write_text("".join(lines("{id}|{text}").splitlines(True)[6:]))
    texts, printed = read(source)
    assert list(texts) == IDS[:6] and f"not read: {source / 'val.txt'}, which names 2 sounds" in printed
    assert list(read(source, metadata=source / "val.txt")[0]) == IDS[6:]


def test_the_same_sound_twice(folder):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text(lines("{id}|{text}") + "wavs/a_2.wav|Again.\n")
    message = question(source)
    assert "line 9: 'wavs/a_2.wav' is wavs/a_2.wav, which " in message and "line 3 names too" in message


def test_what_is_not_looked_at(folder):
    source = folder("wavs/{id}.wav")
    (source / "metadata.csv").write_text(lines("{id}|{text}"))
    for other in ("__MACOSX/wavs", "old/mel_shards", "old/recordings"):  # copies that are none
        shutil.copytree(source / "wavs", source / other)
    for path in list((source / "wavs").iterdir()):
        shutil.copy(path, path.with_name(f"._{path.name}"))
    (source / "wavs" / "up").symlink_to(source)  # a circle
    shutil.move(source / "wavs", source / "audio")
    assert read(source)[0] == EXPECTED
    shutil.move(source / "audio", source.parent / "elsewhere")  # a folder that is linked, and paths out of the folder
    (source / "linked").symlink_to(source.parent / "elsewhere")
    assert read(source)[0] == EXPECTED
    (source / "linked").unlink()
    (source / "metadata.csv").write_text(lines("../elsewhere/{id}.wav|{text}"))
    assert read(source)[0] == EXPECTED


@pytest.mark.parametrize("name", ["a\u0301", "é", "x.y", "-dash"])
def test_names_with_accents_and_dots(folder, name, wavs):
    source = folder("wavs/{id}.wav")
    soundfile.write(source / "wavs" / f"{name}.wav", wavs[0], RATE)
    (source / "metadata.csv").write_text(lines("{id}|{text}") + f"{name}|Hello.\n" .replace("a\u0301", "á"))
    assert read(source)[0] == EXPECTED | {name: "Hello."}


def test_names_that_cannot_be_ids(folder, wavs):
    source = folder("wavs/{id}.wav")
    soundfile.write(source / "wavs" / "b\tc.wav", wavs[0], RATE)
    (source / "metadata.csv").write_text(lines("{id}|{text}") + "b\tc|Hello.\n")
    assert "line 9: the name 'b\\tc' has characters that cannot be printed" in question(source)


@pytest.mark.parametrize("suffix, format, subtype", [("ogg", "OGG", "VORBIS"), ("mp3", "MP3", None), ("aif", "AIFF", "PCM_24"),
                                                     ("opus", "OGG", "OPUS"), ("W64", "W64", "FLOAT")])
def test_formats_of_libsndfile(tmp_path, wavs, suffix, format, subtype):
    for n, wav in enumerate(wavs):
        soundfile.write(tmp_path / f"{IDS[n]}.{suffix}", np.repeat(wav, 2)[:len(wav)], 48000, format=format, subtype=subtype)
    (tmp_path / "metadata.csv").write_text(lines("{id}|{text}"))
    assert read(tmp_path)[0] == EXPECTED
    assert all(len(audio.read_wav(u.source, RATE)) > 1000 for u in read_folder(tmp_path))


@given(st.lists(st.tuples(st.text("aeilnrst '\",;=:", min_size=1, max_size=30).filter(str.strip), st.sampled_from("=-_ ")),
                min_size=2, max_size=6))
def test_ljspeechs_layout_is_read_as_it_is(tmp_path_factory, some):
    """id|text|normalised text, where the third field may equal the second, be empty or be missing."""
    source, rows, expected = tmp_path_factory.mktemp("lj"), [], {}
    (source / "wavs").mkdir()
    for n, (text, kind) in enumerate([("Two of them.", "=")] * 7 + some):  # most lines have three fields
        utt_id, normalised = f"LJ001-{n:04d}", {"=": text, "-": f"{text} {text}"}.get(kind, "")
        (source / "wavs" / f"{utt_id}.wav").touch()
        rows.append(f"{utt_id}|{text}" + (f"|{normalised}" if kind != "_" else ""))
        expected[utt_id] = " ".join((normalised or text).split())
    (source / "metadata.csv").write_text("\n".join(rows))
    utterances = read_folder(source)
    assert {u.utt_id: u.text for u in utterances} == expected and list(expected) == [u.utt_id for u in utterances]
    assert {u.utt_id: u.split for u in utterances} == hash_splits(list(expected))


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")) |
       st.lists(st.lists(st.text("ab./\\\0\r\u2028\"',;={[ ", max_size=4), max_size=4).map("|".join)).map("\n".join).map(str.encode))
@example(b"\xef\xbb\xbf")
@example(b"a\rb|x\na\rb|y")
@example(b'[{"a": []}, "b"]')
@settings(max_examples=int(os.environ.get("FUZZ", 60)))
def test_fuzzed_tables_are_read_or_refused(tmp_path_factory, content):
    source = tmp_path_factory.mktemp("fuzz")
    (source / "a.wav").write_bytes(struct.pack("<4sI", b"RIFF", 0))
    (source / "metadata.csv").write_bytes(content)
    try:
        with redirect_stdout(io.StringIO()):
            some = read_folder(source)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and str(source) in str(e)
    else:
        assert len({u.utt_id for u in some}) == len(some) and all(u.split in SPLITS for u in some)
