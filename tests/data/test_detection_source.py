"""Pictures with boxes: the same ones in every format, what is wrong with boxes, splits, EXIF, hostile files."""

import io
import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.data.files import Limits
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.image.detection import DetectionFolder
from bigbase_jax.data.sources.image.image import moved_upright, turned_upright
from bigbase_jax.data.transforms.boxes import Letterbox, PadBoxes

W, H = 80, 60
BOXES = {  # picture -> (label, x0, y0, x1, y1)
    "a": [("cat", 8, 6, 40, 30), ("dog", 20, 10, 60, 50)],
    "b": [("dog", 0, 0, 80, 60)],
    "c": [],
}


def picture(path, size=(W, H), mode="RGB", exif=None, format=None):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    made = Image.new(mode, size)
    more = {}
    if exif:
        found = Image.Exif()
        found[0x0112] = exif
        more["exif"] = found
    made.save(path, format=format, **more)


def voc(path, boxes, size=(W, H), more="", difficult=()):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    objects = "".join(
        f"<object><name>{label}</name><difficult>{int(i in difficult)}</difficult><bndbox><xmin>{a}</xmin><ymin>{b}"
        f"</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for i, (label, a, b, c, d) in enumerate(boxes)
    )
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    with open(path, "w") as file:
        file.write(f"{more}<annotation><filename>no such.jpg</filename>{sides}{objects}</annotation>")


def as_voc(root):
    for name, boxes in BOXES.items():
        picture(f"{root}/JPEGImages/{name}.jpg")
        voc(f"{root}/Annotations/{name}.xml", boxes)


def as_coco(root):
    images, things = [], []
    for n, (name, boxes) in enumerate(BOXES.items()):
        picture(f"{root}/images/{name}.jpg")
        images.append({"id": n + 5, "file_name": f"{name}.jpg", "width": W, "height": H})
        for label, a, b, c, d in boxes:
            kind = {"cat": 3, "dog": 9}[label]
            things.append({"id": len(things), "image_id": n + 5, "category_id": kind, "bbox": [a, b, c - a, d - b]})
    names = [{"id": 9, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 1, "name": "bird"}]
    os.makedirs(f"{root}/annotations", exist_ok=True)
    with open(f"{root}/annotations/all.json", "w") as file:
        json.dump({"images": images, "annotations": things, "categories": names}, file)


def as_yolo(root):
    for name, boxes in BOXES.items():
        picture(f"{root}/images/{name}.jpg")
        lines = [
            f"{['cat', 'dog'].index(label)} {(a + c) / 2 / W} {(b + d) / 2 / H} {(c - a) / W} {(d - b) / H}\n"
            for label, a, b, c, d in boxes
        ]
        if lines:  # a picture without file is background
            os.makedirs(f"{root}/labels", exist_ok=True)
            with open(f"{root}/labels/{name}.txt", "w") as file:
                file.writelines(lines)
    with open(f"{root}/data.yaml", "w") as file:
        file.write("train: images\nnc: 2\nnames:\n  0: cat\n  1: dog\n")


def as_table(root, header="filename,width,height,class,xmin,ymin,xmax,ymax"):
    lines = [header] if header else []
    for name, boxes in BOXES.items():
        picture(f"{root}/{name}.jpg")
        size = f"{W},{H}," if header else ""
        for label, a, b, c, d in boxes:
            if header:
                lines.append(f"{name}.jpg,{size}{label},{a},{b},{c},{d}")
            else:
                lines.append(f"{name}.jpg,{a},{b},{c},{d},{label}")
        if not boxes:
            lines.append(f"{name}.jpg,{size},,,," if header else f"{name}.jpg,,,,,")
    with open(f"{root}/boxes.csv", "w") as file:
        file.write("\n".join(lines) + "\n")


FORMATS = {
    "voc": (as_voc, "Pascal VOC (corners in pixels)"),
    "coco": (as_coco, "COCO (corner and size in pixels)"),
    "yolo": (as_yolo, "YOLO (centre and size in shares of the sides)"),
    "table": (as_table, "a table (corners in pixels)"),
    "plain": (lambda root: as_table(root, ""), "a table (corners in pixels)"),
}


