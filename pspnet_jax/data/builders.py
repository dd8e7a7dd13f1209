"""Prepared data sets: the files of a folder's examples in a few large ArrayRecord files.

* Written and read through TFDS (tensorflow_datasets), without TensorFlow.
* A record holds the bytes of an image file and of its mask file as they are, their names and the
  position of the example. So `FolderSource` and `PreparedSource` decode the same bytes with the same
  function, and their examples are equal.
* Records are written shard by shard, in the folder's order. TFDS' usual builder orders by hash, keeps
  a split in memory and, above 1 GB, asks for TensorFlow; `ShardBasedBuilder` does none of it.
* One folder holds one data set. It is written under another name and renamed when it is complete;
  metadata.json in it says what it was made of, and both writing again and reading check that.
"""

import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from pspnet_jax.arrays import Example
from pspnet_jax.catalog import LabelSet, built_in_names
from pspnet_jax.data.folders import FolderSource, decode_example
from pspnet_jax.data.layouts import DataError, Pair

NAME, VERSION = "prepared", "1.0.0"  # the version of what a record holds
SHARD_BYTES = 256 << 20

log = logging.getLogger("pspnet_jax")


def prepare(
    root: str,
    splits: Mapping[str, FolderSource],
    output: Path,
    *,
    layout: str,
    label_set: LabelSet,
    on_record: Callable[[], object] = lambda: None,
) -> Path:
    """Write all splits of a data set, or find that they were written.

    Args:
        root: the folder that the splits were read from; stored names are relative to it.
        splits: by name, as `data.train_split` has it.
        output: what `data.root` is when they are read.
        on_record: called after each example, for whoever shows how far it is.

    Returns:
        The folder of the record files. A preparation that is stopped leaves nothing of that name.

    Raises:
        DataError: where `output` holds another data set, or the disk is full.
    """
    folder = output / NAME / VERSION
    contents = _describe(splits, layout, label_set)
    if folder.exists():
        _check_same(_read_contents(folder), contents, output)
        log.info("%s holds these examples already; nothing to do", folder)
        return folder
    output.mkdir(parents=True, exist_ok=True)
    for leftover in (output / NAME).glob(f"incomplete.*_{VERSION}"):
        log.info("%s: removing what an interrupted preparation left", leftover)
        shutil.rmtree(leftover)
    num_bytes = sum(split["num_bytes"] for split in contents["splits"].values())
    free = shutil.disk_usage(output).free
    if num_bytes > free:
        raise DataError(
            f"{output} has {free / 1e9:.2f} GB free, the files of the data set are "
            f"{num_bytes / 1e9:.2f} GB: choose another --output"
        )
    builder = _Builder(
        root, splits, contents, on_record, data_dir=output, file_format="array_record"
    )
    tfds.disable_progress_bar()
    try:
        with (
            TemporaryDirectory() as downloads,  # TFDS makes a folder for them, used or not
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),  # it prints that it is downloading
        ):
            builder.download_and_prepare(
                download_dir=downloads,
                download_config=tfds.download.DownloadConfig(try_download_gcs=False),
            )
    except RuntimeError as error:  # what the writer of record files makes of any fault
        raise DataError(f"{output} cannot be written: {error}") from None
    return folder


