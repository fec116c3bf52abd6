"""The search against all paths, times against all alignments, and a language model that decides."""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest

from bigbase_jax.decoding import ctc
from bigbase_jax.text import ngram

BLANK = 3


def collapsed(path):
    return tuple(k for k, _ in itertools.groupby(path) if k != BLANK)


def frames(seed, S=5, V=4):
    logits = np.random.default_rng(seed).normal(size=(S, V)) * 2
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-log_p, 1)
    return log_p, order, np.take_along_axis(log_p, order, 1)


@pytest.mark.parametrize("seed", range(5))
def test_the_search_adds_up_all_paths_of_a_prefix(seed):
    log_p, tokens, sorted_p = frames(seed)
    exact = defaultdict(float)
    for path in itertools.product(range(4), repeat=5):
        exact[collapsed(path)] += math.exp(log_p[np.arange(5), path].sum())
    found = dict(ctc.beam_search(tokens, sorted_p, BLANK, beams=10_000, least=-1e9))
    assert found.keys() == exact.keys()
    for prefix, p in exact.items():
        assert math.exp(found[prefix]) == pytest.approx(p, abs=1e-9)
    best = max(exact, key=exact.get)
    assert ctc.beam_search(tokens, sorted_p, BLANK, beams=8)[0][0] == best


@pytest.mark.parametrize("seed", range(5))
def test_times_are_those_of_the_likeliest_path(seed):
    log_p, tokens, sorted_p = frames(seed, S=6)
    wanted = [(0, 1), (1, 1), (2,), (0, 1, 0)][seed % 4]
    paths = [path for path in itertools.product(range(4), repeat=6) if collapsed(path) == wanted]
    best = max(paths, key=lambda path: log_p[np.arange(6), path].sum())
    assert ctc.align(tokens, sorted_p, wanted, BLANK) == ctc.best_path(np.array(best), BLANK)
    assert ctc.align(tokens, sorted_p, (1,) * 4, BLANK) == []  # seven frames are needed


def test_frames_behind_the_end_are_none():
    _, tokens, sorted_p = frames(0)
    longer = np.concatenate([tokens, np.full((3, 4), -1)]), np.concatenate([sorted_p, np.zeros((3, 4))])
    assert ctc.beam_search(*longer, BLANK, 8) == ctc.beam_search(tokens, sorted_p, BLANK, 8)
    assert ctc.align(*longer, (1,), BLANK) == ctc.align(tokens, sorted_p, (1,), BLANK)
    assert ctc.best_path(np.array([0, 0, 3, 0, -1, -1]), 3) == [ctc.Token(0, 0, 2), ctc.Token(0, 3, 4)]


def test_a_language_model_decides_what_sounds_alike():
    """Tokens: a, b, space; the second letter is a little likelier b, which no word of the model has there."""
    model = ngram.fit([["aa", "ba"], ["aa"], ["ba", "aa"]], 2)
    p = np.array([[0.9, 0.05, 0.01, 0.04], [0.05, 0.05, 0.01, 0.89], [0.45, 0.5, 0.01, 0.04]])
    order = np.argsort(-p, 1)
    given = order, np.log(np.take_along_axis(p, order, 1))
    assert ctc.beam_search(*given, BLANK, 8)[0][0] == (0, 1)
    fusion = ngram.Fusion(model, ["a", "b", " "], weight=1.0, bonus=0.0, unknown=10.0)
    prefix, score = ctc.beam_search(*given, BLANK, 8, fusion)[0]
    assert prefix == (0, 0)
    alone = dict(ctc.beam_search(*given, BLANK, 8))[prefix]
    assert score == pytest.approx(alone + model.sentence(["aa"]), abs=1e-9)
    letters = ngram.Fusion(model, ["aa", "ba", " "], 1.0, 0.5, 10.0)
    state, total = letters.start(), 0.0
    for token in (0, 2, 1):
        more, state = letters.after(state, token)
        total += more
    assert total + letters.end(state) == pytest.approx(model.sentence(["aa", "ba"]) + 1.0)
