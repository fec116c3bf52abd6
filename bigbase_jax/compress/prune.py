"""``--prune``: which of the two ways, and its words.

``heads=0.25,mlp=0.5,layers=0.5``, ``channels=0.5`` or ``dense=0.5`` make a smaller model of the same class
(``structured``); ``0.8`` and ``2:4`` make zeros in a model's kernels (``masks``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bigbase_jax.build import parse_arg
from bigbase_jax.compress import masks, structured
from bigbase_jax.compress.compressed import Batches, Compressed, Unrolled
from bigbase_jax.compress.units import FAMILIES
from bigbase_jax.core import UserError


def prune(found: Compressed, words: str, spec: Mapping[str, Any], batches: Batches) -> Compressed:
    """The model with less in it.

    Args:
      found: the plain model.
      words: ``KIND=SHARE,...`` with ``score=magnitude|taylor|activation``; or ``SHARE`` or ``N:M``, with
        ``score=magnitude|wanda`` and ``targets=REGEX``.
      spec: shapes of a batch.
      batches: gives the calibration batches.

    Raises:
      UserError: an unknown word, a share out of range, or what this model has nothing of.
    """
    model = Unrolled.of(found, spec)
    first, _, rest = words.partition(",")
    if "=" not in first:
        given = parse_arg(rest, "--prune", score="magnitude", targets=None)
        return masks.prune(found, model, first.strip(), given.score, given.targets, batches)
    kinds = dict.fromkeys((kind for kinds, _ in FAMILIES.values() for kind in kinds), 0.0)
    given = parse_arg(words, "--prune", score="magnitude", **kinds)
    shares = {kind: getattr(given, kind) for kind in kinds if f"{kind}=" in words}
    if not shares:
        raise UserError(f"--prune={words} takes nothing away; try heads=0.25,mlp=0.5, channels=0.5, or 0.8.")
    return structured.prune(found, model, shares, given.score, batches)
