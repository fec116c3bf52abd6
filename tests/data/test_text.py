"""Text as windows of tokens: splits, packing, the token cache, the pipeline around it, and mistakes."""

import itertools
import json
import multiprocessing
import os
import pathlib
import time

import numpy as np
import pytest

from bigbase_jax.core import Dataset, RawDataset, Source, UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.text import base
from bigbase_jax.data.sources.text.text import PythonReference, TextFiles, read_text
from bigbase_jax.data.windows import pack
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, load

POEM = "明月几时有？把酒问青天。\n不知天上宫阙，今夕是何年。\n"


def corpus_file(folder, count=40, seed=0):
    """A .jsonl of documents of various lengths, the last three of them equal to the first."""
    folder.mkdir(exist_ok=True)
    length = np.random.default_rng(seed).integers(1, 6, count)
    lines = [json.dumps({"text": f"{i % (count - 3)}: " + POEM * int(length[i % (count - 3)])}) for i in range(count)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder)


def documents_of(folder):
    return [json.loads(line)["text"] for line in (folder / "data.jsonl").read_text().splitlines()]


def prepare(corpus, tmp_path, limit=1e9):
    said = []
    return corpus.prepare(tmp_path / "cache", limit, said.append), said


def targets(source, end=None):
    """The targets of all windows that are real, in order, as (tokens, bytes)."""
    found, nbytes = [], 0
    for i in range(len(source)):
        example = source[i]
        real = example["segment_ids"] > 0
        found += example["targets"][real].tolist()
        nbytes += int(example["bytes"].sum())
        assert not any(example[name][~real].any() for name in example)
    return [t for t in found if t != end], nbytes


# ------------------------------------------------------------------------------------------------------------ packing


