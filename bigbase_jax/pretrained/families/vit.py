"""The vision transformer (Dosovitskiy et al. 2021), as ``ViTForImageClassification`` and ``ViTModel`` of transformers
store it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.vit import ViT
from bigbase_jax.pretrained.families import Shapes, classes, expect, lookup, need, side
from bigbase_jax.pretrained.table import Entry, Table, conv, dense, heads, joined, norm, repeat

MODELS = (ViT,)
HEAD = r"^head\."
TRANSFORMERS = True
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
_ACTIVATIONS |= {"silu": "silu", "tanh": "tanh"}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    expect(config, qkv_bias=True)
    return target(
        ViT,
        num_classes=classes(config),
        patch=side(config.get("patch_size", 16), "patch_size"),
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        epsilon=config.get("layer_norm_eps", 1e-12),
        activation=lookup(_ACTIVATIONS, config.get("hidden_act", "gelu"), "hidden_act"),
    )


def to_config(model: ViT, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.pool == "cls" and model.positions == "learned", "transformers' ViT has pool='cls', positions='learned'.")
    patches = shapes["params.position"][1] - 1
    need(math.isqrt(patches) ** 2 == patches, f"transformers' ViT reads square pictures, not {patches} patches.")
    theirs = {ours: name for name, ours in reversed(_ACTIVATIONS.items())}
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
        "hidden_act": lookup(theirs, model.activation, "activation"),
        "layer_norm_eps": model.epsilon,
        "qkv_bias": True,
        "num_labels": shapes["params.head.bias"][0],
    }


def table(model: ViT) -> Table:
    """See ``Family``."""
    theirs, ours = "vit.encoder.layer.{i}", "encoder.block_{i}"
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
    return Table(
        entries=[
            Entry("vit.embeddings.cls_token", "cls"),
            Entry("vit.embeddings.position_embeddings", "position"),
            *conv("vit.embeddings.patch_embeddings.projection", "embedding", bias=True),
            *repeat(model.size.depth, block),
            *norm("vit.layernorm", "encoder.norm"),
            *dense("classifier", "head"),
        ],
        sizes={"h": model.size.heads},
        prefix="vit.",
        unread=(r"^vit\.pooler\.",),
    )


def inputs(model: ViT, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    size = config.get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return (jax.ShapeDtypeStruct((1, height, width, config.get("num_channels", 3)), jnp.float32),)
