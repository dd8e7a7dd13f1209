"""The authors' evaluation protocol stated once more: slow, plain NumPy in float64, one window at a time.

Written from what their test script does, sharing nothing with `pspnet_jax.windows`: neither resizing,
nor the grid of windows, nor the way they are averaged.
"""

import math
from collections.abc import Callable

import numpy as np

MEAN = 255 * np.array([0.485, 0.456, 0.406])
STD = 255 * np.array([0.229, 0.224, 0.225])

Network = Callable[[np.ndarray], np.ndarray]
"""Normalized images [batch, height, width, 3] -> logits [batch, height, width, classes]."""


def probabilities(
    network: Network,
    image: np.ndarray,
    *,
    crop_size: tuple[int, int],
    base_size: int,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = True,
    stride: tuple[int, int] | None = None,
) -> np.ndarray:
    """Class probabilities [height, width, classes] of an 8-bit RGB image."""
    height, width, _ = image.shape
    total = 0.0
    for scale in scales:
        long_side = round(scale * base_size)
        if height > width:
            size = (long_side, round(long_side / height * width))
        else:
            size = (round(long_side / width * height), long_side)
        scaled = resize(image.astype(float), size)
        total = total + resize(
            _one_scale(network, scaled, crop_size, stride, flip=flip), (height, width)
        )
    return total / len(scales)


def _one_scale(network, image, crop_size, stride, *, flip):
    height, width, _ = image.shape
    missing = [max(crop - side, 0) for crop, side in zip(crop_size, (height, width), strict=True)]
    top, left = missing[0] // 2, missing[1] // 2
    padded = np.empty((height + missing[0], width + missing[1], 3))
    padded[:] = MEAN
    padded[top : top + height, left : left + width] = image
    total, count = 0.0, np.zeros(padded.shape[:2])
    for row in starts(padded.shape[0], crop_size[0], stride and stride[0]):
        for column in starts(padded.shape[1], crop_size[1], stride and stride[1]):
            here = np.s_[row : row + crop_size[0], column : column + crop_size[1]]
            found = _one_window(network, padded[here], flip=flip)
            if np.isscalar(total):
                total = np.zeros((*padded.shape[:2], found.shape[-1]))
            total[here] += found
            count[here] += 1
    return (total / count[:, :, None])[top : top + height, left : left + width]


def _one_window(network, window, *, flip):
    normalized = ((window - MEAN) / STD)[None]
    upright = softmax(network(normalized))[0]
    if not flip:
        return upright
    mirrored = softmax(network(normalized[:, :, ::-1]))[0, :, ::-1]
    return (upright + mirrored) / 2


def starts(side, crop, stride):
    """A window every `stride` pixels; the last one ends with the image."""
    stride = stride or math.ceil(crop * 2 / 3)
    found = [0]
    while found[-1] + crop < side:
        found.append(min(found[-1] + stride, side - crop))
    return found


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def resize(image, size):
    """Bilinear, pixel centers at half positions, no smoothing when shrinking."""
    for axis, new in enumerate(size):
        image = np.moveaxis(image, axis, 0)
        old = len(image)
        lines = []
        for i in range(new):
            position = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
            lower = min(int(position), old - 2) if old > 1 else 0
            upper = min(lower + 1, old - 1)
            lines.append(image[lower] + (position - lower) * (image[upper] - image[lower]))
        image = np.moveaxis(np.stack(lines), 0, axis)
    return image
