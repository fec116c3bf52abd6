"""DETR (Carion et al. 2020), as ``DetrForObjectDetection`` of transformers stores it: with a ResNet of its own names,
or of timm's, as most published folders have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.detr import DETR
from bigbase_jax.models.resnet import LAYOUTS, ResNet
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import Shapes, classes, lookup, need, resnet
from bigbase_jax.pretrained.schema import CHANNELS, ENCODER_DECODER, FLAG, WORD, only, whole
from bigbase_jax.pretrained.table import Entry, Table, dense, heads, joined, norm, repeat

MODELS = (DETR,)
HEAD = r"^(head|box_head)\."
TRANSFORMERS = True
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu"}
_BACKBONE = "model.backbone.conv_encoder.model"
_TIMM = {f"resnet{depth}": depth for depth in LAYOUTS}

SCHEMA = {
    **ENCODER_DECODER,
    "num_queries": whole(1, 1 << 14),
    "num_channels": CHANNELS,
    "activation_function": WORD,
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
        width=config.get("d_model", 256),
        depth=config.get("encoder_layers", 6),
        heads=config.get("encoder_attention_heads", 8),
        mlp_dim=config.get("encoder_ffn_dim", 2048),
        decoder_depth=config.get("decoder_layers", 6),
        decoder_heads=config.get("decoder_attention_heads", 8),
        decoder_mlp_dim=config.get("decoder_ffn_dim", 2048),
        queries=config.get("num_queries", 100),
        style=Style(
            epsilon=1e-5,
            post_norm=True,
            activation=lookup(_ACTIVATIONS, config.get("activation_function", "relu"), "activation_function"),
        ),
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
    style = Style(epsilon=1e-5, post_norm=True, activation=model.style.activation, kernel_init=model.style.kernel_init)
    need(model.style == style, "transformers' DETR has LayerNorm (epsilon=1e-5) after each branch, and no gates.")
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    return {
        "model_type": "detr",
        "architectures": ["DetrForObjectDetection"],
        "use_timm_backbone": False,
        "backbone_config": {**resnet.about(backbone, shapes, "params.backbone."), "out_features": ["stage4"]},
        "num_channels": shapes["params.backbone.conv1.kernel"][2],
        "d_model": model.width,
        "encoder_layers": model.depth,
        "decoder_layers": model.decoder_depth or model.depth,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": model.decoder_heads or model.heads,
        "encoder_ffn_dim": model.mlp_dim or 4 * model.width,
        "decoder_ffn_dim": model.decoder_mlp_dim or model.mlp_dim or 4 * model.width,
        "num_queries": model.queries,
        "activation_function": lookup(theirs, model.style.activation, "activation"),
        "num_labels": shapes["params.head.bias"][0] - 1,
    }


def attention(theirs: str, ours: str, letter: str = "h") -> list[Entry]:
    """That of detectors, whose projections are called as fairseq's."""
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    return [
        *(entry for a, b in names.items() for entry in heads(f"{theirs}.{a}", f"{ours}.{b}", letter=letter)),
        *joined(f"{theirs}.out_proj", f"{ours}.out", letter=letter),
    ]


def prediction_head(theirs: str, ours: str, depth: int = 3) -> list[Entry]:
    """A ``models.detr.PredictionHead``."""
    return repeat(depth, dense(f"{theirs}.layers.{{n}}", f"{ours}.layer_{{n}}"), "n")


def feed_forward(theirs: str, ours: str) -> list[Entry]:
    """The second half of a block, with its norm."""
    return [
        *dense(f"{theirs}.fc1", f"{ours}.mlp.up"),
        *dense(f"{theirs}.fc2", f"{ours}.mlp.down"),
        *norm(f"{theirs}.final_layer_norm", f"{ours}.norm2"),
    ]


def table(model: DETR) -> Table:
    """See ``Family``."""
    encoder, decoder = "model.encoder.layers.{i}", "model.decoder.layers.{i}"
    ours = "encoder.block_{i}"
    backbone: Any = model.backbone
    return Table(
        entries=[
            *resnet.backbone(backbone, _BACKBONE, "backbone", timm=_BACKBONE),
            *dense("model.input_projection", "projection", arrange="o i () () -> i o"),
            Entry("model.query_position_embeddings.weight", "queries"),
            *repeat(
                model.depth,
                [
                    *attention(f"{encoder}.self_attn", f"{ours}.attention"),
                    *norm(f"{encoder}.self_attn_layer_norm", f"{ours}.norm1"),
                    *feed_forward(encoder, ours),
                ],
            ),
            *repeat(
                model.decoder_depth or model.depth,
                [
                    *attention(f"{decoder}.self_attn", "decoder_{i}.attention", "g"),
                    *norm(f"{decoder}.self_attn_layer_norm", "decoder_{i}.norm1"),
                    *attention(f"{decoder}.encoder_attn", "decoder_{i}.cross_attention", "g"),
                    *norm(f"{decoder}.encoder_attn_layer_norm", "decoder_{i}.norm_cross"),
                    *feed_forward(decoder, "decoder_{i}"),
                ],
            ),
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
    return (jax.ShapeDtypeStruct((1, 64, 64, config.get("num_channels", 3)), jnp.float32),)
