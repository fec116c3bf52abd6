"""Configs that build things: ``{"target": "package.module:Name", ...arguments}`` <-> the object.

``target(Class, **kwargs)`` stores the import path and all of the constructor's arguments with their defaults, so that
every knob exists in the config, is saved with the run and can be set from the command line. ``deferred`` does the same
for a callable whose remaining arguments are known only later; it builds a ``functools.partial``.

A config is data, and may come in a folder from anywhere: ``locate`` says what it may name.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict, config_dict

from bigbase_jax.core import UserError

TARGET = "target"
DEFER = "deferred"
_OPEN = ("bigbase_jax", "flax.linen", "optax", "jax.nn", "jax._src.nn")
_FUNCTIONS = ("optax", "optax.contrib", "jax.nn", "jax.nn.initializers")  # all of them compute, and do nothing else
_trusted: set[str] = set()  # packages
_named: set[str] = set()  # import paths
_SIZES = {"width", "depth", "decoder_depth", "heads", "mlp_dim", "patch", "length", "hidden"}
_SIZES |= {"vocab_size", "type_vocab_size", "num_classes", "stages", "depths", "pipeline_microbatches"}
_RATES = {"dropout", "drop_path"}

_IMAGE, _TEXT = "bigbase_jax.data.sources.image", "bigbase_jax.data.sources.text"
_SYNTHETIC = "bigbase_jax.data.sources.synthetic"
_MOVED = {  # what configs of earlier runs name -> what it is called now: modules, and "module:Name"
    "bigbase_jax.train:Loop": "bigbase_jax.train:TrainConfig",
    "bigbase_jax.adapt:LoRA": "bigbase_jax.wrappers.lora:LoRA",
    "bigbase_jax.adapt:Frozen": "bigbase_jax.wrappers.frozen:Frozen",
    "bigbase_jax.tasks.mix": "bigbase_jax.wrappers.mix",
    "bigbase_jax.data.tokenizer": "bigbase_jax.text.tokenizer",
    **{f"bigbase_jax.data.sources.{name}": f"{_IMAGE}.{name}" for name in ("arrays", "folder", "idx", "npz", "tfds")},
    **{f"bigbase_jax.data.sources.{name}": f"{_TEXT}.{name}" for name in ("chat", "labelled_text", "masked_text")},
    **{f"bigbase_jax.data.sources.{name}": f"{_TEXT}.{name}" for name in ("parallel_text", "tagged_text", "text")},
    **{f"bigbase_jax.data.sources.{name}": f"{_SYNTHETIC}.{name}" for name in ("docstrings", "numerals", "questions")},
    "bigbase_jax.data.sources.drawn": f"{_SYNTHETIC}.pictures",
    "bigbase_jax.data.sources.made_up_names": f"{_SYNTHETIC}.names",
}
_ARGUMENTS = {  # "module:Name" of today -> what its arguments were called -> what they are called
    "bigbase_jax.models.bert:Bert": {"types": "type_vocab_size"},
    "bigbase_jax.wrappers.lora:LoRA": {"also": "modules_to_save"},
    "bigbase_jax.wrappers.frozen:Frozen": {"trained": "trainable"},
}
_STYLE = "bigbase_jax.models.transformer:Style"
# Models among whose own arguments those of their style once stood -> the defaults that these had
_STYLED: Mapping[str, Mapping[str, Any]] = {
    "bigbase_jax.models.bert:Bert": {"post_norm": True, "epsilon": 1e-12, "kernel_init": "normal"},
    "bigbase_jax.models.decoder:Decoder": {},
    "bigbase_jax.models.encoder_decoder:EncoderDecoder": {"activation": "relu"},
    "bigbase_jax.models.vit:ViT": {},
}
_STYLE_WORDS = {"kv_heads", "head_dim", "norm", "epsilon", "post_norm", "activation", "gated", "qkv_bias", "out_bias"}
_STYLE_WORDS |= {"mlp_bias", "qk_norm", "window", "windowed", "scale", "kernel_init"}


def renewed(node: Any) -> Any:
    """A config as plain data that an earlier version wrote, with today's names of what it names."""
    if isinstance(node, list):
        return [renewed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: renewed(value) for key, value in node.items()}
    if isinstance(path := node.get(TARGET), str):
        module, _, name = path.partition(":")
        path = f"{_MOVED.get(module, module)}:{name}"
        node[TARGET] = path = _MOVED.get(path, path)
        arguments = _ARGUMENTS.get(path, {})
        node = {arguments.get(key, key): value for key, value in node.items()}
        if path in _STYLED and (words := {key: node.pop(key) for key in sorted(_STYLE_WORDS & node.keys())}):
            node["style"] = {TARGET: _STYLE, **_STYLED[path], **words}
    return node


