"""CLIP (Radford et al. 2021), as ``CLIPModel`` of transformers stores it. What SigLIP shares is here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.clip import CLIP
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.vit import ViT
from bigbase_jax.pretrained.families import SIZES, Keys, Shapes, is_plain, kinds, need, said, side, words
from bigbase_jax.pretrained.schema import CHANNELS, LENGTH, SHARE, SIDE, VOCABULARY, WIDTH, WORD, Schema
from bigbase_jax.pretrained.table import Entry, Table, attention, conv, dense, feed_forward, norm, repeat

MODELS = (CLIP,)
HEAD = r"(?!)"
TRANSFORMERS = True
ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_TOWER: Keys = {**SIZES, "hidden_act": ("style.activation", WORD), "layer_norm_eps": ("style.epsilon", SHARE)}
TEXT: Schema = {**kinds(_TOWER), "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}
VISION: Schema = {**kinds(_TOWER), "num_channels": CHANNELS, "image_size": SIDE, "patch_size": SIDE}
SCHEMA: Schema = {"text_config": TEXT, "vision_config": VISION, "projection_dim": WIDTH}
_TEXT: dict[str, Any] = {"vocab_size": 49_408, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
_TEXT |= {"num_hidden_layers": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
_VISION |= {"num_channels": 3, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    text, vision = {**_TEXT, **config.get("text_config", {})}, {**_VISION, **config.get("vision_config", {})}
    width = config.get("projection_dim", 512)
    picture = target(ViT, **picture_words(vision), num_classes=width, patch_bias=False, pre_norm=True, head="unbiased")
    return target(CLIP, picture=picture, text=target(Decoder, **text_words(text)), width=width, pool="last")


def to_config(model: CLIP, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    towers = towers_of(model, shapes, "CLIP")
    picture: Any = model.picture
    need(type(model.text) is Decoder, "CLIP's text tower is a Decoder.")
    need(picture.pool == "cls" and picture.pre_norm and not picture.patch_bias, "CLIP's pictures are pooled by 'cls'.")
    need(picture.head == "unbiased" and not model.text_bias, "CLIP's projections have no biases.")
    need(model.pool == "last" and model.bias is None, "CLIP reads the last token, and has no bias of scores.")
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": model.width, **towers}


def table(model: CLIP) -> Table:
    """See ``Family``."""
    return Table(
        entries=[
            *text_entries(model),
            Entry("vision_model.embeddings.class_embedding", "picture.cls", "d -> () () d"),
            *conv("vision_model.embeddings.patch_embedding", "picture.embedding"),
            Entry("vision_model.embeddings.position_embedding.weight", "picture.position", "l d -> () l d"),
            *norm("vision_model.pre_layrnorm", "picture.pre_norm"),
            *stack("vision_model", "picture", model.picture.size.depth),
            *norm("vision_model.post_layernorm", "picture.encoder.norm"),
            *dense("visual_projection", "picture.head", bias=False),
            *dense("text_projection", "text_projection", bias=False),
            Entry("logit_scale", "log_scale"),
        ],
        sizes=sizes(model),
        ignored=(r"\.position_ids$",),
    )


def inputs(model: CLIP, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return shapes_of({**_VISION, **config.get("vision_config", {})})


# ----------------------------------------------------------------------------------------------- what SigLIP has too


def sized(tower: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of a tower of ours, and its style."""
    return words(_TOWER, tower, Style(kernel_init="normal"), ACTIVATIONS)


def picture_words(vision: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a ``ViT``."""
    return {**sized(vision), "patch": side(vision["patch_size"], "patch_size")}


def text_words(text: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a ``Decoder``."""
    return {**sized(text), "vocab_size": text["vocab_size"], "length": text["max_position_embeddings"]}


def shapes_of(vision: Mapping[str, Any]) -> tuple[Any, ...]:
    """What ``CLIP`` takes: a picture, and a text."""
    height = width = vision["image_size"]
    if not isinstance(height, int):
        height, width = height
    words = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.ShapeDtypeStruct((1, height, width, vision["num_channels"]), jnp.float32), words, words


def towers_of(model: CLIP, shapes: Shapes, whose: str) -> dict[str, Any]:
    """``text_config`` and ``vision_config``; raises UserError where transformers has no such towers."""
    picture, text = model.picture, model.text
    if not isinstance(picture, ViT) or not isinstance(text, Decoder):
        kinds = f"{type(picture).__name__} and {type(text).__name__}"
        need(False, f"{whose}'s towers are a ViT and a transformer of texts, not {kinds}.")
        raise AssertionError
    need(picture.positions == text.positions == "learned" and text.tied, f"{whose}'s positions are learned.")
    usual = is_plain(picture.style) and is_plain(text.style)
    need(usual, f"{whose} has LayerNorm before each branch, biases everywhere, and no gates.")
    patches = shapes["params.picture.position"][1] - (picture.pool == "cls")
    need(math.isqrt(patches) ** 2 == patches, f"{whose} reads square pictures, not {patches} patches.")
    vocabulary, length = shapes["params.text.embedding"][0], shapes["params.text.position"][0]
    return {
        "text_config": {**said(_TOWER, text, ACTIVATIONS), "vocab_size": vocabulary, "max_position_embeddings": length},
        "vision_config": {
            **said(_TOWER, picture, ACTIVATIONS),
            "num_channels": shapes["params.picture.embedding.kernel"][2],
            "image_size": math.isqrt(patches) * picture.patch,
            "patch_size": picture.patch,
        },
    }


def stack(theirs: str, ours: str, depth: int) -> list[Entry]:
    """The blocks of a tower, whose heads are "g" in texts and "h" in pictures."""
    letter = "h" if ours == "picture" else "g"
    theirs, ours = f"{theirs}.encoder.layers.{{i}}", f"{ours}.encoder.block_{{i}}"
    block = [
        *attention(f"{theirs}.self_attn", f"{ours}.attention", letter=letter),
        *norm(f"{theirs}.layer_norm1", f"{ours}.norm1"),
        *norm(f"{theirs}.layer_norm2", f"{ours}.norm2"),
        *feed_forward(f"{theirs}.mlp", ours),
    ]
    return repeat(depth, block)


def text_entries(model: CLIP) -> list[Entry]:
    """Of the text tower, but for its projection."""
    return [
        Entry("text_model.embeddings.token_embedding.weight", "text.embedding"),
        Entry("text_model.embeddings.position_embedding.weight", "text.position"),
        *stack("text_model", "text", model.text.depth),
        *norm("text_model.final_layer_norm", "text.encoder.norm"),
    ]


def sizes(model: CLIP) -> dict[str, int]:
    """Heads of either tower, and what SigLIP joins of one."""
    return {"h": model.picture.size.heads, "g": model.text.heads, "n": 3}
