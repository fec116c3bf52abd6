"""Whose face it is: vectors by which any two photos are compared, of people that the training never saw too.

python launch.py --config=configs/faces.py                              faces drawn by the program (nobody's photos)
python launch.py --config=configs/faces.py:root=LFW                     one folder for each person; LFW's pairs are read
python launch.py --config=configs/faces.py:root=ORL,split=photos,grey   everybody enrolled by half of their photos
python launch.py --mode=gallery --workdir=runs/faces --gallery=gallery.safetensors --do=enrol --input=PEOPLE
python launch.py --mode=predict --workdir=runs/faces --gallery=gallery.safetensors --input=new.jpg

A ResNet with an additive angular margin (ArcFace; Deng et al. 2019). The cosine of two vectors is their score;
``verification`` in the results has the accuracy over the pairs of the test split, ``identification`` who is found in a
gallery of its people. Faces are biometric data: docs/faces.md says what to keep, for how long, and how to delete it.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.image.faces import Faces
from bigbase_jax.data.sources.synthetic.faces import DrawnFaces
from bigbase_jax.data.transforms import image as T
from bigbase_jax.evaluators.identification import Identification
from bigbase_jax.evaluators.verification import Verification
from bigbase_jax.models.margin import CosineHead
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.verification import FaceVerification
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: root=DIR, split=people|photos, size=96, grey, least=2 (photos of whom is trained on),
    val=0.1, test=0.2, width=32, dim=128, dropout=0.2, margin=0.2, scale=16, epochs=60, tiny."""
    args = parse_arg(
        arg,
        root=None,
        split="people",
        size=96,
        grey=False,
        least=2,
        val=0.1,
        test=0.2,
        width=32,
        dim=128,
        dropout=0.2,
        margin=0.2,
        scale=16.0,
        epochs=60.0,
        tiny=False,
    )
    size = 24 if args.tiny else args.size if args.root else 48
    few = {"size": 24, "people": 8, "val_people": 4, "test_people": 6, "photos": 4} if args.tiny else {"size": size}
    dataset = target(DrawnFaces, **few)
    if args.root:
        dataset = target(
            Faces, root=args.root, split=args.split, val_fraction=args.val, test_fraction=args.test, least=args.least
        )
    whole = size + max(size // 12, 1)  # a photo's sides, of which training looks at any part of this size
    colours = (target(T.Grey),) if args.grey else ()

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=16 if args.tiny else 64,
        eval_batch_size=16 if args.tiny else 128,
        train_transforms=(
            target(T.Resize, size=(whole, whole)),
            target(T.RandomCrop, size=size),
            target(T.RandomFlip),
            target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3),
            *colours,
        ),
        eval_transforms=(target(T.ResizeCenterCrop, resize=(whole, whole), size=(size, size)), *colours),
    )
    width, dim = (4, 16) if args.tiny else (args.width, args.dim)
    stem = "patch" if size >= 64 else "imagenet"
    config.task = target(
        FaceVerification,
        model=target(CosineHead, body=target(ResNet, num_classes=dim, width=width, stem=stem, dropout=args.dropout)),
        margin=args.margin,
        scale=args.scale,
        flip_test=True,
        mean=(0.5,),
        std=(0.25,),
    )
    if args.split == "photos":
        own = {"identification": target(Identification, gallery="train")}
    else:
        own = {"validation": target(Verification, split="val", final=False)} if args.val else {}
        own |= {
            "verification": target(Verification),
            "all_pairs": target(Verification, listed=False),
            "identification": target(Identification),
        }
    config.evaluators = ConfigDict(own)
    config.optim = target(
        Optimizer,
        learning_rate=2e-3,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.05,
        weight_decay=0.05,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.9)
    else:
        epochs = args.epochs if args.root else 12.0
        config.train = target(TrainConfig, epochs=epochs, log_every=50, eval_every=500, ema_decay=0.995)
    return config
