"""Converted files of four more published PSPNets beside the original code, random weights, full width.

    git clone https://github.com/qubvel-org/segmentation_models.pytorch
    git clone https://github.com/CSAILVision/semantic-segmentation-pytorch
    git clone https://github.com/hszhao/PSPNet
    python experiments/compare_families.py --smp=segmentation_models.pytorch \\
        --csail=semantic-segmentation-pytorch --caffe=PSPNet --mmseg --output=runs/compare_families

in an environment with this package and what compare_families_torch.py needs, for Caffe's files grpcio-tools, and
for the protocol `csail` Pillow before 13 (see `taps.resize_pillow`).
What is not named is left out. Each original network gets random parameters and statistics and is saved as its own
training script does it; the files are converted here. Logits of float32 at image size are set beside the original's,
brought to image size as the family does it; the difference is the largest, over the largest logit. What `export`
makes of it goes back into the original, strictly, and must be equal to the bit.

The protocols `csail`, `mmseg-whole` and `mmseg-slide` run beside the families' own pipelines (their resizing of
images, their windows, their sums) on two painted images, with classifiers scaled up so that several classes win.

Of Caffe the original is its format and its prototxt files: a class that protoc makes of caffe.proto writes and reads
the weights, and `caffe_prototxt` runs the network.
"""

import argparse
import importlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import caffe_prototxt
import caffe_torch
import compare_families_torch as originals
import cv2
import families_torch
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pspnet_jax
from pspnet_jax import convert, export
from pspnet_jax.progress import log_to
from pspnet_jax.segmenter import Segmenter

Size = tuple[int, int]
Logits = Callable[[Tensor], Tensor]
"""8-bit RGB [batch, 3, height, width] -> [batch, classes, height, width]."""

