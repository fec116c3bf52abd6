"""``--mode=predict`` on pictures of every size and kind, by name, by folder and by a table of names."""

import base64
import json
import pathlib
import runpy

import numpy as np
import pytest
from PIL import Image

from bigbase_jax import verbs
from bigbase_jax.core import Codec, UserError
from bigbase_jax.inference.inputs import Input
from bigbase_jax.inference.predictor import Predictor, Reading

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))
KINDS = {
    "1x1.png": RGB.resize((1, 1)),
    "5000x20.png": RGB.resize((5000, 20)),
    "20x5000.jpg": RGB.resize((20, 5000)),
    "grey.png": RGB.convert("L"),
    "alpha.png": RGB.convert("RGBA"),
    "16bit.png": Image.fromarray(np.arange(900, dtype=np.uint16).reshape(30, 30) * 70),
    "cmyk.jpg": RGB.convert("CMYK"),
    "palette.gif": RGB.convert("P"),
    "bits.png": RGB.convert("1"),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Its transforms make the short side 28 pixels, and leave the long one as it is."""
    folder = tmp_path_factory.mktemp("pictures") / "run"
    config = runpy.run_path(str(CONFIGS / "fashion_mnist.py"))["get_config"]("tiny")
    config.train.steps = 1
    verbs.train(config, str(folder))
    return str(folder)


def test_pictures_of_every_size_and_kind_are_answered(run, tmp_path, capsys):
    for name, picture in KINDS.items():
        picture.save(tmp_path / name)
    capsys.readouterr()
    assert verbs.predict(run, str(tmp_path)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [pathlib.Path(f["input"]).name for f in found] == sorted(KINDS) and all("label" in f for f in found)
    (example,) = Predictor.open(run).examples(str(tmp_path / "5000x20.png"))
    assert example["image"].shape == (28, 28, 1)


def test_a_file_its_bytes_and_json_have_the_same_answer(run, tmp_path):
    RGB.save(tmp_path / "a.png")
    data, predictor = (tmp_path / "a.png").read_bytes(), Predictor.open(run)
    (answer,) = predictor.answer(str(tmp_path / "a.png"))
    assert predictor.answer(data) == [answer] == predictor.answer({"image": base64.b64encode(data).decode()})
    RGB.rotate(90).save(tmp_path / "b.png")
    assert predictor.answer((tmp_path / "b.png").read_bytes()) != [answer]
    assert [a for _, a in predictor.answers([Input(data, "a.png")])] == [answer]
    with pytest.raises(UserError, match="not a picture"):
        predictor.answer(b"text")


def test_a_table_names_pictures_beside_it(run, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    RGB.save(tmp_path / "in" / "a.png")
    (tmp_path / "list.csv").write_text("file,label\nin/a.png,x\nin/b.png,y\n,z\n")
    capsys.readouterr()
    assert verbs.predict(run, str(tmp_path / "list.csv"), output=str(tmp_path / "out.jsonl")) == 1
    one, two, three = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert one["label"] == "x" and one["predicted_label"] in ("cat", "dog")
    assert "b.png" in two["error"] and "names no file in 'file'" in three["error"]


def test_what_does_not_fit_the_model_is_one_sentence(run):
    predictor = Predictor.open(run)

    class Unfitted(Codec):
        """Its examples stay as they are."""

    predictor.reading = Reading(Unfitted())
    with pytest.raises(
        UserError, match=r"its image has the shape \(28, 35, 1\), and the model was trained on \(28, 28, 1\)"
    ):
        predictor._fitted({"image": np.zeros((28, 35, 1), np.uint8)})
