"""A network ready to use: any size of image, saved and loaded again."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import numpy as np
import plain_protocols
import pytest
import semseg_protocol

from pspnet_jax import load, parallel, passes
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.models.families import IMAGENET_8BIT
from pspnet_jax.models.marks import Prepared
from pspnet_jax.protocols import choose
from pspnet_jax.segmenter import Provenance
from pspnet_jax.stored_model import Description, model_part
from pspnet_jax.train_step import split_model

import networks
from compiling import compilations
from pictures import example

BUDGET_SECONDS = 180

CAMVID = load_label_set("camvid")
DESCRIPTION = networks.description()


@pytest.fixture(scope="module")
def segmenter():
    return networks.segmenter()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    folder = CheckpointFolder(path / "checkpoints")
    for step, score in ((10, 0.5), (20, 0.3)):
        _, params, batch_stats = split_model(networks.network(CAMVID.num_classes, seed=step))
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


def test_it_says_what_it_is(segmenter):
    text = repr(segmenter)
    assert "semseg resnet" in text
    assert f"protocol {segmenter.protocol.name}" in text


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


@pytest.fixture(scope="module")
def confident():
    """Takes any size, and is sure of itself."""
    return networks.segmenter(sureness=40)


# All other sizes and options of windows are in test_stream, without a network.
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((20, 30), {"base_size": 30}),  # smaller than the window
        ((50, 80), {"base_size": 64, "scales": (0.5, 1.25)}),
    ],
    ids=str,
)
def test_semseg_equals_its_plain_statement(confident, size, options):
    image, options = example(*size).image, {"crop_size": (33, 41), **options}
    found = np.asarray(confident.probabilities(image, protocol="semseg", **options))
    expected = semseg_protocol.probabilities(logits_of(confident), image, **options)
    assert len(np.unique(expected.argmax(-1))) > 1
    np.testing.assert_allclose(found, expected, atol=1e-4)
    protocol = confident.choose_protocol("semseg", **options)
    (prediction,) = confident.predict([image], protocol=protocol, batch_size=3)
    assert (prediction.class_map == expected.argmax(-1)).mean() >= 0.9999


def logits_of(segmenter):
    return lambda images: np.asarray(segmenter.logits(np.float32(images)), np.float64)


def head_of(segmenter):
    """Logits at the network's own resolution."""
    return lambda images: np.asarray(
        passes.head_scores(
            segmenter._weights,
            np.float32(images * plain_protocols.STD + plain_protocols.MEAN),
            np.array(images.shape[1:3], np.int32),
            network=segmenter.description.network(),
        ),
        np.float64,
    )


@pytest.mark.parametrize("flip", [False, True])
def test_mmseg_whole_equals_its_plain_statement(confident, flip):
    image = example(50, 80).image
    chosen = {"base_size": 41, "max_size": 70, "scales": (0.5, 1.0), "flip": flip}
    found = np.asarray(confident.probabilities(image, protocol="mmseg-whole", **chosen))
    expected = plain_protocols.mmseg(logits_of(confident), image, align_corners=True, **chosen)
    assert len(np.unique(expected.argmax(-1))) > 1
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_mmseg_slide_equals_its_plain_statement(confident):
    image = example(50, 80).image
    chosen = {"base_size": 50, "max_size": 70, "flip": True, "crop_size": (33, 41)}
    found = np.asarray(confident.probabilities(image, protocol="mmseg-slide", **chosen))
    expected = plain_protocols.mmseg(
        logits_of(confident), image, align_corners=True, stride=(22, 27), **chosen
    )
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_csail_equals_its_plain_statement():
    """A network that takes sides of multiples of 8 as they are; its decoder resizes by half pixels."""
    segmenter = networks.segmenter(family="lextal", backbone="resnet18", align_corners=False)
    image = example(50, 80).image
    chosen = {"base_size": 45, "max_size": 100, "scales": (2 / 3, 4 / 3)}
    found = np.asarray(segmenter.probabilities(image, protocol="csail", **chosen))
    expected = plain_protocols.csail(head_of(segmenter), image, **chosen)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.ptp(expected) > 0.01


@pytest.mark.parametrize("name", ["whole", "csail"])
def test_images_of_equal_size_share_a_pass_and_come_back_in_order(segmenter, name, monkeypatch):
    sizes = [(40, 50)] * 3 + [(33, 41)] + [(40, 50)] * 2
    images = [example(*size, seed=i).image for i, size in enumerate(sizes)]
    chosen = segmenter.choose_protocol(name)
    if name == "csail":
        chosen = segmenter.choose_protocol(name, base_size=32, max_size=60, scales=(1.0,))
    passes, through = [], segmenter._score
    monkeypatch.setattr(segmenter, "_score", lambda x: passes.append(x.shape[:3]) or through(x))
    together = list(segmenter.predict(images, protocol=chosen, batch_size=2))
    # Three runs of equal sizes, each filled up to one image on each of eight devices.
    assert [each[0] for each in passes] == [8] * (6 if name == "whole" else 3)
    assert [each.class_map.shape for each in together] == sizes
    for image, found in zip(images[2:5], together[2:5], strict=True):
        (alone,) = segmenter.predict([image], protocol=chosen)
        assert (alone.class_map == found.class_map).mean() > 0.999


