"""Picture files, folders, idx, npz and TFDS: what is decoded, how it is split, and what is said when it is wrong."""

import base64
import gzip
import io
import os
import pickle
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.build import target
from bigbase_jax.core import Dataset, Source, UserError
from bigbase_jax.data.files import Limits
from bigbase_jax.data.sources.image.folder import ImageFolder
from bigbase_jax.data.sources.image.idx import Idx, read_idx
from bigbase_jax.data.sources.image.image import _whole_jpeg, decode
from bigbase_jax.data.sources.image.npz import Npz
from bigbase_jax.data.sources.splits import stratified, to_split_off

# Legend: N examples, H height, W width, C channels.


def _encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _gradient(height=24, width=32):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), np.full_like(x, 60)], -1).astype(np.uint8)


# --- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [("PNG", {}, 0), ("BMP", {}, 0), ("WEBP", {"lossless": True}, 0), ("JPEG", {"quality": 98, "subsampling": 0}, 8)],
)
def test_formats(kind, options, tolerance, tmp_path):
    x_HWC = _gradient()
    data = _encode(Image.fromarray(x_HWC), kind, **options)
    decoded = decode(data)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - x_HWC).max() <= tolerance
    (tmp_path / "picture").write_bytes(data)
    np.testing.assert_array_equal(decode(str(tmp_path / "picture")), decoded)
    np.testing.assert_array_equal(decode(tmp_path / "picture"), decoded)


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = _encode(
            frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
        )
        x_HWC = decode(data)
        assert x_HWC.shape == (6, 8, 3)
        assert (x_HWC == [255, 0, 0]).all(), kind


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    """EXIF 2.3, table 4: where the stored picture's row 0 and column 0 belong."""
    upright = Image.fromarray(_gradient())
    store = {  # how a camera held that way stores the upright picture
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store(np.asarray(upright))))
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 98, "subsampling": 0}), ("WEBP", {"lossless": True})):
        x_HWC = decode(_encode(stored, kind, exif=exif, **options))
        assert x_HWC.shape == (24, 32, 3)
        assert np.abs(x_HWC.astype(int) - np.asarray(upright)).max() <= 8, kind


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (16, 16), (33, 17), (50, 121)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        *(("RGB", {"subsampling": subsampling}) for subsampling in ("4:4:4", "4:2:2", "4:2:0")),
        ("RGB", {"progressive": True}),
        ("RGB", {"optimize": True, "restart_marker_rows": 1}),
        ("RGB", {"quality": 3}),
        ("RGB", {"keep_rgb": True}),
        ("L", {}),
        ("L", {"progressive": True}),
    ],
)
def test_a_jpeg_has_the_bits_of_pillow(mode, options, size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    data = _encode(Image.fromarray(pixels).convert(mode), "JPEG", **options)
    with Image.open(io.BytesIO(data)) as image:
        fast = _whole_jpeg(data, image)
        reference = np.asarray(image.convert("RGB"))
    assert fast is not None
    np.testing.assert_array_equal(fast, reference)
    np.testing.assert_array_equal(decode(data), reference)


def test_what_is_left_to_pillow():
    small, large, pixels = (Image.fromarray(_gradient(*size)) for size in ((8, 8), (64, 64), (30, 40)))
    small, large, whole = (_encode(image, "JPEG") for image in (small, large, pixels))
    for data, other in ((large, small), (small, large), (whole[:-200], whole), (whole[:300], whole), (b"", whole)):
        with Image.open(io.BytesIO(other)) as header:  # more or less than the header says
            assert _whole_jpeg(data, header) is None
    cmyk = _encode(pixels.convert("CMYK"), "JPEG", quality=98)
    with Image.open(io.BytesIO(cmyk)) as header:
        assert _whole_jpeg(cmyk, header) is None
    assert np.abs(decode(cmyk).astype(int) - _gradient(30, 40)).max() < 12
    mpo = _encode(pixels, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert decode(mpo).shape == (30, 40, 3)


def test_broken_exif_does_not_break_the_picture():
    x_HWC = decode(_encode(Image.fromarray(_gradient()), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage"))
    assert x_HWC.shape == (24, 32, 3)


def test_grey_and_black_and_white():
    grey = _gradient()[..., 0]
    np.testing.assert_array_equal(decode(_encode(Image.fromarray(grey))), np.repeat(grey[..., None], 3, -1))
    bits = decode(_encode(Image.fromarray(grey > 100)))
    np.testing.assert_array_equal(bits, np.repeat(np.where(grey > 100, 255, 0)[..., None], 3, -1))


def test_16_bit_grey_is_scaled_not_cut():
    values = np.array([[0, 257, 65535, 128 * 257, 300]], np.uint16)
    np.testing.assert_array_equal(decode(_encode(Image.fromarray(values)))[..., 0], [[0, 1, 255, 128, 1]])


def test_palette_with_and_without_transparency():
    picture = Image.new("P", (2, 1))
    picture.putpalette([200, 10, 20, 30, 40, 50])
    picture.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode(_encode(picture)), [[[200, 10, 20], [30, 40, 50]]])
    np.testing.assert_array_equal(decode(_encode(picture, transparency=1)), [[[200, 10, 20], [255, 255, 255]]])
    np.testing.assert_array_equal(decode(_encode(picture, "GIF", transparency=0))[0, 0], [255, 255, 255])


def test_alpha_is_laid_on_white():
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    x_HWC = decode(_encode(Image.fromarray(rgba)))
    np.testing.assert_array_equal(x_HWC, [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]])
    np.testing.assert_array_equal(decode(_encode(Image.fromarray(np.array([[[9, 0]]], np.uint8), "LA"))), [[[255] * 3]])
    keyed = _encode(Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), transparency=(1, 2, 3))
    np.testing.assert_array_equal(decode(keyed), [[[255, 255, 255], [4, 5, 6]]])


def test_cmyk():
    x_HWC = decode(_encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=98))
    assert x_HWC.shape == (16, 16, 3)
    assert np.abs(x_HWC.astype(int) - [255, 0, 0]).max() < 12


