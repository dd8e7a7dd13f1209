"""The statements of four published PSPNets beside the original code, PyTorch against PyTorch, full width.

    git clone https://github.com/qubvel-org/segmentation_models.pytorch
    git clone https://github.com/CSAILVision/semantic-segmentation-pytorch
    git clone https://github.com/hszhao/PSPNet
    python experiments/compare_families_torch.py --smp=segmentation_models.pytorch \\
        --csail=semantic-segmentation-pytorch --caffe=PSPNet --mmseg

in an environment with torch and what those need: torchvision, timm and huggingface-hub for smp, and for the last
option mmsegmentation 1.2.2 with mmcv-lite 2.1.0 (`pip install --no-deps`, then what it asks for). What is not
named is left out. Each original module gets random parameters and statistics, and its state_dict goes into
`families_torch` or `caffe_torch`, strictly: the keys are equal. Logits at image size are compared in evaluation;
where there is an auxiliary head, both heads are also compared in training mode, with batch statistics and without
dropout. float64 on both sides; differences are relative to the largest logit. mmseg's networks are built from its
config files, the Caffe networks are its prototxt files, run by `caffe_prototxt`.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import caffe_prototxt
import caffe_torch
import families_torch
import torch
from families_torch import CSAILPSPNet, MMSegPSPNet, SMPPSPNet
from torch import Tensor, nn

NUM_CLASSES = 150
SEED = 0
# What CSAIL's norms keep for averaging over devices, and no network reads.
CSAIL_EXTRA = re.compile(r".*\.(_tmp_running_mean|_tmp_running_var|_running_iter)")
# Config file -> arguments of our statement.
MMSEG_CONFIGS = {
    "pspnet_r18-d8_4xb2-80k_cityscapes-512x1024": {"backbone": "resnet18"},
    "pspnet_r18b-d8_4xb2-80k_cityscapes-769x769": {
        "backbone": "resnet18",
        "stem": "7x7",
        "align_corners": True,
    },
    "pspnet_r50-d8_4xb4-80k_ade20k-512x512": {"backbone": "resnet50"},
    "pspnet_r50b-d8_4xb2-80k_cityscapes-512x1024": {"backbone": "resnet50", "stem": "7x7"},
    "pspnet_r50-d32_4xb2-80k_cityscapes-512x1024": {"backbone": "resnet50", "output_stride": 32},
    "pspnet_r101-d8_4xb2-80k_cityscapes-769x769": {"backbone": "resnet101", "align_corners": True},
    "pspnet_r101b-d8_4xb2-80k_cityscapes-512x1024": {"backbone": "resnet101", "stem": "7x7"},
}
CAFFE_FILES = {
    "pspnet50_ADE20K_473": ("resnet50", 150, 473),
    "pspnet101_VOC2012_473": ("resnet101", 21, 473),
    "pspnet101_cityscapes_713": ("resnet101", 19, 713),
}


def main() -> None:
    """Print a row for each comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("smp", "csail", "caffe"):
        parser.add_argument(f"--{name}", help="checkout")
    parser.add_argument("--mmseg", action="store_true")
    arguments = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows: list[Iterator[str]] = []
    if arguments.smp:
        sys.path.insert(0, arguments.smp)
        rows.append(compare_smp())
    if arguments.csail:
        sys.path.insert(0, arguments.csail)
        rows.append(compare_csail())
    if arguments.mmseg:
        rows.append(compare_mmseg())
    if arguments.caffe:
        rows.append(compare_caffe(Path(arguments.caffe)))
    for family in rows:
        for row in family:
            print(row, flush=True)


def compare_smp() -> Iterator[str]:
    """Each depth it has of ours, and deeper cuts."""
    for backbone, depth in (
        ("resnet18", 3),
        ("resnet34", 3),
        ("resnet50", 3),
        ("resnet50", 4),
        ("resnet50", 5),
        ("resnet101", 4),
    ):
        theirs = random_smp(backbone, depth)
        ours = SMPPSPNet(backbone, NUM_CLASSES, encoder_depth=depth)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        found = []
        for size in ((96, 96), (64, 160)):
            images, inputs = draw_images(size)
            logits = evaluate(ours, images).logits
            found.append(difference(ours.at_image_size(logits, size), evaluate(theirs, inputs)))
        yield describe(f"smp {backbone}, encoder depth {depth}", ours, found)


