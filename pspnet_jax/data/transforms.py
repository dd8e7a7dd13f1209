"""Augmentation of one example: scale, rotation, blur, flip and crop, in the authors' order.

* Pure functions of an example and a random generator; NumPy and OpenCV only.
* All random numbers are drawn first and always, so that switching one step off does not change the
  others.
* Images are sampled linearly, labels by the nearest pixel. What lies outside is the mean color in the
  image and void in the labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8

from pspnet_jax.arrays import IGNORE_LABEL, Example, LabelMap, RawImage

Color = tuple[int, int, int]
NewView = tuple[
    UInt8[np.ndarray, "new_height new_width 3"], UInt8[np.ndarray, "new_height new_width"]
]
"""Image and labels of another size than they had."""


@dataclass(frozen=True)
class Augmentation:
    """Ranges and probabilities of every random step; `resolve` fills None from the recipe."""

    recipe: str
    scale_min: float
    scale_max: float
    rotation_degrees: float
    rotation_probability: float
    blur_probability: float
    flip_probability: float

    @classmethod
    def resolve(cls, section: Mapping[str, Any]) -> "Augmentation":
        """Complete options from a config section, None taken from the recipe."""
        values: dict[str, Any] = {"recipe": section["recipe"]}
        for name, default in RECIPES[section["recipe"]].items():
            values[name] = default if section[name] is None else section[name]
        return cls(**values)


RECIPES: dict[str, dict[str, float]] = {
    # The authors' code (hszhao/semseg) for all three of its data sets.
    "semseg": {
        "scale_min": 0.5,
        "scale_max": 2.0,
        "rotation_degrees": 10.0,
        "rotation_probability": 0.5,
        "blur_probability": 0.5,
        "flip_probability": 0.5,
    },
    # A random crop and nothing else; the whole image where the crop has its size.
    "none": {
        "scale_min": 1.0,
        "scale_max": 1.0,
        "rotation_degrees": 0.0,
        "rotation_probability": 0.0,
        "blur_probability": 0.0,
        "flip_probability": 0.0,
    },
}


@dataclass(frozen=True)
class RandomCrop:
    """A random view of an example: callable with (example, random generator).

    Args:
        augmentation: ranges and probabilities.
        crop_size: (height, width) of the result in pixels.
        fill: color outside of the image.
    """

    augmentation: Augmentation
    crop_size: tuple[int, int]
    fill: Color

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        options = self.augmentation
        scale = rng.uniform(options.scale_min, options.scale_max)
        degrees = rng.uniform(-options.rotation_degrees, options.rotation_degrees)
        rotates, blurs, flips = rng.random(3) < (
            options.rotation_probability,
            options.blur_probability,
            options.flip_probability,
        )
        offset = rng.random(2)

        image, labels = rescale(example.image, example.labels, scale)
        if rotates:
            image, labels = rotate(image, labels, degrees, fill=self.fill)
        if blurs:
            image = cv2.GaussianBlur(image, (5, 5), 0)
        if flips:
            image, labels = image[:, ::-1], labels[:, ::-1]
        image, labels = pad_to(image, labels, self.crop_size, fill=self.fill)
        image, labels = crop(image, labels, self.crop_size, offset=(offset[0], offset[1]))
        return Example(np.ascontiguousarray(image), np.ascontiguousarray(labels), example.index)


def rescale(image: RawImage, labels: LabelMap, scale: float) -> NewView:
    """Both sides times `scale`, rounded; the image linearly, the labels by the nearest pixel."""
    if scale == 1:
        return (image, labels)
    # By factor, not by size: OpenCV then samples at exactly 1 / scale, as in the authors' code.
    return (
        cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR),
        cv2.resize(labels, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST),
    )


def rotate(
    image: RawImage, labels: LabelMap, degrees: float, *, fill: Color
) -> tuple[RawImage, LabelMap]:
    """Counterclockwise about (width / 2, height / 2), keeping the size."""
    height, width = labels.shape
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1)
    return (
        cv2.warpAffine(image, matrix, (width, height), flags=cv2.INTER_LINEAR, borderValue=fill),
        cv2.warpAffine(
            labels, matrix, (width, height), flags=cv2.INTER_NEAREST, borderValue=(IGNORE_LABEL,)
        ),
    )


def pad_to(image: RawImage, labels: LabelMap, size: tuple[int, int], *, fill: Color) -> NewView:
    """Grow both sides to at least `size`, half of what is missing before and half after."""
    missing = [max(wanted - side, 0) for wanted, side in zip(size, labels.shape, strict=True)]
    if not any(missing):
        return image, labels
    (top, bottom), (left, right) = ((m // 2, m - m // 2) for m in missing)
    borders = (top, bottom, left, right, cv2.BORDER_CONSTANT)
    return (
        cv2.copyMakeBorder(image, *borders, value=fill),
        cv2.copyMakeBorder(labels, *borders, value=(IGNORE_LABEL,)),
    )


def crop(
    image: RawImage, labels: LabelMap, size: tuple[int, int], *, offset: tuple[float, float]
) -> NewView:
    """A window of `size`; `offset` in 0 .. 1 chooses its corner uniformly among those that fit."""
    top, left = (
        int(fraction * (side - wanted + 1))
        for fraction, side, wanted in zip(offset, labels.shape, size, strict=True)
    )
    window = (slice(top, top + size[0]), slice(left, left + size[1]))
    return image[window], labels[window]
