"""How far a loop is, and messages beside it: the terminal and log.txt.

* `Progress` is one line that is updated in place where standard error is a terminal, a line now and then elsewhere.
* Messages of the package go where `log_to` says; on a terminal each takes the place of the bar.
"""

import logging
import shutil
import sys
import time
from collections import deque
from pathlib import Path
from typing import ClassVar

_SECONDS_BETWEEN_LINES = 15.0
_SECONDS_BETWEEN_BARS = 0.1
_BAR_COLUMNS = 30  # at most
# The rate is that of the last minute, or of 60 updates.
_RATE_MARKS = 60
_SECONDS_BETWEEN_MARKS = 1.0
_ERASE = "\r\x1b[K"  # the terminal's current line

log = logging.getLogger("pspnet_jax")


class Progress:
    """How far a loop is; a context manager that closes itself.

    On a terminal a bar that is updated in place, elsewhere a line every 15 seconds, and one line at the end.
    All of it goes to standard error, which leaves standard output to results; log.txt has the lines in
    either case.

    Args:
        total: number of rounds.
        what: what is counted, in the plural, the unit first: "images of val".
        note: stands at the end of the line, which a narrow terminal cuts.
    """

    _is_bar_shown: ClassVar[bool] = False

    def __init__(self, total: int, what: str = "images", *, note: str = ""):
        self._total, self._what, self._done = total, what, 0
        self._note = f"  {note}" if note else ""
        self._unit = what.split()[0]
        self._is_terminal = sys.stderr.isatty()
        self._start = self._last_line = self._last_bar = time.monotonic()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_MARKS)
        if self._is_terminal:
            self._draw(self._count())

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more."""
        self._done += n
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            self._write_line(self._state(now))
        if self._is_terminal and now - self._last_bar >= _SECONDS_BETWEEN_BARS:
            self._last_bar = now
            self._draw(self._state(now))
        if not self._marks or now - self._marks[-1][0] >= _SECONDS_BETWEEN_MARKS:
            self._marks.append((now, self._done))

    def close(self) -> None:
        """Say how it ended, where anything was counted."""
        self.erase()
        if self._done == 0:
            return
        seconds = time.monotonic() - self._start
        rate = _rate(self._done / max(seconds, 1e-9))
        state = f"{self._count()}  {rate} {self._unit}/s  in {duration(seconds)}{self._note}"
        self._write_line(state)
        if self._is_terminal:
            print(state, file=sys.stderr, flush=True)
        self._done = 0  # a second call says nothing

    @classmethod
    def erase(cls) -> None:
        """Take the bar off the terminal, for a message; the next update draws it again."""
        if cls._is_bar_shown:
            cls._is_bar_shown = False
            print(_ERASE, end="", file=sys.stderr, flush=True)

    def _write_line(self, state: str) -> None:
        log.debug("%s", state)  # for log.txt alone
        if not self._is_terminal:
            print(state, file=sys.stderr, flush=True)

    def _draw(self, state: str) -> None:
        columns = shutil.get_terminal_size().columns - 1
        length = min(_BAR_COLUMNS, columns - len(state) - 3)
        if length >= 5:
            filled = "=" * (length * self._done // max(self._total, 1))
            state = f"[{filled:<{length}}] {state}"
        print(_ERASE + state[:columns], end="", file=sys.stderr, flush=True)
        Progress._is_bar_shown = True

    def _count(self) -> str:
        return f"{self._done}/{self._total} {self._what}"

    def _state(self, now: float) -> str:
        # From the first round on, which may have compiled something.
        then, done = self._marks[0] if self._marks else (self._start, 0)
        rate = (self._done - done) / max(now - then, 1e-9)
        left = f"  {duration((self._total - self._done) / rate)} left" if rate else ""
        return f"{self._count()}  {_rate(rate)} {self._unit}/s{left}{self._note}"


class _Console(logging.StreamHandler):
    """A stream beside which a `Progress` may draw its bar: a message takes its place."""

    def emit(self, record: logging.LogRecord) -> None:
        Progress.erase()
        super().emit(record)


def log_to(path: Path | None, *, console_level: int = logging.INFO) -> None:
    """Send the package's messages to standard output and, where given, to a file."""
    log.setLevel(logging.DEBUG)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    console = _Console(sys.stdout)
    console.setLevel(console_level)
    console.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(console)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(file)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _rate(rate: float) -> str:
    return f"{rate:.1f}" if rate >= 1 else f"{rate:.2g}"
