"""Steps on all documents together: exact and near duplicates, test sets, and how much of each source there is."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from bigbase_jax.clean import engine
from bigbase_jax.clean.engine import col
from bigbase_jax.clean.text import HAN, tokens
from bigbase_jax.core import UserError

_ROWS = 20_000_000  # of signatures by band, that are grouped at once


@dataclasses.dataclass(frozen=True)
class ExactDuplicates:
    """Of documents with the same ``digest``, one stays: of test, val or train, then the one of the least key."""

    name = "exact_duplicates"

    def drop(self, df: Any, folder: pathlib.Path, workers: int | None, say: Callable[[str], None]) -> Any:
        """``df`` with ``dropped`` and ``of``, the key of the document that stays in its place."""
        least = df.groupby("digest").agg(col("key").min().alias("_least"))
        df = df.join(least, on="digest")
        return _dropped(df, col("_least") != col("key"), "exact duplicate", col("_least")).exclude("_least")


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Documents whose sets of n-grams have a Jaccard similarity of ``threshold`` or more, by MinHash and banding.

    Broder 1997; banding as in Leskovec et al., "Mining of Massive Datasets", 3.4: two documents of similarity s share
    one of b bands of r hashes with probability 1 - (1 - s^r)^b: 0.99995 at s = 0.8 with 25 bands of 5. Each that shares
    one with the first of its bucket is then compared with it by its n-grams themselves; of each connected component the
    first stays (see ``ExactDuplicates``).

    Attributes:
      threshold: least similarity of a pair.
      ngram: words, or Han characters, of an n-gram.
      bands, rows: of the signature.
      column: the text that is compared.
      confirm: compare n-grams; else who shares a band is a duplicate.
    """

    threshold: float = 0.8
    ngram: int = 5
    bands: int = 25
    rows: int = 5
    column: str = "text"
    confirm: bool = True

    name = "near_duplicates"

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1 or min(self.ngram, self.bands, self.rows) < 1:
            raise UserError("near duplicates need a threshold in (0, 1], and ngram, bands and rows of at least 1.")

    def drop(self, df: Any, folder: pathlib.Path, workers: int | None, say: Callable[[str], None]) -> Any:
        """``df`` with ``dropped`` and ``of``. Writes signatures into ``folder``."""
        import daft

        words = col(self.column).lower().regexp_replace(r"[^\p{L}\p{M}\p{N}]+", " ")
        words = words.regexp_replace(
            rf"([{HAN}])".replace("\U00020000", r"\x{20000}").replace("\U0003134f", r"\x{3134F}"), " ${1} "
        )
        words = words.regexp_replace(r"\s+", " ").lstrip().rstrip()
        signed = df.select("key", words.alias("words")).with_column(
            "signature", col("words").minhash(num_hashes=self.bands * self.rows, ngram_size=self.ngram, seed=1)
        )
        banded = engine.Step(
            ("signature",), {"bands": "list<uint64>"}, functools.partial(_bands, self.bands, self.rows)
        )
        signed = engine.mapped(signed.select("key", "signature"), banded, None, 4096)
        signed.exclude("signature").write_parquet(str(folder / "bands"))
        signed = daft.read_parquet(str(folder / "bands" / "*.parquet"))
        count = signed.count_rows()
        groups = min(self.bands, -(-self.bands * count // _ROWS) or 1)
        pairs: Any = None
        for at in np.array_split(np.arange(self.bands), groups):
            found = signed.select("key", col("bands").slice(int(at[0]), int(at[-1]) + 1).alias("band")).explode("band")
            buckets = found.groupby("band").agg(col("key").min().alias("b"), col("key").count().alias("n"))
            near = found.join(buckets.where(col("n") > 1), on="band").where(col("key") != col("b"))
            near = near.select(col("key").alias("a"), "b").distinct().collect()
            pairs = near if pairs is None else pairs.union_all(near)
        pairs = pairs.distinct().collect()
        total = pairs.count_rows()
        say(f"near duplicates: {count:,} documents, {total:,} pairs that share a band")
        if self.confirm and total:
            some = pairs.select(col("a").alias("key")).union_all(pairs.select(col("b").alias("key"))).distinct()
            grams = df.select("key", words.alias("words")).join(some, on="key")
            hashed = engine.Step(("words",), {"grams": "large_binary"}, functools.partial(_grams, self.ngram))
            grams = engine.mapped(grams, hashed, workers).select("key", "grams")
            grams.write_parquet(str(folder / "grams"))
            grams = daft.read_parquet(str(folder / "grams" / "*.parquet"))
            both = pairs.join(grams.select(col("key").alias("a"), col("grams").alias("x")), on="a")
            both = both.join(grams.select(col("key").alias("b"), col("grams").alias("y")), on="b")
            compared = engine.Step(("x", "y"), {"similarity": "float64"}, _jaccard)
            both = engine.mapped(both, compared, None, 1024).where(col("similarity") >= self.threshold)
            pairs = both.select("a", "b").collect()
        return linked(df, engine.components(pairs, say))


def linked(df: Any, links: Any) -> Any:
    """``df`` with ``dropped`` and ``of`` of what ``engine.components`` gives."""
    found = links.select(col("a").alias("key"), col("b").alias("_least"))
    df = df.join(found, on="key", how="left")
    return _dropped(df, col("_least").not_null(), "near duplicate", col("_least")).exclude("_least")


def _dropped(df: Any, where: Any, why: str, of: Any) -> Any:
    import daft

    none = daft.lit(None)
    text, number = daft.DataType.string(), daft.DataType.uint64()
    return df.with_columns(
        {"dropped": where.if_else(daft.lit(why), none.cast(text)), "of": where.if_else(of, none.cast(number))}
    )


def _bands(bands: int, rows: int, table: Any) -> dict[str, Any]:
    """u64 of each band of a signature, which two documents share where its hashes are the same."""
    signature = table["signature"].combine_chunks()
    x_NBR = signature.flatten().to_numpy(zero_copy_only=False).astype(np.uint64).reshape(-1, bands, rows)
    with np.errstate(over="ignore"):
        band_NB = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), x_NBR.shape[:2]).copy()
        for r in range(rows):  # multiply and rotate, as in FxHash
            band_NB = ((band_NB << np.uint64(5)) | (band_NB >> np.uint64(59))) ^ x_NBR[:, :, r]
            band_NB = band_NB * np.uint64(0x517CC1B727220A95)
        band_NB ^= band_NB >> np.uint64(32)
    return {"bands": list(band_NB)}


