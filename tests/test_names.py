"""Tables of names: one row for every key, both directions."""

import numpy as np
import pytest

from pspnet_jax.weights import tables
from pspnet_jax.weights.names import (
    MisfitError,
    Row,
    Table,
    printable,
    publish,
    rename,
    without_prefix,
)
from pspnet_jax.weights.tables import BACKBONE

BUDGET_SECONDS = 20

SEMSEG = tables.of_network("semseg", (1, 2, 3, 6), stem="deep")
LEXTAL = tables.of_network("lextal", (1, 2, 3, 6), stem="7x7")


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
        (LEXTAL, "feats.conv1.weight", "backbone.stem.conv1.kernel"),
        (LEXTAL, "feats.layer4.0.downsample.1.bias", "backbone.layer4_0.shortcut.norm.bias"),
        (LEXTAL, "psp.stages.3.1.weight", "pyramid.level6.conv.kernel"),
        (LEXTAL, "psp.bottleneck.bias", "head.fuse.bias"),
        (LEXTAL, "up_2.conv.0.bias", "head.up2.conv.bias"),
        (LEXTAL, "up_3.conv.1.running_mean", "head.up3.norm.mean"),
        (LEXTAL, "up_1.conv.2.weight", "head.up1.activation.slope"),
        (LEXTAL, "final.0.weight", "head.classifier.kernel"),
        (LEXTAL, "classifier.0.weight", "presence_head.hidden.kernel"),
        (LEXTAL, "classifier.2.bias", "presence_head.classifier.bias"),
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
    [
        *("layer0.2.weight", "layer3.x.conv1.weight", "cls.5.weight", "conv1.weight", "weight"),
        *("aux.4", "layer1.00.conv1.weight", "layer1.\u0660.conv1.weight"),
        f"layer{'9' * 5000}.0.conv1.weight",
    ],
    ids=lambda key: key[:30],
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
        "cls.0.weight": kernel(5, 4, 3, 2),
        "cls.1.weight": kernel(5),
        "cls.1.num_batches_tracked": np.array(7),
    }
    weights = rename(source, SEMSEG)
    assert set(weights.arrays) == {"head.conv.kernel", "head.norm.scale"}
    found = weights.arrays["head.conv.kernel"]
    assert found.shape == (3, 2, 4, 5)
    assert found[2, 1, 3, 4] == source["cls.0.weight"][4, 3, 2, 1]
    assert weights.keys["head.norm.scale"] == "cls.1.weight"
    assert weights.counters == {"cls.1.num_batches_tracked": "head.norm.mean"}


def test_a_counter_without_a_norm_is_not_known():
    weights = rename({"cls.4.num_batches_tracked": np.array(7)}, SEMSEG)
    assert weights.unknown == ("cls.4.num_batches_tracked",)


def test_prefixes_are_dropped_where_every_key_has_them():
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        assert set(without_prefix({f"{prefix}cls.4.bias": kernel(3)})) == {"cls.4.bias"}
    mixed = {"module.cls.4.bias": kernel(3), "cls.1.bias": kernel(3)}
    with pytest.raises(MisfitError, match=r"1 keys begin with 'module.', 1 do not: cls\.1\.bias"):
        without_prefix(mixed)


def test_keys_of_anybodys_files_are_printed_safely():
    assert printable("cls.4.bias") == "cls.4.bias"
    assert printable("\x1b[31mred") == r"'\x1b[31mred'"
    assert len(printable("x" * 100_000)) < 100


def test_matrices_are_transposed():
    weights = rename({"classifier.0.weight": kernel(5, 3)}, LEXTAL)
    np.testing.assert_array_equal(weights.arrays["presence_head.hidden.kernel"], kernel(5, 3).T)
    published = publish(weights.arrays, LEXTAL, steps=0)
    np.testing.assert_array_equal(published["classifier.0.weight"], kernel(5, 3))


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