def opened(root, **more):
    return DetectionFolder(str(root), **{"val_fraction": 0.0, "test_fraction": 0.0, **more})


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("archive", [False, True])
def test_the_same_boxes_in_every_format(tmp_path, form, archive):
    write, said = FORMATS[form]
    root = tmp_path / "set"
    write(str(root))
    if archive:
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as file:
            for path in sorted(root.rglob("*")):
                file.write(path, str(path.relative_to(root)))
        root = tmp_path / "set.zip"
    data = opened(root)
    assert said in data.description and "3 pictures with 3 boxes of 2 classes" in data.description
    assert "1 without boxes" in data.description
    assert data.dataset_info["class_names"] == ("cat", "dog")
    source = data.splits["train"]
    for index, name in enumerate(BOXES):
        example = source[index]
        assert name in source.name(index) and example["image"].shape == (H, W, 3)
        wanted = np.array([box[1:] for box in BOXES[name]], np.float32).reshape(-1, 4)
        np.testing.assert_allclose(example["boxes"], wanted, atol=1e-4)
        assert example["classes"].tolist() == [["cat", "dog"].index(box[0]) for box in BOXES[name]]
        assert example["boxes"].dtype == np.float32 and example["classes"].dtype == np.int32
    assert opened(root).fingerprint() == data.fingerprint()


def test_a_moved_box_is_other_data(tmp_path):
    as_voc(str(tmp_path))
    before = opened(tmp_path).fingerprint()
    voc(f"{tmp_path}/Annotations/b.xml", [("dog", 0, 0, 80, 59)])
    assert opened(tmp_path).fingerprint() != before


BAD = {
    "nan": ("nan", 3, 9, 9),
    "flat": (5, 5, 5, 20),
    "reversed": (30, 25, 10, 15),
    "outside": (100, 100, 120, 120),
    "beyond": (-10, 30, 20, 90),
    "fine": (1, 1, 9, 9),
}


def test_what_is_wrong_with_boxes_is_mended_or_left_out_and_told_in_one_line(tmp_path):
    picture(f"{tmp_path}/a.png")
    voc(f"{tmp_path}/a.xml", [(name, *box) for name, box in BAD.items()], difficult=(5,))
    data = opened(tmp_path)
    for said in (
        "1 boxes whose numbers are none",
        "1 boxes of no area",
        "1 boxes outside of their picture",
        "1 boxes with reversed corners put right",
        "1 boxes cut at the border",
        "1 crowds and difficult objects",
    ):
        assert said in data.description
    assert "\n" not in data.description
    example, names = data.splits["train"][0], data.dataset_info["class_names"]
    found = {names[c]: box.tolist() for c, box in zip(example["classes"], example["boxes"], strict=True)}
    assert found == {"reversed": [10, 15, 30, 25], "beyond": [0, 30, 20, 60], "fine": [1, 1, 9, 9]}
    assert example["crowd"].tolist() == [float(names[c] == "fine") for c in example["classes"]]


def test_ten_thousand_boxes_in_one_picture(tmp_path):
    picture(f"{tmp_path}/a.png")
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (10_000, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 10, (10_000, 2))], 1)
    voc(f"{tmp_path}/a.xml", [("x", *box) for box in boxes])
    data = opened(tmp_path, most_boxes=50)
    assert "1 pictures with more than 50 boxes, of which the largest stay (most_boxes=10000" in data.description
    example = data.splits["train"][0]
    area = np.sort((boxes[:, 2:] - boxes[:, :2]).prod(1))[-50:]
    kept = (example["boxes"][:, 2:] - example["boxes"][:, :2]).prod(1)
    np.testing.assert_allclose(np.sort(kept), area, rtol=1e-4)
    assert len(opened(tmp_path, most_boxes=10_000).splits["train"][0]["boxes"]) == 10_000


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_move_as_the_pixels_of_an_exif_rotated_photo_do(orientation):
    stored = np.zeros((20, 30), np.uint8)
    stored[3:9, 4:16] = 255
    upright = turned_upright(stored, orientation)
    box = moved_upright(np.array([[4.0, 3, 16, 9]]), orientation, *upright.shape)[0]
    ys, xs = np.nonzero(upright)
    assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


@pytest.mark.parametrize(
    ("size", "box"), [((W, H), [24, 20, 54, 60]), ((H, W), [20, 6, 60, 36]), (None, [24, 20, 54, 60])]
)
def test_the_size_in_the_annotation_tells_whether_boxes_are_on_the_stored_or_the_upright_photo(tmp_path, size, box):
    picture(f"{tmp_path}/a.jpg", exif=6)  # stored 80x60, upright 60x80
    voc(f"{tmp_path}/a.xml", [("x", 20, 6, 60, 36)], size)
    example = opened(tmp_path).splits["train"][0]
    assert example["image"].shape == (W, H, 3)
    assert example["boxes"].tolist() == [box]


