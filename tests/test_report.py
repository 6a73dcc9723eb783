"""The look before training: what is measured of a recording, what stands out among many, the page and the table."""
import csv
import shutil

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

import audio
from common import UserError
from config import Config
from espeak import espeak_wav
from folder import prepare  # data/folder/prepare.py
from report import bandwidth, clipped_samples, deviations, measure
from silence import KEPT_SILENCE, find_speech, part, read_part, trimmed, without_silence

RATE = 22050
TEXTS = [f"{a} {b}." for a in ("The red lamp", "My old friend", "A small dog", "Her new book") for b in (
    "is here", "went home late", "was in the garden today", "came back", "is not what we wanted", "fell")]


@pytest.fixture(scope="module")
def wavs():
    return [espeak_wav(text, RATE, wpm=300) for text in TEXTS]


@pytest.fixture(scope="module")
def speech(wavs):
    """A recording without silence at its ends."""
    start, end = find_speech(wavs[3], RATE)[0][0], find_speech(wavs[3], RATE)[-1][1]
    return wavs[3][round(start * RATE):round(end * RATE)]


def silence(seconds: float, level: float = 0.0) -> np.ndarray:
    return np.float32(level) * np.random.default_rng(0).standard_normal(round(seconds * RATE), np.float32)


# --- one recording

@pytest.mark.parametrize("rate, new_rate, top", [(22050, 22050, 8500), (16000, 22050, 7500), (8000, 22050, 3700), (8000, 48000, 3700)])
def test_upsampled_speech_is_seen_in_its_spectrum(speech, rate, new_rate, top):
    wav = audio.resample(audio.resample(speech, RATE, rate), rate, new_rate)
    wav = np.round(wav * 32767).astype(np.float32) / 32768  # as a file of 16 bits
    assert top < bandwidth(wav, new_rate) <= rate / 2 * 1.01


def test_clipping_is_counted(speech):
    speech = speech / np.abs(speech).max()
    assert clipped_samples(speech) == 0
    clipped = np.clip(2 * speech, -1, 1)
    assert clipped_samples(clipped) > 20 and clipped_samples(clipped / 2) == clipped_samples(clipped)


@given(before=st.floats(0, 2), after=st.floats(0, 2), gain=st.sampled_from([0.01, 0.3, 1.0]), level=st.sampled_from([0, 1e-3]))
def test_trimming_takes_silence_and_never_speech(speech, before, after, gain, level):
    wav = gain * np.concatenate([silence(before, level), speech, silence(after, level)])
    start, end = trimmed(wav, RATE)
    assert start <= before + 0.02 and end >= before + len(speech) / RATE - 0.02
    if level == 0 or before + after > 0.5:  # with less of it, what is background cannot be told
        assert before - start <= KEPT_SILENCE + 0.05 and end - before - len(speech) / RATE <= KEPT_SILENCE + 0.05


@pytest.mark.parametrize("wav", [silence(1), silence(1, 0.1), silence(0.001), np.ones(RATE, np.float32)])
def test_what_is_no_speech_is_not_trimmed(wav):
    assert trimmed(wav, RATE) == (0.0, len(wav) / RATE)


