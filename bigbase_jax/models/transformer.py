"""The transformer stack that pictures, text and speech share: attention, feed-forward layers, blocks of them, a stack.

What families of models do each their own way is a ``Style``; what all models of this kind take is a ``Transformer``'s;
what all blocks of a stack read beside the sequence itself is a ``Context``.

Axes: B examples, L length, S length of what is attended to, D model width, H heads, G heads of keys and values, K head
width, M width of the hidden layer, N layers, k = K / 2.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from bigbase_jax.models.attention import SEQUENCE_ATTENTION, attention, near
from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import (
    ACTIVATIONS,
    DTYPES,
    ModelError,
    constrain,
    look_up,
    mesh_axes,
    mesh_size,
    platform,
    product,
)
from bigbase_jax.models.pipeline import check_stages, pipeline
from bigbase_jax.models.rope import rotate

NORMS: Mapping[str, Callable[..., nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
KERNEL_INITS: Mapping[str, Callable[..., Any]] = {
    "xavier": nn.initializers.xavier_uniform(),  # as ViT and big_vision
    "normal": nn.initializers.normal(0.02),  # as BERT, GPT-2 and Llama
}
REMAT_POLICIES: Mapping[str, Callable[..., Any]] = {
    name: getattr(jax.checkpoint_policies, name)
    for name in ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")
}

_ALL = 2**31 - 1  # the window of a block that has none, where other blocks of the stack have one


@dataclasses.dataclass(frozen=True)
class Style:
    """What distinguishes families of transformers; the default is that of ViT (Dosovitskiy et al. 2021).

    Attributes:
      kv_heads: G, each shared by H / G heads of queries (grouped-query attention, Ainslie et al. 2023); None: H.
      head_dim: K; None: D / H.
      norm: "layernorm" or "rmsnorm" (Zhang & Sennrich 2019), which neither centres nor shifts.
      epsilon: of the norms.
      post_norm: normalise after adding each branch, and not at the end (Vaswani et al. 2017; BERT).
      activation: of the hidden layer; a name of ``layers.ACTIVATIONS``.
      gated: the hidden layer is ``activation(gate(x)) * up(x)`` (SwiGLU with "silu"; Shazeer 2020).
      qkv_bias, out_bias, mlp_bias: which projections have biases.
      key_bias: whether keys have one where queries and values do (Whisper's have none: no softmax would see it).
      qk_norm: RMSNorm of each head's queries and keys, before they are rotated (Qwen3).
      window: a causal query sees so many positions, its own included (Mistral); None: all before it.
      windowed: in which blocks it does, a pattern that repeats over the blocks of a stack, such as five times True and
        once False (Gemma 3); None: in all.
      scale: of the scores; None: K ** -0.5 (T5: 1).
      kernel_init: "xavier" or "normal" (a standard deviation of 0.02).

    Raises:
      ModelError: an unknown word, or a number out of range.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    norm: str = "layernorm"
    epsilon: float = 1e-6
    post_norm: bool = False
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    key_bias: bool = True
    qk_norm: bool = False
    window: int | None = None
    windowed: tuple[bool, ...] | None = None
    scale: float | None = None
    kernel_init: str = "xavier"

    def __post_init__(self) -> None:
        look_up(NORMS, self.norm, "norm")
        look_up(ACTIVATIONS, self.activation, "activation")
        look_up(KERNEL_INITS, self.kernel_init, "kernel_init")
        for name in ("kv_heads", "head_dim", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ModelError(f"{name} is {value}; it must be at least 1.")
        if self.windowed is not None:
            object.__setattr__(self, "windowed", tuple(map(bool, self.windowed)))
            if not self.windowed or self.window is None:
                raise ModelError(f"windowed={self.windowed} says which blocks have a window={self.window}; give both.")

    def windows(self, depth: int) -> tuple[int | None, ...]:
        """The window of each of so many blocks."""
        pattern = self.windowed or (True,)
        return tuple(self.window if pattern[i % len(pattern)] else None for i in range(depth))

    def normaliser(self, dtype: str, name: str) -> nn.Module:
        """The norm, as a module of this name."""
        return NORMS[self.norm](epsilon=self.epsilon, dtype=DTYPES[dtype], name=name)

    def sizes(self, width: int, heads: int) -> tuple[int, int]:
        """(G, K).

        Raises:
          ModelError: they do not divide.
        """
        if self.head_dim is None and width % heads:
            raise ModelError(f"a width of {width} does not divide over {heads} heads.")
        if heads % (self.kv_heads or heads):
            raise ModelError(f"{heads} heads do not divide over kv_heads={self.kv_heads}.")
        return self.kv_heads or heads, self.head_dim or width // heads


LLAMA = Style(norm="rmsnorm", activation="silu", gated=True, qkv_bias=False, out_bias=False, mlp_bias=False)
"""That of Llama (Touvron et al. 2023)."""


class Context(NamedTuple):
    """What all blocks read beside the sequence; every array but ``window`` has a leading axis B, or 1.

    Attributes:
      rotation: cosines and sines of rotary positions (``rope.rotation``); None: queries and keys are not rotated.
      bias: added to the scores of self-attention (relative positions); None: nothing is.
      memory: what cross-attention reads.
      memory_mask: which of it is real.
      position_B: that of the sequence's first token, and its place in the cache; None: 0. Read only where there is a
        cache.
      window: i32[], in place of the style's, for a program that all blocks of a stack share.
      segment_ids: self-attention stays within a segment; unread where there is a cache. None: there is one.
      position: added to what queries and keys, and no values, of the sequence are made of in each block (Carion et al.
        2020, DETR); None: nothing is.
      memory_position: the same of the memory's keys.
    """

    rotation: Float32[Array, "_ L 2 k"] | None = None
    bias: Float32[Array, "_ H L S"] | None = None
    memory: Float[Array, "B S D"] | None = None
    memory_mask: Bool[Array, "B 1 1 S"] | None = None
    position_B: Int[Array, " B"] | None = None
    window: Int[Array, ""] | None = None
    segment_ids: Int[Array, "B L"] | None = None
    position: Float[Array, "_ L D"] | None = None
    memory_position: Float[Array, "_ S D"] | None = None


class Attention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017) of a sequence to itself or to a memory.

    With a variable collection "cache" that holds ``keys`` and ``values`` [B, G, S, K] for it, self-attention writes its
    own there, from ``context.position_B`` on, and reads all of them; the mask and the window then say what is seen.
    Cross-attention writes them where it is given a memory, and reads them where it is not.

    Attributes:
      heads: H.
      causal: let position i see positions up to i only.
      dtype: of the computation; the softmax is in float32.
      sequence_attention: see ``attention``.
      style: see ``Style``.
    """

    heads: int
    causal: bool = False
    dtype: str = "float32"
    sequence_attention: str = "ring"
    style: Style = Style()

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask: Bool[Array, "B _ _ S"] | None = None,
        context: Context = Context(),
        cross: bool = False,
    ) -> Float[Array, "B L D"]:
        """``mask`` is True where the query (third axis) may see the key (last axis); unread by cross-attention."""
        style, D, dtype = self.style, x_BLD.shape[-1], DTYPES[self.dtype]
        kernel_init = KERNEL_INITS[style.kernel_init]
        dense = functools.partial(nn.DenseGeneral, dtype=dtype, kernel_init=kernel_init, dot_general=product)
        G, K = style.sizes(D, self.heads)

        def project(name: str, heads: int, x: Float[Array, "B _ D"]) -> Float[Array, "B _ _ K"]:
            biased = style.qkv_bias and (style.key_bias or name != "key")
            y = dense((heads, K), use_bias=biased, name=name)(x)
            if style.qk_norm and name != "value":
                y = nn.RMSNorm(epsilon=style.epsilon, dtype=dtype, name=f"{name}_norm")(y)
            if context.rotation is not None and name != "value" and not cross:
                y = rotate(y, context.rotation)
            return _spread(y)

        def placed(x: Any, position: Any) -> Any:
            return x if position is None else x + position.astype(x.dtype)

        q_BLHK = project("query", self.heads, placed(x_BLD, context.position))
        if style.scale is not None:  # which attention divides by K ** 0.5
            q_BLHK = q_BLHK * (style.scale * K**0.5)
        cached = self.has_variable("cache", "keys")
        window = None if cross else style.window if context.window is None else context.window
        source = x_BLD if not cross else context.memory
        if source is not None:
            keyed = placed(source, context.memory_position if cross else context.position)
            k_BSGK, v_BSGK = project("key", G, keyed), project("value", G, source)
            if cached:
                position_B = None if cross else context.position_B
                k_BSGK, v_BSGK = self._keep("keys", k_BSGK, position_B), self._keep("values", v_BSGK, position_B)
        elif cached:
            k_BSGK, v_BSGK = (jnp.swapaxes(self.get_variable("cache", n), 1, 2) for n in ("keys", "values"))
        else:
            raise ModelError("cross-attention has neither a memory nor a cache to read.")
        if cached and window is not None:
            position_B1 = 0 if context.position_B is None else context.position_B[:, None]
            mask = near(mask, position_B1 + jnp.arange(q_BLHK.shape[1])[None], k_BSGK.shape[1], window)
        y_BLHK = attention(
            q_BLHK,
            k_BSGK.astype(dtype),
            v_BSGK.astype(dtype),
            context.memory_mask if cross else mask,
            self.causal and not cached and not cross,
            self.sequence_attention,
            bias=None if cross else context.bias,
            window=None if cached else window,
            segment_ids=None if cached or cross else context.segment_ids,
        )
        out = dense(D, axis=(-2, -1), use_bias=style.out_bias, name="out")
        return constrain(out(_spread(y_BLHK)), "batch", "length", "width")

    def _keep(self, name: str, new_BLGK: Array, position_B: Array | None) -> Array:
        """The cached array with the new places written into it from ``position_B`` on, [B, S, G, K].

        It is kept as [B, G, S, K], in which attention reads it, or XLA would transpose all of it for every token.
        """
        old_BGSK: Any = self.get_variable("cache", name)
        new_BGLK = jnp.swapaxes(new_BLGK, 1, 2).astype(old_BGSK.dtype)
        if position_B is None:
            kept_BGSK = jax.lax.dynamic_update_slice_in_dim(old_BGSK, new_BGLK, 0, 2)
        elif platform() == "cpu" and isinstance(new_BLGK.shape[0], int):  # where a scatter takes longer
            kept_BGSK = old_BGSK
            for b in range(len(new_BGLK)):
                kept_BGSK = jax.lax.dynamic_update_slice(kept_BGSK, new_BGLK[b : b + 1], (b, 0, position_B[b], 0))
        else:
            write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
            kept_BGSK = jax.vmap(write)(old_BGSK, new_BGLK, position_B)
        self.put_variable("cache", name, kept_BGSK)
        return jnp.swapaxes(kept_BGSK, 1, 2)


def _spread(y_BLHK: Array) -> Array:
    """Heads that do not divide over their devices, such as few heads of keys, stay whole."""
    heads = None if y_BLHK.shape[2] % mesh_size("heads") else "heads"
    return constrain(y_BLHK, "batch", "length", heads, None)


class FeedForward(nn.Module):
    """Dense, activation, dense; see ``Style`` for the gate.

    Attributes:
      mlp_dim: M; None: 4 x D.
      dropout: rate after the activation.
      dtype: of the computation.
      style: see ``Style``.
    """

    mlp_dim: int | None = None
    dropout: float = 0.0
    dtype: str = "float32"
    style: Style = Style()

    @nn.compact
    def __call__(self, x_BLD: Float[Array, "B L D"], train: bool = False) -> Float[Array, "B L D"]:
        style, D = self.style, x_BLD.shape[-1]
        M = self.mlp_dim or 4 * D

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(
                width,
                dtype=DTYPES[self.dtype],
                kernel_init=KERNEL_INITS[style.kernel_init],
                bias_init=nn.initializers.normal(1e-6),
                use_bias=style.mlp_bias,
                dot_general=product,
                name=name,
            )

        activation = ACTIVATIONS[style.activation]
        h_BLM = constrain(dense(M, "up")(x_BLD), "batch", "length", "mlp")
        if style.gated:
            gate_BLM = constrain(dense(M, "gate")(x_BLD), "batch", "length", "mlp")
            h_BLM = activation(gate_BLM) * h_BLM
        else:
            h_BLM = activation(h_BLM)
        h_BLM = Dropout(self.dropout, deterministic=not train)(h_BLM)
        return constrain(dense(D, "down")(h_BLM), "batch", "length", "width")


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``; with ``cross``, attention to a memory between.

    Where the style says ``post_norm``: ``norm(x + attention(x))``, then ``norm(x + feed_forward(x))``.

    Attributes:
      dropout: rate after the activation and on the output of each branch; attention weights are not dropped.
      drop_path: probability that a branch is left out for a whole example (stochastic depth, Huang et al. 2016); those
        kept are scaled by ``1 / (1 - drop_path)``.
      sequence_attention: see ``attention``.
      style: see ``Style``.
      cross: attend to ``context.memory`` as well.
    """

    heads: int
    mlp_dim: int | None = None
    causal: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: str = "float32"
    sequence_attention: str = "ring"
    style: Style = Style()
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask: Bool[Array, "B _ _ S"] | None = None,
        train: bool = False,
        drop_path: Float[Array, ""] | None = None,
        context: Context = Context(),
    ) -> Float[Array, "B L D"]:
        """``drop_path`` replaces the attribute, for a program that all blocks of a stack share."""
        style, dtype = self.style, DTYPES[self.dtype]

        def drop(y_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
            y_BLD = Dropout(self.dropout, deterministic=not train)(y_BLD)
            if drop_path is None:
                return Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)(y_BLD)
            if not train:
                return y_BLD
            keep_B11 = jax.random.bernoulli(self.make_rng("dropout"), 1 - drop_path, (len(y_BLD), 1, 1))
            return jnp.where(keep_B11, y_BLD / (1 - drop_path).astype(dtype), 0)

        def add(x_BLD: Any, name: str, branch: Callable[[Any], Any]) -> Any:
            norm = style.normaliser(self.dtype, name)
            return norm(x_BLD + drop(branch(x_BLD))) if style.post_norm else x_BLD + drop(branch(norm(x_BLD)))

        words = self.heads, self.causal, self.dtype, self.sequence_attention, style
        x_BLD = add(x_BLD, "norm1", lambda y: Attention(*words, name="attention")(y, mask, context))
        if self.cross:
            attend = Attention(*words, name="cross_attention")
            x_BLD = add(x_BLD, "norm_cross", lambda y: attend(y, None, context, cross=True))
        feed = FeedForward(self.mlp_dim, self.dropout, self.dtype, style, name="mlp")
        return add(x_BLD, "norm2", lambda y: feed(y, train))


