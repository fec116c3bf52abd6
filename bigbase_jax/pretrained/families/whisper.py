"""Whisper (Radford et al. 2022), as transformers' ``WhisperForConditionalGeneration`` stores it: tiny to large-v3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.whisper import Whisper
from bigbase_jax.pretrained.families import ENCODER_DECODER, Keys, Shapes, kinds, need, one_size, said, words
from bigbase_jax.pretrained.schema import VOCABULARY, WORD, only, whole
from bigbase_jax.pretrained.table import Entry, Table, dense, fairseq_block, norm, repeat

MODELS = (Whisper,)
HEAD = r"(?!)"
TRANSFORMERS = True
_EPSILON = 1e-5
_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY),
    "num_mel_bins": ("mels", whole(1, 1024), 80),
    "max_target_positions": ("length", whole(2, 1 << 16), 448),
    **ENCODER_DECODER,
    "activation_function": ("style.activation", WORD, "gelu"),
}
SCHEMA = {
    **kinds(_KEYS),
    "max_source_positions": whole(1, 1 << 16),
    "scale_embedding": only(False),
    "tie_word_embeddings": only(True),
    "is_encoder_decoder": only(True),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    style = Style(epsilon=_EPSILON, key_bias=False, kernel_init="normal")
    frames = 2 * config.get("max_source_positions", 1500)
    return target(Whisper, **one_size(words(_KEYS, config, style)), frames=frames)


def to_config(model: Whisper, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    style = model.style
    plain = style.norm == "layernorm" and not style.post_norm and not style.qk_norm and style.epsilon == _EPSILON
    need(plain, f"Whisper has LayerNorm before each branch, with an epsilon of {_EPSILON}.")
    need(not style.gated and style.scale is None, "Whisper has no gates, and the usual scales.")
    need(style.kv_heads in (None, model.heads), "Whisper has as many heads of keys as of queries.")
    need(style.head_dim in (None, model.width // model.heads), "Whisper's heads are as wide as the model together.")
    biased = style.qkv_bias and style.out_bias and style.mlp_bias and not style.key_bias
    need(biased, "Whisper has biases everywhere but in its keys.")
    V = model.vocab_size or 1
    end = 50_256 + (V > 51_864) if V > 50_257 else V - 1  # published ones speak English alone where V is 51,864
    return {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        **said(_KEYS, model),
        "max_source_positions": model.frames // 2,
        "scale_embedding": False,
        "tie_word_embeddings": True,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), end),
        "decoder_start_token_id": min(end + 1, V - 1),
        "begin_suppress_tokens": None,
    }


def table(model: Whisper) -> Table:
    """See ``Family``."""

    def stack(side: str, depth: int) -> list[Entry]:
        theirs, ours = f"model.{side}.layers.{{i}}", f"{side}.block_{{i}}"
        block = fairseq_block(theirs, ours, cross=side == "decoder", key_bias=False)
        return [*repeat(depth, block), *norm(f"model.{side}.layer_norm", f"{side}.norm")]

    return Table(
        entries=[
            *dense("model.encoder.conv1", "conv1", arrange="o i k -> k i o"),
            *dense("model.encoder.conv2", "conv2", arrange="o i k -> k i o"),
            Entry("model.encoder.embed_positions.weight", "source_position"),
            *stack("encoder", model.depth),
            Entry("model.decoder.embed_tokens.weight", "embedding", also=("proj_out.weight",)),
            Entry("model.decoder.embed_positions.weight", "target_position"),
            *stack("decoder", model.decoder_depth or model.depth),
        ],
        sizes={"h": model.heads},
        prefix="model.",
    )


def inputs(model: Whisper, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    return jax.ShapeDtypeStruct((1, 2, model.mels), jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
