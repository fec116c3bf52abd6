"""A decoder that reads pictures: what it writes step by step is what it gives at once, and it does read the picture.

Legend: B examples, C captions, L length, P places of a picture.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.picture_reader import PictureReader
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.transformer import LLAMA
from bigbase_jax.models.vit import ViT
from bigbase_jax.tasks.captioning import Captioning

CLS, SEP, L = 1, 2, 6
TOWERS = {
    "vit": ViT(width=8, depth=1, heads=2, patch=4, pool="gap"),
    "resnet": ResNet(width=4, stem="patch"),
}


def task(tower="vit", positions="rope"):
    decoder = Decoder(9, 20, width=8, depth=2, heads=2, positions=positions, style=LLAMA)
    return Captioning(PictureReader(TOWERS[tower], decoder), length=L, cls_id=CLS, sep_id=SEP)


def batch_of(B, C=2, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, 9, (B, C, L)).astype(np.int32)
    tokens[:, :, 0], tokens[:, :, 4] = CLS, SEP
    segments = np.ones_like(tokens)
    segments[:, :, 5:] = 0
    segments[0, 1:] = 0
    prompt = np.full((B, L), -1, np.int32)
    prompt[:, 0] = CLS
    image = rng.integers(0, 256, (B, 8, 8, 3)).astype(np.uint8)
    return {"image": image, "tokens": tokens, "segment_ids": segments, "prompt": prompt, "mask": np.ones(B, np.float32)}


@pytest.mark.parametrize(
    ("tower", "positions"), [("vit", "rope"), pytest.param("resnet", "learned", marks=pytest.mark.slow)]
)
def test_what_is_written_is_the_likeliest_after_the_picture_the_prompt_and_what_came_before(tower, positions):
    own, batch = task(tower, positions), batch_of(3)
    batch["prompt"][1, 1:3] = 5, 7  # prompts differ in length
    batch["prompt"][2, 1] = 4
    variables = jax.tree.map(
        lambda x: 3 * x, jax.jit(own.init)(jax.random.key(1), batch)
    )  # sharp enough to tell tokens apart
    written = np.asarray(jax.jit(own.predict)(variables, batch)["written"])
    image, read = own._normalised(batch["image"]), jax.jit(own.model.apply)
    for b in range(3):
        text = [t for t in batch["prompt"][b] if t >= 0]
        for wanted in written[b]:
            padded = np.zeros((1, 2 * L), np.int32)  # what comes later is not seen
            padded[0, : len(text)] = text
            best = int(np.argmax(read(variables, image[b : b + 1], padded)[0, len(text) - 2 * L - 1]))
            assert best == (SEP if wanted < 0 else wanted)
            if wanted < 0:
                break
            text.append(best)
    assert len({tuple(row) for row in written}) > 1


def test_the_picture_is_before_every_token_and_nothing_sees_what_comes_later():
    own, batch = task(), batch_of(2)
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    tokens = jnp.asarray(batch["tokens"][:, 0])

    def logits(image, vectors=None):
        return own.model.apply(variables, image, tokens)

    image = own._normalised(batch["image"])
    for place in (0, 3):
        grads = jax.grad(lambda x, place=place: logits(x)[0, place].sum() ** 2)(image)
        assert np.abs(grads[0]).max() > 0 and np.abs(grads[1]).max() == 0
    other = tokens.at[:, 4:].set(3)
    a, b = (own.model.apply(variables, image, x) for x in (tokens, other))
    assert not np.array_equal(tokens, other)
    np.testing.assert_allclose(a[:, :4], b[:, :4], atol=1e-5)
    assert np.abs(a[:, 4:] - b[:, 4:]).max() > 1e-3


def test_it_learns_which_caption_belongs_to_which_picture():
    own, batch = task(), batch_of(4, C=1, seed=3)
    batch["segment_ids"][0] = batch["segment_ids"][1]
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        grads = jax.grad(lambda p: own.loss({"params": p}, batch, key)[0].terms["loss"].mean())(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], tx.init(variables["params"])
    for i in range(150):
        params, state = step(params, state, jax.random.key(i))
    examples, sums = jax.jit(own.evaluate)({"params": params}, batch)
    np.testing.assert_array_equal(examples["written"][:, :3], batch["tokens"][:, 0, 1:4])
    assert (examples["written"][:, 3:] == -1).all()
    assert float(sums["loss"].mean()) < 0.1 and float(sums["loss"].weight) == 16
    assert (examples["tokens"][:, 0, 0] == -1).all()  # where the prompt is
    scores = own.meters()["captions"]
    scores.update({name: np.asarray(x) for name, x in examples.items()})
    assert scores.result()["chrf"] > 99


def test_what_is_asked_is_not_learned():
    own, batch = task(), batch_of(2)
    variables = jax.jit(own.init)(jax.random.key(0), batch)
    loss = jax.jit(lambda prompt: own.loss(variables, {**batch, "prompt": prompt}, jax.random.key(1))[0])
    whole = loss(batch["prompt"])
    prompt = batch["prompt"].copy()  # the first may still be read
    prompt[:, 1:3] = batch["tokens"][:, 0, 1:3]
    answers = loss(prompt)
    assert whole.terms["loss"].weight == 8 and answers.terms["loss"].weight == 4
    assert whole.terms["loss"].total > answers.terms["loss"].total > 0


def test_mistakes_are_told():
    with pytest.raises(UserError, match="max_length is 0"):
        dataclasses.replace(task(), max_length=0)
    with pytest.raises(UserError, match="the token that ends them"):
        dataclasses.replace(task(), sep_id=None).init(jax.random.key(0), batch_of(1))
    short = Captioning(
        PictureReader(TOWERS["vit"], Decoder(9, 6, width=8, depth=1, heads=2)), length=L, cls_id=CLS, sep_id=SEP
    )
    with pytest.raises(UserError, match="a sequence of 9 tokens is longer than the 6"):
        short.init(jax.random.key(0), batch_of(1))
