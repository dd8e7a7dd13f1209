"""Schedules against their formulas; SGD and Adam against PyTorch's rules written in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pspnet_jax.optimizer import adam, multistep_schedule, poly_schedule, sgd

BUDGET_SECONDS = 15


def test_poly_schedule_is_its_formula():
    schedule = poly_schedule(0.01, power=0.9, num_steps=1000)
    for step in (0, 1, 500, 999, 1000):
        assert float(schedule(step)) == pytest.approx(0.01 * (1 - step / 1000) ** 0.9, rel=1e-4)
    assert float(schedule(0)) == pytest.approx(0.01)
    assert float(schedule(999)) > 0
    assert float(schedule(1000)) == 0


def test_poly_schedule_ends_at_its_minimum():
    schedule = poly_schedule(0.01, power=0.9, num_steps=1000, minimum=1e-4)
    for step in (0, 500, 1000):
        expected = (0.01 - 1e-4) * (1 - step / 1000) ** 0.9 + 1e-4
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4)


def test_warmup_rises_linearly_and_then_leaves_the_schedule_alone():
    plain = poly_schedule(0.1, power=0.9, num_steps=100)
    warm = poly_schedule(0.1, power=0.9, num_steps=100, warmup_steps=10)
    assert float(warm(0)) == pytest.approx(0.01, rel=1e-4)
    assert float(warm(4)) == pytest.approx(0.5 * float(plain(4)), rel=1e-5)
    assert float(warm(9)) == pytest.approx(float(plain(9)))
    assert float(warm(50)) == pytest.approx(float(plain(50)))


def test_state_of_sgd_has_the_form_of_optax_sgd():
    """Checkpoints from before the velocity was made by `_velocity` go on."""
    schedule = poly_schedule(0.1, power=0.9, num_steps=10)
    params = {"kernel": jnp.ones((2, 2))}
    ours = sgd(
        schedule, momentum=0.9, weight_decay=1e-4, head_multiplier=2.0, is_head=lambda path: True
    )
    state = ours.init(params)
    wanted = jax.tree.structure(optax.sgd(schedule, momentum=0.9).init(params))
    for _ in range(2):
        assert jax.tree.structure(state[1]) == wanted
        _, state = ours.update(params, state, params)


def test_sgd_is_pytorchs_rule():
    rng = np.random.default_rng(0)
    start = {
        "backbone": {"kernel": rng.standard_normal(3)},
        "head": {"bias": rng.standard_normal(2)},
    }
    start = {k: {n: v.astype(np.float32) for n, v in d.items()} for k, d in start.items()}
    schedule = poly_schedule(0.1, power=0.9, num_steps=5)
    optimizer = sgd(
        schedule,
        momentum=0.9,
        weight_decay=0.01,
        head_multiplier=10.0,
        is_head=lambda path: path[0] == "head",
    )
    params = {k: {n: jnp.asarray(v) for n, v in d.items()} for k, d in start.items()}
    state = optimizer.init(params)
    expected = {k: {n: v.astype(np.float64) for n, v in d.items()} for k, d in start.items()}
    velocity = {k: {n: np.zeros_like(v) for n, v in d.items()} for k, d in expected.items()}
    for step in range(5):
        gradient = {k: {n: np.cos(v + step) for n, v in d.items()} for k, d in expected.items()}
        updates, state = optimizer.update(
            {
                k: {n: jnp.asarray(v, jnp.float32) for n, v in d.items()}
                for k, d in gradient.items()
            },
            state,
            params,
        )
        params = optax.apply_updates(params, updates)
        rate = 0.1 * (1 - step / 5) ** 0.9
        for k, multiplier in (("backbone", 1), ("head", 10)):
            for n in expected[k]:
                decayed = gradient[k][n] + 0.01 * expected[k][n]
                velocity[k][n] = 0.9 * velocity[k][n] + decayed
                expected[k][n] = expected[k][n] - rate * multiplier * velocity[k][n]
                np.testing.assert_allclose(params[k][n], expected[k][n], rtol=1e-5, atol=1e-6)


def test_multistep_schedule_falls_at_its_milestones():
    schedule = multistep_schedule(0.1, milestones=(3, 5), decay_factor=0.5)
    found = [float(schedule(step)) for step in range(7)]
    np.testing.assert_allclose(found, [0.1, 0.1, 0.1, 0.05, 0.05, 0.025, 0.025], rtol=1e-6)
    warm = multistep_schedule(0.1, milestones=(3,), decay_factor=0.5, warmup_steps=4)
    np.testing.assert_allclose([float(warm(1)), float(warm(3))], [0.05, 0.05], rtol=1e-6)


def test_adam_is_pytorchs_rule():
    rng = np.random.default_rng(0)
    start = {"backbone": rng.standard_normal(3), "head": rng.standard_normal(2)}
    schedule = multistep_schedule(0.1, milestones=(2,), decay_factor=0.1)
    optimizer = adam(
        schedule, weight_decay=0.01, head_multiplier=10.0, is_head=lambda path: path[0] == "head"
    )
    params = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    state = optimizer.init(params)
    expected = dict(start)
    first, second = (dict.fromkeys(start, 0.0) for _ in range(2))
    for step in range(4):
        gradient = {name: np.cos(value + step) for name, value in expected.items()}
        sent = {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}
        updates, state = optimizer.update(sent, state, params)
        params = optax.apply_updates(params, updates)
        rate = 0.1 if step < 2 else 0.01
        for name, multiplier in (("backbone", 1), ("head", 10)):
            decayed = gradient[name] + 0.01 * expected[name]
            first[name] = 0.9 * first[name] + 0.1 * decayed
            second[name] = 0.999 * second[name] + 0.001 * decayed**2
            mean, square = (
                first[name] / (1 - 0.9 ** (step + 1)),
                second[name] / (1 - 0.999 ** (step + 1)),
            )
            move = rate * multiplier * mean / (np.sqrt(square) + 1e-8)
            expected[name] = expected[name] - move
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [sgd, adam])
def test_norms_and_biases_can_be_left_out_of_weight_decay(make):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    options = {"weight_decay": 0.1, "head_multiplier": 1.0, "is_head": lambda path: False}
    options |= {"momentum": 0.9} if make is sgd else {}
    no_gradient = {name: jnp.zeros_like(x) for name, x in params.items()}
    for decays in (True, False):
        optimizer = make(lambda step: 0.5, decay_vectors=decays, **options)
        updates, _ = optimizer.update(no_gradient, optimizer.init(params), params)
        assert (updates["kernel"] < 0).all()
        assert bool((updates["bias"] < 0).all()) == decays
