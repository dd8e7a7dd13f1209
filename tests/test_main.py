"""The command line: every verb on tiny data, and what a bad command says."""

import json
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import pspnet_jax
from pspnet_jax.catalog import load_label_set
from pspnet_jax.main import main

from pictures import example, write_image

BUDGET_SECONDS = 120

CONFIG = str(Path(__file__).parent / "tiny_config.py")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of two steps, made by the command line."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    code = main(
        [
            f"--config={CONFIG}",
            f"--workdir={workdir}",
            f"--config.data.root={data}",
            "--config.train.num_steps=2",
        ]
    )
    assert code == 0
    return workdir


def fails(capsys, argv, *, code):
    assert main(argv) == code
    return capsys.readouterr().err


def test_train_says_where_report_and_picture_are(run, data, capsys):
    argv = [f"--config={CONFIG}", f"--workdir={run}", f"--config.data.root={data}"]
    assert main(["train", *argv, "--config.train.num_steps=2"]) == 0
    printed = capsys.readouterr().out
    folder = run / "evaluation" / "00000002-val-whole"
    assert f"tables: {folder / 'report.md'}" in printed
    assert f"picture: {folder / 'panels' / 'overview.png'}" in printed
    assert (folder / "panels" / "overview.png").is_file()


def test_evaluate_uses_the_runs_own_data(run):
    before = json.loads((run / "evaluation/00000002-val-whole/report.json").read_text())
    assert main(["evaluate", f"--checkpoint={run}"]) == 0
    after = json.loads((run / "evaluation/00000002-val-whole/report.json").read_text())
    assert {**after, "seconds": 0} == {**before, "seconds": 0, "checkpoint": after["checkpoint"]}
    assert after["checkpoint"]["digest"] == before["checkpoint"]["digest"]


