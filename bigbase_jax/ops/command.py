"""``--mode=registry``: what is in service, and what was, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigbase_jax.build import suggest
from bigbase_jax.core import UserError
from bigbase_jax.ops import card, mlflow
from bigbase_jax.ops.features import reference
from bigbase_jax.ops.registry import Registry, Version
from bigbase_jax.runtime.log import say
from bigbase_jax.runtime.rundir import RunDir, differing

_TAKES = {  # what --do may be -> how many of --model, and which other flags it takes
    "push": (1, {"workdir", "why"}),
    "list": (0, set()),
    "show": (1, set()),
    "promote": (1, {"alias", "require", "why"}),
    "rollback": (1, {"why"}),
    "compare": (2, set()),
    "publish": (1, set()),
}


def registry(
    workdirs: Sequence[str],
    registry: str | None,
    do: str = "list",
    models: Sequence[str] | None = None,
    alias: str | None = None,
    require: Sequence[str] | None = None,
    why: str | None = None,
    storage: str | None = None,
) -> dict[str, Any]:
    """One of ``_TAKES`` on the registry of a folder; returns what there is to say, as plain data.

    Args:
      workdirs: the run or the export to push.
      registry: the folder.
      models: NAME, NAME:VERSION or NAME@ALIAS.
      require: see ``card.holds``.
      storage: see ``Registry.open``.

    Raises:
      UserError: a flag too many or too few, or see ``Registry``.
    """
    if registry is None:
        raise UserError("--mode=registry needs --registry: the folder of the registry.")
    if do not in _TAKES:
        raise UserError(f"there is no --do={do}.{suggest(do, _TAKES, 'action')}")
    number, takes = _TAKES[do]
    if len(workdirs) > 1:
        raise UserError(f"--do={do} takes one --workdir, not {len(workdirs)}.")
    given = {"workdir": workdirs, "alias": alias, "require": require, "why": why}
    for name, value in given.items():
        if value and name not in takes:
            raise UserError(f"--do={do} takes no --{name}.")
        if not value and name in takes - {"require"} and (name, do) != ("why", "push"):
            raise UserError(f"--do={do} needs --{name}.")
    models = list(models or ())
    if len(models) != number and not (do == "list" and len(models) == 1):
        raise UserError(f"--do={do} takes {number or 'no'} --model, not {len(models)}.")
    opened = Registry.open(registry, storage, create=do == "push")
    if do == "list":
        return {"models": [_listed(opened, name) for name in models or opened.models()]}
    if do == "show":
        return _shown(opened, opened.resolve(models[0]))
    if do == "push":
        _keep_reference(RunDir(workdirs[0]))
        return _said(opened, opened.push(models[0], workdirs[0], why or ""), "pushed")
    if do == "promote":
        found = opened.find(models[0])
        checks = {f"it does not have {text}": card.holds(text, found.card) for text in require or ()}
        return _said(opened, opened.promote(str(found), alias or "", checks, why or ""), "promoted")
    if do == "publish":
        version = opened.resolve(models[0])
        return mlflow.publish(version, opened.aliases(version.model))
    if do == "rollback":
        return _said(opened, opened.rollback(models[0], why or ""), "rolled back")
    return _compared(*(opened.resolve(name) for name in models))


def _keep_reference(run: RunDir) -> None:
    """What ``--mode=monitor`` holds predictions against goes along with a run, where its data is at hand."""
    try:
        if "task" in run.config_json():
            reference(run)
    except UserError as error:
        say(f"without a reference of its data: {error}")


def _said(registry: Registry, version: Version, what: str) -> dict[str, Any]:
    return {what.replace(" ", "_"): str(version), "aliases": registry.aliases(version.model)}


def _listed(registry: Registry, model: str) -> dict[str, Any]:
    aliases, versions = registry.aliases(model), registry.versions(model)
    for number in versions:
        version = registry.find(f"{model}:{number}")
        names = ", ".join(name for name, other in aliases.items() if other == number)
        say(f"{version!s:<24} {version.card['kind']:<12} {_metrics(version):<40} {names}")
    return {"model": model, "versions": versions, "aliases": aliases}


def _metrics(version: Version) -> str:
    split = card.first_split(version.card["metrics"])
    found = version.card["metrics"].get(split, {})
    return ", ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:3]) + f" ({split})"


def _shown(registry: Registry, version: Version) -> dict[str, Any]:
    history = registry.history(version.model)
    for line in history:
        alias = f" {line['alias']}" if line["alias"] else ""
        say(f"{line['at']} {line['who']}: {line['action']}{alias} -> {line['version']}: {line['why']}")
    return {
        "version": str(version),
        "folder": str(version.folder),
        "bytes": sum(size for size, _ in version.files.values()),
        "aliases": [name for name, number in registry.aliases(version.model).items() if number == version.version],
        **version.card,
        "history": history,
    }


def _compared(a: Version, b: Version) -> dict[str, Any]:
    """What differs between two versions; whether that is more than chance, ``--mode=compare`` of their folders says."""
    metrics: dict[str, list[float | None]] = {}
    for split in dict.fromkeys([*a.card["metrics"], *b.card["metrics"]]):
        x, y = (version.card["metrics"].get(split, {}) for version in (a, b))
        metrics |= {f"{split}.{name}": [x.get(name), y.get(name)] for name in dict.fromkeys([*x, *y])}
    for name, values in metrics.items():
        say(f"{name:<32} {' '.join('–' if v is None else f'{v:<12.5g}' for v in values)}")
    configs = []
    if a.card["kind"] == b.card["kind"] == "run":
        configs = differing(RunDir(a.folder).config_json(), RunDir(b.folder).config_json())
        say(f"is it more than chance? --mode=compare --workdir={a.folder} --workdir={b.folder}")
    data = [(version.card.get("data") or {}).get("fingerprint") for version in (a, b)]
    sizes = [sum(size for size, _ in version.files.values()) for version in (a, b)]
    return {
        "versions": [str(a), str(b)],
        "metrics": metrics,
        "bytes": sizes,
        "same_data": data[0] == data[1],
        "config": configs,
    }
