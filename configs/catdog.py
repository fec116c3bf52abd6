"""Cats or dogs: a small convolutional network from scratch, on drawn pictures (no download) or on your own photos.

python launch.py --config=configs/catdog.py                         5,000 pictures drawn by the program
python launch.py --config=configs/catdog.py:data=folder,root=DIR    photos: DIR/{train,test}/CLASS/*, or DIR/CLASS/*
python launch.py --config=configs/catdog.py:data=tfds               cats_vs_dogs of TensorFlow Datasets

What happens to the training pictures after a random crop and flip is chosen by augment=: "colour" (brightness, contrast
and saturation, the default), "trivial" (TrivialAugment) or "rand" (RandAugment), which change shapes too, "none"; or
"colour" and, besides, "erasing" (a random box is overwritten), "mixup" or "cutmix" (two pictures become one).
quantize=int8 (or int4, ...) trains a model that is to be quantised afterwards, sparsity=0.8 or 2:4 one whose zeros grow
(docs/compress.md).

Measured on two cores of an AMD EPYC (experiments/pictures_on_cpu): drawn pictures, 99.1 % test accuracy in about one
minute; 2,000 photos of the Asirra set, 90.8 % in 1,357 core-seconds, 12 minutes of both (AdamW in the place of Muon:
88.5 %), where textbook networks report 82-84 %.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import pictures
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.train import TrainConfig
from bigbase_jax.wrappers.mix import Mix
from bigbase_jax.wrappers.quantised import Quantised
from bigbase_jax.wrappers.sparse import Sparse


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: data=synthetic|folder|idx|npz|tfds, root=DIR, model=convnet|resnet|vit, augment=, quantize=, sparsity=,
    tiny."""
    args = parse_arg(
        arg, data="synthetic", root=None, model="convnet", augment="colour", quantize=None, sparsity=None, tiny=False
    )
    photos = args.data not in ("synthetic", "drawn")
    size = 32 if args.tiny else 96 if photos else 64
    small = {"size": 32, "num_train": 64, "num_val": 32, "num_test": 32} if args.tiny else {}
    widths = (4, 8, 8, 8) if args.tiny else (24, 48, 96, 192, 192) if photos else (16, 32, 64, 128)
    models = {
        "convnet": target(ConvNet, stages=widths, dense=0, norm=True, pool="mean"),
        "resnet": target(ResNet, depth=18, width=8 if args.tiny else 32, stem="imagenet" if photos else "cifar"),
        "vit": target(ViT, variant="Ti", patch=8, depth=2 if args.tiny else None),
    }
    if args.model not in models:
        raise UserError(f"there is no model={args.model}.{suggest(args.model, models, 'model')}")
    colour = target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3)
    augment = {
        "none": (),
        "colour": (colour,),
        "trivial": (target(T.TrivialAugment),),
        "rand": (target(T.RandAugment),),
        "erasing": (colour, target(T.RandomErasing)),
        "mixup": (colour,),
        "cutmix": (colour,),
    }
    if args.augment not in augment:
        raise UserError(f"there is no augment={args.augment}.{suggest(args.augment, augment, 'value')}")

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=pictures(args.data, args.root, target(DrawnCatsAndDogs, **small), "cats_vs_dogs"),
        batch_size=16 if args.tiny else 32,
        eval_batch_size=32 if args.tiny else 128,
        train_transforms=(
            target(T.Resize, size=size + size // 3),
            target(T.RandomResizedCrop, size=size, scale=(0.4, 1.0)),
            target(T.RandomFlip),
            *augment[args.augment],
        ),
        eval_transforms=(target(T.ResizeCenterCrop, resize=size, size=size),),
    )
    config.task = target(
        Classification,
        model=models[args.model],
        label_smoothing=0.1,
        flip_test=photos,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    if args.augment == "mixup":
        config.task = target(Mix, task=config.task, mixup_alpha=0.2)
    if args.augment == "cutmix":
        config.task = target(Mix, task=config.task, cutmix_alpha=1.0)
    if args.quantize:
        config.task = target(Quantised, task=config.task, quantize=args.quantize)
    if args.sparsity:
        config.task = target(Sparse, task=config.task, sparsity=args.sparsity)
    muon = photos and args.model == "convnet"  # not tried with the others
    config.optim = target(
        Optimizer,
        learning_rate=2e-3 if muon else 1e-3,
        algorithm=deferred(optax.contrib.muon if muon else optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.03,
        weight_decay=0.05,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.99)
    elif photos:
        config.train = target(TrainConfig, epochs=50.0, log_every=50, eval_every=280, ema_decay=0.995)
    else:
        config.train = target(TrainConfig, epochs=8.0, log_every=50, ema_decay=0.99)
    return config
