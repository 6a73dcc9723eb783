"""Real parts for test_ljspeech.py: a folder in LJSpeech's layout, small random weights on disk, a server with Range.

As a program it prepares a corpus slowly, in shards of 8 and with two workers, so that a test can kill it meanwhile:

    python tests/ljspeech_parts.py SOURCE OUT
"""
import http.server
import io
import json
import re
import sys
import tarfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from conftest import ROOT

import audio
from config import Config, from_flags
from corpus import write_corpus
from folder.prepare import read_folder  # data/folder/prepare.py

RATE = 22050
SHARD_UTTS = 8


# --- a folder in LJSpeech's layout

def speech_like(rng: np.random.Generator, seconds: float) -> np.ndarray:
    """Harmonics of a gliding pitch under two moving formants, with a little noise and the rhythm of syllables."""
    t = np.arange(int(seconds * RATE)) / RATE
    pitch = rng.uniform(100, 180) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * t))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formants = [rng.uniform(low, high) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(1, 3) * t))
                for low, high in ((350, 700), (1200, 2200))]
    wav = sum(np.sin(k * phase) * sum(np.exp(-((k * pitch - f) / 250) ** 2) for f in formants) for k in range(1, 16))
    wav = (wav + 0.05 * rng.standard_normal(len(t))) * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * t))
    return 0.5 * wav / np.abs(wav).max()


TEXTS = [  # (original, normalised, expected in the corpus); {n} and {w} are a number and its name
    ("The {n} lamps were lit.", "The {w} lamps were lit.", "The {w} lamps were lit."),
    ('"Room {n}," said the porter', '"Room {w}," said the porter', '"Room {w}," said the porter'),  # a pair of quotes
    ('He read "page {n} aloud.', 'He read "page {w} aloud.', 'He read "page {w} aloud.'),  # a single one
    ("Café №{n}, naïve — “très bien”.", "Café number {w}, naïve — “très bien”.", "Café number {w}, naïve — “très bien”."),
    ("All are gone.|", None, "All are gone."),  # the normalised text is empty
    ("None came back.", None, "None came back."),  # there is no third field at all
    ("  Spaces   count {n}. ", " Spaces   count {w}. ", "Spaces count {w}."),
]
NAMES = "one two three four five six seven eight nine ten eleven twelve".split()
BAD = {  # the numbers of the bad utterances: what is wrong, and how the reason must begin
    11: ("missing", "missing file"), 23: ("truncated", "truncated file"),
    37: ("empty wav", "zero length"), 49: ("empty text", "empty text"),
}


def make_ljspeech(folder: Path, utterances: int = 64, bad: bool = True) -> dict:
    """Write `folder`. Returns the texts that the corpus must hold by their ids, in order, and the reasons of the bad ids."""
    (folder / "wavs").mkdir(parents=True)
    rng = np.random.default_rng(7)
    lines, good, reasons = [], {}, {}
    for i in range(1, utterances + 1):
        utt_id, wrong = f"LJ001-{i:04d}", BAD[i][0] if bad and i in BAD else None
        number = {"n": i % 12 + 1, "w": NAMES[i % 12]}
        original, normalised, expected = TEXTS[i % len(TEXTS)]
        fields = [utt_id, original.format(**number)] + ([normalised.format(**number)] if normalised else [])
        wav = speech_like(rng, rng.uniform(0.6, 1.5))
        path = folder / "wavs" / f"{utt_id}.wav"
        if wrong != "missing":
            soundfile.write(path, wav[:0] if wrong == "empty wav" else wav, RATE, subtype="PCM_16")
        if wrong == "truncated":
            path.write_bytes(path.read_bytes()[:9000])
        if wrong == "empty text":
            fields = [utt_id, "", ""]
        lines.append("|".join(fields))
        if wrong:
            reasons[utt_id] = BAD[i][1]
        else:
            good[utt_id] = expected.format(**number)
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"folder": folder, "good": good, "bad": reasons}


