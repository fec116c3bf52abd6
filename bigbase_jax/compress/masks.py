"""Zeros in the kernels of a model: unstructured, or N of every M (Mishra et al. 2021), by magnitude or by Wanda.

The result has the parent's shapes and its program. XLA multiplies zeros as it does any number, so they save no time;
they are for research, for storage that compresses, and for engines that have kernels for them.

Axes: I inputs of a layer and O outputs, each of all its axes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bigbase_jax.build import suggest
from bigbase_jax.compress.compressed import Batches, Compressed, Unrolled
from bigbase_jax.compress.measured import layer_means
from bigbase_jax.core import UserError
from bigbase_jax.runtime.log import say
from bigbase_jax.wrappers.layers import layers_of
from bigbase_jax.wrappers.sparse import amount, row
from bigbase_jax.wrappers.wrapper import Path, check_regex, some_paths

SCORES = ("magnitude", "wanda")


def prune(
    found: Compressed, model: Unrolled, words: str, score: str, targets: str | None, batches: Batches
) -> Compressed:
    """Sets the kernels' least numbers to zero, the same share of each kernel.

    Args:
      words: the share, as "0.8"; or "N:M": of M inputs in a row, each output keeps N.
      score: "magnitude"; or "wanda" (Sun et al. 2023): times the norm of the input, compared within each output.
      targets: a regex over paths of parameters, searched for; None: all kernels (of N:M, those whose inputs M divides).
      batches: gives what Wanda reads.

    Raises:
      UserError: a number out of range, an unknown score, or targets that match no kernel or one that cannot be pruned.
    """
    share, pattern = amount(words, "--prune", "heads=SHARE,mlp=SHARE,layers=SHARE, channels=SHARE, SHARE and N:M")
    if score not in SCORES:
        raise UserError(f"--prune has no score={score} for masks.{suggest(score, SCORES, 'score')}")
    check_regex("--prune's targets", targets or "")
    layers = layers_of(model.task.init, jax.random.key(0), dict(model.spec))
    chosen = {path: inputs for path, inputs in layers.items() if re.search(targets or "", ".".join(path))}
    if not chosen:
        raise UserError(f"--prune's targets={targets} match no kernel; there are {some_paths(layers)}.")
    params = dict(flatten_dict(model.variables["params"]))
    if pattern is not None and (unfit := [p for p, n in chosen.items() if row(params[p].shape, n) % pattern[1]]):
        if targets is not None or len(unfit) == len(chosen):
            raise UserError(
                f"--prune={words} needs inputs that {pattern[1]} divides, and these have others: {some_paths(unfit)}."
            )
        say(f"prune: left whole, as {pattern[1]} does not divide their inputs: {some_paths(unfit)}")
        chosen = {path: inputs for path, inputs in chosen.items() if path not in unfit}
    squares = flatten_dict(layer_means(model, batches(), "squares")) if score == "wanda" else {}
    for path, inputs in chosen.items():
        kernel = np.array(params[path])
        score_OI = np.abs(kernel.reshape(-1, int(np.prod(kernel.shape[inputs:])))).T
        if score == "wanda":  # of a convolution, there is one norm for each channel
            if path not in squares:
                raise UserError(f"--prune: the training loss does not use {'.'.join(path)}; leave it out of targets.")
            norm = np.sqrt(squares[path].reshape(-1))
            score_OI = score_OI * np.tile(norm, score_OI.shape[1] // len(norm))
        groups = score_OI.reshape(-1) if pattern is None and score == "magnitude" else score_OI
        if pattern is not None:
            groups = score_OI.reshape(-1, pattern[1])
        keep_OI = largest(groups, round(share * groups.shape[-1])).reshape(score_OI.shape)
        params[path] = kernel * keep_OI.T.reshape(kernel.shape)
    pruned = sum(int((params[path] == 0).sum()) for path in chosen)
    about = {"prune": words, "score": score, "kernels": len(chosen), "zeros": pruned, "of": _size(params)}
    say(f"prune: {pruned:,} zeros in {len(chosen)} kernels, of {_size(params):,} parameters")
    variables = model.rolled({**model.variables, "params": unflatten_dict(params)})
    found.config.compression.masked = True
    return found._replace(variables=variables, about={**found.about, **about})


def largest(score: np.ndarray, less: int) -> np.ndarray:
    """bool: False at the ``less`` smallest along the last axis."""
    keep = np.ones(score.shape, bool)
    if less:
        np.put_along_axis(keep, np.argpartition(score, less - 1, axis=-1)[..., :less], False, axis=-1)
    return keep


def _size(params: Mapping[Path, Any]) -> int:
    return sum(x.size for x in params.values())
