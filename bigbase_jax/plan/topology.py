"""Machines that are not here: the devices that ``--topology=v5e:4x4`` or ``h100:8`` names, to compile and plan for."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.runtime.chips import CHIPS, PLANNED, Chip

CPU = "cpu"
EXAMPLES = "v5e:4x4, v5p:4x4x4, h100:8 or cpu:8"


@dataclasses.dataclass(frozen=True)
class Topology:
    """A kind of device and how many of them, in what shape.

    Attributes:
      name: as the user wrote it.
      kind: a key of ``chips.CHIPS``, or "cpu".
      shape: chips along each dimension of a TPU slice; the number of devices otherwise.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler plans it."""
        return self.kind != CPU and CHIPS[self.kind].wraps > 0

    @property
    def chips(self) -> int:
        """Chips in it."""
        return math.prod(self.shape)


def parse(text: str | None) -> Topology:
    """``"v5e:4x4"`` -> the topology.

    Raises:
      UserError: it names nothing known, or a shape that does not exist.
    """
    if not text:
        raise UserError(f"--mode=plan needs --topology: the devices to plan for, as {EXAMPLES}.")
    kind, _, size = text.strip().lower().partition(":")
    known = (*PLANNED, CPU)
    if kind not in known:
        raise UserError(f"--topology={text}: there is no {kind!r}.{suggest(kind, known, 'device')}")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"--topology={text} does not say how many devices; write it as {EXAMPLES}.")
    found = Topology(text, kind, tuple(int(n) for n in size.split("x")))
    if not found.is_tpu:
        if len(found.shape) != 1:
            raise UserError(f"--topology={text}: {kind} devices have no shape; write {kind}:{found.chips}.")
        return found
    flat = kind in ("v5e", "v6e")
    if len(found.shape) != (2 if flat else 3):
        raise UserError(f"--topology={text}: a slice of {kind} is {kind}:{'4x4' if flat else '4x4x4'} or the like.")
    most = CHIPS[kind].max_chips
    if found.chips > most:
        raise UserError(f"--topology={text} has {found.chips} chips; the largest slice of {kind} has {most}.")
    return found


def devices(topology: Topology) -> Sequence[Any]:
    """The topology's devices: those of the TPU compiler, or this machine's CPU taken for that many.

    Must be called before JAX starts its backend, or the backend must have enough CPU devices already.

    Raises:
      UserError: libtpu is not installed or does not know such a slice, or the backend has fewer devices.
    """
    # No accelerator of this machine is wanted: a plan may be made while it works.
    _before_the_backend_starts("jax_platforms", "cpu")
    if not topology.is_tpu:
        _before_the_backend_starts("jax_num_cpu_devices", topology.chips)
        there = jax.devices("cpu")
        if len(there) < topology.chips:
            raise UserError(
                f"--topology={topology.name} needs {topology.chips} simulated devices, but JAX began with {len(there)}."
            )
        return there[: topology.chips]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name} needs the TPU compiler; pip install 'bigbase_jax[tpu]' (no TPU is needed)."
        )
    # What libtpu asks of a TPU machine's environment; it only compiles here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several plans at once
    options: dict[str, Any] = {}
    if topology.kind == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores are one device, as on the machines themselves
    padded = (*topology.shape, 1, 1)[:3]
    if topology.chips <= 4 and padded[:2] != (2, 2):  # less than a host of 2x2 chips
        options["chips_per_host_bounds"] = padded
    from jax.experimental import topologies

    name = f"{topology.kind}:{'x'.join(map(str, topology.shape))}"
    try:
        return topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices
    except Exception as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--topology={topology.name}: the TPU compiler knows no such slice ({said}).") from error


def _before_the_backend_starts(option: str, value: Any) -> None:
    with contextlib.suppress(RuntimeError):  # it has started: the caller sees what there is
        jax.config.update(option, value)


def chip(topology: Topology) -> Chip:
    """The data-sheet figures of one device; a CPU's are measured, and shared evenly by its simulated devices.

    For a CPU the reserve is what this process already holds. Takes about a second there.
    """
    if topology.kind != CPU:
        return CHIPS[topology.kind]
    n = topology.chips
    flops, bandwidth = measured_flops(), measured_bandwidth()
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Chip("cpu", flops / n, flops / n, memory / n, _resident() / n, bandwidth / n, bandwidth / 2 / n)


def measured_flops(side: int = 1536, seconds: float = 0.5) -> float:
    """FLOP/s of float32 matrix products on this machine's CPU: the best of several."""
    product = jax.jit(lambda a, b: a @ b)
    a = jnp.ones((side, side))
    return 2.0 * side**3 / _best(lambda: product(a, a).block_until_ready(), seconds)


def measured_bandwidth(megabytes: int = 256, seconds: float = 0.5) -> float:
    """Bytes/s between this machine's CPU and its memory, reading one array and writing another (McCalpin's STREAM
    "scale"): the best of several."""
    scale = jax.jit(lambda a: 3.0 * a)
    a = jnp.ones((megabytes * 250_000,))
    return 2.0 * a.nbytes / _best(lambda: scale(a).block_until_ready(), seconds)


def _best(call: Any, seconds: float) -> float:
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def _resident() -> float:
    """Bytes of memory that this process holds now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return 0.0


def link_bandwidth(topology: Topology, chip: Chip, group: Sequence[Any]) -> float:
    """Bytes/s that each device of a group can send to the others of it, one way.

    On a TPU, a group that reaches over k dimensions of the torus uses the links along these: two per dimension where
    the group takes all of one that closes to a ring, else one; cores of one chip exchange at the speed of all links. On
    GPUs, NVLink within a node, else the node's network port of that GPU. On a CPU, half the memory's bandwidth, for a
    copy reads and writes.
    """
    if topology.is_tpu:
        links = 0
        coordinates = [tuple(device.coords) for device in group]
        for dimension, length in enumerate(topology.shape):
            reached = len({c[dimension] for c in coordinates})
            if reached > 1:
                links += 2 if reached == length and length % chip.wraps == 0 else 1
        return chip.link * (links or 2 * len(topology.shape))
    if chip.node and len({device.id // chip.node for device in group}) > 1:
        return chip.network
    return chip.link