LABELS = {150: "ade20k", 21: "voc2012", 19: "cityscapes"}
SMP = (
    *((backbone, 3) for backbone in ("resnet18", "resnet34", "resnet50", "resnet101")),
    ("resnet50", 4),
    ("resnet50", 5),
)
CSAIL = tuple(itertools.product(("resnet18", "resnet50", "resnet101"), ("PPM", "PPMDeepsup")))
CSAIL_PROTOCOL = (("resnet18", "PPM"), ("resnet50", "PPMDeepsup"))
CSAIL_SHORT_SIDES, CSAIL_LONGEST = (64, 96, 128), 200
# Config file -> what it does that its weights do not tell.
MMSEG_TOLD = {
    "pspnet_r18b-d8_4xb2-80k_cityscapes-769x769": {"align_corners": True},
    "pspnet_r50-d32_4xb2-80k_cityscapes-512x1024": {"output_stride": 32},
    "pspnet_r101-d8_4xb2-80k_cityscapes-769x769": {"align_corners": True},
}
# Where protocols are compared: whole images and windows, both rules of resizing.
MMSEG_PROTOCOL = (
    "pspnet_r18-d8_4xb2-80k_cityscapes-512x1024",
    "pspnet_r18b-d8_4xb2-80k_cityscapes-769x769",
    "pspnet_r50-d8_4xb4-80k_ade20k-512x512",
)
# Told wrongly on purpose, to see that the yardstick notices.
WRONG = {
    "smp_resnet50_depth3": {"align_corners": False},
    "csail_resnet18dilated_PPM": {"align_corners": True},
    "pspnet_r18b-d8_4xb2-80k_cityscapes-769x769": {"align_corners": False},
    "pspnet50_ADE20K_473": {"bottleneck_stride": "3x3"},
}
MMSEG_SCALE, MMSEG_CROP, MMSEG_STRIDE = (260, 130), (97, 97), (65, 65)


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("smp", "csail", "caffe"):
        parser.add_argument(f"--{name}", help="checkout")
    parser.add_argument("--mmseg", action="store_true")
    parser.add_argument("--only", default="", help="pattern that names of networks begin with")
    parser.add_argument("--output", default="runs/compare_families")
    arguments = parser.parse_args()
    only = re.compile(arguments.only)
    log_to(None)
    output = Path(arguments.output)
    shutil.rmtree(output / "models", ignore_errors=True)
    (output / "models").mkdir(parents=True)
    families: list[Iterator[dict]] = []
    if arguments.smp:
        sys.path.insert(0, arguments.smp)
        families.append(compare_smp(output / "models", only))
    if arguments.csail:
        sys.path.insert(0, arguments.csail)
        families.append(compare_csail(output / "models", only))
    if arguments.mmseg:
        families.append(compare_mmseg(output / "models", only))
    if arguments.caffe:
        families.append(compare_caffe(Path(arguments.caffe), output / "models", only))
    rows = []
    for row in itertools.chain(*families):
        print(row, flush=True)
        rows.append(row)
        (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def compare_smp(folder: Path, only: re.Pattern) -> Iterator[dict]:
    """A state_dict, the same under DataParallel's names, and what `save_pretrained` writes."""
    for backbone, depth in SMP:
        name = f"smp_{backbone}_depth{depth}"
        if not only.match(name):
            continue
        model = originals.random_smp(backbone, depth)
        count_steps(model)
        files = [folder / f"{name}.pth", folder / f"{name}_module.pth"]
        torch.save(model.state_dict(), files[0])
        torch.save({f"module.{key}": x for key, x in model.state_dict().items()}, files[1])
        model.save_pretrained(str(folder / f"{name}_hub"))  # pyrefly: ignore
        files.append(folder / f"{name}_hub" / "model.safetensors")
        ours = convert_all([[file] for file in files], "smp", originals.NUM_CLASSES, {})
        stride = 2**depth

        def logits(images: Tensor, model: nn.Module = model, stride: int = stride) -> Tensor:
            """Padded with the mean to what it takes."""
            inputs = families_torch.normalize(images, torch.float32)
            padded = F.pad(inputs, [0, -images.shape[3] % stride, 0, -images.shape[2] % stride])
            found = originals.evaluate(model, padded)
            return found[:, :, : images.shape[2], : images.shape[3]]

        for size in ((96, 96), (64, 160), (75, 102)):
            yield {"network": name, **compare_logits(ours, logits, size)}
        yield from compare_wrong(name, files[:1], "smp", originals.NUM_CLASSES, logits, (96, 96))
        exported = export_tensors(folder / name)
        fresh = cleared(originals.random_smp(backbone, depth))
        missing, unexpected = fresh.load_state_dict(exported, strict=False)
        beyond = tuple(f"encoder.layer{stage}." for stage in range(depth, 5))
        lost = [key for key in missing if not key.startswith(beyond)]
        check_equal(name, fresh, model, lost, unexpected, beyond)
        yield {"network": name, "exported": "equal", "left_out": len(missing)}


def compare_csail(folder: Path, only: re.Pattern) -> Iterator[dict]:
    """Encoder and decoder, as `checkpoint` of its train.py writes them; its test.py's loop over sizes."""
    from mit_semseg.dataset import TestDataset  # pyrefly: ignore
    from mit_semseg.models import SegmentationModule  # pyrefly: ignore

    for backbone, head in CSAIL:
        name = f"csail_{backbone}dilated_{head}"
        if not only.match(name):
            continue
        encoder, decoder = originals.random_csail(backbone, decoder=head)
        classifier = decoder.get_submodule("conv_last.4")
        found: list[Tensor] = []
        classifier.register_forward_hook(lambda module, inputs, out, found=found: found.append(out))

        def logits(
            images: Tensor,
            encoder: nn.Module = encoder,
            decoder: nn.Module = decoder,
            found: list[Tensor] = found,
        ) -> Tensor:
            """Padded with the mean to multiples of 8, as training batches are."""
            inputs = families_torch.normalize(images, torch.float32)
            height, width = images.shape[2:]
            padded = F.pad(inputs, [0, -width % 8, 0, -height % 8])
            maps = originals.evaluate(encoder, padded, return_feature_maps=True)
            originals.evaluate(decoder, maps)
            size = (padded.shape[2], padded.shape[3])
            return families_torch.resize(found[-1], size, align_corners=False)[
                :, :, :height, :width
            ]

        decide(classifier, lambda: logits(originals.draw_images((96, 96))[0]))
        for part in (encoder, decoder):
            count_steps(part)
        files = [folder / f"{name}_{part}_epoch_20.pth" for part in ("encoder", "decoder")]
        for file, part in zip(files, (encoder, decoder), strict=True):
            torch.save(part.state_dict(), file)
        ours = convert_all([files], "csail", originals.NUM_CLASSES, {}, name=name)
        for size in ((96, 96), (72, 56), (75, 62)):
            yield {"network": name, **compare_logits(ours, logits, size)}
        yield from compare_wrong(name, files, "csail", originals.NUM_CLASSES, logits, (96, 96))
        decoder.use_softmax = True
        module = SegmentationModule(encoder, decoder, None).eval()
        options = types.SimpleNamespace(
            imgSizes=CSAIL_SHORT_SIDES, imgMaxSize=CSAIL_LONGEST, padding_constant=8
        )
        for image in painted_images() if (backbone, head) in CSAIL_PROTOCOL else ():
            file = folder / "image.png"
            cv2.imwrite(str(file), image[:, :, ::-1])
            (batch,) = TestDataset([{"fpath_img": str(file)}], options)
            theirs = torch.zeros(1, originals.NUM_CLASSES, *image.shape[:2])
            with torch.no_grad():
                for resized in batch["img_data"]:
                    scores = module({"img_data": resized}, segSize=image.shape[:2])
                    theirs = theirs + scores / len(CSAIL_SHORT_SIDES)
            scales = tuple(side / max(CSAIL_SHORT_SIDES) for side in CSAIL_SHORT_SIDES)
            chosen = {"scales": scales, "base_size": max(CSAIL_SHORT_SIDES)}
            mine = ours.probabilities(image, **chosen, max_size=CSAIL_LONGEST)
            yield {"network": name, "protocol": "csail", **compare_probabilities(mine, theirs[0])}
        decoder.use_softmax = False
        exported = export_tensors(folder / name)
        fresh = [cleared(part) for part in originals.random_csail(backbone, decoder=head)]
        for new, part in zip(fresh, (encoder, decoder), strict=True):
            known = {key: x for key, x in exported.items() if key in new.state_dict()}
            missing, unexpected = new.load_state_dict(known, strict=False)
            lost = [key for key in missing if not originals.CSAIL_EXTRA.fullmatch(key)]
            for key in known:
                exported.pop(key)
            sums = tuple(key for key in missing if key not in lost)
            check_equal(name, new, part, lost, unexpected, sums)
        if exported:
            raise AssertionError(f"{name}: {list(exported)} belong to neither file")
        yield {"network": name, "exported": "equal"}


def compare_mmseg(folder: Path, only: re.Pattern) -> Iterator[dict]:
    """Files of its training scripts, before 1.0 and since; `inference_model` beside our protocols."""
    for name in filter(only.match, originals.MMSEG_CONFIGS):
        model, config = originals.random_mmseg(name)
        num_classes = config.model.decode_head.num_classes

        def logits(images: Tensor, model: nn.Module = model, config: Any = config) -> Tensor:
            return originals.evaluate_mmseg(model, originals.prepare_mmseg(images, config))

        classifier = model.get_submodule("decode_head.conv_seg")
        decide(classifier, lambda: logits(originals.draw_images((96, 96))[0]))
        count_steps(model)
        files = [folder / f"{name}.pth", folder / f"{name}_iter_80000.pth"]
        save_as_before_1_0(model, config, files[0])
        save_by_mmengine(model, config, files[1])
        ours = convert_all(
            [[file] for file in files], "mmseg", num_classes, MMSEG_TOLD.get(name, {})
        )
        for size in ((96, 96), (75, 62), (137, 130)):
            yield {"network": name, **compare_logits(ours, logits, size)}
        yield from compare_wrong(name, files[:1], "mmseg", num_classes, logits, (96, 96))
        for image in painted_images() if name in MMSEG_PROTOCOL else ():
            yield {"network": name, **compare_mmseg_protocol(ours, model, config, image)}
        exported = export_tensors(folder / name)
        fresh, _ = originals.random_mmseg(name)
        cleared(fresh).load_state_dict(exported, strict=True)
        check_equal(name, fresh, model)
        yield {"network": name, "exported": "equal"}


def compare_mmseg_protocol(
    ours: Segmenter, model: nn.Module, config: Any, image: np.ndarray
) -> dict:
    """Its `inference_model` and ours, with windows where the config has them; smaller images and windows."""
    from mmseg.apis import inference_model  # pyrefly: ignore

    slides = config.model.test_cfg.mode == "slide"
    for step in config.test_pipeline:
        if step["type"] == "Resize":
            step["scale"] = MMSEG_SCALE
    chosen: dict[str, Any] = {"base_size": min(MMSEG_SCALE), "max_size": max(MMSEG_SCALE)}
    if slides:
        model.test_cfg.update(crop_size=MMSEG_CROP, stride=MMSEG_STRIDE)  # pyrefly: ignore
        chosen |= {"crop_size": MMSEG_CROP, "stride": MMSEG_STRIDE}
    model.cfg = config
    result = inference_model(model.eval(), np.ascontiguousarray(image[:, :, ::-1]))
    protocol = "mmseg-slide" if slides else "mmseg-whole"
    found = ours.probabilities(image, protocol=protocol, **chosen)
    theirs = result.seg_logits.data.softmax(dim=0)
    return {"protocol": protocol, **compare_probabilities(found, theirs)}


def save_as_before_1_0(model: nn.Module, config: Any, file: Path) -> None:
    """As mmcv's runner saved, and as published files are: `meta` beside the weights."""
    from mmseg.utils import get_classes, get_palette  # pyrefly: ignore

    labels = {150: "ade", 19: "cityscapes"}[config.model.decode_head.num_classes]
    meta = {
        "env_info": "sys.platform: linux\nPython: 3.7.7",
        "seed": 0,
        "exp_name": f"{file.stem}.py",
        "mmseg_version": "0.5.0+b57fb2b",
        "config": config.pretty_text,
        "CLASSES": get_classes(labels),
        "PALETTE": get_palette(labels),
        "epoch": 200,
        "iter": 80000,
        "mmcv_version": "1.0.5",
        "time": "Sat Jun  6 12:00:00 2020",
        "hook_msgs": {},
    }
    torch.save({"meta": meta, "state_dict": OrderedDict(model.state_dict())}, file)


def save_by_mmengine(model: nn.Module, config: Any, file: Path) -> None:
    """By the runner's own method, after three steps of logging."""
    from mmengine.logging import MessageHub  # pyrefly: ignore
    from mmengine.optim import OptimWrapper, PolyLR  # pyrefly: ignore
    from mmengine.runner import Runner  # pyrefly: ignore
    from mmseg.datasets import CityscapesDataset  # pyrefly: ignore

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    hub = MessageHub(file.stem)
    for step in range(3):
        hub.update_scalar("train/loss", 1.0 / (step + 1))
        hub.update_scalar("train/lr", np.float64(0.01))
        hub.update_info("iter", step)
    hub.update_info("loop_stage", "train")
    dataset = types.SimpleNamespace(metainfo=CityscapesDataset.METAINFO)
    runner = types.SimpleNamespace(
        epoch=0,
        iter=2,
        cfg=config,
        seed=0,
        experiment_name=file.stem,
        train_dataloader=types.SimpleNamespace(dataset=dataset),
        model=model,
        message_hub=hub,
        optim_wrapper=OptimWrapper(optimizer),
        param_schedulers=[PolyLR(optimizer, eta_min=1e-4, power=0.9, end=80000, by_epoch=False)],
        call_hook=lambda name, **arguments: None,
    )
    Runner.save_checkpoint(runner, str(file.parent), file.name, by_epoch=False)


def compare_caffe(checkout: Path, folder: Path, only: re.Pattern) -> Iterator[dict]:
    """The layers of the released prototxt files filled with blobs: with their options, and without any."""
    sys.path.insert(0, str(make_proto_classes(checkout, folder)))
    net_class = importlib.import_module("caffe_pb2").NetParameter
    for name in filter(only.match, originals.CAFFE_FILES):
        backbone, num_classes, side = originals.CAFFE_FILES[name]
        text = (checkout / "evaluation/prototxt" / f"{name}.prototxt").read_text()
        network = caffe_prototxt.parse(text)
        statement = caffe_torch.PSPNet(backbone, num_classes)
        originals.randomize(statement)
        blobs = statement.state_dict()
        files = [folder / f"{name}.caffemodel", folder / f"{name}_plain.caffemodel"]
        write_caffemodel(net_class, text, blobs, files[0], is_plain=False)
        write_caffemodel(net_class, text, blobs, files[1], is_plain=True)
        ours = convert_all([[file] for file in files], "caffe", num_classes, {})

        def logits(
            images: Tensor, network: Any = network, blobs: Mapping[str, Tensor] = blobs
        ) -> Tensor:
            with torch.no_grad():
                inputs = caffe_torch.prepare(images, torch.float32)
                found, used = caffe_prototxt.run(network, blobs, inputs)
            assert used == set(blobs), set(blobs) - used
            return found

        yield {"network": name, **compare_logits(ours, logits, (side, side), batch_size=1)}
        yield from compare_wrong(name, files[:1], "caffe", num_classes, logits, (side, side))
        target = folder / f"{name}_exported.caffemodel"
        export.run(str(folder / name), format="caffemodel", output=str(target))
        check_caffemodel(net_class, target, files[0])
        yield {"network": name, "exported": "equal"}


def make_proto_classes(checkout: Path, folder: Path) -> Path:
    """The folder of what protoc makes of the authors' caffe.proto."""
    source = checkout / "src/caffe/proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{source}", f"--python_out={folder}"]
    subprocess.run([*command, str(source / "caffe.proto")], check=True)
    return folder


