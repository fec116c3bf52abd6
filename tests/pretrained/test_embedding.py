"""Vectors of texts: those of transformers by each way of pooling, files of any size, and runs of ours."""

import io
import json

import jax
import numpy as np
import pytest
import tokenizers

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.inference.embedding import Vectors, embedder, width_of
from bigbase_jax.inference.inputs import Input
from bigbase_jax.tasks.text_classification import VECTORS

TEXTS = ["the quick brown fox", "a dog", "the lazy dog sleeps " * 30, "fox"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in TEXTS for word in text.split()})]


@pytest.fixture(scope="module")
def folder(random_model, tmp_path_factory):
    """A random BERT of 40 positions with a tokenizer, as transformers writes them, and the model."""
    folder = tmp_path_factory.mktemp("bert")
    words = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = random_model("BertModel", vocab_size=len(WORDS), max_position_embeddings=40, **words)
    model.save_pretrained(folder)
    made = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)})
    made.save(str(folder / "tokenizer.json"))
    return folder, model


def pooled(hf, model, text, modes, normalize, length):
    """What sentence-transformers makes of one text."""
    ids = [WORDS.index(word) for word in text.split()][: length - 2]
    with hf.torch.no_grad():
        y_TD = model(input_ids=hf.torch.tensor([[2, *ids, 3]])).last_hidden_state[0].numpy()
    T = len(y_TD)
    weight_T1 = np.arange(1, T + 1)[:, None]
    found = {
        "cls_token": y_TD[0],
        "max_tokens": y_TD.max(0),
        "mean_tokens": y_TD.mean(0),
        "mean_sqrt_len_tokens": y_TD.sum(0) / np.sqrt(T),
        "weightedmean_tokens": (y_TD * weight_T1).sum(0) / weight_T1.sum(),
        "lasttoken": y_TD[-1],
    }
    vector_D = np.concatenate([found[mode] for mode in modes])
    return vector_D / np.linalg.norm(vector_D) if normalize else vector_D


def vectors(found, *texts):
    """f32[D] of each text."""
    return [np.array(a["vector"]) for _, a in found.answers(Input({"text": text}, "texts") for text in texts)]


def pooling(folder, to, modes, normalize, length):
    """The folder as sentence-transformers writes it."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), *([("2_Normalize", "Normalize")] if normalize else [])]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (to / "modules.json").write_text(json.dumps(listed))
    (to / "1_Pooling").mkdir()
    (to / "1_Pooling" / "config.json").write_text(
        json.dumps({f"pooling_mode_{name}": name in modes for name in VECTORS})
    )
    (to / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length}))


@pytest.mark.parametrize(
    ("modes", "normalize"), [*(((name,), False) for name in VECTORS), (("cls_token", "mean_tokens"), True)], ids=str
)
def test_vectors_are_those_of_sentence_transformers(hf, folder, tmp_path, modes, normalize):
    pooling(folder[0], tmp_path, modes, normalize, 20)
    found = embedder(tmp_path)
    assert (found.task.pools, found.task.normalize, width_of(found)) == (modes, normalize, 12 * len(modes))
    for text, vector_D in zip(TEXTS, vectors(found, *TEXTS), strict=True):
        want_D = pooled(hf, folder[1], text, modes, normalize, 20)
        np.testing.assert_allclose(vector_D, want_D, rtol=1e-4, atol=1e-5)


def test_a_folder_without_a_word_about_it_is_averaged(hf, folder):
    found = vectors(embedder(folder[0]), *TEXTS)
    want = [pooled(hf, folder[1], text, ("mean_tokens",), False, 40) for text in TEXTS]
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5)


def test_a_module_that_is_not_known_is_named(folder, tmp_path):
    pooling(folder[0], tmp_path, ("mean_tokens",), False, 20)
    for path, kind, words in (("2_Dense", "Dense", "the module 'Dense'"), ("../x", "Pooling", "the module 'Pooling'")):
        (tmp_path / "modules.json").write_text(json.dumps([{"path": path, "type": f"models.{kind}"}]))
        with pytest.raises(UserError, match=words):
            embedder(tmp_path)


def test_a_table_becomes_one_vector_per_row(folder, tmp_path):
    (tmp_path / "new.csv").write_text('id,text\n7,the fox\n8,""\n' + "".join(f"{i},a dog\n" for i in range(40)))
    out = io.StringIO()
    status = verbs.embed(str(folder[0]), str(tmp_path / "new.csv"), output=str(tmp_path / "v.npy"), out=out)
    vectors_ND = np.load(tmp_path / "v.npy", mmap_mode="r")
    assert status == 1 and vectors_ND.shape == (42, 12) and vectors_ND.dtype == np.float32
    assert json.loads(out.getvalue()) == {"output": str(tmp_path / "v.npy"), "vectors": 42, "width": 12, "errors": 1}
    assert np.isnan(vectors_ND[1]).all() and np.isfinite(np.delete(vectors_ND, 1, 0)).all()
    assert np.ptp(vectors_ND[2:], axis=0).max() < 1e-6 < np.abs(vectors_ND[0] - vectors_ND[2]).max()
    out = io.StringIO()
    assert verbs.embed(str(folder[0]), str(tmp_path / "new.csv"), out=out) == 1
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines[1]["row"] == 2 and "empty" in lines[1]["error"]
    np.testing.assert_allclose(lines[0]["vector"], vectors_ND[0], rtol=1e-6)
    before = (tmp_path / "new.csv").read_bytes()
    with pytest.raises(UserError, match="is one of the files to answer"):
        verbs.embed(str(folder[0]), str(tmp_path / "new.csv"), output=str(tmp_path / "new.csv"))
    (tmp_path / "none.csv").write_text("text\n")
    with pytest.raises(UserError, match="no row and no text"):
        verbs.embed(str(folder[0]), str(tmp_path / "none.csv"), output=str(tmp_path / "none.npy"))
    assert (tmp_path / "new.csv").read_bytes() == before and not (tmp_path / "none.npy").exists()


def test_runs_of_ours_give_vectors_too(tmp_path):
    from test_launch import launch

    texts = tmp_path / "texts.tsv"
    texts.write_text(
        "text\tlabel\n" + "".join(f"{'open a file' if i % 2 else 'sort numbers'} {i}\t{i % 2}\n" for i in range(60))
    )
    recipe = f"--config=configs/text_classify.py:tiny,adapt=lora,root={texts}"
    launch(recipe, f"--workdir={tmp_path / 'run'}", "--config.train.steps=2")
    found = embedder(tmp_path / "run")
    first, second = vectors(found, "open a file", "sort numbers")
    again, _ = vectors(found, "open a file", "close it " * 50)
    assert first.shape == (width_of(found),) and np.abs(first - second).max() > 1e-4
    np.testing.assert_allclose(first, again, rtol=1e-4, atol=1e-6)  # whatever else is in the batch


def test_a_file_of_no_vectors_can_be_read():
    file = io.BytesIO()
    with Vectors(file, 5):
        pass
    file.seek(0)
    assert np.load(file).shape == (0, 5) and jax.process_count() == 1
