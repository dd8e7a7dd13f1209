"""The layers every network here is made of: convolution, linear, batch norm, PReLU, dropout.

* Feature maps are [batch, height, width, channels]; kernels are [height, width, in, out].
* Padding is PyTorch's: dilation * (kernel_size - 1) / 2 on every side, never 'SAME' (which pads
  asymmetrically where a stride meets an even size).
* Parameters are float32; `dtype` is what is computed in. Batch statistics are always taken in float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float

from pspnet_jax.arrays import Features
from pspnet_jax.models.convolution import Kernel, convolve
from pspnet_jax.models.marks import once
from pspnet_jax.resample import Pair, Platform, is_static

Vectors = Float[jax.Array, "batch _channels"]
"""One vector per image."""
RandomNumbers = np.random.Generator
Block = Callable[..., Features]
"""A module: (map, train=...) -> map."""
_STORED = ("convolution", "statistics")  # what `run` stores of a block


class Initializer(NamedTuple):
    """How a convolution or linear layer starts: functions (random numbers, kernel shape) -> values.

    Drawn with NumPy: the same on every backend, and nothing to compile (with `jax.random` the
    initialization of a network took longer than the compilation of its training step).
    """

    kernel: Callable[[RandomNumbers, tuple[int, ...]], np.ndarray]
    bias: Callable[[RandomNumbers, tuple[int, ...]], np.ndarray]


class NoRandomNumbers(np.random.Generator):
    """Stands for random numbers where only the shapes of a network are wanted (under `nnx.eval_shape`):
    nothing is drawn and nothing is allocated, however large the network."""

    def __init__(self):
        super().__init__(np.random.PCG64(0))


def _normal(rng: RandomNumbers, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)


def _zeros(rng: RandomNumbers, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape[-1], np.float32)


def _uniform(rng: RandomNumbers, size: tuple[int, ...], bound: float) -> np.ndarray:
    return rng.uniform(-bound, bound, size).astype(np.float32)


HE_FAN_OUT = Initializer(
    kernel=lambda rng, shape: _normal(rng, shape, (2 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5),
    bias=_zeros,
)
"""Normal with variance 2 / fan_out (He et al. 2015): ResNet backbones."""

HE_FAN_IN = Initializer(
    kernel=lambda rng, shape: _normal(rng, shape, (2 / math.prod(shape[:-1])) ** 0.5), bias=_zeros
)
"""Normal with variance 2 / fan_in (He et al. 2015): Caffe's msra."""

HE_UNIFORM = Initializer(
    kernel=lambda rng, shape: _uniform(rng, shape, (6 / math.prod(shape[:-1])) ** 0.5), bias=_zeros
)
"""Uniform with variance 2 / fan_in (He et al. 2015): the decoder of segmentation_models_pytorch."""

XAVIER_UNIFORM = Initializer(
    kernel=lambda rng, shape: _uniform(
        rng, shape, (6 / (math.prod(shape[:-2]) * sum(shape[-2:]))) ** 0.5
    ),
    bias=_zeros,
)
"""Uniform with variance 2 / (fan_in + fan_out) (Glorot and Bengio 2010): its classifier."""

SMALL_NORMAL = Initializer(kernel=lambda rng, shape: _normal(rng, shape, 0.01), bias=_zeros)
"""Normal with a standard deviation of 0.01: mmsegmentation's classifiers."""

TORCH_DEFAULT = Initializer(
    kernel=lambda rng, shape: _uniform(rng, shape, math.prod(shape[:-1]) ** -0.5),
    bias=lambda rng, shape: _uniform(rng, shape[-1:], math.prod(shape[:-1]) ** -0.5),
)
"""Uniform within 1 / sqrt(fan_in), kernel and bias: what PyTorch gives a layer unasked."""


class ConvWeights(NamedTuple):
    """Of one convolution, in float32 or more."""

    kernel: Kernel
    bias: Float[jax.Array, "out_channels"] | None


