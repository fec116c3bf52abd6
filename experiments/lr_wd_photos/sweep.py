"""Learning rate x weight decay x augmentation of the default photo recipe, stopped early where behind (ASHA).

python launch.py --config=configs/catdog.py:data=folder,root=DIR --sweep=experiments/lr_wd_photos/sweep.py --workers=N
"""

from bigbase_jax.build import target
from bigbase_jax.data.transforms import image as T
from bigbase_jax.sweep import Sweep, choice, log_uniform

SIZE = 96
AUGMENTATIONS = {  # what is done to a training picture, from little to much
    "flip": (
        target(T.ResizeCenterCrop, resize=SIZE + SIZE // 6, size=SIZE),
        target(T.RandomFlip),
    ),
    "crop": (
        target(T.Resize, size=SIZE + SIZE // 3),
        target(T.RandomResizedCrop, size=SIZE, scale=(0.4, 1.0)),
        target(T.RandomFlip),
    ),
    "crop_and_colour": (  # the recipe's own
        target(T.Resize, size=SIZE + SIZE // 3),
        target(T.RandomResizedCrop, size=SIZE, scale=(0.4, 1.0)),
        target(T.RandomFlip),
        target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3),
    ),
}
SPACE = {
    "optim.learning_rate": log_uniform(1e-4, 1e-2),
    "optim.weight_decay": log_uniform(1e-3, 0.5),
    "data.train_transforms": choice(**AUGMENTATIONS),
}


def sweep() -> Sweep:
    return Sweep(metric="accuracy", space=SPACE, trials=24, sampler="random", pruner="asha")
