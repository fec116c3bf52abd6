"""Published weights: folders of Hugging Face's transformers read into our models and written from them, without torch.

``load(DIR)`` gives a model and its variables, ``save(DIR, model, variables)`` writes a folder that transformers loads.
A run begins from one with ``--config.init_from=DIR`` (``start``), and one is written by ``--mode=export``. To add a
family of models, see ``families``.
"""

from bigbase_jax.pretrained.export import export
from bigbase_jax.pretrained.folder import load, save
from bigbase_jax.pretrained.provenance import absent, data_of, keep, keep_by_sweep, kept, kept_by_sweep
from bigbase_jax.pretrained.start import KEPT, chain, initialise, resolve

__all__ = [
    "KEPT",
    "absent",
    "chain",
    "data_of",
    "export",
    "initialise",
    "keep",
    "keep_by_sweep",
    "kept",
    "kept_by_sweep",
    "load",
    "resolve",
    "save",
]
