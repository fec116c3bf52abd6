"""Graphs that onnxruntime computes give what the model gives, for every family, at free sizes."""

import json

import jax
import numpy as np
import onnx as onnx_library
import pytest

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.export import onnx
from bigbase_jax.inference import engines
from bigbase_jax.inference.generation import Engine, SamplingParams
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.bag_of_words import BagOfWords
from bigbase_jax.models.bc_resnet import BCResNet
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.clicks import DCN, DLRM
from bigbase_jax.models.clip import CLIP
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.decoder import Decoder
from bigbase_jax.models.ecapa import ECAPA
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.fcos import FCOS
from bigbase_jax.models.forecast import DLinear, NLinear, PatchTST, SeasonalNaive, TiDE
from bigbase_jax.models.margin import CosineHead
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.resnet import CifarResNet, ResNet
from bigbase_jax.models.sasrec import SASRec
from bigbase_jax.models.tabular import TabularMLP
from bigbase_jax.models.transformer import LLAMA, Style
from bigbase_jax.models.two_tower import TwoTower
from bigbase_jax.models.vit import ViT
from bigbase_jax.pretrained.start import model_of
from bigbase_jax.tasks.audio_classification import AudioClassification
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.tasks.contrastive import Contrastive
from bigbase_jax.tasks.dense_detection import DenseDetection
from bigbase_jax.tasks.forecasting import Forecasting
from bigbase_jax.tasks.language import CausalLanguageModel
from bigbase_jax.tasks.masked_language import MaskedLanguageModel
from bigbase_jax.tasks.next_item import NextItem
from bigbase_jax.tasks.retrieval import Retrieval
from bigbase_jax.tasks.tabular import TabularClassification
from bigbase_jax.tasks.tagging import Tagging
from bigbase_jax.tasks.text_classification import TextClassification
from bigbase_jax.tasks.translation import Translation
from bigbase_jax.tasks.verification import SpeakerVerification
from bigbase_jax.wrappers.lora import LoRA

SIZES = {"vocab_size": 50, "length": 12, "width": 16, "depth": 2, "heads": 2}
MINE = Style(kv_heads=1, window=4, windowed=(True, False), qk_norm=True)
PICTURES = {
    "resnet": ResNet(3, depth=18, width=4),
    "cifar_resnet": CifarResNet(3, depth=8, width=4),
    "vit": ViT(3, width=16, depth=2, heads=2, patch=4, scan=True),
    "convnet": ConvNet(3),
    "mlp": MLP(3, hidden=(8,)),
}
TEXTS = {
    "bert": TextClassification(Bert(**SIZES, scan=True), num_classes=3),
    "bag_of_words": TextClassification(BagOfWords(50, 8), num_classes=3),
    "tags": Tagging(Bert(**SIZES), tag_names=("O", "B", "I")),
    "masked": MaskedLanguageModel(Bert(**SIZES, masked=True)),
    "gpt2": CausalLanguageModel(Decoder(**SIZES)),
    "llama": CausalLanguageModel(Decoder(**SIZES, positions="rope", style=LLAMA, tied=False, scan=True)),
    "windows": CausalLanguageModel(Decoder(**SIZES, positions="rope", style=MINE)),
    "translation": Translation(EncoderDecoder(**SIZES, pad_id=0), pad_id=0, start_id=1, end_id=2),
    "t5": Translation(EncoderDecoder(**SIZES, positions="relative"), pad_id=0, start_id=1, end_id=2, beams=2),
}
COLUMNS = {"cardinalities": (5, 5), "number_names": ("a", "b", "c", "d")}
PATCHES = PatchTST(horizon=6, outputs=3, width=8, depth=1, heads=2, mlp_dim=16)
SERIES = {"channels": ("a", "b", "c"), "mean": (0.0,) * 3, "std": (1.0,) * 3, "naive_error": (1.0,) * 3}
ROWS = {
    "naive": Forecasting(SeasonalNaive(horizon=6, season=4), **SERIES),
    "dlinear": Forecasting(DLinear(horizon=6), **SERIES),
    "nlinear": Forecasting(NLinear(horizon=6), covariate_names=("x", "y"), **SERIES),
    "tide": Forecasting(TiDE(horizon=6, width=8), covariate_names=("x", "y"), **SERIES),
    "patches": Forecasting(PATCHES, quantiles=(0.1, 0.5, 0.9), **SERIES),
    "table": TabularClassification(TabularMLP(3, (5, 5), hidden=(8,)), 3, **COLUMNS),
    "dlrm": TabularClassification(DLRM(2, (5, 5), bottom=(8,), top=(8,)), 2, **COLUMNS),
    "dcn": TabularClassification(DCN(2, (5, 5), deep=(8,), rank=2, experts=2), 2, **COLUMNS),
    "sasrec": NextItem(SASRec(num_items=9, length=4, width=8, depth=1), num_items=9, top=3),
    "commands": AudioClassification(BCResNet(3, tau=0.5, depths=(1, 1, 1, 1)), 3, rate=4000),
    "speakers": SpeakerVerification(CosineHead(ECAPA(channels=16, dim=8, parts=4, squeeze=4), 3), 3, rate=4000),
    "detector": DenseDetection(
        FCOS(ConvNet(stages=(4, 4), norm=True, pool="mean"), 2, levels=1, width=4, depth=1, groups=2),
        keep=9,
        candidates=20,
        overlap=0.3,
        least=0.0,
    ),
    "clip": Contrastive(
        CLIP(ViT(width=8, depth=1, heads=2, patch=4), Bert(9, 6, width=8, depth=1, heads=2), width=8), length=6
    ),
    "towers": Retrieval(TwoTower(num_users=4, num_items=9, length=4, width=8), num_items=9, top=3),
}
FREE = {"bert", "bag_of_words", "tags", "gpt2", "llama", "windows", "translation", "t5"}


