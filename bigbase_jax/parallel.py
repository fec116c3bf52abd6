"""Devices: the mesh, where arrays live on it, and the compiled steps. The only file that names mesh axes.

Two forms of the gradient compute the same thing: ``jit`` (default), where the compiler partitions the global program,
and ``shard_map``, where each device works on its own rows and the collectives are written out.
Losses cross devices and microbatches as ``Sum``s and are divided once, at the end.

The axes, outermost first: ``data`` (rows of the batch; parameters whole), ``fsdp`` (rows of the batch, and parameters
in pieces: Rajbhandari et al. 2020, ZeRO), ``expert`` (kept for mixtures of experts; rows of the batch until then),
``pipeline`` (layers: Huang et al. 2019, GPipe), ``sequence`` (positions: Liu et al. 2023, ring attention) and
``tensor`` (heads and hidden units: Shoeybi et al. 2019, Megatron-LM). An axis of size 1 costs nothing. Models do not
know them: they name what an activation's axes mean, and ``LOGICAL`` says where that lives.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bigbase_jax.core import Array, Batch, Loss, PyTree, Sum, Task, TrainState, UserError, add, flatten
from bigbase_jax.models import tables

AXES = DATA, FSDP, EXPERT, PIPELINE, SEQUENCE, TENSOR = "data", "fsdp", "expert", "pipeline", "sequence", "tensor"
BATCH = (DATA, FSDP, EXPERT)
"""The axes over which the rows of a batch are spread."""
LOGICAL = (
    ("batch", BATCH),
    ("length", SEQUENCE),
    ("heads", TENSOR),
    ("mlp", TENSOR),
    ("vocab", TENSOR),
    ("layers", PIPELINE),
)
"""What models call the axes of their activations -> where these live (Flax's logical axis rules)."""
TENSOR_RULES: tuple[tuple[str, tuple], ...] = (
    (r"attention\.(query|key|value)\.kernel$", (None, TENSOR, None)),
    (r"attention\.(query|key|value)\.bias$", (TENSOR, None)),
    (r"attention\.out\.kernel$", (TENSOR, None, None)),
    (r"mlp\.(up|gate)\.kernel$", (None, TENSOR)),
    (r"mlp\.(up|gate)\.bias$", (TENSOR,)),
    (r"mlp\.down\.kernel$", (TENSOR, None)),
    (r"(^|\.)table$", (TENSOR, None)),
    (r"(^|\.)classes$", (None, TENSOR)),
)
"""Columns, then rows, of the transformers' attention and feed-forward layers (Shoeybi et al. 2019, section 3): one
reduction each per pass; the rows of tables; and the vectors of classes (``models.margin``). A spec counts from the last
dimension, so that stacked layers are covered too."""
STACK = re.compile(r"(^|\.)blocks\.")
"""Parameters of a stack of layers, whose first dimension counts them."""
TABLE = re.compile(r"(^|\.)table$")
"""Embedding tables, of which a batch reads few rows. They are spread by rows and never gathered under "jit": each
device looks up the rows that it holds, and the sum over devices of what they found is the lookup."""
FSDP_MIN_SIZE = 2**14
"""Parameters with fewer elements stay whole under the ``fsdp`` preset: gathering them costs more than it saves."""
PRESETS = ("replicated", FSDP, TENSOR, PIPELINE)
LOSS = "loss"
"""What the only term of a loss is called, and the sum of several."""
FROZEN = "frozen"
"""The collection of the model state that holds frozen parameters: they live where parameters do, and no step changes
them, averages them over devices or computes a gradient for them."""
GIVEN = "given"
"""The collection of what a loss reads of variables from elsewhere (``Task.given``), such as a teacher's: as ``FROZEN``,
but an argument of the step, in no training state and in no checkpoint."""
Rule = str | tuple[str, Sequence[Any]]
Step = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Sum]]]


# ------------------------------------------------------------------------------------------------------------- the mesh


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How many devices each axis of the mesh has (``config.train.mesh``); -1 for one of them: as many as there are.

    Raises:
      UserError: a size that is neither -1 nor positive, or -1 twice.
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    pipeline: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.asdict(self)
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise UserError(f"config.train.mesh.{axis} is {size}; it is 1 or more, or -1 for the rest.")
        if list(sizes.values()).count(-1) > 1:
            several = " and ".join(axis for axis, size in sizes.items() if size == -1)
            raise UserError(f"config.train.mesh leaves {several} open (-1); only one axis can take the rest.")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """The size of each of ``AXES`` on so many devices.

        Raises:
          UserError: the axes do not fill the devices.
        """
        given = dataclasses.asdict(self)
        fixed = math.prod(size for size in given.values() if size != -1)
        if devices % fixed or (fixed != devices and -1 not in given.values()):
            shape = " x ".join(f"{axis}={size}" for axis, size in given.items() if size not in (1, -1)) or "data=1"
            raise UserError(
                f"config.train.mesh ({shape}) takes {fixed} devices, which does not fill the {devices} there are; "
                "let the sizes multiply to that, or leave one axis at -1."
            )
        return tuple(devices // fixed if size == -1 else size for size in (given[axis] for axis in AXES))


def make_mesh(devices: int | Sequence[Any] | None = None, shape: MeshShape | None = None) -> Mesh:
    """A mesh of ``AXES``.

    Args:
      devices: over the first so many devices, over these, or over all of them (None).
      shape: sizes of the axes; None: all devices along ``data``.

    Raises:
      UserError: there are fewer devices, a process would have none, or the axes do not fill them.
    """
    if devices is None or isinstance(devices, int):
        there = jax.devices()
        count = len(there) if devices is None else devices
        if not 1 <= count <= len(there):
            raise UserError(
                f"config.train.devices is {count}, but this machine has {len(there)} ({there[0].device_kind})."
            )
        devices = there[:count]
        if len({device.process_index for device in devices}) < jax.process_count():
            raise UserError(
                f"config.train.devices is {count}, which leaves some of the {jax.process_count()} processes without "
                "any; start fewer processes, or leave it open to use all devices."
            )
    sizes = (shape or MeshShape()).sizes(len(devices))
    types = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(sizes, AXES, axis_types=types, devices=devices)
    except NotImplementedError:  # no product of the torus's dimensions has an axis's size: let axes share a dimension
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)