def write_caffemodel(
    net_class: Any, text: str, blobs: Mapping[str, Tensor], file: Path, *, is_plain: bool
) -> None:
    """The layers of a prototxt with their blobs; plain: without convolution_param, and shapes as four axes."""
    from google.protobuf import text_format

    net = text_format.Parse(text, net_class())
    filled = 0
    for layer in net.layer:
        for number in itertools.count():
            values = blobs.get(f"{layer.name}.{number}")
            if values is None:
                break
            blob, filled = layer.blobs.add(), filled + 1
            blob.data.extend(values.numpy().ravel())
            if is_plain:
                axes = (*(1,) * (4 - values.ndim), *values.shape)
                blob.num, blob.channels, blob.height, blob.width = axes
            else:
                blob.shape.dim.extend(values.shape)
        if is_plain:
            layer.ClearField("convolution_param")
    assert filled == len(blobs), f"{filled} of {len(blobs)} blobs have a layer"
    file.write_bytes(net.SerializeToString())


def check_caffemodel(net_class: Any, exported: Path, original: Path) -> None:
    """Raise where layers, shapes, values or strides differ: Caffe copies blobs of equal shape by layer name."""
    found, wanted = ({}, {})
    for file, layers in ((exported, found), (original, wanted)):
        net = net_class.FromString(file.read_bytes())
        for layer in net.layer:
            if layer.blobs:
                strides = (*layer.convolution_param.stride, 1)[:1]
                blobs = [(tuple(b.shape.dim), np.array(b.data, np.float32)) for b in layer.blobs]
                layers[layer.name] = (layer.type, strides, blobs)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for name, (kind, strides, blobs) in wanted.items():
        assert found[name][:2] == (kind, strides), (name, found[name][:2], kind, strides)
        for (shape, values), (their_shape, theirs) in zip(found[name][2], blobs, strict=True):
            assert shape == their_shape, (name, shape, their_shape)
            assert np.array_equal(values, theirs), f"{name} of {exported} differs"


