"""A network ready to use: any size of image, saved and loaded again."""

import dataclasses

import jax
import numpy as np
import pytest
import semseg_protocol

from pspnet_jax import load
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.models.pspnet import IMAGENET_8BIT
from pspnet_jax.segmenter import (
    Description,
    Provenance,
    Segmenter,
    _check_raw,
    _class_maps,
    _window_probabilities,
    model_part,
)
from pspnet_jax.train_step import split_model
from pspnet_jax.windows import PROTOCOLS, choose

from networks import network, options
from pictures import example

BUDGET_SECONDS = 90

CAMVID = load_label_set("camvid")
DESCRIPTION = Description(options(), CAMVID, IMAGENET_8BIT, choose("whole", CAMVID))


@pytest.fixture(scope="module")
def segmenter():
    _, params, batch_stats = split_model(network(CAMVID.num_classes))
    return Segmenter(DESCRIPTION, params, batch_stats, provenance=Provenance("memory", 0, ""))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    folder = CheckpointFolder(path / "checkpoints")
    for step, score in ((10, 0.5), (20, 0.3)):
        _, params, batch_stats = split_model(network(CAMVID.num_classes, seed=step))
        folder.save(step, {"model": model_part(DESCRIPTION, params, batch_stats)}, mean_iou=score)
    folder.wait()
    return path


def test_logits_have_the_size_of_the_image(segmenter):
    for size in ((33, 41), (40, 50)):
        logits = segmenter.logits(example(*size).image[None])
        assert logits.shape == (1, *size, 11)
        assert logits.dtype == np.float32


def test_odd_sizes_are_padded_with_the_mean_and_cropped_back(segmenter):
    image = example(40, 50).image
    normalized = (image.astype(np.float32) - IMAGENET_8BIT.mean) / np.float32(IMAGENET_8BIT.std)
    padded = np.zeros((1, 41, 57, 3), np.float32)
    padded[0, :40, :50] = normalized
    whole = np.asarray(segmenter.logits(padded))
    np.testing.assert_allclose(segmenter.logits(image[None])[0], whole[0, :40, :50], atol=1e-5)


def test_raw_and_normalized_images_agree(segmenter):
    image = example(33, 41).image
    normalized = (image - np.array(IMAGENET_8BIT.mean)) / np.array(IMAGENET_8BIT.std)
    np.testing.assert_allclose(
        segmenter.logits(image[None]),
        segmenter.logits(normalized[None].astype(np.float32)),
        atol=1e-4,
    )


def test_class_map_is_the_most_probable_class(segmenter):
    image = example(40, 50).image
    probabilities = np.asarray(segmenter.probabilities(image))
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-5)
    found = segmenter.class_map(image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, probabilities.argmax(-1))


def test_flip_can_be_switched_off(segmenter):
    image = example(33, 41).image
    plain = np.asarray(segmenter.probabilities(image, flip=False))
    np.testing.assert_allclose(plain, jax.nn.softmax(segmenter.logits(image[None])[0]), atol=1e-5)
    assert np.abs(plain - segmenter.probabilities(image)).max() > 1e-4


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((20, 30), {"base_size": 30}),  # smaller than the window
        ((33, 41), {"base_size": 41}),
        ((70, 50), {"base_size": 70, "scales": (0.5, 1.0, 1.25)}),
        ((50, 80), {"base_size": 64, "flip": False}),
    ],
    ids=str,
)
def test_semseg_equals_its_plain_statement(size, options):
    _, params, batch_stats = split_model(network(CAMVID.num_classes))
    kernel = params["head"]["classifier"]["kernel"]
    params["head"]["classifier"]["kernel"] = 40 * kernel  # a network that is sure of itself
    segmenter = Segmenter(DESCRIPTION, params, batch_stats, provenance=Provenance("", 0, ""))
    image, options = example(*size).image, {"crop_size": (33, 41), **options}
    found = np.asarray(segmenter.probabilities(image, protocol="semseg", **options))
    expected = semseg_protocol.probabilities(
        lambda images: np.asarray(segmenter.logits(images.astype(np.float32)), np.float64),
        image,
        **options,
    )
    assert len(np.unique(expected.argmax(-1))) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    protocol = segmenter.choose_protocol("semseg", **options)
    labels = segmenter.class_maps(image[None], protocol=protocol, windows_per_pass=3)[0]
    assert (labels == expected.argmax(-1)).mean() >= 0.9999


