"""Writes lextal_*.npz: what PyTorch, in float64, makes of the variant with image-level supervision.

    python tests/goldens/make_lextal.py

in an environment with this package and torch; the test that reads the files needs no torch.

* Parameters and running statistics are drawn by path, and tensors summarized, as in make_step.py.
* Each file holds log_softmax of the logits and the presence logits in evaluation, then losses,
  gradients and running statistics of one step in training mode, without dropout.
* The torch side is `experiments/lextal_torch.py`. Only shapes and paths come from the package.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import make_step
import numpy as np

from pspnet_jax.config import default_config
from pspnet_jax.models.families import ModelOptions

if TYPE_CHECKING:
    import torch

NUM_CLASSES = 7
BINS = (1, 2, 3, 6)
LOGITS_EVERY = 4  # pixels, of the stored scores
PRESENCE_WEIGHT = 0.7
BIASES_BEFORE_A_NORM = tuple(f"head.up{k}.conv.bias" for k in (1, 2, 3))
"""Which the norm takes away again: their gradients are 0 but for rounding."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One golden file: a network, the size of its batch, and which tensors are stored in full."""

    backbone: str
    size: tuple[int, int]
    """(height, width) of the images, pixels."""
    params: tuple[str, ...]
    statistics: tuple[str, ...]
    width: int = 8
    num_classes: int = NUM_CLASSES
    batch_size: int = 3
    batch_draw: int = 0

    def options(self, *, dtype: str) -> ModelOptions:
        """Of the network: no dropout, all else as the family has it."""
        section = default_config().model.to_dict()
        section.update(family="lextal", backbone=self.backbone, width=self.width)
        return ModelOptions.resolve(section | {"dropout_rate": 0.0, "dtype": dtype})


_HEAD_PARAMS = (
    "head.fuse.bias",
    "head.up1.norm.scale",
    "head.up3.conv.kernel",
    "head.up2.activation.slope",
    "head.classifier.bias",
    "head.up3.activation.slope",
    "head.classifier.kernel",
    "presence_head.hidden.bias",
    "presence_head.classifier.kernel",
    "presence_head.classifier.bias",
)
_HEAD_STATISTICS = (
    "head.up1.norm.mean",
    "head.up2.norm.variance",
    "head.up3.norm.mean",
    "head.up3.norm.variance",
)

CASES = {
    # A map of 5 x 7: six bins are more than there are rows.
    "resnet34": Case(
        backbone="resnet34",
        size=(40, 56),
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.layer3_0.norm1.bias",
            "backbone.layer4_0.shortcut.norm.scale",
            "backbone.layer4_2.norm2.scale",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm1.mean",
            "backbone.layer3_0.norm1.variance",
            "backbone.layer4_2.norm2.mean",
            *_HEAD_STATISTICS,
        ),
    ),
    # A map of 6 x 6, which every bin divides.
    "resnet50": Case(
        backbone="resnet50",
        size=(48, 48),
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.layer3_0.norm2.bias",
            "backbone.layer4_0.shortcut.norm.scale",
            "backbone.layer4_2.norm3.scale",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm1.variance",
            "backbone.layer3_0.norm2.variance",
            "backbone.layer4_2.norm3.mean",
            *_HEAD_STATISTICS,
        ),
    ),
    # A map of 8 x 6: bin 3 divides one side, bin 6 too.
    "squeezenet": Case(
        backbone="squeezenet",
        size=(64, 48),
        params=(
            "backbone.conv1.kernel",
            "backbone.conv1.bias",
            "backbone.layer2_0.squeeze.kernel",
            "backbone.layer3_0.expand3.kernel",
            "backbone.layer4_0.expand1.bias",
            "backbone.layer4_3.expand3.bias",
            *_HEAD_PARAMS,
        ),
        statistics=_HEAD_STATISTICS,
    ),
    # A map of 5 x 6.
    "densenet121": Case(
        backbone="densenet121",
        size=(40, 48),
        params=(
            "backbone.stem.conv1.kernel",
            "backbone.layer1_0.norm1.scale",
            "backbone.layer2_11.conv2.kernel",
            "backbone.layer3_23.norm2.bias",
            "backbone.layer4_15.conv2.kernel",
            "backbone.transition1.conv.kernel",
            "backbone.transition3.norm.scale",
            *_HEAD_PARAMS,
        ),
        statistics=(
            "backbone.stem.norm1.variance",
            "backbone.layer1_5.norm1.mean",
            "backbone.layer4_15.norm2.variance",
            "backbone.transition2.norm.mean",
            *_HEAD_STATISTICS,
        ),
    ),
}


