"""The augmentation of each recipe, step by step and as a whole."""

import cv2
import numpy as np
import pytest

from pspnet_jax.arrays import IGNORE_LABEL, Example
from pspnet_jax.config import default_config
from pspnet_jax.data.transforms import (
    NUM_TRIES,
    RECIPES,
    crop,
    largest_window,
    make_augment,
    pad_to,
    rescale,
    resolve,
    rotate,
    stretch,
    window_size,
)

from pictures import example

BUDGET_SECONDS = 30

FILL = (124, 116, 104)


def recipe(name="semseg", **overrides):
    section = default_config().augment.to_dict() | {"recipe": name} | overrides
    return resolve(section)


def make_view(size, name="semseg", **overrides):
    return make_augment(recipe(name, **overrides), size, fill=FILL)


def test_recipes_resolve_and_overrides_win():
    assert recipe()["scale_max"] == 2.0
    assert recipe("none")["scale_max"] == 1.0
    assert recipe("lextal")["aspect_max"] == 4 / 3
    assert recipe(scale_max=1.5, blur_probability=0.0)["scale_max"] == 1.5
    assert set(RECIPES) == {"semseg", "lextal", "none"}


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"blur_probability=0.5, augment.scale_min=0.7 would do"):
        recipe("lextal", scale_min=0.7, blur_probability=0.5)
    with pytest.raises(
        ValueError, match=r"area_min=0.5 would do nothing: recipe 'semseg' has scale_"
    ):
        recipe(area_min=0.5)


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
    image, labels = rotate(
        white, np.zeros((60, 60), np.uint8), 10.0, center=(30.0, 30.0), fill=FILL
    )
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
    _, turned = rotate(
        np.zeros((101, 101, 3), np.uint8), labels, 90.0, center=(50.0, 50.0), fill=FILL
    )
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
    view = make_view((41, 33))
    for seed in range(20):
        made = view(example(*size, seed=seed), np.random.default_rng(seed))
        assert made.image.shape == (41, 33, 3)
        assert made.labels.shape == (41, 33)
        assert made.image.flags.c_contiguous
        assert made.labels.flags.c_contiguous


