"""Where windows lie in images of any size, and where their scores lie in the result: whole numbers only.

* A `View` is what a protocol makes of an image at one scale: its size, its padding, its windows.
* The scores of a view's windows are added up in rows of a canvas (see `canvas`). `result_taps` says of
  which samples of the canvas each row and column of the result is made: cutting off the padding, dividing
  by the number of windows over a sample and resizing are one step.
* `plan` cuts results that would need more of the canvas than there is into rectangles, each with the
  windows that touch it.
"""

import itertools
import math
from collections.abc import Callable, Iterable
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
    column: int
    """Of its first sample, from the first one of its view in the canvas."""
    rows_seen: int
    columns_seen: int
    """Its first rows and columns already hold scores of earlier windows; the rest of the canvas there
    may hold anything."""


class Span(NamedTuple):
    """The windows along one axis of a view that some samples of the result need."""

    starts: tuple[int, ...]
    window: int

    @property
    def length(self) -> int:
        """Samples from the first window's first to the last one's last."""
        return self.starts[-1] + self.window - self.starts[0]

    def seen(self, i: int) -> int:
        """How many samples of window i the one before it has."""
        return self.starts[i - 1] + self.window - self.starts[i] if i else 0


class ViewPart(NamedTuple):
    """The windows of a view that a part of the result needs."""

    view: View
    rows: Span
    columns: Span

    @property
    def windows(self) -> list[Window]:
        """In the order in which they must be added."""
        return [
            Window(
                top,
                left,
                top - self.rows.starts[0],
                left - self.columns.starts[0],
                self.rows.seen(i),
                self.columns.seen(j),
            )
            for i, top in enumerate(self.rows.starts)
            for j, left in enumerate(self.columns.starts)
        ]


class Part(NamedTuple):
    """A rectangle of an image's result, made of some windows."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    """First and end, of the result."""
    views: tuple[ViewPart, ...]

    @property
    def height(self) -> int:
        """Rows of the canvas: views lie below each other."""
        return sum(part.rows.length for part in self.views)


def plan(size: Size, protocol: Protocol, rule: str, *, canvas: Size) -> list[Part]:
    """The parts in which an image's result is made: one where the canvas has room for all its views.

    Both sides of a cut need the windows over it: those are computed once for each part.

    Args:
        canvas: its rows and columns.

    Raises:
        ValueError: where the canvas has no room for a single sample of the result.
    """
    found = views(size, protocol)
    down = [(view.rows, result_taps(view.rows, size[0], rule)) for view in found]
    across = [
        (view.columns, result_taps(view.columns, size[1], rule, mirrored=view.mirrored))
        for view in found
    ]
    return [
        Part(rows, columns, tuple(map(ViewPart, found, row_spans, column_spans)))
        for rows, row_spans in _cuts(down, canvas[0], sum)
        for columns, column_spans in _cuts(across, canvas[1], max)
    ]


def _cuts(
    axes: list[tuple[Axis, Taps]], limit: int, total: Callable[[Iterable[int]], int]
) -> list[tuple[tuple[int, int], list[Span]]]:
    """One axis of the result in as few pieces as fit: first and end, and the windows of each view."""
    side = len(axes[0][1].indices)

    def pieces(count: int) -> list[tuple[tuple[int, int], list[Span]]]:
        cuts = [side * i // count for i in range(count + 1)]
        return [
            ((a, b), [_span(axis, taps.rows(a, b)) for axis, taps in axes])
            for a, b in itertools.pairwise(cuts)
        ]

    def needed(found: list[tuple[tuple[int, int], list[Span]]]) -> int:
        return max(total(span.length for span in spans) for _, spans in found)

    count, found = 1, pieces(1)
    if needed(found) > limit and (least := needed(pieces(side))) > limit:
        raise ValueError(
            "canvas_gib is too small for the windows of one image at all its scales: it must be "
            f"at least {least / max(limit, 1):.2f} times as much"
        )
    while needed(found) > limit:
        count = min(side, count + max(1, count // 4))
        found = pieces(count)
    return found


def _span(axis: Axis, taps: Taps) -> Span:
    used = taps.indices[taps.weights > 0]
    first, last = int(used.min()), int(used.max())
    touched = [start for start in axis.starts if start <= last and start + axis.window > first]
    return Span(tuple(touched), axis.window)


def canvas_size(protocol: Protocol, batch_size: int, samples: int) -> Size:
    """Rows and columns of a canvas of at most so many samples.

    As wide as the widest image where that leaves rows enough, and no taller than what fills every pass of
    `batch_size` windows.
    """
    axes = [view.rows for view in views((10**6, 1), protocol)]
    across = [view.columns for view in views((1, 10**6), protocol)]
    width = max(axis.padded for axis in across)
    # A sample of the result lies in two windows, at the end in three; windows overlap by a third.
    if samples // width < sum(min(axis.padded, axis.window * 7 // 4) for axis in axes):
        squares = math.isqrt(samples // len(axes))
        width = min(width, max(squares, 2 * max(axis.window for axis in across)))
    # Fewer windows than a pass wait, of at most so many images; beside them one is coming, one is
    # being finished, and at the end of the canvas there may be too little room for another.
    num_images = 3 - ((batch_size - 1) // -len(axes))
    tallest = sum(axis.padded for axis in axes)
    return min(samples // width, tallest * num_images), width
