"""Reading compiled programs: what the text of an HLO module says of its work, its memory traffic and its collectives.

The compiler's own analysis counts the body of a loop once and nothing of what crosses devices. Here a loop counts as
often as it runs, and every collective is listed with its group. Figures are per device: the text is that of one
device's program.

Reference of the text format: https://openxla.org/xla/operation_semantics.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_FREE = {  # no memory is touched, or it is counted where the work is done
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("add-dependency", "opt-barrier", "optimization-barrier", "domain", "iota"),
}
_ELEMENTWISE = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "remainder", "negate", "abs", "sign", "floor"),
    *("ceil", "compare", "select", "clamp", "convert", "and", "or", "xor", "not", "is-finite", "round-nearest-afz"),
    *("round-nearest-even", "shift-left", "shift-right-logical", "shift-right-arithmetic", "popcnt", "clz"),
}
_SLICES = ("dynamic-slice", "slice", "gather")


class Leaf(NamedTuple):
    """One array of an instruction's result.

    Attributes:
      dtype: as HLO writes it: "f32", "bf16", "s32", "pred".
      shape: its dimensions.
      space: memory space; 0 is the device's main memory, others are its scratch memories.
    """

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> float:
        """Bytes, without what a layout pads."""
        return self.size * bits(self.dtype) / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique in its computation.
      opcode: such as "dot" or "all-reduce-start".
      leaves: the arrays of its result, tuples flattened.
      operands: names of its operands; for constants and parameters the text between the parentheses.
      attributes: what comes after the operands.
      root: it is what the computation returns.
    """

    name: str
    opcode: str
    leaves: tuple[Leaf, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, *keys: str) -> list[str]:
        """Names of the computations under these attributes."""
        found: list[str] = []
        for key in keys:
            for group in re.findall(rf"\b{key}=(\{{[^}}]*\}}|%?[^\s,]+)", self.attributes):
                found += [name.strip().lstrip("%") for name in group.strip("{}").split(",")]
        return found

    @property
    def channel(self) -> str:
        """Number of a collective; not always its own."""
        found = re.search(r"channel_id=(\d+)", self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, in order."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(i for i in self.instructions.values() if i.root)

    def parameter(self, number: int) -> Instruction | None:
        """Its parameter of that number."""
        wanted = ("parameter", (str(number),))
        return next((i for i in self.instructions.values() if (i.opcode, i.operands) == wanted), None)

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read ``name``."""
        return [i for i in self.instructions.values() if name in i.operands]


class Collective(NamedTuple):
    """One collective operation and how often a step runs it.

    Attributes:
      kind: one of ``COLLECTIVES``.
      group: a group of devices (numbers in the order of the mesh) that talk to each other; all groups are alike.
      nbytes: bytes of the whole array: of the input of an all-reduce, reduce-scatter or all-to-all, of the output of
        an all-gather, of what a permute sends.
      times: runs per step.
      chain: the TPU compiler may spread one collective over several fusions, each of which then names it; those of
        one chain count once.
    """

    kind: str
    group: tuple[int, ...]
    nbytes: float
    times: float
    chain: str = ""

    @property
    def moved(self) -> float:
        """Bytes that each device sends per step, by the ring algorithms (Thakur et al. 2005): of n devices and B bytes
        2 B (n - 1) / n in an all-reduce, B (n - 1) / n in an all-gather, a reduce-scatter and an all-to-all, and B in a
        permute."""
        n = len(self.group)
        if n < 2:
            return 0.0
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0, "collective-broadcast": 1.0}
        return self.times * self.nbytes * share.get(self.kind, (n - 1) / n)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one step does on one device.

    Attributes:
      matmul_flops: of dots and convolutions, two per multiply-add, by the type of their operands.
      other_flops: one per element of every other arithmetic operation but exponentials, roots and the like.
      memory_bytes: read from and written to main memory by the program's operations, each fusion being one.
      collectives: what crosses devices.
      unknown_loops: loops whose number of turns the text does not tell; they count once.

    Custom calls (hand-written kernels) count with the memory of their operands and results only.
    """

    matmul_flops: Mapping[str, float] = dataclasses.field(default_factory=dict)
    other_flops: float = 0.0
    memory_bytes: float = 0.0
    collectives: tuple[Collective, ...] = ()
    unknown_loops: int = 0

    @property
    def flops(self) -> float:
        """All floating-point operations that are counted."""
        return sum(self.matmul_flops.values()) + self.other_flops

    def collective_bytes(self) -> dict[str, float]:
        """Bytes that a device sends per step, by kind of collective (see ``Collective.moved``)."""
        total: dict[str, float] = dict.fromkeys(COLLECTIVES, 0.0)
        for collective in self.collectives:
            total[collective.kind] += collective.moved
        return {kind: nbytes for kind, nbytes in total.items() if nbytes}

    def __add__(self, other: Work) -> Work:
        matmul = collections.Counter(self.matmul_flops)
        for dtype, flops in other.matmul_flops.items():
            matmul[dtype] += flops  # type: ignore[assignment]  # Counter counts fractions as well
        return Work(
            dict(matmul),
            self.other_flops + other.other_flops,
            self.memory_bytes + other.memory_bytes,
            self.collectives + other.collectives,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, factor: float) -> Work:
        """This work, ``factor`` times."""
        return Work(
            {dtype: factor * flops for dtype, flops in self.matmul_flops.items()},
            factor * self.other_flops,
            factor * self.memory_bytes,
            tuple(c._replace(times=factor * c.times) for c in self.collectives),
            self.unknown_loops,
        )


class Module:
    """The text of an HLO module, parsed.

    Args:
      text: of ``compiled.as_text()``, or of ``lowered.compiler_ir("hlo").as_hlo_text()``.

    Attributes:
      computations: by name.
      entry: name of the one that runs.
      devices: over how many the program is partitioned or replicated.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        header = text.partition("\n")[0]
        counts = [re.search(rf"\b{key}=(\d+)", header) for key in ("num_partitions", "replica_count")]
        self.devices = math.prod(int(found[1]) for found in counts if found)
        name, instructions = "", dict[str, Instruction]()
        for line in text.splitlines():
            line = line.strip()
            if line.endswith("{") and " = " not in line and not line.startswith("HloModule"):
                found = re.match(r"(ENTRY )?%?([^\s(]+)", line)
                assert found is not None
                name, instructions = found[2], {}
                if found[1]:
                    self.entry = name
            elif line == "}" and name:
                self.computations[name] = Computation(name, instructions)
                name = ""
            elif name and " = " in line:
                instruction = _instruction(line)
                instructions[instruction.name] = instruction

    def work(self, loops: bool = True) -> Work:
        """The work of one step; with ``loops=False`` the body of a loop counts once, as in the compiler's analysis."""

        @functools.cache
        def of(name: str) -> Work:
            total = Work()
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                total += own(computation, instruction)
            return total

        def own(computation: Computation, i: Instruction) -> Work:
            if i.opcode == "while":
                turns = self.trip_count(computation, i) if loops else 1
                body = of(i.called("body")[0]) + of(i.called("condition")[0])
                return body.times(turns if turns is not None else 1) + Work(unknown_loops=int(turns is None))
            if i.opcode == "conditional":
                branches = i.called("branch_computations", "true_computation", "false_computation")
                return max((of(name) for name in branches), key=lambda work: (work.flops, work.memory_bytes))
            if i.opcode in ("call", "async-start"):
                return sum((of(name) for name in i.called("to_apply", "calls")), Work())
            if i.opcode == "fusion":
                inside = of(i.called("calls")[0])
                return dataclasses.replace(inside, memory_bytes=self._fusion_bytes(computation, i))
            collective = self._collective(computation, i)
            return Work(
                _matmul_flops(computation, i),
                _other_flops(computation, i),
                _bytes(computation, i),
                (collective,) if collective else (),
            )

        found = of(self.entry)
        chains = {(c.kind, c.chain): c for c in found.collectives if c.chain}
        return dataclasses.replace(
            found, collectives=(*(c for c in found.collectives if not c.chain), *chains.values())
        )

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop turns: as the compiler noted it, or from a condition that compares two integers, of which
        the text tells how they start and by how much a turn moves them (as in ``lax.scan`` and ``lax.fori_loop``)."""
        noted = re.search(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)', loop.attributes)
        if noted:
            return int(noted[1])
        condition, body = (self.computations[loop.called(key)[0]] for key in ("condition", "body"))
        first = self._elements(computation, computation.instructions.get(loop.operands[0]), ())
        second = self._elements(body, body.root, (first,))
        gaps = [self._gap(condition, condition.root, (state,)) for state in (first, second)]
        if gaps[0] is None or gaps[1] is None:
            return None
        left, step = gaps[0], gaps[0] - gaps[1]
        return max(math.ceil(left / step), 0) if step > 0 else None

    def _gap(self, computation: Computation, test: Instruction, arguments: Sequence[Any]) -> int | None:
        """How far the smaller side of ``a < b`` or ``b > a`` is from the other."""
        if test.opcode == "fusion":
            values = [self._integer(computation, name, arguments) for name in test.operands]
            inner = self.computations[test.called("calls")[0]]
            return self._gap(inner, inner.root, values)
        if test.opcode != "compare":
            return None
        a, b = (self._integer(computation, name, arguments) for name in test.operands)
        direction = re.search(r"direction=(LT|GT|LE|GE|NE)", test.attributes)
        if a is None or b is None or direction is None:
            return None
        return {"LT": b - a, "GT": a - b, "LE": b - a + 1, "GE": a - b + 1, "NE": abs(b - a)}[direction[1]]

    def _elements(
        self, computation: Computation, i: Instruction | None, arguments: Sequence[Any]
    ) -> list[int | None] | None:
        """The integers among the elements of a tuple."""
        if i is None or i.opcode != "tuple":
            return None
        return [self._integer(computation, name, arguments) for name in i.operands]

    def _integer(self, computation: Computation, name: str, arguments: Sequence[Any]) -> int | None:
        """The value of an integer scalar, as far as it follows from constants and from the computation's arguments: an
        integer, or a list of them for a tuple; None for what is not known."""
        i = computation.instructions.get(name)
        if i is None or len(i.leaves) != 1 or i.leaves[0].shape or i.leaves[0].dtype[0] not in "su":
            return None
        if i.opcode == "constant":
            return int(i.operands[0]) if re.fullmatch(r"-?\d+", i.operands[0]) else None
        if i.opcode == "parameter":
            value = arguments[int(i.operands[0])] if int(i.operands[0]) < len(arguments) else None
            return value if isinstance(value, int) else None
        if i.opcode == "get-tuple-element":
            number = re.search(r"\bindex=(\d+)", i.attributes)
            source = computation.instructions[i.operands[0]]
            if number and source.opcode == "tuple":
                return self._integer(computation, source.operands[int(number[1])], arguments)
            if number and source.opcode == "parameter" and int(source.operands[0]) < len(arguments):
                elements = arguments[int(source.operands[0])]
                return elements[int(number[1])] if isinstance(elements, list) else None
            return None
        if i.opcode in ("copy", "convert", "bitcast", "reshape"):
            return self._integer(computation, i.operands[0], arguments)
        if i.opcode in ("add", "subtract", "multiply"):
            a, b = (self._integer(computation, operand, arguments) for operand in i.operands)
            if a is None or b is None:
                return None
            return {"add": a + b, "subtract": a - b, "multiply": a * b}[i.opcode]
        if i.opcode == "fusion":
            inner = self.computations[i.called("calls")[0]]
            return self._integer(
                inner, inner.root.name, [self._integer(computation, operand, arguments) for operand in i.operands]
            )
        return None

    def _collective(self, computation: Computation, i: Instruction) -> Collective | None:
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        group = _group(i.attributes, self.devices)
        nbytes = sum(leaf.nbytes for name in i.operands for leaf in computation.instructions[name].leaves)
        if kind == "all-gather":
            nbytes *= len(group)
        if "all-reduce-scatter" in computation.name:  # the TPU compiler's fusion of an all-reduce and the slice kept
            kind = "reduce-scatter"
        chain = re.search(r'chain_id="(\w+)"', i.attributes)
        return Collective(kind, group, nbytes, 1.0, f"{i.channel}/{chain[1]}" if chain else "")

    def _fusion_bytes(self, computation: Computation, fusion: Instruction) -> float:
        """Bytes of main memory that a fusion reads and writes."""
        inner = self.computations[fusion.called("calls")[0]]
        total = 0.0
        for number, name in enumerate(fusion.operands):
            whole = sum(leaf.nbytes for leaf in computation.instructions[name].leaves if leaf.space == 0)
            parameter = inner.parameter(number)
            total += min(self._read(inner, parameter.name, whole), whole) if parameter and whole else whole
        root = inner.root
        results = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for leaf, result in zip(fusion.leaves, results, strict=False):
            total += self._written(inner, result, leaf.nbytes) if leaf.space == 0 else 0.0
        return total

    def _read(self, inner: Computation, name: str, whole: float) -> float:
        """Bytes that a fusion's computation reads of an operand of ``whole`` bytes: the slices that it takes, if it
        takes nothing else, also where they are inside of further fusions. What is updated in place is not read."""
        total = 0.0
        for user in inner.users(name):
            if user.opcode in _SLICES and user.operands[0] == name:
                total += user.leaves[0].nbytes
            elif user.opcode == "bitcast":
                total += self._read(inner, user.name, whole)
            elif user.opcode == "fusion":
                nested = self.computations[user.called("calls")[0]]
                for number in (n for n, operand in enumerate(user.operands) if operand == name):
                    parameter = nested.parameter(number)
                    total += self._read(nested, parameter.name, whole) if parameter else whole
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                return whole
        return total

    def _written(self, inner: Computation, result: Instruction, whole: float) -> float:
        """Bytes that a fusion writes of a result of ``whole`` bytes: the piece, where it updates one in place."""
        while result.opcode == "bitcast" and result.operands[0] in inner.instructions:
            result = inner.instructions[result.operands[0]]
        if result.opcode == "dynamic-update-slice":
            return inner.instructions[result.operands[1]].leaves[0].nbytes
        if result.opcode == "fusion":
            nested = self.computations[result.called("calls")[0]]
            return whole if nested.root.opcode == "tuple" else self._written(nested, nested.root, whole)
        return whole


def bits(dtype: str) -> int:
    """Bits of an element of an HLO type: 32 of "f32", 8 of "pred" and "f8e4m3fn", 0 of a token."""
    if dtype in ("token", "opaque"):
        return 0
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 8


# ---------------------------------------------------------------------------------------------------------- the text


def _instruction(line: str) -> Instruction:
    line = re.sub(r"/\*.*?\*/", "", line)
    name, _, rest = line.partition(" = ")
    root = name.startswith("ROOT ")
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opcode, _, after = rest.partition("(")
    end = _closing("(" + after, 0) - 2
    inside, attributes = after[:end], after[end + 1 :]
    if opcode in ("constant", "parameter"):
        operands = [inside.strip()]
    else:
        operands = [part.split()[-1].lstrip("%") for part in _split(inside)]
    leaves = tuple(
        Leaf(dtype, tuple(int(n.strip("<=")) for n in dims.split(",") if n.strip("<=")), _space(layout))
        for dtype, dims, layout in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^}]*\})?", shape)
    )
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), opcode, leaves, tuple(operands), attributes, root)


def _space(layout: str) -> int:
    found = re.search(r"S\((\d+)\)", layout)
    return int(found[1]) if found else 0


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at ``start``."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if not depth:
            return position + 1
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append(text[start:position])
            start = position + 1
    return [part for part in [*parts, text[start:]] if part.strip()]


def _group(attributes: str, devices: int) -> tuple[int, ...]:
    """The first of ``replica_groups`` (or pair of ``source_target_pairs``), in any of the three forms of the text."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,\s]*)\}", attributes)
    if listed:
        return tuple(int(n) for n in listed[1].split(",") if n.strip())
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\])(?:T\(([\d,]+)\))?", attributes)
    if iota:
        groups = _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
        return tuple(int(n) for n in groups[0])
    mesh = re.search(r"replica_groups=@?mesh\w*\[([^\]]*)\](.*?)\s\{([^}]*)\}", attributes)
    if mesh:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        ids: np.ndarray = np.arange(math.prod(sizes.values()))
        order = re.search(r"(\[[\d,]+\])(?:T\(([\d,]+)\))?", mesh[2])
        if order:
            ids = _iota(order[1], order[2]).reshape(-1)
        ids = ids.reshape(tuple(sizes.values()))
        index: list[int | slice] = [0] * len(sizes)
        for axis, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", mesh[3]):
            stride = sizes[axis] // (int(before) * int(size)) if size else 1
            index[list(sizes).index(axis)] = slice(0, stride * int(size) if size else None, stride)
        return tuple(int(n) for n in np.asarray(ids[tuple(index)]).reshape(-1))
    return tuple(range(devices))


