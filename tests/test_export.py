"""Exported functions: what is reloaded without this package gives the segmenter's logits, at any size."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

import pspnet_jax
from pspnet_jax import export
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.main import main
from pspnet_jax.models.families import IMAGENET_8BIT
from pspnet_jax.parallel import make_mesh
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.stored_model import StoredModel, model_part
from pspnet_jax.train_step import split_model

from networks import description, network

BUDGET_SECONDS = 150

README = Path(__file__).parent.parent / "README.md"
CAMVID = load_label_set("camvid")
SIZES = [(1, 33, 41), (3, 64, 50), (2, 1, 57)]


def stored_model(num_classes=CAMVID.num_classes, **overrides) -> StoredModel:
    described = description(**overrides)
    _, params, batch_stats = split_model(network(num_classes, **overrides))
    part = model_part(described, params, batch_stats)
    return StoredModel(described, jax.tree.map(_on_host, part), 7, "digest")


def segmenter_of(stored: StoredModel) -> Segmenter:
    part = stored.part
    return Segmenter(
        stored.description,
        part["params"],
        part["batch_stats"],
        provenance=Provenance("", stored.step, ""),
        mesh=make_mesh(jax.devices()[:1]),  # one image on eight devices is eight times the work
    )


def images_of(*shape):
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def reloaded(stored: StoredModel, platforms=("cpu",)) -> jax.export.Exported:
    return jax.export.deserialize(export.exported_function(stored, platforms=platforms).serialize())


def assert_equal_logits(found, wanted, *, relative=1e-5):
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.dtype == np.float32
    assert found.shape == wanted.shape
    largest = np.abs(wanted).max()
    assert largest > 0.05
    assert np.abs(found - wanted).max() <= relative * largest


def _on_host(leaf):
    return leaf if isinstance(leaf, str) else np.asarray(leaf)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    stored = stored_model()
    with CheckpointFolder(path / "checkpoints") as folder:
        folder.save(20, {"model": stored.part}, mean_iou=0.5)
    return path


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """What the command that stands in the README writes."""
    target = tmp_path_factory.mktemp("exported") / "scenes.stablehlo"
    argv = ["export", f"--checkpoint={run}", "--format=stablehlo", f"--output={target}"]
    assert main(argv) == 0
    return target


def test_the_readme_lines_give_the_logits_in_a_process_without_this_package(run, exported):
    """Images of three sizes, in batches of one to three, through the lines as they stand."""
    (lines,) = re.findall(r"```python\n([^`]*jax\.export\.deserialize[^`]*)```", README.read_text())
    folder = exported.parent
    for i, shape in enumerate(SIZES):
        np.save(folder / f"images{i}.npy", images_of(*shape))
    program = (
        f"import sys\nimport numpy as np\nfor i in range({len(SIZES)}):\n"
        "    images = np.load(f'images{i}.npy')\n"
        + "".join(f"    {line}\n" for line in lines.splitlines())
        + "    np.savez(f'found{i}.npz', logits=logits, classes=classes)\n"
        "sys.exit('pspnet_jax' in sys.modules or 'flax' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    assert result.returncode == 0, result.stderr
    segmenter = pspnet_jax.load(run)
    for i, shape in enumerate(SIZES):
        with np.load(folder / f"found{i}.npz") as found:
            wanted = np.asarray(segmenter.logits(images_of(*shape)))
            assert_equal_logits(found["logits"], wanted)
            assert (found["classes"] == wanted.argmax(-1)).mean() > 0.999


def test_the_description_beside_the_file(run, exported):
    text = exported.with_name("scenes.stablehlo.json").read_text()
    found = json.loads(text)
    loaded = pspnet_jax.load(run)
    assert found["labels"]["names"] == list(CAMVID.names)
    assert found["labels"]["palette"] == [list(color) for color in CAMVID.colors]
    assert found["input"]["shape"] == ["batch", "height", "width", 3]
    assert found["input"]["smallest_side"] == 1
    assert found["output"]["shape"] == ["batch", "height", "width", 11]
    assert found["platforms"] == ["cpu", "cuda", "tpu"]
    assert found["jax"] == jax.__version__
    assert found["checkpoint"]["step"] == 20
    assert found["checkpoint"]["digest"] == loaded.provenance.digest
    assert found["inside"]["normalization"]["mean"] == list(IMAGENET_8BIT.mean)
    assert found["inside"]["model"]["backbone"] == "resnet10"


def test_what_lies_there_is_kept(run, exported, capsys):
    before = exported.read_bytes()
    argv = ["export", f"--checkpoint={run}", "--format=stablehlo", "--output"]
    assert main([*argv, str(exported)]) == 1
    assert f"{exported} exists; choose another --output" in capsys.readouterr().err
    free = exported.with_name("free")
    beside = exported.with_name("free.json")
    beside.write_text("mine")
    assert main([*argv, str(free)]) == 1
    assert f"{beside} exists; choose another --output" in capsys.readouterr().err
    assert exported.read_bytes() == before
    assert beside.read_text() == "mine"
    assert not free.exists()
    assert not list(exported.parent.glob("*.tmp"))


def test_nothing_half_written_is_left(run, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export.run(str(run), format="stablehlo", output=str(tmp_path / "x"), platforms=("cpu",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"format": "stablehlo", "platforms": ("cpu", "gpu")},
            "platforms='cpu,gpu' must be one or more of cpu, cuda, tpu",
        ),
        ({"format": "stablehlo", "platforms": ()}, "platforms='' must be one or more of cpu, cuda"),
        (
            {"format": "safetensors", "platforms": ("cpu",)},
            "platforms=cpu is an option of format=stablehlo; safetensors files know none: leave it out",
        ),
    ],
    ids=str,
)
def test_platforms_that_there_are_not(run, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        export.run(str(run), output=str(tmp_path / "x"), **arguments)


def test_platforms_are_those_asked_for(run, tmp_path):
    target = tmp_path / "x"
    argv = ["export", f"--checkpoint={run}", "--format=stablehlo", f"--output={target}"]
    assert main([*argv, "--platforms=tpu"]) == 0
    function = jax.export.deserialize(bytearray(target.read_bytes()))
    assert function.platforms == ("tpu",)
    with pytest.raises(ValueError, match="cpu"):
        function.call(images_of(1, 33, 41))


def test_networks_in_float64_are_refused():
    stored = stored_model()
    wide = dataclasses.replace(stored.description.model, dtype="float64")
    stored = dataclasses.replace(
        stored, description=dataclasses.replace(stored.description, model=wide)
    )
    with pytest.raises(ValueError, match=r"model.dtype='float64' cannot be exported: .* TPUs"):
        export.exported_function(stored, platforms=("cpu",))


@pytest.mark.parametrize(
    ("overrides", "relative"),
    [
        ({"family": "lextal"}, 1e-5),
        ({"align_corners": False, "pyramid_pool": "max", "pyramid_bins": (1, 5)}, 1e-5),
        # The last bit of bfloat16 is 1/256 of a value.
        ({"dtype": "bfloat16", "output_stride": 16}, 1e-2),
        *(
            pytest.param(overrides, 1e-5, marks=pytest.mark.slow)
            for overrides in (
                {"family": "lextal", "backbone": "densenet121"},
                {"backbone": "densenet121"},
                {"backbone": "resnet50", "width": 2},
                {"pyramid_bins": ()},
                {"align_corners": False, "output_stride": 32, "remat": True},
                {"family": "lextal", "backbone": "squeezenet", "align_corners": False},
                {"family": "lextal", "pyramid_pool": "max"},
            )
        ),
    ],
    ids=str,
)
def test_every_kind_of_network_goes_out(overrides, relative):
    stored = stored_model(**overrides)
    found = reloaded(stored, platforms=export.PLATFORMS).call(images_of(1, 50, 73))
    wanted = segmenter_of(stored).logits(images_of(1, 50, 73))
    assert_equal_logits(found, wanted, relative=relative)


def test_images_below_the_smallest_side_are_refused_by_the_file(monkeypatch):
    monkeypatch.setattr(export, "smallest_side", lambda description: 3)
    function = reloaded(stored_model(pyramid_bins=()))
    assert function.call(images_of(1, 3, 5)).shape == (1, 3, 5, 11)
    with pytest.raises(ValueError, match=r"\(batch, height \+ 2, .* \(= 2\)"):
        function.call(images_of(1, 2, 5))


@pytest.mark.slow
def test_smallest_side():
    """The authors' rule leaves a side of 1 pixel alone; DenseNet's average pool leaves nothing of it."""
    sides = {"densenet121": 2, "resnet10": 1, "squeezenet": 1}
    for backbone, side in sides.items():
        assert export.smallest_side(stored_model(backbone=backbone).description) == side
    variant = stored_model(family="lextal", backbone="densenet121")
    assert export.smallest_side(variant.description) == 1


@pytest.mark.slow
@pytest.mark.parametrize("side", [473, 713])
def test_full_size(side):
    """PSPNet-50 with the 150 classes of ADE20K: python -m pytest -m slow tests/test_export.py -k full_size."""
    ade20k = load_label_set("ade20k")
    stored = stored_model(ade20k.num_classes, backbone="resnet50", width=64)
    stored = dataclasses.replace(
        stored, description=dataclasses.replace(stored.description, label_set=ade20k)
    )
    images = images_of(1, side, side)
    found = reloaded(stored, platforms=export.PLATFORMS).call(images)
    assert_equal_logits(found, segmenter_of(stored).logits(images))


@pytest.mark.parametrize("format", ["safetensors", "caffemodel"])
def test_networks_without_published_names_are_told_where_to_go(tmp_path, monkeypatch, format):
    stored = stored_model(backbone="squeezenet", family="caffe")
    monkeypatch.setattr(export.stored_model, "read", lambda *_, **__: stored)
    target = tmp_path / "x"
    with pytest.raises(ValueError, match="no table of published names for PSPNets on squeezenet"):
        export.run("anywhere", format=format, output=str(target))
    export.run("anywhere", format="pspnet_jax", output=str(target))
    assert target.is_file()
