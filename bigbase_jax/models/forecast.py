"""Forecasters: a history of some series, and what is known of the future, to the values that follow.

Axes: B examples, L steps of history, H steps ahead, S = L + H, C channels (series), K covariates, Q outputs of each
value (1, or one per quantile), N patches, P steps of a patch, D model width, F features of a step.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import DTYPES, INITS, ModelError
from bigbase_jax.models.transformer import Attention, FeedForward, Style


class Forecaster(nn.Module):
    """What all forecasters take; subclasses say in ``forecast`` what they make of a history.

    With covariates the model is a dynamic regression (Hyndman & Athanasopoulos 2021, chapter 10): values are what an
    MLP makes of each step's covariates, plus a rest, which is forecast from its own history.

    Attributes:
      horizon: H.
      outputs: Q.
      normalise: subtract each history's mean and divide by its standard deviation, and undo both in what comes out
        (reversible instance normalisation, Kim et al. 2022, without an affine map, as Nie et al. 2023).
      hidden: width of the two hidden layers that read covariates.

    Raises:
      ModelError: no horizon, or a number out of range.
    """

    horizon: int | None = None
    outputs: int = 1
    normalise: bool = False
    hidden: int = 64

    def __post_init__(self) -> None:
        for name in ("horizon", "outputs", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name} is {value}; it must be at least 1.")
        super().__post_init__()

    def forecast(self, x_BLC: Float[Array, "B L C"], train: bool) -> Float[Array, "B H C Q"]:
        """The values that follow."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        history_BLC: Float[Array, "B L C"],
        covariates_BSK: Float[Array, "B S K"] | None = None,
        train: bool = False,
    ) -> Float32[Array, "B H C Q"]:
        if covariates_BSK is None:
            return self._rescaled(history_BLC, train)
        level_BSC = covariates_BSK
        for _ in range(2):
            level_BSC = jax.nn.gelu(nn.Dense(self.hidden)(level_BSC))
        level_BSC = nn.Dense(history_BLC.shape[-1], kernel_init=nn.initializers.zeros)(level_BSC)
        past_BLC, ahead_BHC = jnp.split(level_BSC, [history_BLC.shape[1]], 1)
        return self._rescaled(history_BLC - past_BLC, train) + ahead_BHC[..., None]

    def _steps(self) -> int:
        if self.horizon is None:
            raise ModelError("the model does not know how far to forecast; give it the horizon.")
        return self.horizon

    def _rescaled(self, x_BLC: Array, train: bool, *more: Any) -> Array:
        if not self.normalise:
            return self.forecast(x_BLC, train, *more)
        mean_B1C = jax.lax.stop_gradient(jnp.mean(x_BLC, 1, keepdims=True))
        std_B1C = jax.lax.stop_gradient(jnp.sqrt(jnp.var(x_BLC, 1, keepdims=True) + 1e-5))
        y_BHCQ = self.forecast((x_BLC - mean_B1C) / std_B1C, train, *more)
        return y_BHCQ * std_B1C[..., None] + mean_B1C[..., None]

    def _project(self, x_BCL: Array, name: str) -> Array:
        """[B, C, any] -> [B, H, C, Q] by one linear map that all channels share."""
        H = self._steps()
        y = nn.Dense(H * self.outputs, kernel_init=INITS["torch"], name=name)(x_BCL)
        return jnp.swapaxes(y.reshape(*x_BCL.shape[:2], H, self.outputs), 1, 2).astype(jnp.float32)


class SeasonalNaive(Forecaster):
    """The last season again. It learns nothing, but how far quantiles lie from that, where they are wanted.

    Attributes:
      season: steps of a season, such as 24 hours.

    Raises:
      ModelError: a history that is shorter than a season.
    """

    season: int | None = None

    def forecast(self, x_BLC: Float[Array, "B L C"], train: bool) -> Float[Array, "B H C Q"]:
        season, length = self.season or 1, x_BLC.shape[1]
        if length < season:
            raise ModelError(f"a history of {length} steps is shorter than a season of {season}; make it longer.")
        y_BHC1 = x_BLC[:, length - season + np.arange(self._steps()) % season, :, None]
        if self.outputs == 1:
            return y_BHC1
        spread_HCQ = self.param("spread", nn.initializers.zeros, (*y_BHC1.shape[1:3], self.outputs))
        return y_BHC1 + spread_HCQ


