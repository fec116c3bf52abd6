"""How long a batch of 1 and of 32 rows takes: a run, what was made of it by study.py, and the same model elsewhere.

python experiments/compress/latency.py sst2 --runs=RUNS [--peers=FOLDER] [--rounds=3] [--seconds=0.3]

From numpy arrays to numpy arrays, in float32 where nothing else is said. Each engine is a process of its own; all
compile and warm up, then every variant takes a turn in each round, one at a time, while the others sleep. The median of
all calls is printed and kept as a line of latency.jsonl beside this file. A batch of ``translation`` is written,
greedily and to its end. ``--peers`` is the site-packages folder of an environment that has openvino and ctranslate2,
behind this one's own. Beside other jobs, ``taskset -c 0 python ... --core`` measures core-seconds of one thread.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SIDES = ("jax", "stablehlo", "onnxruntime", "torch", "openvino", "ctranslate2")
BATCHES = (1, 32)
THREADS = min(2, len(os.sched_getaffinity(0)))
TEXT, PIXELS = (40, 8192), {"photos": 96, "resnet": 64}


def inputs(name, rows, runs):
    """What the exported model takes."""
    if name == "translation":
        with np.load(examples_of(runs)) as found:
            return {key: x[:rows] for key, x in found.items()}
    rng = np.random.default_rng(0)
    if name == "sst2":
        length, vocab = TEXT
        ones = np.ones((rows, length), np.int32)
        return {
            "tokens": rng.integers(5, vocab, ones.shape, np.int32),
            "segment_ids": ones,
            "token_type_ids": 0 * ones,
        }
    return {"image": rng.integers(0, 256, (rows, PIXELS[name], PIXELS[name], 3), np.uint8)}


def examples_of(runs):
    """The file with the first sentences of the test split, which is made where it is not there."""
    path = runs / "examples.npz"
    if not path.exists():
        from bigbase_jax.export import proof
        from bigbase_jax.inference.predictor import Predictor

        np.savez(path, **proof.some_examples(Predictor.open(str(runs / "base")), max(BATCHES)))
    return path


# ------------------------------------------------------------------------------------------------------------- sides
# Each gives {variant: function of the inputs' arrays, which answers with arrays}.


def jax_side(name, runs, peers):
    import jax

    from bigbase_jax.inference.predictor import Predictor
    from bigbase_jax.runtime import compilation

    compilation.setup()

    def of(folder):
        predictor = Predictor.open(str(folder))
        program = predictor.program
        if name == "translation":  # not what it says of the reference
            program = jax.jit(lambda variables, batch: predictor.task.predict(variables, batch)["tokens"])
        return lambda arrays: jax.device_get(program(predictor.variables, arrays))

    variants = ("base", "int8", "int4", "pruned-75", "pruned-50", "pruned-46-of-8", "pruned-25", "distilled")
    there = [variant for variant in variants if (runs / variant / "config.json").exists()]
    return {variant: of(runs / variant) for variant in there}


def stablehlo_side(name, runs, peers):
    spec = importlib.util.spec_from_file_location("standalone", runs / "stablehlo" / "predict.py")
    standalone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(standalone)
    standalone.check()
    program, weights = standalone.program(), standalone.load_weights()
    return {"base": lambda arrays: {key: np.asarray(x) for key, x in program(weights, arrays).items()}}


def onnxruntime_side(name, runs, peers):
    from bigbase_jax.inference.engines import Session

    folders = {"base": "onnx", "int8": "onnx-int8"}
    return {variant: Session(runs / folder / "model.onnx", THREADS) for variant, folder in folders.items()}


def torch_model(name):
    """The same function in PyTorch (experiments/cpu_speed), with weights at random, and what makes its inputs."""
    import torch

    sys.path.insert(0, str(HERE.parent / "cpu_speed"))
    import torch_models

    class Photos(torch.nn.Module):
        """As the recipe's: the mean over a picture and its mirror image."""

        def __init__(self):
            super().__init__()
            self.model = torch_models.ConvNet((24, 48, 96, 192, 192), None, 2)

        def forward(self, x):
            both = torch.cat([x, x.flip(3)])
            return self.model(both).softmax(-1).unflatten(0, (2, -1)).mean(0)

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            length, vocab = TEXT
            self.model = torch_models.Bert(2, 128, 4, vocab, length, 0.0)

        def forward(self, ids, real):
            return self.model(ids, real).softmax(-1)

    torch.manual_seed(0)
    if name == "sst2":
        return Text().eval(), lambda a: (torch.from_numpy(a["tokens"]), torch.from_numpy(a["segment_ids"]).bool())
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))

    def picture(arrays):
        x = (torch.from_numpy(arrays["image"]).float() / 255 - mean) / std
        return (x.permute(0, 3, 1, 2),)  # channels last

    return Photos().eval().to(memory_format=torch.channels_last), picture


