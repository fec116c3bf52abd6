"""Boxes on the device, against loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.models import boxes as B


def some(n, seed=0):
    rng = np.random.default_rng(seed)
    corner = rng.uniform(0, 60, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 40, (n, 2))], 1).astype(np.float32)


def by_hand(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    around = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return shared / union, shared / union - (around - union) / around


def test_conventions_and_back():
    given = np.array([[2.0, 3.0, 8.0, 7.0]])
    assert B.convert(given, "xyxy", "xywh").tolist() == [[2, 3, 6, 4]]
    assert B.convert(given, "xyxy", "cxcywh").tolist() == [[5, 5, 6, 4]]
    for one in B.CONVENTIONS:
        for other in B.CONVENTIONS:
            there = B.convert(some(9), one, other)
            np.testing.assert_allclose(B.convert(there, other, one), some(9), atol=1e-5)
            np.testing.assert_allclose(B.convert(jnp.array(some(9)), one, other), there, atol=1e-5)
    with pytest.raises(ValueError, match="yxyx"):
        B.convert(given, "yxyx")


def test_overlaps_are_those_by_hand():
    a, b = some(7), some(5, 1)
    overlap, generalized = B.iou(a[:, None], b), B.generalized_iou(a[:, None], b)
    for i in range(7):
        for j in range(5):
            wanted = by_hand(a[i].astype(float), b[j].astype(float))
            np.testing.assert_allclose((overlap[i, j], generalized[i, j]), wanted, atol=1e-5)
    assert float(generalized.min()) < 0 < float(overlap.max())
    same = B.iou(a, a)
    np.testing.assert_allclose(same, 1, atol=1e-6)


def test_empty_and_reversed_boxes_have_no_area_and_finite_gradients():
    bad = jnp.array([[4.0, 4, 4, 4], [9, 9, 3, 3], [0, 0, 0, 0]])
    assert B.area(bad).tolist() == [0, 0, 0]
    assert B.iou(bad, bad).tolist() == [0, 0, 0]
    assert jnp.isfinite(jax.grad(lambda x: B.generalized_iou(x, bad).sum())(bad)).all()


def test_clipped_to_the_picture():
    assert B.clip(jnp.array([[-5.0, -1, 50, 70]]), 60, 40).tolist() == [[0, 0, 40, 60]]


def greedy(boxes, scores, classes, most):
    kept = []
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] > 0 and all(
            classes[i] != classes[j] or by_hand(boxes[i].astype(float), boxes[j].astype(float))[0] <= most for j in kept
        ):
            kept.append(i)
    return kept


@pytest.mark.parametrize("seed", range(5))
def test_nms_is_the_greedy_loop(seed):
    rng = np.random.default_rng(seed)
    boxes, scores = some(60, seed), np.sort(rng.uniform(0.01, 1, 60).astype(np.float32))[::-1].copy()
    classes = rng.integers(0, 2, 60).astype(np.int32)
    scores[-4:] = 0
    wanted = greedy(boxes, scores, classes, 0.4)
    assert 5 < len(wanted) < 50
    found = jax.jit(B.nms, static_argnums=(1, 2))(B.Detections(boxes, scores, classes), 60, 0.4)
    assert found.scores.shape == (60,)
    np.testing.assert_array_equal(found.boxes[: len(wanted)], boxes[wanted])
    np.testing.assert_array_equal(found.classes[: len(wanted)], classes[wanted])
    assert float(jnp.abs(found.scores[len(wanted) :]).max()) == 0
    best = B.nms(B.Detections(boxes, scores, classes), 3, 0.4)
    np.testing.assert_array_equal(best.boxes, boxes[wanted[:3]])


def test_top_k_of_pairs_of_box_and_class_pads_what_is_missing():
    scores = jnp.array([[0.9, 0.8], [0.1, 0.95], [0.02, 0.0]])
    found = B.top_k(jnp.array(some(3)), scores, 8, least=0.05)
    np.testing.assert_allclose(found.scores, [0.95, 0.9, 0.8, 0.1, 0, 0, 0, 0])
    assert found.classes.tolist() == [1, 0, 1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(found.boxes[:4], some(3)[[1, 0, 0, 1]])
    assert float(found.boxes[4:].sum()) == 0
