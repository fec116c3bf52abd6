"""Grain's shuffle over arrays of positions: a permutation of each epoch, any place of which is reached at once.

``grain.MapDataset.range(n).shuffle(seed).repeat()`` computes one position per call, which takes longer than reading a
row of a table. This is the same permutation, number by number, for many positions at a time: a cycle-walking cipher
(Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains") of four Feistel rounds of Simon (Beaulieu et al. 2013).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

_ROUNDS = 4
_LEAST_BITS = 16  # of a block; shorter ones show patterns


def shuffled(positions: np.ndarray, n: int, seed: int) -> np.ndarray:
    """i64: which of n examples are at these positions, i64 of any shape, of the endless stream of a 32-bit seed."""
    first = int(positions.min()) // n
    if positions.max() < (first + 1) * n:  # as most batches are
        return _permuted(positions - first * n, n, (seed + first) % 2**32)
    epochs, within = np.divmod(positions, n)
    out = np.empty_like(within)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        out[chosen] = _permuted(within[chosen], n, (seed + int(epoch)) % 2**32)
    return out


def poisson(
    rng: np.random.Generator, n: int, rate: float, most: int, of_unit: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """i64[0 to most]: a Poisson sample of n, each of which is in it with probability ``rate`` by itself.

    Of a larger sample, ``most`` stay, each as likely (Chua et al. 2025, arXiv:2508.15089). With ``of_unit``, i64[...]
    for each of the n: one entry by chance of each that was drawn, instead of its number.
    """
    drawn = rng.choice(n, rng.binomial(n, rate), replace=False)[:most]  # in random order
    if of_unit is None:
        return drawn
    return np.array([rng.choice(of_unit[unit]) for unit in drawn], np.int64)


def _permuted(at: np.ndarray, n: int, seed: int) -> np.ndarray:
    if n <= 1 << _LEAST_BITS:
        return _epoch(n, seed)[at]
    bits = int(np.ceil(np.log2(n - 1)))
    half = (bits + bits % 2) // 2
    out = _encrypted(at, seed, half)
    outside = np.flatnonzero(out >= n)
    while outside.size:  # every fourth block, or more, is inside, so walks are short
        out[outside] = moved = _encrypted(out[outside], seed, half)
        outside = outside[moved >= n]
    return out.astype(np.int64)


@functools.lru_cache(maxsize=8)
def _epoch(n: int, seed: int) -> np.ndarray:
    """i64[n], the whole permutation of few examples: walks are long then, and all of them are taken at once."""
    if n == 1:
        return np.zeros(1, np.int64)
    block = np.arange(1 << _LEAST_BITS)
    after = _encrypted(block, seed, _LEAST_BITS // 2).astype(np.int64)
    end = np.where(block < n, block, after)
    while (end[after[:n]] >= n).any():
        end = end[end]  # twice as far along each walk, which stops inside
    return end[after[:n]]


def _encrypted(block: np.ndarray, seed: int, half: int) -> np.ndarray:
    """Numbers of twice ``half`` bits, each exchanged for another, in the smallest unsigned type of 4 or 8 bytes."""
    kind = np.uint32 if half <= 16 else np.uint64
    mask = kind((1 << half) - 1)

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        return (x << kind(by)) | (x >> kind(half - by))

    block = block.astype(kind)
    left, right = block >> kind(half) & mask, block & mask
    for key in _keys(seed):
        left ^= ((rotated(right, 1) & rotated(right, 8)) ^ rotated(right, 2) ^ kind(key)) & mask
        left, right = right, left
    return (left << kind(half)) | right


@functools.lru_cache(maxsize=64)
def _keys(seed: int) -> tuple[int, ...]:
    """A key of 32 bits for each round: C++'s ``std::seed_seq{seed}`` (ISO C++ [rand.util.seedseq]) for four numbers."""
    n, word = _ROUNDS, 0xFFFFFFFF
    v = [0x8B8B8B8B] * n
    for k in range(2 * n):
        here, next_1, next_2 = k % n, (k + 1) % n, (k + 2) % n
        first = k < n
        mixed = (v[here] ^ v[next_1] ^ v[here - 1]) if first else (v[here] + v[next_1] + v[here - 1]) & word
        mixed = (mixed ^ mixed >> 27) * (1664525 if first else 1566083941) & word
        if first:
            other = mixed + here + (1 if k == 0 else seed if k == 1 else 0) & word
            v[next_1], v[next_2], v[here] = v[next_1] + mixed & word, v[next_2] + other & word, other
        else:
            other = mixed - here & word
            v[next_1], v[next_2], v[here] = v[next_1] ^ mixed, v[next_2] ^ other, other
    return tuple(v)
