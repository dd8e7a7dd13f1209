"""SIGTERM: one step more, a checkpoint, code 143; a second one at once; the same command goes on."""

import contextlib
import os
import signal
import time

import pytest

from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.termination import Terminated, Termination

from training import ENDLESS, finish, rows, start, wait_for_step

BUDGET_SECONDS = 120


def told_to_end(workdir, running, tell):
    """The only step that is saved, and the output, of a process that is told after four steps."""
    try:
        wait_for_step(workdir, 4)
        tell()
    except BaseException:
        running.kill()
        raise
    ((code, text),) = finish([running])
    assert code == 143, text
    (step,) = CheckpointFolder(workdir / "checkpoints").steps()
    return step, text


def test_the_step_at_hand_is_saved_and_the_same_command_goes_on(data, tmp_path):
    running = start(data, tmp_path, **ENDLESS)
    step, text = told_to_end(tmp_path, running, lambda: running.send_signal(signal.SIGTERM))
    assert f"told to end by SIGTERM after step {step}, which is saved; the same command" in text
    log = (tmp_path / "log.txt").read_text()
    assert f"exit code 143: told to end by SIGTERM after step {step}" in log
    assert step - 2 < rows(tmp_path)[-1]["step"] <= step
    ((code, text),) = finish([start(data, tmp_path, **ENDLESS | {"train__num_steps": step + 1})])
    assert code == 0, text
    assert f"resuming from step {step}" in text


@pytest.mark.slow
def test_loader_processes_that_are_told_too_deliver_what_the_last_step_needs(data, tmp_path):
    running = start(data, tmp_path, data__num_workers=2, **ENDLESS)
    # As schedulers do.
    step, text = told_to_end(tmp_path, running, lambda: os.killpg(running.pid, signal.SIGTERM))
    assert f"told to end by SIGTERM after step {step}" in text


def signal_this_process():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)


def test_it_waits_for_the_end_of_a_step_and_a_second_one_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with Termination() as termination:
        assert not termination.stops_after(1)
        signal_this_process()
        assert termination.stops_after(2)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_between_two_steps_it_is_raised():
    with Termination() as termination:
        with pytest.raises(Terminated), termination.raised():
            signal_this_process()
        with pytest.raises(Terminated), termination.raised():  # what was missed is raised here
            pass
        assert termination.stops_after(1)


def test_an_interrupt_that_python_forgets_is_heard_after_the_step():
    before = signal.getsignal(signal.SIGINT)
    with Termination() as termination:
        with contextlib.suppress(KeyboardInterrupt):  # as in a callback of the garbage collector
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            termination.stops_after(1)
    assert signal.getsignal(signal.SIGINT) is before
