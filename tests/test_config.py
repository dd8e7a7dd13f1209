"""The options page: locked, validated, and the same after JSON."""

import re

import pytest

from pspnet_jax.config import (
    _CONSTRAINTS,
    default_config,
    from_json,
    load,
    option_lines,
    option_names,
    to_json,
    validate,
)

BUDGET_SECONDS = 10


def config_named(**overrides):
    config = default_config()
    config.name = "test"
    for name, value in overrides.items():
        section, key = name.split("__")
        config[section][key] = value
    return config


def test_defaults_are_valid():
    validate(config_named())


def test_every_constraint_names_an_option():
    assert set(_CONSTRAINTS) <= set(option_names())


def test_misspelt_option_is_refused_by_a_config_file():
    with pytest.raises((AttributeError, KeyError), match="learning_rate"):
        default_config().optimizer.learnig_rate = 0.1


def test_all_faults_are_listed_at_once():
    config = config_named(
        optimizer__momentum=1.5, train__num_steps=0, data__crop_size=(473,), augment__scale_min=3.0
    )
    config.augment.scale_max = 2.0
    with pytest.raises(ValueError, match="faults") as caught:
        validate(config)
    for text in (
        "optimizer.momentum=1.5 must be within 0..1",
        "train.num_steps=0 must be at least 1",
        "data.crop_size=(473,) must be two whole numbers",
        "scale_min must not be above",
    ):
        assert text in str(caught.value)


def test_name_must_be_a_folder():
    config = config_named()
    config.name = "a/b"
    with pytest.raises(ValueError, match="name='a/b' must be the name of a folder"):
        validate(config)


def test_json_round_trip_keeps_tuples_and_unset_options():
    config = config_named(model__pyramid_bins=(), data__crop_size=(33, 41))
    again = from_json(to_json(config))
    assert again.to_dict() == config.to_dict()
    assert again.model.pyramid_bins == ()
    assert again.data.crop_size == (33, 41)
    assert again.model.stem is None


def test_a_minimum_that_cannot_be_is_refused():
    config = default_config()
    config.name = "run"
    config.optimizer.minimum_learning_rate = 1.0
    with pytest.raises(ValueError, match="minimum_learning_rate must not be above"):
        validate(config)
    config.optimizer.minimum_learning_rate = 1e-4
    validate(config)
    config.optimizer.schedule = "multistep"
    with pytest.raises(ValueError, match="does nothing with schedule=multistep"):
        validate(config)


def test_config_file_is_read(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from pspnet_jax.config import default_config\n\n\n"
        "def get_config():\n    config = default_config()\n    config.name = 'mine'\n    return config\n"
    )
    assert load(path).name == "mine"
    with pytest.raises(FileNotFoundError, match=r"mine\.txt: there is no such file"):
        load(path.with_suffix(".txt"))
    path.rename(path.with_suffix(".txt"))
    with pytest.raises(ValueError, match=r"mine\.txt is no Python file"):
        load(path.with_suffix(".txt"))


def test_help_says_what_stands_beside_or_above_an_option():
    lines = {line.split(" = ")[0]: line for line in option_lines()}
    assert sorted(lines) == sorted(option_names())
    assert [*lines][:5] == ["name", "init_from", "seed", "data.source", "data.layout"]
    assert re.fullmatch(
        r"seed = 0 +of initialization, order of images, augmentation, dropout; .*", lines["seed"]
    )
    assert re.fullmatch(
        r"data.layout = ade20k +of a folder: ade20k .* voc2012", lines["data.layout"]
    )
    assert re.search("or a CSV file id,name,red", lines["data.labels"])  # two lines above it
    comments = [re.split(r" = \S.*?  +", line) for line in option_lines()]
    assert all(len(parts) == 2 and parts[1] for parts in comments)
    assert lines["train.num_steps"].endswith("optimizer steps")
