"""The verb `prepare`, from the command line to an open source."""

from pathlib import Path

import numpy as np
import pytest

from pspnet_jax import evaluate
from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import validate
from pspnet_jax.main import main

from pictures import write_split
from tiny_config import get_config

BUDGET_SECONDS = 15

CONFIG = str(Path(__file__).parent / "tiny_config.py")


@pytest.fixture
def data(tmp_path):
    for split, num_images in (("train", 3), ("val", 2), ("test", 1)):
        write_split(tmp_path / "data", split, num_images)
    return tmp_path / "data"


def fails(capsys, argv, *, code):
    assert main(["prepare", *argv]) == code
    return capsys.readouterr().err


def open_split(source, root, split):
    config = get_config()
    config.data.update(source=source, root=str(root))
    validate(config)
    return evaluate.open_split(config.data, split=split, label_set=load_label_set("camvid"))


def test_prepares_the_splits_of_the_config(data, tmp_path, capsys):
    argv = [f"--config={CONFIG}", f"--config.data.root={data}", f"--output={tmp_path / 'out'}"]
    assert main(["prepare", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip().endswith(f"prepared: {tmp_path / 'out/prepared/1.0.0'}")
    assert captured.err.startswith("5/5 examples prepared  ")
    for split in ("train", "val"):
        folder, source = (
            open_split("folder", data, split),
            open_split("prepared", tmp_path / "out", split),
        )
        assert len(folder) == len(source)
        np.testing.assert_array_equal(folder[1].image, source[1].image)
    assert main(["prepare", *argv]) == 0
    other = [*argv[:-1], f"--output={tmp_path / 'other'}", "--config.evaluate.split=test"]
    assert main(["prepare", *other]) == 0
    assert len(open_split("prepared", tmp_path / "other", "test")) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output=x"], "--config=FILE is missing"),
        ([f"--config={CONFIG}"], "--output=... is missing"),
        ([f"--config={CONFIG}", "--output=x", "words"], "leftover words: words"),
        (
            [f"--config={CONFIG}", "--output=x", "--config.train.num_steps=3"],
            "prepare does not use --config.train.num_steps: of a config it takes data.*, evaluate.split",
        ),
    ],
)
def test_bad_command_is_explained(capsys, argv, message):
    assert message in fails(capsys, argv, code=2)


def test_faults_of_the_data_are_one_sentence(capsys, data, tmp_path):
    argv = [f"--config={CONFIG}", f"--output={tmp_path / 'out'}"]
    assert "data.root is not set" in fails(capsys, argv, code=1)
    argv.append(f"--config.data.root={data}")
    text = fails(capsys, [*argv, "--config.data.source=scenes"], code=1)
    assert "data.source=scenes: prepare reads folders" in text
    text = fails(capsys, [*argv, "--config.data.val_split=none"], code=1)
    assert "does not hold the split 'none'" in text
    assert not (tmp_path / "out").exists()


def test_interrupted(capsys, data, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("pspnet_jax.data.builders.prepare", interrupted)
    argv = [f"--config={CONFIG}", f"--config.data.root={data}", f"--output={tmp_path / 'out'}"]
    assert "interrupted; the same command starts anew" in fails(capsys, argv, code=130)


def test_help_names_the_options_that_are_used(capsys):
    assert main(["prepare", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "--config.data.*" in printed
    assert "train.num_steps" not in printed
