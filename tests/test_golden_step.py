"""Two training steps agree with PyTorch: logits, losses, gradients, running statistics, movements.

The goldens are computed in float64 by goldens/make_step.py. In float64 only a different formula
can make a difference, so there the tolerances are tight; float32 is what users run. Compiling takes
minutes: one network in each of them is always run, the other pairs are marked slow.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import make_step
import numpy as np
import optax
import pytest
from flax import nnx

from pspnet_jax.arrays import Batch
from pspnet_jax.losses import LossOptions
from pspnet_jax.models.families import FAMILIES
from pspnet_jax.models.pspnet import PSPNet, is_head
from pspnet_jax.optimizer import poly_schedule, sgd
from pspnet_jax.resample import resize
from pspnet_jax.train_step import create_train_state, make_train_step, normalize, split_model

from agreement import assert_near, difference
from compiling import jit

GOLDENS = Path(__file__).parent / "goldens"

BUDGET_SECONDS = 480  # the slow runs; the others take a tenth

CASES = make_step.CASES
# Largest difference relative to the largest value of the tensor (losses: to the loss). In float64
# they are as wide as the files, which hold float32, and the learning rate, which is computed in
# float32, need. The second step in float32 starts from parameters that already differ.
TOLERANCES = {
    "float64": {
        "logits": 2e-7,
        "losses": 1e-12,
        "gradients": 2e-7,
        "statistics": 2e-7,
        "movements": 1e-6,
    },
    "float32": {
        "logits": 1e-5,
        "losses": 1e-6,
        "gradients": 2e-4,
        "statistics": 5e-6,
        "movements": 3e-2,
    },
}
# 152 layers amplify more: in float64 the rounding of the learning rate, in float32 every rounding.
TOLERANCES_152 = {
    "float64": TOLERANCES["float64"] | {"movements": 1e-5},
    "float32": TOLERANCES["float32"] | {"losses": 5e-6, "gradients": 1e-3, "movements": 0.3},
}
RUNS = [
    ("resnet50", "float64"),
    ("resnet18", "float32"),
    pytest.param(("resnet50", "float32"), marks=pytest.mark.slow),
    pytest.param(("resnet18", "float64"), marks=pytest.mark.slow),
    pytest.param(("resnet101", "float64"), marks=pytest.mark.slow),
    pytest.param(("resnet101", "float32"), marks=pytest.mark.slow),
    pytest.param(("resnet152", "float64"), marks=pytest.mark.slow),
    pytest.param(("resnet152", "float32"), marks=pytest.mark.slow),
]


@dataclass
class Run:
    """A golden file, and what this package makes of the same inputs."""

    golden: dict[str, np.ndarray]
    tolerances: dict[str, float]
    logits: np.ndarray
    losses: list[float]
    gradients: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    movements: dict[str, np.ndarray]


@pytest.fixture(scope="module", params=RUNS, ids=str)
def run(request) -> Run:
    case, dtype = request.param
    with np.load(GOLDENS / f"step_{case}.npz") as file:
        golden = dict(file)
    with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
        values = _take_two_steps(CASES[case], dtype)
    tolerances = TOLERANCES_152 if case == "resnet152" else TOLERANCES
    return Run(golden, tolerances[dtype], **values)


def _take_two_steps(case, dtype: str) -> dict:
    model = PSPNet(case.options(dtype=dtype), make_step.NUM_CLASSES, rng=np.random.default_rng(0))
    options = dict(make_step.OPTIMIZER)
    schedule = poly_schedule(options.pop("learning_rate"), power=0.9, num_steps=make_step.NUM_STEPS)
    # A trace without decay passes gradients on and keeps the last ones where a test can read them.
    optimizer = optax.chain(optax.trace(0.0), sgd(schedule, **options, is_head=is_head))
    params, batch_stats = (
        jax.tree.map(lambda x: jnp.asarray(x, dtype), tree) for tree in make_step.draw_state(case)
    )
    state = create_train_state(model, optimizer)
    state = state.replace(params=params, batch_stats=batch_stats, opt_state=optimizer.init(params))
    images, labels = make_step.draw_batch(case)
    batch = Batch(images, labels, np.arange(3, dtype=np.int32), np.ones(3, bool))
    step = jit(
        make_train_step(model, optimizer, schedule, loss=LossOptions(make_step.AUX_WEIGHT), seed=0)
    )
    first, metrics = step(state, batch)
    second, _ = step(first, batch)
    before, after = dict(make_step.flatten(params)), dict(make_step.flatten(second.params))
    return {
        "logits": _logits(model, params, batch_stats, images),
        "losses": [metrics["loss"], metrics["main_loss"], metrics["aux_loss"]],
        "gradients": dict(make_step.flatten(first.opt_state[0].trace)),
        "statistics": dict(make_step.flatten(first.batch_stats)),
        "movements": {path: after[path] - before[path] for path in before},
    }


def _logits(model: PSPNet, params: dict, batch_stats: dict, images: np.ndarray) -> np.ndarray:
    """Of evaluation, at image size, every fourth pixel."""
    graphdef, _, _ = split_model(model)
    dtype = jax.tree.leaves(params)[0].dtype

    @jit
    def evaluate(params, batch_stats, images):
        inputs = normalize(images, FAMILIES["semseg"].normalization, dtype=dtype)
        outputs = nnx.merge(graphdef, params, batch_stats)(inputs, train=False)
        return resize(outputs.logits, images.shape[1:3], align_corners=True)

    every = make_step.LOGITS_EVERY
    return np.asarray(evaluate(params, batch_stats, images))[:, ::every, ::every]


def test_inputs_are_those_of_the_golden():
    for name, case in CASES.items():
        with np.load(GOLDENS / f"step_{name}.npz") as golden:
            np.testing.assert_allclose(
                make_step.fingerprint(case, *make_step.draw_batch(case)),
                golden["fingerprint"],
                rtol=1e-9,
                err_msg="NumPy draws other numbers than it did: run tests/goldens/make_step.py",
            )


def test_logits(run):
    assert difference(run.logits, run.golden["logits"]) <= run.tolerances["logits"]


def test_losses(run):
    np.testing.assert_allclose(run.losses, run.golden["losses"], rtol=run.tolerances["losses"])


def test_gradients(run):
    assert_near("gradient", run.gradients, run.golden, run.tolerances["gradients"])


def test_running_statistics(run):
    assert_near("statistic", run.statistics, run.golden, run.tolerances["statistics"])


def test_parameters_after_two_steps(run):
    assert_near("movement", run.movements, run.golden, run.tolerances["movements"])
