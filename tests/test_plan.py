import importlib.util
import json
import pathlib
import runpy
import shutil
import subprocess
import sys
import types

import jax
import pytest
from PIL import Image

from bigbase_jax import parallel
from bigbase_jax.core import UserError
from bigbase_jax.plan import plan, topology
from bigbase_jax.runtime.chips import CHIPS, GIB, PLANNED, Chip

pytestmark = pytest.mark.usefixtures("optimized")

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "clean")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed: pip install libtpu"
)


def recipe(name="catdog", arg="tiny,model=vit", **changes):
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"](arg)
    if "vit" in (arg or ""):
        config.task.model.depth = 1
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def small_chip(monkeypatch):
    """CPUs with as much memory as wanted, and no time spent on measuring them."""

    def use(memory):
        fake = Chip("cpu", 1e11, 1e11, memory, 0.0, 1e10, 5e9)
        monkeypatch.setattr(topology, "chip", lambda target: fake)

    use(1e9)
    return use


# ----------------------------------------------------------------------------------------------------------- topologies


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "--mode=plan needs --topology"),
        ("v5x:4x4", "there is no 'v5x'. Did you mean 'v5"),
        ("v5e", "does not say how many devices"),
        ("v5e:0x4", "does not say how many devices"),
        ("v5e:16", "a slice of v5e is v5e:4x4 or the like"),
        ("v5p:4x4", "a slice of v5p is v5p:4x4x4"),
        ("v5e:32x16", "the largest slice of v5e has 256"),
        ("h100:2x4", "write h100:8"),
    ],
)
def test_a_wrong_topology_is_one_sentence(text, said):
    with pytest.raises(UserError, match=said.replace("'", ".")):
        topology.parse(text)


def test_topologies():
    assert topology.parse("V5e:4x8") == topology.Topology("V5e:4x8", "v5e", (4, 8))
    assert topology.parse("v5p:4x4x8").chips == 128
    assert not topology.parse("h100:8").is_tpu and topology.parse("tpu7x:2x2x1").is_tpu
    assert {"v4", "v5e", "v5p", "v6e", "tpu7x", "h100", "h200", "a100"} == set(PLANNED)


def test_without_the_tpu_compiler_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'bigbase_jax\[tpu\]'"):
        topology.devices(topology.parse("v5e:4x4"))


def test_more_simulated_devices_than_there_are():
    jax.devices()  # the backend has started
    with pytest.raises(UserError, match="needs 99 simulated devices"):
        topology.devices(topology.parse("cpu:99"))


def at(*coordinates):
    return [types.SimpleNamespace(coords=c) for c in coordinates]


@pytest.mark.parametrize(
    ("name", "group", "links"),
    [
        ("v5e:4x4", at((0, 0, 0), (1, 0, 0), (2, 0, 0), (3, 0, 0)), 1),  # a row of four does not close
        ("v5e:16x16", at(*((x, 0, 0) for x in range(16))), 2),  # a row of sixteen does
        ("v5e:16x16", at(*((x, y, 0) for x in range(16) for y in range(16))), 4),
        ("v5e:16x16", at(*((x, 0, 0) for x in range(8))), 1),  # half a ring is a line
        ("v5p:4x4x4", at(*((x, y, z) for x in range(4) for y in range(4) for z in range(4))), 6),
        ("tpu7x:2x2x1", at((0, 0, 0), (0, 0, 0)), 6),  # two cores of one chip
    ],
)
def test_the_links_that_a_group_uses(name, group, links):
    target = topology.parse(name)
    assert topology.link_bandwidth(target, CHIPS[target.kind], group) == links * CHIPS[target.kind].link


def test_gpus_share_nvlink_within_a_node_only():
    target, chip = topology.parse("h100:16"), CHIPS["h100"]
    devices = [types.SimpleNamespace(id=i) for i in range(16)]
    assert topology.link_bandwidth(target, chip, devices[8:]) == chip.link == 450e9
    assert topology.link_bandwidth(target, chip, devices) == topology.link_bandwidth(target, chip, devices[7:9]) == 50e9


def test_the_probes_find_a_machine():
    assert 1e8 < topology.measured_flops(256, 0.01) < 1e15
    assert 1e7 < topology.measured_bandwidth(4, 0.01) < 1e14


