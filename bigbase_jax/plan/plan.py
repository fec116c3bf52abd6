"""Plan before you pay: what a recipe needs of machines that are not here, from its compiled training step.

``python launch.py --mode=plan --config=configs/catdog.py --topology=v5e:4x4 --price=1.2`` compiles the very step that
``train`` would run: for a TPU with the TPU compiler, ahead of time; for GPUs and CPUs with the CPU's compiler over as
many simulated devices. Everything is per device unless its name says otherwise.

The step's time has three terms: ``compute`` = FLOPs of matrix products / the peak for their type, ``memory`` = bytes
that the program's operations read and write / the memory's bandwidth, ``interconnect`` = bytes that a device sends by
the ring algorithms / the bandwidth of the links that its group uses (``topology.link_bandwidth``). The roofline is the
largest of them, as if all overlapped perfectly (Williams, Waterman & Patterson 2009); their sum is a step in which
nothing overlaps. The TPU compiler gives an estimate of its own, which counts nothing for collectives (a sum over 64
chips costs as much there as a copy): ``step_seconds`` is that estimate, or compute or memory where larger, plus
interconnect. Elsewhere it is the sum.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import math
import pathlib
import re
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from bigbase_jax import parallel, pretrained
from bigbase_jax.build import build
from bigbase_jax.core import PyTree, Task, TrainState, UserError
from bigbase_jax.data.cache import as_array
from bigbase_jax.data.pipeline import Data, apply_eval
from bigbase_jax.optim import Optimizer
from bigbase_jax.parallel import AXES, DATA, FSDP, TENSOR, MeshShape
from bigbase_jax.plan import topology
from bigbase_jax.plan.hlo import Module, Work
from bigbase_jax.plan.topology import Topology
from bigbase_jax.runtime import restored
from bigbase_jax.runtime.chips import GIB, Chip
from bigbase_jax.runtime.log import duration, engineering, say
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.quantised import served_bytes

PREFETCHED = int(inspect.signature(parallel.prefetch).parameters["depth"].default)
"""Batches that ``parallel.prefetch`` keeps on the device beside the one in use."""
QUICK = 9
"""The TPU compiler's optimization level (XLA's O0) while searching: a third of the time or less; about the same memory,
and estimates of time that may differ by a third (experiments/scaling_from_plans)."""
_COMPILATIONS = 12  # of a search
_MOST_TENSOR = 8  # devices that one layer is spread over
_MICROBATCHES = (1, 2, 4, 8)


def run(
    config: ConfigDict | None,
    topology_name: str | None,
    price: float | None = None,
    search: bool = False,
    level: int = 0,
    workdir: str = "",
) -> dict[str, Any]:
    """Plans a recipe or a run, prints a table on stdout, and returns all numbers.

    A run is planned by its folder alone. What has no training step, as it is stored in few bits, is planned as it
    evaluates a batch.

    Args:
      config: a recipe; None: that of the run.
      topology_name: such as "v5e:4x4" or "h100:8" (see ``topology.parse``).
      price: US dollars per device and hour; None: no cost.
      search: try meshes, microbatches and remat policies. A recipe that does not fit is searched for a way to make it
        fit in any case.
      level: of the TPU compiler's optimization: ``QUICK``, or 0, what training uses.
      workdir: the folder of a run.

    Raises:
      UserError: no run, an unknown topology, a missing compiler, or a recipe that the topology's devices cannot run.
    """
    if price is not None and price < 0:
        raise UserError(f"--price={price:g} is below 0.")
    target = topology.parse(topology_name)
    devices = topology.devices(target)
    if config is None:
        folder = RunDir(workdir)
        planner = Planner(folder.config(), target, devices, topology.chip(target), known_example(folder))
    else:
        planner = Planner(pretrained.resolve(config, compared=False), target, devices, topology.chip(target))
    chosen = planner.recipe()
    tried: list[Plan] = []
    if search:
        tried = planner.search()
        fitting = [plan for plan in tried if plan.fits]
        if fitting:
            chosen = fitting[0].choice
    plan = next((p for p in tried if p.choice == chosen and not target.is_tpu), None) or planner.plan(chosen, level)
    if not plan.fits and not search:
        say(f"{plan.shortage()}; looking for what would fit")
        tried = sorted([plan, *planner.rescue()], key=Plan.rank)
    result = plan.numbers(price)
    result["served_bytes"] = planner.served()
    result["search"] = [p.row(planner.recipe()) for p in tried]
    _print(planner, plan, result, tried)
    return result


# ------------------------------------------------------------------------------------------------------- the candidates


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a search varies. Meshes and remat change only rounding, microbatches also what BatchNorm averages over.

    Attributes:
      mesh: sizes of ``parallel.AXES``.
      microbatches: slices of the batch.
      remat: "off", "on" or the name of a policy; None: the model has no such switch.
    """

    mesh: tuple[int, ...]
    microbatches: int
    remat: str | None

    def shape(self) -> MeshShape:
        """For ``config.train.mesh``."""
        return MeshShape(**dict(zip(AXES, self.mesh, strict=True)))

    def words(self) -> str:
        """``"data=4 fsdp=4, 2 microbatches, remat on"``."""
        axes = " ".join(f"{axis}={n}" for axis, n in zip(AXES, self.mesh, strict=True) if n > 1) or "data=1"
        parts = [axes, f"{self.microbatches} microbatches" if self.microbatches > 1 else ""]
        return ", ".join([part for part in parts if part] + ([f"remat {self.remat}"] if self.remat else []))


