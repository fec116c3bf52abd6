"""The Conformer (Gulati et al. 2020): attention for what is far, a depthwise convolution for what is near.

With ``chunk`` set it reads a recording in chunks: each sees itself, ``right`` frames behind it and so many chunks
before it, and nothing else, in every block. The frames behind a chunk are computed with it and again with their own
chunk (Shi et al. 2021, "Emformer"), so that they do not add up over the blocks, and a recording that is read as it
comes (``encode_chunk``) gives what the whole recording gives.

Axes: B recordings, b: B x n, F feature frames, M bands, S encoder frames, n chunks, C frames of a chunk, E: C and
those behind it, P frames before a chunk, X: P + E, D model width, H heads, K head width, J taps of the convolution, R
distances.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bigbase_jax.models.attention import attention
from bigbase_jax.models.dropout import Dropout, dropout
from bigbase_jax.models.layers import DTYPES, Conv, ModelError, constrain, look_up, platform, product
from bigbase_jax.models.rope import rotate, rotation
from bigbase_jax.models.transformer import FeedForward, Style

POSITIONS = ("rope", "relative")
NORMS = ("batch", "layer")
_STYLE = Style(activation="silu")
_AHEAD = 3  # feature frames before a chunk that its first encoder frame reads
_ROWS = 16  # of the unrolled loop of ``depthwise``'s gradient


class Left(NamedTuple):
    """What a block keeps of the frames before a chunk: keys and values, [B,P,H,K], and the convolution's, [B,J - 1,D]
    or half of that."""

    keys: Float[Array, "B P H K"]
    values: Float[Array, "B P H K"]
    tail: Float[Array, "B j D"]


class State(NamedTuple):
    """What a recording that is read as it comes keeps between two chunks.

    Attributes:
      frames: of encoder frames that have been given back.
      features: the last ones of the chunk before.
      blocks: see ``Left``.
    """

    frames: Int[Array, " B"]
    features: Float[Array, "B 3 M"]
    blocks: tuple[Left, ...]


class Conformer(nn.Module):
    """Log-mel features -> encoder frames, of which there are a quarter as many; padding never changes real frames.

    Attributes:
      width, depth, heads: D, blocks, H. Conformer-S is 144, 16, 4; M 256, 16, 4; L 512, 17, 8 (their table 1).
      kernel: J, odd.
      mlp_dim: of the hidden layers; None: 4 x D.
      channels: of the subsampling's two convolutions; None: D.
      dropout: rate on the input, after activations and on the output of each branch.
      positions: "rope" (``models.rope``; Li et al. 2021), or "relative" as published (Dai et al. 2019), which takes
        longer.
      norm: of the convolution, "batch" as published, or "layer", which does not ask what is in the batch.
      causal: the convolution sees no frame behind its own.
      chunk: C; None: the whole recording at once.
      left: chunks that are seen before a chunk's own.
      right: frames that are seen behind a chunk, C at most; they are waited for.
      dtype: of the computation, "float32" or "bfloat16".

    Raises:
      ModelError: an unknown word among the attributes, or sizes that do not fit.
    """

    width: int = 144
    depth: int = 16
    heads: int = 4
    kernel: int = 31
    mlp_dim: int | None = None
    channels: int | None = None
    dropout: float = 0.1
    positions: str = "rope"
    norm: str = "batch"
    causal: bool = False
    chunk: int | None = None
    left: int = 4
    right: int = 0
    dtype: str = "float32"

    subsampling: ClassVar[int] = 4

    def __post_init__(self) -> None:
        look_up(dict.fromkeys(POSITIONS), self.positions, "positions")
        look_up(dict.fromkeys(NORMS), self.norm, "norm")
        look_up(DTYPES, self.dtype, "dtype")
        if self.width % (2 * self.heads):
            raise ModelError(f"a width of {self.width} does not divide into {self.heads} heads of an even width.")
        if self.kernel < 1 or not self.kernel % 2:
            raise ModelError(f"kernel is {self.kernel}; it is odd, so that a frame is in its middle.")
        if self.chunk is not None and not (0 <= self.right <= self.chunk and self.chunk >= 1 and self.left >= 0):
            raise ModelError(
                f"chunk={self.chunk}, left={self.left}, right={self.right}: a chunk has at least one frame, none or"
                " more chunks before it, and at most its own length behind it."
            )
        super().__post_init__()

    def setup(self) -> None:
        channels, dtype = self.channels or self.width, DTYPES[self.dtype]
        conv = functools.partial(Conv, channels, (3, 3), (2, 2), padding=[(0, 0), (1, 1)], dtype=dtype)
        self.conv1, self.conv2 = conv(), conv()
        self.project = nn.Dense(self.width, dtype=dtype, dot_general=product)
        words = self.heads, self.kernel, self.mlp_dim, self.dropout, self.positions, self.norm, self.causal, self.dtype
        self.blocks = [Block(*words) for _ in range(self.depth)]

    def __call__(
        self,
        features_BFM: Float[Array, "B F M"],
        lengths_B: Int[Array, " B"],
        train: bool = False,
        whole: bool = False,
    ) -> tuple[Float[Array, "B S D"], Int[Array, " B"]]:
        """(encoder frames, how many of them are real), S = ceil(F / 4).

        Args:
          whole: read the recording at once, although ``chunk`` says otherwise: a model that is trained both ways can do
            both (Zhang et al. 2020, "Unified streaming and non-streaming two-pass end-to-end").
        """
        B, F, _ = features_BFM.shape
        S = -(-F // 4)
        C, left, right = (S, 0, 0) if whole or self.chunk is None else (self.chunk, self.left, self.right)
        n = -(-S // C)
        padded = jnp.pad(features_BFM, ((0, 0), (_AHEAD, 4 * S - F), (0, 0)))
        x_BSD = self._subsampled(padded, jnp.zeros(B, jnp.int32), lengths_B)
        if train and self.dropout:
            x_BSD = dropout(self.make_rng("dropout"), x_BSD, self.dropout)
        length_B = -(-lengths_B // 4)
        x_BnCD = jnp.pad(x_BSD, ((0, 0), (0, n * C - S), (0, 0))).reshape(B, n, C, -1)
        x_bED = jnp.concatenate([x_BnCD, _behind(x_BnCD, right)], 2).reshape(B * n, C + right, -1)
        seen_BnX = _seen(C * jnp.arange(n)[None], length_B, left * C, C + right)
        for block in self.blocks:
            x_bED, _ = block(x_bED, seen_BnX, C, None, train)
        h_BSD = x_bED[:, :C].reshape(B, n * C, -1)[:, :S]
        return constrain(h_BSD, "batch", "length", "width"), length_B

    def encode_chunk(
        self, state: State, features_BFM: Float[Array, "B F M"], left_B: Int[Array, " B"]
    ) -> tuple[Float[Array, "B C D"], State]:
        """(the encoder frames of the next chunk, the state behind it): those that ``__call__`` gives.

        Args:
          features_BFM: of the chunk and the frames behind it, F = 4 (C + right); the next call's begin 4 C later.
          left_B: feature frames that the recording has from the chunk's first on; what lies beyond is padding. More
            than F where the recording goes on.
        """
        C = self._chunk
        window = jnp.concatenate([state.features, features_BFM], 1)
        length_B = state.frames + -(-left_B // 4)
        blocks: list[Any] = []
        x_BED = self._subsampled(window, state.frames, 4 * state.frames + left_B)
        seen_BnX = _seen(state.frames[:, None], length_B, self.left * C, x_BED.shape[1])
        for block, before in zip(self.blocks, state.blocks, strict=True):
            x_BED, after = block(x_BED, seen_BnX, C, before, False)
            blocks.append(after)
        features = window[:, 4 * C : 4 * C + _AHEAD]
        return x_BED[:, :C], State(state.frames + C, features, tuple(blocks))

    @property
    def _chunk(self) -> int:
        if self.chunk is None:
            raise ModelError("the model reads whole recordings; set chunk for one that reads them as they come.")
        return self.chunk

    @nn.nowrap
    def state(self, batch_size: int, bands: int) -> State:
        """That of recordings that have not begun, of features of so many bands.

        Raises:
          ModelError: ``chunk`` is None.
        """
        dtype, D, P = DTYPES[self.dtype], self.width, self.left * self._chunk
        kept = jnp.zeros((batch_size, P, self.heads, D // self.heads), dtype)
        tail = jnp.zeros((batch_size, _reach(self.kernel, self.causal)[0], D), dtype)
        features = jnp.zeros((batch_size, _AHEAD, bands))
        return State(jnp.zeros(batch_size, jnp.int32), features, (Left(kept, kept, tail),) * self.depth)

    def _subsampled(self, window: Array, first_B: Array, length_B: Array) -> Array:
        """[B,E,D] from the feature frames 4 ``first_B`` - 3 on; ``length_B`` is the recording's, in feature frames."""

        def real(x: Array, first_B: Array, length_B: Array) -> Array:
            at_BF = first_B[:, None] + jnp.arange(x.shape[1])
            seen_BF = (at_BF >= 0) & (at_BF < length_B[:, None])
            return jnp.where(seen_BF.reshape(*seen_BF.shape, *(1,) * (x.ndim - 2)), x, 0)

        window = real(window, 4 * first_B - _AHEAD, length_B).astype(DTYPES[self.dtype])
        y = real(jax.nn.relu(self.conv1(window[..., None])), 2 * first_B - 1, -(-length_B // 2))
        y = jax.nn.relu(self.conv2(y))
        return self.project(y.reshape(*y.shape[:2], -1))


class Block(nn.Module):
    """Half a feed-forward layer, attention, convolution, the other half, and a norm (their section 2.4)."""

    heads: int
    kernel: int
    mlp_dim: int | None
    dropout: float
    positions: str
    norm: str
    causal: bool
    dtype: str

    @nn.compact
    def __call__(
        self,
        x_bED: Float[Array, "b E D"],
        seen_BnX: Bool[Array, "B n X"],
        C: int,
        left: Left | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b E D"], Left | None]:
        """
        Args:
          seen_BnX: which frames are real, of those before a chunk and its own.
          left: what is before the only chunk; None: what is before each is among the others.
        """
        normed = functools.partial(nn.LayerNorm, epsilon=1e-5, dtype=DTYPES[self.dtype])
        drop = Dropout(self.dropout, deterministic=not train)
        feed = functools.partial(FeedForward, self.mlp_dim, self.dropout, self.dtype, _STYLE)
        x = x_bED + 0.5 * drop(feed(name="mlp1")(normed(name="norm_mlp1")(x_bED), train))
        y, keys, values = self._attend(normed(name="norm_attention")(x), seen_BnX, C, left)
        x = x + drop(y)
        y, tail = self._convolve(normed(name="norm_convolution")(x), seen_BnX, C, left, train)
        x = x + drop(y)
        x = x + 0.5 * drop(feed(name="mlp2")(normed(name="norm_mlp2")(x), train))
        return normed(name="norm")(x), None if left is None else Left(keys, values, tail)

    def _attend(self, x_bED: Any, seen_BnX: Any, C: int, left: Left | None) -> tuple[Any, Any, Any]:
        (b, E, D), X, dtype = x_bED.shape, seen_BnX.shape[-1], DTYPES[self.dtype]
        H, K, P = self.heads, D // self.heads, X - E
        dense = functools.partial(nn.DenseGeneral, (H, K), dtype=dtype, dot_general=product)
        q, k, v = (dense(name=name)(x_bED) for name in ("query", "key", "value"))
        kept = [_before(x[:, :C], seen_BnX.shape[1], P) for x in (k, v)] if left is None else left[:2]
        k_bXHK, v_bXHK = (jnp.concatenate(parts, 1) for parts in zip(kept, (k, v), strict=True))
        bias = None
        if self.positions == "rope":  # of distances alone: a chunk's positions may begin anywhere
            angles = rotation(jnp.arange(X)[None], K, 10_000.0)
            q, k = rotate(q, angles[:, P:]), rotate(k_bXHK, angles)
        else:
            u_HK, v_HK = (self.param(name, nn.initializers.zeros, (H, K)) for name in ("bias_key", "bias_distance"))
            r_RHK = dense(use_bias=False, name="distance")(jnp.asarray(_distances(X, E, D), dtype))
            score_bHER = jnp.einsum("behk,rhk->bher", (q + v_HK.astype(dtype)) * K**-0.5, r_RHK)
            bias = _shifted(score_bHER, X).astype(jnp.float32)
            q, k = q + u_HK.astype(dtype), k_bXHK
        y_bEHK = attention(q, k, v_bXHK, seen_BnX.reshape(b, 1, 1, X), bias=bias)
        y_bED = nn.DenseGeneral(D, axis=(-2, -1), dtype=dtype, dot_general=product, name="out")(y_bEHK)
        return y_bED, k_bXHK[:, C : C + P], v_bXHK[:, C : C + P]

    def _convolve(self, x_bED: Any, seen_BnX: Any, C: int, left: Left | None, train: bool) -> tuple[Any, Any]:
        (b, E, D), n, dtype = x_bED.shape, seen_BnX.shape[1], DTYPES[self.dtype]
        before, behind = _reach(self.kernel, self.causal)
        seen_bE1 = seen_BnX[..., -E:].reshape(b, E, 1)
        dense = functools.partial(nn.Dense, use_bias=False, dtype=dtype, dot_general=product)
        y, gate = jnp.split(dense(2 * D, name="expand")(x_bED), 2, -1)
        y = jnp.where(seen_bE1, y * jax.nn.sigmoid(gate), 0)
        tail = _before(y[:, :C], n, before) if left is None else left.tail
        window = jnp.concatenate([tail, y, jnp.zeros((b, behind, D), dtype)], 1)
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=(), batch_axis=1)
        y = depthwise(window, self.param("depthwise", init, (self.kernel, D)).astype(dtype))
        if self.norm == "batch":
            y = nn.BatchNorm(not train, momentum=0.9, dtype=dtype, name="bn")(y, mask=seen_bE1)
        else:
            y = nn.LayerNorm(epsilon=1e-5, dtype=dtype, name="ln")(y)
        return dense(D, name="mix")(jax.nn.silu(y)), window[:, C : C + before]


@jax.custom_vjp
def depthwise(x_BXD: Float[Array, "B X D"], kernel_JD: Float[Array, "J D"]) -> Float[Array, "B T D"]:
    """A kernel of its own for each channel, over T = X - J + 1 frames: a sum of shifted products, which fuses.

    Its gradients are written out. For that of the kernel XLA's CPU compiler would go through both arrays J times; here
    a loop over the frames adds to all taps at once (1 ms in place of 28, of 8 x 400 frames, 144 channels, 31 taps).
    """
    if platform() != "cpu":
        axes, D = ("NWC", "WIO", "NWC"), x_BXD.shape[-1]
        kernel_J1D = kernel_JD[:, None]
        return jax.lax.conv_general_dilated(
            x_BXD, kernel_J1D, (1,), "VALID", dimension_numbers=axes, feature_group_count=D
        )
    T = x_BXD.shape[1] - len(kernel_JD) + 1
    return functools.reduce(jnp.add, [x_BXD[:, j : j + T] * kernel_JD[j] for j in range(len(kernel_JD))])


def _depthwise_backward(kept: tuple[Array, Array], dy_BTD: Array) -> tuple[Array, Array]:
    x_BXD, kernel_JD = kept
    (B, T, D), J = dy_BTD.shape, len(kernel_JD)
    dx_BXD = depthwise(jnp.pad(dy_BTD, ((0, 0), (J - 1, J - 1), (0, 0))), kernel_JD[::-1])
    more = -T % _ROWS
    dy, x = (jnp.pad(a, ((0, 0), (0, more), (0, 0))).astype(jnp.float32) for a in (dy_BTD, x_BXD))

    def add(sum_BJD: Array, first: Array) -> tuple[Array, None]:
        x_rows = jax.lax.dynamic_slice_in_dim(x, first, J + _ROWS - 1, 1)
        dy_rows = jax.lax.dynamic_slice_in_dim(dy, first, _ROWS, 1)
        parts = [x_rows[:, i : i + J] * dy_rows[:, i : i + 1] for i in range(_ROWS)]
        return functools.reduce(jnp.add, parts, sum_BJD), None

    firsts = jnp.arange(0, T + more, _ROWS)
    sum_BJD, _ = jax.lax.scan(add, jnp.zeros((B, J, D), jnp.float32), firsts)
    return dx_BXD, jnp.sum(sum_BJD, 0).astype(kernel_JD.dtype)


depthwise.defvjp(lambda x, kernel: (depthwise(x, kernel), (x, kernel)), _depthwise_backward)


def _reach(kernel: int, causal: bool) -> tuple[int, int]:
    """Frames before and behind its own that the convolution sees."""
    return (kernel - 1, 0) if causal else (kernel // 2, kernel // 2)


def _seen(first_Bn: Array, length_B: Array, before: int, frames: int) -> Bool[Array, "B n X"]:
    """Which frames are real, of so many before the beginning of each chunk and from there on."""
    at_BnX = first_Bn[..., None] + jnp.arange(-before, frames)
    return (at_BnX >= 0) & (at_BnX < length_B[:, None, None])


def _before(x_bC: Float[Array, "b C *K"], n: int, frames: int) -> Float[Array, "b P *K"]:
    """The frames before each of a recording's n chunks, zeros before the first."""
    x_BnC = x_bC.reshape(-1, n, *x_bC.shape[1:])
    C = x_BnC.shape[2]
    chunks = -(-frames // C)
    padded = jnp.pad(x_BnC, ((0, 0), (chunks, 0), *((0, 0),) * (x_BnC.ndim - 2)))
    parts = [padded[:, i : i + n] for i in range(chunks)]
    found = jnp.concatenate(parts, 2)[:, :, chunks * C - frames :] if chunks else x_BnC[:, :, :0]
    return found.reshape(len(x_bC), frames, *x_bC.shape[2:])


def _behind(x_BnC: Float[Array, "B n C D"], frames: int) -> Float[Array, "B n R D"]:
    """The first frames of the chunk behind each, zeros behind the last."""
    return jnp.pad(x_BnC[:, 1:, :frames], ((0, 0), (0, 1), (0, 0), (0, 0)))


def _distances(keys: int, queries: int, width: int) -> np.ndarray:
    """f32[R,D]: sines and cosines, in turn, of the distances of a query to a key before it, ``keys - 1`` first."""
    distance_R = np.arange(keys - 1, -queries, -1)
    angle = distance_R[:, None] * 10_000.0 ** -(np.arange(0, width, 2) / width)
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(len(distance_R), width).astype(np.float32)


def _shifted(score_BHER: Array, keys: int) -> Array:
    """[B,H,E,X]: of each query and key, the score of their distance (Dai et al. 2019, appendix B)."""
    B, H, E, R = score_BHER.shape
    padded = jnp.pad(score_BHER, ((0, 0), (0, 0), (0, 0), (1, 0))).reshape(B, H, R + 1, E)
    return padded[:, :, 1:].reshape(B, H, E, R)[..., :keys]
