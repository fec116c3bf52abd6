"""Archives: what is in a zip or tar reads as it does in a folder, and what would harm is refused by name."""

import gzip
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import list_files, open_file
from bigbase_jax.data.rows import rows, tables
from bigbase_jax.data.sources.image.folder import ImageFolder
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.text.tokenizer import Bytes

TEXTS = {f"x/{s}/{c}/{i}.txt": f"{s} {c} {i} 明月" for s in ("train", "test") for c in ("pos", "neg") for i in range(3)}
LITTER = {"x/README": "a card", "x/train/._1.txt": "hidden", "x/__MACOSX/1.txt": "litter", "../../out.txt": "elsewhere"}


def entry(name, content=b"", **attributes):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, io.BytesIO(content)


def pack(path, files, *more):
    """An archive of {name: text}, and of other entries of a tar."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                archive.writestr(name, text)
        return path
    mode = "w:gz" if path.name.endswith(("gz", "tgz")) else "w"
    with tarfile.open(path, mode) as archive:
        for name, text in files.items():
            archive.addfile(*entry(f"./{name}", text if isinstance(text, bytes) else text.encode()))
        for info, content in more:
            archive.addfile(info, content)
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.zip"])
def test_an_archive_reads_as_the_folder_that_was_packed(tmp_path, name):
    pack(tmp_path / name, TEXTS | LITTER)
    for root in (tmp_path / name, tmp_path):  # which holds nothing else
        files = list_files(str(root))
        prefix = "" if root != tmp_path else f"{name}/"
        assert [file.name for file in files] == sorted(prefix + text for text in TEXTS)
        assert [open_file(file).read().decode() for file in files] == [TEXTS[text] for text in sorted(TEXTS)]
        data = LabelledText(root=str(root), tokenizer=Bytes(), length=32).prepare(tmp_path / "cache", 0, print)
        assert data.dataset_info["class_names"] == ("neg", "pos")
        assert {split: len(source) for split, source in data.splits.items()} == {"train": 6, "test": 6}
    opened = [open_file(file) for file in files]  # several at once
    assert [file.read(4) for file in opened] == [b"test"] * 6 + [b"trai"] * 6
    assert all(file.seek(0) == 0 and file.read(2) for file in opened)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.zip"])
def test_tables_in_an_archive_are_rows_and_documents(tmp_path, name):
    pack(tmp_path / name, {"deep/train.csv": "text;label\ngut;1\n", "deep/test.csv": "text;label\nschlecht;0\n"})
    files = tables(str(tmp_path / name))
    assert [[*row.values.values()] for file in files for row in rows(file)] == [["schlecht", "0"], ["gut", "1"]]
    assert [d.blocks for d in Format(columns=("text",)).documents(files[1])] == [("gut",)]
    with pytest.raises(UserError, match=rf"{name} holds no text or table. Read are .*docx: export it as .txt"):
        list_files(str(pack(tmp_path / name, {"a.docx": "x"})))


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.LNKTYPE, "../../etc/passwd"),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""),
    ],
)
def test_links_and_devices_in_an_archive_are_refused_by_name(tmp_path, kind, link):
    path = pack(tmp_path / "a.tar.gz", TEXTS, entry("x/train/pos/9.txt", type=kind, linkname=link))
    with pytest.raises(UserError, match=r"a.tar.gz/x/train/pos/9.txt is a link, a device or sparse; unpack"):
        list_files(str(path))


def test_what_harms_in_an_archive_is_one_sentence(tmp_path):
    whole = pack(tmp_path / "a.tar", TEXTS).read_bytes()
    huge = entry("x", type=b"x")[0]
    huge.size = 1 << 31
    broken = {
        "cut.tar": whole[: len(whole) // 3],
        "cut.tar.gz": gzip.compress(whole)[:-20],
        "no.tar": b"text " * 400,
        "no.zip": b"text",
        "empty.tar": b"",
        "header.tar": huge.tobuf(tarfile.USTAR_FORMAT),
        "bomb.tgz": gzip.compress(entry("a.txt")[0].tobuf() * 150_000),
    }
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"{name} (cannot be read|unpacks to more than)") as raised:
            for file in list_files(str(tmp_path / name)):
                list(Format().documents(file))
        assert "\n" not in str(raised.value)


def test_the_directory_of_an_archive_is_read_once(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.zip", {f"{c}/{i}.txt": f"{c} {i}" for c in "ab" for i in range(50)})
    opened = []
    read = zipfile.ZipFile._RealGetContents
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", lambda self: opened.append(1) or read(self))
    data = LabelledText(root=str(path), tokenizer=Bytes(), length=32).prepare(tmp_path / "cache", 0, print)
    assert sum(map(len, data.splits.values())) == 100 and data.fingerprint() and len(opened) == 1


@pytest.mark.parametrize("name", ["a.tar", "a.tgz", "a.zip"])
def test_class_folders_of_pictures_in_an_archive(tmp_path, name):
    def png(colour):
        data = io.BytesIO()
        Image.new("RGB", (3, 2), (colour, 0, 0)).save(data, "PNG")
        return data.getvalue()

    splits = ("training_set", "test_set")
    files = {f"pets/{s}/{c}/{i}.png": png(i) for s in splits for c in ("cat", "dog") for i in range(5)}
    (tmp_path / "d").mkdir()
    for path, content in files.items():
        (tmp_path / "d" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / path).write_bytes(content)
    more = {"pets/README": b"x", "pets/training_set/cat/._1.png": b"x", "../9.png": b"x"}
    archive = pack(tmp_path / name, files | more)
    found, expected = (ImageFolder(str(root), val_fraction=0.2) for root in (archive, tmp_path / "d"))
    assert found.dataset_info == expected.dataset_info and found.ignored == 3
    assert {s: len(source) for s, source in found.splits.items()} == {"train": 8, "val": 2, "test": 10}
    for split, source in expected.splits.items():
        for i in range(len(source)):
            assert found.splits[split].name(i) == source.name(i)
            assert found.splits[split][i]["label"] == source[i]["label"]
            np.testing.assert_array_equal(found.splits[split][i]["image"], source[i]["image"])
    pickle.loads(pickle.dumps(found.splits["train"]))[0]  # other processes open it anew
    assert found.fingerprint() == ImageFolder(str(archive), val_fraction=0.2).fingerprint()
    pack(tmp_path / name, {"cat/1.png": png(1), "dog/2.png": b"no picture"})
    broken = ImageFolder(str(archive), val_fraction=0.0, test_fraction=0.0).splits["train"]
    with pytest.raises(UserError, match=rf"{name}/dog/2.png: this is not a picture"):
        broken[1]
    with pytest.raises(UserError, match="has no class folders"):
        ImageFolder(str(pack(tmp_path / name, {"a.txt": b"x"})))
