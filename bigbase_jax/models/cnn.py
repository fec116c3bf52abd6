"""The classic convolutional network.

Axes: B examples, H height, W width, C channels, K classes, D features or channels out, h = H // 2, w = W // 2.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import DTYPES, INITS, Conv, ModelError, classes, look_up, max_pool_2x2


class Stage(nn.Module):
    """``depth`` times 3x3 convolution, BatchNorm if wanted and ReLU; then 2x2 max-pool."""

    features: int
    depth: int
    kernel_init: str
    dtype: str
    norm: bool

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        dtype, kernel_init = DTYPES[self.dtype], INITS[self.kernel_init]
        x = x_BHWC
        for i in range(self.depth):
            x = jax.nn.relu(x) if i else x
            x = Conv(
                self.features,
                (3, 3),
                use_bias=not self.norm,
                dtype=dtype,
                kernel_init=kernel_init,
                name=f"conv_{i}",
            )(x)
            if self.norm:
                x = nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name=f"bn_{i}")(x)
        # ReLU is monotone, so the last may come after the maximum, where it has a quarter of the work: the classic
        # CNN's step takes 0.8 to 0.9 of the time.
        return jax.nn.relu(max_pool_2x2(x))


class ConvNet(nn.Module):
    """Stages of 3x3 convolution, ReLU and 2x2 max-pool; then a dense layer, ReLU and the logits.

    With ``norm``, ``pool="mean"`` and no dense layer it is the classic network's small modern relative: BatchNorm makes
    it train fast, and averaging over the last map keeps it from learning a few thousand photos by heart.

    Attributes:
      num_classes: width of the output.
      stages: channels of each stage; every stage halves height and width (224 -> 28 with three).
      dense: width of the dense layer; 0: none.
      depths: convolutions of each stage; None: one each.
      norm: BatchNorm after each convolution (Ioffe & Szegedy 2015).
      pool: what the dense layer sees of the last map: all of it ("flatten") or its mean ("mean"; Lin et al. 2013).
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
    depths: tuple[int, ...] | None = None
    norm: bool = False
    pool: str = "flatten"
    dropout: float = 0.0
    kernel_init: str = "he"
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        look_up(INITS, self.kernel_init, "kernel_init")
        look_up(DTYPES, self.dtype, "dtype")
        look_up({"flatten": None, "mean": None}, self.pool, "pool")
        if self.depths is not None and (len(self.depths) != len(self.stages) or min(self.depths, default=1) < 1):
            raise ModelError(f"depths {self.depths} must hold a number above 0 for each of the stages {self.stages}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], train: bool = False, features: bool = False
    ) -> Float32[Array, "B K"] | list[Float[Array, "B _ _ _"]]:
        """Logits; or with ``features`` what each stage gives, the finest first, as a detector reads it."""
        dtype, kernel_init = DTYPES[self.dtype], INITS[self.kernel_init]
        B, H, W, _ = x_BHWC.shape
        if min(H, W) < 2 ** len(self.stages):
            raise ModelError(f"a picture of {H}x{W} cannot be halved {len(self.stages)} times; use fewer stages.")
        stage = nn.remat(Stage, static_argnums=(2,)) if self.remat else Stage
        x = x_BHWC.astype(dtype)
        depths = self.depths or (1,) * len(self.stages)
        found = []
        for i, (width, depth) in enumerate(zip(self.stages, depths, strict=True)):
            make = stage(width, depth, self.kernel_init, self.dtype, self.norm, name=f"stage_{i}")
            x = make(x, train)
            found.append(x)
        if features:
            return found
        x_BD = x.reshape(B, -1) if self.pool == "flatten" else jnp.mean(x, (1, 2))
        if self.dense:
            x_BD = jax.nn.relu(nn.Dense(self.dense, dtype=dtype, kernel_init=kernel_init, name="dense")(x_BD))
        x_BD = Dropout(self.dropout, deterministic=not train)(x_BD)
        head = nn.Dense(classes(self.num_classes), dtype=jnp.float32, kernel_init=kernel_init, name="head")
        return head(x_BD.astype(jnp.float32))
