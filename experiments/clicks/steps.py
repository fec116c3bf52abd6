"""A training step of DLRM on random rows: all rows of the tables or those that the batch reads, and torch (eager).

python experiments/clicks/steps.py ROWS [STEPS]     one line of JSON for each way: ms per step, wall and processor; MB
"""

import itertools
import json
import resource
import subprocess
import sys
import time

import numpy as np

COLUMNS, NUMBERS, BATCH, WIDTH, BOTTOM, TOP = 26, 13, 4096, 16, (64, 32), (128, 64)
WAYS = ("dense", "lazy", "torch dense", "torch sparse")


def batches(rows):
    """Columns of equal size, ``rows`` in all; the cube of a uniform number: few are read often, as clicks are."""
    random = np.random.default_rng(0)
    while True:
        codes = random.random((BATCH, COLUMNS)) ** 3 * (rows // COLUMNS)
        yield {
            "numbers": random.normal(size=(BATCH, NUMBERS)).astype(np.float32),
            "categories": codes.astype(np.int32),
            "label": random.integers(0, 2, BATCH).astype(np.int32),
            "mask": np.ones(BATCH, np.float32),
        }


def ours(rows, lazy):
    import jax
    import optax

    from bigbase_jax import parallel
    from bigbase_jax.models.clicks import DLRM
    from bigbase_jax.tasks.tabular import TabularClassification

    model = DLRM(2, (rows // COLUMNS,) * COLUMNS, WIDTH, BOTTOM, TOP)
    task, mesh, source = TabularClassification(model=model), parallel.make_mesh(1), batches(rows)
    first = next(source)
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in first.items()}
    program = parallel.program(task, optax.adam(1e-3), spec, mesh, lazy_tables=lazy)
    state = program.init(parallel.put(first, mesh))

    def step(batch):
        nonlocal state
        state, sums = program.step(state, parallel.put(batch, mesh))
        return float(sums["loss"].mean())

    return step


def theirs(rows, sparse):
    """DLRM in torch, one table for all columns; Adam of all rows, or torch's SparseAdam."""
    import torch

    torch.manual_seed(0)
    table = torch.nn.Embedding(rows, WIDTH, sparse=sparse)
    torch.nn.init.uniform_(table.weight, -((COLUMNS / rows) ** 0.5), (COLUMNS / rows) ** 0.5)

    def layers(*widths):
        pairs = [(torch.nn.Linear(a, b), torch.nn.ReLU()) for a, b in itertools.pairwise(widths)]
        return torch.nn.Sequential(*(layer for pair in pairs for layer in pair))

    bottom = layers(NUMBERS, *BOTTOM, WIDTH)
    top = torch.nn.Sequential(layers(WIDTH + (COLUMNS + 1) * COLUMNS // 2, *TOP), torch.nn.Linear(TOP[-1], 1))
    rest = [*bottom.parameters(), *top.parameters()]
    optimizers = (
        [torch.optim.SparseAdam(table.parameters(), 1e-3), torch.optim.Adam(rest, 1e-3)]
        if sparse
        else [torch.optim.Adam([*table.parameters(), *rest], 1e-3)]
    )
    offset, pairs = torch.arange(COLUMNS) * (rows // COLUMNS), torch.tril_indices(COLUMNS + 1, COLUMNS + 1, -1)

    def step(batch):
        batch = {name: torch.from_numpy(x) for name, x in batch.items()}
        numbers = bottom(batch["numbers"])
        vectors = torch.cat([numbers[:, None], table(batch["categories"].long() + offset)], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))[:, pairs[0], pairs[1]]
        z = top(torch.cat([numbers, products], 1))[:, 0]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(z, batch["label"].float())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss.item()

    return step


def measure(rows, way, count):
    step = (theirs if "torch" in way else ours)(rows, way in ("lazy", "torch sparse"))
    source = batches(rows)
    given = [next(source) for _ in range(4)]
    for batch in given[:3]:
        step(batch)
    wall, cpu = time.perf_counter(), time.process_time()
    for i in range(count):
        loss = step(given[i % 4])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found = {"rows": rows, "way": way, "ms": wall / count * 1e3, "cpu_ms": cpu / count * 1e3, "peak_mb": peak}
    print(json.dumps({name: round(x, 1) if isinstance(x, float) else x for name, x in found.items()}), flush=True)
    assert np.isfinite(loss)


if __name__ == "__main__":
    rows, count = int(float(sys.argv[1])), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    if len(sys.argv) > 3:
        measure(rows, sys.argv[3], count)
    else:
        for way in WAYS:  # each in a process of its own, for the peak of its memory
            subprocess.run([sys.executable, __file__, str(rows), str(count), way], check=True)
