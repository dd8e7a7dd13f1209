"""Whole networks in the forms of each platform against the plain forms: equal but for rounding.

In bfloat16, where rounding is what there is to see, operations one by one: no form may lose more than the plain
one does, within the factor that stands beside it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.losses import LossOptions, segmentation_loss
from pspnet_jax.models import convolution
from pspnet_jax.models.convolution import winograd
from pspnet_jax.models.layers import TORCH_DEFAULT, BatchNorm, Conv, ConvWeights, conv_norm
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.models.pyramid import Pyramid, fuse
from pspnet_jax.resample import resize
from pspnet_jax.train_step import split_model

from compiling import jit
from networks import options

BUDGET_SECONDS = 100


NETWORKS = {  # options and the side of images
    "semseg": ({"backbone": "resnet10", "width": 8}, 49),
    "wide": ({"backbone": "resnet10", "width": 16}, 57),  # stage 4: 128 channels, dilation 4, 8 x 8
    "bottlenecks_7x7": ({"backbone": "resnet50", "stem": "7x7", "width": 4}, 33),
    "lextal": ({"family": "lextal", "backbone": "resnet10", "width": 16}, 48),
    "densenet": ({"family": "lextal", "backbone": "densenet121", "width": 8}, 32),
}
SLOW = pytest.mark.slow


def networks(overrides, platform):
    """(definition in plain forms, that for the platform, parameters, statistics), float64, the
    statistics as after some training."""
    chosen = options(dtype="float64", dropout_rate=0.0, **overrides)
    rng = np.random.default_rng(1)
    made = [
        PSPNet(chosen, 5, rng=np.random.default_rng(0), platform=name) for name in (None, platform)
    ]
    (plain, params, batch_stats), (other, _, _) = map(split_model, made)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), params)
    batch_stats = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 2, x.shape)), batch_stats)
    return plain, other, params, batch_stats


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        ("semseg", "gpu"),
        ("wide", "cpu"),
        pytest.param("bottlenecks_7x7", "gpu", marks=SLOW),
        pytest.param("bottlenecks_7x7", "cpu", marks=SLOW),
        ("lextal", "gpu"),
        pytest.param("densenet", "gpu", marks=SLOW),
    ],
)
def test_logits(name, platform, monkeypatch):
    overrides, side = NETWORKS[name]
    taken = []

    def noted(x, kernel, dilation, **options):
        taken.append(dilation)
        return winograd(x, kernel, dilation, **options)

    monkeypatch.setattr(convolution, "winograd", noted)
    with jax.enable_x64(True):
        plain, other, params, batch_stats = networks(overrides, platform)
        images = jnp.asarray(np.random.default_rng(2).standard_normal((2, side, side, 3)))

        def logits(graphdef):
            model = nnx.merge(graphdef, params, batch_stats)
            return np.asarray(jit(lambda images: model(images).logits)(images))

        expected, found = logits(plain), logits(other)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.abs(expected).max())
    assert (4 in taken) == (name == "wide")


@pytest.mark.parametrize(
    ("overrides", "platform"),
    [
        ({"backbone": "resnet10", "width": 16}, "cpu"),  # both heads by Winograd
        pytest.param({"backbone": "resnet10", "width": 4}, "gpu", marks=SLOW),
        pytest.param({"backbone": "resnet10", "width": 4, "frozen_norm": True}, "gpu", marks=SLOW),
    ],
    ids=["cpu", "gpu", "gpu_frozen_norm"],
)
def test_loss_and_gradients(overrides, platform):
    labels = jnp.asarray(np.random.default_rng(3).integers(0, 5, (2, 33, 33)), jnp.uint8)
    with jax.enable_x64(True):
        plain, other, params, batch_stats = networks(overrides, platform)
        images = jnp.asarray(np.random.default_rng(2).standard_normal((2, 33, 33, 3)))

        def differentiate(graphdef, platform, tile_mib):
            def loss(params):
                model = nnx.merge(graphdef, params, batch_stats)
                outputs = model(images, train=True, key=jax.random.key(0))
                chosen = LossOptions(tile_mib=tile_mib)
                losses = segmentation_loss(
                    outputs, labels, chosen, align_corners=True, platform=platform
                )
                return losses.total

            return jax.tree.map(np.asarray, jit(jax.value_and_grad(loss))(params))

        expected, found = differentiate(plain, None, None), differentiate(other, platform, 0.05)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[1]))
    for value, golden in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(value, golden, rtol=0, atol=1e-10 * max(largest, 1))


def drawn(*shape, seed) -> np.ndarray:
    """Maps: numbers that bfloat16 holds, in float32."""
    numbers = np.random.default_rng(seed).standard_normal(shape)
    return numbers.astype(jnp.bfloat16).astype(np.float32)


def parameters(*shape, seed, lowest=-1) -> np.ndarray:
    """In lowest .. 1, float32."""
    return np.random.default_rng(seed).uniform(lowest, 1, shape).astype(np.float32)


def conv_of(kernel, dtype, platform, *, dilation=1) -> Conv:
    size, _, in_channels, out_channels = kernel.shape
    conv = Conv(
        in_channels,
        out_channels,
        size,
        dilation=dilation,
        initializer=TORCH_DEFAULT,
        dtype=dtype,
        platform=platform,
        rng=np.random.default_rng(0),
    )
    conv.kernel = nnx.Param(kernel)
    return conv


def convolution_alone(x, kernel, *, dtype, platform, dilation):
    return conv_of(kernel, dtype, platform, dilation=dilation)(x)


def convolution_and_frozen_norm(x, kernel, scale, bias, *, dtype, platform, dilation):
    channels = kernel.shape[3]
    norm = BatchNorm(channels, frozen=True)
    norm.scale, norm.bias = nnx.Param(scale), nnx.Param(bias)
    mean, variance = parameters(channels, seed=8), parameters(channels, seed=9, lowest=0.2)
    variance[0] = 1e-4  # a channel that hardly ever spoke: epsilon counts
    norm.mean, norm.variance = (
        nnx.BatchStat(jnp.asarray(x, scale.dtype)) for x in (mean, variance)
    )
    return conv_norm(conv_of(kernel, dtype, platform, dilation=dilation), norm, x, train=True)


def convolution_of_pyramid(x, coarse, fine, kernel, bias, *, dtype, platform):
    """On a platform by `fuse`, on none stretched and concatenated."""
    conv, weights = conv_of(kernel, dtype, platform), ConvWeights(kernel, bias)
    if platform is not None:
        return fuse(Pyramid(x, (coarse, fine)), conv, weights, train=True)
    stretched = [resize(level, x.shape[1:3], align_corners=True) for level in (coarse, fine)]
    return conv.apply(jnp.concatenate([x, *stretched], axis=3), weights)


MAP, LEVELS = drawn(2, 9, 12, 16, seed=0), [drawn(2, n, n, 8, seed=n) for n in (2, 3)]
NORM = [parameters(24, seed=4, lowest=0.5), parameters(24, seed=5)]
NORM[0][0] = 0.01  # of the channel that hardly ever spoke
# What is computed, on which platform, of which maps and parameters, and how many times as much may be lost.
HALF = {
    "interleaved": (
        functools.partial(convolution_alone, dilation=2),
        "gpu",
        [MAP],
        [parameters(3, 3, 16, 24, seed=3) / 12],
        1.1,
    ),
    "interleaved_far": (
        functools.partial(convolution_alone, dilation=4),
        "gpu",
        [MAP],
        [parameters(3, 3, 16, 24, seed=3) / 12],
        1.1,
    ),
    "matrix_product": (
        functools.partial(convolution_alone, dilation=1),
        "cpu",
        [MAP],
        [parameters(1, 1, 16, 24, seed=3) / 4],
        1.1,
    ),
    # Winograd's sums would lose four times as much: they are for full precision.
    "wide": (
        functools.partial(convolution_alone, dilation=1),
        "cpu",
        [drawn(1, 8, 8, 128, seed=0)],
        [parameters(3, 3, 128, 128, seed=3) / 34],
        1.1,
    ),
    # The scale is rounded once more, inside of the kernel, and the shift with the bias.
    "norm": (
        functools.partial(convolution_and_frozen_norm, dilation=1),
        "gpu",
        [MAP],
        [parameters(1, 1, 16, 24, seed=3) / 4, *NORM],
        1.7,
    ),
    "norm_dilated": (
        functools.partial(convolution_and_frozen_norm, dilation=2),
        "gpu",
        [MAP],
        [parameters(3, 3, 16, 24, seed=3) / 12, *NORM],
        1.7,
    ),
    # What the levels add is rounded before it is added.
    "pyramid": (
        convolution_of_pyramid,
        "gpu",
        [MAP, *LEVELS],
        [parameters(3, 3, 32, 24, seed=3) / 16, parameters(24, seed=5)],
        1.4,
    ),
}
ONE_ROUNDING = 0.0017  # to bfloat16: the root mean square of what is lost, of that of the numbers


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square over channels of |found - exact| / |exact|."""
    found, exact = (x.reshape(-1, x.shape[-1]) for x in (found, exact))
    parts = np.linalg.norm(found - exact, axis=0) / np.linalg.norm(exact, axis=0)
    return float(np.sqrt(np.mean(parts**2)))


