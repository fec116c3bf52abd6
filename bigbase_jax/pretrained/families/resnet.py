"""ResNet (He et al. 2015), as ``ResNetForImageClassification`` and ``ResNetModel`` of transformers store it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.resnet import LAYOUTS, ResNet
from bigbase_jax.pretrained.families import Shapes, classes, expect, need, picture
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


def layout(config: Mapping[str, Any]) -> dict[str, Any]:
    """``depth`` and ``width`` of a ResNet; raises UserError where ours has no such stages."""
    kind, depths = config.get("layer_type", "bottleneck"), tuple(config.get("depths", (3, 4, 6, 3)))
    found = {(_KINDS[bottleneck], counts): depth for depth, (bottleneck, counts) in LAYOUTS.items()}
    if (kind, depths) not in found:
        raise UserError(
            f"config.json has {kind} layers in stages of {list(depths)}; known here are "
            + ", ".join(f"{k} {list(counts)}" for k, counts in found)
            + "."
        )
    width, expansion = config["embedding_size"], 1 if kind == "basic" else 4
    expect(config, hidden_sizes=[width * expansion * 2**stage for stage in range(4)])
    return {"depth": found[kind, depths], "width": width}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(ResNet, num_classes=classes(config), **layout(config))


def about(model: ResNet, shapes: Shapes, prefix: str = "params.") -> dict[str, Any]:
    """What a ``config.json`` says of the network itself; ``prefix``: of its paths."""
    need(model.stem == "imagenet", f"transformers' ResNet has the stem 'imagenet', not {model.stem!r}.")
    return stages(model, shapes[f"{prefix}conv1.kernel"][2]) | {"model_type": "resnet"}


def stages(model: ResNet, channels: int) -> dict[str, Any]:
    """The widths and depths of a ResNet that reads so many channels, as transformers says them."""
    bottleneck, counts = LAYOUTS[model.depth]
    return {
        "num_channels": channels,
        "embedding_size": model.width,
        "hidden_sizes": [model.width * (4 if bottleneck else 1) * 2**stage for stage in range(4)],
        "depths": list(counts),
        "layer_type": _KINDS[bottleneck],
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def to_config(model: ResNet, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    head = {"architectures": ["ResNetForImageClassification"], "num_labels": shapes["params.fc.bias"][0]}
    return about(model, shapes) | head


def backbone(model: ResNet, theirs: str, ours: str = "", timm: str = "") -> list[Entry]:
    """All but the classifier of a ResNet; ``timm``: the path under which timm's and torchvision's names may be."""
    bottleneck, counts = LAYOUTS[model.depth]
    deep = model.stem == "deep"
    entries: list[Entry] = []
    ours = f"{ours}." if ours else ""

    def unit(there: str, conv_name: str, norm_name: str) -> None:
        found = [
            *conv(f"{theirs}.{there}.convolution", f"{ours}{conv_name}"),
            *batch_norm(f"{theirs}.{there}.normalization", f"{ours}{norm_name}"),
        ]
        for entry, here in zip(found, [conv_name, *4 * [norm_name]], strict=True):
            name = re.sub(r"^(layer\d)_", r"\1.", here).replace("downsample_", "downsample.")
            also = (f"{timm}.{name}.{entry.theirs.rpartition('.')[2]}",) if timm else ()
            entries.append(dataclasses.replace(entry, also=also))

    if deep:
        for i in range(2):
            unit(f"embedder.embedder.{i}", f"stem_conv{i}", f"stem_bn{i}")
    unit("embedder.embedder.2" if deep else "embedder.embedder", "conv1", "bn1")
    for stage, count in enumerate(counts):
        for i in range(count):
            there, here = f"encoder.stages.{stage}.layers.{i}", f"layer{stage + 1}_{i}"
            if i == 0 and (stage > 0 or bottleneck or deep):
                short = "shortcut.1" if deep and stage > 0 else "shortcut"
                unit(f"{there}.{short}", f"{here}.downsample_0", f"{here}.downsample_1")
            for n in range(3 if bottleneck else 2):
                unit(f"{there}.layer.{n}", f"{here}.conv{n + 1}", f"{here}.bn{n + 1}")
    return entries


def counters(entries: Iterable[Entry]) -> dict[str, np.ndarray]:
    """What torch stores beside each BatchNorm: the batches that it has seen."""
    norms = [entry.theirs for entry in entries if entry.theirs.endswith(".running_var")]
    return {name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64) for name in norms}


def table(model: ResNet) -> Table:
    """See ``Family``."""
    entries = backbone(model, "resnet")
    return Table([*entries, *dense("classifier.1", "fc")], prefix="resnet.", constants=counters(entries))


def inputs(model: ResNet, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return picture(64, 64, config.get("num_channels", 3))
