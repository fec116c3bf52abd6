"""The report page: escaped, complete, self-contained, and there for partial runs too."""

import base64
import html.parser
import io
import json
import re
import wave

import numpy as np
import pytest
from PIL import Image

from bigbase_jax.compare import runs
from bigbase_jax.compare.numbers import Metrics
from bigbase_jax.compare.statistics import wilson
from bigbase_jax.core import (
    Card,
    Clips,
    Differences,
    Evaluated,
    Gallery,
    Highlights,
    Matrix,
    Metric,
    Plot,
    Table,
    UserError,
)
from bigbase_jax.pages import figures, page, report

NASTY = "<script>alert(\"x\")</script> & 'co'"


class Checked(html.parser.HTMLParser):
    """Parses a page; fails on unbalanced tags, scripts and anything fetched from elsewhere."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.images, self.tags = [], [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object")
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "data", "action"):
                assert value.startswith(("data:image/", "data:audio/wav"))
                self.images.append(value)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


def make_run(folder, names=("cats", NASTY), wrong=True):
    folder.mkdir(parents=True, exist_ok=True)
    count = len(names)
    rng = np.random.default_rng(0)
    label_N = np.arange(10 * count) % count
    p_NK = np.full((len(label_N), count), 0.2 / (count - 1))
    p_NK[np.arange(len(label_N)), label_N] = 0.8
    p_NK[3] = 0.55 / (count - 1)
    p_NK[3, label_N[3]] = 0.45 if wrong and count == 2 else 0.6
    p_NK[3] /= p_NK[3].sum()
    if wrong:
        p_NK[5] = 0.03 / (count - 1)
        p_NK[5, (label_N[5] + 1) % count] = 0.97
        p_NK[5] /= p_NK[5].sum()
    matrix_KK = np.zeros((count, count), int)
    np.add.at(matrix_KK, (label_N, p_NK.argmax(1)), 1)
    index_N = 1000 + rng.permutation(len(label_N))
    np.savez(folder / "predictions-test.npz", probabilities=p_NK.astype(np.float32), label=label_N, index=index_N)
    write = lambda name, value: (folder / name).write_text(json.dumps(value))  # noqa: E731
    task = {"target": "bigbase_jax.tasks.classification:Classification", "model": {}, "class_names": None}
    write(
        "config.json",
        {
            "seed": 7,
            "task": task,
            "train": {},
            "optim": {"learning_rate": 0.125, "target": NASTY},
            "data": {"list": [{"a": 1}]},
        },
    )
    write("data.json", {"dataset_info": {"class_names": list(names)}, "batch": {}})
    data = {"description": "embedded drawings", "fingerprint": "f1n6e2", "splits": {"train": 4000, "test": 1234}}
    lineage = {"command": f"python launch.py {NASTY}", "git_commit": "c0ffee", "git_dirty": True, "data": data,
               "versions": {"jax": "0.11.1"}, "devices": {"kind": "TPU v4", "count": 8},
               "started": "2026-01-02T03:04:05+00:00", "finished": "2026-01-02T04:04:05+00:00"}  # fmt: skip
    write("lineage.json", lineage)
    per_class = {name: {"precision": 0.25, "recall": 0.5, "f1": 0.75, "auc": None, "support": 10} for name in names}
    write("eval-test.json", {"step": 40, "split": "test", "accuracy": float((p_NK.argmax(1) == label_N).mean()),
                             "loss": 0.61234, "f1": 0.5, "auc": 0.987654, "per_class": per_class,
                             "confusion_matrix": matrix_KK.tolist()})  # fmt: skip
    rows = []
    for step in range(10, 41, 10):
        rows.append({"step": step, "epoch": step / 10, "kind": "train", "loss": 1 / step, "learning_rate": 1e-3,
                     "examples_per_second": 4321.0, "data_wait": 0.01, "seconds": step})  # fmt: skip
        rows.append(
            {"step": step, "kind": "eval", "split": "val", "loss": 2 / step, "accuracy": step / 50, "seconds": step}
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 50, "kind": "tr')
    return p_NK, label_N, index_N


def pictures(split, index):
    return np.full((40, 30, 3), index % 256, np.uint8), f"{split}/photo<{index}>.jpg"


def page_of(folder, source=pictures):
    path = report.write(str(folder), source and (lambda: source))
    assert path == str(folder / "report.html") and not list(folder.glob(".*"))
    text = (folder / "report.html").read_text()
    assert not re.search(r"https?://|url\(|@import", text) and "default-src 'none'" in text
    return Checked(text)


def test_what_is_macro_and_which_class_is_positive_are_said(tmp_path):
    make_run(tmp_path / "run")
    file = tmp_path / "run" / "eval-test.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "f1_positive": 0.25, "positive_class": "dog"}))
    words = page_of(tmp_path / "run").words
    assert "F1 (macro)" in words and f"F1 (class {NASTY})" in words
    assert "Precision Recall F1 AUC" in words  # of single classes


def test_the_page_holds_the_numbers_and_escapes_names(tmp_path):
    make_run(tmp_path / "run")
    page = page_of(tmp_path / "run")
    assert NASTY in page.words  # as text, not as tags
    for word in ("run finished", "embedded drawings", "18 of 20 on test", "0.9877", "0.6123", "Learning rate", "4,321",
                 "c0ffee", "uncommitted", "f1n6e2", "TPU v4", "0.11.1", "optim.learning_rate", "0.125",
                 "data.list[0].a", "test 1,234", "02 January 2026".lstrip("0"), "25.0 %"):  # fmt: skip
        assert word in page.words, word
    assert page.tags.count("svg") >= 5 and "polyline" in page.tags


def test_mistakes_come_worst_first_with_their_pictures(tmp_path):
    p_NK, label_N, index_N = make_run(tmp_path)
    page = page_of(tmp_path)
    assert (p_NK.argmax(1) != label_N).sum() == 2 and len(page.images) == 2
    worst, second = page.words.index(f"photo<{index_N[5]}>"), page.words.index(f"photo<{index_N[3]}>")
    assert worst < second and "97.0 %" in page.words and "Worst mistakes" in page.words


def test_without_mistakes_the_least_certain_are_shown(tmp_path):
    _, _, index_N = make_run(tmp_path, ("a", "b", "c"), wrong=False)
    page = page_of(tmp_path)
    assert "Least certain" in page.words and "All 30 are right" in page.words
    first = re.search(r"photo<(\d+)>", page.words[page.words.index("Least certain") :])
    assert int(first.group(1)) == index_N[3]


def test_pictures_of_every_kind(tmp_path):
    make_run(tmp_path, tuple("abcdefgh"))
    normalised = np.random.default_rng(0).normal(size=(32, 32, 3))
    large = np.zeros((500, 700, 3), np.float32)
    kinds = [np.zeros((28, 28, 1), np.uint8), np.zeros((28, 28), np.uint8), normalised, large]
    for kind in kinds:
        assert len(page_of(tmp_path, lambda split, index, kind=kind: (kind, "x")).images) == 1

    def lost(split, index):
        raise UserError("photo was moved <there>")

    page = page_of(tmp_path, lost)
    assert page.images == [] and "photo was moved <there>" in page.words


def test_without_data_the_page_says_so(tmp_path):
    _, _, index_N = make_run(tmp_path)
    page = page_of(tmp_path, None)
    assert page.images == [] and "pictures are not here" in page.words and f"example {index_N[5]}" in page.words


@pytest.mark.parametrize("count", [2, 10, 25, 100])
def test_confusion_matrices_of_all_sizes(tmp_path, count):
    names = tuple(f"name{k}" for k in range(count))
    make_run(tmp_path, names)
    page = page_of(tmp_path)
    table = re.search(r'<table class="confusion.*?</table>', (tmp_path / "report.html").read_text(), re.S).group()
    assert table.count("<td") == count**2 and "name0 called name0: 10 (100 %)" in table
    assert ("Most confused" in page.words) == (count > 2)


def test_a_matrix_is_counted_where_the_evaluation_has_none(tmp_path):
    make_run(tmp_path)
    (tmp_path / "eval-test.json").unlink()
    assert "Confusion matrix" in page_of(tmp_path).words


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ((), "not begun"),
        (("config.json",), "has not been evaluated yet"),
        (("config.json", "lineage.json"), "embedded drawings"),
        (("config.json", "metrics.jsonl"), "not finished, at step 40"),
        (("config.json", "data.json", "eval-test.json"), "Confusion matrix"),
        (("config.json", "data.json", "predictions-test.npz"), "Calibration"),
    ],
)
def test_partial_runs_have_a_page(tmp_path, kept, says):
    make_run(tmp_path)
    for path in tmp_path.iterdir():
        if path.name not in kept:
            path.unlink()
    assert says in page_of(tmp_path).words


def test_broken_files_do_not_stop_the_page(tmp_path):
    make_run(tmp_path)
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    contents = (b"", b'{"a": ', b"[1, 2]", b'{"data": 3, "task": 4, "per_class": 5, "confusion_matrix": [1]}\n')
    for path, before in whole.items():
        for content in contents:
            path.write_bytes(content)
            assert "Run report" in page_of(tmp_path).words, (path, content)
        path.write_bytes(before)


def test_a_run_that_diverged_says_where(tmp_path):
    make_run(tmp_path)
    lineage = json.loads((tmp_path / "lineage.json").read_text())
    del lineage["finished"]
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        file.write('{"step": 7, "kind": "train", "loss": 1.0}\n{"step": 9, "kind": "diverged", "loss": "nan"}\n')
    assert "diverged at step 9" in page_of(tmp_path).words


def test_numbers_that_are_not_finite_are_shown_but_not_drawn(tmp_path):
    make_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step, value in enumerate((1.0, "nan", 2.0, "inf"), 1):
            file.write(json.dumps({"step": step, "kind": "train", "loss": value}) + "\n")
    page_of(tmp_path)
    (line,) = re.findall(r'<polyline class="line train" points="([^"]*)"', (tmp_path / "report.html").read_text())
    assert len(line.split()) == 2


def test_no_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        report.write(str(tmp_path / "none"))


def test_wilsons_interval():
    low, high = wilson(81, 263)  # Newcombe 1998, table I, method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(0, 20)[0] == 0 and round(wilson(0, 20)[1], 4) == 0.1611


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.031, 0.0312), (-5, 1234), (3, 3), (0, 0), (1e-9, 2e-9)])
def test_ticks_enclose_the_data(low, high):
    ticks = page.ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 3 <= len(ticks) <= 9
    assert len(set(np.round(np.diff(ticks) / (ticks[1] - ticks[0]), 6))) == 1


@pytest.mark.parametrize(
    ("name", "y", "labels"),
    [
        ("loss", [0.6931, 0.6932], ["0.67", "0.68", "0.69", "0.7", "0.71", "0.72"]),
        ("accuracy", [0.999, 1.0], ["95 %", "96 %", "97 %", "98 %", "99 %", "100 %"]),
        ("learning_rate", [1e-3, 1e-5], ["0", "2e-4", "4e-4", "6e-4", "8e-4", "1e-3"]),
    ],
)
def test_axes_do_not_zoom_into_noise_and_steps_are_whole(name, y, labels):
    known = Metrics({"accuracy": Metric("max", "%")})
    chart = page.metric_chart(known, name, [page.Series("val", "val", [1.0, 3.0], y)])
    assert [text for _, text in chart.grid] == labels and [text for _, text in chart.ticks] == ["1", "2", "3"]


class Shows:
    """A task with a figure of each kind."""

    def figures(self, evaluated):
        x = evaluated.examples["nats"].tolist()
        boxes = [(0.25, 0.5, 0.75, 1.0, NASTY)]
        yield Gallery("Boxes", [Card(7, f"{NASTY}\nsecond", False, boxes), Card(None, "no picture", True)], "Look.")
        pieces = [("the\n", 0.5), (NASTY, 4.0), ("x", float("inf"))] + [("y", 1.0)] * 1000
        yield Highlights("Passages", [("hard", pieces)], most=8.0, unit="nats")
        yield Table("Ranked", ("item", "score"), [(NASTY, 0.25), ("b", None)], shares=("score",))
        yield Plot("Spectrum", {"a": (range(3), x), "b": (range(3), x)}, x="Hz", y="dB")
        yield Plot("Counts", {"a": ([1, 2], [3, 4])}, bars=True)
        yield Clips("Voices", [(NASTY, np.sin(np.arange(80) / 9), 8000)])
        yield Differences(
            "Transcripts", [(7, ["a", "<b>"], ["a", "d"]), (1, [], ["e"]), (0, ["f", "g"], ["g"])], rate=8
        )
        raise ValueError("a bug of the task's")


def test_figures_of_every_kind_are_shown_and_what_fails_is_left_out(tmp_path, capsys, monkeypatch):
    make_run(tmp_path)
    np.savez(tmp_path / "predictions-test.npz", nats=np.arange(3.0))
    (tmp_path / "eval-test.json").write_text(json.dumps({"step": 40, "split": "test", "loss": 1.5, "hits": 0.75}))
    metrics = {"hits": Metric("max", "%", NASTY), "loss": Metric("min", "nats")}
    kept = {"dataset_info": {}, "metrics": {name: metric._asdict() for name, metric in metrics.items()}}
    (tmp_path / "data.json").write_text(json.dumps(kept))
    monkeypatch.setattr(runs, "task_of", lambda run: Shows())
    page = page_of(tmp_path)
    for word in ("Boxes", "Look.", "second", "test/photo<7>.jpg", "Passages", "and 403 more", "Ranked", "25.0 %", "Hz",
                 "Counts", "Voices", "Transcripts", "75.0 %", "1.5 nats"):  # fmt: skip
        assert word in page.words, word
    assert [uri[:15] for uri in page.images] == [
        "data:image/png;",
        "data:image/png;",
        "data:audio/wav;",
    ] and "audio" in page.tags
    assert page.words.index(NASTY) < page.words.index("Loss")  # the task's own order
    text = (tmp_path / "report.html").read_text()
    assert re.search(r'<rect x="7.5" y="20.0" width="15.0" height="20.0"', text)  # of 30 x 40 pixels
    assert '<del title="instead of this">&lt;b&gt;</del> <ins title="was said instead">d</ins>' in text
    assert '<ins title="added">e</ins>' in text and '<del title="left out">f</del>' in text
    assert 'title="4.00 nats"' in text and "Confusion matrix" not in page.words
    assert "a bug of the task's" in capsys.readouterr().err


def test_a_task_that_is_not_trusted_has_a_page_without_figures(tmp_path, capsys):
    make_run(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["task"]["target"] = "os:system"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "Confusion matrix" not in page_of(tmp_path).words and "--trust=" in capsys.readouterr().err


def test_transcripts_have_players_where_the_recordings_are(capsys):
    sound = np.sin(np.arange(800) / 9).astype(np.float32)
    figure = Differences("t", [(3, ["a"], ["b"]), (9, ["a"], ["a"])], rate=8000)

    def opened(split, index):
        if index == 9:
            raise UserError("it is gone.")
        return (sound * 32767).astype(np.int16), f"{split}/{index}.wav"

    (drawn,) = figures.shaped([figure], "test", lambda: opened)
    first, second = drawn["rows"]
    assert first["name"] == "test/3.wav" and second["sound"] is None and "it is gone" in second["name"]
    uri, spectrogram = first["sound"]
    with wave.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as file:
        assert (file.getnframes(), file.getframerate()) == (800, 8000)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(spectrogram.partition(",")[2]))).convert("L"), float)
    loudest = 95 - pixels.mean(1).argmax()  # rows from the bottom
    assert abs(loudest / 96 * 4000 - 8000 / 9 / 2 / np.pi) < 100


def test_texts_that_two_models_say_otherwise_come_first_where_their_errors_differ_most():
    one = Differences("t", [(5, ["a", "b"], ["c"]), (6, ["a"], ["b"]), (7, ["a"], ["a"])])
    two = Differences("t", [(6, ["a"], ["c"]), (5, ["a", "b"], ["a", "b"]), (7, ["a"], ["a"])])
    found = figures.disagreements([one, two])
    assert [(index, right) for index, right, _ in found] == [(5, "a b"), (6, "a")]
    assert found[0][2][1] == [("equal", ["a", "b"], ["a", "b"])]
    characters = Differences("t", [(1, list("你好"), list("你"))], between="")
    assert figures.shaped([characters], "test")[0]["rows"][0]["parts"] == [
        ("equal", ["你"], ["你"]),
        ("delete", ["好"], []),
    ]


def test_a_figure_that_does_not_hold_together_is_left_out(capsys):
    found = figures.shaped([Matrix("t", ("a", "b"), [[1]]), Table("u", ("a",), [(1,)])], "test")
    assert [figure["title"] for figure in found] == ["u"] and "'t' cannot be drawn" in capsys.readouterr().err
    assert figures.made_by(object(), Evaluated("test", {}, {})) == []
