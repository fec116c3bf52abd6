"""Data that somebody sent: whatever a file is or says it is, it is read within limits or refused in one sentence."""

import copy
import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from PIL import Image

from bigbase_jax.core import UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import Limits, list_files
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.rows import rows
from bigbase_jax.data.sources.image.folder import ImageFolder
from bigbase_jax.data.sources.image.idx import Idx, read_idx
from bigbase_jax.data.sources.image.image import decode
from bigbase_jax.data.sources.image.npz import Npz
from bigbase_jax.data.sources.text.labelled_text import LabelledText

LIMITS = Limits(text=1 << 20, ratio=100)
MANY = 100 << 20  # bytes: more than any file may unpack to


def packed(head, unit, times=1, pack="gzip"):
    """``head`` and very many times ``unit``, in a few KB."""
    compress = zlib.compressobj(9, wbits=31) if pack == "gzip" else zstandard.ZstdCompressor().compressobj()
    return b"".join(compress.compress(part) for part in (head, *[unit] * times)) + compress.flush()


def read(root, unit="file"):
    """Reads all documents."""
    for file in list_files(str(root), LIMITS):
        for document in Format(unit=unit).documents(file):
            for _ in document.blocks:
                pass


def read_rows(root):
    """Reads all rows."""
    for file in list_files(str(root), LIMITS):
        for _ in rows(file):
            pass


MEGABYTE = b"x\n" * (1 << 19)
JSON = {"deep": "[" * 100_000 + "]" * 100_000, "digits": "1" * 10_000}
TEXTS = {
    "a.txt.gz": (packed(b"", MEGABYTE, 100), "file", r"a.txt.gz unpacks to more than 100 times.*limits.ratio"),
    "a.txt.zst": (packed(b"", MEGABYTE, 100, "zstd"), "file", "a.txt.zst unpacks to more than 100 times"),
    "line.txt.gz": (packed(b"short\n", b"x" * (1 << 20), 2), "line", r"line 2 has more than 1,048,576.*limits.text"),
    "paragraph.txt.gz": (packed(b"\n\n", MEGABYTE, 2), "paragraph", "the paragraph from line 3 on has more than"),
}
TABLES = {
    "quote.csv.gz": (packed(b'a,b\n1,2\n3,"', MEGABYTE, 3), r"the row from line 3 on .is a quote not closed.*text"),
    "commas.csv.gz": (packed(b"a,b\n1", b"," * (1 << 20), 3), r"line 2 has more than 1,048,576 characters"),
    "lines.jsonl.gz": (packed(b'{"a": "', b"x" * (1 << 20), 3), r"line 1 has more than 1,048,576 characters"),
    "cell.json.gz": (packed(b'[{"a": 1}, {"a": "', b"x" * (1 << 20), 9), r"record 2 has more than 1,048,576"),
    "one.json.gz": (packed(b'{"a": "', b"x" * (1 << 20), 17), r"one value of more than 16,777,216 characters"),
    "bomb.jsonl.gz": (packed(b"", b'{"a": "%s"}\n' % (b"x" * 500_000), 200), r"unpacks to more than 100 times"),
    "deep.json": (JSON["deep"].encode(), r"deep.json, record 1 is nested too deeply"),
    "deep.jsonl": (b'{}\n{"a": %s}\n' % JSON["deep"].encode(), r"deep.jsonl, line 2 is nested too deeply"),
    "digits.json": (b'[{"a": %s}]' % JSON["digits"].encode(), r"record 1 has a number of more than 4,300 digits"),
    "digits.jsonl": (b'{}\n{"a": %s}\n' % JSON["digits"].encode(), r"line 2 has a number of more than 4,300 digits"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_too_long_or_unpack_without_end_are_refused(tmp_path, name):
    data, unit, why = TEXTS[name]
    assert len(data) < 200_000
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=why):
        read(tmp_path, unit)


@pytest.mark.parametrize("name", TABLES)
def test_tables_that_would_take_all_memory_are_refused(tmp_path, name):
    data, why = TABLES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=why):
        read_rows(tmp_path)


def test_a_long_text_and_a_long_list_are_read_piece_by_piece(tmp_path):
    (tmp_path / "a.txt").write_bytes(MEGABYTE * 3)
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x" * 1000}] * 3000, indent=1))
    read(tmp_path)
    (tmp_path / "a.txt").unlink()
    read_rows(tmp_path)


