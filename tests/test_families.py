"""The families table: complete rows, what each builds, how each starts, and the README's picture of it."""

import dataclasses
from pathlib import Path

import families_table
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax import protocols
from pspnet_jax.models.families import FAMILIES, INITIALIZERS, ModelOptions, check_size
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.weights import tables

from networks import network, options

BUDGET_SECONDS = 60

ROOT = Path(__file__).parent.parent

OF_EVERYBODY = {"family", "backbone", "width", "dtype", "remat", "frozen_norm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_complete_and_have_tables_and_protocols(family):
    row = FAMILIES[family]
    assert set(row.options) | OF_EVERYBODY == {f.name for f in dataclasses.fields(ModelOptions)}
    for more in row.by_backbone.values():
        assert set(more) < set(row.options)
    assert row.protocol in protocols.PROTOCOLS
    assert row.options["initializer"] in INITIALIZERS
    assert family in families_table.PROJECTS
    assert tables.of_network(family, (1, 2), stem="deep").source


def test_readme_holds_the_table():
    assert families_table.table() in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "backbone", "expected"),
    [
        ("caffe", "resnet50", {"bottleneck_stride": "1x1", "dropout_kind": "element"}),
        ("caffe", "resnet101", {"bottleneck_stride": "3x3", "norm_momentum": 0.05}),
        ("mmseg", "resnet18", {"head_width": 2, "aux_width": 1, "stem": "v1c"}),
        ("mmseg", "resnet50", {"head_width": 8, "aux_width": 4, "align_corners": False}),
        ("csail", "resnet18", {"aux_width": 2, "pyramid_width": 8}),
        ("csail", "resnet101", {"aux_width": 8, "first_block_dilation": (1, 2)}),
        ("smp", "resnet34", {"num_stages": 2, "head_kernels": (1, 3), "aux_heads": ()}),
    ],
)
def test_a_row_depends_on_the_backbone_and_can_be_overridden(family, backbone, expected):
    found = options(family=family, backbone=backbone)
    for name, value in expected.items():
        assert getattr(found, name) == value, name
    assert options(family=family, backbone=backbone, head_width=3).head_width == 3


def rates(block) -> list[tuple[int, int]]:
    return [(conv.stride, conv.dilation) for conv in (block.conv1, block.conv2)]


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("both", (1, 1), (2, 2)), ("first", (1, 1), (2, 1)), ("stage", (1, 2), (2, 2))],
)
def test_dilation_of_basic_blocks(kind, first, second):
    backbone = network(
        backbone="resnet18", first_block_dilation=(1, 2), basic_block_dilation=kind
    ).backbone
    assert tuple(d for _, d in rates(backbone.layer3_0)) == first
    assert tuple(d for _, d in rates(backbone.layer3_1)) == second


def test_a_section_without_widths_has_those_of_its_head():
    """As configs and checkpoints from before `head_width` have them."""
    for family, head, width in (
        ("semseg", "progressive", 16),
        ("semseg", "fused", 8),
        ("lextal", "progressive", 16),
    ):
        assert options(family=family, head=head, head_width=None).head_width == width
    with pytest.raises(ValueError, match=r"8 hidden channels .* must be a multiple of 16"):
        network(width=1, head="progressive", head_width=8)


def test_first_blocks_halve_with_the_dilation_of_their_stage():
    """At stride 16 stage 3 has its stride and stage 4 dilates by two."""
    for pair, first in (((2, 4), 2), ((1, 2), 1), ((1, 1), 1)):
        backbone = network(
            backbone="resnet50", output_stride=16, first_block_dilation=pair
        ).backbone
        assert rates(backbone.layer4_0)[1] == (1, first)
        assert rates(backbone.layer4_1)[1] == (1, 2)


def test_strides_in_the_1x1():
    backbone = network(backbone="resnet50", bottleneck_stride="1x1").backbone
    assert rates(backbone.layer2_0) == [(2, 1), (1, 1)]
    assert rates(backbone.layer4_0) == [(1, 1), (1, 4)]


def test_dilation_that_stays_at_any_stride():
    """mmsegmentation's D32: strides of 2 and dilations of 2 and 4 in the same stages."""
    backbone = network(family="mmseg", backbone="resnet50", output_stride=32).backbone
    assert [rates(getattr(backbone, f"layer{s}_{i}"))[1] for s in (3, 4) for i in (0, 1)] == [
        (2, 1),
        (1, 2),
        (2, 2),
        (1, 4),
    ]


