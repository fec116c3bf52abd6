"""One side of one row of the table: a model's training step, compiled, then timed whenever a line comes in.

python worker.py ours|eager|compile MODEL [--tiny]

Prints {"ready": ...} once compiled and warmed up; then, for each line read from stdin, which says for how many seconds,
{"seconds": [...], ...}, one number a step. ``run.py`` starts the sides of a row together and times them in turn.
"""

import ctypes
import functools
import gc
import json
import math
import pathlib
import resource
import sys
import time

import numpy as np

PICTURES = {  # name -> (batch, pixels, classes)
    "resnet18": (32, 64, 1000),
    "resnet50": (8, 224, 1000),
    "vit_ti16": (16, 224, 1000),
    "classic_cnn": (4, 224, 2),
    "classic_cnn_32": (32, 224, 2),
    "photo_convnet": (32, 96, 2),
}
TEXTS = {  # name -> (batch, length, vocabulary)
    "bert_4x256": (32, 128, 8192),
    "bert_4x256_no_dropout": (32, 128, 8192),
    "bert_base": (8, 128, 30522),
    "decoder_10m": (16, 256, 65),
}
ROWS = (*PICTURES, *TEXTS)
SIZES = {  # name -> (blocks, width, heads)
    "vit_ti16": (12, 192, 3),
    "bert_4x256": (4, 256, 4),
    "bert_4x256_no_dropout": (4, 256, 4),
    "bert_base": (12, 768, 12),
    "decoder_10m": (6, 384, 6),
}
RECIPES = {"classic_cnn": "catdog_cnn", "classic_cnn_32": "catdog_cnn", "photo_convnet": "catdog"}


def dropout(name):
    return 0.1 if name in ("bert_4x256", "bert_base") else 0.0


def size(name, tiny):
    return (2, 16, 2) if tiny else SIZES[name]


def data(name, tiny):
    """uint8[B,H,W,3] or i32[B,L+1], and labels i32[B]; the same for all sides."""
    rng = np.random.default_rng(0)
    if name in PICTURES:
        batch, pixels, classes = (2, 32, PICTURES[name][2]) if tiny else PICTURES[name]
        return rng.integers(0, 256, (batch, pixels, pixels, 3), np.uint8), rng.integers(0, classes, batch, np.int32)
    batch, length, vocab = (2, 16, TEXTS[name][2]) if tiny else TEXTS[name]
    return rng.integers(0, vocab, (batch, length + 1), np.int32), rng.integers(0, 2, batch, np.int32)


# --------------------------------------------------------------------------------------------------------------- ours


def ours(name, tiny):
    """({name: step() -> loss}, what to say of them)."""
    import importlib

    import jax
    import optax

    from bigbase_jax import parallel
    from bigbase_jax.build import build
    from bigbase_jax.models.bert import Bert
    from bigbase_jax.models.decoder import Decoder
    from bigbase_jax.models.resnet import ResNet
    from bigbase_jax.models.transformer import Style
    from bigbase_jax.models.vit import ViT
    from bigbase_jax.optim import Optimizer
    from bigbase_jax.runtime import compilation, memory
    from bigbase_jax.tasks.classification import Classification
    from bigbase_jax.tasks.language import CausalLanguageModel
    from bigbase_jax.tasks.text_classification import TextClassification

    memory.keep_freed()  # as launch.py does
    compilation.setup()  # as the verbs do
    x, label = data(name, tiny)
    ema = None
    optimizer = Optimizer(1e-3, optax.adamw, weight_decay=0.1, clip_norm=1.0)
    batch = {"image": x, "label": label}
    if name in RECIPES:
        arg = {"catdog": "data=folder,root=/", "catdog_cnn": None}[RECIPES[name]]
        recipe = importlib.import_module(RECIPES[name]).get_config(arg)
        if tiny:
            recipe.task.model.stages = (4, 8)
        task, optimizer = build(recipe.task, {"num_classes": 2}), build(recipe.optim)
        ema = recipe.train.ema_decay
    elif name in PICTURES:
        classes = PICTURES[name][2]
        if name == "vit_ti16":
            depth, width, heads = size(name, tiny)
            model = ViT(classes, variant="Ti", patch=16, depth=depth, width=width, heads=heads)
        else:
            model = ResNet(classes, depth=int(name.removeprefix("resnet")), width=8 if tiny else 64)
        task = Classification(model, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    else:
        depth, width, heads = size(name, tiny)
        length = x.shape[1] - 1
        ones = np.ones((len(x), length), np.int32)
        words = {"vocab_size": TEXTS[name][2], "length": length, "width": width, "depth": depth, "heads": heads}
        words["dropout"] = dropout(name)
        if name.startswith("bert"):
            task = TextClassification(Bert(num_classes=2, **words))
            batch = {"tokens": x[:, 1:], "segment_ids": ones, "token_type_ids": 0 * ones, "label": label}
        else:
            task = CausalLanguageModel(Decoder(**words, style=Style(activation="gelu_tanh", kernel_init="normal")))
            positions = ones * np.arange(length, dtype=np.int32)
            batch = {"inputs": x[:, :-1], "targets": x[:, 1:], "segment_ids": ones, "positions": positions}
            batch["bytes"] = ones
    batch["mask"] = np.ones(len(x), np.float32)

    spec = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in batch.items()}
    mesh = parallel.make_mesh(1)
    params = jax.eval_shape(task.init, jax.random.key(0), spec)["params"]
    tx = optimizer.transform(params, 1000)
    program = parallel.program(task, tx, spec, mesh, numbers=optimizer.numbers(1000), ema_decay=ema)
    placed = parallel.put(batch, mesh)
    began = time.perf_counter()
    state = program.init(placed)
    compiled = parallel.Steps(program, [spec], mesh)
    seconds = time.perf_counter() - began

    def step():
        nonlocal state
        state, sums = compiled(state, placed)
        jax.block_until_ready(state)
        return float(sums["loss"].total) / float(sums["loss"].weight)

    about = {
        "parameters": sum(math.prod(p.shape) for p in jax.tree.leaves(params)),
        "compile_seconds": seconds,
        "version": f"JAX {jax.__version__}",
    }
    return {"": step}, about


