"""Click prediction: rows of numbers and of categories with many values, whose products tell more than their sum.

DLRM (Naumov et al. 2019, "Deep learning recommendation model for personalization and recommendation systems") and
DCN-v2 (Wang et al. 2021, "DCN V2: improved deep & cross network"). All columns share one ``Table``, so that a step has
one lookup, and a mesh spreads the rows of all.

Axes: B examples, F numbers, C categories, D width of an embedding, N vectors that interact, M width of the input of
the cross layers, R rank, E experts, K classes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import ModelError, classes
from bigbase_jax.models.tables import Table, rows_of


def uniform_by_column(cardinalities: Sequence[int]) -> Any:
    """An initialiser for the rows of all columns: uniform in +-1/sqrt(values of the column), as DLRM's release."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any = jnp.float32) -> Array:
        keys = jax.random.split(key, len(cardinalities))
        parts = [
            jax.random.uniform(k, (n, shape[1]), dtype, -(n**-0.5), n**-0.5)
            for k, n in zip(keys, cardinalities, strict=True)
        ]
        return jnp.concatenate([*parts, jnp.zeros((shape[0] - sum(cardinalities), shape[1]), dtype)])

    return init


def embedded(categories_BC: Array, cardinalities: Sequence[int] | None, width: int) -> Float32[Array, "B C D"]:
    """The vectors of all columns, from the one table of the module that calls this.

    Raises:
      ModelError: the cardinalities are not known, or are others.
    """
    if cardinalities is None:
        raise ModelError("the model's cardinalities are None; give the number of values of each category.")
    if not len(cardinalities):
        return jnp.zeros((categories_BC.shape[0], 0, width))
    table = Table(sum(cardinalities), width, uniform_by_column(cardinalities), name="embedding")
    return table(rows_of(categories_BC, cardinalities))


def perceptron(
    x_BD: Float[Array, "B _"], widths: Sequence[int], name: str, dropout: float = 0.0, train: bool = False
) -> Float[Array, "B _"]:
    """Dense layers with ReLU after each, as parameters of the module that calls this."""
    for i, width in enumerate(widths):
        x_BD = jax.nn.relu(nn.Dense(width, kernel_init=nn.initializers.he_normal(), name=f"{name}_{i}")(x_BD))
        x_BD = Dropout(dropout, deterministic=not train)(x_BD)
    return x_BD


def logits(x_BD: Float[Array, "B _"], num_classes: int | None) -> Float32[Array, "B K"]:
    """One logit for each class but the first, whose is 0: of two classes, softmax is the sigmoid of the one."""
    z_BK = nn.Dense(classes(num_classes) - 1, name="head")(x_BD)
    return jnp.pad(z_BK, ((0, 0), (1, 0)))


class DLRM(nn.Module):
    """Numbers become one vector by a perceptron; it and the embeddings interact as inner products of all pairs.

    Attributes:
      num_classes: K.
      cardinalities: how many values each category has.
      width: D, of the embeddings and of the last layer for numbers.
      bottom: widths of the layers before that one.
      top: widths of the layers behind the interactions.
      dropout: rate behind each layer of ``top``.

    Raises:
      ModelError: other columns than the model knows, or none.
    """

    num_classes: int | None = None
    cardinalities: tuple[int, ...] | None = None
    width: int = 16
    bottom: tuple[int, ...] = (64, 32)
    top: tuple[int, ...] = (128, 64)
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self, numbers: Float[Array, "B F"], categories: Int[Array, "B C"], train: bool = False
    ) -> Float32[Array, "B K"]:
        vectors_BND = embedded(categories, self.cardinalities, self.width)
        parts = []
        if numbers.shape[-1]:
            number_BD = perceptron(numbers, (*self.bottom, self.width), "bottom")
            vectors_BND, parts = jnp.concatenate([number_BD[:, None], vectors_BND], 1), [number_BD]
        count = vectors_BND.shape[1]
        if count + len(parts) < 2:
            raise ModelError(
                f"DLRM multiplies the vectors of columns with each other, and here is {count} category alone."
            )
        products_BNN = jnp.einsum("bnd,bmd->bnm", vectors_BND, vectors_BND)
        pairs = np.asarray(list(itertools.combinations(range(count), 2)), np.int32).reshape(-1, 2)
        x_BD = jnp.concatenate([*parts, products_BNN[:, pairs[:, 1], pairs[:, 0]]], -1)
        return logits(perceptron(x_BD, self.top, "top", self.dropout, train), self.num_classes)


