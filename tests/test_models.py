"""Backbones, pyramid, heads, PSPNet: published sizes, strides, dilations, options and their errors."""

import collections
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.models.backbones import BACKBONES
from pspnet_jax.models.families import ModelOptions, check_size
from pspnet_jax.models.layers import (
    TORCH_DEFAULT,
    BatchNorm,
    Conv,
    Dropout,
    Linear,
    NoRandomNumbers,
)
from pspnet_jax.models.pspnet import PSPNet, is_head
from pspnet_jax.models.pyramid import PresenceHead, ProgressiveHead, Pyramid, PyramidPooling
from pspnet_jax.models.resnet import DEPTHS, stage_strides
from pspnet_jax.resample import resize
from pspnet_jax.train_step import split_model

from compiling import jit
from networks import network, options, random

BUDGET_SECONDS = 180


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes_of(num_classes, **overrides) -> PSPNet:
    """A published network as shapes alone."""
    chosen = options(width=64, **overrides)
    return nnx.eval_shape(lambda: PSPNet(chosen, num_classes, rng=NoRandomNumbers()))


# classes -> trainable parameters with and without the auxiliary head (hszhao/semseg).
PUBLISHED_SIZES = {
    "resnet50": {
        150: (49_180_908, 46_782_550),
        21: (49_081_578, 46_716_373),
        19: (49_080_038, 46_715_347),
    },
    "resnet101": {
        150: (68_173_036, 65_774_678),
        21: (68_073_706, 65_708_501),
        19: (68_072_166, 65_707_475),
    },
    "resnet152": {
        150: (83_816_684, 81_418_326),
        21: (83_717_354, 81_352_149),
        19: (83_715_814, 81_351_123),
    },
}


@pytest.mark.parametrize(("backbone", "published"), PUBLISHED_SIZES.items())
def test_parameter_counts_of_the_authors(backbone, published):
    """Counted with 150 classes; the classifiers alone grow with their number."""
    model = shapes_of(150, backbone=backbone)
    total, of_aux, of_classifier, of_aux_classifier = (
        count(nnx.state(part, nnx.Param))
        for part in (model, model.aux_head, model.head.classifier, model.aux_head.classifier)
    )
    main = total - of_aux
    for num_classes, expected in published.items():
        fewer = 150 - num_classes
        less, less_aux = of_classifier * fewer // 150, of_aux_classifier * fewer // 150
        assert (total - less - less_aux, main - less) == expected


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


def other_backbone(name, *, width=8, rng=None, remat=False) -> Any:
    """A backbone that is no ResNet, by its row."""
    kind = BACKBONES[name]
    of_norms = {"frozen_norm": False, "norm_momentum": 0.1}
    options = {option: of_norms[option] for option in kind.takes}
    rng = rng or np.random.default_rng(0)
    return kind.make(name, width=width, remat=remat, dtype=jnp.float32, rng=rng, **options)


OTHERS = [name for name in BACKBONES if name not in DEPTHS]


# torchvision's counts without the classifier, DenseNet's without the last norm (2,048) as well.
@pytest.mark.parametrize(
    ("name", "expected", "stage3", "stage4"),
    [("densenet121", 6_953_856 - 2_048, 512, 1024), ("squeezenet", 722_496, 256, 512)],
)
def test_parameter_counts_of_the_other_backbones(name, expected, stage3, stage4):
    model = nnx.eval_shape(lambda: other_backbone(name, width=64, rng=NoRandomNumbers()))
    assert count(nnx.state(model, nnx.Param)) == expected
    assert (model.auxiliary_channels, model.last_channels) == (stage3, stage4)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("densenet121", (40, 64), marks=pytest.mark.slow),
        ("squeezenet", (40, 64)),
        ("squeezenet", (8, 48)),
    ],
)
def test_images_of_8n_give_maps_of_n(name, size):
    model = other_backbone(name)
    features = nnx.eval_shape(lambda m, x: m(x, train=True), model, jnp.zeros((2, *size, 3)))
    expected = (2, size[0] // 8, size[1] // 8)
    assert features.auxiliary.shape == (*expected, model.auxiliary_channels)
    assert features.last.shape == (*expected, model.last_channels)


def test_squeezenet_dilates_its_3x3_and_has_biases():
    model = other_backbone("squeezenet")
    fires = {name: fire for name, fire in vars(model).items() if name.startswith("layer")}
    dilations = {name: fire.expand3.dilation for name, fire in fires.items()}
    assert dilations == {
        f"layer{stage}_{i}": dilation
        for stage, number, dilation in ((2, 2, 1), (3, 2, 2), (4, 4, 4))
        for i in range(number)
    }
    convs = [conv for fire in fires.values() for conv in (fire.squeeze, fire.expand1, fire.expand3)]
    assert all(conv.bias is not None for conv in (model.conv1, *convs))
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))


