"""What the pyramid is worth on `scenes`: PSPNet against the dilated FCN, three seeds, strips swapped.

    python experiments/scenes_context.py --output=runs/scenes_context --seeds=0,1,2

Trains `configs/scenes.py` with and without `pyramid_bins` (resuming what is there), evaluates both on the
validation split and on the same images with the strip of the partner scene, where only the strip and the
names that follow from it differ. Writes results.json and results.md into the output folder.
"""

import argparse
import itertools
import json
from pathlib import Path

import jax
import numpy as np

import pspnet_jax
from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import load as load_config
from pspnet_jax.data.scenes import SPLITS, render
from pspnet_jax.metrics import confusion_matrix, group_iou, scores
from pspnet_jax.train import train

NETWORKS = {"pyramid": None, "baseline": ()}
LABEL_SET = load_label_set("scenes")
AMBIGUOUS = [i for i, group in enumerate(LABEL_SET.groups) if group]


def trained(folder: Path, network: str, seed: int, num_steps: int | None) -> pspnet_jax.Segmenter:
    """The network of one run, trained or resumed, at its last step."""
    path = Path(__file__).parent.parent / "configs" / "scenes.py"
    config = load_config(path)
    config.seed = seed
    config.model.pyramid_bins = NETWORKS[network]
    config.train.num_steps = num_steps or config.train.num_steps
    config.train.evaluate_every_steps = config.train.num_steps
    workdir = folder / f"{network}_{seed}"
    train(config, workdir)
    return pspnet_jax.load(workdir, step="latest")


def measure(segmenter: pspnet_jax.Segmenter, *, swapped: bool, num_images: int) -> dict[str, float]:
    """Mean IoU over all classes, the ambiguous ones and the others, on validation images."""
    confusion = np.zeros((LABEL_SET.num_classes,) * 2, np.int64)
    indices = list(SPLITS["val"])[:num_images]
    pairs = (render(0, index, swapped=swapped) for index in indices)
    images, labels = itertools.tee(pairs)
    found = segmenter.predict((image for image, _ in images), batch_size=20)
    for (_, truth), prediction in zip(labels, found, strict=True):
        confusion += confusion_matrix(truth, prediction.class_map, LABEL_SET.num_classes)
    total = scores(confusion, absent_class="skip")
    return {
        "mean_iou": total.mean_iou,
        "ambiguous": float(np.nanmean(total.iou[AMBIGUOUS])),
        **group_iou(total.iou, LABEL_SET.groups),
    }


def table(rows: list[dict]) -> str:
    """The results as Markdown, with the difference that the pyramid makes."""
    lines = [
        "| network | seed | mean IoU | ambiguous | others | ambiguous, strips swapped |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        straight, swapped = row["straight"], row["swapped"]
        lines.append(
            f"| {row['network']} | {row['seed']} | {straight['mean_iou']:.3f} | "
            f"{straight['ambiguous']:.3f} | {straight['others']:.3f} | {swapped['ambiguous']:.3f} |"
        )
    means = {
        (network, key): np.mean([r["straight"][key] for r in rows if r["network"] == network])
        for network in NETWORKS
        for key in ("ambiguous", "others")
    }
    change = {k: means["baseline", k] - means["pyramid", k] for k in ("ambiguous", "others")}
    lines += [
        "",
        f"Without the pyramid the mean IoU of the ambiguous classes changes by {change['ambiguous']:+.3f}, "
        f"that of the others by {change['others']:+.3f} (mean over the seeds).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", default="runs/scenes_context", help="folder of the runs and the results"
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--num_steps", type=int, help="fewer steps, for a quick try")
    parser.add_argument("--num_images", type=int, default=len(SPLITS["val"]))
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        for network in NETWORKS:
            segmenter = trained(folder, network, seed, arguments.num_steps)
            row = {"network": network, "seed": seed}
            for name, swapped in (("straight", False), ("swapped", True)):
                row[name] = measure(segmenter, swapped=swapped, num_images=arguments.num_images)
            rows.append(row)
            contents = {
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "rows": rows,
            }
            (folder / "results.json").write_text(json.dumps(contents, indent=2) + "\n")
    (folder / "results.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
