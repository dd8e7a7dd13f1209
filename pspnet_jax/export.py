"""Export: a model trained or converted here -> a file with published names and layout."""

import json
import logging
from pathlib import Path

import numpy as np

from pspnet_jax.checkpoint import flatten
from pspnet_jax.segmenter import read_checkpoint
from pspnet_jax.weights import names, safetensors

FORMATS = ("safetensors",)

log = logging.getLogger("pspnet_jax")


def run(checkpoint: str, *, format: str, output: str, step: str = "best") -> Path:
    """The verb `export`: the names and the layout in which the family's published weights come.

    Args:
        checkpoint: folder of a run or of a converted model.
        format: 'safetensors'.
        output: the file.
        step: 'best', 'latest' or a number.

    Raises:
        ValueError: for an unknown format.
        FileExistsError: where the file exists.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    target = Path(output)
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another --output")
    stored = read_checkpoint(checkpoint, step=step)
    options = stored.description.model
    table = names.TABLES[options.family](options.pyramid_bins)
    arrays = flatten(stored.part["params"]) | flatten(stored.part["batch_stats"])
    published = names.publish(
        {path: np.asarray(array) for path, array in arrays.items()}, table, steps=stored.step
    )
    metadata = {
        "format": "pt",
        "family": options.family,
        "backbone": options.backbone,
        "pyramid_bins": json.dumps(options.pyramid_bins),  # the names only number the levels
    }
    safetensors.write(target, published, metadata)
    log.info(
        "%d tensors and %d counters of norms with the names of %s -> %s",
        len(arrays),
        len(published) - len(arrays),
        table.source,
        target,
    )
    return target
