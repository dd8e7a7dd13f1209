"""Cross-entropy against hand-worked values; what ignored pixels may not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import parallel
from pspnet_jax.arrays import IGNORE_LABEL, Outputs
from pspnet_jax.losses import (
    LossOptions,
    cross_entropy,
    presence_accuracy,
    presence_loss,
    presence_of,
    segmentation_loss,
    stretched_cross_entropy,
    thin_out,
    tile_mib_of,
)
from pspnet_jax.resample import resize

from compiling import jit

BUDGET_SECONDS = 60


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
    losses = segmentation_loss(Outputs(main, aux), labels, align_corners=True)
    alone = segmentation_loss(Outputs(main), labels, align_corners=True)
    assert float(losses.total) == pytest.approx(float(losses.main + 0.4 * losses.aux), rel=1e-6)
    assert float(losses.main) == float(alone.total)
    assert float(losses.aux) > 0


def test_logits_are_stretched_to_label_size():
    logits, labels = logits_and_labels()
    found = {}
    for align_corners in (True, False):
        small = logits[:, :3, :2]
        full = resize(small, (5, 5), align_corners=align_corners)
        losses = segmentation_loss(Outputs(small), labels, align_corners=align_corners)
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
    found = cross_entropy(logits, labels, LossOptions(class_weights=(3.0, 9.0, 1.0)))
    assert float(found) == pytest.approx(-(3 * np.log(0.5) + np.log(0.8)) / 4, rel=1e-6)
    weights = LossOptions(class_weights=(1.0, 0.0, 1.0))
    nothing = cross_entropy(logits, jnp.full_like(labels, 1), weights)
    assert float(nothing) == 0


PRESENCE_LABELS = jnp.array([[[0, 2, IGNORE_LABEL]], [[1, 1, 1]]], jnp.uint8)
PRESENCE_LOGITS = jnp.array([[2.0, -1.0, 3.0], [-2.0, 0.5, 1.0]])


def test_presence_is_read_from_the_mask_without_void():
    expected = [[True, False, True], [False, True, False]]
    np.testing.assert_array_equal(presence_of(PRESENCE_LABELS, 3), expected)


def test_an_image_without_labels_says_nothing_of_presence():
    labels = PRESENCE_LABELS.at[0].set(IGNORE_LABEL)
    gradient = jax.grad(presence_loss)(PRESENCE_LOGITS, labels)
    assert not gradient[0].any()
    assert gradient[1:].any()


def test_presence_loss_by_hand():
    signs = np.array([[1, -1, 1], [-1, 1, -1]])
    terms = np.log1p(np.exp(-signs * np.asarray(PRESENCE_LOGITS, np.float64)))
    found = float(presence_loss(PRESENCE_LOGITS, PRESENCE_LABELS))
    assert found == pytest.approx(terms.mean(), rel=1e-6)
    weights = np.array([1.0, 4.0, 0.5])
    options = LossOptions(class_weights=tuple(weights))
    found = float(presence_loss(PRESENCE_LOGITS, PRESENCE_LABELS, options))
    assert found == pytest.approx((terms * weights).mean(), rel=1e-6)


def test_presence_accuracy_counts_pairs():
    assert float(presence_accuracy(PRESENCE_LOGITS, PRESENCE_LABELS)) == pytest.approx(5 / 6)
    blank = jnp.full_like(PRESENCE_LABELS[:1], 255)
    logits = jnp.concatenate([PRESENCE_LOGITS, PRESENCE_LOGITS[:1]])
    labels = jnp.concatenate([PRESENCE_LABELS, blank])
    assert float(presence_accuracy(logits, labels)) == pytest.approx(5 / 6)
    assert float(presence_accuracy(PRESENCE_LOGITS[:1], blank)) == 0


def test_both_auxiliary_losses_at_once():
    logits, labels = logits_and_labels()
    outputs = Outputs(logits, 2 * logits, jnp.ones((2, 4)))
    options = LossOptions(aux_weight=0.4, presence_weight=0.7)
    losses = segmentation_loss(outputs, labels, options, align_corners=True)
    expected = losses.main + 0.4 * losses.aux + 0.7 * losses.presence
    assert float(losses.total) == pytest.approx(float(expected))
    assert float(losses.presence) == pytest.approx(float(presence_loss(jnp.ones((2, 4)), labels)))
    without = segmentation_loss(outputs, labels, LossOptions(aux_weight=0.4), align_corners=True)
    assert float(without.presence) == 0
    assert float(without.total) == pytest.approx(float(losses.main + 0.4 * losses.aux))


SMOOTHED_LOGITS = jnp.log(jnp.array([[[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]]]))
SMOOTHED_LABELS = jnp.array([[[0, 2, IGNORE_LABEL]]], jnp.uint8)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(None, 0.5505649900), ((3.0, 9.0, 1.0), 0.8830528944)],
)
def test_label_smoothing_is_pytorchs(weights, expected):
    """torch.nn.functional.cross_entropy(logits, labels, weight, ignore_index=255, label_smoothing=0.1)."""
    options = LossOptions(label_smoothing=0.1, class_weights=weights)
    found = float(cross_entropy(SMOOTHED_LOGITS, SMOOTHED_LABELS, options))
    assert found == pytest.approx(expected, rel=1e-6)


def test_all_pixels_divide_where_asked():
    logits, labels = logits_and_labels()
    valid = int((labels != IGNORE_LABEL).sum())
    expected = float(cross_entropy(logits, labels)) * valid / labels.size
    found = float(cross_entropy(logits, labels, LossOptions(normalizer="all")))
    assert found == pytest.approx(expected, rel=1e-6)


def hardest(logits, labels, *, threshold, share_min):
    """Online hard example mining by sorting, pixel by pixel."""
    probabilities = np.asarray(jax.nn.softmax(logits), np.float64).reshape(-1, logits.shape[-1])
    labels = np.asarray(labels).reshape(-1)
    valid = np.flatnonzero(labels != IGNORE_LABEL)
    own = np.sort(probabilities[valid, labels[valid]])
    num_kept = max(int(np.ceil(share_min * len(valid))), int((own <= threshold).sum()))
    return -np.log(own[:num_kept]).mean()


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.95])
@pytest.mark.parametrize("share_min", [0.1, 0.5])
def test_only_the_hardest_pixels_count(threshold, share_min):
    logits, labels = logits_and_labels()
    options = LossOptions(ohem_threshold=threshold, ohem_share_min=share_min)
    expected = hardest(logits, labels, threshold=threshold, share_min=share_min)
    found, gradient = jax.value_and_grad(cross_entropy)(logits, labels, options)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    touched = np.asarray(gradient).any(axis=-1)
    assert touched.sum() < (labels != IGNORE_LABEL).sum() or threshold == 0.95
    assert not touched[np.asarray(labels) == IGNORE_LABEL].any()


def test_the_hardest_pixels_are_those_of_the_whole_batch_on_any_number_of_devices():
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.standard_normal((8, 5, 5, 4)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, (8, 5, 5)), jnp.uint8).at[3].set(IGNORE_LABEL)
    options = LossOptions(ohem_threshold=0.05, ohem_share_min=0.2)
    split = parallel.split_batch(parallel.make_mesh())
    on_eight = jax.jit(lambda x, y: cross_entropy(x, y, options), in_shardings=(split, split))
    expected = float(cross_entropy(logits, labels, options))
    assert float(on_eight(logits, labels)) == pytest.approx(expected, rel=1e-6)


def test_nothing_but_void_is_zero_under_every_option():
    logits, _ = logits_and_labels()
    labels = jnp.full((2, 5, 5), IGNORE_LABEL, jnp.uint8)
    options = LossOptions(
        ohem_threshold=0.7, label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0, 4.0)
    )
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, labels, options)
    assert float(loss) == 0
    assert not np.asarray(gradient).any()


def test_where_only_weightless_classes_are_seen_nothing_is_lost():
    """Label smoothing would leave terms and nothing to divide them by."""
    logits, labels = logits_and_labels()
    labels = jnp.zeros_like(labels)
    options = LossOptions(class_weights=(0.0, 1.0, 1.0, 1.0), label_smoothing=0.1)
    loss, gradient = jax.value_and_grad(cross_entropy)(logits, labels, options)
    assert float(loss) == 0
    assert not np.asarray(gradient).any()


def test_labels_are_thinned_out_to_the_samples_of_the_logits():
    labels = jnp.asarray(np.arange(17 * 25).reshape(1, 17, 25) % 251, jnp.uint8)
    np.testing.assert_array_equal(thin_out(labels, (3, 4), align_corners=True), labels[:, ::8, ::8])
    # Half-pixel rule: the centers of 8 x 8 squares lie between pixels 3 and 4; the latter is taken.
    square = labels[:, :16, :24]
    np.testing.assert_array_equal(
        thin_out(square, (2, 3), align_corners=False), square[:, 4::8, 4::8]
    )


def test_the_loss_at_an_eighth_is_that_of_thin_labels():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((2, 3, 3, 4)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, (2, 17, 17)), jnp.uint8)
    options = LossOptions(resolution="eighth")
    found = segmentation_loss(Outputs(logits, 2 * logits), labels, options, align_corners=True)
    thin = labels[:, ::8, ::8]
    assert float(found.main) == pytest.approx(float(cross_entropy(logits, thin)), rel=1e-6)
    assert float(found.aux) == pytest.approx(float(cross_entropy(2 * logits, thin)), rel=1e-6)


@pytest.mark.parametrize("resolution", ["full", "eighth"])
@pytest.mark.parametrize("normalizer", ["valid", "all"])
def test_losses_of_parts_add_up_to_that_of_the_batch(resolution, normalizer):
    rng = np.random.default_rng(1)
    logits = jnp.asarray(rng.standard_normal((4, 3, 3, 4)), jnp.float32)
    presence = jnp.asarray(rng.standard_normal((4, 4)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 4, (4, 17, 17)), jnp.uint8)
    labels = labels.at[0].set(IGNORE_LABEL).at[1, :9].set(IGNORE_LABEL)
    options = LossOptions(
        presence_weight=0.7,
        class_weights=(1.0, 2.0, 0.5, 3.0),
        label_smoothing=0.1,
        normalizer=normalizer,
        resolution=resolution,
    )

    def losses(part, of_batch=None):
        outputs = Outputs(logits[part], 2 * logits[part], presence[part])
        found = segmentation_loss(
            outputs, labels[part], options, align_corners=True, of_batch=of_batch
        )
        return np.array(found)

    whole = losses(slice(None))
    parts = losses(slice(0, 4, 2), labels) + losses(slice(1, 4, 2), labels)
    np.testing.assert_allclose(parts, whole, rtol=1e-6)


# Options, align_corners, platform, rows that a tile may have (5 do not divide the 17 there are, one it always has).
TILED = {
    "published": ({"aux_weight": 0.4}, True, "cpu", 5),
    "smoothed": ({"label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5)}, False, None, 5),
    "hardest": ({"ohem_threshold": 0.3, "ohem_share_min": 0.2}, True, None, 0.5),
    "all": ({"normalizer": "all", "class_weights": (1.0, 2.0, 0.5)}, False, "cpu", 5),
    "gpu": ({"label_smoothing": 0.1, "class_weights": (1.0, 2.0, 0.5)}, True, "gpu", 5),
    "gpu, at once": ({"ohem_threshold": 0.3, "ohem_share_min": 0.2}, False, "gpu", 17),
}


@pytest.mark.parametrize(
    ("options", "align_corners", "platform", "num_rows"), TILED.values(), ids=TILED
)
def test_tiles_give_what_all_logits_at_once_give(options, align_corners, platform, num_rows):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        logits = jnp.asarray(3 * rng.standard_normal((2, 4, 3, 3)))
        labels = jnp.asarray(rng.choice([0, 1, 2, IGNORE_LABEL], (2, 17, 9)), jnp.uint8)
        of_batch = jnp.concatenate([labels, labels[:, ::-1]])
        of_batch = None if options.get("ohem_threshold") else of_batch
        tile_mib = 2 * num_rows * 9 * 3 * 8 / 2**20

        @functools.partial(jit, static_argnames=("tile_mib", "platform"))
        def differentiate(logits, tile_mib, platform):
            def loss(logits):
                return stretched_cross_entropy(
                    logits,
                    labels,
                    LossOptions(**options, tile_mib=tile_mib),
                    align_corners=align_corners,
                    of_batch=of_batch,
                    platform=platform,
                )

            return jax.value_and_grad(loss)(logits)

        found = differentiate(logits, tile_mib, platform)
        expected = differentiate(logits, None, None)
    for value, golden in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, golden, rtol=0, atol=1e-12 * np.abs(golden).max())


def test_tiles_are_alike():
    """Where all rows are just more than a tile may hold: two tiles of nearly half, not one of all and one of one."""
    logits, labels = jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 25, 25), jnp.uint8)
    options = LossOptions(tile_mib=24.9 * 2 * 25 * 3 * 4 / 2**20)
    loss = functools.partial(stretched_cross_entropy, align_corners=True)
    program = str(jax.make_jaxpr(lambda x: loss(x, labels, options))(logits))
    assert "[2,13,25,3]" in program
    assert "[2,24,25,3]" not in program


@pytest.mark.parametrize(("platform", "mib"), [("cpu", 4), ("tpu", 64), (None, 64), ("gpu", 4096)])
def test_tiles_of_a_platform(platform, mib):
    assert tile_mib_of(platform) == mib


def test_tiles_are_all_that_is_stretched():
    logits, labels = jnp.zeros((2, 4, 4, 3)), jnp.zeros((2, 25, 25), jnp.uint8)

    def program(tile_mib):
        options = LossOptions(tile_mib=tile_mib)
        loss = functools.partial(stretched_cross_entropy, align_corners=True)
        return str(jax.make_jaxpr(jax.grad(lambda x: loss(x, labels, options)))(logits))

    assert "[2,25,25,3]" in program(None)
    tiled = program(5 * 2 * 25 * 3 * 4 / 2**20)
    assert "[2,25,25,3]" not in tiled
    assert "[2,5,25,3]" in tiled
    assert "[5,2,5,25,3]" not in tiled  # all tiles, kept for the backward pass


def test_devices_stretch_tiles_of_their_own_images():
    mesh = parallel.make_mesh()
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.standard_normal((8, 4, 4, 3)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 3, (8, 25, 25)), jnp.uint8)

    def differentiate(logits, labels, *, tile_mib):
        def loss(logits):
            return stretched_cross_entropy(
                logits, labels, LossOptions(tile_mib=tile_mib), align_corners=True, platform="cpu"
            )

        return jax.value_and_grad(loss)(logits)

    split = parallel.split_batch(mesh)
    tiled = functools.partial(differentiate, tile_mib=8 * 5 * 25 * 3 * 4 / 2**20)
    compiled = jax.jit(tiled, in_shardings=(split, split)).lower(logits, labels).compile()
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not [word for word in ("all-gather", "all-to-all", "collective-permute") if word in text]
    found = compiled(*jax.device_put((logits, labels), split))
    expected = differentiate(logits, labels, tile_mib=None)
    for value, golden in zip(found, expected, strict=True):
        np.testing.assert_allclose(value, golden, rtol=1e-5, atol=1e-7)
