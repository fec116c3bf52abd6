"""Attention of a sequence to itself, on one device or with the sequence spread over many.

Axes: B examples, L length, S length of the keys, H heads, G heads of keys and values, K head width. In a function of
what one device holds: B, L and H are its own examples, queries and heads, S its block of keys, and N the length of the
whole sequence.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

from bigbase_jax.models.layers import ModelError, look_up, mesh_axes, mesh_size, platform

_BLOCK = 64  # queries, at least, of a block of ``_by_blocks``
_CODES = np.array([n for n in range(2**16) if n.bit_count() == 8], np.uint16)  # none covers another (Sperner 1928)
UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # as jax.nn.dot_product_attention: finite, so no row becomes NaN


def attention(
    q_BLHK: Float[Array, "B L H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G K"],
    mask: Bool[Array, "B _ _ S"] | None = None,
    is_causal: bool = False,
    sequence_attention: str = "ring",
    *,
    bias: Float32[Array, "_ H L S"] | None = None,
    window: int | Int[Array, ""] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
) -> Float[Array, "B L H K"]:
    """Scaled dot-product attention (Vaswani et al. 2017), softmax in float32; on GPUs cuDNN's where it can.

    Where the active rules spread "length" over devices, each of them holds the queries of its part of the sequence, and
    the keys come to them: "ring" passes them around (Liu et al. 2023, "Ring Attention with Blockwise Transformers"),
    so that a device never holds more than its part and one more; "all_gather" collects all keys and values first,
    which is quicker while they and the scores [B, H, L, N] fit. "batch" and "heads" stay spread as they are; either
    stays whole if it does not divide, as the single example of an initialisation. With a bias, or keys of another
    sequence (S is not L), the compiler gathers the keys.

    Args:
      mask: True where the query (third axis) may see the key (last axis); the second axis is 1 or H, the third 1 or L.
      is_causal: let position i see positions up to i only.
      sequence_attention: "ring" or "all_gather". The ring has no forward-mode derivative.
      bias: added to the scores.
      window: how many positions a causal query sees, its own included; None: all. An array costs as much as a mask.
      segment_ids: a query sees the keys of its own segment only; from 0 to 12,869. Where cuDNN runs they need no mask
        [B, 1, L, L]; elsewhere they become one.

    Raises:
      ModelError: the length does not divide over its devices, or there is no such ``sequence_attention``.
    """
    local = look_up(SEQUENCE_ATTENTION, sequence_attention, "sequence_attention")
    length = mesh_axes("length")
    whole = not length or bias is not None or q_BLHK.shape[1] != k_BSGK.shape[1]
    if window is not None and not (whole and isinstance(window, int)):
        mask, window = near(mask, jnp.arange(q_BLHK.shape[1])[None], k_BSGK.shape[1], window), None
    if whole:
        return _whole(q_BLHK, k_BSGK, v_BSGK, mask, bias, is_causal, window, segment_ids)
    mask = _same_segment(mask, segment_ids)
    shared = q_BLHK.shape[2] // k_BSGK.shape[2]
    k_BLHK, v_BLHK = (jnp.repeat(x, shared, 2) for x in (k_BSGK, v_BSGK))
    B, L, H, _ = q_BLHK.shape
    if L % mesh_size("length"):
        raise ModelError(
            f"a length of {L} does not divide over the {mesh_size('length')} devices that share a sequence; "
            "change the length, or give the sequence fewer devices."
        )
    batch = () if B % mesh_size("batch") else mesh_axes("batch")
    heads = () if H % mesh_size("heads") else mesh_axes("heads")
    spec = PartitionSpec(batch or None, length, heads or None)
    mask_spec = None
    if mask is not None:  # keys whole: a device sees every key in the end
        mask_axes = zip((batch, heads, length), (B, H, L), mask.shape[:3], strict=True)
        mask_spec = PartitionSpec(*((axes or None) if size == whole else None for axes, whole, size in mask_axes))
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(
        functools.partial(local, length, is_causal),
        in_specs=(spec, spec, spec, mask_spec, PartitionSpec(length)),
        out_specs=spec,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,
    )(q_BLHK, k_BLHK, v_BLHK, mask, jnp.arange(L))


def near(
    mask: Bool[Array, "B _ _ S"] | None, query_BL: Int[Array, "_ L"], keys: Any, window: Any
) -> Bool[Array, "B _ L S"]:
    """The mask without those of so many keys that are ``window`` or more before the query of this position."""
    near_B1LS = query_BL[:, None, :, None] - jnp.arange(keys) < window
    return near_B1LS if mask is None else mask & near_B1LS


def _same_segment(mask: Bool[Array, "B _ _ S"] | None, segments_BL: Int[Array, "B L"] | None) -> Any:
    """The mask without those keys that are of another segment than the query."""
    if segments_BL is None:
        return mask
    same_B1LL = (segments_BL[:, :, None] == segments_BL[:, None, :])[:, None]
    return same_B1LL if mask is None else mask & same_B1LL


def _whole(
    q: Array, k: Array, v: Array, mask: Any, bias: Any, is_causal: bool, window: int | None, segments_BL: Array | None
) -> Array:
    """Attention where a device holds whole sequences, or the compiler sees to it."""
    if platform() == "cpu" and isinstance(q.shape[1], int):  # else a program is exported for any length
        return _by_blocks(q, k, v, _same_segment(mask, segments_BL), bias, is_causal, window)
    size = None if window is None else (window - 1, 0)
    attend = functools.partial(jax.nn.dot_product_attention, bias=bias, is_causal=is_causal, local_window_size=size)
    if platform() == "gpu" and q.dtype != jnp.float32:  # cuDNN's takes half precision only
        flash = functools.partial(attend, implementation="cudnn")
        ways = [lambda: flash(q, k, v, mask=_same_segment(mask, segments_BL))]
        if segments_BL is not None:
            ways.insert(0, lambda: within_segments(functools.partial(flash, mask=mask), segments_BL, q, k, v))
        for way in ways:
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError):  # shapes, a version or a device
                return way()
    return attend(q, k, v, mask=_same_segment(mask, segments_BL))


def within_segments(
    attend: Callable[..., Array], segments_BL: Int[Array, "B L"], q_BLHK: Array, k_BLGK: Array, v_BLGK: Array
) -> Array:
    """``attend`` without a mask for it, where each query sees the keys of its own segment only.

    Keys have 16 more entries, half of which are 2^10, by which they code their segment; queries have -2^10 where their
    own segment's code has 0. As no code covers another, these entries add 0 to a score within a segment, exactly, and
    at most -2^20 otherwise, before ``scale``.

    What cuDNN has for packed sequences needs a bound M on the segments of a sequence, and keeps [B x M, H, L] float32
    for the gradient; of a mask, it writes the gradient, [B, 1, L, L], too.
    """
    code_BLC = jnp.asarray(_CODES)[segments_BL][..., None] >> jnp.arange(16, dtype=_CODES.dtype) & 1

    def beside(x_BLHK: Array, more_BLC: Array) -> Array:
        more_BLHC = jnp.broadcast_to(more_BLC.astype(x_BLHK.dtype)[:, :, None], (*x_BLHK.shape[:3], 16))
        return jnp.concatenate([x_BLHK, more_BLHC], -1)

    q_BLHC, k_BLGC = beside(q_BLHK, -1024.0 * (1 - code_BLC)), beside(k_BLGK, 1024.0 * code_BLC)
    K = q_BLHK.shape[-1]
    return attend(q_BLHC, k_BLGC, beside(v_BLGK, 0 * code_BLC), scale=K**-0.5)[..., :K]


def _by_blocks(
    q_BLHK: Array, k_BSGK: Array, v_BSGK: Array, mask: Any, bias: Any, is_causal: bool, window: int | None
) -> Array:
    """``jax.nn.dot_product_attention`` in about half of its time on a CPU, whose memory is what attention waits for.

    Blocks of causal queries meet only the keys that they may see, and what is divided by the sum of a row's weights is
    the row's output, not its weights.
    """
    L, K, S = q_BLHK.shape[1], q_BLHK.shape[3], k_BSGK.shape[1]
    q_BHLK, k_BGSK, v_BGSK = (jnp.swapaxes(x, 1, 2) for x in (q_BLHK * K**-0.5, k_BSGK, v_BSGK))
    causal = is_causal and L == S
    size = next(L // n for n in (8, 4, 2, 1) if n == 1 or (causal and L % n == 0 and L // n >= _BLOCK))
    outputs = []
    for first in range(0, L, size):
        here = slice(first, first + size)
        there = slice(max(0, first - window + 1) if causal and window else 0, here.stop if causal else S)
        seen = None if mask is None else mask[:, :, here if mask.shape[2] > 1 else slice(None), there]
        if is_causal or window is not None:
            ago_LS = np.arange(L)[here, None] - np.arange(S)[there]
            past_LS = (ago_LS >= 0) & (ago_LS < (window or L))
            seen = past_LS if seen is None else past_LS & seen
        added = None if bias is None else bias[:, :, here, there]
        outputs.append(_softmax_attention(q_BHLK[:, :, here], k_BGSK[:, :, there], v_BGSK[:, :, there], seen, added))
    return jnp.swapaxes(jnp.concatenate(outputs, 2), 1, 2).astype(q_BLHK.dtype)


def _softmax_attention(q_BHLK: Array, k_BGSK: Array, v_BGSK: Array, seen: Any, bias: Any) -> Array:
    (B, H, L, K), G = q_BHLK.shape, k_BGSK.shape[1]
    score_BHLS = _dot("bgmk,bgsk->bgms", q_BHLK.reshape(B, G, -1, K), k_BGSK).reshape(B, H, L, -1)
    if bias is not None:
        score_BHLS = score_BHLS + bias
    if seen is not None:
        score_BHLS = jnp.where(seen, score_BHLS, UNSEEN)
    weight_BHLS = jnp.exp(score_BHLS - jax.lax.stop_gradient(jnp.max(score_BHLS, -1, keepdims=True)))
    weight_BGMS = weight_BHLS.astype(v_BGSK.dtype).reshape(B, G, -1, score_BHLS.shape[-1])
    y_BHLK = _dot("bgms,bgsk->bgmk", weight_BGMS, v_BGSK).reshape(B, H, L, K)
    return y_BHLK / jnp.sum(weight_BHLS, -1, keepdims=True)


def all_gather_attention(
    axes: tuple[str, ...],
    is_causal: bool,
    q_BLHK: Float[Array, "B L H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask: Bool[Array, "_ _ _ N"] | None,
    at_L: Int[Array, " L"],
) -> Float[Array, "B L H K"]:
    """Attention of this device's queries, at the places ``at_L`` of the sequence, to all keys of the mesh ``axes``."""
    k_BNHK, v_BNHK = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (k_BSHK, v_BSHK))
    if is_causal:
        seen_11LN = (at_L[:, None] >= jnp.arange(k_BNHK.shape[1]))[None, None]
        mask = seen_11LN if mask is None else mask & seen_11LN
    return jax.nn.dot_product_attention(q_BLHK, k_BNHK, v_BNHK, mask=mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def ring_attention(
    axes: tuple[str, ...],
    is_causal: bool,
    q_BLHK: Float[Array, "B L H K"],
    k_BSHK: Float[Array, "B S H K"],
    v_BSHK: Float[Array, "B S H K"],
    mask: Bool[Array, "_ _ _ N"] | None,
    at_L: Int[Array, " L"],
) -> Float[Array, "B L H K"]:
    """``all_gather_attention``, with the blocks of keys and values passed around a ring (Liu et al. 2023, algorithm 1).

    The softmax is taken block by block (Milakov & Gimelshein 2018), and the gradient goes round the ring once more,
    computing the scores again: what is kept for it does not grow with the number of devices. Blocks that a causal mask
    empties are computed nevertheless: the device with the last queries needs every one, and the others wait for it.
    """
    return _ring_forward(axes, is_causal, q_BLHK, k_BSHK, v_BSHK, mask, at_L)[0]


def _ring_forward(
    axes: tuple[str, ...], is_causal: bool, q_BLHK: Any, k_BSHK: Any, v_BSHK: Any, mask: Any, at_L: Any
) -> tuple[Any, Any]:
    def fold(sums: tuple[Any, Any, Any], block: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        y_BLHK, top_BHL, total_BHL = sums
        k_BSHK, v_BSHK, at_S = block
        score_BHLS, _ = _scores(q_BLHK, k_BSHK, mask, is_causal, at_L, at_S)
        new_BHL = jnp.maximum(top_BHL, jnp.max(score_BHLS, -1))
        weight_BHLS = jnp.exp(score_BHLS - new_BHL[..., None])
        shrink_BHL = jnp.exp(top_BHL - new_BHL)
        more_BLHK = _dot("bhls,bshk->blhk", weight_BHLS.astype(v_BSHK.dtype), v_BSHK)
        y_BLHK = y_BLHK * _columns(shrink_BHL) + more_BLHK
        return y_BLHK, new_BHL, total_BHL * shrink_BHL + jnp.sum(weight_BHLS, -1)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        sums, block = carry
        return (fold(sums, block), pass_on(block, axes)), None

    B, L, H, _ = q_BLHK.shape
    zero_BHL = jnp.zeros((B, H, L), jnp.float32)
    start = (jnp.zeros(q_BLHK.shape, jnp.float32), zero_BHL + UNSEEN, zero_BHL)
    carry = (start, (k_BSHK, v_BSHK, at_L))
    (sums, block), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axes) - 1)
    y_BLHK, top_BHL, total_BHL = fold(sums, block)
    y_BLHK = (y_BLHK / _columns(total_BHL)).astype(q_BLHK.dtype)
    return y_BLHK, (q_BLHK, k_BSHK, v_BSHK, mask, at_L, y_BLHK, top_BHL, total_BHL)


