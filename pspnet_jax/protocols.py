"""Protocols: the ways to evaluate, each a name with all its options.

The same network scores differently under another protocol, so reports carry it in full. Sources:
hszhao/semseg (tool/test.py), hszhao/PSPNet (evaluation/*.m), open-mmlab/mmsegmentation (encoder_decoder.py
and the configs of PSPNet), CSAILVision/semantic-segmentation-pytorch (eval.py, dataset.py).

`whole`: the image at its own size in one forward pass, averaged with its mirror image as probabilities
where `flip`. Our own, for data without a published protocol.

`semseg`: the long side becomes round(scale * base_size). Windows of `crop_size` every `stride` pixels,
the last ones moved back inside; what is smaller is padded with the mean on all sides. Class
probabilities (averaged with the mirror image's) are averaged over the windows of a pixel, resized to the
image and averaged over scales.

`caffe`: the paper's own evaluation. As `semseg`, but the long side becomes scale * base_size + 1, padding
goes below and to the right, logits of a window and its mirror image are added before the softmax, and
images and probabilities are resized as by MATLAB, smoothed when shrinking. MATLAB's arithmetic is not
public: an 8-bit value of a resized image may be off by one.

`mmseg-whole`: the short side becomes base_size, or less where the long one would pass max_size; one
forward pass; logits are resized to the image. Each scale and mirror image is averaged as probabilities.
Scales multiply both limits, as in mmsegmentation before 1.0; from 1.0 on they multiply the image's own size.

`mmseg-slide`: the same with windows, whose logits are averaged. A window is smaller where the image is.

`csail`: the short side becomes scale * base_size, or less where the long one would pass max_size; both
are rounded up to multiples of 8; images are resized as by Pillow. One forward pass at each scale;
logits go from the network's resolution straight to the image's, probabilities are averaged. A network
that takes no multiples of 8 (semseg: 8n + 1) is given one pixel more; its logits are cut before the last
resizing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from pspnet_jax.catalog import LabelSet

Size = tuple[int, int]
"""Height and width, pixels."""


@dataclass(frozen=True)
class Rules:
    """What a protocol does that is no option of it."""

    scaled: Callable[[Size, float, "Protocol"], Size] | None
    """Size of an image at a scale; None: its own."""
    resizes_image: Literal["float", "8bit", "matlab", "pillow"] = "float"
    resizes_result: Literal["half_pixel", "matlab", "network"] = "half_pixel"
    """'network': by the network's own rule, align_corners or not."""
    pads: Literal["around", "after", "never"] = "never"
    """Where an image is smaller than a window; 'never': the window is smaller too."""
    averages: Literal["probabilities", "summed_logits", "logits"] = "logits"
    """What windows are averaged as; 'summed_logits': probabilities of the sum of both mirrorings.
    Under 'logits' each mirroring is averaged for itself, and both as probabilities."""
    one_step: bool = False
    """Whether a network's scores go to the image's size at once, not by way of the scaled image's."""
    stride: Callable[[float], int] = math.ceil
    """From two thirds of a side of the window."""


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate: see the module."""

    name: str
    flip: bool
    absent_class: str
    """Whether a class that nobody drew and nobody predicted is left out of means ('skip') or counts as
    0 ('zero')."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of `base_size`."""
    base_size: int | None = None
    """Long (semseg, caffe) or short (mmseg, csail) side at scale 1, pixels; None: the image as it is."""
    crop_size: Size | None = None
    """(height, width) of windows, pixels; None: no windows."""
    stride: Size | None = None
    """Between windows, down and across, pixels."""
    max_size: int | None = None
    """What the long side may not pass (mmseg: at scale 1), pixels."""

    @property
    def rules(self) -> Rules:
        return RULES[self.name]

    @property
    def slides(self) -> bool:
        """Whether images go through in windows."""
        return self.crop_size is not None

    @property
    def resizes(self) -> bool:
        """Whether images are brought to other sizes."""
        return self.rules.scaled is not None

    def to_json(self) -> dict:
        """Every option, as plain data; `Protocol.from_json` reads it back."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_json(cls, data: dict) -> "Protocol":
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in data.items()
        }
        return cls(**values)

    def label(self, label_set: LabelSet) -> str:
        """The name, with what differs from its usual form on a label set: 'semseg-noflip'."""
        usual = choose(self.name, label_set)
        parts = [self.name]
        if self.flip != usual.flip:
            parts.append("flip" if self.flip else "noflip")
        if self.absent_class != usual.absent_class:
            parts.append(f"absent{self.absent_class}")
        if self.scales != usual.scales:
            parts.append("scales" + ",".join(f"{scale:.15g}" for scale in self.scales))
        if self.base_size != usual.base_size:
            parts.append(f"base{self.base_size}")
        if self.max_size != usual.max_size:
            parts.append(f"max{self.max_size}")
        if self.crop_size and self.crop_size != usual.crop_size:
            parts.append("crop{}x{}".format(*self.crop_size))
        if self.crop_size and self.stride != _stride(self):
            parts.append("stride{}x{}".format(*self.stride or ()))
        return "-".join(parts)

    def describe(self) -> str:
        """Every option in words, for reports and the terminal."""
        said = [f"scales {', '.join(f'{scale:.4g}' for scale in self.scales)}"]
        said.append("with mirror images" if self.flip else "no mirror images")
        if self.base_size:
            side = "long" if self.name in ("semseg", "caffe") else "short"
            said.append(f"{side} side {self.base_size}")
        if self.max_size:
            said.append(f"long side at most {self.max_size}")
        if self.crop_size and self.stride:
            said.append("windows {}x{}".format(*self.crop_size))
            said.append("stride {}x{}".format(*self.stride))
            said.append(_PADS[self.rules.pads])
        said += _RESIZES.get(self.name, [])
        if self.rules.averages != "logits":
            said.append(_AVERAGES[self.rules.averages])
        elif self.flip or len(self.scales) > 1:
            said.append("their probabilities averaged")
        said.append(f"absent classes {'count as 0' if self.absent_class == 'zero' else 'left out'}")
        return f"{self.name} ({'; '.join(said if self.resizes else said[1:])})"


def _semseg_size(size: Size, scale: float, protocol: Protocol) -> Size:
    long_side = round(scale * _base(protocol))
    height, width = (max(1, round(long_side / max(size) * side)) for side in size)
    return height, width


def _caffe_size(size: Size, scale: float, protocol: Protocol) -> Size:
    # In MATLAB's single precision, halves away from 0.
    long_side = np.float32(_base(protocol) * scale + 1)
    height, width = (
        max(1, math.floor(long_side / np.float32(max(size)) * np.float32(side) + np.float32(0.5)))
        for side in size
    )
    return height, width


def _mmseg_size(size: Size, scale: float, protocol: Protocol) -> Size:
    longest, shortest = int((protocol.max_size or 0) * scale), int(_base(protocol) * scale)
    factor = min(longest / max(size), shortest / min(size))
    height, width = (max(1, int(side * factor + 0.5)) for side in size)
    return height, width


def _csail_size(size: Size, scale: float, protocol: Protocol) -> Size:
    shortest = round(_base(protocol) * scale)
    factor = min(shortest / min(size), (protocol.max_size or 0) / max(size))
    height, width = (-(max(1, int(side * factor)) // -8) * 8 for side in size)
    return height, width


def _base(protocol: Protocol) -> int:
    assert protocol.base_size, protocol
    return protocol.base_size


_PADS = {
    "around": "padded on all sides",
    "after": "padded below and to the right",
    "never": "not padded",
}
_AVERAGES = {
    "probabilities": "probabilities averaged",
    "summed_logits": "logits of mirror images added, probabilities averaged",
}
_RESIZES = {
    "caffe": ["resized as by MATLAB (8-bit values up to 1 off)"],
    "csail": ["multiples of 8", "resized as by Pillow"],
}

RULES = {
    "whole": Rules(scaled=None),
    "semseg": Rules(scaled=_semseg_size, pads="around", averages="probabilities"),
    "caffe": Rules(
        scaled=_caffe_size,
        resizes_image="matlab",
        resizes_result="matlab",
        pads="after",
        averages="summed_logits",
    ),
    "mmseg-whole": Rules(scaled=_mmseg_size, resizes_image="8bit", resizes_result="network"),
    "mmseg-slide": Rules(
        scaled=_mmseg_size, resizes_image="8bit", resizes_result="network", stride=round
    ),
    "csail": Rules(
        scaled=_csail_size, resizes_image="pillow", resizes_result="network", one_step=True
    ),
}

PROTOCOLS = {
    "whole": Protocol("whole", flip=True, absent_class="skip"),
    "semseg": Protocol(
        "semseg", flip=True, absent_class="zero", base_size=512, crop_size=(473, 473)
    ),
    "caffe": Protocol("caffe", flip=True, absent_class="zero", base_size=512, crop_size=(473, 473)),
    "mmseg-whole": Protocol(
        "mmseg-whole", flip=False, absent_class="skip", base_size=512, max_size=2048
    ),
    "mmseg-slide": Protocol(
        "mmseg-slide",
        flip=False,
        absent_class="skip",
        base_size=512,
        max_size=2048,
        crop_size=(512, 512),
    ),
    "csail": Protocol(
        "csail",
        flip=False,
        absent_class="zero",
        scales=(2 / 3, 5 / 6, 1.0, 7 / 6, 4 / 3),  # 300, 375, 450, 525 and 600 pixels
        base_size=450,
        max_size=1000,
    ),
}
OPTIONS = ("flip", "absent_class", "scales", "base_size", "max_size", "crop_size", "stride")


def choose(name: str, label_set: LabelSet) -> Protocol:
    """A protocol by name in its usual form for a label set, whose published sizes it takes.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name!r} is not one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    is_cityscapes = label_set.name in ("cityscapes", "cityscapes_train_ids")
    if name in ("semseg", "caffe"):
        return override(protocol, crop_size=label_set.crop_size, base_size=label_set.base_size)
    if name == "mmseg-whole" and is_cityscapes:
        return override(protocol, base_size=1024, max_size=2048)
    if name == "mmseg-slide" and is_cityscapes:
        return override(protocol, base_size=1025, max_size=2049, crop_size=(769, 769))
    return override(protocol)


