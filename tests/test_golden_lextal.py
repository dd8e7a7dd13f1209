"""The variant with image-level supervision agrees with PyTorch: scores, losses, gradients, statistics.

The goldens are computed in float64 by goldens/make_lextal.py, and so is this side: only a different formula
can make a difference. Every network is compiled for evaluation, and the quickest for a step, too; the steps of
the others are marked slow.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import make_lextal
import make_step
import numpy as np
import pytest
from flax import nnx

from pspnet_jax import passes
from pspnet_jax.losses import LossOptions, segmentation_loss
from pspnet_jax.models.families import IMAGENET_8BIT
from pspnet_jax.train_step import normalize

from agreement import assert_near, difference
from compiling import jit

GOLDENS = Path(__file__).parent / "goldens"

BUDGET_SECONDS = 240  # the slow runs; the others take a third

CASES = make_lextal.CASES
# Largest difference relative to the largest value of the tensor (losses: to the loss). They are as wide
# as the files need, which hold float32 of all but the losses and the presence logits.
TOLERANCES = {
    "log_probabilities": 2e-7,
    "presence_logits": 1e-12,
    "losses": 1e-12,
    "gradients": 2e-7,
    "statistics": 2e-7,
}
TRAINED = [
    "squeezenet",
    pytest.param("resnet34", marks=pytest.mark.slow),
    pytest.param("resnet50", marks=pytest.mark.slow),
    pytest.param("densenet121", marks=pytest.mark.slow),
]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"lextal_{name}.npz") as file:
        return dict(file)


@dataclass
class Network:
    """A network with its drawn state and batch, in float64."""

    graphdef: nnx.GraphDef
    state: tuple[dict, dict]
    images: jax.Array
    labels: jax.Array


def network(name: str) -> Network:
    case = CASES[name]
    graphdef, _, _ = passes.structure(
        passes.Network(case.options(dtype="float64"), case.num_classes, IMAGENET_8BIT)
    )
    state = jax.tree.map(jnp.asarray, make_step.draw_state(case))
    images, labels = map(jnp.asarray, make_lextal.draw_batch(case))
    return Network(graphdef, state, normalize(images, IMAGENET_8BIT, dtype=jnp.float64), labels)


@dataclass
class Step:
    """A golden file, and what this package makes of the same inputs in training mode."""

    golden: dict[str, np.ndarray]
    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=TRAINED)
def step(request) -> Step:
    with jax.enable_x64(True):
        net = network(request.param)

        @jit
        @functools.partial(jax.grad, has_aux=True)
        def differentiate(params, batch_stats, images, labels):
            model = nnx.merge(net.graphdef, params, batch_stats)
            outputs = model(images, train=True, key=jax.random.key(0))
            losses = segmentation_loss(
                outputs,
                labels,
                LossOptions(
                    aux_weight=0.4,  # there is no such head
                    presence_weight=make_lextal.PRESENCE_WEIGHT,
                    class_weights=tuple(make_lextal.class_weights()),
                ),
                align_corners=True,
            )
            statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            parts = jnp.stack([losses.total, losses.main, losses.presence])
            return losses.total, (parts, statistics)

        gradients, (losses, statistics) = differentiate(*net.state, net.images, net.labels)
        by_path = (dict(make_step.flatten(tree)) for tree in (gradients, statistics))
        return Step(load(request.param), np.asarray(losses), *by_path)


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_those_of_the_golden(name):
    np.testing.assert_allclose(
        make_lextal.fingerprint(CASES[name]),
        load(name)["fingerprint"],
        rtol=1e-9,
        err_msg="NumPy draws other numbers than it did: run tests/goldens/make_lextal.py",
    )


@pytest.mark.parametrize("name", CASES)
def test_scores_in_evaluation(name):
    golden, every = load(name), make_lextal.LOGITS_EVERY
    with jax.enable_x64(True):
        net = network(name)

        @jit
        def evaluate(state, images):
            model = nnx.merge(net.graphdef, *state)
            logits = model(images, train=False).logits
            # In evaluation the network leaves this head out; its input is the same.
            features = model.backbone(images, train=False)
            return jax.nn.log_softmax(logits), model.presence_head(features.auxiliary)

        scores, presence_logits = map(np.asarray, evaluate(net.state, net.images))
    assert scores.shape[1:3] == CASES[name].size
    scores = scores[:, ::every, ::every]
    assert difference(scores, golden["log_probabilities"]) <= TOLERANCES["log_probabilities"]
    assert difference(presence_logits, golden["presence_logits"]) <= TOLERANCES["presence_logits"]


def test_losses(step):
    np.testing.assert_allclose(step.losses, step.golden["losses"], rtol=TOLERANCES["losses"])


def test_gradients(step):
    tolerance, left_out = TOLERANCES["gradients"], make_lextal.BIASES_BEFORE_A_NORM
    assert_near("gradient", step.gradients, step.golden, tolerance, left_out=left_out)


def test_biases_before_a_norm_have_no_gradient(step):
    """The norm takes every constant away again; what is left is rounding, here and in the golden."""
    for path in make_lextal.BIASES_BEFORE_A_NORM:
        kernel = step.gradients[path.replace("bias", "kernel")]
        assert np.abs(step.gradients[path]).max() < 1e-12 * np.abs(kernel).max()


def test_running_statistics(step):
    assert_near("statistic", step.statistics, step.golden, TOLERANCES["statistics"])
