"""How the C library hands out memory, where the host is what computes."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys

_ACCELERATORS = ("nvidia0", "kfd", "accel*", "vfio/[0-9]*")
VARIABLE = "GLIBC_TUNABLES"
TUNABLES = {
    "hugetlb": 1,  # pages of 2 MiB where the system lets programs ask for them; from glibc 2.35 on
    "mmap_threshold": 32 * 2**20,  # larger blocks would also leave gaps that nothing fits
    "top_pad": 64 * 2**20,
    "trim_threshold": 2**31 - 1,
}
"""Of ``glibc.malloc``: https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html."""


def has_accelerators() -> bool:
    """Whether a driver shows GPUs or TPUs, which JAX is not to be asked yet."""
    return any(next(pathlib.Path("/dev").glob(pattern), None) for pattern in _ACCELERATORS)


def start_anew() -> None:
    """Replaces this process by the same command under ``TUNABLES``, which glibc reads at the start of a process only.

    XLA's CPU backend asks for the temporary buffers of a step anew at every step, and the system clears each page of
    them when it is touched: 170,000 pages of 4 KiB in the step of a small BERT. With large pages, and small blocks
    kept, steps of transformers take 0.82 to 0.89 of the time and no more memory; small convolutional networks gain
    nothing. Keeping large blocks as well is no setting of glibc's: its aligned blocks do not fit into the gap that the
    last one left, and memory grew to three times a step's. jemalloc can keep them (``docs/install.md``).

    To be called before anything is imported or opened. The number of the process, its files and its ignored signals
    stay, and processes that it starts inherit the variable.

    Nothing happens where the environment says how to allocate: ``GLIBC_TUNABLES= python launch.py ...`` turns this off.
    Nor where there are accelerators, where the C library is another, or where this process is not that of the command
    alone, but of a test, a debugger or a notebook.
    """
    said = any(name.startswith((VARIABLE, "MALLOC_", "LD_PRELOAD")) for name in os.environ)
    if said or not _is_alone() or not _is_glibc() or has_accelerators():
        return
    tunables = ":".join(f"glibc.malloc.{name}={value}" for name, value in TUNABLES.items())
    with contextlib.suppress(OSError):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, VARIABLE: tunables})


def _is_alone() -> bool:
    """Whether this process was started as ``python [options] SCRIPT ARGUMENTS`` and does nothing else."""
    options, words = sys.orig_argv[1 : -len(sys.argv)], sys.orig_argv[-len(sys.argv) :]
    only_options = all(
        word.startswith("-") or before in ("-X", "-W") for before, word in zip(sys.orig_argv, options, strict=False)
    )
    return words == sys.argv and only_options and sys.gettrace() is None and "jax" not in sys.modules


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, OSError, ValueError):
        return False
