"""Logs of interactions against slow readers of the same, and what is said of faults."""

import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.synthetic.interactions import SyntheticInteractions
from bigbase_jax.data.sources.table import interactions
from bigbase_jax.data.sources.table.interactions import InteractionFiles, Interactions, Log


class Given(Interactions):
    """A log in memory."""

    def origin(self):
        return "the log"

    def file_signature(self):
        return ["given"]

    def log(self, cache, limit_bytes, say):
        return self.given


def histories(user, item, time=None, **more):
    extra = {key: more.pop(key) for key in list(more) if key in ("rating", "min_rating")}
    made = Given(**more)
    object.__setattr__(made, "given", Log(*(x if x is None else np.asarray(x) for x in (user, item, time)), **extra))
    return made.prepare(pathlib.Path("nowhere"), 0, print)


def files(tmp_path, name, text, **more):
    (tmp_path / name).write_text(text)
    return InteractionFiles(root=str(tmp_path / name), **more).prepare(tmp_path / "cache", 0, print)


def slow(user, item, time, core=0, repeats=True):
    """The items of each user in order, by name."""
    rows = list(dict.fromkeys((u, i, t, n) for n, (u, i, t) in enumerate(zip(user, item, time, strict=True))))
    seen, kept = set(), []
    for u, i, t, _ in sorted(rows, key=lambda row: (row[0], row[2], row[3])):
        if (u, i, t) not in seen and (repeats or (u, i) not in seen):
            kept.append((u, i))
        seen |= {(u, i, t), (u, i)}
    while core:
        users, items = ([row[k] for row in kept] for k in (0, 1))
        left = [(u, i) for u, i in kept if users.count(u) >= core and items.count(i) >= core]
        if left == kept:
            break
        kept = left
    found = {}
    for u, i in kept:
        found.setdefault(str(u), []).append(str(i))
    return found


def told(data):
    """The same of a data set."""
    users = np.arange(len(data.user_names))
    begin, end = data._begin[users], np.append(data._begin[1:], len(data._items))
    padded = data.padded(begin, end)
    return {data.user_names[u]: [data.item_names[i - 1] for i in row if i] for u, row in enumerate(padded)}


@pytest.mark.parametrize("how", [{}, {"core": 4}, {"repeats": False}, {"core": 3, "repeats": False}])
@pytest.mark.parametrize("rows", [7, 1 << 22])  # sorted in many parts, or at once
def test_a_log_is_sorted_filtered_and_numbered_as_a_slow_reader_does(how, rows, monkeypatch):
    monkeypatch.setattr(interactions, "_ROWS", rows)
    random = np.random.default_rng(0)
    user, item = 10**12 + 3 * random.integers(0, 15, 150), random.integers(0, 20, 150)
    time = random.integers(0, 12, 150)
    expected = slow(user.tolist(), item.tolist(), time.tolist(), **how)
    assert told(histories(user, item, time, **how)) == expected
    assert len(expected) > 5 and (how or max(map(len, expected.values())) > 10)


def test_the_last_is_test_and_the_one_before_is_val():
    data = histories([1, 1, 1, 1, 2, 2, 3], [5, 6, 7, 8, 5, 7, 8], [1, 2, 3, 4, 1, 2, 9], length=2)
    train, val, test = (data.splits[name] for name in ("train", "val", "test"))
    both = train.batch(np.arange(2))
    assert both["user"].tolist() == [0, 1]  # the user of one interaction has nothing to learn from
    assert both["history"].tolist() == [[1, 0], [1, 0]] and both["target"].tolist() == [[2, 0], [3, 0]]
    assert len(val) == len(test) == 1  # users with two have neither
    assert val[0]["history"].tolist() == [1, 2] and val[0]["target"] == 3
    assert test[0]["history"].tolist() == [2, 3] and test[0]["target"] == 4  # of three, the latest two
    assert test.seen(np.array([0])).tolist() == [[1, 2, 3]] and test.relevant(np.array([0])).tolist() == [[4]]
    assert data.counts.tolist() == [0, 2, 1, 1, 1]
    assert data.matrix().toarray().tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert "later than an example of test" in data.description


