"""Audits: the bound on epsilon by simulation and by hand, exposure, and canaries in a run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from toys import Regression

from bigbase_jax import parallel
from bigbase_jax.core import Loss, Sum, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.canaries import Canaries
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs
from bigbase_jax.evaluators.membership import Exposure, Membership, epsilon_bound
from bigbase_jax.runtime.redact import refuse


def test_without_delta_the_bound_is_the_binomials():
    """Randomised response: a guess is right with probability e^eps / (1 + e^eps)."""
    found = epsilon_bound(1000, 100, 80, 0.0, 0.05)
    right = 1 / (1 + np.exp(-found))
    assert stats.binom.sf(79, 100, right) == pytest.approx(0.05, rel=1e-4)
    assert epsilon_bound(1000, 100, 55, 0.0, 0.05) == 0 and epsilon_bound(1000, 100, 55, 1e-5, 0.05) == 0
    assert 0 < epsilon_bound(1000, 100, 80, 1e-5, 0.05) < found < epsilon_bound(1000, 100, 90, 0.0, 0.05)


def test_the_bound_holds_for_randomised_response():
    """Of 80 audits of a mechanism of epsilon 1, no more than 5 % may find more; the most guesses are best here."""
    rng, above, found = np.random.default_rng(0), 0, []
    for _ in range(80):
        member = rng.random(400) < 0.5
        told = np.where(rng.random(400) < 1 / (1 + np.exp(-1.0)), member, ~member)
        metrics = Membership(delta=0.0).measured(told + 1e-3 * rng.random(400), member)
        found.append(metrics["epsilon_bound"])
        above += found[-1] > 1.0
    assert above / 80 <= 0.05 and 0.5 < np.median(found) < 1.0


def test_scores_of_canaries():
    member = np.arange(200) % 2 == 0
    perfect = Membership().measured(member + 0.0, member)
    assert perfect["attack_auc"] == 1 and perfect["attack_tpr"] == 1 and perfect["epsilon_bound"] > 3
    for name in ("exposure", "exposure_most"):
        assert perfect[name] == pytest.approx(np.log2(101))  # each is the first of 101
    blind = Membership().measured(np.random.default_rng(0).random(200), member)
    assert 0.4 < blind["attack_auc"] < 0.6 and blind["epsilon_bound"] < 0.1
    middle = Membership().measured(np.array([3.0, 4.0, 2.0, 1.0]), np.array([True, False, False, False]))
    assert middle["exposure"] == pytest.approx(np.log2(4 / 2))
    assert Membership().measured(np.where(member, np.nan, 1.0), member)["attack_auc"] == 0


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    data = Canaries(DrawnCatsAndDogs(size=32, num_train=60, num_val=8, num_test=8), count=40)
    return Data(data, 8, cache_dir=str(tmp_path_factory.mktemp("cache"))).prepare(lambda line: None)


def test_half_of_the_canaries_are_trained_on_with_wrong_labels(drawn):
    original = DrawnCatsAndDogs(size=32, num_train=60, num_val=8, num_test=8).splits["train"]
    canaries, train = (drawn.source(name) for name in ("canary", "train"))
    names = {original.name(i): i for i in range(60)}
    members = [bool(canaries[i]["member"]) for i in range(40)]
    assert 8 < sum(members) < 32 and len(train) == 60 - 40 + sum(members)
    there = {train.name(i): i for i in range(len(train))}
    for i, member in enumerate(members):
        own = original[names[canaries.name(i)]]
        assert canaries[i]["label"] != own["label"] and (canaries[i]["image"] == own["image"]).all()
        assert (canaries.name(i) in there) == member
        if member:
            assert train[there[canaries.name(i)]]["label"] == canaries[i]["label"]
    assert sum(train[i]["label"] != original[names[train.name(i)]]["label"] for i in range(len(train))) == sum(members)
    assert "member" not in train[0] and sorted(drawn.splits) == ["canary", "test", "train", "val"]


def test_an_audit_reads_the_loss_of_each_canary():
    member = np.arange(12) % 3 == 0
    x = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
    task = Regression()
    variables = task.init(jax.random.key(0), {"x": x})
    y = np.asarray(task.predict(variables, {"x": x})["y_hat"]) + np.where(member, 0.1, 2.0)
    batch = {"x": x, "y": y, "mask": np.ones(12, np.float32), "member": member.astype(np.float32)}
    batch["index"] = np.arange(12, dtype=np.int32)
    data = types.SimpleNamespace(splits=["canary"], eval_batches=lambda split, host: [batch])
    mesh = parallel.make_mesh(1)
    found = Membership().run(task, variables, data, mesh)
    np.testing.assert_allclose(found.examples["loss"], np.where(member, 0.01, 4.0), rtol=1e-4)
    assert found.metrics["attack_auc"] == 1 and found.metrics.keys() > Membership.metrics.keys()
    titles = [figure.title for figure in Membership().figures(found)]
    assert titles == ["Guessing who was trained on", "Members found", "Losses of canaries"]
    assert not list(Membership().figures(found._replace(examples={}, metrics={})))


def test_references_tell_what_is_hard_from_what_was_not_seen(tmp_path):
    """LiRA: by the loss alone, hard canaries hide that they were trained on."""
    rng = np.random.default_rng(0)
    difficulty, paths, losses = rng.uniform(-6, 6, 300), [], []
    for run in range(5):
        member = rng.random(300) < 0.5
        confidence = 0.2 * member - difficulty + rng.normal(0, 0.04, 300)  # log(p / (1 - p))
        losses.append((np.log1p(np.exp(-confidence)), member))
        paths.append(tmp_path / str(run))
        paths[-1].mkdir()
        np.savez(paths[-1] / "predictions-membership.npz", loss=losses[-1][0], member=member.astype(np.float32))
    (loss, member), lira = losses[0], Membership(references=tuple(map(str, paths[1:])))
    assert Membership().measured(-loss, member)["attack_auc"] < 0.6
    assert lira.measured(lira._above(loss), member)["attack_auc"] > 0.95
    with pytest.raises(UserError, match="has kept no audit of 299 canaries"):
        lira._above(loss[1:])
    with pytest.raises(UserError, match="nowhere has kept no audit"):
        Membership(references=("nowhere",))._above(loss)


def test_other_coins_choose_among_the_same_canaries(drawn, tmp_path):
    data = Canaries(DrawnCatsAndDogs(size=32, num_train=60, num_val=8, num_test=8), count=40, coins=1)
    other = Data(data, 8, cache_dir=str(tmp_path)).prepare(lambda line: None)
    one, two = (prepared.source("canary") for prepared in (drawn, other))
    pairs = [(one[i], two[i]) for i in range(40)]
    assert all(a["label"] == b["label"] and (a["image"] == b["image"]).all() for a, b in pairs)
    assert 8 < sum(bool(a["member"] != b["member"]) for a, b in pairs) < 32
    assert drawn.fingerprint() != other.fingerprint()


class Knows(Regression):
    """A text costs as much as it differs from the one that the model knows."""

    def loss(self, variables, batch, key):
        return Loss({"loss": Sum(jnp.sum(jnp.abs(batch["x"] - variables["known"])), jnp.float32(1))}), {}


def test_a_secret_that_the_model_knows_is_exposed():
    def read(text):
        return [{"x": np.array([ord(c) for c in text], np.float32)}]

    def run(**words):
        data = types.SimpleNamespace(data=types.SimpleNamespace(dataset=types.SimpleNamespace(read=read)))
        known = {"known": read("pin 4821-Xq.")[0]["x"]}
        return Exposure(prefix="pin ", suffix=".", alternatives=500, **words).run(Knows(), known, data, None)

    found = run(planted=("4821-Xq", "0000-Aa"))
    first, second = (row["exposure"] for row in found.metrics["secrets"])
    assert first == pytest.approx(np.log2(501), abs=0.01) and second < 4
    assert found.metrics["found"] == 0.5 and found.metrics["exposure_most"] == first
    assert found.metrics.keys() >= Exposure.metrics.keys()
    refuse({"evaluators": {"secrets": dataclasses.asdict(Exposure(("4821-Xq",)))}})  # a config may hold it
    (table,) = Exposure(("1",)).figures(found)
    assert [row[0] for row in table.rows] == [1, 2] and "4821" not in repr((found, table))
    with pytest.raises(UserError, match="the 2. of the secrets has no letter or digit"):
        Exposure(("1", "--"))
    no_text = types.SimpleNamespace(data=types.SimpleNamespace(dataset=object()))
    with pytest.raises(UserError, match="for language models"):
        Exposure(("1",)).run(Knows(), {}, no_text, None)


@pytest.mark.parametrize(("count", "told"), [(0, "count=0"), (61, "60 training examples, of which 61")])
def test_canaries_that_cannot_be(count, told, tmp_path):
    with pytest.raises(UserError, match=told):
        Canaries(DrawnCatsAndDogs(size=32, num_train=60, num_val=8, num_test=8), count).prepare(tmp_path, 0, print)
