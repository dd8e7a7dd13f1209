"""Dilated residual networks (He et al. 2016; Yu and Koltun 2016): the backbones of the paper.

* One table from depth to blocks. `width` is the planes of the first stage: 64 as published, and every
  other number of channels scales with it.
* `output_stride` (image pixels per feature pixel) turns strides into dilations while the stages are
  built: at 8, stages 3 and 4 keep their size and dilate by 2 and 4.
* What the *first* block of a dilated stage does differs between published networks, so it is an option:
  (2, 4) is the authors' (`first_block_dilation`, never more than the stage's own dilation).
* Bottlenecks put the stride on their 3x3 convolution.
"""

import functools
from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from pspnet_jax.arrays import Features
from pspnet_jax.models.layers import (
    HE_FAN_OUT,
    BatchNorm,
    Conv,
    Initializer,
    RandomNumbers,
    conv_norm,
    max_pool,
    run,
)
from pspnet_jax.resample import Platform

STEMS = ("deep", "7x7")
OUTPUT_STRIDES = (8, 16, 32)


class BackboneFeatures(NamedTuple):
    """Feature maps of stage 3 (for the auxiliary head) and stage 4 (for the pyramid)."""

    stage3: Features
    stage4: Features


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut; both are dilated."""

    expansion = 1

    def __init__(
        self, in_channels: int, planes: int, *, stride: int, dilation: int, conv, norm, rng
    ):
        self.conv1 = conv(in_channels, planes, 3, stride=stride, dilation=dilation, rng=rng)
        self.norm1 = norm(planes)
        self.conv2 = conv(planes, planes, 3, dilation=dilation, rng=rng)
        self.norm2 = norm(planes)
        self.shortcut = _shortcut(in_channels, planes, stride=stride, conv=conv, norm=norm, rng=rng)

    def __call__(self, x: Features, *, train: bool) -> Features:
        y = jax.nn.relu(conv_norm(self.conv1, self.norm1, x, train=train))
        y = conv_norm(self.conv2, self.norm2, y, train=train)
        return jax.nn.relu(y + _identity_or(self.shortcut, x, train=train))


class Bottleneck(nnx.Module):
    """1x1 reduction, 3x3 convolution, 1x1 expansion by four, and a shortcut."""

    expansion = 4

    def __init__(
        self, in_channels: int, planes: int, *, stride: int, dilation: int, conv, norm, rng
    ):
        out_channels = planes * self.expansion
        self.conv1 = conv(in_channels, planes, 1, rng=rng)
        self.norm1 = norm(planes)
        self.conv2 = conv(planes, planes, 3, stride=stride, dilation=dilation, rng=rng)
        self.norm2 = norm(planes)
        self.conv3 = conv(planes, out_channels, 1, rng=rng)
        self.norm3 = norm(out_channels)
        self.shortcut = _shortcut(
            in_channels, out_channels, stride=stride, conv=conv, norm=norm, rng=rng
        )

    def __call__(self, x: Features, *, train: bool) -> Features:
        y = jax.nn.relu(conv_norm(self.conv1, self.norm1, x, train=train))
        y = jax.nn.relu(conv_norm(self.conv2, self.norm2, y, train=train))
        y = conv_norm(self.conv3, self.norm3, y, train=train)
        return jax.nn.relu(y + _identity_or(self.shortcut, x, train=train))


class Projection(nnx.Module):
    """1x1 convolution and normalization of a shortcut whose shape changes."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, conv, norm, rng):
        self.conv = conv(in_channels, out_channels, 1, stride=stride, rng=rng)
        self.norm = norm(out_channels)

    def __call__(self, x: Features, *, train: bool) -> Features:
        return conv_norm(self.conv, self.norm, x, train=train)


DEPTHS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),  # ours, for small data sets and tests
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet269": (Bottleneck, (3, 30, 48, 8)),  # the paper's deepest; 3 * 89 + 2 = 269 layers
}


class DeepStem(nnx.Module):
    """Three 3x3 convolutions instead of one 7x7 (64, 64, 128 channels at width 64), then the max pool."""

    def __init__(self, width: int, *, conv, norm, rng):
        self.out_channels = 2 * width
        self.conv1 = conv(3, width, 3, stride=2, rng=rng)
        self.norm1 = norm(width)
        self.conv2 = conv(width, width, 3, rng=rng)
        self.norm2 = norm(width)
        self.conv3 = conv(width, self.out_channels, 3, rng=rng)
        self.norm3 = norm(self.out_channels)

    def __call__(self, x: Features, *, train: bool) -> Features:
        x = jax.nn.relu(conv_norm(self.conv1, self.norm1, x, train=train))
        x = jax.nn.relu(conv_norm(self.conv2, self.norm2, x, train=train))
        return max_pool(jax.nn.relu(conv_norm(self.conv3, self.norm3, x, train=train)))


