"""MTCNN, under the names of facenet-pytorch's state dicts, each behind its network: ``pnet.conv1.weight``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.mtcnn import HEADS, LAYERS, MTCNN
from bigbase_jax.pretrained.families import Shapes, picture
from bigbase_jax.pretrained.schema import only
from bigbase_jax.pretrained.table import Entry, Table, conv, dense

MODELS = (MTCNN,)
HEAD = r"(?!)"
TRANSFORMERS = False

SCHEMA = {"num_points": only(5)}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(MTCNN)


def to_config(model: MTCNN, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    return {"model_type": "mtcnn", "num_points": 5}


def table(model: MTCNN) -> Table:
    """See ``Family``."""
    entries: list[Entry] = []
    for kind, (layers, width) in LAYERS.items():
        for i in range(1, len(layers) + 1):
            entries += [
                *conv(f"{kind}.conv{i}", f"{kind}.conv{i}", bias=True),
                Entry(f"{kind}.prelu{i}.weight", f"{kind}.prelu{i}"),
            ]
        if width:
            name = f"dense{len(layers) + 1}"
            entries += dense(f"{kind}.{name}", f"{kind}.{name}")
            entries.append(Entry(f"{kind}.prelu{len(layers) + 1}.weight", f"{kind}.prelu{len(layers) + 1}"))
        for name, _ in HEADS[kind]:
            path = f"{kind}.{name}"
            entries += dense(path, path) if width else conv(path, path, bias=True)
    return Table(entries)


def inputs(model: MTCNN, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return picture(48, 48)
