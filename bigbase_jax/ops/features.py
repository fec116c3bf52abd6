"""What is watched of a prediction: a few numbers of what the model read and of what it gave, which say nothing of their
contents; and the same of the run's own examples, to be held against them (``reference.npz``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.export.proof import data_of
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pretrained.files import read_npz
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.rundir import RunDir

FILE = "reference.npz"
EXAMPLES = 1000
"""Of a split, that the reference is made of."""
CLASS, CONFIDENCE = "output.class", "output.confidence"
_VALUES = 4096  # of an array that are looked at, evenly spread
_ENTRIES = 64  # of a vector that are watched one by one


def features(inputs: Mapping[str, Any], output: Mapping[str, Any]) -> dict[str, float]:
    """Of one example, as the model reads it, and what it gives: ``input.NAME...`` and ``output...``.

    A short vector is watched entry by entry, of tokens how many there are and how varied they are, and of anything else
    its mean, deviation, ends and roughness. Of what is given, the likeliest class and its probability, or else the
    mean and deviation of each array.
    """
    found: dict[str, float] = {}
    for name, value in inputs.items():
        x = np.asarray(value)
        if x.ndim == 1 and x.size <= _ENTRIES and np.issubdtype(x.dtype, np.floating):
            found |= {f"input.{name}.{i}": float(v) for i, v in enumerate(x)}
        elif np.issubdtype(x.dtype, np.signedinteger) or x.dtype == np.uint32:
            used = x[x > 0]
            found[f"input.{name}.length"] = float(used.size)
            found[f"input.{name}.distinct"] = len(np.unique(used)) / max(used.size, 1)
        elif np.issubdtype(x.dtype, np.number) and x.size:
            found |= {f"input.{name}.{key}": v for key, v in _shape_of(x).items()}
    scores = output.get("probabilities")
    if scores is not None and np.ndim(scores) == 1:
        return {**found, CLASS: float(np.argmax(scores)), CONFIDENCE: float(np.max(scores))}
    for name, value in output.items():
        x = np.asarray(value)
        if np.issubdtype(x.dtype, np.floating) and x.size:
            found |= {f"output.{name}.mean": float(x.mean()), f"output.{name}.deviation": float(x.std())}
    return found


def _shape_of(x: np.ndarray) -> dict[str, float]:
    some = x.reshape(-1)[:: max(1, x.size // _VALUES)].astype(np.float64)
    low, high = np.quantile(some, (0.05, 0.95))
    found = {"mean": float(some.mean()), "deviation": float(some.std()), "low": float(low), "high": float(high)}
    if x.ndim > 1 and x.shape[1] > 1:
        rows = x[:: max(1, x.size // _VALUES // 8)].astype(np.float64)
        found["roughness"] = float(np.abs(np.diff(rows, axis=1)).mean())
    return found


def reference(run: RunDir, predictor: Predictor | None = None) -> dict[str, np.ndarray]:
    """``features`` of a run's own examples, f32[N] each, kept in its folder: of what the model reads, those of the
    training split; of what it gives, those of the validation split (else test, else train), since it is surer of
    what it was trained on.

    Args:
      predictor: the run's; None: it is opened where there is no file.

    Raises:
      UserError: there is no file and no data to make it of, or the file is broken.
    """
    path = run.path / FILE
    if path.exists():
        try:
            found = read_npz(path, run.path)
        except UserError as error:
            raise UserError(f"{str(error).removesuffix('.')}; delete it, and it is made again.") from error
        if not found or any(x.ndim != 1 or not len(x) for x in found.values()):
            raise UserError(f"{path} holds no reference; delete it, and it is made again.")
        return {name: x.astype(np.float64) for name, x in found.items()}
    predictor = predictor or Predictor.open(run.path)
    data = data_of(predictor)
    if isinstance(data, str):
        raise UserError(f"{run.path} has no {FILE}, and its data is not there to make it of: {data}")
    held_out = next(name for name in ("val", "test", "train") if name in data.splits)
    found = {}
    for part, split in (("input", "train"), ("output", held_out)):
        rows: list[dict[str, float]] = []
        with data.eval_batches(split, limit=EXAMPLES) as batches:
            for batch in batches:
                arrays: Mapping[str, Any] = {name: batch[name] for name in predictor.task.inputs}
                if part == "output":
                    arrays = jax.device_get(predictor.program(predictor.variables, arrays))
                for i in np.flatnonzero(batch["mask"] > 0):
                    one = {name: x[i] for name, x in arrays.items()}
                    rows.append(features(one, {}) if part == "input" else features({}, one))
        found |= {name: np.array([row[name] for row in rows], np.float32) for name in rows[0]}
    try:
        run.write_npz(FILE, found)
    except UserError as error:  # of a folder that is only read
        say(f"the reference is not kept: {error}")
    return found