# ------------------------------------------------------------------------------------------------------------- theirs


def theirs(name, tiny, compiled=False):
    """The same in plain PyTorch: what a user of torchvision, timm or nanoGPT runs; pictures come normalised.

    Where there are convolutions, in both layouts, of which the faster is then timed.
    """
    import torch
    import torch_models

    torch.manual_seed(0)
    x, label = data(name, tiny)
    label = torch.from_numpy(label).long()
    smoothing = 0.1 if name == "photo_convnet" else 0.0
    layouts = ("channels_last", "contiguous") if name in PICTURES else ("",)

    def made(layout):
        if name in TEXTS:
            ids = torch.from_numpy(x).long()
            words = {"vocab": TEXTS[name][2], "length": x.shape[1] - 1, "dropout": dropout(name)}
            if name.startswith("bert"):
                model = torch_models.Bert(*size(name, tiny), **words, classes=2)
                inputs, targets = (ids[:, 1:].contiguous(), torch.ones(len(x), x.shape[1] - 1).bool()), label
            else:
                model = torch_models.Decoder(*size(name, tiny), **words)
                inputs, targets = (ids[:, :-1].contiguous(),), ids[:, 1:].flatten()
        else:
            classes = PICTURES[name][2]
            picture = (torch.from_numpy(x).float() / 255 - 0.5) / 0.25
            form = getattr(torch, f"{layout}_format" if layout == "contiguous" else layout)
            inputs, targets = (picture.permute(0, 3, 1, 2).contiguous(memory_format=form),), label
            if name == "vit_ti16":
                model = torch_models.ViT(*size(name, tiny), pixels=x.shape[1], patch=16, classes=classes)
            elif name.startswith("resnet"):
                model = torch_models.ResNet(int(name.removeprefix("resnet")), 8 if tiny else 64, classes)
            elif name == "photo_convnet":
                model = torch_models.ConvNet((4, 8) if tiny else (24, 48, 96, 192, 192), None, classes)
            else:
                model = torch_models.ConvNet((4, 8) if tiny else (64, 64, 64), (x.shape[1], 1024), classes)
            model = model.to(memory_format=form)
        model.train()
        params = list(model.parameters())
        if name.startswith("classic_cnn"):
            optimizer = torch.optim.SGD(params, lr=0.001, momentum=0.9, fused=True)
        else:
            optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05, fused=True)
        average = [p.detach().clone() for p in params] if name == "photo_convnet" else []

        def loss_of():
            return torch.nn.functional.cross_entropy(model(*inputs), targets, label_smoothing=smoothing)

        run = torch.compile(loss_of) if compiled else loss_of

        def step():
            loss = run()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if name not in RECIPES:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            if average:
                torch._foreach_lerp_(average, [p.detach() for p in params], 0.005)
            return loss.item()

        return step, sum(p.numel() for p in params)

    began = time.perf_counter()
    steps = {}
    for layout in layouts:
        steps[layout], parameters = made(layout)
        steps[layout]()
    about = {
        "parameters": parameters,
        "compile_seconds": time.perf_counter() - began,
        "version": f"PyTorch {torch.__version__}",
    }
    return steps, about


SIDES = {"ours": ours, "eager": theirs, "compile": functools.partial(theirs, compiled=True)}


# ------------------------------------------------------------------------------------------------------------- timing


def timed(step, seconds):
    """The steps that fill so many seconds, one at least, and what they gave."""
    taken, losses = [], []
    while not taken or sum(taken) < seconds:
        began = time.perf_counter()
        losses.append(step())
        taken.append(time.perf_counter() - began)
    return taken, losses


def fastest(steps, seconds):
    """(name, step) of the fastest; what the others held is given back."""
    name = min(steps, key=lambda name: min(timed(steps[name], seconds)[0])) if len(steps) > 1 else next(iter(steps))
    step = steps.pop(name)
    if steps:
        steps.clear()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        step()
    return name, step


def new_peak():
    """Lets the peak of this process's memory count from now on, where the system can do that."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_gigabytes():
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 2**20


if __name__ == "__main__":
    side, which, *more = sys.argv[1:]
    steps, about = SIDES[side](which, "--tiny" in more)
    for _ in range(1 if "--tiny" in more else 2):
        losses = [step() for step in steps.values()]
    print(json.dumps({"ready": about}), flush=True)
    layout, step = None, None
    asleep = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - asleep  # what threads that spin have taken while another side ran
        if step is None:
            layout, step = fastest(steps, float(line))
            new_peak()
        before = time.process_time()
        seconds, losses = timed(step, float(line))
        asleep = time.process_time()
        found = {"seconds": seconds, "core_seconds": (asleep - before) / len(seconds), "loss": losses[-1]}
        found |= {"idle_core_seconds": idle, "gigabytes": peak_gigabytes(), "layout": layout}
        print(json.dumps(found), flush=True)
