"""BERT (Devlin et al. 2019) and RoBERTa (Liu et al. 2019), as transformers stores them: alone, or with heads for hidden
tokens, pairs of sentences and classes. MiniLM and Chinese BERT are BERT; XLM-R and CamemBERT are RoBERTa.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.bert import BERT, Bert
from bigbase_jax.pretrained.families import (
    SIZES,
    Keys,
    Shapes,
    classes,
    expect,
    is_plain,
    kinds,
    need,
    reads_text,
    said,
    words,
)
from bigbase_jax.pretrained.schema import FLAG, LENGTH, SHARE, TOKEN, VOCABULARY, WORD, only, whole
from bigbase_jax.pretrained.table import Entry, Table, attention, dense, norm, repeat

MODELS = (Bert,)
HEAD = r"^(head|pooler|lm|next)\."
TRANSFORMERS = True
inputs = reads_text
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "tanh": "tanh",
}
_HEADS: Mapping[str, Mapping[str, Any]] = {
    "Model": {"pooled": True},
    "ForMaskedLM": {"masked": True},
    "ForPreTraining": {"masked": True, "next_sentence": True},
    "ForNextSentencePrediction": {"next_sentence": True},
    "ForSequenceClassification": {},
}
"""What follows "Bert" or "Roberta" in the names of their classes -> words of our model. Others have heads that ours
cannot have, and are read without."""

_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY),
    **SIZES,
    "type_vocab_size": ("type_vocab_size", whole(1, 1 << 16), 2),
    "hidden_act": ("style.activation", WORD, "gelu"),
    "layer_norm_eps": ("style.epsilon", SHARE, 1e-12),
    "hidden_dropout_prob": ("dropout", SHARE, 0.1),
}
SCHEMA = {
    **kinds(_KEYS),
    "max_position_embeddings": LENGTH,
    "pad_token_id": TOKEN,
    "tie_word_embeddings": FLAG,
    "position_embedding_type": only("absolute"),
    "is_decoder": only(False),
    "add_cross_attention": only(False),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    bert = config["model_type"] == "bert"
    name = str((config.get("architectures") or [""])[0])
    kind = next((kind for kind in _HEADS if name.endswith(kind)), "" if name else "Model")
    offset = 0 if bert else config.get("pad_token_id", 1) + 1
    head = dict(_HEADS.get(kind, {}))
    if head.get("masked"):
        expect(config, tie_word_embeddings=True)
        if not bert:
            expect(config, hidden_act="gelu")  # as its head has, whatever the config says
    if kind == "ForSequenceClassification":
        head["num_classes"] = classes(config)
    return target(
        Bert,
        **words(_KEYS, config, BERT, ACTIVATIONS),
        length=config["max_position_embeddings"] - offset,
        position_offset=offset,
        classifier="pooled" if bert else "dense",
        **head,
    )


def to_config(model: Bert, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    bert = model.position_offset == 0
    given = {name: True for name in ("pooled", "masked", "next_sentence") if getattr(model, name)}
    if model.num_classes is not None:
        need(not given, f"transformers' classifiers have no other head; this model also has {' and '.join(given)}.")
        only = "pooled" if bert else "dense"
        whose = "BERT" if bert else "RoBERTa"
        need(model.classifier == only, f"{whose}'s classifier is {only!r}, not {model.classifier!r}.")
        kind = "ForSequenceClassification"
    else:
        known = [kind for kind, words in _HEADS.items() if words == given and (bert or "Sent" not in kind)]
        known = known if bert or "next_sentence" not in given else []
        need(bool(known) or not given, f"transformers has no such model with {' and '.join(given)} alone.")
        kind = known[0] if given else "Model"
    plain = is_plain(model.style, post_norm=True)
    need(plain, "BERT has LayerNorm after each branch, biases everywhere, and no gates.")
    if model.masked and not bert:
        need(model.style.activation == "gelu", f"RoBERTa's head has gelu, not {model.style.activation!r}.")
    config = {
        "model_type": "bert" if bert else "roberta",
        "architectures": [f"{'Bert' if bert else 'Roberta'}{kind}"],
        "max_position_embeddings": shapes["params.position"][0],
        **said(_KEYS, model, ACTIVATIONS),
    }
    if not bert:
        config["pad_token_id"] = model.position_offset - 1
    if model.num_classes is not None:
        config["num_labels"] = model.num_classes
    return config


def table(model: Bert) -> Table:
    """See ``Family``."""
    bert = model.position_offset == 0
    body = "bert" if bert else "roberta"
    theirs, ours = f"{body}.encoder.layer.{{i}}", "encoder.block_{i}"
    block = [
        *attention(f"{theirs}.attention", f"{ours}.attention", "self.query self.key self.value output.dense"),
        *_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.norm1"),
        *dense(f"{theirs}.intermediate.dense", f"{ours}.mlp.up"),
        *dense(f"{theirs}.output.dense", f"{ours}.mlp.down"),
        *_norm(f"{theirs}.output.LayerNorm", f"{ours}.norm2"),
    ]
    head, decoder = ("cls.predictions.transform", "cls.predictions") if bert else ("lm_head", "lm_head")
    entries = [
        Entry(
            f"{body}.embeddings.word_embeddings.weight",
            "embedding",
            also=(f"{decoder}.decoder.weight",) if model.masked else (),
        ),
        Entry(f"{body}.embeddings.position_embeddings.weight", "position"),
        Entry(f"{body}.embeddings.token_type_embeddings.weight", "type"),
        *_norm(f"{body}.embeddings.LayerNorm", "norm"),
        *repeat(model.depth, block),
    ]
    if model.has_pooler:
        entries += dense(f"{body}.pooler.dense", "pooler")
    if model.masked:
        entries += dense(f"{head}.dense", "lm.dense")
        entries += _norm(f"{head}.{'LayerNorm' if bert else 'layer_norm'}", "lm.norm")
        entries.append(Entry(f"{decoder}.bias", "lm.bias", also=(f"{decoder}.decoder.bias",)))
    if model.next_sentence:
        entries += dense("cls.seq_relationship", "next")
    if model.num_classes is not None:
        entries += dense("classifier" if bert else "classifier.out_proj", "head.out")
        entries += [] if bert else dense("classifier.dense", "head.dense")
    return Table(
        entries,
        sizes={"h": model.heads},
        prefix=f"{body}.",
        ignored=(r"embeddings\.(position|token_type)_ids$",),
        unread=(r"^(cls|lm_head|classifier|qa_outputs)\.", rf"^{body}\.pooler\."),
    )


def _norm(theirs: str, ours: str) -> list[Entry]:
    """A LayerNorm, which the oldest files call ``gamma`` and ``beta``."""
    scale, bias = norm(theirs, ours)
    return [
        dataclasses.replace(scale, also=(f"{theirs}.gamma",)),
        dataclasses.replace(bias, also=(f"{theirs}.beta",)),
    ]
