"""The cache of decoded examples: the same bits with and without, never stale, never half-written, never fatal."""

import concurrent.futures
import dataclasses
import errno
import importlib.metadata
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.data import cache as caches
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.transforms.image import CenterCrop, ColorJitter, RandomCrop, Resize
from bigbase_jax.data.transforms.scattering import Scattering


class Files:
    """Pictures of a folder, counting how often they are decoded."""

    def __init__(self, folder):
        self.paths, self.reads = sorted(pathlib.Path(folder).glob("*.png")), 0
        self._lock = threading.Lock()

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return self.paths[index].name

    def __getitem__(self, index):
        with self._lock:
            self.reads += 1
        with Image.open(self.paths[index]) as image:
            return {"image": np.asarray(image.convert("RGB")), "label": index % 3}


class Folder:
    dataset_info: ClassVar = {}
    description: ClassVar = "pictures for a test"

    def __init__(self, folder):
        self.splits = {"train": Files(folder)}

    def fingerprint(self):
        return repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in self.splits["train"].paths])


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    folder.mkdir()
    for i in range(9):
        pixels = rng.integers(0, 256, (20 + i, 30 - i, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def prepare(tmp_path, photos):
    def make(said=None, **kwargs):
        kwargs = {
            "train_transforms": (Resize(18), RandomCrop(16, 2), ColorJitter(0.3, 0.3, 0.3, 0.1)),
            "eval_transforms": (Resize(18), CenterCrop(16)),
            "workers": 2,
            "cache_dir": str(tmp_path / "cache"),
            **kwargs,
        }
        data = Data(Folder(photos), 4, **kwargs)
        said = [] if said is None else said
        return data.prepare(said.append), data.dataset.splits["train"]

    return make


def batches(prepared, count=5):
    with prepared.train_batches(0) as iterator:
        return list(itertools.islice(iterator, count)) + list(prepared.eval_batches("train"))


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name, strict=True)


def folders(tmp_path):
    """What there is of rows, or was begun; what a check found is a store without rows."""
    found = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    return sorted(p.name.split("-")[0] for p in found if any(p.glob("*.bin")) or p.name.startswith("tmp"))


# --- the same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "train_transforms",
    [(Resize(18), RandomCrop(16)), (RandomCrop(16, 2), Resize(8)), (Resize((16, 16)),), (CenterCrop(16), Resize(24))],
    ids=repr,
)
def test_the_cache_changes_no_bit_and_spares_the_decoder(prepare, train_transforms, tmp_path):
    without, source = prepare(cache_limit_gb=0.0, train_transforms=train_transforms)
    expected = batches(without)
    assert source.reads > 9 and "off" in without.summary()[-1]
    cached, source = prepare(train_transforms=train_transforms)
    assert source.reads >= 9
    assert_same(batches(cached), expected)
    again, source = prepare(train_transforms=train_transforms)
    assert source.reads == 0 and "from before" in again.summary()[-1]
    with again.train_batches(0) as iterator:
        assert_same(list(itertools.islice(iterator, 5)), expected[:5])
    assert source.reads == 0
    list(again.eval_batches("train"))
    shared = again._part("train").prefix in ((), (Resize(18),))  # what the evaluation transforms begin with
    assert (source.reads == 0) == shared
    assert folders(tmp_path) == ["cache"]


def test_it_keeps_as_much_of_the_work_as_does_not_double_the_size(prepare):
    small, _ = prepare(train_transforms=(CenterCrop(16), Resize(24), RandomCrop(16)))
    assert small._part("train").prefix == (CenterCrop(16),)
    larger, _ = prepare(train_transforms=(CenterCrop(16), Resize(20), RandomCrop(16)))
    assert larger._part("train").prefix == (CenterCrop(16), Resize(20))
    tight, _ = prepare(train_transforms=(CenterCrop(16), Resize(21), RandomCrop(16)), cache_limit_gb=9e-6)
    assert tight._part("train").prefix == (CenterCrop(16),)
    none, _ = prepare(train_transforms=(RandomCrop(16), Resize(8)))
    assert none._part("train").prefix == ()
    whole, _ = prepare(train_transforms=(Resize(18), CenterCrop(16)))
    assert whole._part("train").prefix == (Resize(18), CenterCrop(16))


