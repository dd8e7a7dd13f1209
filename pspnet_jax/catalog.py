"""Label sets: the classes of a data set, their colors, and how its raw mask values become train ids.

* One CSV per set in `labels/`, columns id,name,red,green,blue,raw_ids (several raw ids are separated by
  spaces) and, optionally, group. The row with id 255 lists the raw values that are void.
* Raw values are mapped here and nowhere else; 255 in a raw mask is void unless a class lists it, and
  another value that no row lists is an error that names it.
* A mask may also be a picture in the colors of the set (the official masks of PASCAL VOC are): then the
  color says the class, exactly or not at all.
* Two data sets come in two encodings whose values overlap. `cityscapes` reads labelIds (road is 7),
  `cityscapes_train_ids` the derived labelTrainIds (road is 0); `ade20k` the official masks (wall is 1,
  0 is void), `ade20k_train_ids` masks converted for the authors' code (wall is 0, 255 is void).
* Sources: names and colors of ADE20K, PASCAL VOC 2012 and Cityscapes as in the authors' code
  (github.com/hszhao/semseg, MIT), raw ids of Cityscapes as in cityscapesScripts, CamVid as in the SegNet
  tutorial's palette; `scenes` is ours.
"""

import csv
import difflib
import hashlib
import importlib.resources
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from pspnet_jax.arrays import IGNORE_LABEL, LabelMap, RawImage

COLUMNS = ("id", "name", "red", "green", "blue", "raw_ids")
MAX_CLASSES = 254
TWO_CLASSES = (
    "255 is void unless a class lists it: masks of two classes, 0 and 255, want a CSV as data.labels with "
    f"the lines '{','.join(COLUMNS)}', '0,background,0,0,0,0' and '1,object,220,20,60,255'"
)
_SPACES = "several raw_ids are separated by spaces"
_UNMAPPED = 254  # inside the look-up table only; train ids never reach it


