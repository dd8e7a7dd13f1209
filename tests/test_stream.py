"""Streams of images through windows, beside plain statements of what the published scripts do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain_protocols
import pytest
import semseg_protocol

from pspnet_jax import canvas as canvas_module
from pspnet_jax import stream, windows
from pspnet_jax.canvas import Wanted
from pspnet_jax.taps import resize_matlab

from networks import small_protocol
from pictures import example

BUDGET_SECONDS = 120

MEAN = tuple(semseg_protocol.MEAN)


def lopsided(images, *, xp=jnp):
    """Logits that depend on the color, the place in the window and the window as a whole."""
    rows = xp.arange(images.shape[1]).reshape(1, -1, 1, 1) / images.shape[1]
    columns = xp.arange(images.shape[2]).reshape(1, 1, -1, 1) / images.shape[2]
    place = 3 * rows + columns * images[..., :1] + images.mean(axis=(1, 2, 3), keepdims=True)
    return xp.concatenate([place, images[..., 1:], -images[..., :1] * place], axis=-1)


PLAIN = functools.partial(lopsided, xp=np)


@functools.partial(jax.jit, static_argnames=("averages", "flip"))
def add(canvas, crops, places, counts, averages, flip):
    mean, std = (
        jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3)
        for x in (semseg_protocol.MEAN, semseg_protocol.STD)
    )
    scores = canvas_module.window_scores(
        lopsided, (crops - mean) / std, averages=averages, flip=flip
    )
    lanes = jnp.split(scores, len(canvas)), jnp.split(places, len(canvas))
    added = [canvas_module.add_windows(*lane) for lane in zip(canvas, *lanes, counts, strict=True)]
    return jnp.stack(added)


@functools.partial(jax.jit, static_argnames=("of_logits", "wanted"))
def make_tile(canvas, rows, columns, of_logits, wanted):
    tiles = [
        canvas_module.make_tile(
            canvas[i],
            jax.tree.map(lambda x: x[i], rows),  # noqa: B023
            jax.tree.map(lambda x: x[i], columns),  # noqa: B023
            of_logits=of_logits,
            wanted=wanted,
        )
        for i in range(len(canvas))
    ]
    return jax.tree.map(lambda *each: jnp.stack(each), *tiles)


def slider(protocol, *, batch_size=1, lanes=1, canvas=None, wanted=None):
    """A slider whose canvas holds nonsense at first."""
    rules = protocol.rules
    shape = (lanes, *(canvas or windows.canvas_size(protocol, batch_size, 10**8)), 4)
    return stream.Slider(
        protocol,
        rule="half_pixel" if rules.resizes_result == "network" else rules.resizes_result,
        fill=MEAN,
        batch_size=batch_size,
        canvas=jnp.full(shape, 1e6, jnp.float32),
        add=functools.partial(add, averages=rules.averages, flip=protocol.flip),
        tile=functools.partial(
            make_tile,
            of_logits=rules.averages == "logits",
            wanted=wanted or Wanted(probabilities="float32"),
        ),
    )


def probabilities(images, protocol, **options):
    return [found.probabilities for found in slider(protocol, **options).run(images)]


def plainly(image, chosen):
    options = {name: getattr(chosen, name) for name in ("scales", "flip", "base_size", "crop_size")}
    if chosen.name == "semseg":
        return semseg_protocol.probabilities(PLAIN, image, stride=chosen.stride, **options)
    if chosen.name == "caffe":
        return plain_protocols.caffe(PLAIN, image, stride=chosen.stride, **options)
    return plain_protocols.mmseg(
        PLAIN, image, stride=chosen.stride, max_size=chosen.max_size, **options
    )


SIX = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((50, 80), {}),  # landscape: the scaled image is 40 x 64, larger than the window across
        ((80, 50), {}),  # portrait
        ((33, 41), {"base_size": 41}),  # as large as the window
        ((20, 25), {"base_size": 25}),  # smaller: padded on all sides, by odd numbers
        ((61, 47), {"base_size": 200}),  # many windows, enlarged
        ((150, 90), {"base_size": 40}),  # shrunk below the window
        ((50, 80), {"scales": SIX}),
        ((80, 50), {"scales": (0.51, 1.6), "flip": False}),
        ((70, 70), {"stride": (7, 33)}),
        ((200, 150), {"base_size": 200, "flip": False}),  # several tiles
        ((1, 90), {"base_size": 90}),
    ],
    ids=str,
)
def test_semseg_equals_its_plain_statement(size, options):
    image, chosen = example(*size).image, small_protocol(**options)
    (found,) = probabilities([image], chosen, batch_size=3)
    expected = plainly(image, chosen)
    assert expected.max() - expected.min() > 0.3
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("caffe", (50, 80), {}),  # 41 x 65
        ("caffe", (80, 50), {"scales": SIX}),  # results shrink from 1.75
        ("caffe", (20, 25), {"base_size": 25}),  # one window, padded below and to the right
        ("caffe", (150, 90), {"base_size": 100, "flip": False, "stride": (30, 30)}),
        ("mmseg-slide", (50, 80), {"max_size": 90}),  # the long side decides
        ("mmseg-slide", (80, 50), {"max_size": 200, "scales": (0.3, 1.0), "flip": True}),
        ("mmseg-slide", (40, 47), {"max_size": 90, "stride": (9, 13)}),
    ],
    ids=str,
)
def test_the_others_equal_their_plain_statements(name, size, options, monkeypatch):
    # Beside its own plain statement in test_taps, up to halves that are rounded either way.
    monkeypatch.setattr(plain_protocols, "imresize_8bit", resize_matlab)
    image, chosen = example(*size).image, small_protocol(name, **options)
    (found,) = probabilities([image], chosen, batch_size=2)
    expected = plainly(image, chosen)
    assert expected.max() - expected.min() > 0.3
    np.testing.assert_allclose(found, expected, atol=1e-5)


SEVERAL = [example(*size, seed=i).image for i, size in enumerate(
    [(50, 80), (80, 50), (20, 25), (61, 47), (90, 90), (33, 41), (120, 64)]
)]  # fmt: skip


@pytest.fixture(scope="module")
def alone():
    """Of each of SEVERAL by itself, at two scales."""
    chosen = small_protocol(scales=(0.5, 1.5))
    return [found for image in SEVERAL for found in probabilities([image], chosen)]


@pytest.mark.parametrize("batch_size", [1, 2, 7])
@pytest.mark.parametrize("lanes", [1, 3])
def test_windows_of_several_images_share_passes(alone, batch_size, lanes):
    chosen = small_protocol(scales=(0.5, 1.5))
    together = probabilities(iter(SEVERAL), chosen, batch_size=batch_size, lanes=lanes)
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_passes_are_full():
    chosen = small_protocol(scales=(0.5, 1.5))
    num_windows = sum(
        len(view.rows.starts) * len(view.columns.starts)
        for image in SEVERAL
        for view in windows.views(image.shape[:2], chosen)
    )
    made = slider(chosen, batch_size=4)
    passes, through = [], made.add
    made.add = lambda *arguments: passes.append(arguments[3].sum()) or through(*arguments)
    list(made.run(SEVERAL))
    assert sum(passes) == num_windows
    assert passes[:-1] == [4] * (num_windows // 4)


def test_lanes_have_equal_shares():
    chosen = small_protocol()
    made = slider(chosen, batch_size=2, lanes=3)
    counts, through = [], made.add
    made.add = lambda *arguments: counts.append(arguments[3]) or through(*arguments)
    list(made.run(example(50, 80, seed=i).image for i in range(12)))
    shares = np.sum(counts, axis=0)
    assert shares.tolist() == [shares[0]] * 3


@pytest.mark.parametrize("canvas", [(130, 150), (230, 100), (130, 82)])
@pytest.mark.parametrize("name", ["semseg", "mmseg-slide"])
def test_a_small_canvas_changes_nothing(canvas, name):
    if name == "semseg":
        chosen = small_protocol(base_size=150, scales=(0.5, 1.0))
    else:
        chosen = small_protocol(name, base_size=90, max_size=150, flip=True)
    images = [SEVERAL[0], SEVERAL[3], SEVERAL[6]]
    found = probabilities(images, chosen, canvas=canvas, lanes=2, batch_size=3)
    plan = functools.partial(windows.plan, protocol=chosen, rule="half_pixel", canvas=canvas)
    assert max(len(plan(image.shape[:2])) for image in images) > 1
    for image, each in zip(images, found, strict=True):
        np.testing.assert_allclose(each, plainly(image, chosen), atol=1e-5)


def test_the_canvas_is_filled_around_and_around():
    """Images find room before the oldest ones as well as behind the newest."""
    chosen = small_protocol(scales=(0.5, 1.5))
    sizes = np.random.default_rng(5).integers(20, 120, (24, 2)).tolist()
    images = [example(*size, seed=i).image for i, size in enumerate(sizes)]
    made = slider(chosen, batch_size=3, lanes=2, canvas=(300, 96))
    rows = []
    through = made.add
    made.add = lambda *given: rows.append(given[2][:, 0].max()) or through(*given)
    for image, found in zip(images, made.run(images), strict=True):
        (alone,) = probabilities([image], chosen)
        np.testing.assert_allclose(found.probabilities, alone, atol=1e-6)
    assert (np.diff(rows) < 0).sum() > 3


def test_images_are_read_as_they_are_needed():
    read = []

    def images():
        for i in range(20):
            read.append(i)
            yield example(50, 80, seed=i).image

    found = slider(small_protocol(), batch_size=2).run(images())
    next(found)
    assert len(read) < 5
    assert len(list(found)) == 19


def test_mixed_sizes_share_compilations():
    """Under `semseg` all of them; MATLAB's rule has more taps the more an image was enlarged."""
    sizes = np.random.default_rng(0).integers(5, 200, (12, 2)).tolist()
    for name, num_new in (("semseg", (0, 0)), ("caffe", (0, 4))):
        made = slider(small_protocol(name, scales=(0.5, 1.75)), batch_size=2)
        list(made.run(SEVERAL[:1]))
        before = add._cache_size(), make_tile._cache_size()
        list(made.run(example(*size).image for size in sizes))
        new = (add._cache_size() - before[0], make_tile._cache_size() - before[1])
        assert new[0] == num_new[0]
        assert new[1] <= num_new[1]


