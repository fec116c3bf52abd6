"""Which of many parameters are left to ``-m slow``."""

import pytest


def some_slow(names, *slow):
    """The names as parameters, some of which are left to ``-m slow``: each compiles programs of its own."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in slow else name for name in names]
