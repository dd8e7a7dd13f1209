"""Writes step_*.npz: what PyTorch, in float64, makes of two training steps of the authors' PSPNet.

    python tests/goldens/make_step.py

in an environment with this package and torch; the test that reads the files needs no torch.

* Parameters are not stored. Both sides draw each one from a generator seeded by its dotted path,
  so a parameter that lands in the wrong place has a wrong value.
* Of every gradient, running statistic and movement (parameter after two steps minus before) the
  file holds two numbers: the norm, and the product with a fixed random direction, which also sees
  permutations. A dozen small ones are stored in full.
* The torch side is `experiments/pspnet_torch.py`. Only shapes and paths come from the package.
"""

import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pspnet_jax import passes
from pspnet_jax.config import default_config
from pspnet_jax.models.families import IMAGENET_8BIT, ModelOptions

if TYPE_CHECKING:
    import pspnet_torch

FOLDER = Path(__file__).parent
NUM_CLASSES = 7
NUM_STEPS = 10  # of the poly schedule; two are taken
LOGITS_EVERY = 4  # pixels, of the stored logits
OPTIMIZER = {
    "learning_rate": 0.01,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "head_multiplier": 10.0,
}
AUX_WEIGHT = 0.4


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network without dropout, all else as the family has it."""

    backbone: str
    stem: str = "deep"
    width: int = 8
    num_classes: int = NUM_CLASSES

    def options(self, *, dtype: str) -> ModelOptions:
        """Of the network, resolved."""
        section = default_config().model.to_dict()
        section.update(
            backbone=self.backbone, stem=self.stem, width=self.width, dropout_rate=0.0, dtype=dtype
        )
        return ModelOptions.resolve(section)


@dataclass(frozen=True, kw_only=True)
class Case(Network):
    """One golden file: a network, the size of its batch, and which tensors are stored in full."""

    size: tuple[int, int]
    """(height, width) of the images, pixels."""
    params: tuple[str, ...]
    statistics: tuple[str, ...]
    batch_size: int = 3
    batch_draw: int = 3
    """Number of the batch, among all that could be drawn: see `draw_batch`."""


_HEAD_PARAMS = (
    "pyramid.level1.norm.bias",
    "pyramid.level6.norm.scale",
    "head.norm.bias",
    "head.classifier.kernel",
    "head.classifier.bias",
    "aux_head.norm.scale",
    "aux_head.classifier.bias",
)
_HEAD_STATISTICS = (
    "pyramid.level1.norm.mean",
    "pyramid.level1.norm.variance",
    "pyramid.level2.norm.variance",
    "pyramid.level6.norm.mean",
    "head.norm.mean",
    "head.norm.variance",
    "aux_head.norm.mean",
    "aux_head.norm.variance",
)

CASES = {
    # A map of 9 x 7: no bin but 1 divides both sides.
    "resnet50": Case(
        backbone="resnet50",
        size=(65, 49),
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.stem.norm3.scale",
            "backbone.layer1_0.conv2.kernel",
            "backbone.layer2_0.shortcut.norm.scale",
            "backbone.layer3_0.norm2.bias",
            "backbone.layer4_2.norm3.scale",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm1.variance",
            "backbone.layer1_0.shortcut.norm.mean",
            "backbone.layer3_0.norm2.variance",
            "backbone.layer4_0.norm2.mean",
            "backbone.layer4_2.norm3.variance",
            *_HEAD_STATISTICS,
        ),
    ),
    # A map of 5 x 5: six bins are more than there are rows.
    "resnet18": Case(
        backbone="resnet18",
        stem="7x7",
        size=(33, 33),
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.stem.norm1.scale",
            "backbone.layer1_0.conv1.kernel",
            "backbone.layer3_0.norm1.bias",
            "backbone.layer4_0.shortcut.norm.scale",
            "backbone.layer4_1.norm2.scale",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm1.mean",
            "backbone.layer2_0.norm1.variance",
            "backbone.layer3_0.norm1.mean",
            "backbone.layer4_1.norm2.variance",
            *_HEAD_STATISTICS,
        ),
    ),
    # A map of 6 x 6: every bin divides it, so that pooling is the mean of a reshape.
    "resnet101": Case(
        backbone="resnet101",
        size=(41, 41),
        batch_draw=43,
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.layer2_3.norm3.bias",
            "backbone.layer3_0.shortcut.norm.scale",
            "backbone.layer3_11.norm1.scale",
            "backbone.layer3_22.norm3.scale",
            "backbone.layer4_0.norm2.bias",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm2.mean",
            "backbone.layer3_11.norm2.variance",
            "backbone.layer3_22.norm3.mean",
            "backbone.layer4_2.norm3.variance",
            *_HEAD_STATISTICS,
        ),
    ),
    # A map of 6 x 5: every bin divides one side, none but 1 the other.
    "resnet152": Case(
        backbone="resnet152",
        size=(41, 33),
        batch_draw=145,
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.layer2_7.norm3.bias",
            "backbone.layer3_0.shortcut.norm.scale",
            "backbone.layer3_17.norm1.scale",
            "backbone.layer3_35.norm3.scale",
            "backbone.layer4_0.norm2.bias",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm2.mean",
            "backbone.layer3_17.norm2.variance",
            "backbone.layer3_35.norm3.mean",
            "backbone.layer4_2.norm3.variance",
            *_HEAD_STATISTICS,
        ),
    ),
}


def generator(name: str) -> np.random.Generator:
    """Random numbers that depend on `name` alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter or running statistic, float64, by its dotted path."""
    rng, leaf = generator(path), path.rpartition(".")[2]
    if leaf == "kernel":
        return rng.standard_normal(shape) * (2 / np.prod(shape[:-1])) ** 0.5
    if leaf == "variance":
        return rng.uniform(0.5, 1.5, shape)
    values = (leaf == "scale") + 0.1 * rng.standard_normal(shape)
    # The last norm of a bottleneck starts small: else gradients grow so much on their way to the
    # stem that rounding decides what arrives there in float32.
    is_last_norm = path.startswith("backbone.layer") and path.endswith("norm3.scale")
    return values * 0.25 if is_last_norm else values


def draw_tree(tree: Mapping, prefix: str = "") -> dict:
    """Nested dictionaries of the same shapes, drawn by path."""
    return {
        key: draw_tree(value, f"{prefix}{key}.")
        if isinstance(value, Mapping)
        else draw(prefix + key, value.shape)
        for key, value in tree.items()
    }


def draw_state(network: Network) -> tuple[dict, dict]:
    """Parameters and running statistics of a network as nested dictionaries, float64."""
    options = network.options(dtype="float32")
    _, params, batch_stats = passes.structure(
        passes.Network(options, network.num_classes, IMAGENET_8BIT)
    )
    return draw_tree(params), draw_tree(batch_stats)


def draw_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images u8[batch, height, width, 3] and labels u8[batch, height, width], 15 % of them ignored.

    Coarse patches with noise, so that the images differ as wholes and the widest pyramid bin has
    something to tell them apart by. `batch_draw` is one in which no activation is so near to 0
    that rounding in float32 would carry it to the other side of a ReLU: among some 800,000 of
    the deeper networks the nearest is 7e-6 of its channel's root mean square away.
    """
    rng, (height, width) = generator(f"batch of {case.backbone} {case.batch_draw}"), case.size
    patches = rng.integers(0, 256, (case.batch_size, 5, 4, 3)).repeat(16, axis=1).repeat(16, axis=2)
    noise = rng.integers(-40, 41, (case.batch_size, height, width, 3))
    images = np.clip(patches[:, :height, :width] + noise, 0, 255).astype(np.uint8)
    areas = (
        rng.integers(0, NUM_CLASSES, (case.batch_size, 9, 7)).repeat(8, axis=1).repeat(8, axis=2)
    )
    ignored = rng.random((case.batch_size, height, width)) < 0.15
    return images, np.where(ignored, 255, areas[:, :height, :width]).astype(np.uint8)


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """(dotted path, array) of every leaf of nested dictionaries, sorted by path at each level."""
    for key, value in sorted(tree.items()):
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, np.asarray(value)


