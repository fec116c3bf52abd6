"""The labelled texts inside Python: who they are of, how they are dealt, and that models can tell them apart."""

import smtplib
import statistics
import unittest

import numpy as np
import pytest

from bigbase_jax.core import RawDataset, UserError
from bigbase_jax.data.sources.synthetic.docstrings import SUBJECTS, PythonDocstrings
from bigbase_jax.text.tokenizer import Bytes, Subwords, load


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    node = PythonDocstrings(tokenizer=Bytes(), length=128)
    assert isinstance(node, RawDataset)
    return node.prepare(tmp_path_factory.mktemp("cache"), 0, lambda line: None)


def texts(data, split):
    decode = load(data.dataset_info["tokenizer"]).decode
    source = data.splits[split]
    examples = [source[i] for i in range(len(source))]
    return [decode(e["tokens"][e["segment_ids"] > 0]) for e in examples], [int(e["label"]) for e in examples]


def test_docstrings_are_of_their_subjects(data):
    found = {split: texts(data, split) for split in ("train", "val", "test")}
    assert data.dataset_info["class_names"] == tuple(SUBJECTS) and data.dataset_info["num_classes"] == len(SUBJECTS)
    by_text = dict(pair for t, labels in found.values() for pair in zip(t, labels, strict=True))
    for of, subject in ((statistics.mean, "numbers"), (smtplib.SMTP.sendmail, "mail"), (unittest.TestCase, "tests")):
        start = " ".join(of.__doc__.split()[:4])
        match = [label for text, label in by_text.items() if " ".join(text.split()).startswith(start)]
        assert match and set(match) == {tuple(SUBJECTS).index(subject)}


def test_no_text_is_in_two_splits_and_each_has_all_subjects(data):
    sizes = {split: len(source) for split, source in data.splits.items()}
    total = sum(sizes.values())
    assert total > 2000 and sizes["test"] / total == pytest.approx(0.2, abs=0.01)
    assert sizes["val"] / total == pytest.approx(0.1, abs=0.01)
    for source in data.splits.values():
        share = np.bincount(source.labels, minlength=len(SUBJECTS)) / len(source)
        assert share.min() > 0.04 and share.max() < 0.3
    long = {split: {t for t in texts(data, split)[0] if len(t) < 120} for split in data.splits}
    assert not long["train"] & (long["val"] | long["test"]) and len(long["train"]) > 500
    with pytest.raises(IndexError):
        data.splits["val"][sizes["val"]]


def test_the_seed_deals_and_the_description_is_honest(data, tmp_path):
    again = PythonDocstrings(tokenizer=Bytes(), length=128).prepare(tmp_path, 0, lambda line: None)
    assert again.fingerprint() == data.fingerprint()
    other = PythonDocstrings(tokenizer=Bytes(), length=128, seed=1).prepare(tmp_path, 0, lambda line: None)
    assert other.fingerprint() != data.fingerprint() and texts(other, "val") != texts(data, "val")
    assert "docstrings of the standard library" in data.description
    (tmp_path / "a.txt").write_text("Send a message to the server.")
    assert PythonDocstrings.codec({}, data.dataset_info).decode(str(tmp_path / "a.txt"))[0]["tokens"].shape == (128,)
    with pytest.raises(UserError, match="length is 2"):
        PythonDocstrings(length=2)


def test_a_tokenizer_that_is_learned_anew_each_time_is_learned_once(tmp_path):
    """Else no start of a run could go on with another's, and no process with its neighbour's."""
    node = PythonDocstrings(tokenizer=Subwords("wordpiece", 200), length=16)
    first, again = (node.prepare(tmp_path, 1e9, lambda line: None) for _ in range(2))
    assert first.fingerprint() == again.fingerprint()
    np.testing.assert_array_equal(first.splits["val"][3]["tokens"], again.splits["val"][3]["tokens"])
