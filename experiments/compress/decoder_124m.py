"""Tokens per second of a decoder of 124 M parameters (GPT-2's shape, random weights, greedy, with its cache) on a CPU.

python experiments/compress/decoder_124m.py --make --folder=DIR                    # writes the model in every form
python experiments/compress/decoder_124m.py --folder=DIR [--engines=jax,float32,int8,transformers,llama] [--batches=1,8]

Engines: ``jax`` (float32 by XLA), ``float32`` and ``int8`` (what ``--to=onnx`` writes, by onnxruntime),
``transformers`` (its ``generate``, float32), ``llama`` (llama.cpp with Q8_0: ``pip install llama-cpp-python gguf``,
which another Python may have: ``--peers=PYTHON``). They take turns; the best round of each counts: tokens per second of
the clock, and per core-second. A round reads prompts of 16 tokens too. Prints one JSON object for each batch.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

PROMPT, VOCAB, WIDTH, DEPTH, HEADS, LENGTH = 16, 50257, 768, 12, 12, 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--engines", default="jax,float32,int8,transformers,llama")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--peers", default=sys.executable, help="a Python that has llama-cpp-python and gguf")
    parser.add_argument("--llama", action="store_true", help="answer as llama.cpp; of the script itself")
    args = parser.parse_args()
    if args.llama:
        return answer_as_llama(args)
    if args.make:
        return make(args)
    engines = {name: ENGINES[name](args) for name in args.engines.split(",")}
    for batch in map(int, args.batches.split(",")):
        found = {name: {"tokens_per_second": 0.0, "per_core_second": 0.0} for name in engines}
        for write in engines.values():
            write(batch)  # compiles
        for _ in range(args.rounds):
            for name, write in engines.items():
                seconds, core = write(batch)
                for key, spent in (("tokens_per_second", seconds), ("per_core_second", core)):
                    found[name][key] = round(max(found[name][key], batch * args.new / spent), 1)
        print(json.dumps({"batch": batch, **found, "load": round(os.getloadavg()[0], 1)}), flush=True)


def timed(call) -> tuple[float, float]:
    """(seconds of the clock, core-seconds of this process)"""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    call()
    now = resource.getrusage(resource.RUSAGE_SELF)
    return time.perf_counter() - began, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


# ------------------------------------------------------------------------------------------------------------ the forms


def make(args) -> None:
    """Hugging Face's folder, onnxruntime's graphs, GGUF: the same shape, and of the first two the same weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": VOCAB, "n_layer": DEPTH, "n_embd": WIDTH, "n_head": HEADS, "n_positions": LENGTH}
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    transformers.GPT2LMHeadModel(config).save_pretrained(args.folder / "transformers")
    from bigbase_jax.export import onnx

    predictor = loaded(args)
    for name, quantize in (("float32", None), ("int8", "int8")):
        (args.folder / name).mkdir(exist_ok=True)
        onnx.write(predictor, args.folder / name, quantize)
    subprocess.run([args.peers, __file__, "--folder", str(args.folder), "--llama", "--make"], check=True)


def loaded(args):
    """The folder as a predictor of a language model."""
    import jax
    import numpy as np

    from bigbase_jax.inference.predictor import Predictor
    from bigbase_jax.pretrained import load
    from bigbase_jax.tasks.language import CausalLanguageModel

    model, variables = load(args.folder / "transformers")
    task = CausalLanguageModel(model)
    spec = {name: jax.ShapeDtypeStruct((LENGTH,), np.dtype(np.int32)) for name in task.inputs}
    return Predictor(task, variables, {}, spec, lambda: None)


