"""Galleries: who is enrolled, found, named or not, and deleted; of one model, for their owner alone."""

import io
import json
import stat

import numpy as np
import pytest
from PIL import Image

from bigbase_jax import verbs
from bigbase_jax.cli import UserError
from bigbase_jax.data.sources.synthetic.faces import DrawnFaces
from bigbase_jax.data.transforms.faces import ARCFACE
from bigbase_jax.inference import gallery
from bigbase_jax.inference.faces import FaceDetector, Found
from bigbase_jax.inference.index import Index
from bigbase_jax.inference.predictor import Predictor


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the recipe, hardly trained; its vectors are those of colours and shapes all the same."""
    import importlib.util
    import pathlib

    path = pathlib.Path(__file__).parents[2] / "configs" / "faces.py"
    spec = importlib.util.spec_from_file_location("faces_recipe", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config("tiny")
    config.train.steps, config.train.writers = 2, ()
    folder = tmp_path_factory.mktemp("runs") / "faces"
    verbs.train(config, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three people with two photos each."""
    root, made = tmp_path_factory.mktemp("photos"), DrawnFaces(24, 6, 2, 3, 4).splits["test"]
    for person in range(3):
        (root / f"person{person}").mkdir()
        for i in range(2):
            Image.fromarray(made[4 * person + i]["image"]).save(root / f"person{person}" / f"{i}.png")
    return root


def test_people_are_enrolled_listed_found_and_deleted(run, photos, tmp_path):
    path = str(tmp_path / "gallery.safetensors")
    made = verbs.gallery(run, path, "enrol", str(photos / "person0"))
    assert made["people"].keys() == {"person0"} and made["photos"] == 2
    made = verbs.gallery(run, path, "enrol", str(photos / "person1" / "*.png"))
    made = verbs.gallery(run, path, "enrol", str(photos / "person2" / "0.png"), name="zoë 王")
    assert {name: about["photos"] for name, about in made["people"].items()} == {
        "person0": 2,
        "person1": 2,
        "zoë 王": 1,
    }
    assert stat.S_IMODE((tmp_path / "gallery.safetensors").stat().st_mode) == 0o600
    assert verbs.gallery("", path)["people"] == made["people"]

    out = io.StringIO()
    assert verbs.predict(run, str(photos / "person2"), gallery=path, out=out) == 0
    same, other = (json.loads(line) for line in out.getvalue().splitlines())
    assert (
        same["candidates"][0]
        == {"person": "zoë 王", "score": pytest.approx(1, abs=1e-5)}
        == {
            "person": "zoë 王",
            "score": same["score"],
        }
    )
    assert same["person"] == "zoë 王" and "vector" not in same
    assert len({c["person"] for c in other["candidates"]}) == len(other["candidates"]) == 3
    scores = [c["score"] for c in other["candidates"]]
    assert scores == sorted(scores, reverse=True) and other["score"] == scores[0] < 0.99999

    vectors = gallery.read(path).vectors
    made = verbs.gallery("", path, "delete", name="person1")
    assert made["people"].keys() == {"person0", "zoë 王"} and made["photos"] == 3
    left = gallery.read(path)
    np.testing.assert_array_equal(left.vectors, vectors[[0, 1, 4]])
    gone = np.ascontiguousarray(vectors[2]).tobytes()
    assert gone not in (tmp_path / "gallery.safetensors").read_bytes() and b"person1" not in left.names
    again = verbs.gallery(run, path, "enrol", str(photos / "person1" / "0.png"))
    assert again["people"]["person1"]["photos"] == 1 and len(set(gallery.read(path).ids.tolist())) == 4
    assert verbs.gallery("", path, "delete", before="2000-01-01")["photos"] == 4
    assert verbs.gallery("", path, "delete", before="9999-01-01") == {"gallery": path, "people": {}, "photos": 0}
    assert not (tmp_path / "gallery.safetensors").exists()


def test_a_stranger_is_not_named(run, photos, tmp_path):
    path = str(tmp_path / "g.safetensors")
    verbs.gallery(run, path, "enrol", str(photos / "person0"))
    identifier = gallery.Identifier.of(Predictor.open(run), path)
    assert identifier.threshold is not None
    score = identifier.answer(str(photos / "person1" / "0.png"))[0]["score"]
    for threshold, named in ((score - 1e-3, True), (score + 1e-3, False), (None, False)):
        identifier.threshold = threshold
        assert (identifier.answer(str(photos / "person1" / "0.png"))[0]["person"] == "person0") == named


