"""The convolution over a pyramid against its plain statement: stretch, concatenate, convolve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax import programs
from pspnet_jax.models.convolution import convolve
from pspnet_jax.models.layers import TORCH_DEFAULT, BatchNorm, Conv, ConvWeights, NoRandomNumbers
from pspnet_jax.models.pyramid import Pyramid, PyramidPooling, fuse
from pspnet_jax.resample import adaptive_average_pools, resize

from compiling import jit

BUDGET_SECONDS = 30


def fuse_plainly(pyramid: Pyramid, conv: Conv) -> jax.Array:
    """What `fuse` must give, with every array that it avoids."""
    size = pyramid.map.shape[1:3]
    levels = [resize(x, size, align_corners=pyramid.align_corners) for x in pyramid.levels]
    parts = [pyramid.map, *levels] if pyramid.map_first else [*levels, pyramid.map]
    x = jnp.concatenate(parts, axis=-1).astype(conv.dtype)
    y = convolve(x, conv.kernel[...].astype(conv.dtype))
    return y if conv.bias is None else y + conv.bias[...].astype(conv.dtype).reshape(1, 1, 1, -1)


class Fused(nnx.Module):
    """A pyramid on 4 channels and the convolution over it, to 5."""

    def __init__(self, *, kernel_size=3, use_bias=False, dtype=jnp.float64, **overrides):
        rng = np.random.default_rng(0)
        conv = functools.partial(Conv, initializer=TORCH_DEFAULT, dtype=dtype)
        options = {
            "bins": (1, 2, 3, 6),
            "pool": "average",
            "reduction": True,
            "align_corners": True,
        }
        self.pyramid = PyramidPooling(4, conv=conv, norm=BatchNorm, rng=rng, **options | overrides)
        channels = self.pyramid.out_channels
        self.conv = conv(channels, 5, kernel_size, use_bias=use_bias, rng=rng)


CASES = {
    "published": (12, 12, {}),
    "half_pixel": (6, 8, {"align_corners": False, "bins": (2, 3)}),
    "overlapping_bins": (7, 9, {"bins": (1, 6)}),
    "more_bins_than_pixels": (5, 1, {"bins": (1, 6)}),
    "no_levels": (4, 5, {"bins": ()}),
    "pooled_maps_as_levels": (6, 5, {"reduction": False, "bins": (3,)}),
    "maximum": (6, 7, {"pool": "max", "bins": (1, 3)}),
    "progressive": (
        6,
        8,
        {
            "bins": (1, 3),
            "reduction": False,
            "linear": True,
            "map_first": False,
            "kernel_size": 1,
            "use_bias": True,
        },
    ),
    "wide_kernel_map_last": (6, 8, {"map_first": False, "kernel_size": 5, "bins": (1, 2)}),
}


@pytest.mark.parametrize(("height", "width", "options"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_concatenation(height, width, options):
    rng = np.random.default_rng(1)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((2, height, width, 4)))
        weights = jnp.asarray(rng.standard_normal((2, height, width, 5)))
        graphdef, *state = nnx.split(Fused(**options), nnx.Param, nnx.BatchStat)
        params, batch_stats = map(nnx.to_pure_dict, state)
        # Moved upwards, so that no level is 0 after its ReLU.
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64) + 0.5, params)

        @functools.partial(jit, static_argnums=0)
        @functools.partial(jax.value_and_grad, argnums=(1, 2), has_aux=True)
        def differentiate(fuse, params, x):
            model = nnx.merge(graphdef, params, batch_stats)
            y = fuse(model.pyramid(x, train=False), model.conv)
            return jnp.sum(y * weights), y

        values = jax.tree.leaves(differentiate(functools.partial(fuse, train=True), params, x))
        expected = jax.tree.leaves(differentiate(fuse_plainly, params, x))
        assert all(value.dtype == jnp.float64 for value in values)
    assert expected[1].shape == (2, height, width, 5)
    for value, golden in zip(values, expected, strict=True):
        assert np.abs(golden).max() > 1e-3  # nothing is left out
        np.testing.assert_allclose(value, golden, rtol=0, atol=1e-12 * np.abs(golden).max())


def drawn(*, kernel_size, dtype) -> tuple[Pyramid, Conv]:
    """A map of 3 channels, levels of 4 and of 5, all to 6."""
    rng = np.random.default_rng(2)
    shapes = [(2, 7, 9, 3), (2, 2, 2, 4), (2, 3, 3, 5)]
    x, *levels = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    conv = Conv(12, 6, kernel_size, initializer=TORCH_DEFAULT, dtype=dtype, rng=rng)
    return Pyramid(x, tuple(levels)), conv


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_no_level_is_stretched_and_nothing_concatenated(kernel_size):
    pyramid, conv = drawn(kernel_size=kernel_size, dtype=jnp.float32)

    def program(fuse):
        def total(x, levels):
            return jnp.sum(fuse(Pyramid(x, levels), conv) ** 2)

        return str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(pyramid.map, pyramid.levels))

    large = [f"[2,7,9,{channels}]" for channels in (4, 5, 12)]
    ours = program(functools.partial(fuse, train=True))
    assert not [shape for shape in large if shape in ours]
    assert all(shape in program(fuse_plainly) for shape in large)
    assert "scatter" not in ours


def test_parts_of_the_kernel_are_not_kept_from_the_start(monkeypatch):
    """What the barrier is there for: else they are cut off before the network begins."""
    shapes = ((1, 12, 12, 256), (3, 3, 256, 256), (3, 3, 256, 256), (3, 3, 1280, 256))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    conv = Conv(
        1280,
        256,
        3,
        initializer=TORCH_DEFAULT,
        dtype=jnp.float32,
        platform="cpu",
        rng=NoRandomNumbers(),
    )

    def temporary_bytes() -> int:
        def fused(x, first, second, kernel):
            for before in (first, second):
                x = jax.nn.relu(convolve(x, before, platform="cpu"))
            pyramid = Pyramid(x, tuple(adaptive_average_pools(x, (1, 2, 3, 6))))
            return fuse(pyramid, conv, ConvWeights(kernel, None), train=True)

        compiled = programs.compile_step(jax.jit(fused), *arguments, platform="cpu")
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary_bytes()
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    assert ours < 0.8 * temporary_bytes()


def test_half_precision_is_stretched_and_summed_in_full_precision():
    """What the levels add is rounded once, to the 8 bits of bfloat16."""
    pyramid, conv = drawn(kernel_size=3, dtype=jnp.bfloat16)
    conv.kernel[...] = conv.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    x, levels = jnp.zeros_like(pyramid.map), pyramid.levels
    y = jit(lambda levels: fuse(Pyramid(x, levels), conv, train=True))(levels)
    assert y.dtype == jnp.bfloat16

    conv.dtype = jnp.float32
    x, *levels = (level.astype(jnp.float32) for level in (x, *levels))
    exact = jit(lambda levels: fuse_plainly(Pyramid(x, levels), conv))(tuple(levels))
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)
