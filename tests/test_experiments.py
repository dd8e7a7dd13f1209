"""The scripts of experiments/, at a size of seconds."""

import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from distributions import distances

from pictures import write_mask

BUDGET_SECONDS = 180

FOLDER = Path(__file__).parent.parent / "experiments"


def run_script(name, *arguments, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    module.main()
    return module


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """Both networks of scenes_context, after two steps."""
    folder = tmp_path_factory.mktemp("scenes_context")
    with pytest.MonkeyPatch.context() as patch:
        arguments = [f"--output={folder}", "--seeds=3", "--num_steps=2", "--num_images=20"]
        run_script("scenes_context", *arguments, monkeypatch=patch)
    return folder


@pytest.mark.slow
def test_scenes_context_compares_both_networks(context):
    rows = json.loads((context / "results.json").read_text())["rows"]
    assert [(row["network"], row["seed"]) for row in rows] == [("pyramid", 3), ("baseline", 3)]
    assert set(rows[0]["straight"]) == set(rows[0]["swapped"])
    assert rows[0]["straight"] != rows[1]["straight"]
    text = (context / "results.md").read_text()
    assert "| baseline | 3 |" in text
    assert "Without the pyramid the mean IoU of the ambiguous classes changes by" in text
    config = json.loads((context / "baseline_3/config.json").read_text())
    assert config["model"]["pyramid_bins"] == []


@pytest.mark.slow
def test_figures_hold_a_curve_and_class_maps(context, tmp_path, monkeypatch):
    arguments = [f"--checkpoint={context / 'pyramid_3'}", f"--output={tmp_path}", "--num_images=2"]
    run_script("figures", *arguments, monkeypatch=monkeypatch)
    curve = cv2.imread(str(tmp_path / "pyramid_3_curve.png"))
    maps = cv2.imread(str(tmp_path / "pyramid_3_class_maps.png"))
    assert curve.shape[0] > 300
    assert maps.shape[1] > 4 * 250


@pytest.mark.slow
def test_image_level_compares_four_networks(tmp_path, monkeypatch):
    arguments = [f"--output={tmp_path}", "--seeds=3", "--num_steps=2"]
    module = run_script("image_level", *arguments, monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["network"] for row in rows] == list(module.NETWORKS)
    told = {row["network"]: row["presence_accuracy"] for row in rows}
    assert told["paper"] is told["variant_without_presence"] is None
    assert 0 <= told["variant"] <= 1
    assert told["paper_presence"] is not None
    assert "| variant without presence | 1 |" in (tmp_path / "results.md").read_text()
    sides = {
        name: json.loads((tmp_path / f"{name}_3/config.json").read_text())["data"]["crop_size"]
        for name in module.NETWORKS
    }
    assert sides["paper"] == [129, 129]
    assert sides["variant"] == [128, 128]


def test_the_data_benchmark_writes_its_ratios(tmp_path, monkeypatch, capsys):
    arguments = [
        f"--output={tmp_path}",
        "--workers=0",
        "--repeats=1",
        "--batches=1",
        "--pictures=2",
    ]
    run_script("benchmark_data", *arguments, monkeypatch=monkeypatch)
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["images_per_second"]) == {"0"}
    assert all(t["low"] > 0 for t in found["milliseconds"].values())
    assert "with decoding: ours is" in capsys.readouterr().out


def test_the_export_benchmark_compares_both_functions(tmp_path, monkeypatch, capsys):
    arguments = [f"--output={tmp_path}", "--backbone=resnet10", "--width=8", "--sides=33"]
    run_script("benchmark_export", *arguments, "--repeats=2", monkeypatch=monkeypatch)
    row = json.loads((tmp_path / "results.json").read_text())["sides"]["33"]
    assert [len(t["later"]) for t in row["seconds"].values()] == [2, 2]
    assert 0 <= row["largest_difference"] <= 1e-5 * row["largest_logit"]
    assert row["equal_classes"] > 0.99
    assert "| 33 | exported |" in capsys.readouterr().out


_CHALLENGE = """
import numpy as np

def intersectionAndUnion(predicted, labels, num_classes):
    predicted = predicted * (labels > VOID)
    def count(x):
        return np.bincount(x.ravel(), minlength=num_classes + 1)[1 : num_classes + 1]
    both = count(np.where(predicted == labels, predicted, 0))
    return both, count(predicted) + count(labels) - both

def pixelAccuracy(predicted, labels):
    correct, labeled = ((predicted == labels) & (labels > 0)).sum(), (labels > 0).sum()
    return correct / labeled, correct, labeled
"""


@pytest.mark.parametrize(("void", "differs"), [(0, False), (-1, True)])
def test_metrics_are_compared_with_code_of_the_challenge(
    tmp_path, monkeypatch, capsys, void, differs
):
    """A stand-in for its checkout: the same rule, and one that lets void count."""
    code = tmp_path / "evaluationCode/utils_eval.py"
    code.parent.mkdir()
    code.write_text(_CHALLENGE.replace("VOID", str(void)))
    labels = np.random.default_rng(0).integers(0, 151, (64, 80)).astype(np.uint8)
    for folder in ("annotations", "predictions"):
        write_mask(tmp_path / f"sampleData/{folder}/a.png", labels)
    arguments = [f"--sceneparsing={tmp_path}", f"--output={tmp_path / 'out'}"]
    run_script("compare_challenge", *arguments, monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert rows[0]["theirs"]["pixel_accuracy"] == 1
    assert rows[1]["theirs"]["pixel_accuracy"] < 0.9
    assert (rows[1]["largest_difference"] > 1e-3) == differs
    assert "largest difference over 1 images and 4 rules" in capsys.readouterr().out


def test_forms_of_an_operation_differ_by_rounding_alone(tmp_path, monkeypatch):
    run_script("benchmark_forms", f"--output={tmp_path}", "--small", monkeypatch=monkeypatch)
    rows = json.loads((tmp_path / "results.json").read_text())
    forms = {row["operation"].split(",")[0]: set(row["forms"]) for row in rows}
    assert forms["3x3"] == {"direct", "winograd", "interleaved"}
    assert forms["1x1"] == {"direct", "matrix_product"}
    differences = [form["difference"] for row in rows for form in row["forms"].values()]
    assert len(differences) > 15
    assert max(differences) < 1e-5
    assert max(differences) > 0
    assert (tmp_path / "results.md").read_text().count("\n") == len(rows) + 2


def test_only_operations_that_are_named(tmp_path, monkeypatch):
    arguments = (f"--output={tmp_path}", "--small", "--only=average pool")
    run_script("benchmark_forms", *arguments, monkeypatch=monkeypatch)
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert row["operation"].startswith("average pool of 2 x 6")


@pytest.mark.parametrize("name", ["benchmark_forms", "benchmark_gpu"])
def test_names_that_nothing_has_are_told(name, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(name, f"--output={tmp_path}", "--only=nothing", monkeypatch=monkeypatch)
    assert "--only=nothing" in capsys.readouterr().err


def test_distances_of_distributions():
    """Half of the one lie above all of the other; the same draws in another order; all apart."""
    one = np.array([[0, 5, 1], [1, 6, 2], [2, 7, 3], [3, 8, 4]])
    other = np.array([[1, 8, 5], [0, 7, 6], [1, 6, 7], [0, 5, 8], [1, 5, 9], [0, 8, 9]])
    assert distances(("half", "order", "all"), one, other) == {
        "half": 0.5,
        "order": 0.083,
        "all": 1.0,
    }
    assert distances(("half", "order", "all"), other, one)["half"] == 0.5