def _iota(dims: str, transpose: str | None) -> np.ndarray:
    shape = [int(n) for n in dims.strip("[]").split(",")]
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose([int(n) for n in transpose.split(",")]) if transpose else ids


# ---------------------------------------------------------------------------------------------------- one instruction


def _leaf(computation: Computation, name: str) -> Leaf:
    return computation.instructions[name].leaves[0]


def _matmul_flops(computation: Computation, i: Instruction) -> dict[str, float]:
    if i.opcode == "dot":
        lhs = _leaf(computation, i.operands[0])
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        dims = [int(n) for n in contracted[1].split(",") if n] if contracted else []
        return {lhs.dtype: 2.0 * i.leaves[0].size * math.prod(lhs.shape[d] for d in dims)}
    if i.opcode == "convolution":
        lhs, rhs = (_leaf(computation, name) for name in i.operands[:2])
        return {lhs.dtype: _convolution_flops(lhs.shape, rhs.shape, i)}
    return {}


def _convolution_flops(lhs: tuple[int, ...], rhs: tuple[int, ...], i: Instruction) -> float:
    """Two per multiply-add on real positions: those in the padding and in the gaps of dilated inputs do not count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels is not None
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(re.findall(r"(\w+)=(\S+)", window[1])) if window else {}
    total = 2.0 * lhs[labels[1].index("b")] * rhs[labels[2].index("i")] * rhs[labels[2].index("o")]
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    total /= int(groups[1]) if groups else 1
    for d in range(len(labels[1]) - 2):

        def field(name: str, default: str, d: int = d) -> str:
            return fields[name].split("x")[d] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        stride, lhs_dilate, rhs_dilate = (int(field(n, "1")) for n in ("stride", "lhs_dilate", "rhs_dilate"))
        size, outputs = rhs[labels[2].index(str(d))], i.leaves[0].shape[labels[3].index(str(d))]
        inputs = lhs[labels[1].index(str(d))]
        position = np.arange(outputs)[:, None] * stride - low + np.arange(size)[None] * rhs_dilate
        real = (position >= 0) & (position <= (inputs - 1) * lhs_dilate) & (position % lhs_dilate == 0)
        total *= float(real.sum())
    return total


def _other_flops(computation: Computation, i: Instruction) -> float:
    if i.opcode in _ELEMENTWISE:
        return float(i.leaves[0].size)
    if i.opcode == "reduce":
        arrays = i.operands[: len(i.operands) // 2]
        return float(sum(_leaf(computation, name).size - i.leaves[0].size for name in arrays))
    if i.opcode in ("reduce-window", "select-and-scatter"):
        size = re.search(r"window=\{size=([\dx]+)", i.attributes)
        window = math.prod(int(n) for n in size[1].split("x")) if size else 1
        source = i.leaves[0] if i.opcode == "reduce-window" else _leaf(computation, i.operands[1])
        return float(source.size * max(window - 1, 1))
    return 0.0


def _bytes(computation: Computation, i: Instruction) -> float:
    """Bytes of main memory that an instruction outside of fusions reads and writes."""
    if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
        return 0.0
    operands = [computation.instructions[name].leaves for name in i.operands if name in computation.instructions]
    if i.opcode == "custom-call" and re.search(r'"(AllocateBuffer|ConcatBitcast)"', i.attributes):
        return 0.0
    if i.opcode in ("copy-start", "slice-start"):  # between memories; results are (target, source) and (source, target)
        target = i.leaves[i.opcode == "slice-start"]
        return target.nbytes * ((operands[0][0].space == 0) + (target.space == 0))
    if i.opcode in ("dynamic-slice", "slice", "gather"):
        source = operands[0][0]
        return sum(leaf.nbytes * ((leaf.space == 0) + (source.space == 0)) for leaf in i.leaves[:1])
    if i.opcode == "dynamic-update-slice":
        return 2 * operands[1][0].nbytes if i.leaves[0].space == 0 else 0.0
    if i.opcode == "scatter":
        return 3 * operands[-1][0].nbytes if i.leaves[0].space == 0 else 0.0
    leaves = [leaf for group in operands for leaf in group] + list(i.leaves)
    if i.opcode.endswith("-start"):
        leaves = 2 * [leaf for group in operands for leaf in group]
    return sum(leaf.nbytes for leaf in leaves if leaf.space == 0)
