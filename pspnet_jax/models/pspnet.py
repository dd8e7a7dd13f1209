"""PSPNet: a dilated backbone, pyramid pooling, a fusing head, and an auxiliary head on stage 3.

* What a published PSPNet does is a row of `FAMILIES`; every option can be overridden one by one.
* `ModelOptions` is complete (nothing None) and plain data: it travels in checkpoints.
* The network returns `Outputs` at head resolution, the same structure in training and evaluation. The
  auxiliary head runs only in training; its parameters always exist, as in the authors' checkpoints.
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
from pspnet_jax.models.layers import HE_FAN_OUT, TORCH_DEFAULT, BatchNorm, Conv, RandomNumbers
from pspnet_jax.models.pyramid import POOLS, ClassifierHead, PyramidPooling
from pspnet_jax.models.resnet import DEPTHS, OUTPUT_STRIDES, STEMS, ResNet

HEAD_CHANNELS_PER_WIDTH = 8  # 512 channels of the fusing head at the published width 64
AUX_CHANNELS_PER_WIDTH = 4  # 256 channels of the auxiliary head

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
    """What one published PSPNet does: its options, normalization, protocol and rule for image sizes."""

    source: str
    normalization: Normalization
    protocol: str
    """Under which its published figures were found (a key of `windows.PROTOCOLS`)."""
    size_multiple: int
    size_remainder: int
    options: Mapping[str, Any]

    def padded(self, size: int) -> int:
        """The smallest side that obeys the size rule and is not below `size`."""
        return size + (self.size_remainder - size) % self.size_multiple


FAMILIES = {
    "semseg": Family(
        source="hszhao/semseg, the authors' PyTorch code; sides of 8n + 1 make the grids coincide",
        normalization=IMAGENET_8BIT,
        protocol="semseg",
        size_multiple=8,
        size_remainder=1,
        options={
            "stem": "deep",
            "output_stride": 8,
            "first_block_dilation": (2, 4),
            "pyramid_bins": (1, 2, 3, 6),
            "pyramid_pool": "average",
            "pyramid_reduction": True,
            "align_corners": True,
            "dropout_rate": 0.1,
            "initializer": "semseg",
        },
    ),
}

# family -> how (backbone, heads) are initialized
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
        family = section["family"]
        _known("family", family, FAMILIES)
        values: dict[str, Any] = {}
        for field in fields(cls):
            value = section[field.name]
            value = FAMILIES[family].options[field.name] if value is None else value
            values[field.name] = tuple(value) if isinstance(value, list | tuple) else value
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        _known("backbone", self.backbone, DEPTHS)
        _known("stem", self.stem, STEMS)
        _known("output_stride", self.output_stride, OUTPUT_STRIDES)
        _known("pyramid_pool", self.pyramid_pool, POOLS)
        _known("initializer", self.initializer, INITIALIZERS)
        _known("dtype", self.dtype, DTYPES)
        if self.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("model.dtype='float64' needs JAX_ENABLE_X64=1, else it is float32")
        bins = self.pyramid_bins
        if len(set(bins)) != len(bins) or any(b < 1 for b in bins):
            raise ValueError(f"model.pyramid_bins={bins} must be different numbers of at least 1")
        channels = self.width * 8 * DEPTHS[self.backbone][0].expansion
        if bins and self.pyramid_reduction and channels % len(bins):
            raise ValueError(
                f"model.pyramid_bins={bins}: {channels} channels cannot be divided into {len(bins)} "
                "equal levels; choose another number of bins or --config.model.pyramid_reduction=False"
            )


class PSPNet(nnx.Module):
    """The Pyramid Scene Parsing Network (Zhao et al., CVPR 2017, figure 3).

    Args:
        options: a resolved `ModelOptions`.
        num_classes: channels of the logits.
        rng: `np.random.default_rng(seed)`; draws the initial parameters.
    """

    def __init__(self, options: ModelOptions, num_classes: int, *, rng: RandomNumbers):
        dtype = DTYPES[options.dtype]
        for_backbone, for_heads = INITIALIZERS[options.initializer]
        self.options, self.num_classes = options, num_classes
        self.backbone = ResNet(
            options.backbone,
            width=options.width,
            stem=options.stem,
            output_stride=options.output_stride,
            first_block_dilation=options.first_block_dilation,
            frozen_norm=options.frozen_norm,
            remat=options.remat,
            initializer=for_backbone,
            dtype=dtype,
            rng=rng,
        )
        conv = functools.partial(Conv, initializer=for_heads, dtype=dtype)
        norm = functools.partial(BatchNorm, frozen=options.frozen_norm)
        self.pyramid = PyramidPooling(
            self.backbone.stage4_channels,
            bins=options.pyramid_bins,
            pool=options.pyramid_pool,
            reduction=options.pyramid_reduction,
            align_corners=options.align_corners,
            conv=conv,
            norm=norm,
            rng=rng,
        )
        head = functools.partial(
            ClassifierHead,
            num_classes=num_classes,
            dropout_rate=options.dropout_rate,
            conv=conv,
            norm=norm,
            rng=rng,
        )
        self.head = head(self.pyramid.out_channels, HEAD_CHANNELS_PER_WIDTH * options.width)
        self.aux_head = head(self.backbone.stage3_channels, AUX_CHANNELS_PER_WIDTH * options.width)

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
        aux_logits = self.aux_head(features.stage3, train=train, key=aux_key)
        return Outputs(logits, _at_least_float32(aux_logits))


def is_head(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to a head, by its path (heads learn faster than the backbone)."""
    return path[0] != "backbone"


def check_size(size: tuple[int, int], family: Family) -> None:
    """Raise where a (height, width) breaks the family's size rule, naming the nearest that obey it."""
    wrong = [side for side in size if family.padded(side) != side]
    if wrong:
        above = family.padded(wrong[0])
        rule = f"{family.size_multiple}k + {family.size_remainder}"
        raise ValueError(
            f"a side of {wrong[0]} pixels in (height, width) = {size} must be {rule} "
            f"(nearest: {above - family.size_multiple}, {above})"
        )


def _at_least_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _known(name: str, value: object, table: Collection) -> None:
    if value not in table:
        raise ValueError(f"model.{name}={value!r} is not one of {', '.join(map(str, table))}")