def test_densenet_dilates_nothing_and_ends_with_its_last_layer():
    model = nnx.eval_shape(lambda: other_backbone("densenet121", rng=NoRandomNumbers()))
    modules = {name: part for name, part in vars(model).items() if isinstance(part, nnx.Module)}
    layers = [f"layer{k}_{i}" for k, n in enumerate((6, 12, 24, 16), 1) for i in range(n)]
    assert set(modules) == {"stem", "transition1", "transition2", "transition3", *layers}
    assert {modules[name].conv2.dilation for name in layers} == {1}
    halved = [modules[f"transition{k}"].halves_size for k in (1, 2, 3)]
    assert halved == [True, False, False]


@pytest.mark.parametrize(
    ("name", "width", "nearest"), [("densenet121", 9, "8, 10"), ("squeezenet", 10, "8, 12")]
)
def test_widths_that_cannot_be_divided_are_refused(name, width, nearest):
    with pytest.raises(ValueError, match=rf"width={width} of {name} must be .* {nearest}\)"):
        other_backbone(name, width=width)


@pytest.mark.parametrize("name", OTHERS)
def test_every_convolution_of_the_other_backbones_has_a_draw_of_its_own(name):
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(other_backbone(name), nnx.Param))
    kernels = [np.asarray(value) for path, value in leaves if "kernel" in str(path)]
    assert len({kernel.tobytes() for kernel in kernels}) == len(kernels)


def test_resnet269_has_269_layers():
    model = shapes_of(150, backbone="resnet269")
    blocks = [name for name in vars(model.backbone) if name.startswith("layer")]
    assert 3 * len(blocks) + 2 == 269


@pytest.fixture(scope="module")
def initial_values():
    """Of every parameter and running statistic of a quarter of the published ResNet-50, by dotted path."""
    model = PSPNet(options(backbone="resnet50", width=16), 150, rng=np.random.default_rng(0))
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
            right = has_moments(value, std, kurtosis=3) and np.abs(value).max() > 2 * std
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


def dilations(model: Any, stage: int):
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


def test_pyramid_is_the_map_and_a_level_of_each_bins():
    model = network(pyramid_bins=(1, 2, 3, 6))
    x = random(2, 9, 9, 64)
    pyramid = model.pyramid(x, train=False)
    assert pyramid.map is x
    assert (pyramid.map_first, pyramid.align_corners) == (True, True)
    assert [level.shape for level in pyramid.levels] == [(2, n, n, 16) for n in (1, 2, 3, 6)]
    variant = network(family="lextal").pyramid(x, train=False)
    assert (variant.map_first, variant.align_corners) == (False, True)
    assert not network(align_corners=False).pyramid(x, train=False).align_corners


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


CONV = functools.partial(Conv, initializer=TORCH_DEFAULT, dtype=jnp.float32)
NORM = functools.partial(BatchNorm)  # a partial, as the types of heads ask for
LINEAR = functools.partial(Linear, initializer=TORCH_DEFAULT, dtype=jnp.float32)


def pyramid(**overrides) -> PyramidPooling:
    """Of 8 channels and two levels, linear unless something else is asked for."""
    chosen = {"bins": (1, 2), "pool": "average", "reduction": False, "linear": True, **overrides}
    rng = np.random.default_rng(0)
    return PyramidPooling(8, align_corners=True, conv=CONV, norm=NORM, rng=rng, **chosen)


@pytest.mark.parametrize(("reduction", "channels"), [(False, 8), (True, 4)])
def test_linear_levels_are_a_convolution_and_nothing_else(reduction, channels):
    model = pyramid(reduction=reduction)
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    expected = {key: {"conv": {"kernel": (1, 1, 8, channels)}} for key in ("level1", "level2")}
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(params)) == expected
    assert not jax.tree.leaves(batch_stats)
    assert model.out_channels == 8 + 2 * channels
    # Linear: twice the map gives twice the levels, and its negative their negatives.
    x = random(1, 4, 6, 8)
    y = model(x, train=True)
    for factor in (2, -1):
        for level, again in zip(y.levels, model(factor * x, train=True).levels, strict=True):
            np.testing.assert_allclose(again, factor * level, atol=1e-5)


def test_levels_are_of_maxima_where_they_are_asked_for():
    x = random(1, 4, 6, 8)
    average, largest = (pyramid(pool=pool)(x, train=False).levels for pool in ("average", "max"))
    for pair in zip(average, largest, strict=True):
        assert not np.allclose(*pair)
    assert network(pyramid_pool="max").pyramid.pool == "max"


