"""One side of one row of the table: a model's training step, compiled, then timed whenever a line comes in.

python worker.py ours|theirs MODEL [--tiny]

Prints {"ready": ...} once compiled and warmed up; then, for each line read from stdin, {"seconds": [...]}, one number a
step. ``compare.py`` starts the two sides of a row together and times them in turn.
"""

import json
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
    """(step() -> None, what to say of it)."""
    import jax
    import optax

    from bigbase_jax import parallel
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
    compiled = program.step.lower(program.state, parallel.placed_batch(spec, mesh)).compile()
    seconds = time.perf_counter() - began

    def step():
        nonlocal state
        state, sums = compiled(state, placed)
        jax.block_until_ready((state, sums))

    stats = jax.devices()[0].memory_stats() or {}
    memory = compiled.memory_analysis()
    return step, {
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "compile_seconds": seconds,
        "gigabytes": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9 if memory else None,
        "cudnn_attention": "cudnn$fmha" in compiled.as_text() or "fmha" in compiled.as_text().lower(),
        "peak_flops": peak_flops(),
        "device": jax.devices()[0].device_kind,
        "limit": stats.get("bytes_limit"),
        "version": f"jax {jax.__version__}",
    }


# ------------------------------------------------------------------------------------------------------------- theirs


def theirs(name, tiny):
    """The same of torchvision, timm and transformers under ``torch.compile``, in bfloat16 by autocast."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    x, label = data(name, tiny)
    length = x.shape[1] - 1
    layers = {"num_hidden_layers": 2} if tiny else {}
    if name == "resnet50":
        import torchvision

        model = torchvision.models.resnet50()
    elif name == "vit_b16":
        import timm

        model = timm.create_model(
            "vit_base_patch16_224", img_size=x.shape[1], dynamic_img_size=False, **{"depth": 2} if tiny else {}
        )
    elif name == "bert_base":
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=2, **off, **layers))
    elif name == "gpt2_124m":
        off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_positions=length, n_layer=2 if tiny else 12, **off)
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=VOCAB[name],
            hidden_size=LLAMA["width"],
            intermediate_size=LLAMA["mlp_dim"],
            num_hidden_layers=2 if tiny else LLAMA["depth"],
            num_attention_heads=LLAMA["heads"],
            max_position_embeddings=length,
        )
        model = transformers.LlamaForCausalLM(config)
    model = model.to(device).train()
    ids, target = torch.from_numpy(x).to(device), torch.from_numpy(label).long().to(device)
    if name in LENGTH:
        inputs, targets = ids[:, :-1].long().contiguous(), ids[:, 1:].long().contiguous()
    else:
        model = model.to(memory_format=torch.channels_last)
        inputs = ids.permute(0, 3, 1, 2)

    def loss_of():
        if name not in LENGTH:
            return torch.nn.functional.cross_entropy(model((inputs.float() - 127.5) / 127.5).float(), target)
        if name == "bert_base":
            return torch.nn.functional.cross_entropy(model(input_ids=targets).logits.float(), target)
        logits = model(input_ids=inputs, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

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

    began = time.perf_counter()
    step()
    return step, {
        "parameters": sum(p.numel() for p in model.parameters()),
        "compile_seconds": time.perf_counter() - began,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
        "version": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


if __name__ == "__main__":
    side, which, *more = sys.argv[1:]
    step, dataset_info = {"ours": ours, "theirs": theirs}[side](which, "--tiny" in more)
    for _ in range(1 if "--tiny" in more else WARM):
        step()
    print(json.dumps({"ready": dataset_info}), flush=True)
    for _ in sys.stdin:
        seconds = []
        for _ in range(2 if "--tiny" in more else STEPS):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        print(json.dumps({"seconds": seconds}), flush=True)
