"""Synthesised speech beside recordings: spectra, pitch, durations, speed, and whether a recogniser understands it.

Legend: N utterances, F and G frames of two of them, M mel bands, K cepstral coefficients, T samples.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import numpy as np
import scipy.fft

from bigbase_jax import parallel
from bigbase_jax.audio.files import wav
from bigbase_jax.audio.pitch import yin
from bigbase_jax.core import Clips, Evaluated, Figure, Metric, Table, Task, UserError, Variables
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.tasks.metrics import transcripts

_ORDER = 13  # cepstral coefficients, without the loudness
_KUBICHEK = 10 * np.sqrt(2) / np.log(10)  # to dB


@dataclasses.dataclass(frozen=True)
class Synthesised:
    """A ``core.Evaluator`` of a voice (``tasks.synthesis``), by what it says of the texts of a split.

    Sounds are made as a user hears them, with the vocoder, and compared with the recordings' mel bands.

    Attributes:
      split: whose texts.
      examples: how many, spread evenly over it.
      recogniser: a run or a published folder that answers recordings by ``text`` or ``label``; None: none is asked.
      clips: that the report plays.
      final: see ``core.Evaluator``.
    """

    split: str = "test"
    examples: int = 32
    recogniser: str | None = None
    clips: int = 4
    final: bool = True

    metrics: ClassVar[Mapping[str, Metric]] = {
        "mcd": Metric("min", "dB", "Mel-cepstral distortion"),
        "f0_error": Metric("min", "semitones", "RMSE of log F0"),
        "voicing_error": Metric("min", "%", "Frames voiced in one alone"),
        "length_error": Metric("min", "%", "Error of the duration"),
        "real_time_factor": Metric("min", "", "Seconds to make a second"),
        "wer": Metric("min", "%", "Word error rate of the recogniser"),
        "cer": Metric("min", "%", "Character error rate of the recogniser"),
        "recorded_wer": Metric("min", "%", "Its word error rate on the recordings' mel bands by the same vocoder"),
    }

    def run(self, task: Task, variables: Variables, data: Any, mesh: Any) -> Evaluated:
        """See ``core.Evaluator``; keeps of each utterance ``mcd``, ``f0_error``, ``seconds``, ``recorded_seconds``,
        what is to be said (``reference``) and was understood (``heard``); of the first ones the samples, ``wave`` and
        ``recorded``, i16[n,T], and the ``rate``.

        Raises:
          UserError: the task is no voice, or the recogniser cannot be opened.
        """
        voice: Any = task
        if not hasattr(voice, "wave"):
            raise UserError(f"Synthesised measures voices, and {type(task).__name__} is none; leave it out.")
        recogniser = None if self.recogniser is None else Predictor.open(self.recogniser)
        predict, features, spent = jax.jit(voice.predict), voice.features, 0.0
        rows: list[dict[str, Any]] = []
        sounds: dict[str, list[np.ndarray]] = {"wave": [], "recorded": []}
        recorded_heard: list[str] = []

        def heard(wave_T: np.ndarray) -> str:
            (answer, *_) = recogniser.answer(wav(wave_T, features.rate))  # type: ignore[union-attr]
            return str(answer.get("text", answer.get("label", "")))

        for number, batch in enumerate(data.eval_batches(self.split, parallel.host(mesh), self.examples)):
            given = {name: batch[name] for name in voice.inputs}
            if not number:
                jax.block_until_ready(predict(variables, given))  # compiled
            begin = time.perf_counter()
            found = jax.device_get(predict(variables, given))
            mels = [mel_FM[:n] for mel_FM, n in zip(found["mel"], found["frames"], strict=True)]
            real = np.flatnonzero(batch["mask"] > 0)
            waves = [voice.wave(mels[b]) for b in real]
            spent += (time.perf_counter() - begin) * len(real) / len(batch["mask"])
            for b, wave_T in zip(real, waves, strict=True):
                recorded_GM, f0_G = (batch[name][b, : batch["frames"][b]] for name in ("mel", "f0"))
                mel_FM = features(wave_T[None], np)[0]
                f0_F = yin(wave_T, features.rate, features.hop, len(mel_FM))
                a_K, b_K = cepstra(mel_FM), cepstra(recorded_GM)
                at = warped(a_K, b_K)
                row: dict[str, Any] = dict(compared(a_K[at[0]], b_K[at[1]], f0_F[at[0]], f0_G[at[1]]))
                row |= {"seconds": len(wave_T) / features.rate, "index": int(batch["index"][b])}
                row |= {"recorded_seconds": len(f0_G) * features.hop / features.rate, "rate": features.rate}
                row["reference"] = bytes(batch["reference"][b]).rstrip(b"\0").decode()
                played = len(rows) < self.clips
                if played or recogniser is not None:
                    recorded_T = voice.wave(recorded_GM)
                if recogniser is not None:
                    row["heard"] = heard(wave_T)
                    recorded_heard.append(heard(recorded_T))
                if played:
                    sounds["wave"].append(wave_T)
                    sounds["recorded"].append(recorded_T)
                rows.append(row)
        kept = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        seconds, recorded = kept["seconds"], kept["recorded_seconds"]
        metrics = {
            **{name: float(np.nanmean(kept[name])) for name in ("mcd", "f0_error", "voicing_error")},
            "length_error": float(np.mean(np.abs(seconds - recorded) / recorded)),
            "real_time_factor": spent / float(seconds.sum()),
        }
        if recogniser is not None:
            references = [row["reference"] for row in rows]
            scores = transcripts.scores(transcripts.errors([row["heard"] for row in rows], references))
            metrics |= {name: float(scores[name]) for name in ("wer", "cer")}
            metrics["recorded_wer"] = transcripts.scores(transcripts.errors(recorded_heard, references))["wer"]
        for name, some in sounds.items():
            size = max(map(len, some), default=0)
            padded = [np.pad(np.clip(x_T, -1, 1), (0, size - len(x_T))) for x_T in some]
            kept[name] = np.round(32767 * np.array(padded)).astype(np.int16)
        return Evaluated(self.split, metrics, kept)

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Players of what is said, and the recording by the same vocoder; what was least alike."""
        found = evaluated.examples
        if "mcd" not in found:
            return
        rate = int(found["rate"][0])
        kinds = (("wave", "said", "seconds"), ("recorded", "recorded", "recorded_seconds"))
        clips = [
            (f"{what}: {found['reference'][i]}", found[name][i, : int(found[length][i] * rate)], rate)
            for i in range(len(found["wave"]))
            for name, what, length in kinds
        ]
        yield Clips("Said, and the recording by the same vocoder", clips)
        order = np.argsort(-found["mcd"])[:12]
        names = [name for name in ("reference", "heard", "mcd", "f0_error", "seconds") if name in found]
        rows = [tuple(found[name][i].item() for name in names) for i in order]
        yield Table("What is least like its recording", [name.replace("_", " ") for name in names], rows)


