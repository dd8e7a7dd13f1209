"""A process that hangs ends, says where it hung, and one that does not hang goes on."""

import subprocess
import sys
import time

from pspnet_jax.watchdog import EXIT_CODE, Watchdog

BUDGET_SECONDS = 30

HANG = """
import threading, time
from pathlib import Path
from pspnet_jax.progress import log_to
from pspnet_jax.watchdog import Watchdog
log_to(Path("log.txt"))
def wait_for_a_dead_disk():
    threading.Event().wait()
with Watchdog(0.5, advice="the same command goes on") as watchdog:
    for _ in range(5):
        time.sleep(0.2)
        watchdog.hear()
    print("heard of for a second", flush=True)
    wait_for_a_dead_disk()
"""


def test_a_hanging_process_ends_and_says_where(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", HANG], capture_output=True, text=True, cwd=tmp_path, timeout=20
    )
    assert ran.returncode == EXIT_CODE == 75
    assert "heard of for a second" in ran.stdout
    text = (tmp_path / "log.txt").read_text()
    assert "nothing was done for 0.5 s: the process ends with code 75; the same command" in text
    assert "thread MainThread" in text
    assert "in wait_for_a_dead_disk" in text


def test_zero_watches_nothing_and_an_end_ends_the_watch():
    with Watchdog(0.0, advice=""):
        time.sleep(0.05)
    with Watchdog(0.2, advice=""):
        pass
    time.sleep(0.4)  # it would have ended this process


HANGING_LOG = """
import logging, time
from pspnet_jax import watchdog
class Dead(logging.Handler):
    def emit(self, record):
        time.sleep(1000)
watchdog.log.addHandler(Dead())
watchdog._SECONDS_TO_SAY_WHY = 0.5
with watchdog.Watchdog(0.3, advice=""):
    time.sleep(1000)
"""


def test_a_log_that_hangs_does_not_keep_it_from_ending():
    ran = subprocess.run([sys.executable, "-c", HANGING_LOG], timeout=20)
    assert ran.returncode == EXIT_CODE
