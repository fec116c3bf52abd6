"""Feature pyramids (Lin et al. 2017): what a backbone sees at several strides, each as rich as the coarsest.

Axes: B examples, h and w a map's height and width, D channels out.
"""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bigbase_jax.models.layers import DTYPES, Conv


class FeaturePyramid(nn.Module):
    """From the maps of a backbone's stages to as many of one width, and coarser ones below.

    A 1x1 convolution brings each to the width; from the coarsest on, each is doubled in size and added to the next
    finer one; a 3x3 convolution smooths the sum. Coarser ones come from the last by 3x3 convolutions at stride 2, as P6
    and P7 of RetinaNet and FCOS.

    Attributes:
      width: D.
      coarser: how many maps are added, each of half the size of the one before.
      dtype: of the computation, "float32" or "bfloat16".
    """

    width: int = 256
    coarser: int = 0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, maps: Sequence[Float[Array, "B _ _ _"]]) -> list[Float[Array, "B _ _ {self.width}"]]:
        dtype = DTYPES[self.dtype]
        found: list[jax.Array] = []
        above = None
        for i in reversed(range(len(maps))):
            x = Conv(self.width, (1, 1), dtype=dtype, name=f"lateral{i}")(maps[i])
            x = x if above is None else x + _doubled(above, x.shape[1], x.shape[2])
            above = x
            found.insert(0, Conv(self.width, (3, 3), dtype=dtype, name=f"output{i}")(x))
        for i in range(self.coarser):
            x = found[-1] if not i else jax.nn.relu(found[-1])
            found.append(Conv(self.width, (3, 3), 2, [(1, 1), (1, 1)], dtype=dtype, name=f"coarser{i}")(x))
        return found


def _doubled(x_BhwD: jax.Array, height: int, width: int) -> jax.Array:
    """Each pixel twice as high and wide, cut to a size: the finer map has an odd one where its picture's side has."""
    return jnp.repeat(jnp.repeat(x_BhwD, 2, 1), 2, 2)[:, :height, :width]
