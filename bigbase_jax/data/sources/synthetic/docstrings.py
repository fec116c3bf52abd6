"""Labelled texts that every Python interpreter brings along: what its library says of itself, by subject."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import Example, Source, UserError
from bigbase_jax.data import ragged
from bigbase_jax.data.ragged import Ragged
from bigbase_jax.data.sources.splits import digest, stratified
from bigbase_jax.data.sources.text.labelled_text import ROLES, SEQUENCES, Encoder, LabelledText, read_text
from bigbase_jax.data.sources.text.text import key_of
from bigbase_jax.text.tokenizer import Subwords, dataset_info_of, load

_CODE = ("data.ragged", "text.tokenizer", "data.sources.splits", "data.sources.synthetic.docstrings")

SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "threading", "queue", "sched"),
    "files": (
        "logging",
        "pathlib",
        "shutil",
        "tarfile",
        "tempfile",
        "zipfile",
        "gzip",
        "configparser",
        "csv",
    ),
    "mail": ("email", "mailbox", "imaplib", "smtplib", "poplib", "nntplib"),
    "numbers": ("_pydecimal", "_pydatetime", "datetime", "calendar", "fractions", "ipaddress", "random", "statistics"),
    "programs": ("ast", "importlib", "inspect", "pydoc", "symtable", "tokenize", "typing", "dis", "trace", "traceback"),
    "tests": ("unittest", "doctest", "bdb", "pdb", "cProfile", "timeit"),
    "web": ("http", "urllib", "wsgiref", "xmlrpc", "socketserver", "xml", "html", "ftplib"),
}
"""Classes, and the modules and packages of the standard library whose docstrings are theirs."""
SUBWORDS = Subwords("wordpiece", 4096)
_WORDS = 5  # of a docstring that says something


@dataclasses.dataclass(frozen=True)
class PythonDocstrings:
    """The docstrings of Python's standard library, to be told apart by subject (``SUBJECTS``); no network, no files.

    A stand-in for real data: some 3,500 short English texts, which differ a little between versions of Python. Those
    that occur twice are left out. ``prepare`` reads the library's source.

    Attributes:
      tokenizer: see ``LabelledText``.
      length: L; what is longer is cut.
      val_fraction, test_fraction: shares of the texts.
      seed: of the dealing.
    """

    tokenizer: Any = SUBWORDS
    length: int = 64
    val_fraction: float = 0.1
    test_fraction: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length < 4:
            raise UserError(f"length is {self.length}; it must be at least 4.")

    def prepare(self, cache: pathlib.Path, limit_bytes: float, say: Callable[[str], None]) -> Docstrings:
        """Reads the docstrings, which takes seconds, and tokenises them, unless that is in the cache: learned twice, a
        tokenizer need not be the same.

        Raises:
          UserError: this Python has no source of its library.
        """
        texts, labels = _collect()
        names = [digest([text]) for text in texts]
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        splits = stratified(names, labels, fractions, self.seed)

        def of(*chosen: str) -> Iterator[str]:
            return (texts[i] for split in chosen if split in splits for i in splits[split])

        def write(add: ragged.Add) -> Mapping[str, Any]:
            tokenizer = self.tokenizer.fit(lambda: of("train"), lambda: of("val", "test"), False, ROLES)
            for tokens_T, _ in tokenizer.encode_batch(texts):
                add(tokens=tokens_T)
            return {"tokenizer": tokenizer.state()}

        key = key_of(_CODE, [self.tokenizer], [names, sorted(fractions.items()), self.seed])
        where = (cache, key) if limit_bytes > 0 else None
        found = ragged.find(*where) if where else None
        if found is None:
            found = ragged.make(write, {"tokens": "<i4"}, where, limit_bytes, say)
        return Docstrings(self, found, texts, labels, splits)

    fields, read = staticmethod(LabelledText.fields), staticmethod(read_text)


class Docstrings:
    """A ``Dataset`` of labelled texts; see ``labelled_text`` for what is in an example."""

    def __init__(
        self,
        data: PythonDocstrings,
        tokens_N: Ragged,
        texts: list[str],
        labels: np.ndarray,
        splits: Mapping[str, np.ndarray],
    ):
        tokenizer = load(tokens_N.about["tokenizer"])
        self.dataset_info: Mapping[str, Any] = {
            **dataset_info_of(tokenizer),
            "length": data.length,
            "num_classes": len(SUBJECTS),
            "class_names": tuple(SUBJECTS),
            "pair": False,
        }
        encode = Encoder(self.dataset_info)
        self.splits: Mapping[str, Source] = {
            split: _Texts([tokens_N.get("tokens", i) for i in indices], labels[indices], encode, split)
            for split, indices in splits.items()
        }
        self._identity = digest([texts, labels, tokenizer.state(), dataclasses.astuple(data)[1:]])
        self.description = (
            f"{len(texts):,} docstrings of the standard library of Python {platform.python_version()}, to be told apart"
            f" by subject; a vocabulary of {tokenizer.size:,}"
        )

    def fingerprint(self) -> str:
        """A digest of the texts, their classes, the tokenizer and the splits."""
        return self._identity

    def read(self, given: str | Mapping[str, Any]) -> Example:
        """See ``labelled_text.read_text``."""
        return read_text(given, self.dataset_info)


class _Texts:
    """The ``Source`` of one split, in memory."""

    in_memory = "memory"
    sequences = SEQUENCES

    def __init__(self, tokens: list[np.ndarray], labels: np.ndarray, encode: Encoder, split: str):
        self.labels = labels
        self._tokens, self._encode, self._split = tokens, encode, split
        self.lengths = encode.lengths(np.array(list(map(len, tokens))))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self._split} has {len(self)} texts; there is no {index}")
        return {**self._encode(self._tokens[index], np.zeros(0, np.int32)), "label": self.labels[index]}

    def name(self, index: int) -> str:
        """Such as ``val[17]``."""
        return f"{self._split}[{index}]"


def _collect() -> tuple[list[str], np.ndarray]:
    """(docstrings, their classes i32[N]), each text once, by the names of modules and the order in their source."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    found: dict[str, list[int]] = {}
    for label, names in enumerate(SUBJECTS.values()):
        for name in names:
            files = [library / f"{name}.py", *sorted((library / name).rglob("*.py"))]
            for path in files:
                if not path.is_file() or {"test", "tests"} & set(path.relative_to(library).parts):
                    continue
                for text in _docstrings(path):
                    found.setdefault(text, []).append(label)
    once = {text: labels[0] for text, labels in found.items() if len(labels) == 1}
    if len(set(once.values())) < len(SUBJECTS):
        raise UserError(
            f"this Python has no source of its library below {library}, which this data is made of; give root=FILE."
        )
    return list(once), np.array(list(once.values()), np.int32)


def _docstrings(path: pathlib.Path) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):  # a library holds files that are not to be read, for its tests
        return
    for node in ast.walk(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text is not None and len(text.split()) >= _WORDS:
            yield text
