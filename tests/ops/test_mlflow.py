"""What MLflow is told of a version."""

import json
import sys
import types
import typing

import pytest
from test_registry import make_run

from bigbase_jax.core import UserError
from bigbase_jax.ops import mlflow
from bigbase_jax.ops.command import registry


class MlflowException(Exception):
    pass


class Client:
    """Of MLflow's client, what is asked, over one store."""

    store: typing.ClassVar[dict] = {}

    def __init__(self, tracking_uri, registry_uri):
        self.uri = registry_uri

    def search_registered_models(self, query):
        return [types.SimpleNamespace(name=name) for name in self.store if query == f"name='{name}'"]

    def create_registered_model(self, name):
        if self.uri == "http://closed":
            raise MlflowException("403: not yours.\nmore")
        self.store[name] = ([], {})

    def search_model_versions(self, query):
        return self.store[query.split("'")[1]][0]

    def create_model_version(self, name, source, tags):
        found = types.SimpleNamespace(version=str(41 + len(self.store[name][0])), source=source, tags=tags)
        self.store[name][0].append(found)
        return found

    def set_registered_model_alias(self, name, alias, version):
        self.store[name][1][alias] = version


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(Client, "store", {})
    module = types.ModuleType("mlflow")
    module.MlflowClient, module.exceptions = Client, types.SimpleNamespace(MlflowException=MlflowException)
    monkeypatch.setitem(sys.modules, "mlflow", module)
    for name in mlflow.WHERE:
        monkeypatch.delenv(name, raising=False)


def test_versions_are_published_once_and_aliases_follow(installed, monkeypatch, tmp_path):
    where = str(tmp_path / "registry")
    for accuracy in (0.8, 0.9):
        run = make_run(tmp_path / str(accuracy), accuracy)
        (run / "eval-test.json").write_text(json.dumps({"step": 3, "split": "test", "ndcg@10": accuracy}))
        registry([str(run)], where, "push", ["pets"], why="better")
    registry([], where, "promote", ["pets:2"], alias="production", why="better")
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        registry([], where, "publish", ["pets:1"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://open")
    found = registry([], where, "publish", ["pets:1"])
    assert found == {"published": "pets:1", "mlflow": "pets:41", "aliases": {}}
    for _ in range(2):
        found = registry([], where, "publish", ["pets@production"])
        assert found == {"published": "pets:2", "mlflow": "pets:42", "aliases": {"production": "42"}}
    versions, aliases = Client.store["pets"]
    assert aliases == {"production": "42"}
    assert [x.source for x in versions] == [f"file://{where}/artefacts/pets/{n}" for n in (1, 2)]
    assert versions[1].tags["test.ndcg_10"] == "0.9" and versions[1].tags["kind"] == "run"
    registry([], where, "promote", ["pets:1"], alias="production", why="worse")
    assert registry([], where, "publish", ["pets:1"])["aliases"] == {"production": "41"}


def test_refusals_are_sentences(installed, monkeypatch, tmp_path):
    where = str(tmp_path / "registry")
    registry([str(make_run(tmp_path / "run"))], where, "push", ["pets"])
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://closed")
    with pytest.raises(UserError, match=r"refuses pets:1: 403: not yours\.$"):
        registry([], where, "publish", ["pets"])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(UserError, match=r"pip install 'bigbase_jax\[mlflow\]'"):
        registry([], where, "publish", ["pets"])
