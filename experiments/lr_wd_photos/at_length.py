"""The same search at the recipe's own size and length, among stronger augmentations, by validation loss.

TRIALS=24 python launch.py --config=configs/catdog.py:data=folder,root=DIR \\
    --sweep=experiments/lr_wd_photos/at_length.py --workers=N

Two hundred photos tell accuracies apart by half points, and a loss more finely. Nine evaluations on the way, as in
``sweep.py``; a trial that is stopped early has seen a third or a ninth of the recipe's 2,812 steps.
"""

import os

import optax

from bigbase_jax.build import deferred, target
from bigbase_jax.data.transforms import image as T
from bigbase_jax.sweep import Sweep, choice, log_uniform

CROP = (target(T.Resize, size=128), target(T.RandomResizedCrop, size=96, scale=(0.4, 1.0)), target(T.RandomFlip))
AUGMENTATIONS = {
    "crop": CROP,
    "crop_and_colour": (*CROP, target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3)),  # the recipe's own
    "crop_and_trivial": (*CROP, target(T.TrivialAugment)),
}
SETTING = {
    "optim.algorithm": deferred(optax.adamw),
    "train.eval_every": 313,  # the last of nine falls on the end
}
SPACE = {
    "optim.learning_rate": log_uniform(3e-4, 1e-2),
    "optim.weight_decay": log_uniform(1e-3, 0.5),
    "data.train_transforms": choice(**AUGMENTATIONS),
    **{key: choice(same=value) for key, value in SETTING.items()},
}


def sweep() -> Sweep:
    trials = int(os.environ.get("TRIALS", "24"))
    return Sweep(metric="loss", mode="min", space=SPACE, trials=trials, sampler="random", pruner="asha")
