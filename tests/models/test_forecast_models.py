"""DLinear, NLinear, TiDE and PatchTST against the papers' models, written anew in PyTorch; covariates, mistakes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bigbase_jax.models.forecast import DLinear, NLinear, PatchTST, SeasonalNaive, TiDE
from bigbase_jax.models.layers import ModelError

B, L, H, C = 2, 40, 6, 3
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, L, C)).cumsum(1), jnp.float32)


def told(model, x=X, **words):
    variables = model.init(jax.random.key(0), x, **words)
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + jnp.asarray(0.1 * random.random(leaf.shape) - 0.02, jnp.float32), variables)


def tensor(x):
    return torch.tensor(np.asarray(x))


def linear(kernel_and_bias, x_BCL):
    """A torch ``Linear`` over time, as LTSF-Linear has it: [B, C, L] -> [B, H, C]."""
    kernel, bias = (tensor(kernel_and_bias[name]) for name in ("kernel", "bias"))
    return torch.nn.functional.linear(x_BCL, kernel.T, bias).permute(0, 2, 1)


def test_dlinear_is_that_of_the_paper():
    model = DLinear(horizon=H, kernel=7)
    variables = told(model)
    x_BCL = tensor(X).permute(0, 2, 1)
    padded = torch.cat([x_BCL[..., :1].repeat(1, 1, 3), x_BCL, x_BCL[..., -1:].repeat(1, 1, 3)], -1)
    trend = torch.nn.AvgPool1d(7, 1)(padded)
    params = variables["params"]
    wanted = linear(params["seasonal"], x_BCL - trend) + linear(params["trend"], trend)
    np.testing.assert_allclose(model.apply(variables, X)[..., 0], wanted, atol=1e-5)


def test_nlinear_is_that_of_the_paper_and_moves_with_its_series():
    model = NLinear(horizon=H)
    variables = told(model)
    x = tensor(X)
    last = x[:, -1:]
    wanted = linear(variables["params"]["linear"], (x - last).permute(0, 2, 1)) + last
    np.testing.assert_allclose(model.apply(variables, X)[..., 0], wanted, atol=1e-5)
    np.testing.assert_allclose(model.apply(variables, X + 5), model.apply(variables, X) + 5, atol=1e-4)


def torch_tide(params, x_BLC, known_BSK, decoded):
    """TiDE's paper, section 4, in PyTorch, with one layer each, without dropout."""

    def dense(name, x):
        return torch.nn.functional.linear(x, tensor(params[name]["kernel"]).T, tensor(params[name]["bias"]))

    def residual_block(name, x):
        y = dense(f"{name}_out", torch.relu(dense(f"{name}_hidden", x))) + dense(f"{name}_skip", x)
        norm = params.get(f"{name}_norm")
        scale, bias = (tensor(norm[n]) for n in ("scale", "bias")) if norm else (None, None)
        return torch.nn.functional.layer_norm(y, y.shape[-1:], scale, bias, 1e-6) if norm else y

    known = residual_block("covariates", known_BSK)
    forecasts = []
    for c in range(x_BLC.shape[-1]):
        encoding = residual_block("encoder_0", torch.cat([x_BLC[..., c], known.flatten(1)], -1))
        steps = residual_block("decoder_0", encoding).unflatten(-1, (H, decoded))
        y = residual_block("steps", torch.cat([steps, known[:, L:]], -1))[..., 0]
        forecasts.append(y + dense("linear", x_BLC[..., c]))
    return torch.stack(forecasts, -1)


def test_tide_is_that_of_the_paper():
    model = TiDE(horizon=H, width=24, features=3, decoded=5)
    covariates = jnp.asarray(np.random.default_rng(2).normal(size=(B, L + H, 2)), jnp.float32)
    variables = told(model, covariates_BSK=covariates)
    wanted = torch_tide(variables["params"], tensor(X), tensor(covariates), decoded=5)
    np.testing.assert_allclose(model.apply(variables, X, covariates)[..., 0], wanted, atol=1e-4)
    rescaled = model.clone(normalise=True)
    found = rescaled.apply(variables, 100 * X - 7, covariates)
    np.testing.assert_allclose(found, 100 * rescaled.apply(variables, X, covariates) - 7, rtol=1e-3, atol=1e-2)


