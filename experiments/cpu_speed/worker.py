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
RECIPES = {
    "classic_cnn": ("catdog_cnn", None),
    "classic_cnn_32": ("catdog_cnn", None),
    "photo_convnet": ("catdog", "data=folder,root=/"),
}


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


def task_of(name, tiny=False):
    """(task, optimizer, batch, decay of the moving average)."""
    import importlib

    import optax

    from bigbase_jax.build import build, deferred
    from bigbase_jax.models.bert import Bert
    from bigbase_jax.models.decoder import Decoder
    from bigbase_jax.models.resnet import ResNet
    from bigbase_jax.models.transformer import Style
    from bigbase_jax.models.vit import ViT
    from bigbase_jax.optim import Optimizer
    from bigbase_jax.tasks.classification import Classification
    from bigbase_jax.tasks.language import CausalLanguageModel
    from bigbase_jax.tasks.text_classification import TextClassification

    x, label = data(name, tiny)
    batch = {"image": x, "label": label, "mask": np.ones(len(x), np.float32)}
    if name in RECIPES:
        module, arg = RECIPES[name]
        recipe = importlib.import_module(module).get_config(arg)
        if name == "photo_convnet":
            recipe.optim.algorithm = deferred(optax.adamw)  # as PyTorch's side
        if tiny:
            recipe.task.model.stages = (4, 8)
        return build(recipe.task, {"num_classes": 2}), build(recipe.optim), batch, recipe.train.ema_decay
    optimizer = Optimizer(1e-3, optax.adamw, weight_decay=0.1, clip_norm=1.0)
    if name in PICTURES:
        classes = PICTURES[name][2]
        if name.startswith("resnet"):
            model = ResNet(classes, depth=int(name.removeprefix("resnet")), width=8 if tiny else 64)
        else:
            depth, width, heads = size(name, tiny)
            model = ViT(classes, variant="Ti", patch=16, depth=depth, width=width, heads=heads)
        return Classification(model), optimizer, batch, None
    depth, width, heads = size(name, tiny)
    length = x.shape[1] - 1
    ones = np.ones((len(x), length), np.int32)
    words = {"vocab_size": TEXTS[name][2], "length": length, "width": width, "depth": depth, "heads": heads}
    words["dropout"] = dropout(name)
    batch = {"segment_ids": ones, "mask": batch["mask"]}
    if name.startswith("bert"):
        batch |= {"tokens": x[:, 1:], "token_type_ids": 0 * ones, "label": label}
        return TextClassification(Bert(num_classes=2, **words)), optimizer, batch, None
    batch |= {"inputs": x[:, :-1], "targets": x[:, 1:], "bytes": ones}
    batch["positions"] = ones * np.arange(length, dtype=np.int32)
    return CausalLanguageModel(Decoder(**words, style=Style(activation="gelu_tanh"))), optimizer, batch, None


def compiled_of(name, tiny=False):
    """(the compiled step, its state, the batch), as training has them."""
    import jax

    from bigbase_jax import parallel
    from bigbase_jax.runtime import compilation

    compilation.setup()  # as the verbs do
    task, optimizer, batch, ema = task_of(name, tiny)
    spec = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in batch.items()}
    mesh = parallel.make_mesh(1)
    tx = optimizer.transform(jax.eval_shape(task.init, jax.random.key(0), spec)["params"], 1000)
    program = parallel.program(task, tx, spec, mesh, numbers=optimizer.numbers(1000), ema_decay=ema)
    placed = parallel.put(batch, mesh)
    state = program.init(placed)
    return program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile(), state, placed


def ours(name, tiny):
    """({name: step() -> loss}, what to say of them)."""
    import jax

    began = time.perf_counter()
    compiled, state, batch = compiled_of(name, tiny)
    seconds = time.perf_counter() - began

    def step():
        nonlocal state
        state, sums = compiled(state, batch)
        jax.block_until_ready(state)
        return float(sums["loss"].total) / float(sums["loss"].weight)

    parameters = sum(math.prod(p.shape) for p in jax.tree.leaves(state.params))
    return {"": step}, {"parameters": parameters, "compile_seconds": seconds, "version": f"JAX {jax.__version__}"}