class PlainStem(nnx.Module):
    """The original stem: 7x7 at stride 2 (64 channels at width 64), then the max pool."""

    def __init__(self, width: int, *, conv, norm, rng):
        self.out_channels = width
        self.conv1 = conv(3, width, 7, stride=2, rng=rng)
        self.norm1 = norm(width)

    def __call__(self, x: Features, *, train: bool) -> Features:
        return max_pool(jax.nn.relu(conv_norm(self.conv1, self.norm1, x, train=train)))


class ResNet(nnx.Module):
    """A residual network without its classifier, dilated to `output_stride`.

    Blocks are the attributes `layer<stage>_<block>`, so that parameters carry readable string keys.

    Args:
        backbone: a key of `DEPTHS`.
        width: planes of the first stage (64 as published).
        stem: 'deep' or '7x7'.
        output_stride: 8, 16 or 32 image pixels per feature pixel.
        first_block_dilation: dilation of the first block of stages 3 and 4.
        frozen_norm: batch norm uses its running statistics in training.
        remat: recompute each block in the backward pass instead of storing what its convolutions gave.
    """

    def __init__(
        self,
        backbone: str,
        *,
        width: int,
        stem: str,
        output_stride: int,
        first_block_dilation: tuple[int, int],
        frozen_norm: bool,
        remat: bool,
        dtype: DTypeLike,
        platform: Platform = None,
        rng: RandomNumbers,
        initializer: Initializer = HE_FAN_OUT,
    ):
        block, num_blocks = DEPTHS[backbone]
        conv = functools.partial(Conv, initializer=initializer, dtype=dtype, platform=platform)
        norm = functools.partial(BatchNorm, frozen=frozen_norm)
        make_stem = DeepStem if stem == "deep" else PlainStem
        self.stem = make_stem(width, conv=conv, norm=norm, rng=rng)
        self.num_blocks, self.remat = num_blocks, remat
        channels = self.stem.out_channels
        for stage, (stride, dilation) in enumerate(stage_strides(output_stride), start=1):
            planes = width * 2 ** (stage - 1)
            first = min(first_block_dilation[stage - 3], dilation) if stage > 2 else 1
            for i in range(num_blocks[stage - 1]):
                rates = (stride, first) if i == 0 else (1, dilation)
                made = block(
                    channels,
                    planes,
                    stride=rates[0],
                    dilation=rates[1],
                    conv=conv,
                    norm=norm,
                    rng=rng,
                )
                setattr(self, f"layer{stage}_{i}", made)
                channels = planes * block.expansion
        self.stage3_channels, self.stage4_channels = channels // 2, channels

    def __call__(self, x: Features, *, train: bool) -> BackboneFeatures:
        x = run([self.stem], x, train=train, remat=self.remat)
        stages = []
        for stage, num_blocks in enumerate(self.num_blocks, start=1):
            blocks = [getattr(self, f"layer{stage}_{i}") for i in range(num_blocks)]
            x = run(blocks, x, train=train, remat=self.remat)
            stages.append(x)
        return BackboneFeatures(stages[2], stages[3])


def stage_strides(output_stride: int) -> tuple[tuple[int, int], ...]:
    """(stride, dilation) of the four stages; the stem has already divided by 4."""
    strides, dilations, reached, dilation = [], [], 4, 1
    for stride in (1, 2, 2, 2):
        if reached * stride > output_stride:
            dilation, stride = dilation * stride, 1
        reached *= stride
        strides.append(stride)
        dilations.append(dilation)
    return tuple(zip(strides, dilations, strict=True))


def _shortcut(in_channels: int, out_channels: int, *, stride: int, conv, norm, rng):
    if stride == 1 and in_channels == out_channels:
        return None
    return Projection(in_channels, out_channels, stride=stride, conv=conv, norm=norm, rng=rng)


def _identity_or(shortcut: Projection | None, x: Features, *, train: bool) -> Features:
    return x if shortcut is None else shortcut(x, train=train)