def suggest(name: str, options: typing.Iterable[str], kind: str = "option") -> str:
    """``" Did you mean 'x'?"`` for a near miss, otherwise the list of options."""
    options = sorted(options)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known {kind}s: {', '.join(options)}." if options else ""


def target(fn: Callable[..., Any], /, **kwargs: Any) -> ConfigDict:
    """A config node that builds ``fn(**kwargs)``; arguments not given appear with their defaults.

    Raises:
      UserError: ``fn`` takes no such argument, or lacks a required one that is not given.
    """
    return _node(fn, kwargs, deferred=False)


def deferred(fn: Callable[..., Any], /, **kwargs: Any) -> ConfigDict:
    """A config node that builds ``functools.partial(fn, **kwargs)``, to be called when the rest is known.

    Only the given arguments are frozen; ``fn``'s other defaults stay its own, since the caller may fill them.
    """
    return _node(fn, kwargs, deferred=True)


def build(node: Any, dataset_info: Mapping[str, Any] | None = None, _path: str = "config") -> Any:
    """The object a node describes, built from the inside out.

    Args:
      node: a ``target``/``deferred`` node, or any nest of mappings, lists and tuples with such nodes in it.
      dataset_info: values for arguments that the config leaves at None, by name, at any depth (``num_classes``).

    Raises:
      UserError: an unknown import path or argument (with the nearest one), or a constructor that refuses its values.
    """
    dataset_info = dataset_info or {}
    if isinstance(node, (list, tuple)):
        return tuple(build(item, dataset_info, f"{_path}[{i}]") for i, item in enumerate(node))
    if not isinstance(node, (Mapping, ConfigDict)):
        return node
    items = dict(node.items())
    if TARGET not in items:
        return {key: build(value, dataset_info, f"{_path}.{key}") for key, value in items.items()}
    fn = locate(items.pop(TARGET), _path)
    defer = items.pop(DEFER, False)
    known = _parameters(fn)
    kwargs = {}
    for key, value in items.items():
        if known is not None and key not in known:
            raise UserError(f"{_path}: {_name(fn)} has no argument {key!r}.{suggest(key, known, 'argument')}")
        if value is None and key in dataset_info:
            kwargs[key] = _tuples(dataset_info[key])  # which is never a node
        else:
            kwargs[key] = build(value, dataset_info, f"{_path}.{key}")
    if isinstance(fn, type) and issubclass(fn, nn.Module):
        _check_numbers(kwargs, _path)
    try:
        return functools.partial(fn, **kwargs) if defer else fn(**kwargs)
    except (TypeError, ValueError) as error:
        if isinstance(error, TypeError) and error.__traceback__ and error.__traceback__.tb_next:
            raise  # raised inside the constructor, not by the call: a bug, which keeps its traceback
        raise UserError(f"{_path}: cannot build {_name(fn)}: {error}") from error


def _check_numbers(kwargs: Mapping[str, Any], path: str) -> None:
    """Of a model: its sizes are at least 1, its rates at least 0 and below 1."""
    for key, value in kwargs.items():
        for number in value if isinstance(value, tuple) else (value,):
            if key in _SIZES and isinstance(number, int) and number < 1:
                raise UserError(f"{path}.{key} is {value}; it must be at least 1.")
            if key in _RATES and isinstance(number, (int, float)) and not 0 <= number < 1:
                raise UserError(f"{path}.{key} is {value}; it lies in [0, 1), for example 0.1.")