# ------------------------------------------------------------------------------------------------------------- theirs


def model_of(name, tiny=False):
    """The same model in plain PyTorch."""
    import torch_models

    if name in TEXTS:
        make = torch_models.Bert if name.startswith("bert") else torch_models.Decoder
        length = data(name, tiny)[0].shape[1] - 1
        return make(*size(name, tiny), vocab=TEXTS[name][2], length=length, dropout=dropout(name))
    _, pixels, classes = PICTURES[name]
    pixels = 32 if tiny else pixels
    if name == "vit_ti16":
        return torch_models.ViT(*size(name, tiny), pixels=pixels, patch=16, classes=classes)
    if name.startswith("resnet"):
        return torch_models.ResNet(int(name.removeprefix("resnet")), 8 if tiny else 64, classes)
    if name == "photo_convnet":
        return torch_models.ConvNet((4, 8) if tiny else (24, 48, 96, 192, 192), None, classes)
    return torch_models.ConvNet((4, 8) if tiny else (64, 64, 64), (pixels, 1024), classes)


def theirs(name, tiny, compiled=False):
    """What a user of torchvision, timm or nanoGPT runs; pictures come normalised.

    Where there are convolutions, in both layouts, of which the faster is then timed.
    """
    import torch

    torch.manual_seed(0)
    x, label = data(name, tiny)
    inputs, targets = (torch.from_numpy(x),), torch.from_numpy(label).long()
    if name in PICTURES:
        inputs = ((inputs[0].permute(0, 3, 1, 2) / 255 - 0.5) / 0.25,)
    elif name.startswith("bert"):
        inputs = inputs[0][:, 1:].long().contiguous(), torch.ones(len(x), x.shape[1] - 1).bool()
    else:
        inputs, targets = (inputs[0][:, :-1].long().contiguous(),), inputs[0][:, 1:].long().flatten()
    layouts = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}

    def made(layout):
        model, read = model_of(name, tiny).train(), inputs
        if layout:
            model = model.to(memory_format=layouts[layout])
            read = (inputs[0].contiguous(memory_format=layouts[layout]),)
        params = list(model.parameters())
        if name.startswith("classic_cnn"):
            optimizer = torch.optim.SGD(params, lr=0.001, momentum=0.9, fused=True)
        else:
            optimizer = torch.optim.AdamW(params, lr=1e-3, weight_decay=0.05, fused=True)
        photo = name == "photo_convnet"
        average = [p.detach().clone() for p in params] if photo else []

        def loss_of():
            return torch.nn.functional.cross_entropy(model(*read), targets, label_smoothing=0.1 if photo else 0.0)

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
    for layout in layouts if name in PICTURES else ("",):
        steps[layout], parameters = made(layout)
        steps[layout]()
    seconds = time.perf_counter() - began
    return steps, {"parameters": parameters, "compile_seconds": seconds, "version": f"PyTorch {torch.__version__}"}


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
    if side == "ours":
        from bigbase_jax.runtime import memory

        memory.start_anew()  # as launch.py does
    steps, about = SIDES[side](which, "--tiny" in more)
    for _ in range(1 if "--tiny" in more else 2):
        losses = [step() for step in steps.values()]
    print(json.dumps({"ready": about}), flush=True)
    layout, step = None, None
    asleep = time.process_time()
    for line in sys.stdin:
        idle = (woken := time.process_time()) - asleep  # what threads that spin have taken while another side ran
        if step is None:
            layout, step = fastest(steps, float(line))
            new_peak()
        step()  # warms up again: after a pause memory that was given back and caches are to be had anew
        before = time.process_time()
        seconds, losses = timed(step, float(line))
        asleep = time.process_time()
        found = {"seconds": seconds, "core_seconds": (asleep - before) / len(seconds), "loss": losses[-1]}
        found |= {
            "own_core_seconds": asleep - woken,
            "idle_core_seconds": idle,
            "gigabytes": peak_gigabytes(),
            "layout": layout,
        }
        print(json.dumps(found), flush=True)