def _ring_backward(axes: tuple[str, ...], is_causal: bool, kept: tuple[Any, ...], dy_BLHK: Any) -> tuple[Any, ...]:
    q_BLHK, k_BSHK, v_BSHK, mask, at_L, y_BLHK, top_BHL, total_BHL = kept
    dtype, scale = q_BLHK.dtype, 1 / math.sqrt(q_BLHK.shape[-1])
    # The softmax's gradient needs the weighted mean of dweight: the product of y and dy (Dao et al. 2022, B.2).
    mean_BHL = jnp.einsum("blhk,blhk->bhl", y_BLHK.astype(jnp.float32), dy_BLHK.astype(jnp.float32))

    def fold(dq_BLHK: Any, block: tuple[Any, Any, Any], grads: tuple[Any, Any]) -> tuple[Any, tuple[Any, Any]]:
        (k_BSHK, v_BSHK, at_S), (dk_BSHK, dv_BSHK) = block, grads
        score_BHLS, seen = _scores(q_BLHK, k_BSHK, mask, is_causal, at_L, at_S)
        weight_BHLS = jnp.exp(score_BHLS - top_BHL[..., None]) / total_BHL[..., None]
        dweight_BHLS = _dot("blhk,bshk->bhls", dy_BLHK, v_BSHK)
        dscore_BHLS = weight_BHLS * (dweight_BHLS - mean_BHL[..., None]) * scale
        if seen is not None:  # a row that sees nothing weighs all keys alike, and no score changes that
            dscore_BHLS = jnp.where(seen, dscore_BHLS, 0.0)
        weight_BHLS, dscore_BHLS = weight_BHLS.astype(dtype), dscore_BHLS.astype(dtype)
        dq_BLHK += _dot("bhls,bshk->blhk", dscore_BHLS, k_BSHK)
        dk_BSHK += _dot("bhls,blhk->bshk", dscore_BHLS, q_BLHK)
        dv_BSHK += _dot("bhls,blhk->bshk", weight_BHLS, dy_BLHK)
        return dq_BLHK, (dk_BSHK, dv_BSHK)

    def step(carry: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], None]:
        dq_BLHK, block, grads = carry
        dq_BLHK, grads = fold(dq_BLHK, block, grads)
        return (dq_BLHK, pass_on(block, axes), pass_on(grads, axes)), None

    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (q_BLHK, k_BSHK, v_BSHK)]
    carry = (zeros[0], (k_BSHK, v_BSHK, at_L), (zeros[1], zeros[2]))
    (dq_BLHK, block, grads), _ = jax.lax.scan(step, carry, length=jax.lax.axis_size(axes) - 1)
    dq_BLHK, grads = fold(dq_BLHK, block, grads)
    dk_BSHK, dv_BSHK = pass_on(grads, axes)  # the last step brings each block's gradient home
    return *(x.astype(dtype) for x in (dq_BLHK, dk_BSHK, dv_BSHK)), None, None


