"""Class scores in evaluation agree with PyTorch at every depth of the authors, at image size.

The goldens are float64 values written by goldens/make_logits.py; this side computes in float32, as
users do. Each depth and size is a compilation of its own, so most of the deeper ones are marked slow.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import make_logits
import make_step
import numpy as np
import pytest
from flax import nnx

from pspnet_jax.models.families import FAMILIES
from pspnet_jax.passes import Network, structure
from pspnet_jax.resample import resize
from pspnet_jax.train_step import normalize

from compiling import jit

GOLDENS = Path(__file__).parent / "goldens"

BUDGET_SECONDS = 120

CASES = make_logits.CASES
TOLERANCE = 5e-6  # largest difference relative to the largest logit
# All sizes of the shallowest network, and of the others the one that bin 1 alone divides.
FAST = {("resnet50", size) for size in make_logits.SIZES}
FAST |= {("resnet101", (81, 49)), ("resnet152", (81, 49))}
RUNS = [
    pytest.param(name, size, marks=() if (name, size) in FAST else pytest.mark.slow)
    for name, case in CASES.items()
    for size in case.sizes
]


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"logits_{name}.npz") as file:
        return dict(file)


def logits_of(case: make_logits.Case, images: np.ndarray) -> np.ndarray:
    """Of evaluation in float32, at image size."""
    options = case.options(dtype="float32")
    normalization = FAMILIES["semseg"].normalization
    graphdef, _, _ = structure(Network(options, case.num_classes, normalization))

    @jit
    def evaluate(params, batch_stats, images):
        inputs = normalize(images, normalization, dtype=jnp.float32)
        outputs = nnx.merge(graphdef, params, batch_stats)(inputs, train=False)
        return resize(outputs.logits, images.shape[1:3], align_corners=options.align_corners)

    state = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), make_step.draw_state(case))
    return np.asarray(evaluate(*state, images))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if case.width == 64 else ())
        for name, case in CASES.items()
    ],
)
def test_inputs_are_those_of_the_golden(name):
    np.testing.assert_allclose(
        make_logits.fingerprint(CASES[name]),
        load(name)["fingerprint"],
        rtol=1e-9,
        err_msg="NumPy draws other numbers than it did: run tests/goldens/make_logits.py",
    )


@pytest.mark.parametrize(("name", "size"), RUNS, ids=str)
def test_logits(name, size):
    case, golden = CASES[name], load(name)[make_logits.key(size)]
    logits = case.stored(logits_of(case, make_logits.draw_images(case, size)))
    assert logits.shape == golden.shape
    difference = np.abs(logits - golden).max() / np.abs(golden).max()
    assert difference <= TOLERANCE