class Transformer(nn.Module, kw_only=True):
    """What every model of one stack of blocks or more takes: what its blocks are like, and how they are computed.

    Attributes:
      style: see ``Style``.
      dropout: rate on the embedded input, after activations and on the output of each branch.
      dtype: of the computation, "float32" or "bfloat16"; parameters and logits are float32.
      remat: compute the blocks' activations again in the backward pass instead of keeping them.
      remat_policy: what is kept nevertheless; a name of ``REMAT_POLICIES``, which are those of ``jax.checkpoint``.
      scan: keep the blocks' parameters in one stack, ``blocks``, each with a leading axis N, and loop over it: the
        program and its compilation do not grow with the depth. See ``stack_blocks``. Such a stack has no cache.
      sequence_attention: see ``attention``.
      pipeline_microbatches: slices of the batch that flow through a pipeline; unread without one.

    Raises:
      ModelError: an unknown word among the attributes, or a window of what is not causal.
    """

    style: Style = Style()
    dropout: float = 0.0
    dtype: str = "float32"
    remat: bool = False
    remat_policy: str = "nothing_saveable"
    scan: bool = False
    sequence_attention: str = "ring"
    pipeline_microbatches: int = 4

    def __post_init__(self) -> None:
        look_up(DTYPES, self.dtype, "dtype")
        look_up(REMAT_POLICIES, self.remat_policy, "remat_policy")
        look_up(SEQUENCE_ATTENTION, self.sequence_attention, "sequence_attention")
        if self.style.window is not None and not getattr(self, "causal", False):
            raise ModelError(f"style.window is {self.style.window}; only a causal stack, such as a Decoder's, has one.")
        super().__post_init__()

    @nn.nowrap
    def stack(self, depth: int, heads: int, mlp_dim: int | None, **more: Any) -> Encoder:
        """Blocks of this style, computed so; ``more`` are other arguments of ``Encoder``."""
        names = {field.name for field in dataclasses.fields(Transformer)} - {"parent", "name"}
        return Encoder(depth, heads, mlp_dim, **{name: getattr(self, name) for name in names}, **more)

    @nn.nowrap
    def check_given(self, *names: str) -> None:
        """
        Raises:
          ModelError: one of these sizes, which a config may leave to the data, is None or below 1.
        """
        for name in names:
            if (getattr(self, name) or 0) < 1:
                raise ModelError(f"the model's {name} is {getattr(self, name)}; give it, or data that knows it.")

    @nn.nowrap
    def empty_cache(self, depth: int, heads: int, dtype: str | None, **shapes: tuple[int, int, int]) -> dict[str, Any]:
        """Keys and values [B, G, S, K] for each of so many blocks, by the name of their attention.

        Args:
          dtype: of what is kept; None: that of the computation.
          shapes: (B, S, D) of each attention.

        Raises:
          ModelError: the blocks are stacked; see ``unstack_blocks``.
        """
        if self.scan:
            raise ModelError("a stack of blocks has no cache; unstack the blocks and set scan=False.")

        def pair(B: int, S: int, D: int) -> dict[str, Array]:
            G, K = self.style.sizes(D, heads)
            return {name: jnp.zeros((B, G, S, K), DTYPES[dtype or self.dtype]) for name in ("keys", "values")}

        return {f"block_{i}": {name: pair(*shape) for name, shape in shapes.items()} for i in range(depth)}


