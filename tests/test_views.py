"""One affine map against the same steps one after the other, and what lies outside."""

import cv2
import numpy as np
import pytest
import semseg_steps

from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.data.transforms import make_augment, resolve
from pspnet_jax.data.views import (
    ColorChange,
    Plan,
    change_colors,
    mirror,
    render,
    rotation,
    sample_labels,
    scaling,
    shift,
)

BUDGET_SECONDS = 40

FILL = (124, 116, 104)


def smooth(height, width):
    """A picture that changes by at most 20 a pixel: 2 gray levels are a tenth of a pixel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 5 + 1), np.sin(y / 5), np.sin((x + y) / 7 + 2)]
    return (128 + 100 * np.stack(waves, axis=2)).round().astype(np.uint8)


def regions(height, width):
    """Labels of smooth regions, and how far each pixel is from another label."""
    image = smooth(height, width)
    return (image[..., 0] > 128) * np.uint8(2) + (image[..., 2] > 128).astype(np.uint8)


def inside(labels, margin):
    """Pixels that are at least `margin` away from void and from the border of the crop."""
    known = (labels != IGNORE_LABEL).astype(np.uint8)
    kernel = np.ones((2 * margin + 1,) * 2)
    return cv2.erode(known, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)) == 1


def test_the_identity_is_exact():
    image, labels = smooth(40, 50), regions(40, 50)
    seen, seen_labels = render(
        image, labels, Plan(np.eye(3), (40, 50), (3, 7)), (20, 30), fill=FILL
    )
    np.testing.assert_array_equal(seen, image[3:23, 7:37])
    np.testing.assert_array_equal(seen_labels, labels[3:23, 7:37])
    assert seen.flags.c_contiguous


def test_shift_beyond_the_last_pixel_repeats_it():
    image, labels = smooth(10, 12), regions(10, 12)
    plan = Plan(scaling(2, 2), (20, 24), (10, 12))
    seen, seen_labels = render(image, labels, plan, (10, 12), fill=FILL)
    expected = cv2.resize(image, (24, 20), interpolation=cv2.INTER_LINEAR)[10:, 12:]
    assert np.abs(seen.astype(int) - expected).max() <= 1
    assert (seen_labels != IGNORE_LABEL).all()


@pytest.mark.parametrize("factor", [0.53, 0.81, 1.37, 1.93])
def test_scaling_is_opencvs_resize(factor):
    image, labels = smooth(61, 83), regions(61, 83)
    size = (round(61 * factor), round(83 * factor))
    plan = Plan(scaling(factor, factor), size, (0, 0))
    seen, seen_labels = render(image, labels, plan, size, fill=FILL)
    factors = {"fx": factor, "fy": factor}
    expected = cv2.resize(image, None, **factors, interpolation=cv2.INTER_LINEAR)
    assert np.abs(seen.astype(int) - expected).max() <= 1
    # The pixel under each center. OpenCV's own nearest, which the authors' code uses, takes that under each
    # corner: half a pixel beside the linear one.
    rows, columns = (
        ((np.arange(n) + 0.5) / factor).astype(int).clip(max=limit - 1)
        for n, limit in zip(size, (61, 83), strict=True)
    )
    assert (seen_labels == labels[rows][:, columns]).mean() > 0.999


@pytest.mark.parametrize("degrees", [-10.0, 3.3, 90.0])
def test_rotation_is_opencvs(degrees):
    image, labels = smooth(60, 80), regions(60, 80)
    plan = Plan(rotation(degrees, (41.0, 30.0)), (60, 80), (0, 0), is_rotated=True)
    seen, seen_labels = render(image, labels, plan, (60, 80), fill=FILL)
    matrix = cv2.getRotationMatrix2D((41.0, 30.0), degrees, 1)
    expected = cv2.warpAffine(image, matrix, (80, 60), flags=cv2.INTER_LINEAR, borderValue=FILL)
    assert np.abs(seen.astype(int) - expected).max() <= 1
    expected = cv2.warpAffine(labels, matrix, (80, 60), flags=cv2.INTER_NEAREST, borderValue=255)
    assert (seen_labels == expected).mean() > 0.999
    assert (seen_labels == IGNORE_LABEL).any()


def test_steps_are_composed_in_their_order():
    """A mark in the image, followed by hand: scaled by 2, mirrored, then cut at (row 3, column 5)."""
    labels = np.zeros((20, 30), np.uint8)
    labels[4, 6] = 1
    to_image = scaling(2, 2) @ mirror(60) @ shift(5, 3)
    rows, columns = np.nonzero(sample_labels(labels, to_image, (37, 55), is_rotated=False))
    assert set(rows) == {8 - 3, 9 - 3}
    assert set(columns) == {60 - 1 - 12 - 5, 60 - 1 - 13 - 5}


@pytest.mark.parametrize("crop_size", [(65, 65), (97, 129), (151, 41)])
def test_one_map_is_the_authors_steps(crop_size):
    """Smooth pictures by one sampling and by one sampling a step: a tenth of a pixel apart."""
    image, labels = smooth(90, 110), regions(90, 110)
    planner = make_augment(resolve({"recipe": "semseg"}), crop_size, fill=FILL).planner
    kinds = set()
    for seed in range(40):
        draws = semseg_steps.draw(np.random.default_rng(seed))
        kinds.add((draws.rotates, draws.blurs, draws.flips))
        expected, expected_labels = semseg_steps.augment(
            image.astype(np.float32), labels, draws, crop_size, fill=FILL
        )
        # The same numbers: the recipe draws them in the same order.
        plan = planner.plan(labels, crop_size, np.random.default_rng(seed))
        seen, seen_labels = render(image, labels, plan, crop_size, fill=FILL)
        void, expected_void = seen_labels == IGNORE_LABEL, expected_labels == IGNORE_LABEL
        assert (
            void != expected_void
        ).mean() < 0.01  # the border of a rotated picture, one pixel wide
        both = inside(seen_labels, 4) & inside(expected_labels, 4)
        assert np.abs(seen - expected)[both].max() <= 4
        assert np.abs(seen - expected)[both].mean() <= 1
        assert (seen_labels == expected_labels)[both].mean() > 0.8  # theirs lie half a pixel aside
        is_high = seen[..., 0] > 128
        clear = both & (np.abs(seen[..., 0].astype(int) - 128) > 30)
        np.testing.assert_array_equal(is_high[clear], (seen_labels >= 2)[clear])
        outside = (void & expected_void).astype(np.uint8)
        far = cv2.erode(outside, np.ones((7, 7)), borderValue=(1,)) == 1
        np.testing.assert_array_equal(seen[far], np.broadcast_to(FILL, seen[far].shape))
    assert len(kinds) == 8


def test_a_window_sees_nothing_beyond_it():
    image, labels = smooth(60, 60), regions(60, 60)
    turn = rotation(10.0, (14.5, 14.5))
    plan = Plan(turn, (30, 30), (0, 0), window=(20, 10, 30, 30), is_rotated=True)
    seen, seen_labels = render(image, labels, plan, (30, 30), fill=FILL)
    assert seen_labels[0, 0] == IGNORE_LABEL
    np.testing.assert_array_equal(seen[0, 0], FILL)
    matrix = cv2.getRotationMatrix2D((14.5, 14.5), 10.0, 1)
    expected = cv2.warpAffine(image[20:50, 10:40], matrix, (30, 30), borderValue=FILL)
    assert np.abs(seen.astype(int) - expected).max() <= 1


def test_blur_does_not_mix_with_what_lies_outside():
    """As in the authors' code, where padding comes after the blur."""
    image, labels = np.full((20, 20, 3), 250, np.uint8), np.zeros((20, 20), np.uint8)
    plan = Plan(np.eye(3), (20, 20), (-6, -6), blurs=True)
    seen, seen_labels = render(image, labels, plan, (32, 32), fill=FILL)
    assert (seen[seen_labels == 0] == 250).all()
    assert (seen[seen_labels == IGNORE_LABEL] == FILL).all()
    assert (seen_labels == 0).sum() == 400