def test_what_costs_much_is_kept_where_it_fits(prepare):
    costly = Scattering(scales=1, dtype="float32")  # 27 channels of 8x8, 6,912 bytes for 768
    kept, _ = prepare(train_transforms=(CenterCrop(16), costly))
    assert kept._part("train").prefix == (CenterCrop(16), costly)
    tight, _ = prepare(train_transforms=(CenterCrop(14), costly), cache_limit_gb=3e-5)
    assert tight._part("train").prefix == (CenterCrop(14),)


# --- never stale ------------------------------------------------------------------------------------------------------


def test_a_changed_file_makes_a_new_cache(prepare, photos):
    before, _ = prepare()
    first = batches(before)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(photos / "4.png")
    after, source = prepare()
    assert source.reads >= 9 and after.summary()[-1].endswith("new")
    changed = [(a["image"] != b["image"]).any((1, 2, 3)) for a, b in zip(first, batches(after), strict=True)]
    touched = [b["index"] == 4 for b in first]
    np.testing.assert_array_equal(np.concatenate(changed), np.concatenate(touched))


def test_a_changed_argument_makes_a_new_cache(prepare):
    prepare()
    other, source = prepare(train_transforms=(Resize(20), RandomCrop(16)))
    assert source.reads >= 9 and next(other.train_batches(0))["image"].shape == (4, 16, 16, 3)


@pytest.mark.parametrize("package", ["pillow", "simplejpeg"])
def test_another_decoder_is_another_key(photos, monkeypatch, package):
    ours, version = caches.key_of("a", "train", Files(photos)), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == package else version(name))
    assert caches.key_of("a", "train", Files(photos)) != ours


