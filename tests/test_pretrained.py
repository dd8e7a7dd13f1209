"""`init_from`: what is loaded, re-initialized and left out, and what is refused."""

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_convert import FILE, backbone_arrays, published, write

from pspnet_jax import convert, export, stored_model
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.compose import compose
from pspnet_jax.models.families import IMAGENET_8BIT
from pspnet_jax.pretrained import start_from
from pspnet_jax.protocols import choose
from pspnet_jax.stored_model import Description, model_part
from pspnet_jax.train import train
from pspnet_jax.train_step import split_model
from pspnet_jax.trees import flatten
from pspnet_jax.weights import safetensors
from pspnet_jax.weights.names import MisfitError
from pspnet_jax.weights.pytorch import WeightsFileError

from networks import network, options, random
from pictures import write_split
from tiny_config import get_config

BUDGET_SECONDS = 180

CAMVID, VOC = load_label_set("camvid"), load_label_set("voc2012")
TINY = {"backbone": "resnet50", "width": 2}


def start(path, *, label_set=CAMVID, **overrides):
    """Leaves before and after, and the network's number of leaves."""
    model = network(label_set.num_classes, seed=5, **(TINY | overrides))
    _, params, batch_stats = split_model(model)
    new = start_from(str(path), params, batch_stats, model=model.options, label_set=label_set)
    return [flatten(p) | flatten(s) for p, s in ((params, batch_stats), new)]


def changed(before, after):
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


@pytest.fixture(autouse=True)
def shown(caplog):
    caplog.set_level(logging.INFO, "pspnet_jax")
    return caplog


def test_a_published_network_is_loaded_whole(shown):
    before, after = start(FILE)
    assert len(changed(before, after)) == len(before) == 309
    assert "loaded          309 of 309" in shown.text
    assert "re-initialized  0 of 309" in shown.text


def test_a_converted_model_gives_the_same(tmp_path):
    folder = convert.run([str(FILE)], labels="camvid", output=str(tmp_path / "model"))
    assert not changed(start(folder)[1], start(FILE)[1])


def test_another_number_of_classes_leaves_the_classifiers(shown):
    before, after = start(FILE, label_set=VOC)
    kept = {f"{h}.classifier.{x}" for h in ("head", "aux_head") for x in ("bias", "kernel")}
    assert before.keys() - changed(before, after) == kept
    assert "re-initialized  4 of 309: " in shown.text
    assert "left out        4: " in shown.text
    assert "classifiers start anew: 11 classes there, 21 of 'voc2012' here" in shown.text


@pytest.mark.parametrize("in_one_file", [False, True])
def test_other_classes_of_the_same_number_leave_them_too(in_one_file, tmp_path, shown):
    other = load_label_set("camvid")
    object.__setattr__(other, "names", tuple(reversed(other.names)))
    object.__setattr__(other, "name", "mine")
    description = Description(options(**TINY), other, IMAGENET_8BIT, choose("whole", other))
    _, params, batch_stats = split_model(network(11, **TINY))
    with CheckpointFolder(tmp_path / "checkpoints") as folder:
        folder.save(3, {"model": model_part(description, params, batch_stats)}, mean_iou=None)
    source = tmp_path
    if in_one_file:
        source = tmp_path / "model.safetensors"
        stored_model.write_file(stored_model.read(tmp_path, step="best"), source)
    before, after = start(source)
    assert "head.classifier.bias" not in changed(before, after)
    assert "11 classes of 'mine' there, 11 of 'camvid' here" in shown.text


@pytest.mark.parametrize("is_converted", [False, True])
def test_a_backbone_leaves_the_heads(is_converted, tmp_path, shown):
    path = write(tmp_path / "resnet50_v2.safetensors", backbone_arrays())
    if is_converted:
        path = convert.run([path], output=str(tmp_path / "backbone")).parent
    before, after = start(path)
    assert changed(before, after) == {name for name in before if name.startswith("backbone.")}
    assert "loaded          275 of 309: backbone.*" in shown.text
    assert "re-initialized  34 of 309: aux_head.*, head.*, pyramid.*" in shown.text
    left_out = "0" if is_converted else "2: fc.bias, fc.weight"
    assert f"left out        {left_out}" in shown.text


def test_the_stem_of_torchvision_does_not_fit_the_deep_one(tmp_path):
    path = write(tmp_path / "resnet50.safetensors", backbone_arrays(stem="7x7", old=True))
    with pytest.raises(
        MisfitError, match=r"stem is 7x7, the network's deep.*--config.model.stem=7x7"
    ):
        start(path)
    before, after = start(path, stem="7x7")
    assert len(changed(before, after)) == 265


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"backbone": "resnet101"}, r"layer3.10.conv1.weight is missing"),
        (
            {"backbone": "resnet18", "stem": "7x7"},
            r"\(3, 4, 6, 3\) blocks of 3 convolutions, the network's \(2, 2, 2, 2\) of 2: another backbone or depth",
        ),
        ({"width": 4}, r"aux.1.bias is \[8\], the network has \[16\](.|\n)*another width"),
        ({"pyramid_bins": ()}, r"ppm.features.0.1.weight is not known"),
    ],
)
def test_another_network_is_refused_by_name(overrides, message):
    with pytest.raises(MisfitError, match=message):
        start(FILE, **overrides)


