"""Our variant with image-level supervision beside its original modules, with random weights, full width.

    git clone https://github.com/Lextal/pspnet-pytorch
    python experiments/compare_lextal.py --lextal=pspnet-pytorch --output=runs/compare_lextal

in an environment with this package, torch and pillow. For each of its seven backbones, log_softmax of the logits and
the presence logits are compared in evaluation and, with batch statistics and without dropout, in training:
float64 on both sides. A ResNet's checkpoint, saved as its training script does, is also converted and
compared in float32, and what `export` makes of it is loaded into the original module, strictly, and must be
equal to the bit. Its views of an image (pillow) are set beside ours: 2,000 windows of each by their edges, and
labels stretched and rotated by the same numbers.

So that the original runs: resizing maps corners onto corners as in its time, dots in names of submodules
become underscores, and torchvision, from which it would download weights, is replaced by nothing.
"""

import argparse
import collections
import copy
import functools
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import lextal_torch
import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from distributions import distances
from flax import nnx
from PIL import Image
from torch import nn

import pspnet_jax
from pspnet_jax import convert, export
from pspnet_jax.arrays import Example, Outputs
from pspnet_jax.config import default_config
from pspnet_jax.data import transforms, views
from pspnet_jax.models.families import IMAGENET_8BIT, ModelOptions
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.progress import log_to
from pspnet_jax.train_step import normalize, split_model

# Our backbone -> its name there, channels of the last stage and of the third.
BACKBONES = {
    "resnet18": ("resnet18", 512, 256),
    "resnet34": ("resnet34", 512, 256),
    "resnet50": ("resnet50", 2048, 1024),
    "resnet101": ("resnet101", 2048, 1024),
    "resnet152": ("resnet152", 2048, 1024),
    "squeezenet": ("squeezenet", 512, 256),
    "densenet121": ("densenet", 1024, 512),
}
LABELS = "voc2012"
NUM_CLASSES = 21
BINS = (1, 2, 3, 6)
SIZES = ((64, 64), (40, 72))


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lextal", required=True, help="checkout of Lextal/pspnet-pytorch")
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    parser.add_argument("--output", default="runs/compare_lextal")
    arguments = parser.parse_args()
    log_to(None)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / "converted", ignore_errors=True)
    _make_it_run(arguments.lextal)
    rows = [*compare_windows(), *compare_labels()]
    for backbone in arguments.backbones:
        model = random_network(backbone)
        rows += compare_directly(model, backbone)
        if backbone.startswith("resnet"):
            rows += compare_converted(model, backbone, output)
        (output / "results.json").write_text(json.dumps(rows, indent=2) + "\n")


def compare_directly(model: nn.Module, backbone: str) -> Iterator[dict]:
    """Both modes and sizes in float64, on equal parameters."""
    model = model.double()
    values = {published_key(key): value.numpy() for key, value in model.state_dict().items()}
    with jax.enable_x64(True):
        graphdef, params, batch_stats = split_model(abstract_network(backbone))
        params, batch_stats = (take(tree, values, backbone) for tree in (params, batch_stats))
        state = (params, batch_stats)

        @functools.partial(jax.jit, static_argnames="train")
        def run(state: tuple[dict, dict], images: jax.Array, *, train: bool) -> Outputs:
            return nnx.merge(graphdef, *state)(images, train=train, key=jax.random.key(0))

        for size in SIZES:
            images = draw_images(size)
            inputs = np.asarray(normalize(jnp.asarray(images), IMAGENET_8BIT, dtype=jnp.float64))
            for mode in ("evaluation", "training"):
                # A copy: a step of training changes the running statistics.
                network = copy.deepcopy(model).train(mode == "training")
                with torch.no_grad():
                    theirs = network(torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy()))
                found = run(state, inputs, train=mode == "training")
                row = {"backbone": backbone, "how": mode, "size": size}
                scores = jax.nn.log_softmax(found.logits)
                row["log_softmax"] = difference(scores, theirs[0].permute(0, 2, 3, 1))
                if found.presence_logits is not None:
                    row["presence"] = difference(found.presence_logits, theirs[1])
                print(row, flush=True)
                yield row


