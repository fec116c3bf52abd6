"""Transcripts by beam search with a language model, whose weight is chosen on one split and measured on another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from bigbase_jax.core import Evaluated, Figure, Metric, Table, Task, UserError
from bigbase_jax.evaluate import Split
from bigbase_jax.tasks.metrics import transcripts


@dataclasses.dataclass(frozen=True)
class BeamSearch:
    """A ``core.Evaluator`` of ``tasks.recognition.Recognition``: its search, with each weight on ``fit``, and with the
    best of them, by ``wer``, on ``split``. Both are kept in the run, so that ``--answers=NAME`` searches so.

    Attributes:
      beams: see ``Recognition``.
      weights, bonuses: of which each is tried with each; see ``Recognition.language_weight`` and ``word_bonus``.
      fit, split: names of splits. Where there is no ``split``, ``fit`` is measured by what was chosen on it, which
        flatters.

    Raises:
      UserError: nothing to choose from.
    """

    beams: int = 16
    weights: tuple[float, ...] = (0.3, 0.6, 1.0)
    bonuses: tuple[float, ...] = (0.0, 1.0)
    fit: str = "val"
    split: str = "test"
    final: bool = True

    def __post_init__(self) -> None:
        if self.beams < 2 or not self.weights or not self.bonuses:
            raise UserError("BeamSearch needs 2 beams or more, and weights and bonuses to choose from.")

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Evaluator``."""
        return {
            "wer": Metric("min", "%", "Word error rate by beam search"),
            "cer": Metric("min", "%", "Character error rate by beam search"),
            "language_weight": Metric(),
            "word_bonus": Metric(),
        }

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``core.Evaluator``."""
        return (self.fit,)

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps what ``Recognition.evaluate`` gives.

        Raises:
          UserError: the task is another.
        """
        searching: Any = self.searching(task, self.weights[0], self.bonuses[0])
        of_split = Split(self.fit)
        examples = of_split.run(searching, variables, data, mesh).examples
        tried = {
            (weight, bonus): transcripts.scores(self.searching(task, weight, bonus).errors(examples))["wer"]
            for weight in (self.weights if searching.language_model is not None else self.weights[:1])
            for bonus in (self.bonuses if searching.language_model is not None else self.bonuses[:1])
        }
        weight, bonus = min(tried, key=lambda pair: tried[pair])
        measured = self.split if self.split in data.splits else self.fit
        if measured != self.fit:
            examples = dataclasses.replace(of_split, split=measured).run(searching, variables, data, mesh).examples
        found = transcripts.scores(self.searching(task, weight, bonus).errors(examples))
        chosen = {"language_weight": weight, "word_bonus": bonus, "beams": self.beams}
        rows = [[*pair, wer] for pair, wer in tried.items()]
        return Evaluated(measured, {**found, **chosen, f"tried_on_{self.fit}": rows}, examples)

    def searching(self, task: Any, weight: float, bonus: float) -> Any:
        """The task as it searches with these; raises UserError where it does not search."""
        if not hasattr(task, "language_weight"):
            raise UserError(f"BeamSearch is for recognition by CTC, and {type(task).__name__} is another task.")
        return dataclasses.replace(task, beams=self.beams, language_weight=weight, word_bonus=bonus)

    def answering(self, task: Task, metrics: Mapping[str, Any]) -> Task:
        """See ``core.Evaluator``."""
        weight, bonus = metrics.get("language_weight"), metrics.get("word_bonus")
        if not isinstance(weight, float) or not isinstance(bonus, float):
            raise UserError("this run has kept no weights of a beam search; evaluate it again.")
        found: Task = self.searching(task, weight, bonus)
        return found

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """What was tried."""
        rows = evaluated.metrics.get(f"tried_on_{self.fit}", ())
        columns = ("Language model's weight", "Bonus for a word", "Word error rate")
        yield Table(f"Beam search with {self.beams} beams, tried on {self.fit}", columns, rows, shares=columns[2:])
