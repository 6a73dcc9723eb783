"""
python -m pytest tests/test_optim.py

The learning-rate schedule, Muon against torch's, and the moving average of the weights.
"""
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_model import small_model

import optim
from config import Config
from optim import Muon, averaged, lr_factor, make_optimizers, orthogonalise, update_ema


def test_the_learning_rate_follows_its_schedule():
    linear = Config(max_steps=100, warmup_steps=10, lr_decay="linear", min_lr_ratio=0.1)
    assert [lr_factor(step, linear) for step in (0, 9, 10, 100)] == pytest.approx([0.1, 1, 1, 0.1])
    cosine = Config(max_steps=100, warmup_steps=0, lr_decay="cosine")
    factors = [lr_factor(step, cosine) for step in range(101)]
    assert factors[50] == pytest.approx(0.5) and factors[100] == pytest.approx(0, abs=1e-12)
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(99, Config(max_steps=100, warmup_steps=0, lr_decay="constant")) == 1


def test_muon_trains_the_matrices_of_blocks_and_adamw_all_others():
    model = small_model()
    muon, adamw = ({p for group in o.param_groups for p in group["params"]} for o in make_optimizers(model, model.cfg))
    names = {p: name for name, p in model.named_parameters()}
    assert muon | adamw == set(names) and not muon & adamw
    assert all(".block" in names[p] or names[p].startswith("text_blocks.") for p in muon)
    assert {names[p] for p in adamw} >= {"text_encoder.shared.weight", "decoder.inp.weight", "decoder.out.weight",
                                         "decoder.modulation.weight", "text_proj.weight"}


def test_only_matrices_decay():
    model = small_model(weight_decay=0.1)
    decays = {p: group["weight_decay"] for o in make_optimizers(model, model.cfg) for group in o.param_groups for p in group["params"]}
    still = {name.split(".")[-1] for name, p in model.named_parameters() if decays[p] == 0 and p.ndim != 1}
    assert still == {"offset", "sharpness"} and all(decays[p] == 0 for p in model.parameters() if p.ndim == 1)
    moving = {name for name, p in model.named_parameters() if decays[p] == 0.1}
    assert moving >= {"text_proj.weight", "decoder.inp.weight", "decoder.blocks.0.mlp.up.weight", "text_encoder.shared.weight"}


def test_muon_steps_as_torchs_does(monkeypatch):
    """Tall, wide and square matrices together, with torch's five quintics. Torch rounds to bfloat16, so allow for that."""
    monkeypatch.setattr(optim, "QUINTICS", ((3.4445, -4.7750, 2.0315),) * 5)
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 16), (16, 32), (16, 16), (32, 16), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    pairs = [(Muon(ours, 0.1, 0.05, 0.9), ours),
             (torch.optim.Muon(theirs, 0.1, 0.05, 0.9, adjust_lr_fn="match_rms_adamw"), theirs)]
    for step in range(3):
        for optimizer, weights in pairs:
            for n, p in enumerate(weights):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n))
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=0.01)  # a step changes a weight by 0.02


def test_muon_orthogonalises_each_head_alone():
    """The parts of queries, keys, values and outputs that belong to one head move as if they were matrices of their own."""
    model = small_model(width=64, heads=4)
    muon, _ = make_optimizers(model, model.cfg)
    attention = model.decoder.blocks[0].cross
    for n, p in enumerate(model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
    weights = attention.q.weight, attention.kv.weight, attention.out.weight

    def parts(matrices):
        q, kv, out = matrices
        return [part.clone() for matrix in (q, kv, out.T) for part in matrix.split(16)]
    before, grads = parts([w.detach() for w in weights]), parts([w.grad for w in weights])
    alone = [torch.nn.Parameter(part.clone()) for part in before]
    for p, grad in zip(alone, grads):
        p.grad = grad
    for optimizer in (muon, Muon(alone, model.cfg.learning_rate, model.cfg.weight_decay, model.cfg.muon_momentum, exact=True)):
        optimizer.step()
    assert len(before) == 16
    for found, was, expected in zip(parts([w.detach() for w in weights]), before, alone):
        torch.testing.assert_close(found, expected.detach())
        assert (found - was).abs().mean() > 1e-5


@pytest.mark.parametrize("shape", [(16, 48), (192, 192), (192, 512), (256, 300), (257, 300)])
def test_orthogonalised_matrices_have_singular_values_near_1(shape):
    rng, m = torch.Generator().manual_seed(sum(shape)), shape[0]
    left, right = (torch.linalg.qr(torch.randn(k, m, generator=rng))[0] for k in shape)
    spread = torch.logspace(0, -1, m)
    spread = (spread / spread.norm()).clamp(min=0.005)
    found = orthogonalise((left * spread @ right.T)[None] * 7)[0]
    values = torch.linalg.svdvals(found)
    assert 0.85 < values.min() and values.max() < 1.15
    torch.testing.assert_close(left.T @ found @ right, torch.eye(m), atol=0.15, rtol=0)  # the singular vectors stay
    assert orthogonalise(torch.zeros(1, *shape)).abs().max() == 0


@pytest.mark.parametrize("shape", [(64, 64), (64, 192), (300, 320)])
def test_orthogonalising_by_gram_matrices_equals_the_polynomials(shape):
    """With singular values as small as those of real gradients: half of them are below a hundredth of the largest."""
    rng, m = torch.Generator().manual_seed(sum(shape)), shape[0]
    left, right = (torch.linalg.qr(torch.randn(k, m, generator=rng, dtype=torch.float64))[0] for k in shape)
    values = torch.logspace(0, -5, m, dtype=torch.float64)
    found = orthogonalise((left * values @ right.T)[None].float())[0].double()
    y = values / (optim.MARGIN * values.norm())
    for a, b, c in optim.QUINTICS:
        y = a * y + b * y ** 3 + c * y ** 5
    torch.testing.assert_close(left.T @ found @ right, torch.diag(y), rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 192), (192, 512), (192, 192), (256, 1024), (512, 1024)])