@pytest.mark.parametrize("kind", ["named pipe", "socket", "device", "loop"])
def test_what_is_no_regular_file_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "b.txt"
    (tmp_path / "a.txt").write_text("text")
    if kind == "named pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "b.txt")
    with pytest.raises(UserError, match=f"b.txt (is a {kind}, not a file; delete it|cannot be read: Too many levels)"):
        read(tmp_path)


def test_links_are_followed_out_of_the_folder_and_loops_end(tmp_path):
    (tmp_path / "disk" / "more").mkdir(parents=True)
    (tmp_path / "disk" / "more" / "a.txt").write_text("text")
    root = tmp_path / "root"
    root.mkdir()
    (root / "far").symlink_to(tmp_path / "disk")
    (root / "b.txt").symlink_to(tmp_path / "disk" / "more" / "a.txt")
    (root / "again").symlink_to(root)
    (root / "one").symlink_to(root / "two")
    (root / "two").symlink_to(root / "one")
    assert [file.name for file in list_files(str(root))] == ["b.txt", "far/more/a.txt"]


def test_a_file_of_the_kernels_that_may_not_end_is_empty(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/environ")
    (file,) = list_files(str(tmp_path))
    assert not list(Format().documents(file))


def test_archives_are_read_in_proportion_and_within_what_they_say(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../b.txt", "where it does not belong")
        archive.writestr("a.txt", bytes(MANY))
    with pytest.raises(UserError, match=r"a.zip unpacks to more than 100 times its 10\d,\d{3} bytes"):
        read(path)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 5)  # the size of a.txt, as the directory has it
    path.write_bytes(data)
    assert [file.name for file in list_files(str(path))] == ["a.txt"]
    with pytest.raises(UserError, match="cannot be read: Bad CRC"):
        read(path)


def test_entries_of_a_zip_that_share_their_bytes_are_refused(tmp_path):
    """A "better zip bomb": many entries of one and the same content."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a0.txt", bytes(1 << 20))
        info = archive.getinfo("a0.txt")
        for i in range(1, 100):
            archive.filelist.append(copy.copy(info))
            archive.filelist[-1].filename = f"a{i}.txt"
        archive._didModify = True
    with pytest.raises(UserError, match="a.zip unpacks to more than 100 times|differ"):
        read(path)


# --- columns ----------------------------------------------------------------------------------------------------------


def column(kind):
    """A table whose column holds far more than its file."""
    if kind == "rows":
        return pa.array(["x"]).take(pa.array(np.zeros(10**7, np.int32)))
    if kind == "cell":
        return pa.array(["x" * MANY])
    if kind == "list":
        return pa.ListArray.from_arrays(pa.array([0, 10**7], pa.int32()), column("rows"))
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, np.int32)), pa.array(["x" * (1 << 19)]))  # "again"


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*((kind, ".parquet") for kind in ("rows", "cell", "list", "again")), ("cell", ".arrow"), ("again", ".arrow")],
)
def test_columns_that_hold_far_more_than_their_file_are_refused(tmp_path, kind, suffix):
    table = pa.table({"text": column(kind)})
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(table, path, compression="zstd", store_schema=False, use_dictionary=kind != "cell")
    else:
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
    assert path.stat().st_size < 200_000
    with pytest.raises(UserError, match=f"a{suffix} unpacks to more than 100 times"):
        read_rows(tmp_path)


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_arrow_files_that_lie_about_lengths_are_refused(tmp_path, compression):
    table = pa.table({"text": ["abcdefgh"] * 3})
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    data = bytearray(sink.getvalue().to_pybytes())
    if compression is None:  # where a text ends
        at, lie = data.index(struct.pack("<IIII", 0, 8, 16, 24)) + 8, struct.pack("<I", 2**31 - 1)
    else:  # what its bytes unpack to
        at, lie = data.rindex(struct.pack("<q", 24)), struct.pack("<q", 2**50)
    data[at : at + len(lie)] = lie
    (tmp_path / "a.arrow").write_bytes(data)
    with pytest.raises(UserError, match=r"a.arrow (cannot be read|unpacks to more)"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("label", "why"),
    [("1" * 10_000, "line 3: 'label' is a number of 10,000 digits"), ("NaN", None), ("1e999", None)],
)
def test_numbers_that_are_no_class(tmp_path, label, why):
    (tmp_path / "a.csv").write_text(f"text,label\na,0\nb,{label}\nc,1\n")
    with pytest.raises(UserError, match=why or f"line 3 '{label}', a word"):
        LabelledText(root=str(tmp_path)).prepare(tmp_path / "cache", 1e6, print)
    (tmp_path / "a.csv").unlink()
    if why is None:
        (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "label": {label}}}\n')
        with pytest.raises(UserError, match=r"line 1: 'label' is (nan|inf), neither a word nor a whole number"):
            LabelledText(root=str(tmp_path)).prepare(tmp_path / "cache", 1e6, print)


# --- pictures and arrays ----------------------------------------------------------------------------------------------


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks):
    """A black picture of one bit for each pixel."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)), 9)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def claiming(kind, marker, offset, pack, size, **options):
    """A picture of 8 x 8 whose header says another size, ``offset`` bytes after a marker."""
    buffer = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (8, 8)).save(buffer, kind, **options)
    data = bytearray(buffer.getvalue())
    at = data.index(marker) + offset
    claim = struct.pack(pack, size, size)
    data[at : at + len(claim)] = claim
    return bytes(data)


