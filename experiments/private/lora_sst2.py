"""LoRA with differential privacy: SST-2's training sentences are private, what BERT has read before is not.

python experiments/private/lora_sst2.py 3 BASE DIR WORKDIR        to epsilon 3 at delta 1e-5, for one sentence
python experiments/private/lora_sst2.py none BASE DIR WORKDIR     the same model, passes and rate without privacy

BASE is a run of configs/bert.py or a folder of published weights, DIR is SST-2's. It is the recipe
configs/text_classify.py with adapt=lora, whose batches become Poisson samples.
"""

import pathlib
import runpy
import sys

from bigbase_jax.build import target
from bigbase_jax.verbs import train
from bigbase_jax.wrappers.private import Private

RECIPE = pathlib.Path(__file__).resolve().parents[2] / "configs/text_classify.py"
MEAN, ROWS, PASSES = 1024, 1136, 15.0


def main(epsilon: str, base: str, folder: str, workdir: str) -> None:
    config = runpy.run_path(str(RECIPE))["get_config"](f"root={folder},length=40,adapt=lora")
    config.init_from = base
    config.data.batch_size = MEAN
    config.train.epochs, config.train.best_metric = PASSES, None
    config.optim.learning_rate = 1e-3
    if epsilon != "none":
        config.data.batch_size, config.data.poisson = ROWS, float(MEAN)
        config.train.microbatches = 4
        config.task = target(Private, task=config.task, clip=0.5, epsilon=float(epsilon), delta=1e-5)
    print(train(config, workdir))


if __name__ == "__main__":
    main(*sys.argv[1:])
