"""Augmentation: recipes, each a kind of random plan for `views.render` and its ranges.

* A plan is drawn from a random generator and the labels alone; all random numbers are drawn first and always,
  so that switching one step off does not change the others.
* Pure functions of an example and a random generator; NumPy and OpenCV only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from pspnet_jax.arrays import IGNORE_LABEL, Example, LabelMap
from pspnet_jax.data.views import (
    Color,
    ColorChange,
    Plan,
    Size,
    centered_padding,
    mirror,
    random_corner,
    render,
    rotation,
    sample_labels,
    scaling,
    shift,
)

Tries = Float[np.ndarray, " tries"]
NUM_TRIES = 10


@dataclass(frozen=True)
class ScaledCrop:
    """Scale, rotation, blur, flip and a crop of fixed size, in the order of the authors' code.

    Args:
        scale_min, scale_max: range of the factor of both sides.
        rotation_degrees: the angle is drawn from +- this.
        rotation_probability, blur_probability, flip_probability: of each step.
    """

    scale_min: float
    scale_max: float
    rotation_degrees: float
    rotation_probability: float
    blur_probability: float
    flip_probability: float

    def plan(self, labels: LabelMap, crop_size: Size, rng: np.random.Generator) -> Plan:
        """What is seen of labels [height, width], for a crop of (height, width) `crop_size`."""
        scale = rng.uniform(self.scale_min, self.scale_max)
        degrees = rng.uniform(-self.rotation_degrees, self.rotation_degrees)
        rotates, blurs, flips = rng.random(3) < (
            self.rotation_probability,
            self.blur_probability,
            self.flip_probability,
        )
        offset = rng.random(2)

        size = round(labels.shape[0] * scale), round(labels.shape[1] * scale)
        # By the factor, not by the rounded size: so does OpenCV in the authors' code.
        to_image = scaling(scale, scale)
        if rotates:
            # Half a pixel off the middle, as in the authors' code.
            to_image = to_image @ rotation(degrees, (size[1] / 2, size[0] / 2))
        if flips:
            to_image = to_image @ mirror(size[1])
        top, left = random_corner(size, crop_size, offset)
        above, before = centered_padding(size, crop_size)
        corner = top - above, left - before
        return Plan(to_image, size, corner, is_rotated=bool(rotates), blurs=bool(blurs))


@dataclass(frozen=True)
class StretchedWindow:
    """A window of random area and aspect stretched to the crop, flip and rotation, as in the variant's code.

    The first of ten windows that fits is taken, a random half of them turned on their side; where none
    fits, the largest one in the middle that has the aspect of the crop.

    Args:
        area_min: the window's share of the image is drawn from this to 1.
        aspect_max: its width over its height is drawn from 1 / this to this.
        rotation_degrees: whole degrees are drawn from -this to just below +this, about the middle.
        rotation_probability, flip_probability: of each step.
    """

    area_min: float
    aspect_max: float
    rotation_degrees: float
    rotation_probability: float
    flip_probability: float

    def plan(self, labels: LabelMap, crop_size: Size, rng: np.random.Generator) -> Plan:
        """What is seen of labels [height, width], for a crop of (height, width) `crop_size`."""
        areas = rng.uniform(self.area_min, 1, NUM_TRIES)
        aspects = rng.uniform(1 / self.aspect_max, self.aspect_max, NUM_TRIES)
        aspects = np.where(rng.random(NUM_TRIES) < 0.5, 1 / aspects, aspects)
        offset = rng.random(2)
        lowest, end = np.ceil((-self.rotation_degrees, self.rotation_degrees))
        degrees = float(rng.integers(lowest, max(end, lowest + 1)))
        rotates, flips = rng.random(2) < (self.rotation_probability, self.flip_probability)

        image_size = (labels.shape[0], labels.shape[1])
        window = window_size(image_size, areas, aspects)
        if window is None:
            window, offset = largest_window(image_size, crop_size), np.array([0.5, 0.5])
        top, left = random_corner(image_size, window, offset)
        height, width = crop_size
        to_image = scaling(width / window[1], height / window[0])
        if flips:
            to_image = to_image @ mirror(width)
        if rotates:
            to_image = to_image @ rotation(degrees, ((width - 1) / 2, (height - 1) / 2))
        return Plan(
            to_image, crop_size, (0, 0), is_rotated=bool(rotates), window=(top, left, *window)
        )


@dataclass(frozen=True)
class RatioCrop:
    """Keep-ratio resize, a crop that no class fills, flip and changes of color, as in mmsegmentation.

    Args:
        base_size: long and short side in pixels into which an image is fit at scale 1.
        scale_min, scale_max: range of the factor of both.
        class_share_max: of eleven crops the first is taken in which no class has this share of the labeled
            pixels, or more; else the last. 1: any.
        flip_probability: of the mirror image.
        color_probability: of each change of brightness, contrast, saturation and hue.
    """

    base_size: tuple[int, int]
    scale_min: float
    scale_max: float
    class_share_max: float
    flip_probability: float
    color_probability: float

    def plan(self, labels: LabelMap, crop_size: Size, rng: np.random.Generator) -> Plan:
        """What is seen of labels [height, width], for a crop of (height, width) `crop_size`."""
        scale = rng.uniform(self.scale_min, self.scale_max)
        offsets = rng.random((NUM_TRIES + 1, 2))
        flips = rng.random() < self.flip_probability
        colors = draw_colors(rng, self.color_probability)

        image_size = (labels.shape[0], labels.shape[1])
        size = fitted_size(image_size, self.base_size, scale)
        to_image = scaling(size[1] / image_size[1], size[0] / image_size[0])
        corners = [random_corner(size, crop_size, offset) for offset in offsets]
        top, left = corners[-1]
        for corner in corners[:-1] if self.class_share_max < 1 else ():
            seen = min(crop_size[0], size[0]), min(crop_size[1], size[1])
            view = sample_labels(
                labels, to_image @ shift(corner[1], corner[0]), seen, is_rotated=False
            )
            if is_varied(view, self.class_share_max):
                top, left = corner
                break
        if flips:
            # The crop is mirrored, not the picture: where the crop is the larger one, what is missing stays at
            # the bottom and right.
            to_image = to_image @ mirror(size[1])
            left = max(size[1] - crop_size[1], 0) - left
        return Plan(to_image, size, (top, left), colors=colors)


Planner = ScaledCrop | StretchedWindow | RatioCrop


@dataclass(frozen=True)
class RandomView:
    """Callable with (example, random generator): the example as a planner sees it.

    Args:
        planner: draws the plan.
        crop_size: (height, width) of the result in pixels.
        fill: color outside of the image.
    """

    planner: Planner
    crop_size: Size
    fill: Color

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        plan = self.planner.plan(example.labels, self.crop_size, rng)
        image, labels = render(example.image, example.labels, plan, self.crop_size, fill=self.fill)
        return Example(image, labels, example.index)


def fitted_size(size: Size, base_size: tuple[int, int], scale: float) -> Size:
    """(height, width) with the aspect of `size` that fits (long, short) sides of `base_size` times `scale`."""
    long, short = int(max(base_size) * scale), int(min(base_size) * scale)
    factor = min(long / max(size), short / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)


def is_varied(labels: UInt8[np.ndarray, "height width"], share_max: float) -> bool:
    """Whether there are two classes or more and none has `share_max` of the labeled pixels."""
    counts = np.bincount(labels.reshape(-1), minlength=256)[:IGNORE_LABEL]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < share_max * counts.sum())


def draw_colors(rng: np.random.Generator, probability: float) -> ColorChange:
    """Brightness +-32, contrast and saturation times 0.5..1.5, hue -18..17 of 180, each with `probability`.

    Contrast comes before saturation and hue or after them, each half of the time, as in mmsegmentation and in
    Liu et al. 2016 (SSD).
    """
    brightens, saturates, turns, contrasts = rng.random(4) < probability
    brightness = rng.uniform(-32, 32)
    contrast, saturation = rng.uniform(0.5, 1.5, 2)
    hue, contrast_is_first = rng.integers(-18, 18), rng.random() < 0.5

    values = np.arange(256, dtype=np.float32)
    first = (_table(values + np.float32(brightness)),) if brightens else ()
    table = (_table(values * np.float32(contrast)),) if contrasts else ()
    hsv = None
    if saturates or turns:
        hsv = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        if turns:
            hsv[0, :, 0] = (hsv[0, :, 0].astype(int) + hue) % 180
        if saturates:
            hsv[0, :, 1] = _table(values * np.float32(saturation))
    if contrast_is_first:
        return ColorChange((*first, *table), hsv)
    return ColorChange(first, hsv, table)


def _table(values: Float[np.ndarray, "256"]) -> UInt8[np.ndarray, "256"]:
    return values.clip(0, 255).astype(np.uint8)


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


class Recipe(NamedTuple):
    """A kind of plan and what it takes where the config says nothing."""

    planner: type[Planner]
    options: Mapping[str, Any]


RECIPES = {
    # The authors' code (hszhao/semseg) for all three of its data sets.
    "semseg": Recipe(
        ScaledCrop,
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
        StretchedWindow,
        {
            "area_min": 0.5,
            "aspect_max": 4 / 3,
            "rotation_degrees": 10.0,
            "rotation_probability": 1.0,
            "flip_probability": 0.5,
        },
    ),
    # mmsegmentation's, of its PSPNet configs (Cityscapes: base_size 2048, 1024).
    "mmseg": Recipe(
        RatioCrop,
        {
            "base_size": (2048, 512),
            "scale_min": 0.5,
            "scale_max": 2.0,
            "class_share_max": 0.75,
            "flip_probability": 0.5,
            "color_probability": 0.5,
        },
    ),
    # A random crop and nothing else; the whole image where the crop has its size.
    "none": Recipe(
        ScaledCrop,
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
) -> RandomView:
    """The random view of resolved options: callable with (example, random generator).

    Args:
        options: of `resolve`.
        crop_size: (height, width) of the result in pixels.
        fill: color outside of the image.
    """
    own = {name: value for name, value in options.items() if name != "recipe"}
    return RandomView(RECIPES[options["recipe"]].planner(**own), crop_size, fill)
