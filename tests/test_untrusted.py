"""Nothing that comes in a folder is code: configs that name what they may not, and what may be named; through every
verb that opens a folder. What starts a process or imports the stranger's module is seen by the interpreter's audit."""

import dataclasses
import io
import json
import os
import pathlib
import pickle
import runpy
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict
from test_launch import launch

from bigbase_jax import build as building
from bigbase_jax import pretrained, verbs
from bigbase_jax.build import build, deferred, locate, target, trust, trust_config
from bigbase_jax.core import UserError
from bigbase_jax.data import cache
from bigbase_jax.data.sources.image.tfds import Tfds
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import Style
from bigbase_jax.plan import plan
from bigbase_jax.pretrained import folder as folders
from bigbase_jax.pretrained import schema
from bigbase_jax.pretrained.families import COMMON, FAMILIES, load_family
from bigbase_jax.pretrained.start import resolve
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.runtime.untrusted import file_in, read_object
from bigbase_jax.wrappers.adapter import load_adapter
from bigbase_jax.wrappers.lora import LoRA

RAN: list[str] = []
_WATCHED = (
    "os.system",
    "subprocess.Popen",
    "os.posix_spawn",
    "os.exec",
    "os.fork",
    "pickle.find_class",
)
_watching = False


def _see(event, args):
    if _watching and (event in _WATCHED or (event == "import" and args[0] == "stranger")):
        RAN.append(f"{event} {args[:1]}")


sys.addaudithook(_see)  # stays for the life of the process, and is still outside of these tests


