"""The vocabulary: what every other file of the package speaks in. It imports nothing of ours.

The way of a batch: ``Dataset.splits[name]`` is a ``Source``; ``Source[i]`` is an ``Example``; ``Transform``s change it;
``data.pipeline`` shuffles, shards, batches and masks; ``parallel.put`` makes a global array of it; the compiled step
calls ``Task.loss``, which returns a ``Loss`` of ``Sum``s; gradient / weight goes to optax.

Axes: B = examples in a batch.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray
PyTree = Any
Example = dict[str, Any]
"""One example on the host: numpy arrays and scalars by name, without a batch axis."""
Batch = Mapping[str, Array]
"""Arrays by name with a leading axis B of static size; ``mask`` f32[B] is 1 for real examples and 0 for padding."""
Variables = Mapping[str, PyTree]
"""Linen variable collections: ``{"params": ..., "batch_stats": ...}``."""
Transform = Callable[[Example, np.random.Generator], Example]
"""A function of an example and its own random generator. A class whose attribute ``random`` is False is deterministic
and may run once, before the decoded set is cached; anything else runs anew for every use of the example. What one makes
whose attribute ``costly`` is True is cached even where that takes many times the room of what it reads."""


class UserError(Exception):
    """A mistake that is the user's to mend: shown as one sentence without a traceback, and a non-zero exit status."""


class Sum(NamedTuple):
    """A total and the weight it was summed over; it adds up exactly over examples, microbatches, devices and batches.

    Attributes:
      total: sum of weight * value; any shape, f32.
      weight: sum of weights; a shape that broadcasts against ``total``, f32.
    """

    total: Array
    weight: Array

    def mean(self) -> Array:
        """``total / weight``, and 0 where the weight is 0."""
        weight = jnp.asarray(self.weight)
        return jnp.where(weight == 0, 0.0, self.total / jnp.where(weight == 0, 1.0, weight))


class Loss(NamedTuple):
    """A training loss: the sum over its terms of ``scale * total / weight``, each over the whole batch.

    Attributes:
      terms: what is trained. The only term of a loss is called ``loss``; of several, each is logged under its name, and
        their sum as ``loss``. Weights do not depend on the parameters.
      aux: what is logged beside them and not trained (the load of a router, a reward, a KL divergence).
      scale: of terms, where it is not 1.
    """

    terms: Mapping[str, Sum]
    aux: Mapping[str, Sum] = {}
    scale: Mapping[str, float] = {}


class Metric(NamedTuple):
    """What pages, comparisons and sweeps need to know of a number that a task measures.

    Attributes:
      better: "max" or "min"; None: neither is.
      unit: "%" for a share in 0..1 that is shown in percent, else what is written behind the number ("nats", "px"), or
        nothing.
      title: what it is called; None: its name in words.
    """

    better: str | None = None
    unit: str = ""
    title: str | None = None


def some(names: Sequence[str], most: int = 10) -> str:
    """A list for a sentence, shortened."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The outputs of several examples, along their first axis."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def add(a: PyTree, b: PyTree) -> PyTree:
    """Adds two trees of ``Sum``s of the same structure."""
    return jax.tree.map(lambda x, y: x + y, a, b)


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by dotted path, in the tree's own order: ``{"params.conv1.kernel": leaf, ...}``."""
    leaves, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


