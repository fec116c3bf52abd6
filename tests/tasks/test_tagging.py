"""Tagged words: F1 against seqeval, files and long sentences word by word, what padding and untagged tokens weigh.

Axes: B examples, L length, K tags.
"""

import functools

import jax
import numpy as np
import pytest
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from toys import loss_of

from bigbase_jax.core import Evaluated, UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.synthetic.names import MadeUpNames
from bigbase_jax.data.sources.text.tagged_text import ConllFiles, TaggedSentences
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.mlp import MLP
from bigbase_jax.tasks.metrics import spans
from bigbase_jax.tasks.tagging import Tagging
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, load

CONLL = """-DOCSTART- -X- O O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC
call NN I-NP O

Peter\tNNP\tB-NP\tB-PER
Blackburn\tNNP\tI-NP\tI-PER

"""
TOKENIZERS = [Bytes(), Characters(), Subwords("wordpiece", 300), Subwords("bpe", 300), Subwords("unigram", 300)]


def ready(data, cache, limit=1e9):
    return data.prepare(cache, limit, lambda line: None)


def words_of(source, dataset_info):
    """(words, tags) of each example, by its tokens alone."""
    tokenizer = load(dataset_info["tokenizer"])
    for i in range(len(source)):
        example = source[i]
        start = np.flatnonzero(example["starts"])
        inner = example["tokens"][: example["segment_ids"].sum() - 1]
        words = [tokenizer.decode(inner[a:b]).strip() for a, b in zip(start, [*start[1:], len(inner)], strict=True)]
        assert np.all((example["tags"] >= 0) == (example["starts"] == 1)) and not example["token_type_ids"].any()
        yield words, [dataset_info["tag_names"][tag] for tag in example["tags"][start]]


# ---------------------------------------------------------------------------------------------------------- the measure


@pytest.mark.parametrize("marks", ["BIO", "IO", "BIESO", "BO"])
def test_spans_and_their_f1_are_seqevals(marks):
    rng = np.random.default_rng(len(marks))
    tags = [mark if mark == "O" else f"{mark}-{kind}" for mark in marks for kind in ("PER", "LOC-X")]
    pairs = [tuple(rng.choice(tags, n).tolist() for _ in range(2)) for n in rng.integers(1, 12, 200)]
    for truth, _ in pairs:
        want = [(kind, first, last + 1) for kind, first, last in get_entities(truth)]
        assert [tuple(span) for span in spans.spans(truth)] == want
    found = spans.scores(spans.counts(pairs))
    truths, guesses = zip(*pairs, strict=True)
    for name, score in (("precision", precision_score), ("recall", recall_score), ("f1", f1_score)):
        assert found[f"overall_{name}"] == pytest.approx(score(truths, guesses), abs=1e-12)
        each = score(truths, guesses, average=None)
        assert [found["per_class"][kind][name] for kind in ("LOC-X", "PER")] == pytest.approx(each, abs=1e-12)
    assert 0 < found["overall_f1"] < 1


def test_no_span_at_all_scores_nothing():
    nothing = {"overall_precision": 0.0, "overall_recall": 0.0, "overall_f1": 0.0, "per_class": {}}
    assert spans.scores(spans.counts([(["O", "O"], ["O", "O"])])) == nothing
    assert spans.spans(["B-A", "L-A", "U-B", "I-B"]) == [("A", 0, 2), ("B", 2, 3), ("B", 3, 4)]  # BILOU


# ------------------------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=repr)
def test_every_word_has_its_tag_also_in_parts_of_long_sentences(tmp_path, tokenizer):
    rng = np.random.default_rng(0)
    sentences = [
        [("".join(rng.choice(list("abcdü明"), rng.integers(1, 5))), f"B-{rng.integers(3)}") for _ in range(n)]
        for n in (1, 2, 40, 7)
    ]
    text = "\n".join("".join(f"{word} {tag}\n" for word, tag in sentence) for sentence in sentences)
    for name in ("train", "dev", "test"):
        (tmp_path / f"{name}.conll").write_text(text)
    data = ready(ConllFiles(root=str(tmp_path), tokenizer=tokenizer, length=24), tmp_path / "cache")
    found = list(words_of(data.splits["train"], data.dataset_info))
    assert len(found) > len(sentences)
    assert [tag for _, tags in found for tag in tags] == [tag for sentence in sentences for _, tag in sentence]
    if not isinstance(tokenizer, Subwords):
        assert [word for words, _ in found for word in words] == [
            word for sentence in sentences for word, _ in sentence
        ]
    assert "left out" not in data.description and len(data.splits["val"]) == len(found)
    again = ready(ConllFiles(root=str(tmp_path), tokenizer=tokenizer, length=24), tmp_path / "cache")
    assert (
        again.fingerprint() == data.fingerprint() and list(words_of(again.splits["train"], again.dataset_info)) == found
    )