@pytest.fixture(autouse=True)
def canary(tmp_path, monkeypatch):
    """A file that every attempt tries to make; none does, and no process is started."""
    global _watching
    path = tmp_path / "canary"
    for name in ("_trusted", "_named"):
        monkeypatch.setattr(building, name, set(getattr(building, name)) - {"os:system"})
    (tmp_path / "stranger.py").write_text(f"open({str(path)!r}, 'w')\ndef model(**_): return None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    RAN.clear()
    _watching = True
    yield path
    _watching = False
    assert not path.exists() and not RAN and "stranger" not in sys.modules


def hostile(canary):
    """Nodes that would run something, by what they are."""
    shell = {"command": f"touch {canary}"}
    return {
        "a shell": {"target": "os:system", **shell},
        "a shell by another name": {"target": "posix:system", **shell},
        "a process": {"target": "subprocess:run", "args": ["touch", str(canary)]},
        "a process through our module": {
            "target": "bigbase_jax.runtime.rundir:subprocess.run",
            "args": ["touch", str(canary)],
        },
        "a shell through our module": {"target": "bigbase_jax.runtime.rundir:os.system", **shell},
        "a function through flax": {"target": "flax.linen.module:functools.reduce", **shell},
        "a shell by a method's globals": {"target": "bigbase_jax.models.cnn:ConvNet.setup.__globals__.get", **shell},
        "the interpreter": {"target": "builtins:exec", "source": f"open({str(canary)!r}, 'w')"},
        "a pickle": {"target": "pickle:loads", "data": ""},
        "a script": {"target": "runpy:run_path", "path_name": "stranger.py"},
        "a module beside it": {"target": "stranger:model"},
        "a deferred shell": {"target": "os:system", "deferred": True, **shell},
        "a partial": {"target": "functools:partial", "func": {"target": "os:system", **shell}},
        "an import": {"target": "importlib:import_module", "name": "stranger"},
        "an import by our module": {"target": "bigbase_jax.build:importlib.import_module", "name": "stranger"},
        "our processes": {"target": "bigbase_jax.runtime.distributed:spawn", "count": 2, "lost_after": 1.0},
        "our workers": {"target": "bigbase_jax.sweep.command:_Child", "index": 0, "place": None},
        "our locate": {"target": "bigbase_jax.build:locate", "path": "os:system"},
        "our trust": {"target": "bigbase_jax.build:trust"},
        "our log": {"target": "bigbase_jax.runtime.log:Log", "workdir": str(canary), "total_steps": 1},
        "our cache": {"target": "bigbase_jax.data.cache:Writer", "root": str(canary), "key": "x"},
        "our folder": {"target": "bigbase_jax.runtime.rundir:RunDir.write_json", "self": None, "name": str(canary)},
        "a file that numpy writes": {"target": "jax.numpy:save", "file": str(canary), "arr": [1]},
        "a file that numpy reads": {"target": "jax.numpy:load", "file": "stranger.npy", "allow_pickle": True},
        "a trace": {"target": "jax.profiler:start_trace", "log_dir": str(canary)},
        "a callback": {"target": "jax.debug:callback", "callback": {"target": "os:system", **shell}},
        "a checkpoint": {"target": "flax.training.checkpoints:save_checkpoint", "ckpt_dir": str(canary)},
        "no name": {"target": "os.system", **shell},
        "no text": {"target": ["os:system"], **shell},
        "a node for a name": {"target": {"target": "os:system", **shell}},
    }


KINDS = sorted(hostile("x"))
NAMED = [kind for kind in KINDS if ":" in hostile("x")[kind]["target"]]


@dataclasses.dataclass(frozen=True)
class Box:
    value: object = None


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_config_may_not_name_is_refused_and_said(canary, kind):
    node = hostile(canary)[kind]
    before = set(sys.modules)
    for wrapped in (node, ConfigDict({"a": node}), {"list": [1, (2, node)]}, target(nn.Sequential, layers=(node,))):
        with pytest.raises(UserError) as refused:
            build(wrapped)
    said = str(refused.value)
    assert "\n" not in said and (("--trust=" in said and repr(node["target"]) in said) or "must read" in said)
    assert {name.partition(".")[0] for name in set(sys.modules) - before} <= {"bigbase_jax", "optuna", "sqlalchemy"}


@pytest.mark.parametrize(
    "path",
    [
        "optax:adamw",
        "optax.contrib:muon",
        "optax:nadam",  # a partial of adam
        "jax.nn:silu",
        "jax.nn.initializers:normal",
        "flax.linen:Dense",
        "flax.linen.linear:Dense",
        "bigbase_jax.models.vit:ViT",
        "bigbase_jax.data.sources.image.folder:ImageFolder",
        "bigbase_jax.parallel:MeshShape",
    ],
)
def test_models_tasks_data_and_functions_may_be_named(path):
    assert callable(locate(path))


def test_every_recipe_names_only_what_a_folder_may_name(monkeypatch):
    """So that a run of ours opens without a flag, wherever it is."""
    monkeypatch.setattr(building, "_named", set())
    named = []
    for recipe in sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py")):
        for arg in ("tiny", "tiny,adapt=lora", "tiny,data=folder,root=a", "tiny,root=a"):
            try:
                config = runpy.run_path(str(recipe))["get_config"](arg)
            except UserError:
                continue
            trust_config(config)
            named += building._named
    building._named.clear()
    assert len(set(named)) > 30
    for path in set(named):
        locate(path)


def test_code_of_this_process_and_packages_that_are_trusted_may_be_named(tmp_path):
    (tmp_path / "helpful.py").write_text(
        "import os, subprocess, functools\n"
        "class Model:\n    def __init__(self, x=1): self.x = x\n    def method(self): pass\n"
        "def made(x): return x\nshell = os.system\nrun = functools.partial(os.system, 'true')\nmodel = Model()\n"
    )
    node = ConfigDict({"target": "helpful:Model", "x": 3})
    with pytest.raises(UserError, match="add --trust=helpful"):
        build(node)
    assert "helpful" not in sys.modules
    trust_config(ConfigDict({"task": [node]}))  # as that of --config does, where it is written as text
    assert build(node).x == 3
    with pytest.raises(UserError, match="add --trust=helpful"):
        locate("helpful:made")  # which no recipe has named
    trust("helpful")
    assert locate("helpful:made")(4) == 4
    for name in ("shell", "run", "os.system", "subprocess.run", "Model.__class__", "Model.mro", "made.__call__"):
        with pytest.raises(UserError, match="--trust=|has no|not something"):
            locate(f"helpful:{name}")
    import helpful

    assert build(ConfigDict(deferred(helpful.made, x=1).to_dict()))() == 1
    with pytest.raises(UserError, match="is no name of a package"):
        trust("os;system")


def test_facts_are_values_and_never_nodes(canary):
    node = hostile(canary)["a shell"]
    assert build(target(Box), {"value": node}).value == node
    assert build(target(Box), {"value": [[4, 8], "x"]}).value == ((4, 8), "x")


# ---------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What opening a run reads before its checkpoint."""
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "configs" / "catdog.py"))["get_config"]("tiny")
    run = RunDir(tmp_path_factory.mktemp("runs") / "run")
    run.create(config, "f")
    shapes = {"image": [[16, 32, 32, 3], "uint8"], "label": [[16], "int32"], "mask": [[16], "float32"]}
    run.write_json("data.json", {"dataset_info": {"num_classes": 2, "class_names": ["cat", "dog"]}, "batch": shapes})
    run.write_json("lineage.json", {"data": {"fingerprint": "f"}})
    run.write_json("eval-test.json", {"split": "test", "step": 1, "loss": 1.0})
    return run.path


