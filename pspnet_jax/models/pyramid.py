"""The pyramid pooling module (Zhao et al. 2017, section 3.2) and the heads around it.

* `PyramidPooling`: average the map over 1x1, 2x2, 3x3 and 6x6 bins, bring each to 1/N of the channels
  with a 1x1 convolution, stretch it back bilinearly and put all beside the map itself, in the order
  [map, 1, 2, 3, 6]. No bins at all is the dilated-FCN baseline. What a level does with its pooled map,
  and whether the map itself comes first or last, are options.
* `Pyramid`: the map and its levels, of a few bins each. `fuse` is the convolution of all of them
  together, without ever stretching a level to the size of the map or concatenating anything.
* `ClassifierHead`: convolution, norm, ReLU, dropout, classifier. After the pyramid it fuses the levels; on
  the stage before it is the auxiliary head.
* `ProgressiveHead`: fuses the levels with a 1x1 convolution and doubles the size three times on the way
  to its classifier, where `ClassifierHead` leaves one stretch by 8 to the loss.
* `PresenceHead`: which classes are somewhere in the image, from the largest value of every channel.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from pspnet_jax.arrays import Features, Logits, PresenceLogits
from pspnet_jax.models.convolution import convolve
from pspnet_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvWeights,
    Dropout,
    Initializer,
    Linear,
    PReLU,
    RandomNumbers,
    add_bias,
    conv_norm,
    weights_with,
)
from pspnet_jax.models.marks import once
from pspnet_jax.resample import (
    Pair,
    adaptive_average_pools,
    adaptive_max_pool,
    resize,
    shifted_resize_matrices,
)

LevelKernel = Float[jax.Array, "taps taps _in_channels out_channels"]
"""The part of a kernel that applies to one level, each with channels of its own."""


def _adaptive_max_pools(x: Features, bins: Sequence[int]) -> list[Features]:
    return [adaptive_max_pool(x, num_bins) for num_bins in bins]


# Each: (map, numbers of bins per axis) -> as many small maps.
POOLS = {"average": adaptive_average_pools, "max": _adaptive_max_pools}


@dataclass(frozen=True)
class Pyramid:
    """A map beside its levels, each of which means its stretch to the size of the map.

    Args:
        map: [batch, height, width, channels].
        levels: each [batch, bins, bins, channels], with any number of bins and channels; a map alone has
            none.
        map_first: channels are in the order [map, levels]; else [levels, map].
        align_corners: rule of the stretching.
    """

    map: Features
    levels: tuple[Features, ...] = ()
    map_first: bool = True
    align_corners: bool = True


def fuse(
    pyramid: Pyramid, conv: Conv, weights: ConvWeights | None = None, *, train: bool
) -> Features:
    """The convolution of the map and its stretched levels, concatenated; neither is ever built.

    Stretching is U p U^T with a constant matrix U, and convolution is linear, so that

        conv(concat(x, U p_1 U^T, ...)) = conv(x; K_x) + sum over levels b and taps i, j of
                                          S_bi (p_b K_b[i, j]) S_bj^T,

    where K_x, K_b are the kernel's parts along its input axis and S_bi is U_b moved by the offset of tap
    i, with the convolution's zero padding as rows of zeros. The products p_b K_b[i, j] are as small as
    the levels: at the published size half of the multiplications remain.

    Args:
        pyramid: with as many channels in all as the kernel has inputs.
        conv: an odd kernel size, stride 1, no dilation.
        weights: other ones than those of `conv`.

    Returns:
        [batch, height, width, out_channels] in the dtype of `conv`; what the levels add is summed in
        float32 (float64 where that is computed in), rounded, and added.
    """
    weights, dtype = weights or conv.weights(), conv.dtype
    x, kernel = pyramid.map, weights.kernel
    if train:
        # Else XLA would cut the kernel at the start of the step and keep its parts (72 MiB of it) until here.
        x, kernel = jax.lax.optimization_barrier((x, kernel))
    x, kernel = x.astype(dtype), kernel.astype(dtype)
    num_levels = len(pyramid.levels)
    parts = [*pyramid.levels]
    parts.insert(0 if pyramid.map_first else num_levels, x)
    # One split: its gradient is one concatenation, that of slices a sum of kernels filled up with zeros.
    kernels = jnp.split(kernel, np.cumsum([part.shape[3] for part in parts])[:-1], axis=2)
    map_kernel = kernels.pop(0 if pyramid.map_first else num_levels)
    y = convolve(x, conv.ready(map_kernel), platform=conv.platform)
    if pyramid.levels:
        wide = jnp.promote_types(dtype, jnp.float32)
        levels, kernels = (
            [x.astype(dtype).astype(wide) for x in arrays] for arrays in (pyramid.levels, kernels)
        )
        # Kept in float32, as their products take them: rounding loses nothing, but each pass would widen them again.
        kernels = [once(kernel) for kernel in kernels]
        size = (y.shape[1], y.shape[2])
        share = _convolve_stretched(levels, kernels, size, align_corners=pyramid.align_corners)
        # Rounded first: as the second summand of the convolution it goes into the same call of cuDNN.
        y = y + share.astype(dtype)
    return add_bias(y, weights.bias)


def _convolve_stretched(
    levels: Sequence[Features], kernels: Sequence[LevelKernel], size: Pair, *, align_corners: bool
) -> Features:
    """Sum over levels and taps in `fuse`: small products first, then rows, then the columns of all levels."""
    num_taps = kernels[0].shape[0]
    positions = functools.partial(
        shifted_resize_matrices, num_shifts=num_taps, align_corners=align_corners
    )

    def contract(equation: str, matrix: jax.Array, maps: jax.Array) -> jax.Array:
        # Positions, not learned values: never in less than float32, as in `resample`.
        return jnp.einsum(
            equation, matrix.astype(maps.dtype), maps, precision=jax.lax.Precision.HIGHEST
        )

    rows, columns = [], []
    for level, kernel in zip(levels, kernels, strict=True):
        batch, num_rows, num_columns, _ = level.shape
        # One product a tap: the kernel is used as it lies in memory, not transposed.
        taps = jnp.broadcast_to(
            level.reshape(1, 1, *level.shape), (num_taps, num_taps, *level.shape)
        )
        products = jnp.einsum("ijnhwc,ijco->ijnhwo", taps, kernel)
        tall = contract("Hih,ijnhwo->nHjwo", positions(num_rows, size[0]), products)
        rows.append(tall.reshape(batch, size[0], num_taps * num_columns, -1))
        columns.append(positions(num_columns, size[1]).reshape(size[1], num_taps * num_columns))
    return contract(
        "Wk,nHko->nHWo", jnp.concatenate(columns, axis=1), jnp.concatenate(rows, axis=2)
    )


class PyramidLevel(nnx.Module):
    """1x1 convolution of one pooled map, then norm and ReLU unless it is linear.

    Args:
        has_norm: else a bias stands in its place (where it is not linear).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        linear: bool,
        has_norm: bool,
        conv,
        norm,
        rng,
    ):
        self.linear = linear
        use_bias = not (linear or has_norm)
        self.conv = conv(in_channels, out_channels, 1, use_bias=use_bias, rng=rng)
        self.norm = norm(out_channels) if has_norm and not linear else None

    def __call__(self, x: Features, *, train: bool) -> Features:
        norm = self.norm
        y = self.conv(x) if norm is None else conv_norm(self.conv, norm, x, train=train)
        return y if self.linear else jax.nn.relu(y)


