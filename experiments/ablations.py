"""The tables of the paper as one sweep: pooling, auxiliary weight, depth, and what each part adds.

    python experiments/ablations.py --output=runs/ablations --base_size=129                 # on `scenes`
    python experiments/ablations.py --output=runs/ablations_ade20k --config=configs/ade20k.py \\
        --depths=resnet50,resnet101,resnet152,resnet269 --set=data.root=ADEChallengeData2016

* Every run is one command of the command line, in a folder of its own named by what it changes, and its log beside it:
  what is there is not run again, what was stopped goes on, and any of them can be run by hand.
* Rows that several tables share are run once. Each table shows means over the seeds with the lowest and the
  highest, in percent, beside the paper's ADE20K figures (Zhao et al. 2017, tables 1 to 4).
* Ctrl-C and SIGTERM end the runs at hand, too; the same command goes on. One --output holds one config with one set of
  --set, --num_steps and --scales.
* Without --num_steps each run is as long as its config says. --tables=1,2 runs some only; --jobs=2 runs two at a
  time. results.json and results.md are written again after every run.
"""

import argparse
import concurrent.futures
import json
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkout import commit_of_checkout

from pspnet_jax.config import load as load_config
from pspnet_jax.models.resnet import DEPTHS

NO_PYRAMID = {"model.pyramid_bins": "()"}
WITH_AUGMENTATION, WITHOUT = {"augment.recipe": "semseg"}, {"augment.recipe": "none"}
NO_AUX = {"loss.aux_weight": "0.0"}


@dataclass(frozen=True)
class Row:
    """A line of a table: a network that is trained, and perhaps evaluated in another way."""

    label: str
    changes: Mapping[str, str] = field(default_factory=dict)
    """Option of the config -> value, as the command line takes it."""
    paper: str = ""
    """Mean IoU / pixel accuracy on ADE20K, in percent."""
    is_multi_scale: bool = False


def tables(depths: Sequence[str]) -> dict[str, tuple[str, list[Row]]]:
    """Number of the table -> what it asks, and its rows."""
    # What the config has already (bins 1, 2, 3, 6, average, reduced channels, weight 0.4) is no change.
    one_bin, maximum = {"model.pyramid_bins": "(1,)"}, {"model.pyramid_pool": "max"}
    wide = {"model.pyramid_reduction": "False"}
    pooling = [
        Row("baseline: no pyramid", NO_PYRAMID, "37.23 / 78.01"),
        Row("B1, max", one_bin | maximum | wide, "39.94 / 79.46"),
        Row("B1, average", one_bin | wide, "40.07 / 79.52"),
        Row("B1236, max", maximum | wide, "40.18 / 79.45"),
        Row("B1236, average", wide, "41.07 / 79.97"),
        Row("B1236, max, reduced", maximum, "40.87 / 79.61"),
        Row("B1236, average, reduced", {}, "41.68 / 80.04"),
    ]
    auxiliary = [
        Row("none", NO_PYRAMID | NO_AUX, "35.82 / 77.07"),
        Row("0.3", NO_PYRAMID | {"loss.aux_weight": "0.3"}, "37.01 / 77.87"),
        Row("0.4", NO_PYRAMID, "37.23 / 78.01"),
        Row("0.6", NO_PYRAMID | {"loss.aux_weight": "0.6"}, "37.09 / 77.84"),
        Row("0.9", NO_PYRAMID | {"loss.aux_weight": "0.9"}, "36.99 / 77.87"),
    ]
    papers = {
        "resnet50": "41.68 / 80.04",
        "resnet101": "41.96 / 80.64",
        "resnet152": "42.62 / 80.80",
        "resnet269": "43.81 / 80.88",
    }
    depth = [Row(name, {"model.backbone": name}, papers.get(name, "")) for name in depths]
    added = [
        Row("baseline", NO_PYRAMID | NO_AUX | WITHOUT, "34.28 / 76.35"),
        Row("+ augmentation", NO_PYRAMID | NO_AUX | WITH_AUGMENTATION, "35.82 / 77.07"),
        Row("+ auxiliary loss", NO_PYRAMID | WITH_AUGMENTATION, "37.23 / 78.01"),
        Row("+ pyramid", WITH_AUGMENTATION, "41.68 / 80.04"),
    ]
    deepest = WITH_AUGMENTATION | {"model.backbone": depths[-1]}
    added.append(Row(f"+ {depths[-1]}", deepest, "43.81 / 80.88 (ResNet-269)"))
    added.append(Row("+ multi-scale", deepest, "44.94 / 81.69 (ResNet-269)", is_multi_scale=True))
    return {
        "1": ("pooling: bins, kind, reduction of channels", pooling),
        "2": ("weight of the auxiliary loss, without a pyramid", auxiliary),
        "3": ("depth", depth),
        "4": ("what each part adds", added),
    }


