"""Several processes: found in the environment, one training, one end."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from pspnet_jax import processes
from pspnet_jax.checkpoint import CheckpointFolder

from training import ENDLESS, SHORT, finish, free_port, rows, start, start_two, wait_for_step

BUDGET_SECONDS = 240

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        (SLURM | {"SLURM_NTASKS": "16"}, 16),
        # sbatch's own script, where nothing was launched by srun.
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "16"}, 1),
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c"}, 3),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, 1),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, 2),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, 1),
    ],
)  # fmt: skip
def test_processes_are_counted(environment, count):
    assert processes.num_processes(environment) == count


def test_unknown_modes_and_numbers_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="--distributed=yes is not one of auto, on, off"):
        processes.meet("yes")
    for name, value in (
        ("JAX_COORDINATOR_ADDRESS", "a:1"),
        ("JAX_NUM_PROCESSES", "two"),
        ("JAX_PROCESS_ID", "0"),
    ):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES=two is not a number"):
        processes.meet("auto")
    processes.meet("off")
    monkeypatch.delenv("JAX_PROCESS_ID")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES set, JAX_PROCESS_ID not"):
        processes.meet("auto")
    monkeypatch.delenv("JAX_NUM_PROCESSES")
    processes.meet("auto")  # an address may be there for another reason
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID set, JAX_NUM_PROCESSES not"):
        processes.meet("auto")


@pytest.fixture(scope="module")
def one(data, tmp_path_factory):
    """Six steps of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one")
    ((code, text),) = finish([start(data, workdir, devices=4, **SHORT)])
    assert code == 0, text
    return workdir


def check_same_training(found, expected):
    """Losses, gradients and scores up to rounding, which later flips the sign of an activation here and there."""
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for a, b in zip(found, expected, strict=True):
        rel = 1e-5 if a["step"] == 2 else 1e-2
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-6), (a["step"], name)


def test_two_processes_train_what_one_trains(data, one, tmp_path):
    """With two devices each; the report counts the images of both."""
    for code, text in finish(start_two(data, tmp_path, **SHORT)):
        assert code == 0, text
    check_same_training(rows(tmp_path), rows(one))
    checkpoints = [
        CheckpointFolder(folder / "checkpoints").load(6, "model")["batch_stats"]
        for folder in (one, tmp_path)
    ]
    first, second = (tree["backbone"]["stem"]["norm1"]["mean"] for tree in checkpoints)
    np.testing.assert_allclose(first, second, rtol=1e-2)
    assert (tmp_path / "log-1.txt").is_file()


def test_a_run_goes_on_with_fewer_devices(data, one, tmp_path):
    """Begun on eight, ended on one."""
    for devices, num_steps in ((8, 2), (1, 6)):
        options = SHORT | {"train__num_steps": num_steps}
        ((code, text),) = finish([start(data, tmp_path, devices=devices, **options)])
        assert code == 0, text
        assert f" {devices} x cpu" in text
    found, expected = ([r for r in rows(folder) if "loss" in r] for folder in (tmp_path, one))
    check_same_training(found, expected)


def test_told_one_both_save_the_same_step_and_end(data, tmp_path):
    running = start_two(data, tmp_path, **ENDLESS)
    try:
        wait_for_step(tmp_path, 2)
        running[1].send_signal(signal.SIGTERM)
    except BaseException:
        finish(running, seconds=1)
        raise
    ended = finish(running)
    assert [code for code, _ in ended] == [143, 143], ended
    (step,) = CheckpointFolder(tmp_path / "checkpoints").steps()
    for _, text in ended:
        assert f"told to end by SIGTERM after step {step}, which is saved" in text


@pytest.mark.slow
def test_a_stopped_peer_is_noticed(data, tmp_path):
    running = start_two(data, tmp_path, train__watchdog_minutes=0.5, **ENDLESS)
    try:
        wait_for_step(tmp_path, 2)
        running[1].send_signal(signal.SIGSTOP)
        ((code, text),) = finish(running[:1], seconds=90)
    finally:
        running[1].kill()
        running[1].communicate()
    assert code == 75
    assert "nothing was done for 30 s" in text
    assert "thread MainThread" in text


@pytest.mark.slow
def test_a_killed_peer_is_noticed(data, tmp_path):
    running = start_two(data, tmp_path, **ENDLESS)
    try:
        wait_for_step(tmp_path, 2)
        running[1].kill()
        ((code, text),) = finish(running[:1], seconds=150)
    finally:
        running[1].kill()
        running[1].communicate()
    assert code in (134, -signal.SIGABRT), text
    if code == 134:
        assert "another process ended or cannot be reached" in text


def test_peers_that_do_not_come_are_an_error_with_the_address():
    script = (
        "from pspnet_jax import processes, main, progress\n"
        "progress.log_to(None)\n"
        "processes.meet('on', seconds=3)\n"
    )
    port = free_port()
    environment = os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PLATFORMS": "cpu",
    }
    for index in ("0", "1"):
        ran = subprocess.run(
            [sys.executable, "-c", script],
            env=environment | {"JAX_PROCESS_ID": index},
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert ran.returncode == 1, ran
        assert f"did not meet at 127.0.0.1:{port} within 3 s" in ran.stdout
