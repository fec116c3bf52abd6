"""CTC and attention together: the search finds the best of all transcripts, padding does not matter, losses add up."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.models.joint_ctc import JointCTC
from bigbase_jax.models.speech_encoder import SpeechEncoder
from bigbase_jax.tasks.joint_recognition import JointRecognition
from bigbase_jax.text import ngram
from bigbase_jax.text.tokenizer import Symbols

RATE = 8000
TOKENIZER = Symbols(" ab", False).state()


def task(**words):
    encoder = SpeechEncoder(width=16, depth=1, taps=3, dropout=0.0)
    model = JointCTC(encoder, 3, depth=1, heads=2, dropout=0.0)
    given = {"mels": 20, "frame_seconds": 0.04, **words}
    return JointRecognition(model, TOKENIZER, RATE, "words", **given)


def batch(T=2400, lengths=(2400, 1700)):
    rng = np.random.default_rng(0)
    audio = np.zeros((2, T), np.int16)
    for row, length in zip(audio, lengths, strict=True):
        row[:length] = rng.normal(size=length) * 3000
    return {
        "audio": audio,
        "audio_length": np.array(lengths, np.int32),
        "labels": np.array([[1, 2, 0], [1, 0, 0]], np.int32),
        "labels_length": np.array([2, 1], np.int32),
        "reference": np.frombuffer(b"ab\0a\0\0", np.uint8).reshape(2, 3),
        "mask": np.ones(2, np.float32),
    }


def made(one, rows):
    variables = jax.jit(one.init)(jax.random.key(0), rows)
    noise = jax.random.split(jax.random.key(1), 200)
    leaves, tree = jax.tree.flatten(variables)
    return jax.tree.unflatten(
        tree, [x + 0.3 * jax.random.normal(key, x.shape) for x, key in zip(leaves, noise, strict=False)]
    )


def test_the_search_finds_the_transcript_of_the_best_joint_score():
    one = task(beams=40, max_tokens=4)
    rows = batch()
    variables = made(one, rows)
    found = jax.device_get(jax.jit(one.predict)(variables, rows))
    every = [said for n in range(4) for said in itertools.product(range(3), repeat=n)]
    assert len(every) == 40

    @jax.jit
    def scores(said_BU, length_B):  # [rows, transcripts]
        many = {name: jnp.repeat(jnp.asarray(rows[name]), len(every), 0) for name in one.inputs}
        many |= {"labels": jnp.tile(said_BU, (2, 1)), "labels_length": jnp.tile(length_B, 2)}
        many["mask"] = jnp.ones(2 * len(every))
        target_BU, out_BU = one._targets(many)
        (logits, frames, next_BUL) = one.model.apply(variables, *one.bands(many), target_BU)

        def nats(n):
            some = {name: x[n][None] for name, x in many.items()}
            sums = one._losses((logits[n][None], frames[n][None], next_BUL[n][None]), out_BU[n][None], some, 0.0)
            return sums["loss"].total, one.alignable(frames[n][None], some)[0]

        return jax.lax.map(nats, jnp.arange(2 * len(every)))

    said_BU = np.array([[*said, *[0] * (3 - len(said))] for said in every], np.int32)
    nats, possible = scores(said_BU, np.array([len(said) for said in every], np.int32))
    joint = np.where(possible > 0, -np.asarray(nats), -np.inf).reshape(2, -1)
    for b in range(2):
        best = np.argsort(-joint[b])[:5]
        ended = np.flatnonzero((found["tokens"][b] >= 0).sum(1) < 4)  # those of four tokens were cut
        for n, which in zip(ended, best, strict=False):
            row = found["tokens"][b, n]
            assert tuple(row[row >= 0].tolist()) == every[which]
            np.testing.assert_allclose(found["scores"][b, n], joint[b, which], atol=2e-4)
        ended = {name: x[b] for name, x in found.items()} | {
            name: found[name][b][ended] for name in ("tokens", "scores")
        }
        answer = one.postprocess(ended, {})
        assert answer["text"] == " ".join("".join(" ab"[token] for token in every[best[0]]).split())


def test_padding_changes_neither_outputs_nor_losses():
    one = task(beams=3)
    short, long = batch(), batch(T=4000)
    variables = made(one, short)
    (a, sums_a), (b, sums_b) = (jax.jit(one.evaluate)(variables, rows) for rows in (short, long))
    assert one.texts({**a, "path": np.asarray(a["path"])}) == one.texts({**b, "path": np.asarray(b["path"])})
    np.testing.assert_allclose(a["scores"], b["scores"], atol=1e-4)
    for name in ("loss", "ctc", "attention"):
        np.testing.assert_allclose(sums_a[name].total, sums_b[name].total, rtol=1e-5)
    np.testing.assert_allclose(
        sums_a["loss"].total, 0.3 * sums_a["ctc"].total + 0.7 * sums_a["attention"].total, rtol=1e-5
    )


def test_a_language_model_chooses_among_beams():
    rows = batch()
    plain = task(beams=8, max_tokens=3)
    variables = made(plain, rows)
    row = {name: np.asarray(x[0]) for name, x in jax.jit(plain.predict)(variables, rows).items()}
    tokens = [tuple(t[t >= 0].tolist()) for t in row["tokens"]]
    wanted = next(said for said in tokens[1:] if said and 0 not in said)
    model = ngram.fit([["".join(" ab"[token] for token in wanted)]] * 5, 2)
    judged = task(beams=8, max_tokens=3, language_model=model.arpa(), language_weight=50.0)
    assert [token.token for token in judged.tokens(row)] == list(wanted) != [token.token for token in plain.tokens(row)]


def test_weights_out_of_range_are_told():
    with pytest.raises(UserError, match=r"ctc_weight is 1\.5"):
        task(ctc_weight=1.5)