class PreparedSource:
    """Examples of one split that `prepare` has written, equal to those of its `FolderSource`.

    Record files are opened when they are first read, in each process that reads.

    Args:
        root: the folder that was the output of `prepare`.
        layout, split, label_set: as they were prepared.

    Raises:
        DataError: where nothing was prepared, or another layout, label set or split.
    """

    def __init__(self, root: str | None, *, layout: str, split: str, label_set: LabelSet):
        self._folder = _find_folder(root)
        contents = _read_contents(self._folder)
        _check_reads(contents, self._folder, layout=layout, split=split, label_set=label_set)
        stored = contents["splits"][split]
        name, skip = stored["stored_as"], tfds.decode.SkipDecoding()
        try:
            builder: Any = tfds.builder_from_directory(self._folder)
            self._records: Any = builder.as_data_source(
                name, decoders={"image": skip, "mask": skip}
            )
            shards = builder.info.splits[name]
            self._shard_ends = list(itertools.accumulate(shards.shard_lengths))
            self._files = [str(path) for path in shards.filepaths]
        except Exception as error:  # TFDS and protobuf have no common one for damaged JSON
            raise _damaged(self._folder, error) from None
        missing = [path for path in self._files if not Path(path).is_file()]
        if missing:
            raise _damaged(missing[0], "there is no such file")
        if len(self._records) != stored["num_examples"]:
            raise _damaged(
                self._folder, f"{len(self._records)} records, not {stored['num_examples']}"
            )
        self._label_set = label_set

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        files, image, mask = self.record(index)
        try:
            return decode_example(image, mask, index, files=files, label_set=self._label_set)
        except DataError as error:
            raise DataError(
                f"{error}\n  stored in {self._file(index)}; mend the file and prepare again"
            ) from None

    @functools.cached_property
    def names(self) -> list[str]:
        """What people call the examples; all records are read for it once."""
        return [self.record(index)[0].name for index in range(len(self))]

    def record(self, index: int) -> tuple[Pair, bytes, bytes]:
        """The names of one example's files, and the contents of its image and of its mask.

        Raises:
            DataError: where the record file is damaged.
        """
        try:
            record = self._records[index]
        except RuntimeError as error:  # what the reader of record files makes of any fault
            raise _damaged(self._file(index), error) from None
        if record["index"] != index:
            raise _damaged(self._file(index), f"record {index} says that it is {record['index']}")
        image_file, mask_file = (Path(record[key].decode()) for key in ("image_file", "mask_file"))
        files = Pair(record["name"].decode(), image_file, mask_file)
        return files, record["image"], record["mask"]

    def _file(self, index: int) -> str:
        """The record file that holds an example."""
        return self._files[bisect_right(self._shard_ends, index)]