def shards(mesh: Mesh) -> int:
    """Into how many pieces the rows of a batch are spread."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def check_batch(batch_size: int, mesh: Mesh, microbatches: int = 1, what: str = "config.data.batch_size") -> None:
    """
    Raises:
      UserError: the batch does not divide over the devices and microbatches; names sizes that do.
    """
    parts = shards(mesh) * microbatches
    if batch_size % parts or batch_size < 1:
        below = batch_size // parts * parts
        fits = " or ".join(str(n) for n in (below, below + parts) if n)
        whole = shards(mesh) == mesh.size
        over = f"{shards(mesh)} {'devices' if whole else 'rows of devices'}"
        over += f" x {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(f"{what} {batch_size} does not divide over {over}; use {fits}.")


def host(mesh: Mesh) -> tuple[int, int]:
    """(i, n): this process reads piece i of the n equal pieces of each batch that its devices need.

    Processes whose devices hold the same rows (where an axis such as ``tensor`` spans processes) read the same piece.

    Raises:
      UserError: the mesh lays rows on the processes that are not one equal piece each.
    """
    if jax.process_count() == 1:
        return 0, 1
    parts = shards(mesh)
    rows: Mapping[Any, Any] = NamedSharding(mesh, PartitionSpec(BATCH)).devices_indices_map((parts,))
    of_process: dict[int, set[int]] = collections.defaultdict(set)
    for device, (piece,) in rows.items():
        of_process[device.process_index].update(range(*piece.indices(parts)))
    pieces = {tuple(sorted(held)) for held in of_process.values()}
    size = len(next(iter(pieces)))
    if pieces != {tuple(range(start, start + size)) for start in range(0, parts, size)}:
        raise UserError(
            "config.train.mesh gives the processes rows of a batch that are not one equal piece each; let the axes "
            "sequence, tensor and pipeline divide the devices of a process, or be a multiple of them."
        )
    return min(of_process[jax.process_index()]) // size, parts // size


# ------------------------------------------------------------------------------------------------ where parameters live


def shardings(tree: PyTree, mesh: Mesh, rules: Sequence[Rule] = ()) -> PyTree:
    """A ``NamedSharding`` per leaf of a training state, of variables or of parameters.

    Args:
      tree: arrays or shapes: a ``TrainState``, ``{"params": ..., ...}``, or parameters alone. The leaves of ``FROZEN``
        are parameters too. Optimizer slots and moving averages live where their parameters do (a leaf belongs to the
        parameter whose path ends its own and whose shape it has); what belongs to no parameter is replicated.
      mesh: of ``make_mesh``.
      rules: tried in order for each parameter. A pair (path regex, partition spec) places the parameters in whose path
        (``"encoder.norm.scale"``) the regex is found: axis names, tuples of them or None, counted from the last
        dimension. The presets come after the pairs and combine: "tensor" (``TENSOR_RULES``), "pipeline" (the first
        dimension of a stack of layers), "fsdp" (the largest dimension that divides and is not spread already, for
        parameters of at least ``FSDP_MIN_SIZE`` elements; "fsdp:N": of at least N) and "replicated" (the rest whole).
        Empty: the presets of the mesh's axes that are larger than 1.

    Raises:
      UserError: an unknown preset or axis, a parameter that no rule covers, a rule that does not divide a parameter,
        or a ``tensor`` or ``pipeline`` axis that no parameter uses.
    """
    if isinstance(tree, TrainState):
        variables: Mapping[str, PyTree] = {"params": tree.params, **tree.model_state}
    else:
        variables = tree if isinstance(tree, Mapping) and "params" in tree else {"params": tree}
    leaves = {**flatten(variables["params"]), **flatten(variables.get(FROZEN, {}))}
    rules = rules or (*(axis for axis in (TENSOR, PIPELINE, FSDP) if mesh.shape[axis] > 1), "replicated")
    specs = {name: _spec(name, np.shape(leaf), mesh, rules) for name, leaf in leaves.items()}
    for axis in (TENSOR, PIPELINE):
        if mesh.shape[axis] > 1 and not any(axis in _names(spec) for spec in specs.values()):
            raise UserError(
                f"config.train.mesh.{axis} is {mesh.shape[axis]}, but no parameter of this model is spread over that "
                f"axis; set it to 1, or add a rule to config.train.sharding"
                + (" (a stack of layers needs scan=True)." if axis == PIPELINE else ".")
            )

    def of(path: str, leaf: Any) -> NamedSharding:
        parts = path.split(".")
        for start in range(len(parts)):
            name = ".".join(parts[start:])
            if name in specs and np.shape(leaf) == np.shape(leaves[name]):
                return NamedSharding(mesh, specs[name])
        return NamedSharding(mesh, PartitionSpec())

    return _map(of, tree)


def fitting_shardings(tree: PyTree, mesh: Mesh, rules: Sequence[Rule]) -> PyTree:
    """``shardings`` by the rules where they fit this mesh, or else as its axes ask for, or else all of it whole."""
    for attempt in (rules, ()):
        with contextlib.suppress(UserError):
            return shardings(tree, mesh, attempt)
    return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> PartitionSpec:
    """Where the parameter of this path and shape lives."""
    presets = []
    for rule in rules:
        if isinstance(rule, str):
            presets.append(rule)
        elif re.search(rule[0], name):
            return _placed_by(rule, name, shape, mesh)
    axes: list[Any] = [None] * len(shape)
    stacked = bool(STACK.search(name))
    min_size = None
    for preset in presets:
        kind, _, size = preset.partition(":")
        if kind not in PRESETS or (size and (kind != FSDP or not size.isdigit())):
            raise UserError(
                f"config.train.sharding names {preset!r}; it holds (path regex, spec) pairs and the presets "
                f"{', '.join(PRESETS)}."
            )
        if kind == TENSOR:
            for pattern, spec in TENSOR_RULES:
                if re.search(pattern, name):
                    axes = [*_placed_by((f"tensor: {pattern}", spec), name, shape, mesh)]
        elif kind == FSDP:
            min_size = int(size or FSDP_MIN_SIZE)
    if PIPELINE in presets and stacked:
        _check_divides(("pipeline", (PIPELINE,)), name, shape, 0, PIPELINE, mesh)
        axes[0] = PIPELINE
    if min_size is not None and math.prod(shape) >= min_size:
        free = [d for d in range(int(stacked), len(shape)) if axes[d] is None and shape[d] % mesh.shape[FSDP] == 0]
        if TABLE.search(name) and shape[0] % (mesh.shape[FSDP] * (mesh.shape[TENSOR] if axes[0] else 1)) == 0:
            axes[0] = (FSDP, TENSOR) if axes[0] else FSDP
        elif free:
            axes[max(free, key=lambda d: shape[d])] = FSDP
    if not presets:
        raise UserError(
            f"no rule of config.train.sharding covers the parameter {name!r}; add 'replicated' to keep the rest whole."
        )
    return PartitionSpec(*axes)


def _placed_by(rule: tuple[str, Sequence[Any]], name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The rule's spec, checked and filled up with None from the left."""
    spec = [tuple(axis) if isinstance(axis, (list, tuple)) else axis for axis in rule[1]]
    unknown = [axis for axis in _names(spec) if axis not in AXES]
    if unknown:
        raise UserError(
            f"the rule {rule[0]!r} of config.train.sharding names the axis {unknown[0]!r}; the mesh has "
            f"{', '.join(AXES)}."
        )
    if len(spec) > len(shape):
        raise UserError(
            f"the rule {rule[0]!r} of config.train.sharding places {len(spec)} dimensions, but {name!r} has the shape "
            f"{shape}."
        )
    spec = [None] * (len(shape) - len(spec)) + spec
    for dimension, axis in enumerate(spec):
        _check_divides(rule, name, shape, dimension, axis, mesh)
    return PartitionSpec(*spec)


