"""PSPNet: a dilated backbone, pyramid pooling, a head, and auxiliary heads on stage 3.

* What a published PSPNet does is a row of `FAMILIES`; every option can be overridden one by one. Nothing
  below that table asks for a family's name.
* `ModelOptions` is complete (nothing None) and plain data: it travels in checkpoints.
* The network returns `Outputs` at head resolution, the same structure in training and evaluation.
  Auxiliary heads run only in training; their parameters always exist, as in the authors' checkpoints.
* Images whose sides break the size rule are refused here; `segmenter` pads, the crop of training fits.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pspnet_jax.arrays import Images, Outputs
from pspnet_jax.models import densenet, resnet, squeezenet
from pspnet_jax.models.convolution import check_platform
from pspnet_jax.models.layers import (
    HE_FAN_OUT,
    TORCH_DEFAULT,
    BatchNorm,
    Conv,
    Initializer,
    Linear,
    RandomNumbers,
)
from pspnet_jax.models.pyramid import (
    POOLS,
    ClassifierHead,
    PresenceHead,
    ProgressiveHead,
    Pyramid,
    PyramidPooling,
)
from pspnet_jax.resample import Pair, Platform, Size

Backbone = resnet.ResNet | densenet.DenseNet | squeezenet.SqueezeNet

_BACKBONE_CLASSES: dict[str, Any] = {
    **dict.fromkeys(resnet.DEPTHS, resnet.ResNet),
    **dict.fromkeys(densenet.DEPTHS, densenet.DenseNet),
    **dict.fromkeys(squeezenet.VERSIONS, squeezenet.SqueezeNet),
}
# What a backbone that is no ResNet has once and for all.
_FIXED = {"output_stride": 8, "first_block_dilation": (1, 1)}
FIXED_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"stem": "7x7", **_FIXED} for name in densenet.DEPTHS},
    **{name: {"stem": "3x3", **_FIXED} for name in squeezenet.VERSIONS},
}

# Head after the pyramid -> its hidden channels, in units of the width.
HEADS = {"fused": 8, "progressive": 16}  # 512 and 1024 at the published width 64
AUX_HEADS = ("pixel", "presence")
AUX_CHANNELS_PER_WIDTH = 4  # 256 hidden channels of either auxiliary head

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclass(frozen=True)
class Normalization:
    """What is subtracted from and divides 8-bit RGB, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def mean_color(self) -> tuple[int, int, int]:
        """The 8-bit color that becomes (about) 0."""
        red, green, blue = self.mean
        return round(red), round(green), round(blue)


IMAGENET_8BIT = Normalization(
    mean=(0.485 * 255, 0.456 * 255, 0.406 * 255), std=(0.229 * 255, 0.224 * 255, 0.225 * 255)
)