@dataclass(frozen=True)
class Sweep:
    """Where runs lie, and what all of them share."""

    output: Path
    config: str
    shared: Mapping[str, str]
    """Option -> value, below the changes of a row; with the number of steps."""
    scales: str
    """Of the multi-scale evaluation."""
    base_size: int | None = None
    """Long side of images at scale 1 there, pixels; None: that of the label set."""
    processes: set[subprocess.Popen] = field(default_factory=set, compare=False)
    """Those at work."""

    def begin(self) -> None:
        """Write down what the runs of this folder share; ValueError where it holds those of other settings."""
        self.output.mkdir(parents=True, exist_ok=True)
        settings = {"config": self.config, "shared": dict(self.shared)}
        settings |= {"scales": self.scales, "base_size": self.base_size}
        path = self.output / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise ValueError(
                f"{path} says that the runs there are of other settings; take another --output"
            )
        path.write_text(json.dumps(settings, indent=1) + "\n")

    def folder(self, row: Row, seed: int) -> Path:
        """Of a row's run, named by what differs from what all runs share."""
        flat = load_config(self.config)
        changes = {}
        for name, value in row.changes.items():
            section, option = name.split(".")
            if self.shared.get(name, str(flat[section][option])) != value:
                changes[name] = value
        return self.output / _name(changes) / f"seed{seed}"

    def scores(self, row: Row, seed: int) -> dict:
        """Mean IoU, pixel accuracy, groups of a row; its network is trained and evaluated if it is not yet."""
        folder = self.folder(row, seed)
        last = f"evaluation/{int(self.shared['train.num_steps']):08d}-*/report.json"
        if not list(folder.glob(last)):
            options = {**self.shared, **row.changes, "seed": str(seed)}
            flags = [f"--config.{name}={value}" for name, value in options.items()]
            self._run(folder, [f"--config={self.config}", f"--workdir={folder}", *flags])
        (report,) = folder.glob(last)
        if row.is_multi_scale:
            report = folder / "multi_scale" / "report.json"
            if not report.exists():
                flags = ["--protocol=semseg", f"--scales={self.scales}", "--flip", "--step=latest"]
                flags += [f"--base_size={self.base_size}"] if self.base_size else []
                place = [f"--checkpoint={folder}", f"--output={report.parent}"]
                self._run(folder, ["evaluate", *place, *flags])
        contents = json.loads(report.read_text())
        return {key: contents[key] for key in ("mean_iou", "pixel_accuracy", "groups")}

    def _run(self, folder: Path, arguments: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pspnet_jax.main", *arguments]
        print(f"{folder}: started, see output.txt there", flush=True)
        with (folder / "output.txt").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        self.processes.add(process)
        code = process.wait()
        self.processes.discard(process)
        if code != 0:
            last = (folder / "output.txt").read_text().strip().splitlines()[-1:]
            raise RuntimeError(f"{folder}: exit status {code}: {' '.join(last)}")


def _name(changes: Mapping[str, str]) -> str:
    """Of a folder: 'pyramid_bins=1,2_aux_weight=0.4'."""
    parts = [
        f"{name.split('.')[-1]}={re.sub('[() ]', '', value) or 'none'}"
        for name, value in sorted(changes.items())
    ]
    return "_".join(parts) or "as_configured"


def _runs(chosen: Mapping[str, tuple[str, list[Row]]], seeds: Sequence[int]) -> Iterator[tuple]:
    for number, (_, rows) in chosen.items():
        for row in rows:
            for seed in seeds:
                yield number, row, seed


def markdown(chosen: Mapping[str, tuple[str, list[Row]]], found: Mapping[str, dict]) -> str:
    """The tables as far as they are known."""
    text = []
    for number, (question, rows) in chosen.items():
        text += [
            f"### Table {number}: {question}",
            "",
            "| | mean IoU | pixel accuracy | groups | seeds | paper, ADE20K |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            seeds = found.get(number, {}).get(row.label, {})
            values = [seeds[seed] for seed in sorted(seeds)]
            cells = [_spread([v[key] for v in values]) for key in ("mean_iou", "pixel_accuracy")]
            groups = sorted({name for v in values for name in v["groups"]})
            each = [f"{g} {_mean([v['groups'][g] for v in values])}" for g in groups]
            line = [row.label, *cells, ", ".join(each), str(len(values)), row.paper]
            text.append("| " + " | ".join(line) + " |")
        text.append("")
    return "\n".join(text)


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{100 * statistics.mean(known):.1f}" if known else ""


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return _mean(values)
    return f"{_mean(values)} ({100 * min(values):.1f} .. {100 * max(values):.1f})"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("runs/ablations"), help="folder of runs and results"
    )
    parser.add_argument("--config", default="configs/scenes.py")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--tables", default="1,2,3,4", help="comma-separated")
    parser.add_argument("--depths", default="resnet10,resnet18,resnet34", help="shallow to deep")
    parser.add_argument("--num_steps", type=int, help="of each run; default: the config's")
    parser.add_argument("--scales", default="0.75,1.0,1.25", help="of the multi-scale evaluation")
    parser.add_argument("--base_size", type=int, help="of that evaluation, pixels (scenes: 129)")
    parser.add_argument("--set", action="append", default=[], help="OPTION=VALUE for all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    arguments = parser.parse_args()
    _check(parser, arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    shared = dict(text.split("=", 1) for text in arguments.set)
    steps = arguments.num_steps or load_config(arguments.config).train.num_steps
    shared.setdefault("train.num_steps", str(steps))
    shared.setdefault("train.evaluate_every_steps", shared["train.num_steps"])
    sweep = Sweep(arguments.output, arguments.config, shared, arguments.scales, arguments.base_size)
    every = tables(arguments.depths.split(","))
    chosen = {number: every[number] for number in arguments.tables.split(",")}
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    sys.exit(run_all(sweep, chosen, seeds, jobs=arguments.jobs))


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """What would fail in every run is said before the first."""
    flat = load_config(arguments.config)
    options = {
        f"{section}.{name}"
        for section, part in flat.items()
        if hasattr(part, "items")
        for name in part
    }
    asked = {
        "tables": ({"1", "2", "3", "4"}, arguments.tables.split(",")),
        "depths": (set(DEPTHS), arguments.depths.split(",")),
        "set": (options, [text.partition("=")[0] for text in arguments.set]),
    }
    for name, (known, given) in asked.items():
        unknown = [value for value in given if value not in known]
        if unknown:
            shown = (
                ", ".join(sorted(known)) if len(known) < 20 else f"options of {arguments.config}"
            )
            parser.error(f"--{name}: {', '.join(unknown)} is not among {shown}")
    if not all("=" in text for text in arguments.set):
        parser.error("--set takes OPTION=VALUE")
    if not all(seed.isdecimal() for seed in arguments.seeds.split(",")):
        parser.error("--seeds takes whole numbers, as 0,1,2")


def run_all(
    sweep: Sweep, chosen: Mapping[str, tuple[str, list[Row]]], seeds: Sequence[int], *, jobs: int
) -> int:
    """All runs; 1 where some failed, which the next call tries again, else 0."""
    sweep.begin()
    found: dict[str, dict] = {}
    faults: list[str] = []
    lock = threading.Lock()
    # By folder: rows that share a network are not trained at the same time.
    sharing: dict[Path, list[tuple]] = {}
    for number, row, seed in _runs(chosen, seeds):
        sharing.setdefault(sweep.folder(row, seed), []).append((number, row, seed))

    def run_group(group: list[tuple]) -> None:
        for number, row, seed in group:
            try:
                scores = sweep.scores(row, seed)
            except (RuntimeError, ValueError, OSError) as error:
                with lock:
                    faults.append(f"table {number}, {row.label}, seed {seed}: {error}")
                    print(faults[-1], file=sys.stderr, flush=True)
                    write()
                continue
            with lock:
                found.setdefault(number, {}).setdefault(row.label, {})[seed] = scores
                said = f"table {number}, {row.label}, seed {seed}: {scores['mean_iou']:.4f}"
                print(said, flush=True)
                write()

    def write() -> None:
        report = {
            "commit": commit_of_checkout(),
            "config": sweep.config,
            "shared": dict(sweep.shared),
            "tables": found,
            "faults": faults,
        }
        (sweep.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        shared = ", ".join(f"{name}={value}" for name, value in sweep.shared.items())
        head = f"`{sweep.config}` with {shared}; commit {report['commit']}. In percent.\n\n"
        tail = "".join(f"* failed: {fault}\n" for fault in faults)
        (sweep.output / "results.md").write_text(head + markdown(chosen, found) + tail)

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        for pending in [pool.submit(run_group, group) for group in sharing.values()]:
            pending.result()
    except KeyboardInterrupt:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(sweep.processes):
            process.terminate()  # it saves its step
        pool.shutdown(wait=True)
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    print((sweep.output / "results.md").read_text())
    return min(len(faults), 1)


if __name__ == "__main__":
    main()
