"""What tasks share about mistakes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bigbase_jax.core import UserError
from bigbase_jax.models.layers import ModelError


@contextlib.contextmanager
def model_errors() -> Iterator[None]:
    """Around every call of a model: one that does not fit its input or the mesh is the user's to mend.

    Raises:
      UserError: in the place of a ``ModelError``.
    """
    try:
        yield
    except ModelError as error:
        raise UserError(str(error)) from error