def override(protocol: Protocol, **options: Any) -> Protocol:
    """The protocol with every option that is not None; another crop has another stride, by the rule.

    Raises:
        ValueError: for an option that the protocol does not have, or an impossible value.
    """
    options = {name: value for name, value in options.items() if value is not None}
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such option; there are {', '.join(OPTIONS)}")
    foreign = sorted(name for name in options if not has_option(protocol, name))
    if foreign:
        having = {
            option: [name for name, other in PROTOCOLS.items() if has_option(other, option)]
            for option in foreign
        }
        listed = "; ".join(f"{option} ({', '.join(names)})" for option, names in having.items())
        raise ValueError(
            f"protocol '{protocol.name}' has no {', '.join(foreign)}; others have: {listed}"
        )
    for name in {"crop_size", "stride"} & set(options):
        if isinstance(options[name], int):
            options[name] = (options[name], options[name])
        if len(options[name]) != 2 or min(options[name]) < 1:
            raise ValueError(f"{name}={options[name]} must be (height, width), pixels: 473,473")
    if isinstance(options.get("scales"), float | int):
        options["scales"] = (float(options["scales"]),)
    changed = replace(protocol, **options)
    if (
        changed.slides
        and "stride" not in options
        and ("crop_size" in options or not changed.stride)
    ):
        changed = replace(changed, stride=_stride(changed))
    _check(changed)
    return changed


def has_option(protocol: Protocol, option: str) -> bool:
    """Whether an option means something under a protocol."""
    usual = PROTOCOLS[protocol.name]
    if option == "stride":
        return usual.slides
    if option == "scales":
        return usual.resizes
    return option in OPTIONS and (
        option in ("flip", "absent_class") or getattr(usual, option) is not None
    )


def _check(protocol: Protocol) -> None:
    if protocol.absent_class not in ("skip", "zero"):
        raise ValueError(f"absent_class={protocol.absent_class!r} must be skip or zero")
    if not protocol.scales or not all(0 < scale <= 100 for scale in protocol.scales):
        raise ValueError(
            f"scales={protocol.scales} must be factors above 0, at most 100: 0.5,1,1.5"
        )
    for name in ("base_size", "max_size"):
        value = getattr(protocol, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1 pixel")
    crop_size, stride = protocol.crop_size, protocol.stride
    if crop_size and stride and any(s > c for s, c in zip(stride, crop_size, strict=True)):
        raise ValueError(
            f"stride={stride} is above crop_size={crop_size}: windows would leave pixels out"
        )


def _stride(protocol: Protocol) -> Size:
    height, width = (protocol.rules.stride(side * 2 / 3) for side in protocol.crop_size or ())
    return height, width
