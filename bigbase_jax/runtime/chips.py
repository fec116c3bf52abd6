"""What vendors say of accelerators: peak arithmetic, memory, links. Planning and the log's MFU read the same table.

All figures are of one JAX device, dense (no sparsity), in FLOP/s, bytes and bytes/s. Memory is what the vendor sells;
``reserve`` is what the runtime keeps for itself.

Sources: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} ("bidirectional ICI bandwidth" is twice the sum of the links'
one-way figures below); Jouppi et al. 2023 (v4: six links of 50 GB/s); the reserve of TPUs is what the TPU compiler of
libtpu 0.0.42 leaves of them ("exceeds available HBM (15.75G)"). NVIDIA's data sheets of A100, H100, H200 (SXM): NVLink
3 and 4 move 300 and 450 GB/s one way; their machines (DGX, HGX) hold eight, with one network port of 200 or 400 Gbit/s
for each. The reserve of GPUs is JAX's own: XLA_PYTHON_CLIENT_MEM_FRACTION is 0.75 unless it is set.
"""

from __future__ import annotations

import dataclasses
import re

GIB = 2.0**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
      pattern: found in JAX's ``device_kind``.
      flops_16: peak of matrix products of bfloat16 (fp16 where the chip has no bfloat16).
      flops_32: peak of matrix products of float32 as JAX runs them by default: bfloat16 passes on TPUs, TF32 on GPUs
        since Ampere; 0: not known here.
      memory: bytes; 0: not known here, and so on.
      reserve: bytes of it that programs cannot have.
      bandwidth: of the memory.
      link: of one link to a neighbour, one way.
      wraps: a dimension of a slice closes to a ring where its length is a multiple of this; 0: links do not form a
        torus (GPUs, where ``link`` is to the switch).
      max_chips: of one slice.
      node: devices that share the fast links; beyond them ``network`` counts. 0: all do.
      network: bytes/s of a device beyond its node, one way.
      per_chip: JAX devices on a chip.
    """

    pattern: str
    flops_16: float
    flops_32: float = 0.0
    memory: float = 0.0
    reserve: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    wraps: int = 0
    max_chips: int = 0
    node: int = 0
    network: float = 0.0
    per_chip: int = 1


def _tpu(
    pattern: str,
    flops: float,
    memory: float,
    reserve: float,
    bandwidth: float,
    link: float,
    wraps: int,
    max_chips: int,
    per_chip: int = 1,
) -> Chip:
    return Chip(
        pattern, flops, flops, memory, reserve, bandwidth, link, wraps=wraps, max_chips=max_chips, per_chip=per_chip
    )


CHIPS: dict[str, Chip] = {
    "v4": _tpu(r"TPU v4\b", 275e12, 32 * GIB, 1.25 * GIB, 1200e9, 50e9, 4, 4096),
    "v5e": _tpu(r"TPU v5 ?lite|TPU v5e", 197e12, 16 * GIB, 0.25 * GIB, 819e9, 50e9, 16, 256),
    "v5p": _tpu(r"TPU v5p?\b", 459e12, 95.74 * GIB, 0.0, 2765e9, 100e9, 4, 6144),
    "v6e": _tpu(r"TPU v6 ?lite|TPU v6e", 918e12, 32 * GIB, 0.75 * GIB, 1638e9, 100e9, 16, 256),
    "tpu7x": _tpu(r"TPU ?7x", 1153.5e12, 96 * GIB, 1.25 * GIB, 3690e9, 50e9, 4, 9216, per_chip=2),
    "b200": Chip(r"\bB200\b", 2250e12),
    "h200": Chip(r"\bH200\b", 989e12, 494e12, 141e9, 0.25 * 141e9, 4800e9, 450e9, node=8, network=50e9),
    "h100-pcie": Chip(r"\bH100 PCIe\b", 756e12),
    "h100-nvl": Chip(r"\bH100 NVL\b", 835e12),
    "h100": Chip(r"\bH100\b", 989e12, 494e12, 80e9, 0.25 * 80e9, 3350e9, 450e9, node=8, network=50e9),
    "a100": Chip(r"\bA100\b", 312e12, 156e12, 80e9, 0.25 * 80e9, 2039e9, 300e9, node=8, network=25e9),
    "l40s": Chip(r"\bL40S\b", 362e12),
    "l40": Chip(r"\bL40\b", 181e12),
    "l4": Chip(r"\bL4\b", 121e12),
    "a10g": Chip(r"\bA10G\b", 70e12),
    "a10": Chip(r"\bA10\b", 125e12),
    "rtx-4090": Chip(r"\bRTX 4090\b", 165e12),
    "rtx-3090": Chip(r"\bRTX 3090\b", 71e12),
    "t4": Chip(r"\bT4\b", 65e12),
    "v100": Chip(r"\bV100\b", 125e12),
}
"""By the name that ``--topology`` takes. Order matters: the first pattern that is found in a kind wins."""


PLANNED = tuple(name for name, chip in CHIPS.items() if chip.memory)
"""Those of which enough is known to plan a run."""


def peak_flops(kind: str) -> float | None:
    """Peak dense 16-bit FLOP/s of a device of this ``device_kind``; None where it is not known."""
    return next((chip.flops_16 for chip in CHIPS.values() if re.search(chip.pattern, kind, re.IGNORECASE)), None)
