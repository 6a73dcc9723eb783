"""Text to duration and velocity: a text encoder, a duration predictor, and a Transformer that flows noise into log-mels.

    python model.py --config configs/demo.yaml        # parameters by part, FLOPs a frame

With x0 a normalised log-mel and x1 Gaussian noise, the path is x_t = (1 - t) x0 + t x1, and the decoder learns its
velocity v = x1 - x0 given t and the text (rectified flow, arXiv 2209.03003). Sampling walks from t = 1 to t = 0.
"""
import math
import os

import torch
import torch.nn.functional as F
from torch import nn

from config import Config, UserError, announce_download, first_line, load_config, run_cli

TIME_FREQUENCIES = 128
T5_TOKENS = 1024  # ByT5 was trained on texts as long; its relative positions know no end, but what lies beyond is babble
SECONDS_PER_TOKEN = 0.06  # where the duration predictor starts: about right for English, a byte a token
NEIGHBOURS = 2  # tokens on either side that a text block sees
DIAGONAL = 1.0  # how strongly a search leans towards the straight line, which decides while the model knows nothing


# --- text encoder

def byte_tokens(text: str) -> list[int]:
    """ByT5's tokens of a text: every byte + 3, then </s>, which is 1."""
    return [b + 3 for b in text.encode()] + [1]


def load_text_encoder(cfg: Config):
    """The encoder (a Hugging Face module), a function from text to token ids, and how many of them the encoder reads
    (None: nobody says). Code that comes with weights is not run. Raises UserError if the encoder cannot be had.
    """
    from transformers import AutoModelForTextEncoding, AutoTokenizer, T5Config, T5EncoderModel
    name = cfg.text_encoder_name
    if name == "random":
        width, heads = cfg.text_encoder_width, cfg.text_encoder_heads
        encoder = T5EncoderModel(T5Config(
            vocab_size=384, d_model=width, d_kv=width // heads, num_heads=heads, num_layers=cfg.text_encoder_layers,
            d_ff=multiple_of_32(width * 8 / 3), feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False))
        return encoder, byte_tokens, T5_TOKENS
    try:
        if not os.path.isdir(name):
            announce_download(name)
        # said in so many words, since transformers would otherwise ask at the terminal whether it may run code
        encoder = AutoModelForTextEncoding.from_pretrained(name, dtype=torch.float32, trust_remote_code=False)
        if encoder.config.vocab_size == 384 and encoder.config.model_type == "t5":
            return encoder, byte_tokens, T5_TOKENS  # ByT5 has no vocabulary file, and its tokenizer is this one line
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as e:  # the hub's and the loader's failures are of many types
        where = "that folder" if os.path.isdir(name) else "the Hugging Face hub (or the local cache)"
        raise UserError(f"cannot load the text encoder '{name}' from {where} ({type(e).__name__}: "
                        f"{first_line(e)[:120]}). Download its config.json and weights "
                        f"(https://huggingface.co/{name}) into a folder and set text_encoder_name to it, or set "
                        "text_encoder_name: random and train_text_encoder: true") from None
    # RoBERTa counts two positions more than it reads, which its tokenizer knows; a tokenizer that knows nothing says 1e30
    limits = [getattr(encoder.config, "max_position_embeddings", None), getattr(encoder.config, "n_positions", None),
              tokenizer.model_max_length]
    most = min((n for n in limits if n and 0 < n < 1e9), default=None)
    most = T5_TOKENS if encoder.config.model_type in ("t5", "mt5", "umt5") else most
    return encoder, lambda text: tokenizer(text)["input_ids"], most


def multiple_of_32(x: float) -> int:
    return math.ceil(x / 32) * 32


# --- parts of the decoder

