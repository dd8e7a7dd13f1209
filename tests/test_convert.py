"""Published weights in and out: equal logits, every wrong key by name, files that come back."""

import functools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import pspnet_jax
from pspnet_jax import convert, export
from pspnet_jax.main import main
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train_step import split_model
from pspnet_jax.trees import flatten
from pspnet_jax.weights import names, pytorch, safetensors, tables

from networks import options
from pictures import example, write_image, write_split

BUDGET_SECONDS = 180

GOLDENS = Path(__file__).parent / "goldens"
FILE = GOLDENS / "published.pth"


def published() -> dict[str, np.ndarray]:
    """The tensors of the golden under their keys; reading it under type checks takes a second."""
    return dict(_read_once())


@functools.cache
def _read_once():
    return names.without_prefix(pytorch.read(FILE))


def write(path, arrays):
    safetensors.write(path, arrays, {"format": "pt"})
    return str(path)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "model"
    code = main(["convert", "--family=semseg", "--labels=camvid", f"--output={output}", str(FILE)])
    assert code == 0
    return output


def test_logits_are_those_of_pytorch(converted):
    segmenter = pspnet_jax.load(converted)
    assert segmenter.description.model.backbone == "resnet50"
    assert segmenter.description.model.width == 2
    assert segmenter.protocol == segmenter.choose_protocol("semseg")
    with np.load(GOLDENS / "published.npz") as golden:
        logits = np.asarray(segmenter.logits(golden["image"][None]))[0, ::4, ::4]
        assert np.abs(logits - golden["logits"]).max() <= 1e-5 * np.abs(golden["logits"]).max()


def test_a_converted_model_evaluates_with_a_config_and_predicts(converted, tmp_path, capsys):
    write_split(tmp_path, "val", 2)
    config = Path(__file__).parent / "tiny_config.py"
    argv = ["evaluate", f"--checkpoint={converted}", "--crop_size=65", "--base_size=90"]
    assert main(argv) == 1
    assert "say where the data is, e.g. with --config=configs/ade20k.py" in capsys.readouterr().err
    argv += [f"--config={config}", f"--config.data.root={tmp_path}", "--scales=0.5,1"]
    assert main(argv) == 0
    name = "00000000-val-semseg-scales0.5,1-base90-crop65x65"
    assert (converted / "evaluation" / name / "report.json").is_file()
    write_image(tmp_path / "photo.jpg", example().image)
    argv = ["predict", f"--checkpoint={converted}", f"--output={tmp_path / 'out'}"]
    assert main([*argv, str(tmp_path / "photo.jpg")]) == 0
    assert (tmp_path / "out/class_maps/photo.png").is_file()


def test_export_writes_the_published_names_and_layout(converted, tmp_path):
    target = tmp_path / "out.safetensors"
    argv = ["export", f"--checkpoint={converted}", "--format=safetensors", f"--output={target}"]
    assert main(argv) == 0
    plain = tmp_path / "plain"
    plain.write_text("")
    assert target.stat().st_mode == plain.stat().st_mode
    found, metadata = safetensors.read(target)
    assert metadata["format"] == "pt"
    wanted = published()
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(found[key], array.astype(np.float32), err_msg=key)


def test_exported_files_keep_their_bins(tmp_path):
    wanted = options(backbone="resnet18", pyramid_bins=(1, 2, 4, 8))
    path = write(tmp_path / "w.safetensors", _published_of(wanted))
    model = convert.run(
        [path], labels="camvid", output=str(tmp_path / "a"), pyramid_bins=(1, 2, 4, 8)
    )
    exported = export.run(str(model), format="safetensors", output=str(tmp_path / "x.safetensors"))
    again = convert.run([str(exported)], labels="camvid", output=str(tmp_path / "b"))
    assert pspnet_jax.load(again).description.model == wanted


