"""Reading the command line: absl's flags, with every mistake in one sentence that names the nearest right word."""

from __future__ import annotations

import os
import pathlib
import re
import runpy
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bigbase_jax.build import suggest, trust, trust_config
from bigbase_jax.core import UserError
from bigbase_jax.runtime import redact, signals

flags.DEFINE_integer(
    "step",
    None,
    "eval, predict, embed, gallery, generate, compress, export, benchmark, serve: which; default: the best one.",
)
flags.DEFINE_string("split", None, "eval, compare: the split; default: test, or else val.")
_INPUT = flags.DEFINE_string(
    "input", None, "predict, embed, gallery: files or tables, a path or pattern; generate: prompts; monitor: samples."
)
flags.DEFINE_multi_string("prompt", None, "generate: what to go on with; may be given several times.")
flags.DEFINE_string("sample", None, "generate: the words of generation.Sampling, as temperature=0.8,top_p=0.9.")
flags.DEFINE_multi_string("stop", None, "generate: a text at which to stop; may be given several times.")
flags.DEFINE_bool("chat", False, "generate: the prompt is what a user says, to be answered.")
flags.DEFINE_string(
    "adapter", None, "predict, generate: what --to=adapter wrote, on its base in --workdir; serve: NAME=FOLDER,..."
)
flags.DEFINE_string("topology", None, "plan: the devices, as v5e:4x4, v6e:16x16, h100:8 or cpu:8.")
flags.DEFINE_float("price", None, "plan: US dollars per device and hour.")
flags.DEFINE_bool("search", False, "plan: try meshes, microbatches and remat policies, fastest first.")
_SWEEP = flags.DEFINE_string("sweep", None, "train: a file that declares a search over keys of the recipe.")
_WORKERS = flags.DEFINE_integer("workers", 1, "sweep: processes on this machine, each with devices of its own.")
_STORAGE = flags.DEFINE_string(
    "sweep_storage", None, "sweep, compare: a database's URL; default: a file in the sweep's folder."
)
_TRUST = flags.DEFINE_multi_string(
    "trust", None, "A package whose code the configs of folders may name, beside ours; may be given several times."
)
_INDEX = flags.DEFINE_integer("sweep_index", None, "sweep: run this trial alone, as one of an array of jobs.")
flags.DEFINE_string(
    "prune", None, "compress: heads=0.25,mlp=0.5,layers=0.5 or channels=0.5 for less; 0.8 or 2:4 for zeros."
)
flags.DEFINE_integer("calibrate", None, "compress, export: examples of the training data to measure on; default: 256.")
flags.DEFINE_string(
    "output",
    None,
    "predict: .csv, .tsv, .jsonl, .parquet, or a folder for the files that a model makes, such as sounds; embed: .npy; "
    "compress, export, compare: a folder; monitor: a page.",
)
flags.DEFINE_string("to", "safetensors", "export: stablehlo, onnx, safetensors, adapter.")
flags.DEFINE_list("platforms", None, "export: of StableHLO: cpu, cuda, rocm, tpu; default: the one here.")
flags.DEFINE_list("batch", ["1", "8", "32"], "benchmark: numbers of rows.")
flags.DEFINE_string(
    "quantize",
    None,
    "export: to int8, where the format can; compress: int8, int8_weights, int4 or fp8, as int8,except=head.",
)
flags.DEFINE_bool("sensitivity", False, "compress: only say what quantising each layer would cost.")
flags.DEFINE_float("allow_drop", 0.5, "export: how many percent of the answers may differ from the run's.")
flags.DEFINE_string(
    "engine",
    "jax",
    "eval, predict, generate, benchmark, serve: jax, or onnxruntime of what --to=onnx wrote; clean: native or ray.",
)
flags.DEFINE_list(
    "answers", [], "predict, serve: evaluators of the run that have a say in its answers, as risk,reasons."
)
flags.DEFINE_integer("top", None, "predict: how many items are recommended; default: the recipe's task.top.", 1)
flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen on; 0.0.0.0: all of this machine's.")
flags.DEFINE_integer("port", 8000, "serve: the port to listen on; 0: a free one.", 0, 65535)
flags.DEFINE_integer("slots", 16, "serve: texts that a model writes at once.", 1)
flags.DEFINE_integer("places", 0, "serve: tokens of a text, prompt included; 0: as many as fit.", 0)
flags.DEFINE_integer("streams", 16, "serve: recordings that a model hears while they come, at most.", 1)
flags.DEFINE_integer("max_batch", 32, "serve: examples that are computed at once, at most.", 1)
flags.DEFINE_float("max_wait_ms", 5.0, "serve: how long a request waits for others to share a batch.", 0)
flags.DEFINE_integer("max_queue", 256, "serve: inputs of a model in progress; more are refused (429).", 1)
flags.DEFINE_float("max_body_mb", 32.0, "serve: megabytes of a request, at most.", 0.001)
flags.DEFINE_float("max_seconds", 3600.0, "serve: of a recording that is transcribed.", 0.01)
flags.DEFINE_integer("max_pixels", None, "serve: of a picture; default: as the run's own limits say.", 1)
flags.DEFINE_float("timeout_s", 60.0, "serve: seconds for a request, at most.", 0.001)
flags.DEFINE_float("drain_s", 30.0, "serve: seconds that requests in progress get when the server ends.", 0)
flags.DEFINE_string("api_keys", None, "serve: a file of keys' hashes, without one of which nobody may ask.")
flags.DEFINE_string("add_key", None, "serve: make a key of this name, add it to --api_keys, print it, end.")
flags.DEFINE_float("rate", 0.0, "serve: requests per second of each key; 0: any number.", 0)
flags.DEFINE_list("cors", [], "serve: origins whose pages may ask from a browser, as https://example.org.")
flags.DEFINE_bool("log_contents", False, "serve: log the first 4 KB of each request too.")
flags.DEFINE_string("registry", None, "registry, serve, monitor: its folder.")
flags.DEFINE_string(
    "registry_storage",
    None,
    "registry, serve, monitor: a database's URL for its records; default: a file in its folder.",
)
flags.DEFINE_string(
    "do", "list", "registry: push, list, show, promote, rollback, compare or publish; gallery: list, enrol or delete."
)
flags.DEFINE_string("gallery", None, "gallery, predict: a file of people, of whom inputs show one.")
flags.DEFINE_string(
    "detector", None, "gallery, predict: a folder of MTCNN's weights; pictures are cut to the face that it finds."
)
flags.DEFINE_string("name", None, "gallery: who is enrolled, in the place of a folder's name, or deleted.")
flags.DEFINE_string("before", None, "gallery: a day; --do=delete removes what was enrolled before it.")
flags.DEFINE_multi_string(
    "model", None, "registry, serve, monitor: NAME, NAME:VERSION or NAME@ALIAS; may be given several times."
)
flags.DEFINE_string("alias", None, "registry: promote to this one, such as staging or production.")
flags.DEFINE_multi_string(
    "require", None, "registry: promote only what has accuracy>=0.98 or val.loss<0.3; may be given several times."
)
flags.DEFINE_string("why", None, "registry: the reason, kept beside who and when.")
flags.DEFINE_string("labels", None, "monitor: a CSV file of what was right: the columns request and label.")
flags.DEFINE_float("false_alarms", 0.01, "monitor: how probable an alarm may be if nothing has changed.")
flags.DEFINE_string("candidate", None, "serve: the alias of what is tried beside --model, as staging.")
flags.DEFINE_float("canary", 0.0, "serve: the share of requests that the candidate answers.")
flags.DEFINE_bool("shadow", False, "serve: the candidate computes what it does not answer, to be compared.")
flags.DEFINE_string("samples", None, "serve: a folder to keep a share of the predictions in, for monitor.")
flags.DEFINE_float("samples_share", 0.1, "serve: of the requests that are kept.")
flags.DEFINE_bool("samples_contents", False, "serve: keep answers too, not only numbers of them.")
flags.DEFINE_float("samples_mb", 1024.0, "serve: megabytes of samples, beyond which the oldest go.")
flags.DEFINE_float("samples_days", 30.0, "serve: after which samples go.")
flags.DEFINE_string("address", None, "clean: of a Ray cluster; default: one on this machine.")
flags.DEFINE_list("forget", [], "clean: ids of documents to take out of what was cleaned, or files of ids.")
flags.DEFINE_string("runs", "runs", "clean: where runs are looked for that have trained on what is forgotten.")
_VERBS = (
    *("eval", "predict", "gallery", "embed", "generate", "clean", "plan", "compare", "compress", "export", "benchmark"),
    *("serve", "monitor", "registry"),
)
_CALLED = {
    "input": "pattern",
    "answers": "answers_of",
    "sweep_storage": "storage",
    "registry_storage": "storage",
    "prompt": "prompts",
    "topology": "topology_name",
    "model": "specs",
    "gallery gallery": "path",
    "registry model": "models",
    "clean engine": "engine_name",
}
"""What a flag, or that of a verb, is called as an argument, where that is another word."""
_ANYWHERE = ("sweep_storage", "step", "split", "input")
"""What other verbs overlook."""