def hostile_pictures():
    """{name: (contents, why it is refused)}"""
    text = zlib.compress(bytes(MANY), 9)
    return {
        "sizes.png": (png(16_000, 16_000), r"a size of 16,000 x 16,000 pixels is too much.*limits.pixels=256000000"),
        "header.gif": (claiming("GIF", b"GIF8", 6, "<HH", 65535), "65,535 x 65,535 pixels"),
        "frame.gif": (claiming("GIF", b"\x2c", 5, "<HH", 65535), "65,535 x 65,535 pixels"),
        "base.jpg": (claiming("JPEG", b"\xff\xc0", 5, ">HH", 65500), "65,500 x 65,500 pixels"),
        "late.jpg": (claiming("JPEG", b"\xff\xc2", 5, ">HH", 65500, progressive=True), "65,500 x 65,500 pixels"),
        "size.bmp": (claiming("BMP", b"BM", 18, "<ii", 100_000), "100,000 x 100,000 pixels"),
        "text.png": (png(8, 8, chunk(b"zTXt", b"k\0\0" + text)), "is broken"),
        "profile.png": (png(8, 8, chunk(b"iCCP", b"k\0\0" + text)), "is broken"),
    }


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of readable pictures, with all that is hostile among them."""
    root = tmp_path_factory.mktemp("pictures")
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(5):
            Image.new("RGB", (8, 8), (i, i, i)).save(root / name / f"{i}.png")
    for name, (data, _) in hostile_pictures().items():
        (root / "cat" / name).write_bytes(data)
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "cat" / "zero.png").symlink_to("/dev/zero")
    with open(root / "cat" / "sparse.png", "wb") as file:
        file.truncate(10 << 30)
    (root / "cat" / "loop.png").symlink_to("loop.png")
    for name, other in (("one", "two"), ("two", "one"), ("up", ".."), ("self", ".")):
        (root / "dog" / name).symlink_to(other)
    many = root / ".many"  # 2^20 ways to the last folder
    for i in range(20):
        (many / str(i)).mkdir(parents=True)
        for name in "ab":
            (many / str(i) / name).symlink_to(many / str(i + 1))
    (many / "20").mkdir()
    Image.new("RGB", (8, 8)).save(many / "20" / "last.png")
    (root / "dog" / "many").symlink_to(many / "0")
    return root


def test_hostile_pictures_are_left_out_by_name(pictures):
    data = ImageFolder(str(pictures), val_fraction=0, test_fraction=0)
    names = [data.splits["train"].name(i) for i in range(len(data.splits["train"]))]
    assert sum(name.endswith("last.png") for name in names) == 1
    skipping = Data(data, 2, on_bad_example="skip", cache_limit_gb=0).prepare(lambda line: None)
    wrong = {os.path.basename(names[i]): why for i, why in skipping.bad["train"]}
    expected = {name: why for name, (_, why) in hostile_pictures().items()}
    expected |= {"pipe.png": "is a named pipe, not a file", "zero.png": "is a device, not a file"}
    expected |= {
        "sparse.png": "a file of 10,737,418,240 bytes is too much.*limits.pixels",
        "loop.png": "Too many levels",
    }
    assert set(wrong) == set(expected)
    for name, why in expected.items():
        assert re.search(why, wrong[name]), wrong[name]
        assert f"cat/{name}" in wrong[name]
    assert skipping.splits["train"] == 11
    with pytest.raises(UserError, match=r"cat/pipe.png is a named pipe"):
        Data(data, 2, cache_limit_gb=0).prepare(lambda line: None)


def test_a_picture_within_a_raised_limit_is_read():
    data = png(300, 300)
    with pytest.raises(UserError, match="limits.pixels=90000 or more"):
        decode(data, limits=Limits(pixels=89_999))
    assert decode(data, limits=Limits(pixels=90_000)).shape == (300, 300, 3)


def test_arrays_that_unpack_without_end_or_lie_about_their_shape_are_refused(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40, 9, 9)})
    for name, images in (("bomb", bytes(MANY)), ("lie", header.getvalue())):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("images.npy", images)
            archive.writestr("labels.npy", b"")
    with pytest.raises(UserError, match="the array images unpacks to more than 100 times.*limits.ratio"):
        Npz(str(tmp_path / "bomb.npz"), limits=LIMITS)
    with pytest.raises(UserError, match="the array images cannot be read"):
        Npz(str(tmp_path / "lie.npz"))
    start = b"\0\0\x08\x03"
    for name, head in (("bomb", struct.pack(">III", 100, 1024, 1024)), ("lie", struct.pack(">III", *[2**32 - 1] * 3))):
        (tmp_path / f"{name}.gz").write_bytes(packed(start + head, bytes(1 << 20), 100 if name == "bomb" else 1))
        with pytest.raises(UserError, match=f"{name}.gz unpacks to more than 100 times"):
            read_idx(str(tmp_path / f"{name}.gz"), LIMITS)
    (tmp_path / "lie").write_bytes(start + struct.pack(">III", *[2**32 - 1] * 3))
    with pytest.raises(UserError, match="lie is truncated or damaged"):
        read_idx(str(tmp_path / "lie"))


def test_arrays_that_are_no_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "images.npy")
    os.mkfifo(tmp_path / "labels.npy")
    with pytest.raises(UserError, match="images.npy is a named pipe, not a file"):
        Npz(str(tmp_path))
    for what in ("images-idx3", "labels-idx1"):
        os.mkfifo(tmp_path / f"train-{what}-ubyte")
    with pytest.raises(UserError, match="train-images-idx3-ubyte is a named pipe, not a file"):
        Idx(str(tmp_path))


# --- all of them ------------------------------------------------------------------------------------------------------


def test_memory_stays_below_two_gigabytes_at_default_settings(tmp_path):
    for name, head in (("a.csv", b'a,b\n"'), ("b.jsonl", b'{"a": "'), ("c.json", b'[{"a": "'), ("d.json", b'{"a": "')):
        (tmp_path / f"{name}.gz").write_bytes(packed(head, b"x" * (1 << 20), 100))
    (tmp_path / "e.jsonl.zst").write_bytes(packed(b'{"a": [1', b",{}" * (1 << 20), 30, "zstd"))
    pq.write_table(pa.table({"text": column("again")}), tmp_path / "f.parquet", compression="zstd", store_schema=False)
    for name in ("x.png", "y.png"):
        (tmp_path / name).write_bytes(png(8_190, 8_190))
    code = """
