"""Tables of items and users: words and vectors beside the log's ids, and items that nobody has chosen."""

import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.table.catalogue import Attributes
from bigbase_jax.data.sources.table.interactions import InteractionFiles

pytest.importorskip("pyarrow")
LOG = "user,item,time\n" + "".join(f"u{u},{10 * i},{u + i}\n" for u in range(4) for i in range(1, 6))
ITEMS = (
    "id,title,genre,price\n20,Alien: 异形 the film,horror|sci-fi,5\n10,A quiet place in the film,horror,7\n"
    "99,Cold,drama,\n30,One more film of them,drama,1\n40,And yet another film here,sci-fi,2\n"
)
USERS = "user,city\nu1,Oslo\nu0,Rome\nu3,Oslo\nnobody,Bern\n"


@pytest.fixture
def folder(tmp_path):
    for name, text in (("log.csv", LOG), ("items.csv", ITEMS), ("users.csv", USERS)):
        (tmp_path / name).write_text(text)
    return tmp_path


def histories(folder, core=0, vectors=None, **how):
    items = Attributes(str(folder / "items.csv"), vectors=vectors, buckets=1 << 30)
    users = Attributes(str(folder / "users.csv"), buckets=1 << 30)
    made = InteractionFiles(root=str(folder / "log.csv"), items=items, users=users, core=core, pairs=True, **how)
    return made.prepare(folder / "cache", 0, lambda line: None)


def test_what_a_table_says_is_found_by_the_logs_names(folder):
    found = histories(folder)
    assert list(found.item_names) == ["10", "20", "30", "40", "50", "99"]
    assert found.dataset_info["item_titles"][1] == "Alien: 异形 the film" and found.dataset_info["item_titles"][4] == ""
    assert found.dataset_info["num_items"] == 6 and found.dataset_info["item_words"] == 1 << 30
    names, rows = ["", *found.item_names], found.items(np.arange(7))["item_words"]
    words = {name: {*row[row > 0]} for name, row in zip(names, rows, strict=True)}
    assert len(words["20"]) == 5 + 2 + 1  # alien, 异, 形, the, film; two genres; a price
    assert len(words["10"] & words["20"]) == 3  # horror, the, film
    assert len(words["99"]) == 2 and not words["50"] and not words[""]
    assert len(words["20"] & words["40"]) == 2  # sci-fi, film
    city = found.users(np.array([-1, 0, 1, 2, 3]))["user_words"][:, 0]
    assert city[2] == city[4] != city[1] and not city[0] and not city[3] and city[1] > 0


def test_items_that_nobody_has_chosen_are_cold_and_outside_of_a_core(folder):
    found = histories(folder)
    log_q = found.items(np.arange(1, 7))["log_q"]
    assert np.isneginf(log_q[5]) and np.exp(log_q).sum() == pytest.approx(1)
    assert list(histories(folder, core=2).item_names) == ["10", "20", "30", "40", "50"]
    batch, val = found.splits["train"].batch(np.arange(3)), found.splits["val"].batch(np.arange(2))
    assert {*batch} == {"user", "user_words", "history", "item", "item_words", "log_q"} == {*val} - {"target"}
    np.testing.assert_array_equal(val["item"], val["target"])
    np.testing.assert_array_equal(batch["item_words"], found.items(batch["item"])["item_words"])


def test_vectors_come_in_the_tables_order(folder):
    vectors = np.arange(15, dtype=np.float32).reshape(5, 3)
    vectors[4] = np.nan  # a text that could not be read
    np.save(folder / "v.npy", vectors)
    made = histories(folder, vectors=str(folder / "v.npy"))
    found = made.items(np.arange(7))["item_features"]
    assert made.dataset_info["item_features"] == 3
    np.testing.assert_array_equal(found, [[0] * 3, vectors[1], vectors[0], vectors[3], [0] * 3, [0] * 3, vectors[2]])
    np.save(folder / "v.npy", vectors[:4])
    with pytest.raises(UserError, match="has 5 rows, and needs a vector for each"):
        histories(folder, vectors=str(folder / "v.npy"))
    np.save(folder / "v.npy", np.array([{}] * 5), allow_pickle=True)
    with pytest.raises(UserError, match="no file of vectors"):
        histories(folder, vectors=str(folder / "v.npy"))


def test_a_table_that_does_not_fit_is_told(folder):
    (folder / "items.csv").write_text("id,title\nx,y\n")
    with pytest.raises(UserError, match="none of the log's names, such as '10'"):
        histories(folder)
    with pytest.raises(UserError, match="no column 'sku'"):
        Attributes(str(folder / "items.csv"), id="sku").read(["10"])


def test_the_fingerprint_is_that_of_the_tables_too(folder):
    before = histories(folder).fingerprint()
    (folder / "items.csv").write_text(ITEMS + "77,New,drama,3\n")
    assert histories(folder).fingerprint() != before
