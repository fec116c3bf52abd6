"""``--mode=compress``: from a run folder to a smaller one, which every verb takes as it takes any other."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax import pretrained
from bigbase_jax.build import build
from bigbase_jax.compress import quantise
from bigbase_jax.compress.compressed import Batches, Compressed, plain
from bigbase_jax.compress.prune import prune
from bigbase_jax.core import UserError
from bigbase_jax.export import proof
from bigbase_jax.export.command import CALIBRATE
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.runtime import compilation, whole
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.restored import batch_spec
from bigbase_jax.runtime.rundir import RunDir, as_json

FILE = "compression.json"


def compress(
    workdir: str,
    output: str | None = None,
    step: int | None = None,
    calibrate: int | None = None,
    sensitivity: bool = False,
    **words: str | None,
) -> dict[str, Any]:
    """Compresses a run; returns the new folder and what was done.

    Args:
      output: the new run's folder; None: beside the run, named after what is done.
      step: of the checkpoint; None: the best.
      calibrate: how many examples of the training split are read where something is measured on data; None: 256.
      sensitivity: only measure, and print, what quantising each layer would cost.
      words: ``prune``: see ``compress.prune``; ``quantize``: see ``compress.quantise``.

    Raises:
      UserError: nothing to do, a folder that is there already, or what cannot be done to this model.
    """
    given = {name: word for name, word in words.items() if word}
    if not given:
        raise UserError("--mode=compress needs to know what to do: try --prune=heads=0.25,mlp=0.5 or --quantize=int8.")
    if sensitivity and "quantize" not in given:
        raise UserError("--sensitivity measures what quantising layers costs; give --quantize=int8 too.")
    if calibrate is not None and calibrate < 1:
        raise UserError(f"--calibrate={calibrate} is a number of examples, such as 256.")
    compilation.setup()
    run = RunDir(workdir)
    run.config()
    name = "-".join(re.findall(r"[\w.]+", " ".join(f"{name} {word}" for name, word in given.items())))
    folder = pathlib.Path(os.path.expanduser(output or f"{os.path.normpath(workdir)}-{name}"))
    if folder.exists() and not (folder.is_dir() and not os.listdir(folder)):
        raise UserError(f"{folder} is there already; give --output another folder, or remove that one.")
    predictor = Predictor.open(workdir, step)
    kept: list[Mapping[str, np.ndarray]] = []
    batches = _calibration(run, predictor.config, kept, calibrate or CALIBRATE)
    found = plain(predictor)
    if "prune" in given:
        found = prune(found, str(given["prune"]), batch_spec(run), batches)
    if sensitivity:
        return quantise.sensitivity(predictor, found, str(given["quantize"]), batches)
    if "quantize" in given:
        found = quantise.quantise(predictor, found, str(given["quantize"]), batches)
    if calibrate is not None and not kept:
        raise UserError(
            f"--calibrate={calibrate} is for what is measured on data, and this is not: leave it out, or take"
            " --quantize=int8, method=gptq, or score=taylor, activation or wanda."
        )
    found.config.compression.update(given)
    with whole.folder(folder) as unfinished:
        _write(unfinished, run, predictor.step, found)
        proven = proof.prove(predictor, Predictor.open(unfinished), unfinished)
    say(f"compressed: {folder}")
    return {"compressed": str(folder), "step": predictor.step, **_short(found.about), **proof.summary(proven)}


def _short(about: Mapping[str, Any]) -> dict[str, Any]:
    """The part of it that the last line on stdout has."""
    return {name: x for name, x in about.items() if name != "kept" and (not isinstance(x, dict) or len(x) < 6)}


def _calibration(run: RunDir, config: Any, kept: list[Mapping[str, np.ndarray]], count: int) -> Batches:
    """Examples of the training split, spread evenly over it, through the evaluation transforms; they go into ``kept``
    when they are first asked for."""

    def batches() -> Sequence[Mapping[str, np.ndarray]]:
        if not kept:
            try:
                data = build(pretrained.data_of(run, config), _path="config.data").prepare(say)
            except UserError as error:
                raise UserError(f"this compression measures the model on its training data: {error}") from error
            with data.eval_batches("train", limit=count) as found:
                kept.extend(found)
        return kept

    return batches


def _write(folder: pathlib.Path, parent: RunDir, step: int, found: Compressed) -> None:
    """A run folder that has the model as its only checkpoint, of the parent's step."""
    run = RunDir(folder)
    run.write_json("config.json", as_json(found.config))
    run.write_json("data.json", parent.data_json())
    if (parent.path / "start").is_dir():  # the tokenizer that the run began from
        shutil.copytree(parent.path / "start", folder / "start")
    variables = dict(found.variables)
    if found.config.train.ema_decay is not None:
        state: dict[str, Any] = {"ema": variables}
    else:
        state = {"params": variables.pop("params"), "model_state": variables}
    lineage = parent.read_json("lineage.json")
    with run.training(step, 1, lineage.get("data") or {}):
        checkpoints = Checkpoints(run.checkpoints)
        try:
            checkpoints.save(step, state, {"data_step": step, "stopped": True})
        finally:
            checkpoints.close()
    run.ended(step, "compressed", finished=True)
    origin = {"folder": str(parent.path), "step": step, "started": lineage.get("started")}
    run.write_json("lineage.json", {**run.read_json("lineage.json"), "parent": origin, "compression": found.about})
    run.write_json(FILE, {"parent": origin, **json.loads(json.dumps(found.about))})
