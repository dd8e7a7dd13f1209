"""Adaptive pooling and bilinear resizing, as exact linear maps.

* Both are matrices along each axis: exact for every size, and no scatter in the gradient. Where a row has few entries,
  CPUs and GPUs add those samples instead of multiplying with zeros.
* Pooling bins are PyTorch's: bin i of n covers floor(i L / n) .. ceil((i + 1) L / n), so bins overlap
  where n does not divide L. Where it does, sums of a reshape are the same thing for less work.
* `align_corners=True` maps the first and last sample onto each other (the authors' rule);
  False is the half-pixel rule without anti-aliasing (`jax.image.resize(..., antialias=False)`).
* Matrices are applied in float32 (float64 where the input is float64), whatever the input's precision.
* While `export` traces a network for images of any size, heights and widths are symbols (`is_static`).
  The same matrices are then computed on the device, in whole numbers up to the last division; nothing
  is chosen by the size.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64

from pspnet_jax.arrays import AnyArray

Size = int | Any
"""Samples along one axis: a number, or the symbol that JAX has for one (`is_static`)."""
Platform = str | None
"""Where an operation will run, a member of `PLATFORMS`; None: anywhere, the plain form of everything."""
PLATFORMS = ("cpu", "gpu", "tpu")  # as JAX names its devices; NVIDIA's and AMD's are 'gpu'
Pair = tuple[Size, Size]
Maps = Float[jax.Array, "batch _height _width channels"]
"""Feature maps or logits: batch and channels stay, height and width change."""


def is_static(*sizes: Size) -> bool:
    """Whether all sizes are numbers; of a network traced for any image size some are symbols."""
    return all(isinstance(size, int | np.integer) for size in sizes)


def pooling_bins(size: Size, num_bins: int) -> list[Pair]:
    """Start and end of each bin of an adaptive pooling along one axis of `size` samples."""
    return [(i * size // num_bins, -((i + 1) * size // -num_bins)) for i in range(num_bins)]


def pooling_matrix(size: Size, num_bins: int) -> Float[AnyArray, "bins size"]:
    """The matrix M with M @ x = adaptive average pooling of x along one axis: a float64 constant, unless
    the size is a symbol."""
    if not is_static(size):
        return symbolic_pooling_matrix(size, num_bins)
    matrix = np.zeros((num_bins, size))
    for i, (start, end) in enumerate(pooling_bins(size, num_bins)):
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def sample_positions(
    size: int, new_size: int, *, align_corners: bool
) -> Float64[np.ndarray, "new_size"]:
    """Where new samples lie among the old ones, the first of which is 0; by half pixels also beyond the ends."""
    target = np.arange(new_size)
    if align_corners:
        # A single new sample has no second corner: PyTorch takes the first old one.
        return target * ((size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    return (target + 0.5) * size / new_size - 0.5


class Neighbors(NamedTuple):
    """The two old samples that each new one lies between, and its distance from the lower one, 0..1."""

    lower: Int64[np.ndarray, "new_size"]
    upper: Int64[np.ndarray, "new_size"]
    fraction: Float64[np.ndarray, "new_size"]


def neighbors(size: int, new_size: int, *, align_corners: bool) -> Neighbors:
    """Of bilinear resizing along one axis; beyond the ends the end itself."""
    source = sample_positions(size, new_size, align_corners=align_corners).clip(0, size - 1)
    lower = np.clip(np.floor(source).astype(int), 0, max(size - 2, 0))
    return Neighbors(lower, np.minimum(lower + 1, size - 1), source - lower)


def resize_matrix(
    size: Size, new_size: Size, *, align_corners: bool
) -> Float[AnyArray, "new_size size"]:
    """The matrix R with R @ x = bilinear resizing of x along one axis: a float64 constant, unless a size
    is a symbol."""
    if not is_static(size, new_size):
        return symbolic_resize_matrix(size, new_size, align_corners=align_corners)
    lower, upper, fraction = neighbors(size, new_size, align_corners=align_corners)
    target = np.arange(new_size)
    matrix = np.zeros((new_size, size))
    matrix[target, lower] += 1 - fraction
    matrix[target, upper] += fraction
    return matrix


def symbolic_pooling_matrix(size: Size, num_bins: int) -> Float32[jax.Array, "bins size"]:
    """`pooling_matrix` of a size that is a symbol."""
    inside = jnp.stack([_within(size, start, end) for start, end in pooling_bins(size, num_bins)])
    counts = jnp.sum(inside, axis=1, keepdims=True, dtype=jnp.int32)
    return inside.astype(jnp.float32) / counts.astype(jnp.float32)


def symbolic_resize_matrix(
    size: Size, new_size: Size, *, align_corners: bool
) -> Float32[jax.Array, "new_size size"]:
    """`resize_matrix` of sizes that are symbols.

    Sample s weighs max(0, 1 - |source - s|), and source is a fraction of whole numbers: only the last
    division rounds.
    """
    target = jnp.arange(new_size, dtype=jnp.int32).reshape(-1, 1)
    sample = jnp.arange(size, dtype=jnp.int32).reshape(1, -1)
    numerator, denominator = _fractions(target, size, new_size, align_corners=align_corners)
    parts = jnp.maximum(denominator - jnp.abs(numerator - sample * denominator), 0)
    return parts.astype(jnp.float32) / denominator.astype(jnp.float32)


def _fractions(
    target: Int32[jax.Array, "*shape"], size: Size, new_size: Size, *, align_corners: bool
) -> tuple[Int32[jax.Array, "*shape"], Int32[jax.Array, ""]]:
    """`sample_positions` of new samples within the old ones: whole numbers, and what to divide them by.

    They fit 32 bits while size * new_size is below 2^30: logits of an eighth of images of 90,000 x 90,000 pixels.
    """
    last, count = _length(size) - 1, _length(new_size)
    if align_corners:
        return target * last, jnp.maximum(count - 1, 1)
    denominator = 2 * count
    return jnp.clip((2 * target + 1) * (last + 1) - count, 0, last * denominator), denominator


def _within(size: Size, start: Size, end: Size) -> Bool[jax.Array, "size"]:
    """Which samples of a symbolic size lie in start .. end."""
    sample = jnp.arange(size, dtype=jnp.int32)
    return (sample >= _length(start)) & (sample < _length(end))


def _length(size: Size) -> Int32[jax.Array, ""]:
    """A size on the device: of a symbolic one, the value that it has when the network runs."""
    return jnp.asarray(size, jnp.int32)


def adaptive_average_pool(x: Maps, num_bins: int) -> Maps:
    """Average over a grid of num_bins x num_bins bins.

    Args:
        x: feature maps [batch, height, width, channels].
        num_bins: bins per axis; where it does not divide the map, bins overlap as in PyTorch.

    Returns:
        [batch, num_bins, num_bins, channels], in the dtype of `x`.
    """
    batch, height, width, channels = x.shape
    if _divides(num_bins, x):
        rows, columns = height // num_bins, width // num_bins
        y = x.reshape(batch, height, num_bins, columns, channels).sum(3, dtype=_accumulator(x))
        # Else XLA for GPUs sums each bin in one thread, which takes twice as long. (CPUs need the same time.)
        y = jax.lax.optimization_barrier(y)
        y = y.reshape(batch, num_bins, rows, num_bins, channels).sum(2) / (rows * columns)
        return y.astype(x.dtype)
    return apply_matrices(x, pooling_matrix(height, num_bins), pooling_matrix(width, num_bins))


def adaptive_average_pools(x: Maps, bins: Sequence[int]) -> list[Maps]:
    """`adaptive_average_pool` for each of `bins`, in their order.

    The finest grid that divides the map is averaged first; the cells of every grid that divides that one
    are means of its cells, so `x` is read once for 1, 2, 3 and 6 bins. All sums are in float32 (float64
    where the input is float64) and rounded once.
    """
    dividing = [num_bins for num_bins in bins if _divides(num_bins, x)]
    if not dividing:
        return [adaptive_average_pool(x, num_bins) for num_bins in bins]
    cells = adaptive_average_pool(x.astype(_accumulator(x)), max(dividing))

    def pool(num_bins: int) -> Maps:
        source = cells if _divides(num_bins, cells) else x
        return adaptive_average_pool(source, num_bins).astype(x.dtype)

    return [pool(num_bins) for num_bins in bins]


def adaptive_max_pool(x: Maps, num_bins: int) -> Maps:
    """As `adaptive_average_pool`, with the maximum of each bin; of equal ones the first gets the gradient."""
    if not is_static(x.shape[1], x.shape[2]):
        return _symbolic_max_pool(_symbolic_max_pool(x, num_bins, axis=1), num_bins, axis=2)
    rows = [_largest(x[:, start:end], axis=1) for start, end in pooling_bins(x.shape[1], num_bins)]
    x = jnp.concatenate(rows, axis=1)
    columns = [
        _largest(x[:, :, start:end], axis=2) for start, end in pooling_bins(x.shape[2], num_bins)
    ]
    return jnp.concatenate(columns, axis=2)


def _largest(x: Maps, *, axis: int) -> Maps:
    """The maximum along one axis, which keeps length 1."""
    # Not x.max(): its gradient goes where x equals the maximum, and where XLA computes x once more for
    # the comparison, rounded otherwise, that is nowhere: the gradient is lost or infinite.
    position = jnp.argmax(x, axis=axis, keepdims=True)
    is_largest = jax.lax.broadcasted_iota(position.dtype, x.shape, axis) == position
    return jnp.sum(jnp.where(is_largest, x, 0), axis=axis, keepdims=True)


def _symbolic_max_pool(x: Maps, num_bins: int, *, axis: int) -> Maps:
    """Maxima of the bins along one axis whose size is a symbol; for inference, without `_largest`'s gradient."""
    size = x.shape[axis]
    shape = [1] * x.ndim
    shape[axis] = size
    bins = [
        jnp.max(
            x,
            axis=axis,
            keepdims=True,
            where=_within(size, start, end).reshape(shape),
            initial=-jnp.inf,
        )
        for start, end in pooling_bins(size, num_bins)
    ]
    return jnp.concatenate(bins, axis=axis)


