"""What the files of a split hold, counted without stopping at the first fault.

* `examine` reads one image and its mask; whatever is wrong comes back as a sentence beside the counts.
* A `Survey` adds up what was found: sizes, pixels by raw id and by class, copies of the same file.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from pspnet_jax.arrays import Example, LabelMap
from pspnet_jax.catalog import LabelSet
from pspnet_jax.data import headers
from pspnet_jax.data.folders import (
    check_sizes,
    decode_image,
    decode_mask,
    read_bytes,
    to_labels,
)
from pspnet_jax.data.layouts import DataError, Pair
from pspnet_jax.data.pipeline import Records
from pspnet_jax.data.workers import in_order, num_cores

Counts = Int64[np.ndarray, "256"]

UNREADABLE_IMAGE = "images that cannot be used"
UNREADABLE_MASK = "masks that cannot be used"
SIZES_DIFFER = "images and masks of different size"
RAW_IDS = "raw ids in one channel"
OUT_OF_RANGE = "masks with values or colors that the label set does not list"

_FEWEST_FOR_PROCESSES = 64  # below that, starting processes takes longer than reading
_MOST_PROCESSES = 16  # each holds about 250 MB


class Finding(NamedTuple):
    """What one image and its mask hold; None where that could not be read."""

    name: str
    image: str
    mask: str
    size: tuple[int, int] | None = None
    """Height and width of the image, in pixels."""
    digest: str | None = None
    """Of the bytes of the image file."""
    kind_of_mask: str | None = None
    raw_counts: Counts | None = None
    """Pixels by raw id; None also where the mask is a picture in colors."""
    class_counts: Counts | None = None
    """Pixels by train id, 255 being void; None also where a value is not listed."""
    faults: tuple[tuple[str, str], ...] = ()
    """Kind and sentence."""
    remarks: tuple[str, ...] = ()
    """What is not wrong, but was changed or could not be told."""


def examine(pair: Pair, label_set: LabelSet) -> Finding:
    """Read one image and its mask, wholly; nothing is raised for what is wrong with them."""
    return _examine(pair, lambda: read_bytes(pair.image), lambda: read_bytes(pair.mask), label_set)


def examine_record(index: int, records: Records, label_set: LabelSet) -> Finding:
    """`examine` of an example in a record file."""
    try:
        files, image, mask = records.record(index)
    except DataError as error:
        name = f"record {index}"
        return Finding(name, name, name, faults=((UNREADABLE_IMAGE, str(error)),))
    return _examine(files, lambda: image, lambda: mask, label_set)


def _examine(
    files: Pair,
    image_file: Callable[[], bytes],
    mask_file: Callable[[], bytes],
    label_set: LabelSet,
) -> Finding:
    finding = Finding(files.name, str(files.image), str(files.mask))
    faults: list[tuple[str, str]] = []
    image = mask = image_header = None
    try:
        encoded = image_file()
        finding = finding._replace(digest=hashlib.blake2b(encoded, digest_size=16).hexdigest())
        image, image_header = decode_image(files.image, encoded), headers.parse(encoded)
        finding = finding._replace(size=image.shape[:2], remarks=_remarks(image_header))
    except DataError as error:
        faults.append((UNREADABLE_IMAGE, str(error)))
    try:
        encoded = mask_file()
        mask, header = decode_mask(files.mask, encoded), headers.parse(encoded)
        finding = _count(finding, mask, header)
        labels = to_labels(files.mask, mask, label_set, header)
        finding = finding._replace(class_counts=_histogram(labels))
    except DataError as error:
        faults.append((UNREADABLE_MASK if mask is None else OUT_OF_RANGE, str(error)))
    if image is not None and mask is not None:
        try:
            check_sizes(files, image, mask, image_header)
        except DataError as error:
            faults.append((SIZES_DIFFER, str(error)))
    return finding._replace(faults=tuple(faults))


def examine_painted(example: Example) -> Finding:
    """`examine` of an example that no file holds; its labels are the raw ids."""
    name, counts = f"painted {example.index}", _histogram(example.labels)
    return Finding(
        name,
        name,
        name,
        example.image.shape[:2],
        hashlib.blake2b(example.image.tobytes(), digest_size=16).hexdigest(),
        "painted",
        counts,
        counts,
    )


@dataclass
class Survey:
    """Everything found in one split, added up; pixels are counted over readable masks."""

    split: str
    num_images: int = 0
    num_masks: int = 0
    """Readable ones."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    kinds_of_masks: Counter[str] = field(default_factory=Counter)
    raw_pixels: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    raw_images: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    first_with: dict[int, str] = field(default_factory=dict)
    """Raw id -> the first mask that holds it."""
    class_pixels: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    class_images: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    pixels_beside: Counts = field(default_factory=lambda: np.zeros(256, np.int64))
    """Pixels of all images in which the class occurs."""
    faults: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)
    """Remark -> the images it is about."""
    images_by_digest: dict[str, list[str]] = field(default_factory=dict)

    def add(self, finding: Finding) -> None:
        self.num_images += 1
        if finding.size is not None:
            self.sizes[finding.size] += 1
        if finding.digest is not None:
            self.images_by_digest.setdefault(finding.digest, []).append(finding.image)
        if finding.kind_of_mask is not None:
            self.num_masks += 1
            self.kinds_of_masks[finding.kind_of_mask] += 1
        if finding.raw_counts is not None:
            self.raw_pixels += finding.raw_counts
            self.raw_images += finding.raw_counts > 0
            for raw in np.flatnonzero(finding.raw_counts):
                self.first_with.setdefault(int(raw), finding.mask)
        if finding.class_counts is not None:
            self.class_pixels += finding.class_counts
            self.class_images += finding.class_counts > 0
            self.pixels_beside += (finding.class_counts > 0) * finding.class_counts.sum()
        for kind, sentence in finding.faults:
            self.faults.setdefault(kind, []).append(sentence)
        for remark in finding.remarks:
            self.remarks.setdefault(remark, []).append(finding.image)

    @property
    def raw_ids(self) -> list[int]:
        """Raw ids that occur, ascending."""
        return np.flatnonzero(self.raw_pixels).tolist()