class Conv(nnx.Module):
    """A convolution with a square kernel."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        use_bias: bool = False,
        initializer: Initializer,
        dtype: DTypeLike,
        platform: Platform = None,
        rng: RandomNumbers,
    ):
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        kernel, bias = _initial_values(initializer, shape, rng)
        self.kernel = nnx.Param(jnp.asarray(kernel))
        self.bias = nnx.Param(jnp.asarray(bias)) if use_bias else None
        self.stride, self.dilation, self.dtype = stride, dilation, dtype
        self.platform = platform

    def __call__(self, x: Features) -> Features:
        return self.apply(x, self.weights())

    def weights(self) -> ConvWeights:
        return ConvWeights(self.kernel[...], None if self.bias is None else self.bias[...])

    def apply(self, x: Features, weights: ConvWeights) -> Features:
        """With other weights than its own."""
        y = convolve(
            x.astype(self.dtype),
            self.ready(weights.kernel),
            stride=self.stride,
            dilation=self.dilation,
            platform=self.platform,
        )
        return checkpoint_name(add_bias(y, weights.bias), "convolution")

    def ready(self, kernel: Kernel) -> Kernel:
        """A kernel in the dtype that is computed in; inference rounds it once."""
        kernel = kernel.astype(self.dtype)
        if self.platform != "gpu":
            return once(kernel)
        # In memory it is kept as cuDNN takes it, [out, height, width, in].
        return once(kernel.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)


def add_bias(y: Features, bias: jax.Array | None) -> Features:
    """In the dtype of `y`."""
    return y if bias is None else y + _repeated(once(bias, dtype=y.dtype), y)


class Linear(nnx.Module):
    """A matrix and a bias: one vector per image -> another; the kernel is [in, out]."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        initializer: Initializer,
        dtype: DTypeLike,
        rng: RandomNumbers,
    ):
        kernel, bias = _initial_values(initializer, (in_channels, out_channels), rng)
        self.kernel = nnx.Param(jnp.asarray(kernel))
        self.bias = nnx.Param(jnp.asarray(bias))
        self.dtype = dtype

    def __call__(self, x: Vectors) -> Vectors:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y + _repeated(self.bias[...], y)


class BatchNorm(nnx.Module):
    """Batch normalization (Ioffe and Szegedy 2015) with PyTorch's statistics.

    In training, y = (x - mean) / sqrt(variance + epsilon) * scale + bias with the mean and the *biased*
    variance over batch, height and width, and the running values move by

        running = (1 - momentum) * running + momentum * (mean, variance * n / (n - 1)).

    * Under `jax.jit` with a batch split over devices the statistics are those of the global batch.
    * The variance is taken in float32 (float64 where the input is) in two passes: E[x^2] - E[x]^2
      cancels when the mean is large. On GPUs it is one pass, around the running mean instead of 0: what
      cancels there is the distance between the batch's mean and the running one, and where that is d standard
      deviations, the variance is rounded by (1 + d^2) times as much.
    * `frozen` uses the running values in training too and leaves them alone.

    Raises:
        ValueError: in training with a single value per channel, where the variance is 0.
    """

    def __init__(
        self,
        channels: int,
        *,
        momentum: float = 0.1,
        epsilon: float = 1e-5,
        frozen: bool = False,
        platform: Platform = None,
    ):
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))
        self.mean = nnx.BatchStat(jnp.zeros(channels))
        self.variance = nnx.BatchStat(jnp.ones(channels))
        self.momentum, self.epsilon, self.frozen = momentum, epsilon, frozen
        self.platform = platform

    def takes_statistics(self, *, train: bool) -> bool:
        """Whether it normalizes by the batch, not by its running values."""
        return train and not self.frozen

    def __call__(self, x: Features, *, train: bool) -> Features:
        wide = jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
        if self.takes_statistics(train=train):
            mean, variance = self._batch_statistics(wide)
        else:
            mean, variance = self.mean[...], self.variance[...]
        scale = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        y = (wide - _per_channel(mean)) * _per_channel(scale) + _per_channel(self.bias[...])
        return y.astype(x.dtype)

    def _batch_statistics(self, x: Features) -> tuple[jax.Array, jax.Array]:
        count = x.shape[0] * x.shape[1] * x.shape[2]
        if count == 1:
            raise ValueError(
                "batch norm would see one value per channel (a batch of one image at a 1x1 map): "
                "use a global batch of at least 2 for each of train.accumulate_steps, or "
                "--config.model.frozen_norm=True"
            )
        if self.platform == "gpu":
            # One reading of x for both sums, and one less in the backward pass.
            near = jax.lax.stop_gradient(self.mean[...])
            distance = x - _per_channel(near)
            first, second = (y.mean(axis=(0, 1, 2)) for y in (distance, jnp.square(distance)))
            mean, variance = near + first, jnp.maximum(second - jnp.square(first), 0)
        else:
            mean = x.mean(axis=(0, 1, 2))
            # Distances from the mean sum to 0, and so does the (first) derivative by the mean.
            around = _per_channel(jax.lax.stop_gradient(mean))
            variance = jnp.square(x - around).mean(axis=(0, 1, 2))
        mean, variance = (checkpoint_name(value, "statistics") for value in (mean, variance))
        self._move(self.mean, mean)
        self._move(self.variance, variance * (count / (count - 1)))
        return mean, variance

    def _move(self, running: nnx.BatchStat, value: jax.Array) -> None:
        old = running[...]
        moved = old + self.momentum * (jax.lax.stop_gradient(value) - old)
        running[...] = moved.astype(old.dtype)


