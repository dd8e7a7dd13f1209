"""What the counts of a data set suggest: another label set, a CSV of one's own, weights of the classes.

* `suspicions` are about masks that read without an error and mean something else.
* `suggest_labels` answers values that are out of range.
* `WEIGHTINGS` are the usual weights of rare classes; a class that does not occur gets 0 where its formula
  would divide by 0.
"""

import colorsys
import csv
import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.catalog import (
    COLUMNS,
    MAX_CLASSES,
    TWO_CLASSES,
    LabelSet,
    built_in_names,
    load_label_set,
)
from pspnet_jax.data.survey import Survey

_TRAIN_IDS = "_train_ids"  # how the name of a label set ends whose raw ids are train ids
_ENOUGH_TO_MISS_VOID = 20  # masks; most of ADE20K's hold some void
_ENOUGH_TO_MISS_CLASS_150 = 1000  # masks; 1 in 48 of ADE20K's for training holds it
_ENOUGH_FOR_A_STREET = 5  # masks; hardly one of Cityscapes' has neither vegetation, sky nor cars
_FEWEST_OF_A_BUILT_IN = 0.5  # share of its classes that must occur, to be suggested

Weights = Float64[np.ndarray, "classes"]


class Weighting(NamedTuple):
    """One way of weighing classes by how often they occur."""

    name: str
    formula: str
    source: str
    weights: Callable[[Survey, int], Weights]


def inverse_frequency(survey: Survey, num_classes: int) -> Weights:
    """1 / (C p): p is the share of the labeled pixels, C the number of classes."""
    pixels = survey.class_pixels[:num_classes].astype(float)
    return _divide(pixels.sum(), num_classes * pixels)


def enet(survey: Survey, num_classes: int) -> Weights:
    """1 / ln(1.02 + p): p is the share of the labeled pixels."""
    pixels = survey.class_pixels[:num_classes].astype(float)
    return 1 / np.log(1.02 + pixels / max(pixels.sum(), 1))


def median_frequency(survey: Survey, num_classes: int) -> Weights:
    """Median of f over f: f is the share of a class in all pixels of the images where it occurs."""
    pixels = survey.class_pixels[:num_classes].astype(float)
    frequency = _divide(pixels, survey.pixels_beside[:num_classes].astype(float))
    occurring = frequency[frequency > 0]
    return _divide(np.median(occurring) if len(occurring) else 0.0, frequency)


WEIGHTINGS = (
    Weighting(
        "inverse frequency",
        "1 / (C p), p the class's share of the labeled pixels, C the number of classes",
        "after King & Zeng 2001, Logistic Regression in Rare Events Data; scikit-learn's 'balanced'",
        inverse_frequency,
    ),
    Weighting(
        "ENet",
        "1 / ln(1.02 + p), p the class's share of the labeled pixels",
        "Paszke et al. 2016, ENet, arXiv:1606.02147",
        enet,
    ),
    Weighting(
        "median frequency",
        "median(f) / f, f the class's share of all pixels, void too, of the images where it occurs; the median "
        "is over the classes that occur",
        "Eigen & Fergus 2015, ICCV, arXiv:1411.4734",
        median_frequency,
    ),
)


def suspicions(label_set: LabelSet, survey: Survey) -> list[str]:
    """Sentences about masks whose values are all listed, and most likely mean something else."""
    found, images = set(survey.raw_ids), survey.raw_images
    classes = found - {IGNORE_LABEL}
    num_masks, name = survey.num_masks, label_set.name
    split = f"split '{survey.split}'"
    sentences = []
    if name == "ade20k" and IGNORE_LABEL in found and classes - {0}:  # 0 and 255 alone are binary
        sentences.append(
            f"{split}: 255 occurs in {images[255]} of {num_masks} masks, and in none of the official masks of "
            "ADE20K (0 is void there): these look converted to 0..149, so that wall would become void and each "
            "other class the one before it: say --config.data.labels=ade20k_train_ids"
        )
    elif name == "ade20k" and 150 not in found and num_masks >= _ENOUGH_TO_MISS_CLASS_150:
        sentences.append(
            f"{split}: 150 (flag) occurs in none of {num_masks} masks, though 1 in 48 of the official masks of "
            "ADE20K holds it: where these were converted to 0..149, say --config.data.labels=ade20k_train_ids"
        )
    lacks_void = 0 in found and IGNORE_LABEL not in found and num_masks >= _ENOUGH_TO_MISS_VOID
    if name == "ade20k_train_ids" and lacks_void:
        sentences.append(
            f"{split}: 255, void, occurs in none of {num_masks} masks, and 0 does: these look like the "
            "official masks of ADE20K, where 0 is void: say --config.data.labels=ade20k"
        )
    ends_early = bool(classes) and max(classes) <= 18 and num_masks >= _ENOUGH_FOR_A_STREET
    if name == "cityscapes" and ends_early:
        sentences.append(
            f"{split}: no value in 19..33 occurs in {num_masks} masks, though vegetation is 21, sky 23 and "
            "car 26: these look like labelTrainIds: say --config.data.labels=cityscapes_train_ids"
        )
    if IGNORE_LABEL in found and classes <= {0} and label_set.table[255] == IGNORE_LABEL:
        sentences.append(f"{split}: the masks hold nothing but {_listed(found)}; {TWO_CLASSES}")
    return sentences


