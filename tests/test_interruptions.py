"""The three scripts of experiments/ that attack a training and its files, for seconds instead of hours.

What two of them hold in general is held case by case in test_train, test_full_disk, test_folder_lock and
test_checkpoint, so they are marked slow: python -m pytest -m slow tests/test_interruptions.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BUDGET_SECONDS = 240

FOLDER = Path(__file__).parent.parent / "experiments"


def run_script(name, output, *arguments) -> dict:
    ran = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), f"--output={output}", *arguments],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return json.loads((output / "results.json").read_text())


@pytest.mark.slow
def test_a_training_that_is_killed_again_and_again_loses_nothing(tmp_path):
    arguments = ("--interruptions=2", "--ways=full,kill", "--in_turn", "--seed=3")
    found = run_script("interruptions", tmp_path, *arguments, "--longest_seconds=1")
    assert found["faults"] == []
    assert found["ends"] == {"full": 1, "kill": 1}
    assert found["steps"] > 0
    assert found["steps_lost_at_most"] <= 20


@pytest.mark.slow
def test_damaged_checkpoints_are_detected_or_read_as_they_were(tmp_path):
    found = run_script("flipped_bytes", tmp_path, "--flips=15")
    assert found["faults"] == []
    outcomes = found["outcomes"]
    assert sum(outcomes.values()) == 15
    assert outcomes["flipped: detected"] > 3


def test_broken_input_gives_a_result_or_a_named_error(tmp_path):
    found = run_script("fuzz", tmp_path, "--inputs=300", "--seed=1")
    assert found["faults"] == []
    assert len(found["outcomes"]) == 10
    for name, outcomes in found["outcomes"].items():
        assert sum(outcomes.values()) == 30, name
        assert outcomes.get("named error", 0) > 0 or name == "evaluator"
