"""Class maps as pictures: palette, overlay, errors, legend, panels of input, truth and prediction; PNG.

Pure functions of arrays; images are RGB uint8 [height, width, 3].
"""

import math
import struct
import zlib
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Float, Float64, UInt8

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
_SWATCH = 28  # width of a color in the legend of a label set, pixels
_LEGEND_SHAPE = 4 / 3  # about its width over its height
_MOST_WIDTH = 2000  # to which pictures are enlarged, pixels
_SCALE = 256  # width of a gray scale, pixels


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


def gray(values: Float[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width"]:
    """Values within 0 .. 1 as gray: round(255 value), so 0 is black and 1 is white."""
    return np.rint(255 * np.clip(values, 0, 1)).astype(np.uint8)


def legend(names: Sequence[str], palette: Palette, *, scales: Sequence[str] = ()) -> Picture:
    """All classes of a label set: color, id and name, in as many columns as make a page.

    Args:
        names: of the classes, in the order of their ids.
        scales: what gray pictures show; each gets a scale from 0 (black) to 1 (white).
    """
    id_width = max(_text_width(str(i)) for i in range(len(names)))
    name_left = _MARGIN + _SWATCH + 8 + id_width + 8
    widths = [name_left + _text_width(name) + 2 * _MARGIN for name in names]

    def shape(num_rows: int) -> float:
        columns = [max(widths[i : i + num_rows]) for i in range(0, len(names), num_rows)]
        return sum(columns) / (num_rows * _LINE)

    rows_of_columns = [
        -(-len(names) // n) for n in range(1, len(names) + 1)
    ]  # columns of one length
    num_rows = min(rows_of_columns, key=lambda n: abs(math.log(shape(n) / _LEGEND_SHAPE)))
    columns = []
    for first in range(0, len(names), num_rows):
        ids = range(first, min(first + num_rows, len(names)))
        column = _blank(num_rows * _LINE, max(widths[i] for i in ids))
        for row, i in enumerate(ids):
            _draw_class(column[row * _LINE :], i, names[i], palette, name_left)
        columns.append(column)
    parts = [np.concatenate(columns, axis=1), *map(_gray_scale, scales)]
    width = max(part.shape[1] for part in parts)
    border = _blank(_MARGIN, width)
    return np.concatenate([border, *(_widened(part, width) for part in parts), border])


def encode_png(picture: RawImage | LabelMap) -> bytes:
    """A PNG file of an RGB picture, or of one channel."""
    swapped = picture[..., ::-1] if picture.ndim == 3 else picture
    is_encoded, encoded = cv2.imencode(".png", swapped)
    if not is_encoded:
        raise ValueError(
            f"a picture of {picture.shape[:2]} (height, width) is too large for a PNG file"
        )
    return encoded.tobytes()


def encode_indexed_png(labels: LabelMap, palette: Palette) -> bytes:
    """A PNG file that holds ids and shows their colors: color type 3 of the PNG specification.

    OpenCV reads its colors, Pillow its ids.
    """
    height, width = labels.shape
    rows = np.zeros((height, 1 + width), np.uint8)  # each row starts with its filter: 0 is none
    rows[:, 1:] = labels
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": palette.tobytes(),
        b"IDAT": zlib.compress(rows.tobytes(), 6),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


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
        line = _blank(_LINE, row.shape[1])
        _write(line, note, (_MARGIN, _LINE - 9))
        parts.append(line)
    return np.concatenate(parts)


def grid(panels: Sequence[Picture], *, columns: int) -> Picture:
    """Panels in rows of `columns`, each cell as large as the largest panel, filled up with white."""
    height = max(p.shape[0] for p in panels) + _MARGIN
    width = max(p.shape[1] for p in panels)
    cells = [_blank(height, width) for _ in panels]
    for cell, picture in zip(cells, panels, strict=True):
        cell[: picture.shape[0], : picture.shape[1]] = picture
    cells += [np.full_like(cells[0], _BACKGROUND)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def _enlarged(picture: Picture, min_height: int) -> Picture:
    height, width = picture.shape[:2]
    factor = max(1, min(-(-min_height // height), _MOST_WIDTH // width))
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _titled(title: str, picture: Picture) -> Picture:
    heading = _blank(_LINE, picture.shape[1])
    _write(heading, title, (0, _LINE - 7))
    return np.concatenate([heading, picture])


def _space(column: Picture) -> Picture:
    return _blank(column.shape[0], _MARGIN)


def _blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), _BACKGROUND, np.uint8)


def _draw_class(
    canvas: Picture, class_id: int, name: str, palette: Palette, name_left: int
) -> None:
    """Color, id (right-aligned) and name at the top left of `canvas`."""
    color = canvas[3 : _LINE - 3, _MARGIN : _MARGIN + _SWATCH]
    color[:] = _TEXT_COLOR  # a frame: classes may be white
    color[1:-1, 1:-1] = palette[class_id]
    number = str(class_id)
    _write(canvas, number, (name_left - 8 - _text_width(number), 15))
    _write(canvas, name, (name_left, 15))


def _gray_scale(title: str) -> Picture:
    """'0 [from black to white] 1  TITLE' on one line."""
    left = _MARGIN + 14
    right = left + _SCALE + 2
    canvas = _blank(_LINE + _MARGIN, right + 32 + _text_width(title) + _MARGIN)
    line = canvas[_MARGIN:]
    _write(line, "0", (_MARGIN, 15))
    line[3 : _LINE - 3, left:right] = _TEXT_COLOR
    line[4 : _LINE - 4, left + 1 : right - 1] = np.arange(_SCALE, dtype=np.uint8)[:, None]
    _write(line, "1", (right + 6, 15))
    _write(line, title, (right + 28, 15))
    return canvas


def _widened(picture: Picture, width: int) -> Picture:
    return np.concatenate([picture, _blank(len(picture), width - picture.shape[1])], axis=1)


def _legend(
    class_ids: Sequence[int], names: Sequence[str], palette: Palette, *, width: int
) -> Picture:
    lines: list[list[tuple[int, int]]] = [[]]  # of (class id, left edge)
    left = _MARGIN
    for class_id in class_ids:
        text_width = _text_width(names[class_id])
        if left + 20 + text_width > width and lines[-1]:
            lines.append([])
            left = _MARGIN
        lines[-1].append((class_id, left))
        left += 20 + text_width + 14
    canvas = _blank(_LINE * len(lines) + _MARGIN, width)
    for i, line in enumerate(lines):
        for class_id, left in line:
            top = i * _LINE + 8
            canvas[top : top + 12, left : left + 14] = _TEXT_COLOR  # a frame: classes may be white
            canvas[top + 1 : top + 11, left + 1 : left + 13] = palette[class_id]
            _write(canvas, names[class_id], (left + 19, top + 11))
    return canvas


def _text_width(text: str) -> int:
    return cv2.getTextSize(text, _FONT, 0.45, 1)[0][0]


def _write(canvas: Picture, text: str, position: tuple[int, int]) -> None:
    cv2.putText(canvas, text, position, _FONT, 0.45, _TEXT_COLOR, 1, cv2.LINE_AA)
