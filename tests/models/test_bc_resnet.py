"""BC-ResNet: its parts against torch's, and its published sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bigbase_jax.models.bc_resnet import BCResNet, Depthwise, SubSpectralNorm
from bigbase_jax.models.layers import ModelError


@pytest.mark.parametrize(("axis", "dilation"), [(1, 1), (2, 1), (2, 4)])
def test_shifted_products_are_a_depthwise_convolution(axis, dilation):
    x_BFTC = np.random.default_rng(0).normal(size=(2, 10, 13, 4)).astype(np.float32)
    layer = Depthwise(axis, dilation=dilation)
    variables = layer.init(jax.random.key(0), jnp.asarray(x_BFTC))
    kernel_KC = np.array(variables["params"]["kernel"])
    shape = (4, 1, 3, 1) if axis == 1 else (4, 1, 1, 3)
    reach = (dilation, 0) if axis == 1 else (0, dilation)
    expected = torch.nn.functional.conv2d(
        torch.tensor(x_BFTC.transpose(0, 3, 1, 2)),
        torch.tensor(kernel_KC.T.reshape(shape).copy()),
        padding=reach,
        dilation=dilation,
        groups=4,
    )
    found_BFTC = layer.apply(variables, jnp.asarray(x_BFTC))
    np.testing.assert_allclose(found_BFTC, expected.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_each_group_of_bands_is_normalised_by_itself():
    x_BFTC = np.random.default_rng(0).normal(3, 2, size=(4, 10, 7, 3)).astype(np.float32)
    x_BFTC[:, 4:6] *= 50
    layer = SubSpectralNorm()
    variables = layer.init(jax.random.key(0), jnp.asarray(x_BFTC), True)
    y_BFTC, _ = layer.apply(variables, jnp.asarray(x_BFTC), True, mutable=["batch_stats"])
    parts = np.asarray(y_BFTC).reshape(4, 5, 2, 7, 3)
    np.testing.assert_allclose(parts.mean((0, 2, 3)), 0, atol=1e-4)
    np.testing.assert_allclose(parts.std((0, 2, 3)), 1, atol=1e-2)


@pytest.mark.parametrize(("tau", "published"), [(1, 9_200), (8, 321_000)])
def test_sizes_are_the_published_ones(tau, published):
    x = jax.ShapeDtypeStruct((1, 98, 40, 1), jnp.float32)
    params = jax.eval_shape(BCResNet(num_classes=12, tau=float(tau)).init, jax.random.key(0), x)["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == pytest.approx(published, rel=0.05)


def test_bands_that_do_not_divide_are_refused():
    with pytest.raises(ModelError, match="use 40 or 80"):
        BCResNet(num_classes=3).init(jax.random.key(0), jnp.zeros((1, 20, 30, 1)))
