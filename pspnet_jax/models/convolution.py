"""Convolution, in the form that is fastest where it runs.

* `direct` is the plain statement, XLA's convolution. Every other form is the same sums in another order:
  `matrix_product` (1x1 kernels), `winograd` (fewer multiplications) and `interleaved` (a dilated
  convolution as a plain one of every d-th pixel).
* `convolve` chooses by shape and platform, for the value and for the gradient of the kernel apart. The
  measurements behind the choice are in experiments/README.md ("Forms of an operation").
* The platform is an argument and never asked of JAX: what is compiled here may run elsewhere.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pspnet_jax.arrays import Features
from pspnet_jax.resample import PLATFORMS, Platform, Size, is_static

Kernel = Float[jax.Array, "kernel_height kernel_width in_channels out_channels"]
Parts = Float[jax.Array, "_parts _height _width _channels"]
"""Features taken apart: dilation^2 maps of each image."""
Form = Callable[[Features, Kernel, int], Features]
"""(map, kernel, dilation) -> map of the same size: a convolution at stride 1."""

_MOST_CHANNELS = 1024
"""Most input channels that `winograd` takes at once: what it makes of a map is four times the map."""


def check_platform(platform: Platform) -> None:
    """Raise ValueError for a name that would silently mean the plain forms ('cuda')."""
    if platform is not None and platform not in PLATFORMS:
        raise ValueError(f"platform={platform!r} is not None or one of {', '.join(PLATFORMS)}")


def convolve(
    x: Features, kernel: Kernel, *, stride: int = 1, dilation: int = 1, platform: Platform = None
) -> Features:
    """Cross-correlation of [batch, h, w, in] with [kh, kw, in, out], padded to keep the size at stride 1.

    Args:
        kernel: odd sizes; zeros are padded as PyTorch does, dilation * (size - 1) / 2 on every side.
        platform: where it will run. Forms differ by rounding alone; some have no forward-mode derivative
            (`jax.jvp`), which the plain ones (None) have.

    Returns:
        [batch, ceil(h / stride), ceil(w / stride), out].
    """
    if kernel.shape[:2] == (1, 1) and platform == "cpu":
        return matrix_product(x[:, ::stride, ::stride], kernel)
    if stride == 1 and is_static(*x.shape):
        arguments = (x, kernel, dilation, platform)
        forms = {_form_of_value(*arguments), _form_of_kernel_gradient(*arguments)}
        if winograd in forms:
            return _convolve_in_parts(*arguments)
        if forms != {direct}:
            return _convolve(*arguments)
    return direct(x, kernel, dilation, stride=stride)


def _convolve_in_parts(x: Features, kernel: Kernel, dilation: int, platform: Platform) -> Features:
    """A sum over groups of input channels, so that what `winograd` makes of one is gone before the next.

    That is so in a training step, where `programs.compile_step` keeps the barriers.
    """
    num_groups = -(-x.shape[3] // _MOST_CHANNELS)
    maps = jnp.array_split(x, num_groups, axis=3)
    kernels = jnp.array_split(kernel, num_groups, axis=2)
    y = _convolve(maps[0], kernels[0], dilation, platform)
    for part, part_kernel in zip(maps[1:], kernels[1:], strict=True):
        # Its gradient is a barrier, too: that of a group's map is there before the next group's is begun.
        part, y = jax.lax.optimization_barrier((part, y))
        y = y + _convolve(part, part_kernel, dilation, platform)
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Features, kernel: Kernel, dilation: int, platform: Platform) -> Features:
    """At stride 1, with forms of its own for the value and both gradients."""
    return _form_of_value(x, kernel, dilation, platform)(x, kernel, dilation)


def _convolve_forward(x: Features, kernel: Kernel, dilation: int, platform: Platform):
    return _convolve(x, kernel, dilation, platform), (x, kernel)


def _convolve_backward(dilation: int, platform: Platform, saved, gradient: Features):
    """Gradients of map and kernel."""
    # Else XLA would keep what `winograd` makes of them in the forward pass, four times the map, or make it
    # again before the gradient is there. (XLA for CPUs does so where `programs.compile_step` tells it to.)
    x, kernel, gradient = jax.lax.optimization_barrier((*saved, gradient))
    if _form_of_value(x, kernel, dilation, platform) is winograd:
        of_map = winograd(gradient, kernel, dilation, mirrored=True)
    else:
        _, transpose = jax.vjp(lambda x: direct(x, kernel, dilation), x)
        (of_map,) = transpose(gradient)
    form = _form_of_kernel_gradient(x, kernel, dilation, platform)
    _, transpose = jax.vjp(lambda kernel: form(x, kernel, dilation), kernel)
    return of_map, *transpose(gradient)


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _form_of_value(x: Features, kernel: Kernel, dilation: int, platform: Platform) -> Form:
    if platform == "cpu" and min(kernel.shape[2:]) >= 128 and _saves(x, kernel, dilation):
        return winograd
    return direct


def _form_of_kernel_gradient(
    x: Features, kernel: Kernel, dilation: int, platform: Platform
) -> Form:
    if platform == "cpu" and min(kernel.shape[2:]) >= 64 and _saves(x, kernel, dilation):
        return winograd
    if platform == "gpu" and dilation > 1:
        # XLA makes a convolution of it whose window is as large as the map.
        return interleaved
    return direct


def _saves(x: Features, kernel: Kernel, dilation: int) -> bool:
    """Whether `winograd` has clearly fewer multiplications: not where its tiles are mostly padding. In half
    precision its sums would lose four to five times what the plain form loses."""
    pixels = math.prod(2 * dilation * _num_tiles(side, dilation) for side in x.shape[1:3])
    share = 4 * pixels / (9 * x.shape[1] * x.shape[2])
    return kernel.shape[:2] == (3, 3) and x.dtype.itemsize >= 4 and share <= 0.75


def direct(x: Features, kernel: Kernel, dilation: int, *, stride: int = 1) -> Features:
    """XLA's own convolution."""
    padding = [(dilation * (size - 1) // 2,) * 2 for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def matrix_product(x: Features, kernel: Kernel) -> Features:
    """With a 1x1 kernel: one product of all pixels with it."""
    pixels = x.reshape(-1, x.shape[3]) @ kernel.reshape(kernel.shape[2:])
    return pixels.reshape(*x.shape[:3], -1)


def interleaved(x: Features, kernel: Kernel, dilation: int) -> Features:
    """As an undilated convolution of dilation^2 smaller maps, each of every `dilation`-th pixel."""
    size = (x.shape[1], x.shape[2])
    y = direct(space_to_batch(x, dilation), kernel, 1)
    return batch_to_space(y, dilation, size)


def space_to_batch(x: Features, dilation: int) -> Parts:
    """[n, h, w, c] -> [n * d * d, ceil(h / d), ceil(w / d), c]: every d-th pixel makes one map.

    Sides are filled up with zeros at the bottom and right, which a convolution's padding also is. The batch
    stays outermost: split over devices, nothing moves between them.
    """
    height, width = (-(-side // dilation) for side in x.shape[1:3])
    x = _padded(x, (0, 0), (dilation * height, dilation * width))
    x = x.reshape(x.shape[0], height, dilation, width, dilation, x.shape[3])
    return x.transpose(0, 2, 4, 1, 3, 5).reshape(-1, height, width, x.shape[5])


def batch_to_space(x: Parts, dilation: int, size: tuple[int, int]) -> Features:
    """The inverse of `space_to_batch` for maps of `size` = (height, width)."""
    _, height, width, channels = x.shape
    x = x.reshape(-1, dilation, dilation, height, width, channels).transpose(0, 3, 1, 4, 2, 5)
    x = x.reshape(x.shape[0], dilation * height, dilation * width, channels)
    return x[:, : size[0], : size[1]]


def winograd(x: Features, kernel: Kernel, dilation: int, *, mirrored: bool = False) -> Features:
    """A 3x3 convolution by Winograd's F(2x2, 3x3) (Lavin and Gray 2016): 16 multiplications make four
    results, instead of 36.

    Of two neighboring results along one axis, each is a sum of three products of inputs d0 .. d3 with the
    taps g0 .. g2; four products suffice:

        m0 = (d0 - d2) g0                    m1 = (d1 + d2) (g0 + g1 + g2) / 2
        m3 = (d1 - d3) g2                    m2 = (d2 - d1) (g0 - g1 + g2) / 2
        y0 = m0 + m1 + m2                    y1 = m1 - m2 - m3

    The same along the other axis makes 4 x 4 of them. Neighbors are `dilation` pixels apart, and each
    product is a matrix product over all tiles and channels.

    `mirrored` is the transpose, which takes the gradient of the result to that of the map: a convolution by
    the mirrored kernel (m0 and m3 change their taps), from its output channels to its input channels. They
    are not swapped in memory, which took longer than the products.
    """
    batch, height, width, channels = x.shape
    rows, columns = (_num_tiles(side, dilation) for side in (height, width))
    # Pixels by (tile, which of its two, place within the dilation); one tile more for the overlap.
    sides = (2 * dilation * (rows + 1), 2 * dilation * (columns + 1))
    x = _padded(x, (dilation, dilation), sides)
    x = x.reshape(batch, rows + 1, 2, dilation, columns + 1, 2, dilation, channels)
    inputs = [_input_terms(part, axis=3) for part in _input_terms(x, axis=1)]
    taps = [_kernel_terms(part, axis=0) for part in _kernel_terms(kernel, axis=0)]
    order = (3, 1, 2, 0) if mirrored else (0, 1, 2, 3)
    equation = "po,co->pc" if mirrored else "pc,co->po"
    shape = (batch, rows, dilation, columns, dilation, kernel.shape[2 if mirrored else 3])
    products = [
        [
            jnp.einsum(equation, inputs[i][j].reshape(-1, channels), taps[k][m]).reshape(shape)
            for j, m in enumerate(order)
        ]
        for i, k in enumerate(order)
    ]
    pairs = [jnp.stack(_results(row), axis=4) for row in products]
    y = jnp.stack(_results(pairs), axis=2)
    y = y.reshape(batch, 2 * dilation * rows, 2 * dilation * columns, shape[-1])
    return y[:, :height, :width]


def _input_terms(x: jax.Array, *, axis: int) -> list[jax.Array]:
    """The four factors made of inputs; `axis` counts tiles, the one after it the two pixels of a tile."""
    count = x.shape[axis] - 1
    pixels = [jax.lax.index_in_dim(x, i, axis + 1, keepdims=False) for i in range(2)]
    d0, d1 = (jax.lax.slice_in_dim(pixel, 0, count, axis=axis) for pixel in pixels)
    d2, d3 = (jax.lax.slice_in_dim(pixel, 1, count + 1, axis=axis) for pixel in pixels)
    return [d0 - d2, d1 + d2, d2 - d1, d1 - d3]


def _kernel_terms(kernel: jax.Array, *, axis: int) -> list[jax.Array]:
    """The four factors made of the three taps along an axis."""
    g0, g1, g2 = (g.squeeze(axis) for g in jnp.split(kernel, 3, axis))
    return [g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2]


def _results(products: Sequence[jax.Array]) -> list[jax.Array]:
    """The two results that four products make."""
    m0, m1, m2, m3 = products
    return [m0 + m1 + m2, m1 - m2 - m3]


def _num_tiles(side: Size, dilation: int) -> int:
    return -(-side // (2 * dilation))


def _padded(x: Features, before: tuple[int, int], sides: tuple[int, int]) -> Features:
    """With zeros before and after each side, to `sides` in all."""
    pads = [
        (first, side - first - old)
        for first, side, old in zip(before, sides, x.shape[1:3], strict=True)
    ]
    return jnp.pad(x, ((0, 0), *pads, (0, 0)))
