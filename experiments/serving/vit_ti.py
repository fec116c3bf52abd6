"""ViT-Ti/16 at 224 pixels, for load.py: its speed is measured, and so it is hardly trained.

python launch.py --config=experiments/serving/vit_ti.py --workdir=runs/serving/vit_ti
"""

import runpy

from bigbase_jax.build import target
from bigbase_jax.data.transforms import image as T
from bigbase_jax.models.vit import ViT


def get_config(arg=None):
    small = {"num_train": 16, "num_val": 16, "num_test": 16}
    config = runpy.run_path("configs/catdog.py")["get_config"]("model=vit,augment=none")
    config.data.dataset.update(small)
    config.data.update(batch_size=8, eval_batch_size=16)
    config.data.train_transforms = config.data.eval_transforms = (target(T.ResizeCenterCrop, resize=256, size=224),)
    config.task.model = target(ViT, variant="Ti", patch=16)
    config.train.epochs, config.train.steps = None, 1
    return config
