"""Rows with a user, a history or an item, as models of histories read them."""

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.synthetic.interactions import SyntheticInteractions
from bigbase_jax.data.sources.table.history_codec import HistoryCodec

NAMES, TITLES = ("a1", "b 2", "c3", "d4"), ("", "", "The Third", "Fourth, The")
CODEC = HistoryCodec(NAMES, TITLES, 3, lambda user: (np.array([4, 3, 2, 1]), 7) if user == "ann" else None)


def read(**row):
    (example,) = CODEC.decode(row)
    return example["history"].tolist(), int(example["user"]), example["unknown"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"history": ["a1", "c3"]}, ([1, 3, 0], -1, [])),
        ({"history": '["b 2", "a1"]'}, ([2, 1, 0], -1, [])),
        ({"history": "a1 c3 x"}, ([1, 3, 0], -1, ["x"])),
        ({"history": "a1;b 2; Fourth, The"}, ([1, 2, 4], -1, [])),
        ({"history": "b 2"}, ([2, 0, 0], -1, [])),
        ({"history": "a1,c3,d4,a1"}, ([3, 4, 1], -1, [])),  # the latest
        ({"Item_ID": "The Third"}, ([3, 0, 0], -1, [])),
        ({"user": "ann", "history": ""}, ([3, 2, 1], 7, [])),
        ({"user": "bob", "history": "a1"}, ([1, 0, 0], -1, [])),
    ],
)
def test_rows_are_read(row, expected):
    assert read(**row) == expected


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"user": "bob"}, "there is no user 'bob' in the log; give a history"),
        ({"history": "x y"}, "knows none of these items: 'x', 'y'; it knows 4, such as 'a1'"),
        ({"history": []}, "none of these items"),
        ({"age": 3}, "no 'user', 'history' or 'item'; it has 'age'"),
        ({"history": "a " * 60_000}, "at most 100,000 are read"),
        ({"item": "a1", "top": "-2"}, "top is '-2'"),
    ],
)
def test_what_cannot_be_read_is_said(row, said):
    with pytest.raises(UserError, match=said):
        CODEC.decode(row)
    with pytest.raises(UserError, match="this model reads rows"):
        CODEC.decode("a.csv")


def test_an_item_and_how_many_are_wanted_are_kept():
    (example,) = CODEC.decode({"item": "c3", "top": 5})
    assert (example["item"], example["top"]) == (3, 5)


def test_a_user_of_the_log_has_all_of_it_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGBASE_CACHE", str(tmp_path))
    made = SyntheticInteractions(users=12, num_items=16, groups=2, length=50)
    histories = made.prepare(tmp_path, 1e9, lambda line: None)
    codec = made.codec({}, histories.dataset_info)
    test = histories.splits["test"]
    name = test.name(3).removeprefix("user ")
    (example,) = codec.decode({"user": name})
    whole = [*test[3]["history"][test[3]["history"] > 0].tolist(), int(test[3]["target"])]
    assert example["history"][example["history"] > 0].tolist() == whole
    assert example["user"] == test[3]["user"]
