"""Classification: one label out of K, of pictures here, and of whatever else ``Classifier`` is told to read.

Axes: B examples of a batch, N examples of a split, H height, W width, C channels, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Evaluated, Example, Figure, Loss, Meter, Metric, Sum, UserError, Variables
from bigbase_jax.evaluate import CollectAll
from bigbase_jax.tasks import figures
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.tasks.metrics import classes

LOSSES = ("softmax", "sigmoid", "squared")


def agreed(counts: Mapping[str, int | None]) -> int | None:
    """The number of classes, of what says it by name, or None where nothing does; raises UserError for two numbers."""
    given = {name: count for name, count in counts.items() if count is not None}
    if len(set(given.values())) > 1:
        told = ", ".join(f"{name}: {count}" for name, count in given.items())
        raise UserError(f"the numbers of classes disagree ({told}); leave num_classes at None to take the data's.")
    return next(iter(given.values()), None)


def init_logits(model: nn.Module, num_classes: int | None, key: jax.Array, *inputs: Any) -> Variables:
    """Fresh variables of a model that gives logits f32[1,K] of inputs with one example.

    Raises:
      UserError: it does not fit the inputs, or the number of classes.
    """
    with model_errors():
        logits_1K, variables = model.init_with_output(key, *inputs)
    if num_classes is not None and logits_1K.shape != (1, num_classes):
        raise UserError(f"the model's output has shape {logits_1K.shape[1:]} for {num_classes} classes.")
    return variables


def applied_in_training(model: nn.Module, variables: Variables, key: jax.Array, *inputs: Any) -> tuple[Any, Variables]:
    """What a model gives in training, with ``key`` for dropout, and its state after it."""
    mutable = [name for name in variables if name != "params"]
    with model_errors():
        found, state = model.apply(variables, *inputs, train=True, rngs={"dropout": key}, mutable=mutable)
    return found, dict(state)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model that gives logits, trained and measured as a classifier; subclasses say what it reads.

    A batch holds ``label``: i32[B], or soft labels f32[B,K] that sum to 1; and ``mask``: f32[B].

    Attributes:
      model: a Linen module.
      num_classes: K; None: the number of class names, or the model's own.
      class_names: K names; None: "0", "1", ...
      loss_kind: of the training and of the metric ``loss``: "softmax" (cross-entropy), "sigmoid" (binary cross-entropy
        of each class against the rest, summed over classes) or "squared" (half the squared error between
        ``sigmoid(logits)`` and one-hot targets, summed over classes; Rumelhart, Hinton & Williams 1986).
      label_smoothing: s in [0, 1): targets become ``(1 - s) y + s / K`` in training (Szegedy et al. 2016, section 7).
      class_weights: K weights; an example counts as much as its class in the training loss, whose mean is the weighted
        one (as torch's ``CrossEntropyLoss``); a soft label counts the expected weight of its classes.

    Raises:
      UserError: a value out of range, or counts of classes that disagree.
    """

    model: nn.Module
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    loss_kind: str = "softmax"
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    inputs: ClassVar[tuple[str, ...]]
    batch_coupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("class_names", "class_weights"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))
        counts = {
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else len(self.class_names),
            "class_weights": None if self.class_weights is None else len(self.class_weights),
            "model.num_classes": getattr(self.model, "num_classes", None),
        }
        number = agreed(counts)
        if number is not None and number < 2:
            raise UserError(f"a classifier needs at least 2 classes, not {number}.")
        object.__setattr__(self, "num_classes", number)
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise UserError(f"class_names repeats a name: {', '.join(sorted(self.class_names))}.")
        if self.loss_kind not in LOSSES:
            raise UserError(f"there is no loss_kind {self.loss_kind!r}.{suggest(self.loss_kind, LOSSES, 'loss')}")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"label_smoothing is {self.label_smoothing}; it lies in [0, 1), for example 0.1.")
        if self.class_weights is not None and not (min(self.class_weights) >= 0 < max(self.class_weights)):
            raise UserError(f"class_weights are {self.class_weights}; they are not negative and not all zero.")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Task``. Of two classes, class 1 is the positive one."""
        positive = (
            f"class {self.class_names[1]}" if self.class_names and len(self.class_names) == 2 else "positive class"
        )
        return {
            "accuracy": Metric("max", "%"),
            "f1": Metric("max", "%", "F1 (macro)"),
            "auc": Metric("max", "", "AUC"),
            "loss": Metric("min", "nats" if self.loss_kind == "softmax" else ""),
            "top5_accuracy": Metric("max", "%", "Top-5 accuracy"),
            "precision": Metric("max", "%", "Precision (macro)"),
            "recall": Metric("max", "%", "Recall (macro)"),
            "precision_positive": Metric("max", "%", f"Precision ({positive})"),
            "recall_positive": Metric("max", "%", f"Recall ({positive})"),
            "f1_positive": Metric("max", "%", f"F1 ({positive})"),
            "calibration_error": Metric("min"),
        }

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """Fresh variables; raises UserError where the model does not fit the inputs or the number of classes."""
        raise NotImplementedError

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        """f32[B,K] in training, and the model state after it."""
        raise NotImplementedError

    def logits(self, variables: Variables, inputs: Batch) -> jax.Array:
        """f32[B,K], computed without labels, mask or randomness."""
        raise NotImplementedError

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        logits_BK, state = self.train_logits(variables, batch, key)
        return self.loss_from(logits_BK, batch), state

    def loss_from(self, logits_BK: jax.Array, batch: Batch) -> Loss:
        """The training loss of logits."""
        y_BK = self.one_hot(batch["label"], logits_BK.shape[-1])
        weight_B = batch["mask"]
        if self.class_weights is not None:
            weight_B = weight_B * (y_BK @ jnp.asarray(self.class_weights, jnp.float32))
        smooth_BK = (1 - self.label_smoothing) * y_BK + self.label_smoothing / y_BK.shape[-1]
        loss_B = self.loss_of(logits_BK, smooth_BK)
        return Loss({"loss": Sum(jnp.sum(weight_B * loss_B), jnp.sum(weight_B))})

    def counts(self, batch: Batch) -> Any:
        """f32[B]: how much each row of logits counts."""
        return batch["mask"]

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``logits`` and ``probabilities``, f32[B,K] each; probabilities of sigmoid losses are scaled to sum to 1."""
        logits_BK = self.logits(variables, inputs)
        scores_BK = logits_BK if self.loss_kind == "softmax" else jax.nn.log_sigmoid(logits_BK)
        return {"logits": logits_BK, "probabilities": jax.nn.softmax(scores_BK)}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """What ``predict`` gives, and ``label``; ``loss`` (neither smoothed nor weighted), ``accuracy``, and
        ``top5_accuracy`` for more than 5 classes."""
        outputs = self.predict(variables, batch)
        logits_BK, mask_B = outputs["logits"], batch["mask"]
        y_BK = self.one_hot(batch["label"], logits_BK.shape[-1])
        label_B = jnp.argmax(y_BK, -1)
        values = {
            "loss": self.loss_of(logits_BK, y_BK),
            "accuracy": jnp.argmax(logits_BK, -1) == label_B,
        }
        if logits_BK.shape[-1] > 5:
            values["top5_accuracy"] = jnp.any(jax.lax.top_k(logits_BK, 5)[1] == label_B[:, None], -1)
        sums = {name: Sum(jnp.sum(mask_B * value_B), jnp.sum(mask_B)) for name, value_B in values.items()}
        return {**outputs, "label": jnp.asarray(batch["label"])}, sums

    def one_hot(self, label: jax.Array | np.ndarray, num_classes: int | None = None) -> jax.Array:
        """i32[B] labels -> f32[B,K]; soft labels f32[B,K] stay as they are."""
        if label.ndim == 2:
            return jnp.asarray(label, jnp.float32)
        if num_classes is None and self.num_classes is None:
            raise UserError("the task does not know the number of classes; set num_classes.")
        return jax.nn.one_hot(label, num_classes or self.num_classes or 0)

    def loss_of(self, logits_BK: jax.Array, y_BK: jax.Array) -> jax.Array:
        """f32[B]: the loss of each example against targets that sum to 1."""
        if self.loss_kind == "softmax":
            return -jnp.sum(y_BK * jax.nn.log_softmax(logits_BK), -1)
        if self.loss_kind == "sigmoid":
            return -jnp.sum(y_BK * jax.nn.log_sigmoid(logits_BK) + (1 - y_BK) * jax.nn.log_sigmoid(-logits_BK), -1)
        return jnp.sum((jax.nn.sigmoid(logits_BK) - y_BK) ** 2, -1) / 2

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        """See ``metrics.classes.scores``."""

        def scores(examples: Mapping[str, np.ndarray]) -> Mapping[str, Any]:
            p_NK, label_N = _told(examples)
            return classes.scores(p_NK, label_N, self._names(p_NK.shape[-1]))

        return {"classes": CollectAll(scores, ("probabilities", "label"))}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``{"label": name, "probability": p, "probabilities": {name: p, ...}}`` of one example."""
        p_K = np.asarray(output["probabilities"])
        names, best = self._names(len(p_K)), int(p_K.argmax())
        probabilities = {name: float(p) for name, p in zip(names, p_K, strict=True)}
        return {"label": names[best], "probability": float(p_K[best]), "probabilities": probabilities}

    def merge(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """The mean of the probabilities."""
        return {"probabilities": np.mean([output["probabilities"] for output in outputs], axis=0)}

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Scores of each class, the confusion matrix, the reliability diagram, and what was hardest."""
        yield from figures.per_class(evaluated.metrics)
        counts = evaluated.metrics.get("confusion_matrix")
        if "probabilities" not in evaluated.examples:
            if counts is not None:
                yield figures.confusion(counts, self._names(len(counts)))
            return
        p_NK, label_N = _told(evaluated.examples)
        index_N = evaluated.examples.get("index", np.arange(len(label_N)))
        names = self._names(p_NK.shape[-1])
        yield figures.confusion(counts or classes.confusion(p_NK, label_N), names)
        yield from figures.calibration(p_NK, label_N)
        yield self.examples_shown(p_NK, label_N, index_N, evaluated.examples)

    def examples_shown(
        self, p_NK: np.ndarray, label_N: np.ndarray, index_N: np.ndarray, examples: Mapping[str, np.ndarray]
    ) -> Figure:
        """The worst mistakes, as pictures."""
        return figures.mistakes(p_NK, label_N, index_N, self._names(p_NK.shape[-1]))

    def _names(self, num_classes: int) -> Sequence[str]:
        return self.class_names or [str(k) for k in range(num_classes)]


