"""Layouts: which images and masks belong to a split, and what a fault says."""

import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.folders import FolderSource
from pspnet_jax.data.layouts import DataError, list_split

from pictures import (
    open_folder,
    write_cityscapes,
    write_mask,
    write_photograph,
    write_split,
    write_voc,
)

BUDGET_SECONDS = 15

CAMVID = load_label_set("camvid")
VOC = load_label_set("voc2012")
CITYSCAPES = load_label_set("cityscapes")
TRAIN_IDS = load_label_set("cityscapes_train_ids")


def test_segnet_and_pairs_layouts(tmp_path):
    write_split(tmp_path / "a", "train", 1)
    (tmp_path / "b").mkdir()
    (tmp_path / "a/images/train").rename(tmp_path / "b/train")
    (tmp_path / "a/annotations/train").rename(tmp_path / "b/trainannot")
    assert len(open_folder(tmp_path / "b")) == 1
    write_split(tmp_path / "c", "mine", 2, masks="masks")
    assert len(open_folder(tmp_path / "c", "mine", "pairs")) == 2


def test_wrong_root_says_what_was_expected_found_and_where_it_comes_from(tmp_path):
    (tmp_path / "photos/summer").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, "training", "ade20k")
    text = str(caught.value)
    assert "images/training/ and" in text
    assert "found     photos/, photos/summer/" in text
    assert "ADEChallengeData2016.zip" in text
    assert "--config.data.root=DIR" in text
    with pytest.raises(DataError, match="no folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data\.root is not set"):
        FolderSource(None, layout="ade20k", split="training", label_set=CAMVID)


