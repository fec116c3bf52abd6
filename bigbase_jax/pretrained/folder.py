"""``load`` and ``save``: a folder of published weights, as transformers reads and writes them, and our models."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import build
from bigbase_jax.core import UserError, Variables, flatten, some
from bigbase_jax.pretrained import files, weights
from bigbase_jax.pretrained.families import COMMON, GENERATION, Family, family_for, family_of
from bigbase_jax.pretrained.schema import Checked, check
from bigbase_jax.pretrained.table import unrolled
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.untrusted import file_in


def load(path: str | os.PathLike, fresh: bool = True, like: Variables | None = None) -> tuple[Any, dict[str, Any]]:
    """The model of a folder and its variables, on the first device: ``model.apply(variables, ...)``.

    Args:
      path: a folder with ``config.json``, safetensors files and perhaps a tokenizer; or a state dict as ``.npz``.
      fresh: whether a head that it lacks is made anew.
      like: their shapes, with the sharding of each that does not live on the first device.

    Raises:
      UserError: it is no such folder, its model has no table, or its tensors are not those of its ``config.json``.
    """
    model, inputs, shapes, source, found = _compared(path)
    wanted = flatten(shapes if like is None else like)
    arrays = {name: source.read(name, wanted[name]) for name in found.paths}
    if found.fresh and not fresh:
        raise UserError(f"{path} lacks the weights {some(found.fresh)}.")
    if found.fresh:

        def make(key: jax.Array) -> dict[str, Any]:  # of the rest, the compiler makes nothing
            made = flatten(model.init(key, *(jnp.zeros(x.shape, x.dtype) for x in inputs)))
            return {name: made[name] for name in found.fresh}

        arrays.update(jax.jit(make)(jax.random.key(0)))
        say(f"{path} has no {some(found.fresh)}: fresh from here on")
    return model, dict(jax.tree.unflatten(jax.tree.structure(shapes), [arrays[name] for name in wanted]))


def shapes_of(path: str | os.PathLike, fresh: bool = True) -> tuple[Any, dict[str, Any]]:
    """As ``load``, and in the place of arrays their shapes: nothing is read.

    Raises:
      UserError: as ``load``.
    """
    model, _, shapes, _, found = _compared(path)
    if found.fresh and not fresh:
        raise UserError(f"{path} lacks the weights {some(found.fresh)}.")
    return model, dict(shapes)


def check_weights(path: str | os.PathLike) -> None:
    """Raises UserError where ``load`` would: by names and shapes alone, nothing is computed or allocated."""
    _compared(path)


def _compared(path: str | os.PathLike) -> tuple[nn.Module, tuple[Any, ...], Any, weights.Weights, weights.Plan]:
    """The model of a folder, its inputs, the shapes of its variables, the tensors, and which of them are to be read."""
    family, config = describe(path)
    model: nn.Module = build(family.from_config(config))
    source = open_weights(path, family, model)
    inputs = family.inputs(model, config)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return model, inputs, shapes, source, weights.plan(source, flatten(shapes), family.HEAD)


def describe(path: str | os.PathLike) -> tuple[Family, dict[str, Any]]:
    """The family of a folder (or ``.npz``), and what its ``config.json`` says of the keys that are read.

    Raises:
      UserError: there is none, no table for it, or a value that does not fit.
    """
    where, place = f"{path}: config.json", pathlib.Path(os.path.expanduser(path))
    if place.is_file() and place.suffix == ".npz":
        from bigbase_jax.pretrained.families import resnet_cifar

        config = resnet_cifar.config_of(files.read_npz(place), str(path))
    elif place.is_dir():
        config = files.read_json(place / files.CONFIG)
    else:
        raise UserError(f"there is no folder {path} of published weights.")
    family = family_of(config, path)
    return family, Checked(config, {**COMMON, **family.SCHEMA}, where)


def generation(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the ``config.json`` and the ``generation_config.json`` of a folder say of how its model writes.

    Raises:
      UserError: as ``describe``.
    """
    file, config = pathlib.Path(os.path.expanduser(path)) / files.GENERATION, describe(path)[1]
    said = files.read_json(file) if os.path.lexists(file) else {}
    return {k: config[k] for k in GENERATION if k in config}, check(said, GENERATION, str(file))


