"""One process that has imported the package, and a fork of it for each command: the imports are paid once.

The parent computes nothing and starts no thread, so that a fork is as good as a fresh process: with flags, signals, a
working directory and devices of its own.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pathlib
import pkgutil
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300  # seconds after which a command is given up
SLOW_TO_IMPORT = ("sklearn.metrics", "sacrebleu", "tokenizers", "safetensors.numpy")
EARLY = ("JAX_", "PYTHON", "XDG_", "TF_", "LD_")  # variables that are read while something is imported


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float  # of processors, those of its children included


class Forks:
    """Runs commands in forks of a process that it starts; to be closed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bigbase-forks-")
        self._env = _environment({})
        command = [sys.executable, __file__]
        pipe = subprocess.PIPE
        self._server = subprocess.Popen(command, cwd=ROOT, env=self._env, stdin=pipe, stdout=pipe, text=True)

    def run(
        self,
        *argv: str,
        script: str = str(ROOT / "launch.py"),
        code: str | None = None,
        cwd: pathlib.Path = ROOT,
        **env: str,
    ) -> Done:
        """``script`` with these arguments, or Python code, to its end, with ``env`` beside the environment here.

        Where the environment differs from that of the first command in one of ``EARLY``, it is a fresh process.
        """
        wanted = _environment(env)
        changed = {name for name in {*wanted, *self._env} if wanted.get(name) != self._env.get(name)}
        if any(name.startswith(EARLY) for name in changed):
            command = [sys.executable, script, *argv] if code is None else [sys.executable, "-c", code]
            done = subprocess.run(command, cwd=cwd, env=wanted, capture_output=True, text=True, timeout=LIMIT)
            return Done(done.returncode, done.stdout, done.stderr, 0.0)
        out, err = (pathlib.Path(self._folder.name) / name for name in ("out", "err"))
        asked = {
            "argv": [script, *argv],
            "code": code,
            "cwd": str(cwd),
            "env": {name: wanted.get(name) for name in changed},
            "out": str(out),
            "err": str(err),
        }
        assert self._server.stdin and self._server.stdout
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        status, seconds = json.loads(self._server.stdout.readline())
        return Done(status, out.read_text(), err.read_text(), seconds)

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(60)
        self._folder.cleanup()


@functools.cache
def shared() -> Forks:
    """The forks of this process's tests."""
    forks = Forks()
    atexit.register(forks.close)
    return forks


def _environment(env: dict[str, str]) -> dict[str, str]:
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**here, "XLA_FLAGS": "", "BIGBASE_PLAIN": "1", **env}


def _child(asked: dict) -> None:
    """Leaves as any process does, but for taking the interpreter apart, which would copy all memory of the parent."""
    try:
        _command(asked)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.main_thread():
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _command(asked: dict) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for name, value in asked["env"].items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    signal.alarm(LIMIT)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.argv = asked["argv"]
    os.chdir(asked["cwd"])
    if asked["code"] is None:
        runpy.run_path(sys.argv[0], run_name="__main__")
    else:
        exec(asked["code"], {"__name__": "__main__"})


def _serve() -> None:
    sys.path[0] = str(ROOT)
    import bigbase_jax

    for module in pkgutil.walk_packages(bigbase_jax.__path__, "bigbase_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    importlib.import_module("bigbase_jax.runtime.log").tensorboard()
    gc.collect()
    gc.freeze()  # a collection in a fork would copy what it looks at
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _child(json.loads(line))
        _, ended, used = os.wait4(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(ended), round(used.ru_utime + used.ru_stime, 2)]), flush=True)


if __name__ == "__main__":
    _serve()
