"""The nearest of many vectors by inner product: exactly, on the device, or approximately, in a share of the time.

The exact search compares every vector, a chunk at a time, so that memory does not grow with the catalogue. The
approximate one is an inverted file (Jégou et al. 2011, section IV; faiss): k-means deals the vectors into cells, and of
these the nearest to a query are looked through, as many as a wanted recall takes.

A file of it holds arrays alone (safetensors), which are checked before anything is computed of them; faiss reads none.

Legend: N vectors, D width, Q queries, K neighbours, C cells, M rows of a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.columns import Texts
from bigbase_jax.pretrained.files import read_safetensors, write_safetensors

FILE = "index.safetensors"
CELLS_FROM = 100_000
"""Vectors from which on ``build`` makes cells by itself: below, the exact search takes about a millisecond."""
RECALL = 0.99
_CHUNK, _QUERIES = 4096, 256  # rows that are compared at once
_ITERATIONS, _PER_CELL = 10, 64  # of k-means, and the vectors that it sees for each cell
_TEXTS = ("names", "titles", "model")
_SAMPLE = 512  # vectors that are searched for to choose the number of cells to look through


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Vectors, and what makes their search short.

    Attributes:
      vectors: f32[N,D].
      ids: i64[N], what each is called: no two alike, none negative.
      step: the checkpoint that the vectors are of.
      centroids: f32[C,D] of the cells; None: there are none, and every search is exact.
      cell: i32[N], that of each vector.
      probes: cells that a search looks through.
      names, titles: [N] each, what each is called for people; empty: nothing is known.
      model: what is the same for vectors that may be compared; empty: nothing is known.

    Raises:
      UserError: the arrays do not fit each other.
    """

    vectors: np.ndarray
    ids: np.ndarray
    step: int = 0
    centroids: np.ndarray | None = None
    cell: np.ndarray | None = None
    probes: int = 0
    names: Sequence[str] = ()
    titles: Sequence[str] = ()
    model: str = ""

    def __post_init__(self) -> None:
        vectors, ids, centroids, cell = self.vectors, self.ids, self.centroids, self.cell
        wrong = "it holds no vectors" if vectors.ndim != 2 or not vectors.size or vectors.dtype != np.float32 else ""
        if not wrong and (ids.shape != vectors.shape[:1] or ids.dtype != np.int64 or ids.min() < 0):
            wrong = "it has not one id for each vector"
        if not wrong and len(np.unique(ids)) < len(ids):
            wrong = "two vectors have the same id"
        if not wrong and centroids is not None:
            fits = centroids.ndim == 2 and centroids.shape[1] == vectors.shape[1] and centroids.dtype == np.float32
            if not fits or cell is None or cell.shape != ids.shape or cell.dtype != np.int32:
                wrong = "its cells are not those of its vectors"
            elif not (cell.min() >= 0 and cell.max() < len(centroids) and 1 <= self.probes <= len(centroids)):
                wrong = "its vectors are in cells that it does not have"
        if not wrong and not all(len(texts) in (0, len(ids)) for texts in (self.names, self.titles)):
            wrong = "it has not one name for each vector"
        parts = [vectors] if centroids is None else [vectors, centroids]
        if not wrong and not all(np.isfinite(x[i : i + 2**16]).all() for x in parts for i in range(0, len(x), 2**16)):
            wrong = "its vectors are not finite"
        if wrong:
            raise UserError(f"the index is damaged: {wrong}; build it anew.")

    def __len__(self) -> int:
        return len(self.vectors)

    @classmethod
    def build(
        cls,
        vectors: np.ndarray,
        ids: np.ndarray | None = None,
        step: int = 0,
        cells: int | None = None,
        recall: float = RECALL,
        names: Sequence[str] = (),
        titles: Sequence[str] = (),
    ) -> Index:
        """
        Args:
          vectors: [N,D].
          ids: [N]; None: 0, 1, ...
          cells: C; 0: none. None: 4 sqrt(N) from ``CELLS_FROM`` vectors on where faiss is installed, else none.
          recall: share of the ten nearest that the approximate search is to find, of vectors of the catalogue itself.

        Raises:
          UserError: the vectors are not finite, or cells were asked for and faiss is not installed.
        """
        exact = cls(
            np.ascontiguousarray(vectors, np.float32),
            np.arange(len(vectors)) if ids is None else np.asarray(ids, np.int64),
            step,
            names=names,
            titles=titles,
        )
        if cells is None:
            cells = int(4 * len(exact) ** 0.5) if len(exact) >= CELLS_FROM and _faiss(needed=False) else 0
        if not cells:
            return exact
        faiss = _faiss()
        means = faiss.Kmeans(
            exact.vectors.shape[1],
            min(cells, len(exact)),
            niter=_ITERATIONS,
            spherical=True,
            max_points_per_centroid=_PER_CELL,
            min_points_per_centroid=1,
        )
        means.train(exact.vectors)
        cell = means.index.search(exact.vectors, 1)[1][:, 0].astype(np.int32)
        found = dataclasses.replace(exact, centroids=means.centroids, cell=cell, probes=1)
        queries = exact.vectors[np.linspace(0, len(exact) - 1, min(_SAMPLE, len(exact))).astype(int)]
        truth, lists, probes = exact.search(queries, 10)[1], found._lists, 1
        while probes < len(means.centroids) and _overlap(truth, found.search(queries, 10)[1]) < recall:
            probes = min(2 * probes, len(means.centroids))
            lists.nprobe = probes
        return dataclasses.replace(found, probes=probes)

    def search(self, queries: np.ndarray, k: int, exact: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """The ``k`` vectors with the largest inner products, the largest first.

        Args:
          queries: f32[Q,D].
          k: at most N are found.
          exact: compare all vectors, though there are cells.

        Returns:
          the products f32[Q,K] and the ids i64[Q,K]; -inf and -1 where the cells held fewer than ``k``.

        Raises:
          UserError: the queries are not as wide as the vectors.
        """
        queries = np.ascontiguousarray(queries, np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise UserError(f"the index is of width {self.vectors.shape[1]}, and was asked for {queries.shape[1:]}.")
        k = min(k, len(self))
        if self.centroids is not None and not exact:
            scores_QK, rows_QK = self._lists.search(queries, k)
        else:
            parts = [self._nearest(queries[i : i + _QUERIES], k) for i in range(0, len(queries), _QUERIES)]
            scores_QK, rows_QK = (np.concatenate(x) for x in zip(*parts, strict=True))
        missing_QK = rows_QK < 0
        return np.where(missing_QK, -np.inf, scores_QK), np.where(missing_QK, -1, self.ids[rows_QK])

    def recall(self, queries: np.ndarray, k: int = 10) -> float:
        """The share of the exact ``k`` nearest that the approximate search finds."""
        return _overlap(self.search(queries, k, exact=True)[1], self.search(queries, k)[1])

    def save(self, path: str | os.PathLike) -> None:
        """Writes all of it into one file."""
        arrays = {"vectors": self.vectors, "ids": self.ids, "step": np.asarray(self.step, np.int64)}
        if self.centroids is not None and self.cell is not None:
            arrays |= {"centroids": self.centroids, "cell": self.cell, "probes": np.asarray(self.probes, np.int64)}
        said = {"names": self.names, "titles": self.titles, "model": [self.model] if self.model else []}
        for name in _TEXTS:
            if len(said[name]):
                arrays[name], arrays[f"{name}.bounds"] = Texts.packed(said[name])
        specs = {name: (x.shape, x.dtype) for name, x in arrays.items()}
        write_safetensors(pathlib.Path(path), specs, arrays.__getitem__)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Index:
        """Reads a file of ``save``, whose vectors are mapped into memory.

        Raises:
          UserError: it is not one, cut short, or contradicts itself.
        """
        arrays = read_safetensors(pathlib.Path(path))
        try:
            numbers = {name: int(arrays.pop(name).reshape(())) for name in ("step", "probes") if name in arrays}
            texts = {name: _texts(arrays.pop(name), arrays.pop(f"{name}.bounds")) for name in _TEXTS if name in arrays}
            model = "".join(texts.pop("model", ()))
            return cls(**arrays, **numbers, **texts, model=model)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{os.fspath(path)} holds no index ({error}).") from error
        except UserError as error:
            raise UserError(f"{os.fspath(path)}: {error}") from error

    @functools.cached_property
    def _chunks(self) -> jax.Array:
        """f32[N / M, M, D], filled up with zeros."""
        rows = min(_CHUNK, len(self))
        padded = np.pad(self.vectors, ((0, -len(self) % rows), (0, 0)))
        return jnp.asarray(padded.reshape(-1, rows, padded.shape[1]))

    def _nearest(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(queries_QD)
        padded = np.pad(queries_QD, ((0, (1 << (count - 1).bit_length()) - count), (0, 0)))  # few sizes are compiled
        scores, rows = jax.device_get(_nearest(self._chunks, len(self), padded, k))
        return scores[:count], rows[:count]

    @functools.cached_property
    def _lists(self) -> Any:
        """faiss's inverted file of the same vectors and cells."""
        faiss = _faiss()
        assert self.centroids is not None and self.cell is not None
        width, vectors = self.vectors.shape[1], np.ascontiguousarray(self.vectors)
        quantizer = faiss.IndexFlatIP(width)
        quantizer.add(np.ascontiguousarray(self.centroids))
        found = faiss.IndexIVFFlat(quantizer, width, len(self.centroids), faiss.METRIC_INNER_PRODUCT)
        found.referenced_objects, found.is_trained, found.nprobe = [quantizer], True, self.probes
        cell = self.cell.astype(np.int64)
        found.add_core(len(self), faiss.swig_ptr(vectors), None, faiss.swig_ptr(cell))
        return found


@functools.partial(jax.jit, static_argnames="k")
def _nearest(chunks_CMD: jax.Array, count: jax.Array, queries_QD: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The largest ``k`` products with the first ``count`` vectors, f32[Q,K], and their rows i32[Q,K]."""
    chunks, rows, _ = chunks_CMD.shape

    def more(best: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        vectors_MD, first = chunk
        scores_QM = jnp.matmul(queries_QD, vectors_MD.T, precision="highest")
        scores_QM = jnp.where(first + jnp.arange(rows) < count, scores_QM, -jnp.inf)
        scores, found = jax.lax.top_k(scores_QM, min(k, rows))
        scores = jnp.concatenate([best[0], scores], 1)
        scores, kept = jax.lax.top_k(scores, k)
        return (scores, jnp.take_along_axis(jnp.concatenate([best[1], first + found], 1), kept, 1)), None

    nothing = jnp.full((len(queries_QD), k), -jnp.inf), jnp.full((len(queries_QD), k), -1)
    return jax.lax.scan(more, nothing, (chunks_CMD, rows * jnp.arange(chunks)))[0]


def _texts(data: np.ndarray, bounds: np.ndarray) -> Texts:
    if data.dtype != np.uint8 or bounds.dtype != np.int64 or data.ndim != 1 or bounds.ndim != 1:
        raise ValueError("its names are no texts")
    if len(bounds) < 1 or bounds[0] != 0 or bounds[-1] != len(data) or (np.diff(bounds) < 0).any():
        raise ValueError("its names do not follow each other")
    return Texts(data, bounds)


def _overlap(truth_QK: np.ndarray, found_QK: np.ndarray) -> float:
    return float((truth_QK[:, :, None] == found_QK[:, None]).any(-1).mean())


def _faiss(needed: bool = True) -> Any:
    try:
        import faiss
    except ImportError as error:
        if needed:
            raise UserError(f"approximate search needs the extra: pip install -e '.[recommend]' ({error}).") from error
        return None
    return faiss