def test_draft_decodes_smaller_but_never_below_the_size_asked_for():
    data = _encode(Image.fromarray(_gradient(400, 640)), "JPEG", quality=95)
    assert decode(data, 100).shape == (100, 160, 3)
    assert decode(data, 101).shape == (200, 320, 3)
    assert decode(data, 401).shape == decode(data).shape == (400, 640, 3)
    small = np.asarray(Image.fromarray(decode(data)).reduce(4)).astype(int)
    assert np.abs(decode(data, 100) - small).mean() < 3


def _bomb():
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (30000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunk = header[12:]
    return header + zlib.crc32(chunk).to_bytes(4, "big") + b"\0\0\0\0IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "not a picture"),
        (b"\xff\xd8\xff\xe0 only begins like one", "picture"),
        (_encode(Image.fromarray(_gradient(200, 200)), "JPEG")[:-700], "truncated"),
        (_encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8)))[:-9000], "broken"),
        (_encode(Image.fromarray(_gradient()), "BMP")[:-700], "truncated"),
        (_encode(Image.fromarray(_gradient(90, 90)), "WEBP")[:-20], "broken|not a picture"),
        (_bomb(), r"30,000 x 30,000 pixels.*limits.pixels=900000000"),
    ],
    ids=["empty", "html", "magic", "jpeg", "png", "bmp", "webp", "bomb"],
)
def test_broken_files_are_named_with_the_reason(data, why, tmp_path):
    with pytest.raises(UserError, match=why):
        decode(data)
    path = tmp_path / "bröken.jpg"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"bröken.jpg: .*({why})"):
        decode(path)


# --- splits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_splits_are_disjoint_exhaustive_and_stratified(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 333)
    names = [f"{i}.jpg" for i in range(333)]
    fractions = {"test": 0.2, "val": 0.13}
    parts = stratified(names, labels, fractions, seed)
    np.testing.assert_array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(333))
    for split, fraction in fractions.items():
        for label in range(5):
            assert abs((labels[parts[split]] == label).sum() - fraction * (labels == label).sum()) <= 0.5
    again, other = stratified(names, labels, fractions, seed), stratified(names, labels, fractions, seed + 1)
    assert all(np.array_equal(parts[split], again[split]) for split in parts)
    assert not np.array_equal(parts["test"], other["test"])
    more_val = stratified(names, labels, {**fractions, "val": 0.5}, seed)
    np.testing.assert_array_equal(parts["test"], more_val["test"])
    assert set(parts["val"]) < set(more_val["val"])


def test_no_class_is_taken_from_train_as_a_whole():
    parts = stratified(["a", "b", "c", "d"], np.array([0, 0, 0, 1]), {"val": 0.9}, 0)
    np.testing.assert_array_equal(np.bincount([(0, 0, 0, 1)[i] for i in parts["train"]]), [1, 1])


