"""Tokens per second of greedy decoding on a CPU: ours and transformers' ``generate``, the same weights and prompts.

python experiments/decode_speed/run.py [--shapes=4x128x65,6x384x50257] [--batches=1,8] [--new=128] [--rounds=3]

The two take turns; each row gives the best round of either: tokens per second of the clock, and the core-seconds that
the process used, which other work on the machine disturbs less. Prints one JSON object a row.
"""

import argparse
import json
import os
import tempfile
import time

from bigbase_jax.runtime import memory

if __name__ == "__main__":
    memory.start_anew()  # as launch.py does

import jax
import numpy as np
import torch
import transformers

from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference.generation import Engine
from bigbase_jax.pretrained import load

PROMPT = 16


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="4x128x65,6x384x50257,12x768x50257")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    for shape in args.shapes.split(","):
        depth, width, vocab = map(int, shape.split("x"))
        theirs, engine = models(depth, width, vocab)
        for batch in map(int, args.batches.split(",")):
            print(json.dumps({"shape": shape, "batch": batch, **measure(theirs, engine, batch, args)}), flush=True)


def models(depth: int, width: int, vocab: int):
    """A random GPT-2 of so many tokens and 1,024 positions, theirs and ours."""
    torch.manual_seed(0)
    shape = {"vocab_size": vocab, "n_layer": depth, "n_embd": width, "n_head": width // 64}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, Engine(*load(folder))


def measure(theirs, engine: Engine, batch: int, args) -> dict:
    prompts = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (batch, PROMPT))
    tokens = torch.tensor(prompts)
    mask = torch.ones_like(tokens)

    def ours() -> np.ndarray:
        return np.stack(engine.generate(list(prompts.astype(np.int32)), SamplingParams(max_new_tokens=args.new)))

    def reference() -> np.ndarray:
        with torch.inference_mode():
            found = theirs.generate(
                tokens, attention_mask=mask, max_new_tokens=args.new, do_sample=False, pad_token_id=0
            )
        return found[:, PROMPT:].numpy()

    began = time.perf_counter()
    first = ours()
    compiled = time.perf_counter() - began
    same = float((first == reference()).mean())
    best, core = {"ours": np.inf, "transformers": np.inf}, {"ours": np.inf, "transformers": np.inf}
    for _ in range(args.rounds):
        for name, run in (("ours", ours), ("transformers", reference)):
            began, used = time.perf_counter(), time.process_time()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
            core[name] = min(core[name], time.process_time() - used)
    return {
        **{name: round(batch * args.new / seconds, 1) for name, seconds in best.items()},
        "ratio": round(best["transformers"] / best["ours"], 2),
        "core_seconds": {name: round(seconds, 2) for name, seconds in core.items()},
        "same_tokens": same,
        "first_call_s": round(compiled, 1),
        "load": round(os.getloadavg()[0], 1),
        "versions": [jax.__version__, torch.__version__, transformers.__version__],
    }


if __name__ == "__main__":
    main()
