"""Data sets of TensorFlow Datasets, read without TensorFlow: random access to prepared ArrayRecord files."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np

from bigbase_jax.build import suggest
from bigbase_jax.core import Example, Source, UserError
from bigbase_jax.data.files import named_after
from bigbase_jax.data.sources.image.image import ReadsPictures, decode
from bigbase_jax.data.sources.splits import Opened, Split, split_off

_NAME = re.compile(r"\w+(/[\w.+-]+)?(:(\d+|\*)(\.(\d+|\*)){2})?")
_READ_AHEAD = 256  # records per read of the labels


class Records(Split):
    """A ``Source`` over rows of a TFDS split, ``image`` uint8 [H, W, C] and ``label`` i32[], called such as
    ``cats_vs_dogs/train[17]`` by the row in it; pictures are decoded as those of all other sources are."""

    labels: np.ndarray

    def __init__(self, source: Any, key: str, channels: int, stem: str, rows: np.ndarray, labels: np.ndarray):
        """Rows ``rows`` of a data source whose pictures, under ``key``, come encoded; ``labels`` are those rows'."""
        self._source, self._key, self._channels, self._stem, self._rows = source, key, channels, stem, rows
        super().__init__(stem, len(rows), self._record, labels=labels, name=self._called)

    def _record(self, index: int) -> Example:
        try:
            x_HWC = decode(self._source[int(self._rows[index])][self._key])
        except UserError as error:
            raise UserError(f"{self.name(index)}: {error}") from error
        return {"image": x_HWC[..., : self._channels], "label": self.labels[index]}

    def _called(self, index: int) -> str:
        return f"{self._stem}[{self._rows[index]}]"


class Tfds(ReadsPictures, Opened):
    """A prepared data set of TensorFlow Datasets with pictures and class labels.

    Attributes:
      splits: ``image`` uint8 [H, W, C] (C is 1 where the data set says so, else 3) and ``label`` i32[] each; val, and
        where there is nothing but train also test, are split off train, seeded and stratified.
      dataset_info: ``num_classes`` and ``class_names``.
      description: full name with version, and number of pictures.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
    ):
        """Opens the data set and reads the labels.

        Args:
          name: such as "cats_vs_dogs", "cifar10" or "name/config:1.0.0".
          data_dir: where it was prepared; None: ``$TFDS_DATA_DIR`` or ~/tensorflow_datasets.
          val_fraction: share of each class of train that becomes val where there is none; 0: no val.
          test_fraction: share of each class of train that becomes test where there is nothing else; 0: no test.
          seed: of these splits.

        Raises:
          UserError: there is no such data set, it is not prepared (with the command that does it), or it is not for
            picture classification.
        """
        if not _NAME.fullmatch(name):  # "namespace:name" would fetch and run somebody's code
            raise UserError(f"{name!r} is no data set's name; it reads like cifar10, name/config or name:1.0.0.")
        import tensorflow_datasets as tfds  # half a second, for those who use it

        if data_dir is not None:
            data_dir = os.path.expanduser(data_dir)
        try:
            builder = tfds.builder(name, data_dir=data_dir)
        except tfds.core.DatasetNotFoundError as error:
            hint = suggest(name, tfds.list_builders(with_community_datasets=False), "data set")
            hint = hint if "Did you mean" in hint else " See https://www.tensorflow.org/datasets/catalog."
            raise UserError(f"TensorFlow Datasets has no {name!r}.{hint}") from error
        except (ImportError, ValueError, AssertionError) as error:
            raise UserError(f"the data set {name!r} cannot be opened: {_first_line(error)}") from error
        if not builder.is_prepared():
            raise UserError(f"{name} is not prepared in {builder.data_path}; {_how(name, data_dir)}")

        features = builder.info.features
        pictures = [key for key, value in features.items() if isinstance(value, tfds.features.Image)]
        classes = [key for key, value in features.items() if isinstance(value, tfds.features.ClassLabel)]
        keys: tuple[str, str] = (builder.info.supervised_keys or (None, None))[:2]  # type: ignore[assignment]
        if keys[0] not in pictures or keys[1] not in classes:
            if len(pictures) != 1 or len(classes) != 1:
                raise UserError(
                    f"{name} is not for picture classification: among {', '.join(features)} one must be a picture and"
                    " one a class label."
                )
            keys = (pictures[0], classes[0])
        try:
            sources = builder.as_data_source(decoders={keys[0]: tfds.decode.SkipDecoding()})
        except (NotImplementedError, ValueError) as error:
            raise UserError(
                f"{name} in {builder.data_path} is in a format without random access; delete it, or name another"
                f" data_dir, and {_how(name, data_dir)}"
            ) from error

        found = {s: (given, source) for given, source in sources.items() if (s := named_after(given, whole=True))}
        if "train" not in found:
            raise UserError(f"{name} has no split 'train'; it has: {', '.join(sources)}.")
        channels = 1 if features[keys[0]].shape[-1] == 1 else 3
        splits: dict[str, Source] = {}
        chosen_parts: list[object] = []
        for split, (given, source) in found.items():
            labels = _labels(source, keys[1])
            rows = split_off(found, None, labels, val_fraction, test_fraction, seed) if split == "train" else {}
            for part, chosen in (rows or {split: np.arange(len(labels))}).items():
                stem = f"{builder.info.name}/{given}"
                splits[part] = Records(source, keys[0], channels, stem, chosen, labels[chosen])
                chosen_parts += [part, chosen, labels[chosen]]
        names, name = tuple(features[keys[1]].names), builder.info.full_name
        sizes = sorted((split, (info.num_examples, info.num_bytes)) for split, info in builder.info.splits.items())
        super().__init__(
            {s: splits[s] for s in ("train", "val", "test") if s in splits},
            {"num_classes": len(names), "class_names": names},
            f"{sum(map(len, splits.values())):,} pictures of {len(names)} classes, {name} of TensorFlow Datasets",
            [name, sizes, *chosen_parts],
        )


def _labels(source: Any, key: str) -> np.ndarray:
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _READ_AHEAD):
        rows = range(start, min(start + _READ_AHEAD, len(source)))
        labels[start : rows.stop] = [example[key] for example in source.__getitems__(list(rows))]
    return labels


def _how(name: str, data_dir: str | None) -> str:
    where = f", data_dir={data_dir!r}" if data_dir else ""
    return (
        "with the extra [prepare] installed (pip install 'bigbase_jax[prepare]'), run once: "
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where},'
        " file_format='array_record').download_and_prepare()\""
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
