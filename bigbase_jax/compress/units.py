"""Which axes of which parameters belong together: what structured pruning can take out of each family of models.

A ``Row`` says of all parameters whose path fits that the units of a group lie along one of their axes. What is cut from
one is cut from all rows of the group, so that channels go with the norms, the residual branches and the dense layers
that share them. To add a family, write the function that lists its rows, and its line in ``FAMILIES``.

Units of one kind are as many in every layer, so that what is left is a model of the same class; which ones stay is each
layer's own.

Axes: N units, P places that each of them has on the axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.resnet import LAYOUTS, CifarResNet, ResNet
from bigbase_jax.models.transformer import Transformer

LAYERS = "layers"
"""The kind of units that are cut from stacked blocks (``stack_blocks``), after all others."""


class Row(NamedTuple):
    """Where units of a group lie.

    Attributes:
      group: its name, or what makes it of the path (``re.Match.expand``); the first word is the kind of units.
      pattern: a regex that the whole path of a parameter or statistic fits, such as ``encoder.block_0.mlp.up.kernel``.
      axis: of it.
      places: i64[N,P].
      keep: how many units stay.
      reads: these parameters read the units, and the group's others make them. Where all that reads a unit is zero, it
        can go.
      chunks: as many units stay in each of so many equal parts.
    """

    group: str
    pattern: str
    axis: int
    places: np.ndarray
    keep: int
    reads: bool = False
    chunks: int = 1


Shapes = Mapping[str, tuple[int, ...]]
Less = Callable[[str, int], int]
"""``less(kind, N)`` -> how many of N units stay; N where the command says nothing of the kind."""
Cut = tuple[list[Row], dict[str, Any]]
"""The rows of a model, and the arguments of the smaller one."""


def units(count: int, places: int = 1, first: int = 0) -> np.ndarray:
    """Units one after the other, each of so many places."""
    return first + np.arange(count * places).reshape(count, places)


_Stream = list[tuple[str, np.ndarray, int]]
"""The channels of a sum: (group, places, chunks) of each part."""


def transformer(model: Any, shapes: Shapes, less: Less) -> Cut:
    """Heads, hidden units of feed-forward layers, and whole blocks."""
    size, style = getattr(model, "size", model), model.style
    width, heads, depth = size.width, size.heads, size.depth
    kv_heads, head_dim = style.sizes(width, heads)
    shared = heads // kv_heads
    M = model.mlp_dim or 4 * width
    keep_mlp = less("mlp", M)
    rows = [
        Row(r"mlp \1", r"(.+\.mlp)\.(?:up|gate)\.\w+", -1, units(M), keep_mlp),
        Row(r"mlp \1", r"(.+\.mlp)\.down\.kernel", 0, units(M), keep_mlp, reads=True),
    ]
    # Of grouped queries, whole groups go, or of each group as many queries: what comes closer to the share.
    wanted = less("heads", heads) / heads
    most = [n - (wanted < 1 and n > 1) for n in (kv_heads, shared)]
    kept_groups, kept_shared = (
        min(max(round(wanted * n), 1), limit) for n, limit in zip((kv_heads, shared), most, strict=True)
    )
    whole = shared == 1 or (kv_heads > 1 and abs(kept_groups / kv_heads - wanted) <= abs(kept_shared / shared - wanted))
    own = {r"heads \1": r"(.+\.(?:cross_)?attention)"}
    if getattr(model, "positions", "") == "relative":  # whose tables all blocks of a stack share
        own = {r"heads \1": r"(encoder|decoder)\.block_\d+\.attention", r"heads \1 cross": r"(.+)\.cross_attention"}
        own |= {"heads encoder": "source_distance", "heads decoder": "target_distance"}
    for group, path in own.items():
        if whole:
            queries, keep, chunks = units(kv_heads, shared), kept_groups, 1
        else:
            queries, keep, chunks = units(heads), kv_heads * kept_shared, kv_heads
        if path.endswith("distance"):
            rows.append(Row(group, path, -1, queries, keep, chunks=chunks))
            continue
        rows.append(Row(group, rf"{path}\.query\.\w+", -2, queries, keep, chunks=chunks))
        rows.append(Row(group, rf"{path}\.out\.kernel", 0, queries, keep, reads=True, chunks=chunks))
        if whole:
            rows.append(Row(group, rf"{path}\.(?:key|value)\.\w+", -2, units(kv_heads), keep))
    groups, queries_each = (kept_groups, shared) if whole else (kv_heads, kept_shared)
    new = {"heads": groups * queries_each, "mlp_dim": keep_mlp}
    style = dataclasses.replace(style, head_dim=head_dim, kv_heads=None if queries_each == 1 else groups)
    depths = {"encoder": depth}
    if isinstance(model, EncoderDecoder):
        depths["decoder"] = model.decoder_depth or depth
    for stack, blocks in depths.items():
        keep = less(LAYERS, blocks)
        new["depth" if stack == "encoder" else "decoder_depth"] = keep
        writes = r"(?:.+\.)?(?:out|down)\.\w+"
        rows.append(Row(f"{LAYERS} {stack}", rf"{stack}\.blocks\.(?!{writes}$).+", 0, units(blocks), keep))
        rows.append(Row(f"{LAYERS} {stack}", rf"{stack}\.blocks\.{writes}", 0, units(blocks), keep, reads=True))
    return rows, {**new, "style": style}


def convnet(model: Any, shapes: Shapes, less: Less) -> Cut:
    """Channels of each convolution, and the dense layer's units."""
    depths = model.depths or (1,) * len(model.stages)
    convolutions = [(i, j) for i, depth in enumerate(depths) for j in range(depth)]
    after = [rf"stage_{i}\.conv_{j}\.kernel" for i, j in convolutions[1:]]
    last = "dense" if model.dense else "head"
    rows, dense = [], less("dense", model.dense) if model.dense else 0
    for (i, j), reader in zip(convolutions, [*after, rf"{last}\.kernel"], strict=True):
        C = model.stages[i]
        own, group = (units(C), less("channels", C)), f"channels stage_{i}.conv_{j}"
        rows.append(Row(group, rf"stage_{i}\.(?:conv|bn)_{j}\.\w+", -1, *own))
        if reader.startswith("stage"):
            rows.append(Row(group, reader, -2, *own, reads=True))
        else:  # of a flattened map, the channels are the last of its axes
            places = np.arange(shapes[f"{last}.kernel"][0]).reshape(-1, C).T
            rows.append(Row(group, reader, 0, places, own[1], reads=True))
    if model.dense:
        rows.append(Row("dense", r"dense\.\w+", -1, units(model.dense), dense))
        rows.append(Row("dense", r"head\.kernel", 0, units(model.dense), dense, reads=True))
    return rows, {"stages": tuple(less("channels", C) for C in model.stages), "dense": dense}


