"""The architecture's own rules: imports point one way, no TensorFlow, one loop of readable length."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "bigbase_jax"
CORE = {"bigbase_jax.core", "bigbase_jax.redact", "bigbase_jax.signals", "bigbase_jax.untrusted", "bigbase_jax.whole"}
ALLOWED = {  # file or folder -> what of ours it may import; folders may import their own siblings
    "adapt.py": CORE | {"bigbase_jax.parallel"},
    "compare": CORE | {f"bigbase_jax.{name}" for name in ("build", "log", "page", "report", "rundir")},
    "core.py": set(),
    "command_line.py": CORE | {"bigbase_jax.build"},
    "build.py": CORE,
    "checkpoint.py": CORE | {"bigbase_jax.log"},
    "decoding.py": CORE,
    "distributed.py": CORE,
    "optim.py": CORE,
    "parallel.py": CORE,
    "rundir.py": CORE | {"bigbase_jax.checkpoint", "bigbase_jax.log"},
    "untrusted.py": {"bigbase_jax.core"},
    "sandbox.py": set(),
    "evaluate.py": CORE | {"bigbase_jax.parallel"},
    "chips.py": set(),
    "topology.py": CORE | {"bigbase_jax.build", "bigbase_jax.chips"},
    "hlo.py": set(),
    "log.py": CORE | {"bigbase_jax.build", "bigbase_jax.chips"},
    "spelling.py": CORE | {"bigbase_jax.data.tokenizer"},
    "page.py": CORE,
    "report.py": CORE | {"bigbase_jax.log", "bigbase_jax.page"},
    "doctor": set(),
    "inference": CORE
    | {f"bigbase_jax.{name}" for name in ("build", "checkpoint", "data", "log", "parallel", "restored", "rundir")}
    | {f"bigbase_jax.{name}" for name in ("pretrained", "tasks", "whole")},
    "data": CORE | {"bigbase_jax.sandbox", "bigbase_jax.build"},
    "models": set(),
    "pretrained": CORE
    | {
        f"bigbase_jax.{name}"
        for name in ("build", "checkpoint", "data.tokenizer", "log", "models", "restored", "rundir")
    },
    "restored.py": CORE | {f"bigbase_jax.{name}" for name in ("build", "checkpoint", "parallel", "rundir")},
    "tasks": CORE | {"bigbase_jax.build", "bigbase_jax.models", "bigbase_jax.data.tokenizer", "bigbase_jax.decoding"},
}
NEUTRAL = ("train.py", "evaluate.py", "parallel.py", "checkpoint.py", "distributed.py", "inference/predictor.py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "bigbase_jax":
                yield from (f"bigbase_jax.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    key = relative.parts[0]
    ours = {name for name in imports_of(path) if name.startswith("bigbase_jax")}
    if key in ALLOWED:
        siblings = {name for name in ours if name.startswith(f"bigbase_jax.{key}")}
        extra = {n for n in ours - siblings if not any(n == a or n.startswith(a + ".") for a in ALLOWED[key])}
        assert not extra, f"{relative} may not import {sorted(extra)}"
    foreign = {name.partition(".")[0] for name in imports_of(path)}
    assert not foreign & {"tensorflow", "torch", "transformers"}
    if relative.name != "checkpoint.py":
        assert "orbax" not in foreign


def test_the_loop_can_be_read_in_one_sitting():
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 300
    assert len((ROOT / "launch.py").read_text().splitlines()) < 120


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_core_knows_no_modality(name):
    spoken = set()
    for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
        for field in ("id", "attr", "arg", "name", "value"):
            word = getattr(node, field, None)
            if isinstance(word, str) and word.isidentifier():
                spoken |= set(word.lower().split("_"))
    modal = {
        "image",
        "images",
        "picture",
        "pictures",
        "text",
        "token",
        "tokens",
        "audio",
        "resnet",
        "label",
        "accuracy",
    }
    assert not spoken & modal
    assert "step" in spoken or "batches" in spoken  # it did look


def test_pmap_is_never_called():
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "configs").glob("*.py")]:
        assert "jax.pmap" not in path.read_text()


def test_importing_everything_needs_neither_tensorflow_nor_torch_nor_transformers():
    code = (
        "import sys, pkgutil, importlib, bigbase_jax\n"
        "for m in pkgutil.walk_packages(bigbase_jax.__path__, 'bigbase_jax.'): importlib.import_module(m.name)\n"
        "bad = {'tensorflow', 'torch', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
