"""Folders of people: nobody in two splits, pairs that stay whole, LFW's list and ORL's format, and what is wrong."""

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data, KeptSource
from bigbase_jax.data.sources.image.faces import Faces
from bigbase_jax.data.sources.image.image import decode
from bigbase_jax.data.sources.synthetic.faces import DrawnFaces


def people(root, counts, suffix="png"):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(1, count + 1):
            Image.fromarray(rng.integers(0, 256, (12, 10), np.uint8)).save(root / name / f"{name}_{i:04d}.{suffix}")
    return root


def listed(root, same, different):
    lines = [str(len(same)), *("\t".join(map(str, pair)) for pair in (*same, *different))]
    (root / "pairsDevTrain.txt").write_text("\n".join(lines) + "\n")


def owners(source):
    return {source.name(i).split("/")[-2] for i in range(len(source))}


@pytest.fixture
def lfw(tmp_path):
    root = people(tmp_path / "images", {f"P{i:02d}": 1 + i % 3 for i in range(60)}).parent
    same = [(f"P{i:02d}", 1, 2) for i in range(60) if i % 3]
    listed(root, same, [(f"P{i:02d}", 1, f"P{i + 1:02d}", 1) for i in range(0, 50, 2)])
    return root


def test_nobody_is_in_two_splits_and_no_pair_is_torn(lfw):
    made = Faces(str(lfw))
    parts = {name: owners(source) for name, source in made.splits.items()}
    assert all(len(part) > 3 for part in parts.values())
    assert not parts["train"] & parts["test"] and not parts["val"] & parts["test"] and not parts["train"] & parts["val"]
    given = Faces(str(lfw), val_fraction=0.4, test_fraction=0.5)  # nine folds of ten
    count = {name: len(source.same) for name, source in given.splits.items() if name != "train"}
    assert sum(count.values()) == pytest.approx(0.9 * 65, abs=5) and min(count.values()) > 20
    for name in ("val", "test"):
        source = made.splits[name]
        assert (source.labels[source.pairs[:, 0]] == source.labels[source.pairs[:, 1]]).tolist() == source.same.tolist()
        assert source.labels.min() >= made.dataset_info["num_classes"] and 0 < source.same.mean() < 1
    assert made.splits["train"].pairs is None
    assert set(made.splits["train"].labels) == set(range(made.dataset_info["num_classes"]))
    assert "people" in made.description and "fewer than 2 photos are not trained on" in made.description
    everyone = Faces(str(lfw), least=1)
    assert len(everyone.splits["train"]) > len(made.splits["train"])
    assert everyone.fingerprint() != made.fingerprint() != Faces(str(lfw), seed=1).fingerprint()


def test_pairs_follow_photos_that_cannot_be_read(lfw):
    source = Faces(str(lfw)).splits["test"]
    kept = KeptSource(source, "test", [(int(source.pairs[0, 0]), "broken")])
    assert 0 < len(kept.pairs) < len(source.pairs) and len(kept.same) == len(kept.pairs)
    left = [{source.name(i) for i in pair} for pair in source.pairs]
    assert all({kept.name(i) for i in pair} in left for pair in kept.pairs)
    assert KeptSource(source, "test", []).pairs is source.pairs
    prepared = Data(Faces(str(lfw)), 4, cache_limit_gb=0, check="none").prepare(lambda line: None)
    assert prepared.source("test").pairs is not None and prepared.source("train").pairs is None


def test_without_pairs_people_are_dealt_and_photos_may_be(tmp_path):
    root = people(tmp_path, {f"s{i}": 4 for i in range(20)}, "pgm")
    made = Faces(str(root))
    assert [len(owners(made.splits[name])) for name in ("train", "val", "test")] == [14, 2, 4]
    assert made.splits["test"].pairs is None
    photos = Faces(str(root), split="photos", val_fraction=0, test_fraction=0.5)
    assert {name: len(source) for name, source in photos.splits.items()} == {"train": 40, "test": 40}
    assert owners(photos.splits["train"]) == owners(photos.splits["test"]) and len(owners(photos.splits["test"])) == 20
    names = [{photos.splits[s].name(i) for i in range(40)} for s in ("train", "test")]
    assert not names[0] & names[1] and photos.dataset_info["num_classes"] == 20


