"""RT-DETR (Zhao et al. 2023), as ``RTDetrForObjectDetection`` of transformers stores it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from bigbase_jax.build import target
from bigbase_jax.core import UserError
from bigbase_jax.models.resnet import ResNet
from bigbase_jax.models.rt_detr import RTDETR
from bigbase_jax.models.transformer import Style
from bigbase_jax.pretrained.families import (
    Keys,
    Shapes,
    classes,
    expect,
    is_plain,
    kinds,
    lookup,
    need,
    picture,
    resnet,
    said,
    words,
)
from bigbase_jax.pretrained.families.detr import ACTIVATIONS, prediction_head
from bigbase_jax.pretrained.schema import (
    FLAG,
    HIDDEN,
    LAYERS,
    WIDTH,
    WORD,
    Kind,
    Schema,
    heads_of,
    listed,
    number,
    only,
    whole,
)
from bigbase_jax.pretrained.table import (
    Entry,
    Table,
    attention,
    batch_norm,
    conv,
    dense,
    fairseq_block,
    feed_forward,
    norm,
    repeat,
)

MODELS = (RTDETR,)
HEAD = r"^(place_head|place_box_head|head_\d+|box_head_\d+)\."
TRANSFORMERS = True
_KEYS: Keys = {
    "d_model": ("width", WIDTH, 256),
    "encoder_hidden_dim": ("encoder_width", WIDTH, 256),
    "encoder_layers": ("depth", whole(0, 1024), 1),
    "encoder_attention_heads": ("encoder_heads", heads_of("encoder_hidden_dim"), 8),
    "encoder_ffn_dim": ("encoder_mlp_dim", HIDDEN, 1024),
    "hidden_expansion": ("expansion", number(1 / 64, 64), 1.0),
    "decoder_layers": ("decoder_depth", LAYERS, 6),
    "decoder_attention_heads": ("heads", heads_of("d_model"), 8),
    "decoder_ffn_dim": ("mlp_dim", HIDDEN, 1024),
    "decoder_n_points": ("points", whole(1, 64), 4),
    "num_queries": ("queries", whole(1, 1 << 14), 300),
    "batch_norm_eps": ("epsilon", number(0, 1), 1e-5),
    "layer_norm_eps": ("style.epsilon", number(0, 1), 1e-5),
    "decoder_activation_function": ("style.activation", WORD, "relu"),
}
SCHEMA: Schema = {
    **kinds(_KEYS),
    "activation_function": WORD,
    "encoder_activation_function": WORD,
    "freeze_backbone_batch_norms": FLAG,
    "encode_proj_layers": only([2]),
    "num_feature_levels": only(3),
    "decoder_in_channels": listed(WIDTH, 1, 64),
    "normalize_before": only(False),
    "learn_initial_query": only(False),
    "positional_encoding_temperature": only(10000),
    "eval_size": Kind("absent, as positions are computed for any size", lambda x, _: False),
    "backbone_config": {"model_type": WORD, "out_indices": only([2, 3, 4]), **resnet.SCHEMA},
}


def from_config(config: Mapping[str, Any]) -> ConfigDict:
    """See ``Family``."""
    inner = {"embedding_size": 64, "hidden_sizes": [256, 512, 1024, 2048], **(config.get("backbone_config") or {})}
    if inner.get("model_type", "rt_detr_resnet") != "rt_detr_resnet":
        raise UserError(f"config.json has the backbone {inner['model_type']!r}; known here is 'rt_detr_resnet'.")
    found = words(_KEYS, config, Style(post_norm=True), ACTIVATIONS)
    expect(config, decoder_in_channels=3 * [found["encoder_width"]])
    acts = {
        name: lookup(ACTIVATIONS, config.get(f"{name}_function", usual), f"{name}_function")
        for name, usual in (("activation", "silu"), ("encoder_activation", "gelu"))
    }
    return target(
        RTDETR,
        num_classes=classes(config),
        backbone=target(
            ResNet, **resnet.layout(inner), stem="deep", frozen=config.get("freeze_backbone_batch_norms", True)
        ),
        **found,
        **acts,
    )


def to_config(model: RTDETR, shapes: Shapes) -> dict[str, Any]:
    """See ``Family``."""
    backbone = model.backbone
    need(isinstance(backbone, ResNet) and backbone.stem == "deep", "transformers' RT-DETR has a ResNet of stem='deep'.")
    assert isinstance(backbone, ResNet)
    plain = is_plain(model.style, post_norm=True)
    need(plain, "transformers' RT-DETR has LayerNorm after each branch, and no gates.")
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    width = model.encoder_width or model.width
    stages = resnet.stages(backbone, shapes["params.backbone.stem_conv0.kernel"][2])
    return {
        "model_type": "rt_detr",
        "architectures": ["RTDetrForObjectDetection"],
        **said(_KEYS, model, ACTIVATIONS),
        "encoder_hidden_dim": width,
        "encoder_in_channels": stages["hidden_sizes"][1:],
        "decoder_in_channels": 3 * [width],
        "activation_function": lookup(theirs, model.activation, "activation"),
        "encoder_activation_function": lookup(theirs, model.encoder_activation, "encoder_activation"),
        "freeze_backbone_batch_norms": backbone.frozen,
        "num_denoising": 0,
        "backbone_config": {
            **stages,
            "model_type": "rt_detr_resnet",
            "out_features": ["stage2", "stage3", "stage4"],
            "out_indices": [2, 3, 4],
        },
        "num_labels": shapes["params.place_head.bias"][0],
    }


def _unit(theirs: str, ours: str, parts: tuple[str, str] = ("conv", "norm")) -> list[Entry]:
    """A ``models.rt_detr.ConvNorm``."""
    a, b = parts
    return [*conv(f"{theirs}.{a}", f"{ours}.conv"), *batch_norm(f"{theirs}.{b}", f"{ours}.norm")]


def _fusion(theirs: str, ours: str, last: bool) -> list[Entry]:
    """A ``models.rt_detr.FusionBlock``."""
    bottleneck = [
        entry for n in (1, 2) for entry in _unit(f"{theirs}.bottlenecks.{{k}}.conv{n}", f"{ours}.rep_{{k}}_conv{n}")
    ]
    ends = [entry for n in ((1, 2, 3) if last else (1, 2)) for entry in _unit(f"{theirs}.conv{n}", f"{ours}.conv{n}")]
    return [*ends, *repeat(3, bottleneck, "k")]


def table(model: RTDETR) -> Table:
    """See ``Family``."""
    backbone: Any = model.backbone
    width, entries = model.encoder_width or model.width, []
    last = int(width * model.expansion) != width
    at_backbone = resnet.backbone(backbone, "model.backbone.model", "backbone")
    for i in range(3):
        entries += _unit(f"model.encoder_input_proj.{i}", f"projection_{i}", ("0", "1"))
        entries += _unit(f"model.decoder_input_proj.{i}", f"memory_{i}", ("0", "1"))
    for i in range(2):
        entries += _unit(f"model.encoder.lateral_convs.{i}", f"lateral_{i}")
        entries += _unit(f"model.encoder.downsample_convs.{i}", f"stride_{i}")
        entries += _fusion(f"model.encoder.fpn_blocks.{i}", f"down_{i}", last)
        entries += _fusion(f"model.encoder.pan_blocks.{i}", f"up_{i}", last)
    counted = entries if backbone.frozen else [*at_backbone, *entries]
    decoder, head = "model.decoder.layers.{i}", "model.decoder"
    across, here = f"{decoder}.encoder_attn", "decoder_{i}.cross_attention"
    return Table(
        entries=[
            *at_backbone,
            *entries,
            *repeat(model.depth, fairseq_block("model.encoder.encoder.0.layers.{i}", "encoder.block_{i}")),
            *dense("model.enc_output.0", "place"),
            *norm("model.enc_output.1", "place_norm"),
            *dense("model.enc_score_head", "place_head"),
            *prediction_head("model.enc_bbox_head", "place_box_head"),
            *prediction_head(f"{head}.query_pos_head", "query_position", 2),
            *repeat(
                model.decoder_depth,
                [
                    *attention(f"{decoder}.self_attn", "decoder_{i}.attention", letter="g"),
                    *norm(f"{decoder}.self_attn_layer_norm", "decoder_{i}.norm1"),
                    *dense(f"{across}.sampling_offsets", f"{here}.offset"),
                    *dense(f"{across}.attention_weights", f"{here}.share"),
                    *dense(f"{across}.value_proj", f"{here}.value"),
                    *dense(f"{across}.output_proj", f"{here}.out"),
                    *norm(f"{decoder}.encoder_attn_layer_norm", "decoder_{i}.norm_cross"),
                    *feed_forward(decoder, "decoder_{i}"),
                    *norm(f"{decoder}.final_layer_norm", "decoder_{i}.norm2"),
                    *dense(f"{head}.class_embed.{{i}}", "head_{i}"),
                    *prediction_head(f"{head}.bbox_embed.{{i}}", "box_head_{i}"),
                ],
            ),
        ],
        sizes={"h": model.encoder_heads, "g": model.heads},
        prefix="model.",
        ignored=(r"\.num_batches_tracked$",),
        unread=(r"^model\.denoising_class_embed\.", r"^(class_embed|bbox_embed)\."),
        constants=resnet.counters(counted),
    )


def inputs(model: RTDETR, config: Mapping[str, Any]) -> tuple[Any, ...]:
    """See ``Family``."""
    inner = config.get("backbone_config") or {}
    return picture(64, 64, inner.get("num_channels", 3))
