"""Folders of images and masks: what is read, and what a fault says."""

import cv2
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.folders import DataError, FolderSource, read_image, read_mask

from pictures import write_split

BUDGET_SECONDS = 15

CAMVID = load_label_set("camvid")


def open_camvid(root, split="train", layout="camvid", label_set=CAMVID):
    return FolderSource(str(root), layout=layout, split=split, label_set=label_set)


def test_reads_pairs_in_order(tmp_path):
    write_split(tmp_path, "train", 3)
    source = open_camvid(tmp_path)
    assert len(source) == 3
    read = source[2]
    assert source.names[2] == "train_0002"
    assert (read.image.shape, read.labels.shape) == ((40, 50, 3), (40, 50))
    assert (read.image.dtype, read.labels.dtype, int(read.index)) == (np.uint8, np.uint8, 2)


def test_images_are_red_green_blue(tmp_path):
    assert cv2.imwrite(str(tmp_path / "red.png"), np.full((4, 4, 3), (0, 0, 255), np.uint8))
    np.testing.assert_array_equal(read_image(tmp_path / "red.png")[0, 0], [255, 0, 0])


def test_ade20k_layout_maps_raw_ids(tmp_path):
    write_split(tmp_path, "training", 1, raw_offset=1)
    raw = read_mask(tmp_path / "annotations/training/training_0000.png")
    source = open_camvid(tmp_path, "training", "ade20k", load_label_set("ade20k"))
    np.testing.assert_array_equal(source[0].labels, raw - 1)


def test_segnet_and_pairs_layouts(tmp_path):
    write_split(tmp_path / "a", "train", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "a/images/train").rename(tmp_path / "b/train")
    (tmp_path / "a/annotations/train").rename(tmp_path / "b/trainannot")
    assert len(open_camvid(tmp_path / "b")) == 1
    write_split(tmp_path / "c", "mine", 2, masks="masks")
    assert len(open_camvid(tmp_path / "c", "mine", "pairs")) == 2


def test_wrong_root_says_what_was_expected_found_and_where_it_comes_from(tmp_path):
    (tmp_path / "photos/summer").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_camvid(tmp_path, "training", "ade20k")
    text = str(caught.value)
    assert "images/training/ and" in text
    assert "found     photos/, photos/summer/" in text
    assert "ADEChallengeData2016.zip" in text
    assert "--config.data.root=DIR" in text
    with pytest.raises(DataError, match="no folder"):
        open_camvid(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.root is not set"):
        FolderSource(None, layout="ade20k", split="training", label_set=CAMVID)


def test_image_without_mask_and_mask_without_image_are_named(tmp_path):
    write_split(tmp_path, "train", 9)
    (tmp_path / "annotations/train/train_0001.png").unlink()
    for i in range(3, 9):
        (tmp_path / f"images/train/train_000{i}.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_camvid(tmp_path)
    assert "train_0001.jpg (1 of 3): no partner in" in str(caught.value)
    assert "and 1 more (6 of 8)" in str(caught.value)


def test_zero_images(tmp_path):
    write_split(tmp_path, "train", 0)
    with pytest.raises(DataError, match="zero images"):
        open_camvid(tmp_path)


def test_two_images_of_one_name(tmp_path):
    write_split(tmp_path, "train", 2)
    folder = tmp_path / "images/train"
    (folder / "train_0000.png").write_bytes((folder / "train_0000.jpg").read_bytes())
    with pytest.raises(DataError, match="share the names train_0000"):
        open_camvid(tmp_path)


def test_size_mismatch_names_both_files(tmp_path):
    write_split(tmp_path, "train", 1)
    cv2.imwrite(str(tmp_path / "annotations/train/train_0000.png"), np.zeros((40, 49), np.uint8))
    with pytest.raises(DataError, match=r"train_0000\.jpg is 40x50 .*train_0000\.png is 40x49"):
        open_camvid(tmp_path)[0]


def test_id_out_of_range_names_the_file_and_the_id(tmp_path):
    write_split(tmp_path, "train", 1)
    cv2.imwrite(str(tmp_path / "annotations/train/train_0000.png"), np.full((40, 50), 77, np.uint8))
    with pytest.raises(DataError, match=r"train_0000\.png: mask values 77 are out of range"):
        open_camvid(tmp_path)[0]


@pytest.mark.parametrize("mask", [np.zeros((40, 50, 3), np.uint8), np.zeros((40, 50), np.uint16)])
def test_mask_of_another_kind_is_refused(tmp_path, mask):
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    with pytest.raises(DataError, match=r"mask\.png: a mask must be an 8-bit PNG of one channel"):
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_photograph_is_named(tmp_path, keep):
    write_split(tmp_path, "train", 1, size=(200, 300))
    path = tmp_path / "images/train/train_0000.jpg"
    encoded = path.read_bytes()
    path.write_bytes(encoded[: int(len(encoded) * keep)])
    with pytest.raises(DataError, match=r"train_0000\.jpg: (the file is empty|cannot be decoded)"):
        open_camvid(tmp_path)[0]


def test_what_is_no_image_or_not_there(tmp_path):
    (tmp_path / "text.jpg").write_text("not a photograph")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "none.jpg")
