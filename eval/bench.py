"""Where the time of a training step goes, for one config or for two in turn.

    python eval/bench.py --config configs/grammar.yaml --against configs/grammar_baseline.yaml
    for n in 96 192 384; do python eval/bench.py --config configs/grammar.yaml --width $n; done    # how the cost grows
    python eval/bench.py --config configs/ljspeech.yaml --data_dir data/demo_bigvgan --text_encoder_name random \
        --text_encoder_width 1472 --text_encoder_layers 12 --text_encoder_heads 16     # of ByT5-small's size

Utilisation is the decoder's floating-point operations per second (model.decoder_flops_per_frame, times three for training),
divided by those of one large matrix product on the same device in the same precision. Run nothing else meanwhile.
"""
import argparse
import statistics
import time

import torch
from torch.utils.benchmark import Timer

from common import UserError, pick_device, run_cli
from config import Config, from_flags, split_flags
from corpus import Corpus
from data import TrainingSteps, padding_waste
from metric import peak_memory
from model import TTS, autocast, decoder_flops_per_frame
from optim import make_optimizers

WARM_UP = 3  # steps that are not counted
PARTS = ("data", "text", "search", "forward", "backward", "optimiser")


class Bench:
    """A config's corpus, model and optimisers on one device. `step` trains once and notes the seconds of each part."""

    def __init__(self, cfg: Config, device):
        torch.manual_seed(cfg.seed)
        self.cfg, self.device, self.model, self.seconds = cfg, device, TTS(cfg).to(device).train(), []
        self.optimizers = make_optimizers(self.model, cfg)
        self.corpus = Corpus(cfg.data_dir, cfg)
        cfg.mel_mean, cfg.mel_std = self.corpus.mel_stats
        self.batches = TrainingSteps(self.corpus, cfg, self.model.tokenise, 0, 1)

    def mark(self, part: str = "") -> None:
        """Add the time since the last mark to `part` of the current step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if part:
            self.seconds[-1][part] += time.perf_counter() - self.last
        self.last = time.perf_counter()

    def step(self) -> None:
        """One optimiser step on the corpus's next batches."""
        seconds = dict.fromkeys(PARTS, 0.0)
        self.seconds.append(seconds)
        self.mark()
        batches = self.batches[len(self.seconds) - 1]
        self.mark("data")
        for batch in batches:
            batch = {k: v.to(self.device) for k, v in batch.items()}
            self.mark()
            with autocast(self.cfg, self.device):
                text = self.model.encode(batch["tokens"], batch["token_lengths"])
                self.mark("text")
                if self.cfg.alignment_search:
                    self.model.search(batch, text)
                self.mark("search")
                loss = self.model(batch)["loss"]
            self.mark("forward")
            loss.backward()
            self.mark("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.mark("optimiser")
        seconds["forward"] -= seconds["text"] + seconds["search"]  # it does both again
        seconds["step"] = sum(seconds[part] for part in PARTS[1:])  # training makes the data during the step before
        seconds["frames/s"] = int(batches[0]["frames"]) / seconds["step"]

    def median(self, of: str) -> float:
        return statistics.median(seconds[of] for seconds in self.seconds[WARM_UP:])


def matmul_flops(cfg: Config, device) -> float:
    """Floating-point operations per second of a large square matrix product in the config's precision, the best of ten."""
    low = device.type == "cuda" and cfg.dtype != "float32"
    size = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(size, size, device=device, dtype=torch.bfloat16 if low else torch.float32)
    timer = Timer("a @ a", globals={"a": matrix}, num_threads=torch.get_num_threads())
    return 2 * size**3 / min(timer.timeit(1).mean for _ in range(10))


def compare(benches: dict[str, Bench], device, steps: int) -> None:
    """Time each config on its corpus and print the figures. The configs take turns, so that other load affects all alike."""
    for _ in range(WARM_UP + steps):
        for bench in benches.values():
            bench.step()
    peak, rates = matmul_flops(next(iter(benches.values())).cfg, device), []
    for name, bench in benches.items():
        frames, rows = bench.corpus.frames, bench.batches.indices
        tokens = statistics.mean(len(bench.model.tokenise(bench.corpus.spoken[i])) for i in rows[:200])
        rates.append(bench.median("frames/s"))
        flops = 3 * decoder_flops_per_frame(bench.cfg, float(frames[rows].mean()), tokens) * rates[-1]
        parts = ", ".join(f"{part} {1e3 * bench.median(part):.1f} ms" for part in PARTS)
        print(f"{name}: {1e3 * bench.median('step'):.0f} ms per step ({parts}); {rates[-1]:,.0f} frames/s, "
              f"{flops / 1e9:,.1f} GFLOP/s, utilisation {flops / peak:.1%}; "
              f"padding waste {padding_waste(frames, rows, bench.cfg):.1%}")
    ratio = f"; ratio of frames/s {rates[0] / rates[1]:.2f}" if len(rates) > 1 else ""
    print(f"{device.type}, {torch.get_num_threads()} threads, a matrix product reaches {peak / 1e9:,.0f} GFLOP/s; "
          f"peak memory of all {peak_memory(device.type == 'cuda'):.2f} GiB{ratio}")


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", help="a second config to compare with")
    p.add_argument("--steps", type=int, default=12, help="steps per config")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args, flags = p.parse_known_args(argv)
    device, flags = pick_device(args.device), split_flags(flags)
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected 1 or more")
    configs = {flags.get("config", "defaults"): flags}
    if args.against:
        configs[args.against] = flags | {"config": args.against}
    compare({name: Bench(from_flags(flags), device) for name, flags in configs.items()}, device, args.steps)


if __name__ == "__main__":
    run_cli(main)
