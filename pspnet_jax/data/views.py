"""A view of an example: one affine map, one sampling of the image and one of the labels.

* Scaling, rotating, mirroring and cropping are composed as matrices first; then only the pixels of the crop
  are sampled, once, from the 8-bit image.
* Matrices take pixels (x, y, 1) of what is seen to pixels of where it comes from, the center of the
  first pixel being (0, 0): so they are multiplied in the order of the steps.
* Images are sampled linearly, labels by the nearest pixel of the same map. What lies outside is the fill
  color in the image and void in the labels.
"""

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float, Float64, UInt8

from pspnet_jax.arrays import IGNORE_LABEL, LabelMap, RawImage

Affine = Float64[np.ndarray, "3 3"]
Number = float | int
Color = tuple[int, int, int]
Size = tuple[int, int]
"""(height, width) in pixels."""
NewView = tuple[
    UInt8[np.ndarray, "new_height new_width 3"], UInt8[np.ndarray, "new_height new_width"]
]
"""Image and labels of another size than they had."""

_BLUR_REACH = 2  # pixels to each side, of a kernel of 5 x 5


class ColorChange(NamedTuple):
    """Brightness, contrast, saturation and hue, as tables of 256 values."""

    rgb: tuple[UInt8[np.ndarray, "256"], ...] = ()
    """Applied first, one after the other, to all three channels."""
    hsv: UInt8[np.ndarray, "1 256 3"] | None = None
    """Of OpenCV's 8-bit hue (0..179), saturation and value."""
    rgb_after: tuple[UInt8[np.ndarray, "256"], ...] = ()


class Plan(NamedTuple):
    """What is seen: a picture made of the image by `to_image`, and where in it the crop lies."""

    to_image: Affine
    """Pixels of the picture -> pixels of the image."""
    size: Size
    """Of the picture. Around it there is nothing."""
    corner: tuple[int, int]
    """(top, left) of the crop in the picture; negative where the picture begins inside the crop."""
    window: tuple[int, int, int, int] | None = None
    """(top, left, height, width) of the part of the image that counts, where it is not the whole."""
    is_rotated: bool = False
    """Whether the image leaves corners of the picture open."""
    blurs: bool = False
    colors: ColorChange = ColorChange()


def scaling(factor_x: Number, factor_y: Number) -> Affine:
    """A picture stretched by the factors, as OpenCV's `resize` does: corner to corner of the outer pixels."""
    return np.array(
        [
            [1 / factor_x, 0, (1 / factor_x - 1) / 2],
            [0, 1 / factor_y, (1 / factor_y - 1) / 2],
            [0, 0, 1],
        ]
    )


def rotation(degrees: Number, center: tuple[Number, Number]) -> Affine:
    """A picture turned counterclockwise about the pixel (x, y) `center`."""
    sine, cosine = np.sin(np.radians(degrees)), np.cos(np.radians(degrees))
    turn = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    return shift(*center) @ turn @ shift(-center[0], -center[1])


def shift(x: Number, y: Number) -> Affine:
    """A picture whose first pixel is the pixel (x, y) of where it comes from."""
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1]], np.float64)


def mirror(width: int) -> Affine:
    """A picture of the given width, left and right exchanged."""
    return np.array([[-1, 0, width - 1], [0, 1, 0], [0, 0, 1]], np.float64)


