"""The `ctc` judge: a small speech recogniser, trained on the corpus's own recordings. It needs no download.

    python eval/ctc.py --config configs/grammar.yaml      # train it, save it in the corpus's folder, print its error rates

Seven convolutions on log-mels, trained with CTC. On the grammar corpus: 0.65 M parameters, one minute on two cores.
On 5.5 hours with 12,406 words: 2.6 M parameters, 5.3 minutes of one core, and a floor of CER 21 %, WER 64 %.
So with an open vocabulary it is no substitute for Whisper.
It understands only its corpus's voices. Every evaluation also reports its floor, the error rates on held-out recordings.
"""
import hashlib
from pathlib import Path

import jiwer
import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import audio
from common import UserError, pick_device, progress, replacing, run_cli
from config import Config, load_config
from corpus import Corpus
from data import epoch_batches

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789' "  # symbols 1, 2, …; symbol 0 is CTC's blank
DILATIONS = (1, 2, 4, 1, 2, 4)  # the receptive field is 0.7 s, about two words, and twice that with stride 4
BATCH, PEAK_LR = 32, 3e-3
MANY_WORDS = 1000  # a corpus with more distinct words gets the larger recogniser
WIDTH, STRIDE, STEPS = 128, 2, 250
LARGE = 256, 4, 1000  # the same of the larger one
NOISE = 0.3  # standard deviation of the noise added to normalised log-mels in training, against vocoder artefacts


def normalise_text(text: str) -> str:
    """Lower case, only characters of the alphabet, single spaces: the part of a text that this judge can recognise."""
    return " ".join("".join(c if c in ALPHABET else " " for c in text.lower().replace("’", "'")).split())


