"""Rotary positions: queries and keys are rotated by angles that grow with their position (Su et al. 2021, "RoFormer").

Axes: B examples, L length, H heads, K head width, k = K / 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from bigbase_jax.models.layers import ModelError

SCALINGS = ("default", "linear", "llama3", "yarn")


def frequencies(width: int, theta: float, scaling: Mapping[str, Any] | None = None) -> tuple[np.ndarray, float]:
    """(f64[k] radians per position, factor of cosines and sines).

    Args:
      width: K, which must be even.
      theta: the base; pair i rotates by ``theta ** (-2 i / K)``.
      scaling: how a model was stretched to longer sequences, in the words of published configurations: "rope_type"
        ("default", "linear": Chen et al. 2023; "llama3": Grattafiori et al. 2024; "yarn": Peng et al. 2023) and its
        numbers.

    Raises:
      ModelError: an odd width, an unknown type, or a number that is missing.
    """
    if width % 2:
        raise ModelError(f"rotary positions rotate pairs, and a head is {width} wide; make it even.")
    frequency_k = theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    scaling = scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in SCALINGS:
        raise ModelError(f"rope_type is {kind!r}; it is one of {', '.join(map(repr, SCALINGS))}.")
    try:
        if kind == "linear":
            return frequency_k / scaling["factor"], 1.0
        if kind == "llama3":
            return _llama3(frequency_k, scaling), 1.0
        if kind == "yarn":
            return _yarn(frequency_k, width, theta, scaling)
    except KeyError as error:
        raise ModelError(f"rope_type {kind!r} needs the number {error.args[0]!r}.") from error
    return frequency_k, 1.0


def _llama3(frequency_k: np.ndarray, scaling: Mapping[str, Any]) -> np.ndarray:
    """Slow pairs are slowed down by the factor, quick ones stay, those between are mixed."""
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    rotations_k = scaling["original_max_position_embeddings"] * frequency_k / (2 * math.pi)  # in the original length
    quick_k = np.clip((rotations_k - low) / (high - low), 0.0, 1.0)
    return quick_k * frequency_k + (1 - quick_k) * frequency_k / scaling["factor"]


def _yarn(frequency_k: np.ndarray, width: int, theta: float, scaling: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """ "NTK by parts" and the temperature of the softmax (Peng et al. 2023, sections 3.2 and 3.4)."""
    factor, length = scaling["factor"], scaling["original_max_position_embeddings"]

    def pair(rotations: float) -> float:
        """The pair that rotates so often in the original length."""
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(float(scaling.get("beta_fast") or 32)), pair(float(scaling.get("beta_slow") or 1))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    slow_k = np.clip((np.arange(len(frequency_k)) - first) / max(last - first, 1e-3), 0.0, 1.0)
    temperature = scaling.get("attention_factor")
    if temperature is None:

        def heat(mscale: Any) -> float:
            return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

        both = scaling.get("mscale") and scaling.get("mscale_all_dim")
        temperature = heat(scaling["mscale"]) / heat(scaling["mscale_all_dim"]) if both else heat(1.0)
    return slow_k * frequency_k / factor + (1 - slow_k) * frequency_k, float(temperature)


def rotation(
    positions_BL: Int[Array, "B L"], width: int, theta: float, scaling: Mapping[str, Any] | None = None
) -> Float32[Array, "B L 2 k"]:
    """Cosines, then sines, of the angles at these positions, for ``rotate``; see ``frequencies`` for the arguments."""
    frequency_k, factor = frequencies(width, theta, scaling)
    angle_BLk = positions_BL[..., None].astype(jnp.float32) * jnp.asarray(frequency_k, jnp.float32)
    return factor * jnp.stack([jnp.cos(angle_BLk), jnp.sin(angle_BLk)], -2)


def rotate(x_BLHK: Float[Array, "B L H K"], rotation_BL2k: Float32[Array, "_ L 2 k"]) -> Float[Array, "B L H K"]:
    """Rotates pair i of each head, which is (i, i + k), by the angle of its position; computed in float32."""
    cos, sin = rotation_BL2k[:, :, None, 0], rotation_BL2k[:, :, None, 1]
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BLHK.dtype)
