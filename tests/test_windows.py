"""Where windows lie, and of which of their scores results are made."""

import functools

import numpy as np
import pytest

from pspnet_jax import windows
from pspnet_jax.catalog import load_label_set
from pspnet_jax.protocols import choose, override
from pspnet_jax.taps import RULES

from networks import small_protocol
from pictures import example

BUDGET_SECONDS = 40

ADE20K = load_label_set("ade20k")
SIZES = [(50, 80), (80, 50), (33, 41), (20, 25), (150, 90), (1, 90), (97, 97)]


def test_windows_of_the_authors_sizes():
    """2048 x 1024 at 713 is 4 x 2 windows; ADE20K's photographs at 473 mostly 2."""
    view = windows.views((1024, 2048), choose("semseg", load_label_set("cityscapes")))[0]
    assert view.columns.starts == (0, 476, 952, 1335)
    assert view.rows.starts == (0, 311)
    view = windows.views((512, 683), choose("semseg", ADE20K))[0]
    assert (view.rows.size, view.columns.size) == (384, 512)
    assert (view.rows.before, view.rows.padded) == (44, 473)
    assert (view.rows.starts, view.columns.starts) == ((0,), (0, 39))


def test_padding_of_caffe_lies_behind_and_mmseg_has_none():
    view = windows.views((512, 683), choose("caffe", ADE20K))[0]
    assert (view.rows.size, view.rows.before, view.rows.padded) == (385, 0, 473)
    view = windows.views((512, 683), override(choose("mmseg-slide", ADE20K), scales=0.5))[0]
    assert (view.rows.window, view.columns.window) == (256, 342)


def test_mirror_images_are_views_where_logits_are_averaged():
    assert [view.mirrored for view in windows.views((9, 9), small_protocol(flip=True))] == [False]
    slide = small_protocol("mmseg-slide", flip=True, scales=(0.5, 1.0))
    assert [view.mirrored for view in windows.views((9, 9), slide)] == [False, True] * 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [(22, 28), (7, 33), (33, 41)])
def test_windows_cover_every_sample_and_end_with_the_image(size, stride):
    for view in windows.views(size, small_protocol(stride=stride, base_size=150)):
        for axis in (view.rows, view.columns):
            covered = np.zeros(axis.padded, int)
            for start in axis.starts:
                covered[start : start + axis.window] += 1
            assert covered.min() >= 1
            assert axis.starts[0] == 0
            assert axis.starts[-1] + axis.window == axis.padded


