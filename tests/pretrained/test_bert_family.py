"""BERT and RoBERTa against transformers: the same numbers with every head, padded, and back to the same bits."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file
from toys import loss_of, styled, sums_of

from bigbase_jax import parallel, pretrained
from bigbase_jax.core import UserError
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.transformer import stack_blocks
from bigbase_jax.pretrained import load, save
from bigbase_jax.tasks.masked_language import NONE, MaskedLanguageModel
from bigbase_jax.tasks.text_classification import TextClassification
from bigbase_jax.wrappers.lora import LoRA

BERT = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 23,
    "pad_token_id": 0,
}
ROBERTA = {**BERT, "type_vocab_size": 1, "pad_token_id": 1, "max_position_embeddings": 25, "layer_norm_eps": 1e-5}
CASES = {
    "bert": ("BertModel", BERT),
    "bert, one type, another activation": ("BertModel", {**BERT, "type_vocab_size": 1, "hidden_act": "gelu_new"}),
    "bert, hidden tokens": ("BertForMaskedLM", BERT),
    "bert, both heads": ("BertForPreTraining", {**BERT, "layer_norm_eps": 1e-5}),
    "bert, pairs": ("BertForNextSentencePrediction", BERT),
    "bert, classes": ("BertForSequenceClassification", {**BERT, "num_labels": 5}),
    "roberta": ("RobertaModel", ROBERTA),
    "roberta, hidden tokens": ("RobertaForMaskedLM", ROBERTA),
    "roberta, classes, another offset": (
        "RobertaForSequenceClassification",
        {**ROBERTA, "num_labels": 3, "pad_token_id": 3, "max_position_embeddings": 29},
    ),
    "xlm-roberta": ("XLMRobertaModel", ROBERTA),
}
OURS = {"last_hidden_state": "hidden", "pooler_output": "pooled", "prediction_logits": "masked"}
OURS |= {"seq_relationship_logits": "next_sentence"}


def texts(theirs):
    """(tokens, segments, types) i32[2,19]: the second text ends after 12 tokens."""
    random, config = np.random.RandomState(0), theirs.config
    segment_ids = (np.arange(19) < np.array([[19], [12]])).astype(np.int32)
    tokens = np.where(segment_ids > 0, random.randint(5, 61, (2, 19)), config.pad_token_id).astype(np.int32)
    token_type_ids = ((np.arange(19) > 8) * segment_ids * (config.type_vocab_size > 1)).astype(np.int32)
    return tokens, segment_ids, token_type_ids


def of_theirs(hf, model, given):
    tokens, segment_ids, token_type_ids = (hf.torch.tensor(x) for x in given)
    with hf.torch.no_grad():
        found = model(tokens.long(), attention_mask=segment_ids.long(), token_type_ids=token_type_ids.long())
    named = {OURS.get(name, name): x.numpy() for name, x in found.items()}
    if "logits" in named:
        kind = type(model).__name__
        words = {"MaskedLM": "masked", "SentencePrediction": "next_sentence", "Classification": "classes"}
        named[next(word for end, word in words.items() if kind.endswith(end))] = named.pop("logits")
    return named


def apply(model, variables, given):
    tokens, segment_ids, token_type_ids = given
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)(variables, tokens, segment_ids, None, token_type_ids)


@pytest.mark.parametrize("case", CASES)
def test_the_same_numbers_and_back_to_the_same_bits(hf, random_model, tmp_path, case):
    name, words = CASES[case]
    theirs = random_model(name, **words)
    theirs.save_pretrained(tmp_path / "theirs")
    given = texts(theirs)
    want = of_theirs(hf, theirs, given)
    model, variables = load(tmp_path / "theirs")
    got = apply(model, variables, given)
    assert want and set(want) <= set(got)
    for key, expected in want.items():
        assert expected.std() > 0.1  # there is something to compare
        real = given[1] > 0 if expected.ndim == 3 else slice(None)  # padding has vectors too, which nobody reads
        np.testing.assert_allclose(np.asarray(got[key])[real], expected[real], rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    kind = hf.RobertaModel if name.startswith("XLM") else type(theirs)
    back, about = kind.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert set(old) == set(new)
    assert [key for key in old if not hf.torch.equal(old[key], new[key])] == []
    for key, expected in of_theirs(hf, back.eval(), given).items():
        np.testing.assert_array_equal(expected, want[key])
    again, same = load(tmp_path / "ours")
    assert again == model
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), variables, same))


@pytest.mark.parametrize("hidden", [(3, 3, 3), (1, 4, 2)], ids=str)
def test_the_loss_of_pretraining_and_its_head(hf, random_model, tmp_path, hidden):
    """BertForPreTraining's own loss where all rows hide as many tokens; else each pair has the weight of its tokens."""
    theirs = random_model("BertForPreTraining", **BERT)
    theirs.save_pretrained(tmp_path / "theirs")
    model, variables = load(tmp_path / "theirs")
    task = MaskedLanguageModel(model.clone(dropout=0.0), next_sentence=True)
    random = np.random.RandomState(1)
    segment_ids = (np.arange(19) < np.array([[19], [12], [15]])).astype(np.int32)
    tokens = np.where(segment_ids > 0, random.randint(5, 61, (3, 19)), 0).astype(np.int32)
    token_type_ids = ((np.arange(19) > 6) * segment_ids).astype(np.int32)
    follow = np.array([0, 1, 1], np.int32)
    at, targets = (np.full((3, 4), NONE, np.int32) for _ in range(2))
    labels = np.full((3, 19), -100)
    for b, n in enumerate(hidden):
        at[b, :n] = np.sort(random.permutation(12)[:n])
        targets[b, :n] = labels[b, at[b, :n]] = random.randint(5, 61, n)
    batch = {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "token_type_ids": token_type_ids,
        "at": at,
        "targets": targets,
        "next": follow,
    }
    batch |= {"positions": np.tile(np.arange(19, dtype=np.int32), (3, 1)), "mask": np.ones(3, np.float32)}
    with hf.torch.no_grad():
        words = {
            "attention_mask": segment_ids,
            "token_type_ids": token_type_ids,
            "labels": labels,
            "next_sentence_label": follow,
        }
        words = {name: hf.torch.tensor(x).long() for name, x in words.items()}
        want = theirs(hf.torch.tensor(tokens).long(), **words)
        pair_B = hf.torch.nn.functional.cross_entropy(
            want.seq_relationship_logits, words["next_sentence_label"], reduction="none"
        ).numpy()
    with jax.default_matmul_precision("highest"):
        (total, weight), _ = jax.jit(functools.partial(loss_of, task))(variables, batch, jax.random.key(0))
        sums = jax.jit(functools.partial(sums_of, task))(variables, batch)
    assert weight == sum(hidden) and pair_B.std() > 0.05
    mean = np.average(pair_B, weights=hidden)
    np.testing.assert_allclose(total / weight, want.loss.numpy() - pair_B.mean() + mean, rtol=1e-4, atol=1e-4)
    assert (abs(mean - pair_B.mean()) < 1e-6) == (len(set(hidden)) == 1)  # where it is theirs as it stands
    found = {name: float(x.mean()) for name, x in sums.items()}
    np.testing.assert_allclose(found["next_loss"], pair_B.mean(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["masked_loss"], want.loss.numpy() - pair_B.mean(), rtol=1e-4, atol=1e-4)
    right_B = want.seq_relationship_logits.numpy().argmax(-1) == follow  # class 0: it follows
    np.testing.assert_allclose(found["next_accuracy"], right_B.mean(), rtol=1e-6)

    save(tmp_path / "ours", task.model, variables)
    back, about = hf.BertForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    assert all(hf.torch.equal(x, back.state_dict()[name]) for name, x in theirs.state_dict().items())


def test_a_model_without_its_pooler_has_a_fresh_one_and_a_head_without_place_is_said(
    hf, random_model, tmp_path, capsys
):
    theirs = hf.BertModel(random_model("BertModel", **BERT).config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path / "a")
    model, variables = load(tmp_path / "a")
    said = capsys.readouterr().err
    assert "params.pooler.kernel" in said and "fresh" in said
    given = texts(theirs)
    got = apply(model, variables, given)["hidden"]
    want = of_theirs(hf, theirs, given)["hidden"]
    np.testing.assert_allclose(np.asarray(got)[given[1] > 0], want[given[1] > 0], rtol=1e-4, atol=1e-4)

    theirs = random_model("BertForTokenClassification", **BERT)
    theirs.save_pretrained(tmp_path / "b")
    model, variables = load(tmp_path / "b")
    assert not model.has_pooler and "head" not in variables["params"]
    with hf.torch.no_grad():
        want = theirs.bert(hf.torch.tensor(given[0]).long()).last_hidden_state.numpy()
    got = jax.jit(functools.partial(model.apply, method="hidden"))(variables, given[0])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_names_of_the_oldest_files(random_model, tmp_path):
    random_model("BertForMaskedLM", **BERT).save_pretrained(tmp_path)
    _, expected = load(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
        for name, x in tensors.items()
    }
    assert set(old) != set(tensors)
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["cls.seq_relationship.weight"] = np.zeros((2, 24), np.float32)
    save_file(old, path, {"format": "pt"})
    _, found = load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), expected, found))


