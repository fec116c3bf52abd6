"""The vision transformer (Dosovitskiy et al. 2021), as ``ViTForImageClassification`` and ``ViTModel`` of transformers
store it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.vit import ViT, bicubic
from bigbase_jax.pretrained.families import (
    SIZES,
    Keys,
    Shapes,
    classes,
    is_plain,
    kinds,
    need,
    picture,
    said,
    side,
    words,
)
from bigbase_jax.pretrained.families.bert import ACTIVATIONS
from bigbase_jax.pretrained.schema import CHANNELS, SHARE, SIDE, WORD, only
from bigbase_jax.pretrained.table import Entry, Table, attention, conv, dense, norm, repeat
from bigbase_jax.pretrained.weights import Weights

MODELS = (ViT,)
HEAD = r"^head\."
TRANSFORMERS = True
KEYS: Keys = {
    **SIZES,
    "hidden_act": ("style.activation", WORD, "gelu"),
    "layer_norm_eps": ("style.epsilon", SHARE, 1e-12),
}
SCHEMA = {
    **kinds(KEYS),
    "image_size": SIDE,
    "num_channels": CHANNELS,
    "patch_size": SIDE,
    "qkv_bias": only(True),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    patch = side(config.get("patch_size", 16), "patch_size")
    return target(ViT, num_classes=classes(config), patch=patch, **words(KEYS, config, Style(), ACTIVATIONS))


def to_config(model: ViT, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.pool == "cls" and model.positions == "learned", "transformers' ViT has pool='cls', positions='learned'.")
    usual = model.patch_bias and not model.pre_norm and model.head == "dense"
    need(usual, "transformers' ViT has biases in its embedding and its head, and no norm before its blocks.")
    plain = is_plain(model.style)
    need(plain, "transformers' ViT has LayerNorm before each branch, biases everywhere, and no gates.")
    patches = shapes["params.position"][1] - 1
    need(math.isqrt(patches) ** 2 == patches, f"transformers' ViT reads square pictures, not {patches} patches.")
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": math.isqrt(patches) * model.patch,
        "num_channels": shapes["params.embedding.kernel"][2],
        "patch_size": model.patch,
        **said(KEYS, model, ACTIVATIONS),
        "qkv_bias": True,
        "num_labels": shapes["params.head.bias"][0],
    }


def table(model: ViT) -> Table:
    """See ``Family``."""
    return Table(
        entries=[
            Entry("vit.embeddings.cls_token", "cls"),
            Entry("vit.embeddings.position_embeddings", "position"),
            *conv("vit.embeddings.patch_embeddings.projection", "embedding", bias=True),
            *blocks(model.size.depth),
            *norm("vit.layernorm", "encoder.norm"),
            *dense("classifier", "head"),
        ],
        sizes={"h": model.size.heads},
        prefix="vit.",
        unread=(r"^vit\.pooler\.",),
    )


def blocks(depth: int, ours: str = "encoder.block_{i}") -> list[Entry]:
    """Those of a ViT's encoder."""
    theirs = "vit.encoder.layer.{i}"
    block = [
        *norm(f"{theirs}.layernorm_before", f"{ours}.norm1"),
        *attention(
            f"{theirs}.attention", f"{ours}.attention", "attention.query attention.key attention.value output.dense"
        ),
        *norm(f"{theirs}.layernorm_after", f"{ours}.norm2"),
        *dense(f"{theirs}.intermediate.dense", f"{ours}.mlp.up"),
        *dense(f"{theirs}.output.dense", f"{ours}.mlp.down"),
    ]
    return repeat(depth, block)


def adjust(model: ViT, weights: Weights, spec: Mapping[str, Any], published: bool) -> str | None:
    """See ``families.adjust``: resizes learned positions to the patches of pictures of another size.

    As ``interpolate_pos_encoding`` of transformers: bicubic, the first token's apart. Weights are taken for those of
    square pictures; where their number of patches is no square, or a run's is that of these pictures, nothing is done.
    """
    name, image = "params.position", spec.get("image")
    if model.positions != "learned" or name not in weights.arrays or image is None:
        return None
    position_1LD, tokens = weights.arrays[name].astype(np.float32), int(model.pool == "cls")
    patches, (height, width) = position_1LD.shape[1] - tokens, (size // model.patch for size in image.shape[1:3])
    side = math.isqrt(patches)
    same = (side, side) == (height, width) if published else patches == height * width
    if side**2 != patches or same or not height * width:
        return None
    xp: Any = jnp if isinstance(position_1LD, jax.Array) else np  # the former perhaps spread over processes
    grid_yxD = xp.reshape(position_1LD[0, tokens:], (side, side, -1))
    grid_hwD = xp.einsum("hy,wx,yxd->hwd", bicubic(side, height), bicubic(side, width), grid_yxD)
    resized_1LD = xp.concatenate([position_1LD[:, :tokens], xp.reshape(grid_hwD, (1, height * width, -1))], 1)
    weights.arrays = {**weights.arrays, name: resized_1LD}
    return f"positions of {side}x{side} patches are resized to {height}x{width}"


def inputs(model: ViT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    size = config.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return picture(height, width, config.get("num_channels", 3))
