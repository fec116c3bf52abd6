"""Labelled texts that every Python interpreter brings along: what its library says of itself, by subject."""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from bigbase_jax.core import UserError
from bigbase_jax.data.cache import Write
from bigbase_jax.data.sources.splits import deal, digest
from bigbase_jax.data.sources.text.base import Survey
from bigbase_jax.data.sources.text.labelled_text import Labelled, LabelledTexts
from bigbase_jax.text.tokenizer import Subwords

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PythonDocstrings(LabelledTexts):
    """The docstrings of Python's standard library, to be told apart by subject (``SUBJECTS``); no network, no files.

    A stand-in for real data: some 3,500 short English texts, which differ a little between versions of Python. Those
    that occur twice are left out. Reading the library's source takes seconds.

    Raises:
      UserError: this Python has no source of its library.
    """

    tokenizer: Any = SUBWORDS
    length: int = 64
    test_fraction: float = 0.2

    code = (*LabelledTexts.code, "data.sources.synthetic.docstrings")

    def origin(self) -> str:
        return f"the docstrings of the standard library of Python {platform.python_version()}"

    def file_signature(self) -> list[Any]:
        return [digest(_collect())]

    def identity(self, tokenizer: str) -> list[Any]:
        return [*_collect(), tokenizer, (self.length, self.val_fraction, self.test_fraction, self.seed)]

    def content(self) -> None:
        return None

    def begin(self) -> Write:
        texts, labels = _collect()
        rows = [("", Labelled((text, ""), label)) for text, label in zip(texts, labels.tolist(), strict=True)]
        names = [digest([text]) for text in texts]
        fractions = {"test": self.test_fraction, "val": self.val_fraction}
        survey = Survey(lambda: rows, deal(["train"] * len(rows), names, fractions, self.seed, labels.tolist()))
        about = {"class_names": list(SUBJECTS), "pair": False, "columns": {}}
        return self.tokenised(survey, {label: label for label in range(len(SUBJECTS))}, about)

    def describe(self, about: Mapping[str, Any], count: int, cut: int, vocabulary: int) -> str:
        return (
            f"{count:,} docstrings of the standard library of Python {platform.python_version()}, to be told apart by"
            f" subject; a vocabulary of {vocabulary:,}"
        )


@functools.cache
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
