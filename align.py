"""Alignment: which token each decoder position belongs to. Found in training by a search, in sampling from predicted shares.

An alignment is a tensor (B, T) of token indices that never decrease along the T positions.
"""
import torch
import torch.nn.functional as F


def search_alignment(scores: torch.Tensor, lengths: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
    """Monotonic alignment search (Glow-TTS, arXiv 2005.11129): the alignment (B, T) of the largest sum of scores (B, T, L).

    The first position belongs to token 0, the last of the `lengths` (B,) positions to the last of the `token_lengths` (B,)
    tokens, and from one position to the next the token stays the same or increases by one.
    """
    B, T, L = scores.shape
    # The loop runs over tokens, because there are fewer of them than positions and each iteration launches GPU kernels. The
    # best sum that ends with token n at position t is the maximum, over n's first position s, of the best sum that ends with
    # n - 1 at s - 1, plus n's own scores from s to t. The latter are differences of running totals, in float64.
    total = scores.double().cumsum(dim=1)
    before = F.pad(total[:, :-1], (0, 0, 1, 0))
    best, starts = total[:, :, 0], []
    for n in range(1, L):
        entered = F.pad(best[:, :-1], (1, 0), value=float("-inf")) - before[:, :, n]
        entered, start = entered.cummax(dim=1)
        best = total[:, :, n] + entered
        starts.append(start)
    # Backwards from the last position: the first position of each token. T means that the token is beyond the text.
    end, first = lengths[:, None] - 1, [torch.full((B, 1), T, device=scores.device)] * L
    for n in reversed(range(1, L)):
        inside = n < token_lengths[:, None]
        start = starts[n - 1].gather(1, end)
        first[n] = torch.where(inside, start, T)
        end = torch.where(inside, (start - 1).clamp(min=0), end)
    first[0] = torch.zeros_like(end)
    positions = torch.arange(T, device=scores.device).repeat(B, 1)
    return torch.searchsorted(torch.cat(first, dim=1), positions, right=True) - 1


def allot_positions(share: torch.Tensor, lengths: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
    """The alignment (B, T) in which each token takes its share (B, L) of the `lengths` (B,) positions.

    As in training, each token gets at least one position, unless a text has more tokens than positions.
    """
    n, last = torch.arange(share.shape[1], device=share.device), token_lengths[:, None] - 1
    end = (share.double().cumsum(dim=1) * lengths[:, None]).round().long()  # of each token: the first position after it
    # Each end must exceed the one before. Isotonic regression finds the nearest such ends: the mean of the running maximum
    # from the left and of the running minimum from the right
    excess = (end - n).where(n <= last, lengths[:, None])
    spread = (excess.cummax(dim=1).values + excess.flip(1).cummin(dim=1).values.flip(1)) // 2
    spread = n + spread.clamp(min=1).minimum(lengths[:, None] - last)
    end = torch.where(last < lengths[:, None], spread, end)
    positions = torch.arange(lengths.max().item(), device=share.device).repeat(share.shape[0], 1)
    return torch.searchsorted(end, positions, right=True).minimum(last)


def shares(alignment: torch.Tensor, lengths: torch.Tensor, tokens: int) -> torch.Tensor:
    """The share (B, L) of the `lengths` (B,) positions that an alignment (B, T) gives to each of L = `tokens` tokens."""
    inside = torch.arange(alignment.shape[1], device=alignment.device) < lengths[:, None]
    counts = torch.zeros(alignment.shape[0], tokens, device=alignment.device).scatter_add_(1, alignment, inside.float())
    return counts / lengths[:, None]
