"""Notebooks run from top to bottom, and are what their plain Python files say."""

import os
from pathlib import Path

import jupytext
import nbclient
import pytest

BUDGET_SECONDS = 180

NOTEBOOKS = sorted((Path(__file__).parent.parent / "experiments/notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_its_python_file(path):
    notebook, script = jupytext.read(path), jupytext.read(path.with_suffix(".py"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in script.cells
    ]
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs"


PRINTED = {
    "train_on_scenes": "mean IoU",
    "predict_your_photo": "of the pixels",
    "evaluate_and_read_the_report": "mean IoU 0.9",
    "fine_tune_your_folder": "mean IoU",
    "why_a_pyramid": "scenes, logits: field of 129 pixels",
}
"""What each of them says at the end of its way; of those that train, a checkpoint is looked for, too."""


def test_every_notebook_is_listed():
    assert sorted(PRINTED) == [path.stem for path in NOTEBOOKS]


@pytest.mark.filterwarnings("ignore")  # of the notebook client, not of ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    notebook = jupytext.read(path)
    trains = any("train(config" in cell.source for cell in notebook.cells)
    monkeypatch.setenv("NUM_STEPS", "2")
    monkeypatch.setenv("WORKDIR", str(tmp_path / "run"))
    monkeypatch.setenv("WIDTH", "4")
    monkeypatch.setenv("SIDE", "161")
    # Two steps take longer to compile than to run: a quarter less.
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0" if trains else "")
    monkeypatch.setenv("MPLBACKEND", "agg")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute(env={**os.environ})
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert PRINTED[path.stem] in printed
    if trains:
        assert (tmp_path / "run/checkpoints/00000002").is_dir()
