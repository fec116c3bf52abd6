"""Runs that begin from trained weights: ``config.init_from`` names a published folder, the folder of another run, or an
adapter that a run has exported: training continues from there on its base.

``resolve`` makes the run's model the one whose weights these are; ``initialise`` puts them where a fresh run's are.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import build, import_path, target
from bigbase_jax.core import Task, TrainState, UserError, Variables, flatten, some
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.pretrained import files, weights
from bigbase_jax.pretrained.families import adjust, head_of
from bigbase_jax.pretrained.folder import check_weights, describe, open_weights
from bigbase_jax.pretrained.schema import Schema, check, listed, number
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.restored import dataset_info, restore
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.text.tokenizer import Tokenizer, TokenizerFile
from bigbase_jax.text.tokenizer import load as load_tokenizer
from bigbase_jax.wrappers import adapter as adapters
from bigbase_jax.wrappers.distil import Distil
from bigbase_jax.wrappers.quantised import Quantised
from bigbase_jax.wrappers.sparse import Sparse
from bigbase_jax.wrappers.wrapper import Wrapper

FROM_RECIPE = (
    "num_classes",
    "dtype",
    "dropout",
    "drop_path",
    "remat",
    "remat_policy",
    "scan",
    "sequence_attention",
    "pipeline_microbatches",
)
"""Of the recipe's model: how it is trained and computed, and what it is to tell apart. All else comes with weights."""
TEACHER, SIGNATURE = "teacher", "teacher.json"
"""The folder of what a run keeps of its teacher, and the file in it that says by which files that is known."""
_PREPROCESSING: Schema = {
    "image_mean": listed(number(-1e3, 1e3), 1, 1024),
    "image_std": listed(number(1e-6, 1e6), 1, 1024),
}


@dataclasses.dataclass(frozen=True)
class RunTokenizer:
    """The tokenizer of another run.

    Attributes:
      path: the run's folder.
    """

    path: str

    def fit(self, texts: Any, others: Any, end: bool, special: Sequence[str] = ()) -> Tokenizer:
        """
        Raises:
          UserError: there is no such run, or it has no tokenizer.
        """
        state = dataset_info(RunDir(self.path)).get("tokenizer")
        if state is None:
            raise UserError(f"the run in {self.path} has no tokenizer.")
        return load_tokenizer(state)


def is_run(path: str | os.PathLike) -> bool:
    """Whether it is the folder of a run of ours.

    Raises:
      UserError: it is no folder at all, or has no ``config.json``.
    """
    place = pathlib.Path(os.path.expanduser(path))
    if place.is_file():
        return False
    if not place.is_dir():
        raise UserError(f"config.init_from={str(path)!r} is no folder: give that of published weights, or of a run.")
    return "task" in files.read_json(place / files.CONFIG)


# --------------------------------------------------------------------------------------------------------- the config


