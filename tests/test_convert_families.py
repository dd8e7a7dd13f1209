"""Files of the other published families: what is read off them, logits of PyTorch, and the way back.

Files hold the weights that goldens/make_families.py draws by published keys, with what training scripts leave
beside them; the logits are those of the goldens.
"""

import dataclasses
from pathlib import Path

import jax
import make_families
import make_logits
import numpy as np
import pytest
from test_caffe_files import blob, convolution, layer, net, number, row
from test_golden_families import CASES, OF_FILES, load, options_of, published_shapes

import pspnet_jax
from pspnet_jax import convert, export, protocols
from pspnet_jax.catalog import load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.main import main
from pspnet_jax.models.families import FAMILIES, ModelOptions
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.pretrained import start_from
from pspnet_jax.stored_model import Description, StoredModel
from pspnet_jax.stored_model import read as read_stored
from pspnet_jax.train_step import split_model
from pspnet_jax.trees import flatten
from pspnet_jax.weights import caffe, safetensors
from pspnet_jax.weights.names import COUNTER, MisfitError

from networks import options

BUDGET_SECONDS = 240

TOLERANCE = 5e-6  # of the largest logit, in float32
LABELS = "id,name,red,green,blue,raw_ids\n" + "".join(f"{i},c{i},{i},0,0,{i}\n" for i in range(7))
# One of each family in every run; the others differ by what their names and shapes say.
OPTIONS = [
    "mmseg_resnet18",
    "mmseg_resnet50_stride32",
    "smp_resnet34",
    "csail_resnet18",
    "caffe_resnet50",
]
LOGITS = ["mmseg_resnet18", "smp_resnet50_stride16", "csail_resnet18", "caffe_resnet50"]
TOLD = {
    "mmseg_resnet101": {"align_corners": True},
    "mmseg_resnet50_stride32": {"output_stride": 32},
    "csail_resnet50_stride16": {"output_stride": 16},
}


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "seven.csv"
    path.write_text(LABELS)
    return str(path)


def drawn(model_options: ModelOptions) -> dict[str, np.ndarray]:
    """float32 arrays under published keys, as in the goldens."""
    values = make_families.draw(published_shapes(model_options, 7))
    return {key: array.astype(np.float32) for key, array in values.items()}


