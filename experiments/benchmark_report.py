"""Ratios of rounds, and the Markdown of `benchmark.py`."""

import json
import statistics
from pathlib import Path

EAGER = "PyTorch, eager channels-last"
PLAIN = "ours, plain"
TITLES = (
    "column",
    "seconds: median (low .. high)",
    "images/s",
    "times the best of PyTorch",
    "times PyTorch eager, channels-last",
    "times ours, plain",
    "peak GiB",
    "XLA's temporaries GiB",
    "compile s",
    "executed GFLOP",
    "of the ceiling: executed",
    "of the ceiling: network",
)
EXPLANATION = (
    "'times X' = seconds of X over seconds of the column in the same round: median (lowest .. "
    "highest); above 1 the column is faster. Peak = of the device's allocator on a GPU, of the whole "
    "process on a CPU, in a process of its own with compilations cached. Executed GFLOP = "
    "`cost_analysis()['flops']` of the compiled program: what libraries do in custom calls is not in "
    "it, bodies of loops count once; beside it, in parentheses, twice the multiply-accumulates of all "
    "convolutions and matrix products of the traced program, loops as often as they run and zeros of "
    "padding and dilation included. Network = twice the multiply-accumulates of the published network "
    "(a training step: three times forward and auxiliary head), however they are computed: above 100 % "
    "where fewer are executed. Compile = PyTorch's first call less one later call."
)


def ratios(columns: dict[str, dict], reference: str) -> dict[str, dict[str, float]]:
    """How many times as fast as the reference each column is: median, lowest, highest of rounds.

    Empty where the reference was not measured.
    """
    base = columns.get(reference, {}).get("seconds", [])
    found = {}
    for name, row in columns.items():
        each = [a / b for a, b in zip(base, row.get("seconds", []), strict=False)]
        if each:
            found[name] = {"median": statistics.median(each), "low": min(each), "high": max(each)}
    return found


def best_of_torch(columns: dict[str, dict]) -> str:
    """The column of PyTorch (the authors' module included) with the lowest median; '' without one."""
    medians = {
        name: statistics.median(row["seconds"])
        for name, row in columns.items()
        if not name.startswith("ours") and row.get("seconds")
    }
    return min(medians, key=medians.__getitem__, default="")


def write(output: Path, report: dict) -> None:
    """results.json with every sample and ratio, results.md with a table for each group."""
    for group in report["groups"].values():
        columns = group["columns"]
        best = group["best_of_torch"] = best_of_torch(columns)
        group["ratios"] = {name: ratios(columns, name) for name in (best, EAGER, PLAIN) if name}
    (output / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "results.md").write_text(markdown(report))


def markdown(report: dict) -> str:
    """Ready for experiments/README.md."""
    versions = dict(report["versions"])
    for group in report["groups"].values():
        for row in group["columns"].values():
            versions |= row.get("versions", {})
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    settings = report["settings"]
    text = [
        f"Machine: {report['machine']}; device: {report['device']}. Python {report['python']}, "
        f"{named}. Commit {report['commit']}. {settings['backbone']} of width {settings['width']}, "
        f"{settings['num_classes']} classes, "
        f"{'bfloat16' if report['platform'] == 'gpu' else 'float32'}.",
        "",
        _ceiling_line(report["ceiling"]),
        *_agreement_lines(report["agreement"]),
    ]
    if settings["small"] == "True":
        text += ["", "Tiny shapes, unoptimized: the figures below mean nothing."]
    for name, group in report["groups"].items():
        text += ["", f"### {name}", "", *_table(group, report["ceiling"]["best"])]
        text += ["", f"Load of the machine before it (one minute): {group['load_before']:.1f}."]
    text += ["", EXPLANATION, ""]
    if "data" in report:
        text += [*_data_lines(report["data"]), ""]
    return "\n".join(text)


