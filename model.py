"""Text to duration and velocity: a text encoder, a duration predictor, and a Transformer that flows noise into log-mels.

    python model.py --config configs/grammar.yaml        # parameters by part, FLOPs per frame

With x0 a normalised log-mel and x1 Gaussian noise, let x_t = (1 - t) x0 + t x1. The decoder learns the velocity v = x1 - x0,
given x_t, t and the text (rectified flow, arXiv 2209.03003). Sampling goes from t = 1 (noise) to t = 0 (speech).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from align import allot_positions, search_alignment, shares
from common import UserError, multiplies_bfloat16, run_cli
from config import Config, load_config
from on_cpu import RMSNorm, attend_in_bfloat16, of_few_shapes, widened
from text_encoder import load_text_encoder, load_tokeniser

TIME_FREQUENCIES = 128
SECONDS_PER_TOKEN = 0.06  # the duration predictor's initial value: about right for English, where a token is a byte
NEIGHBOURS = 2  # tokens on either side that a text block sees
LEAST_TIME = 0.3  # the loss weighs an error of the predicted mel with 1 / t^2, and at smaller times as at this one
DIAGONAL = 1.0  # weight of the prior towards a straight alignment, which dominates until the model has learned something


def multiple_of_32(x: float) -> int:
    return math.ceil(x / 32) * 32


# --- parts of the decoder

def rotary(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """Rotations (B, 1, T, head_size / 2), as complex numbers, of positions (B, T): RoPE (arXiv 2104.09864)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angles = positions[:, None, :, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Rotate neighbouring pairs of channels of x (B, H, T, head_size). None leaves x unchanged.

    One complex product needs a third of the memory traffic of four real ones on a CPU.
    """
    if rotation is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """Lengths (B,) to a mask (B, size) that is True at valid positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.width, cfg.width, bias=False)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width, bias=False)
        self.out = nn.Linear(cfg.width, cfg.width, bias=False)
        self.qk_norm = RMSNorm(cfg.width // cfg.heads, elementwise_affine=False) if cfg.qk_norm else nn.Identity()
        # Normalised queries and keys have a fixed length, so each head needs a parameter for the sharpness of its attention
        self.sharpness = nn.Parameter(torch.ones(cfg.heads, 1, 1)) if cfg.qk_norm else None

    def forward(self, x, context, mask, q_rotation, k_rotation, attention_maps: list | None = None):
        """x (B, T, D) attends to context (B, S, D) where mask (B, 1, 1, S) is True -> (B, T, D).

        The weights (B, H, T, S) are appended to `attention_maps` if it is given.
        """
        B, T, D = x.shape
        fast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D / H)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.qk_norm(widened(q)), q_rotation), rotate(self.qk_norm(widened(k)), k_rotation)
        if self.sharpness is not None:
            q = q * self.sharpness.to(q.dtype)
        with torch.autocast("cpu", enabled=False):
            attend = attend_in_bfloat16 if fast else F.scaled_dot_product_attention
            y = attend(q, k, v, mask)
            if attention_maps is not None:  # the fused kernel does not return its weights, so compute them a second time
                scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
                attention_maps.append(scores.masked_fill(~mask, float("-inf")).softmax(-1))
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class SwiGLU(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        hidden = multiple_of_32(cfg.width * cfg.mlp_ratio)
        self.gate = nn.Linear(cfg.width, hidden, bias=False)
        self.up = nn.Linear(cfg.width, hidden, bias=False)
        self.out = nn.Linear(hidden, cfg.width, bias=False)

    def forward(self, x):
        return self.out(F.silu(self.gate(x)) * self.up(x))


class TextBlock(nn.Module):
    """A convolution over tokens, because a letter's sound depends on its neighbours. As a matrix, so that Muon trains it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv = nn.Linear((2 * NEIGHBOURS + 1) * width, width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x, mask):
        """x (B, L, D), mask (B, L) -> (B, L, D)."""
        h = F.pad(self.norm(x) * mask[..., None], (0, 0, NEIGHBOURS, NEIGHBOURS))
        return x + self.out(F.gelu(self.conv(h.unfold(1, 2 * NEIGHBOURS + 1, 1).flatten(2))))


class Block(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.attn, self.cross, self.mlp = Attention(cfg), Attention(cfg), SwiGLU(cfg)
        # adaLN-single (PixArt, arXiv 2310.00426): one map from time for all blocks, plus a learned offset per block. It
        # scales and shifts the inputs of the branches. Their outputs need no gate, because they start at zero (zero_init).
        adaln = cfg.time_conditioning == "adaln"
        self.offset = nn.Parameter(torch.zeros(6, cfg.width)) if adaln else None
        self.norms = nn.ModuleList(RMSNorm(cfg.width, elementwise_affine=not adaln) for _ in range(3))
        if cfg.zero_init:
            for branch in (self.attn, self.cross, self.mlp):
                nn.init.zeros_(branch.out.weight)

    def forward(self, x, text, time, mel_mask, text_mask, rotations, attention_maps=None):
        """x (B, T, D), text (B, L, D), time (B, 6, D) or None -> (B, T, D)."""
        self_rotation, mel_rotation, text_rotation = rotations
        mods = (time + self.offset).unsqueeze(2).unbind(1) if time is not None else None  # six of (B, 1, D)

        def normed(n):
            h = self.norms[n](x)
            return h if mods is None else torch.addcmul(mods[2 * n], h, 1 + mods[2 * n + 1])
        h = normed(0)
        x = x + self.attn(h, h, mel_mask, self_rotation, self_rotation)
        x = x + self.cross(normed(1), text, text_mask, mel_rotation, text_rotation, attention_maps)
        return x + self.mlp(normed(2))


class Decoder(nn.Module):
    """The Transformer that predicts the velocity."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.inp = nn.Linear(cfg.patch * cfg.n_mels, cfg.width)
        self.time = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.text_norm = RMSNorm(cfg.width)
        self.token_features = nn.Linear(cfg.width, cfg.width, bias=False) if cfg.alignment_search else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = RMSNorm(cfg.width)
        self.out = nn.Linear(cfg.width, cfg.patch * cfg.n_mels)
        if cfg.time_conditioning == "adaln":
            self.modulation = nn.Linear(cfg.width, 6 * cfg.width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        if cfg.zero_init:
            nn.init.zeros_(self.out.weight)

    def rotations(self, T, mel_lengths, token_positions):
        """Rotations of self-attention (None without self_rope), and of cross-attention's queries and keys."""
        cfg, size = self.cfg, self.cfg.width // self.cfg.heads
        positions = torch.arange(T, device=mel_lengths.device)[None]
        self_rotation = rotary(positions, size) if cfg.self_rope else None
        if cfg.cross_rope == "absolute":
            return self_rotation, rotary(positions, size), rotary(token_positions, size)
        # Length-normalised RoPE (arXiv 2509.11084): text and mel start and end together, so the diagonal is the prior.
        mel_positions = (positions + 0.5) * cfg.patch / mel_lengths[:, None]
        return self_rotation, rotary(cfg.rope_gamma * mel_positions, size), rotary(cfg.rope_gamma * token_positions, size)

    def forward(self, x, t, text, token_positions, mel_lengths, token_lengths, alignment=None,
                attention_maps: list | None = None):
        """Velocity (B, frames, n_mels) of noisy mels x (B, frames, n_mels) at times t > 0 (B,).

        The network predicts x0, which gives the velocity (x - x0) / t. A narrow network can predict a mel, but not all the
        noise in a velocity (arXiv 2511.13720). It needs the projected text (B, L, D), its rotary positions (B, L), and the
        alignment (B, positions) if one is known. Each block appends its weights of cross-attention (B, heads, positions, L)
        to `attention_maps`.
        """
        cfg, (B, frames, _), noisy = self.cfg, x.shape, x
        # `patch` neighbouring frames form one position. Zero the frames beyond each end, which can share the last position.
        x = x * length_mask(mel_lengths, frames)[..., None]
        x = F.pad(x, (0, 0, 0, -frames % cfg.patch)).reshape(B, -1, cfg.patch * cfg.n_mels)
        T = x.shape[1]
        mel_mask = length_mask(-(-mel_lengths // cfg.patch), T)[:, None, None]
        text_mask = length_mask(token_lengths, text.shape[1])[:, None, None]
        rotations = self.rotations(T, mel_lengths, token_positions)
        frequencies = 10000.0 ** (-torch.arange(TIME_FREQUENCIES, device=t.device) / TIME_FREQUENCIES)
        angles = 1000 * t[:, None] * frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (B, D)
        x = widened(self.inp(x))
        if cfg.time_conditioning == "adaln":
            time = self.modulation(F.silu(time)).view(B, 6, -1)
        else:
            x, time = x + time[:, None], None
        text = self.text_norm(text)
        if alignment is not None:
            # In float32, because the backward pass of gather sums over all positions of a token
            features = self.token_features(text).float().gather(1, alignment[..., None].expand(-1, -1, text.shape[-1]))
            x = x + features.to(x.dtype)
        for block in self.blocks:
            x = block(x, text, time, mel_mask, text_mask, rotations, attention_maps)
        out = self.out(self.norm(x)).view(B, -1, cfg.n_mels)[:, :frames]
        return out if cfg.predicts == "velocity" else (noisy - out) / t[:, None, None]


# --- the whole model

def autocast(cfg: Config, device: torch.device):
    """torch's autocast for cfg.dtype: matrix products in bfloat16, or all in float32."""
    fast = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and multiplies_bfloat16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


class TTS(nn.Module):
    """Text encoder, duration predictor and decoder. `forward` is the loss, because DDP only sees calls of forward.

    `tokenise` turns a text into token ids; the text encoder reads at most `most_tokens` of them.
    Raises UserError if the text encoder cannot be loaded.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.text_encoder, (self.tokenise, self.most_tokens) = load_text_encoder(cfg), load_tokeniser(cfg)
        self.text_encoder.requires_grad_(cfg.train_text_encoder).eval()
        encoder_width = self.text_encoder.config.hidden_size
        self.text_proj = nn.Linear(encoder_width, cfg.width)
        self.text_blocks = nn.ModuleList(TextBlock(cfg.width) for _ in range(cfg.text_blocks))
        # Replaces the text's features when the text is dropped. Not zero, where the gradient of the RMSNorm is huge
        self.no_text = nn.Parameter(torch.randn(cfg.width))
        self.duration = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), nn.Linear(cfg.width, 1))
        nn.init.zeros_(self.duration[-1].weight)
        nn.init.constant_(self.duration[-1].bias, math.log(SECONDS_PER_TOKEN))
        # Predicts each token's mean log-mel; the search compares it with the recording
        self.token_mel = nn.Linear(cfg.width, cfg.n_mels) if cfg.alignment_search else None
        self.decoder = Decoder(cfg)

    def train(self, mode: bool = True):
        super().train(mode)
        self.text_encoder.eval()  # no dropout: features are the same in training and in sampling
        return self

    def encode(self, tokens, token_lengths):
        """Token ids (B, L) with their lengths (B,) to projected text (B, L, D)."""
        mask = length_mask(token_lengths, tokens.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cfg.train_text_encoder):
            features = self.text_encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        text = widened(self.text_proj(features))
        for block in self.text_blocks:
            text = block(text, mask)
        return text

    def durations(self, text, token_lengths):
        """Log of the utterance's seconds (B,), and log of each token's share of them (B, L), -inf beyond the last token.

        The utterance's duration is the sum of its tokens' predicted seconds. Without alignment_search only the sum has a
        target. It still teaches each token's share, because texts mix the letters in many proportions.
        """
        if not self.cfg.alignment_search:
            text = text.detach()  # so that the duration does not shape the features that the decoder reads
        with torch.autocast(text.device.type, enabled=False):  # bfloat16 would round a duration by a percent
            per_token = self.duration(text.to(self.no_text.dtype)).squeeze(-1).float()
        per_token = per_token.masked_fill(~length_mask(token_lengths, per_token.shape[1]), float("-inf"))
        return per_token.logsumexp(dim=1), per_token.log_softmax(dim=1)

    def token_positions(self, share, token_lengths):
        """Rotary positions of the tokens in cross-attention (B, L), from their shares of the time (see cfg.cross_rope)."""
        if self.cfg.cross_rope == "durations":
            return share.cumsum(dim=1) - share / 2
        n = torch.arange(share.shape[1], device=share.device).expand_as(share)
        return n if self.cfg.cross_rope == "absolute" else (n + 0.5) / token_lengths[:, None]

    def allot(self, share, mel_lengths, token_lengths):
        """For sampling: the alignment (B, positions) that gives the tokens their shares (B, L), and the shares in it.

        Without alignment_search the alignment is None, and the shares stay as they are.
        """
        if not self.cfg.alignment_search:
            return None, share
        lengths = -(-mel_lengths // self.cfg.patch)
        alignment = allot_positions(share, lengths, token_lengths)
        return alignment, shares(alignment, lengths, share.shape[1])

    def condition(self, text, drop):
        """Projected text (B, L, D), replaced by the learned no-text vector where drop (B,) is True."""
        return torch.where(drop[:, None, None], self.no_text.to(text.dtype), text)

    def search(self, batch: dict, text) -> tuple:
        """The best alignment (B, positions) of a batch with its recordings, the tokens' shares of the time (B, L) in it, and
        the sum over frames of the squared distance between log-mels and predicted token mels.

        The search aligns the speech. A tail of silence after it belongs to the last token, </s>.
        """
        cfg, (B, frames, n_mels) = self.cfg, batch["mel"].shape
        lengths, spoken = (-(-batch[name] // cfg.patch) for name in ("mel_lengths", "speech_lengths"))
        token_lengths = batch["token_lengths"]
        mel = F.pad(batch["mel"], (0, 0, 0, -frames % cfg.patch)).view(B, -1, cfg.patch, n_mels).mean(dim=2)
        T, L, token_mel = mel.shape[1], text.shape[1], self.token_mel(text).to(mel.dtype)  # (B, L, n_mels)
        with torch.no_grad(), torch.autocast(mel.device.type, enabled=False):
            t, n = torch.arange(T, device=mel.device) + 0.5, torch.arange(L, device=mel.device) + 0.5
            off = t[:, None] / spoken[:, None, None] - n / token_lengths[:, None, None]  # from the diagonal, (B, T, L)
            scores = mel @ token_mel.mT - token_mel.square().sum(-1)[:, None] / 2
            scores = scores - DIAGONAL * token_lengths[:, None, None] * off.square()
            alignment = search_alignment(scores, spoken, token_lengths)
        error = (token_mel.gather(1, alignment[..., None].expand(-1, -1, n_mels)) - mel).square().mean(dim=-1)
        return alignment, shares(alignment, lengths, L), cfg.patch * (error * length_mask(lengths, T)).sum()

    def flow(self, batch: dict, text, share, alignment) -> tuple:
        """The noisy mels x_t of a batch at its times, and the decoder's velocity there, both (B, T, n_mels)."""
        t = batch["t"][:, None, None]
        x_t = (1 - t) * batch["mel"] + t * batch["noise"]
        text, positions = self.condition(text, batch["drop_text"]), self.token_positions(share, batch["token_lengths"])
        velocity = self.decoder(x_t, batch["t"], text, positions, batch["mel_lengths"], batch["token_lengths"], alignment)
        return x_t, velocity.float()

    def forward(self, batch: dict) -> dict:
        """Losses of a batch from `data.collate`, each a scalar: loss (the weighted sum), and flow_loss, duration_loss,
        share_loss, alignment_loss.

        Sums over this batch are divided by batch["frames"] and batch["utterances"], if these are there: the counts of the
        whole step, over all ranks and accumulation steps. Then the losses of the parts add up to the step's mean.
        """
        cfg, batch = self.cfg, of_few_shapes(batch, self.cfg.patch)
        mel_lengths, token_lengths = batch["mel_lengths"], batch["token_lengths"]
        frames, utterances = batch.get("frames", mel_lengths.sum()), batch.get("utterances", len(mel_lengths))
        text = self.encode(batch["tokens"], token_lengths)
        log_seconds, log_share = self.durations(text, token_lengths)
        duration_loss = (log_seconds - batch["seconds"].log()).square().sum() / utterances
        share, alignment, share_loss, alignment_loss = log_share.exp(), None, torch.zeros_like(duration_loss), 0.0
        if cfg.alignment_search:
            alignment, share, distance = self.search(batch, text)
            # Kullback-Leibler divergence: smallest when the predicted shares are the mean of the shares found by the search
            share_loss = (torch.xlogy(share, share) - share * log_share.clamp(min=-1e4)).sum() / utterances
            alignment_loss = distance / frames
        _, velocity = self.flow(batch, text, share, alignment)
        error = (velocity - (batch["noise"] - batch["mel"])).square().mean(dim=-1)  # (B, T)
        if cfg.predicts == "mel":
            error = error * (batch["t"] / batch["t"].clamp(min=LEAST_TIME)).square()[:, None]
        flow_loss = (error * length_mask(mel_lengths, error.shape[1])).sum() / frames
        of_durations = cfg.duration_loss_weight * (duration_loss + share_loss)
        loss = flow_loss + cfg.alignment_loss_weight * alignment_loss + of_durations
        return {"loss": loss, "flow_loss": flow_loss, "duration_loss": duration_loss, "share_loss": share_loss,
                "alignment_loss": torch.as_tensor(alignment_loss, device=loss.device)}

    def saved_state(self) -> dict:
        """The state dict without a frozen pretrained encoder, which its name identifies. Shared weights come once."""
        frozen = not self.cfg.train_text_encoder and self.cfg.text_encoder_name != "random"
        names = {k for part in (self.named_parameters(), self.named_buffers()) for k, _ in part}  # T5's embeddings have two
        return {k: v for k, v in self.state_dict().items() if k in names and not (frozen and k.startswith("text_encoder."))}


def load_tts(cfg: Config, state: dict, averages: dict | None = None) -> TTS:
    """A model with the weights of `saved_state`, replaced by their averages where there are any.

    Raises UserError if they do not fit the config.
    """
    model, state = TTS(cfg), state | (averages or {})
    expected = {name: weight.shape for name, weight in model.saved_state().items()}
    wrong = [name for name in expected.keys() | state.keys()
             if name not in state or name not in expected or state[name].shape != expected[name]]
    if wrong:
        raise UserError(f"the checkpoint's weights do not fit its config in {', '.join(sorted(wrong)[:4])}; was it written "
                        "by another version of model.py?")
    model.load_state_dict(state, strict=False)
    return model


def parameter_table(model: TTS) -> dict[str, tuple[int, int]]:
    """Part of the model, by the name of its attribute -> (parameters, trainable parameters). The last row is the total."""
    rows = {}
    for name, p in model.named_parameters():
        count, trainable = rows.get(part := name.split(".")[0], (0, 0))
        rows[part] = count + p.numel(), trainable + p.numel() * p.requires_grad
    return rows | {"total": tuple(map(sum, zip(*rows.values())))}


def decoder_flops_per_frame(cfg: Config, frames: float, tokens: float) -> float:
    """Floating-point operations per mel frame of the decoder's forward pass, for utterances of `frames` and `tokens`.

    The matrices take two operations per weight and position (a position has `patch` frames). Keys, values and features of
    the text take two per weight and token. The two products of attention take 4 D per pair of positions. Training costs
    three times as much.
    """
    D, hidden = cfg.width, multiple_of_32(cfg.width * cfg.mlp_ratio)
    per_position = cfg.layers * (4 * D * D + 2 * D * D + 3 * D * hidden) + 2 * cfg.patch * cfg.n_mels * D
    per_token = (2 * cfg.layers + cfg.alignment_search) * D * D
    attention = cfg.layers * 4 * D * (frames / cfg.patch + tokens)
    return (2 * per_position + attention) / cfg.patch + 2 * per_token * tokens / frames


def main(argv: list[str]) -> None:
    cfg = load_config(argv)
    rows = parameter_table(TTS(cfg))
    print(f"{'part':<20}{'parameters':>14}{'trainable':>14}{'frozen':>14}")
    for name, (count, trainable) in rows.items():
        print(f"{name:<20}{count:>14,}{trainable:>14,}{count - trainable:>14,}")
    forward = decoder_flops_per_frame(cfg, 6.6 * cfg.sample_rate / cfg.hop_length, 105) / 1e6  # LJSpeech's mean utterance
    print(f"decoder, 6.6 s utterances: {forward:.1f} MFLOP per frame forward, {3 * forward:.1f} training")


if __name__ == "__main__":
    run_cli(main)
