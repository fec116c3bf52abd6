"""wav2vec 2.0 and HuBERT for CTC, as transformers' ``Wav2Vec2ForCTC`` and ``HubertForCTC`` store them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.wav2vec2 import Wav2Vec2
from bigbase_jax.pretrained.families import Shapes, lookup, need
from bigbase_jax.pretrained.schema import (
    FLAG,
    HIDDEN,
    LAYERS,
    SHARE,
    TOKEN,
    VOCABULARY,
    WIDTH,
    WORD,
    heads_of,
    listed,
    only,
    whole,
)
from bigbase_jax.pretrained.table import Entry, Table, dense, heads, joined, norm, repeat

MODELS = (Wav2Vec2,)
HEAD = r"^head"
TRANSFORMERS = True
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
_CONVOLUTIONS = {name: listed(whole(1, most), 1, 32) for name, most in (("conv_dim", 1 << 16), ("conv_kernel", 4096))}
SCHEMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": heads_of("hidden_size"),
    "intermediate_size": HIDDEN,
    "hidden_act": WORD,
    "layer_norm_eps": SHARE,
    "feat_extract_norm": only("group", "layer"),
    "feat_extract_activation": only("gelu"),
    **_CONVOLUTIONS,
    "conv_stride": listed(whole(1, 4096), 1, 32),
    "conv_bias": FLAG,
    "num_conv_pos_embeddings": whole(2, 1 << 16),
    "num_conv_pos_embedding_groups": whole(1, 1 << 16),
    "conv_pos_batch_norm": only(False),
    "do_stable_layer_norm": FLAG,
    "feat_proj_layer_norm": FLAG,
    "add_adapter": only(False),
    "pad_token_id": TOKEN,
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(
        Wav2Vec2,
        vocab_size=config.get("vocab_size", 32),
        blank=config.get("pad_token_id", 0),
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        channels=tuple(config.get("conv_dim", Wav2Vec2.channels)),
        kernels=tuple(config.get("conv_kernel", Wav2Vec2.kernels)),
        strides=tuple(config.get("conv_stride", Wav2Vec2.strides)),
        conv_bias=config.get("conv_bias", False),
        group_norm=config.get("feat_extract_norm", "group") == "group",
        project_norm=config.get("feat_proj_layer_norm", True),
        position_taps=config.get("num_conv_pos_embeddings", 128),
        position_groups=config.get("num_conv_pos_embedding_groups", 16),
        hubert=config["model_type"] == "hubert",
        style=Style(
            epsilon=config.get("layer_norm_eps", 1e-5),
            post_norm=not config.get("do_stable_layer_norm", False),
            activation=lookup(_ACTIVATIONS, config.get("hidden_act", "gelu"), "hidden_act"),
            kernel_init="normal",
        ),
    )


def to_config(model: Wav2Vec2, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    style = model.style
    plain = style.norm == "layernorm" and not style.qk_norm and not style.gated and style.scale is None
    need(plain and style.kv_heads in (None, model.heads), "wav2vec2 has LayerNorm, no gates, and no shared heads.")
    biased = style.qkv_bias and style.key_bias and style.out_bias and style.mlp_bias
    need(biased and style.head_dim in (None, model.width // model.heads), "wav2vec2 has biases, and heads of D / H.")
    need(model.project_norm or model.hubert, "wav2vec2 normalises what its convolutions give.")
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    return {
        "model_type": "hubert" if model.hubert else "wav2vec2",
        "architectures": ["HubertForCTC" if model.hubert else "Wav2Vec2ForCTC"],
        "vocab_size": model.vocab_size,
        "pad_token_id": model.blank,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "intermediate_size": model.mlp_dim or 4 * model.width,
        "hidden_act": lookup(theirs, style.activation, "activation"),
        "layer_norm_eps": style.epsilon,
        "feat_extract_norm": "group" if model.group_norm else "layer",
        "feat_extract_activation": "gelu",
        "conv_dim": list(model.channels),
        "conv_kernel": list(model.kernels),
        "conv_stride": list(model.strides),
        "conv_bias": model.conv_bias,
        "num_feat_extract_layers": len(model.channels),
        "num_conv_pos_embeddings": model.position_taps,
        "num_conv_pos_embedding_groups": model.position_groups,
        "do_stable_layer_norm": not style.post_norm,
        "feat_proj_layer_norm": model.project_norm,
        "mask_time_prob": 0.0,  # or transformers would miss the vector that it masks with
        "mask_feature_prob": 0.0,
    }


def table(model: Wav2Vec2) -> Table:
    """See ``Family``."""
    top = "hubert" if model.hubert else "wav2vec2"
    convolutions, last = [], len(model.channels)
    for i in range(last):
        theirs = f"{top}.feature_extractor.conv_layers.{i}"
        convolutions += dense(f"{theirs}.conv", f"conv_{i}", model.conv_bias, "o i k -> k i o")
        if i == 0 or not model.group_norm:
            convolutions += norm(f"{theirs}.layer_norm", f"norm_{i}")
    projection = dense(f"{top}.feature_projection.projection", "project")
    if model.project_norm:
        projection += norm(f"{top}.feature_projection.layer_norm", "project_norm")
    layer, ours = f"{top}.encoder.layers.{{i}}", "encoder.block_{i}"
    block = [
        *heads(f"{layer}.attention.q_proj", f"{ours}.attention.query"),
        *heads(f"{layer}.attention.k_proj", f"{ours}.attention.key"),
        *heads(f"{layer}.attention.v_proj", f"{ours}.attention.value"),
        *joined(f"{layer}.attention.out_proj", f"{ours}.attention.out"),
        *norm(f"{layer}.layer_norm", f"{ours}.norm1"),
        *dense(f"{layer}.feed_forward.intermediate_dense", f"{ours}.mlp.up"),
        *dense(f"{layer}.feed_forward.output_dense", f"{ours}.mlp.down"),
        *norm(f"{layer}.final_layer_norm", f"{ours}.norm2"),
    ]
    places = f"{top}.encoder.pos_conv_embed.conv"
    weight = f"{places}.parametrizations.weight.original"
    return Table(
        entries=[
            *convolutions,
            *projection,
            Entry(f"{weight}0", "positions.length", "() () k -> k", also=(f"{places}.weight_g",)),
            Entry(f"{weight}1", "positions.direction", "o i k -> k i o", also=(f"{places}.weight_v",)),
            Entry(f"{places}.bias", "positions.bias"),
            *norm(f"{top}.encoder.layer_norm", "norm" if model.style.post_norm else "encoder.norm"),
            *repeat(model.depth, block),
            *dense("lm_head", "head"),
        ],
        sizes={"h": model.heads},
        prefix=f"{top}.",
        unread=(r"masked_spec_embed$",),
    )


def inputs(model: Wav2Vec2, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return jax.ShapeDtypeStruct((1, model.least), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