def test_what_is_split_off():
    assert to_split_off(["train"], 0.1, 0.2) == {"test": 0.2, "val": 0.1}
    assert to_split_off(["train", "test"], 0.1, 0.2) == {"val": 0.1}
    assert to_split_off(["train", "val"], 0.1, 0.2) == {}


@pytest.mark.parametrize("fractions", [{"val": -0.1}, {"val": 1.0}, {"val": 0.5, "test": 0.5}])
def test_impossible_fractions(fractions):
    with pytest.raises(UserError, match=r"val_fraction.*below 1"):
        stratified(["a", "b"], np.array([0, 1]), fractions, 0)


# --- folders ----------------------------------------------------------------------------------------------------------


def _fill(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (5, 4), (i % 256, 0, 0)).save(path, "PNG")


def _numbered(n, suffix=".png"):
    return [f"{i:03d}{suffix}" for i in range(n)]


def _names(data):
    return {split: [source.name(i) for i in range(len(source))] for split, source in data.splits.items()}


def test_class_folders_are_split(tmp_path):
    _fill(tmp_path / "dog", *_numbered(40))
    _fill(tmp_path / "Äffchen 猫", *_numbered(20))
    data = ImageFolder(str(tmp_path))
    assert isinstance(data, Dataset)
    assert data.dataset_info == {"num_classes": 2, "class_names": ("dog", "Äffchen 猫")}
    assert {s: np.bincount(source.labels).tolist() for s, source in data.splits.items()} == {
        "train": [28, 14],
        "val": [4, 2],
        "test": [8, 4],
    }
    names = _names(data)
    assert len({name for part in names.values() for name in part}) == 60
    for split, source in data.splits.items():
        assert isinstance(source, Source)
        assert source.labels.dtype == np.int32
        for i, name in enumerate(names[split]):
            assert name.startswith("Äffchen") == bool(source.labels[i])
    example = data.splits["train"][0]
    assert example["image"].shape == (4, 5, 3)
    assert example["label"].dtype == np.int32
    assert names == _names(ImageFolder(str(tmp_path)))
    assert names != _names(ImageFolder(str(tmp_path), seed=1))
    copy = pickle.loads(pickle.dumps(data))
    assert _names(copy) == names
    np.testing.assert_array_equal(copy.splits["val"][1]["image"], data.splits["val"][1]["image"])


def test_another_class_moves_nothing(tmp_path):
    for name in ("b", "c"):
        _fill(tmp_path / name, *_numbered(30))
    before = _names(ImageFolder(str(tmp_path)))
    _fill(tmp_path / "a", *_numbered(30))
    after = _names(ImageFolder(str(tmp_path)))
    assert {s: [n for n in names if n[0] != "a"] for s, names in after.items()} == before


def test_split_folders(tmp_path):
    for split, count in (("train", 20), ("test", 3)):
        for name in ("cat", "dog"):
            _fill(tmp_path / split / name, *_numbered(count))
    data = ImageFolder(str(tmp_path))
    assert {split: len(source) for split, source in data.splits.items()} == {"train": 36, "val": 4, "test": 6}
    assert all(name.startswith("train/") for name in _names(data)["train"] + _names(data)["val"])
    assert all(name.startswith("test/") for name in _names(data)["test"])
    assert list(ImageFolder(str(tmp_path), val_fraction=0).splits) == ["train", "test"]
    for name in ("cat", "dog"):
        _fill(tmp_path / "Validation" / name, *_numbered(5))
    assert {s: len(v) for s, v in ImageFolder(str(tmp_path)).splits.items()} == {"train": 40, "val": 10, "test": 6}
    (tmp_path / "valid").mkdir()
    with pytest.raises(UserError, match="two folders for val"):
        ImageFolder(str(tmp_path))


def test_train_alone_is_split(tmp_path):
    for name in ("cat", "dog"):
        _fill(tmp_path / "train" / name, *_numbered(10))
    assert {s: len(v) for s, v in ImageFolder(str(tmp_path)).splits.items()} == {"train": 14, "val": 2, "test": 4}


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "car", "train"):
        _fill(tmp_path / name, *_numbered(10))
    assert ImageFolder(str(tmp_path)).dataset_info["class_names"] == ("bus", "car", "train")


