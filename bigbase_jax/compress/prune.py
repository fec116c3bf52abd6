"""``--prune``: which of the two ways, and its words.

``0.8`` and ``2:4`` make zeros in a model's kernels (``masks``).
"""

from __future__ import annotations

from bigbase_jax.build import parse_arg
from bigbase_jax.compress import masks
from bigbase_jax.compress.compressed import Batches, Compressed, Unrolled
from bigbase_jax.inference.predictor import Predictor


def prune(predictor: Predictor, found: Compressed, words: str, batches: Batches) -> Compressed:
    """The model with less in it.

    Args:
      found: the plain model of the run that ``predictor`` opens.
      words: ``SHARE`` or ``N:M``, each with ``score=magnitude|wanda`` and ``targets=REGEX``.
      batches: gives the calibration batches.

    Raises:
      UserError: an unknown word, a share out of range, or what this model has nothing of.
    """
    first, _, rest = words.partition(",")
    given = parse_arg(rest, "--prune", score="magnitude", targets=None)
    model = Unrolled.of(found, predictor)
    return masks.prune(found, model, first.strip(), given.score, given.targets, batches)
