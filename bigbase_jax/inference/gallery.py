"""A gallery on disk: vectors of people who are enrolled, and who of them an input shows.

It is one file of arrays (``index.Index``), which only its owner may read. A vector is the ``names`` entry of its person
and the ``titles`` entry of the day it was enrolled, and nothing else of a photo is kept. Vectors of one model say
nothing to another: the file names the checkpoint that made them.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.splits import digest
from bigbase_jax.inference import faces, inputs
from bigbase_jax.inference.index import Index
from bigbase_jax.inference.predictor import Output, Predictor
from bigbase_jax.runtime import whole
from bigbase_jax.runtime.checkpoint import Checkpoints
from bigbase_jax.runtime.log import say

ACTIONS = ("list", "enrol", "delete")
_SHOWN = 5  # people of an answer
_PHOTOS = 4096  # of one person, which are searched for the best


def model_of(predictor: Predictor) -> str:
    """What is the same for the same checkpoint of a run."""
    assert predictor.run is not None
    return digest([Checkpoints(predictor.run.checkpoints, read_only=True).signature(predictor.step)])


def read(path: str, predictor: Predictor | None = None) -> Index:
    """The gallery of a file.

    Args:
      predictor: of a run whose vectors are to be compared with it.

    Raises:
      UserError: there is none, it is damaged, or it is of another model.
    """
    place = pathlib.Path(os.path.expanduser(path))
    if not place.is_file():
        raise UserError(f"there is no gallery {path}; --mode=gallery --do=enrol makes one.")
    found = Index.load(place)
    if not len(found.names) or not len(found.titles):
        raise UserError(f"{path} is an index, but no gallery: it does not say who is in it.")
    if predictor is not None and found.model != model_of(predictor):
        raise UserError(
            f"{path} was enrolled by another model than step {predictor.step} of this run, and vectors of two models "
            "say nothing of each other: enrol anew from the photos."
        )
    return found


def save(path: str, gallery: Index) -> None:
    """Writes it in the place of what was there; its owner alone may read it."""
    place = pathlib.Path(os.path.expanduser(path))
    with whole.written(place) as file:
        os.fchmod(file.fileno(), 0o600)
        gallery.save(file.name)


def enrolled(
    predictor: Predictor, files: Sequence[str], name: str | None, before: Index | None
) -> tuple[Index | None, dict[str, str]]:
    """A gallery with photos added, each under its folder's name or under ``name``; and what could not be read, why."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    vectors, names, errors = [], list(before.names) if before else [], dict[str, str]()
    for item, found in predictor.outputs(inputs.read(files, None, predictor.reading.limits)):
        if isinstance(found, UserError):
            errors[item.file] = str(found)
            continue
        vectors += [output["vector"] for _, output in found]
        names += [name or os.path.basename(os.path.dirname(os.path.abspath(item.file)))] * len(found)
    if not vectors:
        return before, errors
    titles, array, ids = [today] * len(vectors), np.stack(vectors), np.arange(len(vectors))
    if before is not None:
        titles, array = [*before.titles, *titles], np.concatenate([before.vectors, array])
        ids = np.concatenate([before.ids, ids + int(before.ids.max()) + 1])
    index = Index.build(array, ids, predictor.step, cells=0, names=names, titles=titles)
    return dataclasses.replace(index, model=model_of(predictor)), errors


def without(gallery: Index, name: str | None, before: str | None) -> Index | None:
    """A gallery without a person, or without what was enrolled before a day; None: nothing is left.

    Raises:
      UserError: nobody is called so, or no such day.
    """
    if (name is None) == (before is None):
        raise UserError("--do=delete takes --name, a person, or --before, a day such as 2026-01-31.")
    if name is not None:
        people = sorted(set(gallery.names))
        if name not in people:
            raise UserError(f"nobody in the gallery is called {name!r}.{suggest(name, people, 'person')}")
        kept = np.array([other != name for other in gallery.names])
    else:
        try:
            day = datetime.date.fromisoformat(before or "").isoformat()
        except ValueError as error:
            raise UserError(f"--before={before} is no day; write it as 2026-01-31.") from error
        kept = np.array([title >= day for title in gallery.titles])
    if not kept.any():
        return None
    rows = np.flatnonzero(kept).tolist()
    names, titles = ([texts[i] for i in rows] for texts in (gallery.names, gallery.titles))
    left = Index.build(gallery.vectors[rows], gallery.ids[rows], gallery.step, cells=0, names=names, titles=titles)
    return dataclasses.replace(left, model=gallery.model)


def summary(gallery: Index | None) -> dict[str, Any]:
    """Who is in it: ``{"people": {name: {"photos", "since"}}, "photos"}``."""
    if gallery is None:
        return {"people": {}, "photos": 0}
    days = collections.defaultdict(list)
    for name, day in zip(gallery.names, gallery.titles, strict=True):
        days[name].append(day)
    people = {name: {"photos": len(found), "since": min(found)} for name, found in sorted(days.items())}
    return {"people": people, "photos": len(gallery)}


