"""Alignment: Umeyama's similarity against least squares, and pixels that arrive where the points say."""

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.transforms.faces import ARCFACE, AlignFace, similarity


def least_squares(source, target):
    """[a -b tx; b a ty], linear in its four numbers."""
    rows, right = [], []
    for (x, y), (u, v) in zip(source, target, strict=True):
        rows += [[x, -y, 1, 0], [y, x, 0, 1]]
        right += [u, v]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)[0]
    return np.array([[a, -b, tx], [b, a, ty]])


def test_similarity_is_the_least_squares_one_and_exact_where_it_can_be():
    rng = np.random.default_rng(0)
    for _ in range(20):
        source, target = rng.normal(size=(5, 2)) * 20, rng.normal(size=(5, 2)) * 50 + 100
        if np.linalg.det((target - target.mean(0)).T @ (source - source.mean(0))) > 0:
            np.testing.assert_allclose(similarity(source, target), least_squares(source, target), atol=1e-9)
    angle, scale, shift = 0.7, 2.5, np.array([3.0, -8.0])
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    source = rng.normal(size=(5, 2))
    found = similarity(source, source @ rotation.T + shift)
    np.testing.assert_allclose(found, np.concatenate([rotation, shift[:, None]], 1), atol=1e-12)
    mirrored = similarity(source, source * [-1, 1])
    assert np.linalg.det(mirrored[:, :2]) > 0  # never a mirror image


def test_similarity_has_the_numbers_of_skimage():
    """Of ``skimage.transform.SimilarityTransform.estimate``, 0.26, for landmarks to InsightFace's template."""
    points = np.array([[73.2, 101.5], [121.9, 95.3], [98.4, 128.7], [81.6, 152.2], [124.3, 146.8]])
    theirs = [[0.7431626, -0.08101801, -8.08177078], [0.08101801, 0.7431626, -29.01230821]]
    np.testing.assert_allclose(similarity(points, np.array(ARCFACE) - 0.5), theirs, atol=1e-6)


def test_a_face_is_cut_out_upright_and_its_points_move_along():
    template = np.array(ARCFACE)
    angle = np.deg2rad(25)
    rotation = 1.5 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = template @ rotation.T + [60, 10]
    y, x = np.mgrid[:260, :260] + 0.5
    picture = np.stack([x, y, np.full_like(x, 40)], -1) / 2  # a pixel says where it is
    example = {"image": picture.round().astype(np.uint8), "points": points.astype(np.float32)}
    found = AlignFace()(example, np.random.default_rng(0))
    assert found["image"].shape == (112, 112, 3)
    np.testing.assert_allclose(found["points"], template, atol=1e-3)
    for row, column in ((56, 56), (30, 70), (90, 40)):
        expected = rotation @ [column + 0.5, row + 0.5] + [60, 10]
        np.testing.assert_allclose(found["image"][row, column, :2] * 2.0, expected, atol=2)
    half = AlignFace(56)(example, np.random.default_rng(0))
    np.testing.assert_allclose(half["points"], template / 2, atol=1e-3)
    grey = AlignFace()({**example, "image": example["image"][..., :1]}, np.random.default_rng(0))
    np.testing.assert_array_equal(grey["image"][..., 0], found["image"][..., 0])


def test_what_cannot_be_aligned_is_said():
    with pytest.raises(UserError, match="five points"):
        AlignFace()({"image": np.zeros((9, 9, 3), np.uint8)}, np.random.default_rng(0))
    with pytest.raises(UserError, match="in one place"):
        AlignFace()({"image": np.zeros((9, 9, 3), np.uint8), "points": np.ones((5, 2))}, np.random.default_rng(0))
    with pytest.raises(UserError, match="no numbers"):
        similarity(np.full((5, 2), np.nan), np.array(ARCFACE))
    with pytest.raises(UserError, match="8 pixels"):
        AlignFace(4)
