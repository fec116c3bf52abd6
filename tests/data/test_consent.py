"""Rows without consent or past their day are not read, whatever format they lie in, and it is said."""

import datetime
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.data import consent
from bigbase_jax.data.documents import Format
from bigbase_jax.data.files import LIMITS, Limits, limits_of, one_file
from bigbase_jax.data.rows import rows
from bigbase_jax.data.sources.audio.labelled import LabelledAudio
from bigbase_jax.data.sources.image.detection import DetectionFolder
from bigbase_jax.data.sources.image.faces import Faces
from bigbase_jax.data.sources.image.folder import ImageFolder
from bigbase_jax.data.sources.table.table import Table
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.text.tokenizer import Bytes

DAY = datetime.timedelta(days=1)
TODAY = datetime.datetime.now(datetime.UTC).date()
CONSENTS = ("yes", "no", "True", "", "1", "yes", "YES", "false", "maybe", "true")
UNTIL = [*[str(TODAY + DAY)] * 4, "", str(TODAY - DAY), str(TODAY), *["2999-12-31T10:00:00"] * 3]
READ = [0, 2, 4, 6, 9]  # 5 is past its day
BY = Limits(consent="agreed", retention="until")
ROWS = [
    {"text": f"text {i} of some length", "label": "ab"[i % 2], "agreed": CONSENTS[i], "until": UNTIL[i]}
    for i in range(10)
]


@pytest.fixture(autouse=True)
def said(monkeypatch):
    lines = []
    consent._say.cache_clear()
    monkeypatch.setattr(consent, "say", lines.append)
    return lines


def written(folder, kind, content=ROWS):
    path = folder / f"rows.{kind}"
    if kind == "csv":
        path.write_text("\n".join([",".join(content[0]), *(",".join(row.values()) for row in content)]) + "\n")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, content)))
    elif kind == "json":
        path.write_text(json.dumps(content))
    else:
        columns = {name: [row[name] for row in content] for name in content[0]}
        pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


KINDS = ("csv", "jsonl", "json", "parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_documents(kind, tmp_path, said):
    file = one_file(str(written(tmp_path, kind)), BY)
    assert [row.values["text"] for row in rows(file)] == [ROWS[i]["text"] for i in READ]
    assert said == [f"data: not read of {file}: 4 without consent and 1 past their day"]
    documents = ["".join(document.blocks) for document in Format(columns=("text",)).documents(file)]
    assert documents == [ROWS[i]["text"] for i in READ] and len(said) == 1  # once
    assert len(list(rows(file._replace(limits=LIMITS)))) == 10
    late = file._replace(limits=Limits(retention="until"))
    assert len(list(rows(late))) == 9


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_columns(kind, tmp_path, said):
    content = [{"x": str(i), **ROWS[i % 10], "y": "no" if i % 3 else "yes"} for i in range(60)]
    path = str(written(tmp_path, kind, content))
    words = {"root": path, "target_name": "y", "val_fraction": 0.0, "test_fraction": 0.0}
    data, every = (Table(limits=limits, **words).prepare(tmp_path / "cache", 1e9, print) for limits in (BY, LIMITS))
    assert sum(map(len, every.splits.values())) == 60 and sum(map(len, data.splits.values())) == 30
    assert data.fingerprint() != every.fingerprint()
    assert any("24 without consent and 6 past their day" in line for line in said)


def test_a_data_set_of_texts(tmp_path):
    path = written(tmp_path, "csv", [{**row, "text": f"{row['text']} {k}"} for k in range(8) for row in ROWS])
    words = {"root": str(path), "text": "text", "label": "label", "tokenizer": Bytes(), "length": 32}
    data = LabelledText(limits=BY, **words).prepare(tmp_path / "cache", 1e9, print)
    assert sum(map(len, data.splits.values())) == 8 * len(READ)


def test_arrow_s_own_types(tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "ok": [True, False, None], "until": [TODAY, TODAY, TODAY - DAY]})
    pq.write_table(table, tmp_path / "t.parquet")
    file = one_file(str(tmp_path / "t.parquet"), Limits(consent="ok"))
    assert [row.values["text"] for row in rows(file)] == ["a"]
    late = [row.values["text"] for row in rows(file._replace(limits=Limits(retention="until")))]
    assert late == ["a", "b"]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_column_that_is_missing(kind, tmp_path):
    file = one_file(str(written(tmp_path, kind)), Limits(consent="agred"))
    for read in (rows, Format(columns=("text",)).documents):
        with pytest.raises(UserError, match="no column 'agred' to be read by. Did you mean 'agreed'"):
            list(read(file))
    with pytest.raises(UserError, match="no column 'agred'"):
        Table(root=str(file), target_name="label", limits=file.limits).prepare(tmp_path / "cache", 1e9, print)


def test_an_entry_that_is_missing_is_no_consent(tmp_path):
    path = written(tmp_path, "jsonl", [{"text": "a", "agreed": True}, {"text": "b"}, {"text": "c", "agreed": None}])
    assert [row.values["text"] for row in rows(one_file(str(path), Limits(consent="agreed")))] == ["a"]


def test_what_cannot_be_told(tmp_path):
    path = written(tmp_path, "csv", [{**ROWS[0], "until": "soon"}])
    with pytest.raises(UserError, match="until 'soon' is no day such as"):
        list(rows(one_file(str(path), BY)))
    (tmp_path / "plain.txt").write_text("a text\n")
    with pytest.raises(UserError, match="plain.txt has no columns that could say who consents"):
        list(Format().documents(one_file(str(tmp_path / "plain.txt"), BY)))
    (folder := tmp_path / "voc").mkdir()
    (folder / "a.xml").write_text("<annotation><filename>a.png</filename></annotation>")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    for listed in (ImageFolder, Faces, LabelledAudio, DetectionFolder):  # whose rows, if any, are no table's
        with pytest.raises(UserError, match="no columns that could say"):
            listed(str(folder), limits=BY)
    with pytest.raises(UserError, match="no columns that could say"):
        LabelledAudio(str(folder), names="label_take", limits=BY)


def test_what_a_user_gives_to_be_answered_needs_neither(tmp_path):
    assert limits_of({"limits": target(Limits, pixels=5, consent="agreed", retention="until")}) == Limits(pixels=5)
    path = str(written(tmp_path, "csv"))
    plain, late = (one_file(path, limits) for limits in (LIMITS, BY))
    assert plain.file_signature == late.file_signature[:5] and late.file_signature[-1] == str(TODAY)