class Planner:
    """Compiles and judges one recipe's training step on one topology.

    Args:
      config: the recipe.
      target: the topology.
      devices: its devices.
      chip: figures of one of them.
      known: see ``known_example``; None: the data is asked.

    Raises:
      UserError: the recipe's data cannot be read, or the recipe does not fit itself.
    """

    def __init__(
        self, config: ConfigDict, target: Topology, devices: Sequence[Any], chip: Chip, known: Known | None = None
    ):
        self.config, self.target, self.chip = config, target, chip
        self.loop: TrainConfig = build(config.train, _path="config.train")
        self.devices = devices[: self.loop.devices] if self.loop.devices else devices
        self.data = config.data
        self.dataset_info, self.spec, self.examples = known or read_example(config)
        task = build(config.task, self.dataset_info, _path="config.task")
        self.trains = pretrained.stored(task) is None
        self._switches = list(_remat_switches(config.task, "config.task"))

    def recipe(self) -> Choice:
        """As the recipe has it."""
        remat = None
        for _, node in self._switches:
            remat = "off" if not node.remat else str(node.get("remat_policy") or "on")
        return Choice(self.loop.mesh.sizes(len(self.devices)), self.loop.microbatches, remat)

    def plan(self, choice: Choice, level: int = 0) -> Plan:
        """Compiles the step and reads the outcome.

        Raises:
          UserError: the devices cannot run this choice.
        """
        began = time.perf_counter()
        program, mesh = self.program(choice)
        lowered = program.step.lower(program.state, parallel.placed_batch(self.spec, mesh))
        options = {"optimization_level": level} if self.target.is_tpu and level else None
        try:
            with not_cached() if self.target.is_tpu else contextlib.nullcontext():
                compiled, needed = lowered.compile(compiler_options=options), None
        except jax.errors.JaxRuntimeError as error:
            compiled, needed = None, _out_of_memory(str(error))
            if needed is None:
                raise
        return Plan(self, choice, mesh, program.state, lowered, compiled, needed, level, time.perf_counter() - began)

    def search(self) -> list[Plan]:
        """Plans of the choices that were tried, fastest first; at the end those that do not fit, least memory first.

        First every mesh with nothing computed again and the batch in one piece, which is the fastest that it can do.
        Recomputation and microbatches cost time, so they are tried only where that does not fit.
        """
        recipe, tried = self.recipe(), _Tried(self, _COMPILATIONS)
        fast = [Choice(mesh, 1, self._remats()[0]) for mesh in self._meshes()]
        for choice in (recipe, *fast):
            if tried.count < (_COMPILATIONS if tried.fitting() else _COMPILATIONS // 2):
                tried.attempt(choice)
        for mesh in dict.fromkeys([*(p.choice.mesh for p in tried.plans if not p.fits), recipe.mesh, fast[0].mesh]):
            self._make_fit(tried, [mesh], recipe)
        return tried.ranked()

    def rescue(self) -> list[Plan]:
        """What was tried to make a recipe fit that does not."""
        recipe, tried = self.recipe(), _Tried(self, _COMPILATIONS - 1)
        whole = [n if axis != DATA else 1 for axis, n in zip(AXES, recipe.mesh, strict=True)]
        whole[AXES.index(FSDP)] *= recipe.mesh[AXES.index(DATA)]
        self._make_fit(tried, [recipe.mesh, tuple(whole)], recipe)
        return tried.ranked()

    def _make_fit(self, tried: _Tried, meshes: Sequence[tuple[int, ...]], recipe: Choice) -> None:
        """Slices the batch finer and finer until one of the meshes fits with everything computed again; then keeps as
        much as fits."""
        remats = self._remats()
        for microbatches, mesh in itertools.product(_MICROBATCHES, meshes):
            if microbatches >= recipe.microbatches or microbatches == 1:
                plan = tried.attempt(Choice(mesh, microbatches, remats[-1]))
                if plan is not None and plan.fits:
                    for remat in remats[:-1]:
                        tried.attempt(Choice(mesh, microbatches, remat))
                    return

    def _meshes(self) -> list[tuple[int, ...]]:
        """Divisions of the devices among ``data``, ``fsdp`` and ``tensor``, plain ones first; others as the recipe."""
        recipe = dict(zip(AXES, self.recipe().mesh, strict=True))
        free = recipe[DATA] * recipe[FSDP] * recipe[TENSOR]
        sizes = [n for n in range(1, free + 1) if free % n == 0]
        found = []
        for fsdp, tensor in itertools.product(sizes, sizes):
            if tensor <= _MOST_TENSOR and free % (fsdp * tensor) == 0:
                found.append({**recipe, DATA: free // (fsdp * tensor), FSDP: fsdp, TENSOR: tensor})
        # Whole parameters, pieces on all devices, pieces on fewer and fewer; then the same with layers spread over 2.
        found.sort(key=lambda m: (m[TENSOR], m[FSDP] > 1, m[DATA]))
        return [tuple(mesh[axis] for axis in AXES) for mesh in found]

    def _remats(self) -> list[str | None]:
        """From everything kept to everything computed again."""
        if not self._switches:
            return [None]
        policies = ["dots_with_no_batch_dims_saveable", "nothing_saveable"]
        return ["off", *(policies if all("remat_policy" in node for _, node in self._switches) else ["on"])]

    def worth_compiling(self, choice: Choice) -> bool:
        """Whether the devices can run the choice, and its state and one gradient alone fit into their memory."""
        try:
            program, _ = self.program(choice)
        except UserError:
            return False
        gradient = 0 if self.loop.lazy_tables else _bytes(program.state.params)
        return _bytes(program.state) + gradient <= self.chip.memory - self.chip.reserve

    def program(self, choice: Choice) -> tuple[parallel.Program, Any]:
        """What ``train`` would compile for the choice, and its mesh.

        Raises:
          UserError: the devices cannot run it.
        """
        config = self.config
        loop = dataclasses.replace(self.loop, mesh=choice.shape(), microbatches=choice.microbatches)
        mesh = parallel.make_mesh(self.devices, loop.mesh)
        parallel.check_batch(self.data.batch_size, mesh, loop.microbatches)
        eval_batch = self.data.eval_batch_size or self.data.batch_size
        parallel.check_batch(eval_batch, mesh, what="config.data.eval_batch_size")
        task: Task = build(self._with_remat(choice.remat), self.dataset_info, _path="config.task")
        if not self.trains:
            variables = dict(jax.eval_shape(task.init, jax.random.key(0), self.spec))
            number: Any = jax.ShapeDtypeStruct((), np.int32)
            shapes = TrainState(number, variables.pop("params"), variables, (), None, number)
            state = parallel.placed(shapes, parallel.shardings(shapes, mesh, loop.sharding))
            step = parallel.rows_step(
                lambda state, batch: task.evaluate({"params": state.params, **state.model_state}, batch), mesh
            )
            return parallel.Program(state, None, step), mesh
        optimizer: Optimizer = build(config.optim, _path="config.optim")
        total = self.steps()
        if hasattr(task, "planned"):
            source = types.SimpleNamespace(packed=False)  # which the examples' shapes do not tell
            about = {"batch_size": self.data.batch_size, "num_units": self.examples, "source": lambda split: source}
            task, total = task.planned(types.SimpleNamespace(data=self.data, **about), self.loop, total)
        params = jax.eval_shape(task.init, jax.random.key(0), self.spec)["params"]
        program = parallel.program(
            task,
            optimizer.transform(params, total),
            self.spec,
            mesh,
            seed=config.seed,
            numbers=optimizer.numbers(total),
            sharding=loop.sharding,
            mode=loop.parallel,
            microbatches=loop.microbatches,
            ema_decay=loop.ema_decay,
            lazy_tables=loop.lazy_tables,
        )
        return program, mesh

    def served(self) -> dict[str, float]:
        """Bytes of the trained model, whole, by the scheme in which it is kept; without qwix, nothing."""
        *_, inner = pretrained.chain(build(self.config.task, self.dataset_info, _path="config.task"))
        with contextlib.suppress(UserError):
            return served_bytes(inner, self.spec)
        return {}

    def _with_remat(self, remat: str | None) -> ConfigDict:
        task = copy.deepcopy(self.config.task)
        for _, node in _remat_switches(task, ""):
            with node.unlocked():
                node.remat = remat != "off"
                if "remat_policy" in node and remat not in ("off", "on"):
                    node.remat_policy = remat
        return task

    def flags(self, choice: Choice) -> str:
        """What to add to the command line so that training runs this choice."""
        recipe = self.recipe()
        sizes = zip(AXES, choice.mesh, recipe.mesh, strict=True)
        flags = [f"--config.train.mesh.{axis}={n}" for axis, n, before in sizes if n != before]
        if choice.microbatches != recipe.microbatches:
            flags.append(f"--config.train.microbatches={choice.microbatches}")
        if choice.remat != recipe.remat:
            for path, node in self._switches:
                flags.append(f"--{path}.remat={choice.remat != 'off'}")
                if "remat_policy" in node and choice.remat not in ("off", "on"):
                    flags.append(f"--{path}.remat_policy={choice.remat}")
        return " ".join(flags)

    def steps(self) -> int:
        """Steps of the whole run; of what is not trained, none."""
        if not self.trains:
            return 0
        return self.loop.total_steps(self.examples / (self.data.get("poisson") or self.data.batch_size))


class _Tried:
    """The choices of a search that were compiled, none of them twice, no more than ``limit``."""

    def __init__(self, planner: Planner, limit: int):
        self._planner, self._limit = planner, limit
        self.plans: list[Plan] = []

    @property
    def count(self) -> int:
        return len(self.plans)

    def fitting(self) -> bool:
        return any(plan.fits for plan in self.plans)

    def attempt(self, choice: Choice) -> Plan | None:
        """The choice's plan; None where the devices cannot run it or the limit is reached."""
        plan = next((plan for plan in self.plans if plan.choice == choice), None)
        if plan is None and self.count < self._limit and self._planner.worth_compiling(choice):
            say(f"plan: compiling {self.count + 1} of at most {self._limit}: {choice.words()}")
            plan = self._planner.plan(choice, QUICK)
            self.plans.append(plan)
        return plan

    def ranked(self) -> list[Plan]:
        """Fastest first, then least memory first."""
        return sorted(self.plans, key=Plan.rank)


Known = tuple[Mapping[str, Any], dict[str, jax.ShapeDtypeStruct], int]
"""The facts of data, the shapes of a global batch, and how many training examples there are."""


def known_example(run: RunDir) -> Known:
    """What a run's folder says of its data.

    Raises:
      UserError: there is no run, or it does not say it.
    """
    counts = (run.read_json("lineage.json").get("data") or {}).get("splits") or {}
    return restored.dataset_info(run), restored.batch_spec(run), int(counts.get("train", 0))


def read_example(config: ConfigDict) -> Known:
    """What a recipe's data says.

    Only the first training example is read, where the data can be read in pieces, and nothing is kept on disk.
    """
    data: Data = build(config.data, _path="config.data")
    dataset: Any = data.dataset
    if not hasattr(dataset, "splits"):  # texts that become tokens must be read as a whole
        with tempfile.TemporaryDirectory(prefix="bigbase-plan-") as scratch:
            dataset = dataset.prepare(pathlib.Path(scratch), 0.0, say)
            example, count = _first(data, dataset)
    else:
        example, count = _first(data, dataset)
    rows = data.batch_size
    spec = {name: jax.ShapeDtypeStruct((rows, *x.shape), x.dtype) for name, x in example.items()}
    spec["index"] = jax.ShapeDtypeStruct((rows,), np.int32)
    spec["mask"] = jax.ShapeDtypeStruct((rows,), np.float32)
    return dataset.dataset_info, spec, count


def _first(data: Data, dataset: Any) -> tuple[dict[str, np.ndarray], int]:
    if "train" not in dataset.splits or not len(dataset.splits["train"]):
        raise UserError("the data has no training examples, whose shapes a plan needs.")
    source = dataset.splits["train"]
    example = apply_eval(data.train_transforms, source[0], data.seed)
    return {name: as_array(value) for name, value in example.items()}, len(source)


def _remat_switches(node: Any, path: str) -> Iterator[tuple[str, ConfigDict]]:
    """Paths and nodes of all models that can compute activations again."""
    if isinstance(node, ConfigDict):
        if isinstance(node.get("remat"), bool):
            yield path, node
        for key, value in node.items():
            yield from _remat_switches(value, f"{path}.{key}")


# ---------------------------------------------------------------------------------------------------------- the outcome


class Plan:
    """One compiled step and what follows from it.

    Attributes:
      planner: of which recipe and topology.
      choice: of what a search varies.
      work: what a device does in a step; None where the compiler found that it does not fit.
      needed: bytes of memory that a device needs; at least these, if ``work`` is None.
      fits: whether a device has them.
    """

    def __init__(
        self,
        planner: Planner,
        choice: Choice,
        mesh: Any,
        state: Any,
        lowered: Any,
        compiled: Any,
        needed: float | None,
        level: int,
        compile_seconds: float,
    ):
        self.planner, self.choice, self.mesh, self.level = planner, choice, mesh, level
        self.compile_seconds = compile_seconds
        batch = _bytes(parallel.placed_batch(planner.spec, mesh))
        self.parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
        self.parts = {
            "parameter_bytes": _bytes(state.params),
            "model_state_bytes": _bytes(state.model_state),
            "optimizer_bytes": _bytes(state.opt_state),
            "ema_bytes": _bytes(state.ema),
            "batch_bytes": batch,
            "prefetched_batch_bytes": PREFETCHED * batch,
        }
        self.work: Work | None = None
        self.step_seconds_compiler: float | None = None
        if compiled is None:
            assert needed is not None
            self.needed = max(needed, sum(self.parts.values()))
        else:
            self._read(lowered, compiled)
        self.usable = planner.chip.memory - planner.chip.reserve
        self.fits = compiled is not None and self.needed <= self.usable

    def _read(self, lowered: Any, compiled: Any) -> None:
        stats = compiled.memory_analysis()
        arguments = float(stats.argument_size_in_bytes)
        known = sum(self.parts.values()) - self.parts["prefetched_batch_bytes"]
        self.parts["activation_and_temporary_bytes"] = float(stats.temp_size_in_bytes)
        self.parts["program_bytes"] = float(stats.generated_code_size_in_bytes)
        new = float(stats.output_size_in_bytes - stats.alias_size_in_bytes)
        self.parts["padding_and_output_bytes"] = max(arguments - known, 0.0) + max(new, 0.0)
        self.needed = sum(self.parts.values())
        module = Module(compiled.as_text())
        self.work = module.work()
        self._dtypes = self.work.matmul_flops
        if self.planner.target.is_tpu:
            once = module.work(loops=False)
            analysis = compiled.cost_analysis() or {}
            seconds = compiler_seconds(float(analysis.get("optimal_seconds", 0.0)))
            if seconds:
                # It counts loops once, and no collectives.
                self.step_seconds_compiler = seconds * sum(self._terms(self.work)[:2]) / sum(self._terms(once)[:2])
        else:
            # The CPU's compiler may turn bfloat16 into float32: the program as written tells the types.
            self._dtypes = Module(lowered.compiler_ir("hlo").as_hlo_text()).work().matmul_flops

    def _terms(self, work: Work) -> tuple[float, float, float]:
        """Seconds of compute, memory and interconnect."""
        chip = self.planner.chip
        peak = {dtype: chip.flops_32 if dtype in ("f32", "f64") else chip.flops_16 for dtype in self._dtypes}
        share = sum(flops / peak[dtype] for dtype, flops in self._dtypes.items()) / (sum(self._dtypes.values()) or 1.0)
        compute = sum(work.matmul_flops.values()) * share
        devices = list(self.mesh.devices.flat)
        sent = sum(
            c.moved / topology.link_bandwidth(self.planner.target, chip, [devices[i] for i in c.group])
            for c in work.collectives
            if c.moved
        )
        return compute, work.memory_bytes / chip.bandwidth, sent

    def times(self) -> dict[str, float | None]:
        """Seconds of a step, by the module's formulas."""
        assert self.work is not None
        terms = self._terms(self.work)
        roofline, total = max(terms), sum(terms)
        compiler = self.step_seconds_compiler
        return {
            "compute_seconds": terms[0],
            "memory_seconds": terms[1],
            "interconnect_seconds": terms[2],
            "step_seconds_roofline": roofline,
            "step_seconds_without_overlap": total,
            "step_seconds_compiler": compiler,
            "step_seconds": total if compiler is None else max(compiler, *terms[:2]) + terms[2],
        }

    def rank(self) -> tuple[bool, float]:
        """Orders plans: those that fit, by time; then the others, by memory."""
        return not self.fits, (self.times()["step_seconds"] or 0.0) if self.fits else self.needed

    def shortage(self) -> str:
        """By how much it does not fit."""
        least = "at least " if self.work is None else ""
        return (
            f"does not fit: {least}{_gib(self.needed)} needed of {_gib(self.usable)} per device, "
            f"{_gib(self.needed - self.usable)} too much"
        )

    def numbers(self, price: float | None = None) -> dict[str, Any]:
        """All of it, JSON-able."""
        planner, chip = self.planner, self.planner.chip
        found: dict[str, Any] = {
            "topology": planner.target.name,
            "device": planner.target.kind,
            "devices": len(planner.devices),
            "chips": planner.target.chips,
            "compiler": "TPU" if planner.target.is_tpu else "CPU, simulated devices",
            "compiler_optimization_level": self.level,
            "compile_seconds": self.compile_seconds,
            "mesh": dict(zip(AXES, self.choice.mesh, strict=True)),
            "microbatches": self.choice.microbatches,
            "remat": self.choice.remat,
            "flags": planner.flags(self.choice),
            "batch_size": planner.data.batch_size,
            "parameters": self.parameters,
            "trains": planner.trains,
            "fits": self.fits,
            "memory_bytes": chip.memory,
            "memory_reserve_bytes": chip.reserve,
            "memory_usable_bytes": self.usable,
            "memory_needed_bytes": self.needed,
            **self.parts,
            "peak_flops_16bit": chip.flops_16,
            "peak_flops_32bit": chip.flops_32,
            "memory_bandwidth": chip.bandwidth,
        }
        steps = planner.steps()
        found["steps"], found["price_usd_per_device_hour"] = steps, price
        if self.work is None:
            return found
        times = self.times()
        seconds = times["step_seconds"] or math.inf
        hours = steps * seconds / 3600
        counts: dict[str, float] = {}
        for collective in self.work.collectives:
            if collective.moved:
                counts[collective.kind] = counts.get(collective.kind, 0.0) + collective.times
        return {
            **found,
            "flops": self.work.flops,
            "matmul_flops": dict(self.work.matmul_flops),
            "memory_traffic_bytes": self.work.memory_bytes,
            "collective_bytes": self.work.collective_bytes(),
            "collective_operations": counts,
            "loops_of_unknown_length": self.work.unknown_loops,
            **times,
            "mfu": self.work.flops / seconds / chip.flops_16,
            "examples_per_second": planner.data.batch_size / seconds,
            "hours": hours,
            "device_hours": hours * len(planner.devices),
            "cost_usd": None if price is None else hours * len(planner.devices) * price,
        }

    def row(self, recipe: Choice) -> dict[str, Any]:
        """One line of a search."""
        numbers = self.numbers()
        keys = ("mesh", "microbatches", "remat", "fits", "memory_needed_bytes", "step_seconds", "mfu", "flags")
        return {**{key: numbers.get(key) for key in keys}, "is_the_recipe": self.choice == recipe}


@contextlib.contextmanager
def not_cached() -> Iterator[None]:
    """Programs for devices that are not here can be written to JAX's compilation cache, but not read from it."""
    before = jax.config.values["jax_enable_compilation_cache"]
    _enable_cache(False)
    try:
        yield
    finally:
        _enable_cache(before)


def _enable_cache(enable: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enable)
    compilation_cache.reset_cache()  # which has remembered the option


def compiler_seconds(reported: float) -> float | None:
    """The TPU compiler's ``optimal_seconds``, which is the sum over the program's operations; each one that it cannot
    judge (such as the views that join the pieces of a copy) counts -1 s there. None where it says nothing."""
    if not math.isfinite(reported) or reported == 0:
        return None
    return reported if reported > 0 else reported + math.ceil(-reported)


def _out_of_memory(message: str) -> float | None:
    """The bytes that the TPU compiler found to be needed; None for another error."""
    unit = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}
    found = re.search(r"\(([\d.]+)([KMGT]?)B?\) exceeds available", message) or re.search(
        r"Used ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm", message
    )
    return float(found[1]) * unit[found[2]] if found else None


def _bytes(tree: PyTree) -> float:
    """Bytes of one device's pieces of a tree of shapes with shardings."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        key = jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += 8.0 if key else math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    return total


# ------------------------------------------------------------------------------------------------------------ the table


def _print(planner: Planner, plan: Plan, result: dict[str, Any], tried: Sequence[Plan]) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    chip, target = planner.chip, planner.target
    title = f"{target.name}: {len(planner.devices)} devices, {plan.choice.words()}"
    table = Table(title=title if planner.trains else f"{title}, evaluating", title_justify="left")
    table.add_column("per device")
    table.add_column("", justify="right")
    table.add_column("")

    def line(name: str, value: str, note: str = "") -> None:
        table.add_row(name, value, note)

    notes = {
        "parameter_bytes": f"{plan.parameters:,} in all",
        "batch_bytes": f"{planner.data.batch_size} examples in all",
        "prefetched_batch_bytes": f"{PREFETCHED} wait on the device",
        "activation_and_temporary_bytes": "gradients too",
    }
    for key, nbytes in plan.parts.items():
        if nbytes:
            line(key.removesuffix("_bytes").replace("_", " "), _gib(nbytes), notes.get(key, ""))
    reserve = f"{_gib(chip.memory)} less {_gib(chip.reserve)} for the runtime"
    if target.kind == topology.CPU:
        reserve = f"{_gib(chip.memory)}, its share of this machine, less {_gib(chip.reserve)} of this process"
    line("memory needed", _gib(plan.needed), f"of {_gib(plan.usable)}: {reserve}")
    line("", "fits" if plan.fits else "DOES NOT FIT", "" if plan.fits else plan.shortage())
    if plan.work is not None:
        table.add_section()
        times = plan.times()
        line("floating-point operations", engineering(plan.work.flops), f"compute {_ms(times['compute_seconds'])}")
        line("memory traffic", engineering(plan.work.memory_bytes) + "B", f"memory {_ms(times['memory_seconds'])}")
        for kind, nbytes in plan.work.collective_bytes().items():
            count = result["collective_operations"][kind]
            line(kind, engineering(nbytes) + "B", f"sent in {count:,.0f} operations")
        line("interconnect", "", _ms(times["interconnect_seconds"]))
        table.add_section()
        line("step, roofline", _ms(times["step_seconds_roofline"]), "the largest of the three: all overlaps")
        line("step, without overlap", _ms(times["step_seconds_without_overlap"]), "their sum")
        if times["step_seconds_compiler"] is not None:
            line("step, compiler's estimate", _ms(times["step_seconds_compiler"]), "without collectives")
        how = "their sum" if times["step_seconds_compiler"] is None else "the compiler's, and interconnect"
        line("step", _ms(times["step_seconds"]), f"{how}; what follows is from this")
        line("MFU", f"{result['mfu']:.1%}", f"of {chip.flops_16 / 1e12:,.4g} TFLOP/s; what is computed again counts")
        table.add_section()
        line(
            "examples/s, all devices",
            f"{result['examples_per_second']:,.{0 if result['examples_per_second'] >= 100 else 3}f}",
        )
        if planner.trains:
            line(
                "training", duration(3600 * result["hours"]), f"{result['steps']:,} steps, without evaluation and start"
            )
        if planner.trains and result["cost_usd"] is not None:
            price = result["price_usd_per_device_hour"]
            line("cost", f"${result['cost_usd']:,.2f}", f"{result['device_hours']:,.4g} device hours at ${price:g}")
    table.add_section()
    for name, nbytes in result["served_bytes"].items():
        line(f"served, {name}", _gib(nbytes), f"read once in {_ms(nbytes / chip.bandwidth)}: a batch takes no less")
    console.print(table)
    if not target.is_tpu:
        console.print(
            "From the CPU's compiler over simulated devices. It fuses less than a GPU's, computes bfloat16 as float32\n"
            "in places and reduces gradients whole: memory and traffic are upper bounds for GPUs."
            if target.kind != topology.CPU
            else "The machine's peak and bandwidth were measured just now; the simulated devices share them."
        )
    if tried:
        _print_search(console, planner, tried)


def _print_search(console: Console, planner: Planner, tried: Sequence[Plan]) -> None:
    table = Table(title="tried, fastest first", title_justify="left")
    for column in ("mesh, microbatches, remat", "memory", "step", "MFU"):
        table.add_column(column, justify="left" if column.startswith("mesh") else "right")
    for plan in tried:
        words = plan.choice.words() + (" (the recipe)" if plan.choice == planner.recipe() else "")
        if plan.fits:
            table.add_row(words, _gib(plan.needed), _ms(plan.times()["step_seconds"]), f"{plan.numbers()['mfu']:.1%}")
        else:
            table.add_row(words, _gib(plan.needed), "does not fit", "")
    console.print(table)
    if not tried or not tried[0].fits:
        console.print("nothing that was tried fits: use more devices, a smaller batch or a smaller model")
    elif tried[0].choice != planner.recipe():
        console.print(f"the fastest: add {planner.flags(tried[0].choice)}", soft_wrap=True)
    if tried and planner.target.is_tpu:
        console.print("The search compiles with less effort than training does: its times may be off by a third.")


def _gib(nbytes: float) -> str:
    if nbytes < 2**20:
        return f"{nbytes / 2**10:,.1f} KiB"
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:,.1f} MiB"


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:,.4g} ms"