def spoiled(folder, tmp_path, place, node):
    """A copy of the run whose config has ``node`` at ``place``."""
    shutil.copytree(folder, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    at = config
    *parents, last = place.split(".")
    for key in parents:
        at = at[int(key) if key.isdigit() else key]
    at[int(last) if last.isdigit() else last] = node
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    return tmp_path / "run"


VERBS = {
    "eval": (
        lambda path: verbs.evaluate(path),
        "data data.dataset data.eval_transforms data.eval_transforms.0 data.train_transforms.1 data.seed data.workers "
        "train.mesh task task.model task.model.stages task.model.stages.0 task.mean",
    ),
    "predict": (lambda path: verbs.predict(path, __file__), "task task.model task.model.norm"),
    "export": (lambda path: verbs.export(path), "task task.model task.label_smoothing"),
    "generate": (lambda path: verbs.generate(path, ["x"]), "task.model task"),
    "init_from": (lambda path: build(resolve(recipe(path)).task), "task.model task.model.pool task.model.stages"),
    "plan": (lambda path: plan.run(resolve(recipe(path)), "cpu:1"), "task.model"),
    "report": (lambda path: verbs.report(path), "task task.model data.dataset"),
    "compare": (lambda path: verbs.compare([path]), "task.model data.dataset train.mesh optim.algorithm"),
}
ATTEMPTS = [(verb, place) for verb, (_, places) in VERBS.items() for place in places.split()]


def recipe(path):
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "configs" / "catdog.py"))["get_config"]("tiny")
    config.init_from = path
    return config


@pytest.mark.parametrize(("verb", "place"), ATTEMPTS)
def test_no_verb_runs_what_a_runs_config_names(verb, place, folder, canary, tmp_path, capsys):
    kind = NAMED[ATTEMPTS.index((verb, place)) % len(NAMED)]
    path = spoiled(folder, tmp_path, place, hostile(canary)[kind])
    try:
        VERBS[verb][0](str(path))
        said = capsys.readouterr().err
    except UserError as error:
        said = str(error)
    builds = {"compare": False, "report": "task" in place}  # a comparison, of several runs; a report, the task alone
    assert "--trust=" in said or not builds.get(verb, True)