def _check_divides(rule: Any, name: str, shape: tuple[int, ...], dimension: int, axis: Any, mesh: Mesh) -> None:
    over = {a: mesh.shape[a] for a in _names([axis])}
    if shape[dimension] % math.prod(over.values()):
        spread = " x ".join(f"{a}={size}" for a, size in over.items())
        raise UserError(
            f"the rule {rule[0]!r} of config.train.sharding does not divide the parameter {name!r} of shape {shape}: "
            f"dimension {dimension} is {shape[dimension]}, spread over {spread}."
        )


def _names(spec: Any) -> list[str]:
    """The mesh axes in a partition spec."""
    return [a for axis in spec if axis is not None for a in (axis if isinstance(axis, tuple) else (axis,))]


def placed(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes (of ``jax.eval_shape``) with the sharding of each leaf, as restoring and compiling ask for them."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def placed_batch(spec: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a global batch with its sharding, to compile for without data."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in spec.items()}


def global_spec(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the global batch, of which this process has these rows."""
    pieces = host(mesh)[1]
    return {name: jax.ShapeDtypeStruct((len(x) * pieces, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch, rows spread over the ``BATCH`` axes, from this process's rows of it. Returns at once."""
    sharding = NamedSharding(mesh, PartitionSpec(BATCH))
    spec = global_spec(batch, mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(x), spec[name].shape)
        for name, x in batch.items()
    }