def test_an_annotation_of_another_size_is_named(tmp_path):
    picture(f"{tmp_path}/a.jpg")
    voc(f"{tmp_path}/a.xml", [("x", 1, 1, 9, 9)], (200, 100))
    with pytest.raises(UserError, match=r"a.xml says that .*a.jpg has 200x100 pixels, and it has 80x60"):
        opened(tmp_path).splits["train"][0]


def test_grey_and_16_bit_pictures(tmp_path):
    picture(f"{tmp_path}/a.png", mode="I;16")
    picture(f"{tmp_path}/b.png", mode="L")
    for name in "ab":
        voc(f"{tmp_path}/{name}.xml", [("x", 1, 1, 9, 9)])
    assert [opened(tmp_path).splits["train"][i]["image"].shape for i in (0, 1)] == [(H, W, 3)] * 2


# --- splits -----------------------------------------------------------------------------------------------------------


def test_official_lists_and_classes_that_train_lacks(tmp_path):
    as_voc(str(tmp_path))
    picture(f"{tmp_path}/JPEGImages/d.jpg")
    os.makedirs(f"{tmp_path}/ImageSets/Main")
    for split, names in {"train": "b c", "test": "a", "trainval": "a b c"}.items():
        with open(f"{tmp_path}/ImageSets/Main/{split}.txt", "w") as file:
            file.write("\n".join(names.split()) + "\n")
    data = opened(tmp_path)
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 2, "test": 1}
    assert data.dataset_info["class_names"] == ("dog",)
    assert "1 boxes of the class 'cat', which train lacks, left out" in data.description
    assert "1 pictures without annotation left out" in data.description
    assert data.splits["test"][0]["classes"].tolist() == [0]


