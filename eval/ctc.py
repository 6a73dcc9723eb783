"""The `ctc` judge: a small recogniser that learns from the corpus's own recordings, so that a demo needs no Whisper.

    python eval/ctc.py --config configs/demo.yaml      # train it anew, save it with the corpus, report its errors
    python eval/ctc.py --config configs/openvocab.yaml --judge_steps 6000 --judge_width 384    # on a GPU where there is one

Seven convolutions with CTC on log-mels; on the embedded corpus 0.65 M parameters and about a minute on two cores. It knows
its corpus's way of speaking and no other, and its own error on held-out recordings is reported beside every result.
"""
import os
import sys
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import nn
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import audio  # noqa: E402
from config import PROGRESS_SECONDS, Config, UserError, first_line, from_flags, run_cli, split_flags  # noqa: E402
from data import Corpus, epoch_batches  # noqa: E402
from sample import pick_device  # noqa: E402

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789' "  # CTC's blank is symbol 0
WIDTH, DILATIONS = 128, (1, 2, 4, 1, 2, 4)  # a symbol sees 0.7 s of sound: about two words
STEPS, BATCH, PEAK_LR = 250, 32, 3e-3
WORDS = 1000  # a corpus of more than so many words gets a judge of twice the width, and half a step a word
NOISE = 0.3  # standard deviation of noise on normalised log-mels in training: robustness against vocoder artefacts


def normalise_text(text: str) -> str:
    """Lower-case, only the alphabet's characters, single spaces: what this judge can hear of a text."""
    return " ".join("".join(c if c in ALPHABET else " " for c in text.lower().replace("’", "'")).split())