def test_nesting_links_suffixes_and_litter(tmp_path):
    root = tmp_path / "root"
    _fill(root / "cat", "a.PNG", "deep/er/b.JpEg", ".hidden.png", ".cache/c.png")
    _fill(tmp_path / "elsewhere", "d.png")
    _fill(root / "dog", "e.webp", "f.gif")
    (root / "cat" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "loop").symlink_to(root / "cat")
    (root / "dog" / "g.png").symlink_to(tmp_path / "elsewhere" / "d.png")
    for name in ("Thumbs.db", "notes.txt", "noext"):
        (root / "dog" / name).write_text("x")
    (root / "__MACOSX" / "cat").mkdir(parents=True)
    (root / "README.md").write_text("x")
    data = ImageFolder(str(root), val_fraction=0, test_fraction=0)
    assert _names(data)["train"] == [
        "cat/a.PNG",
        "cat/deep/er/b.JpEg",
        "cat/linked/d.png",
        "dog/e.webp",
        "dog/f.gif",
        "dog/g.png",
    ]
    assert data.ignored == 5
    assert "5 other files ignored" in data.description
    assert len({data.splits["train"][i]["image"].tobytes() for i in range(6)}) > 1


def test_a_broken_file_is_named_and_listed(tmp_path):
    _fill(tmp_path / "cat", *_numbered(2))
    _fill(tmp_path / "dog", *_numbered(2))
    (tmp_path / "cat" / "000.png").write_bytes(b"junk")
    (tmp_path / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    source = ImageFolder(str(tmp_path), val_fraction=0, test_fraction=0).splits["train"]
    with pytest.raises(UserError, match=r"cat/000\.png: this is not a picture"):
        source[0]
    with pytest.raises(UserError, match=r"dog/gone\.png cannot be read: No such file"):
        source[[source.name(i) for i in range(len(source))].index("dog/gone.png")]


def test_fingerprint_follows_files_and_splits(tmp_path):
    for name in ("cat", "dog"):
        _fill(tmp_path / name, *_numbered(10))
    root = str(tmp_path)
    prints = [ImageFolder(root).fingerprint(), ImageFolder(root, seed=1).fingerprint()]
    prints.append(ImageFolder(root, val_fraction=0.3).fingerprint())
    prints.append(ImageFolder(root, draft_size=64).fingerprint())
    assert ImageFolder(root).fingerprint() == prints[0]
    os.utime(tmp_path / "cat" / "003.png", ns=(1, 1))
    prints.append(ImageFolder(root).fingerprint())
    (tmp_path / "cat" / "003.png").write_bytes(b"other")
    os.utime(tmp_path / "cat" / "003.png", ns=(1, 1))
    prints.append(ImageFolder(root).fingerprint())
    (tmp_path / "cat" / "003.png").rename(tmp_path / "cat" / "3.png")
    prints.append(ImageFolder(root).fingerprint())
    (tmp_path / "cat").rename(tmp_path / "lynx")
    prints.append(ImageFolder(root).fingerprint())
    assert len(set(prints)) == 8


@pytest.mark.parametrize(
    "names",
    [
        ("training_set", "test_set"),
        ("Training", "Validation", "Testing"),
        ("train images", "valid-data", "TestData"),
        ("TRAIN2017", "dev", "holdout"),
        ("dataset/trainset", "dataset/EVAL"),
        ("a/b/train", "a/b/hold_out"),
        ("training_set/training_set", "test_set/test_set"),
    ],
)
def test_split_folders_of_the_usual_names(tmp_path, names):
    for i, name in enumerate(names):
        for label in ("cats", "dogs"):
            _fill(tmp_path / name / label, *_numbered(10 - i))
    data = ImageFolder(str(tmp_path))
    assert data.dataset_info["class_names"] == ("cats", "dogs")
    splits = dict(zip(("train", *{2: ("test",), 3: ("val", "test")}[len(names)]), names, strict=True))
    if names[-1].endswith("EVAL"):
        splits = {"train": names[0], "val": names[1]}
    assert {split for split in data.splits if split != "val"} == set(splits) - {"val"}
    for split, name in splits.items():
        source = data.splits[split]
        assert all(source.name(i).startswith(f"{name}/") for i in range(len(source)))


def test_classes_may_be_called_as_splits_are(tmp_path):
    for name in ("train/steam", "train/electric", "bus", "test tube", "dev"):
        _fill(tmp_path / "a" / name, *_numbered(2))
    assert ImageFolder(str(tmp_path / "a")).dataset_info["class_names"] == ("bus", "dev", "test tube", "train")
    for name in ("train/train", "train/bus", "test/train", "docs"):
        _fill(tmp_path / "b" / name, *_numbered(4))
    data = ImageFolder(str(tmp_path / "b"))
    assert data.dataset_info["class_names"] == ("bus", "train") and len(data.splits["test"]) == 4
    assert data.description.endswith("; not used: docs")


@pytest.mark.parametrize("names", [("fold1", "fold2"), ("seg_train/seg_train", "seg_test/seg_test", "seg_pred")])
def test_folders_with_the_same_folders_in_them_are_no_classes(tmp_path, names):
    for name in names[:2]:
        _fill(tmp_path / name / "cats", *_numbered(2))
        _fill(tmp_path / name / "Dogs", *_numbered(2))
    for name in names[2:]:
        _fill(tmp_path / name, *_numbered(2))
    first, second = sorted(name.split("/")[0] for name in names[:2])
    with pytest.raises(UserError, match=f"has {first} and {second}, each with the folders cats, dogs; if the former"):
        ImageFolder(str(tmp_path))


def test_folder_mistakes(tmp_path):
    def sentence(path, match):
        with pytest.raises(UserError, match=match) as caught:
            ImageFolder(str(path))
        assert "\n" not in str(caught.value)

    _fill(tmp_path / "photos" / "cat", *_numbered(2))
    sentence(tmp_path / "photo", "there is no folder .*photo. Did you mean 'photos'?")
    sentence(tmp_path / "photoz" / "cat", "Did you mean 'photos'?")
    sentence(tmp_path / "photos" / "cat" / "000.png", "is a file, not a folder")
    sentence(tmp_path / "photos" / "cat", "has no class folders")
    sentence(tmp_path / "photos", "one class only, 'cat'")
    _fill(tmp_path / "PetImages" / "dog", *_numbered(2))
    (tmp_path / "photos" / "dog").mkdir()
    (tmp_path / "photos" / "dog" / "x.heic").write_text("x")
    sentence(tmp_path / "photos", r"photos/dog holds no pictures .* only 1 \.heic")
    (tmp_path / "photos" / "dog" / "x.heic").unlink()
    sentence(tmp_path / "photos", "photos/dog holds no pictures .* delete it")

    split = tmp_path / "split"
    for part in ("train", "test"):
        _fill(split / part / "cat", *_numbered(2))
        _fill(split / part / "dog", *_numbered(2))
    (split / "test" / "dog").rename(split / "test" / "dogs")
    sentence(split, "test has a class 'dogs' that train does not have. Did you mean 'dog'?")
    _fill(tmp_path / "flat" / "train", *_numbered(2))
    _fill(tmp_path / "flat" / "test", *_numbered(2))
    sentence(tmp_path / "flat", "holds pictures but no class folders")
    _fill(tmp_path / "half" / "test" / "cat", *_numbered(2))
    _fill(tmp_path / "half" / "val" / "cat", *_numbered(2))
    sentence(tmp_path / "half", "no train folder")


def test_draft_size_of_a_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(_gradient(400, 640)).save(tmp_path / name / "a.jpg")
    data = ImageFolder(str(tmp_path), draft_size=50)
    assert data.splits["train"][0]["image"].shape == (50, 80, 3)
    (answered,) = data.codec({"draft_size": 50}, {}).decode(str(tmp_path / "cat" / "a.jpg"))
    assert answered["image"].shape == (50, 80, 3)  # a prediction decodes as the training did
    with pytest.raises(UserError, match="draft_size is 0"):
        ImageFolder(str(tmp_path), draft_size=0)


def test_read_a_users_file(tmp_path):
    for name in ("cat", "dog"):
        _fill(tmp_path / name, "a.png")
    codec, path = ImageFolder.codec({}, {}), tmp_path / "cat" / "a.png"
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    expected = ImageFolder(str(tmp_path)).splits["train"][0]["image"]
    for given in (str(path), data, {"image": data}, {"image": text}, {"image": f"data:image/png;base64,{text}"}):
        (example,) = codec.decode(given)
        assert example.keys() == {"image"} and example["image"].shape == (4, 5, 3)
        np.testing.assert_array_equal(example["image"], expected)
    with pytest.raises(UserError, match="there is no file .*b.png.*'a.png'"):
        codec.decode(str(tmp_path / "cat" / "b.png"))
    with pytest.raises(UserError, match="is a folder, not a file"):
        codec.decode(str(tmp_path / "cat"))
    for row in ({"image": str(path)}, {"image": 7}, {}):  # a row names no files of this machine
        with pytest.raises(UserError, match="no picture file in base64"):
            codec.decode(row)
    with pytest.raises(UserError, match=r"limits.pixels=20"):
        ImageFolder.codec({"limits": target(Limits, pixels=10)}, {}).decode(data)


# --- idx --------------------------------------------------------------------------------------------------------------


def _idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def _write_idx(folder, zipped=True, dot="-", prefix="", test="t10k"):
    rng = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    arrays = {}
    for split, n in (("train", 50), (test, 20)):
        arrays[split] = rng.integers(0, 256, (n, 7, 6), np.uint8), (np.arange(n) % 5).astype(np.uint8)
        for what, array in zip(("images-idx3", "labels-idx1"), arrays[split], strict=True):
            name = f"{prefix}{split}-{what.replace('-', dot)}-ubyte"
            data = _idx_bytes(array)
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(data) if zipped else data)
    return arrays


