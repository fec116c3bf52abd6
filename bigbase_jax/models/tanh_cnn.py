"""The small convolutional network of private training (Papernot et al. 2021; Tramèr & Boneh 2021, table 8).

Axes: B examples, H height, W width, C channels, K classes, G channels of a group, D features or channels out.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.layers import INITS, Conv, ModelError, classes, look_up


class TanhConvNet(nn.Module):
    """Convolutions with tanh, each perhaps with a 2x2 maximum at stride 1 after it; a dense layer with tanh; logits.

    Gradients of bounded activations are clipped less (Papernot et al. 2021). Without convolutions and a dense layer it
    is linear, as on scattering features.

    Attributes:
      num_classes: width of the output.
      convolutions: (channels, kernel, stride, padding) of each.
      pool: whether a maximum follows each.
      hidden: width of the dense layer; None: none.
      groups: of channels, each of which is brought to mean 0 and variance 1 over the picture first, without parameters
        (Wu & He 2018); 0: none.
      kernel_init: of ``INITS``; biases start at zero.

    Raises:
      ModelError: an unknown initialiser, groups that do not divide the channels, or too small a picture.
    """

    num_classes: int | None = None
    convolutions: tuple[tuple[int, int, int, int], ...] = ((16, 8, 2, 2), (32, 4, 2, 0))
    pool: bool = True
    hidden: int | None = 32
    groups: int = 0
    kernel_init: str = "torch"

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Float32[Array, "B K"]:
        init = look_up(INITS, self.kernel_init, "kernel_init")
        x = x_BHWC.astype(jnp.float32)
        if self.groups:
            x = normalised(x, self.groups)
        for i, (features, kernel, stride, pad) in enumerate(self.convolutions):
            if min(x.shape[1:3]) + 2 * pad < kernel:
                raise ModelError(f"a picture of {x_BHWC.shape[1]}x{x_BHWC.shape[2]} is too small for these layers.")
            conv = Conv(features, (kernel, kernel), (stride, stride), pad, kernel_init=init, name=f"conv_{i}")
            x = conv(x)
            if self.pool:
                x = jnp.maximum(jnp.maximum(x[:, 1:, 1:], x[:, 1:, :-1]), jnp.maximum(x[:, :-1, 1:], x[:, :-1, :-1]))
            x = jnp.tanh(x)  # it is monotone, so the maximum may come first, where it has more work
        x_BD = x.reshape(len(x), -1)
        if self.hidden:
            x_BD = jnp.tanh(nn.Dense(self.hidden, kernel_init=init, name="dense")(x_BD))
        return nn.Dense(classes(self.num_classes), kernel_init=init, name="head")(x_BD)


def normalised(x_BHWC: Float[Array, "B H W C"], groups: int) -> Float[Array, "B H W C"]:
    """Each group of channels of each example at mean 0 and variance 1: GroupNorm without scale and bias.

    Raises:
      ModelError: the groups do not divide the channels.
    """
    B, H, W, C = x_BHWC.shape
    if C % groups:
        raise ModelError(f"{groups} groups do not divide {C} channels.")
    x = x_BHWC.reshape(B, H, W, groups, C // groups)
    mean = jnp.mean(x, (1, 2, 4), keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), (1, 2, 4), keepdims=True)
    return ((x - mean) * jax.lax.rsqrt(variance + 1e-5)).reshape(x_BHWC.shape)
