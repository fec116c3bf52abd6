"""``--mode=predict``: rows of tables and lines of texts, one answer each, in order and without memory that grows."""

import csv
import itertools
import json
import pathlib
import runpy

import jax
import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from bigbase_jax import verbs
from bigbase_jax.core import Codec, Rendered, UserError
from bigbase_jax.inference import answers, inputs
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.tasks.text_classification import TextClassification

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
TEXTS = ["a good film", "a bad film, and long", 'they said "good"', "bad", "好电影", "so good\nand so long"]


def train(folder, recipe, root, **words):
    arg = ",".join(["tiny", f"root={root}", *(f"{k}={v}" for k, v in words.items())])
    config = runpy.run_path(str(CONFIGS / f"{recipe}.py"))["get_config"](arg)
    config.train.steps = 2
    verbs.train(config, str(folder))
    return str(folder)


def table(path, rows, delimiter=","):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    rows = [
        ("review", "sentiment"),
        *((f"a {'good' if i % 2 else 'bad'} film {i}", "pos" if i % 2 else "neg") for i in range(40)),
    ]
    return train(folder / "run", "text_classify", table(folder / "data.csv", rows), model="bow", tokenizer="bytes")


def predict(capsys, *args, status=0, **words):
    capsys.readouterr()
    assert verbs.predict(*args, **words) == status
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err


def one_by_one(run, texts):
    predictor = Predictor.open(run)
    given = [inputs.Input({"text": text}, "") for text in texts]
    return [answer for _, answer in predictor.answers(given)]


def written(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "txt"])
def test_rows_of_every_kind_are_answered_one_by_one(classifier, tmp_path, capsys, suffix):
    path, texts = (
        tmp_path / f"new.{suffix}",
        [text for text in TEXTS if suffix not in ("tsv", "txt") or "\n" not in text],
    )
    records = [{"id": i, "review": text} for i, text in enumerate(texts)]
    if suffix in ("csv", "tsv"):
        rows = [("id", "review"), *(r.values() for r in records)]
        path.write_text("".join("\t".join(map(str, r)) + "\n" for r in rows)) if suffix == "tsv" else table(path, rows)
    elif suffix in ("json", "jsonl"):
        path.write_text(json.dumps(records) if suffix == "json" else "".join(json.dumps(r) + "\n" for r in records))
    elif suffix == "parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    elif suffix == "arrow":
        with pa.ipc.new_file(path, pa.Table.from_pylist(records).schema) as file:
            file.write_table(pa.Table.from_pylist(records))
    else:
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    expected = one_by_one(classifier, texts)
    found, _ = predict(capsys, classifier, str(path))
    assert [(f.pop("input"), f.pop("row")) for f in found] == [(str(path), i + 1) for i in range(len(texts))]
    assert [f["label"] for f in found] == [e["label"] for e in expected]
    for f, e in zip(found, expected, strict=True):
        assert f["probabilities"] == pytest.approx(e["probabilities"], abs=1e-6)
    assert len({f["probability"] for f in found}) == len(texts)  # they are not one answer


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_answers_stand_beside_the_columns_of_their_rows(classifier, tmp_path, capsys, suffix):
    rows = [("review", "label", "when"), *((text, i, f"2024-01-{i + 1}") for i, text in enumerate(TEXTS))]
    source, output = table(tmp_path / "new.csv", rows), tmp_path / f"answers.{suffix}"
    (summary,), err = predict(capsys, classifier, source, output=str(output))
    assert summary == {"output": str(output), "answers": len(TEXTS), "errors": 0} and "6 answers in" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["new.csv", output.name])
    expected = one_by_one(classifier, TEXTS)
    if suffix == "jsonl":
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert found[1]["probabilities"] == pytest.approx(expected[1]["probabilities"], abs=1e-6)
    else:
        found = parquet.read_table(output).to_pylist() if suffix == "parquet" else written(output)
        assert list(found[0]) == [
            "review", "label", "when", "predicted_label", "probability", "probabilities.neg", "probabilities.pos",
        ]  # fmt: skip
        assert float(found[1]["probabilities.neg"]) == pytest.approx(expected[1]["probabilities"]["neg"], abs=1e-6)
    assert [row["predicted_label"] for row in found] == [e["label"] for e in expected]
    texts = [text.replace("\n", " ") for text in TEXTS] if suffix == "tsv" else TEXTS
    assert [row["review"] for row in found] == texts and found[0]["when"] == "2024-01-1"


