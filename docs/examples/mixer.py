"""MLP-Mixer (Tolstikhin et al. 2021): a picture classifier of dense layers alone, for small pictures.

Axes: B examples, P patches, D width, K classes.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


class Mixer(nn.Module):
    """Mixes patches, then channels, ``depth`` times.

    Attributes:
      num_classes: K; None in a config: taken from the data.
      patch: side of a patch in pixels; it divides both sides of the picture.
      width: D.
      depth: number of blocks.
    """

    num_classes: int | None = None
    patch: int = 8
    width: int = 64
    depth: int = 2

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Float32[Array, "B K"]:
        x_BHWC = nn.Conv(self.width, (self.patch, self.patch), strides=self.patch, name="stem")(x_BHWC)
        x_BPD = x_BHWC.reshape(len(x_BHWC), -1, self.width)
        for i in range(self.depth):
            y_BDP = nn.LayerNorm(name=f"norm_patches_{i}")(x_BPD).swapaxes(1, 2)
            x_BPD = x_BPD + nn.Dense(x_BPD.shape[1], name=f"patches_{i}")(nn.gelu(y_BDP)).swapaxes(1, 2)
            y_BPD = nn.LayerNorm(name=f"norm_channels_{i}")(x_BPD)
            x_BPD = x_BPD + nn.Dense(self.width, name=f"channels_{i}")(nn.gelu(y_BPD))
        return nn.Dense(self.num_classes or 1, name="head")(x_BPD.mean(1)).astype(jnp.float32)
