"""Where a training step's time goes, and how two configs compare, step by step in turn in one process.

    python eval/bench.py --config configs/demo.yaml --against configs/demo_baseline.yaml
    python eval/bench.py --config configs/ljspeech.yaml --data_dir data/demo_bigvgan --text_encoder_name random \
        --text_encoder_width 1472 --text_encoder_layers 12 --text_encoder_heads 16     # of ByT5-small's size

Utilisation is the decoder's arithmetic (model.decoder_flops_per_frame, three times for training) over what one large matrix
product reaches on this device in the same precision. Nothing else should run meanwhile.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import Config, UserError, from_flags, run_cli, split_flags  # noqa: E402
from data import Corpus, TrainingSteps, padding_waste  # noqa: E402
from metric import peak_memory  # noqa: E402
from model import TTS, autocast, decoder_flops_per_frame  # noqa: E402
from sample import pick_device  # noqa: E402
from train import make_optimizers  # noqa: E402

WARM_UP = 3  # steps that are not counted
PARTS = ("data", "text", "forward", "backward", "optimiser")


def matmul_flops(device, dtype, size: int) -> float:
    """Floating-point operations a second of a square matrix product, the best of ten."""
    a, best = torch.randn(size, size, device=device, dtype=dtype), float("inf")
    for _ in range(10):
        start = now(device)
        a @ a
        best = min(best, now(device) - start)
    return 2 * size**3 / best


def now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """A config's model, optimisers and batches on one device; `step` trains once and notes the seconds of each part."""

    def __init__(self, cfg: Config, device):
        corpus = Corpus(cfg.data_dir, cfg)
        cfg.mel_mean, cfg.mel_std = corpus.mel_stats
        torch.manual_seed(cfg.seed)
        self.cfg, self.device, self.model, self.seconds = cfg, device, TTS(cfg).to(device).train(), []
        self.optimizers, self.count = make_optimizers(self.model, cfg), 0
        self.steps = TrainingSteps(corpus, cfg, self.model.tokenise, 0, 1)
        train = corpus.training_indices(cfg)
        self.waste = padding_waste(corpus.frames, train, cfg)
        self.frames = float(corpus.frames[train].mean())
        self.tokens = sum(len(self.model.tokenise(corpus.texts[i])) for i in train[:200]) / len(train[:200])

    def step(self) -> None:
        """One optimiser step. `forward` is without the text encoder, which is timed by a call of its own."""
        model, took = self.model, dict.fromkeys(PARTS, 0.0)
        start = now(self.device)
        batches = self.steps[self.count]
        took["data"] = now(self.device) - start
        for batch in batches:
            batch = {k: v.to(self.device) for k, v in batch.items()}
            with autocast(self.cfg, self.device):
                start = now(self.device)
                model.encode(batch["tokens"], batch["token_lengths"])
                text = now(self.device)
                loss = model(batch)["loss"]
            done = now(self.device)
            loss.backward()
            took["backward"] += now(self.device) - done
            took["text"] += text - start
            took["forward"] += (done - text) - (text - start)
        start = now(self.device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.cfg.grad_clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        took["optimiser"] = now(self.device) - start
        self.count += 1
        if self.count > WARM_UP:
            self.seconds.append(took | {"frames": int(batches[0]["frames"])})

    def report(self, name: str, peak: float) -> dict:
        """Print the medians; returns frames a second (without the wait for data, which training does ahead of time)."""
        parts = {part: statistics.median(took[part] for took in self.seconds) for part in PARTS}
        total = sum(parts.values()) - parts["data"]
        rate = statistics.median(took["frames"] / (sum(took[p] for p in PARTS) - took["data"]) for took in self.seconds)
        flops = 3 * decoder_flops_per_frame(self.cfg, self.frames, self.tokens)
        shares = ", ".join(f"{part} {1e3 * seconds:.1f} ms" for part, seconds in parts.items())
        print(f"{name}: {1e3 * total:.0f} ms a step ({shares}); {rate:,.0f} frames/s, {rate * flops / 1e9:,.1f} GFLOP/s, "
              f"utilisation {rate * flops / peak:.1%}; padding waste {self.waste:.1%}")
        return rate


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv:
        print(__doc__)
        return
    flags = split_flags(argv, extra=("against", "steps", "device"))
    try:
        steps = int(flags.pop("steps", 12))
    except ValueError:
        steps = 0
    if steps < 1:
        raise UserError("--steps: expected a whole number of 1 or more")
    device, against = pick_device(flags.pop("device", "auto")), flags.pop("against", None)
    benches = {flags.get("config", "defaults"): Bench(from_flags(flags), device)}
    if against:
        benches[against] = Bench(from_flags(flags | {"config": against}), device)
    for _ in range(WARM_UP + steps):
        for bench in benches.values():  # in turn, so that what else the machine does meets all alike
            bench.step()
    low = device.type == "cuda" and next(iter(benches.values())).cfg.dtype != "float32"
    peak = matmul_flops(device, torch.bfloat16 if low else torch.float32, 8192 if device.type == "cuda" else 2048)
    rates = [bench.report(name, peak) for name, bench in benches.items()]
    ratio = f"; ratio of frames/s {rates[0] / rates[1]:.2f}" if against else ""
    print(f"{device.type}, {torch.get_num_threads()} threads, a matrix product reaches {peak / 1e9:,.0f} GFLOP/s; "
          f"peak memory of all {peak_memory(device.type == 'cuda'):.2f} GiB{ratio}")


if __name__ == "__main__":
    run_cli(main)
