"""Continuous batching: requests share the decode steps of one model, and come and go between any two of them.

A thread of its own repeats: take off who has left, read a chunk of the next prompt (prefill), write one token of every
sequence (decode). A prompt is read into a cache of one row, which is then copied into the batch's; rows that were read
are kept for a while, and a prompt with a beginning in common starts from a copy (the prefix cache).

The batch's cache grows and shrinks, in rows and in places, by a few sizes: a program is compiled for each, and few or
short sequences do not pay for many or long ones. What chooses tokens is ``decoding.sampling``'s, so that a sequence is
the one that ``Engine.generate`` writes, whoever shares the batch.

Axes: B rows, l tokens of a chunk, S places of a cache, V entries of the vocabulary, K most probable ones.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import PyTree, UserError, Variables
from bigbase_jax.decoding import sampling
from bigbase_jax.decoding.sampling import SamplingArrays, SamplingParams, State
from bigbase_jax.inference.beside import ADAPTERS, ROWS, with_adapters
from bigbase_jax.inference.generation import GREEDY, Engine, empty, read, refuse_unknown
from bigbase_jax.inference.predictor import Predictor, fitting, sizes
from bigbase_jax.text.detokenizer import IncrementalDetokenizer

TOP = 20
"""The most alternatives to a token that are told with its log-probability."""
_PLACES = 4096  # of a sequence, at most, where nobody says how many
_SMALL = 128  # places of the smallest cache
_LEAST = 16  # tokens of the smallest chunk, and of a prefix that is worth a copy
_PATIENCE = 16  # steps after which a cache that is too large is made smaller
_TRIES = 3  # failures in a row after which the model is given up
_log = logging.getLogger(__name__)


class Full(UserError):
    """As many requests wait as may; one may ask again later."""


class Closed(UserError):
    """No request is taken any more: the engine is closed, or its model has failed again and again."""


class Logprob(NamedTuple):
    """How probable a token was, before temperature and filters.

    Attributes:
      logprob: log of its probability.
      top: the most probable tokens there, and theirs.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class Piece(NamedTuple):
    """What is new of a sequence.

    Attributes:
      text: without incomplete characters or what may become a stop text; "" where there is no tokenizer.
      tokens: without the end token.
      logprobs: of each token, where they were asked for.
      finish_reason: None while it goes on; then "end" (the model's end token), "stop" (a stop text), "length", or
        "error".
      error: what went wrong.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: str | None = None
    error: str = ""


@dataclasses.dataclass(eq=False)
class Handle:
    """A request.

    Attributes:
      tokens: i32[S], the prompt and what is written after it.
      length: of the prompt.
      position: tokens there are.
      limit: places that it may fill.
      adapter: its number; 0: none.
      seen: f32[1,P,D], a picture that is read before the prompt; None: there is none.
      cancelled: its slot is free at the next step, and no piece comes any more.
    """

    tokens: np.ndarray
    length: int
    position: int
    limit: int
    params: SamplingParams
    top: int | None
    on_piece: Callable[[Piece], None]
    detokenizer: IncrementalDetokenizer | None
    adapter: int
    seen: jax.Array | None = None
    cancelled: bool = False

    def cancel(self) -> None:
        """To be called from any thread."""
        self.cancelled = True


@dataclasses.dataclass(eq=False)
class _Prefix:
    """A prompt that was read, and the cache of it."""

    tokens: np.ndarray
    row: PyTree
    adapter: int


@dataclasses.dataclass(eq=False)
class _Reading:
    """A prompt that is being read: so many tokens of it are in a cache of one row and so many places."""

    handle: Handle
    row: PyTree
    places: int
    at: int


class Slots:
    """Continuous batching of what an engine's model writes.

    Args:
      engine: the model, its tokens that end a sequence, its tokenizer.
      slots: sequences that are written at once.
      places: tokens of a sequence, prompt included; None: what the model reads, 4,096 at most.
      chunk: tokens of prompts that are read between two decode steps.
      prefixes: prompts whose cache is kept, each as large as a sequence's.
      waiting: requests that may wait for a slot.
      adapters: LoRA adapters by name, each as ``with_adapters`` takes it; a request has one of them, or none.
      gave_up: is called when the model has failed so often that nothing is taken any more.

    Raises:
      UserError: a size that is out of range.
    """

    def __init__(
        self,
        engine: Engine,
        slots: int = 16,
        places: int | None = None,
        chunk: int = 64,
        prefixes: int = 8,
        waiting: int = 64,
        adapters: Mapping[str, Predictor] | None = None,
        gave_up: Callable[[], None] = lambda: None,
    ):
        length = getattr(engine.model, "length", None) or _PLACES
        self.places = min(length, _PLACES) if places is None else places
        if slots < 1 or chunk < 1 or self.places < 2 or prefixes < 0 or waiting < 0:
            raise UserError(
                f"slots={slots}, chunk={chunk}, places={self.places}, prefixes={prefixes} and waiting={waiting} must be"
                " at least 1, 1, 2, 0 and 0."
            )
        self.engine = with_adapters(engine, adapters) if adapters else engine
        self.adapters = tuple(adapters or ())
        self.slots, self._most, self._gave_up = slots, waiting, gave_up
        self._ends = frozenset(engine.ends)
        # Of one row XLA's CPU compiler copies the cache at each step.
        self._batches, self._sizes = sizes(2, slots, factor=4), sizes(_SMALL, self.places)
        self._chunk = min(chunk, self.places)
        self._prefixes: collections.deque[_Prefix] = collections.deque(maxlen=prefixes)
        self._rows: list[Handle | None] = []
        self._cache: PyTree = None
        self._cache_places = self._loose = self._failures = 0
        self._reading: _Reading | None = None
        self._waiting: collections.deque[Handle] = collections.deque()
        self._arrays: SamplingArrays | None = None
        self._counts: collections.Counter[str] = collections.Counter()
        self._rates: collections.deque[tuple[float, int]] = collections.deque(maxlen=256)
        self._changed, self._closing, self._stopped = threading.Condition(), False, False
        self._thread = threading.Thread(target=self._run, name="slots", daemon=True)
        self._thread.start()

    # -- for any thread --------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: np.ndarray,
        params: SamplingParams = GREEDY,
        on_piece: Callable[[Piece], None] = lambda piece: None,
        top: int | None = None,
        adapter: str | None = None,
        seen: jax.Array | None = None,
    ) -> Handle:
        """Asks for what follows a prompt.

        Args:
          prompt: tokens i32[L], at least one.
          on_piece: takes each piece, on the engine's thread, in order, the last one with a ``finish_reason``. It must
            not take long; what it raises cancels the request.
          top: of each token tell its log-probability, and that of so many most probable ones; None: do not.
          adapter: the name of one; None: the base alone.
          seen: a picture, as ``Engine.see`` gives it.

        Raises:
          UserError: there is no such adapter, the prompt does not fit, or the parameters ask for a beam search.
          Full: too many requests wait.
          Closed: see there.
        """
        if params.beams > 1:
            raise UserError("a beam search does not share its steps; leave out beams.")
        if top is not None and not 0 <= top <= TOP:
            raise UserError(f"top is {top}; at most {TOP} alternatives to a token are told.")
        refuse_unknown([prompt], self.engine.model)
        length = len(prompt)
        limit = length + self.engine.room(length, params.max_new_tokens)
        if limit > self.places and (params.max_new_tokens is not None or length >= self.places):
            raise UserError(
                f"a prompt of {length:,} tokens and max_new_tokens of {limit - length:,} are more than the"
                f" {self.places:,} places of a sequence here."
            )
        tokenizer = self.engine.tokenizer
        detokenizer = IncrementalDetokenizer(tokenizer, prompt.tolist(), params.stop) if tokenizer else None
        if params.stop and detokenizer is None:
            raise UserError("without a tokenizer there is no text at which to stop; leave out stop.")
        tokens = np.zeros(self.places, np.int32)
        tokens[:length] = prompt
        if adapter is not None and adapter not in self.adapters:
            raise UserError(f"there is no adapter {adapter!r}.{suggest(adapter, self.adapters, 'adapter')}")
        number = 0 if adapter is None else self.adapters.index(adapter) + 1
        limit = min(limit, self.places)
        handle = Handle(tokens, length, length, limit, params, top, on_piece, detokenizer, number, seen)
        with self._changed:
            if self._closing:
                raise Closed("the model is closed, or has failed again and again; it takes no request.")
            if len(self._waiting) >= self._most + max(0, self.slots - self._used()):
                raise Full(f"{self.slots} sequences are written and {len(self._waiting)} wait; ask again later.")
            self._waiting.append(handle)
            self._changed.notify()
        return handle

    def stats(self) -> dict[str, float]:
        """Slots, used ones and requests that wait; since the start the tokens written, those read, prefixes found and
        their tokens, decode steps, failures and cancelled requests; tokens written per second, of the last 10 s."""
        now = time.monotonic()
        recent = [(at, n) for at, n in list(self._rates) if now - at < 10]
        rate = sum(n for _, n in recent[1:]) / (recent[-1][0] - recent[0][0]) if len(recent) > 1 else 0.0
        names = ("tokens", "prompt_tokens", "prefix_hits", "prefix_tokens", "steps", "failures", "cancelled")
        return {
            "slots": self.slots,
            "used": self._used(),
            "waiting": len(self._waiting),
            **{name: self._counts[name] for name in names},
            "tokens_per_second": round(rate, 1),
        }

    @property
    def broken(self) -> bool:
        """Whether the model has failed so often that nothing is taken any more."""
        return self._failures >= _TRIES

    def warm(self) -> None:
        """Compiles every program. To be called before the first request, for whom it would take seconds."""
        model, see = self.engine.model, self.engine.see
        seen = [] if see is None else [jnp.zeros((1, model.places, model.decoder.width))]
        for S in self._sizes:
            row = empty(model, 1, S)
            for width in {min(self._chunk, S), min(_LEAST, self._chunk, S)}:
                part = np.zeros((1, width), np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)
                for source in ((), seen) if seen else ((),):
                    logits_BV, row = read(model, self._given([None]), row, *part, *source)
            for B in self._batches:
                cache, zeros = _put(empty(model, B, S), row, np.int32(0)), np.zeros(B, np.int32)
                logits_BV, cache = read(model, self._given([None] * B), cache, zeros[:, None], zeros)
        kinds = GREEDY, SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=1)
        for B in (1, *self._batches):
            for params in kinds:
                logits_BV = jnp.zeros((B, logits_BV.shape[1]))
                token_B = self._choose([None] * B, logits_BV, SamplingArrays.of([params], B, few=True))
            _likely(logits_BV, token_B)

    def close(self, drain_s: float = 0.0) -> None:
        """Takes no request any more, lets those there are end within so many seconds, and ends the others."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(drain_s)
        self._stopped = True
        self._thread.join()

    # -- the engine's thread ---------------------------------------------------------------------------------------

    def _used(self) -> int:
        return sum(handle is not None for handle in self._rows) + (self._reading is not None)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting or self._used())
                if self._closing and (self._stopped or not (self._waiting or self._used())):
                    break
            try:
                self._advance()
                self._failures = 0
            except Exception as error:
                self._fail(error)
        self._end("the model was closed")

    def _advance(self) -> None:
        """A chunk of prompts, then a token of each sequence."""
        self._drop_cancelled()
        budget = self._chunk
        while budget > 0 and (self._reading is not None or self._begin()):
            budget -= self._read_chunk()
        if any(self._rows):
            self._decode()

    def _drop_cancelled(self) -> None:
        with self._changed:
            waiting = [handle for handle in self._waiting if not handle.cancelled]
            self._counts["cancelled"] += len(self._waiting) - len(waiting)
            self._waiting = collections.deque(waiting)
        if self._reading is not None and self._reading.handle.cancelled:
            self._reading = None
            self._counts["cancelled"] += 1
        for b, handle in enumerate(self._rows):
            if handle is not None and handle.cancelled:
                self._rows[b] = self._arrays = None
                self._counts["cancelled"] += 1

    def _begin(self) -> bool:
        """Begins to read the next prompt; returns whether there is one, and a slot for it."""
        with self._changed:
            if not self._waiting or self._used() >= self.slots:
                return False
            handle = self._waiting.popleft()
            S = fitting(self._sizes, handle.length)
            self._reading = reading = _Reading(handle, None, S, 0)
        prompt = handle.tokens[: handle.length]
        common = [_common(x.tokens, prompt[:-1]) if x.adapter == handle.adapter else 0 for x in self._prefixes]
        best = int(np.argmax(common)) if common else 0
        if not common or common[best] < _LEAST or handle.seen is not None:
            reading.row = empty(self.engine.model, 1, S)
            return True
        kept = self._prefixes[best]
        del self._prefixes[best]
        self._prefixes.appendleft(kept)
        reading.row, reading.at = _resized(self.engine.model, S, kept.row, np.zeros(1, np.int32)), common[best]
        self._counts["prefix_hits"] += 1
        self._counts["prefix_tokens"] += reading.at
        return True

    def _read_chunk(self) -> int:
        """Reads a chunk; returns its width. After the last one the sequence joins the batch with its first token."""
        reading = self._reading
        assert reading is not None
        handle, S = reading.handle, reading.places
        width = self._chunk if handle.length - reading.at > self._chunk // 2 else _LEAST
        width = min(width, self._chunk, S)
        at = max(0, min(reading.at, S - width))  # a chunk that ends beyond the cache would be written elsewhere
        end = min(at + width, handle.length)
        part_1l = np.zeros((1, width), np.int32)
        part_1l[0, : end - at] = handle.tokens[at:end]
        where = np.array([at], np.int32), np.array([end - at - 1], np.int32)
        source = () if handle.seen is None or reading.at else (handle.seen,)
        given = self._given([handle]), reading.row, part_1l, *where, *source
        logits_1V, reading.row = read(self.engine.model, *given)
        self._counts["prompt_tokens"] += end - reading.at
        reading.at = end
        if end == handle.length:
            self._join(handle, reading.row, logits_1V)
        return width

    def _join(self, handle: Handle, row_1: PyTree, logits_1V: jax.Array) -> None:
        prompt = handle.tokens[: handle.length].copy()
        common = [(_common(x.tokens, prompt), x) for x in self._prefixes if x.adapter == handle.adapter]
        if handle.seen is None and len(prompt) >= _LEAST and not any(n == len(prompt) for n, _ in common):
            for prefix in [prefix for n, prefix in common if n == len(prefix.tokens)]:
                self._prefixes.remove(prefix)  # this one begins with it
            self._prefixes.appendleft(_Prefix(prompt, row_1, handle.adapter))
        arrays = SamplingArrays.of([handle.params], 1, few=True)
        if not self._take([handle], logits_1V, arrays)[0]:
            self._fit([handle])
            b = self._rows.index(None)
            self._cache = _put(self._cache, row_1, np.int32(b))
            self._rows[b], self._arrays = handle, None
        self._reading = None

    def _fit(self, more: Sequence[Handle] = ()) -> None:
        """Gives the cache as many rows and places as the sequences need; fewer only after a while."""
        here = [b for b, handle in enumerate(self._rows) if handle is not None]
        handles = [*(self._rows[b] for b in here), *more]
        B = fitting(self._batches, len(handles))
        S = fitting(self._sizes, max(handle.position for handle in handles if handle is not None))
        fits = len(self._rows) >= B and self._cache_places >= S
        self._loose = self._loose + 1 if fits and (len(self._rows), self._cache_places) != (B, S) else 0
        if fits and self._loose < _PATIENCE:
            return
        if not fits:  # what is too large in the other way is made smaller at another time
            B, S = max(B, len(self._rows)), max(S, self._cache_places)
        self._loose = 0
        if self._cache is None:
            self._cache = empty(self.engine.model, B, S)
        else:
            rows_B = np.array([*here, *[0] * (B - len(here))], np.int32)
            self._cache = _resized(self.engine.model, S, self._cache, rows_B)
        self._rows = [*(self._rows[b] for b in here), *[None] * (B - len(here))]
        self._cache_places, self._arrays = S, None

    def _decode(self) -> None:
        """One more token of every sequence. Rows without one write a token that nobody sees at their first place."""
        self._fit()
        B = len(self._rows)
        last_B1, position_B = np.zeros((B, 1), np.int32), np.zeros(B, np.int32)
        for b, handle in enumerate(self._rows):
            if handle is not None:
                last_B1[b], position_B[b] = handle.tokens[handle.position - 1], handle.position - 1
        logits_BV, self._cache = read(self.engine.model, self._given(self._rows), self._cache, last_B1, position_B)
        if self._arrays is None:
            self._arrays = SamplingArrays.of(
                [handle.params if handle else GREEDY for handle in self._rows], B, few=True
            )
        self._counts["steps"] += 1
        for b, ended in enumerate(self._take(self._rows, logits_BV, self._arrays)):
            if ended:
                self._rows[b] = self._arrays = None

    def _take(self, rows: Sequence[Handle | None], logits_BV: jax.Array, arrays: SamplingArrays) -> list[bool]:
        """Chooses a token for each row and tells it; returns which sequences have ended with it."""
        chosen_B = self._choose(rows, logits_BV, arrays)
        likely = None
        if any(handle is not None and handle.top is not None for handle in rows):
            likely = jax.device_get(_likely(logits_BV, chosen_B))
        token_B = np.asarray(chosen_B).tolist()
        ended, count = [False] * len(rows), 0
        for b, handle in enumerate(rows):
            if handle is not None and not handle.cancelled:
                said = None if likely is None or handle.top is None else _logprob(likely, b, handle.top)
                ended[b] = self._write(handle, token_B[b], said)
                count += 1
        self._counts["tokens"] += count
        self._rates.append((time.monotonic(), count))
        return ended

    def _write(self, handle: Handle, token: int, said: Logprob | None) -> bool:
        """Adds a token to a sequence and tells what is new; returns whether that is all."""
        text, reason = "", None
        tokens: tuple[int, ...] = (token,)
        if token in self._ends:
            reason, tokens, said = "end", (), None
        else:
            handle.tokens[handle.position] = token
            handle.position += 1
            if handle.detokenizer is not None:
                text = handle.detokenizer.push(token)
            if handle.detokenizer is not None and handle.detokenizer.stopped:
                reason = "stop"
            elif handle.position >= handle.limit:
                reason = "length"
        if reason is not None and handle.detokenizer is not None:
            text += handle.detokenizer.finish()
        self._tell(handle, Piece(text, tokens, () if said is None else (said,), reason))
        return reason is not None or handle.cancelled

    def _tell(self, handle: Handle, piece: Piece) -> None:
        try:
            handle.on_piece(piece)
        except Exception:  # of who has asked
            _log.exception("what takes the pieces of a sequence has failed")
            handle.cancelled = True

    def _choose(self, rows: Sequence[Handle | None], logits_BV: jax.Array, arrays: SamplingArrays) -> jax.Array:
        """``sampling.choose``, which reads the tokens only where there is a penalty for repeating them."""
        B, S = len(rows), 1 if arrays.repetition_penalty_B is None else self.places
        tokens_BS, length_B, position_B = np.zeros((B, S), np.int32), np.ones(B, np.int32), np.ones(B, np.int32)
        for b, handle in enumerate(rows):
            if handle is not None:
                tokens_BS[b], length_B[b], position_B[b] = handle.tokens[:S], handle.length, handle.position
        return _choose(logits_BV, State((), tokens_BS, length_B, position_B, length_B, length_B), arrays)

    def _given(self, rows: Sequence[Handle | None]) -> Variables:
        variables = self.engine.variables
        if ADAPTERS not in variables:
            return variables
        return {**variables, ROWS: np.array([handle.adapter if handle else 0 for handle in rows], np.int32)}

    def _fail(self, error: Exception) -> None:
        """Ends the sequences of the step that has failed; what waits goes on with a new cache."""
        _log.error("a step of the model has failed", exc_info=error)
        self._counts["failures"] += 1
        self._failures += 1
        self._prefixes.clear()
        self._cache, self._cache_places, self._arrays = None, 0, None
        with self._changed:
            self._closing |= self.broken
            waiting = self._waiting
            self._waiting = collections.deque() if self.broken else waiting
        self._end(f"the model has failed ({type(error).__name__})", waiting if self.broken else ())
        if self.broken:
            self._gave_up()

    def _end(self, why: str, waiting: Iterable[Handle] | None = None) -> None:
        handles = [*self._rows, *(self._waiting if waiting is None else waiting)]
        if self._reading is not None:
            handles.append(self._reading.handle)
        self._reading, self._rows = None, []
        for handle in handles:
            if handle is not None and not handle.cancelled:
                self._tell(handle, Piece("", finish_reason="error", error=why))


