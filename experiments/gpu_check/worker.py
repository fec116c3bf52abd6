"""One side of one row of the table: a model's training step, compiled, then timed whenever a line comes in.

python worker.py ours|theirs MODEL [--tiny]

Prints {"ready": ...} once compiled and warmed up, or {"missing": ...} where a package is; then, for each line read from
stdin, {"seconds": [...], "peak_gigabytes": ...}: one number a step, and the most that the side's allocator has given
out so far. ``compare.py`` starts the two sides of a row together and times them in turn.
"""

import importlib
import json
import pathlib
import re
import sys
import time

import numpy as np

LENGTH = {"bert_base": 512, "gpt2_124m": 1024, "llama_350m": 1024}
BATCH = {"resnet50": 256, "vit_b16": 256, "bert_base": 64, "gpt2_124m": 32, "llama_350m": 16}
VOCAB = {"bert_base": 30522, "gpt2_124m": 50257, "llama_350m": 32000}
LLAMA = {"width": 1024, "depth": 24, "heads": 16, "mlp_dim": 2736}
STEPS, WARM = 10, 3


def data(name, tiny):
    """Pictures uint8[B,224,224,3] or tokens i32[B,L+1], and labels i32[B]; the same for both sides."""
    rng = np.random.default_rng(0)
    batch = 2 if tiny else BATCH[name]
    label = rng.integers(0, 2, batch, np.int32)
    if name not in LENGTH:
        return rng.integers(0, 256, (batch, 32 if tiny else 224, 32 if tiny else 224, 3), np.uint8), label
    return rng.integers(0, VOCAB[name], (batch, (32 if tiny else LENGTH[name]) + 1), np.int32), label


# --------------------------------------------------------------------------------------------------------------- ours


def ours(name, tiny):
    """(step() -> None, peak bytes() -> number or None, what to say of it)."""
    import jax
    import optax

    from bigbase_jax import parallel
    from bigbase_jax.core import flatten
    from bigbase_jax.models.bert import Bert
    from bigbase_jax.models.decoder import Decoder
    from bigbase_jax.models.resnet import ResNet
    from bigbase_jax.models.transformer import LLAMA as LLAMA_STYLE
    from bigbase_jax.models.transformer import Style
    from bigbase_jax.models.vit import ViT
    from bigbase_jax.optim import Optimizer
    from bigbase_jax.runtime.log import peak_flops
    from bigbase_jax.tasks.classification import Classification
    from bigbase_jax.tasks.language import CausalLanguageModel
    from bigbase_jax.tasks.text_classification import TextClassification

    x, label = data(name, tiny)
    length = x.shape[1] - 1
    depth = {"depth": 2} if tiny else {}
    words = {"vocab_size": VOCAB.get(name), "length": length, "dtype": "bfloat16"}
    batch = {"image": x, "label": label}
    if name == "resnet50":
        task = Classification(ResNet(1000, depth=50, dtype="bfloat16"))
    elif name == "vit_b16":
        task = Classification(ViT(1000, variant="B", patch=16, dtype="bfloat16", **depth))
    else:
        ones = np.ones((len(x), length), np.int32)
        batch = {"tokens": x[:, 1:], "segment_ids": ones, "token_type_ids": 0 * ones, "label": label}
        if name == "bert_base":
            task = TextClassification(Bert(num_classes=2, **words, **depth), num_classes=2)
        else:
            if name == "gpt2_124m":
                model = Decoder(
                    **words, **{"width": 768, "depth": 12, "heads": 12} | depth, style=Style(activation="gelu_tanh")
                )
            else:
                model = Decoder(**words, **LLAMA | depth, positions="rope", tied=False, style=LLAMA_STYLE)
            task = CausalLanguageModel(model)
            positions = ones * np.arange(length, dtype=np.int32)
            batch = {
                "inputs": x[:, :-1],
                "targets": x[:, 1:],
                "segment_ids": ones,
                "positions": positions,
                "bytes": ones,
            }
    batch["mask"] = np.ones(len(x), np.float32)
    spec = {key: jax.ShapeDtypeStruct(value.shape, value.dtype) for key, value in batch.items()}
    mesh = parallel.make_mesh(1)
    params = jax.eval_shape(task.init, jax.random.key(0), spec)["params"]
    optimizer = Optimizer(1e-4, optax.adamw, weight_decay=0.1, clip_norm=1.0)
    program = parallel.program(task, optimizer.transform(params, 1000), spec, mesh, numbers=optimizer.numbers(1000))
    placed = parallel.put(batch, mesh)
    state = program.init(placed)
    began = time.perf_counter()
    lowered = program.step.lower(program.state, parallel.placed_batch(spec, mesh))
    compiled = lowered.compile()
    seconds = time.perf_counter() - began

    def step():
        nonlocal state
        state, sums = compiled(state, placed)
        jax.block_until_ready((state, sums))

    looked_up = r"(^|\.)(position|type|embedding)$" if name != "gpt2_124m" else r"(^|\.)position$"  # its head is tied
    sizes = {path: p.size for path, p in flatten(params).items()}
    memory = compiled.memory_analysis()

    def peak():
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")

    return (
        step,
        peak,
        {
            "parameters": sum(sizes.values()),
            "multiplied": sum(size for path, size in sizes.items() if not re.search(looked_up, path)),
            "compile_seconds": seconds,
            "planned_gigabytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9 if memory else None,
            "cudnn_attention": "fmha" in lowered.as_text(),
            "xla_flops": parallel.flops(lowered),
            "shape": {"batch": len(x), "length": length if name in LENGTH else None, **depth},
            "peak_flops": peak_flops(),
            "device": jax.devices()[0].device_kind,
            "with": f"jax {jax.__version__}",
        },
    )