class TorchPatchTST(torch.nn.Module):
    """PatchTST's paper in PyTorch: RevIN, patches, post-norm encoder with BatchNorm, one flat head."""

    def __init__(self, width, depth, heads, mlp_dim, patch, stride, patches):
        super().__init__()
        self.patch, self.stride, self.heads = patch, stride, heads
        self.embed = torch.nn.Linear(patch, width)
        self.position = torch.nn.Parameter(torch.zeros(patches, width))
        self.blocks = torch.nn.ModuleList()
        for _ in range(depth):
            names = {name: torch.nn.Linear(width, width) for name in ("query", "key", "value", "out")}
            names |= {"up": torch.nn.Linear(width, mlp_dim), "down": torch.nn.Linear(mlp_dim, width)}
            names |= {"attention_norm": torch.nn.BatchNorm1d(width), "mlp_norm": torch.nn.BatchNorm1d(width)}
            self.blocks.append(torch.nn.ModuleDict(names))
        self.head = torch.nn.Linear(patches * width, H)

    def forward(self, x_BLC):
        mean, std = x_BLC.mean(1, keepdim=True), (x_BLC.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        z = ((x_BLC - mean) / std).permute(0, 2, 1)
        z = torch.nn.ReplicationPad1d((0, self.stride))(z).unfold(-1, self.patch, self.stride)
        z = self.embed(z.flatten(0, 1)) + self.position
        self.layers = [z]
        for block in self.blocks:
            q, k, v = (block[n](z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("query", "key", "value"))
            y = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
            z = z + block["out"](y.transpose(1, 2).flatten(-2))
            z = block["attention_norm"](z.transpose(1, 2)).transpose(1, 2)
            z = z + block["down"](torch.nn.functional.gelu(block["up"](z)))
            z = block["mlp_norm"](z.transpose(1, 2)).transpose(1, 2)
            self.layers.append(z)
        y = self.head(z.flatten(1)).unflatten(0, (B, C)).permute(0, 2, 1)
        return y * std + mean


def loaded(reference, variables):
    """The reference with our parameters."""
    params, stats = variables["params"], variables["batch_stats"]
    D = reference.position.shape[1]

    def fill(module, given, kernel=None):
        kernel = np.asarray(given["kernel"]) if kernel is None else kernel
        module.weight.data, module.bias.data = tensor(kernel.T.copy()), tensor(np.asarray(given["bias"]).reshape(-1))

    fill(reference.embed, params["embedding"])
    fill(reference.head, params["head"])
    reference.position.data = tensor(params["position"]) - 0.02
    for i, block in enumerate(reference.blocks):
        ours = params[f"block_{i}"]
        for name in ("query", "key", "value", "out"):
            fill(block[name], ours["attention"][name], np.asarray(ours["attention"][name]["kernel"]).reshape(D, D))
        for name in ("up", "down"):
            fill(block[name], ours["mlp"][name])
        for name in ("attention_norm", "mlp_norm"):
            norm = block[name]
            norm.weight.data, norm.bias.data = tensor(ours[name]["scale"]), tensor(ours[name]["bias"])
            norm.running_mean, norm.running_var = (tensor(stats[f"block_{i}"][name][n]) for n in ("mean", "var"))
    return reference


@pytest.mark.parametrize("train", [False, True])
def test_patchtst_is_that_of_the_paper_layer_by_layer(train):
    model = PatchTST(horizon=H, patch=8, stride=4, width=16, depth=2, heads=4, mlp_dim=24, dropout=0.0)
    variables = told(model)
    reference = loaded(TorchPatchTST(16, 2, 4, 24, 8, 4, 10), variables).train(train)
    wanted = reference(tensor(X)).detach()
    found, state = model.apply(variables, X, train=train, capture_intermediates=True, mutable=True)
    inside = state["intermediates"]
    for i in range(2):
        ours = inside[f"block_{i}"]["__call__"][0]
        np.testing.assert_allclose(ours, reference.layers[i + 1].detach(), atol=1e-4)
    np.testing.assert_allclose(found[..., 0], wanted, atol=1e-4)
    if train:
        norm = reference.blocks[1]["mlp_norm"]
        np.testing.assert_allclose(state["batch_stats"]["block_1"]["mlp_norm"]["mean"], norm.running_mean, atol=1e-5)


def test_channels_do_not_see_each_other_and_instance_norm_is_undone():
    model = PatchTST(horizon=H, patch=8, stride=4, depth=1, width=16, heads=4, mlp_dim=16)
    variables = told(model)
    slope = jax.grad(lambda x: model.apply(variables, x)[:, :, 0].sum())(X)
    assert np.abs(slope[..., 0]).max() > 0 and not np.any(slope[..., 1:])
    scaled = model.apply(variables, 100 * X - 7)
    np.testing.assert_allclose(scaled, 100 * model.apply(variables, X) - 7, rtol=1e-3, atol=1e-2)


def test_the_last_season_comes_again():
    y = SeasonalNaive(horizon=5, season=4).apply({}, X)[..., 0]
    np.testing.assert_array_equal(y, X[:, [-4, -3, -2, -1, -4]])
    assert SeasonalNaive(horizon=5, season=4, outputs=3).init_with_output(jax.random.key(0), X)[0].shape == (B, 5, C, 3)


def test_covariates_shift_what_they_are_told_of_and_nothing_is_read_from_steps_that_are_not_theirs():
    covariates = jnp.asarray(np.random.default_rng(2).normal(size=(B, L + H, 2)), jnp.float32)
    model = NLinear(horizon=H, hidden=8)
    variables = told(model, covariates_BSK=covariates)
    slope = jax.grad(lambda c: model.apply(variables, X, c)[:, 2].sum())(covariates)
    ahead = np.abs(slope[:, L:]).sum((0, 2))
    assert ahead[2] > 0 and not ahead[[0, 1, 3, 4, 5]].any()
    assert np.abs(slope[:, :L]).max() > 0


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: DLinear(horizon=H, kernel=4), "odd number"),
        (lambda: PatchTST(horizon=H, patch=64), "no patch of 64"),
        (lambda: PatchTST(horizon=H, patch=8, width=10, heads=4), "heads"),
        (lambda: SeasonalNaive(horizon=H, season=50), "shorter than a season"),
        (lambda: NLinear(), "how far to forecast"),
        (lambda: TiDE(), "how far to forecast"),
        (lambda: NLinear(horizon=0), "at least 1"),
    ],
)
def test_mistakes_are_told(make, said):
    with pytest.raises(ModelError, match=said):
        make().init(jax.random.key(0), X)


def test_every_model_gives_as_many_outputs_as_quantiles():
    for kind in (DLinear, NLinear, TiDE, PatchTST):
        model: nn.Module = kind(horizon=H, outputs=3)
        shape = jax.eval_shape(lambda m=model: m.init_with_output(jax.random.key(0), X)[0]).shape
        assert shape == (B, H, C, 3)