def test_a_long_history_is_trained_on_in_windows():
    data = histories([1] * 8 + [2] * 4, [*range(10, 18), *range(10, 14)], [*range(8), *range(4)], length=2)
    batch = data.splits["train"].batch(np.arange(len(data.splits["train"])))
    assert batch["user"].tolist() == [0, 0, 0, 1]
    assert batch["history"].tolist() == [[4, 5], [2, 3], [1, 0], [1, 0]]
    assert batch["target"].tolist() == [[5, 6], [3, 4], [2, 0], [2, 0]]
    assert data.splits["train"].lengths.tolist() == [2, 2, 1, 1]


def test_pairs_are_the_interactions_of_train():
    data = histories([1, 1, 1, 1, 2, 2], [5, 6, 7, 8, 5, 7], [1, 2, 3, 4, 1, 2], length=2, pairs=True)
    pairs = data.splits["train"].batch(np.arange(4))
    assert pairs["user"].tolist() == [0, 0, 1, 1] and pairs["item"].tolist() == [1, 2, 1, 3]
    assert pairs["history"].tolist() == [[0, 0], [1, 0], [0, 0], [1, 0]]
    np.testing.assert_allclose(np.exp(pairs["log_q"]), [0.5, 0.25, 0.5, 0.25], rtol=1e-6)
    assert len(data.splits["train"]) == 4


def test_a_split_by_time_leaks_nothing():
    random = np.random.default_rng(1)
    user, item, time = random.integers(0, 30, 600), random.integers(0, 25, 600), random.integers(0, 1000, 600)
    data = histories(user, item, time, split="time", val_fraction=0.2, test_fraction=0.2)
    order = np.sort(time)
    first, second = order[360], order[480]
    assert data.counts.sum() == (time < first).sum()
    test, counted = data.splits["test"], 0
    for n in range(len(test)):
        u = int(data.user_names[test[n]["user"]])
        mine = [(t, i) for t, i, w in zip(time, item, user, strict=True) if w == u]
        then = [str(i) for t, i in sorted(mine, key=lambda row: row[0]) if t >= second]
        given = test.relevant(np.array([n]))[0]
        assert sorted(then) == sorted(data.item_names[i - 1] for i in given if i)
        counted += len(then)
    assert counted == (time >= second).sum()  # all users had something before
    new = histories(
        [1, 1, 1, 2, 2], [1, 2, 1, 1, 2], [1, 2, 3, 9, 10], split="time", val_fraction=0.2, test_fraction=0.2
    )
    assert "1 users of test have nothing in train" in new.description
    assert "val" not in new.splits and len(new.splits["test"]) == 1  # who had nothing before is not asked for a choice


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Video.txt", "1 10\n1 11\n1 12\n2 10\n2 12\n2 11\n"),  # SASRec
        (
            "ratings.csv",
            "userId,movieId,rating,timestamp\n2,10,1,7\n1,11,4,2\n1,10,4,1\n1,12,4,3\n2,12,1,8\n2,11,5,9\n",
        ),
        (
            "u.data",
            "2\t10\t1\t881250949\n1\t10\t3\t1\n1\t11\t3\t2\n1\t12\t3\t3\n2\t12\t3\t881250950\n2\t11\t3\t881250951\n",
        ),
        ("ratings.dat", "2::10::1::5\n1::10::1::5\n1::11::1::6\n1::12::1::7\n2::12::1::8\n2::11::1::9\n"),
        ("log.inter", "user_id:token\titem_id:token\n1\t10\n1\t11\n1\t12\n2\t10\n2\t12\n2\t11\n"),
    ],
)
def test_releases_are_read(tmp_path, name, text):
    data = files(tmp_path, name, text)
    assert told(data) == {"1": ["10", "11", "12"], "2": ["10", "12", "11"]}


