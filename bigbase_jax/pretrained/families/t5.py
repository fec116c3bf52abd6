"""T5, T5 1.1 and FLAN-T5, as transformers' ``T5ForConditionalGeneration`` stores them.

The first T5 has ReLU and the embedding, whose products are divided by sqrt(D), as its head; later ones have gates and a
head of their own. Both kinds are told apart by ``tie_word_embeddings``, or ``scale_decoder_outputs`` where it is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import Shapes, lookup, need
from bigbase_jax.pretrained.schema import (
    FLAG,
    HEADS,
    HIDDEN,
    LAYERS,
    SHARE,
    TOKEN,
    VOCABULARY,
    WIDTH,
    WORD,
    only,
    whole,
)
from bigbase_jax.pretrained.table import Entry, Table, dense, heads, joined, norm, repeat

MODELS = (EncoderDecoder,)
HEAD = r"^head$"
TRANSFORMERS = True
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}

SCHEMA = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "d_kv": whole(1, 4096),
    "d_ff": HIDDEN,
    "feed_forward_proj": WORD,
    "scale_decoder_outputs": FLAG,
    "tie_word_embeddings": FLAG,
    "pad_token_id": TOKEN,
    "relative_attention_num_buckets": whole(4, 4096),
    "relative_attention_max_distance": whole(2, 1 << 20),
    "layer_norm_epsilon": SHARE,
    "is_encoder_decoder": only(True),
    "tie_encoder_decoder": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    kind, _, activation = config.get("feed_forward_proj", "relu").rpartition("-")
    if (kind, activation) == ("gated", "gelu"):
        activation = "gelu_new"  # as published: its gates have the approximation
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return target(
        EncoderDecoder,
        vocab_size=config["vocab_size"],
        width=config["d_model"],
        depth=config["num_layers"],
        decoder_depth=config.get("num_decoder_layers") or config["num_layers"],
        heads=config["num_heads"],
        mlp_dim=config["d_ff"],
        tied=tied,
        scale_embedding=False,
        scale_head=tied,
        pad_id=config.get("pad_token_id", 0),
        positions="relative",
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_distance=config.get("relative_attention_max_distance", 128),
        style=Style(
            norm="rmsnorm",
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
            head_dim=config["d_kv"],
            epsilon=config.get("layer_norm_epsilon", 1e-6),
            activation=lookup(_ACTIVATIONS, activation, "feed_forward_proj"),
            gated=kind == "gated",
            scale=1.0,
            kernel_init="normal",
        ),
    )


def to_config(model: EncoderDecoder, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.positions == "relative", "T5 has relative positions.")
    style = model.style
    plain = style.norm == "rmsnorm" and not style.post_norm and not style.qk_norm
    need(plain and style.kv_heads in (None, model.heads), "T5 has RMSNorm before each branch, and no shared heads.")
    bare = not (style.qkv_bias or style.out_bias or style.mlp_bias or model.head_bias)
    need(bare and style.scale == 1.0 and not model.scale_embedding, "T5 has no biases, and no scales but its head's.")
    need(model.tied == model.scale_head, "T5's head is scaled where it is the embedding, and only there.")
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    activation = lookup(theirs, style.activation, "activation")
    if style.gated:
        need(activation != "gelu", "T5's gates have GELU's approximation by tanh.")
        activation = "gated-gelu" if activation == "gelu_new" else f"gated-{activation}"
    _, K = style.sizes(model.width, model.heads)
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
        "d_model": model.width,
        "d_kv": K,
        "d_ff": model.mlp_dim or 4 * model.width,
        "num_layers": model.depth,
        "num_decoder_layers": model.decoder_depth or model.depth,
        "num_heads": model.heads,
        "relative_attention_num_buckets": model.relative_buckets,
        "relative_attention_max_distance": model.relative_distance,
        "layer_norm_epsilon": style.epsilon,
        "feed_forward_proj": activation,
        "tie_word_embeddings": model.tied,
        "pad_token_id": model.pad_id if model.pad_id is not None else 0,
        "decoder_start_token_id": model.pad_id if model.pad_id is not None else 0,
    }


def table(model: EncoderDecoder) -> Table:
    """See ``Family``."""

    def attention(theirs: str, ours: str) -> list[Entry]:
        return [
            *heads(f"{theirs}.q", f"{ours}.query", bias=False),
            *heads(f"{theirs}.k", f"{ours}.key", bias=False),
            *heads(f"{theirs}.v", f"{ours}.value", bias=False),
            *joined(f"{theirs}.o", f"{ours}.out", bias=False),
        ]

    def feed_forward(theirs: str, ours: str) -> list[Entry]:
        up = [*dense(f"{theirs}.wi", f"{ours}.up", bias=False)]
        if model.style.gated:
            up = [
                *dense(f"{theirs}.wi_0", f"{ours}.gate", bias=False),
                *dense(f"{theirs}.wi_1", f"{ours}.up", bias=False),
            ]
        return [*up, *dense(f"{theirs}.wo", f"{ours}.down", bias=False)]

    def block(side: str) -> list[Entry]:
        theirs, ours, last = f"{side}.block.{{i}}.layer", f"{side}.block_{{i}}", 1
        found = [
            *norm(f"{theirs}.0.layer_norm", f"{ours}.norm1", bias=False),
            *attention(f"{theirs}.0.SelfAttention", f"{ours}.attention"),
        ]
        if side == "decoder":
            found += norm(f"{theirs}.1.layer_norm", f"{ours}.norm_cross", bias=False)
            found += attention(f"{theirs}.1.EncDecAttention", f"{ours}.cross_attention")
            last = 2
        found += norm(f"{theirs}.{last}.layer_norm", f"{ours}.norm2", bias=False)
        return found + feed_forward(f"{theirs}.{last}.DenseReluDense", f"{ours}.mlp")

    distance = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    tables = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    head = ("lm_head.weight",)
    # A head of its own that was never told apart from the embedding is stored once, under the embedding's name.
    free = [Entry(*head, "head", "v d -> d v", also=("shared.weight",))]
    return Table(
        entries=[
            Entry("shared.weight", "embedding", also=(*tables, *head) if model.tied else tables),
            Entry(f"encoder.{distance}", "source_distance"),
            *repeat(model.depth, block("encoder")),
            *norm("encoder.final_layer_norm", "encoder.norm", bias=False),
            Entry(f"decoder.{distance}", "target_distance"),
            *repeat(model.decoder_depth or model.depth, block("decoder")),
            *norm("decoder.final_layer_norm", "decoder.norm", bias=False),
            *([] if model.tied else free),
        ],
        sizes={"h": model.heads},
        ignored=(r"EncDecAttention\.relative_attention_bias",),  # of the first releases, which never read it
    )


def inputs(model: EncoderDecoder, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return one, one
