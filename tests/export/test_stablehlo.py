"""Programs of ``jax.export`` answer as the run, alone and elsewhere; what is wrong with them is one sentence."""

import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export as jax_export

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.synthetic.pictures import DrawnCatsAndDogs
from bigbase_jax.decoding.sampling import SamplingParams
from bigbase_jax.export import manifest, stablehlo
from bigbase_jax.inference.generation import Engine
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.layers import ACTIVATIONS


@pytest.fixture(scope="module")
def exported(pictures):
    found = verbs.export(pictures, "stablehlo", platforms=["cpu", "cuda", "tpu"])
    assert found["proof"] == {"same_answers": 1.0, "largest_difference": pytest.approx(0, abs=1e-5)}
    return pathlib.Path(found["export"])


def test_the_folder_alone_answers_in_a_python_without_the_package(pictures, exported, tmp_path):
    from PIL import Image

    shutil.copytree(exported, tmp_path / "elsewhere")
    picture = tmp_path / "a.png"
    Image.fromarray(DrawnCatsAndDogs(size=50, num_train=2).splits["train"][0]["image"]).resize((70, 50)).save(picture)
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:];"
        "runpy.run_path('predict.py', run_name='__main__');"
        "assert not {'bigbase_jax', 'flax', 'orbax'} & set(sys.modules)"
    )
    words = [sys.executable, "-I", "-c", code, "predict.py", str(picture)]
    done = subprocess.run(words, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (answer,) = Predictor.open(pictures).answer(str(picture))
    said = json.loads(done.stdout)
    assert (said["label"], said["probability"]) == (answer["label"], pytest.approx(answer["probability"], abs=1e-6))
    with open(tmp_path / "elsewhere" / "weights.safetensors", "r+b") as file:
        file.truncate(1000)
    done = subprocess.run(words, cwd=tmp_path / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 1 and "weights.safetensors is not what was exported" in done.stderr


def test_each_platform_has_its_own_choices_and_no_path_of_this_machine(exported):
    """Few pixels under a 3x3 kernel: on a CPU a product with patches, elsewhere a convolution."""
    count = {}
    for platform in ("cpu", "cuda", "tpu"):
        data = (exported / f"{platform}.stablehlo").read_bytes()
        program = jax_export.deserialize(bytearray(data))
        assert program.platforms == (platform,) and "batch" in str(program.in_avals[-1])
        count[platform] = program.mlir_module().count("stablehlo.convolution")
        assert str(pathlib.Path(__file__).parents[2]).encode() not in data
    assert count["cuda"] == count["tpu"] == 4


def test_what_is_wrong_with_a_folder_is_one_sentence(exported, tmp_path):
    folder = tmp_path / "broken"

    def changed(name, change):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(exported, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    def of_manifest(**words):
        return lambda data: json.dumps({**json.loads(data), **words}).encode()

    changed("cpu.stablehlo", lambda data: data[:-9])
    with pytest.raises(UserError, match=r"cpu.stablehlo has [\d,]+ of its [\d,]+ bytes: it was not copied whole"):
        stablehlo.opened(folder)
    changed("weights.safetensors", lambda data: data[:-1] + b"?")
    with pytest.raises(UserError, match="does not hold what was written"):
        stablehlo.opened(folder)
    changed("manifest.json", of_manifest(version=manifest.VERSION + 1))
    with pytest.raises(UserError, match="is of version 2 of this format, .* written by a newer one; update"):
        stablehlo.opened(folder)
    changed("manifest.json", of_manifest(compatibility={"calling_convention_version": 1000}))
    with pytest.raises(UserError, match="calling convention 1000.* update jax"):
        stablehlo.opened(folder)
    good = (exported / "cpu.stablehlo").read_bytes()
    for data, sentence in (
        (b"not a program", "is no program of jax.export"),
        (good.replace(b"shape_assertion", b"python_callback"), "calls python_callback, which is no computation"),
    ):  # by somebody who writes the manifest as well
        changed("cpu.stablehlo", lambda _, data=data: data)
        files = json.loads((folder / "manifest.json").read_text())["files"]
        files["cpu.stablehlo"] = {"bytes": len(data), "sha256": manifest.digest(folder / "cpu.stablehlo")}
        (folder / "manifest.json").write_bytes(of_manifest(files=files)((folder / "manifest.json").read_bytes()))
        with pytest.raises(UserError, match=sentence):
            stablehlo.opened(folder)
    with pytest.raises(UserError, match="holds no exported model: it has no manifest.json"):
        stablehlo.opened(tmp_path)


def test_only_an_export_is_replaced_and_a_full_disk_leaves_nothing(pictures, exported, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="there is no platform 'gpu'"):
        verbs.export(pictures, "stablehlo", str(tmp_path / "new"), platforms=["gpu"])
    with pytest.raises(UserError, match="--to=adapter takes no --platforms; --to=stablehlo does"):
        verbs.export(pictures, "adapter", platforms=["cpu"])
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which would be lost"):
        verbs.export(pictures, "stablehlo", str(tmp_path))
    (tmp_path / "thesis.tex").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    beside = sorted(exported.parent.iterdir())
    monkeypatch.setattr(stablehlo.shutil, "copyfile", full)
    for folder in (tmp_path / "new", exported):
        with pytest.raises(UserError, match="cannot write .*No space left"):
            verbs.export(pictures, "stablehlo", str(folder))
    assert not list(tmp_path.iterdir())
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert sorted(exported.parent.iterdir()) == beside


def test_a_decoder_scores_any_length_and_continues_tokens_alone(decoder, tmp_path):
    found = verbs.export(decoder, "stablehlo", str(tmp_path / "alone"), platforms=["cpu", "tpu"])
    assert {"generate-cpu.stablehlo", "generate-tpu.stablehlo", "tokenizer.json"} <= set(found["files"])
    about = manifest.read(tmp_path / "alone", "stablehlo")
    assert about["inputs"]["inputs"]["shape"] == ["batch", "length"]
    assert about["generate"]["inputs"]["tokens"]["shape"] == ["batch", "length"]

    predictor = Predictor.open(decoder)
    compute = stablehlo.opened(tmp_path / "alone")
    rng = np.random.default_rng(0)
    batch = {name: np.ones((3, 7), np.int32) for name in predictor.task.inputs}
    batch |= {name: rng.integers(0, 20, (3, 7), np.int32) for name in ("inputs", "targets")}
    ours, theirs = (f(predictor.variables, batch)["log_probability"] for f in (predictor.program, compute))
    assert np.std(ours) > 1e-3
    np.testing.assert_allclose(theirs, ours, atol=1e-5)

    words = [sys.executable, "-I", "predict.py", "generate", "6", "5", "3", "8"]
    done = subprocess.run(words, cwd=tmp_path / "alone", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tokens,) = Engine.of(predictor).generate([np.array([5, 3, 8], np.int32)], SamplingParams(max_new_tokens=6))
    assert json.loads(done.stdout) == tokens.tolist() and len(tokens)


def test_a_program_for_another_platform_has_none_of_the_cpus_choices():
    x = jax.ShapeDtypeStruct((2, 3), jnp.float32)
    text = {p: stablehlo._export(ACTIVATIONS["gelu"], (x,), p).mlir_module() for p in ("cpu", "cuda", "tpu")}
    assert "erfc" in text["cuda"] and "erfc" in text["tpu"] and "erfc" not in text["cpu"]
