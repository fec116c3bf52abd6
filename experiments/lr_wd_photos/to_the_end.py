"""The first of the settings that ``sweep.py`` draws, each trained to its end: random search.

TRIALS=N python launch.py --config=configs/catdog.py:data=folder,root=DIR \\
    --sweep=experiments/lr_wd_photos/to_the_end.py
"""

import dataclasses
import pathlib
import runpy

from bigbase_jax.sweep import Sweep


def sweep() -> Sweep:
    same = runpy.run_path(str(pathlib.Path(__file__).with_name("sweep.py")))["sweep"]()
    return dataclasses.replace(same, pruner=None)
