"""Perceptron, classic CNN, ResNet and vision transformer on the same photos: one trial each, of five seeds.

python launch.py --config=configs/catdog.py:data=folder,root=DIR --sweep=experiments/models_on_photos/sweep.py
"""

import optax

from bigbase_jax.build import deferred, target
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.optim import Optimizer
from bigbase_jax.sweep import Sweep, choice

SIZE, EPOCHS = 64, 12.0
PROTOCOL = {  # the same for all
    "data.train_transforms": (
        target(T.Resize, size=SIZE + SIZE // 3),
        target(T.RandomResizedCrop, size=SIZE, scale=(0.4, 1.0)),
        target(T.RandomFlip),
        target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3),
    ),
    "data.eval_transforms": (target(T.ResizeCenterCrop, resize=SIZE, size=SIZE),),
    "task.flip_test": False,
    "train.epochs": EPOCHS,
}
ADAMW = target(  # of configs/catdog.py
    Optimizer,
    learning_rate=1e-3,
    algorithm=deferred(optax.adamw),
    schedule=deferred(optax.cosine_decay_schedule),
    warmup=0.03,
    weight_decay=0.05,
)
MODELS = {
    "perceptron": target(MLP, hidden=(500, 200), activation="sigmoid"),
    "classic CNN": target(ConvNet, stages=(64, 64, 64), dense=1024, kernel_init="torch"),
    "ResNet-18": target(ResNet, depth=18, width=32, stem="imagenet"),
    "ViT": target(ViT, patch=8, width=128, depth=6, heads=4),
}
OWN = {  # of each one's recipe: how it is optimised
    "perceptron": {
        "optim": target(Optimizer, learning_rate=0.5, algorithm=deferred(optax.sgd)),
        "data.batch_size": 25,
        "task.loss_kind": "squared",
        "task.label_smoothing": 0.0,
        "train.ema_decay": None,
    },
    "classic CNN": {
        "optim": target(Optimizer, learning_rate=0.001, algorithm=deferred(optax.sgd, momentum=0.9)),
        "data.batch_size": 4,
        "task.label_smoothing": 0.0,
        "train.ema_decay": None,
    },
    "ResNet-18": {"optim": ADAMW},
    "ViT": {"optim": ADAMW},
}


def sweep() -> Sweep:
    return Sweep(
        metric="accuracy",
        space={"task.model": choice(**MODELS), **{key: choice(same=value) for key, value in PROTOCOL.items()}},
        conditional={
            "task.model": {
                name: {key: choice(own=value) for key, value in words.items()} for name, words in OWN.items()
            }
        },
        sampler="grid",
        seeds=5,
        seed_keys=("seed", "data.seed"),
    )