def convert_all(
    sets: list[list[Path]],
    family: str,
    num_classes: int,
    told: Mapping[str, Any],
    *,
    name: str | None = None,
) -> Segmenter:
    """The model of the first set of files, after every set was seen to give the same one."""
    loaded = []
    for i, files in enumerate(sets):
        folder = files[0].parent / f"{name or sets[0][0].stem}{f'_{i}' if i else ''}"
        names = [str(file) for file in files]
        path = convert.run(
            names, family=family, labels=LABELS[num_classes], output=str(folder), **told
        )
        loaded.append(pspnet_jax.load(path))
    for other in loaded[1:]:
        assert other.description == loaded[0].description, other.description
        assert other.provenance.digest == loaded[0].provenance.digest
    return loaded[0]


def compare_logits(ours: Segmenter, logits: Logits, size: Size, *, batch_size: int = 2) -> dict:
    """The largest difference over the largest logit."""
    images, _ = originals.draw_images(size, batch_size=batch_size)
    found = np.asarray(ours.logits(images.numpy().transpose(0, 2, 3, 1)))
    difference = originals.difference(torch.tensor(found).permute(0, 3, 1, 2), logits(images))
    return {"size": size, "difference": difference}


def compare_wrong(
    name: str, files: list[Path], family: str, num_classes: int, logits: Logits, size: Size
) -> Iterator[dict]:
    """`compare_logits` where the network is told an option that is not its own."""
    if name in WRONG:
        ours = convert_all([files], family, num_classes, WRONG[name], name=f"{name}_wrong")
        yield {
            "network": name,
            "wrong": WRONG[name],
            **compare_logits(ours, logits, size, batch_size=1),
        }


