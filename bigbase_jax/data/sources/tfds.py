"""TensorFlow Datasets, read without TensorFlow: random access to prepared ArrayRecord files."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, UserError
from bigbase_jax.data.sources.image import Pictures, decode
from bigbase_jax.data.sources.splits import stratified

_NAMES = {"train": "train", "validation": "val", "val": "val", "test": "test"}


class Rows:
    """Some rows of a TFDS split; pictures are decoded here, so that a bad one is named like any other file.

    Attributes:
      labels: i32[N], or None before they are known.
    """

    def __init__(self, source: Any, rows: np.ndarray, name: str, keys: tuple[str, str]):
        self._source, self._rows, self._name, self._keys = source, rows, name, keys

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        image, label = self._keys
        example = self._source[int(self._rows[index])]
        data = example[image]
        picture = decode(data) if isinstance(data, bytes) else np.asarray(data)
        return {"image": picture, "label": np.int32(example[label])}

    def name(self, index: int) -> str:
        """``data set/split[row]``."""
        return f"{self._name}[{int(self._rows[index])}]"


class Tfds(Pictures):
    """A picture classification data set of TensorFlow Datasets, through ``tfds.data_source``.

    Attributes:
      name: such as "cats_vs_dogs" or "cifar10".
      data_dir: where it was prepared; None: TFDS's own folder.
      val_fraction, test_fraction: shares of ``train`` that become ``val`` and ``test`` where those are missing.
      seed: of the split.

    Raises:
      UserError: it is not known or not prepared (says the command), or has no image and label.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
    ):
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError) as error:
            close = suggest(name, tfds.list_builders(), "data set") if len(name) > 2 else ""
            raise UserError(f"TensorFlow Datasets has no {name!r}.{close if 'mean' in close else ''}") from error
        except ImportError as error:
            raise UserError(_how_to_prepare(name, data_dir)) from error
        try:
            raw = {"image": tfds.decode.SkipDecoding()} if "image" in (builder.info.features or {}) else None
            sources = builder.as_data_source(decoders=raw)
        except (AssertionError, FileNotFoundError, NotImplementedError, ImportError, ValueError) as error:
            raise UserError(_how_to_prepare(name, data_dir)) from error
        features = builder.info.features
        if "image" not in features or "label" not in features:
            raise UserError(f"{name} has {', '.join(features)}; this reads data sets with an image and a label.")
        keys = ("image", "label")
        found = {_NAMES[split]: source for split, source in sources.items() if split in _NAMES}
        if "train" not in found:
            raise UserError(f"{name} has no split 'train'; it has {', '.join(sources)}.")
        parts = {split: Rows(source, np.arange(len(source)), f"{name}/{split}", keys) for split, source in found.items()}
        fractions = (0.0 if "val" in found else val_fraction, 0.0 if "test" in found else test_fraction)
        # Labels would have to be read one by one; the prepared order is already shuffled, so chance stratifies well enough.
        rest, val, test = stratified(np.zeros(len(found["train"]), np.int32), fractions, seed)
        parts["train"] = Rows(found["train"], rest, f"{name}/train", keys)
        parts.update({s: Rows(found["train"], rows, f"{name}/train", keys) for s, rows in (("val", val), ("test", test)) if len(rows)})
        self.splits: Mapping[str, Rows] = {split: parts[split] for split in ("train", "val", "test") if split in parts}
        names = tuple(features["label"].names)
        self.facts: Mapping[str, Any] = {"num_classes": len(names), "class_names": names}
        self.description = f"{builder.info.full_name} of TensorFlow Datasets, {sum(map(len, parts.values())):,} pictures"
        sizes = {split: len(source) for split, source in sources.items()}
        self._identity = repr((builder.info.full_name, sizes, fractions, seed))

    def fingerprint(self) -> str:
        """Of name, version, sizes and split: prepared data sets do not change under their version."""
        return hashlib.sha256(self._identity.encode()).hexdigest()[:16]


def _how_to_prepare(name: str, data_dir: str | None) -> str:
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        f"{name} is not prepared for random access; install the extra (pip install -e '.[prepare]') and run once: "
        f"python -c \"import tensorflow_datasets as t; t.builder({name!r}{where}, file_format='array_record').download_and_prepare()\""
    )