def gguf_file(path: pathlib.Path) -> None:
    """GPT-2's shape with random weights in Q8_0, and a vocabulary of numbers."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(VOCAB)

    def add(name: str, *shape: int) -> None:
        x = (0.02 * rng.standard_normal(shape)).astype(np.float32)
        if len(shape) == 2 and "position" not in name:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)

    add("token_embd.weight", VOCAB, WIDTH)
    add("position_embd.weight", LENGTH, WIDTH)
    for i in range(DEPTH):
        for name, out, inner in (
            ("attn_qkv", 3 * WIDTH, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_up", 4 * WIDTH, WIDTH),
            ("ffn_down", WIDTH, 4 * WIDTH),
        ):
            add(f"blk.{i}.{name}.weight", out, inner)
            add(f"blk.{i}.{name}.bias", out)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", WIDTH)
            add(f"blk.{i}.{name}.bias", WIDTH)
    add("output_norm.weight", WIDTH)
    add("output_norm.bias", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --------------------------------------------------------------------------------------------------------- the engines


def prompts(batch: int):
    import numpy as np

    return np.random.default_rng(0).integers(0, VOCAB, (batch, PROMPT)).astype(np.int32)


def ours(args, engine):
    from bigbase_jax.decoding.sampling import SamplingParams

    return lambda batch: timed(lambda: engine.generate(list(prompts(batch)), SamplingParams(max_new_tokens=args.new)))


def by_jax(args):
    from bigbase_jax.inference.generation import Engine

    predictor = loaded(args)
    return ours(args, Engine(predictor.task.model, predictor.variables))


def by_onnxruntime(name: str):
    def start(args):
        from bigbase_jax.inference import engines
        from bigbase_jax.inference.generation import Engine

        predictor = loaded(args)
        task, *_ = engines.opened(args.folder / name, predictor.task, predictor.spec)
        return ours(args, Engine(task.model, engines.VARIABLES))

    return start


def by_transformers(args):
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel.from_pretrained(args.folder / "transformers").eval()

    def write(batch: int) -> None:
        tokens = torch.tensor(prompts(batch)).long()
        with torch.inference_mode():
            words = {"min_new_tokens": args.new, "max_new_tokens": args.new, "do_sample": False, "pad_token_id": 0}
            model.generate(tokens, attention_mask=torch.ones_like(tokens), **words)

    return lambda batch: timed(lambda: write(batch))


def by_llama(args):
    """llama.cpp in a process of its own, which answers a line with the seconds of a round."""
    words = [
        args.peers,
        __file__,
        "--folder",
        str(args.folder),
        "--llama",
        f"--new={args.new}",
        f"--threads={args.threads}",
    ]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )

    def write(batch: int) -> tuple[float, float]:
        process.stdin.write(f"{batch}\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    return write


def answer_as_llama(args) -> None:
    path = args.folder / "q8_0.gguf"
    if args.make:
        return gguf_file(path)
    import ctypes

    import llama_cpp as lib
    import numpy as np

    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model, "llama.cpp does not take the file"
    words = lib.llama_context_default_params()
    words.n_ctx, words.n_batch, words.n_ubatch, words.n_seq_max = 1024, 512, 512, 8
    words.n_threads = words.n_threads_batch = args.threads
    context = lib.llama_init_from_model(model, words)
    batch_of = lib.llama_batch_init(512, 0, 8)

    def step(rows) -> np.ndarray:
        """Reads (token, position, sequence, whether its logits are wanted) each; the likeliest tokens after those."""
        batch_of.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch_of.token[i], batch_of.pos[i], batch_of.logits[i] = int(token), position, wanted
            batch_of.n_seq_id[i], batch_of.seq_id[i][0] = 1, sequence
        assert lib.llama_decode(context, batch_of) == 0
        best = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = ctypes.cast(lib.llama_get_logits_ith(context, i), ctypes.POINTER(ctypes.c_float))
                best.append(int(np.ctypeslib.as_array(logits, (VOCAB,)).argmax()))
        return np.array(best)

    def write(batch: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        rows = [(t, p, b, p == PROMPT - 1) for b, row in enumerate(prompts(batch)) for p, t in enumerate(row)]
        tokens = step(rows)
        for position in range(PROMPT, PROMPT + args.new - 1):
            tokens = step([(t, position, b, True) for b, t in enumerate(tokens)])

    for line in sys.stdin:
        print(json.dumps(timed(lambda n=int(line): write(n))), flush=True)


ENGINES = {
    "jax": by_jax,
    "float32": by_onnxruntime("float32"),
    "int8": by_onnxruntime("int8"),
    "transformers": by_transformers,
    "llama": by_llama,
}

if __name__ == "__main__":
    main()
