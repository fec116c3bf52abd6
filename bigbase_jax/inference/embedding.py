"""``--mode=embed``: a vector for each text, by a run's model or a published one; or for what a run compares by vectors;
or for each picture or text, by the towers of CLIP.

What is averaged is as sentence-transformers (Reimers & Gurevych 2019) reads a folder of theirs: ``modules.json``,
``1_Pooling/config.json`` and ``sentence_bert_config.json``.

Axes: B texts of a batch, L length, D width of the vectors.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, BinaryIO, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, Example, UserError, Variables
from bigbase_jax.data.files import limits_of
from bigbase_jax.data.sources.image.captions import TEXTS
from bigbase_jax.data.sources.text.labelled_text import LabelledText
from bigbase_jax.inference.predictor import Predictor, Reading
from bigbase_jax.inference.published import LENGTH, tokenizer_of
from bigbase_jax.pretrained import load, schema
from bigbase_jax.pretrained.folder import describe
from bigbase_jax.pretrained.start import is_run, merged, model_of
from bigbase_jax.runtime.untrusted import parse_json, read_object, read_regular
from bigbase_jax.tasks.text_classification import VECTORS, TextClassification, pool_of
from bigbase_jax.tasks.textual import headless, hidden
from bigbase_jax.text.tokenizer import dataset_info_of

_POOLING: schema.Schema = {f"pooling_mode_{name}": schema.FLAG for name in VECTORS}


@dataclasses.dataclass(frozen=True)
class Embedding:
    """The part of a task that gives a vector for each text.

    Attributes:
      model: gives hidden vectors (``textual.headless``).
      pools: names of ``VECTORS``, whose vectors are joined.
      normalize: whether vectors have length 1.
    """

    model: Any
    pools: tuple[str, ...]
    normalize: bool = False

    inputs: ClassVar[tuple[str, ...]] = TextClassification.inputs

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``vector`` f32[B,D]."""
        y_BLD = hidden(self.model, variables, inputs)
        real_BL = (jnp.asarray(inputs["segment_ids"]) > 0).astype(jnp.float32)
        vector_BD = jnp.concatenate([VECTORS[name](y_BLD, real_BL) for name in self.pools], -1)
        norm_B1 = jnp.linalg.norm(vector_BD, axis=-1, keepdims=True)
        return {"vector": vector_BD / jnp.maximum(norm_B1, 1e-12) if self.normalize else vector_BD}

    def postprocess(self, output: Mapping[str, np.ndarray], example: Example) -> dict[str, Any]:
        """The ``vector``."""
        return {"vector": output["vector"].tolist()}


@dataclasses.dataclass(frozen=True)
class _Tower(Embedding):
    """That of the texts of ``model``, which is a ``tasks.contrastive.Contrastive``."""

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "segment_ids")

    def predict(self, variables: Variables, inputs: Batch) -> Mapping[str, jax.Array]:
        """``vector`` f32[B,D]."""
        return {"vector": self.model.items(variables, inputs)}


def embedder(
    folder: str | os.PathLike, step: int | None = None, run: Predictor | None = None, texts: bool = True
) -> Predictor:
    """The model of a run (``step`` as in ``restored.restore``), or of a folder of published weights with a tokenizer,
    to give vectors; long texts are cut.

    Args:
      run: the run in the folder, where it is open already; its arrays are shared.
      texts: of a model of pictures and texts, the tower of these.

    Raises:
      UserError: it is neither, or its model does not read text.
    """
    reads: dict[str, Any] = {}
    if is_run(folder) or describe(folder)[1].get("model_type") in ("clip", "siglip"):
        run = Predictor.open(folder, step) if run is None else run
        if getattr(run.task, "compares", False):
            return run
        task, model = model_of(run.task)
        if getattr(task, "zero_shot", False):
            return _tower(run, task, texts)
        if "tokenizer" not in run.dataset_info:
            raise UserError(f"the run in {folder} reads no text and compares nothing, so that it gives no vectors.")
        variables, known = merged(run.task, run.variables), dict(run.dataset_info)
        assert run.config is not None
        reads["limits"] = run.config.data.dataset.get("limits")
        if (fields := run.reading.codec.fields) is not None:
            reads["encoding"] = fields.encoding
        embedding = Embedding(headless(model), (pool_of(task, model),))
    else:
        model, variables = load(folder)
        pools, normalize, length = _published(pathlib.Path(os.path.expanduser(folder)), model)
        embedding = Embedding(headless(model), pools, normalize)
        known = {**dataset_info_of(tokenizer_of(str(folder))), "length": length}
    known["pair"] = False
    reading = Reading(LabelledText.codec(reads, known), limits=limits_of(reads))
    spec = dict.fromkeys(embedding.inputs, jax.ShapeDtypeStruct((known["length"],), np.int32))
    whole: Any = embedding
    return Predictor(whole, variables, known, spec, lambda: reading)


def _tower(run: Predictor, task: Any, texts: bool) -> Predictor:
    if not texts:  # not what looks captions up
        return Predictor(*(getattr(run, field.name) for field in dataclasses.fields(Predictor)))
    known = {**run.dataset_info, "tokenizer": task.tokenizer, "length": task.length, "pair": False}
    codec: Any = LabelledText.codec({}, known)
    fields = codec.fields._replace(columns={"text": [(name,) for name in TEXTS]})
    reading = Reading(dataclasses.replace(codec, fields=fields, padded=()), limits=run.reading.limits)
    whole: Any = _Tower(task, ())
    spec = dict.fromkeys(_Tower.inputs, jax.ShapeDtypeStruct((task.length,), np.int32))
    return Predictor(whole, merged(run.task, run.variables), known, spec, lambda: reading)


def width_of(found: Predictor) -> int:
    """D."""
    batch = {name: jax.ShapeDtypeStruct((1, *x.shape), x.dtype) for name, x in found.spec.items()}
    return jax.eval_shape(found.task.predict, found.variables, batch)["vector"].shape[-1]


def _published(folder: pathlib.Path, model: Any) -> tuple[tuple[str, ...], bool, int]:
    """How a published folder pools, whether it normalises, and how many tokens of a text it reads.

    Raises:
      UserError: it has a module that is not known here.
    """
    length = min(getattr(model, "length", None) or LENGTH, LENGTH)
    said = _object(folder / "sentence_bert_config.json", {"max_seq_length": schema.whole(4, 1 << 20)})
    length = min(said.get("max_seq_length", length), getattr(model, "length", None) or length)
    pools: tuple[str, ...] = (pool_of(None, model),)
    normalize = False
    if (folder / "modules.json").exists():
        for module in parse_json(read_regular(folder / "modules.json", folder), folder / "modules.json"):
            kind, path = (str(module.get(key, "")) if isinstance(module, dict) else "" for key in ("type", "path"))
            kind = kind.rpartition(".")[2]
            if kind not in ("Transformer", "Pooling", "Normalize") or not re.fullmatch(r"[\w-]*", path):
                raise UserError(f"{folder}/modules.json has the module {kind or module!r}, which is not known here.")
            if kind == "Pooling":
                modes = _object(folder / path / "config.json", _POOLING)
                pools = tuple(name for name in VECTORS if modes.get(f"pooling_mode_{name}")) or pools
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
