"""``proof.json``: whether what was made of a model is still that model.

Axes: N examples of a split, of which the first n are compared output by output.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax import parallel, pretrained
from bigbase_jax.build import build
from bigbase_jax.compare import scores, statistics
from bigbase_jax.compare.comparison import LOG_LOSS, Pair
from bigbase_jax.compare.numbers import Metrics, finite
from bigbase_jax.compare.runs import SPLITS
from bigbase_jax.compare.tables import pair_row
from bigbase_jax.core import Evaluated, UserError
from bigbase_jax.data.pipeline import Prepared
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.evaluate import Split, answered_step, evaluate
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import ROWS, Predictor
from bigbase_jax.pretrained.start import chain
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.whole import written

FILE = "proof.json"
BATCHES = (1, 32)
"""Rows of a batch whose latency is measured."""
_CHOSEN = "probabilities"  # whose largest is the answer
_RESAMPLES = 2000  # of the paired bootstrap
_PROMPTS, _READ, _NEW = 8, 16, 32  # beginnings of examples, their tokens, and those that follow
_TESTED = ("low", "high", "examples", "p_bootstrap", "only_baseline_right", "only_this_right", "p_mcnemar", "verdict")


def prove(
    before: Predictor, after: Predictor, folder: pathlib.Path, allow_drop: float | None = None, limit: int = 256
) -> dict[str, Any]:
    """Compares a model with what was made of it, on the examples of the test split (else val, else train), and writes
    ``proof.json``.

    Where both give discrete outputs (classes, tags, tokens), what counts as another answer is that one of them differs;
    else, how much worse the task's first metric is.

    Args:
      before: of the run, which gives the data.
      after: what answers in its place, in any engine.
      folder: where the file goes, and whose size is that of the model afterwards, unless that is a run's.
      allow_drop: how many percent of the answers may differ, or how many percent worse the first metric may be; None:
        it is only written down.
      limit: n.

    Returns:
      What the file holds; of data that is not there, only ``missing``, sizes and latencies.

    Raises:
      UserError: more than ``allow_drop`` differs, or the disk refuses.
    """
    found: dict[str, Any] = {"step": before.step, "device": jax.devices()[0].device_kind, "allow_drop": allow_drop}
    weights = [sum(x.nbytes for x in jax.tree.leaves(p.variables)) for p in (before, after)]
    files = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    found["bytes"] = {"before": weights[0], "after": weights[1] if after.run is not before.run else files}
    examples = _zeros(before)
    data = data_of(before)
    if isinstance(data, str):
        say(f"proof: nothing could be compared: {data}")
        found["missing"] = data
    else:
        split = next(name for name in SPLITS if name in data.splits)
        examples = _examples(before, data, split, limit)
        found |= {"split": split, **_compared(before, after, examples)}
        found["metrics"] = _metrics(before, *(_evaluated(p, data, split) for p in (before, after)))
        if (generated := _written(before, after, examples)) is not None:
            found["written"] = generated
    found |= _costs(before, after, examples)
    if allow_drop is not None:
        _refuse(before, found, allow_drop)
    with written(folder / FILE) as file:
        file.write(json.dumps(found, indent=2).encode())
    return found


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a proof that the last line on stdout has."""
    short = {name: found[name] for name in ("missing", "same_answers", "largest_difference") if name in found}
    return short | ({"same_tokens": found["written"]["same_tokens"]} if "written" in found else {})


def some_examples(predictor: Predictor, limit: int) -> dict[str, np.ndarray] | None:
    """Examples of a model's data [n, ...], or one of zeros where that is not there; None: it answers no inputs."""
    data = data_of(predictor)
    if not isinstance(data, str):
        return _examples(predictor, data, next(name for name in SPLITS if name in data.splits), limit)
    try:
        _ = predictor.reading
    except UserError:
        return None
    return _zeros(predictor)


def data_of(before: Predictor) -> Prepared | str:
    """The run's data, or why it is not there."""
    if before.run is None or before.config is None:
        return "the model is of no run, and so has no data."
    try:
        node = pretrained.data_of(before.run, before.config)
        if "buckets" in node:  # other engines take one length
            node = node.copy_and_resolve_references()
            node.buckets = ()
        prepared: Prepared = build(node, _path="config.data").prepare(say)
        return prepared
    except UserError as error:
        return str(error)


def _zeros(before: Predictor) -> dict[str, np.ndarray]:
    return {name: np.zeros((1, *x.shape), x.dtype) for name, x in before.spec.items()}


def _examples(before: Predictor, data: Prepared, split: str, limit: int) -> dict[str, np.ndarray]:
    """The first n examples, as the model reads them: [n, ...] by name."""
    parts: list[dict[str, np.ndarray]] = []
    with data.eval_batches(split, (0, 1)) as batches:
        for batch in itertools.islice(batches, math.ceil(limit / data.eval_batch_size)):
            real = batch["mask"] > 0
            parts.append({name: batch[name][real] for name in before.task.inputs})
    return {name: np.concatenate([part[name] for part in parts])[:limit] for name in before.task.inputs}


