"""Losses of scene parsing: pixelwise cross-entropy of two heads, and which classes are in the image.

* Logits are stretched to label size first (the authors' choice), or labels are thinned out to the size of
  the logits (the paper's Caffe code).
* The mean is taken over the valid pixels (or what `LossOptions` says) of the whole batch given, which under
  `jax.jit` with a sharded batch is the *global* batch: no average of averages over devices.
* A batch in which no pixel counts has loss 0 and gradient 0, never 0/0.
* Class weights weigh pixels (divided by the sum of their weights, as PyTorch's NLLLoss) and classes of the
  presence loss (divided by their number, as PyTorch's BCEWithLogitsLoss).
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, UInt8

from pspnet_jax.arrays import (
    IGNORE_LABEL,
    AnyArray,
    Labels,
    Logits,
    Outputs,
    PresenceLogits,
    Scalar,
)
from pspnet_jax.resample import (
    Maps,
    Platform,
    apply_matrix,
    resize_matrix,
    sample_positions,
)


@dataclass(frozen=True)
class LossOptions:
    """What is added up, and how each pixel counts.

    Args:
        aux_weight: of the pixelwise auxiliary head (0.4 in the paper, section 3.3); 0 leaves its loss out, and
            `model.aux_heads=()` the head.
        presence_weight: of the presence of classes (1 in the variant with image-level supervision); 0 leaves
            it out.
        class_weights: one factor for each class, of every part; None: 1.
        label_smoothing: this share of the target is spread evenly over all classes (Szegedy et al. 2016),
            weighted as in PyTorch's CrossEntropyLoss.
        ohem_threshold: only pixels whose own class has at most this probability count (online hard example
            mining; Shrivastava et al. 2016); None: all.
        ohem_share_min: at least this share of the valid pixels of the batch counts, the hardest ones.
        normalizer: 'valid' divides by the (weighted) pixels that count, 'all' by all pixels of the batch.
        resolution: 'full' stretches logits to label size; 'eighth' thins labels out to that of the logits,
            which is an eighth at the published output stride.
        tile_mib: of stretched logits of the whole batch that are made at a time, MiB; None: all at once.
    """

    aux_weight: float = 0.4
    presence_weight: float = 0.0
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ohem_threshold: float | None = None
    ohem_share_min: float = 1 / 16
    normalizer: str = "valid"
    resolution: str = "full"
    tile_mib: float | None = None


PLAIN = LossOptions()


def tile_mib_of(platform: Platform) -> float:
    """`LossOptions.tile_mib` that suits one device. What a CPU has in its caches is fast; on GPUs small tiles are
    slow, and of a tile only its gradient is ever stored."""
    return {"cpu": 4.0, "gpu": 4096.0}.get(platform or "", 64.0)


AnyLabels = UInt8[AnyArray, "_batch _height _width"]
"""Of another batch, or thinned out."""
PixelWeights = Float[jax.Array, "_batch _height _width"]


class Losses(NamedTuple):
    """The value that is minimized, and its parts before weighting."""

    total: Scalar
    main: Scalar
    aux: Scalar
    presence: Scalar


def cross_entropy(
    logits: Logits,
    labels: Labels,
    options: LossOptions = PLAIN,
    *,
    of_batch: AnyLabels | None = None,
) -> Scalar:
    """Mean of -log softmax(logits)[label] over the pixels that count.

    Args:
        logits: [batch, height, width, classes], of label size.
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        options: how pixels count; the weights of the parts are not used.
        of_batch: the labels of the whole batch, where `labels` are a part of it: the sum is then divided by
            the pixels of that, so that the losses of all parts add up.

    Returns:
        A scalar in nats; 0 where no pixel counts.
    """
    scores = _pixel_scores(logits, labels, options)
    return _mean_loss(scores, labels, options, logits.shape[-1], of_batch=of_batch)


def stretched_cross_entropy(
    logits: Maps,
    labels: Labels,
    options: LossOptions = PLAIN,
    *,
    align_corners: bool,
    of_batch: AnyLabels | None = None,
    platform: Platform = None,
) -> Scalar:
    """`cross_entropy` of logits of any size, stretched to label size.

    Logits are stretched down, which makes a map an eighth as large as the result; where all of them, stretched across
    too, are more than `options.tile_mib`, that is done in tiles of rows, of which the forward pass keeps three numbers a pixel at most; the
    backward pass makes each tile once more.

    Args:
        logits: [batch, h, w, classes].
        align_corners: rule of the stretching.
        platform: where it will run, see `resample.resize`.
    """
    batch, height, width = labels.shape
    num_classes = logits.shape[3]
    stretched_mib = batch * height * width * num_classes * logits.dtype.itemsize / 2**20
    num_tiles = 1 if options.tile_mib is None else math.ceil(stretched_mib / options.tile_mib)
    num_rows = -(-height // min(max(num_tiles, 1), height))  # all tiles alike: little is filled up
    rows = resize_matrix(logits.shape[1], height, align_corners=align_corners)
    columns = resize_matrix(logits.shape[2], width, align_corners=align_corners)
    stretched_down = apply_matrix(logits, rows, axis=1, platform=platform)

    def scores_of(stretched_down: Maps, labels: AnyLabels) -> PixelScores:
        tile = apply_matrix(stretched_down, columns, axis=2, platform=platform)
        return _pixel_scores(tile.astype(logits.dtype), labels, options, platform=platform)

    kept = jax.checkpoint_policies.save_only_these_names(_LOG_TOTAL)
    again = jax.checkpoint(scores_of, policy=kept)
    if num_rows == height:
        scores = (again if platform == "gpu" else scores_of)(stretched_down, labels)
        return _mean_loss(scores, labels, options, num_classes, of_batch=of_batch)
    num_tiles = -(-height // num_rows)
    missing = num_tiles * num_rows - height

    def tiles_of(x: AnyArray, filling: int) -> jax.Array:
        padding = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
        padded = jnp.pad(x, padding, constant_values=filling)
        return jnp.moveaxis(padded.reshape(batch, num_tiles, num_rows, *x.shape[2:]), 1, 0)

    given = tiles_of(stretched_down, 0), tiles_of(labels, IGNORE_LABEL)
    tiles = jax.lax.map(lambda tile: again(*tile), given)
    scores = jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, width)[:, :height], tiles
    )
    return _mean_loss(scores, labels, options, num_classes, of_batch=of_batch)


class PixelScores(NamedTuple):
    """What the loss needs of the logits of each pixel."""

    log_total: PixelWeights
    """log of the sum of exp(logit) over the classes."""
    own: PixelWeights
    """The logit of the pixel's class; 0 where it is ignored."""
    mean: PixelWeights | None
    """Mean of the logits, each times the weight of its class; for label smoothing."""