def rotary(positions: torch.Tensor, head_size: int) -> torch.Tensor:
    """Complex turns (B, 1, T, head_size / 2) for positions (B, T), with RoPE's usual frequencies (arXiv 2104.09864)."""
    frequencies = 10000.0 ** (-torch.arange(0, head_size, 2, device=positions.device) / head_size)
    angles = positions[:, None, :, None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: torch.Tensor, turn: torch.Tensor | None) -> torch.Tensor:
    """Turn neighbouring pairs of channels of x (B, H, T, head_size); without a turn leave x as it is.

    One complex product: on a CPU a third of the memory traffic of the four real ones.
    """
    if turn is None:
        return x
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def length_mask(lengths: torch.Tensor, size: int) -> torch.Tensor:
    """(B,) lengths to a (B, size) mask that is True on valid positions."""
    return torch.arange(size, device=lengths.device) < lengths[:, None]


class Attention(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.heads = cfg.heads
        self.q = nn.Linear(cfg.width, cfg.width, bias=False)
        self.kv = nn.Linear(cfg.width, 2 * cfg.width, bias=False)
        self.out = nn.Linear(cfg.width, cfg.width, bias=False)
        self.qk_norm = nn.RMSNorm(cfg.width // cfg.heads, elementwise_affine=False) if cfg.qk_norm else nn.Identity()
        # with queries and keys of length sqrt(head size), how sharp a head can look is a parameter of its own
        self.sharpness = nn.Parameter(torch.ones(cfg.heads, 1, 1)) if cfg.qk_norm else None

    def forward(self, x, context, mask, q_turn, k_turn, maps: list | None = None):
        """x (B, T, D) looks at context (B, S, D) where mask (B, 1, 1, S) is True; the weights (B, H, T, S) join `maps`."""
        B, T, D = x.shape
        q = self.q(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, D / H)
        k, v = self.kv(context).view(B, context.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.qk_norm(q), q_turn), rotate(self.qk_norm(k), k_turn)
        if self.sharpness is not None:
            q = q * self.sharpness.to(q.dtype)
        if maps is not None:  # the fused kernel keeps its weights to itself, so who asks for them pays for a second product
            scores = (q.float() @ k.float().transpose(-1, -2)) / math.sqrt(q.shape[-1])
            maps.append(scores.masked_fill(~mask, float("-inf")).softmax(-1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
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
    """Each token with its neighbours: a letter's sound lies in them. A convolution as a matrix, so that Muon trains it."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
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
        # adaLN-single (PixArt, arXiv 2310.00426): one map from time for all blocks, and a learned offset for each. It
        # scales and shifts the branches' inputs; their outputs need no gate, since they start at zero by themselves.
        adaln = cfg.time_conditioning == "adaln"
        self.offset = nn.Parameter(torch.zeros(6, cfg.width)) if adaln else None
        self.norms = nn.ModuleList(nn.RMSNorm(cfg.width, elementwise_affine=not adaln) for _ in range(3))
        if cfg.zero_init:
            for branch in (self.attn, self.cross, self.mlp):
                nn.init.zeros_(branch.out.weight)

    def forward(self, x, text, time, mel_mask, text_mask, turns, maps=None):
        """x (B, T, D), text (B, L, D), time (B, 6, D) or None -> (B, T, D)."""
        self_turn, mel_turn, text_turn = turns
        mods = (time + self.offset).unsqueeze(2).unbind(1) if time is not None else None  # six of (B, 1, D)

        def normed(n):
            h = self.norms[n](x)
            return h if mods is None else torch.addcmul(mods[2 * n], h, 1 + mods[2 * n + 1])
        h = normed(0)
        x = x + self.attn(h, h, mel_mask, self_turn, self_turn)
        x = x + self.cross(normed(1), text, text_mask, mel_turn, text_turn, maps)
        return x + self.mlp(normed(2))


class Decoder(nn.Module):
    """Velocity of a noisy mel x (B, T, n_mels) at times t (B,), given projected text (B, L, D) and its positions (B, L)."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.inp = nn.Linear(cfg.patch * cfg.n_mels, cfg.width)
        self.time = nn.Sequential(nn.Linear(2 * TIME_FREQUENCIES, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.text_norm = nn.RMSNorm(cfg.width)
        self.said = nn.Linear(cfg.width, cfg.width, bias=False) if cfg.align else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.width)
        self.out = nn.Linear(cfg.width, cfg.patch * cfg.n_mels)
        if cfg.time_conditioning == "adaln":
            self.modulation = nn.Linear(cfg.width, 6 * cfg.width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)
        if cfg.zero_init:
            nn.init.zeros_(self.out.weight)

    def turns(self, T, mel_lengths, text_positions):
        """Rotary angles for self-attention (None without self_rope), cross-attention's queries and its keys."""
        cfg, size = self.cfg, self.cfg.width // self.cfg.heads
        positions = torch.arange(T, device=mel_lengths.device)[None]
        self_turn = rotary(positions, size) if cfg.self_rope else None
        if cfg.cross_rope == "absolute":
            return self_turn, rotary(positions, size), rotary(text_positions, size)
        # Length-normalised RoPE (arXiv 2509.11084): both ends meet, so that a straight diagonal is the prior.
        where = (positions + 0.5) * cfg.patch / mel_lengths[:, None]
        return self_turn, rotary(cfg.rope_gamma * where, size), rotary(cfg.rope_gamma * text_positions, size)

    def forward(self, x, t, text, text_positions, mel_lengths, text_lengths, path=None, maps: list | None = None):
        """Velocity (B, T, n_mels), where `path` (B, positions) says which token each position says, if that is known.

        Each block adds its cross-attention's weights to `maps`: (B, heads, positions, L).
        """
        B, frames, _ = x.shape
        # `patch` frames side by side make one position; frames behind an utterance's end are silenced, so that those in
        # its last patch say nothing
        x = x * length_mask(mel_lengths, frames)[..., None]
        x = F.pad(x, (0, 0, 0, -frames % self.cfg.patch)).reshape(B, -1, self.cfg.patch * self.cfg.n_mels)
        T = x.shape[1]
        mel_mask = length_mask(-(-mel_lengths // self.cfg.patch), T)[:, None, None]
        text_mask = length_mask(text_lengths, text.shape[1])[:, None, None]
        turns = self.turns(T, mel_lengths, text_positions)
        frequencies = 10000.0 ** (-torch.arange(TIME_FREQUENCIES, device=t.device) / TIME_FREQUENCIES)
        angles = 1000 * t[:, None] * frequencies
        time = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (B, D)
        x = self.inp(x)
        if self.cfg.time_conditioning == "adaln":
            time = self.modulation(F.silu(time)).view(B, 6, -1)
        else:
            x, time = x + time[:, None], None
        text = self.text_norm(text)
        if path is not None:
            x = x + self.said(text).gather(1, path[..., None].expand(-1, -1, text.shape[-1]))
        for block in self.blocks:
            x = block(x, text, time, mel_mask, text_mask, turns, maps)
        return self.out(self.norm(x)).view(B, -1, self.cfg.n_mels)[:, :frames]


# --- alignment

def align(scores: torch.Tensor, lengths: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
    """Monotonic alignment search (Glow-TTS, arXiv 2005.11129): of scores (B, T, L) the path of the largest sum, (B, T).

    It says which token each of the `lengths` (B,) positions belongs to: the first one to token 0, the last one to the last
    of `token_lengths` (B,), and from one position to the next the token stays or goes on by one.
    """
    B, T, L = scores.shape
    # Token by token and not position by position, since there are fewer of them, and each step costs a few launches of
    # kernels on a GPU: the best sum to end in token n at position t is the best, over its starts, of the sum to where n - 1
    # ended and of n's own scores from there to t, a difference of their running totals (doubles, as those grow long).
    total = scores.double().cumsum(dim=1)
    before = F.pad(total[:, :-1], (0, 0, 1, 0))
    best, starts = total[:, :, 0], []
    for n in range(1, L):
        reached = F.pad(best[:, :-1], (1, 0), value=float("-inf")) - before[:, :, n]
        reached, start = reached.cummax(dim=1)
        best = total[:, :, n] + reached
        starts.append(start)
    end, found = lengths[:, None] - 1, [torch.full((B, 1), T, device=scores.device)] * L  # T: never
    for n in reversed(range(1, L)):
        inside = n < token_lengths[:, None]
        start = starts[n - 1].gather(1, end)
        found[n] = torch.where(inside, start, T)
        end = torch.where(inside, (start - 1).clamp(min=0), end)
    found[0] = torch.zeros_like(end)
    positions = torch.arange(T, device=scores.device).repeat(B, 1)
    return torch.searchsorted(torch.cat(found, dim=1), positions, right=True) - 1


# --- the whole

def autocast(cfg: Config, device: torch.device):
    """The precision that cfg.dtype asks for: bfloat16 for products where it is bfloat16, or auto on a GPU."""
    return torch.autocast(device.type, torch.bfloat16,
                          enabled=cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.type == "cuda"))


class TTS(nn.Module):
    """Text encoder, duration predictor and decoder. `forward` is the loss, so that DDP sees every backward.

    `tokenise` turns a text into token ids, of which the text encoder reads `most_tokens` (None: no limit is known).
    Raises UserError if the text encoder cannot be loaded.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = cfg
        self.text_encoder, self.tokenise, self.most_tokens = load_text_encoder(cfg)
        self.text_encoder.requires_grad_(cfg.train_text_encoder).eval()
        encoder_width = self.text_encoder.config.hidden_size
        self.text_proj = nn.Linear(encoder_width, cfg.width)
        self.text_blocks = nn.ModuleList(TextBlock(cfg.width) for _ in range(cfg.text_blocks))
        self.no_text = nn.Parameter(torch.zeros(cfg.width))  # stands in for the text when it is dropped
        self.duration = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.GELU(), nn.Linear(cfg.width, 1))
        nn.init.zeros_(self.duration[-1].weight)
        nn.init.constant_(self.duration[-1].bias, math.log(SECONDS_PER_TOKEN))
        self.sound = nn.Linear(cfg.width, cfg.n_mels) if cfg.align else None  # of a token: its mean log-mel, to align by
        self.decoder = Decoder(cfg)

    def train(self, mode: bool = True):
        super().train(mode)
        self.text_encoder.eval()  # never dropout there: features are the same in training and in sampling
        return self

    def encode(self, tokens, token_lengths):
        """Token ids (B, L), with their lengths (B,), to projected text (B, L, D)."""
        mask = length_mask(token_lengths, tokens.shape[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.cfg.train_text_encoder):
            features = self.text_encoder(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        text = self.text_proj(features)
        for block in self.text_blocks:
            text = block(text, mask)
        return text

    def durations(self, text, token_lengths):
        """Log of the utterance's seconds (B,), and the log of each token's share of them (B, L), -inf behind its last.

        The utterance lasts as long as its tokens' predicted seconds add up to. Without `align` only that sum has a target,
        yet letters come in so many mixtures that it teaches each one's share.
        """
        if not self.cfg.align:
            text = text.detach()  # how long a text lasts must not shape what the decoder reads
        with torch.autocast(text.device.type, enabled=False):  # bfloat16 would round a duration by a percent
            per_token = self.duration(text.to(self.no_text.dtype)).squeeze(-1).float()
        per_token = per_token.masked_fill(~length_mask(token_lengths, per_token.shape[1]), float("-inf"))
        return per_token.logsumexp(dim=1), per_token.log_softmax(dim=1)

    def positions(self, share, token_lengths):
        """Where in cross-attention each token sits (B, L), given its share of the time: see cfg.cross_rope."""
        if self.cfg.cross_rope == "durations":
            return share.cumsum(dim=1) - share / 2
        n = torch.arange(share.shape[1], device=share.device).expand_as(share)
        return n if self.cfg.cross_rope == "absolute" else (n + 0.5) / token_lengths[:, None]

    def path(self, share, mel_lengths, token_lengths):
        """The token that each position says (B, positions) when every token takes its share (B, L); None without `align`."""
        if not self.cfg.align:
            return None
        lengths = -(-mel_lengths // self.cfg.patch)
        where = (torch.arange(int(lengths.max()), device=share.device) + 0.5) / lengths[:, None]
        return torch.searchsorted(share.cumsum(dim=1), where).minimum(token_lengths[:, None] - 1)

    def condition(self, text, drop):
        """Projected text (B, L, D), replaced by the learned no-text vector where drop (B,) is True."""
        return torch.where(drop[:, None, None], self.no_text.to(text.dtype), text)

    def alignment(self, batch: dict, text) -> tuple:
        """Of a batch with its recordings: the path (B, positions), each token's share of the time (B, L), and the sum over
        frames of how far the log-mels are from the sounds of the tokens on the path.
        """
        cfg, (B, frames, n_mels) = self.cfg, batch["mel"].shape
        lengths, token_lengths = -(-batch["mel_lengths"] // cfg.patch), batch["token_lengths"]
        mel = F.pad(batch["mel"], (0, 0, 0, -frames % cfg.patch)).view(B, -1, cfg.patch, n_mels).mean(dim=2)
        T, L = mel.shape[1], text.shape[1]
        sound = self.sound(text).to(mel.dtype)  # (B, L, n_mels)
        with torch.no_grad(), torch.autocast(mel.device.type, enabled=False):
            place, n = torch.arange(T, device=mel.device) + 0.5, torch.arange(L, device=mel.device) + 0.5
            off = place[:, None] / lengths[:, None, None] - n / token_lengths[:, None, None]  # (B, T, L)
            scores = mel @ sound.mT - sound.square().sum(-1)[:, None] / 2
            scores = scores - DIAGONAL * token_lengths[:, None, None] * off.square()
            path = align(scores, lengths, token_lengths)
        error = (sound.gather(1, path[..., None].expand(-1, -1, n_mels)) - mel).square().mean(dim=-1)
        # a tail of silence is on the path too, but takes no share: batch["seconds"] are those of speech
        spoken = (batch["seconds"] * (cfg.sample_rate / cfg.hop_length) / cfg.patch).round().long().clamp(min=1)
        counts = torch.zeros(B, L, device=mel.device).scatter_add_(1, path, length_mask(spoken, T).float())
        return path, counts / counts.sum(dim=1, keepdim=True), cfg.patch * (error * length_mask(lengths, T)).sum()

    def forward(self, batch: dict) -> dict:
        """Losses of a batch as `data.collate` makes it, each a scalar: loss, flow_loss, duration_loss.

        Sums over this batch are divided by batch["frames"] and batch["utterances"] where it has them: the counts of
        the whole step, over all ranks and accumulation steps, so that the parts' losses add up to the step's mean.
        """
        cfg, mel_lengths, token_lengths = self.cfg, batch["mel_lengths"], batch["token_lengths"]
        frames, utterances = batch.get("frames", mel_lengths.sum()), batch.get("utterances", len(mel_lengths))
        text = self.encode(batch["tokens"], token_lengths)
        log_seconds, log_share = self.durations(text, token_lengths)
        duration = (log_seconds - batch["seconds"].log()).square().sum() / utterances
        share, path, loss = log_share.exp(), None, 0.0
        if cfg.align:
            path, share, distance = self.alignment(batch, text)
            # Kullback and Leibler's divergence: least where predicted shares are the mean of those that were found
            duration = duration + (torch.xlogy(share, share) - share * log_share.clamp(min=-1e4)).sum() / utterances
            loss = cfg.align_loss_weight * distance / frames
        t = batch["t"][:, None, None]
        x_t = (1 - t) * batch["mel"] + t * batch["noise"]
        velocity = self.decoder(x_t, batch["t"], self.condition(text, batch["drop_text"]),
                                self.positions(share, token_lengths), mel_lengths, token_lengths, path).float()
        error = (velocity - (batch["noise"] - batch["mel"])).square().mean(dim=-1)  # (B, T)
        flow = (error * length_mask(mel_lengths, error.shape[1])).sum() / frames
        return {"loss": loss + flow + cfg.duration_loss_weight * duration, "flow_loss": flow, "duration_loss": duration}

    def saved_state(self) -> dict:
        """The state dict less a frozen pretrained encoder's weights, which its name brings back; shared ones once."""
        frozen = not self.cfg.train_text_encoder and self.cfg.text_encoder_name != "random"
        names = {k for part in (self.named_parameters(), self.named_buffers()) for k, _ in part}  # T5's embeddings have two
        return {k: v for k, v in self.state_dict().items() if k in names and not (frozen and k.startswith("text_encoder."))}


def load_tts(cfg: Config, state: dict, averages: dict | None = None) -> TTS:
    """A model with the weights that `saved_state` gave, and averages of some of them in their places.

    Raises UserError if they are of another shape.
    """
    try:
        model = TTS(cfg)
    except (RuntimeError, MemoryError, TypeError) as e:  # sizes beyond the memory, and beyond torch's integers
        raise UserError(f"no model can be built by the checkpoint's config: {first_line(e)[:160]}") from None
    unexpected = []
    for part in (state, averages or {}):  # in turn: a state may hold a shared weight twice, and its average comes once
        try:
            unexpected += model.load_state_dict(part, strict=False).unexpected_keys
        except RuntimeError as e:
            unexpected.append(str(e).splitlines()[-1].strip())
    missing = [k for k in model.saved_state() if k not in state]
    if missing or unexpected:
        raise UserError(f"the checkpoint's weights do not fit its config: missing {missing[:3]}, "
                        f"unexpected {unexpected[:3]}; was it written by another version of model.py?")
    return model


def parameter_table(model: TTS) -> dict[str, tuple[int, int]]:
    """Part -> (parameters, trainable parameters); the last row is the total."""
    parts = {"text encoder": model.text_encoder, "text projection": model.text_proj, "duration predictor": model.duration,
             "text blocks": model.text_blocks, "mel decoder": model.decoder}
    if model.sound is not None:
        parts["alignment"] = model.sound
    rows = {name: (sum(p.numel() for p in part.parameters()),
                   sum(p.numel() for p in part.parameters() if p.requires_grad)) for name, part in parts.items()}
    rows["no-text vector"] = (model.no_text.numel(), model.no_text.numel())
    return rows | {"total": tuple(map(sum, zip(*rows.values())))}


def decoder_flops_per_frame(cfg: Config, frames: float, tokens: float) -> float:
    """Floating-point operations of the decoder's forward pass a mel frame, for utterances of so many frames and tokens.

    Two a weight a position (`patch` frames) for the matrices it passes, two a weight a token for the keys and values of
    the text and for what is said of it, and 4 D a pair of positions for attention's two products. Training costs three
    times this.
    """
    D, hidden = cfg.width, multiple_of_32(cfg.width * cfg.mlp_ratio)
    per_position = cfg.layers * (4 * D * D + 2 * D * D + 3 * D * hidden) + 2 * cfg.patch * cfg.n_mels * D
    per_token = (2 * cfg.layers + cfg.align) * D * D
    attention = cfg.layers * 4 * D * (frames / cfg.patch + tokens)
    return (2 * per_position + attention) / cfg.patch + 2 * per_token * tokens / frames


def main(argv: list[str]) -> None:
    cfg = load_config(argv)
    rows = parameter_table(TTS(cfg))
    print(f"{'part':<20}{'parameters':>14}{'trainable':>14}{'frozen':>14}")
    for name, (count, trainable) in rows.items():
        print(f"{name:<20}{count:>14,}{trainable:>14,}{count - trainable:>14,}")
    for seconds in (2.5, 6.6):
        frames = seconds * cfg.sample_rate / cfg.hop_length
        tokens = seconds * 16  # LJSpeech: about 100 bytes in 6.6 s
        forward = decoder_flops_per_frame(cfg, frames, tokens)
        print(f"decoder, {seconds} s utterances: {forward / 1e6:.1f} MFLOP a frame forward, {3 * forward / 1e6:.1f} "
              "training")


if __name__ == "__main__":
    run_cli(main)
