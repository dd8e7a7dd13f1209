"""Steps whose loss or gradient was not finite: they changed nothing; here they are named, and bounded.

The compiled step decides (`train_step`), so that nothing waits for it; here its count is read where the progress
is read anyway.
"""

import logging
from collections.abc import Callable, Mapping

import numpy as np

from pspnet_jax.arrays import Indices, Scalar

log = logging.getLogger("pspnet_jax")


class NotFiniteError(ValueError):
    """Too many steps in a row changed nothing: training has diverged."""


class SkippedSteps:
    """Watches the count of skipped steps.

    Args:
        count: of those before the first step that is heard of.
        most_in_a_row: after so many nothing is learned any more.
        name_of: position of an example in its source -> what people call it.
    """

    def __init__(self, count: int, *, most_in_a_row: int, name_of: Callable[[int], str]):
        self._count, self._most, self._name_of = count, most_in_a_row, name_of
        self._in_a_row = 0
        self._unread: list[tuple[int, list[Scalar], Indices]] = []

    def goes_on(self) -> bool:
        """`tell`, and whether the last step was skipped."""
        self.tell()
        return self._in_a_row > 0

    def hear(self, step: int, metrics: Mapping[str, Scalar], index: Indices) -> None:
        """Of a step that may still be computed; as many as may be skipped in a row are told at once.

        Args:
            metrics: of the step: loss and gradient_norm.
            index: positions of the images of this process; negative ones are left out.
        """
        # Not its count of skipped steps, which may share its memory with the state, given to the next step.
        self._unread.append((step, [metrics["loss"], metrics["gradient_norm"]], index))
        if len(self._unread) >= self._most:
            self.tell()

    def tell(self) -> None:
        """Wait for the steps that were heard of; name the images of those that were skipped.

        Raises:
            NotFiniteError: where too many in a row were.
        """
        for step, values, index in self._unread:
            if np.isfinite(values[0] + values[1]):  # as the step decided
                self._in_a_row = 0
                continue
            self._count += 1
            self._in_a_row += 1
            names = ", ".join(self._name_of(int(i)) for i in np.sort(index) if i >= 0)
            log.warning(
                "step %d changed nothing: its loss or gradient is not finite (%d such steps so far); its "
                "images: %s",
                step,
                self._count,
                names,
            )
            if self._in_a_row >= self._most:
                raise NotFiniteError(
                    f"{self._in_a_row} steps in a row, up to step {step}, had a loss or gradient that is not "
                    "finite and changed nothing (train.skipped_in_a_row_max). Lower "
                    "optimizer.learning_rate or raise optimizer.warmup_steps: the same command goes on from the "
                    "newest checkpoint, which is of before these steps. Where its first step is not finite "
                    "again it has diverged already: move its folder away, and the one before it is taken. "
                    "Where single images do it, the lines above name them"
                )
        self._unread.clear()
