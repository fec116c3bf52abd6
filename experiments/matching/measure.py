"""Time of the matching by itself, and of training steps around it, on the device and on the host.

python experiments/matching/measure.py [--repeats=15] [--only=matching|step]
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bigbase_jax import parallel
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.detr import DETR
from bigbase_jax.tasks.matching import MATCHERS
from bigbase_jax.tasks.set_prediction import SetPrediction

LAYERS, BATCH = 6, 8  # that predict, and pictures: 48 problems a step
SHAPES = [(100, 5), (100, 20), (100, 100), (300, 5), (300, 20), (300, 100)]  # queries, boxes of a picture


def timed(call, repeats):
    """(ms by the clock, ms of the processor) of a call, the medians."""
    jax.block_until_ready(call())
    found = []
    for _ in range(repeats):
        wall, cores = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        found.append((time.perf_counter() - wall, time.process_time() - cores))
    return 1e3 * np.median(found, 0)


def alone(queries, boxes, matcher, repeats):
    """Costs as DETR has them: a box's are its own, plus what all boxes pay for a query, so that some are wanted."""
    rng = np.random.default_rng(0)
    shape = (LAYERS * BATCH, boxes, queries)
    cost = rng.random(shape) + rng.random((shape[0], 1, queries)) * 3
    cost, mask = jnp.asarray(cost, jnp.float32), jnp.ones(shape[:2])
    solve = jax.jit(MATCHERS[matcher])
    return timed(lambda: solve(cost, mask), repeats)


def step(queries, boxes, matcher, repeats):
    """A small DETR whose decoder is as deep as the published one."""
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 90, (BATCH, boxes, 2))
    batch = {
        "image": rng.integers(0, 256, (BATCH, 128, 128, 3)).astype(np.uint8),
        "boxes": np.concatenate([low, low + rng.uniform(5, 38, low.shape)], -1).astype(np.float32),
        "classes": rng.integers(0, 4, (BATCH, boxes)).astype(np.int32),
        "box_mask": np.ones((BATCH, boxes), np.float32),
        "crowd": np.zeros((BATCH, boxes), np.float32),
        "mask": np.ones(BATCH, np.float32),
    }
    backbone = ConvNet(stages=(8, 16, 32, 64))
    model = DETR(4, backbone=backbone, width=64, depth=1, heads=4, mlp_dim=128, decoder_depth=LAYERS, queries=queries)
    mesh = parallel.make_mesh(1)
    program = parallel.program(SetPrediction(model, matcher=matcher), optax.sgd(1e-4), batch, mesh)
    there = parallel.put(batch, mesh)
    state = program.init(there)

    def call():
        nonlocal state
        state, sums = program.step(state, there)
        return sums

    return timed(call, repeats)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only")
    args = parser.parse_args()
    print("| what | queries | boxes | device, ms | host, ms | device, core ms | host, core ms |")
    print("|---|---|---|---|---|---|---|")
    for name, measured, shapes in (("matching", alone, SHAPES), ("step", step, SHAPES[1:2])):
        for queries, boxes in shapes if args.only in (None, name) else ():
            (a, b), (c, d) = (measured(queries, boxes, matcher, args.repeats) for matcher in ("device", "host"))
            print(f"| {name} | {queries} | {boxes} | {a:.1f} | {c:.1f} | {b:.1f} | {d:.1f} |", flush=True)


if __name__ == "__main__":
    main()