def words(mode: str) -> dict[str, Any]:
    """What the command line says of those arguments that a verb alone has.

    Raises:
      UserError: a flag of another verb.
    """
    found = {}
    for flag in flags.FLAGS.get_flags_for_module(__name__):
        said = _by_verb(flag)
        takers = [verb for verb in _VERBS if verb in said]
        if mode in takers:
            found[_CALLED.get(f"{mode} {flag.name}", _CALLED.get(flag.name, flag.name))] = flag.value
        elif takers and flag.present and flag.name not in _ANYWHERE:
            more = ", and --config.init_from=ADAPTER" if flag.name == "adapter" else ""
            do = f"{takers[0]} does" if len(takers) == 1 else f"{', '.join(takers[:-1])} and {takers[-1]} do"
            raise UserError(f"--mode={mode} takes no --{flag.name}; {do}{more}.")
    if mode in ("predict", "embed") and _INPUT.value is None:
        raise UserError(f"--mode={mode} needs --input: a file, a folder or a quoted pattern.")
    return found


def _by_verb(flag: flags.Flag) -> dict[str, str]:
    """What a flag's help says, by the verbs that it names (``"eval, compare: the split"``)."""
    said: dict[str, str] = {}
    verbs = ["all verbs"]
    for clause in (flag.help or "").partition(";\n")[0].removesuffix(".").split("; "):
        names, colon, text = clause.partition(": ")
        if colon and names.islower() and not names.startswith("default"):
            verbs = names.split(", ")
        for verb in verbs:
            said[verb] = f"{said[verb]}; {clause}" if verb in said else text if verb != "all verbs" else clause
    return said


