"""What makes the model fast on a CPU: norms with few passes over memory, and attention and batches for bfloat16.

Products of matrices and the softmax of attention are in bfloat16. Norms and sums stay in float32, where a CPU is faster and
exact. What it all gains is in docs/costs.md.
"""
import torch
import torch.nn.functional as F
from torch import nn

SHAPES = 8  # on a CPU in bfloat16, batches are padded to multiples of so many positions and tokens


def widened(x: torch.Tensor) -> torch.Tensor:
    """A bfloat16 x in float32 on a CPU, where bfloat16 is fast in products of matrices only; any other x as it is."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x


class RMSNormOnCPU(torch.autograd.Function):
    """RMSNorm without gain of x (…, D) float32, with few passes over memory. It has no second derivative.

    Forward and backward take a third of the time that torch 2.13's own takes on a CPU.
    """

    @staticmethod
    def forward(ctx, x, eps):
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):
        y, inverse = ctx.saved_tensors
        return torch.addcmul(grad, y, (grad * y).mean(dim=-1, keepdim=True), value=-1).mul_(inverse), None


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, faster in training on a CPU."""

    def forward(self, x):
        if not (x.requires_grad and x.device.type == "cpu" and x.dtype == torch.float32):
            return super().forward(x)
        y = RMSNormOnCPU.apply(x, torch.finfo(x.dtype).eps)
        return y if self.weight is None else y * self.weight


def attend_in_bfloat16(q, k, v, mask):
    """Scaled dot-product attention of q (B, H, T, C) to k and v (B, H, S, C), by products of matrices in bfloat16.

    On CPUs that multiply fast in bfloat16, forward and backward take half of the time of torch 2.13's fused kernel.
    """
    B, H, T, C = q.shape
    q, k, v = (x.bfloat16().reshape(B * H, -1, C) for x in (q, k, v))
    beyond = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, float("-inf")).expand(-1, H, -1, -1).flatten(0, 1)
    return (torch.baddbmm(beyond, q, k.mT, alpha=C**-0.5).softmax(-1) @ v).view(B, H, T, C)


def of_few_shapes(batch: dict, patch: int) -> dict:
    """A batch, padded to multiples of SHAPES positions and tokens, where a CPU multiplies in bfloat16.

    oneDNN, which does that, compiles code for each new shape of matrices.
    """
    if batch["mel"].device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return batch
    frames, tokens = -batch["mel"].shape[1] % (patch * SHAPES), -batch["tokens"].shape[1] % SHAPES
    return batch | {"mel": F.pad(batch["mel"], (0, 0, 0, frames)), "noise": F.pad(batch["noise"], (0, 0, 0, frames)),
                    "tokens": F.pad(batch["tokens"], (0, tokens))}
