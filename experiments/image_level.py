"""Supervision by the classes of an image, and the head that goes with it, against the paper's: same budget.

    python experiments/image_level.py --output=runs/image_level_scenes --seeds=0,1,2
    python experiments/image_level.py --output=runs/image_level_camvid --config=configs/camvid_resnet18.py \
        --root=DIR --width=32

Four networks on one backbone, which keeps the dilation and the optimizer that its config gives it: the paper's
head (with its pixelwise auxiliary loss of 0.4) and the variant's (family `lextal`, without one), each with
and without the presence loss of weight 1. Runs that are there are resumed. Writes results.json and results.md
into the output folder.
"""

import argparse
import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import load as load_config
from pspnet_jax.train import train

NETWORKS = {
    "paper": ("semseg", 0.0),
    "paper_presence": ("semseg", 1.0),
    "variant_without_presence": ("lextal", 0.0),
    "variant": ("lextal", 1.0),
}
# Of the networks without presence loss.
AUX_HEADS = {"semseg": ("pixel",), "lextal": ()}
COLUMNS = ("mean_iou", "pixel_accuracy", "presence_loss", "presence_accuracy")


def make_config(arguments: argparse.Namespace, network: str, seed: int) -> ConfigDict:
    """The config of one run."""
    config = load_config(arguments.config)
    family, presence_weight = NETWORKS[network]
    config.name = f"{network}_{seed}"
    config.seed = seed
    config.model.family = family
    config.model.first_block_dilation = config.model.first_block_dilation or (2, 4)
    config.model.width = arguments.width or config.model.width
    config.loss.presence_weight = presence_weight
    if presence_weight == 0:
        config.model.aux_heads = AUX_HEADS[family]
    height, width = config.data.crop_size or load_label_set(config.data.labels).crop_size
    if family == "lextal":  # sides of 8n instead of 8n + 1
        height, width = height - height % 8, width - width % 8
    config.data.crop_size = (height, width)
    config.data.root = arguments.root
    config.train.num_steps = arguments.num_steps or config.train.num_steps
    config.train.evaluate_every_steps = config.train.num_steps
    return config


def measure(workdir: Path, config: ConfigDict) -> dict[str, float | None]:
    """The scores of the last step; of presence the mean over the last tenth of the training."""
    num_steps = config.train.num_steps
    (path,) = workdir.glob(f"evaluation/{num_steps:08d}-*/report.json")
    report = json.loads(path.read_text())
    text = (workdir / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    late = [row for row in rows if row["step"] > 0.9 * num_steps]
    found = {name: report[name] for name in ("mean_iou", "pixel_accuracy")}
    for name in ("presence_loss", "presence_accuracy"):
        found[name] = float(np.mean([row[name] for row in late])) if name in late[0] else None
    return found


def table(rows: list[dict]) -> str:
    """Mean over the seeds, and the spread (highest - lowest) of the mean IoU, as Markdown."""
    titles = [name.replace("_", " ").replace("iou", "IoU") for name in COLUMNS]
    lines = [
        "| network | seeds | " + " | ".join(titles) + " | spread of mean IoU |",
        "|" + "---|" * (len(COLUMNS) + 3),
    ]
    for network in NETWORKS:
        mine = [row for row in rows if row["network"] == network]
        if not mine:
            continue
        cells = [network.replace("_", " "), str(len(mine))]
        for name in COLUMNS:
            values = [row[name] for row in mine]
            cells.append("" if None in values else f"{np.mean(values):.3f}")
        ious = [row["mean_iou"] for row in mine]
        lines.append(f"| {' | '.join(cells)} | {max(ious) - min(ious):.3f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", default="runs/image_level", help="folder of the runs and the results"
    )
    default = Path(__file__).parent.parent / "configs/scenes.py"
    parser.add_argument("--config", default=str(default), help="data, backbone, optimizer, budget")
    parser.add_argument("--root", help="data.root of a data set on disk")
    parser.add_argument("--width", type=int, help="model.width, for less time")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--num_steps", type=int, help="fewer steps, for a quick try")
    arguments = parser.parse_args()
    folder = Path(arguments.output)
    rows = []
    for seed in map(int, arguments.seeds.split(",")):
        for network in NETWORKS:
            config = make_config(arguments, network, seed)
            workdir = folder / config.name
            train(config, workdir)
            rows.append({"network": network, "seed": seed, **measure(workdir, config)})
            machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            contents = json.dumps({**machine, "rows": rows}, indent=2) + "\n"
            (folder / "results.json").write_text(contents)
            (folder / "results.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