def compare_probabilities(ours: Any, theirs: Tensor) -> dict:
    """[height, width, classes] and [classes, height, width]."""
    found, expected = np.asarray(ours), theirs.numpy().transpose(1, 2, 0)
    return {
        "size": expected.shape[:2],
        "classes": len(np.unique(expected.argmax(-1))),
        "largest_difference": float(np.abs(found - expected).max()),
        "equal_pixels": float((found.argmax(-1) == expected.argmax(-1)).mean()),
    }


def painted_images() -> Iterator[np.ndarray]:
    """A wide and a tall image of patches with some noise, RGB."""
    rng = np.random.default_rng(0)
    for size in ((151, 212), (230, 141)):
        patches = rng.integers(0, 256, (7, 9, 3)).astype(np.uint8)
        image = cv2.resize(patches, size[::-1], interpolation=cv2.INTER_CUBIC).astype(np.float32)
        yield np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)


def decide(classifier: nn.Module, run: Callable[[], Tensor]) -> None:
    """Scale a classifier so that classes win by pixels: random networks are nearly constant."""
    found = run()
    factor = 3 / found.std((0, 2, 3)).mean()
    weight, bias = classifier.get_parameter("weight"), classifier.get_parameter("bias")
    with torch.no_grad():
        constant = found.mean((0, 2, 3)) - bias
        weight.mul_(factor)
        bias.copy_(-constant * factor)


