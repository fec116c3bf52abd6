"""``--mode=embed``: a vector for each text, by a run's model or a published one.

What is averaged is as sentence-transformers (Reimers & Gurevych 2019) reads a folder of theirs: ``modules.json``,
``1_Pooling/config.json`` and ``sentence_bert_config.json``.

Axes: B texts of a batch, L length, D width of the vectors.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Array, Example, Fields, UserError
from bigbase_jax.data.files import LIMITS, Limits
from bigbase_jax.data.sources.text.labelled_text import LabelledText, read_text
from bigbase_jax.inference.inputs import Input
from bigbase_jax.inference.predictor import ROWS, Predictor
from bigbase_jax.pretrained import load, schema
from bigbase_jax.pretrained.start import is_run, merged, model_of
from bigbase_jax.runtime.untrusted import parse_json, read_object, read_regular
from bigbase_jax.tasks.text_classification import headless, hidden
from bigbase_jax.text.tokenizer import TokenizerFile, dataset_info_of

_LENGTH = 512  # of a published model's texts in tokens, where nothing says less
_LEAST = 16  # tokens that a batch has room for; it is a power of two, so that few programs are compiled


def _mean(y_BLD: Array, weight_BL: Array) -> Array:
    return jnp.sum(weight_BL[..., None] * y_BLD, 1) / jnp.maximum(jnp.sum(weight_BL, 1), 1)[:, None]


POOLS: Mapping[str, Callable[[Any, Any], Any]] = {
    "cls_token": lambda y_BLD, real_BL: y_BLD[:, 0],
    "max_tokens": lambda y_BLD, real_BL: jnp.max(jnp.where(real_BL[..., None] > 0, y_BLD, -jnp.inf), 1),
    "mean_tokens": _mean,
    "mean_sqrt_len_tokens": lambda y_BLD, real_BL: _mean(y_BLD, real_BL) * jnp.sqrt(jnp.sum(real_BL, 1))[:, None],
    "weightedmean_tokens": lambda y_BLD, real_BL: _mean(y_BLD, real_BL * jnp.arange(1, real_BL.shape[1] + 1)),
    "lasttoken": lambda y_BLD, real_BL: jnp.take_along_axis(
        y_BLD, jnp.maximum(jnp.sum(real_BL, 1) - 1, 0).astype(jnp.int32)[:, None, None], 1
    )[:, 0],
}
"""What of f32[B,L,D] makes f32[B,D], by its name in ``1_Pooling/config.json``; f32[B,L] is 0 for padding. Several are
joined, in this order."""
_POOLING: schema.Schema = {f"pooling_mode_{name}": schema.FLAG for name in POOLS}


class Embedder:
    """A model that gives a vector for each text.

    Attributes:
      fields: what of a row it reads.
      limits: of reading a file.
      pools: names of ``POOLS``.
      normalize: whether vectors have length 1.
      width: D.
    """

    def __init__(self, folder: str | os.PathLike, step: int | None = None):
        """Opens a run (``step`` as in ``restored.restore``), or a folder of published weights with a tokenizer.

        Raises:
          UserError: it is neither, or its model does not read text.
        """
        self.limits: Limits = LIMITS
        self.normalize = False
        encoding = "utf-8"
        if is_run(folder):
            run = Predictor(folder, step)
            task, model = model_of(run.task)
            self._variables = merged(run.task, run.variables)
            if "tokenizer" not in run.dataset_info:
                raise UserError(f"the run in {folder} reads no text, of which there could be vectors.")
            self._facts: Mapping[str, Any] = {**run.dataset_info, "pair": False}
            self.limits, encoding = run.limits, self._facts.get("encoding", encoding)
            causal = hasattr(model, "decode")
            pool = getattr(task, "pool", None) or ("last" if causal else "mean")
            self.pools = ["lasttoken" if pool == "last" else "mean_tokens"]
            self._model = headless(model)
        else:
            model, self._variables = load(folder)
            self._model = headless(model)
            self.pools, self.normalize, length = _published(pathlib.Path(os.path.expanduser(folder)), model)
            tokenizer = TokenizerFile(str(folder)).fit(lambda: iter(()), lambda: iter(()), False)
            self._facts = {**dataset_info_of(tokenizer), "pair": False, "length": length}
        self.fields: Fields = LabelledText.codec({"encoding": encoding}, {"pair": False}).fields  # type: ignore[assignment]
        spec = {
            name: jax.ShapeDtypeStruct((1, _LEAST), jnp.int32) for name in ("tokens", "segment_ids", "token_type_ids")
        }
        self.width: int = jax.eval_shape(self._compute, self._variables, spec).shape[-1]

    def vectors(self, inputs: Iterable[Input]) -> Iterator[tuple[Input, np.ndarray | UserError]]:
        """Each input, lazily and in order, with its vector, f32[D], or why there is none. Long texts are cut."""
        compiled = jax.jit(self._compute)
        waiting = iter(inputs)
        while some := list(itertools.islice(waiting, ROWS)):
            read = [self._read(item) for item in some]
            examples = [found for found in read if not isinstance(found, UserError)]
            if examples:
                longest = max(int(example["segment_ids"].sum()) for example in examples)
                size = min(max(_LEAST, 1 << (longest - 1).bit_length()), len(examples[0]["tokens"]))
                padded = [*examples, *[examples[-1]] * (ROWS - len(examples))]
                batch = {name: np.stack([example[name][:size] for example in padded]) for name in padded[0]}
                vector_BD = iter(np.asarray(compiled(self._variables, batch)))
            for item, found in zip(some, read, strict=True):
                yield item, found if isinstance(found, UserError) else next(vector_BD)

    def _read(self, item: Input) -> Example | UserError:
        try:
            return UserError(item.error) if item.error else read_text(item.given, self._facts, self.limits)
        except UserError as error:
            return error

    def _compute(self, variables: Any, batch: Mapping[str, Array]) -> Array:
        y_BLD = hidden(self._model, variables, batch)
        real_BL = (jnp.asarray(batch["segment_ids"]) > 0).astype(jnp.float32)
        vector_BD = jnp.concatenate([POOLS[name](y_BLD, real_BL) for name in self.pools], -1)
        norm_B1 = jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)
        return vector_BD / jnp.maximum(norm_B1, 1e-12) if self.normalize else vector_BD


def _published(folder: pathlib.Path, model: Any) -> tuple[list[str], bool, int]:
    """How a published folder pools, whether it normalises, and how many tokens of a text it reads.

    Raises:
      UserError: it has a module that is not known here.
    """
    length = min(getattr(model, "length", None) or _LENGTH, _LENGTH)
    said = _object(folder / "sentence_bert_config.json", {"max_seq_length": schema.whole(4, 1 << 20)})
    length = min(said.get("max_seq_length", length), getattr(model, "length", None) or length)
    pools, normalize = ["lasttoken" if hasattr(model, "decode") else "mean_tokens"], False
    if (folder / "modules.json").exists():
        for module in parse_json(read_regular(folder / "modules.json", folder), folder / "modules.json"):
            kind, path = (str(module.get(key, "")) if isinstance(module, dict) else "" for key in ("type", "path"))
            kind = kind.rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize") or not re.fullmatch(r"[\w-]*", path):
                raise UserError(f"{folder}/modules.json has the module {kind or module!r}, which is not known here.")
            if kind == "Pooling":
                modes = _object(folder / path / "config.json", _POOLING)
                pools = [name for name in POOLS if modes.get(f"pooling_mode_{name}")] or pools
            normalize = kind == "Normalize"
    return pools, normalize, length


def _object(path: pathlib.Path, kinds: schema.Schema) -> dict[str, Any]:
    """What a file says of some keys; nothing where there is no file."""
    try:
        return schema.check(read_object(path), kinds, str(path))
    except FileNotFoundError:
        return {}


class Vectors:
    """A ``.npy`` file of f32[N,D], written row by row: ``with Vectors(file, D) as add: add(vector)``."""

    def __init__(self, file: BinaryIO, width: int):
        self._file, self._shape = file, (0, width)

    def __enter__(self) -> Vectors:
        self._header()
        return self

    def __call__(self, vector_D: np.ndarray) -> None:
        """Adds a row."""
        self._file.write(np.asarray(vector_D, "<f4").tobytes())
        self._shape = (self._shape[0] + 1, self._shape[1])

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._header()  # NumPy pads it, so that it may grow

    def _header(self) -> None:
        np.lib.format.write_array_header_1_0(self._file, {"descr": "<f4", "fortran_order": False, "shape": self._shape})