class Suggestion(NamedTuple):
    """What to do about values that a label set does not list."""

    sentence: str
    labels: str | None
    """A built-in label set, for data.labels."""
    csv: str | None
    """Else the content of a CSV for data.labels."""


def suggest_labels(raw_ids: Sequence[int], label_set: LabelSet) -> Suggestion:
    """The label set that lists all raw ids that were found: a built-in one, or one to be saved."""
    found = set(raw_ids)
    known = _built_in_for(found, label_set.name)
    if known is not None:
        return Suggestion(
            f"the values found, {_listed(found)}, fit label set '{known}': say "
            f"--config.data.labels={known}",
            known,
            None,
        )
    if len(found) > MAX_CLASSES // 2:
        return Suggestion(
            f"{len(found)} different values were found: that many are the numbers of instances, or what "
            "interpolation and JPEG make of ids; save the masks as PNG, one id per class, resized by nearest "
            "neighbor",
            None,
            None,
        )
    if label_set.name not in built_in_names():
        unknown = {raw for raw in found if label_set.meaning(raw) is None}
        return Suggestion(
            f"label set '{label_set.name}' does not list {_listed(unknown)}: add them in its CSV to the raw_ids of a "
            "class or of void (id 255), or give them a line of their own",
            None,
            None,
        )
    if len(_class_ids(sorted(found), label_set)) < 2:
        return Suggestion(
            f"the masks hold nothing but {_listed(found)}, void left out one class at most: there is nothing to tell apart",
            None,
            None,
        )
    return Suggestion(
        f"no label set of this package fits the values found, {_listed(found)}; save this as mine.csv, correct "
        "the names, and say --config.data.labels=mine.csv",
        None,
        csv_of(sorted(found), label_set),
    )


def csv_of(raw_ids: Sequence[int], label_set: LabelSet) -> str:
    """A label set with one row per raw id: known ones keep name and color, 255 stays void."""
    classes = _class_ids(raw_ids, label_set)
    void = [raw for raw in raw_ids if raw not in classes]
    rows: list[list[object]] = []
    used: set[tuple[int, int, int]] = {(0, 0, 0)}
    for raw in classes:
        train_id = int(label_set.table[raw])
        if train_id < label_set.num_classes:
            name, color = label_set.names[train_id], label_set.colors[train_id]
        else:
            name, color = f"class_{raw}", _color(raw, used)
        if any(row[1] == name for row in rows):  # several raw ids of one class
            name, color = f"{name}_{raw}", _color(raw, used)
        used.add(color)
        rows.append([len(rows), name, *color, raw])
    if void:
        rows.append([IGNORE_LABEL, "void", 0, 0, 0, " ".join(map(str, void))])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    return text.getvalue()


def _class_ids(raw_ids: Sequence[int], label_set: LabelSet) -> list[int]:
    """Those that are not void; of 0 and 255 alone, which are masks of two classes, none is."""
    if set(raw_ids) == {0, IGNORE_LABEL}:
        return [*raw_ids]
    return [raw for raw in raw_ids if label_set.table[raw] != IGNORE_LABEL]


def _built_in_for(found: set[int], current: str) -> str | None:
    """The label set that lists all values: the other encoding of the current one, else the fullest."""
    fitting: dict[str, float] = {}
    for name in built_in_names():
        label_set = load_label_set(name)
        if name != current and all(label_set.meaning(raw) is not None for raw in found):
            classes = {raw for raws in label_set.raw_ids for raw in raws}
            fitting[name] = len(found & classes) / len(classes)
    for name in fitting:
        if name.removesuffix(_TRAIN_IDS) == current.removesuffix(_TRAIN_IDS):
            return name
    best = max(fitting, key=lambda name: fitting[name], default=None)
    return best if best is not None and fitting[best] >= _FEWEST_OF_A_BUILT_IN else None


def _color(raw: int, used: set[tuple[int, int, int]]) -> tuple[int, int, int]:
    """A color of its own: hues by the golden ratio, which spreads any number of them."""
    while True:
        shades = colorsys.hsv_to_rgb(raw * 0.6180339887 % 1, 0.75, 0.9)
        color = (round(shades[0] * 255), round(shades[1] * 255), round(shades[2] * 255))
        if color not in used:
            return color
        raw += 256


def _divide(numerator: Weights | float, denominator: Weights) -> Weights:
    """The quotient; 0 where the denominator is."""
    safe = np.where(denominator > 0, denominator, 1)
    return np.where(denominator > 0, numerator / safe, 0.0)


def _listed(values: set[int]) -> str:
    shown = sorted(values)
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return ", ".join(map(str, shown[:20])) + more
