"""Rules of the whole suite: eight CPU devices, strict ranks, cached compilations, seconds per module."""

import logging
import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

if threading.current_thread() is threading.main_thread():
    # In the background of a shell Ctrl-C is ignored, and so it would be in the processes that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Five images to train on and three to evaluate on, in the CamVid layout."""
    from pictures import write_split  # not before the environment is set

    root = tmp_path_factory.mktemp("camvid")
    write_split(root, "train", 5)
    write_split(root, "val", 3)
    return root


@pytest.fixture
def said(monkeypatch):
    """What the package warns of meanwhile."""
    lines: list[str] = []
    log = logging.getLogger("pspnet_jax")
    monkeypatch.setattr(log, "warning", lambda text, *values: lines.append(text % values))
    return lines


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


_seconds: dict[str, float] = {}
_budgets: dict[str, float] = {}


def pytest_runtest_logreport(report):
    """Add up the seconds of each test module."""
    path = Path(report.nodeid.split("::")[0])
    if path.stem not in _budgets:
        text = (Path(__file__).parent / path.name).read_text()
        _budgets[path.stem] = float(
            re.search(r"^BUDGET_SECONDS = (\d+)(?: +#.*)?$", text, re.MULTILINE)[1]
        )
    _seconds[path.stem] = _seconds.get(path.stem, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter):
    """Print what each module took beside its budget."""
    terminalreporter.write_sep("=", "seconds per test module (budget)")
    for name, seconds in sorted(_seconds.items(), key=lambda row: -row[1]):
        terminalreporter.write_line(f"{seconds:7.1f}  ({_budgets[name]:.0f})  {name}")


def pytest_sessionfinish(session, exitstatus):
    """A module over its budget fails the session: slow suites are not run."""
    if hasattr(session.config, "workerinput"):
        return  # of several processes the first one hears of all tests
    over = [name for name, seconds in _seconds.items() if seconds > _budgets[name]]
    if over and exitstatus == 0:
        print(f"\nover their budget of seconds: {', '.join(over)}")
        session.exitstatus = 1