def exit_if_failed(report: dict) -> None:
    """Raise SystemExit with what failed in which column, if anything did."""
    failed = [
        f"{name}: {column}: {row['error']}"
        for name, group in report["groups"].items()
        for column, row in group["columns"].items()
        if "error" in row
    ]
    if failed:
        raise SystemExit("\n".join(["Not measured:", *failed]))


def _ceiling_line(ceiling: dict) -> str:
    sides = []
    for side, rates in ceiling["sides"].items():
        if "error" in rates:
            sides.append(f"{side}: {rates['error']}")
            continue
        each = ", ".join(f"{rate / 1e9:.0f} at {n}" for n, rate in rates.items())
        sides.append(f"{side} {each}")
    best = f"{ceiling['best'] / 1e9:.0f} GFLOP/s" if ceiling["best"] else "not known"
    return f"Ceiling of matrix products: {best} (by side of the matrices, {'; '.join(sides)})."


def _agreement_lines(agreement: dict[str, dict]) -> list[str]:
    lines = []
    for column, row in agreement.items():
        said = row.get("error") or ", ".join(f"{name} {row[name]:.1e}" for name in row)
        lines += [
            "",
            f"'{column}' beside PyTorch with the same weights, relative (float64 where not named): {said}.",
        ]
    return lines


def _table(group: dict, ceiling: float | None) -> list[str]:
    lines = ["| " + " | ".join(TITLES) + " |", "|---" * len(TITLES) + "|"]
    for name, row in group["columns"].items():
        if "error" in row or not row["seconds"]:
            said = row.get("error", "not measured").replace("|", "/")
            lines.append(f"| {name} | {said} |" + " |" * (len(TITLES) - 2))
            continue
        cells = _cells(group, name, row, ceiling)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    best = group["best_of_torch"]
    return [*lines, "", f"The best of PyTorch: {best}."] if best else lines


def _cells(group: dict, name: str, row: dict, ceiling: float | None) -> list[str]:
    seconds = row["seconds"]
    median = statistics.median(seconds)

    def times(reference: str) -> str:
        found = group["ratios"].get(reference, {}).get(name)
        return f"{found['median']:.2f} ({found['low']:.2f} .. {found['high']:.2f})" if found else ""

    def gibibytes(key: str) -> str:
        return "" if row.get(key) is None else f"{row[key] / 2**30:.2f}"

    def share(flops: float | None) -> str:
        return f"{flops / median / ceiling:.0%}" if flops and ceiling else ""

    executed = row.get("xla_flops")
    traced = row.get("traced_macs")
    compiling = row.get("compile_seconds")
    if compiling is None and "compiled" in name:
        compiling = row["first_call_seconds"] - median
    network = 2 * group["macs"] * group["images"] if group["macs"] else None
    return [
        f"{median:.4g} ({min(seconds):.4g} .. {max(seconds):.4g})",
        f"{group['images'] / median:.4g}",
        times(group["best_of_torch"]),
        times(EAGER),
        times(PLAIN),
        gibibytes("peak_bytes"),
        gibibytes("temporary_bytes"),
        "" if compiling is None else f"{compiling:.1f}",
        f"{executed / 1e9:.4g} ({2 * traced / 1e9:.4g})" if executed and traced else "",
        share(executed),
        share(network),
    ]


def _data_lines(data: dict) -> list[str]:
    if "error" in data:
        return [f"Input pipeline: {data['error']}"]
    lines = [
        f"Input pipeline, crops of {data['crop']}, batches of 16, painted photographs of 512 x 683, "
        "JPEG and PNG (`benchmark_data.py` compares it with the authors' steps):",
        "",
        "| loader processes | images/s: median (low .. high) |",
        "|---|---|",
    ]
    for workers, rates in data["images_per_second"].items():
        median = statistics.median(rates)
        lines.append(f"| {workers} | {median:.0f} ({min(rates):.0f} .. {max(rates):.0f}) |")
    return lines
