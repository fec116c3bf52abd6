"""What a sweep file says: the space of the recipe's keys, the objective, the budget. Nothing here needs Optuna.

    from bigbase_jax.sweep import Sweep, choice, log_uniform, uniform

    def sweep() -> Sweep:
        return Sweep(
            metric="accuracy",
            space={"optim.learning_rate": log_uniform(1e-4, 1e-1), "optim.weight_decay": choice(0.0, 1e-4)},
            trials=20,
            pruner="asha",
        )

The keys are those of ``--config.KEY=VALUE``. One line lists settings: ``Sweep(metric="loss", fixed=[{...}, {...}])``.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import pathlib
import runpy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import build, suggest
from bigbase_jax.core import Metric, UserError

SAMPLERS = ("grid", "random", "tpe", "cmaes")
PRUNERS = ("median", "asha", "hyperband")
OBJECTIVES = ("mean", "bound")
_WHERE = " where "  # between a key and the choice that gives it this domain
SETTING = "setting"
"""The name under which Optuna knows the place in a ``fixed`` list."""
_PLAIN = (bool, int, float, str, type(None))


# ------------------------------------------------------------------------------------------------------------- domains


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Numbers from ``low`` to ``high``, both included; see ``uniform``, ``log_uniform`` and ``integer``."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        name = "integer" if self.whole else "log_uniform" if self.log else "uniform"
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise UserError(f"{name}({self.low}, {self.high}): the first number must not exceed the second.")
        if self.log and self.low <= 0:
            raise UserError(f"{name}({self.low}, {self.high}): a logarithmic scale has no place for 0 or less.")
        if self.step is not None and self.step <= 0:
            raise UserError(f"{name}({self.low}, {self.high}, step={self.step}): the step must be above 0.")

    def ask(self, trial: Any, name: str) -> Any:
        """The value for Optuna's ``trial``, and its label (which is the same)."""
        if self.whole:
            value = trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        else:
            value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return value, value

    def examples(self) -> list[tuple[Any, Any]]:
        """(value, label) of the ends, to try whether they fit the recipe."""
        kind = int if self.whole else float
        return [(kind(end), kind(end)) for end in dict.fromkeys((self.low, self.high))]

    def labels(self) -> tuple[Any, ...]:
        """What tells the domain from others."""
        return (self.low,) if self.low == self.high else (self.low, self.high, self.step, self.log, self.whole)

    def points(self) -> list[tuple[Any, Any]] | None:
        """(value, label) of everything in it; None: too many."""
        if self.log or (self.step is None and not self.whole):
            return self.examples() if self.low == self.high else None
        step = self.step or 1
        values = [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]
        return [(int(value), int(value)) if self.whole else (value, value) for value in values]


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of several values, each under a label that Optuna can store; see ``choice``."""

    options: tuple[tuple[Any, Any], ...]  # (label, value)

    def ask(self, trial: Any, name: str) -> Any:
        """The value for Optuna's ``trial``, and its label."""
        label = trial.suggest_categorical(name, tuple(label for label, _ in self.options))
        return self.value(label), label

    def value(self, label: Any) -> Any:
        """What a label stands for."""
        return next(value for known, value in self.options if known == label and type(known) is type(label))

    def examples(self) -> list[tuple[Any, Any]]:
        """(value, label) of everything in it."""
        return [(value, label) for label, value in self.options]

    points = examples

    def labels(self) -> tuple[Any, ...]:
        """What tells the domain from others, as Optuna sees it."""
        return tuple(label for label, _ in self.options)


Domain = Numbers | Choice
Space = Mapping[str, Domain]


def uniform(low: float, high: float, step: float | None = None) -> Numbers:
    """Floats from ``low`` to ``high``, in steps if one is given."""
    return Numbers(low, high, step)


def log_uniform(low: float, high: float) -> Numbers:
    """Floats from ``low`` to ``high``, alike many in each power of ten."""
    return Numbers(low, high, log=True)


def integer(low: int, high: int, step: int = 1, log: bool = False) -> Numbers:
    """Whole numbers from ``low`` to ``high``."""
    return Numbers(low, high, None if log else step, log, whole=True)


