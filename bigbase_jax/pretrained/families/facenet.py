"""FaceNet's Inception-ResNet v1, under the names of facenet-pytorch's state dicts (``config.json`` names it alone)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.inception_resnet import BRANCHES, REPEATS, STEM, InceptionResNetV1
from bigbase_jax.pretrained.families import Shapes, picture
from bigbase_jax.pretrained.schema import WIDTH
from bigbase_jax.pretrained.table import Entry, Table, batch_norm, conv, dense

MODELS = (InceptionResNetV1,)
HEAD = r"(?!)"
TRANSFORMERS = False

SCHEMA = {"embedding_size": WIDTH}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    return target(InceptionResNetV1, dim=config.get("embedding_size", 512))


def to_config(model: InceptionResNetV1, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    return {"model_type": "facenet", "embedding_size": model.dim}


def table(model: InceptionResNetV1) -> Table:
    """See ``Family``. The classes that it was trained on (``logits``) are of no use."""

    def unit(theirs: str, ours: str) -> list[Entry]:
        return [*conv(f"{theirs}.conv", f"{ours}.conv"), *batch_norm(f"{theirs}.bn", f"{ours}.bn")]

    def branches(kind: str, theirs: str, ours: str) -> list[Entry]:
        return [
            entry
            for b, branch in enumerate(BRANCHES[kind])
            for i in range(len(branch))
            for entry in (
                unit(f"{theirs}.branch{b}.{i}", f"{ours}.branch{b}_{i}")
                if len(branch) > 1
                else unit(f"{theirs}.branch{b}", f"{ours}.branch{b}")
            )
        ]

    entries = [entry for name, shape in STEM if shape for entry in unit(name, name)]
    blocks = [(f"repeat_{s}", f"repeat_{s}.{i}", f"repeat_{s}_{i}") for s, n in enumerate(REPEATS, 1) for i in range(n)]
    for kind, theirs, ours in (*blocks, ("repeat_3", "block8", "block8")):
        entries += [*branches(kind, theirs, ours), *conv(f"{theirs}.conv2d", f"{ours}.conv2d", bias=True)]
    for name in ("mixed_6a", "mixed_7a"):
        entries += branches(name, name, name)
    entries += [*dense("last_linear", "last_linear", bias=False), *batch_norm("last_bn", "last_bn")]
    return Table(entries, ignored=(r"\.num_batches_tracked$",), unread=(r"^logits\.",))


def inputs(model: InceptionResNetV1, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return picture(160, 160)
