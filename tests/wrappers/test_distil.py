"""Distillation: the loss of the papers, a teacher that nothing trains, and a student that does not need it later.

Axes: B examples, L length, V classes or tokens.
"""

import dataclasses
import functools
import json
import pathlib
import runpy
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from marks import some_slow
from test_adapt import FORMS, assert_close, assert_equal, born, pictures, vit, words
from test_launch import arrays

from bigbase_jax import parallel, verbs
from bigbase_jax.core import Loss, UserError, flatten
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.inference.teacher import Teacher
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.mlp import MLP
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.tasks.masked_language import MaskedLanguageModel
from bigbase_jax.tasks.tagging import Tagging
from bigbase_jax.tasks.translation import Translation
from bigbase_jax.wrappers.distil import Distil
from bigbase_jax.wrappers.frozen import Frozen
from bigbase_jax.wrappers.lora import LoRA
from bigbase_jax.wrappers.mix import Mix
from bigbase_jax.wrappers.quantised import Quantised
from bigbase_jax.wrappers.sparse import Sparse

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """A teacher that is not read from a folder."""

    task: object
    variables: object
    spec: object
    path: str = "runs/teacher"
    there: bool = True

    @property
    def shapes(self):
        return jax.eval_shape(lambda: self.variables)

    def read(self, like):
        return jax.device_put(self.variables, jax.tree.map(lambda x: x.sharding, like))


def taught_by(task, batch=None, seed=3, scale=1.0):
    """A teacher with fresh variables, whose logits are so much larger."""
    batch = pictures() if batch is None else batch
    variables = born(task, batch, seed)
    if scale != 1:
        variables["params"]["head"]["kernel"] *= scale
    return Known(task, variables, {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in batch.items()})


def loss_of(task, variables, batch, key=KEY):
    given = {} if "given" in variables else {"given": task.given.variables}
    scale = {}

    def of(variables, batch, key):
        loss = task.loss(variables, batch, key)[0]
        scale.update(loss.scale)
        return loss.terms, loss.aux

    return Loss(*jax.jit(of)({**variables, **given}, batch, key), scale)


def value(loss):
    return sum(loss.scale.get(name, 1.0) * term.mean() for name, term in loss.terms.items())


def masked(batch, count=3):
    mask = np.array(batch["mask"])
    mask[:count] = 0
    return {**batch, "mask": jnp.asarray(mask)}


def kl(p, q, T):
    """KL(p || q) of logits at a temperature, of each row, by torch."""
    p, q = (torch.log_softmax(torch.tensor(np.asarray(x)) / T, -1) for x in (p, q))
    return (p.exp() * (p - q)).sum(-1).numpy()


# ------------------------------------------------------------------------------------------------------------ the loss


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_loss_is_hintons_by_torch(divergence):
    teacher, student = taught_by(vit(depth=3), scale=40), vit()
    task = Distil(student, teacher, temperature=3.0, weight=0.7, divergence=divergence)
    batch, variables = masked(pictures()), born(student)
    ours, theirs = (t.logits(v, batch) for t, v in ((student, variables), (teacher.task, teacher.variables)))
    assert np.abs(ours - theirs).max() > 0.5
    loss = loss_of(task, variables, batch)
    hard = torch.nn.functional.cross_entropy(torch.tensor(np.array(ours)[3:]), torch.tensor(batch["label"][3:])).item()
    pair = (theirs, ours) if divergence == "forward" else (ours, theirs)
    soft = kl(*pair, 3.0)[3:].mean()
    np.testing.assert_allclose(loss.terms["hard"].mean(), hard, rtol=1e-5)
    np.testing.assert_allclose(loss.terms["soft"].mean(), soft, rtol=1e-5)
    np.testing.assert_allclose(value(loss), 0.3 * hard + 0.7 * 9 * soft, rtol=1e-5)
    assert loss.terms["soft"].weight == 13
    same = (np.argmax(ours, -1) == np.argmax(theirs, -1))[3:].mean()
    np.testing.assert_allclose(loss.aux["agreement"].mean(), same, rtol=1e-6)