def test_image_without_mask_and_mask_without_image_are_named(tmp_path):
    write_split(tmp_path, "train", 9)
    (tmp_path / "annotations/train/train_0001.png").unlink()
    for i in range(3, 9):
        (tmp_path / f"images/train/train_000{i}.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path)
    assert "train_0001.jpg (1 of 3): no partner in" in str(caught.value)
    assert "and 1 more (6 of 8)" in str(caught.value)


def test_hidden_files_are_no_images(tmp_path):
    """As macOS leaves them on disks of other systems."""
    write_split(tmp_path, "train", 2)
    for name in ("images/train/._train_0000.jpg", "images/train/.DS_Store", "images/train/.x.jpg"):
        (tmp_path / name).write_bytes(b"0")
    assert len(open_folder(tmp_path)) == 2
    (tmp_path / "annotations/train/train_0001.png").unlink()
    (tmp_path / "annotations/train/.DS_Store").write_bytes(b"0")
    with pytest.raises(DataError, match=r"no partner in \S*annotations/train/\*\.\*\n"):
        open_folder(tmp_path)


def test_zero_images(tmp_path):
    write_split(tmp_path, "train", 0)
    with pytest.raises(DataError, match="zero images"):
        open_folder(tmp_path)


def test_two_images_of_one_name(tmp_path):
    write_split(tmp_path, "train", 2)
    folder = tmp_path / "images/train"
    (folder / "train_0000.png").write_bytes((folder / "train_0000.jpg").read_bytes())
    with pytest.raises(DataError, match=r"share the name 'train_0000': remove one"):
        open_folder(tmp_path)


@pytest.mark.parametrize("split", ["train_aug", "trainaug"])
def test_voc2012_augmented_masks_lie_in_a_folder_of_their_own(tmp_path, split):
    write_voc(tmp_path, split, ["a", "b"], "SegmentationClassAug")
    write_voc(tmp_path, "train", ["c"], "SegmentationClass")
    assert len(open_folder(tmp_path, split, "voc2012", VOC)) == 2
    assert len(open_folder(tmp_path, "train", "voc2012", VOC)) == 1


def test_voc2012_list_may_name_its_masks(tmp_path):
    lines = "JPEGImages/a.jpg SegmentationClassAug/a.png\n"
    write_voc(tmp_path, "mine", ["a"], "SegmentationClassAug", lines)
    assert open_folder(tmp_path, "mine", "voc2012", VOC).names == ["a"]


def test_voc2012_names_without_files_are_counted(tmp_path):
    names = [f"n{i}" for i in range(8)]
    write_voc(tmp_path, "train_aug", names, "SegmentationClass")
    (tmp_path / "JPEGImages/n3.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, "train_aug", "voc2012", VOC)
    text = str(caught.value)
    assert "train_aug.txt names files" in text
    assert "JPEGImages/n3.jpg (1 of 8): no such image" in text
    assert "SegmentationClassAug/n4.png and 3 more (8 of 8): no such mask" in text
    assert "VOCtrainval_11-May-2012.tar" in text


def test_list_that_is_not_there(tmp_path):
    write_voc(tmp_path, "val", ["a"], "SegmentationClass")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, "train_aug", "voc2012", VOC)
    text = str(caught.value)
    assert "ImageSets/Segmentation/train_aug.txt" in text
    assert "found     beside it val.txt" in text
    assert "Hariharan" in text
    with pytest.raises(
        DataError, match=r"found     ImageSets/, ImageSets/Segmentation/, JPEGImages/"
    ):
        open_folder(tmp_path, "none/train.txt", "list", VOC)
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
        source = open_folder(tmp_path / "root", split, "list")
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
        open_folder(tmp_path, "list.txt", "list")


def test_cityscapes_reads_the_encoding_of_its_label_set(tmp_path):
    for city, number in (("bonn", 7), ("aachen", 0)):
        write_cityscapes(
            tmp_path, city, number, "labelIds", "labelTrainIds", "instanceIds", "color"
        )
    for label_set in (CITYSCAPES, TRAIN_IDS):
        source = open_folder(tmp_path, "train", "cityscapes", label_set)
        assert source.names == ["aachen_000000_000019", "bonn_000007_000019"]
        assert (source[1].labels == CITYSCAPES.names.index("car")).all()


def test_cityscapes_reads_label_ids_for_ones_own_classes(tmp_path):
    write_cityscapes(tmp_path, "aachen", 0, "labelIds", "labelTrainIds")
    (tmp_path / "mine.csv").write_text(
        "id,name,red,green,blue,raw_ids\n0,ground,0,0,0,7 8\n1,vehicle,9,9,9,26\n"
    )
    mine = load_label_set(str(tmp_path / "mine.csv"))
    assert (open_folder(tmp_path, "train", "cityscapes", mine)[0].labels == 1).all()


def test_cityscapes_masks_that_are_not_there(tmp_path):
    write_cityscapes(tmp_path, "aachen", 0, "labelIds")
    write_cityscapes(tmp_path, "aachen", 1, "labelIds", "labelTrainIds")
    with pytest.raises(DataError) as caught:
        open_folder(tmp_path, "train", "cityscapes", TRAIN_IDS)
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
    assert len(open_folder(tmp_path, "train.txt", "list", other)) == 1
    with pytest.raises(
        DataError, match=rf"_{ending}\.png \(1 of 1\) want data\.labels={other.name}\n"
    ):
        open_folder(tmp_path, "train.txt", "list", label_set)


def test_masks_of_another_suffix_are_named(tmp_path):
    write_split(tmp_path, "train", 2)
    for path in sorted((tmp_path / "annotations/train").iterdir()):
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(DataError, match=r"2 \.jpg there are not read, only \.png \(JPEG changes"):
        open_folder(tmp_path)


def test_what_pairs_up_is_listed_beside_the_faults(tmp_path):
    write_split(tmp_path, "train", 3)
    (tmp_path / "annotations/train/train_0001.png").unlink()
    listing = list_split(str(tmp_path), layout="camvid", split="train", label_set=CAMVID)
    assert [pair.name for pair in listing.pairs] == ["train_0000", "train_0002"]
    assert len(listing.faults) == 1
    assert "train_0001.jpg (1 of 3)" in listing.faults[0]
    lines = "".join(
        f"images/train/train_000{i}.jpg annotations/train/train_000{i}.png\n" for i in range(3)
    )
    (tmp_path / "list.txt").write_text(lines + "one two three\n")
    listing = list_split(str(tmp_path), layout="list", split="list.txt", label_set=CAMVID)
    assert [pair.name for pair in listing.pairs] == ["train_0000", "train_0002"]
    assert len(listing.faults) == 2


def test_root_that_is_a_loop_or_a_file(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(DataError, match=r"no folder .*loop \(Too many levels of symbolic links\)"):
        open_folder(tmp_path / "loop")
    (tmp_path / "data.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"no folder .*data\.zip \(it is a file\)"):
        open_folder(tmp_path / "data.zip")


def test_coarse_annotations_of_cityscapes(tmp_path):
    name = "train_extra/bonn/bonn_000000_000019"
    write_photograph(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png")
    for ending, value in (("labelIds", 26), ("labelTrainIds", 13), ("instanceIds", 99)):
        write_mask(tmp_path / f"gtCoarse/{name}_gtCoarse_{ending}.png", value)
    for label_set in (CITYSCAPES, TRAIN_IDS):
        source = open_folder(tmp_path, "train_extra", "cityscapes_coarse", label_set)
        assert source.names == ["bonn_000000_000019"]
        assert (source[0].labels == CITYSCAPES.names.index("car")).all()
    with pytest.raises(DataError, match=r"gtCoarse/val/\n[\s\S]*leftImg8bit_trainextra\.zip"):
        open_folder(tmp_path, "val", "cityscapes_coarse", CITYSCAPES)


def test_images_without_a_folder_of_masks(tmp_path):
    write_photograph(tmp_path / "images/train/a.jpg")
    with pytest.raises(
        DataError,
        match=r"expected  .*/annotations/train/ or[\s\S]*found     images/, images/train/",
    ):
        open_folder(tmp_path)
    (tmp_path / "annotations/train").mkdir(parents=True)
    with pytest.raises(DataError, match=r"a\.jpg \(1 of 1\): no partner in .*/annotations/train/"):
        open_folder(tmp_path)
