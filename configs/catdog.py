"""Cats or dogs: a small ResNet from scratch, on drawn pictures (no network needed) or on your own photos.

python launch.py --config=configs/catdog.py                                  5,000 pictures drawn by the program
python launch.py --config=configs/catdog.py:data=folder,root=DIR             photos: DIR/{train,test}/CLASS/*.jpg or DIR/CLASS/*.jpg
python launch.py --config=configs/catdog.py:data=tfds                        cats_vs_dogs of TensorFlow Datasets
"""

from ml_collections import ConfigDict

import optax

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.named import pictures
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.drawn import DrawnCatsAndDogs
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.train import Loop


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: data=drawn|folder|idx|npz|tfds, root=DIR, tiny."""
    args = parse_arg(arg, data="drawn", root=None, tiny=False)
    photos = args.data != "drawn"
    size = 32 if args.tiny else 128 if photos else 64

    small = {"size": 32, "num_train": 64, "num_val": 32, "num_test": 32} if args.tiny else {}
    drawn = target(DrawnCatsAndDogs, **small)

    config = ConfigDict()
    config.seed = 0
    config.data = target(
        Data,
        dataset=pictures(args.data, args.root, drawn, "cats_vs_dogs"),
        batch_size=16 if args.tiny else 64,
        train_transforms=(
            target(T.Resize, size=size),
            target(T.RandomResizedCrop, size=size, scale=(0.5, 1.0)),
            target(T.RandomFlip),
        ),
        eval_transforms=(target(T.Resize, size=size), target(T.CenterCrop, size=size)),
    )
    config.task = target(
        Classification,
        model=target(ResNet, num_classes=None, depth=18, width=8 if args.tiny else 16, stem="imagenet"),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )
    config.optim = target(
        Optimizer,
        learning_rate=1e-3,
        algorithm=deferred(optax.adamw, b1=0.9),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.05,
        weight_decay=0.05,
    )
    config.train = target(Loop, steps=8, log_every=2, eval_every=4) if args.tiny else target(Loop, epochs=6, log_every=20)
    return config

