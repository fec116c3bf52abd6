"""Forecasting: measures against scikit-learn, what is not observed, answers in units, backtests and anomalies."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error

from bigbase_jax import parallel
from bigbase_jax.core import Evaluated, Plot, UserError
from bigbase_jax.data.columns import Column, Columns
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.series import SyntheticSeries
from bigbase_jax.evaluators.backtest import Backtest
from bigbase_jax.models.forecast import NLinear, SeasonalNaive
from bigbase_jax.tasks.forecasting import Forecasting

LEVELS = (0.1, 0.5, 0.9)
B, H, C = 5, 4, 2
RANDOM = np.random.default_rng(0)


class Given(nn.Module):
    """Says what it was given: the first steps of the history, and as many quantiles around it."""

    outputs: int = 1

    @nn.compact
    def __call__(self, history, covariates=None, train=False):
        shift = self.param("shift", nn.initializers.zeros, ())
        return history[:, :H, :, None] + shift + jnp.linspace(1, -1, self.outputs) * (self.outputs > 1)


def a_batch():
    future = RANDOM.normal(size=(B, H, C)).astype(np.float32)
    observed = RANDOM.random((B, H, C)) < 0.8
    mask = np.array([1, 1, 1, 1, 0], np.float32)
    history = RANDOM.normal(size=(B, 6, C)).astype(np.float32)
    return {"history": history, "future": future, "observed": observed, "mask": mask}


def kept(batch):
    return batch["observed"] & (batch["mask"] > 0)[:, None, None]


def test_points_are_measured_as_scikit_learn_measures_them_where_they_are_observed():
    task, batch = Forecasting(Given(), naive_error=(0.5, 2.0)), a_batch()
    variables = task.init(jax.random.key(0), batch)
    arrays, sums = task.evaluate(variables, batch)
    found, real = {name: float(x.mean()) for name, x in sums.items()}, kept(batch)
    y, truth = batch["history"][:, :H], batch["future"]
    assert found["mse"] == pytest.approx(mean_squared_error(truth[real], y[real]), rel=1e-5) == found["loss"]
    assert found["mae"] == pytest.approx(mean_absolute_error(truth[real], y[real]), rel=1e-5)
    assert found["mase"] == pytest.approx((np.abs(truth - y) / np.array([0.5, 2.0]))[real].mean(), rel=1e-5)
    (loss, _), gradient = jax.value_and_grad(
        lambda p: ((term := task.loss({"params": p}, batch, jax.random.key(1))[0].terms["loss"]).mean(), term),
        has_aux=True,
    )(variables["params"])
    assert float(loss) == pytest.approx(found["loss"], rel=1e-5)
    assert float(gradient["shift"]) == pytest.approx(2 * (y - truth)[real].mean(), rel=1e-4)
    hidden = {**batch, "future": np.where(batch["observed"], truth, 1e6).astype(np.float32)}
    np.testing.assert_array_equal(task.evaluate(variables, hidden)[1]["mse"].total, sums["mse"].total)

    meter = dataclasses.replace(task, channels=("a", "b"), std=(1.0, 10.0)).meters()["errors"]
    meter.update({name: np.asarray(x)[batch["mask"] > 0] for name, x in arrays.items()})
    rows = meter.result()["per_channel"]
    alone = real[..., 1]
    assert rows["b"]["mse"] == pytest.approx(mean_squared_error(truth[..., 1][alone], y[..., 1][alone]), rel=1e-5)
    assert rows["b"]["rmse_in_units"] == pytest.approx(10 * rows["b"]["mse"] ** 0.5)
    plot, table = task.figures(Evaluated("test", {"per_channel": rows}, {k: np.asarray(x) for k, x in arrays.items()}))
    assert isinstance(plot, Plot) and len(plot.series["MSE"][1]) == H and table.rows[1][0] == "b"


def test_quantiles_are_measured_by_pinball_loss_crps_and_coverage_and_do_not_cross():
    task, batch = Forecasting(Given(outputs=3), quantiles=LEVELS), a_batch()
    variables, real = task.init(jax.random.key(0), batch), kept(batch)
    found = {name: float(x.mean()) for name, x in task.evaluate(variables, batch)[1].items()}
    y = np.asarray(task.predict(variables, batch)["quantiles"])
    assert (np.diff(y, axis=-1) > 0).all()  # though the model says them the other way round
    pinball = [mean_pinball_loss(batch["future"][real], y[..., q][real], alpha=a) for q, a in enumerate(LEVELS)]
    assert found["loss"] == pytest.approx(np.mean(pinball), rel=1e-5)
    assert found["crps"] == pytest.approx(2 * np.mean(pinball), rel=1e-5)
    inside = (y[..., 0] <= batch["future"]) & (batch["future"] <= y[..., 2])
    assert found["coverage"] == pytest.approx(inside[real].mean(), rel=1e-5)
    assert found["interval_width"] == pytest.approx(2, rel=1e-5) and 0 < found["coverage"] < 1


def test_answers_are_in_the_units_of_the_data_with_their_times():
    task = Forecasting(Given(outputs=3), LEVELS, channels=("x", "y"), mean=(1e6, 0.0), std=(1.0, 2.0))
    output = {"forecast": np.ones((2, 2), np.float32), "quantiles": np.ones((2, 2, 3), np.float32) * [0, 1, 2]}
    rows = task.postprocess(output, {"times": np.array(["2024-01-01", "2024-01-02"])})["forecast"]
    assert rows[1] == {"time": "2024-01-02", "x": 1e6 + 1, "y": 2.0} | {
        f"{name}_{q}": value for q, (x, y) in {10: (1e6, 0), 50: (1e6 + 1, 2), 90: (1e6 + 2, 4)}.items()
        for name, value in (("x", x), ("y", y))
    }  # fmt: skip


def longer():
    task, batch = Forecasting(NLinear(horizon=H + 1)), jax.tree.map(jnp.asarray, a_batch())
    return task.loss(task.init(jax.random.key(0), {"history": batch["history"]}), batch, jax.random.key(1))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Forecasting(Given(), quantiles=(0.1, 0.9)), "holds 0.5"),
        (lambda: Forecasting(Given(), quantiles=(0.5, 0.1)), "rises"),
        (lambda: Forecasting(Given(), loss_kind="cubic"), "squared"),
        (lambda: Forecasting(Given(), quantiles=LEVELS).init(jax.random.key(0), a_batch()), "outputs"),
        (longer, "forecasts 5 steps"),
    ],
)
def test_mistakes_are_one_sentence(make, said):
    with pytest.raises(UserError, match=said):
        make()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spiked(SyntheticSeries):
    """With one value of the test split that nobody could expect."""

    at: int = 700

    def read(self, cache, limit_bytes, say):
        table = super().read(cache, limit_bytes, say)
        load = table["load"].values.copy()
        load[self.at] += 40
        return Columns([Column("load", "number", load), *(table[name] for name in ("time", "temperature"))], table.rows)


def test_a_backtest_beside_the_last_season_finds_the_anomaly_and_no_skill_where_there_is_none():
    dataset = Spiked(steps=900, history=48, horizon=24)
    data = Data(dataset, 16).prepare(lambda line: None)
    info = data.dataset_info
    task = Forecasting(SeasonalNaive(horizon=24, season=info["season"]), channels=tuple(info["channels"]))
    found = Backtest(origins=30, season=info["season"], channels=task.channels).run(
        task, {}, data, parallel.make_mesh(1)
    )
    assert found.metrics["skill"] == pytest.approx(0) and found.metrics["origins_won"] == 0
    assert found.metrics["mae"] > 0 and len(found.examples["origin"]) == 30
    figures = list(Backtest(channels=task.channels).figures(found))
    origin, ahead, channel, *_ = figures[-1].rows[0]
    time = np.datetime64(origin, "h") + ahead - 1
    spike = dataset.read(pathlib.Path(), 0, print)["time"].values[dataset.at].astype("M8[h]")
    assert channel == "load" and time in (spike, spike + 24)  # or the day after, which repeats it
    assert {"history", "truth", "forecast"} == set(figures[0].series)
