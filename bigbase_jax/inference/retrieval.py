"""Runs whose answers are looked up: a task gives a vector of what is asked, and the nearest of a catalogue answer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bigbase_jax import pretrained
from bigbase_jax.build import build
from bigbase_jax.core import Example, UserError
from bigbase_jax.inference.index import FILE, Index
from bigbase_jax.inference.predictor import Compute, Output, Predictor
from bigbase_jax.runtime.log import say

_ROWS = 4096  # items whose vectors are computed at once
_MOST = 1000  # items of an answer, whatever a row asks for


@dataclasses.dataclass(eq=False)
class Retriever(Predictor):
    """A predictor of a task that is ``indexed``: its ``predict`` gives ``vector``, and its ``items`` those of what the
    data has in its catalogue."""

    @functools.cached_property
    def index(self) -> Index:
        """That of ``export/index``, or else of ``export/onnx``, in the run's folder; or, where there is none of this
        checkpoint, one that is built.

        Raises:
          UserError: the file is damaged, or of another catalogue; or there is none, and nothing to build one from.
        """
        assert self.run is not None
        for path in (self.run.path / "export" / name / FILE for name in ("index", "onnx")):
            if not path.exists():
                continue
            found = Index.load(path)
            if found.step == self.step:
                if not np.array_equal(found.ids, np.arange(1, len(found) + 1)):
                    raise UserError(f"{path} is of no catalogue of a run; --mode=export --to=index makes it anew.")
                return found
            say(f"{path} is of step {found.step}, and not of {self.step}: it is not read")
        if self.compute is not None:
            raise UserError(f"{self.run.path} has no index of step {self.step}; --mode=export --to=onnx makes it.")
        return self.built()

    def built(self) -> Index:
        """An index of all that the run's data has in its catalogue now, with what training has not seen.

        Raises:
          UserError: the data is not there.
        """
        assert self.run is not None and self.config is not None
        data = build(pretrained.data_of(self.run, self.config), _path="config.data").prepare(say)
        catalogue: Any = data.data.dataset
        task, compute = self.task, jax.jit(self.task.items)  # type: ignore[attr-defined]
        count = len(catalogue.item_names)
        parts = []
        for start in range(1, count + 1, _ROWS):
            items = catalogue.items(np.minimum(np.arange(start, start + _ROWS), count))
            parts.append(np.asarray(compute(self.variables, items))[: count + 1 - start])
        titles = data.dataset_info.get("item_titles", ())
        vectors, ids = np.concatenate(parts), np.arange(1, count + 1)
        found = Index.build(vectors, ids, self.step, names=catalogue.item_names, titles=titles)
        cells = f", {found.probes} of {len(found.centroids)} cells are searched" if found.centroids is not None else ""
        say(f"index: {count:,} items of {type(task).__name__}{cells}")
        return found

    def computed(self, examples: Sequence[Example], rows: int, compiled: Compute | None = None) -> Iterator[Output]:
        """As ``Predictor.computed``; with ``items`` i64[K], the nearest, and their ``scores`` f32[K]: as many as the
        task or an example wants, and the history, which is left out of the answer, may have. An example with an
        ``item`` asks for what is near to that."""
        outputs = super().computed(examples, rows, compiled)
        if compiled is not None and compiled is not self.program:
            yield from outputs
            return
        found = list(outputs)
        if not found:
            return
        task: Any = self.task
        queries = np.stack([output["vector"] for output in found])
        for i, example in enumerate(examples):
            if example.get("item", 0) > 0:
                queries[i] = task.query_of(self.index.vectors[example["item"] - 1])
        wanted = max(task.top, *(min(example.get("top", 0), _MOST) for example in examples), 1)
        most = 1 << (wanted + self.spec["history"].shape[0] - 1).bit_length()  # few sizes are compiled
        scores, items = self.index.search(queries, most)
        for i, output in enumerate(found):
            yield {**output, "items": items[i], "scores": scores[i]}

    def said(self, found: Sequence[tuple[Example, Output]]) -> list[dict[str, Any]]:
        """As ``Predictor.said``, with the index's own names."""
        return self._naming.said(found)

    @functools.cached_property
    def _naming(self) -> Predictor:
        named: Mapping[str, Any] = {"item_names": self.index.names, "item_titles": self.index.titles}
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Predictor)}
        fields["task"] = dataclasses.replace(self.task, **named)  # type: ignore[type-var]
        return Predictor(**fields)
