"""Every config file makes a valid run; its docstring says what a reader wants to know."""

import ast
import importlib.util
from pathlib import Path

import pytest

from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import validate
from pspnet_jax.models.pspnet import FAMILIES, ModelOptions, check_size

BUDGET_SECONDS = 20

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def read(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_makes_a_valid_network(path):
    config = read(path)
    validate(config)
    label_set = load_label_set(config.data.labels)
    options = ModelOptions.resolve(config.model.to_dict())
    check_size(config.data.crop_size or label_set.crop_size, FAMILIES[options.family])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_holds_the_command(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python -m pspnet_jax.main --config=configs/{path.name}" in text
    assert len(path.read_text().splitlines()) <= 60


def test_ade20k_is_the_authors_recipe():
    config = read(CONFIGS[0].parent / "ade20k.py")
    options = ModelOptions.resolve(config.model.to_dict())
    assert (options.backbone, options.stem, options.first_block_dilation) == (
        "resnet50",
        "deep",
        (2, 4),
    )
    assert options.pyramid_bins == (1, 2, 3, 6)
    assert load_label_set(config.data.labels).crop_size == (473, 473)
    optimizer, train = config.optimizer, config.train
    assert (optimizer.learning_rate, optimizer.power, optimizer.momentum) == (0.01, 0.9, 0.9)
    assert (optimizer.weight_decay, optimizer.head_multiplier) == (1e-4, 10.0)
    assert config.loss.aux_weight == 0.4
    assert (train.global_batch_size, train.num_steps) == (16, 126_300)
    assert train.num_steps == 100 * (20_210 // 16)
