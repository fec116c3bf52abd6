"""The encoder-decoder: reads a source as a whole, and writes a target from left to right.

Axes: B examples, S length of the source, L length of the target, D model width, H heads, V entries of the vocabulary,
K places of keys, O distances.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from bigbase_jax.models.layers import DTYPES, ModelError, constrain, look_up
from bigbase_jax.models.rope import frequencies, rotation
from bigbase_jax.models.transformer import Context, Style, Transformer

POSITIONS = ("sinusoidal", "learned", "rope", "relative")


class EncoderDecoder(Transformer):
    """A transformer of two stacks (Vaswani et al. 2017), normalised before each branch by default; T5 and Marian too.

    T5 (Raffel et al. 2020) is ``positions="relative"``, RMSNorm, no biases, ``scale=1``, no ``scale_embedding``, and a
    tied head with ``scale_head``, or gates and a free head. Marian (Junczys-Dowmunt et al. 2018) is ``post_norm`` with
    a ``head_bias``. ``hidden`` and ``logits`` are the two halves of a call, so that a loss need not hold all logits at
    once; ``cache`` and ``decode`` write token by token (see ``decoding``).

    Attributes:
      vocab_size: V, of source and target, which share the embedding.
      length: the longest sequence where positions are learned; unread otherwise.
      width, depth, heads: D, blocks of the encoder, heads.
      decoder_depth: blocks of the decoder; None: ``depth``.
      mlp_dim: of the hidden layers; None: 4 x width.
      tied: the head is the embedding, transposed (Press & Wolf 2017); otherwise it has parameters of its own.
      scale_embedding: multiply embedded tokens by sqrt(D).
      scale_head: divide what the head reads by sqrt(D).
      head_bias: add a bias to the logits.
      pad_id: the source's padding, which is never seen; None: there is none.
      positions: "sinusoidal" (sines, then cosines), "learned", "rope" (``models.rope``; not between the stacks), or
        "relative": a bias for each head and range of distances, shared by all blocks of a stack (Raffel et al. 2020).
      relative_buckets, relative_distance: how many ranges, and the distance from which all are in the last one.
      rope_theta: see ``rope.frequencies``.
      style, dropout, dtype, remat, remat_policy, scan, sequence_attention, pipeline_microbatches: see ``Transformer``.

    Raises:
      ModelError: an unknown word among the attributes, sizes that are missing or do not divide, or a sequence that is
        too long.
    """

    vocab_size: int | None = None
    length: int | None = None
    width: int = 512
    depth: int = 6
    heads: int = 8
    decoder_depth: int | None = None
    mlp_dim: int | None = None
    tied: bool = True
    scale_embedding: bool = True
    scale_head: bool = False
    head_bias: bool = False
    pad_id: int | None = None
    positions: str = "sinusoidal"
    relative_buckets: int = 32
    relative_distance: int = 128
    rope_theta: float = 10_000.0
    style: Style = dataclasses.field(default=Style(activation="relu"), kw_only=True)

    def __post_init__(self) -> None:
        look_up(dict.fromkeys(POSITIONS), self.positions, "positions")
        _, K = self.style.sizes(self.width, self.heads)
        if self.positions == "rope":
            frequencies(K, self.rope_theta)
        elif self.positions == "relative":
            buckets(self.relative_buckets, self.relative_distance, True)
            buckets(self.relative_buckets, self.relative_distance, False)
        elif self.positions == "sinusoidal" and self.width % 2:
            raise ModelError(f"a width of {self.width} is odd, and sinusoidal positions are pairs; make it even.")
        super().__post_init__()

    def setup(self) -> None:
        needed = ("vocab_size", "length") if self.positions == "learned" else ("vocab_size",)
        self.check_given(*needed)
        deviation = self.width**-0.5 if self.scale_embedding else 1.0 if self.scale_head else 0.02
        self.embedding = self.param("embedding", nn.initializers.normal(deviation), (self.vocab_size, self.width))
        if self.positions == "learned":
            init = nn.initializers.normal(1.0 if self.scale_embedding or self.scale_head else 0.02)
            self.source_position = self.param("source_position", init, (self.length, self.width))
            self.target_position = self.param("target_position", init, (self.length, self.width))
        elif self.positions == "relative":
            init, shape = nn.initializers.normal(self.width**-0.5), (self.relative_buckets, self.heads)
            self.source_distance = self.param("source_distance", init, shape)
            self.target_distance = self.param("target_distance", init, shape)
        self.encoder = self.stack(self.depth, self.heads, self.mlp_dim)
        self.decoder = self.stack(self.decoder_depth or self.depth, self.heads, self.mlp_dim, causal=True, cross=True)
        if not self.tied:
            self.head = self.param("head", nn.initializers.normal(self.width**-0.5), (self.width, self.vocab_size))
        if self.head_bias:
            self.logits_bias = self.param("logits_bias", nn.initializers.zeros, (self.vocab_size,))

    def __call__(
        self,
        source_BS: Int[Array, "B S"],
        target_BL: Int[Array, "B L"],
        segments_BS: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> Float32[Array, "B L V"]:
        """Logits of the token after each one of the target; see ``hidden``."""
        return self.logits(self.hidden(source_BS, target_BL, segments_BS, train))

    def hidden(
        self,
        source_BS: Int[Array, "B S"],
        target_BL: Int[Array, "B L"],
        segments_BS: Int[Array, "B S"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B L D"]:
        """What ``logits`` reads.

        Args:
          target_BL: the start token, and the target but for its last token; nothing sees what is after it.
          segments_BS: 0 where the source is padding; None: where it is ``pad_id``.
        """
        seen_BS = self._seen(source_BS, segments_BS)
        context = Context(memory=self.encode(source_BS, seen_BS, train), memory_mask=_mask(seen_BS))
        L = target_BL.shape[1]
        return self._write(target_BL, jnp.arange(L)[None], L, context, None, train)

    def encode(
        self, source_BS: Int[Array, "B S"], seen_BS: Bool[Array, "B S"] | None, train: bool = False
    ) -> Float[Array, "B S D"]:
        """The source as the decoder reads it; False in ``seen_BS`` is padding."""
        S = source_BS.shape[1]
        positions_1S = jnp.arange(S)[None]
        x_BSD, context = self._embed("source", source_BS, positions_1S, S)
        if self.positions == "relative":
            context = context._replace(bias=self._bias(self.source_distance, positions_1S, S, True))
        return self.encoder(x_BSD, _mask(seen_BS), train=train, context=context)

    def decode(
        self,
        tokens_BL: Int[Array, "B L"],
        position_B: Int[Array, " B"],
        source_BS: Int[Array, "B S"] | None = None,
        segments_BS: Int[Array, "B S"] | None = None,
    ) -> Float[Array, "B L D"]:
        """``hidden`` of the next tokens of targets whose earlier ones are in the variable collection "cache".

        ``apply(..., method="decode", mutable=["cache"])`` gives the cache with the new tokens in it as well.

        Args:
          position_B: of each target's first token here, which is its place in the cache too.
          source_BS: at the first call: what it needs of the source is kept in the cache; later: None.
          segments_BS: of the source; see ``hidden``.

        Raises:
          ModelError: the source is not as long as the cache's.
        """
        kept_BS: Any = self.get_variable("cache", "seen")
        memory = None
        if source_BS is not None:
            if source_BS.shape[1] != kept_BS.shape[1]:
                raise ModelError(f"a source of {source_BS.shape[1]} tokens is not the cache's of {kept_BS.shape[1]}.")
            seen_BS = self._seen(source_BS, segments_BS)
            memory = self.encode(source_BS, seen_BS)
            kept_BS = jnp.ones_like(kept_BS) if seen_BS is None else seen_BS
            self.put_variable("cache", "seen", kept_BS)
        places = self.variables["cache"]["decoder"]["block_0"]["attention"]["keys"].shape[2]
        if self.positions == "learned" and places - 1 > (self.length or 0):  # the last token is not read any more
            raise ModelError(f"a target of {places - 1} tokens is longer than the model's {self.length} positions.")
        position_BL = position_B[:, None] + jnp.arange(tokens_BL.shape[1])
        mask_B1LK = (position_BL[..., None] >= jnp.arange(places))[:, None]
        context = Context(memory=memory, memory_mask=_mask(kept_BS), position_B=position_B)
        return self._write(tokens_BL, position_BL, places, context, mask_B1LK, False)

    @nn.nowrap
    def cache(self, batch_size: int, length: int, source_length: int, dtype: str | None = None) -> dict[str, Any]:
        """An empty collection "cache" for ``decode``: keys and values of every block of the decoder, [B, G, length, K]
        of the target and [B, G, source_length, K] of the source (see ``empty_cache``); and ``seen``, which of the
        source is no padding.
        """
        shapes = {"attention": (batch_size, length, self.width)}
        shapes["cross_attention"] = (batch_size, source_length, self.width)
        blocks = self.empty_cache(self.decoder_depth or self.depth, self.heads, dtype, **shapes)
        return {"decoder": blocks, "seen": jnp.zeros((batch_size, source_length), bool)}

    def logits(self, y_BLD: Float[Array, "B L D"]) -> Float32[Array, "B L V"]:
        """The head, whose products are summed in float32."""
        if self.scale_head:
            y_BLD = y_BLD * self.width**-0.5
        head_DV = (self.embedding.T if self.tied else self.head).astype(y_BLD.dtype)
        logits_BLV = jnp.einsum("bld,dv->blv", y_BLD, head_DV, preferred_element_type=jnp.float32)
        if self.head_bias:
            logits_BLV = logits_BLV + self.logits_bias
        return constrain(logits_BLV, "batch", "length", "vocab")

    # -- parts -----------------------------------------------------------------------------------------------------

    def _write(
        self,
        tokens_BL: Array,
        positions_BL: Array,
        places: Any,
        context: Context,
        mask: Any,
        train: bool,
    ) -> Array:
        """The decoder; so many places are seen."""
        x_BLD, embedded = self._embed("target", tokens_BL, positions_BL, places)
        bias = self._bias(self.target_distance, positions_BL, places, False) if self.positions == "relative" else None
        context = context._replace(rotation=embedded.rotation, bias=bias)
        return self.decoder(x_BLD, mask, train=train, context=context)

    def _embed(self, side: str, tokens_BL: Array, positions_BL: Array, longest: Any) -> tuple[Array, Context]:
        """(embedded tokens of the source or the target, their rotation); positions are below ``longest``."""
        dtype, context = DTYPES[self.dtype], Context()
        x_BLD = self.embedding[tokens_BL].astype(dtype)
        if self.scale_embedding:
            x_BLD = x_BLD * self.width**0.5
        if self.positions == "learned":
            L = tokens_BL.shape[1]
            if (self.length or 0) < L:
                raise ModelError(f"a {side} of {L} tokens is longer than the model's {self.length} positions.")
            table_LD = self.source_position if side == "source" else self.target_position
            x_BLD = x_BLD + table_LD[positions_BL].astype(dtype)
        elif self.positions == "sinusoidal":
            if isinstance(longest, int):
                x_BLD = x_BLD + jnp.asarray(sinusoids(longest, self.width), dtype)[positions_BL]
            else:  # a free size, of a program that is exported
                angle_BLk = positions_BL[..., None].astype(jnp.float32) * jnp.asarray(
                    _frequencies(self.width), jnp.float32
                )
                x_BLD = x_BLD + jnp.concatenate([jnp.sin(angle_BLk), jnp.cos(angle_BLk)], -1).astype(dtype)
        elif self.positions == "rope":
            _, K = self.style.sizes(self.width, self.heads)
            context = Context(rotation=rotation(positions_BL, K, self.rope_theta))
        return constrain(x_BLD, "batch", "length", "width"), context

    def _bias(self, table_OH: Array, query_BL: Array, keys: Any, both_ways: bool) -> Float32[Array, "_ H L K"]:
        bucket_O = jnp.asarray(buckets(self.relative_buckets, self.relative_distance, both_ways))
        far = len(bucket_O) // 2
        distance_BLK = jnp.clip(jnp.arange(keys) - query_BL[..., None], -far, far) + far
        return jnp.moveaxis(table_OH.astype(jnp.float32)[bucket_O[distance_BLK]], 3, 1)

    def _seen(self, source_BS: Array, segments_BS: Array | None) -> Array | None:
        if segments_BS is not None:
            return segments_BS > 0
        return None if self.pad_id is None else source_BS != self.pad_id


def _mask(seen_BS: Array | None) -> Any:
    """[B, 1, 1, S]"""
    return None if seen_BS is None else seen_BS[:, None, None, :]


def sinusoids(length: int, width: int) -> np.ndarray:
    """f32[length, width]: sines of each position, then its cosines (Vaswani et al. 2017, whose layout alternates)."""
    angle = np.arange(length)[:, None] * _frequencies(width)
    return np.concatenate([np.sin(angle), np.cos(angle)], 1).astype(np.float32)


def _frequencies(width: int) -> np.ndarray:
    """f64[width / 2], radians per position."""
    return 10_000.0 ** -(np.arange(0, width, 2, dtype=np.float64) / width)


def buckets(count: int, distance: int, both_ways: bool) -> np.ndarray:
    """i32[2 x distance + 1]: the range of each distance from ``-distance`` to ``distance``, of the key to the query.

    Near distances have a range each, and those after half of the ranges logarithmically growing ones, up to
    ``distance`` (Raffel et al. 2020, section 2.1). In float32, as published weights were trained.

    Args:
      both_ways: half of the ranges are for keys after the query; otherwise these are as the query's own place.

    Raises:
      ModelError: too few ranges, or none left for great distances.
    """
    some = count // 2 if both_ways else count
    exact = some // 2
    if exact < 1 or distance <= exact:
        raise ModelError(
            f"relative_buckets={count} and relative_distance={distance} leave no ranges of distances; take more of"
            " either."
        )
    offset_O = np.arange(-distance, distance + 1)
    ago_O = np.abs(offset_O) if both_ways else np.maximum(-offset_O, 0)
    ratio_O = (np.maximum(ago_O, 1) / exact).astype(np.float32)
    growth_O = np.log(ratio_O) / np.float32(math.log(distance / exact)) * np.float32(some - exact)
    wide_O = np.minimum(exact + growth_O.astype(np.int32), some - 1)
    bucket_O = np.where(ago_O < exact, ago_O, wide_O)
    return (bucket_O + (some if both_ways else 0) * (offset_O > 0)).astype(np.int32)