def test_result_taps_divide_by_the_windows_over_a_sample():
    (view,) = windows.views((50, 90), small_protocol(base_size=100))
    counts = np.zeros(view.columns.padded)
    for start in view.columns.starts:
        counts[start : start + 41] += 1
    assert set(counts) == {1, 2, 3}
    taps = windows.result_taps(view.columns, 90, "half_pixel")
    np.testing.assert_allclose((taps.weights * counts[taps.indices]).sum(1), 1)
    turned = windows.result_taps(view.columns, 90, "half_pixel", mirrored=True)
    np.testing.assert_array_equal(turned.indices, taps.indices[::-1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("canvas", [(60, 200), (80, 70), (130, 90), (1000, 1000)])
def test_parts_fit_the_canvas_and_hold_what_their_samples_need(size, canvas):
    protocol = small_protocol(base_size=200)
    parts = windows.plan(size, protocol, "half_pixel", canvas=canvas)
    covered = np.zeros(size, int)
    for part in parts:
        covered[slice(*part.rows), slice(*part.columns)] += 1
        assert part.height <= canvas[0]
        for view_part in part.views:
            view = view_part.view
            assert view_part.columns.length <= canvas[1]
            for axis, span, side, ends in (
                (view.rows, view_part.rows, size[0], part.rows),
                (view.columns, view_part.columns, size[1], part.columns),
            ):
                taps = windows.result_taps(axis, side, "half_pixel").rows(*ends)
                used = np.unique(taps.indices[taps.weights > 0])
                touching = [
                    s for s in axis.starts if ((used >= s) & (used < s + axis.window)).any()
                ]
                assert list(span.starts) == touching
            assert len(view_part.windows) == len(view_part.rows.starts) * len(
                view_part.columns.starts
            )
    assert (covered == 1).all()


def test_a_whole_image_is_one_part_where_there_is_room():
    protocol = small_protocol(scales=(0.5, 1.0), base_size=200)
    (part,) = windows.plan((70, 90), protocol, "half_pixel", canvas=(1000, 200))
    assert part.height == sum(v.rows.padded for v in windows.views((70, 90), protocol))


def test_a_mirrored_view_is_cut_where_its_mirror_image_is():
    protocol = small_protocol("mmseg-slide", flip=True, max_size=300, base_size=90)
    upright, mirrored = windows.plan((50, 100), protocol, "half_pixel", canvas=(999, 90))[0].views
    assert upright.columns.starts[0] == 0
    assert mirrored.columns.starts[0] > 0


def test_size_of_the_canvas():
    protocol = small_protocol(scales=(0.5, 1.0), base_size=200)
    assert windows.canvas_size(protocol, 1, 10**9) == (3 * 300, 200)
    assert windows.canvas_size(protocol, 6, 10**9) == (6 * 300, 200)
    assert windows.canvas_size(protocol, 1, 200 * 120) == (120, 200)
    # Too little for windows over the whole width: narrower.
    assert windows.canvas_size(protocol, 1, 82 * 120) == (120, 82)


SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("base_size", "scales", "most_parts"),
    [
        (512, (1.0,), 1),
        (512, SIX, 1),
        (2048, (1.0,), 1),
        pytest.param(2048, SIX, 44, marks=pytest.mark.slow),
        (6000, (1.0,), 10),
    ],
)
def test_the_canvas_need_not_grow_with_the_image(base_size, scales, most_parts):
    """4000 x 6000 pixels, 150 classes, 4 GiB: what has no room at once is made in few parts."""
    protocol = override(choose("semseg", ADE20K), base_size=base_size, scales=scales)
    canvas = windows.canvas_size(protocol, 1, 4 * 2**30 // (4 * 150))
    parts = windows.plan((4000, 6000), protocol, "half_pixel", canvas=canvas)
    assert len(parts) <= most_parts


def test_a_canvas_that_is_too_small_is_refused():
    with pytest.raises(
        ValueError, match=r"canvas_gib is too small .* at least 1\.02 times as much"
    ):
        windows.plan((20, 30), small_protocol(), "half_pixel", canvas=(42, 999))


def test_views_of_images():
    image = example(50, 80).image
    for name, dtype in (("semseg", np.float32), ("caffe", np.float32), ("mmseg-slide", np.uint8)):
        protocol = small_protocol(name)
        view = windows.views((50, 80), protocol)[0]
        made = windows.view_image(image, view, protocol, (120.4, 110.6, 100.0))
        assert made.shape == (view.rows.padded, view.columns.padded, 3)
        assert made.dtype == dtype
    whole = choose("whole", ADE20K)
    upright, mirrored = windows.views((50, 80), whole)
    assert windows.view_image(image, upright, whole, (0.0, 0.0, 0.0)) is image
    turned = windows.view_image(image, mirrored, whole, (0.0, 0.0, 0.0))
    np.testing.assert_array_equal(turned, image[:, ::-1])


def test_caffe_pads_8_bit_images_with_a_rounded_mean_unless_one_window_holds_them():
    image, mean = example(20, 60).image, (120.4, 110.6, 100.0)
    for base_size, expected in ((80, [120, 111, 100]), (32, list(mean))):
        protocol = small_protocol("caffe", base_size=base_size)
        view = windows.views((20, 60), protocol)[0]
        made = windows.view_image(image, view, protocol, mean)
        np.testing.assert_allclose(made[-1, -1], expected, rtol=1e-6)


def test_no_canvas_at_all_is_refused_likewise():
    protocol = choose("semseg", ADE20K)
    canvas = windows.canvas_size(protocol, 1, 100)
    with pytest.raises(ValueError, match="canvas_gib is too small"):
        windows.plan((20, 30), protocol, "half_pixel", canvas=canvas)


def test_scores_of_a_network_go_to_the_result_in_one_step_where_nothing_was_padded():
    """csail's decoder resizes once; by way of the image's size the weights are others."""
    to_result = functools.partial(windows.network_taps, 5, rule="half_pixel", mirrored=False)
    direct = to_result(padded=40, size=40, side=50, one_step=True)
    expected = RULES["half_pixel"](5, 50)
    np.testing.assert_array_equal(direct.indices, expected.indices)
    np.testing.assert_array_equal(direct.weights, expected.weights)
    assert to_result(padded=40, size=40, side=50, one_step=False).indices.shape == (50, 4)
    assert to_result(padded=41, size=40, side=50, one_step=True).indices.shape == (50, 4)
    assert to_result(padded=41, size=40, side=40, one_step=False).indices.shape == (40, 2)
