"""Rows of tables as people have them: delimiters, byte-order marks, Excel, JSON around a list; and broken ones."""

import json
import zipfile

import openpyxl
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import list_files
from bigbase_jax.data.rows import delimiter, first_line, rows, tables

ROWS = [
    ["text", "label"],
    ["gut, sehr gut", "1"],
    ['er sagte: "nein"', "0"],
    ["zwei\nZeilen | Senf", "0"],
    ["明月", "1"],
]


def values(path, **options):
    return [list(row.values.values()) for file in tables(str(path)) for row in rows(file, **options)]


def table(mark, end="\r\n"):
    quoted = [['"' + cell.replace('"', '""') + '"' if set(cell) & set('",;|\n') else cell for cell in r] for r in ROWS]
    return "".join(mark.join(row) + end for row in quoted)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "mark"), [("a.csv", m) for m in ",;\t|"] + [("a.txt", m) for m in ";|"])
def test_the_delimiter_and_a_byte_order_mark_are_found(tmp_path, name, mark, encoding):
    (tmp_path / name).write_bytes(table(mark).encode(encoding))
    assert first_line(tables(str(tmp_path))[0]) == ROWS[0] and values(tmp_path) == ROWS[1:]
    assert values(tmp_path, header=False) == ROWS


def test_between_tabs_quotation_marks_are_text_unless_excel_wrote_them(tmp_path):
    text = '"Go," he said.\tGeh.\n"Stop.\tHalt.\n'
    for name in ("a.txt", "a.tsv"):
        (tmp_path / name).write_text(text)
        assert values(tmp_path / name, header=False) == [['"Go," he said.', "Geh."], ['"Stop.', "Halt."]]
        (tmp_path / name).write_text('"Go, ""he"" said."\tGeh.\n', encoding="utf-16")
        assert values(tmp_path / name, header=False) == [['Go, "he" said.', "Geh."]]


@pytest.mark.parametrize(
    ("content", "mark"),
    [
        ("3,5;gut\n4,25;schlecht\n", ";"),  # numbers as in German
        ("preis;text\n3,5;a, b\n" + "1,0;c\n" * 9 + "ragged\n", ";"),
        ("1,one; two\n2,three\n3,a; b; c\n", ","),
        ("text\nfirst, second\nthird\n", None),
        ("first; second\nthird\nfourth\n", None),
        ("", None),
    ],
)
def test_other_marks_in_the_cells_do_not_mislead(tmp_path, content, mark):
    (tmp_path / "a.csv").write_text(content)
    assert delimiter(list_files(str(tmp_path))[0], "utf-8") == mark


def test_blank_lines_are_no_rows_and_lines_are_counted_with_them(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n\na,1\n  \n\nb,0\n,\n\n")
    found = list(rows(list_files(str(tmp_path))[0]))
    assert [(row.number, list(row.values.values())) for row in found] == [
        (3, ["a", "1"]),
        (6, ["b", "0"]),
        (7, ["", ""]),
    ]


def test_an_excel_file_is_a_table_of_cells(tmp_path):
    book = openpyxl.Workbook()
    for row in (("text", "label", "price", None), ("good", 1, 2.5), (None, None), ("明月 bad", 0, None), ("ok", True)):
        book.active.append(row)
    book.create_sheet("notes").append(("not", "this"))
    book.save(tmp_path / "a.xlsx")
    found = list(rows(tables(str(tmp_path))[0]))
    assert [list(row.values.values()) for row in found] == [
        ["good", "1", "2.5"],
        ["明月 bad", "0", ""],
        ["ok", "True", ""],
    ]
    assert found[1].where.endswith("a.xlsx, row 4")
    assert [d.blocks for d in Format().documents(list_files(str(tmp_path))[0])] == [("good",), ("明月 bad",), ("ok",)]
    book.active.append(("a", "b", "c", "d"))
    book.save(tmp_path / "a.xlsx")
    with pytest.raises(UserError, match=r"a.xlsx, row 6 has 4 columns instead of 3"):
        values(tmp_path)


def test_an_excel_file_that_unpacks_to_too_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/worksheets/sheet1.xml", bytes(70 << 20))
    with pytest.raises(UserError, match=r"a.xlsx unpacks to more than 200 times its [\d,]+ bytes"):
        values(tmp_path)


def test_json_around_a_list_of_rows(tmp_path):
    for content in ({"version": 1, "data": [{"text": "a"}, {"text": "b"}]}, {"rows": [{"text": "a"}, {"text": "b"}]}):
        (tmp_path / "a.json").write_text(json.dumps(content))
        assert values(tmp_path) == [["a"], ["b"]]
        assert [d.blocks for d in Format().documents(list_files(str(tmp_path))[0])] == [("a",), ("b",)]
    (tmp_path / "a.json").write_text(json.dumps({"messages": [{"role": "user"}]}))  # one conversation, not a list
    assert values(tmp_path) == [[[{"role": "user"}]]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", 'text,label\nx,1\n\n"y,0\nz,1\n', "a.csv, line 4 cannot be read .*twice"),
        ("a.csv", 'text,label\n"x" y,1\n', "a.csv, line 2 cannot be read"),
        ("a.csv", "text;label\nx;1\ny\n", "a.csv, line 3 has 1 columns instead of 2"),
        ("a.xlsx", "text", "a.xlsx cannot be read: it is no Excel workbook"),
        (
            "a.txt",
            "one text, not a table\n",
            r"holds no table. Read are texts \(.txt, .*\) and tables \(.csv, .*.xlsx, ",
        ),
        ("a.docx", "PK", "a.docx is not read. .*docx: export it as .txt"),
        ("a.xls", "x", "a.xls is not read. .*xls: save it as .xlsx or .csv"),
        ("a.pkl", "x", "a pickle can run code and is never read"),
        ("a.7z", "x", "7z: unpack it"),
        ("a.json", '{"train": [{"text": "a"}], "test": []}', r"several lists, .* its own \(train.json and test.json\)"),
        ("a", "x,1", "holds no table. .* without suffix: call it .txt, .csv"),
        ("a.bin", b"\xff\x00", "holds no table. Read are"),
    ],
)
def test_what_is_wrong_with_a_table_is_one_sentence(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=says) as raised:
        values(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_folder_of_unknown_endings_says_which_are_read_and_the_cure(tmp_path):
    for name in ("a.docx", "b.docx", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=r"it has 2 .docx, 1 .png. Read are .*docx: export it as"):
        list_files(str(tmp_path))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(UserError, match=r"c.png is no text. Read are texts \(.txt"):
        list(Format().documents(list_files(str(tmp_path / "c.png"))[0]))
