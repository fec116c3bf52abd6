"""The command line: flags -> config -> one verb of the package.

python launch.py --config=configs/catdog.py                       train, evaluate, report
python launch.py --mode=eval --workdir=runs/catdog                restore, evaluate
python launch.py --mode=predict --workdir=runs/catdog --input=a.jpg
python launch.py --mode=report --workdir=runs/catdog

Results go to stdout, its last line being one JSON object; everything else goes to stderr. A mistake in what you asked
for is one sentence and exit status 2; an unexpected error keeps its traceback; a run stopped by a signal ends with
128 + the signal's number, and the same command goes on with it.
"""

import json
import os
import pathlib
import re
import runpy
import sys

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError

MODES = ("train", "eval", "predict", "report")
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The recipe: configs/NAME.py[:argument,...].", lock_config=True
)
_MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run folder; default: runs/ and the recipe's name.")
_STEP = flags.DEFINE_integer("step", None, "eval, predict: the checkpoint to use; default: the best, or the last.")
_SPLIT = flags.DEFINE_string("split", None, "eval: the split to evaluate; default: test, or else val.")
_INPUT = flags.DEFINE_string("input", None, "predict: a file, a folder or a quoted pattern.")


def main(_: list[str]) -> int:
    """Runs one verb; returns the exit status."""
    from bigbase_jax import verbs  # after the flags: orbax and scikit-learn take seconds to import

    mode, workdir = _MODE.value, _WORKDIR.value or ""
    if mode not in MODES:
        raise UserError(f"there is no --mode={mode}.{suggest(mode, MODES, 'mode')}")
    if mode != "train" and not workdir:
        raise UserError(f"--mode={mode} needs --workdir: the folder of the run.")
    if mode == "train":
        if _CONFIG.value is None:
            raise UserError("--config is missing; try --config=configs/catdog.py.")
        name = recipe_name(config_flags.get_config_filename(flags.FLAGS["config"]))
        result = verbs.train(_CONFIG.value, workdir or os.path.join("runs", name), name)
    elif mode == "eval":
        result = verbs.evaluate(workdir, _STEP.value, _SPLIT.value)
    elif mode == "predict":
        if _INPUT.value is None:
            raise UserError("--mode=predict needs --input: a file, a folder or a quoted pattern.")
        return verbs.predict(workdir, _INPUT.value, _STEP.value)
    else:
        result = verbs.report(workdir)
    print(json.dumps(result, ensure_ascii=False), flush=True)
    return 128 + result["signal"] if "signal" in result else 0


def recipe_name(filename: str) -> str:
    """``"configs/catdog.py:data=folder,root=/pets"`` -> ``"catdog-data-folder-root-pets"``."""
    path, _, argument = filename.partition(":")
    words = re.findall(r"\w+", argument)
    return "-".join([pathlib.Path(path).stem, *words])


def parse_flags(argv: list[str]) -> list[str]:
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


def run() -> None:
    """``main`` with the exit statuses that the module's docstring promises."""
    try:
        status = main(parse_flags(sys.argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    sys.exit(status)


if __name__ == "__main__":
    run()
