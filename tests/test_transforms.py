"""The plans that each recipe draws: their ranges, shares and order, over ten thousand draws."""

import cv2
import numpy as np
import pytest

from pspnet_jax.arrays import IGNORE_LABEL, Example
from pspnet_jax.config import default_config
from pspnet_jax.data.transforms import (
    NUM_TRIES,
    RECIPES,
    draw_colors,
    fitted_size,
    is_varied,
    largest_window,
    make_augment,
    resolve,
    window_size,
)
from pspnet_jax.data.views import ColorChange, change_colors

from pictures import example

BUDGET_SECONDS = 60

FILL = (124, 116, 104)
NUM_DRAWS = 10_000


def recipe(name="semseg", **overrides):
    section = default_config().augment.to_dict() | {"recipe": name} | overrides
    return resolve(section)


def make_view(size, name="semseg", **overrides):
    return make_augment(recipe(name, **overrides), size, fill=FILL)


def plans(size, crop_size, name="semseg", *, labels=None, **overrides):
    """Ten thousand plans for an image of (height, width) `size`."""
    planner = make_view(crop_size, name, **overrides).planner
    labels = np.zeros(size, np.uint8) if labels is None else labels
    return [
        planner.plan(labels, crop_size, np.random.default_rng(seed)) for seed in range(NUM_DRAWS)
    ]


def linear_parts(drawn):
    """The 2 x 2 parts of the maps, stacked."""
    return np.stack([plan.to_image[:2, :2] for plan in drawn])


def assert_uniform(values, low, high):
    """Distance of Kolmogorov and Smirnov to the uniform distribution: under 1.95 / sqrt(n), but for one in a thousand."""
    values = np.sort(values)
    assert low <= values[0]
    assert values[-1] <= high
    share = (values - low) / (high - low)
    steps = np.arange(len(values) + 1) / len(values)
    assert max((steps[1:] - share).max(), (share - steps[:-1]).max()) < 1.95 / len(values) ** 0.5


def test_recipes_resolve_and_overrides_win():
    assert recipe()["scale_max"] == 2.0
    assert recipe("none")["scale_max"] == 1.0
    assert recipe("lextal")["aspect_max"] == 4 / 3
    assert recipe("mmseg")["base_size"] == (2048, 512)
    assert recipe(scale_max=1.5, blur_probability=0.0)["scale_max"] == 1.5
    assert set(RECIPES) == {"semseg", "mmseg", "lextal", "none"}


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"blur_probability=0.5, augment.scale_min=0.7 would do"):
        recipe("lextal", scale_min=0.7, blur_probability=0.5)
    with pytest.raises(
        ValueError, match=r"area_min=0.5 would do nothing: recipe 'semseg' has scale_"
    ):
        recipe(area_min=0.5)


@pytest.mark.parametrize("name", list(RECIPES))
@pytest.mark.parametrize("size", [(20, 30), (100, 120), (33, 200), (2, 3000)])
def test_crop_has_its_size_whatever_the_image(name, size):
    overrides = {"base_size": (160, 60)} if name == "mmseg" else {}
    view = make_view((41, 33), name, **overrides)
    for seed in range(20):
        made = view(example(*size, seed=seed), np.random.default_rng(seed))
        assert made.image.shape == (41, 33, 3)
        assert made.labels.shape == (41, 33)
        assert made.image.flags.c_contiguous
        assert made.labels.flags.c_contiguous


@pytest.mark.parametrize("name", list(RECIPES))
def test_same_numbers_same_view(name):
    view = make_view((41, 33), name)
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


