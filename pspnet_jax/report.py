"""What one evaluation found, as report.json, report.md, report.html, a line and pictures.

* Every number names its protocol: the report holds each of its options, the checkpoint's digest, the
  software and the device.
* A class that does not occur is null, never 0.
* Images are shown in two ways: spread evenly over the split (the overview), and chosen by their mean IoU
  (panels and report.html).
* Only the first process writes.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from pspnet_jax import visualize
from pspnet_jax.arrays import IGNORE_LABEL, Example, LabelMap
from pspnet_jax.catalog import LabelSet
from pspnet_jax.data.pipeline import Source
from pspnet_jax.metrics import Confusion, ImageScore, Scores, group_iou, scores
from pspnet_jax.models.families import ModelOptions
from pspnet_jax.protocols import Protocol
from pspnet_jax.report_html import ShownImage, page
from pspnet_jax.report_text import as_json, markdown
from pspnet_jax.segmenter import Provenance
from pspnet_jax.version import __version__
from pspnet_jax.whole_files import write_whole

FILES = {"report": "report.html", "tables": "report.md", "picture": "panels/overview.png"}
"""What a command names at its end; beside them lie report.json and the panels."""
NUM_PANELS = 8
NUM_OF_RANK = 3
MAX_OVERVIEW_WIDTH = 2000  # pixels
_PANEL_NOTE = "errors: red is wrong, gray is correct, black is void"
_VOID_NOTE = "black is void"
_OF_NETWORK = ("family", "backbone", "width", "dtype")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The sums of one pass over a split, and a few predictions to look at."""

    confusion: Confusion
    images: list[ImageScore]
    """Of every image, in the order of the split."""
    ranked: dict[str, list[int]]
    """'best', 'median', 'worst' -> the images that stand for it."""
    seconds: float
    predictions: dict[int, LabelMap]
    """Index -> predicted class map of the images that are shown."""
    protocol: Protocol
    label_set: LabelSet
    model: ModelOptions

    @property
    def num_images(self) -> int:
        return len(self.images)

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
        return {f"{prefix}/{name}": value for name, value in (self.groups | found).items()}


