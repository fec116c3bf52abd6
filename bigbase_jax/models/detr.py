"""DETR: objects as a set that a transformer predicts from a picture's features.

What it and its successors (``rt_detr``, ``yolos``) give is a ``Predictions``; ``tasks.set_prediction`` trains them.

Axes: B examples, H height, W width, C channels, D model width, h and w: of the feature map, L = h x w, Q queries, K
classes and what else the logits have, N layers that predict.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from bigbase_jax.models.layers import DTYPES, classes
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.transformer import KERNEL_INITS, REMAT_POLICIES, Block, Context, Style, Transformer


class Predictions(NamedTuple):
    """What each layer that predicts says of each query; the last one's is the answer, the others' are trained too.

    Attributes:
      logits: of the classes; and last of "no object", where a softmax is taken of them (``SOFTMAX`` of the model).
      boxes: centre, width and height, in 0..1 of the picture's sides (of its real part, where it is padded).
    """

    logits: Float32[Array, "N B Q K"]
    boxes: Float32[Array, "N B Q 4"]


class PredictionHead(nn.Module):
    """An MLP with ReLU: ``depth - 1`` hidden layers of ``hidden`` (None: as wide as its input), and one of ``width``.

    Attributes:
      last_init: of the last layer's kernel.
    """

    width: int
    depth: int = 3
    hidden: int | None = None
    last_init: Any = KERNEL_INITS["xavier"]

    @nn.compact
    def __call__(self, x: Float[Array, "*B D"]) -> Float32[Array, "*B width"]:
        hidden = self.hidden or x.shape[-1]
        for i in range(self.depth - 1):
            x = jax.nn.relu(nn.Dense(hidden, kernel_init=KERNEL_INITS["xavier"], name=f"layer_{i}")(x))
        return nn.Dense(self.width, kernel_init=self.last_init, name=f"layer_{self.depth - 1}")(x)


def inside(valid_B2: Int[Array, "B 2"], shape: tuple[int, ...], places: tuple[int, ...]) -> Bool[Array, "B h w"]:
    """Which places of a feature map lie in the real part of a padded picture.

    Args:
      valid_B2: height and width of that part, in the upper left corner.
      shape: of the picture.
      places: of the map, each of which stands for the pixel that nearest-neighbour subsampling takes.
    """
    rows, columns = ((jnp.arange(n) * size) // n for n, size in zip(places, shape, strict=True))
    return (rows < valid_B2[:, :1])[:, :, None] & (columns < valid_B2[:, 1:])[:, None, :]


def sine_positions(seen_Bhw: Bool[Array, "B h w"], width: int) -> Float32[Array, "B L D"]:
    """Sines and cosines, alternately, of y and then of x, which run over the places that are seen from 0 to 2 pi
    (Carion et al. 2020, with ``normalize``)."""
    seen = seen_Bhw.astype(jnp.float32)
    k = width // 2
    omega_k = 10_000.0 ** (-2 * (jnp.arange(k) // 2) / k)
    found = []
    for axis in (1, 2):
        at_Bhw = jnp.cumsum(seen, axis=axis)
        last = jnp.take(at_Bhw, jnp.array([-1]), axis=axis)
        angle_Bhwk = (at_Bhw / (last + 1e-6) * 2 * math.pi)[..., None] * omega_k
        pair = jnp.stack([jnp.sin(angle_Bhwk[..., 0::2]), jnp.cos(angle_Bhwk[..., 1::2])], -1)
        found.append(pair.reshape(*seen.shape, k))
    return jnp.concatenate(found, -1).reshape(len(seen), -1, width)


class DETR(Transformer):
    """DETR (Carion et al. 2020): a backbone's last map, an encoder of its places, a decoder of learned queries.

    Attributes:
      num_classes: of objects; the logits have one more.
      backbone: what gives the map: a model that is called with ``features``.
      width, depth, heads, mlp_dim: D, blocks of the encoder, heads, hidden width (None: 4 x width).
      decoder_depth, decoder_heads, decoder_mlp_dim: of the decoder; None: as the encoder's.
      queries: Q, the objects that it can find at most.
      style, dropout, dtype, remat, remat_policy, scan, ...: see ``Transformer``; the decoder is never stacked.

    Raises:
      ModelError: a width that does not divide over the heads, or an unknown word.
    """

    num_classes: int | None = None
    backbone: Any = dataclasses.field(default=ResNet(depth=50, frozen=True), kw_only=True)
    width: int = 256
    depth: int = 6
    heads: int = 8
    mlp_dim: int | None = 2048
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    decoder_mlp_dim: int | None = None
    queries: int = 100
    style: Style = dataclasses.field(default=Style(epsilon=1e-5, post_norm=True, activation="relu"), kw_only=True)

    SOFTMAX = True

    def __post_init__(self) -> None:
        for heads in (self.heads, self.decoder_heads or self.heads):
            self.style.sizes(self.width, heads)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], valid_B2: Int[Array, "B 2"] | None = None, train: bool = False
    ) -> Predictions:
        """``valid_B2``: height and width of the real part of padded pictures, in the upper left corner; None: all."""
        dtype, D = DTYPES[self.dtype], self.width
        map_BhwC = self.backbone(x_BHWC, train, features=True)[-1]
        B, h, w, _ = map_BhwC.shape
        seen_Bhw = jnp.ones((B, h, w), bool) if valid_B2 is None else inside(valid_B2, x_BHWC.shape[1:3], (h, w))
        mask = None if valid_B2 is None else seen_Bhw.reshape(B, 1, 1, -1)
        position_BLD = sine_positions(seen_Bhw, D)
        x_BLD = nn.Dense(D, dtype=dtype, kernel_init=KERNEL_INITS["xavier"], name="projection")(map_BhwC)
        encoder = self.stack(self.depth, self.heads, self.mlp_dim, name="encoder")
        memory_BLD = encoder(x_BLD.reshape(B, -1, D), mask, train, Context(position=position_BLD))

        queries_QD = self.param("queries", nn.initializers.normal(1.0), (self.queries, D))
        context = Context(position=queries_QD[None], memory=memory_BLD, memory_mask=mask, memory_position=position_BLD)
        policy = REMAT_POLICIES[self.remat_policy]
        block = nn.remat(Block, static_argnums=(3,), policy=policy) if self.remat else Block
        norm = self.style.normaliser(self.dtype, "decoder_norm")
        y_BQD, found = jnp.zeros((B, self.queries, D), dtype), []
        for i in range(self.decoder_depth or self.depth):
            words: Any = {"dropout": self.dropout, "dtype": self.dtype, "style": self.style, "cross": True}
            heads, mlp_dim = self.decoder_heads or self.heads, self.decoder_mlp_dim or self.mlp_dim
            y_BQD = block(heads, mlp_dim, **words, name=f"decoder_{i}")(y_BQD, None, train, None, context)
            found.append(norm(y_BQD))
        y_NBQD = jnp.stack(found if train else found[-1:]).astype(jnp.float32)
        logits_NBQK = nn.Dense(classes(self.num_classes) + 1, kernel_init=KERNEL_INITS["xavier"], name="head")(y_NBQD)
        return Predictions(logits_NBQK, jax.nn.sigmoid(PredictionHead(4, name="box_head")(y_NBQD)))
