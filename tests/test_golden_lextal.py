"""The variant with image-level supervision agrees with PyTorch: scores, losses, gradients, statistics.

The goldens are float64 values written by goldens/make_lextal.py, and so is this side computed: only a
different formula can make a difference. Each network is one compilation; the longer ones are marked slow.
"""

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.losses import LossOptions, segmentation_loss
from pspnet_jax.models.families import IMAGENET_8BIT
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train_step import normalize, split_model

GOLDENS = Path(__file__).parent / "goldens"
sys.path.insert(0, str(GOLDENS))
import make_lextal  # noqa: E402
import make_step  # noqa: E402

BUDGET_SECONDS = 240  # the slow runs; the others take a third

CASES = make_lextal.CASES
# Compiling takes nearly all of the time, and without LLVM's optimization a third less.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# Largest difference relative to the largest value of the tensor (losses: to the loss). They are as wide
# as the files need, which hold float32 of all but the losses and the presence logits.
TOLERANCES = {
    "log_probabilities": 2e-7,
    "presence_logits": 1e-12,
    "losses": 1e-12,
    "gradients": 2e-7,
    "statistics": 2e-7,
}
EVALUATED = list(CASES)
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
    options = case.options(dtype="float64")
    model = nnx.eval_shape(lambda: PSPNet(options, make_lextal.NUM_CLASSES, rng=NoRandomNumbers()))
    graphdef, _, _ = split_model(model)
    state = jax.tree.map(jnp.asarray, make_lextal.draw_state(case))
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


def _assert_near(kind: str, values: dict[str, np.ndarray], golden: dict) -> None:
    """The norm and one product of every tensor, then every value of those stored in full."""
    differences = {}
    summaries = zip(sorted(values), make_step.summarize(values), golden[f"{kind}s"], strict=True)
    for path, (norm, product), (golden_norm, golden_product) in summaries:
        if kind == "gradient" and path in make_lextal.BIASES_BEFORE_A_NORM:
            continue
        larger = np.maximum(abs(norm - golden_norm), abs(product - golden_product))
        differences[path] = larger / golden_norm
    full = {name.partition("/")[2] for name in golden if name.startswith(f"{kind}/")}
    assert full <= set(values)
    for path in full:
        worst = _difference(values[path], golden[f"{kind}/{path}"])
        differences[path] = np.maximum(differences[path], worst)
    wrong = {path: x for path, x in differences.items() if not x <= TOLERANCES[f"{kind}s"]}
    assert not wrong, f"{len(wrong)} of {len(differences)} {kind}s differ: {wrong}"


def _difference(value: np.ndarray, golden: np.ndarray) -> float:
    """Largest difference relative to the largest golden value."""
    assert value.shape == golden.shape
    return np.abs(value - golden).max() / np.abs(golden).max()


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_those_of_the_golden(name):
    np.testing.assert_allclose(
        make_lextal.fingerprint(CASES[name]),
        load(name)["fingerprint"],
        rtol=1e-9,
        err_msg="NumPy draws other numbers than it did: run tests/goldens/make_lextal.py",
    )


@pytest.mark.parametrize("name", EVALUATED)
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
    assert _difference(scores, golden["log_probabilities"]) <= TOLERANCES["log_probabilities"]
    assert _difference(presence_logits, golden["presence_logits"]) <= TOLERANCES["presence_logits"]


def test_losses(step):
    np.testing.assert_allclose(step.losses, step.golden["losses"], rtol=TOLERANCES["losses"])


def test_gradients(step):
    _assert_near("gradient", step.gradients, step.golden)


def test_biases_before_a_norm_have_no_gradient(step):
    """The norm takes every constant away again; what is left is rounding, here and in the golden."""
    for path in make_lextal.BIASES_BEFORE_A_NORM:
        kernel = step.gradients[path.replace("bias", "kernel")]
        assert np.abs(step.gradients[path]).max() < 1e-12 * np.abs(kernel).max()


def test_running_statistics(step):
    _assert_near("statistic", step.statistics, step.golden)
