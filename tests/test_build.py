"""Configs build what they say, and say what they cannot build."""

import dataclasses
import pathlib
import re
import runpy

import optax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from bigbase_jax import build as building
from bigbase_jax.build import build, deferred, parse_arg, renewed, target
from bigbase_jax.core import UserError
from bigbase_jax.models.bag_of_words import BagOfWords
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.encoder_decoder import EncoderDecoder
from bigbase_jax.models.mlp import MLP
from bigbase_jax.models.vit import ViT

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Thing:
    size: int
    name: str = "thing"
    part: object = None
    rate: float | None = None
    pair: tuple[int, int] = (1, 2)


def test_round_trip_holds_every_argument_with_its_default():
    node = target(Thing, size=3, part=target(Thing, size=4))
    assert set(node) == {"target", "size", "name", "part", "rate", "pair"}
    assert build(node) == Thing(3, part=Thing(4))
    assert build(ConfigDict(node.to_dict())) == build(node)


def test_a_saved_config_builds_the_same():
    from bigbase_jax.runtime.rundir import as_json

    node = target(Thing, size=3, pair=(5, 6))
    assert build(ConfigDict(as_json(node))) == Thing(3, pair=(5, 6))


def test_none_is_a_typed_placeholder():
    node = target(Thing, size=3)
    node.rate = 0.5
    assert build(node).rate == 0.5
    with pytest.raises(TypeError):
        node.rate = "fast"


def test_misspelt_arguments_name_the_nearest():
    with pytest.raises(UserError, match=r"Thing has no argument 'siez'. Did you mean 'size'\?"):
        target(Thing, siez=3)
    node = target(Thing, size=3).unlock()
    node.nmae = "x"
    with pytest.raises(UserError, match=r"config.task: Thing has no argument 'nmae'. Did you mean 'name'\?"):
        build(node, _path="config.task")
    with pytest.raises(UserError, match="needs the argument 'size'"):
        target(Thing)


def test_facts_fill_what_is_none_and_nothing_else():
    node = target(Thing, size=3, part=target(Thing, size=4, rate=1.0))
    built = build(node, {"rate": 0.25, "size": 9, "unknown": 1})
    assert built == Thing(3, rate=0.25, part=Thing(4, rate=1.0))


def test_deferred_waits_for_the_rest():
    node = deferred(optax.adamw, b1=0.8)
    assert node.target == "optax:adamw"
    assert build(node).keywords == {"b1": 0.8}
    with pytest.raises(UserError, match="adamw has no argument 'beta1'"):
        deferred(optax.adamw, beta1=0.8)


def test_linen_modules_show_their_own_fields_only():
    node = target(nn.Dense, features=3)
    assert "parent" not in node and "name" not in node
    assert build(node) == nn.Dense(features=3)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optax:adamx", "Did you mean 'adam"),
        ("optax.nowhere:adam", "no module 'optax.nowhere'"),
        ("not_there_at_all:x", "no module 'not_there_at_all'"),
        ("optax", "'package.module:Name'"),
        ("math:pi", "not something that can be called"),
    ],
)
def test_unknown_import_paths_are_one_sentence(path, message, monkeypatch):
    monkeypatch.setattr(building, "_trusted", {"math", "not_there_at_all"})
    with pytest.raises(UserError, match=message):
        building.locate(path)


def test_a_bug_inside_a_constructor_keeps_its_traceback():
    def broken(size):
        return size + "x"

    broken.__module__, broken.__qualname__ = __name__, "broken"
    globals()["broken"] = broken
    building.trust_config({"target": f"{__name__}:broken"})
    with pytest.raises(TypeError):
        build(ConfigDict({"target": f"{__name__}:broken", "size": 3}))


