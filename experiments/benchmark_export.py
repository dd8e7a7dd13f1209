"""An exported function, which leaves batch, height and width open, beside the network compiled for each size.

    python experiments/benchmark_export.py --output=runs/benchmark_export [--sides=473,713]

A PSPNet-50 with random weights and 150 classes, exported and read again; one image of each side, the two in turns:
seconds of the first call (which compiles), of later ones, and the largest difference of the logits.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.export
import numpy as np

from pspnet_jax import export
from pspnet_jax.catalog import load_label_set
from pspnet_jax.config import default_config
from pspnet_jax.models.families import IMAGENET_8BIT, ModelOptions
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.protocols import choose
from pspnet_jax.segmenter import Provenance, Segmenter
from pspnet_jax.stored_model import Description, StoredModel, model_part
from pspnet_jax.train_step import split_model


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="runs/benchmark_export")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--sides", default="473,713", help="of the images, pixels")
    parser.add_argument("--repeats", type=int, default=7, help="calls after the first")
    arguments = parser.parse_args()
    model = random_model(arguments.backbone, arguments.width)
    start = time.perf_counter()
    content = export.exported_function(model, platforms=export.PLATFORMS).serialize()
    seconds = time.perf_counter() - start
    exported = jax.export.deserialize(content)
    found = {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "megabytes": len(content) / 1e6,
        "seconds_of_export": seconds,
        "sides": {
            side: compare(model, exported, int(side), arguments.repeats)
            for side in arguments.sides.split(",")
        },
    }
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def random_model(backbone: str, width: int) -> StoredModel:
    """As a checkpoint would give it."""
    section = {**default_config().model.to_dict(), "backbone": backbone, "width": width}
    options, label_set = ModelOptions.resolve(section), load_label_set("ade20k")
    network = PSPNet(options, label_set.num_classes, rng=np.random.default_rng(0))
    _, params, batch_stats = jax.tree.map(np.asarray, split_model(network))
    description = Description(options, label_set, IMAGENET_8BIT, choose("whole", label_set))
    return StoredModel(description, model_part(description, params, batch_stats), 0, "")


def compare(model: StoredModel, exported: jax.export.Exported, side: int, repeats: int) -> dict:
    """Seconds of both on one image, and how far their logits are apart."""
    image = np.random.default_rng(side).integers(0, 256, (1, side, side, 3), np.uint8)
    part = model.part
    segmenter = Segmenter(
        model.description,
        part["params"],
        part["batch_stats"],
        provenance=Provenance("random", 0, ""),
    )
    functions = {"compiled for the size": segmenter.logits, "exported": jax.jit(exported.call)}
    times: dict[str, list[float]] = {name: [] for name in functions}
    logits = {}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            logits[name] = jax.block_until_ready(function(image))
            times[name].append(time.perf_counter() - start)
    one, other = map(np.asarray, logits.values())
    return {
        "seconds": {name: {"first": t[0], "later": t[1:]} for name, t in times.items()},
        "largest_difference": float(np.abs(one - other).max()),
        "largest_logit": float(np.abs(one).max()),
        "equal_classes": float((one.argmax(-1) == other.argmax(-1)).mean()),
    }


def table(found: dict) -> str:
    """As Markdown."""
    lines = [
        f"exported in {found['seconds_of_export']:.1f} s, {found['megabytes']:.0f} MB; jax {found['jax']}, "
        f"{found['device']}",
        "",
        "| side | function | first call, s | later: low, median, high, s | difference / largest logit |",
        "|---|---|---|---|---|",
    ]
    for side, row in found["sides"].items():
        ratio = row["largest_difference"] / row["largest_logit"]
        for name, t in row["seconds"].items():
            low, median, high = np.percentile(t["later"], (0, 50, 100))
            lines.append(
                f"| {side} | {name} | {t['first']:.1f} | {low:.2f}, {median:.2f}, {high:.2f} | {ratio:.1e} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
