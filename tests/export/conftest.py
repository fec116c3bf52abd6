import pathlib
import runpy

import pytest

from bigbase_jax import verbs

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


def trained(folder, recipe, scan=False, **train):
    """A run of a few steps."""
    config = runpy.run_path(str(CONFIGS / f"{recipe}.py"))["get_config"]("tiny")
    with config.unlocked():
        if scan:
            config.task.model.scan = True
        config.train.update({"steps": 2, "eval_every": 2, **train})
    verbs.train(config, str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A classifier of pictures."""
    return trained(tmp_path_factory.mktemp("pictures") / "run", "catdog")


@pytest.fixture(scope="session")
def decoder(tmp_path_factory):
    """A language model whose blocks are one stack."""
    return trained(tmp_path_factory.mktemp("decoder") / "run", "lm", scan=True)
