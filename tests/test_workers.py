"""Processes that read files: in order, off the accelerator, and gone when nobody waits for them."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import survey
from pspnet_jax.data.layouts import list_split
from pspnet_jax.data.workers import in_order

from pictures import write_split

BUDGET_SECONDS = 120

TESTS = Path(__file__).parent
PROGRAM = textwrap.dedent(
    """
    import sys, time
    sys.path.insert(0, {tests!r})
    from pspnet_jax.data import transforms
    from pspnet_jax.data.pipeline import training_batches
    from pictures import ExampleSource

    if __name__ == "__main__":
        view = transforms.make_augment(
            transforms.resolve({{"recipe": "semseg"}}), (33, 33), fill=(0, 0, 0)
        )
        batches = training_batches(
            ExampleSource(10), view, global_batch_size=4, seed=0, first_step=0, num_workers=2
        )
        next(batches)
        print("ready", flush=True)
        if {fails}:
            sys.stdin.readline()
            raise RuntimeError("as planned")
        while True:
            next(batches)
            time.sleep(0.01)
    """
)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> list[int]:
    """Processes that a process has started, and those that they have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return [*children, *(each for child in children for each in descendants(child))]


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


def all_end_within(pids, seconds):
    end = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in pids if is_alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left


def test_interrupt_ends_all_processes_with_one_traceback():
    process = start_sleepers()
    workers = descendants(process.pid)
    assert len(workers) >= 2
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C sends
    try:
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode != 0
    assert errors.count("Traceback") == 1
    assert errors.strip().endswith("KeyboardInterrupt")
    assert all_end_within(workers, 3)


def test_processes_end_with_their_parent():
    process = start_sleepers()
    workers = descendants(process.pid)
    assert len(workers) >= 2
    process.kill()
    assert all_end_within(workers, 10)
    process.communicate(timeout=20)


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


@pytest.mark.parametrize(
    "end",
    ["killed", *(pytest.param(how, marks=pytest.mark.slow) for how in ("interrupted", "failed"))],
)
def test_no_worker_is_left_behind(tmp_path, end):
    script = tmp_path / "loads.py"
    script.write_text(PROGRAM.format(tests=str(TESTS), fails=end == "failed"))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(TESTS.parent), environment.get("PYTHONPATH", "")]
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as program:
        try:
            assert program.stdout.readline() == "ready\n"
            workers = descendants(program.pid)
            assert len(workers) >= 2
            assert all(map(is_alive, workers))
            if end == "failed":
                program.communicate("\n", timeout=30)
            else:
                program.send_signal(signal.SIGINT if end == "interrupted" else signal.SIGKILL)
            assert program.wait(timeout=30) != 0
        finally:
            program.kill()
    assert all_end_within(workers, 10)
