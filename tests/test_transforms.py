"""The authors' augmentation, step by step and as a whole."""

import cv2
import numpy as np
import pytest

from pspnet_jax.arrays import IGNORE_LABEL, Example
from pspnet_jax.config import default_config
from pspnet_jax.data.transforms import (
    RECIPES,
    Augmentation,
    RandomCrop,
    crop,
    pad_to,
    rescale,
    rotate,
)

from pictures import example

BUDGET_SECONDS = 30

FILL = (124, 116, 104)


def recipe(name="semseg", **overrides):
    section = default_config().augment.to_dict() | {"recipe": name} | overrides
    return Augmentation.resolve(section)


def test_recipes_resolve_and_overrides_win():
    assert recipe().scale_max == 2.0
    assert recipe("none").scale_max == 1.0
    assert recipe(scale_max=1.5, blur_probability=0.0).scale_max == 1.5
    assert set(RECIPES) == {"semseg", "none"}


def test_rescale_rounds_sides_and_keeps_label_values():
    made = example(37, 51)
    image, labels = rescale(made.image, made.labels, 1.5)
    assert image.shape[:2] == labels.shape == (56, 76)
    assert set(np.unique(labels)) <= set(np.unique(made.labels))
    same_image, same_labels = rescale(made.image, made.labels, 1.0)
    np.testing.assert_array_equal(same_image, made.image)
    np.testing.assert_array_equal(same_labels, made.labels)


def test_rotation_fills_with_mean_color_and_void_at_the_same_pixels():
    white = np.full((60, 60, 3), 255, np.uint8)
    image, labels = rotate(white, np.zeros((60, 60), np.uint8), 10.0, fill=FILL)
    assert tuple(image[0, 0]) == FILL
    assert labels[0, 0] == IGNORE_LABEL
    assert labels[30, 30] == 0
    # Linear sampling mixes one pixel at the border; inside of it both agree.
    inside = (labels == 0).astype(np.uint8)
    inner = cv2.erode(inside, np.ones((3, 3)), borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    assert inner.sum() > 3000
    assert (image[inner == 1] == 255).all()


def test_rotation_is_counterclockwise_by_the_angle():
    labels = np.zeros((101, 101), np.uint8)
    labels[50, 80:90] = 1
    _, turned = rotate(np.zeros((101, 101, 3), np.uint8), labels, 90.0, fill=FILL)
    rows, columns = np.nonzero(turned == 1)
    assert rows.max() < 30
    assert abs(columns.mean() - 50) <= 1


def test_padding_is_centered_with_the_smaller_half_first():
    image, labels = pad_to(
        np.zeros((3, 8, 3), np.uint8), np.zeros((3, 8), np.uint8), (8, 8), fill=FILL
    )
    assert labels.shape == (8, 8)
    np.testing.assert_array_equal(np.nonzero((labels == 0).all(axis=1))[0], [2, 3, 4])
    np.testing.assert_array_equal(image[0, 0], FILL)


def test_crop_reaches_both_ends_and_never_leaves():
    image, labels = np.zeros((10, 12, 3), np.uint8), np.arange(120, dtype=np.uint8).reshape(10, 12)
    first = crop(image, labels, (4, 5), offset=(0.0, 0.0))[1]
    last = crop(image, labels, (4, 5), offset=(1 - 1e-12, 1 - 1e-12))[1]
    np.testing.assert_array_equal(first, labels[:4, :5])
    np.testing.assert_array_equal(last, labels[-4:, -5:])


@pytest.mark.parametrize("size", [(20, 30), (100, 120), (33, 200)])
def test_crop_has_its_size_whatever_the_image(size):
    view = RandomCrop(recipe(), (41, 33), FILL)
    for seed in range(20):
        made = view(example(*size, seed=seed), np.random.default_rng(seed))
        assert made.image.shape == (41, 33, 3)
        assert made.labels.shape == (41, 33)
        assert made.image.flags.c_contiguous
        assert made.labels.flags.c_contiguous


def test_same_numbers_same_view():
    view = RandomCrop(recipe(), (41, 33), FILL)
    first, second = (view(example(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_recipe_none_at_full_size_is_the_identity():
    made = example(33, 41)
    view = RandomCrop(recipe("none"), (33, 41), FILL)(made, np.random.default_rng(0))
    np.testing.assert_array_equal(view.image, made.image)
    np.testing.assert_array_equal(view.labels, made.labels)


def test_switching_one_step_off_leaves_the_others_alone():
    made = example(60, 60)
    sharp = RandomCrop(recipe(blur_probability=0.0), (49, 49), FILL)
    soft = RandomCrop(recipe(blur_probability=1.0), (49, 49), FILL)
    for seed in range(5):
        one, other = (view(made, np.random.default_rng(seed)) for view in (sharp, soft))
        np.testing.assert_array_equal(one.labels, other.labels)
        assert (one.image != other.image).any()


def test_order_is_scale_rotate_blur_flip_crop():
    """The whole against the steps written out with the numbers that it draws."""
    made = example(130, 150, seed=3)
    options = recipe(
        rotation_probability=1.0, blur_probability=1.0, flip_probability=1.0, scale_min=0.7
    )
    view = RandomCrop(options, (65, 65), FILL)(made, np.random.default_rng(11))
    rng = np.random.default_rng(11)
    scale, degrees, _, offset = (
        rng.uniform(0.7, 2),
        rng.uniform(-10, 10),
        rng.random(3),
        rng.random(2),
    )
    size = (round(150 * scale), round(130 * scale))
    # By factor, as the authors: where the sides round, that is not the same as by size.
    image = cv2.resize(made.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    labels = cv2.resize(made.labels, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    assert labels.shape == size[::-1]
    turn = cv2.getRotationMatrix2D((size[0] / 2, size[1] / 2), degrees, 1)
    image = cv2.warpAffine(image, turn, size, flags=cv2.INTER_LINEAR, borderValue=FILL)
    labels = cv2.warpAffine(labels, turn, size, flags=cv2.INTER_NEAREST, borderValue=255)
    image = cv2.GaussianBlur(image, (5, 5), 0)[:, ::-1]
    labels = labels[:, ::-1]
    top = int(offset[0] * (labels.shape[0] - 65 + 1))
    left = int(offset[1] * (labels.shape[1] - 65 + 1))
    np.testing.assert_array_equal(view.image, image[top : top + 65, left : left + 65])
    np.testing.assert_array_equal(view.labels, labels[top : top + 65, left : left + 65])


def test_draws_cover_the_ranges_of_the_recipe():
    """Scale, flip and border share of many draws, read off a picture that tells them."""
    size = 64
    columns = np.tile(np.arange(size, dtype=np.uint8), (size, 1))
    made = Example(np.zeros((size, size, 3), np.uint8), columns, np.int32(0))
    view = RandomCrop(recipe(rotation_probability=0.0), (129, 129), FILL)
    shares, flips = [], 0
    for seed in range(400):
        labels = view(made, np.random.default_rng(seed)).labels
        inside = labels != IGNORE_LABEL
        shares.append(inside.any(axis=0).sum() / size)
        row = labels[inside.any(axis=1)][0]
        row = row[row != IGNORE_LABEL].astype(int)
        flips += row[0] > row[-1]
    assert min(shares) == pytest.approx(0.5, abs=0.03)
    assert max(shares) == pytest.approx(2.0, abs=0.03)
    assert np.mean(shares) == pytest.approx(1.25, abs=0.08)
    assert flips / 400 == pytest.approx(0.5, abs=0.08)
