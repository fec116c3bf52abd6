"""The multilayer perceptron.

Axes: B examples, K classes, D features.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import ACTIVATIONS, DTYPES, INITS, classes, look_up

AUTO = {"sigmoid": "glorot_sigmoid", "tanh": "glorot", "relu": "he", "gelu": "he", "silu": "he"}


class MLP(nn.Module):
    """Fully connected layers on the flattened input; the default is the perceptron of the classic exercise.

    Attributes:
      num_classes: width of the output.
      hidden: widths of the hidden layers.
      activation: "sigmoid", "tanh", "relu", "gelu" or "silu", after every hidden layer.
      kernel_init: "glorot_sigmoid", "glorot", "he", "lecun" or "torch", or "auto": what suits the activation; biases
        start at zero.
      dropout: rate after every hidden layer.
      dtype: of the computation, "float32" or "bfloat16"; parameters and logits are float32.

    Raises:
      ModelError: an unknown word among the attributes.
    """

    num_classes: int | None = None
    hidden: tuple[int, ...] = (500, 200)
    activation: str = "sigmoid"
    kernel_init: str = "auto"
    dropout: float = 0.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        look_up(ACTIVATIONS, self.activation, "activation")
        look_up({"auto": None, **INITS}, self.kernel_init, "kernel_init")
        look_up(DTYPES, self.dtype, "dtype")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "B ..."], train: bool = False) -> Float32[Array, "B K"]:
        dtype = DTYPES[self.dtype]
        kernel_init = INITS[AUTO[self.activation] if self.kernel_init == "auto" else self.kernel_init]
        x_BD = x.reshape(x.shape[0], -1).astype(dtype)
        for i, width in enumerate(self.hidden):
            x_BD = nn.Dense(width, dtype=dtype, kernel_init=kernel_init, name=f"dense_{i}")(x_BD)
            x_BD = ACTIVATIONS[self.activation](x_BD)
            x_BD = Dropout(self.dropout, deterministic=not train)(x_BD)
        head = nn.Dense(classes(self.num_classes), dtype=jnp.float32, kernel_init=kernel_init, name="head")
        return head(x_BD.astype(jnp.float32))