def progressive_head(*, dropout_rate=0.0, align_corners=True) -> ProgressiveHead:
    return ProgressiveHead(
        12,
        64,
        5,
        dropout_rate=dropout_rate,
        dropout_kind="channel",
        initializer=TORCH_DEFAULT,
        align_corners=align_corners,
        conv=CONV,
        norm=NORM,
        rng=np.random.default_rng(0),
    )


class TestProgressiveHead:
    def test_channels_are_the_published_ones_and_logits_eight_times_as_large(self):
        def head():
            bound = {"conv": CONV, "norm": NORM, "rng": NoRandomNumbers()}
            bound |= {"dropout_kind": "channel", "initializer": TORCH_DEFAULT}
            return ProgressiveHead(2560, 1024, 18, dropout_rate=0.3, align_corners=True, **bound)

        model = nnx.eval_shape(head)
        assert model.up1.conv.kernel.shape == (3, 3, 1024, 256)
        assert model.up2.conv.kernel.shape == (3, 3, 256, 64)
        assert model.up3.conv.kernel.shape == (3, 3, 64, 64)
        by_hand = (2560 + 1) * 1024 + sum(
            9 * a * b + 3 * b + 1 for a, b in ((1024, 256), (256, 64), (64, 64))
        )
        assert count(nnx.state(model, nnx.Param)) == by_hand + (64 + 1) * 18
        logits = progressive_head()(Pyramid(jnp.zeros((2, 3, 5, 12))), train=False, key=None)
        assert logits.shape == (2, 24, 40, 5)

    @pytest.mark.parametrize("align_corners", [True, False])
    def test_a_block_resizes_convolves_normalizes_and_bends(self, align_corners):
        block, x = progressive_head(align_corners=align_corners).up3, random(2, 3, 4, 4)
        block.norm.mean[...] = random(4, seed=1)
        y = np.asarray(block.conv(resize(x, (6, 8), align_corners=align_corners)))
        y = (y - np.asarray(block.norm.mean[...])) / np.sqrt(1 + 1e-5)
        np.testing.assert_allclose(block(x, train=False), np.where(y > 0, y, 0.25 * y), atol=1e-5)
        assert block.conv.bias is not None

    def test_drops_channels_of_the_fused_map_and_half_as_many_after_each_block(self):
        head = progressive_head(dropout_rate=0.3)
        assert (head.fuse_dropout.rate, head.block_dropout.rate) == (0.3, 0.15)
        x, key = Pyramid(random(2, 2, 2, 12)), jax.random.key(0)
        plain, dropped, again = (
            head(x, train=train, key=key)
            for train, key in ((False, None), (True, key), (True, key))
        )
        assert not np.allclose(plain, dropped)
        np.testing.assert_array_equal(dropped, again)
        with pytest.raises(ValueError, match="needs a key"):
            head(x, train=True, key=None)

    def test_every_dropout_draws_its_own_channels(self, monkeypatch):
        seen = []
        original = Dropout.__call__

        def watch(self, x, *, train, key):
            seen.append(tuple(np.asarray(jax.random.key_data(key))))
            return original(self, x, train=train, key=key)

        monkeypatch.setattr(Dropout, "__call__", watch)
        x = Pyramid(random(2, 2, 2, 12))
        progressive_head(dropout_rate=0.3)(x, train=True, key=jax.random.key(0))
        assert len(seen) == len(set(seen)) == 4


class TestPresenceHead:
    def head(self) -> PresenceHead:
        return PresenceHead(6, 8, 5, linear=LINEAR, rng=np.random.default_rng(0))

    def test_looks_at_the_largest_value_of_every_channel(self):
        head, x = self.head(), np.asarray(random(2, 3, 4, 6))
        kernels = [np.asarray(layer.kernel[...]) for layer in (head.hidden, head.classifier)]
        biases = [np.asarray(layer.bias[...]) for layer in (head.hidden, head.classifier)]
        hidden = np.maximum(x.max((1, 2)) @ kernels[0] + biases[0], 0)
        expected = hidden @ kernels[1] + biases[1]
        np.testing.assert_allclose(head(jnp.asarray(x)), expected, atol=1e-5)

    def test_teaches_one_position_of_every_channel(self):
        head, x = self.head(), random(2, 3, 4, 6)
        gradient = np.asarray(jax.grad(lambda x: head(x)[:, 0].sum())(x))
        positions = (gradient != 0).sum(axis=(1, 2))
        assert positions.max() == 1
        where = np.abs(gradient).reshape(2, 12, 6).argmax(1)
        np.testing.assert_array_equal(
            where[positions > 0], np.asarray(x).reshape(2, 12, 6).argmax(1)[positions > 0]
        )


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


