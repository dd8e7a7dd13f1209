"""Steps that changed nothing: named, counted, bounded."""

import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.skipped_steps import NotFiniteError, SkippedSteps

BUDGET_SECONDS = 20

FINE = (1.0, 2.0)
NAN, INFINITE = (float("nan"), 1.0), (1.0, float("inf"))


def hear(skipped, step, values, index=(3, -5, 1)):
    loss, norm = map(jnp.float32, values)
    skipped.hear(step, {"loss": loss, "gradient_norm": norm}, np.array(index, np.int32))


def test_images_are_named_and_the_count_goes_on(said):
    skipped = SkippedSteps(4, most_in_a_row=9, name_of=lambda i: f"image_{i}")
    for step, values in enumerate((FINE, NAN, FINE, INFINITE, (3e38, 3e38)), 11):
        hear(skipped, step, values)
    assert said == []  # nothing waits for a step before it is asked
    skipped.tell()
    assert [line.split(" changed")[0] for line in said] == ["step 12", "step 14", "step 15"]
    assert [line.split("(")[1].split(" such")[0] for line in said] == ["5", "6", "7"]
    assert all(line.endswith("its images: image_1, image_3") for line in said)
    skipped.tell()
    assert len(said) == 3


def test_too_many_in_a_row_end_it_across_calls():
    skipped = SkippedSteps(0, most_in_a_row=3, name_of=str)
    for step, values in enumerate((NAN, NAN, FINE, NAN, NAN), 1):
        hear(skipped, step, values)
    skipped.tell()
    hear(skipped, 6, NAN)
    with pytest.raises(
        NotFiniteError, match=r"3 steps in a row, up to step 6, .*\n?.*learning_rate"
    ):
        skipped.tell()
