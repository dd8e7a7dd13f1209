"""SIGTERM during training: the notice of a scheduler that the machine will be taken away.

* The step at hand is finished and saved; then the process ends with exit code 143.
* Of several processes all stop after the same step, whichever of them was told: JAX's preemption service
  lets them agree on it.
* A second SIGTERM, after the first was heard, ends the process at once (one of several goes on to their common step).
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Terminated(BaseException):
    """The process was told to end. Like KeyboardInterrupt it is not an error that anything handles."""


class Termination:
    """Hears SIGTERM; a context manager that puts back what heard it before."""

    def __init__(self):
        self._is_asked = False
        self._raises = False
        self._is_interrupted = False
        self._before: list[tuple[int, Any]] = []

    def __enter__(self) -> "Termination":
        # With several processes JAX listens; only the main thread can.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number, heard in ((signal.SIGTERM, self._hear), (signal.SIGINT, self._interrupt)):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    before = signal.signal(number, heard)
                    self._before.append((number, before or signal.SIG_DFL))
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.pop())

    def stops_after(self, step: int) -> bool:
        """Whether to save and end now. Every process calls this after each step."""
        if self._is_interrupted:
            raise KeyboardInterrupt
        if jax.process_count() > 1:
            self._is_asked = multihost_utils.reached_preemption_sync_point(step)
            if self._is_asked:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._is_asked

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Inside, between two steps and for as long as it takes, SIGTERM raises `Terminated` where it is heard.

        Of several processes each goes on to its next step, where they agree.
        """
        self._raises = True
        try:
            if self._is_asked:
                raise Terminated
            yield
        finally:
            self._raises = False

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        # Where this lands in a callback of the garbage collector, Python forgets it: the next step asks again.
        self._is_interrupted = True
        raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._is_asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._raises:
            raise Terminated
