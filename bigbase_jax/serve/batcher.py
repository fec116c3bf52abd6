"""Dynamic batching: requests that come at about the same time are computed together, by a thread of the model's.

A batch is padded to one of a few sizes, so that few programs are compiled, all of them before the first request. What
a row gives does not depend on the others: ``Task.predict`` computes rows by themselves.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from bigbase_jax.core import Batch, Example
from bigbase_jax.inference.predictor import Output, Predictor
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
    """

    def __init__(
        self,
        predictor: Predictor,
        rows: int,
        wait: float = 0.0,
        seen: Callable[[int, int, float, float], None] = lambda *_: None,
        crashed: Callable[[Exception], None] = lambda _: None,
    ):
        self._predictor, self._wait, self._seen, self._crashed = predictor, wait, seen, crashed
        self.sizes = [1 << i for i in range((rows - 1).bit_length())] + [rows]
        self._rows: deque[tuple[_Job, int]] = deque()
        self._changed, self._closed = threading.Condition(), False
        self.coming = 0  # requests that are being read, and may join the next batch
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows in the queue."""
        return len(self._rows)

    def warm(self) -> int:
        """Compiles every size, and returns how many programs these are."""
        shapes = set()
        for size in self.sizes:
            for batch in self._shapes(size):
                shape = tuple(x.shape for x in batch.values())
                if shape not in shapes:
                    self._predictor.program(self._predictor.variables, batch)
                    shapes.add(shape)
        return len(shapes)

    def _shapes(self, size: int) -> Iterator[Batch]:
        """A batch of each shape that this size may have: where padding is trimmed, several."""
        spec, trim = self._predictor.spec, self._predictor.trim
        empty = {key: np.zeros((size, *x.shape), x.dtype) for key, x in spec.items()}
        if trim is None:
            yield empty
            return
        longest = max(x.shape[0] for x in spec.values())
        for length in [1 << i for i in range(longest.bit_length())] + [longest]:
            for x in empty.values():
                x[:, :length] = 1
            yield trim({key: x.copy() for key, x in empty.items()})

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
            self._rows.extend((job, i) for i in range(len(examples)))
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
        """Ends the thread, after what is in the queue."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while some := self._next():
            self._compute(some)

    def _next(self) -> list[tuple[_Job, int]]:
        with self._changed:
            while True:
                while not self._rows and not self._closed:
                    self._changed.wait()
                if not self._rows:
                    return []
                until = self._rows[0][0].arrived + self._wait
                while len(self._rows) < self.sizes[-1] and self.coming > 0 and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
                some: list[tuple[_Job, int]] = []
                while self._rows and len(some) < self.sizes[-1]:
                    row = self._rows.popleft()
                    if not row[0].gone:
                        some.append(row)
                if some:
                    return some

    def _compute(self, some: list[tuple[_Job, int]]) -> None:
        began = time.monotonic()
        size = next(size for size in self.sizes if size >= len(some))
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
            self._seen(len(some), size, began - some[0][0].arrived, time.monotonic() - began)
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
