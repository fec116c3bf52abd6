"""T5, T5 1.1 and FLAN-T5, as transformers' ``T5ForConditionalGeneration`` stores them.

The first T5 has ReLU and the embedding, whose products are divided by sqrt(D), as its head; later ones have gates and a
head of their own. Both kinds are told apart by ``tie_word_embeddings``, or ``scale_decoder_outputs`` where it is said.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import Keys, Shapes, kinds, lookup, need, reads_two, said, words
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
from bigbase_jax.pretrained.table import Entry, Table, attention, dense, norm, repeat

MODELS = (EncoderDecoder,)
HEAD = r"^head$"
TRANSFORMERS = True
inputs = reads_two
_ACTIVATIONS = {"relu": "relu", "gelu_new": "gelu_tanh", "gelu": "gelu", "silu": "silu"}

_STYLE = Style(norm="rmsnorm", qkv_bias=False, out_bias=False, mlp_bias=False, scale=1.0, kernel_init="normal")
_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY),
    "d_model": ("width", WIDTH),
    "num_layers": ("depth", LAYERS),
    "num_decoder_layers": ("decoder_depth", LAYERS, None),
    "num_heads": ("heads", HEADS),
    "d_kv": ("style.head_dim", whole(1, 4096)),
    "d_ff": ("mlp_dim", HIDDEN),
    "relative_attention_num_buckets": ("relative_buckets", whole(4, 4096), 32),
    "relative_attention_max_distance": ("relative_distance", whole(2, 1 << 20), 128),
    "layer_norm_epsilon": ("style.epsilon", SHARE, 1e-6),
    "pad_token_id": ("pad_id", TOKEN, 0),
}
SCHEMA = {
    **kinds(_KEYS),
    "feed_forward_proj": WORD,
    "scale_decoder_outputs": FLAG,
    "tie_word_embeddings": FLAG,
    "is_encoder_decoder": only(True),
    "tie_encoder_decoder": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    kind, _, activation = config.get("feed_forward_proj", "relu").rpartition("-")
    if (kind, activation) == ("gated", "gelu"):
        activation = "gelu_new"  # as published: its gates have the approximation
    tied = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    activation = lookup(_ACTIVATIONS, activation, "feed_forward_proj")
    found = words(_KEYS, config, dataclasses.replace(_STYLE, activation=activation, gated=kind == "gated"))
    found["decoder_depth"] = found["decoder_depth"] or found["depth"]
    return target(EncoderDecoder, **found, tied=tied, scale_embedding=False, scale_head=tied, positions="relative")


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
    pad = model.pad_id if model.pad_id is not None else 0
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "is_encoder_decoder": True,
        **said(_KEYS, model),
        "d_kv": style.sizes(model.width, model.heads)[1],
        "feed_forward_proj": activation,
        "tie_word_embeddings": model.tied,
        "pad_token_id": pad,
        "decoder_start_token_id": pad,
    }


def table(model: EncoderDecoder) -> Table:
    """See ``Family``."""

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
            *attention(f"{theirs}.0.SelfAttention", f"{ours}.attention", "q k v o", bias=False),
        ]
        if side == "decoder":
            found += norm(f"{theirs}.1.layer_norm", f"{ours}.norm_cross", bias=False)
            found += attention(f"{theirs}.1.EncDecAttention", f"{ours}.cross_attention", "q k v o", bias=False)
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