class _Builder(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Writes records through TFDS; `tfds.builder_from_directory` reads them without this class."""

    VERSION = tfds.core.Version(VERSION)
    name = NAME

    def __init__(
        self,
        root: str,
        splits: Mapping[str, FolderSource],
        contents: dict,
        on_record: Callable[[], object],
        **options: Any,
    ):
        self._root, self._splits, self._contents = Path(root), splits, contents
        self._on_record = on_record
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Images and masks of a folder as their original files, in its order.",
            features=tfds.features.FeaturesDict(
                {
                    "name": tfds.features.Text(),
                    "index": tfds.features.Scalar(np.int64),
                    "image": tfds.features.Image(),
                    "image_file": tfds.features.Text(),
                    "mask": tfds.features.Image(shape=(None, None, 1)),
                    "mask_file": tfds.features.Text(),
                }
            ),
            metadata=tfds.core.MetadataDict(self._contents),
        )

    def _shard_iterators_per_split(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, list[Callable]]:
        shards = {}
        for split, source in self._splits.items():
            stored = self._contents["splits"][split]
            num_shards = min(len(source), -(-stored["num_bytes"] // SHARD_BYTES))
            ends = [len(source) * i // num_shards for i in range(num_shards + 1)]
            shards[stored["stored_as"]] = [
                partial(self._records, split, source.pairs, range(*ends[i : i + 2]))
                for i in range(num_shards)
            ]
        return shards

    def _records(
        self, split: str, pairs: list[Pair], indices: range
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in indices:
            pair = pairs[index]
            # TFDS keeps what is yielded until the shard is written, so files are paths, not bytes.
            yield (
                index,
                {
                    "name": pair.name,
                    "index": index,
                    "image": pair.image,
                    "image_file": _relative(pair.image, self._root),
                    "mask": pair.mask,
                    "mask_file": _relative(pair.mask, self._root),
                },
            )
            self._on_record()


def _describe(splits: Mapping[str, FolderSource], layout: str, label_set: LabelSet) -> dict:
    """What metadata.json holds: plain data."""
    described: dict[str, dict] = {}
    taken = {"all"}  # reserved by TFDS
    for split, source in splits.items():
        sizes = [(p.image.stat().st_size, p.mask.stat().st_size) for p in source.pairs]
        lines = [
            f"{pair.name} {image} {mask}\n"
            for pair, (image, mask) in zip(source.pairs, sizes, strict=True)
        ]
        # TFDS reads a split's name as a formula, so only letters, digits and underscores stay.
        stored_as = re.sub(r"\W+", "_", Path(split).name.removesuffix(".txt"), flags=re.ASCII)
        while stored_as in taken:  # lists may have one name in two folders
            stored_as += "_"
        taken.add(stored_as)
        described[split] = {
            "stored_as": stored_as,
            "num_examples": len(source),
            "num_bytes": sum(map(sum, sizes)),
            "names_and_sizes": hashlib.sha256("".join(lines).encode()).hexdigest(),
        }
    return {"layout": layout, "labels": label_set.name, "splits": described}


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _find_folder(root: str | None) -> Path:
    how = (
        "prepare a folder of images and masks with `pspnet prepare --config=FILE "
        "--config.data.root=FOLDER --output=DIR` and read it with --config.data.source=prepared "
        "--config.data.root=DIR"
    )
    if root is None:
        raise DataError(f"data.source=prepared, but data.root is not set: {how}")
    folder = Path(root) / NAME / VERSION
    if folder.is_dir():
        return folder
    if not Path(root).is_dir():
        raise DataError(f"data.root={root!r}: there is no such folder; {how}")
    found = sorted(path.name for path in (Path(root) / NAME).glob("*") if path.is_dir())
    if any(re.fullmatch(r"[\d.]+", name) for name in found):
        problem = f"was prepared by another version (records {', '.join(found)}, not {VERSION})"
    elif found:
        problem = "holds only what an interrupted preparation left"
    else:
        problem = "holds no prepared data set"
    raise DataError(f"data.root={root!r} {problem}; {how}")


def _read_contents(folder: Path) -> dict:
    try:
        return json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(folder / "metadata.json", error) from None


def _check_same(stored: dict, wanted: dict, output: Path) -> None:
    """Raise where a folder holds other examples than would be prepared now; listing all differences."""
    faults = [
        f"data.{name}={stored[name]} there, {wanted[name]} here"
        for name in ("layout", "labels")
        if stored[name] != wanted[name]
    ]
    for split in sorted({*stored["splits"], *wanted["splits"]}):
        there, here = stored["splits"].get(split), wanted["splits"].get(split)
        if there is None or here is None:
            faults.append(f"the split '{split}' is only {'there' if here is None else 'here'}")
        elif there != here:
            faults.append(
                f"the split '{split}' has {there['num_examples']} examples there, "
                f"{here['num_examples']} here, of other names or file sizes"
            )
    if faults:
        raise DataError(
            f"{output} holds another prepared data set:\n  " + "\n  ".join(faults) + "\n"
            f"Choose another --output, or remove {output / NAME}."
        )


def _check_reads(
    contents: dict, folder: Path, *, layout: str, split: str, label_set: LabelSet
) -> None:
    asked = {"layout": layout, "labels": label_set.name}
    for name, value in asked.items():
        if contents[name] != value:
            known = name == "layout" or contents[name] in built_in_names()
            right = contents[name] if known else f"PATH/{contents[name]}.csv"
            raise DataError(
                f"data.{name}={value}, but {folder} was prepared with data.{name}={contents[name]}: "
                f"say --config.data.{name}={right}, or prepare again into another folder"
            )
    if split not in contents["splits"]:
        prepared = ", ".join(f"'{s}' ({v['num_examples']})" for s, v in contents["splits"].items())
        raise DataError(
            f"the split '{split}' was not prepared; {folder} holds {prepared}. `pspnet prepare` "
            "writes data.train_split, data.val_split and evaluate.split: prepare it into another folder"
        )


def _damaged(path: Path | str, reason: object) -> DataError:
    return DataError(
        f"{path} is damaged ({reason}): remove the folder '{NAME}' in data.root and prepare it again"
    )