@pytest.mark.parametrize(
    "how", [{}, {"zipped": False}, {"dot": "."}, {"prefix": "emnist-mnist-", "test": "test"}], ids=lambda h: str(h)
)
def test_idx(how, tmp_path):
    arrays = _write_idx(tmp_path, **how)
    data = Idx(str(tmp_path))
    assert isinstance(data, Dataset)
    assert {s: np.bincount(v.labels).tolist() for s, v in data.splits.items()} == {
        "train": [9] * 5,
        "val": [1] * 5,
        "test": [4] * 5,
    }
    images, labels = arrays[how.get("test", "t10k")]
    example = data.splits["test"][3]
    np.testing.assert_array_equal(example["image"], images[3][..., None])
    assert example["label"] == labels[3]
    row = int(data.splits["val"].name(2).removeprefix("train[").removesuffix("]"))
    np.testing.assert_array_equal(data.splits["val"][2]["image"][..., 0], arrays["train"][0][row])
    assert data.splits["train"].in_memory
    assert data.dataset_info == {"num_classes": 5, "class_names": ("0", "1", "2", "3", "4")}
    assert Idx(str(tmp_path), class_names=tuple("abcde")).dataset_info["class_names"] == tuple("abcde")
    assert data.fingerprint() == Idx(str(tmp_path)).fingerprint() == pickle.loads(pickle.dumps(data)).fingerprint()
    assert data.fingerprint() != Idx(str(tmp_path), seed=1).fingerprint()


