"""Classification of recordings: what the model sees, what is masked, and that a run answers files."""

import jax
import numpy as np
import pytest

from bigbase_jax.audio.features import fbank
from bigbase_jax.core import UserError
from bigbase_jax.models.bc_resnet import BCResNet
from bigbase_jax.tasks.audio_classification import AudioClassification, masked


def test_sixteen_bits_and_floats_are_the_same_to_the_model():
    task = AudioClassification(BCResNet(num_classes=2), rate=8000, mean=10.0, std=4.0)
    x_BT = np.random.default_rng(0).integers(-9000, 9000, (2, 4000)).astype(np.int16)
    bands = np.asarray(task.bands(x_BT))
    np.testing.assert_array_equal(bands, task.bands(x_BT.astype(np.float32) / 32768))
    expected = (fbank(40, 8000)(x_BT / np.float32(32768), np) - 10) / 4
    np.testing.assert_allclose(bands[..., 0], expected, atol=1e-4)


def test_masks_are_stretches_of_each_examples_own():
    x = np.ones((64, 30, 20, 1), np.float32)
    for axis, size in ((1, 30), (2, 20)):
        y = np.asarray(masked(jax.random.key(1), x, axis, 6)).squeeze(-1)
        line_BS = y[:, :, 0] if axis == 1 else y[:, 0]
        np.testing.assert_array_equal(
            y, np.broadcast_to(line_BS[:, :, None] if axis == 1 else line_BS[:, None], y.shape)
        )
        widths = (line_BS == 0).sum(1)
        assert set(widths) == set(range(7)) and len({tuple(row) for row in line_BS}) > 20
        edges = np.abs(np.diff(np.pad(line_BS, ((0, 0), (1, 1)), constant_values=1))).sum(1)
        assert (edges == 2 * (widths > 0)).all() and line_BS.shape == (64, size)


def test_the_rate_has_to_be_known():
    with pytest.raises(UserError, match="samples per second"):
        AudioClassification(BCResNet(num_classes=2))
