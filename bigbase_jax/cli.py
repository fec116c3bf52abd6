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
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from bigbase_jax.build import suggest, trust, trust_config
from bigbase_jax.core import UserError
from bigbase_jax.runtime import redact, signals

_STEP = flags.DEFINE_integer(
    "step", None, "eval, predict, embed, gallery, generate, export, benchmark, serve: which; default: the best one."
)
_SPLIT = flags.DEFINE_string("split", None, "eval, compare: the split; default: test, or else val.")
_INPUT = flags.DEFINE_string(
    "input", None, "predict, embed, gallery: files or tables, a path or pattern; generate: prompts; monitor: samples."
)
_PROMPT = flags.DEFINE_multi_string("prompt", None, "generate: what to go on with; may be given several times.")
_SAMPLE = flags.DEFINE_string(
    "sample", None, "generate: the words of generation.Sampling, as temperature=0.8,top_p=0.9."
)
_STOP = flags.DEFINE_multi_string("stop", None, "generate: a text at which to stop; may be given several times.")
_CHAT = flags.DEFINE_bool("chat", False, "generate: the prompt is what a user says, to be answered.")
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "predict, generate: what --to=adapter wrote, on its base in --workdir; serve: NAME=FOLDER,..."
)
_TOPOLOGY = flags.DEFINE_string("topology", None, "plan: the devices, as v5e:4x4, v6e:16x16, h100:8 or cpu:8.")
_PRICE = flags.DEFINE_float("price", None, "plan: US dollars per device and hour.")
_SEARCH = flags.DEFINE_bool("search", False, "plan: try meshes, microbatches and remat policies, fastest first.")
_SWEEP = flags.DEFINE_string("sweep", None, "train: a file that declares a search over keys of the recipe.")
_WORKERS = flags.DEFINE_integer("workers", 1, "sweep: processes on this machine, each with devices of its own.")
_STORAGE = flags.DEFINE_string(
    "sweep_storage", None, "sweep, compare: a database's URL; default: a file in the sweep's folder."
)
_TRUST = flags.DEFINE_multi_string(
    "trust", None, "A package whose code the configs of folders may name, beside ours; may be given several times."
)
_INDEX = flags.DEFINE_integer("sweep_index", None, "sweep: run this trial alone, as one of an array of jobs.")
_PRUNE = flags.DEFINE_string(
    "prune", None, "compress: heads=0.25,mlp=0.5,layers=0.5 or channels=0.5 for less; 0.8 or 2:4 for zeros."
)
_CALIBRATE = flags.DEFINE_integer(
    "calibrate", None, "compress, export: examples of the training data to measure on; default: 256."
)
_OUTPUT = flags.DEFINE_string(
    "output",
    None,
    "predict: .csv, .tsv, .jsonl, .parquet, or a folder for the files that a model makes, such as sounds; embed: .npy; "
    "compress, export, compare: a folder; monitor: a page.",
)
_TO = flags.DEFINE_string("to", "safetensors", "export: stablehlo, onnx, safetensors, adapter.")
_PLATFORMS = flags.DEFINE_list("platforms", None, "export: of StableHLO: cpu, cuda, rocm, tpu; default: the one here.")
_BATCH = flags.DEFINE_list("batch", ["1", "8", "32"], "benchmark: numbers of rows.")
_QUANTIZE = flags.DEFINE_string(
    "quantize",
    None,
    "export: to int8, where the format can; compress: int8, int8_weights, int4 or fp8, as int8,except=head.",
)
_SENSITIVITY = flags.DEFINE_bool("sensitivity", False, "compress: only say what quantising each layer would cost.")
_ALLOW_DROP = flags.DEFINE_float(
    "allow_drop", 0.5, "export: how many percent of the answers may differ from the run's."
)
_ENGINE = flags.DEFINE_string(
    "engine",
    "jax",
    "eval, predict, generate, benchmark, serve: jax, or onnxruntime of what --to=onnx wrote; clean: native or ray.",
)
_ANSWERS = flags.DEFINE_list(
    "answers", [], "predict, serve: evaluators of the run that have a say in its answers, as risk,reasons."
)
_TOP = flags.DEFINE_integer("top", None, "predict: how many items are recommended; default: the recipe's task.top.", 1)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: the address to listen on; 0.0.0.0: all of this machine's.")
_PORT = flags.DEFINE_integer("port", 8000, "serve: the port to listen on; 0: a free one.", 0, 65535)
_SLOTS = flags.DEFINE_integer("slots", 16, "serve: texts that a model writes at once.", 1)
_PLACES = flags.DEFINE_integer("places", 0, "serve: tokens of a text, prompt included; 0: as many as fit.", 0)
_STREAMS = flags.DEFINE_integer("streams", 16, "serve: recordings that a model hears while they come, at most.", 1)
_MAX_BATCH = flags.DEFINE_integer("max_batch", 32, "serve: examples that are computed at once, at most.", 1)
_MAX_WAIT = flags.DEFINE_float("max_wait_ms", 5.0, "serve: how long a request waits for others to share a batch.", 0)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 256, "serve: inputs of a model in progress; more are refused (429).", 1)
_MAX_BODY = flags.DEFINE_float("max_body_mb", 32.0, "serve: megabytes of a request, at most.", 0.001)
_MAX_SECONDS = flags.DEFINE_float("max_seconds", 3600.0, "serve: of a recording that is transcribed.", 0.01)
_MAX_PIXELS = flags.DEFINE_integer("max_pixels", None, "serve: of a picture; default: as the run's own limits say.", 1)
_TIMEOUT = flags.DEFINE_float("timeout_s", 60.0, "serve: seconds for a request, at most.", 0.001)
_DRAIN = flags.DEFINE_float("drain_s", 30.0, "serve: seconds that requests in progress get when the server ends.", 0)
_API_KEYS = flags.DEFINE_string("api_keys", None, "serve: a file of keys' hashes, without one of which nobody may ask.")
_ADD_KEY = flags.DEFINE_string("add_key", None, "serve: make a key of this name, add it to --api_keys, print it, end.")
_RATE = flags.DEFINE_float("rate", 0.0, "serve: requests per second of each key; 0: any number.", 0)
_CORS = flags.DEFINE_list("cors", [], "serve: origins whose pages may ask from a browser, as https://example.org.")
_LOG_CONTENTS = flags.DEFINE_bool("log_contents", False, "serve: log the first 4 KB of each request too.")
_REGISTRY = flags.DEFINE_string("registry", None, "registry, serve, monitor: its folder.")
_REGISTRY_STORAGE = flags.DEFINE_string(
    "registry_storage",
    None,
    "registry, serve, monitor: a database's URL for its records; default: a file in its folder.",
)
_DO = flags.DEFINE_string(
    "do", "list", "registry: push, list, show, promote, rollback, compare or publish; gallery: list, enrol or delete."
)
_GALLERY = flags.DEFINE_string("gallery", None, "gallery, predict: a file of people, of whom inputs show one.")
_NAME = flags.DEFINE_string("name", None, "gallery: who is enrolled, in the place of a folder's name, or deleted.")
_BEFORE = flags.DEFINE_string("before", None, "gallery: a day; --do=delete removes what was enrolled before it.")
_MODEL = flags.DEFINE_multi_string(
    "model", None, "registry, serve, monitor: NAME, NAME:VERSION or NAME@ALIAS; may be given several times."
)
_ALIAS = flags.DEFINE_string("alias", None, "registry: promote to this one, such as staging or production.")
_REQUIRE = flags.DEFINE_multi_string(
    "require", None, "registry: promote only what has accuracy>=0.98 or val.loss<0.3; may be given several times."
)
_WHY = flags.DEFINE_string("why", None, "registry: the reason, kept beside who and when.")
_LABELS = flags.DEFINE_string("labels", None, "monitor: a CSV file of what was right: the columns request and label.")
_FALSE_ALARMS = flags.DEFINE_float(
    "false_alarms", 0.01, "monitor: how probable an alarm may be if nothing has changed."
)
_CANDIDATE = flags.DEFINE_string("candidate", None, "serve: the alias of what is tried beside --model, as staging.")
_CANARY = flags.DEFINE_float("canary", 0.0, "serve: the share of requests that the candidate answers.")
_SHADOW = flags.DEFINE_bool("shadow", False, "serve: the candidate computes what it does not answer, to be compared.")
_SAMPLES = flags.DEFINE_string("samples", None, "serve: a folder to keep a share of the predictions in, for monitor.")
_SAMPLES_SHARE = flags.DEFINE_float("samples_share", 0.1, "serve: of the requests that are kept.")
_SAMPLES_CONTENTS = flags.DEFINE_bool("samples_contents", False, "serve: keep answers too, not only numbers of them.")
_SAMPLES_MB = flags.DEFINE_float("samples_mb", 1024.0, "serve: megabytes of samples, beyond which the oldest go.")
_SAMPLES_DAYS = flags.DEFINE_float("samples_days", 30.0, "serve: after which samples go.")
_ADDRESS = flags.DEFINE_string("address", None, "clean: of a Ray cluster; default: one on this machine.")
_FORGET = flags.DEFINE_list("forget", [], "clean: ids of documents to take out of what was cleaned, or files of ids.")
_RUNS = flags.DEFINE_string("runs", "runs", "clean: where runs are looked for that have trained on what is forgotten.")
_WORDS: Mapping[str, Mapping[str, Any]] = {
    "eval": {"step": _STEP, "split": _SPLIT, "engine": _ENGINE},
    "predict": {
        "pattern": _INPUT,
        "step": _STEP,
        "adapter": _ADAPTER,
        "output": _OUTPUT,
        "engine": _ENGINE,
        "answers_of": _ANSWERS,
        "top": _TOP,
        "gallery": _GALLERY,
    },
    "gallery": {
        "path": _GALLERY,
        "do": _DO,
        "pattern": _INPUT,
        "name": _NAME,
        "before": _BEFORE,
        "step": _STEP,
    },
    "embed": {"pattern": _INPUT, "step": _STEP, "output": _OUTPUT},
    "generate": {
        "pattern": _INPUT,
        "step": _STEP,
        "prompts": _PROMPT,
        "sample": _SAMPLE,
        "stop": _STOP,
        "chat": _CHAT,
        "adapter": _ADAPTER,
        "engine": _ENGINE,
    },
    "clean": {"engine_name": _ENGINE, "address": _ADDRESS, "forget": _FORGET, "runs": _RUNS},
    "plan": {"topology_name": _TOPOLOGY, "price": _PRICE, "search": _SEARCH},
    "compare": {"split": _SPLIT, "storage": _STORAGE, "output": _OUTPUT},
    "compress": {
        "step": _STEP,
        "output": _OUTPUT,
        "prune": _PRUNE,
        "quantize": _QUANTIZE,
        "calibrate": _CALIBRATE,
        "sensitivity": _SENSITIVITY,
    },
    "export": {
        "step": _STEP,
        "output": _OUTPUT,
        "to": _TO,
        "platforms": _PLATFORMS,
        "quantize": _QUANTIZE,
        "allow_drop": _ALLOW_DROP,
        "calibrate": _CALIBRATE,
    },
    "benchmark": {"step": _STEP, "batch": _BATCH, "engine": _ENGINE},
    "serve": {
        "step": _STEP,
        "engine": _ENGINE,
        "answers_of": _ANSWERS,
        "host": _HOST,
        "port": _PORT,
        "max_batch": _MAX_BATCH,
        "max_wait_ms": _MAX_WAIT,
        "max_queue": _MAX_QUEUE,
        "slots": _SLOTS,
        "places": _PLACES,
        "adapter": _ADAPTER,
        "max_body_mb": _MAX_BODY,
        "max_pixels": _MAX_PIXELS,
        "streams": _STREAMS,
        "max_seconds": _MAX_SECONDS,
        "timeout_s": _TIMEOUT,
        "drain_s": _DRAIN,
        "api_keys": _API_KEYS,
        "add_key": _ADD_KEY,
        "rate": _RATE,
        "cors": _CORS,
        "log_contents": _LOG_CONTENTS,
        "registry": _REGISTRY,
        "storage": _REGISTRY_STORAGE,
        "specs": _MODEL,
        "candidate": _CANDIDATE,
        "canary": _CANARY,
        "shadow": _SHADOW,
        "samples": _SAMPLES,
        "samples_share": _SAMPLES_SHARE,
        "samples_contents": _SAMPLES_CONTENTS,
        "samples_mb": _SAMPLES_MB,
        "samples_days": _SAMPLES_DAYS,
    },
    "monitor": {
        "pattern": _INPUT,
        "registry": _REGISTRY,
        "storage": _REGISTRY_STORAGE,
        "specs": _MODEL,
        "labels": _LABELS,
        "output": _OUTPUT,
        "false_alarms": _FALSE_ALARMS,
    },
    "registry": {
        "registry": _REGISTRY,
        "storage": _REGISTRY_STORAGE,
        "do": _DO,
        "models": _MODEL,
        "alias": _ALIAS,
        "require": _REQUIRE,
        "why": _WHY,
    },
}
_ANYWHERE = (_STORAGE, _STEP, _SPLIT, _INPUT)
"""What other verbs overlook."""


