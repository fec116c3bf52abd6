"""Two towers from the recipe to the index: answers are brute force over the catalogue, whoever gives them."""

import io
import json
import pathlib
import runpy

import numpy as np
import pytest
import toy

from bigbase_jax import verbs
from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.table.catalogue import Attributes
from bigbase_jax.data.sources.table.interactions import InteractionFiles
from bigbase_jax.inference.predictor import Predictor

pytest.importorskip("pyarrow")
RECIPE = pathlib.Path(__file__).parents[2] / "configs" / "recommend.py"
GENRES = ("drama", "horror", "comedy", "western")


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A run on users who like one genre each, with tables of items and of users; its folder and that of the data."""
    data, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    log, users = ["user,item,time"], ["user,taste"]
    for user in range(48):
        users.append(f"u{user},{GENRES[user % 4]}")
        own = rng.permutation(10)[:8] * 4 + user % 4  # item i is of genre i % 4
        log += [f"u{user},{100 + item},{place}" for place, item in enumerate(own)]
    items = ["item,title,genre", *(f"{100 + i},Title {i},{GENRES[i % 4]}" for i in range(40))]
    for name, lines in (("log", log), ("items", items), ("users", users)):
        (data / f"{name}.csv").write_text("\n".join(lines) + "\n")
    config = runpy.run_path(str(RECIPE))["get_config"]("tiny,model=two_tower")
    tables = {side: target(Attributes, root=str(data / f"{side}.csv")) for side in ("items", "users")}
    config.data.dataset = target(InteractionFiles, root=str(data / "log.csv"), length=8, pairs=True, **tables)
    config.data.batch_size = 32
    config.optim.learning_rate = 0.02
    config.train.update({"writers": (), "steps": 60, "eval_every": 60})
    workdir = str(tmp_path_factory.mktemp("runs") / "shop")
    result = verbs.train(config, workdir)
    assert result["ranking"]["hr@10"] > 0.6  # of 40 items, 2 or 3 of the genre are left: chance gives 0.3
    return workdir, data


def answers(workdir, tmp_path, rows, **words):
    file, out = tmp_path / "rows.jsonl", io.StringIO()
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert verbs.predict(workdir, str(file), out=out, **words) == 0
    return [json.loads(line) for line in out.getvalue().splitlines()]


def named(answer):
    return [one["item"] for one in answer["items"]]


ROWS = ({"user": "u1"}, {"history": ["101", "105", "Title 9"]}, {"item": "102"}, {"user": "u2", "top": 3})


def test_answers_are_brute_force_over_the_catalogue(shop, tmp_path):
    workdir, _ = shop
    found = answers(workdir, tmp_path, ROWS)
    predictor = Predictor.open(workdir)
    (example,) = predictor.examples(ROWS[0])
    assert example["user"] >= 0 and example["user_words"].any()  # as evaluation read them
    one = {name: example[name][None] for name in predictor.task.inputs}
    user = np.asarray(predictor.task.users(predictor.variables, one))[0]
    index = predictor.index
    order = [f"{index.names[i]}" for i in np.argsort(-(index.vectors @ user))]
    had = {item["item"] for item in found[0]["history"]}
    assert len(had) == 8 and named(found[0]) == [name for name in order if name not in had][:10]
    assert found[0]["items"][0]["title"] == f"Title {int(named(found[0])[0]) - 100}"
    genres = [int(name) % 4 for name in named(found[1])[:5]]
    assert genres.count(1) >= 3  # a cold user's history tells the taste
    v = index.vectors[list(index.names).index("102"), :-1]
    alike = [index.names[i] for i in np.argsort(-(index.vectors[:, :-1] @ v)) if index.names[i] != "102"]
    assert named(found[2]) == alike[:10] and len(named(found[3])) == 3
    with toy.client(shop=predictor) as client:
        served = client.post("/v1/predict/shop", json={"inputs": ROWS}).json()["answers"]
    assert [named(answer) for answer in served] == [named(answer) for answer in found]


def test_an_exported_index_is_read_and_has_what_is_new(shop, tmp_path, monkeypatch):
    workdir, data = shop
    before, table = answers(workdir, tmp_path, ROWS), (data / "items.csv").read_text()
    (data / "items.csv").write_text(table + "999,Brand new,horror\n")
    exported = verbs.export(workdir, to="index")
    assert exported["index"] == {"vectors": 41, "width": 17} and exported["files"] == [
        "index.safetensors",
        "manifest.json",
    ]
    (data / "items.csv").unlink()  # what answers reads the index alone
    (data / "log.csv").rename(data / "gone.csv")
    rows = ROWS[1:3]
    monkeypatch.setattr("bigbase_jax.inference.retrieval.Retriever.built", None)
    after = answers(workdir, tmp_path, [{**row, "top": 40} for row in rows])
    new = [next(one for one in answer["items"] if one["item"] == "999") for answer in after]
    assert new[0]["title"] == "Brand new"
    rank = named(after[0]).index("999")
    assert rank < 12  # among the horrors, though nobody has chosen it
    assert [name for name in named(after[0]) if name != "999"][:10] == named(before[1])
    (data / "gone.csv").rename(data / "log.csv")
    (data / "items.csv").write_text(table)


def test_programs_have_the_index_beside_them_and_answer_alike(shop, tmp_path):
    workdir, _ = shop
    plain = answers(workdir, tmp_path, ROWS)
    exported = verbs.export(workdir, to="onnx")
    assert {"index.safetensors", "model.onnx"} <= set(exported["files"])
    assert [named(a) for a in answers(workdir, tmp_path, ROWS, engine="onnxruntime")] == [named(a) for a in plain]


def test_what_has_no_index_says_so(shop, tmp_path):
    workdir, _ = shop
    path = pathlib.Path(workdir) / "export" / "index" / "index.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 40)
    with pytest.raises(UserError, match="damaged"):
        Predictor.open(workdir).answer({"item": "102"})
    path.unlink()
    assert Predictor.open(workdir).answer({"item": "102"})[0]["items"]
