"""Families of published models: which of them ``config.json`` means, and which can hold a model of ours.

Each is a module of this folder that has what ``Family`` lists. To add one: write the module, and add its model types
below.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.schema import (
    HIDDEN,
    LABELS,
    LAYERS,
    TOKEN,
    WIDTH,
    WORD,
    Schema,
    either,
    heads_of,
    listed,
    number,
    whole,
)
from bigbase_jax.pretrained.table import Table
from bigbase_jax.pretrained.weights import Weights

FAMILIES: Mapping[str, str] = {
    "bert": "bert",
    "camembert": "bert",
    "clip": "clip",
    "detr": "detr",
    "facenet": "facenet",
    "gpt2": "gpt2",
    "hubert": "wav2vec2",
    "llama": "llama",
    "marian": "marian",
    "ministral": "llama",
    "mistral": "llama",
    "mtcnn": "mtcnn",
    "qwen2": "llama",
    "qwen3": "llama",
    "resnet": "resnet",
    "resnet_cifar": "resnet_cifar",
    "roberta": "bert",
    "rt_detr": "rt_detr",
    "siglip": "siglip",
    "t5": "t5",
    "vit": "vit",
    "vits": "vits",
    "wav2vec2": "wav2vec2",
    "whisper": "whisper",
    "xlm-roberta": "bert",
    "yolos": "yolos",
}
"""``model_type`` of a ``config.json`` -> module of this folder."""
GENERATION: Schema = {
    "eos_token_id": either(TOKEN, listed(TOKEN, 0, 256)),
    "decoder_start_token_id": TOKEN,
    "max_length": whole(2, (1 << 31) - 1),
    "num_beams": whole(1, 1024),
    "length_penalty": number(-100, 100),
}
"""What is read of a ``generation_config.json``, and of a ``config.json`` that says it too."""
COMMON: Schema = {
    "model_type": WORD,
    "architectures": listed(WORD, 0, 64),
    "num_labels": whole(1, 1 << 17),
    "id2label": LABELS,
    "problem_type": WORD,
    **GENERATION,
}
"""What is read of the ``config.json`` of any family."""
Keys = Mapping[str, tuple[Any, ...]]
"""Key of a ``config.json`` -> (the argument of our model that says it, "style.": of its style; what it may be; what it
is where it is not said, unless it must be)."""
SIZES: Keys = {
    "hidden_size": ("width", WIDTH),
    "num_hidden_layers": ("depth", LAYERS),
    "num_attention_heads": ("heads", heads_of("hidden_size")),
    "intermediate_size": ("mlp_dim", HIDDEN),
}
"""Of most transformers."""
ENCODER_DECODER: Keys = {
    "d_model": ("width", WIDTH),
    "encoder_layers": ("depth", LAYERS),
    "decoder_layers": ("decoder_depth", LAYERS),
    "encoder_attention_heads": ("heads", heads_of("d_model")),
    "decoder_attention_heads": ("decoder_heads", heads_of("d_model")),
    "encoder_ffn_dim": ("mlp_dim", HIDDEN),
    "decoder_ffn_dim": ("decoder_mlp_dim", HIDDEN),
}
"""Of an encoder and a decoder."""
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
"""What transformers and ``models.layers`` call them; where two are the same, the first is written."""
_AS_ENCODER = {"decoder_depth": "depth", "decoder_heads": "heads", "decoder_mlp_dim": "mlp_dim"}
Shapes = Mapping[str, tuple[int, ...]]
"""Of a model's variables by path (``params.encoder.block_0.norm1.scale``), stacks as their layers."""


class Family(Protocol):
    """What a family's module has; it may have ``adjust`` as well (see the function of this name).

    Attributes:
      MODELS: the classes of ours that it speaks of.
      HEAD: regex of the paths of parameters that a model may start with fresh, where the folder has none or others of
        another shape.
      SCHEMA: what is read of its ``config.json``, beside ``COMMON``.
      TRANSFORMERS: whether transformers has such models; False: the format is that of published torch state dicts.
    """

    MODELS: tuple[type[nn.Module], ...]
    HEAD: str
    SCHEMA: Schema
    TRANSFORMERS: bool

    def from_config(self, config: Mapping[str, Any]) -> ConfigDict:
        """The config node of our model; raises UserError for what ours cannot be."""
        ...

    def to_config(self, model: Any, shapes: Shapes) -> dict[str, Any]:
        """The ``config.json`` of a model of ours; raises UserError where the family has no such model."""
        ...

    def table(self, model: Any) -> Table:
        """Its tensors."""
        ...

    def inputs(self, model: Any, config: Mapping[str, Any]) -> tuple[Any, ...]:
        """Shapes (``jax.ShapeDtypeStruct``) of what ``model.init`` takes after the key."""
        ...


def load_family(name: str) -> Family:
    """The module of a family."""
    module: Any = importlib.import_module(f"{__name__}.{name}")
    return module


def families_of(model: nn.Module) -> list[Family]:
    """Those that speak of such models."""
    found = map(load_family, dict.fromkeys(FAMILIES.values()))
    return [family for family in found if type(model) in family.MODELS]


