"""Image files -> results on disk, with a segmenter whose predictions can be told from the photograph."""

import json
import os
import threading

import cv2
import numpy as np
import pytest

from pspnet_jax import predict
from pspnet_jax.catalog import load_label_set
from pspnet_jax.data.folders import read_image
from pspnet_jax.data.layouts import DataError
from pspnet_jax.segmenter import Prediction, Protocol, Provenance, Segmenter

import networks
from pictures import example, write_image, write_turned_photograph

BUDGET_SECONDS = 20


def classes_of(image, num_classes=11):
    """The stub's prediction: bright red is a high class."""
    return (image[..., 0] // (256 / num_classes)).astype(np.uint8)


class StubSegmenter(Segmenter):
    """Predicts the class from the red channel; takes three images before it gives the first result."""

    ahead = 3

    def __init__(self, labels="camvid", digest="abc"):
        self.label_set = load_label_set(labels)
        self.protocol = Protocol("whole", flip=True, absent_class="skip")
        self.provenance = Provenance("memory", 7, digest)
        self.description = networks.description()
        self.options = {}

    def predict(self, images, *, confidence, entropy, probabilities, **options):
        self.options = options
        waiting = []
        for image in images:
            waiting.append(image)
            if len(waiting) > self.ahead:
                yield self.one(waiting.pop(0), confidence, entropy, probabilities)
        for image in waiting:
            yield self.one(image, confidence, entropy, probabilities)

    def one(self, image, confidence, entropy, probabilities):
        found = classes_of(image, self.label_set.num_classes)
        share = (image[..., 1] / 255).astype(np.float32)
        every = np.stack([share] * self.label_set.num_classes, axis=-1).astype(np.float16)
        return Prediction(
            found,
            share if confidence else None,
            1 - share if entropy else None,
            every if probabilities else None,
        )


@pytest.fixture
def segmenter(monkeypatch):
    stub = StubSegmenter()

    def load(path, step, dtype):
        stub.description = stub.description.computed_in(dtype)
        return stub

    monkeypatch.setattr(predict, "load", load)
    return stub


@pytest.fixture
def photographs(tmp_path):
    """Nine of different sizes, in two folders with equal names."""
    for i in range(9):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i // 2}.png"
        write_image(path, example(20 + i, 30 - i, seed=i).image)
    return tmp_path / "in"


def read(path):
    found = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    return found if found.ndim == 2 else found[..., ::-1]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_every_kind_of_result(segmenter, photographs, tmp_path):
    out = tmp_path / "out"
    predict.run("x", [str(photographs)], output=str(out), outputs=predict.OUTPUTS)
    names = sorted(f"{'ab'[i % 2]}/{i // 2}" for i in range(9))
    expected = ["legend.csv", "legend.png", "prediction.json"]
    for kind in ("class_maps", "palette", "overlays", "confidence", "entropy", "probabilities"):
        suffix = ".npy" if kind == "probabilities" else ".png"
        expected += [f"{kind}/{name}{suffix}" for name in names]
    assert files_below(out) == sorted(expected)
    palette = segmenter.label_set.palette
    for name in names:
        image = read_image(photographs / f"{name}.png")
        found = read(out / f"class_maps/{name}.png")
        np.testing.assert_array_equal(found, classes_of(image))
        np.testing.assert_array_equal(read(out / f"palette/{name}.png"), palette[found])
        mixed = image / 2 + palette[found] / 2
        assert np.abs(read(out / f"overlays/{name}.png") - mixed).max() <= 0.5
        np.testing.assert_array_equal(read(out / f"confidence/{name}.png"), image[..., 1])
        np.testing.assert_array_equal(read(out / f"entropy/{name}.png"), 255 - image[..., 1])
        array = np.load(out / f"probabilities/{name}.npy", mmap_mode="r")
        assert array.dtype == np.float16
        assert array.shape == (*image.shape[:2], 11)
        np.testing.assert_allclose(array[..., 3], image[..., 1] / 255, atol=1e-3)


def test_results_beside_the_photographs_are_no_photographs(segmenter, photographs):
    options = {"output": str(photographs), "outputs": (*predict.OUTPUTS,)}
    predict.run("x", [str(photographs)], **options)
    assert len(predict.run("x", [str(photographs)], **options, overwrite=True)) == 9
    assert len(predict.run("x", [f"{photographs}/**/*.png"], **options, overwrite=True)) == 9


def test_only_what_is_asked_for_is_written(segmenter, photographs, tmp_path):
    out = tmp_path / "out"
    predict.run("x", [str(photographs / "a/1.png")], output=str(out), outputs=("overlays",))
    assert files_below(out) == ["overlays/1.png", "prediction.json"]


def test_unreadable_images_are_named_and_the_others_keep_their_results(
    segmenter, photographs, tmp_path, capsys
):
    (photographs / "a/0.png").write_bytes(b"no photograph")
    (photographs / "b/1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 of 9 images were left out:\n") as error:
        predict.run("x", [str(photographs)], output=str(tmp_path / "out"))
    assert f"{photographs}/a/0.png: cannot be decoded" in str(error.value)
    assert f"{photographs}/b/1.png: the file is empty" in str(error.value)
    written = files_below(tmp_path / "out/class_maps")
    assert len(written) == 7
    for name in written:
        image = read_image(photographs / name)
        np.testing.assert_array_equal(read(tmp_path / "out/class_maps" / name), classes_of(image))
    assert "9/9 images" in capsys.readouterr().err


def test_few_images_are_in_memory_at_a_time(segmenter, tmp_path, monkeypatch):
    """Read, but not written: at most what is read ahead, held by the segmenter, and being written."""
    for i in range(30):
        write_image(tmp_path / f"in/{i:02d}.png", example(8, 8, seed=i).image)
    lock, counts = threading.Lock(), {"read": 0, "written": 0, "most": 0}

    def counted(function, name):
        def call(*args):
            result = function(*args)
            with lock:
                counts[name] += 1
                counts["most"] = max(counts["most"], counts["read"] - counts["written"])
            return result

        return call

    monkeypatch.setattr(predict, "read_image", counted(predict.read_image, "read"))
    monkeypatch.setattr(predict, "_write", counted(predict._write, "written"))
    predict.run("x", [str(tmp_path / "in")], output=str(tmp_path / "out"))
    assert counts["read"] == counts["written"] == 30
    assert (
        counts["most"]
        <= predict._READS_AHEAD + 1 + segmenter.ahead + 1 + predict._WRITES_BEHIND + 1
    )


@pytest.mark.parametrize("orientation", [3, 6])
def test_results_lie_as_the_photograph_is_shown(segmenter, tmp_path, orientation):
    shown = example(24, 40).image
    write_turned_photograph(tmp_path / "turned.jpg", shown, orientation)
    predict.run("x", [str(tmp_path / "turned.jpg")], output=str(tmp_path / "out"))
    found = read(tmp_path / "out/class_maps/turned.png")
    assert found.shape == (24, 40)
    assert read(tmp_path / "out/overlays/turned.png").shape == (24, 40, 3)
    # A JPEG keeps colors nearly, so a class is missed by one at most where it is near a border.
    assert (found != classes_of(shown)).mean() < 0.5
    assert np.abs(found.astype(int) - classes_of(shown)).mean() < 0.5


def test_a_stopped_run_leaves_whole_files_and_resume_does_the_rest(
    segmenter, photographs, tmp_path, monkeypatch
):
    out, argv = tmp_path / "out", ["x", [str(photographs)]]
    written = []

    def stopping(targets, *args):
        written.append(targets)
        if len(written) == 4:
            raise KeyboardInterrupt
        predict_write(targets, *args)

    predict_write = predict._write
    monkeypatch.setattr(predict, "_write", stopping)
    with pytest.raises(KeyboardInterrupt):
        predict.run(*argv, output=str(out))
    monkeypatch.setattr(predict, "_write", predict_write)
    done = files_below(out / "overlays")
    assert 3 <= len(done) < 9
    (out / "palette" / done[0]).unlink()  # stopped between two files of one image
    before = {name: (out / "overlays" / name).stat().st_mtime_ns for name in done}
    with pytest.raises(FileExistsError, match="--resume to do only the images"):
        predict.run(*argv, output=str(out))
    found = predict.run(*argv, output=str(out), resume=True)
    assert len(found) == 9 - len(done) + 1
    for kind in ("class_maps", "palette", "overlays"):
        assert len(files_below(out / kind)) == 9
    after = {name: (out / "overlays" / name).stat().st_mtime_ns for name in done}
    assert [name for name in done if before[name] != after[name]] == done[:1]
    assert predict.run(*argv, output=str(out), resume=True) == []


def test_results_of_two_checkpoints_or_protocols_are_not_mixed(segmenter, photographs, tmp_path):
    argv, output = ["x", [str(photographs / "a")]], str(tmp_path / "out")
    predict.run(*argv, output=output)
    with pytest.raises(FileExistsError, match=r"prediction.json says"):  # nothing is left to do
        predict.run(*argv, output=output, resume=True, protocol_options={"flip": False})
    assert predict.run(*argv, output=output, resume=True) == []
    argv[1].append(str(photographs / "b/1.png").replace("1.png", "new.png"))
    os.rename(photographs / "b/1.png", argv[1][1])
    options = {"output": output, "resume": True}
    with pytest.raises(
        FileExistsError, match=r'prediction.json says "flip": true, here it is "flip": false:'
    ):
        predict.run(*argv, **options, protocol_options={"flip": False})
    with pytest.raises(FileExistsError, match=r'says "dtype": "float32", here it is "dtype": "bfl'):
        predict.run(*argv, **options, dtype="bfloat16")
    segmenter.description = networks.description()
    segmenter.provenance = Provenance("memory", 7, "other")
    with pytest.raises(FileExistsError, match=r'says "digest": "abc".*choose another --output'):
        predict.run(*argv, **options)
    assert "new.png" not in files_below(tmp_path / "out/class_maps")
    predict.run(*argv, output=output, overwrite=True)
    about = json.loads((tmp_path / "out/prediction.json").read_text())
    assert about["checkpoint"] == {"step": 7, "digest": "other"}
    assert about["protocol"]["name"] == "whole"


def test_a_foreign_legend_is_not_overwritten(segmenter, photographs, tmp_path):
    argv, options = ["x", [str(photographs / "a")]], {"output": str(tmp_path)}
    (tmp_path / "legend.png").write_bytes(b"mine")
    with pytest.raises(FileExistsError, match=r"legend\.png exists without legend\.csv"):
        predict.run(*argv, **options)
    (tmp_path / "legend.csv").write_text("mine\n")
    with pytest.raises(FileExistsError, match=r"legend\.csv says mine, here it is id,name,red"):
        predict.run(*argv, **options)
    assert (tmp_path / "legend.png").read_bytes() == b"mine"
    predict.run(*argv, **options, overwrite=True)
    assert (tmp_path / "legend.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_run_without_results_left_is_in_nobodys_way(segmenter, photographs, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    out = tmp_path / "out"
    with pytest.raises(DataError, match="1 of 1 images were left out"):
        predict.run("x", [str(tmp_path / "broken.png")], output=str(out))
    options = {"output": str(out), "dtype": "bfloat16"}
    predict.run("x", [str(photographs / "a")], **options, outputs=["class_maps"])
    assert json.loads((out / "prediction.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(FileExistsError, match='says "dtype": "bfloat16"'):
        predict.run(
            "x", [str(photographs / "a")], output=str(out), outputs=["overlays"], dtype="float32"
        )
    with pytest.raises(FileExistsError, match="is a file; a folder is wanted"):
        predict.run("x", [str(photographs / "a")], output=str(tmp_path / "broken.png"))


def test_the_legend_is_a_label_set_of_the_class_maps(segmenter, photographs, tmp_path):
    predict.run("x", [str(photographs / "a")], output=str(tmp_path / "out"))
    listed = load_label_set(str(tmp_path / "out/legend.csv"))
    assert listed.names == segmenter.label_set.names
    assert listed.colors == segmenter.label_set.colors
    found = read(tmp_path / "out/class_maps/1.png")
    np.testing.assert_array_equal(listed.from_raw(found), found)


def test_submission_files(segmenter, tmp_path):
    segmenter.__init__("cityscapes")
    image = np.linspace(0, 255, 8 * 19 * 3, dtype=np.uint8).reshape(8, 19, 3)
    write_image(tmp_path / "val/ulm/ulm_000000_000294_leftImg8bit.png", image)
    argv, out = ["x", [str(tmp_path / "val")]], tmp_path / "out"
    predict.run(*argv, output=str(out), outputs=(), submission="cityscapes")
    assert files_below(out) == ["prediction.json", "submission/ulm_000000_000294.png"]
    found = read(out / "submission/ulm_000000_000294.png")
    train_ids = classes_of(image, 19)
    assert len(np.unique(train_ids)) == 19
    np.testing.assert_array_equal(segmenter.label_set.from_raw(found), train_ids)
    segmenter.__init__("camvid")
    with pytest.raises(ValueError, match="needs a checkpoint of label set 'cityscapes'"):
        predict.run(*argv, output=str(tmp_path / "none"), submission="cityscapes")
    assert not (tmp_path / "none").exists()


def test_options_reach_the_segmenter(segmenter, photographs, tmp_path):
    predict.run(
        "x",
        [str(photographs / "a/0.png")],
        output=str(tmp_path / "out"),
        protocol="semseg",
        protocol_options={"crop_size": (33, 41), "flip": False},
        batch_size=3,
        canvas_gib=0.5,
    )
    protocol = segmenter.options.pop("protocol")
    assert (protocol.name, protocol.crop_size, protocol.flip) == ("semseg", (33, 41), False)
    assert segmenter.options == {"batch_size": 3, "canvas_gib": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": ("class_map",)}, "outputs=class_map are not among class_maps, palette"),
        ({"outputs": ("legend",)}, "outputs=legend: nothing of the images"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"canvas_gib": 0.0}, "canvas_gib=0.0 must be above 0"),
        ({"overwrite": True, "resume": True}, "one of them"),
        ({"submission": "cityscapes"}, "takes images of the benchmark"),
    ],
)
def test_impossible_options(photographs, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        predict.run("x", [str(photographs)], output=str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
