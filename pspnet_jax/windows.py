"""Protocols: how class probabilities of whole images of any size come from a network.

* Everything here is a function of a function Images -> Logits (or windows -> probabilities); no model,
  no files.
* A protocol is a name with all its options; reports carry it in full, because the same network scores
  differently under another one.
* `semseg` slides: windows have one shape, so the network is compiled once whatever the images' sizes.
  Their probabilities are added up on the device in a canvas; cutting off the padding, dividing by the
  number of windows over each pixel, resizing and averaging over scales are one matrix per axis. Canvas
  and result are rounded up to `_ROUND` pixels, so that images of similar sizes share compilations.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Float64, Int32

from pspnet_jax.arrays import Images, Logits, Probabilities, RawImage, Scalar
from pspnet_jax.catalog import LabelSet
from pspnet_jax.resample import resize_matrix

LogitsFunction = Callable[[Images], Logits]
WindowFunction = Callable[[Float32[np.ndarray, "batch height width 3"]], Probabilities]
Canvas = Float32[jax.Array, "_height _width classes"]
"""Summed probabilities, larger than what it is for: only the first rows and columns count."""

_ROUND = 128  # pixels


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate.

    `whole`: the image at its own size, one forward pass (padded to the network's size rule, the result
    cropped back), averaged with its mirror image as probabilities where `flip`.

    `semseg`: as the authors' test script (hszhao/semseg, tool/test.py). For each scale the long side
    becomes round(scale * base_size); windows of `crop_size` every `stride` pixels, the last ones moved
    back inside; smaller images are padded with the mean on all sides; class probabilities (with the
    mirror image's where `flip`) are averaged over the windows of a pixel, resized to the image and
    averaged over scales.
    """

    name: str
    flip: bool
    absent_class: str
    """Whether a class that nobody drew and nobody predicted is left out of means ('skip') or counts as
    0 ('zero')."""
    scales: tuple[float, ...] = (1.0,)
    """Factors of `base_size`."""
    base_size: int | None = None
    """Long side of the image at scale 1, pixels; None: the image as it is."""
    crop_size: tuple[int, int] | None = None
    """(height, width) of windows, pixels; None: no windows."""
    stride: tuple[int, int] | None = None
    """Between windows, down and across, pixels."""

    @property
    def slides(self) -> bool:
        """Whether images go through in windows."""
        return self.crop_size is not None

    def to_json(self) -> dict:
        """Every option, as plain data; `Protocol.from_json` reads it back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

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
        if self.scales != usual.scales:
            parts.append("scales" + ",".join(f"{scale:.15g}" for scale in self.scales))
        if self.base_size != usual.base_size:
            parts.append(f"base{self.base_size}")
        if self.crop_size and self.crop_size != usual.crop_size:
            parts.append("crop{}x{}".format(*self.crop_size))
        if self.crop_size and self.stride and self.stride != _stride_rule(self.crop_size):
            parts.append("stride{}x{}".format(*self.stride))
        return "-".join(parts)


PROTOCOLS = {
    "whole": Protocol("whole", flip=True, absent_class="skip"),
    "semseg": Protocol(
        "semseg", flip=True, absent_class="zero", base_size=512, crop_size=(473, 473)
    ),
}


def choose(name: str, label_set: LabelSet) -> Protocol:
    """A protocol by name in its usual form for a label set, whose crop and base size it takes.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol={name!r} is not one of {', '.join(PROTOCOLS)}")
    protocol = PROTOCOLS[name]
    if not protocol.slides:
        return protocol
    return override(protocol, crop_size=label_set.crop_size, base_size=label_set.base_size)


