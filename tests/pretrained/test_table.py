"""Arrangements of axes, both ways and without copies; tables of layers."""

import numpy as np
import pytest

from bigbase_jax.pretrained.table import Entry, heads, is_stack, path_of_layer, rearrange, repeat, unrolled

SIZES = {"h": 2, "k": 3, "three": 3}
X = np.random.RandomState(0).randn


@pytest.mark.parametrize(
    ("arrange", "shape", "want"),
    [
        ("o i -> i o", (4, 5), lambda x: x.T),
        ("o i y x -> y x i o", (4, 5, 2, 3), lambda x: x.transpose(2, 3, 1, 0)),
        ("(h k) d -> d h k", (6, 5), lambda x: x.reshape(2, 3, 5).transpose(2, 0, 1)),
        ("d (h k) -> h k d", (5, 6), lambda x: x.T.reshape(2, 3, 5)),
        ("d (three h k) -> three d h k", (5, 18), lambda x: np.stack([p.reshape(5, 2, 3) for p in np.split(x, 3, 1)])),
        ("() v -> v", (1, 7), lambda x: x[0]),
        ("v -> () v", (7,), lambda x: x[None]),
        ("", (2, 3), lambda x: x),
    ],
)
def test_arrangements_are_views_and_have_an_inverse(arrange, shape, want):
    x = X(*shape)
    y = rearrange(x, arrange, SIZES)
    np.testing.assert_array_equal(y, want(x))
    assert np.shares_memory(x, y)
    entry = Entry("theirs", "ours", arrange)
    np.testing.assert_array_equal(entry.write(entry.read(x, SIZES), SIZES), x)


def test_one_of_theirs_holds_three_of_ours():
    entry = Entry("c_attn.bias", ("query.bias", "key.bias", "value.bias"), "(three h k) -> three h k")
    x = X(18)
    parts = entry.read(x, SIZES)
    assert [p.shape for p in parts] == [(2, 3)] * 3
    np.testing.assert_array_equal(parts[1], x[6:12].reshape(2, 3))
    np.testing.assert_array_equal(entry.write(parts, SIZES), x)
    assert entry.paths == ("params.query.bias", "params.key.bias", "params.value.bias")


def test_functions_in_the_place_of_an_arrangement():
    entry = Entry("positions", "position", (lambda x: x[2:], lambda x: np.concatenate([np.zeros((2, 3)), x])))
    x = np.concatenate([np.zeros((2, 3)), X(4, 3)])
    (ours,) = entry.read(x, {})
    assert ours.shape == (4, 3)
    np.testing.assert_array_equal(entry.write([ours], {}), x)


@pytest.mark.parametrize(
    ("arrange", "shape", "sentence"),
    [
        ("(h k) d -> d h k", (7, 5), "an axis of 7 is not the"),
        ("(h k) d -> d h k", (6,), "it has 1 axes, not the 2"),
        ("(a b) -> a b", (6,), "the sizes of a and b"),
        ("() v -> v", (2, 7), "an axis of 2 is not the"),
        ("a b -> a", (2, 7), "other letters left than right"),
    ],
)
def test_shapes_that_do_not_fit(arrange, shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        rearrange(X(*shape), arrange, SIZES)


def test_layers_are_counted_in_both_names():
    entries = repeat(2, heads("h.{i}.q", "block_{i+1}.query", bias=False))
    assert [(e.theirs, e.ours) for e in entries] == [
        ("h.0.q.weight", "block_1.query.kernel"),
        ("h.1.q.weight", "block_2.query.kernel"),
    ]
    nested = repeat(2, repeat(1, [Entry("s{i}.{j}", ("a{i}.{j}", "b{i}.{j}"), also=("t{i}",))], letter="j", start=3))
    assert [(e.theirs, e.ours, e.also) for e in nested] == [
        ("s0.3", ("a0.3", "b0.3"), ("t0",)),
        ("s1.3", ("a1.3", "b1.3"), ("t1",)),
    ]


def test_stacks_unrolled():
    assert path_of_layer("params.encoder.blocks.norm1.scale", 3) == "params.encoder.block_3.norm1.scale"
    assert path_of_layer("blocks.norm1.scale", 0) == "block_0.norm1.scale"
    assert is_stack("params.encoder.blocks.norm1.scale") and not is_stack("params.encoder.block_1.norm1.scale")
    assert not is_stack("params.myblocks.scale")
    shapes = unrolled({"encoder.blocks.scale": np.zeros((2, 5)), "head": np.zeros(3)})
    assert shapes == {"encoder.block_0.scale": (5,), "encoder.block_1.scale": (5,), "head": (3,)}
