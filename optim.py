"""The optimisers (Muon and AdamW), the learning-rate schedule, and the moving average of the weights."""
import dataclasses
import math
from contextlib import contextmanager

import torch

from common import multiplies_bfloat16
from config import Config

# Odd quintic polynomials, applied in turn, that map singular values in [0.005, 1] to 1 ± 0.1. Each has the smallest maximal
# error on the range that the one before leaves, as in Polar Express (arXiv 2505.16932). Linear programming on a grid found
# them. Half of an update's singular values are below 0.006, so fewer polynomials learn more slowly (docs/recipe.md). The
# polynomials explode beyond 1, and rounding to bfloat16 can take a matrix of rank 1 there. MARGIN keeps all below 1.
QUINTICS = ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978), (2.1895, -1.5672, 0.4079))
MARGIN = 1.02


def orthogonalise(x: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Wide matrices (N, m, n) float32, m <= n, with all singular values brought near 1, by products in `dtype` only
    (Newton-Schulz). Returns float32.
    """
    x = (x / (MARGIN * x.norm(dim=(1, 2), keepdim=True)).clamp(min=1e-7)).to(dtype)
    if dtype == torch.bfloat16:
        for a, b, c in QUINTICS:
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.float()
    # Each step multiplies x by a polynomial in its gram matrix. Their product needs small matrices only, and x just once at
    # the start and once at the end. Wide matrices take two thirds of the time. bfloat16 is too coarse for this.
    gram, step, product = x @ x.mT, None, None
    for a, b, c in QUINTICS:
        if step is not None:
            gram = step @ gram @ step
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        step.diagonal(dim1=1, dim2=2).add_(a)
        product = step if product is None else step @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with an orthogonalised update (Jordan et al. 2024), for matrices only.

    The update is scaled to AdamW's RMS (arXiv 2502.16982), so that the learning rates of both have the same scale.
    torch.optim.Muon processes the matrices one by one and in bfloat16. A CPU without bfloat16 instructions emulates that,
    which made a step twenty times slower. This one batches matrices of equal shape, and uses float32 on most CPUs, or
    everywhere if it is `exact`.
    A group with `split` = (size, dim) orthogonalises blocks of its matrices, cut like torch.split, each one alone.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95, exact: bool = False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "split": None})
        self.exact = exact

    @torch.no_grad()
    def step(self):
        shapes = {}  # of wide blocks -> the blocks, and for each matrix: itself, its blocks' number, dim, tallness, its rate
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            averages = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in params]
            torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for p, update in zip(params, torch._foreach_lerp(grads, averages, group["momentum"])):
                size, dim = group["split"] or (len(p), 0)
                blocks = update.split(size, dim)
                tall = blocks[0].shape[0] > blocks[0].shape[1]
                wide, owners = shapes.setdefault(tuple(sorted(blocks[0].shape)), ([], []))
                wide += [block.T if tall else block for block in blocks]
                owners.append((p, len(blocks), dim, tall, group["lr"]))
        for (_, longer), (wide, owners) in shapes.items():
            fast = not self.exact and multiplies_bfloat16(wide[0].device)
            wide = orthogonalise(torch.stack(wide), torch.bfloat16 if fast else torch.float32)
            wide = wide.split([count for _, count, *_ in owners])
            for blocks, (p, _, dim, tall, lr) in zip(wide, owners):
                p.add_(torch.cat(list(blocks.mT if tall else blocks), dim), alpha=-lr * 0.2 * longer**0.5)


def make_optimizers(model, cfg: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for all other trainable parameters of a TTS.

    The heads of the decoder's attention are independent, so Muon orthogonalises each one's part of the matrices alone. The
    loss falls as fast, and a part needs a tenth of the arithmetic.
    Gains, biases (one is the speaking rate) and the vector for no text do not decay: they have no reason to be small.
    """
    encoder = getattr(model.text_encoder, "encoder", None) or model.text_encoder
    blocks = [*model.decoder.blocks, *model.text_blocks, *encoder.children()]
    inside = {m.weight for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear)}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    attentions = [part for block in model.decoder.blocks for part in (block.attn, block.cross)]
    by_rows, by_columns = [p for a in attentions for p in (a.q.weight, a.kv.weight)], [a.out.weight for a in attentions]
    whole, head = [p for p in trained.values() if p in inside - {*by_rows, *by_columns}], cfg.width // cfg.heads
    muon = [{"params": whole}, {"params": by_rows, "split": (head, 0)}, {"params": by_columns, "split": (head, 1)}]
    decaying = [p for name, p in trained.items() if p not in inside and p.ndim == 2 and name.endswith("weight")]
    others = [p for p in trained.values() if p not in {*inside, *decaying}]
    groups = [{"params": decaying}, {"params": others, "weight_decay": 0.0}]
    fused = {"fused": True} if next(model.parameters()).is_cuda else {}
    return [Muon(muon, cfg.learning_rate, cfg.weight_decay, cfg.muon_momentum, exact=cfg.dtype == "float32"),
            torch.optim.AdamW(groups, lr=cfg.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, **fused)]


def lr_factor(step: int, cfg: Config) -> float:
    """The learning rate at a step, divided by its peak: linear warm-up, then cfg.lr_decay down to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    left = {"linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "constant": 1.0}[cfg.lr_decay]
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


def describe_schedule_change(before: int, cfg: Config, step: int) -> str:
    """What another max_steps than `before` does to the learning rate of a run that goes on at `step`."""
    old, new = (lr_factor(step, dataclasses.replace(cfg, max_steps=n)) * cfg.learning_rate for n in (before, cfg.max_steps))
    return (f"max_steps was {before}, is {cfg.max_steps}: the learning rate of step {step} moves from {old:.2e} to "
            f"{new:.2e} ({cfg.lr_decay} decay)")


def set_learning_rates(optimizers: list, cfg: Config, step: int) -> float:
    """Set both optimisers' learning rates for a step. Returns Muon's."""
    factor = lr_factor(step, cfg)
    for optimizer, peak in zip(optimizers, (cfg.learning_rate, cfg.adamw_learning_rate)):
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
    return cfg.learning_rate * factor


def start_ema(model, decay: float) -> dict[str, torch.Tensor]:
    """The average of each trainable parameter, by name, before the first step. Empty if `decay` is 0 (off)."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad} if decay else {}


def update_ema(ema: dict, model, decay: float, step: int) -> None:
    """Move the averages towards the weights. The decay grows over the first steps, to forget the random start soon."""
    if not ema:
        return
    decay = min(decay, (1 + step) / (10 + step))
    weights = dict(model.named_parameters())
    torch._foreach_lerp_(list(ema.values()), [weights[name].detach() for name in ema], 1 - decay)


@contextmanager
def averaged(model, ema: dict):
    """Give the model its averaged weights, in evaluation mode, for the duration of the block."""
    weights = dict(model.named_parameters())

    def swap():
        for name, average in ema.items():
            held = weights[name].data
            weights[name].data, ema[name] = average, held
    swap()
    model.eval()
    try:
        yield
    finally:
        swap()
        model.train()
