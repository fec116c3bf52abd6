"""Retrieval of captions and pictures over a split, against counting by hand.

Legend: N pictures, C captions, E width.
"""

import numpy as np
import pytest

from bigbase_jax.core import Evaluated, Gallery, Table
from bigbase_jax.evaluators.captions import CaptionRetrieval, ranks


def some(N=40, C=3, E=4, seed=0):
    rng = np.random.default_rng(seed)
    vector, caption = rng.normal(size=(N, E)).astype(np.float32), rng.normal(size=(N, C, E)).astype(np.float32)
    caption += vector[:, None]
    real = rng.random((N, C)) < 0.8
    real[:, 0] = True
    return vector, caption, real


def test_ranks_are_those_of_a_sorted_list():
    vector, caption, real = some()
    found = ranks(vector, caption, real)
    names = [(n, c) for n, c in np.argwhere(real)]
    for n in range(len(vector)):
        order = sorted(names, key=lambda at: -vector[n] @ caption[at])
        assert found["rank"][n] == 1 + min(i for i, at in enumerate(order) if at[0] == n)
        assert found["best"][n, 0] == order[0][0] * 3 + order[0][1]
    for n, c in names:
        assert found["caption_rank"][n, c] == 1 + sum(
            vector[m] @ caption[n, c] > vector[n] @ caption[n, c] for m in range(40)
        )
    assert (found["caption_rank"][~real] == 0).all()
    assert found["rank"].max() > 1


def test_a_model_that_says_nothing_gains_nothing():
    _, caption, real = some(N=100, C=5)
    real[:] = True
    found = ranks(np.ones((100, 4), np.float32), np.ones_like(caption), real)
    assert (found["rank"] == 1 + 495 / 2).all() and (found["caption_rank"] == 1 + 99 / 2).all()
    recalls = CaptionRetrieval().recalls(found["rank"], found["caption_rank"], real)
    assert recalls["image_to_text_r@10"] == recalls["text_to_image_r@10"] == 0


def test_recalls_have_intervals_and_what_chance_gives():
    real, of_seeds = np.ones((100, 5), bool), []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        vector, caption = rng.normal(size=(100, 64)), rng.normal(size=(100, 5, 64))
        random = ranks(vector.astype(np.float32), caption.astype(np.float32), real)
        of_seeds.append(CaptionRetrieval().recalls(random["rank"], random["caption_rank"], real))
    found = of_seeds[0]
    assert found["text_to_image_r@10_chance"] == 0.1
    assert found["image_to_text_r@10_chance"] == pytest.approx(1 - np.prod([(495 - i) / (500 - i) for i in range(10)]))
    for way in ("image_to_text_r@10", "text_to_image_r@10"):
        assert abs(np.mean([one[way] for one in of_seeds]) - found[f"{way}_chance"]) < 0.015
        assert found[f"{way}_low"] < found[way] < found[f"{way}_high"] < found[f"{way}_low"] + 0.2
        held = sum(one[f"{way}_low"] <= one[f"{way}_chance"] <= one[f"{way}_high"] for one in of_seeds)
        assert held >= 7


def test_the_report_shows_the_worst_first():
    vector, caption, real = some()
    found = ranks(vector, caption, real)
    evaluator = CaptionRetrieval(ks=(1, 5))
    tokens = np.where(real[..., None], np.arange(40 * 3).reshape(40, 3, 1), -1)
    kept = {**found, "index": np.arange(40), "tokens": tokens}
    metrics = evaluator.recalls(found["rank"], found["caption_rank"], real)
    shown, gallery = evaluator.figures(Evaluated("test", metrics, kept))
    assert isinstance(shown, Table) and len(shown.rows) == 4 and shown.rows[0][2] == metrics["image_to_text_r@1"]
    assert isinstance(gallery, Gallery) and gallery.cards[0].example == np.argsort(-found["rank"], kind="stable")[0]
    assert not gallery.cards[0].right and gallery.cards[-1].right
