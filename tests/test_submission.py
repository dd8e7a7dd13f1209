"""What the servers of benchmarks accept: ids and names."""

from pathlib import Path

import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.submission import choose

BUDGET_SECONDS = 10


def test_cityscapes_files_hold_label_ids():
    # The 19 ids that count, from cityscapesScripts (helpers/labels.py).
    ids = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
    for labels in ("cityscapes", "cityscapes_train_ids"):
        table = choose("cityscapes").raw_ids(load_label_set(labels))
        assert table[:19].tolist() == ids


def test_ade20k_files_hold_1_to_150():
    for labels in ("ade20k", "ade20k_train_ids"):
        table = choose("ade20k").raw_ids(load_label_set(labels))
        np.testing.assert_array_equal(table[:150], np.arange(1, 151))


def test_file_names():
    images = [
        Path("val/ulm/ulm_000000_000294_leftImg8bit.png"),
        Path("bad-honnef_000001_000019.jpg"),
    ]
    found = choose("cityscapes").file_names(images)
    # The server looks for ulm_000000_000294*.png.
    assert found == ["ulm_000000_000294.png", "bad-honnef_000001_000019.png"]
    images = [Path("ADE_val_00000001.jpg"), Path("x/ADE_test_00000002.jpg")]
    found = choose("ade20k").file_names(images)
    assert found == ["ADE_val_00000001.png", "ADE_test_00000002.png"]


@pytest.mark.parametrize(
    ("benchmark", "name"),
    [
        ("cityscapes", "ulm_000000_0002945.png"),
        ("cityscapes", "ulm_000000.png"),
        ("cityscapes", "photo.png"),
        ("ade20k", "ADE_val_0000001.jpg"),
        ("ade20k", "ADE_val_00000001_b.jpg"),
    ],
)
def test_images_of_another_name_are_refused(benchmark, name):
    good = {"cityscapes": "ulm_000000_000294.png", "ade20k": "ADE_val_00000001.jpg"}[benchmark]
    with pytest.raises(ValueError, match=rf"named as .*; these are not: a/{name}$"):
        choose(benchmark).file_names([Path(good), Path("a", name)])


def test_other_classes_are_refused():
    message = "needs a checkpoint of label set 'ade20k' with its 150 classes .* 'camvid' with 11"
    with pytest.raises(ValueError, match=message):
        choose("ade20k").raw_ids(load_label_set("camvid"))


def test_unknown_benchmark():
    with pytest.raises(ValueError, match="--submission=voc is not one of cityscapes, ade20k"):
        choose("voc")
