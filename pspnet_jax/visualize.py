"""Class maps as pictures: palette, overlay, errors, and panels of input, truth and prediction.

Pure functions of arrays; images are RGB uint8 [height, width, 3].
"""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from pspnet_jax.arrays import IGNORE_LABEL, LabelMap, RawImage

Palette = UInt8[np.ndarray, "256 3"]
Picture = UInt8[np.ndarray, "_height _width 3"]
"""An RGB picture whose size may change within a function."""

ERROR_COLOR = (230, 40, 60)
HEAT_COLORS = ((37, 99, 205), (217, 85, 10))
"""Of the diagonal and of the other cells of a confusion matrix; both can be told apart by anybody."""

_BACKGROUND = 255
_TEXT_COLOR = (30, 30, 30)
_MARGIN = 8
_LINE = 22  # height of a line of text, pixels
_FONT = cv2.FONT_HERSHEY_SIMPLEX


def colorize(labels: LabelMap, palette: Palette) -> RawImage:
    """Each pixel in the color of its class; void is black."""
    return palette[labels]


def overlay(
    image: RawImage, labels: LabelMap, palette: Palette, *, opacity: float = 0.5
) -> RawImage:
    """The class colors laid over the photograph; void pixels show the photograph alone."""
    mixed = (1 - opacity) * image + opacity * colorize(labels, palette)
    is_void = (labels == IGNORE_LABEL)[..., None]
    return np.where(is_void, image, np.rint(mixed).astype(np.uint8))


def errors(image: RawImage, truth: LabelMap, prediction: LabelMap) -> RawImage:
    """Wrong pixels in `ERROR_COLOR`, correct ones the photograph, gray and dimmed; void is black."""
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    picture = np.repeat((64 + gray // 2)[..., None], 3, axis=2)
    picture[truth != prediction] = ERROR_COLOR
    picture[truth == IGNORE_LABEL] = 0
    return picture


def heat_map(
    shares: Float64[np.ndarray, "rows rows"], *, cell: int
) -> UInt8[np.ndarray, "height height 4"]:
    """A confusion matrix as RGBA squares of `cell` pixels: the larger the share, the less transparent.

    Args:
        shares: 0 .. 1. The square root is shown, so that rare confusions are seen; NaN is transparent.
    """
    picture = np.zeros((*shares.shape, 4), np.uint8)
    picture[..., :3] = HEAT_COLORS[1]
    diagonal = np.arange(len(shares))
    picture[diagonal, diagonal, :3] = HEAT_COLORS[0]
    picture[..., 3] = np.rint(255 * np.sqrt(np.nan_to_num(shares)))
    return picture.repeat(cell, axis=0).repeat(cell, axis=1)


def shrunk(picture: Picture, max_width: int, max_height: int | None = None) -> Picture:
    """The picture brought into a size, pixels; one that fits is left as it is."""
    height, width = picture.shape[:2]
    factor = min(max_width / width, (max_height or height) / height)
    if factor >= 1:
        return picture
    size = (max(1, round(factor * width)), max(1, round(factor * height)))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def panel(
    pictures: Mapping[str, Picture],
    *,
    class_ids: Sequence[int],
    names: Sequence[str],
    palette: Palette,
    min_height: int = 240,
    note: str = "",
) -> Picture:
    """Titled pictures of equal size side by side, with a legend of `class_ids` below.

    Args:
        pictures: title -> picture.
        class_ids: the classes that occur in them, in the order of the legend.
        min_height: smaller pictures are enlarged by a whole factor, in pixels.
        note: a sentence below the legend.
    """
    columns = [_titled(title, _enlarged(p, min_height)) for title, p in pictures.items()]
    row = np.concatenate([part for column in columns for part in (column, _space(column))], axis=1)
    row = np.concatenate([_space(row), row], axis=1)
    parts = [row, _legend(class_ids, names, palette, width=row.shape[1])]
    if note:
        line = np.full((_LINE, row.shape[1], 3), _BACKGROUND, np.uint8)
        _write(line, note, (_MARGIN, _LINE - 9))
        parts.append(line)
    return np.concatenate(parts)


def grid(panels: Sequence[Picture], *, columns: int) -> Picture:
    """Panels in rows of `columns`, each cell as large as the largest panel, filled up with white."""
    height = max(p.shape[0] for p in panels) + _MARGIN
    width = max(p.shape[1] for p in panels)
    cells = [np.full((height, width, 3), _BACKGROUND, np.uint8) for _ in panels]
    for cell, picture in zip(cells, panels, strict=True):
        cell[: picture.shape[0], : picture.shape[1]] = picture
    cells += [np.full_like(cells[0], _BACKGROUND)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def _enlarged(picture: Picture, min_height: int) -> Picture:
    factor = -(-min_height // picture.shape[0])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _titled(title: str, picture: Picture) -> Picture:
    heading = np.full((_LINE, picture.shape[1], 3), _BACKGROUND, np.uint8)
    _write(heading, title, (0, _LINE - 7))
    return np.concatenate([heading, picture])


def _space(column: Picture) -> Picture:
    return np.full((column.shape[0], _MARGIN, 3), _BACKGROUND, np.uint8)


def _legend(
    class_ids: Sequence[int], names: Sequence[str], palette: Palette, *, width: int
) -> Picture:
    lines: list[list[tuple[int, int]]] = [[]]  # of (class id, left edge)
    left = _MARGIN
    for class_id in class_ids:
        (text_width, _), _ = cv2.getTextSize(names[class_id], _FONT, 0.45, 1)
        if left + 20 + text_width > width and lines[-1]:
            lines.append([])
            left = _MARGIN
        lines[-1].append((class_id, left))
        left += 20 + text_width + 14
    canvas = np.full((_LINE * len(lines) + _MARGIN, width, 3), _BACKGROUND, np.uint8)
    for i, line in enumerate(lines):
        for class_id, left in line:
            top = i * _LINE + 8
            canvas[top : top + 12, left : left + 14] = _TEXT_COLOR  # a frame: classes may be white
            canvas[top + 1 : top + 11, left + 1 : left + 13] = palette[class_id]
            _write(canvas, names[class_id], (left + 19, top + 11))
    return canvas


def _write(canvas: Picture, text: str, position: tuple[int, int]) -> None:
    cv2.putText(canvas, text, position, _FONT, 0.45, _TEXT_COLOR, 1, cv2.LINE_AA)