def override(protocol: Protocol, **options: Any) -> Protocol:
    """The protocol with every option that is not None; another crop has another stride, by the rule.

    Raises:
        ValueError: for an option that the protocol does not have, or an impossible value.
    """
    options = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(set(options) - {"flip"}) if not protocol.slides else []
    if foreign:
        having = ", ".join(name for name, other in PROTOCOLS.items() if other.slides)
        raise ValueError(
            f"protocol '{protocol.name}' takes whole images: it has no {', '.join(foreign)} ({having} has)"
        )
    for name in {"crop_size", "stride"} & set(options):
        if isinstance(options[name], int):
            options[name] = (options[name], options[name])
        if len(options[name]) != 2 or min(options[name]) < 1:
            raise ValueError(f"{name}={options[name]} must be (height, width), pixels: 473,473")
    if isinstance(options.get("scales"), float | int):
        options["scales"] = (float(options["scales"]),)
    if "crop_size" in options or protocol.stride is None:
        crop_size = options.get("crop_size", protocol.crop_size)
        options.setdefault("stride", crop_size and _stride_rule(crop_size))
    changed = replace(protocol, **options)
    _check(changed)
    return changed


def _check(protocol: Protocol) -> None:
    if not protocol.scales or not all(0 < scale <= 100 for scale in protocol.scales):
        raise ValueError(
            f"scales={protocol.scales} must be factors above 0, at most 100: 0.5,1,1.5"
        )
    if protocol.base_size is not None and protocol.base_size < 1:
        raise ValueError(f"base_size={protocol.base_size} must be at least 1 pixel")
    crop_size, stride = protocol.crop_size, protocol.stride
    if crop_size and stride and any(s > c for s, c in zip(stride, crop_size, strict=True)):
        raise ValueError(
            f"stride={stride} is above crop_size={crop_size}: windows would leave pixels out"
        )


def _stride_rule(crop_size: tuple[int, int]) -> tuple[int, int]:
    height, width = (math.ceil(side * 2 / 3) for side in crop_size)
    return height, width


def probabilities(logits_of: LogitsFunction, images: Images, *, flip: bool) -> Probabilities:
    """Class probabilities of images or windows, f32[batch, height, width, classes].

    Args:
        logits_of: normalized images -> logits of the same height and width.
        images: normalized.
        flip: average with those of the mirror images, which go through in the same batch.
    """
    if not flip:
        return _softmax(logits_of(images))
    both = _softmax(logits_of(jnp.concatenate([images, images[:, :, ::-1]])))
    upright, mirrored = jnp.split(both, 2)
    return (upright + mirrored[:, :, ::-1]) / 2


class Axis(NamedTuple):
    """One axis of an image at one scale, pixels."""

    size: int
    """Of the scaled image."""
    before: int
    """Padding before it."""
    padded: int
    """Size with padding: at least the window's."""
    starts: tuple[int, ...]
    """First pixel of each window, in the padded image."""


class View(NamedTuple):
    """An image at one scale, and where its windows lie."""

    rows: Axis
    columns: Axis


def views(size: tuple[int, int], protocol: Protocol) -> list[View]:
    """What becomes of an image of `size` = (height, width) at each scale of a protocol that slides."""
    crop_size, stride, base_size = protocol.crop_size, protocol.stride, protocol.base_size
    if crop_size is None or stride is None or base_size is None:
        raise ValueError(f"protocol '{protocol.name}' has no windows")
    found = []
    for scale in protocol.scales:
        long_side = round(scale * base_size)
        height, width = (max(1, round(long_side / max(size) * side)) for side in size)
        rows = _axis(height, crop_size[0], stride[0])
        columns = _axis(width, crop_size[1], stride[1])
        found.append(View(rows, columns))
    return found


