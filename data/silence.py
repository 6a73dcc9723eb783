"""Where a recording is silent: its speech, its pauses, and the silence at its ends.

A frame is silent if its level is far below that of the recording's speech and close to that of its background. So a quiet
recording, or one with a hum, is read as a loud and clean one is.
"""
import re

import numpy as np

import audio

FRAME, HOP = 0.025, 0.01  # seconds of a frame, and between two frames
FLOOR = -100.0  # dB: the level of digital silence
BELOW = 25.0, 50.0  # dB below the speech: the highest and the lowest threshold
ABOVE = 10.0  # dB above the background: the threshold, within those limits
LOUDEST = 20  # frames, 0.2 s: the level of the speech is that of the quietest of so many of the loudest ones
SHORTEST = 4  # frames of speech in a row. A click fills fewer, the release of a "t" more
KEPT_SILENCE = 0.2  # seconds that trimming leaves at each end


def levels(wav: np.ndarray, rate: int) -> np.ndarray:
    """The level of each frame (frames,) in dB of full scale.

    A pre-emphasis comes first. It takes out an offset and most of a hum, and makes an "s" about as loud as a vowel.
    """
    emphasised = np.append(wav[:1], wav[1:] - 0.97 * wav[:-1]).astype(np.float64)
    size, hop = round(FRAME * rate), round(HOP * rate)
    energy = np.concatenate([[0.0], np.cumsum(np.pad(emphasised, (size // 2, size)) ** 2)])
    starts = np.arange(0, len(wav), hop)
    power = (energy[starts + size] - energy[starts]) / size
    return 10 * np.log10(np.maximum(power, 10 ** (FLOOR / 10)))


def find_speech(wav: np.ndarray, rate: int) -> list[tuple[float, float]]:
    """The stretches of speech as (start, end) in seconds, in order. Empty if nothing stands out.

    The gaps between them are its pauses, from two frames on.
    """
    level = levels(wav, rate)
    loud, background = np.sort(level)[-min(LOUDEST, len(level))], np.percentile(level, 5)
    threshold = np.clip(background + ABOVE, loud - BELOW[1], loud - BELOW[0])
    if loud <= FLOOR:
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[False], level > threshold, [False]])))
    seconds = len(wav) / rate
    return [(max(0.0, start * HOP - HOP / 2), min(seconds, end * HOP - HOP / 2))
            for start, end in edges.reshape(-1, 2) if end - start >= SHORTEST]


def trimmed(wav: np.ndarray, rate: int) -> tuple[float, float]:
    """Start and end, in seconds, of what is left of a recording without the silence at its ends beyond KEPT_SILENCE."""
    speech, seconds = find_speech(wav, rate), len(wav) / rate
    if not speech:
        return 0.0, seconds
    return max(0.0, speech[0][0] - KEPT_SILENCE), min(seconds, speech[-1][1] + KEPT_SILENCE)


# --- parts of recordings

def part(path: str, start: float, end: float) -> str:
    """The source of a part of a recording, from `start` to `end` in seconds: a media fragment (W3C), as browsers play it."""
    return f"{path}#t={start:.3f},{end:.3f}"


def part_times(source: str) -> tuple[float, float]:
    """Start and end, in seconds, of a source that `part` has made."""
    start, _, end = source.rpartition("#t=")[2].partition(",")
    return float(start), float(end)


def without_silence(path: str) -> str:
    """The source of a recording that is trimmed when it is read."""
    return f"{path}#trim"


def split_source(source: str) -> tuple[str, str]:
    """The path of a source, and what follows it: a fragment that `part` or `without_silence` has appended, or nothing."""
    return re.fullmatch(r"(?s)(.*?)((?:#t=[\d.]+,[\d.]+|#trim)?)", source).groups()


def read_part(source: str, sample_rate: int) -> np.ndarray:
    """audio.read_wav of a path, or of a source that `part` or `without_silence` has made from one."""
    path, fragment = split_source(source)
    wav = audio.read_wav(path, sample_rate)
    if not fragment:
        return wav
    start, end = trimmed(wav, sample_rate) if fragment == "#trim" else part_times(source)
    return wav[round(start * sample_rate):round(end * sample_rate)]
