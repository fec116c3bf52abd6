"""Models of rows: a linear one, and a perceptron that sees each number through an embedding of its own.

Axes: B rows, F numbers, C categories, K outputs, D width of an embedding, k frequencies, T bins, H input of the layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import INITS, ModelError, classes, look_up

EMBEDDINGS = {"plr": None, "ple": None, "none": None}
_LOWEST, _HIGHEST = 0.02, (0.5, 50.0)  # frequencies at the start
_ROWS = 600  # for each unit of the highest
_EDGE = 0.001  # ranks of the outermost edges of the bins


def embedded(
    categories_BC: Int[Array, "B C"], cardinalities: Sequence[int] | None, width: int, init: nn.initializers.Initializer
) -> Float32[Array, "B C D"]:
    """The vectors of all columns, from one table of the module that calls this.

    Raises:
      ModelError: it is not known how many values the columns have, or it is of another number of columns.
    """
    if cardinalities is None or len(cardinalities) != categories_BC.shape[1]:
        raise ModelError(f"the model's cardinalities are {cardinalities} for {categories_BC.shape[1]} categories.")
    if not cardinalities:
        return jnp.zeros((categories_BC.shape[0], 0, width))
    first_C = np.array([0, *itertools.accumulate(cardinalities[:-1])], np.int32)
    return nn.Embed(sum(cardinalities), width, embedding_init=init, name="embedding")(categories_BC + first_C)


class TabularLinear(nn.Module):
    """A linear model: logistic regression, or that of numbers, on one-hot categories. It begins at zero.

    Attributes:
      num_classes: K.
      cardinalities: how many values each of the C categories has.
    """

    num_classes: int | None = None
    cardinalities: tuple[int, ...] | None = None

    @nn.compact
    def __call__(
        self, numbers: Float[Array, "B F"], categories: Int[Array, "B C"], train: bool = False
    ) -> Float32[Array, "B K"]:
        outputs, zeros = classes(self.num_classes), nn.initializers.zeros
        if numbers.shape[1]:
            logits_BK = nn.Dense(outputs, kernel_init=zeros, name="head")(numbers)
        else:  # a kernel without rows is nothing that a checkpoint can keep
            logits_BK = self.param("bias", zeros, (outputs,))
        of_categories_BCK = embedded(categories, self.cardinalities, outputs, zeros)
        return logits_BK + of_categories_BCK.sum(1) if self.cardinalities else logits_BK


class TabularMLP(nn.Module):
    """A perceptron on embeddings of numbers and of categories (Gorishniy, Rubachev & Babenko 2022, "On embeddings for
    numerical features in tabular deep learning").

    Attributes:
      num_classes: K.
      cardinalities: how many values each of the C categories has.
      embedding: of numbers: "plr", sines and cosines of learned frequencies, a linear layer for each number, ReLU
        (section 3.3); "ple", piecewise linear: how far the number reaches into each bin, then the same layers (section
        3.2); "none", the number itself.
      width: D, of the embedding of a number.
      frequencies: k, or how many bins.
      highest_frequency: of "plr", in cycles per unit of a number: at the start, frequencies are spread evenly over the
        magnitudes up to it. The paper tunes a normal distribution for each table in its place. None: what the rows can
        tell apart, 600 of them for each unit of it.
      train_rows: how many there are in training; None in a config: the data says it.
      category_width: D, of the embedding of a category.
      hidden: widths of the layers, with ReLU and dropout after each.
      dropout: rate.

    Raises:
      ModelError: an unknown embedding.
    """

    num_classes: int | None = None
    cardinalities: tuple[int, ...] | None = None
    embedding: str = "plr"
    width: int = 16
    frequencies: int = 48
    highest_frequency: float | None = None
    train_rows: int | None = None
    category_width: int = 8
    hidden: tuple[int, ...] = (256, 256)
    dropout: float = 0.4

    def __post_init__(self) -> None:
        look_up(EMBEDDINGS, self.embedding, "embedding")
        super().__post_init__()

    @property
    def _highest(self) -> float:
        """In cycles per unit."""
        of_rows = min(max((self.train_rows or 0) / _ROWS, _HIGHEST[0]), _HIGHEST[1])
        return of_rows if self.highest_frequency is None else self.highest_frequency

    @nn.compact
    def __call__(
        self, numbers: Float[Array, "B F"], categories: Int[Array, "B C"], train: bool = False
    ) -> Float32[Array, "B K"]:
        category_init = nn.initializers.normal(self.category_width**-0.5)
        categories_BCD = embedded(categories, self.cardinalities, self.category_width, category_init)
        numbers_BFD = numbers[..., None]
        if self.embedding != "none" and numbers.shape[1]:
            if self.embedding == "plr":
                shape = (numbers.shape[1], self.frequencies)
                frequency_Fk = self.param("frequencies", log_uniform(_LOWEST, self._highest), shape)
                parts_BFk = periodic(numbers, frequency_Fk)
            else:
                parts_BFk = piecewise_linear(numbers, normal_edges(self.frequencies))
            numbers_BFD = jax.nn.relu(PerColumn(self.width, name="numbers")(parts_BFk))
        parts = [x.reshape(x.shape[0], -1) for x in (numbers_BFD, categories_BCD) if x.shape[1]]
        x_BH = jnp.concatenate(parts, -1)
        for i, width in enumerate(self.hidden):
            x_BH = jax.nn.relu(nn.Dense(width, kernel_init=INITS["he"], name=f"dense_{i}")(x_BH))
            x_BH = Dropout(self.dropout, deterministic=not train)(x_BH)
        return nn.Dense(classes(self.num_classes), name="head")(x_BH)


class PerColumn(nn.Module):
    """A linear layer for each column.

    Attributes:
      features: width of the output.
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F k"]) -> Float[Array, "B F D"]:
        _, F, k = x.shape
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=1, out_axis=2, batch_axis=0)
        kernel_FkD = self.param("kernel", init, (F, k, self.features))
        bias_FD = self.param("bias", nn.initializers.zeros, (F, self.features))
        return jnp.einsum("BFk,FkD->BFD", x, kernel_FkD) + bias_FD


