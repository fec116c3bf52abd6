"""The verbs of the command line, each on a run folder: train, evaluate, predict, export, report."""

from __future__ import annotations

import functools
import glob
import inspect
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from ml_collections import ConfigDict

from bigbase_jax import distributed, parallel, pretrained
from bigbase_jax import report as report_page
from bigbase_jax import train as training
from bigbase_jax.build import build, locate, suggest
from bigbase_jax.core import Example, Task, UserError
from bigbase_jax.data.pipeline import apply_eval
from bigbase_jax.evaluate import evaluate as run_evaluation
from bigbase_jax.log import Diverged, say
from bigbase_jax.restored import facts, restore
from bigbase_jax.rundir import RunDir

T = TypeVar("T")
EXPORTS = ("safetensors", "adapter")
_ROWS = 32  # examples that are predicted at once


def setup() -> None:
    """What every verb needs of JAX: a compilation cache that lasts, so that the second start is fast."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "bigbase_jax", "xla"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def train(config: ConfigDict, workdir: str, name: str = "", observe: training.Observe | None = None) -> dict[str, Any]:
    """Trains, or goes on with the run in ``workdir``; then evaluates and writes the report. Returns the metrics."""
    setup()
    config = pretrained.resolve(config, pretrained.kept(RunDir(workdir)))
    try:
        result = training.train(config, workdir, name, observe)
    except Diverged:
        with distributed.last_words():
            _report_once(workdir)
        raise
    if "split" in result:
        _report_once(workdir)
    return result


def evaluate(workdir: str, step: int | None = None, split: str | None = None) -> dict[str, Any]:
    """Restores a checkpoint of a run and evaluates it on a split; returns the metrics.

    Raises:
      UserError: no run, no such checkpoint, no such split, or the data is not there.
    """
    setup()
    run = RunDir(workdir)
    config = run.config()
    data = build(pretrained.data_of(run, config), _path="config.data").prepare(say)
    mesh = _mesh(config)
    parallel.check_batch(data.eval_batch_size, mesh, what="config.data.eval_batch_size")
    if data.fingerprint() != run.read_json("lineage.json")["data"]["fingerprint"]:
        say("the data is not what the run was trained on: names, sizes or times of files differ")
    split = split or next(name for name in ("test", "val", "train") if name in data.splits)
    if split not in data.splits:
        raise UserError(f"this data has no split {split!r}.{suggest(split, data.splits, 'split')}")
    task, variables, step = restore(run, config, mesh, step)
    batches = data.eval_batches(split, parallel.host(mesh))
    found = run_evaluation(task, parallel.eval_step(task, mesh), variables, batches, mesh)
    return training.write_evaluation(run, step, split, found)


def predict(workdir: str, pattern: str, step: int | None = None, out: Any = None) -> int:
    """Prints one JSON line per input, in the order of their names: ``{"input", ...the task's answer}``.

    An input that cannot be read gives ``{"input", "error"}``, and the others go on.

    Returns:
      The exit status: 1 if an input could not be read.

    Raises:
      UserError: nothing matches ``pattern``.
    """
    setup()
    run = RunDir(workdir)
    config = run.config()
    mesh = parallel.make_mesh(1)
    task, variables, _ = restore(run, config, mesh, step)
    read = _reader(config, facts(run))
    transforms = build(config.data.eval_transforms, _path="config.data.eval_transforms")
    compiled = jax.jit(task.predict)
    failed = False
    for names in _chunks(input_files(pattern), _ROWS):
        answers: dict[str, dict[str, Any]] = {}
        rows: list[tuple[str, dict[str, np.ndarray]]] = []
        for name in names:
            try:
                found = read(name)
                for example in [found] if isinstance(found, Mapping) else found:
                    example = apply_eval(transforms, example, config.data.seed)
                    rows.append((name, {key: np.asarray(example[key]) for key in task.inputs}))
            except UserError as error:
                answers[name] = {"error": str(error)}
                failed = True
        outputs: dict[str, list[dict[str, np.ndarray]]] = {}
        for some in _chunks([row for row in rows if row[0] not in answers], _ROWS):
            padded = [row for _, row in some] + [some[-1][1]] * (_ROWS - len(some))  # one shape, one compilation
            batch = {key: np.stack([row[key] for row in padded]) for key in task.inputs}
            computed = jax.device_get(compiled(variables, batch))
            for i, (name, _) in enumerate(some):
                outputs.setdefault(name, []).append({key: x[i] for key, x in computed.items()})
        for name, parts in outputs.items():
            joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts[1:] else parts[0]
            answers[name] = task.present(joined)
        for name in names:
            print(json.dumps({"input": name, **answers[name]}, ensure_ascii=False), flush=True, file=out)
    return int(failed)


def export(workdir: str, to: str = "safetensors", output: str | None = None, step: int | None = None) -> dict[str, Any]:
    """Writes a run's model for others to use; returns the folder and its files.

    Args:
      to: "safetensors", a folder that transformers loads, or "adapter", what was trained of a model beside its base.
      output: the folder; None: ``export/TO`` in the run's.

    Raises:
      UserError: an unknown word, or a model that cannot be written so.
    """
    if to not in EXPORTS:
        raise UserError(f"there is no --to={to}.{suggest(to, EXPORTS, 'format')}")
    setup()
    run = RunDir(workdir)
    config = run.config()
    task, variables, step = restore(run, config, parallel.make_mesh(1), step)
    folder = pathlib.Path(output or run.path / "export" / to)
    if to == "safetensors":
        names = pretrained.export(run, config, task, variables, folder)
    else:
        from bigbase_jax import adapt

        wrapper = next((t for t in pretrained.chain(task) if isinstance(t, (adapt.LoRA, adapt.Frozen))), None)
        if wrapper is None:
            raise UserError(f"the run in {run.path} trained all of its model; there is no adapter to write.")
        adapt.save_adapter(folder, wrapper, variables)
        names = sorted(path.name for path in folder.iterdir())
    return {"export": str(folder), "to": to, "step": step, "files": names}


def report(workdir: str) -> dict[str, Any]:
    """(Re)writes ``report.html`` of a run; returns its path. Pictures need the data to be where it was."""
    run = RunDir(workdir)
    config = run.config()
    pictures = passages = None
    try:
        task: Task = build(config.task, facts(run), _path="config.task")
        passages = getattr(task, "passages", None)
        if passages is None:
            data = build(pretrained.data_of(run, config), _path="config.data").prepare(lambda line: None)
            source = {name: data.source(name) for name in data.splits}

            def pictures(split: str, index: int) -> tuple[np.ndarray, str]:
                return source[split][index][task.inputs[0]], source[split].name(index)

    except UserError as error:
        say(f"the report has no examples: {error}")
    page = report_page.write(str(run.path), pictures, passages)
    say(f"report: {page}")
    return {"report": str(page)}


def _mesh(config: ConfigDict) -> Any:
    """The run's own mesh where it fits the devices here, else all of them along ``data``: a run opens anywhere."""
    try:
        return parallel.make_mesh(config.train.devices, build(config.train.mesh, _path="config.train.mesh"))
    except UserError:
        return parallel.make_mesh()


def _report_once(workdir: str) -> None:
    if jax.process_index() == 0:
        report(workdir)


def input_files(pattern: str) -> list[str]:
    """The files that a path, a folder (with all below it) or a pattern names, sorted.

    Raises:
      UserError: there are none.
    """
    path = pathlib.Path(pattern)
    if path.is_file():
        return [pattern]
    if path.is_dir():
        found = [str(p) for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    else:
        found = [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if not found:
        raise UserError(f"--input={pattern} names no file.")
    return sorted(found)


def _reader(config: ConfigDict, facts: Mapping[str, Any]) -> Callable[[str], Example | Sequence[Example]]:
    """The data set's decoder of users' files; the data itself need not be here unless the decoder depends on it."""
    dataset: Any = locate(config.data.dataset.target, "config.data.dataset.target")
    if not isinstance(inspect.getattr_static(dataset, "read"), staticmethod):
        return build(config.data.dataset, _path="config.data.dataset").read
    if "facts" in inspect.signature(dataset.read).parameters:
        return functools.partial(dataset.read, facts=facts)
    return dataset.read


def _chunks(items: list[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
