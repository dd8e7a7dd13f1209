"""Evaluation: a segmenter over a split -> report.json, report.md and pictures.

* Training and the verb `evaluate` call the same `evaluate`, so there is one number.
* Every number names its protocol: the report holds each of its options.
* Images of equal size that follow each other go through together; each size compiles once.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import config as config_module
from pspnet_jax import visualize
from pspnet_jax.arrays import IGNORE_LABEL, Batch, Example, LabelMap
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.data.pipeline import Source, evaluation_examples, open_source
from pspnet_jax.metrics import Confusion, Scores, confusion_matrix, group_iou, scores
from pspnet_jax.segmenter import Segmenter, load
from pspnet_jax.version import __version__
from pspnet_jax.windows import Protocol

NUM_PANELS = 8
_SECONDS_BETWEEN_LINES = 15.0

log = logging.getLogger("pspnet_jax")


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


def evaluate(
    segmenter: Segmenter, source: Source, *, protocol: Protocol, batch_size: int
) -> Evaluation:
    """Predict every image of a source and count pixels by (true, predicted) class."""
    label_set = segmenter.label_set
    confusion = np.zeros((label_set.num_classes,) * 2, np.int64)
    shown = set(panel_indices(len(source)))
    predictions: dict[int, LabelMap] = {}
    start = last_line = time.monotonic()
    num_done = 0
    for batch in equal_size_batches(evaluation_examples(source), batch_size):
        class_maps = segmenter.class_maps(batch.images, protocol=protocol)
        for i in np.flatnonzero(batch.valid):
            truth = np.asarray(batch.labels[i])
            confusion += confusion_matrix(truth, class_maps[i], label_set.num_classes)
            if int(batch.index[i]) in shown:
                predictions[int(batch.index[i])] = class_maps[i]
        num_done += int(batch.valid.sum())
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            rate = num_done / (last_line - start)
            log.info("evaluated %d/%d images, %.1f images/s", num_done, len(source), rate)
    seconds = time.monotonic() - start
    return Evaluation(confusion, num_done, seconds, predictions, protocol, label_set)


def equal_size_batches(examples: Iterable[Example], batch_size: int) -> Iterator[Batch]:
    """Consecutive examples of equal size as batches of exactly `batch_size`, filled up with copies."""
    waiting: list[Example] = []
    for example in examples:
        if waiting and (
            example.image.shape != waiting[0].image.shape or len(waiting) == batch_size
        ):
            yield _stacked(waiting, batch_size)
            waiting = []
        waiting.append(example)
    if waiting:
        yield _stacked(waiting, batch_size)


def panel_indices(num_images: int) -> list[int]:
    """Positions of the images that are shown: spread evenly over the split."""
    count = min(NUM_PANELS, num_images)
    return [i * num_images // count for i in range(count)]


def report(evaluation: Evaluation, segmenter: Segmenter, *, split: str) -> dict:
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
        "protocol": dataclasses.asdict(evaluation.protocol),
        "data": {"labels": label_set.name, "split": split, "num_images": evaluation.num_images},
        "checkpoint": dataclasses.asdict(segmenter.provenance),
        "software": {"pspnet_jax": __version__, "jax": jax.__version__},
        "device": f"{jax.device_count()} x {device.device_kind}",
        "seconds": round(evaluation.seconds, 3),
    }


def write_report(
    folder: Path, evaluation: Evaluation, segmenter: Segmenter, source: Source, *, split: str
) -> dict:
    """Write report.json, report.md and panels/ into `folder`; returns the report."""
    contents = report(evaluation, segmenter, split=split)
    panels = folder / "panels"
    panels.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(contents, indent=2) + "\n")
    (folder / "report.md").write_text(markdown(contents))
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
    protocol = ", ".join(f"{k}={v}" for k, v in contents["protocol"].items())
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
    lines += ["| id | class | IoU | accuracy | pixels |", "|---|---|---|---|---|"]
    for row in contents["classes"]:
        values = f"{_percent(row['iou'])} | {_percent(row['accuracy'])} | {row['pixels']:,}"
        lines.append(f"| {row['id']} | {row['name']} | {values} |")
    return "\n".join(lines) + "\n"


def summary(evaluation: Evaluation) -> str:
    """One line: the scores, the groups, the protocol."""
    found = evaluation.scores
    groups = "".join(f", {name} {iou:.4f}" for name, iou in evaluation.groups.items())
    options = dataclasses.asdict(evaluation.protocol)
    protocol = options.pop("name") + "".join(f" {k}={v}" for k, v in options.items())
    return (
        f"mean IoU {found.mean_iou:.4f}, pixel accuracy {found.pixel_accuracy:.4f}{groups} "
        f"({evaluation.num_images} images in {evaluation.seconds:.1f} s; protocol {protocol})"
    )


def output_folder(workdir: Path, *, step: int, split: str, protocol: Protocol) -> Path:
    """Where a run keeps the report of one evaluation."""
    return workdir / "evaluation" / f"{step:08d}-{split}-{protocol.name}"


def run(
    checkpoint: str,
    *,
    config: ConfigDict | None,
    step: str = "best",
    split: str | None = None,
    protocol: str | None = None,
    flip: bool | None = None,
    output: str | None = None,
) -> dict:
    """The verb `evaluate`: a checkpoint over a split of its own data, or of that of `config`.

    Returns:
        The report, as written to report.json.

    Raises:
        ValueError: where there is no data section, or its label set is not the checkpoint's.
    """
    segmenter = load(checkpoint, step=step)
    run_config = Path(checkpoint) / "config.json"
    if config is None and not run_config.is_file():
        raise ValueError(
            f"{checkpoint} has no config.json: say where the data is with --config=FILE"
        )
    if config is None:
        config = config_module.from_json(run_config.read_text())
    label_set = load_label_set(config.data.labels)
    if label_set.names != segmenter.label_set.names:
        raise ValueError(
            f"data.labels={config.data.labels} has {label_set.num_classes} classes "
            f"({', '.join(label_set.names[:3])}, ...), the checkpoint was trained on "
            f"'{segmenter.label_set.name}' with {segmenter.label_set.num_classes}"
        )
    split = split or config.evaluate.split or config.data.val_split
    source = open_source(
        config.data.source,
        split=split,
        label_set=label_set,
        layout=config.data.layout,
        root=config.data.root,
    )
    chosen = segmenter.choose_protocol(protocol, flip=flip)
    evaluation = evaluate(segmenter, source, protocol=chosen, batch_size=config.evaluate.batch_size)
    number = segmenter.provenance.step
    folder = (
        Path(output)
        if output
        else output_folder(Path(checkpoint), step=number, split=split, protocol=chosen)
    )
    contents = write_report(folder, evaluation, segmenter, source, split=split)
    log.info("%s", summary(evaluation))
    log.info("%s", folder / "report.md")
    log.info("%s", folder / "panels" / "overview.png")
    return contents


def _stacked(examples: list[Example], batch_size: int) -> Batch:
    filled = examples + [examples[-1]] * (batch_size - len(examples))
    return Batch(
        images=np.stack([example.image for example in filled]),
        labels=np.stack([example.labels for example in filled]),
        index=np.array([example.index for example in filled], np.int32),
        valid=np.arange(batch_size) < len(examples),
    )


def _or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