def test_packing_fills_bins_and_loses_nothing():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 65, 2000)
    bins = pack(lengths, 64)
    filled = np.bincount(bins, lengths)
    assert filled.max() <= 64 and filled.sum() == lengths.sum()
    assert len(filled) == -(-lengths.sum() // 64) or lengths.sum() / (64 * len(filled)) > 0.97
    np.testing.assert_array_equal(bins, pack(lengths, 64))
    assert pack(np.array([3, 5, 2, 4]), 7).tolist() == [1, 0, 0, 1]
    assert len(pack(np.zeros(0, int), 7)) == 0


@pytest.mark.parametrize("spec", [Bytes(), Characters(), Subwords("wordpiece", 60)], ids=repr)
@pytest.mark.parametrize("length", [7, 64, 4096])
def test_every_byte_of_every_document_is_predicted_once(tmp_path, spec, length):
    corpus = TextFiles(root=corpus_file(tmp_path / "d"), tokenizer=spec, length=length, test_fraction=0.2)
    data, _ = prepare(corpus, tmp_path)
    assert isinstance(corpus, RawDataset) and isinstance(data, Dataset) and isinstance(data.splits["train"], Source)
    tokenizer = load(data.dataset_info["tokenizer"])
    documents = documents_of(tmp_path / "d")
    read = {name: targets(source, tokenizer.end) for name, source in data.splits.items()}
    assert set(read) == {"train", "val", "test"}
    assert sum(nbytes for _, nbytes in read.values()) == sum(len(d.encode()) for d in documents)
    expected = sorted(t for tokens, _ in tokenizer.encode_batch(documents) for t in tokens.tolist())
    assert sorted(t for tokens, _ in read.values() for t in tokens) == expected
    fill = sum((data.splits["train"][i]["segment_ids"] > 0).sum() for i in range(len(data.splits["train"])))
    assert data.splits["train"].fill == fill / (len(data.splits["train"]) * length)
    assert f"{data.splits['train'].fill:.1%} filled" in data.description


def test_a_window_is_what_it_says(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh\nij\nk\n")
    corpus = TextFiles(
        root=str(tmp_path / "a.txt"), length=4, val_fraction=0.0, format=Format(unit="line"), tokenizer=Characters()
    )
    data, _ = prepare(corpus, tmp_path)
    assert list(data.splits) == ["train"] and data.dataset_info["vocab_size"] == 12 and data.dataset_info["length"] == 4
    end = 11
    rows = [data.splits["train"][i] for i in range(len(data.splits["train"]))]
    assert [row["inputs"].tolist() for row in rows] == [
        [end, 0, 1, 2],
        [3, 4, 5, 6],
        [7, end, 8, 9],  # the end of the first line, and "ij" whole
        [end, 10, 0, 0],
    ]
    assert [row["targets"].tolist() for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7], [end, 8, 9, end], [10, end, 0, 0]]
    assert rows[2]["segment_ids"].tolist() == [1, 2, 2, 2] and rows[2]["positions"].tolist() == [0, 0, 1, 2]
    assert rows[3]["segment_ids"].tolist() == [1, 1, 0, 0] and rows[3]["bytes"].tolist() == [1, 0, 0, 0]
    assert data.splits["train"].fill == 14 / 16
    assert all(x.dtype == np.int32 and x.shape == (4,) for row in rows for x in row.values())
    with pytest.raises(IndexError):
        data.splits["train"][4]


def test_one_text_is_cut_as_usual_and_its_windows_overlap_if_asked(tmp_path):
    text = "".join(chr(ord("a") + i % 26) for i in range(105))
    (tmp_path / "a.txt").write_text(text)
    corpus = TextFiles(root=str(tmp_path / "a.txt"), length=8, stride=1, tokenizer=Characters())
    data, _ = prepare(corpus, tmp_path)
    cut = int(0.9 * len(text))
    train, val = data.splits["train"], data.splits["val"]
    assert load(data.dataset_info["tokenizer"]).end is None
    assert len(train) == cut - 8 and train.fill == 1
    codes = np.array([ord(c) - ord("a") for c in text])
    for i in range(len(train)):
        np.testing.assert_array_equal(train[i]["inputs"], codes[i : i + 8])
        np.testing.assert_array_equal(train[i]["targets"], codes[i + 1 : i + 9])
    assert targets(val)[0] == codes[cut + 1 :].tolist()
    both, _ = prepare(TextFiles(root=str(tmp_path / "a.txt"), length=8, test_fraction=0.1), tmp_path)
    several = TextFiles(root=corpus_file(tmp_path / "d"), length=8, stride=1)  # of which the long would weigh more
    assert targets(prepare(several, tmp_path)[0].splits["train"])[1] < 20_000
    first = {split: both.splits[split][0]["inputs"][0] - ord("a") for split in ("train", "val", "test")}
    assert first == {"train": codes[0], "val": codes[int(0.8 * 105)], "test": codes[int(0.9 * 105)]}


# ------------------------------------------------------------------------------------------------------------- splits


def test_documents_are_dealt_whole_by_content_and_equal_ones_together(tmp_path):
    root = corpus_file(tmp_path / "d", 60)
    made = {}
    for seed in (0, 1):
        corpus = TextFiles(root=root, length=100_000, test_fraction=0.2, seed=seed)
        data, _ = prepare(corpus, tmp_path)
        made[seed] = {}
        for name, source in data.splits.items():
            tokens, _ = targets(source)
            parts = bytes(0 if t == 256 else t for t in tokens).decode().split("\0")[:-1]
            made[seed][name] = sorted(parts)
    assert made[0] != made[1]
    whole = sorted(documents_of(tmp_path / "d"))
    for splits in made.values():
        assert sorted(itertools.chain(*splits.values())) == whole
        assert not set(splits["train"]) & set(splits["test"]) and not set(splits["train"]) & set(splits["val"])
        sizes = {name: sum(map(len, found)) for name, found in splits.items()}
        assert 0.17 < sizes["test"] / sum(sizes.values()) < 0.2 and 0.07 < sizes["val"] / sum(sizes.values()) < 0.1
    assert len(set(whole)) < len(whole)  # there were equal ones


def test_splits_that_the_files_have_are_kept_and_a_missing_val_is_taken_from_train(tmp_path):
    for name in ("train", "test"):
        corpus_file(tmp_path / name, 20, seed=len(name))
    data, _ = prepare(TextFiles(root=str(tmp_path)), tmp_path / "elsewhere")
    assert set(data.splits) == {"train", "val", "test"}
    whole = sum(len(text.encode()) for text in documents_of(tmp_path / "test"))
    assert targets(data.splits["test"])[1] == whole


def test_splits_of_other_names_in_a_saved_data_set_are_left_out(tmp_path):
    for split in ("train", "test", "unsupervised"):
        (tmp_path / "d" / split).mkdir(parents=True)
        (tmp_path / "d" / split / "data.jsonl").write_text(
            "\n".join(json.dumps({"text": split * i}) for i in (1, 2, 3))
        )
    (tmp_path / "d" / "dataset_dict.json").write_text("{}")
    data, _ = prepare(TextFiles(root=str(tmp_path / "d"), tokenizer=Characters()), tmp_path)
    assert "(without unsupervised): train 2 documents" in data.description
    assert targets(data.splits["test"])[1] == 6 * len("test")


def test_two_documents_and_a_validation_split_leave_one_to_train_on(tmp_path):
    (tmp_path / "a.txt").write_text("one line\nanother line\n")
    data, _ = prepare(TextFiles(root=str(tmp_path / "a.txt"), format=Format(unit="line")), tmp_path)
    assert {name: len(source) for name, source in data.splits.items()} == {"train": 1, "val": 1}


def test_the_embedded_text_needs_nothing(tmp_path):
    data, _ = prepare(PythonReference(length=128, tokenizer=Characters()), tmp_path)
    assert "language reference inside Python" in data.description and "pydoc_data.topics" in data.description
    assert len(data.splits["train"]) > 2000 and set(data.splits) == {"train", "val", "test"}
    tokens, nbytes = targets(data.splits["val"], load(data.dataset_info["tokenizer"]).end)
    assert nbytes > 30_000 and "\n" in load(data.dataset_info["tokenizer"]).decode(tokens)


# -------------------------------------------------------------------------------------------------------------- cache


def folders(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []


def test_the_second_start_reads_no_text(tmp_path, monkeypatch):
    corpus = TextFiles(root=corpus_file(tmp_path / "d"), tokenizer=Subwords("wordpiece", 60), length=16)
    first, said = prepare(corpus, tmp_path)
    assert len(said) == 1 and "to tokenise it" in said[0] and len(folders(tmp_path)) == 1
    monkeypatch.setattr(TextFiles, "documents", None)
    again, said = prepare(corpus, tmp_path)
    assert said == [] and "cache" in again.splits["train"].in_memory
    assert again.fingerprint() == first.fingerprint() and again.dataset_info == first.dataset_info
    for split, source in first.splits.items():
        for i in range(len(source)):
            for name, x in source[i].items():
                np.testing.assert_array_equal(x, again.splits[split][i][name])


def test_what_the_tokens_depend_on_makes_another_cache(tmp_path):
    root = corpus_file(tmp_path / "d")
    base = {"root": root, "length": 16}
    changed = [{}, {"tokenizer": Characters()}, {"tokenizer": Subwords("bpe", 300)}, {"seed": 1}, {"separate": False}]
    changed += [{"val_fraction": 0.2}, {"format": Format(columns=("text",))}]
    prints = set()
    for count, more in enumerate(changed, 1):
        data, _ = prepare(TextFiles(**{**base, **more}), tmp_path)
        assert len(folders(tmp_path)) == count
        prints.add(data.fingerprint())
    assert len(prints) == len(changed)
    shorter, said = prepare(TextFiles(root=root, length=8), tmp_path)  # other windows of the same tokens
    assert said == [] and len(folders(tmp_path)) == count and shorter.fingerprint() not in prints

    path = pathlib.Path(root) / "data.jsonl"
    before = path.read_text()
    path.write_text(before.replace("\\u660e", "\\u6697"))
    os.utime(path, ns=(0, time.time_ns()))
    data, said = prepare(TextFiles(**base), tmp_path)
    assert said and data.fingerprint() not in prints
    found = load(data.dataset_info["tokenizer"]).decode(targets(data.splits["train"])[0])
    assert "暗" in found and "明" not in found


@pytest.mark.parametrize("name", ["0.bin", "index.json", "0.npy"])
@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(p.read_bytes()[:-1]), pathlib.Path.unlink])
def test_a_damaged_cache_is_made_anew(tmp_path, name, damage):
    corpus = TextFiles(root=corpus_file(tmp_path / "d"), length=16)
    first, _ = prepare(corpus, tmp_path)
    damage(tmp_path / "cache" / folders(tmp_path)[0] / name)
    again, said = prepare(corpus, tmp_path)
    assert said and len(folders(tmp_path)) == 1
    assert targets(again.splits["val"]) == targets(first.splits["val"])