def test_tiles_say_how_sure_they_are():
    image, chosen = SEVERAL[0], small_protocol()
    made = slider(chosen, wanted=Wanted(True, True, "float16"))
    (found,) = made.run([image])
    expected = plainly(image, chosen)
    assert found.class_map.dtype == np.uint8
    assert (found.class_map == expected.argmax(-1)).mean() > 0.999
    np.testing.assert_allclose(found.confidence, expected.max(-1), atol=1e-5)
    entropy = -(expected * np.log(expected)).sum(-1) / np.log(4)
    np.testing.assert_allclose(found.entropy, entropy, atol=1e-5)
    assert found.probabilities.dtype == np.float16
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-3)


def test_flip_averages_probabilities_or_adds_logits():
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 5, 3)), jnp.float32)
    upright, mirrored = lopsided(images), lopsided(images[:, :, ::-1])[:, :, ::-1]
    scores = functools.partial(canvas_module.window_scores, lopsided, images)
    softmax = jax.nn.softmax
    for averages, flip, expected in (
        ("probabilities", False, softmax(upright)),
        ("probabilities", True, (softmax(upright) + softmax(mirrored)) / 2),
        ("summed_logits", False, softmax(upright)),
        ("summed_logits", True, softmax(upright + mirrored)),
        ("logits", False, upright),
        ("logits", True, upright),
    ):
        found = scores(averages=averages, flip=flip)
        np.testing.assert_allclose(found, expected, atol=1e-6)
