"""Training goes on past a few images that cannot be read, loudly.

* Where an image or its mask cannot be read, an example takes its place in which every pixel is ignored: the
  other images of the batch are what they would have been, with any number of loader processes.
* The training process names each of them once and stops where they are more than a share of all.
"""

import logging
from collections.abc import Iterator

import numpy as np

from pspnet_jax.arrays import IGNORE_LABEL, Batch, Example
from pspnet_jax.data.layouts import DataError

log = logging.getLogger("pspnet_jax")


class Tolerant:
    """A source whose unreadable examples are blank, with index -1 - i for that of position i.

    Args:
        source: examples by position.
        size: (height, width) of blank ones, pixels.
        color: RGB of blank ones, 0 .. 255.
    """

    def __init__(self, source, *, size: tuple[int, int], color: tuple[int, int, int]):
        self.source, self._size, self._color = source, size, color

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        try:
            return self.source[index]
        except DataError:
            image = np.full((*self._size, 3), self._color, np.uint8)
            labels = np.full(self._size, IGNORE_LABEL, np.uint8)
            return Example(image, labels, np.int32(-1 - index))


def watched(batches: Iterator[Batch], source: Tolerant, *, share_max: float) -> Iterator[Batch]:
    """The batches as they are; each blank example is named when it first comes.

    Args:
        share_max: of the examples of the source, that may be blank. Each of several processes counts those that it
            meets; after a few epochs these are nearly all.

    Raises:
        DataError: where more are.
    """
    blank: set[int] = set()
    for batch in batches:
        found = {-1 - int(index) for index in batch.index if index < 0}
        for position in sorted(found - blank):
            log.warning("left out of training: %s", _reason(source, position))
        blank |= found
        if len(blank) > share_max * len(source):
            raise DataError(
                f"{len(blank)} of {len(source)} training images cannot be read, more than "
                f"data.unreadable_share_max={share_max:g}; `pspnet check` lists all of them. The last: "
                f"{_reason(source, max(found))}"
            )
        yield batch


def _reason(source: Tolerant, position: int) -> str:
    """Why it could not be read; loader processes cannot say."""
    try:
        source.source[position]
    except DataError as error:
        return str(error)
    return f"example {position} could not be read before, now it can"