@pytest.mark.parametrize("where", ["data.json", "a trial's folder", "predictions", "a word", "depth", "pipe"])
def test_other_files_of_a_run_are_data_too(where, folder, canary, tmp_path):
    node = hostile(canary)["a shell"]
    path = spoiled(folder, tmp_path, "seed", 0)
    if where == "data.json":
        found = json.loads((path / "data.json").read_text())
        (path / "data.json").write_text(json.dumps({**found, "dataset_info": {"num_classes": node}}))
        with pytest.raises(UserError, match="what is known of data is numbers and texts"):
            verbs.export(str(path))
    elif where == "a trial's folder":
        sweep = tmp_path / "sweep"
        shutil.copytree(spoiled(folder, tmp_path / "a", "task.model", node), sweep / "trial-0000")
        shutil.copytree(path, sweep / "trial-0001")
        assert verbs.compare([str(sweep)])["runs"] == 2
    elif where == "predictions":
        np.savez(path / "predictions-test.npz", probabilities=np.array([Opens(str(canary))], object), label=np.zeros(1))
        verbs.report(str(path))
        verbs.compare([str(path)])
    elif where == "a word":
        (path / "config.json").write_text(json.dumps({"get": node, "task": node}))
        with pytest.raises(UserError, match="holds no config|names"):
            verbs.export(str(path))
    elif where == "depth":
        for text in ("[" * 100_000 + "]" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "[" * 65 + "]" * 65):
            (path / "config.json").write_text(text)
            for opens in (verbs.export, verbs.report, lambda p: pretrained.load(p), lambda p: resolve(recipe(p))):
                with pytest.raises(UserError, match="nested (deeper|too deep)"):
                    opens(str(path))
    else:
        (path / "config.json").unlink()
        os.mkfifo(path / "config.json")
        with pytest.raises(UserError, match="a named pipe"):
            verbs.export(str(path))


