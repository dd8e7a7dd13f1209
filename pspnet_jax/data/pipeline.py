"""Sources -> batches, with Grain.

* Training reads one global stream: shuffle, repeat, augment, batch, and only then take this process's
  part and skip to the first step. So the batches depend on the seed alone, not on the number of
  processes or workers, and resuming reads no skipped image.
* Evaluation reads every image once, in order, at its own size; of several processes each reads every
  n-th.
* Loader processes never touch an accelerator and end when their parent does.
"""

from collections.abc import Callable, Generator, Iterator
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags

from pspnet_jax.arrays import Batch, Example
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.data.folders import FolderSource
from pspnet_jax.data.layouts import DataError, Pair
from pspnet_jax.data.scenes import Scenes
from pspnet_jax.data.workers import start_worker

NUM_THREADS = 2
PREFETCHED_BATCHES = 4


@runtime_checkable
class Source(Protocol):
    """Examples by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@runtime_checkable
class Records(Protocol):
    """A source that can hand out the contents of its files; `builders.PreparedSource` is one."""

    def __len__(self) -> int: ...

    def record(self, index: int) -> tuple[Pair, bytes, bytes]: ...


def open_source(
    kind: str, *, split: str, label_set: LabelSet, layout: str, root: str | None
) -> Source:
    """The examples of one split: 'folder' reads files, 'prepared' record files, 'scenes' paints.

    Raises:
        DataError: where files or classes are named that 'scenes' would not use, or files are missing.
    """
    if kind == "scenes":
        if root is not None or label_set != load_label_set("scenes"):
            raise DataError(
                f"data.source=scenes paints its own images with the labels 'scenes' and would not use "
                f"data.root={root!r} and data.labels={label_set.name!r}; for files on disk say "
                "--config.data.source=folder"
            )
        return Scenes(split)
    if kind == "prepared":
        from pspnet_jax.data.builders import PreparedSource  # half a second, only where it is used

        return PreparedSource(root, layout=layout, split=split, label_set=label_set)
    return FolderSource(root, layout=layout, split=split, label_set=label_set)


def name_of(source: Source, position: int) -> str:
    """What people call an example: its file's name, where it has one."""
    if isinstance(source, FolderSource):
        return source.names[position]
    if isinstance(source, Records):
        return source.record(position)[0].name
    return f"number {position}"


def training_batches(
    source: Source,
    augment: Callable[[Example, np.random.Generator], Example],
    *,
    global_batch_size: int,
    seed: int,
    first_step: int,
    num_workers: int,
) -> Generator[Batch, None, None]:
    """This process's part of every global batch from `first_step` on, without end.

    Args:
        global_batch_size: images per step over all processes.
        seed: of the order of images and of augmentation.
        first_step: 0, or the number of steps that were already taken.
        num_workers: loader processes; 0 loads in threads of this one.
    """
    num_processes = jax.process_count()
    stream = (
        grain.MapDataset.source(source)
        .seed(seed)
        .shuffle()
        .repeat(None)
        .random_map(augment)
        .batch(global_batch_size // num_processes, drop_remainder=True)
    )
    mine = stream[jax.process_index() :: num_processes].slice(slice(first_step, None))
    # One thread in each process: where cores are wanted, more processes give more (on two cores two of them
    # 1.7 times what one gives), and buffers multiply.
    options = grain.ReadOptions(
        num_threads=NUM_THREADS if num_workers == 0 else 1,
        prefetch_buffer_size=PREFETCHED_BATCHES,
    )
    batches = mine.to_iter_dataset(options)
    if num_workers > 0:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads the global flags in front of its workers
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2),
            worker_init_fn=_start_worker,
        )
    return _closing(iter(batches))


def _closing(batches: grain.DatasetIterator) -> Generator[Batch, None, None]:
    """The batches; what was read ahead is given back when nobody asks any more."""
    try:
        yield from map(_to_batch, batches)
    finally:
        batches.close()


def evaluation_examples(
    source: Source, *, process_index: int = 0, num_processes: int = 1
) -> Iterator[Example]:
    """One process's part of the examples, each once, in order, read ahead in threads."""
    options = grain.ReadOptions(num_threads=NUM_THREADS, prefetch_buffer_size=8)
    mine = grain.MapDataset.source(source)[process_index::num_processes]
    return iter(mine.to_iter_dataset(options))


def _to_batch(examples: Example) -> Batch:
    """Grain has stacked the fields; a training batch has no padding."""
    valid = np.ones(len(examples.image), bool)
    return Batch(examples.image, examples.labels, np.asarray(examples.index, np.int32), valid)


def _start_worker(worker_index: int, num_workers: int) -> None:
    start_worker()