def resnet(model: Any, shapes: Shapes, less: Less) -> Cut:
    """Channels: a block has those between its convolutions for itself, and those of sums are a whole stage's."""
    counts: Any
    if isinstance(model, ResNet):
        (bottleneck, counts), head = LAYOUTS[model.depth], "fc"
    else:
        bottleneck, counts, head = False, [(model.depth - 2) // 6] * 3, "linear"
    padded = getattr(model, "shortcut", "conv") == "pad"
    width = model.width
    kept = less("channels", width)
    rows: list[Row] = []

    def add(stream: _Stream, pattern: str, axis: int, reads: bool = False) -> None:
        for group, places, chunks in stream:
            rows.append(Row(group, pattern, axis, places, len(places) * kept // width, reads, chunks))

    def own(name: str, channels: int) -> _Stream:
        return [(f"channels {name}", units(channels), 1)]

    stream = own("layer1" if not bottleneck else "stem", width)
    add(stream, r"(?:conv1|bn1)\.\w+", -1)
    for stage, count in enumerate(counts):
        inner, last = width * 2**stage, 3 if bottleneck else 2
        out = 4 * inner if bottleneck else inner
        before, stream = stream, own(f"layer{stage + 1}", out)
        if padded and stage:  # the narrower sum is padded to this one's middle; what is around it is free
            side = (out - out // 2) // 2
            around = np.delete(np.arange(out), np.arange(side, side + out // 2))[:, None]
            stream = [(group, places + side, chunks) for group, places, chunks in before]
            stream.append((f"channels layer{stage + 1}", around, 2))
        for i in range(count):
            block = rf"layer{stage + 1}_{i}"
            add(stream if i else before, rf"{block}\.(?:conv1|downsample_0)\.kernel", -2, reads=True)
            add(stream, rf"{block}\.(?:downsample_[01]|conv{last}|bn{last})\.\w+", -1)
            for j in range(1, last):
                between = own(f"{block}.conv{j}", inner)
                add(between, rf"{block}\.(?:conv|bn){j}\.\w+", -1)
                add(between, rf"{block}\.conv{j + 1}\.kernel", -2, reads=True)
    add(stream, rf"{head}\.kernel", 0, reads=True)
    return rows, {"width": kept}


def mlp(model: Any, shapes: Shapes, less: Less) -> Cut:
    """Units of the hidden layers."""
    rows = []
    readers = [f"dense_{i}" for i in range(1, len(model.hidden))] + ["head"]
    for i, (count, reader) in enumerate(zip(model.hidden, readers, strict=True)):
        own = units(count), less("dense", count)
        rows.append(Row(f"dense {i}", rf"dense_{i}\.\w+", -1, *own))
        rows.append(Row(f"dense {i}", rf"{reader}\.kernel", 0, *own, reads=True))
    return rows, {"hidden": tuple(less("dense", count) for count in model.hidden)}


FAMILIES: Mapping[Any, tuple[tuple[str, ...], Callable[[Any, Shapes, Less], Cut]]] = {
    Transformer: (("heads", "mlp", LAYERS), transformer),
    ConvNet: (("channels", "dense"), convnet),
    ResNet: (("channels",), resnet),
    CifarResNet: (("channels",), resnet),
    MLP: (("dense",), mlp),
}
"""Classes of models -> the kinds of their units, and what lists the rows."""


def rows_of(model: Any, shapes: Shapes, shares: Mapping[str, float]) -> Cut:
    """The rows of what ``shares`` takes away, a share by kind, and the arguments of the model that is left.

    Raises:
      UserError: a model without such units, or a share that takes away none of them or all.
    """
    name = type(model).__name__
    kinds, rows = next((found for base, found in FAMILIES.items() if isinstance(model, base)), ((), None))
    if rows is None:
        raise UserError(f"--prune knows no units of the model {name}; zeros fit any model, as --prune=0.8.")
    if other := [kind for kind in shares if kind not in kinds]:
        raise UserError(f"--prune={other[0]}: the model {name} has none; it has {', '.join(kinds)}.")

    def less(kind: str, count: int) -> int:
        share = shares.get(kind, 0.0)
        keep = count - round(share * count)
        if share and not 0 < keep < count:
            takes = "all" if keep < 1 else "none"
            raise UserError(
                f"--prune={kind}={share:g} takes away {takes} of {count} units; give a share from {1 / count:.2g} to"
                f" {(count - 1) / count:.2g}."
                if count > 1
                else f"--prune={kind}={share:g}: there is one unit in a layer, which stays."
            )
        return keep

    found, new = rows(model, shapes, less)
    return [row for row in found if row.group.partition(" ")[0] in shares], new
