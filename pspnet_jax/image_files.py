"""Image files that a command names one by one, as folders or as patterns, and what their results are called.

* The results of a file are called like it; those of a file that was found below a folder or by a pattern keep
  the folders in between, so that equal names of several folders stay apart.
* The order is that of the command, within a folder or pattern that of the paths.
"""

import glob
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm")
"""Of the images that are taken from folders; files and patterns may have any other."""
_SUFFIXES = ", ".join(IMAGE_SUFFIXES)


class ImageFile(NamedTuple):
    """An image and what its results are called."""

    path: Path
    name: str
    """Without suffix; with folders, relative to the folder or pattern of the command: 'frankfurt/000000'."""


def find_images(arguments: Sequence[str], *, without: Collection[Path] = ()) -> list[ImageFile]:
    """The image files that a command names; a file that is named twice counts once.

    Args:
        arguments: of each, one of
            an image file, whatever its suffix;
            a folder: the images in it and in the folders below, without hidden ones;
            a pattern with *, ?, [...] or ** (any folders) that the shell has left: the files that match.
        without: files and folders that folders and patterns leave out, because they are results.

    Raises:
        FileNotFoundError: for an argument that names nothing.
        ValueError: where there is no image, in a folder or in the command.
    """
    found: dict[str, ImageFile] = {}
    for argument in arguments:
        path = Path(argument)
        if path.is_dir():
            files = [ImageFile(file, _name(file, path)) for file in _images_below(path, without)]
            if not files:
                raise ValueError(f"{argument}: there are no images ({_SUFFIXES}) in this folder")
        elif path.is_file():
            files = [ImageFile(path, path.stem)]
        elif glob.has_magic(argument):
            files = [ImageFile(file, _name(file, base)) for base, file in _matches(path, without)]
        else:
            raise FileNotFoundError(f"{argument}: there is no such image or folder")
        for file in files:
            found.setdefault(os.path.abspath(file.path), file)
    if not found:
        raise ValueError(
            "there are no images in the command: name image files, folders or patterns after the options"
        )
    return list(found.values())


def _images_below(folder: Path, without: Collection[Path]) -> list[Path]:
    found, entered = [], set()
    for parent, subfolders, files in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in entered:  # links may lead round in a circle
            subfolders.clear()
            continue
        entered.add(place)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in files
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    return sorted(path for path in found if not _is_within(path, without))


def _matches(pattern: Path, without: Collection[Path]) -> Iterator[tuple[Path, Path]]:
    """The folder that a pattern starts from, with each file that matches."""
    parts = pattern.parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    if ".." in parts[fixed:]:
        raise ValueError(
            f"{pattern}: '..' stands behind the first wildcard; name the folder itself, e.g. by an absolute path"
        )
    base = Path(*parts[:fixed])
    found = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    files = sorted(path for path in found if path.is_file() and not _is_within(path, without))
    if not files:
        raise FileNotFoundError(f"{pattern}: no file matches this pattern")
    for file in files:
        yield base, file


def _name(file: Path, base: Path) -> str:
    return file.relative_to(base).with_suffix("").as_posix()


def _is_within(path: Path, places: Collection[Path]) -> bool:
    absolute = Path(os.path.abspath(path))
    return any(absolute.is_relative_to(os.path.abspath(place)) for place in places)
