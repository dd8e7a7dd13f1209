"""Prediction: image files -> class maps, pictures and probabilities on disk.

* `class_maps/NAME.png` holds train ids (8 bit, one channel), `palette/NAME.png` the same ids with a palette,
  `overlays/NAME.png` the colors over the photograph. `confidence/NAME.png` and `entropy/NAME.png` are gray
  pictures of 0 .. 1, `probabilities/NAME.npy` holds float16 [height, width, classes], `submission/` what a
  benchmark accepts. All are as large as the photograph as it is shown, turned by its Exif orientation.
* `legend.png` shows the classes, `legend.csv` lists them (a label set under which class maps are masks), and
  `prediction.json` says which checkpoint under which protocol the results are of.
* Images are read and results are written in threads, a few at a time, while others are predicted.
* Nothing is overwritten unless told. Files are written under another name and renamed, so a run that was
  stopped leaves whole files, and `resume` does what is left.
"""

import csv
import io
import json
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pspnet_jax import submission as submission_module
from pspnet_jax import visualize
from pspnet_jax.arrays import Prediction, RawImage
from pspnet_jax.catalog import COLUMNS, LabelSet
from pspnet_jax.data.folders import read_image
from pspnet_jax.data.layouts import DataError
from pspnet_jax.image_files import ImageFile, find_images
from pspnet_jax.passes import check_passes
from pspnet_jax.progress import Progress
from pspnet_jax.protocols import Protocol
from pspnet_jax.segmenter import Segmenter, load
from pspnet_jax.whole_files import whole_file, write_whole

DEFAULT_OUTPUTS = ("class_maps", "palette", "overlays", "legend")
OUTPUTS = (*DEFAULT_OUTPUTS, "confidence", "entropy", "probabilities")
_OWN = (*OUTPUTS, "legend.png", "submission")
"""What a folder of results holds: never images to predict."""
_SCALES = {
    "confidence": "confidence: probability of the class",
    "entropy": "entropy: 0 one class, 1 all classes equally probable",
}
_READS_AHEAD, _WRITES_BEHIND = 2, 2  # images
_THREADS = 4

log = logging.getLogger("pspnet_jax")

Targets = Mapping[ImageFile, Mapping[str, Path]]
"""Of each image, kind of result -> file."""


@dataclass(frozen=True)
class _Pass:
    """How the images of one run are predicted and what is written of them."""

    protocol: Protocol
    batch_size: int
    canvas_gib: float
    kinds: tuple[str, ...]
    raw_ids: UInt8[np.ndarray, "256"] | None
    """Train id -> the id in submission files, where they are wanted."""


def run(
    checkpoint: str,
    images: Sequence[str],
    *,
    output: str,
    outputs: Sequence[str] = DEFAULT_OUTPUTS,
    submission: str | None = None,
    protocol: str | None = None,
    protocol_options: Mapping[str, Any] | None = None,
    batch_size: int = 1,
    canvas_gib: float = 2.0,
    overwrite: bool = False,
    resume: bool = False,
    step: str = "best",
    dtype: str | None = None,
) -> list[Path]:
    """The verb `predict`.

    Args:
        images: files, folders and patterns, as `image_files.find_images` takes them.
        outputs: of `OUTPUTS`.
        submission: also what this benchmark accepts: a key of `submission.SUBMISSIONS`.
        protocol: by name; None: the checkpoint's own.
        protocol_options: override the protocol's; None values do not.
        batch_size: windows, or whole images of equal size, that go through together.
        canvas_gib: limit of device memory for class scores of unfinished images, GiB.
        overwrite: replace results that exist.
        resume: leave out images whose results all exist.
        dtype: what maps are computed in; None: the checkpoint's own.

    Returns:
        The images that were predicted.

    Raises:
        DataError: after all others are done, naming the images that cannot be read.
        ValueError: for an impossible option, no images, two of one name, or what is not the benchmark's.
        FileNotFoundError: for an image or folder that is not there.
        FileExistsError: where a result exists and neither `overwrite` nor `resume` was given; nothing is
            written then.
    """
    _check_options(outputs, batch_size, canvas_gib, overwrite=overwrite, resume=resume)
    benchmark = submission_module.choose(submission) if submission else None
    files = find_images(images, without=[Path(output, name) for name in _OWN])
    targets = _targets(files, Path(output), outputs, benchmark)
    todo = _to_do(targets, overwrite=overwrite, resume=resume)
    if len(todo) < len(files):
        log.info("%d of %d images have their results already", len(files) - len(todo), len(files))
    segmenter = load(checkpoint, step=step, dtype=dtype)
    chosen = segmenter.choose_protocol(protocol, **(protocol_options or {}))
    raw_ids = benchmark.raw_ids(segmenter.label_set) if benchmark else None
    _write_about(Path(output), segmenter, chosen, outputs, overwrite=overwrite)
    if not todo:
        return []
    log.info("%s by %s", _images(len(todo)), chosen.describe())
    work = _Pass(chosen, batch_size, canvas_gib, tuple(outputs), raw_ids)
    unreadable = _predict(segmenter, {file: targets[file] for file in todo}, work)
    log.info("%s predicted into %s", _images(len(todo) - len(unreadable)), output)
    if unreadable:
        raise _left_out(unreadable, len(files))
    return [file.path for file in todo]


