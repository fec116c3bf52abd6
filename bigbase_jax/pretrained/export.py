"""A run's model as a folder that transformers loads."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.core import Task, Variables
from bigbase_jax.pretrained.folder import save, save_tokenizer
from bigbase_jax.pretrained.provenance import recorded_origin
from bigbase_jax.pretrained.start import is_run, merged, model_of
from bigbase_jax.pretrained.tokenizers import ids
from bigbase_jax.runtime.restored import dataset_info
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.text.tokenizer import load as load_tokenizer

_PUBLISHED = ("tokenizer.json", "source.spm")


def export(run: RunDir, config: ConfigDict, task: Task, variables: Variables, output: str | os.PathLike) -> list[str]:
    """Writes the folder; adapters are merged into the model. Returns the names of its files.

    The tokenizer's files are those of the folder that the run began from, as far as it still has them, or made from the
    run's own tokenizer.

    Raises:
      UserError: transformers has no such model, or the disk refuses.
    """
    _, model = model_of(task)
    known = dataset_info(run)
    about: dict[str, Any] = {}
    if known.get("class_names"):
        about["id2label"] = {str(i): name for i, name in enumerate(known["class_names"])}
        about["label2id"] = {name: i for i, name in enumerate(known["class_names"])}
    tokenizer = _tokenizer(run, config)
    if known.get("tokenizer"):
        about |= ids(load_tokenizer(known["tokenizer"]))
    return save(output, model, merged(task, variables), tokenizer, about=about)


def write_tokenizer(folder: pathlib.Path, run: RunDir, config: ConfigDict) -> None:
    """Writes the files of a run's tokenizer, as ``export``; none where it has none."""
    if (tokenizer := _tokenizer(run, config)) is not None:
        save_tokenizer(folder, tokenizer)


def _tokenizer(run: RunDir, config: ConfigDict) -> Any:
    """A run's tokenizer, or the folder that it began from, where that still has it; None: it has none."""
    if not (state := dataset_info(run).get("tokenizer")):
        return None
    began = recorded_origin(run) or config.get("init_from")
    folder = pathlib.Path(os.path.expanduser(began or ""))
    if began and any((folder / name).is_file() for name in _PUBLISHED) and not is_run(began):
        return began
    return load_tokenizer(state)
