"""A request that gets no answer, and why."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bigbase_jax.core import UserError


class Refused(Exception):
    """What a client is told in place of an answer.

    Args:
      status: of HTTP.
      sentence: for the client; no path, no traceback.
      retry_after: seconds after which it is worth asking again; None: it is not.
    """

    def __init__(self, status: int, sentence: str, retry_after: float | None = None):
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after = status, sentence, retry_after


@contextlib.contextmanager
def refusing(status: int) -> Iterator[None]:
    """A ``UserError`` inside is what a client is told, with this status."""
    try:
        yield
    except UserError as error:
        raise Refused(status, str(error)) from error
