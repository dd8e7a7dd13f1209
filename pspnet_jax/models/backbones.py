"""The table of backbones: which class each name is, the options it takes, and those that it has once and for all.

A backbone is a module (images [batch, h, w, 3], train=...) -> `BackboneFeatures` with the attributes
`auxiliary_channels` and `last_channels`. At output stride 8 sides of 8n pixels become n, sides of 8n + 1 n + 1 (of DenseNet n).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pspnet_jax.models.densenet import DEPTHS as DENSENETS
from pspnet_jax.models.densenet import DenseNet
from pspnet_jax.models.resnet import DEPTHS as RESNETS
from pspnet_jax.models.resnet import ResNet
from pspnet_jax.models.squeezenet import VERSIONS as SQUEEZENETS
from pspnet_jax.models.squeezenet import SqueezeNet

Backbone = ResNet | DenseNet | SqueezeNet


@dataclass(frozen=True)
class Kind:
    """One class of backbones."""

    make: Callable[..., Backbone]
    """Takes the name, width, remat, dtype, platform, rng and initializer."""
    takes: tuple[str, ...] = ()
    """Options of `ModelOptions` that it takes, too."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Option -> the one value that its networks have."""


_NORM = ("frozen_norm", "norm_momentum")
# Of the options of a ResNet's stages every other kind has one value, so that others are refused. Those of its
# blocks are set by families, whatever the backbone.
_UNLIKE_RESNETS = {
    "output_stride": 8,
    "num_stages": 4,
    "fixed_dilation": False,
    "first_block_dilation": (1, 1),
}
_RESNET = Kind(
    ResNet,
    takes=(
        *_NORM,
        *("stem", "num_stages", "output_stride", "fixed_dilation", "first_block_dilation"),
        *("bottleneck_stride", "basic_block_dilation"),
    ),
)
BACKBONES: dict[str, Kind] = {
    **dict.fromkeys(RESNETS, _RESNET),
    **dict.fromkeys(DENSENETS, Kind(DenseNet, _NORM, {"stem": "7x7", **_UNLIKE_RESNETS})),
    **dict.fromkeys(SQUEEZENETS, Kind(SqueezeNet, (), {"stem": "3x3", **_UNLIKE_RESNETS})),
}
