"""What `check` found, as data and as a page of text."""

from dataclasses import dataclass, field

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.advice import WEIGHTINGS, Suggestion
from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.catalog import LabelSet
from pspnet_jax.data.survey import RAW_IDS, Survey

_NUM_SHOWN = 5
_NUM_NAMES = 20
_MOST_CSV_LINES = 40


@dataclass
class Check:
    """What was found in the splits of a config."""

    config: ConfigDict
    label_set: LabelSet
    surveys: dict[str, Survey] = field(default_factory=dict)
    """'training' and 'validation', as far as they could be listed."""
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Title -> sentences."""
    remarks: dict[str, list[str]] = field(default_factory=dict)
    suggestion: Suggestion | None = None

    @property
    def num_problems(self) -> int:
        return sum(map(len, self.problems.values()))

    def class_weights(self) -> dict[str, tuple[float, ...]]:
        """By the name of the weighting; of the training split, none where it could not be counted."""
        training = self.surveys.get("training")
        num_classes = self.label_set.num_classes
        if training is None or not training.class_pixels[:num_classes].any():
            return {}
        return {
            weighting.name: tuple(
                float(f"{weight:.4g}") for weight in weighting.weights(training, num_classes)
            )
            for weighting in WEIGHTINGS
        }


def text(check: Check) -> str:
    """The report for people: what the masks hold, weights of the classes, remarks, problems."""
    data = check.config.data
    where = f"{data.layout} in {data.root}" if data.root is not None else data.source
    lines = [f"{where}, labels '{check.label_set.name}', {check.label_set.num_classes} classes"]
    for role, found in check.surveys.items():
        lines += ["", *_overview(role, found)]
    lines += _raw_ids(check) + _classes(check) + _weights(check)
    lines += _listing("remarks", check.remarks)
    lines += _listing("problems", check.problems)
    lines += _suggestion(check.suggestion)
    count = check.num_problems
    end = f"{count:,} problem{'s' if count > 1 else ''}" if count else "nothing is wrong"
    return "\n".join([*lines, "", end])


def _overview(role: str, found: Survey) -> list[str]:
    sizes = ", ".join(f"{h}x{w} ({n:,})" for (h, w), n in found.sizes.most_common(_NUM_SHOWN))
    more = f" and {len(found.sizes) - _NUM_SHOWN} more" if len(found.sizes) > _NUM_SHOWN else ""
    kinds = ", ".join(f"{n:,} {kind}" for kind, n in found.kinds_of_masks.most_common())
    pixels = found.class_pixels.sum()
    void = f"{found.class_pixels[IGNORE_LABEL] / pixels:.2%} of the pixels" if pixels else "-"
    sample = ", a sample: they are painted on the fly" if "painted" in found.kinds_of_masks else ""
    return [
        f"{role} split '{found.split}': {found.num_images:,} images{sample}",
        f"  height x width  {sizes}{more}",
        f"  masks           {kinds}",
        f"  void            {void}",
    ]


def _raw_ids(check: Check) -> list[str]:
    """One row for each raw id that occurs in masks of one channel."""
    raw_ids = sorted({raw for found in check.surveys.values() for raw in found.raw_ids})
    if not raw_ids:
        return []
    rows = []
    for raw in raw_ids:
        counts = [
            (found.raw_pixels[raw], found.raw_pixels.sum(), found.raw_images[raw])
            for found in check.surveys.values()
        ]
        name = check.label_set.meaning(raw)
        rows.append((str(raw), "OUT OF RANGE" if name is None else name, counts))
    lines = ["", *_table("raw id", rows, list(check.surveys))]
    for raw in raw_ids:
        for role, found in check.surveys.items():
            if check.label_set.meaning(raw) is None and raw in found.first_with:
                lines.append(
                    f"  {raw} is out of range: {role}, {found.raw_images[raw]:,} masks, first in "
                    f"{found.first_with[raw]}"
                )
    return lines


def _classes(check: Check) -> list[str]:
    """Rows for the classes where raw ids do not say it all; the classes that never occur."""
    names, surveys = check.label_set.names, check.surveys
    lines = []
    in_colors = any(set(found.kinds_of_masks) - {RAW_IDS} for found in surveys.values())
    if in_colors or max(map(len, check.label_set.raw_ids)) > 1:
        rows = []
        for i, name in enumerate(names):
            counts = [
                (found.class_pixels[i], found.class_pixels.sum(), found.class_images[i])
                for found in surveys.values()
            ]
            if any(pixels for pixels, _, _ in counts):
                rows.append((str(i), name, counts))
        lines += ["", *_table("class", rows, list(surveys))] if rows else []
    for role, found in surveys.items():
        absent = [names[i] for i in np.flatnonzero(found.class_pixels[: len(names)] == 0)]
        if absent:
            lines += ["", f"{role}: {len(absent)} of {len(names)} classes never occur"]
            more = f" and {len(absent) - _NUM_NAMES} more" if len(absent) > _NUM_NAMES else ""
            lines.append("  " + ", ".join(absent[:_NUM_NAMES]) + more)
    return lines


def _table(head: str, rows: list[tuple[str, str, list]], roles: list[str]) -> list[str]:
    """Rows of (id, name, [(pixels, all pixels, images) of each split])."""
    width = max([16, *(len(name) for _, name, _ in rows)])
    lines = [
        f"{head:>8}  {'class':<{width}}"
        + "".join(f"{role + ' pixels':>20}{'share':>10}{'images':>9}" for role in roles)
    ]
    for number, name, counts in rows:
        cells = "".join(
            f"{pixels:>20,}{pixels / max(total, 1):>10.4%}{images:>9,}"
            for pixels, total, images in counts
        )
        lines.append(f"{number:>8}  {name:<{width}}{cells}")
    return lines


def _weights(check: Check) -> list[str]:
    weights = check.class_weights()
    if not weights:
        return ["", "class weights: none, no pixel of a class was counted in the training split"]
    lines = ["", "class weights, from the training split"]
    for weighting in WEIGHTINGS:
        numbers = ",".join(f"{weight:g}" for weight in weights[weighting.name])
        lines += [
            f"  {weighting.name}: {weighting.formula} ({weighting.source})",
            f"    --config.loss.class_weights='({numbers})'",
        ]
    return lines


def _listing(title: str, entries: dict[str, list[str]]) -> list[str]:
    lines = ["", title] if entries else []
    for kind, sentences in entries.items():
        lines.append(f"  {kind} ({len(sentences):,})")
        lines += ["    " + sentence.replace("\n", "\n    ") for sentence in sentences[:_NUM_SHOWN]]
        if len(sentences) > _NUM_SHOWN:
            lines.append(
                f"    ... and {len(sentences) - _NUM_SHOWN:,} more; --output=FILE lists all"
            )
    return lines


def _suggestion(suggestion: Suggestion | None) -> list[str]:
    if suggestion is None:
        return []
    lines = ["", f"suggestion: {suggestion.sentence}"]
    rows = (suggestion.csv or "").splitlines()
    lines += ["  " + row for row in rows[:_MOST_CSV_LINES]]
    if len(rows) > _MOST_CSV_LINES:
        lines.append(f"  ... and {len(rows) - _MOST_CSV_LINES} more; --output=FILE holds all")
    return lines


def to_json(check: Check) -> dict:
    """Everything found, as plain data."""
    data, suggestion = check.config.data, check.suggestion
    return {
        "data": {name: data[name] for name in ("source", "layout", "root")}
        | {"labels": data.labels, "num_classes": check.label_set.num_classes},
        "splits": {
            role: _survey_to_json(found, check.label_set) for role, found in check.surveys.items()
        },
        "problems": check.problems,
        "remarks": check.remarks,
        "suggestion": None if suggestion is None else suggestion._asdict(),
        "class_weights": check.class_weights(),
    }


def _survey_to_json(found: Survey, label_set: LabelSet) -> dict:
    return {
        "split": found.split,
        "num_images": found.num_images,
        "num_masks": found.num_masks,
        "sizes": [[*size, count] for size, count in found.sizes.most_common()],
        "masks": dict(found.kinds_of_masks),
        "raw_ids": [
            {
                "raw_id": raw,
                "class": label_set.meaning(raw),
                "pixels": int(found.raw_pixels[raw]),
                "images": int(found.raw_images[raw]),
                "first": found.first_with[raw],
            }
            for raw in found.raw_ids
        ],
        "classes": [
            {
                "id": i,
                "name": name,
                "pixels": int(found.class_pixels[i]),
                "images": int(found.class_images[i]),
            }
            for i, name in enumerate(label_set.names)
        ],
    }
