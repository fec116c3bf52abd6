"""Weights by our paths, wherever they come from, read slice by slice into arrays that live where they are asked to.

Paths begin with the collection (``params.encoder.norm.scale``). A source knows the unrolled form of a model
(``encoder.block_0``); whoever asks for a stack (``encoder.blocks``) gets the layers one on the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import UserError, some
from bigbase_jax.pretrained.table import Table, is_stack, path_of_layer


class Weights:
    """What a folder holds, by our paths.

    Attributes:
      where: the folder, to be named in sentences.
      arrays: path -> array, of which a slice is read when it is taken.
      foreign: names of theirs that have no path.
      unread: those that our model has no use for.
    """

    def __init__(self, where: str, arrays: Mapping[str, Any], foreign: Sequence[str] = (), unread: Sequence[str] = ()):
        self.where, self.arrays, self.foreign, self.unread = where, arrays, list(foreign), list(unread)

    def parts(self, path: str) -> list[str]:
        """The paths that make up ``path``: itself, or the layers of a stack, as far as they are there."""
        if not is_stack(path) or path in self.arrays:
            return [path] if path in self.arrays else []
        found: list[str] = []
        while (layer := path_of_layer(path, len(found))) in self.arrays:
            found.append(layer)
        return found

    def shape(self, path: str) -> tuple[int, ...] | None:
        """The shape at ``path``; None: there is nothing."""
        parts = self.parts(path)
        if not parts:
            return None
        shape = tuple(self.arrays[parts[0]].shape)
        return shape if parts == [path] else (len(parts), *shape)

    def read(self, path: str, like: Any) -> jax.Array:
        """The array at ``path`` with the shape, dtype and sharding (None: the first device) of ``like``.

        Each device's piece is read by itself, and none other of a model is in memory at that time.
        """
        parts = self.parts(path)
        sharding = getattr(like, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        if isinstance(self.arrays[parts[0]], jax.Array):  # perhaps spread over several processes
            whole = [self.arrays[part].astype(like.dtype) for part in parts]
            return jax.device_put(whole[0] if parts == [path] else jnp.stack(whole), sharding)

        def piece(index: tuple[slice, ...] | None) -> np.ndarray:
            index = index or ()
            if parts == [path]:
                return np.array(self.arrays[path][index], like.dtype, order="C")
            layers = parts[index[0]] if index else parts
            return np.stack([np.asarray(self.arrays[layer][index[1:]], like.dtype) for layer in layers])

        return jax.make_array_from_callback(tuple(like.shape), sharding, piece)


def converted(tensors: Mapping[str, np.ndarray], table: Table, where: str) -> Weights:
    """A folder's tensors by our paths, as the table says; nothing is read yet.

    Raises:
      UserError: a tensor does not have the shape that its arrangement asks for, or there are far too few for the model:
        of one that ``config.json`` makes out larger than it is, nothing is traced.
    """
    known = {name for entry in table.entries for name in (entry.theirs, *entry.also)} | set(table.constants)
    plain = table.prefix and not any(name.startswith(table.prefix) for name in tensors)
    full = {table.prefix + name if plain and name not in known else name: name for name in tensors}
    absent = [entry.theirs for entry in table.entries if full.keys().isdisjoint((entry.theirs, *entry.also))]
    if len(absent) > len(tensors) + 100:
        raise UserError(f"{where} does not hold what its config.json says: of the tensors, it lacks {some(absent)}.")
    arrays: dict[str, np.ndarray] = {}
    for entry in table.entries:
        name = next((name for name in (entry.theirs, *entry.also) if name in full), None)
        if name is None:
            continue
        tensor = tensors[full[name]]
        try:
            arrays.update(zip(entry.paths, entry.read(tensor, table.sizes), strict=True))
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{where}: {full[name]} of shape {tuple(tensor.shape)} is not what its config.json says: {error}."
            ) from error
    rest = [name for name in full if name not in known and not _matches(table.ignored, name)]
    unread = [full[name] for name in rest if _matches(table.unread, name)]
    foreign = [full[name] for name in rest if not _matches(table.unread, name)]
    return Weights(where, arrays, foreign, unread)


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


class Plan(NamedTuple):
    """What is to be read.

    Attributes:
      paths: of ours, to be read.
      fresh: those of the head that stay as a fresh model has them.
      dropped: what the folder has and the model does not take, named.
    """

    paths: list[str]
    fresh: list[str]
    dropped: list[str]


def plan(weights: Weights, wanted: Mapping[str, Any], head: str = r"(?!)") -> Plan:
    """Compares what a model needs with what there is.

    Args:
      wanted: path -> shape, array or ``jax.ShapeDtypeStruct``: all of the model's variables.
      head: regex of the parameters (without the collection) that may stay fresh.

    Raises:
      UserError: anything else is missing on either side, or has another shape; lists it.
    """
    paths: list[str] = []
    fresh: list[str] = []
    missing: list[str] = []
    other: list[str] = []
    taken: set[str] = set()
    dropped = list(weights.unread)
    for path, like in wanted.items():
        shape = tuple(getattr(like, "shape", like))
        found = weights.shape(path)
        taken.update(weights.parts(path))
        if found == shape:
            paths.append(path)
        elif re.search(head, path.partition(".")[2]):
            fresh.append(path)
            dropped += [f"{path} of {found}"] if found is not None else []
        elif found is None:
            missing.append(path)
        else:
            other.append(f"{path} is {found} there and {shape} here")
    spare: list[str] = []
    for path in sorted(set(weights.arrays) - taken):
        (dropped if re.search(head, path.partition(".")[2]) else spare).append(path)
    said = [f"it lacks {some(missing)}"] if missing else []
    if spare or weights.foreign:
        said.append(f"it also has {some([*spare, *weights.foreign])}")
    said += [some(other)] if other else []
    if said:
        raise UserError(f"{weights.where} does not fit the model: {'; '.join(said)}.")
    return Plan(paths, fresh, dropped)


def fetched(flat: Mapping[str, Any], path: str) -> np.ndarray:
    """The array at ``path``, in the unrolled form, of variables that may be stacked; on the host."""
    if path in flat:
        return np.asarray(jax.device_get(flat[path]))
    match = re.search(r"(^|\.)block_(\d+)\.", path)
    stack = re.sub(r"(^|\.)block_\d+\.", r"\g<1>blocks.", path)
    assert match is not None, path
    return np.asarray(jax.device_get(jnp.asarray(flat[stack])[int(match[2])]))
