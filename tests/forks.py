"""One process that has imported the package, and a fork of it for each command: the imports are paid once.

The parent computes nothing and starts no thread, so that a fork is as good as a fresh process: with flags, signals, a
working directory and devices of its own.
"""

import importlib
import json
import os
import pathlib
import pkgutil
import runpy
import signal
import subprocess
import sys
import traceback
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 300  # seconds after which a command is given up
SLOW_TO_IMPORT = ("tensorboardX", "sklearn.metrics", "sacrebleu", "tokenizers", "safetensors.numpy")


class Done(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str
    seconds: float  # of processors, those of its children included


class Forks:
    """Runs commands in forks of a process that it starts; to be closed."""

    def __init__(self, cwd: pathlib.Path, **env: str):
        environment = {**os.environ, "XLA_FLAGS": "", "BIGBASE_PLAIN": "1", **env}
        self._cwd = cwd
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *, argv: tuple[str, ...] = (), code: str | None = None, **env: str) -> Done:
        """``launch.py`` with these arguments, or Python code, to its end."""
        out, err = self._cwd / ".out", self._cwd / ".err"
        asked = {"argv": argv, "code": code, "env": env, "out": str(out), "err": str(err)}
        assert self._server.stdin and self._server.stdout
        print(json.dumps(asked), file=self._server.stdin, flush=True)
        status, seconds = json.loads(self._server.stdout.readline())
        return Done(status, out.read_text(), err.read_text(), seconds)

    def close(self) -> None:
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(60)


def _child(asked: dict) -> int:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(asked[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(asked["env"])
    signal.alarm(LIMIT)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    sys.argv = ["launch.py", *asked["argv"]]
    try:
        if asked["code"] is None:
            runpy.run_path("launch.py", run_name="__main__")
        else:
            exec(asked["code"], {"__name__": "__main__"})
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _serve() -> None:
    sys.path[0] = str(ROOT)
    import bigbase_jax

    for module in pkgutil.walk_packages(bigbase_jax.__path__, "bigbase_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in SLOW_TO_IMPORT:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(_child(json.loads(line)))
        _, ended, used = os.wait4(child, 0)
        print(json.dumps([os.waitstatus_to_exitcode(ended), round(used.ru_utime + used.ru_stime, 2)]), flush=True)


if __name__ == "__main__":
    _serve()