def prefetch(
    batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, depth: int = 2
) -> Generator[dict[str, jax.Array], None, None]:
    """``put`` applied ``depth`` batches ahead, so that the copy to the device runs while it computes."""
    queue: collections.deque[dict[str, jax.Array]] = collections.deque()
    try:
        for batch in batches:
            queue.append(put(batch, mesh))
            if len(queue) > depth:
                yield queue.popleft()
        yield from queue
    finally:
        if hasattr(batches, "close"):
            batches.close()


# ------------------------------------------------------------------------------------------------------------ the steps


class Program(NamedTuple):
    """A training run as the compiler sees it.

    Attributes:
      state: shapes of the training state, each with its sharding.
      init: ``batch -> state``: a fresh state, born where it lives, never whole on one device. What ``init.lower``
        compiles takes the seed and the numbers before the batch.
      step: ``(state, batch) -> (state, sums)``: one update; the state's buffers are donated. Both are jitted and have
        ``lower``.
      given: gives what a compiled ``step`` takes besides: of a task with ``given``, its variables.
    """

    state: TrainState
    init: Any
    step: Any
    given: Callable[[], tuple[PyTree, ...]] = tuple


def program(
    task: Task,
    tx: optax.GradientTransformation,
    spec: Mapping[str, Any],
    mesh: Mesh,
    *,
    seed: int = 0,
    numbers: Mapping[str, float] | None = None,
    sharding: Sequence[Rule] = (),
    mode: str = "jit",
    microbatches: int = 1,
    ema_decay: float | None = None,
    lazy_tables: bool = False,
) -> Program:
    """The state and the steps of a run. The seed and the numbers are no part of the compiled programs.

    Args:
      task: what is trained.
      tx: of ``optim.Optimizer.transform``.
      spec: shapes of the global batch.
      mesh: of ``make_mesh``.
      seed: of the parameters and of the run's randomness.
      numbers: of ``optim.Optimizer.numbers``: keywords of ``tx.init``.
      sharding: see ``shardings``.
      mode, microbatches, ema_decay, lazy_tables: see ``train_step``.

    Raises:
      UserError: whatever ``shardings`` and ``train_step`` refuse.
    """

    def init(seed: jax.Array, numbers: Mapping[str, jax.Array], batch: Batch) -> TrainState:
        return init_state(task, tx, batch, seed, ema_decay is not None, numbers)

    # As ``jax.random.key`` does with an int: of a larger one the lower 32 bits count.
    own = (np.asarray(seed).astype(np.int32), {name: np.float32(x) for name, x in (numbers or {}).items()})
    with _InMesh(None, mesh).entered():  # where a model that does not fit the mesh says so
        shapes = jax.eval_shape(init, *own, dict(spec))
    state_shardings = shardings(shapes, mesh, sharding)
    how = (mode, microbatches, ema_decay, lazy_tables)
    step = functools.partial(train_step, task, tx, mesh, state_shardings, *how)
    compiled_init = _InMesh(jax.jit(init, out_shardings=state_shardings), mesh, first=own)
    state = placed(shapes, state_shardings)
    if not hasattr(task, "given"):
        return Program(state, compiled_init, step())
    check_step(task, mesh, mode, microbatches)
    given = _Given(task, mesh, sharding, step)
    return Program(state, compiled_init, given, lambda: (given.arrays,))


class _Given:
    """The step of a task that is given variables; they are looked at when it is compiled, and read when it runs."""

    def __init__(self, task: Any, mesh: Mesh, rules: Sequence[Rule], step: Callable[[Any], Any]):
        self._task, self._mesh, self._rules, self._step_with = task, mesh, rules, step

    @functools.cached_property
    def _like(self) -> PyTree:
        """Shapes with shardings: by the rules where they fit, or else as the mesh's axes ask for, or else whole."""
        shapes = self._task.given.shapes
        return placed(shapes, fitting_shardings(shapes, self._mesh, self._rules))

    @functools.cached_property
    def arrays(self) -> PyTree:
        return self._task.given.read(self._like)

    @functools.cached_property
    def _step(self) -> Any:
        return self._step_with(jax.tree.map(lambda x: x.sharding, self._like))

    def __call__(self, state: TrainState, batch: Batch) -> Any:
        return self._step(state, batch, self.arrays)

    def lower(self, state: TrainState, batch: Batch) -> Any:
        return self._step.lower(state, batch, self._like)


class Steps:
    """The step of a program, compiled for each shape of a batch."""

    def __init__(self, program: Program, specs: Sequence[Mapping[str, Any]], mesh: Mesh):
        """``specs``: shapes of the global batches that there will be."""
        self._compiled, self._given = {}, program.given()
        for spec in specs:
            compiled = program.step.lower(program.state, placed_batch(spec, mesh)).compile()
            self._compiled[_shapes(spec)] = compiled, flops(compiled) * mesh.size

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Sum]]:
        """See ``Program.step``."""
        return self._compiled[_shapes(batch)][0](state, batch, *self._given)

    def flops(self, batch: Batch) -> float:
        """Floating-point operations of the step over all devices; see ``flops``."""
        return self._compiled[_shapes(batch)][1]


def _shapes(batch: Batch) -> tuple[Any, ...]:
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


