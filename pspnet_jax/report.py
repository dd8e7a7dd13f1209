"""What one evaluation found, as report.json, report.md, a line and pictures.

* Every number names its protocol: the report holds each of its options, the checkpoint's digest, the
  software and the device.
* A class that does not occur is null, never 0.
"""

import dataclasses
import json
import math
from pathlib import Path

import cv2
import jax
import numpy as np

from pspnet_jax import visualize
from pspnet_jax.arrays import IGNORE_LABEL, Example, LabelMap
from pspnet_jax.catalog import LabelSet
from pspnet_jax.data.pipeline import Source
from pspnet_jax.metric_writer import write_whole
from pspnet_jax.metrics import Confusion, Scores, group_iou, scores
from pspnet_jax.protocols import Protocol
from pspnet_jax.segmenter import Provenance
from pspnet_jax.version import __version__

NUM_PANELS = 8


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The sums of one pass over a split, and a few predictions to look at."""

    confusion: Confusion
    num_images: int
    seconds: float
    predictions: dict[int, LabelMap]
    """Index -> predicted class map of the images that are shown."""
    protocol: Protocol
    label_set: LabelSet

    @property
    def scores(self) -> Scores:
        return scores(self.confusion, absent_class=self.protocol.absent_class)

    @property
    def groups(self) -> dict[str, float]:
        return group_iou(self.scores.iou, self.label_set.groups)

    @property
    def scalars(self) -> dict[str, float]:
        """The scores that are followed over training, named by protocol."""
        found = {"mean_iou": self.scores.mean_iou, "pixel_accuracy": self.scores.pixel_accuracy}
        prefix = f"evaluation/{self.protocol.name}"
        return {f"{prefix}/{name}": value for name, value in (found | self.groups).items()}


def panel_indices(num_images: int) -> list[int]:
    """Positions of the images that are shown: spread evenly over the split."""
    count = min(NUM_PANELS, num_images)
    return [i * num_images // count for i in range(count)]


def report(evaluation: Evaluation, provenance: Provenance, *, split: str) -> dict:
    """Everything about an evaluation as plain data; None marks a class that did not occur."""
    found = evaluation.scores
    label_set = evaluation.label_set
    classes = [
        {
            "id": i,
            "name": name,
            "iou": _or_none(found.iou[i]),
            "accuracy": _or_none(found.accuracy[i]),
            "pixels": int(found.pixels[i]),
        }
        for i, name in enumerate(label_set.names)
    ]
    device = jax.devices()[0]
    return {
        "mean_iou": _or_none(found.mean_iou),
        "mean_accuracy": _or_none(found.mean_accuracy),
        "pixel_accuracy": _or_none(found.pixel_accuracy),
        "frequency_weighted_iou": _or_none(found.frequency_weighted_iou),
        "mean_dice": _or_none(found.mean_dice),
        "csail_score": _or_none(found.csail_score),
        "classes": classes,
        "groups": {name: _or_none(iou) for name, iou in evaluation.groups.items()},
        "protocol": evaluation.protocol.to_json(),
        "data": {"labels": label_set.name, "split": split, "num_images": evaluation.num_images},
        "checkpoint": dataclasses.asdict(provenance),
        "software": {"pspnet_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "seconds": round(evaluation.seconds, 3),
    }


def write_report(
    folder: Path, evaluation: Evaluation, provenance: Provenance, source: Source, *, split: str
) -> dict:
    """Write report.json, report.md and panels/ into `folder`; returns the report."""
    contents = report(evaluation, provenance, split=split)
    panels = folder / "panels"
    panels.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "report.json", json.dumps(contents, indent=2) + "\n")
    write_whole(folder / "report.md", markdown(contents))
    pictures = []
    for index, prediction in sorted(evaluation.predictions.items()):
        picture = example_panel(source[index], prediction, evaluation.label_set)
        write_picture(panels / f"{index:06d}.png", picture)
        pictures.append(picture)
    write_picture(panels / "overview.png", visualize.grid(pictures, columns=2))
    return contents


def example_panel(example: Example, prediction: LabelMap, label_set: LabelSet) -> np.ndarray:
    """Input, truth and prediction of one example side by side; void of the truth is black in both."""
    is_void = example.labels == IGNORE_LABEL
    judged = np.where(is_void, np.uint8(IGNORE_LABEL), prediction)
    occurring = np.union1d(example.labels[~is_void], judged[~is_void])
    palette = label_set.palette
    return visualize.panel(
        {
            "input": example.image,
            "truth": visualize.colorize(example.labels, palette),
            "prediction": visualize.colorize(judged, palette),
        },
        class_ids=[int(i) for i in occurring],
        names=label_set.names,
        palette=palette,
    )


def write_picture(path: Path, picture: np.ndarray) -> None:
    """Write an RGB or one-channel picture as a file."""
    swapped = picture[..., ::-1] if picture.ndim == 3 else picture
    if not cv2.imwrite(str(path), swapped):
        raise OSError(f"{path} could not be written")


def markdown(contents: dict) -> str:
    """The report for people."""
    protocol = ", ".join(f"{k}={v}" for k, v in contents["protocol"].items() if v is not None)
    data = contents["data"]
    lines = [
        f"# {data['labels']}, {data['split']}, {data['num_images']} images",
        "",
        f"Protocol: {protocol}",
        "",
        "| mean IoU | mean accuracy | pixel accuracy | frequency-weighted IoU | mean Dice |",
        "|---|---|---|---|---|",
        "| "
        + " | ".join(
            _percent(contents[key])
            for key in (
                "mean_iou",
                "mean_accuracy",
                "pixel_accuracy",
                "frequency_weighted_iou",
                "mean_dice",
            )
        )
        + " |",
        "",
    ]
    if contents["groups"]:
        lines += ["| group | mean IoU |", "|---|---|"]
        lines += [f"| {name} | {_percent(iou)} |" for name, iou in contents["groups"].items()]
        lines.append("")
    absent = "counts as 0" if contents["protocol"]["absent_class"] == "zero" else "is left out"
    lines += [f"A class that nobody drew and nobody predicted (-) {absent} in the means.", ""]
    lines += ["| id | class | IoU | accuracy | pixels |", "|---|---|---|---|---|"]
    for row in contents["classes"]:
        values = f"{_percent(row['iou'])} | {_percent(row['accuracy'])} | {row['pixels']:,}"
        lines.append(f"| {row['id']} | {row['name']} | {values} |")
    return "\n".join(lines) + "\n"


def summary(evaluation: Evaluation) -> str:
    """One line: the scores, the groups, the protocol."""
    found = evaluation.scores
    groups = "".join(f", {name} {iou:.4f}" for name, iou in evaluation.groups.items())
    options = evaluation.protocol.to_json()
    protocol = options.pop("name")
    protocol += "".join(f" {k}={v}" for k, v in options.items() if v is not None)
    return (
        f"mean IoU {found.mean_iou:.4f}, pixel accuracy {found.pixel_accuracy:.4f}{groups} "
        f"({evaluation.num_images} images in {evaluation.seconds:.1f} s; protocol {protocol})"
    )


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