@pytest.mark.parametrize(
    ("side", "platform", "overrides"),
    [
        (33, "gpu", {"frozen_norm": True}),
        (33, "cpu", {"pyramid_pool": "max"}),
        (32, None, {"family": "lextal", "backbone": "squeezenet"}),
        pytest.param(
            32, "gpu", {"family": "lextal", "backbone": "densenet121"}, marks=pytest.mark.slow
        ),
    ],
)
def test_half_precision_sums_nothing(side, platform, overrides):
    """Convolutions and matrix products sum in float32 and round once; sums of XLA are in the dtype of what
    is summed, and in bfloat16 the gradient of a bias would be wrong in its first digit."""
    graphdef, params, batch_stats = split_model(
        network(dtype="bfloat16", platform=platform, **overrides)
    )
    images = jnp.zeros((2, side, side, 3))

    def total(params):
        model = nnx.merge(graphdef, params, batch_stats)
        outputs = model(images, train=True, key=jax.random.key(0))
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(outputs))

    summed = [
        equation.outvars[0].aval.dtype
        for equation in _operations(jax.make_jaxpr(jax.grad(total))(params).jaxpr)
        if equation.primitive.name in ("reduce_sum", "reduce_window_sum", "cumsum")
    ]
    assert jnp.dtype("float32") in summed
    assert jnp.dtype("bfloat16") not in summed


def backbone(name, *, remat) -> Any:
    if name in OTHERS:
        return other_backbone(name, remat=remat)
    return network(backbone=name, remat=remat).backbone


@pytest.mark.parametrize("name", ["resnet10", pytest.param("squeezenet", marks=pytest.mark.slow)])
def test_remat_changes_neither_values_nor_statistics_nor_gradients(name):
    images = jnp.asarray(np.random.default_rng(0).standard_normal((2, 33, 33, 3)), jnp.float32)
    results = []
    for remat in (False, True):
        model = backbone(name, remat=remat)
        graphdef, params, batch_stats = split_model(model)

        @jit
        def run(params, graphdef=graphdef, batch_stats=batch_stats):
            def total(params):
                model = nnx.merge(graphdef, params, batch_stats)
                features = model(images, train=True)
                statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
                return jnp.sum(features.last**2), statistics

            return jax.value_and_grad(total, has_aux=True)(params)

        results.append(run(params))
    for plain, rematerialized in zip(*map(jax.tree.leaves, results), strict=True):
        scale = np.abs(plain).max() + 1e-12
        np.testing.assert_allclose(plain / scale, rematerialized / scale, atol=1e-5)


# Of a DenseNet's layer the second one is not needed again; SqueezeNet's first is in no block.
CONVOLUTIONS_AGAIN = {"resnet10": 15, "resnet18": 23, "squeezenet": 24, "densenet121": 59}
# Without remat, with it: activations, and the max pool of a stem.
MAXIMA_AGAIN = {
    "resnet10": (10, 10),
    "resnet18": (18, 14),
    "squeezenet": (13, 8),
    "densenet121": (123, 123),
}


@pytest.mark.parametrize("name", CONVOLUTIONS_AGAIN)
@pytest.mark.parametrize("remat", [False, True])
def test_what_the_backward_pass_computes_again(name, remat):
    """Norms and activations, and with remat convolutions."""
    forward, gradient = operations(backbone(name, remat=remat))
    convolutions = forward["conv_general_dilated"]
    # Each has two gradients, but for that of the images.
    again = gradient["conv_general_dilated"] - (3 * convolutions - 1)
    assert again == (CONVOLUTIONS_AGAIN[name] if remat else 0)
    assert gradient["max"] - forward["max"] == MAXIMA_AGAIN[name][remat]
    assert gradient["rsqrt"] >= 2 * forward["rsqrt"]
    if not remat:
        # Batch statistics are stored: nothing is squared again.
        assert gradient["square"] == forward["square"]
    if name == "resnet18":
        # Stages of two blocks: what goes from one to the other is made again, too.
        assert (gradient["rsqrt"] > 2 * forward["rsqrt"]) == (not remat)


def operations(model: nnx.Module) -> tuple[collections.Counter, collections.Counter]:
    """Of a backbone's forward pass in training mode, and of the gradient of its parameters."""
    graphdef, params, batch_stats = split_model(model)
    images = jnp.zeros((2, 16, 16, 3))

    def total(params, batch_stats):
        return nnx.merge(graphdef, params, batch_stats)(images, train=True).last.sum()

    return tuple(
        collections.Counter(
            equation.primitive.name
            for equation in _operations(jax.make_jaxpr(function)(params, batch_stats).jaxpr)
        )
        for function in (total, jax.grad(total))
    )