def _outputs(predictor: Predictor, variables: Any, examples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What the model gives of n examples, by batches of one size."""
    parts = []
    count = len(next(iter(examples.values())))
    for start in range(0, count, ROWS):
        at = np.minimum(np.arange(start, start + ROWS), count - 1)
        batch = {name: x[at] for name, x in examples.items()}
        parts.append(jax.device_get(dict(predictor.program(variables, batch))))
    return {name: np.concatenate([part[name] for part in parts])[:count] for name in parts[0]}


def _compared(before: Predictor, after: Predictor, examples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Differences of the outputs, and the share of examples whose answers are the same."""
    a, b = (_outputs(p, p.variables, examples) for p in (before, after))
    shared = [name for name in a if name in b and a[name].shape == b[name].shape]
    outputs: dict[str, dict[str, float | None]] = {}
    for name in shared:
        if np.issubdtype(a[name].dtype, np.floating):
            with np.errstate(invalid="ignore"):
                apart = np.abs(a[name].astype(np.float64) - b[name].astype(np.float64))
            apart[(a[name] == b[name]) | (np.isnan(a[name]) & np.isnan(b[name]))] = 0  # also where both are infinite
            outputs[name] = {"largest": finite(float(apart.max())), "mean": finite(float(apart.mean()))}
    differing = [x["largest"] for x in outputs.values()]
    found: dict[str, Any] = {
        "examples": len(next(iter(a.values()))),
        "outputs": outputs,
        "largest_difference": max(x or 0.0 for x in differing) if differing and None not in differing else None,
    }
    said = [{name: x for name, x in _answers(y).items() if name in shared} for y in (a, b)]
    if said[0]:
        blank = _answers(_outputs(before, jax.tree.map(jnp.zeros_like, before.variables), examples))
        copied = [name for name in said[0] if name != _CHOSEN and np.array_equal(said[0][name], blank[name])]
        if len(copied) < len(said[0]):  # what is the same of a model of zeros is no choice
            same = [(said[0][name] == said[1][name]).reshape(found["examples"], -1).all(1) for name in said[0]]
            found["same_answers"] = float(np.logical_and.reduce(same).mean())
    return found


def _answers(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs that are choices: classes, tags, tokens."""
    found = {name: x for name, x in outputs.items() if x.dtype == bool or np.issubdtype(x.dtype, np.integer)}
    if "guess" in found:  # the likeliest tokens in order, of which the first is the answer
        found["guess"] = found["guess"][..., 0]
    if _CHOSEN in outputs:
        found[_CHOSEN] = outputs[_CHOSEN].argmax(-1)
    return found


def _evaluated(predictor: Predictor, data: Prepared, split: str) -> Evaluated:
    mesh = predictor.mesh or parallel.make_mesh(1)
    if predictor.compute is None:
        return Split(split).run(predictor.task, predictor.variables, data, mesh)
    *_, inner = chain(predictor.task)
    step = answered_step(inner, predictor.compute, mesh)
    batches = data.eval_batches(split, parallel.host(mesh))
    return evaluate(inner, step, predictor.variables, batches, mesh, split)


def _metrics(before: Predictor, a: Evaluated, b: Evaluated) -> dict[str, dict[str, Any]]:
    """Each metric before and after; where examples have a score of it, with the paired tests."""
    known = Metrics(before.task.metrics)
    numbers = [{k: v for k, x in e.metrics.items() if (v := finite(x)) is not None} for e in (a, b)]
    scored = [scores.of_arrays(e.examples)[0] for e in (a, b)]  # both are in the order of the split
    found = {}
    for name in [name for name in dict.fromkeys((*known, *numbers[0])) if name in numbers[0] and name in numbers[1]]:
        pair = Pair("before", "after", name, numbers[0][name], numbers[1][name], known[name].better)
        key = LOG_LOSS if name == "loss" and name not in scored[0] else name
        if key in scored[0] and key in scored[1]:
            pair = _paired(pair, scored[0][key], scored[1][key], len(next(iter(a.examples.values()))))
        row = pair_row(pair)
        found[name] = {
            "before": pair.a,
            "after": pair.b,
            **{key: row[key] for key in _TESTED if row[key] is not None},
        }
    return found


def _paired(pair: Pair, a: scores.Score, b: scores.Score, number: int) -> Pair:
    """With the tests on these examples, where the scores are what was measured."""
    everything = np.ones((1, number))
    if not np.allclose([a.sample(everything)[0], b.sample(everything)[0]], [pair.a, pair.b], rtol=1e-3, atol=1e-6):
        return pair  # a loss of another kind
    difference_R = np.diff(statistics.resampled([a.sample, b.sample], number, _RESAMPLES))[:, 0]
    low, high = statistics.percentiles(difference_R)
    p = statistics.bootstrap_p(difference_R)
    right = a.right_N, b.right_N
    mcnemar = None if right[0] is None or right[1] is None else statistics.mcnemar(right[0], right[1])
    tested = {"mcnemar": mcnemar, "mcnemar_holm": None if mcnemar is None else mcnemar.p}
    return dataclasses.replace(pair, examples=number, low=low, high=high, p=p, p_holm=p, **tested)  # type: ignore[arg-type]


def writes(predictor: Predictor) -> bool:
    """Whether the model continues texts."""
    *_, task = chain(predictor.task)
    return hasattr(vars(task).get("model"), "decode") and hasattr(task, "log_probability")


def _written(before: Predictor, after: Predictor, examples: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """What share of the tokens is the same that both write greedily after the beginnings of some examples; None: they
    continue no texts, or what was made is only asked for ``Task.predict``."""
    if after.task is before.task or not writes(before):
        return None
    tokens_NL = examples[before.task.inputs[0]][:_PROMPTS]
    prompts = list(tokens_NL[:, : max(1, min(_READ, tokens_NL.shape[1] // 2))].astype(np.int32))
    params = SamplingParams(max_new_tokens=min(_NEW, tokens_NL.shape[1] - len(prompts[0])))
    pairs = list(zip(*(Engine.of(p).generate(prompts, params) for p in (before, after)), strict=True))
    same = sum(int(np.sum(a[: len(b)] == b[: len(a)])) for a, b in pairs)
    total = sum(max(len(a), len(b)) for a, b in pairs)
    return {"prompts": len(prompts), "tokens": total, "same_tokens": same / total if total else 1.0}


def _costs(
    before: Predictor, after: Predictor, examples: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict[str, float]]]:
    """By number of rows, the median time of a batch, by turns; and of the first, what XLA's program holds at once:
    weights, inputs, outputs and all between."""
    latency: dict[str, dict[str, float]] = {}
    memory: dict[str, float] = {}
    for rows in BATCHES:
        batch, calls = {name: np.resize(x, (rows, *x.shape[1:])) for name, x in examples.items()}, []
        for p, side in ((before, "before"), (after, "after")):
            program: Any = p.program
            if p.compute is None and rows == BATCHES[0]:
                program = program.lower(p.variables, batch).compile()
                stats = program.memory_analysis()
                sizes = (stats.argument_size_in_bytes, stats.output_size_in_bytes, stats.temp_size_in_bytes)
                memory[side] = float(sum(sizes))
            calls.append(functools.partial(program, p.variables, batch))
        seconds = timed(calls)
        latency[str(rows)] = {"before": 1e3 * float(np.median(seconds[0])), "after": 1e3 * float(np.median(seconds[1]))}
    return {"latency_ms": latency, "memory_bytes": {str(BATCHES[0]): memory}}


def timed(calls: Sequence[Callable[[], Any]], seconds: float = 1.0, most: int = 30) -> list[list[float]]:
    """Seconds of each call from numpy arrays to numpy arrays, by turns, after one call each that compiles.

    Args:
      seconds: that each may take in all, but for one call.
      most: how often each is called.
    """
    found: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.device_get(call())
    for _ in range(most):
        for call, times in zip(calls, found, strict=True):
            began = time.perf_counter()
            jax.device_get(call())
            times.append(time.perf_counter() - began)
        if sum(map(sum, found)) > seconds * len(calls):
            break
    return found


def _refuse(before: Predictor, found: dict[str, Any], allowed: float) -> None:
    """Raises UserError where more differs than is allowed, or the outputs are no numbers; else writes ``drop`` down."""
    outputs = found.get("outputs", {})
    if bad := [name for name, x in outputs.items() if x["largest"] is None]:
        raise UserError(f"{', '.join(bad)} of what was made of the model is not finite; nothing was written.")
    if "same_answers" in found:
        drop, what = 100 * (1 - found["same_answers"]), f"the answers to {found['examples']:,} examples of"
    else:
        known = before.task.metrics
        name = next((name for name in found.get("metrics", {}) if name in known and known[name].better), None)
        if name is None:
            return
        a, b = (found["metrics"][name][side] for side in ("before", "after"))
        worse = b - a if known[name].better == "min" else a - b
        drop, what = 100 * worse / (1.0 if known[name].unit == "%" else max(abs(a), 1e-12)), f"{name} on"
    found["drop"] = drop
    if drop > allowed:
        raise UserError(
            f"{what} {found['split']} differ from the run's by {drop:.3g} %, and --allow_drop is {allowed:g}: nothing"
            f" was written; give --allow_drop={math.ceil(drop)} if that is good enough."
        )
