"""
python -m pytest tests/test_model.py

The model on small real parts: losses, independence of padding, conditioning, text encoders, accounting.
"""
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertModel, BertTokenizer, ByT5Tokenizer, T5Config, T5EncoderModel

from common import UserError
from config import Config
from corpus import Corpus
from data import TrainingSteps
from model import TTS, Decoder, decoder_flops_per_frame, length_mask, load_tts, parameter_table, rotary, rotate
from on_cpu import RMSNorm, attend_in_bfloat16, of_few_shapes
from sample import read_texts, sample
from text_encoder import byte_tokens

SMALL = dict(text_encoder_name="random", train_text_encoder=True, text_encoder_width=32, text_encoder_heads=2,
             text_encoder_layers=1, width=32, layers=2, heads=2, mel_mean=-5.0, mel_std=2.0, effective_batch_size=4, batch_size=4,
             dtype="float32")  # the same on every CPU
BASELINE = dict(text_blocks=0, alignment_search=False, time_conditioning="additive", cross_rope="absolute", self_rope=False,
                qk_norm=False, zero_init=False, predicts="velocity")
RECIPES = {"default": {}, "baseline": BASELINE, "normalised": dict(cross_rope="normalized"), "patches": dict(patch=2),
           "no search": dict(alignment_search=False)}
SMALL_T5 = dict(vocab_size=384, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3)


def small_model(seed=0, shake=True, **changes) -> TTS:
    """A small model. With `shake` its zero-initialised weights get random values, so that each part affects the output."""
    torch.manual_seed(seed)
    model = TTS(Config(**(SMALL | changes)))
    if shake:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
    return model


def batch_of(frames, texts):
    """A batch as data.collate makes it, of random log-mels and noise."""
    def draw(seed, n):
        return torch.randn(n, 80, generator=torch.Generator().manual_seed(seed))
    count, tokens = len(frames), [torch.tensor(byte_tokens(text)) for text in texts]
    return {"mel": pad_sequence([draw(i, n) for i, n in enumerate(frames)], batch_first=True),
            "noise": pad_sequence([draw(i + 500, n) for i, n in enumerate(frames)], batch_first=True),
            "mel_lengths": torch.tensor(frames), "speech_lengths": torch.tensor(frames), "tokens": pad_sequence(tokens, batch_first=True),
            "token_lengths": torch.tensor([len(row) for row in tokens]), "seconds": torch.tensor(frames) / 86.0,
            "t": torch.tensor([0.1 + 0.8 * i / count for i in range(count)]),
            "drop_text": torch.tensor([i % 3 == 2 for i in range(count)])}


def read(model, *texts):
    """Projected text (B, L, D), log of seconds (B,), log of shares (B, L) and token lengths (B,) of texts."""
    tokens = [torch.tensor(byte_tokens(text)) for text in texts]
    lengths = torch.tensor([len(row) for row in tokens])
    text = model.encode(pad_sequence(tokens, batch_first=True), lengths)
    return text, *model.durations(text, lengths), lengths


# --- losses

