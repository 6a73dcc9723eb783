"""Where a training step's time goes, how two configs compare step by step in turn, and how a step's cost grows.

    python eval/bench.py --config configs/demo.yaml --against configs/demo_baseline.yaml
    python eval/bench.py --config configs/demo.yaml --scaling scaling.png     # against frames, batch, width and ranks
    python eval/bench.py --config configs/ljspeech.yaml --data_dir data/demo_bigvgan --text_encoder_name random \
        --text_encoder_width 1472 --text_encoder_layers 12 --text_encoder_heads 16     # of ByT5-small's size

Utilisation is the decoder's arithmetic (model.decoder_flops_per_frame, three times for training) over what one large matrix
product reaches on this device in the same precision. Nothing else should run meanwhile.
"""
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from config import Config, UserError, from_flags, run_cli, split_flags, to_yaml  # noqa: E402
from data import Corpus, TrainingSteps, padding_waste  # noqa: E402
from eval.page import write_bytes  # noqa: E402
from metric import peak_memory, read_metrics  # noqa: E402
from model import TTS, autocast, decoder_flops_per_frame  # noqa: E402
from sample import pick_device  # noqa: E402
from train import make_optimizers  # noqa: E402

WARM_UP = 3  # steps that are not counted
PARTS = ("data", "text", "search", "forward", "backward", "optimiser")
FRAMES_A_TOKEN = 5.5  # of English: what a made-up batch has
TIMES = (0.5, 1, 2, 4)  # of the config's own size, how a step's cost is followed


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
    """A config's model and optimisers on one device; `step` trains once and notes the seconds of each part."""

    def __init__(self, cfg: Config, device):
        torch.manual_seed(cfg.seed)
        self.cfg, self.device, self.model, self.seconds = cfg, device, TTS(cfg).to(device).train(), []
        self.optimizers = make_optimizers(self.model, cfg)

    def step(self, batches: list[dict], data: float = 0.0) -> None:
        """One optimiser step, for whose batches `data` seconds were waited.

        `text` and `search` (the alignment's) are timed by calls of their own and taken from `forward`, which does both too.
        """
        model, took = self.model, dict.fromkeys(PARTS, 0.0) | {"data": data}
        for batch in batches:
            batch = {k: v.to(self.device) for k, v in batch.items()}
            with autocast(self.cfg, self.device):
                start = now(self.device)
                text = model.encode(batch["tokens"], batch["token_lengths"])
                read = now(self.device)
                if self.cfg.align:
                    model.alignment(batch, text)
                found = now(self.device)
                loss = model(batch)["loss"]
            done = now(self.device)
            loss.backward()
            took["backward"] += now(self.device) - done
            took["text"] += read - start
            took["search"] += found - read
            took["forward"] += (done - found) - (found - start)
        start = now(self.device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), self.cfg.grad_clip or float("inf"))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        took["optimiser"] = now(self.device) - start
        self.seconds.append(took | {"frames": int(batches[0]["frames"])})

    def median(self) -> tuple[dict, float]:
        """The parts' medians, and that of a step without its wait for data, which training makes ahead of time."""
        counted = self.seconds[WARM_UP:]
        return ({part: statistics.median(took[part] for took in counted) for part in PARTS},
                statistics.median(sum(took[part] for part in PARTS[1:]) for took in counted))


# --- configs in turn

def compare(benches: dict[str, Bench], steps: int) -> None:
    """Time benches on their corpora, in turn, so that what else the machine does meets all alike; print what was seen."""
    device, sources, waste, rates = next(iter(benches.values())).device, {}, {}, []
    for name, bench in benches.items():
        cfg, corpus = bench.cfg, Corpus(bench.cfg.data_dir, bench.cfg)
        cfg.mel_mean, cfg.mel_std = corpus.mel_stats
        sources[name] = TrainingSteps(corpus, cfg, bench.model.tokenise, 0, 1)
        waste[name] = padding_waste(corpus.frames, sources[name].indices, cfg)
    for n in range(WARM_UP + steps):
        for name, bench in benches.items():
            start = time.perf_counter()
            batches = sources[name][n]
            bench.step(batches, time.perf_counter() - start)
    low = device.type == "cuda" and next(iter(benches.values())).cfg.dtype != "float32"
    peak = matmul_flops(device, torch.bfloat16 if low else torch.float32, 8192 if device.type == "cuda" else 2048)
    for name, bench in benches.items():
        steps, (parts, total) = sources[name], bench.median()
        rate = statistics.median(took["frames"] / sum(took[part] for part in PARTS[1:]) for took in bench.seconds[WARM_UP:])
        tokens = [len(bench.model.tokenise(steps.corpus.texts[i])) for i in steps.indices[:200]]
        frames = float(steps.corpus.frames[steps.indices].mean())
        flops = 3 * decoder_flops_per_frame(bench.cfg, frames, statistics.mean(tokens))
        shares = ", ".join(f"{part} {1e3 * seconds:.1f} ms" for part, seconds in parts.items())
        print(f"{name}: {1e3 * total:.0f} ms a step ({shares}); {rate:,.0f} frames/s, {rate * flops / 1e9:,.1f} GFLOP/s, "
              f"utilisation {rate * flops / peak:.1%}; padding waste {waste[name]:.1%}")
        rates.append(rate)
    ratio = f"; ratio of frames/s {rates[0] / rates[1]:.2f}" if len(rates) > 1 else ""
    print(f"{device.type}, {torch.get_num_threads()} threads, a matrix product reaches {peak / 1e9:,.0f} GFLOP/s; "
          f"peak memory of all {peak_memory(device.type == 'cuda'):.2f} GiB{ratio}")


