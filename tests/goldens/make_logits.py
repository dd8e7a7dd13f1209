"""Writes logits_*.npz: PyTorch's class scores in evaluation of the authors' PSPNet, at image size.

    python tests/goldens/make_logits.py

in an environment with this package and torch; the test that reads the files needs no torch.

* Parameters and running statistics are drawn by path, as in make_step.py.
* Computed in float64 and stored in float32: every 16th pixel, beginning between the pixels of the
  map, where a score is a mixture of four of them.
"""

import sys
from dataclasses import dataclass

import make_step
import numpy as np

PIXELS = (slice(3, None, 16), slice(6, None, 16))  # rows and columns that are stored


@dataclass(frozen=True, kw_only=True)
class Case(make_step.Network):
    """One golden file: a network, the sizes of its images, and how much of its logits is stored."""

    sizes: tuple[tuple[int, int], ...]
    """(height, width) of the images, pixels."""
    batch_size: int = 2
    every_class: int = 1

    def stored(self, logits: np.ndarray) -> np.ndarray:
        """What the file holds of logits [batch, height, width, classes] at image size."""
        return logits[:, *PIXELS, :: self.every_class]


# Maps of 12 x 12, which every bin divides; of 11 x 7, which none but 1 does; and of 5 x 8, which has
# fewer rows than the widest bins.
SIZES = ((89, 89), (81, 49), (33, 57))
CASES = {
    "resnet50": Case(backbone="resnet50", sizes=SIZES),
    "resnet101": Case(backbone="resnet101", sizes=SIZES),
    "resnet152": Case(backbone="resnet152", sizes=SIZES),
    # As published for ADE20K.
    "resnet50_width64": Case(
        backbone="resnet50",
        width=64,
        num_classes=150,
        sizes=((473, 473),),
        batch_size=1,
        every_class=10,
    ),
}


def draw_images(case: Case, size: tuple[int, int]) -> np.ndarray:
    """Images u8[batch, height, width, 3] of coarse patches with noise."""
    rng, (height, width) = make_step.generator(f"images of {size}"), size
    cells = (case.batch_size, height // 16 + 1, width // 16 + 1, 3)
    patches = rng.integers(0, 256, cells).repeat(16, axis=1).repeat(16, axis=2)
    noise = rng.integers(-40, 41, (case.batch_size, height, width, 3))
    return np.clip(patches[:, :height, :width] + noise, 0, 255).astype(np.uint8)


def fingerprint(case: Case) -> np.ndarray:
    """Sums over all inputs, as in make_step.py."""
    return make_step.fingerprint(case, *(draw_images(case, size) for size in case.sizes))


def key(size: tuple[int, int]) -> str:
    """Under which the file holds the logits of images of a size."""
    return f"logits_{size[0]}x{size[1]}"


def run_torch(case: Case) -> dict[str, np.ndarray]:
    """Everything a golden file holds, by PyTorch in float64."""
    import pspnet_torch
    import torch

    model = make_step.torch_network(case).eval()
    golden = {"fingerprint": fingerprint(case)}
    for size in case.sizes:
        images = torch.from_numpy(draw_images(case, size))
        with torch.no_grad():
            logits = model(pspnet_torch.normalize(images, torch.float64))[0]
        golden[key(size)] = case.stored(logits.permute(0, 2, 3, 1).numpy()).astype(np.float32)
    return golden


def main() -> None:
    """Write every golden file beside this one."""
    sys.path.insert(0, str(make_step.FOLDER.parent.parent / "experiments"))
    for name, case in CASES.items():
        path = make_step.FOLDER / f"logits_{name}.npz"
        np.savez_compressed(path, **run_torch(case))
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
