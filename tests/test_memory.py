"""What a process frees stays its own where it is asked to."""

import os
import subprocess
import sys

import pytest

from bigbase_jax.runtime import memory

TOUCH = """
import resource, sys
from bigbase_jax.runtime import memory
if "keep" in sys.argv:
    print(memory.keep_freed())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        b"x" * 2**24  # 4,096 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def touch(*args: str, **extra: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env.update({"MALLOC_MMAP_THRESHOLD_": "131072"} if not args else {}, **extra)
    done = subprocess.run([sys.executable, "-c", TOUCH, *args], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(memory.ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_memory_that_was_freed_is_not_cleared_again():
    if memory.has_accelerators():
        assert touch("keep")[0] == "False"
        return
    kept, faults = touch("keep")
    (returned,) = touch()
    assert kept == "True"
    assert int(returned) > 20 * 4096 * 0.9  # every page, every time
    assert int(faults) < 500


def test_what_the_environment_says_is_left_alone():
    assert touch("keep", MALLOC_ARENA_MAX="2")[0] == "False"
