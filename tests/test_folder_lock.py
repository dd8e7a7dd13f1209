"""One process at a time in a folder, however the last one ended."""

import os
import signal
import subprocess
import sys

import pytest

from pspnet_jax import folder_lock

BUDGET_SECONDS = 20

HOLD = """
import sys, time
from pathlib import Path
from pspnet_jax import folder_lock
with folder_lock.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_it_and_a_kill_lets_go(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        message = rf"run is in use by process {holder.pid} on .+; name another folder"
        with pytest.raises(ValueError, match=message), folder_lock.held(folder):
            pass
        holder.send_signal(signal.SIGKILL)
    with folder_lock.held(folder) as killed:
        assert killed.startswith(f"process {holder.pid} on ")
        assert f"process {os.getpid()} on" in (folder / ".lock").read_text()
    with folder_lock.held(folder) as killed:
        assert killed == ""


def test_file_systems_without_locks_are_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    monkeypatch.setattr(folder_lock.log, "propagate", True)
    with folder_lock.held(tmp_path):
        pass
    assert "cannot be locked" in caplog.text