def test_what_cannot_be_answered_is_said_in_its_row_and_the_others_go_on(classifier, tmp_path, capsys):
    lines = [
        '{"review": "good"}',
        '{"other": 1}',
        "{broken",
        "[1]",
        '{"review": "  "}',
        '{"review": 7}',
        '{"review": "bad"}',
    ]
    (tmp_path / "new.jsonl").write_text("\n".join(lines) + "\n")
    found, _ = predict(capsys, classifier, str(tmp_path / "new.jsonl"), status=1)
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5, 6, 7]
    assert ["label" in row for row in found] == [True, *[False] * 5, True]
    for row, said in zip(
        found[1:6], ["has no 'review'", "line 3 is not JSON", "is list", "is empty", "is int, not text"], strict=True
    ):
        assert said in row["error"]

    (tmp_path / "new.csv").write_text("id,review\n1,good\n2\n\n3,bad\n")
    output = tmp_path / "answers.csv"
    (summary,), _ = predict(capsys, classifier, str(tmp_path / "new.csv"), output=str(output), status=1)
    assert summary["errors"] == 1 and summary["answers"] == 3
    rows = written(output)
    assert [bool(row["label"]) for row in rows] == [True, False, True] and rows[2]["error"] == ""
    assert "line 3 has 1 columns instead of 2" in rows[1]["error"]

    (tmp_path / "new.csv").write_text('id,review\n1,good\n2,"bad\n3,good\n')  # a quote that stays open
    found, _ = predict(capsys, classifier, str(tmp_path / "new.csv"), status=1)
    assert "label" in found[0] and "error" in found[-1] and len(found) == 2


def test_columns_are_those_of_the_training(classifier, tmp_path, capsys):
    source = table(
        tmp_path / "a.csv", [("sentiment", "text", "review"), ("pos", "good", "bad"), ("neg", "bad", "good")]
    )
    found, _ = predict(capsys, classifier, source)
    assert [f["probability"] for f in found] == pytest.approx(
        [a["probability"] for a in one_by_one(classifier, ["bad", "good"])]
    )
    source = table(tmp_path / "b.csv", [("id", "words"), (1, "bad"), (2, "good")])
    found, err = predict(capsys, classifier, source)
    assert len(found) == 2 and "has no column 'review'; its only column of text, 'words', is read instead" in err
    source = table(tmp_path / "c.csv", [("title", "words"), ("x", "bad")])
    with pytest.raises(UserError, match=r"c\.csv has the columns 'title', 'words'.*'review'"):
        verbs.predict(classifier, source)
    found, _ = predict(capsys, classifier, str(tmp_path / "*.csv"), status=1)  # among others it is one of them
    assert ["error" in row for row in found] == [False, False, False, False, True]


def test_nothing_stands_half_written_under_its_name(classifier, tmp_path, capsys, monkeypatch):
    source = table(tmp_path / "new.csv", [("review",), *((text,) for text in TEXTS)])
    output = tmp_path / "answers.csv"
    output.write_text("before")

    def stop(self, inputs):
        yield next(iter(inputs)), {"label": "a"}
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "answers", stop)
        with pytest.raises(KeyboardInterrupt):
            verbs.predict(classifier, source, output=str(output))
    assert output.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(UserError, match=r"answers\.doc ends in none of \.csv, \.tsv, \.jsonl, \.parquet"):
        verbs.predict(classifier, source, output=str(tmp_path / "answers.doc"))
    empty = table(tmp_path / "empty.csv", [("review",)])
    with pytest.raises(UserError, match=r"empty\.csv holds no row and no text to answer"):
        verbs.predict(classifier, empty, output=str(output))
    assert output.read_text() == "before" and len(list(tmp_path.iterdir())) == 3
    with pytest.raises(UserError, match="is one of the files to answer"):
        verbs.predict(classifier, source, output=source)
    with pytest.raises(UserError, match=r"cannot write .*answers\.csv: (Not a directory|File exists)"):
        verbs.predict(classifier, source, output=f"{source}/answers.csv")
    with pytest.raises(UserError, match="No space left on device"), answers.Answers(output) as write:
        write._rows = open("/dev/full", "w")  # noqa: SIM115
        for i in itertools.count():
            write({"n": i})


def test_files_that_a_model_makes_are_in_a_folder_beside_the_answers(classifier, tmp_path, capsys, monkeypatch):
    source = table(tmp_path / "new.csv", [("review",), *((text,) for text in TEXTS)])
    with pytest.raises(UserError, match="--output is a folder, and TextClassification makes no files"):
        verbs.predict(classifier, source, output=str(tmp_path / "none"))

    def rendered(self, output, example):
        return Rendered(".bin", "application/octet-stream", output["probabilities"].tobytes())

    plain, _ = predict(capsys, classifier, source)
    monkeypatch.setattr(TextClassification, "rendered", rendered, raising=False)
    (said,), _ = predict(capsys, classifier, source, output=str(tmp_path / "made"))
    assert said["answers"] == len(TEXTS) and said["output"].endswith("made/answers.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "made" / "answers.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"new-{i:04d}.bin" for i in range(1, len(TEXTS) + 1)]
    for row, before in zip(rows, plain, strict=True):
        data = np.frombuffer((tmp_path / "made" / row["file"]).read_bytes(), np.float32)
        assert row["label"] == before["label"] and data.max() == pytest.approx(max(before["probabilities"].values()))