def test_folders_and_files_named_after_splits(tmp_path):
    for split in ("train", "valid", "test"):  # as Roboflow writes COCO
        picture(f"{tmp_path}/{split}/same.jpg")
        image = {"id": 0, "file_name": "same.jpg", "width": W, "height": H}
        value = {"images": [image], "annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}]}
        with open(f"{tmp_path}/{split}/_annotations.coco.json", "w") as file:
            json.dump({**value, "categories": [{"id": 0, "name": "cells"}, {"id": 1, "name": "red"}]}, file)
    data = opened(tmp_path)
    assert {split: source.name(0) for split, source in data.splits.items()} == {
        "train": "train/same.jpg",
        "val": "valid/same.jpg",
        "test": "test/same.jpg",
    }
    assert data.dataset_info["class_names"] == ("red",)


def test_yolos_folders(tmp_path):
    for split in ("train", "val"):
        picture(f"{tmp_path}/images/{split}/x.jpg")
        os.makedirs(f"{tmp_path}/labels/{split}")
        with open(f"{tmp_path}/labels/{split}/x.txt", "w") as file:
            file.write("0 0.5 0.5 0.2 0.2\n")
    data = opened(tmp_path)
    assert {split: source.name(0) for split, source in data.splits.items()} == {
        "train": "images/train/x.jpg",
        "val": "images/val/x.jpg",
    }
    assert data.dataset_info["class_names"] == ("0",)


def test_seeded_splits_by_picture(tmp_path):
    for i in range(20):
        picture(f"{tmp_path}/{i}.png")
        voc(f"{tmp_path}/{i}.xml", [("x", 1, 1, 9, 9)])
    one, same, other = (DetectionFolder(str(tmp_path), seed=seed) for seed in (0, 0, 1))
    assert {split: len(source) for split, source in one.splits.items()} == {"train": 14, "val": 2, "test": 4}
    named = [[s.name(i) for s in d.splits.values() for i in range(len(s))] for d in (one, same, other)]
    assert named[0] == named[1] != named[2]


# --- what cannot be read ----------------------------------------------------------------------------------------------


def refused(root, match, **more):
    with pytest.raises(UserError, match=match) as found:
        opened(root, **more)
    assert "\n" not in str(found.value)


def test_xml_with_entities_is_refused_before_they_are_expanded(tmp_path):
    picture(f"{tmp_path}/a.png")
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
    voc(f"{tmp_path}/a.xml", [("&b;", 1, 1, 9, 9)], more=bomb)
    refused(tmp_path, r"a\.xml has a document type")
    secret = '<!DOCTYPE x [<!ENTITY a SYSTEM "file:///etc/passwd">]>'
    voc(f"{tmp_path}/a.xml", [("&a;", 1, 1, 9, 9)], more=secret)
    refused(tmp_path, r"a\.xml has a document type")
    voc(f"{tmp_path}/a.xml", [("&a;", 1, 1, 9, 9)])
    refused(tmp_path, r"a\.xml is not XML: undefined entity")


def test_broken_and_large_annotations(tmp_path):
    picture(f"{tmp_path}/a.png")
    refused(tmp_path, "has no boxes: neither")
    voc(f"{tmp_path}/a.xml", [("x", 1, "left", 9, 9)])
    refused(tmp_path, r"a\.xml: ymin is 'left', which is no number")
    voc(f"{tmp_path}/a.xml", [("x", 1, 1, 9, 9)] * 100)
    refused(tmp_path, "a.xml has more than 1,000 characters", limits=Limits(text=1000))
    os.remove(f"{tmp_path}/a.xml")
    with open(f"{tmp_path}/a.json", "w") as file:
        json.dump({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": []}, file)
    refused(tmp_path, "no picture of the train split has a box")
    with open(f"{tmp_path}/a.json", "w") as file:
        box = {"image_id": 1, "category_id": 4, "bbox": [1, 2, 3]}
        json.dump({"images": [{"id": 1, "file_name": "a.png"}], "annotations": [box], "categories": []}, file)
    refused(tmp_path, "has a box of category 4, which is not in categories")
    with open(f"{tmp_path}/a.json", "w") as file:
        json.dump({"images": [{"id": 1}], "annotations": [], "categories": []}, file)
    refused(tmp_path, "images is no list of objects with id and file_name")
    os.remove(f"{tmp_path}/a.json")
    with open(f"{tmp_path}/a.txt", "w") as file:
        file.write("0 0.5 0.5 0.1 0.1\n0 0.1 0.2 0.3 0.4 0.5 0.6 0.7 0.8\n")
    refused(tmp_path, r"a\.txt, line 2 is a polygon")
    with open(f"{tmp_path}/a.csv", "w") as file:
        file.write("filename,class,x0,y0,x1,y1\nother.png,cat,1,2,3,4\n")
    os.remove(f"{tmp_path}/a.txt")
    refused(tmp_path, r"none of the annotated pictures is in .*, such as other.png")
    refused(tmp_path, "there is no convention=yxyx", convention="yxyx")


def test_a_sender_cannot_name_pictures_outside_of_the_folder(tmp_path):
    picture(f"{tmp_path}/secret.png")
    picture(f"{tmp_path}/set/a.png")
    images = [{"id": 1, "file_name": "../secret.png"}, {"id": 2, "file_name": "a.png"}]
    things = [{"image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in (1, 2)]
    with open(f"{tmp_path}/set/a.json", "w") as file:
        json.dump({"images": images, "annotations": things, "categories": [{"id": 1, "name": "x"}]}, file)
    data = opened(tmp_path / "set")
    assert [data.splits["train"].name(i) for i in range(len(data.splits["train"]))] == ["a.png"]
    assert "1 annotated pictures that are not there (such as ../secret.png)" in data.description


def test_batches_of_static_shapes_and_the_way_back_to_original_pixels(tmp_path):
    as_voc(str(tmp_path))
    chain = (Letterbox((64, 64)), PadBoxes(5))
    prepared = Data(opened(tmp_path), 3, chain, chain, cache_limit_gb=0, workers=1).prepare(lambda line: None)
    (batch,) = prepared.eval_batches("train")
    assert batch["image"].shape == (3, 64, 64, 3) and batch["boxes"].shape == (3, 5, 4)
    assert batch["box_mask"].sum(1).tolist() == [2, 1, 0] and batch["size"].tolist() == [[H, W]] * 3
    back = (batch["boxes"][0, :2] - np.tile(batch["offset"][0], 2)) / np.tile(batch["scale"][0], 2)
    np.testing.assert_allclose(back, [box[1:] for box in BOXES["a"]], atol=1e-3)
    assert batch["image"][0, 0, 0].tolist() == [114] * 3 and batch["image"][0, 32, 32].max() < 10


def test_a_users_picture_keeps_its_pixels_beside_the_letterboxed_ones():
    file = io.BytesIO()
    Image.new("L", (31, 17), 200).save(file, "PNG")
    (example,) = DetectionFolder.codec({}, {}).decode(file.getvalue())
    seen = PadBoxes(3)(Letterbox((32, 32))(example, None), None)
    assert seen["original"].shape == (17, 31, 3) and seen["image"].shape == (32, 32, 3) and "boxes" not in seen
