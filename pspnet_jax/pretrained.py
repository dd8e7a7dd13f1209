"""Weights to start from or to convert: any file or folder -> arrays by our paths.

* A run or converted model, a safetensors file of ours, or a published file (PyTorch or safetensors)
  whose names a table in `weights/names` knows; the kind is told by content, not by suffix.
* `start_from` says what was loaded, re-initialized and left out; what no rule excuses is an error.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pspnet_jax.catalog import LabelSet
from pspnet_jax.checkpoint import Tree, flatten, unflatten
from pspnet_jax.segmenter import read_checkpoint
from pspnet_jax.weights import caffe, names, pytorch, safetensors, tables
from pspnet_jax.weights.fit import CLASSIFIER, HEADS, fit
from pspnet_jax.weights.names import MisfitError, Weights
from pspnet_jax.weights.pytorch import WeightsFileError

FORMAT = "pspnet_jax"
"""In the metadata of safetensors files that hold our own paths and layout."""

OPTIONS = "options"
UNTOLD_OPTIONS = ("pyramid_bins", "align_corners", "output_stride", "bottleneck_stride")
"""Options that neither the names nor the shapes of published weights tell; in the metadata of what `export`
writes they stand under `OPTIONS`, as JSON."""

log = logging.getLogger("pspnet_jax")


def read_file(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of a PyTorch, safetensors or Caffe file by name, and its metadata; without 'module.' before all
    names.

    Of a Caffe file the metadata are what its strides say, in the form that `export` writes.

    Raises:
        FileNotFoundError: where there is no such file.
        WeightsFileError: where it cannot be read, saying why.
        MisfitError: where some names have the prefix and some do not.
    """
    path = Path(path)
    if path.is_dir():
        raise WeightsFileError(f"{path} is a folder; a file of weights is wanted")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if safetensors.is_safetensors(path):
        arrays, metadata = safetensors.read(path)
    elif caffe.is_caffemodel(path):
        arrays, strides = caffe.read(path)
        metadata = _said_by(strides)
    else:
        arrays, metadata = pytorch.read(path), {}
    try:
        return names.without_prefix(arrays), metadata
    except MisfitError as error:
        raise MisfitError(f"{path}: {error}") from None


def _said_by(strides: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Which convolution of a bottleneck has its stride, where the file says it."""
    for layer, where in (("conv3_1_1x1_reduce", "1x1"), ("conv3_1_3x3", "3x3")):
        if strides.get(layer) == (2, 2):
            return {OPTIONS: json.dumps({"bottleneck_stride": where})}
    return {}


def recognize(keys: Iterable[str], *, where: str) -> str | None:
    """The family whose names a published file uses; None for a backbone.

    Raises:
        WeightsFileError: where they are nobody's, with some of the names.
    """
    try:
        return tables.recognize(keys)
    except MisfitError as some:
        message = f"{where} holds names of no network that is known here: {some}, ..."
        raise WeightsFileError(message) from None


def beyond(num_stages: int) -> str:
    """A pattern of the paths of a backbone's stages after the first so many, which a network cut off has not."""
    return rf"backbone\.layer({'|'.join(map(str, range(num_stages + 1, 5))) or '-'})_.*"


def read_weights(path: Path | str, *, bins: Sequence[int]) -> tuple[Weights, LabelSet | None]:
    """The weights of a run, a converted model or a file, by our paths, and their label set if it is known.

    Args:
        path: folder or file.
        bins: of the pyramid, because published files only number its levels.
    """
    path = Path(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not (path / "checkpoints").exists():
        path = files[0]  # the folder of a converted backbone
    if path.is_dir():
        stored = read_checkpoint(path, step="best")
        log.info("%s: step %d", path, stored.step)
        arrays = flatten(stored.part["params"]) | flatten(stored.part["batch_stats"])
        return _ours(arrays), stored.description.label_set
    arrays, metadata = read_file(path)
    if metadata.get("format") == FORMAT:
        return _ours(arrays), None
    family = recognize(arrays, where=str(path))
    return tables.read(family, bins, arrays), None


def start_from(
    path: str, params: Tree, batch_stats: Tree, *, bins: Sequence[int], label_set: LabelSet
) -> tuple[Tree, Tree]:
    """Parameters and statistics of a new network with all that a file or folder has for it.

    Backbones leave the heads as they are; other classes leave the classifiers.

    Returns:
        New trees.

    Raises:
        MisfitError: for anything else that does not fit, listing it all.
    """
    weights, stored_set = read_weights(path, bins=bins)
    fresh = flatten(params) | flatten(batch_stats)
    if weights.is_backbone:
        weights = weights.without(beyond(_num_stages(fresh)))
    starts_anew = None
    if weights.is_backbone:
        starts_anew = HEADS
    elif other := _other_classes(weights, stored_set, label_set):
        starts_anew = CLASSIFIER
    found = fit(
        weights,
        {name: tuple(array.shape) for name, array in fresh.items()},
        where=path,
        starts_anew=starts_anew,
    )
    log.info("init_from=%s", path)
    log.info("  loaded          %s", _listed(list(found.loaded), of=len(fresh)))
    log.info("  re-initialized  %s", _listed(found.reinitialized, of=len(fresh)))
    log.info("  left out        %s", _listed(found.left_out))
    if starts_anew == CLASSIFIER:
        log.info("  the classifiers start anew: %s", other)
    merged = unflatten({name: found.loaded.get(name, array) for name, array in fresh.items()})
    return _like(params, merged), _like(batch_stats, merged)


def _num_stages(paths: Iterable[str]) -> int:
    """Stages of the residual network that has these paths; any number where it is none."""
    found = [re.match(r"backbone\.layer(\d+)_", path) for path in paths]
    return max((int(match[1]) for match in found if match), default=4)


def _ours(arrays: Mapping[str, np.ndarray]) -> Weights:
    return Weights(arrays, {path: path for path in arrays})


def _other_classes(
    weights: Weights, stored_set: LabelSet | None, label_set: LabelSet
) -> str | None:
    """How the classes of the weights differ from those of the network; None where they do not.

    Files know no names: theirs are the same where their number is.
    """
    counts = weights.num_classes
    same_number = not counts or label_set.num_classes in counts
    if same_number and (stored_set is None or stored_set.names == label_set.names):
        return None
    there = "/".join(map(str, counts)) + " classes"
    there += f" of '{stored_set.name}'" if stored_set else ""
    return f"{there} there, {label_set.num_classes} of '{label_set.name}' here"


def _like(tree: Tree, merged: Tree) -> Tree:
    """Those entries of `merged` that `tree` has."""
    return {
        key: _like(value, merged[key]) if isinstance(value, dict) else merged[key]
        for key, value in tree.items()
    }


def _listed(found: Sequence[str], *, of: int | None = None) -> str:
    """A count and names; many names are given by the modules that they lie in."""
    total = "" if of is None else f" of {of}"
    if len(found) <= 8:
        shown = ", ".join(map(names.printable, found))
        return f"{len(found)}{total}" + (f": {shown}" if found else "")
    modules = dict.fromkeys(name.split(".")[0] for name in found)
    return f"{len(found)}{total}: {', '.join(f'{module}.*' for module in modules)}"