class _InMesh:
    """A jitted function that is traced where models find the mesh and the meaning of their axes.

    Its first arguments may be given once."""

    def __init__(self, jitted: Any, mesh: Mesh, rules: tuple = LOGICAL, first: tuple = ()):
        self._jitted, self._mesh, self._rules, self._first = jitted, mesh, rules, first

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with jax.set_mesh(self._mesh), nn.logical_axis_rules(self._rules):
            yield

    def __call__(self, *args: Any) -> Any:
        with self.entered():
            return self._jitted(*self._first, *args)

    def lower(self, *args: Any) -> Any:
        """``jax.stages.Lowered`` for arrays or shapes."""
        with self.entered():
            return self._jitted.lower(*self._first, *args)


def init_state(
    task: Task,
    tx: optax.GradientTransformation,
    batch: Batch,
    seed: int | jax.Array,
    ema: bool,
    numbers: Mapping[str, Any] | None = None,
) -> TrainState:
    """A fresh state; trace it under ``jax.jit`` with ``out_shardings`` so that it is born where it lives.

    ``numbers`` are keywords of ``tx.init`` (``optim.Optimizer.numbers``)."""
    init_key, key = jax.random.split(jax.random.key(seed))
    variables = dict(task.init(init_key, batch))
    params = variables.pop("params")
    average = jax.tree.map(jnp.copy, {"params": params, **variables}) if ema else None
    return TrainState(jnp.int32(0), params, variables, tx.init(params, **(numbers or {})), average, key)


class Gradient(NamedTuple):
    """What a batch makes of a training state.

    Attributes:
      objective: f32[], what ``grads`` is the gradient of: the loss times ``weight``.
      sums: the terms of the loss and what is logged beside them, over the batch.
      grads: as the parameters.
      model_state: the new one, without ``FROZEN``.
    """

    objective: Array
    sums: dict[str, Sum]
    grads: PyTree
    model_state: PyTree

    @property
    def weight(self) -> Array | float:
        """What is still to be divided by: the weight of the only term; several have been divided by theirs."""
        return self.sums[LOSS].weight if LOSS in self.sums else 1.0


def loss_and_grads(
    task: Task,
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    microbatches: int,
    gather: Callable[[PyTree], PyTree] = lambda lasting: lasting,
    scatter: Callable[[PyTree], PyTree] = lambda grads: grads,
    everywhere: Callable[[PyTree], PyTree] = lambda sums: sums,
) -> Gradient:
    """The loss, its gradient and the new model state, computed in equal slices of the batch.

    Of a loss with one term, the gradient is that of the total, not of the mean: totals and weights add up exactly over
    slices and devices. Of several terms, each is divided by its own weight, so all weights of the batch are summed
    before the first gradient is computed; the compiler leaves out of that pass what weights do not depend on.

    Args:
      microbatches: the number of slices.
      gather: ``{"params": ..., FROZEN: ..., GIVEN: ...}`` from where they live to where they are used.
      scatter: from where gradients arise to where parameters live.
      everywhere: the sum over devices of what each has of its rows.
    """
    frozen, moving = _parted(state.model_state)

    def loss_of(params: PyTree, model_state: PyTree, rows: Batch, key: jax.Array) -> tuple[Loss, PyTree]:
        loss, new = task.loss({**gather({"params": params, **frozen}), **model_state}, rows, key)
        return loss, _parted(new)[1]

    def gradient(
        params: PyTree, model_state: PyTree, rows: Batch, key: jax.Array, weights: Mapping[str, jax.Array] | None = None
    ) -> Gradient:
        def objective(params: PyTree) -> tuple[Array, tuple[dict[str, Sum], PyTree]]:
            loss, new = loss_of(params, model_state, rows, key)
            sums = _sums(loss)
            if set(loss.terms) == {LOSS}:
                parts: dict[str, Array] = {LOSS: sums[LOSS].total}
            else:
                whole = everywhere(_weights(loss)) if weights is None else weights
                parts = {name: Sum(sums[name].total, jax.lax.stop_gradient(whole[name])).mean() for name in loss.terms}
            scaled = [loss.scale[name] * part if name in loss.scale else part for name, part in parts.items()]
            return sum(scaled[1:], scaled[0]), (sums, new)

        (value, (sums, new)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return Gradient(value, sums, scatter(grads), new)

    if microbatches == 1:
        return gradient(state.params, moving, batch, key)

    # Slice m takes rows m, m + M, m + 2M, ...: every device keeps its own rows, and nothing moves between devices.
    split = {name: jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1) for name, x in batch.items()}
    slices = split, jax.random.split(key, microbatches)
    rows, slice_key = jax.tree.map(lambda x: x[0], slices)
    loss, _ = jax.eval_shape(loss_of, state.params, moving, rows, slice_key)
    weights = None
    if set(loss.terms) != {LOSS}:

        def more_weight(weights: PyTree, slice_: tuple[Batch, jax.Array]) -> tuple[PyTree, None]:
            return add(weights, _weights(loss_of(state.params, moving, *slice_)[0])), None

        weights = everywhere(jax.lax.scan(more_weight, dict.fromkeys(loss.terms, jnp.float32(0)), slices)[0])

    def more(before: Gradient, slice_: tuple[Batch, jax.Array]) -> tuple[Gradient, None]:
        found = gradient(state.params, before.model_state, *slice_, weights)
        objective, sums, grads = add(before[:3], found[:3])
        return Gradient(objective, sums, grads, found.model_state), None

    nothing = jnp.float32(0)
    zeros = dict.fromkeys((*loss.terms, *loss.aux), Sum(nothing, nothing)), jax.tree.map(jnp.zeros_like, state.params)
    return jax.lax.scan(more, Gradient(nothing, *zeros, moving), slices)[0]


