"""The verb `check`: everything that is wrong with the data of a config, found before it is trained on.

* Every image and every mask of the training and the validation split is read; all problems come in one
  report, with what the masks hold and the weights of rare classes.
* A problem would stop or spoil a training. Remarks would not.
* `first_look` is the part of it that a training can afford: a few images, before its first step.
"""

import functools
import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import config as config_module
from pspnet_jax.advice import suggest_labels, suspicions
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.check_report import Check, to_json
from pspnet_jax.data.folders import FolderSource
from pspnet_jax.data.layouts import DataError, Pair, list_split
from pspnet_jax.data.pipeline import Records, Source, open_source
from pspnet_jax.data.survey import (
    OUT_OF_RANGE,
    Finding,
    Survey,
    examine,
    examine_all,
    examine_painted,
    examine_record,
    survey,
)
from pspnet_jax.progress import Progress
from pspnet_jax.whole_files import write_whole

NUM_PAINTED = 64  # of each split of `scenes`: every other image is painted the same way
_FIRST, _RANDOM, _SECONDS_OF_FIRST_LOOK = 3, 9, 2.0

log = logging.getLogger("pspnet_jax")


def run(config: ConfigDict, *, output: str | None = None) -> Check:
    """Read both splits of a config and judge them.

    Args:
        config: its section `data` and `evaluate.split` are used.
        output: a JSON file for what was found.

    Raises:
        ValueError: for a fault in the config itself.
    """
    config_module.validate(config)
    check = Check(config, load_label_set(config.data.labels))
    splits = {
        "training": config.data.train_split,
        "validation": config.evaluate.split or config.data.val_split,
    }
    for role, split in splits.items():
        _survey_split(check, role, split)
    _judge(check)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(output), json.dumps(to_json(check), indent=2) + "\n")
    return check


def first_look(
    source: Source, label_set: LabelSet, *, split: str, unreadable_share_max: float = 0.0
) -> None:
    """Read the first and some random images of a split with their masks, for at most two seconds.

    Args:
        unreadable_share_max: of all images, that the training will leave out.

    Raises:
        DataError: listing what would have stopped the training later.
    """
    if isinstance(source, FolderSource):
        look = functools.partial(_examine_at, pairs=source.pairs, label_set=label_set)
    elif isinstance(source, Records):
        look = functools.partial(examine_record, records=source, label_set=label_set)
    else:
        return
    drawn = np.random.default_rng(0).permutation(len(source))[:_RANDOM]
    chosen = sorted({*range(min(_FIRST, len(source))), *drawn.tolist()})
    end = time.monotonic() + _SECONDS_OF_FIRST_LOOK
    found, num_faulty = Survey(split), 0
    for index in chosen:
        finding = look(index)
        found.add(finding)
        num_faulty += bool(finding.faults)
        if time.monotonic() > end:
            break
    faults = [sentence for sentences in found.faults.values() for sentence in sentences]
    listed = "\n  ".join(faults)
    looked = (
        f"of {found.num_images} images of split '{split}' that were looked at (pspnet check --config=... "
        f"reads all of them):\n  {listed}"
    )
    if num_faulty > unreadable_share_max * len(source):
        raise DataError(looked)
    if faults:
        log.warning("%s\nThey are left out of training (data.unreadable_share_max).", looked)
    for sentence in suspicions(label_set, found):
        log.warning("%s", sentence)


def _examine_at(index: int, pairs: Sequence[Pair], label_set: LabelSet) -> Finding:
    return examine(pairs[index], label_set)


def _survey_split(check: Check, role: str, split: str) -> None:
    """Add what one split holds, or the problem that it cannot be listed."""
    data, label_set = check.config.data, check.label_set
    options = {"split": split, "label_set": label_set, "layout": data.layout}
    if data.source == "scenes":
        try:
            source = open_source("scenes", root=data.root, **options)
        except ValueError as error:
            check.problems[f"the {role} split '{split}' cannot be painted"] = [str(error)]
            return
        examples = (source[i] for i in range(min(NUM_PAINTED, len(source))))
        check.surveys[role] = survey(split, map(examine_painted, examples))
        return
    try:
        if data.source == "prepared":
            examined: Any = open_source("prepared", root=data.root, **options)
        else:
            examined, faults = list_split(data.root, **options)
            if faults:
                check.problems[f"files of the {role} split '{split}'"] = faults
    except DataError as error:
        check.problems[f"the {role} split '{split}' cannot be read"] = [str(error)]
        return
    findings = _watched(examine_all(examined, label_set), len(examined), split)
    check.surveys[role] = survey(split, findings)


def _watched(findings: Iterable[Finding], total: int, split: str) -> Iterator[Finding]:
    """The same findings, while their number is shown."""
    with Progress(total, f"images of {split}") as progress:
        for finding in findings:
            yield finding
            progress.update()


def _judge(check: Check) -> None:
    """Turn what the surveys hold into problems and remarks."""
    for role, found in check.surveys.items():
        for kind, sentences in found.faults.items():
            check.problems[f"{role}: {kind}"] = sentences
        for remark, images in found.remarks.items():
            check.remarks[f"{role}: {remark}"] = images
        copies = [paths for paths in found.images_by_digest.values() if len(paths) > 1]
        if copies:
            check.remarks[f"{role}: copies of the same image file"] = [
                " = ".join(c) for c in copies
            ]
        classes = found.class_pixels[: check.label_set.num_classes]
        if found.num_masks and not found.faults.get(OUT_OF_RANGE) and np.count_nonzero(classes) < 2:
            names = [check.label_set.names[i] for i in np.flatnonzero(classes)]
            only = f"only one class occurs, {names[0]}" if names else "no pixel has a class"
            check.problems[f"{role}: nothing to tell apart"] = [
                f"{only}, in {found.num_masks} masks; all else is void"
            ]
        suspected = suspicions(check.label_set, found)
        if suspected:
            check.problems[f"{role}: masks that most likely mean something else"] = suspected
    _judge_copies(check)
    raw_ids = sorted({raw for found in check.surveys.values() for raw in found.raw_ids})
    if any(check.label_set.meaning(raw) is None for raw in raw_ids):
        check.suggestion = suggest_labels(raw_ids, check.label_set)


def _judge_copies(check: Check) -> None:
    """Images that are in both splits: what is learned by heart would count as understood."""
    if len(check.surveys) < 2:
        return
    training, validation = (
        found.images_by_digest for found in (check.surveys["training"], check.surveys["validation"])
    )
    shared = [
        f"{training[digest][0]} = {paths[0]}"
        for digest, paths in validation.items()
        if digest in training
    ]
    if shared:
        check.problems["the same image file in training and validation"] = shared
