"""The models of a server by name, each replaced between two requests."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bigbase_jax.build import suggest
from bigbase_jax.ops.samples import Sampler
from bigbase_jax.runtime.log import say
from bigbase_jax.serve.candidate import Pair, Trial
from bigbase_jax.serve.refused import Refused
from bigbase_jax.serve.served import Served

AGAIN = 10.0
"""Seconds between two tries to load a model that has crashed."""
DRAIN_S = 3600.0
"""Seconds that the requests of a version that was replaced get; each has a shorter time of its own."""


class Models:
    """Name -> the version that answers now.

    Args:
      openers: what loads each model.
      watch: see ``Served``.
      trial: how candidates are tried, where there are any.
    """

    def __init__(
        self,
        openers: Mapping[str, Callable[[], Served]],
        watch: Sampler | None = None,
        trial: Trial | None = None,
    ):
        self.watch, self._trial = watch, trial or Trial()
        self._candidates = dict[str, Served]()
        self._openers, self._current = dict(openers), dict[str, Served]()
        self._lock, self._closing = threading.Lock(), False

    def load(self) -> None:
        """Loads and warms up all models, in order.

        Raises:
          UserError: one cannot be loaded.
        """
        for name, opener in self._openers.items():
            self.switch(name, opener())

    @property
    def names(self) -> list[str]:
        """All models', loaded or not."""
        return sorted({*self._openers, *self._current})

    @property
    def ready(self) -> bool:
        """Whether all models answer."""
        found = [self._current.get(name) for name in self.names]
        return not self._closing and all(served is not None and served.ready for served in found)

    def cards(self) -> list[dict[str, Any]]:
        """Of the models that are loaded, by name, each followed by its adapters."""
        found = []
        for _, served in sorted(self._current.items()):
            found.append({**served.card, "ready": served.ready})
            for adapter in served.slots.adapters if served.slots is not None else ():
                does = [word for word in served.card["does"] if word in ("complete", "chat")]
                found.append({**found[-1], "id": adapter, "parent": served.name, "does": does})
        return found

    def base_of(self, name: str) -> str:
        """The model that has an adapter of this name; or the name, where no model has."""
        own = (served for served in [*self._current.values()] if served.slots and name in served.slots.adapters)
        return next((served.name for served in own), name) if name not in self._current else name

    @contextlib.contextmanager
    def use(self, name: str, candidate: bool = False) -> Iterator[Served]:
        """The current version of a model, which stays while it is used: for the whole of a request.

        Args:
          candidate: it may be the candidate, for the share of requests that this answers.

        Raises:
          Refused: there is none of this name (404), or it is not ready (503).
        """
        with self._lock:
            served = self._current.get(name)
            if served is None or not served.ready:
                if name not in self.names:
                    raise Refused(404, f"there is no model {name[:80]!r}.{suggest(name[:80], self.names, 'model')}")
                raise Refused(503, f"the model {name!r} is being loaded; ask again.", 5)
            other = self._candidates.get(name) if candidate else None
            if other is not None and other.ready and random.random() < self._trial.canary:
                served = other
            used = served.used()
            used.__enter__()
        try:
            yield served
        finally:
            used.__exit__(None, None, None)

    def switch(self, name: str, new: Served) -> None:
        """Warms up ``new``, lets it answer from the next request on, and closes what answered before, when that has
        answered all that it had begun."""
        new.crashed = lambda: self._reload(name, new)
        self._take(self._current, name, new)
        new.metrics.version(name, new.version)
        new.metrics.ready.labels(name).set_function(lambda: float(new.ready))
        new.metrics.busy.labels(name).set_function(lambda: float(new.busy))
        if (slots := new.slots) is not None:
            for what in slots.stats():
                stat = functools.partial(lambda of, k: of.stats()[k], slots, what)
                new.metrics.slots.labels(name, what).set_function(stat)
        if new.batcher is not None:
            waiting = new.batcher
            new.metrics.queue.labels(name).set_function(lambda: float(waiting.waiting))
        say(f"{name} {new.version} answers")

    def try_out(self, name: str, new: Served) -> None:
        """Warms up ``new``, and makes it the candidate of a model in place of the one before."""
        self._take(self._candidates, name, new)
        say(f"{name} {new.version} is the candidate")

    def _take(self, served: dict[str, Served], name: str, new: Served) -> None:
        new.warm()
        new.watch = self.watch
        with self._lock:
            old, served[name] = served.get(name), new
            current, candidate = self._current.get(name), self._candidates.get(name)
            if current is not None and candidate is not None:
                Pair(current, candidate, self._trial)
        if old is not None:
            threading.Thread(target=old.close, args=(DRAIN_S,), daemon=True).start()

    def _reload(self, name: str, crashed: Served) -> None:
        def load() -> None:
            while crashed.reopen is not None and self._current.get(name) is crashed and not self._closing:
                try:
                    self.switch(name, crashed.reopen())
                except Exception as error:
                    say(f"{name} cannot be loaded again ({error}); it is tried every {AGAIN:g} seconds")
                    time.sleep(AGAIN)

        say(f"{name} has crashed {crashed.crashes} times; it is loaded again")
        threading.Thread(target=load, daemon=True).start()

    def drain(self) -> None:
        """From now on ``ready`` is false; requests are still answered."""
        self._closing = True

    def close(self, drain_s: float = 30.0) -> None:
        """Closes all models."""
        self.drain()
        for served in (*self._current.values(), *self._candidates.values()):
            served.close(drain_s)
