"""Llama, Mistral, Ministral, Qwen2 and Qwen3, as their ``ForCausalLM`` classes of transformers store them.

One table serves all five: Qwen2 has biases of queries, keys and values, Qwen3 norms of each head's queries and keys,
and the queries of all but Llama may see a window, in all blocks (Mistral) or in some.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import LLAMA
from bigbase_jax.pretrained.families import SIZES, Keys, Shapes, kinds, lookup, need, reads_text, said, words
from bigbase_jax.pretrained.schema import (
    FLAG,
    HEADS,
    LENGTH,
    SHARE,
    VOCABULARY,
    WORD,
    heads_of,
    listed,
    number,
    only,
    whole,
)
from bigbase_jax.pretrained.table import Entry, Table, dense, heads, joined, norm, repeat

MODELS = (Decoder,)
HEAD = r"^head(\.|$)"  # of tokens, or of a task that reads what the model gives
TRANSFORMERS = True
inputs = reads_text
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_KINDS = ("full_attention", "sliding_attention")
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "ministral": "MinistralForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

_THETA = number(2, 1e15)
_ROPE = {
    "rope_type": WORD,
    "type": WORD,
    "rope_theta": _THETA,
    "factor": number(1e-3, 1e6),
    "original_max_position_embeddings": LENGTH,
    "low_freq_factor": number(0, 1e6),
    "high_freq_factor": number(0, 1e6),
    "beta_fast": number(1e-3, 1e6),
    "beta_slow": number(1e-3, 1e6),
    "attention_factor": number(1e-3, 1e6),
    "mscale": number(0, 1e6),
    "mscale_all_dim": number(0, 1e6),
    "truncate": FLAG,
}
_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY),
    "max_position_embeddings": ("length", LENGTH),
    **SIZES,
    "num_attention_heads": ("heads", HEADS),
    "hidden_act": ("style.activation", WORD, "silu"),
    "rms_norm_eps": ("style.epsilon", SHARE, 1e-6),
    "tie_word_embeddings": ("tied", FLAG, False),
}
SCHEMA = {
    **kinds(_KEYS),
    "num_key_value_heads": heads_of("num_attention_heads"),
    "head_dim": whole(1, 4096),
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "rope_theta": _THETA,
    "rope_scaling": _ROPE,
    "rope_parameters": _ROPE,
    "sliding_window": LENGTH,
    "use_sliding_window": FLAG,
    "max_window_layers": whole(0, 1 << 16),
    "layer_types": listed(WORD, 0, 1024),
    "pretraining_tp": only(1),
    "partial_rotary_factor": only(1.0, 1),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    kind = config["model_type"]
    bias = kind == "qwen2" or bool(config.get("attention_bias", False) and kind not in ("mistral", "ministral"))
    theta, scaling = _rope(config)
    window, windowed = _windows(config)
    found = words(_KEYS, config, LLAMA, _ACTIVATIONS)
    found["style"] = dataclasses.replace(
        found["style"],
        kv_heads=config.get("num_key_value_heads") or found["heads"],
        head_dim=config.get("head_dim") or (128 if kind == "qwen3" else found["width"] // found["heads"]),
        qkv_bias=bias,
        out_bias=bias and kind != "qwen2",
        mlp_bias=bool(config.get("mlp_bias", False)) and kind == "llama",
        qk_norm=kind == "qwen3",
        window=window,
        windowed=windowed,
        kernel_init="normal",
    )
    return target(Decoder, **found, positions="rope", rope_theta=theta, rope_scaling=scaling)


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) in both spellings: ``rope_theta`` with ``rope_scaling``, or ``rope_parameters``."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if rope["rope_type"] == "default":
        return float(theta), None
    rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return float(theta), rope


def _windows(config: Mapping[str, Any]) -> tuple[int | None, tuple[bool, ...] | None]:
    """(how many positions a query sees, in which blocks), as ``Style.window`` and ``windowed``.

    Raises:
      UserError: a block attends in another way, or there are not as many kinds as blocks.
    """
    family, depth, window = config["model_type"], config["num_hidden_layers"], config.get("sliding_window")
    qwen = family.startswith("qwen")
    if window is None or family == "llama" or (qwen and not config.get("use_sliding_window")):
        return None, None
    kinds = config.get("layer_types") or ["sliding_attention"] * depth
    if qwen and not config.get("layer_types"):
        kinds = [_KINDS[i >= config.get("max_window_layers", 28)] for i in range(depth)]
    for kind in kinds:
        lookup(dict.fromkeys(_KINDS), kind, "layer_types")
    if len(kinds) != depth:
        raise UserError(f"config.json has {len(kinds)} layer_types for num_hidden_layers={depth}.")
    windowed = tuple(kind == _KINDS[True] for kind in kinds)
    return (window if any(windowed) else None), (windowed if len(set(windowed)) > 1 else None)


def to_config(model: Decoder, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.positions == "rope", "Llama and its kin have rotary positions.")
    style = model.style
    need(style.norm == "rmsnorm" and style.gated, "Llama and its kin have RMSNorm and gates.")
    need(not style.post_norm and style.scale is None, "Llama normalises before each branch, and has the usual scale.")
    windows = style.windows(model.depth)
    window, mixed = next((w for w in windows if w is not None), None), len(set(windows)) > 1
    if style.qk_norm:
        kind = "qwen3"
    elif style.qkv_bias and not style.out_bias:
        kind = "qwen2"
    else:
        kind = "llama" if window is None or style.qkv_bias else "ministral" if mixed else "mistral"
    G, K = style.sizes(model.width, model.heads)
    need(kind == "qwen2" or style.qkv_bias == style.out_bias, "Llama has biases of all of attention, or of none.")
    need(kind == "llama" or not style.mlp_bias, f"{kind} has no biases in its feed-forward layers.")
    need(kind != "llama" or window is None, "Llama has no window.")
    need(kind != "qwen2" or model.width // model.heads == K, "Qwen2's heads are as wide as the model together.")
    config: dict[str, Any] = {
        "model_type": kind,
        "architectures": [_CLASSES[kind]],
        **said(_KEYS, model, _ACTIVATIONS),
        "num_key_value_heads": G,
        "head_dim": K,
        "rope_theta": model.rope_theta,
        "rope_scaling": dict(model.rope_scaling) if model.rope_scaling else None,
    }
    if kind == "llama":
        config |= {"attention_bias": style.qkv_bias, "mlp_bias": style.mlp_bias}
    elif kind in ("mistral", "ministral"):
        config |= {"sliding_window": window}
    else:
        first = next((i for i, w in enumerate(windows) if w is not None), model.depth)
        config |= {"use_sliding_window": first < model.depth, "sliding_window": window}
        config |= {"max_window_layers": first}
        config |= {"attention_bias": style.qkv_bias} if kind == "qwen3" else {}
    return config | ({"layer_types": [_KINDS[w is not None] for w in windows]} if mixed else {})


def table(model: Decoder) -> Table:
    """See ``Family``."""
    style, theirs, ours = model.style, "model.layers.{i}", "encoder.block_{i}"
    attention, mlp = f"{ours}.attention", f"{ours}.mlp"
    block = [
        *norm(f"{theirs}.input_layernorm", f"{ours}.norm1", bias=False),
        *heads(f"{theirs}.self_attn.q_proj", f"{attention}.query", style.qkv_bias),
        *heads(f"{theirs}.self_attn.k_proj", f"{attention}.key", style.qkv_bias, letter="g"),
        *heads(f"{theirs}.self_attn.v_proj", f"{attention}.value", style.qkv_bias, letter="g"),
        *joined(f"{theirs}.self_attn.o_proj", f"{attention}.out", style.out_bias),
        *norm(f"{theirs}.post_attention_layernorm", f"{ours}.norm2", bias=False),
        *dense(f"{theirs}.mlp.gate_proj", f"{mlp}.gate", style.mlp_bias),
        *dense(f"{theirs}.mlp.up_proj", f"{mlp}.up", style.mlp_bias),
        *dense(f"{theirs}.mlp.down_proj", f"{mlp}.down", style.mlp_bias),
    ]
    if style.qk_norm:
        block += norm(f"{theirs}.self_attn.q_norm", f"{attention}.query_norm", bias=False)
        block += norm(f"{theirs}.self_attn.k_norm", f"{attention}.key_norm", bias=False)
    head = ("lm_head.weight",)
    G, K = style.sizes(model.width, model.heads)
    return Table(
        entries=[
            Entry("model.embed_tokens.weight", "embedding", also=head if model.tied else ()),
            *repeat(model.depth, block),
            *norm("model.norm", "encoder.norm", bias=False),
            *([] if model.tied else [Entry(*head, "head", "v d -> d v")]),
        ],
        sizes={"h": model.heads, "g": G, "k": K},
        prefix="model.",
        ignored=(r"\.rotary_emb\.inv_freq$",),
    )