def centered_padding(size: Size, crop_size: Size) -> tuple[int, int]:
    """(rows above, columns left) that a picture needs to be at least as large as the crop."""
    above, left = (max(c - s, 0) // 2 for s, c in zip(size, crop_size, strict=True))
    return above, left


def random_corner(size: Size, crop_size: Size, offset: Float[np.ndarray, "2"]) -> tuple[int, int]:
    """(top, left) of a crop inside a picture; 0 along a side on which the picture is not larger.

    Args:
        offset: chooses among the corners, uniformly where it is uniform within 0..1 (1 excluded).
    """
    top, left = (
        int(fraction * (max(s - c, 0) + 1))
        for fraction, s, c in zip(offset, size, crop_size, strict=True)
    )
    return top, left


def render(
    image: RawImage, labels: LabelMap, plan: Plan, crop_size: Size, *, fill: Color
) -> NewView:
    """Image and labels of the crop, `crop_size` (height, width) large."""
    if plan.window is not None:
        image, labels = (cut(array, plan.window) for array in (image, labels))
    reach = _BLUR_REACH if plan.blurs else 0
    # Only what is seen of the picture is sampled.
    top, left = (max(corner - reach, 0) for corner in plan.corner)
    bottom, right = (
        max(min(corner + side + reach, limit), 0)
        for corner, side, limit in zip(plan.corner, crop_size, plan.size, strict=True)
    )
    size, to_image = (bottom - top, right - left), plan.to_image @ shift(left, top)
    seen = _sample(image, to_image, size, cv2.INTER_LINEAR, plan.is_rotated, fill)
    seen_labels = sample_labels(labels, to_image, size, is_rotated=plan.is_rotated)
    if plan.blurs:
        seen = cv2.GaussianBlur(seen, (2 * _BLUR_REACH + 1,) * 2, 0)
    seen = change_colors(seen, plan.colors)
    at = top - plan.corner[0], left - plan.corner[1]
    return (
        _place(seen, at, crop_size, fill),
        _place(seen_labels, at, crop_size, (IGNORE_LABEL,)),
    )


def sample_labels(
    labels: LabelMap, to_image: Affine, size: Size, *, is_rotated: bool
) -> UInt8[np.ndarray, "new_height new_width"]:
    """The nearest label of every pixel of a picture of `size`."""
    return _sample(labels, to_image, size, cv2.INTER_NEAREST, is_rotated, (IGNORE_LABEL,))


def change_colors(
    image: UInt8[np.ndarray, "height width 3"], change: ColorChange
) -> UInt8[np.ndarray, "height width 3"]:
    """The image through the tables, in their order."""
    for table in change.rgb:
        image = cv2.LUT(image, table)
    if change.hsv is not None:
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), change.hsv)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    for table in change.rgb_after:
        image = cv2.LUT(image, table)
    return image


def cut(array: np.ndarray, window: tuple[int, int, int, int]) -> np.ndarray:
    """The part of an image or of labels at (top, left, height, width)."""
    top, left, height, width = window
    return array[top : top + height, left : left + width]


def _sample(
    array: np.ndarray,
    to_image: Affine,
    size: Size,
    how: int,
    is_rotated: bool,
    fill: tuple[int, ...],
) -> np.ndarray:
    x, y = to_image[:2, 2]
    if (to_image[:2, :2] == np.eye(2)).all() and x == int(x) and y == int(y):
        return array[int(y) : int(y) + size[0], int(x) : int(x) + size[1]]
    is_color = array.ndim == 3
    if is_color:  # OpenCV warps four channels in half the time of three
        array = cv2.cvtColor(array, cv2.COLOR_RGB2RGBA)
    warped = cv2.warpAffine(
        array,
        to_image[:2],
        size[::-1],
        flags=how | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT if is_rotated else cv2.BORDER_REPLICATE,
        borderValue=fill,
    )
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB) if is_color else warped


def _place(array: np.ndarray, at: tuple[int, int], size: Size, fill: tuple[int, ...]) -> np.ndarray:
    """`array` with its corner at (top, left) `at` of a filled canvas of `size`, cut where it sticks out."""
    if at == (0, 0) and array.shape[:2] == size:
        return np.ascontiguousarray(array)
    (top, bottom), (left, right) = (
        (max(start, 0), max(min(start + length, side), 0))
        for start, length, side in zip(at, array.shape, size, strict=False)
    )
    if top >= bottom or left >= right:
        return np.full((*size, *array.shape[2:]), fill[0] if array.ndim == 2 else fill, np.uint8)
    seen = array[top - at[0] : bottom - at[0], left - at[1] : right - at[1]]
    borders = (top, size[0] - bottom, left, size[1] - right)
    return cv2.copyMakeBorder(seen, *borders, cv2.BORDER_CONSTANT, value=fill)
