"""Folders that somebody made to do harm: each ends in one sentence, before anything is allocated or waited for."""

import io
import json
import os
import shutil
import zipfile

import jax
import numpy as np
import pytest
import tokenizers
from ml_collections import ConfigDict

from bigbase_jax import pretrained, verbs
from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.inference import generation
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.pretrained import files, weights
from bigbase_jax.runtime import limits, untrusted
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.text.detokenizer import IncrementalDetokenizer
from bigbase_jax.text.tokenizer import Symbols

# ----------------------------------------------------------------------------------------------------- which files


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, sentence in {"pipe": "a named pipe", "null": "a device", ".": "a folder"}.items():
        with pytest.raises(UserError, match=f"{name} is {sentence}, not a file"):
            untrusted.open_regular(tmp_path / name)
    with pytest.raises(OSError):
        untrusted.open_regular(tmp_path / "loop")


def test_no_file_outside_of_the_folder_is_opened(tmp_path):
    """But for what the cache of Hugging Face's hub links to, and what the user named."""
    (tmp_path / "secret").write_text("{}")
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "main", tmp_path / "models--x" / "blobs"
    (snapshot / "1_Pooling").mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0a1b").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0a1b")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/0a1b")
    (snapshot / "link.json").symlink_to("config.json")
    for name in ("config.json", "1_Pooling/config.json", "link.json"):
        assert untrusted.read_regular(snapshot / name, snapshot) == b"{}"
        assert untrusted.read_regular(snapshot / name, (snapshot / name).parent) == b"{}"

    (snapshot / "bad.json").symlink_to(tmp_path / "secret")
    (blobs / "bad").symlink_to(tmp_path / "secret")
    (snapshot / "worse.json").symlink_to("../../blobs/bad")
    for name in ("bad.json", "worse.json", "../../../secret", str(tmp_path / "secret")):
        with pytest.raises(UserError, match="secret, which is outside of its folder"):
            untrusted.read_regular(snapshot / name, snapshot)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="outside of its folder"):
        untrusted.read_regular(snapshot / "config.json", snapshot)
    assert untrusted.read_regular(snapshot / "bad.json") == b"{}"


def test_what_is_read_is_limited_and_the_limit_can_be_raised(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(bytes(150))
    with pytest.raises(UserError, match="x is larger than 100 bytes; .* BIGBASE_LIMITS=2"):
        untrusted.read_regular(tmp_path / "x", most=100)
    monkeypatch.setattr(untrusted, "MOST_VALUES", 10)
    with pytest.raises(UserError, match="x holds more than 10 values; .* BIGBASE_LIMITS=2"):
        untrusted.parse_json(json.dumps([[]] * 8), "x")
    monkeypatch.setenv(limits.VARIABLE, "2")
    assert len(untrusted.read_regular(tmp_path / "x", most=100)) == 150
    assert untrusted.parse_json(json.dumps([[]] * 8), "x") == [[]] * 8
    monkeypatch.setenv(limits.VARIABLE, "much")
    with pytest.raises(UserError, match="BIGBASE_LIMITS='much' is no number"):
        untrusted.read_regular(tmp_path / "x")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, b"\xff\xfe{", "1" * 5000, "{} x"], ids=lambda x: x[:5])
def test_json_that_is_none_is_one_sentence(text):
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        untrusted.parse_json(text, "config.json")


# ----------------------------------------------------------------------------------------------------- safetensors


def tensors(header, data=b"", claim=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claim is None else claim).to_bytes(8, "little") + text + data


def two(**changes):
    """A file of two tensors, x and y, of 8 bytes each, with something changed of y."""
    x = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    return tensors({"x": x, "y": {**x, "data_offsets": [8, 16], **changes}}, bytes(16))


