"""The perceptron of the classic exercise on cats and dogs: 100 grey pixels, two hidden layers, plain gradient descent.

python launch.py --config=configs/catdog_mlp.py                              drawn pictures
python launch.py --config=configs/catdog_mlp.py:data=folder,root=DIR         photos: DIR/{train,test}/CLASS/*.jpg

Pictures are shrunk to 10x10 grey pixels in [0, 1]: 100 inputs, hidden layers of 500 and 200, 2 outputs, all sigmoid;
half the squared error summed over the outputs; gradient descent without momentum (Rumelhart, Hinton & Williams 1986).
Softmax cross-entropy and ReLU are one argument away each:
--config.task.loss_kind=softmax, --config.task.model.activation=relu.

Measured on two cores of an AMD EPYC (experiments/pictures_on_cpu): drawn pictures, 86.4 % test accuracy in 41 seconds;
2,000 Asirra photos, 57.9 %. Training on 3,500 of the 5,000 pictures; 500 choose the best checkpoint, 1,000 test it.
"""

import optax
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import deferred, parse_arg, target
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.presets import pictures
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.mlp import MLP
from bigbase_jax.optim import Optimizer
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.train import TrainConfig


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: data=synthetic|folder|idx|npz|tfds, root=DIR, tiny."""
    args = parse_arg(arg, data="synthetic", root=None, tiny=False)
    shrink = (target(T.Resize, size=(10, 10)), target(T.Grey))

    small = {"size": 32, "num_train": 64, "num_val": 32, "num_test": 32} if args.tiny else {}
    synthetic = target(DrawnCatsAndDogs, **small)

    config = ConfigDict()
    config.seed = 0
    config.init_from = placeholder(str)
    config.data = target(
        Data,
        dataset=pictures(args.data, args.root, synthetic, "cats_vs_dogs"),
        batch_size=8 if args.tiny else 25,
        eval_batch_size=32 if args.tiny else 250,
        train_transforms=shrink,
        eval_transforms=shrink,
    )
    config.task = target(
        Classification, model=target(MLP, hidden=(500, 200), activation="sigmoid"), loss_kind="squared"
    )
    config.optim = target(Optimizer, learning_rate=0.5, algorithm=deferred(optax.sgd))
    if args.tiny:
        config.train = target(TrainConfig, steps=8, log_every=2, best_metric="accuracy")
    else:
        config.train = target(TrainConfig, epochs=100.0, log_every=700, best_metric="accuracy")
    return config
