"""Prediction: images -> class maps, palette pictures and overlays on disk.

`class_maps/NAME.png` holds train ids (8 bit, one channel), `palette/NAME.png` their colors,
`overlays/NAME.png` the colors over the photograph. Nothing is overwritten unless told.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from pspnet_jax import visualize
from pspnet_jax.data.folders import read_image
from pspnet_jax.data.layouts import IMAGE_SUFFIXES, DataError
from pspnet_jax.report import write_picture
from pspnet_jax.segmenter import load

KINDS = ("class_maps", "palette", "overlays")

log = logging.getLogger("pspnet_jax")


def run(
    checkpoint: str,
    images: Sequence[str],
    *,
    output: str,
    overwrite: bool = False,
    step: str = "best",
) -> list[Path]:
    """The verb `predict`: class maps of image files and of the images in folders.

    Returns:
        The class maps that were written.

    Raises:
        DataError: after all others are done, naming the images that cannot be read.
        ValueError: for no images, or two of the same name.
        FileNotFoundError: for an image or folder that is not there.
        FileExistsError: where a result exists and `overwrite` was not given; nothing is written then.
    """
    paths = find_images(images)
    targets = {
        path: {kind: Path(output) / kind / f"{path.stem}.png" for kind in KINDS} for path in paths
    }
    _check_targets(targets, overwrite=overwrite)
    segmenter = load(checkpoint, step=step)
    palette = segmenter.label_set.palette
    for kind in KINDS:
        (Path(output) / kind).mkdir(parents=True, exist_ok=True)
    unreadable, written = [], []
    for i, path in enumerate(paths, start=1):
        try:
            image = read_image(path)
        except DataError as error:
            unreadable.append(str(error))
            log.warning("%d/%d  %s", i, len(paths), error)
            continue
        labels = segmenter.class_map(image)
        pictures = (
            labels,
            visualize.colorize(labels, palette),
            visualize.overlay(image, labels, palette),
        )
        for kind, picture in zip(KINDS, pictures, strict=True):
            write_picture(targets[path][kind], picture)
        log.info("%d/%d  %s -> %s", i, len(paths), path, targets[path]["overlays"])
        written.append(targets[path]["class_maps"])
    if unreadable:
        listed = "\n  ".join(unreadable)
        raise DataError(f"{len(unreadable)} of {len(paths)} images were left out:\n  {listed}")
    return written


def find_images(arguments: Sequence[str]) -> list[Path]:
    """Image files named one by one or as folders, in a stable order."""
    paths: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            paths += sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            paths.append(path)
        else:
            raise FileNotFoundError(f"{argument}: there is no such image or folder")
    if not paths:
        raise ValueError(
            f"no images ({', '.join(IMAGE_SUFFIXES)}) in {' '.join(arguments) or 'the command'}; "
            "name image files or folders after the options"
        )
    return paths


def _check_targets(targets: dict[Path, dict[str, Path]], *, overwrite: bool) -> None:
    by_name: dict[str, Path] = {}
    for path in targets:
        if path.stem in by_name:
            raise ValueError(
                f"{by_name[path.stem]} and {path} would be written to the same file; "
                "predict them into different --output folders"
            )
        by_name[path.stem] = path
    existing = [file for files in targets.values() for file in files.values() if file.exists()]
    if existing and not overwrite:
        raise FileExistsError(
            f"{existing[0]} exists ({len(existing)} files in all); "
            "choose another --output or give --overwrite"
        )