def resize(x: Maps, size: Pair, *, align_corners: bool, platform: Platform = None) -> Maps:
    """Bilinear resizing of feature maps or logits to `size` = (height, width), without anti-aliasing.

    Args:
        platform: where it will run, 'cpu', 'gpu' or 'tpu' (None: anywhere); the result is the same but for
            rounding.
    """
    if x.shape[1:3] == size:
        return x
    if platform == "gpu" and _fit_32_bits(x.shape[1:3], size):
        y = _interpolate(x.astype(_accumulator(x)), size[0], axis=1, align_corners=align_corners)
        # Else each sample of the result is made of four of x, which takes longer than to store y.
        y = jax.lax.optimization_barrier(y)
        return _interpolate(y, size[1], axis=2, align_corners=align_corners).astype(x.dtype)
    rows = resize_matrix(x.shape[1], size[0], align_corners=align_corners)
    columns = resize_matrix(x.shape[2], size[1], align_corners=align_corners)
    return apply_matrices(x, rows, columns, platform=platform)


def _fit_32_bits(old: Sequence[Size], new: Sequence[Size]) -> bool:
    """Whether `_fractions` of both axes are known to do so."""
    return is_static(*old, *new) and all(a * b < 2**30 for a, b in zip(old, new, strict=True))


def _interpolate(x: Maps, new_size: int, *, axis: int, align_corners: bool) -> Maps:
    """`apply_matrix` of a resize matrix for GPUs: its two samples and their weights are computed where they are
    used, which takes less time than to read them."""
    size = x.shape[axis]
    if size == new_size:
        return x

    def between(x: jax.Array) -> jax.Array:
        target = jnp.arange(new_size, dtype=jnp.int32)
        position, unit = _fractions(target, size, new_size, align_corners=align_corners)
        lower = jax.lax.div(position, unit)
        upper = jnp.minimum(lower + 1, size - 1)
        shape = [new_size if i == axis else 1 for i in range(x.ndim)]
        fraction = ((position - lower * unit).astype(x.dtype) / unit.astype(x.dtype)).reshape(shape)
        below = _take(x, lower, axis)
        return below + (_take(x, upper, axis) - below) * fraction

    matrix = resize_matrix(size, new_size, align_corners=align_corners)
    return _linear(between, x, matrix, axis=axis, platform="gpu")


