"""The measures, against cases whose answer is known."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import small_model

from eval.measures import alignment_scores, clearest_head, interval, mel_cepstral_distortion, rate_draws
from sample import sample


def diagonal(positions, tokens):
    """Each position looks evenly at its own share of the text: a straight line of any slope."""
    edges = np.linspace(0, 1, positions + 1)[:, None], np.linspace(0, 1, tokens + 1)
    shared = np.minimum(edges[0][1:], edges[1][1:]) - np.maximum(edges[0][:-1], edges[1][:-1])
    return np.maximum(shared, 0) * positions


def test_maps_are_the_weights_that_attention_used():
    """Values mixed by the returned weights give the attention's outcome, which was computed without them."""
    cross, mask = small_model().decoder.blocks[0].cross, torch.tensor([[True] * 5 + [False] * 2, [True] * 7])[:, None, None]
    x, context, maps = torch.randn(2, 9, 32), torch.randn(2, 7, 32), []
    torch.nn.init.normal_(cross.out.weight)  # starts at zero
    y = cross(x, context, mask, None, None, maps)
    values = cross.kv(context).view(2, 7, 2, cross.heads, -1)[:, :, 1]
    assert maps[0].shape == (2, cross.heads, 9, 7) and maps[0][0, ..., 5:].abs().max() == 0
    assert torch.allclose(cross.out(torch.einsum("bhts,bshd->bthd", maps[0], values).flatten(2)), y, atol=1e-5)
    assert torch.equal(cross(x, context, mask, None, None), y)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_sampling_returns_maps_that_do_not_depend_on_the_batch(cfg_scale):
    model, texts = small_model().eval(), ["a", "some words, and more of them, follow", "three words here"]
    alone, together = [], []
    for text in texts:
        sample(model, [text], 3, cfg_scale, maps=alone)
    mels = sample(model, texts, 3, cfg_scale, maps=together)
    for text, mel, one, many in zip(texts, mels, alone, together):
        assert one.shape == many.shape == (-(-len(mel) // model.cfg.patch), len(text) + 1)
        assert np.allclose(one, many, atol=1e-4) and np.allclose(one.sum(axis=1), 1, atol=1e-4)
    for with_maps, without in zip(mels, sample(model, texts, 3, cfg_scale)):
        assert torch.equal(with_maps, without)


@pytest.mark.parametrize("positions, tokens", [(40, 40), (400, 40), (40, 160), (7, 30), (97, 38)])
def test_alignment_of_maps_that_one_can_name(positions, tokens):
    rng = np.random.default_rng(positions)
    perfect = diagonal(positions, tokens)
    assert perfect.sum(axis=1) == pytest.approx(1)
    assert alignment_scores(perfect) == pytest.approx(1, abs=0.03 if positions < 10 else 0.015)
    assert alignment_scores(perfect[::-1]) == alignment_scores(perfect[:, ::-1]) == 0
    assert alignment_scores(np.full_like(perfect, 1 / tokens)) < 1e-3
    noise = rng.exponential(size=(50, positions, tokens))
    noise /= noise.sum(axis=-1, keepdims=True)
    shuffled = np.stack([rng.permutation(perfect) for _ in range(50)])
    assert alignment_scores(noise).mean() < 0.1 and alignment_scores(shuffled).mean() < 0.25
    stuck = np.eye(tokens)[np.full(positions, tokens // 2)]
    assert alignment_scores(stuck) == 0
    assert (clearest_head(np.stack([noise[:3], [stuck, perfect, perfect[::-1]]])) == perfect).all()


def test_a_blurred_diagonal_lies_between():
    """The wider attention looks, the lower; that pauses and hurry bend the line does not matter."""
    def look(width, place):
        scores = np.exp(-0.5 * ((np.arange(50) - place[:, None]) / width) ** 2)
        return float(alignment_scores(scores / scores.sum(axis=1, keepdims=True)))
    straight, bent = np.linspace(0, 49, 120), 49 * np.linspace(0, 1, 120) ** 2
    scores = [look(width, straight) for width in (0.3, 1, 3, 8, 30)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.95 and scores[-1] < 0.2
    assert look(1, bent) == pytest.approx(look(1, straight), abs=0.05)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6), st.floats(0.01, 30))
def test_alignment_of_anything_is_a_fraction(positions, tokens, seed, heat):
    logits = heat * np.random.default_rng(seed).standard_normal((2, 3, positions, tokens))
    maps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    maps /= maps.sum(axis=-1, keepdims=True)
    scores = alignment_scores(maps)
    assert scores.shape == (2, 3) and (0 <= scores).all() and (scores <= 1).all()
    assert clearest_head(maps).shape == (positions, tokens)


def test_mel_cepstral_distortion_by_hand():
    """One cosine of a mel's bands more is that coefficient; loudness and tempo cost nothing."""
    rng, cosine = np.random.default_rng(0), np.cos(np.pi * 3 * (np.arange(80) + 0.5) / 80)
    mel = rng.standard_normal((1, 80)).repeat(6, axis=0)
    assert mel_cepstral_distortion(mel + 0.2 * cosine, mel) == pytest.approx(10 / np.log(10) * np.sqrt(2) * 0.2)
    moving = np.cumsum(rng.standard_normal((30, 80)), axis=0)
    assert mel_cepstral_distortion(moving, moving) == mel_cepstral_distortion(moving.repeat(2, axis=0), moving) == 0
    assert mel_cepstral_distortion(moving - 5, moving) == pytest.approx(0, abs=1e-9)
    assert mel_cepstral_distortion(moving[::-1], moving) > 1


def test_bootstrap_intervals_cover_the_rate_as_often_as_they_say():
    """Of 200 evaluations of 60 prompts with a known error rate, about 95 in 100 intervals hold it."""
    rng, lengths, held = np.random.default_rng(0), np.full(60, 10), 0
    for _ in range(200):
        low, high = interval(rate_draws(rng.binomial(10, 0.2, size=60), lengths))
        held += low <= 0.2 <= high
    assert 0.9 <= held / 200 <= 0.985
    # all texts taken together, not a mean of rates: a long prompt counts for more
    draws = rate_draws([0, 90], [10, 90], seed=1)
    assert set(np.unique(draws)) == {0.0, 0.9, 1.0} and (draws == rate_draws([0, 90], [10, 90], seed=1)).all()
    assert interval(rate_draws([3], [10])) == [0.3, 0.3]