def log_uniform(low: float, high: float) -> nn.initializers.Initializer:
    """Positive numbers whose logarithms are uniform between those of two."""

    def init(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.exp(jax.random.uniform(key, shape, dtype, np.log(low), np.log(high)))

    return init


def periodic(x_BF: Float[Array, "B F"], frequency_Fk: Float[Array, "F k"]) -> Float[Array, "B F 2*k"]:
    """``[cos, sin](2 pi c x)`` (equation 8)."""
    angle_BFk = 2 * jnp.pi * frequency_Fk * x_BF[..., None]
    return jnp.concatenate([jnp.cos(angle_BFk), jnp.sin(angle_BFk)], -1)


def piecewise_linear(x_BF: Float[Array, "B F"], edges: np.ndarray) -> Float[Array, "B F T"]:
    """How far a number is through each bin: 0 before it, 1 behind it, but no bound before the first bin and behind the
    last (equation 1).

    Args:
      edges: f[T + 1], ascending.
    """
    part_BFT = (x_BF[..., None] - edges[:-1]) / np.diff(edges)
    low_T, high_T = np.zeros(len(edges) - 1), np.ones(len(edges) - 1)
    low_T[0], high_T[-1] = -np.inf, np.inf
    return jnp.clip(part_BFT, low_T, high_T)


def normal_edges(bins: int) -> np.ndarray:
    """f64[bins + 1]: edges of bins that hold as many each of what is normal, as numbers encoded by quantiles are."""
    return scipy.special.ndtri(np.clip(np.linspace(0, 1, bins + 1), _EDGE, 1 - _EDGE))
