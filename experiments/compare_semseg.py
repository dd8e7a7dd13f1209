"""Our PSPNet beside the authors' own code: logits of converted files, probabilities of their test script.

    git clone https://github.com/hszhao/semseg
    python experiments/compare_semseg.py --semseg=semseg --images PHOTO... --output=runs/compare_semseg

in an environment with this package, torch and pillow (their code imports it). For each depth a network of
their module with random weights and statistics is saved by PyTorch in both layouts, converted here, and
compared on noise of a square, a wide and a tall size; what `export` makes of it is loaded into their module, strictly,
and must be equal to the bit. Then their `scale_process` runs beside our protocol
`semseg` on the photographs, every second one turned on its side.

Their training transforms run beside our recipe `semseg` on a picture whose colors are coordinates: scale, angle,
mirroring, place and void of 4,000 crops of each.

So that their code runs: tensors stay on the CPU, and OpenCV 5 is given at most four channels to resize.
"""

import argparse
import collections
import importlib.util
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import safetensors.torch
import torch
from distributions import distances
from torch import nn

import pspnet_jax
from pspnet_jax import convert, export
from pspnet_jax.arrays import Example
from pspnet_jax.data import transforms
from pspnet_jax.data.folders import read_image
from pspnet_jax.progress import log_to

DEPTHS = {50: "ade20k", 101: "voc2012", 152: "cityscapes"}
CLASSES = {"ade20k": 150, "voc2012": 21, "cityscapes": 19}
SIZES = ((97, 97), (49, 121), (129, 65))
# Crop, base size, scales: photographs take turns.
PROTOCOLS = (
    (473, 512, (1.0,)),
    (473, 512, (0.5, 1.25)),
    (185, 300, (1.0, 0.5)),
    (233, 120, (1.0,)),
)
MEAN = [255 * x for x in (0.485, 0.456, 0.406)]
STD = [255 * x for x in (0.229, 0.224, 0.225)]


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--semseg", required=True, help="checkout of github.com/hszhao/semseg")
    parser.add_argument("--images", nargs="*", default=[], help="photographs")
    parser.add_argument("--output", default="runs/compare_semseg")
    arguments = parser.parse_args()
    log_to(None)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, arguments.semseg)
    _make_it_run()
    rows = [compare_crops()]
    rows += list(compare_logits(output))
    if arguments.images:
        script = _load_script(Path(arguments.semseg) / "tool" / "test.py")
        rows += compare_protocol(script, arguments.images, output)
    (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def compare_crops() -> dict:
    """Distances of Kolmogorov and Smirnov between their crops and ours; under 0.030 nineteen times in twenty."""
    from util import transform  # pyrefly: ignore

    rows, columns = np.mgrid[:200, :250].astype(np.uint8)
    image, labels = np.stack([rows, columns, rows], axis=2), np.zeros((200, 250), np.uint8)
    theirs = transform.Compose(
        [
            transform.RandScale([0.5, 2.0]),
            transform.RandRotate([-10, 10], padding=[0, 0, 0], ignore_label=255),
            transform.RandomGaussianBlur(),
            transform.RandomHorizontalFlip(),
            transform.Crop([129, 129], crop_type="rand", padding=[0, 0, 0], ignore_label=255),
        ]
    )
    ours = transforms.make_augment(
        transforms.resolve({"recipe": "semseg"}), (129, 129), fill=(0, 0, 0)
    )
    random.seed(0)
    found = [describe(*theirs(image.astype(np.float32), labels)) for _ in range(4000)]
    example = Example(image, labels, np.int32(0))
    views = [ours(example, np.random.default_rng(seed)) for seed in range(4000)]
    mine = [describe(view.image.astype(np.float32), view.labels) for view in views]
    names = ("scale", "angle", "mirrored", "row", "column", "void")
    row = {"crops": 4000, "distances": distances(names, found, mine)}
    print(row, flush=True)
    return row


def describe(image: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """Scale, angle, mirroring, row and column of the middle, share of void of a crop of coordinates.

    Rounded, because ours are whole numbers: to 0.02, 1 degree, 2 pixels.
    """
    middle = image[48:81, 48:81]
    down, across = (
        (middle[-1, 16, :2] - middle[0, 16, :2]),
        (middle[16, -1, :2] - middle[16, 0, :2]),
    )
    scale = 32 / np.hypot(*down)
    angle = np.degrees(np.arctan2(down[1] * np.sign(across[1]), down[0]))
    row, column = middle[16, 16, :2]
    rounded = (scale / 0.02, angle, across[1] < 0, row / 2, column / 2)
    return (*(float(np.rint(x)) for x in rounded), float((labels == 255).mean().round(2)))


def compare_logits(output: Path) -> Iterator[dict]:
    """Both layouts, three sizes, each depth: largest difference over the largest logit."""
    shutil.rmtree(output / "converted", ignore_errors=True)
    for depth, labels in DEPTHS.items():
        model = random_network(depth, CLASSES[labels])
        for is_zip in (True, False):
            name = f"psp{depth}_{'zip' if is_zip else 'legacy'}"
            file = save(model, output / f"{name}.pth", is_zip=is_zip)
            ours = pspnet_jax.load(_convert(file, labels, output / "converted" / name))
            for size in SIZES:
                image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
                theirs = logits(model, image)
                found = np.asarray(ours.logits(image[None])[0])
                row = {
                    "depth": depth,
                    "layout": "zip" if is_zip else "legacy",
                    "size": size,
                    "relative_difference": float(
                        np.abs(found - theirs).max() / np.abs(theirs).max()
                    ),
                }
                print(row, flush=True)
                yield row
        check_export(model, output / "converted" / name, depth, labels)


def check_export(model: nn.Module, converted: Path, depth: int, labels: str) -> None:
    """Raise where what we export does not load into their module, or differs."""
    file = export.run(str(converted), format="safetensors", output=f"{converted}.safetensors")
    fresh = random_network(depth, CLASSES[labels])
    fresh.load_state_dict({key: torch.zeros_like(x) for key, x in fresh.state_dict().items()})
    fresh.load_state_dict(safetensors.torch.load_file(file), strict=True)
    for key, value in model.state_dict().items():
        if not torch.equal(fresh.state_dict()[key], value):
            raise AssertionError(f"{key} of {file} differs")
    print(f"{file}: loads into their PSPNet-{depth}, equal to the bit", flush=True)


def compare_protocol(script: ModuleType, paths: list[str], output: Path) -> Iterator[dict]:
    """Each photograph as it is and turned on its side, by their function and by ours."""
    model = random_network(50, 150)
    make_decided(model)
    file = save(model, output / "decided.pth", is_zip=True)
    ours = pspnet_jax.load(_convert(file, "ade20k", output / "converted" / "decided"))
    for i, path in enumerate(paths):
        crop, base_size, scales = PROTOCOLS[i % len(PROTOCOLS)]
        image = read_image(path)
        if i % 2:
            image = np.ascontiguousarray(image.swapaxes(0, 1))
        theirs = their_probabilities(script, model, image, crop, base_size, scales)
        found = np.asarray(
            ours.probabilities(
                image, protocol="semseg", crop_size=(crop, crop), base_size=base_size, scales=scales
            )
        )
        row = {
            "image": Path(path).name,
            "size": image.shape[:2],
            "crop": crop,
            "base_size": base_size,
            "scales": scales,
            "classes": len(np.unique(theirs.argmax(-1))),
            "largest_difference": float(np.abs(found - theirs).max()),
            "equal_pixels": float((found.argmax(-1) == theirs.argmax(-1)).mean()),
        }
        print(row, flush=True)
        yield row


def random_network(depth: int, num_classes: int) -> nn.Module:
    """Their module with random weights and statistics."""
    from model.pspnet import PSPNet  # pyrefly: ignore

    torch.manual_seed(depth)
    model = PSPNet(layers=depth, classes=num_classes, pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
    return model.eval()


def make_decided(model: nn.Module) -> None:
    """Scale the classifier so that classes win by pixels: random networks are nearly constant."""
    image = np.random.default_rng(1).integers(0, 256, (97, 97, 3)).astype(np.uint8)
    found = logits(model, image)
    factor = 3 / found.std((0, 1)).mean()
    with torch.no_grad():
        bias = model.cls[4].bias
        constant = torch.from_numpy(found.mean((0, 1))) - bias
        model.cls[4].weight.mul_(factor)
        bias.copy_(-constant * factor)


def save(model: nn.Module, path: Path, *, is_zip: bool) -> Path:
    """As their training script does, under DataParallel and beside an optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    state = collections.OrderedDict((f"module.{k}", v) for k, v in model.state_dict().items())
    checkpoint = {"epoch": 100, "state_dict": state, "optimizer": optimizer.state_dict()}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=is_zip)
    return path


def logits(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """Of their module, [height, width, classes]."""
    normalized = ((image - np.array(MEAN)) / np.array(STD)).astype(np.float32)
    with torch.no_grad():
        found = model(torch.from_numpy(normalized.transpose(2, 0, 1)[None]))
    return found[0].numpy().transpose(1, 2, 0)


def their_probabilities(
    script: ModuleType,
    model: nn.Module,
    image: np.ndarray,
    crop: int,
    base_size: int,
    scales: tuple[float, ...],
) -> np.ndarray:
    """The mean over scales of their `scale_process`, on sizes by their rule."""
    height, width = image.shape[:2]
    total = np.zeros((height, width, 150))
    for scale in scales:
        long_side = round(scale * base_size)
        if height > width:
            size = (round(long_side / float(height) * width), long_side)
        else:
            size = (long_side, round(long_side / float(width) * height))
        scaled = cv2.resize(np.float32(image), size, interpolation=cv2.INTER_LINEAR)
        total += script.scale_process(model, scaled, 150, crop, crop, height, width, MEAN, STD)
    return total / len(scales)


def _convert(file: Path, labels: str, output: Path) -> Path:
    return convert.run([str(file)], labels=labels, output=str(output))


def _load_script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("semseg_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _make_it_run() -> None:
    collections.Iterable = collections.abc.Iterable  # gone since Python 3.10
    torch.Tensor.cuda = lambda self, *_, **__: self
    resize = cv2.resize

    def resize_each(image, size, interpolation, **factors):
        if image.ndim == 2 or image.shape[2] <= 4:
            return resize(image, size, interpolation=interpolation, **factors)
        channels = np.moveaxis(image, 2, 0)
        resized = [resize(c.copy(), size, interpolation=interpolation) for c in channels]
        return np.stack(resized, axis=-1)

    cv2.resize = resize_each


if __name__ == "__main__":
    main()
