"""A run after its start: where it began from is gone, and it goes on to the same bits, evaluates, predicts, exports."""

import json
import pathlib
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_launch import arrays
from test_start import recipe

from bigbase_jax import pretrained, verbs
from bigbase_jax.build import build, target
from bigbase_jax.core import UserError
from bigbase_jax.data.sources.text.chat import ChatFiles
from bigbase_jax.models.cnn import ConvNet
from bigbase_jax.models.resnet import CifarResNet
from bigbase_jax.pretrained.start import RunTokenizer
from bigbase_jax.runtime.rundir import RunDir
from bigbase_jax.tasks.classification import Classification
from bigbase_jax.text.tokenizer import TokenizerFile
from bigbase_jax.wrappers.lora import LoRA

TEXT = "Names refer to objects. Names are introduced by name binding operations.\n\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGBASE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def published(random_model, tmp_path):
    """The folder of a random GPT-2 with the tokenizer of its bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path / "published"
    random_model("GPT2LMHeadModel", vocab_size=300, n_positions=40, n_embd=12, n_layer=2, n_head=3).save_pretrained(
        folder
    )
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def language(tmp_path, start=None, lora=False, tokenizer="bytes"):
    """configs/lm.py on a small text, for 8 steps."""
    text = tmp_path / "text.txt"
    if not text.exists():  # its time is part of what the data is
        text.write_text(TEXT * 40)
    arg = f"tiny,data=text,root={text},tokenizer={tokenizer}"
    config = runpy.run_path("configs/lm.py")["get_config"](arg)
    config.train.devices = 1
    if start:
        config.init_from = str(start)
    if lora:
        config.task = target(LoRA, task=config.task, rank=2)
    return config


def half(step, metrics):
    return "enough" if step == 4 else None


def begun(run):
    """As after its first checkpoint."""
    (run.checkpoints / "4").mkdir(parents=True)
    return run


@pytest.mark.parametrize("kind", ["published, by adapters", pytest.param("a run", marks=pytest.mark.slow)])
def test_a_run_goes_on_without_what_it_began_from(published, tmp_path, cache, capsys, kind):
    start, words = published, {"lora": True}
    if kind == "a run":
        start, words = tmp_path / "first", {"tokenizer": "chars"}
        verbs.train(language(tmp_path, tokenizer="chars"), str(start))
    tokenizer = (published / "tokenizer.json").read_bytes()
    result = verbs.train(language(tmp_path, start, **words), str(tmp_path / "whole"))
    run = tmp_path / "run"
    assert verbs.train(language(tmp_path, start, **words), str(run), observe=half) == {"step": 4, "stopped": "enough"}
    assert sum(path.stat().st_size for path in (run / "start").iterdir()) < 100_000  # no weights

    shutil.rmtree(start)
    assert not start.exists()
    with pytest.raises(UserError, match="is no folder: give that of published weights, or of a run"):
        verbs.train(language(tmp_path, start, **words), str(tmp_path / "new"))
    changed = language(tmp_path, start, **words)
    changed.optim.learning_rate = 0.5
    with pytest.raises(
        UserError, match=r"another config \(config\.optim\.learning_rate is 0\.001 there and 0\.5 here\)"
    ):
        verbs.train(changed, str(run))

    capsys.readouterr()
    assert verbs.evaluate(str(run))["step"] == 4
    assert "to tokenise it" not in capsys.readouterr().err  # the cache knows the text in this tokenizer
    shutil.rmtree(cache)
    assert verbs.train(language(tmp_path, start, **words), str(run)) == result
    said = capsys.readouterr().err
    assert "to tokenise it" in said and "step 6/8" in said
    assert ("frozen" in said) == (kind != "a run")
    assert arrays(run) == arrays(tmp_path / "whole") and arrays(run)[0] == "8"
    assert verbs.evaluate(str(run)) == result
    assert verbs.train(language(tmp_path, start, **words), str(run)) == result

    (tmp_path / "a.txt").write_text("Names refer")
    assert verbs.predict(str(run), str(tmp_path / "a.txt")) == 0
    assert "loss" in json.loads(capsys.readouterr().out)
    assert verbs.generate(str(run), ["Names"], sample="max_new_tokens=2") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Names"
    files = pathlib.Path(verbs.export(str(run))["export"])
    if kind != "a run":
        assert (files / "tokenizer.json").read_bytes() == tokenizer


def kept_of(path, tmp_path, config):
    """(what ``config`` becomes with ``path``, and once it is gone and the run has begun; the run)."""
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    before = pretrained.resolve(config)
    pretrained.record_origin(run, before)
    assert (
        pretrained.recorded_origin(run) is None and pretrained.data_of(run, before) is before.data
    )  # there may be no checkpoint
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    return before, pretrained.resolve(config, pretrained.recorded_origin(begun(run))), run


def test_the_tokenizer_of_a_folder_is_the_same_from_what_was_kept(published, tmp_path):
    file_signature = TokenizerFile(str(published)).file_signature()
    before, after, run = kept_of(published, tmp_path, recipe(published))
    assert after.to_json_best_effort() == before.to_json_best_effort() and after.task.model.width == 12
    assert before.data.dataset.tokenizer.path == str(published)
    tokenizer = build(pretrained.data_of(run, after)).dataset.tokenizer
    assert repr(tokenizer) == repr(TokenizerFile(str(published))) and tokenizer.file_signature() == file_signature
    assert tokenizer.fit(lambda: iter(()), lambda: iter(()), True).size == 257
    assert not list((run.path / "start").glob("*.safetensors"))
    assert after.data.dataset.tokenizer.target.endswith(":TokenizerFile")  # in the config nothing is another


def test_a_chat_template_comes_from_what_was_kept(published, tmp_path):
    (published / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}", "eos_token": "x"}))
    config = recipe(published)
    with config.unlocked():
        config.data.dataset = target(ChatFiles, root="somewhere")
    template = build(pretrained.resolve(config).data.dataset).chat_template()
    assert template.jinja == "{{ messages }}" and template.name == str(published)
    _, after, run = kept_of(published, tmp_path, config)
    assert build(pretrained.data_of(run, after)).dataset.chat_template() == template


def test_a_run_is_known_from_what_was_kept(tmp_path, cache):
    start = tmp_path / "first"
    verbs.train(language(tmp_path, tokenizer="chars"), str(start))
    before, after, run = kept_of(start, tmp_path, recipe(start))
    assert after.to_json_best_effort() == before.to_json_best_effort() and after.task.model.width == 16
    tokenizer = build(pretrained.data_of(run, after)).dataset.tokenizer
    assert repr(tokenizer) == repr(RunTokenizer(str(start)))
    assert tokenizer.fit(lambda: iter(()), lambda: iter(()), True).size == after.task.model.vocab_size


@pytest.mark.parametrize("kind", ["a folder", "an array file"])
def test_pictures_are_known_from_what_was_kept(random_model, tmp_path, kind):
    path = tmp_path / "start"
    if kind == "a folder":
        words = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
        random_model("ViTForImageClassification", **words, image_size=15, patch_size=5).save_pretrained(path)
        given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.4, 0.5]}
        (path / "preprocessor_config.json").write_text(json.dumps(given))
    else:
        model = CifarResNet(3, 8, 4)
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        pretrained.save(tmp_path / "saved", model, variables)
        from safetensors.numpy import load_file

        path = tmp_path / "start.npz"
        np.savez(path, **load_file(tmp_path / "saved" / "model.safetensors"))
    config = recipe(path)
    with config.unlocked():
        config.data = {}
        config.task = target(Classification, model=target(ConvNet, num_classes=3), mean=(0.5,), std=(0.5,))
    before, after, _ = kept_of(path, tmp_path, config)
    assert after.to_json_best_effort() == before.to_json_best_effort()
    model = build(after.task.model)
    assert model.width == 12 if kind == "a folder" else model.depth == 8


def test_what_is_kept_is_made_anew_until_the_run_has_begun(published, gpt2_folder, tmp_path):
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    pretrained.record_origin(run, recipe(published))
    assert (run.path / "start" / "tokenizer.json").exists()
    pretrained.record_origin(run, recipe(gpt2_folder))
    assert not (run.path / "start" / "tokenizer.json").exists() and (run.path / "start" / "config.json").exists()
    without = recipe(gpt2_folder)
    with without.unlocked():
        without.init_from = None
    pretrained.record_origin(begun(run), without)
    assert (run.path / "start").exists()
    shutil.rmtree(run.checkpoints)
    pretrained.record_origin(run, without)
    assert not (run.path / "start").exists()