# ---------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_adds_up(small_chip, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("BIGBASE_CACHE", str(tmp_path / "cache"))
    found = plan.run(recipe(), "cpu:8", price=2.0)
    assert json.loads(json.dumps(found)) == found
    assert "fits" in capsys.readouterr().out
    assert found["parameter_bytes"] == 4 * found["parameters"] == found["ema_bytes"]
    assert found["optimizer_bytes"] == pytest.approx(2 * found["parameter_bytes"], rel=1e-3)
    assert found["batch_bytes"] == 2 * (32 * 32 * 3 + 3 * 4)  # 16 examples over 8 devices
    kinds = "parameter model_state optimizer ema batch prefetched_batch activation_and_temporary program"
    parts = sum(found[f"{kind}_bytes"] for kind in [*kinds.split(), "padding_and_output"])
    assert found["memory_needed_bytes"] == parts < found["memory_usable_bytes"] and found["fits"]
    gradients = 2 * 7 / 8 * found["parameter_bytes"]
    assert found["collective_bytes"] == {"all-reduce": pytest.approx(gradients, rel=1e-3)}
    terms = [found[f"{term}_seconds"] for term in ("compute", "memory", "interconnect")]
    assert found["step_seconds_roofline"] == max(terms) < found["step_seconds"] == sum(terms)
    assert found["compute_seconds"] == pytest.approx(found["matmul_flops"]["f32"] / 1e11)
    assert found["hours"] == found["steps"] * found["step_seconds"] / 3600 and found["steps"] == 8
    assert found["cost_usd"] == pytest.approx(found["hours"] * 8 * 2.0)
    assert found["mfu"] == pytest.approx(found["flops"] / found["step_seconds"] / 1e11)
    assert not (tmp_path / "cache").exists()  # nothing was decoded for later
    served = found["served_bytes"]
    assert served["float32"] == found["parameter_bytes"] + found["model_state_bytes"]
    assert served["int4"] < served["int8_weights"] < served["int8"] < served["float32"]


def test_meshes_and_microbatches_change_what_they_should(small_chip):
    whole = plan.run(recipe(), "cpu:8")
    pieces = plan.run(recipe(**{"train.mesh.data": 1, "train.mesh.fsdp": 8}), "cpu:8")
    assert pieces["mesh"]["fsdp"] == 8
    assert pieces["parameter_bytes"] < 0.3 * whole["parameter_bytes"]
    assert pieces["collective_bytes"]["all-gather"] > 0 and "all-gather" not in whole["collective_bytes"]
    products = pytest.approx(sum(whole["matmul_flops"].values()), rel=1e-3)
    assert sum(pieces["matmul_flops"].values()) == products
    sliced = plan.run(recipe(**{"train.microbatches": 2}), "cpu:8")
    assert sum(sliced["matmul_flops"].values()) == products  # the loop counts twice


def test_a_recipe_with_the_wrong_batch_is_one_sentence(small_chip):
    with pytest.raises(UserError, match="does not divide over 8 devices; use 8 or 16"):
        plan.run(recipe(**{"data.batch_size": 12}), "cpu:8")
    with pytest.raises(UserError, match="below 0"):
        plan.run(recipe(), "cpu:8", price=-1.0)