@dataclass(frozen=True)
class Family:
    """What one published PSPNet does: its options, normalization, protocol, losses, rule for image sizes."""

    source: str
    normalization: Normalization
    protocol: str
    """Under which its published figures were found (a key of `protocols.PROTOCOLS`)."""
    size_multiple: int
    size_remainder: int
    aux_weight: float
    presence_weight: float
    options: Mapping[str, Any]

    def padded(self, size: Size) -> Size:
        """The smallest side that obeys the size rule and is not below `size`."""
        multiple, remainder = self.size_multiple, self.size_remainder
        # Written as multiple * k + remainder, so that it also shows where `size` is a symbol (`export`).
        return multiple * -((remainder - size) // multiple) + remainder


FAMILIES = {
    "semseg": Family(
        source="hszhao/semseg, the authors' PyTorch code; sides of 8n + 1 make the grids coincide",
        normalization=IMAGENET_8BIT,
        protocol="semseg",
        size_multiple=8,
        size_remainder=1,
        aux_weight=0.4,
        presence_weight=0.0,
        options={
            "stem": "deep",
            "output_stride": 8,
            "first_block_dilation": (2, 4),
            "pyramid_bins": (1, 2, 3, 6),
            "pyramid_pool": "average",
            "pyramid_reduction": True,
            "pyramid_linear": False,
            "pyramid_map_first": True,
            "head": "fused",
            "aux_heads": ("pixel",),
            "align_corners": True,
            "dropout_rate": 0.1,
            "initializer": "semseg",
        },
    ),
    "lextal": Family(
        source="Lextal/pspnet-pytorch, the variant with image-level supervision; sides of 8n because its "
        "head doubles the map three times. align_corners as PyTorch of its time behaved; images are "
        "normalized for the ImageNet weights that its backbones start from",
        normalization=IMAGENET_8BIT,
        protocol="whole",
        size_multiple=8,
        size_remainder=0,
        aux_weight=0.0,
        presence_weight=1.0,
        options={
            "stem": "7x7",
            "output_stride": 8,
            "first_block_dilation": (1, 1),
            "pyramid_bins": (1, 2, 3, 6),
            "pyramid_pool": "average",
            "pyramid_reduction": False,
            "pyramid_linear": True,
            "pyramid_map_first": False,
            "head": "progressive",
            "aux_heads": ("presence",),
            "align_corners": True,
            "dropout_rate": 0.3,
            "initializer": "semseg",
        },
    ),
}

# Name -> how (backbone, heads) are initialized.
INITIALIZERS = {"semseg": (HE_FAN_OUT, TORCH_DEFAULT)}


@dataclass(frozen=True)
class ModelOptions:
    """Every option of a network, resolved: `ModelOptions.resolve(section)` fills None from the family."""

    family: str
    backbone: str
    width: int
    stem: str
    output_stride: int
    first_block_dilation: tuple[int, int]
    pyramid_bins: tuple[int, ...]
    pyramid_pool: str
    pyramid_reduction: bool
    pyramid_linear: bool
    pyramid_map_first: bool
    head: str
    aux_heads: tuple[str, ...]
    align_corners: bool
    dropout_rate: float
    initializer: str
    dtype: str
    remat: bool
    frozen_norm: bool

    @classmethod
    def resolve(cls, section: Mapping[str, Any]) -> "ModelOptions":
        """Complete options from a config section or from a checkpoint, checked against the tables.

        Raises:
            ValueError: naming the option, its value and what is possible.
        """
        family, backbone = section["family"], section["backbone"]
        _known("family", family, FAMILIES)
        _known("backbone", backbone, _BACKBONE_CLASSES)
        fixed = FIXED_OPTIONS.get(backbone, {})
        values: dict[str, Any] = {}
        for field in fields(cls):
            # What was written before an option existed does not have it: the family's value is meant.
            value = section.get(field.name)
            if value is None:
                value = {**FAMILIES[family].options, **fixed}[field.name]
            values[field.name] = tuple(value) if isinstance(value, list | tuple) else value
            if field.name in fixed and values[field.name] != fixed[field.name]:
                raise ValueError(
                    f"model.{field.name}={value!r} is not possible with backbone={backbone}, "
                    f"which has {fixed[field.name]!r}: leave it out, or choose a ResNet"
                )
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        if self.backbone in resnet.DEPTHS:
            _known("stem", self.stem, resnet.STEMS)
            _known("output_stride", self.output_stride, resnet.OUTPUT_STRIDES)
        _known("pyramid_pool", self.pyramid_pool, POOLS)
        _known("head", self.head, HEADS)
        _known("initializer", self.initializer, INITIALIZERS)
        _known("dtype", self.dtype, DTYPES)
        for name in self.aux_heads:
            _known("aux_heads", name, AUX_HEADS)
        if self.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("model.dtype='float64' needs JAX_ENABLE_X64=1, else it is float32")
        bins = self.pyramid_bins
        if len(set(bins)) != len(bins) or any(b < 1 for b in bins):
            raise ValueError(f"model.pyramid_bins={bins} must be different numbers of at least 1")
        if self.head == "progressive" and self.output_stride != 8:
            raise ValueError(
                f"model.head='progressive' doubles the map three times: it needs output_stride=8, not "
                f"{self.output_stride}"
            )


class PSPNet(nnx.Module):
    """The Pyramid Scene Parsing Network (Zhao et al., CVPR 2017, figure 3).

    Args:
        options: a resolved `ModelOptions`.
        num_classes: channels of the logits.
        rng: `np.random.default_rng(seed)`; draws the initial parameters.
        platform: where it will run, 'cpu', 'gpu' or 'tpu': operations take the form that is fastest there,
            equal but for rounding. None: the plain form of each.
    """

    def __init__(
        self,
        options: ModelOptions,
        num_classes: int,
        *,
        rng: RandomNumbers,
        platform: Platform = None,
    ):
        check_platform(platform)
        dtype = DTYPES[options.dtype]
        for_backbone, for_heads = INITIALIZERS[options.initializer]
        self.options, self.num_classes, self.platform = options, num_classes, platform
        make_backbone = functools.partial(_make_backbone, options, platform=platform, rng=rng)
        self.backbone = make_backbone(initializer=for_backbone)
        conv = functools.partial(Conv, initializer=for_heads, dtype=dtype, platform=platform)
        norm = functools.partial(BatchNorm, frozen=options.frozen_norm)
        self.pyramid = PyramidPooling(
            self.backbone.stage4_channels,
            bins=options.pyramid_bins,
            pool=options.pyramid_pool,
            reduction=options.pyramid_reduction,
            linear=options.pyramid_linear,
            map_first=options.pyramid_map_first,
            align_corners=options.align_corners,
            conv=conv,
            norm=norm,
            rng=rng,
        )
        make_head = functools.partial(
            ClassifierHead,
            num_classes=num_classes,
            dropout_rate=options.dropout_rate,
            conv=conv,
            norm=norm,
            rng=rng,
        )
        hidden = HEADS[options.head] * options.width
        aux_hidden = AUX_CHANNELS_PER_WIDTH * options.width
        if options.head == "fused":
            self.head = make_head(self.pyramid.out_channels, hidden)
        else:
            self.head = ProgressiveHead(
                self.pyramid.out_channels,
                hidden,
                num_classes,
                dropout_rate=options.dropout_rate,
                align_corners=options.align_corners,
                conv=conv,
                norm=norm,
                rng=rng,
            )
        channels = self.backbone.stage3_channels
        has_pixel, has_presence = (name in options.aux_heads for name in AUX_HEADS)
        self.aux_head = make_head(channels, aux_hidden) if has_pixel else None
        linear = functools.partial(Linear, initializer=for_heads, dtype=dtype)
        make_presence = functools.partial(PresenceHead, channels, aux_hidden, num_classes, rng=rng)
        self.presence_head = make_presence(linear=linear) if has_presence else None

    def __call__(
        self, images: Images, *, train: bool = False, key: jax.Array | None = None
    ) -> Outputs:
        """Class scores of normalized images, at head resolution.

        Args:
            images: [batch, height, width, 3], sides obeying the family's size rule.
            train: batch statistics and dropout on; the auxiliary head runs.
            key: for dropout; needed in training.

        Returns:
            `Outputs` in float32 (float64 where that is computed in).

        Raises:
            ValueError: for a side that breaks the size rule, with the nearest that obey it.
        """
        check_size((images.shape[1], images.shape[2]), FAMILIES[self.options.family])
        head_key, aux_key = (None, None) if key is None else jax.random.split(key)
        features = self.backbone(jnp.asarray(images), train=train)
        pyramid = self.pyramid(features.stage4, train=train)
        logits = _at_least_float32(self.head(pyramid, train=train, key=head_key))
        if not train:
            return Outputs(logits)
        aux_logits = presence_logits = None
        if self.aux_head is not None:
            aux_logits = self.aux_head(Pyramid(features.stage3), train=train, key=aux_key)
            aux_logits = _at_least_float32(aux_logits)
        if self.presence_head is not None:
            presence_logits = _at_least_float32(self.presence_head(features.stage3))
        return Outputs(logits, aux_logits, presence_logits)


def _make_backbone(
    options: ModelOptions, *, initializer: Initializer, platform: Platform, rng: RandomNumbers
) -> Backbone:
    common = functools.partial(
        _BACKBONE_CLASSES[options.backbone],
        options.backbone,
        width=options.width,
        remat=options.remat,
        dtype=DTYPES[options.dtype],
        initializer=initializer,
        platform=platform,
        rng=rng,
    )
    if options.backbone in squeezenet.VERSIONS:  # has no norms
        return common()
    if options.backbone in densenet.DEPTHS:
        return common(frozen_norm=options.frozen_norm)
    return common(
        frozen_norm=options.frozen_norm,
        stem=options.stem,
        output_stride=options.output_stride,
        first_block_dilation=options.first_block_dilation,
    )


def is_head(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to a head, by its path (heads learn faster than the backbone)."""
    return path[0] != "backbone"


def check_size(size: Pair, family: Family) -> None:
    """Raise where a (height, width) breaks the family's size rule, naming the nearest that obey it."""
    wrong = [side for side in size if (side - family.size_remainder) % family.size_multiple != 0]
    if wrong:
        above = family.padded(wrong[0])
        remainder = f" + {family.size_remainder}" if family.size_remainder else ""
        rule = f"{family.size_multiple}k{remainder}, with a whole k"
        raise ValueError(
            f"a side of {wrong[0]} pixels in (height, width) = {size} must be {rule} "
            f"(nearest: {above - family.size_multiple}, {above})"
        )


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _known(name: str, value: object, table: Collection) -> None:
    if value not in table:
        raise ValueError(f"model.{name}={value!r} is not one of {', '.join(map(str, table))}")