class Opens:
    """What a pickle does when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


# ---------------------------------------------------------------------------------------------------- published folders


GPT2 = {"vocab_size": 61, "length": 8, "width": 12, "depth": 1, "heads": 3, "style": Style(kernel_init="normal")}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    model = Decoder(**GPT2)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    path = tmp_path_factory.mktemp("published") / "gpt2"
    pretrained.save(path, model, variables)
    (path / "tokenizer.json").write_text('{"version": "1.0"}')
    return path


def edited(published, tmp_path, name="config.json", **words):
    path = tmp_path / "gpt2"
    shutil.copytree(published, path)
    old = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps({**old, **words}))
    return path


def language(path):
    config = runpy.run_path(str(pathlib.Path(__file__).parents[1] / "configs" / "lm.py"))["get_config"]("tiny")
    config.init_from = str(path)
    return config


OPENS = {
    "load": lambda path: pretrained.load(path),
    "generate": lambda path: verbs.generate(str(path), ["x"], out=io.StringIO()),
    "init_from": lambda path: resolve(language(path)),
    "plan": lambda path: plan.run(resolve(language(path)), "cpu:1"),
}
READ = sorted({**COMMON, **load_family("gpt2").SCHEMA})


@pytest.mark.parametrize("key", READ)
def test_no_key_of_a_published_config_is_a_node(key, published, canary, tmp_path):
    node = hostile(canary)[KINDS[READ.index(key) % len(KINDS)]]
    for i, value in enumerate((node, [node], {"a": node})):
        path = edited(published, tmp_path / str(i), **{key: value})
        with pytest.raises(UserError, match=key if key != "model_type" else "of which there is no table"):
            OPENS[sorted(OPENS)[(READ.index(key) + i) % len(OPENS)]](path)


def test_keys_that_are_not_read_go_nowhere(published, canary, tmp_path):
    path = edited(published, tmp_path, unknown=hostile(canary)["a shell"], attn_pdrop=[hostile(canary)["a pickle"]])
    assert pretrained.load(path)[0] == Decoder(**GPT2, mlp_dim=48)
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    pretrained.record_origin(run, ConfigDict({"init_from": str(path)}))
    assert "touch" not in (run.path / "start" / "config.json").read_text()


WRONG = {
    "gpt2": [("n_head", 0), ("n_head", 5), ("n_head", -3), ("n_embd", 2**40), ("n_layer", 10**6), ("vocab_size", 1.5)],
    "llama": [
        ("rope_scaling", {"rope_type": "linear", "factor": {"target": "os:system"}}),
        ("rope_scaling", {"rope_type": "linear", "factor": 0}),
        ("rope_scaling", "linear"),
        ("rope_theta", float("nan")),
        ("num_key_value_heads", 4),
        ("layer_types", ["full_attention"] * 5000),
        ("intermediate_size", True),
        ("hidden_act", ["silu"]),
    ],
    "bert": [("layer_norm_eps", -1), ("pad_token_id", 4_000_000_000), ("id2label", {"0": {"target": "os:system"}})],
    "t5": [("relative_attention_num_buckets", 0), ("d_kv", 0), ("feed_forward_proj", 3)],
    "marian": [("encoder_attention_heads", 7), ("scale_embedding", "yes")],
    "clip": [
        ("projection_dim", 0),
        ("text_config", {"num_attention_heads": 7, "hidden_size": 12}),
        ("vision_config", 3),
    ],
    "siglip": [("text_config", {"vocab_size": -1}), ("vision_config", {"vision_use_head": False})],
    "vit": [("image_size", [10, 10**9]), ("patch_size", 0), ("num_channels", [3])],
    "resnet": [("depths", [2, 2, 10**9, 2]), ("hidden_sizes", [{"target": "os:system"}] * 4)],
    "resnet_cifar": [("depth", 10**9), ("shortcut", "eval")],
    "whisper": [("num_mel_bins", 0), ("max_source_positions", 10**9), ("encoder_layers", True)],
    "wav2vec2": [("conv_stride", [5, 0]), ("conv_dim", [10**9]), ("feat_extract_norm", "batch")],
    "detr": [("d_model", 2**40), ("encoder_attention_heads", 5), ("num_queries", 0), ("backbone_config", ["resnet50"])],
    "rt_detr": [("num_queries", 10**9), ("hidden_expansion", float("nan")), ("encode_proj_layers", [0] * 5000)],
    "facenet": [("embedding_size", 0), ("embedding_size", 10**9)],
    "mtcnn": [("num_points", 68)],
    "yolos": [("num_detection_tokens", True), ("image_size", [10, 10**9]), ("use_mid_position_embeddings", {})],
    "vits": [("upsample_rates", [8, 10**6]), ("resblock_dilation_sizes", [[1, 0]]), ("num_speakers", 2.5)],
}


@pytest.mark.parametrize(("family", "key", "value"), [(name, *pair) for name, pairs in WRONG.items() for pair in pairs])
def test_values_out_of_bounds_are_one_sentence(family, key, value, tmp_path):
    beside = {"n_embd": 12, "num_attention_heads": 6, "d_model": 12, "model_type": family, key: value}
    (tmp_path / "config.json").write_text(json.dumps(beside))
    with pytest.raises(UserError) as refused:
        pretrained.load(tmp_path)
    said = str(refused.value)
    assert "config.json" in said and key in said and ("it must be" in said or "only" in said) and len(said) < 400
    inside = "factor" if isinstance(value, dict) and "factor" in value else None
    inside = next(iter(value)) if isinstance(value, dict) and key in ("text_config", "vision_config") else inside
    shown = value if inside is None else value[inside]
    assert repr(shown)[:20] in said


def test_every_family_checks_what_it_reads(monkeypatch):
    """A key that is read and has no type is a mistake of ours, not of the folder's."""
    assert set(FAMILIES.values()) == set(WRONG)
    config = schema.Checked({"n_embd": 12}, {"n_embd": schema.WIDTH}, "here")
    with pytest.raises(AssertionError, match="read and not checked"):
        config.get("other")
    with pytest.raises(UserError, match="here has no 'model_type'"):
        schema.Checked({}, {"model_type": schema.WORD}, "here")["model_type"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("generation_config.json", {"eos_token_id": [{"target": "os:system"}]}),
        ("generation_config.json", {"eos_token_id": 4_000_000_000}),
        ("generation_config.json", {"max_length": -1}),
    ],
)
def test_how_a_folder_writes_is_checked(name, words, published, tmp_path):
    path = edited(published, tmp_path, name, **words)
    with pytest.raises(UserError, match=f"{name} has {next(iter(words))}="):
        folders.generation(path)


