"""Whole networks in the forms of each platform against the plain forms: equal but for rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.losses import LossOptions, segmentation_loss
from pspnet_jax.models import convolution
from pspnet_jax.models.convolution import winograd
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train_step import split_model

from networks import options

BUDGET_SECONDS = 100

# Compiling takes nearly all of the time: LLVM is not asked to optimize.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

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
