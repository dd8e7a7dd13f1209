"""Cross-entropy against hand-worked values; what ignored pixels may not do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.arrays import IGNORE_LABEL, Outputs
from pspnet_jax.losses import (
    cross_entropy,
    presence_accuracy,
    presence_loss,
    presence_of,
    segmentation_loss,
)
from pspnet_jax.resample import resize

BUDGET_SECONDS = 30


def logits_and_labels(seed=0, num_ignored=7):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((2, 5, 5, 4)).astype(np.float32)
    labels = rng.integers(0, 4, (2, 5, 5)).astype(np.uint8)
    labels.reshape(-1)[rng.permutation(50)[:num_ignored]] = IGNORE_LABEL
    return jnp.asarray(logits), jnp.asarray(labels)


def test_two_pixels_by_hand():
    logits = jnp.log(jnp.array([[[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]]]))
    labels = jnp.array([[[0, 2]]], jnp.uint8)
    expected = -(np.log(0.5) + np.log(0.8)) / 2
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_mean_is_over_valid_pixels_of_the_whole_batch():
    logits, labels = logits_and_labels()
    labels = labels.at[1].set(IGNORE_LABEL).at[1, 0, 0].set(2)
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64)
    valid = np.asarray(labels) != IGNORE_LABEL
    chosen = np.take_along_axis(probabilities, np.where(valid, labels, 0)[..., None], -1)[..., 0]
    expected = -np.log(chosen[valid]).mean()
    assert float(cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-5)


def test_ignored_pixels_have_no_gradient_and_others_have_softmax_minus_one_hot():
    logits, labels = logits_and_labels()
    gradient = np.asarray(jax.grad(cross_entropy)(logits, labels))
    valid = np.asarray(labels) != IGNORE_LABEL
    assert not gradient[~valid].any()
    one_hot = np.eye(4)[np.where(valid, labels, 0)]
    expected = (np.asarray(jax.nn.softmax(logits)) - one_hot) / valid.sum()
    np.testing.assert_allclose(gradient[valid], expected[valid], atol=1e-6)


def test_everything_ignored_is_zero_with_zero_gradient():
    logits, _ = logits_and_labels()
    labels = jnp.full((2, 5, 5), IGNORE_LABEL, jnp.uint8)
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, labels)
    assert float(loss) == 0
    assert not np.asarray(gradient).any()


def test_gradient_has_no_scatter():
    logits, labels = logits_and_labels()
    assert "scatter" not in str(jax.make_jaxpr(jax.grad(cross_entropy))(logits, labels))


def test_large_logits_stay_finite():
    logits, labels = logits_and_labels()
    assert np.isfinite(cross_entropy(logits * 1e4, labels))


def test_auxiliary_loss_is_weighted():
    rng = np.random.default_rng(0)
    main, aux = (jnp.asarray(rng.standard_normal((2, 2, 2, 4)), jnp.float32) for _ in range(2))
    _, labels = logits_and_labels()
    losses = segmentation_loss(Outputs(main, aux), labels, aux_weight=0.4, align_corners=True)
    alone = segmentation_loss(Outputs(main), labels, aux_weight=0.4, align_corners=True)
    assert float(losses.total) == pytest.approx(float(losses.main + 0.4 * losses.aux), rel=1e-6)
    assert float(losses.main) == float(alone.total)
    assert float(losses.aux) > 0


def test_logits_are_stretched_to_label_size():
    logits, labels = logits_and_labels()
    found = {}
    for align_corners in (True, False):
        small = logits[:, :3, :2]
        full = resize(small, (5, 5), align_corners=align_corners)
        losses = segmentation_loss(
            Outputs(small), labels, aux_weight=0.0, align_corners=align_corners
        )
        found[align_corners] = float(losses.main)
        assert found[align_corners] == pytest.approx(float(cross_entropy(full, labels)), rel=1e-6)
    assert found[True] != pytest.approx(found[False], rel=1e-3)


def test_shapes_are_checked():
    logits, labels = logits_and_labels()
    with pytest.raises(Exception, match="labels"):
        cross_entropy(logits, labels[:, :4])


def test_class_weights_weigh_pixels_and_divide_by_their_sum():
    logits = jnp.log(jnp.array([[[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]]]))
    labels = jnp.array([[[0, 2, IGNORE_LABEL]]], jnp.uint8)
    found = cross_entropy(logits, labels, class_weights=(3.0, 9.0, 1.0))
    assert float(found) == pytest.approx(-(3 * np.log(0.5) + np.log(0.8)) / 4, rel=1e-6)
    nothing = cross_entropy(logits, jnp.full_like(labels, 1), class_weights=(1.0, 0.0, 1.0))
    assert float(nothing) == 0


PRESENCE_LABELS = jnp.array([[[0, 2, IGNORE_LABEL]], [[1, 1, 1]]], jnp.uint8)
PRESENCE_LOGITS = jnp.array([[2.0, -1.0, 3.0], [-2.0, 0.5, 1.0]])


def test_presence_is_read_from_the_mask_without_void():
    expected = [[True, False, True], [False, True, False]]
    np.testing.assert_array_equal(presence_of(PRESENCE_LABELS, 3), expected)


def test_presence_loss_by_hand():
    signs = np.array([[1, -1, 1], [-1, 1, -1]])
    terms = np.log1p(np.exp(-signs * np.asarray(PRESENCE_LOGITS, np.float64)))
    found = float(presence_loss(PRESENCE_LOGITS, PRESENCE_LABELS))
    assert found == pytest.approx(terms.mean(), rel=1e-6)
    weights = np.array([1.0, 4.0, 0.5])
    found = float(presence_loss(PRESENCE_LOGITS, PRESENCE_LABELS, class_weights=tuple(weights)))
    assert found == pytest.approx((terms * weights).mean(), rel=1e-6)


def test_presence_accuracy_counts_pairs():
    assert float(presence_accuracy(PRESENCE_LOGITS, PRESENCE_LABELS)) == pytest.approx(5 / 6)


def test_both_auxiliary_losses_at_once():
    logits, labels = logits_and_labels()
    outputs = Outputs(logits, 2 * logits, jnp.ones((2, 4)))
    weights = {"aux_weight": 0.4, "presence_weight": 0.7, "align_corners": True}
    losses = segmentation_loss(outputs, labels, **weights)
    expected = losses.main + 0.4 * losses.aux + 0.7 * losses.presence
    assert float(losses.total) == pytest.approx(float(expected))
    assert float(losses.presence) == pytest.approx(float(presence_loss(jnp.ones((2, 4)), labels)))
    without = segmentation_loss(outputs, labels, **(weights | {"presence_weight": 0.0}))
    assert float(without.presence) == 0
    assert float(without.total) == pytest.approx(float(losses.main + 0.4 * losses.aux))
