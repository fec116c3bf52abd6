"""A vocoder learns, its judges and it learn apart in one step, and a run opens as a function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bigbase_jax.core import Evaluated, UserError
from bigbase_jax.models.vocos import Judges, Vocos
from bigbase_jax.tasks.vocoding import Vocoding, open_vocoder
from bigbase_jax.train import train
from configs import vocoder as recipe

RATE = 4000
SMALL = Vocos(width=16, depth=2, hidden=32, fft=256, hop=64)


def sounds(samples=2048):
    t = np.arange(samples) / RATE
    return {"audio": np.stack([0.3 * np.sin(2 * np.pi * hz * t) for hz in (200, 330)]), "mask": np.ones(2, np.float32)}


def test_a_wave_is_as_long_as_its_frames_and_frames_far_away_do_not_reach_it():
    mel_BFM = jax.random.normal(jax.random.key(1), (1, 40, 80)) - 4
    variables = jax.jit(SMALL.init)(jax.random.key(0), mel_BFM)
    wave = jax.jit(functools.partial(SMALL.apply, variables))
    assert wave(mel_BFM).shape == (1, 40 * 64)
    for frames in (1, 3):
        assert wave(mel_BFM[:, :frames]).shape == (1, frames * 64)
    reach = jnp.abs(jax.jit(jax.grad(lambda x: wave(x)[0, 20 * 64]))(mel_BFM)).max((0, 2))
    assert reach[20] > 0 and not reach[:8].any() and not reach[32:].any()  # 3 + 2 * 3 frames, and those of a window


def test_judges_and_vocoder_learn_apart_in_one_loss():
    task = Vocoding(SMALL, Judges((3,), (128,), 16), rate=RATE, ffts=(128,))
    batch = sounds()
    variables = jax.jit(task.init)(jax.random.key(0), batch)

    @jax.jit
    def gradients(params):
        def total(params, names):
            terms = task.loss({"params": params}, batch, jax.random.key(1))[0].terms
            return sum(terms[name].total for name in names)

        found = [
            jax.grad(total)(params, names) for names in (("judges",), ("mel", "spectra", "adversarial", "matching"))
        ]
        return [{part: optax.global_norm(tree) for part, tree in both.items()} for both in found]

    of_judges, of_vocoder = gradients(variables["params"])
    assert of_judges["judges"] > 0 == of_judges["vocoder"]
    assert of_vocoder["vocoder"] > 0 == of_vocoder["judges"]
    loss = jax.jit(lambda batch: task.loss(variables, batch, jax.random.key(1))[0].terms)
    masked, alone = loss({**batch, "mask": np.array([1, 0], np.float32)}), loss({k: x[:1] for k, x in batch.items()})
    for name, term in masked.items():
        np.testing.assert_allclose(term.mean(), alone[name].mean(), rtol=1e-5)


def test_silence_has_a_finite_gradient():
    task = Vocoding(SMALL, rate=RATE, ffts=(128,))
    batch = {"audio": np.zeros((1, 1024), np.int16), "mask": np.ones(1, np.float32)}
    variables = jax.jit(task.init)(jax.random.key(0), batch)
    total = jax.jit(jax.grad(lambda v: sum(t.total for t in task.loss(v, batch, jax.random.key(1))[0].terms.values())))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(total(variables)))


def test_what_does_not_fit_is_one_sentence():
    with pytest.raises(UserError, match="model.fft is 256; sound of 16000 samples a second takes 1024"):
        Vocoding(SMALL, rate=16_000)
    with pytest.raises(UserError, match="shorter than a window"):
        Vocoding(SMALL, rate=RATE).init(jax.random.key(0), {"audio": np.zeros((1, 100), np.int16)})


def test_a_run_opens_as_a_vocoder(tmp_path):
    config = recipe.get_config("tiny")
    config.train.writers = ()
    result = train(config, str(tmp_path / "run"))
    assert result["loss"] > 0
    kept = dict(np.load(tmp_path / "run" / "predictions-test.npz"))
    (clips,) = Vocoding(SMALL, rate=RATE).figures(Evaluated("test", {}, kept))
    assert len(clips.clips) == 6 and clips.clips[0][1].shape == (3968,)
    vocoder = open_vocoder(tmp_path / "run")
    rng = np.random.default_rng(0)
    mel_BFM = rng.normal(-4, 1, (2, 70, 80)).astype(np.float32)
    wave_BT = vocoder(mel_BFM)
    assert wave_BT.shape == (2, 70 * vocoder.features.hop)
    np.testing.assert_allclose(
        vocoder(np.pad(mel_BFM, ((0, 0), (0, 30), (0, 0))))[:, :2000], wave_BT[:, :2000], atol=1e-5
    )
    for frames in (1, 2):
        assert np.isfinite(vocoder(np.full((1, frames, 80), np.log(1e-5)))).all()
    for wrong, said in ((mel_BFM[..., :40], "reads 80 mel bands, not 40"), (mel_BFM * np.nan, "no numbers")):
        with pytest.raises(UserError, match=said):
            vocoder(wrong)
    with pytest.raises(UserError):
        open_vocoder(tmp_path)
    open_vocoder.cache_clear()
    for file in (tmp_path / "run" / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="checkpoint"):
        open_vocoder(tmp_path / "run")
