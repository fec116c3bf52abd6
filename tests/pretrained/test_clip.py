"""CLIP and SigLIP against transformers: the same scores, and back to the same bits."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from PIL import Image

from bigbase_jax import parallel
from bigbase_jax.build import build
from bigbase_jax.core import UserError
from bigbase_jax.inference.predictor import Predictor
from bigbase_jax.models.bert import Bert
from bigbase_jax.models.clip import CLIP
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.vit import ViT
from bigbase_jax.pretrained import initialise, load, part, save
from bigbase_jax.tasks.contrastive import Contrastive

TOWER = {"num_hidden_layers": 2, "intermediate_size": 20}
TEXT = {**TOWER, "hidden_size": 12, "num_attention_heads": 3, "vocab_size": 61, "max_position_embeddings": 9}
VISION = {**TOWER, "hidden_size": 16, "num_attention_heads": 4, "image_size": 15, "patch_size": 5}
CLIP_ENDS = {"eos_token_id": 60, "bos_token_id": 59, "pad_token_id": 60}
CASES = {
    "clip": ("CLIPModel", {"text_config": {**TEXT, **CLIP_ENDS}, "vision_config": VISION, "projection_dim": 10}),
    "clip, exact gelu": (
        "CLIPModel",
        {
            "text_config": {**TEXT, **CLIP_ENDS, "hidden_act": "gelu"},
            "vision_config": {**VISION, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
            "projection_dim": 10,
        },
    ),
    "siglip": ("SiglipModel", {"text_config": {**TEXT, "projection_size": 16}, "vision_config": VISION}),
}


def batch():
    """Pictures [B,H,W,C], tokens and segments [B,L]: texts of 9 and of 5 tokens, which end with 60."""
    rng = np.random.RandomState(0)
    tokens_BL = rng.randint(0, 59, (2, 9)).astype(np.int32)
    tokens_BL[0, 8] = tokens_BL[1, 4:] = 60
    segments_BL = np.ones_like(tokens_BL)
    segments_BL[1, 5:] = 0
    return rng.randn(2, 15, 15, 3).astype(np.float32), tokens_BL, segments_BL


@pytest.mark.parametrize("case", CASES)
def test_the_same_scores_and_back_to_the_same_bits(hf, random_model, tmp_path, case):
    name, words = CASES[case]
    theirs = random_model(name, **words)
    with hf.torch.no_grad():
        theirs.logit_scale.fill_(1.7)
    theirs.save_pretrained(tmp_path / "theirs")
    image, tokens_BL, segments_BL = batch()
    given = {
        "pixel_values": hf.torch.tensor(image.transpose(0, 3, 1, 2)),
        "input_ids": hf.torch.tensor(tokens_BL).long(),
    }
    if name == "CLIPModel":  # SigLIP was trained to read padding
        given["attention_mask"] = hf.torch.tensor(segments_BL)
    with hf.torch.no_grad():
        want = theirs(**given).logits_per_image.numpy()
    assert want.std() > 0.1  # there is something to compare

    model, variables = load(tmp_path / "theirs")
    assert isinstance(model, CLIP)
    with jax.default_matmul_precision("highest"):
        u_BE, v_BE, scale, bias = jax.jit(model.apply)(variables, image, tokens_BL, segments_BL)
    np.testing.assert_allclose(scale * u_BE @ v_BE.T + bias, want, rtol=1e-4, atol=1e-4)

    save(tmp_path / "ours", model, variables)
    back, about = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(about.values()), about
    old, new = theirs.state_dict(), back.state_dict()
    assert set(old) == set(new)
    assert [key for key in old if not hf.torch.equal(old[key], new[key])] == []
    again, same = load(tmp_path / "ours")
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, same))


def test_padding_changes_nothing_in_clip_and_something_in_siglip(random_model, tmp_path):
    _, tokens_BL, segments_BL = batch()
    for case in ("clip", "siglip"):
        name, words = CASES[case]
        random_model(name, **words).save_pretrained(tmp_path / case)
        model, variables = load(tmp_path / case)
        other_BL = np.where(segments_BL > 0, tokens_BL, 7)
        texts = [
            model.apply(variables, *map(jnp.asarray, (x, segments_BL)), method="texts") for x in (tokens_BL, other_BL)
        ]
        assert not np.array_equal(tokens_BL, other_BL)
        assert np.allclose(*texts, atol=1e-6) == (case == "clip")


def test_other_towers_are_in_no_family(tmp_path):
    model = CLIP(ResNet(width=4, stem="cifar"), Bert(11, 8, width=8, depth=1, heads=2), width=6)
    tokens_1L = jnp.ones((1, 8), jnp.int32)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), tokens_1L, tokens_1L)
    with pytest.raises(UserError, match="not ResNet and Bert"):
        save(tmp_path, model, variables)
    assert dataclasses.replace(model.picture, num_classes=None).num_classes is None and model.picture.num_classes == 6


def test_a_tower_begins_with_the_weights_of_a_folder_and_the_rest_stays_fresh(tmp_path):
    picture = ViT(5, width=8, depth=1, heads=2, patch=4)
    image = jnp.zeros((1, 8, 8, 3))
    trained = picture.init(jax.random.key(7), image)
    save(tmp_path / "vit", picture, trained)
    node, tokenizer = part(str(tmp_path / "vit"))
    assert tokenizer is None and node.num_classes is None
    tower, text = build(node), Bert(11, 6, width=8, depth=1, heads=2, type_vocab_size=1)
    task = Contrastive(CLIP(tower, text, width=4), length=6)
    batch = {"image": np.zeros((2, 8, 8, 3), np.float32), "mask": np.ones(2, np.float32)}
    batch |= {name: np.ones((2, 1, 6), np.int32) for name in ("tokens", "segment_ids")}
    mesh = parallel.make_mesh(1)
    state = parallel.program(task, optax.sgd(1.0), batch, mesh, seed=0).init(parallel.put(batch, mesh))
    before = jax.device_get(state.params)
    params = initialise(None, state, task, batch, parts={"picture": str(tmp_path / "vit"), "text": None}).params
    head = params["picture"].pop("head")
    jax.tree.map(
        np.testing.assert_array_equal, params["picture"], {k: v for k, v in trained["params"].items() if k != "head"}
    )
    assert head["kernel"].shape == (8, 4) and np.array_equal(head["kernel"], before["picture"]["head"]["kernel"])
    assert not np.array_equal(params["picture"]["embedding"]["kernel"], before["picture"]["embedding"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params["text"], before["text"])
    again = parallel.program(task, optax.sgd(1.0), batch, mesh, seed=0).init(parallel.put(batch, mesh))
    with pytest.raises(UserError, match="init_parts.sound='.*vit': Contrastive has no such part"):
        initialise(None, again, task, batch, parts={"sound": str(tmp_path / "vit")})


def test_a_published_folder_tells_pictures_apart_by_names(hf, random_model, tmp_path):
    words = ["<|startoftext|>", "<|endoftext|>", "[UNK]", *["a", "red", "green", "cat", "dog"]]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[("<|startoftext|>", 0), ("<|endoftext|>", 1)]
    )
    marks = {"bos_token": words[0], "eos_token": words[1], "pad_token": words[1], "unk_token": words[2]}
    theirs = hf.PreTrainedTokenizerFast(tokenizer_object=made, **marks)
    ends = {"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 1}
    model = random_model("CLIPModel", text_config={**TEXT, **ends}, vision_config=VISION, projection_dim=10)
    sides = {"size": {"shortest_edge": 15}, "crop_size": {"height": 15, "width": 15}, "do_center_crop": True}
    said = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "do_normalize": True, "resample": 3, **sides}
    for part_ in (model, theirs):
        part_.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    x_HWC = np.random.RandomState(0).randint(0, 256, (15, 15, 3)).astype(np.uint8)
    Image.fromarray(x_HWC).save(tmp_path / "a.png")
    labels = ["a red cat", "dog", "a green dog"]
    pixels = (x_HWC / 255 - said["image_mean"]) / said["image_std"]
    given = dict(theirs(labels, return_tensors="pt", padding=True))
    given.pop("token_type_ids", None)
    given["pixel_values"] = hf.torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=hf.torch.float32)
    with hf.torch.no_grad():
        want = model(**given).logits_per_image.softmax(-1)[0].numpy()
    assert want.max() - want.min() > 0.05
    predictor = Predictor.open(tmp_path)
    (got,) = predictor.answer({"image": (tmp_path / "a.png").read_bytes(), "labels": labels, "templates": ["{}"]})
    np.testing.assert_allclose([got["probabilities"][label] for label in labels], want, rtol=2e-3)
    with pytest.raises(UserError, match="give a row with labels"):
        predictor.answer(str(tmp_path / "a.png"))