def _pixel_scores(
    logits: Logits, labels: AnyLabels, options: LossOptions, *, platform: Platform = None
) -> PixelScores:
    mean = None
    if options.label_smoothing:
        mean = jnp.mean(logits * _class_factors(logits, options), axis=-1)
    return PixelScores(_log_total(logits), _own(logits, labels, platform), mean)


_LOG_TOTAL = "log_total"  # its name where a checkpoint chooses what is kept


@jax.custom_vjp
def _log_total(logits: Logits) -> PixelWeights:
    """logsumexp over the classes; its gradient needs nothing else of the forward pass but its value."""
    return jax.nn.logsumexp(logits, axis=-1)


def _log_total_forward(logits: Logits):
    total = checkpoint_name(jax.nn.logsumexp(logits, axis=-1), _LOG_TOTAL)
    return total, (logits, total)


def _log_total_backward(saved, gradient: PixelWeights):
    logits, total = saved
    return (gradient[..., None] * jnp.exp(logits - total[..., None]),)


_log_total.defvjp(_log_total_forward, _log_total_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _own(logits: Logits, labels: AnyLabels, platform: Platform) -> PixelWeights:
    """The logit of each pixel's class; 0 where it is ignored. A gather, whose gradient would be a scatter:
    it is a comparison instead. So it is on GPUs from the start: what is gathered from would be stored."""
    num_classes = logits.shape[-1]
    if platform == "gpu":
        return jnp.sum(jnp.where(_is_label(labels, num_classes), logits, 0), axis=-1)
    place = labels.astype(jnp.int32)
    inside = jnp.minimum(place, num_classes - 1)[..., None]
    own = jnp.take_along_axis(logits, inside, axis=-1)[..., 0]
    return jnp.where(place < num_classes, own, 0)


def _own_forward(logits: Logits, labels: AnyLabels, platform: Platform):
    return _own(logits, labels, platform), (labels, logits[0, 0, 0])


def _own_backward(platform: Platform, saved, gradient: PixelWeights):
    labels, like = saved
    return jnp.where(_is_label(labels, like.size), gradient[..., None], 0), None


_own.defvjp(_own_forward, _own_backward)


def _mean_loss(
    scores: PixelScores,
    labels: Labels,
    options: LossOptions,
    num_classes: int,
    *,
    of_batch: AnyLabels | None,
) -> Scalar:
    """See `cross_entropy`."""
    dtype = scores.own.dtype
    weights = _pixel_weights(labels, options, num_classes, dtype)
    negative_log = scores.log_total - scores.own
    terms = weights * negative_log
    if scores.mean is not None:
        factors = options.class_weights or (1.0,)
        spread = scores.log_total * (sum(factors) / len(factors)) - scores.mean
        spread = jnp.where(labels == IGNORE_LABEL, 0, spread)
        terms = (1 - options.label_smoothing) * terms + options.label_smoothing * spread
    if options.ohem_threshold is not None:
        is_hard = _is_hard(negative_log, labels, options)
        terms, weights = terms * is_hard, weights * is_hard
    if options.normalizer == "all":
        count = jnp.asarray((labels if of_batch is None else of_batch).size, dtype)
    elif of_batch is None:
        count = jnp.sum(weights)
    else:
        count = jnp.sum(_pixel_weights(of_batch, options, num_classes, dtype))
    return jnp.where(count > 0, jnp.sum(terms) / jnp.where(count > 0, count, 1), 0)


def thin_out(labels: AnyLabels, size: tuple[int, int], *, align_corners: bool) -> AnyLabels:
    """The labels under the samples of a map of (height, width) `size`; every eighth pixel for 8n + 1."""
    rows, columns = (
        _nearest(old, new, align_corners=align_corners)
        for old, new in zip(labels.shape[1:], size, strict=True)
    )
    return jnp.asarray(labels)[:, rows][:, :, columns]


def presence_of(labels: Labels, num_classes: int) -> Bool[jax.Array, "batch classes"]:
    """Whether each class has a pixel in each image; ignored pixels have no class."""
    return jnp.any(_is_label(labels, num_classes), axis=(1, 2))


def presence_loss(logits: PresenceLogits, labels: Labels, options: LossOptions = PLAIN) -> Scalar:
    """Mean binary cross-entropy of the presence of every class in every image; an image without labels adds 0.

    Args:
        logits: [batch, classes].
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        options: of which the class weights are used; they weigh the terms of each class.

    Returns:
        A scalar in nats.
    """
    is_present = presence_of(labels, logits.shape[-1])
    terms = jax.nn.softplus(logits) - jnp.where(is_present, logits, 0)
    terms = jnp.where(is_present.any(axis=1, keepdims=True), terms, 0)
    return jnp.mean(terms * _class_factors(logits, options))


def presence_accuracy(logits: PresenceLogits, labels: Labels) -> Scalar:
    """Share of (image, class) pairs whose presence is told rightly, 0..1; images without labels do not count."""
    is_present = presence_of(labels, logits.shape[-1])
    counts = is_present.any(axis=1, keepdims=True)
    is_right = ((logits > 0) == is_present) & counts
    return is_right.sum() / jnp.maximum(counts.sum() * logits.shape[-1], 1)


def segmentation_loss(
    outputs: Outputs,
    labels: Labels,
    options: LossOptions = PLAIN,
    *,
    align_corners: bool,
    of_batch: AnyLabels | None = None,
    platform: Platform = None,
) -> Losses:
    """main + aux_weight * aux + presence_weight * presence.

    Args:
        outputs: of the network in training, at head resolution.
        labels: [batch, height, width], train ids or `IGNORE_LABEL`.
        options: weights of the parts, and how pixels count.
        align_corners: rule by which logits are stretched to label size.
        of_batch: see `cross_entropy`.
        platform: where it will run, see `resample.resize`.

    Returns:
        `Losses`, scalars in nats per pixel that counts or per (image, class); 0 for a part that is left out.
    """
    whole = labels if of_batch is None else of_batch

    def of_pixels(logits: Maps) -> Scalar:
        if options.resolution == "full":
            return stretched_cross_entropy(
                logits,
                labels,
                options,
                align_corners=align_corners,
                of_batch=of_batch,
                platform=platform,
            )
        size = (logits.shape[1], logits.shape[2])
        thin, thin_whole = (thin_out(x, size, align_corners=align_corners) for x in (labels, whole))
        return cross_entropy(
            logits, thin, options, of_batch=None if of_batch is None else thin_whole
        )

    main = of_pixels(outputs.logits)
    total, aux, presence = main, jnp.zeros_like(main), jnp.zeros_like(main)
    if options.aux_weight and outputs.aux_logits is not None:
        aux = of_pixels(outputs.aux_logits)
        total = total + options.aux_weight * aux
    if options.presence_weight and outputs.presence_logits is not None:
        share_of_batch = labels.shape[0] / whole.shape[0]
        presence = share_of_batch * presence_loss(outputs.presence_logits, labels, options)
        total = total + options.presence_weight * presence
    return Losses(total, main, aux, presence)


def _is_hard(
    negative_log: PixelWeights, labels: Labels, options: LossOptions
) -> Bool[jax.Array, "batch height width"]:
    """Valid pixels with a probability of at most the threshold, and the hardest ones in any case."""
    assert options.ohem_threshold is not None
    is_valid = labels != IGNORE_LABEL
    probability = jnp.where(is_valid, jnp.exp(-jax.lax.stop_gradient(negative_log)), jnp.inf)
    num_kept = jnp.ceil(options.ohem_share_min * jnp.sum(is_valid)).astype(jnp.int32)
    last_kept = jnp.sort(probability.reshape(-1))[jnp.maximum(num_kept - 1, 0)]
    return is_valid & (probability <= jnp.maximum(last_kept, options.ohem_threshold))


def _pixel_weights(
    labels: AnyLabels, options: LossOptions, num_classes: int, dtype: DTypeLike
) -> PixelWeights:
    """The weight of each pixel's class; 0 where it is ignored."""
    if options.class_weights is None:
        return (labels != IGNORE_LABEL).astype(dtype)
    factors = jnp.asarray(options.class_weights, dtype).reshape(1, 1, 1, -1)
    return jnp.sum(jnp.where(_is_label(labels, num_classes), factors, 0), axis=-1)


def _class_factors(like: jax.Array, options: LossOptions) -> Float[jax.Array, "*_ones classes"]:
    """The class weights along the last axis of an array that has one entry for each class."""
    factors = options.class_weights or (1.0,) * like.shape[-1]
    return jnp.asarray(factors, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def _nearest(old: int, new: int, *, align_corners: bool) -> np.ndarray:
    """Positions among `old` samples that lie nearest to each of `new` ones."""
    source = sample_positions(old, new, align_corners=align_corners)
    return np.floor(source + 0.5).astype(int).clip(0, old - 1)


def _is_label(
    labels: AnyLabels, num_classes: int
) -> Bool[jax.Array, "_batch _height _width classes"]:
    classes = jnp.arange(num_classes, dtype=labels.dtype).reshape(1, 1, 1, -1)
    return labels[..., None] == classes
