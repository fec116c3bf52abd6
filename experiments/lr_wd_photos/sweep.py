"""Learning rate x weight decay x augmentation of the default photo recipe, stopped early where behind (ASHA).

python launch.py --config=configs/catdog.py:data=folder,root=DIR --sweep=experiments/lr_wd_photos/sweep.py --workers=N

The recipe's network at SIZE=64 pixels for STEPS=675 (12 epochs of the study's photos), looked at nine times on the
way; TRIALS=27.
"""

import os

import optax

from bigbase_jax.build import deferred, target
from bigbase_jax.data.transforms import image as T
from bigbase_jax.sweep import Sweep, choice, log_uniform

SIZE, STEPS = int(os.environ.get("SIZE", "64")), int(os.environ.get("STEPS", "675"))
CROP = (target(T.Resize, size=SIZE + SIZE // 3), target(T.RandomResizedCrop, size=SIZE, scale=(0.4, 1.0)))
FLIP, COLOUR = target(T.RandomFlip), target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3)
AUGMENTATIONS = {  # what is done to a training picture, from little to much
    "flip": (target(T.ResizeCenterCrop, resize=SIZE, size=SIZE), FLIP),
    "crop": (*CROP, FLIP),
    "crop_and_colour": (*CROP, FLIP, COLOUR),  # the recipe's own
}
SETTING = {  # the same for all: shorter and smaller than the recipe
    "optim.algorithm": deferred(optax.adamw),
    "data.eval_transforms": (target(T.ResizeCenterCrop, resize=SIZE, size=SIZE),),
    "train.epochs": None,
    "train.steps": STEPS,
    "train.eval_every": STEPS // 9,
}
SPACE = {
    "optim.learning_rate": log_uniform(1e-4, 1e-2),
    "optim.weight_decay": log_uniform(1e-3, 0.5),
    "data.train_transforms": choice(**AUGMENTATIONS),
    **{key: choice(same=value) for key, value in SETTING.items()},
}


def sweep() -> Sweep:
    trials = int(os.environ.get("TRIALS", "27"))
    return Sweep(metric="accuracy", space=SPACE, trials=trials, sampler="random", pruner="asha")