def cepstra(mel_FM: np.ndarray) -> np.ndarray:
    """f32[F,K]: coefficients 1 to K of the cosine transform of log-mel bands."""
    return np.asarray(scipy.fft.dct(mel_FM, norm="ortho")[:, 1 : _ORDER + 1] * np.sqrt(2 / mel_FM.shape[1]) / 2)


def warped(a_FK: np.ndarray, b_GK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The frames of both, one beside another, of dynamic time warping with steps of 1 in one or both (Sakoe & Chiba
    1978)."""
    cost_FG = np.sqrt(np.maximum(((a_FK[:, None] - b_GK) ** 2).sum(-1), 0.0))
    F, G = cost_FG.shape
    total = np.full((F + 1, G + 1), np.inf)
    total[0, 0] = 0.0
    for d in range(F + G - 1):  # along anti-diagonals, whose cells do not depend on each other
        f = np.arange(max(0, d - G + 1), min(F, d + 1))
        g = d - f
        before = np.minimum(np.minimum(total[f, g], total[f, g + 1]), total[f + 1, g])
        total[f + 1, g + 1] = cost_FG[f, g] + before
    f, g = F, G
    path = []
    while f and g:
        path.append((f - 1, g - 1))
        step = int(np.argmin((total[f - 1, g - 1], total[f - 1, g], total[f, g - 1])))
        f, g = f - (step < 2), g - (step != 1)
    first, second = np.array(path[::-1]).T
    return first, second


def compared(a_FK: np.ndarray, b_FK: np.ndarray, f0_F: np.ndarray, other_F: np.ndarray) -> dict[str, float]:
    """``mcd`` in dB (Kubichek 1993), ``f0_error``, the root mean square in semitones where both are voiced (NaN:
    nowhere), and the share of frames of which one alone is; of frames beside each other."""
    both = (f0_F > 0) & (other_F > 0)
    semitones = 12 * np.log2(f0_F[both] / other_F[both])
    return {
        "mcd": float(_KUBICHEK * np.sqrt(((a_FK - b_FK) ** 2).sum(-1)).mean()),
        "f0_error": float(np.sqrt(np.mean(semitones**2))) if both.any() else float("nan"),
        "voicing_error": float(np.mean((f0_F > 0) != (other_F > 0))),
    }