def _left_out(unreadable: Mapping[ImageFile, str], num_files: int) -> DataError:
    listed = "\n  ".join(unreadable.values())
    return DataError(f"{len(unreadable)} of {num_files} images were left out:\n  {listed}")


def _check_options(
    outputs: Sequence[str], batch_size: int, canvas_gib: float, *, overwrite: bool, resume: bool
) -> None:
    unknown = [kind for kind in outputs if kind not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs={','.join(unknown)} are not among {', '.join(OUTPUTS)}")
    check_passes(batch_size, canvas_gib)
    if overwrite and resume:
        raise ValueError(
            "--overwrite does all images again, --resume those without results: one of them"
        )


_KEEP_APART = "give the folder or the quoted pattern that holds both, which keeps subfolders apart"


def _images(number: int) -> str:
    return f"{number} image{'' if number == 1 else 's'}"


def _targets(
    files: Sequence[ImageFile],
    output: Path,
    outputs: Sequence[str],
    benchmark: submission_module.Submission | None,
) -> Targets:
    """Where the results go; ValueError where two images would share a file, or none is asked for."""
    targets: dict[ImageFile, dict[str, Path]] = {}
    for file in files:
        kinds = [kind for kind in OUTPUTS if kind in outputs and kind != "legend"]
        suffixes = {kind: ".npy" if kind == "probabilities" else ".png" for kind in kinds}
        targets[file] = {k: output / k / (file.name + suffix) for k, suffix in suffixes.items()}
    if benchmark is not None:
        names = benchmark.file_names([file.path for file in files])
        for file, name in zip(files, names, strict=True):
            targets[file]["submission"] = output / "submission" / name
    owners: dict[Path, Path] = {}
    for file in files:
        if not targets[file]:
            raise ValueError(f"outputs={','.join(outputs)}: nothing of the images; see --outputs")
        for target in targets[file].values():
            owner = owners.setdefault(target, file.path)
            if owner != file.path:
                same_folder = owner.parent == file.path.parent
                raise ValueError(
                    f"{owner} and {file.path} would be written to the same file, {target}; "
                    + ("rename one" if same_folder else _KEEP_APART)
                    + ", or predict them into different --output folders"
                )
    return targets


def _to_do(targets: Targets, *, overwrite: bool, resume: bool) -> list[ImageFile]:
    """The images to predict; FileExistsError where that would replace files unasked."""
    existing = {file: [t for t in of_it.values() if t.exists()] for file, of_it in targets.items()}
    if resume:
        return [file for file in targets if len(existing[file]) < len(targets[file])]
    found = [target for of_it in existing.values() for target in of_it]
    if found and not overwrite:
        raise FileExistsError(
            f"{found[0]} exists ({len(found)} files in all); choose another --output, give --overwrite, or "
            "--resume to do only the images whose results are missing"
        )
    return list(targets)


def _write_about(
    output: Path,
    segmenter: Segmenter,
    protocol: Protocol,
    outputs: Sequence[str],
    *,
    overwrite: bool,
) -> None:
    """Write prediction.json and the legend; FileExistsError where they are those of other results."""
    label_set, provenance = segmenter.label_set, segmenter.provenance
    about = {
        "checkpoint": {"step": provenance.step, "digest": provenance.digest},
        "dtype": segmenter.description.model.dtype,
        "labels": label_set.name,
        "protocol": {k: v for k, v in protocol.to_json().items() if k != "absent_class"},
    }
    texts = {output / "prediction.json": json.dumps(about, indent=2) + "\n"}
    if "legend" in outputs:
        texts[output / "legend.csv"] = _legend_table(label_set)
    if not overwrite and not _is_left_over(output):
        _check_about(texts, output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"--output={output} is a file; a folder is wanted")
    output.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        write_whole(path, text)
    if "legend" in outputs:
        scales = [title for kind, title in _SCALES.items() if kind in outputs]
        picture = visualize.legend(label_set.names, label_set.palette, scales=scales)
        write_whole(output / "legend.png", visualize.encode_png(picture))


def _is_left_over(output: Path) -> bool:
    """Whether prediction.json is about nothing: an earlier run found no image that it could read."""
    kinds = (output / kind for kind in (*OUTPUTS, "submission"))
    has_results = any(path.is_file() for kind in kinds for path in kind.glob("**/*"))
    return (output / "prediction.json").exists() and not has_results


def _check_about(texts: Mapping[Path, str], output: Path) -> None:
    """FileExistsError where a folder holds results of another kind."""
    together = f"{output} would hold what does not belong together; choose another --output or give --overwrite"
    for path, text in texts.items():
        if path.exists() and path.read_text() != text:
            there, here = path.read_text().splitlines(), text.splitlines()
            pairs = zip_longest(there, here, fillvalue="nothing")
            a, b = next((a.strip(" ,"), b.strip(" ,")) for a, b in pairs if a != b)
            raise FileExistsError(f"{path} says {a}, here it is {b}: {together}")
    table, picture = output / "legend.csv", output / "legend.png"
    if table in texts and picture.exists() and not table.exists():
        raise FileExistsError(f"{picture} exists without legend.csv: {together}")


def _legend_table(label_set: LabelSet) -> str:
    """A label set as CSV whose raw ids are the train ids in class maps."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for i, (name, color) in enumerate(zip(label_set.names, label_set.colors, strict=True)):
        writer.writerow([i, name, *color, i])
    return table.getvalue()


def _predict(segmenter: Segmenter, targets: Targets, work: _Pass) -> dict[ImageFile, str]:
    """Predict images and write what is wanted; returns what is wrong with those that cannot be read."""
    unreadable: dict[ImageFile, str] = {}
    waiting: deque[tuple[ImageFile, RawImage]] = deque()  # read, but not predicted yet
    writing: deque[Future] = deque()
    with ThreadPoolExecutor(_THREADS) as pool, Progress(len(targets)) as progress:

        def images() -> Iterator[RawImage]:
            for file, reading in _read_ahead(pool, list(targets)):
                try:
                    image = reading.result()
                except DataError as error:
                    unreadable[file] = str(error)
                    log.warning("%s", error)
                    progress.update()
                    continue
                waiting.append((file, image))
                yield image

        found = segmenter.predict(
            images(),
            protocol=work.protocol,
            batch_size=work.batch_size,
            canvas_gib=work.canvas_gib,
            confidence="confidence" in work.kinds,
            entropy="entropy" in work.kinds,
            probabilities="float16" if "probabilities" in work.kinds else None,
        )
        for prediction in found:
            file, image = waiting.popleft()
            palette = segmenter.label_set.palette
            writing.append(
                pool.submit(_write, targets[file], image, prediction, palette, work.raw_ids)
            )
            if len(writing) > _WRITES_BEHIND:
                writing.popleft().result()
                progress.update()
        for future in writing:
            future.result()
            progress.update()
    return unreadable


def _read_ahead(
    pool: ThreadPoolExecutor, files: Sequence[ImageFile]
) -> Iterator[tuple[ImageFile, Future[RawImage]]]:
    reading: deque[tuple[ImageFile, Future[RawImage]]] = deque()
    for file in files:
        reading.append((file, pool.submit(read_image, file.path)))
        if len(reading) > _READS_AHEAD:
            yield reading.popleft()
    while reading:
        yield reading.popleft()


def _write(
    targets: Mapping[str, Path],
    image: RawImage,
    found: Prediction,
    palette: visualize.Palette,
    raw_ids: UInt8[np.ndarray, "256"] | None,
) -> None:
    """Write the results of one image."""
    labels = found.class_map
    for kind, path in targets.items():
        if kind == "class_maps":
            write_whole(path, visualize.encode_png(labels))
        elif kind == "palette":
            write_whole(path, visualize.encode_indexed_png(labels, palette))
        elif kind == "overlays":
            mixed = visualize.overlay(image, labels, palette)
            write_whole(path, visualize.encode_png(mixed))
        elif kind == "submission" and raw_ids is not None:
            write_whole(path, visualize.encode_png(raw_ids[labels]))
        elif kind == "probabilities":
            assert found.probabilities is not None
            with whole_file(path) as file:
                np.save(file, found.probabilities)
        else:
            write_whole(path, visualize.encode_png(visualize.gray(getattr(found, kind))))
