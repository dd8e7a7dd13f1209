"""The families table: what each published PSPNet does, as rows of options.

* "PSPNet" means several slightly different networks, and the same weights load into some of them with wrong
  results. No model asks for a family's name: heads, pyramid and backbone are chosen by options.
* The row of `semseg` is complete, the others say where they differ from it. What a network has on some
  backbones alone stands beside its row (`by_backbone`).
* `ModelOptions` is complete (nothing None) and plain data: it travels in checkpoints.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import jax
import jax.numpy as jnp

from pspnet_jax.models import resnet
from pspnet_jax.models.backbones import BACKBONES
from pspnet_jax.models.layers import (
    DROPOUTS,
    HE_FAN_IN,
    HE_FAN_OUT,
    HE_UNIFORM,
    SMALL_NORMAL,
    TORCH_DEFAULT,
    XAVIER_UNIFORM,
    Initializer,
)
from pspnet_jax.models.pyramid import POOLS
from pspnet_jax.resample import Pair, Size

HEADS = {"fused": 8, "progressive": 16}
"""Head -> its hidden channels in units of the width, where it is not the family's own."""
AUX_HEADS = ("pixel", "presence")
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


CAFFE_8BIT = Normalization(mean=(123.68, 116.779, 103.939), std=(1.0, 1.0, 1.0))
"""Of the authors' Caffe models, which take the channels as BGR; here as everywhere RGB."""


