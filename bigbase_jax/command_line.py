"""Reading the command line: absl's flags, with every mistake in one sentence that names the nearest right word."""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import traceback

from absl import app, flags
from ml_collections import ConfigDict

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError


def recipe_name(filename: str) -> str:
    """``"configs/catdog.py:data=folder,root=/pets"`` -> ``"catdog-data-folder-root-pets"``."""
    path, _, argument = filename.partition(":")
    words = re.findall(r"\w+", argument)
    return "-".join([pathlib.Path(path).stem, *words])


def parse(argv: list[str]) -> list[str]:
    """Absl's parser; a missing recipe or a misspelt key of one becomes one sentence that names the nearest."""
    for arg in argv[1:]:
        flag, _, value = arg.lstrip("-").partition("=")
        path = value.partition(":")[0]
        if flag == "config" and value and not os.path.isfile(path):
            beside = pathlib.Path(path).parent
            recipes = [str(p) for folder in (beside, pathlib.Path("configs")) for p in folder.glob("*.py")]
            raise UserError(f"there is no recipe {path!r}.{suggest(path, recipes, 'recipe')}")
    app.define_help_flags()
    try:
        return flags.FLAGS(argv)
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        if _raised_in_a_recipe(error):
            raise  # a bug of the recipe, which keeps its traceback
        known = isinstance(error, (KeyError, AttributeError))
        said = (known and misspelt_key(argv)) or str(error.args[0] if error.args else error).strip().splitlines()[0]
        raise UserError(f"the command line does not fit: {said}") from error


def misspelt_key(argv: list[str]) -> str | None:
    """The first ``--config.a.b`` whose key the recipe does not have, with the nearest one."""
    recipe = next((arg.partition("=")[2] for arg in argv if arg.lstrip("-").startswith("config=")), None)
    if recipe is None:
        return None
    path, _, argument = recipe.partition(":")
    config = runpy.run_path(path)["get_config"](argument or None)
    for arg in argv[1:]:
        dotted = arg.lstrip("-").partition("=")[0].split(".")
        node = config if dotted[0] == "config" else None
        for i, key in enumerate(dotted[1:], 1):
            if not isinstance(node, ConfigDict):
                break
            if key not in node:
                return f"{'.'.join(dotted[:i])} has no {key!r}.{suggest(key, node, 'key')}"
            node = node[key]
    return None


def _raised_in_a_recipe(error: BaseException | None) -> bool:
    """Whether the error, or what led to it, arose while a recipe's own code ran, and was not one of its sentences."""
    while error is not None:
        frames = traceback.extract_tb(error.__traceback__)
        if any(frame.name == "get_config" for frame in frames) and not isinstance(error, (UserError, flags.Error)):
            return True
        error = error.__cause__ or error.__context__
    return False