def test_windows_compile_the_network_once_for_all_sizes(segmenter):
    protocol = segmenter.choose_protocol("semseg", crop_size=(33, 41), base_size=64)
    predict = functools.partial(segmenter.predict, protocol=protocol, batch_size=2)
    list(predict([example(50, 80).image]))
    with compilations() as compiled:
        sizes = [(80, 50), (33, 41), (10, 99), (200, 130)]
        found = list(predict(example(*size).image for size in sizes))
    assert [each.class_map.shape for each in found] == sizes
    assert compiled == []


def test_options_of_the_checkpoints_own_protocol_are_kept(segmenter):
    semseg = segmenter.choose_protocol("semseg", scales=(0.5, 1.0), crop_size=(65, 65))
    own = networks.segmenter(protocol=semseg)
    assert own.choose_protocol() == own.choose_protocol("semseg") == semseg
    assert own.choose_protocol("semseg", flip=False) == dataclasses.replace(semseg, flip=False)
    assert own.choose_protocol("whole") == choose("whole", CAMVID)


def test_every_way_to_name_a_protocol(segmenter):
    image = example(33, 41).image
    options = {"crop_size": (33, 41), "base_size": 64}
    chosen = segmenter.choose_protocol("semseg", **options)
    expected = segmenter.probabilities(image, protocol="semseg", **options)
    np.testing.assert_array_equal(segmenter.probabilities(image, protocol=chosen), expected)
    by_name = segmenter.class_map(image, protocol="semseg", **options)
    np.testing.assert_array_equal(by_name, np.asarray(expected).argmax(-1))
    np.testing.assert_array_equal(segmenter.class_map(image, protocol=chosen), by_name)
    (found,) = segmenter.predict([image], protocol="whole")
    np.testing.assert_array_equal(found.class_map, segmenter.class_map(image))
    assert segmenter.choose_protocol(chosen, flip=False) == dataclasses.replace(chosen, flip=False)
    with pytest.raises(ValueError, match=r"scale: no such option; there are flip, .*, scales"):
        segmenter.choose_protocol("semseg", scale=(1,))


def test_a_batch_over_eight_devices_equals_image_by_image(segmenter):
    images = np.stack([example(33, 41, seed=i).image for i in range(8)])
    together = np.asarray(segmenter.logits(images))
    assert np.abs(together[0] - together[5]).max() > 0.01
    for i in (0, 5):
        alone = segmenter.logits(images[i : i + 1])[0]
        np.testing.assert_allclose(together[i], alone, atol=1e-4)


def test_two_segmenters_share_their_compilations(segmenter):
    image = example(33, 41).image
    semseg = segmenter.choose_protocol("semseg", crop_size=(33, 41), base_size=64)
    other = networks.segmenter(seed=3, provenance=Provenance("memory", 1, ""))
    counted = (passes.head_scores, passes.add_windows, passes.make_tile)
    counts = []
    for each in (segmenter, other):
        for protocol in (None, semseg):
            list(each.predict([image], protocol=protocol))
        counts.append([function._cache_size() for function in counted])
    assert counts[0] == counts[1]


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
def test_predictions_need_photographs(segmenter, image):
    with pytest.raises(ValueError, match=r"it must be RGB, uint8 .height, width, 3."):
        next(segmenter.predict(iter([image])))


def test_load_takes_the_best_and_knows_everything(saved):
    best, latest = load(saved), load(saved, step="latest")
    assert (best.provenance.step, latest.provenance.step) == (10, 20)
    assert best.label_set == CAMVID
    assert best.description == DESCRIPTION
    image = example(33, 41).image
    fresh = networks.segmenter(seed=10)
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