import concurrent.futures, os, sys
from bigbase_jax.core import UserError
from bigbase_jax.data.files import list_files
from bigbase_jax.data.rows import rows
from bigbase_jax.data.sources.image.image import decode
os.chdir(sys.argv[1])
refused = 0
for file in list_files("."):
    try:
        for _ in rows(file):
            pass
    except UserError:
        refused += 1
with concurrent.futures.ThreadPoolExecutor(2) as pool:
    assert list(pool.map(lambda name: decode(name).shape, ["x.png", "y.png"])) == [(8190, 8190, 3)] * 2
with open("/proc/self/status") as status:  # ru_maxrss would count the process that started this one
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
print(refused, peak // 1024)
"""
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stderr
    refused, megabytes = map(int, found.stdout.split())
    assert refused == 6 and megabytes < 2000, found.stdout


@pytest.mark.parametrize("limits", [{"text": 0}, {"ratio": float("nan")}])
def test_limits_are_positive(limits):
    with pytest.raises(UserError, match="must be positive"):
        Limits(**limits)


def test_the_environment_raises_every_limit_of_a_data_set(monkeypatch):
    limits, data = Limits(pixels=50_000, text=1000, ratio=100), png(300, 300)
    monkeypatch.setenv("BIGBASE_LIMITS", "2")
    assert decode(data, limits=limits).shape == (300, 300, 3)
    assert limits.most_text == 2000 and limits.meter("x", 1 << 20)(150 << 20) is None
    monkeypatch.setenv("BIGBASE_LIMITS", "1.5")
    with pytest.raises(UserError, match=r"set data.dataset.limits.pixels=90000 or more \(or set BIGBASE_LIMITS=2 to"):
        decode(data, limits=limits)
    with pytest.raises(
        UserError, match=r"more than 150 times its 1,048,576 bytes.*raise data.dataset.limits.ratio \(or"
    ):
        limits.meter("x", 1 << 20)(160 << 20)