def test_keys_of_stages_that_no_network_has_cost_nothing(tmp_path):
    for stage in (0, 9_999, 10**30):
        key = f"layer{stage}.0.conv1.weight"
        path = write(tmp_path / "w.safetensors", published() | {key: np.ones((2, 2, 1, 1), "f4")})
        with pytest.raises(names.MisfitError, match=f"layer{stage}.0.conv1.weight is not known"):
            convert.run([path], labels="camvid", output=str(tmp_path / "a"))


def test_what_was_exported_converts_again(converted, tmp_path):
    target = tmp_path / "out.safetensors"
    export.run(str(converted), format="safetensors", output=str(target))
    again = convert.run([str(target)], labels="camvid", output=str(tmp_path / "again"))
    digests = [pspnet_jax.load(folder).provenance.digest for folder in (converted, again)]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "overrides",
    [
        {"backbone": "resnet18", "stem": "7x7"},
        {"backbone": "resnet101", "width": 1},
        {"pyramid_bins": ()},
        {"pyramid_bins": (1, 4)},
        {"pyramid_bins": (1, 3), "pyramid_reduction": False},
        {"backbone": "resnet18", "pyramid_bins": (2, 5)},
    ],
    ids=str,
)
def test_options_are_read_from_names_and_shapes(overrides):
    wanted = options(**overrides)
    bins = overrides.get("pyramid_bins") or None  # () is found out
    weights = tables.read("semseg", tables.Order(wanted.pyramid_bins), _published_of(wanted))
    told = {} if bins is None else {"pyramid_bins": bins}
    assert convert.infer_options(weights, family="semseg", told=told, where="file") == wanted


def test_the_variant_goes_out_and_in(tmp_path):
    wanted = options(family="lextal", backbone="resnet18")
    path = write(tmp_path / "w.safetensors", _published_of(wanted))
    arguments = {"labels": "camvid", "output": str(tmp_path / "model")}
    with pytest.raises(ValueError, match=r"is Lextal/pspnet-pytorch's .* choose its --family"):
        convert.run([path], **arguments)
    folder = convert.run([path], family="lextal", **arguments)
    segmenter = pspnet_jax.load(folder)
    assert segmenter.description.model == wanted
    assert segmenter.protocol.name == "whole"
    exported = export.run(str(folder), format="safetensors", output=str(tmp_path / "x.safetensors"))
    found, _ = safetensors.read(exported)
    for key, array in _published_of(wanted).items():
        np.testing.assert_array_equal(found[key], array)


def _published_of(wanted):
    """Random weights of a network under published names."""
    _, params, batch_stats = split_model(PSPNet(wanted, 11, rng=np.random.default_rng(0)))
    arrays = {k: np.asarray(v) for k, v in (flatten(params) | flatten(batch_stats)).items()}
    table = tables.of_network(wanted.family, wanted.pyramid_bins, stem=wanted.stem)
    return names.publish(arrays, table, steps=0)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("layer0.0.weight", "remove", "layer0.0.weight is missing"),
        ("layer1.0.conv1.weight", "remove", "layer1.0.conv1.weight is missing"),
        ("layer3.5.bn3.running_var", "remove", "layer3.5.bn3.running_var is missing"),
        ("ppm.features.2.1.weight", "remove", "ppm.features.2.1.weight is missing"),
        ("cls.4.bias", "remove", "cls.4.bias is missing"),
        ("aux.4.weight", "remove", "aux.4.weight is missing"),
        ("layer2.0.downsample.0.weight", "rename", "layer2.0.downsample.0.weightx is not known"),
        ("cls.1.running_mean", "rename", "cls.1.running_mean is missing"),
        ("cls.4.weight", "transpose", "cls.4.weight is transposed"),
        ("layer4.0.conv3.weight", "transpose", "layer4.0.conv3.weight is transposed"),
        ("layer1.0.conv1.weight", "transpose", "layer1.0.conv1.weight is transposed"),
        ("layer3.6.conv1.weight", "add", "layer3.6.conv1.weight is not known"),
        ("layer5.0.conv1.weight", "add", "layer5.0.conv1.weight is not known"),
        ("ppm.features.4.1.weight", "add", "ppm.features.4.1.weight is not known"),
        ("psa.weight", "add", "psa.weight is not known"),
    ],
)
def test_one_wrong_key_is_refused_by_name(key, change, message, tmp_path, capsys):
    arrays = published()
    if change == "add":
        arrays[key] = np.ones((4, 4, 1, 1), np.float16)
    elif change == "transpose":
        arrays[key] = arrays[key].swapaxes(0, 1)
    else:
        removed = arrays.pop(key)
        if change == "rename":
            arrays[key + "x"] = removed
    path = write(tmp_path / "w.safetensors", arrays)
    argv = ["convert", "--labels=camvid", f"--output={tmp_path / 'model'}", path]
    assert main(argv) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "model").exists()


