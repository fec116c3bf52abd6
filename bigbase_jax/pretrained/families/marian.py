"""Marian's translation models (opus-mt), as transformers' ``MarianMTModel`` stores them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import Shapes, lookup, need
from bigbase_jax.pretrained.schema import ENCODER_DECODER, FLAG, LENGTH, TOKEN, VOCABULARY, WORD, only
from bigbase_jax.pretrained.table import Entry, Table, dense, heads, joined, norm, repeat

MODELS = (EncoderDecoder,)
HEAD = r"^head$"
TRANSFORMERS = True
_ACTIVATIONS = {
    "swish": "silu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}
_EPSILON = 1e-5

SCHEMA = {
    "vocab_size": VOCABULARY,
    "decoder_vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH,
    **ENCODER_DECODER,
    "scale_embedding": FLAG,
    "pad_token_id": TOKEN,
    "activation_function": WORD,
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
    for key in ("attention_heads", "ffn_dim"):
        if config[f"encoder_{key}"] != config[f"decoder_{key}"]:
            raise UserError(f"config.json has another {key} in its encoder than in its decoder; known here is one.")
    return target(
        EncoderDecoder,
        vocab_size=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["d_model"],
        depth=config["encoder_layers"],
        decoder_depth=config["decoder_layers"],
        heads=config["encoder_attention_heads"],
        mlp_dim=config["encoder_ffn_dim"],
        scale_embedding=config.get("scale_embedding", False),
        head_bias=True,
        pad_id=config.get("pad_token_id"),
        positions="sinusoidal",
        style=Style(
            epsilon=_EPSILON,
            post_norm=True,
            activation=lookup(_ACTIVATIONS, config.get("activation_function", "gelu"), "activation_function"),
            kernel_init="normal",
        ),
    )


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
    theirs = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
    pad = model.pad_id if model.pad_id is not None else (model.vocab_size or 1) - 1
    width = model.mlp_dim or 4 * model.width
    return {
        "model_type": "marian",
        "architectures": ["MarianMTModel"],
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
        "decoder_vocab_size": model.vocab_size,
        "max_position_embeddings": model.length or 512,
        "d_model": model.width,
        "encoder_layers": model.depth,
        "decoder_layers": model.decoder_depth or model.depth,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": model.heads,
        "encoder_ffn_dim": width,
        "decoder_ffn_dim": width,
        "activation_function": lookup(theirs, style.activation, "activation"),
        "scale_embedding": model.scale_embedding,
        "share_encoder_decoder_embeddings": True,
        "tie_word_embeddings": True,
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
    }


def table(model: EncoderDecoder) -> Table:
    """See ``Family``."""

    def attention(theirs: str, ours: str) -> list[Entry]:
        return [
            *heads(f"{theirs}.q_proj", f"{ours}.query"),
            *heads(f"{theirs}.k_proj", f"{ours}.key"),
            *heads(f"{theirs}.v_proj", f"{ours}.value"),
            *joined(f"{theirs}.out_proj", f"{ours}.out"),
        ]

    def block(side: str) -> list[Entry]:
        theirs, ours = f"model.{side}.layers.{{i}}", f"{side}.block_{{i}}"
        cross = [
            *attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention"),
            *norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}.norm_cross"),
        ]
        return [
            *attention(f"{theirs}.self_attn", f"{ours}.attention"),
            *norm(f"{theirs}.self_attn_layer_norm", f"{ours}.norm1"),
            *(cross if side == "decoder" else []),
            *dense(f"{theirs}.fc1", f"{ours}.mlp.up"),
            *dense(f"{theirs}.fc2", f"{ours}.mlp.down"),
            *norm(f"{theirs}.final_layer_norm", f"{ours}.norm2"),
        ]

    same = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
    return Table(
        entries=[
            Entry("model.shared.weight", "embedding", also=same),
            *repeat(model.depth, block("encoder")),
            *repeat(model.decoder_depth or model.depth, block("decoder")),
            Entry("final_logits_bias", "logits_bias", "() v -> v"),
        ],
        sizes={"h": model.heads},
        prefix="model.",
        ignored=(r"embed_positions\.weight$",),  # sinusoids, which are computed
    )


def inputs(model: EncoderDecoder, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return one, one
