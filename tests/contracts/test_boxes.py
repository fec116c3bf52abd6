"""Boxes, points and segmentations that move with the picture: what a detector needs of the transforms."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.transforms import image as T

H, W, M = 60, 80, 4
FLIP, SHRINK = T.RandomFlip(1.0), T.RandomResizedCrop((48, 40), scale=(0.3, 1.0), method="nearest")
CHAINS = [
    (T.Resize((45, 90)),),
    (T.Resize(40, "bicubic"), T.CenterCrop(36)),
    (T.CenterCrop((80, 50)),),
    (T.ResizeCenterCrop(50, (40, 36)),),
    (SHRINK,),
    (T.RandomCrop((50, 64), padding=8, mode="constant"), FLIP),
    (FLIP, T.ColorJitter(0.05), SHRINK, T.RandomFlip(), T.CenterCrop(52)),
    (T.RandAugment(num_ops=3, magnitude=12), T.Resize((120, 160), "nearest")),
    (T.TrivialAugment(), FLIP),
    (T.Grey(), T.Resize(50)),
]


class Rectangles:
    """Dark pictures with a bright rectangle: its box first, three of padding, its corners, and it as a class map."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        x0, y0 = int(rng.integers(8, 44)), int(rng.integers(8, 34))
        x1, y1 = x0 + int(rng.integers(12, 28)), y0 + int(rng.integers(12, 18))
        image = rng.integers(0, 40, (H, W, 3), np.uint8)
        inside = np.zeros((H, W), np.uint8)
        inside[y0:y1, x0:x1] = 1
        image[inside == 1] = 255
        boxes = np.zeros((M, 4), np.float32)
        boxes[0] = x0, y0, x1, y1
        points = np.float32([[(x0 + x1) / 2, (y0 + y1) / 2], [x0, y0]])
        return {"image": image, "boxes": boxes, "points": points, "segmentation": inside}


@dataclasses.dataclass
class Detection:
    dataset_info: ClassVar = {}
    description: ClassVar = "rectangles for a test"
    splits: dict = dataclasses.field(default_factory=lambda: {"train": Rectangles()})

    def fingerprint(self):
        return "rectangles"


def batches(transforms, tmp_path):
    data = Data(Detection(), 8, transforms, transforms, workers=1, cache_dir=str(tmp_path))
    prepared = data.prepare(lambda line: None)
    with prepared.train_batches() as train:
        return [next(train), next(train), *prepared.eval_batches("train")]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "+".join(type(t).__name__ for t in chain))
def test_a_bright_rectangle_is_where_its_box_says(chain, tmp_path):
    seen = 0
    for batch in batches(chain, tmp_path):
        h, w = batch["image"].shape[1:3]
        assert batch["segmentation"].shape == (8, h, w) and batch["boxes"].shape == (8, M, 4)
        assert not batch["box_valid"][:, 1:].any() and (batch["boxes"][~batch["box_valid"]] == 0).all()
        for row in range(8):
            shown = batch["segmentation"][row] == 1
            ys, xs = np.nonzero(shown)
            if not batch["box_valid"][row, 0]:
                assert len(xs) <= 2 * (h + w)  # at most a sliver, which rounding left
                continue
            box = batch["boxes"][row, 0]
            assert box.min() >= 0 and box[2] <= w and box[3] <= h
            if min(np.ptp(xs), np.ptp(ys)) < 4:
                continue
            np.testing.assert_allclose(box, [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], atol=2.6)
            seen += 1
            if batch["point_valid"][row, 0]:
                x, y = batch["points"][row, 0].astype(int)
                assert shown[y, x]
            if not any(isinstance(t, T.TrivialAugment | T.RandAugment) for t in chain):  # these change colours too
                grey = batch["image"][row].mean(-1) / batch["image"].max()
                assert (grey > 0.5)[shown].mean() > 0.85 and (grey < 0.5)[~shown].mean() > 0.85
    assert seen > 20


def test_what_is_cut_off_is_marked_and_what_lies_outside_of_the_picture_is_ignored():
    example = Rectangles()[0] | {"boxes": np.float32([[0, 0, 10, 10], [70, 50, 80, 60], [5, 5, 75, 55]])}
    example["points"] = np.float32([[0, 0], [40, 30]])
    rng = np.random.default_rng(0)
    cut = T.CenterCrop((20, 40))(example, rng)
    np.testing.assert_array_equal(cut["boxes"], np.float32([[0] * 4, [0] * 4, [0, 0, 40, 20]]), strict=True)
    np.testing.assert_array_equal(cut["box_valid"], [False, False, True])
    np.testing.assert_array_equal(cut["points"], np.float32([[0, 0], [20, 10]]), strict=True)
    np.testing.assert_array_equal(cut["point_valid"], [False, True])
    padded = T.CenterCrop((80, 80))(cut | {"segmentation": cut["segmentation"].astype(np.int32)}, rng)
    np.testing.assert_array_equal(padded["box_valid"], [False, False, True])  # what is gone stays gone
    assert (padded["segmentation"] == 255).sum() == 80 * 80 - 20 * 40


class Swirl(T.ImageTransform):
    def picture(self, x_HWC, rng):
        return np.roll(x_HWC, 3, 0)


def test_a_transform_that_cannot_move_boxes_says_so(tmp_path):
    with pytest.raises(UserError, match=r"Swirl does not say how it moves boxes and points and segmentation"):
        batches((Swirl(),), tmp_path)
    with pytest.raises(UserError, match=r"boxes must be f32\[M, 4\] in pixels, not int64\[2, 2\]"):
        T.Resize(8)(Rectangles()[0] | {"boxes": np.zeros((2, 2), int)}, np.random.default_rng(0))
