"""Pictures with captions: the layouts, the splits by picture, and what is wrong with them in one sentence.

Legend: C captions, L tokens of each.
"""

import io
import json
import pathlib
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.image.captions import CaptionedPictures
from bigbase_jax.data.sources.synthetic.shapes import CaptionedShapes
from bigbase_jax.text.tokenizer import Characters, load

NAMES = [f"p{i}.png" for i in range(10)]


def picture(shade=128, size=(6, 4), mode="RGB", **how):
    made = io.BytesIO()
    Image.new(mode, size, shade if mode != "RGB" else (shade, 0, 0)).save(
        made, "PNG" if "exif" not in how else "JPEG", **how
    )
    return made.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for i, name in enumerate(NAMES):
        (tmp_path / "images" / name).write_bytes(picture(20 * i))
    return tmp_path


def opened(root, **how):
    how = {"tokenizer": Characters(), "length": 40, **how}
    return CaptionedPictures(root=str(root), **how).prepare(pathlib.Path("unused"), 0, lambda line: None)


def said(data):
    """{file: its captions}, over all splits."""
    known = load(data.dataset_info["tokenizer"])
    found = {}
    for source in data.splits.values():
        for n in range(len(source)):
            example = source[n]
            real = example["segment_ids"] > 0
            texts = [known.decode(t[r]) for t, r in zip(example["tokens"], real, strict=True) if r.any()]
            found[source.name(n).rsplit("/", 1)[-1]] = texts
    return found


def table(folder, rows, name="captions.csv", header="image,caption"):
    (folder / name).write_text("\n".join([header, *rows]) + "\n", "utf-8")


TWO = {name: [f"number {i}", "a dark one, perhaps"] for i, name in enumerate(NAMES)}


def flickr(folder):
    (folder / "captions.txt").write_text(
        "image,caption\n" + "".join(f'{n},"{t}"\n' for n, texts in TWO.items() for t in texts)
    )


def tokens_of_flickr(folder):
    lines = [f"{n}#{i}\t{t}\n" for n, texts in TWO.items() for i, t in enumerate(texts)]
    (folder / "Flickr8k.token.txt").write_text("".join(lines))


def lines_of_json(folder):
    rows = [json.dumps({"image": f"images/{n}", "captions": texts}) for n, texts in TWO.items()]
    (folder / "all.jsonl").write_text("\n".join(rows))


def coco(folder):
    images = [{"id": i, "file_name": n} for i, n in enumerate(TWO)]
    notes = [{"image_id": i, "caption": t} for i, texts in enumerate(TWO.values()) for t in texts]
    (folder / "notes.json").write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))


def karpathy(folder):
    images = [{"filename": n, "sentences": [{"raw": t} for t in texts]} for n, texts in TWO.items()]
    (folder / "dataset.json").write_text(json.dumps({"images": images, "dataset": "some"}))


def beside(folder):
    for name, texts in TWO.items():
        (folder / "images" / name).with_suffix(".txt").write_text("\n".join(texts))


@pytest.mark.parametrize("layout", [flickr, tokens_of_flickr, lines_of_json, coco, karpathy, beside])
def test_every_layout_holds_the_same(folder, layout):
    layout(folder)
    data = opened(folder)
    assert {n: list(texts) for n, texts in said(data).items()} == TWO
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 8, "val": 1, "test": 1}
    example = data.splits["train"][0]
    assert example["image"].shape == (4, 6, 3) and example["tokens"].shape == example["segment_ids"].shape == (5, 40)
    assert "20 captions" in data.description


def test_each_question_of_a_picture_is_an_example_whose_answers_stand_behind_it(folder):
    rows = [f"{n},{q},{a}" for n in NAMES for q, a in (("dark?", "yes"), ("dark?", "no"), ("what?", "red"))]
    table(folder, rows, header="image,question,answer")
    data = opened(folder)
    source, known = data.splits["test"], load(data.dataset_info["tokenizer"])
    assert len(source) == 2 and source.name(0) == source.name(1)
    for n, texts in ((0, ["dark?yes", "dark?no"]), (1, ["what?red"])):
        example = source[n]
        real, prompt = example["segment_ids"] > 0, example["prompt"]
        assert [known.decode(t[r]) for t, r in zip(example["tokens"], real, strict=True) if r.any()] == texts
        begun = prompt[prompt >= 0]
        assert known.decode(begun) == texts[0][: texts[0].index("?") + 1]
        np.testing.assert_array_equal(example["tokens"][0, : len(begun)], begun)


