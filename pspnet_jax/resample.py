"""Adaptive pooling and bilinear resizing, as exact linear maps.

* Both are constant matrices along each axis: exact for every size, no gather in the forward pass and
  no scatter in the gradient.
* Pooling bins are PyTorch's: bin i of n covers floor(i L / n) .. ceil((i + 1) L / n), so bins overlap
  where n does not divide L. Where it does, the mean of a reshape is the same thing for less work.
* `align_corners=True` maps the first and last sample onto each other (the authors' rule);
  False is the half-pixel rule without anti-aliasing (`jax.image.resize(..., antialias=False)`).
* Matrices are applied in float32 (float64 where the input is float64), whatever the input's precision.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float64

Pair = tuple[int, int]
Maps = Float[jax.Array, "batch _height _width channels"]
"""Feature maps or logits: batch and channels stay, height and width change."""


def pooling_bins(size: int, num_bins: int) -> list[Pair]:
    """Start and end of each bin of an adaptive pooling along one axis of `size` samples."""
    return [(i * size // num_bins, -((i + 1) * size // -num_bins)) for i in range(num_bins)]


def pooling_matrix(size: int, num_bins: int) -> Float64[np.ndarray, "bins size"]:
    """The matrix M with M @ x = adaptive average pooling of x along one axis."""
    matrix = np.zeros((num_bins, size))
    for i, (start, end) in enumerate(pooling_bins(size, num_bins)):
        matrix[i, start:end] = 1 / (end - start)
    return matrix


def resize_matrix(
    size: int, new_size: int, *, align_corners: bool
) -> Float64[np.ndarray, "new_size size"]:
    """The matrix R with R @ x = bilinear resizing of x along one axis."""
    target = np.arange(new_size)
    if align_corners:
        # A single output sample has no second corner: PyTorch takes the first input sample.
        source = target * ((size - 1) / (new_size - 1) if new_size > 1 else 0.0)
    else:
        source = np.clip((target + 0.5) * size / new_size - 0.5, 0, size - 1)
    lower = np.clip(np.floor(source).astype(int), 0, max(size - 2, 0))
    upper = np.minimum(lower + 1, size - 1)
    matrix = np.zeros((new_size, size))
    matrix[target, lower] += 1 - (source - lower)
    matrix[target, upper] += source - lower
    return matrix


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
        cells = (batch, num_bins, height // num_bins, num_bins, width // num_bins, channels)
        return x.reshape(cells).mean(axis=(2, 4), dtype=_accumulator(x)).astype(x.dtype)
    return _separable(x, pooling_matrix(height, num_bins), pooling_matrix(width, num_bins))


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


def resize(x: Maps, size: Pair, *, align_corners: bool) -> Maps:
    """Bilinear resizing of feature maps or logits to `size` = (height, width), without anti-aliasing."""
    if x.shape[1:3] == size:
        return x
    rows = resize_matrix(x.shape[1], size[0], align_corners=align_corners)
    columns = resize_matrix(x.shape[2], size[1], align_corners=align_corners)
    return _separable(x, rows, columns)


def shifted_resize_matrices(
    size: int, new_size: int, *, num_shifts: int, align_corners: bool
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
    """Whether all bins along either axis are of one size and do not overlap."""
    return x.shape[1] % num_bins == 0 and x.shape[2] % num_bins == 0


def _accumulator(x: jax.Array) -> np.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _separable(
    x: Maps,
    rows: Float[np.ndarray, "new_height height"],
    columns: Float[np.ndarray, "new_width width"],
) -> Maps:
    """rows @ x @ columns^T for every image and channel."""
    dtype = _accumulator(x)

    def contract(equation: str, matrix: np.ndarray, maps: jax.Array) -> jax.Array:
        # The weights are positions, not learned values: rounding them to TF32 or bfloat16 would move pixels.
        return jnp.einsum(equation, matrix.astype(dtype), maps, precision=jax.lax.Precision.HIGHEST)

    y = contract("Hh,nhwc->nHwc", rows, x.astype(dtype))
    return contract("Ww,nhwc->nhWc", columns, y).astype(x.dtype)
