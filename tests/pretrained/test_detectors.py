"""DETR, RT-DETR and YOLOS against transformers: the same logits and boxes, padded or not, and back to the same bits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.pretrained import load, save

BASIC = {"embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [2, 2, 2, 2], "layer_type": "basic"}
BOTTLENECK = {"embedding_size": 4, "hidden_sizes": [16, 32, 64, 128], "depths": [3, 4, 6, 3]}
DETR = {
    "use_timm_backbone": False,
    "backbone_config": {"model_type": "resnet", "out_features": ["stage4"], **BASIC},
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 24,
    "num_queries": 5,
    "num_labels": 3,
}
RT_DETR = {
    "backbone_config": {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4], **BASIC},
    "d_model": 16,
    "encoder_hidden_dim": 24,
    "encoder_in_channels": [8, 16, 32],
    "decoder_in_channels": [24, 24, 24],
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 28,
    "decoder_layers": 2,
    "decoder_n_points": 3,
    "num_queries": 7,
    "num_labels": 3,
}
YOLOS = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": [40, 64],
    "patch_size": 8,
    "num_detection_tokens": 5,
    "num_labels": 3,
}
CASES = {
    "detr": ("DetrForObjectDetection", DETR),
    "detr, bottlenecks, gelu": (
        "DetrForObjectDetection",
        {
            **DETR,
            "activation_function": "gelu",
            "backbone_config": {"model_type": "resnet", "out_features": ["stage4"], **BOTTLENECK},
        },
    ),
    "rt-detr": ("RTDetrForObjectDetection", RT_DETR),
    "rt-detr, bottlenecks, narrow branches, a trained backbone": (
        "RTDetrForObjectDetection",
        {
            **RT_DETR,
            "backbone_config": {"model_type": "rt_detr_resnet", "out_indices": [2, 3, 4], **BOTTLENECK},
            "encoder_in_channels": [32, 64, 128],
            "hidden_expansion": 0.5,
            "freeze_backbone_batch_norms": False,
            "encoder_layers": 2,
            "activation_function": "relu",
        },
    ),
    "yolos": ("YolosForObjectDetection", YOLOS),
    "yolos, positions at the beginning alone": (
        "YolosForObjectDetection",
        {**YOLOS, "use_mid_position_embeddings": False, "hidden_act": "relu"},
    ),
}
SHAPES = {"detr": (70, 100), "rt_detr": (96, 64), "yolos": (48, 56)}


@functools.cache
def picture(shape):
    """f32[2,3,H,W], as torch has them."""
    return np.random.RandomState(1).randn(2, 3, *shape).astype(np.float32)


@pytest.fixture
def random_detector(random_model, hf):
    """``random_model``, whose queries differ as much as trained ones do."""

    def make(name, words):
        model = random_model(name, **words)
        with hf.torch.no_grad():
            for path, p in model.named_parameters():
                if "query_position_embeddings" in path or "detection_tokens" in path:
                    p.mul_(4)
        return model

    return make


def apply(model, variables, x_BCHW, valid=None):
    """(logits, boxes) of the last layer that predicts."""
    with jax.default_matmul_precision("highest"):
        found = jax.jit(model.apply)(variables, jnp.asarray(x_BCHW.transpose(0, 2, 3, 1)), valid)
    return np.asarray(found.logits[-1]), np.asarray(found.boxes[-1])


def theirs_of(hf, model, x, **words):
    with hf.torch.no_grad():
        found = model(hf.torch.tensor(x), **words)
    return found.logits.numpy(), found.pred_boxes.numpy()


@pytest.mark.parametrize("case", CASES)
def test_the_same_objects_and_back_to_the_same_bits(hf, random_detector, tmp_path, case):
    name, words = CASES[case]
    theirs = random_detector(name, words)
    theirs.save_pretrained(tmp_path / "theirs")
    x = picture(SHAPES[theirs.config.model_type])
    want = theirs_of(hf, theirs, x)
    assert (
        want[0].std(1).mean() > 0.02 and want[1].std(1).mean() > 0.005
    )  # queries differ: there is something to compare

    model, variables = load(tmp_path / "theirs")
    for ours, other in zip(apply(model, variables, x), want, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert {key for key in set(old) ^ set(new) if "denoising" not in key} == set()
    assert [key for key in new if not hf.torch.equal(old[key], new[key])] == []
    for ours, other in zip(theirs_of(hf, back.eval(), x), want, strict=True):
        np.testing.assert_array_equal(ours, other)
    again, same = load(tmp_path / "ours")
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, variables, same))


def test_detr_does_not_see_padding(hf, random_detector, tmp_path):
    theirs = random_detector("DetrForObjectDetection", DETR)
    theirs.save_pretrained(tmp_path)
    mask = np.ones((2, 70, 100), np.int64)
    mask[1, 40:] = mask[1, :, 61:] = 0
    x = picture((70, 100)) * mask[:, None].astype(np.float32)
    want = theirs_of(hf, theirs, x, pixel_mask=hf.torch.tensor(mask))
    model, variables = load(tmp_path)
    found = apply(model, variables, x, jnp.array([[70, 100], [40, 61]]))
    for ours, other, unmasked in zip(found, want, apply(model, variables, x), strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-4)
        np.testing.assert_allclose(ours[0], unmasked[0], atol=1e-5)
        assert np.abs(ours[1] - unmasked[1]).max() > 1e-3


def test_yolos_sees_padded_pictures_as_it_sees_them_alone(hf, random_detector, tmp_path):
    theirs = random_detector("YolosForObjectDetection", YOLOS)
    theirs.save_pretrained(tmp_path)
    x, (h, w) = picture((48, 56)), (32, 40)
    want = theirs_of(hf, theirs, x[1:, :, :h, :w])
    model, variables = load(tmp_path)
    for ours, other in zip(apply(model, variables, x, jnp.array([[48, 56], [h, w]])), want, strict=True):
        np.testing.assert_allclose(ours[1], other[0], atol=1e-4)


def test_timms_names_are_read(random_model, tmp_path):
    """Most published folders of DETR have a backbone of timm's, whose names are torchvision's."""
    import re

    from safetensors.numpy import load_file, save_file

    config = {**DETR, "backbone_config": {"model_type": "resnet", "out_features": ["stage4"], **BASIC}}
    config["backbone_config"] |= {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]}
    random_model("DetrForObjectDetection", **config).save_pretrained(tmp_path)
    model, variables = load(tmp_path)
    tensors, names = load_file(tmp_path / "model.safetensors"), {}
    for name in tensors:
        new = re.sub(r"embedder\.embedder\.", "stem.", name)
        new = re.sub(r"encoder\.stages\.(\d)\.layers\.(\d)", lambda m: f"layer{int(m[1]) + 1}.{m[2]}", new)
        new = re.sub(r"(layer\d\.\d)\.layer\.(\d)\.convolution", lambda m: f"{m[1]}.conv{int(m[2]) + 1}", new)
        new = re.sub(r"(layer\d\.\d)\.layer\.(\d)\.normalization", lambda m: f"{m[1]}.bn{int(m[2]) + 1}", new)
        new = new.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        names[name] = new.replace("stem.convolution", "conv1").replace("stem.normalization", "bn1")
    assert names["model.backbone.conv_encoder.model.encoder.stages.1.layers.0.layer.1.convolution.weight"] == (
        "model.backbone.conv_encoder.model.layer2.0.conv2.weight"
    )
    save_file({names[name]: x for name, x in tensors.items()}, tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text())
    said |= {"use_timm_backbone": True, "backbone": "resnet18", "backbone_config": None}
    (tmp_path / "config.json").write_text(json.dumps(said))
    again, same = load(tmp_path)
    assert again == model and jax.tree.all(jax.tree.map(np.array_equal, variables, same))


@pytest.mark.parametrize(
    ("case", "change", "said"),
    [
        ("detr", {"backbone_config": {"model_type": "swin"}}, "known here are resnet"),
        ("detr", {"backbone_config": None, "backbone": "efficientnet_b0"}, "known here are resnet"),
        ("detr", {"backbone_config": {"model_type": "resnet", **BASIC, "depths": [1, 1, 1, 1]}}, "known here are"),
        ("detr", {"d_model": 1 << 30}, "d_model"),
        ("rt-detr", {"backbone_config": {"model_type": "resnet", **BASIC}}, "rt_detr_resnet"),
        ("rt-detr", {"decoder_in_channels": [16, 16, 16]}, "decoder_in_channels"),
        ("rt-detr", {"eval_size": [640, 640]}, "eval_size"),
        ("yolos", {"image_size": [4, 64]}, "holds no patch"),
    ],
)
def test_other_configs_are_refused(random_model, tmp_path, case, change, said):
    name, words = CASES[case]
    random_model(name, **words).config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": [name], **change}))
    with pytest.raises(UserError, match=said):
        load(tmp_path)