def test_ids_by_name_dates_and_least_ratings(tmp_path):
    rows = ["Bob,tea,4,2024-01-03", "Ann,tea,5,2024-01-02", "Ann,cake,1,2024-01-01", "Ann,milk,,2024-01-05"]
    text = "\n".join(["user,item,rating,date", *rows, "Ann,rum,4,", ",rum,4,2024-01-01"]) + "\n"
    data = files(tmp_path, "log.csv", text, min_rating=3.0)
    assert told(data) == {"Bob": ["tea"], "Ann": ["tea"]}
    assert "2 without a user, an item or a time left out" in data.description
    assert "2 with a rating below 3 left out" in data.description
    ids = {"who": pa.array([10**12 + 1, 10**12, 10**12 + 1]), "what": pa.array(["a b c d e", "f g h i j", "k l m n o"])}
    pq.write_table(pa.table(ids), tmp_path / "log.parquet")
    data = InteractionFiles(root=str(tmp_path / "log.parquet"), user="who", item="what").prepare(tmp_path, 0, print)
    assert told(data)["1000000000001"] == ["a b c d e", "k l m n o"]


def test_what_is_built_is_kept_and_found(tmp_path):
    text = "user,item\n" + "".join(f"{u},{i}\n" for u in range(4) for i in range(u, u + 4))
    (tmp_path / "log.csv").write_text(text)
    made, said = InteractionFiles(root=str(tmp_path / "log.csv")), []
    first, again = (made.prepare(tmp_path / "cache", 1e9, said.append) for _ in range(2))
    assert told(first) == told(again) and sum("sorting" in line for line in said) == 1
    assert first.fingerprint() == again.fingerprint() and first.description == again.description
    other = InteractionFiles(root=str(tmp_path / "log.csv"), core=2).prepare(tmp_path / "cache", 1e9, print)
    assert other.fingerprint() != first.fingerprint() and len(other.item_names) < len(first.item_names)


def test_faults_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no interaction is left of 4"):
        histories([1, 2, 3, 4], [1, 2, 3, 4], core=5)
    with pytest.raises(UserError, match="has no interaction"):
        histories(np.zeros(0, int), np.zeros(0, int))
    with pytest.raises(UserError, match="has no interaction"):
        histories([1.0, 2.0], [np.nan, np.nan])
    with pytest.raises(UserError, match="times are the same"):
        histories([1, 1], [1, 2], [5, 5], split="time")
    with pytest.raises(UserError, match="needs times"):
        histories([1, 1], [1, 2], split="time")
    with pytest.raises(UserError, match="say which holds the users with user="):
        files(tmp_path, "a.csv", "customer,product\nx,y\n")
    with pytest.raises(UserError, match="holds no times but a category"):
        files(tmp_path, "b.csv", "user,item,time\n1,2,noon\n1,3,dawn\n")
    with pytest.raises(UserError, match="has no column of ratings"):
        files(tmp_path, "c.csv", "user,item\n1,2\n", min_rating=3.0)
    with pytest.raises(UserError, match="has no column 'usr'"):
        files(tmp_path, "d.csv", "user,item\n1,2\n", user="usr")
    with pytest.raises(UserError, match="split is 'random'"):
        Interactions(split="random")


def test_made_up_choices_follow_the_probabilities_that_are_stated(tmp_path):
    made = SyntheticInteractions(users=400, num_items=40, groups=4)
    data = made.prepare(tmp_path, 0, print)
    test = data.splits["test"]
    every = np.arange(len(test))
    p_NX, target_N = data.best(test.seen(every)), test.batch(every)["target"]
    np.testing.assert_allclose(p_NX.sum(1), 1, rtol=1e-5)
    assert (np.take_along_axis(p_NX, test.seen(every), 1) == 0).all() and (p_NX[every, target_N] > 0).all()
    # the mean log-probability of what was chosen is about what these probabilities expect of it
    log_NX = np.log(np.where(p_NX > 0, p_NX, 1))
    expected_N, variance_N = (p_NX * log_NX).sum(1), (p_NX * log_NX**2).sum(1) - (p_NX * log_NX).sum(1) ** 2
    off = (log_NX[every, target_N] - expected_N).sum() / np.sqrt(variance_N.sum())
    assert abs(off) < 4
    same = SyntheticInteractions(users=400, num_items=40, groups=4).prepare(tmp_path, 0, print)
    other = SyntheticInteractions(users=400, num_items=40, groups=4, seed=1).prepare(tmp_path, 0, print)
    assert told(same) == told(data) != told(other)
    assert "the best ranking is expected to have HR@10" in data.description