def test_a_stack_of_layers_is_saved_as_its_layers(random_model, tmp_path):
    random_model("BertForMaskedLM", **BERT).save_pretrained(tmp_path / "theirs")
    model, variables = load(tmp_path / "theirs")
    save(tmp_path / "a", model, variables)
    save(tmp_path / "b", model.clone(scan=True), {"params": stack_blocks(variables["params"])})
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'; only 'absolute'"),
        ({"is_decoder": True}, "is_decoder=True; only False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False; only True"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
    ],
)
def test_a_folder_that_ours_cannot_be_is_one_sentence(random_model, tmp_path, words, sentence):
    random_model("BertForMaskedLM", **BERT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **words}))
    with pytest.raises(UserError, match=sentence):
        load(tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"num_classes": 3, "masked": True}, "this model also has masked"),
        ({"num_classes": 3, "classifier": "mean"}, "BERT's classifier is 'pooled', not 'mean'"),
        ({"num_classes": 3, "position_offset": 2}, "RoBERTa's classifier is 'dense', not 'pooled'"),
        ({"masked": True, "pooled": True}, "no such model with pooled and masked alone"),
        ({"next_sentence": True, "position_offset": 2}, "no such model with next_sentence alone"),
        ({"masked": True, "position_offset": 2, "activation": "relu"}, "RoBERTa's head has gelu, not 'relu'"),
    ],
)
def test_a_model_that_transformers_does_not_have(words, sentence, tmp_path):
    model = styled(Bert, vocab_size=5, length=4, width=8, depth=1, heads=2, **words)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(UserError, match=f"transformers has no model of this kind.*{sentence}"):
        save(tmp_path / "out", model, variables)


