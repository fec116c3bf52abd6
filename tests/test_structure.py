"""The architecture's own rules: imports point one way, no TensorFlow, one loop of readable length."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "bigbase_jax"
LEAVES = ("core", "build", "runtime")
ALLOWED = {  # file or folder -> the files and folders of ours that it may import; folders may import their own siblings
    "__init__": (),
    "core": (),
    "build": ("core",),
    "cli": LEAVES,
    "runtime": ("core", "build", "parallel"),
    "parallel": ("core", "models"),
    "optim": ("core",),
    "evaluate": ("core", "build", "parallel"),
    "models": (),
    "decoding": ("core",),
    "text": LEAVES,
    "audio": (*LEAVES, "models"),
    "data": (*LEAVES, "audio", "models", "text"),
    "tasks": (*LEAVES, "audio", "models", "decoding", "text", "evaluate"),
    "wrappers": (*LEAVES, "parallel", "models", "tasks"),
    "pretrained": (*LEAVES, "models", "text", "wrappers"),
    "inference": (
        *LEAVES,
        "parallel",
        "audio",
        "models",
        "decoding",
        "text",
        "data",
        "tasks",
        "pretrained",
        "wrappers",
    ),
    "export": (
        *LEAVES,
        "parallel",
        "evaluate",
        "models",
        "decoding",
        "text",
        "data",
        "tasks",
        "pretrained",
        "wrappers",
        "inference",
        "compare",
    ),
    "evaluators": (*LEAVES, "audio", "parallel", "evaluate", "models", "tasks", "wrappers", "inference", "compare"),
    "compress": (
        *LEAVES,
        "parallel",
        "models",
        "data",
        "tasks",
        "pretrained",
        "wrappers",
        "inference",
        "export",
        "compare",
    ),
    "train": (*LEAVES, "parallel", "optim", "evaluate", "data", "pretrained"),
    "pages": (*LEAVES, "audio", "compare"),
    "compare": LEAVES,
    "plan": (*LEAVES, "parallel", "optim", "data", "pretrained", "wrappers", "train"),
    "doctor": (),
    "ops": (*LEAVES, "data", "tasks", "pretrained", "wrappers", "inference", "export", "compare", "pages"),
    "serve": (*LEAVES, "audio", "decoding", "text", "data", "inference", "ops"),
    "clean": (*LEAVES, "audio", "data", "inference", "pages"),
    "verbs": (
        *LEAVES,
        "clean",
        "parallel",
        "evaluate",
        "data",
        "pretrained",
        "wrappers",
        "inference",
        "export",
        "compress",
        "compare",
        "pages",
        "ops",
        "serve",
        "train",
    ),
    "sweep": (*LEAVES, "parallel", "optim", "evaluate", "data", "pretrained", "compare", "verbs"),
}
INSIDE = {  # a module that others of its folder build on -> the siblings that it may import
    "runtime.chips": (),
    "runtime.sandbox": (),
    "runtime.redact": (),
    "runtime.signals": (),
    "runtime.whole": (),
    "runtime.memory": (),
    "plan.hlo": (),
    "models.dropout": (),
    "models.layers": (),
    "models.tables": ("layers",),
    "models.rope": ("layers",),
}
NEUTRAL = (
    "train.py",
    "evaluate.py",
    "parallel.py",
    "runtime/checkpoint.py",
    "runtime/distributed.py",
    "inference/predictor.py",
    *(f"serve/{name}.py" for name in ("app", "batcher", "guard", "metrics", "models", "protocol", "requests")),
)


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
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    room = module.partition(".")[0]
    assert room in ALLOWED, f"{room} has no line in ALLOWED: say what it may import"
    ours = {name.removeprefix("bigbase_jax.") for name in imports_of(path) if name.startswith("bigbase_jax.")}
    extra = {name for name in ours if name.partition(".")[0] not in (room, *ALLOWED[room])}
    assert not extra, f"{module} may not import {sorted(extra)}"
    if module in INSIDE:
        siblings = {name for name in ours if name.startswith(f"{room}.")} - {f"{room}.{s}" for s in INSIDE[module]}
        assert not siblings, f"{module} may not import {sorted(siblings)}"
    foreign = {name.partition(".")[0] for name in imports_of(path)}
    assert not foreign & {"tensorflow", "torch", "transformers"}
    if module != "runtime.checkpoint":
        assert "orbax" not in foreign


def test_rooms_point_one_way():
    """No room imports, through others, what imports it."""
    left = dict(ALLOWED)
    while left:
        free = [room for room, needs in left.items() if not set(needs) & set(left)]
        assert free, f"these import each other: {sorted(left)}"
        for room in free:
            del left[room]
    assert set(ALLOWED) == {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}


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
    assert spoken & {"step", "batches", "rows", "serve", "served", "model"}  # it did look


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


def test_every_guide_is_in_the_navigation_and_every_study_has_a_readme():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    named = re.findall(r"\b(\w+\.md)", navigation)
    assert sorted(named) == sorted({path.name for path in (ROOT / "docs").glob("*.md")} | {"results.md"})
    for study in (ROOT / "experiments").iterdir():
        assert (study / "README.md").is_file(), f"{study.name} has no README.md"


def test_every_recipe_says_its_command():
    for path in (ROOT / "configs").glob("*.py"):
        assert f"python launch.py --config=configs/{path.name}" in ast.get_docstring(ast.parse(path.read_text()))
