"""Core-seconds and wall seconds of a training step with and without privacy, here and in Opacus: one model, one batch.

python experiments/private/cost.py [STEPS]      needs torch; with Opacus installed, its steps too
"""

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


def clocked(name, step, steps, rows=ROWS):
    step()  # compiles
    times = []
    for _ in range(steps):
        wall, cores = time.perf_counter(), time.process_time()
        step()
        times.append((time.process_time() - cores, time.perf_counter() - wall))
    cores, wall = np.median(times, 0)
    print(f"{name:40} {1e6 * cores / rows:8.0f} core-us an example  {wall:7.2f} s a step", flush=True)
    return cores


def ours(batch, private, steps):
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
    program = parallel.program(task, tx, spec, mesh, numbers=optimizer.numbers(100), microbatches=SLICES)
    state = [program.init(parallel.put(batch, mesh))]

    def step():
        state[0], _ = program.step(state[0], parallel.put(batch, mesh))
        jax.block_until_ready(state[0].params)

    return clocked(f"bigbase_jax, {'DP-SGD' if private else 'SGD'}", step, steps)


def network():
    nn = torch.nn
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 8, 2, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Conv2d(16, 32, 4, 2), nn.Tanh(), nn.MaxPool2d(2, 1)),
        *(nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)),
    )


def theirs(batch, how, steps):
    torch.set_num_threads(2)
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

    return clocked(f"torch, {f'Opacus ({how})' if how else 'SGD'}", step, steps)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (ROWS, 28, 28, 1), dtype=np.uint8),
        "label": rng.integers(0, 10, ROWS).astype(np.int32),
        "mask": (np.arange(ROWS) < MEAN).astype(np.float32),
    }
    real = {name: x[:MEAN] for name, x in batch.items()}
    plain, private = ours(batch, False, steps), ours(batch, True, steps)
    print(f"privacy costs {private / plain:.2f} times the core-seconds")
    plain = theirs(real, None, steps)
    for how in ("hooks", "functorch"):
        print(f"privacy costs {theirs(real, how, steps) / plain:.2f} times")
