"""A picture at a time: the detector of the study, by JAX and by onnxruntime, beside torchvision's, in turn.

python experiments/detection/latency.py [SECONDS]

All weights are random: how long a network takes does not depend on them. Ours suppresses all of its 400 candidates so;
torchvision's have scores below their threshold, and hardly any. torchvision is no dependency. Where its operators are
another torch's, ``nms`` is given in PyTorch; ``raw`` is the network alone, without what comes after it.
"""

import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np
import torch

from bigbase_jax.export import onnx
from bigbase_jax.inference import engines
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.fcos import FCOS
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.tasks.dense_detection import DenseDetection

SIZE = 256, 352
CLASSES = 3


def nms(boxes, scores, most):
    """As torchvision's."""
    order, kept = torch.argsort(scores, descending=True, stable=True), []
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(order):
        first, order = order[0], order[1:]
        kept.append(first)
        low, high = torch.maximum(boxes[first, :2], boxes[order, :2]), torch.minimum(boxes[first, 2:], boxes[order, 2:])
        shared = (high - low).clamp(min=0).prod(1)
        order = order[shared <= most * (area[first] + area[order] - shared)]
    return torch.stack(kept) if kept else torch.zeros(0, dtype=torch.long)


def ours(width=24):
    """{name: function of a picture u8[H,W,3]}, and the number of parameters."""
    model = FCOS(ResNet(depth=18, width=width), CLASSES, width=2 * width, depth=2, groups=8)
    task = DenseDetection(model)
    picture = {"image": np.zeros((1, *SIZE, 3), np.uint8)}
    variables = task.init(jax.random.key(0), picture)
    spec = {"image": jax.ShapeDtypeStruct((*SIZE, 3), np.uint8)}
    predict = jax.jit(task.predict)
    found = {"jax": lambda x: jax.device_get(predict(variables, {"image": x[None]}))}
    with tempfile.TemporaryDirectory() as folder:
        onnx.write(Predictor(task, variables, {}, spec, lambda: None), pathlib.Path(folder))
        _, compute, _ = engines.opened(pathlib.Path(folder), task, spec)
    found["onnxruntime"] = lambda x: compute(None, {"image": x[None]})
    x = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    for name, value in found["jax"](x).items():
        np.testing.assert_allclose(found["onnxruntime"](x)[name], value, atol=1e-3, err_msg=name)
    return found, sum(x.size for x in jax.tree.leaves(variables["params"]))


def theirs():
    """{name: (function, parameters)}."""
    try:
        import torchvision
    except RuntimeError:  # of another torch: its operators are not there
        theirs.library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            theirs.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        theirs.library.impl("nms", nms, "CPU")
        import torchvision

        torchvision.ops.boxes._assert_has_ops = lambda: None
    detection = torchvision.models.detection
    sides = {"min_size": SIZE[0], "max_size": SIZE[1], "num_classes": CLASSES + 1}
    backbone = detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, returned_layers=[2, 3, 4]
    )
    models = {
        "FCOS, ResNet-50": detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, **sides),
        "FCOS, ResNet-18": detection.FCOS(
            backbone,
            anchor_generator=detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4),
            **sides,
        ),
        "SSDlite320, MobileNetV3": detection.ssdlite320_mobilenet_v3_large(
            weights=None, weights_backbone=None, num_classes=CLASSES + 1
        ),
    }
    return {name: (model.eval(), sum(x.numel() for x in model.parameters())) for name, model in models.items()}


def main(seconds=20.0):
    mine, size = ours()
    runs = {f"ours, FCOS, ResNet-18 of width 24: {name}": (run, size) for name, run in mine.items()}

    def whole(model):
        return lambda x: model([torch.from_numpy(x).permute(2, 0, 1).float() / 255])

    def raw(model):
        def run(x):
            pictures, _ = model.transform([torch.from_numpy(x).permute(2, 0, 1).float() / 255])
            model.head(list(model.backbone(pictures.tensors).values()))

        return run

    for name, (model, count) in theirs().items():
        runs[f"torchvision, {name}"] = whole(model), count
        runs[f"torchvision, {name}: raw"] = raw(model), count
    times = {name: [] for name in runs}
    rng, end = np.random.default_rng(0), time.monotonic() + seconds * len(runs)
    with torch.inference_mode():
        while time.monotonic() < end or min(map(len, times.values())) < 12:
            x = rng.integers(0, 256, (*SIZE, 3), np.uint8)
            for name, (run, _) in runs.items():
                began = time.perf_counter()
                run(x)
                times[name].append(1e3 * (time.perf_counter() - began))
    for name, (_, count) in runs.items():
        kept = np.array(times[name][2:])
        line = {"name": name, "parameters": count, "runs": len(kept)}
        line |= {f"p{q}_ms": round(float(np.percentile(kept, q)), 2) for q in (10, 50, 90)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
