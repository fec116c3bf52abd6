"""Classification of texts by an encoder, a decoder and a bag of words: what is read, trained and measured."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import loss_of, measured, sums_of

from bigbase_jax.build import build
from bigbase_jax.core import Evaluated, Task, UserError, flatten
from bigbase_jax.models.bag_of_words import BagOfWords
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.mlp import MLP
from bigbase_jax.tasks.text_classification import PADDING, TextClassification
from bigbase_jax.text.tokenizer import Symbols

L, V, K = 10, 20, 3
TINY = {"vocab_size": V, "length": L, "width": 16, "depth": 1, "heads": 2, "dropout": 0.0}
MODELS = {
    "bert": Bert(**TINY),
    "roberta": Bert(**TINY, type_vocab_size=1, position_offset=2, classifier="dense"),
    "decoder": Decoder(**TINY, tied=False),
    "bow": BagOfWords(V, 16),
}


def batch_of(size, seed=0):
    rng = np.random.default_rng(seed)
    length_B = rng.integers(3, L + 1, size)
    segment_ids = (np.arange(L) < length_B[:, None]).astype(np.int32)
    tokens = (rng.integers(1, V, (size, L)) * segment_ids).astype(np.int32)
    token_type_ids = ((np.arange(L) >= length_B[:, None] // 2) * segment_ids).astype(np.int32)
    label = rng.integers(0, K, size).astype(np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "token_type_ids": token_type_ids,
        "label": label,
        "mask": np.ones(size, np.float32),
    }
    return {name: jnp.asarray(x) for name, x in batch.items()}


def ready(model, **more):
    task = TextClassification(model, K, **more)
    shapes = jax.eval_shape(task.init, jax.random.key(0), batch_of(2))
    random = np.random.default_rng(0)
    return task, jax.tree.map(lambda x: jnp.float32(0.3 * random.normal(size=x.shape)), shapes)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_the_models_and_padding_has_no_part(name):
    task, variables = ready(MODELS[name])
    p, batch = variables["params"], batch_of(4)
    predict = jax.jit(task.predict)
    outputs = predict(variables, {key: batch[key] for key in task.inputs})
    other = {**batch, "tokens": jnp.where(batch["segment_ids"] > 0, batch["tokens"], 7)}
    np.testing.assert_allclose(predict(variables, other)["logits"], outputs["logits"], rtol=1e-5, atol=1e-6)
    hidden = functools.partial(task.model.apply, variables, method="hidden")
    y_BLD = hidden(batch["tokens"], batch["segment_ids"])
    last_B = np.asarray(batch["segment_ids"].sum(1)) - 1
    if name == "decoder":
        y_BD = np.asarray(y_BLD)[np.arange(4), last_B]
    elif name == "bow":
        y_BD = np.stack([np.asarray(y_BLD)[b, : last_B[b] + 1].mean(0) for b in range(4)])
    elif name == "roberta":
        dense = p["head"]["dense"]
        y_BD = np.tanh(y_BLD[:, 0] @ dense["kernel"] + dense["bias"])
    else:
        y_BLD = hidden(batch["tokens"], batch["segment_ids"], None, batch["token_type_ids"])
        y_BD = np.tanh(y_BLD[:, 0] @ p["pooler"]["kernel"] + p["pooler"]["bias"])
    head = p["head"].get("out", p["head"])
    np.testing.assert_allclose(outputs["logits"], y_BD @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(outputs["probabilities"]).sum(1), 1, rtol=1e-5)
    assert ((outputs["tokens"] == PADDING) == (batch["segment_ids"] == 0)).all()
    assert all(hasattr(task, name) for name in [*Task.__annotations__, *vars(Task)] if not name.startswith("_"))


def test_heads_for_other_ends_are_left_out():
    _, variables = ready(Bert(**TINY, masked=True, next_sentence=True, classifier="mean"))
    assert set(variables["params"]) == {"embedding", "position", "type", "norm", "encoder", "head"}
    _, variables = ready(MODELS["decoder"])
    assert set(variables["params"]["head"]) == {"kernel", "bias"} and variables["params"]["head"]["bias"].shape == (K,)


def test_a_decoder_may_be_read_by_its_mean():
    task, variables = ready(MODELS["decoder"], pool="mean")
    batch = batch_of(3)
    y_BLD = np.asarray(task.model.apply(variables, batch["tokens"], batch["segment_ids"], method="hidden"))
    y_BD = np.stack([y[: int(n)].mean(0) for y, n in zip(y_BLD, batch["segment_ids"].sum(1), strict=True)])
    head = variables["params"]["head"]
    logits = jax.jit(task.predict)(variables, batch)["logits"]
    np.testing.assert_allclose(logits, y_BD @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "decoder", "bow"])
def test_it_learns_which_word_is_in_a_text(name):
    """The class is told by one of three tokens somewhere in the text."""
    words = {"dropout": 0.1} if name == "bow" else {}
    task = TextClassification(MODELS[name], K, **words)
    rng, tx = np.random.default_rng(0), optax.adam(2e-2 if name == "bow" else 5e-3)

    def draw(size):
        batch = {key: np.array(x) for key, x in batch_of(size, int(rng.integers(1 << 30))).items()}
        batch["tokens"] = np.where(batch["segment_ids"] > 0, np.maximum(batch["tokens"], K), 0)
        at = (rng.random(size) * batch["segment_ids"].sum(1)).astype(int)
        batch["tokens"][np.arange(size), at] = batch["label"]
        return batch

    @jax.jit
    def step(params, opt, batch, key):
        def loss(params):
            total, _ = loss_of(task, {"params": params}, batch, key)
            return total.total / total.weight

        grads = jax.grad(loss)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt

    params = jax.jit(task.init)(jax.random.key(0), draw(2))["params"]
    opt = tx.init(params)
    for i in range(150):
        params, opt = step(params, opt, draw(32), jax.random.key(i))
    batch = draw(128)
    sums = jax.jit(lambda b: sums_of(task, {"params": params}, b))(batch)
    assert sums["accuracy"].mean() > 0.9
    outputs = jax.device_get(jax.jit(task.predict)({"params": params}, batch))
    report = measured(task, {**outputs, "label": batch["label"]})
    assert report["f1"] > 0.9 and report["auc"] > 0.95 and np.sum(report["confusion_matrix"]) == 128


def test_masked_examples_have_no_weight_and_types_matter():
    task, variables = ready(MODELS["bert"], label_smoothing=0.1)
    loss = jax.jit(lambda batch: loss_of(task, variables, batch, jax.random.key(0)))
    batch = batch_of(4)
    (total, weight), state = loss({**batch, "mask": jnp.array([1, 1, 1, 0.0])})
    changed = {**batch, "tokens": batch["tokens"].at[3].set(5), "mask": jnp.array([1, 1, 1, 0.0])}
    np.testing.assert_allclose(loss(changed)[0].total, total, rtol=1e-6)
    assert weight == 3 and state == {}
    assert abs(loss({**batch, "token_type_ids": batch["token_type_ids"] * 0})[0].total - loss(batch)[0].total) > 1e-4


def test_what_users_read():
    tokenizer = Symbols("abcdefghijklmnop", fallback=False, special=("pad", "cls", "sep", "mask"))
    task, variables = ready(MODELS["bert"], class_names=("x", "y", "z"), tokenizer=tokenizer.state())
    batch = batch_of(4)
    outputs = jax.device_get(jax.jit(task.predict)(variables, batch))
    answer = task.postprocess({name: x[0] for name, x in outputs.items()}, {})
    assert answer["label"] in "xyz" and sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    kept = {**outputs, "label": np.asarray(batch["label"]), "index": np.arange(10, 14)}
    *_, shown = (figure.texts for figure in task.figures(Evaluated("test", {}, kept)) if hasattr(figure, "texts"))
    p = outputs["probabilities"][np.arange(4), batch["label"]]
    worst = int(p.argmin())
    tokens = [t for t in outputs["tokens"][worst] if t != PADDING]
    assert len(shown) == 4 and shown[0][1] == [(tokenizer.decode(tokens), 0.0)]
    assert shown[0][0].startswith(f"row {worst + 11}: said ") and f"is {'xyz'[batch['label'][worst]]}" in shown[0][0]


def test_mistakes_are_named():
    with pytest.raises(UserError, match="MLP does not read text"):
        TextClassification(MLP(), K)
    with pytest.raises(UserError, match="Did you mean 'last'"):
        TextClassification(MODELS["bert"], K, pool="lst")
    with pytest.raises(UserError, match="dropout is 1"):
        TextClassification(MODELS["bert"], K, dropout=1)
    with pytest.raises(UserError, match="disagree"):
        TextClassification(Bert(**TINY, num_classes=4), K)
    with pytest.raises(UserError, match="set num_classes"):
        TextClassification(MODELS["bert"]).init(jax.random.key(0), batch_of(2))
    with pytest.raises(UserError, match="longer than the 4 positions"):
        TextClassification(Bert(**{**TINY, "length": 4}), K).init(jax.random.key(0), batch_of(2))


@pytest.mark.parametrize("model", ["bert", "decoder"])
@pytest.mark.parametrize("adapt", ["lora", "last", "probe"])
def test_the_recipe_trains_what_it_says(model, adapt):
    recipe = pathlib.Path(__file__).parents[2] / "configs" / "text_classify.py"
    config = runpy.run_path(str(recipe))["get_config"](f"tiny,model={model},adapt={adapt}")
    dataset_info = {"vocab_size": V, "length": L, "num_classes": K, "class_names": ("a", "b", "c")}
    task = build(config.task, dataset_info)
    params = set(flatten(jax.eval_shape(task.init, jax.random.key(0), batch_of(2))["params"]))
    head = {name for name in params if name.startswith(("head.", "pooler."))}
    assert len(head) == (4 if model == "bert" else 2)
    rest = {name.rpartition(".")[0] for name in params - head}
    if adapt == "lora":
        at = [f"encoder.block_{i}.attention.{name}" for i in (0, 1) for name in ("query", "value")]
        assert rest == set(at)
    elif adapt == "last":
        own = {name for name in rest if not name.startswith("encoder.block_1.")}
        assert len(rest) > 6 and own == (set() if model == "bert" else {"encoder.norm"})
    else:
        assert not rest
