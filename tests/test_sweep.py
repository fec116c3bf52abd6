"""Sweeps: what a file may say, who runs which trial, what becomes of failures; kills, races and a full disk."""

import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import resource
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import optax
import optuna
import pytest
from optuna.trial import TrialState
from scipy import stats
from waiting import until

from bigbase_jax.build import deferred, target
from bigbase_jax.core import Metric, UserError
from bigbase_jax.runtime.log import Diverged
from bigbase_jax.runtime.rundir import InUse
from bigbase_jax.sweep import Sweep, choice, command, integer, log_uniform, space, uniform, worker
from bigbase_jax.sweep import study as studies
from bigbase_jax.sweep.study import Stop, Study
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.wrappers.frozen import Frozen

ROOT = pathlib.Path(__file__).parents[1]
FORK = multiprocessing.get_context("fork")  # the children here compute nothing with JAX
"""Tests that use it count as slow ones: a process in which others have left threads is not to be forked."""


def recipe():
    spec = importlib.util.spec_from_file_location("catdog_mlp", ROOT / "configs" / "catdog_mlp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config("tiny")


CONFIG = recipe()
RATES = {"optim.learning_rate": log_uniform(1e-3, 10.0)}


def quality(config, step):
    """Best at a rate of 0.1, better with each evaluation, and a little by seed."""
    return 1 - abs(math.log10(config.optim.learning_rate) + 1) / 4 + 0.01 * step + 0.001 * (config.seed % 7)


class Fake:
    """In place of training: four evaluations, one file a step to go on from, and a line for each step it did."""

    def __init__(self, pause=0.0, fail=None, steps=4):
        self.pause, self.fail, self.steps = pause, fail or {}, steps

    def __call__(self, config, folder, name, observe):
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        done = sum(1 for _ in (folder / "checkpoints").glob("*"))
        if (folder / "metrics.jsonl").exists():  # as the log does: what came after the checkpoint is done again
            rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
            (folder / "metrics.jsonl").write_text("".join(rows[:done]))
        for step in range(done + 1, self.steps + 1):
            time.sleep(self.pause)
            error = self.fail.get(name.rpartition("-")[2])
            if error is not None:
                raise error
            row = {"step": step, "kind": "eval", "split": "val", "accuracy": quality(config, step), "loss": 1.0}
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            with open(folder / "did", "a") as file:
                file.write(f"{step} by {os.getpid()}\n")
            reason = observe(step, row)
            (folder / "checkpoints" / str(step)).mkdir(parents=True)
            if reason:
                return {"step": step, "stopped": reason}
        return {"step": self.steps, "split": "test"}


def did(study):
    """The steps that each trial's folder did, in order."""
    return {
        path.parent.name: [int(line.split()[0]) for line in path.read_text().splitlines()]
        for path in sorted(study.folder.rglob("did"))
    }


def swept(folder, sweep, execute=None, **kwargs):
    """A study after one worker has run it."""
    study = Study(sweep, CONFIG, folder, **kwargs)
    assert worker.work(study, CONFIG, execute or Fake()) == 0
    return study


@pytest.fixture(autouse=True)
def no_collection(monkeypatch):
    """Half a second a trial, where a test has loaded JAX."""
    monkeypatch.setattr(worker.gc, "collect", lambda: 0)


# ----------------------------------------------------------------------------------------------------- what is declared


def test_a_grid_multiplies_choices_and_opens_conditional_keys_only_where_they_exist():
    sweep = Sweep(
        metric="accuracy",
        sampler="grid",
        space={"optim.algorithm": choice(sgd=deferred(optax.sgd), adam=deferred(optax.adam)), "seed": integer(1, 2)},
        conditional={"optim.algorithm": {"adam": {"optim.weight_decay": choice(0.0, 0.1)}}},
    )
    assert sweep.listed() == [
        {"optim.algorithm": "sgd", "seed": 1},
        {"optim.algorithm": "sgd", "seed": 2},
        *(
            {"optim.algorithm": "adam", "seed": seed, "optim.weight_decay": decay}
            for seed in (1, 2)
            for decay in (0.0, 0.1)
        ),
    ]
    assert sweep.count() == 6
    space.check(sweep, CONFIG)
    assert uniform(0.0, 0.3, step=0.1).points()[-1][0] == pytest.approx(0.3)


def test_overrides_reach_the_config_and_leave_the_recipe_alone():
    before = CONFIG.to_json_best_effort()
    changed = space.override(
        CONFIG,
        {"task.model.hidden": (8, 4), "optim.algorithm": deferred(optax.adamw, b1=0.5), "optim.algorithm.b1": 0.8},
    )
    assert changed.task.model.hidden == (8, 4)
    assert changed.optim.algorithm.b1 == 0.8 and changed.optim.algorithm.target == "optax:adamw"
    assert CONFIG.to_json_best_effort() == before


@pytest.mark.parametrize(
    ("declare", "sentence"),
    [
        (
            lambda: Sweep("accuracy", space={"optim.learning_rat": uniform(0, 1)}, trials=1),
            "Did you mean 'learning_rate'?",
        ),
        (lambda: Sweep("accuracy", fixed=[{}, {"optm.learning_rate": 1}]), "Did you mean 'optim'?"),
        (lambda: Sweep("accuracy", suggest=lambda t: {"tsk.x": t.suggest_int("a", 0, 1)}, trials=1), "'tsk'"),
        (lambda: Sweep("accuracy", space={"optim.learning_rate.x": choice(1)}, trials=1), "which has no keys"),
        (lambda: Sweep("accuracy", space={"optim.learning_rate": choice("fast")}, trials=1), "cannot be 'fast'"),
        (
            lambda: Sweep(
                "accuracy",
                space={"task.loss_kind": choice("softmax", "squared")},
                conditional={"task.loss_kind": {"softmax": {"task.label_smoothin": uniform(0, 0.1)}}},
                trials=1,
            ),
            "Did you mean 'label_smoothing'?",
        ),
        (
            lambda: Sweep("accuracy", space={"a": choice("x")}, conditional={"a": {"y": {}}}, trials=1),
            "has no choice 'y'",
        ),
        (lambda: Sweep("accuracy", space=RATES, trials=1, seeds=2, seed_keys=("sed",)), "Did you mean 'seed'?"),
        (lambda: Sweep("accuracy", space=RATES, trials=1, sampler="tpee"), "Did you mean 'tpe'?"),
        (lambda: Sweep("accuracy", space=RATES, trials=1, pruner="ascha"), "Did you mean 'asha'?"),
        (lambda: Sweep("accuracy", space=RATES, sampler="grid"), "a grid cannot list 'optim.learning_rate'"),
        (lambda: Sweep("accuracy", space=RATES), "trials=N"),
        (lambda: Sweep("accuracy", space=RATES, fixed=[{}], trials=1), "exactly one of"),
        (lambda: Sweep("accuracy", space=RATES, trials=1, objective="bound"), "needs several seeds"),
        (lambda: Sweep("accuracy", space={"optim.learning_rate": log_uniform(0, 1)}, trials=1), "logarithmic"),
        (lambda: choice(deferred(optax.sgd)), "needs a name"),
    ],
)
def test_mistakes_in_a_sweep_are_one_sentence(declare, sentence):
    with pytest.raises(UserError) as caught:
        sweep = declare()
        space.check(sweep, CONFIG, studies.drawn(sweep))
    assert sentence in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_sweep_files(tmp_path):
    (tmp_path / "sweep.py").write_text(
        "from bigbase_jax.sweep import Sweep\ndef sweep(): return Sweep(metric='loss', fixed=[{}])\n"
    )
    assert space.load(str(tmp_path / "sweep.py")).fixed == [{}]
    (tmp_path / "other.py").write_text("def sweep(): return 3\n")
    (tmp_path / "none.py").write_text("x = 3\n")
    for name, sentence in (("other", "returns int"), ("none", "holds no function"), ("swep", "sweep.py'?")):
        with pytest.raises(UserError, match=sentence):
            space.load(str(tmp_path / f"{name}.py"))
    assert command.default_folder("experiments/a_study/sweep.py") == "runs/a_study"
    assert command.default_folder("experiments/a_study/random.py") == "runs/a_study-random"


# ------------------------------------------------------------------------------------------------------------ searching


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", lambda seed: optuna.samplers.QMCSampler(seed=seed)])
def test_samplers_draw_the_same_settings_again_and_find_good_ones(tmp_path, sampler):
    two = {**RATES, "optim.weight_decay": uniform(0.0, 1.0)}
    sweep = Sweep("accuracy", space=two, trials=16, sampler=sampler)
    a, b = swept(tmp_path / "a", sweep), swept(tmp_path / "b", sweep)
    settings = [trial.params for trial in a.trials()]
    assert settings == [trial.params for trial in b.trials()]
    assert len({json.dumps(s) for s in settings}) == 16
    assert all(1e-3 <= s["optim.learning_rate"] <= 10 for s in settings)
    for trial in a.trials():
        config = json.loads((a.path(trial.number) / "metrics.jsonl").read_text().splitlines()[-1])
        assert trial.state == TrialState.COMPLETE and trial.value == config["accuracy"]
    assert command._best(a.sweep, a.trials()).value > 0.95


def test_tpe_learns_from_the_trials_before(tmp_path):
    sweep = Sweep("accuracy", space=RATES, trials=40)
    values = [trial.value for trial in swept(tmp_path / "s", sweep).trials()]
    assert statistics.fmean(values[20:]) > statistics.fmean(values[:10]) + 0.1


def test_a_function_may_suggest_what_no_table_describes(tmp_path):
    def suggest(trial):
        depth = trial.suggest_int("depth", 1, 3)
        return {"task.model.hidden": tuple(trial.suggest_int(f"width {i}", 2, 8) for i in range(depth))}

    study = swept(tmp_path / "s", Sweep("accuracy", suggest=suggest, trials=6))
    for trial in study.trials():
        assert len(trial.user_attrs["overrides"]["task.model.hidden"]) == trial.params["depth"]


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband", optuna.pruners.ThresholdPruner(lower=0.8)])
def test_pruners_stop_what_is_behind_and_spare_what_is_ahead(tmp_path, pruner):
    rates = [0.1] * 4 + [1e-3, 10.0] * 4 + [0.1]
    sweep = Sweep("accuracy", fixed=[{"optim.learning_rate": rate} for rate in rates], pruner=pruner)
    trials = swept(tmp_path / "s", sweep, Fake(steps=9)).trials()
    poor = [trial for trial in trials if trial.user_attrs["overrides"]["optim.learning_rate"] != 0.1]
    pruned = [trial for trial in poor if trial.state == TrialState.PRUNED]
    assert len(pruned) >= len(poor) / 2
    assert all(len(trial.intermediate_values) < 9 and "is behind" in trial.user_attrs["reason"] for trial in pruned)
    assert trials[0].state == TrialState.COMPLETE and list(trials[0].intermediate_values) == list(range(1, 10))


def test_the_value_is_the_best_where_the_run_keeps_its_best_and_else_the_last(tmp_path):
    rows = [{"step": i, "kind": "eval", "split": "val", "accuracy": v} for i, v in enumerate((0.5, 0.9, 0.7), 1)]
    rows += [{"step": 3, "kind": "eval", "split": "test", "accuracy": 1.0}, {"step": 3, "kind": "train"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sweep = Sweep("accuracy", mode="max", fixed=[{}])
    assert worker.outcome(tmp_path, sweep, CONFIG) == 0.9  # the recipe has best_metric="accuracy"
    other = space.override(CONFIG, {"train.best_metric": "loss"})
    assert worker.outcome(tmp_path, sweep, other) == 0.7
    with pytest.raises(Stop, match="nothing measures rank/mrr while a trial trains"):
        worker.outcome(tmp_path, Sweep("rank/mrr", fixed=[{}]), CONFIG)
    row = {"step": 3, "kind": "eval", "split": "rank", "mrr": 0.3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert worker.outcome(tmp_path, Sweep("rank/mrr", fixed=[{}]), CONFIG) == 0.3


@pytest.mark.parametrize(
    ("metric", "given", "mode"), [("loss", None, "min"), ("loss", "max", "max"), ("f", None, "max")]
)
def test_the_task_says_whether_more_of_a_metric_is_better(tmp_path, metric, given, mode):
    sweep = Sweep(metric, mode=given, fixed=[{}])
    wrapped = CONFIG.copy_and_resolve_references()
    wrapped.task = target(Frozen, task=CONFIG.task, trainable="head")
    evaluated = CONFIG.copy_and_resolve_references()
    evaluated.evaluators = {"again": CONFIG.task}
    judged = space.judged(dataclasses.replace(sweep, metric=f"again/{metric}"), evaluated)
    assert judged.mode == mode
    for name, config in (("a", CONFIG), ("b", wrapped)):
        study = Study(sweep, config, tmp_path / name)
        assert study.sweep.mode == mode and study.optuna.direction.name.lower().startswith(mode)
        assert study.optuna.user_attrs["sweep"]["mode"] == mode


def test_of_a_metric_that_is_neither_good_nor_bad_the_mode_is_asked_for(monkeypatch):
    monkeypatch.setattr(Classification, "metrics", {"positives": Metric(None)})
    with pytest.raises(UserError, match="neither more nor less positives is better; give the sweep mode='max'"):
        space.judged(Sweep("positives", fixed=[{}]), CONFIG)


# -------------------------------------------------------------------------------------------------------- several seeds


@pytest.mark.parametrize("objective", ["mean", "bound"])
def test_several_seeds_give_mean_deviation_and_interval(tmp_path, objective):
    sweep = Sweep("accuracy", fixed=[{"optim.learning_rate": r} for r in (0.1, 1.0)], seeds=3, objective=objective)
    study = swept(tmp_path / "s", sweep)
    for trial, rate in zip(study.trials(), (0.1, 1.0), strict=True):
        config = space.override(CONFIG, {"optim.learning_rate": rate})
        values = [quality(space.seeds(sweep, config, index), 4) for index in range(3)]
        low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert trial.user_attrs["interval"] == pytest.approx([low, high])
        assert trial.user_attrs["std"] == pytest.approx(np.std(values, ddof=1))
        assert trial.value == pytest.approx(np.mean(values) if objective == "mean" else low)
        assert [p.name for p in sorted(study.path(trial.number).glob("seed-*"))] == ["seed-0", "seed-1", "seed-2"]


def test_seeds_that_were_finished_are_not_repeated(tmp_path):
    sweep = Sweep("accuracy", fixed=[{}], seeds=3)
    fake, calls = Fake(), []

    def interrupted(config, folder, name, observe):
        calls.append(pathlib.Path(folder).name)
        return {"signal": 15} if len(calls) == 3 else fake(config, folder, name, observe)

    study = Study(sweep, CONFIG, tmp_path / "s")
    assert worker.work(study, CONFIG, interrupted) == 128 + 15
    assert study.get(0).state == TrialState.RUNNING
    assert worker.work(Study(sweep, CONFIG, tmp_path / "s"), CONFIG, interrupted) == 0
    assert calls == ["seed-0", "seed-1", "seed-2", "seed-2"]
    assert len(study.get(0).user_attrs["values"]) == 3


# ------------------------------------------------------------------------------------------------------------- failures


def test_a_trial_that_fails_is_recorded_with_its_reason_and_the_sweep_goes_on(tmp_path):
    fail = {
        "0001": Diverged(7, "the loss became nan"),
        "0002": ZeroDivisionError("a bug"),
        "0003": UserError("batch_size 30 does not divide"),
    }
    study = swept(tmp_path / "s", Sweep("accuracy", fixed=[{}] * 5), Fake(fail=fail))
    states = [trial.state.name for trial in study.trials()]
    assert states == ["COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE"]
    reasons = [trial.user_attrs.get("reason", "") for trial in study.trials()]
    assert "nan at step 7" in reasons[1] and reasons[2] == "ZeroDivisionError: a bug" and "divide" in reasons[3]
    assert "Traceback" in (study.path(2) / "output.txt").read_text()


def test_after_a_full_device_memory_the_worker_begins_anew(tmp_path):
    sweep = Sweep("accuracy", fixed=[{}] * 2)
    fake = Fake(fail={"0000": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")})
    study = Study(sweep, CONFIG, tmp_path / "s")
    assert worker.work(study, CONFIG, fake) == worker.AGAIN
    assert study.get(0).user_attrs["reason"].startswith("out of memory (RESOURCE_EXHAUSTED")
    assert worker.work(study, CONFIG, fake) == 0
    assert study.get(1).state == TrialState.COMPLETE


def test_a_full_disk_ends_the_worker_and_not_the_trial(tmp_path):
    sweep = Sweep("accuracy", fixed=[{}] * 2)
    with pytest.raises(Stop, match="trial 0 cannot go on: .*No space left"):
        worker.work(Study(sweep, CONFIG, tmp_path / "s"), CONFIG, Fake(fail={"0000": OSError(28, "No space left")}))
    study = swept(tmp_path / "s", sweep)
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 2
    assert did(study) == {"trial-0000": [1, 2, 3, 4], "trial-0001": [1, 2, 3, 4]}


def test_a_trial_whose_folder_is_in_use_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_POLL", 0.0)
    fake = Fake(fail={"0000": InUse("it is in use by process 7.")})

    def execute(*args):
        try:
            return fake(*args)
        finally:
            fake.fail = {}

    study = swept(tmp_path / "s", Sweep("accuracy", fixed=[{}] * 2), execute)
    assert did(study) == {"trial-0000": [1, 2, 3, 4], "trial-0001": [1, 2, 3, 4]}
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 2


def test_a_metric_that_is_not_measured_stops_at_once_and_may_be_corrected(tmp_path):
    with pytest.raises(Stop, match="Did you mean 'accuracy'"):
        worker.work(Study(Sweep("acuracy", fixed=[{}]), CONFIG, tmp_path / "s"), CONFIG, Fake())
    study = swept(tmp_path / "s", Sweep("accuracy", fixed=[{}]))
    assert study.get(0).state == TrialState.COMPLETE
    with pytest.raises(UserError, match=r"sweep.metric is 'accuracy' there and 'loss' here"):
        Study(Sweep("loss", fixed=[{}]), CONFIG, tmp_path / "s")


def test_another_space_or_recipe_in_the_same_folder_is_refused_and_a_larger_budget_is_not(tmp_path):
    swept(tmp_path / "s", Sweep("accuracy", space=RATES, trials=2))
    with pytest.raises(UserError, match="declared otherwise .*sweep.space.optim.learning_rate.high is 10.0 there"):
        Study(
            Sweep("accuracy", space={"optim.learning_rate": log_uniform(1e-3, 9.0)}, trials=2), CONFIG, tmp_path / "s"
        )
    with pytest.raises(UserError, match="config.data.batch_size is 8 there and 16 here"):
        changed = space.override(CONFIG, {"data.batch_size": 16})
        Study(Sweep("accuracy", space=RATES, trials=2), changed, tmp_path / "s")
    elsewhere = space.override(CONFIG, {"data.workers": 1})
    study = Study(Sweep("accuracy", space=RATES, trials=5), elsewhere, tmp_path / "s")
    assert worker.work(study, CONFIG, Fake()) == 0
    assert did(study) == {f"trial-{i:04d}": [1, 2, 3, 4] for i in range(5)}


# ------------------------------------------------------------------------------------------------------- who runs which


@pytest.fixture(params=["journal", "sqlite"])
def storage(request, tmp_path):
    return None if request.param == "journal" else f"sqlite:///{tmp_path / 'study.db'}"


def child(folder, sweep, fake, url=None):
    """A worker in a process of its own."""

    def run():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            os._exit(worker.work(Study(sweep, CONFIG, folder, url), CONFIG, fake))
        finally:
            os._exit(1)

    process = FORK.Process(target=run)
    process.start()
    return process


@pytest.mark.slow
def test_workers_that_race_run_every_trial_once(tmp_path, storage):
    sweep = Sweep("accuracy", space=RATES, trials=8, sampler="random")
    workers = [child(tmp_path / "s", sweep, Fake(0.01), storage) for _ in range(3)]
    for process in workers:
        process.join()
    assert [process.exitcode for process in workers] == [0] * 3
    study = Study(sweep, CONFIG, tmp_path / "s", storage)
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE"] * 8
    assert did(study) == {f"trial-{i:04d}": [1, 2, 3, 4] for i in range(8)}
    by = {path.read_text().split()[2] for path in study.folder.rglob("did")}
    assert len(by) > 1, "one worker did everything; the test showed nothing"
    alone = swept(tmp_path / "alone", sweep)
    assert [trial.params for trial in study.trials()] == [trial.params for trial in alone.trials()]


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_its_trial_goes_on_from_where_it_was(tmp_path, storage):
    sweep = Sweep("accuracy", space=RATES, trials=3, pruner="median")
    first = child(tmp_path / "s", sweep, Fake(0.7), storage)
    study = Study(sweep, CONFIG, tmp_path / "s", storage)
    until((tmp_path / "s" / "trial-0000" / "checkpoints" / "2").exists, 30)
    settings = study.get(0).params
    assert study.claim(0) is None, "a live worker's trial was given away"
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    worker.work(study, CONFIG, Fake())
    assert study.get(0).params == settings
    assert study.get(0).user_attrs["worker"]["starts"] == 2
    for steps in did(study).values():
        assert sorted(set(steps)) == [1, 2, 3, 4] and len(steps) <= 5  # the step of the kill may be done again
    assert list(study.get(0).intermediate_values) == [1, 2, 3, 4]
    assert study.finished()


def test_a_machine_that_is_silent_is_given_up_and_one_that_beats_is_not(tmp_path, storage, monkeypatch):
    sweep = Sweep("accuracy", fixed=[{}])
    here = Study(sweep, CONFIG, tmp_path / "s", storage, lost_after=0.4)
    monkeypatch.setattr(studies, "machine", lambda: "elsewhere")
    monkeypatch.setattr(studies.Lock, "acquire", lambda self: True)  # no lock reaches from machine to machine
    theirs = Study(sweep, CONFIG, tmp_path / "s", storage).claim()
    for count in range(10):
        assert theirs.beat(count)
        assert here.claim() is None
        time.sleep(0.1)
    time.sleep(0.5)
    mine = here.claim()
    assert mine is not None and mine.starts == 2
    assert not theirs.beat(11), "the old owner must learn that it is none any more"
    mine.finish(TrialState.COMPLETE, 1.0)
    with pytest.raises(Stop, match="taken over or finished by another"):
        theirs.finish(TrialState.COMPLETE, 2.0)
    assert here.get(0).value == 1.0


def test_of_two_machines_that_give_up_a_third_at_once_one_takes_its_trial(tmp_path, storage, monkeypatch):
    sweep = Sweep("accuracy", fixed=[{}])
    monkeypatch.setattr(studies.Lock, "acquire", lambda self: True)
    machines = []
    for name in ("lost", "a", "b"):
        monkeypatch.setattr(studies, "machine", lambda name=name: name)
        machines.append(Study(sweep, CONFIG, tmp_path / "s", storage, lost_after=0.2))
    lost, a, b = machines
    assert lost.claim() is not None
    assert a.claim() is None and b.claim() is None
    time.sleep(0.3)
    taken = []
    add = a._takeovers.add_trial

    def meanwhile(trial):
        taken.append(b.claim())
        add(trial)

    monkeypatch.setattr(a._takeovers, "add_trial", meanwhile)
    taken.append(a.claim())
    assert [claim is not None for claim in taken] == [True, False]
    assert a.claim() is None and lost.claim() is None


def test_an_index_runs_exactly_its_trial(tmp_path):
    sweep = Sweep("accuracy", space={"optim.learning_rate": choice(0.1, 0.2, 0.3)}, sampler="grid")
    for index in (2, 0, 2):
        study = Study(sweep, CONFIG, tmp_path / "s")
        assert worker.work(study, CONFIG, Fake(), only=index) == 0
    assert did(study) == {"trial-0000": [1, 2, 3, 4], "trial-0002": [1, 2, 3, 4]}
    assert study.get(2).params == {"optim.learning_rate": 0.3}
    assert study.get(1).state == TrialState.WAITING


def test_three_deaths_at_one_point_give_a_trial_up_and_deaths_further_on_do_not(tmp_path):
    sweep = Sweep("accuracy", fixed=[{}] * 2)
    study = Study(sweep, CONFIG, tmp_path / "s")
    for number, grows in ((0, True), (1, False)):
        for i in range(3):
            claim = study.claim(number)
            claim._lock.release()
            if grows:
                (study.path(number) / "checkpoints" / str(i)).mkdir(parents=True)
            assert study.note_death(os.getpid()) == number
        if grows:
            study.claim(number).finish(TrialState.COMPLETE, 1.0)
    assert study.get(1).state == TrialState.FAIL and "died three times" in study.get(1).user_attrs["reason"]


@pytest.mark.slow
def test_a_journal_survives_a_kill_and_a_full_disk_in_the_middle_of_a_line(tmp_path):
    path = tmp_path / "study.jsonl"
    journal = studies.Journal(path)
    journal.append_logs([{"n": 0}, {"n": 1}])
    with open(path, "ab") as file:
        file.write(b'{"n": 2')  # a kill
    assert [log["n"] for log in studies.Journal(path).read_logs(0)] == [0, 1]
    journal.append_logs([{"n": 3}])

    def full():
        size = path.stat().st_size + 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        try:
            studies.Journal(path).append_logs([{"n": 4}])
        except Stop as error:
            os._exit(7 if "cannot write" in str(error) else 1)

    process = FORK.Process(target=full)
    process.start()
    process.join()
    assert process.exitcode == 7 and path.read_bytes().endswith(b'\n{"n":')
    journal.append_logs([{"n": 5}])
    assert [log["n"] for log in journal.read_logs(0)] == [log["n"] for log in studies.Journal(path).read_logs(0)]
    assert [log["n"] for log in journal.read_logs(1)] == [1, 3, 5]
    path.write_bytes(path.read_bytes().replace(b'{"n":3}', b'{"n"#3}'))
    with pytest.raises(Stop, match="line 3 of .* is not JSON"):
        list(studies.Journal(path).read_logs(0))


# ---------------------------------------------------------------------------------------------------- devices and lines


def test_workers_have_disjoint_devices(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cores = sorted(os.sched_getaffinity(0))
    places = command._places(len(cores))
    assert [place.cores for place in places] == [{core} for core in cores]
    assert all(len(place.cores) == 1 for place in command._places(len(cores) + 1))
    monkeypatch.setattr(command, "_accelerators", lambda: ("GPU", ["4", "5", "6", "7"]))
    assert [p.env["CUDA_VISIBLE_DEVICES"] for p in command._places(2)] == ["4,5", "6,7"]
    with pytest.raises(UserError, match="--workers=4 or fewer"):
        command._places(5)
    monkeypatch.setattr(command, "_accelerators", lambda: ("TPU chip", ["0", "1", "2", "3"]))
    assert [p.env["TPU_VISIBLE_CHIPS"] for p in command._places(4)] == ["0", "1", "2", "3"]


def test_the_table_and_the_rows(tmp_path):
    sweep = Sweep("accuracy", fixed=[{"optim.learning_rate": r} for r in (0.1, 1.0)], seeds=2)
    study = swept(tmp_path / "s", sweep)
    rows = [command._row(study, trial) for trial in study.trials()]
    assert rows[1]["settings"] == {"optim.learning_rate": 1.0} and rows[1]["state"] == "complete"
    lines = list(command.table(rows, "accuracy"))
    assert lines[0].split() == ["trial", "state", "accuracy", "±", "std", "optim.learning_rate"]
    assert lines[1].split()[0] == "0" and len(lines) == 3
    assert json.loads(json.dumps(rows)) == rows


def test_the_rows_show_only_what_was_chosen(tmp_path):
    space = {"optim.learning_rate": choice(0.1, 1.0), "train.steps": choice(same=4), "seed": choice(3)}
    branches = {0.1: {"data.seed": choice(1)}, 1.0: {"data.seed": choice(2)}}
    sweep = Sweep("accuracy", space=space, conditional={"optim.learning_rate": branches}, sampler="grid")
    study = swept(tmp_path / "s", sweep)
    rows = [command._row(study, trial) for trial in study.trials()]
    assert [row["settings"] for row in rows] == [
        {"optim.learning_rate": 0.1, "data.seed": 1},
        {"optim.learning_rate": 1.0, "data.seed": 2},
    ]
    assert all(row["overrides"]["train.steps"] == 4 and row["overrides"]["seed"] == 3 for row in rows)
    listed = Sweep("accuracy", fixed=[{"train.steps": 4, "seed": 0}, {"train.steps": 4, "seed": 1, "data.seed": 2}])
    study = swept(tmp_path / "f", listed)
    rows = [command._row(study, trial) for trial in study.trials()]
    assert [row["settings"] for row in rows] == [{"seed": 0}, {"seed": 1, "data.seed": 2}]
    rows[0]["settings"]["seed"] = [{"target": "a.name:OfSomething", "size": 64}] * 3
    line = list(command.table(rows, "accuracy"))[1]
    assert "[{'target': 'a.name:OfSomething'" in line and line.endswith("...") and len(line) < 80


# ----------------------------------------------------------------------------------------------------------- end to end

FILE = """
from bigbase_jax.sweep import Sweep, log_uniform
def sweep():
    return Sweep(metric="accuracy", space={"optim.learning_rate": log_uniform(0.01, 1.0)}, trials=3)
"""


@pytest.fixture
def cache_events(tmp_path, monkeypatch):
    """Names of what JAX's compilation cache, a fresh one that keeps everything, is asked for and finds."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    before = {
        name: jax.config.values[name]
        for name in ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    }
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()  # which has remembered the options
    events = []

    def listen(event, **_):
        if event.startswith("/jax/compilation_cache/"):
            events.append(event.rpartition("/")[2])

    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_trials_that_differ_in_numbers_share_one_compiled_program(tmp_path, cache_events):
    """All that the later trials of a worker ask of the compiler is in its cache."""
    from bigbase_jax import verbs

    config = CONFIG.copy_and_resolve_references()
    config.train.writers = ()
    names = ("optim.learning_rate", "optim.weight_decay", "seed")
    trials = ((0.1, 0.01, 0), (0.5, 0.1, 1), (0.02, 0.3, 2))
    sweep = Sweep("accuracy", fixed=[dict(zip(names, values, strict=True)) for values in trials])
    asked = []

    def execute(*args):
        cache_events.clear()
        result = verbs.train(*args)
        asked.append((cache_events.count("compile_requests_use_cache"), cache_events.count("cache_hits")))
        return result

    study = Study(sweep, config, tmp_path / "s")
    assert worker.work(study, config, execute) == 0
    assert asked[0][0] > asked[0][1] >= 0, "the first compiles"
    for requests, hits in asked[1:]:
        assert requests == hits >= 2, "the later ones take what it has compiled: init, step"
    weights = {arrays(tmp_path / "s" / f"trial-{i:04d}")["params.head.kernel"] for i in range(3)}
    assert len(weights) == 3


LONG = ("--config.train.steps=240", "--config.train.eval_every=40", "--config.train.writers=()")


def start(tmp_path, *args, **env):
    (tmp_path / "sweep.py").write_text(FILE)
    arguments = ("--config=configs/catdog_mlp.py:tiny", f"--sweep={tmp_path / 'sweep.py'}", *args)
    environment = {**os.environ, "XLA_FLAGS": "", **env}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process, status=0):
    out, err = process.communicate(timeout=500)
    assert process.returncode == status, err[-3000:]
    assert status == 0 or "Traceback" not in err, err[-3000:]
    return json.loads(out.splitlines()[-1]) if out else None, err


def test_a_folder_of_other_things_is_no_sweeps_folder(tmp_path):
    (tmp_path / "sweep.py").write_text(FILE)
    with pytest.raises(UserError, match=r"is not empty and holds no sweep \(sweep.py in it\); give --workdir a new"):
        command.run(CONFIG, str(tmp_path / "sweep.py"), str(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["sweep.py"]


def test_a_misspelt_key_ends_the_command_before_anything_is_made(tmp_path):
    (tmp_path / "bad.py").write_text(FILE.replace("learning_rate", "learning_rat"))
    with pytest.raises(UserError, match="Did you mean 'learning_rate'?"):
        command.run(recipe(), str(tmp_path / "bad.py"), str(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_trial_is_an_ordinary_run(tmp_path):
    """One trial by its index through launch.py: what it wrote is a run, its value the run's own metric, and no file
    holds a secret."""
    url = f"sqlite:///file:{tmp_path / 'study.db'}?uri=true&password=hunter2hunter2"
    arguments = (f"--workdir={tmp_path / 'runs'}", "--sweep_index=1", f"--sweep_storage={url}")
    found, err = end(start(tmp_path, *arguments, "--config.train.writers=()"))
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) > 10 and not [path for path in kept if b"hunter2" in path.read_bytes()] and "hunter2" not in err
    assert "password=***" in json.loads((tmp_path / "runs" / "trial-0001" / "lineage.json").read_text())["command"]
    folder = tmp_path / "runs" / "trial-0001"
    assert found["state"] == "complete" and found["folder"] == str(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["optim"]["learning_rate"] == found["overrides"]["optim.learning_rate"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert found["value"] == max(row["accuracy"] for row in rows if row["kind"] == "eval")
    for name in ("eval-test.json", "report.html", "lineage.json", "output.txt"):
        assert (folder / name).stat().st_size > 0
    assert not (tmp_path / "runs" / "trial-0000").exists()


def arrays(folder):
    from orbax.checkpoint import v1 as ocp

    newest = max((p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    return {name: np.asarray(x).tobytes() for name, x in ocp.load(newest).items()}


@pytest.mark.slow
def test_kills_and_a_damaged_checkpoint_change_no_bit_of_a_sweep(tmp_path):
    """A worker is killed, then everything; a checkpoint is spoilt; a signal comes: the same trials, the same bits."""
    end(start(tmp_path, f"--workdir={tmp_path / 'calm'}", *LONG))
    runs = tmp_path / "runs"
    command = (f"--workdir={runs}", "--workers=2", *LONG)

    process = start(tmp_path, *command)  # one worker dies
    until(lambda: list(runs.glob("trial-*/checkpoints/[0-9]*")), 400)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    until(lambda: list(runs.glob("trial-*/eval-test.json")), 400)
    process.send_signal(signal.SIGKILL)  # the parent dies; its workers notice and set their trials down
    process.communicate()
    until(lambda: not any("launch.py" in line and str(runs) in line for line in processes()), 200)

    running = [p for p in runs.glob("trial-*") if not (p / "eval-test.json").exists()]
    for folder in running[:1]:  # the newest checkpoint is spoilt
        newest = max((p for p in (folder / "checkpoints").glob("[0-9]*")), key=lambda p: int(p.name), default=None)
        for file in (newest / "state").rglob("*") if newest else ():
            if file.is_file():
                file.write_bytes(b"")

    process = start(tmp_path, *command)  # a signal
    while "running" not in (line := process.stderr.readline()) and line:
        pass
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=400)
    if process.returncode:  # 0 if all trials were finished by then
        assert process.returncode == 128 + signal.SIGTERM and "the same command goes on" in err

    found, _ = end(start(tmp_path, *command))
    assert (found["complete"], found["failed"], found["running"]) == (3, 0, 0)
    rows = {row["trial"]: row for row in json.loads((runs / "summary.json").read_text())["rows"]}
    for row in json.loads((tmp_path / "calm" / "summary.json").read_text())["rows"]:
        assert rows[row["trial"]]["value"] == row["value"]
        assert arrays(runs / f"trial-{row['trial']:04d}") == arrays(pathlib.Path(row["folder"]))


def processes():
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(tmp_path):
    limited = ["bash", "-c", 'ulimit -f 300; exec "$@"', "bash"]
    (tmp_path / "sweep.py").write_text(FILE)
    arguments = [
        "--config=configs/catdog_mlp.py:tiny",
        f"--sweep={tmp_path / 'sweep.py'}",
        f"--workdir={tmp_path / 'r'}",
    ]
    launch = [sys.executable, str(ROOT / "launch.py"), *arguments, *LONG[2:]]
    env = {**os.environ, "XLA_FLAGS": ""}
    done = subprocess.run([*limited, *launch], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "trial 0 cannot go on" in done.stderr.splitlines()[-1] and "File too large" in done.stderr.splitlines()[-1]
    found, _ = end(start(tmp_path, f"--workdir={tmp_path / 'r'}", *LONG[2:]))
    assert (found["complete"], found["failed"]) == (3, 0)