@dataclass(frozen=True)
class LabelSet:
    """The classes of a data set, in the order of their train ids."""

    name: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    raw_ids: tuple[tuple[int, ...], ...]
    void_raw_ids: tuple[int, ...]
    groups: tuple[str | None, ...]
    crop_size: tuple[int, int] = field(default=(473, 473), compare=False)
    """Crop (height, width) in pixels: the default of training; in a checkpoint, that of its training."""
    base_size: int = field(default=512, compare=False)
    """Long side in pixels to which the authors bring images for evaluation."""
    void_colors: tuple[tuple[int, int, int], ...] = field(default=(), compare=False)
    """Colors of void in masks that are pictures; runs from before they were kept stay resumable."""

    @property
    def num_classes(self) -> int:
        return len(self.names)

    @property
    def digest(self) -> str:
        """Of what masks mean: values, colors, classes."""
        meaning = [self.names, self.raw_ids, self.void_raw_ids, self.colors, self.void_colors]
        return hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    @property
    def table(self) -> UInt8[np.ndarray, "256"]:
        """Raw value -> train id; `_UNMAPPED` where no row lists the value."""
        table = np.full(256, _UNMAPPED, np.uint8)
        table[[IGNORE_LABEL, *self.void_raw_ids]] = IGNORE_LABEL
        for train_id, raw_ids in enumerate(self.raw_ids):
            table[list(raw_ids)] = train_id
        return table

    @property
    def palette(self) -> UInt8[np.ndarray, "256 3"]:
        """Train id -> RGB; void and unused ids are black."""
        palette = np.zeros((256, 3), np.uint8)
        palette[: self.num_classes] = self.colors
        return palette

    def from_raw(self, mask: LabelMap) -> LabelMap:
        """Train ids of a mask of raw values.

        Raises:
            ValueError: naming the values that the label set does not list.
        """
        labels = self.table[mask]
        unmapped = labels == _UNMAPPED
        if unmapped.any():
            found = ", ".join(map(str, np.unique(mask[unmapped])[:10]))
            void = np.flatnonzero(self.table == IGNORE_LABEL).tolist()
            listed = set(np.unique(mask[~unmapped]).tolist())
            binary = f"; {TWO_CLASSES}" if 255 in void and {255} <= listed <= {0, 255} else ""
            raise ValueError(
                f"mask values {found} are out of range for label set '{self.name}' (its classes list "
                f"{_ranges([raw for ids in self.raw_ids for raw in ids])}, void is {_ranges(void) or 'nothing'}); "
                f"is data.labels the right one?{binary}"
            )
        return labels

    def changes_to(self, other: "LabelSet") -> list[str]:
        """Everything in which another set differs, e.g. 'name of 1: house -> building'."""
        changed = []
        for what, of in {
            "name": "names",
            "raw ids": "raw_ids",
            "color": "colors",
            "group": "groups",
        }.items():
            pairs = itertools.zip_longest(getattr(self, of), getattr(other, of), fillvalue="none")
            changed += [f"{what} of {i}: {a} -> {b}" for i, (a, b) in enumerate(pairs) if a != b]
        if self.void_raw_ids != other.void_raw_ids:
            changed.append(f"raw ids of void: {self.void_raw_ids} -> {other.void_raw_ids}")
        if self.name != other.name:
            changed.append(f"its own name: {self.name} -> {other.name}")
        return changed

    def meaning(self, raw: int) -> str | None:
        """What a raw value stands for: the name of a class, 'void', or nothing (None)."""
        train_id = int(self.table[raw])
        names = {IGNORE_LABEL: "void", _UNMAPPED: None}
        return names[train_id] if train_id in names else self.names[train_id]

    def from_colors(self, mask: RawImage) -> LabelMap:
        """Train ids of a mask that is a picture in the colors of this label set.

        Raises:
            ValueError: naming the colors that the label set does not list, or that it lists twice.
        """
        colors = (*self.colors, *self.void_colors)
        repeated = [color for color, count in Counter(colors).items() if count > 1]
        if repeated:
            raise ValueError(
                f"the mask is a picture in colors, and label set '{self.name}' has {repeated[:5]} for "
                "several rows: give each its own color, or save masks of raw ids with one channel"
            )
        train_ids = np.full(len(colors), IGNORE_LABEL, np.uint8)
        train_ids[: self.num_classes] = range(self.num_classes)
        known, packed = _pack(np.array(colors, np.uint8)), _pack(mask)
        order = np.argsort(known)
        known, train_ids = known[order], train_ids[order]
        nearest = np.searchsorted(known, packed).clip(max=len(known) - 1)
        foreign = known[nearest] != packed
        if foreign.any():
            found = list(map(tuple, np.unique(mask[foreign], axis=0).tolist()))
            raise ValueError(
                f"the mask is a picture in colors, and {', '.join(map(str, found[:5]))} (red, green, "
                f"blue; {len(found)} in all) are none of label set '{self.name}'; is data.labels the "
                "right one? Masks of raw ids are saved with one channel"
            )
        return train_ids[nearest]

    def to_json(self) -> dict:
        """Plain data for checkpoints; `LabelSet.from_json` reads it back."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_json(cls, data: dict) -> "LabelSet":
        def as_tuple(value: Any) -> Any:
            return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value

        return cls(**{name: as_tuple(value) for name, value in data.items()})


_DEFAULT_SIZES = ((473, 473), 512)
# Crop (height, width) and base size (long side) in pixels, where they differ.
_SIZES = {
    "camvid": ((353, 353), 512),
    "cityscapes": ((713, 713), 2048),
    "cityscapes_train_ids": ((713, 713), 2048),
    "scenes": ((129, 129), 512),
}


def built_in_names() -> tuple[str, ...]:
    """Names of the label sets that come with the package."""
    files = importlib.resources.files("pspnet_jax") / "labels"
    return tuple(sorted(Path(f.name).stem for f in files.iterdir() if f.name.endswith(".csv")))


def load_label_set(name_or_path: str) -> LabelSet:
    """A built-in label set by name, or one's own from a CSV file.

    Raises:
        ValueError: for an unknown name (naming the nearest) or a malformed file (naming the row).
    """
    if name_or_path in built_in_names():
        resource = importlib.resources.files("pspnet_jax") / "labels" / f"{name_or_path}.csv"
        return _parse(
            name_or_path,
            resource.read_text("utf-8-sig"),
            *_SIZES.get(name_or_path, _DEFAULT_SIZES),
            where=f"label set '{name_or_path}'",
        )
    path = Path(name_or_path)
    if path.suffix == ".csv":
        if not path.is_file():
            raise ValueError(f"data.labels={name_or_path!r}: there is no such file")
        text = path.read_text("utf-8-sig")
        return _parse(path.stem, text, *_DEFAULT_SIZES, where=f"label set {path}")
    nearest = difflib.get_close_matches(name_or_path, built_in_names(), n=1)
    hint = f" (did you mean '{nearest[0]}'?)" if nearest else ""
    raise ValueError(
        f"data.labels={name_or_path!r} is neither a label set "
        f"({', '.join(built_in_names())}) nor a .csv file{hint}"
    )


def shortened(changes: Sequence[str]) -> str:
    """The first few of `LabelSet.changes_to`."""
    return ", ".join([*changes[:6], *(["..."] if len(changes) > 6 else [])])


def _ranges(values: list[int]) -> str:
    """Numbers as people write them: 0..10, 12."""
    values = sorted(set(values))
    starts = [v for v in values if v - 1 not in values]
    ends = [v for v in values if v + 1 not in values]
    pairs = zip(starts, ends, strict=True)
    return ", ".join(str(a) if a == b else f"{a}..{b}" for a, b in pairs)


def _pack(colors: UInt8[np.ndarray, "*shape 3"]) -> Int32[np.ndarray, "*shape"]:
    """Each color as one number."""
    wide = colors.astype(np.int32)
    return (wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]


class _Row(NamedTuple):
    """One line of a CSV."""

    id: int
    name: str
    color: tuple[int, int, int] | None
    raw_ids: tuple[int, ...]
    group: str | None


def _parse(
    name: str, text: str, crop_size: tuple[int, int], base_size: int, *, where: str
) -> LabelSet:
    """The label set that a CSV holds; `where` is what errors name."""
    reader = csv.DictReader(text.splitlines())
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{where}: columns {', '.join(missing)} are missing; the first line must be {','.join(COLUMNS)}"
        )
    rows = []
    for row in reader:
        try:
            rows.append(_row(row))
        except ValueError as error:
            raise ValueError(f"{where}, line {reader.line_num}: {error}") from None
    void = [row for row in rows if row.id == IGNORE_LABEL]
    classes = [row for row in rows if row.id != IGNORE_LABEL]
    void_colors = tuple(row.color for row in void if row.color is not None)
    colors = tuple(row.color or (0, 0, 0) for row in classes)
    raw_ids = [raw for row in rows for raw in row.raw_ids]
    _check(where, [row.id for row in classes], (*colors, *void_colors), raw_ids)
    return LabelSet(
        name=name,
        names=tuple(row.name for row in classes),
        colors=colors,
        raw_ids=tuple(row.raw_ids for row in classes),
        void_raw_ids=tuple(raw for row in void for raw in row.raw_ids),
        groups=tuple(row.group for row in classes),
        crop_size=crop_size,
        base_size=base_size,
        void_colors=void_colors,
    )


def _row(cells: dict) -> _Row:
    beyond, group = ",".join(cells.get(None, ())), cells.get("group") or None
    if beyond.strip(", "):
        raise ValueError(f"{beyond!r} stands behind the last column; {_SPACES}")
    if group is not None and group.isdecimal():
        raise ValueError(f"the group is {group}, a number; {_SPACES}")
    try:
        number = int(cells["id"])
        # Void needs no color.
        has_color = number != IGNORE_LABEL or bool(cells["red"])
        color = (int(cells["red"]), int(cells["green"]), int(cells["blue"])) if has_color else None
        raw_ids = tuple(map(int, cells["raw_ids"].split()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{error}; all but names must be whole numbers, {_SPACES}") from None
    return _Row(number, cells["name"], color, raw_ids, group)


def _check(where: str, ids: list[int], colors: tuple, raw_ids: list[int]) -> None:
    if ids != list(range(len(ids))) or not 2 <= len(ids) <= MAX_CLASSES:
        raise ValueError(
            f"{where}: ids must count 0, 1, 2, ... (at least two, at most "
            f"{MAX_CLASSES} classes), and {IGNORE_LABEL} for void; found {ids[:5]} ..."
        )
    repeated = sorted({raw for raw in raw_ids if raw_ids.count(raw) > 1})
    if repeated:
        raise ValueError(f"{where}: raw ids {repeated} are listed twice")
    wrong = [value for value in [*raw_ids, *sum(colors, ())] if not 0 <= value <= 255]
    if wrong:
        raise ValueError(f"{where}: {wrong[:5]} are not within 0..255")
