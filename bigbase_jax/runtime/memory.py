"""How the C library hands out memory, where the host is what computes."""

from __future__ import annotations

import ctypes
import os
import pathlib
import sys

# mallopt(3): the names' numbers are glibc's, and part of its interface.
_MMAP_THRESHOLD, _TOP_PAD, _TRIM_THRESHOLD = -3, -2, -1
_ACCELERATORS = ("nvidia0", "kfd", "accel*", "vfio/[0-9]*")
_LARGE = 32 * 2**20  # the most that glibc takes; larger blocks would also leave gaps that nothing fits
_PAD = 64 * 2**20


def has_accelerators() -> bool:
    """Whether a driver shows GPUs or TPUs, which JAX is not to be asked yet."""
    return any(next(pathlib.Path("/dev").glob(pattern), None) for pattern in _ACCELERATORS)


def keep_freed() -> bool:
    """Lets this process keep the memory that it frees in blocks of up to 32 MiB, on a machine without accelerators.

    XLA's CPU backend asks for the temporary buffers of a step anew at every step. glibc returns what is large to the
    system and has every page of it cleared when it is touched again, which takes a third of a small model's step
    (``experiments/char_lm``). Nothing is changed where the environment says how to allocate (``MALLOC_...``), or where
    the C library is another.

    Returns:
      Whether it was changed.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or not sys.platform.startswith("linux"):
        return False
    if has_accelerators():
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl
        return False
    limits = ((_MMAP_THRESHOLD, _LARGE), (_TOP_PAD, _PAD), (_TRIM_THRESHOLD, 2**31 - 1))
    changed = [mallopt(name, value) == 1 for name, value in limits]
    return all(changed)
