"""What a ``Wrapper`` has trained as a folder of its own, without the base that it belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from bigbase_jax.core import UserError, Variables, flatten
from bigbase_jax.parallel import BASE
from bigbase_jax.runtime.untrusted import open_regular, read_object
from bigbase_jax.wrappers.wrapper import Wrapper, some_paths

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SAMPLE = 64  # values of each parameter that a fingerprint reads


def save_adapter(directory: str | pathlib.Path, task: Wrapper, variables: Variables) -> None:
    """Writes what training may have changed, and of the base its fingerprint alone.

    ``adapter_model.safetensors`` holds ``params`` and all collections but the base, by dotted path;
    ``adapter_config.json`` what the wrapper was, and which base it belongs to. Of several processes the first writes.

    Raises:
      UserError: the disk refuses.
    """
    folder = pathlib.Path(directory)
    arrays = {name: np.asarray(jax.device_get(x), order="C") for name, x in _changed(variables).items()}
    # numpy's side of safetensors has no bfloat16; float32 holds each of its values
    arrays = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
    config = {
        **_described(task),
        "base": fingerprint(variables[BASE]),
        "shapes": {name: list(x.shape) for name, x in arrays.items()},
    }
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WEIGHTS).write_bytes(safetensors.numpy.save(arrays))
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the adapter to {folder}: {error.strerror}.") from error


def load_adapter(directory: str | pathlib.Path, task: Wrapper, variables: Variables) -> Variables:
    """``variables`` with what ``save_adapter`` wrote in the place of their own, where their own live.

    Args:
      task: a wrapper as the one that was saved; only its dropout may differ.
      variables: with the base that the adapter was trained on.

    Raises:
      UserError: there is no adapter, it cannot be read, or it is of another wrapper or another base.
    """
    folder = pathlib.Path(directory)
    try:
        config = read_object(folder / CONFIG)
        with open_regular(folder / WEIGHTS, folder) as file:
            loaded = safetensors.numpy.load(file.read())
    except FileNotFoundError as error:
        raise UserError(f"there is no adapter in {folder}: it has no {pathlib.Path(error.filename).name}.") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"the adapter in {folder} cannot be read ({error}).") from error
    for name, value in _described(task).items():
        if name != "dropout" and config.get(name) != value:
            raise UserError(f"the adapter in {folder} has {name}={config.get(name)!r}, and this task {name}={value!r}.")
    if config.get("base") != fingerprint(variables[BASE]):
        raise UserError(
            f"the adapter in {folder} was trained on another base (its shapes or values differ from this one's); "
            "load the base it belongs to first."
        )
    own = _changed(variables)
    shapes = [{name: tuple(x.shape) for name, x in arrays.items()} for arrays in (own, loaded)]
    differing = [name for name in sorted({*own, *loaded}) if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        raise UserError(
            f"the adapter in {folder} is of another model: {some_paths(name.split('.') for name in differing)}."
        )
    placed = []
    for name, x in own.items():
        value = loaded[name].astype(x.dtype)
        placed.append(jax.device_put(value, x.sharding) if isinstance(x, jax.Array) else value)
    rest = {name: x for name, x in variables.items() if name != BASE}
    return {**jax.tree.unflatten(jax.tree.structure(rest), placed), BASE: variables[BASE]}


def fingerprint(base: Mapping[str, Any]) -> str:
    """A short digest of the paths, the shapes and a sample of the values of parameters."""
    leaves = dict(sorted(flatten(base).items()))
    homes = [x.sharding for x in leaves.values() if isinstance(x, jax.Array)]
    everywhere = next(
        (NamedSharding(home.mesh, PartitionSpec()) for home in homes if isinstance(home, NamedSharding)), None
    )

    def sample(x: Any) -> jax.Array:
        at = np.linspace(0, max(x.size - 1, 0), min(x.size, _SAMPLE)).round().astype(np.int64)
        return x[np.unravel_index(at, x.shape)] if x.ndim else x

    values = jax.jit(lambda leaves: jax.tree.map(sample, leaves), out_shardings=everywhere)(leaves)
    digest = hashlib.sha256()
    for name, x in leaves.items():
        digest.update(f"{name}{tuple(x.shape)}".encode() + np.asarray(values[name]).astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def _changed(variables: Variables) -> dict[str, Any]:
    return flatten({name: x for name, x in variables.items() if name != BASE})


def _described(task: Wrapper) -> dict[str, Any]:
    """What a wrapper is, but for what it is around."""
    words = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name != "task"}
    return {"kind": type(task).__name__, **words}
