"""Tokens per second of continuous batching, against one request after the other and transformers' ``generate``.

See README.md for the question, the command and the result.
"""

import argparse
import threading
import time

import jax
import numpy as np

from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.slots import Slots
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.runtime import compilation

SIZES = {
    "30M": {"vocab_size": 8192, "length": 1024, "width": 512, "depth": 8, "heads": 8},
    "124M": {"vocab_size": 50257, "length": 1024, "width": 768, "depth": 12, "heads": 12},
}


def measured(function, tokens):
    """(tokens per second, core-milliseconds per token) of a call that writes so many."""
    began, cores = time.perf_counter(), time.process_time()
    function()
    seconds, cores = time.perf_counter() - began, time.process_time() - cores
    return tokens / seconds, 1e3 * cores / tokens


def all_at_once(slots, prompts, params):
    """Returns when all have ended."""
    ended, left = threading.Event(), [len(prompts)]

    def told(piece):
        if piece.finish_reason is not None:
            left[0] -= 1
            if not left[0]:
                ended.set()

    for prompt in prompts:
        slots.submit(prompt, params, told)
    ended.wait()


def transformers_generate(size, prompts, count):
    """A function that continues prompts one after the other, by a model of the same size."""
    import torch
    import transformers

    config = transformers.GPT2Config(
        vocab_size=size["vocab_size"],
        n_positions=size["length"],
        n_embd=size["width"],
        n_layer=size["depth"],
        n_head=size["heads"],
    )
    model = transformers.GPT2LMHeadModel(config).eval()

    def run(threads):
        torch.set_num_threads(threads)
        with torch.no_grad():
            for prompt in prompts:
                tokens = torch.tensor(prompt[None].astype(np.int64))
                words = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
                model.generate(tokens, attention_mask=torch.ones_like(tokens), **words)

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="30M")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--few", type=int, default=4, help="requests of what goes one after the other")
    given = parser.parse_args()
    compilation.setup()
    size, random = SIZES[given.size], np.random.default_rng(0)
    model = Decoder(**size)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    engine, greedy = Engine(model, {"params": params}), SamplingParams(max_new_tokens=given.tokens)

    def drawn(count, length):
        return [random.integers(0, size["vocab_size"], length).astype(np.int32) for _ in range(count)]

    def show(what, found, base=None):
        more = "" if base is None else f"  {found[0] / base[0]:5.2f} x  {base[1] / found[1]:5.2f} x by cores"
        print(f"{what:44} {found[0]:8.1f} tokens/s {found[1]:7.2f} core-ms/token{more}", flush=True)

    def one_by_one(prompts):
        for prompt in prompts:
            engine.generate([prompt], greedy)

    few, tokens = drawn(given.few, given.prompt), given.few * given.tokens
    one_by_one(few[:1])
    theirs = transformers_generate(size, few, given.tokens)
    slots = Slots(engine, prefixes=0, places=512)
    slots.warm()
    base = measured(lambda: one_by_one(few), tokens)
    show("one after the other", base)
    for threads in (1, 2):
        found = measured(lambda threads=threads: theirs(threads), tokens)
        show(f"transformers' generate, {threads} threads", found, base)
    for clients in (1, 4, 16):
        prompts = drawn(clients, given.prompt)
        found = measured(lambda prompts=prompts: all_at_once(slots, prompts, greedy), clients * given.tokens)
        show(f"continuous batching, {clients} clients", found, base)
    show("one after the other, again", measured(lambda: one_by_one(few), tokens), base)
    slots.close()
    shared, short = drawn(1, 256)[0], SamplingParams(max_new_tokens=16)
    prompts = [np.concatenate([shared, own]) for own in drawn(16, 8)]
    for prefixes in (0, 8):
        slots = Slots(engine, prefixes=prefixes, places=512)
        found = measured(lambda slots=slots: all_at_once(slots, prompts, short), 16 * 16)
        show(f"16 prompts of 256 + 8 tokens, {prefixes} prefixes kept", found)
        slots.close()


if __name__ == "__main__":
    main()
