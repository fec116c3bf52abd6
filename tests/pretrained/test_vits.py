"""VITS against transformers: the same waveforms at the same noise, in odd shapes, by one speaker and by several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.models.vits import Vits
from bigbase_jax.pretrained import load

TINY = {
    "vocab_size": 17,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "window_size": 3,
    "ffn_dim": 14,
    "flow_size": 10,
    "spectrogram_bins": 9,
    "upsample_initial_channel": 16,
    "upsample_rates": [3, 2],
    "upsample_kernel_sizes": [7, 4],
    "resblock_kernel_sizes": [3, 5],
    "resblock_dilation_sizes": [[1, 3], [1, 2]],
    "prior_encoder_num_flows": 2,
    "prior_encoder_num_wavenet_layers": 2,
    "posterior_encoder_num_wavenet_layers": 1,
    "duration_predictor_num_flows": 3,
    "duration_predictor_flow_bins": 5,
    "duration_predictor_filter_channels": 11,
    "depth_separable_num_layers": 2,
}
CASES = {
    "one speaker, durations drawn": TINY,
    "three speakers, dilated": {**TINY, "num_speakers": 3, "speaker_embedding_size": 5, "wavenet_dilation_rate": 2},
    "durations predicted, an even kernel": {
        **TINY,
        "use_stochastic_duration_prediction": False,
        "num_speakers": 3,
        "speaker_embedding_size": 5,
        "ffn_kernel_size": 4,
        "use_bias": False,
        "hidden_act": "gelu",
        "num_attention_heads": 3,
        "duration_predictor_kernel_size": 5,
    },
    "a vector for the one speaker": {**TINY, "speaker_embedding_size": 5, "speaking_rate": 0.7},
}


def spread(model, seed):
    """Random weights everywhere, also where fresh ones are 0."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "flows.0.log_scale" in name or "translate" in name:
                x.normal_(0, 0.3)
            elif "original0" not in name and x.ndim > 1:
                x.mul_(0.7 if "duration" in name else 1.2)
    return model


@pytest.mark.parametrize("case", CASES)
def test_the_same_waveform_at_the_same_noise(hf, random_model, tmp_path, monkeypatch, case):
    words, L, F = CASES[case], 23, 300
    theirs = spread(random_model("VitsModel", **words), 3).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    random = np.random.default_rng(0)
    tokens, speaker = random.integers(0, 17, (1, L)), 2 if words.get("num_speakers") else 0
    of_duration = random.normal(size=(1, L, 2)).astype(np.float32)
    of_prior = random.normal(size=(1, F, 10)).astype(np.float32)
    torch = hf.torch
    monkeypatch.setattr(torch, "randn", lambda *shape: torch.tensor(of_duration).swapaxes(1, 2))
    like = lambda x: torch.tensor(of_prior[:, : x.shape[2]]).swapaxes(1, 2)  # noqa: E731
    monkeypatch.setattr(torch, "randn_like", like)
    kwargs = {"speaker_id": speaker} if words.get("num_speakers") else {}
    with torch.no_grad():
        want = theirs(torch.tensor(tokens), **kwargs).waveform[0].numpy()
    frames = len(want) // 6
    assert L < frames < F and want.std() > 0.01, (frames, want.std())  # there is something to compare

    model, variables = load(tmp_path / "theirs")
    assert isinstance(model, Vits)
    rate = np.float32([words.get("speaking_rate", 1.0)])

    def said(tokens, present, of_duration):
        with jax.default_matmul_precision("highest"):
            given = (tokens, present, np.int32([speaker]), rate, of_duration, of_prior)
            return jax.jit(model.apply)(variables, *map(jnp.asarray, given))

    wave_BT, count_B = said(tokens, np.ones_like(tokens), of_duration)
    assert int(count_B[0]) == len(want)
    np.testing.assert_allclose(wave_BT[0, : len(want)], want, atol=1e-3)
    assert not np.asarray(wave_BT[0, len(want) :]).any()
    pad = ((0, 0), (0, 9))
    padded, count_B = said(
        *(np.pad(x, pad) for x in (tokens, np.ones_like(tokens))), np.pad(of_duration, (*pad, (0, 0)))
    )
    assert int(count_B[0]) == len(want)
    np.testing.assert_allclose(padded[0], wave_BT[0], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"upsample_kernel_sizes": [6, 4]}, "a multiple of 2 more"),
        ({"num_speakers": 3}, "speaker_embedding_size of 0"),
        ({"resblock_kernel_sizes": [3, 4]}, "even size"),
        ({"upsample_rates": [3]}, "2 kernels for 1"),
        ({"depth_separable_channels": 4}, "only 2 is known"),
        ({"hidden_size": 1 << 30}, "hidden_size"),
    ],
)
def test_other_configs_are_refused(random_model, tmp_path, change, said):
    import json

    random_model("VitsModel", **TINY).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=said):
        load(tmp_path)