class NLinear(Forecaster):
    """A linear map of the history less its last value, which is added again (Zeng et al. 2023)."""

    def forecast(self, x_BLC: Float[Array, "B L C"], train: bool) -> Float[Array, "B H C Q"]:
        last_B1C = x_BLC[:, -1:]
        return self._project(jnp.swapaxes(x_BLC - last_B1C, 1, 2), "linear") + last_B1C[..., None]


class DLinear(Forecaster):
    """A linear map of the moving average, and one of what is left (Zeng et al. 2023), each shared by all channels.

    Attributes:
      kernel: steps of the moving average, an odd number; the ends are repeated.

    Raises:
      ModelError: an even kernel.
    """

    kernel: int = 25

    def forecast(self, x_BLC: Float[Array, "B L C"], train: bool) -> Float[Array, "B H C Q"]:
        if self.kernel % 2 == 0:
            raise ModelError(f"kernel is {self.kernel}; a moving average is over an odd number of steps.")
        length = x_BLC.shape[1]
        read = np.arange(length)[:, None] + np.arange(self.kernel) - self.kernel // 2
        average_LL = np.zeros((length, length), np.float32)
        np.add.at(average_LL, (np.arange(length)[:, None], np.clip(read, 0, length - 1)), 1 / self.kernel)
        x_BCL = jnp.swapaxes(x_BLC, 1, 2)
        trend_BCL = x_BCL @ average_LL.T
        return self._project(x_BCL - trend_BCL, "seasonal") + self._project(trend_BCL, "trend")


class TiDE(Forecaster):
    """A dense encoder of a channel's history and all covariates, and a decoder whose last layer reads those of each
    step ahead again (Das et al. 2023): history and covariates together say what neither says alone.

    Attributes:
      width: of the residual blocks.
      depth: how many encode, and how many decode.
      features: that the covariates of a step are projected to.
      decoded: numbers of each step between the decoder and the last layer.
      dropout: rate at the end of each block.
    """

    width: int = 256
    depth: int = 1
    features: int = 4
    decoded: int = 16
    dropout: float = 0.1

    @nn.compact
    def __call__(
        self,
        history_BLC: Float[Array, "B L C"],
        covariates_BSK: Float[Array, "B S K"] | None = None,
        train: bool = False,
    ) -> Float32[Array, "B H C Q"]:
        return self._rescaled(history_BLC, train, covariates_BSK)

    def forecast(
        self, x_BLC: Float[Array, "B L C"], train: bool, covariates_BSK: Float[Array, "B S K"] | None = None
    ) -> Float[Array, "B H C Q"]:
        (B, L, C), H = x_BLC.shape, self._steps()
        x_BCL = jnp.swapaxes(x_BLC, 1, 2)
        read = [x_BCL]
        ahead_BHF = jnp.zeros((B, H, 0))
        if covariates_BSK is not None:
            known_BSF = self._block(covariates_BSK, self.features, train, "covariates")
            read.append(jnp.broadcast_to(known_BSF.reshape(B, 1, -1), (B, C, known_BSF[0].size)))
            ahead_BHF = known_BSF[:, L:]
        y = jnp.concatenate(read, -1)
        for i in range(self.depth):
            y = self._block(y, self.width, train, f"encoder_{i}")
        for i in range(self.depth):
            y = self._block(y, H * self.decoded if i == self.depth - 1 else self.width, train, f"decoder_{i}")
        ahead_BCHF = jnp.broadcast_to(ahead_BHF[:, None], (B, C, *ahead_BHF.shape[1:]))
        y = jnp.concatenate([y.reshape(B, C, H, self.decoded), ahead_BCHF], -1)
        y_BHCQ = jnp.swapaxes(self._block(y, self.outputs, train, "steps", norm=False), 1, 2)
        return y_BHCQ.astype(jnp.float32) + self._project(x_BCL, "linear")

    def _block(self, x: Array, width: int, train: bool, name: str, norm: bool = True) -> Array:
        """A hidden layer and a linear map beside it, and layer normalisation (section 4, figure 1)."""
        y = jax.nn.relu(nn.Dense(self.width, name=f"{name}_hidden")(x))
        y = Dropout(self.dropout, deterministic=not train)(nn.Dense(width, name=f"{name}_out")(y))
        y = y + nn.Dense(width, name=f"{name}_skip")(x)
        return nn.LayerNorm(name=f"{name}_norm")(y) if norm else y