def test_archives_and_bytes_in_tables_are_read(folder, tmp_path):
    flickr(folder)
    want = said(opened(folder))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as packed:
        packed.write(folder / "captions.txt", "data/captions.txt")
        for name in NAMES:
            packed.write(folder / "images" / name, f"data/images/{name}")
    assert said(opened(tmp_path / "all.zip")) == want
    (tmp_path / "table").mkdir()
    rows = [{"image": {"bytes": picture(20 * i), "path": n}, "text": TWO[n]} for i, n in enumerate(NAMES)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table" / "train.parquet")
    data = opened(tmp_path / "table", val_fraction=0.2)
    assert {len(s) for s in data.splits.values()} == {7, 2, 1} and len(said(data)) == 10
    assert sorted(int(s[n]["image"][0, 0, 0]) for s in data.splits.values() for n in range(len(s))) == list(
        range(0, 200, 20)
    )


def test_splits_are_of_pictures_and_named_ones_are_kept(folder):
    lines = [f"{n},{t} {k}" for k in range(3) for n, texts in TWO.items() for t in ("one", "two")]
    table(folder, lines)
    first, again, other = opened(folder, seed=1), opened(folder, seed=1), opened(folder, seed=2)
    names = [
        {s: [d.splits[s].name(n) for n in range(len(d.splits[s]))] for s in d.splits} for d in (first, again, other)
    ]
    assert names[0] == names[1] != names[2]
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert sorted(n for some in names[0].values() for n in some) == [f"images/{n}" for n in NAMES]
    assert "left out: 10 captions beyond 5 of a picture" in first.description
    rows = [f"{n},some,{'val' if i == 3 else 'test' if i > 7 else 'train'}" for i, n in enumerate(NAMES)]
    table(folder, rows, header="image,caption,split")
    assert {s: len(x) for s, x in opened(folder).splits.items()} == {"train": 7, "val": 1, "test": 2}
    table(folder, [*rows, "p3.png,again,train"], header="image,caption,split")
    with pytest.raises(UserError, match="p3.png is in the splits 'val' and 'train'"):
        opened(folder)


def test_other_scripts_and_empty_captions(folder):
    texts = ["一只猫在草地上", "кошка", "قطة", "👩‍👩‍👧 aé", " ", "", "a cat", "a cat", "a cat", "a cat"]
    rows = [json.dumps({"image": n, "caption": t}) for n, t in zip(NAMES, texts, strict=True)]
    (folder / "all.jsonl").write_text("\n".join(rows))
    data = opened(folder, val_fraction=0.0, test_fraction=0.0)
    found = said(data)
    assert [found[n][0] for n in NAMES[:4]] == texts[:4] and len(found) == 8
    assert "left out: 2 empty captions, 2 pictures without a caption" in data.description
    (folder / "all.jsonl").write_text(json.dumps({"image": "p0.png", "caption": "\ud800"}))
    with pytest.raises(UserError, match="half a character"):
        opened(folder)
    (folder / "all.jsonl").write_text(json.dumps({"image": "p0.png", "caption": ""}))
    with pytest.raises(UserError, match="no picture with a caption"):
        opened(folder)


def test_grey_deep_and_turned_pictures(folder):
    flickr(folder)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees
    deep = io.BytesIO()
    Image.fromarray(np.full((4, 6), 51_400, np.uint16)).save(deep, "PNG")
    for name, made in (
        ("p0.png", picture(77, mode="L")),
        ("p1.png", deep.getvalue()),
        ("p2.png", picture(exif=turned)),
    ):
        (folder / "images" / name).write_bytes(made)
    data = opened(folder, val_fraction=0.0, test_fraction=0.0)
    source = data.splits["train"]
    image = {source.name(n)[-6:]: source[n]["image"] for n in range(3)}
    assert (image["p0.png"] == 77).all() and (image["p1.png"] == 200).all()
    assert image["p2.png"].shape == (6, 4, 3) and image["p0.png"].shape == image["p1.png"].shape == (4, 6, 3)
    (folder / "images" / "p3.png").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"p3\.png: this is not a picture"):
        opened(folder, val_fraction=0.0, test_fraction=0.0).splits["train"][3]


@pytest.mark.parametrize(
    ("rows", "header", "words"),
    [
        (["p0.png,a"], "photo,caption", "no column 'image'"),
        (["p0.png,a"], "image,words", "no column 'caption'"),
        ([",a"], "image,caption", "line 2 names no picture"),
        (["gone.png,a"], "image,caption", "none of the 1 pictures that its captions name, such as gone.png"),
        (["../../etc/passwd,a"], "image,caption", "none of the 1 pictures"),
    ],
)
def test_mistakes_are_one_sentence(folder, rows, header, words):
    table(folder, rows, header=header)
    with pytest.raises(UserError, match=words):
        opened(folder)


def test_what_is_not_there_is_told(folder):
    table(folder, [*(f"{n},a b" for n in NAMES), "gone.png,a b"])
    assert "1 pictures that are not there left out, such as gone.png" in opened(folder).description
    (folder / "again").mkdir()
    (folder / "again" / "p4.png").write_bytes(picture())
    with pytest.raises(UserError, match=r"p4\.png, which again/p4.png and images/p4.png may be"):
        opened(folder)
    (folder / "captions.csv").unlink()
    with pytest.raises(UserError, match="nothing that says what is on them"):
        opened(folder)
    (folder / "notes.json").write_text(json.dumps({"images": [1], "annotations": []}))
    with pytest.raises(UserError, match="images holds int"):
        opened(folder)
    (folder / "notes.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": 3, "caption": "a"}]}))
    with pytest.raises(UserError, match="annotation 0 is of the picture 3"):
        opened(folder)
    with pytest.raises(UserError, match="length is 2"):
        opened(folder, length=2)


def test_the_shapes_are_where_the_words_say(tmp_path):
    data = CaptionedShapes(count=60).prepare(tmp_path, 0, lambda line: None)
    known, source = load(data.dataset_info["tokenizer"]), data.splits["train"]
    colours = {"red": (206, 48, 44), "blue": (46, 84, 196), "yellow": (232, 198, 44)}
    seen = 0
    for n in range(len(source)):
        example = source[n]
        words = known.decode(example["tokens"][0][example["segment_ids"][0] > 0]).split()
        first, second = words[1], words[-2]
        if first == second or not {first, second} <= set(colours):
            continue
        at = [
            np.argwhere(np.abs(example["image"].astype(int) - colours[c]).sum(-1) < 30).mean(0) for c in (first, second)
        ]
        axis = 0 if "above" in words else 1
        assert at[0][axis] < at[1][axis]
        seen += 1
    assert seen > 3
    again = CaptionedShapes(count=60).prepare(tmp_path, 0, lambda line: None).splits["train"][5]
    np.testing.assert_array_equal(again["image"], source[5]["image"])
