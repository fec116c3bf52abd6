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
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from bigbase_jax.core import Task, UserError, Variables, flatten
from bigbase_jax.parallel import FROZEN
from bigbase_jax.runtime.untrusted import open_regular, read_object
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.wrapper import Wrapper, some_paths

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS: Mapping[str, Any] = {kind.__name__: kind for kind in (LoRA, Frozen)}
_TYPES: Mapping[str, Any] = {"int": int, "float": (int, float), "str": str, "str | None": (str, type(None))}
_SAMPLE = 64  # values of each parameter that a fingerprint reads


def save_adapter(
    directory: str | pathlib.Path, task: Wrapper, variables: Variables, base: str | None = None
) -> list[str]:
    """Writes what training may have changed, and of the base its fingerprint alone; returns the names of the files.

    ``adapter_model.safetensors`` holds ``params`` and all collections but the base, by dotted path;
    ``adapter_config.json`` what the wrapper was, and which base it belongs to. Of several processes the first writes.

    Args:
      base: the folder that the base was read from, a run's or a published one; None: it was made fresh.

    Raises:
      UserError: the disk refuses.
    """
    folder = pathlib.Path(directory)
    arrays = {name: np.asarray(jax.device_get(x), order="C") for name, x in _changed(variables).items()}
    # numpy's side of safetensors has no bfloat16; float32 holds each of its values
    arrays = {name: x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for name, x in arrays.items()}
    config = {
        **_described(task),
        "base_model_name_or_path": base,
        "base": fingerprint(variables[FROZEN]),
        "shapes": {name: list(x.shape) for name, x in arrays.items()},
    }
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / WEIGHTS).write_bytes(safetensors.numpy.save(arrays))
            (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write the adapter to {folder}: {error.strerror}.") from error
    return [CONFIG, WEIGHTS]


def is_adapter(directory: str | pathlib.Path) -> bool:
    """Whether the folder has what ``described`` reads."""
    return (pathlib.Path(directory).expanduser() / CONFIG).is_file()


def described(directory: str | pathlib.Path) -> dict[str, Any]:
    """What an adapter's wrapper was, with ``kind`` its class, and of its base ``base`` and ``base_model_name_or_path``.

    Raises:
      UserError: there is no adapter, or it is none of ours.
    """
    folder = pathlib.Path(directory).expanduser()
    try:
        found = read_object(folder / CONFIG)
    except FileNotFoundError as error:
        raise UserError(f"there is no adapter in {directory}: it has no {CONFIG}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the adapter in {directory} cannot be read ({error}).") from error
    if str(found.get("kind")) not in KINDS:
        raise UserError(
            f"the adapter in {directory} has kind={str(found.get('kind'))[:40]!r}; known here are those that"
            " --mode=export --to=adapter writes."
        )
    types = {field.name: field.type for field in _own_fields(KINDS[found["kind"]])}
    for name, wanted in {**types, "base_model_name_or_path": "str | None"}.items():
        if not isinstance(value := found.get(name), _TYPES[str(wanted)]):
            raise UserError(f"{folder / CONFIG} has {name}={str(value)[:80]!r}; it must be {wanted}.")
    return found


def words_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the wrapper that ``described`` tells of, but for the task."""
    return {field.name: about[field.name] for field in _own_fields(KINDS[about["kind"]])}


def wrapped(
    directory: str | pathlib.Path, task: Task, variables: Variables, spec: Mapping[str, Any]
) -> tuple[Wrapper, Variables]:
    """A task and its trained variables with an adapter of theirs around them.

    Args:
      spec: shapes and dtypes of a batch's ``Task.inputs``.

    Raises:
      UserError: as ``load_adapter``, and as the wrapper.
    """
    about = described(directory)
    wrapper: Wrapper = KINDS[about["kind"]](task, **words_of(about))
    abstract = dict(jax.eval_shape(wrapper.init, jax.random.key(0), spec))
    base = flatten_dict(variables["params"])
    missing = [path for path in flatten_dict(abstract[FROZEN]) if path not in base]
    if missing:
        raise UserError(f"the adapter in {directory} is of another model, which has {some_paths(missing)}.")
    own = {path: base[path] for path in flatten_dict(abstract[FROZEN])}
    return wrapper, load_adapter(directory, wrapper, {**abstract, FROZEN: unflatten_dict(own)})


def load_adapter(directory: str | pathlib.Path, task: Wrapper, variables: Variables) -> Variables:
    """``variables`` with what ``save_adapter`` wrote in the place of their own, where their own live.

    Args:
      task: a wrapper as the one that was saved; only its dropout may differ.
      variables: with the base that the adapter was trained on; the others may be shapes alone.

    Raises:
      UserError: there is no adapter, it cannot be read, or it is of another wrapper or another base.
    """
    folder, config = pathlib.Path(directory).expanduser(), described(directory)
    try:
        with open_regular(folder / WEIGHTS, folder) as file:
            loaded = safetensors.numpy.load(file.read())
    except FileNotFoundError as error:
        raise UserError(f"there is no adapter in {directory}: it has no {WEIGHTS}.") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise UserError(f"the adapter in {directory} cannot be read ({error}).") from error
    for name, value in _described(task).items():
        if name != "dropout" and config.get(name) != value:
            raise UserError(
                f"the adapter in {directory} has {name}={config.get(name)!r}, and this task {name}={value!r}."
            )
    if config.get("base") != fingerprint(variables[FROZEN]):
        raise UserError(
            f"the adapter in {directory} was trained on another base (its shapes or values differ from this one's); "
            "load the base it belongs to first."
        )
    own = _changed(variables)
    shapes = [{name: tuple(x.shape) for name, x in arrays.items()} for arrays in (own, loaded)]
    differing = [name for name in sorted({*own, *loaded}) if shapes[0].get(name) != shapes[1].get(name)]
    if differing:
        names = some_paths(name.split(".") for name in differing)
        raise UserError(f"the adapter in {directory} is of another model: {names}.")
    placed = [jax.device_put(loaded[name].astype(x.dtype), getattr(x, "sharding", None)) for name, x in own.items()]
    rest = {name: x for name, x in variables.items() if name != FROZEN}
    return {**jax.tree.unflatten(jax.tree.structure(rest), placed), FROZEN: variables[FROZEN]}


def fingerprint(base: Mapping[str, Any]) -> str:
    """A short digest of the paths, the shapes and a sample of the values of parameters."""
    leaves = dict(sorted(flatten(base).items()))
    placed = [x.sharding for x in leaves.values() if isinstance(x, jax.Array)]
    meshes = [sharding.mesh for sharding in placed if isinstance(sharding, NamedSharding)]
    everywhere = NamedSharding(meshes[0], PartitionSpec()) if meshes else None

    def sample(x: Any) -> jax.Array:
        at = np.linspace(0, max(x.size - 1, 0), min(x.size, _SAMPLE)).round().astype(np.int64)
        return x[np.unravel_index(at, x.shape)] if x.ndim else x

    values = jax.jit(lambda leaves: jax.tree.map(sample, leaves), out_shardings=everywhere)(leaves)
    digest = hashlib.sha256()
    for name, x in leaves.items():
        digest.update(f"{name}{tuple(x.shape)}".encode() + np.asarray(values[name]).astype(np.float32).tobytes())
    return digest.hexdigest()[:16]


def _changed(variables: Variables) -> dict[str, Any]:
    return flatten({name: x for name, x in variables.items() if name != FROZEN})


def _described(task: Wrapper) -> dict[str, Any]:
    """What a wrapper is, but for what it is around."""
    return {"kind": type(task).__name__, **{field.name: getattr(task, field.name) for field in _own_fields(task)}}


def _own_fields(wrapper: Wrapper | type[Wrapper]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(wrapper) if field.name != "task"]
