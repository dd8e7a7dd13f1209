"""Pictures of class maps."""

import numpy as np

from pspnet_jax.catalog import load_label_set
from pspnet_jax.visualize import colorize, grid, overlay, panel

BUDGET_SECONDS = 10

LABELS = np.array([[0, 1], [2, 255]], np.uint8)
PALETTE = load_label_set("camvid").palette


def test_colors_are_those_of_the_label_set_and_void_is_black():
    picture = colorize(LABELS, PALETTE)
    assert picture.tolist() == [[[128, 128, 128], [128, 0, 0]], [[192, 192, 128], [0, 0, 0]]]


def test_overlay_mixes_and_shows_the_photograph_at_void():
    image = np.full((2, 2, 3), 100, np.uint8)
    mixed = overlay(image, LABELS, PALETTE, opacity=0.5)
    assert mixed[0, 0].tolist() == [114, 114, 114]
    assert mixed[1, 1].tolist() == [100, 100, 100]


def test_panel_holds_every_picture_at_a_whole_enlargement_and_a_legend():
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    made = panel(
        {"input": picture, "truth": picture},
        class_ids=[0, 3, 10],
        names=load_label_set("camvid").names,
        palette=PALETTE,
    )
    enlarged = picture.repeat(6, axis=0).repeat(6, axis=1)
    for left in (8, 8 + 300 + 8):
        np.testing.assert_array_equal(made[22:262, left : left + 300], enlarged)
    legend = made[262:].reshape(-1, 3)
    for class_id in (0, 3, 10):
        assert (legend == PALETTE[class_id]).all(axis=1).sum() >= 10 * 12


def test_long_legends_wrap():
    picture = np.zeros((30, 30, 3), np.uint8)
    label_set = load_label_set("ade20k")
    few, many = (
        panel({"input": picture}, class_ids=ids, names=label_set.names, palette=label_set.palette)
        for ids in ([0], list(range(40)))
    )
    assert many.shape[1] == few.shape[1]
    assert many.shape[0] > few.shape[0] + 100


def test_grid_fills_up_with_white():
    panels = [
        np.zeros((4, 5, 3), np.uint8),
        np.zeros((3, 9, 3), np.uint8),
        np.zeros((4, 2, 3), np.uint8),
    ]
    made = grid(panels, columns=2)
    assert made.shape == (2 * (4 + 8), 2 * 9, 3)
    assert not made[:4, :5].any()
    assert not made[:3, 9:].any()
    assert (made[12:, 9:] == 255).all()
    assert (made == 0).all(axis=2).sum() == 20 + 27 + 8