class CrossLayer(nn.Module):
    """``x0 * (W x + b) + x``; of low rank ``x0 * (U V x + b) + x``; or a mixture of those (Wang et al. 2021, eq. 1-5).

    Attributes:
      rank: R; None: W is a full matrix.
      experts: E. From 2 on, each expert is ``x0 * (U tanh(C tanh(V x)) + b)``, and a softmax of a linear gate weighs
        them; the bias is shared, as in the authors' release.
    """

    rank: int | None = None
    experts: int = 1

    @nn.compact
    def __call__(self, x0_BM: Float[Array, "B M"], x_BM: Float[Array, "B M"]) -> Float[Array, "B M"]:
        width = x_BM.shape[-1]
        if self.rank is None:
            return x0_BM * nn.Dense(width, name="cross")(x_BM) + x_BM
        if self.experts == 1:
            return x0_BM * nn.Dense(width, name="up")(nn.Dense(self.rank, use_bias=False, name="down")(x_BM)) + x_BM
        init = functools.partial(nn.initializers.lecun_normal, batch_axis=(0,))()
        v_EMR = self.param("down_kernel", init, (self.experts, width, self.rank))
        c_ERR = self.param("core_kernel", init, (self.experts, self.rank, self.rank))
        u_ERM = self.param("up_kernel", init, (self.experts, self.rank, width))
        bias_M = self.param("bias", nn.initializers.zeros, (width,))
        h_BER = jnp.tanh(jnp.einsum("bm,emr->ber", x_BM, v_EMR))
        h_BER = jnp.tanh(jnp.einsum("ber,ers->bes", h_BER, c_ERR))
        gate_BE = jax.nn.softmax(nn.Dense(self.experts, use_bias=False, name="gate")(x_BM))
        # The gates sum to 1, so the shared bias is added once.
        mixed_BM = jnp.einsum("be,ber,erm->bm", gate_BE, h_BER, u_ERM) + bias_M
        return x0_BM * mixed_BM + x_BM


class DCN(nn.Module):
    """Cross layers multiply the input with itself, one degree more each, beside a perceptron or before it.

    Attributes:
      num_classes, cardinalities: as of ``DLRM``.
      width: D of the embeddings.
      crosses: how many cross layers.
      rank, experts: of each; see ``CrossLayer``.
      deep: widths of the perceptron.
      structure: "parallel": both read the input, and the head reads both; "stacked": the perceptron reads what the
        cross layers give.
      dropout: rate behind each layer of ``deep``.

    Raises:
      ModelError: other columns than the model knows, an unknown structure, or experts without a rank.
    """

    num_classes: int | None = None
    cardinalities: tuple[int, ...] | None = None
    width: int = 16
    crosses: int = 3
    rank: int | None = None
    experts: int = 1
    deep: tuple[int, ...] = (128, 64)
    structure: str = "parallel"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.structure not in ("parallel", "stacked"):
            raise ModelError(f"structure is {self.structure!r}; it is 'parallel' or 'stacked'.")
        if self.experts > 1 and self.rank is None:
            raise ModelError(f"a mixture of {self.experts} experts needs a rank, for example rank=32.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, numbers: Float[Array, "B F"], categories: Int[Array, "B C"], train: bool = False
    ) -> Float32[Array, "B K"]:
        vectors_BCD = embedded(categories, self.cardinalities, self.width)
        x0_BM = jnp.concatenate([numbers, vectors_BCD.reshape(numbers.shape[0], math.prod(vectors_BCD.shape[1:]))], -1)
        x_BM = x0_BM
        for i in range(self.crosses):
            x_BM = CrossLayer(self.rank, self.experts, name=f"cross_{i}")(x0_BM, x_BM)
        deep_BD = perceptron(x_BM if self.structure == "stacked" else x0_BM, self.deep, "deep", self.dropout, train)
        both_BD = deep_BD if self.structure == "stacked" else jnp.concatenate([x_BM, deep_BD], -1)
        return logits(both_BD, self.num_classes)
