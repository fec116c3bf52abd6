"""Seconds per training step of the same model in transformers and PyTorch; prints one JSON line.

python theirs.py [--compile] and the arguments of ours.py
"""

import argparse
import json
import resource
import statistics
import time

import torch
import transformers

parser = argparse.ArgumentParser()
for name, value in {"depth": 6, "width": 384, "heads": 6, "vocab": 65, "length": 256, "batch": 8, "steps": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=value)
parser.add_argument("--dtype", default="float32")
parser.add_argument("--llama", action="store_true")
parser.add_argument("--compile", action="store_true")
args = parser.parse_args()

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
if device == "cpu":
    torch.set_num_threads(2)
if args.llama:
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=8 * args.width // 3,
        num_hidden_layers=args.depth,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
    )
    model = transformers.LlamaForCausalLM(config)
else:
    config = transformers.GPT2Config(
        vocab_size=args.vocab,
        n_positions=args.length,
        n_embd=args.width,
        n_layer=args.depth,
        n_head=args.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config)
model = model.to(device).train()
run = torch.compile(model) if args.compile else model
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
tokens = torch.randint(args.vocab, (args.batch, args.length + 1), device=device)
inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def step():
    with torch.autocast(device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        logits = run(input_ids=inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return loss.item()


def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


seconds, core_seconds = [], []
for i in range(args.steps + 2):
    began, before = time.perf_counter(), used()
    step()
    if i >= 2:
        seconds.append(time.perf_counter() - began)
        core_seconds.append(used() - before)
found = {
    "step_seconds": statistics.median(seconds),
    "core_seconds": statistics.median(core_seconds),
    "parameters": sum(p.numel() for p in model.parameters()),
    "tokens": args.batch * args.length,
    "torch": torch.__version__,
    "transformers": transformers.__version__,
    "device": device,
}
print(json.dumps(found))
