"""A server as one writes it with FastAPI around onnxruntime, PyTorch or transformers, to compare with.

python experiments/serving/peer.py onnxruntime|torch RUN --port=8001     a run's model, exported to ONNX and safetensors
python experiments/serving/peer.py generate FOLDER --port=8001            a folder of transformers

Files and rows are read, and answers written, by the run's own predictor, so that only the engine and the server differ.
A request is a call in a thread of Starlette's. ``--threads`` are the engine's own, ``--at_once`` the calls that compute
at a time; both are chosen by measuring (README.md).
"""

import argparse
import contextlib
import json
import pathlib
import threading

import fastapi
import numpy as np
import uvicorn
from starlette.concurrency import run_in_threadpool


def real(example, name):
    """An array of an example, a text's without its padding."""
    return example[name][: int((example["segment_ids"] > 0).sum())] if "segment_ids" in example else example[name]


def by_onnxruntime(run, threads):
    """A function of one example's arrays, which gives what the model does of it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(f"{run}/export/onnx/model.onnx", options)
    names, out = [x.name for x in session.get_inputs()], [x.name for x in session.get_outputs()]

    def compute(example):
        found = session.run(None, {name: real(example, name)[None] for name in names})
        return {name: x[0] for name, x in zip(out, found, strict=True)}

    return compute


def by_torch(run, threads):
    """The same with transformers' model."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    folder = f"{run}/export/safetensors"
    with open(f"{folder}/config.json") as file:
        texts = "vocab_size" in json.load(file)
    kind = f"AutoModelFor{'Sequence' if texts else 'Image'}Classification"
    model = getattr(transformers, kind).from_pretrained(folder).eval()
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))

    def given(example):
        if not texts:
            return {"pixel_values": ((torch.from_numpy(example["image"]) / 255 - mean) / std).permute(2, 0, 1)[None]}
        names = {"input_ids": "tokens", "attention_mask": "segment_ids", "token_type_ids": "token_type_ids"}
        return {name: torch.from_numpy(real(example, own)).long()[None] for name, own in names.items()}

    def compute(example):
        with torch.inference_mode():
            logits_K = model(**given(example)).logits[0].numpy()
        e_K = np.exp(logits_K - logits_K.max())
        return {"logits": logits_K, "probabilities": e_K / e_K.sum(), "tokens": example.get("tokens")}

    return compute


def answering(asked, compute):
    """The application of a run's model."""
    from bigbase_jax.inference.predictor import Predictor

    predictor = Predictor.open(asked.run)
    turn = threading.BoundedSemaphore(asked.at_once) if asked.at_once else contextlib.nullcontext()

    def answer(kind, body):
        examples = predictor.examples(json.loads(body) if kind == "application/json" else body)
        with turn:
            outputs = [compute(example) for example in examples]
        return predictor.said(list(zip(examples, outputs, strict=True)))

    app = fastapi.FastAPI()

    @app.post("/v1/predict/{name}")
    async def predict(name: str, request: fastapi.Request):
        body = await request.body()
        return {"model": name, "answers": await run_in_threadpool(answer, request.headers["content-type"], body)}

    return app


def writing(asked):
    """The application of a decoder: tokens in, tokens out."""
    import torch
    import transformers

    torch.set_num_threads(asked.threads)
    exported = pathlib.Path(asked.run, "export", "safetensors")
    folder = exported if exported.exists() else asked.run
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    turn = threading.Lock()  # a call at a time

    def write(tokens, count):
        tokens_1L = torch.tensor([tokens])
        words = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        with turn, torch.inference_mode():
            return model.generate(tokens_1L, attention_mask=torch.ones_like(tokens_1L), **words)[0, len(tokens) :]

    app = fastapi.FastAPI()

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request):
        asked = await request.json()
        tokens = await run_in_threadpool(write, asked["prompt"], asked["max_tokens"])
        return {"tokens": tokens.tolist(), "usage": {"completion_tokens": len(tokens)}}

    return app


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("engine", choices=("onnxruntime", "torch", "generate"))
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--at_once", type=int, default=0, help="0: as many as there are threads for")
    asked = parser.parse_args()
    if asked.engine == "generate":
        app = writing(asked)
    else:
        by = by_onnxruntime if asked.engine == "onnxruntime" else by_torch
        app = answering(asked, by(asked.run, asked.threads))
    uvicorn.run(app, port=asked.port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