def torch_side(name, runs, peers):
    import torch

    torch.set_num_threads(THREADS)
    model, reading = torch_model(name)

    def call(module, arrays):
        with torch.inference_mode():
            return module(*reading(arrays)).numpy()

    found = {"eager": model, "compile": torch.compile(model, dynamic=False)}
    if name == "sst2":  # of the ConvNet it would change its last layer only
        found["dynamic int8"] = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return {variant: functools.partial(call, module) for variant, module in found.items()}


def openvino_side(name, runs, peers):
    """The model of PyTorch's side, and our int8 graph where it reads that."""
    sys.path.append(str(peers))
    import openvino
    import torch

    core = openvino.Core()
    words = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": THREADS, "INFERENCE_PRECISION_HINT": "f32"}
    model, reading = torch_model(name)
    with torch.inference_mode():
        converted = openvino.convert_model(model, example_input=reading(inputs(name, 2, runs)))
    compiled = core.compile_model(converted, "CPU", words)
    found = {"base": lambda arrays: compiled([x.numpy() for x in reading(arrays)])[0]}
    try:
        ours = core.compile_model(core.read_model(str(runs / "onnx-int8" / "model.onnx")), "CPU", words)
        named = [x.get_any_name() for x in ours.inputs]
        found["our int8 graph"] = lambda arrays: ours({key: arrays[key] for key in named})[0]
        found["our int8 graph"](inputs(name, 2, runs))
    except Exception as error:
        print(f"openvino does not take our int8 graph: {str(error).splitlines()[0]}", file=sys.stderr)
        found.pop("our int8 graph", None)
    return found


def ctranslate2_side(name, runs, peers):
    """The same translator, weights and all."""
    sys.path.append(str(peers))
    import ctranslate2

    from bigbase_jax.core import flatten
    from bigbase_jax.inference.predictor import Predictor
    from bigbase_jax.models.encoder_decoder import sinusoids

    predictor = Predictor.open(str(runs / "base"))
    task, model = predictor.task, predictor.task.model
    ours = {key.removeprefix("params."): np.asarray(x) for key, x in flatten(predictor.variables).items()}
    spec = ctranslate2.specs.TransformerSpec.from_config((model.depth, model.depth), model.heads, pre_norm=True)

    def linear(there, *names):
        there.weight = np.concatenate([ours[f"{x}.kernel"].reshape(model.width, -1).T for x in names])
        there.bias = np.concatenate([ours[f"{x}.bias"].ravel() for x in names])

    def norm(there, name):
        there.gamma, there.beta = ours[f"{name}.scale"], ours[f"{name}.bias"]

    def out(there, name):
        kernel = ours[f"{name}.kernel"]
        there.weight, there.bias = kernel.reshape(-1, kernel.shape[-1]).T, ours[f"{name}.bias"]

    for stack, there in {"encoder": spec.encoder, "decoder": spec.decoder}.items():
        embeddings = there.embeddings[0] if stack == "encoder" else there.embeddings
        embeddings.weight, there.scale_embeddings = ours["embedding"], True
        there.position_encodings.encodings = sinusoids(128, model.width)
        norm(there.layer_norm, f"{stack}.norm")
        for i, layer in enumerate(there.layer):
            at = f"{stack}.block_{i}"
            norm(layer.self_attention.layer_norm, f"{at}.norm1")
            linear(layer.self_attention.linear[0], *(f"{at}.attention.{x}" for x in ("query", "key", "value")))
            out(layer.self_attention.linear[1], f"{at}.attention.out")
            if stack == "decoder":
                norm(layer.attention.layer_norm, f"{at}.norm_cross")
                linear(layer.attention.linear[0], f"{at}.cross_attention.query")
                linear(layer.attention.linear[1], *(f"{at}.cross_attention.{x}" for x in ("key", "value")))
                out(layer.attention.linear[2], f"{at}.cross_attention.out")
            norm(layer.ffn.layer_norm, f"{at}.norm2")
            out(layer.ffn.linear_0, f"{at}.mlp.up")
            out(layer.ffn.linear_1, f"{at}.mlp.down")
    spec.decoder.projection.weight = ours["embedding"]
    tokens = [str(i) for i in range(len(ours["embedding"]))]
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    words = {"bos_token": task.start_id, "eos_token": task.end_id, "unk_token": task.pad_id}
    for key, token in {**words, "decoder_start_token": task.start_id}.items():
        setattr(spec.config, key, str(token))
    spec.config.layer_norm_epsilon = 1e-6
    spec.validate()
    spec.optimize()
    folder = runs / "ctranslate2"
    folder.mkdir(exist_ok=True)
    spec.save(str(folder))

    def of(kind):
        translator = ctranslate2.Translator(str(folder), compute_type=kind, intra_threads=THREADS)
        never = [[str(task.pad_id)], [str(task.start_id)]]

        def call(arrays):
            source = [
                [str(token) for token in row[seen > 0]]
                for row, seen in zip(arrays["source"], arrays["source_segments"], strict=True)
            ]
            limits = {"max_decoding_length": task.max_length, "beam_size": 1, "suppress_sequences": never}
            return [found.hypotheses[0] for found in translator.translate_batch(source, **limits)]

        return call

    found = {kind: of(kind) for kind in ("float32", "int8")}
    batch = inputs(name, max(BATCHES), runs)
    wanted = [
        [str(t) for t in row[: list(row).index(task.end_id)]] if task.end_id in row else [str(t) for t in row]
        for row in np.asarray(predictor.program(predictor.variables, batch)["tokens"])[:, 0]
    ]
    same = {kind: sum(a == b for a, b in zip(call(batch), wanted, strict=True)) for kind, call in found.items()}
    print(f"ctranslate2: of {len(wanted)} translations as ours are {same}", file=sys.stderr)
    return found


