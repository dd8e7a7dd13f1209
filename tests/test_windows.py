"""Protocols over functions Images -> Logits, beside a plain NumPy statement of the authors' one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import semseg_protocol

from pspnet_jax import windows
from pspnet_jax.catalog import load_label_set
from pspnet_jax.windows import PROTOCOLS, Protocol, choose, override

from pictures import example

BUDGET_SECONDS = 60

ADE20K = load_label_set("ade20k")
CROP = (33, 41)


def lopsided(images, *, xp=jnp):
    """Logits that depend on the color, the place in the window and the window as a whole."""
    rows = xp.arange(images.shape[1]).reshape(1, -1, 1, 1) / images.shape[1]
    columns = xp.arange(images.shape[2]).reshape(1, 1, -1, 1) / images.shape[2]
    place = 3 * rows + columns * images[..., :1] + images.mean(axis=(1, 2, 3), keepdims=True)
    return xp.concatenate([place, images[..., 1:], -images[..., :1] * place], axis=-1)


@functools.partial(jax.jit, static_argnames="flip")
def window_probabilities(crops, flip):
    mean, std = (
        jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3)
        for x in (semseg_protocol.MEAN, semseg_protocol.STD)
    )
    return windows.probabilities(lopsided, (crops - mean) / std, flip=flip)


def sliding(image, protocol, *, batch_size=1):
    canvas = windows.sliding_probabilities(
        functools.partial(window_probabilities, flip=protocol.flip),
        image,
        protocol=protocol,
        fill=tuple(semseg_protocol.MEAN),
        batch_size=batch_size,
    )
    return np.asarray(canvas)[: image.shape[0], : image.shape[1]]


def semseg(**options):
    return override(PROTOCOLS["semseg"], **{"crop_size": CROP, "base_size": 64} | options)


IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 3)), jnp.float32)


def test_without_flip_it_is_the_softmax():
    found = windows.probabilities(lopsided, IMAGES, flip=False)
    np.testing.assert_allclose(found, jax.nn.softmax(lopsided(IMAGES)), atol=1e-6)


def test_flip_averages_probabilities_of_both_directions():
    found = windows.probabilities(lopsided, IMAGES, flip=True)
    mirrored = np.asarray(jax.nn.softmax(lopsided(IMAGES[:, :, ::-1])))[:, :, ::-1]
    expected = (np.asarray(jax.nn.softmax(lopsided(IMAGES))) + mirrored) / 2
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)


def test_with_flip_mirroring_the_image_mirrors_the_result():
    found = windows.probabilities(lopsided, IMAGES, flip=True)
    mirrored = windows.probabilities(lopsided, IMAGES[:, :, ::-1], flip=True)
    np.testing.assert_allclose(np.asarray(mirrored)[:, :, ::-1], found, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((50, 80), {}),  # landscape: the scaled image is 40 x 64, larger than the window across
        ((80, 50), {}),  # portrait
        ((33, 41), {"base_size": 41}),  # as large as the window
        ((20, 25), {"base_size": 25}),  # smaller: padded on all sides, by odd numbers
        ((61, 47), {"base_size": 200}),  # many windows, enlarged
        ((150, 90), {"base_size": 40}),  # shrunk below the window
        ((50, 80), {"scales": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}),
        ((80, 50), {"scales": (0.51, 1.6), "flip": False}),
        ((70, 70), {"stride": (7, 33)}),
        ((200, 150), {"base_size": 200, "flip": False}),  # a canvas larger than one rounding step
        ((1, 90), {"base_size": 90}),
    ],
    ids=str,
)
def test_semseg_equals_its_plain_statement(size, options):
    image = example(*size).image
    protocol = semseg(**options)
    found = sliding(image, protocol, batch_size=3)
    expected = semseg_protocol.probabilities(
        functools.partial(lopsided, xp=np),
        image,
        crop_size=CROP,
        base_size=protocol.base_size,
        scales=protocol.scales,
        flip=protocol.flip,
        stride=protocol.stride if "stride" in options else None,
    )
    assert expected.max() - expected.min() > 0.3
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_of_windows_change_nothing(batch_size):
    image, protocol = example(61, 47).image, semseg(base_size=150)
    expected = sliding(image, protocol)
    np.testing.assert_allclose(sliding(image, protocol, batch_size=batch_size), expected, atol=1e-6)


def test_sizes_that_round_alike_share_compilations():
    protocol = semseg()
    sliding(example(50, 80).image, protocol)
    counted = [windows._add_windows, windows._add_resized, window_probabilities]
    before = [function._cache_size() for function in counted]
    for size in ((51, 83), (90, 60), (33, 33), (127, 128)):
        sliding(example(*size).image, protocol)
    assert [function._cache_size() for function in counted] == before


def test_one_window_is_a_direct_call():
    image = example(*CROP).image
    direct = window_probabilities(image[None].astype(np.float32), True)
    np.testing.assert_allclose(sliding(image, semseg(base_size=41)), direct[0], atol=1e-6)


def test_windows_of_the_authors_sizes():
    """2048 x 1024 at 713 is 4 x 2 windows; ADE20K's photographs at 473 mostly 2."""
    view = windows.views((1024, 2048), choose("semseg", load_label_set("cityscapes")))[0]
    assert view.columns.starts == (0, 476, 952, 1335)
    assert view.rows.starts == (0, 311)
    view = windows.views((512, 683), choose("semseg", ADE20K))[0]
    assert (view.rows.size, view.columns.size) == (384, 512)
    assert (view.rows.before, view.rows.padded) == (44, 473)
    assert (view.rows.starts, view.columns.starts) == ((0,), (0, 39))


