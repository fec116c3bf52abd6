"""Every family against transformers: the same logits, and a round trip that changes no bit.

A family's cases are one line each in ``CASES``: the class of transformers and the words of its config.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import styled

from bigbase_jax.core import UserError, flatten
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.resnet import CifarResNet, ResNet
from bigbase_jax.models.transformer import stack_blocks
from bigbase_jax.models.vit import ViT
from bigbase_jax.pretrained import load, save
from bigbase_jax.pretrained.families import FAMILIES, load_family

GPT2 = {"vocab_size": 61, "n_positions": 23, "n_embd": 12, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 8}
MIXED = {**LLAMA, "num_hidden_layers": 3, "sliding_window": 4, "head_dim": 4}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
VIT = {
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 15,
    "patch_size": 5,
    "num_channels": 2,
    "num_labels": 5,
}
RESNET = {"num_channels": 4, "num_labels": 7, "embedding_size": 4}
CASES = {
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "gpt2, untied, another width": ("GPT2LMHeadModel", {**GPT2, "tie_word_embeddings": False, "n_inner": 20}),
    "gpt2, exact gelu": ("GPT2LMHeadModel", {**GPT2, "activation_function": "gelu", "layer_norm_epsilon": 1e-3}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama, biases, wide heads, one of keys": (
        "LlamaForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 1,
            "head_dim": 10,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_theta": 500.0,
        },
    ),
    "llama 3": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8}}),
    "llama, yarn": ("LlamaForCausalLM", {**LLAMA, "rope_scaling": YARN}),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    "mistral, no window": ("MistralForCausalLM", {**LLAMA, "sliding_window": None, "head_dim": 6}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen2, window, tied": ("Qwen2ForCausalLM", {**LLAMA, **WINDOW, "tie_word_embeddings": True}),
    "qwen2, a window in the last two blocks": (
        "Qwen2ForCausalLM",
        {**MIXED, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8}),
    "qwen3, biases": ("Qwen3ForCausalLM", {**LLAMA, "head_dim": 8, "attention_bias": True, **WINDOW}),
    "qwen3, a window in the outer blocks": (
        "Qwen3ForCausalLM",
        {**MIXED, "head_dim": 8, "use_sliding_window": True, "layer_types": KINDS},
    ),
    "ministral": ("MinistralForCausalLM", {**MIXED, "layer_types": KINDS}),
    "vit": ("ViTForImageClassification", VIT),
    "vit, another activation": ("ViTForImageClassification", {**VIT, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "resnet, basic": (
        "ResNetForImageClassification",
        {**RESNET, "hidden_sizes": [4, 8, 16, 32], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    ),
    "resnet, bottleneck": (
        "ResNetForImageClassification",
        {**RESNET, "hidden_sizes": [16, 32, 64, 128], "depths": [3, 4, 6, 3], "layer_type": "bottleneck"},
    ),
}


def pictures(config):
    """f32[B,C,H,W], as torch has them."""
    size = getattr(config, "image_size", None)
    height, width = (size, size) if size else (37, 45)
    return np.random.RandomState(1).randn(2, config.num_channels, height, width).astype(np.float32)


def logits_of(hf, model, tokens_BL):
    """(theirs, what our model takes)."""
    given = tokens_BL if hasattr(model.config, "vocab_size") else pictures(model.config)
    with hf.torch.no_grad():
        logits = model(hf.torch.tensor(given)).logits.numpy()
    return logits, jnp.asarray(given if given.ndim == 2 else given.transpose(0, 2, 3, 1))


def apply(model, variables, *args, **words):
    with jax.default_matmul_precision("highest"):
        return jax.jit(functools.partial(model.apply, **words))(variables, *args)


@pytest.mark.parametrize("case", CASES)
def test_the_same_logits_and_back_to_the_same_bits(hf, random_model, tokens_BL, tmp_path, case):
    name, words = CASES[case]
    theirs = random_model(name, **words)
    theirs.save_pretrained(tmp_path / "theirs")
    want, given = logits_of(hf, theirs, tokens_BL)
    assert want.std() > 0.1  # there is something to compare

    model, variables = load(tmp_path / "theirs")
    np.testing.assert_allclose(apply(model, variables, given), want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert set(old) == set(new)
    assert [key for key in old if not hf.torch.equal(old[key], new[key])] == []
    np.testing.assert_array_equal(logits_of(hf, back.eval(), tokens_BL)[0], want)

    again, same = load(tmp_path / "ours")
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), variables, same))


def test_blocks_without_the_window_matter_and_a_stack_has_them_too(hf, random_model, tokens_BL, tmp_path):
    words = {**MIXED, "use_sliding_window": True, "max_window_layers": 1}
    theirs = random_model("Qwen2ForCausalLM", **words)
    theirs.save_pretrained(tmp_path / "theirs")
    model, variables = load(tmp_path / "theirs")
    assert (model.style.window, model.style.windowed) == (4, (False, True, True))
    want, given = logits_of(hf, theirs, tokens_BL)
    stacked = {"params": stack_blocks(variables["params"])}
    for scan in (model.clone(scan=True), model.clone(scan=True, remat=True)):
        np.testing.assert_allclose(apply(scan, stacked, given), want, rtol=1e-4, atol=1e-4)
    for other in (None, (True,)):
        clone = styled(model, window=None if other is None else 4, windowed=other)
        assert abs(apply(clone, variables, given) - want).max() > 0.1
    decode = functools.partial(apply, model, method="decode", mutable=["cache"])
    cache, parts = model.cache(2, 24), []
    for at in range(0, 23, 4):  # parts of 4 tokens, the last of 3
        y_BlD, state = decode({**variables, "cache": cache}, given[:, at : at + 4], jnp.full(2, at))
        cache = state["cache"]
        parts.append(apply(model, variables, y_BlD, method="logits"))
    np.testing.assert_allclose(np.concatenate(parts, 1), want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written["layer_types"] == theirs.config.layer_types
    assert (written["use_sliding_window"], written["sliding_window"], written["max_window_layers"]) == (True, 4, 1)
    del written["layer_types"]  # which older versions do not write
    (tmp_path / "ours" / "config.json").write_text(json.dumps(written))
    assert load(tmp_path / "ours")[0] == model


def test_mistral_with_kinds_of_blocks_is_ministral(random_model, tmp_path):
    random_model("MinistralForCausalLM", **{**MIXED, "layer_types": KINDS}).save_pretrained(tmp_path)
    model, _ = load(tmp_path)
    edit(tmp_path, model_type="mistral")  # as its authors published it; transformers' AutoModel takes it so too
    assert load(tmp_path)[0] == model
    for words, says in [
        ({"layer_types": ["chunked_attention"] * 3}, "layer_types is 'chunked_attention'"),
        ({"layer_types": KINDS[:2]}, "2 layer_types for num_hidden_layers=3"),
    ]:
        edit(tmp_path, **words)
        with pytest.raises(UserError, match=says):
            load(tmp_path)


def random_variables(model, *args):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *args)
    random = np.random.RandomState(0)
    return jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape), x.dtype), shapes)


BARE = {"GPT2Model": GPT2, "LlamaModel": LLAMA, "ViTModel": VIT}


@pytest.mark.parametrize("name", BARE)
def test_models_without_their_head_have_names_without_its_prefix(hf, random_model, tokens_BL, tmp_path, name, capsys):
    theirs = random_model(name, **BARE[name])
    theirs.save_pretrained(tmp_path)
    given = tokens_BL if name != "ViTModel" else pictures(theirs.config)
    with hf.torch.no_grad():
        want = theirs(hf.torch.tensor(given)).last_hidden_state.numpy()
    model, variables = load(tmp_path)
    if name == "ViTModel":
        said = capsys.readouterr().err
        assert "params.head.kernel" in said and "fresh" in said
        norms = lambda module, _: module.path == ("encoder", "norm")  # noqa: E731
        ours = jnp.asarray(given.transpose(0, 2, 3, 1))
        kept = apply(model, variables, ours, capture_intermediates=norms)[1]["intermediates"]
        got = kept["encoder"]["norm"]["__call__"][0]
    elif name == "LlamaModel":  # a head of its own, which this file does not have
        assert "params.head" in capsys.readouterr().err
        got = apply(model, variables, jnp.asarray(tokens_BL), method="hidden")
    else:
        got = apply(model, variables, jnp.asarray(tokens_BL), method="hidden")
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_stack_of_layers_is_saved_as_its_layers(gpt2_folder, tmp_path):
    model, variables = load(gpt2_folder)
    stacked = {"params": stack_blocks(variables["params"])}
    assert "blocks" in stacked["params"]["encoder"]
    save(tmp_path / "a", model, variables)
    save(tmp_path / "b", model.clone(scan=True), stacked)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_precision_is_read_exactly(hf, random_model, tmp_path):
    theirs = random_model("Qwen3ForCausalLM", **LLAMA, head_dim=8).bfloat16()
    theirs.save_pretrained(tmp_path)
    _, variables = load(tmp_path)
    kernel = theirs.state_dict()["model.layers.1.mlp.up_proj.weight"].float().numpy().T
    assert variables["params"]["encoder"]["block_1"]["mlp"]["up"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(variables["params"]["encoder"]["block_1"]["mlp"]["up"]["kernel"], kernel)


def test_several_files_and_an_index(hf, random_model, tokens_BL, tmp_path):
    theirs = random_model("LlamaForCausalLM", **LLAMA)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    model, variables = load(tmp_path / "theirs")
    names = save(tmp_path / "ours", model, variables, max_shard_bytes=8_000)
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    back, about = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    np.testing.assert_array_equal(logits_of(hf, back, tokens_BL)[0], logits_of(hf, theirs, tokens_BL)[0])


# -------------------------------------------------------------------------------------------- published CIFAR networks


@pytest.mark.realdata
@pytest.mark.parametrize("depth", [20, 56])
def test_published_state_dicts_give_the_published_logits(real_data, depth, tmp_path):
    folder = real_data / "w_resnet_cifar10"
    reference = np.load(folder / "ref_logits_60imgs.npz")
    model, variables = load(folder / f"resnet{depth}_state_dict.npz")
    assert model == CifarResNet(10, depth)
    x = (reference["images_u8"] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    logits_NK = apply(model, variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(logits_NK, reference[f"logits_resnet{depth}"], rtol=1e-4, atol=1e-4)

    save(tmp_path, model, variables)
    theirs = np.load(folder / f"resnet{depth}_state_dict.npz")
    from safetensors.numpy import load_file

    ours = load_file(tmp_path / "model.safetensors")
    assert set(ours) == set(theirs)
    assert [name for name in ours if not np.array_equal(ours[name], theirs[name])] == []


def test_convolutional_shortcuts_of_cifar_networks(tmp_path):
    model = CifarResNet(3, 8, 4, shortcut="conv")
    variables = random_variables(model, jnp.zeros((1, 32, 32, 3)))
    save(tmp_path, model, variables)
    again, same = load(tmp_path)
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), variables, same))


# ------------------------------------------------------------------------------------------------------------ mistakes


def edit(folder, **words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **words}))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"model_type": "gpt3"}, "of the type 'gpt3', of which there is no table. Did you mean 'gpt2'?"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True; only False is known"),
        ({"activation_function": "quick_gelu"}, "activation_function is 'quick_gelu'; known here are 'gelu_new'"),
        ({"n_layer": 3}, "it lacks params.encoder.block_2.attention.key.bias"),
        ({"n_layer": 1}, "it also has transformer.h.1.attn.c_attn.bias, transformer.h.1.attn.c_attn.weight"),
        ({"n_inner": 13}, r"params.encoder.block_0.mlp.up.kernel is \(12, 48\) there and \(12, 13\) here"),
        ({"vocab_size": 62}, r"params.embedding is \(61, 12\) there and \(62, 12\) here"),
        ({"n_embd": 13, "n_head": 13}, "c_attn.weight of shape \\(12, 36\\) is not what its config.json says"),
        ({"n_embd": None}, "config.json has no 'n_embd', which a gpt2 needs"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_sentence(gpt2_folder, words, sentence):
    edit(gpt2_folder, **words)
    with pytest.raises(UserError, match=sentence):
        load(gpt2_folder)


def test_a_missing_key_of_the_config_is_one_sentence(gpt2_folder):
    config = json.loads((gpt2_folder / "config.json").read_text())
    del config["n_layer"]
    (gpt2_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json has no 'n_layer'"):
        load(gpt2_folder)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)


IMAGE, TOKENS = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 2), jnp.int32)
TINY = {"vocab_size": 5, "length": 4, "width": 8, "depth": 1, "heads": 2}


@pytest.mark.parametrize(
    ("model", "given", "sentence"),
    [
        (MLP(3, (4,)), IMAGE, "It is a MLP."),
        (ViT(3, width=8, depth=1, heads=2, patch=4, pool="gap"), IMAGE, "pool='cls'"),
        (ResNet(3, 18, 4, "cifar"), IMAGE, "the stem 'imagenet', not 'cifar'"),
        (styled(Decoder, **TINY, qkv_bias=False), TOKENS, "GPT-2 has biases everywhere"),
        (styled(Decoder, **TINY, norm="rmsnorm"), TOKENS, "GPT-2 has LayerNorm"),
        (Decoder(**TINY, positions="rope"), TOKENS, "have RMSNorm and gates"),
    ],
)
def test_a_model_that_transformers_does_not_have(model, given, sentence, tmp_path):
    variables = random_variables(model, given)
    with pytest.raises(UserError, match=f"transformers has no model of this kind.*{sentence}"):
        save(tmp_path / "out", model, variables)
    assert not list(tmp_path.iterdir())


def test_variables_of_another_model_are_not_saved(gpt2_folder, tmp_path):
    model, variables = load(gpt2_folder)
    with pytest.raises(UserError, match=r"it lacks params\.encoder\.block_2\.attention\.key\.bias"):
        save(tmp_path / "out", model.clone(depth=3), variables)
    with pytest.raises(UserError, match=r"no place for params\.encoder\.block_1\.attention\.key\.bias"):
        save(tmp_path / "out", model.clone(depth=1), variables)


def test_every_family_has_all_that_it_needs():
    for name in set(FAMILIES.values()):
        family = load_family(name)
        for word in ("MODELS", "HEAD", "TRANSFORMERS", "from_config", "to_config", "table", "inputs"):
            assert hasattr(family, word), (name, word)
        for word in ("from_config", "to_config", "table", "inputs"):
            assert callable(getattr(family, word))


def test_no_table_names_a_tensor_twice(gpt2_folder):
    model, variables = load(gpt2_folder)
    table = load_family("gpt2").table(model)
    theirs = [entry.theirs for entry in table.entries]
    ours = [path for entry in table.entries for path in entry.paths]
    assert len(theirs) == len(set(theirs))
    assert sorted(ours) == sorted(flatten(variables))
