"""One gradient step, as a pure function of a train state and a batch.

* No mesh, no logging, no config: `train` compiles this over the devices, tests call it as it is.
* The model is split once into a definition and plain dictionaries; it is put together again inside.
* Dropout draws from (seed, step), so a resumed run needs no random state.
* A loss or gradient that is not finite changes nothing but the count of skipped steps.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.typing import DTypeLike

from pspnet_jax.arrays import Batch, Images, Labels, Outputs, RawImages, Scalar
from pspnet_jax.losses import Losses, LossOptions, presence_accuracy, segmentation_loss
from pspnet_jax.models.families import FAMILIES, Normalization
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.optimizer import Schedule


@struct.dataclass
class TrainState:
    """All that training changes. As in any tree, shapes or other things may stand where arrays do."""

    step: Any
    """i32 scalar: optimizer steps taken, skipped ones included."""
    params: dict
    batch_stats: dict
    opt_state: optax.OptState
    skipped_steps: Any
    """i32 scalar: steps whose loss or gradient was not finite."""


Metrics = dict[str, Scalar]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, dict, dict]:
    """The definition of a network or a part of one, its parameters and batch statistics as plain dictionaries."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def create_train_state(model: PSPNet, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    _, params, batch_stats = split_model(model)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=optimizer.init(params),
        skipped_steps=jnp.zeros((), jnp.int32),
    )


def normalize(
    images: RawImages | Images, normalization: Normalization, *, dtype: DTypeLike
) -> Images:
    """(RGB - mean) / standard deviation of images within 0 .. 255."""
    mean, std = (
        jnp.asarray(x, dtype).reshape(1, 1, 1, 3) for x in (normalization.mean, normalization.std)
    )
    return (images.astype(dtype) - mean) / std


def make_train_step(
    model: PSPNet,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    *,
    loss: LossOptions,
    accumulate_steps: int = 1,
    seed: int,
) -> TrainStep:
    """The function (state, batch) -> (next state, metrics) of a network and its optimizer.

    Args:
        model: gives the structure, and the platform on which the step will run; its values are not used.
        schedule: step -> learning rate, for the metrics (the optimizer has its own).
        loss: what is minimized.
        accumulate_steps: parts of the batch that go through one after the other, for less memory. Losses are
            divided by the pixels of the whole batch; each part has its own batch statistics, and moves the
            running ones. Without those and dropout the gradients are those of one pass.
        seed: of dropout.

    Returns:
        A pure function. Metrics are scalars: those of `_loss_metrics`, learning_rate (of the backbone),
        gradient_norm, skipped_steps.
    """
    gradient_of = _make_gradient(model, loss, share=1 / accumulate_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate_steps == 1:
            gradients, (metrics, batch_stats) = gradient_of(
                state.params, state.batch_stats, batch, key, None
            )
        else:
            gradients, metrics, batch_stats = _accumulate(
                gradient_of, state, batch, key, num_parts=accumulate_steps
            )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        gradient_norm = optax.tree.norm(gradients)
        proposed = TrainState(state.step + 1, params, batch_stats, opt_state, state.skipped_steps)
        next_state = _if_finite(metrics["loss"] + gradient_norm, proposed, state)
        return next_state, metrics | {
            # The optimizer counts the steps it took: a skipped one does not move its schedule.
            "learning_rate": jnp.asarray(schedule(state.step - state.skipped_steps)),
            "gradient_norm": gradient_norm,
            "skipped_steps": next_state.skipped_steps,
        }

    return train_step


def _make_gradient(model: PSPNet, loss: LossOptions, *, share: float) -> Callable:
    """The gradient of the loss of one part, with its metrics and the batch statistics after it.

    Args:
        share: of one part in the batch.
    """
    graphdef, _, _ = split_model(model)
    options, platform = model.options, model.platform
    normalization = FAMILIES[options.family].normalization

    def loss_of(
        params: dict, batch_stats: dict, part: Batch, key: jax.Array, of_batch: Labels | None
    ) -> tuple[Scalar, tuple[Metrics, dict]]:
        dtype = jax.tree.leaves(params)[0].dtype
        model = nnx.merge(graphdef, params, batch_stats)
        outputs = model(normalize(part.images, normalization, dtype=dtype), train=True, key=key)
        losses = segmentation_loss(
            outputs,
            part.labels,
            loss,
            align_corners=options.align_corners,
            of_batch=of_batch,
            platform=platform,
        )
        statistics = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        metrics = _loss_metrics(losses, outputs, part.labels, share=share)
        return losses.total, (metrics, statistics)

    return jax.grad(loss_of, has_aux=True)


def _accumulate(
    gradient_of: Callable, state: TrainState, batch: Batch, key: jax.Array, *, num_parts: int
) -> tuple[dict, Metrics, dict]:
    """Gradients and metrics of a batch whose parts go through one after the other, and the batch
    statistics after the last one."""
    parts = jax.tree.map(lambda x: _parts(x, num_parts), batch)
    arguments = (state.params, state.batch_stats, jax.tree.map(lambda x: x[0], parts), key)
    _, (metrics, _) = jax.eval_shape(gradient_of, *arguments, batch.labels)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (state.params, metrics))

    def add_part(sums: tuple[dict, Metrics, dict], numbered: tuple[jax.Array, Batch]):
        number, part = numbered
        *so_far, batch_stats = sums
        gradients, (metrics, batch_stats) = gradient_of(
            state.params, batch_stats, part, jax.random.fold_in(key, number), batch.labels
        )
        added = jax.tree.map(jnp.add, tuple(so_far), (gradients, metrics))
        return (*added, batch_stats), None

    sums, _ = jax.lax.scan(add_part, (*zeros, state.batch_stats), (jnp.arange(num_parts), parts))
    return sums


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[batch, ...] -> [count, batch / count, ...]; every `count`-th image, so that no device sends one."""
    return jnp.moveaxis(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0)


def _loss_metrics(losses: Losses, outputs: Outputs, labels: Labels, *, share: float) -> Metrics:
    """Nats per pixel of the global batch that counts; of presence, per image and class, and a share of 0..1.

    Args:
        share: of these images in the batch; the metrics of its parts add up.
    """
    metrics = {"loss": losses.total, "main_loss": losses.main}
    if outputs.aux_logits is not None:
        metrics["aux_loss"] = losses.aux
    if outputs.presence_logits is not None:
        metrics["presence_loss"] = losses.presence
        metrics["presence_accuracy"] = share * presence_accuracy(outputs.presence_logits, labels)
    return metrics


def _if_finite(value: Scalar, proposed: TrainState, state: TrainState) -> TrainState:
    """The proposed state where the value is finite, else the old one with the step counted as skipped."""
    skipped = dataclasses.replace(state, step=state.step + 1, skipped_steps=state.skipped_steps + 1)
    is_finite = jnp.isfinite(value)
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), proposed, skipped)
