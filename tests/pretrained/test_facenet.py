"""FaceNet's network against facenet-pytorch's class, whose numbers for seeded weights are kept here."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from bigbase_jax import pretrained
from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.inception_resnet import InceptionResNetV1
from bigbase_jax.models.layers import ModelError
from bigbase_jax.models.margin import unit
from bigbase_jax.pretrained.families import load_family

THEIRS = np.load(pathlib.Path(__file__).with_name("facenet.npy"))
"""f32[2,512] by facenet-pytorch 2.6.0 and torch 2.13, of the two pictures below."""


def seeded():
    """Weights by their names, in the alphabetical order of these, as the numbers above were made."""
    model, rng = InceptionResNetV1(), np.random.default_rng(0)
    shapes = flatten(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 160, 160, 3))))
    table = load_family("facenet").table(model)
    theirs = {
        e.theirs: e.write([np.broadcast_to(np.int8(0), shapes[path].shape) for path in e.paths], {}).shape
        for e in table.entries
    }
    found = {}
    for name in sorted(theirs):
        shape = theirs[name]
        x = rng.normal(size=shape)
        if name.endswith("running_var"):
            x = 1 + 0.2 * np.abs(x)
        elif name.endswith("bn.weight"):
            x = 1 + 0.1 * x
        else:
            x = x * np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1 * x
        found[name] = x.astype(np.float32)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("facenet")
    (path / "config.json").write_text(json.dumps({"model_type": "facenet"}))
    extra = {"logits.weight": np.zeros((3, 512), np.float32), "logits.bias": np.zeros(3, np.float32)}
    save_file({**seeded(), **extra}, path / "model.safetensors")
    return path


def test_vectors_are_those_of_the_published_class_and_weights_go_out_as_they_came(folder, tmp_path):
    model, variables = pretrained.load(folder)
    y, x = np.mgrid[:160, :160]
    picture = np.stack([np.sin(x / 9), np.cos(y / 7), np.sin((x + y) / 11)], -1).astype(np.float32)
    found = unit(jax.jit(model.apply)(variables, np.stack([picture, picture[::-1]])))
    np.testing.assert_allclose(found, THEIRS, atol=1e-4)
    assert np.abs(THEIRS[0] - THEIRS[1]).max() > 1e-2
    pretrained.save(tmp_path / "out", model, variables)
    again = pretrained.load(tmp_path / "out")[1]
    for name, value in flatten(variables).items():
        np.testing.assert_array_equal(flatten(again)[name], value, err_msg=name)


def test_what_is_missing_or_too_small_is_said(folder, tmp_path):
    given = seeded()
    given.pop("repeat_2.3.branch1.1.conv.weight")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "facenet"}))
    save_file(given, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="repeat_2_3"):
        pretrained.load(tmp_path)
    with pytest.raises(ModelError, match="75 is the least"):
        jax.eval_shape(InceptionResNetV1().init, jax.random.key(0), jnp.zeros((1, 74, 74, 3)))
    shape = jax.eval_shape(InceptionResNetV1().init_with_output, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))[0]
    assert shape.shape == (1, 512)