def words(mode: str) -> dict[str, Any]:
    """What the command line says of those arguments that a verb alone has.

    Raises:
      UserError: a flag of another verb.
    """
    for flag in {flag.name: flag for own in _WORDS.values() for flag in own.values()}.values():
        takers = [verb for verb, own in _WORDS.items() if any(flag is x for x in own.values())]
        if flag.present and mode not in takers and not any(flag is x for x in _ANYWHERE):
            more = ", and --config.init_from=ADAPTER" if flag is _ADAPTER else ""
            do = f"{takers[0]} does" if len(takers) == 1 else f"{', '.join(takers[:-1])} and {takers[-1]} do"
            raise UserError(f"--mode={mode} takes no --{flag.name}; {do}{more}.")
    if mode in ("predict", "embed") and _INPUT.value is None:
        raise UserError(f"--mode={mode} needs --input: a file, a folder or a quoted pattern.")
    return {name: flag.value for name, flag in _WORDS.get(mode, {}).items()}


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
    """Every flag of the command line, below the verbs that its help names (``"eval, compare: the split"``)."""
    groups: dict[str, list[str]] = {"all verbs": []}
    for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]) + flags.FLAGS.get_flags_for_module(__name__):
        said: dict[str, str] = {}
        verbs = ["all verbs"]
        for clause in (flag.help or "").partition(";\n")[0].removesuffix(".").split("; "):
            names, colon, text = clause.partition(": ")
            if colon and names.islower() and not names.startswith("default"):
                verbs = names.split(", ")
            for verb in verbs:
                said[verb] = f"{said[verb]}; {clause}" if verb in said else text if verb != "all verbs" else clause
        form = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}="
        for verb, text in said.items():
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