class PatchTST(Forecaster):
    """A transformer over patches of each channel by itself (Nie et al. 2023): post-norm, with batch normalisation.

    The authors' code also adds each layer's attention scores to those of the next one, which the paper does not.

    Attributes:
      patch, stride: steps of a patch, and from one to the next; the history's last value is repeated ``stride`` times
        to fill one more.
      width, depth, heads, mlp_dim: of the encoder.
      dropout: rate after the embedding, after the activation and on each branch.
      dtype: of the encoder's computation.

    Raises:
      ModelError: a history shorter than a patch, or a width that the heads do not divide.
    """

    normalise: bool = True
    patch: int = 16
    stride: int = 8
    width: int = 16
    depth: int = 3
    heads: int = 4
    mlp_dim: int = 128
    dropout: float = 0.3
    dtype: str = "float32"

    def forecast(self, x_BLC: Float[Array, "B L C"], train: bool) -> Float[Array, "B H C Q"]:
        B, L, C = x_BLC.shape
        if self.patch > L or self.stride < 1:
            raise ModelError(f"a history of {L} steps holds no patch of {self.patch}, or stride {self.stride} is 0.")
        Style().sizes(self.width, self.heads)
        dtype = DTYPES[self.dtype]
        padded = jnp.concatenate([x_BLC, jnp.repeat(x_BLC[:, -1:], self.stride, axis=1)], 1)
        first_N1 = np.arange(0, L + self.stride - self.patch + 1, self.stride)[:, None]
        patches = jnp.swapaxes(padded, 1, 2)[:, :, first_N1 + np.arange(self.patch)].astype(dtype)
        x_BND = nn.Dense(self.width, dtype=dtype, kernel_init=INITS["torch"], name="embedding")(
            patches.reshape(B * C, -1, self.patch)
        )
        N = x_BND.shape[1]
        position_ND = self.param("position", nn.initializers.uniform(0.04), (N, self.width)) - 0.02
        x_BND = Dropout(self.dropout, deterministic=not train)(x_BND + position_ND.astype(dtype))
        for i in range(self.depth):
            x_BND = PatchBlock(self.heads, self.mlp_dim, self.dropout, self.dtype, name=f"block_{i}")(x_BND, train)
        return self._project(x_BND.reshape(B, C, N * self.width), "head")


class PatchBlock(nn.Module):
    """``norm(x + attention(x))``, then ``norm(x + feed_forward(x))``, where the norm is over all patches of a batch."""

    heads: int
    mlp_dim: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x_BND: Float[Array, "B N D"], train: bool) -> Float[Array, "B N D"]:
        drop = Dropout(self.dropout, deterministic=not train)
        norm: Any = {"use_running_average": not train, "momentum": 0.9, "epsilon": 1e-5, "dtype": DTYPES[self.dtype]}
        y_BND = Attention(self.heads, dtype=self.dtype, name="attention")(x_BND)
        x_BND = nn.BatchNorm(**norm, name="attention_norm")(x_BND + drop(y_BND))
        y_BND = FeedForward(self.mlp_dim, self.dropout, self.dtype, name="mlp")(x_BND, train)
        return nn.BatchNorm(**norm, name="mlp_norm")(x_BND + drop(y_BND))
