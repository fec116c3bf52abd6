"""Which columns moved a model's answer to a row away from its answer to a typical one.

Axes: B rows, N rows of a split, F numbers, D width of an embedding, A columns of the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax import parallel
from bigbase_jax.core import Batch, Evaluated, Example, Figure, Metric, Table, Task, UserError, Variables
from bigbase_jax.evaluate import collect
from bigbase_jax.evaluators.importance import places
from bigbase_jax.models import tables
from bigbase_jax.wrappers.wrapper import Around

ROWS_SHOWN = 12


@dataclasses.dataclass(frozen=True)
class Attributions:
    """A ``core.Evaluator``: integrated gradients (Sundararajan, Taly & Yan 2017) of the rows of a split.

    The path goes from a typical row (the mean of each number, the most frequent category) to the row: numbers move
    themselves, categories by what ``nn.Embed`` makes of them. What a row's columns are given adds up to the difference
    of the two rows' scores: of two classes the log odds of the second, of more the log probability of the likeliest, or
    the number that is predicted. With ``--answers=NAME``, answers have the columns that mattered most as ``reasons``.

    Attributes:
      split: whose rows.
      rows: of it, at most, spread evenly over it; and of the training split, to find what is typical.
      steps: of the sum that stands for the integral (midpoints); a model of high frequencies takes more.
      most: reasons of an answer.
      number_names, category_names: the columns of ``numbers`` and ``categories``; None: the data says them.
    """

    split: str = "test"
    rows: int = 10_000
    steps: int = 128
    most: int = 5
    number_names: tuple[str, ...] | None = None
    category_names: tuple[str, ...] | None = None
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {}

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``: ``attribution``, the mean of its size by column, the largest first, and ``typical``;
        ``unexplained``, how far the sums are from the scores;
        keeps ``attributions`` f32[N,A], in the order of ``places``, and ``score`` f32[N]."""

        def of(split: str, of_batch: Any) -> dict[str, np.ndarray]:
            return collect(of_batch, variables, data.eval_batches(split, parallel.host(mesh), self.rows), mesh)

        train = of("train", lambda _, batch: {name: batch[name] for name in task.inputs})
        typical = {name: _typical(train[name]).tolist() for name in task.inputs}
        explained: Any = self.answering(task, {"typical": typical})
        found = of(
            self.split, lambda variables, batch: {**explained.predict(variables, batch), "index": batch["index"]}
        )
        kept = {name: found[name] for name in ("index", "attributions", "score")}
        size_A = np.abs(kept["attributions"]).mean(0)
        row = {name: np.asarray(x)[None].astype(train[name].dtype) for name, x in typical.items()}
        outputs = jax.jit(task.predict)(variables, row)
        left_N = kept["score"] - np.asarray(score(outputs, outputs)) - kept["attributions"].sum(1)
        of_two = "logits" not in outputs or outputs["logits"].shape[1] == 2  # of more, each row has a class of its own
        order, names = np.argsort(-size_A, kind="stable"), explained.columns
        metrics: dict[str, Any] = {"attribution": {names[a]: float(size_A[a]) for a in order}, "typical": typical}
        metrics["unexplained"] = float(np.abs(left_N).mean()) if of_two else None
        return Evaluated(self.split, metrics, kept)

    def answering(self, task: Task, metrics: Mapping[str, Any]) -> Task:
        """See ``core.Evaluator``."""
        typical, found = {}, metrics.get("typical")
        for entry, names, kind in (("numbers", self.number_names, "f4"), ("categories", self.category_names, "i4")):
            if names:
                try:
                    typical[entry] = np.asarray(found[entry], kind)  # type: ignore[index]
                    if typical[entry].shape != (len(names),) or not np.isfinite(typical[entry]).all():
                        raise ValueError
                except (KeyError, OverflowError, TypeError, ValueError):
                    raise UserError(
                        f"this run has kept no typical row with {len(names)} {entry}; evaluate it again."
                    ) from None
        return Explained(task, self, typical)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The columns by the size of their attributions, and the reasons of the rows with the most extreme scores."""
        left = evaluated.metrics["unexplained"]
        note = "" if left is None else f"They miss the rows' scores by {left:.3f} on average; more steps come closer."
        yield Table("Attributions", ("Column", "Mean size"), [*evaluated.metrics["attribution"].items()], note)
        if evaluated.examples:
            names, score_N = [*places(self.number_names, self.category_names)], evaluated.examples["score"]
            order = np.argsort(-score_N, kind="stable")
            rows = []
            for n in dict.fromkeys([*order[: ROWS_SHOWN // 2].tolist(), *order[-ROWS_SHOWN // 2 :].tolist()]):
                told = reasons(names, evaluated.examples["attributions"][n], self.most)
                said = ", ".join(f"{reason['column']} {reason['attribution']:+.2f}" for reason in told)
                rows.append((f"row {evaluated.examples['index'][n] + 1}", float(score_N[n]), said))
            note = "What each column adds to the score, against a typical row: the highest scores and the lowest."
            yield Table("Reasons", ("Row", "Score", "Columns"), rows, note)


@dataclasses.dataclass(frozen=True)
class Explained(Around):
    """A task whose answers have ``reasons``.

    Attributes:
      how: see ``Attributions``.
      typical: the row from which paths begin, by entry, without axis B.
    """

    how: Attributions
    typical: Mapping[str, np.ndarray]

    @property
    def columns(self) -> list[str]:
        """The names along A."""
        return [*places(self.how.number_names, self.how.category_names)]

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """What the task gives, and ``attributions`` f32[B,A] and ``score`` f32[B]."""
        outputs = self.task.predict(variables, inputs)
        number_BF, embedded = integrated_gradients(self.task, variables, inputs, self.typical, self.how.steps)
        part = {"numbers": number_BF, "categories": embedded}
        of_A = [
            sum(part[entry][:, f] for entry, f in column)
            for column in places(self.how.number_names, self.how.category_names).values()
        ]
        return {**outputs, "attributions": jnp.stack(of_A, 1), "score": score(outputs, outputs)}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        if "attributions" not in output:
            raise UserError("reasons are computed by JAX; leave out --engine, or the evaluator in --answers.")
        told = reasons(self.columns, output["attributions"], self.how.most)
        return {**self.task.postprocess(output, example), "reasons": told}


def integrated_gradients(
    task: Task, variables: Variables, inputs: Batch, typical: Mapping[str, Any], steps: int
) -> tuple[jax.Array, jax.Array]:
    """What the numbers f32[B,F] and the categories f32[B,C] of each row add to its ``score``."""
    inputs = {name: inputs[name] for name in typical}  # a batch may have an entry without columns

    def predicted(numbers: Any, categories: Any, moved: Iterator[jax.Array] | None = None) -> tuple[Any, list[Any]]:
        """What the task gives, and each embedding that it has made; or, in the place of these, what is given."""
        embedded: list[Any] = []

        def embed(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if not isinstance(context.module, (nn.Embed, tables.Table)) or context.method_name != "__call__":
                return call(*args, **kwargs)
            embedded.append(call(*args, **kwargs) if moved is None else next(moved))
            return embedded[-1]

        with nn.intercept_methods(embed):
            given = {"numbers": numbers, "categories": categories}
            return task.predict(variables, {**inputs, **{k: x for k, x in given.items() if k in inputs}}), embedded

    ends, outputs = [], dict[str, jax.Array]()
    for row in (inputs, {k: jnp.broadcast_to(jnp.asarray(x), inputs[k].shape) for k, x in typical.items()}):
        of_row, embedded = predicted(row.get("numbers"), row.get("categories"))
        outputs = outputs or dict(of_row)
        ends.append([jnp.asarray(row["numbers"])] * ("numbers" in row) + embedded)
    there, here = ends
    step = jax.tree.map(jnp.subtract, there, here)

    def total(point: list[jax.Array]) -> jax.Array:
        moved = iter(point)
        numbers = next(moved) if "numbers" in inputs else None
        return jnp.sum(score(predicted(numbers, inputs.get("categories"), moved)[0], outputs))

    def one(gradient: list[jax.Array], share: jax.Array) -> tuple[list[jax.Array], None]:
        found = jax.grad(total)(jax.tree.map(lambda x, d: x + share * d, here, step))
        return jax.tree.map(jnp.add, gradient, found), None

    shares = (jnp.arange(steps) + 0.5) / steps
    gradient, _ = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, here), shares)
    parts = jax.tree.map(lambda d, g: d * g / steps, step, gradient)
    numbers = parts.pop(0) if "numbers" in inputs else jnp.zeros((len(parts[0]), 0))
    by_column = [jnp.sum(x, -1).reshape(len(x), -1) for x in parts]
    if not by_column:
        return numbers, jnp.zeros((len(numbers), 0))
    B, C = inputs["categories"].shape
    return numbers, jnp.concatenate(by_column, 1).reshape(B, -1, C).sum(1)  # over members of an ensemble


def score(outputs: Mapping[str, jax.Array], of: Mapping[str, jax.Array]) -> jax.Array:
    """f32[B]: the number of the outputs that columns explain; of several classes, the likeliest by ``of`` counts."""
    if "logits" not in outputs:
        return outputs["value"]
    logp_BK = jax.nn.log_softmax(outputs["logits"])
    if logp_BK.shape[1] == 2:
        return logp_BK[:, 1] - logp_BK[:, 0]
    return jnp.take_along_axis(logp_BK, jnp.argmax(of["logits"], -1)[:, None], 1)[:, 0]


def reasons(columns: list[str], part_A: np.ndarray, most: int) -> list[dict[str, Any]]:
    """The columns that add most to a score or take most from it."""
    return [
        {"column": columns[a], "attribution": float(part_A[a])}
        for a in np.argsort(-np.abs(part_A), kind="stable")[:most]
    ]


def _typical(x_NF: np.ndarray) -> np.ndarray:
    """f[F]: the mean of numbers, the most frequent of categories."""
    if np.issubdtype(x_NF.dtype, np.floating):
        return x_NF.mean(0)
    return np.array([np.bincount(x_N).argmax() for x_N in x_NF.T], x_NF.dtype)
