"""Residual networks: those of torchvision, and the small ones for CIFAR.

Modules are named as torchvision's with dots turned into underscores (``layer1.0.conv1`` -> ``layer1_0.conv1``), and all
padding is explicit and symmetric as torch's, so that published weights give the published outputs. One thing differs:
torch's running variance is the unbiased one, here it is the biased one.

Axes: B examples, H height, W width, C channels, D channels of the output, K classes, h and w: H and W over the stride.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from bigbase_jax.models.dropout import Dropout
from bigbase_jax.models.layers import DTYPES, Conv, ModelError, classes, look_up, max_pool_3x3

conv_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015b
head_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # of torch's Linear


def _conv(features: int, kernel: int, stride: int, dtype: str, name: str) -> nn.Conv:
    pad = (kernel - 1) // 2
    return Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=[(pad, pad), (pad, pad)],
        use_bias=False,
        dtype=DTYPES[dtype],
        kernel_init=conv_init,
        name=name,
    )


class FrozenBatchNorm(nn.Module):
    """A BatchNorm whose statistics, scale and bias nothing trains, as detectors' backbones have it (Ren et al. 2015).

    Its variables are those of ``nn.BatchNorm``, by the same names.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    scale_init: Callable[..., Any] = nn.initializers.ones

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = x_BHWC.shape[-1:]
        mean_C = self.variable("batch_stats", "mean", jnp.zeros, shape).value
        var_C = self.variable("batch_stats", "var", jnp.ones, shape).value
        scale_C = self.param("scale", self.scale_init, shape)
        bias_C = self.param("bias", nn.initializers.zeros, shape)
        scale_C = jax.lax.stop_gradient(scale_C) * jax.lax.rsqrt(var_C + self.epsilon)
        shift_C = jax.lax.stop_gradient(bias_C) - mean_C * scale_C
        return x_BHWC * scale_C.astype(self.dtype) + shift_C.astype(self.dtype)


def _norm(train: bool, dtype: str, frozen: bool = False) -> Callable[..., nn.Module]:
    if frozen:
        return functools.partial(FrozenBatchNorm, dtype=DTYPES[dtype])
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=0.9,  # the old value's share; torch's momentum=0.1 is the new value's
        epsilon=1e-5,
        dtype=DTYPES[dtype],
    )