def test_no_gradient_reaches_the_teacher_and_the_share_of_both_does_not_depend_on_the_temperature():
    teacher, batch = taught_by(vit(depth=1), scale=10), pictures()
    student = vit()
    variables = born(student)

    def total(params, given, T):
        task = Distil(student, teacher, temperature=T, weight=1.0)
        loss = loss_of(task, {**variables, "params": params, "given": given}, batch)
        assert set(loss.terms) == {"soft"}  # labels are not read
        return value(loss)

    grads = {T: jax.grad(total, (0, 1))(variables["params"], teacher.variables, T) for T in (50.0, 500.0)}
    _, given = grads[50.0]
    assert all(not np.any(x) for x in jax.tree.leaves(given)) and len(jax.tree.leaves(given)) > 10
    norms = [float(optax.global_norm(found[0])) for found in grads.values()]
    assert norms[0] > 1e-3 and abs(norms[0] / norms[1] - 1) < 0.05
    # at a high temperature, that of half the squared error of centred logits by V (Hinton et al. 2015, equation 4)
    centred = lambda x: x - x.mean(-1, keepdims=True)  # noqa: E731
    theirs = centred(teacher.task.logits(teacher.variables, batch))
    wanted = jax.grad(
        lambda p: jnp.mean(jnp.sum((centred(student.logits({"params": p}, batch)) - theirs) ** 2, -1)) / 2 / 3
    )(variables["params"])
    assert_close(grads[500.0][0], wanted, 1e-2)


def trained(task, devices=1, steps=2, shape=None, tx=None, **how):
    mesh = parallel.make_mesh(devices, parallel.MeshShape(**(shape or {})))
    spec = jax.eval_shape(lambda: pictures())
    program = parallel.program(task, tx or optax.adam(0.01), spec, mesh, seed=1, **how)
    state, losses, step = program.init(parallel.put(pictures(), mesh)), [], parallel.Steps(program, [spec], mesh)
    for n in range(steps):
        state, sums = step(state, parallel.put(pictures(seed=n), mesh))
        losses.append(float(sums["loss"].mean()))
    return state, losses, sums


def test_without_weight_it_is_plain_training():
    plain, losses, _ = trained(vit())
    state, other, sums = trained(Distil(vit(), taught_by(vit(depth=3), scale=10), weight=0.0))
    assert float(sums["soft"].mean()) > 0.01
    np.testing.assert_allclose(losses, other, rtol=1e-6)
    assert_close(plain.params, state.params, 1e-5)
    taught = trained(Distil(vit(), taught_by(vit(depth=3), scale=10), weight=0.5))[0]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), plain.params, taught.params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    slots, numbers = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.opt_state, plain.params))
    assert slots == 2 * numbers + 1  # Adam's moments of the student and its count


@functools.cache
def on_one_device(scan):
    how = {"scan": scan}
    teacher = taught_by(vit(width=32, depth=4, **how), scale=10)
    task = Distil(vit(**how), teacher, hidden_weight=0.0 if scan else 0.5)
    return task, *trained(task, tx=optax.sgd(0.1))


@pytest.mark.parametrize("form", some_slow(FORMS, "jit", "tensor", "fsdp by hand", "pipeline", "fsdp"))
def test_every_form_of_the_step_learns_alike_and_no_state_holds_the_teacher(form):
    task, want, losses, _ = on_one_device(form == "pipeline")
    state, other, sums = trained(task, tx=optax.sgd(0.1), **FORMS[form])
    np.testing.assert_allclose(losses, other, rtol=1e-5)
    assert_close(want.params, state.params, 1e-4)
    assert {"hard", "soft", "agreement"} <= set(sums) and state.model_state == {}
    if state.ema is not None:
        assert set(state.ema) == {"params"}


# ----------------------------------------------------------------------------------------------- what the teacher sees


class Means(nn.Module):
    """Logits of three classes: the mean of each channel, times what a bias of one number says."""

    @nn.compact
    def __call__(self, x_BHWC, train=False):
        return x_BHWC.mean((1, 2)) * self.param("scale", nn.initializers.ones, ())


