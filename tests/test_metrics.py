"""Metrics by hand, as mergeable sums, and for classes that do not occur."""

import numpy as np
import pytest

from pspnet_jax.metrics import confusion_matrix, group_iou, image_score, scores

BUDGET_SECONDS = 10

TRUTH = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
PREDICTION = np.array([[0, 1, 1], [1, 2, 0]], np.uint8)


def test_confusion_by_hand():
    expected = [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(confusion_matrix(TRUTH, PREDICTION, 4), expected)


def test_scores_by_hand():
    found = scores(confusion_matrix(TRUTH, PREDICTION, 4), absent_class="skip")
    np.testing.assert_allclose(found.iou, [1 / 3, 2 / 3, 0, np.nan])
    np.testing.assert_allclose(found.accuracy, [1 / 2, 1, 0, np.nan])
    np.testing.assert_allclose(found.precision, [1 / 2, 2 / 3, np.nan, np.nan])
    np.testing.assert_allclose(found.dice, [1 / 2, 4 / 5, 0, np.nan])
    np.testing.assert_array_equal(found.pixels, [2, 2, 1, 0])
    assert found.mean_iou == pytest.approx(1 / 3)
    assert found.mean_accuracy == pytest.approx(1 / 2)
    assert found.pixel_accuracy == pytest.approx(3 / 5)
    assert found.frequency_weighted_iou == pytest.approx((2 / 3 + 4 / 3 + 0) / 5)
    assert found.csail_score == pytest.approx((1 / 3 + 3 / 5) / 2)


def test_absent_class_counts_as_zero_where_the_protocol_says_so():
    found = scores(confusion_matrix(TRUTH, PREDICTION, 4), absent_class="zero")
    assert found.mean_iou == pytest.approx(1 / 4)
    assert np.isnan(found.iou[3])
    with pytest.raises(ValueError, match="'skip' or 'zero'"):
        scores(np.zeros((2, 2), np.int64), absent_class="one")


def test_images_add_up():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5, (4, 30, 20)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.1] = 255
    prediction = rng.integers(0, 5, truth.shape).astype(np.uint8)
    whole = confusion_matrix(truth.reshape(120, 20), prediction.reshape(120, 20), 5)
    parts = sum(confusion_matrix(t, p, 5) for t, p in zip(truth, prediction, strict=True))
    np.testing.assert_array_equal(whole, parts)
    assert whole.sum() == (truth != 255).sum()


def test_perfect_prediction_and_nothing_at_all():
    found = scores(
        confusion_matrix(TRUTH, np.where(TRUTH == 255, 0, TRUTH), 3), absent_class="skip"
    )
    assert found.mean_iou == found.pixel_accuracy == found.frequency_weighted_iou == 1
    empty = scores(np.zeros((3, 3), np.int64), absent_class="skip")
    assert np.isnan(empty.mean_iou)
    assert np.isnan(empty.pixel_accuracy)
    assert np.isnan(empty.frequency_weighted_iou)


def test_groups():
    iou = np.array([0.2, 0.4, 0.9, np.nan])
    assert group_iou(iou, ["a", "a", None, None]) == {"a": pytest.approx(0.3), "others": 0.9}
    assert group_iou(iou, [None] * 4) == {}
    assert group_iou(iou, ["a"] * 4) == {"a": pytest.approx(0.5)}
    groups = ["others", "a", None, None]
    assert group_iou(iou, groups) == {"others": pytest.approx(0.55), "a": 0.4}


def test_an_image_is_judged_by_the_classes_that_occur_in_it():
    found = image_score(7, confusion_matrix(TRUTH, PREDICTION, 9))
    assert found == (7, pytest.approx(1 / 3), pytest.approx(3 / 5))
    void = np.full_like(TRUTH, 255)
    found = image_score(0, confusion_matrix(void, PREDICTION, 9))
    assert np.isnan(found.mean_iou)
    assert np.isnan(found.pixel_accuracy)


def test_the_challenge_counts_pixels_class_by_class():
    """A statement of the scene-parsing challenge's rule: ids from 1, 0 is void, absent classes are 0."""
    rng = np.random.default_rng(3)
    truth = rng.integers(0, 7, (2, 20, 30))
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, rng.integers(1, 7, truth.shape))
    predicted[predicted == 0] = 2
    ious, labeled = [], truth > 0
    for i in range(1, 10):  # 7, 8 and 9 do not occur
        both = ((truth == i) & (predicted == i)).sum()
        either = (labeled & ((truth == i) | (predicted == i))).sum()
        ious.append(both / (either + np.spacing(1)))
    accuracy = (labeled & (truth == predicted)).sum() / labeled.sum()
    ours = np.where(labeled, truth - 1, 255).astype(np.uint8)
    pairs = zip(ours, (predicted - 1).astype(np.uint8), strict=True)
    found = scores(sum(confusion_matrix(t, p, 9) for t, p in pairs), absent_class="zero")
    assert found.mean_iou == pytest.approx(np.mean(ious), abs=1e-12)
    assert found.csail_score == pytest.approx((np.mean(ious) + accuracy) / 2, abs=1e-12)
