"""Words in continuous sound: how often one is missed, and how often one is heard that nobody said.

Axes: W windows of a stream, K classes, N words that were said, M peaks, T thresholds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.ndimage

from bigbase_jax import parallel
from bigbase_jax.audio.files import pcm16
from bigbase_jax.core import Evaluated, Example, Figure, Metric, Plot, Task, UserError
from bigbase_jax.evaluate import collect
from bigbase_jax.wrappers.wrapper import Around

OTHERS = ("silence", "unknown", "_silence_", "_unknown_", "_background_noise_", "background", "noise")


class Stream(NamedTuple):
    """Recordings one after another, with background between them.

    Attributes:
      audio: i16[T].
      word: i[N], of each word that is said its class.
      start, end: f64[N], where it is, in seconds.
    """

    audio: np.ndarray
    word: np.ndarray
    start: np.ndarray
    end: np.ndarray


@dataclasses.dataclass
class Spotting:
    """A ``core.Evaluator`` of a classifier of words that slides over streams, one made of the recordings of each split.

    A recording follows another after ``gap`` seconds at least and at most, in an order by ``seed``; between them is the
    background, recordings of classes without a word, or silence where there are none. Probabilities are averaged over
    ``smooth`` windows (Chen et al. 2014), and a word is where the likeliest one has its largest within ``apart``. Peaks
    within a word that was said, of that word, find it; all others, and all but the best of several, are false alarms.
    The threshold is the least at which ``fit`` has no more of them than ``alarms`` an hour, and is kept in the run, so
    that ``--answers=NAME`` answers by it.

    Attributes:
      window, hop, apart: seconds.
      class_names: K names; None: the data says them.
      others: names of classes that are no words.
    """

    window: float = 1.0
    hop: float = 0.1
    smooth: int = 3
    apart: float = 0.5
    gap: tuple[float, float] = (0.5, 2.5)
    alarms: float = 5.0
    class_names: tuple[str, ...] | None = None
    others: tuple[str, ...] = OTHERS
    fit: str = "val"
    split: str = "test"
    seed: int = 0
    final: bool = True

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """See ``core.Evaluator``."""
        return {
            "miss_rate": Metric("min", "%", "Words missed"),
            "false_alarms": Metric("min", "an hour", "False alarms"),
            "threshold": Metric(),
            "hours": Metric(None, "h", "Length of the stream"),
        }

    def words(self) -> np.ndarray:
        """bool[K]: which classes are words."""
        if not self.class_names:
            raise UserError("Spotting needs the names of the classes, of which some are words.")
        return np.array([name not in self.others for name in self.class_names])

    def stream(self, source: Any, rate: int) -> Stream:
        """All recordings of a split, once."""
        rng, is_word = np.random.default_rng(self.seed), self.words()
        quiet = [int(i) for i in np.flatnonzero(~is_word[source.labels])]
        silent = [i for i in quiet if "silen" in self.class_names[source.labels[i]]] or quiet  # type: ignore[index]
        parts: list[np.ndarray] = []
        said: list[tuple[int, float, float]] = []
        at = 0
        for index in rng.permutation(len(source)):
            size = int(rng.uniform(*self.gap) * rate)
            noise = source[silent[int(rng.integers(len(silent)))]]["audio"] if silent else np.zeros(1, np.int16)
            audio = source[int(index)]["audio"]
            parts += [np.resize(pcm16(noise if len(noise) else np.zeros(1, np.int16)), size), pcm16(audio)]
            at += size
            if is_word[source.labels[index]]:
                said.append((int(source.labels[index]), at / rate, (at + len(audio)) / rate))
            at += len(audio)
        word_N, start_N, end_N = zip(*said, strict=True) if said else ((), (), ())
        return Stream(np.concatenate(parts), np.array(word_N, int), np.array(start_N), np.array(end_N))

    @property
    def needs(self) -> tuple[str, ...]:
        """See ``core.Evaluator``."""
        return (self.fit, self.split)

    def run(self, task: Task, variables: Any, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``. Keeps ``score`` of each word that was said, and of each false alarm, and which it is:
        ``said``.

        Raises:
          UserError: none of the recordings of a split is a word.
        """
        found: dict[str, tuple[np.ndarray, np.ndarray, float]] = {}
        rate = int(data.dataset_info["rate"])
        for split in dict.fromkeys((self.fit, self.split)):
            stream = self.stream(data.source(split), rate)
            if not len(stream.word):
                raise UserError(f"no recording of {split} is a word; all are {', '.join(self.others)}.")
            batches = self._batches(stream.audio, rate, data.eval_batch_size, parallel.host(mesh))
            predict = lambda v, batch: {"p": task.predict(v, batch)["probabilities"]}  # noqa: E731
            p_WK = collect(predict, variables, batches, mesh)["p"]
            found[split] = *self.scored(p_WK, stream), len(stream.audio) / rate / 3600
        threshold_T, alarms_T, _ = rates(*found[self.fit])
        threshold = float(threshold_T[np.flatnonzero(alarms_T <= self.alarms)[-1]])
        said_N, other_M, hours = found[self.split]
        metrics = {
            "miss_rate": float(np.mean(said_N < threshold)),
            "false_alarms": float(np.sum(other_M >= threshold) / hours),
            "threshold": min(threshold, 2.0),
            "hours": hours,
            "words": len(said_N),
        }
        said = np.repeat([True, False], [len(said_N), len(other_M)])
        return Evaluated(self.split, metrics, {"score": np.concatenate([said_N, other_M]), "said": said})

    def _batches(self, x_T: np.ndarray, rate: int, size: int, host: tuple[int, int]) -> Iterator[dict[str, np.ndarray]]:
        samples, hop = round(self.window * rate), round(self.hop * rate)
        x_T = np.pad(x_T, (0, samples))
        count, (piece, pieces) = (len(x_T) - samples) // hop, host
        windows = np.lib.stride_tricks.sliding_window_view(x_T, samples)[::hop]
        for start in range(0, count, size):
            index_B = np.arange(start, start + size)[piece * size // pieces : (piece + 1) * size // pieces]
            mask_B = (index_B < count).astype(np.float32)
            yield {"audio": windows[np.minimum(index_B, count - 1)], "mask": mask_B, "index": index_B}

    def scored(self, p_WK: np.ndarray, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
        """f64[N], the score of the best peak in each word that was said, 0 where there is none, and f64[m], those of
        all other peaks."""
        at_M, word_M, score_M = peaks(p_WK, self.words(), self.smooth, self.apart / self.hop)
        middle_M = at_M * self.hop + self.window / 2
        said_N = np.zeros(len(stream.word))
        best_N = np.full(len(stream.word), -1)
        n_M = np.searchsorted(stream.start - self.apart / 2, middle_M) - 1
        inside_M = (n_M >= 0) & (middle_M <= stream.end[n_M] + self.apart / 2) & (stream.word[n_M] == word_M)
        for m in np.flatnonzero(inside_M):
            if score_M[m] > said_N[n_M[m]]:
                said_N[n_M[m]], best_N[n_M[m]] = score_M[m], m
        return said_N, np.delete(score_M, best_N[best_N >= 0])

    def answering(self, task: Task, metrics: Mapping[str, Any]) -> Task:
        """See ``core.Evaluator``: the task with the words it hears in a recording, each with where it is."""
        threshold = metrics.get("threshold")
        if not isinstance(threshold, float) or not self.class_names:
            raise UserError("this run has kept no threshold; evaluate it again.")
        return Spotted(task, self, threshold)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """The DET curve: words missed by false alarms an hour."""
        if "score" not in evaluated.examples:
            return
        score, said = evaluated.examples["score"], evaluated.examples["said"] > 0
        _, alarms_T, misses_T = rates(score[said], score[~said], evaluated.metrics["hours"])
        some = np.unique(np.linspace(0, len(alarms_T) - 1, 300).astype(int))
        found = evaluated.metrics
        note = (
            f"At the threshold {found['threshold']:.3f}, of {self.fit}: {100 * found['miss_rate']:.1f} % missed, "
            f"{found['false_alarms']:.1f} false alarms an hour, in {found['hours']:.2f} hours."
        )
        curve = alarms_T[some].tolist(), (100 * misses_T[some]).tolist()
        yield Plot("Words missed and heard for nothing", {"words": curve}, "false alarms an hour", "missed, %", note)


@dataclasses.dataclass(frozen=True)
class Spotted(Around):
    """A classifier of windows whose answer is the words in a recording, and where.

    Attributes:
      spotting: how they are found.
      threshold: of their scores.
    """

    spotting: Spotting
    threshold: float

    def merge(self, outputs: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        return {"probabilities": np.stack([output["probabilities"] for output in outputs])}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """``{"events": [{"word", "start", "end", "score"}]}``, in seconds."""
        how, p_WK = self.spotting, np.atleast_2d(output["probabilities"])
        found = zip(*peaks(p_WK, how.words(), how.smooth, how.apart / how.hop), strict=True)
        return {
            "events": [
                {
                    "word": how.class_names[word],  # type: ignore[index]
                    "start": round(at * how.hop, 3),
                    "end": round(at * how.hop + how.window, 3),
                    "score": float(score),
                }
                for at, word, score in found
                if score >= self.threshold
            ]
        }


def peaks(p_WK: np.ndarray, is_word_K: np.ndarray, smooth: int, apart: float) -> tuple[np.ndarray, ...]:
    """i[M], the windows at which the likeliest word has its largest probability within ``apart`` windows, which word
    that is, and f64[M], the probability, averaged over ``smooth`` windows."""
    smooth_WK = scipy.ndimage.uniform_filter1d(p_WK.astype(np.float64), smooth, 0, mode="nearest")
    smooth_WK = np.where(is_word_K, smooth_WK, -1.0)
    word_W, best_W = smooth_WK.argmax(1), smooth_WK.max(1)
    around = 2 * max(round(apart), 1) + 1
    at = np.flatnonzero(best_W == scipy.ndimage.maximum_filter1d(best_W, around, mode="nearest"))
    at = at[np.diff(at, prepend=-around) > around // 2]  # of those that are equal the first
    return at, word_W[at], best_W[at]


def rates(said_N: np.ndarray, other_M: np.ndarray, hours: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds f64[T], descending from above all, false alarms an hour at each, and the share of words missed."""
    threshold_T = np.concatenate([[np.inf], np.unique(np.concatenate([said_N, other_M]))[::-1]])
    alarms_T = len(other_M) - np.searchsorted(np.sort(other_M), threshold_T)
    return threshold_T, alarms_T / hours, np.searchsorted(np.sort(said_N), threshold_T) / len(said_N)
