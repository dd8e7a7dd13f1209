"""Networks in one file, and the one that is shipped."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

import pspnet_jax
from pspnet_jax import stored_model
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CorruptCheckpointError
from pspnet_jax.data.scenes import SPLITS, render
from pspnet_jax.main import main
from pspnet_jax.metrics import confusion_matrix, scores
from pspnet_jax.trees import digest
from pspnet_jax.weights import safetensors

BUDGET_SECONDS = 60
SHIPPED = stored_model.SHIPPED["scenes"]


@pytest.fixture(scope="module")
def shipped():
    return stored_model.read("scenes", step="best")


def test_shipped_network_is_small_and_good():
    assert SHIPPED.stat().st_size < 10e6
    segmenter, num_classes = pspnet_jax.load("scenes"), 12
    assert segmenter.label_set == load_label_set("scenes")
    pairs = [render(0, index) for index in list(SPLITS["val"])[:40]]
    found = segmenter.predict((image for image, _ in pairs), batch_size=20)
    confusion = np.zeros((num_classes, num_classes), np.int64)
    for (_, labels), prediction in zip(pairs, found, strict=True):
        confusion += confusion_matrix(labels, prediction.class_map, num_classes)
    assert scores(confusion, absent_class="skip").mean_iou > 0.9


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stored_model.find("scenes") == SHIPPED
    (tmp_path / "scenes").mkdir()
    assert stored_model.find("scenes") != SHIPPED
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        stored_model.read("scenes", step="best")


def test_there_and_back(shipped, tmp_path):
    stored_model.write_file(shipped, tmp_path / "model.safetensors")
    again = stored_model.read(tmp_path / "model.safetensors", step="latest")
    assert again.description == shipped.description
    assert (again.step, again.digest) == (shipped.step, shipped.digest)
    assert digest(again.part) == shipped.digest
    stored_model.read(tmp_path / "model.safetensors", step=shipped.step)
    with pytest.raises(FileNotFoundError, match=f"holds step {shipped.step} alone"):
        stored_model.read(tmp_path / "model.safetensors", step=7)


def changed(tmp_path, change):
    arrays, metadata = safetensors.read(SHIPPED)
    change(arrays, metadata)
    safetensors.write(tmp_path / "changed.safetensors", arrays, metadata)
    return tmp_path / "changed.safetensors"


def test_changed_values_are_refused(tmp_path):
    def change(arrays, metadata):
        arrays["head.classifier.bias"] = arrays["head.classifier.bias"] + 1e-6

    with pytest.raises(CorruptCheckpointError, match="differ from its digest"):
        stored_model.read(changed(tmp_path, change), step="best")


def test_missing_and_unknown_arrays_are_named(tmp_path):
    def change(arrays, metadata):
        arrays["backbone.other.bias"] = arrays.pop("head.classifier.bias")

    with pytest.raises(
        ValueError, match=r"params\.head\.classifier\.bias is not in the checkpoint"
    ) as caught:
        stored_model.read(changed(tmp_path, change), step="best")
    assert "params.backbone.other.bias is not in the network" in str(caught.value)
    assert str(caught.value).count(" is not in the ") == 2


def test_files_without_a_description_say_what_to_do(tmp_path):
    def change(arrays, metadata):
        del metadata["description"]

    (tmp_path / "weights.pth").write_bytes(b"no network")
    for path in (changed(tmp_path, change), tmp_path / "weights.pth"):
        with pytest.raises(ValueError, match=r"converted first \(pspnet convert\)"):
            stored_model.read(path, step="best")


def test_command_line(tmp_path, monkeypatch):
    """predict by name, export into one file, predict by it: the same maps."""
    monkeypatch.chdir(tmp_path)
    image, _ = render(0, SPLITS["val"][0])
    cv2.imwrite("photo.png", image[..., ::-1])
    main(["predict", "--checkpoint=scenes", "--output=a", "photo.png"])
    main(["export", "--checkpoint=scenes", "--format=pspnet_jax", "--output=b.safetensors"])
    main(["predict", "--checkpoint=b.safetensors", "--output=b", "photo.png"])
    a, b = (next((tmp_path / name).rglob("*photo*.png")).read_bytes() for name in "ab")
    assert a == b


def test_evaluate_by_name(tmp_path, monkeypatch):
    """Its data needs no config; the one that it was trained with says the same."""
    config = Path(__file__).parent.parent / "configs" / "scenes.py"
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "--checkpoint=scenes"]) == 0
    assert main(["evaluate", "--checkpoint=scenes", f"--config={config}"]) == 0  # not refused
    report = json.loads(
        (tmp_path / "runs/shipped_scenes/evaluation/00000500-val-whole/report.json").read_text()
    )
    assert report["mean_iou"] == pytest.approx(0.929, abs=0.001)  # what the README says
