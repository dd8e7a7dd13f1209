"""Dilated residual networks (He et al. 2016; Yu and Koltun 2016): the backbones of the paper.

* One table from depth to blocks. `width` is the planes of the first stage: 64 as published, and every
  other number of channels scales with it.
* `output_stride` (image pixels per feature pixel) turns strides into dilations while the stages are
  built: at 8, stages 3 and 4 keep their size and dilate by 2 and 4.
* What the *first* block of a dilated stage does differs between published networks, so it is an option:
  (2, 4) is the authors' (`first_block_dilation`, never more than the stage's own dilation).
* So does where a block has its stride, and how its second convolution is dilated: `BlockStyle`.
* `num_stages` below four cuts the network off: a small map without dilation (segmentation_models_pytorch).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx
from jax.typing import DTypeLike

from pspnet_jax.arrays import BackboneFeatures, Features
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
from pspnet_jax.resample import Pair, Platform

# Channels of the three 3x3 convolutions of a deep stem, in units of half the width; () is one 7x7.
STEMS = {"deep": (2, 2, 4), "v1c": (1, 1, 2), "7x7": ()}
OUTPUT_STRIDES = (8, 16, 32)


class BlockStyle(NamedTuple):
    """Where published residual blocks differ."""

    bottleneck_stride: str
    """Which convolution of a bottleneck has its stride: a key of `BOTTLENECK_STRIDES`."""
    basic_block_dilation: str
    """What of a basic block is dilated: a key of `BASIC_BLOCK_DILATIONS`."""


# Each: stride of the block -> those of its 1x1 and its 3x3 convolution.
BOTTLENECK_STRIDES: dict[str, Callable[[int], Pair]] = {
    "3x3": lambda stride: (1, stride),
    "1x1": lambda stride: (stride, 1),  # He et al. 2016 as first published
}
# Each: dilation of the block and of the other blocks of its stage -> those of its two convolutions.
BASIC_BLOCK_DILATIONS: dict[str, Callable[[int, int], Pair]] = {
    "both": lambda block, stage: (block, block),
    "first": lambda block, stage: (block, 1),
    "stage": lambda block, stage: (block, stage),
}


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        dilations: of this block, and of the blocks of its stage but the first.
    """

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilations: Pair,
        style: BlockStyle,
        conv,
        norm,
        rng,
    ):
        first, second = BASIC_BLOCK_DILATIONS[style.basic_block_dilation](*dilations)
        self.conv1 = conv(in_channels, planes, 3, stride=stride, dilation=first, rng=rng)
        self.norm1 = norm(planes)
        self.conv2 = conv(planes, planes, 3, dilation=second, rng=rng)
        self.norm2 = norm(planes)
        self.shortcut = _shortcut(in_channels, planes, stride=stride, conv=conv, norm=norm, rng=rng)

    def __call__(self, x: Features, *, train: bool) -> Features:
        y = jax.nn.relu(conv_norm(self.conv1, self.norm1, x, train=train))
        y = conv_norm(self.conv2, self.norm2, y, train=train)
        return jax.nn.relu(y + _identity_or(self.shortcut, x, train=train))


