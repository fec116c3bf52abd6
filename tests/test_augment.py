"""What the picture recipes do to training pictures by ``augment=``, and ``data=`` as it was once called."""

import runpy

import numpy as np
import pytest

from bigbase_jax.build import build
from bigbase_jax.core import UserError
from bigbase_jax.data.transforms import image as T
from bigbase_jax.train import train
from bigbase_jax.wrappers.mix import Mix


def recipe(name, arg):
    return runpy.run_path(f"configs/{name}.py")["get_config"](f"tiny,{arg}")


@pytest.mark.parametrize(
    ("name", "word", "kind"),
    [
        ("catdog", "none", None),
        ("catdog", "colour", T.ColorJitter),
        ("catdog", "trivial", T.TrivialAugment),
        ("catdog", "rand", T.RandAugment),
        ("catdog", "erasing", T.RandomErasing),
        ("fashion_mnist", "none", None),
        ("fashion_mnist", "crop", T.RandomCrop),
        ("fashion_mnist", "erasing", T.RandomErasing),
    ],
)
def test_augment_adds_a_transform(name, word, kind, tmp_path):
    plain, config = recipe(name, "augment=none"), recipe(name, f"augment={word}")
    assert (
        recipe(name, "").data.train_transforms
        == recipe(name, {"catdog": "augment=colour"}.get(name, "augment=erasing")).data.train_transforms
    )
    seen = []
    for node in (plain, config):
        node.data.cache_dir = str(tmp_path)
        data = build(node.data)
        with data.prepare(lambda line: None).train_batches() as batches:
            seen.append(next(batches)["image"])
    assert kind is None or any(isinstance(t, kind) for t in data.train_transforms)
    assert seen[0].shape == seen[1].shape and (kind is None) == np.array_equal(*seen)


def test_augment_mixes_pictures_in_the_loss_alone(tmp_path):
    for name in ("catdog", "fashion_mnist"):
        mixup, cutmix = (build(recipe(name, f"augment={w}").task, {"num_classes": 2}) for w in ("mixup", "cutmix"))
        assert isinstance(mixup, Mix) and (mixup.mixup_alpha, mixup.cutmix_alpha) == (0.2, 0.0)
        assert isinstance(cutmix, Mix) and (cutmix.mixup_alpha, cutmix.cutmix_alpha) == (0.0, 1.0)
    config = recipe("fashion_mnist", "augment=mixup")
    config.task.task.model.update(stages=(4,), depths=(1,))
    config.train.update(steps=2, devices=1, writers=())
    assert 0 <= train(config, str(tmp_path))["accuracy"] <= 1


def test_words_that_recipes_know():
    assert recipe("catdog", "data=drawn") == recipe("catdog", "data=synthetic") == recipe("catdog", "")
    with pytest.raises(UserError, match=r"there is no augment=mixupp\. Did you mean 'mixup'"):
        recipe("catdog", "augment=mixupp")
    with pytest.raises(UserError, match=r"there is no data=synthetik\. Did you mean 'synthetic'"):
        recipe("catdog", "data=synthetik")