ring_attention.defvjp(_ring_forward, _ring_backward)


def _scores(
    q_BLHK: Any, k_BSHK: Any, mask: Any, is_causal: bool, at_L: Any, at_S: Any
) -> tuple[Float32[Array, "B H L S"], Any]:
    """The scores of a block, ``UNSEEN`` where the query may not see the key, and where it may (None: everywhere)."""
    score_BHLS = _dot("blhk,bshk->bhls", q_BLHK, k_BSHK) / math.sqrt(q_BLHK.shape[-1])
    seen = None
    if mask is not None:
        seen = jax.lax.dynamic_slice_in_dim(mask, at_S[0], len(at_S), axis=3)
    if is_causal:
        causal_11LS = (at_L[:, None] >= at_S)[None, None]
        seen = causal_11LS if seen is None else seen & causal_11LS
    return score_BHLS if seen is None else jnp.where(seen, score_BHLS, UNSEEN), seen


def _dot(axes: str, a: Any, b: Any) -> Any:
    return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _columns(x_BHL: Any) -> Any:
    return jnp.swapaxes(x_BHL, 1, 2)[..., None]


def pass_on(tree: Any, axes: tuple[str, ...]) -> Any:
    """What the device before this one holds of ``tree``; the last one's goes to the first."""
    size = jax.lax.axis_size(axes)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, [(i, (i + 1) % size) for i in range(size)]), tree)


SEQUENCE_ATTENTION: Mapping[str, Callable[..., Any]] = {"ring": ring_attention, "all_gather": all_gather_attention}