def shifted_resize_matrices(
    size: Size, new_size: Size, *, num_shifts: int, align_corners: bool
) -> Float[jax.Array, "new_size shifts size"]:
    """`resize_matrix` moved by -r .. r samples, where num_shifts = 2 r + 1, with zero rows beyond the ends.

    Result [:, i] applied to x is what tap i of a convolution with `num_shifts` taps and zero padding sees
    of the resized x.
    """
    reach = num_shifts // 2
    matrix = resize_matrix(size, new_size, align_corners=align_corners)
    padded = jnp.pad(matrix, ((reach, reach), (0, 0)))
    return jnp.stack([padded[i : i + new_size] for i in range(num_shifts)], axis=1)


def _divides(num_bins: int, x: Maps) -> bool:
    """Whether all bins along either axis are known to be of one size without overlap."""
    height, width = x.shape[1:3]
    return is_static(height, width) and height % num_bins == 0 and width % num_bins == 0


def _accumulator(x: jax.Array) -> np.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def apply_matrices(
    x: Maps,
    rows: Float[AnyArray, "new_height height"],
    columns: Float[AnyArray, "new_width width"],
    *,
    platform: Platform = None,
) -> Maps:
    """rows @ x @ columns^T for every image and channel, in the dtype of `x`."""
    y = apply_matrix(x, rows, axis=1, platform=platform)
    return apply_matrix(y, columns, axis=2, platform=platform).astype(x.dtype)


