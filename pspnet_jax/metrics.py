"""Segmentation metrics as mergeable sums: a confusion matrix, added up over images, batches and hosts.

* Void pixels (`IGNORE_LABEL` in the truth) count nowhere.
* A class that is neither in the truth nor predicted has no IoU: None in the table. Whether it counts as
  0 in the mean or is left out is the protocol's choice.
* An image on its own is judged by the classes that occur in it, under every protocol.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from pspnet_jax.arrays import IGNORE_LABEL, LabelMap

Confusion = Int64[np.ndarray, "true_class predicted_class"]
PerClass = Float64[np.ndarray, "classes"]


def confusion_matrix(truth: LabelMap, prediction: LabelMap, num_classes: int) -> Confusion:
    """Pixels of one image by (true class, predicted class)."""
    valid = truth != IGNORE_LABEL
    pairs = truth[valid].astype(np.int64) * num_classes + prediction[valid]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclass(frozen=True)
class Scores:
    """What a confusion matrix says. Fractions lie in 0 .. 1; NaN marks what is not defined."""

    iou: PerClass
    accuracy: PerClass
    """Share of the true pixels that are predicted as the class (recall)."""
    precision: PerClass
    """Share of the predicted pixels that are of the class."""
    dice: PerClass
    pixels: Int64[np.ndarray, "classes"]
    mean_iou: float
    mean_accuracy: float
    mean_dice: float
    pixel_accuracy: float
    frequency_weighted_iou: float

    @property
    def csail_score(self) -> float:
        """Mean of mean IoU and pixel accuracy; the scene-parsing challenge's score where absent classes
        count as 0."""
        return (self.mean_iou + self.pixel_accuracy) / 2


def scores(confusion: Confusion, *, absent_class: str) -> Scores:
    """IoU = intersection / union and its relatives.

    Args:
        confusion: summed over the data set.
        absent_class: 'skip' leaves classes with empty union out of the means, 'zero' counts them as 0.
    """
    if absent_class not in ("skip", "zero"):
        raise ValueError(f"absent_class={absent_class!r} must be 'skip' or 'zero'")
    intersection = np.diag(confusion).astype(np.float64)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    union = true + predicted - intersection
    iou, accuracy = _ratio(intersection, union), _ratio(intersection, true)
    dice = _ratio(2 * intersection, true + predicted)
    frequency = _ratio(true, np.full_like(union, true.sum()))
    return Scores(
        iou=iou,
        accuracy=accuracy,
        precision=_ratio(intersection, predicted),
        dice=dice,
        pixels=true,
        mean_iou=_mean(iou, absent_class),
        mean_accuracy=_mean(accuracy, absent_class),
        mean_dice=_mean(dice, absent_class),
        pixel_accuracy=float(_ratio(intersection.sum(keepdims=True), true.sum(keepdims=True))[0]),
        frequency_weighted_iou=float(np.nansum(frequency * iou)) if true.sum() else float("nan"),
    )


class ImageScore(NamedTuple):
    """How well one image of a data set is predicted; NaN where all of it is void."""

    index: int
    """Position in the data set."""
    mean_iou: float
    """Over the classes that occur in its truth or its prediction."""
    pixel_accuracy: float


def image_score(index: int, confusion: Confusion) -> ImageScore:
    """The scores of one image on its own."""
    found = scores(confusion, absent_class="skip")
    return ImageScore(index, found.mean_iou, found.pixel_accuracy)


def group_iou(iou: PerClass, groups: Sequence[str | None]) -> dict[str, float]:
    """Mean IoU of each named group of classes and of the rest, 'others' ({} where no class has a group)."""
    names = list(dict.fromkeys(group for group in groups if group))
    if not names:
        return {}
    members = {name: [i for i, group in enumerate(groups) if group == name] for name in names}
    rest = [i for i, group in enumerate(groups) if not group]
    if rest:
        members["others"] = members.get("others", []) + rest
    return {name: _mean(iou[ids], "skip") for name, ids in members.items()}


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> PerClass:
    nothing = np.full(numerator.shape, np.nan)
    return np.divide(numerator, denominator, out=nothing, where=denominator > 0)


def _mean(values: PerClass, absent_class: str) -> float:
    if absent_class == "zero":
        return float(np.nan_to_num(values).mean())
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
