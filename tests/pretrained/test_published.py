"""``--mode=predict`` on published folders: the answers of transformers' models and image processors, or a sentence."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from bigbase_jax import verbs
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor

BERT = {"vocab_size": 30, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}
BERT |= {"max_position_embeddings": 16, "id2label": {0: "bad", 1: "good", 2: "so so"}}
VIT = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20, "num_labels": 3}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film", ",", "and", "long", "so"]


@pytest.fixture
def bert(random_model, hf, tmp_path):
    folder = tmp_path / "bert"
    random_model("BertForSequenceClassification", **BERT).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS + [f"w{i}" for i in range(17)]))
    return folder


def softmax(hf, logits):
    return hf.torch.softmax(logits, -1).detach().numpy()


def test_a_classifier_of_texts_answers_rows_as_transformers_does(hf, bert, tmp_path, capsys):
    texts = ["a good film", "bad, so bad", "a long film, and good"]
    (tmp_path / "new.csv").write_text("id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(texts)))
    assert verbs.predict(str(bert), str(tmp_path / "new.csv")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    tokenizer = hf.BertTokenizer(str(bert / "vocab.txt"))
    model = hf.BertForSequenceClassification.from_pretrained(bert).eval()
    wanted = softmax(hf, model(**tokenizer(texts, padding=True, return_tensors="pt")).logits)
    assert [list(f["probabilities"]) for f in found] == 3 * [["bad", "good", "so so"]]
    np.testing.assert_allclose([list(f["probabilities"].values()) for f in found], wanted, atol=1e-5)
    assert wanted.std(0).max() > 1e-3


@pytest.mark.parametrize("kind", ["vit", "convnext"])
def test_pictures_are_scaled_as_the_folder_says(hf, random_model, tmp_path, kind):
    folder = tmp_path / kind
    if kind == "vit":
        model = random_model("ViTForImageClassification", image_size=32, patch_size=8, **VIT)
        processor = hf.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6])
    else:
        layers = {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        model = random_model("ResNetForImageClassification", num_labels=3, **layers)
        processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64}, crop_pct=0.875)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in ((90, 50), (40, 133))]
    predictor = Predictor.open(folder)
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
        (example,) = predictor.examples(str(tmp_path / f"{i}.png"))
        pixels = processor(picture, return_tensors="np")["pixel_values"][0]
        ours = np.asarray(predictor.task.normalise(example["image"][None]))[0]
        np.testing.assert_allclose(ours.transpose(2, 0, 1), pixels, atol=1e-5)
        wanted = softmax(hf, model(hf.torch.tensor(pixels[None])).logits)[0]
        output = predictor.task.predict(predictor.variables, {"image": example["image"][None]})
        np.testing.assert_allclose(output["probabilities"][0], wanted, atol=1e-5)


def test_other_folders_are_one_sentence(random_model, bert, gpt2_folder, tmp_path):
    shutil.copy(bert / "vocab.txt", gpt2_folder)
    with pytest.raises(UserError, match="GPT2LMHeadModel.*classifiers of texts or pictures.*--mode=generate"):
        verbs.predict(str(gpt2_folder), str(bert / "vocab.txt"))
    random_model("ViTForImageClassification", image_size=32, patch_size=8, **VIT).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="no preprocessor_config.json, which says what becomes of pictures"):
        Predictor.open(tmp_path / "vit")
    with pytest.raises(UserError, match="is not a run folder"):
        Predictor.open(tmp_path / "nowhere")
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    with pytest.raises(UserError, match="one class for each"):
        Predictor.open(bert)
    random_model("BertModel", **{k: v for k, v in BERT.items() if k != "id2label"}).save_pretrained(bert)
    (bert / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"lacks the weights .*head"):
        Predictor.open(bert)