def compare_converted(model: nn.Module, backbone: str, output: Path) -> Iterator[dict]:
    """Its file through `convert` in float32, and back through `export`."""
    model = model.float().eval()
    file = output / f"PSPNet_{backbone}"
    torch.save(
        collections.OrderedDict((f"module.{k}", v) for k, v in model.state_dict().items()), file
    )
    converted = output / "converted" / backbone
    convert.run([str(file)], labels=LABELS, family="lextal", output=str(converted))
    ours = pspnet_jax.load(converted)
    for size in SIZES:
        images = draw_images(size)
        inputs = np.asarray(normalize(jnp.asarray(images), IMAGENET_8BIT, dtype=jnp.float32))
        with torch.no_grad():
            theirs, _ = model(torch.from_numpy(inputs.transpose(0, 3, 1, 2).copy()))
        scores = jax.nn.log_softmax(jnp.asarray(ours.logits(images)))
        row = {"backbone": backbone, "how": "converted", "size": size}
        row["log_softmax"] = difference(scores, theirs.permute(0, 2, 3, 1))
        print(row, flush=True)
        yield row
    exported = export.run(str(converted), format="safetensors", output=f"{converted}.safetensors")
    fresh = random_network(backbone)
    fresh.load_state_dict({key: torch.zeros_like(x) for key, x in fresh.state_dict().items()})
    fresh.load_state_dict(safetensors.torch.load_file(exported), strict=True)
    unequal = [
        k for k, v in model.state_dict().items() if not torch.equal(fresh.state_dict()[k], v)
    ]
    if unequal:
        raise AssertionError(f"{unequal} of {exported} differ")
    print(f"{exported}: loads into the original {backbone}, equal to the bit", flush=True)


def compare_windows() -> Iterator[dict]:
    """Edges of 2,000 windows on each side: the distance of Kolmogorov and Smirnov between the two.

    Under 0.043 nineteen times in twenty where the distributions are the same.
    """
    import augmentation  # pyrefly: ignore

    for height, width in ((200, 200), (150, 240)):
        rows, columns = np.mgrid[:height, :width].astype(np.uint8)
        image, labels = np.stack([rows, columns, rows], axis=2), np.zeros((height, width), np.uint8)
        their_crop = augmentation.RandomSizedCrop(256, Image.BILINEAR)
        options = transforms.resolve({"recipe": "lextal", "rotation_probability": 0.0})
        options["flip_probability"] = 0.0
        our_crop = transforms.make_augment(options, (256, 256), fill=(0, 0, 0))
        random.seed(0)
        theirs, ours = [], []
        for seed in range(2000):
            view = their_crop((Image.fromarray(image), Image.fromarray(labels)))[0]
            theirs.append(edges(np.asarray(view)))
            example = Example(image, labels, np.int32(0))
            ours.append(edges(our_crop(example, np.random.default_rng(seed)).image))
        names = ("top", "bottom", "left", "right", "height", "width")
        found = distances(names, ours, theirs)
        row = {"how": "windows", "size": (height, width), "distances": found}
        print(row, flush=True)
        yield row


def edges(view: np.ndarray) -> tuple[float, ...]:
    """Top, bottom, left, right, height and width of a window of a picture whose colors are coordinates."""
    top, bottom = (float(view[i, 128, 0]) for i in (0, -1))
    left, right = (float(view[128, i, 1]) for i in (0, -1))
    return top, bottom, left, right, bottom - top, right - left


