"""Pictures of log-mels and of attention maps, as PNG."""
import io
from pathlib import Path

import numpy as np

from common import write_file
from config import Config


def mel_limits(cfg: Config) -> dict:
    """The log-mel values at the ends of the colour scale. All pictures share them, so that they can be compared."""
    return {"vmin": cfg.mel_mean - 2 * cfg.mel_std, "vmax": cfg.mel_mean + 3 * cfg.mel_std}


def save_map(path: Path, values: np.ndarray, cfg: Config) -> str:
    """Write values (time, height) as a picture with one pixel per value and the first row of heights at the bottom.

    A file name that ends in "mel" marks a log-mel; all other values are colours from 0 to their maximum. Returns the file's
    name. Raises UserError.
    """
    from matplotlib.image import imsave  # here, because loading matplotlib takes half a second
    colours = mel_limits(cfg) | {"cmap": "magma"} if path.stem.endswith("mel") else {"vmin": 0, "cmap": "viridis"}
    png = io.BytesIO()
    imsave(png, values.T, origin="lower", format="png", **colours)
    write_file(path, png.getvalue())
    return path.name


def mel_png(mel: np.ndarray, cfg: Config) -> bytes:
    """A log-mel (frames, n_mels) as a PNG with two axes: time in seconds, and the centre of each mel band in Hz."""
    from librosa import mel_frequencies
    from matplotlib.figure import Figure
    seconds = len(mel) * cfg.hop_length / cfg.sample_rate
    figure = Figure(figsize=(min(24, 2 + 1.6 * seconds), 3), layout="constrained")
    ax = figure.add_subplot(xlabel="seconds", ylabel="Hz")
    ax.imshow(mel.T, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, -0.5, cfg.n_mels - 0.5),
              **mel_limits(cfg))
    bands = np.linspace(0, cfg.n_mels - 1, 6).round().astype(int)
    centres = mel_frequencies(cfg.n_mels + 2, fmin=cfg.f_min, fmax=cfg.f_max)[1:-1]  # Hz
    ax.set_yticks(bands, [f"{centres[n]:.0f}" for n in bands])
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()