ONE = b'"x": {"dtype": "U8", "shape": [1], "data_offsets": [%d, %d]}'
TWICE = b"{" + ONE % (0, 1) + b", " + ONE % (1, 2) + b"}"
FILES = {
    "a header of 2 GB": (tensors({}, claim=2 << 30), "ends within its header"),
    "a header of 2^60": (tensors({}, claim=1 << 60), "ends within its header"),
    "a header of 2^64 - 1": (tensors({}, claim=(1 << 64) - 1), "ends within its header"),
    "overlap": (two(data_offsets=[4, 12]), "tensors overlap"),
    "the same bytes twice": (two(data_offsets=[0, 8]), "tensors overlap"),
    "a gap": (two(shape=[1], data_offsets=[12, 16]), "bytes between them"),
    "more than it tells": (two() + b"x", "at its end"),
    "less than it tells": (two()[:-1], "1 bytes are missing"),
    "past the end": (two(shape=[10**9], data_offsets=[8, 8 + 4 * 10**9]), "bytes are missing"),
    "more than 64 bits": (two(shape=[2**62, 4], data_offsets=[8, 8 + 2**66]), "bytes are missing"),
    "a product that is 8 modulo 2^64": (two(shape=[2**63 + 1, 2]), "contradicts itself"),
    "a shape below nothing": (two(shape=[-1, -2]), "contradicts itself"),
    "nothing of much": (two(shape=[0, 2**62, 2**62], data_offsets=[16, 16]), "damaged"),
    "a thousand axes": (two(shape=[2] + [1] * 1000), "damaged"),
    "backwards": (two(data_offsets=[16, 8]), "contradicts itself"),
    "offsets that are no numbers": (two(data_offsets=["8", "16"]), "contradicts itself"),
    "three offsets": (two(data_offsets=[8, 12, 16]), "damaged"),
    "no numbers at all": (two(shape={"a": 1}, data_offsets=[8, True]), "contradicts itself"),
    "another word": (two(evil=1), "damaged"),
    "an unknown dtype": (two(dtype="F4"), "its dtype F4 is none of"),
    "a dtype that is a list": (two(dtype=["F32"]), "damaged"),
    "a name twice": (tensors(TWICE, b"12"), "'x' is there twice"),
    "nested": (tensors(b'{"x":' * 10**5), "nested too deep"),
    "a list": (tensors([1]), "damaged"),
    "no header": (tensors(b"x" * 100), "cannot be read as JSON"),
    "empty": (b"", "damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_safetensors(name, tmp_path):
    content, sentence = FILES[name]
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=sentence) as caught:
        files.read_tensors(tmp_path)
    assert "model.safetensors" in str(caught.value) and len(str(caught.value)) < 500


def test_a_file_as_it_should_be_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(two())
    assert {name: x.shape for name, x in files.read_tensors(tmp_path).items()} == {"x": (2,), "y": (2,)}


def test_a_header_that_is_really_large_is_not_parsed(tmp_path, monkeypatch):
    header = {f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(50)}
    (tmp_path / "model.safetensors").write_bytes(tensors(header))
    assert len(files.read_tensors(tmp_path)) == 50
    monkeypatch.setattr(files, "MOST_HEADER", 1000)
    with pytest.raises(UserError, match=r"model\.safetensors has a header of .* BIGBASE_LIMITS"):
        files.read_tensors(tmp_path)


INDICES = {
    "../../etc/passwd": "lacks ../../etc/passwd, which its model.safetensors.index.json names",
    "/etc/passwd": "lacks /etc/passwd, which",
    "gone.safetensors": "lacks gone.safetensors, which",
    "link.safetensors": "outside of its folder",
    "pipe.safetensors": "is a named pipe, not a file",
    "folder.safetensors": "is a folder, not a file",
    "again.safetensors": "names files that hold the same tensors: x, y",
    "..": "is a folder, not a file|outside",
    "": "is a folder",
    3: "has no weight_map",
}


@pytest.mark.parametrize("name", INDICES, ids=str)
def test_an_index_names_only_files_of_its_folder(name, tmp_path):
    folder = tmp_path / "folder"
    (folder / "folder.safetensors").mkdir(parents=True)
    for place in (folder / "a.safetensors", folder / "again.safetensors", tmp_path / "elsewhere"):
        place.write_bytes(two())
    (folder / "link.safetensors").symlink_to("../elsewhere")
    os.mkfifo(folder / "pipe.safetensors")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": name}}))
    with pytest.raises(UserError, match=INDICES[name]) as caught:
        files.read_tensors(folder)
    assert str(folder) in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- npz


def array(shape, dtype="<f4", data=b""):
    made = io.BytesIO()
    np.lib.format.write_array_header_1_0(made, {"descr": dtype, "fortran_order": False, "shape": shape})
    return made.getvalue() + data


ARRAYS = {
    "a shape of terabytes": (array((10**12,)), "does not hold"),
    "a shape below nothing": (array((-4,), data=b"1234"), "not an .npz file"),
    "nothing of much": (array((0, 2**62, 4)), "not an .npz file"),
    "more than it tells": (array((1,), data=b"12345"), "does not hold"),
    "a pickle": (array((1,), "|O", b"cos\nsystem\n(S'touch x'\ntR."[:8]), "pickle"),
    "a bomb": (array((2_000_000,), data=bytes(8_000_000)), "unpacks to more than .* BIGBASE_LIMITS=2"),
    "no array": (b"import os", "not an .npz file"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_npz(name, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_UNPACKED", 7_000_000)
    content, sentence = ARRAYS[name]
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(UserError, match=sentence) as caught:
        files.read_npz(tmp_path / "x.npz")
    assert "x.npz" in str(caught.value)


# ---------------------------------------------------------------------------- what config.json says and tensors do not


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A folder with a GPT-2 of 2 layers."""
    model = Decoder(vocab_size=61, length=16, width=16, depth=2, heads=4)
    folder = tmp_path_factory.mktemp("hostile") / "gpt2"
    pretrained.save(folder, model, jax.jit(model.init)(jax.random.key(0), jax.numpy.zeros((1, 1), int)))
    return folder


def changed(folder, to, **words):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **words}))
    return to


@pytest.mark.parametrize("depth", [50, 1000, 10**6, 10**9])
def test_layers_that_are_not_there_are_never_traced(depth, gpt2, tmp_path, monkeypatch):
    folder = changed(gpt2, tmp_path / "x", n_layer=depth)
    monkeypatch.setattr(jax, "eval_shape", lambda *args: pytest.fail("it was traced"))
    with pytest.raises(UserError, match=r"lacks transformer\.h\.2\.ln_1\.weight|n_layer=100000") as caught:
        pretrained.load(folder)
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "words",
    [
        {"n_layer": 3},
        {"n_layer": 1},
        {"vocab_size": 1 << 24},
        {"n_positions": (1 << 31) - 1},
        {"n_embd": 1 << 17},
        {"n_inner": 1 << 20},
        {"vocab_size": 10**12},
    ],
    ids=str,
)
def test_sizes_that_tensors_do_not_have_are_never_allocated(words, gpt2, tmp_path, monkeypatch):
    folder = changed(gpt2, tmp_path / "x", **words)
    monkeypatch.setattr(weights.Weights, "read", lambda *args: pytest.fail("it was read"))
    monkeypatch.setattr(jax, "jit", lambda *args, **kwargs: pytest.fail("it was compiled"))
    with pytest.raises(UserError, match=r"does not fit the model|config\.json") as caught:
        pretrained.load(folder)
    assert str(folder) in str(caught.value)
    task = target(CausalLanguageModel, model=target(Decoder, vocab_size=61, length=16))
    with pytest.raises(UserError, match=r"does not fit the model|config\.json"):  # before a run makes such a model
        pretrained.resolve(ConfigDict({"init_from": str(folder), "task": task, "data": {"dataset": None}}))


# ----------------------------------------------------------------------------------------------------------- writing


def test_tokens_that_the_model_does_not_have_are_one_sentence(gpt2, tmp_path):
    folder = changed(gpt2, tmp_path / "x")
    vocabulary = {"[UNK]": 0, **{f"w{i}": 1 + i for i in range(61)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match=r"the token 61 of a prompt is none of the model's 61 \(0 to 60\)"):
        verbs.generate(str(folder), ["w1 w60"])


def test_a_token_that_the_tokenizer_does_not_have_has_no_text():
    assert [IncrementalDetokenizer(Symbols()).push(token) for token in (97, 256, 10**9)] == ["a", "", ""]


def test_a_length_without_end_is_not_written():
    model = Decoder(vocab_size=5, length=(1 << 31) - 1, width=16, depth=1, heads=4, positions="rope")
    assert generation.Engine(model, {"params": {}}).room(3, None) == 1 << 14