def published(name: str, folder: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Files as the family publishes them, and the arrays in them that a network has a place for."""
    case = CASES[name]
    arrays = drawn(options_of(case, dtype="float32"))
    counters = {
        f"{key.removesuffix('.running_mean')}.{COUNTER}": np.array(7, np.int64)
        for key in arrays
        if key.endswith(".running_mean")
    }
    if case.family == "caffe":
        path = folder / "pspnet.caffemodel"
        path.write_bytes(caffemodel(arrays, strided=case.backbone == "resnet101"))
        return [str(path)], arrays
    parts = {"weights": arrays | counters}
    if case.family == "smp":  # the encoder keeps the stages that nothing uses
        rest = {"encoder.layer4.0.conv1.weight": np.ones((9, 9, 1, 1), np.float32)}
        rest |= {"encoder.layer4.0.bn1.running_mean": np.ones(9, np.float32)}
        rest |= {f"encoder.layer4.0.bn1.{COUNTER}": np.array(7, np.int64)}
        parts["weights"] |= rest | {"classification_head.3.bias": np.ones(4, np.float32)}
    if case.family == "csail":  # norms of several devices keep sums beside their statistics
        heads = ("ppm.", "conv_last", "cbr_deepsup")
        sums = {
            key.replace(".running_", "._tmp_running_"): array
            for key, array in arrays.items()
            if ".running_" in key
        }
        iterations = {k.replace(COUNTER, "_running_iter"): np.ones(1, np.float32) for k in counters}
        everything = arrays | sums | iterations
        parts = {
            "encoder": {k: a for k, a in everything.items() if not k.startswith(heads)},
            "decoder": {k: a for k, a in everything.items() if k.startswith(heads)},
        }
    files = [folder / f"{part}.safetensors" for part in parts]
    for file, content in zip(files, parts.values(), strict=True):
        safetensors.write(file, content, {"format": "pt"})
    return [str(file) for file in files], arrays


def caffemodel(arrays: dict[str, np.ndarray], *, strided: bool) -> bytes:
    """By the format's second statement in test_caffe_files; strides stand beside the kernels or not at all."""
    layers = []
    for name in dict.fromkeys(key.rpartition(".")[0] for key in arrays):
        blobs = [arrays[k] for k in sorted(k for k in arrays if k.rpartition(".")[0] == name)]
        if name.endswith("/bn"):
            layers.append(layer(name, "BN", *map(row, blobs)))
            continue
        stride = 2 if name in ("conv1_1_3x3_s2", "conv3_1_3x3", "conv3_1_1x1_proj") else 1
        given = {"options": convolution(number(6, stride))} if strided else {}
        layers.append(layer(name, "Convolution", *map(blob, blobs), **given))
    return net(*layers)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OPTIONS else pytest.mark.slow) for n in CASES]
)
def test_options_are_read_off_the_files(name, tmp_path, labels):
    """And what was converted goes out again as it came."""
    files, arrays = published(name, tmp_path)
    case = CASES[name]
    output = convert.run(
        files, family=case.family, labels=labels, output=str(tmp_path / "m"), **TOLD.get(name, {})
    )
    segmenter = pspnet_jax.load(output)
    wanted = options_of(case, dtype="float32", **OF_FILES[case.family])
    assert segmenter.description.model == wanted
    family = FAMILIES[case.family]
    assert segmenter.description.normalization == family.normalization
    assert segmenter.protocol == segmenter.choose_protocol(family.protocol)
    exported = export.run(str(output), format="safetensors", output=str(tmp_path / "x.safetensors"))
    found, _ = safetensors.read(exported)
    assert {key for key in found if COUNTER not in key} == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    # What the names do not say stands in the file that we wrote.
    again = convert.run(
        [str(exported)], family=case.family, labels=labels, output=str(tmp_path / "n")
    )
    assert pspnet_jax.load(again).provenance.digest == segmenter.provenance.digest


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in LOGITS else pytest.mark.slow) for n in CASES]
)
def test_logits_are_those_of_pytorch(name, tmp_path, labels):
    files, _ = published(name, tmp_path)
    case, golden = CASES[name], load(name)
    output = convert.run(
        files, family=case.family, labels=labels, output=str(tmp_path / "m"), **TOLD.get(name, {})
    )
    size = case.sizes[1]
    logits = pspnet_jax.load(output).logits(make_logits.draw_images(case, size))
    expected = golden[make_logits.key(size)]
    found = np.asarray(logits)[:, *make_families.PIXELS]
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize(
    "name", ["mmseg_resnet18", "smp_resnet34", "csail_resnet18", "caffe_resnet50"]
)
def test_the_wrong_family_is_told_the_right_one(name, tmp_path, labels):
    files, _ = published(name, tmp_path)
    right = CASES[name].family
    for family in FAMILIES:
        if family != right:
            with pytest.raises(ValueError, match=f"choose its --family={right}"):
                convert.run(files, family=family, labels=labels, output=str(tmp_path / "m"))
    assert not (tmp_path / "m").exists()


def test_csail_needs_both_files(tmp_path, labels):
    (encoder, decoder), _ = published("csail_resnet18", tmp_path)
    arguments = {"family": "csail", "labels": labels, "output": str(tmp_path / "m")}
    with pytest.raises(
        ValueError, match=r"is a backbone without heads.* give the decoder's file too"
    ):
        convert.run([encoder], **arguments)
    with pytest.raises(ValueError, match=r"no residual blocks .*the encoder's file is missing"):
        convert.run([decoder], **arguments)
    with pytest.raises(ValueError, match=r"both have bn1\._running_iter"):
        convert.run([encoder, encoder], **arguments)
    third = str(tmp_path / "third.safetensors")
    safetensors.write(tmp_path / "third.safetensors", {"ppm.9.1.weight": np.ones(1)}, {})
    with pytest.raises(ValueError, match="two files, encoder and decoder, 3 were given"):
        convert.run([encoder, decoder, third], **arguments)
    argv = ["convert", "--family=csail", f"--labels={labels}", f"--output={tmp_path / 'm'}"]
    assert main([*argv, encoder, decoder]) == 0


