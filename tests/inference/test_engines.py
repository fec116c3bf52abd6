"""Graphs that somebody sent: what is wrong with them is one sentence, and nothing outside of their folder is read."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bigbase_jax.core import UserError
from bigbase_jax.inference.engines import Session

WEIGHT = np.arange(256, dtype=np.float32)


def graph(weight=None, domain="", external=None, op="Add"):
    weight = numpy_helper.from_array(WEIGHT, "w") if weight is None else weight
    if external is not None:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in external.items():
            weight.external_data.add(key=key, value=str(value))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", 256]) for name in "xy")
    made = helper.make_graph([helper.make_node(op, ["x", "w"], ["y"], domain=domain)], "g", [x], [y], [weight])
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "model.onnx"


def test_weights_inside_and_beside(path):
    x = np.ones((2, 256), np.float32)
    for external in (None, {"location": "w.data", "length": 1024}):
        onnx.save_model(graph(external=external), path)
        (path.parent / "w.data").write_bytes(WEIGHT.tobytes())
        np.testing.assert_array_equal(Session(path)({"x": x})["y"], x + WEIGHT)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"external": {"location": "../secret"}}, "has weights in '../secret', which is outside of its folder"),
        ({"external": {"location": "/etc/passwd"}}, "outside of its folder"),
        ({"external": {"location": "link"}}, "outside of its folder"),
        ({"external": {"location": "absent"}}, "has weights in absent, which is not there"),
        ({"external": {"location": "short"}}, r"short holds 9 bytes, and model.onnx asks for 1,024; copy it whole"),
        ({"external": {"location": "short", "offset": "many"}}, "is damaged"),
        ({"domain": "evil.ops", "op": "Run"}, "uses operations of 'evil.ops', which only its maker's library has"),
        ({"weight": TensorProto(name="w", data_type=1, dims=[1 << 40])}, "holds fewer numbers than it says"),
        ({"op": "Nonsense"}, "onnxruntime does not take"),
    ],
)
def test_what_is_refused(path, words, said):
    (path.parent / "link").symlink_to("../secret")
    (path.parent / "short").write_bytes(b"123456789")
    path.write_bytes(graph(**words).SerializeToString())
    with pytest.raises(UserError, match=said):
        Session(path)


def test_a_file_that_was_not_copied_whole(path):
    whole = graph().SerializeToString()
    for data in (whole[:-100], whole[: len(whole) // 2], b"", b"not a graph at all"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="damaged or was not copied whole|holds no graph"):
            Session(path)
    with pytest.raises(UserError, match="copied whole"):
        Session(path.with_name("absent.onnx"))