class PyramidPooling(nnx.Module):
    """Context of the whole image and of its parts beside every feature.

    Args:
        channels: of the incoming map.
        bins: bins per axis of each level, any number of levels; () adds nothing.
        pool: 'average' or 'max'.
        reduction: bring each level to fewer channels; without, levels are the pooled maps as they are, or
            linear maps of them.
        level_channels: to how many; None: channels / len(bins).
        linear: every level is a 1x1 convolution, without a norm and a ReLU after it.
        bin1_norm: whether the level of one bin has a norm; else a bias. In training that norm sees one value
            an image.
        map_first: [map, levels]; else [levels, map].
        align_corners: rule of the stretching.

    Returns (call):
        A `Pyramid` of out_channels = channels + those of the levels.
    """

    def __init__(
        self,
        channels: int,
        *,
        bins: tuple[int, ...],
        pool: str,
        reduction: bool,
        level_channels: int | None = None,
        linear: bool = False,
        bin1_norm: bool = True,
        map_first: bool = True,
        align_corners: bool,
        conv,
        norm,
        rng: RandomNumbers,
    ):
        divides = bool(bins) and reduction and level_channels is None
        if divides and channels % len(bins):
            raise ValueError(
                f"model.pyramid_bins={bins}: {channels} channels cannot be divided into {len(bins)} "
                "equal levels; choose another number of bins or --config.model.pyramid_reduction=False"
            )
        self.bins, self.pool, self.align_corners = bins, pool, align_corners
        self.map_first, self.has_levels = map_first, reduction or linear
        if divides:
            level_channels = channels // len(bins)
        elif not reduction or level_channels is None:
            level_channels = channels
        self.out_channels = channels + len(bins) * level_channels
        make_level = functools.partial(PyramidLevel, linear=linear, conv=conv, norm=norm, rng=rng)
        if self.has_levels:
            for num_bins in bins:
                has_norm = bin1_norm or num_bins > 1
                made = make_level(channels, level_channels, has_norm=has_norm)
                setattr(self, f"level{num_bins}", made)

    def __call__(self, x: Features, *, train: bool) -> Pyramid:
        levels = POOLS[self.pool](x, self.bins)
        if self.has_levels:
            levels = [
                getattr(self, f"level{num_bins}")(pooled, train=train)
                for num_bins, pooled in zip(self.bins, levels, strict=True)
            ]
        return Pyramid(x, tuple(levels), self.map_first, self.align_corners)


