"""Where windows lie in images of any size, and where their scores lie in the result: whole numbers only.

* A `View` is what a protocol makes of an image at one scale: its size, its padding, its windows.
* The scores of a view's windows are added up in rows of a canvas (see `canvas`). `result_taps` says of
  which samples of the canvas each row and column of the result is made: cutting off the padding, dividing
  by the number of windows over a sample and resizing are one step.
* `plan` cuts results that would need more of the canvas than there is into parts, each with the windows
  that touch it.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from pspnet_jax.arrays import AnyImage, RawImage
from pspnet_jax.protocols import Protocol, Size
from pspnet_jax.taps import RULES, Taps, chain, resize_matlab, resize_pillow


class Axis(NamedTuple):
    """One axis of an image at one scale, pixels."""

    size: int
    """Of the scaled image."""
    before: int
    """Padding before it."""
    padded: int
    """Size with padding: at least the window's."""
    window: int
    starts: tuple[int, ...]
    """First pixel of each window, in the padded image."""


class View(NamedTuple):
    """An image at one scale, mirrored or not, and where its windows lie."""

    rows: Axis
    columns: Axis
    mirrored: bool = False

    @property
    def size(self) -> Size:
        """Of the scaled image."""
        return self.rows.size, self.columns.size


def views(size: Size, protocol: Protocol) -> list[View]:
    """What becomes of an image of `size` = (height, width) at each scale of a protocol."""
    rules, crop_size, stride = protocol.rules, protocol.crop_size, protocol.stride
    # Where each mirroring is averaged for itself, the mirror image is an image like any other.
    mirrorings = (False, True) if protocol.flip and rules.averages == "logits" else (False,)
    found = []
    for scale in protocol.scales:
        scaled = size if rules.scaled is None else rules.scaled(size, scale, protocol)
        rows, columns = (
            _axis(
                scaled[i],
                crop_size[i] if crop_size else scaled[i],
                stride[i] if stride else scaled[i],
                rules.pads,
            )
            for i in (0, 1)
        )
        found += [View(rows, columns, mirrored) for mirrored in mirrorings]
    return found


def _axis(size: int, window: int, stride: int, pads: str) -> Axis:
    window = min(window, size) if pads == "never" else window
    padded = max(size, window)
    count = math.ceil((padded - window) / stride) + 1
    starts = tuple(min(i * stride, padded - window) for i in range(count))
    before = (padded - size) // 2 if pads == "around" else 0
    return Axis(size, before, padded, window, starts)


def view_image(
    image: RawImage, view: View, protocol: Protocol, fill: tuple[float, float, float]
) -> AnyImage:
    """The image at a view's size, padded with `fill` (the mean color) and mirrored as it says."""
    height, width = view.size
    if not protocol.resizes:
        scaled: AnyImage = image
    elif protocol.rules.resizes_image == "pillow":
        scaled = resize_pillow(image, (height, width))
    elif protocol.rules.resizes_image == "matlab":
        scaled = resize_matlab(image, (height, width)).astype(np.float32)
        if len(view.rows.starts) * len(view.columns.starts) > 1:
            fill = tuple(np.rint(fill).tolist())  # there MATLAB pads the 8-bit image
    else:
        eight_bit = protocol.rules.resizes_image == "8bit"
        source = image if eight_bit else image.astype(np.float32)
        scaled = cv2.resize(source, (width, height), interpolation=cv2.INTER_LINEAR)
    if view.mirrored:
        scaled = np.ascontiguousarray(scaled[:, ::-1])
    after = [axis.padded - axis.size - axis.before for axis in (view.rows, view.columns)]
    if view.rows.padded == height and view.columns.padded == width:
        return scaled
    borders = (view.rows.before, after[0], view.columns.before, after[1])
    return cv2.copyMakeBorder(scaled, *borders, cv2.BORDER_CONSTANT, value=fill)


def result_taps(axis: Axis, side: int, rule: str, *, mirrored: bool = False) -> Taps:
    """From the summed windows along one padded axis to `side` samples of the result.

    Windows lie on a grid, so the number of windows over a sample is a product of one count per axis, and
    the division by it can be done axis by axis.
    """
    count = np.zeros(axis.padded)
    for start in axis.starts:
        count[start : start + axis.window] += 1
    indices, weights = RULES[rule](axis.size, side)
    indices = indices + axis.before
    return _mirrored(Taps(indices, weights / count[indices]), mirrored)


