"""GPT-2 (Radford et al. 2019), as ``GPT2LMHeadModel`` and ``GPT2Model`` of transformers store it.

Its linear layers are stored [in, out], and query, key and value are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import Shapes, lookup, need
from bigbase_jax.pretrained.schema import FLAG, HIDDEN, LAYERS, LENGTH, SHARE, VOCABULARY, WIDTH, WORD, heads_of, only
from bigbase_jax.pretrained.table import Entry, Table, dense, norm, repeat

MODELS = (Decoder,)
HEAD = r"^head(\.|$)"  # of tokens, or of a task that reads what the model gives
TRANSFORMERS = True
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu", "tanh": "tanh"}

SCHEMA = {
    "vocab_size": VOCABULARY,
    "n_positions": LENGTH,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": heads_of("n_embd"),
    "n_inner": HIDDEN,
    "tie_word_embeddings": FLAG,
    "layer_norm_epsilon": SHARE,
    "activation_function": WORD,
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "add_cross_attention": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(
        Decoder,
        vocab_size=config["vocab_size"],
        length=config["n_positions"],
        width=config["n_embd"],
        depth=config["n_layer"],
        heads=config["n_head"],
        mlp_dim=config.get("n_inner") or 4 * config["n_embd"],
        tied=config.get("tie_word_embeddings", True),
        style=Style(
            epsilon=config.get("layer_norm_epsilon", 1e-5),
            activation=lookup(_ACTIVATIONS, config.get("activation_function", "gelu_new"), "activation_function"),
            kernel_init="normal",
        ),
    )


def to_config(model: Decoder, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.positions == "learned", "GPT-2 has learned positions.")
    style = model.style
    plain = style.norm == "layernorm" and not style.post_norm and not style.gated
    need(
        plain and style.kv_heads in (None, model.heads),
        "GPT-2 has LayerNorm before each branch, no gates, and as many heads of keys as of queries.",
    )
    need(style.head_dim in (None, model.width // model.heads), "GPT-2's heads are as wide as the model together.")
    need(style.qkv_bias and style.out_bias and style.mlp_bias, "GPT-2 has biases everywhere.")
    need(not style.qk_norm and style.window is None, "GPT-2 has neither norms of queries and keys nor a window.")
    need(style.scale is None, "GPT-2 has the usual scale of scores.")
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": model.vocab_size,
        "n_positions": model.length,
        "n_embd": model.width,
        "n_layer": model.depth,
        "n_head": model.heads,
        "n_inner": model.mlp_dim or 4 * model.width,
        "activation_function": lookup(theirs, style.activation, "activation"),
        "layer_norm_epsilon": style.epsilon,
        "tie_word_embeddings": model.tied,
    }


def table(model: Decoder) -> Table:
    """See ``Family``."""
    block = [
        *norm("transformer.h.{i}.ln_1", "encoder.block_{i}.norm1"),
        *(
            Entry(
                f"transformer.h.{{i}}.attn.c_attn.{theirs}",
                tuple(f"encoder.block_{{i}}.attention.{name}.{ours}" for name in ("query", "key", "value")),
                arrange,
            )
            for theirs, ours, arrange in (
                ("weight", "kernel", "d (three h k) -> three d h k"),
                ("bias", "bias", "(three h k) -> three h k"),
            )
        ),
        *dense("transformer.h.{i}.attn.c_proj", "encoder.block_{i}.attention.out", arrange="(h k) d -> h k d"),
        *norm("transformer.h.{i}.ln_2", "encoder.block_{i}.norm2"),
        *dense("transformer.h.{i}.mlp.c_fc", "encoder.block_{i}.mlp.up", arrange=""),
        *dense("transformer.h.{i}.mlp.c_proj", "encoder.block_{i}.mlp.down", arrange=""),
    ]
    head = ("lm_head.weight",)
    return Table(
        entries=[
            Entry("transformer.wte.weight", "embedding", also=head if model.tied else ()),
            Entry("transformer.wpe.weight", "position"),
            *repeat(model.depth, block),
            *norm("transformer.ln_f", "encoder.norm"),
            *([] if model.tied else [Entry(*head, "head", "v d -> d v")]),
        ],
        sizes={"h": model.heads, "three": 3},
        prefix="transformer.",
        ignored=(r"\.attn\.(bias|masked_bias)$",),
    )


def inputs(model: Decoder, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)
