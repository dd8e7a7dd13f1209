"""Resizing along one axis, written as the few samples that each new sample is made of.

A resize matrix has two (without smoothing) or a handful of entries in each row; `Taps` holds only those.
On a volume of class scores that is fifteen times less work than the matrix product, and positions and
weights are arguments of a compiled function, not part of it: other sizes need no new compilation.

Four rules are in use; all put sample centers at half positions except `align_corners`:

* `half_pixel`: OpenCV's INTER_LINEAR, PyTorch's align_corners=False. Nothing is smoothed when shrinking.
* `align_corners`: the first and last samples of both sides lie on each other.
* `pillow`: a triangle as wide as the shrinking asks for; samples beyond the border do not count.
* `matlab`: the same triangle (`imresize(..., 'bilinear')`); beyond the border the axis is mirrored.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from pspnet_jax.resample import Neighbors, neighbors


class Taps(NamedTuple):
    """New sample i is the sum over k of weights[i, k] * old[indices[i, k]]."""

    indices: Int64[np.ndarray, "new taps"]
    weights: Float64[np.ndarray, "new taps"]

    def rows(self, start: int, end: int) -> "Taps":
        """Those of the new samples start .. end alone."""
        return Taps(self.indices[start:end], self.weights[start:end])


def half_pixel(size: int, new_size: int) -> Taps:
    """Bilinear, centers at half positions, nothing smoothed."""
    return _between(neighbors(size, new_size, align_corners=False))


def align_corners(size: int, new_size: int) -> Taps:
    """Bilinear, ends on ends; a single new sample is the first old one."""
    return _between(neighbors(size, new_size, align_corners=True))


def pillow(size: int, new_size: int) -> Taps:
    """Triangle of Pillow's BILINEAR, smoothed when shrinking."""
    ratio = size / new_size
    width = max(ratio, 1.0)
    centers = (np.arange(new_size) + 0.5) * ratio
    first = np.maximum((centers - width + 0.5).astype(int), 0)
    last = np.minimum((centers + width + 0.5).astype(int), size)
    indices = first[:, None] + np.arange((last - first).max())
    weights = np.maximum(1 - np.abs(indices - centers[:, None] + 0.5) / width, 0)
    weights *= indices < last[:, None]
    return Taps(np.minimum(indices, size - 1), weights / weights.sum(1, keepdims=True))


def matlab(size: int, new_size: int) -> Taps:
    """Triangle of MATLAB's imresize 'bilinear', smoothed when shrinking, mirrored at the borders."""
    ratio = size / new_size
    width = max(ratio, 1.0)
    centers = (np.arange(new_size) + 0.5) * ratio - 0.5
    indices = np.floor(centers - width).astype(int)[:, None] + np.arange(
        int(np.ceil(2 * width)) + 2
    )
    weights = np.maximum(1 - np.abs(indices - centers[:, None]) / width, 0)
    weights /= weights.sum(1, keepdims=True)
    used = (weights > 0).any(0)
    there_and_back = np.concatenate([np.arange(size), np.arange(size)[::-1]])
    mirrored = there_and_back[indices[:, used] % (2 * size)]
    return Taps(mirrored, weights[:, used])


Rule = Callable[[int, int], Taps]
RULES: dict[str, Rule] = {
    "half_pixel": half_pixel,
    "align_corners": align_corners,
    "pillow": pillow,
    "matlab": matlab,
}


def chain(first: Taps, second: Taps) -> Taps:
    """Resizing by `first`, then by `second`, at once."""
    indices = first.indices[second.indices]
    weights = first.weights[second.indices] * second.weights[..., None]
    new_size = len(second.indices)
    return Taps(indices.reshape(new_size, -1), weights.reshape(new_size, -1))


def resize_pillow(
    image: UInt8[np.ndarray, "_height _width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "_height _width 3"]:
    """An 8-bit image as `resize(..., BILINEAR)` of Pillow makes it, to the bit: across, then down.

    As of Pillow up to 12, and of published figures; 13 goes down first where that is less work, which moves
    values by one.
    """

    def along(image: np.ndarray, new_size: int) -> np.ndarray:  # the first axis
        indices, weights = pillow(len(image), new_size)
        fixed = np.floor(weights * 2**22 + 0.5).astype(np.int64)  # its fixed-point weights
        total = np.full((new_size, *image.shape[1:]), 2**21, np.int64)
        for k in range(indices.shape[1]):
            total += fixed[:, k, None, None] * image[indices[:, k]]
        return np.clip(total >> 22, 0, 255).astype(np.uint8)

    height, width = size
    if image.shape[1] != width:
        image = along(image.swapaxes(0, 1), width).swapaxes(0, 1)
    return along(image, height) if image.shape[0] != height else image


def resize_matlab(
    image: UInt8[np.ndarray, "_height _width 3"], size: tuple[int, int]
) -> UInt8[np.ndarray, "_height _width 3"]:
    """An 8-bit image as MATLAB's `imresize(..., 'bilinear')` makes it, as far as its source tells.

    The axis that shrinks more goes first and each pass is rounded to 8 bits; its arithmetic inside a
    pass is not public, so a value may be off by one.
    """

    def along(image: np.ndarray, new_size: int) -> np.ndarray:
        indices, weights = matlab(len(image), new_size)
        total = np.zeros((new_size, *image.shape[1:]))
        for k in range(indices.shape[1]):
            total += weights[:, k, None, None] * image[indices[:, k]]
        return np.floor(total + 0.5).astype(np.uint8)

    down_first = size[0] / image.shape[0] <= size[1] / image.shape[1]
    for axis in (0, 1) if down_first else (1, 0):
        if image.shape[axis] != size[axis]:
            image = along(image.swapaxes(0, axis), size[axis]).swapaxes(0, axis)
    return image


def _between(found: Neighbors) -> Taps:
    weights = np.stack([1 - found.fraction, found.fraction], 1)
    return Taps(np.stack([found.lower, found.upper], 1), weights)