def test_an_auxiliary_head_that_a_file_lacks_is_none(tmp_path, labels):
    arrays = drawn(options(family="csail", backbone="resnet18"))
    plain = {k: a for k, a in arrays.items() if "deepsup" not in k}
    safetensors.write(tmp_path / "w.safetensors", plain, {"format": "pt"})
    arguments = {"family": "csail", "labels": labels, "output": str(tmp_path / "m")}
    output = convert.run([str(tmp_path / "w.safetensors")], **arguments)
    assert pspnet_jax.load(output).description.model.aux_heads == ()
    del arrays["conv_last_deepsup.bias"]
    safetensors.write(tmp_path / "v.safetensors", arrays, {"format": "pt"})
    with pytest.raises(MisfitError, match=r"conv_last_deepsup\.bias is missing"):
        convert.run(
            [str(tmp_path / "v.safetensors")], **arguments | {"output": str(tmp_path / "n")}
        )


# Each changes what a network computes, and hardly any can be told by names and shapes.
OVERRIDES = [
    {"pyramid_map_first": False},
    {"basic_block_dilation": "first"},
    {"fixed_dilation": True, "output_stride": 32},
    {"first_block_dilation": (1, 2)},
    {"pyramid_pool": "max"},
    {"pyramid_reduction": False},
    {"pyramid_width": 1, "head_width": 2, "aux_width": 1},
    {"pyramid_linear": True},
    {"pyramid_bin1_norm": False},
    {"head_kernels": (1, 3)},
    {"pyramid_bins": (6, 3, 2, 1), "align_corners": False},
    {"stem": "v1c", "output_stride": 16},
    {"family": "smp", "num_stages": 3},
    {"family": "caffe", "pyramid_bins": (1, 2, 3, 6), "backbone": "resnet50", "aux_heads": ()},
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=str)
def test_what_we_export_is_the_same_network_again(overrides, tmp_path, labels):
    model_options = options(**{"backbone": "resnet18", "width": 4, **overrides})
    model = PSPNet(model_options, 7, rng=np.random.default_rng(0))
    stored = stored_model(model, model_options, labels)
    path = tmp_path / "x.safetensors"
    export._write_safetensors(stored, path)
    output = convert.run(
        [str(path)], family=model_options.family, labels=labels, output=str(tmp_path / "m")
    )
    found = pspnet_jax.load(output, step="latest")
    usual = {"dropout_rate", "norm_momentum", "initializer"}  # of training
    for option in dataclasses.fields(ModelOptions):
        if option.name not in usual:
            here, there = (
                getattr(o, option.name) for o in (found.description.model, model_options)
            )
            assert here == there, option.name
    stored_again = CheckpointFolder(output / "checkpoints").load(0, "model")
    for name, array in flatten(stored.part["params"]).items():
        np.testing.assert_array_equal(flatten(stored_again["params"])[name], array, err_msg=name)


def test_what_our_file_says_is_not_overruled(tmp_path, labels):
    model_options = options(backbone="resnet18", width=4, align_corners=False)
    model = PSPNet(model_options, 7, rng=np.random.default_rng(0))
    path = tmp_path / "x.safetensors"
    export._write_safetensors(stored_model(model, model_options, labels), path)
    with pytest.raises(
        ValueError, match="says align_corners=False: leave --align_corners=True out"
    ):
        convert.run([str(path)], labels=labels, output=str(tmp_path / "m"), align_corners=True)


