"""DETR (Carion et al. 2020), as ``DetrForObjectDetection`` of transformers stores it: with a ResNet of its own names,
or of timm's, as most published folders have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.detr import DETR
from bigbase_jax.models.resnet import LAYOUTS, ResNet
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import (
    ENCODER_DECODER,
    Keys,
    Shapes,
    classes,
    is_plain,
    kinds,
    need,
    picture,
    resnet,
    said,
    words,
)
from bigbase_jax.pretrained.schema import CHANNELS, FLAG, WORD, only, whole
from bigbase_jax.pretrained.table import Entry, Table, dense, fairseq_block, norm, repeat

MODELS = (DETR,)
HEAD = r"^(head|box_head)\."
TRANSFORMERS = True
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu"}
_BACKBONE = "model.backbone.conv_encoder.model"
_TIMM = {f"resnet{depth}": depth for depth in LAYOUTS}

_USUAL = (256, 6, 6, 8, 8, 2048, 2048)
_KEYS: Keys = {
    **{name: (*key, usual) for (name, key), usual in zip(ENCODER_DECODER.items(), _USUAL, strict=True)},
    "num_queries": ("queries", whole(1, 1 << 14), 100),
    "activation_function": ("style.activation", WORD, "relu"),
}
SCHEMA = {
    **kinds(_KEYS),
    "num_channels": CHANNELS,
    "position_embedding_type": only("sine"),
    "dilation": only(False),
    "use_timm_backbone": FLAG,
    "backbone": WORD,
    "backbone_config": {"model_type": WORD, "backbone": WORD, **resnet.SCHEMA},
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(
        DETR,
        num_classes=classes(config),
        backbone=_backbone(config),
        **words(_KEYS, config, Style(epsilon=1e-5, post_norm=True), ACTIVATIONS),
    )


def _backbone(config: Mapping[str, Any]) -> ConfigDict:
    inner = config.get("backbone_config") or {}
    if inner.get("model_type") == "resnet":
        return target(ResNet, **resnet.layout(inner), frozen=True)
    name = inner.get("backbone") or config.get("backbone", "resnet50")
    if inner.get("model_type", "timm_backbone") != "timm_backbone" or name not in _TIMM:
        raise UserError(
            f"config.json has the backbone {inner.get('model_type', name)!r}; known here are resnet and, of timm,"
            f" {', '.join(_TIMM)}."
        )
    return target(ResNet, depth=_TIMM[name], frozen=True)


def to_config(model: DETR, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    backbone = model.backbone
    need(isinstance(backbone, ResNet) and backbone.frozen, "transformers' DETR has a ResNet whose BatchNorm is frozen.")
    assert isinstance(backbone, ResNet)
    plain = is_plain(model.style, epsilon=1e-5, post_norm=True)
    need(plain, "transformers' DETR has LayerNorm (epsilon=1e-5) after each branch, and no gates.")
    return {
        "model_type": "detr",
        "architectures": ["DetrForObjectDetection"],
        "use_timm_backbone": False,
        "backbone_config": {**resnet.about(backbone, shapes, "params.backbone."), "out_features": ["stage4"]},
        "num_channels": shapes["params.backbone.conv1.kernel"][2],
        **said(_KEYS, model, ACTIVATIONS),
        "num_labels": shapes["params.head.bias"][0] - 1,
    }


def prediction_head(theirs: str, ours: str, depth: int = 3) -> list[Entry]:
    """A ``models.detr.PredictionHead``."""
    return repeat(depth, dense(f"{theirs}.layers.{{n}}", f"{ours}.layer_{{n}}"), "n")


def table(model: DETR) -> Table:
    """See ``Family``."""
    depth = model.decoder_depth or model.depth
    backbone: Any = model.backbone
    return Table(
        entries=[
            *resnet.backbone(backbone, _BACKBONE, "backbone", timm=_BACKBONE),
            *dense("model.input_projection", "projection", arrange="o i () () -> i o"),
            Entry("model.query_position_embeddings.weight", "queries"),
            *repeat(model.depth, fairseq_block("model.encoder.layers.{i}", "encoder.block_{i}")),
            *repeat(depth, fairseq_block("model.decoder.layers.{i}", "decoder_{i}", cross=True, letter="g")),
            *norm("model.decoder.layernorm", "decoder_norm"),
            *dense("class_labels_classifier", "head"),
            *prediction_head("bbox_predictor", "box_head"),
        ],
        sizes={"h": model.heads, "g": model.decoder_heads or model.heads},
        prefix="model.",
        ignored=(r"\.num_batches_tracked$",),
    )


def inputs(model: DETR, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return picture(64, 64, config.get("num_channels", 3))
