"""YOLOS (Fang et al. 2021), as ``YolosForObjectDetection`` of transformers stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.yolos import YOLOS
from bigbase_jax.pretrained.families import Shapes, classes, is_plain, need, picture, said, side, vit, words
from bigbase_jax.pretrained.families.detr import prediction_head
from bigbase_jax.pretrained.schema import FLAG, whole
from bigbase_jax.pretrained.table import Entry, Table, conv, norm

MODELS = (YOLOS,)
HEAD = r"^(head|box_head)\."
TRANSFORMERS = True

SCHEMA = {**vit.SCHEMA, "num_detection_tokens": whole(1, 1 << 14), "use_mid_position_embeddings": FLAG}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    patch, size = side(config.get("patch_size", 16), "patch_size"), config.get("image_size", [512, 864])
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < patch:
        raise UserError(f"config.json has image_size={size}, which holds no patch of {patch}x{patch}.")
    return target(
        YOLOS,
        num_classes=classes(config),
        patch=patch,
        grid=(height // patch, width // patch),
        queries=config.get("num_detection_tokens", 100),
        mid_positions=config.get("use_mid_position_embeddings", True) and config["num_hidden_layers"] > 1,
        **words(vit.KEYS, config, Style(), vit.ACTIVATIONS),
    )


def to_config(model: YOLOS, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    plain = is_plain(model.style)
    need(plain, "transformers' YOLOS has LayerNorm before each branch, biases everywhere, and no gates.")
    return {
        "model_type": "yolos",
        "architectures": ["YolosForObjectDetection"],
        "image_size": [n * model.patch for n in model.grid],
        "num_channels": shapes["params.embedding.kernel"][2],
        "patch_size": model.patch,
        **said(vit.KEYS, model, vit.ACTIVATIONS),
        "qkv_bias": True,
        "num_detection_tokens": model.queries,
        "use_mid_position_embeddings": model.mid_positions,
        "num_labels": shapes["params.head.layer_2.bias"][0] - 1,
    }


def table(model: YOLOS) -> Table:
    """See ``Family``."""
    middle = Entry("vit.encoder.mid_position_embeddings", "mid_position", "n () l d -> n l d")
    return Table(
        entries=[
            Entry("vit.embeddings.cls_token", "cls"),
            Entry("vit.embeddings.detection_tokens", "tokens"),
            Entry("vit.embeddings.position_embeddings", "position"),
            *([middle] if model.mid_positions else []),
            *conv("vit.embeddings.patch_embeddings.projection", "embedding", bias=True),
            *vit.blocks(model.depth, "block_{i}"),
            *norm("vit.layernorm", "norm"),
            *prediction_head("class_labels_classifier", "head"),
            *prediction_head("bbox_predictor", "box_head"),
        ],
        sizes={"h": model.heads},
        prefix="vit.",
        unread=(r"^vit\.pooler\.",),
    )


def inputs(model: YOLOS, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return picture(2 * model.patch, 2 * model.patch, config.get("num_channels", 3))
