"""Prepared data sets: what is stored, that both sources give the same, and what a fault says."""

import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import builders
from pspnet_jax.data.builders import PreparedSource
from pspnet_jax.data.layouts import DataError
from pspnet_jax.data.pipeline import evaluation_examples, open_source, training_batches

from pictures import AUGMENT, example, open_folder, write_image, write_mask, write_split

BUDGET_SECONDS = 60

CAMVID = load_label_set("camvid")
VOC = load_label_set("voc2012")


def open_prepared(root, split="train", layout="camvid", label_set=CAMVID):
    return PreparedSource(str(root), layout=layout, split=split, label_set=label_set)


def prepare(root, output, splits=("train",), layout="camvid", label_set=CAMVID):
    sources = {split: open_folder(root, split, layout, label_set) for split in splits}
    return builders.prepare(str(root), sources, output, layout=layout, label_set=label_set)


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Nine photographs to train on, one of them a PNG of another size, and four to evaluate on."""
    root = tmp_path_factory.mktemp("camvid")
    write_split(root, "train", 9)
    write_split(root, "val", 4)
    odd = example(36, 64, seed=20)
    write_image(root / "images/train/an_odd_one.png", odd.image)
    write_mask(root / "annotations/train/an_odd_one.png", odd.labels)
    return root


@pytest.fixture(scope="module")
def prepared(data, tmp_path_factory):
    """The output of `prepare`, with several record files to a split."""
    output = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "SHARD_BYTES", 5000)
        prepare(data, output, ("train", "val"))
    return output


@pytest.fixture
def copied(prepared, tmp_path):
    """A prepared data set to damage: its output and the folder of its files."""
    shutil.copytree(prepared, tmp_path / "copied")
    return tmp_path / "copied", tmp_path / "copied/prepared/1.0.0"


def test_files_are_stored_byte_for_byte_in_the_order_of_the_folder(data, prepared):
    skip = tfds.decode.SkipDecoding()
    builder = tfds.builder_from_directory(prepared / "prepared/1.0.0")
    stored = builder.as_data_source("train", decoders={"image": skip, "mask": skip})
    names = ["an_odd_one", *(f"train_{i:04d}" for i in range(9))]
    assert len(builder.info.splits["train"].shard_lengths) > 2
    assert [record["name"].decode() for record in stored] == names
    for i, record in enumerate(stored):
        image, mask = (record[key].decode() for key in ("image_file", "mask_file"))
        assert record["index"] == i
        assert image == f"images/train/{names[i]}.{'jpg' if i else 'png'}"
        assert mask == f"annotations/train/{names[i]}.png"
        assert record["image"] == (data / image).read_bytes()
        assert record["mask"] == (data / mask).read_bytes()


def test_other_programs_decode_it_as_any_data_set_of_tfds(data, prepared):
    builder = tfds.builder_from_directory(prepared / "prepared/1.0.0")
    record, read = builder.as_data_source("val")[2], open_folder(data, "val")[2]
    np.testing.assert_array_equal(record["image"], read.image)
    np.testing.assert_array_equal(record["mask"][..., 0], read.labels)


def write_camvid(root):
    write_split(root, "train", 2)


def write_ade20k(root):
    write_split(root, "training", 2, raw_offset=1)


def write_pairs(root):
    write_split(root, "mine", 2, masks="masks")


def write_masks_of_both_kinds(root):
    """One mask of ids, one in the colors of the classes; not in alphabetical order."""
    for name in ("b", "a"):
        write_image(root / f"JPEGImages/{name}.jpg", example().image)
    labels = example(num_classes=21).labels
    write_mask(root / "SegmentationClass/b.png", labels)
    write_mask(root / "SegmentationClass/a.png", np.array(VOC.colors, np.uint8)[labels][..., ::-1])
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("b\na\n")


def write_two_cities(root):
    for city, value in (("aachen", 26), ("bonn", 7)):
        stem = f"train/{city}/{city}_000000_000019"
        write_image(root / f"leftImg8bit/{stem}_leftImg8bit.png", example().image)
        for ending, raw in (("labelIds", value), ("labelTrainIds", 13)):
            write_mask(
                root / f"gtFine/{stem}_gtFine_{ending}.png", np.full((40, 50), raw, np.uint8)
            )


def write_list(root):
    """Two lists of one name; the paths of one are absolute."""
    for folder, prefix in (("a", "a/"), ("b", f"{root}/b/")):
        write_split(root / folder, "train", 2)
        names = [f"{kind}/train/train_0001" for kind in ("images", "annotations")]
        line = f"{prefix}{names[0]}.jpg {prefix}{names[1]}.png\n"
        (root / folder / "all.txt").write_text(line)


LAYOUTS = {
    "camvid": (write_camvid, "camvid", ("train",)),
    "ade20k": (write_ade20k, "ade20k", ("training",)),
    "pairs": (write_pairs, "camvid", ("mine",)),
    "voc2012": (write_masks_of_both_kinds, "voc2012", ("val",)),
    "cityscapes": (write_two_cities, "cityscapes", ("train",)),
    "cityscapes, train ids": (write_two_cities, "cityscapes_train_ids", ("train",)),
    "list": (write_list, "camvid", ("a/all.txt", "b/all.txt")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_examples_are_those_of_the_folder_in_every_layout(tmp_path, name):
    write, labels, splits = LAYOUTS[name]
    layout, label_set = name.split(",")[0], load_label_set(labels)
    write(tmp_path / "data")
    prepare(tmp_path / "data", tmp_path / "output", splits, layout, label_set)
    for split in splits:
        folder = open_folder(tmp_path / "data", split, layout, label_set)
        source = open_prepared(tmp_path / "output", split, layout, label_set)
        assert len(source) == len(folder) > 0
        for i in range(len(folder)):
            assert_same(source[i], folder[i])
        with pytest.raises(IndexError):
            source[len(folder)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_batches_are_those_of_the_folder(data, prepared, num_workers):
    def batches(kind, root, workers):
        stream = training_batches(
            open_source(kind, split="train", label_set=CAMVID, layout="camvid", root=str(root)),
            AUGMENT,
            global_batch_size=4,
            seed=3,
            first_step=1,
            num_workers=workers,
        )
        return list(itertools.islice(stream, 5))

    assert_same(batches("prepared", prepared, num_workers), batches("folder", data, 0))


def test_evaluation_reads_the_same_in_the_same_order(data, prepared):
    first = list(evaluation_examples(open_prepared(prepared, "val")))
    assert_same(first, list(evaluation_examples(open_folder(data, "val"))))
    assert [int(read.index) for read in first] == [0, 1, 2, 3]


def test_source_travels_to_other_processes_and_opens_its_files_there(copied):
    output, folder = copied
    source = open_prepared(output)
    read = source[5]
    unopened = pickle.loads(pickle.dumps(source))
    assert_same(unopened[5], read)
    unopened = pickle.loads(pickle.dumps(source))
    for path in folder.glob("*train*"):
        path.unlink()
    assert_same(source[5], read)  # its files stay open
    with pytest.raises(DataError, match="No such file"):
        unopened[5]


def test_nothing_imports_tensorflow_nor_prints(data, tmp_path):
    """Preparing, reading, two workers; a package of that name tells when anybody looks for it."""
    (tmp_path / "packages/tensorflow").mkdir(parents=True)
    (tmp_path / "packages/tensorflow/__init__.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\nraise ImportError('refused')\n"
    )
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from test_builders import *\n"
        "if __name__ == '__main__':\n"
        "    data, output = sys.argv[1:]\n"
        "    prepare(data, Path(output))\n"
        "    stream = training_batches(open_prepared(output), AUGMENT, global_batch_size=4, seed=3,\n"
        "                              first_step=0, num_workers=2)\n"
        "    assert next(stream).images.shape == (4, 33, 33, 3)\n"
        "    assert open_prepared(output)[0].labels.shape == (36, 64)\n"
        "    assert 'tensorflow' not in sys.modules\n"
    )
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, [tmp_path / "packages", here, here.parent]))
    result = subprocess.run(
        [sys.executable, str(script), str(data), str(tmp_path / "output")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "imported").exists()
    assert result.stdout == ""


def test_preparing_again_changes_nothing(data, prepared, caplog):
    def files():
        return {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}

    before = files()
    with caplog.at_level("INFO", "pspnet_jax"):
        prepare(data, prepared, ("train", "val"))
    assert "holds these examples already; nothing to do" in caplog.text
    assert files() == before


def test_preparing_something_else_into_the_same_folder_is_refused(data, prepared, tmp_path):
    with pytest.raises(DataError, match=r"the split 'val' is only there\nChoose another --output"):
        prepare(data, prepared, ("train",))
    shutil.copytree(data, tmp_path / "data")
    write_image(tmp_path / "data/images/train/train_0003.jpg", example(seed=33).image)
    (tmp_path / "data/images/val/val_0003.jpg").unlink()
    (tmp_path / "data/annotations/val/val_0003.png").unlink()
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "data", prepared, ("train", "val"))
    text = str(caught.value)
    assert "the split 'train' has 10 examples there, 10 here, of other names or file sizes" in text
    assert "the split 'val' has 4 examples there, 3 here" in text
    other = load_label_set("cityscapes")
    with pytest.raises(DataError, match=r"data\.labels=camvid there, cityscapes here"):
        prepare(data, prepared, ("train", "val"), "camvid", other)


def test_interrupted_preparation_leaves_nothing(data, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(builders, "_relative", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(data, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["prepared"]
    with pytest.raises(DataError, match="holds no prepared data set"):
        open_prepared(tmp_path)
    monkeypatch.undo()
    prepare(data, tmp_path)
    assert len(open_prepared(tmp_path)) == 10


def test_killed_preparation_looks_unfinished_and_is_done_again(data, tmp_path):
    code = (
        "import os, sys; from pathlib import Path; import test_builders as t\n"
        "relative, paths = t.builders._relative, []\n"
        "def killed(path, root):\n"
        "    paths.append(path)\n"
        "    os.kill(os.getpid(), 9) if len(paths) == 5 else None\n"
        "    return relative(path, root)\n"
        "t.builders._relative = killed\n"
        "t.prepare(sys.argv[1], Path(sys.argv[2]))\n"
    )
    here = Path(__file__).parent
    result = subprocess.run(
        [sys.executable, "-c", code, str(data), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
    )
    assert result.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "prepared").iterdir()
    with pytest.raises(DataError, match="holds only what an interrupted preparation left"):
        open_prepared(tmp_path)
    prepare(data, tmp_path)
    assert not left.exists()
    assert len(open_prepared(tmp_path)) == 10


def test_full_disk(data, tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(DataError, match=r"cannot be written: .*File too large"):
            prepare(data, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DataError, match=r"has 0\.00 GB free, .* choose another --output"):
        prepare(data, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_what_was_not_prepared_is_refused_with_the_next_step(data, prepared, tmp_path):
    with pytest.raises(DataError, match=r"data\.root is not set: prepare a folder .* --output=DIR"):
        open_source("prepared", split="train", label_set=CAMVID, layout="camvid", root=None)
    with pytest.raises(DataError, match=r"there is no such folder; prepare a folder"):
        open_prepared(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no prepared data set; prepare a folder"):
        open_prepared(data)
    with pytest.raises(
        DataError,
        match=r"the split 'test' was not prepared; .* holds 'train' \(10\), 'val' \(4\)\. .*"
        r"evaluate\.split",
    ):
        open_prepared(prepared, "test")
    with pytest.raises(
        DataError, match=r"data\.layout=pairs, but .* prepared with data\.layout=camvid: say --conf"
    ):
        open_prepared(prepared, layout="pairs")
    (tmp_path / "prepared/0.9.0").mkdir(parents=True)
    with pytest.raises(DataError, match=r"another version \(records 0\.9\.0, not 1\.0\.0\)"):
        open_prepared(tmp_path)


def test_masks_of_another_encoding_are_refused(tmp_path):
    """The values of both encodings overlap: nothing else would tell."""
    write_two_cities(tmp_path / "data")
    train_ids = load_label_set("cityscapes_train_ids")
    prepare(tmp_path / "data", tmp_path, ("train",), "cityscapes", train_ids)
    with pytest.raises(
        DataError,
        match=r"data\.labels=cityscapes, but .* prepared with data\.labels=cityscapes_train_ids: "
        r"say --config\.data\.labels=cityscapes_train_ids",
    ):
        open_prepared(tmp_path, layout="cityscapes", label_set=load_label_set("cityscapes"))


def damaged(path: Path, fault: str):
    content = bytearray(path.read_bytes())
    if fault == "flipped":
        content[content.index(b"\xff\xd8\xff") + 300] ^= 1  # within a photograph
    elif fault == "truncated":
        del content[len(content) // 2 :]
    elif fault == "empty":
        content.clear()
    path.write_bytes(content)
    if fault == "gone":
        path.unlink()


@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty", "gone"])
def test_damaged_record_file_is_named(copied, fault):
    output, folder = copied
    first, *_ = sorted(folder.glob("*-val*"))
    damaged(first, fault)
    with pytest.raises(DataError) as caught:
        list(evaluation_examples(open_prepared(output, "val")))
    assert str(caught.value).startswith(f"{first} is damaged (")
    assert "prepare it again" in str(caught.value)


def test_missing_record_file_is_found_before_anything_is_read(copied):
    output, folder = copied
    *_, last = sorted(folder.glob("*-val*"))
    last.unlink()
    with pytest.raises(DataError, match=rf"^{last} is damaged \(there is no such file\)"):
        open_prepared(output, "val")


@pytest.mark.parametrize("name", ["metadata.json", "dataset_info.json", "features.json"])
@pytest.mark.parametrize("fault", ["truncated", "gone"])
def test_damaged_description_is_named(copied, name, fault):
    output, folder = copied
    damaged(folder / name, fault)
    with pytest.raises(DataError, match=r"prepared/1\.0\.0.* is damaged \("):
        open_prepared(output)


def test_records_in_another_order_are_refused(copied):
    output, folder = copied
    first, second, *_ = sorted(folder.glob("*-train*"))
    first.rename(folder / "other")
    second.rename(first)
    (folder / "other").rename(second)
    with pytest.raises(DataError, match=r"00000-of-\d+ is damaged \(record 0 says that it is \d"):
        open_prepared(output)[0]


def test_missing_records_are_counted(copied):
    output, folder = copied
    contents = json.loads((folder / "metadata.json").read_text())
    contents["splits"]["val"]["num_examples"] = 5
    (folder / "metadata.json").write_text(json.dumps(contents))
    with pytest.raises(DataError, match=r"is damaged \(4 records, not 5\)"):
        open_prepared(output, "val")


def test_bad_photograph_and_bad_mask_are_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    image = tmp_path / "data/images/train/train_0001.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    write_mask(tmp_path / "data/annotations/train/train_0002.png", np.full((40, 50), 77, np.uint8))
    write_mask(tmp_path / "data/annotations/train/train_0003.png", np.zeros((40, 49), np.uint8))
    prepare(tmp_path / "data", tmp_path)
    source = open_prepared(tmp_path)
    stored = r"[\s\S]*stored in .*prepared-train.*; mend the file and prepare again"
    for index, message in (
        (2, r"^images/train/train_0001\.jpg: cannot be decoded"),
        (3, r"^annotations/train/train_0002\.png: mask values 77 are out of range"),
        (4, r"^sizes differ: images/train/train_0003\.jpg is 40x50 .*_0003\.png is 40x49"),
    ):
        with pytest.raises(DataError, match=message + stored):
            source[index]
