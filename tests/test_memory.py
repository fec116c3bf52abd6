"""A command starts anew, once, under the settings of the C library that a CPU wants; nothing else changes."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from bigbase_jax.runtime import memory

COMMAND = """
import os, sys
sys.path.insert(0, {root!r})
from bigbase_jax.runtime import memory
memory.has_accelerators = lambda: {accelerators}
before = os.environ.get("STARTED_BY")
os.environ["STARTED_BY"] = str(os.getpid())
memory.start_anew()
print(before == str(os.getpid()), os.environ.get(memory.VARIABLE), sys.argv[1:], sys.flags.utf8_mode, sys._xoptions)
print(os.read(int(sys.argv[1]), 9).decode(), sys.stdin.readline().strip(), flush=True)
{end}
"""
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(memory.__file__))).removesuffix("bigbase_jax")
glibc = pytest.mark.skipif(not memory._is_glibc(), reason="the C library is not glibc")


def command(tmp_path, *argv, end="", accelerators=False, before=(), **env):
    """A process that starts anew, or not, and says what it is then."""
    script = tmp_path / "command.py"
    script.write_text(COMMAND.format(root=ROOT, end=end, accelerators=accelerators))
    said = ("GLIBC_", "MALLOC_", "LD_PRELOAD")
    here = {name: value for name, value in os.environ.items() if not name.startswith(said)}
    read, write = os.pipe()
    os.write(write, b"through a")
    argv = [sys.executable, "-X", "utf8", *before, str(script), str(read), *argv]
    try:
        return subprocess.run(
            argv, env={**here, **env}, pass_fds=[read], input="a line", capture_output=True, text=True
        )
    finally:
        os.close(read)
        os.close(write)


@glibc
def test_a_command_starts_anew_once_and_is_the_same_command(tmp_path):
    done = command(tmp_path, "--a=b c", "", "--config.x=(1, 2)")
    anew, variable, rest = re.match(r"(\w+) (\S+) (.*)\n", done.stdout).groups()
    assert anew == "True"  # the process has the same number, and did not start a third time
    assert variable == ":".join(f"glibc.malloc.{name}={value}" for name, value in memory.TUNABLES.items())
    assert re.fullmatch(r"\['\d+', '--a=b c', '', '--config.x=\(1, 2\)'\] 1 \{'utf8': True\}", rest)
    assert done.stdout.splitlines()[1] == "through a a line"  # files that were open, and stdin
    assert (done.returncode, done.stderr) == (0, "")


@glibc
@pytest.mark.parametrize(
    ("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 15)", -signal.SIGTERM), ("1 / 0", 1)]
)
def test_how_it_ends_is_how_the_command_ends(tmp_path, end, status):
    done = command(tmp_path, end=end)
    assert done.stdout.startswith("True glibc.malloc.hugetlb=1")
    assert done.returncode == status


@pytest.mark.parametrize(
    "how",
    [
        {"GLIBC_TUNABLES": ""},
        {"GLIBC_TUNABLES": "glibc.malloc.check=0"},
        {"MALLOC_ARENA_MAX": "2"},
        {"LD_PRELOAD": ""},
        {"accelerators": True},
        {"before": ["-c", "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"]},
    ],
    ids=str,
)
def test_it_goes_on_as_it_is(tmp_path, how):
    done = command(tmp_path, **how)
    assert done.stdout.startswith(f"False {how.get('GLIBC_TUNABLES')} "), done.stderr
    assert done.returncode == 0


@glibc
def test_a_mistake_on_the_command_line_is_still_one_sentence():
    env = {name: value for name, value in os.environ.items() if name != memory.VARIABLE}
    argv = [sys.executable, os.path.join(ROOT, "launch.py"), "--mode=trian"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no --mode=trian. Did you mean 'train'?\n"


@glibc
def test_a_kernel_that_has_huge_pages_gives_them(tmp_path):
    """What the tunable is for: far fewer page faults for a block that is too large to be kept."""
    path = "/sys/kernel/mm/transparent_hugepage/enabled"
    if not os.path.exists(path) or "[madvise]" not in pathlib.Path(path).read_text() or memory.has_accelerators():
        pytest.skip("the system does not let programs ask for huge pages")
    end = (
        "import resource; f = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt; n = f(); "
        "b'x' * 2**27; print(f() - n)"
    )
    small, huge = (int(command(tmp_path, end=end, **env).stdout.split()[-1]) for env in ({memory.VARIABLE: ""}, {}))
    assert small > 2**27 / os.sysconf("SC_PAGESIZE") * 0.9
    assert huge < small / 10
