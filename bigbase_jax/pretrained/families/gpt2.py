"""GPT-2 (Radford et al. 2019), as ``GPT2LMHeadModel`` and ``GPT2Model`` of transformers store it.

Its linear layers are stored [in, out], and query, key and value are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import Keys, Shapes, kinds, need, reads_text, said, words
from bigbase_jax.pretrained.schema import FLAG, HIDDEN, LAYERS, LENGTH, SHARE, VOCABULARY, WIDTH, WORD, heads_of, only
from bigbase_jax.pretrained.table import Entry, Table, dense, norm, repeat

MODELS = (Decoder,)
HEAD = r"^head(\.|$)"  # of tokens, or of a task that reads what the model gives
TRANSFORMERS = True
inputs = reads_text
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu", "tanh": "tanh"}

_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY),
    "n_positions": ("length", LENGTH),
    "n_embd": ("width", WIDTH),
    "n_layer": ("depth", LAYERS),
    "n_head": ("heads", heads_of("n_embd")),
    "n_inner": ("mlp_dim", HIDDEN, None),
    "activation_function": ("style.activation", WORD, "gelu_new"),
    "layer_norm_epsilon": ("style.epsilon", SHARE, 1e-5),
    "tie_word_embeddings": ("tied", FLAG, True),
}
SCHEMA = {
    **kinds(_KEYS),
    "scale_attn_weights": only(True),
    "scale_attn_by_inverse_layer_idx": only(False),
    "add_cross_attention": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    found = words(_KEYS, config, Style(kernel_init="normal"), _ACTIVATIONS)
    return target(Decoder, **{**found, "mlp_dim": found["mlp_dim"] or 4 * found["width"]})


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
    return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **said(_KEYS, model, _ACTIVATIONS)}


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