class ResidualBlock(nn.Module):
    """Convolutions and a shortcut (He et al. 2015, figure 5): two of 3x3, or 1x1, 3x3 and 1x1 (a bottleneck).

    Attributes:
      width: channels of each convolution, but for a bottleneck's last, which has four times as many.
      stride: of the first 3x3 convolution (torchvision's "v1.5") and of the shortcut.
      bottleneck: which of the two it is.
      shortcut: where the shapes differ: "conv" (1x1 convolution and BatchNorm; option B), "pad" (subsample, and pad
        the channels with zeros on both sides; option A) or "pool" ("conv" on 2x2 means; He et al. 2018, ResNet-D).
      project: whether a "conv" or "pool" shortcut has its convolution though the shapes are the same.
      zero_init: start the last BatchNorm's scale at zero.
      frozen: see ``FrozenBatchNorm``.
    """

    width: int
    stride: int = 1
    bottleneck: bool = False
    shortcut: str = "conv"
    zero_init: bool = False
    dtype: str = "float32"
    project: bool = False
    frozen: bool = False

    @nn.compact
    def __call__(self, x_BHWC: Float[Array, "B H W C"], train: bool) -> Float[Array, "B h w D"]:
        conv, norm = functools.partial(_conv, dtype=self.dtype), _norm(train, self.dtype, self.frozen)
        layers = [(3, self.width), (3, self.width)]  # (kernel, channels)
        if self.bottleneck:
            layers = [(1, self.width), (3, self.width), (1, 4 * self.width)]
        out, strided = layers[-1][1], [kernel for kernel, _ in layers].index(3)
        y = x_BHWC
        for i, (kernel, channels) in enumerate(layers):
            last = i == len(layers) - 1
            scale_init = nn.initializers.zeros if last and self.zero_init else nn.initializers.ones
            y = conv(channels, kernel, self.stride if i == strided else 1, name=f"conv{i + 1}")(y)
            y = norm(name=f"bn{i + 1}", scale_init=scale_init)(y)
            y = y if last else jax.nn.relu(y)
        if x_BHWC.shape[-1] == out and self.stride == 1 and not self.project:
            short = x_BHWC
        elif self.shortcut != "pad":
            pooled = self.shortcut == "pool" and self.stride == 2
            short = _mean_pool_2x2(x_BHWC) if pooled else x_BHWC
            short = conv(out, 1, 1 if pooled else self.stride, name="downsample_0")(short)
            short = norm(name="downsample_1")(short)
        else:
            more = out - x_BHWC.shape[-1]
            short = x_BHWC[:, :: self.stride, :: self.stride]
            short = jnp.pad(short, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return jax.nn.relu(y + short)


def _mean_pool_2x2(x_BHWC: Array) -> Array:
    """2x2 means at stride 2; of an odd last row or column those of what is there (``ceil_mode`` of torch)."""
    B, H, W, C = x_BHWC.shape
    x = jnp.pad(x_BHWC, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    return jnp.mean(x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C), (2, 4))


LAYOUTS = {  # depth -> whether its blocks are bottlenecks, and how many each stage has
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
STEMS = ("imagenet", "cifar", "patch", "deep")


class ResNet(nn.Module):
    """ResNet-18, -34, -50, -101 or -152 in torchvision's layout (He et al. 2015; from -50 on "v1.5").

    Attributes:
      num_classes: width of the output.
      depth: 18, 34, 50, 101 or 152.
      width: channels of the first stage, doubled at each of the next three; 64 in the published networks.
      stem: "imagenet" (7x7 convolution at stride 2, then 3x3 max-pool at stride 2), "cifar" (3x3 convolution at stride
        1, no pool: for pictures of 32 pixels or so), "patch" (4x4 convolution at stride 4, the cheapest) or "deep"
        (three 3x3 convolutions, the first at stride 2, then the pool) with the "pool" shortcuts of ``ResidualBlock``
        (ResNet-D, He et al. 2018).
      dropout: rate before the last layer.
      zero_init: start the last BatchNorm scale of each block at zero, so that blocks begin as the identity (Goyal et
        al. 2017, section 5.1).
      dtype: of the computation, "float32" or "bfloat16"; parameters, BatchNorm statistics and logits are float32.
      remat: compute the blocks' activations again in the backward pass instead of keeping them.
      frozen: all norms are ``FrozenBatchNorm``s.

    Raises:
      ModelError: an unknown depth, stem or dtype.
    """

    num_classes: int | None = None
    depth: int = 18
    width: int = 64
    stem: str = "imagenet"
    dropout: float = 0.0
    zero_init: bool = False
    dtype: str = "float32"
    remat: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        look_up(DTYPES, self.dtype, "dtype")
        if self.depth not in LAYOUTS:
            raise ModelError(f"depth is {self.depth}; a ResNet has depth {', '.join(map(str, LAYOUTS))}.")
        if self.stem not in STEMS:
            raise ModelError(f"stem is {self.stem!r}; it is one of {', '.join(map(repr, STEMS))}.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], train: bool = False, features: bool = False
    ) -> Float32[Array, "B K"] | list[Float[Array, "B _ _ _"]]:
        """Logits; or with ``features`` what each stage gives, the finest first, as a detector reads it."""
        conv, norm = functools.partial(_conv, dtype=self.dtype), _norm(train, self.dtype, self.frozen)
        x = x_BHWC.astype(DTYPES[self.dtype])
        if self.stem == "patch":
            if min(x.shape[1:3]) < 4:
                raise ModelError(f"a picture of {x.shape[1]}x{x.shape[2]} holds no patch of 4x4; use stem='cifar'.")
            x = Conv(
                self.width, (4, 4), 4, "VALID", use_bias=False, dtype=x.dtype, kernel_init=conv_init, name="conv1"
            )(x)
        elif self.stem == "cifar":
            x = conv(self.width, 3, 1, name="conv1")(x)
        elif self.stem == "deep":
            for i, (width, stride) in enumerate([(self.width // 2, 2), (self.width // 2, 1)]):
                x = jax.nn.relu(norm(name=f"stem_bn{i}")(conv(width, 3, stride, name=f"stem_conv{i}")(x)))
            x = conv(self.width, 3, 1, name="conv1")(x)
        else:
            x = conv(self.width, 7, 2, name="conv1")(x)
        x = jax.nn.relu(norm(name="bn1")(x))
        if self.stem in ("imagenet", "deep"):
            x = max_pool_3x3(x)
        bottleneck, counts = LAYOUTS[self.depth]
        shortcut = "pool" if self.stem == "deep" else "conv"
        found = _stages(self, counts, x, train, bottleneck=bottleneck, shortcut=shortcut, frozen=self.frozen)
        return found if features else _logits(self, found[-1], train, "fc")


class CifarResNet(nn.Module):
    """The ResNets for 32x32 pictures (He et al. 2015, section 4.2): three stages of ``(depth - 2) / 6`` blocks.

    Attributes:
      num_classes: width of the output.
      depth: 6 n + 2: 20, 32, 44, 56, 110.
      width: channels of the first stage, doubled at each of the next two; 16 in the paper.
      shortcut: "pad" (no parameters, as in the paper) or "conv" (1x1 convolution and BatchNorm).
      dropout, zero_init, dtype, remat: as in ``ResNet``.

    Raises:
      ModelError: a depth that is not 6 n + 2, an unknown shortcut or dtype.
    """

    num_classes: int | None = None
    depth: int = 20
    width: int = 16
    shortcut: str = "pad"
    dropout: float = 0.0
    zero_init: bool = False
    dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        look_up(DTYPES, self.dtype, "dtype")
        if self.depth < 8 or (self.depth - 2) % 6:
            raise ModelError(f"depth is {self.depth}; a CIFAR ResNet has depth 6 n + 2, such as 20, 32, 44 or 56.")
        if self.shortcut not in ("pad", "conv"):
            raise ModelError(f"shortcut is {self.shortcut!r}; it is 'pad' or 'conv'.")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x_BHWC: Float[Array, "B H W C"], train: bool = False, features: bool = False
    ) -> Float32[Array, "B K"] | list[Float[Array, "B _ _ _"]]:
        """Logits; or with ``features`` what each stage gives, the finest first, as a detector reads it."""
        conv, norm = functools.partial(_conv, dtype=self.dtype), _norm(train, self.dtype)
        x = x_BHWC.astype(DTYPES[self.dtype])
        x = jax.nn.relu(norm(name="bn1")(conv(self.width, 3, 1, name="conv1")(x)))
        found = _stages(self, [(self.depth - 2) // 6] * 3, x, train, shortcut=self.shortcut)
        return found if features else _logits(self, found[-1], train, "linear")


def _stages(net: Any, counts: Sequence[int], x_BHWC: Array, train: bool, **block: Any) -> list[Array]:
    """What each stage of so many blocks gives; inside a network's call."""
    make = nn.remat(ResidualBlock, static_argnums=(2,)) if net.remat else ResidualBlock
    found = [x_BHWC]
    for stage, count in enumerate(counts):
        x = found[-1]
        for i in range(count):
            x = make(
                net.width * 2**stage,
                stride=2 if stage and not i else 1,
                zero_init=net.zero_init,
                dtype=net.dtype,
                project=block["shortcut"] == "pool" and not i,
                name=f"layer{stage + 1}_{i}",
                **block,
            )(x, train)
        found.append(x)
    return found[1:]


def _logits(net: Any, x_BHWC: Array, train: bool, name: str) -> Array:
    x_BC = jnp.mean(x_BHWC, (1, 2), dtype=jnp.float32)
    x_BC = Dropout(net.dropout, deterministic=not train)(x_BC)
    return nn.Dense(classes(net.num_classes), kernel_init=head_init, name=name)(x_BC)
