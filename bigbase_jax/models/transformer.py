"""The pre-norm transformer encoder that pictures and text share.

Axes: B examples, L length, D model width, H heads, K head width, M width of the hidden layer, N layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from bigbase_jax.models.attention import SEQUENCE_ATTENTION, attention
from bigbase_jax.models.layers import DTYPES, ModelError, constrain, look_up, mesh_axes, mesh_size
from bigbase_jax.models.pipeline import check_stages, pipeline

EPSILON = 1e-6
kernel_init = nn.initializers.xavier_uniform()
REMAT_POLICIES: Mapping[str, Callable[..., Any]] = {
    name: getattr(jax.checkpoint_policies, name)
    for name in ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")
}


class SelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of a sequence to itself (Vaswani et al. 2017); softmax in float32.

    Attributes:
      heads: H; must divide D.
      causal: let position i see positions up to i only.
      dtype: of the computation.
      sequence_attention: see ``attention``.
    """

    heads: int
    causal: bool = False
    dtype: str = "float32"
    sequence_attention: str = "ring"

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask: Bool[Array, "B _ _ L"] | None = None
    ) -> Float[Array, "B L D"]:
        """``mask`` is True where the query (third axis) may see the key (last axis)."""
        D, dtype = x_BLD.shape[-1], DTYPES[self.dtype]
        if D % self.heads:
            raise ModelError(f"a width of {D} does not divide over {self.heads} heads.")

        def project(name: str) -> Float[Array, "B L H K"]:
            shape = (self.heads, D // self.heads)
            y_BLHK = nn.DenseGeneral(shape, dtype=dtype, kernel_init=kernel_init, name=name)(x_BLD)
            return constrain(y_BLHK, "batch", "length", "heads", None)

        qkv = project("query"), project("key"), project("value")
        y_BLHK = constrain(
            attention(*qkv, mask, self.causal, self.sequence_attention), "batch", "length", "heads", None
        )
        y_BLD = nn.DenseGeneral(D, axis=(-2, -1), dtype=dtype, kernel_init=kernel_init, name="out")(y_BLHK)
        return constrain(y_BLD, "batch", "length", "width")


class FeedForward(nn.Module):
    """Dense, GELU (exact), dense.

    Attributes:
      mlp_dim: M.
      dropout: rate after the GELU.
      dtype: of the computation.
    """

    mlp_dim: int
    dropout: float = 0.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], train: bool = False) -> Float[Array, "B L D"]:
        dtype, bias_init = DTYPES[self.dtype], nn.initializers.normal(1e-6)
        h_BLM = nn.Dense(self.mlp_dim, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name="up")(x_BLD)
        h_BLM = constrain(h_BLM, "batch", "length", "mlp")
        h_BLM = nn.Dropout(self.dropout, deterministic=not train)(jax.nn.gelu(h_BLM, approximate=False))
        D = x_BLD.shape[-1]
        y_BLD = nn.Dense(D, dtype=dtype, kernel_init=kernel_init, bias_init=bias_init, name="down")(h_BLM)
        return constrain(y_BLD, "batch", "length", "width")


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``.

    Attributes:
      dropout: rate after the GELU and on the output of each branch; attention weights are not dropped.
      drop_path: probability that a branch is left out for a whole example (stochastic depth, Huang et al. 2016); those
        kept are scaled by ``1 / (1 - drop_path)``.
      sequence_attention: see ``attention``.
    """

    heads: int
    mlp_dim: int
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    sequence_attention: str = "ring"

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask: Bool[Array, "B _ _ L"] | None = None,
        train: bool = False,
        drop_path: Float[Array, ""] | None = None,
    ) -> Float[Array, "B L D"]:
        """``drop_path`` replaces the attribute, for a program that all blocks of a stack share."""
        dtype = DTYPES[self.dtype]

        def drop(y_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
            y_BLD = nn.Dropout(self.dropout, deterministic=not train)(y_BLD)
            if drop_path is None:
                return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)(y_BLD)
            if not train:
                return y_BLD
            keep_B11 = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (len(y_BLD), 1, 1))
            return jnp.where(keep_B11, y_BLD / (1 - drop_path).astype(dtype), 0)

        y_BLD = nn.LayerNorm(EPSILON, dtype=dtype, name="norm1")(x_BLD)
        attend = SelfAttention(self.heads, self.causal, self.dtype, self.sequence_attention, name="attention")
        x_BLD = x_BLD + drop(attend(y_BLD, mask))
        y_BLD = nn.LayerNorm(EPSILON, dtype=dtype, name="norm2")(x_BLD)
        return x_BLD + drop(FeedForward(self.mlp_dim, self.dropout, self.dtype, name="mlp")(y_BLD, train))


class Encoder(nn.Module):
    """A stack of blocks and a last LayerNorm.

    Where the active rules spread "layers" over devices, each of them holds its part of the (scanned) stack, and
    microbatches flow through them (``pipeline``). Random masks then depend on ``pipeline_microbatches`` but not on the
    number of devices.

    Attributes:
      depth, heads, mlp_dim: numbers of blocks, heads and hidden units.
      causal: let position i see positions up to i only.
      dropout: see ``Block``.
      drop_path: of the last block, growing linearly from 0 at the first.
      dtype: of the computation, "float32" or "bfloat16".
      remat: compute the blocks' activations again in the backward pass instead of keeping them.
      remat_policy: what is kept nevertheless; a name of ``REMAT_POLICIES``, which are those of ``jax.checkpoint``.
      scan: keep the blocks' parameters in one stack, ``blocks``, each with a leading axis N, and loop over it: the
        program and its compilation do not grow with the depth. See ``stack_blocks``.
      sequence_attention: see ``attention``.
      pipeline_microbatches: slices of the batch that flow through a pipeline; unread without one.

    Raises:
      ModelError: an unknown word among the attributes, or layers spread over devices that are not stacked or do not
        divide over them.
    """

    depth: int
    heads: int
    mlp_dim: int
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    remat_policy: str = "nothing_saveable"
    scan: bool = False
    sequence_attention: str = "ring"
    pipeline_microbatches: int = 4

    def __post_init__(self) -> None:
        look_up(REMAT_POLICIES, self.remat_policy, "remat_policy")
        look_up(SEQUENCE_ATTENTION, self.sequence_attention, "sequence_attention")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], mask: Bool[Array, "B _ _ L"] | None = None, train: bool = False
    ) -> Float[Array, "B L D"]:
        if mesh_axes("layers") and not self.scan:
            raise ModelError(
                f"the mesh spreads layers over {mesh_size('layers')} devices, but the blocks are not stacked; set scan."
            )
        x_BLD = constrain(x_BLD, "batch", "length", "width")
        x_BLD = nn.Dropout(self.dropout, deterministic=not train)(x_BLD.astype(DTYPES[self.dtype]))
        x_BLD = (self._stacked if self.scan else self._unrolled)(x_BLD, mask, train)
        return nn.LayerNorm(EPSILON, dtype=DTYPES[self.dtype], name="norm")(x_BLD)

    def _block(self, block: Callable[..., Any], drop_path: float, **kwargs: Any) -> Any:
        words = self.causal, self.dropout, drop_path, self.dtype, self.sequence_attention
        return block(self.heads, self.mlp_dim, *words, **kwargs)

    def _unrolled(self, x_BLD: Any, mask: Any, train: bool) -> Any:
        policy = REMAT_POLICIES[self.remat_policy]
        block = nn.remat(Block, static_argnums=(3,), policy=policy) if self.remat else Block
        for i in range(self.depth):
            drop_path = self.drop_path * i / max(1, self.depth - 1)
            x_BLD = self._block(block, drop_path, name=f"block_{i}")(x_BLD, mask, train)
        return x_BLD

    def _stacked(self, x_BLD: Any, mask: Any, train: bool) -> Any:
        N, block = self.depth, self._block(Block, 0.0, parent=None)

        def init(key: jax.Array) -> Any:
            with nn.logical_axis_rules(()):  # one example of length 1, which no device shares
                x_11D = jnp.zeros((1, 1, x_BLD.shape[-1]), x_BLD.dtype)
                return jax.vmap(lambda key: block.init(key, x_11D)["params"])(jax.random.split(key, N))

        stack = self.param("blocks", init)
        random = train and (self.dropout > 0 or self.drop_path > 0)
        key_N = jax.random.split(self.make_rng("dropout"), N) if random else None
        rate_N = jnp.linspace(0.0, self.drop_path, N) if train and self.drop_path > 0 else None

        def apply(layer: Any, x_bLD: Any, mask: Any, microbatch: Any) -> Any:
            params, key, rate = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, microbatch)}
            return block.apply({"params": params}, x_bLD, mask, train, rate, rngs=rngs)

        if self.remat:  # the loop keeps the two computations apart by itself
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat_policy], prevent_cse=False)
        layers, axes = (stack, key_N, rate_N), mesh_axes("layers")
        check_stages(N, mesh_size("layers"))
        if axes and not self.is_initializing():  # which sees one example, to no purpose but its shape
            return pipeline(apply, layers, x_BLD, mask, self.pipeline_microbatches, axes)
        x_BLD, _ = jax.lax.scan(lambda x_BLD, layer: (apply(layer, x_BLD, mask, 0), None), x_BLD, layers)
        return x_BLD


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a scanned encoder from those of an unrolled one, wherever in ``params`` it is.

    ``block_0`` ... ``block_{N-1}`` become ``blocks``, whose leaves have a leading axis N; the rest stays as it is.
    """
    rest = {name: stack_blocks(x) if isinstance(x, Mapping) else x for name, x in params.items()}
    names = sorted((name for name in rest if re.fullmatch(r"block_\d+", name)), key=lambda name: int(name[6:]))
    blocks = [rest.pop(name) for name in names]
    return {"blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks), **rest} if blocks else rest


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``stack_blocks``: the parameters of an unrolled encoder from those of a scanned one."""
    rest = {name: unstack_blocks(x) if isinstance(x, Mapping) else x for name, x in params.items()}
    stack = rest.pop("blocks", None)
    depth = len(jax.tree.leaves(stack)[0]) if stack is not None else 0
    return {**{f"block_{i}": jax.tree.map(lambda a, i=i: a[i], stack) for i in range(depth)}, **rest}


def sincos2d(h: int, w: int, width: int, temperature: float = 10_000.0) -> Float[Array, "L D"]:
    """Fixed positions of an h x w grid, row by row: sines and cosines of x, then of y (Chen et al. 2021, MoCo v3).

    Raises:
      ModelError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ModelError(f"a width of {width} is not a multiple of 4, which sincos2d positions need.")
    y, x = jnp.mgrid[:h, :w]
    omega = temperature ** -jnp.linspace(0, 1, width // 4)
    angles = [axis.reshape(-1, 1) * omega for axis in (x, y)]
    return jnp.concatenate([f(angle) for angle in angles for f in (jnp.sin, jnp.cos)], axis=1)