def locate(path: Any, where: str = "config") -> Callable[..., Any]:
    """The callable at ``"package.module:Name"``, if a config may name it, wherever the config comes from.

    - What code of this process has itself named, with ``target``, ``deferred`` or ``trust_config``: a recipe does.
    - What a package defines that the user trusts: ``trust``, ``--trust=PACKAGE``.
    - Of bigbase_jax the classes that configs are made of: dataclasses, Linen modules, and the data sources.
    - Linen modules of flax, and functions that optax, ``jax.nn`` and ``jax.nn.initializers`` offer.

    Nothing among the last two runs code, starts a process or writes a file, whatever its arguments are. The object that
    is found is judged, by where it was defined and not by the way to it, and a module is imported only if it may be.

    Raises:
      UserError: a config may not name it, or there is no such module or name in it (with the nearest name).
    """
    module_name, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not name:
        raise UserError(f"{where}.target is {str(path)[:80]!r}; it must read 'package.module:Name'.")
    named = path in _named
    if not named and not _within(module_name, (*_OPEN, *_trusted)):
        raise _refused(where, path, module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise UserError(f"{where}.target {path!r} needs the package {error.name!r}; install it.") from error
        raise UserError(f"{where}.target {path!r}: there is no module {module_name!r}.") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in dir(found) if not n.startswith("_")]
            raise UserError(f"{where}.target: {module_name} has no {name!r}.{suggest(part, public, 'name')}")
        found = getattr(found, part)
        if isinstance(found, types.ModuleType) and not named and not _within(found.__name__, (*_OPEN, *_trusted)):
            raise _refused(where, path, found.__name__)
    if not callable(found):
        raise UserError(f"{where}.target {path!r} is not something that can be called.")
    home = getattr(found.func if isinstance(found, functools.partial) else found, "__module__", None)
    if not named and not _within(home, tuple(_trusted)) and not _is_of_configs(found, home):
        raise _refused(where, path, home or type(found).__module__)
    return found


def trust(*packages: str) -> None:
    """Lets configs of this process name what these packages define, and imports them for it.

    Raises:
      UserError: that is no name of a package.
    """
    for package in packages:
        if not re.fullmatch(r"\w+(\.\w+)*", package):
            raise UserError(f"--trust={package!r} is no name of a package; try --trust=my_models.")
    _trusted.update(packages)


def trust_config(node: Any) -> None:
    """Lets configs of this process name what this one does: that of a recipe which the user has given."""
    if isinstance(node, (Mapping, ConfigDict)):
        _named.update(path for key, path in node.items() if key == TARGET and isinstance(path, str))
        node = node.values()
    for item in () if isinstance(node, str) or not isinstance(node, typing.Iterable) else node:
        trust_config(item)


