"""Losses of scene parsing: pixelwise cross-entropy of two heads, and which classes are in the image.

* Logits are stretched to label size first (the authors' choice; the paper's Caffe code trained against
  labels of 1/8 size).
* The mean is taken over the valid pixels of the whole batch given, which under `jax.jit` with a sharded
  batch is the *global* batch: no average of averages over devices.
* A batch without a valid pixel has loss 0 and gradient 0, never 0/0.
* Class weights weigh pixels (divided by the sum of their weights, as PyTorch's NLLLoss) and classes of the
  presence loss (divided by their number, as PyTorch's BCEWithLogitsLoss).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from pspnet_jax.arrays import IGNORE_LABEL, Labels, Logits, Outputs, PresenceLogits, Scalar
from pspnet_jax.resample import resize


class Losses(NamedTuple):
    """The value that is minimized, and its parts before weighting."""

    total: Scalar
    main: Scalar
    aux: Scalar
    presence: Scalar


ClassWeights = Sequence[float] | None
"""One factor for each class; None: 1."""


def cross_entropy(logits: Logits, labels: Labels, *, class_weights: ClassWeights = None) -> Scalar:
    """Mean of -log softmax(logits)[label] over the pixels that are not ignored.

    Args:
        logits: [batch, height, width, classes], of label size.
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        class_weights: weigh the pixels of each class.

    Returns:
        A scalar in nats; 0 where every pixel is ignored.
    """
    # A comparison instead of a gather: its gradient is elementwise, where a gather's is a scatter.
    is_label = _is_label(labels, logits.shape[-1])
    chosen = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    negative_log = jax.nn.logsumexp(logits, axis=-1) - chosen
    is_valid = labels != IGNORE_LABEL
    if class_weights is None:
        count = jnp.maximum(jnp.sum(is_valid), 1)
        return jnp.sum(jnp.where(is_valid, negative_log, 0)) / count
    factors = jnp.asarray(class_weights, logits.dtype).reshape(1, 1, 1, -1)
    weights = jnp.sum(jnp.where(is_label, factors, 0), axis=-1)
    total = jnp.sum(weights)
    return jnp.sum(weights * negative_log) / jnp.where(total > 0, total, 1)


def presence_of(labels: Labels, num_classes: int) -> Bool[jax.Array, "batch classes"]:
    """Whether each class has a pixel in each image; ignored pixels have no class."""
    return jnp.any(_is_label(labels, num_classes), axis=(1, 2))


def presence_loss(
    logits: PresenceLogits, labels: Labels, *, class_weights: ClassWeights = None
) -> Scalar:
    """Mean binary cross-entropy of the presence of every class in every image.

    Args:
        logits: [batch, classes].
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        class_weights: weigh the terms of each class.

    Returns:
        A scalar in nats.
    """
    is_present = presence_of(labels, logits.shape[-1])
    terms = jax.nn.softplus(logits) - jnp.where(is_present, logits, 0)
    if class_weights is not None:
        terms = terms * jnp.asarray(class_weights, logits.dtype).reshape(1, -1)
    return jnp.mean(terms)


def presence_accuracy(logits: PresenceLogits, labels: Labels) -> Scalar:
    """Share of (image, class) pairs whose presence is told rightly, 0..1."""
    return jnp.mean((logits > 0) == presence_of(labels, logits.shape[-1]))


def segmentation_loss(
    outputs: Outputs,
    labels: Labels,
    *,
    aux_weight: float,
    presence_weight: float = 0.0,
    class_weights: ClassWeights = None,
    align_corners: bool,
) -> Losses:
    """main + aux_weight * aux (Zhao et al. 2017, section 3.3; the paper's weight is 0.4)
    + presence_weight * presence (the variant with image-level supervision: 1).

    Args:
        outputs: of the network in training, at head resolution.
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        aux_weight: 0 leaves the auxiliary head out of the total.
        presence_weight: 0 leaves the presence head out of the total.
        class_weights: of every part.
        align_corners: rule by which logits are stretched to label size.

    Returns:
        `Losses`, scalars in nats per pixel or per (image, class); 0 for a part that is left out.
    """
    size = (labels.shape[1], labels.shape[2])

    def at_label_size(logits: Logits) -> Scalar:
        stretched = resize(logits, size, align_corners=align_corners)
        return cross_entropy(stretched, labels, class_weights=class_weights)

    main = at_label_size(outputs.logits)
    total, aux, presence = main, jnp.zeros_like(main), jnp.zeros_like(main)
    if aux_weight and outputs.aux_logits is not None:
        aux = at_label_size(outputs.aux_logits)
        total = total + aux_weight * aux
    if presence_weight and outputs.presence_logits is not None:
        presence = presence_loss(outputs.presence_logits, labels, class_weights=class_weights)
        total = total + presence_weight * presence
    return Losses(total, main, aux, presence)


def _is_label(labels: Labels, num_classes: int) -> Bool[jax.Array, "batch height width classes"]:
    classes = jnp.arange(num_classes, dtype=labels.dtype).reshape(1, 1, 1, -1)
    return labels[..., None] == classes