class Bottleneck(nnx.Module):
    """1x1 reduction, 3x3 convolution, 1x1 expansion by four, and a shortcut.

    Args:
        dilations: as of a `BasicBlock`; this block's is that of its 3x3 convolution.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        *,
        stride: int,
        dilations: Pair,
        style: BlockStyle,
        conv,
        norm,
        rng,
    ):
        out_channels = planes * self.expansion
        first, second = BOTTLENECK_STRIDES[style.bottleneck_stride](stride)
        self.conv1 = conv(in_channels, planes, 1, stride=first, rng=rng)
        self.norm1 = norm(planes)
        self.conv2 = conv(planes, planes, 3, stride=second, dilation=dilations[0], rng=rng)
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
    """Three 3x3 convolutions instead of one 7x7, then the max pool.

    Args:
        channels: of the three: 64, 64, 128 in the authors' networks, 32, 32, 64 in ResNet-C.
    """

    def __init__(self, channels: tuple[int, int, int], *, conv, norm, rng):
        first, second, self.out_channels = channels
        self.conv1 = conv(3, first, 3, stride=2, rng=rng)
        self.norm1 = norm(first)
        self.conv2 = conv(first, second, 3, rng=rng)
        self.norm2 = norm(second)
        self.conv3 = conv(second, self.out_channels, 3, rng=rng)
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
        stem: a key of `STEMS`.
        num_stages: 2, 3 or 4; fewer leave the last ones out.
        output_stride: 8, 16 or 32 image pixels per feature pixel.
        fixed_dilation: the stages dilate as at stride 8, whatever the stride.
        first_block_dilation: dilation of the first block of stages 3 and 4 at stride 8.
        bottleneck_stride: which convolution of a bottleneck has its stride, a key of `BOTTLENECK_STRIDES`.
        basic_block_dilation: what of a basic block is dilated, a key of `BASIC_BLOCK_DILATIONS`.
        frozen_norm: batch norm uses its running statistics in training.
        norm_momentum: share of the batch in its running statistics.
        remat: recompute each block in the backward pass instead of storing what its convolutions gave.
    """

    def __init__(
        self,
        backbone: str,
        *,
        width: int,
        stem: str,
        num_stages: int = 4,
        output_stride: int,
        fixed_dilation: bool = False,
        first_block_dilation: tuple[int, int],
        bottleneck_stride: str = "3x3",
        basic_block_dilation: str = "both",
        frozen_norm: bool,
        norm_momentum: float = 0.1,
        remat: bool,
        dtype: DTypeLike,
        platform: Platform = None,
        rng: RandomNumbers,
        initializer: Initializer = HE_FAN_OUT,
    ):
        block, num_blocks = DEPTHS[backbone]
        conv = functools.partial(Conv, initializer=initializer, dtype=dtype, platform=platform)
        norm = functools.partial(
            BatchNorm, frozen=frozen_norm, momentum=norm_momentum, platform=platform
        )
        self.stem = _make_stem(stem, width, conv=conv, norm=norm, rng=rng)
        self.num_blocks, self.remat = num_blocks[:num_stages], remat
        # A GPU reads and writes maps about as long as it multiplies: what is stored is not made again.
        self.stores_all = platform == "gpu"
        channels = self.stem.out_channels
        strides, dilations = zip(*stage_strides(output_stride), strict=True)
        if fixed_dilation:
            _, dilations = zip(*stage_strides(8), strict=True)
        stages = zip(strides[:num_stages], dilations[:num_stages], strict=True)
        for stage, (stride, dilation) in enumerate(stages, start=1):
            planes = width * 2 ** (stage - 1)
            # Of the pair, which is for stride 8, the share that the stage still dilates by.
            first = (
                first_block_dilation[stage - 3] * dilation // 2 ** (stage - 2) if stage > 2 else 1
            )
            first = min(max(first, 1), dilation)
            for i in range(num_blocks[stage - 1]):
                made = block(
                    channels,
                    planes,
                    stride=stride if i == 0 else 1,
                    dilations=(first if i == 0 else dilation, dilation),
                    style=BlockStyle(bottleneck_stride, basic_block_dilation),
                    conv=conv,
                    norm=norm,
                    rng=rng,
                )
                setattr(self, f"layer{stage}_{i}", made)
                channels = planes * block.expansion
        self.auxiliary_channels, self.last_channels = channels // 2, channels

    def __call__(self, x: Features, *, train: bool) -> BackboneFeatures:
        through = functools.partial(run, train=train, remat=self.remat, stores_all=self.stores_all)
        x = through([self.stem], x)
        stages = []
        for stage, num_blocks in enumerate(self.num_blocks, start=1):
            blocks = [getattr(self, f"layer{stage}_{i}") for i in range(num_blocks)]
            x = through(blocks, x)
            stages.append(x)
        return BackboneFeatures(stages[-2], stages[-1])


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


def _make_stem(stem: str, width: int, *, conv, norm, rng) -> DeepStem | PlainStem:
    if not STEMS[stem]:
        return PlainStem(width, conv=conv, norm=norm, rng=rng)
    first, second, third = (width * halves / 2 for halves in STEMS[stem])
    if not first.is_integer():
        raise ValueError(f"model.width={width} must be even with model.stem={stem!r}")
    channels = int(first), int(second), int(third)
    return DeepStem(channels, conv=conv, norm=norm, rng=rng)


def _shortcut(in_channels: int, out_channels: int, *, stride: int, conv, norm, rng):
    if stride == 1 and in_channels == out_channels:
        return None
    return Projection(in_channels, out_channels, stride=stride, conv=conv, norm=norm, rng=rng)


def _identity_or(shortcut: Projection | None, x: Features, *, train: bool) -> Features:
    return x if shortcut is None else shortcut(x, train=train)
