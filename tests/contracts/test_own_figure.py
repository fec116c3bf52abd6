"""A task whose report shows its own figures: the pitch of tones, with what is heard, spectra and a ranked list.

Nothing of the package knows it: the file is a user's own, with its data, model and task.
"""

import dataclasses
import pathlib
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from bigbase_jax import build, verbs
from bigbase_jax.build import deferred, target
from bigbase_jax.core import Clips, Loss, Metric, Plot, Sum, Table
from bigbase_jax.data.pipeline import Data
from bigbase_jax.optim import Optimizer
from bigbase_jax.train import TrainConfig

RATE = 400


class Tones:
    """n tones of 64 samples, and their pitches in kHz."""

    labels = None

    def __init__(self, n, seed):
        self.pitch = np.random.default_rng(seed).uniform(0.02, 0.15, n).astype(np.float32)

    def __len__(self):
        return len(self.pitch)

    def name(self, index):
        return f"tone {index}"

    def __getitem__(self, index):
        wave_T = np.sin(2000 * np.pi * self.pitch[index] * np.arange(64) / RATE)
        return {"wave": wave_T.astype(np.float32), "pitch": self.pitch[index]}


@dataclasses.dataclass(frozen=True)
class AllTones:
    splits: ClassVar = {"train": Tones(32, 0), "test": Tones(12, 1)}
    dataset_info: ClassVar = {}
    description: ClassVar = "sines"

    def fingerprint(self):
        return "tones"


@dataclasses.dataclass(frozen=True)
class Pitch:
    """Hears how high a tone is."""

    model: nn.Module
    inputs: ClassVar = ("wave",)
    batch_coupled: ClassVar = False
    metrics: ClassVar = {"off": Metric("min", "cents", "Out of tune"), "loss": Metric("min")}

    def init(self, key, batch):
        return self.model.init(key, self._heard(batch))

    def _heard(self, batch):
        return jnp.abs(jnp.fft.rfft(batch["wave"]))

    def predict(self, variables, inputs):
        return {"said": self.model.apply(variables, self._heard(inputs))[:, 0]}

    def loss(self, variables, batch, key):
        error = (self.predict(variables, batch)["said"] - batch["pitch"]) ** 2
        return Loss({"loss": Sum(jnp.sum(batch["mask"] * error), jnp.sum(batch["mask"]))}), {}

    def evaluate(self, variables, batch):
        said = self.predict(variables, batch)["said"]
        off = 1200 * jnp.abs(jnp.log2(jnp.maximum(said, 1e-3) / batch["pitch"]))
        sums = {"off": Sum(jnp.sum(off * batch["mask"]), jnp.sum(batch["mask"]))}
        return {"said": said, "off": off, "pitch": batch["pitch"], "wave": batch["wave"]}, sums

    def meters(self):
        return {}

    def postprocess(self, output, example):
        return {"pitch": float(output["said"])}

    def figures(self, evaluated):
        x = evaluated.examples
        worst = np.argsort(-x["off"])[:3]
        yield Table(
            "Most out of tune", ("tone", "cents"), [(f"no. {x['index'][n]}", x["off"][n].item()) for n in worst]
        )
        yield Plot(
            "Said against sung", {"tones": (x["pitch"].tolist(), x["said"].tolist())}, "kHz", "kHz", diagonal=True
        )
        yield Clips("To be heard", [(f"said {x['said'][n]:.3f} kHz", x["wave"][n], RATE) for n in worst])


def config_of(rate, folder):
    config = ConfigDict({"seed": 0, "init_from": None})
    config.data = target(Data, dataset=target(AllTones), batch_size=8, workers=1, cache_dir=str(folder))
    config.task = target(Pitch, model=target(nn.Dense, features=1))
    config.optim = target(Optimizer, learning_rate=rate, algorithm=deferred(optax.sgd))
    config.train = target(TrainConfig, steps=4, log_every=2, devices=1)
    return config


def test_a_tasks_own_figures_are_in_the_report_and_in_the_comparison(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "_trusted", {__name__})
    runs = [str(tmp_path / name) for name in ("slow", "fast")]
    for rate, workdir in zip((1e-6, 1e-4), runs, strict=True):
        verbs.train(config_of(rate, tmp_path / "cache"), workdir)
    report = (tmp_path / "slow" / "report.html").read_text()
    found = verbs.compare(runs, str(tmp_path / "comparison"))
    page = pathlib.Path(found["comparison"]).read_text()
    for shown in ("Most out of tune", "Said against sung", "To be heard", "Out of tune"):
        assert shown in report and shown in page, shown
    assert report.count("data:audio/wav;base64,") == 3 and page.count("data:audio/wav;base64,") == 6
    assert "cents</small>" in report and 'class="ideal"' in report
    assert "less is better" in page and found["best"].keys() == {"off"}  # as the task says
    monkeypatch.setattr(build, "_trusted", set())
    monkeypatch.setattr(build, "_named", set())
    verbs.report(runs[0])  # by somebody who does not trust this file
    assert "To be heard" not in (tmp_path / "slow" / "report.html").read_text()
    assert "--trust=test_own_figure" in capsys.readouterr().err