class Task(Protocol):
    """A model, its loss, what it predicts and what it measures: a frozen dataclass of pure methods.

    What else a task may have:

    - ``merge(outputs)``: from the outputs of the examples that one input was read as, in order, to those of
      the input. Without it, each example has an answer of its own.
    - ``figures(evaluated)``: an iterable of ``Figure``s, what the report of a run and comparisons show of an
      ``Evaluated``. Arrays and metrics of it may be missing, as those that an evaluation did not keep.
    - ``ratios(examples)``: of arrays that an evaluation has kept, what of each of N examples adds up to a metric, by
      name: totals and weights, [N] each. Comparisons then pair the examples of two runs.
    - ``indexed``, True: what it predicts is a ``vector`` by which its answers are looked up (``inference.retrieval``)
      among those that its ``items(variables, batch)`` gives of a catalogue.
    - ``zero_shot``, True: an input may say by which names it is to be told apart (``inference.zero_shot``).
    - ``compares``, True: what it predicts is a ``vector``, and the cosine of two says whether both are of one
      person (``inference.gallery``).
    - ``rendered(output, example)``: from what ``postprocess`` takes to the ``Rendered`` file that a user is after,
      beside the answer (a sound, a picture with boxes).
    - ``windowed``, True: a long input is read piece by piece, and where one begins is told by what the task made of the
      one before (``inference.recogniser``).
    - ``given``: a ``Given``, variables that ``loss`` finds among its own as the collection ``given``.
    - ``overlaps``, True: what is longer than it reads at once is read in windows that overlap (``inference.windowed``).
    - ``planned(data, loop, steps)``: the task as it trains so many steps on this data (``data.pipeline.Prepared``) by
      this ``train.TrainConfig``, and how many of them it may take; raises UserError where they do not fit it.
    - ``finish(gradient, key)``: the ``parallel.Gradient`` of a whole batch after the sums over slices and devices, once
      per step, before it is divided by its weight. A wrapper with it is around all others.
    - ``guarantee``: JSON-able, what the lineage keeps of what a planned task promises.
    - ``transcribes``, True: it reads recordings, and its answers are transcripts: ``text``, and where it has them
      ``words`` (``word``, ``start``, ``end`` in seconds), ``segments`` (``text``, ``start``, ``end``), ``duration`` and
      ``language``.

    Attributes:
      inputs: names of the batch entries that ``init`` and ``predict`` read; everything else is labels.
      batch_coupled: True where the loss mixes examples of a batch so that splitting it changes the result.
      metrics: what every number means that training, ``evaluate`` and ``meters`` measure, in the order in which a
        reader wants them.
    """

    inputs: tuple[str, ...]
    batch_coupled: bool
    metrics: Mapping[str, Metric]

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Fresh variables for a batch of these shapes."""
        ...

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        """The training loss over the batch, and the model state (all but ``params``) after it."""
        ...

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """Inference: arrays with leading axis B, computed without labels, mask or randomness."""
        ...

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What a batch with its labels is measured by.

        Returns:
          arrays [B, ...] by name, which ``meters`` and ``postprocess`` read and a run folder keeps (labels among them
          where they are worth it; ``index`` comes by itself), whose other axes may be as long as the batch's own; and
          what adds up over examples (loss, accuracy), as ``Sum``s that give masked examples no weight.
        """
        ...

    def meters(self) -> Mapping[str, Meter]:
        """Fresh meters of what does not add up (F1, AUC, BLEU). The names in their results and those of the ``Sum``s
        are all different."""
        ...

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """One input's outputs (no batch axis) as the JSON-able answer that a user of the model reads.

        ``example`` is what the model was given, after the transforms, and what the codec says beside that (a size, a
        length, a name); of outputs that ``merge`` has merged, the first of the examples.
        """
        ...


class Given(Protocol):
    """Variables from elsewhere that a loss reads and nothing trains, such as a teacher's. They live where
    ``train.sharding`` says, and are in no training state and no checkpoint.

    Attributes:
      shapes: of each, ``{"params": ..., ...}``.
    """

    @property
    def shapes(self) -> Variables: ...

    def read(self, like: Variables) -> Variables:
        """The arrays, with the shardings of ``like``, which are shapes.

        Raises:
          UserError: they are not there.
        """
        ...


class Rendered(NamedTuple):
    """A file that a model makes of an input.

    Attributes:
      suffix: of its name, such as ".wav".
      media_type: such as "audio/wav".
      data: its bytes.
    """

    suffix: str
    media_type: str
    data: bytes


class Meter(Protocol):
    """What a task measures that does not add up: fed on batches, merged over hosts, and read once.

    ``evaluate.CollectAll(f)`` keeps all examples and calls ``f`` of them at the end; ``evaluate.Totals(count, f)``
    keeps sums of what ``count`` makes of a batch.
    """

    def update(self, examples: Mapping[str, np.ndarray]) -> None:
        """Takes what ``Task.evaluate`` gives of this host's real examples of a batch, and ``index``: [n, ...] each."""
        ...

    def state(self) -> Mapping[str, np.ndarray]:
        """What it has seen, as arrays that go from host to host."""
        ...

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes what a meter of this kind has seen on another host."""
        ...

    def result(self) -> Mapping[str, Any]:
        """Floats by name, or JSON-able nests of them."""
        ...


class Evaluator(Protocol):
    """``config.evaluators.NAME``: measures a model in its own way, on as many splits as it needs (ranking a whole
    catalogue, retrieval, verification pairs, generation), beside ``val`` and ``test``, which are always evaluated
    where there are such splits.

    What else an evaluator may have:

    - ``needs``: the splits without which it measures nothing, said at the start of a run; by default its ``split``.
    - ``figures(evaluated)``: as a task's, of what the evaluator has measured: the report of a run shows them too.
    - ``answering(task, metrics)``: the task as it answers inputs where ``--answers=NAME`` asks for that, by the metrics
      that this evaluator has kept of the run: with calibrated probabilities, with reasons. They come from a folder, and
      may be anything; raises UserError where they do not fit.

    Attributes:
      final: whether it runs once, on the checkpoint that the run ends with, rather than each ``train.eval_every`` too.
    """

    final: bool

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What every number means that it measures."""
        ...

    def run(self, task: Task, variables: Variables, data: Any, mesh: Any) -> Evaluated:
        """The metrics, logged and kept under the evaluator's name, and examples where they are worth keeping.

        ``data`` is ``data.pipeline.Prepared``; ``evaluate.collect`` gives what a model makes of a split.
        """
        ...