@pytest.mark.parametrize("limit", [0, 1000])
def test_without_room_the_tokens_are_in_memory_and_the_same(tmp_path, limit):
    corpus = TextFiles(root=corpus_file(tmp_path / "d"), tokenizer=Subwords("wordpiece", 60), length=16)
    kept, _ = prepare(corpus, tmp_path)
    data, said = prepare(corpus, tmp_path / "other", limit)
    assert folders(tmp_path / "other") == [] and "memory" in data.splits["train"].in_memory
    assert any("data.cache_limit_gb" in line for line in said) == bool(limit)
    assert targets(data.splits["train"])[1] == targets(kept.splits["train"])[1]
    exact = TextFiles(root=corpus.root, length=16)
    both = [prepare(exact, tmp_path / name, room)[0] for name, room in (("a", limit), ("b", 1e9))]
    assert targets(both[0].splits["train"]) == targets(both[1].splits["train"])


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    corpus = TextFiles(root=corpus_file(tmp_path / "d"), length=16)
    (tmp_path / "file").write_text("")
    said = []
    data = corpus.prepare(tmp_path / "file" / "cache", 1e9, said.append)
    assert any("cannot be written" in line for line in said) and len(data.splits["train"])


def test_the_least_recently_used_caches_go(tmp_path):
    corpora = [TextFiles(root=corpus_file(tmp_path / "d"), length=16, seed=seed) for seed in range(3)]
    prepare(corpora[0], tmp_path)
    (first,) = folders(tmp_path)
    size = (tmp_path / "cache" / first / "0.bin").stat().st_size
    os.utime(tmp_path / "cache" / first, (1, 1))
    prepare(corpora[1], tmp_path, 2.5 * size)
    assert len(folders(tmp_path)) == 2
    prepare(corpora[2], tmp_path, 2.5 * size)
    assert len(folders(tmp_path)) == 2 and first not in folders(tmp_path)


