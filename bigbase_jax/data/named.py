"""Picture data sets by the words that recipes take on the command line."""

from __future__ import annotations

from ml_collections import ConfigDict

from bigbase_jax.build import suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.folder import ImageFolder
from bigbase_jax.data.sources.idx import Idx
from bigbase_jax.data.sources.npz import Npz
from bigbase_jax.data.sources.tfds import Tfds


def pictures(
    data: str, root: str | None, embedded: ConfigDict | None, tfds: str | None, val_fraction: float = 0.1
) -> ConfigDict:
    """The config node of a picture data set.

    Args:
      data: "drawn" (``embedded``), "folder" (of pictures, at ``root``), "idx" (MNIST's format, a folder), "npz" (a
        file or folder of arrays), or "tfds" (the data set named ``tfds``, below ``root`` or TFDS's own folder).
      root: where it is.
      embedded: the node of the built-in data set, if the recipe has one.
      tfds: the recipe's data set among TensorFlow Datasets.
      val_fraction: share of the training split that becomes ``val`` where the data has none.

    Raises:
      UserError: an unknown word, or a missing ``root``.
    """
    known = [word for word in ("drawn", "folder", "idx", "npz", "tfds") if word != "drawn" or embedded is not None]
    if data not in known:
        raise UserError(f"there is no data={data}.{suggest(data, known, 'value')}")
    if data == "drawn" and embedded is not None:
        return embedded
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
