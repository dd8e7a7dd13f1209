"""Evaluation: a segmenter over a split of a data set.

* Training and the verb `evaluate` call the same `evaluate`, so there is one number.
* Images of equal size that follow each other go through together; each size compiles once.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import config as config_module
from pspnet_jax.arrays import Batch, Example, LabelMap
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.data.pipeline import Source, evaluation_examples, open_source
from pspnet_jax.metrics import confusion_matrix
from pspnet_jax.protocols import Protocol
from pspnet_jax.report import Evaluation, panel_indices, summary, write_report
from pspnet_jax.segmenter import Segmenter, load

_SECONDS_BETWEEN_LINES = 15.0

log = logging.getLogger("pspnet_jax")


def evaluate(
    segmenter: Segmenter, source: Source, *, protocol: Protocol, batch_size: int
) -> Evaluation:
    """Predict every image of a source and count pixels by (true, predicted) class.

    Args:
        batch_size: images that go through together, or windows under a protocol that has them.
    """
    label_set = segmenter.label_set
    confusion = np.zeros((label_set.num_classes,) * 2, np.int64)
    shown = set(panel_indices(len(source)))
    predictions: dict[int, LabelMap] = {}
    start = last_line = time.monotonic()
    num_done = 0
    num_images = 1 if protocol.slides else batch_size
    for batch in equal_size_batches(evaluation_examples(source), num_images):
        class_maps = segmenter.class_maps(
            batch.images, protocol=protocol, windows_per_pass=batch_size
        )
        for i in np.flatnonzero(batch.valid):
            truth = np.asarray(batch.labels[i])
            confusion += confusion_matrix(truth, class_maps[i], label_set.num_classes)
            if int(batch.index[i]) in shown:
                predictions[int(batch.index[i])] = class_maps[i]
        num_done += int(batch.valid.sum())
        if time.monotonic() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            rate = num_done / (last_line - start)
            log.info("evaluated %d/%d images, %.2g images/s", num_done, len(source), rate)
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


def open_split(data: ConfigDict, *, split: str, label_set: LabelSet) -> Source:
    """The examples of one split, as the config's data section says."""
    return open_source(
        data.source, split=split, label_set=label_set, layout=data.layout, root=data.root
    )


def output_folder(
    workdir: Path, *, step: int, split: str, protocol: Protocol, label_set: LabelSet
) -> Path:
    """Where a run keeps the report of one evaluation."""
    name = split.removesuffix(".txt").replace("/", "_")  # a split may be the path of a list file
    return workdir / "evaluation" / f"{step:08d}-{name}-{protocol.label(label_set)}"


def run(
    checkpoint: str,
    *,
    config: ConfigDict | None,
    step: str = "best",
    split: str | None = None,
    protocol: str | None = None,
    protocol_options: Mapping[str, Any] | None = None,
    output: str | None = None,
) -> dict:
    """The verb `evaluate`: a checkpoint over a split of its own data, or of that of `config`.

    Args:
        checkpoint: folder of a run or of a converted model.
        config: where the data is; None: the run's own. Of its section `evaluate` only split and
            batch_size are used, the protocol is the checkpoint's or the arguments'.
        protocol: by name; None: the checkpoint's own.
        protocol_options: override the protocol's; None values do not.
        output: folder of the report; None: in the run.

    Returns:
        The report, as written to report.json.

    Raises:
        ValueError: where there is no data section, or its label set is not the checkpoint's.
    """
    segmenter = load(checkpoint, step=step)
    config, label_set = _find_data(checkpoint, config, segmenter.label_set)
    split = split or config.evaluate.split or config.data.val_split
    source = open_split(config.data, split=split, label_set=label_set)
    chosen = segmenter.choose_protocol(protocol, **(protocol_options or {}))
    if protocol is None and config.evaluate.protocol != chosen.name:
        log.info(
            "the checkpoint's protocol is %s; the config's is used with --protocol=%s",
            chosen.name,
            config.evaluate.protocol,
        )
    evaluation = evaluate(segmenter, source, protocol=chosen, batch_size=config.evaluate.batch_size)
    number = segmenter.provenance.step
    folder = (
        Path(output)
        if output
        else output_folder(
            Path(checkpoint),
            step=number,
            split=split,
            protocol=chosen,
            label_set=segmenter.label_set,
        )
    )
    contents = write_report(folder, evaluation, segmenter.provenance, source, split=split)
    log.info("%s", summary(evaluation))
    log.info("%s", folder / "report.md")
    log.info("%s", folder / "panels" / "overview.png")
    return contents


def _find_data(
    checkpoint: str, config: ConfigDict | None, stored_set: LabelSet
) -> tuple[ConfigDict, LabelSet]:
    """The config whose data is evaluated on, and how its masks are read."""
    if config is not None:
        config_module.validate(config)
        label_set = load_label_set(config.data.labels)
    else:
        run_config = Path(checkpoint) / "config.json"
        if not run_config.is_file():
            raise ValueError(
                f"{checkpoint} has no config.json: say where the data is, e.g. with "
                "--config=configs/ade20k.py --config.data.root=DIR"
            )
        config, label_set = config_module.from_json(run_config.read_text()), stored_set
    if label_set.names != stored_set.names:
        raise ValueError(
            f"data.labels={config.data.labels} has {label_set.num_classes} classes "
            f"({', '.join(label_set.names[:3])}, ...), the checkpoint was trained on "
            f"'{stored_set.name}' with {stored_set.num_classes}"
        )
    return config, label_set


def _stacked(examples: list[Example], batch_size: int) -> Batch:
    filled = examples + [examples[-1]] * (batch_size - len(examples))
    return Batch(
        images=np.stack([example.image for example in filled]),
        labels=np.stack([example.labels for example in filled]),
        index=np.array([example.index for example in filled], np.int32),
        valid=np.arange(batch_size) < len(examples),
    )
