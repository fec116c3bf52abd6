"""``manifest.json``: what an exported folder holds, what its model reads and gives, and what may read it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import IO, Any

import jax

from bigbase_jax.compare.runs import Run
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pretrained.start import model_of
from bigbase_jax.runtime.rundir import as_json
from bigbase_jax.runtime.untrusted import open_regular, read_object

FILE = "manifest.json"
FORMAT, VERSION = "bigbase_jax export", 1
_LINEAGE = ("command", "git_commit", "git_dirty", "versions", "devices", "started", "finished")
_PACKAGES = ("bigbase_jax", "jax", "jaxlib", "flax", "numpy", "onnx", "onnxruntime", "jax2onnx")


def write(folder: pathlib.Path, to: str, predictor: Predictor, about: Mapping[str, Any]) -> None:
    """Describes what is in a folder, which gets the file.

    Args:
      to: the format.
      about: more of it, by key: ``inputs`` with their symbolic axes, ``compatibility``, ...
    """
    task, model = model_of(predictor.task)
    known = predictor.dataset_info
    assert predictor.config is not None
    files = {path.name: path for path in sorted(folder.iterdir())}
    spec = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in predictor.spec.items()}
    outputs = jax.eval_shape(predictor.task.predict, predictor.variables, spec)
    found = {
        "format": FORMAT,
        "version": VERSION,
        "to": to,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES if name in sys.modules},
        "model": {
            "task": type(task).__name__,
            "model": type(model).__name__,
            "step": predictor.step,
            "parameters": sum(x.size for x in jax.tree.leaves(predictor.variables)),
        },
        "inputs": {name: described(x) for name, x in spec.items()},
        "outputs": {name: described(x) for name, x in outputs.items()},
        "preprocessing": [
            {"name": step.pop("target").rpartition(":")[2], **step}
            for step in as_json(predictor.config.data)["eval_transforms"]
        ],
        "class_names": known.get("class_names"),
        "dataset_info": {k: v for k, v in known.items() if k not in ("tokenizer", "chat_template", "class_names")},
        **({} if predictor.run is None else trained(Run.look(predictor.run.path))),
        **about,
        "files": {name: {"bytes": path.stat().st_size, "sha256": digest(path)} for name, path in files.items()},
    }
    (folder / FILE).write_text(json.dumps(found, indent=2, ensure_ascii=False, default=list) + "\n", encoding="utf-8")


def trained(run: Run) -> dict[str, Any]:
    """Where a model comes from, for who has only what was made of it: ``metrics`` (split -> name -> number), ``data``
    and ``lineage``. The data's card stays with the run: it counts what may be private."""
    data = run.lineage.get("data")
    return {
        "metrics": {split: run.scalars(split) for split in run.evals},
        "data": {k: v for k, v in data.items() if k != "data_card"} if isinstance(data, dict) else {},
        "lineage": {name: run.lineage[name] for name in _LINEAGE if name in run.lineage},
    }


def described(x: Any) -> dict[str, Any]:
    """An array's shape, whose first axis is of any size and others are numbers or names, and dtype."""
    return {"shape": ["batch", *(n if isinstance(n, int) else str(n) for n in x.shape[1:])], "dtype": str(x.dtype)}


def read(folder: pathlib.Path, to: str | None) -> dict[str, Any]:
    """The manifest of a folder whose files are those that it names, whole.

    Args:
      to: the format that it has to be of; None: any.

    Raises:
      UserError: there is none, it is of another format or of a newer version, or a file is missing or not whole.
    """
    try:
        found = read_object(folder / FILE)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} holds no exported model: it has no {FILE}; --mode=export{f' --to={to}' if to else ''} makes it."
        ) from error
    if found.get("format") != FORMAT or to not in (None, found.get("to")):
        raise UserError(f"{folder / FILE} is of {str(found.get('to', found.get('format')))[:40]!r}, not of {to!r}.")
    if not isinstance(version := found.get("version"), int) or version > VERSION:
        raise UserError(
            f"{folder} is of version {str(version)[:20]} of this format, and this program reads up to {VERSION}: it was"
            " written by a newer one; update bigbase_jax, or export the run again."
        )
    try:
        named = {str(name): (int(about["bytes"]), str(about["sha256"])) for name, about in found["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FILE} does not say which files there are ({error}).") from error
    for name, (size, sha256) in named.items():
        path = folder / name
        try:
            with open_regular(path, folder) as file:
                there = os.fstat(file.fileno()).st_size
                whole = same(file, size, sha256)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); copy the whole folder.") from error
        if not whole:
            held = f"has {there:,} of its {size:,} bytes" if there != size else "does not hold what was written"
            raise UserError(f"{path} {held}: it was not copied whole; copy the folder again.")
    return found


def same(file: IO[bytes], size: int, sha256: str) -> bool:
    """Whether an open file is that of this size and sha256."""
    there = os.fstat(file.fileno()).st_size
    return there == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256  # type: ignore[arg-type]


def digest(path: pathlib.Path) -> str:
    """The sha256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
