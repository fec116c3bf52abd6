"""The same model, data and schedule in plain PyTorch: a whole run of 2,000 steps, evaluated as often as ours.

python pytorch.py --text=DATA/tiny_shakespeare/input.txt [--compile]

Prints one JSON line: validation loss in nats per character, wall seconds and core-seconds of the whole process.
"""

import argparse
import json
import math
import pathlib
import resource
import time

import torch
from torch import nn
from torch.nn import functional as F

DEPTH, HEADS, WIDTH, LENGTH, BATCH, STEPS, WARMUP, RATE = 4, 4, 128, 64, 12, 2000, 100, 1e-3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, 1e-6), nn.LayerNorm(WIDTH, 1e-6)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocab_size, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks, self.norm = nn.Sequential(*[Block() for _ in range(DEPTH)]), nn.LayerNorm(WIDTH, 1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.embedding.weight.T


def windows(data, starts):
    at = torch.as_tensor(starts)[:, None] + torch.arange(LENGTH)
    return data[at], data[at + 1]


@torch.no_grad()
def evaluate(model, data):
    starts = range(0, len(data) - LENGTH, LENGTH)
    total = count = 0
    for first in range(0, len(starts), 128):
        tokens, targets = windows(data, starts[first : first + 128])
        total += F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += targets.numel()
    return total / count


def rate(step):
    if step < WARMUP:
        return step / WARMUP
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", required=True)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    text = pathlib.Path(args.text).read_text("utf-8")
    symbols = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([symbols[c] for c in text])
    train, val = data[: int(0.9 * len(data))], data[int(0.9 * len(data)) :]
    model = Model(len(symbols))
    step_of = torch.compile(model) if args.compile else model
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for step in range(1, STEPS + 1):
        tokens, targets = windows(train, torch.randint(len(train) - LENGTH, (BATCH,)))
        loss = F.cross_entropy(step_of(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 0:
            losses.append(evaluate(step_of, val))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "val_loss": losses,
                "parameters": sum(p.numel() for p in model.parameters()),
                "seconds": time.perf_counter() - began,
                "core_seconds": used.ru_utime + used.ru_stime,
                "torch": torch.__version__,
            }
        )
    )
