"""Pictures with captions, for models of both.

Rows -> splits, by picture -> a tokenizer -> tokens, which are kept in the cache. An example is, with C captions at most
and L tokens of each:

- ``image`` u8[H,W,3];
- ``tokens`` i32[C,L]: each caption, or a question and each answer to it, with the tokenizer's special tokens around
  it, cut to L, and padding;
- ``segment_ids`` i32[C,L]: 1 for tokens, 0 for padding; all 0 where the picture has fewer captions;
- ``prompt`` i32[L]: what a caption begins with, and -1: the tokenizer's special token at the beginning, or none, and
  the question; in prediction with what the user wants it to go on from.

Facts: ``vocab_size``, ``tokenizer``, the special tokens (``end_id``, ``pad_id``, ...) and ``length``, L.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Codec, Example, Fields, UserError
from bigbase_jax.data.cache import Store, Writer
from bigbase_jax.data.files import (
    LIMITS,
    PLAIN,
    TABLES,
    File,
    Limits,
    existing,
    files_of,
    is_archive,
    kind_of,
    limits_of,
    named_after,
    refuse_permission,
)
from bigbase_jax.data.rows import Row, checked, delimiter, json_values, lines_of, rows, text_of
from bigbase_jax.data.sources.image.image import COLUMNS, SUFFIXES, PictureCodec, decode
from bigbase_jax.data.sources.splits import Split, deal, to_split_off
from bigbase_jax.data.sources.text.base import (
    ROLES,
    SPLITS,
    Opened,
    TextRows,
    Write,
    batches,
    narrow,
    split_indices,
    tokenizer_of,
)
from bigbase_jax.text.tokenizer import Encoder, Subwords, Tokenizer, dataset_info_of, encode, load

SUBWORDS = Subwords("wordpiece", 4096)
TEXTS = (
    *("caption", "captions", "answer", "answers", "text", "texts", "sentence", "sentences"),
    *("title", "description", "comment", "raw"),
)
"""Columns of captions, the usual one first."""
_NAMES = (*COLUMNS, "image_name", "img_path", "filepath", "url")


class Captioned(NamedTuple):
    """A picture and what is said of it.

    Attributes:
      name: of its file, relative to the root; of one that is in a table, where it is.
      captions: some may be empty.
      split: "" where none is named.
      data: its bytes, of one that is in a table.
      question: that the captions answer; "": they answer none.
    """

    name: str
    captions: Sequence[str]
    split: str = ""
    data: bytes = b""
    question: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captions(TextRows):
    """Pictures with captions, from whatever gives them; see ``TextRows``. Subclasses say where they come from.

    All captions of a picture are in one split, where each of its questions is an example of its own. Empty ones are
    left out, and pictures that have none besides.

    Attributes:
      tokenizer: fitted to the captions of train, or read (``TokenizerFile``).
      length: L, special tokens included.
      captions: C, of each picture; more are left out.

    Raises:
      UserError: a value out of its range.
    """

    tokenizer: Any = SUBWORDS
    length: int = 32
    captions: int = 5

    code: ClassVar[tuple[str, ...]] = ("data.sources.image.captions",)

    def __post_init__(self) -> None:
        for name, least in (("length", 4), ("captions", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}.")

    # -- what subclasses say ---------------------------------------------------------------------------------------

    def pictures(self) -> Iterator[Captioned]:
        """All, from the start at each call; those of one name and question are one example."""
        raise NotImplementedError

    def image(self, name: str, data: bytes) -> np.ndarray:
        """The picture of a ``Captioned``, u8[H,W,3]; raises UserError naming one that does not decode."""
        raise NotImplementedError

    def notes(self) -> list[str]:
        """What else the description says; after ``pictures`` was read."""
        return []

    # -- reading ---------------------------------------------------------------------------------------------------

    def kept_for(self) -> list[Any]:
        return [self.captions]

    def begin(self) -> Write:
        """
        Raises:
          UserError: no picture has a caption, or what cannot be read.
        """
        said: dict[tuple[str, str], list[str]] = {}
        split_of: dict[str, str] = {}
        left: Counter[str] = Counter()
        for picture in self.pictures():
            texts = [text.strip() for text in picture.captions]
            left["empty captions"] += sum(not text for text in texts)
            said.setdefault((picture.name, picture.question), []).extend(filter(None, texts))
            split = split_of.setdefault(picture.name, picture.split)
            if split != picture.split:
                raise UserError(f"{picture.name} is in the splits {split!r} and {picture.split!r}; leave it in one.")
        left["pictures without a caption"] += sum(not texts for texts in said.values())
        left[f"captions beyond {self.captions} of a picture"] += sum(
            max(len(texts) - self.captions, 0) for texts in said.values()
        )
        said = {name: texts[: self.captions] for name, texts in said.items() if texts}
        if not said:
            raise UserError(f"{self.origin()} has no picture with a caption.")
        names = list(dict.fromkeys(name for name, _ in said))
        given = [split_of[name] or "train" for name in names]
        fractions = to_split_off(set(given) - {"train"}, self.val_fraction, self.test_fraction)
        dealt = dict(zip(names, deal(given, names, fractions, self.seed), strict=True))
        if "train" not in dealt.values():
            raise UserError(f"{self.origin()} has the splits {', '.join(sorted(set(given)))} and none to train on.")

        def of(train: bool) -> Iterator[str]:
            here = ((key, some) for key, some in said.items() if (dealt[key[0]] == "train") == train)
            return (text for (_, question), some in here for text in (*filter(None, [question]), *some))

        tokenizer = self.tokenizer.fit(lambda: of(True), lambda: of(False), False, ROLES)
        notes = [f"{count:,} {what}" for what, count in left.items() if count]

        def write(writer: Writer) -> Mapping[str, Any]:
            missing = dict(said)
            found = (p for p in self.pictures() if missing.pop((p.name, p.question), None))
            for some in batches(found, lambda p: sum(map(len, said[p.name, p.question])) + len(p.data)):
                texts = [[p.question, *said[p.name, p.question]] for p in some]
                tokens = iter(tokenizer.encode_batch([text for each in texts for text in each]))
                for p, each in zip(some, texts, strict=True):
                    asked, *parts = (narrow(next(tokens)[0], tokenizer) for _ in each)
                    writer.add(
                        {
                            "name": np.frombuffer(p.name.encode("utf-8", "surrogateescape"), np.uint8),
                            "data": np.frombuffer(p.data, np.uint8),
                            "question": asked,
                            "tokens": np.concatenate(parts),
                            "sizes": np.array([len(part) for part in parts], np.int32),
                            "split": np.uint8(SPLITS.index(dealt[p.name])),
                        }
                    )
            return {"tokenizer": tokenizer.state(), "left": notes, "notes": self.notes()}

        return write

    def opened(self, rows_N: Store) -> Opened:
        """``description`` says what was left out, and how many captions are cut."""
        tokenizer = tokenizer_of(rows_N)
        encoder, empty = Encoder(tokenizer, self.length), tokenizer.special.get("pad", 0)

        def pieces(row: int) -> list[np.ndarray]:
            stops = np.cumsum(rows_N.get("sizes", row))
            return np.split(rows_N.get("tokens", row).astype(np.int32), stops[:-1])

        def name(row: int) -> str:
            return bytes(rows_N.get("name", row)).decode("utf-8", "surrogateescape")

        def example(row: int) -> Example:
            tokens_CL = np.full((self.captions, self.length), empty, np.int32)
            segments_CL = np.zeros((self.captions, self.length), np.int32)
            asked_T = rows_N.get("question", row).astype(np.int32)
            for c, piece in enumerate(pieces(row)):
                made, _ = encoder([np.concatenate([asked_T, piece])])
                tokens_CL[c], segments_CL[c] = made["tokens"], made["segment_ids"]
            image = self.image(name(row), bytes(rows_N.get("data", row)))
            prompt_L = prompt_of(tokenizer, asked_T, self.length)
            return {"image": image, "tokens": tokens_CL, "segment_ids": segments_CL, "prompt": prompt_L}

        kept = split_indices(rows_N)
        long = int((rows_N.values("sizes") > encoder.room).sum())
        notes = [f"{long:,} captions cut to {self.length} tokens"] * bool(long) + rows_N.about["notes"]
        if rows_N.about["left"]:
            notes.append(f"left out: {', '.join(rows_N.about['left'])}")
        counts = ", ".join(f"{split} {len(indices):,}" for split, indices in kept.items())
        parts = [f"{self.origin()}: pictures: {counts}; {rows_N.values('sizes').size:,} captions", *notes]
        known = {**dataset_info_of(tokenizer), "length": self.length}
        about = [self.file_signature(), self.dealing(), self.captions]
        splits = {split: _Pictures(split, rows, example, name, rows_N.kept) for split, rows in kept.items()}
        return _Opened(rows_N, encoder, "; ".join(parts), splits, known, about)

    @staticmethod
    def codec(config: Mapping[str, Any], dataset_info: Mapping[str, Any]) -> Codec:
        draft_size, state = config.get("draft_size"), dataset_info.get("tokenizer")
        return AskedPictureCodec(limits_of(config), None, draft_size, state, dataset_info.get("length", 0))


@dataclasses.dataclass(frozen=True)
class AskedPictureCodec(PictureCodec):
    """A user's picture, and beside it in a row, what is asked of it: ``labels`` and ``templates`` to tell it apart by
    (see ``inference.zero_shot``), or a ``prompt`` to go on from (see ``tasks.captioning``).

    Attributes:
      tokenizer: ``Tokenizer.state()``.
      length: L.
    """

    tokenizer: str | None = None
    length: int = 0

    fields = Fields(
        {"image": [(name,) for name in COLUMNS]}, files=True, options=("labels", "templates", "top", "prompt")
    )

    def decode(self, given: bytes | str | Mapping[str, Any]) -> list[Example]:
        """``image`` and ``prompt``; raises as ``PictureCodec.decode``, and for a prompt that is no text."""
        asked = given.get("prompt", "") if isinstance(given, Mapping) else ""
        if not isinstance(asked, str):
            raise UserError(f"prompt is {type(asked).__name__}, not text.")
        examples = super().decode(given)
        if self.tokenizer is None:
            return examples
        tokenizer = load(self.tokenizer)
        prompt = prompt_of(tokenizer, encode(tokenizer, checked(asked, "the prompt")) if asked else (), self.length)
        return [{**example, "prompt": prompt} for example in examples]


def prompt_of(tokenizer: Tokenizer, text: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
    """i32[L]: what stands before a text, and its tokens, cut so that one of an answer has room; -1 behind them.

    Where no special token stands before it, an answer of no prompt begins with the end token.
    """
    before = [token for token in tokenizer.layout(False).tokens[:1] if token >= 0]
    if not before and not len(text) and tokenizer.end is not None:
        before = [tokenizer.end]
    tokens = [*before, *text][: length - 1]
    prompt = np.full(length, -1, np.int32)
    prompt[: len(tokens)] = tokens
    return prompt


class _Pictures(Split):
    """The pictures of a split, by the names of their files."""

    def __init__(self, split: str, row_N: np.ndarray, example: Any, name: Any, kept: str):
        super().__init__(split, len(row_N), lambda index: example(int(row_N[index])), kept)
        self._row_N, self._name = row_N, name

    def name(self, index: int) -> str:
        return str(self._name(int(self._row_N[index])))


class _Opened(Opened):
    """The data, and all its captions as a catalogue, in which those are looked up that fit a picture."""

    def __init__(
        self,
        rows_N: Store,
        encoder: Encoder,
        description: str,
        splits: Mapping[str, Any],
        known: Mapping[str, Any],
        about: list[Any],
    ):
        super().__init__(splits, known, description, [*about, known["tokenizer"], known["length"]], about)
        self._rows_N, self._encoder = rows_N, encoder

    @functools.cached_property
    def _distinct(self) -> list[np.ndarray]:
        """The tokens of each caption, once."""
        pieces = np.split(self._rows_N.values("tokens").astype(np.int32), np.cumsum(self._rows_N.values("sizes"))[:-1])
        return list({piece.tobytes(): piece for piece in pieces}.values())

    @functools.cached_property
    def item_names(self) -> list[str]:
        """The captions, as the tokenizer has them."""
        tokenizer = tokenizer_of(self._rows_N)
        return [tokenizer.decode(piece) for piece in self._distinct]

    def items(self, number_n: np.ndarray) -> dict[str, np.ndarray]:
        """``tokens`` and ``segment_ids`` i32[n,L] of captions, which count from 1."""
        made = [self._encoder([self._distinct[number - 1]])[0] for number in number_n]
        return {name: np.stack([example[name] for example in made]) for name in ("tokens", "segment_ids")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionedPictures(Captions):
    """Pictures with captions in files.

    What ``root`` may be, a folder or an archive (zip, tar):

    - a table (CSV, JSON lines, Parquet, ...), or a folder with some, with a row for each caption, or for each picture
      and a list of its captions: the picture's file, or its bytes; the caption; where there is one, ``question``, which
      it answers, and ``split``. Such are Flickr8k's ``captions.txt``, and what ``datasets`` wrote;
    - COCO's captions (``{"images": [...], "annotations": [...]}``) and Karpathy's splits (``"sentences"``);
    - Flickr8k's ``*.token.txt``, in lines ``PICTURE#0``, a tab, and the caption;
    - ``NAME.txt`` beside each picture, with a caption in each line.

    A file that a row names is looked for beside the table and then, by its name, anywhere below the root. Files that
    are called after splits (``captions_train2017.json``) keep them, and so do those in such folders.

    Attributes:
      root: see above.
      picture, caption: columns of a table; None: the usual names.
      encoding: of tables and texts.
      draft_size: see ``image.decode``.
      limits: of reading.
    """

    root: str
    picture: str | None = None
    caption: str | None = None
    encoding: str = "utf-8"
    draft_size: int | None = None
    limits: Limits = LIMITS

    def origin(self) -> str:
        return self.root

    @functools.cached_property
    def _found(self) -> tuple[dict[str, File], list[File], dict[str, list[str]]]:
        """The pictures by name, what may say something of them, and their names by that of the file alone."""
        kinds = SUFFIXES | TABLES | PLAIN
        only, path = None, self.root
        if not is_archive(path) and os.path.isfile(path := existing(path, "file or folder")):
            only, path = os.path.basename(path), os.path.dirname(os.path.abspath(path))
        listed = files_of(path, kinds, self.limits)
        pictures = {file.name: file for file in listed if kind_of(file.name) in SUFFIXES}
        by_name: dict[str, list[str]] = {}
        for name in pictures:
            by_name.setdefault(os.path.basename(name), []).append(name)
        said = [file for file in listed if kind_of(file.name) not in SUFFIXES and only in (None, file.name)]
        return pictures, said, by_name

    def file_signature(self) -> list[Any]:
        pictures, said, _ = self._found
        files = [file.file_signature for file in (*pictures.values(), *said)]
        return [files, self.picture, self.caption, self.encoding, self.draft_size]

    def image(self, name: str, data: bytes) -> np.ndarray:
        if not data:
            return decode(self._found[0][name], self.draft_size, self.limits)
        try:
            return decode(data, self.draft_size, self.limits)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    def notes(self) -> list[str]:
        missing: Counter[str] = self._missing
        return (
            [f"{len(missing):,} pictures that are not there left out, such as {next(iter(missing))}"] if missing else []
        )

    @functools.cached_property
    def _missing(self) -> Counter[str]:
        return Counter()

    def pictures(self) -> Iterator[Captioned]:
        """
        Raises:
          UserError: nothing says what is on the pictures, or none that are named are there.
        """
        pictures, said, _ = self._found
        self._missing.clear()
        there = 0
        for picture in self._of_files(said):
            if not picture.data and picture.name not in pictures:
                self._missing[picture.name] += 1
                continue
            there += 1
            yield picture
        if not there and self._missing:
            raise UserError(
                f"{self.root} has none of the {len(self._missing):,} pictures that its captions name, such as"
                f" {next(iter(self._missing))}; put them below it."
            )

    def _of_files(self, said: Sequence[File]) -> Iterator[Captioned]:
        pictures = self._found[0]
        tables = [file for file in said if kind_of(file.name) in TABLES]
        texts = {os.path.splitext(file.name)[0]: file for file in said if kind_of(file.name) in PLAIN}
        beside = {name: texts[stem] for name in pictures if (stem := os.path.splitext(name)[0]) in texts}
        for file in tables:
            yield from (
                self._of_json(file) if kind_of(file.name) == ".json" else self._of_rows(rows(file, self.encoding))
            )
        if tables:
            return
        for name, file in beside.items():
            lines = [checked(line, f"{file}") for _, line in lines_of(file, self.encoding)]
            yield Captioned(name, [line for line in lines if line.strip()] or [""], _split_of(name))
        if beside:
            return
        for file in texts.values():
            with text_of(file, self.encoding) as text:
                first = text.readline(file.limits.most_text)
            if "#" in first.partition("\t")[0]:
                yield from self._of_tokens(file)
            elif delimiter(file, self.encoding) is None:  # Flickr8k's captions.txt is divided by commas
                as_csv = file._replace(name=os.path.splitext(file.name)[0] + ".csv")
                yield from self._of_rows(rows(as_csv, self.encoding))
            else:
                yield from self._of_rows(rows(file, self.encoding))
        if not texts:
            raise UserError(
                f"{self.root} has {len(pictures):,} pictures and nothing that says what is on them: a table with the"
                " columns image and caption, COCO's captions, or NAME.txt beside each."
            )

    def _of_tokens(self, file: File) -> Iterator[Captioned]:
        for number, line in lines_of(file, self.encoding):
            name, _, text = line.strip().partition("\t")
            if name:
                where = f"{file}, line {number}"
                yield Captioned(self._file(name.partition("#")[0], where, file), [checked(text, where)])

    def _of_json(self, file: File) -> Iterator[Captioned]:
        refuse_permission(file.limits, str(file))
        for number, value in json_values(file, self.encoding):
            where = f"{file}, record {number}"
            if not isinstance(value, Mapping):
                raise UserError(f"{where} is {type(value).__name__}, not an object with names.")
            images, notes = value.get("images"), value.get("annotations")
            if not isinstance(images, list):
                yield from self._of_rows([Row(number, value, file)])
            elif not isinstance(notes, list):  # Karpathy & Fei-Fei 2015
                yield from self._of_rows(Row(n, _object(row, f"{file}, images"), file) for n, row in enumerate(images))
            else:
                named = {}
                for row in images:
                    row = _object(row, f"{file}, images")
                    named[row.get("id")] = str(row.get("file_name"))
                for n, row in enumerate(notes):
                    row, where = _object(row, f"{file}, annotations"), f"{file}, annotation {n}"
                    if row.get("image_id") not in named:
                        raise UserError(
                            f"{where} is of the picture {row.get('image_id')!r}, which is not among images."
                        )
                    texts = _texts(row.get("caption"), where)
                    yield Captioned(self._file(named[row["image_id"]], where, file), texts, _split_of(file.name))

    def _of_rows(self, given: Any) -> Iterator[Captioned]:
        for row in given:
            picture = row.values[self._column(row, self.picture, _NAMES)]
            texts = _texts(row.values[self._column(row, self.caption, TEXTS)], row.where)
            split = row.values.get("split")
            split = _split_of(str(split or "")) or _split_of(row.file.name)
            if isinstance(picture, Mapping) and isinstance(picture.get("bytes"), bytes):  # as ``datasets`` has it
                picture = picture["bytes"]
            elif isinstance(picture, Mapping):
                picture = picture.get("path")
            question = checked(str(row.values.get("question") or ""), row.where).strip()
            if isinstance(picture, bytes):
                yield Captioned(row.where, texts, split, picture, question)
            else:
                yield Captioned(self._file(str(picture or ""), row.where, row.file), texts, split, b"", question)

    def _column(self, row: Row, given: str | None, usual: Sequence[str]) -> str:
        names = {name.strip().lower(): name for name in row.values}
        for name in usual if given is None else (given,):
            if name in row.values:
                return name
            if given is None and name in names:
                return names[name]
        wanted = given or usual[0]
        raise UserError(f"{row.where} has no column {wanted!r}.{suggest(wanted, row.values, 'column')}")

    def _file(self, path: str, where: str, table: File) -> str:
        """The picture below the root that a path means; one that is not there keeps its name.

        Raises:
          UserError: it may be several, or there is no path.
        """
        pictures, _, by_name = self._found
        path = path.strip().replace("\\", "/")
        if not path:
            raise UserError(f"{where} names no picture.")
        for name in (os.path.normpath(os.path.join(os.path.dirname(table.name), path)), os.path.normpath(path)):
            if name in pictures:
                return name
        found = by_name.get(os.path.basename(path), [])
        inside = [name for name in found if f"/{name}".endswith(f"/{os.path.normpath(path)}")] or found
        if len(inside) > 1:
            raise UserError(f"{where} names {path}, which {inside[0]} and {inside[1]} may be.")
        return inside[0] if inside else path


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} holds {type(value).__name__}, and not only objects with names.")
    return value


def _texts(value: Any, where: str) -> list[str]:
    """One caption, or a list of them; raises UserError for what is neither."""
    found = []
    for text in value if isinstance(value, list | tuple | np.ndarray) else [value]:
        if isinstance(text, Mapping):
            text = next((text[name] for name in ("raw", "caption", "answer") if name in text), None)
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where} has a caption that is {type(text).__name__}, not text.")
        found.append(checked(text or "", where))
    return found


def _split_of(name: str) -> str:
    """The split that a file, or a folder that it is in, is called after: ``captions_train2017.json``."""
    for part in os.path.splitext(name)[0].split("/"):
        for word in (part, *part.split("_")):
            if (split := named_after(word)) is not None:
                return split
    return ""
