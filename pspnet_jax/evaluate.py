"""Evaluation: a segmenter over a split of a data set.

* Training and the verb `evaluate` call the same `evaluate`, so there is one number.
* Processes share the images and nothing else: what they counted is added up at the end.
"""

import base64
import json
import logging
import os
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax import config as config_module
from pspnet_jax import parallel
from pspnet_jax.arrays import LabelMap, RawImage
from pspnet_jax.catalog import LabelSet, load_label_set, shortened
from pspnet_jax.data.layouts import DataError
from pspnet_jax.data.pipeline import Source, evaluation_examples, open_source
from pspnet_jax.metrics import Confusion, ImageScore, confusion_matrix, image_score
from pspnet_jax.progress import Progress
from pspnet_jax.protocols import Protocol
from pspnet_jax.report import FILES, Evaluation, panel_indices, ranks, summary, write_report
from pspnet_jax.segmenter import Segmenter, load

log = logging.getLogger("pspnet_jax")


def evaluate(
    segmenter: Segmenter,
    source: Source,
    *,
    protocol: Protocol,
    batch_size: int,
    canvas_gib: float = 2.0,
    heard: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predict every image of a source and count pixels by (true, predicted) class.

    Of several processes each predicts every n-th image; all of them call this, and all receive the whole
    evaluation.

    Args:
        batch_size: windows, or whole images of equal size, that go through together.
        canvas_gib: limit of device memory for class scores of unfinished images, GiB.
        heard: called after each image, for whoever watches over the time this takes.
    """
    start = time.monotonic()
    part, failure = None, None
    try:
        part = evaluate_part(
            segmenter,
            source,
            protocol=protocol,
            batch_size=batch_size,
            canvas_gib=canvas_gib,
            process_index=jax.process_index(),
            num_processes=jax.process_count(),
            heard=heard,
        )
    except Exception as error:  # the others wait for what this process says
        failure = error
    _raise_together(failure)
    assert part is not None
    scored = sorted(ImageScore(*row) for row in _gather_rows(part.image_scores))
    assert [score.index for score in scored] == list(range(len(source))), (
        f"{len(scored)} images were evaluated, the split has {len(source)}"
    )
    ranked = ranks(scored)
    shown = {*panel_indices(len(source)), *(i for chosen in ranked.values() for i in chosen)}
    return Evaluation(
        confusion=parallel.sum_over_processes(part.confusion),
        images=scored,
        ranked=ranked,
        seconds=time.monotonic() - start,
        predictions=_gather_maps(part, shown),
        protocol=protocol,
        label_set=segmenter.label_set,
        model=segmenter.description.model,
    )


def _raise_together(failure: Exception | None) -> None:
    """Raise in all processes where one failed. All raise a DataError or none does: a training goes on after one."""
    words = repr(failure) if failure else ""
    said = [text.decode() for text in parallel.gather(words.encode()) if text]
    if not said:
        return
    message = f"another process stopped: {said[0]}"
    if all(text.startswith(DataError.__name__) for text in said):
        raise failure or DataError(message)
    if failure is None or isinstance(failure, DataError):
        raise RuntimeError(message) from failure
    raise failure


@dataclass
class Part:
    """What one process found."""

    confusion: Confusion
    image_scores: list[ImageScore] = field(default_factory=list)
    compressed: dict[int, tuple[tuple[int, int], bytes]] = field(default_factory=dict)
    """Index -> (height, width) and zlib bytes of the class map: which ones are shown is known at the end."""

    def add(self, index: int, truth: LabelMap, prediction: LabelMap) -> None:
        confusion = confusion_matrix(truth, prediction, len(self.confusion))
        self.confusion += confusion
        self.image_scores.append(image_score(index, confusion))
        height, width = prediction.shape
        self.compressed[index] = (height, width), zlib.compress(prediction.tobytes(), level=1)


def evaluate_part(
    segmenter: Segmenter,
    source: Source,
    *,
    protocol: Protocol,
    batch_size: int,
    canvas_gib: float = 2.0,
    process_index: int = 0,
    num_processes: int = 1,
    heard: Callable[[], None] = lambda: None,
) -> Part:
    """The images process_index, process_index + num_processes, ... of a source."""
    part = Part(np.zeros((segmenter.label_set.num_classes,) * 2, np.int64))
    # `predict` reads images ahead of what it gives back.
    waiting: deque[tuple[int, LabelMap]] = deque()

    def images() -> Iterator[RawImage]:
        for example in evaluation_examples(
            source, process_index=process_index, num_processes=num_processes
        ):
            waiting.append((int(example.index), example.labels))
            yield example.image

    num_images = len(range(process_index, len(source), num_processes))
    predictions = segmenter.predict(
        images(), protocol=protocol, batch_size=batch_size, canvas_gib=canvas_gib
    )
    what = "images" if num_processes == 1 else f"images of the first of {num_processes} processes"
    by = f"by {protocol.name}"
    with Progress(num_images, what, note=by) if process_index == 0 else nullcontext() as progress:
        for prediction in predictions:
            index, truth = waiting.popleft()
            part.add(index, truth, prediction.class_map)
            heard()
            if progress:
                progress.update()
    return part


def _gather_rows(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """The rows of all processes, as JSON carries them."""
    parts = parallel.gather(json.dumps(rows).encode())
    return [row for part in parts for row in json.loads(part)]


def _gather_maps(part: Part, indices: Iterable[int]) -> dict[int, LabelMap]:
    """The class maps of these images, whichever process has them."""
    mine = []
    for index in sorted(indices):
        if index in part.compressed:
            size, compressed = part.compressed[index]
            mine.append((index, size, base64.b64encode(compressed).decode()))
    found = {}
    for index, size, encoded in _gather_rows(mine):
        pixels = zlib.decompress(base64.b64decode(encoded))
        found[index] = np.frombuffer(pixels, np.uint8).reshape(size)
    return found


def open_split(data: ConfigDict, *, split: str, label_set: LabelSet) -> Source:
    """The examples of one split, as the config's data section says."""
    return open_source(
        data.source, split=split, label_set=label_set, layout=data.layout, root=data.root
    )


def _home(checkpoint: str) -> Path:
    """The folder in which reports of a network lie: its run, one beside its file, or one of a shipped network."""
    path = Path(checkpoint)
    if path.is_dir():
        return path
    return (
        path.with_name(f"{path.stem}_reports")
        if path.is_file()
        else Path("runs") / f"shipped_{path.name}"
    )


def output_folder(
    workdir: Path,
    *,
    step: int,
    split: str,
    protocol: Protocol,
    label_set: LabelSet,
    dtype: str | None = None,
) -> Path:
    """Where a run keeps the report of one evaluation.

    Args:
        dtype: what was computed in, where that was asked for.
    """
    name = split.removesuffix(".txt").replace("/", "_")  # a split may be the path of a list file
    parts = [f"{step:08d}", name, protocol.label(label_set), *([dtype] if dtype else [])]
    return workdir / "evaluation" / "-".join(parts)


def run(
    checkpoint: str,
    *,
    config: ConfigDict | None,
    step: str = "best",
    split: str | None = None,
    protocol: str | None = None,
    protocol_options: Mapping[str, Any] | None = None,
    passes: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    output: str | None = None,
) -> dict:
    """The verb `evaluate`: a checkpoint over a split of its own data, or of that of `config`.

    Args:
        checkpoint: folder of a run or of a converted model, a file, or a shipped name (see `load`).
        config: where the data is; None: the run's own; without `data.labels` masks are read as in training. Of
            its section `evaluate` only split, batch_size and canvas_gib are used, the protocol is the checkpoint's
            or the arguments'.
        protocol: by name; None: the checkpoint's own.
        protocol_options: override the protocol's; None values do not.
        passes: `batch_size` and `canvas_gib` instead of the config's.
        dtype: what maps are computed in; None: the checkpoint's own.
        output: folder of the report; None: in the run.

    Returns:
        The report, as written to report.json.

    Raises:
        ValueError: where there is no data section, or its label set is not the checkpoint's; for another dtype.
        FileExistsError: where the folder holds the report of another evaluation.
    """
    segmenter = load(checkpoint, step=step, dtype=dtype)
    config, label_set = _find_data(checkpoint, config, segmenter.label_set)
    config.evaluate.update(passes or {})
    config_module.validate(config)
    split = split or config.evaluate.split or config.data.val_split
    source = open_split(config.data, split=split, label_set=label_set)
    chosen = segmenter.choose_protocol(protocol, **(protocol_options or {}))
    named = config.evaluate.protocol
    if protocol is None and named != chosen.name:
        log.info("by the checkpoint's protocol; the config's is used with --protocol=%s", named)
    usual = output_folder(
        _home(checkpoint),
        step=segmenter.provenance.step,
        split=split,
        protocol=chosen,
        label_set=segmenter.label_set,
        dtype=dtype,
    )
    folder, origin = Path(output) if output else usual, data_origin(config.data, label_set)
    _check_folder(folder, segmenter, chosen, {"split": split, **origin})
    size = {name: config.evaluate[name] for name in ("batch_size", "canvas_gib")}
    evaluation = evaluate(segmenter, source, protocol=chosen, **size)
    contents = write_report(
        folder, evaluation, segmenter.provenance, source, split=split, origin=origin
    )
    if jax.process_index() == 0:
        _announce(evaluation, folder)
    return contents


def _announce(evaluation: Evaluation, folder: Path) -> None:
    lines = [f"{what}: {folder / name}" for what, name in FILES.items()]
    log.info("%s", "\n".join([summary(evaluation), *lines]))


def data_origin(data: ConfigDict, label_set: LabelSet) -> dict[str, str]:
    """Where the data of a config come from and how their masks are read, as reports say it."""
    options = {"labels": label_set.name, "labels_digest": label_set.digest, "source": data.source}
    if data.source != "scenes":
        options |= {"layout": data.layout, "root": os.path.abspath(data.root)}
    return options


def _check_folder(
    folder: Path, segmenter: Segmenter, protocol: Protocol, data: Mapping[str, str]
) -> None:
    """Raise FileExistsError where a folder holds the report of another evaluation."""
    path = folder / "report.json"
    if not path.is_file():
        return
    there = json.loads(path.read_text())
    here = {
        "checkpoint": {"digest": segmenter.provenance.digest},
        "network": {"dtype": segmenter.description.model.dtype},
        "protocol": json.loads(json.dumps(protocol.to_json())),
        "data": data,
    }
    for part, values in here.items():
        for name, value in values.items():
            old = there.get(part, {}).get(name, value)  # older reports say less
            if name == "root":  # and that as it was typed
                old = os.path.abspath(old)
            if old != value:
                raise FileExistsError(
                    f"{path} is the report of another evaluation: its {part}'s {name} is {old}, here it "
                    f"is {value}; choose another --output"
                )


def _find_data(
    checkpoint: str, config: ConfigDict | None, stored_set: LabelSet
) -> tuple[ConfigDict, LabelSet]:
    """The config whose data is evaluated on, and how its masks are read."""
    if config is not None:
        labels = config.data.labels
        label_set = stored_set if labels is None else load_label_set(labels)
    else:
        label_set, run_config = stored_set, Path(checkpoint) / "config.json"
        if run_config.is_file():
            config = config_module.from_json(run_config.read_text())
        elif stored_set.name == "scenes":  # which needs no files
            config = config_module.default_config()
            config.name = "scenes"
            config.data.update(source="scenes", labels="scenes", val_split="val")
            config.evaluate.batch_size = 20
        else:
            raise ValueError(
                f"{checkpoint} has no config.json: say where the data is, e.g. with "
                "--config=configs/ade20k.py --config.data.root=DIR"
            )
    if label_set.names != stored_set.names:
        raise ValueError(
            f"data.labels={config.data.labels} has {label_set.num_classes} classes, the checkpoint was trained on "
            f"'{stored_set.name}' with {stored_set.num_classes}: {shortened(stored_set.changes_to(label_set))}"
        )
    return config, label_set