def test_blur_of_a_crop_is_the_crop_of_the_blurred():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    blurred = cv2.GaussianBlur(image, (5, 5), 0)
    for corner in ((0, 0), (10, 12), (20, 20)):
        plan = Plan(np.eye(3), (40, 40), corner, blurs=True)
        seen, _ = render(image, image[..., 0] % 5, plan, (20, 20), fill=FILL)
        top, left = corner
        np.testing.assert_array_equal(seen, blurred[top : top + 20, left : left + 20])


def test_a_picture_far_outside_of_the_crop_leaves_only_fill():
    image, labels = smooth(10, 10), regions(10, 10)
    for corner in ((-40, 0), (0, 15), (30, 30)):
        seen, seen_labels = render(
            image, labels, Plan(np.eye(3), (10, 10), corner), (8, 8), fill=FILL
        )
        assert (seen == FILL).all()
        assert (seen_labels == IGNORE_LABEL).all()


def test_color_tables_are_applied_in_their_order():
    image = smooth(9, 9)
    double = (np.arange(256) * 2).clip(0, 255).astype(np.uint8)
    less = (np.arange(256).clip(30) - 30).astype(np.uint8)
    expected = less[double[image]]
    np.testing.assert_array_equal(
        change_colors(image, ColorChange((double,), None, (less,))), expected
    )
    gray = np.zeros((1, 256, 3), np.uint8)
    gray[0, :, 0], gray[0, :, 2] = np.arange(256), np.arange(256)
    found = change_colors(image, ColorChange((), gray))
    np.testing.assert_array_equal(found, np.repeat(image.max(axis=2)[..., None], 3, axis=2))