def test_idx_reads_a_users_file_as_it_reads_its_own(tmp_path):
    _write_idx(tmp_path)
    Image.fromarray(_gradient()).save(tmp_path / "x.png")
    (example,) = Idx(str(tmp_path)).codec({}, {}).decode((tmp_path / "x.png").read_bytes())
    assert example["image"].shape == (7, 6, 1) and example["image"].dtype == np.uint8


def test_idx_mistakes(tmp_path):
    _write_idx(tmp_path, zipped=False)
    images = tmp_path / "train-images-idx3-ubyte"
    good = images.read_bytes()
    for bad, match in (
        (good[:-1], "truncated or damaged"),
        (good + b"x", "truncated or damaged"),
        (good[:7], "truncated or damaged"),
        (b"\x89PNG" + good, "not an idx file"),
        (good[:2] + b"\x0d" + good[3:], "type 0x0d"),
        (gzip.compress(good)[:-30], "cannot be read"),
        (_idx_bytes(np.zeros((50, 42), np.uint8)), "2 dimensions"),
        (_idx_bytes(np.zeros((49, 7, 6), np.uint8)), "49 pictures but 50 labels"),
        (_idx_bytes(np.zeros((50, 8, 6), np.uint8)), "differ in the shape"),
    ):
        images.write_bytes(bad)
        with pytest.raises(UserError, match=match):
            Idx(str(tmp_path))
    images.unlink()
    with pytest.raises(UserError, match="no file train-images-idx3-ubyte"):
        Idx(str(tmp_path))
    images.write_bytes(good)
    with pytest.raises(UserError, match="class_names has 2 names"):
        Idx(str(tmp_path), class_names=("a", "b"))
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(str(tmp_path / "nothing"))


# --- npz --------------------------------------------------------------------------------------------------------------