def test_how_pictures_are_normalised_is_checked(tmp_path, canary):
    words = {"model_type": "resnet", "embedding_size": 4, "depths": [2, 2, 2, 2], "layer_type": "basic"}
    (tmp_path / "config.json").write_text(json.dumps({**words, "hidden_sizes": [4, 8, 16, 32]}))
    for std in ([hostile(canary)["a shell"]] * 3, [0, 1, 1], "0.5", [float("inf")] * 3):
        given = {"image_mean": [0.5, 0.5, 0.5], "image_std": std}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
        with pytest.raises(UserError, match="preprocessor_config.json has image_std="):
            resolve(recipe(str(tmp_path)))


def test_an_adapter_is_data(canary, tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    shell, task = hostile(canary)["a shell"], LoRA.__new__(LoRA)
    words = {"kind": "LoRA", "rank": 2, "alpha": 1.0, "targets": ".", "dropout": 0.0, "modules_to_save": None}
    for change, sentence in (
        ({"kind": shell}, "known here are those"),
        ({"rank": shell}, "has rank=.*; it must be int"),
        ({"base_model_name_or_path": shell}, "has base_model_name_or_path=.*; it must be str"),
        ({}, "cannot be read"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**words, **change}))
        with pytest.raises(UserError, match=sentence):
            load_adapter(tmp_path, task, {})
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deep"):
        load_adapter(tmp_path, task, {})


# -------------------------------------------------------------------------------------------------------- links, caches


def test_links_out_of_a_folder_are_not_followed_and_those_of_a_cache_are(published, tmp_path):
    (tmp_path / "secret").write_text('{"a": "of another"}')
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        path = edited(published, tmp_path / name)
        (path / name).unlink(missing_ok=True)
        (path / name).symlink_to(tmp_path / "secret")
        run = RunDir(tmp_path / name / "run")
        run.path.mkdir()
        config = ConfigDict({"init_from": str(path)})
        opens = {"config.json": pretrained.load, "model.safetensors": pretrained.load}
        with pytest.raises(UserError, match="outside of its folder"):
            opens.get(name, lambda _, run=run, config=config: pretrained.record_origin(run, config))(path)
        assert not list(run.path.rglob(name))

    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "1f"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in published.iterdir():
        shutil.copy(file, blobs / f"h-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/h-{file.name}")
    assert pretrained.load(snapshot)[0].width == 12
    assert file_in(snapshot, "tokenizer.json") and file_in(snapshot, "nothing") is None
    shutil.rmtree(blobs)
    blobs.symlink_to(tmp_path)  # a cache that somebody sent
    (snapshot / "more.json").symlink_to("../../blobs/secret")
    with pytest.raises(UserError, match="outside of its folder"):
        read_object(snapshot / "more.json")


def test_caches_say_no_addresses_of_objects(tmp_path):
    """An array of Python objects in a file is their addresses, which the interpreter would follow."""
    index = {"length": 1, "about": {}, "entries": {"x": {"dtype": "|O", "shape": [1]}}}
    folder = tmp_path / "cache-k"
    folder.mkdir()
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "0.bin").write_bytes(bytes(8))
    assert cache.find(tmp_path, "k") is None
    index["entries"]["x"]["dtype"] = "<i8"
    (folder / "index.json").write_text(json.dumps(index))
    assert cache.find(tmp_path, "k")[0]["x"] == 0