def compare_labels() -> Iterator[dict]:
    """Share of pixels whose label differs, of their stretching and rotation and ours."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 12, (30, 40)).astype(np.uint8)
    labels = blocks.repeat(12, axis=0).repeat(12, axis=1)
    for height, width in ((200, 300), (256, 256), (300, 333), (121, 77)):
        window = labels[:height, :width].copy()
        theirs = np.asarray(Image.fromarray(window).resize((256, 256), Image.NEAREST))
        image = np.zeros((height, width, 3), np.uint8)
        plan = views.Plan(views.scaling(256 / width, 256 / height), (256, 256), (0, 0))
        found = views.render(image, window, plan, (256, 256), fill=(0, 0, 0))[1]
        row = {"how": "stretched labels", "size": (height, width)}
        row["share"] = float((found != theirs).mean())
        print(row, flush=True)
        yield row
    square = labels[:256, :256].copy()
    image = np.zeros((256, 256, 3), np.uint8)
    shares = []
    for degrees in range(-10, 10):
        theirs = np.asarray(Image.fromarray(square + 1).rotate(degrees)) - 1  # its 0 becomes 255
        turn = views.rotation(degrees, (127.5, 127.5))
        plan = views.Plan(turn, (256, 256), (0, 0), is_rotated=True)
        rotated = views.render(image, square, plan, (256, 256), fill=(0, 0, 0))
        shares.append(float((rotated[1] != theirs).mean()))
    row = {"how": "labels rotated by -10 .. 9 degrees", "size": (256, 256), "share": max(shares)}
    print(row, flush=True)
    yield row


def random_network(backbone: str) -> nn.Module:
    """The original module as it starts, with random statistics and without dropout."""
    import pspnet  # pyrefly: ignore

    torch.manual_seed(0)
    name, channels, deep_channels = BACKBONES[backbone]
    model = pspnet.PSPNet(
        n_classes=NUM_CLASSES,
        psp_size=channels,
        deep_features_size=deep_channels,
        backend=name,
        pretrained=False,
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    return model.eval()


def abstract_network(backbone: str) -> PSPNet:
    """Ours without values, in float64."""
    section = default_config().model.to_dict()
    section.update(family="lextal", backbone=backbone, dropout_rate=0.0, dtype="float64")
    options = ModelOptions.resolve(section)
    return nnx.eval_shape(lambda: PSPNet(options, NUM_CLASSES, rng=NoRandomNumbers()))


def take(tree: dict, state: dict[str, np.ndarray], backbone: str, prefix: str = "") -> dict:
    """Our tree with the values of their state_dict, in our axes."""
    taken = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            taken[name] = take(value, state, backbone, f"{path}.")
            continue
        array = lextal_torch.from_torch(state[lextal_torch.torch_key(path, backbone, BINS)])
        if array.shape != value.shape:
            raise AssertionError(f"{path} is {value.shape} here, {array.shape} there")
        taken[name] = jnp.asarray(array)
    return taken


def published_key(key: str) -> str:
    """The key as it was when submodules could have dots in their names."""
    return key.replace("norm_", "norm.").replace("conv_", "conv.")


def draw_images(size: tuple[int, int]) -> np.ndarray:
    """Two images of noise."""
    return np.random.default_rng(0).integers(0, 256, (2, *size, 3)).astype(np.uint8)


def difference(ours: jax.Array, theirs: torch.Tensor) -> float:
    """The largest, relative to the range of the values (those of random networks lie close together)."""
    expected = theirs.numpy()
    return float(np.abs(np.asarray(ours) - expected).max() / np.ptp(expected))


def _make_it_run(checkout: str) -> None:
    sys.path.insert(0, checkout)
    collections.Iterable = collections.abc.Iterable  # gone since Python 3.10
    for name in ("densenet", "squeezenet"):
        module = ModuleType(f"torchvision.models.{name}")
        for function in ("densenet121", "densenet161", "squeezenet1_1"):
            setattr(module, function, lambda **_: type("Empty", (), {"features": nn.Sequential()}))
        sys.modules[module.__name__] = module
    for name in ("torchvision", "torchvision.models"):
        sys.modules[name] = ModuleType(name)

    def upsample(input: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
        return F.interpolate(input, size=size, mode=mode, align_corners=True)

    F.upsample = upsample
    add_module = nn.Module.add_module
    nn.Module.add_module = lambda self, name, module: add_module(
        self, name.replace(".", "_"), module
    )


if __name__ == "__main__":
    main()
