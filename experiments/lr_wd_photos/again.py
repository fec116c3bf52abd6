"""What each search found best, and the recipe's own setting, with SEEDS=3 seeds each.

FOUND=runs/lr_wd_photos:runs/lr_wd_photos-to_the_end python launch.py \\
    --config=configs/catdog.py:data=folder,root=DIR --sweep=experiments/lr_wd_photos/again.py --workers=N

LIKE=at_length.py does so at the recipe's own size and length, for what that search has found.
"""

import json
import os
import pathlib
import runpy

from bigbase_jax.sweep import Sweep

SEARCHED = ("optim.learning_rate", "optim.weight_decay", "data.train_transforms")
RECIPE = {"optim.learning_rate": 1e-3, "optim.weight_decay": 0.05, "data.train_transforms": "crop_and_colour"}


def sweep() -> Sweep:
    study = runpy.run_path(str(pathlib.Path(__file__).with_name(os.environ.get("LIKE", "sweep.py"))))
    settings = [RECIPE]
    for folder in os.environ["FOUND"].split(":"):
        found = json.loads((pathlib.Path(folder) / "summary.json").read_text())["best"]
        drawn = found["overrides"]
        drawn["data.train_transforms"] = found["settings"]["data.train_transforms"]
        settings.append({key: drawn[key] for key in SEARCHED})
    settings = list({json.dumps(setting): setting for setting in settings}.values())
    transforms = {name: study["AUGMENTATIONS"][name] for name in study["AUGMENTATIONS"]}
    return Sweep(
        metric="accuracy",
        fixed=[
            {**study["SETTING"], **setting, "data.train_transforms": transforms[setting["data.train_transforms"]]}
            for setting in settings
        ],
        seeds=int(os.environ.get("SEEDS", "3")),
        seed_keys=("seed", "data.seed"),
    )
