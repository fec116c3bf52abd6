"""StableHLO by ``jax.export``: a program for each platform, with the weights beside them and a ``predict.py``.

Each platform has a trace of its own, as our models choose by platform how they compute (``models.layers.platform``),
and a program that is traced once and lowered for several would have the CPU's choices in all. A GPU's has what every
device can run: cuDNN's attention is no part of StableHLO that is kept compatible.

The weights are an argument, by name: one file serves all platforms, can be mapped into memory, and no program holds
constants of gigabytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from jax.sharding import AbstractDevice, AbstractMesh

from bigbase_jax.build import suggest
from bigbase_jax.core import Batch, Task, UserError, Variables, flatten
from bigbase_jax.decoding import sampling
from bigbase_jax.export import manifest
from bigbase_jax.inference.predictor import Compute, Predictor
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.pretrained.files import read_safetensors, write_safetensors
from bigbase_jax.runtime.untrusted import read_regular
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.lora import LoRA

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
WEIGHTS, SCRIPT, SUFFIX = "weights.safetensors", "predict.py", ".stablehlo"
PLACES = 1024
"""Tokens of a prompt and what follows it, of a model that reads more."""


def write(predictor: Predictor, folder: pathlib.Path, platforms: Sequence[str] | None = None) -> dict[str, Any]:
    """Writes programs, weights and script; returns what the manifest says of them.

    Args:
      platforms: of ``PLATFORMS``; None: the one here.

    Raises:
      UserError: an unknown platform, or a model that StableHLO does not hold.
    """
    platforms = tuple(dict.fromkeys(platforms or (here(),)))
    for name in platforms:
        if name not in PLATFORMS:
            raise UserError(f"there is no platform {name!r}.{suggest(name, PLATFORMS, 'platform')}")
    task, variables = _plain(predictor.task, predictor.variables)
    flat = flatten(variables)
    structure = jax.tree.structure(variables)
    kept = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in flat.items()}
    write_safetensors(
        folder / WEIGHTS, {name: (x.shape, x.dtype) for name, x in kept.items()}, lambda name: np.asarray(flat[name])
    )

    def unpacked(weights: Mapping[str, jax.Array]) -> Variables:
        return jax.tree.unflatten(structure, [weights[name] for name in kept])

    def program(weights: Mapping[str, jax.Array], inputs: Batch) -> dict[str, jax.Array]:
        return dict(task.predict(unpacked(weights), inputs))

    inputs, exported = _exported(program, (kept,), predictor.spec, platforms)
    for platform, found in exported.items():
        (folder / f"{platform}{SUFFIX}").write_bytes(found.serialize())
    writing = _writing(task, unpacked, kept, predictor, folder, platforms)
    shutil.copyfile(pathlib.Path(__file__).with_name("standalone.py"), folder / SCRIPT)
    return {
        "inputs": {name: manifest.described(x) for name, x in inputs.items()},
        "platforms": list(platforms),
        "compatibility": {
            "calling_convention_version": max(e.calling_convention_version for e in exported.values()),
            "backward": "a jax that is newer than this one by at most six months reads it",
            "forward": "a jax that is older than this one by at most three weeks reads it",
            "source": "https://docs.jax.dev/en/latest/export/export.html#compatibility-guarantees",
        },
        **({} if writing is None else {"generate": writing}),
    }


def _exported(
    program: Any, before: tuple[Any, ...], spec: Mapping[str, jax.ShapeDtypeStruct], platforms: Sequence[str]
) -> tuple[dict[str, jax.ShapeDtypeStruct], dict[str, jax_export.Exported]]:
    """The inputs, of any length where that can be, and each platform's program, which takes them after ``before``."""
    inputs, exported = _inputs(spec, True), {}
    for platform in platforms:
        try:
            exported[platform] = _export(program, (*before, inputs), platform)
        except Exception:  # whatever a model makes of a length that is no number
            fixed = _inputs(spec, False)
            if str(fixed) == str(inputs):
                raise
            inputs = fixed
            exported = {name: _export(program, (*before, inputs), name) for name in (*exported, platform)}
    return inputs, exported


