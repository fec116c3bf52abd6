"""What tasks show of their evaluations (``core.Figure``), where several tasks show the same.

Axes: N examples of a split, K classes, L places of an example, B bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.core import Card, Differences, Gallery, Highlights, Matrix, Plot, Table
from bigbase_jax.tasks.metrics import classes
from bigbase_jax.tasks.metrics.transcripts import errors as transcript_errors
from bigbase_jax.text.normalise import normalise, words

SHOWN = 24
"""How many mistakes are shown."""
BINS = classes.CALIBRATION_BINS
"""Of the reliability diagram."""


def transcripts(
    texts: Sequence[str], references: Sequence[str], kind: str, examples: Mapping[str, np.ndarray], rate: int
) -> Differences:
    """What was heard in N recordings against what was said, normalised as ``kind`` says (``text.normalise``)."""
    sides = [[words(normalise(text, kind), kind) for text in some] for some in (references, texts)]
    rows = list(zip(examples.get("index", np.arange(len(texts))).tolist(), *sides, strict=True))
    wrong_N = sum(
        transcript_errors(texts, references, kind)[name] for name in ("insertions", "deletions", "substitutions")
    )
    order = np.argsort(-wrong_N, kind="stable")
    between = "" if kind == "characters" else " "
    return Differences("Hardest utterances", [rows[n] for n in order], between=between, rate=rate)


def per_class(metrics: Mapping[str, Any], title: str = "Classes", each: str = "Class") -> Iterator[Table]:
    """The scores of each class, of the metric ``per_class``: a name -> precision, recall, F1 and more."""
    classes = metrics.get("per_class")
    if not isinstance(classes, dict) or not all(isinstance(scores, dict) for scores in classes.values()):
        return
    named = {"f1": "F1", "auc": "AUC", "ap": "AP", "ap50": "AP50"}
    columns = {column: named.get(column, column.capitalize()) for scores in classes.values() for column in scores}
    rows = [(name, *(scores.get(column) for column in columns)) for name, scores in classes.items()]
    yield Table(title, (each, *columns.values()), rows, shares=("Precision", "Recall", "F1", "AP", "AP50"))


def confusion(counts_KK: Any, names: Sequence[str]) -> Matrix:
    """The confusion matrix: true classes down, what the model said across."""
    note = "Rows are the true classes, columns what the model said; shades are shares of the row."
    return Matrix("Confusion matrix", names, counts_KK, note)


def calibration(p_NK: np.ndarray, label_N: np.ndarray) -> Iterator[Plot]:
    """The reliability diagram (Guo et al. 2017, figure 1), where the scores are probabilities."""
    confidence_N, right_N = p_NK.max(-1), p_NK.argmax(-1) == label_N
    if not np.isfinite(confidence_N).all() or confidence_N.max() > 1 + 1e-3:
        return
    bin_N = classes.bin_of(p_NK)
    count_B = np.bincount(bin_N, minlength=BINS)
    accuracy_B = np.bincount(bin_N, right_N, minlength=BINS) / np.maximum(count_B, 1)
    error = classes.calibration_error(p_NK, label_N) or 0.0
    mean, accuracy = float(confidence_N.mean()), float(right_N.mean())
    note = (
        "Bars: how often the model was right when it was so sure; on the dashed line, confidence can be read as "
        f"probability. Fainter bars hold fewer examples. Its mean confidence is {_percent(mean)}, "
        f"{'more' if mean > accuracy else 'less'} than its accuracy of {_percent(accuracy)}; the expected "
        f"calibration error is {error:.4f}."
    )
    middle_B = 100 * (np.arange(BINS) + 0.5) / BINS
    yield Plot(
        "Calibration",
        {"right": (middle_B.tolist(), (100 * accuracy_B).tolist())},
        "confidence, %",
        "right, %",
        note,
        bars=True,
        diagonal=True,
        counts={"right": count_B.tolist()},
    )


def mistakes(p_NK: np.ndarray, label_N: np.ndarray, index_N: np.ndarray, names: Sequence[str]) -> Gallery:
    """The worst mistakes; where there are none, the examples of which the model was least certain."""
    guess_N, rows_N = p_NK.argmax(-1), np.arange(len(label_N))
    wrong_N = guess_N != label_N
    if wrong_N.any():
        title = "Worst mistakes"
        note = f"{wrong_N.sum():,} of {len(label_N):,} are wrong; these gave the true class the least probability."
        shown = [i for i in np.argsort(p_NK[rows_N, label_N], kind="stable") if wrong_N[i]][:SHOWN]
    else:
        title, note = "Least certain", f"All {len(label_N):,} are right; of these the model was least certain."
        shown = list(np.argsort(p_NK.max(-1), kind="stable")[:SHOWN])
    cards = [Card(int(index_N[i]), _verdict(p_NK[i], int(label_N[i]), names), not wrong_N[i]) for i in shown]
    return Gallery(title, cards, note)


def hardest_texts(
    p_NK: np.ndarray, label_N: np.ndarray, index_N: np.ndarray, names: Sequence[str], text: Callable[[int], str]
) -> Highlights:
    """The texts whose class was given the least probability; ``text`` gives the one of row n."""
    order = np.argsort(p_NK[np.arange(len(p_NK)), label_N], kind="stable")[: SHOWN // 2]
    texts = [
        (f"row {index_N[n] + 1}: {_verdict(p_NK[n], int(label_N[n]), names)}".replace("\n", ", "), [(text(n), 0.0)])
        for n in order
    ]
    return Highlights("Hardest texts", texts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _verdict(p_K: np.ndarray, label: int, names: Sequence[str]) -> str:
    guess = int(p_K.argmax())
    said = f"said {names[guess]} {_percent(p_K[guess])}"
    return f"rightly {said}" if guess == label else f"{said}\nis {names[label]} {_percent(p_K[label])}"


def hardest_passages(
    logp_NL: np.ndarray, real_NL: np.ndarray, per: str, pieces: Callable[[int], tuple[str, Any]], count: int = 6
) -> Highlights:
    """The examples that were hardest to predict, each piece shaded by its loss.

    Args:
      logp_NL: log-probabilities, 0 where there is nothing to predict.
      real_NL: where there is something.
      per: what a loss is per.
      pieces: row n -> (what else its title says, [(piece, its loss in nats), ...]).
    """
    mean_N = -logp_NL.sum(1) / np.maximum(real_NL.sum(1), 1)
    texts = []
    for n in np.argsort(-mean_N, kind="stable")[:count]:
        more, found = pieces(int(n))
        texts.append((f"{mean_N[n]:.3f} nats per {per}{more}", found))
    note = "The darker a piece, the less the model expected it; hold the pointer over it for its loss."
    return Highlights("Hardest passages", texts, note, most=8.0, unit="nats")
