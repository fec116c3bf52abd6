"""Where things are in pictures: FCOS, RT-DETR or DETR, from a folder with boxes in any of the usual formats.

python launch.py --config=configs/detect.py                                     synthetic scenes of shapes
python launch.py --config=configs/detect.py:root=DIR                            VOC, COCO, YOLO or a table of boxes
python launch.py --config=configs/detect.py:root=DIR,size=480,backbone=...               of a run, or published
python launch.py --config=configs/detect.py:model=rt_detr                       a set of objects, without suppression
python launch.py --mode=predict --workdir=runs/detect --input='*.jpg' --output=drawn

The backbone is a fresh ResNet-18 of ``width`` channels (64 as published), or what a run of classification or a folder
of published weights holds. Of COCO's measures, ``map50`` is the mean average precision at an IoU of 0.5.

FCOS says what is at each place of a feature pyramid. RT-DETR and DETR predict a set, by as many queries as a picture
may hold ``boxes``; DETR sees the last map alone, and takes many more epochs than the others.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.image.detection import DetectionFolder
from bigbase_jax.data.sources.synthetic.scenes import SyntheticScenes
from bigbase_jax.data.transforms import boxes as B
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.detr import DETR
from bigbase_jax.models.fcos import FCOS
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.rt_detr import RTDETR
from bigbase_jax.optim import Optimizer
from bigbase_jax.pretrained.start import part
from bigbase_jax.tasks.dense_detection import DenseDetection
from bigbase_jax.tasks.set_prediction import SetPrediction
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: model=fcos|rt_detr|detr, root=DIR_OR_ARCHIVE, size=320 (of the longer side), aspect=1.0 (height /
    width), width=32, backbone=RUN_OR_FOLDER, epochs=60, batch=8, boxes=100 (of a picture at most), vertical=0.0 (how
    often top and bottom are exchanged), convention=xyxy|xywh|cxcywh (of a table), tiny."""
    args = parse_arg(
        arg,
        model="fcos",
        root=None,
        size=320,
        aspect=1.0,
        width=32,
        backbone=None,
        epochs=60.0,
        batch=8,
        boxes=100,
        vertical=0.0,
        convention=None,
        tiny=False,
    )
    if args.root:
        dataset = target(DetectionFolder, root=args.root, most_boxes=args.boxes, convention=args.convention)
    else:
        few = {"size": 64, "num_train": 32, "num_val": 8, "num_test": 8} if args.tiny else {}
        dataset = target(SyntheticScenes, **few)
    most = args.boxes if args.root else 8
    side = 64 if args.tiny else args.size if args.root else 128
    size = (32 * round(side * args.aspect / 32), 32 * round(side / 32))

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.init_parts = {"backbone": args.backbone}
    config.data = target(
        Data,
        dataset=dataset,
        batch_size=4 if args.tiny else args.batch,
        eval_batch_size=8 if args.tiny else 16,
        train_transforms=(
            target(B.RandomView, size=size, vertical=args.vertical),
            target(T.ColorJitter, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.02),
            target(B.PadBoxes, most=most),
        ),
        eval_transforms=(target(B.Letterbox, size=size), target(B.PadBoxes, most=most)),
    )
    backbone = target(ResNet, depth=18, width=4 if args.tiny else args.width, zero_init=True)
    if args.backbone:
        backbone, _ = part(args.backbone)
    width, rate = 16 if args.tiny else 2 * args.width, 5e-4
    decoder = {"heads": 4, "mlp_dim": 2 * width, "decoder_depth": 2 if args.tiny else 3, "queries": args.boxes}
    if args.model == "rt_detr":
        encoder = {"encoder_heads": 4, "encoder_mlp_dim": 2 * width}
        config.task = target(SetPrediction, model=target(RTDETR, backbone=backbone, width=width, **encoder, **decoder))
    elif args.model == "detr":
        config.task = target(SetPrediction, model=target(DETR, backbone=backbone, width=width, depth=2, **decoder))
    elif args.model == "fcos":
        rate = 2e-3
        small = {"width": 8, "depth": 1, "groups": 2} if args.tiny else {"width": width, "depth": 2, "groups": 8}
        # of a ResNet for CIFAR only the last map, at stride 4, is coarse enough
        levels = {"levels": 1, "coarser": 3} if backbone.target.endswith(":CifarResNet") else {"levels": 3}
        config.task = target(DenseDetection, model=target(FCOS, backbone=backbone, **levels, **small))
    else:
        raise UserError(f"there is no model={args.model}.{suggest(args.model, ('fcos', 'rt_detr', 'detr'), 'model')}")
    config.optim = target(
        Optimizer,
        learning_rate=rate,
        algorithm=deferred(optax.adamw),
        schedule=deferred(optax.cosine_decay_schedule),
        warmup=0.05,
        weight_decay=0.02,
        clip_norm=10.0,
    )
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, eval_every=4, ema_decay=0.9)
    else:
        epochs = args.epochs if args.root else 10.0
        config.train = target(TrainConfig, epochs=epochs, log_every=25, eval_every=500, ema_decay=0.998)
    return config
