"""Zeros: which ones, by what, and the words that are refused before anything is computed."""

import jax
import numpy as np
import pytest
from test_structured import Probe, compressed, made

from bigbase_jax.compress.masks import largest
from bigbase_jax.compress.prune import prune
from bigbase_jax.core import UserError
from bigbase_jax.models.bag_of_words import BagOfWords
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.vit import ViT

NET = ConvNet(3, (4, 8), 6)


@pytest.fixture(scope="module")
def net():
    return made(NET, (2, 16, 16, 3), float)


def pruned(found, words, batch=None):
    task, variables, shapes = found
    spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in shapes.items()}
    batches = lambda: [batch if batch is not None else shapes]  # noqa: E731
    return prune(compressed(task, variables), words, spec, batches)


def test_the_largest_stay():
    score = np.array([[3.0, 1, 2, 4], [0, 0, 0, 0]])
    assert largest(score, 2).tolist()[0] == [True, False, False, True]
    assert largest(score, 2)[1].sum() == 2 and largest(score, 0).all()  # ties too give the very number


def test_magnitude_takes_the_smallest_of_each_kernel(net):
    after = pruned(net, "0.75")
    for name in ("stage_0.conv_0", "stage_1.conv_0", "dense", "head"):
        before, now = net[1]["params"], after.variables["params"]
        for part in name.split("."):
            before, now = before[part], now[part]
        kernel, new = np.abs(before["kernel"]), np.asarray(now["kernel"])
        assert np.sum(new == 0) == round(0.75 * kernel.size)
        assert kernel[new == 0].max() <= kernel[new != 0].min()
        np.testing.assert_array_equal(now["bias"], before["bias"])
    assert after.about["zeros"] and after.config.compression.masked


def test_n_of_m_is_kept_among_the_inputs_of_each_output(net):
    after = pruned(net, "1:4")
    kernel = np.asarray(after.variables["params"]["stage_1"]["conv_0"]["kernel"])  # [3, 3, 4, 8]
    assert (np.sum(kernel != 0, axis=2) == 1).all()
    first = np.asarray(after.variables["params"]["stage_0"]["conv_0"]["kernel"])  # three channels: left whole
    assert (first != 0).all()
    with pytest.raises(UserError, match="needs inputs that 4 divides.*stage_0"):
        pruned(net, "1:4,targets=stage_0")


def test_wanda_weighs_by_the_input(net):
    """An input that is never there goes first, however large its weights."""
    batch = net[2]
    quiet = {name: np.where(np.arange(3) == 1, 0, x).astype(np.float32) for name, x in batch.items()}
    after = pruned(net, "0.34,score=wanda,targets=stage_0", quiet)
    kernel = np.asarray(after.variables["params"]["stage_0"]["conv_0"]["kernel"])
    assert (kernel[:, :, 1] == 0).all() and np.mean(kernel == 0) == pytest.approx(9 / 27)
    by_size = np.asarray(pruned(net, "0.34,targets=stage_0").variables["params"]["stage_0"]["conv_0"]["kernel"])
    assert (by_size[:, :, 1] != 0).any()


@pytest.mark.parametrize(
    "words, said",
    [
        ("1.5", "above 0 and below 1"),
        ("0", "above 0 and below 1"),
        ("4:2", "keeps 4 of every 2"),
        ("0:4", "keeps 0 of every 4"),
        ("many", "is none of heads=SHARE"),
        ("0.5,score=taylor", "no score=taylor for masks"),
        ("0.5,targets=nothing", "match no kernel"),
        ("0.5,targets=(", "not a regular expression"),
        ("0.5,target=x", "Did you mean 'targets'"),
        ("heads=0.5", "the model ConvNet has none; it has channels, dense"),
        ("chanels=0.5", "Did you mean 'channels'"),
        ("channels=1.0", "above 0 and below 1"),
        ("channels=0.01", "takes away none of 4 units"),
        ("channels=0.95", "takes away all of 4 units"),
        ("channels=0.5,score=wanda", "no score=wanda for units"),
        ("score=taylor", "takes nothing away"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(net, words, said):
    with pytest.raises(UserError, match=said) as error:
        pruned(net, words)
    assert str(error.value).count("\n") == 0


def test_a_model_without_units_and_a_layer_of_one_are_told():
    words = Probe(BagOfWords(vocab_size=5, width=4))
    found = (words, {"params": {"out": {"kernel": np.ones((4, 2))}}}, {"a": np.ones((2, 3), int)})
    with pytest.raises(UserError, match="no units of the model BagOfWords"):
        pruned(found, "mlp=0.5")
    one = Probe(ViT(num_classes=2, width=4, depth=1, heads=1, patch=8))
    batch = {"a": np.ones((1, 8, 8, 3), np.float32)}
    variables = jax.eval_shape(one.init, jax.random.key(0), batch)
    with pytest.raises(UserError, match="there is one unit in a layer, which stays"):
        pruned((one, variables, batch), "layers=0.5")