def test_columns_of_a_table_are_those_of_all_rows(tmp_path):
    rows = [{"a": 1, "b": None}, {"a": 2.5, "c": {"x": True, "y": [1, "z"]}}, {"b": "t", "a": 2**70}, {"d": b"12"}]
    for suffix in ("csv", "parquet"):
        with answers.Answers(tmp_path / f"t.{suffix}") as write:
            for row in rows:
                write(row)
    assert written(tmp_path / "t.csv")[1] == {"a": "2.5", "b": "", "c.x": "True", "c.y": '[1, "z"]', "d": ""}
    found = parquet.read_table(tmp_path / "t.parquet")
    assert found.column_names == ["a", "b", "c.x", "c.y", "d"]
    assert found.to_pylist()[2] == {"a": str(2**70), "b": "t", "c.x": None, "c.y": None, "d": None}
    assert found["d"].to_pylist()[3] == "(2 bytes)" and found["c.x"].to_pylist()[1] is True


class Lines(Codec):
    """A number from each line."""

    fields = None

    def decode(self, given):
        return [{"x": np.float32(line), "line": line} for line in given.decode().split()]


class Doubling:
    inputs = ("x",)

    def predict(self, variables, inputs):
        return {"y": inputs["x"] * variables["factor"]}

    def postprocess(self, output, example):
        return {"y": float(output["y"]), "line": example["line"]}


class Averaging(Doubling):
    def merge(self, outputs):
        return {"y": np.mean([output["y"] for output in outputs])}


def test_examples_of_one_input_have_an_answer_each_unless_the_task_merges_them():
    spec = {"x": jax.ShapeDtypeStruct((), np.float32)}
    each, merged = (
        Predictor(task, {"factor": 2.0}, {}, spec, lambda: Reading(Lines()), rows=2)
        for task in (Doubling(), Averaging())
    )
    answers = [{"part": i, "y": 2.0 * i, "line": str(i)} for i in range(5)]
    assert each.answer(b"0 1 2 3 4") == answers and each.answer(b"7") == [{"y": 14.0, "line": "7"}]
    assert merged.answer(b"0 1 2 3 4") == [{"y": 4.0, "line": "0"}]
    many = [inputs.Input(text, "") for text in (b"0 1 2 3 4", b"", b"7", b"0 1 2 3 4")]
    found = [answer for _, answer in each.answers(many)]
    assert found == [
        *answers,
        {"error": "there is nothing in it that the model could read."},
        *each.answer(b"7"),
        *answers,
    ]


def test_rows_are_read_as_they_are_answered(classifier, tmp_path):
    taken = []

    def many():
        for i in range(10**6):
            taken.append(i)
            yield inputs.Input({"text": f"film {i}"}, "")

    found = Predictor.open(classifier).answers(many())
    first = [next(found) for _ in range(3)]
    assert [item.given["text"] for item, _ in first] == ["film 0", "film 1", "film 2"] and len(taken) < 100
    path = tmp_path / "new.csv"
    path.write_text("review\n" + "a film\n" * 1000)
    rows = inputs.read([str(path)], Predictor.open(classifier).reading.codec.fields)
    assert (
        next(rows).given == {"text": "a film"}
        and inputs.estimate([str(path)], Predictor.open(classifier).reading.codec.fields) == 1001
    )


def test_files_are_read_in_the_encoding_of_the_training(tmp_path, capsys):
    for i in range(40):
        path = tmp_path / "data" / ("好" if i % 2 else "坏") / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{'好' if i % 2 else '坏'}电影 {i}".encode("gb18030"))
    words = {"model": "bow", "tokenizer": "bytes", "encoding": "gb18030"}
    run = train(tmp_path / "run", "text_classify", tmp_path / "data", **words)
    text = "好电影\n明月几时有"
    (tmp_path / "a.txt").write_bytes(text.encode("gb18030"))
    (tmp_path / "b.txt").write_bytes(text.encode("utf-8-sig"))
    (tmp_path / "c.csv").write_bytes(f'text\n"{text}"\n'.encode("gb18030"))
    (expected,) = one_by_one(run, [text])
    for name in ("a.txt", "b.txt", "c.csv"):  # as in training, a text is all of its file
        (found,), _ = predict(capsys, run, str(tmp_path / name))
        assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6), name
    (found,), _ = predict(capsys, run, str(tmp_path / "data" / "好" / "1.txt"))
    assert found["probability"] != pytest.approx(expected["probability"], abs=1e-6)
    assert Predictor.open(run).dataset_info["class_names"] == ("坏", "好")


def test_prompts_of_a_run_that_translates_are_its_rows(tmp_path, capsys):
    config = runpy.run_path(str(CONFIGS / "translate.py"))["get_config"]("tiny")
    config.train.steps = 1
    verbs.train(config, str(tmp_path / "run"))
    (tmp_path / "new.txt").write_text("17\n\n942\n")
    found, _ = predict(capsys, str(tmp_path / "run"), str(tmp_path / "new.txt"))
    assert [f["row"] for f in found] == [1, 3]  # lines of the file
    assert verbs.generate(str(tmp_path / "run"), ["17", "942"]) == 0
    prompts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [p["text"] for p in prompts] == [f["translation"] for f in found]
