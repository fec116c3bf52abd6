"""Data that somebody sent: whatever a file is or says it is, it is read within limits or refused in one sentence."""

import copy
import json
import os
import socket
import struct
import zipfile
import zlib

import pytest
import zstandard

from bigbase_jax.core import UserError
from bigbase_jax.data.documents import Format, list_files
from bigbase_jax.data.files import Limits
from bigbase_jax.data.rows import rows

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
    "one.json.gz": (packed(b'{"a": "', b"x" * (1 << 20), 9), r"one value of more than 4,194,304 characters"),
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


@pytest.mark.parametrize("limits", [{"text": 0}, {"ratio": float("nan")}])
def test_limits_are_positive(limits):
    with pytest.raises(UserError, match="must be positive"):
        Limits(**limits)
