"""A function in two parts, cut where it is marked; and networks whose weights were prepared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal

from pspnet_jax import passes
from pspnet_jax.models import marks
from pspnet_jax.models.families import FAMILIES, IMAGENET_8BIT
from pspnet_jax.models.marks import Prepared, once
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train_step import split_model

from compiling import jit
from networks import options, random

BUDGET_SECONDS = 120


def dense(weights, x, y):
    """What is marked, what is not, a weight that nothing needs, two inputs and a tree as a result."""
    kernel = once(weights["kernel"] * jnp.exp(weights["scale"]), dtype=jnp.bfloat16)
    z = x @ kernel.astype(jnp.bfloat16).astype(jnp.float32) + weights["bias"]
    return {"z": jnp.where(y, z, once(weights["last"] + 1)), "y": y}


@pytest.fixture
def weights():
    names = {"kernel": (4, 3), "scale": (4, 3), "bias": (2, 3), "last": (2, 3), "unused": (5,)}
    return {name: random(*shape, seed=i) for i, (name, shape) in enumerate(names.items())}


@pytest.fixture
def inputs():
    return random(2, 4, seed=9), random(2, 3, seed=8) > 0


def test_apply_is_the_function(weights, inputs):
    shapes = jax.eval_shape(lambda: weights)
    with jax.enable_checks(True):  # JAX's own, of what `marks` makes
        prepared = marks.prepare(dense, weights, *jax.eval_shape(lambda: inputs))
        found = marks.apply(dense, shapes, prepared, *inputs)
    expected = dense(weights, *inputs)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value)


def test_only_what_is_needed_is_kept(weights, inputs):
    values, others = marks.prepare(dense, weights, *inputs)
    assert [(x.shape, x.dtype) for x in values] == [((4, 3), jnp.bfloat16), ((2, 3), jnp.float32)]
    (bias,) = others
    np.testing.assert_array_equal(bias, weights["bias"])


def test_nothing_that_is_kept_is_made_again(weights, inputs):
    prepared = marks.prepare(dense, weights, *inputs)
    apply = functools.partial(marks.apply, dense, weights)
    rest = str(jax.make_jaxpr(apply)(prepared, *inputs))
    whole = str(jax.make_jaxpr(dense)(weights, *inputs))
    assert " exp " in whole
    assert "exp" not in rest
    assert " dot_general" in rest


def test_marks_change_neither_values_nor_gradients(weights, inputs, monkeypatch):
    def total(weights):
        return jnp.sum(dense(weights, *inputs)["z"] ** 2)

    marked = jax.value_and_grad(total)(weights)
    monkeypatch.setitem(globals(), "once", lambda x, dtype=None: x)
    assert jax.tree.all(jax.tree.map(np.array_equal, marked, jax.value_and_grad(total)(weights)))


def test_what_is_made_of_inputs_cannot_be_marked(weights, inputs):
    def wrong(weights, x, y):
        return once(x @ weights["kernel"])

    with pytest.raises(
        ValueError, match=r"of shape \(2, 3\) that is marked by `once` is made of the inputs, too"
    ):
        marks.prepare(wrong, weights, *inputs)


def network_of(**given) -> tuple[passes.Network, tuple]:
    """For GPUs, whose forms also run here, and weights that no norm leaves alone."""
    network = passes.Network(options(**given), 5, IMAGENET_8BIT, platform="gpu")
    model = PSPNet(network.model, 5, rng=np.random.default_rng(0), platform="gpu")
    rng = np.random.default_rng(1)

    def moved(leaf):
        by = rng.uniform(-0.2, 0.2, leaf.shape) if leaf.ndim == 1 else 0
        return jnp.asarray(leaf + by, leaf.dtype)

    return network, jax.tree.map(moved, split_model(model)[1:])


@pytest.mark.parametrize(
    ("backbone", "family", "dtype"),
    [
        ("resnet10", "semseg", "float32"),
        ("densenet121", "semseg", "float32"),
        ("squeezenet", "lextal", "bfloat16"),
        *(("resnet50", family, "bfloat16") for family in FAMILIES),
    ],
)
def test_prepared_weights_give_the_same_logits(backbone, family, dtype):
    network, weights = network_of(backbone=backbone, family=family, dtype=dtype)
    prepared = passes.prepare(weights, network=network)
    assert isinstance(prepared, Prepared)
    side = network.model.size_rule.padded(33)
    images = np.random.default_rng(2).integers(0, 256, (1, side, side, 3), np.uint8)
    logits = jit(functools.partial(passes.logits, network=network))
    expected, found = np.asarray(logits(weights, images)), np.asarray(logits(prepared, images))
    assert np.ptp(expected) > 0.1
    # Norms are folded in float32 either way, and sums on a CPU may be taken in another order.
    rtol = {"float32": 1e-5, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_a_pass_makes_no_kernel_and_no_bias():
    """Of prepared kernels it only names the axes, and it only repeats biases (XLA for GPUs takes both as they are)."""
    network, weights = network_of(backbone="resnet50", dtype="bfloat16")
    images = jax.ShapeDtypeStruct((1, 33, 33, 3), jnp.float32)

    def made_of(weights, ndim: int) -> set[str]:
        """Names of the equations that take nothing but weights of so many axes."""
        logits = functools.partial(passes._logits_of, network=network)
        jaxpr = jax.make_jaxpr(logits)(weights, images).jaxpr
        known, found = {x for x in jaxpr.invars[:-1] if x.aval.ndim == ndim}, set()
        for equation in jaxpr.eqns:
            inputs = {x for x in equation.invars if not isinstance(x, Literal)}
            if inputs and inputs <= known:
                known |= set(equation.outvars)
                found.add(equation.primitive.name)
        return found

    prepared = passes.prepare(weights, network=network)
    assert made_of(prepared, 4) == {"transpose"}
    assert made_of(prepared, 1) == {"convert_element_type", "broadcast_in_dim", "reshape"}
    assert "convert_element_type" in made_of(weights, 4)
    assert {"mul", "rsqrt", "add"} <= made_of(weights, 1)


def test_prepared_kernels_are_rounded_and_begin_with_their_output_channels():
    network, weights = network_of(backbone="resnet50", dtype="bfloat16")
    values, others = passes.prepare(weights, network=network)
    kernels = [x for x in values if x.ndim == 4]
    assert not others
    biases = [x for x in values if x.ndim == 1]
    assert {x.dtype for x in biases} == {jnp.dtype(jnp.bfloat16)}
    # 3 of the stem, 16 blocks of 3, 4 projections, 4 levels, the map behind the pyramid, the classifier.
    rounded = [x.shape for x in kernels if x.dtype == jnp.bfloat16]
    assert len(rounded) == len(biases) == 3 + 16 * 3 + 4 + 4 + 1 + 1
    assert rounded[0] == (8, 3, 3, 3)
    assert rounded[-1] == (5, 1, 1, 64)
    # Those of the levels are rounded, too, but kept as their products take them.
    wide = [x for x in kernels if x.dtype == jnp.float32]
    assert [x.shape for x in wide] == [(3, 3, 64, 64)] * 4
    for kernel in wide:
        np.testing.assert_array_equal(kernel, kernel.astype(jnp.bfloat16).astype(jnp.float32))