def _arrays(n=20, shape=(4, 5, 3), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, *shape), np.uint8), np.arange(n) % 2


def test_npz_in_the_keras_layout(tmp_path):
    x, y = _arrays()
    x_test, y_test = _arrays(6, seed=1)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y[:, None], x_test=x_test, y_test=y_test)
    data = Npz(str(tmp_path / "a.npz"))
    assert isinstance(data, Dataset)
    assert {s: len(v) for s, v in data.splits.items()} == {"train": 18, "val": 2, "test": 6}
    np.testing.assert_array_equal(data.splits["test"][4]["image"], x_test[4])
    assert data.splits["test"][4]["label"] == y_test[4]
    assert data.splits["test"][4]["label"].dtype == np.int32
    for source in data.splits.values():
        columns, rows = source.batch(np.array([1, 0])), [source[1], source[0]]
        for name in ("image", "label"):
            np.testing.assert_array_equal(columns[name], np.stack([row[name] for row in rows]), strict=True)
    np.savez(tmp_path / "b.npz", x_train=x, y_train=y, x_val=x_test, y_val=y_test)
    assert {s: len(v) for s, v in Npz(str(tmp_path / "b.npz")).splits.items()} == {"train": 20, "val": 6}


def test_npz_in_other_layouts(tmp_path):
    x, y = _arrays(shape=(4, 5))
    np.savez_compressed(tmp_path / "a.npz", images=x, labels=y)
    data = Npz(str(tmp_path / "a.npz"), seed=3)
    assert {s: np.bincount(v.labels).tolist() for s, v in data.splits.items()} == {
        "train": [7, 7],
        "val": [1, 1],
        "test": [2, 2],
    }
    assert data.splits["val"][0]["image"].shape == (4, 5, 1)
    np.savez(tmp_path / "b.npz", train_images=x, train_labels=y, test_images=x, test_labels=y)
    assert list(Npz(str(tmp_path / "b.npz")).splits) == ["train", "val", "test"]


def test_npy_folder_is_mapped(tmp_path):
    x, y = _arrays()
    np.save(tmp_path / "x_train.npy", x)
    np.save(tmp_path / "y_train.npy", y)
    data = Npz(str(tmp_path), val_fraction=0, test_fraction=0)
    assert isinstance(data.splits["train"]._images, np.memmap)
    np.testing.assert_array_equal(data.splits["train"][7]["image"], x[7])
    before = data.fingerprint()
    assert before == Npz(str(tmp_path), val_fraction=0, test_fraction=0).fingerprint()
    assert before != Npz(str(tmp_path)).fingerprint()
    os.utime(tmp_path / "x_train.npy", ns=(1, 1))
    assert before != Npz(str(tmp_path), val_fraction=0, test_fraction=0).fingerprint()


@pytest.mark.parametrize("kind", ["unit float", "byte float", "int64", "bool"])
def test_npz_values_become_bytes(kind, tmp_path):
    x, y = _arrays()
    if kind == "bool":
        x = x // 128 * 255
    stored = {"unit float": x / np.float32(255), "byte float": x * 1.0, "int64": x.astype(np.int64), "bool": x > 0}[
        kind
    ]
    np.savez(tmp_path / "a.npz", images=stored, labels=y)
    data = Npz(str(tmp_path / "a.npz"), val_fraction=0, test_fraction=0)
    got = np.stack([data.splits["train"][i]["image"] for i in range(20)])
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, x)


def test_npz_mistakes(tmp_path):
    x, y = _arrays()
    path = tmp_path / "a.npz"
    for arrays, match in (
        ({"a": x, "b": y}, "holds a, b; expected x_train"),
        ({"x_train": x}, "has x_train but no y_train"),
        ({"x_train": x, "y_train": y, "x_test": x}, "has x_test but no y_test"),
        ({"images": x.transpose(0, 3, 1, 2), "labels": y}, "channels first"),
        ({"images": x[..., :2], "labels": y}, r"uint8\[20, 4, 5, 2\]; pictures must be"),
        ({"images": x - 300.0, "labels": y}, "values from -"),
        ({"images": x * np.nan, "labels": y}, "values from nan"),
        ({"images": x.astype(str), "labels": y}, "must be numbers"),
        ({"images": x, "labels": np.eye(2)[y]}, "argmax"),
        ({"images": x, "labels": y / 2}, "must be integers"),
        ({"images": x, "labels": y[1:]}, "20 pictures but 19 labels"),
        ({"images": x, "labels": y - 1}, "label -1"),
        ({"images": x, "labels": y * 0}, "at least two classes"),
        ({"images": x.astype(object), "labels": y}, "images cannot be read: Object arrays"),
        ({"x_train": x, "y_train": y, "x_test": x, "y_test": y + 1}, "test has the label 2"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=match):
            Npz(str(path))
    path.write_bytes(b"junk")
    with pytest.raises(UserError, match="is not an .npz file"):
        Npz(str(path))
    np.savez(path, images=x, labels=y)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="is not an .npz file"):
        Npz(str(path))
    with pytest.raises(UserError, match="there is no file .*'a.npz'"):
        Npz(str(tmp_path / "b.npz"))


