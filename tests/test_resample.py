"""Pooling and resizing against hand-worked values and independent statements."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.resample import (
    _bands,
    adaptive_average_pool,
    adaptive_average_pools,
    adaptive_max_pool,
    apply_matrix,
    pooling_bins,
    pooling_matrix,
    resize,
    resize_matrix,
    shifted_resize_matrices,
    symbolic_pooling_matrix,
    symbolic_resize_matrix,
)

from compiling import jit

BUDGET_SECONDS = 180


def maps(height, width, *, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((2, height, width, 3)), dtype)


def pool_by_loops(x, num_bins, reduce):
    batch, height, width, channels = x.shape
    result = np.zeros((batch, num_bins, num_bins, channels), x.dtype)
    for i in range(num_bins):
        for j in range(num_bins):
            rows = slice(
                int(np.floor(i * height / num_bins)), int(np.ceil((i + 1) * height / num_bins))
            )
            columns = slice(
                int(np.floor(j * width / num_bins)), int(np.ceil((j + 1) * width / num_bins))
            )
            result[:, i, j] = reduce(x[:, rows, columns], axis=(1, 2))
    return result


def interpolate_by_loops(line, new_size, align_corners):
    """One axis, one sample after the other."""
    size = len(line)
    result = []
    for i in range(new_size):
        if align_corners:
            position = i * (size - 1) / (new_size - 1) if new_size > 1 else 0.0
        else:
            position = min(max((i + 0.5) * size / new_size - 0.5, 0), size - 1)
        lower = int(np.floor(position))
        upper = min(lower + 1, size - 1)
        result.append(line[lower] + (position - lower) * (line[upper] - line[lower]))
    return np.array(result)


def test_bins_of_64_in_6_overlap_as_in_pytorch():
    assert pooling_bins(64, 6) == [(0, 11), (10, 22), (21, 32), (32, 43), (42, 54), (53, 64)]


def test_pooling_matrix_by_hand():
    expected = [[1 / 3, 1 / 3, 1 / 3, 0, 0], [0, 0, 1 / 3, 1 / 3, 1 / 3]]
    np.testing.assert_allclose(pooling_matrix(5, 2), expected)


@pytest.mark.parametrize("size", [(6, 6), (12, 6), (7, 9), (13, 6), (2, 3)])
@pytest.mark.parametrize("num_bins", [1, 2, 3, 6])
def test_pools_equal_loops(size, num_bins):
    x = maps(*size)
    np.testing.assert_allclose(
        adaptive_average_pool(x, num_bins), pool_by_loops(x, num_bins, np.mean), atol=1e-6
    )
    np.testing.assert_array_equal(
        adaptive_max_pool(x, num_bins), pool_by_loops(x, num_bins, np.max)
    )


def for_any_size(function):
    """A function of maps, traced once while batch, height and width are symbols."""
    batch, height, width = jax.export.symbolic_shape("batch, height, width")
    x = jax.ShapeDtypeStruct((batch, height, width, 3), np.float32)
    return jax.export.export(jax.jit(function))(x).call


def test_pools_and_resizing_of_symbolic_sizes_equal_those_of_numbers():
    """Also where bins divide, are larger than the map, and where one sample is all there is."""

    def all_of(x):
        smaller, larger = (3, 1), (8 * x.shape[1], 2 * x.shape[2] + 1)
        pooled = [pool(x, n) for pool in (adaptive_average_pool, adaptive_max_pool) for n in (1, 6)]
        resized = [
            resize(x, size, align_corners=align_corners)
            for size in (smaller, larger)
            for align_corners in (True, False)
        ]
        return pooled, resized

    symbolic = for_any_size(all_of)
    for size in ((12, 7), (1, 60)):
        x = maps(*size)
        found, wanted = jax.tree.leaves(symbolic(x)), jax.tree.leaves(jax.jit(all_of)(x))
        assert len(found) == len(wanted) == 8
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6, strict=True)


def test_symbolic_matrices_are_the_constant_ones_rounded_once():
    for align_corners, size, new_size in (
        (True, 90, 713),
        (False, 90, 713),
        (True, 512, 4096),
        (False, 512, 4096),
        (True, 5, 1),
        (False, 5, 1),
    ):
        found = symbolic_resize_matrix(size, new_size, align_corners=align_corners)
        exact = resize_matrix(size, new_size, align_corners=align_corners)
        np.testing.assert_allclose(found, exact, rtol=1e-7, atol=1e-10)
    for size in (90, 4):
        found, exact = symbolic_pooling_matrix(size, 6), pooling_matrix(size, 6)
        np.testing.assert_allclose(found, exact, rtol=1e-7)


def test_gradient_of_the_maximum_goes_to_one_value_of_each_bin():
    """Also where XLA computes the input once more, rounded otherwise: it does so for this one."""
    scale, offset, weights = (maps(1, 1, seed=1), maps(1, 1, seed=2), maps(3, 3, seed=3))

    def total(x):
        computed = jax.nn.relu((x - offset[:1]) * scale[:1] + offset[:1] + x)
        return jnp.sum(adaptive_max_pool(computed, 3) * weights)

    x = maps(12, 12)
    compiled = jit(jax.grad(total))(x)
    np.testing.assert_allclose(compiled, jax.grad(total)(x), rtol=1e-5)
    assert (np.asarray(compiled) != 0).sum() == weights.size


def test_gradient_of_equal_maxima_goes_to_the_first():
    gradient = jax.grad(lambda x: adaptive_max_pool(x, 1).sum())(jnp.ones((1, 2, 3, 1)))
    np.testing.assert_array_equal(gradient[0, :, :, 0], [[1, 0, 0], [0, 0, 0]])


def test_reshape_and_matrix_agree_where_bins_divide():
    x = maps(12, 18)
    rows, columns = pooling_matrix(12, 6), pooling_matrix(18, 6)
    by_matrix = np.einsum("Hh,Ww,nhwc->nHWc", rows, columns, x)
    np.testing.assert_allclose(adaptive_average_pool(x, 6), by_matrix, atol=1e-6)


# Numbers of bins, and how often the map is read for them.
NESTED = [
    ((12, 18), (1, 2, 3, 6), 1),
    ((12, 18), (6, 4, 3), 2),
    ((9, 6), (1, 2, 3, 6), 3),
    ((7, 5), (2,), 1),
]


@pytest.mark.parametrize(("size", "bins", "num_reads"), NESTED)
def test_pools_whose_bins_nest_read_the_map_once(size, bins, num_reads):
    x = maps(*size)
    pool = jax.jit(lambda x: adaptive_average_pools(x, bins))
    for num_bins, pooled in zip(bins, pool(x), strict=True):
        np.testing.assert_allclose(pooled, pool_by_loops(x, num_bins, np.mean), atol=1e-6)
    program = pool.trace(x).jaxpr
    reads = [eqn for eqn in program.jaxpr.eqns if program.jaxpr.invars[0] in eqn.invars]
    assert len(reads) == num_reads


def test_half_precision_is_pooled_once_in_full_precision():
    x = jnp.asarray(maps(12, 12), jnp.bfloat16)
    pools = jax.jit(lambda x: adaptive_average_pools(x, (1, 2, 6)))(x)
    for num_bins, pool in zip((1, 2, 6), pools, strict=True):
        assert pool.dtype == jnp.bfloat16
        exact = pool_by_loops(np.asarray(x, np.float32), num_bins, np.mean)
        np.testing.assert_allclose(pool.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("size", "new_size"), [(6, 60), (1, 5), (5, 1), (7, 3), (4, 4), (2, 17)])
def test_resize_matrix_equals_interpolation(size, new_size, align_corners):
    line = np.random.default_rng(1).standard_normal(size)
    matrix = resize_matrix(size, new_size, align_corners=align_corners)
    np.testing.assert_allclose(
        matrix @ line, interpolate_by_loops(line, new_size, align_corners), atol=1e-12
    )
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-12)


@pytest.mark.parametrize("num_shifts", [1, 3, 5])
def test_shifted_matrices_by_hand(num_shifts):
    matrices = shifted_resize_matrices(2, 3, num_shifts=num_shifts, align_corners=True)
    zero, rows = [0, 0], [[1, 0], [0.5, 0.5], [0, 1]]
    padded = [zero, zero, *rows, zero, zero]
    start = 2 - num_shifts // 2
    expected = [padded[start + row : start + row + num_shifts] for row in range(3)]
    np.testing.assert_array_equal(matrices, expected)


def test_half_pixel_rule_is_that_of_jax_image():
    x = maps(6, 7)
    expected = jax.image.resize(x, (2, 20, 33, 3), "linear", antialias=False)
    np.testing.assert_allclose(resize(x, (20, 33), align_corners=False), expected, atol=1e-5)


def test_align_corners_keeps_corners_and_ramps():
    ramp = jnp.broadcast_to(jnp.arange(5.0).reshape(1, 5, 1, 1), (1, 5, 4, 1))
    large = np.asarray(resize(ramp, (33, 25), align_corners=True))
    np.testing.assert_allclose(large[0, :, 3, 0], np.linspace(0, 4, 33), atol=1e-6)
    x = maps(3, 4)
    corners = np.asarray(resize(x, (17, 25), align_corners=True))[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(corners, x[:, [0, 0, -1, -1], [0, -1, 0, -1]], atol=1e-6)


def test_mirroring_commutes():
    x = maps(7, 9)
    for align_corners in (True, False):
        mirrored = resize(x[:, :, ::-1], (20, 31), align_corners=align_corners)
        straight = resize(x, (20, 31), align_corners=align_corners)
        np.testing.assert_allclose(mirrored[:, :, ::-1], straight, atol=1e-6)
    np.testing.assert_allclose(
        adaptive_average_pool(x[:, :, ::-1], 6)[:, :, ::-1], adaptive_average_pool(x, 6), atol=1e-6
    )


@pytest.mark.parametrize("platform", [None, "cpu", "gpu"])
def test_half_precision_is_resized_in_full_precision(platform):
    x = jnp.asarray(maps(6, 6), jnp.bfloat16)
    exact = resize(x.astype(jnp.float32), (41, 41), align_corners=True, platform=platform)
    y = resize(x, (41, 41), align_corners=True, platform=platform)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("platform", [None, "cpu", "gpu"])
def test_gradient_has_no_scatter(platform):
    def total(x):
        pooled = adaptive_average_pool(x, 6)
        return jnp.sum(resize(pooled, (65, 49), align_corners=True, platform=platform) ** 2)

    program = str(jax.make_jaxpr(jax.grad(total))(jnp.ones((1, 13, 9, 2))))
    assert "scatter" not in program
    assert ("gather" in program) == (platform is not None)


# (size, new size) along one axis: up, up by a number that does not divide, down, a single sample, more than a 16th.
AXES = [(5, 33), (6, 17), (6, 12), (9, 4), (1, 7), (7, 1), (2, 60)]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("by_sums_on", ["cpu", "gpu"])
@pytest.mark.parametrize(("size", "new_size"), AXES)
def test_sums_of_samples_are_the_product(size, new_size, by_sums_on, align_corners):
    """Values and gradient of the form for CPUs and GPUs, and that it is taken."""
    matrix = resize_matrix(size, new_size, align_corners=align_corners)

    def apply(x, axis, platform):
        return apply_matrix(x, matrix, axis=axis, platform=platform)

    with jax.enable_x64(True):
        x = maps(size, size, dtype=np.float64)
        for axis in (1, 2):
            expected, back = jax.vjp(functools.partial(apply, axis=axis, platform=None), x)
            by_sums = functools.partial(apply, axis=axis, platform=by_sums_on)
            found, back_by_sums = jax.vjp(by_sums, x)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)
            gradient = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape))
            pair = back_by_sums(gradient)[0], back(gradient)[0]
            np.testing.assert_allclose(*pair, rtol=0, atol=1e-13)
        program = str(jax.make_jaxpr(by_sums)(x))
        gradient = str(jax.make_jaxpr(lambda x, g: jax.vjp(by_sums, x)[1](g))(x, by_sums(x)))
    assert "dot_general" not in program
    # The gradient of a sample that becomes 60 would be a sum of too many; on CPUs five are the most.
    is_product = new_size == 60 if by_sums_on == "gpu" else new_size in (7, 17, 33, 60)
    assert ("dot_general" in gradient) == is_product


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("new_width", [3, 7])
@pytest.mark.parametrize(("size", "new_size"), [*AXES, (60, 473)])
def test_computed_positions_are_those_of_the_matrix(size, new_size, new_width, align_corners):
    """Values and gradient of resizing for GPUs, at positions that no table holds, from a width of 3."""
    with jax.enable_x64(True):
        x = maps(size, 3, dtype=np.float64)
        forms = [
            functools.partial(
                resize, size=(new_size, new_width), align_corners=align_corners, platform=each
            )
            for each in (None, "gpu", "cpu")
        ]
        (expected, back), (found, back_by_sums) = (jax.vjp(form, x) for form in forms[:2])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13)
        gradient = jnp.asarray(np.random.default_rng(1).standard_normal(expected.shape))
        pair = back_by_sums(gradient)[0], back(gradient)[0]
        np.testing.assert_allclose(*pair, rtol=0, atol=1e-13)
        computed, tables = (
            max(map(np.size, jax.make_jaxpr(form)(x).consts), default=0) for form in forms[1:]
        )
    assert computed <= 1
    assert tables >= new_size


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("size", "new_size"), [*AXES, (97, 40), (473, 60)])
def test_places_ascend(size, new_size, align_corners):
    """As XLA is told, over rows that are empty, too."""
    matrix = resize_matrix(size, new_size, align_corners=align_corners)
    for each in (matrix, matrix.T):
        assert (np.diff(_bands(each).places, axis=0) >= 0).all()


def test_bands_hold_every_entry():
    matrix = np.array([[1, 0, 2, 0], [0, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, 5.0]])
    places, weights = _bands(matrix)
    assert places.shape == weights.shape == (4, 3)
    rebuilt = np.zeros_like(matrix)
    np.add.at(rebuilt, (np.arange(4)[:, None], places), weights)
    np.testing.assert_array_equal(rebuilt, matrix)
