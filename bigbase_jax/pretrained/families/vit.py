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
from bigbase_jax.pretrained.families import Shapes, classes, lookup, need, side
from bigbase_jax.pretrained.schema import CHANNELS, HIDDEN, LAYERS, SHARE, SIDE, WIDTH, WORD, heads_of, only
from bigbase_jax.pretrained.table import Entry, Table, conv, dense, heads, joined, norm, repeat
from bigbase_jax.pretrained.weights import Weights

MODELS = (ViT,)
HEAD = r"^head\."
TRANSFORMERS = True
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
ACTIVATIONS |= {"silu": "silu", "tanh": "tanh"}

SCHEMA = {
    "image_size": SIDE,
    "num_channels": CHANNELS,
    "patch_size": SIDE,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": heads_of("hidden_size"),
    "intermediate_size": HIDDEN,
    "layer_norm_eps": SHARE,
    "hidden_act": WORD,
    "qkv_bias": only(True),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(
        ViT,
        num_classes=classes(config),
        patch=side(config.get("patch_size", 16), "patch_size"),
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        style=Style(
            epsilon=config.get("layer_norm_eps", 1e-12),
            activation=lookup(ACTIVATIONS, config.get("hidden_act", "gelu"), "hidden_act"),
        ),
    )


def to_config(model: ViT, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.pool == "cls" and model.positions == "learned", "transformers' ViT has pool='cls', positions='learned'.")
    usual = model.patch_bias and not model.pre_norm and model.head == "dense"
    need(usual, "transformers' ViT has biases in its embedding and its head, and no norm before its blocks.")
    plain = Style(epsilon=model.style.epsilon, activation=model.style.activation, kernel_init=model.style.kernel_init)
    need(model.style == plain, "transformers' ViT has LayerNorm before each branch, biases everywhere, and no gates.")
    patches = shapes["params.position"][1] - 1
    need(math.isqrt(patches) ** 2 == patches, f"transformers' ViT reads square pictures, not {patches} patches.")
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "image_size": math.isqrt(patches) * model.patch,
        "num_channels": shapes["params.embedding.kernel"][2],
        "patch_size": model.patch,
        "hidden_size": model.size.width,
        "num_hidden_layers": model.size.depth,
        "num_attention_heads": model.size.heads,
        "intermediate_size": model.mlp_dim or 4 * model.size.width,
        "hidden_act": lookup(theirs, model.style.activation, "activation"),
        "layer_norm_eps": model.style.epsilon,
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
        *(
            entry
            for name in ("query", "key", "value")
            for entry in heads(f"{theirs}.attention.attention.{name}", f"{ours}.attention.{name}")
        ),
        *joined(f"{theirs}.attention.output.dense", f"{ours}.attention.out"),
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
    return (jax.ShapeDtypeStruct((1, height, width, config.get("num_channels", 3)), jnp.float32),)
