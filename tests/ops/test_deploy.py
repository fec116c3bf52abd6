"""What is deployed names what there is: metrics, probes, flags, and each other."""

import json
import pathlib
import re

import pytest
import yaml

from bigbase_jax.serve.app import create
from bigbase_jax.serve.metrics import Metrics
from bigbase_jax.serve.models import Models

ROOT = pathlib.Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def known():
    """Every series that a server gives, whether or not there is a value yet."""
    kinds = re.findall(r"^# TYPE (\w+) (\w+)$", Metrics().exposition().decode(), re.M)
    ends = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    found = {name + end for name, kind in kinds for end in ends[kind]}
    assert {"bigbase_requests_total", "bigbase_request_seconds_bucket", "bigbase_queue_rows"} <= found
    return found


def manifests():
    return list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))


def series(text):
    return set(re.findall(r"\b(?:bigbase|process)_\w+", text))


def balanced(text):
    return all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))


def test_the_dashboard_shows_metrics_that_there_are(known):
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 8
    for panel in panels:
        assert panel["targets"] and panel["type"] == "timeseries"
        for target in panel["targets"]:
            assert series(target["expr"]) and series(target["expr"]) <= known, target
            assert balanced(target["expr"]), target
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in panels]
    assert len(set(places)) == len(places)


def test_the_alerts_watch_metrics_that_there_are(known):
    (group,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert series(rule["expr"]) and series(rule["expr"]) <= known and balanced(rule["expr"]), rule
        assert rule["labels"]["severity"] in ("warning", "critical") and rule["annotations"]["summary"]
    assert len({rule["alert"] for rule in group["rules"]}) == len(group["rules"]) == 6


def test_the_manifests_fit_the_server_and_each_other(known):
    found = {(x["kind"], x["metadata"]["name"]): x["spec"] for x in manifests()}
    assert len(found) == len(manifests())
    pod = found["Deployment", "bigbase-serve"]["template"]
    (container,) = pod["spec"]["containers"]
    paths = create(Models({})).openapi()["paths"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in paths
    assert pod["metadata"]["annotations"]["prometheus.io/path"] in paths
    assert found["Deployment", "bigbase-serve"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert found["Service", "bigbase-serve"]["selector"].items() <= pod["metadata"]["labels"].items()
    drain = next(int(x.removeprefix("--drain_s=")) for x in container["args"] if x.startswith("--drain_s="))
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > drain + pause
    scaler = found["HorizontalPodAutoscaler", "bigbase-serve"]
    assert ("Deployment", scaler["scaleTargetRef"]["name"]) in found
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] in known
    for (kind, name), spec in found.items():
        inner = spec.get("jobTemplate", {}).get("spec", spec).get("template", {}).get("spec")
        if inner is not None:
            volumes = {volume["name"] for volume in inner["volumes"]}
            for mount in inner["containers"][0]["volumeMounts"]:
                assert mount["name"] in volumes, (kind, name, mount)


def test_every_flag_of_a_recipe_is_one():
    source = (ROOT / "launch.py").read_text() + (ROOT / "bigbase_jax" / "cli.py").read_text()
    flags = set(re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", source))
    docker = (DEPLOY / "Dockerfile").read_text()
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", docker, re.M)[1])
    named = re.findall(r"--(\w+)=", " ".join(entry) + (DEPLOY / "kubernetes.yaml").read_text())
    assert set(named) >= {"mode", "host", "registry", "model", "samples"} and set(named) <= flags
    for line in re.findall(r"^COPY (.*)$", docker, re.M):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