def _prepare_in_process(root, cache, barrier, queue):
    barrier.wait()
    data = TextFiles(root=root, length=16, tokenizer=Subwords("bpe", 300)).prepare(cache, 1e9, lambda line: None)
    queue.put((data.fingerprint(), targets(data.splits["val"])))


def test_processes_that_build_the_same_cache_end_with_one(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(2), context.Queue()
    args = (corpus_file(tmp_path / "d"), tmp_path / "cache", barrier, queue)
    processes = [context.Process(target=_prepare_in_process, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1] and len(folders(tmp_path)) == 1


# ----------------------------------------------------------------------------------------------------------- pipeline


def data_of(tmp_path, **more):
    root = str(tmp_path / "d") if (tmp_path / "d").exists() else corpus_file(tmp_path / "d")
    corpus = TextFiles(root=root, length=16)
    return Data(dataset=corpus, batch_size=4, cache_dir=str(tmp_path / "cache"), **more).prepare(lambda line: None)


def test_any_step_is_reached_at_once_with_the_same_examples(tmp_path):
    data = data_of(tmp_path, workers=1)
    with data.train_batches() as batches:
        first = [next(batches) for _ in range(150)]
    assert data.steps_per_epoch < 150 and (first[0]["inputs"] != first[1]["inputs"]).any()
    for start in (1, 17, 149):
        with data_of(tmp_path, workers=3).train_batches(start) as batches:
            for name, x in next(batches).items():
                np.testing.assert_array_equal(x, first[start][name])
    with data.train_batches(10**9) as batches:
        assert next(batches)["inputs"].shape == (4, 16)
    seen = [i for batch in first for i in batch["index"].tolist()][: data.splits["train"]]
    assert sorted(seen) == list(range(data.splits["train"]))


def test_the_pipeline_keeps_no_second_copy_and_says_where_the_tokens_are(tmp_path):
    data = data_of(tmp_path)
    assert folders(tmp_path) == [name for name in folders(tmp_path) if name.startswith("cache-")]
    assert len(folders(tmp_path)) == 1
    summary = "\n".join(data.summary())
    assert "MB in " in summary and "filled" in summary and "unreadable: none" in summary
    off = data_of(tmp_path, cache_limit_gb=0.0)
    assert "off" in off.summary()[-1] and off.fingerprint() == data.fingerprint()


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_nothing_to_read_is_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UserError, match="a.txt holds no text"):
        prepare(TextFiles(root=str(tmp_path / "a.txt")), tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="too short"):
        prepare(TextFiles(root=str(tmp_path / "a.txt"), val_fraction=0.0), tmp_path)
    with pytest.raises(UserError, match="there is no file "):
        prepare(TextFiles(root=str(tmp_path / "none")), tmp_path)
    for mistake, says in [
        ({"length": 0}, "length is 0"),
        ({"stride": 300}, "stride is 300"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "nothing to train on"),
    ]:
        with pytest.raises(UserError, match=says):
            TextFiles(root="x", **mistake)


def test_a_broken_file_leaves_nothing_behind(tmp_path):
    corpus_file(tmp_path / "d")
    (tmp_path / "d" / "z.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(UserError, match="z.jsonl, line 2 is not JSON"):
        prepare(TextFiles(root=str(tmp_path / "d")), tmp_path)
    assert folders(tmp_path) == []


def test_a_users_file_is_read_as_an_evaluation_would(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh" * 20)
    data, _ = prepare(TextFiles(root=str(tmp_path / "a.txt"), length=8, tokenizer=Characters()), tmp_path)
    (tmp_path / "prompt.json").write_text("hgfedcbaab")
    windows = TextFiles.codec({}, data.dataset_info).decode(str(tmp_path / "prompt.json"))
    assert [w["inputs"].tolist() for w in windows] == [[7, 6, 5, 4, 3, 2, 1, 0], [0, 0, 0, 0, 0, 0, 0, 0]]
    assert windows[1]["targets"][:1].tolist() == [1] and windows[1]["segment_ids"].tolist() == [1] + [0] * 7
    for content, says in [("", "empty"), ("a", "too short"), ("axe", "prompt.json: the character 'x'")]:
        (tmp_path / "prompt.json").write_text(content)
        with pytest.raises(UserError, match=says):
            read_text(str(tmp_path / "prompt.json"), data.dataset_info)
    (tmp_path / "prompt.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not utf-8"):
        read_text(str(tmp_path / "prompt.json"), data.dataset_info)


# ---------------------------------------------------------------------------------------------------------- real data


@pytest.mark.realdata
def test_tiny_shakespeare_is_nanogpts(real_data, tmp_path):
    root = str(real_data / "tiny_shakespeare" / "input.txt")
    data, _ = prepare(TextFiles(root=root, length=64, stride=1, tokenizer=Characters()), tmp_path)
    assert data.dataset_info["vocab_size"] == 65
    counts = data.tokens.about
    assert counts["train"]["tokens"] == 1_003_854 and counts["val"]["tokens"] == 111_540
    assert len(data.splits["train"]) == 1_003_854 - 64


@pytest.mark.realdata
def test_chinese_poems_are_documents(real_data, tmp_path):
    data, _ = prepare(TextFiles(root=str(real_data / "zh_song_ci"), length=128, tokenizer=Characters()), tmp_path)
    counts = data.tokens.about
    assert counts["train"]["documents"] + counts["val"]["documents"] == 21_053
    assert data.splits["train"].fill > 0.85
    example = data.splits["train"][0]
    text = load(data.dataset_info["tokenizer"]).decode(example["targets"][example["segment_ids"] == 1])
    assert "。" in text and "\n" in text and "\ufffd" not in text


@pytest.mark.realdata
def test_wikitext_in_subwords(real_data, tmp_path):
    root = str(real_data / "wikitext2_valid_test" / "valid.txt")
    data, _ = prepare(TextFiles(root=root, length=64, tokenizer=Subwords("bpe", 1024)), tmp_path)
    tokens, nbytes = targets(data.splits["val"])
    text = load(data.dataset_info["tokenizer"]).decode(tokens)
    whole = pathlib.Path(root).read_text(encoding="utf-8")
    assert whole.endswith(text) and nbytes == len(text.encode()) and nbytes / len(tokens) > 2.3


def test_the_code_that_makes_tokens_is_part_of_the_key(tmp_path, monkeypatch):
    corpus = TextFiles(root=corpus_file(tmp_path / "d"), length=16)
    assert prepare(corpus, tmp_path)[1] and not prepare(corpus, tmp_path)[1]
    monkeypatch.setattr(base, "source_digest", lambda module: "edited")
    assert prepare(corpus, tmp_path)[1]


def test_a_users_file_is_read_in_the_encoding_of_the_facts(tmp_path):
    (tmp_path / "a.txt").write_bytes("明月几时有".encode("gb18030"))
    (tmp_path / "b.txt").write_bytes("明月几时有".encode())
    dataset_info = {"tokenizer": Bytes().fit(lambda: iter(()), lambda: iter(()), False).state(), "length": 8}
    ours, theirs = (
        read_text(str(tmp_path / name), {**dataset_info, **more})[0]
        for name, more in (("a.txt", {"encoding": "gb18030"}), ("b.txt", {}))
    )
    np.testing.assert_array_equal(ours["inputs"], theirs["inputs"])
    with pytest.raises(UserError, match=r"a.txt is not utf-8 .*as in :root=...,encoding=gb18030"):
        read_text(str(tmp_path / "a.txt"), dataset_info)
    form = {"format": {"encoding": "gb18030", "columns": ("0",), "unit": "line"}}
    for config in (form, {"parts": {"a": form, "b": {}}}):
        found = TextFiles.codec(config, dataset_info).fields
        assert (found.encoding, found.columns["text"], found.lines, found.header) == ("gb18030", (("0",),), True, False)
    assert (
        TextFiles.codec({"parts": {"a": {}}}, dataset_info).fields.encoding
        == TextFiles.codec({}, dataset_info).fields.encoding
        == "utf-8"
    )