@pytest.mark.parametrize(("num_stages", "stride"), [(2, 8), (3, 16)])
def test_a_network_that_is_cut_off(num_stages, stride):
    model = network(family="smp", backbone="resnet50", num_stages=num_stages, output_stride=stride)
    assert not hasattr(model.backbone, f"layer{num_stages + 1}_0")
    channels = 8 * 4 * 2 ** (num_stages - 1)
    assert model.pyramid.level2.conv.kernel.shape == (1, 1, channels, channels // 4)
    assert model.head.conv.kernel.shape == (1, 1, 2 * channels, 64)
    logits = jax.eval_shape(lambda x: model(x), jnp.zeros((1, 64, 96, 3))).logits
    assert logits.shape == (1, 64 // stride, 96 // stride, 5)


@pytest.mark.parametrize("stem", ["deep", "v1c", "7x7"])
def test_stems(stem):
    channels = {"deep": [8, 8, 16], "v1c": [4, 4, 8], "7x7": [8]}[stem]
    found = network(stem=stem).backbone.stem
    convs = [getattr(found, f"conv{n}") for n in range(1, len(channels) + 1)]
    assert [conv.kernel.shape[-1] for conv in convs] == channels
    assert not hasattr(found, f"conv{len(channels) + 1}")


def test_the_level_of_one_bin_can_have_a_bias_instead_of_a_norm():
    pyramid = network(pyramid_bin1_norm=False).pyramid
    assert pyramid.level1.norm is None
    assert pyramid.level1.conv.bias is not None
    assert (pyramid.level2.norm is None, pyramid.level2.conv.bias) == (False, None)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 6, 64)), jnp.float32)
    level = np.asarray(pyramid(x, train=False).levels[0])
    assert level.min() == 0 < level.max()  # with a ReLU


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bottleneck_stride": "5x5"}, "bottleneck_stride='5x5' is not one of 3x3, 1x1"),
        ({"basic_block_dilation": "all"}, "basic_block_dilation='all' is not one of both, first"),
        ({"dropout_kind": "image"}, "dropout_kind='image' is not one of channel, element"),
        ({"head_kernels": (2, 1)}, r"head_kernels=\(2, 1\) must be two odd sizes"),
        ({"num_stages": 5}, "num_stages=5 must be 2, 3 or 4"),
        ({"head_width": 0}, "head_width=0 and aux_width=4 must be at least 1"),
        ({"norm_momentum": 7.0}, r"norm_momentum=7.0 must be within 0..1"),
        ({"initializer": "ones"}, "initializer='ones' is not one of semseg, caffe, mmseg"),
    ],
)
def test_impossible_options_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        options(**overrides)


def test_half_of_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"width=9 must be even with model\.stem='v1c'"):
        network(width=9, stem="v1c")


@pytest.mark.parametrize(
    ("family", "sizes"), [("mmseg", (5, 64, 97)), ("csail", (8, 64)), ("caffe", (9, 473))]
)
def test_rules_of_sizes(family, sizes):
    rule = options(family=family).size_rule
    for size in sizes:
        check_size((size, size), rule)
        assert rule.padded(size) == size
    if family != "mmseg":
        with pytest.raises(ValueError, match="a side of 61 pixels"):
            check_size((61, 64 if family == "csail" else 65), rule)


# Standard deviation of a kernel [k, k, in, out], and of its family of distributions the kurtosis.
NORMAL, UNIFORM = 3.0, 1.8
DISTRIBUTIONS = {
    "caffe": (("fan_in", NORMAL), ("fan_in", NORMAL), ("fan_in", NORMAL)),
    "mmseg": (("fan_out", NORMAL), ("fan_out", NORMAL), (0.01, NORMAL)),
    "smp": (("fan_out", NORMAL), ("fan_in", UNIFORM), ("both", UNIFORM)),
    "csail": (("fan_out", NORMAL), ("fan_in", NORMAL), ("fan_in", NORMAL)),
}


@pytest.mark.parametrize("family", DISTRIBUTIONS)
def test_moments_of_initialization(family):
    """Each part's kernels have the standard deviation and the shape of their distribution; semseg's: test_models."""
    model = PSPNet(
        options(family=family, backbone="resnet10", width=32), 40, rng=np.random.default_rng(0)
    )
    for part, (fan, kurtosis) in zip(
        (model.backbone.layer2_0.conv1, model.head.conv, model.head.classifier),
        DISTRIBUTIONS[family],
        strict=True,
    ):
        kernel = np.asarray(part.kernel[...], np.float64)
        area, inputs, outputs = kernel.shape[0] ** 2, *kernel.shape[2:]
        fans = {"fan_in": inputs, "fan_out": outputs, "both": (inputs + outputs) / 2}
        std = fan if isinstance(fan, float) else (2 / (area * fans[fan])) ** 0.5
        if fan == "both":
            std = (1 / (area * fans[fan])) ** 0.5
        error = std / kernel.size**0.5
        assert abs(kernel.mean()) < 5 * error
        assert abs(kernel.std() / std - 1) < 5 * (kurtosis - 1) ** 0.5 / 2 / kernel.size**0.5
        assert abs((kernel**4).mean() / kernel.var() ** 2 - kurtosis) < 0.35
    bias = np.asarray(model.head.classifier.bias[...])
    assert (bias != 0).any() == (family == "csail")  # PyTorch's own there


def test_momentum_and_dropout_reach_every_layer():
    model = nnx.eval_shape(lambda: PSPNet(options(family="caffe"), 5, rng=NoRandomNumbers()))
    found = {
        (type(node).__name__, getattr(node, "momentum", None), getattr(node, "kind", None))
        for _, node in nnx.iter_graph(model)
        if type(node).__name__ in ("BatchNorm", "Dropout")
    }
    assert found == {("BatchNorm", 0.05, None), ("Dropout", None, "element")}
