"""Batches: which examples, in which order, with which augmentation, for any number of threads, hosts and restarts."""

import dataclasses
import itertools
import threading
import time
from typing import ClassVar

import grain
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data, apply_eval
from bigbase_jax.data.shuffle import poisson, shuffled


class Numbers:
    """n examples; ``broken`` ones raise."""

    def __init__(self, n, broken=(), shape=(4, 5, 1)):
        self.n, self.broken, self.shape = n, set(broken), shape
        self.labels = np.arange(n, dtype=np.int32) % 2

    def __len__(self):
        return self.n

    def name(self, index):
        return f"{index}.jpg"

    def __getitem__(self, index):
        if index in self.broken:
            raise UserError(f"{index}.jpg is cut short")
        return {"image": np.full(self.shape, index % 251, np.uint8), "label": int(index % 2)}


class Columns(Numbers):
    """The same, also read by columns; counts how."""

    def __init__(self, *args):
        super().__init__(*args)
        self.rows = self.batches = 0

    def __getitem__(self, index):
        self.rows += 1
        return super().__getitem__(index)

    def batch(self, indices):
        if self.broken.intersection(indices.tolist()):
            raise UserError("somewhere, something is cut short")
        self.batches += 1
        image = np.broadcast_to((indices % 251).astype(np.uint8)[:, None, None, None], (len(indices), *self.shape))
        return {"image": image.copy(), "label": (indices % 2).astype(np.int32)}


@dataclasses.dataclass
class Set:
    splits: dict
    dataset_info: ClassVar = {"num_classes": 2, "class_names": ("cat", "dog")}
    description: ClassVar = "numbers for a test"

    def fingerprint(self):
        return "numbers"


@dataclasses.dataclass(frozen=True)
class Noise:
    """Adds an entry that shows the generator's state."""

    random: ClassVar[bool] = True

    def __call__(self, example, rng):
        return {**example, "noise": rng.random(3, np.float32)}


@pytest.fixture
def prepare(tmp_path):
    def make(n=10, batch_size=4, broken=(), val=7, source=None, **kwargs):
        splits = {"train": source or Numbers(n, broken), "val": Numbers(val)}
        kwargs = {"train_transforms": (Noise(),), "workers": 1, "cache_dir": str(tmp_path), **kwargs}
        return Data(Set(splits), batch_size, **kwargs).prepare(lambda line: None)

    return make


def take(batches, count):
    with batches:
        return list(itertools.islice(batches, count))


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name, strict=True)


# --- training batches -------------------------------------------------------------------------------------------------


def test_entries_and_types(prepare):
    (batch,) = take(prepare().train_batches(0), 1)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((4, 4, 5, 1), "uint8"),
        "label": ((4,), "int32"),
        "noise": ((4, 3), "float32"),
        "mask": ((4,), "float32"),
        "index": ((4,), "int32"),
    }
    np.testing.assert_array_equal(batch["label"], batch["index"] % 2)
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    assert (batch["mask"] == 1).all()


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (3, 8), (1, 2), (130, 13)])
def test_every_epoch_is_another_permutation(prepare, n, batch_size):
    epochs = 6
    batches = take(prepare(n, batch_size).train_batches(0), -(-epochs * n // batch_size))
    stream = np.concatenate([b["index"] for b in batches])[: epochs * n].reshape(epochs, n)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(n), (epochs, 1)))
    if n >= 10:
        assert len({tuple(epoch) for epoch in stream}) == epochs
        assert not any((epoch == np.arange(n)).all() for epoch in stream)


