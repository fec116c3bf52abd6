"""The built-in questions: answers are right, and no question is in two splits."""

import re

import pytest

from bigbase_jax.core import UserError
from bigbase_jax.data.sources.synthetic.questions import Questions
from bigbase_jax.text.tokenizer import load


def test_answers_are_right():
    said = [spoken.messages for _, spoken in Questions(count=400).conversations()]
    kinds = set()
    for question, answer in said:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        q, a = question["content"], answer["content"]
        if m := re.fullmatch(r"What is (\d+) \+ (\d+)\?", q):
            assert int(a) == int(m[1]) + int(m[2])
        elif m := re.fullmatch(r"Which is larger, (\d+) or (\d+)\?", q):
            assert int(a) == max(int(m[1]), int(m[2]))
        elif m := re.fullmatch(r"How does (\w+) end\?", q):
            assert a == f"With the letter {m[1][-1]}."
        else:
            assert a == re.fullmatch(r"Write (\w+) backwards\.", q)[1][::-1]
        kinds.add(q.split()[0])
    assert kinds == {"What", "Which", "How", "Write"}
    assert said == [spoken.messages for _, spoken in Questions(count=400).conversations()]
    assert said != [spoken.messages for _, spoken in Questions(count=400, seed=1).conversations()]


def test_no_question_is_in_two_splits(tmp_path):
    data = Questions(count=200, length=64, test_fraction=0.2).prepare(tmp_path, 0, lambda line: None)
    tokenizer = load(data.dataset_info["tokenizer"])
    texts = {}
    for split, source in data.splits.items():
        windows = [source[i] for i in range(len(source))]
        texts[split] = {tokenizer.decode(w["inputs"][w["segment_ids"] == 1].tolist()) for w in windows}
        assert all((w["weights"][w["segment_ids"] == 0] == 0).all() and w["weights"].any() for w in windows)
    assert set(texts) == {"train", "val", "test"} and "made up here" in data.description
    assert not texts["train"] & (texts["val"] | texts["test"]) and not texts["val"] & texts["test"]


def test_too_few_are_refused():
    with pytest.raises(UserError, match="count is 3; it must be at least 20"):
        Questions(count=3)
