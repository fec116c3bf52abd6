"""Runs of pictures and texts: a picture is answered by the labels that are given with it, or by the captions of the
data that fit it best.

Legend: K labels, E width of the vectors.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from bigbase_jax.core import Example, UserError
from bigbase_jax.inference.predictor import Compute, Output, Predictor
from bigbase_jax.inference.retrieval import Retriever
from bigbase_jax.tasks.contrastive import check_templates

_MOST, _CHARACTERS = 1000, 1000  # labels of a picture, and characters of each


@dataclasses.dataclass(eq=False)
class Matcher(Retriever):
    """A predictor of ``tasks.contrastive``."""

    def __post_init__(self) -> None:
        self._label_vectors: dict[tuple[Any, ...], np.ndarray] = {}

    def _decoded(self, given: Any) -> Sequence[Example]:
        """With ``labels``, ``templates`` and ``top`` where a row has them; raises UserError for what is none."""
        examples = super()._decoded(given)
        asked: dict[str, Any] = {}
        if isinstance(given, dict):
            asked = {name: _listed(given[name], name) for name in ("labels", "templates") if given.get(name)}
            if len(asked.get("labels", ("a", "b"))) < 2:
                raise UserError("labels is one; a picture is told apart by two or more, as 'a cat|a dog'.")
            if asked.get("templates"):
                check_templates(asked["templates"])
            if given.get("top") not in (None, ""):
                if not str(given["top"]).isdecimal() or not 1 <= int(given["top"]) <= _MOST:
                    raise UserError(f"top is {str(given['top'])[:20]!r}; it says how many are wanted, such as 5.")
                asked["top"] = int(given["top"])
        if self.run is None and not asked.get("labels"):
            raise UserError("a published model has no captions of its own; give a row with labels, as 'a cat|a dog'.")
        return [{**example, **asked} for example in examples] if asked else examples

    def computed(self, examples: Sequence[Example], rows: int, compiled: Compute | None = None) -> Iterator[Output]:
        """As ``Predictor.computed``; with ``labels`` f32[K], the probability of each label that the example or else the
        task has; or, where there are none, with ``items`` and ``scores`` of the captions that fit best."""
        outputs = Predictor.computed(self, examples, rows, compiled)
        if compiled is not None and compiled is not self.program:
            yield from outputs
            return
        task: Any = self.task
        for example, output in zip(examples, list(outputs), strict=True):
            if labels := example.get("labels", task.labels):
                label_KE, scale = self.vectors_of(tuple(labels), tuple(example.get("templates", task.templates)))
                logits_K = scale * label_KE @ output["vector"]
                exp_K = np.exp(logits_K - logits_K.max())
                yield {**output, "labels": exp_K / exp_K.sum()}
            else:
                scores, items = self.index.search(output["vector"][None], int(example.get("top", task.top)))
                yield {**output, "items": items[0], "scores": scores[0]}

    def said(self, found: Sequence[tuple[Example, Output]]) -> list[dict[str, Any]]:
        """As ``Retriever.said``; what was told apart by labels needs no index."""
        return super().said(found) if any("items" in output for _, output in found) else Predictor.said(self, found)

    def vectors_of(self, labels: tuple[str, ...], templates: tuple[str, ...]) -> tuple[np.ndarray, float]:
        """f32[K,E] of labels, kept for those that were asked for last, and the scale of scores."""
        key = labels, templates
        if key not in self._label_vectors:
            task: Any = dataclasses.replace(self.task, labels=labels, templates=templates)  # type: ignore[type-var]
            texts = task.texts(task.label_texts(labels))
            found = jax.jit(task.label_vectors, static_argnums=2)(self.variables, texts, len(labels))
            while len(self._label_vectors) >= 16:
                self._label_vectors.pop(next(iter(self._label_vectors)))
            self._label_vectors[key] = np.asarray(found)
        scale, _ = self.task.scores(self.variables)  # type: ignore[attr-defined]
        return self._label_vectors[key], float(scale)


def _listed(value: Any, name: str) -> tuple[str, ...]:
    """Texts of a list, of JSON, or of a cell that ``|`` divides.

    Raises:
      UserError: there are too many, or something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split("|")
        except ValueError as error:
            raise UserError(f"{name} is {value[:40]!r}, which is no list; divide texts by |.") from error
    texts = tuple(text.strip() for text in value if isinstance(text, str)) if isinstance(value, list) else ()
    if not texts or len(texts) != len(value) or not all(0 < len(text) <= _CHARACTERS for text in texts):
        raise UserError(f"{name} is {str(value)[:40]!r}; give texts of up to {_CHARACTERS:,} characters each.")
    if len(texts) > _MOST:
        raise UserError(f"{name} are {len(texts):,}, and at most {_MOST:,} are compared.")
    return texts