def open_weights(path: str | os.PathLike, family: Family, model: nn.Module) -> weights.Weights:
    """The folder's tensors by the paths of ``model``.

    Raises:
      UserError: the files are missing or damaged, or the model is not of the family.
    """
    place = pathlib.Path(os.path.expanduser(path))
    if type(model) not in family.MODELS:
        theirs = " or ".join(kind.__name__ for kind in family.MODELS)
        raise UserError(f"{path} holds the weights of a {theirs}, and the model is a {type(model).__name__}.")
    tensors = files.read_npz(place) if place.is_file() else files.read_tensors(place)
    return weights.converted(tensors, family.table(model), str(path))


def save(
    path: str | os.PathLike,
    model: nn.Module,
    variables: Variables,
    tokenizer: Any = None,
    max_shard_bytes: float = 5e9,
    about: Mapping[str, Any] | None = None,
) -> list[str]:
    """Writes a folder that transformers loads; it appears when it is whole.

    Args:
      path: the folder; one that this function wrote before is replaced.
      model: of a class that a family knows.
      variables: the model's own: ``{"params": ..., ...}``.
      tokenizer: a ``data.tokenizer.Tokenizer``, or a folder whose tokenizer files are copied, with its
        ``generation_config.json``.
      max_shard_bytes: a larger model has several files and an index.
      about: more keys for ``config.json`` (``id2label``).

    Returns:
      The names of the files.

    Raises:
      UserError: transformers has no such model, or the disk refuses.
    """
    flat = flatten(dict(variables))
    shapes = unrolled(flat)
    family, config = family_for(model, shapes)
    table = family.table(model)
    covered = [path for entry in table.entries for path in entry.paths]
    absent, spare = sorted(set(covered) - set(shapes)), sorted(set(shapes) - set(covered))
    if absent or spare:
        said = [f"it lacks {some(absent)}"] if absent else []
        said += [f"there is no place for {some(spare)}"] if spare else []
        raise UserError(f"the variables are not those of the {type(model).__name__}: {'; '.join(said)}.")

    of_name = {entry.theirs: entry for entry in table.entries}
    specs: dict[str, tuple[tuple[int, ...], Any]] = {}
    for entry in table.entries:
        ours = [np.broadcast_to(np.int8(0), shapes[path]) for path in entry.paths]
        specs[entry.theirs] = (entry.write(ours, table.sizes).shape, np.float32)
    specs.update({name: (x.shape, x.dtype) for name, x in table.constants.items()})

    def tensor(name: str) -> np.ndarray:
        if name in table.constants:
            return table.constants[name]
        entry = of_name[name]
        return entry.write([weights.fetched(flat, path) for path in entry.paths], table.sizes)

    with files.whole_model(path) as partial:
        files.write_json(partial / files.CONFIG, {**config, "dtype": "float32", **(about or {})})
        files.write_tensors(partial, specs, tensor, max_shard_bytes)
        if tokenizer is not None:
            save_tokenizer(partial, tokenizer)
        names = sorted(p.name for p in partial.iterdir())
    if not family.TRANSFORMERS:
        say("the weights are under their published names; transformers has no such model")
    return names


def save_tokenizer(folder: pathlib.Path, tokenizer: Any) -> None:
    """Writes a tokenizer's files; see ``save``."""
    if isinstance(tokenizer, (str, os.PathLike)):
        for name in (*files.TOKENIZER, files.GENERATION):
            if source := file_in(os.path.expanduser(tokenizer), name):
                shutil.copyfile(source, folder / name)
        return
    from bigbase_jax.pretrained.tokenizers import published

    for name, content in published(tokenizer).items():
        (folder / name).write_bytes(content)