def test_a_run_is_planned_by_its_folder_alone_and_a_quantised_one_as_it_evaluates(small_chip, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(ROOT / "tests" / "earlier" / "pictures", run, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((run / "config.json").read_text())
    config["data"]["dataset"] = {"target": "bigbase_jax.data.sources.image.folder:ImageFolder", "root": "gone"}
    (run / "config.json").write_text(json.dumps(config))
    trained = plan.run(None, "cpu:8", workdir=str(run))
    assert trained["trains"] and trained["fits"] and trained["optimizer_bytes"] > 0
    assert (trained["batch_size"], trained["steps"], trained["parameters"]) == (8, 6, 100 * 4 + 4 + 4 * 2 + 2)
    config["task"] = {
        "target": "bigbase_jax.wrappers.quantised:Quantised", "task": config["task"], "quantize": "int8_weights",
        "stored": True,
    }  # fmt: skip
    (run / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    small = plan.run(None, "cpu:8", workdir=str(run))
    assert not small["trains"] and small["optimizer_bytes"] == 0 and small["steps"] == small["hours"] == 0
    weights = small["parameter_bytes"] + small["model_state_bytes"]
    assert trained["served_bytes"]["int8_weights"] == weights < 0.4 * trained["parameter_bytes"]
    assert 0 < small["flops"] < trained["flops"]
    assert "evaluating" in capsys.readouterr().out
    with pytest.raises(UserError, match="not a run folder"):
        plan.run(None, "cpu:8", workdir=str(tmp_path / "nothing"))


def test_only_one_example_is_read(small_chip, tmp_path):
    for kind in ("cat", "dog"):
        (tmp_path / kind).mkdir()
        for i in range(8):
            (tmp_path / kind / f"{i}.png").write_bytes(b"not a picture")
    for first in tmp_path.glob("*/*.png"):
        Image.new("RGB", (40, 40)).save(first)
        source = recipe(arg=f"tiny,data=folder,root={tmp_path}").data
        try:
            dataset_info, spec, count = plan.read_example(types.SimpleNamespace(data=source))
            break
        except UserError:
            first.write_bytes(b"not a picture")  # not the split's first one
    assert dataset_info["num_classes"] == 2 and count < 16
    assert spec["image"].shape == (16, 32, 32, 3) and spec["mask"].shape == (16,)


def test_a_search_ranks_what_fits(small_chip, capsys):
    found = plan.run(recipe("catdog_mlp", "tiny"), "cpu:8", search=True)
    rows = found["search"]
    assert 3 <= len(rows) <= plan._COMPILATIONS
    assert sum(row["is_the_recipe"] for row in rows) == 1
    assert len({json.dumps([row["mesh"], row["microbatches"], row["remat"]]) for row in rows}) == len(rows)
    times = [row["step_seconds"] for row in rows]
    assert all(row["fits"] for row in rows) and times == sorted(times)
    assert found["step_seconds"] == times[0] and found["flags"] == rows[0]["flags"]
    out, err = capsys.readouterr()
    assert "fastest first" in out and "compiling 1 of at most 12" in err


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_would(small_chip, capsys):
    """Here the state alone fits, but not with all activations."""
    wide = {"data.batch_size": 256, "data.eval_batch_size": 256}
    small_chip(1e9)
    need = plan.run(recipe(**wide), "cpu:8")
    state = need["memory_needed_bytes"] - need["activation_and_temporary_bytes"]
    small_chip(state + 0.6 * need["activation_and_temporary_bytes"])
    capsys.readouterr()
    found = plan.run(recipe(**wide), "cpu:8")
    out, err = capsys.readouterr()
    assert not found["fits"] and "too much" in err and "DOES NOT FIT" in out
    assert found["memory_needed_bytes"] > found["memory_usable_bytes"]
    best = found["search"][0]
    assert best["fits"] and best["flags"] and best["flags"] in out.replace("\n", " ")
    changed = recipe(**wide)
    flags = (flag.removeprefix("--config.").split("=") for flag in best["flags"].split())
    words = {"True": True, "False": False}
    changed.update_from_flattened_dict(
        {key: words.get(value, int(value) if value.isdigit() else value) for key, value in flags}
    )
    assert plan.run(changed, "cpu:8")["fits"]  # with the flags as printed


def test_what_cannot_fit_is_not_compiled(small_chip, capsys):
    small_chip(1e6)
    found = plan.run(recipe(**{"train.mesh.data": 8}), "cpu:8")
    assert not found["fits"] and found["search"][0]["is_the_recipe"] and len(found["search"]) == 1
    assert "nothing that was tried fits" in capsys.readouterr().out


def test_flags_name_every_switch(small_chip):
    target = topology.parse("cpu:8")
    planner = plan.Planner(recipe(), target, topology.devices(target), topology.chip(target))
    as_it_is = planner.recipe()
    assert as_it_is == plan.Choice((8, 1, 1, 1, 1, 1), 1, "off") and planner.flags(as_it_is) == ""
    other = plan.Choice((2, 4, 1, 1, 1, 1), 2, "nothing_saveable")
    assert planner.flags(other).split() == [
        "--config.train.mesh.data=2",
        "--config.train.mesh.fsdp=4",
        "--config.train.microbatches=2",
        "--config.task.model.remat=True",
        "--config.task.model.remat_policy=nothing_saveable",
    ]


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (27.15G) "
            "exceeds available HBM (15.75G).",
            27.15,
        ),
        ("Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.", 21.5),
        ("INTERNAL: something else", None),
    ],
)
def test_the_tpu_compilers_words_for_out_of_memory(message, gib):
    assert plan._out_of_memory(message) == (None if gib is None else pytest.approx(gib * GIB))


def test_the_compilers_seconds():
    assert plan.compiler_seconds(0.25) == 0.25
    assert plan.compiler_seconds(-38.75) == 0.25  # 39 operations without a cost, at -1 each
    assert plan.compiler_seconds(0.0) is None and plan.compiler_seconds(float("nan")) is None


def launch(*args):
    command = [sys.executable, "launch.py", "--mode=plan", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=None)


def test_the_command_line():
    done = launch("--config=configs/catdog_mlp.py:tiny", "--topology=cpu:4", "--price=0.5")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["fits"] and found["cost_usd"] > 0
    assert found["examples_per_second"] > 0 and found["memory_bytes"] > 1e8


# --------------------------------------------------------------------------------------------------------- this machine