@pytest.mark.parametrize("bins", [(3, 1, 6, 2)])
def test_levels_of_caffe_are_put_into_another_order(tmp_path, labels, bins):
    """The same network, whatever the order in which its levels stand before the head."""
    files, _ = published("caffe_resnet50", tmp_path)
    segmenters = [
        pspnet_jax.load(
            convert.run(
                files,
                family="caffe",
                labels=labels,
                output=str(tmp_path / str(i)),
                pyramid_bins=order,
            )
        )
        for i, order in enumerate((None, bins))
    ]
    assert [s.description.model.pyramid_bins for s in segmenters] == [(6, 3, 2, 1), bins]
    images = make_logits.draw_images(CASES["caffe_resnet50"], (33, 41))[:1]
    first, second = (np.asarray(segmenter.logits(images)) for segmenter in segmenters)
    np.testing.assert_allclose(second, first, atol=1e-5 * np.abs(first).max())


@pytest.mark.parametrize(("told", "wanted"), [(True, "3x3"), (False, "1x1")])
def test_strides_of_a_caffe_file_come_before_the_familys(tmp_path, labels, told, wanted):
    arrays = drawn(options(family="caffe", backbone="resnet50", aux_heads=()))
    path = tmp_path / "w.caffemodel"
    path.write_bytes(caffemodel(arrays, strided=told))
    output = convert.run([str(path)], family="caffe", labels=labels, output=str(tmp_path / "m"))
    assert pspnet_jax.load(output).description.model.bottleneck_stride == wanted


def test_export_to_caffes_own_format(tmp_path, labels):
    files, arrays = published("caffe_resnet50", tmp_path)
    output = convert.run(files, family="caffe", labels=labels, output=str(tmp_path / "m"))
    target = tmp_path / "x.caffemodel"
    argv = ["export", f"--checkpoint={output}", "--format=caffemodel", f"--output={target}"]
    assert main(argv) == 0
    found, strides = caffe.read(target)
    assert set(found) == set(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, err_msg=key)
    assert strides == dict.fromkeys(
        ("conv1_1_3x3_s2", "conv3_1_1x1_reduce", "conv3_1_1x1_proj"), (2, 2)
    )


@pytest.mark.parametrize("map_first", [True, False])
def test_caffes_networks_of_any_order_come_back(tmp_path, labels, map_first):
    """Their files have the widest levels first, and the map where the network has it."""
    model_options = options(
        family="caffe", aux_heads=(), pyramid_bins=(1, 2, 3, 6), pyramid_map_first=map_first
    )
    model_options = dataclasses.replace(model_options, backbone="resnet50")
    model = PSPNet(model_options, 7, rng=np.random.default_rng(0))
    _, *trees = split_model(model)
    stored = stored_model(model, model_options, labels)
    with CheckpointFolder(tmp_path / "run/checkpoints") as folder:
        part = {**stored.part, "description": stored.description.to_json()}
        folder.save(1, {"model": part}, mean_iou=None)
    target = str(tmp_path / "x.safetensors")
    export.run(str(tmp_path / "run"), format="safetensors", output=target)
    again = convert.run([target], family="caffe", labels=labels, output=str(tmp_path / "again"))
    found = flatten(read_stored(again, step="best").part["params"])
    wanted = flatten(trees[0])
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    empty = split_model(PSPNet(model_options, 7, rng=np.random.default_rng(1)))[1:]
    new, _ = start_from(target, *empty, model=model_options, label_set=load_label_set(labels))
    np.testing.assert_array_equal(new["head"]["conv"]["kernel"], wanted["head.conv.kernel"])


def test_only_caffes_networks_go_into_caffes_format(tmp_path, labels):
    files, _ = published("smp_resnet34", tmp_path)
    output = convert.run(files, family="smp", labels=labels, output=str(tmp_path / "m"))
    with pytest.raises(ValueError, match="of the family 'smp'; --format=caffemodel is for 'caffe'"):
        export.run(str(output), format="caffemodel", output=str(tmp_path / "x.caffemodel"))


