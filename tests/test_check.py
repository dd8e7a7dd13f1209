"""The verb `check`: one report of everything that is wrong with a data set."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pspnet_jax import check, check_report, progress
from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import default_config
from pspnet_jax.data.folders import FolderSource
from pspnet_jax.data.layouts import DataError
from pspnet_jax.data.pipeline import open_source
from pspnet_jax.main import main

from pictures import (
    CMYK_JPEG,
    ExampleSource,
    example,
    write_image,
    write_mask,
    write_palette_mask,
    write_photograph,
    write_split,
    write_turned_photograph,
)

BUDGET_SECONDS = 40

CONFIG = str(Path(__file__).parent / "tiny_config.py")
CAMVID = load_label_set("camvid")


def config_of(root, **data):
    config = default_config()
    config.name = "test"
    values = {"layout": "camvid", "labels": "camvid", "train_split": "train", "val_split": "val"}
    config.data.update({**values, "root": None if root is None else str(root), **data})
    return config


def write_pair(root, split, name, image, mask):
    write_image(root / f"images/{split}/{name}.png", image)
    write_mask(root / f"annotations/{split}/{name}.png", mask)


def write_masks(root, split, masks, *, first=0):
    """Images of noise, each its own, with the given masks."""
    rng = np.random.default_rng([first, len(split)])
    for i, mask in enumerate(masks, start=first):
        image = rng.integers(0, 255, (*mask.shape, 3)).astype(np.uint8)
        write_pair(root, split, f"{i:03d}", image, mask)


def good_data(root):
    write_masks(root, "train", [example(seed=i).labels for i in range(4)])
    write_masks(root, "val", [example(seed=i).labels for i in range(4, 7)], first=50)


def problems_of(root, **data):
    return check.run(config_of(root, **data)).problems


def test_nothing_wrong(tmp_path, capsys):
    good_data(tmp_path)
    argv = ["check", f"--config={CONFIG}", f"--config.data.root={tmp_path}"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert text.endswith("nothing is wrong\n")
    assert "training split 'train': 4 images" in text
    assert "height x width  40x50 (4)" in text


def test_progress_without_a_terminal_is_lines(tmp_path, capsys, monkeypatch):
    good_data(tmp_path)
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    check.run(config_of(tmp_path))
    counts = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == [
        *(f"{i}/4 images of train" for i in (1, 2, 3, 4, 4)),
        *(f"{i}/3 images of val" for i in (1, 2, 3, 3)),
    ]


def test_counts_are_those_of_the_masks(tmp_path):
    masks = [np.uint8([[0, 0, 1, 11]]), np.uint8([[1, 1, 255, 0]]), np.uint8([[3, 3, 3, 3]])]
    write_masks(tmp_path, "train", masks)
    write_masks(tmp_path, "val", masks[:1], first=50)
    found = check.run(config_of(tmp_path)).surveys["training"]
    assert found.raw_pixels[[0, 1, 3, 11, 255]].tolist() == [3, 3, 4, 1, 1]
    assert found.raw_images[[0, 1, 3, 11, 255]].tolist() == [2, 2, 1, 1, 1]
    assert found.class_pixels[[0, 1, 3, 255]].tolist() == [3, 3, 4, 2]
    assert found.pixels_beside[[0, 1, 3, 255]].tolist() == [8, 8, 4, 8]
    assert found.raw_pixels.sum() == found.class_pixels.sum() == 12


def broken_data(root):
    """Every fault that a file can have, once each, among four good images."""
    good_data(root)
    ids = np.tile(np.uint8([0, 1]), (40, 25))
    photograph = (root / "images/train/000.png").read_bytes()
    big = np.random.default_rng(7).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    images = {
        "truncated": photograph[:-100],
        "empty": b"",
        "text": b"no photograph",
        "print": CMYK_JPEG,
    }
    for name, content in images.items():
        (root / f"images/train/{name}.jpg").write_bytes(content)
        write_mask(root / f"annotations/train/{name}.png", ids[:8, :8] if name == "print" else ids)
    alpha = np.full((40, 50, 1), 9, np.uint8)
    assert cv2.imwrite(str(root / "images/train/clear.png"), np.dstack([big, alpha]))
    write_mask(root / "annotations/train/clear.png", ids)
    assert cv2.imwrite(str(root / "images/train/deep.png"), big.astype(np.uint16))
    write_mask(root / "annotations/train/deep.png", ids)
    write_turned_photograph(root / "images/train/turned.jpg", big, 6)
    write_mask(root / "annotations/train/turned.png", np.ascontiguousarray(ids.T))
    for name, mask in {
        "size": ids[:, :-1],
        "id200": np.where(ids == 1, 200, 0).astype(np.uint8),
        "again200": np.where(ids == 1, 200, 0).astype(np.uint8),
        "deepmask": ids.astype(np.uint16),
        "alphamask": np.dstack([ids] * 4),
    }.items():
        big[0, 0] += 1
        write_pair(root, "train", name, big, np.ascontiguousarray(mask))
    write_photograph(root / "images/train/colors.jpg", (40, 50))
    write_palette_mask(root / "annotations/train/colors.png", ids, {0: (1, 2, 3), 1: (4, 5, 6)})
    for folder in ("images", "annotations"):
        (root / folder / "train/loop.png").symlink_to(root / folder / "train/loop.png")
    write_photograph(root / "images/train/alone.jpg", (40, 50))
    shutil.copy(root / "images/train/000.png", root / "images/train/twice.png")
    shutil.copy(root / "annotations/train/000.png", root / "annotations/train/twice.png")
    shutil.copy(root / "images/train/001.png", root / "images/val/leaked.png")
    shutil.copy(root / "annotations/train/001.png", root / "annotations/val/leaked.png")


BROKEN = {
    "training: images that cannot be used": [
        ("truncated.jpg", "cannot be decoded"),
        ("empty.jpg", "the file is empty"),
        ("text.jpg", "cannot be decoded"),
        ("clear.png", "100.0% of the image is transparent"),
        ("deep.png", "must have 8 bits per channel, this one has 16"),
        ("loop.png", "Too many levels of symbolic links"),
    ],
    "training: masks that cannot be used": [
        ("deepmask.png", "uint16 with 1 channels"),
        ("alphamask.png", "uint8 with 4 channels"),
        ("loop.png", "Too many levels of symbolic links"),
    ],
    "training: images and masks of different size": [
        ("size.png", "is 40x49"),
        ("turned.jpg", "turned by its Exif orientation 6"),
    ],
    "training: masks with values or colors that the label set does not list": [
        ("id200.png", "mask values 200 are out of range"),
        ("again200.png", "mask values 200 are out of range"),
        ("colors.png", "(1, 2, 3), (4, 5, 6)"),
    ],
    "files of the training split 'train'": [("alone.jpg", "no partner in")],
    "the same image file in training and validation": [("leaked.png", "001.png = ")],
}


def test_everything_broken_is_in_one_report(tmp_path, capsys):
    broken_data(tmp_path / "data")
    output = tmp_path / "out/check.json"
    argv = ["check", f"--config={CONFIG}", f"--config.data.root={tmp_path / 'data'}"]
    assert main([*argv, f"--output={output}"]) == 1
    captured = capsys.readouterr()
    assert "would stop or spoil a training" in captured.err
    report = json.loads(output.read_text())
    assert set(report["problems"]) == set(BROKEN)
    for title, expected in BROKEN.items():
        sentences = report["problems"][title]
        assert len(sentences) == len(expected), title
        for name, words in expected:
            assert any(name in sentence and words in sentence for sentence in sentences), name
        assert f"{title} ({len(expected)})" in captured.out
    assert f"{sum(map(len, BROKEN.values()))} problems\n" in captured.out
    remarks = report["remarks"]
    assert any(
        "print.jpg" in path for path in remarks["training: CMYK, read as RGB without color profile"]
    )
    (copy,) = remarks["training: copies of the same image file"]
    assert re.search(r"000\.png = .*twice\.png", copy)
    assert re.search(
        r"200 is out of range: training, 2 masks, first in .*again200\.png", captured.out
    )


def test_split_that_is_not_there_does_not_hide_the_other(tmp_path):
    write_split(tmp_path, "val", 2)
    found = check.run(config_of(tmp_path))
    assert list(found.surveys) == ["validation"]
    (title,) = found.problems
    assert title == "the training split 'train' cannot be read"
    assert "does not hold the split 'train'" in found.problems[title][0]
    assert "class weights: none" in check_report.text(found)


def test_masks_read_by_their_colors_are_counted_by_class(tmp_path):
    ids = np.tile(np.uint8([0, 0, 1, 255]), (4, 1))
    voc = load_label_set("voc2012")
    colors = {0: (0, 0, 0), 1: (128, 0, 0), 255: (224, 224, 192)}
    for split, shade in (("train", 90), ("val", 91)):
        write_image(tmp_path / f"images/{split}/a.png", np.full((4, 4, 3), shade, np.uint8))
        write_palette_mask(tmp_path / f"annotations/{split}/a.png", ids, colors)
    found = check.run(config_of(tmp_path, labels="voc2012"))
    assert not found.problems
    assert found.surveys["training"].class_pixels[[0, 1, 255]].tolist() == [8, 4, 4]
    text = check_report.text(found)
    assert "1 a palette, read by its colors" in text
    assert re.search(rf"1  {voc.names[1]} +4 +25\.0000%", text)
    assert "19 of 21 classes never occur" in text


def test_painted_scenes_are_a_sample():
    config = config_of(None, source="scenes", labels="scenes")
    found = check.run(config)
    assert not found.problems
    assert "64 images, a sample: they are painted on the fly" in check_report.text(found)
    assert found.surveys["training"].class_pixels[:12].all()


def test_a_split_that_scenes_does_not_have_is_a_problem():
    found = check.run(config_of(None, source="scenes", labels="scenes", train_split="training"))
    (problem,) = found.problems["the training split 'training' cannot be painted"]
    assert "must be 'train' or 'val'" in problem
    assert found.surveys["validation"].num_images == 64


def test_masks_of_one_class_each_are_not_taken_for_pictures(tmp_path):
    for split in ("train", "val"):
        write_masks(tmp_path, split, [np.full((9, 9), i, np.uint8) for i in (1, 2)])
    found = check.run(config_of(tmp_path))
    text = check_report.text(found)
    assert "  raw id  class" in text
    assert "   class  class" not in text


def test_weights_of_frequent_classes_are_not_rounded_to_nothing():
    found = check.run(config_of(None, source="scenes", labels="scenes"))
    found.surveys["training"].class_pixels[:12] = [10**9] + [30_000] * 11
    for weights in found.class_weights().values():
        assert min(weights) > 0


def test_prepared_data_are_checked_as_their_folder(tmp_path):
    good_data(tmp_path / "data")
    image, mask = (tmp_path / f"data/{kind}/train/001.png" for kind in ("images", "annotations"))
    image.write_bytes(image.read_bytes()[:-30])
    write_mask(mask, np.full((40, 50), 99, np.uint8))
    write_mask(tmp_path / "data/annotations/val/050.png", np.zeros((40, 49), np.uint8))
    folder = config_of(tmp_path / "data")
    argv = [f"--config={CONFIG}", f"--config.data.root={tmp_path / 'data'}"]
    assert main(["prepare", *argv, f"--output={tmp_path / 'prepared'}"]) == 0
    found = check.run(config_of(tmp_path / "prepared", source="prepared"))
    expected = check.run(folder)
    for role in ("training", "validation"):
        for name in ("raw_pixels", "raw_images", "class_pixels", "pixels_beside", "sizes"):
            np.testing.assert_equal(
                getattr(found.surveys[role], name), getattr(expected.surveys[role], name)
            )
    relative = {
        title: [sentence.replace(f"{tmp_path / 'data'}/", "") for sentence in sentences]
        for title, sentences in expected.problems.items()
    }
    assert len(relative) == 3
    assert found.problems == relative
    assert list(problems_of(tmp_path, source="prepared")) == [
        "the training split 'train' cannot be read",
        "the validation split 'val' cannot be read",
    ]
    source = open_source(
        "prepared", split="val", label_set=CAMVID, layout="camvid", root=str(tmp_path / "prepared")
    )
    with pytest.raises(DataError, match=r"050\.png is 40x50 .*050\.png is 40x49"):
        check.first_look(source, CAMVID, split="val")


def test_flag_of_class_weights_can_be_pasted(tmp_path, capsys):
    good_data(tmp_path)
    argv = ["check", f"--config={CONFIG}", f"--config.data.root={tmp_path}"]
    assert main(argv) == 0
    pasted = re.findall(r"--config\.loss\.class_weights='(.*)'", capsys.readouterr().out)
    assert len(pasted) == 3
    for numbers in pasted:
        assert len(numbers.strip("()").split(",")) == 11
        assert main([*argv, f"--config.loss.class_weights={numbers}"]) == 0


def test_one_class_alone_is_a_problem(tmp_path):
    write_masks(tmp_path, "train", [np.full((4, 5), 3, np.uint8)] * 2)
    write_masks(tmp_path, "val", [np.full((4, 5), 11, np.uint8)], first=50)
    problems = problems_of(tmp_path)
    assert problems["training: nothing to tell apart"] == [
        "only one class occurs, road, in 2 masks; all else is void"
    ]
    assert problems["validation: nothing to tell apart"] == [
        "no pixel has a class, in 1 masks; all else is void"
    ]


def test_masks_of_0_and_255_are_explained_and_a_csv_reads_them(tmp_path):
    binary = np.uint8([[0, 255, 255, 0]])
    write_masks(tmp_path, "train", [binary, binary])
    write_masks(tmp_path, "val", [binary], first=50)
    (sentence,) = problems_of(tmp_path)["training: masks that most likely mean something else"]
    assert "nothing but 0, 255; 255 is void unless a class lists it" in sentence
    rows = re.findall(r"'([^' ]+,[^' ]+)'", sentence)
    assert len(rows) == 3
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    found = check.run(config_of(tmp_path, labels=str(tmp_path / "mine.csv")))
    assert not found.problems
    assert found.surveys["training"].class_pixels[[0, 1, 255]].tolist() == [4, 4, 0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_training_stops_before_its_first_step(tmp_path, split, capsys):
    good_data(tmp_path)
    mask = next(iter(sorted((tmp_path / f"annotations/{split}").iterdir())))
    write_mask(mask, np.full((40, 50), 99, np.uint8))
    argv = [f"--config={CONFIG}", f"--config.data.root={tmp_path}", f"--workdir={tmp_path / 'run'}"]
    assert main(argv) == 1
    text = capsys.readouterr().err
    assert f"images of split '{split}' that were looked at" in text
    assert f"{mask.name}: mask values 99 are out of range" in text
    assert "first step compiles" not in text
    assert not (tmp_path / "run/checkpoints").exists()


def test_first_look_reads_the_first_and_some_random_images(tmp_path, monkeypatch):
    good_data(tmp_path)
    write_masks(tmp_path, "train", [example(seed=i).labels for i in range(40)], first=100)
    source = FolderSource(str(tmp_path), layout="camvid", split="train", label_set=CAMVID)
    read, through = [], check.examine
    monkeypatch.setattr(
        check, "examine", lambda pair, label_set: read.append(pair.name) or through(pair, label_set)
    )
    check.first_look(source, CAMVID, split="train")
    assert read[:3] == source.names[:3]
    assert 9 <= len(read) <= 12
    assert len(set(read)) == len(read)
    monkeypatch.setattr(check, "_SECONDS_OF_FIRST_LOOK", 0.0)
    read.clear()
    check.first_look(source, CAMVID, split="train")
    assert read == source.names[:1]


def test_first_look_lets_pass_what_training_leaves_out(tmp_path, said):
    good_data(tmp_path)
    source = FolderSource(str(tmp_path), layout="camvid", split="train", label_set=CAMVID)
    Path(source.pairs[0].image).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty"):
        check.first_look(source, CAMVID, split="train", unreadable_share_max=0.1)
    check.first_look(source, CAMVID, split="train", unreadable_share_max=1.0)
    assert "the file is empty" in said[0]
    assert "left out of training" in said[0]


def test_first_look_warns_of_what_looks_legal(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(check.log, "propagate", True)
    write_masks(tmp_path, "train", [np.uint8([[0, 255]])])
    source = FolderSource(str(tmp_path), layout="camvid", split="train", label_set=CAMVID)
    check.first_look(source, CAMVID, split="train")
    assert "'1,object,220,20,60,255'" in caplog.text


def test_first_look_leaves_other_sources_alone():
    check.first_look(ExampleSource(2, num_classes=200), CAMVID, split="train")
