"""The ResNets for CIFAR (He et al. 2015, section 4.2), under the names of the published state dicts of torch.

Those are dictionaries of arrays without a ``config.json``; ``config_of`` tells it from the arrays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.resnet import CifarResNet
from bigbase_jax.pretrained.families import Keys, Shapes, kinds, picture, said, words
from bigbase_jax.pretrained.schema import WIDTH, only, whole
from bigbase_jax.pretrained.table import Entry, Table, batch_norm, conv, dense, repeat

MODELS = (CifarResNet,)
HEAD = r"^linear\."
TRANSFORMERS = False


def config_of(arrays: Mapping[str, np.ndarray], where: str) -> dict[str, Any]:
    """What a ``config.json`` would say of these arrays.

    Raises:
      UserError: they are not those of a ResNet for CIFAR.
    """
    blocks = [m for name in arrays if (m := re.fullmatch(r"layer1\.(\d+)\.conv1\.weight", name))]
    if not blocks or "conv1.weight" not in arrays or "linear.weight" not in arrays:
        raise UserError(f"{where} is no state dict of a ResNet for CIFAR, the only kind known without config.json.")
    return {
        "model_type": "resnet_cifar",
        "depth": 6 * (1 + max(int(m[1]) for m in blocks)) + 2,
        "width": len(arrays["conv1.weight"]),
        "shortcut": "conv" if any(".shortcut." in name for name in arrays) else "pad",
        "num_labels": len(arrays["linear.weight"]),
    }


_KEYS: Keys = {
    "depth": ("depth", whole(8, 6 * 1024 + 2)),
    "width": ("width", WIDTH),
    "shortcut": ("shortcut", only("pad", "conv")),
}
SCHEMA = kinds(_KEYS)


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(CifarResNet, num_classes=config["num_labels"], **words(_KEYS, config))


def to_config(model: CifarResNet, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    return {"model_type": "resnet_cifar", **said(_KEYS, model), "num_labels": shapes["params.linear.bias"][0]}


def table(model: CifarResNet) -> Table:
    """See ``Family``."""
    entries: list[Entry] = [*conv("conv1", "conv1"), *batch_norm("bn1", "bn1")]
    for stage in (1, 2, 3):
        theirs, ours = f"layer{stage}.{{i}}", f"layer{stage}_{{i}}"
        block = [
            entry
            for n in (1, 2)
            for entry in (
                *conv(f"{theirs}.conv{n}", f"{ours}.conv{n}"),
                *batch_norm(f"{theirs}.bn{n}", f"{ours}.bn{n}"),
            )
        ]
        entries += repeat((model.depth - 2) // 6, block)
        if stage > 1 and model.shortcut == "conv":
            short = [*conv(f"{theirs}.shortcut.0", f"{ours}.downsample_0")]
            entries += repeat(1, [*short, *batch_norm(f"{theirs}.shortcut.1", f"{ours}.downsample_1")])
    return Table([*entries, *dense("linear", "linear")], ignored=(r"\.num_batches_tracked$",))


def inputs(model: CifarResNet, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return picture(32, 32)
