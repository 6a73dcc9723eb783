"""Cuts recordings that are too long for training at pauses, and their texts with them.

A voice of this project aligns the text with the sound: which words lie on each side of a pause. It need not be the speaker's
own voice. A cut or a piece that the alignment does not make certain is not used, because a wrong text does more harm than
speech that is left out.
"""
import functools
import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import soundfile
import torch

import audio
from checkpoint import load_checkpoint
from common import UserError, map_processes, progress
from config import Config
from corpus import Utterance
from model import DIAGONAL, TTS
from normalise import as_spoken
from silence import KEPT_SILENCE, find_speech, part, part_times, trimmed
from text_encoder import byte_tokens

PAUSE, WORD_PAUSE = 0.12, 0.25  # seconds: the shortest pause to cut in, after punctuation and between two words
MARGIN, WORD_MARGIN = 30.0, 100.0  # by how much the alignment's score must fall if another gap of the text is put there
COVER, WORD_COVER = 0.3, 0.5  # share of the pause that the alignment gives to the gap between the two words
MOST_CELLS = 30_000_000  # positions times tokens: 240 MB for each of a few arrays
# An alignment is trusted by its error, the squared distance between log-mels, over that of a control: the same words in
# reverse order. The largest ratio for a recording, and for a piece. With a stranger's recordings, right texts had 0.63 to
# 0.88, and texts of other recordings 0.75 to 1.15, most of them more than 0.9
TRUSTED, TRUSTED_PIECE = 0.87, 0.95
RATE = 0.15  # largest difference between log(seconds / predicted seconds) of a piece and of its recording


class Cut(NamedTuple):
    """A pause from `start` to `end` in seconds, and the gap between words that it is: text[:left], text[right:], and the
    number of the space's token."""
    start: float
    end: float
    left: int
    right: int
    token: int


class Aligned(NamedTuple):
    """A recording's alignment: the token (T,) of each position, its squared error over the control's mean (T,), the
    predicted seconds of each token (L,), and the seconds of a position."""
    path: np.ndarray
    error: np.ndarray
    predicted: np.ndarray
    hop: float


@functools.cache
def load_voice(voice: str) -> TTS:
    """The model of a voice that can align, on one thread. Raises UserError."""
    model, _ = load_checkpoint(voice, "cpu")
    if not model.cfg.alignment_search or model.tokenise is not byte_tokens:
        raise UserError(f"--split_long {voice}: this voice has no alignment of bytes; use voices/joe")
    return model


# --- alignment

def text_gaps(text: str, normalise: bool) -> tuple[str, list[tuple[int, int, int]]]:
    """A text as it is spoken, and its gaps between words as (left, right, token): see Cut.

    A gap within what is written out together, such as "$5 million", is left out.
    """
    def spoken(part):
        return as_spoken(part) if normalise else part
    whole, gaps = spoken(text), []
    for space in re.finditer(r"\s+", text):
        left, right = spoken(text[:space.start()]), spoken(text[space.end():])
        if f"{left} {right}".casefold() == whole.casefold():  # the start of a text becomes a capital letter
            gaps.append((*space.span(), len(left.encode())))
    return whole + "." if whole[-1:].isalnum() else whole, gaps


def best_sums(scores: np.ndarray) -> np.ndarray:
    """The largest sum of scores (T, L) over a monotonic path from (0, 0) to each cell, with that cell: (T, L)."""
    sums = np.full(scores.shape, -np.inf)
    sums[0, 0] = scores[0, 0]
    for t in range(1, len(scores)):
        sums[t] = sums[t - 1]
        np.maximum(sums[t, 1:], sums[t - 1, :-1], out=sums[t, 1:])
        sums[t] += scores[t]
    return sums