def resolve(config: ConfigDict, instead: str | None = None, compared: bool = True) -> ConfigDict:
    """The config with the model that ``config.init_from`` holds, and what it reads: the tokenizer, or the mean and
    standard deviation of pictures, where the folder has them and the recipe has a place for them.

    Of the recipe's model those words stay that are in ``FROM_RECIPE``. Without ``init_from`` the config is returned as
    it is. Where that is an adapter, it becomes ``config.adapter``, and its base ``init_from``; the recipe's wrapper
    becomes as the adapter's was.

    With ``config.teacher``, of which the task has a node, that node says by which files it is known, and the data is
    read by its tokenizer.

    Args:
      instead: what a run has kept of that folder, to be read in its place; see ``provenance``.
      compared: look whether a published folder's weights are those of the model, before one of its sizes is made.

    Raises:
      UserError: the folder is neither that of published weights nor of a run or adapter, its weights are not those of
        its ``config.json``, the task has no model to replace, or ``config.teacher`` is not there.
    """
    config = _with_teacher(config, instead) if "teacher" in config else config
    given = config.get("init_from")
    if given and not config.get("adapter"):
        found = next((folder for folder in (given, instead) if folder and adapters.is_adapter(folder)), None)
        config = config if found is None else _with_adapter(config, found)
    path = config.get("init_from")
    if not path:
        return config
    config = copy.deepcopy(config)
    task = config.task
    while isinstance(task.get("task"), ConfigDict):
        task = task.task
    if not isinstance(task.get("model"), ConfigDict):
        raise UserError(f"config.init_from needs a task with one model; {task.get('target')} has none.")
    place = instead or path
    node, tokenizer = _of_run(place) if is_run(place) else _of_folder(place)
    with node.ignore_type():
        for key in FROM_RECIPE:
            if key in node and key in task.model:
                node[key] = task.model[key]
    config.unlock()
    task.model = node
    if is_run(place):
        _keep_zeros(config, RunDir(place).config())
    said = pathlib.Path(os.path.expanduser(place)) / files.PREPROCESSOR
    if "mean" in task and "std" in task and os.path.lexists(said):
        given = check(files.read_json(said), _PREPROCESSING, str(said))
        if len(given) == len(_PREPROCESSING):
            task.mean, task.std = tuple(given["image_mean"]), tuple(given["image_std"])
    dataset = config.data.get("dataset")
    if tokenizer is not None and isinstance(dataset, ConfigDict) and "tokenizer" in dataset:
        tokenizer.path = path
        dataset.tokenizer = tokenizer
    config.lock()
    if compared and instead is None and not is_run(path):
        check_weights(path)
    return config


def _with_teacher(config: ConfigDict, instead: str | None) -> ConfigDict:
    """The config that learns from ``config.teacher``, of which ``instead`` has what was kept; see ``resolve``."""
    path, task = config.teacher, config.task
    if path is None:
        raise UserError(
            "config.teacher is missing: the folder of a run or of published weights; python launch.py"
            " --config=configs/catdog.py trains one on the same pictures, then --config.teacher=runs/catdog."
        )
    while task is not None and "teacher" not in task:
        task = task.get("task")
    if task is None:
        raise UserError(
            "config.teacher is for a task that learns from one, such as Distil; the recipe's has no teacher."
        )
    teacher, kept = build(task.teacher, _path="config.task.teacher"), os.path.join(instead or "", TEACHER)
    if not teacher.there and not os.path.isdir(kept):
        raise UserError(f"there is no teacher at config.teacher={path!r}; give the folder of a run or of weights.")
    place = path if teacher.there else kept
    tokenizer = (_of_run(place) if is_run(place) else _of_folder(place))[1]
    config = copy.deepcopy(config)
    config.unlock()
    task = config.task
    while "teacher" not in task:
        task = task.task
    task.teacher.fingerprint = (
        teacher.signature() if teacher.there else files.read_json(pathlib.Path(kept, SIGNATURE)).get("fingerprint")
    )
    dataset = config.data.get("dataset")
    if tokenizer is not None and isinstance(dataset, ConfigDict) and "tokenizer" in dataset:
        tokenizer.path = path
        dataset.tokenizer = tokenizer
    config.lock()
    return config


def _with_adapter(config: ConfigDict, found: str) -> ConfigDict:
    """The config that continues from the adapter ``config.init_from``, of which ``found`` is all or what was kept."""
    about, given = adapters.described(found), config.init_from
    wanted = import_path(adapters.KINDS[about["kind"]])
    config = copy.deepcopy(config)
    config.unlock()
    task = config.task
    while task is not None and task.target != wanted:
        task = task.get("task")
    if task is None:
        raise UserError(
            f"config.init_from={given!r} is an adapter of the kind {about['kind']}, and the recipe's task has none;"
            " give the recipe one, as adapt=lora does."
        )
    with task.ignore_type():
        task.update({name: value for name, value in adapters.words_of(about).items() if name != "dropout"})
    config.adapter, config.init_from = given, about["base_model_name_or_path"]
    base = config.init_from
    if found == given and base is not None and not os.path.isdir(os.path.expanduser(base)):
        raise UserError(
            f"the base of the adapter {given}, {base}, is not there; put it back, or correct base_model_name_or_path in"
            f" {os.path.join(given, adapters.CONFIG)}."
        )
    config.lock()
    return config


