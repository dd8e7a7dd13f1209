"""Convolution, linear, batch norm, PReLU, dropout and pools against plain NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.models.convolution import convolve
from pspnet_jax.models.layers import (
    HE_FAN_OUT,
    TORCH_DEFAULT,
    BatchNorm,
    Conv,
    Dropout,
    Linear,
    NoRandomNumbers,
    PReLU,
    add_bias,
    average_pool,
    max_pool,
)

from networks import random

BUDGET_SECONDS = 40


def convolve_by_loops(x, kernel, stride, dilation):
    size = kernel.shape[0]
    pad = dilation * (size - 1) // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    reach = dilation * (size - 1)
    rows = range(0, padded.shape[1] - reach, stride)
    columns = range(0, padded.shape[2] - reach, stride)
    result = np.zeros((x.shape[0], len(rows), len(columns), kernel.shape[3]))
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            window = padded[:, top : top + reach + 1 : dilation, left : left + reach + 1 : dilation]
            result[:, i, j] = np.tensordot(window, kernel, axes=([1, 2, 3], [0, 1, 2]))
    return result


@pytest.mark.parametrize(
    ("size", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (3, 1, 4), (7, 2, 1), (1, 2, 1)]
)
@pytest.mark.parametrize("shape", [(9, 12), (8, 9)])
def test_convolution_pads_as_pytorch(shape, size, stride, dilation):
    x, kernel = random(2, *shape, 3), random(size, size, 3, 4, seed=1)
    expected = convolve_by_loops(x, kernel, stride, dilation)
    np.testing.assert_allclose(
        convolve(x, kernel, stride=stride, dilation=dilation), expected, atol=1e-4
    )


def test_bias_is_added():
    conv = Conv(
        3,
        4,
        1,
        use_bias=True,
        initializer=TORCH_DEFAULT,
        dtype=jnp.float32,
        rng=np.random.default_rng(0),
    )
    x = jnp.zeros((1, 2, 2, 3))
    np.testing.assert_array_equal(conv(x)[0, 1, 1], conv.bias[...])


@pytest.mark.parametrize("layer", ["bias", "slope"])
def test_half_precision_gradients_of_parameters_are_summed_in_full_precision(layer):
    """A running sum of ones in bfloat16 ends at 256."""
    ones = jnp.ones((2, 40, 40, 3), jnp.bfloat16)

    def apply(parameter):
        if layer == "bias":
            return add_bias(ones, parameter)
        activation = PReLU()
        activation.slope[...] = parameter
        return activation(-ones)

    parameter, expected = (jnp.zeros(3), 3200) if layer == "bias" else (jnp.zeros(1), -9600)
    y, transpose = jax.vjp(apply, parameter)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(transpose(ones)[0], jnp.full_like(parameter, expected))


def linear(in_channels, out_channels, *, dtype=jnp.float32, rng=None):
    rng = np.random.default_rng(0) if rng is None else rng
    return Linear(in_channels, out_channels, initializer=TORCH_DEFAULT, dtype=dtype, rng=rng)


class TestLinear:
    def test_is_a_matrix_and_a_bias(self):
        layer, x = linear(3, 5), np.asarray(random(2, 3))
        expected = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
        assert np.asarray(layer.bias[...]).all()
        np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-6)

    def test_starts_within_the_bound_of_pytorch(self):
        layer = linear(400, 300)
        for values in (layer.kernel[...], layer.bias[...]):
            assert np.abs(values).max() == pytest.approx(400**-0.5, rel=0.02)

    def test_half_precision_keeps_float32_parameters(self):
        layer = linear(3, 5, dtype=jnp.bfloat16)
        assert layer(random(2, 3)).dtype == jnp.bfloat16
        assert layer.kernel[...].dtype == layer.bias[...].dtype == jnp.float32

    def test_shapes_alone_need_no_random_numbers(self):
        layer = nnx.eval_shape(lambda: linear(3, 5, rng=NoRandomNumbers()))
        shapes = [leaf.shape for leaf in jax.tree.leaves(nnx.state(layer))]
        assert sorted(shapes) == [(3, 5), (5,)]


@pytest.mark.parametrize(
    ("initializer", "variance"), [(HE_FAN_OUT, 2 / (9 * 64)), (TORCH_DEFAULT, 1 / (3 * 9 * 32))]
)
def test_moments_of_initialization(initializer, variance):
    kernel = initializer.kernel(np.random.default_rng(0), (3, 3, 32, 64))
    assert kernel.dtype == np.float32
    assert abs(kernel.mean()) < 4 * (variance / kernel.size) ** 0.5
    assert kernel.var() == pytest.approx(variance, rel=0.03)


def test_torch_default_is_uniform_within_its_bound():
    bound = (9 * 32) ** -0.5
    rng = np.random.default_rng(0)
    for values in (
        TORCH_DEFAULT.kernel(rng, (3, 3, 32, 64)),
        TORCH_DEFAULT.bias(rng, (3, 3, 32, 6400)),
    ):
        assert np.abs(values).max() == pytest.approx(bound, rel=0.01)
    assert not HE_FAN_OUT.bias(rng, (3, 3, 32, 64)).any()


class TestBatchNorm:
    def test_training_normalizes_and_moves_running_statistics(self):
        norm = BatchNorm(3)
        x = random(2, 5, 4, 3) * 2 + 7
        flat = np.asarray(x, np.float64).reshape(-1, 3)
        y = norm(x, train=True)
        expected = (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
        np.testing.assert_allclose(np.reshape(y, (-1, 3)), expected, atol=1e-5)
        np.testing.assert_allclose(norm.mean[...], 0.1 * flat.mean(0), rtol=1e-5)
        # PyTorch stores the unbiased variance, though it normalizes with the biased one.
        np.testing.assert_allclose(norm.variance[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)

    def test_evaluation_uses_running_statistics_and_leaves_them(self):
        norm = BatchNorm(2)
        norm.mean[...] = jnp.array([1.0, -2.0])
        norm.variance[...] = jnp.array([4.0, 0.25])
        norm.scale[...] = jnp.array([3.0, 1.0])
        norm.bias[...] = jnp.array([0.5, 0.0])
        x = np.asarray(random(1, 3, 3, 2))
        expected = (x - [1, -2]) / np.sqrt(np.array([4, 0.25]) + 1e-5) * [3, 1] + [0.5, 0]
        np.testing.assert_allclose(norm(jnp.asarray(x), train=False), expected, atol=1e-5)
        np.testing.assert_array_equal(norm.mean[...], [1, -2])

    def test_frozen_norm_ignores_the_batch_in_training(self):
        norm = BatchNorm(2, frozen=True)
        x = random(2, 3, 3, 2) + 5
        np.testing.assert_array_equal(norm(x, train=True), norm(x, train=False))
        np.testing.assert_array_equal(norm.mean[...], 0)

    def test_variance_does_not_cancel(self):
        norm = BatchNorm(1)
        x = random(4, 20, 20, 1) * 0.01 + 30
        assert np.std(norm(x, train=True)) == pytest.approx(1 / np.sqrt(1 + 1e-5 / 1e-4), rel=0.02)

    def test_one_pass_is_two_passes(self):
        """The form for GPUs: values, running statistics, gradients of everything."""

        def losses(platform, values, x, *, train):
            norm = BatchNorm(3, platform=platform)
            nnx.update(norm, values)
            y = norm(x, train=train)
            statistics = nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))
            return jnp.sum(jnp.sin(3 * y)), (y, statistics)

        with jax.enable_x64(True):
            x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 3)) * 2 + 7)
            rng = np.random.default_rng(1)
            values = jax.tree.map(
                lambda v: jnp.asarray(v + rng.uniform(0.1, 1, v.shape)),
                nnx.state(BatchNorm(3)),
            )
            expected, found = (
                jax.value_and_grad(functools.partial(losses, p, train=True), (0, 1), has_aux=True)(
                    values, x
                )
                for p in (None, "gpu")
            )
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        for value, golden in pairs:
            np.testing.assert_allclose(value, golden, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("deviations", [0.0, 3.0, 30.0])
    def test_one_pass_rounds_as_it_says(self, deviations):
        """(1 + d^2) times what a float32 sum of 3200 values is off, around a running mean d deviations away."""
        x = random(8, 20, 20, 1)
        norm = BatchNorm(1, momentum=1.0, platform="gpu")
        norm.mean[...] = jnp.asarray([np.float32(np.mean(x) + deviations * np.std(x))])
        norm(x, train=True)
        exact = np.var(np.asarray(x, np.float64), ddof=1)
        assert abs(float(norm.variance[0]) / exact - 1) < 40 * 2**-24 * (1 + deviations**2)

    def test_one_pass_never_takes_the_root_of_a_negative_variance(self):
        norm = BatchNorm(1, platform="gpu")
        assert np.isfinite(norm(jnp.full((4, 20, 20, 1), 1234.567), train=True)).all()

    def test_half_precision_statistics_are_taken_in_full_precision(self):
        norm, exact = BatchNorm(2), BatchNorm(2)
        x = jnp.asarray(random(2, 9, 9, 2) * 3 + 100, jnp.bfloat16)
        assert norm(x, train=True).dtype == jnp.bfloat16
        exact(x.astype(jnp.float32), train=True)
        np.testing.assert_array_equal(norm.mean[...], exact.mean[...])

    def test_one_value_per_channel_is_an_error(self):
        with pytest.raises(ValueError, match=r"one value per channel.*global batch of at least 2"):
            BatchNorm(3)(jnp.ones((1, 1, 1, 3)), train=True)


class TestPReLU:
    def test_has_one_slope_for_all_channels(self):
        x = np.asarray(random(2, 3, 4, 5))
        activation = PReLU()
        assert activation.slope[...].shape == (1,)
        for slope in (0.25, -0.5):
            expected = np.maximum(x, 0) + slope * np.minimum(x, 0)
            np.testing.assert_allclose(activation(jnp.asarray(x)), expected, rtol=1e-6)
            activation.slope[...] = jnp.array([-0.5])

    def test_half_precision_stays(self):
        assert PReLU()(jnp.ones((1, 2, 2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


class TestDropout:
    def test_drops_whole_channels_and_keeps_the_expectation(self):
        x = jnp.ones((64, 3, 2, 50))
        y = np.asarray(Dropout(0.25, kind="channel")(x, train=True, key=jax.random.key(0)))
        assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
        np.testing.assert_array_equal(y, np.broadcast_to(y[:, :1, :1], y.shape))
        assert (y == 0).mean() == pytest.approx(0.25, abs=0.03)

    def test_drops_single_values(self):
        x = jnp.ones((8, 9, 10, 20))
        y = np.asarray(Dropout(0.25, kind="element")(x, train=True, key=jax.random.key(0)))
        assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
        assert (y == 0).mean() == pytest.approx(0.25, abs=0.02)
        shares = (y == 0).mean(axis=(1, 2))  # of a channel of an image: never all or nothing
        assert shares.min() > 0
        assert shares.max() < 0.6

    def test_does_nothing_outside_of_training(self):
        x = random(2, 3, 3, 4)
        np.testing.assert_array_equal(Dropout(0.5, kind="channel")(x, train=False, key=None), x)

    def test_needs_a_key(self):
        with pytest.raises(ValueError, match="needs a key"):
            Dropout(0.5, kind="channel")(jnp.ones((1, 1, 1, 1)), train=True, key=None)


@pytest.mark.parametrize("size", [(7, 8), (9, 9)])
def test_max_pool_pads_one_pixel_on_every_side(size):
    x = random(1, *size, 2)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    rows, columns = range(0, size[0], 2), range(0, size[1], 2)
    expected = [[padded[0, i : i + 3, j : j + 3].max((0, 1)) for j in columns] for i in rows]
    np.testing.assert_array_equal(max_pool(x)[0], expected)


@pytest.mark.parametrize("size", [(6, 4), (7, 5), (1, 2)])
def test_gradient_of_max_pool_goes_to_the_first_largest_pixel(size):
    """Whole numbers -3 .. -1, so that most windows hold equal pixels, and all less than a zero of padding."""
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 0, (2, *size, 3)).astype(np.float32)
    windows = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    gradient = rng.integers(1, 9, (2, *windows, 3)).astype(np.float32)
    expected, largest = np.zeros_like(x), np.zeros_like(gradient)
    for image, row, column, channel in np.ndindex(2, *windows, 3):
        pixels = [
            (i, j)
            for i in range(max(2 * row - 1, 0), min(2 * row + 2, size[0]))
            for j in range(max(2 * column - 1, 0), min(2 * column + 2, size[1]))
        ]
        i, j = max(pixels, key=lambda at: x[image, *at, channel])  # the first of equal ones
        expected[image, i, j, channel] += gradient[image, row, column, channel]
        largest[image, row, column, channel] = x[image, i, j, channel]
    y, transpose = jax.vjp(max_pool, jnp.asarray(x))
    np.testing.assert_array_equal(y, largest)
    np.testing.assert_array_equal(transpose(jnp.asarray(gradient))[0], expected)


def test_gradient_of_max_pool_does_not_scatter():
    program = str(jax.make_jaxpr(jax.grad(lambda x: jnp.sum(max_pool(x))))(random(1, 6, 6, 2)))
    assert "scatter" not in program


@pytest.mark.parametrize(("size", "rows", "columns"), [((6, 4), 3, 2), ((7, 5), 3, 2)])
def test_average_pool_leaves_an_odd_last_line_out(size, rows, columns):
    x = np.asarray(random(2, *size, 3))
    expected = [
        [x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((1, 2)) for j in range(columns)]
        for i in range(rows)
    ]
    np.testing.assert_allclose(
        average_pool(jnp.asarray(x)), np.transpose(expected, (2, 0, 1, 3)), atol=1e-6
    )


def test_half_precision_is_averaged_in_full_precision():
    x = jnp.asarray(random(2, 8, 6, 5), jnp.bfloat16)
    exact = average_pool(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(average_pool(x), exact, strict=True)


def test_state_is_parameters_and_batch_statistics_only():
    for layer in (BatchNorm(2), PReLU(), linear(2, 3)):
        nnx.split(layer, nnx.Param, nnx.BatchStat)  # raises where there is anything else


def test_a_map_that_cannot_be_halved_is_named():
    with pytest.raises(
        ValueError, match=r"the image is too small .*: a map of 1x5 cannot be halved"
    ):
        average_pool(jnp.zeros((1, 1, 5, 2)))
