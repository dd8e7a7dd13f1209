"""How cost grows with the batch, the crop, the depth, the classes and the number of devices. Ours only.

    python experiments/benchmark_growth.py --output=runs/benchmark_growth [--small]

* Each factor is varied alone around a base (on a CPU ResNet-18 of width 16, 4 x 161, 19 classes; on
  a GPU ResNet-50 of width 64, 8 x 321, 150 classes): seconds of a call (median, the values of a
  factor taking turns), XLA's temporaries, and of the training step the highest memory of a process
  that finds its compilation in a cache. A line through the logarithms gives the exponent, a straight one the share of the base
  that does not depend on the factor.
* A batch of one image cannot be trained: the pyramid's level of one bin has one value per channel.
* Devices are CPU devices of one process; the training step at a fixed global batch is compiled for them and
  not run. Counted are the bytes that each device hands to collectives, from XLA's optimized program.
  An all-gather or all-to-all ends the script with an error: nothing here should need one.
* results.json and results.md are written again after every factor.
"""

import argparse
import dataclasses
import json
import platform
import shutil
import statistics
from pathlib import Path

import numpy as np
from benchmark import OURS, Launcher, machine, measure_group
from benchmark_worker import Task
from checkout import commit_of_checkout

FACTORS = {
    "batch": (1, 2, 4, 8),
    "crop": (97, 161, 233, 321),
    "depth": (18, 50, 101),
    "classes": (19, 150, 500),
}
DEVICES = (1, 2, 4, 8)
# Networks whose training step is divided over devices: (backbone, width, classes, crop).
SHARDED = {"toy": ("resnet10", 8, 19, 65), "full width": ("resnet50", 64, 150, 97)}
FORBIDDEN = ("all-gather", "all-to-all")
WHATS = ("forward", "training step")

REASONS = {
    "batch": "Every map has one more slice for each image; weights, gradients and SGD's momentum do "
    "not, so that small batches of wide networks cost more for each image (exponent below 1).",
    "crop": "Maps grow with the area, 2 in the exponent; the pyramid's small levels and the "
    "optimizer do not.",
    "depth": "The published depths differ in the blocks of stage 3 above all, each of equal cost at "
    "an eighth of the image; stem, pyramid and heads stay. From 18 to 50 the block changes too, "
    "from two 3x3 convolutions to a bottleneck that ends in four times the channels.",
    "classes": "Only the classifiers and the stretched logits with their loss know the classes: a "
    "straight line on top of the network, whose cost does not change. Where the stretched logits are more "
    "than loss.tile_mib, a tile of them is all that there is at a time.",
    "devices": "A device hands over its gradients (as many bytes as parameters; on CPUs kernel gradients by "
    "Winograd's algorithm are summed over devices while they are 16 numbers, not 9) and the sums of batch "
    "statistics and their gradients, once a step; neither depends on how many devices there are nor on "
    "the images of each. What a ring moves over each link is 2 (n - 1) / n times that.",
}