def summarize(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """[tensors, 2]: norm, and product with a random direction, in order of path."""
    rows = []
    for path, array in sorted(arrays.items()):
        array = np.asarray(array, np.float64)
        direction = generator("direction of " + path).standard_normal(array.shape)
        rows.append((np.linalg.norm(array), np.sum(array * direction)))
    return np.array(rows)


def fingerprint(network: Network, *batch: np.ndarray) -> np.ndarray:
    """Sums over all inputs: tells a changed random stream from a changed network."""
    return sums(*draw_state(network), *batch)


def sums(params: Mapping, batch_stats: Mapping, *batch: np.ndarray) -> np.ndarray:
    """Of the absolute values of a network's state, and of each array of a batch."""
    state = [np.abs(array).sum() for tree in (params, batch_stats) for _, array in flatten(tree)]
    return np.array([sum(state), *(array.sum(dtype=np.int64) for array in batch)])


def torch_network(network: Network) -> "pspnet_torch.PSPNet":
    """The same network by PyTorch in float64, holding what `draw_state` gives."""
    import pspnet_torch

    bins = network.options(dtype="float32").pyramid_bins
    model = pspnet_torch.PSPNet(
        network.backbone,
        network.num_classes,
        width=network.width,
        stem=network.stem,
        bins=bins,
        dropout_rate=0.0,
    ).double()
    pspnet_torch.load_parameters(model, *draw_state(network), bins=bins)
    return model


def run_torch(case: Case) -> dict[str, np.ndarray]:
    """Everything a golden file holds, by PyTorch in float64."""
    import pspnet_torch
    import torch

    model, bins = torch_network(case), case.options(dtype="float32").pyramid_bins
    params, batch_stats = draw_state(case)
    images, labels = map(torch.from_numpy, draw_batch(case))
    inputs = pspnet_torch.normalize(images, torch.float64)
    param_paths = [path for path, _ in flatten(params)]
    statistic_paths = [path for path, _ in flatten(batch_stats)]

    def collect(paths: list[str], tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Tensors of the state_dict under our paths, in our axes."""
        arrays = {}
        for path in paths:
            key, axes = pspnet_torch.torch_key(path, bins)
            array = tensors[key].detach().numpy()
            arrays[path] = np.array(array if axes is None else array.transpose(np.argsort(axes)))
        return arrays

    model.eval()
    with torch.no_grad():
        logits = model(inputs)[0].permute(0, 2, 3, 1).numpy()
    model.train()
    optimizer = pspnet_torch.make_sgd(model, **OPTIMIZER)
    for step in range(2):
        pspnet_torch.set_poly_learning_rate(optimizer, step, num_steps=NUM_STEPS)
        losses = pspnet_torch.segmentation_loss(
            *model(inputs), labels.long(), aux_weight=AUX_WEIGHT
        )
        optimizer.zero_grad()
        losses[0].backward()
        if step == 0:
            first_losses = [loss.item() for loss in losses]
            gradients = collect(param_paths, {k: p.grad for k, p in model.named_parameters()})
            statistics = collect(statistic_paths, model.state_dict())
        optimizer.step()
    after = collect(param_paths, dict(model.named_parameters()))
    movements = {path: after[path] - before for path, before in flatten(params)}
    return {
        "fingerprint": fingerprint(case, *draw_batch(case)),
        "logits": logits[:, ::LOGITS_EVERY, ::LOGITS_EVERY].astype(np.float32),
        "losses": np.array(first_losses),
        **stored("gradient", gradients, case.params),
        **stored("statistic", statistics, case.statistics),
        **stored("movement", movements, case.params),
    }


def stored(kind: str, arrays: Mapping[str, np.ndarray], full: tuple[str, ...]) -> dict:
    """What a file holds of tensors: a summary of all, and the values of a few."""
    rows = {f"{kind}s": summarize(arrays)}
    return rows | {f"{kind}/{path}": arrays[path].astype(np.float32) for path in full}


def main() -> None:
    """Write every golden file beside this one."""
    sys.path.insert(0, str(FOLDER.parent.parent / "experiments"))
    for name, case in CASES.items():
        path = FOLDER / f"step_{name}.npz"
        np.savez_compressed(path, **run_torch(case))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
