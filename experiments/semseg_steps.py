"""The authors' augmentation step by step, on whole pictures in float32: oracle and peer of `data/views`.

Written from the facts of hszhao/semseg: read as float32, scale, rotate, blur, flip, pad, crop, subtract the
mean and divide. Each step makes a new picture. Nothing of the package is imported.
"""

from typing import NamedTuple

import cv2
import numpy as np

IGNORE_LABEL = 255
MEAN = np.array([123.675, 116.28, 103.53], np.float32)
STD = np.array([58.395, 57.12, 57.375], np.float32)


class Draws(NamedTuple):
    """What chance decides for one image."""

    scale: float
    degrees: float
    rotates: bool
    blurs: bool
    flips: bool
    offset: tuple[float, float]
    """Of the crop, down and across: shares of the corners that are possible."""


def draw(rng: np.random.Generator) -> Draws:
    """Ranges and probabilities of all three data sets."""
    scale, degrees = rng.uniform(0.5, 2), rng.uniform(-10, 10)
    rotates, blurs, flips = rng.random(3) < 0.5
    return Draws(scale, degrees, rotates, blurs, flips, tuple(rng.random(2)))


def augment(
    image: np.ndarray,
    labels: np.ndarray,
    draws: Draws,
    crop_size: tuple[int, int],
    *,
    fill: tuple[float, float, float] = tuple(MEAN.tolist()),
) -> tuple[np.ndarray, np.ndarray]:
    """Image f32[height, width, 3] within 0..255 and labels u8[height, width] -> both of `crop_size`."""
    factor = {"fx": draws.scale, "fy": draws.scale}
    image = cv2.resize(image, None, **factor, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(labels, None, **factor, interpolation=cv2.INTER_NEAREST)
    if draws.rotates:
        height, width = labels.shape
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), draws.degrees, 1)
        image = cv2.warpAffine(
            image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=fill
        )
        labels = cv2.warpAffine(
            labels, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=IGNORE_LABEL
        )
    if draws.blurs:
        image = cv2.GaussianBlur(image, (5, 5), 0)
    if draws.flips:
        image, labels = cv2.flip(image, 1), cv2.flip(labels, 1)
    missing = [max(side - have, 0) for side, have in zip(crop_size, labels.shape, strict=True)]
    if any(missing):
        above, left = (m // 2 for m in missing)
        borders = (above, missing[0] - above, left, missing[1] - left, cv2.BORDER_CONSTANT)
        image = cv2.copyMakeBorder(image, *borders, value=fill)
        labels = cv2.copyMakeBorder(labels, *borders, value=IGNORE_LABEL)
    top, left = (
        int(share * (have - side + 1))
        for share, have, side in zip(draws.offset, labels.shape, crop_size, strict=True)
    )
    window = (slice(top, top + crop_size[0]), slice(left, left + crop_size[1]))
    return image[window], labels[window]


def normalize(image: np.ndarray) -> np.ndarray:
    """f32[height, width, 3] within 0..255 -> what the network sees, channels first."""
    return np.ascontiguousarray(((image - MEAN) / STD).transpose(2, 0, 1))