# ------------------------------------------------------------------------------------------------------------- theirs


def optional(package):
    """The package, or None where it is not installed: what stands in for it is plain PyTorch."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return None


def theirs(name, tiny):
    """The same of torchvision, timm and transformers under ``torch.compile``, in bfloat16 by autocast."""
    import torch

    sys.path.append(str(pathlib.Path(__file__).parents[1] / "cpu_speed"))
    import torch_models

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    x, label = data(name, tiny)
    length, depth = x.shape[1] - 1, 2 if tiny else LLAMA["depth"] if name == "llama_350m" else 12
    package = {"resnet50": "torchvision", "vit_b16": "timm"}.get(name, "transformers")
    library = optional(package)
    if name == "resnet50":
        model = library.models.resnet50() if library else torch_models.ResNet(50, 64, 1000)
    elif name == "vit_b16":
        size = {"img_size": x.shape[1], "depth": depth}
        model = torch_models.ViT(depth, 768, 12, x.shape[1], 16, 1000)
        if library:
            model = library.create_model("vit_base_patch16_224", **size)
    elif name == "bert_base" and library:
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = library.BertConfig(num_labels=2, num_hidden_layers=depth, **off)
        model = library.BertForSequenceClassification(config)
    elif name == "bert_base":
        model = torch_models.Bert(depth, 768, 12, VOCAB[name], length, 0.0, 2)
    elif name == "gpt2_124m" and library:
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = library.GPT2LMHeadModel(library.GPT2Config(n_positions=length, n_layer=depth, **off))
    elif name == "gpt2_124m":
        model = torch_models.Decoder(depth, 768, 12, VOCAB[name], length, 0.0)
    elif library:
        config = library.LlamaConfig(
            vocab_size=VOCAB[name],
            hidden_size=LLAMA["width"],
            intermediate_size=LLAMA["mlp_dim"],
            num_hidden_layers=depth,
            num_attention_heads=LLAMA["heads"],
            max_position_embeddings=length,
        )
        model = library.LlamaForCausalLM(config)
    else:
        raise ModuleNotFoundError("No module named 'transformers', and no Llama stands in for its")
    model = model.to(device).train()
    ids, target = torch.from_numpy(x).to(device), torch.from_numpy(label).long().to(device)
    if name in LENGTH:
        inputs, targets = ids[:, :-1].long().contiguous(), ids[:, 1:].long().contiguous()
        real = torch.ones_like(targets, dtype=torch.bool)
    else:
        model = model.to(memory_format=torch.channels_last)
        inputs = ids.permute(0, 3, 1, 2)

    def loss_of():
        if name not in LENGTH:
            return torch.nn.functional.cross_entropy(model((inputs.float() - 127.5) / 127.5).float(), target)
        if name == "bert_base":
            logits = model(input_ids=targets).logits if library else model(targets, real)
            return torch.nn.functional.cross_entropy(logits.float(), target)
        logits = model(input_ids=inputs, use_cache=False).logits.flatten(0, 1) if library else model(inputs)
        return torch.nn.functional.cross_entropy(logits.float(), targets.flatten())

    run = torch.compile(loss_of) if device == "cuda" else loss_of
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=device == "cuda")

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = run()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    def peak():
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    began = time.perf_counter()
    step()
    return (
        step,
        peak,
        {
            "parameters": sum(p.numel() for p in model.parameters()),
            "compile_seconds": time.perf_counter() - began,
            "with": f"torch {torch.__version__}, {f'{package} {library.__version__}' if library else 'plain PyTorch'}",
        },
    )


if __name__ == "__main__":
    side, which, *more = sys.argv[1:]
    try:
        step, peak, facts = {"ours": ours, "theirs": theirs}[side](which, "--tiny" in more)
    except ImportError as error:
        sys.exit(print(json.dumps({"missing": str(error)}), flush=True))
    for _ in range(1 if "--tiny" in more else WARM):
        step()
    print(json.dumps({"ready": facts}), flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(2 if "--tiny" in more else STEPS):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        gigabytes = None if peak() is None else peak() / 1e9
        print(json.dumps({"seconds": seconds, "peak_gigabytes": gigabytes}), flush=True)
