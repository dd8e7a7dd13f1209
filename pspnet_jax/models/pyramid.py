"""The pyramid pooling module (Zhao et al. 2017, section 3.2) and the head around it.

* `PyramidPooling`: average the map over 1x1, 2x2, 3x3 and 6x6 bins, bring each to 1/N of the channels
  with a 1x1 convolution, stretch it back bilinearly and put all beside the map itself, in the order
  [map, 1, 2, 3, 6]. No bins at all is the dilated-FCN baseline.
* `ClassifierHead`: 3x3 convolution, norm, ReLU, channel dropout, 1x1 classifier. After the pyramid it
  fuses the levels; on stage 3 it is the auxiliary head.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from pspnet_jax.arrays import Features, Logits
from pspnet_jax.models.layers import BatchNorm, ChannelDropout, Conv, RandomNumbers
from pspnet_jax.resample import adaptive_average_pool, adaptive_max_pool, resize

POOLS = {"average": adaptive_average_pool, "max": adaptive_max_pool}


class PyramidLevel(nnx.Module):
    """1x1 convolution, norm and ReLU of one pooled map."""

    def __init__(self, in_channels: int, out_channels: int, *, conv, norm, rng):
        self.conv = conv(in_channels, out_channels, 1, rng=rng)
        self.norm = norm(out_channels)

    def __call__(self, x: Features, *, train: bool) -> Features:
        return jax.nn.relu(self.norm(self.conv(x), train=train))


class PyramidPooling(nnx.Module):
    """Context of the whole image and of its parts beside every feature.

    Args:
        channels: of the incoming map.
        bins: bins per axis of each level, any number of levels; () adds nothing.
        pool: 'average' or 'max'.
        reduction: bring each level to channels / len(bins); without, levels are the pooled maps as they are.
        align_corners: rule of the stretching.

    Returns (call):
        [batch, height, width, out_channels] with out_channels = channels + levels.
    """

    def __init__(
        self,
        channels: int,
        *,
        bins: tuple[int, ...],
        pool: str,
        reduction: bool,
        align_corners: bool,
        conv,
        norm,
        rng: RandomNumbers,
    ):
        self.bins, self.pool, self.align_corners = bins, pool, align_corners
        self.reduction = reduction
        level_channels = channels // len(bins) if bins and reduction else channels
        self.out_channels = channels + len(bins) * level_channels
        if reduction:
            for num_bins in bins:
                level = PyramidLevel(channels, level_channels, conv=conv, norm=norm, rng=rng)
                setattr(self, f"level{num_bins}", level)

    def __call__(self, x: Features, *, train: bool) -> Features:
        size = (x.shape[1], x.shape[2])
        levels = [x]
        for num_bins in self.bins:
            pooled = POOLS[self.pool](x, num_bins)
            if self.reduction:
                pooled = getattr(self, f"level{num_bins}")(pooled, train=train)
            levels.append(resize(pooled, size, align_corners=self.align_corners))
        return jnp.concatenate(levels, axis=-1)


class ClassifierHead(nnx.Module):
    """3x3 convolution, norm, ReLU, channel dropout and a 1x1 classifier with bias."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        dropout_rate: float,
        conv: functools.partial[Conv],
        norm: functools.partial[BatchNorm],
        rng: RandomNumbers,
    ):
        self.conv = conv(in_channels, hidden_channels, 3, rng=rng)
        self.norm = norm(hidden_channels)
        self.dropout = ChannelDropout(dropout_rate)
        self.classifier = conv(hidden_channels, num_classes, 1, use_bias=True, rng=rng)

    def __call__(self, x: Features, *, train: bool, key: jax.Array | None) -> Logits:
        x = jax.nn.relu(self.norm(self.conv(x), train=train))
        return self.classifier(self.dropout(x, train=train, key=key))
