"""Pictures of class maps."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import headers
from pspnet_jax.visualize import (
    ERROR_COLOR,
    HEAT_COLORS,
    colorize,
    encode_indexed_png,
    encode_png,
    errors,
    gray,
    grid,
    heat_map,
    legend,
    overlay,
    panel,
    shrunk,
)

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


def test_flat_pictures_are_not_enlarged_beyond_a_width():
    flat = np.zeros((1, 3000, 3), np.uint8)
    made = panel({"input": flat}, class_ids=[0], names=["a", "b"], palette=PALETTE)
    assert made.shape[1] == 3000 + 2 * 8
    with pytest.raises(ValueError, match=r"\(1, 2000000\).* is too large for a PNG file"):
        encode_png(np.zeros((1, 2_000_000), np.uint8))


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


def test_gray_rounds_and_stays_within_its_range():
    values = np.array([[0.0, 1.0, 0.5, 0.2], [-0.1, 1.1, 0.0019, 0.0021]], np.float32)
    assert gray(values).tolist() == [[0, 255, 128, 51], [0, 255, 0, 1]]


@pytest.mark.parametrize("labels", ["ade20k", "cityscapes", "scenes"])
def test_legend_shows_every_class_once_in_columns(labels):
    label_set = load_label_set(labels)
    made = legend(label_set.names, label_set.palette)
    assert 0.8 < made.shape[1] / made.shape[0] < 2.2
    shown = [tuple(color) for color in made.reshape(-1, 3).tolist()]
    for color in set(label_set.colors):
        at_least = 26 * 14 * label_set.colors.count(color)
        assert shown.count(color) >= at_least, color
    assert (made[:, -1] == 255).all()
    assert (made[-8:] == 255).all()


def test_gray_scales_stand_below_the_classes():
    label_set = load_label_set("camvid")
    plain = legend(label_set.names, label_set.palette)
    made = legend(label_set.names, label_set.palette, scales=("a scale of confidence", "another"))
    np.testing.assert_array_equal(made[: len(plain) - 8, : plain.shape[1]], plain[:-8])
    ramp = np.arange(256, dtype=np.uint8)
    below = made[len(plain) :, :, 0]
    rows = [row for row in below if any((row[i : i + 256] == ramp).all() for i in range(40))]
    assert len(rows) >= 2 * 10


def test_indexed_png_holds_the_ids_and_shows_the_colors():
    labels = np.random.default_rng(0).integers(0, 11, (13, 7)).astype(np.uint8)
    encoded = encode_indexed_png(labels, PALETTE)
    shown = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_array_equal(shown, colorize(labels, PALETTE))
    assert headers.parse(encoded).has_palette
    start = encoded.index(b"IDAT")
    (length,) = struct.unpack(">I", encoded[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(encoded[start + 4 : start + 4 + length]), np.uint8)
    np.testing.assert_array_equal(rows.reshape(13, 8)[:, 1:], labels)


def test_png_of_one_and_three_channels():
    picture = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    for image in (picture, picture[..., 0]):
        found = cv2.imdecode(np.frombuffer(encode_png(image), np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(found if image.ndim == 2 else found[..., ::-1], image)


def test_errors_are_of_one_color_void_is_black_and_the_rest_is_a_gray_photograph():
    image = np.full((2, 2, 3), (200, 100, 0), np.uint8)
    prediction = np.array([[0, 2], [2, 7]], np.uint8)
    picture = errors(image, LABELS, prediction)
    assert tuple(picture[0, 1]) == ERROR_COLOR
    assert picture[1, 1].tolist() == [0, 0, 0]
    for pixel in (picture[0, 0], picture[1, 0]):
        assert len(set(pixel.tolist())) == 1
        assert 64 <= pixel[0] < 192


def test_heat_map_tells_the_diagonal_from_the_rest():
    made = heat_map(np.array([[0.25, 0.0], [1.0, np.nan]]), cell=3)
    assert made.shape == (6, 6, 4)
    assert made[0, 0].tolist() == [*HEAT_COLORS[0], 128]
    assert made[5, 2].tolist() == [*HEAT_COLORS[1], 255]
    assert made[0, 3, 3] == made[5, 5, 3] == 0


def test_pictures_are_shrunk_to_both_limits_and_never_enlarged():
    picture = np.zeros((100, 50, 3), np.uint8)
    assert shrunk(picture, 25).shape == (50, 25, 3)
    assert shrunk(picture, 40, 20).shape == (20, 10, 3)
    assert shrunk(picture, 80, 200) is picture
    assert shrunk(np.zeros((1, 900, 3), np.uint8), 30).shape == (1, 30, 3)


def test_a_note_is_one_line_below_the_legend():
    picture = np.zeros((240, 300, 3), np.uint8)
    options = {"class_ids": [0], "names": ["sky"], "palette": PALETTE}
    plain = panel({"input": picture}, **options)
    noted = panel({"input": picture}, note="red is wrong", **options)
    np.testing.assert_array_equal(noted[: len(plain)], plain)
    assert len(noted) == len(plain) + 22
    assert (noted[len(plain) :] < 128).any()