def conv_norm(conv: Conv, norm: BatchNorm, x: Features, *, train: bool) -> Features:
    """norm(conv(x)), as one convolution with a bias where that is faster (`weights_with`)."""
    weights = weights_with(norm, conv, train=train)
    return norm(conv(x), train=train) if weights is None else conv.apply(x, weights)


def weights_with(norm: BatchNorm, conv: Conv, *, train: bool) -> ConvWeights | None:
    """Weights of the convolution that does what `conv` and `norm` after it do; None where they are faster
    apart or where the norm takes its statistics from the batch.

    On GPUs a convolution, its bias, the shortcut and ReLU are one call of cuDNN, and a norm between them is
    not; on CPUs a norm costs what the bias costs.
    """
    if conv.platform != "gpu" or norm.takes_statistics(train=train):
        return None
    scale = norm.scale[...] * jax.lax.rsqrt(norm.variance[...] + norm.epsilon)
    kernel, bias = conv.weights()
    shift = -norm.mean[...] if bias is None else bias - norm.mean[...]
    return ConvWeights(kernel * _per_channel(scale), shift * scale + norm.bias[...])


class PReLU(nnx.Module):
    """max(x, 0) + slope * min(x, 0) with one learned slope for all channels (He et al. 2015), at first 0.25."""

    def __init__(self):
        self.slope = nnx.Param(0.25 * jnp.ones(1))

    def __call__(self, x: Features) -> Features:
        return jnp.where(x > 0, x, _repeated(self.slope[...], x) * x)


# What one random number decides on -> shape of the random numbers for a map.
DROPOUTS: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "channel": lambda shape: (shape[0], 1, 1, shape[3]),  # of one image: PyTorch's Dropout2d
    "element": lambda shape: shape,  # PyTorch's Dropout, Caffe's
}


class Dropout(nnx.Module):
    """Dropout of whole channels or of single values (`DROPOUTS`); the rest is scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float, *, kind: str):
        self.rate, self.kind = rate, kind

    def __call__(self, x: Features, *, train: bool, key: jax.Array | None) -> Features:
        if not train or self.rate == 0:
            return x
        if key is None:
            raise ValueError("dropout in training needs a key: model(images, train=True, key=...)")
        kept = jax.random.bernoulli(key, 1 - self.rate, DROPOUTS[self.kind](x.shape))
        return jnp.where(kept, x / (1 - self.rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def max_pool(x: Features) -> Features:
    """3x3 maximum at stride 2 with one pixel of padding on every side: half the size, rounded up.

    Of equal pixels the first gets the gradient, as in PyTorch. XLA's own gradient is a scatter: slow on CPUs,
    and refused where GPUs are asked to be deterministic.
    """
    return _max_pool(x, (x.shape[1], x.shape[2]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: Features, size: Pair) -> Features:
    """`size` = (height, width) is for the gradient alone."""
    return _max_pool_forward(x, size)[0]


def _max_pool_forward(x: Features, size: Pair):
    """The maxima, and which of its nine pixels each is (by comparing, not by looking for the maximum
    again: where XLA computes `x` twice, rounded otherwise, it would not be found)."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    # One axis after the other: four comparisons instead of eight, in a quarter of the time of XLA's windows (on CPUs).
    x, column = _first_largest(_neighbors(x, axis=2), [jnp.uint8(k) for k in range(3)])
    pixels = [3 * row + taps for row, taps in enumerate(_neighbors(column, axis=1))]
    return _first_largest(_neighbors(x, axis=1), pixels)


def _neighbors(x: jax.Array, *, axis: int) -> list[jax.Array]:
    """The first, middle and last samples of windows of three at stride 2."""
    size = x.shape[axis] - 2
    return [jax.lax.slice_in_dim(x, k, size + k, stride=2, axis=axis) for k in range(3)]


def _first_largest(taps: Sequence[jax.Array], places: Sequence[jax.Array]):
    """The maximum of the taps, and the place of the first of those that are largest."""
    largest, place = taps[0], places[0]
    for tap, its_place in zip(taps[1:], places[1:], strict=True):
        place = jnp.where(tap > largest, its_place, place)
        largest = jnp.maximum(largest, tap)
    return largest, place


