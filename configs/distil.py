"""A small model learns from a large one (distillation): any recipe's data and model, taught by a run or weights.

python launch.py --config=configs/distil.py --config.teacher=runs/catdog              drawn cats and dogs
python launch.py --config=configs/distil.py:root=DIR --config.teacher=RUN_OR_FOLDER    photos: see configs/catdog.py
python launch.py --config=configs/distil.py:recipe=text_classify,root=FILE --config.teacher=RUN
python launch.py --config=configs/distil.py:recipe=lm,data=text,root=FILE --config.teacher=RUN_OR_FOLDER
python launch.py --config=configs/distil.py:recipe=translate,root=DIR,source=en,target=de --config.teacher=RUN

The student is what configs/RECIPE.py trains with the other arguments; without a recipe=, that is a ConvNet of half the
widths of configs/catdog.py's, a quarter of its parameters. What it reads is that recipe's, but for the tokenizer, which
is the teacher's. The teacher is never trained, and the student does not need it once it is trained.

--config.task.weight=1 --config.train.epochs=100 with augment=mixup is "function matching" (Beyer et al. 2022): labels
are not read, and both see the same crops and mixtures. --config.task.hidden_weight=1 compares transformers inside.
--config.task.divergence=reverse suits language models. For translation, Kim & Rush (2016) let the student learn what
the teacher writes: --mode=predict --workdir=TEACHER --input=train.tsv --output=taught.tsv, and then
--config=configs/translate.py:root=taught.tsv,source=en,target=translation.

Measured on two cores of an AMD EPYC (experiments/compress): SST-2, recipe=text_classify,root=DIR,length=40,vocab=8192
with --config.task.task.model.width=40 --config.train.epochs=8, a quarter of its teacher's parameters: 80.1 % of the
test sentences (three seeds) in 69 core-seconds; the teachers (experiments/sst2) have 79.6 %, the student alone 79.5 %.
"""

import pathlib
import re
import runpy

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from bigbase_jax.build import suggest, target
from bigbase_jax.core import UserError
from bigbase_jax.inference.teacher import Teacher
from bigbase_jax.wrappers.distil import Distil


def get_config(arg: str | None = None) -> ConfigDict:
    """``arg``: recipe=catdog|text_classify|lm|translate|..., and the arguments of that recipe; tiny."""
    words = re.split(r"(?<!\\),", arg) if arg else []
    named = [word.partition("=")[2].strip() for word in words if word.strip().startswith("recipe=")]
    words = [word for word in words if not word.strip().startswith("recipe=")]
    if not named and any(word.strip().startswith("root=") for word in words):
        words += [] if any(word.strip().startswith("data=") for word in words) else ["data=folder"]
    here = pathlib.Path(__file__)
    recipes = [path.stem for path in here.parent.glob("*.py") if path != here]
    name = named[-1] if named else "catdog"
    if name not in recipes:
        raise UserError(f"there is no recipe={name}.{suggest(name, recipes, 'recipe')}")

    config: ConfigDict = runpy.run_path(str(here.with_name(f"{name}.py")))["get_config"](",".join(words))
    config.teacher = placeholder(str)
    if not named and "stages" in config.task.get("task", config.task).model:
        model = config.task.get("task", config.task).model
        model.stages = tuple(max(width // 2, 4) for width in model.stages)
    config.task = target(Distil, task=config.task, teacher=target(Teacher, path=config.get_ref("teacher")))
    return config
