"""``--mode=benchmark``: how long a model takes for batches of so many rows, and what it needs."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bigbase_jax.compare.numbers import si
from bigbase_jax.compare.tables import show_table
from bigbase_jax.core import UserError
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.export import proof
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pretrained.start import merged, model_of
from bigbase_jax.runtime import compilation
from bigbase_jax.runtime.log import memory_gb, say

_SECONDS, _CALLS = 3.0, 200  # of measuring a batch, at most
_PROMPT, _NEW = 16, 64  # tokens that a decoder is given and writes


def benchmark(
    workdir: str, step: int | None = None, engine: str = "jax", batch: Sequence[str] = ("1", "8", "32")
) -> dict[str, Any]:
    """Measures a run or a published folder, prints a table and returns its rows.

    A call takes numpy arrays and gives numpy arrays, of examples of the data where that is there, else of zeros. Each
    batch size is compiled and called once before it is measured. Decoders write beside that, greedily and without an
    end, ``tokens_per_second`` over all rows.

    Args:
      batch: numbers of rows.

    Returns:
      Milliseconds ``p50`` and ``p99`` of a call and ``rows_per_second`` by number of rows; ``memory_gb``, the peak of
      the devices, or of the process where that is the CPU's; ``bytes`` of the weights, and ``disk_bytes`` of their
      folder.

    Raises:
      UserError: there is no such model or engine, or a number of rows is none.
    """
    sizes = [int(rows) if rows.isdecimal() else 0 for rows in batch]
    if not sizes or min(sizes) < 1:
        raise UserError(f"--batch={','.join(batch)} is not a list of numbers of rows, such as 1,8,32.")
    compilation.setup()
    predictor = Predictor.open(workdir, step, engine=engine)
    found: dict[str, dict[str, float]] = {}
    examples = proof.some_examples(predictor, max(sizes))
    say("benchmark: each size is compiled and called once, then measured")
    for rows in sizes:
        row = found[str(rows)] = {}
        if examples is not None:
            inputs = {name: np.resize(x, (rows, *x.shape[1:])) for name, x in examples.items()}
            call = functools.partial(predictor.program, predictor.variables, inputs)
            (seconds,) = proof.timed([call], _SECONDS, _CALLS)
            row |= {name: 1e3 * float(np.quantile(seconds, q)) for name, q in (("p50", 0.5), ("p99", 0.99))}
            row |= {"calls": len(seconds), "rows_per_second": rows / float(np.median(seconds))}
        if (rate := _written(predictor, rows)) is not None:
            row["tokens_per_second"] = rate
    columns = [
        "p50 ms",
        "p99 ms",
        "rows/s",
        *(["tokens/s"] if any("tokens_per_second" in r for r in found.values()) else []),
    ]
    names = ("p50", "p99", "rows_per_second", "tokens_per_second")[: len(columns)]
    cells = [[rows, *(si(row[name]) if name in row else "–" for name in names)] for rows, row in found.items()]
    device = jax.devices()[0].device_kind
    show_table(f"{workdir} with {engine} on {device}", "batch", columns, cells)
    folder = pathlib.Path(workdir)
    if predictor.run is not None:
        folder = predictor.run.checkpoints / str(predictor.step)
    return {
        "benchmark": workdir,
        "engine": engine,
        "device": device,
        "step": predictor.step,
        "batch": found,
        "memory_gb": round(memory_gb(), 3),
        "bytes": sum(x.nbytes for x in jax.tree.leaves(predictor.variables)),
        "disk_bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
    }


def _written(predictor: Predictor, rows: int) -> float | None:
    """Tokens that a decoder writes in a second; None: it is none."""
    if not proof.writes(predictor):
        return None
    _, model = model_of(predictor.task)
    engine = Engine(model, merged(predictor.task, predictor.variables))
    length = getattr(model, "length", None) or _PROMPT + _NEW
    prompt = np.ones(min(_PROMPT, length // 2), np.int32)
    params = SamplingParams(max_new_tokens=min(_NEW, length - len(prompt)))
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        tokens = engine.generate([prompt] * rows, params)
        seconds = time.perf_counter() - began
    return sum(map(len, tokens)) / seconds