def test_parts_of_recordings_are_read(tmp_path, speech):
    path = str(tmp_path / "a#t=1,2.wav")  # a name that looks like a source
    wav = np.concatenate([silence(1), speech, silence(1)])
    audio.write_wav(path, wav, RATE)
    whole, trimmed_wav = read_part(path, RATE), read_part(without_silence(path), RATE)
    assert len(whole) == len(wav) and len(trimmed_wav) == pytest.approx(len(speech) + 2 * KEPT_SILENCE * RATE, abs=0.1 * RATE)
    assert np.array_equal(read_part(part(path, 1, 1.5), RATE), whole[RATE:RATE + RATE // 2])
    with pytest.raises(audio.AudioError, match="missing file"):
        read_part(without_silence(str(tmp_path / "b.wav")), RATE)


def test_a_recording_is_measured_at_its_own_rate(tmp_path, speech):
    wav = audio.resample(np.concatenate([silence(0.5), speech, silence(1)]), RATE, 16000)
    soundfile.write(tmp_path / "a.flac", np.stack([wav, wav], 1), 16000)
    row = measure(str(tmp_path / "a.flac"), Config())
    assert row["sample_rate"] == 16000 and row["frames"] == len(speech) // 256 + round(1.5 * RATE / 256)
    assert row["leading_silence"] == pytest.approx(0.5, abs=0.03) and row["trailing_silence"] == pytest.approx(1, abs=0.03)
    assert -40 < row["loudness_db"] < -5 and row["clipped"] == 0
    soundfile.write(tmp_path / "a.wav", wav, 16000)
    copy = np.concatenate([wav, np.zeros(16000)])
    soundfile.write(tmp_path / "b.wav", copy, 16000)
    assert measure(str(tmp_path / "b.wav"), Config())["sound"] == measure(str(tmp_path / "a.wav"), Config())["sound"]
    (tmp_path / "c.wav").write_text("no sound")
    assert measure(str(tmp_path / "c.wav"), Config())["problem"].startswith("unreadable")


# --- all recordings

@given(st.integers(1, 60), st.integers(0, 2**16))
def test_a_wrong_text_stands_out(count, seed):
    rng = np.random.default_rng(seed)
    characters = rng.integers(5, 200, count).astype(float)
    seconds = (0.4 + characters / 15) * rng.lognormal(0, 0.1, count)
    found = deviations(characters, seconds)
    assert found.shape == (count,) and np.isfinite(found).all()
    if count >= 30:
        seconds[7] *= 4
        assert np.argmin(deviations(characters, seconds)) == 7 and deviations(characters, seconds)[7] < -4


# --- the page

@pytest.fixture
def source(tmp_path, wavs):
    """A folder with a wrong text, a clipped, a long, a silent and a broken recording, a copy, and one at 16 kHz."""
    folder, texts = tmp_path / "my <voice>", list(TEXTS)
    folder.mkdir()
    sounds = {n: wav for n, wav in enumerate(wavs)}
    texts[2] = "This is quite another text, and much too long for what is said here, so it stands out among the others."
    sounds[4] = np.clip(8 * wavs[4], -1, 1)
    sounds[5] = np.concatenate([silence(12.5), wavs[5]])
    sounds[6], texts[7] = silence(1), "Café №7."
    sounds[9] = wavs[8]
    for n, wav in sounds.items():
        audio.write_wav(folder / f"u{n}.wav", wav, RATE)
    soundfile.write(folder / "u10.wav", audio.resample(wavs[10], RATE, 16000), 16000)
    (folder / "u11.wav").write_text("broken")
    (folder / "metadata.csv").write_text("".join(f"u{n}|{text}\n" for n, text in enumerate(texts)))
    return folder


def look(source, out, *flags) -> tuple[list[dict], str]:
    prepare.main(["--source", str(source), "--report", str(out), "--workers", "1", *flags])
    return list(csv.DictReader((out / "utterances.csv").open())), (out / "index.html").read_text()


def test_the_page_names_what_stands_out(source, tmp_path, capsys):
    rows, page = look(source, tmp_path / "look")
    assert f"report: {tmp_path / 'look' / 'index.html'}" in capsys.readouterr().out and not (tmp_path / "corpus").exists()
    assert [row["utt_id"] for row in rows] == [f"u{n}" for n in range(24)]
    by_id = {row["utt_id"]: row for row in rows}
    assert {i: row["problem"].split(" /")[0] for i, row in by_id.items() if row["problem"]} == {
        "u2": "more tokens than positions", "u5": "longer than block_size", "u11": "unreadable file"}
    assert max(rows, key=lambda row: float(row["deviation"] or 0))["utt_id"] == "u2" and float(by_id["u2"]["deviation"]) > 4
    assert by_id["u10"]["sample_rate"] == "16000" and float(by_id["u5"]["leading_silence"]) == pytest.approx(12.5, abs=0.1)
    for finding in ("them out: 1 of 24 recordings, 13.", "Longer than block_size = 1024 frames (11.9 s)", "Cannot be used: 1 of 24",
                    "Silent, or nearly so: 1 of 24", "others of their length: ", "lie in a row on one value: 1.",
                    "at their ends beyond 0.2 s: ", "recordings, at 16,000 Hz, have sound up to 7.", "Recordings that occur more than once: 1, in 2 files",
                    "Characters that occur fewer than 10 times: "):
        assert finding in page, finding
    assert "my &lt;voice&gt;" in page and "<voice>" not in page
    assert 'src="../my%20%3Cvoice%3E/u2.wav"' in page and "http" not in page.replace("http-equiv", "")


def test_trimmed_recordings_agree_with_the_corpus(source, tmp_path):
    from corpus import Corpus
    (source / "u11.wav").unlink()
    shutil.copy(source / "u1.wav", source / "u11.wav")
    rows, page = look(source, tmp_path / "look", "--out", str(tmp_path / "corpus"), "--trim")
    corpus = Corpus(str(tmp_path / "corpus"), Config())
    assert corpus.ids == [row["utt_id"] for row in rows]
    assert np.abs(corpus.frames - [int(row["frames"]) for row in rows]).max() <= 1 and corpus.frames.max() < 400
    for utt_id, frames in zip(corpus.ids, corpus.frames):
        assert len(audio.read_wav(str(tmp_path / f"corpus/recordings/{utt_id}.wav"), RATE)) // 256 == frames
    assert "Longer than block_size" not in page and "#trim" not in page


def test_one_of_two_outputs_is_needed(source):
    with pytest.raises(UserError, match="--report DIR"):
        prepare.main(["--source", str(source)])
    with pytest.raises(UserError, match="workers = 0"):
        prepare.main(["--source", str(source), "--report", str(source / "look"), "--workers", "0"])
