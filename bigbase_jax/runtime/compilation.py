"""How programs are compiled, and that they outlast the process."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

import jax

from bigbase_jax.runtime.log import say

# What XLA's CPU compiler gives to YNNPACK. Its sums take a twentieth off a step's time, ResNet-18's a fifth; of
# convolutions' weight gradients Eigen takes 0.15 to 0.6 of its time (``experiments/cpu_speed``).
_YNNPACK = "--xla_cpu_experimental_ynn_fusion_type"
_USED = "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"


def setup() -> None:
    """What every verb needs of JAX: a compilation cache that lasts, so that the second start is fast, and XLA's flags.

    Flags reach XLA only before the first compilation of a process. What the user's ``XLA_FLAGS`` say stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _YNNPACK not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_YNNPACK}={_USED}".strip()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "bigbase_jax", "xla"))
    if not os.environ.get("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if getattr(warnings.showwarning, "func", None) is not _show_warning:
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning, [])


def _show_warning(show: Callable[..., None], told: list[str], message: Any, *args: Any, **kwargs: Any) -> None:
    """Of a compilation cache on a full or read-only disk JAX warns for each program; one line is enough."""
    if "persistent compilation cache" not in str(message):
        show(message, *args, **kwargs)
    elif not told:
        told.append(str(message).partition(": ")[2])
        folder = jax.config.values["jax_compilation_cache_dir"]
        say(f"the compilation cache {folder} cannot be used ({told[0]}); each start compiles anew")
