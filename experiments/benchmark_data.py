"""The input pipeline beside the authors' step-by-step one, rewritten in float32 from the facts.

    python experiments/benchmark_data.py --output=runs/benchmark_data [--workers=0,1,2]

One thread on each side, photographs of 512 x 683 painted here, crops of 473, recipe `semseg`; interleaved, medians:

* augmentation of decoded arrays: ours (uint8, one sampling; the accelerator normalizes) against the steps, once
  with and once without their normalization to channels first;
* the same with decoding a JPEG and a PNG of the same pictures;
* whole batches of 16 through Grain with 0, 1, 2 ... worker processes.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import grain
import numpy as np
import semseg_steps
from absl import flags

from pspnet_jax.arrays import Example
from pspnet_jax.catalog import load_label_set
from pspnet_jax.data import transforms
from pspnet_jax.data.folders import FolderSource, read_image, read_mask
from pspnet_jax.data.pipeline import training_batches
from pspnet_jax.data.scenes import render

CROP = (473, 473)


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/benchmark_data")
    parser.add_argument("--workers", default="0,1,2", help="numbers of worker processes")
    parser.add_argument("--repeats", type=int, default=5, help="rounds over all pictures")
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--batches", type=int, default=20, help="of each number of workers")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        paint(Path(folder), arguments.pictures)
        found = {
            "versions": {"opencv": cv2.__version__, "grain": grain.__version__},
            "cores": os.cpu_count(),
            "milliseconds": compare(Path(folder), arguments.repeats),
            "images_per_second": {
                workers: round(rate(folder, int(workers), arguments.batches), 1)
                for workers in arguments.workers.split(",")
            },
        }
    (output / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    print(table(found))


def paint(folder: Path, count: int) -> None:
    """Pictures of 512 x 683 with texture and noise, as JPEG and PNG in the layout `camvid`."""
    images, masks = folder / "images/train", folder / "annotations/train"
    for path in (images, masks):
        path.mkdir(parents=True)
    for index in range(count):
        image, labels = render(0, index)
        image = cv2.resize(image, (683, 512), interpolation=cv2.INTER_CUBIC)
        noise = np.random.default_rng(index).normal(0, 6, image.shape)
        image = (image + noise).clip(0, 255).astype(np.uint8)
        labels = cv2.resize(labels, (683, 512), interpolation=cv2.INTER_NEAREST)
        cv2.imwrite(
            str(images / f"{index:02}.jpg"), image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90]
        )
        cv2.imwrite(str(masks / f"{index:02}.png"), np.minimum(labels, 10))


def compare(folder: Path, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds an image of each variant: lowest, median and highest over the rounds."""
    paths = sorted((folder / "images/train").iterdir())
    masks = sorted((folder / "annotations/train").iterdir())
    view = transforms.make_augment(
        transforms.resolve({"recipe": "semseg"}), CROP, fill=(124, 116, 104)
    )
    decoded = [(read_image(a), read_mask(b)) for a, b in zip(paths, masks, strict=True)]
    floats = [(image.astype(np.float32), labels) for image, labels in decoded]

    def ours(image: np.ndarray, labels: np.ndarray, seed: int) -> object:
        return view(Example(image, labels, np.int32(0)), np.random.default_rng(seed))

    def steps(image: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
        draws = semseg_steps.draw(np.random.default_rng(seed))
        return semseg_steps.augment(image, labels, draws, CROP)[0]

    def file_of(i: int) -> tuple[np.ndarray, np.ndarray]:
        return read_image(paths[i]), read_mask(masks[i])

    def steps_of_file(i: int, seed: int) -> np.ndarray:
        image, labels = file_of(i)
        return steps(np.float32(image), labels, seed)

    variants: dict[str, Callable[[int, int], object]] = {
        "ours": lambda i, seed: ours(*decoded[i], seed),
        "steps": lambda i, seed: steps(*floats[i], seed),
        "steps, normalized": lambda i, seed: semseg_steps.normalize(steps(*floats[i], seed)),
        "ours, decoded": lambda i, seed: ours(*file_of(i), seed),
        "steps, decoded and normalized": lambda i, seed: semseg_steps.normalize(
            steps_of_file(i, seed)
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            for i in range(len(paths)):
                run(i, repeat * len(paths) + i)
            times[name].append((time.perf_counter() - start) / len(paths) * 1e3)
    return {
        name: {"low": min(t), "median": float(np.median(t)), "high": max(t)}
        for name, t in times.items()
    }


def rate(folder: str, workers: int, num_batches: int, *, crop: tuple[int, int] = CROP) -> float:
    """Images per second of whole batches of 16, after the first ones."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    label_set = load_label_set("camvid")
    source = FolderSource(folder, layout="camvid", split="train", label_set=label_set)
    view = transforms.make_augment(
        transforms.resolve({"recipe": "semseg"}), crop, fill=(124, 116, 104)
    )
    batches = training_batches(
        source, view, global_batch_size=16, seed=0, first_step=0, num_workers=workers
    )
    skipped = 4 + 4 * workers  # started, and what was read ahead meanwhile
    for _ in itertools.islice(batches, skipped):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
        pass
    return 16 * num_batches / (time.perf_counter() - start)


def table(found: dict) -> str:
    """As Markdown, with the ratios."""
    times = found["milliseconds"]
    lines = ["| pipeline, one thread | ms an image (low, median, high) |", "|---|---|"]
    for name, t in times.items():
        lines.append(f"| {name} | {t['low']:.2f}, {t['median']:.2f}, {t['high']:.2f} |")
    pairs = {
        "augmentation": ("steps", "ours"),
        "augmentation and normalization": ("steps, normalized", "ours"),
        "with decoding": ("steps, decoded and normalized", "ours, decoded"),
    }
    lines.append("")
    for name, (theirs, ours) in pairs.items():
        ratio = times[theirs]["median"] / times[ours]["median"]
        lines.append(f"{name}: ours is {ratio:.2f} times as fast")
    rates = ", ".join(f"{n} workers {r}" for n, r in found["images_per_second"].items())
    return "\n".join([*lines, f"images per second, batches of 16: {rates}"])


if __name__ == "__main__":
    main()
