"""What tasks of texts share: the tokens of a batch as a model takes them, a linear head on its hidden vectors, and
tokens as a person reads them.

Axes: B examples, L length, D model width, K outputs of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bigbase_jax.core import Batch, UserError, Variables
from bigbase_jax.models.dropout import Dropout
from bigbase_jax.tasks.errors import model_errors
from bigbase_jax.text.tokenizer import Encoder, load

PADDING = -1
"""What stands for a token, or for its tag or target, where there is none."""


def check_vocabulary(model: nn.Module, tokenizer: str | None) -> None:
    """Raises UserError where the model has room for fewer tokens than the tokenizer has."""
    size = getattr(model, "vocab_size", None)
    if tokenizer is not None and size is not None and size < load(tokenizer).size:
        raise UserError(
            f"config.task.model.vocab_size is {size}, but the tokenizer has {load(tokenizer).size} tokens; leave it "
            "open to take theirs."
        )


def check_rate(dropout: float) -> None:
    """Raises UserError where it is no rate of a dropout."""
    if not 0 <= dropout < 1:
        raise UserError(f"dropout is {dropout}; it lies in [0, 1), for example 0.1.")


def headless(model: nn.Module, num_classes: int | None = None) -> nn.Module:
    """A model that gives hidden vectors, without the heads that it can have but for that of classes.

    Raises:
      UserError: it does not read text.
    """
    if not callable(getattr(model, "hidden", None)):
        raise UserError(f"{type(model).__name__} does not read text; models such as Bert and Decoder do.")
    without: dict[str, Any] = dict.fromkeys(("masked", "pooled", "next_sentence"), False)
    given = {**without, "tied": True, "num_classes": num_classes}
    return model.clone(**{name: value for name, value in given.items() if hasattr(model, name)})


def hidden(model: Any, variables: Variables, batch: Batch, dropout: jax.Array | None = None) -> jax.Array:
    """f32[B,L,D]: what a model makes of the tokens of a batch; without a key for dropout, as for inference.

    Raises:
      UserError: the model does not fit the texts.
    """
    rngs = {} if dropout is None else {"dropout": dropout}
    with model_errors():
        y_BLD: Any = model.apply(variables, *words_of(model, batch), train=bool(rngs), rngs=rngs, method="hidden")
    return y_BLD.astype(jnp.float32)


def words_of(model: Any, batch: Batch) -> tuple[Any, ...]:
    """What a model takes: tokens, segments, positions and, where it tells them apart, types."""
    words = (batch["tokens"], batch["segment_ids"], None)
    return (*words, batch["token_type_ids"]) if hasattr(model, "type_vocab_size") else words


def init_with_head(model: Any, outputs: int, key: jax.Array, batch: Batch) -> Variables:
    """Fresh variables of a model of texts, and of a linear head on its hidden vectors: ``params.head``.

    Raises:
      UserError: the model does not fit the texts.
    """
    body_key, head_key = jax.random.split(key)
    with model_errors():
        y_1LD, variables = model.init_with_output(body_key, *words_of(model, one_text(batch)), method="hidden")
    head = _head(outputs).init(head_key, jnp.zeros((1, y_1LD.shape[-1])))["params"]
    return {**variables, "params": {**variables["params"], "head": head}}


def one_text(batch: Batch) -> Batch:
    """A text without padding, of the length of those of a batch."""
    one_1L = jnp.ones((1, batch["tokens"].shape[1]), jnp.int32)
    return {"tokens": one_1L * 0, "segment_ids": one_1L, "token_type_ids": one_1L * 0}


def head_logits(outputs: int, variables: Variables, y: jax.Array, dropout: float, key: jax.Array | None) -> jax.Array:
    """f32[..., K]: what the head makes of f32[..., D]; without a key for dropout, as for inference."""
    rngs = {} if key is None else {"dropout": key}
    y = Dropout(dropout, deterministic=key is None).apply({}, y, rngs=rngs)  # type: ignore[assignment]
    found: Any = _head(outputs).apply({"params": variables["params"]["head"]}, y)
    return found


def _head(outputs: int) -> nn.Dense:
    return nn.Dense(outputs, kernel_init=nn.initializers.normal(0.02))


def state_of(variables: Variables) -> Variables:
    """All but the parameters."""
    return {name: x for name, x in variables.items() if name != "params"}


def shown_tokens(inputs: Batch) -> jax.Array:
    """i32[B,L]: the tokens, -1 where there is padding."""
    return jnp.where(inputs["segment_ids"] > 0, inputs["tokens"], PADDING)


def drawn(batch: Batch, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """``tokens`` and ``segment_ids`` i32[B,L] of one of the captions i32[B,C,L] of each example (those without a
    segment are none), drawn alike; without a key, the first."""
    tokens_BCL, segments_BCL = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"])
    at_B = jnp.zeros(len(tokens_BCL), jnp.int32)
    if key is not None:
        count_B = jnp.sum(jnp.any(segments_BCL > 0, -1), -1)
        at_B = (jax.random.uniform(key, count_B.shape) * count_B).astype(jnp.int32)
    tokens_BL, segments_BL = (jnp.take_along_axis(x, at_B[:, None, None], 1)[:, 0] for x in (tokens_BCL, segments_BCL))
    return tokens_BL, segments_BL


def encoded(tokenizer: str, texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """``tokens`` and ``segment_ids`` i32[N,L] of texts with the tokenizer's special tokens around them, cut to L."""
    encode = Encoder(load(tokenizer), length)
    found = [encode([text_T])[0] for text_T, _ in encode.tokenizer.encode_batch(list(texts))]
    return {name: np.stack([row[name] for row in found]) for name in ("tokens", "segment_ids")}


def pieces_of(tokenizer: str | None, tokens: Sequence[int]) -> list[str]:
    """Each token as text, or as its number without a tokenizer."""
    numbers = [int(token) for token in tokens]
    return [str(number) for number in numbers] if tokenizer is None else load(tokenizer).pieces(numbers)


def text_of(tokenizer: str | None, tokens: Sequence[int]) -> str:
    """Tokens as a text, or as numbers without a tokenizer."""
    numbers = [int(token) for token in tokens]
    return " ".join(map(str, numbers)) if tokenizer is None else load(tokenizer).decode(numbers)
