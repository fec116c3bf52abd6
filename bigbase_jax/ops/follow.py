"""Following what a name in a registry means, while that changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from bigbase_jax.ops.registry import Registry, Version
from bigbase_jax.runtime.log import say

POLL_S, RETRY_S = 2.0, 60.0


class Follower:
    """Calls back when ``spec`` comes to mean another version.

    Polling reads one number, which grows with every change of the registry. A version is looked at only when that has
    grown: its files are checked, and then it is handed over. What cannot be read or taken over is said, and tried again
    at the next change or after a while; until then all stays as it is.

    Args:
      registry: where to look.
      spec: see ``Registry.find``; NAME alone follows what is pushed.
      on_change: takes the version, in the follower's thread; what it raises is said.
      poll_s: seconds between two looks.
    """

    def __init__(self, registry: Registry, spec: str, on_change: Callable[[Version], None], poll_s: float = POLL_S):
        self._registry, self._spec, self._on_change, self._poll_s = registry, spec, on_change, poll_s
        self._seen, self._now, self._again = -1, 0, 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"follow {spec}", daemon=True)

    def start(self, now: Version) -> None:
        """Begins, from the version that is there already."""
        self._now = now.version
        self._thread.start()

    def stop(self) -> None:
        """Ends, after a change that is being taken over."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._poll_s):
            try:
                self._look()
            except Exception as error:  # of a database, a folder, a model
                self._again = time.monotonic() + RETRY_S
                say(f"{self._spec} stays at version {self._now}: {error}")

    def _look(self) -> None:
        changes = self._registry.changes()
        if changes == self._seen and not 0 < self._again < time.monotonic():
            return
        self._seen, self._again = changes, 0.0
        if self._registry.find(self._spec).version != self._now:
            version = self._registry.resolve(self._spec)
            self._on_change(version)
            self._now = version.version
