"""Published detectors answer pictures as transformers does with the folder's own preprocessor."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.inference.detectors import Canvas
from bigbase_jax.inference.predictor import Predictor

BACKBONE = {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [2, 2, 2, 2], "layer_type": "basic"}
SMALL = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 6}
SMALL |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 2, "encoder_layers": 1}
NAMES = {"id2label": {0: "cell", 1: "cat", 2: "N/A"}, "label2id": {"cell": 0, "cat": 1, "N/A": 2}}
EDGES = {"shortest_edge": 64, "longest_edge": 96}
CASES = {
    "detr": (
        "DetrForObjectDetection",
        "DetrImageProcessorPil",
        {**SMALL, "use_timm_backbone": False, "backbone_config": {"model_type": "resnet", **BACKBONE}},
        {"size": EDGES},
    ),
    "rt_detr": (
        "RTDetrForObjectDetection",
        "RTDetrImageProcessorPil",
        {
            **SMALL,
            "encoder_hidden_dim": 16,
            "encoder_in_channels": [8, 16, 32],
            "decoder_in_channels": [16, 16, 16],
            "backbone_config": {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4], **BACKBONE},
        },
        {"size": {"height": 64, "width": 96}},
    ),
    "yolos": (
        "YolosForObjectDetection",
        "YolosImageProcessorPil",
        {
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 16,
            "image_size": [32, 48],
            "patch_size": 16,
            "num_detection_tokens": 6,
        },
        {"size": EDGES},
    ),
}


@pytest.fixture(scope="module")
def hf():
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.torch = torch
    return transformers


@pytest.mark.parametrize("kind", CASES)
def test_boxes_are_transformers_in_pixels_of_the_original(hf, tmp_path, kind):
    name, processor, words, said = CASES[kind]
    torch = hf.torch
    torch.manual_seed(0)
    model = getattr(hf, name)
    model = model(model.config_class(**words, **NAMES)).eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) * max(p[0].numel(), 4) ** -0.5 * (4 if "query_pos" in path else 1))
    processor = getattr(hf, processor)(**said)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    smooth = [rng.integers(0, 256, (h // 9, w // 9, 3), np.uint8) for h, w in [(75, 140), (150, 100)]]
    for n, x in enumerate(smooth):
        Image.fromarray(x).resize((x.shape[1] * 9, x.shape[0] * 9)).save(tmp_path / f"{n}.png")

    predictor = Predictor.open(tmp_path)
    predictor.task = dataclasses.replace(predictor.task, shown=0.0)
    for n in range(2):
        picture = Image.open(tmp_path / f"{n}.png")
        pad = {"pad_size": {"height": 64 if n == 0 else 96, "width": 96}} if kind == "detr" else {}
        with torch.no_grad():
            found = model(**{k: torch.as_tensor(np.array(v)) for k, v in processor(picture, **pad).items()})
        want = processor.post_process_object_detection(found, threshold=0.0, target_sizes=[picture.size[::-1]])[0]
        answer = predictor.answer(str(tmp_path / f"{n}.png"))[0]
        assert (answer["width"], answer["height"]) == picture.size and len(answer["objects"]) == 6
        scores = np.sort(want["scores"])[::-1]
        np.testing.assert_allclose([o["score"] for o in answer["objects"]], scores[:6], atol=1e-3)
        boxes, labels = want["boxes"].numpy().clip(0, picture.size * 2), want["labels"].numpy()
        for o in answer["objects"]:  # whose scores may be as good as equal
            alike = boxes[labels == list(NAMES["label2id"]).index(o["label"])]
            assert np.abs(alike - o["box"]).max(-1).min() < 0.2, (o, boxes, labels)
        assert np.ptp(boxes, axis=0).max() > 1  # they are not all the same box


def test_a_picture_is_as_large_as_transformers_makes_it(hf):
    from transformers.image_transforms import get_size_with_aspect_ratio

    canvas, rng = Canvas((1333, 1333), 800, 1333), np.random.default_rng(0)
    sizes = [(800, 600), (600, 800), (800, 800), (1, 5000), *rng.integers(10, 4000, (500, 2)).tolist()]
    for size in sizes:
        fitted = canvas.fitted(*size)
        want = get_size_with_aspect_ratio(size, 800, 1333)
        assert fitted == want or min(want) < 1, (size, fitted, want)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (None, "has no preprocessor_config.json"),
        ({"size": {"shortest_edge": 64}}, "known here are sides and edges"),
        ({"size": {"height": 0, "width": 64}}, "size="),
        ({"size": {"height": 10**9, "width": 64}}, "size="),
        ({"image_std": [0, 1, 1]}, "image_std="),
    ],
)
def test_preprocessors_that_are_not_known_are_one_sentence(hf, tmp_path, said, sentence):
    name, _, words, _ = CASES["yolos"]
    model = getattr(hf, name)
    model(model.config_class(**words, **NAMES)).save_pretrained(tmp_path)
    if said is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=sentence):
        Predictor.open(tmp_path)