class Block(nn.Module):
    """A residual block: norm, dilated convolution, GELU, linear layer. The mask sets the convolution's padding to zero."""

    def __init__(self, width: int, dilation: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(width, width, 5, padding=2 * dilation, dilation=dilation)
        self.out = nn.Linear(width, width)

    def forward(self, x, mask):
        h = (self.norm(x) * mask).transpose(1, 2)
        return x + self.out(nn.functional.gelu(self.conv(h)).transpose(1, 2))


class Recogniser(nn.Module):
    """Convolutions at one position per `stride` frames, and a symbol per two frames.

    Speech can have more letters than positions at stride 4, so a position has two symbols there.
    """

    def __init__(self, n_mels: int, width: int = WIDTH, stride: int = STRIDE):
        super().__init__()
        self.stride = stride
        self.inp = nn.Conv1d(n_mels, width, 2 * stride + 1, stride=stride, padding=stride)
        self.blocks = nn.ModuleList(Block(width, d) for d in DILATIONS)
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, stride // 2 * (len(ALPHABET) + 1))

    def forward(self, mels: torch.Tensor, lengths: torch.Tensor):
        """Normalised log-mels (B, T, n_mels), zero beyond lengths, to log-probabilities (B, T / 2, symbols) and lengths."""
        positions = (lengths + self.stride - 1) // self.stride
        x = self.inp(mels.transpose(1, 2)).transpose(1, 2)
        mask = (torch.arange(x.shape[1], device=x.device) < positions[:, None])[..., None].float()
        for block in self.blocks:
            x = block(x, mask)
        return self.out(self.norm(x)).unflatten(2, (-1, len(ALPHABET) + 1)).flatten(1, 2).log_softmax(-1), (lengths + 1) // 2


def fingerprint(model: nn.Module) -> str:
    """Eight hex digits of the SHA-256 of a model's weights: judges with other weights must not be compared."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        digest.update(weight.cpu().contiguous().numpy())
    return digest.hexdigest()[:8]


class CTCJudge:
    """The trained recogniser as a judge. `floor` holds its error rates on the corpus's held-out recordings."""
    normalise = staticmethod(normalise_text)

    def __init__(self, model: Recogniser, saved: dict):
        self.model, self.mean, self.std, self.floor = model.eval(), saved["mel_mean"], saved["mel_std"], saved["floor"]
        self.name = f"ctc {fingerprint(model)}"

    @torch.inference_mode()
    def transcribe_mels(self, mels: list) -> list[str]:
        """Log-mels, each (frames, n_mels), to texts by greedy CTC decoding."""
        texts = []
        for start in range(0, len(mels), BATCH):
            batch = [(torch.as_tensor(np.asarray(m, np.float32)) - self.mean) / self.std for m in mels[start:start + BATCH]]
            scores, lengths = self.model(pad_sequence(batch, batch_first=True), torch.tensor([len(m) for m in batch]))
            for symbols, n in zip(scores.argmax(-1), lengths):
                symbols = torch.unique_consecutive(symbols[:n])
                texts.append(normalise_text("".join(ALPHABET[s - 1] for s in symbols.tolist() if s)))
        return texts

    def transcribe(self, wavs: list[np.ndarray], cfg: Config) -> list[str]:
        """Wavs, each (samples,) at cfg.sample_rate, to texts."""
        return self.transcribe_mels([audio.log_mel(wav, cfg) for wav in wavs])


def train_judge(corpus: Corpus, cfg: Config, path: Path, steps: int = 0, device="cpu") -> None:
    """Train a judge on the training split, measure its floor on the held-out splits, and save it. Raises UserError.

    Without `steps` their number depends on the vocabulary (MANY_WORDS). On a CPU two calls give the same judge.
    """
    texts = {int(i): normalise_text(corpus.spoken[i]) for i in corpus.split("train", cfg)}
    targets = {i: torch.tensor([ALPHABET.index(c) + 1 for c in text]) for i, text in texts.items() if text}
    if not targets:
        raise UserError(f"no training text of {corpus.dir} holds a character that the ctc judge knows ({ALPHABET.strip()}); "
                        "set eval_judge to whisper or none")
    train, batches, (mean, std) = np.array(list(targets)), [], corpus.mel_stats
    words = len({word for text in texts.values() for word in text.split()})
    width, stride, enough = (WIDTH, STRIDE, STEPS) if words <= MANY_WORDS else LARGE
    steps = steps or enough
    # fork_rng, so that the caller's random numbers do not change
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(0)
        model = Recogniser(cfg.n_mels, width, stride).to(device)
        opt = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, PEAK_LR, total_steps=steps, pct_start=0.15)
        for step in progress(range(steps), desc="training the ctc judge", unit="step", leave=True):
            batches = batches or epoch_batches(corpus.frames[train], min(BATCH, len(train)), 0, step)
            rows = train[batches.pop()].tolist()
            mels = [torch.from_numpy((np.asarray(corpus.mel(i), np.float32) - mean) / std) for i in rows]
            lengths = torch.tensor([len(m) for m in mels])
            mels = pad_sequence(mels, batch_first=True)
            mels += NOISE * torch.randn_like(mels) * (torch.arange(mels.shape[1]) < lengths[:, None])[..., None]
            scores, lengths = model(mels.to(device), lengths.to(device))
            loss = nn.functional.ctc_loss(scores.transpose(0, 1), torch.cat([targets[i] for i in rows]).to(device), lengths,
                                          torch.tensor([len(targets[i]) for i in rows]), zero_infinity=True)
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            schedule.step()
    saved = {"model": model.cpu().state_dict(), "width": width, "stride": stride, "mel_mean": mean, "mel_std": std,
             "floor": {}}
    held_out = np.concatenate([corpus.split(split, cfg) for split in ("val", "test")])
    references = [normalise_text(corpus.spoken[i]) for i in held_out]
    hypotheses = CTCJudge(model, saved).transcribe_mels([corpus.mel(i) for i in held_out])
    saved["floor"] = {"cer": jiwer.cer(references, hypotheses), "wer": jiwer.wer(references, hypotheses),
                      "recordings": len(held_out)}
    with replacing(path) as tmp:
        torch.save(saved, tmp)


def load_ctc_judge(data_dir: str, cfg: Config, device="cpu") -> CTCJudge:
    """The judge in a corpus's folder. If there is none yet, it is trained on `device` first. Raises UserError."""
    corpus, path = Corpus(data_dir, cfg), Path(data_dir) / "judge_ctc.pt"
    if not path.exists():
        train_judge(corpus, cfg, path, device=device)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers do not change
            model = Recogniser(cfg.n_mels, saved.get("width", WIDTH), saved.get("stride", STRIDE))
        model.load_state_dict(saved["model"])
        return CTCJudge(model, saved)
    except Exception as e:  # torch, zip and pickle errors of many types
        raise UserError(f"{path} is not a ctc judge ({type(e).__name__}); delete it, and it will be trained again") from None


def main(argv: list[str]) -> None:
    cfg = load_config(argv)
    train_judge(Corpus(cfg.data_dir, cfg), cfg, Path(cfg.data_dir) / "judge_ctc.pt", device=pick_device())
    floor = load_ctc_judge(cfg.data_dir, cfg).floor
    print(f"ctc judge of {cfg.data_dir}: CER {floor['cer']:.2%}, WER {floor['wer']:.2%} on {floor['recordings']} held-out "
          "recordings")


if __name__ == "__main__":
    run_cli(main)
