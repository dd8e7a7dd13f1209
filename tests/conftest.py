"""Rules of the whole suite: eight CPU devices, strict ranks, cached compilations, seconds per module."""

import os
import time
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".jax_cache"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import pytest  # noqa: E402

_seconds: dict[str, float] = {}
_budgets: dict[str, float] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Add up the seconds of each test module."""
    start = time.monotonic()
    yield
    name = item.module.__name__
    _seconds[name] = _seconds.get(name, 0.0) + time.monotonic() - start
    _budgets[name] = item.module.BUDGET_SECONDS


def pytest_terminal_summary(terminalreporter):
    """Print what each module took beside its budget."""
    terminalreporter.write_sep("=", "seconds per test module (budget)")
    for name, seconds in sorted(_seconds.items(), key=lambda row: -row[1]):
        terminalreporter.write_line(f"{seconds:7.1f}  ({_budgets[name]:.0f})  {name}")


def pytest_sessionfinish(session, exitstatus):
    """A module over its budget fails the session: slow suites are not run."""
    over = [name for name, seconds in _seconds.items() if seconds > _budgets[name]]
    if over and exitstatus == 0:
        print(f"\nover their budget of seconds: {', '.join(over)}")
        session.exitstatus = 1
