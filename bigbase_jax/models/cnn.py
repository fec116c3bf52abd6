"""The classic convolutional network.

Axes: B examples, H height, W width, C channels, K classes, D features or channels out, h = H // 2, w = W // 2.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.layers import DTYPES, INITS, ModelError, classes, look_up, max_pool_2x2


class Stage(nn.Module):
    """3x3 convolution, ReLU, 2x2 max-pool."""

    features: int
    kernel_init: str
    dtype: str

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        conv = nn.Conv(
            self.features, (3, 3), dtype=DTYPES[self.dtype], kernel_init=INITS[self.kernel_init], name="conv"
        )
        return max_pool_2x2(jax.nn.relu(conv(x_BHWC)))


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, ReLU and 2x2 max-pool; then a dense layer, ReLU and the logits.

    Attributes:
      num_classes: width of the output.
      stages: channels of each stage; every stage halves height and width (224 -> 28 with three).
      dense: width of the dense layer.
      dropout: rate after the dense layer.
      kernel_init: "he", "glorot", "lecun" or "torch"; biases start at zero.
      dtype: of the computation, "float32" or "bfloat16"; parameters and logits are float32.
      remat: compute the stages' activations again in the backward pass instead of keeping them.

    Raises:
      ModelError: an unknown word among the attributes, or an input too small to be halved so often.
    """

    num_classes: int | None = None
    stages: tuple[int, ...] = (64, 64, 64)
    dense: int = 1024
    dropout: float = 0.0
    kernel_init: str = "he"
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        look_up(INITS, self.kernel_init, "kernel_init")
        look_up(DTYPES, self.dtype, "dtype")
        super().__post_init__()

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool = False) -> Float32[Array, "B K"]:
        dtype, kernel_init = DTYPES[self.dtype], INITS[self.kernel_init]
        B, H, W, _ = x_BHWC.shape
        if min(H, W) < 2 ** len(self.stages):
            raise ModelError(f"a picture of {H}x{W} cannot be halved {len(self.stages)} times; use fewer stages.")
        stage = nn.remat(Stage) if self.remat else Stage
        x = x_BHWC.astype(dtype)
        for i, features in enumerate(self.stages):
            x = stage(features, self.kernel_init, self.dtype, name=f"stage_{i}")(x)
        x_BD = x.reshape(B, -1)
        x_BD = jax.nn.relu(nn.Dense(self.dense, dtype=dtype, kernel_init=kernel_init, name="dense")(x_BD))
        x_BD = nn.Dropout(self.dropout, deterministic=not train)(x_BD)
        head = nn.Dense(classes(self.num_classes), dtype=jnp.float32, kernel_init=kernel_init, name="head")
        return head(x_BD.astype(jnp.float32))
