"""Augmentation of one example: a random view of an image and its labels.

* Pure functions of an example and a random generator; NumPy and OpenCV only.
* All random numbers are drawn first and always, so that switching one step off does not change the
  others.
* Images are sampled linearly, labels by the nearest pixel. What lies outside is the mean color in the
  image and void in the labels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, UInt8

from pspnet_jax.arrays import IGNORE_LABEL, Example, LabelMap, RawImage

Color = tuple[int, int, int]
Tries = Float[np.ndarray, " tries"]
NewView = tuple[
    UInt8[np.ndarray, "new_height new_width 3"], UInt8[np.ndarray, "new_height new_width"]
]
"""Image and labels of another size than they had."""


@dataclass(frozen=True)
class RandomCrop:
    """Scale, rotation, blur, flip and a crop of fixed size, in the order of the authors' code.

    Args:
        scale_min, scale_max: range of the factor of both sides.
        rotation_degrees: the angle is drawn from +- this.
        rotation_probability, blur_probability, flip_probability: of each step.
        crop_size: (height, width) of the result in pixels.
        fill: color outside of the image.
    """

    scale_min: float
    scale_max: float
    rotation_degrees: float
    rotation_probability: float
    blur_probability: float
    flip_probability: float
    crop_size: tuple[int, int]
    fill: Color

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        scale = rng.uniform(self.scale_min, self.scale_max)
        degrees = rng.uniform(-self.rotation_degrees, self.rotation_degrees)
        rotates, blurs, flips = rng.random(3) < (
            self.rotation_probability,
            self.blur_probability,
            self.flip_probability,
        )
        offset = rng.random(2)

        image, labels = rescale(example.image, example.labels, scale)
        if rotates:
            height, width = labels.shape
            center = (width / 2, height / 2)  # half a pixel off the middle, as in the authors' code
            image, labels = rotate(image, labels, degrees, center=center, fill=self.fill)
        if blurs:
            image = blur(image)
        if flips:
            image, labels = image[:, ::-1], labels[:, ::-1]
        image, labels = pad_to(image, labels, self.crop_size, fill=self.fill)
        image, labels = crop(image, labels, self.crop_size, offset=(offset[0], offset[1]))
        return Example(np.ascontiguousarray(image), np.ascontiguousarray(labels), example.index)


NUM_TRIES = 10  # of a window that fits into the image


@dataclass(frozen=True)
class RandomSizedCrop:
    """A window of random area and aspect stretched to the crop, flip and rotation, as in the variant's code.

    The first of ten windows that fits is taken, a random half of them turned on their side; where none
    fits, the largest one in the middle that has the aspect of the crop.

    Args:
        area_min: the window's share of the image is drawn from this to 1.
        aspect_max: its width over its height is drawn from 1 / this to this.
        rotation_degrees: whole degrees are drawn from -this to just below +this, about the middle.
        rotation_probability, flip_probability: of each step.
        crop_size: (height, width) of the result in pixels.
        fill: color outside of the image.
    """

    area_min: float
    aspect_max: float
    rotation_degrees: float
    rotation_probability: float
    flip_probability: float
    crop_size: tuple[int, int]
    fill: Color

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        areas = rng.uniform(self.area_min, 1, NUM_TRIES)
        aspects = rng.uniform(1 / self.aspect_max, self.aspect_max, NUM_TRIES)
        aspects = np.where(rng.random(NUM_TRIES) < 0.5, 1 / aspects, aspects)
        offset = rng.random(2)
        degrees = np.floor(rng.uniform(-self.rotation_degrees, self.rotation_degrees))
        rotates, flips = rng.random(2) < (self.rotation_probability, self.flip_probability)

        size = window_size(example.labels.shape, areas, aspects)
        if size is None:
            size, offset = largest_window(example.labels.shape, self.crop_size), (0.5, 0.5)
        image, labels = crop(example.image, example.labels, size, offset=(offset[0], offset[1]))
        image, labels = stretch(image, labels, self.crop_size)
        if flips:
            image, labels = image[:, ::-1], labels[:, ::-1]
        if rotates:
            height, width = labels.shape
            center = ((width - 1) / 2, (height - 1) / 2)
            image, labels = rotate(image, labels, degrees, center=center, fill=self.fill)
        return Example(np.ascontiguousarray(image), np.ascontiguousarray(labels), example.index)


class Recipe(NamedTuple):
    """A kind of view and what it takes where the config says nothing."""

    view: type[RandomCrop] | type[RandomSizedCrop]
    options: Mapping[str, float]


RECIPES = {
    # The authors' code (hszhao/semseg) for all three of its data sets.
    "semseg": Recipe(
        RandomCrop,
        {
            "scale_min": 0.5,
            "scale_max": 2.0,
            "rotation_degrees": 10.0,
            "rotation_probability": 0.5,
            "blur_probability": 0.5,
            "flip_probability": 0.5,
        },
    ),
    # The variant (Lextal/pspnet-pytorch), whose code has the steps but never runs them. Its faults are
    # mended: images were sampled by the nearest pixel, and the corners that rotation opens were class 0.
    "lextal": Recipe(
        RandomSizedCrop,
        {
            "area_min": 0.5,
            "aspect_max": 4 / 3,
            "rotation_degrees": 10.0,
            "rotation_probability": 1.0,
            "flip_probability": 0.5,
        },
    ),
    # A random crop and nothing else; the whole image where the crop has its size.
    "none": Recipe(
        RandomCrop,
        {
            "scale_min": 1.0,
            "scale_max": 1.0,
            "rotation_degrees": 0.0,
            "rotation_probability": 0.0,
            "blur_probability": 0.0,
            "flip_probability": 0.0,
        },
    ),
}


def resolve(section: Mapping[str, Any]) -> dict[str, Any]:
    """The options of config section `augment`, None taken from the recipe.

    Raises:
        ValueError: for an option that the recipe has no use for.
    """
    recipe = section["recipe"]
    defaults = RECIPES[recipe].options
    given = {name: value for name, value in section.items() if value is not None}
    idle = sorted(set(given) - {"recipe", *defaults})
    if idle:
        listed = ", ".join(f"augment.{name}={given[name]!r}" for name in idle)
        raise ValueError(f"{listed} would do nothing: recipe '{recipe}' has {', '.join(defaults)}")
    return {"recipe": recipe, **defaults, **given}


def make_augment(
    options: Mapping[str, Any], crop_size: tuple[int, int], *, fill: Color
) -> RandomCrop | RandomSizedCrop:
    """The view of resolved options: callable with (example, random generator).

    Args:
        options: of `resolve`.
        crop_size: (height, width) of the result in pixels.
        fill: color outside of the image.
    """
    view = RECIPES[options["recipe"]].view
    own = {name: value for name, value in options.items() if name != "recipe"}
    return view(**own, crop_size=crop_size, fill=fill)


def window_size(size: tuple[int, ...], areas: Tries, aspects: Tries) -> tuple[int, int] | None:
    """(height, width) of the first window that fits into an image of (height, width) `size`.

    Args:
        size: of the image.
        areas: of each window, as a share of the image's.
        aspects: width over height of each window.

    Returns:
        None where none fits.
    """
    pixels = areas * size[0] * size[1]
    heights, widths = np.rint(np.sqrt(pixels / aspects)), np.rint(np.sqrt(pixels * aspects))
    fits = (heights <= size[0]) & (widths <= size[1])
    if not fits.any():
        return None
    first = int(np.argmax(fits))
    return max(int(heights[first]), 1), max(int(widths[first]), 1)


def largest_window(size: tuple[int, ...], crop_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the largest window with the aspect of the crop in an image of `size`."""
    factor = min(side / wanted for side, wanted in zip(size, crop_size, strict=True))
    height, width = (max(round(factor * wanted), 1) for wanted in crop_size)
    return height, width


def stretch(image: RawImage, labels: LabelMap, size: tuple[int, int]) -> NewView:
    """To (height, width) `size`; the image linearly, the labels by the nearest pixel."""
    wanted = size[::-1]
    return (
        cv2.resize(image, wanted, interpolation=cv2.INTER_LINEAR),
        # The nearest by centers, like the linear one: the other nearest of OpenCV is half a pixel off.
        cv2.resize(labels, wanted, interpolation=cv2.INTER_NEAREST_EXACT),
    )


def blur(image: RawImage) -> RawImage:
    """Gaussian over 5 x 5 pixels."""
    return cv2.GaussianBlur(image, (5, 5), 0)


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
    image: RawImage,
    labels: LabelMap,
    degrees: float,
    *,
    center: tuple[float, float],
    fill: Color,
) -> tuple[RawImage, LabelMap]:
    """Counterclockwise about the pixel (x, y) `center`, keeping the size."""
    height, width = labels.shape
    matrix = cv2.getRotationMatrix2D(center, degrees, 1)
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
