"""Tables of names: one row for every key, both directions, and all that does not fit by name."""

import numpy as np
import pytest

from pspnet_jax.weights import names
from pspnet_jax.weights.names import BACKBONE, MisfitError, Row, Table, fit, publish, rename

BUDGET_SECONDS = 20

SEMSEG = names.TABLES["semseg"]((1, 2, 3, 6))


@pytest.mark.parametrize(
    ("table", "key", "path"),
    [
        (SEMSEG, "layer0.0.weight", "backbone.stem.conv1.kernel"),
        (SEMSEG, "layer0.7.running_var", "backbone.stem.norm3.variance"),
        (SEMSEG, "layer3.22.conv2.weight", "backbone.layer3_22.conv2.kernel"),
        (SEMSEG, "layer1.0.bn3.weight", "backbone.layer1_0.norm3.scale"),
        (SEMSEG, "layer4.0.downsample.0.weight", "backbone.layer4_0.shortcut.conv.kernel"),
        (SEMSEG, "layer4.0.downsample.1.running_mean", "backbone.layer4_0.shortcut.norm.mean"),
        (SEMSEG, "ppm.features.3.1.weight", "pyramid.level6.conv.kernel"),
        (SEMSEG, "ppm.features.0.2.bias", "pyramid.level1.norm.bias"),
        (SEMSEG, "cls.4.bias", "head.classifier.bias"),
        (SEMSEG, "aux.0.weight", "aux_head.conv.kernel"),
        (BACKBONE, "conv1.weight", "backbone.stem.conv1.kernel"),
        (BACKBONE, "bn3.weight", "backbone.stem.norm3.scale"),
        (BACKBONE, "layer2.1.bn1.bias", "backbone.layer2_1.norm1.bias"),
    ],
)
def test_names_in_both_directions(table, key, path):
    assert table.to_ours(key)[0] == path
    assert table.to_theirs(path)[0] == key


@pytest.mark.parametrize(
    "key",
    ["layer0.2.weight", "layer3.x.conv1.weight", "cls.5.weight", "conv1.weight", "weight", "aux.4"],
)
def test_foreign_keys_belong_to_no_row(key):
    assert SEMSEG.to_ours(key) is None


def test_a_key_of_two_rows_is_an_error():
    table = Table("twice", (Row("a{n}", "x{n}", "conv"), Row("a1", "y", "conv")))
    with pytest.raises(MisfitError, match=r"a1\.weight belongs to 2 rows"):
        table.to_ours("a1.weight")
    table = Table("twice", (Row("a", "x", "conv"), Row("b", "x", "conv")))
    with pytest.raises(MisfitError, match=r"x\.kernel has 2 names"):
        table.to_theirs("x.kernel")


def kernel(*shape):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def test_kernels_change_their_axes_and_counters_are_dropped():
    source = {
        "module.cls.0.weight": kernel(5, 4, 3, 2),
        "module.cls.1.weight": kernel(5),
        "module.cls.1.num_batches_tracked": np.array(7),
    }
    weights = rename(source, SEMSEG)
    assert set(weights.arrays) == {"head.conv.kernel", "head.norm.scale"}
    found = weights.arrays["head.conv.kernel"]
    assert found.shape == (3, 2, 4, 5)
    assert found[2, 1, 3, 4] == source["module.cls.0.weight"][4, 3, 2, 1]
    assert weights.keys["head.norm.scale"] == "cls.1.weight"


def test_a_prefix_is_dropped_only_where_every_key_has_it():
    mixed = {"module.cls.4.bias": kernel(3), "cls.1.bias": kernel(3)}
    assert rename(mixed, SEMSEG).unknown == ("module.cls.4.bias",)


