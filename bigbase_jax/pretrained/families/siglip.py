"""SigLIP (Zhai et al. 2023), as ``SiglipModel`` of transformers stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.clip import CLIP, TextEncoder
from bigbase_jax.models.vit import ViT
from bigbase_jax.pretrained.families import Shapes, need
from bigbase_jax.pretrained.families.clip import (
    TEXT,
    VISION,
    picture_words,
    shapes_of,
    sizes,
    stack,
    text_entries,
    text_words,
    towers_of,
)
from bigbase_jax.pretrained.schema import WIDTH, Schema, only
from bigbase_jax.pretrained.table import Entry, Table, conv, dense, feed_forward, joined, norm

MODELS = (CLIP,)
HEAD = r"(?!)"
TRANSFORMERS = True
SCHEMA: Schema = {
    "text_config": {**TEXT, "projection_size": WIDTH},
    "vision_config": {**VISION, "vision_use_head": only(True)},
}
_TOWER: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
_TOWER |= {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_TEXT = {**_TOWER, "vocab_size": 32_000, "max_position_embeddings": 64}
_VISION = {**_TOWER, "num_channels": 3, "image_size": 224, "patch_size": 16}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    text, vision = {**_TEXT, **config.get("text_config", {})}, {**_VISION, **config.get("vision_config", {})}
    width = text.get("projection_size", text["hidden_size"])
    need(width == vision["hidden_size"], "config.json has towers whose vectors differ in width; SigLIP's are the same.")
    return target(
        CLIP,
        picture=target(ViT, **picture_words(vision), pool="map", head="none"),
        text=target(TextEncoder, **text_words(text)),
        width=width,
        pool="place",
        text_bias=True,
        padding=True,
        temperature=0.1,
        bias=-10.0,
    )


def to_config(model: CLIP, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    towers = towers_of(model, shapes, "SigLIP")
    picture: Any = model.picture
    need(type(model.text) is TextEncoder and model.padding, "SigLIP's text tower reads both ways, and padding.")
    need(picture.pool == "map" and picture.head == "none", "SigLIP's pictures are pooled by 'map', and not projected.")
    need(picture.patch_bias and not picture.pre_norm, "SigLIP's patches have biases, and no norm before the blocks.")
    need(model.text_bias and model.pool == "place", "SigLIP reads the last place, and projects it with biases.")
    need(model.bias is not None, "SigLIP has a bias of scores.")
    towers["text_config"]["projection_size"] = model.width
    return {"model_type": "siglip", "architectures": ["SiglipModel"], **towers}


def table(model: CLIP) -> Table:
    """See ``Family``."""
    head, ours = "vision_model.head", "picture.map"
    names = ("query", "key", "value")
    kernels, biases = (tuple(f"{ours}.attention.{name}.{kind}" for name in names) for kind in ("kernel", "bias"))
    return Table(
        entries=[
            *text_entries(model),
            *dense("text_model.head", "text_projection"),
            *conv("vision_model.embeddings.patch_embedding", "picture.embedding", bias=True),
            Entry("vision_model.embeddings.position_embedding.weight", "picture.position", "l d -> () l d"),
            *stack("vision_model", "picture", model.picture.size.depth),
            *norm("vision_model.post_layernorm", "picture.encoder.norm"),
            Entry(f"{head}.probe", f"{ours}.probe"),
            Entry(f"{head}.attention.in_proj_weight", kernels, "(n h k) d -> n d h k"),
            Entry(f"{head}.attention.in_proj_bias", biases, "(n h k) -> n h k"),
            *joined(f"{head}.attention.out_proj", f"{ours}.attention.out"),
            *norm(f"{head}.layernorm", f"{ours}.norm"),
            *feed_forward(f"{head}.mlp", ours),
            Entry("logit_scale", "log_scale", "() -> "),
            Entry("logit_bias", "score_bias", "() -> "),
        ],
        sizes=sizes(model),
        ignored=(r"\.position_ids$",),
    )


def inputs(model: CLIP, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return shapes_of({**_VISION, **config.get("vision_config", {})})