@dataclasses.dataclass(eq=False)
class Identifier(Predictor):
    """A predictor whose answers say who of a gallery an input shows, in the place of its vector.

    Attributes:
      gallery: of this model.
      threshold: the score from which on somebody is that person; None: nothing was measured, and nobody is named.
    """

    gallery: Index | None = None
    threshold: float | None = None

    @classmethod
    def of(cls, predictor: Predictor, path: str) -> Identifier:
        """A run's predictor with a gallery. The threshold is that of the run's ``identification``, or else of its
        ``verification``.

        Raises:
          UserError: the run gives no vectors, or see ``read``.
        """
        check(predictor)
        fields = {field.name: getattr(predictor, field.name) for field in dataclasses.fields(Predictor)}
        threshold = None
        assert predictor.run is not None
        for name in ("verification", "identification"):
            with contextlib.suppress(UserError):  # it was not measured
                said = predictor.run.read_json(f"eval-{name}.json").get("threshold")
                threshold = float(said) if isinstance(said, (int, float)) else threshold
        if threshold is None:
            say("this run has measured no threshold (--split=identification): answers rank, and name nobody")
        return cls(**fields, gallery=read(path, predictor), threshold=threshold)

    def said(self, found: Sequence[tuple[Example, Output]]) -> list[dict[str, Any]]:
        """``{"person": a name or None, "score", "candidates": [{"person", "score"}]}`` each."""
        answers = super().said(found)
        assert self.gallery is not None
        queries = np.array([answer["vector"] for answer in answers], np.float32)
        name_of = dict(zip(self.gallery.ids.tolist(), self.gallery.names, strict=True))
        scores_QK, ids_QK = self.gallery.search(queries, min(len(self.gallery), _PHOTOS), exact=True)
        people = [self._named(s, [name_of[i] for i in ids.tolist()]) for s, ids in zip(scores_QK, ids_QK, strict=True)]
        rest = [{key: value for key, value in answer.items() if key != "vector"} for answer in answers]
        return [{**told, **named} for told, named in zip(rest, people, strict=True)]

    def _named(self, scores_K: np.ndarray, names_K: Sequence[str]) -> Mapping[str, Any]:
        best: dict[str, float] = {}
        for score, name in zip(scores_K, names_K, strict=True):
            if len(best) == _SHOWN:
                break
            best.setdefault(name, float(score))
        name, score = next(iter(best.items()))
        sure = self.threshold is not None and score >= self.threshold
        return {
            "person": name if sure else None,
            "score": score,
            "candidates": [{"person": person, "score": value} for person, value in best.items()],
        }


def check(predictor: Predictor) -> None:
    """Raises UserError where a predictor gives no vectors by which inputs are compared."""
    if predictor.run is None or not getattr(predictor.task, "compares", False):
        raise UserError("a gallery takes a run that gives vectors of people, such as one of configs/faces.py.")


def gallery(
    workdir: str,
    path: str | None,
    do: str = "list",
    pattern: str | None = None,
    name: str | None = None,
    before: str | None = None,
    step: int | None = None,
    detector: str | None = None,
) -> dict[str, Any]:
    """``--mode=gallery``: enrols the photos of people by a run, lists who is there, or deletes somebody.

    Args:
      path: the gallery's file.
      do: of ``ACTIONS``.
      pattern: photos, in one folder for each person.
      name: of the person, in the place of the folder's; or who is deleted.
      before: a day; what was enrolled before it is deleted.
      detector: a folder of MTCNN's weights; photos are cut to the face that it finds.

    Returns:
      ``summary``, and ``errors`` by file.

    Raises:
      UserError: a flag too many or too few, or see ``read``, ``without`` and ``Predictor.open``.
    """
    if path is None:
        raise UserError("--mode=gallery needs --gallery: its file, such as gallery.safetensors.")
    if do not in ACTIONS:
        raise UserError(f"there is no --do={do} of a gallery.{suggest(do, ACTIONS, 'action')}")
    place, errors = pathlib.Path(os.path.expanduser(path)), dict[str, str]()
    if do == "list":
        found: Index | None = read(path)
    elif do == "delete":
        found = without(read(path), name, before)
        save(path, found) if found is not None else place.unlink()
    else:
        if pattern is None:
            raise UserError("--do=enrol needs --input: photos, in one folder for each person.")
        if not workdir:
            raise UserError("--do=enrol needs --workdir: the run whose vectors are kept.")
        predictor = Predictor.open(workdir, step)
        check(predictor)
        predictor = predictor if detector is None else faces.aligned(predictor, detector)
        there = read(path, predictor) if place.exists() else None
        found, errors = enrolled(predictor, inputs.to_answer(pattern, path), name, there)
        if found is not None and found is not there:
            save(path, found)
    return {"gallery": path, **summary(found), **({"errors": errors} if errors else {})}
