"""Queries per second of an index, exact on the device and approximate, and the recall of the latter.

python experiments/retrieval/index.py --vectors=1000000 --width=64

Vectors of length 1 about 2,000 directions, as items of a catalogue are; queries are drawn as they are.
"""

import argparse
import json
import time

import numpy as np

from bigbase_jax.inference.index import Index


def drawn(random: np.random.Generator, centres: np.ndarray, count: int) -> np.ndarray:
    """f32[count, D]."""
    noise = random.standard_normal((count, centres.shape[1]), np.float32)
    found = centres[random.integers(0, len(centres), count)] + 0.7 * noise
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def rate(index: Index, queries: np.ndarray, exact: bool) -> dict[str, float]:
    """Per second of the clock, and of all cores' time."""
    index.search(queries, 10, exact)
    began, cores = time.perf_counter(), time.process_time()
    index.search(queries, 10, exact)
    wall, cpu = time.perf_counter() - began, time.process_time() - cores
    return {"per_second": len(queries) / wall, "per_core_second": len(queries) / cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--recall", type=float, default=0.99)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    centres = random.standard_normal((2000, args.width), np.float32)
    vectors, queries = drawn(random, centres, args.vectors), drawn(random, centres, 512)
    began = time.process_time()
    index = Index.build(vectors, recall=args.recall)
    found = {
        "vectors": args.vectors,
        "width": args.width,
        "build_core_seconds": time.process_time() - began,
        "cells": 0 if index.centroids is None else len(index.centroids),
        "probes": index.probes,
        "exact": rate(index, queries, True),
        "one_exact": rate(index, queries[:1], True),
        "approximate": rate(index, queries, False),
        "one_approximate": rate(index, queries[:1], False),
        "recall@10": index.recall(queries),
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