def _axis(size: int, window: int, stride: int) -> Axis:
    padded = max(size, window)
    count = math.ceil((padded - window) / stride) + 1
    starts = tuple(min(i * stride, padded - window) for i in range(count))
    return Axis(size, (padded - size) // 2, padded, starts)


def sliding_probabilities(
    probabilities_of: WindowFunction,
    image: RawImage,
    *,
    protocol: Protocol,
    fill: tuple[float, float, float],
    batch_size: int,
) -> Canvas:
    """Class probabilities of one image under a protocol that slides, f32[_height, _width, classes].

    Args:
        probabilities_of: windows, RGB 0 .. 255 in float32, not normalized -> probabilities, all on
            one device.
        image: of any size.
        fill: the mean color, for padding.
        batch_size: windows that go through together; the last batch is filled up with copies.

    Returns:
        A canvas: the first height x width pixels are the image's.
    """
    assert protocol.crop_size
    height, width = image.shape[:2]
    window_height, window_width = protocol.crop_size
    total = None
    for view in views((height, width), protocol):
        canvas = None
        for windows, corners, count in _window_batches(image, view, protocol, fill, batch_size):
            found = probabilities_of(windows)
            if canvas is None:
                shape = (_rounded(view.rows.padded), _rounded(view.columns.padded), found.shape[-1])
                canvas = jnp.zeros(shape, jnp.float32, device=found.sharding)
            canvas = _add_windows(canvas, found, corners, count)
        assert canvas is not None
        rows = _canvas_matrix(view.rows, height, window_height) / len(protocol.scales)
        columns = _canvas_matrix(view.columns, width, window_width)
        total = _add_resized(total, canvas, np.float32(rows), np.float32(columns))
    assert total is not None
    return total


def _window_batches(
    image: RawImage,
    view: View,
    protocol: Protocol,
    fill: tuple[float, float, float],
    batch_size: int,
) -> Iterator[
    tuple[Float32[np.ndarray, "batch height width 3"], Int32[np.ndarray, "batch 2"], int]
]:
    """Windows of one view in batches of exactly `batch_size`, their corners, and how many count."""
    assert protocol.crop_size
    (height, before, padded_height, tops), (width, left, padded_width, lefts) = view
    scaled = cv2.resize(image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR)
    after = (padded_height - height - before, padded_width - width - left)
    borders = (before, after[0], left, after[1])
    scaled = cv2.copyMakeBorder(scaled, *borders, cv2.BORDER_CONSTANT, value=fill)
    corners = [(row, column) for row in tops for column in lefts]
    rows, columns = protocol.crop_size
    for i in range(0, len(corners), batch_size):
        chosen = corners[i : i + batch_size]
        count = len(chosen)
        chosen += chosen[-1:] * (batch_size - count)
        windows = [scaled[top : top + rows, left : left + columns] for top, left in chosen]
        yield np.stack(windows), np.array(chosen, np.int32), count


@functools.partial(jax.jit, donate_argnums=0)
def _add_windows(canvas: Canvas, found: Probabilities, corners, count: Scalar | int) -> Canvas:
    """Add the first `count` windows to the canvas at their corners."""

    def add(i: jax.Array, canvas: Canvas) -> Canvas:
        corner = (corners[i, 0], corners[i, 1], 0)
        window = jax.lax.dynamic_slice(canvas, corner, found.shape[1:]) + found[i]
        return jax.lax.dynamic_update_slice(canvas, window, corner)

    return jax.lax.fori_loop(0, count, add, canvas)


@functools.partial(jax.jit, donate_argnums=0)
def _add_resized(total: Canvas | None, canvas: Canvas, rows, columns) -> Canvas:
    """total + rows @ canvas @ columns^T for every class."""
    highest = jax.lax.Precision.HIGHEST
    resized = jnp.einsum("Ww,hwc->hWc", columns, canvas, precision=highest)
    resized = jnp.einsum("Hh,hWc->HWc", rows, resized, precision=highest)
    return resized if total is None else total + resized


def _canvas_matrix(axis: Axis, side: int, window: int) -> Float64[np.ndarray, "result canvas"]:
    """From the summed windows along one axis of the canvas to `side` pixels of the result.

    Windows lie on a grid, so the number of windows over a pixel is a product of one count per axis, and
    the division by it can be done axis by axis.
    """
    count = np.zeros(axis.padded)
    for start in axis.starts:
        count[start : start + window] += 1
    inside = slice(axis.before, axis.before + axis.size)
    matrix = np.zeros((_rounded(side), _rounded(axis.padded)))
    resized = resize_matrix(axis.size, side, align_corners=False)
    matrix[:side, inside] = resized / count[None, inside]
    return matrix


def _rounded(side: int) -> int:
    return -(side // -_ROUND) * _ROUND


def _softmax(logits: Logits) -> Probabilities:
    return jax.nn.softmax(logits, axis=-1).astype(jnp.float32)
