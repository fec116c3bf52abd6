"""VITS and MMS-TTS (Kim et al. 2021, Pratap et al. 2023), as transformers' ``VitsModel`` stores them; in, for
inference. Weights that only training needs, or that inference leaves out, are not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.vits import Vits
from bigbase_jax.pretrained.families import ACTIVATIONS, Keys, Shapes, kinds, lookup, words
from bigbase_jax.pretrained.schema import (
    FLAG,
    HIDDEN,
    LAYERS,
    VOCABULARY,
    WIDTH,
    WORD,
    heads_of,
    listed,
    number,
    only,
    whole,
)
from bigbase_jax.pretrained.table import Entry, Table, attention, dense, norm, repeat

MODELS = (Vits,)
HEAD = r"(?!)"
TRANSFORMERS = True
_TAPS, _FEW = whole(1, 63), whole(1, 64)
_STRIDES, _ROW = listed(whole(1, 64), 1, 8), listed(whole(1, 63), 1, 8)
_KEYS: Keys = {
    "vocab_size": ("vocab_size", VOCABULARY, 38),
    "hidden_size": ("width", WIDTH, 192),
    "num_hidden_layers": ("depth", LAYERS, 6),
    "num_attention_heads": ("heads", heads_of("hidden_size"), 2),
    "window_size": ("window", whole(1, 1024), 4),
    "use_bias": ("bias", FLAG, True),
    "ffn_dim": ("hidden", HIDDEN, 768),
    "ffn_kernel_size": ("kernel", _TAPS, 3),
    "flow_size": ("flow_width", WIDTH, 192),
    "layer_norm_eps": ("epsilon", number(0, 1), 1e-5),
    "use_stochastic_duration_prediction": ("stochastic", FLAG, True),
    "num_speakers": ("speakers", whole(1, 1 << 16), 1),
    "speaker_embedding_size": ("speaker_width", whole(0, 1 << 16), 0),
    "upsample_initial_channel": ("up_width", WIDTH, 512),
    "upsample_rates": ("up_rates", _STRIDES, (8, 8, 2, 2)),
    "upsample_kernel_sizes": ("up_kernels", _STRIDES, (16, 16, 4, 4)),
    "resblock_kernel_sizes": ("block_kernels", _ROW, (3, 7, 11)),
    "resblock_dilation_sizes": ("block_dilations", listed(_ROW, 1, 8), ((1, 3, 5),) * 3),
    "leaky_relu_slope": ("slope", number(0, 1), 0.1),
    "depth_separable_num_layers": ("separable", whole(1, 8), 3),
    "duration_predictor_flow_bins": ("bins", whole(2, 256), 10),
    "duration_predictor_tail_bound": ("bound", number(1e-3, 1e3), 5.0),
    "duration_predictor_kernel_size": ("duration_kernel", _TAPS, 3),
    "duration_predictor_num_flows": ("duration_flows", _FEW, 4),
    "duration_predictor_filter_channels": ("duration_hidden", WIDTH, 256),
    "prior_encoder_num_flows": ("flows", _FEW, 4),
    "prior_encoder_num_wavenet_layers": ("layers", _FEW, 4),
    "wavenet_kernel_size": ("wave_kernel", _TAPS, 5),
    "wavenet_dilation_rate": ("dilation", whole(1, 8), 1),
    "speaking_rate": ("rate", number(0.05, 20), 1.0),
    "noise_scale": ("noise", number(0, 10), 0.667),
    "noise_scale_duration": ("duration_noise", number(0, 10), 0.8),
    "sampling_rate": ("samples", whole(4000, 384_000), 16_000),
}
SCHEMA = {
    **kinds(_KEYS),
    "hidden_act": WORD,
    "depth_separable_channels": only(2),
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    found = words(_KEYS, config)
    found["block_dilations"] = tuple(map(tuple, found["block_dilations"]))
    if found["speakers"] == 1:
        found["speaker_width"] = 0
    elif not found["speaker_width"]:
        raise UserError("config.json has several speakers, and a speaker_embedding_size of 0.")
    for ours, theirs in (("up_kernels", "up_rates"), ("block_kernels", "block_dilations")):
        if len(found[ours]) != len(found[theirs]):
            raise UserError(f"config.json says {len(found[ours])} kernels for {len(found[theirs])} of {theirs}.")
    odd = (*found["block_kernels"], found["wave_kernel"], found["duration_kernel"])
    if not all(k % 2 for k in odd) or found["flow_width"] % 2:
        raise UserError("config.json has a kernel of an even size, or an odd flow_size; known here are the others.")
    if any(k < r or (k - r) % 2 for k, r in zip(found["up_kernels"], found["up_rates"], strict=True)):
        raise UserError("config.json has upsample_kernel_sizes that are not upsample_rates and a multiple of 2 more.")
    if found["up_width"] % 2 ** len(found["up_rates"]):
        raise UserError("config.json has an upsample_initial_channel that cannot be halved so often.")
    act = lookup(ACTIVATIONS, config.get("hidden_act", "relu"), "hidden_act")
    return target(Vits, act=act, **found)


def to_config(model: Vits, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    raise UserError("a VITS is read for inference, without the weights that transformers' has beside; keep its folder.")


def _conv(theirs: str, ours: str, bias: bool = True) -> list[Entry]:
    return dense(theirs, ours, bias, "o i k -> k i o")


def _one(theirs: str, ours: str) -> list[Entry]:
    """A convolution of one tap."""
    return dense(theirs, ours, arrange="o i () -> i o")


def _weight_norm(theirs: str, ours: str) -> list[Entry]:
    new = f"{theirs}.parametrizations.weight.original"
    return [
        Entry(f"{new}0", f"{ours}.scale", "o () () -> o", also=(f"{theirs}.weight_g",)),
        Entry(f"{new}1", f"{ours}.direction", "o i k -> k i o", also=(f"{theirs}.weight_v",)),
        Entry(f"{theirs}.bias", f"{ours}.bias"),
    ]


def _separable(theirs: str, ours: str, layers: int) -> list[Entry]:
    layer = [
        Entry(f"{theirs}.convs_dilated.{{k}}.weight", f"{ours}.depthwise_{{k}}.kernel", "c () k -> k c"),
        Entry(f"{theirs}.convs_dilated.{{k}}.bias", f"{ours}.depthwise_bias_{{k}}"),
        *_one(f"{theirs}.convs_pointwise.{{k}}", f"{ours}.pointwise_{{k}}"),
        *norm(f"{theirs}.norms_1.{{k}}", f"{ours}.norm_a_{{k}}"),
        *norm(f"{theirs}.norms_2.{{k}}", f"{ours}.norm_b_{{k}}"),
    ]
    return repeat(layers, layer, "k")


def _durations(model: Vits) -> list[Entry]:
    theirs = "duration_predictor"
    speaker = _one(f"{theirs}.cond", "duration_speaker") if model.speaker_width else []
    if not model.stochastic:
        convs = [
            *_conv(f"{theirs}.conv_{{i}}", "duration_conv_{i}"),
            *norm(f"{theirs}.norm_{{i}}", "duration_norm_{i}"),
        ]
        return [*repeat(2, convs, start=1), *_one(f"{theirs}.proj", "duration_out"), *speaker]
    flow = [
        *_one(f"{theirs}.flows.{{i}}.conv_pre", "duration_flow_{i}_pre"),
        *_separable(f"{theirs}.flows.{{i}}.conv_dds", "duration_flow_{i}_separable", model.separable),
        *_one(f"{theirs}.flows.{{i}}.conv_proj", "duration_flow_{i}_out"),
    ]
    return [
        *_one(f"{theirs}.conv_pre", "duration_pre"),
        *_one(f"{theirs}.conv_proj", "duration_out"),
        *_separable(f"{theirs}.conv_dds", "duration_separable", model.separable),
        *speaker,
        Entry(f"{theirs}.flows.0.translate", "duration_shift", "c () -> c"),
        Entry(f"{theirs}.flows.0.log_scale", "duration_scale", "c () -> c"),
        *repeat(model.duration_flows - 1, flow, start=2),
    ]


def table(model: Vits) -> Table:
    """See ``Family``."""
    encoder, decoder = "text_encoder.encoder.layers.{i}", "decoder.resblocks"
    block = [
        *attention(f"{encoder}.attention", "block_{i}_attention", bias=model.bias),
        Entry(f"{encoder}.attention.emb_rel_k", "block_{i}_attention.relative_key", "() r k -> r k"),
        Entry(f"{encoder}.attention.emb_rel_v", "block_{i}_attention.relative_value", "() r k -> r k"),
        *norm(f"{encoder}.layer_norm", "block_{i}_norm1"),
        *_conv(f"{encoder}.feed_forward.conv_1", "block_{i}_up"),
        *_conv(f"{encoder}.feed_forward.conv_2", "block_{i}_down"),
        *norm(f"{encoder}.final_layer_norm", "block_{i}_norm2"),
    ]
    wave = [
        *_weight_norm("flow.flows.{i}.wavenet.in_layers.{k}", "flow_{i}_wavenet.in_{k}"),
        *_weight_norm("flow.flows.{i}.wavenet.res_skip_layers.{k}", "flow_{i}_wavenet.out_{k}"),
    ]
    speaker = _weight_norm("flow.flows.{i}.wavenet.cond_layer", "flow_{i}_wavenet.speaker")
    flow = [
        *_one("flow.flows.{i}.conv_pre", "flow_{i}_pre"),
        *repeat(model.layers, wave, "k"),
        *(speaker if model.speaker_width else []),
        *_one("flow.flows.{i}.conv_post", "flow_{i}_post"),
    ]
    gan = [*_conv("decoder.conv_pre", "decoder.first"), *_conv("decoder.conv_post", "decoder.last", bias=False)]
    for i in range(len(model.up_rates)):
        gan += dense(f"decoder.upsampler.{i}", f"decoder.up_{i}", arrange="i o k -> k i o")
        for j, dilations in enumerate(model.block_dilations):
            number = i * len(model.block_kernels) + j
            for n in range(len(dilations)):
                gan += _conv(f"{decoder}.{number}.convs1.{n}", f"decoder.block_{i}_{j}_a_{n}")
                gan += _conv(f"{decoder}.{number}.convs2.{n}", f"decoder.block_{i}_{j}_b_{n}")
    if model.speaker_width:
        gan += [*_one("decoder.cond", "decoder.speaker"), Entry("embed_speaker.weight", "speaker.embedding")]
    return Table(
        entries=[
            Entry("text_encoder.embed_tokens.weight", "embedding.embedding"),
            *repeat(model.depth, block),
            *_one("text_encoder.project", "prior"),
            *_durations(model),
            *repeat(model.flows, flow),
            *gan,
        ],
        sizes={"h": model.heads},
        ignored=(
            r"^posterior_encoder\.",
            r"^duration_predictor\.(post_|flows\.1\.)",
            *(() if model.speaker_width else (r"\.cond(_layer)?\.",)),
        ),
    )


def inputs(model: Vits, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    tokens, one = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.float32)
    noise = [jax.ShapeDtypeStruct((1, n, width), jnp.float32) for n, width in ((2, 2), (4, model.flow_width))]
    return tokens, tokens, jax.ShapeDtypeStruct((1,), jnp.int32), one, *noise
