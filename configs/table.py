"""Classes or numbers from the rows of a table: risk scores, diagnoses, prices.

python launch.py --config=configs/table.py                                   scikit-learn's breast-cancer set, embedded
python launch.py --config=configs/table.py:root=FILE_OR_DIR,target=income    any csv, tsv, parquet; {train,test}.csv
python launch.py --config=configs/table.py:root=FILE,target=price,task=regression,loss=pinball    with an interval
python launch.py --config=configs/table.py:root=FILE,target=14,header=false                       columns by number
python launch.py --config=configs/table.py:root=FILE,target=y,drop=id+name,kinds=zip:category,by_time=day
python launch.py --config=configs/table.py:model=linear                      which others have to beat
python launch.py --mode=predict --workdir=runs/table --input=new.csv --output=answers.csv         of each row
python launch.py --config=configs/table.py:members=8                         an ensemble, trained side by side
python launch.py --config=configs/table.py:cost=5+1,calibration=isotonic,explain=true             decisions, and reasons
python launch.py --mode=predict --workdir=runs/table --input=new.csv --answers=risk,reasons       both in the answers

Files need the extra ``tables``. Measured on two cores of an AMD EPYC: UCI Adult's training file, split 60/20/20, test
AUC 0.927 in 12 core-seconds, 0.930 of eight members in 50; gradient boosting has 0.927 in 3 (docs/tables.md).
"""

import optax
from ml_collections import ConfigDict

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.table.table import BreastCancer, Table
from bigbase_jax.evaluators.attributions import Attributions
from bigbase_jax.evaluators.boosting import Boosting
from bigbase_jax.evaluators.importance import Importance
from bigbase_jax.evaluators.risk import Risk
from bigbase_jax.models.tabular import TabularLinear, TabularMLP
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.tabular import TabularClassification, TabularRegression, outputs_of
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.ensemble import Ensemble


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=FILE_OR_DIR, target=COLUMN, task=classification|regression, model=mlp|linear,
    embedding=plr|ple|none (of numbers), positive=CLASS (of two, the one that scores are of), weights=none|balanced,
    loss=squared|absolute|pinball (of a regression), drop=COLUMN+COLUMN, kinds=COLUMN:category|number|date|text+...,
    by_time=COLUMN or by_group=COLUMN (how rows are split), audit=COLUMN (between whose groups decisions are compared),
    header=false, names=COLUMN+COLUMN (where there is no header), encoding=gb18030, numbers=quantile|standard,
    members=8 (of an ensemble), batch=32 (where rows are few), epochs=20, tiny;
    peers=false (no gradient boosting beside the model in the report), explain=true (importance of columns, reasons of
    answers); of two classes, cost=5+1 (of missing the positive one, and of a false alarm) and
    calibration=temperature|isotonic|none: either brings a threshold, its cost and, of audit, a table of groups.
    """
    args = parse_arg(
        arg,
        root=None,
        target=None,
        task="classification",
        model="mlp",
        embedding="plr",
        positive=None,
        weights="none",
        loss="squared",
        drop=None,
        kinds=None,
        by_time=None,
        by_group=None,
        audit=None,
        header=True,
        names=None,
        encoding="utf-8",
        numbers="quantile",
        members=1,
        peers=True,
        explain=False,
        cost=None,
        calibration=None,
        batch=128,
        epochs=20.0,
        tiny=False,
    )
    for name, known in (
        ("task", ("classification", "regression")),
        ("model", ("mlp", "linear")),
        ("weights", ("none", "balanced")),
    ):
        if (value := getattr(args, name)) not in known:
            raise UserError(f"there is no {name}={value}.{suggest(value, known, name)}")
    regression = args.task == "regression"
    if regression and (args.cost or args.calibration):
        raise UserError("cost and calibration are of two classes; leave them out of a regression.")
    if args.root and not args.target:
        raise UserError("say which column is to be predicted: configs/table.py:root=...,target=NAME.")
    if regression and not args.root:
        raise UserError("the embedded set has classes; give a table with numbers: root=FILE,target=NAME.")

    columns = {name: tuple((getattr(args, name) or "").split("+")) for name in ("drop", "kinds")}
    rows = {
        **{name: names if names != ("",) else () for name, names in columns.items()},
        **{name: getattr(args, name) for name in ("by_time", "by_group", "audit", "numbers")},
        "regression": regression,
        "balanced": args.weights == "balanced",
    }
    if args.root:
        form = {"header": args.header, "encoding": args.encoding, "names": tuple((args.names or "").split("+"))}
        form["names"] = () if not args.names else form["names"]
        dataset = target(Table, root=args.root, target_name=args.target, positive=args.positive, **form, **rows)
    else:
        dataset = target(BreastCancer, **rows)

    outputs = {"num_classes": outputs_of(args.loss, TabularRegression.quantiles)} if regression else {}
    if args.model == "linear":
        model = target(TabularLinear, **outputs)
    elif args.tiny:
        model = target(
            TabularMLP, embedding=args.embedding, width=4, frequencies=4, hidden=(16, 16), dropout=0.0, **outputs
        )
    else:
        model = target(TabularMLP, embedding=args.embedding, **outputs)

    config = ConfigDict()
    config.seed = 0
    config.data = target(
        Data, dataset=dataset, batch_size=16 if args.tiny else args.batch if args.root else 32, eval_batch_size=1024
    )
    if regression:
        config.task = target(TabularRegression, model=model, loss_kind=args.loss)
    else:
        config.task = target(TabularClassification, model=model)
    if args.members > 1:
        config.task = target(Ensemble, task=config.task, members=args.members)
    config.optim = target(
        Optimizer,
        learning_rate=1e-2 if args.model == "linear" else 1e-3,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        weight_decay=0.0 if args.model == "linear" else 0.3,
        clip_norm=1.0,
    )
    config.evaluators = ConfigDict()
    if args.peers:
        config.evaluators.boosting = target(Boosting, trees=20 if args.tiny else 300)
    if args.explain:
        config.evaluators.update({"importance": target(Importance), "reasons": target(Attributions)})
    if args.cost or args.calibration or (args.audit and not regression):
        try:
            missed, alarm = map(float, (args.cost or "1+1").split("+"))
        except ValueError:
            raise UserError(f"cost={args.cost} reads MISSED+FALSE_ALARM, such as cost=5+1.") from None
        how = {"cost": ((0.0, alarm), (missed, 0.0)), "calibration": args.calibration or "temperature"}
        config.evaluators.risk = target(Risk, group="group" if args.audit else None, **how)
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, best_metric="loss", best_mode="min")
    else:
        config.train = target(
            TrainConfig, epochs=args.epochs, log_every=50, best_metric="loss", best_mode="min", patience=8
        )
    return config
