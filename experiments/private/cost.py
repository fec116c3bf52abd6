"""Core-seconds of a training step, and peak memory, with and without privacy, here and in Opacus: one model, one batch.

python experiments/private/cost.py [STEPS]      needs torch and opacus; each side is a process of its own, on one core
"""

import concurrent.futures
import multiprocessing
import os
import resource
import sys
import time

import jax
import numpy as np
import torch

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.wrappers.private import Mechanism, Private
from configs.private import get_config

ROWS, SLICES, MEAN, CLIP, NOISE = 2208, 8, 2048, 0.1, 1.8


def clocked(step, steps):
    """Median core-seconds and wall seconds of a step, and the process's peak memory in MB, before and after."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    step()  # compiles
    times = []
    for _ in range(steps):
        wall, cores = time.perf_counter(), time.process_time()
        step()
        times.append((time.process_time() - cores, time.perf_counter() - wall))
    return (*np.median(times, 0), before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def ours(private, steps):
    batch = drawn(ROWS if private else MEAN)
    config = get_config("epsilon=3" if private else "epsilon=none")
    task = build(config.task, {"num_classes": 10})
    if private:  # as ``planned``, without the accountant
        assert isinstance(task, Private)
        object.__setattr__(task, "mechanism", Mechanism(58_800, MEAN, ROWS, NOISE))
    mesh = parallel.make_mesh(1)
    spec = parallel.global_spec(batch, mesh)
    optimizer = build(config.optim)
    params = jax.eval_shape(task.init, jax.random.key(0), spec)["params"]
    tx = optimizer.transform(params, 100)
    program = parallel.program(task, tx, spec, mesh, numbers=optimizer.numbers(100))
    state = [program.init(parallel.put(batch, mesh))]

    def step():
        state[0], _ = program.step(state[0], parallel.put(batch, mesh))
        jax.block_until_ready(state[0].params)

    return clocked(step, steps)


def network():
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def theirs(how, steps):
    batch = drawn(MEAN)
    torch.set_num_threads(1)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 4.0, momentum=0.9)
    x = torch.tensor(batch["image"]).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.tensor(batch["label"]).long()
    loss_of = torch.nn.CrossEntropyLoss()
    if how:
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer

        model = GradSampleModule(model, force_functorch=how == "functorch")
        optimizer = DPOptimizer(optimizer, noise_multiplier=NOISE, max_grad_norm=CLIP, expected_batch_size=MEAN)

    def step():
        optimizer.zero_grad(set_to_none=True)
        for i in range(SLICES):
            loss_of(model(x[i::SLICES]), y[i::SLICES]).backward()
            if how:
                optimizer.signal_skip_step(i < SLICES - 1)
                optimizer.step()
                optimizer.zero_grad()
        if not how:
            optimizer.step()

    return clocked(step, steps)


def drawn(rows):
    """Of ``MEAN`` pictures, with padding up to ``rows``."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (rows, 28, 28, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, rows).astype(np.int32),
        "mask": (np.arange(rows) < MEAN).astype(np.float32),
    }


SIDES = {
    "bigbase_jax, SGD": (ours, False),
    "bigbase_jax, DP-SGD": (ours, True),
    "torch, SGD": (theirs, None),
    "Opacus, hooks": (theirs, "hooks"),
    "Opacus, functorch": (theirs, "functorch"),
}

if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    plain = 1.0
    for name, (side, how) in SIDES.items():
        # on a busy machine, threads that wait for one another would count as work
        own = {"initializer": os.sched_setaffinity, "initargs": (0, {min(os.sched_getaffinity(0))})}
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), **own) as pool:
            cores, wall, before, peak = pool.submit(side, how, steps).result()
        plain = plain if how else cores
        print(
            f"{name:20} {cores:6.3f} core-s a step of {MEAN}, {cores / plain:5.2f} times; {wall:6.3f} s; "
            f"{before:,.0f} MB before, {peak:,.0f} MB at most",
            flush=True,
        )
