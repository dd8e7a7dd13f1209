"""Figures of a run that hold none of its photographs: the training curve, class maps of validation images.

    python experiments/figures.py --checkpoint=runs/camvid_resnet18 --output=experiments/pictures

Writes NAME_curve.png (loss of the main head and validation scores against the step) and NAME_class_maps.png (truth and prediction of
the images that the report shows) for a run folder NAME. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

import pspnet_jax
from pspnet_jax.arrays import IGNORE_LABEL
from pspnet_jax.config import from_json
from pspnet_jax.evaluate import open_split
from pspnet_jax.report import panel_indices
from pspnet_jax.visualize import colorize, encode_png, grid, panel
from pspnet_jax.whole_files import write_whole


def draw_curve(run: Path, target: Path) -> None:
    """The loss of the main head, as logged and as a mean over nine rows, and the mean IoU of each evaluation."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if "main_loss" in row]
    steps, losses = ([row[key] for row in logged] for key in ("step", "main_loss"))
    smooth = [np.mean(losses[max(i - 4, 0) : i + 5]) for i in range(len(losses))]
    figure, axis = plt.subplots(figsize=(6, 3))
    axis.plot(steps, losses, color="0.8", linewidth=1)
    axis.plot(steps, smooth, color="tab:blue")
    axis.set(xlabel="step", title=run.name)
    axis.set_ylabel("loss (nats per pixel)", color="tab:blue")
    scores = [(row["step"], row[key]) for row in rows for key in row if key.endswith("/mean_iou")]
    if scores:
        beside = axis.twinx()
        beside.plot(*zip(*scores, strict=True), "o-", color="tab:orange")
        beside.set_ylim(0, 1)
        beside.set_ylabel("mean IoU, validation", color="tab:orange")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_class_maps(run: Path, target: Path, *, num_images: int) -> None:
    """Truth and prediction side by side."""
    config = from_json((run / "config.json").read_text())
    segmenter = pspnet_jax.load(run)
    label_set = segmenter.label_set
    source = open_split(config.data, split=config.evaluate.split, label_set=label_set)
    panels = []
    for index in panel_indices(len(source))[:num_images]:
        example = source[index]
        prediction = segmenter.class_map(example.image)
        maps = {"truth": example.labels, "prediction": prediction}
        occurring = np.setdiff1d(np.unique(np.stack([*maps.values()])), [IGNORE_LABEL])
        panels.append(
            panel(
                {title: colorize(labels, label_set.palette) for title, labels in maps.items()},
                class_ids=[int(i) for i in occurring],
                names=label_set.names,
                palette=label_set.palette,
            )
        )
    write_whole(target, encode_png(grid(panels, columns=2)))


def main() -> None:
    """Draw both figures of one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="folder of a run")
    parser.add_argument("--output", required=True, help="folder of the figures")
    parser.add_argument("--num_images", type=int, default=4)
    arguments = parser.parse_args()
    run, output = Path(arguments.checkpoint), Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    draw_curve(run, output / f"{run.name}_curve.png")
    draw_class_maps(run, output / f"{run.name}_class_maps.png", num_images=arguments.num_images)


if __name__ == "__main__":
    main()