def test_draws_of_the_authors_recipe():
    """Scale, angle, mirroring, blur, offsets and border of plans for 90 x 120 pixels and crops of 101."""
    drawn = plans((90, 120), (101, 101))
    linear = linear_parts(drawn)
    scales = 1 / np.sqrt(np.abs(np.linalg.det(linear)))
    assert_uniform(scales, 0.5, 2.0)
    flips = np.linalg.det(linear) < 0
    blurs = np.array([plan.blurs for plan in drawn])
    turns = np.array([plan.is_rotated for plan in drawn])
    for share in (flips.mean(), blurs.mean(), turns.mean()):
        assert share == pytest.approx(0.5, abs=0.015)
    for first, second in ((flips, blurs), (flips, turns), (blurs, turns)):
        assert np.corrcoef(first, second)[0, 1] == pytest.approx(0, abs=0.04)
    # Undo the mirroring: what is left is a rotation, of the picture counterclockwise.
    sign = np.where(flips, -1, 1)
    degrees = np.degrees(np.arctan2(linear[:, 1, 0] * sign, linear[:, 1, 1]))
    assert_uniform(degrees[turns], -10, 10)
    assert (degrees[~turns] == 0).all()
    sizes = np.array([plan.size for plan in drawn])
    np.testing.assert_array_equal(sizes, np.rint(scales[:, None] * (90, 120)))
    # The pixel (width / 2, height / 2) of the picture stays where it is.
    for i in np.flatnonzero(turns & ~flips)[:100]:
        center = np.array([sizes[i, 1] / 2, sizes[i, 0] / 2, 1])
        expected = (center[:2] + 0.5) / scales[i] - 0.5
        np.testing.assert_allclose((drawn[i].to_image @ center)[:2], expected, atol=1e-9)
    corners = np.array([plan.corner for plan in drawn])
    for axis in (0, 1):
        room = sizes[:, axis] - 101
        padded = room <= 0
        np.testing.assert_array_equal(corners[padded, axis], -(-room[padded] // 2))
        inner = corners[~padded, axis]
        assert inner.min() == 0
        assert (inner <= room[~padded]).all()
        wide = ~padded & (room > 60)
        assert_uniform((corners[wide, axis] + np.random.default_rng(0).random(wide.sum()))
                       / (room[wide] + 1), 0, 1)  # fmt: skip
    # Scale s leaves 1 - 90 s / 101 of the rows and 1 - 120 s / 101 of the columns open.
    seen = np.minimum(sizes, 101).prod(axis=1) / 101**2
    s = np.linspace(0.5, 2, 10_001)
    expected = (np.minimum(90 * s, 101) * np.minimum(120 * s, 101)).mean() / 101**2
    assert seen.mean() == pytest.approx(expected, abs=0.005)


def test_the_view_is_the_plan():
    """What is drawn is what is seen: the share of void in views and in the plans' arithmetic."""
    view = make_view((101, 101), rotation_probability=0.0)
    made = example(90, 120)
    for seed in range(30):
        plan = view.planner.plan(made.labels, (101, 101), np.random.default_rng(seed))
        labels = view(made, np.random.default_rng(seed)).labels
        known = np.minimum(plan.size, 101).prod()
        assert (labels != IGNORE_LABEL).sum() == known


def test_window_is_the_first_that_fits():
    areas, aspects = np.array([1.0, 0.9, 0.5]), np.array([1.3, 1.0, 1.0])
    assert window_size((100, 100), areas, aspects) == (95, 95)  # sqrt(0.9 * 100 * 100)
    assert window_size((100, 60), areas, aspects) == (55, 55)  # sqrt(0.5 * 100 * 60)
    assert window_size((100, 10), areas, aspects) is None


def test_where_no_window_fits_it_is_the_largest_with_the_crops_aspect():
    assert largest_window((100, 10), (64, 64)) == (10, 10)
    assert largest_window((90, 100), (60, 30)) == (90, 45)
    view = make_view((64, 64), "lextal")
    plan = view.planner.plan(np.zeros((100, 10), np.uint8), (64, 64), np.random.default_rng(0))
    assert plan.window == (45, 0, 10, 10)


def test_order_of_the_variant_is_window_flip_rotate():
    """The whole against the steps written out with the numbers that it draws."""
    made = example(130, 150, seed=3)
    seed = next(s for s in range(20) if draws_of_the_variant(s)["fits"] > 0)
    draws = draws_of_the_variant(seed)
    top, left, height, width = draws["window"]
    smooth = cv2.GaussianBlur(made.image, (0, 0), 3)
    view = make_view((64, 72), "lextal", flip_probability=1.0)(
        Example(smooth, made.labels, made.index), np.random.default_rng(seed)
    )
    image = cv2.resize(smooth[top : top + height, left : left + width], (72, 64))[:, ::-1]
    known = np.zeros((64, 72), np.uint8)
    turn = cv2.getRotationMatrix2D((71 / 2, 63 / 2), draws["degrees"], 1)
    image = cv2.warpAffine(image, turn, (72, 64), borderValue=FILL)
    void = cv2.warpAffine(known, turn, (72, 64), flags=cv2.INTER_NEAREST, borderValue=255) == 255
    assert abs(draws["degrees"]) > 2
    assert ((view.labels == IGNORE_LABEL) == void).mean() > 0.99
    known = np.pad((~void).astype(np.uint8)[3:-3, 3:-3], 3)
    inner = cv2.erode(known, np.ones((5, 5))) == 1
    assert np.abs(view.image.astype(int) - image)[inner].max() <= 6


def draws_of_the_variant(seed):
    """What it draws for an image of 130 x 150, one try after the other."""
    rng = np.random.default_rng(seed)
    areas = rng.uniform(0.5, 1, NUM_TRIES)
    aspects = rng.uniform(3 / 4, 4 / 3, NUM_TRIES)
    turned = rng.random(NUM_TRIES) < 0.5
    offset = rng.random(2)
    degrees = rng.integers(-10, 10)
    for i in range(NUM_TRIES):
        width = round((areas[i] * 130 * 150 * aspects[i]) ** 0.5)
        height = round((areas[i] * 130 * 150 / aspects[i]) ** 0.5)
        if turned[i]:
            height, width = width, height
        if height <= 130 and width <= 150:
            break
    top, left = int(offset[0] * (130 - height + 1)), int(offset[1] * (150 - width + 1))
    return {"fits": i, "window": (top, left, height, width), "degrees": degrees}


def test_draws_of_the_variants_recipe():
    """Area, aspect, corner, whole degrees and mirroring of plans for 300 x 300 pixels."""
    drawn = plans((300, 300), (64, 64), "lextal")
    windows = np.array([plan.window for plan in drawn])
    areas = windows[:, 2:].prod(axis=1) / 300**2
    aspects = windows[:, 3] / windows[:, 2]
    # Windows that do not fit are drawn again: only aspects that fit are left where the area is large.
    assert_uniform(areas[areas < 0.74] + 0, 0.5 - 0.004, areas[areas < 0.74].max())
    assert np.quantile(aspects, [0.0, 0.5, 1.0]) == pytest.approx([0.75, 1, 4 / 3], abs=0.02)
    assert (areas > 0.99).mean() < 0.02
    room = 300 - windows[:, 2:]
    wide = room.min(axis=1) > 40
    for axis in (0, 1):
        spread = np.random.default_rng(axis).random(wide.sum())
        assert_uniform((windows[wide, axis] + spread) / (room[wide, axis] + 1), 0, 1)
    linear = linear_parts(drawn)
    flips = np.linalg.det(linear) < 0
    assert flips.mean() == pytest.approx(0.5, abs=0.015)
    assert all(plan.is_rotated for plan in drawn)
    for plan in drawn[:50]:
        assert plan.size == (64, 64)
        assert plan.corner == (0, 0)


def test_the_variant_turns_by_whole_degrees_and_leaves_void():
    """Angles read off a line through the middle, of many views."""
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


@pytest.mark.parametrize(
    ("limit", "expected"), [(0.0, {0}), (0.5, {0}), (2.0, {-2, -1, 0, 1}), (1.5, {-1, 0, 1})]
)
def test_the_variant_stays_within_its_degrees(limit, expected):
    planner = make_view((64, 64), "lextal", rotation_degrees=limit, flip_probability=0.0).planner
    labels, found = np.zeros((64, 64), np.uint8), set()
    for seed in range(60):
        linear = planner.plan(labels, (64, 64), np.random.default_rng(seed)).to_image
        found.add(round(np.degrees(np.arctan2(linear[1, 0] / linear[1, 1], 1))))
    assert found == expected


def test_mmseg_fits_into_long_and_short_side():
    """Sizes by mmcv's rule: the smaller of the two factors, rounded half up."""
    assert fitted_size((512, 683), (2048, 512), 1.0) == (512, 683)
    assert fitted_size((1024, 2048), (2048, 1024), 0.5) == (512, 1024)
    assert fitted_size((100, 1000), (2048, 512), 1.0) == (205, 2048)
    assert fitted_size((300, 200), (2048, 512), 0.75) == (576, 384)
    assert fitted_size((300, 200), (512, 2048), 0.75) == (576, 384)
    assert fitted_size((2, 5000), (2048, 512), 0.5) == (1, 1024)


def test_draws_of_the_mmseg_recipe():
    """Scale, corner, mirroring and padding of plans for 90 x 120 pixels into (320, 80), crops of 97."""
    drawn = plans((90, 120), (97, 97), "mmseg", base_size=(320, 80), class_share_max=1.0)
    sizes = np.array([plan.size for plan in drawn])
    # The short side is cut to whole pixels: 40..159.
    assert_uniform((sizes[:, 0] + np.random.default_rng(0).random(NUM_DRAWS)) / 80, 0.5, 2.0)
    np.testing.assert_allclose(sizes[:, 1] / sizes[:, 0], 120 / 90, rtol=0.02)
    flips = np.array([plan.to_image[0, 0] < 0 for plan in drawn])
    assert flips.mean() == pytest.approx(0.5, abs=0.015)
    corners = np.array([plan.corner for plan in drawn])
    room = np.maximum(sizes - 97, 0)
    assert (corners >= 0).all()  # padding is at the bottom and right
    assert (corners <= room).all()
    for axis in (0, 1):
        wide = room[:, axis] > 40
        spread = np.random.default_rng(1).random(wide.sum())
        assert_uniform((corners[wide, axis] + spread) / (room[wide, axis] + 1), 0, 1)
    assert not any(plan.is_rotated or plan.blurs for plan in drawn)


def test_a_mirrored_crop_of_mmseg_is_the_mirror_of_the_crop():
    made = example(60, 80, seed=1)
    options = {"base_size": (200, 60), "color_probability": 0.0}
    for seed in range(20):
        straight, mirrored = (
            make_view((49, 97), "mmseg", flip_probability=p, **options)(
                made, np.random.default_rng(seed)
            )
            for p in (0.0, 1.0)
        )
        width = (straight.labels != IGNORE_LABEL).any(axis=0).nonzero()[0].max() + 1
        np.testing.assert_array_equal(
            mirrored.labels[:, :width], straight.labels[:, :width][:, ::-1]
        )
        difference = mirrored.image[:, :width].astype(int) - straight.image[:, :width][:, ::-1]
        assert np.abs(difference).max() <= 1


def test_no_class_fills_a_crop_where_that_can_be_avoided():
    labels = np.zeros((100, 200), np.uint8)
    labels[:, 150:] = 1
    options = {
        "base_size": (200, 100),
        "scale_min": 1.0,
        "scale_max": 1.0,
        "color_probability": 0.0,
    }
    planner = make_view((40, 40), "mmseg", **options).planner
    careless = make_view((40, 40), "mmseg", class_share_max=1.0, **options).planner
    found = {}
    for name, chosen in (("careful", planner), ("careless", careless)):
        seen = []
        for seed in range(300):
            plan = chosen.plan(labels, (40, 40), np.random.default_rng(seed))
            left = plan.corner[1] if plan.to_image[0, 0] > 0 else 160 - plan.corner[1]
            seen.append(is_varied(labels[:40, left : left + 40], 0.75))
        found[name] = np.mean(seen)
    # 19 of 161 corners leave each class less than 0.75; one of eleven draws is such a corner, or none is.
    assert found["careful"] == pytest.approx(1 - (142 / 161) ** 11, abs=0.07)
    assert found["careless"] == pytest.approx(19 / 161, abs=0.05)


def test_varied_means_two_classes_and_none_too_large():
    labels = np.zeros((10, 10), np.uint8)
    assert not is_varied(labels, 1.1)
    labels[:3] = 1
    assert is_varied(labels, 0.75)
    assert not is_varied(labels, 0.7)
    labels[3:6] = IGNORE_LABEL  # 40 of 70 labeled ones are of one class
    assert is_varied(labels, 0.6)
    assert not is_varied(labels, 0.5)


def test_draws_of_color_changes():
    changes = [draw_colors(np.random.default_rng(seed), 0.5) for seed in range(NUM_DRAWS)]
    gray = np.full((1, 1, 3), 128, np.uint8)
    values = np.array([change_colors(gray, change)[0, 0, 0] for change in changes])
    assert (values == 128).mean() == pytest.approx(
        0.25, abs=0.03
    )  # neither brightness nor contrast
    assert values.min() in range(47, 56)
    assert values.max() in range(234, 242)
    assert np.mean([change.hsv is None for change in changes]) == pytest.approx(0.25, abs=0.02)
    assert np.mean([bool(change.rgb_after) for change in changes]) == pytest.approx(0.25, abs=0.02)
    hues = [int(change.hsv[0, 0, 0]) for change in changes if change.hsv is not None]
    assert set(hues) == {h % 180 for h in range(-18, 18)}
    strong = [int(change.hsv[0, 100, 1]) for change in changes if change.hsv is not None]
    assert (min(strong), max(strong)) == (50, 149)


def test_no_color_change_where_its_probability_is_0():
    assert draw_colors(np.random.default_rng(0), 0.0) == ColorChange()
    changed = draw_colors(np.random.default_rng(0), 1.0)
    assert changed.hsv is not None
    assert len(changed.rgb) + len(changed.rgb_after) == 2
