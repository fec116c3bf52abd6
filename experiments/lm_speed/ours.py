"""Seconds per training step of a GPT-2-shaped model here; prints one JSON line.

python ours.py [--depth=6 --width=384 --heads=6 --vocab=65 --length=256 --batch=8 --steps=8 --dtype=float32]
"""

import argparse
import json
import resource
import statistics
import time

import jax
import numpy as np
import optax

from bigbase_jax import parallel
from bigbase_jax.models import transformer
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.optim import Optimizer
from bigbase_jax.runtime import memory
from bigbase_jax.tasks.language import CausalLanguageModel

parser = argparse.ArgumentParser()
for name, value in {"depth": 6, "width": 384, "heads": 6, "vocab": 65, "length": 256, "batch": 8, "steps": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=value)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--llama", action="store_true", help="Llama's shape, with the same numbers")
args = parser.parse_args()
memory.keep_freed()  # as launch.py does

LLAMA = {
    "positions": "rope",
    "style": transformer.LLAMA,
    "mlp_dim": 8 * args.width // 3,
    "tied": False,
}
model = Decoder(
    args.vocab,
    args.length,
    args.width,
    args.depth,
    args.heads,
    dtype=args.dtype,
    **(LLAMA if args.llama else {"style": transformer.Style(activation="gelu_tanh")}),
)
task = CausalLanguageModel(model)
optimizer = Optimizer(
    3e-4, optax.adamw, weight_decay=0.1, decay_mask="kernel$|embedding$|position$|head$", clip_norm=1.0
)
tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length + 1), np.int32)
ones = np.ones((args.batch, args.length), np.int32)
batch = {
    "inputs": tokens[:, :-1],
    "targets": tokens[:, 1:],
    "segment_ids": ones,
    "positions": ones * np.arange(args.length, dtype=np.int32),
    "bytes": ones,
    "mask": np.ones(args.batch, np.float32),
}
spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
mesh = parallel.make_mesh(1)
params = jax.eval_shape(task.init, jax.random.key(0), spec)["params"]
program = parallel.program(task, optimizer.transform(params, 1000), spec, mesh, numbers=optimizer.numbers(1000))
state, batch = program.init(parallel.put(batch, mesh)), parallel.put(batch, mesh)
step = program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile()


def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


seconds, core_seconds = [], []
for i in range(args.steps + 2):
    began, before = time.perf_counter(), used()
    state, sums = step(state, batch)
    jax.block_until_ready((state, sums))
    if i >= 2:
        seconds.append(time.perf_counter() - began)
        core_seconds.append(used() - before)
found = {
    "step_seconds": statistics.median(seconds),
    "core_seconds": statistics.median(core_seconds),
    "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "tokens": args.batch * args.length,
    "flops": parallel.flops(step),
    "jax": jax.__version__,
    "device": jax.devices()[0].device_kind,
}
print(json.dumps(found))