def random_smp(backbone: str, depth: int) -> nn.Module:
    """Its network with a cut after a stage, random."""
    import segmentation_models_pytorch as smp  # pyrefly: ignore

    model = smp.PSPNet(
        backbone,
        encoder_weights=None,
        encoder_depth=depth,
        upsampling=2**depth,
        classes=NUM_CLASSES,
    )
    randomize(model)
    return model


def compare_csail() -> Iterator[str]:
    """Its three depths; it returns log-probabilities, and at image size probabilities."""
    for backbone, stride in (("resnet18", 8), ("resnet50", 8), ("resnet50", 16), ("resnet101", 8)):
        encoder, decoder = random_csail(backbone, stride=stride)
        ours = CSAILPSPNet(backbone, NUM_CLASSES, output_stride=stride, dropout_rate=0.0)
        for theirs, mine in ((encoder, ours.encoder), (decoder, ours.decoder)):
            state = theirs.state_dict()
            mine.load_state_dict(
                {key: x for key, x in state.items() if not CSAIL_EXTRA.fullmatch(key)}, strict=True
            )
        found = []
        for size in ((96, 96), (72, 56)):
            images, inputs = draw_images(size)
            scores = evaluate(ours, images)
            maps = evaluate(encoder, inputs, return_feature_maps=True)
            for logits, expected in zip(scores, evaluate(decoder, maps), strict=True):
                found.append(difference(logits.log_softmax(dim=1), expected))
            decoder.use_softmax = True
            probabilities = ours.at_image_size(scores.logits, size).softmax(dim=1)
            found.append(difference(probabilities, evaluate(decoder, maps, segSize=size)))
            decoder.use_softmax = False
        maps = train(encoder, inputs, return_feature_maps=True)
        trained = [scores.log_softmax(dim=1) for scores in train(ours, images)]
        found += [difference(*pair) for pair in zip(trained, train(decoder, maps), strict=True)]
        for theirs, mine in ((encoder, ours.encoder), (decoder, ours.decoder)):
            found.append(of_statistics(mine, theirs))
        yield describe(f"csail {backbone}, stride {stride}", ours, found)


def random_csail(
    backbone: str, *, stride: int = 8, decoder: str = "PPMDeepsup"
) -> tuple[nn.Module, nn.Module]:
    """Its encoder and decoder, random."""
    from mit_semseg.models import models, resnet  # pyrefly: ignore

    encoder = models.ResnetDilated(getattr(resnet, backbone)(), dilate_scale=stride)
    channels = 512 if backbone == "resnet18" else 2048
    parts = (encoder, getattr(models, decoder)(num_class=NUM_CLASSES, fc_dim=channels))
    for part in parts:
        randomize(part)
    return parts


def compare_mmseg() -> Iterator[str]:
    """Networks of its config files."""
    for name, options in MMSEG_CONFIGS.items():
        theirs, config = random_mmseg(name)
        num_classes = config.model.decode_head.num_classes
        ours = MMSegPSPNet(num_classes=num_classes, dropout_rate=0.0, **options)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        found = []
        for size in ((96, 96), (75, 62), (137, 130)):
            images, _ = draw_images(size)
            inputs = prepare_mmseg(images, config)
            with torch.no_grad():
                expected = evaluate_mmseg(theirs, inputs)
                maps = theirs.extract_feat(inputs)
                expected_aux = theirs.auxiliary_head(maps)
            scores = evaluate(ours, images)
            found.append(difference(ours.at_image_size(scores.logits, size), expected))
            found.append(difference(scores.aux_logits, expected_aux))
        maps = train(theirs.backbone, inputs)
        expected = [train(head, maps) for head in (theirs.decode_head, theirs.auxiliary_head)]
        found += [difference(*pair) for pair in zip(train(ours, images), expected, strict=True)]
        found.append(of_statistics(ours, theirs))
        yield describe(f"mmseg {name}", ours, found)


