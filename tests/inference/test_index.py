"""The index: exact is brute force, approximate is measured against it, and a file of one is data."""

import dataclasses

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.inference import index as indices
from bigbase_jax.inference.index import Index
from bigbase_jax.pretrained.files import read_safetensors, write_safetensors


def clustered(count, width=16, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(40, width))
    return (centres[rng.integers(0, 40, count)] + 0.5 * rng.normal(size=(count, width))).astype(np.float32)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_exact_is_brute_force(count, monkeypatch):
    monkeypatch.setattr(indices, "_CHUNK", 64)  # 300 = 4 * 64 + 44: the last chunk is filled up
    monkeypatch.setattr(indices, "_QUERIES", 4)
    vectors, queries = -np.abs(clustered(count)), np.abs(clustered(9, seed=1))  # padding's 0 would be the largest
    ids = np.random.default_rng(2).permutation(10 * count)[:count]
    scores, found = Index.build(vectors, ids).search(queries, 70)
    order = np.argsort(-(queries @ vectors.T), 1)[:, :70]
    np.testing.assert_array_equal(found, ids[order])
    np.testing.assert_allclose(scores, np.take_along_axis(queries @ vectors.T, order, 1), rtol=1e-5)
    assert (np.diff(scores) <= 0).all() and found.shape == (9, min(70, count))


def test_approximate_finds_what_it_was_built_to_find_in_a_share_of_the_cells():
    faiss = pytest.importorskip("faiss")
    vectors, queries = clustered(4000), clustered(200, seed=1)
    index = Index.build(vectors, cells=100, recall=0.95)
    assert index.probes < 50  # else nothing is saved
    assert 0.9 < index.recall(queries) < 1.0  # and it is approximate
    everywhere = dataclasses.replace(index, probes=100)
    assert everywhere.recall(queries) == 1.0
    flat = faiss.IndexFlatIP(16)
    flat.add(vectors)
    np.testing.assert_array_equal(everywhere.search(queries, 10)[1], flat.search(queries, 10)[1])
    few = dataclasses.replace(index, probes=1).search(queries, 300)
    assert (few[1][:, -1] == -1).all() and np.isneginf(few[0][:, -1]).all()  # a cell holds fewer


def test_an_index_is_what_it_was_after_its_file(tmp_path):
    pytest.importorskip("faiss")
    queries, names = clustered(20, seed=1), [f"näme {i}" for i in range(500)]
    for cells in (0, 20):
        index = Index.build(clustered(500), np.arange(500) + 7, step=3, cells=cells, names=names)
        index.save(tmp_path / "index.safetensors")
        read = Index.load(tmp_path / "index.safetensors")
        assert read.step == 3 and (read.centroids is None) == (cells == 0)
        assert list(read.names) == names and not read.titles
        for a, b in zip(index.search(queries, 5), read.search(queries, 5), strict=True):
            np.testing.assert_array_equal(a, b)


def test_hostile_files_are_refused_in_a_sentence(tmp_path):
    pytest.importorskip("faiss")
    path = tmp_path / "index.safetensors"
    Index.build(clustered(500), cells=20, names=["a"] * 500).save(path)
    data, good = path.read_bytes(), {name: np.array(x) for name, x in read_safetensors(path).items()}

    def refused(match, **changed):
        arrays = {name: x for name, x in {**good, **changed}.items() if x is not None}
        write_safetensors(path, {name: (x.shape, x.dtype) for name, x in arrays.items()}, arrays.__getitem__)
        with pytest.raises(UserError, match=match) as error:
            Index.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)

    refused("cells that it does not have", cell=good["cell"] + 1)
    refused("cells that it does not have", cell=good["cell"] - 1)
    refused("cells that it does not have", probes=np.int64(21))
    refused("cells are not those", cell=good["cell"][:-1])
    refused("cells are not those", cell=None)
    refused("cells are not those", centroids=good["centroids"][:, :-1])
    refused("not finite", vectors=np.where(good["vectors"] > 2, np.nan, good["vectors"]))
    refused("not finite", centroids=np.full_like(good["centroids"], np.inf))
    refused("one id for each", ids=good["ids"][:-1])
    refused("one id for each", ids=good["ids"] - 1)
    refused("same id", ids=good["ids"] // 2)
    refused("no vectors", vectors=good["vectors"][:0])
    refused("no vectors", vectors=good["vectors"].astype(np.float64))
    refused("no index", vectors=None)
    refused("no index", step=np.arange(2))
    refused("no index", code=np.arange(2))
    refused("names do not follow", **{"names.bounds": good["names.bounds"][::-1]})
    refused("names do not follow", names=good["names"][:-1])
    refused("one name for each", **{"names.bounds": np.array([0, 500])})
    refused("no texts", names=good["ids"])
    refused("no index", **{"names.bounds": None})
    for broken in (data[:-1], data[:20], b"", b"\xff" * 100, data.replace(b"[500,16]", b"[900,16]")):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged"):
            Index.load(path)


def test_mistakes_are_told(monkeypatch):
    index = Index.build(clustered(5))
    with pytest.raises(UserError, match="of width 16"):
        index.search(np.zeros((2, 3)), 1)
    with pytest.raises(UserError, match="not finite"):
        Index.build(np.full((3, 2), np.nan))
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    monkeypatch.setattr(indices, "CELLS_FROM", 4)
    assert Index.build(clustered(5)).centroids is None  # as without the extra
    with pytest.raises(UserError, match=r"\[recommend\]"):
        Index.build(clustered(5), cells=2)
