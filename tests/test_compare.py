"""Comparisons: the tests against scipy and by hand, seeds together, what is refused, the page, and the command.

Axes: N = examples, K = classes, L = positions, R = resamples, C = columns.
"""

import csv
import html.parser
import json
import os
import pathlib
import re
import runpy
import shutil

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from bigbase_jax import cli, compare, verbs
from bigbase_jax.compare import importance, runs, scores, statistics, tables
from bigbase_jax.compare.scores import AUC, F1, Ratio
from bigbase_jax.core import UserError
from bigbase_jax.pages import comparison

NASTY = "<script>alert(\"x\")</script> & 'co'"
CLASSIFICATION = "bigbase_jax.tasks.classification:Classification"
N = 400


class Page(html.parser.HTMLParser):
    """Parses a page; fails on unbalanced tags, anything fetched from elsewhere, and more than the one script."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags = [], [], []
        assert not re.search(r"https?://|url\(|@import", text) and "default-src 'none'" in text
        self.feed(text)
        assert self.open == [] and self.tags.count("script") == 1

    def handle_starttag(self, tag, attributes):
        assert tag not in ("link", "iframe", "object")
        assert not any(
            name.startswith("on") or name in ("src", "href", "xlink:href", "action") for name, _ in attributes
        )
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def make_run(
    folder, seed=0, skill=1.0, rate=0.1, width=16, state="finished", fingerprint="f1", labels=0, evaluated=True,
    examples=None, **more
):  # fmt: skip
    """A run as its files tell it: a classifier of 3 classes on N examples, the better the more ``skill``."""
    folder.mkdir(parents=True, exist_ok=True)
    write = lambda name, value: (folder / name).write_text(json.dumps(value))  # noqa: E731
    write("config.json", {
        "seed": seed,
        "data": {"seed": 0, "workers": seed},
        "task": {"target": CLASSIFICATION, "model": {"width": width}, "class_names": None},
        "optim": {"learning_rate": rate, **more},
        "train": {"best_metric": "accuracy", "best_mode": "max"},
    })  # fmt: skip
    write("data.json", {"dataset_info": {"class_names": ["x", "y", "z"]}})
    lineage = {"git_commit": "c0ffee", "versions": {"jax": "0.10"}, "data": {"fingerprint": fingerprint}}
    lineage["data"] |= {} if examples is None else {"examples": examples}
    write("lineage.json", lineage | ({"finished": "2026-01-02T03:04:05+00:00"} if state == "finished" else {}))
    label_N = np.random.default_rng(labels).integers(0, 3, N)
    shared_NK = np.random.default_rng(labels + 1).normal(size=(N, 3))  # what is hard is hard for all
    logit_NK = skill * np.eye(3)[label_N] + shared_NK + 0.3 * np.random.default_rng(100 + seed).normal(size=(N, 3))
    p_NK = np.exp(logit_NK) / np.exp(logit_NK).sum(1, keepdims=True)
    accuracy = float((p_NK.argmax(1) == label_N).mean())
    loss = float(-np.log(p_NK[np.arange(N), label_N]).mean())
    rows = [{"step": s, "kind": "train", "loss": loss + 5 / s, "learning_rate": rate} for s in range(10, 101, 10)]
    rows += [{"step": s, "kind": "eval", "split": "val", "accuracy": accuracy * s / 100, "loss": loss + 1 / s}
             for s in (50, 100)]  # fmt: skip
    rows += [{"step": 100, "kind": "diverged", "loss": "nan"}] if state == "diverged" else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluated:
        write("eval-test.json", {"step": 100, "split": "test", "accuracy": accuracy, "loss": loss, "count": N})
        np.savez(folder / "predictions-test.npz", probabilities=p_NK, label=label_N, index=np.arange(N))
    return p_NK.argmax(1) == label_N


def page_of(found, folder):
    """The page of a comparison, parsed."""
    return Page(pathlib.Path(comparison.write(folder / "page", found)).read_text())


def compared(*folders, **options):
    return compare.compare([str(folder) for folder in folders], resamples=options.pop("resamples", 500), **options)


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (1, 7, 2 * (1 + 8) / 2**8), (0, 5, 2 / 2**5), (12, 3, 2 * (1 + 15 + 105 + 455) / 2**15)],
)
def test_mcnemar_is_the_binomial_test_of_what_only_one_has_right(only_a, only_b, p):
    a_N = np.array([True] * only_a + [False] * only_b + [True] * 9 + [False] * 4)
    b_N = np.array([False] * only_a + [True] * only_b + [True] * 9 + [False] * 4)
    found = statistics.mcnemar(a_N, b_N)
    assert (found.only_a, found.only_b) == (only_a, only_b)
    assert found.p == pytest.approx(p, rel=1e-12)


def test_the_paired_bootstrap_agrees_with_scipys():
    rng = np.random.default_rng(0)
    a_N, b_N = rng.random(60), rng.random(60)
    b_N = 0.7 * a_N + 0.3 * b_N + 0.05
    columns = [Ratio(x_N, np.ones(60)).sample for x_N in (a_N, b_N)]
    resampled_RC = statistics.resampled(columns, 60, 20_000)
    low, high = statistics.percentiles(resampled_RC[:, 1] - resampled_RC[:, 0])
    want = stats.bootstrap(
        (b_N, a_N), lambda x, y, axis: (x - y).mean(axis=axis), paired=True, method="percentile", n_resamples=20_000,
        rng=np.random.default_rng(1),
    )  # fmt: skip
    assert (low, high) == pytest.approx(tuple(want.confidence_interval), abs=0.02 * (high - low) + 1e-3)
    assert np.std(resampled_RC[:, 1] - resampled_RC[:, 0]) == pytest.approx(want.standard_error, rel=0.03)
    alone_RC = statistics.resampled(columns[:1], 60, 20_000)
    np.testing.assert_allclose(alone_RC[:, 0], resampled_RC[:, 0], rtol=1e-12)  # the same draws in every call


def test_resampling_in_chunks_draws_the_same(monkeypatch):
    columns = [Ratio(x_N, np.ones(30)).sample for x_N in np.random.default_rng(0).random((2, 30))]
    whole_RC = statistics.resampled(columns, 30, 100)
    monkeypatch.setattr(statistics, "_CHUNK", 30 * 7)
    found_RC = statistics.resampled(columns, 30, 100)
    np.testing.assert_allclose(found_RC, whole_RC, rtol=1e-12)  # a product of another size may sum in another order


def test_ratios_of_sums_are_resampled_as_such():
    """Two examples, of 1 and of 3 tokens: a sample holds the one, the other, or both."""
    nats_per_token = Ratio(np.array([2.0, 3.0]), np.array([1.0, 3.0]))
    values, counts = np.unique(statistics.resampled([nats_per_token.sample], 2, 4000), return_counts=True)
    np.testing.assert_allclose(values, [1.0, 1.25, 2.0])
    np.testing.assert_allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.03)


@pytest.mark.parametrize("K", [2, 4])
def test_f1_and_auc_of_samples_are_scikit_learns(K):
    rng = np.random.default_rng(K)
    label_N = rng.integers(0, K, 50)
    p_NK = np.round(rng.dirichlet(np.ones(K), 50), 1)  # with ties
    guess_N = p_NK.argmax(-1)
    drawn_RN = rng.integers(0, 50, (5, 50))
    count_RN = np.stack([np.bincount(row_N, minlength=50) for row_N in drawn_RN]).astype(float)
    for positive in (None, 1):
        found_R = F1(label_N, guess_N, positive).sample(count_RN)
        words = {"average": "macro"} if positive is None else {"labels": [positive], "average": "macro"}
        want_R = [sk.f1_score(label_N[row], guess_N[row], zero_division=0, **words) for row in drawn_RN]
        np.testing.assert_allclose(found_R, want_R, rtol=1e-12)
    want_R = []
    for row in drawn_RN:
        classes = range(K) if K > 2 else (1,)
        want_R.append(np.mean([sk.roc_auc_score(label_N[row] == k, p_NK[row, k]) for k in classes]))
    np.testing.assert_allclose(AUC(p_NK, label_N).sample(count_RN), want_R, rtol=1e-12)


def test_the_bootstraps_p_value_agrees_with_its_interval():
    difference_R = np.random.default_rng(0).normal(0.3, 0.1, 10_000)
    assert statistics.bootstrap_p(difference_R) == pytest.approx(2 * stats.norm.cdf(-3), rel=0.3)
    assert statistics.bootstrap_p(np.ones(99)) == 2 / 100  # never 0: the data are one of the samples
    assert statistics.bootstrap_p(np.zeros(99)) == 1.0
    edge_R = difference_R - np.quantile(difference_R, 0.025)
    assert statistics.bootstrap_p(edge_R) == pytest.approx(0.05, abs=0.002)


def test_holms_correction_by_hand():
    found = statistics.holm({"a": 0.01, "b": 0.04, "c": None, "d": 0.03, "e": 0.6})
    want = {"a": 0.04, "b": 0.09, "c": None, "d": 0.09, "e": 0.6}
    assert found == {key: value if value is None else pytest.approx(value) for key, value in want.items()}
    assert statistics.holm({"a": 0.8, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_intervals_over_seeds_are_students():
    values = [0.81, 0.84, 0.79, 0.86]
    found = statistics.spread(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert found == pytest.approx((np.mean(values), np.std(values, ddof=1), low, high), rel=1e-12)
    assert statistics.spread([0.5]) == (0.5, None, None, None)
    assert statistics.welch([1, 2, 3], [2, 4, 7]) == pytest.approx(
        stats.ttest_ind([1, 2, 3], [2, 4, 7], equal_var=False).pvalue
    )
    assert statistics.welch([1.0], [1.0, 2.0]) is None


# -------------------------------------------------------------------------------------------------------------- scores


def test_scores_of_a_classifier_are_those_of_its_evaluation(tmp_path):
    right_N = make_run(tmp_path / "run")
    found = scores.read(runs.read(tmp_path / "run", "run", None), "test")
    evaluated = json.loads((tmp_path / "run" / "eval-test.json").read_text())
    np.testing.assert_array_equal(found.scores["accuracy"].total_N, right_N)
    assert found.mean("accuracy") == pytest.approx(evaluated["accuracy"])
    assert found.mean("log_loss") == pytest.approx(evaluated["loss"])


def language_run(folder, nats_NL, target_NL):
    make_run(folder)
    loss = -nats_NL[target_NL >= 0].mean()
    (folder / "eval-test.json").write_text(json.dumps({"step": 1, "split": "test", "loss": loss}))
    np.savez(folder / "predictions-test.npz", log_probability=nats_NL, target=target_NL, bytes=2 * (target_NL >= 0))
    return loss


def test_a_language_models_loss_is_weighed_by_tokens(tmp_path):
    rng = np.random.default_rng(0)
    target_NL = rng.integers(-1, 5, (50, 8))
    a_NL = -rng.random((50, 8))
    a = language_run(tmp_path / "a", a_NL, target_NL)
    b = language_run(tmp_path / "b", a_NL - 0.1, target_NL)
    found = compared(tmp_path / "a", tmp_path / "b")
    loss, bits = found.pairs
    assert (loss.metric, bits.metric) == ("loss", "bits_per_byte")
    assert (loss.a, loss.b) == pytest.approx((a, b))
    assert (loss.low, loss.high) == pytest.approx((0.1, 0.1))  # every token is worse by as much
    assert bits.difference == pytest.approx(0.1 / np.log(2) / 2)
    assert loss.verdict == "worse" and loss.mcnemar is None
    assert found.measured["a", "loss"].over == "examples"


def test_the_share_of_right_tokens_is_no_yes_or_no(tmp_path):
    """A translation is not right or wrong as a whole: no McNemar, and an interval that resamples whole examples."""
    target_NL = np.random.default_rng(0).integers(-1, 5, (60, 8))
    for name, share in (("a", 0.5), ("b", 0.9)):
        language_run(tmp_path / name, -np.ones((60, 8)), target_NL)
        right_NL = np.random.default_rng(1).random((60, 8)) < share
        arrays = {"log_probability": -np.ones((60, 8)), "target": target_NL, "correct": right_NL}
        np.savez(tmp_path / name / "predictions-test.npz", **arrays)
        accuracy = float(right_NL[target_NL >= 0].mean())
        (tmp_path / name / "eval-test.json").write_text(json.dumps({"split": "test", "accuracy": accuracy}))
    found = compared(tmp_path / "a", tmp_path / "b")
    pair = next(pair for pair in found.pairs if pair.metric == "accuracy")
    assert pair.mcnemar is None and pair.verdict == "better"
    assert pair.b == pytest.approx(found.measured["b", "accuracy"].mean)
    assert found.measured["b", "accuracy"].over == "examples"


def test_the_order_of_the_examples_does_not_matter(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", skill=2.0)
    before = compared(tmp_path / "a", tmp_path / "b").pairs
    with np.load(tmp_path / "b" / "predictions-test.npz") as file:
        order = np.random.default_rng(0).permutation(N)
        np.savez(tmp_path / "b" / "predictions-test.npz", **{name: file[name][order] for name in file.files})
    assert compared(tmp_path / "a", tmp_path / "b").pairs == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"fingerprint": "f2"}, "different data (fingerprints f1 and f2)"),
        ({"fingerprint": None}, "does not say which data"),
        ({"labels": 7}, "the labels or targets of a and b differ"),
    ],
)
def test_differing_examples_are_refused(tmp_path, change, sentence):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", **change)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.pairs == [] and any(sentence in note for note in found.notes), found.notes
    assert found.measured["b", "accuracy"].over == "examples"  # its own interval needs no partner


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"probabilities": np.ones((5, 2)), "label": np.zeros(5, int)}, "on 400 examples and b on 5"),
        (
            {"probabilities": np.ones((N, 2)), "label": np.zeros(N, int), "index": np.arange(N) + 1},
            "different examples",
        ),
        ({"hypothesis": np.ones((N, 2))}, "keeps hypothesis of each example; a paired test needs"),
        ({"probabilities": np.ones((5, 2)), "label": np.zeros(4, int)}, "cannot be read"),
        (None, "--mode=eval makes it"),
        (b"broken", "cannot be read"),
    ],
)
def test_predictions_that_do_not_pair_are_one_sentence(tmp_path, arrays, sentence):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    path = tmp_path / "b" / "predictions-test.npz"
    path.unlink()
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays:
        np.savez(path, **arrays)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.pairs == [] and any(sentence in note for note in found.notes), found.notes
    assert page_of(found, tmp_path)


# --------------------------------------------------------------------------------------------------------------- pairs


def test_a_pair_holds_both_tests_of_the_same_examples(tmp_path):
    a_N, b_N = make_run(tmp_path / "a"), make_run(tmp_path / "b", skill=2.0, rate=0.2)
    found = compared(tmp_path / "a", tmp_path / "b", resamples=4000)
    accuracy, log_loss, f1, auc = found.pairs
    assert (f1.metric, auc.metric) == ("f1", "auc") and f1.low <= f1.difference <= f1.high and auc.mcnemar is None
    assert accuracy.difference == pytest.approx(b_N.mean() - a_N.mean()) and accuracy.examples == N
    assert accuracy.mcnemar == statistics.mcnemar(a_N, b_N) and accuracy.mcnemar_holm == accuracy.mcnemar.p
    error = (b_N.astype(float) - a_N).std() / np.sqrt(N)
    assert accuracy.low == pytest.approx(accuracy.difference - 1.96 * error, abs=0.1 * error)
    assert accuracy.verdict == "better" == log_loss.verdict and log_loss.difference < 0
    assert compared(tmp_path / "a", tmp_path / "b", resamples=4000).pairs == found.pairs  # seeded
    low, high = found.measured["a", "accuracy"].low, found.measured["a", "accuracy"].high
    assert low < a_N.mean() < high and high - low == pytest.approx(2 * 1.96 * np.sqrt(a_N.var() / N), rel=0.02)
    loss = found.measured["a", "loss"]
    assert loss.over == "examples" and loss.low < loss.mean < loss.high


def test_many_runs_are_corrected_and_tested_against_the_first(tmp_path):
    for i in range(6):
        make_run(tmp_path / f"r{i}", seed=i, rate=0.1 + i, skill=1.0 + 0.1 * i)
    found = compared(*(tmp_path / f"r{i}" for i in range(6)))
    family = [pair for pair in found.pairs if pair.metric == "accuracy"]
    assert [pair.other for pair in family] == ["r1", "r2", "r3", "r4", "r5"] and {p.baseline for p in family} == {"r0"}
    want = statistics.holm({pair.other: pair.mcnemar.p for pair in family})
    assert {pair.other: pair.mcnemar_holm for pair in family} == want
    assert max(pair.mcnemar_holm / pair.mcnemar.p for pair in family) > 1


def test_seeds_are_one_experiment(tmp_path):
    rights = [make_run(tmp_path / f"a-seed{i}", seed=i).mean() for i in range(3)]
    others = [make_run(tmp_path / f"b-seed{i}", seed=i, skill=2.0, rate=0.2).mean() for i in range(3)]
    found = compared(*(tmp_path / f"{name}-seed{i}" for name in "ab" for i in range(3)))
    assert [(g.name, len(g.runs)) for g in found.groups] == [("a", 3), ("b", 3)]
    a = found.measured["a", "accuracy"]
    assert (a.mean, a.deviation, a.low, a.high) == pytest.approx(tuple(statistics.spread(rights)))
    assert a.over == "seeds"
    assert found.varied == {"optim.learning_rate": [0.1, 0.2]}  # neither the seed nor the number of workers
    pair = found.pairs[0]
    assert pair.difference == pytest.approx(np.mean(others) - np.mean(rights)) and pair.mcnemar is None
    assert pair.p_seeds == pytest.approx(stats.ttest_ind(rights, others, equal_var=False).pvalue)
    assert pair.verdict == "better"


def test_the_same_seed_again_is_another_experiment(tmp_path):
    """After a change of the code, say: both must not pass for two samples of one thing."""
    for name in ("before", "after"):
        for seed in (0, 1):
            make_run(tmp_path / name / f"seed-{seed}", seed=seed)
    commit = {**json.loads((tmp_path / "after/seed-0/lineage.json").read_text()), "git_commit": "beef"}
    for seed in (0, 1):
        (tmp_path / "after" / f"seed-{seed}" / "lineage.json").write_text(json.dumps(commit))
    for folders in ((tmp_path / "before", tmp_path / "after"), sorted(tmp_path.glob("*/seed-*"), reverse=True)):
        found = compared(*folders)
        assert sorted((g.name, len(g.runs)) for g in found.groups) == [("after", 2), ("before", 2)]
        assert set(found.differences) == {"origin"} and set(found.differences["origin"]) == {"git commit"}
        assert all(pair.verdict == "no difference shown" for pair in found.pairs) and found.pairs


# ------------------------------------------------------------------------------------------------- folders and sweeps


def make_sweep(folder, count=12):
    rng = np.random.default_rng(0)
    for i in range(count):
        rate, width = float(10 ** rng.uniform(-4, 0)), int(rng.choice([16, 32, 64]))
        skill = 2.5 - 0.5 * (np.log10(rate) + 2) ** 2
        make_run(
            folder / f"trial-{i:04d}", seed=i, rate=rate, width=width, skill=skill, momentum=rng.choice([0.0, 0.9])
        )


def test_a_sweep_is_expanded_ranked_and_its_settings_are_weighed(tmp_path):
    make_sweep(tmp_path / "sweep")
    (tmp_path / "sweep" / "study.txt").write_text("x")
    found = compared(tmp_path / "sweep")
    values = [found.goal.value(g.runs[0]) for g in found.groups]
    assert len(values) == 12 and values == sorted(values, reverse=True) and found.by_rank
    assert set(found.varied) == {"optim.learning_rate", "optim.momentum", "task.model.width"}
    assert next(iter(found.importance.shares)) == "optim.learning_rate"
    assert sum(found.importance.shares.values()) == pytest.approx(1)
    page = page_of(found, tmp_path)
    for word in ("Parallel coordinates", "permutation importance of a random forest", "learning_rate", "trial-0007"):
        assert word in page.words, word


def test_what_cannot_be_used_is_one_sentence_each_and_the_rest_goes_on(tmp_path):
    make_run(tmp_path / "good")
    make_run(tmp_path / "begun", state="begun", evaluated=False, rate=0.2)
    make_run(tmp_path / "diverged", state="diverged", evaluated=False, rate=0.3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    make_run(tmp_path / "fresh", state="begun", evaluated=False)
    (tmp_path / "fresh" / "metrics.jsonl").unlink()
    names = ("good", "begun", "diverged", "empty", "foreign", "broken", "other", "fresh", "missing", "good")
    found = compared(*(tmp_path / name for name in names))
    assert [g.name for g in found.groups] == ["good", "begun", "diverged"]
    said = "\n".join(found.notes) + "\n".join(compare.load([str(tmp_path / name) for name in names])[2])
    for sentence in (
        "begun has not been evaluated (not finished, at step 100)",
        "diverged has not been evaluated (diverged at step 100)",
        "empty is empty",
        "foreign is no run of this project",
        "broken/config.json cannot be read",
        "other holds no run",
        "fresh has neither a log nor an evaluation (not begun)",
        "there is no folder",
        "good is named twice",
    ):
        assert sentence in said, sentence
    page_of(found, tmp_path)
    with pytest.raises(UserError, match="no run to compare: .*empty is empty"):
        compared(tmp_path / "empty")
    with pytest.raises(UserError, match="give --workdir once for each run"):
        compared()
    with pytest.raises(UserError, match="no run was evaluated on the split 'tset'. Did you mean 'test'"):
        compared(tmp_path / "good", split="tset")


def test_patterns_and_natural_order(tmp_path):
    for i in (1, 2, 10):
        make_run(tmp_path / f"lr-{i}", rate=float(i))
    assert [g.name for g in compared(tmp_path / "lr-*").groups] == ["lr-1", "lr-2", "lr-10"]


def test_a_study_says_how_its_trials_ended_and_which_settings_matter(tmp_path):
    optuna = pytest.importorskip("optuna")
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.jsonl")))
    study = optuna.create_study(storage=storage, direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for number in range(12):
        trial = study.ask()
        rate, width = trial.suggest_float("optim.learning_rate", 0.01, 1), trial.suggest_int("task.model.width", 8, 64)
        if number in (3, 4):
            state = optuna.trial.TrialState.PRUNED if number == 3 else optuna.trial.TrialState.FAIL
            trial.set_user_attr("reason", "worse than the median" if number == 3 else "out of memory")
            study.tell(trial, state=state)
        else:
            study.tell(trial, rate)
        if number != 4:
            state = "begun" if number == 3 else "finished"
            make_run(tmp_path / f"trial-{number:04d}", rate=rate, width=width, state=state, evaluated=number != 3)
    (tmp_path / "trial-0004").mkdir()
    found = compared(tmp_path)
    assert "fANOVA of optuna" in found.importance.method
    assert list(found.importance.shares) == ["optim.learning_rate", "task.model.width"]
    assert found.importance.shares["optim.learning_rate"] > 0.8
    said = "\n".join(found.notes)
    assert "trial-0003 has not been evaluated (pruned: worse than the median (step 100))" in said
    assert "trial-0004 failed: out of memory" in said


def make_stored_sweep(folder, url):
    """A sweep whose study is in a database: twelve trials, of which one failed."""
    from ml_collections import ConfigDict
    from optuna.trial import TrialState

    from bigbase_jax.sweep import Sweep, choice, log_uniform
    from bigbase_jax.sweep.study import Study

    space = {"optim.learning_rate": log_uniform(1e-3, 1.0), "task.model.width": choice(16, 32)}
    study = Study(Sweep("accuracy", space=space, trials=12, sampler="random"), ConfigDict(), folder, url)
    for number in range(12):
        claim = study.claim()
        values = study.sweep.overrides(claim.trial)
        if number == 4:
            claim.finish(TrialState.FAIL, reason="out of memory")
            (folder / "trial-0004").mkdir()
            continue
        claim.finish(TrialState.COMPLETE, values["optim.learning_rate"])
        rate, width = values["optim.learning_rate"], values["task.model.width"]
        make_run(study.path(number), rate=rate, width=width, skill=1 + 3 * rate)
    return study


def test_of_one_sweep_what_differs_is_what_it_chose(tmp_path):
    pytest.importorskip("optuna")
    from ml_collections import ConfigDict
    from optuna.trial import TrialState

    from bigbase_jax.sweep import Sweep, choice
    from bigbase_jax.sweep.study import Study

    space = {"optim.learning_rate": choice(0.1, 1.0), "task.model": choice(narrow=8, wide=64), "train": choice(same=1)}
    branches = {"narrow": {"optim.momentum": choice(0.5)}, "wide": {"optim.momentum": choice(own=0.9)}}
    sweep = Sweep("accuracy", space=space, conditional={"task.model": branches}, sampler="grid")
    study = Study(sweep, ConfigDict(), tmp_path / "sweep")
    for number in range(4):
        claim = study.claim()
        values = sweep.overrides(claim.trial)
        claim.finish(TrialState.COMPLETE, values["optim.learning_rate"])
        rate, width, momentum = (values[key] for key in ("optim.learning_rate", "task.model", "optim.momentum"))
        make_run(study.path(number), rate=rate, width=width, momentum=momentum)
    found = compared(tmp_path / "sweep")
    assert set(found.varied) == {"optim.learning_rate", "task.model", "optim.momentum"}
    rows = sorted(
        zip(*(found.varied[key] for key in ("task.model", "optim.learning_rate", "optim.momentum")), strict=True)
    )
    assert rows == [("narrow", 0.1, 0.5), ("narrow", 1.0, 0.5), ("wide", 0.1, "own"), ("wide", 1.0, "own")]
    text = page_of(found, tmp_path).words
    assert "They differ in learning_rate, momentum, model" in text and "narrow" in text
    assert "task.model" in tables.csv_files(found)["runs.csv"].splitlines()[0]
    shutil.copytree(study.path(0), tmp_path / "alone")  # names of a sweep mean nothing outside of it
    assert "task.model.width" in compared(tmp_path / "sweep", tmp_path / "alone").varied


def test_a_study_in_a_database_is_read_where_one_is_told_and_not_where_the_folder_says(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    folder, database = tmp_path / "sweep", tmp_path / "elsewhere" / "study.db"
    database.parent.mkdir()
    monkeypatch.chdir(database.parent)
    make_stored_sweep(folder, "sqlite:///study.db")
    monkeypatch.chdir(tmp_path)  # it was a relative path
    with monkeypatch.context() as patch:
        patch.setattr(compare.studies, "_opened", lambda *args: pytest.fail("opened what the folder names"))
        found = compared(folder)
    said = "\n".join(found.notes)
    assert f"--sweep_storage='sqlite:///{database}' reads it from there" in said
    assert "random forest" in found.importance.method and "trial-0004 is empty" in said

    database.rename(tmp_path / "moved.db")
    found = compared(folder, storage=f"sqlite:///{tmp_path / 'moved.db'}")
    assert "fANOVA of optuna" in found.importance.method
    assert next(iter(found.importance.shares)) == "optim.learning_rate"
    assert "trial-0004 failed: out of memory" in "\n".join(found.notes)
    with pytest.raises(UserError, match="--sweep_storage does not give the study 'sweep' of .*: there is no file"):
        compared(folder, storage=f"sqlite:///{tmp_path / 'none.db'}")
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "other.db").touch()
    with pytest.raises(UserError, match="it does not open"):
        compared(folder, storage=f"sqlite:///{tmp_path / 'other.db'}")

    folder.rename(tmp_path / "renamed")  # its study keeps its name
    found = compared(tmp_path / "renamed", storage=f"sqlite:///{tmp_path / 'moved.db'}")
    assert "fANOVA of optuna" in found.importance.method


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("postgresql://anna:s3cret@host:5432/sweeps", "postgresql://host:5432/sweeps"),
        ("mysql+pymysql://anna:p%40ss@host/sweeps?password=s3cret&user=anna", "mysql+pymysql://host/sweeps"),
        ("sqlite:////data/study.db", "sqlite:////data/study.db"),
        ("sqlite:///file:s.db?uri=true&password=s3cret", "sqlite:///file:s.db?uri=true&password=***"),
        ("/data/journal", "/data/journal"),
    ],
)
def test_no_secret_of_a_storage_is_kept(url, kept):
    pytest.importorskip("optuna")
    from bigbase_jax.sweep.study import without_secrets

    assert without_secrets(url) == kept


def test_what_a_hostile_folder_names_is_neither_opened_nor_run_nor_waited_for(tmp_path):
    pytest.importorskip("optuna")
    from optuna.storages.journal import JournalFileBackend, _base

    assert not issubclass(JournalFileBackend, _base.BaseJournalSnapshot)  # whose snapshots are pickles
    outside = tmp_path / "outside.jsonl"
    outside.write_text('{"op_code": 0}\n')
    folder = tmp_path / "sweep"
    make_run(folder / "trial-0000")
    os.mkfifo(folder / "fifo")
    (folder / "link").symlink_to(outside)
    (folder / "deep").write_text("[" * 60000)
    for word in ("mysql://u:s3cret@host/db", str(outside), "\x1b[2J"):
        (folder / "storage.json").write_text(json.dumps({"storage": word, "study": "s"}))
        (said,) = (note for note in compared(folder).notes if "sweep_storage" in note)
        assert "s3cret" not in said and "\x1b" not in said
    assert not list(compare.studies._journals(folder))
    (folder / "storage.json").write_text("[" * 60000)
    compared(folder)


def test_a_sweep_is_ranked_by_what_it_searched_for(tmp_path):
    make_sweep(tmp_path, 5)
    by_accuracy = [g.name for g in compared(tmp_path).groups]
    (tmp_path / "summary.json").write_text(json.dumps({"metric": "loss", "mode": "max"}))
    found = compared(tmp_path)
    assert (found.goal.metric, found.goal.lower) == ("loss", False)
    values = [found.goal.value(g.runs[0]) for g in found.groups]
    assert values == sorted(values, reverse=True) and [g.name for g in found.groups] != by_accuracy
    assert values[0] == found.groups[0].runs[0].curve("eval", "loss", "val")[-1][1]  # the last, as none kept the best
    (tmp_path / "summary.json").write_text(json.dumps({"metric": "val/loss", "mode": "max"}))  # of an evaluator
    again = compared(tmp_path)
    assert [g.name for g in again.groups] == [g.name for g in found.groups]
    assert again.known["val/loss"] == again.known["loss"]


def test_the_forest_finds_what_matters():
    rng = np.random.default_rng(0)
    trials = [
        ({"rate": x, "kind": "a" if y else "b", "same": 1, "noise": z}, 3 * x + y)
        for x, y, z in zip(rng.random(60), rng.integers(0, 2, 60), rng.random(60), strict=True)
    ]
    found = importance.of_forest(trials)
    assert list(found.shares)[:2] == ["rate", "kind"] and found.shares["noise"] < 0.1 and "same" not in found.shares
    assert "at least 8 trials" in importance.weigh(trials[:3], [])
    assert "not 2" in importance.weigh([({"a": i % 2}, float(i)) for i in range(20)], [])  # seeds are no settings
    assert "are the same" in importance.of_forest([({"a": 1}, 2.0)] * 9)
    assert list(importance.encoded([None, "a", 3, None])) == [2, 0, 1, 2]


# --------------------------------------------------------------------------------------------------- tables, page, CSV


def test_the_page_holds_everything_and_escapes_names(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", skill=2.0, rate=0.25, note=NASTY)
    found = compared(tmp_path / "a", tmp_path / "b")
    page = page_of(found, tmp_path)
    words = ("They differ in learning_rate, note", NASTY, "0.25", "Against a", "better", "Right alone", "2 runs",
             "Loss, train", "Accuracy, val", "What differs", "config.optim")  # fmt: skip
    for word in words:
        assert word in page.words, word
    assert page.words.count("Its mean confidence") == 2 and "Confusion matrix" in page.words  # of both, side by side
    assert page.tags.count("svg") >= 6
    alone = page_of(compared(tmp_path / "a"), tmp_path)
    assert "Against" not in alone.words and "Accuracy" in alone.words


def test_runs_of_different_data_are_shown_but_none_is_called_the_best(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", skill=2.0, fingerprint="f2", note=1)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert tables.best(found, "accuracy") == [] and tables.summary(found)["best"] == {"accuracy": []}
    words = page_of(found, tmp_path).words
    assert "none is called the best" in words and "1 setting that only some of them have" in words
    assert tables.csv_files(found)["pairs.csv"].startswith("baseline,group,metric")


def test_models_that_differ_are_named(tmp_path):
    for name, model in (("a", "bigbase_jax.models.bag_of_words:BagOfWords"), ("b", "bigbase_jax.models.bert:Bert")):
        make_run(tmp_path / name)
        path = tmp_path / name / "config.json"
        config = json.loads(path.read_text())
        config["task"]["model"] = {"target": model}
        path.write_text(json.dumps(config))
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.against == "Bert against BagOfWords" and "Bert against BagOfWords" in page_of(found, tmp_path).words
    assert "BagOfWords against Bert. metrics on test" in page_of(found, tmp_path).words
    assert compared(tmp_path / "a", tmp_path / "a").models == {}


def test_the_same_examples_are_compared_however_they_were_encoded(tmp_path):
    make_run(tmp_path / "a", fingerprint="read by words", examples="e1")
    make_run(tmp_path / "b", skill=2.0, fingerprint="read by bytes", examples="e1", width=8)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert {pair.metric for pair in found.pairs} == {"accuracy", "loss", "f1", "auc"} and found.notes == []
    assert tables.best(found, "accuracy") == ["b"]
    make_run(tmp_path / "b", skill=2.0, fingerprint="read by bytes", examples="e2", width=8)
    found = compared(tmp_path / "a", tmp_path / "b")
    assert found.pairs == [] and "different data (fingerprints e1 and e2)" in found.notes[0]


def test_csv_files_hold_what_was_measured(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"a-{seed}", seed=seed)
    make_run(tmp_path / "b", skill=2.0, rate=0.25)
    found = compared(tmp_path / "a-0", tmp_path / "a-1", tmp_path / "b")
    read = {name: list(csv.DictReader(text.splitlines())) for name, text in tables.csv_files(found).items()}
    assert [row["optim.learning_rate"] for row in read["runs.csv"]] == ["0.1", "0.1", "0.25"]
    assert [row["seed"] for row in read["runs.csv"]] == ["0", "1", "0"]
    a = next(row for row in read["groups.csv"] if (row["group"], row["metric"]) == ("a", "accuracy"))
    values = [float(row["test/accuracy"]) for row in read["runs.csv"][:2]]
    assert float(a["mean"]) == np.mean(values) and float(a["standard_deviation"]) == pytest.approx(
        np.std(values, ddof=1)
    )
    assert float(read["pairs.csv"][0]["difference"]) == found.pairs[0].difference


# --------------------------------------------------------------------------------------------------------- whole runs


def test_two_trained_runs(tmp_path, capsys):
    """``--mode=compare`` itself is run with the commands of docs/compare.md."""
    for name, rate in (("slow", 0.05), ("fast", 0.5)):
        config = runpy.run_path("configs/catdog_mlp.py")["get_config"]("tiny")
        config.optim.learning_rate = rate
        config.train.update(steps=2, devices=1)
        verbs.train(config, str(tmp_path / name))
        shutil.rmtree(tmp_path / name / "checkpoints")  # neither the model nor the data is needed
    capsys.readouterr()
    result = verbs.compare([str(tmp_path / name) for name in ("slow", "fast")], str(tmp_path / "out"))
    out, err = capsys.readouterr()
    assert result["baseline"] == "slow"
    assert {p["metric"] for p in result["pairs"]} == {"accuracy", "log_loss", "f1", "f1_positive", "auc"}
    assert "What differs" in out and "optim.learning_rate" in out and "Against slow" in out and "comparison:" in err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "comparison.html",
        "groups.csv",
        "pairs.csv",
        "runs.csv",
    ]
    text = (tmp_path / "out" / "comparison.html").read_text()
    assert result["comparison"].endswith("comparison.html") and "Against slow" in Page(text).words
    accuracy = json.loads((tmp_path / "fast" / "eval-test.json").read_text())["accuracy"]
    pair = next(p for p in result["pairs"] if p["metric"] == "accuracy")
    assert pair["value"] == pytest.approx(accuracy) and pair["examples"] == 32


def test_other_modes_take_one_folder():
    assert cli.only("workdir", ["a"], "report") == "a" and cli.only("workdir", None, "report") == ""
    with pytest.raises(UserError, match=r"--mode=report takes one --workdir, not 2 \(a, b\)"):
        cli.only("workdir", ["a", "b"], "report")
