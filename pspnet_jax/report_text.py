"""The report of an evaluation in words: the protocol, report.md, and the layout of report.json."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pspnet_jax.protocols import Protocol

METRICS = {
    "mean_iou": "mean IoU",
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "frequency_weighted_iou": "frequency-weighted IoU",
    "mean_dice": "mean Dice",
    "csail_score": "CSAIL score",
}
"""Key in the report -> name, in the order in which they are shown."""


def protocol_words(options: Mapping[str, Any]) -> str:
    """Every option of a protocol, from the report."""
    return Protocol.from_json(dict(options)).describe()


def network_words(network: Mapping[str, Any]) -> str:
    """What was evaluated, from the report."""
    return (
        f"{network['family']} {network['backbone']} of width {network['width']}, computed in "
        f"{network['dtype']}"
    )


def checkpoint_words(checkpoint: Mapping[str, Any]) -> str:
    """Where its weights come from, from the report."""
    return f"step {checkpoint['step']} of {checkpoint['path']} (digest {checkpoint['digest'][:12]})"


def percent(value: float | None) -> str:
    """A share as per cent; '-' where there is none."""
    return "-" if value is None else f"{100 * value:.2f}"


def markdown(contents: Mapping[str, Any]) -> str:
    """The report for people: tables, with links to the pictures."""
    data = contents["data"]
    lines = [
        f"# {_cell(data['labels'])}, {_cell(data['split'])}, {data['num_images']} images",
        "",
        f"Protocol: {protocol_words(contents['protocol'])}",
        "",
        f"Network: {network_words(contents['network'])}; {checkpoint_words(contents['checkpoint'])}",
        "",
        "With pictures: [report.html](report.html), [overview](panels/overview.png), [panels](panels)",
        "",
        *_table(METRICS.values(), [[percent(contents[key]) for key in METRICS]]),
        "",
        "In per cent. CSAIL score: the mean of mean IoU and pixel accuracy.",
        "",
    ]
    if contents["groups"]:
        rows = [[_cell(name), percent(iou)] for name, iou in contents["groups"].items()]
        lines += [*_table(["group of classes, absent ones left out", "mean IoU"], rows), ""]
    absent = "counts as 0" if contents["protocol"]["absent_class"] == "zero" else "is left out"
    lines += [f"A class that nobody drew and nobody predicted (-) {absent} in the means.", ""]
    fractions = ("iou", "accuracy", "precision", "dice")
    lines += _table(
        ["id", "class", "IoU", "accuracy", "precision", "Dice", "pixels"],
        [
            [
                str(row["id"]),
                _cell(row["name"]),
                *(percent(row[key]) for key in fractions),
                f"{row['pixels']:,}",
            ]
            for row in contents["classes"]
        ],
    )
    return "\n".join(lines) + "\n"


def as_json(contents: Mapping[str, Any]) -> str:
    """JSON with each class, each image and each row of the confusion matrix on one line."""
    parts = []
    for key, value in contents.items():
        if isinstance(value, list):
            rows = ",\n    ".join(json.dumps(row) for row in value)
            text = f"[\n    {rows}\n  ]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(line)} |" for line in [head, *rows]]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def _cell(text: str) -> str:
    """A name from outside, so that it does not end the cell or begin a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