def _sums(loss: Loss) -> dict[str, Sum]:
    """The terms and what is logged beside them, each as two numbers."""
    together = {**loss.terms, **loss.aux}
    if len(together) < len(loss.terms) + len(loss.aux) or (LOSS in together) != (set(loss.terms) == {LOSS}):
        raise ValueError(
            f"a loss has the terms {list(loss.terms)} and aux {list(loss.aux)}; let all names differ, and only a term "
            "that is alone be called 'loss'."
        )
    return {name: Sum(jnp.sum(part.total), jnp.sum(part.weight)) for name, part in together.items()}


def _weights(loss: Loss) -> dict[str, jax.Array]:
    return {name: jnp.sum(term.weight) for name, term in loss.terms.items()}


def apply_gradients(
    state: TrainState, tx: optax.GradientTransformation, found: Gradient, ema_decay: float | None
) -> tuple[TrainState, dict[str, Sum]]:
    """Divides by the weight, updates parameters and moving average; returns the new state and what to log.

    The learning rate is logged where the optimizer's state shows it, as that of ``optax.inject_hyperparams`` does.
    The gradient's ``model_state`` is what has changed of it; the rest stays as it is, in the moving average too.
    The average's decay is warmed up as ``min(decay, (1 + t) / (10 + t))``, so that the random start is forgotten.
    """
    weight = jnp.asarray(found.weight)
    scale = 1.0 / jnp.where(weight == 0, 1.0, weight)
    norm = scale * optax.global_norm(found.grads)  # of the total's: so the scaled gradient is never written to memory
    grads = jax.tree.map(lambda g: g * scale, found.grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None and ema_decay is not None:
        t = state.step.astype(jnp.float32)
        decay = jnp.minimum(ema_decay, (1 + t) / (10 + t))
        moved = {"params": params, **found.model_state}
        past = {name: ema[name] for name in moved}

        def average(old: jax.Array, new: jax.Array) -> jax.Array:
            return old + (1 - decay) * (new - old) if _is_inexact(new) else new

        ema = {**ema, **jax.tree.map(average, past, moved)}
    one = jnp.float32(1)
    sums = {**found.sums, LOSS: Sum(found.objective, weight), "grad_norm": Sum(norm, one)}
    shown = getattr(opt_state, "hyperparams", {})
    if "learning_rate" in shown:
        sums["learning_rate"] = Sum(shown["learning_rate"], one)
    model_state = {**state.model_state, **found.model_state}
    return TrainState(state.step + 1, params, model_state, opt_state, ema, state.key), sums


def plain_step(
    task: Task,
    tx: optax.GradientTransformation,
    microbatches: int = 1,
    ema_decay: float | None = None,
    gradient: Callable[[TrainState, Batch, jax.Array], Gradient] | None = None,
) -> Step:
    """The training step ``(state, batch) -> (state, sums)``, not compiled yet.

    ``gradient`` is where and in what pieces ``loss_and_grads`` is computed; None: on one device.
    """
    finish = getattr(task, "finish", None)
    if finish is not None and finish.__self__ is not task:
        inner = type(finish.__self__).__name__
        raise UserError(f"{inner} is around all other wrappers, so {type(task).__name__} goes inside it.")

    def step(state: TrainState, batch: Batch, *given: PyTree) -> tuple[TrainState, dict[str, Sum]]:
        key, seen = jax.random.fold_in(state.key, state.step), _with_given(state, *given)
        found = gradient(seen, batch, key) if gradient else loss_and_grads(task, seen, batch, key, microbatches)
        found = finish(found, key) if finish else found
        return apply_gradients(state, tx, found, ema_decay)

    return step


def train_step(
    task: Task,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    shardings: TrainState,
    mode: str = "jit",
    microbatches: int = 1,
    ema_decay: float | None = None,
    lazy_tables: bool = False,
    *given: PyTree,
) -> Any:
    """The compiled training step ``(state, batch) -> (state, sums)``; the state's buffers are donated.

    Args:
      task: what is trained.
      tx: the optax transformation.
      mesh: of ``make_mesh``.
      shardings: where the training state lives (see ``shardings``).
      mode: "jit" or "shard_map". In the second the task sees one device's rows at a time: BatchNorm averages its
        statistics over all devices, and random masks differ from those of "jit".
      microbatches: slices of the batch whose gradients are accumulated before the update.
      ema_decay: decay of the moving average of the parameters; None: the state has none.
      lazy_tables: see ``lazily``.
      given: of a task with ``given``, where its variables live: the step takes them as its third argument.

    Raises:
      UserError: see ``check_step``.
    """
    check_step(task, mesh, mode, microbatches)
    if lazy_tables and (mode == "shard_map" or microbatches > 1):
        raise UserError(
            "config.train.lazy_tables takes a batch as a whole; set config.train.parallel='jit' and "
            "config.train.microbatches=1."
        )
    everywhere, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(BATCH))
    seen = _map(lambda name, x: everywhere if TABLE.search(name) else x, shardings) if lazy_tables else shardings
    given_too = _with_given(seen, *given)
    lasting = {"params": seen.params, **_parted(given_too.model_state)[0]}
    specs = jax.tree.map(lambda sharding: sharding.spec, lasting)

    def constrained(state: TrainState, batch: Batch, key: jax.Array) -> Gradient:
        """The global program; the compiler partitions it. Parameters are made whole over ``fsdp`` before their first
        use, except for tables, and for stacks, which the compiler gathers layer by layer; gradients go back to the
        pieces."""
        if not any(_names(spec) for spec in jax.tree.leaves(specs, is_leaf=_is_spec)):
            return loss_and_grads(task, state, batch, key, microbatches)
        used = [
            sharding if STACK.search(name) or TABLE.search(name) else NamedSharding(mesh, _without_fsdp(sharding.spec))
            for name, sharding in flatten(lasting).items()
        ]
        whole = jax.tree.unflatten(jax.tree.structure(lasting), used)
        place = jax.lax.with_sharding_constraint
        return loss_and_grads(
            task, state, batch, key, microbatches, lambda tree: place(tree, whole), lambda g: place(g, seen.params)
        )

    def local(state: TrainState, batch: Batch, key: jax.Array) -> Gradient:
        """One device's rows and pieces; its collectives are written out: the gradient of ``all_gather`` is a
        reduce-scatter."""
        key = jax.random.fold_in(key, jax.lax.axis_index(BATCH))
        with nn.intercept_methods(_synchronise_batchnorm):
            found = loss_and_grads(
                task,
                state,
                batch,
                key,
                microbatches,
                gather=lambda tree: jax.tree.map(_all_gather, tree, specs),
                everywhere=lambda sums: jax.lax.psum(sums, BATCH),
            )
        live = [axis for axis in BATCH if mesh.shape[axis] > 1]
        grads = jax.tree.map(
            lambda g, spec: jax.lax.psum(g, [a for a in live if a not in _names(spec)]), found.grads, specs["params"]
        )
        objective, sums = jax.lax.psum((found.objective, found.sums), BATCH)
        mean = jax.tree.map(lambda x: jax.lax.pmean(x, BATCH) if _is_inexact(x) else x, found.model_state)
        return Gradient(objective, sums, grads, mean)

    if mode == "jit":
        gradient = constrained
    else:
        # Without the check of varying axes, gradients stay local until the one psum above.
        inputs = (jax.tree.map(lambda sharding: sharding.spec, given_too), PartitionSpec(BATCH), PartitionSpec())
        outputs = Gradient(PartitionSpec(), PartitionSpec(), specs["params"], PartitionSpec())  # type: ignore[arg-type]
        gradient = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    step = plain_step(task, tx, microbatches, ema_decay, gradient)
    if lazy_tables:
        step = lazily(step, task)
    where = (shardings, rows, *given)
    jitted = jax.jit(step, donate_argnums=0, in_shardings=where, out_shardings=(shardings, everywhere))
    return _InMesh(jitted, mesh, LOGICAL if mode == "jit" else ())