@dataclasses.dataclass(frozen=True)
class Classification(Classifier):
    """Classification of pictures.

    A batch holds ``image``: uint8[B,H,W,C], normalised as ``(x / 255 - mean) / std`` inside the compiled step, or
    floating point, taken as it is; and what ``Classifier`` says, whose attributes and errors these are too:

    Attributes:
      model: a Linen module ``(image, train) -> logits``, f32[B,K].
      mean, std: of the normalisation, one value or one per channel, in units of 0..1.
      flip_test: predict the average of the logits of a picture and of its mirror image.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    flip_test: bool = False

    inputs: ClassVar[tuple[str, ...]] = ("image",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if min(self.std, default=0) <= 0 or not self.mean:
            raise UserError(f"mean {self.mean} and std {self.std} hold one value or one per channel, std above zero.")

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: the model does not fit the pictures or the number of classes.
        """
        image_1HWC = self.normalise(jnp.zeros((1, *batch["image"].shape[1:]), batch["image"].dtype))
        return init_logits(self.model, self.num_classes, key, image_1HWC)

    def train_logits(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[jax.Array, Variables]:
        with model_errors():
            image_BHWC = self.normalise(batch["image"])
        return applied_in_training(self.model, variables, key, image_BHWC)

    def logits(self, variables: Variables, inputs: Batch) -> jax.Array:
        image_BHWC = self.normalise(inputs["image"])
        apply: Callable[..., jax.Array] = functools.partial(self.model.apply, variables)  # type: ignore[assignment]
        with model_errors():
            logits_BK = apply(image_BHWC)
            return (logits_BK + apply(image_BHWC[:, :, ::-1])) / 2 if self.flip_test else logits_BK

    def normalise(self, image_BHWC: jax.Array | np.ndarray) -> jax.Array:
        """See ``normalised``."""
        return normalised(image_BHWC, self.mean, self.std)


def normalised(image_BHWC: jax.Array | np.ndarray, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """uint8 -> f32 ``(x / 255 - mean) / std``; floating point stays as it is.

    Raises:
      UserError: another dtype, or ``mean`` and ``std`` for another number of channels.
    """
    if jnp.issubdtype(image_BHWC.dtype, jnp.floating):
        return jnp.asarray(image_BHWC)
    if image_BHWC.dtype != jnp.uint8:
        raise UserError(f"image has dtype {image_BHWC.dtype}; give uint8, or normalised floats.")
    channels = image_BHWC.shape[-1]
    if len(mean) not in (1, channels) or len(std) not in (1, channels):
        raise UserError(f"mean {mean} or std {std} does not fit pictures of {channels} channel(s).")
    return (image_BHWC / jnp.float32(255) - jnp.float32(mean)) / jnp.float32(std)


def _told(examples: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities f64[N,K] and labels i[N], the likeliest of soft ones."""
    label_N = np.asarray(examples["label"])
    return np.asarray(examples["probabilities"], np.float64), label_N.argmax(-1) if label_N.ndim == 2 else label_N