def test_no_matrix_explodes_in_bfloat16(shape, dtype):
    """Without a margin, rounding carries the one singular value of a matrix of rank 1 beyond 1, from where it grows to 1e8."""
    rng, (m, n) = torch.Generator().manual_seed(sum(shape)), shape
    rank_1 = torch.randn(16, m, 1, generator=rng) @ torch.randn(16, 1, n, generator=rng)
    noise = torch.randn(16, m, n, generator=rng)
    orthogonal = torch.linalg.qr(noise[0].T)[0].T
    for matrices in (rank_1, rank_1 / rank_1.norm(dim=(1, 2), keepdim=True) + 1e-6 * noise):
        values = torch.linalg.svdvals(orthogonalise(matrices, dtype))
        assert 0.7 < values[:, 0].min() and values.max() < 1.3
    for matrix in (orthogonal, *([noise[0]] if n > 1.9 * m else [])):  # a square random matrix has a singular value near 0
        values = torch.linalg.svdvals(orthogonalise(matrix[None], dtype))
        assert 0.7 < values.min() and values.max() < 1.3


@given(decay=st.floats(0.5, 0.999), step=st.integers(0, 2000))
def test_the_average_moves_by_its_decay(decay, step):
    model = torch.nn.Linear(3, 3)
    before = model.weight.detach().clone()
    ema = {"weight": before.clone()}
    with torch.no_grad():
        model.weight += 1.0
    update_ema(ema, model, decay, step)
    moved = 1 - min(decay, (1 + step) / (10 + step))
    torch.testing.assert_close(ema["weight"], before + moved)


def test_averaged_weights_are_used_inside_the_block_only():
    model = small_model().train()
    ema = {name: p.detach() + 1.0 for name, p in model.named_parameters()}
    trained, average = model.no_text.detach().clone(), ema["no_text"].clone()
    with pytest.raises(ZeroDivisionError), averaged(model, ema):
        assert not model.training and torch.equal(model.no_text.data, average)
        raise ZeroDivisionError  # the weights come back after an error too
    assert model.training and torch.equal(model.no_text.data, trained) and torch.equal(ema["no_text"], average)


def test_muon_computes_in_bfloat16_only_where_that_is_faster(monkeypatch):
    """Elsewhere bfloat16 is emulated or slow. Both paths end near each other."""
    steps = {}
    for has, fast in (({}, False), ({"amx_bf16": False}, False), ({"amx_bf16": True}, True),
                      ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
                      ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        seen = []
        monkeypatch.setattr(optim, "orthogonalise", lambda x, dtype, seen=seen: seen.append(dtype) or orthogonalise(x, dtype))
        w = torch.nn.Parameter(torch.zeros(24, 40))
        w.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
        optim.Muon([w], lr=1.0).step()
        assert seen == [torch.bfloat16 if fast else torch.float32]
        assert torch.equal(steps.setdefault(fast, w.detach().clone()), w)
        optim.Muon([w], lr=1.0, exact=True).step()
        assert seen[1:] == [torch.float32]
    assert (steps[True] - steps[False]).abs().mean() < 0.02 * steps[False].abs().mean()