class Encoder(Transformer):
    """A stack of blocks and, unless they normalise at their own end, a last norm.

    Where the active rules spread "layers" over devices, each of them holds its part of the (scanned) stack, and
    microbatches flow through them (``pipeline``). Random masks then depend on ``pipeline_microbatches`` but not on the
    number of devices.

    Attributes:
      depth, heads: numbers of blocks and heads.
      mlp_dim: of the hidden layers; None: 4 x width.
      causal: let position i see positions up to i only.
      drop_path: of the last block, growing linearly from 0 at the first.
      cross: see ``Block``.

    Raises:
      ModelError: as ``Transformer``, or layers spread over devices that are not stacked or do not divide over them.
    """

    depth: int
    heads: int
    mlp_dim: int | None = None
    causal: bool = False
    drop_path: float = 0.0
    cross: bool = False

    @nn.compact
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask: Bool[Array, "B _ _ S"] | None = None,
        train: bool = False,
        context: Context = Context(),
    ) -> Float[Array, "B L D"]:
        if mesh_axes("layers") and not self.scan:
            raise ModelError(
                f"the mesh spreads layers over {mesh_size('layers')} devices, but the blocks are not stacked; set scan."
            )
        x_BLD = constrain(x_BLD, "batch", "length", "width")
        x_BLD = Dropout(self.dropout, deterministic=not train)(x_BLD.astype(DTYPES[self.dtype]))
        x_BLD = (self._stacked if self.scan else self._unrolled)(x_BLD, mask, train, context)
        return x_BLD if self.style.post_norm else self.style.normaliser(self.dtype, "norm")(x_BLD)

    def _block(self, block: Callable[..., Any], drop_path: float, window: int | None, **kwargs: Any) -> Any:
        style = dataclasses.replace(self.style, window=window, windowed=None)
        words = self.causal, self.dropout, drop_path, self.dtype, self.sequence_attention, style, self.cross
        return block(self.heads, self.mlp_dim, *words, **kwargs)

    def _unrolled(self, x_BLD: Any, mask: Any, train: bool, context: Context) -> Any:
        policy = REMAT_POLICIES[self.remat_policy]
        block = nn.remat(Block, static_argnums=(3,), policy=policy) if self.remat else Block
        for i, window in enumerate(self.style.windows(self.depth)):
            drop_path = self.drop_path * i / max(1, self.depth - 1)
            x_BLD = self._block(block, drop_path, window, name=f"block_{i}")(x_BLD, mask, train, None, context)
        return x_BLD

    def _stacked(self, x_BLD: Any, mask: Any, train: bool, context: Context) -> Any:
        N, windows = self.depth, self.style.windows(self.depth)
        block = self._block(Block, 0.0, windows[0] if len(set(windows)) == 1 else None, parent=None)

        def init(key: jax.Array) -> Any:
            with nn.logical_axis_rules(()):  # one example of length 1, which no device shares
                x_11D = jnp.zeros((1, 1, x_BLD.shape[-1]), x_BLD.dtype)
                like = Context(memory=x_11D) if self.cross else Context()
                return jax.vmap(lambda key: block.init(key, x_11D, context=like)["params"])(jax.random.split(key, N))

        stack = self.param("blocks", init)
        random = train and (self.dropout > 0 or self.drop_path > 0)
        key_N = jax.random.split(self.make_rng("dropout"), N) if random else None
        window_N = jnp.array([w or _ALL for w in windows], jnp.int32) if len(set(windows)) > 1 else None
        rate_N = jnp.linspace(0.0, self.drop_path, N) if train and self.drop_path > 0 else None

        def apply(layer: Any, x_bLD: Any, extra: Any, microbatch: Any) -> Any:
            params, key, rate, window = layer
            rngs = None if key is None else {"dropout": jax.random.fold_in(key, microbatch)}
            mask, context = extra
            context = context._replace(window=window)
            return block.apply({"params": params}, x_bLD, mask, train, rate, context, rngs=rngs)

        if self.remat:  # the loop keeps the two computations apart by itself
            apply = jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat_policy], prevent_cse=False)
        layers, axes, extra = (stack, key_N, rate_N, window_N), mesh_axes("layers"), (mask, context)
        check_stages(N, mesh_size("layers"))
        if axes and not self.is_initializing():  # which sees one example, to no purpose but its shape
            extra = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x_BLD), *a.shape[1:])), extra)
            return pipeline(apply, layers, x_BLD, extra, self.pipeline_microbatches, axes)
        x_BLD, _ = jax.lax.scan(lambda x_BLD, layer: (apply(layer, x_BLD, extra, 0), None), x_BLD, layers)
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
