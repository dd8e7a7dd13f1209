"""Whether both sides of `benchmark.py` compute the same: speed of something else would mean nothing."""

import dataclasses

import benchmark_jax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pspnet_torch
import torch
from benchmark_worker import Prepared, Task, random_batch
from flax import nnx

from pspnet_jax.arrays import Batch
from pspnet_jax.losses import LossOptions
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train_step import create_train_state, make_train_step, split_model


def prepare(task: Task) -> Prepared:
    """Relative differences of our network from `pspnet_torch.py` with the same weights.

    In float64 (JAX_ENABLE_X64=1), because in float32 rounding alone moves gradients by percents: of
    the logits at inference (the largest over the largest), of the training loss, and of all gradients
    together (Euclidean norms), without dropout. In float32 of the logits only.
    """
    if not jax.config.read("jax_enable_x64"):
        raise ValueError("JAX_ENABLE_X64 is not set: set it to 1, to compare in float64")
    images, labels = random_batch(task)
    facts = {"logits float32": _logits_difference(task, images, "float32")}
    facts["logits"] = _logits_difference(task, images, "float64")
    ours, theirs = _pair(task, "float64")
    gradients, loss = _gradients(ours, benchmark_jax.make_loss(task), images, labels)
    outputs = theirs.train()(pspnet_torch.normalize(torch.from_numpy(images), torch.float64))
    their_loss, *_ = pspnet_torch.segmentation_loss(*outputs, torch.from_numpy(labels).long())
    their_loss.backward()
    facts["loss"] = abs(loss / float(their_loss.detach()) - 1)
    facts["gradients"] = _gradient_difference(gradients, theirs, ours.options.pyramid_bins)
    return Prepared(lambda: None, lambda result: None, lambda: {"differences": facts})


def _pair(task: Task, dtype: str) -> tuple[PSPNet, pspnet_torch.PSPNet]:
    options = dataclasses.replace(benchmark_jax.make_options(task), dropout_rate=0.0, dtype=dtype)
    platform, rng = benchmark_jax.platform_of(task), np.random.default_rng(0)
    ours = PSPNet(options, task.num_classes, rng=rng, platform=platform)
    theirs = pspnet_torch.PSPNet(
        task.backbone, task.num_classes, width=task.width, dropout_rate=0.0
    )
    _, params, batch_stats = split_model(ours)
    pspnet_torch.load_parameters(theirs, params, batch_stats, bins=options.pyramid_bins)
    return ours, theirs.to(getattr(torch, dtype))


def _logits_difference(task: Task, images: np.ndarray, dtype: str) -> float:
    ours, theirs = _pair(task, dtype)
    normalized = pspnet_torch.normalize(torch.from_numpy(images), getattr(torch, dtype))
    graphdef, params, batch_stats = split_model(ours)

    def logits_of(params, batch_stats, images):
        return nnx.merge(graphdef, params, batch_stats)(images, train=False).logits

    with jax.default_matmul_precision("highest"):
        values = jnp.asarray(normalized.permute(0, 2, 3, 1).numpy())
        found = jax.jit(logits_of)(params, batch_stats, values)
    with torch.no_grad():
        expected = _head_logits(theirs.eval(), normalized).permute(0, 2, 3, 1).numpy()
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def _gradients(
    model: PSPNet, loss: LossOptions, images: np.ndarray, labels: np.ndarray
) -> tuple[dict, float]:
    """Of one training step, which hands them on as the state of an optimizer that changes nothing."""
    keeping = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(params),
        lambda gradients, state, params: (optax.tree.zeros_like(gradients), gradients),
    )
    step = make_train_step(model, keeping, lambda step: 0.0, loss=loss, seed=0)
    num_images = len(images)
    index, valid = np.arange(num_images, dtype=np.int32), np.ones(num_images, bool)
    batch = Batch(images, labels, index, valid)
    state = jax.tree.map(
        lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
        create_train_state(model, keeping),
    )
    state, metrics = jax.jit(step)(state, batch)
    return state.opt_state, float(metrics["loss"])


def _head_logits(model: pspnet_torch.PSPNet, images: torch.Tensor) -> torch.Tensor:
    """Logits before they are stretched to image size."""
    features = model.layer2(model.layer1(model.layer0(images)))
    return model.cls(model.ppm(model.layer4(model.layer3(features))))


def _gradient_difference(
    gradients: dict, model: pspnet_torch.PSPNet, bins: tuple[int, ...]
) -> float:
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    squares = total = 0.0
    for path, gradient in pspnet_torch.flatten(gradients):
        key, axes = pspnet_torch.torch_key(path, bins)
        gradient = gradient if axes is None else gradient.transpose(axes)
        squares += float(np.square(gradient - theirs[key]).sum())
        total += float(np.square(theirs[key]).sum())
    return (squares / total) ** 0.5