@pytest.mark.parametrize("through", ["file", "folder", "export"])
def test_levels_come_in_the_order_of_the_network_that_starts_from_them(
    tmp_path, labels, through, said
):
    """And heads that the source does not have start anew; that it is of another family is told."""
    files, arrays = published("caffe_resnet50", tmp_path)
    source = files[0]
    if through != "file":
        source = str(convert.run(files, family="caffe", labels=labels, output=str(tmp_path / "m")))
    if through == "export":
        target = str(tmp_path / "x.safetensors")
        source = str(export.run(source, format="safetensors", output=target))
    wanted = options(family="semseg", backbone="resnet50")
    _, params, batch_stats = split_model(PSPNet(wanted, 7, rng=np.random.default_rng(0)))
    new, _ = start_from(
        source,
        params,
        batch_stats,
        model=wanted,
        label_set=load_label_set(labels),
    )
    assert "weights of the family 'caffe'" in said[0]
    parts = [256, 320, 384, 448]  # channels: the map, and four levels
    ours = np.split(np.asarray(new["head"]["conv"]["kernel"]), parts, axis=2)
    theirs = np.split(arrays["conv5_4.0"].transpose(2, 3, 1, 0), parts, axis=2)
    assert ours[0].shape == (3, 3, 256, 64)
    for here, there in enumerate((0, 4, 3, 2, 1)):  # bins 6, 3, 2, 1 in the file
        np.testing.assert_array_equal(ours[here], theirs[there])
    np.testing.assert_array_equal(
        new["aux_head"]["conv"]["kernel"], params["aux_head"]["conv"]["kernel"]
    )


def test_a_network_that_another_familys_weights_do_not_fit_is_told_the_family(tmp_path, labels):
    files, _ = published("mmseg_resnet18", tmp_path)
    wanted = options(family="semseg", backbone="resnet18")
    _, params, batch_stats = split_model(PSPNet(wanted, 7, rng=np.random.default_rng(0)))
    causes = r"likely cause: the file's stem is v1c(.|\n)*likely cause: it is of the family 'mmseg'"
    with pytest.raises(MisfitError, match=causes):
        start_from(
            files[0],
            params,
            batch_stats,
            model=wanted,
            label_set=load_label_set(labels),
        )


def test_a_training_starts_from_a_whole_file_of_smp(tmp_path, labels):
    files, arrays = published("smp_resnet34", tmp_path)
    wanted = options(family="smp", backbone="resnet34")
    _, params, batch_stats = split_model(PSPNet(wanted, 7, rng=np.random.default_rng(0)))
    new, _ = start_from(
        files[0], params, batch_stats, model=wanted, label_set=load_label_set(labels)
    )
    np.testing.assert_array_equal(
        new["head"]["conv"]["kernel"].transpose(3, 2, 0, 1), arrays["decoder.conv.0.weight"]
    )


def test_a_backbone_is_converted_whole_for_every_family(tmp_path):
    arrays = drawn(options(family="mmseg", backbone="resnet18", stem="7x7"))
    backbone = {k.removeprefix("backbone."): a for k, a in arrays.items() if "backbone." in k}
    path = tmp_path / "resnet18.safetensors"
    safetensors.write(path, backbone, {"format": "pt"})
    converted = convert.run([str(path)], family="smp", output=str(tmp_path / "b"))
    assert len(safetensors.read(converted)[0]) == len(backbone)


@pytest.mark.parametrize(
    "overrides",
    [
        {"backbone": "resnet18"},
        {"backbone": "resnet50", "align_corners": False},
        {"backbone": "resnet50", "output_stride": 16},
    ],
    ids=str,
)
def test_caffes_format_is_for_the_papers_networks(overrides, tmp_path, labels):
    model_options = options(family="caffe", aux_heads=(), **overrides)
    stored = stored_model(
        PSPNet(model_options, 7, rng=np.random.default_rng(0)), model_options, labels
    )
    with pytest.raises(ValueError, match="is for the paper's networks"):
        export._write_caffemodel(stored, tmp_path / "x.caffemodel")


