"""Tables between published weights and ours: their name, our path, the arrangement of axes; read in both directions.

A family of models has one table. What it says of one tensor:

    Entry("h.3.attn.c_proj.weight", "encoder.block_3.attention.out.kernel", "(h k) d -> h k d")

Arrangements are written as einops writes them: the letters of one side are those of the other, and brackets hold axes
that are one. They only split, permute and join axes, so that each has an inverse, and on numpy arrays the way from
theirs to ours makes views: of a file that is mapped into memory, nothing is read before a slice of it is.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

Sizes = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of theirs, and where it is among ours.

    Attributes:
      theirs: its name.
      ours: the path of ours in the unrolled form of a model (``encoder.block_0``, not ``encoder.blocks``); or several
        paths, where theirs holds several of ours: the arrangement then ends in a first axis that counts them.
      arrange: how theirs becomes ours, ``"(h k) d -> d h k"``; "": as it is. Or a pair of functions, from theirs to
        ours and back, for what is no arrangement; the first gives a small array.
      collection: of ours: "params" or "batch_stats".
      also: other names under which the same tensor may be stored: as well as ``theirs`` (a tied head), or in its place.
    """

    theirs: str
    ours: str | tuple[str, ...]
    arrange: str | tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]] = ""
    collection: str = "params"
    also: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Of ours, with the collection: ``params.encoder.norm.scale``."""
        ours = (self.ours,) if isinstance(self.ours, str) else self.ours
        return tuple(f"{self.collection}.{path}" for path in ours)

    def read(self, x: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
        """Theirs -> each of ours, as views; raises ValueError if the shape does not fit."""
        found = self.arrange[0](x) if isinstance(self.arrange, tuple) else rearrange(x, self.arrange, sizes)
        if isinstance(self.ours, str):
            return [found]
        if len(found) != len(self.ours):
            raise ValueError(f"it holds {len(found)} arrays, not {len(self.ours)}")
        return list(found)

    def write(self, ours: list[np.ndarray], sizes: Sizes) -> np.ndarray:
        """The inverse of ``read``."""
        x = ours[0] if isinstance(self.ours, str) else np.stack(ours)
        return self.arrange[1](x) if isinstance(self.arrange, tuple) else rearrange(x, _inverse(self.arrange), sizes)


@dataclasses.dataclass(frozen=True)
class Table:
    """All of a model's tensors.

    Attributes:
      entries: see ``Entry``; names are those that the class with a head has.
      sizes: of the letters in arrangements that shapes alone do not tell (heads).
      prefix: of most names, which the same model without its head is saved without ("transformer.", "vit.").
      ignored: regexes of names that hold no weights (masks, counters), and need not be there; searched for.
      unread: regexes of names of weights that our model has no use for (a pooler); they are said.
      constants: what they store beside weights, to be written: a position table that our model computes.
    """

    entries: list[Entry]
    sizes: Sizes = dataclasses.field(default_factory=dict)
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    constants: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def repeat(count: int, entries: Iterable[Entry], letter: str = "i", start: int = 0) -> list[Entry]:
    """The entries once for each of ``count`` layers, with the layer's number for ``{i}`` and the next for ``{i+1}``."""
    entries = list(entries)

    def at(text: str, i: int) -> str:
        return text.replace(f"{{{letter}}}", str(i)).replace(f"{{{letter}+1}}", str(i + 1))

    found = []
    for i in range(start, start + count):
        for entry in entries:
            ours = at(entry.ours, i) if isinstance(entry.ours, str) else tuple(at(path, i) for path in entry.ours)
            also = tuple(at(name, i) for name in entry.also)
            found.append(dataclasses.replace(entry, theirs=at(entry.theirs, i), ours=ours, also=also))
    return found


# ----------------------------------------------------------------------------------------------- what tables often hold


def dense(theirs: str, ours: str, bias: bool = True, arrange: str = "o i -> i o", of_bias: str = "") -> list[Entry]:
    """A linear layer of torch, ``weight [out, in]``."""
    kernel = Entry(f"{theirs}.weight", f"{ours}.kernel", arrange)
    return [kernel, Entry(f"{theirs}.bias", f"{ours}.bias", of_bias)] if bias else [kernel]


def heads(theirs: str, ours: str, bias: bool = True, letter: str = "h") -> list[Entry]:
    """A linear layer of torch whose output is heads: query, key or value; ``letter`` counts them."""
    return dense(theirs, ours, bias, f"({letter} k) d -> d {letter} k", f"({letter} k) -> {letter} k")


def joined(theirs: str, ours: str, bias: bool = True, letter: str = "h") -> list[Entry]:
    """A linear layer of torch whose input is heads: the output of an attention."""
    return dense(theirs, ours, bias, f"d ({letter} k) -> {letter} k d")


def attention(
    theirs: str,
    ours: str,
    names: str = "q_proj k_proj v_proj out_proj",
    bias: bool = True,
    key_bias: bool = True,
    letter: str = "h",
) -> list[Entry]:
    """Four linear layers of torch: query, key, value and output, by these names."""
    *inner, out = names.split()
    biases = {"query": bias, "key": bias and key_bias, "value": bias}
    layers = zip(inner, biases.items(), strict=True)
    found = [entry for a, (b, has) in layers for entry in heads(f"{theirs}.{a}", f"{ours}.{b}", has, letter)]
    return found + joined(f"{theirs}.{out}", f"{ours}.out", bias, letter)