def align(mel: np.ndarray, token_mel: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Aligns a normalised log-mel (T, n_mels) with the mean log-mels of a text's tokens (L, n_mels).

    Returns the largest sum of scores over paths through each cell (T, L), the best path (T,) and its squared errors (T,).

    Scores are those of TTS.search. The mel is aligned twice. In between, the mean difference in each band is taken out of
    it, which is the difference between the two voices and microphones.
    """
    T, L = len(mel), len(token_mel)
    off = (np.arange(T)[:, None] + 0.5) / T - (np.arange(L) + 0.5) / L
    for _ in range(2):
        scores = mel @ token_mel.T - np.square(token_mel).sum(1) / 2 - DIAGONAL * L * np.square(off)
        through = best_sums(scores) + best_sums(scores[::-1, ::-1])[::-1, ::-1] - scores
        path = through.argmax(axis=1)
        difference = mel - token_mel[path]
        mel = mel - difference.mean(axis=0)
    return through, path, np.square(difference).sum(axis=1)


def find_cuts(through: np.ndarray, path: np.ndarray, pauses: list[tuple[float, float]], text: str,
              gaps: list[tuple[int, int, int]], hop: float) -> list[Cut]:
    """The pauses of a recording that are certain to be gaps of its text. `hop` is the seconds of a position."""
    cuts, tokens = [], np.array([token for *_, token in gaps], dtype=np.int64)
    for start, end in pauses:
        low, high = int(start / hop), min(int(np.ceil(end / hop)), len(path))
        middle = through[(low + high) // 2, tokens]  # of paths on which each gap is in the middle of the pause
        if len(gaps) < 2 or middle.max() == -np.inf:
            continue
        second, best = np.sort(middle)[-2:]
        left, right, token = gaps[int(middle.argmax())]
        marked = not text[left - 1].isalnum()
        cover = np.isin(path[low:high], (token - 1, token) if marked else token).mean()
        if (best - second >= (MARGIN if marked else WORD_MARGIN) and end - start >= (PAUSE if marked else WORD_PAUSE)
                and cover >= (COVER if marked else WORD_COVER) and (not cuts or token > cuts[-1].token)):
            cuts.append(Cut(start, end, left, right, token))
    return cuts


def recorded_seconds(path: str) -> float:
    """The length of a sound by its header; 0 if it has none."""
    try:
        return soundfile.info(path).duration
    except (OSError, RuntimeError):
        return 0.0


# --- pieces

def choose_cuts(cuts: list[Cut], text: str, first: float, last: float, limit: float) -> list[Cut]:
    """Of the possible cuts those that give the fewest pieces of at most `limit` seconds, if possible after sentences.

    Between `first` and `last` a recording may have a stretch that is longer than the limit and has no cut.
    """
    starts, ends = [first, *(cut.end for cut in cuts)], [*(cut.start for cut in cuts), last]
    prices = [0.0 if mark in ".?!" else 0.6 if mark.isalnum() else 0.3 for mark in (text[cut.left - 1] for cut in cuts)]
    best = [(0.0, [])]  # for each start: the price of the pieces before it, and the numbers of their cuts
    for n, end in enumerate(ends):
        options = []
        for m in range(n + 1):
            excess = max(0.0, end - starts[m] + 2 * KEPT_SILENCE - limit)
            price = 1 + (n < len(cuts) and prices[n]) + (excess > 0) * (100 + excess)
            options.append((best[m][0] + price, best[m][1] + [n]))
        best.append(min(options))
    return [cuts[n] for n in best[-1][1][:-1]]


@torch.inference_mode()
def encode_text(model: TTS, spoken: str) -> tuple[np.ndarray, np.ndarray]:
    """The predicted mean log-mels of a text's tokens (L, n_mels), and the predicted seconds of each (L,).

    A text that is longer than the encoder reads is encoded in parts, which end at spaces.
    """
    parts, words = [""], re.findall(r"\S*\s*", spoken)
    for word in words:
        if len((parts[-1] + word).encode()) < model.most_tokens:
            parts[-1] += word
        else:
            parts.append(word)
    mels, seconds = [], []
    for n, text in enumerate(parts, 1):
        tokens = model.tokenise(text)[:None if n == len(parts) else -1]  # only the last part has the end, </s>
        lengths = torch.tensor([len(tokens)])
        encoded = model.encode(torch.tensor([tokens]), lengths)
        whole, shares = model.durations(encoded, lengths)
        mels.append(model.token_mel(encoded)[0].double().numpy())
        seconds.append((whole[:, None] + shares).exp()[0].double().numpy())
    return np.concatenate(mels), np.concatenate(seconds)


def position_mels(wav: np.ndarray, cfg: Config) -> np.ndarray:
    """The normalised log-mel of a wav at cfg.sample_rate, averaged over each decoder position: (T, n_mels)."""
    mel = audio.normalise(audio.log_mel(wav, cfg), cfg)
    return mel[:len(mel) // cfg.patch * cfg.patch].unflatten(0, (-1, cfg.patch)).mean(dim=1).double().numpy()


def trusted_pieces(utt: Utterance, cuts: list[Cut], ends: tuple[float, float], aligned: Aligned,
                   limit: float) -> tuple[list[Utterance], list[str]]:
    """The pieces between cuts that are trusted and at most `limit` seconds long, and of the others what is wrong.

    `ends` are the seconds where the first piece starts and the last one ends.
    """
    held = [min(KEPT_SILENCE, (cut.end - cut.start) / 2) for cut in cuts]
    starts = [ends[0], *(cut.end - h for cut, h in zip(cuts, held))]
    stops = [*(cut.start + h for cut, h in zip(cuts, held)), ends[1]]
    texts = list(zip([0, *(cut.right for cut in cuts)], [*(cut.left for cut in cuts), len(utt.text)]))
    tokens = list(zip([0, *(cut.token + 1 for cut in cuts)], [*(cut.token for cut in cuts), len(aligned.predicted) - 1]))
    seconds = np.bincount(aligned.path, minlength=len(aligned.predicted)) * aligned.hop  # of each token
    ratios = np.array([seconds[a:b].sum() / aligned.predicted[a:b].sum() for a, b in tokens])
    usual = sum(seconds[a:b].sum() for a, b in tokens) / sum(aligned.predicted[a:b].sum() for a, b in tokens)
    found, wrong = [], []
    for n, ((a, b), (left, right)) in enumerate(zip(tokens, texts)):
        error = aligned.error[(aligned.path >= a) & (aligned.path < b)].mean()
        if stops[n] - starts[n] > limit:
            wrong.append(f"{stops[n] - starts[n]:.1f} s without a pause that is certain")
        elif error > TRUSTED_PIECE or abs(np.log(ratios[n] / usual)) > RATE:
            wrong.append(f"{stops[n] - starts[n]:.1f} s that may be something else than {utt.text[left:right]!r:.60}")
        else:
            found.append(replace(utt, utt_id=f"{utt.utt_id}_{n + 1}", text=utt.text[left:right],
                                 source=part(utt.source, starts[n], stops[n])))
    return found, wrong


def split_recording(utt: Utterance, voice: str, limit: float, trim: bool) -> tuple[list[Utterance], str]:
    """The trusted pieces of a recording of more than `limit` seconds, and what was done. No pieces: it stays as it is.

    Raises UserError if the voice cannot be used.
    """
    model = load_voice(voice)
    cfg, (spoken, gaps) = model.cfg, text_gaps(utt.text, model.cfg.normalise)
    try:
        wav = audio.read_wav(utt.source, cfg.sample_rate)
    except audio.AudioError as e:
        return [], str(e)
    mel, (token_mel, predicted) = position_mels(wav, cfg), encode_text(model, spoken)
    if len(token_mel) > len(mel):
        return [], "its text is too long for its sound"
    if len(token_mel) * len(mel) > MOST_CELLS:
        return [], "it is too long to be aligned in memory; cut it into parts of at most three minutes"
    reversed_mel, _ = encode_text(model, " ".join(spoken.split()[::-1]))
    *_, control = align(mel, reversed_mel)
    through, path, error = align(mel, token_mel)
    error = error / control.mean()
    if error.mean() > TRUSTED:
        return [], "the voice cannot follow it, or its text is wrong"
    hop, speech = cfg.patch * cfg.hop_length / cfg.sample_rate, find_speech(wav, cfg.sample_rate)
    pauses = [(end, start) for (_, end), (start, _) in zip(speech, speech[1:])]
    ends = trimmed(wav, cfg.sample_rate) if trim else (0.0, len(wav) / cfg.sample_rate)
    cuts = choose_cuts(find_cuts(through, path, pauses, utt.text, gaps, hop), utt.text, *ends, limit)
    if not cuts:
        return [], "no pause in it is certain to be a gap of its text"
    found, wrong = trusted_pieces(utt, cuts, ends, Aligned(path, error, predicted, hop), limit)
    return found, "; ".join(wrong)


def split_long(utterances: list[Utterance], cfg: Config, voice: str, trim: bool, workers: int | None) -> list[Utterance]:
    """Utterances in which the pieces of recordings longer than cfg.block_size stand for these. Prints what was done.

    A piece has the id of its recording and _1, _2, …, and its split. With `trim`, the silence at the outer ends is left out.
    The sources are paths, and become those of silence.read_part. Raises UserError.
    """
    limit = cfg.block_size * cfg.hop_length / cfg.sample_rate
    long = [u for u in utterances if u.text.strip() and recorded_seconds(u.source) > limit]
    if long:
        load_voice(voice)  # so that a mistake is one error here, and not one in each process
    work = functools.partial(split_recording, voice=voice, limit=limit, trim=trim)
    results = dict(zip([u.utt_id for u in long], progress(map_processes(work, long, workers if len(long) > 8 else 1),
                                                          total=len(long), unit="utt", desc="splitting")))
    pieces = [piece for found, _ in results.values() for piece in found]
    if taken := {u.utt_id for u in utterances} & {u.utt_id for u in pieces}:
        raise UserError(f"a piece would get the id {min(taken)!r}, which another recording has; rename that one")
    for utt_id, (found, how) in results.items():
        print(f"{utt_id}: " + (f"{len(found)} pieces{how and '; left out: '}{how}" if found else f"left as it is: {how}"))
    seconds = sum(end - start for u in pieces for start, end in [part_times(u.source)])
    count, whole = sum(bool(found) for found, _ in results.values()), sum(recorded_seconds(u.source) for u in long)
    print(f"--split_long: {len(long)} recordings are longer than {limit:.1f} s (block_size = {cfg.block_size}); {count} of "
          f"them are cut into {len(pieces)} pieces, {seconds / 60:.1f} of {whole / 60:.1f} min")
    return [new for u in utterances for new in results.get(u.utt_id, ([], ""))[0] or [u]]