# --- how the cost grows

def made_up(cfg: Config, frames: int, utterances: int) -> dict:
    """A batch of utterances of so many frames each, of noise: only its shapes matter."""
    tokens = max(2, round(frames / FRAMES_A_TOKEN))
    mel = torch.randn(utterances, frames, cfg.n_mels)
    return {"mel": mel, "noise": torch.randn_like(mel), "mel_lengths": torch.full((utterances,), frames),
            "tokens": torch.randint(3, 200, (utterances, tokens)), "token_lengths": torch.full((utterances,), tokens),
            "seconds": torch.full((utterances,), frames * cfg.hop_length / cfg.sample_rate),
            "t": torch.rand(utterances), "drop_text": torch.zeros(utterances, dtype=torch.bool),
            "frames": torch.tensor(utterances * frames), "utterances": torch.tensor(utterances)}


def cost(cfg: Config, device, frames: int, utterances: int, steps: int) -> float:
    """Seconds of a step."""
    torch.manual_seed(cfg.seed)
    bench = Bench(cfg, device)
    for _ in range(WARM_UP + steps):
        bench.step([made_up(cfg, frames, utterances)])
    return bench.median()[1]


def cost_of_ranks(cfg: Config, ranks: int, steps: int) -> float:
    """Seconds of a step of train.py on the corpus, with the same batch divided among so many ranks of this machine."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = dataclasses.replace(cfg, run_name="ranks", out_dir=str(Path(folder) / "run"), max_steps=WARM_UP + steps,
                                    log_interval=1, val_interval=0, eval_interval=0, checkpoint_interval=0, no_wandb=True,
                                    **{"gpus" if cfg.gpus else "nproc": ranks})
        (Path(folder) / "ranks.yaml").write_text(to_yaml(quiet))
        command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--"]
                                     if ranks > 1 else []), "train.py", "--config", str(Path(folder) / "ranks.yaml")]
        threads = {} if cfg.gpus else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
        done = subprocess.run(command, cwd=ROOT, env=os.environ | threads, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"{ranks} ranks do not train: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
        rows = read_metrics(Path(quiet.out_dir) / "metrics.jsonl")
    return statistics.median(row["time/step_sec"] for row in rows[WARM_UP:] if "time/step_sec" in row)


def scaling(cfg: Config, device, steps: int) -> dict[str, dict[int, float]]:
    """Seconds of a step against frames an utterance, utterances, width and ranks, around the config's own sizes."""
    corpus = Corpus(cfg.data_dir, cfg)
    cfg.mel_mean, cfg.mel_std = corpus.mel_stats
    frames, batch = round(float(corpus.frames[corpus.training_indices(cfg)].mean())), cfg.batch_size
    found = {name: {} for name in ("frames an utterance", "utterances a step", "width", "ranks")}
    for times in TIMES:
        found["frames an utterance"][round(times * frames)] = cost(cfg, device, round(times * frames), batch, steps)
        found["utterances a step"][round(times * batch) or 1] = cost(cfg, device, frames, round(times * batch) or 1, steps)
        width = round(times * cfg.width / cfg.heads / 2) * 2 * cfg.heads  # of even heads
        found["width"][width] = cost(dataclasses.replace(cfg, width=width), device, frames, batch, steps)
    most = torch.cuda.device_count() if cfg.gpus else os.cpu_count()
    ranks = 1
    while ranks <= most and cfg.batch_size % ranks == 0:
        found["ranks"][ranks] = cost_of_ranks(cfg, ranks, steps)
        ranks *= 2
    return found


def draw(found: dict, path: Path, title: str) -> None:
    """The scaling as curves in one picture. Raises UserError if it cannot be written."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    for axes, (name, points) in zip(figure.subplots(1, len(found)), found.items()):
        sizes, seconds = list(points), [1e3 * s for s in points.values()]
        axes.plot(sizes, seconds, "o-")
        for size, ms in zip(sizes, seconds):
            axes.annotate(f"{ms:.0f}", (size, ms), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
        axes.set(xlabel=name, ylabel="ms a step", xticks=sizes, ylim=(0, 1.15 * max(seconds)))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], dpi=110)
    write_bytes(path, image.getvalue())


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv:
        print(__doc__)
        return
    flags = split_flags(argv, extra=("against", "steps", "device", "scaling"))
    try:
        steps = int(flags.pop("steps", 12))
    except ValueError:
        steps = 0
    if steps < 1:
        raise UserError("--steps: expected a whole number of 1 or more")
    device = pick_device(flags.pop("device", "auto"))
    against, picture = flags.pop("against", None), flags.pop("scaling", None)
    name, cfg = flags.get("config", "defaults"), from_flags(flags)
    if picture:
        if Path(picture).suffix not in (".png", ".svg") or not Path(picture).parent.is_dir():  # before minutes of measuring
            raise UserError(f"--scaling {picture}: expected a name that ends in .png or .svg, in a folder that is there")
        found = scaling(cfg, device, steps)
        print(json.dumps({of: {size: round(1e3 * s, 1) for size, s in points.items()} for of, points in found.items()}))
        draw(found, Path(picture), f"{name}: cost of a training step on {device.type}")
        return
    benches = {name: Bench(cfg, device)}
    if against:
        benches[against] = Bench(from_flags(flags | {"config": against}), device)
    compare(benches, steps)


if __name__ == "__main__":
    run_cli(main)