def choice(*values: Any, **named: Any) -> Choice:
    """One of these values. What is not a plain value (a list, a ``target(...)`` node) is given a name:
    ``choice(sgd=deferred(optax.sgd), adamw=deferred(optax.adamw))``."""
    options: list[tuple[Any, Any]] = []
    for value in values:
        if isinstance(value, (list, tuple)) and all(isinstance(item, _PLAIN) for item in value):
            options.append((str(value), value))
        elif isinstance(value, _PLAIN):
            options.append((value, value))
        else:
            raise UserError(f"choice(...) needs a name for {str(value)[:60]!r}: choice(this=..., that=...).")
    options += named.items()
    if not options:
        raise UserError("choice() has nothing to choose from.")
    labels = [(type(label), label) for label, _ in options]
    if len(set(labels)) < len(labels):
        raise UserError(f"choice(...) has the same value twice: {', '.join(str(label) for _, label in labels)}.")
    return Choice(tuple(options))


# --------------------------------------------------------------------------------------------------------------- sweeps


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What to try, by what to judge it, and how often.

    Attributes:
      metric: of the evaluations on the validation split, or ``NAME/METRIC`` of ``config.evaluators.NAME``. A trial's
        value is its best one where the recipe keeps the best checkpoint by this metric (``config.train.best_metric``),
        otherwise its last.
      mode: "max" or "min"; None: what the task, or the evaluator, says of the metric (``core.Metric.better``), else
        "max".
      space: key of the config -> domain.
      conditional: key -> label of its choice -> further keys that exist only then; another label may give the same key
        another domain.
      suggest: instead of a space, a function of Optuna's trial that returns the overrides by key: for spaces that no
        table describes.
      fixed: instead of a space, the overrides of each trial, in order.
      trials: how many settings to try; None: all, where they are a grid or fixed. A later start may raise it.
      sampler: "grid", "random", "tpe" (Bergstra et al. 2011), "cmaes" (Hansen & Ostermeier 2001), or a function of a
        seed that gives any sampler of Optuna.
      pruner: None, "median" (Golovin et al. 2017), "asha" (Li et al. 2018), "hyperband" (Li et al. 2017), or any pruner
        of Optuna. It stops trials that do poorly, at their evaluations: the n-th of one is compared with the n-th of
        the others. Of several seeds it judges the first.
      seeds: runs of each setting, with ``seed_keys`` counted up from the recipe's.
      seed_keys: which keys a further seed changes.
      objective: of several seeds, their "mean", or the "bound" of its 95 % confidence interval on the poor side.
      seed: of the sampler; the same seed draws the same settings as long as trials end in the same order.

    Raises:
      UserError: words that do not exist or do not fit together.
    """

    metric: str
    mode: str | None = None
    space: Space = dataclasses.field(default_factory=dict)
    conditional: Mapping[str, Mapping[Any, Space]] = dataclasses.field(default_factory=dict)
    suggest: Callable[[Any], Mapping[str, Any]] | None = None
    fixed: Sequence[Mapping[str, Any]] = ()
    trials: int | None = None
    sampler: str | Callable[[int], Any] = "tpe"
    pruner: str | Any | None = None
    seeds: int = 1
    seed_keys: tuple[str, ...] = ("seed",)
    objective: str = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min", None):
            raise UserError(f"the sweep's mode is {self.mode!r}; it is 'max' or 'min'.")
        for name, known in (("sampler", SAMPLERS), ("pruner", PRUNERS), ("objective", OBJECTIVES)):
            word = getattr(self, name)
            if isinstance(word, str) and word not in known:
                raise UserError(f"there is no {name} {word!r}.{suggest(word, known, name)}")
        if sum(map(bool, (self.space, self.suggest, self.fixed))) != 1:
            raise UserError("a sweep has exactly one of space={...}, suggest=function and fixed=[...].")
        if self.conditional and not self.space:
            raise UserError("the sweep's conditional={...} belongs to a space={...}.")
        for key, domain in self.domains():
            if not isinstance(domain, (Numbers, Choice)):
                raise UserError(
                    f"the sweep's {key!r} is {domain!r}; it is uniform(...), choice(...) or another domain."
                )
        for key, branches in self.conditional.items():
            domain = dict(self.domains()).get(key)
            if not isinstance(domain, Choice):
                raise UserError(f"the sweep's conditional names {key!r}, which is no choice(...) of its space.")
            labels = [str(label) for label, _ in domain.options]
            for label in branches:
                if str(label) not in labels:
                    nearest = suggest(str(label), labels, "choice")
                    raise UserError(f"the sweep's {key!r} has no choice {label!r}.{nearest}")
        for name in ("trials", "seeds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"the sweep's {name} is {getattr(self, name)}; it must be at least 1.")
        if self.objective == "bound" and self.seeds == 1:
            raise UserError("objective='bound' needs several seeds: a single run has no confidence interval.")
        if self.trials is None and not self.fixed and self.sampler != "grid":
            raise UserError("the sweep needs its budget: trials=N.")
        if self.sampler == "grid" and not self.fixed:
            if self.suggest:
                raise UserError("a grid needs space={...}: what a function suggests cannot be listed.")
            for key, domain in self.domains():
                if domain.points() is None:
                    raise UserError(f"a grid cannot list {key!r}; use choice(), integer() or uniform(..., step=...).")

    def domains(self) -> Iterator[tuple[str, Any]]:
        """Every (key, domain), conditional ones too."""
        yield from self.space.items()
        for branches in self.conditional.values():
            for branch in branches.values():
                yield from branch.items()

    def fixes(self, key: str) -> bool:
        """Whether nothing is chosen for a key: all trials that have it give it the same label, or the same value where
        they are listed."""
        if self.fixed:
            values = [json.dumps(plain(some[key]), sort_keys=True, default=str) for some in self.fixed if key in some]
            return len(self.fixed) > 1 and len(values) == len(self.fixed) and len(set(values)) == 1
        labels = {label for known, domain in self.domains() if known == key for label in domain.labels()}
        return len(labels) == 1

    def listed(self) -> list[dict[str, Any]] | None:
        """The label of each name for every trial, where these are listed in advance: a grid, a fixed list."""
        if self.fixed:
            return [{SETTING: i} for i in range(len(self.fixed))]
        return list(self._grid(dict(self.space))) if self.sampler == "grid" else None

    def _grid(self, space: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """All assignments; a choice that opens further keys is multiplied with those only."""
        if not space:
            yield {}
            return
        key, *rest = space
        for _, label in space[key].points():
            inner = {**{k: space[k] for k in rest}, **self._branch(key_of(key), label)}
            for others in self._grid(inner):
                yield {key: label, **others}

    def _branch(self, key: str, label: Any) -> Space:
        """What a label of ``key`` opens, by the name under which Optuna knows it: the key, unless another branch has
        another domain for the same key, which Optuna takes for a change of mind."""
        branches = self.conditional.get(key, {})
        branch = next((branch for known, branch in branches.items() if str(known) == str(label)), {})
        alike = {inner: len({d.labels() for k, d in self.domains() if k == inner}) == 1 for inner in branch}
        return {k if alike[k] else f"{k}{_WHERE}{key}={label}": domain for k, domain in branch.items()}

    def count(self) -> int:
        """How many settings are tried."""
        listed = self.listed()
        if listed is None:
            assert self.trials is not None
            return self.trials
        return min(len(listed), self.trials or len(listed))

    def overrides(self, trial: Any) -> dict[str, Any]:
        """Key of the config -> value, for Optuna's ``trial``."""
        if self.fixed:
            return dict(self.fixed[trial.suggest_categorical(SETTING, tuple(range(len(self.fixed))))])
        if self.suggest:
            return dict(self.suggest(trial))
        found: dict[str, Any] = {}
        queue = [dict(self.space)]
        while queue:
            for name, domain in queue.pop(0).items():
                key = key_of(name)
                found[key], label = domain.ask(trial, name)
                queue.append(dict(self._branch(key, label)))
        return found

    def examples(self) -> Iterator[dict[str, Any]]:
        """Overrides that together name every key and, of a space, the ends and choices of every domain."""
        yield from (dict(overrides) for overrides in self.fixed)
        if self.space:
            for key, domain in self.space.items():
                others = {k: d.examples()[0][0] for k, d in self.space.items() if k != key}
                yield from ({**others, **some} for some in self._examples(key, domain))

    def _examples(self, name: str, domain: Domain) -> Iterator[dict[str, Any]]:
        key = key_of(name)
        for value, label in domain.examples():
            yield {key: value}
            for inner, inner_domain in self._branch(key, label).items():
                for some in self._examples(inner, inner_domain):
                    yield {key: value, **some}

    def definition(self) -> dict[str, Any]:
        """What two starts of a sweep must agree on, as plain data; the budget is not part of it."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "trials"}
        found["suggest"] = getattr(self.suggest, "__qualname__", None)
        for name in ("sampler", "pruner"):
            if not isinstance(found[name], (str, type(None))):
                found[name] = getattr(found[name], "__qualname__", type(found[name]).__qualname__)
        return json.loads(json.dumps(plain(found), default=str))


def key_of(name: str) -> str:
    """The key of the config that Optuna's ``name`` is a value for."""
    return name.partition(_WHERE)[0]