def lazily(step: Step, task: Task) -> Step:
    """``step``, to which each table that the loss looks into has only the rows that the batch reads, each once.

    The same goes for the table's slots in the optimizer and its moving average. What a step costs then grows with the
    batch and not with the table, whatever the algorithm; the rows that a batch does not read stay as they are, with
    their slots (TensorFlow's LazyAdam and torch's SparseAdam do so too), where Adam would go on moving them.

    Raises:
      UserError: the model has no such table, or one lookup could be in several.
    """

    def lazy(state: TrainState, batch: Batch, *given: PyTree) -> tuple[TrainState, dict[str, Sum]]:
        key, seen = jax.random.fold_in(state.key, state.step), _with_given(state, *given)
        with tables.noted() as read:  # of this loss the compiler keeps nothing but the ids
            task.loss({"params": seen.params, **seen.model_state}, batch, key)
        trained = {name: x.shape for name, x in flatten(state.params).items() if TABLE.search(name)}
        read_K: dict[str, Array] = {}  # rows with repetitions, and those of them that are written back
        written_K: dict[str, Array] = {}
        places = {}
        for path, ids in read.items():
            names = [name for name in trained if f".{name}".endswith(".".join(("", *path, "table")))]
            if not names:
                continue  # frozen
            if len(names) > 1:
                raise UserError(f"config.train.lazy_tables cannot tell the tables {' and '.join(names)} apart.")
            rows = trained[names[0]][0]
            row_K = jnp.clip(jnp.concatenate([x.ravel() for x in ids]), 0, rows - 1)
            row_K = jax.lax.with_sharding_constraint(row_K, PartitionSpec())  # ids travel, not what has an entry a row
            k_K = jnp.arange(row_K.size, dtype=jnp.int32)
            first_K = jnp.full(rows, row_K.size, jnp.int32).at[row_K].min(k_K)[row_K]  # faster than sorting
            read_K[names[0]], written_K[names[0]] = row_K, jnp.where(first_K == k_K, row_K, rows)
            cuts = np.cumsum([x.size for x in ids])[:-1].tolist()
            places[path] = [at.reshape(x.shape) for at, x in zip(jnp.split(first_K, cuts), ids, strict=True)]
        if not places:
            raise UserError("config.train.lazy_tables is set, but the loss looks into no table of trained parameters.")

        def table_of(path: str, leaf: Any) -> str | None:
            owns = (n for n in read_K if f".{path}".endswith(f".{n}") and np.shape(leaf) == trained[n])
            return next(owns, None)

        def take(path: str, leaf: Any) -> Any:
            name = table_of(path, leaf)
            return leaf if name is None else jax.lax.with_sharding_constraint(leaf[read_K[name]], PartitionSpec())

        with tables.answered(places):
            after, sums = step(_map(take, state), batch, *given)
        new = flatten(after)

        def put_back(path: str, leaf: Any) -> Any:
            name = table_of(path, leaf)
            return new[path] if name is None else leaf.at[written_K[name]].set(new[path], mode="drop")

        return _map(put_back, state), sums

    return lazy


