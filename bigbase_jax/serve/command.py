"""``--mode=serve``: models over HTTP until a signal ends it."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import json
import logging
import math
import os
import re
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bigbase_jax.core import UserError
from bigbase_jax.ops.follow import Follower
from bigbase_jax.ops.registry import Registry, Version
from bigbase_jax.ops.samples import Sampler
from bigbase_jax.runtime import compilation, signals
from bigbase_jax.runtime.log import say
from bigbase_jax.serve import keys
from bigbase_jax.serve.app import Settings, create
from bigbase_jax.serve.candidate import Trial
from bigbase_jax.serve.listening import MESSAGE
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models
from bigbase_jax.serve.served import Options, Served

CONNECTIONS = 2048
"""That are open at once; more are answered by 503."""
HEAD_S, HEAD_BYTES = 20.0, 64 << 10


def serve(
    workdirs: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    engine: str = "jax",
    answers_of: Sequence[str] = (),
    step: int | None = None,
    max_wait_ms: float = Options.max_wait_ms,
    max_batch: int = Options.max_batch,
    max_queue: int = Options.max_queue,
    max_body_mb: float = 32.0,
    max_pixels: int | None = Options.max_pixels,
    max_seconds: float = Settings.max_seconds,
    timeout_s: float = Settings.timeout_s,
    drain_s: float = 30.0,
    api_keys: str | None = None,
    add_key: str | None = None,
    rate: float = 0.0,
    cors: Sequence[str] = (),
    log_contents: bool = False,
    registry: str | None = None,
    storage: str | None = None,
    specs: Sequence[str] | None = None,
    candidate: str | None = None,
    canary: float = 0.0,
    shadow: bool = False,
    slots: int = Options.slots,
    places: int = Options.places,
    streams: int = Options.streams,
    adapter: str | None = None,
    samples: str | None = None,
    samples_share: float = 0.1,
    samples_contents: bool = False,
    samples_mb: float = 1024.0,
    samples_days: float = 30.0,
) -> int:
    """Serves the models of runs, or of published folders, until SIGTERM or Ctrl-C; requests in progress are answered.

    Prints one JSON line when all models are ready: ``{"serving": URL, "models": [...]}``.

    Args:
      workdirs: a folder for each model, which is called as the folder is, or as in NAME=FOLDER.
      host: what to listen on; other machines reach the server where it is not the loopback address.
      port: 0: a free one.
      engine, answers_of, step: see ``Predictor.open``.
      max_wait_ms, max_batch, max_queue, max_pixels: see ``Options``.
      max_body_mb, max_seconds, timeout_s, cors, log_contents: see ``Settings``.
      drain_s: seconds that requests in progress get when the server ends.
      api_keys, rate: see ``Keys``.
      slots, places, streams: see ``Options``.
      adapter: LoRA adapters of the only model, ``NAME=FOLDER,NAME=FOLDER``: by each name clients ask for the model with
        that adapter.
      registry, storage: see ``Registry.open``.
      specs: models of the registry, see ``Registry.find``; when one comes to mean another version, that answers from
        then on, and no request fails.
      candidate: the alias of what is tried beside each of ``specs``, see ``Trial``: of its model, followed as well.
      canary, shadow: see ``Trial``.
      samples, samples_share, samples_contents, samples_mb, samples_days: see ``Sampler``; None: nothing is kept.
      add_key: a name; a key is made for it and printed, and nothing is served.

    Returns:
      The exit status, 0.

    Raises:
      UserError: a model cannot be loaded, or the address is taken.
    """
    if add_key is not None:
        if api_keys is None:
            raise UserError("--add_key needs --api_keys: the file that is to know the key.")
        print(json.dumps({"name": add_key, "key": keys.add(api_keys, add_key)}), flush=True)
        return 0
    _traced()
    compilation.setup()
    options = Options(max_batch, max_wait_ms, max_queue, max_pixels, slots=slots, places=places, streams=streams)
    metrics = Metrics()
    how: dict[str, Any] = {"engine": engine, "step": step, "answers_of": tuple(answers_of)}
    opener = functools.partial(Served.open, **how, options=options, metrics=metrics)
    openers: dict[str, Callable[..., Served]] = {
        name: functools.partial(opener, name, folder) for name, folder in names_of(workdirs).items()
    }
    trial = Trial(canary, shadow, log_contents)
    if (candidate is None) != (trial.canary == 0 and not trial.shadow) or (candidate is not None and not specs):
        raise UserError("--candidate=ALIAS takes --registry, --model and one of --canary=SHARE and --shadow, or both.")
    if adapter is not None:
        if len(openers) != 1:
            raise UserError("--adapter is of one model; give one --workdir.")
        openers = {name: functools.partial(only, adapters=_adapters(adapter)) for name, only in openers.items()}
    followers = _followed(registry, storage, specs or (), opener, openers, lambda new: models.switch(new.name, new))
    beside = dict[str, Callable[[], Served]]()
    if candidate is not None:
        others = [f"{re.split('[@:]', spec)[0]}@{candidate}" for spec in specs or ()]
        followers += _followed(registry, storage, others, opener, beside, lambda new: models.try_out(new.name, new))
    if not openers:
        raise UserError("--mode=serve needs --workdir: the folder of a run; or --registry and --model=NAME@ALIAS.")
    sampler = None
    if samples is not None:
        sampler = Sampler(samples, samples_share, samples_contents, most_mb=samples_mb, days=samples_days)
    models = Models(openers, sampler, trial)
    known = None if api_keys is None else keys.Keys(api_keys, rate)
    if rate and known is None:
        raise UserError("--rate is that of each key; give --api_keys too.")
    body = int(max_body_mb * 1e6)
    most: Any = {"max_body": body, "max_held": max(16 * body, 512 << 20), "max_seconds": max_seconds}
    settings = Settings(timeout_s=timeout_s, keys=known, log_contents=log_contents, cors=tuple(cors), **most)
    app = create(models, settings, metrics)
    bound = _bind(host, port)
    url = f"http://{host if ':' not in host else f'[{host}]'}:{bound.getsockname()[1]}"
    server = Server(config_of(app, drain_s))
    failed: list[BaseException] = []

    def load() -> None:
        try:
            models.load()
            for name, load_candidate in beside.items():
                models.try_out(name, load_candidate())
            for start in followers:
                start()
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
    if sampler is not None:
        sampler.close()
    if loading.is_alive():  # in a compilation, which the interpreter cannot end
        os._exit(0)
    models.close(drain_s)
    return 0


def _traced() -> None:
    """Lets FastAPI send traces, and those alone, where OpenTelemetry's variables say to whom.

    Raises:
      UserError: what sends them is not installed.
    """
    if not {"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"} & set(os.environ):
        return
    if importlib.util.find_spec("opentelemetry.exporter") is None:
        raise UserError("OTEL_EXPORTER_OTLP_ENDPOINT asks for traces, which need the extra: pip install -e '.[trace]'.")
    settings = {"FASTAPI_OTEL_AUTO_CONFIGURE": "true", "OTEL_SERVICE_NAME": "bigbase_jax"}
    for name, value in {**settings, "OTEL_METRICS_EXPORTER": "none", "OTEL_LOGS_EXPORTER": "none"}.items():
        os.environ.setdefault(name, value)


def config_of(app: FastAPI, drain_s: float) -> uvicorn.Config:
    """How uvicorn runs the application."""
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)  # what a client sends that is no HTTP is no news
    return uvicorn.Config(
        app,
        http=Impatient,
        ws="websockets-sansio",
        ws_max_size=MESSAGE,
        ws_per_message_deflate=False,  # a message could be much larger than what comes of it
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(drain_s),
    )


class Impatient(HttpToolsProtocol):
    """Closes a connection on which no request has begun within ``HEAD_S`` seconds and ``HEAD_BYTES`` bytes."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._patience is not None:
            self._bytes += len(data)
            if self._bytes > HEAD_BYTES:
                self.transport.close()

    def on_headers_complete(self) -> None:
        self._arrived()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.is_closing() and self._patience is None:
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._bytes, self._patience = 0, self.loop.call_later(HEAD_S, self.transport.close)

    def _arrived(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
        self._patience = None


class Server(uvicorn.Server):
    """Without handlers of signals of its own."""

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        await self._serve(sockets)


def _adapters(given: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for part in given.split(","):
        name, _, folder = part.partition("=")
        if not re.fullmatch(r"[\w.-]+", name, flags=re.ASCII) or not folder or name in found:
            raise UserError(f"--adapter={given} is not NAME=FOLDER,NAME=FOLDER with names of their own.")
        found[name] = folder
    return found


def names_of(workdirs: Sequence[str]) -> dict[str, str]:
    """The folder of each model by its name, of what ``--workdir`` says.

    Raises:
      UserError: two have one name.
    """
    found: dict[str, str] = {}
    for given in workdirs:
        name, equals, folder = given.partition("=")
        if not equals or os.path.exists(given):
            name, folder = os.path.basename(os.path.realpath(os.path.expanduser(given))), given
        name = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
        if name in found:
            raise UserError(f"{found[name]} and {folder} would both be called {name!r}; say --workdir=NAME=FOLDER.")
        found[name] = folder
    return found


def _followed(
    folder: str | None,
    storage: str | None,
    specs: Sequence[str],
    opener: Callable[..., Served],
    openers: dict[str, Callable[[], Served]],
    switch: Callable[[Served], None],
) -> list[Callable[[], None]]:
    """Adds what opens each model of a registry to ``openers``; gives what follows them from then on."""
    if (folder is None) != (not specs):
        raise UserError("--registry and --model=NAME@ALIAS belong together; give both, or neither.")

    def load(version: Version) -> Served:
        return opener(version.model, version.folder, version=str(version.version))

    followers: list[Callable[[], None]] = []
    for spec in specs:
        opened = Registry.open(folder or "", storage)
        first = opened.resolve(spec)
        if first.model in openers:
            raise UserError(f"{first.model!r} is served twice; leave out --model={spec} or name the other otherwise.")
        openers[first.model] = functools.partial(load, first)
        follower = Follower(opened, spec, lambda version: switch(load(version)))
        followers.append(functools.partial(follower.start, first))
    return followers


def _bind(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise UserError(f"--host={host} is no address of this machine ({error}).") from error
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise UserError(f"cannot listen on {host}, port {port} ({error}); choose another --port.") from error
    return bound
