"""Folders of images and masks: what is read, and what a fault says."""

import struct
import zlib

import cv2
import numpy as np
import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.folders import DataError, FolderSource, read_image, read_mask

from pictures import write_split

BUDGET_SECONDS = 15

CAMVID = load_label_set("camvid")
VOC = load_label_set("voc2012")
CITYSCAPES = load_label_set("cityscapes")
TRAIN_IDS = load_label_set("cityscapes_train_ids")


def open_split(root, split="train", layout="camvid", label_set=CAMVID):
    return FolderSource(str(root), layout=layout, split=split, label_set=label_set)


def write_photograph(path, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((*size, 3), 90, np.uint8))


def write_mask(path, value=0, size=(4, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full(size, value, np.uint8))


def write_palette_mask(path, ids, colors):
    """A PNG with a palette, as PASCAL VOC's, from the PNG specification: OpenCV writes none."""
    palette = np.zeros((256, 3), np.uint8)
    palette[list(colors)] = list(colors.values())
    rows = b"".join(b"\0" + row.tobytes() for row in ids)
    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], 8, 3, 0, 0, 0)
    chunks = {
        b"IHDR": header,
        b"PLTE": palette.tobytes(),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks.items()
        )
    )


def write_voc(root, split, names, masks, text=None):
    """Photographs, gray masks of the aeroplane (1) and the list of one split."""
    for name in names:
        write_photograph(root / f"JPEGImages/{name}.jpg")
        write_mask(root / f"{masks}/{name}.png", 1)
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f"{split}.txt").write_text(text or "".join(f"{name}\n" for name in names))


def write_cityscapes(root, city, number, *endings):
    stem = f"{city}_{number:06d}_000019"
    write_photograph(root / f"leftImg8bit/train/{city}/{stem}_leftImg8bit.png")
    for ending in endings:
        value = 26 if ending == "labelIds" else 13  # a car
        write_mask(root / f"gtFine/train/{city}/{stem}_gtFine_{ending}.png", value)


def test_reads_pairs_in_order(tmp_path):
    write_split(tmp_path, "train", 3)
    source = open_split(tmp_path)
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
    source = open_split(tmp_path, "training", "ade20k", load_label_set("ade20k"))
    np.testing.assert_array_equal(source[0].labels, raw - 1)


def test_segnet_and_pairs_layouts(tmp_path):
    write_split(tmp_path / "a", "train", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "a/images/train").rename(tmp_path / "b/train")
    (tmp_path / "a/annotations/train").rename(tmp_path / "b/trainannot")
    assert len(open_split(tmp_path / "b")) == 1
    write_split(tmp_path / "c", "mine", 2, masks="masks")
    assert len(open_split(tmp_path / "c", "mine", "pairs")) == 2


def test_wrong_root_says_what_was_expected_found_and_where_it_comes_from(tmp_path):
    (tmp_path / "photos/summer").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_split(tmp_path, "training", "ade20k")
    text = str(caught.value)
    assert "images/training/ and" in text
    assert "found     photos/, photos/summer/" in text
    assert "ADEChallengeData2016.zip" in text
    assert "--config.data.root=DIR" in text
    with pytest.raises(DataError, match="no folder"):
        open_split(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.root is not set"):
        FolderSource(None, layout="ade20k", split="training", label_set=CAMVID)


def test_image_without_mask_and_mask_without_image_are_named(tmp_path):
    write_split(tmp_path, "train", 9)
    (tmp_path / "annotations/train/train_0001.png").unlink()
    for i in range(3, 9):
        (tmp_path / f"images/train/train_000{i}.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_split(tmp_path)
    assert "train_0001.jpg (1 of 3): no partner in" in str(caught.value)
    assert "and 1 more (6 of 8)" in str(caught.value)


def test_zero_images(tmp_path):
    write_split(tmp_path, "train", 0)
    with pytest.raises(DataError, match="zero images"):
        open_split(tmp_path)


def test_two_images_of_one_name(tmp_path):
    write_split(tmp_path, "train", 2)
    folder = tmp_path / "images/train"
    (folder / "train_0000.png").write_bytes((folder / "train_0000.jpg").read_bytes())
    with pytest.raises(DataError, match="share the names train_0000"):
        open_split(tmp_path)


def test_size_mismatch_names_both_files(tmp_path):
    write_split(tmp_path, "train", 1)
    cv2.imwrite(str(tmp_path / "annotations/train/train_0000.png"), np.zeros((40, 49), np.uint8))
    with pytest.raises(DataError, match=r"train_0000\.jpg is 40x50 .*train_0000\.png is 40x49"):
        open_split(tmp_path)[0]


def test_id_out_of_range_names_the_file_and_the_id(tmp_path):
    write_split(tmp_path, "train", 1)
    cv2.imwrite(str(tmp_path / "annotations/train/train_0000.png"), np.full((40, 50), 77, np.uint8))
    with pytest.raises(DataError, match=r"train_0000\.png: mask values 77 are out of range"):
        open_split(tmp_path)[0]


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((40, 50, 4), np.uint8, "uint8 with 4 channels"),
        ((40, 50), np.uint16, "uint16 with 1 channels"),
        ((40, 50, 3), np.uint16, "uint16 with 3 channels"),
    ],
)
def test_mask_of_another_kind_is_refused(tmp_path, shape, dtype, message):
    cv2.imwrite(str(tmp_path / "mask.png"), np.zeros(shape, dtype))
    with pytest.raises(DataError, match=rf"mask\.png: a mask must be an 8-bit PNG .* is {message}"):
        read_mask(tmp_path / "mask.png")