def test_evaluate_takes_options(run, data, tmp_path, capsys):
    argv = [f"--checkpoint={run}", f"--config={CONFIG}", f"--config.data.root={data}"]
    argv += ["--split=train", "--noflip", "--step=latest"]
    assert main(["evaluate", *argv]) == 0
    assert (run / "evaluation/00000002-train-whole-noflip/report.json").is_file()
    capsys.readouterr()
    assert main(["evaluate", *argv, f"--output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for line in (
        "report: {}/report.html",
        "tables: {}/report.md",
        "picture: {}/panels/overview.png",
    ):
        assert line.format(tmp_path) in printed
    report = json.loads((tmp_path / "report.json").read_text())
    where = {"source": "folder", "layout": "camvid", "root": str(data)}
    where["labels_digest"] = load_label_set("camvid").digest
    assert report["data"] == {"labels": "camvid", "split": "train", "num_images": 5, **where}
    assert report["protocol"]["flip"] is False


def test_a_report_is_not_replaced_by_that_of_another_evaluation(run, data, tmp_path, capsys):
    argv = ["evaluate", f"--checkpoint={run}", "--noflip", f"--output={tmp_path / 'out'}"]
    assert main(argv) == 0
    assert main(argv) == 0  # the same again
    before = (tmp_path / "out" / "report.json").read_text()
    shutil.copytree(data, tmp_path / "elsewhere")
    other = [f"--config={CONFIG}", f"--config.data.root={tmp_path / 'elsewhere'}"]
    for changed, said in (
        (["--flip"], "its protocol's flip is False, here it is True"),
        (["--split=train"], "its data's split is val, here it is train"),
        (other, f"its data's root is {data}, here it is {tmp_path / 'elsewhere'}"),
    ):
        assert main([*argv, *changed]) == 1
        assert said in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_text() == before


def test_masks_that_are_read_otherwise_are_another_evaluation(data, tmp_path, capsys):
    """Also by a label set of the same name; and a folder is the same, however it is written."""
    camvid = load_label_set("camvid")

    def write_labels(order):
        rows = [f"{i},{camvid.names[i]},{i},0,0,{raw}" for i, raw in enumerate(order)]
        text = "\n".join(["id,name,red,green,blue,raw_ids", *rows, "255,void,,,,11"])
        (tmp_path / "mine.csv").write_text(text)

    write_labels(range(11))
    labels = f"--config.data.labels={tmp_path / 'mine.csv'}"
    workdir = tmp_path / "run"
    train = [f"--config={CONFIG}", f"--workdir={workdir}", f"--config.data.root={data}", labels]
    assert main([*train, "--config.train.num_steps=1"]) == 0
    argv = ["evaluate", f"--checkpoint={workdir}", f"--config={CONFIG}", labels]
    assert main([*argv, f"--config.data.root={data}/../{data.name}"]) == 0
    write_labels([1, 0, *range(2, 11)])
    assert "its data's labels_digest is" in fails(
        capsys, [*argv, f"--config.data.root={data}"], code=1
    )
    (tmp_path / "mine.csv").unlink()
    # Without --config options change the config of the run, whose checkpoint knows its label set.
    elsewhere = shutil.copytree(data, tmp_path / "elsewhere")
    argv = ["evaluate", f"--checkpoint={workdir}", f"--config.data.root={elsewhere}"]
    assert main([*argv, f"--output={tmp_path / 'out'}"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["data"]["root"] == str(elsewhere)
    assert "did you mean 'data.root'?" in fails(capsys, [*argv, "--config.data.rot=x"], code=2)
    # The last --checkpoint counts, for the data as for the weights.
    first = [argv[0], "--checkpoint=elsewhere", "-checkpoint", str(workdir), *argv[2:]]
    assert main([*first, f"--output={tmp_path / 'out'}"]) == 0
    (workdir / "config.json").write_text("{")
    assert "config.json: Expecting property name" in fails(capsys, argv, code=2)


def test_an_empty_output_is_missing(run, capsys):
    assert main(["predict", f"--checkpoint={run}", "--output=", "x.jpg"]) == 2
    assert "--output=... is missing" in capsys.readouterr().err


def test_predict_writes_class_maps_palettes_and_overlays(run, data, tmp_path):
    extra = tmp_path / "photo.png"
    write_image(extra, example(37, 61).image)
    images = str(data / "images/val")
    argv = ["predict", f"--checkpoint={run}", f"--output={tmp_path / 'out'}", images, str(extra)]
    assert main(argv) == 0
    names = {"photo.png", *(f"val_{i:04d}.png" for i in range(3))}
    for kind in ("class_maps", "palette", "overlays"):
        assert {path.name for path in (tmp_path / "out" / kind).iterdir()} == names
    found = cv2.imread(str(tmp_path / "out/class_maps/photo.png"), cv2.IMREAD_UNCHANGED)
    segmenter = pspnet_jax.load(run)
    np.testing.assert_array_equal(found, segmenter.class_map(example(37, 61).image))
    colors = cv2.imread(str(tmp_path / "out/palette/photo.png"))[..., ::-1]
    np.testing.assert_array_equal(colors, segmenter.label_set.palette[found])


def test_predict_takes_the_options_of_protocols_and_more_outputs(run, tmp_path):
    image = example(37, 61).image
    write_image(tmp_path / "photo.png", image)
    argv = ["predict", f"--checkpoint={run}", f"--output={tmp_path / 'out'}"]
    argv += ["--noflip", "--confidence", "--entropy", "--probabilities", "--outputs=class_maps"]
    assert main([*argv, str(tmp_path / "*.png")]) == 0
    kinds = {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()}
    assert kinds == {"class_maps", "confidence", "entropy", "probabilities"}
    expected = np.asarray(pspnet_jax.load(run).probabilities(image, flip=False))
    found = np.load(tmp_path / "out/probabilities/photo.npy")
    np.testing.assert_allclose(found, expected, atol=1e-3)
    confidence = cv2.imread(str(tmp_path / "out/confidence/photo.png"), cv2.IMREAD_UNCHANGED)
    np.testing.assert_allclose(confidence / 255, expected.max(-1), atol=0.003)
    entropy = cv2.imread(str(tmp_path / "out/entropy/photo.png"), cv2.IMREAD_UNCHANGED)
    exact = -(expected * np.log(expected)).sum(-1) / np.log(11)
    np.testing.assert_allclose(entropy / 255, exact, atol=0.003)


def test_predict_overwrites_only_when_told(run, data, tmp_path, capsys):
    argv = ["predict", f"--checkpoint={run}", f"--output={tmp_path}", str(data / "images/val")]
    assert main(argv) == 0
    assert "--overwrite" in fails(capsys, argv, code=1)
    assert main([*argv, "--overwrite"]) == 0
    assert main([*argv, "--resume"]) == 0
    assert "3 of 3 images have their results" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.train.num_steps=3"], "--config=FILE is missing"),
        (
            [f"--config={CONFIG}", "--config.optimizer.learnig_rate=1"],
            "did you mean 'optimizer.lea",
        ),
        ([f"--config={CONFIG}", "--config.evaluate.flip", "false"], "leftover words: false"),
        ([f"--config={CONFIG}", "--config.train.num_steps=1.5"], "num_steps"),
        ([f"--config={CONFIG}", "--wrkdir=x"], "wrkdir"),
        (["evaluate", "--output=x"], "--checkpoint=... is missing"),
        (["evaluate", "--overwrite", "--checkpoint=x"], "overwrite"),
        (["predict", "--checkpoint=x", "a.jpg"], "--output=... is missing"),
        (["predict", "--checkpoint=x", "--output=y", "--scales=a"], "--scales=a must be numbers"),
        (["predict", "--checkpoint=x", "--output=y", "--max_size=a"], "max_size"),
        (
            ["evaluate", "--checkpoint=x", f"--config={CONFIG}", "--config.evaluate.flip=False"],
            "evaluate does not use --config.evaluate.flip",
        ),
        (["evaluate", "--checkpoint=x", "--crop_size=a"], "--crop_size=a must be numbers"),
        (["export", "--checkpoint=x", "--output=y"], "--format=... is missing"),
        (["convert", "weights.pth"], "--output=... is missing"),
        (["evalute"], "unknown verb 'evalute' (did you mean 'evaluate'?)"),
        (["--config", "nowhere.py"], "--config=nowhere.py: there is no such file"),
        (["--config=nowhere.py"], "--config=nowhere.py: there is no such file"),
    ],
)
def test_bad_command_is_explained(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"")
    assert message in fails(capsys, argv, code=2)


def test_faults_of_data_and_checkpoints_are_one_sentence(capsys, tmp_path, run):
    argv = [f"--config={CONFIG}", f"--workdir={tmp_path / 'run'}"]
    assert "data.root is not set" in fails(capsys, argv, code=1)
    text = fails(capsys, ["evaluate", f"--checkpoint={tmp_path}"], code=1)
    assert "holds no checkpoint" in text
    argv = ["predict", f"--checkpoint={run}", f"--output={tmp_path}"]
    assert "no such image or folder" in fails(capsys, [*argv, "none.jpg"], code=1)
    assert "no images" in fails(capsys, argv, code=1)
    (tmp_path / "empty").mkdir()
    assert "no images" in fails(capsys, [*argv, str(tmp_path / "empty")], code=1)


def test_predict_leaves_out_what_it_cannot_read_and_says_so(capsys, tmp_path, run):
    write_image(tmp_path / "in/good.png", example().image)
    (tmp_path / "in/bad.jpg").write_bytes(b"no photograph")
    argv = ["predict", f"--checkpoint={run}", f"--output={tmp_path / 'out'}", str(tmp_path / "in")]
    assert "1 of 2 images were left out" in fails(capsys, argv, code=1)
    assert (tmp_path / "out/class_maps/good.png").is_file()


def test_two_images_of_one_name_are_not_mixed_up(capsys, tmp_path, run):
    for folder in ("a", "b"):
        write_image(tmp_path / folder / "same.png", example().image)
    argv = ["predict", f"--checkpoint={run}", f"--output={tmp_path / 'out'}"]
    text = fails(capsys, [*argv, str(tmp_path / "a"), str(tmp_path / "b")], code=1)
    assert "would be written to the same file" in text
    assert "keeps subfolders apart" in text
    assert not (tmp_path / "out").exists()
    write_image(tmp_path / "a/same.jpg", example().image)
    assert "; rename one, or" in fails(capsys, [*argv, str(tmp_path / "a")], code=1)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pspnet_jax {pspnet_jax.__version__}\n"


def test_home_is_expanded_behind_an_equals_sign(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = [f"--config={CONFIG}", "--config.data.root=~/photos"]
    assert main(["check", *argv]) == 1
    assert str(tmp_path / "photos") in "".join(capsys.readouterr())
    assert str(tmp_path / "run") in fails(capsys, ["evaluate", *argv, "--checkpoint=~/run"], code=1)


def test_of_an_option_that_is_given_twice_the_last_one_counts(capsys, tmp_path):
    argv = ["check", f"--config={CONFIG}", f"--config.data.root={tmp_path}"]
    argv += ["--config.model.pyramid_bins=1,2", "--config.data.crop_size", "1,1,1"]
    argv += ["--config.data.crop_size=33,33", "--config.model.pyramid_bins=0,6"]
    text = fails(capsys, argv, code=1)
    assert "model.pyramid_bins=(0, 6) must be" in text
    assert "crop_size" not in text


def test_a_config_file_may_end_in_config(capsys, tmp_path):
    (tmp_path / "my-config.py").write_text(Path(CONFIG).read_text())
    text = fails(capsys, [f"--config={tmp_path / 'my-config.py'}", "--foo=1"], code=2)
    assert "Unknown command line flag 'foo'" in text


def test_options_of_the_config_as_two_words_or_with_one_dash(capsys, run, data):
    argv = ["evaluate", f"--checkpoint={run}", f"--config={CONFIG}", f"--config.data.root={data}"]
    assert main([*argv, "--config.evaluate.split", "val"]) == 0
    text = fails(capsys, [*argv, "-config.train.num_steps=77"], code=2)
    assert (
        "evaluate does not use --config.train.num_steps: of a config it takes data.*, eval" in text
    )


def test_evaluating_on_another_label_set_is_refused(capsys, tmp_path, run):
    other = tmp_path / "config.py"
    other.write_text(
        "from pspnet_jax.config import default_config\n"
        "def get_config():\n    config = default_config()\n    config.name = 'x'\n    return config\n"
    )
    argv = ["evaluate", f"--checkpoint={run}", f"--config={other}"]
    assert "data.labels=ade20k has 150 classes" in fails(capsys, argv, code=1)


def test_what_is_no_config_file(capsys, tmp_path):
    for text, message in (("x = 1", "has no function get_config()"), ("def (", "invalid syntax")):
        (tmp_path / "mine.py").write_text(text)
        sys.modules.pop("config_config", None)  # of another test
        assert message in fails(capsys, [f"--config={tmp_path / 'mine.py'}"], code=2)


@pytest.mark.parametrize("mistake", ["config.train.num_stpes = 3", "config.train['num_stpes'] = 3"])
def test_a_misspelt_option_in_a_config_file_is_a_sentence(capsys, tmp_path, mistake):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pspnet_jax.config import default_config\n"
        f"def get_config():\n    config = default_config()\n    {mistake}\n    return config\n"
    )
    text = fails(capsys, [f"--config={path}"], code=2)
    assert text.startswith('error: Key "num_stpes" does not exist')
    assert "\\" not in text


def test_help(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for verb in ("train", "evaluate", "predict"):
        assert verb in overview
        assert main([verb, "--help"]) == 0
    assert "--config.NAME=VALUE" in capsys.readouterr().out


def test_a_finished_run_says_so(capsys, data, run):
    argv = [f"--config={CONFIG}", f"--workdir={run}", f"--config.data.root={data}"]
    assert main([*argv, "--config.train.num_steps=2"]) == 0
    text = "".join(capsys.readouterr())
    assert "all 2 steps are done" in text
    assert "compiles" not in text
