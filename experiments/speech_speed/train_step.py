"""A training step of Conformer-S (Gulati et al. 2020), here and in torch, in turns in one process.

PYTHONPATH=. python experiments/speech_speed/train_step.py --depth=16 --rounds=5

torch's blocks are transformers' Wav2Vec2ConformerEncoderLayer; the subsampling, the head and AdamW are torch's own.
Both have relative positions; ours is timed with rotary ones as well. Core-seconds are those of the process, user and
system.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as published

from bigbase_jax.models.conformer import Conformer

WIDTH, HEADS, KERNEL, MELS, LABELS = 144, 4, 31, 80, 30


class Torch(torch.nn.Module):
    def __init__(self, depth):
        super().__init__()
        config = published.Wav2Vec2ConformerConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            intermediate_size=4 * WIDTH,
            conv_depthwise_kernel_size=KERNEL,
            hidden_act="swish",
        )
        config._attn_implementation = "eager"
        conv = torch.nn.Conv2d
        self.sub = torch.nn.Sequential(
            conv(1, WIDTH, 3, 2, 1), torch.nn.ReLU(), conv(WIDTH, WIDTH, 3, 2, 1), torch.nn.ReLU()
        )
        self.project = torch.nn.Linear(WIDTH * MELS // 4, WIDTH)
        self.where = published.Wav2Vec2ConformerRelPositionalEmbedding(config)
        self.blocks = torch.nn.ModuleList(published.Wav2Vec2ConformerEncoderLayer(config) for _ in range(depth))
        self.head = torch.nn.Linear(WIDTH, LABELS)

    def forward(self, x):
        y = self.sub(x[:, None])
        y = self.project(y.transpose(1, 2).flatten(2))
        where = self.where(y)
        for block in self.blocks:
            y = block(y, relative_position_embeddings=where)
        return self.head(y)


def ours(depth, positions, x, labels):
    model = Conformer(WIDTH, depth, HEADS, KERNEL, positions=positions)
    lengths = jnp.full(len(x), x.shape[1])
    variables = jax.jit(model.init)(jax.random.key(0), x, lengths)
    params = {**variables["params"], "head": 0.05 * jax.random.normal(jax.random.key(1), (WIDTH, LABELS))}
    optimizer = optax.adamw(1e-3)

    @jax.jit
    def step(state, key):
        params, stats, opt = state

        def loss(params):
            given = {"params": {k: v for k, v in params.items() if k != "head"}, "batch_stats": stats}
            (h, _), new = model.apply(given, x, lengths, True, rngs={"dropout": key}, mutable=["batch_stats"])
            nats = optax.softmax_cross_entropy_with_integer_labels(h @ params["head"], labels)
            return nats.mean(), new["batch_stats"]

        (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = optimizer.update(grads, opt, params)
        return optax.apply_updates(params, updates), stats, opt

    kept = [params, variables["batch_stats"], optimizer.init(params)]

    def run(n):
        kept[:] = jax.block_until_ready(step(tuple(kept), jax.random.key(n)))

    return run


def torchs(depth, x, labels):
    torch.manual_seed(0)
    model = Torch(depth).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    x, labels = torch.from_numpy(np.array(x)), torch.from_numpy(np.array(labels)).long()

    def run(_):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8.0)
    args = parser.parse_args()
    frames = round(args.seconds * 25) * 4
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(args.batch, frames, MELS)).astype(np.float32))
    labels = jnp.asarray(rng.integers(0, LABELS, (args.batch, frames // 4)))
    torch.set_num_threads(2)
    runs = {
        "torch, relative": torchs(args.depth, x, labels),
        "ours, relative": ours(args.depth, "relative", x, labels),
        "ours, rope": ours(args.depth, "rope", x, labels),
    }
    times = {name: [] for name in runs}
    for run in runs.values():
        run(0)
    for n in range(args.rounds):
        for name, run in runs.items():
            wall, core = time.perf_counter(), time.process_time()
            run(n + 1)
            times[name].append((time.perf_counter() - wall, time.process_time() - core))
    base = np.median(times["torch, relative"], 0)
    for name, some in times.items():
        wall, core = np.median(some, 0)
        print(
            f"{name}: {wall:.3f} s, {core:.3f} core-seconds; {base[0] / wall:.2f}x, {base[1] / core:.2f}x", flush=True
        )


if __name__ == "__main__":
    main()
