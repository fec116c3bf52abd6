"""Published weights: folders of Hugging Face's transformers read into our models and written from them, without torch.

``load(DIR)`` gives a model and its variables, ``save(DIR, model, variables)`` writes a folder that transformers loads.
A run begins from one with ``--config.init_from=DIR`` (``start``), and one is written by ``--mode=export``. To add a
family of models, see ``families``.
"""

from bigbase_jax.pretrained.export import export, write_tokenizer
from bigbase_jax.pretrained.folder import load, save, shapes_of
from bigbase_jax.pretrained.provenance import (
    data_of,
    missing_origin,
    record_by_sweep,
    record_origin,
    recorded_by_sweep,
    recorded_origin,
)
from bigbase_jax.pretrained.start import FROM_RECIPE, chain, initialise, part, resolve, stored

__all__ = [
    "FROM_RECIPE",
    "chain",
    "data_of",
    "export",
    "initialise",
    "load",
    "missing_origin",
    "part",
    "record_by_sweep",
    "record_origin",
    "recorded_by_sweep",
    "recorded_origin",
    "resolve",
    "save",
    "shapes_of",
    "stored",
    "write_tokenizer",
]
