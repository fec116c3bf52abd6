"""MTCNN's networks against facenet-pytorch's, whose numbers for seeded weights are written down here; its cascade."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from bigbase_jax import pretrained
from bigbase_jax.core import UserError, flatten
from bigbase_jax.inference.faces import FaceDetector, Found, areas, suppressed
from bigbase_jax.models.mtcnn import MTCNN
from bigbase_jax.pretrained.families import load_family


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Weights by their names, in the alphabetical order of these, as the numbers below were made."""
    path, rng = tmp_path_factory.mktemp("mtcnn"), np.random.default_rng(0)
    shapes = flatten(jax.eval_shape(MTCNN().init, jax.random.key(0), jnp.zeros((1, 48, 48, 3))))
    entries = {e.theirs: e for e in load_family("mtcnn").table(MTCNN()).entries}
    given = {}
    for name in sorted(entries):
        shape = entries[name].write([np.zeros(shapes[p].shape) for p in entries[name].paths], {}).shape
        x = rng.normal(size=shape) * (np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.1)
        given[name] = x.astype(np.float32)
    (path / "config.json").write_text(json.dumps({"model_type": "mtcnn"}))
    save_file(given, path / "model.safetensors")
    return path


def picture():
    y, x = np.mgrid[:60, :70]
    return (127.5 + 60 * np.stack([np.sin(x / 9 + y / 30), np.cos(y / 7), np.sin((x + y) / 11)], -1)).round()


def test_each_network_says_what_the_published_one_says(folder, tmp_path):
    model, variables = pretrained.load(folder)

    def run(kind, height, width):
        x = (picture()[None, :height, :width].astype(np.float32) - 127.5) * 0.0078125
        return [np.asarray(found) for found in model.apply(variables, jnp.asarray(x), method=kind)]

    score, off = run("pnet", 31, 34)  # sizes that a pool of 2x2 does not divide
    assert score.shape == (1, 11, 12, 1)
    np.testing.assert_allclose(score[0, [0, 3, -1], [0, 5, -1], 0], [0.413842, 0.470664, 0.263068], atol=1e-5)
    np.testing.assert_allclose(off[0, -1, -1], [-1.285789, 0.304134, 0.40135, 0.697888], atol=1e-5)
    score, off = run("rnet", 24, 24)
    np.testing.assert_allclose(score[0], 0.5573365, atol=1e-5)
    np.testing.assert_allclose(off[0], [1.705615, 0.925655, 0.670052, -1.234095], atol=1e-5)
    score, off, points = run("onet", 48, 48)
    np.testing.assert_allclose(score[0], 0.9771619, atol=1e-5)
    np.testing.assert_allclose(off[0], [-0.426481, -0.663306, -0.042865, -0.677642], atol=1e-5)
    np.testing.assert_allclose(points[0, [0, 4, 5, 9]], [0.921384, 1.046658, 0.383147, 0.052977], atol=1e-5)
    pretrained.save(tmp_path / "out", model, variables)
    again = pretrained.load(tmp_path / "out")[1]
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_areas_are_torchs():
    """``interpolate(mode="area")`` of 5x7 to 3x4, and of 2x3 to 3x5."""
    found = areas(np.arange(35.0).reshape(5, 7, 1), (3, 4))[..., 0]
    np.testing.assert_allclose(found, [[4, 5.5, 7.5, 9], [14.5, 16, 18, 19.5], [25, 26.5, 28.5, 30]], rtol=1e-6)
    found = areas(np.arange(6.0).reshape(2, 3, 1), (3, 5))[..., 0]
    np.testing.assert_allclose(found, [[0, 0.5, 1, 1.5, 2], [1.5, 2, 2.5, 3, 3.5], [3, 3.5, 4, 4.5, 5]], rtol=1e-6)


def test_boxes_that_overlap_a_better_one_go():
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [2, 2, 5, 5]], np.float32)
    scores = np.array([0.5, 0.9, 0.7, 0.8], np.float32)
    assert suppressed(boxes, scores, 0.5).tolist() == [1, 3, 2]  # IoU of the first two: 81 / 119
    assert suppressed(boxes, scores, 0.7).tolist() == [1, 3, 2, 0]
    assert suppressed(boxes, scores, 0.7, of_least=True).tolist() == [1, 2]  # the small one lies in a better one


def test_the_cascade_finds_what_its_networks_say(folder):
    detector = FaceDetector.open(folder, thresholds=(0.0, 0.0, 0.0))
    found = detector(picture().astype(np.uint8))
    assert len(found.boxes) == len(found.scores) == len(found.points) > 0 and np.isfinite(found.points).all()
    area = np.prod(found.boxes[:, 2:] - found.boxes[:, :2], 1)
    assert (np.diff(area) <= 0).all()
    nothing = FaceDetector.open(folder, thresholds=(2.0, 2.0, 2.0))
    assert nothing(picture().astype(np.uint8)).points.shape == (0, 5, 2)
    assert len(detector(np.zeros((11, 300, 3), np.uint8)).boxes) == 0  # no face of 20 pixels fits


def test_a_photo_of_nobody_or_of_two_is_not_enrolled(folder, monkeypatch):
    detector = FaceDetector.open(folder)
    for count, said in ((0, "no face is found"), (2, "it shows 2 faces")):
        many = Found(np.zeros((count, 4)), np.ones(count), np.zeros((count, 5, 2)))
        monkeypatch.setattr(FaceDetector, "__call__", lambda self, x, many=many: many)
        with pytest.raises(UserError, match=said):
            detector.aligned(np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UserError, match="found by an MTCNN"):
        monkeypatch.setattr("bigbase_jax.inference.faces.load", lambda folder: (object(), {}))
        FaceDetector.open(folder)
