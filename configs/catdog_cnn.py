"""The classic CNN of the textbooks on cats and dogs: three 3x3 convolutions, SGD with momentum, ten epochs.

python launch.py --config=configs/catdog_cnn.py                              drawn pictures
python launch.py --config=configs/catdog_cnn.py:data=folder,root=DIR         photos: DIR/{train,test}/CLASS/*.jpg

Pictures are resized to a short side of 256 and cut to the central 224, values in [0, 1]; three stages of 3x3
convolution to 64 channels, ReLU and 2x2 max-pool (224 -> 28); dense 1024, ReLU, 2 outputs. SGD 0.001, momentum 0.9,
cross-entropy, batch 4, 10 epochs. All training photos are trained on: there is no validation split.

Measured on two cores of an AMD EPYC (experiments/classic_cnn_vs_pytorch): 67.65 % test accuracy on 2,000 photos of the
Asirra set, in 26 minutes; a step takes 0.56 core-seconds with its data, PyTorch's 0.85.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import pictures
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: data=synthetic|folder|idx|npz|tfds, root=DIR, tiny."""
    args = parse_arg(arg, data="synthetic", root=None, tiny=False)
    cut = (
        target(T.ResizeCenterCrop, resize=36, size=32)
        if args.tiny
        else target(T.ResizeCenterCrop, resize=256, size=224)
    )
    stages, dense = ((4, 4, 4), 16) if args.tiny else ((64, 64, 64), 1024)

    small = {"size": 32, "num_train": 64, "num_val": 32, "num_test": 32} if args.tiny else {}
    synthetic = target(DrawnCatsAndDogs, **small)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=pictures(args.data, args.root, synthetic, "cats_vs_dogs", val_fraction=0.0),
        batch_size=8 if args.tiny else 4,
        eval_batch_size=32,
        train_transforms=(cut,),
        eval_transforms=(cut,),
    )
    config.task = target(Classification, model=target(ConvNet, stages=stages, dense=dense, kernel_init="torch"))
    config.optim = target(Optimizer, learning_rate=0.001, algorithm=deferred(optax.sgd, momentum=0.9))
    config.train = (
        target(TrainConfig, steps=8, log_every=2) if args.tiny else target(TrainConfig, epochs=10.0, log_every=100)
    )
    return config
