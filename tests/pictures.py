"""Small photographs and masks in the layouts that the package reads."""

from pathlib import Path

import cv2
import numpy as np

from pspnet_jax.arrays import Example


def example(height=40, width=50, *, num_classes=11, seed=0) -> Example:
    """Smooth color blobs whose class is their color."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, num_classes, (4, 5)).astype(np.uint8)
    labels = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    colors = np.random.default_rng(99).integers(40, 216, (num_classes, 3))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Example((colors[labels] + noise).astype(np.uint8), labels, np.int32(seed))


class ExampleSource:
    """A few examples in memory."""

    def __init__(self, num_examples=6, *, sizes=((40, 50),), num_classes=11):
        self._examples = [
            example(*sizes[i % len(sizes)], num_classes=num_classes, seed=i)
            for i in range(num_examples)
        ]

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        return self._examples[index]


def write_split(
    root: Path, split: str, num_images: int, *, size=(40, 50), raw_offset=0, masks="annotations"
) -> None:
    """Images and masks of one split; masks hold class + raw_offset (ADE20K's raw ids start at 1)."""
    for folder in ("images", masks):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for i in range(num_images):
        made = example(*size, seed=i)
        write_image(root / "images" / split / f"{split}_{i:04d}.jpg", made.image)
        mask = made.labels + np.uint8(raw_offset)
        assert cv2.imwrite(str(root / masks / split / f"{split}_{i:04d}.png"), mask)


def write_image(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])