def _grams(ngram: int, table: Any) -> dict[str, Any]:
    """Sorted hashes, u64 each, of the set of n-grams of a text; of the text itself where it has fewer words."""
    return {"grams": [np.unique(ngrams(text.split(" "), ngram)).tobytes() for text in table["words"].to_pylist()]}


def ngrams(words: list[str], n: int) -> np.ndarray:
    """u64[max(1, W - n + 1)]: a hash of each n-gram, the same in every process."""
    n = min(n, max(len(words), 1))
    word_W = np.fromiter((_hash(word) for word in words), np.uint64, len(words))
    hash_G = np.zeros(max(len(words) - n + 1, 0), np.uint64)
    with np.errstate(over="ignore"):
        for i in range(n):
            hash_G = (hash_G ^ word_W[i : len(words) - n + 1 + i]) * np.uint64(0x9E3779B97F4A7C15)
            hash_G ^= hash_G >> np.uint64(29)
    return hash_G


@functools.lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _jaccard(table: Any) -> dict[str, Any]:
    """Of two sets ``x`` and ``y`` of ``_grams``, how much of their union they share."""
    found = []
    for x, y in zip(table["x"].to_pylist(), table["y"].to_pylist(), strict=True):
        a, b = np.frombuffer(x, np.uint64), np.frombuffer(y, np.uint64)
        both = len(np.intersect1d(a, b, assume_unique=True))
        found.append(both / (len(a) + len(b) - both))
    return {"similarity": found}


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """Training documents that share n-grams with a test set go (Brown et al. 2020, appendix C: 13-grams).

    The test sets are those of the data itself, its ``test`` and ``val``, and files elsewhere.

    Attributes:
      against: a file or folder of test texts, beside those of the data; None: these alone.
      ngram: words, or Han characters, without case and punctuation.
      share: of a document's n-grams that a test set may have; 0: not one.
    """

    against: str | None = None
    ngram: int = 13
    share: float = 0.0

    name = "decontaminate"

    def check(self) -> None:
        """
        Raises:
          UserError: there are no such files.
        """
        if self.against is not None:
            from bigbase_jax.clean.read import found

            found(self.against)

    def drop(self, df: Any, folder: pathlib.Path, workers: int | None, say: Callable[[str], None]) -> Any:
        """``df`` with ``dropped``; writes the n-grams of the test sets into ``folder``."""
        import daft

        tests = df.where(col("split") != "train").select("text").to_arrow()["text"].to_pylist()
        parts = [ngrams(words, self.ngram) for words in map(folded, tests) if len(words) >= self.ngram]
        if self.against is not None:
            from bigbase_jax.clean.read import Read, found

            reader = Read(unit="paragraph")
            for file, split in found(self.against)[0]:
                for row in reader.documents(file, reader.encodings[0], split):
                    if len(words := folded(row["text"])) >= self.ngram:
                        parts.append(ngrams(words, self.ngram))
        grams_G = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
        say(f"decontaminate: {len(grams_G):,} {self.ngram}-grams of test sets")
        if not len(grams_G):
            return df.with_column("dropped", daft.lit(None).cast(daft.DataType.string()))
        np.save(folder / "grams.npy", grams_G)
        look = functools.partial(_contaminated, str(folder / "grams.npy"), self.ngram, self.share)
        return engine.mapped(df, engine.Step(("text", "split"), {"dropped": "string"}, look), workers)


