"""The measures, on cases with a known answer."""
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import small_model

from eval.measures import alignment_scores, bootstrap_rates, clearest_head, error_rates, interval, mel_cepstral_distortion
from sample import sample


def diagonal(positions, tokens):
    """Each position attends evenly to its own share of the text: a straight line of any slope."""
    edges = np.linspace(0, 1, positions + 1)[:, None], np.linspace(0, 1, tokens + 1)
    shared = np.minimum(edges[0][1:], edges[1][1:]) - np.maximum(edges[0][:-1], edges[1][:-1])
    return np.maximum(shared, 0) * positions


def test_attention_maps_are_the_weights_that_attention_used():
    """Values mixed by the returned weights give the attention's output, which the fused kernel computes without them."""
    cross, mask = small_model().decoder.blocks[0].cross, torch.tensor([[True] * 5 + [False] * 2, [True] * 7])[:, None, None]
    x, context, maps = torch.randn(2, 9, 32), torch.randn(2, 7, 32), []
    torch.nn.init.normal_(cross.out.weight)  # it starts at zero
    y = cross(x, context, mask, None, None, maps)
    values = cross.kv(context).view(2, 7, 2, cross.heads, -1)[:, :, 1]
    assert maps[0].shape == (2, cross.heads, 9, 7) and maps[0][0, ..., 5:].abs().max() == 0
    assert torch.allclose(cross.out(torch.einsum("bhts,bshd->bthd", maps[0], values).flatten(2)), y, atol=1e-5)
    assert torch.equal(cross(x, context, mask, None, None), y)


@pytest.mark.parametrize("cfg_scale", [1.0, 2.0])
def test_attention_maps_do_not_depend_on_the_batch(cfg_scale):
    model, texts = small_model().eval(), ["a", "some words, and more of them, follow", "three words here"]
    alone, together = [], []
    for text in texts:
        sample(model, [text], 3, cfg_scale, attention_maps=alone)
    mels = sample(model, texts, 3, cfg_scale, attention_maps=together)
    for text, mel, one, many in zip(texts, mels, alone, together):
        assert one.shape == many.shape == (-(-len(mel) // model.cfg.patch), len(text) + 1)
        assert np.allclose(one, many, atol=1e-4) and np.allclose(one.sum(axis=1), 1, atol=1e-4)
    for with_maps, without in zip(mels, sample(model, texts, 3, cfg_scale)):
        assert torch.equal(with_maps, without)


@pytest.mark.parametrize("positions, tokens", [(40, 40), (400, 40), (40, 160), (7, 30), (97, 38)])
def test_scores_of_maps_with_a_name(positions, tokens):
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
    """The wider the attention, the lower the score. A line bent by pauses and haste scores like a straight one."""
    def score(width, centres):
        weights = np.exp(-0.5 * ((np.arange(50) - centres[:, None]) / width) ** 2)
        return float(alignment_scores(weights / weights.sum(axis=1, keepdims=True)))
    straight, bent = np.linspace(0, 49, 120), 49 * np.linspace(0, 1, 120) ** 2
    scores = [score(width, straight) for width in (0.3, 1, 3, 8, 30)]
    assert scores == sorted(scores, reverse=True) and scores[0] > 0.95 and scores[-1] < 0.2
    assert score(1, bent) == pytest.approx(score(1, straight), abs=0.05)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6), st.floats(0.01, 30))
def test_the_score_of_any_map_is_between_0_and_1(positions, tokens, seed, heat):
    logits = heat * np.random.default_rng(seed).standard_normal((2, 3, positions, tokens))
    maps = np.exp(logits - logits.max(axis=-1, keepdims=True))
    maps /= maps.sum(axis=-1, keepdims=True)
    scores = alignment_scores(maps)
    assert scores.shape == (2, 3) and (0 <= scores).all() and (scores <= 1).all()
    assert clearest_head(maps).shape == (positions, tokens)


@pytest.mark.slow  # librosa.sequence loads slowly
def test_mel_cepstral_distortion_by_hand():
    """Adding one cosine over the mel bands gives that coefficient. Loudness and tempo do not count."""
    rng, cosine = np.random.default_rng(0), np.cos(np.pi * 3 * (np.arange(80) + 0.5) / 80)
    mel = rng.standard_normal((1, 80)).repeat(6, axis=0)
    assert mel_cepstral_distortion(mel + 0.2 * cosine, mel)[0] == pytest.approx(10 / np.log(10) * np.sqrt(2) * 0.2)
    moving = np.cumsum(rng.standard_normal((30, 80)), axis=0)
    assert mel_cepstral_distortion(moving, moving)[0] == 0
    distortion, pairs = mel_cepstral_distortion(moving.repeat(2, axis=0), moving)
    assert distortion == 0 and {(n, n // 2) for n in range(60)} == set(map(tuple, pairs.tolist()))
    assert mel_cepstral_distortion(moving - 5, moving)[0] == pytest.approx(0, abs=1e-9)
    assert mel_cepstral_distortion(moving[::-1], moving)[0] > 1


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_rate_as_often_as_they_say():
    """About 95 % of the intervals of 200 evaluations, of 60 prompts with a known error rate, contain it."""
    rng, lengths, held = np.random.default_rng(0), np.full(60, 10), 0
    for _ in range(200):
        low, high = interval(bootstrap_rates(rng.binomial(10, 0.2, size=60), lengths), lengths.sum())
        held += low <= 0.2 <= high
    assert 0.9 <= held / 200 <= 0.985


def test_rates_are_those_of_all_texts_together():
    """They are not the mean of the prompts' rates: a long prompt weighs more."""
    draws = bootstrap_rates([0, 90], [10, 90], seed=1)
    assert set(np.unique(draws)) == {0.0, 0.9, 1.0} and (draws == bootstrap_rates([0, 90], [10, 90], seed=1)).all()


@given(st.integers(1, 50), st.integers(0, 2))
def test_no_error_in_few_words_is_not_certainty(prompts, errors):
    """Rule of three: without an error in n words, the rate can be 3 / n. An end is never below the bootstrap's."""
    wrong, lengths = np.zeros(prompts, int), np.full(prompts, 10)
    wrong[0] = errors
    draws = bootstrap_rates(wrong, lengths)
    low, high = interval(draws, lengths.sum())
    assert 0 <= low <= errors / lengths.sum() and high == max(np.percentile(draws, 97.5), 3 / lengths.sum()) > 0
    same = interval(draws - draws, lengths.sum(), differences=True)
    assert same == [-3 / lengths.sum(), 3 / lengths.sum()]
    assert interval(draws + 0.5, 10, differences=True)[0] >= 0.5


def test_rates_by_hand():
    assert interval(bootstrap_rates([3], [10]), 10) == [0.3, 0.3]
    rates = error_rates([{"x_edits": [1, 2, 3, 20]}, {"x_edits": None}, {}, {"x_edits": [1, 8, 0, 20]}], "x_")
    assert (rates["x_wer"], rates["x_cer"]) == (0.2, 3 / 40) and rates["x_wer_interval"] == [0.125, 0.5]
    assert error_rates([{}]) == dict.fromkeys(("wer", "wer_interval", "cer", "cer_interval"))