@pytest.mark.parametrize("recipe", RECIPES)
def test_every_trainable_parameter_gets_a_gradient(recipe):
    model = small_model(**RECIPES[recipe])
    model(batch_of([20, 30, 25], ["a cat", "two dogs", "x"]))["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_utterance_does_not_depend_on_its_batch(recipe):
    """The velocity and the losses of an utterance alone equal those beside longer ones, within float error."""
    model = small_model(**RECIPES[recipe]).double()
    frames = [17, 60, 33]
    together = {k: v.double() if v.is_floating_point() else v
                for k, v in batch_of(frames, ["hello", "a much longer text than the others", "mid size"]).items()}

    def velocity(batch):
        features = model.encode(batch["tokens"], batch["token_lengths"])
        share = model.durations(features, batch["token_lengths"])[1].exp()
        return model.decoder(batch["noise"], batch["t"], model.condition(features, batch["drop_text"]),
                             model.token_positions(share, batch["token_lengths"]), batch["mel_lengths"], batch["token_lengths"],
                             model.allot(share, batch["mel_lengths"], batch["token_lengths"])[0])
    velocities, losses = velocity(together), []
    for i, n in enumerate(frames):
        alone = {k: v[i:i + 1] for k, v in together.items()}
        alone |= {"mel": alone["mel"][:, :n], "noise": alone["noise"][:, :n], "tokens": alone["tokens"][:, :alone["token_lengths"]]}
        torch.testing.assert_close(velocity(alone), velocities[i:i + 1, :n], rtol=1e-5, atol=1e-5)  # angles are float32
        losses.append(model(alone))
    for name, value in model(together).items():
        if name in ("flow_loss", "alignment_loss"):
            mean = sum(part[name] * n for part, n in zip(losses, frames)) / sum(frames)
        elif name in ("duration_loss", "share_loss"):
            mean = sum(part[name] for part in losses) / len(frames)
        else:
            continue
        torch.testing.assert_close(value, torch.as_tensor(mean, dtype=value.dtype), rtol=1e-5, atol=1e-6, msg=name)


def test_the_losses_of_a_steps_parts_add_up_to_its_mean():
    """DDP and accumulation need this: each part divides by the counts of the whole step."""
    model = small_model()
    whole = batch_of([20, 30, 25, 28], ["a", "bb", "ccc", "dddd"])
    counts = {"frames": torch.tensor(103), "utterances": torch.tensor(4)}
    first, second = (model({k: v[rows] for k, v in whole.items()} | counts) for rows in (slice(0, 2), slice(2, 4)))
    losses = model(whole)
    for name, value in losses.items():
        torch.testing.assert_close(first[name] + second[name], value)
    cfg = model.cfg
    torch.testing.assert_close(losses["loss"], losses["flow_loss"] + cfg.alignment_loss_weight * losses["alignment_loss"]
                               + cfg.duration_loss_weight * (losses["duration_loss"] + losses["share_loss"]))


@pytest.mark.parametrize("predicts, weights", [("mel", [4, 1 / 0.09, 1 / 0.09, 1]), ("velocity", [4, 100, 1e4, 1])])
def test_the_flow_loss_is_the_mels_error_with_a_weight_that_depends_on_time(predicts, weights):
    """An error e of the mel is an error e / t of the velocity. A predicted mel's weight does not grow below t = 0.3."""
    model, error = small_model(predicts=predicts), 0.7
    batch = batch_of([20] * 4, ["a cat"] * 4) | {"t": torch.tensor([0.5, 0.1, 0.01, 1.0])}
    wrong = batch["mel"] + error
    model.decoder.forward = lambda x, t, *_: (x - wrong) / t[:, None, None]
    torch.testing.assert_close(model(batch)["flow_loss"], torch.tensor(weights).mean() * error**2, rtol=1e-3, atol=0)


@pytest.mark.parametrize("patch", [1, 2])
def test_losses_are_finite_if_a_text_is_longer_than_its_speech(patch):
    batch = batch_of([3, 1], ["much more text than there is speech", "x"]) | {"seconds": torch.tensor([0.03, 0.01])}
    assert all(loss.isfinite() for loss in small_model(patch=patch)(batch).values())


# --- conditioning

def test_a_dropped_text_has_no_effect():
    model, x, n = small_model(), torch.randn(1, 20, 80), torch.tensor([20])
    out = []
    for content in ("one thing", "another"):
        text, _, positions, lengths = read(model, content)
        out.append([model.decoder(x, torch.tensor([0.5]), model.condition(text, torch.tensor([drop])), positions, n, lengths)
                    for drop in (True, False)])
    torch.testing.assert_close(out[0][0], out[1][0])
    assert (out[0][1] - out[1][1]).abs().max() > 1e-3


@pytest.mark.parametrize("predicts", ["mel", "velocity"])
def test_a_new_decoder_predicts_its_bias_and_a_new_duration_is_plausible(predicts):
    model, x = small_model(shake=False, predicts=predicts), torch.randn(1, 9, 80)
    velocity = model.decoder(x, torch.tensor([0.4]), torch.randn(1, 4, 32), torch.rand(1, 4), torch.tensor([9]), torch.tensor([4]))
    torch.testing.assert_close(x - 0.4 * velocity if predicts == "mel" else velocity, model.decoder.out.bias.expand(1, 9, 80))
    _, log_seconds, _, lengths = read(model, "A sentence of fifty bytes or so takes three seconds")
    torch.testing.assert_close(log_seconds.exp(), 0.06 * lengths.float(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("gain", [False, True])
def test_the_fast_rmsnorm_equals_torchs(gain):
    fast, slow = RMSNorm(24, elementwise_affine=gain), torch.nn.RMSNorm(24, elementwise_affine=gain)
    x, weights = torch.randn(3, 5, 2, 24).transpose(1, 2), torch.randn(3, 2, 5, 24)
    x[0, 0, 0] = 0
    results = []
    for norm in (fast, slow):
        if gain:
            torch.nn.init.constant_(norm.weight, 1.7)
        own = x.clone().requires_grad_()
        y = norm(own)
        (y * weights).sum().backward()
        results.append([y, own.grad, *(p.grad for p in norm.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), slow(x), rtol=0, atol=0)


@given(st.integers(1, 40), st.floats(0, 5), st.floats(-3, 3))
def test_rotation_keeps_lengths_and_depends_on_distance_only(seed, start, distance):
    """<R(p) q, R(p + d) k> is the same for every p. This makes rotary positions relative."""
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(seed)).double()

    def product(p):
        return (rotate(q, rotary(torch.tensor([[p]]), 8)) * rotate(k, rotary(torch.tensor([[p + distance]]), 8))).sum()
    torch.testing.assert_close(product(start), product(0.0), rtol=0, atol=1e-4)
    torch.testing.assert_close(rotate(q, rotary(torch.tensor([[start]]), 8)).norm(), q.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("cross_rope", ["normalized", "durations"])
def test_positions_are_fractions_of_the_utterance(cross_rope):
    model = small_model(cross_rope=cross_rope)
    _, _, log_share, lengths = read(model, "abcdefghi", "abcd")
    positions = model.token_positions(log_share.exp(), lengths)
    for row, n in zip(positions, lengths):
        assert (row[:n].diff() > 0).all() and row[0] > 0 and row[n - 1] < 1
    if cross_rope == "normalized":
        torch.testing.assert_close(positions[1, :5], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
    _, frames, _ = model.decoder.rotations(100, torch.tensor([100, 50]), positions)
    # frame 81 of 100 is at 0.815 of its utterance, frame 40 of 50 at 0.81
    angle = (frames[0, 0, 81] / frames[1, 0, 40]).angle()[0].item()
    assert angle == pytest.approx(0.005 * model.cfg.rope_gamma, rel=1e-3)
    middle = rotary(torch.tensor([[model.cfg.rope_gamma * 0.5]]), 16)
    torch.testing.assert_close((frames[0, 0, 49] + frames[0, 0, 50]).angle(), middle[0, 0, 0].angle())


# --- what training teaches

def train(model, loss_of, steps, lr=1e-2):
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_the_shares_of_letters_are_learned_from_whole_utterances():
    """Without the search only an utterance's seconds have a target. Each letter's duration follows from many utterances."""
    model, rng = small_model(shake=False, alignment_search=False), torch.Generator().manual_seed(1)

    def loss():  # an "a" lasts 0.1 s and a "b" 0.4 s; lengths vary, or the end of the text could take any share
        n = int(torch.randint(2, 9, (1,), generator=rng))
        letters = torch.randint(0, 2, (16, n), generator=rng)
        tokens = torch.cat([letters + 100, torch.ones(16, 1, dtype=torch.long)], dim=1)
        lengths = torch.full((16,), n + 1)
        with torch.no_grad():
            text = model.encode(tokens, lengths)
        return (model.durations(text, lengths)[0] - (0.1 + 0.3 * letters).sum(1).log()).square().mean()
    train(model.duration, loss, 300)
    _, _, log_share, lengths = read(model, "bbaa")
    positions = model.token_positions(log_share.exp(), lengths)[0, :4]
    torch.testing.assert_close(positions, torch.tensor([0.2, 0.6, 0.85, 0.95]), rtol=0, atol=0.06)


@pytest.mark.slow
def test_the_search_learns_how_each_token_sounds_and_how_long_it_lasts():
    """Letters of known log-mels and durations: the search finds them, and sampling gives each letter its share."""
    model = small_model(shake=False, text_blocks=0)
    rng, mels, lasts = torch.Generator().manual_seed(1), torch.randn(4, 80), torch.tensor([2, 7, 3, 5])

    def batch(letters):
        rows = [torch.tensor([*row, 3]) for row in letters]  # the end of the text has a log-mel too
        spoken = [torch.repeat_interleave(mels[row], lasts[row], dim=0) for row in rows]
        made = batch_of([len(mel) for mel in spoken], ["".join("abc"[n] for n in row) for row in letters])
        return made | {"mel": pad_sequence(spoken, batch_first=True), "seconds": made["mel_lengths"] * 256 / 22050}
    train(model, lambda: model(batch(torch.randint(0, 3, (8, 6), generator=rng).tolist()))["loss"], 60)
    letters = [0, 1, 1, 2, 0, 2]
    new, true = batch([letters]), torch.repeat_interleave(torch.arange(7), lasts[torch.tensor([*letters, 3])])
    text, log_seconds, log_share, lengths = read(model, "abbcac")
    alignment, share, _ = model.search(new, text)
    assert (alignment[0] == true).float().mean() > 0.8  # nothing tells where the first b ends and the second begins
    others = [0, 3, 4, 5, 6]
    torch.testing.assert_close(log_share.exp()[0, others], share[0, others], atol=0.05, rtol=0)
    assert log_seconds.exp().item() == pytest.approx(new["seconds"].item(), rel=0.15)
    (spoken,), (allotted,) = model.allot(log_share.exp(), new["mel_lengths"], lengths)
    torch.testing.assert_close(allotted, torch.bincount(spoken, minlength=7) / len(spoken))
    assert ((spoken - true).abs() <= 1).all() and (spoken.diff() >= 0).all() and spoken[0] == 0 and spoken[-1] == 6


@pytest.mark.slow
def test_a_tail_of_silence_belongs_to_the_end_of_the_text(demo_corpus):
    """With a tail after every utterance the predicted duration includes it, </s> takes it, and sampled speech ends with it."""
    model = small_model(shake=False, patch=2, n_mels=80, silence_prob=1.0, max_silence_sec=1.0, batch_size=16,
                        effective_batch_size=16, data_dir=str(demo_corpus), block_size=512)
    corpus, cfg = Corpus(str(demo_corpus), model.cfg), model.cfg
    cfg.mel_mean, cfg.mel_std = corpus.mel_stats
    steps = TrainingSteps(corpus, cfg, model.tokenise, 0, 1)
    batch, = steps[0]
    alignment, share, _ = model.search(batch, model.encode(batch["tokens"], batch["token_lengths"]))
    ends = []
    for row, shared, speech, frames, last in zip(alignment, share, batch["speech_lengths"], batch["mel_lengths"],
                                                 batch["token_lengths"] - 1):
        assert (row[(speech + 1) // 2 - 1:] == last).all() and row[(speech + 1) // 2 - 2] >= last - 1
        ends.append((shared[last] * frames - (frames - speech)).item())
    numbers = iter(range(60))
    train(model, lambda: model(steps[next(numbers)][0])["loss"], 60)
    texts, seconds = corpus.texts[:48], corpus.frames[:48].mean() * 256 / 22050
    said = read_texts(model.eval(), texts)
    assert sum(predicted for _, _, predicted in said) / 48 == pytest.approx(seconds + 0.5, rel=0.06)
    silence = sum(shared[-1] * predicted for _, shared, predicted in said).item() / 48
    assert 0.4 < silence < 0.7 and max(ends) < 40
    mel = torch.stack([mel[-20:].mean() for mel in sample(model, texts[:8], steps=4, cfg_scale=1.0)])
    assert mel.mean() < -10  # the floor is -11.5, the corpus's mean -6


def test_the_features_of_a_token_sum_their_gradients_in_float32():
    """CUDA adds the gradients of all positions of a token one by one; in bfloat16 a sum of ones ends at 256."""
    model = small_model(patch=2)
    batch = batch_of([20, 30, 25], ["a cat", "two dogs", "x"])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["loss"]
    gathers, seen, todo = [], set(), [loss.grad_fn]
    while todo:
        if (node := todo.pop()) not in seen and node is not None:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            if node.name() == "GatherBackward0":
                gathers.append(node._input_metadata[0].dtype)
    assert gathers == [torch.float32] * 2  # token_features and token_mel


def test_bfloat16_on_a_cpu_multiplies_matrices_only():
    """Norms and what the blocks add up stay in float32, where a CPU is faster and exact."""
    model, batch = small_model(patch=2), batch_of([20, 31, 26], ["a cat", "two dogs", "x"])
    exact, products, wide = model(batch)["loss"], [], []
    for block in model.decoder.blocks:
        for part in (block, block.attn.qk_norm, block.cross.qk_norm):
            part.register_forward_hook(lambda module, args, out: wide.append(out))
        for part in (block.attn, block.cross, block.mlp.up):
            part.register_forward_hook(lambda module, args, out: products.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["loss"]
    assert [x.dtype for x in products] == 6 * [torch.bfloat16]
    assert [x.dtype for x in wide] == 10 * [torch.float32]  # per block its sum, and queries and keys of two attentions
    assert loss.item() == pytest.approx(exact.item(), rel=0.01) and loss.item() != exact.item()


def test_attention_in_bfloat16_is_attention():
    q, k, v, weight = (torch.randn(3, 2, n, 16, requires_grad=True) for n in (7, 5, 5, 7))
    mask = length_mask(torch.tensor([5, 3, 1]), 5)[:, None, None]
    found, expected = (attend(q, k, v, mask) for attend in (attend_in_bfloat16, F.scaled_dot_product_attention))
    assert found.dtype == torch.bfloat16
    for ours, exact in zip((found, *torch.autograd.grad((found * weight).sum(), (q, k, v))),
                           (expected, *torch.autograd.grad((expected * weight).sum(), (q, k, v)))):
        assert (ours - exact).norm() < 0.01 * exact.norm()
    unseen = torch.where(mask.mT, 0.0, 9.0)
    assert torch.equal(attend_in_bfloat16(q, k + unseen, v + unseen, mask), found)


def test_few_shapes_of_batches_in_bfloat16_and_the_same_loss():
    """Padding changes no loss. Without bfloat16, and on other devices, nothing is padded."""
    model, batch = small_model(patch=2), batch_of([20, 31, 26], ["a cat", "two dogs", "x"])
    assert of_few_shapes(batch, 2) is batch
    with torch.autocast("cpu", torch.bfloat16):
        padded = of_few_shapes(batch, 2)
        elsewhere = {k: v.to("meta") for k, v in batch.items()}
        assert of_few_shapes(elsewhere, 2) is elsewhere
    assert padded["mel"].shape == padded["noise"].shape == (3, 32, 80) and padded["tokens"].shape == (3, 16)
    found, expected = model(padded), model(batch)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-5, atol=1e-6)


def test_the_vector_for_no_text_is_as_large_as_a_token():
    """At zero, its gradient through the RMSNorm was some hundred times that of a token."""
    model = small_model(shake=False)
    rms = read(model, "a cat")[0].square().mean().sqrt()
    assert 0.3 < model.no_text.square().mean().sqrt() / rms < 3


# --- text encoders and weights

def test_byte_tokens_are_those_of_byt5():
    for text in ("Hello, world.", "naïve “quotes” – 東京", ""):
        assert byte_tokens(text) == ByT5Tokenizer()(text)["input_ids"]


def test_a_frozen_encoder_has_no_gradients_and_is_not_saved(tmp_path):
    T5EncoderModel(T5Config(**SMALL_T5, n_positions=7)).save_pretrained(tmp_path)
    model = small_model(text_encoder_name=str(tmp_path), train_text_encoder=False)
    assert model.most_tokens == 1024  # T5's positions have no end, so n_positions does not count
    model(batch_of([20], ["abc"]))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.text_encoder.parameters())
    state = model.saved_state()
    assert not any(name.startswith("text_encoder.") for name in state)
    again = load_tts(model.cfg, state).saved_state()
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)


@pytest.mark.parametrize(("limit", "expected"), [({}, 40), ({"model_max_length": 38}, 38)])
def test_an_encoder_with_its_own_tokenizer(tmp_path, limit, expected):
    """A BERT from a folder. It reads as many tokens as it has positions, or fewer if its tokenizer says so."""
    BertModel(BertConfig(vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                         max_position_embeddings=40)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld")
    BertTokenizer(str(tmp_path / "vocab.txt"), **limit).save_pretrained(tmp_path)
    model = small_model(text_encoder_name=str(tmp_path), train_text_encoder=False)
    assert model.tokenise("hello world") == [2, 5, 6, 3] and model.most_tokens == expected
    tokens = torch.tensor([model.tokenise("hello " * (expected - 2))])
    assert model.encode(tokens, torch.tensor([expected])).shape == (1, expected, 32)


def test_a_missing_encoder_is_refused(tmp_path):
    with pytest.raises(UserError, match="text_encoder_name"):
        small_model(text_encoder_name=str(tmp_path / "none"))


def test_shared_weights_are_saved_once_and_averages_reach_both_names():
    model = small_model()
    names = ["text_encoder.shared.weight", "text_encoder.encoder.embed_tokens.weight"]  # T5's embeddings
    assert model.state_dict().keys() >= set(names) and [n for n in names if n in model.saved_state()] == names[:1]
    averages = {name: p.detach() + 1 for name, p in model.named_parameters()}
    loaded = load_tts(model.cfg, model.saved_state(), averages).state_dict()
    assert all(torch.equal(loaded[name], averages[names[0]]) for name in names)


def test_weights_that_do_not_fit_are_refused():
    model = small_model()
    state = model.saved_state()
    encoder = next(name for name in state if name.startswith("text_encoder."))
    wrong = [(state, {"x": torch.ones(1)}), (state, {"no_text": torch.ones(3)})]
    wrong += [({k: v for k, v in state.items() if k != name}, None) for name in ("no_text", encoder)]
    wrong += [(other, None) for other in (state | {"x": torch.ones(1)}, state | {"no_text": torch.ones(3)}, {})]
    for weights, averages in wrong:
        with pytest.raises(UserError, match="do not fit"):
            load_tts(model.cfg, weights, averages)
    with pytest.raises(UserError, match="do not fit"):
        load_tts(dataclasses.replace(model.cfg, layers=3), state)


# --- accounting

def test_the_parameter_table_counts_every_parameter_once():
    model = small_model()
    rows = parameter_table(model)
    assert rows["total"] == (sum(p.numel() for p in model.parameters()),) * 2
    assert sum(count for name, (count, _) in rows.items() if name != "total") == rows["total"][0]


@pytest.mark.parametrize("patch", [1, 2])
def test_the_flop_count_agrees_with_that_of_torch(patch):
    """Torch counts matrix products only, as our formula does."""
    from torch.utils.flop_counter import FlopCounterMode
    cfg = Config(**SMALL, patch=patch)
    decoder, T, L = Decoder(cfg), 96, 24
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        decoder(torch.randn(1, T, 80), torch.tensor([0.5]), torch.randn(1, L, 32), torch.rand(1, L), torch.tensor([T]),
                torch.tensor([L]))
    time = 2 * (256 * 32 + 32 * 32 + 32 * 6 * 32)  # the conditioning on time, once an utterance: not in the formula
    assert (counter.get_total_flops() - time) / T == pytest.approx(decoder_flops_per_frame(cfg, T, L), rel=0.02)