def survey(split: str, findings: Iterable[Finding]) -> Survey:
    """What was found, added up."""
    result = Survey(split)
    for finding in findings:
        result.add(finding)
    return result


def examine_all(split: Sequence[Pair] | Records, label_set: LabelSet) -> Iterator[Finding]:
    """`examine` of every pair or record, in order, in as many processes as are worth their start."""
    num_workers = min(num_cores(), _MOST_PROCESSES) if len(split) >= _FEWEST_FOR_PROCESSES else 0
    if isinstance(split, Records):
        look = functools.partial(examine_record, records=split, label_set=label_set)
        return in_order(look, range(len(split)), num_workers=num_workers)
    look = functools.partial(examine, label_set=label_set)
    return in_order(look, split, num_workers=num_workers)


def _histogram(values: LabelMap) -> Counts:
    return np.bincount(values.ravel(), minlength=256)


def _count(finding: Finding, mask: np.ndarray, header: headers.Header | None) -> Finding:
    """Adds the kind of the mask and, where it has one channel, its pixels by raw id."""
    if mask.ndim == 2:
        return finding._replace(kind_of_mask=RAW_IDS, raw_counts=_histogram(mask))
    has_palette = header is not None and header.has_palette
    kind = "a palette, read by its colors" if has_palette else "pictures, read by their colors"
    return finding._replace(kind_of_mask=kind)


def _remarks(header: headers.Header | None) -> tuple[str, ...]:
    if header is None:
        return ("neither PNG nor JPEG, whatever the name says; read as OpenCV decodes it",)
    remarks = []
    if header.orientation > 1:
        remarks.append(
            "turned as the Exif orientation says; masks must match the image as it is shown, which sizes "
            "prove only where height and width change places and differ"
        )
    if header.kind == "jpeg" and header.channels == 4:
        remarks.append("CMYK, read as RGB without color profile")
    if header.has_alpha:
        remarks.append("an alpha channel that is opaque, left out")
    return tuple(remarks)