def _map(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """``fn(path, leaf)`` of every leaf."""
    return jax.tree.unflatten(jax.tree.structure(tree), [fn(path, leaf) for path, leaf in flatten(tree).items()])


def check_step(task: Task, mesh: Mesh, mode: str, microbatches: int) -> None:
    """
    Raises:
      UserError: the loss couples examples of a batch, which neither slicing nor shard_map can honour, or shard_map on
        a mesh with more than the ``BATCH`` axes.
    """
    if task.batch_coupled and (microbatches > 1 or mode == "shard_map"):
        how = f"config.train.microbatches={microbatches}" if microbatches > 1 else "config.train.parallel='shard_map'"
        raise UserError(
            f"this task's loss compares the examples of a batch with each other, and {how} would split them."
        )
    if mode not in ("jit", "shard_map"):
        raise UserError(f"config.train.parallel is {mode!r}; it is 'jit' or 'shard_map'.")
    if mode == "shard_map" and shards(mesh) != mesh.size:
        other = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1 and axis not in BATCH)
        raise UserError(
            f"config.train.parallel='shard_map' knows the axes {', '.join(BATCH)}; this mesh also has {other}."
        )


def _parted(model_state: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """``FROZEN`` and ``GIVEN``, and the collections that a step may change."""
    moving = dict(model_state)
    return {name: moving.pop(name) for name in (FROZEN, GIVEN) if name in moving}, moving


def _with_given(state: TrainState, *given: PyTree) -> TrainState:
    more = {GIVEN: given[0]} if given else {}
    return state.replace(model_state={**state.model_state, **more})  # type: ignore[attr-defined]


def _is_inexact(x: Any) -> bool:
    """Whether it has a mean; what is counted or masked is the same on all devices."""
    return bool(jnp.issubdtype(x.dtype, jnp.inexact))


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _all_gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """A parameter whole, from the pieces that lie on the ``fsdp`` axis."""
    return jax.lax.all_gather(x, FSDP, axis=list(spec).index(FSDP), tiled=True) if FSDP in spec else x


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(None if axis == FSDP else axis for axis in spec))


def _synchronise_batchnorm(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
    """Lets every BatchNorm below average its training statistics over the devices of a ``shard_map``."""
    module = context.module
    if isinstance(module, nn.BatchNorm) and context.method_name == "__call__":
        object.__setattr__(module, "axis_name", BATCH)
    return call(*args, **kwargs)


def eval_step(task: Task, mesh: Mesh) -> Callable[[PyTree, Batch], tuple[dict[str, Any], dict[str, Sum]]]:
    """The compiled evaluation step ``(variables, batch) -> (examples, sums)``.

    ``examples`` holds the arrays of ``Task.evaluate``, ``mask`` and ``index``, spread as the rows of the batch are.
    """
    return rows_step(task.evaluate, mesh)


def rows_step(evaluate: Callable[[PyTree, Batch], tuple[Mapping[str, Any], Mapping[str, Sum]]], mesh: Mesh) -> Any:
    """As ``eval_step``, of any such function."""

    def step(variables: PyTree, batch: Batch) -> tuple[dict[str, Any], dict[str, Sum]]:
        examples, sums = evaluate(variables, batch)
        return {**examples, **{name: batch[name] for name in ("mask", "index") if name in batch}}, dict(sums)

    rows, everywhere = NamedSharding(mesh, PartitionSpec(BATCH)), NamedSharding(mesh, PartitionSpec())
    return _InMesh(jax.jit(step, out_shardings=(rows, everywhere)), mesh)


def rows_here(x: jax.Array) -> np.ndarray:
    """The rows of an array, spread as those of a batch are, that this process has, in order."""
    if jax.process_count() == 1:
        return np.asarray(x)
    pieces = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """bool[]: no NaN or infinity in any floating-point leaf."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def flops(compiled: jax.stages.Compiled | jax.stages.Lowered) -> float:
    """Floating-point operations of one call on one device, as the compiler counts them; 0 where it does not say."""
    try:
        analysis = compiled.cost_analysis()
    except NotImplementedError:
        return 0.0
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float((analysis or {}).get("flops", 0.0))
