"""What an evaluation computes: alignment scores, mel-cepstral distortion, error rates with intervals, and summaries."""
import numpy as np

KINDS = {"": "generated", "vocoded_": "recordings' log-mels, vocoded", "recording_": "recordings"}  # by prefix of the names
SOUND = {"dnsmos": ("DNSMOS, P.808", "{:.2f}"), "dnsmos_overall": ("DNSMOS, overall", "{:.2f}"),
         "likeness": ("likeness", "{:.3f}"), "f0_mean": ("F0, Hz", "{:.0f}"),
         "f0_spread": ("F0 spread, semitones", "{:.2f}"), "f0_correlation": ("F0 correlation", "{:.2f}")}  # of voice.py
SOUND_NAMES = [kind + name for kind in KINDS for name in SOUND]
OTHER_NAMES = ["alignment_score", "mcd", "duration_error", "duration_bias", "speaking_rate", *SOUND_NAMES]  # no error rates


def alignment_scores(attention_maps: np.ndarray) -> np.ndarray:
    """How well attention maps (..., positions, tokens) follow the text in order: scores (...,) in [0, 1].

    The rows of a map add up to 1. A position's centre is the mean place in the text under its weights. The score is the
    product of order and sharpness. Order is Spearman's rank correlation of positions and centres, or 0 if it is negative.
    Sharpness is the mean over positions of a number that falls with the weights' mean distance from the centre: 0 for even
    weights over the whole text, 1 for even weights over one T-th of the text, where T is the number of positions. So neither
    a large `patch` nor tokens that share a position lower it, unlike FastSpeech's focus rate (arXiv 1905.09263). A perfect
    diagonal scores 1. Uniform, random, shuffled and reversed maps score about 0.
    """
    from scipy.stats import rankdata  # here, because loading scipy.stats takes half a second
    attention_maps = np.asarray(attention_maps, np.float64)
    T, L = attention_maps.shape[-2:]
    if T < 2 or L < 2:  # there is no order
        return np.zeros(attention_maps.shape[:-2])
    tokens = (np.arange(L) + 0.5) / L
    centres = attention_maps @ tokens  # (..., T)
    spread = (attention_maps * np.abs(tokens - centres[..., None])).sum(axis=-1)
    sharpness = np.clip((1 / 4 - spread) / (1 / 4 - 1 / (4 * T)), 0, 1).mean(axis=-1)
    ranks = rankdata(centres.round(6), axis=-1) - (T + 1) / 2  # rounded, so that float error does not create an order
    order = np.arange(T) - (T - 1) / 2
    norm = np.sqrt((ranks ** 2).sum(axis=-1) * (order ** 2).sum())
    return sharpness * np.clip((ranks * order).sum(axis=-1) / np.maximum(norm, 1e-9), 0, 1)


def clearest_head(attention_maps: np.ndarray) -> np.ndarray:
    """The map (positions, tokens) with the best score in (blocks, heads, positions, tokens). Their mean would be blurred."""
    attention_maps = attention_maps.reshape(-1, *attention_maps.shape[-2:])
    return attention_maps[alignment_scores(attention_maps).argmax()]


def mel_cepstral_distortion(log_mel: np.ndarray, recording_log_mel: np.ndarray) -> tuple[float, np.ndarray]:
    """Mel-cepstral distortion in dB between two log-mels (frames, n_mels), natural logarithm of amplitude.

    Also returns the warping: the pairs (n, 2) of a frame and the recording's frame that corresponds to it.

    (10 / ln 10) sqrt(2 Σ (c_d - c'_d)²) over the cepstra 1 to 13 (Kubichek, "Mel-cepstral distance measure for objective
    speech quality assessment", 1993), so loudness (c_0) does not count. It is the mean over the pairs of frames that dynamic
    time warping finds, as in MCD-DTW (arXiv 1910.10288). The cepstra are a frame's cosine series: log-mel = c_0 + Σ c_d
    cos(π d (band + 1/2) / bands). Distortions from WORLD's or SPTK's cepstra are on another scale.
    """
    from librosa.sequence import dtw  # here, because numba needs seconds to compile it
    from scipy.fft import dct
    cepstra = [dct(np.asarray(m, np.float64), axis=1)[:, 1:14].T / m.shape[1] for m in (log_mel, recording_log_mel)]
    costs, pairs = dtw(*cepstra)  # costs: Euclidean distances, summed along the best warping
    return float(10 / np.log(10) * np.sqrt(2) * costs[-1, -1] / len(pairs)), pairs


