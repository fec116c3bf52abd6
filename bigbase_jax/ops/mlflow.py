"""MLflow's model registry as a place where versions are announced: for teams whose tools read that one.

A version stays where it was pushed; MLflow is told its folder, its metrics and what its aliases mean. The registry is
the one that MLflow's own MLFLOW_REGISTRY_URI or MLFLOW_TRACKING_URI names.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from typing import Any

from bigbase_jax.core import UserError
from bigbase_jax.ops.registry import Version
from bigbase_jax.runtime import redact

WHERE = ("MLFLOW_REGISTRY_URI", "MLFLOW_TRACKING_URI")
_TAG = "bigbase_jax.version"


def publish(version: Version, aliases: Mapping[str, int]) -> dict[str, Any]:
    """Registers a version, once, and makes MLflow's aliases of its model mean what they mean here.

    Aliases of versions that were not published are left out; those that MLflow alone has stay.

    Args:
      aliases: of the version's model, each with the number of a version.

    Returns:
      ``published``, the version here; ``mlflow``, its number there; ``aliases`` with numbers there.

    Raises:
      UserError: no registry is named, MLflow is not installed, or it refuses.
    """
    uri = next((os.environ[name] for name in WHERE if os.environ.get(name)), None)
    if uri is None:
        raise UserError(f"--do=publish needs to know MLflow's registry: set {WHERE[1]}, such as http://localhost:5000.")
    try:
        mlflow = importlib.import_module("mlflow")
    except ImportError as error:
        raise UserError("--do=publish needs MLflow: pip install 'bigbase_jax[mlflow]'.") from error
    model = version.model
    try:
        client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        known = {found.name for found in client.search_registered_models(f"name='{model}'")}
        if model not in known:
            client.create_registered_model(model)
        numbers = {
            int(found.tags[_TAG]): str(found.version)
            for found in client.search_model_versions(f"name='{model}'")
            if found.tags.get(_TAG, "").isdigit()
        }
        if version.version not in numbers:
            made = client.create_model_version(model, version.folder.absolute().as_uri(), tags=_tags(version))
            numbers[version.version] = str(made.version)
        there = {alias: numbers[number] for alias, number in aliases.items() if number in numbers}
        for alias, number in there.items():
            client.set_registered_model_alias(model, alias, number)
    except mlflow.exceptions.MlflowException as error:
        why = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UserError(f"MLflow's registry refuses {version}: {redact.hide(why)}.") from error
    return {"published": str(version), "mlflow": f"{model}:{numbers[version.version]}", "aliases": there}


def _tags(version: Version) -> dict[str, str]:
    """The version's number, kind, data and metrics, as texts."""
    data, metrics = version.card.get("data") or {}, version.card["metrics"]
    return {
        _TAG: str(version.version),
        "kind": str(version.card["kind"]),
        "data": str(data.get("fingerprint", "")),
        **{
            re.sub(r"[^\w./-]", "_", f"{split}.{name}"): f"{value:.6g}"  # what MLflow takes
            for split, found in metrics.items()
            for name, value in found.items()
        },
    }