@pytest.mark.parametrize(
    ("function", "platform", "maps", "weights", "factor"), HALF.values(), ids=HALF
)
def test_half_precision_is_not_lost_in_forms(function, platform, maps, weights, factor):
    """Value and every gradient, against the plain form in float64 of the same numbers."""

    def differentiate(dtype, platform):
        @jit
        def value_and_gradients(maps, weights):
            y, transpose = jax.vjp(
                lambda maps, weights: function(*maps, *weights, dtype=dtype, platform=platform),
                maps,
                weights,
            )
            assert y.dtype == dtype
            return y, *jax.tree.leaves(transpose(jnp.asarray(drawn(*y.shape, seed=7), dtype)))

        wide = jnp.promote_types(dtype, jnp.float32)
        found = value_and_gradients(
            [jnp.asarray(x, dtype) for x in maps], [jnp.asarray(x, wide) for x in weights]
        )
        return [np.asarray(x, np.float64) for x in found]

    with jax.enable_x64(True):
        exact = differentiate(jnp.float64, None)
        plain, form = differentiate(jnp.bfloat16, None), differentiate(jnp.bfloat16, platform)
    for found, usual, golden in zip(form, plain, exact, strict=True):
        error, expected = (relative_error(x, golden) for x in (found, usual))
        assert expected < 4 * ONE_ROUNDING
        assert error < factor * max(expected, ONE_ROUNDING)
