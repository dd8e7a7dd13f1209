"""Processes that read files: in order, off the accelerator, and gone when nobody waits for them."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import survey
from pspnet_jax.data.layouts import list_split
from pspnet_jax.data.workers import in_order

from pictures import write_split

BUDGET_SECONDS = 90

SLEEPERS = """
import time
from pspnet_jax.data.workers import in_order
for _ in in_order(time.sleep, [0.3] * 1000, num_workers=2):
    print("one", flush=True)
"""


def doubled_with_process_and_platform(number):
    return 2 * number, os.getpid(), jax.config.jax_platforms


def blocked_signals(_):
    return signal.pthread_sigmask(signal.SIG_BLOCK, ())


def sleeps_with_an_interrupt():
    """Seconds to sleep, a minute for two; Ctrl-C comes when all are handed out."""
    yield from [0.3] * 400
    os.kill(os.getpid(), signal.SIGINT)


def test_results_come_in_order_from_processes_off_the_accelerator(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    results = list(in_order(doubled_with_process_and_platform, range(40), num_workers=2))
    assert [number for number, _, _ in results] == [2 * i for i in range(40)]
    assert {platform for _, _, platform in results} == {"cpu"}
    assert os.getpid() not in {process for _, process, _ in results}


def test_without_workers_nothing_is_started():
    results = list(in_order(doubled_with_process_and_platform, range(3), num_workers=0))
    assert {process for _, process, _ in results} == {os.getpid()}


def test_process_that_is_ended_from_outside():
    with pytest.raises(ChildProcessError, match=r"one of 2 processes .* ended from outside"):
        list(in_order(os._exit, [1] * 8, num_workers=2))


def test_interrupt_is_for_the_parent_alone():
    (blocked,) = in_order(blocked_signals, [0], num_workers=1)
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in blocked_signals(0)


def test_interrupt_while_processes_start():
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(in_order(time.sleep, sleeps_with_an_interrupt(), num_workers=2))
    assert time.monotonic() - start < 30


def start_sleepers():
    """A process group with two workers that would be busy for minutes."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPERS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "one\n"
    return process


def group_is_empty_within(group, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return False


def test_interrupt_ends_all_processes_with_one_traceback():
    process = start_sleepers()
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C sends
    _, errors = process.communicate(timeout=20)
    assert process.returncode != 0
    assert errors.count("Traceback") == 1
    assert errors.strip().endswith("KeyboardInterrupt")
    assert group_is_empty_within(process.pid, 3)


def test_processes_end_with_their_parent():
    process = start_sleepers()
    process.kill()
    process.communicate(timeout=20)
    assert group_is_empty_within(process.pid, 10)


def test_survey_is_the_same_in_processes(tmp_path, monkeypatch):
    write_split(tmp_path, "train", 6)
    (tmp_path / "images/train/train_0003.jpg").write_bytes(b"")
    label_set = load_label_set("camvid")
    pairs = list_split(str(tmp_path), layout="camvid", split="train", label_set=label_set).pairs
    here = list(survey.examine_all(pairs, label_set))
    monkeypatch.setattr(survey, "_FEWEST_FOR_PROCESSES", 0)
    started = []
    monkeypatch.setattr(
        survey,
        "in_order",
        lambda *args, **kwargs: started.append(kwargs) or in_order(*args, **kwargs),
    )
    there = list(survey.examine_all(pairs, label_set))
    assert started[0]["num_workers"] >= 1
    assert [finding.name for finding in there] == [pair.name for pair in pairs]
    for mine, theirs in zip(here, there, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
