"""Densely connected networks (Huang et al. 2017), at 8 image pixels per feature pixel.

* Every layer of a block sees the maps of all layers before it: norm, ReLU and convolution twice give
  `growth` new channels, which are put behind the others.
* `width` is the channels of the stem: 64 as published, where each layer grows by 32; both scale together.
* Transitions halve the channels. Only the first one halves the size as well; the second and third leave
  it alone, and nothing is dilated.
* There is no norm or ReLU after the last block: the pyramid sees the maps as they were put together.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pspnet_jax.arrays import BackboneFeatures, Features
from pspnet_jax.models.layers import (
    HE_FAN_OUT,
    BatchNorm,
    Conv,
    Initializer,
    RandomNumbers,
    average_pool,
    conv_norm,
    run,
)
from pspnet_jax.models.resnet import PlainStem
from pspnet_jax.resample import Platform

DEPTHS = {"densenet121": (6, 12, 24, 16)}
BOTTLENECK = 4  # channels between the two convolutions of a layer, in units of its growth


class DenseLayer(nnx.Module):
    """Norm, ReLU, 1x1 convolution, norm, ReLU, 3x3 convolution; what they give goes behind the channels of
    their input."""

    def __init__(self, in_channels: int, growth: int, *, conv, norm, rng):
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, BOTTLENECK * growth, 1, rng=rng)
        self.norm2 = norm(BOTTLENECK * growth)
        self.conv2 = conv(BOTTLENECK * growth, growth, 3, rng=rng)

    def __call__(self, x: Features, *, train: bool) -> Features:
        new = jax.nn.relu(self.norm1(x, train=train))
        new = self.conv2(jax.nn.relu(conv_norm(self.conv1, self.norm2, new, train=train)))
        return jnp.concatenate([x, new], axis=-1)


class Transition(nnx.Module):
    """Norm, ReLU and 1x1 convolution to half the channels; 2x2 means where the size is halved too."""

    def __init__(self, in_channels: int, *, halves_size: bool, conv, norm, rng):
        self.norm = norm(in_channels)
        self.conv = conv(in_channels, in_channels // 2, 1, rng=rng)
        self.halves_size = halves_size

    def __call__(self, x: Features, *, train: bool) -> Features:
        x = self.conv(jax.nn.relu(self.norm(x, train=train)))
        return average_pool(x) if self.halves_size else x


class DenseNet(nnx.Module):
    """A densely connected network without its last norm and classifier, at output stride 8.

    Layers are the attributes `layer<block>_<layer>`, `transition<block>` follows the block of its
    number. The auxiliary map is what the third transition gives.

    Args:
        backbone: a key of `DEPTHS`.
        width: channels of the stem, even (64 as published).
        frozen_norm: batch norm uses its running statistics in training.
        norm_momentum: share of the batch in its running statistics.
        remat: recompute each layer in the backward pass instead of storing what its convolutions gave.

    Raises:
        ValueError: for an odd width.
    """

    def __init__(
        self,
        backbone: str,
        *,
        width: int,
        frozen_norm: bool,
        norm_momentum: float = 0.1,
        remat: bool,
        dtype: DTypeLike,
        platform: Platform = None,
        rng: RandomNumbers,
        initializer: Initializer = HE_FAN_OUT,
    ):
        if width < 2 or width % 2:
            raise ValueError(
                f"width={width} of {backbone} must be even (nearest: {max(2, width - 1)}, "
                f"{width + 1}): each layer grows by half of it"
            )
        conv = functools.partial(Conv, initializer=initializer, dtype=dtype, platform=platform)
        norm = functools.partial(
            BatchNorm, frozen=frozen_norm, momentum=norm_momentum, platform=platform
        )
        self.num_layers, self.remat = DEPTHS[backbone], remat
        growth = width // 2
        self.stem = PlainStem(width, conv=conv, norm=norm, rng=rng)
        channels = self.stem.out_channels
        for k, num_layers in enumerate(self.num_layers, start=1):
            for i in range(num_layers):
                layer = DenseLayer(channels, growth, conv=conv, norm=norm, rng=rng)
                setattr(self, f"layer{k}_{i}", layer)
                channels += growth
            if k < len(self.num_layers):
                halves = k == 1  # the stem has divided by 4
                made = Transition(channels, halves_size=halves, conv=conv, norm=norm, rng=rng)
                setattr(self, f"transition{k}", made)
                channels //= 2
                self.auxiliary_channels = channels
        self.last_channels = channels

    def __call__(self, x: Features, *, train: bool) -> BackboneFeatures:
        x = run([self.stem], x, train=train, remat=self.remat)
        maps = []
        for k, num_layers in enumerate(self.num_layers, start=1):
            layers = [getattr(self, f"layer{k}_{i}") for i in range(num_layers)]
            x = run(layers, x, train=train, remat=self.remat)
            if k < len(self.num_layers):
                x = run([getattr(self, f"transition{k}")], x, train=train, remat=self.remat)
            maps.append(x)
        return BackboneFeatures(maps[2], maps[3])
