"""``--mode=serve``: models over HTTP until a signal ends it."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Sequence
from typing import Any

import uvicorn

from bigbase_jax.core import UserError
from bigbase_jax.runtime import compilation, signals
from bigbase_jax.runtime.log import say
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

DRAIN = 30.0
"""Seconds that requests in progress get when the server ends."""


def serve(
    workdirs: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "jax",
    step: int | None = None,
    max_wait_ms: float = 5.0,
    max_batch: int = 32,
) -> int:
    """Serves the models of runs, or of published folders, until SIGTERM or Ctrl-C; requests in progress are answered.

    Prints one JSON line when all models are ready: ``{"serving": URL, "models": [...]}``.

    Args:
      workdirs: a folder for each model, which is called as the folder is, or as in NAME=FOLDER.
      host: what to listen on; other machines reach the server where it is not the loopback address.
      port: 0: a free one.
      engine, step: see ``Predictor.open``.
      max_wait_ms, max_batch: see ``Options``.

    Returns:
      The exit status, 0.

    Raises:
      UserError: a model cannot be loaded, or the address is taken.
    """
    compilation.setup()
    options, metrics = Options(max_batch=max_batch, max_wait_ms=max_wait_ms), Metrics()
    names = _names(workdirs)
    opener = functools.partial(Served.open, engine=engine, step=step, options=options, metrics=metrics)
    models = Models({name: functools.partial(opener, name, folder) for name, folder in names.items()})
    app = create(models, Settings(), metrics)
    bound = _bind(host, port)
    url = f"http://{host if ':' not in host else f'[{host}]'}:{bound.getsockname()[1]}"
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=int(DRAIN), server_header=False
    )
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    server = _Server(config)
    failed: list[BaseException] = []

    def load() -> None:
        try:
            models.load()
        except BaseException as error:
            failed.append(error)
            server.should_exit = True
        else:
            print(json.dumps({"serving": url, "models": models.names}), flush=True)

    def end(*_: Any) -> None:
        models.drain()
        server.force_exit = server.should_exit  # a second signal does not wait
        server.should_exit = True

    loading = threading.Thread(target=load, daemon=True)
    with signals.caught(end):
        loading.start()
        server.run([bound])
    if failed:
        raise failed[0]
    say("the last request is answered; the server ends")
    if loading.is_alive():  # in a compilation, which the interpreter cannot end
        os._exit(0)
    models.close(DRAIN)
    return 0


class _Server(uvicorn.Server):
    """Without handlers of signals of its own."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)


def _names(workdirs: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for given in workdirs:
        name, equals, folder = given.partition("=")
        if not equals or os.path.exists(given):
            name, folder = os.path.basename(os.path.realpath(os.path.expanduser(given))), given
        name = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
        if name in found:
            raise UserError(f"{found[name]} and {folder} would both be called {name!r}; say --workdir=NAME=FOLDER.")
        found[name] = folder
    if not found:
        raise UserError("--mode=serve needs --workdir: the folder of a run; it may be given several times.")
    return found


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}, port {port} ({error}); choose another --port.") from error
    return bound
