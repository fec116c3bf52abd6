"""Structured pruning: fewer heads, hidden units, channels or layers, and so smaller arrays and less to compute.

``units`` says what belongs together, ``measured`` what the training data makes of a model; here units are scored, and
those that stay are cut out.

Axes: N units of a group.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

from bigbase_jax.build import suggest, target
from bigbase_jax.compress.compressed import Batches, Compressed, Unrolled
from bigbase_jax.compress.measured import layer_means, products
from bigbase_jax.compress.units import LAYERS, Row, rows_of
from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.transformer import stack_blocks, unstack_blocks
from bigbase_jax.pretrained.start import model_of
from bigbase_jax.runtime.log import say

SCORES = ("magnitude", "taylor", "activation")
Arrays = dict[str, np.ndarray]


class _Lies(NamedTuple):
    """An axis of an array on which units of a group lie."""

    path: str
    axis: int
    row: Row


def prune(found: Compressed, model: Unrolled, shares: Mapping[str, float], score: str, batches: Batches) -> Compressed:
    """A smaller model of the same class.

    Args:
      shares: how much goes, by kind of units: ``{"heads": 0.25}``.
      score: "magnitude": the norm of what makes a unit times that of what reads it; "taylor" (Molchanov et al. 2019):
        |sum of parameter x gradient|, the mean over batches; "activation": the mean magnitude of what reads the unit.
      batches: gives what the last two read.

    Raises:
      UserError: see ``rows_of``, or an unknown score.
    """
    if score not in SCORES:
        raise UserError(f"--prune has no score={score} for units.{suggest(score, SCORES, 'score')}")
    for kind, share in shares.items():
        if not 0 < share < 1:
            raise UserError(f"--prune={kind}={share:g} is a share of what goes, above 0 and below 1, such as 0.5.")
    params = {path: x.shape for path, x in flatten(model.variables["params"]).items()}
    rows, new = rows_of(model.model, params, shares)
    kept: dict[str, np.ndarray] = {}
    cut = {name: np.asarray(x) for name, x in flatten(model.variables).items()}
    for stacked in (False, True):  # blocks come last, when all arrays have their other sizes
        chosen = [row for row in rows if row.group.startswith(LAYERS) == stacked]
        if not chosen:
            continue
        whole = stack_blocks(model.variables) if stacked else model.variables
        groups = _groups(whole, chosen)
        for group, values in _scores(model, groups, score, batches, stacked):
            kept[group] = _best(values, groups[group][0].row)
        cut = _cut(flatten(stack_blocks(_tree(cut))) if stacked else cut, groups, kept)
        cut = flatten(unstack_blocks(_tree(cut))) if stacked else cut
    windowed = _windowed(model.model, kept)
    if windowed is not None:
        new["style"] = dataclasses.replace(new["style"], windowed=windowed)
    task, old = model_of(found.task)
    node = found.config.task.model
    with node.ignore_type():
        for name, value in new.items():
            node[name] = target(type(value), **dataclasses.asdict(value)) if name == "style" else value
    variables = model.rolled(_tree(cut))
    sizes = [sum(x.size for x in flatten(v["params"]).values()) for v in (found.variables, variables)]
    about = {"prune": dict(shares), "score": score, "parameters": sizes[1], "parameters_before": sizes[0]}
    say(f"prune: {sizes[1]:,} of {sizes[0]:,} parameters are left")
    smaller = dataclasses.replace(task, model=old.clone(**new))
    about["kept"] = {group: index.tolist() for group, index in sorted(kept.items())}
    return Compressed(found.config, smaller, variables, {**found.about, **about})


def _tree(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten_dict(arrays, sep=".")


def _groups(variables: Any, rows: list[Row]) -> dict[str, list[_Lies]]:
    """Where the units of each group lie."""
    groups: dict[str, list[_Lies]] = {}
    for name, x in flatten(variables).items():
        for row in rows:
            if fits := re.fullmatch(row.pattern, name.partition(".")[2]):
                groups.setdefault(fits.expand(row.group), []).append(_Lies(name, row.axis % x.ndim, row))
    return groups


def _scores(
    model: Unrolled, groups: Mapping[str, list[_Lies]], score: str, batches: Batches, stacked: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """The f64[N] of each group."""

    def tree(arrays: Any) -> Mapping[str, Any]:
        return flatten(stack_blocks(arrays) if stacked else arrays)

    if score == "magnitude":
        squares = tree({"params": _squares(model.variables["params"])})
        for group, places in groups.items():
            made, read = (_total(squares, [p for p in places if p.row.reads == side]) for side in (False, True))
            yield group, np.sqrt(made * read)
    elif score == "taylor":
        each = [tree({"params": product}) for product in products(model, batches())]
        for group, places in groups.items():
            yield group, np.mean([abs(_total(product, places)) for product in each], 0)
    else:
        means = tree({"params": layer_means(model, batches(), "outputs" if stacked else "inputs")})
        for group, places in groups.items():
            found = [p for p in places if p.row.reads and p.path in means]
            if not found:
                raise UserError(f"--prune: the training loss does not use {group}, so it has no activations to score.")
            yield group, _total({p.path: _spread(np.asarray(means[p.path]), p.axis) for p in found}, found)


def _squares(tree: Any) -> Any:
    return _tree({path: np.square(np.asarray(x, np.float64)) for path, x in flatten(tree).items()})


def _total(arrays: Mapping[str, Any], places: Sequence[_Lies]) -> np.ndarray:
    """f64[N]: the sum of what each unit has of those arrays that there are."""
    total = np.zeros(len(places[0].row.places))
    for path, axis, row in places:
        if path in arrays:
            x = np.moveaxis(np.asarray(arrays[path], np.float64), axis, 0)
            total += x.reshape(len(x), -1).sum(1)[row.places].sum(1)
    return total


def _spread(mean: np.ndarray, axis: int) -> np.ndarray:
    """Means of a layer's inputs with as many axes as put the units' at ``axis``; channels have no more than theirs."""
    return mean if mean.ndim > axis else mean.reshape((1,) * axis + mean.shape)


def _best(score: np.ndarray, row: Row) -> np.ndarray:
    """i64[keep]: the units with the largest scores, in their own order."""
    parts = np.array_split(np.arange(len(score)), row.chunks)
    kept = []
    for i, part in enumerate(parts):
        count = row.keep * (i + 1) // row.chunks - row.keep * i // row.chunks
        kept.append(part[np.argsort(-score[part], kind="stable")[:count]])
    return np.sort(np.concatenate(kept))


def _cut(arrays: Mapping[str, Any], groups: Mapping[str, list[_Lies]], kept: Mapping[str, np.ndarray]) -> Arrays:
    """The arrays with those units that are kept."""
    axes: dict[tuple[str, int], list[np.ndarray]] = {}
    for group, places in groups.items():
        for path, axis, row in places:
            axes.setdefault((path, axis), []).append(row.places[kept[group]].reshape(-1))
    cut = {path: np.asarray(x) for path, x in arrays.items()}
    for (path, axis), places_ in axes.items():
        cut[path] = np.take(cut[path], np.sort(np.concatenate(places_)), axis)
    return cut


def _windowed(model: Any, kept: Mapping[str, np.ndarray]) -> tuple[bool, ...] | None:
    """Which of the blocks that are left have a window, where some have none."""
    style = getattr(model, "style", None)
    index = kept.get(f"{LAYERS} encoder")
    if style is None or style.windowed is None or index is None:
        return None
    return tuple(style.windowed[i % len(style.windowed)] for i in index)