@pytest.mark.parametrize("folder", ["bert", "gpt2"])
def test_a_classifier_of_texts_begins_from_a_language_model(folder, random_model, gpt2_folder, tmp_path, capsys):
    """Its head is fresh, and so is the pooler of a BERT that had none; adapters lie beside the rest."""
    if folder == "bert":
        random_model("BertForMaskedLM", **BERT).save_pretrained(tmp_path / "bert")
    path = gpt2_folder if folder == "gpt2" else tmp_path / "bert"
    model, variables = load(path)
    task = LoRA(TextClassification(model, 3), rank=2, modules_to_save=r"^(head|pooler)\.")
    shapes = dict.fromkeys(task.inputs, (8, 19)) | {"label": (8,), "mask": (8,)}
    spec = {name: jax.ShapeDtypeStruct(s, jnp.float32 if name == "mask" else jnp.int32) for name, s in shapes.items()}
    mesh = parallel.make_mesh(1)
    program = parallel.program(task, optax.sgd(0.1), spec, mesh)
    fresh = program.init(parallel.put({name: np.ones(x.shape, x.dtype) for name, x in spec.items()}, mesh))
    before = jax.device_get(fresh.params["head"])
    state = pretrained.initialise(str(path), fresh, task, spec)
    said = capsys.readouterr().err
    assert "fresh are" in said and "params.head" in said and ("params.pooler" in said) == (folder == "bert")
    assert ("left out are" in said and "predictions.transform" in said) == (folder == "bert")
    assert jax.tree.all(jax.tree.map(np.array_equal, before, jax.device_get(state.params["head"])))
    base = state.model_state["frozen"]
    expected = {name: x for name, x in variables["params"].items() if name != "lm"}
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), expected, base))
    merged = jax.device_get(task.unwrap({"params": state.params, "frozen": base}))
    np.testing.assert_array_equal(merged["params"]["embedding"], variables["params"]["embedding"])
