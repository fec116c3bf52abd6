"""Whisper (Radford et al. 2022), as transformers' ``WhisperForConditionalGeneration`` stores it: tiny to large-v3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.transformer import Style
from bigbase_jax.models.whisper import Whisper
from bigbase_jax.pretrained.families import Shapes, lookup, need
from bigbase_jax.pretrained.schema import ENCODER_DECODER, VOCABULARY, WORD, only, whole
from bigbase_jax.pretrained.table import Entry, Table, dense, heads, joined, norm, repeat

MODELS = (Whisper,)
HEAD = r"(?!)"
TRANSFORMERS = True
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
_EPSILON = 1e-5
SCHEMA = {
    "vocab_size": VOCABULARY,
    "num_mel_bins": whole(1, 1024),
    "max_source_positions": whole(1, 1 << 16),
    "max_target_positions": whole(2, 1 << 16),
    **ENCODER_DECODER,
    "activation_function": WORD,
    "scale_embedding": only(False),
    "tie_word_embeddings": only(True),
    "is_encoder_decoder": only(True),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    for key in ("attention_heads", "ffn_dim"):
        if config[f"encoder_{key}"] != config[f"decoder_{key}"]:
            raise UserError(f"config.json has another {key} in its encoder than in its decoder; known here is one.")
    return target(
        Whisper,
        vocab_size=config["vocab_size"],
        mels=config.get("num_mel_bins", 80),
        frames=2 * config.get("max_source_positions", 1500),
        length=config.get("max_target_positions", 448),
        width=config["d_model"],
        depth=config["encoder_layers"],
        decoder_depth=config["decoder_layers"],
        heads=config["encoder_attention_heads"],
        mlp_dim=config["encoder_ffn_dim"],
        style=Style(
            epsilon=_EPSILON,
            activation=lookup(_ACTIVATIONS, config.get("activation_function", "gelu"), "activation_function"),
            key_bias=False,
            kernel_init="normal",
        ),
    )


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
    theirs = {ours: name for name, ours in _ACTIVATIONS.items()}
    V = model.vocab_size or 1
    end = 50_256 + (V > 51_864) if V > 50_257 else V - 1  # published ones speak English alone where V is 51,864
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_attention_heads"] = model.heads
        sides[f"{side}_ffn_dim"] = model.mlp_dim or 4 * model.width
    return {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "is_encoder_decoder": True,
        "vocab_size": model.vocab_size,
        "num_mel_bins": model.mels,
        "max_source_positions": model.frames // 2,
        "max_target_positions": model.length,
        "d_model": model.width,
        "encoder_layers": model.depth,
        "decoder_layers": model.decoder_depth or model.depth,
        **sides,
        "activation_function": lookup(theirs, style.activation, "activation"),
        "scale_embedding": False,
        "tie_word_embeddings": True,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), end),
        "decoder_start_token_id": min(end + 1, V - 1),
        "begin_suppress_tokens": None,
    }


def table(model: Whisper) -> Table:
    """See ``Family``."""

    def attention(theirs: str, ours: str) -> list[Entry]:
        return [
            *heads(f"{theirs}.q_proj", f"{ours}.query"),
            *heads(f"{theirs}.k_proj", f"{ours}.key", bias=False),
            *heads(f"{theirs}.v_proj", f"{ours}.value"),
            *joined(f"{theirs}.out_proj", f"{ours}.out"),
        ]

    def stack(side: str, depth: int) -> list[Entry]:
        theirs, ours = f"model.{side}.layers.{{i}}", f"{side}.block_{{i}}"
        cross = [
            *attention(f"{theirs}.encoder_attn", f"{ours}.cross_attention"),
            *norm(f"{theirs}.encoder_attn_layer_norm", f"{ours}.norm_cross"),
        ]
        block = [
            *attention(f"{theirs}.self_attn", f"{ours}.attention"),
            *norm(f"{theirs}.self_attn_layer_norm", f"{ours}.norm1"),
            *(cross if side == "decoder" else []),
            *dense(f"{theirs}.fc1", f"{ours}.mlp.up"),
            *dense(f"{theirs}.fc2", f"{ours}.mlp.down"),
            *norm(f"{theirs}.final_layer_norm", f"{ours}.norm2"),
        ]
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