def family_of(config: Mapping[str, Any], where: Any) -> Family:
    """The family that a ``config.json`` names.

    Raises:
      UserError: there is none, or the weights are quantised.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"{where} holds a model of the type {kind!r}, of which there is no table.{suggest(kind, FAMILIES, 'type')}"
        )
    if config.get("quantization_config"):
        raise UserError(f"{where} holds quantised weights; take the model's unquantised ones.")
    return load_family(FAMILIES[kind])


def family_for(model: nn.Module, shapes: Shapes) -> tuple[Family, dict[str, Any]]:
    """The first family that has such a model, and the model's ``config.json``.

    Raises:
      UserError: none has; says why.
    """
    reasons = []
    for family in families_of(model):
        try:
            return family, family.to_config(model, shapes)
        except UserError as error:
            reasons.append(str(error))
    why = " ".join(reasons) or f"It is a {type(model).__name__}."
    raise UserError(f"transformers has no model of this kind. {why}")


def head_of(model: nn.Module) -> str:
    """``Family.HEAD`` of a model; of one that no family has, by the names that last layers have."""
    return next((family.HEAD for family in families_of(model)), r"^(head|fc|linear)(\.|$)")


def adjust(model: nn.Module, weights: Weights, spec: Mapping[str, Any], published: bool) -> str | None:
    """Makes weights fit inputs of another size than they were trained on, where the model's family knows how.

    Args:
      spec: shapes of a batch.
      published: whether the weights are a published folder's; else they are a run's.

    Returns:
      What was done, for people; None: nothing.
    """
    hooks = [getattr(family, "adjust", None) for family in families_of(model)]
    return next((hook(model, weights, spec, published) for hook in hooks if hook), None)


def expect(config: Mapping[str, Any], **values: Any) -> None:
    """
    Raises:
      UserError: a key of ``config.json`` has another value than the only one that our model can be; a missing key is
        taken to have it. A tuple lists several.
    """
    for key, value in values.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if key in config and config[key] not in allowed:
            one = " or ".join(repr(v) for v in allowed)
            raise UserError(f"config.json has {key}={config[key]!r}; only {one} is known here.")


def kinds(keys: Keys) -> Schema:
    """What is read, for ``Family.SCHEMA``."""
    return {name: key[1] for name, key in keys.items()}


def words(
    keys: Keys, config: Mapping[str, Any], style: Style | None = None, activations: Mapping[str, str] = ACTIVATIONS
) -> dict[str, Any]:
    """Arguments of our model, with those of the style in the place of ``style``'s.

    Raises:
      UserError: a key is not there, or an activation is not known.
    """
    found: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for name, (ours, _, *usual) in keys.items():
        value = config.get(name, usual[0]) if usual else config[name]
        if ours == "style.activation":
            value = lookup(activations, value, name)
        value = tuple(value) if isinstance(value, list) else value
        (own if ours.startswith("style.") else found)[ours.removeprefix("style.")] = value
    return found if style is None else {**found, "style": dataclasses.replace(style, **own)}


def said(keys: Keys, model: Any, activations: Mapping[str, str] = ACTIVATIONS) -> dict[str, Any]:
    """The inverse of ``words``; what a model leaves to its other sizes as it comes out."""
    theirs = {ours: name for name, ours in reversed([*activations.items()])}
    found = {}
    for name, (ours, *_) in keys.items():
        value = size_of(model, ours)
        value = lookup(theirs, value, "activation") if ours == "style.activation" else value
        found[name] = list(value) if isinstance(value, tuple) else value
    return found


def size_of(model: Any, name: str) -> Any:
    """An attribute of a model, or of its ``size`` or ``style``, or what stands for it where that is None."""
    owner = model.style if name.startswith("style.") else model
    name = name.removeprefix("style.")
    owner = model.size if hasattr(getattr(model, "size", None), name) else owner
    value = getattr(owner, name, None)
    if value is None and name in _AS_ENCODER:
        return size_of(model, _AS_ENCODER[name])
    return 4 * size_of(model, "width") if value is None and name == "mlp_dim" else value


def one_size(found: dict[str, Any]) -> dict[str, Any]:
    """``words`` of ``ENCODER_DECODER`` for a model whose encoder and decoder have the same heads and hidden layers.

    Raises:
      UserError: they do not.
    """
    for ours, key in (("heads", "attention_heads"), ("mlp_dim", "ffn_dim")):
        if found[ours] != found.pop(f"decoder_{ours}"):
            raise UserError(f"config.json has another {key} in its encoder than in its decoder; known here is one.")
    return found


def is_plain(style: Style, **words: Any) -> bool:
    """Whether it is the default one with these words, whatever its activation, epsilon and initialisation."""
    own = {name: getattr(style, name) for name in ("activation", "epsilon", "kernel_init")}
    return style == Style(**{**own, **words})


def reads_text(model: Any, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """``Family.inputs`` of what reads a text."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)


def reads_two(model: Any, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """``Family.inputs`` of what reads a text and its translation."""
    return reads_text(model, config) * 2


def picture(height: int, width: int, channels: int = 3) -> tuple[Any, ...]:
    """``Family.inputs`` of what reads pictures of this size."""
    return (jax.ShapeDtypeStruct((1, height, width, channels), jnp.float32),)


def classes(config: Mapping[str, Any]) -> int:
    """The width of a classifier's head; transformers' default is 2."""
    return config.get("num_labels") or len(config.get("id2label") or ()) or 2


def side(size: int | Sequence[int], key: str) -> int:
    """The side of a square, which some configs give twice; raises UserError if it is none."""
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise UserError(f"config.json has {key}={list(sides)}; only squares are known here.")
    return sides.pop()


def lookup(table: Mapping[str, Any], name: Any, key: str) -> Any:
    """``table[name]``; raises UserError, which says the key of ``config.json`` and what is known, if there is none."""
    if name not in table:
        raise UserError(f"{key} is {name!r}; known here are {', '.join(map(repr, table))}.")
    return table[name]


def need(condition: bool, otherwise: str) -> None:
    """
    Raises:
      UserError: the condition does not hold; for ``to_config``.
    """
    if not condition:
        raise UserError(otherwise)
