"""
python -m pytest tests/test_align.py

The alignment search against all possible alignments, and the allotment of positions to tokens.
"""
import itertools

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from align import allot_positions, search_alignment, shares


@given(T=st.integers(1, 7), L=st.integers(1, 4), seed=st.integers(0, 1000))
def test_the_search_finds_the_alignment_of_the_largest_score(T, L, seed):
    """Compare with all monotonic alignments, one by one. The second utterance is longer, so the first one is padded."""
    T = max(T, L)
    scores = torch.randn(2, T + 2, L + 1, generator=torch.Generator().manual_seed(seed))
    lengths, token_lengths = torch.tensor([T, T + 2]), torch.tensor([L, L + 1])
    for row, alignment in enumerate(search_alignment(scores, lengths, token_lengths)):
        n, last = int(lengths[row]), int(token_lengths[row]) - 1
        steps = alignment[:n].diff()
        assert alignment[0] == 0 and alignment[n - 1] == last and ((steps == 0) | (steps == 1)).all()
        sums = [sum(scores[row, t, sum(moves[:t])].item() for t in range(n))
                for moves in itertools.product((0, 1), repeat=n - 1) if sum(moves) == last]
        found = scores[row, torch.arange(n), alignment[:n]].sum()
        torch.testing.assert_close(found, torch.tensor(max(sums)), rtol=0, atol=1e-4)


def test_a_text_with_more_tokens_than_positions_has_an_alignment():
    alignment = search_alignment(torch.zeros(1, 3, 9), torch.tensor([3]), torch.tensor([9]))
    assert alignment.shape == (1, 3) and ((0 <= alignment) & (alignment < 9)).all()


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12), st.integers(0, 30), st.integers(0, 3))
def test_each_token_gets_a_position_near_its_share(share, spare, padding):
    """No token is without a position, and where rounding the shares gives each one a position, that is the result."""
    L, share = len(share), torch.tensor(share)
    share = share / share.sum()
    T = L + spare
    alignment, = allot_positions(torch.cat([share, torch.zeros(padding)])[None], torch.tensor([T]), torch.tensor([L]))
    counts = torch.bincount(alignment, minlength=L)
    assert (alignment.diff() >= 0).all() and counts.min() >= 1 and counts.sum() == T and len(counts) == L
    torch.testing.assert_close(shares(alignment[None], torch.tensor([T]), L + padding)[0, :L], counts / T)
    rounded = (share.double().cumsum(0) * T).round().diff(prepend=torch.zeros(1))
    assume(rounded.min() >= 1)
    assert counts.tolist() == rounded.tolist()


def test_tokens_without_a_position_take_it_from_both_sides():
    """Ends at 5, 5, 5 and 10: the middle tokens push the ends around them apart."""
    share = torch.tensor([[0.5, 0.0, 0.0, 0.5]])
    assert allot_positions(share, torch.tensor([10]), torch.tensor([4])).tolist() == [[0] * 4 + [1, 2] + [3] * 4]


def test_more_tokens_than_positions_are_allotted_too():
    alignment = allot_positions(torch.full((1, 9), 1 / 9), torch.tensor([3]), torch.tensor([9]))
    assert alignment.shape == (1, 3) and (alignment.diff() >= 0).all() and alignment.max() < 9


def test_each_token_gets_its_share_of_the_positions():
    share = torch.tensor([[0.2, 0.5, 0.3], [0.75, 0.25, 0.0]])
    alignment = allot_positions(share, torch.tensor([10, 4]), torch.tensor([3, 2]))
    assert alignment[0].tolist() == [0] * 2 + [1] * 5 + [2] * 3 and alignment[1, :4].tolist() == [0, 0, 0, 1]
    assert alignment.max(dim=1).values.tolist() == [2, 1]  # padded positions belong to the last token
