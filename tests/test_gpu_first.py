"""experiments/gpu_first.py runs from end to end, refuses wrong forms and survives what fails."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gpu_first
import jax.numpy as jnp
import pytest

pytestmark = pytest.mark.slow
BUDGET_SECONDS = 180

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_first")
    command = [sys.executable, EXPERIMENTS / "gpu_first.py", "--small", f"--output={folder}"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."}
    )
    assert ran.returncode == 0, ran.stderr
    return folder


def test_every_line_is_measured(output):
    report = json.loads((output / "results.json").read_text())
    rows = [row for row in report["rows"] if row["part"] != "environment"]
    assert not [row for row in rows if "error" in row]
    measured = {(row["part"], row["column"]) for row in rows if row.get("seconds", 0) > 0}
    expected = {(1, "JAX"), (1, "JAX, conv fusion"), (2, "convolution"), (2, "einsum")}
    expected |= {(1, "PyTorch")} if HAS_TORCH else set()
    assert measured == expected
    forms = [row["line"] for row in rows if row["column"] == "JAX" and "kernel" in row["line"]]
    assert len(forms) == len(gpu_first.KERNEL_GRADIENTS) == 4


def test_report_has_a_table_for_each_part(output):
    text = (output / "results.md").read_text()
    for part in (1, 2):
        assert text.count(f"## Part {part}\n") == 1
    assert "| 4 channels, d=2: forward |" in text
    assert ("torch is not installed" in text) == (not HAS_TORCH)
    assert "Commit: " in text


@pytest.mark.parametrize("form", gpu_first.KERNEL_GRADIENTS)
@pytest.mark.parametrize(("side", "dilation"), [(13, 2), (12, 4), (9, 4)])
def test_forms_of_the_kernel_gradient_agree(form, side, dilation):
    assert gpu_first.largest_difference(form, side=side, dilation=dilation) < 1e-5


def test_wrong_form_is_refused(monkeypatch):
    def without_zeros_at_the_border(x, g, dilation):
        rolled = jnp.roll(x, 1, axis=1)
        return gpu_first.kernel_gradient_default(rolled, g, dilation)

    monkeypatch.setitem(gpu_first.KERNEL_GRADIENTS, "wrong", without_zeros_at_the_border)
    with pytest.raises(ValueError, match="not timed: differs from the default"):
        gpu_first.refuse_wrong_form("wrong", side=12, dilation=2)


@pytest.mark.parametrize("form", gpu_first.KERNEL_GRADIENTS)
def test_three_convolutions_agree(form):
    gpu_first.refuse_wrong_stage(form, side=8, dilation=2)


def test_split_stage_is_refused_where_its_side_is_no_multiple():
    with pytest.raises(ValueError, match="not timed: differs from the default"):
        gpu_first.refuse_wrong_stage(gpu_first.STAGE, side=9, dilation=2)


def test_failure_is_a_row(capsys):
    with gpu_first.recorded(1, "forward", "JAX"):
        raise MemoryError("out of memory\nwith details")
    with gpu_first.recorded(1, "input gradient", "JAX") as row:
        row.update(seconds=1.0)
    failed, measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed["error"] == "MemoryError: out of memory"
    assert measured == {"part": 1, "line": "input gradient", "column": "JAX", "seconds": 1.0}


def test_process_that_dies_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--no_such_flag")
    rows = []
    gpu_first.run_task("dilated", small=True, seconds=60, log=tmp_path / "log", take=rows.append)
    assert "exit status" in rows[-1]["error"]


def test_process_that_takes_too_long_is_a_row(tmp_path):
    rows = []
    gpu_first.run_task("dilated", small=True, seconds=1, log=tmp_path / "log", take=rows.append)
    assert rows[-1]["error"] == "stopped after 1 s"


def test_minutes_bound_the_whole(tmp_path):
    gpu_first.run_all(tmp_path, list(gpu_first.TASKS), minutes=0, small=True)
    report = json.loads((tmp_path / "results.json").read_text())
    assert report["rows"] == []
    assert report["notes"]["JAX"] == "not reached within 0 minutes"
    assert (
        "| not reached within 0 minutes | not reached within 0 minutes |"
        in (tmp_path / "results.md").read_text()
    )