def test_usual_protocols_of_label_sets():
    assert choose("whole", ADE20K) == Protocol("whole", flip=True, absent_class="skip")
    assert choose("semseg", ADE20K) == Protocol(
        "semseg",
        flip=True,
        absent_class="zero",
        scales=(1.0,),
        base_size=512,
        crop_size=(473, 473),
        stride=(316, 316),
    )
    cityscapes = choose("semseg", load_label_set("cityscapes"))
    assert (cityscapes.base_size, cityscapes.stride) == (2048, (476, 476))


def test_another_crop_has_another_stride_unless_it_is_given():
    usual = choose("semseg", ADE20K)
    assert override(usual, crop_size=(300, 90)).stride == (200, 60)
    assert override(usual, stride=(10, 20)).stride == (10, 20)
    assert override(override(usual, stride=(10, 20)), flip=False).stride == (10, 20)
    assert override(override(usual, stride=(10, 20)), crop_size=(90, 90)).stride == (60, 60)


def test_one_number_stands_for_both_sides_and_one_scale_for_all():
    usual = choose("semseg", ADE20K)
    assert override(usual, crop_size=90, stride=30, scales=2) == override(
        usual, crop_size=(90, 90), stride=(30, 30), scales=(2.0,)
    )


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "semseg"),
        ({"flip": False}, "semseg-noflip"),
        ({"scales": (0.5, 1.0, 1.75)}, "semseg-scales0.5,1,1.75"),
        ({"base_size": 300}, "semseg-base300"),
        ({"crop_size": (353, 473)}, "semseg-crop353x473"),
        ({"stride": (100, 200)}, "semseg-stride100x200"),
    ],
)
def test_label_says_what_is_unusual(options, label):
    assert override(choose("semseg", ADE20K), **options).label(ADE20K) == label
    assert override(choose("whole", ADE20K), flip=False).label(ADE20K) == "whole-noflip"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("whole", {"scales": (1.0,), "crop_size": (9, 9)}, "has no crop_size, scales .semseg has"),
        ("semseg", {"scales": (1.0, 0.0)}, "must be factors above 0"),
        ("semseg", {"scales": ()}, "must be factors above 0"),
        ("semseg", {"scales": (float("inf"),)}, "must be factors above 0, at most 100"),
        ("semseg", {"scales": (float("nan"),)}, "must be factors above 0, at most 100"),
        ("semseg", {"crop_size": (9, 9, 9)}, "must be .height, width."),
        ("semseg", {"stride": (0, 9)}, "must be .height, width."),
        ("semseg", {"base_size": 0}, "at least 1 pixel"),
        ("semseg", {"stride": (474, 9)}, "would leave pixels out"),
    ],
)
def test_impossible_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        override(choose(name, ADE20K), **options)


def test_protocols_survive_json():
    protocol = override(choose("semseg", ADE20K), scales=(0.5, 1.0))
    assert Protocol.from_json(protocol.to_json()) == protocol
