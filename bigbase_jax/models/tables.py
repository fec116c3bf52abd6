"""Embedding tables of ids: of items, users and the values of columns, up to more rows than one device holds.

The parameter is called ``table``. A mesh spreads its rows over ``fsdp`` and ``tensor`` (``parallel.TABLE``), and no
device ever has all of them: each looks up those that it holds, and the vectors, not the table, travel.

Axes: B examples, C columns, V rows of a table, D width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int

from bigbase_jax.models.layers import ModelError

MULTIPLE = 128
"""Of which every count of rows is one, so that the rows divide over a mesh and a checkpoint fits the next one."""


class Table(nn.Module):
    """A vector for each id, as ``nn.Embed``; what ``train.lazy_tables`` and the mesh's rules for tables know.

    Attributes:
      rows: V, how many ids there are; the parameter has this rounded up to a multiple of ``MULTIPLE``.
      width: D.
      embedding_init: of the parameter, f32[V,D].
    """

    rows: int
    width: int
    embedding_init: Callable[..., Any] = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, ids: Int[Array, "*S"]) -> Float32[Array, "*S D"]:
        """The vectors of ids from 0 to V - 1.

        Raises:
          ModelError: a size below 1.
        """
        if min(self.rows, self.width) < 1:
            raise ModelError(f"a table of {self.rows} rows of width {self.width} is empty; both are at least 1.")
        shape = (-(-self.rows // MULTIPLE) * MULTIPLE, self.width)
        table_VD: Array = self.param("table", self.embedding_init, shape)
        return jnp.asarray(table_VD).at[ids].get(mode="clip")

    def attend(self, x_BD: Float32[Array, "*B D"]) -> Float32[Array, "*B V"]:
        """The inner products with every row, of a table that has been looked into before."""
        return (x_BD @ self.get_variable("params", "table").T)[..., : self.rows]


Path = tuple[str, ...]
"""Of a table in its model, as ``nn.Module.path``."""


@contextlib.contextmanager
def noted() -> Iterator[dict[Path, list[Any]]]:
    """Gives the ids of every lookup inside, table by table in their order."""
    found: dict[Path, list[Any]] = {}

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Table) and context.method_name == "__call__":
            found.setdefault(context.module.path, []).append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        yield found


@contextlib.contextmanager
def answered(places: Mapping[Path, Sequence[Any]]) -> Iterator[None]:
    """Inside, these tables have only some rows, and the lookups that ``noted`` saw find theirs at ``places``."""
    left = {path: itertools.cycle(found) for path, found in places.items()}

    def answer(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if not isinstance(module, Table) or module.path not in left:
            return call(*args, **kwargs)
        if context.method_name != "__call__":
            raise ModelError(
                f"the loss reads all rows of the table {'.'.join(module.path)!r}, so none can be left out: set "
                "config.train.lazy_tables=False, or train with a sampled loss."
            )
        return jnp.asarray(module.get_variable("params", "table"))[next(left[module.path])]

    with nn.intercept_methods(answer):
        yield


def rows_of(categories_BC: Int[Array, "B C"], cardinalities: Sequence[int]) -> Int[Array, "B C"]:
    """The rows of one table that holds all columns, one after another: column c has ``cardinalities[c]`` of them.

    One lookup then serves all columns, which costs one gather and one scatter of gradients rather than C. A code that
    its column does not have is read as 0, which stands for unknown values.

    Raises:
      ModelError: another number of columns.
    """
    if categories_BC.shape[-1] != len(cardinalities):
        raise ModelError(f"the model knows {len(cardinalities)} categories, and is given {categories_BC.shape[-1]}.")
    size_C = np.asarray(cardinalities, np.int32)
    offset_C = np.cumsum([0, *size_C[:-1]], dtype=np.int64)
    if offset_C.size and offset_C[-1] + size_C[-1] >= 2**31:
        raise ModelError("all columns together have 2^31 values or more; hash the largest into fewer.")
    known_BC = (categories_BC >= 0) & (categories_BC < size_C)
    return jnp.where(known_BC, categories_BC, 0) + offset_C.astype(np.int32)