def test_each_use_of_an_example_is_augmented_anew_and_seeds_differ(prepare):
    runs = [take(prepare(seed=seed).train_batches(0), 30) for seed in (0, 1)]
    noise = np.concatenate([b["noise"] for run in runs for b in run])
    assert len(np.unique(noise)) > 0.99 * noise.size
    stream = [np.concatenate([b["index"] for b in run]).reshape(12, 10) for run in runs]
    assert not {tuple(e) for e in stream[0]} & {tuple(e) for e in stream[1]}  # no epoch in common, shifted or not


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("start", [0, 7, 10**6])
def test_step_k_is_the_same_for_any_start_and_any_number_of_threads(prepare, workers, start):
    reference = prepare(batch_size=6, prefetch=0)
    expected = take(reference.train_batches(start), 5)
    assert (expected[0]["noise"] != expected[1]["noise"]).all()
    found = take(prepare(batch_size=6, workers=workers, prefetch=2).train_batches(start), 5)
    assert_same(found, expected)
    if start == 7:
        assert_same(take(reference.train_batches(0), 12)[7:], expected)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_what_one_host_sees(prepare, hosts):
    data = prepare(n=11, batch_size=8)
    whole = take(data.train_batches(3), 6)
    shards = [take(data.train_batches(3, (i, hosts)), 6) for i in range(hosts)]
    assert all(len(b["index"]) == 8 // hosts for shard in shards for b in shard)
    joined = [{k: np.concatenate([s[j][k] for s in shards]) for k in whole[j]} for j in range(6)]
    assert_same(joined, whole)


def test_the_order_and_the_augmentation_stay_what_they_have_been(prepare):
    """Change these only on purpose: every published number would be another one."""
    batches = take(prepare().train_batches(0), 5)
    assert [b["index"].tolist() for b in batches] == ORDER
    np.testing.assert_allclose([b["noise"][0, 0] for b in batches], NOISE, rtol=1e-6)


ORDER = [[5, 8, 9, 7], [4, 2, 1, 0], [3, 6, 6, 9], [4, 8, 0, 7], [3, 2, 1, 5]]
NOISE = [0.03474188, 0.12112302, 0.8763935, 0.53440434, 0.38778871]


# --- buckets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 7, 256, 65535, 65536, 65537, 65538, 10**6, 2**40 + 1])
def test_the_order_is_the_shuffle_of_grain(n):
    for seed in (0, 2**32 - 1):
        stream = grain.MapDataset.range(n).shuffle(seed=seed).repeat()
        positions = np.unique([*range(min(n, 9)), *range(max(n - 5, 0), n + 5), *range(5 * n, 5 * n + 5)])
        expected = [int(stream[int(position)]) for position in positions]
        np.testing.assert_array_equal(shuffled(positions, n, seed), expected)


@pytest.mark.parametrize("hosts", [1, 2])
def test_batches_read_by_columns_are_those_read_row_by_row(prepare, hosts):
    kwargs = {"train_transforms": (), "eval_transforms": (), "cache_limit_gb": 0.0, "seed": 3}
    columns = Columns(11)
    by_row, by_column = (prepare(source=source, **kwargs) for source in (Numbers(11), columns))
    for host in range(hosts):
        args = {"shard": (host, hosts)}
        assert_same(take(by_column.train_batches(2, **args), 5), take(by_row.train_batches(2, **args), 5))
        assert_same(list(by_column.eval_batches("train", **args)), list(by_row.eval_batches("train", **args)))
    assert columns.rows == 0 < columns.batches
    assert by_column.summary()[1] == by_row.summary()[1]


@pytest.mark.parametrize("check", ["all", "none"])
def test_what_is_read_by_columns_may_have_unreadable_rows(prepare, check):
    kwargs = {"train_transforms": (), "on_bad_example": "skip", "check": check}
    columns = Columns(11, (4,))
    by_row, by_column = (prepare(source=source, **kwargs) for source in (Numbers(11, (4,)), columns))
    assert by_column.bad == by_row.bad == {"train": [(4, "4.jpg is cut short")] if check == "all" else [], "val": []}
    assert_same(list(by_column.eval_batches("train")), list(by_row.eval_batches("train")))
    assert columns.batches > 0 and (check == "none" or "read in columns" in "".join(by_column.summary()))


def test_a_transform_reads_row_by_row(prepare):
    columns = Columns(11)
    by_row, by_column = (prepare(source=s, train_transforms=(Noise(),)) for s in (Numbers(11), columns))
    assert_same(take(by_column.train_batches(2), 5), take(by_row.train_batches(2), 5))


class Words(Numbers):
    """Sequences of 1 to 9 places that are padded to 10 with 0; the second entry has no length."""

    sequences = ("tokens",)

    def __init__(self, n, broken=()):
        super().__init__(n, broken)
        self.lengths = 1 + np.random.default_rng(5).integers(0, 9, n)

    def __getitem__(self, index):
        return {
            "tokens": np.arange(1, 11) * (np.arange(10) < self.lengths[index]),
            "other": super().__getitem__(index)["image"][0],
        }


BUCKETS = {"buckets": (4, 7), "train_transforms": ()}


@pytest.mark.parametrize(("n", "batch_size"), [(200, 8), (50, 8), (7, 4), (3, 4)])
def test_batches_of_a_length_hold_the_examples_that_batches_of_any_length_do(prepare, n, batch_size):
    source = Words(n)
    pool = max(1, min(64, n // batch_size))
    plain = take(prepare(n, batch_size, source=source, train_transforms=()).train_batches(0), 3 * pool)
    data = prepare(n, batch_size, source=source, **BUCKETS)
    found = take(data.train_batches(0), 3 * pool)
    for first in range(0, 3 * pool, pool):
        here, there = (np.concatenate([b["index"] for b in bs[first : first + pool]]) for bs in (found, plain))
        np.testing.assert_array_equal(np.sort(here), np.sort(there))
    for batch in found:
        most = source.lengths[batch["index"]].max()
        length = next(b for b in (4, 7, 10) if b >= most)
        assert batch["tokens"].shape == (batch_size, length) and batch["other"].shape == (batch_size, 5, 1)
        np.testing.assert_array_equal(batch["tokens"], [source[i]["tokens"][:length] for i in batch["index"]])
    lengths = [b["tokens"].shape[1] for b in found]
    if n == 200:
        assert np.mean(lengths) < 7.5 and lengths != sorted(lengths)
        assert [b["tokens"].shape for b in data.train_shapes()] == [(8, 4), (8, 7), (8, 10)]
        assert "  lengths (train): up to 4 " in "\n".join(data.summary())


@pytest.mark.parametrize(("workers", "start", "hosts"), [(1, 0, 1), (3, 13, 1), (1, 10**9, 1), (1, 13, 2), (2, 40, 4)])
def test_step_k_of_a_length_is_the_same_for_any_start_threads_and_hosts(prepare, workers, start, hosts):
    words = {"n": 100, "batch_size": 8, "source": Words(100), **BUCKETS, "train_transforms": (Noise(),)}
    expected = take(prepare(**words, prefetch=0).train_batches(start - min(start, 13)), 18 + min(start, 13))
    expected = expected[min(start, 13) :]
    data = prepare(**words, workers=workers)
    shards = [take(data.train_batches(start, (i, hosts)), 18) for i in range(hosts)]
    assert_same([{k: np.concatenate([s[j][k] for s in shards]) for k in expected[0]} for j in range(18)], expected)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_by_length_covers_each_example_once(prepare, hosts):
    source = Words(30, broken={3})
    data = prepare(source=source, **BUCKETS, on_bad_example="skip", eval_batch_size=4)
    shards = [list(data.eval_batches("train", (i, hosts))) for i in range(hosts)]
    batches = [{k: np.concatenate([b[k] for b in bs]) for k in bs[0]} for bs in zip(*shards, strict=True)]
    real = np.concatenate([b["index"][b["mask"] > 0] for b in batches])
    assert sorted(real) == list(range(29)) and real.tolist() != sorted(real)
    lengths = [b["tokens"].shape[1] for b in batches]
    assert lengths == sorted(lengths) and set(lengths) == {4, 7, 10}
    kept = data.source("train")
    for batch in batches:
        np.testing.assert_array_equal((batch["tokens"] > 0).sum(1), kept.lengths[batch["index"]])


@pytest.mark.parametrize("buckets", [(7, 4), (0, 4), (4, 4)])
def test_buckets_that_do_not_grow_or_have_nothing_to_sort_are_refused(prepare, buckets):
    with pytest.raises(UserError, match="lengths that grow"):
        prepare(source=Words(9), buckets=buckets)
    with pytest.raises(UserError, match="all of one length; leave data.buckets at"):
        prepare(buckets=(4, 7))


# --- evaluation batches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize(("n", "batch_size"), [(7, 4), (8, 4), (9, 4), (3, 8), (1, 4)])
def test_evaluation_covers_each_example_once_in_order(prepare, n, batch_size, hosts):
    data = prepare(val=n, eval_batch_size=batch_size, eval_transforms=(Noise(),))
    iterators = [data.eval_batches("val", (i, hosts)) for i in range(hosts)]
    assert {len(i) for i in iterators} == {-(-n // batch_size)}
    shards = [list(i) for i in iterators]
    assert {len(s) for s in shards} == {-(-n // batch_size)}
    assert {tuple(v.shape for v in b.values()) for s in shards for b in s} == {
        ((batch_size // hosts, 4, 5, 1), *((batch_size // hosts, *r) for r in ((), (3,), (), ())))
    }
    together = [b[k] for bs in zip(*shards, strict=True) for b in bs for k in ("index",)]
    real = [b["mask"] > 0 for bs in zip(*shards, strict=True) for b in bs]
    np.testing.assert_array_equal(np.concatenate(together)[np.concatenate(real)], np.arange(n))
    again = list(data.eval_batches("val", (hosts - 1, hosts)))
    assert_same(again, shards[-1])


def test_evaluation_of_the_training_split_uses_the_evaluation_transforms(prepare):
    batches = list(prepare().eval_batches("train"))
    assert "noise" not in batches[0] and sum(b["mask"].sum() for b in batches) == 10


def test_apply_eval_is_what_evaluation_does(prepare):
    @dataclasses.dataclass(frozen=True)
    class Invert:
        random: ClassVar[bool] = False

        def __call__(self, example, rng):
            return {**example, "image": 255 - example["image"]}

    data = prepare(eval_transforms=(Invert(),))
    batch = next(data.eval_batches("val"))
    np.testing.assert_array_equal(apply_eval(data.data.eval_transforms, Numbers(7)[2], 0)["image"], batch["image"][2])
    assert batch["image"][2, 0, 0, 0] == 253


# --- threads and errors -----------------------------------------------------------------------------------------------


def _ours():
    return {t for t in threading.enumerate() if t.name.startswith(("grain", "bigbase"))}


@pytest.mark.parametrize("workers", [1, 8])
def test_close_ends_the_threads(prepare, workers):
    before = _ours()
    batches = prepare(workers=workers, prefetch=2).train_batches(0)
    next(batches)
    assert _ours() - before
    batches.close()
    deadline = time.monotonic() + 5
    while _ours() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _ours() - before
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("error", [UserError("no such thing"), KeyError("a bug")])
@pytest.mark.parametrize("workers", [1, 8])
def test_errors_in_threads_come_out_as_they_are(prepare, workers, error):
    @dataclasses.dataclass(frozen=True)
    class Fails:
        random: ClassVar[bool] = True

        def __call__(self, example, rng):
            raise error

    with pytest.raises(type(error)) as caught:
        next(prepare(train_transforms=(Fails(),), workers=workers, prefetch=2).train_batches(0))
    assert caught.value is error


def test_shapes_that_differ_are_explained(prepare):
    class Ragged(Numbers):
        def __getitem__(self, index):
            return {"image": np.zeros((4 + index % 3, 5, 1), np.uint8)}

    with pytest.raises(UserError, match=r"train split differ in 'image': uint8\[\d, 5, 1\] and .*Resize or a crop"):
        next(prepare(source=Ragged(10)).train_batches(0))


def test_entries_that_differ_are_explained(prepare):
    class Patchy(Numbers):
        def __getitem__(self, index):
            return {"image": np.zeros(3), **({"label": 1} if index % 2 else {})}

    with pytest.raises(UserError, match="differ in their entries"):
        next(prepare(source=Patchy(10)).train_batches(0))


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"cache_limit_gb": -1.0}, "cache_limit_gb"),
        ({"on_bad_example": "skp"}, "Did you mean 'skip'"),
        ({"n": 0}, "train split has no examples"),
        ({"val": 0}, "val split has no examples"),
    ],
)
def test_mistakes_are_explained(prepare, kwargs, says):
    with pytest.raises(UserError, match=says):
        prepare(**kwargs)


def test_a_missing_split_is_named_with_those_there_are(prepare):
    data = prepare()
    with pytest.raises(UserError, match=r"no split 'vall'.*'val'.*train, val"):
        data.eval_batches("vall")
    with pytest.raises(UserError, match="does not divide over 3 hosts; use 3"):
        data.train_batches(0, (0, 3))
    with pytest.raises(UserError, match="no split 'train'; it has: test"):
        Data(Set({"test": Numbers(3)}), 2).prepare()


# --- unreadable examples ----------------------------------------------------------------------------------------------


def test_unreadable_examples_stop_the_run_with_their_list(prepare):
    for _ in range(2):  # the second time from the verdict of the first
        with pytest.raises(UserError, match=r"2 of 17 .*on_bad_example=skip") as caught:
            prepare(broken=(3, 8))
        assert "3.jpg is cut short" in str(caught.value) and "8.jpg is cut short" in str(caught.value)


@pytest.mark.parametrize("limit", [4.0, 0.0])
def test_unreadable_examples_are_left_out_and_counted(prepare, limit):
    data = prepare(broken=(3, 8), on_bad_example="skip", cache_limit_gb=limit)
    assert data.splits == {"train": 8, "val": 7} and data.num_examples("train") == 8
    assert data.bad == {"train": [(3, "3.jpg is cut short"), (8, "8.jpg is cut short")], "val": []}
    assert "  unreadable, left out: 2 (train 2)" in data.summary()
    assert [data.source("train").name(i) for i in range(8)] == [f"{i}.jpg" for i in (0, 1, 2, 4, 5, 6, 7, 9)]
    np.testing.assert_array_equal(data.source("train").labels, [0, 1, 0, 0, 1, 0, 1, 1])
    batches = take(data.train_batches(0), 2)
    kept = np.array([0, 1, 2, 4, 5, 6, 7, 9])
    for b in batches:
        np.testing.assert_array_equal(b["image"][:, 0, 0, 0], kept[b["index"]])
    whole = prepare(on_bad_example="skip", cache_limit_gb=limit)
    assert data.fingerprint() != whole.fingerprint()
    assert data.lineage()["examples"] != whole.lineage()["examples"]
    assert data.lineage()["data_card"]["unreadable, left out"] == "2 (train 2)"


def test_a_split_without_any_readable_example_is_refused(prepare):
    with pytest.raises(UserError, match="none of the 3 examples of the train split"):
        prepare(n=3, broken=(0, 1, 2), on_bad_example="skip")


def test_a_bug_in_a_source_is_not_taken_for_a_bad_file(prepare):
    class Buggy(Numbers):
        def __getitem__(self, index):
            raise AttributeError("a bug")

    with pytest.raises(AttributeError, match="a bug"):
        prepare(source=Buggy(4), on_bad_example="skip")


def test_summary_tells_counts_and_balance(prepare):
    data = prepare(n=9)
    assert data.steps_per_epoch == 9 / 4
    lines = data.summary()
    assert lines[0] == "data: numbers for a test"
    assert "  train: 9 examples, cat 5 (55.6%), dog 4 (44.4%)" in lines
    assert "  unreadable: none" in lines


# --- data.check -------------------------------------------------------------------------------------------------------


class Counted(Numbers):
    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize(("check", "most"), [("none", 0), ("sample", 256), ("all", 816)])
def test_how_much_is_read_before_the_first_step_is_a_choice(prepare, check, most):
    source = Counted(800)
    data = prepare(source=source, check=check)
    assert source.reads == {"none": 0, "sample": 200, "all": 816}[check] <= most  # 16 to see how large a cache is
    (line,) = [line for line in data.summary() if "unreadable" in line]
    assert line.endswith({"none": "none looked for", "sample": "none among 256 of each split", "all": "none"}[check])
    assert_same(take(data.train_batches(0), 5), take(prepare(source=Numbers(800)).train_batches(0), 5))


def test_an_unreadable_example_that_was_not_looked_for_is_named_or_has_no_weight(prepare):
    with pytest.raises(UserError, match=r"^5.jpg is cut short; mend .* data.on_bad_example=skip"):
        take(prepare(broken={5}, check="none", train_transforms=()).train_batches(0), 5)
    said = []
    bad = {3, 5, 6, 8, 9}
    words = {"source": Numbers(10, bad), "check": "none", "on_bad_example": "skip", "train_transforms": ()}
    data = dataclasses.replace(prepare(**words).data, dataset=Set({"train": Numbers(10, bad)})).prepare(said.append)
    for batch in (*take(data.train_batches(0), 10), *data.eval_batches("train"), *data.eval_batches("train", (3, 4))):
        np.testing.assert_array_equal(batch["mask"] * np.isin(batch["index"], list(bad)), 0)
        shown = batch["image"][:, 0, 0, 0]
        assert not set(shown) & bad and (shown == batch["index"])[batch["mask"] > 0].all()
    assert sum(batch["mask"].sum() for batch in data.eval_batches("train")) == 5
    assert len(said) == 5 and all("is cut short; it is " in line and "left out where it would" in line for line in said)
    assert data.num_examples() == 10 and data.bad == {"train": []}


def test_a_sample_that_finds_something_unreadable_stops_the_run(prepare):
    with pytest.raises(UserError, match="1 of 17 examples cannot be read"):
        prepare(broken={5}, check="sample")
    with pytest.raises(UserError, match="data.check is 'al'; it must be 'all' or 'sample' or 'none'. Did you mean"):
        prepare(check="al")


# --- Poisson samples --------------------------------------------------------------------------------------------------


class Owned(Numbers):
    """Examples of people: 0 has half of them."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "person": index // 2 if index % 2 else 0}


def chosen(batch):
    return batch["index"][batch["mask"] > 0]


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_poisson_sample_is_a_function_of_its_step(prepare, hosts):
    data = prepare(40, 16, poisson=6.0)
    whole = take(data.train_batches(0), 9)
    assert len({len(chosen(batch)) for batch in whole}) > 3
    for batch in whole:
        assert (np.diff(batch["mask"]) <= 0).all() and len(np.unique(chosen(batch))) == len(chosen(batch))
    shards = [take(prepare(40, 16, poisson=6.0, workers=3).train_batches(4, (i, hosts)), 5) for i in range(hosts)]
    for k in range(5):
        joined = np.concatenate([chosen(shard[k]) for shard in shards])
        np.testing.assert_array_equal(joined, chosen(whole[4 + k]))
    other = take(prepare(40, 16, poisson=6.0, seed=1).train_batches(0), 9)
    assert not all(np.array_equal(chosen(a), chosen(b)) for a, b in zip(whole, other, strict=True))


def test_each_example_is_drawn_by_itself(prepare):
    n, expected, steps = 20, 5.0, 4000
    there = np.zeros((steps, n), bool)
    rng = [np.random.default_rng([7, k]) for k in range(steps)]
    for k in range(steps):
        there[k, poisson(rng[k], n, expected / n, n)] = True
    deviation = np.sqrt(0.25 * 0.75 / steps)
    assert np.abs(there.mean(0) - 0.25).max() < 4.5 * deviation  # each as often as it should be,
    assert np.abs(np.corrcoef(there.T) - np.eye(n)).max() < 4.5 / np.sqrt(steps)  # whatever else is in the batch,
    assert there.sum(1).var() == pytest.approx(n * 0.25 * 0.75, rel=0.1)  # so their number is binomial
    cut = np.concatenate([poisson(r, n, 0.9, 4) for r in rng])
    assert np.abs(np.bincount(cut, minlength=n) / steps - 4 / n).max() < 0.035  # all are as likely to stay


def test_a_unit_has_one_example_in_a_batch(prepare):
    data = prepare(source=Owned(40), batch_size=24, poisson=8.0, unit="person")
    assert data.num_units == 20 and data.steps_per_epoch == 2.5
    seen = np.zeros(40, int)
    for batch in take(data.train_batches(0), 400):
        index = chosen(batch)
        owner = np.where(index % 2, index // 2, 0)
        assert len(np.unique(owner)) == len(owner)
        seen[index] += 1
    assert seen[3::2].min() > 100 and 0 < seen[0::2].max() < 40  # 0 shares its turn among its own


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"poisson": 0.0}, "data.poisson is 0.0"),
        ({"poisson": 5.0}, "data.poisson is 5.0; batches of at most data.batch_size=4"),
        ({"n": 3, "poisson": 4.0}, "of 3 that can be drawn"),
        ({"unit": "person"}, "give that too"),
        ({"poisson": 2.0, "unit": "persn", "source": Owned(9)}, "no number or text of the examples. .*'person'"),
        ({"poisson": 2.0, "unit": "image"}, "no number or text"),
        ({"poisson": 2.0, "buckets": (3,)}, "use one"),
    ],
)
def test_samples_that_cannot_be_drawn(prepare, words, told):
    with pytest.raises(UserError, match=told):
        prepare(**words)
