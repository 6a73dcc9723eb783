"""Text to speech with onnxruntime, by a voice that sample.py --export DIR --onnx wrote. This file is copied into DIR.

    python DIR/speak_onnx.py --text "Hello, how are you today?" --out hello.wav      # needs numpy, onnxruntime, soundfile
"""
import argparse
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile


def load_voice(folder, options=None) -> dict:
    """The entries of voice.json, and a session for each graph. `options` are onnxruntime's SessionOptions."""
    voice = json.loads(Path(folder, "voice.json").read_text(encoding="utf-8"))
    for name in ("text", "decoder", "vocoder"):
        path = Path(folder, f"{name}.onnx")
        voice[name] = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return voice


def sample(voice, text, steps, cfg_scale, temperature, seed, speed) -> list[np.ndarray]:
    """Log-mels (1, frames, n_mels): one, or several if the text is too long. It is then cut at a space near the middle."""
    rows = 1 if cfg_scale == 1 else 2  # with guidance, the second row has no text
    tokens = np.array([[byte + 3 for byte in text.encode()] + [1]] * rows)
    inputs = {"token_lengths": np.full(rows, tokens.shape[1]), "no_text": np.arange(rows) > 0}
    of_text = {"tokens": tokens, "token_lengths": inputs["token_lengths"]}
    inputs["text"], seconds, inputs["share"] = voice["text"].run(None, of_text)
    frames = max(1, round(float(seconds[0]) / speed * voice["sample_rate"] / voice["hop_length"]))
    if frames > voice["most_frames"] and (spaces := [space.start() for space in re.finditer(" ", text)]):
        cut = min(spaces, key=lambda place: abs(place - len(text) / 2))
        parts = text[:cut], text[cut + 1:]
        return [mel for part in parts for mel in sample(voice, part, steps, cfg_scale, temperature, seed, speed)]
    inputs["mel_lengths"] = np.full(rows, frames)
    noise = np.random.default_rng([seed, *text.encode()])
    x = temperature * noise.standard_normal((1, frames, voice["n_mels"]), np.float32)
    times = [math.cos(math.pi / 2 * k / steps) for k in range(steps + 1)]  # shorter steps near noise
    for t, after in zip(times, times[1:]):
        inputs |= {"x": np.repeat(x, rows, axis=0), "t": np.full(rows, t, np.float32)}
        velocity = voice["decoder"].run(None, inputs)[0]
        x = x - (t - after) * (velocity[-1:] + cfg_scale * (velocity[:1] - velocity[-1:]))
    return [x * voice["mel_std"] + voice["mel_mean"]]


def speak(voice, text, **options) -> np.ndarray:
    """A text of any length as a wav: sentence by sentence, with a pause after each. `options` are those of `sample`."""
    wavs, pause = [], np.zeros(voice["sample_rate"] // 4, np.float32)
    for sentence in re.split(r"(?<=[.!?]) ", " ".join(text.split())):
        log_mels = sample(voice, sentence, **options)
        wavs += [voice["vocoder"].run(None, {"log_mel": log_mel})[0][0] for log_mel in log_mels] + [pause]
    return np.concatenate(wavs[:-1])


if __name__ == "__main__":
    voice = load_voice(Path(__file__).parent)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="as it is spoken: nine fifteen, not 9:15")
    parser.add_argument("--out", required=True, help="the wav to write")
    for name, default in voice["options"].items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default: {default}")
    options = vars(parser.parse_args())
    text, out = options.pop("text"), options.pop("out")
    if not text.strip():
        parser.error("--text is empty; expected some words")
    if unknown := set("".join(text.split())) - set(voice["characters"] or text):
        print("warning: not in the training texts, so the voice may say anything there:", *sorted(unknown), file=sys.stderr)
    soundfile.write(out, speak(voice, text, **options), voice["sample_rate"])