def test_the_key_depends_on_everything(photos):
    source = Files(photos)
    keys = [
        caches.key_of("a", "train", source, (Resize(8),)),
        caches.key_of("b", "train", source, (Resize(8),)),
        caches.key_of("a", "val", source, (Resize(8),)),
        caches.key_of("a", "train", source, (Resize(9),)),
        caches.key_of("a", "train", source, (Resize(8, "bicubic"),)),
        caches.key_of("a", "train", source),
        caches.key_of("a", "train", [], (Resize(8),)),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == caches.key_of("a", "train", Files(photos), (Resize(8),))


def test_a_function_whose_arguments_do_not_show_is_not_cached(prepare):
    def crop(example, rng):
        return {**example, "image": example["image"][:16, :16]}

    crop.random = False
    prepared, _ = prepare(train_transforms=(crop,))
    assert prepared._part("train").prefix == ()
    assert next(prepared.train_batches(0))["image"].shape == (4, 16, 16, 3)


# --- never half-written -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["0.bin", "0.npy", "index.json", "negative"])
def test_a_damaged_cache_is_made_anew(prepare, tmp_path, damage):
    expected = batches(prepare()[0])
    (folder,) = (tmp_path / "cache").glob("cache-*")
    if damage == "negative":  # an example that begins before the data, where numpy would read it
        shapes = np.load(folder / "0.npy")
        shapes[:2, 0] = [-shapes[0, 0], shapes[1, 0] + 2 * shapes[0, 0] * shapes[0, 1] // shapes[1, 1]]
        np.save(folder / "0.npy", shapes)
    else:
        content = (folder / damage).read_bytes()
        (folder / damage).unlink()  # not in place: cutting a file short that is mapped ends the process
        (folder / damage).write_bytes(content[: len(content) // 2])
    again, source = prepare()
    assert source.reads >= 9
    assert_same(batches(again), expected)
    assert prepare()[1].reads == 0


def test_a_writer_that_dies_leaves_nothing_to_be_used_and_is_cleaned_up_later(prepare, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def die(self, about):
            raise KeyboardInterrupt

        patch.setattr(caches.Writer, "commit", die)
        patch.setattr(caches.Writer, "abort", lambda self: None)
        with pytest.raises(KeyboardInterrupt):
            prepare()
    assert folders(tmp_path) == ["tmp"]
    _, source = prepare()
    assert source.reads >= 9 and folders(tmp_path) == ["cache", "tmp"]  # it may still be alive
    (dead,) = (tmp_path / "cache").glob("tmp-*")
    for path in (*dead.iterdir(), dead):
        os.utime(path, (1e9, 1e9))
    caches.prune(tmp_path / "cache", 1e9)
    assert folders(tmp_path) == ["cache"]


def test_two_writers_of_one_cache_both_end_well(tmp_path):
    writers = [caches.Writer(tmp_path, "k") for _ in range(2)]
    for i in range(5):
        for writer in writers:
            writer.add({"x": np.full(3, i), "y": i})
    found = [writer.commit({"bad": [[9, "bad"]]}) for writer in writers]
    assert [p.name for p in tmp_path.iterdir()] == ["cache-k"]
    for cache in found:
        assert len(cache) == 5 and cache.about == {"bad": [[9, "bad"]]}
        np.testing.assert_array_equal(cache[3]["x"], [3, 3, 3])


def test_many_writers_at_once_replace_a_damaged_cache(tmp_path):
    """As the processes of one host do, which all find it damaged at the same time."""
    for attempt in range(20):
        root = tmp_path / str(attempt)
        (root / "cache-k").mkdir(parents=True)
        (root / "cache-k" / "0.bin").write_bytes(b"half")
        writers = [caches.Writer(root, "k") for _ in range(8)]
        for writer in writers:
            writer.add({"x": np.arange(5)})
        with concurrent.futures.ThreadPoolExecutor(len(writers)) as pool:
            found = list(pool.map(lambda writer: writer.commit({}), writers))
        assert [p.name for p in root.iterdir()] == ["cache-k"]
        for cache in found:
            np.testing.assert_array_equal(cache[0]["x"], np.arange(5))


# --- never fatal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 3])
def test_a_full_disk_means_no_cache_and_one_warning(prepare, tmp_path, monkeypatch, after):
    expected = batches(prepare(cache_limit_gb=0.0)[0])
    shutil.rmtree(tmp_path / "cache")
    writes = itertools.count()
    write = caches.Writer._write

    def full(self, name, array):
        if next(writes) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, array)

    monkeypatch.setattr(caches.Writer, "_write", full)
    said = []
    prepared, _ = prepare(said)
    assert sum("No space left" in line for line in said) == 1
    assert "the disk cannot take it" in prepared.summary()[-1]
    assert folders(tmp_path) == []
    assert_same(batches(prepared), expected)


def test_an_unwritable_folder_means_no_cache_and_one_warning(prepare, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    said = []
    prepared, _ = prepare(said, cache_dir=str(tmp_path / "file" / "cache"))
    assert sum(line.startswith("warning: the cache folder") for line in said) == 1
    assert len(batches(prepared)) == 8


def test_more_than_the_limit_is_not_kept_but_checked_once(prepare, tmp_path):
    prepared, source = prepare(cache_limit_gb=1e-6)
    assert "cache_limit_gb=1e-06" in prepared.summary()[-1] and source.reads >= 9 and folders(tmp_path) == []
    again, source = prepare(cache_limit_gb=1e-6)
    assert source.reads <= 9  # the sample that tells the size; the check is remembered
    assert_same(batches(again), batches(prepare(cache_limit_gb=0.0)[0]))


def test_bad_files_are_remembered_until_they_are_mended(prepare, photos):
    whole = (photos / "2.png").read_bytes()
    stat = (photos / "2.png").stat()
    (photos / "2.png").write_bytes(whole[:60] + bytes(len(whole) - 60))
    os.utime(photos / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: the same fingerprint
    with pytest.raises(UserError, match=r"2\.png"):
        prepare()
    prepared, source = prepare(on_bad_example="skip")
    assert prepared.splits["train"] == 8 and prepared.bad["train"][0][0] == 2 and source.reads == 1
    (photos / "2.png").write_bytes(whole)
    os.utime(photos / "2.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    mended, _ = prepare()
    assert mended.splits["train"] == 9
    assert_same(batches(mended), batches(prepare(cache_limit_gb=0.0)[0]))


def test_least_recently_used_caches_go_first(tmp_path):
    for age, name in enumerate("abc"):
        writer = caches.Writer(tmp_path, name)
        writer.add({"x": np.zeros(1600, np.uint8)})
        os.utime(writer.commit({}).directory, (1e9 - age, 1e9 - age))
    assert caches.find(tmp_path, "c") is not None  # a use: now it is the newest
    caches.prune(tmp_path, 3300)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache-a", "cache-c"]
    caches.prune(tmp_path, 0, keep=[tmp_path / "cache-a"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache-a"]


# --- the format -------------------------------------------------------------------------------------------------------


def test_any_numbers_come_back_as_they_went_in(tmp_path):
    rng = np.random.default_rng(0)
    examples = [
        {
            "image": rng.integers(0, 256, (3 + i % 2, 5 * i, 3), np.uint8),  # ragged, and empty at i = 0
            "wave": rng.normal(size=7 + i).astype(np.float32)[::-1],
            "fixed": rng.normal(size=(2, 3)),
            "label": i,
            "weight": 0.5 * i,
            "flag": i % 2 == 0,
        }
        for i in range(6)
    ]
    writer = caches.Writer(tmp_path, "k")
    for example in examples:
        writer.add(example)
    cache = writer.commit({})
    assert len(cache) == 6 and json.loads((cache.directory / "index.json").read_text())["length"] == 6
    for i, example in enumerate(examples):
        assert cache[i].keys() == example.keys()
        for name, value in example.items():
            np.testing.assert_array_equal(cache[i][name], caches.as_array(value), strict=True)
            assert not cache[i][name].flags.writeable


@pytest.mark.parametrize("limit", [1e9, 5.0, None], ids=["on disk", "too much", "in memory"])
def test_texts_of_any_length_lie_one_behind_the_other(tmp_path, limit):
    said = []

    def write(writer):
        for length in (3, 0, 4):
            for token in range(length):
                writer.extend({"tokens": np.array([token], "<u2")})
            writer.add({"tokens": np.zeros(1, "<u2")})
        return {"documents": 3}

    store = caches.keep(write, (tmp_path, "k") if limit else None, limit or 0, said.append)
    assert (store.directory is not None) == (limit == 1e9) and len(said) == (limit == 5.0)
    assert len(store) == 3 and store.about == {"documents": 3} and store.batch is None
    np.testing.assert_array_equal(store.values("tokens"), [0, 1, 2, 0, 0, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(store.stops("tokens"), [4, 5, 10])
    np.testing.assert_array_equal(store.lengths("tokens"), [4, 1, 5])
    np.testing.assert_array_equal(store.get("tokens", 2), np.array([0, 1, 2, 3, 0], "<u2"), strict=True)


@pytest.mark.parametrize(
    "second",
    [{"x": np.zeros(3)}, {"x": np.zeros(3, np.uint8), "y": 1}, {"x": np.zeros((3, 1), np.uint8)}, {"x": [object()]}],
    ids=["dtype", "keys", "rank", "objects"],
)
def test_what_has_no_fixed_form_is_refused(tmp_path, second):
    writer = caches.Writer(tmp_path, "k")
    writer.add({"x": np.zeros(3, np.uint8)})
    with pytest.raises(caches.NotCacheable):
        writer.add(second)
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_examples_in_memory_are_kept_only_after_work(tmp_path):
    class InMemory:
        in_memory = True
        reads = 0

        def __len__(self):
            return 5

        def __getitem__(self, index):
            InMemory.reads += 1
            return {"image": np.full((6, 6, 1), index, np.uint8)}

    @dataclasses.dataclass
    class Arrays:
        splits: dict
        dataset_info: ClassVar = {}
        description: ClassVar = "arrays"

        def fingerprint(self):
            return "arrays"

    plain = Data(Arrays({"train": InMemory()}), 2, cache_dir=str(tmp_path)).prepare(lambda line: None)
    assert "in memory" in plain.summary()[-1] and not list(tmp_path.iterdir())
    resized = Data(Arrays({"train": InMemory()}), 2, (Resize(4),), cache_dir=str(tmp_path)).prepare(lambda line: None)
    assert resized.summary()[-1].endswith("new") and [p.name[:5] for p in tmp_path.iterdir()] == ["cache"]


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+b", buffering=0)
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("ends", ["dies", "stalls"])
def test_a_builder_that_dies_or_stalls_holds_nobody_up(tmp_path, monkeypatch, ends):
    monkeypatch.setattr(caches, "_STALLED", 600.0 if ends == "dies" else 2.0)
    said = []
    builder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock-a"], stdout=subprocess.PIPE)
    try:
        assert builder.stdout.readline() == b"held\n"
        if ends == "dies":
            threading.Timer(2.0, builder.kill).start()
        with caches.one_builder(tmp_path, "a", said.append):
            assert (builder.poll() is None) == (ends == "stalls")
    finally:
        builder.kill()
        builder.wait()
    assert "another process reads it already" in said[0]
    assert ("stood still for 2 s" in said[-1]) == (ends == "stalls") == (len(said) == 2)


def test_those_who_waited_go_in_together_when_the_builder_is_through(tmp_path):
    """Also where it left nothing for them: they do not queue up."""
    inside = threading.Barrier(4)
    order, begun = [], []

    def work(name):
        begun.append(name)
        with caches.one_builder(tmp_path, "a", lambda line: None):
            if not order:
                order.append(name)
                while len(begun) < 5:
                    time.sleep(0.01)
                time.sleep(1.0)
            else:
                inside.wait(30)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join(60)
    assert not inside.broken and order == [0] and not list(tmp_path.iterdir())