def network_taps(
    scores: int, padded: int, size: int, side: int, rule: str, *, one_step: bool, mirrored: bool
) -> Taps:
    """From `scores` samples of a network's output to `side` samples of the result.

    Args:
        scores: the network's samples along the axis, for an input of `padded` pixels.
        padded: what the input of `size` pixels was padded to at its end.
        one_step: go there directly, where nothing was padded.
    """
    if one_step and padded == size:
        taps = RULES[rule](scores, side)
    else:
        taps = RULES[rule](scores, padded).rows(0, size)
        if side != size:
            taps = chain(taps, RULES[rule](size, side))
    return _mirrored(taps, mirrored)


def _mirrored(taps: Taps, mirrored: bool) -> Taps:
    """Scores of a mirror image are turned around again."""
    return Taps(taps.indices[::-1], taps.weights[::-1]) if mirrored else taps


class Window(NamedTuple):
    """One window: where it is cut out and where its scores go."""

    top: int
    left: int
    """Of its first pixel, in the padded image."""
    row: int
    """Of its first sample, from the first row of its view in the canvas."""
    rows_seen: int
    columns_seen: int
    """Its first rows and columns already hold scores of earlier windows; the rest of the canvas there
    may hold anything."""


class ViewPart(NamedTuple):
    """The windows of a view that a part of the result needs."""

    view: View
    top: int
    """First row of the padded image in the canvas."""
    height: int
    """Rows of the canvas."""
    windows: tuple[Window, ...]


class Part(NamedTuple):
    """Some rows of an image's result, made of some windows."""

    start: int
    end: int
    """Rows of the result."""
    views: tuple[ViewPart, ...]

    @property
    def height(self) -> int:
        """Rows of the canvas."""
        return sum(part.height for part in self.views)


def plan(size: Size, protocol: Protocol, rule: str, *, canvas_rows: int) -> list[Part]:
    """The parts in which an image's result is made: one where the canvas has room for all its views.

    Rows on both sides of a cut need the windows over it: those are computed once for each part.

    Raises:
        ValueError: where the canvas has no room for a single row of the result.
    """
    height = size[0]
    found = views(size, protocol)
    taps = [result_taps(view.rows, height, rule) for view in found]
    num_parts = 1
    while True:
        cuts = [height * i // num_parts for i in range(num_parts + 1)]
        parts = [
            Part(start, end, tuple(map(_view_part, found, (t.rows(start, end) for t in taps))))
            for start, end in itertools.pairwise(cuts)
        ]
        largest = max(part.height for part in parts)
        if largest <= canvas_rows:
            return parts
        if num_parts == height:
            raise ValueError(
                f"one row of an image of {size[0]}x{size[1]} pixels needs {largest} rows of scores, "
                f"canvas_gib has room for {canvas_rows}; give it more or fewer scales at a time"
            )
        num_parts = min(height, num_parts + max(1, num_parts // 4))


def _view_part(view: View, taps: Taps) -> ViewPart:
    used = taps.indices[taps.weights > 0]
    first, last = int(used.min()), int(used.max())
    rows, columns = view.rows, view.columns
    tops = [top for top in rows.starts if top <= last and top + rows.window > first]
    windows = [
        Window(top, left, top - tops[0], _seen(tops, i, rows), _seen(columns.starts, j, columns))
        for i, top in enumerate(tops)
        for j, left in enumerate(columns.starts)
    ]
    return ViewPart(view, tops[0], tops[-1] + rows.window - tops[0], tuple(windows))


def _seen(starts: Sequence[int], i: int, axis: Axis) -> int:
    return starts[i - 1] + axis.window - starts[i] if i else 0


def canvas_width(protocol: Protocol) -> int:
    """Columns of a canvas that every view of every image fits into."""
    return max(view.columns.padded for view in views((1, 10**6), protocol))


def canvas_height(protocol: Protocol, batch_size: int) -> int:
    """Rows of a canvas on which every pass of `batch_size` windows can be filled."""
    num_views = len(views((1, 1), protocol))
    tallest = sum(view.rows.padded for view in views((10**6, 1), protocol))
    # Fewer windows than a pass wait, of at most so many images; beside them one is coming, one is
    # being finished, and at the end of the canvas there may be too little room for another.
    num_waiting = -((batch_size - 1) // -num_views)
    return tallest * (num_waiting + 3)