class ClassifierHead(nnx.Module):
    """Convolution, norm, ReLU, dropout and a classifier with bias.

    Args:
        kernel_sizes: of the convolution and the classifier: 3 and 1 as published in the paper.
        dropout_kind: a key of `layers.DROPOUTS`.
        initializer: of the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        kernel_sizes: Pair = (3, 1),
        dropout_rate: float,
        dropout_kind: str,
        initializer: Initializer,
        conv: functools.partial[Conv],
        norm: functools.partial[BatchNorm],
        rng: RandomNumbers,
    ):
        fusing, classifying = kernel_sizes
        self.conv = conv(in_channels, hidden_channels, fusing, rng=rng)
        self.norm = norm(hidden_channels)
        self.dropout = Dropout(dropout_rate, kind=dropout_kind)
        self.classifier = conv(
            hidden_channels,
            num_classes,
            classifying,
            use_bias=True,
            initializer=initializer,
            rng=rng,
        )

    def __call__(self, pyramid: Pyramid, *, train: bool, key: jax.Array | None) -> Logits:
        weights = weights_with(self.norm, self.conv, train=train)
        x = fuse(pyramid, self.conv, weights, train=train)
        x = jax.nn.relu(self.norm(x, train=train) if weights is None else x)
        return self.classifier(self.dropout(x, train=train, key=key))


class UpsampleBlock(nnx.Module):
    """Twice the size by bilinear resizing, then 3x3 convolution with bias, norm and PReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, align_corners, conv, norm, rng):
        self.conv = conv(in_channels, out_channels, 3, use_bias=True, rng=rng)
        self.norm = norm(out_channels)
        self.activation = PReLU()
        self.align_corners = align_corners

    def __call__(self, x: Features, *, train: bool) -> Features:
        size = (2 * x.shape[1], 2 * x.shape[2])
        x = resize(x, size, align_corners=self.align_corners, platform=self.conv.platform)
        return self.activation(conv_norm(self.conv, self.norm, x, train=train))


class ProgressiveHead(nnx.Module):
    """1x1 convolution with bias and ReLU, three blocks that double the size, a 1x1 classifier with bias.

    The blocks bring `hidden_channels` to a quarter, a sixteenth and again a sixteenth of them: 1024, 256,
    64 and 64 as published. Logits are eight times as large as the map: of the image's own size.

    Args:
        hidden_channels: of the fused map.
        dropout_rate: after the fused map (0.3 as published); after each block it is half of that.
        dropout_kind: a key of `layers.DROPOUTS`.
        initializer: of the classifier.
        align_corners: rule of the doubling.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        dropout_rate: float,
        dropout_kind: str,
        initializer: Initializer,
        align_corners: bool,
        conv: functools.partial[Conv],
        norm: functools.partial[BatchNorm],
        rng: RandomNumbers,
    ):
        block = functools.partial(
            UpsampleBlock, align_corners=align_corners, conv=conv, norm=norm, rng=rng
        )
        if hidden_channels % 16:
            raise ValueError(
                f"{hidden_channels} hidden channels (model.head_width times model.width) must be a multiple of "
                "16 with model.head='progressive'"
            )
        wide, narrow = hidden_channels // 4, hidden_channels // 16
        self.fuse = conv(in_channels, hidden_channels, 1, use_bias=True, rng=rng)
        self.up1 = block(hidden_channels, wide)
        self.up2 = block(wide, narrow)
        self.up3 = block(narrow, narrow)
        self.classifier = conv(
            narrow, num_classes, 1, use_bias=True, initializer=initializer, rng=rng
        )
        self.fuse_dropout = Dropout(dropout_rate, kind=dropout_kind)
        self.block_dropout = Dropout(dropout_rate / 2, kind=dropout_kind)

    def __call__(self, pyramid: Pyramid, *, train: bool, key: jax.Array | None) -> Logits:
        fuse_key, *block_keys = (None,) * 4 if key is None else jax.random.split(key, 4)
        x = jax.nn.relu(fuse(pyramid, self.fuse, train=train))
        x = self.fuse_dropout(x, train=train, key=fuse_key)
        for block, block_key in zip((self.up1, self.up2, self.up3), block_keys, strict=True):
            x = self.block_dropout(block(x, train=train), train=train, key=block_key)
        return self.classifier(x)


class PresenceHead(nnx.Module):
    """Largest value of every channel over the image, linear, ReLU, linear: one logit per class."""

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_classes: int,
        *,
        linear: functools.partial[Linear],
        rng: RandomNumbers,
    ):
        self.hidden = linear(in_channels, hidden_channels, rng=rng)
        self.classifier = linear(hidden_channels, num_classes, rng=rng)

    def __call__(self, x: Features) -> PresenceLogits:
        largest = adaptive_max_pool(x, 1).reshape(x.shape[0], x.shape[3])
        return self.classifier(jax.nn.relu(self.hidden(largest)))
