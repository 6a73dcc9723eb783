"""The text encoder and its tokeniser: ByT5, another encoder of Hugging Face, or a small untrained one of the same kind."""
import functools
import math
import os

import torch

from common import UserError, first_line
from config import Config

T5_TOKENS = 1024  # ByT5 was trained on up to 1,024 tokens. Its relative positions accept more, but the output is then noise.


def byte_tokens(text: str) -> list[int]:
    """ByT5's tokens of a text: every byte + 3, then </s>, which is 1."""
    return [b + 3 for b in text.encode()] + [1]


def from_hub(name: str, load, **options):
    """load(name), where `load` is a from_pretrained of transformers. Does not run code that is stored there.

    Raises UserError if it cannot be loaded.
    """
    try:
        return load(name, trust_remote_code=False, **options)  # explicit, because transformers would otherwise ask
    except Exception as e:  # the hub and the loader raise many types
        source = "that folder" if os.path.isdir(name) else "the Hugging Face hub (or the local cache)"
        raise UserError(f"cannot load the text encoder '{name}' from {source} ({type(e).__name__}: "
                        f"{first_line(e)[:120]}). Download its config.json and weights "
                        f"(https://huggingface.co/{name}) into a folder and set text_encoder_name to it, or set "
                        "text_encoder_name: random and train_text_encoder: true") from None


def load_tokeniser(cfg: Config) -> tuple:
    """A function from text to token ids, and the most tokens that the text encoder reads. Raises UserError."""
    from transformers import AutoConfig, AutoTokenizer
    name = cfg.text_encoder_name
    if name == "random" or name.startswith("google/byt5-"):
        return byte_tokens, T5_TOKENS
    encoder = from_hub(name, AutoConfig.from_pretrained).get_text_config()
    if encoder.vocab_size == 384 and encoder.model_type == "t5":
        return byte_tokens, T5_TOKENS  # ByT5 has no vocabulary file
    tokenizer = from_hub(name, AutoTokenizer.from_pretrained)
    most = min(getattr(encoder, "max_position_embeddings", T5_TOKENS), tokenizer.model_max_length, T5_TOKENS)
    return functools.cache(lambda text: tokenizer(text)["input_ids"]), most  # cached: threads must not share it


def load_text_encoder(cfg: Config):
    """The encoder, a Hugging Face module. Raises UserError if it cannot be loaded."""
    from transformers import AutoModelForTextEncoding, T5Config, T5EncoderModel
    name = cfg.text_encoder_name
    if name == "random":
        width, heads = cfg.text_encoder_width, cfg.text_encoder_heads
        return T5EncoderModel(T5Config(
            vocab_size=384, d_model=width, d_kv=width // heads, num_heads=heads, num_layers=cfg.text_encoder_layers,
            d_ff=math.ceil(width * 8 / 3 / 32) * 32, feed_forward_proj="gated-gelu", dropout_rate=0.0, use_cache=False))
    return from_hub(name, AutoModelForTextEncoding.from_pretrained, dtype=torch.float32)
