"""Protocols over a function Images -> Logits, without any network."""

import jax
import jax.numpy as jnp
import numpy as np

from pspnet_jax.windows import PROTOCOLS, Protocol, probabilities

BUDGET_SECONDS = 10


def lopsided(images):
    """Logits that depend on the column, so that a mirror image changes them."""
    columns = jnp.arange(images.shape[2], dtype=jnp.float32).reshape(1, 1, -1, 1)
    return jnp.concatenate([images[..., :1] * columns, images[..., 1:]], axis=-1)


IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 3)), jnp.float32)


def test_without_flip_it_is_the_softmax():
    plain = Protocol("whole", flip=False, absent_class="skip")
    found = probabilities(lopsided, IMAGES, protocol=plain)
    np.testing.assert_allclose(found, jax.nn.softmax(lopsided(IMAGES)), atol=1e-6)


def test_flip_averages_probabilities_of_both_directions():
    found = probabilities(lopsided, IMAGES, protocol=PROTOCOLS["whole"])
    mirrored = np.asarray(jax.nn.softmax(lopsided(IMAGES[:, :, ::-1])))[:, :, ::-1]
    expected = (np.asarray(jax.nn.softmax(lopsided(IMAGES))) + mirrored) / 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_with_flip_mirroring_the_image_mirrors_the_result():
    found = probabilities(lopsided, IMAGES, protocol=PROTOCOLS["whole"])
    mirrored = probabilities(lopsided, IMAGES[:, :, ::-1], protocol=PROTOCOLS["whole"])
    np.testing.assert_allclose(np.asarray(mirrored)[:, :, ::-1], found, atol=1e-6)


def test_whole_is_flipped_and_skips_absent_classes():
    assert PROTOCOLS["whole"] == Protocol("whole", flip=True, absent_class="skip")
