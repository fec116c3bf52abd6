"""Recordings of which nothing else is known."""

from __future__ import annotations

import os

import numpy as np

from bigbase_jax.audio.files import SUFFIXES
from bigbase_jax.core import UserError
from bigbase_jax.data.files import existing
from bigbase_jax.data.sources.audio.audio import recordings
from bigbase_jax.data.sources.audio.labelled import LabelledAudio
from bigbase_jax.data.sources.folder import Listed
from bigbase_jax.data.sources.splits import split_off


class PlainAudio(LabelledAudio):
    """All recordings below a folder.

    Attributes:
      splits: ``audio`` i16[T] each.
      dataset_info: ``rate``.
      description: folder and recordings.
    """

    def __init__(
        self,
        root: str,
        rate: int = 16_000,
        test: str | None = None,
        val_fraction: float = 0.03,
        test_fraction: float = 0.05,
        seed: int = 0,
    ):
        """
        Args:
          root: the folder.
          rate: samples per second, to which all are resampled.
          test: files whose names (without their folders) are from this one on, by alphabet, are the test split; None:
            some are dealt.
          val_fraction, test_fraction, seed: see ``ClassFolders``.

        Raises:
          UserError: no recordings to train on.
        """
        folder = existing(root)
        listed: dict[str, list[Listed]] = {}
        for name, path in recordings(folder):
            split = "test" if test and os.path.basename(name) >= test else "train"
            status = os.stat(path)
            listed.setdefault(split, []).append(Listed(name, 0, status.st_size, status.st_mtime_ns))
        if len(train := listed.get("train", [])) < 2:
            raise UserError(f"{root} has {len(train)} recordings to train on ({' '.join(sorted(SUFFIXES))}).")
        rows = split_off(listed, [f.name for f in train], np.zeros(len(train), int), val_fraction, test_fraction, seed)
        listed |= {name: [train[i] for i in indices] for name, indices in rows.items()}
        self._open(folder, listed, rate, {})
        self.dataset_info = {"rate": rate}
        self.description = f"{sum(map(len, listed.values())):,} recordings in {root}"
