"""Safetensors files against the library of that name, both ways; files that are missing, cut short or not what they are
called; folders that appear when they are whole."""

import json
import os

import ml_dtypes
import numpy as np
import pytest

from bigbase_jax.core import UserError
from bigbase_jax.pretrained import files

TENSORS = {
    "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "f16": np.arange(5, dtype=np.float16),
    "f64": np.array([np.pi]),
    "i64": np.array(-3),
    "i8": np.array([[1], [-2]], np.int8),
    "bool": np.array([True, False, True]),
    "none": np.zeros((0, 4), np.float32),
}


def specs(tensors):
    return {name: (x.shape, x.dtype) for name, x in tensors.items()}


def equal(a, b):
    assert set(a) == set(b)
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        np.testing.assert_array_equal(a[name], b[name])
    return True


def test_read_what_the_library_writes(tmp_path):
    from safetensors.numpy import save_file

    save_file(TENSORS, tmp_path / "model.safetensors")
    found = files.read_tensors(tmp_path)
    assert equal(found, TENSORS)
    assert not found["f32"].flags.owndata and not found["f32"].flags.writeable  # views of the file


def test_the_library_reads_what_is_written(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file

    files.write_tensors(tmp_path, specs(TENSORS), TENSORS.__getitem__)
    assert equal(load_file(tmp_path / "model.safetensors"), TENSORS)
    with safe_open(tmp_path / "model.safetensors", "numpy") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_bfloat16_both_ways(hf, tmp_path):
    from safetensors.torch import load_file, save_file

    x = hf.torch.randn(3, 5).bfloat16()
    save_file({"x": x}, tmp_path / "model.safetensors")
    found = files.read_tensors(tmp_path)
    assert found["x"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["x"].astype(np.float32), x.float().numpy())
    os.remove(tmp_path / "model.safetensors")
    files.write_tensors(tmp_path, specs(found), dict(found).__getitem__)
    assert hf.torch.equal(load_file(tmp_path / "model.safetensors")["x"], x)


def test_several_files_hold_as_much_as_they_may(tmp_path):
    tensors = {f"t{i}": np.full(10, i, np.float32) for i in range(5)}
    files.write_tensors(tmp_path, specs(tensors), tensors.__getitem__, max_shard_bytes=85)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)
    ]
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"]["total_size"] == 200
    assert equal(files.read_tensors(tmp_path), tensors)

    shard = tmp_path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is damaged .* 7 bytes are missing"):
        files.read_tensors(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"lacks model-00002-of-00003\.safetensors, which its"):
        files.read_tensors(tmp_path)
    shard.write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    with pytest.raises(UserError, match="names tensors that its files do not have: t2, t3"):
        files.read_tensors(tmp_path)


def header(about, data=b""):
    text = json.dumps(about).encode()
    return len(text).to_bytes(8, "little") + text + data


FLOAT = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "damaged"),
        (b"\x01", "ends within its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "ends within its header"),
        ((3).to_bytes(8, "little") + b"abc", "damaged"),
        (header([1]), "damaged"),
        (header({"x": FLOAT}, b"1234"), "4 bytes are missing at its end"),
        (header({"x": {**FLOAT, "shape": [3]}}, b"12345678"), "contradicts itself"),
        (header({"x": {**FLOAT, "data_offsets": [-8, 0]}}, b"12345678"), "contradicts itself"),
        (header({"x": {**FLOAT, "dtype": "F8_E5M2"}}, b"12345678"), "its dtype F8_E5M2 is none of F64"),
        (header({"x": {"shape": [2]}}, b"12345678"), "damaged"),
    ],
)
def test_damaged_files_are_one_sentence(content, sentence, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        files.read_tensors(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_torchs_own_format_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"pytorch_model\.bin, which only torch reads; .*save_pretrained"):
        files.read_tensors(tmp_path)
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        files.read_tensors(tmp_path / "elsewhere")
    (tmp_path / "x.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="is not an .npz file"):
        files.read_npz(tmp_path / "x.npz")


def test_a_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with files.whole_model(out) as partial:
        files.write_json(partial / "config.json", {"a": 1})
        assert not out.exists()
    assert json.loads((out / "config.json").read_text()) == {"a": 1}

    with pytest.raises(RuntimeError), files.whole_model(out) as partial:
        files.write_json(partial / "config.json", {"a": 2})
        raise RuntimeError
    assert json.loads((out / "config.json").read_text()) == {"a": 1}  # what was there stays
    with files.whole_model(out) as partial:
        files.write_json(partial / "tokenizer.json", {})
    assert [p.name for p in out.iterdir()] == ["tokenizer.json"]  # replaced as a whole
    assert [p.name for p in out.parent.iterdir()] == ["out"]  # and nothing is left beside it


def test_nothing_foreign_is_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis\.tex, which would be lost"):
        files.whole_model(tmp_path).__enter__()
    with pytest.raises(UserError, match="is a file"):
        files.whole_model(tmp_path / "thesis.tex").__enter__()
    with pytest.raises(UserError, match="cannot write"), files.whole_model(tmp_path / "thesis.tex" / "below"):
        pass
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
