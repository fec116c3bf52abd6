"""What 16 runs of the perceptron cost as one population and one after the other: steps alone, and whole loops.

    taskset -c 0 python experiments/population/measure.py

Steps: both ways run in this process, in turns, on batches that lie ready. Loops: ``train.train`` and
``population.train``, with their input pipeline, each with few and with many steps; the difference is what the steps in
between cost, without starting and compiling. Figures are processor time, which other work on the machine touches less
than the clock; on one core they are the time it takes.
"""

import argparse
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import pathlib
import tempfile
import time

import jax

from bigbase_jax import parallel
from bigbase_jax import train as training
from bigbase_jax.build import build
from bigbase_jax.sweep import population

RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "catdog_mlp.py"


def recipe():
    """The perceptron as it is, without what costs beside the training."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.train.update(epochs=None, steps=1, writers=(), best_metric=None, eval_every=10**6, checkpoint_every=10**6)
    return config


def of_steps(config, members: int, steps: int, rounds: int) -> dict[str, float]:
    """Processor seconds of a step: of all members together, of all in turn, of one alone; the least of the rounds."""
    optimizer = build(config.optim)
    data = build(config.data).prepare()
    task = build(config.task, data.dataset_info)
    mesh = parallel.make_mesh(1)
    with contextlib.closing(data.train_batches(0, parallel.host(mesh))) as stream:
        ready = [parallel.put(batch, mesh) for batch in itertools.islice(stream, 32)]
    shapes = jax.eval_shape(task.init, jax.random.key(0), ready[0])["params"]
    tx = optimizer.transform(shapes, 10**6)
    init, together = population.program(task, tx, range(members))
    _, in_turn = population.program(task, tx, range(members), at_once=1)
    alone = parallel.program(task, tx, jax.eval_shape(lambda x: x, ready[0]), mesh)
    ways = {"together": together, "in_turn": in_turn, "alone": alone.step}
    states = {"together": init(ready[0]), "in_turn": init(ready[0]), "alone": alone.init(ready[0])}
    least: dict[str, float] = {}
    for _ in range(rounds + 1):  # the first compiles
        for name, one in ways.items():
            began = time.process_time()
            for batch in itertools.islice(itertools.cycle(ready), steps):
                states[name], _ = one(states[name], batch)
                jax.block_until_ready(states[name])
            seconds = (time.process_time() - began) / steps
            least[name] = min(least.get(name, seconds), seconds)
    return least


def of_loops(config, members: int, few: int, many: int) -> dict[str, float]:
    """Processor seconds of a step within the whole loop."""

    def alone(steps: int) -> None:
        config.train.steps = steps
        with tempfile.TemporaryDirectory() as folder:
            training.train(config, folder)

    def population_of(at_once: int, steps: int) -> None:
        config.train.steps = steps
        population.train(config, range(members), evaluated=False, at_once=at_once)

    ways = {
        "together": functools.partial(population_of, members),
        "in_turn": functools.partial(population_of, 1),
        "alone": alone,
    }
    found = {}
    for name, run in ways.items():
        spent = []
        for steps in (few, few, many):  # the first fills caches
            began = time.process_time()
            run(steps)
            spent.append(time.process_time() - began)
        found[name] = (spent[2] - spent[1]) / (many - few)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--members", type=int, default=16)
    args = parser.parse_args()
    jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp())
    result = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "members": args.members}
    for kind, seconds in (
        ("step", of_steps(recipe(), args.members, 40, 5)),
        ("loop", of_loops(recipe(), args.members, 50, 450)),
    ):
        result[kind] = {
            "processor_ms": {name: round(1e3 * spent, 3) for name, spent in seconds.items()},
            "times_faster": {
                name: round(args.members * seconds["alone"] / seconds[name], 2) for name in ("together", "in_turn")
            },
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