def fairseq_block(theirs: str, ours: str, cross: bool = False, letter: str = "h", key_bias: bool = True) -> list[Entry]:
    """A block whose layers are called as fairseq's; ``cross``: of a decoder."""
    found = attention(f"{theirs}.self_attn", f"{ours}.attention", key_bias=key_bias, letter=letter)
    found += norm(f"{theirs}.self_attn_layer_norm", f"{ours}.norm1")
    if cross:
        found += attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention", key_bias=key_bias, letter=letter)
        found += norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}.norm_cross")
    return found + feed_forward(theirs, ours) + norm(f"{theirs}.final_layer_norm", f"{ours}.norm2")


def feed_forward(theirs: str, ours: str) -> list[Entry]:
    """The hidden layer of a block whose layers are called as fairseq's."""
    return [*dense(f"{theirs}.fc1", f"{ours}.mlp.up"), *dense(f"{theirs}.fc2", f"{ours}.mlp.down")]


def norm(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    """A LayerNorm, or without bias an RMSNorm."""
    scale = Entry(f"{theirs}.weight", f"{ours}.scale")
    return [scale, Entry(f"{theirs}.bias", f"{ours}.bias")] if bias else [scale]


def conv(theirs: str, ours: str, bias: bool = False) -> list[Entry]:
    """A convolution of torch over pictures, ``weight [out, in, height, width]``."""
    return dense(theirs, ours, bias, "o i y x -> y x i o")


def batch_norm(theirs: str, ours: str) -> list[Entry]:
    """A BatchNorm with its running statistics."""
    statistics = {"running_mean": "mean", "running_var": "var"}
    return [
        *norm(theirs, ours),
        *(Entry(f"{theirs}.{a}", f"{ours}.{b}", collection="batch_stats") for a, b in statistics.items()),
    ]


# ----------------------------------------------------------------------------------------------------------- arranging


def rearrange(x: np.ndarray, arrange: str, sizes: Sizes) -> np.ndarray:
    """``x`` with its axes arranged as ``"(h k) d -> d h k"`` says; "": as it is.

    Args:
      sizes: of letters, where the shape does not tell them.

    Raises:
      ValueError: the shape does not fit.
    """
    if not arrange:
        return x
    left, right = _sides(arrange)
    if x.ndim != len(left):
        raise ValueError(f"it has {x.ndim} axes, not the {len(left)} of {arrange!r}")
    known: dict[str, int] = {}
    for letters, size in zip(left, x.shape, strict=True):
        free = [letter for letter in letters if letter not in sizes] if len(letters) > 1 else letters
        rest = math.prod(sizes[letter] for letter in letters if letter not in free)
        if len(free) > 1:
            raise ValueError(f"the sizes of {' and '.join(free)} in {arrange!r} are not known")
        if size % rest or (not free and size != rest):
            raise ValueError(f"an axis of {size} is not the ({' '.join(letters)}) of {arrange!r}")
        known.update({letter: sizes[letter] for letter in letters if letter not in free})
        known.update(dict.fromkeys(free, size // rest))
    order = {letter: axis for axis, letter in enumerate(letter for letters in left for letter in letters)}
    inner = x.reshape([known[letter] for letter in order])
    inner = inner.transpose([order[letter] for letters in right for letter in letters])
    return inner.reshape([math.prod(known[letter] for letter in letters) for letters in right])


@functools.cache
def _sides(arrange: str) -> tuple[list[list[str]], list[list[str]]]:
    """The axes of both sides, each the letters that it holds: ``"(h k) d"`` -> ``[["h", "k"], ["d"]]``; ``()``: one of
    size 1."""
    left, right = (
        [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\S+", side)] for side in arrange.split("->")
    )
    if sorted(letter for group in left for letter in group) != sorted(letter for group in right for letter in group):
        raise ValueError(f"{arrange!r} has other letters left than right")
    return left, right


def _inverse(arrange: str) -> str:
    left, _, right = arrange.partition("->")
    return f"{right.strip()} -> {left.strip()}" if arrange else ""


def path_of_layer(path: str, layer: int) -> str:
    """The unrolled form of a stack's path: ``encoder.blocks.norm1.scale`` -> ``encoder.block_3.norm1.scale``."""
    return re.sub(r"(^|\.)blocks\.", rf"\g<1>block_{layer}.", path)


def is_stack(path: str) -> bool:
    """Whether the path is of a stack of layers, whose leaves have a leading axis that counts them."""
    return path_of_layer(path, 0) != path


def unrolled(shapes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of each leaf (arrays or shapes), stacks as their layers."""
    found: dict[str, tuple[int, ...]] = {}
    for path, leaf in shapes.items():
        shape = tuple(np.shape(leaf))
        if is_stack(path):
            found.update({path_of_layer(path, i): shape[1:] for i in range(shape[0])})
        else:
            found[path] = shape
    return found
