"""The drawn cats and dogs: the same everywhere and in any order, balanced, and not told apart by colour."""

import concurrent.futures
import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from bigbase_jax.core import Dataset, Source, UserError
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs

GOLDEN = (142.6, 187.9, 135.9, 80.5, 153.3, 123.6)


def _hash(x):
    return hashlib.sha256(x.tobytes()).hexdigest()


def test_is_a_dataset_that_says_what_it_is():
    data = DrawnCatsAndDogs()
    assert isinstance(data, Dataset)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 3500, "val": 500, "test": 1000}
    assert data.dataset_info == {"num_classes": 2, "class_names": ("cat", "dog")}
    assert "5,000" in data.description
    assert "drawn by the program" in data.description
    assert "not photos" in data.description
    for split, source in data.splits.items():
        assert isinstance(source, Source)
        np.testing.assert_array_equal(np.bincount(source.labels), [len(source) / 2] * 2)
        example = source[3]
        assert example["image"].shape == (64, 64, 3)
        assert example["image"].dtype == np.uint8
        assert example["label"].dtype == np.int32
        assert example["label"].shape == ()
        assert example["label"] == source.labels[3]
        assert source.name(3) == f"{split}[3]"


@pytest.mark.parametrize("size", [16, 33, 64, 128])
def test_any_size(size):
    x_HWC = DrawnCatsAndDogs(size=size).splits["train"][0]["image"]
    assert x_HWC.shape == (size, size, 3)
    assert x_HWC.std() > 10


def test_a_picture_depends_on_seed_and_position_alone():
    source = DrawnCatsAndDogs().splits["train"]
    in_order = [_hash(source[i]["image"]) for i in range(24)]
    assert len(set(in_order)) == 24
    backwards = [_hash(source[i]["image"]) for i in reversed(range(24))]
    assert backwards[::-1] == in_order
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda i: _hash(source[i]["image"]), range(24))) == in_order
    assert [_hash(pickle.loads(pickle.dumps(source))[i]["image"]) for i in range(3)] == in_order[:3]
    other = DrawnCatsAndDogs(seed=1).splits["train"]
    assert {_hash(other[i]["image"]) for i in range(24)}.isdisjoint(in_order)


def test_another_process_draws_the_same():
    code = (
        "import hashlib\nfrom bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs as D\n"
        "print(hashlib.sha256(D().splits['test'][17]['image'].tobytes()).hexdigest())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert told == _hash(DrawnCatsAndDogs().splits["test"][17]["image"])


def test_splits_continue_one_series():
    """More training pictures begin with the same ones, and no picture is in two splits."""
    small, large = DrawnCatsAndDogs(num_train=10, num_val=4, num_test=4), DrawnCatsAndDogs(num_train=18)
    seen = [_hash(source[i]["image"]) for source in small.splits.values() for i in range(len(source))]
    assert len(set(seen)) == 18
    assert seen == [_hash(large.splits["train"][i]["image"]) for i in range(18)]


def test_golden_means():
    """Coarse, so that it holds with every Pillow: change it only together with ``drawn._VERSION``."""
    source = DrawnCatsAndDogs().splits["train"]
    means = [source[i]["image"].mean() for i in range(6)]
    np.testing.assert_allclose(means, GOLDEN, atol=1.0)


def test_neither_brightness_nor_colour_nor_size_tells_the_classes_apart():
    source = DrawnCatsAndDogs(size=32).splits["train"]
    x_NHWC = np.stack([source[i]["image"] for i in range(600)]).astype(np.float32)
    labels = source.labels[:600]
    for feature_N in (*x_NHWC.mean((1, 2)).T, x_NHWC.mean((1, 2, 3)), x_NHWC.std((1, 2, 3)), x_NHWC.max((1, 2, 3))):
        order = np.argsort(feature_N)
        dogs = np.concatenate([[0], np.cumsum(labels[order])])
        cats = np.arange(601) - dogs
        accuracy = np.abs(cats - dogs).max() / 600 + 0.5  # of the best threshold, seen on the same pictures
        assert accuracy < 0.6


def test_fingerprint_follows_the_arguments():
    prints = {
        DrawnCatsAndDogs(**changed).fingerprint()
        for changed in ({}, {"seed": 1}, {"size": 32}, {"num_train": 100}, {"num_val": 1}, {"num_test": 1})
    }
    assert len(prints) == 6
    assert DrawnCatsAndDogs().fingerprint() == DrawnCatsAndDogs().fingerprint()


def test_splits_can_be_left_out():
    assert list(DrawnCatsAndDogs(num_val=0, num_test=0).splits) == ["train"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"size": 8}, "size 8"), ({"num_train": 1}, "num_train is 1"), ({"num_test": -1}, "num_test is -1")],
)
def test_impossible_arguments(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        DrawnCatsAndDogs(**arguments)
