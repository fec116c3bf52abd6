"""Windows of tokens for language modelling: whole documents packed into rows of one length, any row reached at once.

Axes: L length of a window, D documents, P pieces (parts of a document that do not fill a window).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from bigbase_jax.core import Example
from bigbase_jax.data.sources.splits import Split
from bigbase_jax.data.tokens import Tokens


class Windows(Split):
    """A ``Source`` of windows over the documents of a split: every token of every document is a target exactly once.

    A document as long as L or longer fills windows of its own, cut where they end; what then remains of it, and shorter
    documents whole, are packed together (best fit decreasing, Johnson 1974). Tokens of one piece never see another's.
    With a ``stride`` below L, windows of long documents overlap, and their tokens are targets several times.

    Attributes:
      packed: True, see ``data.pipeline.KeptSource``.
      in_memory: where the tokens are; examples are cut from them and kept nowhere else.
      fill: share of the positions that hold a token to predict.
    """

    packed = True

    def __init__(self, tokens: Tokens, split: str, length: int, stride: int | None = None):
        """
        Args:
          length: L.
          stride: tokens from one window of a long document to its next, 1 to L; None: L.
        """
        self._tokens, self._length, self._stride = tokens, length, stride or length
        self._first, last = tokens.spans(split)
        targets_D = last - self._first
        whole_D = np.where(targets_D >= length, (targets_D - length) // self._stride + 1, 0)
        self._whole = np.cumsum(whole_D)  # windows that documents 0 ... d fill
        done_D = np.where(whole_D > 0, (whole_D - 1) * self._stride + length, 0)
        left = np.flatnonzero(targets_D > done_D)
        starts_P, lengths_P = self._first[left] + done_D[left], (targets_D - done_D)[left]
        order, self._bins = packed(lengths_P, length)
        self._pieces = np.stack([starts_P[order], lengths_P[order]], 1)
        full = int(self._whole[-1] if len(self._whole) else 0)
        super().__init__(split, full + len(self._bins) - 1, self._window, tokens.kept)
        self.fill = (full * length + int(lengths_P.sum())) / max(len(self) * length, 1)

    def _window(self, index: int) -> Example:
        """``inputs``, ``targets``, ``segment_ids``, ``positions``, ``bytes``: i32[L] each.

        ``segment_ids`` number the pieces from 1, 0 is padding; ``positions`` count from 0 in each piece; ``bytes`` are
        those of text that the target stands for.
        """
        full = int(self._whole[-1] if len(self._whole) else 0)
        if index < full:
            d = int(np.searchsorted(self._whole, index, side="right"))
            nth = index - (int(self._whole[d - 1]) if d else 0)
            pieces = [(int(self._first[d]) + nth * self._stride, self._length)]
        else:
            nth = index - full
            pieces = self._pieces[self._bins[nth] : self._bins[nth + 1]].tolist()
        return window([self._piece(start, start + n) for start, n in pieces], self._length)

    def _piece(self, start: int, stop: int) -> dict[str, np.ndarray]:
        tokens = self._tokens
        inputs, targets = tokens.tokens[start:stop], tokens.tokens[start + 1 : stop + 1]
        return {"inputs": inputs, "targets": targets, "bytes": tokens.bytes_of(start + 1, stop + 1)}


def window(pieces: Sequence[Mapping[str, np.ndarray]], length: int) -> Example:
    """An example of pieces, one after the other, [T] each of ``inputs``, ``targets``, ``bytes`` and what else they
    have; with ``segment_ids`` and ``positions`` (see ``Windows``), i32[L] each. What does not fit is cut."""
    names = dict.fromkeys(("inputs", "targets", "segment_ids", "positions", *pieces[0]))
    example = {name: np.zeros(length, np.int32) for name in names}
    at = 0
    for segment, piece in enumerate(pieces, 1):
        n = min(len(piece["inputs"]), length - at)
        here = slice(at, at + n)
        example["segment_ids"][here], example["positions"][here] = segment, np.arange(n)
        for name, values in piece.items():
            example[name][here] = values[:n]
        at += n
    return example


def places_of(count_D: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(which of D things, the how-maniest part of it, from 0) i64[P] each, of things that are cut into so many."""
    which_P = np.repeat(np.arange(len(count_D)), count_D)
    return which_P, np.arange(len(which_P)) - (np.cumsum(count_D) - count_D)[which_P]


def packed(lengths_P: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """(pieces in the order of their bins, where in it each bin begins, and the end); see ``pack``."""
    bin_P = pack(lengths_P, capacity)
    order = np.argsort(bin_P, kind="stable")
    return order, np.searchsorted(bin_P[order], np.arange(bin_P.max(initial=-1) + 2))


def pack(lengths_P: np.ndarray, capacity: int) -> np.ndarray:
    """The bin of each piece, i64[P], with bins of one capacity: the longest first, each where it leaves the least room.

    Bins are numbered from 0. Time grows as P log P.
    """
    bin_P = np.zeros(len(lengths_P), np.int64)
    bins_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room they have left
    rooms = 0  # bit r is set where a bin has room r
    count = 0
    order = np.argsort(-lengths_P, kind="stable")
    for piece, n in zip(order.tolist(), lengths_P[order].tolist(), strict=True):
        fitting = rooms >> n
        if fitting:
            room = n + (fitting & -fitting).bit_length() - 1
            chosen = bins_with[room].pop()
            if not bins_with[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen = capacity, count
            count += 1
        bin_P[piece] = chosen
        if room > n:
            bins_with[room - n].append(chosen)
            rooms |= 1 << (room - n)
    return bin_P