def _within(module: str | None, packages: typing.Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def _is_of_configs(found: Any, home: str | None) -> bool:
    """Whether it is of what ``locate`` lists last; ``home`` is the module that defines it."""
    if isinstance(found, type):
        node = dataclasses.is_dataclass(found) and _within(home, ("bigbase_jax", "flax.linen"))
        return node or _within(home, ("bigbase_jax.data.sources",))
    spaces = [vars(sys.modules[name]) for name in _FUNCTIONS if name in sys.modules]
    return _within(home, _OPEN) and any(x is found for space in spaces for key, x in space.items() if key[0] != "_")


def _refused(where: str, path: str, module: str) -> UserError:
    package = module if _within(module, _OPEN) else module.partition(".")[0]
    return UserError(
        f"{where} names {path!r}, and a config may name only what its recipe does, and models, tasks, data and"
        f" functions of bigbase_jax, flax, optax and jax; if you trust that code, add --trust={package}."
    )


def parse_arg(arg: str | None, whose: str = "the recipe", /, **defaults: Any) -> types.SimpleNamespace:
    """The part of ``--config=recipe.py:ARG`` after the colon, as typed values; or what else (``whose``) is given so.

    ``ARG`` is a comma-separated list of ``key=value``; a bare word ``tiny`` means ``tiny=True``. Types follow those of
    the defaults (None: a string). A string may have commas (``root=/my,data``): what follows one belongs to it unless
    that reads ``word=...``, or is a word such as ``tiny``, or close to one. A backslash before a comma keeps it anyhow.

    Raises:
      UserError: a key that is not known (with the nearest one), or a value of another type.
    """
    values = dict(defaults)
    for item in _items(arg or "", defaults):
        key, separator, text = item.partition("=")
        key = key.strip()
        if key not in defaults:
            raise UserError(f"{whose} has no argument {key!r}.{suggest(key, defaults, 'argument')}")
        default = defaults[key]
        if isinstance(default, bool):
            lowered = text.strip().lower() if separator else "true"
            if lowered not in ("true", "false", "1", "0"):
                raise UserError(f"{whose}'s argument {key!r} is true or false, not {text!r}.")
            values[key] = lowered in ("true", "1")
        elif not separator:
            raise UserError(f"{whose}'s argument {key!r} needs a value: {key}=...")
        else:
            kind = str if default is None else type(default)
            try:
                values[key] = kind(text.strip())
            except ValueError as error:
                raise UserError(f"{whose}'s argument {key}={text!r} is not of type {kind.__name__}.") from error
    return types.SimpleNamespace(**values)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _items(text: str, defaults: Mapping[str, Any]) -> list[str]:
    """The items of what ``parse_arg`` reads, each with the commas that belong to it."""
    flags = [key for key, default in defaults.items() if isinstance(default, bool)]
    items: list[str] = []
    in_string = False  # whether the last item is a string, to which more may belong
    for part in re.split(r"(?<!\\),", text):
        word, equals, _ = part.partition("=")
        word = word.strip()
        plain = re.fullmatch(r"\w+", word)
        begins = plain and (equals or difflib.get_close_matches(word, flags))
        if in_string and not begins:
            items[-1] += "," + part
        elif part.strip():
            items.append(part)
            in_string = bool(equals) and isinstance(defaults.get(word, 0), str | None)
    return [re.sub(r"(?<!\\)[\s,]+$", "", item).replace("\\,", ",") for item in items]


def _node(fn: Callable[..., Any], kwargs: dict[str, Any], deferred: bool) -> ConfigDict:
    known = _parameters(fn)
    if known is not None:
        for key in kwargs:
            if key not in known:
                raise UserError(f"{_name(fn)} has no argument {key!r}.{suggest(key, known, 'argument')}")
    node = ConfigDict({TARGET: import_path(fn)}, convert_dict=True)
    _named.add(node[TARGET])
    if deferred:
        node[DEFER] = True
        values = dict(kwargs)
        hints: dict[str, Any] = {}
    else:
        values = {}
        for key, parameter in (known or {}).items():
            if key in kwargs:
                values[key] = kwargs[key]
            elif parameter.default is inspect.Parameter.empty:
                raise UserError(f"{_name(fn)} needs the argument {key!r}.")
            elif isinstance(default := parameter.default, _PLAIN) or (
                dataclasses.is_dataclass(default) and not isinstance(default, type)
            ):
                values[key] = default  # one that no config can hold stays the constructor's own
        values.update({key: value for key, value in kwargs.items() if key not in values})
        hints = _hints(fn)
    for key, value in values.items():
        node[key] = _placeholder(hints.get(key)) if value is None else _plain(value)
    return node


_PLAIN = (ConfigDict, config_dict.FieldReference, str, int, float, bool, list, tuple, Mapping, type(None))


def _plain(value: Any) -> Any:
    """The value itself where a config can hold it; a dataclass instance becomes its target node."""
    if isinstance(value, _PLAIN):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return target(type(value), **fields)
    raise UserError(f"a config holds plain values and target(...) nodes, not {value!r}.")


def _placeholder(hint: Any) -> Any:
    """A typed None, so that the command line knows how to parse a later value."""
    options = [t for t in typing.get_args(hint) if t is not type(None)] if hint is not None else []
    kind = options[0] if options else hint
    kind = typing.get_origin(kind) or kind
    return config_dict.placeholder(kind if kind in (int, float, str, bool, tuple, dict) else object)


def _parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Named parameters of a callable (Linen's own ``parent`` and ``name`` left out); None if it takes any keyword."""
    parameters = inspect.signature(fn).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    linen = hasattr(fn, "nowrap") or any(c.__module__ == "flax.linen.module" for c in getattr(fn, "__mro__", ()))
    hidden = {"parent", "name"} if linen else set()
    return {
        p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name not in hidden
    }


def _hints(fn: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(vars(fn).get("__init__", fn) if isinstance(fn, type) else fn)
    except (NameError, TypeError):
        return {}


def import_path(fn: Callable[..., Any]) -> str:
    """``"package.module:Name"`` of a class or function, by the shortest public module that re-exports it for optax."""
    module, name = fn.__module__, fn.__qualname__
    root = module.partition(".")[0]
    if root != "bigbase_jax" and getattr(importlib.import_module(root), name, None) is fn:
        module = root
    return f"{module}:{name}"


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__qualname__", repr(fn))
