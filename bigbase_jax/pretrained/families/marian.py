"""Marian's translation models (opus-mt), as transformers' ``MarianMTModel`` stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import ENCODER_DECODER, Keys, Shapes, kinds, need, one_size, reads_two, said, words
from bigbase_jax.pretrained.schema import FLAG, LENGTH, TOKEN, VOCABULARY, WORD, only
from bigbase_jax.pretrained.table import Entry, Table, fairseq_block, repeat

MODELS = (EncoderDecoder,)
HEAD = r"^head$"
TRANSFORMERS = True
inputs = reads_two
_ACTIVATIONS = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}
_EPSILON = 1e-5

_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY),
    "max_position_embeddings": ("length", LENGTH),
    **ENCODER_DECODER,
    "activation_function": ("style.activation", WORD, "gelu"),
    "scale_embedding": ("scale_embedding", FLAG, False),
    "pad_token_id": ("pad_id", TOKEN, None),
}
SCHEMA = {
    **kinds(_KEYS),
    "decoder_vocab_size": VOCABULARY,
    "share_encoder_decoder_embeddings": only(True),
    "tie_word_embeddings": only(True),
    "normalize_before": only(False),
    "normalize_embedding": only(False),
    "static_position_embeddings": only(True),
    "add_final_layer_norm": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    if config.get("decoder_vocab_size") not in (None, config["vocab_size"]):
        raise UserError("config.json has two sizes of vocabulary; known here is one for both languages.")
    style = Style(epsilon=_EPSILON, post_norm=True, kernel_init="normal")
    found = one_size(words(_KEYS, config, style, _ACTIVATIONS))
    return target(EncoderDecoder, **found, head_bias=True, positions="sinusoidal")


def to_config(model: EncoderDecoder, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.positions == "sinusoidal", "Marian has sinusoidal positions.")
    style = model.style
    plain = style.norm == "layernorm" and style.post_norm and style.epsilon == _EPSILON
    need(plain, f"Marian has LayerNorm after each branch, with an epsilon of {_EPSILON}.")
    simple = not style.gated and not style.qk_norm and style.scale is None and not model.scale_head
    need(simple, "Marian has no gates, and the usual scales.")
    need(style.kv_heads in (None, model.heads), "Marian has as many heads of keys as of queries.")
    need(style.head_dim in (None, model.width // model.heads), "Marian's heads are as wide as the model together.")
    need(style.qkv_bias and style.out_bias and style.mlp_bias, "Marian has biases everywhere.")
    need(model.tied and model.head_bias, "Marian's head is the embedding and a bias.")
    pad = model.pad_id if model.pad_id is not None else (model.vocab_size or 1) - 1
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        **said(_KEYS, model, _ACTIVATIONS),
        "decoder_vocab_size": model.vocab_size,
        "max_position_embeddings": model.length or 512,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
    }


def table(model: EncoderDecoder) -> Table:
    """See ``Family``."""
    encoder = fairseq_block("model.encoder.layers.{i}", "encoder.block_{i}")
    decoder = fairseq_block("model.decoder.layers.{i}", "decoder.block_{i}", cross=True)
    same = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    return Table(
        entries=[
            Entry("model.shared.weight", "embedding", also=same),
            *repeat(model.depth, encoder),
            *repeat(model.decoder_depth or model.depth, decoder),
            Entry("final_logits_bias", "logits_bias", "() v -> v"),
        ],
        sizes={"h": model.heads},
        prefix="model.",
        ignored=(r"embed_positions\.weight$",),  # sinusoids, which are computed
    )
