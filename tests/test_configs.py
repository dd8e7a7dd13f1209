"""Every config file makes a valid run; its docstring says what a reader wants to know."""

import ast
from pathlib import Path

import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import load, validate
from pspnet_jax.data import transforms
from pspnet_jax.models.families import FAMILIES, ModelOptions, check_size

BUDGET_SECONDS = 20

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_a_valid_network(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where folder_resnet50 looks for mine.csv
    rows = ["id,name,red,green,blue,raw_ids", "0,ground,120,100,80,0", "1,house,200,60,60,1"]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    config = load(path)
    validate(config)
    label_set = load_label_set(config.data.labels)
    options = ModelOptions.resolve(config.model.to_dict())
    transforms.resolve(config.augment.to_dict())
    check_size(config.data.crop_size or label_set.crop_size, options.size_rule)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_holds_the_command(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python -m pspnet_jax.main --config=configs/{path.name}" in text
    assert len(path.read_text().splitlines()) <= 60


# Epochs and training images; the authors' PyTorch mIoU at one scale and at several, hours; the paper's.
AUTHORS = {
    ("ade20k", 50): (100, 20_210, "41.89 42.84 14_h 41.68 42.78"),
    ("ade20k", 101): (100, 20_210, "43.10 44.15 20_h 41.96 43.29"),
    ("voc2012", 50): (50, 10_582, "77.05 78.02 3.3_h 82.6 85.4"),
    ("voc2012", 101): (50, 10_582, "79.07 79.63 5_h 82.6 85.4"),
    ("cityscapes", 50): (200, 2_975, "77.30 78.38 7_h 78.4 80.2"),
    ("cityscapes", 101): (200, 2_975, "78.63 79.29 10_h 78.4 80.2"),
}


def path_of(data, depth):
    return CONFIGS[0].parent / (
        "ade20k.py" if (data, depth) == ("ade20k", 50) else f"{data}_resnet{depth}.py"
    )


@pytest.mark.parametrize(("data", "depth"), AUTHORS)
def test_it_is_the_authors_recipe(data, depth):
    num_epochs, num_images, _ = AUTHORS[data, depth]
    config = load(path_of(data, depth))
    assert config.name == f"{data}_resnet{depth}"
    assert (config.data.layout, config.data.labels) == (data, data)
    options = ModelOptions.resolve(config.model.to_dict())
    assert (options.backbone, options.stem, options.first_block_dilation) == (
        f"resnet{depth}",
        "deep",
        (2, 4),
    )
    assert options.pyramid_bins == (1, 2, 3, 6)
    label_set = load_label_set(config.data.labels)
    crop_size = config.data.crop_size or label_set.crop_size
    large = data == "cityscapes"
    assert (crop_size, label_set.base_size) == (((713, 713), 2048) if large else ((473, 473), 512))
    augment = transforms.resolve(config.augment.to_dict())
    assert augment.pop("recipe") == "semseg"
    assert list(augment.values()) == [0.5, 2.0, 10.0, 0.5, 0.5, 0.5]
    optimizer, train = config.optimizer, config.train
    assert (optimizer.learning_rate, optimizer.power, optimizer.momentum) == (0.01, 0.9, 0.9)
    assert (optimizer.weight_decay, optimizer.head_multiplier) == (1e-4, 10.0)
    assert config.loss.aux_weight is None  # the family's
    assert FAMILIES[config.model.family].aux_weight == 0.4
    assert train.global_batch_size == 16
    assert train.num_steps == num_epochs * (num_images // 16)
    assert config.evaluate.protocol == "semseg"


@pytest.mark.parametrize(("data", "depth"), AUTHORS)
def test_docstring_names_the_target_and_what_it_takes(data, depth):
    text = ast.get_docstring(ast.parse(path_of(data, depth).read_text()))
    num_epochs, num_images, figures = AUTHORS[data, depth]
    assert not [f for f in figures.split() if f.replace("_", " ") not in text]
    assert "was not reproduced here" in text
    assert "--config.data.root=DIR" in text
    assert f"--config.init_from=initmodel/resnet{depth}_v2.pth" in text
    assert f"{num_images:,}" in text
    assert f"{num_epochs} epochs" in text
    assert f"{num_epochs * (num_images // 16):,} steps" in text


def test_every_promised_config_is_there():
    names = {path.stem for path in CONFIGS}
    ade20k = {f"ade20k_resnet{depth}" for depth in (18, 101, 152, 269)}
    others = {"camvid_resnet18", "camvid_resnet50", "folder_resnet50"}
    others |= {"ade20k_resnet50_mmseg", "ade20k_resnet50_caffe"}
    assert ade20k | others | {"ade20k", "scenes", "lextal_resnet34"} <= names


# These start from random weights and were trained here, or are to be.
FROM_NOTHING = {"scenes", "camvid_resnet18", "lextal_resnet34"}


@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.stem not in FROM_NOTHING],
    ids=lambda path: path.stem,
)
def test_docstring_says_what_to_expect_and_on_what(path):
    text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
    assert "--config.init_from=" in text
    assert "not reproduced here" in text or "not trained here" in text or "nothing is pub" in text
    assert "GPU" in text or "RTX" in text


def test_the_recipe_of_mmsegmentation():
    config = load(CONFIGS[0].parent / "ade20k_resnet50_mmseg.py")
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.minimum_learning_rate) == (0.01, 1e-4)
    assert (optimizer.weight_decay, optimizer.momentum, optimizer.power) == (5e-4, 0.9, 0.9)
    assert (optimizer.head_multiplier, config.train.global_batch_size) == (1.0, 16)
    assert (config.train.num_steps, config.loss.normalizer) == (80_000, "all")
    augment = transforms.resolve(config.augment.to_dict())
    assert augment["base_size"] == (2048, 512)
    assert augment["class_share_max"] == 0.75
    assert (config.model.family, config.data.crop_size) == ("mmseg", (512, 512))


def test_the_recipe_of_the_paper():
    config = load(CONFIGS[0].parent / "ade20k_resnet50_caffe.py")
    options = ModelOptions.resolve(config.model.to_dict())
    assert (options.bottleneck_stride, options.dropout_kind) == ("1x1", "element")
    assert (config.loss.resolution, config.optimizer.decay_norm_and_bias) == ("eighth", False)
    assert (config.train.num_steps, config.train.global_batch_size) == (150_000, 16)
    assert config.evaluate.protocol == "caffe"