def random_mmseg(name: str) -> tuple[nn.Module, Any]:
    """The network of a config file of its, random, and the config."""
    if (
        importlib.util.find_spec("mmcv._ext") is None
    ):  # mmcv-lite: no operations, and no PSPNet has any
        sys.modules["mmcv.ops"] = _anything("mmcv.ops")
    import mmengine  # pyrefly: ignore
    import mmseg  # pyrefly: ignore
    from mmengine.model import revert_sync_batchnorm  # pyrefly: ignore
    from mmseg.registry import MODELS  # pyrefly: ignore
    from mmseg.utils import register_all_modules  # pyrefly: ignore

    register_all_modules()
    folder = Path(mmseg.__file__).parent / ".mim/configs/pspnet"
    config = mmengine.Config.fromfile(folder / f"{name}.py")
    config.model.pretrained = None
    model = revert_sync_batchnorm(MODELS.build(config.model)).to(torch.get_default_dtype())
    randomize(model)
    return model, config


def prepare_mmseg(images: Tensor, config: Any) -> Tensor:
    """8-bit RGB normalized as a config file says."""
    preprocessor = config.model.data_preprocessor
    mean, std = (torch.tensor(preprocessor[key])[:, None, None] for key in ("mean", "std"))
    return (images - mean) / std


def evaluate_mmseg(model: nn.Module, inputs: Tensor) -> Tensor:
    """Its logits at image size."""
    with torch.no_grad():
        information = [{"img_shape": tuple(inputs.shape[2:])}] * len(inputs)
        return model.eval().encode_decode(inputs, information)  # pyrefly: ignore


def compare_caffe(checkout: Path) -> Iterator[str]:
    """The three released files at the size that stands in them."""
    for name, (backbone, num_classes, side) in CAFFE_FILES.items():
        path = checkout / "evaluation/prototxt" / f"{name}.prototxt"
        network = caffe_prototxt.parse(path.read_text())
        ours = caffe_torch.PSPNet(backbone, num_classes).double()
        randomize(ours)
        images, _ = draw_images((side, side), batch_size=1)
        with torch.no_grad():
            blobs = ours.state_dict()
            inputs = caffe_torch.prepare(images, torch.float64)
            expected, used = caffe_prototxt.run(network, blobs, inputs)
            logits = ours(images)
        if used != set(blobs):
            raise AssertionError(f"the file has no {sorted(set(blobs) - used)}")
        found = [difference(ours.at_image_size(logits, (side, side)), expected)]
        yield describe(f"caffe {name}", ours, found)


def randomize(model: nn.Module) -> None:
    """Random kernels, and norms whose values and statistics all differ; no dropout."""
    torch.manual_seed(SEED)
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        if value.ndim == 4 and value.shape[0] > 1:
            nn.init.kaiming_normal_(value)
        elif key.endswith(("running_var", "/bn.3")):
            nn.init.uniform_(value, 0.5, 1.5)
        elif key.endswith("weight") or key.endswith("/bn.0"):
            nn.init.uniform_(value, 0.4, 0.8)
        else:
            nn.init.normal_(value, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0


def draw_images(size: tuple[int, int], *, batch_size: int = 3) -> tuple[Tensor, Tensor]:
    """8-bit RGB [batch, 3, height, width], and the same normalized for ImageNet."""
    generator = torch.Generator().manual_seed(SEED)
    images = torch.randint(256, (batch_size, 3, *size), generator=generator, dtype=torch.uint8)
    return images, families_torch.normalize(images, torch.float64)


def evaluate(model: nn.Module, *inputs, **options):
    """What it gives in evaluation."""
    with torch.no_grad():
        model.eval()
        return model(*inputs, **options)


def train(model: nn.Module, *inputs, **options):
    """What it gives in training mode; its running statistics change."""
    with torch.no_grad():
        model.train()
        return model(*inputs, **options)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, relative to the largest value."""
    if ours.shape != theirs.shape:
        raise AssertionError(f"{tuple(ours.shape)} here, {tuple(theirs.shape)} there")
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def of_statistics(ours: nn.Module, theirs: nn.Module) -> float:
    """`difference` of all running statistics."""
    expected = theirs.state_dict()
    pairs = [(x, expected[key]) for key, x in ours.state_dict().items() if ".running_" in f".{key}"]
    return max(difference(*pair) for pair in pairs)


def describe(name: str, model: nn.Module, found: list[float]) -> str:
    """A row of the table."""
    return f"| {name} | {families_torch.count(model):,} | {max(found):.1e} | {len(found)} |"


def _anything(name: str) -> ModuleType:
    """A module in which every name is an empty class."""

    def get(attribute: str) -> type:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (), {})

    module = ModuleType(name)
    module.__dict__["__getattr__"] = get
    module.__file__ = __file__
    return module


if __name__ == "__main__":
    main()