def _keep_zeros(config: ConfigDict, origin: ConfigDict) -> None:
    """Puts masks around the recipe's task, inside of adapters and of a teacher, where those weights were pruned."""
    own, sparse = config.task, import_path(Sparse)
    given = next((node for node in _nodes(origin.task) if node.get("target") == sparse), None)
    if any(node.get("target") == sparse for node in _nodes(own)) or not (given or masked(origin)):
        return
    outer = config
    while own.target in (import_path(kind) for kind in (*adapters.KINDS.values(), Distil)):
        outer, own = own, own.task
    outer.task = target(Sparse, task=own, **({"targets": given.targets} if given else {}))


def masked(config: ConfigDict) -> bool:
    """Whether the run is of weights with zeros that are to stay."""
    return bool((config.get("compression") or {}).get("masked"))


def _nodes(task: Any) -> Iterator[ConfigDict]:
    """The node of a task, that of the one inside it, and so on."""
    while isinstance(task, ConfigDict):
        yield task
        task = task.get("task")


def part(path: str) -> tuple[ConfigDict, ConfigDict | None]:
    """The model node of a run or of a published folder, to be a part of another model, and that of its tokenizer (None:
    it reads no text). Its last layer becomes as wide as that model asks for; ``config.init_parts`` names the folder
    again, for the weights.

    Raises:
      UserError: it is neither.
    """
    node, tokenizer = _of_run(path) if is_run(path) else _of_folder(path)
    if "num_classes" in node:
        with node.ignore_type():
            node.num_classes = None
    return node, tokenizer


def _of_folder(path: str) -> tuple[ConfigDict, ConfigDict | None]:
    family, published = describe(path)
    tokenizer = TokenizerFile(path)
    try:
        tokenizer.file_signature()
    except UserError:
        if (pathlib.Path(os.path.expanduser(path)) / "source.spm").exists():  # of Marian's files, one is missing
            raise
        return family.from_config(published), None
    return family.from_config(published), target(TokenizerFile, path=path)


def _of_run(path: str) -> tuple[ConfigDict, ConfigDict | None]:
    run = RunDir(path)
    task, known = run.config().task, dataset_info(run)
    while isinstance(task.get("task"), ConfigDict):
        task = task.task
    node = copy.deepcopy(task.model)
    for key, value in node.items():
        if value is None and key in known:
            node[key] = known[key]
    return node, target(RunTokenizer, path=path) if "tokenizer" in known else None


# ---------------------------------------------------------------------------------------------------------- the state


def chain(task: Task) -> Iterator[Any]:
    """The task, the one inside it, and so on."""
    inner: Any = task
    while inner is not None:
        yield inner
        inner = vars(inner).get("task")


def stored(task: Task) -> Quantised | None:
    """What of a task keeps its weights in few bits for good; None: nothing does."""
    return next((part for part in chain(task) if isinstance(part, Quantised) and part.stored), None)


def model_of(task: Task) -> tuple[Any, Any]:
    """The innermost task and its model.

    Raises:
      UserError: it has no model, or several.
    """
    *_, inner = chain(task)
    model = vars(inner).get("model")
    if model is None:
        raise UserError(f"{type(inner).__name__} has no model of its own whose weights could be read or written.")
    return inner, model


def initialise(
    path: str | None,
    state: TrainState,
    task: Task,
    spec: Mapping[str, Any],
    adapter: str | None = None,
    parts: Mapping[str, str | None] | None = None,
) -> TrainState:
    """A fresh state with the weights of ``path`` in the place of its own, where these live; says what stayed fresh.

    Args:
      path: see ``resolve``; None: the model itself stays fresh.
      state: its buffers are given up as they are replaced.
      task: what is trained.
      spec: shapes of a batch.
      adapter: the folder of an adapter on those weights, whose own take the place of the fresh ones.
      parts: a folder of weights for each of some parts of the model, by its attribute; see ``part``.

    Raises:
      UserError: the weights are not those of the model; lists what differs.
    """
    variables: dict[str, Any] = {"params": state.params, **state.model_state}
    shardings = None if state.ema is None else jax.tree.map(lambda x: x.sharding, state.ema)
    if path is not None:
        variables = _replaced(path, variables, task, spec)
    for name, folder in (parts or {}).items():
        if folder is not None:
            variables = _replaced(folder, variables, task, spec, name)
    if adapter is not None:
        wrapper = next(t for t in chain(task) if isinstance(t, Wrapper))
        variables = dict(adapters.load_adapter(adapter, wrapper, variables))
        say(f"init_from {adapter}: an adapter of {'a fresh model' if path is None else path}")
    ema = state.ema
    if ema is not None:
        ema = jax.jit(lambda new: jax.tree.map(jnp.copy, new), out_shardings=shardings)(variables)
    params = variables.pop("params")
    return state.replace(params=params, model_state=variables, ema=ema)  # type: ignore[attr-defined]


