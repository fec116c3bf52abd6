"""An adapter that a run has exported: on its base it is the run's model, and a run that begins from it goes on."""

import io
import json
import shutil

import jax
import numpy as np
import pytest
from test_provenance import TEXT, language

from bigbase_jax import pretrained, verbs
from bigbase_jax.core import UserError, flatten
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.pretrained.start import merged


def trained(config, workdir, learning_rate=0.01):
    config.train.update({"steps": 2, "eval_every": 2, "checkpoint_every": 2})
    config.optim.learning_rate = learning_rate
    verbs.train(config, str(workdir))
    return str(workdir)


def same(a, b):
    a, b = (flatten(merged(p.task, p.variables)) for p in (a, b))
    assert a.keys() == b.keys()
    return all(np.array_equal(*jax.device_get((a[name], b[name]))) for name in a)


def continued(workdir, **words):
    out = io.StringIO()
    assert verbs.generate(workdir, ["Names refer"], sample="max_new_tokens=8", out=out, **words) == 0
    return json.loads(out.getvalue())["text"]


def test_an_adapter_on_its_base_is_the_run_and_a_run_goes_on_from_it(tmp_path, monkeypatch):
    monkeypatch.setenv("BIGBASE_CACHE", str(tmp_path / "cache"))
    base = trained(language(tmp_path), tmp_path / "base")
    run = trained(language(tmp_path, base, lora=True), tmp_path / "run", learning_rate=3.0)
    found = verbs.export(run, "adapter", str(tmp_path / "adapter"))
    assert found["files"] == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    adapter = found["export"]
    of_run, of_base = Predictor.open(run), Predictor.open(base)
    assert not same(of_run, of_base)
    on_base = Predictor.open(base, adapter=adapter)
    assert same(on_base, of_run)
    (answer,), (wanted,), (plain,) = (p.answer({"text": TEXT}) for p in (on_base, of_run, of_base))
    assert answer == wanted and answer["loss"] != plain["loss"]
    written = [continued(base, adapter=adapter), continued(run), continued(base)]
    assert written[0] == written[1] != written[2]
    with pytest.raises(UserError, match="was trained on another base"):
        Predictor.open(run, adapter=adapter)

    config = language(tmp_path, adapter, lora=True)
    config.task.rank = 7  # the adapter knows better
    again = trained(config, tmp_path / "again", learning_rate=0.0)
    kept = Predictor.open(again)
    assert same(kept, of_run) and kept.task.rank == of_run.task.rank != 7
    assert (kept.config.adapter, kept.config.init_from) == (adapter, base)
    for folder in (adapter, base):
        shutil.move(folder, f"{folder} elsewhere")
    assert verbs.train(config, again)["step"] == 2  # the same command opens it without them

    about = json.loads((tmp_path / "adapter elsewhere" / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == base
    config = language(tmp_path, str(tmp_path / "adapter elsewhere"), lora=True)
    with pytest.raises(
        UserError, match=r"the base of the adapter .*base, is not there.*correct base_model_name_or_path"
    ):
        pretrained.resolve(config)
    with pytest.raises(UserError, match="is an adapter of the kind LoRA, and the recipe's task has none"):
        pretrained.resolve(language(tmp_path, str(tmp_path / "adapter elsewhere")))