class Card(NamedTuple):
    """An example of a ``Gallery``.

    Attributes:
      example: its index in the split, whose picture is shown; None: none is.
      caption: what the model said, and what is right.
      right: whether these agree; None: it is neither.
      boxes: on the picture: (x0, y0, x1, y1 in 0..1 of its sides, label).
    """

    example: int | None
    caption: str
    right: bool | None = None
    boxes: Sequence[tuple[float, float, float, float, str]] = ()


class Gallery(NamedTuple):
    """A figure of pictures, each with what is said of it."""

    title: str
    cards: Sequence[Card]
    note: str = ""


class Highlights(NamedTuple):
    """A figure of texts: (title, [(piece, its weight, shown as shade)]) each. Weights from ``most`` on have the darkest
    shade; with a ``unit``, a reader who asks sees them as numbers."""

    title: str
    texts: Sequence[tuple[str, Sequence[tuple[str, float]]]]
    note: str = ""
    most: float = 1.0
    unit: str = ""


class Table(NamedTuple):
    """A figure of rows: ranked lists, scores by class. Cells are numbers or texts; ``shares`` names the columns whose
    numbers are shares in 0..1, shown in percent and with a bar."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    shares: Sequence[str] = ()


class Matrix(NamedTuple):
    """A figure of counts: true names down, predicted names across."""

    title: str
    names: Sequence[str]
    counts: Sequence[Sequence[float]]
    note: str = ""


class Plot(NamedTuple):
    """A figure of curves or, with ``bars``, columns: name -> (x, y); ``diagonal``: what is ideal lies on x = y;
    ``counts``: name -> how many examples are behind each column, the fewer, the fainter."""

    title: str
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]]
    x: str = ""
    y: str = ""
    note: str = ""
    bars: bool = False
    diagonal: bool = False
    counts: Mapping[str, Sequence[float]] = {}


class Clips(NamedTuple):
    """A figure of sounds, each with its spectrogram: (caption, samples, as many a second);
    samples are f32[T] in -1..1, or i16[T]."""

    title: str
    clips: Sequence[tuple[str, np.ndarray, int]]
    note: str = ""


class Differences(NamedTuple):
    """A figure of texts beside what they should be, aligned: (the index in the split, what is right, what was said),
    the last two in words or characters.

    Attributes:
      texts: of all examples, those with the most errors first, of which a report shows some; a comparison shows those
        that several models say otherwise.
      between: what stands between two words.
      rate: samples per second of the recordings that the texts are of, which a report plays; 0: they are of none.
    """

    title: str
    texts: Sequence[tuple[int, Sequence[str], Sequence[str]]]
    note: str = ""
    between: str = " "
    rate: int = 0


Figure = Gallery | Highlights | Table | Matrix | Plot | Clips | Differences


class Evaluated(NamedTuple):
    """An evaluation as a run folder keeps it: what ``Task.figures`` draws.

    Attributes:
      split: its name, or the evaluator's.
      metrics: by name.
      examples: arrays [N, ...] that ``Task.evaluate`` gave, ``index`` among them, in the order of the split; or what
        the evaluator gave.
    """

    split: str
    metrics: dict[str, Any]
    examples: Mapping[str, np.ndarray] = {}


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
      step: i32[], updates done so far.
      params: the trained parameters.
      model_state: the model's other variable collections (``{"batch_stats": ...}``; empty if it has none).
      opt_state: optax state.
      ema: None, or ``{"params": ..., **model_state}``: the exponential moving average that evaluation uses.
      key: typed PRNG key of the run; step ``n`` uses ``fold_in(key, n)``.
    """

    step: jax.Array
    params: PyTree
    model_state: Mapping[str, PyTree]
    opt_state: PyTree
    ema: Variables | None
    key: jax.Array

    def variables(self) -> Variables:
        """The variables to evaluate, save and serve: the moving average where there is one."""
        return self.ema if self.ema is not None else {"params": self.params, **self.model_state}


