"""Runs that begin from weights: the model that a folder asks for, pieces on the devices that hold them, what may stay
fresh, adapters, other runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_launch import launch

from bigbase_jax import parallel, pretrained, verbs
from bigbase_jax.build import build, target
from bigbase_jax.core import UserError, flatten
from bigbase_jax.data.pipeline import Data
from bigbase_jax.data.sources.text.text import PythonReference
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.transformer import unstack_blocks
from bigbase_jax.models.vit import bicubic
from bigbase_jax.parallel import MeshShape
from bigbase_jax.pretrained import weights
from bigbase_jax.pretrained.families import adjust
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.text.tokenizer import Bytes, TokenizerFile
from bigbase_jax.wrappers.lora import LoRA

SPEC = {
    name: jax.ShapeDtypeStruct((8, 8), jnp.int32) for name in ("inputs", "targets", "segment_ids", "positions", "bytes")
}
SPEC["mask"] = jax.ShapeDtypeStruct((8,), jnp.float32)


def begun(task, path, shape=None, ema=True, spec=SPEC):
    """(a state, what it becomes when it begins from ``path``)."""
    mesh = parallel.make_mesh(None, shape or MeshShape())
    rules = ("pipeline", "fsdp:1") if shape and shape.pipeline > 1 else ("fsdp:1",)
    program = parallel.program(task, optax.adam(1e-3), spec, mesh, sharding=rules, ema_decay=0.9 if ema else None)
    random = np.random.RandomState(0)

    def filled(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(1), x.sharding)
        return jax.device_put(np.asarray(10 * random.randn(*x.shape), x.dtype), x.sharding)

    old = jax.tree.map(filled, program.state)
    fresh = jax.tree.map(lambda x: np.array(x) if isinstance(x, jax.Array) and x.ndim else x, old)
    state = pretrained.initialise(str(path), old, task, spec)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, program.state)
    assert jax.tree.structure(state) == jax.tree.structure(program.state)
    return fresh, state


def same(a, b):
    a, b = flatten(a), flatten(b)
    return set(a) == set(b) and all(np.array_equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("scan", "shape"),
    [
        (False, MeshShape()),
        (False, MeshShape(data=2, fsdp=4)),
        (True, MeshShape(data=1, fsdp=2, pipeline=2, sequence=2)),
    ],
)
def test_weights_go_where_the_parameters_live(gpt2_folder, scan, shape, capsys):
    model, variables = pretrained.load(gpt2_folder)
    task = CausalLanguageModel(model.clone(scan=scan, pipeline_microbatches=2))
    fresh, state = begun(task, gpt2_folder, shape)
    kernel = flatten(state.params)[f"encoder.{'blocks' if scan else 'block_0'}.mlp.up.kernel"]
    assert kernel.sharding.is_fully_replicated == (shape == MeshShape())
    params = unstack_blocks(state.params) if scan else state.params
    assert same(params, variables["params"])
    assert not same(fresh.params, jax.device_get(state.params))
    assert same(state.ema, {"params": state.params})
    assert same(fresh.opt_state, state.opt_state) and state.step == fresh.step
    assert f"{20 if scan else 36} arrays of 4,800 numbers" in capsys.readouterr().err


class Counted:
    """An array that notes how much of it is read."""

    def __init__(self, x, reads):
        self.x, self.reads, self.shape = x, reads, x.shape

    def __getitem__(self, index):
        piece = self.x[index]
        self.reads.append(piece.size)
        return piece


@pytest.mark.parametrize("path", ["a.kernel", "blocks.kernel"])
def test_no_more_is_read_than_a_device_holds(path):
    mesh = parallel.make_mesh(4, MeshShape(data=1, fsdp=4))
    x, reads = np.random.RandomState(0).randn(16, 12).astype(np.float32), []
    arrays = {"a.kernel": Counted(x, reads), **{f"block_{i}.kernel": Counted(x + i, reads) for i in range(3)}}
    source = weights.Weights("here", arrays)
    stacked = path.startswith("blocks")
    want = np.stack([x, x + 1, x + 2]) if stacked else x
    spec = jax.sharding.PartitionSpec(None, "fsdp") if stacked else jax.sharding.PartitionSpec("fsdp")
    home = jax.sharding.NamedSharding(mesh, spec)
    y = source.read(path, jax.ShapeDtypeStruct(want.shape, jnp.float32, sharding=home))
    np.testing.assert_array_equal(y, want)
    assert y.sharding == home
    assert max(reads) == x.size // 4 and sum(reads) == want.size  # each number once, a device's rows of one layer


# ------------------------------------------------------------------------------------------------- what may stay fresh

PICTURES = {
    "image": jax.ShapeDtypeStruct((8, 15, 15, 2), jnp.float32),
    "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    "mask": jax.ShapeDtypeStruct((8,), jnp.float32),
}


@pytest.fixture
def vit_folder(random_model, tmp_path):
    words = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
    words |= {"image_size": 15, "patch_size": 5, "num_channels": 2, "num_labels": 5}
    random_model("ViTForImageClassification", **words).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_head_of_another_width_stays_fresh_and_is_named(vit_folder, capsys):
    model, variables = pretrained.load(vit_folder)
    task = Classification(model.clone(num_classes=3))
    fresh, state = begun(task, vit_folder, spec=PICTURES)
    said = capsys.readouterr().err
    assert "fresh are params.head.kernel, params.head.bias" in said or "params.head.bias, params.head.kernel" in said
    assert "left out are" in said and "params.head.kernel of (12, 5)" in said
    assert same(state.params["head"], fresh.params["head"])
    assert same(state.params["encoder"], variables["params"]["encoder"])


@pytest.mark.parametrize("size", [(15, 15), (10, 10), (35, 35), (5, 45), (20, 30)])
def test_positions_are_resized_to_pictures_of_another_size(hf, vit_folder, size, capsys):
    model, variables = pretrained.load(vit_folder)
    spec = {**PICTURES, "image": jax.ShapeDtypeStruct((8, *size, 2), jnp.float32)}
    _, state = begun(Classification(model), vit_folder, spec=spec)
    line = f"positions of 3x3 patches are resized to {size[0] // 5}x{size[1] // 5}"
    assert (line in capsys.readouterr().err) == (size != (15, 15))
    np.testing.assert_array_equal(state.params["position"][:, 0], variables["params"]["position"][:, 0])
    image = np.random.RandomState(0).randn(2, *size, 2).astype(np.float32)
    theirs = hf.ViTForImageClassification.from_pretrained(vit_folder).eval()
    with hf.torch.no_grad():
        want = theirs(hf.torch.tensor(image.transpose(0, 3, 1, 2)), interpolate_pos_encoding=True).logits.numpy()
    with jax.default_matmul_precision("highest"):
        got = jax.jit(model.apply)({"params": state.params}, jnp.asarray(image))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_positions_of_a_run_are_resized_where_their_number_differs(vit_folder):
    model, variables = pretrained.load(vit_folder)
    position = variables["params"]["position"]  # of 3x3 patches, and here a jax.Array, as a run's are
    for size, published, done in [((5, 45), False, False), ((5, 45), True, True), ((10, 10), False, True)]:
        source = weights.Weights("here", {"params.position": position})
        spec = {"image": jax.ShapeDtypeStruct((8, *size, 2), jnp.float32)}
        assert bool(adjust(model, source, spec, published)) == done
        assert source.arrays["params.position"].shape == ((1, 1 + size[0] * size[1] // 25, 12) if done else (1, 10, 12))
    source = weights.Weights("here", {"params.position": position[:, :9]})  # 8 patches are no square
    assert adjust(model, source, spec, True) is None
    half = np.asarray(position.astype(jnp.bfloat16))  # of a file
    sources = [weights.Weights("here", {"params.position": x}) for x in (half, half.astype(np.float32))]
    assert all(adjust(model, source, spec, True) for source in sources)
    np.testing.assert_array_equal(*(source.arrays["params.position"] for source in sources))


def test_bicubic_shares_are_torchs(hf):
    for count, wanted in [(3, 7), (14, 24), (14, 5), (4, 4), (1, 3), (2, 1)]:
        x = np.random.RandomState(0).randn(count, count).astype(np.float32)
        theirs = hf.torch.nn.functional.interpolate(hf.torch.tensor(x)[None, None], (wanted, wanted), mode="bicubic")
        shares = bicubic(count, wanted)
        np.testing.assert_allclose(shares @ x @ shares.T, theirs.numpy()[0, 0], rtol=1e-5, atol=1e-5)


def test_another_model_is_one_sentence(gpt2_folder):
    task = Classification(ConvNet(3, stages=(4,)))
    with pytest.raises(UserError, match="holds the weights of a Decoder, and the model is a ConvNet"):
        begun(task, gpt2_folder, spec=PICTURES)
    model, _ = pretrained.load(gpt2_folder)
    with pytest.raises(UserError, match="does not fit the model: it lacks params.encoder.block_2"):
        begun(CausalLanguageModel(model.clone(depth=3)), gpt2_folder)


def test_statistics_of_batchnorm_come_along(random_model, tmp_path):
    words = {"num_channels": 2, "embedding_size": 4, "hidden_sizes": [4, 8, 16, 32], "depths": [2, 2, 2, 2]}
    random_model("ResNetForImageClassification", **words, layer_type="basic").save_pretrained(tmp_path)
    model, variables = pretrained.load(tmp_path)
    assert float(jnp.ptp(variables["batch_stats"]["bn1"]["var"])) > 0
    _, state = begun(Classification(model), tmp_path, spec=PICTURES, ema=False)
    assert same(state.model_state, {"batch_stats": variables["batch_stats"]})


# ------------------------------------------------------------------------------------------------------------ adapters


def test_adapters_stay_fresh_around_a_loaded_base(gpt2_folder):
    model, variables = pretrained.load(gpt2_folder)
    task = LoRA(CausalLanguageModel(model), rank=2)
    fresh, state = begun(task, gpt2_folder, MeshShape(data=4, fsdp=2))
    assert same(state.params, fresh.params)
    assert any(name.endswith("lora_a") for name in flatten(state.params))
    assert same(state.model_state["frozen"], variables["params"])
    assert same(state.ema, {"params": state.params, **state.model_state})


def test_adapters_are_merged_and_classes_named_in_what_is_exported(hf, vit_folder, tmp_path):
    model, variables = pretrained.load(vit_folder)
    task = LoRA(Classification(model), rank=2)
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0), PICTURES)
    adapters = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape), x.dtype), shapes["params"])
    trained = {"params": adapters, "frozen": variables["params"]}
    run = RunDir(tmp_path / "run")
    run.write_json("data.json", {"dataset_info": {"class_names": list("abcde")}})
    pretrained.export(run, ConfigDict(), task, trained, tmp_path / "out")
    back = hf.ViTForImageClassification.from_pretrained(tmp_path / "out")
    assert back.config.id2label == dict(enumerate("abcde"))
    image = random.randn(2, 15, 15, 2).astype(np.float32)
    with hf.torch.no_grad():
        theirs = back(hf.torch.tensor(image.transpose(0, 3, 1, 2))).logits.numpy()
    ours = jax.jit(task.predict)(trained, {"image": jnp.asarray(image)})["logits"]
    base = jax.jit(model.apply)(variables, jnp.asarray(image))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert abs(theirs - base).max() > 0.1  # the adapters do something


# ---------------------------------------------------------------------------------------------------------- the config


def recipe(path, task=None, **words):
    config = ConfigDict({"seed": 0, "init_from": str(path)})
    config.data = target(Data, dataset=target(PythonReference, tokenizer=target(Bytes), length=8), batch_size=8)
    inner = target(CausalLanguageModel, model=target(Decoder, depth=9, **words))
    config.task = task(inner) if task else inner
    return config.lock()


def test_the_model_is_the_folders_and_how_it_is_run_the_recipes(gpt2_folder):
    config = recipe(gpt2_folder, dtype="bfloat16", scan=True, dropout=0.1, width=99)
    found = pretrained.resolve(config)
    model = build(found.task.model)
    assert (model.depth, model.width, model.length, model.vocab_size) == (2, 12, 23, 61)
    assert (model.dtype, model.scan, model.dropout) == ("bfloat16", True, 0.1)
    assert config.task.model.depth == 9  # the config that was given stays
    assert found.is_locked and found.data.dataset.tokenizer.target.endswith(":Bytes")  # the folder has none
    assert pretrained.resolve(found).to_json_best_effort() == found.to_json_best_effort()
    wrapped = pretrained.resolve(recipe(gpt2_folder, lambda inner: target(LoRA, task=inner, rank=2)))
    assert wrapped.task.rank == 2 and wrapped.task.task.model.width == 12


def test_without_init_from_nothing_changes(gpt2_folder):
    config = recipe(gpt2_folder)
    with config.unlocked():
        config.init_from = None
    assert pretrained.resolve(config) is config
    old = ConfigDict({"task": {}})  # a recipe without the key
    assert pretrained.resolve(old) is old


def test_the_tokenizer_and_the_normalisation_come_along(gpt2_folder, vit_folder):
    (gpt2_folder / "tokenizer.json").write_text("{}")
    node = pretrained.resolve(recipe(gpt2_folder)).data.dataset.tokenizer
    assert build(node) == TokenizerFile(str(gpt2_folder))
    (vit_folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2], "image_std": [0.3, 0.4]})
    )
    config = ConfigDict({"init_from": str(vit_folder), "data": {}})
    config.task = target(Classification, model=target(ConvNet, num_classes=3), mean=(0.5,), std=(0.5,))
    task = build(pretrained.resolve(config).task)
    assert (task.mean, task.std) == ((0.1, 0.2), (0.3, 0.4))
    assert task.model.num_classes == 3 and task.model.width == 12


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "is no folder"),
        (lambda path: path.mkdir(), r"has no config\.json"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{")), "cannot be read"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("[]")), "does not hold a JSON object"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "of the type 'None'"),
    ],
)
def test_a_wrong_folder_is_one_sentence(make, sentence, tmp_path):
    make(tmp_path / "x")
    with pytest.raises(UserError, match=sentence):
        pretrained.resolve(recipe(tmp_path / "x"))


# ------------------------------------------------------------------------------------------------- through the launcher


def test_from_a_folder_to_a_run_to_another_run_to_a_folder(hf, random_model, tmp_path):
    """GPT-2 with its tokenizer -> a run -> a run that begins from it, scanned -> a folder for transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    theirs = random_model("GPT2LMHeadModel", vocab_size=300, n_positions=40, n_embd=12, n_layer=2, n_head=3)
    theirs.save_pretrained(tmp_path / "gpt2")
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(tmp_path / "gpt2" / "tokenizer.json"))

    a = ["--config=configs/lm.py:tiny", f"--config.init_from={tmp_path / 'gpt2'}", f"--workdir={tmp_path / 'a'}"]
    still = ["--config.optim.learning_rate=0.0", "--config.optim.weight_decay=0.0"]
    first, _, said = launch(*a, *still)
    assert "init_from" in said and "36 arrays" in said
    text = tmp_path / "text.txt"
    text.write_text("Names refer to objects.")
    answer, _, _ = launch("--mode=predict", f"--workdir={tmp_path / 'a'}", f"--input={text}")
    end = tokenizer.token_to_id("<|endoftext|>")
    ids = hf.torch.tensor([[end, *tokenizer.encode(text.read_text()).ids, end]])
    with hf.torch.no_grad():  # nothing moved: what the run gives is what the folder's model gives
        logits = theirs(ids[:, :-1]).logits.log_softmax(-1)
    want = logits.gather(-1, ids[:, 1:, None])[0, :, 0].numpy()
    np.testing.assert_allclose([p for _, p in answer["text"]], want, atol=2e-4)

    again, _, said = launch(*a, *still)
    assert again == first and "init_from" not in said  # finished: nothing is read again

    b = ["--config=configs/lm.py:tiny", f"--config.init_from={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}"]
    _, _, said = launch(*b, *still, "--config.task.model.scan=true")
    assert "arrays of" in said
    done, _, _ = launch("--mode=export", f"--workdir={tmp_path / 'b'}")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(done["files"])
    back = hf.AutoModelForCausalLM.from_pretrained(done["export"])
    old, new = theirs.state_dict(), back.state_dict()
    assert [name for name in old if not hf.torch.equal(old[name], new[name])] == []
    ours = hf.AutoTokenizer.from_pretrained(done["export"])
    assert ours(text.read_text()).input_ids == tokenizer.encode(text.read_text()).ids
    assert (back.config.eos_token_id, ours.eos_token) == (256, "<|endoftext|>")

    config = json.loads((tmp_path / "gpt2" / "config.json").read_text())
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps({**config, "n_head": 4}))
    assert launch(*a, *still)[0] == first  # a run that has begun reads what it kept of the folder
    with pytest.raises(UserError, match=r"there is no --to=safetensor\. Did you mean 'safetensors'\?"):
        verbs.export(str(tmp_path / "b"), "safetensor")
    with pytest.raises(UserError, match="there is no adapter to write"):
        verbs.export(str(tmp_path / "b"), "adapter")