def test_voc2012_reads_official_masks_by_their_palette(tmp_path):
    write_voc(tmp_path, "val", ["2007_000033", "2007_000032"], "SegmentationClass")
    ids = np.array([[0, 1, 15], [20, 255, 0]], np.uint8)
    colors = dict(enumerate(VOC.colors)) | {255: (224, 224, 192)}
    write_palette_mask(tmp_path / "SegmentationClass/2007_000033.png", ids, colors)
    write_photograph(tmp_path / "JPEGImages/2007_000033.jpg", ids.shape)
    source = open_split(tmp_path, "val", "voc2012", VOC)
    assert source.names == ["2007_000033", "2007_000032"]  # in the order of the list
    np.testing.assert_array_equal(source[0].labels, ids)
    assert (source[1].labels == 1).all()  # one channel: as it is


def test_color_that_is_no_class_names_the_file_and_the_color(tmp_path):
    write_voc(tmp_path, "val", ["a"], "SegmentationClass")
    ids = np.full((4, 6), 3, np.uint8)
    write_palette_mask(tmp_path / "SegmentationClass/a.png", ids, {3: (128, 128, 1)})
    with pytest.raises(DataError, match=r"Class/a\.png: .* \(128, 128, 1\) .* label set 'voc2012'"):
        open_split(tmp_path, "val", "voc2012", VOC)[0]


@pytest.mark.parametrize("split", ["train_aug", "trainaug"])
def test_voc2012_augmented_masks_lie_in_a_folder_of_their_own(tmp_path, split):
    write_voc(tmp_path, split, ["a", "b"], "SegmentationClassAug")
    write_voc(tmp_path, "train", ["c"], "SegmentationClass")
    assert len(open_split(tmp_path, split, "voc2012", VOC)) == 2
    assert len(open_split(tmp_path, "train", "voc2012", VOC)) == 1


def test_voc2012_list_may_name_its_masks(tmp_path):
    lines = "JPEGImages/a.jpg SegmentationClassAug/a.png\n"
    write_voc(tmp_path, "mine", ["a"], "SegmentationClassAug", lines)
    assert open_split(tmp_path, "mine", "voc2012", VOC).names == ["a"]


def test_voc2012_names_without_files_are_counted(tmp_path):
    names = [f"n{i}" for i in range(8)]
    write_voc(tmp_path, "train_aug", names, "SegmentationClass")
    (tmp_path / "JPEGImages/n3.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_split(tmp_path, "train_aug", "voc2012", VOC)
    text = str(caught.value)
    assert "train_aug.txt names files" in text
    assert "JPEGImages/n3.jpg (1 of 8): no such image" in text
    assert "SegmentationClassAug/n4.png and 3 more (8 of 8): no such mask" in text
    assert "VOCtrainval_11-May-2012.tar" in text


def test_list_that_is_not_there(tmp_path):
    write_voc(tmp_path, "val", ["a"], "SegmentationClass")
    with pytest.raises(DataError) as caught:
        open_split(tmp_path, "train_aug", "voc2012", VOC)
    text = str(caught.value)
    assert "ImageSets/Segmentation/train_aug.txt" in text
    assert "found     beside it val.txt" in text
    assert "Hariharan" in text
    with pytest.raises(
        DataError, match=r"found     ImageSets/, ImageSets/Segmentation/, JPEGImages/"
    ):
        open_split(tmp_path, "none/train.txt", "list", VOC)
    with pytest.raises(DataError, match=r"data\.root is not set"):
        FolderSource(None, layout="voc2012", split="train", label_set=VOC)


def test_list_of_images_and_masks(tmp_path):
    """The authors' format for all data sets."""
    write_photograph(tmp_path / "root/photos/b.jpg")
    write_photograph(tmp_path / "root/photos/a.png")
    write_mask(tmp_path / "root/ids/x.png", 3)
    text = "\nphotos/b.jpg ids/x.png\nphotos/a.png ids/x.png\n\n"
    (tmp_path / "root/train.txt").write_text(text)
    (tmp_path / "elsewhere.txt").write_text(text)
    for split in ("train.txt", str(tmp_path / "elsewhere.txt")):
        source = open_split(tmp_path / "root", split, "list")
        assert source.names == ["b", "a"]
        assert (source[1].labels == 3).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.jpg\na.jpg a.png\n", r"must be 'image mask', .* 1 are not, by number:\n  1: 'a\.jpg'"),
        ("a.jpg a.png\na.jpg my mask.png\n", r"2: 'a\.jpg my mask\.png'"),
        ("a.jpg b.png\n", r"  b\.png \(1 of 1\): no such mask"),
        ("b.jpg a.png\n", r"  b\.jpg \(1 of 1\): no such image"),
        ("a.jpg a.png\na.jpg a.jpg\n", r"a\.jpg \(1 of 2\): a mask must be \.png"),
        ("\n", "is empty: zero images"),
    ],
)
def test_bad_list(tmp_path, text, message):
    write_photograph(tmp_path / "a.jpg")
    write_mask(tmp_path / "a.png")
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=rf"list\.txt[\s\S]*{message}[\s\S]*your own list"):
        open_split(tmp_path, "list.txt", "list")


