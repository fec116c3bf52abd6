"""The other side of the comparison: this project's own pipeline, from the recipe as it stands. One JSON line.

python ours.py --data=DIR [--workers=1]
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

from bigbase_jax.build import build  # noqa: E402


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
    parser.add_argument("--data", required=True)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    found = pipeline(args.data, args.workers)
    print(json.dumps({"jax": jax.__version__, **found}))
