"""Processes that read files beside this one.

* They never touch an accelerator, and they end when their parent does, however it ends.
* Ctrl-C is for the parent: it stops handing out work, and the processes end with what they are at.
* SIGTERM, which schedulers send to all processes of a job, too: a training finishes the step at hand, for which
  it may need another batch. They go on for as long as that may take, then they end.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from types import FrameType
from typing import TypeVar

import cv2
import jax

Item = TypeVar("Item")
Result = TypeVar("Result")

_ITEMS_AT_ONCE = 4
_SECONDS_AFTER_SIGTERM = 60


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int
) -> Iterator[Result]:
    """The function of every item, in order, computed in processes; 0: in this one.

    Raises:
        ChildProcessError: where a process was ended from outside.
    """
    if num_workers == 0:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), initializer=start_worker)
    try:
        with _interrupts_blocked():
            results = pool.map(function, items, chunksize=_ITEMS_AT_ONCE)
        yield from results
    except BrokenProcessPool:
        raise ChildProcessError(
            f"one of {num_workers} processes that read files was ended from outside, most likely for "
            "want of memory"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def start_worker() -> None:
    """What a loader process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)
    jax.config.update("jax_platforms", "cpu")
    cv2.setNumThreads(0)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that this thread starts in here never see Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_later(number: int, frame: FrameType | None) -> None:
    timer = threading.Timer(_SECONDS_AFTER_SIGTERM, os._exit, [128 + number])
    timer.daemon = True
    timer.start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
