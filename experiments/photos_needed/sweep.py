"""From scratch and from CIFAR-10 weights, on 125 to 2,000 photos, three draws of each.

PHOTOS=OUT WEIGHTS=DATA/w_resnet_cifar10/resnet20_state_dict.npz python launch.py \\
    --config=configs/catdog.py:data=folder,root=OUT/0-2000 --sweep=experiments/photos_needed/sweep.py

PHOTOS holds what make.py wrote. A draw is a choice of photos and a seed of everything else. SIZE=pixels, STEPS=steps.
"""

import os
import pathlib

import optax

from bigbase_jax.build import deferred, target
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.resnet import CifarResNet
from bigbase_jax.sweep import Sweep, choice

SIZE, STEPS = int(os.environ.get("SIZE", "32")), int(os.environ.get("STEPS", "600"))
SETTING = {
    "optim.algorithm": deferred(optax.adamw),
    "optim.learning_rate": 1e-3,
    "task.model": target(CifarResNet, depth=20),
    "data.train_transforms": (
        target(T.Resize, size=SIZE + SIZE // 3),
        target(T.RandomResizedCrop, size=SIZE, scale=(0.4, 1.0)),
        target(T.RandomFlip),
        target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3),
    ),
    "data.eval_transforms": (target(T.ResizeCenterCrop, resize=SIZE, size=SIZE),),
    "data.batch_size": 16,
    "task.flip_test": False,
    "train.epochs": None,
    "train.steps": STEPS,
    "train.eval_every": STEPS,
    "train.ema_decay": 0.99,
}


def sweep() -> Sweep:
    names = [path.name.partition("-") for path in pathlib.Path(os.environ["PHOTOS"]).iterdir()]
    draws = {f"{draw}-{count}": draw for count, draw in sorted((int(count), int(draw)) for draw, _, count in names)}
    return Sweep(
        metric="accuracy",
        space={
            "data.dataset.root": choice(**{name: os.path.join(os.environ["PHOTOS"], name) for name in draws}),
            "init_from": choice(scratch=None, cifar10=os.environ["WEIGHTS"]),
            **{key: choice(same=value) for key, value in SETTING.items()},
        },
        conditional={
            "data.dataset.root": {
                name: {key: choice(draw=draw) for key in ("seed", "data.seed")} for name, draw in draws.items()
            }
        },
        sampler="grid",
    )
