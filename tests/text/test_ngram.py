"""N-gram models against sums by hand, ARPA files both ways, and what a recogniser's transcripts are compared in."""

import itertools
import math

import pytest

from bigbase_jax.core import UserError
from bigbase_jax.tasks.metrics import transcripts
from bigbase_jax.text import ngram
from bigbase_jax.text.normalise import kind_of, normalise, words

TEXT = [line.split() for line in ("a b c", "a b d", "b c a b", "d", "a b c c", "c a", "b b a d c a b")]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_sum_to_one_after_any_context(order):
    model = ngram.fit(TEXT, order)
    everything = [*model.words, ngram.END, ngram.UNKNOWN]
    for context in [(), *itertools.product(["<s>", "a", "b", "nothing"], repeat=2)]:
        assert sum(math.exp(model.score(context, word)) for word in everything) == pytest.approx(1, abs=1e-9)


def test_bigrams_are_those_of_kneser_and_ney():
    """By the formula of Chen and Goodman (1998), with the discounts of few counts: 0.5, 1 and 1.5."""
    model = ngram.fit([["x", "y"], ["x", "y"], ["z", "y"]], 2)
    before = {"x": 1, "y": 2, "z": 1, "</s>": 1}  # before how many words each stands
    spare = 0.5 + 1.0 + 0.5 + 0.5
    unigram = {w: (n - min({1: 0.5, 2: 1.0}[n], n)) / 5 + spare / 5 / 5 for w, n in before.items()}
    assert math.exp(model.score((), "y")) == pytest.approx(unigram["y"])
    assert math.exp(model.score(("x",), "y")) == pytest.approx((2 - 1) / 2 + 1 / 2 * unigram["y"])
    assert math.exp(model.score(("x",), "z")) == pytest.approx(1 / 2 * unigram["z"])
    assert math.exp(model.score(("x",), "?")) == pytest.approx(1 / 2 * spare / 5 / 5)


def test_arpa_files_are_read_as_they_are_written():
    model = ngram.fit(TEXT, 3)
    again = ngram.from_arpa(model.arpa())
    for sentence in [*TEXT, ["d", "nothing", "a"], []]:
        assert again.sentence(sentence) == pytest.approx(model.sentence(sentence), abs=1e-4)
    for broken, said in (("", "no section"), ("\\1-grams:\n-1 a b c", "line 2"), ("\\1-grams:\nnan a", "line 2")):
        with pytest.raises(UserError, match=said):
            ngram.from_arpa(broken)


def test_transcripts_are_normalised():
    assert normalise("  Don\u2019t -- STOP,  'now'!\u3000\uff21\uff11") == "don't stop now a1"
    assert words(normalise("\u4f60\u597d\uff0c \u4e16\u754c\u3002", "characters"), "characters") == list(
        "\u4f60\u597d\u4e16\u754c"
    )
    assert (kind_of(["\u4f60\u597d a"]), kind_of(["all of it"])) == ("characters", "words")
    found = transcripts.errors(["a x c", "", "Q"], ["A b, c d", "two words", ""])
    assert [found[name].tolist() for name in ("insertions", "deletions", "substitutions", "words")] == [
        [0, 0, 1], [1, 2, 0], [1, 0, 0], [4, 2, 0]]  # fmt: skip
    assert transcripts.scores(found)["wer"] == pytest.approx(5 / 6)
