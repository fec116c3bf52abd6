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
from bigbase_jax.pretrained.families import SIZES, Keys, Shapes, kinds, need, said, words
from bigbase_jax.pretrained.schema import FLAG, SHARE, TOKEN, VOCABULARY, WORD, listed, only, whole
from bigbase_jax.pretrained.table import Entry, Table, attention, dense, norm, repeat

MODELS = (Wav2Vec2,)
HEAD = r"^head"
TRANSFORMERS = True
_FEW = listed(whole(1, 4096), 1, 32)
_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY, 32),
    "pad_token_id": ("blank", TOKEN, 0),
    **SIZES,
    "hidden_act": ("style.activation", WORD, "gelu"),
    "layer_norm_eps": ("style.epsilon", SHARE, 1e-5),
    "conv_dim": ("channels", listed(whole(1, 1 << 16), 1, 32), Wav2Vec2.channels),
    "conv_kernel": ("kernels", _FEW, Wav2Vec2.kernels),
    "conv_stride": ("strides", _FEW, Wav2Vec2.strides),
    "conv_bias": ("conv_bias", FLAG, False),
    "feat_proj_layer_norm": ("project_norm", FLAG, True),
    "num_conv_pos_embeddings": ("position_taps", whole(2, 1 << 16), 128),
    "num_conv_pos_embedding_groups": ("position_groups", whole(1, 1 << 16), 16),
}
SCHEMA = {
    **kinds(_KEYS),
    "feat_extract_norm": only("group", "layer"),
    "feat_extract_activation": only("gelu"),
    "conv_pos_batch_norm": only(False),
    "do_stable_layer_norm": FLAG,
    "add_adapter": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(
        Wav2Vec2,
        **words(_KEYS, config, Style(post_norm=not config.get("do_stable_layer_norm", False), kernel_init="normal")),
        group_norm=config.get("feat_extract_norm", "group") == "group",
        hubert=config["model_type"] == "hubert",
    )


def to_config(model: Wav2Vec2, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    style = model.style
    plain = style.norm == "layernorm" and not style.qk_norm and not style.gated and style.scale is None
    need(plain and style.kv_heads in (None, model.heads), "wav2vec2 has LayerNorm, no gates, and no shared heads.")
    biased = style.qkv_bias and style.key_bias and style.out_bias and style.mlp_bias
    need(biased and style.head_dim in (None, model.width // model.heads), "wav2vec2 has biases, and heads of D / H.")
    need(model.project_norm or model.hubert, "wav2vec2 normalises what its convolutions give.")
    return {
        "model_type": "hubert" if model.hubert else "wav2vec2",
        "architectures": ["HubertForCTC" if model.hubert else "Wav2Vec2ForCTC"],
        **said(_KEYS, model),
        "feat_extract_norm": "group" if model.group_norm else "layer",
        "feat_extract_activation": "gelu",
        "num_feat_extract_layers": len(model.channels),
        "do_stable_layer_norm": not style.post_norm,
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
        *attention(f"{layer}.attention", f"{ours}.attention"),
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