def sweeping() -> dict[str, Any]:
    """What the command line says of ``sweep.command.run``'s arguments; nothing where there is no sweep.

    Raises:
      UserError: an argument of a sweep without one.
    """
    given = {"workers": _WORKERS, "sweep_storage": _STORAGE, "sweep_index": _INDEX}
    if _SWEEP.value is None:
        for name, flag in given.items():
            if flag.present:
                raise UserError(f"--{name} belongs to a sweep; give --sweep=FILE too.")
        return {}
    return {"path": _SWEEP.value, "workers": _WORKERS.value, "storage": _STORAGE.value, "index": _INDEX.value}


def ending(main: Callable[[list[str]], int]) -> Callable[[], None]:
    """``main`` as a command, which ends with the status that it returns, with 2 and a sentence for a mistake, or with a
    line and 130 after Ctrl-C."""

    def run() -> None:
        redact.receive()
        sys.excepthook = redact.print_exception
        threading.excepthook = lambda args: redact.print_exception(*args[:3])
        try:
            with signals.interruptible():
                rest = parse(sys.argv)
                trust(*(_TRUST.value or ()))
                trust_config(flags.FLAGS["config"].value)  # the user has typed its name
                status = main(rest)
        except UserError as error:
            print(redact.hide(f"error: {error}"), file=sys.stderr)
            status = 2
        except BrokenPipeError:  # who reads the answers has seen enough, such as ``head``
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = 128 + signal.SIGPIPE
        sys.exit(status)

    return run


def only(flag: str, values: Sequence[str] | None, mode: str) -> str:
    """The value of a flag that may be given several times, where a mode takes one; "" where there is none.

    Raises:
      UserError: there are several.
    """
    if values and len(values) > 1:
        raise UserError(f"--mode={mode} takes one --{flag}, not {len(values)} ({', '.join(values)}).")
    return values[0] if values else ""


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
    if {"-h", "--help"} & set(argv[1:]):
        print(f"{sys.modules['__main__'].__doc__}\n{usage()}")
        sys.exit(0)
    try:
        rest = flags.FLAGS(argv)
        _one_length()
        return rest
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        if _raised_in_a_recipe(error):
            raise  # a bug of the recipe, which keeps its traceback
        known = isinstance(error, (KeyError, AttributeError))
        said = (known and misspelt_key(argv)) or str(error.args[0] if error.args else error).strip().splitlines()[0]
        raise UserError(f"the command line does not fit: {said}") from error


def usage() -> str:
    """Every flag of the command line, below the verbs that take it."""
    groups: dict[str, list[str]] = {"all verbs": []}
    for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]) + flags.FLAGS.get_flags_for_module(__name__):
        form = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}="
        for verb, text in _by_verb(flag).items():
            lines = textwrap.wrap(text, 118, initial_indent=f"  {form:<19} ", subsequent_indent=" " * 22)
            groups.setdefault(verb, []).append("\n".join(lines))
    known = "Any key of the recipe is a flag as well: --config.train.steps=100."
    return "\n\n".join([*("\n".join([f"{verb}:", *sorted(rows)]) for verb, rows in sorted(groups.items())), known])


def _one_length() -> None:
    """Of ``train.steps`` and ``train.epochs``, the one that is given takes the place of the recipe's other."""
    if "config" not in flags.FLAGS or flags.FLAGS["config"].value is None:
        return
    flag: Any = flags.FLAGS["config"]
    given = config_flags.get_override_values(flag)
    for key, other in (("train.steps", "train.epochs"), ("train.epochs", "train.steps")):
        if given.get(key) is not None and given.get(other) is None:
            flag.value.update_from_flattened_dict({other: None})


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