def bootstrap_rates(errors: np.ndarray, lengths: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap: the error rate over all prompts in each of 2,000 samples of the prompts, drawn with replacement.

    `errors` and `lengths` (prompts,) count each prompt's errors, and its reference's words or characters. Equal seeds and
    numbers of prompts draw the same samples, so the difference of two results is a paired one.
    """
    n = len(errors)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=2000)
    return draws @ np.asarray(errors) / (draws @ np.asarray(lengths))


def interval(values: np.ndarray, units: int, differences: bool = False) -> list[float]:
    """The ends of the middle 95 % of bootstrapped error rates over `units` words or characters, or of their differences.

    If no error was seen, the bootstrap says 0 to 0, which is too sure. A rate of which no case was seen in n units is below
    3 / n with 95 % (rule of three; Hanley and Lippman-Hand, JAMA 1983). So no upper end of a rate is lower than that, and
    where all differences are 0, the ends are that far from 0.
    """
    low, high = map(float, np.percentile(values, [2.5, 97.5]))
    if differences:
        return [low, high] if values.any() else [-3 / units, 3 / units]
    return [low, max(high, 3 / units)]


def error_rates(rows: list[dict], kind: str = "") -> dict:
    """WER and CER of all judged texts together, with 95 % intervals; None if none was judged. `kind` precedes the names."""
    edits, rates = np.array([row[f"{kind}edits"] for row in rows if row.get(f"{kind}edits")]), {}
    for name, at in (("wer", 0), ("cer", 2)):
        judged = len(edits) > 0
        rates[f"{kind}{name}"] = float(edits[:, at].sum() / edits[:, at + 1].sum()) if judged else None
        rates[f"{kind}{name}_interval"] = interval(bootstrap_rates(edits[:, at], edits[:, at + 1]),
                                                   edits[:, at + 1].sum()) if judged else None
    return rates


def figures(rows: list[dict]) -> dict:
    """The figures of a summary, from all rows of wer.jsonl. A figure that no row has data for is None.

    duration_error is the mean absolute difference from the recordings' durations, duration_bias the mean difference, both
    relative. Speaking rates are in characters per second. Figures of sound are means over the prompts that have them.
    """
    recorded = [row for row in rows if row.get("recording_seconds")]
    difference = np.array([row["predicted_seconds"] / row["recording_seconds"] - 1 for row in recorded])
    values = error_rates(rows) | error_rates(rows, "vocoded_") | error_rates(rows, "recording_") | {
        "alignment_score": float(np.mean([row["alignment_score"] for row in rows])),
        "mcd": float(np.mean([row["mcd"] for row in recorded])) if recorded else None,
        "duration_error": float(np.abs(difference).mean()) if recorded else None,
        "duration_bias": float(difference.mean()) if recorded else None}
    for name, part, key in (("speaking_rate", rows, "predicted_seconds"),
                            ("recording_speaking_rate", recorded, "recording_seconds")):
        values[name] = sum(len(row["reference"]) for row in part) / sum(row[key] for row in part) if part else None
    for name in SOUND_NAMES:
        of_rows = [row[name] for row in rows if row.get(name) is not None]
        values[name] = float(np.mean(of_rows)) if of_rows else None
    return values


def markdown(summary: dict) -> str:
    """The summary as Markdown tables."""
    def rate(name):
        low, high = summary[f"{name}_interval"]
        return f"{summary[name]:.2%} ({low:.2%} to {high:.2%})"
    lines = [f"Step {summary['step']}, {summary['count']} prompts of {summary['prompts']}, {summary['steps']} steps, "
             f"guidance {summary['cfg_scale']:g}, temperature {summary['temperature']:g}, judge {summary['judge']}, vocoder "
             f"{summary['vocoder']}; 95 % intervals.", "", "| speech | WER | CER |", "|---|---|---|"]
    for kind, speech in KINDS.items():
        if summary[f"{kind}wer"] is not None:
            lines.append(f"| {speech} | {rate(f'{kind}wer')} | {rate(f'{kind}cer')} |")
    heard = {kind: [summary[kind + name] for name in SOUND] for kind in KINDS}
    shown = [n for n in range(len(SOUND)) if any(values[n] is not None for values in heard.values())]
    if shown:
        labels, forms = zip(*SOUND.values())
        lines += ["", f"| speech | {' | '.join(labels[n] for n in shown)} |", "|---" * (len(shown) + 1) + "|"]
        for kind, values in heard.items():
            cells = ["–" if values[n] is None else forms[n].format(values[n]) for n in shown]
            lines += [f"| {KINDS[kind]} | {' | '.join(cells)} |"] if set(cells) != {"–"} else []
    lines += ["", "| measure | |", "|---|---|"]
    for name, label, form in (
            ("alignment_score", "alignment score (0 to 1)", "{:.3f}"), ("mcd", "mel-cepstral distortion", "{:.2f} dB"),
            ("duration_error", "duration error", "{:.1%}"), ("duration_bias", "duration bias", "{:+.1%}"),
            ("speaking_rate", "characters per second", "{:.1f}"),
            ("recording_speaking_rate", "characters per second, recordings", "{:.1f}"),
            ("sampler_rtf", "real-time factor of the sampler", "{:.3g}"),
            ("vocoder_rtf", "real-time factor of the vocoder", "{:.3g}")):
        if summary[name] is not None:
            lines.append(f"| {label} | {form.format(summary[name])} |")
    return "\n".join(lines) + "\n"
