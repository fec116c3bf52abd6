"""The other side of the comparison: this project's own step and pipeline, from the recipe as it stands. One JSON line.

python ours.py --what=step --batch=4
python ours.py --what=pipeline --data=DIR [--workers=1]
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import jax

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "configs"))

import catdog_cnn  # noqa: E402

from bigbase_jax import parallel  # noqa: E402
from bigbase_jax.build import build  # noqa: E402


def step(batch_size, steps):
    config = catdog_cnn.get_config()
    task = build(config.task, {"num_classes": 2})
    tx = build(config.optim)
    mesh = parallel.make_mesh()
    batch = {
        "image": jax.random.randint(jax.random.key(0), (batch_size, 224, 224, 3), 0, 256).astype("uint8"),
        "label": jax.random.randint(jax.random.key(1), (batch_size,), 0, 2),
        "mask": jax.numpy.ones(batch_size),
    }
    batch = parallel.put(jax.device_get(batch), mesh)
    tx = tx.transform(jax.eval_shape(task.init, jax.random.key(0), batch)["params"], 1000)
    program = parallel.program(task, tx, jax.eval_shape(lambda x: x, batch), mesh)
    state, compiled = program.init(batch), program.step
    seconds = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        state, sums = compiled(state, batch)
        float(sums["loss"].total)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - began)
    return {"step_seconds": sorted(seconds[2:])[steps // 2]}


def pipeline(root, workers):
    """Images/s of the first pass over the files (decoded and cached on the way) and of later ones."""
    config = catdog_cnn.get_config(f"data=folder,root={root}")
    config.data.workers = workers
    rates = []
    with tempfile.TemporaryDirectory() as cache:
        config.data.cache_dir = cache
        began = time.perf_counter()
        data = build(config.data).prepare(lambda line: None)
        prepare_seconds = time.perf_counter() - began
        count = data.num_examples("train")
        files = sum(data.splits.values())
        for _ in range(3):
            began = time.perf_counter()
            with data.train_batches(0) as batches:
                for _ in range(count // data.batch_size):
                    next(batches)
            rates.append(count / (time.perf_counter() - began))
    cold = count / (prepare_seconds * count / files + count / rates[0])
    return {"images_per_second": [cold, *rates[1:]], "prepare_seconds": prepare_seconds, "files": files}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--what", choices=["step", "pipeline"], required=True)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--data")
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    found = step(args.batch, args.steps) if args.what == "step" else pipeline(args.data, args.workers)
    print(json.dumps({"jax": jax.__version__, **found}))
