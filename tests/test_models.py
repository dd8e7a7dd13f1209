"""Backbones, pyramid and PSPNet: published sizes, strides, dilations, options and their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import FAMILIES, PSPNet, is_head
from pspnet_jax.models.resnet import ResNet, stage_strides
from pspnet_jax.train_step import split_model

from networks import network, options

BUDGET_SECONDS = 90


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes_of(num_classes, **overrides) -> PSPNet:
    """A published network as shapes alone."""
    chosen = options(width=64, **overrides)
    return nnx.eval_shape(lambda: PSPNet(chosen, num_classes, rng=NoRandomNumbers()))


# backbone, classes -> trainable parameters with and without the auxiliary head (hszhao/semseg).
PUBLISHED_SIZES = [
    ("resnet50", 150, 49_180_908, 46_782_550),
    ("resnet50", 21, 49_081_578, 46_716_373),
    ("resnet50", 19, 49_080_038, 46_715_347),
    ("resnet101", 150, 68_173_036, 65_774_678),
    ("resnet101", 21, 68_073_706, 65_708_501),
    ("resnet101", 19, 68_072_166, 65_707_475),
    ("resnet152", 150, 83_816_684, 81_418_326),
    ("resnet152", 21, 83_717_354, 81_352_149),
    ("resnet152", 19, 83_715_814, 81_351_123),
]


@pytest.mark.parametrize(("backbone", "num_classes", "total", "without_aux"), PUBLISHED_SIZES)
def test_parameter_counts_of_the_authors(backbone, num_classes, total, without_aux):
    model = shapes_of(num_classes, backbone=backbone)
    assert count(nnx.state(model, nnx.Param)) == total
    assert total - count(nnx.state(model.aux_head, nnx.Param)) == without_aux


@pytest.mark.parametrize(
    ("backbone", "plain", "deep"),
    [
        ("resnet18", 11_176_512, 11_324_992),
        ("resnet34", 21_284_672, 21_433_152),
        ("resnet50", 23_508_032, 23_631_808),
        ("resnet101", 42_500_160, 42_623_936),
        ("resnet152", 58_143_808, 58_267_584),
    ],
)
def test_parameter_counts_of_backbones(backbone, plain, deep):
    for stem, expected in (("7x7", plain), ("deep", deep)):
        model = shapes_of(2, backbone=backbone, stem=stem)
        assert count(nnx.state(model.backbone, nnx.Param)) == expected


def test_resnet269_has_269_layers():
    model = shapes_of(150, backbone="resnet269")
    blocks = [name for name in vars(model.backbone) if name.startswith("layer")]
    assert 3 * len(blocks) + 2 == 269


@pytest.fixture(scope="module")
def initial_values():
    """Of every parameter and running statistic of the published ResNet-50, by dotted path."""
    model = PSPNet(options(backbone="resnet50", width=64), 150, rng=np.random.default_rng(0))
    _, *trees = split_model(model)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(value)
        for tree in trees
        for path, value in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_moments_of_initialization(initial_values):
    """Backbone He's normal by fan_out, heads PyTorch's uniform by fan_in, norms the identity."""
    norm = {"scale": 1, "bias": 0, "mean": 0, "variance": 1}
    wrong = {}
    for path, value in initial_values.items():
        module, _, leaf = path.rpartition(".")
        kernel = initial_values.get(f"{module}.kernel")
        if kernel is None:
            right = (value == norm[leaf]).all()
        elif path.startswith("backbone."):
            size, _, _, out_channels = kernel.shape
            std = (2 / (size * size * out_channels)) ** 0.5
            # A uniform distribution ends at 1.7 standard deviations.
            right = has_moments(value, std, kurtosis=3) and np.abs(value).max() > 3 * std
        else:
            bound = np.prod(kernel.shape[:3]) ** -0.5
            is_within = np.abs(value).max() <= np.float32(bound)
            right = has_moments(value, bound / 3**0.5, kurtosis=1.8) and is_within
        if not right:
            wrong[path] = (value.mean(), value.std())
    assert not wrong


def has_moments(value: np.ndarray, std: float, *, kurtosis: float) -> bool:
    """Whether mean and standard deviation are 0 and `std`, within five standard errors."""
    error = std / value.size**0.5
    spread = error * (kurtosis - 1) ** 0.5 / 2
    return abs(value.mean()) < 5 * error and abs(value.std() - std) < 5 * spread


def test_every_convolution_has_a_draw_of_its_own(initial_values):
    kernels = [value for path, value in initial_values.items() if path.endswith("kernel")]
    signs = {np.signbit(kernel.flat[:64]).tobytes() for kernel in kernels}
    assert len(signs) == len(kernels)


@pytest.mark.parametrize(
    ("output_stride", "expected"),
    [
        (8, ((1, 1), (2, 1), (1, 2), (1, 4))),
        (16, ((1, 1), (2, 1), (2, 1), (1, 2))),
        (32, ((1, 1), (2, 1), (2, 1), (2, 1))),
    ],
)
def test_output_stride_turns_strides_into_dilations(output_stride, expected):
    assert stage_strides(output_stride) == expected


@pytest.mark.parametrize(("output_stride", "side"), [(8, 9), (16, 5), (32, 3)])
def test_size_of_features(output_stride, side):
    model = network(output_stride=output_stride)
    outputs = jax.eval_shape(lambda x: model(x), jnp.zeros((2, 65, 65, 3)))
    assert outputs.logits.shape == (2, side, side, 5)


def dilations(model: ResNet, stage: int):
    blocks = [getattr(model, f"layer{stage}_{i}") for i in range(model.num_blocks[stage - 1])]
    return [(block.conv1.dilation, block.conv2.dilation) for block in blocks]


@pytest.mark.parametrize("pair", [(2, 4), (1, 2), (1, 1)])
def test_first_block_dilation(pair):
    backbone = network(backbone="resnet18", first_block_dilation=pair).backbone
    assert dilations(backbone, 2) == [(1, 1), (1, 1)]
    for stage, first, rest in ((3, pair[0], 2), (4, pair[1], 4)):
        assert dilations(backbone, stage)[0] == (first, first)
        assert dilations(backbone, stage)[1] == (rest, rest)


def test_bottleneck_strides_and_dilates_its_3x3():
    backbone = network(backbone="resnet50").backbone
    first = backbone.layer2_0
    assert (first.conv1.stride, first.conv2.stride, first.conv3.stride) == (1, 2, 1)
    assert [backbone.layer4_0.conv2.dilation, backbone.layer3_5.conv2.dilation] == [4, 2]


def test_pyramid_concatenates_map_then_bins_in_order():
    model = network(pyramid_bins=(1, 2))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 9, 64)), jnp.float32)
    y = np.asarray(model.pyramid(x, train=False))
    assert y.shape[-1] == 64 + 2 * 32
    np.testing.assert_array_equal(y[..., :64], x)
    first_level = y[..., 64:96]
    # Bin 1 is the same everywhere; bin 2 is not.
    np.testing.assert_allclose(
        first_level, first_level[:, :1, :1] * np.ones((1, 9, 9, 1)), atol=1e-6
    )
    assert np.ptp(y[..., 96:], axis=(1, 2)).max() > 0.01


@pytest.mark.parametrize(
    ("overrides", "channels"),
    [
        ({}, 64 + 4 * 16),
        ({"pyramid_bins": ()}, 64),
        ({"pyramid_bins": (1,)}, 64 + 64),
        ({"pyramid_reduction": False}, 64 * 5),
        ({"pyramid_pool": "max"}, 64 + 4 * 16),
    ],
)
def test_pyramid_options_give_their_channels(overrides, channels):
    model = network(**overrides)
    assert model.pyramid.out_channels == channels
    assert model.head.conv.kernel[...].shape == (3, 3, channels, 64)
    outputs = jax.eval_shape(lambda x: model(x), jnp.zeros((1, 33, 41, 3)))
    assert outputs.logits.shape == (1, 5, 6, 5)


def test_max_pool_of_the_pyramid_differs_from_average():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 9, 9, 64)), jnp.float32)
    average, largest = (network(pyramid_pool=pool).pyramid for pool in ("average", "max"))
    assert not np.allclose(average(x, train=False), largest(x, train=False))


def test_outputs_are_the_same_structure_in_both_modes():
    model = network()
    images = jnp.zeros((2, 33, 33, 3))
    trained = nnx.eval_shape(
        lambda m, x, k: m(x, train=True, key=k), model, images, jax.random.key(0)
    )
    evaluated = jax.eval_shape(lambda x: model(x), images)
    assert (
        trained.logits.shape == trained.aux_logits.shape == evaluated.logits.shape == (2, 5, 5, 5)
    )
    assert evaluated.aux_logits is None
    assert trained.presence_logits is None


def test_half_precision_keeps_float32_parameters_and_logits():
    model = network(dtype="bfloat16")
    _, params, batch_stats = split_model(model)
    assert {leaf.dtype for leaf in jax.tree.leaves((params, batch_stats))} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(lambda x: model(x), jnp.zeros((1, 33, 33, 3)))
    assert outputs.logits.dtype == jnp.float32


def test_remat_changes_neither_values_nor_statistics_nor_gradients():
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 33, 33, 3)), jnp.float32)
    results = []
    for remat in (False, True):
        graphdef, params, batch_stats = split_model(network(remat=remat))

        @jax.jit
        def run(params, graphdef=graphdef, batch_stats=batch_stats):
            def total(params):
                model = nnx.merge(graphdef, params, batch_stats)
                features = model.backbone(images, train=True)
                statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
                return jnp.sum(features.stage4**2), statistics

            return jax.value_and_grad(total, has_aux=True)(params)

        results.append(run(params))
        program = str(jax.make_jaxpr(lambda p, run=run: run(p))(params))
        assert ("remat" in program or "checkpoint" in program) == remat
    for plain, rematerialized in zip(*map(jax.tree.leaves, results), strict=True):
        scale = np.abs(plain).max() + 1e-12
        np.testing.assert_allclose(plain / scale, rematerialized / scale, atol=1e-5)


def test_heads_are_everything_but_the_backbone():
    assert not is_head(("backbone", "layer1_0", "conv1", "kernel"))
    assert all(is_head((name, "conv", "kernel")) for name in ("pyramid", "head", "aux_head"))
    _, params, _ = split_model(network())
    assert set(params) == {"backbone", "pyramid", "head", "aux_head"}


def test_size_rule_names_the_nearest_sizes():
    with pytest.raises(ValueError, match=r"480 .* must be 8k \+ 1 \(nearest: 473, 481\)"):
        network()(jnp.zeros((1, 480, 473, 3)))
    padded = [FAMILIES["semseg"].padded(side) for side in (1, 2, 9, 10, 473, 474, 480)]
    assert padded == [1, 9, 9, 17, 473, 481, 481]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backbone": "resnet51"}, "backbone='resnet51' is not one of resnet10, resnet18"),
        ({"family": "mmsegg"}, "family='mmsegg' is not one of semseg"),
        ({"stem": "5x5"}, "stem='5x5'"),
        ({"output_stride": 4}, "output_stride=4 is not one of 8, 16, 32"),
        ({"pyramid_bins": (1, 1)}, "different numbers"),
        ({"pyramid_bins": (1, 2, 3)}, "64 channels cannot be divided into 3"),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_impossible_options_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        options(**overrides)


def test_overrides_win_over_the_family():
    assert options(dropout_rate=0.3).dropout_rate == 0.3
    assert options().dropout_rate == 0.1
    assert options(pyramid_bins=()).pyramid_bins == ()