def test_a_head_that_misses_a_key_is_no_backbone(tmp_path):
    arrays = published()
    del arrays["cls.1.weight"]
    with pytest.raises(MisfitError, match=r"cls.1.weight is missing"):
        start(write(tmp_path / "w.safetensors", arrays))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a | {"cls.4.weight": a["cls.4.weight"].swapaxes(0, 1)},
        lambda a: a | {"cls.4.weight": a["cls.4.weight"][:, :7]},
        lambda a: a | {"cls.4.weight": a["cls.4.weight"][:7]},
        lambda a: {k: v for k, v in a.items() if k != "cls.4.weight"},
    ],
)
def test_a_broken_classifier_of_the_same_number_is_refused(spoil, tmp_path):
    path = write(tmp_path / "w.safetensors", spoil(published()))
    with pytest.raises(MisfitError, match=r"cls\.4\.weight is"):
        start(path)


def logits(model, *arrays):
    arrays = jax.tree.map(jnp.asarray, arrays)
    images = random(1, 33, 41, 3)
    return np.asarray(nnx.merge(nnx.graphdef(model), *arrays)(images, train=False).logits)


def as_run(model, folder):
    _, *arrays = split_model(model)
    described = Description(model.options, CAMVID, IMAGENET_8BIT, choose("whole", CAMVID))
    with CheckpointFolder(folder / "checkpoints") as checkpoints:
        checkpoints.save(3, {"model": model_part(described, *arrays)}, mean_iou=None)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "through"),
    [
        *(("semseg", "run"), ("semseg", "exported")),  # a published one is as the network is told
        *(("caffe", "run"), ("caffe", "exported"), ("caffe", "published")),
    ],
)
def test_the_same_network_in_another_order_computes_the_same(family, through, tmp_path, shown):
    """Of the same options but for the order of the pyramid; files of other projects only number the levels."""
    there = network(11, seed=3, **TINY)
    wanted = TINY | {"family": family, "pyramid_bins": (6, 3, 2, 1), "bottleneck_stride": "3x3"}
    if through != "published":
        wanted |= {"pyramid_map_first": False}
    source = as_run(there, tmp_path / "run")
    if through != "run":
        target = tmp_path / "x.safetensors"
        export.run(source, format="safetensors", output=str(target))
        arrays, metadata = safetensors.read(target)
        if through == "published":
            del metadata["options"]
        safetensors.write(target, arrays, metadata)
        source = str(target)
    here = network(11, seed=4, **wanted)
    _, *arrays = split_model(here)
    new = start_from(source, *arrays, model=here.options, label_set=CAMVID)
    _, *arrays = split_model(there)
    np.testing.assert_allclose(logits(here, *new), logits(there, *arrays), rtol=1e-4, atol=1e-5)
    assert ("weights of the family 'semseg'" in shown.text) == (family == "caffe")
    assert "trained with" not in shown.text


def test_other_options_of_the_weights_are_told(tmp_path, shown):
    there = network(11, **TINY, align_corners=False, output_stride=16)
    start(as_run(there, tmp_path))
    assert (
        "trained with    align_corners=False (here True), output_stride=16 (here 8)" in shown.text
    )


@pytest.mark.parametrize(
    "told", ["[1]", "{", '{"colors": 3}', '{"pyramid_bins": [1, "2"]}', '{"align_corners": 1}']
)
def test_metadata_that_tell_no_options_are_refused(told, tmp_path):
    path = tmp_path / "w.safetensors"
    safetensors.write(path, published(), {"format": "pt", "options": told})
    with pytest.raises(WeightsFileError, match=r"w\.safetensors: its metadata"):
        start(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        start(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        start(tmp_path)


def test_a_run_starts_from_weights_and_resumes_without_them(tmp_path, shown):
    write_split(tmp_path, "train", 2)
    write_split(tmp_path, "val", 1)
    _, params, batch_stats = split_model(network(11, seed=9))
    weights = tmp_path / "weights.safetensors"
    arrays = {k: np.asarray(v) for k, v in (flatten(params) | flatten(batch_stats)).items()}
    safetensors.write(weights, arrays, {"format": "pspnet_jax"})
    config = get_config()
    config.data.root = str(tmp_path)
    config.init_from = str(weights)
    config.train.num_steps = 1
    state = compose(config, tmp_path / "run").resume_or_start()
    np.testing.assert_array_equal(
        flatten(state.params)["head.conv.kernel"], arrays["head.conv.kernel"]
    )
    assert int(state.step) == 0
    train(config, tmp_path / "run")
    weights.unlink()
    assert int(compose(config, tmp_path / "run").resume_or_start().step) == 1
    assert f'"init_from": "{weights}"' in (tmp_path / "run/config.json").read_text()
    assert Path(tmp_path / "run/log.txt").read_text().count("not read again") == 1
