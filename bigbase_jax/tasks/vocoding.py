"""Vocoders: trained to make the sound again whose mel bands they are given.

Legend: B examples, T samples, F frames, M mel bands, N frequency bins.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.audio.features import LogMel, scaled, vocoder_mel
from bigbase_jax.audio.files import wav
from bigbase_jax.core import (
    Array,
    Batch,
    Clips,
    Evaluated,
    Example,
    Figure,
    Loss,
    Meter,
    Metric,
    Rendered,
    Sum,
    UserError,
    Variables,
)
from bigbase_jax.models.spectra import stft
from bigbase_jax.runtime.restored import opened
from bigbase_jax.tasks.errors import model_errors

_FRAMES = 64  # a mel's frames are padded to a multiple of so many, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Vocoding:
    """A vocoder trained on recordings alone.

    A batch holds ``audio``, i16[B,T] or f32 in -1..1, and ``mask``. The training loss is the distance of log-mel bands,
    and that of magnitudes at several resolutions (Yamamoto et al. 2020: spectral convergence and log magnitudes);
    where there are ``judges``, also the hinge losses and feature matching of generative adversarial training, in the
    same step: the terms of the judges reach their parameters alone, and the others the vocoder's alone.

    Attributes:
      model: a Linen module ``f32[B,F,M] -> f32[B,F*hop]``, such as ``models.vocos.Vocos``.
      judges: a module ``f32[B,T] -> (judgements, layers)``, such as ``models.vocos.Judges``; None: there are none.
      rate: samples per second; None: the data's.
      ffts: the resolutions, windows in samples, with a quarter as hop.
      weights: of the terms mel, spectra, adversarial and matching.
    """

    model: nn.Module
    judges: nn.Module | None = None
    rate: int | None = None
    ffts: tuple[int, ...] = (256, 512, 1024, 2048)
    weights: tuple[float, ...] = (1.0, 1.0, 0.1, 0.1)

    inputs: ClassVar[tuple[str, ...]] = ("audio",)
    batch_coupled: ClassVar[bool] = False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "loss": Metric("min", "nats", "Distance of log-mel bands"),
        "convergence": Metric("min", "", "Spectral convergence"),
    }

    def __post_init__(self) -> None:
        if self.rate is None:
            raise UserError("the task does not know the samples per second; set rate.")
        for name in ("ffts", "weights"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sides = {name: (getattr(self.model, name, None), getattr(self.features, name)) for name in ("fft", "hop")}
        if wrong := [name for name, (found, wanted) in sides.items() if found not in (None, wanted)]:
            found, wanted = sides[wrong[0]]
            raise UserError(f"task.model.{wrong[0]} is {found}; sound of {self.rate} samples a second takes {wanted}.")

    @property
    def features(self) -> LogMel:
        """What the vocoder reads."""
        return vocoder_mel(self.rate or 0)

    def _sound(self, batch: Batch) -> jax.Array:
        """f32[B,T] of whole frames."""
        x_BT: jax.Array = scaled(batch["audio"])
        return x_BT[:, : x_BT.shape[1] // self.features.hop * self.features.hop]

    def vocoder(self, variables: Variables, mel_BFM: Array) -> jax.Array:
        """f32[B,F,M] -> f32[B,F*hop]."""
        with model_errors():
            wave_BT: jax.Array = self.model.apply({"params": variables["params"]["vocoder"]}, mel_BFM)  # type: ignore[assignment]
        return wave_BT

    # -- inside the compiled step ----------------------------------------------------------------------------------

    def init(self, key: jax.Array, batch: Batch) -> Variables:
        """
        Raises:
          UserError: recordings shorter than a window, or a model that does not fit.
        """
        samples = batch["audio"].shape[1]
        if samples < max(*self.ffts, self.features.fft):
            raise UserError(f"pieces of {samples} samples are shorter than a window; take longer ones.")
        x_BT = self._sound({"audio": jnp.zeros((1, samples))})
        with model_errors():
            params = {"vocoder": self.model.init(key, self.features(x_BT))["params"]}
            if self.judges is not None:
                params["judges"] = self.judges.init(jax.random.fold_in(key, 1), x_BT)["params"]
        return {"params": params}

    def loss(self, variables: Variables, batch: Batch, key: jax.Array) -> tuple[Loss, Variables]:
        real_BT, mask_B = self._sound(batch), jnp.asarray(batch["mask"])
        mel_BFM = self.features(real_BT)
        made_BT = self.vocoder(variables, mel_BFM)
        values = {"mel": _mean(jnp.abs(self.features(made_BT) - mel_BFM)), "spectra": self._spectra(made_BT, real_BT)}
        if self.judges is not None:
            params = variables["params"]["judges"]
            judge = functools.partial(self.judges.apply, {"params": params})
            fixed = functools.partial(self.judges.apply, {"params": jax.lax.stop_gradient(params)})
            of_real, of_made = judge(real_BT), judge(jax.lax.stop_gradient(made_BT))
            scores, layers = fixed(made_BT)
            wanted = jax.lax.stop_gradient(of_real[1])
            size = len(mask_B)
            values["judges"] = _average(
                _mean(jax.nn.relu(1 - r), size) + _mean(jax.nn.relu(1 + m), size)
                for r, m in zip(of_real[0], of_made[0], strict=True)
            )
            values["adversarial"] = _average(_mean(jax.nn.relu(1 - s), size) for s in scores)
            values["matching"] = _average(
                _mean(jnp.abs(a - b), size) / jnp.maximum(_mean(jnp.abs(b), size), 1e-3)
                for a, b in zip(layers, wanted, strict=True)
            )
        scale = dict(zip(("mel", "spectra", "adversarial", "matching"), self.weights, strict=True))
        terms = {name: Sum(jnp.sum(x_B * mask_B), jnp.sum(mask_B)) for name, x_B in values.items()}
        return Loss(terms, scale={name: x for name, x in scale.items() if name in terms}), {}

    def _spectra(self, made_BT: jax.Array, real_BT: jax.Array) -> jax.Array:
        """f32[B]: spectral convergence and the distance of log magnitudes, the mean over resolutions."""
        total = jnp.zeros(len(real_BT))
        for fft in self.ffts:
            made, real = (_size(stft(x, fft, fft // 4)) for x in (made_BT, real_BT))
            total += _norm(made - real) / _norm(real) + _mean(jnp.abs(jnp.log(made) - jnp.log(real)))
        return total / len(self.ffts)

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``wave`` f32[B,T]: the recordings, made again from their mel bands."""
        return {"wave": self.vocoder(variables, self.features(self._sound(inputs)))}

    def evaluate(self, variables: Variables, batch: Batch) -> tuple[Mapping[str, jax.Array], Mapping[str, Sum]]:
        """``mel_distance`` f32[B] and ``convergence`` f32[B]; ``recorded`` and ``made`` i16[B,T]."""
        real_BT, mask_B = self._sound(batch), jnp.asarray(batch["mask"])
        made_BT = self.predict(variables, batch)["wave"]
        mel_B = _mean(jnp.abs(self.features(made_BT) - self.features(real_BT)))
        size, hop = self.features.fft, self.features.hop
        made, real = (_size(stft(x, size, hop)) for x in (made_BT, real_BT))
        arrays = {"mel_distance": mel_B, "convergence": _norm(made - real) / _norm(real)}
        sounds = {"recorded": real_BT, "made": made_BT}
        kept = {name: jnp.rint(jnp.clip(x, -1, 1) * 32767).astype(jnp.int16) for name, x in sounds.items()}
        sums = {"loss": mel_B, "convergence": arrays["convergence"]}
        return {**arrays, **kept}, {name: Sum(jnp.sum(x_B * mask_B), jnp.sum(mask_B)) for name, x_B in sums.items()}

    # -- on the host -----------------------------------------------------------------------------------------------

    def meters(self) -> Mapping[str, Meter]:
        return {}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        return {"duration": len(output["wave"]) / (self.rate or 1)}

    def rendered(self, output: Mapping[str, np.ndarray], example: Example) -> Rendered:
        """The sound, made again from the bands of what was read of the recording."""
        return Rendered(".wav", "audio/wav", wav(output["wave"], self.rate or 0))

    def figures(self, evaluated: Evaluated) -> Iterator[Figure]:
        """Some recordings, each with what the vocoder makes of its bands: the nearest, the middle and the farthest."""
        found = evaluated.examples
        if {"recorded", "made", "mel_distance"} <= found.keys():
            order = np.argsort(found["mel_distance"], kind="stable")
            clips = [
                (f"{what}, {index}: {found['mel_distance'][n]:.2f}", found[what][n], self.rate or 0)
                for n in order[[0, len(order) // 2, -1]]
                for index in [int(found["index"][n])]
                for what in ("recorded", "made")
            ]
            yield Clips("Recordings and what is made of their mel bands", clips, "with the distance of their bands")


def _average(values: Iterable[jax.Array]) -> jax.Array:
    return jnp.mean(jnp.stack(list(values)), 0)


def _mean(x: jax.Array, rows: int | None = None) -> jax.Array:
    """f32[B] over all other axes; ``rows``: B, where the first axis is a multiple of it."""
    return jnp.mean(x.reshape(rows or len(x), -1), -1)


def _size(y_BFN: jax.Array) -> jax.Array:
    return jnp.sqrt(y_BFN.real**2 + y_BFN.imag**2 + 1e-7)


def _norm(x_BFN: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x_BFN**2, (1, 2)) + 1e-7)


@dataclasses.dataclass(frozen=True)
class Vocoder:
    """A trained vocoder: ``vocoder(mel_BFM) -> wave_BT``.

    Attributes:
      features: the bands that it reads.
    """

    features: LogMel
    _program: Any = dataclasses.field(repr=False)
    _variables: Variables = dataclasses.field(repr=False)

    def __call__(self, mel_BFM: np.ndarray) -> np.ndarray:
        """f32[B,F,M] natural logarithms -> f32[B, F * hop].

        Raises:
          UserError: the bands are not finite numbers, or others than it was trained on.
        """
        if mel_BFM.shape[-1] != self.features.mels:
            raise UserError(f"the vocoder reads {self.features.mels} mel bands, not {mel_BFM.shape[-1]}.")
        if not np.isfinite(mel_BFM).all():
            raise UserError("the mel bands have values that are no numbers; the model that gave them is broken.")
        frames = mel_BFM.shape[1]
        pad = ((0, 0), (0, -frames % _FRAMES), (0, 0))
        padded = np.pad(np.asarray(mel_BFM, np.float32), pad, constant_values=np.log(self.features.floor))
        return np.asarray(self._program(self._variables, padded))[:, : frames * self.features.hop]


@functools.lru_cache(4)
def open_vocoder(folder: str | os.PathLike[str]) -> Vocoder:
    """The vocoder of a run.

    Raises:
      UserError: there is no run with a checkpoint, or it is of something else.
    """
    task, variables = opened(folder)
    if not isinstance(task, Vocoding):
        raise UserError(f"{folder} holds a run of {type(task).__name__}, and no vocoder; see configs/vocoder.py.")
    variables = {"params": {"vocoder": variables["params"]["vocoder"]}}
    return Vocoder(task.features, jax.jit(task.vocoder), variables)
