"""A candidate beside the version that answers: it takes a share of the requests (canary), or computes them for
comparison alone (shadow); both answers are compared and logged."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from typing import Any

from jax.tree_util import tree_leaves_with_path

from bigbase_jax.core import UserError
from bigbase_jax.serve.served import REQUEST, Given, Served


@dataclasses.dataclass(frozen=True)
class Trial:
    """How candidates are tried.

    Attributes:
      canary: the share of requests that a candidate answers.
      shadow: it also computes those that it does not answer.
      contents: whether the log shows the answers.
    """

    canary: float = 0.0
    shadow: bool = False
    contents: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.canary < 1:
            raise UserError(f"--canary={self.canary:g} is no share from 0 to below 1; promote what is to answer all.")


class Pair:
    """The version that answers, and its candidate; compares what they say, after one of them has answered.

    A comparison is left out where the other is busy by half or more, so that requests do not wait for it.
    """

    def __init__(self, current: Served, candidate: Served, trial: Trial):
        self.current, self.candidate, self._trial = current, candidate, trial
        self._tasks: set[asyncio.Task] = set()
        candidate.compare = self.compare
        current.compare = self.compare if trial.shadow else None

    def compare(self, answered: Served, given: Given, answers: list[dict[str, Any]]) -> None:
        """Takes an answer; nobody waits for what the other says."""
        other = self.candidate if answered is self.current else self.current
        if other.ready and 2 * other.busy < other.options.max_queue:
            task = asyncio.get_running_loop().create_task(self._compared(answered, other, given, answers))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _compared(self, answered: Served, other: Served, given: Given, answers: list[dict[str, Any]]) -> None:
        line: dict[str, Any] = {"time": round(time.time(), 3), "id": REQUEST.get(), "model": answered.name}
        line |= {"compared": [answered.version, other.version]}
        try:
            with other.used():
                others = await other.answer(given)
            same, apart = difference(answers, others)
            line |= {"same": same, "largest_difference": apart}
            if self._trial.contents:
                line["answers"] = [answers, others]
        except Exception as error:  # the request has its answer
            same = None
            line["error"] = type(error).__name__
        said = {True: "yes", False: "no", None: "error"}[same]
        answered.metrics.compared.labels(answered.name, said).inc()
        print(json.dumps(line, default=str), file=sys.stderr, flush=True)


def difference(a: Any, b: Any) -> tuple[bool, float]:
    """Whether two answers say the same but for numbers, and the largest difference of these."""
    leaves_a, leaves_b = dict(tree_leaves_with_path(a)), dict(tree_leaves_with_path(b))
    same, apart = leaves_a.keys() == leaves_b.keys(), 0.0
    for path in leaves_a.keys() & leaves_b.keys():
        x, y = leaves_a[path], leaves_b[path]
        if isinstance(x, float) and isinstance(y, float):
            apart = max(apart, abs(x - y))
        else:
            same &= x == y
    return same, apart
