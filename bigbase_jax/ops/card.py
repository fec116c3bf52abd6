"""The card of a version: what a registry says of a run or an export, from the files of its folder alone."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping
from typing import Any

from bigbase_jax.compare.numbers import finite
from bigbase_jax.compare.runs import SPLITS, Run
from bigbase_jax.core import UserError
from bigbase_jax.export import manifest, proof
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.runtime.untrusted import read_object

_PROVEN = ("stablehlo", "onnx")  # formats whose export proves itself
_CONDITION = re.compile(r"(?:(?P<split>\w+)\.)?(?P<metric>[\w/]+) *(?P<sign>>=|<=|>|<) *(?P<bound>[-+.\deE]+)")


def describe(folder: pathlib.Path) -> dict[str, Any]:
    """What is known of a run or an export, as plain data: ``kind`` ("run", or the format of an export), ``metrics``
    (split -> name -> number), ``data`` (with its fingerprint) and ``lineage``, ``proofs`` of it and of exports in it,
    and ``failed``: a sentence for each of them that does not hold.

    Raises:
      UserError: it is neither, is not whole, has no checkpoint, or was not evaluated.
    """
    if (folder / manifest.FILE).exists():
        about = manifest.read(folder, None)
        found: dict[str, Any] = {
            "kind": str(about["to"]),
            **{name: about.get(name) for name in ("metrics", "data", "lineage")},
        }
        proofs = {"": read_object(folder / proof.FILE)} if (folder / proof.FILE).exists() else {}
        if not isinstance(found["metrics"], dict):
            raise UserError(f"{folder} does not say how good its model is: an earlier version wrote it; export again.")
    else:
        run = RunDir(folder)
        run.config_json()
        if not run.begun:
            raise UserError(f"{folder} has no checkpoint, and so no model; let its training get to one.")
        looked = Run.look(folder)
        found, proofs = {"kind": "run", **manifest.trained(looked)}, looked.proofs
    if not any(found["metrics"].values()):
        raise UserError(f"the model in {folder} was not evaluated, so nobody can judge it; --mode=eval does it.")
    failed = [
        f"the proof{f' of export/{name}' if name else ''} {why}" for name, x in proofs.items() if (why := fails(x))
    ]
    if found["kind"] in _PROVEN and not proofs:
        failed.append(f"it has no {proof.FILE}")
    return {**found, "proofs": proofs, "failed": failed}


def fails(found: Mapping[str, Any]) -> str | None:
    """Why what a ``proof.json`` says does not show that a model is still itself; None: it does."""
    if missing := found.get("missing"):
        return f"compares nothing ({str(missing).removesuffix('.'):.200})"
    outputs = found.get("outputs")
    for name, x in outputs.items() if isinstance(outputs, dict) else ():
        if not isinstance(x, dict) or finite(x.get("largest")) is None:
            return f"has an output that is not finite ({name:.40})"
    allowed, same = finite(found.get("allow_drop")), finite(found.get("same_answers"))
    drop = finite(found.get("drop", None if same is None else 100 * (1 - same)))
    if allowed is not None and drop is not None and drop > allowed:
        return f"finds {drop:.3g} % worse, and {allowed:g} % was allowed"
    return None


def first_split(metrics: Mapping[str, Any]) -> str:
    """The split that counts where none is named: of those measured, the first of ``SPLITS``; "" if there is none."""
    return next((name for name in (*SPLITS, *metrics) if name in metrics), "")


def holds(condition: str, card: Mapping[str, Any]) -> bool:
    """Whether a version fulfils ``[SPLIT.]METRIC>=NUMBER`` (or <=, >, <); of no split, the first of ``SPLITS``.

    Raises:
      UserError: the condition is none, or the metric was not measured.
    """
    if not (parts := _CONDITION.fullmatch(condition.strip())):
        raise UserError(f"--require={condition} is no condition such as accuracy>=0.98 or val.loss<0.3.")
    metrics = card["metrics"]
    split = parts["split"] or first_split(metrics)
    value = finite(metrics.get(split, {}).get(parts["metric"]))
    if value is None:
        known = ", ".join(f"{split}.{name}" for split, found in metrics.items() for name in found)
        raise UserError(f"--require={condition}: there is no {split}.{parts['metric']}; it has {known}.")
    try:
        bound = float(parts["bound"])
    except ValueError as error:
        raise UserError(f"--require={condition}: {parts['bound']} is no number.") from error
    less, equal = parts["sign"][0] == "<", parts["sign"].endswith("=")
    return (value < bound if less else value > bound) or (equal and value == bound)
