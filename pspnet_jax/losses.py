"""Losses of scene parsing: pixelwise cross-entropy of the main and of the auxiliary head.

* Logits are stretched to label size first (the authors' choice; the paper's Caffe code trained against
  labels of 1/8 size).
* The mean is taken over the valid pixels of the whole batch given, which under `jax.jit` with a sharded
  batch is the *global* batch: no average of averages over devices.
* A batch without a valid pixel has loss 0 and gradient 0, never 0/0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pspnet_jax.arrays import IGNORE_LABEL, Labels, Logits, Outputs, Scalar
from pspnet_jax.resample import resize


class Losses(NamedTuple):
    """The value that is minimized, and its parts before weighting."""

    total: Scalar
    main: Scalar
    aux: Scalar


def cross_entropy(logits: Logits, labels: Labels) -> Scalar:
    """Mean of -log softmax(logits)[label] over the pixels that are not ignored.

    Args:
        logits: [batch, height, width, classes], of label size.
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.

    Returns:
        A scalar in nats; 0 where every pixel is ignored.
    """
    # A comparison instead of a gather: its gradient is elementwise, where a gather's is a scatter.
    classes = jnp.arange(logits.shape[-1], dtype=labels.dtype).reshape(1, 1, 1, -1)
    is_label = labels[..., None] == classes
    chosen = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    negative_log = jax.nn.logsumexp(logits, axis=-1) - chosen
    is_valid = labels != IGNORE_LABEL
    count = jnp.maximum(jnp.sum(is_valid), 1)
    return jnp.sum(jnp.where(is_valid, negative_log, 0)) / count


def segmentation_loss(
    outputs: Outputs, labels: Labels, *, aux_weight: float, align_corners: bool
) -> Losses:
    """main + aux_weight * aux (Zhao et al. 2017, section 3.3; the paper's weight is 0.4).

    Args:
        outputs: of the network in training, at head resolution.
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        aux_weight: 0 leaves the auxiliary head out of the total.
        align_corners: rule by which logits are stretched to label size.

    Returns:
        `Losses`, three scalars in nats per pixel.
    """
    size = (labels.shape[1], labels.shape[2])

    def at_label_size(logits: Logits) -> Scalar:
        return cross_entropy(resize(logits, size, align_corners=align_corners), labels)

    main = at_label_size(outputs.logits)
    if aux_weight == 0 or outputs.aux_logits is None:
        return Losses(main, main, jnp.zeros_like(main))
    aux = at_label_size(outputs.aux_logits)
    return Losses(main + aux_weight * aux, main, aux)
