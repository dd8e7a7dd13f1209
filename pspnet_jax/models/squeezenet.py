"""SqueezeNet 1.1 (Iandola et al. 2016), dilated to 8 image pixels per feature pixel.

* A fire module squeezes the channels with a 1x1 convolution and expands them with a 1x1 and a 3x3
  convolution side by side. There are no norms: every convolution has a bias and a ReLU.
* `width` is what the first fire modules expand to on each side: 64 as published; all else scales with it.
* Departures from the network as published for classification: the stem and the max pools are padded by
  one pixel (images of 8n give maps of exactly n), the third pool is gone, and the 3x3 convolutions of
  stages 3 and 4 are dilated by 2 and 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from pspnet_jax.arrays import BackboneFeatures, Features
from pspnet_jax.models.layers import (
    HE_FAN_OUT,
    Conv,
    Initializer,
    RandomNumbers,
    max_pool,
    run,
)
from pspnet_jax.resample import Platform


class Stage(NamedTuple):
    """A run of fire modules."""

    squeezes: tuple[int, ...]
    """Channels that each module squeezes to, in quarters of the width."""
    pool: bool
    """Whether a max pool comes first."""
    dilation: int


VERSIONS = {
    "squeezenet": (  # 1.1; stages 2, 3 and 4, the stem is stage 1
        Stage(squeezes=(1, 1), pool=True, dilation=1),
        Stage(squeezes=(2, 2), pool=True, dilation=2),
        Stage(squeezes=(3, 3, 4, 4), pool=False, dilation=4),
    ),
}


class Fire(nnx.Module):
    """1x1 convolution to fewer channels, then a 1x1 and a 3x3 convolution to four times as many each."""

    def __init__(self, in_channels: int, squeeze: int, *, dilation: int, conv, rng):
        self.squeeze = conv(in_channels, squeeze, 1, rng=rng)
        self.expand1 = conv(squeeze, 4 * squeeze, 1, rng=rng)
        self.expand3 = conv(squeeze, 4 * squeeze, 3, dilation=dilation, rng=rng)
        self.out_channels = 8 * squeeze

    def __call__(self, x: Features, *, train: bool) -> Features:
        x = jax.nn.relu(self.squeeze(x))
        return jax.nn.relu(jnp.concatenate([self.expand1(x), self.expand3(x)], axis=-1))


class SqueezeNet(nnx.Module):
    """SqueezeNet without its classifier, at output stride 8.

    Fire modules are the attributes `layer<stage>_<module>`, the stem is `conv1`.

    Args:
        backbone: a key of `VERSIONS`.
        width: channels that the first fire modules expand to on each side, a multiple of 4 (64 as
            published).
        remat: recompute each fire module in the backward pass instead of storing what its convolutions gave.

    Raises:
        ValueError: for a width that is not a multiple of 4.
    """

    def __init__(
        self,
        backbone: str,
        *,
        width: int,
        remat: bool,
        dtype: DTypeLike,
        platform: Platform = None,
        rng: RandomNumbers,
        initializer: Initializer = HE_FAN_OUT,
    ):
        if width < 4 or width % 4:
            raise ValueError(
                f"width={width} of {backbone} must be a multiple of 4 (nearest: "
                f"{max(4, width // 4 * 4)}, {width // 4 * 4 + 4}): it squeezes to quarters of it"
            )
        conv = functools.partial(
            Conv, use_bias=True, initializer=initializer, dtype=dtype, platform=platform
        )
        self.stages, self.remat = VERSIONS[backbone], remat
        self.conv1 = conv(3, width, 3, stride=2, rng=rng)
        channels = [width]  # of each stage
        for k, stage in enumerate(self.stages, start=2):
            channels.append(channels[-1])
            for i, quarters in enumerate(stage.squeezes):
                squeeze = quarters * width // 4
                fire = Fire(channels[-1], squeeze, dilation=stage.dilation, conv=conv, rng=rng)
                setattr(self, f"layer{k}_{i}", fire)
                channels[-1] = fire.out_channels
        self.auxiliary_channels, self.last_channels = channels[-2:]

    def __call__(self, x: Features, *, train: bool) -> BackboneFeatures:
        x = jax.nn.relu(self.conv1(x))
        maps = []
        for k, stage in enumerate(self.stages, start=2):
            x = max_pool(x) if stage.pool else x
            fires = [getattr(self, f"layer{k}_{i}") for i in range(len(stage.squeezes))]
            x = run(fires, x, train=train, remat=self.remat)
            maps.append(x)
        return BackboneFeatures(*maps[-2:])
