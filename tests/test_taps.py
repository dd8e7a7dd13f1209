"""Resizing by a few samples each: beside matrices, and beside plain statements of other programs' rules."""

import cv2
import numpy as np
import plain_protocols
import pytest

from pspnet_jax import taps
from pspnet_jax.resample import resize_matrix

BUDGET_SECONDS = 20

SIZES = [(5, 5), (1, 4), (4, 1), (2, 3), (60, 473), (473, 60), (7, 8), (90, 61), (61, 90)]


def matrix(found: taps.Taps, size):
    made = np.zeros((len(found.indices), size))
    np.add.at(made, (np.arange(len(made))[:, None], found.indices), found.weights)
    return made


@pytest.mark.parametrize(("size", "new_size"), SIZES)
@pytest.mark.parametrize("rule", ["half_pixel", "align_corners"])
def test_taps_are_the_rows_of_the_resize_matrix(rule, size, new_size):
    expected = resize_matrix(size, new_size, align_corners=rule == "align_corners")
    found = taps.RULES[rule](size, new_size)
    assert found.indices.shape == (new_size, 2)
    np.testing.assert_allclose(matrix(found, size), expected, atol=1e-12)


@pytest.mark.parametrize(("size", "new_size"), SIZES)
@pytest.mark.parametrize("rule", taps.RULES)
def test_rows_sum_to_one_and_stay_inside(rule, size, new_size):
    found = taps.RULES[rule](size, new_size)
    np.testing.assert_allclose(found.weights.sum(1), 1, atol=1e-12)
    assert (found.weights >= 0).all()
    assert (found.indices >= 0).all()
    assert (found.indices < size).all()


@pytest.mark.parametrize(("size", "new_size"), SIZES)
def test_matlab_equals_its_plain_statement(size, new_size):
    line = np.random.default_rng(0).random((size, 1, 2))
    expected = plain_protocols.imresize(line, (new_size, 1))
    found = matrix(taps.matlab(size, new_size), size)
    np.testing.assert_allclose(found @ line[:, 0], expected[:, 0], atol=1e-12)


@pytest.mark.parametrize("new_size", [(40, 50), (13, 50), (40, 17), (97, 31), (9, 8), (91, 119)])
def test_8_bit_images_equal_their_plain_statements(new_size):
    image = np.random.default_rng(1).integers(0, 256, (40, 50, 3), np.uint8)
    np.testing.assert_array_equal(
        taps.resize_pillow(image, new_size), plain_protocols.pillow_8bit(image, new_size)
    )
    # Halves round either way: the order of additions decides.
    difference = taps.resize_matlab(image, new_size) - plain_protocols.imresize_8bit(
        image, new_size
    )
    assert np.abs(difference).max() <= 1
    assert (difference == 0).mean() > 0.99


def test_shrinking_smooths_where_the_rule_says_so():
    spike = np.zeros(40)
    spike[::5] = 1  # shrinking by 5, half-pixel looks at samples 2, 7, 12, ... alone
    assert (matrix(taps.half_pixel(40, 8), 40) @ spike == 0).all()
    for rule in (taps.pillow, taps.matlab):
        np.testing.assert_allclose((matrix(rule(40, 8), 40) @ spike)[1:-1], 0.2, atol=0.05)


def test_half_pixel_is_opencvs_rule():
    image = np.random.default_rng(2).random((31, 47), np.float32)
    rows, columns = (
        matrix(taps.half_pixel(a, b), a) for a, b in zip((31, 47), (50, 20), strict=True)
    )
    expected = cv2.resize(image, (20, 50), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(rows @ image @ columns.T, expected, atol=1e-5)


def test_chain_is_one_after_the_other():
    first, second = taps.align_corners(6, 33), taps.half_pixel(33, 50)
    found = taps.chain(first, second)
    assert found.indices.shape == (50, 4)
    np.testing.assert_allclose(matrix(found, 6), matrix(second, 33) @ matrix(first, 6), atol=1e-12)