def test_files_as_those_of_conll(tmp_path):
    (tmp_path / "train.txt").write_text(CONLL)
    (tmp_path / "dev.txt").write_text(CONLL)
    data = ready(ConllFiles(root=str(tmp_path), tokenizer=Bytes()), tmp_path / "cache")
    assert list(words_of(data.splits["train"], data.dataset_info)) == [
        (["EU", "rejects", "German", "call"], ["B-ORG", "O", "B-MISC", "O"]),
        (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
    ]
    other = ready(ConllFiles(root=str(tmp_path), tokenizer=Bytes(), tag=1), tmp_path / "cache")
    assert other.dataset_info["tag_names"] == ("JJ", "NN", "NNP", "VBZ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("word\n", "line 1 is 'word', which has no word in column 0 or no tag"),
        ("a O\nb\tO\n\nc O\nd\n", "line 5 is 'd'"),
        ("\n\n", "holds no sentences"),
    ],
)
def test_what_is_no_word_with_a_tag_is_named(tmp_path, text, words):
    (tmp_path / "all.conll").write_text(text)
    with pytest.raises(UserError, match=words):
        ready(ConllFiles(root=str(tmp_path / "all.conll")), tmp_path / "cache")


def test_equal_sentences_are_dealt_to_the_same_split(tmp_path):
    data = ready(MadeUpNames(count=400, tokenizer=Bytes(), length=160), tmp_path, 0)
    found = {name: {" ".join(words) for words, _ in words_of(s, data.dataset_info)} for name, s in data.splits.items()}
    assert set(found) == {"train", "val", "test"} and min(map(len, found.values())) > 20
    assert not found["train"] & (found["val"] | found["test"])
    assert data.dataset_info["tag_names"] == ("B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER", "O")


# ------------------------------------------------------------------------------------------------------------- the task


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(task, variables, a batch of three made-up sentences)."""
    data = Data(MadeUpNames(count=60, tokenizer=Bytes(), length=96), batch_size=3, cache_limit_gb=0)
    data = data.prepare(lambda line: None)
    model = Bert(vocab_size=data.dataset_info["vocab_size"], length=96, width=16, depth=1, heads=2, dropout=0.0)
    task = Tagging(model, data.dataset_info["tag_names"], data.dataset_info["tokenizer"], dropout=0.0)
    with data.train_batches(0) as batches:
        batch = {name: np.asarray(x) for name, x in next(batches).items()}
    return task, task.init(jax.random.key(0), batch), batch


def test_the_loss_is_over_words_and_neither_padding_nor_other_tokens_count(trained):
    task, variables, batch = trained
    loss, _ = jax.jit(functools.partial(loss_of, task))(variables, batch, jax.random.key(1))
    assert loss.weight == (batch["tags"] >= 0).sum()
    padded = {name: np.concatenate([x, np.zeros_like(x)]) for name, x in batch.items()}
    again, _ = jax.jit(functools.partial(loss_of, task))(variables, padded, jax.random.key(1))
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    outputs, metrics = jax.jit(task.evaluate)(variables, batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    right = (np.asarray(outputs["tag"]) == batch["tags"])[batch["tags"] >= 0]
    assert metrics["accuracy"].mean() == pytest.approx(right.mean())
    assert np.all((np.asarray(outputs["tag"]) >= 0) == (batch["starts"] == 1))


def test_what_users_read(trained):
    task, variables, _ = trained
    dataset_info = {"tokenizer": task.tokenizer, "length": 96, "pair": False}
    (example,) = TaggedSentences.codec({}, dataset_info).decode({"text": "Olga left New Grenna, 明天."})
    output = {
        name: np.array(x[0])
        for name, x in jax.jit(task.predict)(variables, {k: v[None] for k, v in example.items()}).items()
    }
    answer = task.postprocess(output, {})
    assert answer["words"] == ["Olga", "left", "New", "Grenna", ",", "明", "天", "."]
    names = ["B-PER", "O", "B-LOC", "I-LOC", "O", "O", "O", "O"]
    output["tag"][output["tag"] >= 0] = [task.tag_names.index(name) for name in names]
    assert task.postprocess(output, {}) == {
        "words": answer["words"],
        "tags": names,
        "entities": [{"type": "PER", "text": "Olga", "word": 0}, {"type": "LOC", "text": "New Grenna", "word": 2}],
    }
    parts = TaggedSentences.codec({}, {**dataset_info, "length": 32}).decode({"text": "word " * 60})
    assert len(parts) > 5 and sum(part["starts"].sum() for part in parts) == 60


def test_the_worst_sentences_are_shown(trained):
    task, variables, batch = trained
    outputs = {name: np.asarray(x) for name, x in jax.jit(task.predict)(variables, batch).items()}
    examples = {**outputs, "tags": batch["tags"], "index": np.arange(5, 8)}
    classes = {"PER": {"precision": 0.5, "f1": 0.25, "support": 3}}
    table, shown = task.figures(Evaluated("test", {"per_class": classes}, examples))
    assert table.columns == ("Type", "Precision", "F1", "Support") and table.rows == [("PER", 0.5, 0.25, 3)]
    (title, pieces), *others = shown.texts
    wrong = ((outputs["tag"] != batch["tags"]) & (batch["tags"] >= 0)).sum(1)
    assert len(others) == 2 and f"{wrong.max()} of {len(pieces)} words wrong" in title
    assert title.startswith(f"row {6 + int(wrong.argmax())}: ")
    assert sum(" [said " in text for text, _ in pieces) == sum(shade > 0 for _, shade in pieces) == wrong.max()


def test_mistakes_are_named():
    with pytest.raises(UserError, match="MLP does not read text"):
        Tagging(MLP(), ("A", "B"))
    with pytest.raises(UserError, match="the only tag is 'O'"):
        Tagging(Bert(), ("O",))
