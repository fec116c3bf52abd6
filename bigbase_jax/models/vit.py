"""The vision transformer.

Axes: B examples, H height, W width, C channels, K classes, D model width, h = H // patch, w = W // patch, L length.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.layers import DTYPES, ModelError, classes, constrain, look_up
from bigbase_jax.models.transformer import Attention, Context, FeedForward, Style, Transformer, sincos2d


class Size(NamedTuple):
    """Width, depth and heads of a variant; its hidden layers are four times as wide."""

    width: int
    depth: int
    heads: int


VARIANTS = {
    "Ti": Size(192, 12, 3),
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
}


class ViT(Transformer):
    """Vision transformer (Dosovitskiy et al. 2021), pre-norm; Ti and S as in DeiT (Touvron et al. 2021).

    Attributes:
      num_classes: width of the output.
      variant: "Ti", "S", "B" or "L".
      patch: side of the square patches in pixels; height and width must be multiples of it (they may differ).
      width, depth, heads, mlp_dim: replace the variant's where given; ``mlp_dim`` is 4 x width otherwise.
      pool: what the last layer reads: "cls", a learned token; "gap", the mean over the patches; or "map", a learned
        query's attention to them (Zhai et al. 2022). Of the latter two, neither has such a token.
      positions: "learned" (for one size of picture) or "sincos2d" (fixed, for any).
      drop_path: stochastic depth of the last block, growing linearly from 0.
      patch_bias: whether the embedding of patches has biases (CLIP's has none).
      pre_norm: normalise once more before the first block (CLIP).
      head: the last layer: "dense", "unbiased", or "none": the pooled vector is what is given.
      style, dropout, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.
        A sequence that devices share must divide over them, and the token of "cls" counts.

    Raises:
      ModelError: an unknown word among the attributes, a width that the heads do not divide, or a picture that the
        patches do not fill.
    """

    num_classes: int | None = None
    variant: str = "Ti"
    patch: int = 16
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    mlp_dim: int | None = None
    pool: str = "cls"
    positions: str = "learned"
    drop_path: float = 0.0
    patch_bias: bool = True
    pre_norm: bool = False
    head: str = "dense"

    def __post_init__(self) -> None:
        look_up(VARIANTS, self.variant, "variant")
        look_up(dict.fromkeys(("cls", "gap", "map")), self.pool, "pool")
        look_up(dict.fromkeys(("dense", "unbiased", "none")), self.head, "head")
        if self.positions not in ("learned", "sincos2d"):
            raise ModelError(f"positions is {self.positions!r}; it is 'learned' or 'sincos2d'.")
        self.style.sizes(self.size.width, self.size.heads)
        super().__post_init__()

    @property
    def size(self) -> Size:
        """The variant's size, with what is given in its place."""
        size = VARIANTS[self.variant]
        return Size(self.width or size.width, self.depth or size.depth, self.heads or size.heads)

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], train: bool = False, upto: str = "head"
    ) -> Float32[Array, "B K"] | Float[Array, "B L D"]:
        """Logits; with ``upto="tokens"`` what is pooled for them, f[B,L,D], the patches row by row behind what token
        there is."""
        B, H, W, _ = x_BHWC.shape
        P, D, dtype = self.patch, self.size.width, DTYPES[self.dtype]
        if H % P or W % P:
            raise ModelError(
                f"a picture of {H}x{W} does not divide into patches of {P}x{P}; resize it or change patch."
            )
        embed = nn.Conv(D, (P, P), P, "VALID", use_bias=self.patch_bias, dtype=dtype, name="embedding")
        x_BLD = embed(x_BHWC.astype(dtype)).reshape(B, -1, D)
        x_BLD = constrain(x_BLD, "batch", "length", "width")
        tokens = int(self.pool == "cls")
        if tokens:
            cls_11D = self.param("cls", nn.initializers.zeros, (1, 1, D))
            x_BLD = jnp.concatenate([jnp.broadcast_to(cls_11D, (B, 1, D)).astype(dtype), x_BLD], axis=1)
        if self.positions == "learned":
            position_1LD = self.param("position", nn.initializers.normal(0.02), (1, x_BLD.shape[1], D))
        else:
            position_1LD = jnp.pad(sincos2d(H // P, W // P, D), ((tokens, 0), (0, 0)))[None]
        x_BLD = x_BLD + position_1LD.astype(dtype)
        if self.pre_norm:
            x_BLD = self.style.normaliser(self.dtype, "pre_norm")(x_BLD)
        encoder = self.stack(self.size.depth, self.size.heads, self.mlp_dim, drop_path=self.drop_path, name="encoder")
        x_BLD = encoder(x_BLD, train=train)
        if upto == "tokens":
            return x_BLD
        if self.pool == "map":
            x_BD = MapHead(self.size.heads, self.mlp_dim, self.dtype, self.style, name="map")(x_BLD)
        else:
            x_BD = x_BLD[:, 0] if tokens else jnp.mean(x_BLD, 1, dtype=jnp.float32)
        x_BD = x_BD.astype(jnp.float32)
        if self.head == "none":
            return x_BD
        head_init = nn.initializers.truncated_normal(0.02)
        dense = nn.Dense(classes(self.num_classes), use_bias=self.head == "dense", kernel_init=head_init, name="head")
        return constrain(dense(constrain(x_BD, "batch", "width")), "batch", None)


class MapHead(nn.Module):
    """Multi-head attention pooling (Zhai et al. 2022, section 3.2): one learned query reads a sequence, and a
    feed-forward layer follows."""

    heads: int
    mlp_dim: int | None = None
    dtype: str = "float32"
    style: Style = Style()

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        B, _, D = x_BLD.shape
        probe_11D = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, D))
        probe_B1D = jnp.broadcast_to(probe_11D, (B, 1, D)).astype(x_BLD.dtype)
        attend = Attention(self.heads, dtype=self.dtype, style=self.style, name="attention")
        y_B1D = attend(probe_B1D, context=Context(memory=x_BLD), cross=True)
        feed = FeedForward(self.mlp_dim, 0.0, self.dtype, self.style, name="mlp")
        return (y_B1D + feed(self.style.normaliser(self.dtype, "norm")(y_B1D)))[:, 0]


def bicubic(count: int, places: int, wanted: Any = None) -> Any:
    """f32[..., places, count]: the share of each of ``count`` points in each of ``wanted`` ones on the same line.

    Keys (1981) with a = -0.75 and without antialiasing, the outermost points going on beyond the ends, as torch's
    ``interpolate(mode="bicubic", align_corners=False)``; ``jax.image.resize`` has a = -0.5, and leaves the points out.

    Args:
      wanted: an array [...], of which each is up to ``places``: the shares of places from there on mean nothing. None:
        all places, and the result is a numpy array.
    """
    xp: Any = np if wanted is None else jnp
    scale = count / places if wanted is None else count / wanted[..., None]
    at_w = (xp.arange(places) + 0.5) * scale - 0.5
    shares_wc = xp.zeros((*at_w.shape, count))
    for tap in range(-1, 3):
        point_w = xp.floor(at_w) + tap
        x = xp.abs(at_w - point_w)
        near, far = (1.25 * x - 2.25) * x * x + 1, ((-0.75 * x + 3.75) * x - 6) * x + 3
        place_w = xp.clip(point_w, 0, count - 1)
        share_w = xp.where(x <= 1, near, far)
        shares_wc = shares_wc + share_w[..., None] * (place_w[..., None] == xp.arange(count))
    return shares_wc.astype(xp.float32)