def tar_bz2(folder: Path, name: str) -> bytes:
    """`folder` as the bytes of a tar.bz2, under the name `name`."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:bz2") as tar:
        tar.add(folder, arcname=name)
    return data.getvalue()


# --- a server

class RangeHandler(http.server.BaseHTTPRequestHandler):
    """Serves server.data. The next reply ends after server.cut bytes; server.ranges lists the Range headers received."""

    def do_GET(self):
        wanted, data, start = self.headers.get("Range"), self.server.data, 0
        self.server.ranges.append(wanted)
        if data is None:
            return self.send_error(404)
        if wanted and self.server.resumes:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:][:self.server.cut])
        self.server.cut = None

    def log_message(self, *_):
        pass


@contextmanager
def serving(data: bytes | None):
    """A server of `data` on a free port of 127.0.0.1, and its URL. Without data its answer is 404."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeHandler)
    server.data, server.cut, server.ranges, server.resumes = data, None, [], True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/LJSpeech-1.1.tar.bz2"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# --- small random weights in the published files' formats

def save_text_encoder(folder: Path) -> None:
    from transformers import T5Config, T5EncoderModel
    torch.manual_seed(0)
    T5EncoderModel(T5Config(vocab_size=384, d_model=64, d_kv=16, num_heads=4, num_layers=2, d_ff=128,
                            feed_forward_proj="gated-gelu")).save_pretrained(folder)


def published_bigvgan(rate: int, bands: int, n_fft: int, hop: int, fmax: int | None, upsample_rates: list[int]) -> dict:
    """The published config.json of a BigVGAN v2, but with fewer channels and kernels."""
    return {"resblock": "1", "upsample_rates": upsample_rates, "upsample_kernel_sizes": [2 * n for n in upsample_rates],
            "upsample_initial_channel": 64, "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
            "use_tanh_at_final": False, "use_bias_at_final": False, "activation": "snakebeta", "snake_logscale": True,
            "segment_size": 65536, "num_mels": bands, "num_freq": n_fft + 1, "n_fft": n_fft, "hop_size": hop,
            "win_size": n_fft, "sampling_rate": rate, "fmin": 0, "fmax": fmax, "fmax_for_loss": None}


BIGVGAN = {  # by the config whose log-mel it has
    "ljspeech": published_bigvgan(22050, 80, 1024, 256, 8000, [4, 4, 2, 2, 2, 2]),
    "bigvgan24k": published_bigvgan(24000, 100, 1024, 256, None, [4, 4, 2, 2, 2, 2]),
    "bigvgan44k": published_bigvgan(44100, 128, 2048, 512, None, [8, 4, 2, 2, 2, 2])}


def config_of(name: str, **changes) -> Config:
    """A config of the repository, with changes."""
    return from_flags({"config": str(ROOT / "configs" / f"{name}.yaml")} | {k: str(v) for k, v in changes.items()})


def save_bigvgan(folder: Path, name: str = "ljspeech") -> str:
    """Small random weights as the published ones are stored. Returns the folder's path."""
    from bigvgan.bigvgan import AttrDict, BigVGAN
    folder.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = BigVGAN(AttrDict(BIGVGAN[name])).state_dict()
    (folder / "config.json").write_text(json.dumps(BIGVGAN[name]))
    torch.save({"generator": state}, folder / "bigvgan_generator.pt")
    return str(folder)


def save_whisper(path: Path) -> None:
    from whisper.model import ModelDimensions, Whisper
    dims = dict(n_mels=80, n_audio_ctx=1500, n_audio_state=16, n_audio_head=2, n_audio_layer=1,
                n_vocab=51864, n_text_ctx=64, n_text_state=16, n_text_head=2, n_text_layer=1)
    torch.manual_seed(0)
    model = Whisper(ModelDimensions(**dims))
    torch.nn.init.normal_(model.decoder.positional_embedding)  # left uninitialised by the package
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, path)


# --- a preparation that can be killed

def slow_read_wav(path: str, sample_rate: int) -> np.ndarray:
    time.sleep(0.1)
    return audio.read_wav(path, sample_rate)


if __name__ == "__main__":
    write_corpus(sys.argv[2], read_folder(Path(sys.argv[1])), slow_read_wav, Config(), 2, shard_utts=SHARD_UTTS)