def measured(*args):
    script = ROOT / "experiments" / "plans_checked" / "measure.py"
    done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


LINUX = pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")


@LINUX
@pytest.mark.slow
def test_predicted_memory_is_what_a_process_takes():
    small = ["data.batch_size=160", "task.model.depth=2"]
    found = measured("--config=configs/catdog.py:model=vit", "--steps=2", "--set", *small)
    assert found["memory_measured_bytes"] > 2e8
    assert found["memory_predicted_over_measured"] == pytest.approx(1.0, abs=0.1)


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    "args",
    [
        ("--config=configs/catdog.py:model=vit", "--devices=4", "--set", "data.batch_size=64", "train.mesh.fsdp=4"),
        ("--config=configs/catdog.py:model=vit", "--set", "data.batch_size=128", "train.microbatches=4"),
        ("--config=configs/catdog_cnn.py", "--set", "data.batch_size=8"),
    ],
)
def test_predicted_memory_of_other_models(args):
    """Convolutions over many positions are worse on CPUs: experiments/plans_checked."""
    assert measured(*args)["memory_predicted_over_measured"] == pytest.approx(1.0, abs=0.1)


# ----------------------------------------------------------------------------------------------------------------- TPUs


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "kind", "usable"),
    [
        ("v5e:1x1", 1, "TPU v5 lite", 15.75),
        ("v5e:4x4", 16, "TPU v5 lite", 15.75),
        ("v4:4x4x4", 64, "TPU v4", 30.75),
        ("v5p:4x4x4", 64, "TPU v5", 95.74),
        ("v6e:16x16", 256, "TPU v6 lite", 31.25),
        ("tpu7x:2x2x1", 8, "TPU7x", 94.75),
    ],
)
def test_slices_as_the_tpu_compiler_knows_them(name, devices, kind, usable):
    target = topology.parse(name)
    there = topology.devices(target)
    assert len(there) == devices == target.chips * CHIPS[target.kind].per_chip
    assert there[0].device_kind == kind
    assert topology.CHIPS[target.kind].memory - CHIPS[target.kind].reserve == pytest.approx(usable * GIB)


@needs_libtpu
def test_a_slice_that_does_not_exist():
    with pytest.raises(UserError, match="knows no such slice"):
        topology.devices(topology.parse("v5e:3x4"))


@needs_libtpu
def test_an_axis_may_take_a_part_of_a_slices_dimension():
    """16 x 16 x 16 chips have no dimensions whose product is 64; the mesh covers every chip once nevertheless."""
    there = topology.devices(topology.parse("v5p:16x16x16"))
    mesh = parallel.make_mesh(list(there), parallel.MeshShape(fsdp=64))
    assert mesh.shape["fsdp"] == mesh.shape["data"] == 64
    assert {device.id for device in mesh.devices.flat} == {device.id for device in there}


@needs_libtpu
def test_a_step_for_a_tpu_that_is_not_here():
    found = plan.run(recipe("catdog_mlp", "tiny", **{"data.batch_size": 16}), "v5e:2x2", level=plan.QUICK)
    assert found["fits"] and found["compiler"] == "TPU" and found["step_seconds_compiler"] > 0
    assert found["parameter_bytes"] == 4 * found["parameters"]
    assert found["collective_bytes"] == {"all-reduce": pytest.approx(2 * 3 / 4 * found["parameter_bytes"], rel=0.01)}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_all_recipes_compile_for_a_tpu(name):
    try:
        config = recipe(name, None)
    except UserError:  # its data is not embedded
        config = recipe(name, "tiny")
    for key in ("batch_size", "eval_batch_size"):
        config.data[key] = 16 * -(-(config.data[key] or 16) // 16)
    found = plan.run(config, "v5e:4x4", level=plan.QUICK)
    assert found["fits"] and 0 < found["mfu"] < 1 and found["step_seconds_compiler"] > 0


@needs_libtpu
def test_the_compilers_estimate_knows_no_collectives():
    """If this fails, the compiler prices them now, and ``Plan.times`` must no longer add them."""
    mesh = jax.make_mesh((64,), ("i",), devices=topology.devices(topology.parse("v5p:4x4x4")))
    x = jax.ShapeDtypeStruct((64, 1024, 1024), "float32", sharding=jax.NamedSharding(mesh, jax.P()))

    def seconds(fn):
        fn = jax.shard_map(fn, mesh=mesh, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        return jax.jit(fn).lower(x).compile().cost_analysis()["optimal_seconds"]

    with plan.not_cached():
        assert seconds(lambda x: jax.lax.psum(x, "i")) == pytest.approx(seconds(lambda x: 2 * x), rel=0.1)