def test_cityscapes_reads_the_encoding_of_its_label_set(tmp_path):
    for city, number in (("bonn", 7), ("aachen", 0)):
        write_cityscapes(
            tmp_path, city, number, "labelIds", "labelTrainIds", "instanceIds", "color"
        )
    for label_set in (CITYSCAPES, TRAIN_IDS):
        source = open_split(tmp_path, "train", "cityscapes", label_set)
        assert source.names == ["aachen_000000_000019", "bonn_000007_000019"]
        assert (source[1].labels == CITYSCAPES.names.index("car")).all()


def test_cityscapes_reads_label_ids_for_ones_own_classes(tmp_path):
    write_cityscapes(tmp_path, "aachen", 0, "labelIds", "labelTrainIds")
    (tmp_path / "mine.csv").write_text(
        "id,name,red,green,blue,raw_ids\n0,ground,0,0,0,7 8\n1,vehicle,9,9,9,26\n"
    )
    mine = load_label_set(str(tmp_path / "mine.csv"))
    assert (open_split(tmp_path, "train", "cityscapes", mine)[0].labels == 1).all()


def test_cityscapes_masks_that_are_not_there(tmp_path):
    write_cityscapes(tmp_path, "aachen", 0, "labelIds")
    write_cityscapes(tmp_path, "aachen", 1, "labelIds", "labelTrainIds")
    with pytest.raises(DataError) as caught:
        open_split(tmp_path, "train", "cityscapes", TRAIN_IDS)
    text = str(caught.value)
    assert "aachen_000000_000019_leftImg8bit.png (1 of 2): no partner in" in text
    assert "*_gtFine_labelTrainIds" in text
    assert "createTrainIdLabelImgs" in text


@pytest.mark.parametrize(
    ("label_set", "ending", "other"),
    [(CITYSCAPES, "labelTrainIds", TRAIN_IDS), (TRAIN_IDS, "labelIds", CITYSCAPES)],
    ids=lambda value: getattr(value, "name", value),
)
def test_encodings_of_cityscapes_are_not_mixed_up_in_a_list(tmp_path, label_set, ending, other):
    write_cityscapes(tmp_path, "aachen", 0, ending)
    name = "train/aachen/aachen_000000_000019"
    line = f"leftImg8bit/{name}_leftImg8bit.png gtFine/{name}_gtFine_{ending}.png\n"
    (tmp_path / "train.txt").write_text(line)
    assert len(open_split(tmp_path, "train.txt", "list", other)) == 1
    with pytest.raises(
        DataError, match=rf"_{ending}\.png \(1 of 1\) want data\.labels={other.name}\n"
    ):
        open_split(tmp_path, "train.txt", "list", label_set)


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.99])
def test_truncated_photograph_is_named(tmp_path, keep):
    write_split(tmp_path, "train", 1, size=(200, 300))
    path = tmp_path / "images/train/train_0000.jpg"
    encoded = path.read_bytes()
    path.write_bytes(encoded[: int(len(encoded) * keep)])
    with pytest.raises(DataError, match=r"train_0000\.jpg: (the file is empty|cannot be decoded)"):
        open_split(tmp_path)[0]


def test_what_is_no_image_or_not_there(tmp_path):
    (tmp_path / "text.jpg").write_text("not a photograph")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "text.jpg")
    with pytest.raises(DataError, match="No such file"):
        read_image(tmp_path / "none.jpg")
