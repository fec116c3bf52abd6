"""What lengths of batches save: ``python buckets.py ROOT LENGTH ...``, core-seconds of training, compiling, evaluating.

Both ways in turn in one process, fresh parameters, 64 steps at a time; an evaluation writes no translations.
"""

import dataclasses
import pathlib
import runpy
import sys
import time

import jax

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.evaluate import evaluate

ROUNDS, STEPS = 3, 64
root, *lengths = sys.argv[1:]
recipe = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "configs" / "translate.py"))
config = recipe["get_config"](f"root={root},vocab=4096,size=mini")
config.task.generate = False
node, mesh = build(config.data), parallel.make_mesh(1)
optimizer = build(config.optim)


def timed(name, work):
    began = time.process_time()
    found = jax.block_until_ready(work())
    spent.setdefault(name, []).append(time.process_time() - began)
    return found


ways, spent = {}, {}
for way, buckets in (("one length", ()), ("buckets", tuple(map(int, lengths)))):
    data = dataclasses.replace(node, buckets=buckets).prepare()
    task = build(config.task, data.dataset_info)
    batches = data.train_shapes()
    specs = [parallel.global_spec(batch, mesh) for batch in batches]
    shapes = jax.eval_shape(task.init, jax.random.key(0), specs[-1])["params"]
    program = parallel.program(task, optimizer.transform(shapes, 1500), specs[-1], mesh)
    step = timed(f"{way}: compile", lambda program=program, specs=specs: parallel.Steps(program, specs, mesh))
    ways[way] = [data, task, step, program.init(parallel.put(batches[-1], mesh)), parallel.eval_step(task, mesh), 0]

for round_ in range(ROUNDS):
    for way, (data, task, step, state, eval_step, positions) in ways.items():

        def train(data=data, step=step, state=state, first=round_ * STEPS):
            count = 0
            with data.train_batches(first) as stream:
                for _ in range(STEPS):
                    batch = next(stream)
                    state, _ = step(state, parallel.put(batch, mesh))
                    count += batch["source"].shape[1]
            return state, count

        ways[way][3], count = timed(f"{way}: {STEPS} steps", train)
        ways[way][5] = positions + count
        variables = ways[way][3].variables()
        timed(
            f"{way}: evaluation",
            lambda: evaluate(task, eval_step, variables, data.eval_batches("val"), mesh).metrics["loss"],  # noqa: B023
        )
for name, seconds in spent.items():
    print(f"{name}: {' '.join(f'{s:.1f}' for s in seconds)} core-seconds")
for way, parts in ways.items():
    print(f"{way}: {parts[5] / ROUNDS / STEPS:.1f} places on each side of an example")