def test_backbones_of_mmsegmentation_and_for_smp(tmp_path, labels):
    """Their stems are numbered through; smp's networks leave the last stages out."""
    v1c = options(family="mmseg", backbone="resnet18")
    arrays = drawn(v1c)
    backbone = {k.removeprefix("backbone."): a for k, a in arrays.items() if "backbone." in k}
    path = tmp_path / "resnet18_v1c.safetensors"
    safetensors.write(
        path, backbone | {"fc.weight": np.ones((5, 64), np.float32)}, {"format": "pt"}
    )
    converted = convert.run([str(path)], family="mmseg", output=str(tmp_path / "b"))
    label_set = load_label_set(labels)
    for source in (path, converted):
        _, params, batch_stats = split_model(PSPNet(v1c, 7, rng=np.random.default_rng(0)))
        new, statistics = start_from(
            str(source), params, batch_stats, model=v1c, label_set=label_set
        )
        np.testing.assert_array_equal(
            new["backbone"]["stem"]["conv2"]["kernel"].transpose(3, 2, 0, 1),
            backbone["stem.3.weight"],
        )
        np.testing.assert_array_equal(
            statistics["backbone"]["stem"]["norm3"]["mean"], backbone["stem.7.running_mean"]
        )
    plain = options(family="smp", backbone="resnet18")
    torchvision = {
        k.removeprefix("backbone."): a
        for k, a in drawn(options(family="mmseg", backbone="resnet18", stem="7x7")).items()
        if "backbone." in k
    }
    path = tmp_path / "resnet18.safetensors"
    safetensors.write(path, torchvision, {"format": "pt"})
    _, params, batch_stats = split_model(PSPNet(plain, 7, rng=np.random.default_rng(0)))
    new, _ = start_from(str(path), params, batch_stats, model=plain, label_set=label_set)
    assert "layer3_0" not in new["backbone"]
    np.testing.assert_array_equal(
        new["backbone"]["layer2_1"]["conv1"]["kernel"].transpose(3, 2, 0, 1),
        torchvision["layer2.1.conv1.weight"],
    )


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_smp_cuts_off_and_never_dilates(num_stages, tmp_path, labels):
    """Also at encoder_depth 5; images are padded to multiples of the stride, as its networks ask for."""
    stride = 2 ** (num_stages + 1)
    wanted = options(family="smp", backbone="resnet18", num_stages=num_stages, output_stride=stride)
    safetensors.write(tmp_path / "w.safetensors", drawn(wanted), {"format": "pt"})
    output = convert.run(
        [str(tmp_path / "w.safetensors")], family="smp", labels=labels, output=str(tmp_path / "m")
    )
    segmenter = pspnet_jax.load(output)
    assert segmenter.description.model == wanted
    images = np.random.default_rng(0).normal(size=(1, 40, 72, 3)).astype(np.float32)
    sides = [side + -side % stride for side in (40, 72)]
    padded = np.zeros((1, *sides, 3), np.float32)
    padded[:, :40, :72] = images
    expected = np.asarray(segmenter.logits(padded))[:, :40, :72]
    np.testing.assert_allclose(np.asarray(segmenter.logits(images)), expected, rtol=1e-5, atol=1e-5)


def test_a_head_that_files_do_not_have_is_left_out_and_said(tmp_path, labels, said, monkeypatch):
    monkeypatch.setattr(export.log, "info", lambda text, *values: said.append(text % values))
    model_options = options(
        family="smp", backbone="resnet18", aux_heads=("pixel",), align_corners=False
    )
    model = PSPNet(model_options, 7, rng=np.random.default_rng(0))
    stored = stored_model(model, model_options, labels)
    arrays = export._published(stored, tmp_path / "x")
    assert not any("aux" in key for key in arrays)
    assert "left out: aux_head, which files of this family do not have" in said
    assert "other than its family: align_corners=False (True); their code needs the same" in said


def stored_model(model, model_options, labels):
    label_set, family = load_label_set(labels), FAMILIES[model_options.family]
    protocol = protocols.choose(family.protocol, label_set)
    description = Description(model_options, label_set, family.normalization, protocol)
    _, params, batch_stats = split_model(model)
    part = jax.tree.map(np.asarray, {"params": params, "batch_stats": batch_stats})
    return StoredModel(description, part, 0, "")