def _operations(jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """All of a program, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _operations(inner)


def test_heads_are_everything_but_the_backbone():
    assert not is_head(("backbone", "layer1_0", "conv1", "kernel"))
    assert all(is_head((name, "conv", "kernel")) for name in ("pyramid", "head", "aux_head"))
    _, params, _ = split_model(network())
    assert set(params) == {"backbone", "pyramid", "head", "aux_head"}


def test_size_rule_names_the_nearest_sizes():
    with pytest.raises(
        ValueError, match=r"480 .* must be 8k \+ 1, with a whole k \(nearest: 473, 481\)"
    ):
        network()(jnp.zeros((1, 480, 473, 3)))
    padded = [
        options(family="semseg").size_rule.padded(side) for side in (1, 2, 9, 10, 473, 474, 480)
    ]
    assert padded == [1, 9, 9, 17, 473, 481, 481]
    deep = options(family="smp", num_stages=4, output_stride=32)
    assert [deep.size_rule.padded(side) for side in (1, 32, 480, 481)] == [32, 32, 480, 512]
    with pytest.raises(ValueError, match=r"4 .* must be 8k, with a whole k \(nearest: 8\)"):
        check_size((4, 8), options(family="csail").size_rule)
    with pytest.raises(ValueError, match=r"473 .* must be 32k, .* \(nearest: 448, 480\)"):
        check_size((480, 473), deep.size_rule)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backbone": "resnet51"}, "backbone='resnet51' is not one of resnet10, resnet18"),
        ({"family": "mmsegg"}, "family='mmsegg' is not one of semseg"),
        ({"stem": "5x5"}, "stem='5x5'"),
        ({"output_stride": 4}, "output_stride=4 is not one of 8, 16, 32"),
        ({"pyramid_bins": (1, 1)}, "different numbers"),
        ({"head": "progressive", "output_stride": 16}, "needs output_stride=8, not 16"),
        ({"aux_heads": ("pixels",)}, "aux_heads='pixels' is not one of pixel, presence"),
        ({"backbone": "densenet121", "stem": "deep"}, "not possible with backbone=densenet121"),
        (
            {"backbone": "squeezenet", "output_stride": 16},
            "which needs --config.model.output_stride=8",
        ),
        ({"dtype": "float16"}, "dtype='float16'"),
    ],
)
def test_impossible_options_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        options(**overrides)


def test_bins_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match="64 channels cannot be divided into 3"):
        network(pyramid_bins=(1, 2, 3))


# Lextal/pspnet-pytorch, 18 classes; the last two counted in a PyTorch statement of it.
VARIANT_SIZES = {
    "resnet18": 17_463_911,
    "resnet34": 27_572_071,
    "resnet50": 53_584_999,
    "resnet101": 72_577_127,
    "resnet152": 88_220_775,
    "densenet121": 19_071_911,
    "squeezenet": 7_009_895,
}


@pytest.mark.parametrize(("backbone", "total"), VARIANT_SIZES.items())
def test_parameter_counts_of_the_variant(backbone, total):
    model = shapes_of(18, family="lextal", backbone=backbone)
    assert count(nnx.state(model, nnx.Param)) == total


@pytest.mark.parametrize("heads", [(), ("pixel",), ("presence",), ("pixel", "presence")])
@pytest.mark.parametrize("family", ["semseg", "lextal"])
def test_auxiliary_heads_are_those_asked_for_in_every_family(family, heads):
    model = shapes_of(5, family=family, backbone="resnet18", aux_heads=heads)
    assert (model.aux_head is not None) == ("pixel" in heads)
    assert (model.presence_head is not None) == ("presence" in heads)


def test_options_from_before_an_option_existed_take_the_familys():
    section = {
        k: v for k, v in dataclasses.asdict(options()).items() if k not in ("head", "aux_heads")
    }
    assert ModelOptions.resolve(section) == options()


def test_overrides_win_over_the_family():
    assert options(dropout_rate=0.3).dropout_rate == 0.3
    assert options().dropout_rate == 0.1
    assert options(pyramid_bins=()).pyramid_bins == ()


def test_unknown_platforms_are_refused():
    with pytest.raises(ValueError, match="platform='cuda' is not None or one of cpu, gpu, tpu"):
        PSPNet(options(), 5, rng=np.random.default_rng(0), platform="cuda")
