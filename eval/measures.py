"""What an evaluation measures: how well attention aligns, how near the mel is, how sure a rate is; and its summary."""
import numpy as np

DRAWS = 2000  # bootstrap resamplings: the ends of a 95 % interval rest on 50 of them each
CEPSTRA = 13


# --- alignment

def alignment_scores(maps: np.ndarray) -> np.ndarray:
    """How well attention maps (..., positions, tokens), rows adding up to 1, tell a text in order: (...,) in [0, 1].

    Monotone times sharp. Monotone: Spearman's rank correlation, not below 0, of the positions with where they look, the
    mean place in the text by their weights. Sharp: how near they look on the mean, with the text's length as 1: 1 where
    the weights' mean distance from that place is at most that of looking evenly at a position's own share of the text
    (so that neither `patch` nor letters that share a position count against it), 0 where it is that of looking evenly at
    the whole. FastSpeech's focus rate, the mean of the rows' largest weights (arXiv 1905.09263), asks for no order and
    falls with every letter a position needs; guided attention's penalty (arXiv 1710.08969) asks for a straight line, which
    speech with pauses is not. A perfect diagonal has 1; even, random, shuffled and reversed ones have about 0.
    """
    from scipy.stats import rankdata
    maps = np.asarray(maps, np.float64)
    T, L = maps.shape[-2:]
    if T < 2 or L < 2:  # nothing to put in order
        return np.zeros(maps.shape[:-2])
    tokens = (np.arange(L) + 0.5) / L
    place = maps @ tokens  # (..., T)
    spread = (maps * np.abs(tokens - place[..., None])).sum(axis=-1)
    sharp = np.clip((1 / 4 - spread) / (1 / 4 - 1 / (4 * T)), 0, 1).mean(axis=-1)
    rank = rankdata(place.round(6), axis=-1) - (T + 1) / 2  # rounded, so that rounding errors put nothing in order
    order = np.arange(T) - (T - 1) / 2
    length = np.sqrt((rank ** 2).sum(axis=-1) * (order ** 2).sum())
    return sharp * np.clip((rank * order).sum(axis=-1) / np.maximum(length, 1e-9), 0, 1)


def clearest_head(maps: np.ndarray) -> np.ndarray:
    """Of maps (blocks, heads, positions, tokens) the one (positions, tokens) with the best alignment score.

    One is enough to read the text by, and others have other work, so that the mean of all is a blurred picture.
    """
    maps = maps.reshape(-1, *maps.shape[-2:])
    return maps[alignment_scores(maps).argmax()]


# --- nearness

def mel_cepstral_distortion(log_mels: np.ndarray, real: np.ndarray) -> float:
    """Mel-cepstral distortion in dB between two log-mels (frames, n_mels), natural logarithm of amplitude.

    (10 / ln 10) sqrt(2 Σ (c_d - c'_d)²) over cepstra 1 to 13 (Kubichek, "Mel-cepstral distance measure for objective
    speech quality assessment", 1993), so loudness says nothing; the mean over the path of dynamic time warping that has
    the least, as in MCD-DTW (arXiv 1910.10288). A frame's cepstra are its log-mel's cosine series, log-mel = c_0 + Σ c_d
    cos(π d (band + 1/2) / bands): figures compare with those of the same log-mel, not with those of WORLD's or SPTK's.
    """
    from librosa.sequence import dtw  # compiles itself, which takes seconds, and only this needs it
    from scipy.fft import dct
    ours, theirs = (dct(np.asarray(m, np.float64), axis=1)[:, 1:CEPSTRA + 1].T / m.shape[1] for m in (log_mels, real))
    steps, path = dtw(ours, theirs)  # Euclidean distances, added up along the path
    return float(10 / np.log(10) * np.sqrt(2) * steps[-1, -1] / len(path))


# --- sureness

def rate_draws(edits: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap: the error rate of all prompts taken together, in DRAWS resamplings of the prompts with replacement.

    `edits` and `lengths` (prompts,) count each prompt's errors and its reference's words or characters. Equal seeds and
    numbers of prompts draw the same prompts, so that a difference of two calls is a paired one.
    """
    n = len(edits)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
    return times @ np.asarray(edits) / (times @ np.asarray(lengths))


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95 % of draws."""
    return [float(end) for end in np.percentile(draws, [2.5, 97.5])]


# --- summaries

def figures(rows: list[dict]) -> dict:
    """The summary's figures over all rows; what no row knows is None.

    Rates are those of all texts together, with 95 % intervals. Durations against the recordings': mean absolute error and
    bias, as fractions. Speaking rates in characters a second.
    """
    found = {}
    for kind in ("", "vocoded_", "recording_"):
        edits = np.array([row[f"{kind}edits"] for row in rows if row.get(f"{kind}edits")])
        for name, at in (("wer", 0), ("cer", 2)):
            found[kind + name] = float(edits[:, at].sum() / edits[:, at + 1].sum()) if len(edits) else None
            found[f"{kind}{name}_interval"] = interval(rate_draws(edits[:, at], edits[:, at + 1])) if len(edits) else None
    real = [row for row in rows if row.get("true_seconds")]
    off = np.array([row["predicted_seconds"] / row["true_seconds"] - 1 for row in real])
    found |= {"alignment": float(np.mean([row["alignment"] for row in rows])),
              "mcd": float(np.mean([row["mcd"] for row in real])) if real else None,
              "duration_error": float(np.abs(off).mean()) if real else None,
              "duration_bias": float(off.mean()) if real else None}
    for name, part, key in (("speaking_rate", rows, "predicted_seconds"), ("real_speaking_rate", real, "true_seconds")):
        found[name] = sum(len(row["reference"]) for row in part) / sum(row[key] for row in part) if part else None
    return found


def markdown(summary: dict) -> str:
    """A summary as tables to paste."""
    def rate(kind, name):
        low, high = summary[f"{kind}{name}_interval"]
        return f"{summary[kind + name]:.2%} ({low:.2%} to {high:.2%})"
    lines = [f"Step {summary['step']}, {summary['count']} prompts of {summary['prompts']}, {summary['steps']} steps, "
             f"guidance {summary['cfg_scale']:g}, judge {summary['judge']}, vocoder {summary['vocoder']}; 95 % intervals.",
             "", "| speech | WER | CER |", "|---|---|---|"]
    for kind, speech in (("", "generated"), ("vocoded_", "recordings' log-mels, vocoded"), ("recording_", "recordings")):
        if summary[f"{kind}wer"] is not None:
            lines.append(f"| {speech} | {rate(kind, 'wer')} | {rate(kind, 'cer')} |")
    lines += ["", "| measure | |", "|---|---|"]
    for name, label, form in (
            ("alignment", "alignment (0 to 1)", "{:.3f}"), ("mcd", "mel-cepstral distortion", "{:.2f} dB"),
            ("duration_error", "duration error", "{:.1%}"), ("duration_bias", "duration bias", "{:+.1%}"),
            ("speaking_rate", "characters a second", "{:.1f}"),
            ("real_speaking_rate", "characters a second, recordings", "{:.1f}"),
            ("sampler_rtf", "real-time factor of the sampler", "{:.3g}"),
            ("vocoder_rtf", "real-time factor of the vocoder", "{:.3g}")):
        if summary[name] is not None:
            lines.append(f"| {label} | {form.format(summary[name])} |")
    return "\n".join(lines) + "\n"
