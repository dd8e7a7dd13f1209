"""Class scores of windows on their way to a result, on the device.

* A canvas holds scores of many windows at once, of several scales and images: [lane, row, column, class].
  Its shape depends on the protocol and on the memory that is granted, not on the images. Each device
  has one lane.
* `add_windows` adds scores where their windows lie. A sample that no earlier window has reached is set, so
  that a canvas need not be cleared.
* `make_tile` makes a tile of a result: samples of the canvas are combined as `Taps` say (dividing, cutting
  and resizing in one step), the fields averaged, the best class taken. Where they lie is an argument: a
  compiled tile serves every size, and no volume of the size of the result ever exists.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped

from pspnet_jax.arrays import Images, Logits
from pspnet_jax.resample import Maps
from pspnet_jax.taps import Taps

TILE_ROWS, TILE_COLUMNS = 64, 1024  # pixels of a result that are made at once

Canvas = Float32[jax.Array, "_rows _columns classes"]
"""One lane."""
Scores = Float32[jax.Array, "windows height width classes"]
Places = Int32[jax.Array, "windows 4"]
"""Of each window: its first row and column in the canvas, and how many of its first rows and columns
hold scores of earlier windows already."""


def window_scores(
    logits_of: Callable[[Images], Logits], images: Images, *, averages: str, flip: bool
) -> Scores:
    """What windows are averaged as.

    Args:
        logits_of: normalized images -> logits of the same height and width.
        images: normalized.
        averages: 'probabilities', 'summed_logits' or 'logits' (see `protocols.Rules`).
        flip: together with the mirror images; not used for 'logits'.
    """
    if averages == "logits" or not flip:
        logits = logits_of(images).astype(jnp.float32)
        return logits if averages == "logits" else jax.nn.softmax(logits, axis=-1)
    # One after the other: on a CPU, two passes of one window take a fifth less time than one of two.
    upright = logits_of(images).astype(jnp.float32)
    mirrored = logits_of(images[:, :, ::-1]).astype(jnp.float32)[:, :, ::-1]
    if averages == "summed_logits":
        return jax.nn.softmax(upright + mirrored, axis=-1)
    return (jax.nn.softmax(upright, axis=-1) + jax.nn.softmax(mirrored, axis=-1)) / 2


def add_windows(canvas: Canvas, scores: Scores, places: Places, count: jax.Array) -> Canvas:
    """Add the first `count` windows to the canvas, one after the other."""
    height, width, _ = scores.shape[1:]
    rows = jax.lax.broadcasted_iota(np.int32, (height, width, 1), 0)
    columns = jax.lax.broadcasted_iota(np.int32, (height, width, 1), 1)

    def add(i: jax.Array, canvas: Canvas) -> Canvas:
        row, column, rows_seen, columns_seen = places[i]
        corner = (row, column, jnp.zeros_like(row))
        there = jax.lax.dynamic_slice(canvas, corner, scores.shape[1:])
        seen = (rows < rows_seen) | (columns < columns_seen)
        return jax.lax.dynamic_update_slice(canvas, jnp.where(seen, there, 0) + scores[i], corner)

    return jax.lax.fori_loop(0, count, add, canvas)


class AxisTaps(NamedTuple):
    """Along one axis of a tile, for each field that is averaged."""

    indices: Int32[np.ndarray | jax.Array, "*fields taps pixels"]
    weights: Float32[np.ndarray | jax.Array, "*fields taps pixels"]


class Tile(NamedTuple):
    """What is made of one tile; what was not asked for is None."""

    class_map: Shaped[jax.Array, "rows columns"]
    confidence: Float32[jax.Array, "rows columns"] | None
    entropy: Float32[jax.Array, "rows columns"] | None
    probabilities: Float[jax.Array, "rows columns classes"] | None


class Wanted(NamedTuple):
    """Which parts of a `Tile` are made beside the class map."""

    confidence: bool = False
    entropy: bool = False
    probabilities: Literal["float16", "float32"] | None = None


def make_tile(
    canvas: Canvas, rows: AxisTaps, columns: AxisTaps, *, of_logits: bool, wanted: Wanted
) -> Tile:
    """A tile of a result.

    Args:
        canvas: scores.
        rows: rows of the canvas for each row of the tile.
        columns: likewise.
        of_logits: the canvas holds logits: the softmax of each field is averaged.
        wanted: beside the class map.
    """
    num_fields, num_taps = rows.indices.shape[:2]

    def at(field: jax.Array, i: int, j: int) -> jax.Array:
        samples = canvas.at[rows.indices[field, i][:, None], columns.indices[field, j][None]]
        weights = rows.weights[field, i][:, None] * columns.weights[field, j][None]
        return samples.get(mode="clip") * weights[..., None]

    def field_scores(field: jax.Array) -> jax.Array:
        if num_taps == columns.indices.shape[1] == 2:
            scores = at(field, 0, 0) + at(field, 0, 1) + at(field, 1, 0) + at(field, 1, 1)
        else:
            down, across = (AxisTaps(*(x[field] for x in axis)) for axis in (rows, columns))
            scores = _combine(_combine(canvas, down, axis=0), across, axis=1)
        return jax.nn.softmax(scores, axis=-1) if of_logits else scores

    shape = (rows.indices.shape[2], columns.indices.shape[2], canvas.shape[-1])
    total = jax.lax.fori_loop(
        0, num_fields, lambda i, total: total + field_scores(i), jnp.zeros(shape, canvas.dtype)
    )
    return _described(total / num_fields, wanted)


def _combine(x: Canvas, taps: AxisTaps, *, axis: int) -> Canvas:
    """Along one axis, tap by tap: many taps are a sum over rows, then over columns."""

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        weights = jnp.expand_dims(taps.weights[i], (1, 2) if axis == 0 else (0, 2))
        return total + jnp.take(x, taps.indices[i], axis=axis, mode="clip") * weights

    shape = list(x.shape)
    shape[axis] = taps.indices.shape[1]
    return jax.lax.fori_loop(0, taps.indices.shape[0], add, jnp.zeros(shape, x.dtype))


def _described(probabilities: jax.Array, wanted: Wanted) -> Tile:
    log_classes = np.log(max(probabilities.shape[-1], 2))
    return Tile(
        class_map=jnp.argmax(probabilities, axis=-1).astype(jnp.uint8),
        confidence=jnp.max(probabilities, axis=-1) if wanted.confidence else None,
        entropy=(
            jnp.sum(jax.scipy.special.entr(probabilities), axis=-1) / log_classes
            if wanted.entropy
            else None
        ),
        probabilities=probabilities.astype(wanted.probabilities) if wanted.probabilities else None,
    )


def stack_taps(fields: list[Taps], offsets: list[int], *, pixels: int) -> AxisTaps:
    """Taps of one axis of a tile as arrays of a shape that does not depend on the image.

    Args:
        fields: of each field, at most `pixels` long; the rest repeats the last pixel.
        offsets: added to the indices of each.
    """
    # Two, four, eight: few shapes, for each is one compilation.
    num_taps = max(2, 1 << (max(taps.indices.shape[1] for taps in fields) - 1).bit_length())
    indices = np.zeros((len(fields), num_taps, pixels), np.int32)
    weights = np.zeros((len(fields), num_taps, pixels), np.float32)
    for i, (taps, offset) in enumerate(zip(fields, offsets, strict=True)):
        length, used = taps.indices.shape
        indices[i, :used, :length] = taps.indices.T + offset
        weights[i, :used, :length] = taps.weights.T
        indices[i, :, length:] = indices[i, :, length - 1 : length]
    return AxisTaps(indices, weights)


def stack_scores(scores: Sequence[Maps]) -> Canvas:
    """Scores of each view of some images as a canvas: all views of the first image, then the second's."""
    widest = max(each.shape[2] for each in scores)
    padded = [
        jnp.pad(each, ((0, 0), (0, 0), (0, widest - each.shape[2]), (0, 0))) for each in scores
    ]
    together = jnp.concatenate(padded, axis=1)
    return together.reshape(-1, widest, together.shape[-1])
