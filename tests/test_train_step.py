"""The gradient step: one device equals eight, bad numbers change nothing, dropout follows the step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax import parallel, programs
from pspnet_jax.arrays import IGNORE_LABEL, Batch
from pspnet_jax.compose import compile_when_called, jit_over_mesh
from pspnet_jax.losses import PLAIN, LossOptions
from pspnet_jax.models.families import IMAGENET_8BIT
from pspnet_jax.models.pspnet import is_head
from pspnet_jax.optimizer import poly_schedule, sgd
from pspnet_jax.train_step import create_train_state, make_train_step, normalize

from compiling import jit
from networks import network
from pictures import ExampleSource

BUDGET_SECONDS = 180


def make_batch(size=8, *, num_classes=5, side=33):
    source = ExampleSource(size, sizes=((side, side),), num_classes=num_classes)
    examples = [source[i] for i in range(size)]
    labels = np.stack([example.labels for example in examples])
    # Unequal shares of ignored pixels: an average of averages over devices would show.
    for i in range(size):
        labels[i, : 3 * i] = IGNORE_LABEL
    images = np.stack([example.image for example in examples])
    return Batch(images, labels, np.arange(size, dtype=np.int32), np.ones(size, bool))


def make_optimizer(num_steps=10, learning_rate=0.01):
    schedule = poly_schedule(learning_rate, power=0.9, num_steps=num_steps)
    optimizer = sgd(
        schedule, momentum=0.9, weight_decay=1e-4, head_multiplier=10.0, is_head=is_head
    )
    return optimizer, schedule


def make_state_and_step(*, seed=0, loss=PLAIN, accumulate_steps=1, platform=None, **overrides):
    model = network(platform=platform, **overrides)
    optimizer, schedule = make_optimizer()
    step = make_train_step(
        model, optimizer, schedule, loss=loss, accumulate_steps=accumulate_steps, seed=seed
    )
    return create_train_state(model, optimizer), step


def run_on(devices, dtype, **options):
    """Two steps on a mesh of devices; parameters and images in `dtype`."""
    state, step = make_state_and_step(dtype=str(np.dtype(dtype)), **options)
    state = jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    mesh = parallel.make_mesh(devices)
    compiled = compile_when_called(step, mesh)
    state = jax.device_put(state, parallel.replicated(mesh))
    history = []
    for _ in range(2):
        state, metrics = compiled(state, parallel.shard_batch(make_batch(), mesh))
        history.append(metrics)
    return jax.device_get((vars(state), history))


def relative_difference(first, second):
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    # np.max, because the max of Python drops what is not a number.
    return np.max([np.abs(a - b).max() / max(np.abs(b).max(), 1e-30) for a, b in pairs])


@pytest.mark.slow
def test_one_device_equals_eight_in_float64():
    with jax.enable_x64(True):
        one, eight = (run_on(jax.devices()[:n], np.float64) for n in (1, 8))
    assert one[0]["params"]["head"]["conv"]["kernel"].dtype == np.float64
    assert relative_difference(one, eight) < 1e-9


def test_one_device_equals_eight_in_float32():
    one, eight = (run_on(jax.devices()[:n], np.float32) for n in (1, 8))
    for a, b in zip(one[1], eight[1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    # The momentum after the first steps is made of gradients.
    assert relative_difference(one[0]["opt_state"], eight[0]["opt_state"]) < 1e-4


ACCUMULATED = {
    "loss": LossOptions(class_weights=(1.0, 2.0, 0.5, 3.0, 1.0), label_smoothing=0.1),
    "dropout_rate": 0.0,
    "frozen_norm": True,
}


@pytest.mark.slow
def test_parts_of_a_batch_are_the_batch_where_nothing_depends_on_the_others():
    """Without batch statistics and dropout: loss, gradients and parameters, on one device and four."""
    with jax.enable_x64(True):
        whole = run_on(jax.devices()[:1], np.float64, **ACCUMULATED)
        for num_devices in (1, 4):
            devices = jax.devices()[:num_devices]
            parts = run_on(devices, np.float64, **ACCUMULATED, accumulate_steps=2)
            assert relative_difference(parts, whole) < 1e-9


@pytest.mark.slow
def test_each_part_moves_the_running_statistics():
    """Twice in one step, and other values than the whole batch gives."""
    state, step = make_state_and_step(accumulate_steps=2)
    after, metrics = jax.jit(step)(state, make_batch())
    assert np.isfinite(metrics["loss"])
    mean = after.batch_stats["backbone"]["stem"]["norm1"]["mean"]
    _, whole_step = small_step()
    whole = whole_step(state, make_batch())[0].batch_stats["backbone"]["stem"]["norm1"]["mean"]
    # Momentum 0.1: 0.19 of the mean instead of 0.1.
    assert float(jnp.linalg.norm(mean) / jnp.linalg.norm(whole)) == pytest.approx(1.9, abs=0.1)


@functools.cache
def small_step():
    state, step = make_state_and_step()
    return state, jit(step)


def test_step_moves_parameters_statistics_and_metrics():
    state, step = small_step()
    after, metrics = step(state, make_batch())
    assert int(after.step) == 1
    assert set(metrics) == {
        "loss",
        "main_loss",
        "aux_loss",
        "learning_rate",
        "gradient_norm",
        "skipped_steps",
    }
    assert metrics["loss"] == pytest.approx(
        float(metrics["main_loss"] + 0.4 * metrics["aux_loss"]), rel=1e-6
    )
    assert float(metrics["learning_rate"]) == pytest.approx(0.01)
    for before, now in ((state.params, after.params), (state.batch_stats, after.batch_stats)):
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, now)
        assert all(jax.tree.leaves(moved))


def test_loss_falls():
    state, step = small_step()
    losses = []
    for _ in range(6):
        state, metrics = step(state, make_batch())
        losses.append(float(metrics["main_loss"]))
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_follows_seed_and_step():
    state, step = small_step()
    batch = make_batch()
    first = step(state, batch)[1]["loss"]
    assert step(state, batch)[1]["loss"] == first
    later = state.replace(step=jnp.asarray(5, jnp.int32))
    assert step(later, batch)[1]["loss"] != first


@pytest.mark.parametrize("factor", [np.nan, 1e30], ids=["loss", "gradient"])
def test_what_is_not_finite_changes_nothing_but_the_counters(factor):
    """The loss, or the gradient of a finite one."""
    state, step = small_step()
    kernel = state.params["head"]["classifier"]["kernel"]
    broken = jax.tree.map(lambda x: x, state)
    broken.params["head"]["classifier"]["kernel"] = kernel * jnp.float32(factor)
    after, metrics = step(broken, make_batch())
    assert np.isfinite(metrics["loss"]) == np.isfinite(factor)
    assert not np.isfinite(metrics["gradient_norm"])
    assert (int(after.step), int(after.skipped_steps)) == (1, 1)
    for name in ("params", "batch_stats", "opt_state"):
        for a, b in zip(
            *map(jax.tree.leaves, (getattr(after, name), getattr(broken, name))), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_skipped_steps_do_not_move_the_schedule():
    state, step = small_step()
    later = state.replace(step=jnp.asarray(5, jnp.int32), skipped_steps=jnp.asarray(2, jnp.int32))
    _, metrics = step(later, make_batch())
    assert float(metrics["learning_rate"]) == pytest.approx(0.01 * (1 - 3 / 10) ** 0.9, rel=1e-5)


def test_everything_ignored_gives_no_loss_and_only_decay():
    state, step = small_step()
    batch = make_batch()
    batch = batch._replace(labels=np.full_like(batch.labels, IGNORE_LABEL))
    after, metrics = step(state, batch)
    assert float(metrics["loss"]) == 0
    assert float(metrics["gradient_norm"]) == 0
    kernel = state.params["backbone"]["layer1_0"]["conv1"]["kernel"]
    np.testing.assert_allclose(
        after.params["backbone"]["layer1_0"]["conv1"]["kernel"],
        kernel * (1 - 0.01 * 1e-4),
        rtol=1e-6,
    )


def test_normalization():
    images = np.full((1, 1, 1, 3), (124, 116, 104), np.uint8)
    found = normalize(images, IMAGENET_8BIT, dtype=jnp.float32)
    expected = (np.array([124, 116, 104]) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(found[0, 0, 0], expected, atol=1e-5)


def test_compiled_step_plans_less_memory_and_copies_no_state():
    """What `programs.compile_step` and the velocity ask of XLA for CPUs is done: nothing else would show it
    where a version of XLA knows its passes by other names."""
    state, step = make_state_and_step(platform="cpu")
    jitted = jit_over_mesh(step, parallel.make_mesh(jax.devices()[:1]))
    arguments = (state, make_batch(4))
    plain, ours = (
        jitted.lower(*arguments).compile(),
        programs.compile_step(jitted, *arguments, platform="cpu"),
    )
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (plain, ours)]
    assert temporary[1] < 0.7 * temporary[0]
    copies = [copied_arguments(program) for program in (plain, ours)]
    assert len(copies[0]) > 50
    assert copies[1] == []


def copied_arguments(program) -> list[str]:
    """Arrays of the state that a compiled program copies before it overwrites them."""
    text = program.as_text()
    main = text[text.index("\nENTRY ") :]
    arrays = re.findall(r"^ +(%[\w.-]+) = f32\[\d[^ ]* parameter\(", main, re.MULTILINE)
    copied = set(re.findall(r" copy\((?:f32[^ ]* )?(%[\w.-]+)\)", main))
    return [name for name in arrays if name in copied]