def _max_pool_backward(size: Pair, place: jax.Array, gradient: Features):
    """Each gradient to its pixel. A pixel at an even place (padding included) is the first of one window
    and the last of the one before it, one at an odd place the middle of one: no scatter."""
    parts = [[jnp.where(place == 3 * i + j, gradient, 0) for j in range(3)] for i in range(3)]
    rows = [_meet(row, axis=2) for row in parts]
    x = _meet(rows, axis=1)
    height, width = size
    x = x.reshape(x.shape[0], 2 * x.shape[1], 2 * x.shape[3], x.shape[5])
    return (x[:, 1 : height + 1, 1 : width + 1],)


def _meet(taps: Sequence[jax.Array], *, axis: int) -> jax.Array:
    """What the first, middle and last taps of windows give to even and odd pixels: [.., windows + 1, 2, ..]."""

    def moved(x: jax.Array, by: int) -> jax.Array:
        return jnp.pad(x, [(by, 1 - by) if i == axis else (0, 0) for i in range(x.ndim)])

    first, middle, last = taps
    return jnp.stack([moved(first, 0) + moved(last, 1), moved(middle, 0)], axis=axis + 1)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def average_pool(x: Features) -> Features:
    """2x2 mean at stride 2; an odd last row or column is left out, as PyTorch does."""
    batch, height, width, channels = x.shape
    if is_static(height, width) and min(height, width) < 2:
        raise ValueError(
            f"the image is too small for this network: a map of {height}x{width} cannot be halved"
        )
    even = x[:, : height // 2 * 2, : width // 2 * 2]
    cells = even.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return cells.mean(axis=(2, 4), dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)


def run(
    blocks: Sequence[Block], x: Features, *, train: bool, remat: bool, stores_all: bool = False
) -> Features:
    """x through blocks, one after the other.

    For the backward pass x and the results of convolutions are stored; norms, activations and sums are
    computed again from them, which is little work. With `remat` only what goes from block to block is
    stored; with `stores_all`, else, whatever the backward pass reads.
    """
    if not train or (stores_all and not remat):
        return functools.reduce(lambda x, block: block(x, train=train), blocks, x)
    policies = jax.checkpoint_policies
    stored = policies.nothing_saveable if remat else policies.save_only_these_names(*_STORED)
    graphdefs, states = zip(*map(nnx.split, blocks), strict=True)

    def through(states, x: Features):
        statistics = []
        for graphdef, state in zip(graphdefs, states, strict=True):
            block = functools.partial(_run_block, graphdef)
            x, moved = jax.checkpoint(block, policy=stored)(state, x)
            statistics.append(moved)
        return x, statistics

    if not remat and len(blocks) > 1:
        # What goes from block to block is made again, too, when the backward pass comes to these blocks.
        through = jax.checkpoint(through, policy=stored)
    y, statistics = through(states, x)
    for block, moved in zip(blocks, statistics, strict=True):
        nnx.update(block, moved)
    return y


def _run_block(graphdef: nnx.GraphDef, state: Any, x: Features) -> tuple[Features, Any]:
    """A block in training, of its definition and `nnx.State`; with the batch statistics after it."""
    block = nnx.merge(graphdef, state)
    return block(x, train=True), nnx.state(block, nnx.BatchStat)


def _initial_values(
    initializer: Initializer, shape: tuple[int, ...], rng: RandomNumbers
) -> tuple[np.ndarray | jax.Array, np.ndarray | jax.Array]:
    """Kernel and bias."""
    if isinstance(rng, NoRandomNumbers):
        return jnp.zeros(shape), jnp.zeros(shape[-1])
    return initializer.kernel(rng, shape), initializer.bias(rng, shape)


def _repeated(x: jax.Array, like: jax.Array) -> jax.Array:
    """A parameter for each channel (or one for all), everywhere in an array, in its dtype.

    Repeated first, rounded then, so that the gradient is summed in the dtype of the parameter: in bfloat16 a
    sum stands still at 256 times what is added to it. In the forward pass XLA rounds first.
    """
    return jnp.broadcast_to(x.reshape((1,) * (like.ndim - 1) + (-1,)), like.shape).astype(
        like.dtype
    )


def _per_channel(x: jax.Array) -> jax.Array:
    # Spelled out because the tests forbid silent rank promotion.
    return x.reshape(1, 1, 1, -1)