def draw_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as in make_step.py, but four classes in each image: three are not present."""
    images, labels = make_step.draw_batch(case)
    rng = make_step.generator(f"classes of {case.backbone}")
    present = np.stack([rng.permutation(NUM_CLASSES)[:4] for _ in labels])
    chosen = np.stack([classes[mask % 4] for classes, mask in zip(present, labels, strict=True)])
    return images, np.where(labels == 255, 255, chosen).astype(np.uint8)


def class_weights() -> np.ndarray:
    """One number per class for both losses, float64."""
    return make_step.generator("class weights").uniform(0.5, 1.5, NUM_CLASSES)


def fingerprint(case: Case) -> np.ndarray:
    """Sums over all inputs, as in make_step.py."""
    return make_step.sums(*make_step.draw_state(case), *draw_batch(case))


def run_torch(case: Case) -> dict[str, np.ndarray]:
    """Everything a golden file holds, by PyTorch in float64."""
    import lextal_torch
    import pspnet_torch
    import torch

    params, batch_stats = make_step.draw_state(case)
    model = lextal_torch.PSPNet(
        case.backbone, NUM_CLASSES, width=case.width, bins=BINS, dropout_rates=(0.0, 0.0)
    ).double()
    lextal_torch.load_parameters(model, params, batch_stats, backbone=case.backbone, bins=BINS)
    images, labels = map(torch.from_numpy, draw_batch(case))
    inputs = pspnet_torch.normalize(images, torch.float64)

    def collect(tree: Mapping, tensors: Mapping[str, "torch.Tensor"]) -> dict[str, np.ndarray]:
        """Tensors of the state_dict under our paths, in our axes."""
        keys = {path: lextal_torch.torch_key(path, case.backbone, BINS) for path, _ in paths(tree)}
        return {
            path: np.array(lextal_torch.from_torch(tensors[key].detach().numpy()))
            for path, key in keys.items()
        }

    paths = make_step.flatten
    model.eval()
    with torch.no_grad():
        logits, presence_logits = model(inputs)
    scores = torch.log_softmax(logits, dim=1).permute(0, 2, 3, 1).numpy()
    model.train()
    losses = lextal_torch.variant_loss(
        *model(inputs),
        labels.long(),
        presence_weight=PRESENCE_WEIGHT,
        class_weights=torch.from_numpy(class_weights()),
    )
    losses[0].backward()
    gradients = {key: p.grad for key, p in model.named_parameters(remove_duplicate=False)}
    return {
        "fingerprint": fingerprint(case),
        "log_probabilities": scores[:, ::LOGITS_EVERY, ::LOGITS_EVERY].astype(np.float32),
        "presence_logits": presence_logits.numpy(),
        "losses": np.array([loss.item() for loss in losses]),
        **make_step.stored("gradient", collect(params, gradients), case.params),
        **make_step.stored("statistic", collect(batch_stats, model.state_dict()), case.statistics),
    }


def main() -> None:
    """Write every golden file beside this one."""
    sys.path.insert(0, str(make_step.FOLDER.parent.parent / "experiments"))
    for name, case in CASES.items():
        path = make_step.FOLDER / f"lextal_{name}.npz"
        np.savez_compressed(path, **run_torch(case))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
