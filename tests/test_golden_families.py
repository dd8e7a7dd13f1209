"""Networks of four more published families agree with PyTorch, under the names and in the layout of their files.

The goldens are float64 values written by goldens/make_families.py, which draws the weights by published keys;
here they go through the tables of names, and are computed in float64, too: only a different formula can
make a difference. Each network and size is a compilation of its own, so some are marked slow.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import make_families
import make_logits
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.models.families import FAMILIES, ModelOptions
from pspnet_jax.passes import Network, structure
from pspnet_jax.resample import resize
from pspnet_jax.train_step import normalize
from pspnet_jax.trees import flatten, unflatten
from pspnet_jax.weights import tables
from pspnet_jax.weights.names import COUNTER, Table, publish, rename

from compiling import jit
from networks import options

GOLDENS = Path(__file__).parent / "goldens"

BUDGET_SECONDS = 150

CASES = make_families.CASES
TOLERANCE = 2e-7  # of the largest logit: files hold float32
# Caffe's files have no auxiliary head.
OF_FILES = {"caffe": {"aux_heads": ()}, "mmseg": {}, "smp": {}, "csail": {}}
# One odd size of each family; the others differ from it by depth, stem or divisible maps.
FAST = {
    "mmseg_resnet18",
    "smp_resnet34",
    "csail_resnet18",
    "caffe_resnet50",
    "mmseg_resnet50_stride32",
}
RUNS = [
    pytest.param(name, i, marks=() if name in FAST and i == 1 else pytest.mark.slow)
    for name in CASES
    for i in (0, 1)
]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"family_{name}.npz") as file:
        return dict(file)


def options_of(case: make_families.Case, **overrides) -> ModelOptions:
    """The family's, but for what a case says."""
    return options(
        family=case.family,
        backbone=case.backbone,
        stem=case.stem,
        align_corners=case.align_corners,
        output_stride=case.output_stride,
        num_stages=case.num_stages,
        **{"width": case.width, "dtype": "float64", **OF_FILES[case.family], **overrides},
    )


def structure_of(model_options: ModelOptions, num_classes: int):
    normalization = FAMILIES[model_options.family].normalization
    return structure(Network(model_options, num_classes, normalization))


def table_of(model_options: ModelOptions) -> Table:
    bins = model_options.pyramid_bins
    return tables.of_network(model_options.family, bins, stem=model_options.stem)


def published_shapes(model_options: ModelOptions, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Of all that a network's files hold, by their keys, without counters."""
    _, *trees = structure_of(model_options, num_classes)
    zeros = {path: np.zeros(leaf.shape) for tree in trees for path, leaf in flatten(tree).items()}
    published = publish(zeros, table_of(model_options), steps=0)
    return {key: array.shape for key, array in published.items() if COUNTER not in key}


def state_of(case: make_families.Case, model_options: ModelOptions):
    """Definition, parameters and statistics, drawn by published keys; and the shapes under those keys."""
    graphdef, *trees = structure_of(model_options, case.num_classes)
    shapes = published_shapes(model_options, case.num_classes)
    weights = rename(make_families.draw(shapes), table_of(model_options))
    assert not weights.unknown
    state = [
        unflatten({path: jnp.asarray(weights.arrays[path]) for path in flatten(tree)})
        for tree in trees
    ]
    return graphdef, state, shapes


@pytest.mark.parametrize(("name", "i"), RUNS)
def test_logits_at_image_size(name, i):
    case, golden = CASES[name], load(name)
    size = case.sizes[i]
    with jax.enable_x64(True):
        model_options = options_of(case)
        graphdef, (params, batch_stats), shapes = state_of(case, model_options)
        np.testing.assert_allclose(
            make_families.fingerprint(case, shapes), golden["fingerprint"], rtol=1e-9
        )

        @jit
        def evaluate(params, batch_stats, images):
            inputs = normalize(images, FAMILIES[case.family].normalization, dtype=jnp.float64)
            logits = nnx.merge(graphdef, params, batch_stats)(inputs, train=False).logits
            return resize(logits, size, align_corners=model_options.align_corners)

        logits = np.asarray(evaluate(params, batch_stats, make_logits.draw_images(case, size)))
    expected = golden[make_logits.key(size)]
    found = logits[:, *make_families.PIXELS]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "csail_resnet18" else pytest.mark.slow)
        for name, case in CASES.items()
        if case.family in ("mmseg", "csail")
    ],
)
def test_both_heads_in_training(name):
    """With batch statistics and without dropout, at head resolution."""
    case, golden = CASES[name], load(name)
    with jax.enable_x64(True):
        graphdef, state, _ = state_of(case, options_of(case, dropout_rate=0.0))

        @jit
        def train(params, batch_stats, images):
            inputs = normalize(images, FAMILIES[case.family].normalization, dtype=jnp.float64)
            model = nnx.merge(graphdef, params, batch_stats)
            outputs = model(inputs, train=True, key=jax.random.key(0))
            return outputs.logits, outputs.aux_logits

        images = make_logits.draw_images(case, case.sizes[0])
        found = train(*state, images)
    for logits, kind in zip(found, ("training_logits", "training_aux_logits"), strict=True):
        expected = golden[kind]
        picked = np.asarray(logits)[:, *make_families.MAP_PIXELS]
        assert picked.shape == expected.shape
        assert np.abs(picked - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_numbers_of_parameters_as_published(name):
    """At full width with 150 classes: with the auxiliary head, and without it."""
    case, golden = CASES[name], load(name)

    def count(**overrides) -> int:
        _, params, _ = structure_of(options_of(case, dtype="float32", **overrides), 150)
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert count(width=64, aux_heads=()) == golden["num_parameters_150_main"]
    if case.family in ("mmseg", "csail"):
        assert count(width=64) == golden["num_parameters_150"]
