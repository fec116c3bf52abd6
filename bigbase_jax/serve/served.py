"""One version of a model, loaded and ready to answer."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import numpy as np

from bigbase_jax.core import Example, Rendered, UserError
from bigbase_jax.inference.embedding import Embedding, embedder
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Output, Predictor
from bigbase_jax.inference.slots import Slots
from bigbase_jax.inference.streaming import Stream
from bigbase_jax.ops.samples import Sampler
from bigbase_jax.serve.batcher import Batcher
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.refused import Refused, refusing

T = TypeVar("T")
Given = bytes | Mapping[str, Any]
"""An input of a request: a file's bytes, or a row. A text alone would be a path, and is never taken from a request."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How models are served.

    Attributes:
      max_batch: examples that are computed at once, at most.
      max_wait_ms: milliseconds that a request waits for others to share a batch with, at most.
      max_queue: inputs that are read, wait or are computed at once, of a model; more are refused (429).
      max_pixels: of a picture; None: as many as the run's own limits say (``data.files.Limits``).
      max_examples: that one input may be read as, such as the windows of a long text or the rows of a file.
      threads: that read inputs and write answers, of a model; and that compute, of an engine other than JAX.
      slots: texts that a model writes at once.
      places: tokens of such a text, prompt included; 0: what the model reads, 4,096 at most.
      streams: recordings that a model hears while they come, at once; more are refused (429).
    """

    max_batch: int = 32
    max_wait_ms: float = 5.0
    max_queue: int = 256
    max_pixels: int | None = None
    max_examples: int = 256
    threads: int = min(os.cpu_count() or 1, 4)
    slots: int = 16
    places: int = 0
    streams: int = 16

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and value < (0 if name in ("max_wait_ms", "places") else 1):
                raise UserError(f"--{name}={value} is too small.")


REQUEST: contextvars.ContextVar[str] = contextvars.ContextVar("request", default="")
"""The id of the request that is being answered."""
_VECTORS = 4  # texts that are computed at once for ``embed`` by a model that does something else
_BRIEF, _SHORT = 5e-4, 1024  # seconds, characters
CRASHES = 3
"""Errors of computing, one after the other, after which a model is loaded again."""


class Served:
    """A loaded version of a model. ``open`` makes it, ``warm`` compiles its programs, ``close`` ends it.

    Attributes:
      name: what clients call it.
      version: of the model, as its card says.
      predictor: the model with all that comes before and after it.
      batcher: computes ``predict``; None: the model answers no inputs.
      slots: continue texts; None: the model writes none.
      vectors: computes ``embed``; None: the model gives none.
      listen: begins to hear a recording while it comes, as ``inference.streaming`` does; None: the model cannot.
      card: what ``/v1/models`` says of it.
      crashes: errors of computing since the last batch that was computed.
      reopen: opens the same again.
      watch: takes a share of the predictions, after they are answered; None: nobody does.
      compare: takes each answer, as ``candidate.Pair`` does; None: nobody does.
    """

    def __init__(
        self,
        name: str,
        predictor: Predictor,
        options: Options,
        version: str = "",
        metrics: Metrics | None = None,
        adapters: Mapping[str, Predictor] | None = None,
    ):
        self.name, self.predictor, self.options = name, predictor, options
        self.version = version or str(predictor.step)
        self.metrics = metrics or Metrics()
        self.crashes, self.crashed = 0, lambda: None
        self.batcher: Batcher | None = None
        self.slots: Slots | None = None
        self.vectors: Batcher | None = None
        self.listen: Callable[[], Any] | None = None
        self._streams = 0
        self.reopen: Callable[[], Served] | None = None
        self.watch: Sampler | None = None
        self.compare: Callable[[Served, Given, list[dict[str, Any]]], None] | None = None
        self._busy = self._users = 0
        self._seconds = 0.0  # of computing a row, lately
        self._lately = {"read": 1.0, "answer": 1.0}  # seconds of a thread's own
        self._idle = threading.Condition()
        self._pool = ThreadPoolExecutor(options.threads, f"{name}-reader")
        with contextlib.suppress(UserError):  # a published decoder reads no inputs
            reading, most = predictor.reading, options.max_pixels
            codec: Any = reading.codec
            if most is not None and hasattr(codec, "limits"):
                limits = dataclasses.replace(codec.limits, pixels=min(most, codec.limits.pixels))
                codec = dataclasses.replace(codec, limits=limits)
                predictor.reading = dataclasses.replace(reading, codec=codec)
            threads = 1 if predictor.compute is None else options.threads  # XLA shares a batch among the cores
            wait = options.max_wait_ms / 1000
            self.batcher = Batcher(predictor, options.max_batch, wait, self._seen, self._crash, threads)
        writer = None
        with contextlib.suppress(UserError):
            writer = Engine.of(predictor)
        if writer is not None:
            more: Any = {"waiting": options.max_queue, "adapters": adapters, "gave_up": lambda: self.crashed()}
            self.slots = Slots(writer, options.slots, options.places or None, **more)
        elif adapters:
            raise UserError(f"{name!r} writes no text, and takes no --adapter.")
        self._embeds = predictor if isinstance(predictor.task, Embedding) else None
        if self._embeds is not None:
            self.vectors = self.batcher
        elif self.slots is None and predictor.run is not None and predictor.compute is None:
            with contextlib.suppress(UserError):
                self._embeds = embedder(predictor.run.path, run=predictor)
                self.vectors = Batcher(self._embeds, min(options.max_batch, _VECTORS), 0, self._seen, self._crash)
        if self.transcribes and predictor.compute is None:
            with contextlib.suppress(UserError):
                Stream(predictor)
                self.listen = functools.partial(Stream, predictor)
        self.card = self._card()

    @classmethod
    def open(
        cls,
        name: str,
        folder: str | os.PathLike,
        *,
        engine: str = "jax",
        answers_of: Sequence[str] = (),
        step: int | None = None,
        options: Options | None = None,
        version: str = "",
        metrics: Metrics | None = None,
        adapters: Mapping[str, str] | None = None,
    ) -> Served:
        """Loads a run, or a published folder; see ``Predictor.open``.

        Args:
          adapters: folders of LoRA adapters of a model that writes, by the names that clients call the model with
            them.

        Raises:
          UserError: it cannot be loaded, or answers nothing, or an adapter is another model's.
        """
        how: dict[str, Any] = {"engine": engine, "answers_of": answers_of, "step": step}
        more: dict[str, Any] = {"options": options, "version": version, "metrics": metrics, "adapters": adapters}
        again = functools.partial(cls.open, name, folder, **how, **more)
        try:
            predictor = Predictor.open(folder, **how, threads=1)
        except UserError as error:
            try:
                predictor = embedder(folder)  # of published weights that give vectors alone
            except UserError:
                raise error from None
        beside = {name: predictor.with_adapter(path) for name, path in (adapters or {}).items()}
        served = cls(name, predictor, options or Options(), version, metrics, beside)
        served.card["engine"], served.reopen = engine, again
        return served

    def warm(self) -> None:
        """Compiles every program and loads what reads inputs, so that no request waits for these."""
        if self.slots is not None:
            self.slots.warm()
        if self.vectors is not None and self.vectors is not self.batcher:
            self.vectors.warm()
        if self.batcher is None:
            return
        self.batcher.warm()
        if self.listen is not None:
            heard = self.listen()
            heard.feed(np.zeros(round(heard.rate * (heard.latency + 1)), np.int16))
            heard.finish()
        fields = self.predictor.reading.codec.fields
        with contextlib.suppress(Exception):  # what a codec says of it is of no interest
            self.predictor.examples(dict.fromkeys(fields.columns, "a") if fields else b"a")

    def _card(self) -> dict[str, Any]:
        task, known = self.predictor.task, self.predictor.dataset_info
        does = ["predict"] if self.batcher is not None else []
        fields = self.predictor.reading.codec.fields if does else None
        does += ["complete"] if self.slots is not None else []
        sees = self.slots is not None and self.slots.engine.see is not None
        does += ["chat"] if sees or (self.slots is not None and known.get("chat_template")) else []
        does += ["see"] if sees else []
        does += ["embed"] if self.vectors is not None else []
        does += ["transcribe"] if self.transcribes else []
        does += ["stream"] if self.listen is not None else []
        does += ["render"] if self.batcher is not None and self.predictor.renders else []
        voices = fields.short.get("speaker", ()) or known.get("speakers", ()) if fields else ()
        return {
            "id": self.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "bigbase_jax",
            "version": self.version,
            "task": type(task).__name__,
            "step": self.predictor.step,
            "does": does,
            "reads": {
                "files": fields is None or fields.files or fields.whole,
                "entries": list(fields.columns) if fields else [],
                "short": {name: list(known) for name, known in fields.short.items()} if fields else {},
                "options": list(fields.options) if fields else [],
            },
            "voices": [str(name) for name in voices],
            "parameters": sum(x.size for x in jax.tree.leaves(self.predictor.variables)),
            **({"classes": list(known["class_names"])} if known.get("class_names") else {}),
        }

    # ------------------------------------------------------------------------------------------------------- requests

    @contextlib.contextmanager
    def used(self) -> Any:
        """While inside, the model is not closed."""
        with self._idle:
            self._users += 1
        try:
            yield self
        finally:
            with self._idle:
                self._users -= 1
                self._idle.notify_all()

    @property
    def transcribes(self) -> bool:
        """Whether its answers are transcripts, as ``core.Task`` has it."""
        return self.batcher is not None and bool(getattr(self.predictor.task, "transcribes", False))

    @property
    def busy(self) -> int:
        """Inputs that are being read, wait or are computed."""
        return self._busy

    async def predict(self, given: Given) -> list[dict[str, Any]]:
        """``answer``, which is then compared with that of another version, where there is one to compare with."""
        answers = await self.answer(given)
        if self.compare is not None:
            self.compare(self, given, answers)
        return answers

    async def answer(self, given: Given) -> list[dict[str, Any]]:
        """The answers to one input, as ``Predictor.answer`` gives them.

        Raises:
          Refused: it cannot be read (422), too much is waiting (429), or the model answers none (404).
        """
        examples, outputs, answers = await self._through(given, self.predictor.said)
        if self.watch is not None and self.watch.wanted():  # nobody waits for it
            inputs = [{key: example[key] for key in self.predictor.task.inputs} for example in examples]
            self._pool.submit(self.watch.keep, REQUEST.get(), self.name, self.version, inputs, outputs, answers)
        return answers

    async def render(self, given: Given) -> list[Rendered]:
        """The files that the model makes of one input.

        Raises:
          Refused: as ``answer``.
        """
        return [made for _, made in (await self._through(given, self.predictor.rendered))[2]]

    async def _through(
        self, given: Given, then: Callable[[Sequence[tuple[Example, Output]]], list[T]]
    ) -> tuple[list[Example], list[Output], list[T]]:
        """What one input is read as, what is computed of that, and what ``then`` says of both."""
        batcher = self.batcher
        if batcher is None:
            raise Refused(404, f"{self.name!r} answers no inputs; it continues texts: POST /v1/completions.")
        with self._admitted():
            batcher.coming += 1
            try:
                examples = await self._stage("read", _short(given), self._read, given)
            finally:
                batcher.coming -= 1
                batcher.came()
            outputs = await batcher.compute([self.predictor.cut([example])[0] for example in examples])
            found = list(zip(examples, outputs, strict=True))
            answers = await self._stage("answer", len(found) == 1, then, found)
        return examples, outputs, answers

    async def _stage(self, name: str, brief: bool, f: Callable[..., T], *args: Any) -> T:
        """``f(*args)``, a stage of answering, in one of the model's threads; at once where it may be ``brief`` and has
        lately taken less time than another thread needs to wake up."""

        def timed() -> T:
            began = time.thread_time()
            try:
                with refusing(422):
                    return f(*args)
            finally:
                self._lately[name] = max(time.thread_time() - began, 0.9 * self._lately[name])

        began = time.monotonic()
        found: T = timed() if brief and self._lately[name] < _BRIEF else await self.in_thread(timed)
        self.metrics.stage(self.name, name, time.monotonic() - began)
        return found

    @contextlib.contextmanager
    def hearing(self) -> Iterator[Any]:
        """What hears a recording while it comes.

        Raises:
          Refused: the model cannot, or it hears as many as it may.
        """
        if self.listen is None:
            raise Refused(404, f"{self.name!r} hears no streams; POST /v1/audio/transcriptions takes whole recordings.")
        if self._streams >= self.options.streams:
            raise Refused(429, f"{self.name!r} hears {self._streams} streams; ask again later.", 5)
        self._streams += 1
        try:
            yield self.listen()
        finally:
            self._streams -= 1

    async def embed(self, texts: Sequence[str]) -> tuple[list[list[float]], int]:
        """A vector for each text, and how many tokens these have.

        Raises:
          Refused: as ``predict``.
        """
        if self.vectors is None or (predictor := self._embeds) is None:
            raise Refused(404, f"{self.name!r} gives no vectors.")

        def read() -> list[Example]:
            with refusing(400):
                return [predictor.examples({"text": text})[0] for text in texts]

        with self._admitted():
            examples = await self.in_thread(read)
            outputs = await self.vectors.compute(predictor.cut(examples))
        count = sum(int((np.asarray(example["segment_ids"]) > 0).sum()) for example in examples)
        return [output["vector"].tolist() for output in outputs], count

    async def outputs(self, examples: Sequence[Example]) -> list[Output]:
        """What the model gives of examples that are as ``predictor.spec`` says.

        Raises:
          Refused: too much is waiting.
        """
        if self.batcher is None:
            raise Refused(404, f"{self.name!r} answers no inputs; it continues texts: POST /v1/completions.")
        with self._admitted():
            return await self.batcher.compute(examples)

    @contextlib.contextmanager
    def _admitted(self) -> Any:
        if self._busy >= self.options.max_queue:
            wait = max(1.0, self._busy * self._seconds)
            raise Refused(429, f"{self.name!r} has {self._busy} inputs to answer; ask again later.", wait)
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1

    async def in_thread(self, f: Callable[..., Any], *args: Any) -> Any:
        """``f(*args)``, in one of the model's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, f, *args)

    def _read(self, given: Given) -> list[Example]:
        if isinstance(given, str):
            raise TypeError("a path from a request")
        examples = self.predictor.examples(given)
        if len(examples) > self.options.max_examples:
            most = self.options.max_examples
            raise Refused(413, f"the input is read as {len(examples):,} examples; at most {most:,} are answered.")
        return examples

    # ------------------------------------------------------------------------------------------------------------ state

    def _seen(self, rows: int, padded: int, waited: float, seconds: float) -> None:
        self.crashes = 0
        self._seconds += 0.1 * (seconds / rows - self._seconds)
        self.metrics.batch(self.name, rows, waited, seconds)

    def _crash(self, error: Exception) -> None:
        self.crashes += 1
        self.metrics.crashes.labels(self.name).inc()
        if self.crashes == CRASHES:
            self.crashed()

    @property
    def ready(self) -> bool:
        """Whether it computes, as far as is known."""
        return self.crashes < CRASHES and not (self.slots is not None and self.slots.broken)

    def close(self, drain_s: float = 30.0) -> None:
        """Waits for the requests that use it, and ends its threads."""
        with self._idle:
            self._idle.wait_for(lambda: not self._users, drain_s)
        if self.slots is not None:
            self.slots.close(drain_s)
        for batcher in {self.batcher, self.vectors}:
            if batcher is not None:
                batcher.close()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _short(given: Given) -> bool:
    """Whether an input is a row without files and long texts, which takes about as long to read as others."""
    return isinstance(given, Mapping) and all(
        isinstance(x, (int, float)) or (isinstance(x, str) and len(x) <= _SHORT) for x in given.values()
    )
