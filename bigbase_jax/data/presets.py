"""Data sets and tokenizers by the words that recipes take on the command line."""

from __future__ import annotations

import os

from ml_collections import ConfigDict

from bigbase_jax.build import suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.documents import Format
from bigbase_jax.data.sources.image.folder import ImageFolder
from bigbase_jax.data.sources.image.idx import Idx
from bigbase_jax.data.sources.image.npz import Npz
from bigbase_jax.data.sources.image.tfds import Tfds
from bigbase_jax.data.sources.mixture import Mixture
from bigbase_jax.data.sources.text.text import PythonReference, TextFiles
from bigbase_jax.text.tokenizer import Bytes, Characters, Subwords, TokenizerFile


def pictures(
    data: str, root: str | None, embedded: ConfigDict | None, tfds: str | None, val_fraction: float = 0.1
) -> ConfigDict:
    """The config node of a picture data set.

    Args:
      data: "synthetic" (``embedded``; "drawn" of old), "folder" (of pictures, at ``root``), "idx" (MNIST's format, a
        folder), "npz" (a file or folder of arrays), or "tfds" (the data set named ``tfds``, below ``root`` or TFDS's
        own folder).
      root: where it is.
      embedded: the node of the built-in data set, if the recipe has one.
      tfds: the recipe's data set among TensorFlow Datasets.
      val_fraction: share of the training split that becomes ``val`` where the data has none.

    Raises:
      UserError: an unknown word, or a missing ``root``.
    """
    if data in ("synthetic", "drawn") and embedded is not None:
        return embedded
    known = [*(("synthetic",) if embedded is not None else ()), "folder", "idx", "npz", "tfds"]
    if data not in known:
        raise UserError(f"there is no data={data}.{suggest(data, known, 'value')}")
    if data == "tfds":
        if tfds is None:
            raise UserError("this recipe names no data set of TensorFlow Datasets; use data=folder, idx or npz.")
        return target(Tfds, name=tfds, data_dir=root, val_fraction=val_fraction)
    if not root:
        raise UserError(f"data={data} needs root=DIR, where the data is.")
    if data == "folder":
        return target(ImageFolder, root=root, val_fraction=val_fraction)
    if data == "idx":
        return target(Idx, root=root, val_fraction=val_fraction)
    return target(Npz, path=root, val_fraction=val_fraction)


def texts(
    data: str,
    root: str | None,
    tokenizer: ConfigDict,
    length: int,
    stride: int | None = None,
    columns: str | None = None,
    encoding: str = "utf-8",
) -> ConfigDict:
    """The config node of a text data set for language modelling.

    Args:
      data: "pydoc" (the language reference inside Python), "text" or "hf" (a file, or a folder of files, at ``root``;
        what Hugging Face's ``datasets`` has saved is such a folder), or "mix" (several of them).
      root: where it is; of "mix", "PATH+PATH", or with shares of the training windows, "PATH@3+PATH@1".
      tokenizer: the node of a tokenizer (see ``tokenizers``).
      length, stride: see ``sources.text.Corpus``.
      columns, encoding: see ``form``.

    Raises:
      UserError: an unknown word, a missing ``root``, or shares that are no numbers.
    """
    known = ("pydoc", "text", "hf", "mix")
    if data not in known:
        raise UserError(f"there is no data={data}.{suggest(data, known, 'value')}")
    if data == "pydoc":
        return target(PythonReference, tokenizer=tokenizer, length=length, stride=stride)
    if not root:
        wanted = "root=PATH+PATH or root=PATH@3+PATH@1" if data == "mix" else "root=FILE or root=DIR"
        raise UserError(f"data={data} needs {wanted}, where the text is.")
    if data == "mix":
        return _mixture(root, tokenizer, length, stride, form(columns, encoding))
    return target(
        TextFiles, root=root, format=form(columns, encoding), tokenizer=tokenizer, length=length, stride=stride
    )


def form(columns: str | None, encoding: str) -> Format:
    """How documents lie in files: ``columns`` as in "title+body", of tables and JSON; see ``Format``."""
    return Format(columns=tuple(columns.split("+")) if columns else (), encoding=encoding)


def _mixture(root: str, tokenizer: ConfigDict, length: int, stride: int | None, format: Format) -> ConfigDict:
    parts: dict[str, ConfigDict] = {}
    weights: dict[str, float] = {}
    for item in root.split("+"):
        path, _, share = item.strip().partition("@")
        stem = os.path.basename(os.path.normpath(path)).replace(".", "_")  # dots divide the keys of a config
        name = next(n for n in (stem, *(f"{stem}_{i}" for i in range(2, 1000))) if n not in parts)
        parts[name] = target(TextFiles, root=path, format=format, length=length, stride=stride)
        if share:
            try:
                weights[name] = float(share)
            except ValueError as error:
                raise UserError(f"the share of {path} in root={root} is {share!r}, not a number.") from error
    if weights and len(weights) < len(parts):
        raise UserError(f"root={root} has shares for some of its parts; give all of them one, or none.")
    return target(Mixture, parts=parts, weights=weights or None, tokenizer=tokenizer, length=length)


def tokenizers(word: str, vocab_size: int) -> ConfigDict:
    """The config node of a tokenizer.

    Args:
      word: "bytes", "chars", "bpe", "unigram", "wordpiece" or "words" (learned from the training text), or the path
        of a published tokenizer's file or folder.
      vocab_size: of what is learned.

    Raises:
      UserError: an unknown word that is no path either.
    """
    if word == "bytes":
        return target(Bytes)
    if word == "chars":
        return target(Characters)
    if word in ("bpe", "unigram", "wordpiece", "words"):
        return target(Subwords, algorithm=word, vocab_size=vocab_size)
    if os.path.exists(os.path.expanduser(word)):
        return target(TokenizerFile, path=word)
    known = ("bytes", "chars", "bpe", "unigram", "wordpiece", "words")
    raise UserError(f"there is no tokenizer={word}, nor such a file.{suggest(word, known, 'tokenizer')}")