def ranks(images: Sequence[ImageScore]) -> dict[str, list[int]]:
    """'best', 'median' and 'worst' -> up to three images each, no image twice.

    By mean IoU, the best ones from the top, the worst ones from the bottom; images that are void
    altogether are left out.
    """
    judged = [image for image in images if math.isfinite(image.mean_iou)]
    order = [image.index for image in sorted(judged, key=lambda i: (-i.mean_iou, i.index))]
    count = min(NUM_OF_RANK, max(1, len(order) // 3))
    best, rest = order[:count], order[count:]
    worst, rest = rest[::-1][:count], rest[: max(0, len(rest) - count)]
    first = (len(rest) - count + 1) // 2 if len(rest) > count else 0
    return {"best": best, "median": rest[first : first + count], "worst": worst}


def panel_indices(num_images: int) -> list[int]:
    """Positions of the images in the overview: spread evenly over the split."""
    count = min(NUM_PANELS, num_images)
    return [i * num_images // count for i in range(count)]


def report(
    evaluation: Evaluation,
    provenance: Provenance,
    *,
    split: str,
    names: Sequence[str] | None = None,
    origin: Mapping[str, str] | None = None,
) -> dict:
    """Everything about an evaluation as plain data; None marks a class that did not occur.

    Args:
        names: of the images, where the source knows them.
        origin: where the data come from.
    """
    found = evaluation.scores
    label_set = evaluation.label_set
    device = jax.devices()[0]
    return {
        "mean_iou": _or_none(found.mean_iou),
        "mean_accuracy": _or_none(found.mean_accuracy),
        "pixel_accuracy": _or_none(found.pixel_accuracy),
        "frequency_weighted_iou": _or_none(found.frequency_weighted_iou),
        "mean_dice": _or_none(found.mean_dice),
        "csail_score": _or_none(found.csail_score),
        "classes": _classes(found, label_set),
        "groups": {name: _or_none(iou) for name, iou in evaluation.groups.items()},
        "protocol": evaluation.protocol.to_json(),
        "data": {"labels": label_set.name, "split": split, "num_images": evaluation.num_images}
        | dict(origin or {}),
        "checkpoint": dataclasses.asdict(provenance),
        "network": {name: getattr(evaluation.model, name) for name in _OF_NETWORK},
        "software": {"pspnet_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "seconds": round(evaluation.seconds, 3),
        "images": [
            {"index": image.index}
            | ({"name": names[image.index]} if names else {})
            | {
                "mean_iou": _or_none(image.mean_iou),
                "pixel_accuracy": _or_none(image.pixel_accuracy),
            }
            for image in evaluation.images
        ],
        "confusion": evaluation.confusion.tolist(),
    }


def _classes(found: Scores, label_set: LabelSet) -> list[dict]:
    return [
        {
            "id": i,
            "name": name,
            "iou": _or_none(found.iou[i]),
            "accuracy": _or_none(found.accuracy[i]),
            "precision": _or_none(found.precision[i]),
            "dice": _or_none(found.dice[i]),
            "pixels": int(found.pixels[i]),
        }
        for i, name in enumerate(label_set.names)
    ]


def write_report(
    folder: Path,
    evaluation: Evaluation,
    provenance: Provenance,
    source: Source,
    *,
    split: str,
    origin: Mapping[str, str] | None = None,
) -> dict:
    """Write report.json, report.md, report.html and panels/ into `folder`; returns the report.

    Only the first process writes.

    Args:
        origin: where the data come from, for the report.
    """
    names: Sequence[str] | None = getattr(source, "names", None)
    contents = report(evaluation, provenance, split=split, names=names, origin=origin)
    if jax.process_index() != 0:
        return contents
    label_set = evaluation.label_set
    panels = folder / "panels"
    panels.mkdir(parents=True, exist_ok=True)
    for rank in evaluation.ranked:
        for old in panels.glob(f"{rank}_[0-9]*.png"):  # of an earlier evaluation
            old.unlink()
    shown = []
    for rank, indices in evaluation.ranked.items():
        for place, index in enumerate(indices, start=1):
            example, prediction = source[index], evaluation.predictions[index]
            picture = example_panel(example, prediction, label_set, with_errors=True)
            target = panels / f"{rank}_{place}_{index:06d}.png"
            write_whole(target, visualize.encode_png(picture))
            name = names[index] if names else f"image {index}"
            score = evaluation.images[index]
            shown.append(_shown(rank, name, score, example, prediction, label_set))
    write_whole(panels / "overview.png", visualize.encode_png(_overview(evaluation, source)))
    write_whole(folder / "report.md", markdown(contents))
    write_whole(folder / "report.html", page(contents, colors=label_set.colors, shown=shown))
    # Last: where it is, the report is whole.
    write_whole(folder / "report.json", as_json(contents))
    return contents


def _overview(evaluation: Evaluation, source: Source) -> np.ndarray:
    """Input, truth and prediction of images spread over the split, in two columns."""
    pictures = [
        example_panel(source[i], evaluation.predictions[i], evaluation.label_set, max_width=320)
        for i in panel_indices(evaluation.num_images)
    ]
    return visualize.shrunk(visualize.grid(pictures, columns=2), MAX_OVERVIEW_WIDTH)


def _shown(
    rank: str,
    name: str,
    score: ImageScore,
    example: Example,
    prediction: LabelMap,
    label_set: LabelSet,
) -> ShownImage:
    pictures, class_ids = _pictures(example, prediction, label_set)
    photographs = {title: pictures[title] for title in ("input", "errors")}
    maps = {title: pictures[title] for title in ("truth", "prediction")}
    return ShownImage(rank, name, score, photographs, maps, class_ids)


def _pictures(
    example: Example, prediction: LabelMap, label_set: LabelSet
) -> tuple[dict[str, np.ndarray], list[int]]:
    """Input, truth, prediction and errors by title, and the classes that occur; void is black."""
    is_void = example.labels == IGNORE_LABEL
    judged = np.where(is_void, np.uint8(IGNORE_LABEL), prediction)
    occurring = np.union1d(example.labels[~is_void], judged[~is_void])
    pictures = {
        "input": example.image,
        "truth": visualize.colorize(example.labels, label_set.palette),
        "prediction": visualize.colorize(judged, label_set.palette),
        "errors": visualize.errors(example.image, example.labels, prediction),
    }
    return pictures, [int(i) for i in occurring]


def example_panel(
    example: Example,
    prediction: LabelMap,
    label_set: LabelSet,
    *,
    with_errors: bool = False,
    max_width: int | None = None,
) -> np.ndarray:
    """Input, truth, prediction and, on request, errors of one example side by side.

    Args:
        max_width: larger pictures are brought to it, pixels.
    """
    pictures, class_ids = _pictures(example, prediction, label_set)
    has_void = bool((example.labels == IGNORE_LABEL).any())
    if not with_errors:
        del pictures["errors"]
    height, width = example.image.shape[:2]
    min_height = 240
    if max_width is not None:
        pictures = {t: visualize.shrunk(p, max_width) for t, p in pictures.items()}
        min_height = min(min_height, height * max(1, max_width // width))
        if width > max_width:
            min_height = 1
    return visualize.panel(
        pictures,
        class_ids=class_ids,
        names=label_set.names,
        palette=label_set.palette,
        min_height=min_height,
        note=_PANEL_NOTE if with_errors else _VOID_NOTE if has_void else "",
    )


def summary(evaluation: Evaluation) -> str:
    """One line: the scores, the groups, the protocol."""
    found = evaluation.scores
    groups = "".join(
        f", {name} {iou:.4f}" for name, iou in evaluation.groups.items() if math.isfinite(iou)
    )
    protocol = evaluation.protocol.describe()
    return (
        f"mean IoU {found.mean_iou:.4f}, pixel accuracy {found.pixel_accuracy:.4f}{groups} "
        f"({evaluation.num_images} images in {evaluation.seconds:.1f} s; protocol {protocol})"
    )


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