def test_what_is_no_photo_is_told_and_the_others_are_enrolled(run, photos, tmp_path):
    (tmp_path / "people" / "ann").mkdir(parents=True)
    (tmp_path / "people" / "ann" / "a.png").write_bytes((photos / "person0" / "0.png").read_bytes())
    (tmp_path / "people" / "ann" / "notes.txt").write_text("tall")
    path = str(tmp_path / "g.safetensors")
    made = verbs.gallery(run, path, "enrol", str(tmp_path / "people"))
    assert made["photos"] == 1 and "not a picture" in next(iter(made["errors"].values()))


def test_faces_that_a_detector_finds_are_enrolled_and_named(run, photos, tmp_path, monkeypatch):
    class Detector(FaceDetector):
        def __call__(self, x_HWC):  # a face wherever the picture is red
            left = np.flatnonzero(x_HWC[0, :, 0] == 255)[::24]
            return Found(*(np.repeat(x, len(left), 0) for x in (np.zeros((1, 4)), np.ones(1), np.array([ARCFACE]))))

    monkeypatch.setattr(FaceDetector, "open", lambda folder: Detector(None, None))
    (tmp_path / "ann").mkdir()
    for name, faces in (("none", 0), ("one", 1), ("two", 2)):
        picture = np.random.default_rng(faces).integers(0, 200, (112, 112, 3), np.uint8)
        picture[:8, : 24 * faces] = 255, 0, 0
        Image.fromarray(picture).save(tmp_path / "ann" / f"{name}.png")
    path = str(tmp_path / "g.safetensors")
    made = verbs.gallery(run, path, "enrol", str(tmp_path / "ann"), detector="mtcnn")
    assert made["photos"] == 1 and [text.partition(";")[0] for text in made["errors"].values()] == [
        "no face is found in it",
        "it shows 2 faces",
    ]
    out = io.StringIO()
    assert verbs.predict(run, str(tmp_path / "ann" / "one.png"), gallery=path, detector="mtcnn", out=out) == 0
    assert json.loads(out.getvalue())["score"] == pytest.approx(1, abs=1e-5)


def test_vectors_of_an_embedded_photo_are_those_of_the_gallery_however_it_is_rotated(run, photos, tmp_path):
    path, vectors = str(tmp_path / "g.safetensors"), tmp_path / "v.npy"
    verbs.gallery(run, path, "enrol", str(photos))
    (tmp_path / "again").mkdir()
    rotated = Image.Exif()
    rotated[0x0112] = 6  # seen by rotating it clockwise
    for i, place in enumerate(sorted(photos.glob("*/*.png"))):
        with Image.open(place) as photo:
            photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "again" / f"{i}.png", exif=rotated)
    assert verbs.embed(run, str(tmp_path / "again"), output=str(vectors)) == 0
    np.testing.assert_allclose(np.load(vectors), gallery.read(path).vectors, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.load(vectors), axis=1), 1, atol=1e-5)


def test_mistakes_are_said(run, photos, tmp_path):
    path = str(tmp_path / "g.safetensors")
    with pytest.raises(UserError, match="--do=enrol makes one"):
        verbs.gallery("", path)
    with pytest.raises(UserError, match="needs --input"):
        verbs.gallery(run, path, "enrol")
    with pytest.raises(UserError, match="needs --workdir"):
        verbs.gallery("", path, "enrol", str(photos))
    with pytest.raises(UserError, match="no --do=enroll"):
        verbs.gallery(run, path, "enroll", str(photos))
    verbs.gallery(run, path, "enrol", str(photos))
    with pytest.raises(UserError, match="called 'person9'"):
        verbs.gallery("", path, "delete", name="person9")
    with pytest.raises(UserError, match="takes --name"):
        verbs.gallery("", path, "delete")
    with pytest.raises(UserError, match="2026-01-31"):
        verbs.gallery("", path, "delete", before="yesterday")
    found = gallery.read(path)
    gallery.save(path, Index.build(found.vectors, names=found.names, titles=found.titles))
    with pytest.raises(UserError, match="another model"):
        verbs.predict(run, str(photos), gallery=path, out=io.StringIO())
    Index.build(found.vectors).save(path)
    with pytest.raises(UserError, match="no gallery"):
        verbs.gallery("", path)
    (tmp_path / "g.safetensors").write_bytes(b"0123456789")
    with pytest.raises(UserError, match="damaged"):
        verbs.gallery("", path)