_LARGE = """
import resource
import numpy as np
from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import default_config
from pspnet_jax.models.families import IMAGENET_8BIT, ModelOptions
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.protocols import choose
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.stored_model import Description
from pspnet_jax.train_step import split_model

ade20k = load_label_set("ade20k")
options = ModelOptions.resolve(default_config().model.to_dict())
_, params, batch_stats = split_model(PSPNet(options, 150, rng=np.random.default_rng(0)))
description = Description(options, ade20k, IMAGENET_8BIT, choose("semseg", ade20k))
segmenter = Segmenter(description, params, batch_stats, provenance=Provenance("", 0, ""))
image = np.random.default_rng(0).integers(0, 256, (4000, 6000, 3), np.uint8)
protocol = segmenter.choose_protocol(scales=(0.5, 1.0, 1.75))
(found,) = segmenter.predict([image], protocol=protocol, confidence=True)
assert found.class_map.shape == found.confidence.shape == (4000, 6000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_an_image_of_24_megapixels_and_150_classes_takes_less_than_8_gb():
    """PSPNet-50 in a process of its own: all it ever held, the network and JAX included."""
    environment = os.environ | {"XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", _LARGE], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak_kib = int(done.stdout)
    print(f"peak {peak_kib / 2**20:.2f} GiB")
    assert peak_kib * 1024 < 8e9


@pytest.mark.parametrize("ways", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_rows_are_split_over_devices(segmenter, ways):
    """A height that they do not divide: equal logits, and of every large map each device has its part only."""
    image = example(137, 90).image
    mesh = parallel.make_mesh(jax.devices()[:ways])
    plain = dataclasses.replace(segmenter._network, platform=None)
    weights = jax.device_put(segmenter._weights, parallel.replicated(mesh))
    by_rows = jax.jit(functools.partial(passes.logits_by_rows, network=plain, mesh=mesh))
    images = jax.device_put(image[None], parallel.replicated(mesh))
    compiled = by_rows.lower(weights, images).compile()
    expected = np.asarray(segmenter.logits(image[None]))
    found = np.asarray(compiled(weights, images))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    text = compiled.as_text()
    heights = [int(height) for height in re.findall(r"f32\[1,(\d+),\S+ convolution\(", text)]
    assert len(heights) > 15
    assert max(heights) == -(
        -69 // ways
    )  # 137 rows in the stem's first convolution: 69 at stride 2
    assert "collective-permute" in text


def test_class_map_by_rows(segmenter):
    image = example(59, 44).image
    expected = segmenter.class_map(image)
    assert len(np.unique(expected)) > 1
    scores = np.sort(np.asarray(segmenter.logits(image[None])), axis=-1)[0]
    is_near = scores[..., -1] - scores[..., -2] < 1e-4
    found = segmenter.class_map_by_rows(image)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(
        found[~is_near], np.argmax(segmenter.logits(image[None]), -1)[0][~is_near]
    )
    with pytest.raises(ValueError, match=r"float32\[59, 44, 3\]; it must be RGB"):
        segmenter.class_map_by_rows(image.astype(np.float32))


@pytest.fixture
def prepared(monkeypatch):
    """`segmenter` as it is on GPUs, whose forms also run here."""
    monkeypatch.setattr(parallel, "platform_of", lambda mesh: "gpu")
    made = networks.segmenter()
    assert isinstance(made._weights, Prepared)
    arrays = [x for x in jax.tree.leaves(vars(made)) if isinstance(x, jax.Array)]
    assert len(arrays) == len(jax.tree.leaves(made._weights))  # the others are not kept
    return made


@pytest.mark.parametrize("protocol", [None, networks.small_protocol()], ids=["whole", "windows"])
def test_prepared_weights_predict_the_same(segmenter, prepared, protocol):
    image = example(50, 80).image
    (expected,) = segmenter.predict([image], protocol=protocol, probabilities="float32")
    (found,) = prepared.predict([image], protocol=protocol, probabilities="float32")
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-5)


def test_prepared_weights_give_the_same_logits_whole_and_by_rows(segmenter, prepared):
    image = example(50, 80).image
    expected = np.asarray(segmenter.logits(image[None]))
    np.testing.assert_allclose(prepared.logits(image[None]), expected, atol=1e-5)
    classes = prepared.class_map_by_rows(image)
    assert (classes == expected[0].argmax(-1)).mean() > 0.999


def test_windows_are_added_in_place(segmenter, monkeypatch):
    """Of large images the canvas is most of the memory: never two of them."""
    given = []

    def add_windows(*arguments, **options):
        given.append(arguments)
        return real(*arguments, **options)

    real = passes.add_windows
    monkeypatch.setattr(passes, "add_windows", add_windows)
    list(segmenter.predict([example(50, 80).image], protocol=networks.small_protocol()))
    for weights, canvas, *rest in given:
        assert canvas.is_deleted()
        assert not any(x.is_deleted() for x in (*jax.tree.leaves(weights), *rest))
    assert given


def test_a_stored_network_in_half_precision():
    image = example(50, 80).image
    full, half = (load("scenes", dtype=dtype) for dtype in (None, "bfloat16"))
    assert (full.description.model.dtype, half.description.model.dtype) == ("float32", "bfloat16")
    expected, found = (np.asarray(each.logits(image[None])) for each in (full, half))
    assert found.dtype == np.float32
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert 1e-4 < difference < 0.05
    with pytest.raises(ValueError, match="dtype='float16' is not"):
        load("scenes", dtype="float16")