def count_steps(model: nn.Module) -> None:
    """Counters of norms are not 0 in files of a training."""
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            value.fill_(80000)


def export_tensors(converted: Path) -> dict[str, Tensor]:
    """What `export` writes."""
    target = str(converted) + ".safetensors"
    return safetensors.torch.load_file(
        export.run(str(converted), format="safetensors", output=target)
    )


def cleared(model: nn.Module) -> nn.Module:
    """All of it 0."""
    for value in model.state_dict().values():
        value.zero_()
    return model


def check_equal(
    name: str,
    found: nn.Module,
    wanted: nn.Module,
    lost: list[str] | tuple = (),
    unexpected: list[str] | tuple = (),
    left_out: tuple[str, ...] = (),
) -> None:
    """Raise where keys were lost or values differ, but for counters and what begins as `left_out` does."""
    values = found.state_dict()
    unequal = [
        key
        for key, value in wanted.state_dict().items()
        if not re.fullmatch(r".*\.num_batches_tracked", key)
        and not key.startswith(left_out or ("-",))
        and not torch.equal(values[key], value)
    ]
    if lost or unexpected or unequal:
        raise AssertionError(f"{name}: lost {lost}, unexpected {unexpected}, unequal {unequal}")


if __name__ == "__main__":
    main()