def test_publish_is_rename_backwards():
    source = {
        "cls.0.weight": kernel(5, 4, 3, 3),
        "cls.1.weight": kernel(5),
        "cls.1.running_mean": kernel(5),
        "cls.4.weight": kernel(2, 5, 1, 1),
    }
    published = publish(rename(source, SEMSEG).arrays, SEMSEG, steps=9)
    assert published.pop("cls.1.num_batches_tracked") == 9
    assert set(published) == set(source)
    for key, array in source.items():
        np.testing.assert_array_equal(published[key], array)


def test_the_classifier_of_imagenet_is_left_out_and_named():
    weights = rename({"fc.weight": kernel(9, 3), "bn1.bias": kernel(3)}, BACKBONE)
    assert weights.left_out == ("fc.weight",)
    assert weights.is_backbone
    assert not rename({"cls.4.bias": kernel(3)}, SEMSEG).is_backbone


WANTED = {"head.conv.kernel": (3, 3, 4, 5), "head.norm.scale": (5,), "head.classifier.bias": (2,)}
FITTING = {
    "cls.0.weight": kernel(5, 4, 3, 3),
    "cls.1.weight": kernel(5),
    "cls.4.bias": kernel(2),
}


def fitted(source, **options):
    return fit(rename(source, SEMSEG), WANTED, where="file.pth", **options)


def test_everything_fits():
    found = fitted({key: array.astype(np.float16) for key, array in FITTING.items()})
    assert set(found.loaded) == set(WANTED)
    assert {array.dtype for array in found.loaded.values()} == {np.dtype("float32")}
    assert (found.reinitialized, found.left_out) == ((), ())


def without(key):
    return {k: v for k, v in FITTING.items() if k != key}


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (without("cls.1.weight"), ["file.pth does not fit", "cls.1.weight is missing"]),
        (FITTING | {"cls.9.weight": kernel(5)}, ["cls.9.weight is not known", "another depth"]),
        (
            without("cls.1.weight") | {"cls.1.weigth": kernel(5)},
            ["cls.1.weight is missing", "'cls.1.weigth' in the file is 'cls.1.weight'"],
        ),
        (
            FITTING | {"cls.0.weight": kernel(4, 5, 3, 3)},
            [r"cls.0.weight is \[3, 3, 5, 4\], the network has \[3, 3, 4, 5\]", "is transposed"],
        ),
        (FITTING | {"aux.1.bias": kernel(5)}, ["aux.1.bias is not known"]),
        (FITTING | {"cls.4.bias": np.array([1, np.nan])}, ["cls.4.bias holds values that are not"]),
        ({"x": kernel(1), "fc.weight": kernel(1)}, ["cls.0.weight is missing", "a backbone"]),
    ],
)
def test_whatever_does_not_fit_is_named_with_its_cause(source, messages):
    for message in messages:
        with pytest.raises(MisfitError, match=message):
            fitted(source)


def test_all_offenders_are_listed_at_once():
    source = {"cls.0.weight": kernel(5, 4, 1, 1), "cls.5.bias": kernel(2), "cls.1.bias": kernel(5)}
    with pytest.raises(MisfitError) as error:
        fitted(source)
    for part in ("cls.0.weight is [1,", "cls.1.weight is missing", "cls.4.bias is missing"):
        assert part in str(error.value)
    for part in ("cls.5.bias is not known", "cls.1.bias is not known"):
        assert part in str(error.value)


def test_only_what_a_pattern_excuses_may_be_missing_or_differ():
    source = without("cls.1.weight") | {"cls.4.bias": kernel(7)}
    options = {"may_be_missing": r"head\.norm\..*", "may_differ": names.CLASSIFIER}
    found = fitted(source, **options)
    assert found.reinitialized == ("head.norm.scale", "head.classifier.bias")
    assert found.left_out == ("cls.4.bias",)
    with pytest.raises(MisfitError, match=r"cls\.4\.bias is"):
        fitted(source, may_be_missing=options["may_be_missing"])
    with pytest.raises(MisfitError, match=r"cls\.1\.weight is missing"):
        fitted(source, may_differ=options["may_differ"])