class Fields(NamedTuple):
    """What a data set reads of a row of a user's table, or of a line of a text.

    Attributes:
      columns: for each entry of the rows that ``Codec.decode`` takes, what its columns may be called, the likeliest
        first: several names together are joined by line ends. Empty: it takes a row as it stands.
      lines: whether each line of a text is a row with one entry; else a text is read as a whole.
      files: whether a column names files, as seen from the table's folder, which are read in the place of the row.
      encoding: of texts.
      header: whether a table's first line has the names of its columns; else they are "0", "1", ...
      short: entries that fit one line, and what each is likely to be, where that is known.
      whole: whether a table is read as a whole, and not row by row; what comes as JSON is still a row.
      options: entries that a row may have beside these, by their own names, and what is asked of its answer: a
        language, a temperature, a speaker, a rate. A codec that takes some takes rows, of files too.
    """

    columns: Mapping[str, Sequence[tuple[str, ...]]] = {}
    lines: bool = False
    files: bool = False
    encoding: str = "utf-8"
    header: bool = True
    short: Mapping[str, Sequence[str]] = {}
    whole: bool = False
    options: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split: index -> numpy example; no state, safe to call from many threads.

    Where examples are sequences that are padded to one length, ``lengths`` i64[N] may say how many first places of each
    are no padding, in the entries that ``sequences`` names: what is behind them may be cut off (``data.buckets``)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    # Optional, for what is kept in columns; None where it cannot be had:
    # def batch(self, indices: np.ndarray) -> Batch: the examples of these i64[n], stacked, in arrays of their own.


class Codec(Protocol):
    """From what a user gives to examples, as training saw them: the same for a file, an upload and JSON.

    The class that ``config.data.dataset`` names gives it: ``codec(config, dataset_info) -> Codec``, of its arguments as
    the config has them and of what a run has kept of its data. That is a static method where it needs nothing of the
    data, so that a model predicts where its data is not.

    What else a codec may have:

    - ``padded``: names of entries that are padded to one length, the first of which is above 0 just where there is no
      padding. It is behind all else, and may be cut off: what the model gives of the rest stays the same.
    - ``length``: the entry that says how many places of these are no padding, where that is not what the first is;
      ``least``: how many places stay in any case.

    Attributes:
      fields: what of a row it reads; None: it reads whole files alone.
    """

    fields: Fields | None

    def decode(self, given: bytes | str | Mapping[str, Any]) -> Sequence[Example]:
        """The unlabelled examples of a file's bytes, of a path, or of a row by entry; what is longer than one example
        gives several. A row holds contents and no path: it may come from anywhere.

        Raises:
          UserError: it cannot be read.
        """
        ...

    def fit(self, example: Example, shapes: Mapping[str, tuple[int, ...]]) -> Example:
        """An example, after the transforms, in the shapes that the model was trained on; as it is, where not said."""
        return example


@runtime_checkable
class Dataset(Protocol):
    """Named splits of one data set.

    Attributes:
      splits: ``train``, and ``val`` and ``test`` where they exist.
      dataset_info: what the data knows of itself and a model may need, such as ``num_classes`` and ``class_names``; a
        constructor argument that the config leaves at None takes the entry of the same name (see ``build``).
      description: one line that says honestly what this data is.
    """

    splits: Mapping[str, Source]
    dataset_info: Mapping[str, Any]
    description: str

    def fingerprint(self) -> str:
        """A short digest that changes when the data changes (names, sizes and times of files; contents if cheap).

        Where the same examples can be encoded in several ways (by another tokenizer), and their scores compared all the
        same, a method ``examples()`` may give the digest of the examples alone."""
        ...


@runtime_checkable
class RawDataset(Protocol):
    """A data set that must be read as a whole before it has splits: texts that become tokens."""

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Dataset:
        """What it becomes, kept below the folder ``cache`` as far as ``limit_bytes`` allow; ``say`` takes progress."""
        ...