def test_a_person_with_one_photo_is_tested_but_not_trained_on(tmp_path):
    root = people(tmp_path, {f"p{i}": 1 for i in range(20)} | {f"q{i}": 3 for i in range(10)})
    made = Faces(str(root), test_fraction=0.5, val_fraction=0.0)
    assert all(sum(n.startswith(f"{o}/") for n in names(made)) > 1 for o in owners(made.splits["train"]))
    assert any(owner.startswith("p") for owner in owners(made.splits["test"]))


def names(made):
    return [made.splits["train"].name(i) for i in range(len(made.splits["train"]))]


def test_what_is_wrong_is_said_in_a_sentence(tmp_path, lfw):
    with pytest.raises(UserError, match="people with 4 photos or more to train on"):
        Faces(str(lfw), least=4)
    with pytest.raises(UserError, match='"photos"'):
        Faces(str(lfw), split="faces")
    (lfw / "pairsDevTrain.txt").write_text("2\nP01\tone\t2\n")
    with pytest.raises(UserError, match="line 2, is no pair"):
        Faces(str(lfw))
    (lfw / "pairsDevTrain.txt").write_text("P99\t1\t2\n")
    with pytest.raises(UserError, match="names nobody who has a folder, such as 'P99'"):
        Faces(str(lfw))
    (lfw / "pairsDevTrain.txt").write_text("P01\t8\t9\n")
    with pytest.raises(UserError, match="none has both photos"):
        Faces(str(lfw), val_fraction=0.4, test_fraction=0.5)
    (lfw / "pairsDevTrain.txt").write_bytes(b"P01\t\xff\xfe\t9\n")
    with pytest.raises(UserError, match="pairsDevTrain"):
        Faces(str(lfw))
    root = people(tmp_path / "split" / "train", {"a": 2, "b": 2}).parent
    people(root / "test", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="split=photos"):
        Faces(str(root))


def test_grey_pictures_of_8_and_16_bits_are_read_alike(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (28, 23), np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.pgm")
    (tmp_path / "b.pgm").write_bytes(b"P5\n23 28\n65535\n" + (grey.astype(np.uint16) * 257).astype(">u2").tobytes())
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "c.png")
    for name in ("a.pgm", "b.pgm", "c.png"):
        assert (decode(str(tmp_path / name)) == grey[..., None]).all(), name
    (tmp_path / "d.pgm").write_bytes(b"P5\n99999 99999\n255\n")
    with pytest.raises(UserError, match=r"99,999 x 99,999"):
        decode(str(tmp_path / "d.pgm"))


def test_drawn_people_look_like_themselves_and_are_in_one_split():
    made = DrawnFaces(size=24, people=6, val_people=2, test_people=3, photos=5)
    assert [len(source) for source in made.splits.values()] == [30, 10, 15]
    assert made.splits["test"].labels.min() == 8 and made.dataset_info["num_classes"] == 6
    train = made.splits["train"]
    x = np.stack([train[i]["image"] for i in range(30)]).astype(float)
    assert (train[3]["image"] == DrawnFaces(24, 6, 2, 3, 5).splits["train"][3]["image"]).all()
    middle = x[:, 8:16, 8:16].mean((1, 2)).reshape(6, 5, 3)
    assert middle.mean(1).std(0).mean() > middle.std(1).mean() / 2  # skins differ about as much as lights
    assert (x[0] != x[1]).mean() > 0.5
    with pytest.raises(UserError, match="16 pixels"):
        DrawnFaces(size=8)