def _keep(arrays, *keys):
    return {key: arrays[key] for key in keys}


def _emptied(arrays):
    return {k: np.zeros((0,) * a.ndim, a.dtype) for k, a in arrays.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: _keep(a, "layer1.0.downsample.0.weight", "cls.4.bias"),
            "holds no residual blocks",
        ),
        (lambda a: a | {"cls.4.bias": np.float32(3)}, "has 1/11 classes|cls.4.bias is "),
        (_emptied, "holds no residual blocks"),
        (
            lambda a: {k: v for k, v in a.items() if not k.startswith("ppm.")},
            "ppm.features.0.1.weight is",
        ),
        (lambda a: {f"x.{k}": v for k, v in a.items()}, "names of no network that is known here"),
        (
            lambda a: {f"module.{k}": v for k, v in a.items()} | {"cls.4.bias": np.ones(11)},
            "1 do not",
        ),
        (lambda a: {"layer0.0.weightx": np.ones(1)}, "not known: layer0.0.weightx"),
    ],
)
def test_odd_files_are_refused_with_a_sentence(change, message, tmp_path):
    path = write(tmp_path / "w.safetensors", change(published()))
    with pytest.raises(ValueError, match=message):
        convert.run([path], labels="camvid", output=str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_a_claimed_network_takes_no_memory(tmp_path):
    """Names and vectors of width 20,000: their network would have a billion values."""
    arrays = {
        key: np.ones((20_000, 1, 1, 1) if array.ndim == 4 else array.shape, np.float32)
        for key, array in published().items()
        if not key.endswith("num_batches_tracked")
    }
    path = write(tmp_path / "w.safetensors", arrays)
    tracemalloc.start()
    with pytest.raises(ValueError, match="it is damaged or no such network"):
        convert.run([path], labels="camvid", output=str(tmp_path / "model"))
    assert tracemalloc.get_traced_memory()[1] < 1e8
    tracemalloc.stop()


@pytest.mark.parametrize("place", ["", "/below"])
def test_an_output_that_is_a_file(place, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    argv = ["convert", "--labels=camvid", f"--output={tmp_path / 'file'}{place}", str(FILE)]
    assert main(argv) == 1
    assert "file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def backbone_arrays(*, stem="deep", old=False):
    """The golden's backbone as an ImageNet file names it."""
    renamed = {}
    for key, array in published().items():
        if old and key.endswith("num_batches_tracked"):
            continue
        if key.startswith("layer0."):
            index, leaf = key.split(".")[1:]
            key = f"{'bn' if int(index) % 3 else 'conv'}{int(index) // 3 + 1}.{leaf}"
        if key.startswith(("layer", "conv", "bn")):
            renamed[key] = array
    renamed |= {"fc.weight": np.ones((10, 64)), "fc.bias": np.ones(10)}
    if stem == "7x7":
        for key in [k for k in renamed if k.startswith(("conv2", "conv3", "bn2", "bn3"))]:
            del renamed[key]
        renamed["conv1.weight"] = np.ones((2, 3, 7, 7))
        for key in ("layer1.0.conv1.weight", "layer1.0.downsample.0.weight"):
            renamed[key] = renamed[key][:, :2]
    return renamed


@pytest.mark.parametrize(
    ("stem", "old"), [("deep", False), ("deep", True), ("7x7", False), ("7x7", True)]
)
def test_backbones_become_one_file_of_our_names(stem, old, tmp_path):
    path = write(tmp_path / "resnet50_v2.safetensors", backbone_arrays(stem=stem, old=old))
    target = convert.run([path], output=str(tmp_path / "backbone"))
    assert target == tmp_path / "backbone/resnet50.safetensors"
    found, metadata = safetensors.read(target)
    assert metadata == {"format": "pspnet_jax", "backbone": "resnet50", "stem": stem}
    assert len(found) == (265 if stem == "7x7" else 275)
    np.testing.assert_array_equal(
        found["backbone.stem.conv1.kernel"][:, :, :, 0],
        backbone_arrays(stem=stem)["conv1.weight"][0].transpose(1, 2, 0),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": []}, "which file"),
        ({"files": ["nowhere.pth"]}, "there is no such file"),
        ({"files": [str(GOLDENS)]}, "is a folder; a file of weights is wanted"),
        (
            {"family": "caffe2"},
            "family='caffe2' is not one of semseg, caffe, mmseg, smp, csail, lextal",
        ),
        ({"labels": None}, "say which classes it has, e.g. --labels=ade20k"),
        ({"labels": "voc2012"}, "has 11 classes, label set 'voc2012' has 21"),
        ({"labels": "voc"}, "did you mean 'voc2012'"),
        ({"pyramid_bins": (1, 2)}, "ppm.features.3.1.weight is not known"),
    ],
)
def test_what_cannot_be_converted_says_why(arguments, message, tmp_path):
    usual = {"files": [str(FILE)], "labels": "camvid", "output": str(tmp_path / "model")}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert.run(**(usual | arguments))
    assert not (tmp_path / "model").exists()


def test_backbones_have_no_classes(tmp_path):
    path = write(tmp_path / "w.safetensors", backbone_arrays())
    for heads in ({"labels": "camvid"}, {"pyramid_bins": (1, 2)}):
        with pytest.raises(ValueError, match="is a backbone without heads"):
            convert.run([path], output=str(tmp_path / "model"), **heads)


def test_foreign_names_are_shown(tmp_path):
    path = write(tmp_path / "w.safetensors", {"model.weight": np.ones(3)})
    with pytest.raises(ValueError, match=r"no network that is known here: model\.weight"):
        convert.run([path], labels="camvid", output=str(tmp_path / "model"))


def test_nothing_is_overwritten(converted, tmp_path):
    with pytest.raises(FileExistsError, match="holds a model already"):
        convert.run([str(FILE)], labels="camvid", output=str(converted))
    target = tmp_path / "there.safetensors"
    target.write_bytes(b"")
    with pytest.raises(FileExistsError, match="choose another --output"):
        export.run(str(converted), format="safetensors", output=str(target))
    with pytest.raises(
        ValueError, match="format='onnx' is not one of pspnet_jax, safetensors, caffemodel"
    ):
        export.run(str(converted), format="onnx", output=str(tmp_path / "x"))


def test_training_does_not_go_on_from_a_converted_model(converted, tmp_path, capsys):
    write_split(tmp_path, "train", 2)
    write_split(tmp_path, "val", 1)
    config = Path(__file__).parent / "tiny_config.py"
    argv = [f"--config={config}", f"--workdir={converted}", f"--config.data.root={tmp_path}"]
    assert main(argv) == 1
    assert "is a converted model" in capsys.readouterr().err
    assert (converted / "checkpoints/00000000").is_dir()


def test_a_truncated_safetensors_file(tmp_path):
    path = tmp_path / "w.safetensors"
    write(path, published())
    whole = path.read_bytes()
    for length in (len(whole) - 100, 200):  # in the values, in the header
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"w.safetensors cannot be read as safetensors: "):
            convert.run([str(path)], labels="camvid", output=str(tmp_path / "model"))