def main() -> None:
    """Print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark_growth"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="tiny shapes, on the CPU")
    parser.add_argument("--factors", default=",".join([*FACTORS, "devices"]))
    arguments = parser.parse_args()
    wanted = arguments.factors.split(",")
    unknown = set(wanted) - {*FACTORS, "devices"}
    if unknown:
        raise SystemExit(f"--factors={unknown} are not among {[*FACTORS, 'devices']}")
    output = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(output / "cache", ignore_errors=True)
    launcher = Launcher(output, small=arguments.small)
    with launcher.start(Task("benchmark_jax", OURS, "counts", "cpu", crop=97)) as worker:
        facts = worker.facts
    launcher.platform = facts["backend"]
    base = base_task(launcher)
    report = {
        "commit": commit_of_checkout(),
        "python": platform.python_version(),
        "machine": machine(),
        "device": facts["device"],
        "versions": facts["versions"],
        "base": dataclasses.asdict(base),
        "small": arguments.small,
        "factors": {},
        "devices": {},
    }
    for factor in wanted:
        if factor == "devices":
            report["devices"] = {
                name: collectives(launcher, *shape) for name, shape in sharded(launcher).items()
            }
        else:
            report["factors"][factor] = {
                what: vary(launcher, base, factor, what, arguments.rounds) for what in WHATS
            }
        write(output, report)
    refuse_forbidden(report["devices"])
    print(f"written: {output / 'results.md'}, {output / 'results.json'}")


def base_task(launcher: Launcher) -> Task:
    """What every factor is varied around."""
    if launcher.small:
        shape = {"backbone": "resnet10", "width": 4, "num_classes": 5, "batch": 2, "crop": 33}
    elif launcher.platform == "gpu":
        shape = {"backbone": "resnet50", "width": 64, "num_classes": 150, "batch": 8, "crop": 321}
    else:
        shape = {"backbone": "resnet18", "width": 16, "num_classes": 19, "batch": 4, "crop": 161}
    return Task("benchmark_jax", OURS, "forward", launcher.platform, **shape)


def sharded(launcher: Launcher) -> dict[str, tuple]:
    """The networks over devices."""
    return {"toy": ("resnet10", 4, 5, 33)} if launcher.small else SHARDED


def vary(launcher: Launcher, base: Task, factor: str, what: str, rounds: int) -> dict:
    """Rows by value of the factor, and the fits of seconds and temporaries."""
    values = FACTORS[factor]
    if launcher.small:
        values = {"batch": (2, 4), "crop": (33, 65), "depth": (10, 18), "classes": (5, 19)}[factor]
    tasks = {}
    for value in values:
        if factor == "batch" and what == "training step" and value == 1:
            continue
        change = {"batch": "batch", "crop": "crop", "classes": "num_classes"}.get(factor)
        changes = {change: value} if change else {"backbone": f"resnet{value}"}
        tasks[str(value)] = dataclasses.replace(base, what=what, **changes)
    rows = measure_group(launcher, tasks, rounds, with_peak=what == "training step")
    measured = {int(value): row for value, row in rows.items() if "error" not in row}
    fits = {}
    for name in ("seconds", "temporary_bytes"):
        points = {x: _number(row[name]) for x, row in measured.items()}
        if len(points) > 1 and all(points.values()):
            fits[name] = fit(list(points), list(points.values()))
    return {"rows": rows, "fits": fits}


def fit(x: list[float], y: list[float]) -> dict[str, float]:
    """Exponent of y = c * x ** exponent, and a straight line y = constant + slope * x.

    Least squares: of the logarithms, and of y relative to each value.

    Args:
        x: at least two different values above 0.
        y: as many, above 0.
    """
    exponent, _ = np.polyfit(np.log(x), np.log(y), 1)
    slope, constant = np.polyfit(x, y, 1, w=1 / np.asarray(y, float))
    return {"exponent": float(exponent), "constant": float(constant), "slope": float(slope)}


def collectives(
    launcher: Launcher, backbone: str, width: int, num_classes: int, crop: int
) -> list[dict]:
    """For each number of devices what one training step exchanges."""
    rows = []
    for devices in DEVICES[:2] if launcher.small else DEVICES:
        task = Task(
            "benchmark_jax",
            OURS,
            "collectives",
            "cpu",
            backbone,
            width,
            num_classes,
            batch=max(DEVICES),
            crop=crop,
            devices=devices,
        )
        # Code is not run: it need not be optimized.
        flags = f"--xla_force_host_platform_device_count={devices}"
        flags += " --xla_backend_optimization_level=0"
        with launcher.start(task, XLA_FLAGS=flags, JAX_PLATFORMS="cpu") as worker:
            facts = worker.facts
        kept = ("collectives", "parameter_bytes", "statistic_bytes", "temporary_bytes")
        rows.append({"devices": devices, **{name: facts[name] for name in kept}})
        print(rows[-1], flush=True)
    return rows


def refuse_forbidden(networks: dict[str, list[dict]]) -> None:
    """Raise RuntimeError where a step gathers what should stay where it is."""
    found = {
        f"{kind} in the step of '{name}' on {row['devices']} devices"
        for name, rows in networks.items()
        for row in rows
        for kind in set(row["collectives"]) & set(FORBIDDEN)
    }
    if found:
        raise RuntimeError(f"{'; '.join(sorted(found))}: only sums over devices are expected")


def write(output: Path, report: dict) -> None:
    """results.json and results.md."""
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "results.md").write_text(markdown(report))


def markdown(report: dict) -> str:
    """A table and a reason for each factor."""
    base = report["base"]
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = [
        f"Machine: {report['machine']}; device: {report['device']}. Python {report['python']}, "
        f"{named}. Commit {report['commit']}. Base: {base['backbone']} of width {base['width']}, "
        f"{base['batch']} x {base['crop']}, {base['num_classes']} classes.",
    ]
    if report["small"]:
        text += ["", "Tiny shapes, unoptimized: the figures below mean nothing."]
    for factor, found in report["factors"].items():
        text += ["", f"### {factor}", "", REASONS[factor], ""]
        text += [
            "| | " + factor + " | ms: median (low .. high) | XLA's temporaries MiB | peak MiB |"
        ]
        text += ["|---|---|---|---|---|"]
        for what, part in found.items():
            text += [f"| {what} | {value} | {_cells(row)} |" for value, row in part["rows"].items()]
        text += ["", *(_fit_line(what, part["fits"], factor) for what, part in found.items())]
    if report["devices"]:
        text += ["", "### devices", "", REASONS["devices"], "", *_device_table(report["devices"])]
    return "\n".join([*text, ""])


def _cells(row: dict) -> str:
    if "error" in row:
        return f"{row['error'].replace('|', '/')} | |"
    low, high = (f(row["seconds"]) * 1e3 for f in (min, max))
    mebibytes = [
        "" if row[name] is None else f"{row[name] / 2**20:.1f}"
        for name in ("temporary_bytes", "peak_bytes")
    ]
    median = _number(row["seconds"]) * 1e3
    return f"{median:.4g} ({low:.4g} .. {high:.4g}) | " + " | ".join(mebibytes)


def _fit_line(what: str, fits: dict[str, dict], factor: str) -> str:
    said = []
    for name, (unit, scale) in {"seconds": ("ms", 1e3), "temporary_bytes": ("MiB", 2**-20)}.items():
        if name in fits:
            found = fits[name]
            constant, slope = found["constant"] * scale, found["slope"] * scale
            if abs(slope) < 1e-9 * abs(constant):  # of a measurement that does not change
                slope = 0.0
            line = f"{constant:.4g} + {slope:.4g} x {factor} {unit}"
            said.append(f"exponent {found['exponent']:.2f} (straight line: {line})")
    return f"* {what}: " + "; temporaries: ".join(said)


def _device_table(networks: dict[str, list[dict]]) -> list[str]:
    lines = [
        "| network | devices | collectives: number, MiB of operands | parameters MiB | statistics MiB |"
    ]
    lines += ["|---|---|---|---|---|"]
    for name, rows in networks.items():
        for row in rows:
            kinds = [
                f"{kind}: {found['count']}, {found['bytes'] / 2**20:.3f}"
                for kind, found in sorted(row["collectives"].items())
            ]
            sizes = (row[f"{name}_bytes"] / 2**20 for name in ("parameter", "statistic"))
            cells = " | ".join(f"{size:.3f}" for size in sizes)
            lines.append(f"| {name} | {row['devices']} | {'; '.join(kinds) or 'none'} | {cells} |")
    return lines


def _number(value: float | list[float]) -> float:
    return statistics.median(value) if isinstance(value, list) else value


if __name__ == "__main__":
    main()