class Block(nn.Module):
    """Norm, dilated convolution, GELU and a linear layer around a residual; padding is held at zero by the mask."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask):
        h = (self.norm(x) * mask).transpose(1, 2)
        return x + self.out(nn.functional.gelu(self.conv(h)).transpose(1, 2))


class Recogniser(nn.Module):
    def __init__(self, n_mels: int, width: int = WIDTH):
        super().__init__()
        self.inp = nn.Conv1d(n_mels, width, 5, stride=2, padding=2)
        self.blocks = nn.ModuleList(Block(width, d) for d in DILATIONS)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET) + 1)

    def forward(self, mels: torch.Tensor, lengths: torch.Tensor):
        """(B, T, n_mels) normalised log-mels, zero behind lengths (B,) -> log-probabilities (B, T / 2, symbols), lengths."""
        lengths = (lengths + 1) // 2
        x = self.inp(mels.transpose(1, 2)).transpose(1, 2)
        mask = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None].float()
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x)).log_softmax(-1), lengths


class CTCJudge:
    """Recordings or generated sounds to text. `floor` holds its own errors on held-out recordings."""

    def __init__(self, model: Recogniser, saved: dict):
        self.model, self.mean, self.std, self.floor = model.eval(), saved["mel_mean"], saved["mel_std"], saved["floor"]

    @torch.inference_mode()
    def transcribe_mels(self, mels: list) -> list[str]:
        """Log-mels, each (frames, n_mels), to texts by greedy CTC decoding."""
        texts = []
        for start in range(0, len(mels), BATCH):
            part = [(torch.as_tensor(np.asarray(m, np.float32)) - self.mean) / self.std for m in mels[start:start + BATCH]]
            lengths = torch.tensor([len(m) for m in part])
            scores, lengths = self.model(nn.utils.rnn.pad_sequence(part, batch_first=True), lengths)
            for symbols, n in zip(scores.argmax(-1), lengths):
                symbols = torch.unique_consecutive(symbols[:n])
                texts.append(normalise_text("".join(ALPHABET[s - 1] for s in symbols.tolist() if s)))
        return texts

    def transcribe(self, wavs: list[np.ndarray], cfg: Config) -> list[str]:
        """Wavs, each (samples,) at cfg.sample_rate, to texts."""
        return self.transcribe_mels([audio.log_mel(w, cfg) for w in wavs])


def train_judge(corpus: Corpus, cfg: Config, path: Path, steps: int = 0, width: int = 0, device="cpu") -> None:
    """Train on the corpus's training recordings, measure on its held-out ones, save to `path` (whole or not at all).

    Without `steps` and `width` the corpus's number of distinct words decides: see WORDS.
    """
    mean, std = corpus.mel_stats
    train, held_out = corpus.split("train", cfg), np.concatenate([corpus.split(s, cfg) for s in ("val", "test")])
    targets = {int(i): [ALPHABET.index(c) + 1 for c in normalise_text(corpus.texts[i])] for i in train}
    train = np.array([i for i in train if targets[int(i)]], dtype=np.int64)
    if not len(train):
        raise UserError(f"no training text of {corpus.dir} holds a character that the ctc judge knows ({ALPHABET.strip()}); "
                        "set eval_judge to whisper or none")
    words = len({word for i in train for word in normalise_text(corpus.texts[i]).split()})
    steps = steps or (STEPS if words <= WORDS else max(STEPS, words // 2))
    width = width or (WIDTH if words <= WORDS else 2 * WIDTH)
    batch = min(BATCH, len(train))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recogniser(cfg.n_mels, width).to(device)
        opt = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, PEAK_LR, total_steps=steps, pct_start=0.15)
        batches = []
        for step in trange(steps, desc="training the ctc judge", unit="step", mininterval=PROGRESS_SECONDS):
            if not batches:
                batches = epoch_batches(corpus.frames[train], batch, 0, step)
            rows = train[batches.pop()]
            mels = [torch.from_numpy((np.asarray(corpus.mel(i), np.float32) - mean) / std) for i in rows]
            lengths = torch.tensor([len(m) for m in mels])
            mels = nn.utils.rnn.pad_sequence(mels, batch_first=True)
            mels += NOISE * torch.randn_like(mels) * (torch.arange(mels.shape[1]) < lengths[:, None])[..., None]
            scores, out_lengths = model(mels.to(device), lengths.to(device))
            letters = [torch.tensor(targets[int(i)]) for i in rows]
            loss = nn.functional.ctc_loss(scores.transpose(0, 1), torch.cat(letters).to(device), out_lengths,
                                          torch.tensor([len(of) for of in letters]), zero_infinity=True)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    model.cpu()
    saved = {"model": model.state_dict(), "width": width, "mel_mean": mean, "mel_std": std, "floor": {}}
    judge = CTCJudge(model, saved)
    references = [normalise_text(corpus.texts[i]) for i in held_out]
    hypotheses = judge.transcribe_mels([corpus.mel(i) for i in held_out])
    saved["floor"] = {"cer": jiwer.cer(references, hypotheses), "wer": jiwer.wer(references, hypotheses),
                      "recordings": len(held_out)}
    torch.save(saved, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


def load_judge(data_dir: str, cfg: Config) -> CTCJudge:
    """The judge saved with a corpus, trained first if there is none yet. Raises UserError."""
    corpus = Corpus(data_dir, cfg)
    path = Path(data_dir) / "judge_ctc.pt"
    if not path.exists():
        train_judge(corpus, cfg, path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # judging must not move the caller's random numbers
            model = Recogniser(cfg.n_mels, saved.get("width", WIDTH))
        model.load_state_dict(saved["model"])
        numbers = saved["mel_mean"], saved["mel_std"], *(saved["floor"][key] for key in ("cer", "wer", "recordings"))
        if not all(isinstance(n, (int, float)) for n in numbers):
            raise TypeError("its statistics are not numbers")
        return CTCJudge(model, saved)
    except Exception as e:
        raise UserError(f"{path} is not a ctc judge ({first_line(e)}); delete it and it is trained anew") from None


def main(argv: list[str]) -> None:
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    flags = split_flags(argv, extra=("judge_steps", "judge_width", "device"))
    device = pick_device(flags.pop("device", "auto"))
    try:
        steps, width = (int(flags.pop(name, 0)) for name in ("judge_steps", "judge_width"))
        if min(steps, width) < 0:
            raise ValueError
    except ValueError:
        raise UserError("--judge_steps and --judge_width: expected whole numbers, 0 to let the corpus decide") from None
    cfg = from_flags(flags)
    train_judge(Corpus(cfg.data_dir, cfg), cfg, Path(cfg.data_dir) / "judge_ctc.pt", steps, width, device)
    floor = load_judge(cfg.data_dir, cfg).floor
    print(f"ctc judge of {cfg.data_dir}: CER {floor['cer']:.2%}, WER {floor['wer']:.2%} on {floor['recordings']} held-out "
          "recordings")


if __name__ == "__main__":
    run_cli(main)
