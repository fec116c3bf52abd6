"""ResNet (He et al. 2015), as ``ResNetForImageClassification`` and ``ResNetModel`` of transformers store it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.resnet import LAYOUTS, ResNet
from bigbase_jax.pretrained.families import Shapes, classes, expect, need
from bigbase_jax.pretrained.schema import CHANNELS, HIDDEN, WIDTH, WORD, listed, only, whole
from bigbase_jax.pretrained.table import Entry, Table, batch_norm, conv, dense

MODELS = (ResNet,)
HEAD = r"^fc\."
TRANSFORMERS = True
_KINDS = {False: "basic", True: "bottleneck"}

SCHEMA = {
    "num_channels": CHANNELS,
    "embedding_size": WIDTH,
    "hidden_sizes": listed(HIDDEN, 1, 64),
    "depths": listed(whole(1, 1024), 1, 64),
    "layer_type": WORD,
    "hidden_act": only("relu"),
    "downsample_in_first_stage": only(False),
    "downsample_in_bottleneck": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    kind, depths = config.get("layer_type", "bottleneck"), tuple(config["depths"])
    found = {(_KINDS[bottleneck], counts): depth for depth, (bottleneck, counts) in LAYOUTS.items()}
    if (kind, depths) not in found:
        raise UserError(
            f"config.json has {kind} layers in stages of {list(depths)}; known here are "
            + ", ".join(f"{k} {list(counts)}" for k, counts in found)
            + "."
        )
    width, expansion = config["embedding_size"], 1 if kind == "basic" else 4
    expect(config, hidden_sizes=[width * expansion * 2**stage for stage in range(4)])
    return target(ResNet, num_classes=classes(config), depth=found[kind, depths], width=width)


def to_config(model: ResNet, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    need(model.stem == "imagenet", f"transformers' ResNet has the stem 'imagenet', not {model.stem!r}.")
    bottleneck, counts = LAYOUTS[model.depth]
    return {
        "model_type": "resnet",
        "architectures": ["ResNetForImageClassification"],
        "num_channels": shapes["params.conv1.kernel"][2],
        "embedding_size": model.width,
        "hidden_sizes": [model.width * (4 if bottleneck else 1) * 2**stage for stage in range(4)],
        "depths": list(counts),
        "layer_type": _KINDS[bottleneck],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "num_labels": shapes["params.fc.bias"][0],
    }


def table(model: ResNet) -> Table:
    """See ``Family``."""
    bottleneck, counts = LAYOUTS[model.depth]
    entries: list[Entry] = []

    def unit(theirs: str, conv_name: str, norm_name: str) -> None:
        entries.extend(conv(f"{theirs}.convolution", conv_name))
        entries.extend(batch_norm(f"{theirs}.normalization", norm_name))

    unit("resnet.embedder.embedder", "conv1", "bn1")
    for stage, count in enumerate(counts):
        for i in range(count):
            theirs, ours = f"resnet.encoder.stages.{stage}.layers.{i}", f"layer{stage + 1}_{i}"
            if i == 0 and (stage > 0 or bottleneck):
                unit(f"{theirs}.shortcut", f"{ours}.downsample_0", f"{ours}.downsample_1")
            for n in range(3 if bottleneck else 2):
                unit(f"{theirs}.layer.{n}", f"{ours}.conv{n + 1}", f"{ours}.bn{n + 1}")
    norms = [entry.theirs for entry in entries if entry.theirs.endswith(".running_var")]
    return Table(
        [*entries, *dense("classifier.1", "fc")],
        prefix="resnet.",
        constants={name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64) for name in norms},
    )


def inputs(model: ResNet, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return (jax.ShapeDtypeStruct((1, 64, 64, config.get("num_channels", 3)), jnp.float32),)