def predictor(task, inputs):
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(task.init, jax.random.key(0), inputs)
    variables = jax.tree.map(lambda x: (0.05 + 0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    if "batch_stats" in variables:
        variables["batch_stats"] = jax.tree.map(lambda x: 1 + np.abs(x), variables["batch_stats"])
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in inputs.items()}
    return Predictor(task, variables, {"class_names": ("a", "b", "c")}, spec, lambda: None, 7)


def texts(task, B=3, L=12):
    rng, found = np.random.default_rng(0), {}
    real_BL = (np.arange(L) < np.array([L, 5, 8])[:B, None]).astype(np.int32)
    for name in task.inputs:
        if name in ("segment_ids", "source_segments"):
            found[name] = real_BL
        elif name == "positions":
            found[name] = np.tile(np.arange(L, dtype=np.int32), (B, 1))
        elif name == "at":
            found[name] = np.array([[1, 2, -1], [1, -1, -1], [2, 3, 4]], np.int32)[:B]
        elif name in ("token_type_ids", "starts", "bytes"):
            found[name] = rng.integers(0, 2, (B, L), np.int32)
        else:
            found[name] = rng.integers(5, 50, (B, L), np.int32)
    if "at" in found:
        found["targets"] = np.where(found["at"] < 0, -1, found["targets"][:, :3])
    return found


def same(given, folder, inputs, tolerance=1e-5):
    """The task that the folder's graphs compute, whose outputs are the model's."""
    task, compute, _ = engines.opened(folder, given.task, given.spec)
    wanted, found = jax.device_get(jax.jit(given.task.predict)(given.variables, inputs)), compute(None, inputs)
    assert set(found) == set(wanted)
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, atol=tolerance, rtol=tolerance, err_msg=name)
        assert x.dtype == bool or x.size == 1 or np.ptp(x) > 0 or name in ("bytes", "target", "tokens")
    return task


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_bytes(name, tmp_path, capfd):
    task = Classification(PICTURES[name], flip_test=name == "vit")
    image = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    given = predictor(task, {"image": image})
    about = onnx.write(given, tmp_path)
    assert about["inputs"] == {"image": {"shape": ["B", 16, 16, 3], "dtype": "uint8"}}
    same(given, tmp_path, {"image": image}, 3e-5)
    same(given, tmp_path, {"image": image[:1]}, 3e-5)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", TEXTS)
def test_texts_and_the_cache_of_what_writes(name, tmp_path):
    task = TEXTS[name]
    inputs = texts(task)
    given = predictor(task, inputs)
    about = onnx.write(given, tmp_path)
    engine = same(given, tmp_path, inputs)
    shapes = [x["shape"][1:] for x in about["inputs"].values()]
    assert (["L"] in shapes) == (name in FREE)
    if name in FREE:
        same(given, tmp_path, {key: x[:2, :7] for key, x in inputs.items()})
    if name == "gpt2":  # one table, for tokens and, transposed, for logits
        tables = onnx_library.load(tmp_path / "step.onnx").graph.initializer
        assert [list(x.dims) for x in tables if 50 in x.dims and len(x.dims) == 2] == [[50, 16]]
    if name in ("gpt2", "windows"):
        prompts = [np.array([3, 4, 5]), np.array([7]), np.array([9, 8, 7, 6, 5])]
        jax_engine, other = Engine(task.model, given.variables, 2), Engine(model_of(engine)[1], engines.VARIABLES, 2)
        for params in (
            SamplingParams(max_new_tokens=5),
            SamplingParams(max_new_tokens=5, temperature=1.0, top_k=9, seed=3),
        ):
            wanted, found = (e.generate(prompts, params) for e in (jax_engine, other))
            assert [x.tolist() for x in found] == [x.tolist() for x in wanted]
            assert len({tuple(x.tolist()) for x in wanted}) > 1