# --- TFDS -------------------------------------------------------------------------------------------------------------

_TFDS = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class TinyPets(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["cat", "dog"])}
        features["image/filename"] = tfds.features.Text()
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, _):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(20):
            file = io.BytesIO()
            Image.fromarray(np.full((6, 7, 3), 10 * i + i % 2, np.uint8)).save(file, "PNG")
            file.seek(0)
            yield str(i), {"image": file, "image/filename": f"{i}.png", "label": i % 2}

TinyPets(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()

import pickle
from bigbase_jax.core import Dataset, UserError
from bigbase_jax.data.sources.image.tfds import Tfds

data = Tfds("tiny_pets", sys.argv[1])
assert isinstance(data, Dataset)
assert data.dataset_info == {"num_classes": 2, "class_names": ("cat", "dog")}, data.facts
counts = {split: np.bincount(source.labels).tolist() for split, source in data.splits.items()}
assert counts == {"train": [7, 7], "val": [1, 1], "test": [2, 2]}, counts
values = []
for source in pickle.loads(pickle.dumps(data)).splits.values():
    for i in range(len(source)):
        example = source[i]
        assert example["image"].shape == (6, 7, 3) and example["image"].dtype == np.uint8
        assert example["label"].dtype == np.int32
        assert example["image"][0, 0, 0] % 10 == example["label"] == source.labels[i]
        values.append(int(example["image"][0, 0, 0]))
assert sorted(values) == [10 * i + i % 2 for i in range(20)], values
assert data.splits["val"].name(0).startswith("tiny_pets/train["), data.splits["val"].name(0)
assert data.fingerprint() == Tfds("tiny_pets", sys.argv[1]).fingerprint()
assert data.fingerprint() != Tfds("tiny_pets", sys.argv[1], seed=1).fingerprint()

for name, said in (
    ("cats_vs_dogs", "download_and_prepare()"),
    ("cats_vs_dog", "Did you mean 'cats_vs_dogs'?"),
    ("cats_vs_dogs:9.9.9", "cannot be loaded at version 9.9.9"),
):
    try:
        Tfds(name, sys.argv[1])
    except UserError as error:
        assert said in str(error), error
    else:
        raise AssertionError(name)
assert not {"tensorflow", "torch"} & set(sys.modules), "TensorFlow or torch was imported"
print("fine")
"""


def test_tfds_without_tensorflow(tmp_path):
    """In a process of its own, so that nothing else can have imported TensorFlow, or registered a data set."""
    done = subprocess.run([sys.executable, "-c", _TFDS, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("fine"), done.stderr[-2000:]


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
def test_real_photos(real_data):
    data = ImageFolder(str(real_data / "cats_dogs_256"))
    assert {s: np.bincount(v.labels).tolist() for s, v in data.splits.items()} == {
        "train": [900, 900],
        "val": [100, 100],
        "test": [1000, 1000],
    }
    assert data.dataset_info["class_names"] == ("cats", "dogs")
    for i in range(0, 2000, 400):
        x_HWC = data.splits["test"][i]["image"]
        assert x_HWC.ndim == 3
        assert x_HWC.shape[2] == 3
        assert x_HWC.std() > 5


@pytest.mark.realdata
def test_real_idx(real_data):
    data = Idx(str(real_data / "fashion_mnist"))
    assert {s: np.bincount(v.labels).tolist() for s, v in data.splits.items()} == {
        "train": [5400] * 10,
        "val": [600] * 10,
        "test": [1000] * 10,
    }
    assert data.splits["test"][0]["image"].shape == (28, 28, 1)
    assert data.splits["test"].labels[:5].tolist() == [9, 2, 1, 1, 6]
