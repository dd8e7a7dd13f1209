"""Every form of a convolution against the plain one: values and gradients; which is chosen where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import parallel, programs
from pspnet_jax.models import convolution
from pspnet_jax.models.convolution import (
    batch_to_space,
    convolve,
    direct,
    interleaved,
    matrix_product,
    space_to_batch,
    winograd,
)

from compiling import jit

BUDGET_SECONDS = 60


def drawn(*shape, dtype, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def value_and_gradients(function, x, kernel):
    """y and the gradients of a weighted sum of it, for map and kernel."""
    weights = drawn(*jax.eval_shape(function, x, kernel).shape, dtype=x.dtype, seed=7)

    @jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def differentiate(x, kernel):
        y = function(x, kernel)
        return jnp.sum(y * weights), y

    (_, y), gradients = differentiate(x, kernel)
    return y, *gradients


def assert_close(found, expected, *, relative):
    for value, golden in zip(found, expected, strict=True):
        assert value.shape == golden.shape
        assert value.dtype == golden.dtype
        np.testing.assert_allclose(value, golden, rtol=0, atol=relative * np.abs(golden).max())


FORMS = {
    "winograd": (winograd, 3, 1),
    "winograd_dilated": (winograd, 3, 2),
    "winograd_far": (winograd, 3, 4),
    "interleaved": (interleaved, 3, 2),
    "interleaved_far": (interleaved, 3, 4),
    "interleaved_wide": (interleaved, 5, 3),
    "matrix_product": (lambda x, kernel, dilation: matrix_product(x, kernel), 1, 1),
}


@pytest.mark.parametrize(("form", "size", "dilation"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("height", "width"), [(8, 16), (9, 5)])
@pytest.mark.parametrize(("dtype", "relative"), [("float64", 1e-10), ("float32", 1e-5)])
def test_forms_are_the_plain_convolution(form, size, dilation, height, width, dtype, relative):
    with jax.enable_x64(True):
        x = drawn(2, height, width, 3, dtype=dtype)
        kernel = drawn(size, size, 3, 4, dtype=dtype, seed=1)
        found = value_and_gradients(lambda x, kernel: form(x, kernel, dilation), x, kernel)
        expected = value_and_gradients(lambda x, kernel: direct(x, kernel, dilation), x, kernel)
    assert_close(found, expected, relative=relative)


@pytest.mark.parametrize("dilation", [1, 2])
def test_mirrored_winograd_is_the_gradient_of_the_map(dilation):
    with jax.enable_x64(True):
        x, gradient = drawn(2, 7, 9, 3, dtype="float64"), drawn(2, 7, 9, 4, dtype="float64", seed=2)
        kernel = drawn(3, 3, 3, 4, dtype="float64", seed=1)
        found = jit(lambda g: winograd(g, kernel, dilation, mirrored=True))(gradient)
        _, transpose = jax.vjp(lambda x: direct(x, kernel, dilation), x)
        expected = transpose(gradient)
    assert_close([found], expected, relative=1e-10)


CHOICES = {  # platform, channels in and out, kernel size, stride, dilation
    "winograd": ("cpu", (128, 130), 3, 1, 2),
    "winograd_for_the_kernel_alone": ("cpu", (64, 128), 3, 1, 1),
    "winograd_too_small": ("cpu", (128, 128), 3, 1, 4),
    "narrow": ("cpu", (3, 5), 3, 1, 1),
    "matrix_product": ("cpu", (3, 5), 1, 1, 1),
    "matrix_product_strided": ("cpu", (3, 5), 1, 2, 1),
    "strided": ("cpu", (3, 5), 3, 2, 1),
    "interleaved": ("gpu", (3, 5), 3, 1, 2),
    "native": ("gpu", (3, 5), 3, 1, 1),
    "tpu": ("tpu", (3, 5), 3, 1, 2),
}


@pytest.mark.parametrize(
    ("platform", "channels", "size", "stride", "dilation"), CHOICES.values(), ids=CHOICES
)
def test_what_is_chosen_is_the_plain_convolution(platform, channels, size, stride, dilation):
    x = drawn(2, 9, 12, channels[0], dtype=jnp.float32)
    kernel = drawn(size, size, *channels, dtype=jnp.float32, seed=1)

    def function(x, kernel, *, platform):
        return convolve(x, kernel, stride=stride, dilation=dilation, platform=platform)

    found, expected = (
        value_and_gradients(functools.partial(function, platform=chosen), x, kernel)
        for chosen in (platform, None)
    )
    assert_close(found, expected, relative=1e-5)


@pytest.mark.parametrize(
    ("platform", "channels", "dilation", "value", "kernel_gradient"),
    [
        ("cpu", (128, 128), 1, winograd, winograd),
        ("cpu", (64, 128), 1, direct, winograd),
        ("cpu", (64, 32), 1, direct, direct),
        ("cpu", (256, 256), 8, direct, direct),  # tiles of 16 pixels on sides of 20: mostly padding
        ("gpu", (256, 256), 1, direct, direct),
        ("gpu", (256, 256), 4, direct, interleaved),
        ("tpu", (256, 256), 4, direct, direct),
    ],
)
def test_choice_by_shape_and_platform(platform, channels, dilation, value, kernel_gradient):
    arguments = (jnp.zeros((1, 20, 20, channels[0])), jnp.zeros((3, 3, *channels)))
    assert convolution._form_of_value(*arguments, dilation, platform) is value
    assert convolution._form_of_kernel_gradient(*arguments, dilation, platform) is kernel_gradient


def test_half_precision_is_not_taken_apart():
    x, kernel = jnp.zeros((1, 20, 20, 128), jnp.bfloat16), jnp.zeros((3, 3, 128, 128), jnp.bfloat16)
    assert convolution._form_of_value(x, kernel, 1, "cpu") is direct
    assert convolution._form_of_kernel_gradient(x, kernel, 1, "cpu") is direct


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (3, 2)])
def test_splitting_is_undone(size):
    x = drawn(2, *size, 3, dtype=jnp.float32)
    split = space_to_batch(x, 4)
    np.testing.assert_array_equal(batch_to_space(split, 4, size), x)
    np.testing.assert_array_equal(split[0, 0, 0], x[0, 0, 0])
    np.testing.assert_array_equal(split[16, 0, 0], x[1, 0, 0])  # the batch stays outermost


@pytest.mark.parametrize(
    ("platform", "channels", "dilation"), [("cpu", 128, 2), ("cpu", 258, 1), ("gpu", 4, 2)]
)
def test_a_split_batch_stays_split(platform, channels, dilation, monkeypatch):
    """Every device convolves its own images, in groups of channels or not: only the gradient of the kernel is added up."""
    monkeypatch.setattr(convolution, "_MOST_CHANNELS", 130)
    mesh = parallel.make_mesh()
    x = drawn(8, 8, 8, channels, dtype=jnp.float32)
    kernel = drawn(3, 3, channels, channels, dtype=jnp.float32, seed=1)

    def gradients(x, kernel, *, platform):
        def total(x, kernel):
            return jnp.sum(convolve(x, kernel, dilation=dilation, platform=platform) ** 2)

        return jax.grad(total, argnums=(0, 1))(x, kernel)

    shardings = (parallel.split_batch(mesh), parallel.replicated(mesh))
    compiled = (
        jit(
            functools.partial(gradients, platform=platform),
            in_shardings=shardings,
            out_shardings=shardings,
        )
        .lower(x, kernel)
        .compile()
    )
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]
    found = compiled(*jax.device_put((x, kernel), shardings))
    assert_close(found, gradients(x, kernel, platform=None), relative=1e-5)


def test_what_winograd_makes_of_maps_is_not_kept_for_the_backward_pass(monkeypatch):
    """What the barrier is there for: without it, a map four times as large of every convolution."""
    x, kernels = jnp.zeros((1, 16, 16, 128)), [jnp.zeros((3, 3, 128, 128))] * 3

    def temporary_bytes() -> int:
        def total(kernels):
            y = x
            for kernel in kernels:
                y = jax.nn.relu(convolve(y, kernel, platform="cpu"))
            return jnp.sum(y**2)

        compiled = programs.compile_step(jax.jit(jax.grad(total)), kernels, platform="cpu")
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary_bytes()
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda operands: operands)
    assert ours < 0.8 * temporary_bytes()


def wide_step(monkeypatch, most):
    """Value and gradients of a convolution of 259 channels, at most so many at once; its temporaries in bytes."""
    monkeypatch.setattr(convolution, "_MOST_CHANNELS", most)
    x = drawn(2, 24, 24, 259, dtype=jnp.float32)
    kernel = drawn(3, 3, 259, 128, dtype=jnp.float32, seed=1)

    def loss(x, kernel):
        return jnp.sum(convolve(x, kernel, platform="cpu") ** 2)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    compiled = programs.compile_step(step, x, kernel, platform="cpu")
    value, gradients = compiled(x, kernel)
    return [value, *gradients], compiled.memory_analysis().temp_size_in_bytes


def test_wide_maps_are_taken_in_groups_of_channels(monkeypatch):
    """Groups of 130 and 129: the same values, in less memory because one comes after the other."""
    expected, whole = wide_step(monkeypatch, most=259)
    found, parts = wide_step(monkeypatch, most=130)
    assert_close(found, expected, relative=1e-5)
    assert parts < 0.85 * whole


@pytest.mark.parametrize(("channels", "groups"), [(1024, 1), (1025, 2), (2048, 2), (2049, 3)])
def test_a_group_has_at_most_1024_channels(channels, groups):
    shapes = (
        jax.ShapeDtypeStruct((1, 30, 30, channels), jnp.float32),
        jax.ShapeDtypeStruct((3, 3, channels, 512), jnp.float32),
    )
    text = str(jax.make_jaxpr(functools.partial(convolve, platform="cpu"))(*shapes))
    assert text.count("optimization_barrier") == groups - 1


def test_where_all_forms_are_plain_forward_mode_is_there():
    x, kernel = drawn(1, 4, 4, 3, dtype=jnp.float32), drawn(3, 3, 3, 2, dtype=jnp.float32)
    _, moved = jax.jvp(lambda x: convolve(x, kernel, platform="cpu"), (x,), (x,))
    np.testing.assert_allclose(moved, direct(x, kernel, 1), rtol=1e-6, atol=1e-6)