def test_windows_compile_the_network_once_for_all_sizes(segmenter):
    protocol = segmenter.choose_protocol("semseg", crop_size=(33, 41), base_size=64)
    segmenter.class_maps(example(50, 80).image[None], protocol=protocol)
    before = _window_probabilities._cache_size()
    for size in ((80, 50), (33, 41), (10, 99)):
        maps = segmenter.class_maps(example(*size).image[None], protocol=protocol)
        assert maps.shape == (1, *size)
    assert _window_probabilities._cache_size() == before


def test_options_of_the_checkpoints_own_protocol_are_kept(segmenter):
    semseg = segmenter.choose_protocol("semseg", scales=(0.5, 1.0), crop_size=(65, 65))
    description = dataclasses.replace(DESCRIPTION, protocol=semseg)
    _, params, batch_stats = split_model(network(CAMVID.num_classes))
    own = Segmenter(description, params, batch_stats, provenance=Provenance("", 0, ""))
    assert own.choose_protocol() == own.choose_protocol("semseg") == semseg
    assert own.choose_protocol("semseg", flip=False) == dataclasses.replace(semseg, flip=False)
    assert own.choose_protocol("whole") == choose("whole", CAMVID)


def test_a_batch_over_eight_devices_equals_image_by_image(segmenter):
    images = np.stack([example(33, 41, seed=i).image for i in range(8)])
    together = np.asarray(segmenter.logits(images))
    assert np.abs(together[0] - together[5]).max() > 0.01
    for i in (0, 5):
        alone = segmenter.logits(images[i : i + 1])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-4)


def test_two_segmenters_share_their_compilations(segmenter):
    image = example(33, 41).image
    segmenter.class_map(image)
    _, params, batch_stats = split_model(network(CAMVID.num_classes, seed=3))
    other = Segmenter(DESCRIPTION, params, batch_stats, provenance=Provenance("memory", 1, ""))
    before = _class_maps._cache_size()
    other.class_map(image)
    assert _class_maps._cache_size() == before


@pytest.mark.parametrize(
    "image",
    [np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3), np.int32), np.zeros((9, 9, 1), np.uint8)],
)
def test_what_is_no_rgb_image_is_refused(segmenter, image):
    with pytest.raises(ValueError, match="they must be RGB"):
        segmenter._place(image[None])


@pytest.mark.parametrize(
    "image", [example(9, 9).image.astype(np.float32), example(9, 9).image[None], np.zeros((9, 9))]
)
def test_protocols_with_windows_need_photographs(image):
    with pytest.raises(ValueError, match="protocol 'semseg' resizes images, it needs uint8"):
        _check_raw(image, PROTOCOLS["semseg"])
    _check_raw(image, PROTOCOLS["whole"])
    _check_raw(example(9, 9).image, PROTOCOLS["semseg"])


def test_unknown_protocol(segmenter):
    with pytest.raises(ValueError, match="protocol='hole' is not one of whole, semseg"):
        segmenter.probabilities(example().image, protocol="hole")


def test_load_takes_the_best_and_knows_everything(saved):
    best, latest = load(saved), load(saved, step="latest")
    assert (best.provenance.step, latest.provenance.step) == (10, 20)
    assert best.label_set == CAMVID
    assert best.description == DESCRIPTION
    image = example(33, 41).image
    _, params, batch_stats = split_model(network(CAMVID.num_classes, seed=10))
    fresh = Segmenter(DESCRIPTION, params, batch_stats, provenance=Provenance("", 0, ""))
    np.testing.assert_array_equal(best.logits(image[None]), fresh.logits(image[None]))
    assert len(best.provenance.digest) == 64


def test_load_names_the_steps_there_are(saved, tmp_path):
    assert load(saved, step=20).provenance.step == 20
    with pytest.raises(FileNotFoundError, match=r"step=15 is not in .* there are 10, 20, 'best'"):
        load(saved, step=15)
    with pytest.raises(
        FileNotFoundError, match="holds no checkpoint; a run is loaded by its folder"
    ):
        load(tmp_path)


def test_description_round_trip():
    assert Description.from_json(DESCRIPTION.to_json()) == DESCRIPTION