def test_recipe_arguments_are_typed_and_checked():
    args = parse_arg("tiny,data=folder,root=/a\\,b,depth=7", tiny=False, data="drawn", root=None, depth=3)
    assert (args.tiny, args.data, args.root, args.depth) == (True, "folder", "/a,b", 7)
    assert parse_arg(None, tiny=False).tiny is False
    assert parse_arg("tiny=false", tiny=True).tiny is False
    for text, message in [
        ("dta=x", "Did you mean 'data'"),
        ("depth=x", "not of type int"),
        ("tiny=perhaps", "true or false"),
        ("data", "needs a value"),
    ]:
        with pytest.raises(UserError, match=message):
            parse_arg(text, tiny=False, data="drawn", depth=3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("root=/my,data", {"root": "/my,data"}),
        ("root=/my, data,b/c=d,tiny,depth=7", {"root": "/my, data,b/c=d", "tiny": True, "depth": 7}),
        ("root=a,,b\\,tiny,", {"root": "a,,b,tiny"}),
        ("depth=7,root=/a\\,x=1,", {"depth": 7, "root": "/a,x=1"}),
        ("data=x,y,root=,z", {"data": "x,y", "root": ",z"}),
        ("tiny, depth=7 ,", {"tiny": True, "depth": 7}),
        ("root=a,lenght=5", "no argument 'lenght'"),
        ("root=a,dept=5", "no argument 'dept'. Did you mean 'depth'"),
        ("root=a,tinny", "no argument 'tinny'. Did you mean 'tiny'"),
        ("root=a,depth", {"root": "a,depth"}),
        ("tiny,depth", "'depth' needs a value"),
        ("depth=7,b", "no argument 'b'"),
        ("tiny,b", "no argument 'b'"),
        ("/a,b", "no argument '/a'"),
    ],
)
def test_a_comma_in_a_string_belongs_to_it(text, found):
    defaults = {"tiny": False, "data": "drawn", "root": None, "depth": 3}
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            parse_arg(text, **defaults)
    else:
        assert vars(parse_arg(text, **defaults)) == {**defaults, **found}


MODELS = {
    Bert: {"vocab_size": 9, "length": 8, "width": 8, "depth": 1, "heads": 2},
    BagOfWords: {"vocab_size": 9, "width": 8},
    ViT: {"num_classes": 2, "patch": 4, "width": 8, "depth": 1, "heads": 2},
    ConvNet: {"num_classes": 2, "stages": (4, 8), "dense": 0},
    MLP: {"num_classes": 2, "hidden": (8, 8)},
    EncoderDecoder: {"vocab_size": 9, "length": 8, "width": 8, "depth": 1, "heads": 2},
}


@pytest.mark.parametrize("model", MODELS)
def test_sizes_and_rates_of_models_are_in_range(model):
    words = MODELS[model]
    build(target(model, **words))
    for key, value in words.items():
        for wrong in (0, -4) if key != "dense" else ():
            wrong = (4, wrong) if isinstance(value, tuple) else wrong
            with pytest.raises(
                UserError, match=re.escape(f"config.task.model.{key} is {wrong}; it must be at least 1.")
            ):
                build({"model": target(model, **{**words, key: wrong})}, _path="config.task")
    for rate in (1.5, -0.1, 1.0):
        with pytest.raises(UserError, match=rf"config\.dropout is {rate}; it lies in \[0, 1\)"):
            build(target(model, **words, dropout=rate))


@pytest.mark.parametrize(
    ("recipe", "arg", "found"),
    [
        ("text_classify", "text=a+b,label=2,class_names=/c,d", {"text": "a+b", "label": "2", "class_names": "/c,d"}),
        ("text_classify", "text=a,text_pair=b", {"text": "a", "text_pair": "b", "label": None}),
        ("translate", "source=1,target=0", {"source_language": "1", "target_language": "0"}),
        ("lm", "data=text,columns=a+b", {"format": {"columns": ("a", "b"), "unit": "file"}}),
        ("bert", "data=text", {"format": {"columns": ()}}),
        ("instruct", "", {}),
    ],
)
def test_recipes_take_paths_columns_and_encodings_as_arguments(recipe, arg, found):
    given = f"root=/my,data,encoding=gb18030,{arg}"
    node = runpy.run_path(f"{ROOT}/configs/{recipe}.py")["get_config"](given).data.dataset.to_dict()
    assert node["root"] == "/my,data" and {**node, **node.get("format", {})}["encoding"] == "gb18030"
    for key, value in found.items():
        assert node[key] == value or node[key].items() >= value.items()


@pytest.mark.parametrize(
    ("model", "words"),
    [("bert:Bert", {"activation": "relu"}), ("decoder:Decoder", {"window": 3}), ("vit:ViT", {"epsilon": 1e-3})],
)
def test_styles_that_stood_among_a_models_own_arguments_are_read(model, words):
    flat = {"target": f"bigbase_jax.models.{model}", "width": 8, "heads": 2, **words}
    found = build(ConfigDict(renewed(flat)))
    assert found.width == 8 and found.style == dataclasses.replace(type(found).style, **words)