_choose = jax.jit(sampling.choose)


@functools.partial(jax.jit, donate_argnums=0)
def _put(cache: PyTree, row_1: PyTree, b: jax.Array) -> PyTree:
    """The cache with a row in the place of its row b, whose other places keep what they hold."""

    def put(whole: jax.Array, one: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(whole, one, (b, *[0] * (whole.ndim - 1)))

    return jax.tree.map(put, cache, row_1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _resized(model: Any, S: int, cache: PyTree, rows_B: jax.Array) -> PyTree:
    """These rows of a cache, with so many places."""

    def resized(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        x = x[(rows_B, *(slice(n) for n in like.shape[1:]))]
        return jnp.pad(x, [(0, n - m) for n, m in zip(like.shape, x.shape, strict=True)])

    return jax.tree.map(resized, cache, jax.eval_shape(lambda: model.cache(len(rows_B), S)))


@jax.jit
def _likely(logits_BV: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities: of each row's token f32[B]; the greatest f32[B,K], and whose they are i32[B,K]."""
    logp_BV = jax.nn.log_softmax(logits_BV)
    top_BK, who_BK = jax.lax.top_k(logp_BV, min(TOP, logp_BV.shape[1]))
    return jnp.take_along_axis(logp_BV, token_B[:, None], 1)[:, 0], top_BK, who_BK


def _logprob(likely: tuple[np.ndarray, np.ndarray, np.ndarray], b: int, top: int) -> Logprob:
    own_B, top_BK, who_BK = likely
    return Logprob(float(own_B[b]), tuple(zip(who_BK[b, :top].tolist(), top_BK[b, :top].tolist(), strict=True)))


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