def test_same_numbers_same_view():
    view = make_view((41, 33))
    first, second = (view(example(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)


def test_recipe_none_at_full_size_is_the_identity():
    made = example(33, 41)
    view = make_view((33, 41), "none")(made, np.random.default_rng(0))
    np.testing.assert_array_equal(view.image, made.image)
    np.testing.assert_array_equal(view.labels, made.labels)


def test_switching_one_step_off_leaves_the_others_alone():
    made = example(60, 60)
    sharp = make_view((49, 49), blur_probability=0.0)
    soft = make_view((49, 49), blur_probability=1.0)
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
    view = make_augment(options, (65, 65), fill=FILL)(made, np.random.default_rng(11))
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
    view = make_view((129, 129), rotation_probability=0.0)
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


def test_window_is_the_first_that_fits():
    areas, aspects = np.array([1.0, 0.9, 0.5]), np.array([1.3, 1.0, 1.0])
    assert window_size((100, 100), areas, aspects) == (95, 95)  # sqrt(0.9 * 100 * 100)
    assert window_size((100, 60), areas, aspects) == (55, 55)  # sqrt(0.5 * 100 * 60)
    assert window_size((100, 10), areas, aspects) is None


def test_where_no_window_fits_it_is_the_largest_with_the_crops_aspect():
    assert largest_window((100, 10), (64, 64)) == (10, 10)
    assert largest_window((90, 100), (60, 30)) == (90, 45)
    made = example(100, 10)
    view = make_view((64, 64), "lextal", rotation_probability=0.0, flip_probability=0.0)
    image, labels = made.image[45:55], made.labels[45:55]
    seen = view(made, np.random.default_rng(0))
    np.testing.assert_array_equal(seen.image, stretch(image, labels, (64, 64))[0])
    np.testing.assert_array_equal(seen.labels, stretch(image, labels, (64, 64))[1])


def test_stretched_labels_lie_where_the_image_does():
    """A step edge: where the image is past the middle, the labels are on the other side."""
    labels = np.zeros((9, 40), np.uint8)
    labels[:, 17:] = 1
    image = np.repeat(labels[..., None] * np.uint8(255), 3, axis=2)
    for width in (23, 40, 64, 97):
        big, big_labels = stretch(image, labels, (9, width))
        values = big[..., 0]
        assert ((values > 128) <= (big_labels == 1)).all()
        assert ((values < 127) <= (big_labels == 0)).all()


def test_order_of_the_variant_is_window_flip_rotate():
    """The whole against the steps written out with the numbers that it draws."""
    made = example(130, 150, seed=3)
    seed = next(s for s in range(20) if draws_of_the_variant(s)["fits"] > 0)
    draws = draws_of_the_variant(seed)
    view = make_view((64, 72), "lextal", flip_probability=1.0)(made, np.random.default_rng(seed))
    top, left, height, width = draws["window"]
    image = made.image[top : top + height, left : left + width]
    labels = made.labels[top : top + height, left : left + width]
    image = cv2.resize(image, (72, 64), interpolation=cv2.INTER_LINEAR)[:, ::-1]
    labels = cv2.resize(labels, (72, 64), interpolation=cv2.INTER_NEAREST_EXACT)[:, ::-1]
    turn = cv2.getRotationMatrix2D((71 / 2, 63 / 2), draws["degrees"], 1)
    image = cv2.warpAffine(image, turn, (72, 64), flags=cv2.INTER_LINEAR, borderValue=FILL)
    labels = cv2.warpAffine(labels, turn, (72, 64), flags=cv2.INTER_NEAREST, borderValue=255)
    np.testing.assert_array_equal(view.image, image)
    np.testing.assert_array_equal(view.labels, labels)


def draws_of_the_variant(seed):
    """What it draws for an image of 130 x 150, one try after the other."""
    rng = np.random.default_rng(seed)
    areas = rng.uniform(0.5, 1, NUM_TRIES)
    aspects = rng.uniform(3 / 4, 4 / 3, NUM_TRIES)
    turned = rng.random(NUM_TRIES) < 0.5
    offset = rng.random(2)
    degrees = np.floor(rng.uniform(-10, 10))
    for i in range(NUM_TRIES):
        width = round((areas[i] * 130 * 150 * aspects[i]) ** 0.5)
        height = round((areas[i] * 130 * 150 / aspects[i]) ** 0.5)
        if turned[i]:
            height, width = width, height
        if height <= 130 and width <= 150:
            break
    top, left = int(offset[0] * (130 - height + 1)), int(offset[1] * (150 - width + 1))
    return {"fits": i, "window": (top, left, height, width), "degrees": degrees}


def test_draws_cover_the_ranges_of_the_variant():
    """Area, aspect and flip of many draws, read off a picture whose colors tell where a pixel was."""
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    made = Example(np.stack([rows, columns, rows], axis=2), np.zeros((200, 200), np.uint8), 0)
    view = make_view((64, 64), "lextal", rotation_probability=0.0)
    areas, aspects, flips = [], [], 0
    for seed in range(400):
        image = view(made, np.random.default_rng(seed)).image.astype(float)
        height = (image[-1, 32, 0] - image[0, 32, 0]) / 63 * 64
        width = (image[32, -1, 1] - image[32, 0, 1]) / 63 * 64
        flips += width < 0
        areas.append(height * abs(width) / 200**2)
        aspects.append(abs(width) / height)
    assert min(areas) == pytest.approx(0.5, abs=0.02)
    assert max(areas) == pytest.approx(1.0, abs=0.03)
    assert np.quantile(aspects, [0.0, 0.5, 1.0]) == pytest.approx([3 / 4, 1, 4 / 3], abs=0.05)
    assert flips / 400 == pytest.approx(0.5, abs=0.08)


def test_the_variant_turns_by_whole_degrees_and_leaves_void():
    """Angles read off a line through the middle, of many draws."""
    labels = np.zeros((201, 201), np.uint8)
    labels[100, :] = 1
    made = Example(np.full((201, 201, 3), 255, np.uint8), labels, 0)
    view = make_view((201, 201), "lextal", area_min=1.0, aspect_max=1.0, flip_probability=0.0)
    angles = set()
    for seed in range(300):
        seen = view(made, np.random.default_rng(seed))
        rows, columns = np.nonzero(seen.labels == 1)
        slope = np.polyfit(columns - 100, 100 - rows, 1)[0]
        degrees = np.degrees(np.arctan(slope))
        assert degrees == pytest.approx(round(degrees), abs=0.2)
        angles.add(round(degrees))
        is_void = seen.labels[0, 0] == IGNORE_LABEL
        assert is_void == (round(degrees) != 0)
        assert not is_void or tuple(seen.image[0, 0]) == FILL
    assert angles == set(range(-10, 10))