def _replaced(
    path: str, variables: dict[str, Any], task: Task, spec: Mapping[str, Any], part: str | None = None
) -> dict[str, Any]:
    """The variables with the weights of a folder; of a ``part`` of the model, by its attribute, or of all."""
    inner, model = model_of(task)
    flat = flatten(variables)
    mesh = next(iter(flat.values())).sharding.mesh
    wanted = flatten(jax.eval_shape(inner.init, jax.random.key(0), spec))
    full = {name: name for name in wanted}
    if part is not None:
        model = getattr(model, part, None)
        inside = {name: name.split(".") for name in wanted}
        full = {".".join((kind, *rest)): name for name, (kind, first, *rest) in inside.items() if first == part}
        if model is None or not full:
            raise UserError(f"config.init_parts.{part}={path!r}: {type(inner).__name__} has no such part of its model.")
        wanted = {short: wanted[name] for short, name in full.items()}
    published = not is_run(path)
    source = open_weights(path, describe(path)[0], model) if published else _run_weights(path, mesh)
    if adjusted := adjust(model, source, spec, published):
        say(f"init_from {path}: {adjusted}")
    found = weights.plan(source, wanted, head_of(model))
    place = next((t.place for t in chain(task) if hasattr(type(t), "place")), None)
    replaced = dict(flat)
    for name in found.paths:
        collection, _, rest = full[name].partition(".")
        where = ".".join(place(rest)) if place and collection == "params" else full[name]
        if where not in flat:
            raise UserError(f"{type(task).__name__} has no place for the parameter {rest!r} of its model.")
        like = jax.ShapeDtypeStruct(flat[where].shape, flat[where].dtype, sharding=flat[where].sharding)
        flat[where].delete()
        replaced[where] = source.read(name, like)
    count = sum(wanted[name].size for name in found.paths)
    what = f"init_from {path}" if part is None else f"init_parts.{part} {path}"
    say(f"{what}: {len(found.paths)} arrays of {count:,} numbers")
    if found.fresh:
        say(f"{what}: fresh are {some(found.fresh)}")
    if found.dropped:
        say(f"{what}: left out are {some(found.dropped)}")
    new: dict[str, Any] = jax.tree.unflatten(jax.tree.structure(variables), list(replaced.values()))
    return new


def _run_weights(path: str, mesh: Any) -> weights.Weights:
    """The model's variables of a run's best checkpoint, or else of its last, each block by itself."""
    run = RunDir(path)
    task, variables, step = restore(run, run.config(), mesh)
    variables = merged(task, variables)
    return weights.Weights(f"step {step} of the run in {path}", flatten(unstack_blocks(variables)))


def merged(task: Task, variables: Variables) -> Variables:
    """The variables of the innermost task's model."""
    for outer in chain(task):
        if hasattr(type(outer), "unwrap"):
            variables = outer.unwrap(variables)
    return variables


def runnable(task: Task, variables: Variables) -> tuple[Any, Variables]:
    """The innermost task's model and its variables; where a wrapper computes in its own way, one that does so too."""
    _, model = model_of(task)
    for outer in chain(task):
        if hasattr(type(outer), "runnable"):
            return outer.runnable(model), variables
        if hasattr(type(outer), "unwrap"):
            variables = outer.unwrap(variables)
    return model, variables