def apply_matrix(
    x: Maps, matrix: Float[AnyArray, "new_size size"], *, axis: int, platform: Platform = None
) -> Maps:
    """The matrix times x along one axis, 1 (down) or 2 (across), in float32 (float64 of float64)."""
    x = x.astype(_accumulator(x))
    if platform in _WIDEST_SUMS and isinstance(matrix, np.ndarray):
        bands = _bands(matrix)
        if bands.places.shape[1] <= _WIDEST_SUMS[platform]:
            sums = functools.partial(_weighted_sums, bands=bands, axis=axis)
            return _linear(sums, x, matrix, axis=axis, platform=platform)
    # The weights are positions, not learned values: rounding them to TF32 or bfloat16 would move pixels.
    return jnp.einsum(
        "Hh,nhwc->nHwc" if axis == 1 else "Ww,nhwc->nhWc",
        matrix.astype(x.dtype),
        x,
        precision=jax.lax.Precision.HIGHEST,
    )


# Up to so many entries in each row of a matrix, sums of samples take less time than the product: both samples of a
# resizing, and those of its gradient, on CPUs of a doubling, on GPUs (float32 leaves products to their slow units) of
# up to 16 times.
_WIDEST_SUMS = {"cpu": 5, "gpu": 33}


class _Bands(NamedTuple):
    """The entries of each row of a matrix from its first to its last one that is not zero, all rows of one
    length."""

    places: Int32[np.ndarray, "rows entries"]
    weights: Float[np.ndarray, "rows entries"]


def _bands(matrix: Float[np.ndarray, "rows columns"]) -> _Bands:
    filled = matrix != 0
    is_empty = ~filled.any(axis=1)
    first, last = filled.argmax(axis=1), matrix.shape[1] - 1 - filled[:, ::-1].argmax(axis=1)
    length = int(np.where(is_empty, 1, last - first + 1).max())
    first = np.maximum.accumulate(
        np.where(is_empty, 0, first)
    )  # places ascend, over empty rows too
    start = np.minimum(first, matrix.shape[1] - length)
    places = (start[:, None] + np.arange(length)).astype(np.int32)
    return _Bands(places, np.take_along_axis(matrix, places, axis=1))


def _weighted_sums(x: Maps, bands: _Bands, axis: int) -> Maps:
    """`apply_matrix` as sums of samples, which XLA computes where they are used."""
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    parts = (
        _take(x, places, axis) * jnp.asarray(weights.reshape(shape), x.dtype)
        for places, weights in zip(bands.places.T, bands.weights.T, strict=True)
    )
    return functools.reduce(jnp.add, parts)


def _take(x: Maps, places: Int32[AnyArray, "new_size"], axis: int) -> Maps:
    """Samples at places that ascend and lie within."""
    index = (slice(None),) * axis + (places,)
    return x.at[index].get(
        mode="promise_in_bounds", indices_are_sorted=True, wrap_negative_indices=False
    )


def _linear(
    form: Callable[[Maps], Maps],
    x: Maps,
    matrix: Float[AnyArray, "new_size size"],
    *,
    axis: int,
    platform: Platform,
) -> Maps:
    """form(x), which is the matrix times x; the gradient is the transposed matrix times that of the result."""

    def gradient(_: None, g: jax.Array) -> tuple[jax.Array]:
        return (apply_matrix(g, matrix.T, axis=axis, platform=platform),)

    apply = jax.custom_vjp(form)
    apply.defvjp(lambda x: (form(x), None), gradient)
    return apply(x)