@pytest.mark.parametrize("name", ROWS)
def test_rows_histories_series_sounds_objects_and_vectors_of_pictures(name, tmp_path):
    task, rng = ROWS[name], np.random.default_rng(0)
    every = {
        "numbers": rng.standard_normal((3, 4), np.float32),
        "categories": rng.integers(0, 5, (3, 2), np.int32),
        "user": np.array([0, -1, 3], np.int32),
        "history": np.array([[0, 0, 3, 4], [1, 2, 3, 4], [0, 0, 0, 0]], np.int32),
        "audio": rng.uniform(-0.5, 0.5, (3, 4000)).astype(np.float32),
        "covariates": rng.standard_normal((3, 30, 2), np.float32),
        "image": rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
    }
    if isinstance(task, Forecasting):
        every["history"] = rng.standard_normal((3, 24, 3), np.float32)
    inputs = {name: every[name] for name in task.inputs}
    given = predictor(task, inputs)
    onnx.write(given, tmp_path)
    same(given, tmp_path, inputs, 3e-5)
    same(given, tmp_path, {name: x[:1] for name, x in inputs.items()}, 3e-5)


def test_adapters_are_merged(tmp_path):
    task = LoRA(TEXTS["bert"], rank=2)
    inputs = texts(task)
    given = predictor(task, inputs)
    onnx.write(given, tmp_path)
    same(given, tmp_path, inputs)


def test_eight_bits_are_a_quarter_and_nearly_the_model(tmp_path):
    wide = Bert(**{**SIZES, "width": 64})
    task = TextClassification(wide, num_classes=3)
    inputs = texts(task)
    given = predictor(task, inputs)
    size = {}
    for scheme in (None, "int8"):
        (folder := tmp_path / str(scheme)).mkdir()
        onnx.write(given, folder, scheme)
        size[scheme] = (folder / "model.onnx").stat().st_size
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    same(given, tmp_path / "int8", inputs, 0.05)
    assert size["int8"] < 0.5 * size[None]
    with pytest.raises(UserError, match="int8, not 'int3'"):
        onnx.write(given, tmp_path, "int3")
    pictures = predictor(Classification(PICTURES["convnet"]), {"image": np.zeros((1, 16, 16, 3), np.uint8)})
    with pytest.raises(UserError, match="is calibrated, and there are no examples"):
        onnx.write(pictures, tmp_path, "int8")


def test_a_network_that_is_called_twice_is_stored_once_in_eight_bits(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), np.uint8)
    given = predictor(Classification(PICTURES["convnet"], flip_test=True), {"image": image})
    onnx.write(given, tmp_path, "int8", [{"image": image}])
    graph = onnx_library.load(tmp_path / "model.onnx").graph
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    kernels = [x for x in graph.initializer if x.data_type == onnx_library.TensorProto.INT8 and len(x.dims) == 4]
    assert len(convolutions) == 2 * len(kernels) > 0
    same(given, tmp_path, {"image": image}, 0.1)


def test_a_run_is_exported_and_answers_by_either_engine(pictures, tmp_path, capsys):
    with pytest.raises(UserError, match="--mode=export --to=onnx makes it"):
        Predictor.open(pictures, engine="onnxruntime")
    found = verbs.export(pictures, "onnx", quantize="int8", calibrate=8, allow_drop=100.0)
    assert {"model.onnx", "manifest.json", "proof.json"} == set(found["files"])
    assert json.loads((tmp_path / found["export"] / "manifest.json").read_text())["quantize"] == "int8"
    verbs.export(pictures, "onnx")
    a, b = verbs.evaluate(pictures), verbs.evaluate(pictures, engine="onnxruntime")
    assert a["accuracy"] == b["accuracy"] and a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    with pytest.raises(UserError, match="there is no --engine=onxruntime. Did you mean"):
        Predictor.open(pictures, engine="onxruntime")
    with pytest.raises(UserError, match=r"holds step 2, and --step is 1"):
        Predictor.open(pictures, 1, engine="onnxruntime")
