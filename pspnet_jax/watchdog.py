"""Ends a process that hangs: a loader that waits for a dead disk, a collective whose peer is gone.

A process that hangs holds machines for days and says nothing; one that ends is started again.
"""

import logging
import os
import sys
import threading
import traceback
from typing import NoReturn

log = logging.getLogger("pspnet_jax")

EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: try again."""
_TICKS = 20
_SECONDS_TO_SAY_WHY = 10.0


class Watchdog:
    """Writes the stacks of all threads and ends the process when no step was heard of for a while; a context
    manager.

    Time is counted in ticks of its own thread, so that a process that was suspended is not ended when it
    goes on.

    Args:
        seconds: of silence; 0 watches nothing.
        advice: what to do next, for the log.
    """

    def __init__(self, seconds: float, *, advice: str):
        self._seconds, self._advice = seconds, advice
        self._silent_ticks = 0
        self._is_closed = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed.set()

    def hear(self) -> None:
        """Something was done."""
        self._silent_ticks = 0

    def _watch(self) -> None:
        while not self._is_closed.wait(self._seconds / _TICKS):
            self._silent_ticks += 1
            if self._silent_ticks >= _TICKS:
                self._end()

    def _end(self) -> None:
        end_process(
            EXIT_CODE,
            f"nothing was done for {self._seconds:g} s: the process ends with code {EXIT_CODE}; "
            f"{self._advice}\n{stacks()}",
        )


def end_process(code: int, message: str) -> NoReturn:
    """Say why, and end this process without waiting for anything: also where what hangs is the log."""
    timer = threading.Timer(_SECONDS_TO_SAY_WHY, os._exit, [code])
    timer.daemon = True
    timer.start()
    log.error("%s", message)
    for handler in log.handlers:
        handler.flush()
    os._exit(code)


def stacks() -> str:
    """What every thread is at."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(identity, identity)}:\n{''.join(traceback.format_stack(frame))}"
        for identity, frame in sys._current_frames().items()
    )