@dataclass(frozen=True)
class Family:
    """What one published PSPNet does: its options, normalization, protocol, losses, rule for image sizes."""

    source: str
    normalization: Normalization
    protocol: str
    """Under which its published figures were found (a key of `protocols.PROTOCOLS`)."""
    size_multiple: int | None
    """None: the network's stride, whatever that is."""
    size_remainder: int
    aux_weight: float
    presence_weight: float
    options: Mapping[str, Any]
    by_backbone: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Backbone -> options of its own."""


@dataclass(frozen=True)
class SizeRule:
    """The sides of images that a network takes: multiple * k + remainder."""

    multiple: int
    remainder: int

    def padded(self, size: Size) -> Size:
        """The smallest side that obeys the rule and is not below `size`."""
        multiple, remainder = self.multiple, self.remainder
        # Written as multiple * k + remainder, so that it also shows where `size` is a symbol (`export`).
        return multiple * -((remainder - size) // multiple) + remainder


_SEMSEG = {
    "stem": "deep",
    "num_stages": 4,
    "output_stride": 8,
    "fixed_dilation": False,
    "first_block_dilation": (2, 4),
    "bottleneck_stride": "3x3",
    "basic_block_dilation": "both",
    "pyramid_bins": (1, 2, 3, 6),
    "pyramid_pool": "average",
    "pyramid_reduction": True,
    "pyramid_width": 0,
    "pyramid_linear": False,
    "pyramid_bin1_norm": True,
    "pyramid_map_first": True,
    "head": "fused",
    "head_width": 8,
    "head_kernels": (3, 1),
    "aux_heads": ("pixel",),
    "aux_width": 4,
    "align_corners": True,
    "dropout_rate": 0.1,
    "dropout_kind": "channel",
    "norm_momentum": 0.1,
    "initializer": "semseg",
}
_BASIC_BLOCKS = [name for name, (block, _) in resnet.DEPTHS.items() if block is resnet.BasicBlock]

FAMILIES = {
    "semseg": Family(
        source="hszhao/semseg, the authors' PyTorch code; sides of 8n + 1 make the grids coincide",
        normalization=IMAGENET_8BIT,
        protocol="semseg",
        size_multiple=8,
        size_remainder=1,
        aux_weight=0.4,
        presence_weight=0.0,
        options=_SEMSEG,
    ),
    "caffe": Family(
        source="hszhao/PSPNet, the paper's own networks. Their pools have a fixed size, equal to ours where "
        "the bins divide the map (crops of 473 and 713); the auxiliary head of their training was not published",
        normalization=CAFFE_8BIT,
        protocol="caffe",
        size_multiple=8,
        size_remainder=1,
        aux_weight=0.4,
        presence_weight=0.0,
        options=_SEMSEG
        | {
            "pyramid_bins": (6, 3, 2, 1),
            "dropout_kind": "element",
            "norm_momentum": 0.05,
            "initializer": "caffe",
        },
        by_backbone={"resnet50": {"bottleneck_stride": "1x1"}},
    ),
    "mmseg": Family(
        source="open-mmlab/mmsegmentation: stem v1c (ResNetV1c) or 7x7 (ResNetV1b, 'b' in its names); its models "
        "of crop 769 have align_corners=True",
        normalization=IMAGENET_8BIT,
        protocol="mmseg-whole",
        size_multiple=1,
        size_remainder=0,
        aux_weight=0.4,
        presence_weight=0.0,
        options=_SEMSEG
        | {
            "stem": "v1c",
            "fixed_dilation": True,
            "first_block_dilation": (1, 2),
            "basic_block_dilation": "first",
            "align_corners": False,
            "initializer": "mmseg",
        },
        by_backbone={name: {"head_width": 2, "aux_width": 1} for name in _BASIC_BLOCKS},
    ),
    "smp": Family(
        source="qubvel-org/segmentation_models.pytorch: the map of stage 2 instead of dilation (encoder_depth 3)",
        normalization=IMAGENET_8BIT,
        protocol="whole",
        size_multiple=None,
        size_remainder=0,
        aux_weight=0.0,
        presence_weight=0.0,
        options=_SEMSEG
        | {
            "stem": "7x7",
            "num_stages": 2,
            "pyramid_bin1_norm": False,
            "pyramid_map_first": False,
            "head_kernels": (1, 3),
            "aux_heads": (),
            "dropout_rate": 0.2,
            "initializer": "smp",
        },
    ),
    "csail": Family(
        source="CSAILVision/semantic-segmentation-pytorch: ppm_deepsup, or ppm (aux_heads=())",
        normalization=IMAGENET_8BIT,
        protocol="csail",
        size_multiple=8,
        size_remainder=0,
        aux_weight=0.4,
        presence_weight=0.0,
        options=_SEMSEG
        | {
            "first_block_dilation": (1, 2),
            "basic_block_dilation": "stage",
            "pyramid_width": 8,
            "aux_width": 8,
            "align_corners": False,
            "norm_momentum": 0.001,
            "initializer": "csail",
        },
        by_backbone={name: {"aux_width": 2} for name in _BASIC_BLOCKS},
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
        options=_SEMSEG
        | {
            "stem": "7x7",
            "first_block_dilation": (1, 1),
            "pyramid_reduction": False,
            "pyramid_linear": True,
            "pyramid_map_first": False,
            "head": "progressive",
            "head_width": 16,
            "aux_heads": ("presence",),
            "dropout_rate": 0.3,
        },
    ),
}


@dataclass(frozen=True)
class Initializers:
    """How the parts of a network start."""

    backbone: Initializer
    heads: Initializer
    classifiers: Initializer


INITIALIZERS = {
    "semseg": Initializers(HE_FAN_OUT, TORCH_DEFAULT, TORCH_DEFAULT),
    "caffe": Initializers(HE_FAN_IN, HE_FAN_IN, HE_FAN_IN),
    "mmseg": Initializers(HE_FAN_OUT, HE_FAN_OUT, SMALL_NORMAL),
    "smp": Initializers(HE_FAN_OUT, HE_UNIFORM, XAVIER_UNIFORM),
    "csail": Initializers(HE_FAN_OUT, HE_FAN_IN, Initializer(HE_FAN_IN.kernel, TORCH_DEFAULT.bias)),
}


@dataclass(frozen=True)
class ModelOptions:
    """Every option of a network, resolved: `ModelOptions.resolve(section)` fills None from the family."""

    family: str
    backbone: str
    width: int
    stem: str
    num_stages: int
    output_stride: int
    fixed_dilation: bool
    first_block_dilation: tuple[int, int]
    bottleneck_stride: str
    basic_block_dilation: str
    pyramid_bins: tuple[int, ...]
    pyramid_pool: str
    pyramid_reduction: bool
    pyramid_width: int
    pyramid_linear: bool
    pyramid_bin1_norm: bool
    pyramid_map_first: bool
    head: str
    head_width: int
    head_kernels: tuple[int, int]
    aux_heads: tuple[str, ...]
    aux_width: int
    align_corners: bool
    dropout_rate: float
    dropout_kind: str
    norm_momentum: float
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
        _known("backbone", backbone, BACKBONES)
        fixed, row = BACKBONES[backbone].fixed, FAMILIES[family]
        of_family = {**row.options, **row.by_backbone.get(backbone, {}), **fixed}
        head = section.get("head")
        if head is not None and head != of_family["head"]:
            of_family["head_width"] = HEADS.get(head)
        values: dict[str, Any] = {}
        for option in fields(cls):
            # What was written before an option existed does not have it: the family's value is meant.
            value = section.get(option.name)
            if value is None:
                value = of_family[option.name]
            values[option.name] = tuple(value) if isinstance(value, list | tuple) else value
        _refuse_others(values, fixed)
        options = cls(**values)
        options._check()
        return options

    @property
    def size_rule(self) -> SizeRule:
        family = FAMILIES[self.family]
        return SizeRule(family.size_multiple or self.output_stride, family.size_remainder)

    def _check(self) -> None:
        if self.backbone in resnet.DEPTHS:
            _known("stem", self.stem, resnet.STEMS)
            _known("output_stride", self.output_stride, resnet.OUTPUT_STRIDES)
            _known("bottleneck_stride", self.bottleneck_stride, resnet.BOTTLENECK_STRIDES)
            _known("basic_block_dilation", self.basic_block_dilation, resnet.BASIC_BLOCK_DILATIONS)
        _known("pyramid_pool", self.pyramid_pool, POOLS)
        _known("head", self.head, HEADS)
        _known("dropout_kind", self.dropout_kind, DROPOUTS)
        _known("initializer", self.initializer, INITIALIZERS)
        _known("dtype", self.dtype, DTYPES)
        for name in self.aux_heads:
            _known("aux_heads", name, AUX_HEADS)
        if self.dtype == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError("model.dtype='float64' needs JAX_ENABLE_X64=1, else it is float32")
        bins = self.pyramid_bins
        if len(set(bins)) != len(bins) or any(b < 1 for b in bins):
            raise ValueError(f"model.pyramid_bins={bins} must be different numbers of at least 1")
        if self.num_stages not in (2, 3, 4):
            raise ValueError(f"model.num_stages={self.num_stages} must be 2, 3 or 4")
        if min(self.head_width, self.aux_width) < 1 or self.pyramid_width < 0:
            raise ValueError(
                f"model.head_width={self.head_width} and aux_width={self.aux_width} must be at least 1, "
                f"pyramid_width={self.pyramid_width} at least 0"
            )
        if not 0 <= self.norm_momentum <= 1:
            raise ValueError(f"model.norm_momentum={self.norm_momentum} must be within 0..1")
        if len(self.head_kernels) != 2 or any(
            size not in (1, 3, 5, 7) for size in self.head_kernels
        ):
            raise ValueError(
                f"model.head_kernels={self.head_kernels} must be two odd sizes, pixels: 3,1"
            )
        if self.head == "progressive" and self.output_stride != 8:
            raise ValueError(
                f"model.head='progressive' doubles the map three times: it needs output_stride=8, not "
                f"{self.output_stride}"
            )


FORWARD_OPTIONS = tuple(
    option.name
    for option in fields(ModelOptions)
    if option.name
    not in (
        *("family", "backbone", "width", "dtype", "remat", "frozen_norm", "initializer"),
        *("aux_heads", "dropout_rate", "dropout_kind", "norm_momentum"),
    )
)
"""What a network computes in evaluation, except how deep and wide it is."""


def check_size(size: Pair, rule: SizeRule) -> None:
    """Raise where a (height, width) breaks a size rule, naming the nearest that obey it."""
    wrong = [side for side in size if (side - rule.remainder) % rule.multiple != 0]
    if wrong:
        above = rule.padded(wrong[0])
        nearest = [side for side in (above - rule.multiple, above) if side > 0]
        remainder = f" + {rule.remainder}" if rule.remainder else ""
        raise ValueError(
            f"a side of {wrong[0]} pixels in (height, width) = {size} must be {rule.multiple}k{remainder}, "
            f"with a whole k (nearest: {', '.join(map(str, nearest))})"
        )


def _refuse_others(values: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise where options have other values than the one that a backbone has, with all that would be right."""
    wrong = [name for name in fixed if values[name] != fixed[name]]
    if wrong:
        given = ", ".join(f"model.{name}={values[name]!r}" for name in wrong)
        right = " ".join(f"--config.model.{name}={_as_flag(fixed[name])}" for name in wrong)
        raise ValueError(
            f"{given}: not possible with backbone={values['backbone']}, which needs {right} (a config file "
            "for a ResNet may set others); or choose a ResNet"
        )


def _as_flag(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _known(name: str, value: object, table: Collection) -> None:
    if value not in table:
        raise ValueError(f"model.{name}={value!r} is not one of {', '.join(map(str, table))}")
