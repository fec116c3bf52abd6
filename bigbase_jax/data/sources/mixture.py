"""Several corpora as one, each with a weight: windows for language modelling with one tokenizer for all.

Windows are made of each part by itself (see ``sources.text``), so no window mixes parts. An epoch of the mixture is so
many whole passes over each part that their windows have the shares asked for, to 1 % where 20 passes over the part that
is seen least allow it; the pipeline shuffles all of them together. So every window of a part is seen equally often, any
step is reached at once (an index is a part, a pass and a window by arithmetic), and the description says the passes.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Source, UserError
from bigbase_jax.data.cache import Writer, kept
from bigbase_jax.data.sources.splits import Split
from bigbase_jax.data.sources.text.base import Opened, key_of
from bigbase_jax.data.sources.text.text import Corpus, Text, read_text, text_codec, texts_of
from bigbase_jax.text.tokenizer import Bytes, Texts, Tokenizer, dataset_info_of, load

_CODE = (
    "data.files",
    "data.rows",
    "data.documents",
    "text.tokenizer",
    "data.cache",
    "data.sources.text.text",
    "data.sources.mixture",
)
_PASSES = 20
_CLOSE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Corpora by name, and how much of each; ``prepare`` reads them.

    ``val`` and ``test`` are those of all parts one after the other, once each; where several parts have one, each is
    also a split of its own (``val_NAME``).

    Attributes:
      parts: corpora such as ``TextFiles``, whose splits and strides count; their tokenizers and lengths do not.
      weights: shares of the training windows by name, of any sum; None: as ``epochs`` says.
      epochs: how often each part is seen while others are seen as often as it says for them; None: all once.
      tokenizer: for all parts, fitted to their training texts in these shares, or read (``TokenizerFile``).
      length: tokens of a window.

    Raises:
      UserError: no parts, parts that are no corpora, or weights that are not those of the parts.
    """

    parts: Mapping[str, Any]
    weights: Mapping[str, float] | None = None
    epochs: Mapping[str, float] | None = None
    tokenizer: Any = Bytes()
    length: int = 256

    def __post_init__(self) -> None:
        if not self.parts:
            raise UserError("a mixture needs parts={'NAME': target(TextFiles, root=...), ...}.")
        for name, part in self.parts.items():
            if not isinstance(part, Corpus):
                raise UserError(f"the part {name!r} of a mixture is {type(part).__name__}; it must be a text corpus.")
        if self.weights is not None and self.epochs is not None:
            raise UserError("a mixture takes weights or epochs, not both: each says how often a part is seen.")
        for kind, given in (("weights", self.weights), ("epochs", self.epochs)):
            for name, value in (given or {}).items():
                if name not in self.parts:
                    raise UserError(f"{kind} has {name!r}, which is no part.{suggest(name, self.parts, 'part')}")
                if not 0 < value < float("inf"):
                    raise UserError(f"the {kind} of {name!r} are {value}; leave the part out, or give more than 0.")
            if given is not None and (missing := sorted(set(self.parts) - set(given))):
                raise UserError(f"{kind} has nothing for the part {missing[0]!r}.")

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        """As that of the first part."""
        return text_codec(config, dataset_info, read_text)

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Mixed:
        """Reads and tokenises the parts, unless that is in the cache; see ``core.RawDataset``."""
        state = self._tokenizer_state(cache, limit_bytes, say)
        given: dict[str, Any] = {"tokenizer": _Fitted(state), "length": self.length, "separate": True}
        parts = {name: dataclasses.replace(part, **given) for name, part in self._sorted()}
        return Mixed(self, {name: part.prepare(cache, limit_bytes, say) for name, part in parts.items()})

    def _sorted(self) -> list[tuple[str, Corpus]]:
        return sorted(self.parts.items())

    def _tokenizer_state(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> str:
        stamps = [[name, part.file_signature(), part.dealing()] for name, part in self._sorted()]
        key = key_of(_CODE, [self.tokenizer], [stamps, sorted((self.weights or self.epochs or {}).items())])

        def write(writer: Writer) -> Mapping[str, Any]:
            tokenizer = self.tokenizer.fit(self._texts(("train",)), self._texts(("val", "test")), True)
            return {"tokenizer": tokenizer.state()}

        what = f"reading the {len(self.parts)} parts of the mixture once, for their tokenizer"
        return str(kept(key, lambda: write, cache, limit_bytes, say, what).about["tokenizer"])

    def _texts(self, splits: tuple[str, ...]) -> Texts:
        shares = {name: (self.weights or {}).get(name, 1.0) for name in self.parts}
        parts = [(shares[name], texts_of(part, splits)) for name, part in self._sorted()]
        return lambda: interleaved([(share, texts()) for share, texts in parts])


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """A tokenizer that is there, for a ``Corpus`` to take."""

    state: str

    def fit(self, texts: Texts, others: Texts, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        return load(self.state)


def interleaved(parts: Sequence[tuple[float, Iterator[str]]]) -> Iterator[str]:
    """Texts of several parts so that, at any time, characters given are in proportion to the shares, until all end."""
    left = [[0.0, i, share, texts] for i, (share, texts) in enumerate(parts)]
    while left:
        least: list[Any] = min(left, key=lambda entry: entry[:2])
        text = next(least[3], None)
        if text is None:
            left.remove(least)
        else:
            least[0] += max(len(text), 1) / least[2]
            yield text


class Mixed(Opened):
    """A ``Dataset`` of windows over several corpora that were read.

    Attributes:
      splits: see ``Windows`` for what is in an example.
      dataset_info: as of a ``Text``.
      description: how many windows, passes and which share each part has.
      passes: over each part, in an epoch of the mixture.
    """

    def __init__(self, mixture: Mixture, texts: Mapping[str, Text]):
        first = next(iter(texts.values()))
        info = {**dataset_info_of(first.tokens.tokenizer), "length": mixture.length}
        sizes = {name: len(text.splits["train"]) for name, text in texts.items()}
        if mixture.weights is not None:
            often = {name: mixture.weights[name] / n for name, n in sizes.items()}
        else:
            often = dict(mixture.epochs) if mixture.epochs is not None else dict.fromkeys(sizes, 1.0)
        self.passes = dict(zip(sizes, whole_passes([often[name] for name in sizes]), strict=True))
        splits: dict[str, Source] = {}
        splits["train"] = Union([(text.splits["train"], self.passes[n]) for n, text in texts.items()], "train")
        for split in ("val", "test"):
            have = {name: text.splits[split] for name, text in texts.items() if split in text.splits}
            if have:
                splits[split] = Union([(source, 1) for source in have.values()], split)
            if len(have) > 1:
                splits |= {f"{split}_{name}": source for name, source in have.items()}
        total = len(splits["train"])
        parts = []
        for name, text in texts.items():
            share, n = self.passes[name] * sizes[name] / total, self.passes[name]
            each = ", ".join(f"{len(text.splits[s]):,} of {s}" for s in ("val", "test") if s in text.splits)
            seen = f"{sizes[name]:,} windows {n} time{'s' * (n != 1)} ({share:.1%})"
            parts.append(f"{name}: {seen}{f', {each}' * bool(each)}, {text.description}")
        about = [[name, text.fingerprint(), self.passes[name]] for name, text in texts.items()]
        super().__init__(splits, info, "a mixture of " + " | ".join(parts), about)


def whole_passes(often: Sequence[float]) -> list[int]:
    """Small whole numbers in about these proportions: within 1 % where the least of them may be up to 20."""
    ratio = np.array(often, np.float64) / min(often)
    best, error = np.ones(len(ratio)), np.inf
    for least in range(1, _PASSES + 1):
        passes = np.round(least * ratio)
        off = float(np.abs(passes / (least * ratio) - 1).max())
        if off < error - 1e-12:
            best, error = passes, off
        if error <= _CLOSE:
            break
    return [int(n) for n in best]


class Union(Split):
    """The ``Source`` of several others one after the other, each some times."""

    def __init__(self, parts: Sequence[tuple[Source, int]], split: str):
        self._parts = [source for source, _ in parts]
        self._stops = np.cumsum([len(source) * times for source, times in parts])
        kept = [getattr(source, "in_memory", False) for source in self._parts]
        where: Any = all(kept) and "; ".join(dict.fromkeys(map(str, kept)))
        super().__init__(split, int(self._stops[-1]), self._of, where)

    def place(self, index: int) -> tuple[int, int]:
        """(part, index in it) of an example."""
        part = int(np.searchsorted(self._stops, index, side="right"))
        return part, (index - int(self._stops[part - 1] if part else 0)) % len(self._parts[part])

    def _of(self, index: int) -> Example:
        part, at = self.place(index)
        return self._parts[part][at]
