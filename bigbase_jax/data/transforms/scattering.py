"""Scattering features of pictures (Bruna & Mallat 2013; Oyallon & Mallat 2015): wavelets, modulus, wavelets, modulus,
average. Nothing of it is learned, so it costs no privacy (Tramèr & Boneh 2021).

The filters and the order of channels are those of ``kymatio.Scattering2D(J, shape, L)`` 0.3.0 (Andreux et al. 2020).

Axes: H, W of a picture, M, N of it with its border, J scales, L angles, h = H / 2^J, w = W / 2^J,
S = 1 + L J + L^2 J (J - 1) / 2 paths.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Example, UserError


@dataclasses.dataclass(frozen=True)
class Scattering:
    """``image`` uint8[H,W,C] becomes its scattering coefficients, [h,w,C S], of its values in 0..1.

    Attributes:
      scales: J, 1 to 4; the average is over about 2^J pixels.
      angles: L.
      dtype: of the result: "float32", or "float16", half of it where it is kept.

    Raises:
      UserError: a value out of range, or a picture whose sides 2^J does not divide.
    """

    scales: int = 2
    angles: int = 8
    dtype: str = "float16"

    random: ClassVar[bool] = False
    costly: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (1 <= self.scales <= 4 and 1 <= self.angles <= 32) or self.dtype not in ("float16", "float32"):
            raise UserError(
                f"Scattering has scales={self.scales}, angles={self.angles} and dtype={self.dtype!r}; give 1 to 4, 1 "
                "to 32, and 'float16' or 'float32'."
            )

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        given = {"boxes", "points", "segmentation"} & example.keys()
        if given:
            raise UserError(f"Scattering makes features of a picture, on which its {min(given)} have no place.")
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            found = _coefficients(example["image"], self.scales, self.angles)
        return {**example, "image": np.asarray(found).astype(self.dtype)}


class Filters(NamedTuple):
    """In Fourier space, at each resolution 2^-r that is needed: ``low[r]`` f32[M/2^r,N/2^r], and of each scale j
    ``wavelets[j][r]`` f32[L,M/2^r,N/2^r], r up to j."""

    low: tuple[np.ndarray, ...]
    wavelets: tuple[tuple[np.ndarray, ...], ...]


@functools.lru_cache(maxsize=8)
def filters(M: int, N: int, scales: int, angles: int) -> Filters:
    """A Gaussian, and Morlet wavelets of the angles at each scale."""
    wavelets = []
    for j in range(scales):
        morlets = []
        for k in range(angles):
            theta = (int(angles - angles / 2 - 1) - k) * np.pi / angles
            wave = functools.partial(_gabor, M, N, 0.8 * 2**j, theta, slant=4 / angles)
            gabor, envelope = wave(xi=0.75 * np.pi / 2**j), wave(xi=0.0)
            morlets.append(np.fft.fft2(gabor - gabor.sum() / envelope.sum() * envelope).real)  # of mean 0
        wavelets.append(tuple(np.stack([_folded(morlet, r) for morlet in morlets]) for r in range(j + 1)))
    low = np.fft.fft2(_gabor(M, N, 0.8 * 2 ** (scales - 1), 0.0, 0.0, 1.0)).real
    return Filters(tuple(_folded(low, r) for r in range(scales)), tuple(wavelets))


def _gabor(M: int, N: int, sigma: float, theta: float, xi: float, slant: float) -> np.ndarray:
    """complex128[M,N]: a wave of frequency ``xi`` along ``theta`` under an elliptic Gaussian, periodic."""
    cos, sin = np.cos(theta), np.sin(theta)
    y, x = np.arange(-2 * M, 3 * M)[:, None], np.arange(-2 * N, 3 * N)
    along, across = y * cos + x * sin, -y * sin + x * cos
    wave = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2) + 1j * xi * along)
    return wave.reshape(5, M, 5, N).sum((0, 2)) * slant / (2 * np.pi * sigma**2)


def _folded(filter_MN: np.ndarray, r: int) -> np.ndarray:
    """The filter at a resolution 2^-r: what is above its frequencies is left out, the rest folded."""
    (M, N), n = filter_MN.shape, 2**r
    kept = filter_MN.copy()
    for axis, size in ((0, M), (1, N)):
        start = int(size * 2 ** (-r - 1))
        cut = [slice(None), slice(None)]
        cut[axis] = slice(start, start + int(size * (1 - 2**-r)))
        kept[tuple(cut)] = 0
    return kept.reshape(n, M // n, n, N // n).sum((0, 2)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _coefficients(image_HWC: jax.Array, scales: int, angles: int) -> jax.Array:
    """f32[h,w,C S]."""
    x_CHW = jnp.moveaxis(image_HWC / jnp.float32(255), -1, 0)
    found_CShw = jax.vmap(functools.partial(scattering, scales=scales, angles=angles))(x_CHW)
    return jnp.moveaxis(found_CShw.reshape(-1, *found_CShw.shape[2:]), 0, -1)


def scattering(x_HW: jax.Array, scales: int = 2, angles: int = 8) -> jax.Array:
    """f32[S,h,w]: the average, those of the modulus of each wavelet, and of each coarser wavelet of these.

    Raises:
      UserError: 2^J does not divide the sides.
    """
    n = 2**scales
    H, W = x_HW.shape
    if H % n or W % n or min(H, W) <= n:
        raise UserError(f"a picture of {H}x{W} has no scattering at {scales} scales; resize it to multiples of {n}.")
    padded = jnp.pad(x_HW, n, mode="reflect")
    bank = filters(*padded.shape, scales, angles)

    def subsampled(x: jax.Array, by: int) -> jax.Array:
        """In Fourier space, every 2^by-th pixel."""
        *L, M, N = x.shape
        return x.reshape(*L, 2**by, M >> by, 2**by, N >> by).mean((-4, -2))

    def averaged(x: jax.Array, r: int) -> jax.Array:
        return jnp.fft.ifft2(subsampled(x * bank.low[r], scales - r)).real[..., 1:-1, 1:-1]

    def modulus(x: jax.Array, wavelets: np.ndarray, by: int) -> jax.Array:
        return jnp.fft.fft2(jnp.abs(jnp.fft.ifft2(subsampled(x[..., None, :, :] * wavelets, by))))

    x = jnp.fft.fft2(padded)
    first, second = [averaged(x, 0)[None]], []
    for j, levels in enumerate(bank.wavelets):
        u_L = modulus(x, levels[0], j)
        first.append(averaged(u_L, j))
        coarser = [averaged(modulus(u_L, bank.wavelets[k][j], k - j), k) for k in range(j + 1, scales)]
        if coarser:
            found = jnp.concatenate(coarser, 1)
            second.append(found.reshape(-1, *found.shape[2:]))
    return jnp.concatenate([*first, *second])
