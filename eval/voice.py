"""How a voice sounds: naturalness (DNSMOS), likeness to the speaker (Resemblyzer), and pitch (F0).

Naturalness and likeness need packages that are optional: eval/requirements.txt. Without them their figures are None.
"""
import importlib.util
from pathlib import Path

import numpy as np

import audio
from config import Config
from pitch import pitch

RATE = 16000  # Hz, of both networks' input
PACKAGES = {"speechmos": "DNSMOS", "resemblyzer": "likeness"}  # each optional package, and what it gives


def missing_packages() -> str:
    """What to install for which figures, or "" if nothing is missing."""
    lost = [figure for package, figure in PACKAGES.items() if not importlib.util.find_spec(package)]
    return f"no {' and '.join(lost)} in this evaluation: see eval/requirements.txt for what to install" if lost else ""


# --- pitch

def pitch_figures(f0: np.ndarray) -> dict:
    """Mean of a pitch in Hz, and its spread, the standard deviation in semitones; None if no frame is voiced."""
    voiced = f0[~np.isnan(f0)]
    return {"f0_mean": round(float(voiced.mean()), 2) if len(voiced) else None,
            "f0_spread": round(float((12 * np.log2(voiced)).std()), 3) if len(voiced) else None}


def pitch_correlation(f0: np.ndarray, recording_f0: np.ndarray, pairs: np.ndarray) -> float | None:
    """Correlation of two pitches' logarithms over `pairs` (n, 2) of frames, those in which both are voiced.

    None if there are fewer than ten, or if one pitch is constant there.
    """
    pairs = pairs[(pairs < (len(f0), len(recording_f0))).all(axis=1)]
    a, b = np.log(f0[pairs[:, 0]]), np.log(recording_f0[pairs[:, 1]])
    both = ~np.isnan(a) & ~np.isnan(b)
    if both.sum() < 10 or min(a[both].std(), b[both].std()) < 1e-6:
        return None
    return round(float(np.corrcoef(a[both], b[both])[0, 1]), 4)


# --- naturalness and likeness

def load_dnsmos(cfg: Config):
    """A function from a wav (samples,) to its DNSMOS, 1 to 5.

    Its figures are P.808 (arXiv 2010.15258) and the overall one of P.835 (arXiv 2110.01763). The networks were trained to
    rate noise suppression, on 9 s at a time, so a shorter wav is repeated. (speechmos repeats it to up to 18 s and rates as
    many as ten parts, which costs several times as much.) A wav without sound has no figures. None without the packages.
    """
    try:
        from onnxruntime import InferenceSession, SessionOptions
        from speechmos import dnsmos
    except ImportError:
        return None
    models = [str(Path(dnsmos.__file__).parent / "dnsmos_models" / name) for name in ("sig_bak_ovr.onnx", "model_v8.onnx")]
    options, scorer = SessionOptions(), dnsmos.DNSMOS(*models)
    options.intra_op_num_threads = 1  # more threads wait for each other by spinning: on a busy machine that took seconds
    scorer.onnx_sess, scorer.p808_onnx_sess = (InferenceSession(model, options) for model in models)

    def score(wav: np.ndarray) -> dict:
        if not np.any(wav):
            return {}
        wav = np.clip(audio.resample(wav, cfg.sample_rate, RATE), -1, 1)
        least = int(dnsmos.INPUT_LENGTH * RATE)
        found = scorer(np.resize(wav, least) if len(wav) < least else wav, RATE, False)
        return {"dnsmos": round(float(found["p808_mos"]), 4), "dnsmos_overall": round(float(found["ovrl_mos"]), 4)}
    return score


def load_embedder(cfg: Config):
    """A function from a wav (samples,) to its speaker's embedding (256,), of length 1. None without Resemblyzer.

    The embedding is that of GE2E (arXiv 1710.10467). A wav without speech has none: its embedding is None.
    """
    try:
        from resemblyzer import VoiceEncoder, preprocess_wav
    except ImportError:
        return None
    encoder = VoiceEncoder("cpu", verbose=False)

    def embed(wav: np.ndarray) -> np.ndarray | None:
        speech = preprocess_wav(audio.resample(wav, cfg.sample_rate, RATE), RATE) if np.any(wav) else []  # without pauses
        return encoder.embed_utterance(speech) if len(speech) else None
    return embed


def measure_sound(rows: list[dict], wavs: dict[str, list], pairs: list, cfg: Config) -> None:
    """Add the figures of sound to rows of wer.jsonl.

    For each row, `wavs` has a wav of each kind, and `pairs` the warping of generated to recorded frames; either may be None.
    The embeddings stay in the rows, as arrays, until compare_voices() replaces them. The pitch is compared with that of the
    vocoder's copy, which every evaluation of a corpus has, or else of the recording.
    """
    score, embed = load_dnsmos(cfg), load_embedder(cfg)
    for n, row in enumerate(rows):
        pitches = {}
        for kind, prefix in (("audio", ""), ("vocoded", "vocoded_"), ("recording", "recording_")):
            if (wav := wavs[kind][n]) is None:
                continue
            pitches[kind] = pitch(wav, cfg)
            found = pitch_figures(pitches[kind]) | (score(wav) if score else {})
            row.update({prefix + name: value for name, value in found.items()})
            if embed:
                row[f"{prefix}embedding"] = embed(wav)
        reference = pitches.get("vocoded", pitches.get("recording"))
        if reference is not None and pairs[n] is not None:
            row["f0_correlation"] = pitch_correlation(pitches["audio"], reference, pairs[n])
        if "recording" in pitches and "vocoded" in pitches:
            same = np.repeat(np.arange(len(pitches["vocoded"]))[:, None], 2, axis=1)
            row["vocoded_f0_correlation"] = pitch_correlation(pitches["vocoded"], pitches["recording"], same)


def compare_voices(rows: list[dict]) -> None:
    """Replace the embeddings in all rows by likenesses: cosines to the mean embedding of the vocoder's copies.

    The copies have the vocoder's sound as the generated speech has it, and they exist without the recordings, so the
    reference is the same with and without them. A copy is compared with the mean of the other copies, and so is the
    recording behind it.
    """
    taken = [{kind: row.pop(f"{kind}embedding", None) for kind in ("", "vocoded_", "recording_")} for row in rows]
    total = sum((of["vocoded_"] for of in taken if of["vocoded_"] is not None), np.zeros(256))
    for row, of in zip(rows, taken):
        for kind, embedding in of.items():
            own = of["vocoded_"] if kind and of["vocoded_"] is not None else 0
            length = np.linalg.norm(total - own)
            if embedding is not None and length > 1e-6:
                row[f"{kind}likeness"] = round(float(embedding @ (total - own) / length), 4)
