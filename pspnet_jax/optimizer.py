"""Optimizers and their schedules: SGD with poly as the authors train, Adam in steps as the variant does.

* PyTorch's form of SGD: v = momentum * v + (gradient + weight_decay * p); p = p - learning_rate * v. (Caffe
  multiplies the learning rate into v; the two drift apart as the learning rate falls.)
* Weight decay covers all parameters, norms and biases included, unless `decay_vectors` is False.
* Heads learn `head_multiplier` times as fast as the backbone.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

Schedule = optax.Schedule
Path = tuple[str, ...]


def poly_schedule(
    learning_rate: float,
    *,
    power: float,
    num_steps: int,
    minimum: float = 0.0,
    warmup_steps: int = 0,
) -> Schedule:
    """(learning_rate - minimum) * (1 - step / num_steps) ** power + minimum, times (step + 1) / warmup_steps
    while warming up.

    The first step (0) uses the full learning rate and the minimum is reached only after the last one, as in
    the authors' code (the paper gives power 0.9 and no warm-up, mmsegmentation a minimum of 1e-4).
    """
    poly = optax.polynomial_schedule(learning_rate, minimum, power, num_steps)
    return _warmed_up(poly, warmup_steps)


def multistep_schedule(
    learning_rate: float, *, milestones: Sequence[int], decay_factor: float, warmup_steps: int = 0
) -> Schedule:
    """learning_rate * decay_factor ** (number of milestones that are not after the step), warmed up as above.

    Args:
        milestones: steps, ascending.
    """
    steps = optax.piecewise_constant_schedule(
        learning_rate, dict.fromkeys(milestones, decay_factor)
    )
    return _warmed_up(steps, warmup_steps)


def sgd(
    schedule: Schedule,
    *,
    momentum: float,
    weight_decay: float,
    head_multiplier: float,
    is_head: Callable[[Path], bool],
    decay_vectors: bool = True,
) -> optax.GradientTransformation:
    """SGD in PyTorch's form, with parameters for which `is_head(path)` moving `head_multiplier` times as far.

    Args:
        schedule: step -> learning rate of the backbone.
        is_head: of a parameter's path of string keys.
        decay_vectors: whether weight decay covers norms, biases and slopes too.
    """
    return optax.chain(
        _decay(weight_decay, decay_vectors),
        # In the form of `optax.sgd`, whose states older checkpoints hold.
        optax.chain(_velocity(momentum), optax.scale_by_learning_rate(schedule)),
        _multiply_heads(head_multiplier, is_head),
    )


def adam(
    schedule: Schedule,
    *,
    weight_decay: float,
    head_multiplier: float,
    is_head: Callable[[Path], bool],
    decay_vectors: bool = True,
) -> optax.GradientTransformation:
    """Adam (Kingma and Ba 2015) with PyTorch's defaults: betas 0.9 and 0.999, epsilon 1e-8.

    Weight decay is added to the gradient before the moments, as PyTorch's Adam (not AdamW) does.
    """
    return optax.chain(
        _decay(weight_decay, decay_vectors),
        optax.adam(schedule),
        _multiply_heads(head_multiplier, is_head),
    )


def _velocity(momentum: float) -> optax.GradientTransformation:
    """`optax.trace`, whose result is made once. Else XLA for CPUs makes it a second time where the parameters
    move, from the old velocity, which then cannot be overwritten: a copy of both for every parameter."""
    trace = optax.trace(momentum)

    def update(updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None):
        velocity, _ = trace.update(updates, state, params)
        velocity = jax.tree.map(jax.lax.optimization_barrier, velocity)
        return velocity, optax.TraceState(velocity)

    return optax.GradientTransformation(trace.init, update)


def _decay(weight_decay: float, decay_vectors: bool) -> optax.GradientTransformation:
    # Without a state in either case, so that a run may go on with the other one.
    def add(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        return jax.tree.map(
            lambda g, p: g + weight_decay * p if decay_vectors or p.ndim > 1 else g, updates, params
        )

    return optax.stateless(add)


def _warmed_up(schedule: Schedule, warmup_steps: int) -> Schedule:
    if warmup_steps == 0:
        return schedule
    return lambda step: schedule(step) * jnp.minimum(1.0, (step + 1) / warmup_steps)


def _multiply_heads(
    head_multiplier: float, is_head: Callable[[Path], bool]
) -> optax.GradientTransformation:
    def multiply(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        def scale(path: tuple[jax.tree_util.DictKey, ...], update: jax.Array) -> jax.Array:
            keys = tuple(key.key for key in path)
            return update * head_multiplier if is_head(keys) else update

        return jax.tree.map_with_path(scale, updates)

    return optax.stateless(multiply)