def work(side, name, runs, peers, core):
    """A process of one side: for each line [variant, rows, seconds] a line of the times of its calls."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print does not disturb
    found = globals()[f"{side}_side"](name, runs, peers)
    for call in found.values():
        for rows in BATCHES:
            for _ in range(3):
                call(inputs(name, rows, runs))
    print(json.dumps(list(found)), file=out)
    for line in sys.stdin:
        variant, rows, seconds = json.loads(line)
        arrays, times = inputs(name, rows, runs), []
        found[variant](arrays)  # after its pause
        now = time.process_time if core else time.perf_counter
        began = now()
        while not times or now() - began < seconds:
            start = now()
            found[variant](arrays)
            times.append(now() - start)
        print(json.dumps(times), file=out)


def measure(name, runs, peers, rounds, seconds, sides, core):
    """{"SIDE VARIANT": {rows: milliseconds of each call}}."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(THREADS), "GOMP_SPINCOUNT": "1000"}
    processes, found = {}, {}
    for side in sides:
        command = [sys.executable, __file__, name, f"--runs={runs}", f"--side={side}", f"--peers={peers or ''}"]
        command += ["--core"] if core else []
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes[side] = subprocess.Popen(command, env=environment, text=True, **pipes)
    variants = {}
    for side, process in processes.items():
        if line := process.stdout.readline():
            variants[side] = json.loads(line)
        else:
            print(f"{side} did not start", file=sys.stderr)
    for _ in range(rounds):
        for side, names in variants.items():
            for variant in names:
                for rows in BATCHES:
                    process = processes[side]
                    print(json.dumps([variant, rows, seconds]), file=process.stdin, flush=True)
                    times = json.loads(process.stdout.readline())
                    found.setdefault((side, variant), {}).setdefault(rows, []).extend(1e3 * x for x in times)
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("sst2", "photos", "translation"))
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/compress"))
    parser.add_argument("--peers", type=pathlib.Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--core", action="store_true", help="core-seconds, which other jobs hardly change")
    parser.add_argument("--note", default="", help="kept with the figures: what else ran")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    runs = args.runs.resolve()
    if args.side:
        return work(args.side, args.model, runs, args.peers, args.core)
    can = ("jax", "ctranslate2") if args.model == "translation" else SIDES[:-1]
    sides = [side for side in args.sides.split(",") if side in can and (args.peers or side not in SIDES[-2:])]
    found = measure(args.model, runs / f"{args.model}-0", args.peers, args.rounds, args.seconds, sides, args.core)
    print("| engine | variant | batch 1, ms | batch 32, ms |\n| --- | --- | --- | --- |")
    kept = {}
    for (side, variant), times in found.items():
        middle = {rows: statistics.median(values) for rows, values in times.items()}
        spread = {rows: np.subtract(*np.percentile(values, [75, 25])) / 2 for rows, values in times.items()}
        print(f"| {side} | {variant} | {' | '.join(f'{middle[r]:.2f} ±{spread[r]:.2f}' for r in BATCHES)} |")
        kept[f"{side} {variant}"] = {rows: round(middle[rows], 4) for rows in BATCHES}
    versions = {}
    for package in ("jax", "onnxruntime", "torch", "openvino", "ctranslate2"):
        for place in ([], [str(args.peers)] if args.peers else []):
            for about in importlib.metadata.distributions(name=package, **({"path": place} if place else {})):
                versions.setdefault(package, about.version)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    record = {"model": args.model, "date": date, "note": args.note, "versions": versions, "ms": kept}
    with open(HERE / "latency.jsonl", "a") as file:
        print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
