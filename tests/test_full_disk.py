"""A disk that is full or read-only: the end is loud, and nothing that was saved is lost."""

import os
import shutil

import pytest

from pspnet_jax.checkpoint import CheckpointFolder

from training import SHORT, finish, start

BUDGET_SECONDS = 120


@pytest.fixture(scope="module")
def untouched(data, tmp_path_factory):
    """Digests after six steps of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("untouched")
    ((code, text),) = finish([start(data, workdir, **SHORT)])
    assert code == 0, text
    return CheckpointFolder(workdir / "checkpoints").record(6).digests


# No file may become larger than what a checkpoint's files are.
LIMIT_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))"
# PR_CAPBSET_DROP of CAP_DAC_OVERRIDE: permissions hold also where tests are run by root.
HEED_PERMISSIONS = "import ctypes; ctypes.CDLL(None).prctl(24, 1)"


def restored(checkpoints: CheckpointFolder) -> list[int]:
    steps = checkpoints.steps()
    for step in steps:
        checkpoints.load(step, "model")
        checkpoints.load(step, "optimizer")
    return steps


@pytest.fixture(scope="module")
def two_steps(data, tmp_path_factory):
    """A run that took two steps."""
    workdir = tmp_path_factory.mktemp("two_steps")
    ((code, text),) = finish([start(data, workdir, train__num_steps=2, **SHORT)])
    assert code == 0, text
    return workdir


def test_a_full_disk(data, tmp_path, two_steps, untouched):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    ((code, text),) = finish([start(data, workdir, before=LIMIT_FILES, **SHORT)])
    assert code == 1, text
    last = text.splitlines()[-1]
    assert last.startswith(f"error: {workdir}/checkpoints/00000004 could not be saved: ")
    assert "File too large" in last
    assert last.endswith("and the same command goes on from there")
    checkpoints = CheckpointFolder(workdir / "checkpoints")
    assert restored(checkpoints) == [2]
    ((code, text),) = finish([start(data, workdir, **SHORT)])
    assert code == 0, text
    assert "resuming from step 2" in text
    assert checkpoints.record(6).digests == untouched


def test_a_folder_that_may_not_be_written(data, tmp_path, two_steps):
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    checkpoints = CheckpointFolder(workdir / "checkpoints")
    os.chmod(checkpoints.path, 0o555)
    ((code, text),) = finish([start(data, workdir, before=HEED_PERMISSIONS, **SHORT)])
    assert code == 1, text
    assert "Permission denied" in text
    assert str(checkpoints.path) in text
    assert "Traceback" not in text
    os.chmod(checkpoints.path, 0o755)
    assert restored(checkpoints) == [2]