@pytest.mark.parametrize("mixed", [False, True])
def test_the_teacher_sees_the_same_pictures_and_mixtures_by_its_own_numbers(mixed):
    numbers = {"mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    student, teacher = (Classification(Means(), 3, **n) for n in ({"mean": (0.1,), "std": (0.05,)}, numbers))
    known, batch = taught_by(teacher), pictures()
    mix = Mix(student, mixup_alpha=1.0, cutmix_alpha=1.0)
    loss = loss_of(Distil(mix if mixed else student, known, 1.0, 1.0), born(student), batch)
    seen = (batch["image"] / 255 - 0.1) / 0.05
    if mixed:
        seen = np.asarray(mix.mixed(batch, jax.random.split(KEY)[0])["image"])
        assert np.abs(seen - (batch["image"] / 255 - 0.1) / 0.05).max() > 1
    theirs = ((seen * 0.05 + 0.1 - np.array(numbers["mean"])) / np.array(numbers["std"])).mean((1, 2))
    np.testing.assert_allclose(loss.terms["soft"].mean(), kl(theirs, seen.mean((1, 2)), 1.0).mean(), rtol=1e-4)
    assert loss.terms["soft"].mean() > 0.01


def test_a_mixed_student_is_trained_as_without_a_teacher():
    mix = Mix(vit(), mixup_alpha=1.0)
    task, batch = Distil(mix, taught_by(vit()), weight=0.5), pictures()
    variables = born(mix)
    plain = mix.loss(variables, batch, KEY)[0].terms["loss"]
    assert_equal(loss_of(task, variables, batch).terms["hard"], plain)
    assert np.abs(plain.mean() - vit().loss(variables, batch, KEY)[0].terms["loss"].mean()) > 1e-5


def test_a_teacher_of_larger_pictures_gets_them_in_its_size():
    big = {**pictures(), "image": np.zeros((16, 16, 16, 3), np.uint8)}
    task = Distil(vit(), taught_by(vit(), big), weight=0.5)
    assert float(loss_of(task, born(vit()), pictures()).terms["soft"].mean()) > 0
    grey = {**pictures(), "image": np.zeros((16, 8, 8, 1), np.uint8)}
    with pytest.raises(UserError, match=r"takes pictures of 1 channel\(s\), and these have 3"):
        loss_of(Distil(vit(), taught_by(vit(), grey)), born(vit()), pictures())


def test_a_teacher_does_not_drop():
    teacher = taught_by(vit(dropout=0.5), scale=10)
    task, variables = Distil(vit(), teacher, weight=1.0), born(vit())
    one, two = (loss_of(task, variables, pictures(), jax.random.key(n)).terms["soft"].mean() for n in (0, 1))
    assert one == two > 0
    assert vit(dropout=0.5).loss(born(vit()), pictures(), KEY)[0] != vit().loss(born(vit()), pictures(), KEY)[0]


@pytest.mark.parametrize("wrapped", [LoRA(vit(), 3, modules_to_save="^head"), Frozen(vit(), "block_1|^head")])
def test_a_student_may_be_adapted(wrapped):
    task, batch = Distil(wrapped, taught_by(vit(depth=3), scale=10), weight=0.5), pictures()
    variables = born(wrapped)
    assert_equal(born(task), variables)
    loss = loss_of(task, variables, batch)
    plain = Distil(vit(), task.teacher, weight=0.5)
    assert_close(loss, loss_of(plain, wrapped.unwrap(variables), batch))
    state, _, _ = trained(task)
    frozen = state.model_state.pop("frozen")
    assert state.model_state == {} and flatten(frozen).keys() == flatten(variables["frozen"]).keys()
    init_key = jax.random.split(jax.random.key(1))[0]
    assert_equal(frozen, jax.jit(task.init)(init_key, pictures())["frozen"])


@pytest.mark.parametrize(
    ("wrapped", "of"),
    [
        (Quantised(vit(), "int8"), vit(depth=1)),
        (Sparse(vit()), Quantised(vit(depth=1), "int8_weights", stored=True)),
    ],
    ids=["quantised", "sparse, of a quantised teacher"],
)
def test_a_student_may_be_quantised_or_sparse_and_a_teacher_quantised(wrapped, of):
    teacher, batch = taught_by(of), pictures()
    task, variables = Distil(wrapped, teacher, weight=0.5), born(wrapped)
    loss = loss_of(task, variables, batch)
    assert_close(loss.terms["hard"], jax.jit(wrapped.loss)(variables, batch, KEY)[0].terms["loss"])
    ours = jax.jit(wrapped.logits)(variables, batch)  # op by op, another number may round to the next integer
    theirs = of.logits(teacher.variables, batch)
    np.testing.assert_allclose(loss.terms["soft"].mean(), kl(theirs, ours, 2.0).mean(), rtol=1e-4)
    assert np.abs(ours - vit().logits(born(vit()), batch)).max() > 0 or isinstance(wrapped, Sparse)


# -------------------------------------------------------------------------------------------------------------- tokens


def decoder(vocab=11, **how):
    sizes = {"vocab_size": vocab, "length": 8, "width": 16, "depth": 2, "heads": 2, **how}
    return Decoder(**sizes)


@pytest.mark.parametrize("chunks", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_tokens_that_count_are_compared_a_part_of_the_positions_at_a_time(chunks):
    batch = masked(words(), 1)
    batch["segment_ids"] = batch["segment_ids"].at[:, 6:].set(0)
    student = CausalLanguageModel(decoder(), logit_chunks=chunks)
    teacher = taught_by(CausalLanguageModel(decoder(13, width=32)), batch)  # with room for two tokens more
    teacher.variables["params"]["embedding"] *= 20
    task, variables = Distil(student, teacher, 2.0, 0.5), born(student, batch)
    loss = loss_of(task, variables, batch)
    ours, theirs = (
        model.apply(v, batch["inputs"], batch["segment_ids"], batch["positions"])[1:, :6, :11]
        for model, v in ((student.model, variables), (teacher.task.model, teacher.variables))
    )
    soft = kl(theirs, ours, 2.0)
    assert loss.terms["soft"].weight == 18 and soft.min() > 0.1
    np.testing.assert_allclose(loss.terms["soft"].mean(), soft.mean(), rtol=1e-4)
    plain = student.loss(variables, batch, KEY)[0].terms["loss"]
    assert_close(loss.terms["hard"], plain)
    text = str(jax.make_jaxpr(jax.grad(lambda p: value(loss_of(task, {"params": p}, batch))))(variables["params"]))
    assert ("[4,8,11]" in text, "[4,8,13]" in text) == (chunks == 1, chunks == 1)


def test_translations_are_compared_by_token():
    rng = np.random.default_rng(0)
    batch = {name: rng.integers(0, 9, (4, 6)).astype(np.int32) for name in ("source", "target_in", "target_out")}
    batch |= {"source_segments": np.ones((4, 6), np.int32), "mask": np.ones(4, np.float32)}
    batch["target_out"][:, 4:] = -1
    sizes = {"vocab_size": 9, "length": 6, "heads": 2, "width": 16, "mlp_dim": 16}
    student, teacher = (Translation(EncoderDecoder(depth=n, **sizes), label_smoothing=0.1) for n in (1, 2))
    batch = {name: jnp.asarray(x) for name, x in batch.items()}
    known = taught_by(teacher, batch)
    known.variables["params"]["embedding"] *= 20
    variables = born(student, batch)
    loss = loss_of(Distil(student, known, 2.0, 0.5), variables, batch)
    assert_close(loss.terms["hard"], student.loss(variables, batch, KEY)[0].terms["loss"])
    theirs, ours = (
        t.logits(v, t.hidden(v, batch))[:, :4] for t, v in ((teacher, known.variables), (student, variables))
    )
    np.testing.assert_allclose(loss.terms["soft"].mean(), kl(theirs, ours, 2.0).mean(), rtol=1e-4)
    with pytest.raises(UserError, match="one stack of blocks, and the student is a EncoderDecoder"):
        born(Distil(student, known, hidden_weight=1.0), batch)


@pytest.mark.parametrize("kind", ["masked", "tags"])
def test_hidden_tokens_and_tags_are_compared_where_they_count(kind):
    rng = np.random.default_rng(0)
    tokens, ones = rng.integers(1, 9, (4, 6)).astype(np.int32), np.ones((4, 6), np.int32)
    batch = {"tokens": tokens, "segment_ids": ones, "token_type_ids": 0 * ones, "mask": np.ones(4, np.float32)}
    batch |= {"positions": np.cumsum(ones, 1, dtype=np.int32) - 1, "starts": ones}
    batch |= {"at": np.array([[0, 2], [1, -1], [3, 5], [4, 0]], np.int32), "tags": tokens % 3}
    batch |= {"targets": np.array([[1, 2], [3, -1], [4, 5], [6, 7]], np.int32)}
    batch["tags"][:, 4:], batch["mask"][3] = -1, 0
    batch = {name: jnp.asarray(x) for name, x in batch.items()}

    def of(width, vocab):
        model = Bert(vocab_size=vocab, length=6, depth=1, width=width, heads=2, mlp_dim=16, dropout=0.0)
        return MaskedLanguageModel(model) if kind == "masked" else Tagging(model, ("O", "B", "I"), dropout=0.0)

    student, known = of(16, 9), taught_by(of(32, 10 if kind == "masked" else 9), batch)
    known.variables["params"] = jax.tree.map(lambda x: 6 * x, known.variables["params"])
    variables, at = born(student, batch), batch["targets" if kind == "masked" else "tags"]
    loss = loss_of(Distil(student, known, 2.0, 0.5), variables, batch)
    assert_close(loss.terms["hard"], student.loss(variables, batch, KEY)[0].terms["loss"])
    theirs, ours = known.task.logits(known.variables, batch), student.logits(variables, batch)
    counts = (np.asarray(at) != -1) * np.asarray(batch["mask"])[:, None] > 0
    soft = kl(theirs[..., : ours.shape[-1]], ours, 2.0)[counts]
    assert loss.terms["soft"].weight == counts.sum() == (5 if kind == "masked" else 12) and soft.max() > 0.01
    np.testing.assert_allclose(loss.terms["soft"].mean(), soft.mean(), rtol=1e-4)
    if kind == "tags":
        other = dataclasses.replace(known, task=Tagging(known.task.model, ("B", "O", "I"), dropout=0.0))
        with pytest.raises(UserError, match="bring them into the same order"):
            loss_of(Distil(student, other), variables, batch)
    else:
        with pytest.raises(UserError, match="set next_sentence to False"):
            Distil(dataclasses.replace(student, next_sentence=True), known)


def test_masks_go_inside_of_a_teacher():
    task = Distil(vit(), taught_by(vit(depth=1)))
    with pytest.raises(UserError, match=r"Sparse goes inside: Distil\(Sparse\(task\)\)"):
        Sparse(task).init(KEY, pictures())


# -------------------------------------------------------------------------------------------------------------- inside


def test_blocks_and_scores_are_compared_as_tinybert_does():
    words = {"attention_weight": 2.0, "hidden_weight": 0.5}
    task = Distil(vit(), taught_by(vit(width=32, depth=4)), layers=((0, 1), (1, 3)), **words)
    variables, batch = born(task), masked(pictures())
    own = variables["params"]["distil"]
    assert {name: x.shape for name, x in flatten(own).items()} == dict.fromkeys(
        ("layer_0.kernel", "layer_1.kernel"), (16, 32)
    )
    assert_equal(task.unwrap(variables), born(vit()))
    loss = loss_of(task, variables, batch)

    def inside(task, variables):
        x = task.normalise(batch["image"])
        kept = task.model.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1]["intermediates"]
        return kept["encoder"], variables["params"]["encoder"]

    (ours, params), (theirs, their_params) = (
        inside(vit(), task.unwrap(variables)),
        inside(task.teacher.task, task.teacher.variables),
    )
    out = lambda kept, i: kept[f"block_{i}"]["__call__"][0]  # noqa: E731
    errors = [
        np.mean((out(ours, i) @ own[f"layer_{i}"]["kernel"] - out(theirs, j)) ** 2, -1)[3:] for i, j in ((0, 1), (1, 3))
    ]
    np.testing.assert_allclose(loss.terms["hidden"].mean(), np.mean(errors), rtol=1e-4)
    grads = jax.grad(lambda p: value(loss_of(task, {"params": p}, batch)))(variables["params"])
    assert all(np.abs(x).max() > 1e-5 for x in jax.tree.leaves(grads["distil"]))

    def scores(kept, params, i):
        y, attention = kept[f"block_{i}"]["norm1"]["__call__"][0], params[f"block_{i}"]["attention"]
        q, k = (np.einsum("bld,dhk->blhk", y, attention[n]["kernel"]) + attention[n]["bias"] for n in ("query", "key"))
        return np.einsum("blhk,bshk->bhls", q, k) / np.sqrt(q.shape[-1])

    wanted = [(scores(ours, params, i) - scores(theirs, their_params, j)) ** 2 for i, j in task.layers]
    np.testing.assert_allclose(loss.terms["attention"].mean(), np.mean(np.mean(wanted, 0)[3:]), rtol=1e-4)
    assert loss.terms["attention"].mean() > 1e-3
    np.testing.assert_allclose(
        value(loss),
        0.1 * loss.terms["hard"].mean() + 3.6 * loss.terms["soft"].mean() + 0.5 * loss.terms["hidden"].mean()
        + 2 * loss.terms["attention"].mean(),
        rtol=1e-5,
    )  # fmt: skip


def test_a_causal_block_is_compared_where_it_sees():
    batch = words()
    batch["segment_ids"] = batch["segment_ids"].at[:, 5:].set(2).at[:, 7:].set(0)
    task = Distil(
        CausalLanguageModel(decoder()), taught_by(CausalLanguageModel(decoder(depth=4)), batch), attention_weight=1.0
    )
    loss = loss_of(task, born(task, batch), batch)
    assert loss.terms["attention"].weight == 4 * (5 * 6 / 2 + 2 * 3 / 2)
    assert task._pairs() == ((0, 1), (1, 3))


# ------------------------------------------------------------------------------------------------------------ mistakes


def other(**how):
    return Classification(dataclasses.replace(vit().model, **how))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Distil(vit(), None, temperature=0.0), "temperature is 0.0; it is above 0"),
        (lambda: Distil(vit(), None, weight=1.5), "weight is 1.5; it is the teacher's share"),
        (lambda: Distil(vit(), None, divergence="foward"), "no divergence 'foward'. Did you mean 'forward'"),
        (lambda: Distil(vit(), None, hidden_weight=-1.0), "hidden_weight is -1.0; it is not negative"),
        (lambda: Distil(dataclasses.replace(vit(), loss_kind="sigmoid"), None), "loss_kind is 'sigmoid'"),
        (lambda: Distil(Distil(vit(), taught_by(vit())), taught_by(vit())), "has a teacher already"),
        (lambda: Mix(Distil(vit(), taught_by(vit())), 0.2), r"Mix goes inside.*Distil\(Mix\(task\)\)"),
        (lambda: LoRA(Distil(vit(), taught_by(vit()))), r"LoRA goes inside: Distil\(LoRA\(task\)\)"),
        (lambda: Distil(vit(), taught_by(other(num_classes=4))), "runs/teacher has 4 classes, and the student 3"),
        (
            lambda: Distil(vit(), taught_by(CausalLanguageModel(decoder()), words())),
            "a Classification learns from another one, and the teacher runs/teacher is a CausalLanguageModel",
        ),
        (lambda: Distil(vit(), taught_by(vit(scan=True)), hidden_weight=1.0), "runs/teacher are in one stack.*export"),
        (lambda: Distil(vit(scan=True), taught_by(vit()), hidden_weight=1.0), "student are in one stack.*scan=False"),
        (lambda: Distil(vit(remat=True), taught_by(vit()), hidden_weight=1.0), "the student computes.*remat=False"),
        (lambda: Distil(vit(), taught_by(vit(heads=2)), attention_weight=1.0), "has 4 heads, and the teacher 2"),
        (lambda: Distil(vit(), taught_by(vit(patch=2)), hidden_weight=1.0), "see 5 positions, and the teacher's 17"),
        (lambda: Distil(vit(), taught_by(vit()), hidden_weight=1.0, layers=((0, 2),)), "student has blocks 0 to 1"),
        (
            lambda: Distil(Classification(MLP(3)), taught_by(vit()), hidden_weight=1.0),
            "the student is a MLP; set them to 0",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        task = make()
        variables = jax.eval_shape(task.init, KEY, pictures())
        given = {} if isinstance(task, LoRA) else {"given": task.given.shapes}
        jax.eval_shape(functools.partial(task.loss, batch=pictures(), key=KEY), {**variables, **given})


@pytest.mark.parametrize(
    ("names", "message"),
    [(("dog", "cat", "cow"), "cat, dog, cow.*the same order"), (("a", "b", "c"), None)],
)
def test_classes_in_another_order_are_refused_and_of_other_names_are_said(names, message, capsys):
    teacher = dataclasses.replace(vit(), class_names=names)
    student = dataclasses.replace(vit(), class_names=("cat", "dog", "cow"))
    task = Distil(student, taught_by(teacher))
    if message:
        with pytest.raises(UserError, match=message):
            loss_of(task, born(student), pictures())
    else:
        loss_of(task, born(student), pictures())
        assert "calls its classes a, b, c" in capsys.readouterr().err


def test_another_tokenizer_is_refused():
    from bigbase_jax.text.tokenizer import Characters

    one, two = (
        Characters().fit(lambda text=text: iter([text]), lambda: iter(()), False).state() for text in ("ab", "abc")
    )
    teacher = taught_by(CausalLanguageModel(decoder(), one), words())
    with pytest.raises(UserError, match="reads by another tokenizer"):
        loss_of(Distil(CausalLanguageModel(decoder(), two), teacher), born(teacher.task, words()), words())


def test_everything_else_is_the_tasks():
    task = Distil(vit(), taught_by(vit()), hidden_weight=1.0)
    variables, batch = born(task), pictures()
    assert (task.inputs, task.batch_coupled, task.num_classes) == (("image",), False, 3)
    assert_equal(task.predict(variables, batch), vit().predict(born(vit()), batch))
    assert_equal(task.evaluate(variables, batch), vit().evaluate(born(vit()), batch))
    assert_equal(task.logits(variables, batch), vit().logits(born(vit()), batch))
    assert set(born(Distil(vit(), dataclasses.replace(task.teacher, there=False), hidden_weight=1.0))["params"]) == set(
        born(vit())["params"]
    )


# ------------------------------------------------------------------------------------------------------------- on disk


def recipe(arg, teacher, **train):
    config = runpy.run_path("configs/distil.py")["get_config"](arg)
    config.teacher = str(teacher)
    config.train.update({"devices": 1, **train})
    return config


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of texts, adapted from a fresh model."""
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    arg = "tiny,root=docs/examples/reviews.csv,adapt=lora"
    verbs.train(runpy.run_path("configs/text_classify.py")["get_config"](arg), str(folder))
    return folder


def test_a_run_goes_on_to_the_same_bits_with_the_same_teacher_alone_and_then_needs_none(teacher, tmp_path, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    arg = "recipe=text_classify,tiny,root=docs/examples/reviews.csv,tokenizer=chars"
    config = functools.partial(recipe, arg, folder, ema_decay=0.9)
    whole = verbs.train(config(), str(tmp_path / "whole"))
    student = str(tmp_path / "student")
    assert verbs.train(config(), student, observe=lambda step, _: "enough" if step == 4 else None)["step"] == 4

    said = folder / "config.json"
    said.write_text(said.read_text().replace('"rank": 8', '"rank": 8.0'))
    with pytest.raises(UserError, match=r"config.task.teacher.fingerprint is '\w+' there and '\w+' here"):
        verbs.train(config(), student)
    folder.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="teacher is not there; training needs it, put it back"):
        verbs.train(config(), student)
    with pytest.raises(UserError, match="there is no teacher at config.teacher="):
        verbs.train(config(), str(tmp_path / "third"))
    shutil.copytree(teacher, folder)
    assert verbs.train(config(), student) == whole
    assert arrays(tmp_path / "student") == arrays(tmp_path / "whole")
    names = set(arrays(tmp_path / "student")[1])
    assert not any("given" in name or "lora" in name for name in names) and any(n.startswith("ema.") for n in names)
    rows = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert {"hard", "soft", "agreement"} <= next(row for row in rows if row["kind"] == "train").keys()

    shutil.rmtree(folder)
    result = verbs.evaluate(student)
    assert result["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert "not what the run was trained on" not in capsys.readouterr().err
    assert verbs.train(config(), student) == whole  # it only evaluates
    found = Predictor.open(student).answer({"text": "very good"})[0]
    assert set(found) == {"label", "probability", "probabilities"}
    exported = verbs.export(student)["files"]
    assert "model.safetensors" in exported and "tokenizer.json" in exported
    kept = json.loads((pathlib.Path(student) / "config.json").read_text())
    assert kept["data"]["dataset"]["tokenizer"]["path"] == str(folder)  # and not characters


def test_a_published_teacher_and_one_that_was_distilled_itself(teacher, tmp_path):
    verbs.export(str(teacher), output=str(tmp_path / "published"))
    arg = "recipe=text_classify,tiny,root=docs/examples/reviews.csv"
    verbs.train(recipe(arg, tmp_path / "published"), str(tmp_path / "student"))
    of_run, of_folder, again = (Teacher(str(tmp_path / p)) for p in (teacher, "published", "student"))
    mesh = parallel.make_mesh(2, parallel.MeshShape(data=1, fsdp=2))
    found = []
    for one in (of_run, of_folder):
        like = parallel.placed(one.shapes, parallel.fitting_shardings(one.shapes, mesh, ("fsdp:16",)))
        assert sum(x.sharding.is_fully_replicated for x in jax.tree.leaves(like)) < len(jax.tree.leaves(like)) / 2
        read = one.read(like)
        assert jax.tree.map(lambda x: x.sharding, read) == jax.tree.map(lambda x: x.sharding, like)
        found.append(jax.device_get(flatten(read)))
    assert_close(*found, 1e-5)
    assert type(again.task) is type(of_run.task) and again.shapes.keys() == {"params"}
    assert len({one.signature() for one in (of_run, of_folder, again)}) == 3


@pytest.mark.parametrize(
    ("arg", "key", "given", "message"),
    [
        ("tiny", "teacher", None, "config.teacher is missing.*configs/catdog.py trains one"),
        ("tiny", "teacher", "nowhere", "there is no teacher at config.teacher='nowhere'"),
        ("recipe=catdgo", "seed", 0, "no recipe=catdgo. Did you mean 'catdog'"),
    ],
)
def test_mistakes_of_the_recipe_are_one_sentence(arg, key, given, message, tmp_path):
    with pytest.raises(UserError, match=message):
        config = runpy.run_path("configs/distil.py")["get_config"](arg)
        if given is not None:
            config[key] = given
        verbs.train(config, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_the_recipe_is_around_any_other():
    get = runpy.run_path("configs/distil.py")["get_config"]
    photos = get("root=/photos,of mine,augment=mixup")
    assert photos.data.dataset.root == "/photos,of mine" and photos.task.task.target.endswith(":Mix")
    assert tuple(photos.task.task.task.model.stages) == (12, 24, 48, 96, 96)
    photos.teacher = "runs/x"
    assert photos.task.teacher.path == "runs/x"
    assert get("recipe=lm,size=baby").task.task.model.width == 384
