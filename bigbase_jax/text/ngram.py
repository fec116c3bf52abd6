"""N-gram language models: interpolated Kneser-Ney from counts, and ARPA files.

Probabilities are kept in back-off form, as ARPA files have them: an n-gram that was seen has its probability, any other
one that of its shorter end, times the back-off weight of what is before it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bigbase_jax.core import UserError
from bigbase_jax.runtime.limits import limit, too_much

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MOST = 64_000_000
"""Characters of an ARPA file that is read (times ``BIGBASE_LIMITS``)."""
_LN10 = math.log(10)
Gram = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class NGram:
    """A model of sentences as words.

    Attributes:
      order: the longest n-gram's n.
      log_p: natural logarithm of each n-gram's last word after the others.
      backoff: natural logarithm of the weight of each context.
    """

    order: int
    log_p: Mapping[Gram, float]
    backoff: Mapping[Gram, float]

    def score(self, context: Sequence[str], word: str) -> float:
        """ln p(word | context), of which the last ``order - 1`` words count; a word of no n-gram is ``<unk>``."""
        context = tuple(context[max(len(context) - self.order + 1, 0) :])
        word, weight = word if (word,) in self.log_p else UNKNOWN, 0.0
        while True:
            found = self.log_p.get((*context, word))
            if found is not None:
                return weight + found
            if not context:
                return weight - 100.0 * _LN10 if word == UNKNOWN else weight + self.log_p[(word,)]
            weight += self.backoff.get(context, 0.0)
            context = context[1:]

    def sentence(self, words: Sequence[str]) -> float:
        """ln p of a sentence with its end."""
        history = (BEGIN, *words, END)
        return sum(self.score(history[:n], history[n]) for n in range(1, len(history)))

    @property
    def words(self) -> list[str]:
        """All but the marks of sentences and of the unknown."""
        return [gram[0] for gram in self.log_p if len(gram) == 1 and gram[0] not in (BEGIN, END, UNKNOWN)]

    def arpa(self) -> str:
        """As an ARPA file."""
        by_order: dict[int, list[str]] = defaultdict(list)
        for gram, log_p in self.log_p.items():
            weight = f"\t{self.backoff[gram] / _LN10:.6f}" if gram in self.backoff else ""
            by_order[len(gram)].append(f"{log_p / _LN10:.6f}\t{' '.join(gram)}{weight}")
        lines = ["\\data\\", *(f"ngram {n}={len(by_order[n])}" for n in sorted(by_order))]
        for n in sorted(by_order):
            lines += ["", f"\\{n}-grams:", *sorted(by_order[n], key=lambda line: line.split("\t")[1])]
        return "\n".join([*lines, "", "\\end\\", ""])


def fit(sentences: Iterable[Sequence[str]], order: int = 3, least: int = 1) -> NGram:
    """Interpolated modified Kneser-Ney (Chen and Goodman 1998; as KenLM computes it, Heafield et al. 2013: unigrams are
    interpolated with the uniform distribution over all words, ``</s>`` and ``<unk>``).

    Args:
      sentences: as words.
      order: n.
      least: n-grams of two words and more that are rarer in the text are left out.

    Raises:
      UserError: no sentence, or an order below 1.
    """
    if order < 1:
        raise UserError(f"the order of an n-gram model is {order}; use 1 or more.")
    seen: list[Counter[Gram]] = [Counter() for _ in range(order)]
    for words in sentences:
        history = (BEGIN, *words, END)
        for n in range(1, order + 1):
            seen[n - 1].update(history[i : i + n] for i in range(len(history) - n + 1))
    if not seen[0]:
        raise UserError("there is no sentence to learn an n-gram model of.")
    del seen[0][(BEGIN,)]
    counts = [seen[-1]]
    for n in range(order - 1, 0, -1):  # of shorter ones, before how many words each stands
        before: Counter[Gram] = Counter(gram[1:] for gram in seen[n])
        before.update({gram: count for gram, count in seen[n - 1].items() if gram[0] == BEGIN})
        before.pop((BEGIN,), None)
        counts.insert(0, before)
    kept = [{gram for gram in counts[n] if not n or seen[n][gram] >= least} for n in range(order)]
    uniform = 1 / (len(counts[0]) + 1)
    p: dict[Gram, float] = {}
    backoff: dict[Gram, float] = {}
    for n in range(order):
        discounts = _discounts(counts[n].values())
        total: dict[Gram, float] = defaultdict(float)
        spare: dict[Gram, float] = defaultdict(float)
        for gram, count in counts[n].items():
            total[gram[:-1]] += count
            spare[gram[:-1]] += min(discounts[min(count, 3)], count) if gram in kept[n] else count
        for gram in kept[n]:
            context = gram[:-1]
            lower = p[gram[1:]] if n else uniform
            taken = min(discounts[min(counts[n][gram], 3)], counts[n][gram])
            p[gram] = (counts[n][gram] - taken + spare[context] * lower) / total[context]
        if n:
            backoff.update({context: spare[context] / total[context] for context in total})
        else:
            p[(UNKNOWN,)] = spare[()] / total[()] * uniform
    log_p = {gram: math.log(x) for gram, x in p.items() if x > 0}
    log_p[(BEGIN,)] = -99 * _LN10
    return NGram(order, log_p, {context: math.log(x) for context, x in backoff.items() if x > 0})


def _discounts(counts: Iterable[int]) -> tuple[float, float, float, float]:
    """Of counts of 0, 1, 2, and 3 and more; of few n-grams, for which the estimates are not defined, 0.5, 1 and 1.5."""
    of = Counter(min(count, 4) for count in counts)
    if not all(of[k] for k in (1, 2, 3, 4)):
        return 0.0, 0.5, 1.0, 1.5
    y = of[1] / (of[1] + 2 * of[2])
    found = [k - (k + 1) * y * of[k + 1] / of[k] for k in (1, 2, 3)]
    if any(not 0 < d <= k for k, d in enumerate(found, 1)):
        return 0.0, 0.5, 1.0, 1.5
    return 0.0, *found  # type: ignore[return-value]


def from_arpa(text: str, where: str = "the language model") -> NGram:
    """The model of an ARPA file's text.

    Raises:
      UserError: it is none, or too long.
    """
    if len(text) > limit(MOST):
        raise too_much(f"{where} has more than {limit(MOST):,} characters", "prune it")
    log_p: dict[Gram, float] = {}
    backoff: dict[Gram, float] = {}
    order = 0
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.startswith("\\"):
            order = int(line[1:].partition("-")[0]) if line.endswith("-grams:") and line[1:2].isdigit() else 0
            continue
        if not order or not line:
            continue
        fields = line.split()
        try:
            if len(fields) not in (order + 1, order + 2):
                raise ValueError
            values = [float(fields[0]), *map(float, fields[order + 1 :])]
            if not all(-1e4 < value < 1e4 for value in values):
                raise ValueError
        except ValueError as error:
            raise UserError(
                f"{where}, line {number} is no {order}-gram of an ARPA file (log10 p, words, weight)."
            ) from error
        gram = tuple(fields[1 : order + 1])
        log_p[gram] = values[0] * _LN10
        if len(values) > 1:
            backoff[gram] = values[1] * _LN10
    if not any(len(gram) == 1 for gram in log_p):
        raise UserError(f"{where} is no ARPA file: it has no section \\1-grams:.")
    return NGram(max(map(len, log_p)), log_p, backoff)


class _State(NamedTuple):
    """Of a prefix: the words before, what is there of the next one, and whether some word begins so."""

    history: Gram
    part: str
    known: bool


class Fusion:
    """An n-gram model as a ``decoding.ctc.Scorer`` of tokens that spell its words: shallow fusion.

    A word is scored as soon as it is whole; one that the model does not have costs ``unknown`` from the first letter on
    by which it is no beginning of any, so that it leaves the beams early.
    """

    def __init__(
        self,
        model: NGram,
        spelled: Sequence[str],
        weight: float,
        bonus: float,
        unknown: float,
        by_character: bool = False,
    ):
        """
        Args:
          spelled: the text of each token.
          weight: of log-probabilities.
          bonus: for each word.
          unknown: nats.
          by_character: whether each character is a word.
        """
        self._model, self._spelled, self._by_character = model, spelled, by_character
        self._weight, self._bonus, self._unknown = weight, bonus, unknown
        self._beginnings = {word[:n] for word in model.words for n in range(1, len(word) + 1)}
        self._words = set(model.words)

    def start(self) -> _State:
        """See ``decoding.ctc.Scorer``, as of the others."""
        return _State((BEGIN,), "", True)

    def after(self, state: _State, token: int) -> tuple[float, _State]:
        total = 0.0
        for character in self._spelled[token]:
            if character.isspace():
                more, state = self._whole(state)
            else:
                part = state.part + character
                known = state.known and part in self._beginnings
                more, state = -self._unknown * (state.known and not known), _State(state.history, part, known)
                if self._by_character:
                    total += more
                    more, state = self._whole(state)
            total += more
        return total, state

    def end(self, state: _State) -> float:
        total, state = self._whole(state)
        return total + self._weight * self._model.score(state.history, END)

    def _whole(self, state: _State) -> tuple[float, _State]:
        """At the end of a word."""
        if not state.part:
            return 0.0, state
        score = self._weight * self._model.score(state.history, state.part) + self._bonus
        score -= self._unknown * (state.known and state.part not in self._words)
        history = (*state.history, state.part)[-max(self._model.order - 1, 1) :]
        return score, _State(history, "", True)