def _writing(
    task: Any, unpacked: Any, kept: Any, predictor: Predictor, folder: pathlib.Path, platforms: Sequence[str]
) -> dict[str, Any] | None:
    """Writes a decoder's program that reads tokens into its cache and gives the logits after the last; returns what the
    manifest says of it. None: the model continues no texts."""
    model = vars(task).get("model")
    if not (hasattr(model, "decode") and hasattr(task, "log_probability")):
        return None
    places = min(getattr(model, "length", None) or PLACES, PLACES)
    empty = jax.eval_shape(lambda: model.cache(1, places))
    names, structure = flatten(empty), jax.tree.structure(empty)

    def program(weights: Any, cache: Mapping[str, jax.Array], inputs: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        given = jax.tree.unflatten(structure, [cache[name] for name in names])
        logits_BV, new = sampling.prefill(model, unpacked(weights), given, inputs["tokens"], inputs["position"])
        return logits_BV, flatten(new)

    for most in (places, 1):  # any number of tokens at once, or one by one
        scope = jax_export.SymbolicScope([f"length <= {most}"] if most > 1 else ())
        batch, length = (jax_export.symbolic_shape(name, scope=scope)[0] for name in ("batch", "length"))
        kept_BS = {name: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for name, x in names.items()}
        tokens_BL = jax.ShapeDtypeStruct((batch, length if most > 1 else 1), jnp.int32)
        inputs = {"tokens": tokens_BL, "position": jax.ShapeDtypeStruct((batch,), jnp.int32)}
        try:
            exported = {name: _export(program, (kept, kept_BS, inputs), name) for name in platforms}
            break
        except Exception:
            if most == 1:
                raise
    for platform, found in exported.items():
        (folder / f"generate-{platform}{SUFFIX}").write_bytes(found.serialize())
    known = predictor.dataset_info
    ends = known.get("end_ids") or [known[name] for name in ("end_id", "stop_id") if known.get(name) is not None]
    return {
        "inputs": {name: manifest.described(x) for name, x in inputs.items()},
        "cache": {name: manifest.described(x) for name, x in kept_BS.items()},
        "places": places,
        "ends": [int(end) for end in ends],
    }


def opened(folder: pathlib.Path) -> Compute:
    """What computes ``Task.predict`` as the folder has it, on the platform here; variables that it is given are unread.

    Nothing of the folder is run before that, and nothing of it is Python.

    Raises:
      UserError: the folder is none of these, of a newer version, damaged, or has no program for this platform.
    """
    found = manifest.read(folder, "stablehlo")
    path = folder / f"{here()}{SUFFIX}"
    if not path.is_file():
        has = ", ".join(map(str, found.get("platforms", ())))
        raise UserError(
            f"{folder} has programs for {has}; --mode=export --platforms={here()} makes one for this machine."
        )
    newest = jax_export.maximum_supported_calling_convention_version
    version = found.get("compatibility", {}).get("calling_convention_version")
    if not isinstance(version, int) or version > newest:
        raise UserError(f"{folder} has calling convention {version}, and this jax reads up to {newest}: update jax.")
    try:
        exported = jax_export.deserialize(bytearray(read_regular(path, folder)))
        called = set(re.findall(r"custom_call @(\w*callback\w*)", exported.mlir_module()))
    except UserError:
        raise
    except Exception as error:  # of flatbuffers and MLIR
        raise UserError(f"{path} is no program of jax.export ({str(error).splitlines()[:1]}).") from error
    if called:  # they would call an address in this process
        raise UserError(f"{path} calls {', '.join(sorted(called))}, which is no computation; do not use it.")
    call, weights = jax.jit(exported.call), jax.device_put(read_safetensors(folder / WEIGHTS))
    names = list(found["inputs"])
    return lambda variables, batch: call(weights, {name: batch[name] for name in names})


def here() -> str:
    """The platform of this process, as ``jax.export`` calls it."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def _plain(task: Any, variables: Variables) -> tuple[Task, Variables]:
    """Without what only training needs: adapters are merged into the model."""
    while isinstance(task, (LoRA, Frozen)):
        task, variables = task.task, task.unwrap(variables)
    model = vars(task).get("model")
    if getattr(model, "scan", False):  # a stack of blocks has no cache
        task, variables = dataclasses.replace(task, model=model.clone(scan=False)), unstack_blocks(variables)
    return task, variables


def _inputs(spec: Mapping[str, jax.ShapeDtypeStruct], lengths: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs of any number of rows; and where ``lengths``, sequences of any number of tokens up to the model's."""
    longest = max((x.shape[0] for x in spec.values() if x.dtype == jnp.int32 and len(x.shape) == 1), default=0)
    scope = jax_export.SymbolicScope([f"length <= {longest}"] if lengths and longest > 1 else ())
    batch, length = (jax_export.symbolic_shape(name, scope=scope)[0] for name in ("batch", "length"))

    def shape(x: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
        return (length,) if lengths and longest > 1 and x.shape == (longest,) else x.shape

    return {name: jax.ShapeDtypeStruct((batch, *shape(x)), x.dtype) for name, x in spec.items()}


def _export(program: Any, inputs: tuple[Any, ...], platform: str) -> jax_export.Exported:
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("device",), abstract_device=device)), _without_paths():
        return jax_export.export(jax.jit(program), platforms=[platform])(*inputs)


@contextlib.contextmanager
def _without_paths() -> Iterator[None]:
    """Programs name the files that their operations come from, here without the folders of this machine."""
    name = "jax_hlo_source_file_canonicalization_regex"
    before = getattr(jax.config, name)
    jax.config.update(name, ".*/")
    try:
        yield
    finally:
        jax.config.update(name, before)
