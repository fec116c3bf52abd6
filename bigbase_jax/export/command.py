"""``--mode=export``: a run's model for others to use, in a folder that appears when it is whole and proven."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bigbase_jax import pretrained
from bigbase_jax.build import suggest
from bigbase_jax.core import UserError, flatten, some
from bigbase_jax.export import manifest, onnx, proof, stablehlo
from bigbase_jax.inference import index
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.inference.retrieval import Retriever
from bigbase_jax.pretrained.files import SINGLE, is_ours, read_safetensors, write_safetensors
from bigbase_jax.pretrained.start import chain, stored
from bigbase_jax.runtime import compilation, whole
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.wrappers import adapter
from bigbase_jax.wrappers.wrapper import Wrapper

ALLOW_DROP = 0.5
"""Percent of the answers that may differ."""
CALIBRATE = 256
"""Examples that are read to quantise."""
LAYOUT = (
    "by path in the model: NAME is its numbers x NAME_scale, f32[groups, outputs], of inputs in a row; of a table, one"
    " for each token; u8 holds two numbers of 4 bits, the first half of the last axis of inputs in the low ones;"
    " input_scale is that of what the layer reads"
)
"""Of a quantised run's safetensors."""


class Format(NamedTuple):
    """What ``--to`` may name.

    Attributes:
      write: takes a predictor, a folder and ``words``; returns what the manifest says beside what it always says.
      words: those of ``--platforms`` and ``--quantize`` that it takes.
      opened: gives the predictor of what is in the folder, for the proof, where there is one.
    """

    write: Callable[..., Mapping[str, Any]]
    words: tuple[str, ...] = ()
    opened: Callable[[pathlib.Path, Predictor], Predictor | None] = lambda folder, predictor: None


def export(
    workdir: str,
    to: str = "safetensors",
    output: str | None = None,
    step: int | None = None,
    platforms: Sequence[str] | None = None,
    quantize: str | None = None,
    allow_drop: float = ALLOW_DROP,
    calibrate: int | None = None,
) -> dict[str, Any]:
    """Writes a run's model for others to use, with ``manifest.json`` and where it computes, ``proof.json``; returns the
    folder, its files and the proof in short.

    Args:
      to: of ``FORMATS``: "stablehlo", programs of ``jax.export``; "onnx", graphs for onnxruntime and others;
        "safetensors", a folder that transformers loads; "adapter", what was trained of a model beside its base; or
        "index", the vectors of a catalogue in which a run looks its answers up, which programs and graphs have too.
      output: the folder, where an earlier export is replaced; None: ``export/TO`` in the run's.
      step: see ``restored.restore``.
      platforms: see ``stablehlo.write``.
      quantize: a scheme of the format.
      allow_drop: see ``proof.prove``.
      calibrate: how many examples of the training data are read to quantise; None: ``CALIBRATE``.

    Raises:
      UserError: an unknown word, a model that cannot be written so, an ``output`` that holds something else, a model
        that answers otherwise than the run, or the disk refuses. Nothing is left then.
    """
    if to not in FORMATS:
        raise UserError(f"there is no --to={to}.{suggest(to, FORMATS, 'format')}")
    if calibrate is not None and quantize is None:
        raise UserError("--calibrate is how many examples --quantize looks at; give --quantize=int8, or leave it out.")
    given = {"platforms": platforms, "quantize": quantize, "calibrate": calibrate}
    words = {name: value for name, value in given.items() if value is not None}
    for name in words:
        if name not in FORMATS[to].words:
            takes = " or ".join(f"--to={other}" for other, form in FORMATS.items() if name in form.words)
            raise UserError(f"--to={to} takes no --{name}; {takes or 'no format'} does.")
    compilation.setup()
    run = RunDir(workdir)
    run.config()
    folder = pathlib.Path(output or run.path / "export" / to).expanduser().absolute()
    _refuse_foreign(folder)
    predictor = Predictor.open(workdir, step)
    result: dict[str, Any] = {"export": str(output or run.path / "export" / to), "to": to, "step": predictor.step}
    with whole.folder(folder) as partial:
        about = FORMATS[to].write(predictor, partial, **words)
        manifest.write(partial, to, predictor, about)
        if (after := FORMATS[to].opened(partial, predictor)) is not None:
            result["proof"] = proof.summary(proof.prove(predictor, after, partial, allow_drop))
        result["files"] = sorted(path.name for path in partial.iterdir())
        if "index" in about:
            result["index"] = about["index"]
    say(f"export: {result['export']}")
    return result


