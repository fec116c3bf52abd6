"""From a data set to batches: shuffle, shard, decode, transform, batch, mask, prefetch.

Which examples are in batch ``k``, in which order and with which augmentation depends on the seed and on ``k`` alone:
not on the number of hosts, threads or batches read ahead, and not on where the run was interrupted. Position
``g = k * B + j`` of the endless stream of examples belongs to epoch ``g // N``; every epoch is a permutation of its own
(grain's index shuffle, computed per position, so that any step is reached at once); the random generator of an example
is counter-based, with ``g`` as its counter. Threads work on whole batches: rows are written where they belong, and
grain's cost per element is paid once per batch.

With buckets of lengths, the examples of some consecutive batches are dealt anew among these, so that those of about the
same length share a batch, which is then as long as they need. That too depends on the seed and on ``k`` alone.

Legend: B examples in a global batch, N examples in a split, g position in the training stream, k step.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from PIL import Image

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Dataset, Example, RawDataset, Source, Transform, UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.data import card
from bigbase_jax.data.shuffle import poisson, shuffled

# What a decoder raises for a file that is not what it should be; anything else is a bug and keeps its traceback.
_UNREADABLE = (
    UserError,
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_LISTED = 20  # bad files named in a message
_SAMPLED = 16  # examples decoded to estimate the size of a cache
_CHECKED = 256  # examples of a split that are read by data.check=sample
_COLUMN_ROWS = 4096  # examples that are checked at once, where they are read by columns
_WORTH = 2.0  # a cache may be this many times larger than the smallest one, to spare transforms at each use
_SAY_EVERY = 10.0  # seconds between progress lines
_TRAIN, _EVAL, _ORDER, _SAMPLE = 0, 1, 2, 3  # streams of random numbers
_POOL = 64  # batches among which examples are dealt by length
_WHOLE = sys.maxsize  # the length of a sequence that is not cut


class Unreadable(UserError):
    """An example that the check did not find, or that could be read at the time."""


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and how to make batches of it.

    Attributes:
      dataset: the data; a ``RawDataset`` becomes one in ``prepare``.
      batch_size: examples per training batch, over all hosts.
      train_transforms: applied to every use of a training example.
      eval_transforms: applied to examples for evaluation and prediction.
      eval_batch_size: examples per evaluation batch, over all hosts; None: ``batch_size``.
      seed: of the order of examples and of their augmentation.
      on_bad_example: what to do about examples that cannot be read: ``"stop"``, with their list, or ``"skip"``: those
        that the check finds are left out; one that is met later has no weight in its batch (``mask`` 0), and is named.
      poisson: how many examples a training batch has on average, where each is in each batch by chance and by itself
        (Poisson sampling); ``batch_size`` is then the most that it has: of a larger one the rest is left out, by
        chance, and the rows of a smaller one are filled up with ``mask`` 0. None: each epoch is a permutation.
      unit: with ``poisson``, the entry of the examples (a number or a text) that says whose each is: a batch then
        draws these, and has one example of each that is drawn, by chance. None: each example stands for itself.
      check: which examples are read before the first step to find those that cannot be: ``"all"``, once for all starts
        and for all processes that share ``cache_dir``, which also fills the cache; ``"sample"``, some 256 of each
        split; or ``"none"``. Without ``"all"``, a cache is used where it exists, and none is made.
      workers: threads that decode and transform; None: the cores available to this process.
      prefetch: batches prepared ahead.
      cache_limit_gb: how much disk (10^9 bytes) the folder of caches may take, least recently used ones going first;
        decoded examples that do not fit are decoded anew each time. 0: no cache.
      cache_dir: the folder of caches; None: ``$BIGBASE_CACHE``, or ``bigbase_jax`` below ``$XDG_CACHE_HOME`` or
        ``~/.cache``.
      buckets: lengths, each longer than the one before, such as ``(16, 24)``: a batch of sequences is padded to the
        shortest of them that all its examples fit, or else to the data set's own length, and examples that need the
        same share a batch. The training step is compiled once for each. Empty: all batches have one length.

    Raises:
      UserError: a value out of its range.
    """

    dataset: Dataset
    batch_size: int
    train_transforms: tuple[Transform, ...] = ()
    eval_transforms: tuple[Transform, ...] = ()
    eval_batch_size: int | None = None
    seed: int = 0
    on_bad_example: str = "stop"
    workers: int | None = None
    prefetch: int = 4
    cache_limit_gb: float = 4.0
    cache_dir: str | None = None
    buckets: tuple[int, ...] = ()
    check: str = "all"
    poisson: float | None = None
    unit: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("on_bad_example", ("stop", "skip")), ("check", ("all", "sample", "none"))):
            if (value := getattr(self, name)) not in known:
                allowed = " or ".join(map(repr, known))
                raise UserError(f"data.{name} is {value!r}; it must be {allowed}.{suggest(str(value), known, 'value')}")
        for name, least in (("batch_size", 1), ("eval_batch_size", 1), ("workers", 1), ("prefetch", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"data.{name} is {value}; it must be at least {least}.")
        if not self.cache_limit_gb >= 0:
            raise UserError(f"data.cache_limit_gb is {self.cache_limit_gb}; it must be 0 (no cache) or more.")
        if self.poisson is not None and not 0 < self.poisson <= self.batch_size:
            raise UserError(
                f"data.poisson is {self.poisson}; batches of at most data.batch_size={self.batch_size} have on average "
                "more than 0 and no more than that."
            )
        if self.poisson is not None and self.buckets:
            raise UserError(
                "data.poisson draws each example by itself, and data.buckets deals them by length; use one."
            )
        if self.unit is not None and self.poisson is None:
            raise UserError(f"data.unit={self.unit!r} says what data.poisson draws; give that too.")
        if any(shorter >= longer for shorter, longer in itertools.pairwise((0, *self.buckets))):
            raise UserError(
                f"data.buckets is {self.buckets}; it holds lengths that grow, such as (16, 24), or nothing."
            )

    @property
    def dataset_info(self) -> Mapping[str, Any]:
        """The data set's facts (``num_classes``, ...)."""
        return self.dataset.dataset_info

    @property
    def num_workers(self) -> int:
        """Threads that decode and transform."""
        if self.workers is not None:
            return self.workers
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def prepare(self, say: Callable[[str], None] = _to_stderr) -> Prepared:
        """Reads every example once, unless an earlier start or another process has, or ``check`` says otherwise: finds
        the unreadable ones and fills the caches.

        Args:
          say: takes lines about progress and about a cache that cannot be used.

        Raises:
          UserError: no training examples, an empty split, or unreadable examples where ``on_bad_example="stop"``.
        """
        if isinstance(self.dataset, RawDataset):
            root = caches.default_root(self.cache_dir)
            key = hashlib.sha256(repr(self.dataset).encode()).hexdigest()[:24]
            with caches.one_builder(root, key, say) if self.cache_limit_gb > 0 else contextlib.nullcontext():
                dataset = self.dataset.prepare(root, self.cache_limit_gb * 1e9, say)
            return dataclasses.replace(self, dataset=dataset).prepare(say)
        if "train" not in self.dataset.splits:
            raise UserError(
                f"the data has no split 'train'; it has: {', '.join(sorted(self.dataset.splits)) or 'no split at all'}."
            )
        if self.buckets and getattr(self.dataset.splits["train"], "lengths", None) is None:
            raise UserError("these examples are all of one length; leave data.buckets at ().")
        for name, source in self.dataset.splits.items():
            if len(source) < 1:
                raise UserError(f"the {name} split has no examples; add some, or leave the split out.")
        preparation = _Preparation(self, say)
        parts = {name: preparation.split(name) for name in sorted(self.dataset.splits, key=_train_first)}
        preparation.finish(parts)
        prepared = Prepared(self, parts, say)
        prepared.refuse_bad()
        return prepared


def apply_eval(transforms: Sequence[Transform], example: Example, seed: int) -> Example:
    """The evaluation transforms on one example that is in no split, as for prediction."""
    rng = _generator(seed, _EVAL, 0)
    for transform in transforms:
        example = transform(example, rng)
    return example


class Prepared:
    """Data that was checked: counts, batches, and the raw examples, without those that cannot be read.

    Attributes:
      data: what it was prepared from.
      splits: readable examples of each split, by name.
      bad: unreadable examples of each split, by name: (index in the dataset's source, why).
    """

    def __init__(self, data: Data, parts: Mapping[str, _Part], say: Callable[[str], None]):
        self.data = data
        self._parts = dict(parts)
        skipped: set[str] = set()

        def skip(why: str) -> None:
            if why not in skipped:
                skipped.add(why)
                say(f"warning: {why}; it is left out where it would be used.")

        for part in parts.values():
            part.skip = skip if data.on_bad_example == "skip" else None
            if data.buckets and part.kept.lengths is not None:
                lengths = np.array([*data.buckets, _WHOLE])
                part.cut_N = lengths[np.searchsorted(data.buckets, part.kept.lengths)]
        self.splits: Mapping[str, int] = {name: len(part.kept) for name, part in parts.items()}
        self.bad: Mapping[str, caches.Bad] = {name: part.bad for name, part in parts.items()}
        self._of_unit = None if data.unit is None else _grouped(self.source("train"), data.unit)
        if data.poisson is not None and data.poisson > self.num_units:
            raise UserError(
                f"data.poisson is {data.poisson:g}, of {self.num_units} that can be drawn; it is at most that."
            )

    @property
    def dataset_info(self) -> Mapping[str, Any]:
        """The data set's facts (``num_classes``, ...)."""
        return self.data.dataset_info

    @property
    def description(self) -> str:
        """The data set's line about itself."""
        return self.data.dataset.description

    @property
    def batch_size(self) -> int:
        """Examples in a training batch, over all hosts."""
        return self.data.batch_size

    @property
    def eval_batch_size(self) -> int:
        """Examples in an evaluation batch, over all hosts."""
        return self.data.batch_size if self.data.eval_batch_size is None else self.data.eval_batch_size

    def refuse_bad(self) -> None:
        """Raises UserError with the list of unreadable examples, unless they are to be skipped and others are left."""
        for name, part in self._parts.items():
            if not len(part.kept):
                raise UserError(
                    f"none of the {len(part.bad)} examples of the {name} split can be read; {part.why(1)[0]}"
                )
        count = sum(map(len, self.bad.values()))
        if count and self.data.on_bad_example == "stop":
            lines = [line for part in self._parts.values() for line in part.why(_LISTED)][:_LISTED]
            if count > len(lines):
                lines.append(f"and {count - len(lines)} more")
            total = count + sum(self.splits.values())
            raise UserError(
                f"{count} of {total} examples cannot be read; mend or delete them, or leave them out with "
                "data.on_bad_example=skip:\n  " + "\n  ".join(lines)
            )

    def summary(self) -> list[str]:
        """Lines for people: what the data is, the examples and classes of each split, what is left out, caches."""
        lines = [f"data: {self.description}"]
        lines += [f"  {name}: {told}" for name, told in {**self._balances(), **self._unreadable()}.items()]
        states: dict[str, list[str]] = {}
        for name, part in self._parts.items():
            states.setdefault(part.state, []).append(name)
        lines += [f"  cache ({', '.join(names)}): {state}" for state, names in states.items()]
        if (cut_N := self._part("train").cut_N) is not None:
            shares = (
                f"{'longer' if length == _WHOLE else f'up to {length}'} {count / len(cut_N):.1%}"
                for length, count in zip(*np.unique(cut_N, return_counts=True), strict=True)
            )
            lines.append(f"  lengths (train): {', '.join(shares)}")
        return lines

    def fingerprint(self) -> str:
        """A digest of the data that is used: the dataset's own and which examples are left out."""
        return self._used(self.data.dataset.fingerprint())

    def lineage(self, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a run notes of its data: ``description``, ``fingerprint``, ``splits`` with their sizes, the fingerprint
        of its ``examples``, however they are encoded, and ``data_card``: what its report says of them.

        Args:
          config: the ``data`` node of the run's config; see ``card.origin``.
        """
        dataset = self.data.dataset
        fingerprint = dataset.fingerprint()
        examples = dataset.examples() if hasattr(dataset, "examples") else fingerprint
        return {
            "description": self.description,
            "fingerprint": self._used(fingerprint),
            "examples": self._used(examples),
            "splits": dict(self.splits),
            "data_card": {**self._balances(), **self._unreadable(), **card.origin(config or {})},
        }

    def _balances(self) -> dict[str, str]:
        """The examples and classes of each split, by its name."""
        return {
            name: f"{len(part.kept):,} examples{_balance(part.kept, self.dataset_info)}"
            for name, part in self._parts.items()
        }

    def _unreadable(self) -> dict[str, str]:
        """How many examples were left out, or how many were read to look for them."""
        counts = {name: len(bad) for name, bad in self.bad.items() if bad}
        if counts:
            each = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            return {"unreadable, left out": f"{sum(counts.values()):,} ({each})"}
        among = {"all": "", "sample": f" among {_CHECKED} of each split", "none": " looked for"}[self.data.check]
        return {"unreadable": f"none{among}"}

    def _used(self, fingerprint: str) -> str:
        bad = {name: [i for i, _ in bad] for name, bad in sorted(self.bad.items())}
        return hashlib.sha256(json.dumps([fingerprint, bad]).encode()).hexdigest()[:16]

    def num_examples(self, split: str = "train") -> int:
        """Readable examples of a split; raises UserError if there is no such split."""
        return len(self._part(split).kept)

    @property
    def num_units(self) -> int:
        """How many a Poisson sample is drawn from: the training examples, or those whom they are of (``Data.unit``)."""
        return self.num_examples("train") if self._of_unit is None else len(self._of_unit)

    @property
    def steps_per_epoch(self) -> float:
        """N / B of the training split, or where batches are Poisson samples, U over their mean size, of U that are
        drawn from; batches may straddle epochs, so it need not be whole."""
        if self.data.poisson is not None:
            return self.num_units / self.data.poisson
        return self.num_examples("train") / self.batch_size

    def source(self, split: str) -> KeptSource:
        """The untransformed examples of a split; ``index`` in a batch counts in it."""
        return self._part(split).kept

    def train_batches(self, start: int = 0, shard: tuple[int, int] = (0, 1)) -> Batches:
        """Training batches without end, from step ``start`` on.

        Args:
          start: the first batch is the one of this step; reached at once.
          shard: (i, n): this is host i of n and gets rows [i * B / n, (i + 1) * B / n) of each batch of B.

        Returns:
          An iterator of the transformed examples' entries, stacked [B / n, ...], with ``mask`` f32[B / n] of ones and
          ``index`` i32[B / n], the example's index in ``source("train")``.

        Raises:
          UserError: the hosts do not divide the batch size.
        """
        make, rows = self._training(shard)
        return Batches(make, start, sys.maxsize // self.batch_size, self.data, rows)

    def train_shapes(self, shard: tuple[int, int] = (0, 1)) -> list[dict[str, np.ndarray]]:
        """A training batch of each shape that there is, the longest last."""
        make, _ = self._training(shard)
        cut_N = self._part("train").cut_N
        return [make(0, None, 0, length) for length in ([None] if cut_N is None else np.unique(cut_N))]

    def _training(self, shard: tuple[int, int]) -> tuple[Callable[..., dict[str, np.ndarray]], int]:
        """What makes training batch k, and how many of its rows this host has."""
        data, part = self.data, self._part("train")
        rows = _rows_of_host(self.batch_size, shard, "data.batch_size")
        chain = part.chain(data.train_transforms, data.seed, _TRAIN)
        if data.poisson is not None:
            units, rate, most, of_unit = self.num_units, data.poisson / self.num_units, self.batch_size, self._of_unit

            def sample(
                k: int, pool: concurrent.futures.Executor | None, chunks: int, length: int | None = None
            ) -> dict[str, np.ndarray]:
                drawn = poisson(_generator(data.seed, _SAMPLE, k), units, rate, most, of_unit)
                mine = drawn[rows.start : rows.stop]
                examples = mine if len(mine) else np.zeros(1, np.int64)
                g = k * most + rows.start + np.arange(len(examples))
                return chain.batch(examples, g, len(rows), pool, chunks, len(mine), length)

            return sample, len(rows)
        order = _Order(len(part.kept), self.batch_size, data.seed, part.cut_N)

        def batch(
            k: int, pool: concurrent.futures.Executor | None, chunks: int, length: int | None = None
        ) -> dict[str, np.ndarray]:
            examples, g, needed = order.batch(k, rows)
            return chain.batch(examples, g, len(g), pool, chunks, length=length or needed)

        return batch, len(rows)

    def eval_batches(self, split: str, shard: tuple[int, int] = (0, 1), limit: int | None = None) -> Batches:
        """A split once, with the evaluation transforms; in order and with batches of one shape, but for ``buckets``.

        The last batch is padded by repeating an example, with ``mask`` 0. With several hosts each gets its rows of
        every batch, so that all have the same number of batches.

        Args:
          split: name of the split.
          shard: (i, n): this is host i of n.
          limit: take so many examples, spread evenly over the split; None: all.

        Returns:
          An iterator of batches with the entries that ``train_batches`` describes; ``len()`` of it is their number.

        Raises:
          UserError: no such split, or the hosts do not divide the batch size.
        """
        data = self.data
        named = "data.batch_size" if data.eval_batch_size is None else "data.eval_batch_size"
        batch_size = self.eval_batch_size
        rows = _rows_of_host(batch_size, shard, named)
        part = self._part(split)
        chain = part.chain(data.eval_transforms, data.seed, _EVAL)
        cut_N, order_N = part.cut_N, np.arange(len(part.kept))
        if limit is not None and limit < len(order_N):
            order_N = order_N[np.arange(limit) * len(order_N) // limit]
        if cut_N is not None:
            order_N = order_N[np.argsort(cut_N[order_N], kind="stable")]
        n = len(order_N)

        def batch(k: int, pool: concurrent.futures.Executor | None, chunks: int) -> dict[str, np.ndarray]:
            mine = order_N[k * batch_size + rows.start : k * batch_size + rows.stop]
            indices = mine if len(mine) else order_N[-1:]
            length = None if cut_N is None else int(cut_N[order_N[min((k + 1) * batch_size, n) - 1]])
            return chain.batch(indices, indices, len(rows), pool, chunks, len(mine), length)

        return Batches(batch, 0, math.ceil(n / batch_size), data, len(rows))

    def _part(self, split: str) -> _Part:
        if split not in self._parts:
            raise UserError(
                f"the data has no split {split!r}.{suggest(split, self._parts, 'split')}"
                f" The splits are: {', '.join(self._parts)}."
            )
        return self._parts[split]


class Batches(Iterator[dict[str, np.ndarray]], contextlib.AbstractContextManager):
    """Batches made ahead by threads, which end with ``close``, with the ``with`` block, or with the last reference."""

    def __init__(
        self,
        batch: Callable[..., dict[str, np.ndarray]],
        start: int,
        stop: int,
        data: Data,
        rows: int,
    ):
        """``batch(k, pool=, chunks=)`` makes batch k, of ``rows`` rows; ``start`` and ``stop`` bound k."""
        workers, ahead = data.num_workers, data.prefetch
        self._length = max(stop - start, 0)
        self._pool = None
        chunks = 1
        if workers > ahead > 0:  # fewer batches in the making than threads: several threads share a batch
            chunks = min(rows, 2 * math.ceil(workers / ahead))
        if chunks > 1:
            self._pool = concurrent.futures.ThreadPoolExecutor(workers, thread_name_prefix="bigbase-data")
        make = functools.partial(batch, pool=self._pool, chunks=chunks)
        options = grain.ReadOptions(num_threads=min(workers, ahead), prefetch_buffer_size=ahead)
        self._iterator: Any = iter(grain.MapDataset.range(start, stop).map(make).to_iter_dataset(options))

    def __len__(self) -> int:
        """Batches from the first to the last."""
        return self._length

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:
            raise StopIteration
        try:
            return next(self._iterator)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the threads, once they are through with what they are at; further batches are not to be had."""
        iterator, self._iterator = getattr(self, "_iterator", None), None
        if iterator is not None:
            iterator.close()
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # the interpreter may be going down
            self.close()


class KeptSource:
    """The readable examples of a source, numbered anew.

    Attributes:
      labels: i32[N] where the source has labels, else None.
      lengths: i64[N] where the source has lengths, else None.
      sequences: names of the entries whose first axis has these lengths.
      packed: whether an example has parts of several documents.
      batch: several examples at once, stacked, where the source has it; else None.
      pairs, same: i64[P,2] and bool[P] where the source has such pairs of examples, else None; readable ones are left.
    """

    def __init__(self, source: Source, split: str, bad: caches.Bad):
        self._source, self._split = source, split
        self._indices: np.ndarray | None = None
        if bad:
            self._indices = np.setdiff1d(np.arange(len(source)), [i for i, _ in bad], assume_unique=True)
        self.labels = self._of("labels")
        self.lengths = self._of("lengths")
        self.sequences: tuple[str, ...] = getattr(source, "sequences", ())
        self.packed = bool(getattr(source, "packed", False))
        self.batch = None if getattr(source, "batch", None) is None else self._batch
        self.pairs, self.same = getattr(source, "pairs", None), getattr(source, "same", None)
        if self.pairs is not None and self._indices is not None:
            kept = np.isin(self.pairs, self._indices).all(1)
            self.pairs, self.same = np.searchsorted(self._indices, self.pairs[kept]), np.asarray(self.same)[kept]

    def _of(self, name: str) -> np.ndarray | None:
        values = getattr(self._source, name, None)
        if values is None:
            return None
        return np.asarray(values) if self._indices is None else np.asarray(values)[self._indices]

    def __len__(self) -> int:
        return len(self._source) if self._indices is None else len(self._indices)

    def __getitem__(self, index: int) -> Example:
        example = _read(self._source, self.original(index))
        if isinstance(example, _Bad):
            name, reason = self.name(index), example.reason.rstrip(".")
            raise Unreadable(reason if name in reason else f"{name} cannot be read: {reason}")
        return example

    def _batch(self, indices: np.ndarray) -> Batch:
        return self._source.batch(indices if self._indices is None else self._indices[indices])  # type: ignore[attr-defined]

    def original(self, index: int) -> int:
        """The example's index in the dataset's own source."""
        return int(index) if self._indices is None else int(self._indices[index])

    def name(self, index: int) -> str:
        """What a person calls the example: the source's ``name``, else split and number."""
        return _name(self._source, self._split, self.original(index))


# --- one split --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Part:
    """A split after its check: the readable examples, and the cache of what the first transforms make of them.

    Attributes:
      cut_N: i64[N], to which length each readable example can be cut; None: there are no buckets.
      skip: takes why an example is skipped that cannot be read after all; None: that is an error.
    """

    split: str
    source: Source
    bad: caches.Bad
    cache: caches.Store | None = None
    prefix: tuple[Transform, ...] = ()
    state: str = "none"
    cut_N: np.ndarray | None = None
    skip: Callable[[str], None] | None = None
    kept: KeptSource = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.kept = KeptSource(self.source, self.split, self.bad)

    def chain(self, transforms: tuple[Transform, ...], seed: int, stream: int) -> _Chain:
        """Examples through ``transforms``, from the cache if that holds what their first ones make."""
        done = len(self.prefix)
        if self.cache is not None and transforms[:done] == self.prefix:
            return _Chain(self.cache, transforms[done:], self.split, seed, stream, self.kept.sequences)
        return _Chain(self.kept, transforms, self.split, seed, stream, self.kept.sequences, self.skip)

    def why(self, limit: int) -> list[str]:
        """The first unreadable examples, a line each."""
        lines = []
        for index, reason in self.bad[:limit]:
            name = _name(self.source, self.split, index)
            lines.append(reason if name in reason else f"{name}: {reason}")
        return lines


class _Order:
    """Which examples are in training batch k.

    With ``cut_N``, the examples of ``_POOL`` consecutive batches (fewer where an epoch has fewer) are dealt among them
    again: those that need the same length share a batch, and the batches follow each other in random order.
    """

    def __init__(self, n: int, batch_size: int, seed: int, cut_N: np.ndarray | None):
        # Grain's seeds of successive epochs are successive numbers: spread ours, or seeds 0 and 1 would share epochs.
        shuffle_seed = int(np.random.SeedSequence(seed % 2**64).generate_state(1)[0])
        self._stream = functools.partial(shuffled, n=n, seed=shuffle_seed)
        self._batch_size, self._seed, self._cut_N = batch_size, seed, cut_N
        self._pool = max(1, min(_POOL, n // batch_size))
        self._dealt = functools.lru_cache(maxsize=4)(self._deal)

    def batch(self, k: int, rows: range) -> tuple[np.ndarray, np.ndarray, int | None]:
        """(examples, their positions g, the length that the batch needs) of some rows."""
        if self._cut_N is None:
            g = k * self._batch_size + np.arange(rows.start, rows.stop)
            return self._stream(g), g, None
        examples_PB, g_PB = self._dealt(k // self._pool)
        examples_B, g_B = examples_PB[k % self._pool], g_PB[k % self._pool]
        length = int(self._cut_N[examples_B].max())
        return examples_B[rows.start : rows.stop], g_B[rows.start : rows.stop], length

    def _deal(self, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """i64[P, B] each, examples and positions, of the P batches of a pool."""
        assert self._cut_N is not None
        size = self._pool * self._batch_size
        g = np.arange(pool * size, (pool + 1) * size)
        examples = self._stream(g)
        by_length = np.argsort(self._cut_N[examples], kind="stable").reshape(self._pool, self._batch_size)
        by_length = _generator(self._seed, _ORDER, pool).permutation(by_length)
        return examples[by_length], g[by_length]


def _grouped(source: KeptSource, entry: str) -> list[np.ndarray]:
    """The examples of each value of an entry, in the order of the values.

    Raises:
      UserError: an example has no such entry, or it is neither a number nor a text.
    """
    first = source[0]
    if entry not in first or np.ndim(first[entry]):
        known = [name for name, x in first.items() if not np.ndim(x)]
        raise UserError(f"data.unit={entry!r} is no number or text of the examples.{suggest(entry, known, 'entry')}")
    if source.batch is not None:
        value_N = np.asarray(source.batch(np.arange(len(source)))[entry])
    else:
        value_N = np.array([source[i][entry] for i in range(len(source))])
    _, unit_N, count_U = np.unique(value_N, return_inverse=True, return_counts=True)
    return np.split(np.argsort(unit_N, kind="stable"), np.cumsum(count_U)[:-1])


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Examples and what is still to be done to them."""

    source: Source
    transforms: tuple[Transform, ...]
    split: str
    seed: int
    stream: int
    sequences: tuple[str, ...] = ()
    skip: Callable[[str], None] | None = None

    def example(self, index: int, counter: int, length: int | None = None) -> dict[str, np.ndarray]:
        example = self.source[index]
        if self.transforms:
            rng = _generator(self.seed, self.stream, counter)
            for transform in self.transforms:
                example = transform(example, rng)
        arrays = {name: caches.as_array(value) for name, value in example.items()}
        return {name: array[:length] if name in self.sequences else array for name, array in arrays.items()}

    def batch(
        self,
        indices: np.ndarray,
        counters: np.ndarray,
        size: int,
        pool: concurrent.futures.Executor | None,
        chunks: int,
        real: int | None = None,
        length: int | None = None,
    ) -> dict[str, np.ndarray]:
        """Examples stacked into arrays of ``size`` rows, the last one filling the rest; ``real`` rows have mask 1.

        ``sequences`` are cut to ``length``."""
        index = np.concatenate([indices, np.repeat(indices[-1:], size - len(indices))])
        mask = (np.arange(size) < (len(indices) if real is None else real)).astype(np.float32)
        out = self._columns(index, length)
        if out is None:
            out = self._rows(indices.tolist(), counters.tolist(), mask, pool, chunks, length)
        clash = {"mask", "index"} & out.keys()
        if clash:
            raise UserError(f"examples may not have an entry {min(clash)!r}: the pipeline adds it; rename it.")
        return {**out, "index": index.astype(np.int32), "mask": mask}

    def _columns(self, indices: np.ndarray, length: int | None) -> dict[str, np.ndarray] | None:
        """The examples read by columns; None where the source takes one at a time, or there are transforms."""
        read = getattr(self.source, "batch", None)
        if read is None or self.transforms:
            return None
        try:
            out = {name: caches.as_array(array) for name, array in read(indices).items()}
        except _UNREADABLE:
            return None  # row by row, to find which one it is
        return {name: array[:, :length] if name in self.sequences else array for name, array in out.items()}

    def _rows(
        self,
        indices: Sequence[int],
        counters: Sequence[int],
        mask: np.ndarray,
        pool: concurrent.futures.Executor | None,
        chunks: int,
        length: int | None,
    ) -> dict[str, np.ndarray]:
        """The examples read one by one; ``mask`` becomes 0 where one cannot be read."""
        first_row, first = self._first(indices, counters, length)
        out = {name: np.empty((len(mask), *array.shape), array.dtype) for name, array in first.items()}
        count = len(indices)

        def fill(rows: range) -> None:
            for row in rows:
                read = row > first_row
                example = self._readable(indices[row], counters[row], length) if read else first
                mask[row] *= example is not None and row >= first_row
                self._put(out, row, first if example is None else example)

        if pool is None or chunks < 2:
            fill(range(count))
        else:
            step = math.ceil(count / chunks)
            for _ in pool.map(fill, [range(i, min(i + step, count)) for i in range(0, count, step)]):
                pass
        for array in out.values():
            array[count:] = array[count - 1]
        return out

    def _readable(self, index: int, counter: int, length: int | None) -> dict[str, np.ndarray] | None:
        """An example; None if it cannot be read and is to be skipped, which is said."""
        try:
            return self.example(index, counter, length)
        except Unreadable as error:
            if self.skip is None:
                raise UserError(
                    f"{error}; mend or delete it, or leave such examples out with data.on_bad_example=skip."
                ) from error
            self.skip(str(error))
            return None

    def _first(
        self, indices: Sequence[int], counters: Sequence[int], length: int | None
    ) -> tuple[int, dict[str, np.ndarray]]:
        """The first example that can be read, and its row; of the split, and no row, where those of a batch cannot."""
        others = ((i, i) for i in range(len(self.source)))
        for row, (index, counter) in enumerate(itertools.chain(zip(indices, counters, strict=True), others)):
            example = self._readable(index, counter, length)
            if example is not None:
                return min(row, len(indices)), example
        raise UserError(f"none of the {len(self.source)} examples of the {self.split} split can be read.")

    def _put(self, out: dict[str, np.ndarray], row: int, example: dict[str, np.ndarray]) -> None:
        if example.keys() != out.keys():
            raise UserError(
                f"examples of the {self.split} split differ in their entries: {sorted(out)} and {sorted(example)};"
                " a batch needs the same in all."
            )
        for name, array in example.items():
            target = out[name]
            if array.shape != target.shape[1:] or array.dtype != target.dtype:
                raise UserError(
                    f"examples of the {self.split} split differ in {name!r}: {target.dtype}{list(target.shape[1:])} and"
                    f" {array.dtype}{list(array.shape)}; a batch needs one shape, so add a Resize or a crop to"
                    f" data.{'train' if self.stream == _TRAIN else 'eval'}_transforms."
                )
            target[row] = array


# --- the check and the caches -----------------------------------------------------------------------------------------


class _Preparation:
    """Checks the splits of a data set one by one and fills their caches, within one limit for all of them."""

    def __init__(self, data: Data, say: Callable[[str], None]):
        self._data, self._say = data, say
        self._fingerprint = data.dataset.fingerprint()
        self._root = caches.default_root(data.cache_dir)
        self._left = data.cache_limit_gb * 1e9
        self._writable = True

    def split(self, name: str) -> _Part:
        """Finds out which examples of a split are unreadable, from an earlier check if there was one."""
        source = self._data.dataset.splits[name]
        chain = self._data.train_transforms if name == "train" else self._data.eval_transforms
        fixed = tuple(chain[: _deterministic(chain)])
        key = caches.key_of(self._fingerprint, name, source, fixed)
        in_memory = getattr(source, "in_memory", False)  # or, in words, where the source keeps its examples
        part = self._cached(name, source, fixed, key)
        if part is not None:
            return part
        if in_memory and (not fixed or self._data.cache_limit_gb == 0):
            return _Part(name, source, [], state=_kept_where(in_memory) if self._data.cache_limit_gb else "off")
        if self._data.check != "all":
            some = range(0, len(source), -(-len(source) // _CHECKED)) if self._data.check == "sample" else ()
            return _Part(name, source, _unreadable(source, some), state=f"none, data.check is {self._data.check}")
        with caches.one_builder(self._root, key, self._say):
            return self._cached(name, source, fixed, key) or self._checked(name, source, fixed, key)

    def _cached(self, name: str, source: Source, fixed: tuple[Transform, ...], key: str) -> _Part | None:
        """The split from a cache that was made before."""
        found = caches.find(self._root, key) if self._left > 0 else None
        if found is None or (_bad_of(found) and self._data.check != "all"):  # whose order of examples it would change
            return None
        if self._mended(source, _bad_of(found)):
            caches.discard(self._root / f"cache-{key}")
            return None
        return self._from(name, source, found, fixed, "from before")

    def _from(self, name: str, source: Source, found: caches.Store, fixed: tuple[Transform, ...], when: str) -> _Part:
        """The split from a cache."""
        self._left -= found.nbytes
        state = f"{_megabytes(found.nbytes)} in {self._root}, {when}"
        return _Part(name, source, _bad_of(found), found, fixed[: found.about["transforms"]], state)

    def _checked(self, name: str, source: Source, fixed: tuple[Transform, ...], key: str) -> _Part:
        """The split after its check, with a cache where that is wanted and fits."""
        in_memory, columns = getattr(source, "in_memory", False), getattr(source, "batch", None) is not None
        limit_gb = self._data.cache_limit_gb
        nbytes, prefix = self._estimate(source, fixed) if limit_gb else (0.0, ())
        wanted = False
        if limit_gb == 0:
            state = "off"
        elif in_memory and not prefix:
            state = _kept_where(in_memory)
        elif columns and not prefix:
            state = "none needed, the examples are read in columns"
        elif not math.isfinite(nbytes):
            state = "none, the examples have no fixed binary form"
        elif nbytes > self._left:
            needs = f"decoded it would take about {_megabytes(nbytes)}"
            state = f"none, {needs}, more than is left of data.cache_limit_gb={limit_gb:g}"
        elif nbytes > caches.free_bytes(self._root):
            state = f"none, it would take about {_megabytes(nbytes)} and the disk has no room for it"
        else:
            state, wanted = "none", self._writable
        if in_memory and not wanted:
            return _Part(name, source, [], state=state)

        # What was found unreadable is kept as a store without rows, where the examples are not.
        verdict_key = caches.key_of(self._fingerprint, f"{name}, checked", source)
        if not wanted and (verdict := caches.find(self._root, verdict_key)) is not None:
            if not self._mended(source, bad := _bad_of(verdict)):
                return _Part(name, source, bad, state=state)
            caches.discard(self._root / f"cache-{verdict_key}")
        bad, cache, failure = self._read_all(name, source, prefix, key if wanted else None)
        if cache is None or bad:
            with self._unless_unwritable("the outcome of this check is not remembered"):
                caches.Writer(self._root, verdict_key).commit({"bad": bad})
        if cache is None:
            return _Part(name, source, bad, state=failure or state)
        return self._from(name, source, cache, fixed, "new")  # by another process, perhaps, which had the same to do

    def finish(self, parts: Mapping[str, _Part]) -> None:
        """Deletes caches of other data that no longer fit the limit."""
        used = [part.cache.directory for part in parts.values() if part.cache and part.cache.directory]
        if used:
            caches.prune(self._root, self._data.cache_limit_gb * 1e9, used)

    def _mended(self, source: Source, bad: caches.Bad) -> bool:
        """Whether an example that was unreadable can be read now (permissions and networks leave no fingerprint)."""
        return any(not isinstance(_read(source, index), _Bad) for index, _ in bad)

    def _estimate(self, source: Source, fixed: tuple[Transform, ...]) -> tuple[float, tuple[Transform, ...]]:
        """Bytes that a cache would take, and the ``fixed`` transforms before it: as many as is reasonable, and a
        ``costly`` one (see ``Transform``) wherever its result fits."""
        n = len(source)
        sizes: list[list[float]] = []
        rng = np.random.default_rng(0)
        for i in sorted({n * k // _SAMPLED for k in range(_SAMPLED)}):
            example = _read(source, i)
            if isinstance(example, _Bad):
                continue
            row = [_nbytes(example)]
            for transform in fixed:
                example = transform(example, rng)
                row.append(_nbytes(example))
            sizes.append(row)
        if not sizes:
            return 0.0, ()
        totals = np.mean(sizes, axis=0) * n
        most = max(min(_WORTH * totals.min(), self._left), totals.min())
        length = max(i for i, total in enumerate(totals) if total <= most)
        costly = (i for i, transform in enumerate(fixed, 1) if getattr(transform, "costly", False))
        length = max([length, *(i for i in costly if totals[i] <= self._left)])
        return float(totals[length]), fixed[:length]

    def _read_all(
        self, name: str, source: Source, prefix: tuple[Transform, ...], key: str | None
    ) -> tuple[caches.Bad, caches.Store | None, str | None]:
        """Reads every example of a split in parallel and caches it under ``key``, if given.

        Returns: the unreadable ones, the cache, and why there is none.
        """
        workers, n = self._data.num_workers, len(source)
        rng = threading.local()

        def decode(index: int) -> Example | _Bad:
            example = _read(source, index)
            if isinstance(example, _Bad):
                return example
            if writer is None:
                return {}
            if not hasattr(rng, "value"):
                rng.value = np.random.default_rng(0)
            for transform in prefix:
                example = transform(example, rng.value)
            return example

        if key is None and (batch := getattr(source, "batch", None)) is not None:
            return _bad_in_columns(source, batch), None, None
        bad: caches.Bad = []
        writer: caches.Writer | None = None
        failure: str | None = None
        if key is not None:
            with self._unless_unwritable("decoded examples are not kept"):
                writer = caches.Writer(self._root, key)
            failure = None if writer else "none, its folder cannot be written"
        purpose = " and keeping them decoded" if writer else ""
        self._say(f"data: reading the {n:,} examples of the {name} split once, to check them{purpose}")
        options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=4 * workers)
        iterator: Any = iter(grain.MapDataset.range(n).map(decode).to_iter_dataset(options))
        last = time.monotonic()
        cache = None
        try:
            for index, example in enumerate(iterator):
                if isinstance(example, _Bad):
                    bad.append((index, example.reason))
                elif writer is not None:
                    writer, failure = self._add(writer, example)
                if time.monotonic() - last > _SAY_EVERY:
                    last = time.monotonic()
                    self._say(f"data: {index + 1:,} of {n:,} read")
            if writer is not None and len(bad) < n:
                with self._unless_unwritable("decoded examples are not kept"):
                    cache = writer.commit({"bad": bad, "transforms": len(prefix)})
                failure = None if cache else "none, its folder cannot be written"
        finally:
            iterator.close()
            if writer is not None and cache is None:
                writer.abort()
        return bad, cache, failure

    def _add(self, writer: caches.Writer, example: Example) -> tuple[caches.Writer | None, str | None]:
        try:
            with self._unless_unwritable("decoded examples are not kept"):
                writer.add(example)
                return writer, None
            failure = "none, the disk cannot take it"
        except caches.NotCacheable as error:
            failure = f"none, the examples cannot be kept: {error}"
        writer.abort()
        return None, failure

    @contextlib.contextmanager
    def _unless_unwritable(self, consequence: str) -> Iterator[None]:
        """Swallows the first OSError of the cache folder with a warning; a cache is never worth a stop."""
        try:
            yield
        except OSError as error:
            if self._writable:
                reason = error.strerror or str(error)
                self._say(f"warning: the cache folder {self._root} cannot be written ({reason}); {consequence}.")
            self._writable = False


def _bad_of(cache: caches.Store) -> caches.Bad:
    return [(int(index), str(why)) for index, why in cache.about["bad"]]


@dataclasses.dataclass(frozen=True)
class _Bad:
    reason: str


def _read(source: Source, index: int) -> Example | _Bad:
    try:
        return source[index]
    except _UNREADABLE as error:
        return _Bad(str(error) or type(error).__name__)


def _bad_in_columns(source: Source, batch: Callable[[np.ndarray], Batch]) -> caches.Bad:
    """The unreadable examples of what is kept in columns: row by row only where several at once are not to be read."""
    bad: caches.Bad = []
    for start in range(0, len(source), _COLUMN_ROWS):
        some = range(start, min(start + _COLUMN_ROWS, len(source)))
        try:
            batch(np.arange(some.start, some.stop))
        except _UNREADABLE:
            bad += _unreadable(source, some)
    return bad


def _unreadable(source: Source, indices: Iterable[int]) -> caches.Bad:
    read = ((index, _read(source, index)) for index in indices)
    return [(index, example.reason) for index, example in read if isinstance(example, _Bad)]


def _kept_where(in_memory: bool | str) -> str:
    return in_memory if isinstance(in_memory, str) else "none needed, the examples are in memory"


def _deterministic(transforms: Sequence[Transform]) -> int:
    """How many of the first transforms can run once and for all."""
    for count, transform in enumerate(transforms):
        if getattr(transform, "random", True) or not caches.has_stable_name(transform):
            return count
    return len(transforms)


def _nbytes(example: Example) -> float:
    arrays = [caches.as_array(value) for value in example.values()]
    if any(array.dtype.hasobject for array in arrays):
        return math.inf
    return float(sum(array.nbytes for array in arrays))


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """The generator of one use of one example; different counters give sequences that never overlap."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, stream], counter=[0, 0, 0, counter]))


def _rows_of_host(batch_size: int, shard: tuple[int, int], name: str) -> range:
    host, hosts = shard
    if batch_size % hosts:
        nearest = max(batch_size // hosts, 1) * hosts
        raise UserError(f"{name} {batch_size} does not divide over {hosts} hosts; use {nearest}.")
    return range(host * batch_size // hosts, (host + 1) * batch_size // hosts)


def _name(source: Source, split: str, index: int) -> str:
    name = getattr(source, "name", None)
    return str(name(index)) if callable(name) else f"{split}/{index}"


def _balance(source: KeptSource, dataset_info: Mapping[str, Any]) -> str:
    """``", cat 1,000 (50.0 %), dog 1,000 (50.0 %)"``; the range of counts where there are many classes."""
    labels = source.labels
    if labels is None or labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or not labels.size:
        return ""
    names: Sequence[str] = dataset_info.get("class_names") or ()
    counts = np.bincount(labels[labels >= 0], minlength=len(names))
    if len(counts) > 10:
        return f", {len(counts)} classes of {counts.min():,} to {counts.max():,}"
    shown = [names[i] if i < len(names) else f"class {i}" for i in range(len(counts))]
    return ", " + ", ".join(f"{n} {c:,} ({c / len(labels):.1%})" for n, c in zip(shown, counts, strict=True))


def _train_first(name: str) -> tuple[int, str]:
    return (("train", "val", "test", name).index(name), name)


def _megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
