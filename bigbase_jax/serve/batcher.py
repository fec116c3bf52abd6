"""Dynamic batching: requests that come at about the same time are computed together, by threads of the model's.

A batch is padded to one of a few sizes, so that few programs are compiled, all of them before the first request. Rows
share it with those of their own shape: short texts do not wait for, nor are padded like, long ones. What a row gives
does not depend on the others: ``Task.predict`` computes rows by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

from bigbase_jax.core import Example
from bigbase_jax.inference.predictor import Output, Predictor, fitting, sizes
from bigbase_jax.serve.refused import Refused


@dataclasses.dataclass(eq=False)
class _Job:
    """The examples of one input, and what waits for their outputs."""

    examples: Sequence[Example]
    future: asyncio.Future[list[Output]]
    arrived: float
    outputs: list[Output | None]
    left: int
    gone: bool = False


class Batcher:
    """Computes examples for many callers at once.

    Args:
      predictor: what computes.
      rows: examples of the largest batch; batches have 1, 2, 4, ... of them up to that.
      wait: seconds that a row waits for others at most, and only while other requests are being read.
      seen: takes what a batch was: rows, rows with padding, seconds in the queue of its first, seconds of computing.
      crashed: takes an error that computing raised.
      threads: batches that are computed at once.
    """

    def __init__(
        self,
        predictor: Predictor,
        rows: int,
        wait: float = 0.0,
        seen: Callable[[int, int, float, float], None] = lambda *_: None,
        crashed: Callable[[Exception], None] = lambda _: None,
        threads: int = 1,
    ):
        self._predictor, self._wait, self._seen, self._crashed = predictor, wait, seen, crashed
        self.sizes = sizes(1, rows)
        self._rows: dict[Hashable, deque[tuple[_Job, int]]] = {}  # by their shape, and none that is empty
        self._costs: dict[tuple[Hashable, int], float] = {}  # seconds of a batch, by its shape and size
        self._changed, self._closed = threading.Condition(), False
        self.coming = 0  # requests that are being read, and may join the next batch
        self._threads = [threading.Thread(target=self._run, name="batcher", daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return sum(map(len, [*self._rows.values()]))

    def warm(self) -> int:
        """Compiles every size in every shape, and returns how many programs these are."""
        for example in self._predictor.blanks():
            for size in self.sizes:
                for _ in range(2):
                    began = time.monotonic()
                    list(self._predictor.computed([example], size))
                    self._costs[self._shape(example), size] = time.monotonic() - began
        return len(self._costs)

    def _shape(self, example: Example) -> Hashable:
        return tuple(example[name].shape for name in self._predictor.spec)

    async def compute(self, examples: Sequence[Example]) -> list[Output]:
        """The outputs of examples, in order.

        Raises:
          Refused: the model is being closed, or computing raised an error.
        """
        future: asyncio.Future[list[Output]] = asyncio.get_running_loop().create_future()
        job = _Job(examples, future, time.monotonic(), [None] * len(examples), len(examples))
        with self._changed:
            if self._closed:
                raise Refused(503, "the model is being replaced; ask again.", 1)
            for i, example in enumerate(examples):
                self._rows.setdefault(self._shape(example), deque()).append((job, i))
            self._changed.notify()
        try:
            return await future
        finally:
            job.gone = True  # nobody waits any more: what is still in the queue is not computed

    def came(self) -> None:
        """Says that ``coming`` has fallen without a row."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends the threads, after what is in the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while some := self._next():
            self._compute(some)

    def _next(self) -> list[tuple[_Job, int]]:
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._rows or self._closed)
                if not self._rows:
                    return []
                shape, rows = min(self._rows.items(), key=lambda item: item[1][0][0].arrived)
                left = rows[0][0].arrived + self._wait - time.monotonic()
                if len(rows) < self.sizes[-1] and self.coming > 0 and left > 0:
                    self._changed.wait(left)
                    continue
                there = [row for row in rows if not row[0].gone]
                count = self._count(shape, len(there))
                self._rows[shape] = deque(there[count:])
                if not self._rows[shape]:
                    del self._rows[shape]
                if count:
                    return there[:count]

    def _count(self, shape: Hashable, there: int) -> int:
        """How many of the rows that are there to compute next: those of the size that costs least a row, padding
        included. That may be a single one, as of pictures on a CPU; of sizes that cost the same, the largest."""
        there = min(there, self.sizes[-1])
        sizes = [size for size in self.sizes if size <= fitting(self.sizes, there)]
        best = min(reversed(sizes), key=lambda size: self._costs.get((shape, size), 0.0) / max(min(size, there), 1))
        return min(best, there)

    def _compute(self, some: list[tuple[_Job, int]]) -> None:
        began = time.monotonic()
        size = fitting(self.sizes, len(some))
        done: list[tuple[_Job, Exception | None]] = []
        try:
            outputs = list(self._predictor.computed([job.examples[i] for job, i in some], size))
        except Exception as error:
            if len(some) > 1:  # the others of the batch are not to suffer
                for row in some:
                    self._compute([row])
                return
            self._crashed(error)
            done = [(some[0][0], error)]
        else:
            seconds = time.monotonic() - began
            if (known := (self._shape(some[0][0].examples[some[0][1]]), size)) in self._costs:
                self._costs[known] += 0.1 * (seconds - self._costs[known])
            self._seen(len(some), size, began - some[0][0].arrived, seconds)
            with self._changed:  # an input's examples may be in batches of several threads
                for (job, i), output in zip(some, outputs, strict=True):
                    job.outputs[i] = output
                    job.left -= 1
                    if not job.left:
                        done.append((job, None))
        for loop in {job.future.get_loop() for job, _ in done}:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(_deliver, [pair for pair in done if pair[0].future.get_loop() is loop])


def _deliver(done: list[tuple[_Job, Exception | None]]) -> None:
    for job, error in done:
        if job.future.done():
            continue
        if error is None:
            job.future.set_result([output for output in job.outputs if output is not None])
        else:
            job.future.set_exception(error)