def test_what_is_deleted_from_a_place_of_caches_is_caches(tmp_path):
    for name, inside in (
        ("tmp-mine", "notes.txt"),
        ("cache-mine", "thesis.tex"),
        ("tmp-0", "data.bin"),
        ("cache-0", "x.npy"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / inside).write_bytes(b"x" * 9)
        (tmp_path / name / "data.bin").write_bytes(b"x" * 9)
        for path in ((tmp_path / name / inside), (tmp_path / name / "data.bin"), (tmp_path / name)):
            os.utime(path, (0, 0))
    cache.prune(tmp_path, 0)
    assert {path.name for path in tmp_path.glob("*-*")} == {"tmp-mine", "cache-mine"}


def test_pickles_are_never_read(tmp_path, canary):
    assert pickle.dumps(Opens(str(canary)))
    for file in pathlib.Path(building.__file__).parent.rglob("*.py"):
        text = file.read_text()
        assert "allow_pickle=True" not in text and ("import pickle" not in text or file.stem == "study"), file
    with pytest.raises(UserError, match="is no data set's name"):
        Tfds("somebody:data")


def test_the_state_of_a_sampler_is_arrays(canary):
    optuna = pytest.importorskip("optuna")
    cmaes = pytest.importorskip("cmaes")
    from bigbase_jax.sweep.study import _CmaEs

    sampler = _CmaEs()

    def restored(state):
        attributes = {f"{sampler._attr_key_optimizer}:0": pickle.dumps(state).hex()}
        return sampler._restore_optimizer([optuna.trial.create_trial(value=1.0, system_attrs=attributes)])

    with pytest.raises(UserError, match=r"asks for \w+\.open"):
        restored(Opens(str(canary)))
    global _watching
    _watching = False
    for kind in (cmaes.CMA, cmaes.SepCMA):
        assert restored(kind(np.ones(2), 1.0)).mean.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------- through the launcher


def test_a_hostile_folder_ends_with_one_sentence(published, canary, tmp_path):
    path = edited(published, tmp_path, layer_norm_epsilon=hostile(canary)["a shell"])
    global _watching
    _watching = False  # the launcher is a process
    _, out, err = launch("--mode=generate", f"--workdir={path}", "--prompt=x", status=2)
    assert not out and len(err.strip().splitlines()) == 1
    assert "config.json has layer_norm_epsilon={'target': 'os:system'" in err and "a number from 0 to 1" in err


def test_a_run_with_code_of_the_users_own_opens_with_a_flag(folder, canary, tmp_path):
    (tmp_path / "darker.py").write_text(
        "import dataclasses\n\n\n@dataclasses.dataclass(frozen=True)\nclass Darker:\n    by: int = 2\n\n"
        "    def __call__(self, example, rng):\n        return {**example, 'image': example['image'] // self.by}\n"
    )
    (tmp_path / "recipe.py").write_text(
        "import runpy\nfrom bigbase_jax.build import target\nfrom darker import Darker\n\n\ndef get_config(arg=None):\n"
        "    config = runpy.run_path('configs/catdog_mlp.py')['get_config']('tiny')\n"
        "    config.data.eval_transforms = (target(Darker), *config.data.eval_transforms)\n    return config\n"
    )
    global _watching
    _watching = False
    run, path = f"--workdir={tmp_path / 'run'}", {"PYTHONPATH": str(tmp_path)}
    trained, _, _ = launch(f"--config={tmp_path / 'recipe.py'}", run, **path)
    with pytest.raises(UserError, match=r"config.data.eval_transforms\[0\] names 'darker:Darker'.*add --trust=darker"):
        verbs.evaluate(str(tmp_path / "run"))
    assert "darker" not in sys.modules
    assert launch("--mode=eval", run, "--trust=darker", **path)[0] == trained