def plain(value: Any) -> Any:
    """Config values as JSON can hold them."""
    if isinstance(value, ConfigDict):
        return json.loads(value.to_json_best_effort())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def load(path: str) -> Sweep:
    """The sweep that a file declares.

    Raises:
      UserError: there is no such file, or it does not hold ``def sweep() -> Sweep``.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        others = [str(p) for p in (*file.parent.glob("*.py"), *pathlib.Path("experiments").glob("*/sweep*.py"))]
        raise UserError(f"there is no sweep file {path!r}.{suggest(path, others, 'sweep file')}")
    found = runpy.run_path(str(file)).get("sweep")
    if not callable(found):
        raise UserError(f"{path} holds no function sweep(); it must read: def sweep() -> Sweep: return Sweep(...).")
    declared = found()
    if not isinstance(declared, Sweep):
        raise UserError(f"sweep() in {path} returns {type(declared).__name__}, not a bigbase_jax.sweep.Sweep.")
    return declared


def override(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of ``config`` with ``values`` at their dotted keys, outer ones first.

    Raises:
      UserError: a key that the config does not have (with the nearest one), or a value of another type.
    """
    changed = ConfigDict(copy.deepcopy(config))
    for name, value in sorted(values.items(), key=lambda item: item[0].count(".")):
        *parents, last = name.removeprefix("config.").split(".")
        node: Any = changed
        for depth, key in enumerate([*parents, last]):
            where = ".".join(["config", *parents[:depth]])
            if not isinstance(node, ConfigDict):
                raise UserError(f"the sweep's key {name!r} does not fit: {where} is {node!r}, which has no keys.")
            if key not in node:
                nearest = suggest(key, node, "key")
                raise UserError(f"the sweep's key {name!r} does not fit: {where} has no {key!r}.{nearest}")
            if depth < len(parents):
                node = node[key]
        try:
            node[last] = copy.deepcopy(value)
        except (TypeError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            raise UserError(f"the sweep's {name!r} cannot be {value!r}: {said}") from error
    return changed


def check(sweep: Sweep, config: ConfigDict, drawn: Sequence[Mapping[str, Any]] = ()) -> None:
    """Tries every key and the ends of every domain on the recipe, and ``drawn`` overrides too.

    Raises:
      UserError: whatever ``override`` refuses.
    """
    for overrides in itertools.chain(sweep.examples(), drawn):
        override(config, overrides)
    seeds(sweep, config, 0)


def judged(sweep: Sweep, config: ConfigDict) -> Sweep:
    """The sweep with its ``mode``, which the recipe's task or evaluator knows where the file does not say it.

    Raises:
      UserError: it says that neither more nor less of the metric is better.
    """
    if sweep.mode is not None:
        return sweep
    evaluator, _, name = sweep.metric.rpartition("/")
    node = config.get("evaluators", {}).get(evaluator, {}) if evaluator else config.get("task", {})
    declared: Mapping[str, Metric] = {}
    with contextlib.suppress(UserError):  # what needs to know its data; a trial says so
        declared = getattr(build(node), "metrics", {})
    metric = declared.get(name, Metric("max"))
    if metric.better is None:
        raise UserError(f"neither more nor less {sweep.metric} is better; give the sweep mode='max' or mode='min'.")
    return dataclasses.replace(sweep, mode=metric.better)


def refuse_of_the_model(sweep: Sweep, free: Sequence[str], drawn: Sequence[Mapping[str, Any]] = ()) -> None:
    """For a recipe that begins from trained weights, which say what the model is, but for the words in ``free``.

    Raises:
      UserError: the sweep wants to try another model.
    """
    for key in itertools.chain(*sweep.examples(), *drawn):
        parts = key.removeprefix("config.").split(".")
        if parts[0] == "task" and "model" in parts and parts[-1] not in free:
            raise UserError(
                f"the sweep varies {key}, which config.init_from decides; leave out one of them, or vary "
                f"{', '.join(free[:-1])} or {free[-1]}."
            )


def seeds(sweep: Sweep, config: ConfigDict, index: int) -> ConfigDict:
    """The config of the ``index``-th seed of a setting.

    Raises:
      UserError: a ``seed_keys`` entry that is no whole number of the config.
    """
    values = {}
    for key in sweep.seed_keys:
        node: Any = override(config, {key: 0})  # names a misspelt key
        node = config
        for part in key.removeprefix("config.").split("."):
            node = node[part]
        values[key] = int(node) + index
    return override(config, values)