def _contaminated(path: str, ngram: int, share: float, table: Any) -> dict[str, Any]:
    """Which training documents have more than ``share`` of their n-grams in a file of sorted ones."""
    grams_G = _loaded(path)
    why: list[str | None] = []
    for text, split in zip(table["text"].to_pylist(), table["split"].to_pylist(), strict=True):
        words = folded(text) if split == "train" else []
        own = ngrams(words, ngram) if len(words) >= ngram else np.zeros(0, np.uint64)
        at = np.minimum(np.searchsorted(grams_G, own), len(grams_G) - 1)
        shared = float(np.mean(grams_G[at] == own)) if len(own) else 0.0
        why.append("in a test set" if shared > share else None)
    return {"dropped": why}


@functools.lru_cache(maxsize=4)
def _loaded(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def folded(text: str) -> list[str]:
    """Words and Han characters without case and punctuation."""
    return [word for word in (re.sub(r"[\W_]+", "", token) for token in tokens(text.lower())) if word]


@dataclasses.dataclass(frozen=True)
class Mix:
    """Takes documents of each source so that their characters have these weights, as many as there are.

    Attributes:
      weights: by source; others, and where it is empty all, are kept whole and count for nothing.
      by: the column of the source.
    """

    weights: Mapping[str, float]
    by: str = "source"

    name = "mix"

    def drop(self, df: Any, folder: pathlib.Path, workers: int | None, say: Callable[[str], None]) -> Any:
        """``df`` with ``dropped``; who stays is told by the key alone."""
        import daft

        text = daft.DataType.string()
        none = daft.lit(None).cast(text)
        sizes = df.groupby(self.by).agg(col("text").length().sum().alias("n")).to_pydict()
        size = dict(zip(sizes[self.by], sizes["n"], strict=True))
        for name in self.weights:
            if name not in size:
                from bigbase_jax.build import suggest

                raise UserError(f"there is no {self.by} {name!r} to mix.{suggest(name, map(str, size), self.by)}")
        most = min((size[name] / weight for name, weight in self.weights.items() if weight > 0), default=0.0)
        why, place = none, col("key").hash() % daft.lit(1 << 20).cast(daft.DataType.uint64())
        for name, weight in self.weights.items():
            kept = weight * most / size[name]
            say(f"mix: {kept:.1%} of {name}")
            gone = (col(self.by) == name) & (place >= daft.lit(int(kept * (1 << 20))).cast(daft.DataType.uint64()))
            why = gone.if_else(daft.lit("mixed out"), why)
        return df.with_column("dropped", why)