def _refuse_foreign(folder: pathlib.Path) -> None:
    """Raises UserError where the folder, which would be replaced, holds anything that is no export's."""
    if folder.is_dir():
        try:
            ours = {manifest.FILE, proof.FILE, *manifest.read_object(folder / manifest.FILE)["files"]}
        except (UserError, OSError, KeyError, TypeError):  # of an earlier version
            ours = {adapter.CONFIG, adapter.WEIGHTS}
        foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours and not is_ours(path))
        if not foreign:
            return
        holds = f"holds {some(foreign)}"
    elif folder.exists():
        holds = "is a file"
    else:
        return
    raise UserError(f"{folder} {holds}, which would be lost; choose another folder for the model.")


def _safetensors(predictor: Predictor, folder: pathlib.Path) -> dict[str, Any]:
    assert predictor.run is not None and predictor.config is not None
    if (small := stored(predictor.task)) is not None:
        flat = flatten(predictor.variables)
        shapes = {name: (x.shape, x.dtype) for name, x in flat.items()}
        write_safetensors(folder / SINGLE, shapes, lambda name: np.asarray(flat[name]))
        pretrained.write_tokenizer(folder, predictor.run, predictor.config)
        return {"quantize": small.quantize, "layout": LAYOUT}
    pretrained.export(predictor.run, predictor.config, predictor.task, predictor.variables, folder)
    return {}


def _opened_safetensors(folder: pathlib.Path, predictor: Predictor) -> Predictor | None:
    """Of a quantised run, what the file holds."""
    if stored(predictor.task) is None:
        return None
    arrays = read_safetensors(folder / SINGLE)
    leaves = [jax.device_put(arrays[name], x.sharding) for name, x in flatten(predictor.variables).items()]
    variables = jax.tree.unflatten(jax.tree.structure(predictor.variables), leaves)
    return dataclasses.replace(predictor, variables=variables)


def _adapter(predictor: Predictor, folder: pathlib.Path) -> dict[str, Any]:
    assert predictor.run is not None and predictor.config is not None
    variables = predictor.variables
    for task in chain(predictor.task):
        if isinstance(task, Wrapper):
            adapter.save_adapter(folder, task, variables, predictor.config.get("init_from"))
            return {}
        if hasattr(type(task), "unwrap"):
            variables = task.unwrap(variables)
    raise UserError(f"the run in {predictor.run.path} trained all of its model; there is no adapter to write.")


def _index(predictor: Predictor, folder: pathlib.Path) -> dict[str, Any]:
    if not isinstance(predictor, Retriever):
        raise UserError(f"{type(predictor.task).__name__} looks nothing up, and needs no index; export it --to=onnx.")
    found = predictor.built()
    found.save(folder / index.FILE)
    about: dict[str, Any] = {"vectors": len(found), "width": found.vectors.shape[1]}
    examples = proof.some_examples(predictor, CALIBRATE)
    if found.centroids is not None and examples is not None:
        queries = np.asarray(predictor.program(predictor.variables, examples)["vector"])
        about |= {"cells": len(found.centroids), "probes": found.probes, "recall@10": found.recall(queries)}
    return {"index": about}


def _onnx(
    predictor: Predictor, folder: pathlib.Path, quantize: str | None = None, calibrate: int | None = None
) -> dict[str, Any]:
    batches: list[Mapping[str, Any]] = []
    if quantize is not None and not isinstance(data := proof.data_of(predictor), str):
        with data.eval_batches("train", limit=calibrate or CALIBRATE) as found:
            batches = [{name: batch[name] for name in predictor.task.inputs} for batch in found]
    about = onnx.write(predictor, folder, quantize, batches)
    return {**about, **(_index(predictor, folder) if isinstance(predictor, Retriever) else {})}


def _stablehlo(predictor: Predictor, folder: pathlib.Path, platforms: Sequence[str] | None = None) -> dict[str, Any]:
    about = stablehlo.write(predictor, folder, platforms)
    assert predictor.run is not None and predictor.config is not None
    pretrained.write_tokenizer(folder, predictor.run, predictor.config)
    return {**about, **(_index(predictor, folder) if isinstance(predictor, Retriever) else {})}


def _opened_stablehlo(folder: pathlib.Path, predictor: Predictor) -> Predictor:
    return dataclasses.replace(predictor, compute=stablehlo.opened(folder))


FORMATS: Mapping[str, Format] = {
    "stablehlo": Format(_stablehlo, ("platforms",), _opened_stablehlo),
    "onnx": Format(_onnx, ("quantize", "calibrate"), onnx.opened),
    "safetensors": Format(_safetensors, opened=_opened_safetensors),
    "adapter": Format(_adapter),
    "index": Format(_index),
}
"""What ``--to`` may name."""
