"""Forecasts of time series, as points or with intervals, by PatchTST, TiDE, DLinear, NLinear or the last season again.

python launch.py --config=configs/forecast.py                                series made up by the program
python launch.py --config=configs/forecast.py:root=FILE,horizon=24           a table with a column of times
python launch.py --config=configs/forecast.py:root=FILE,time=date,columns=OT+HULL,model=dlinear,quantiles=none
python launch.py --config=configs/forecast.py:root=FILE,known=temp+weather,holidays=holiday,calendar,model=tide
python launch.py --mode=predict --workdir=runs/forecast --input=FILE         the horizon after the end of the table

Rows of one time are averaged, gaps and irregular times are told, and the last 20 % of the steps are the test split. The
default answers deciles; the best possible MSE of the made-up load is 0.09 in its own units, since its noise is known.
On two cores of an AMD EPYC: see experiments/forecast for ETTh1, ETTh2 and hourly traffic.
"""

import optax
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.series import SyntheticSeries
from bigbase_jax.data.sources.table.series import SeriesFiles
from bigbase_jax.evaluators.backtest import Backtest
from bigbase_jax.models.forecast import DLinear, NLinear, PatchTST, SeasonalNaive, TiDE
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.forecasting import Forecasting
from bigbase_jax.train import TrainConfig

MODELS = {"patchtst": PatchTST, "tide": TiDE, "dlinear": DLinear, "nlinear": NLinear, "naive": SeasonalNaive}


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE_OR_DIR, time=COLUMN, series=COLUMN, columns=A+B, known=A+B, holidays=COLUMN_OR_FILE, calendar,
    history=336, horizon=96, step=1h, val=DATE, test=DATE, until=DATE, model=patchtst|tide|dlinear|nlinear|naive,
    quantiles=0.1+0.5+0.9|none, tiny.
    """
    args = parse_arg(
        arg,
        root=None,
        time=None,
        series=None,
        columns=None,
        known=None,
        holidays=None,
        calendar=False,
        history=336,
        horizon=96,
        step=None,
        val=None,
        test=None,
        until=None,
        model="patchtst",
        quantiles="0.1+0.2+0.3+0.4+0.5+0.6+0.7+0.8+0.9",
        tiny=False,
    )
    if args.model not in MODELS:
        raise UserError(f"there is no model={args.model}.{suggest(args.model, MODELS, 'model')}")
    try:
        quantiles = () if args.quantiles == "none" else tuple(map(float, args.quantiles.split("+")))
    except ValueError as error:
        raise UserError(f"quantiles={args.quantiles} holds no numbers; say 0.1+0.5+0.9, or none.") from error
    series = {
        "known": tuple(args.known.split("+")) if args.known else (() if args.root else ("event",)),
        "holidays": args.holidays,
        "use_calendar": args.calendar,
        "history": 48 if args.tiny else args.history,
        "horizon": min(args.horizon, 24) if args.tiny else args.horizon,
        "step": args.step,
        "val_from": args.val,
        "test_from": args.test,
        "until": args.until,
        "columns": tuple(args.columns.split("+")) if args.columns else (),
    }
    linear = args.model not in ("patchtst", "tide")

    config = ConfigDict()
    config.seed = 0
    config.data = target(
        Data,
        dataset=target(SeriesFiles, root=args.root, time=args.time, series=args.series, **series)
        if args.root
        else target(SyntheticSeries, **({"steps": 800} if args.tiny else {}), **series),
        batch_size=32 if linear or args.tiny else 128,
        eval_batch_size=256,
    )
    sizes = {"depth": 2 if args.tiny else 3} if args.model == "patchtst" else {}
    model = target(MODELS[args.model], outputs=len(quantiles) or 1, **sizes)
    config.task = target(Forecasting, model=model, quantiles=quantiles)
    config.optim = target(
        Optimizer,
        learning_rate=5e-3 if linear else 1e-3,
        algorithm=deferred(optax.adam),
        schedule=deferred(optax.cosine_decay_schedule)
        if args.model == "tide"
        else deferred(optax.exponential_decay, decay_rate=1e-3),  # halved ten times
    )
    config.evaluators = {"backtest": target(Backtest)}
    best = {"best_metric": "loss", "best_mode": "min"}
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, **best)
    else:
        config.train = target(TrainConfig, epochs=10.0, log_every=50, patience=5, **best)
    return config
