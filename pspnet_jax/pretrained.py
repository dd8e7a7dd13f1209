"""Weights to start from or to convert: any file or folder -> arrays by our paths.

* A run or converted model, a safetensors file of ours, or a published file (PyTorch, safetensors or Caffe)
  whose names a table in `weights/tables` knows; the kind is told by content, not by suffix.
* `start_from` says what was loaded, re-initialized and left out; what no rule excuses is an error.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pspnet_jax import stored_model
from pspnet_jax.catalog import LabelSet
from pspnet_jax.models.families import FAMILIES
from pspnet_jax.trees import Tree, filled, flatten
from pspnet_jax.weights import caffe, names, pytorch, safetensors, tables
from pspnet_jax.weights.fit import AUXILIARY, CLASSIFIER, HEADS, fit
from pspnet_jax.weights.names import MisfitError, Weights
from pspnet_jax.weights.pytorch import WeightsFileError

OPTIONS = "options"
"""In the metadata of published files that `export` writes: `FORWARD_OPTIONS`, which names and shapes do not tell,
as JSON."""

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


class Source(NamedTuple):
    """Weights to start from."""

    weights: Weights
    label_set: LabelSet | None = None
    """None where it is not known."""
    family: str | None = None
    """Whose network they are; None where it is not known, or a backbone."""


def read_weights(path: Path | str, *, bins: Sequence[int]) -> Source:
    """The weights of a run, a converted model or a file, by our paths.

    Args:
        path: folder or file.
        bins: of the pyramid, into whose order the levels are put. Published files only number them, unless we
            wrote them.
    """
    path = stored_model.find(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not (path / "checkpoints").exists():
        path = files[0]  # the folder of a converted backbone
    if path.is_dir() or stored_model.describes_itself(path):
        stored = stored_model.read(path, step="best")
        log.info("%s: step %d", path, stored.step)
        description, model = stored.description, stored.description.model
        leaves = flatten(stored.part["params"]) | flatten(stored.part["batch_stats"])
        arrays = tables.in_order(
            leaves, model.pyramid_bins, bins, map_first=model.pyramid_map_first
        )
        return Source(_ours(arrays), description.label_set, model.family)
    arrays, metadata = read_file(path)
    if metadata.get("format") == stored_model.FILE_FORMAT:
        return Source(_ours(arrays))
    family = recognize(arrays, where=str(path))
    told = json.loads(metadata.get(OPTIONS, "{}"))
    have = told.get("pyramid_bins", bins)
    weights = tables.read(family, have, arrays)
    if family is None:
        return Source(weights)
    map_first = told.get("pyramid_map_first", FAMILIES[family].options["pyramid_map_first"])
    ordered = tables.in_order(weights.arrays, have, bins, map_first=map_first)
    weights = replace(weights, arrays=ordered)
    return Source(weights, family=family)


def start_from(
    path: str,
    params: Tree,
    batch_stats: Tree,
    *,
    bins: Sequence[int],
    label_set: LabelSet,
    family: str | None = None,
) -> tuple[Tree, Tree]:
    """Parameters and statistics of a new network with all that a file or folder has for it.

    Backbones leave the heads as they are, weights without an auxiliary head leave that; other classes leave the
    classifiers.

    Args:
        bins: of the network's pyramid, in its order.
        label_set: of the network.
        family: of the network; that of the weights is told where it is another one.

    Returns:
        New trees.

    Raises:
        MisfitError: for anything else that does not fit, listing it all.
    """
    weights, stored_set, theirs = read_weights(path, bins=bins)
    fresh = flatten(params) | flatten(batch_stats)
    weights = weights.without(beyond(_highest_stage(fresh)))
    other, anew = None, [HEADS]
    if not weights.is_backbone:
        other = _other_classes(weights, stored_set, label_set)
        anew = [*_lacking_heads(weights), *([CLASSIFIER] if other else [])]
    is_foreign = None not in (family, theirs) and theirs != family
    shapes = {name: tuple(array.shape) for name, array in fresh.items()}
    of_theirs = f"it is of the family '{theirs}' (--config.model.family={theirs})"
    found = fit(
        weights,
        shapes,
        where=path,
        starts_anew="|".join(anew) or None,
        likely_cause=of_theirs if is_foreign else None,
    )
    log.info("init_from=%s", path)
    log.info("  loaded          %s", _listed(list(found.loaded), of=len(fresh)))
    log.info("  re-initialized  %s", _listed(found.reinitialized, of=len(fresh)))
    log.info("  left out        %s", _listed(found.left_out))
    if is_foreign:
        log.warning(
            "  these are weights of the family '%s', whose network computes other things from them than that of "
            "'%s': --config.model.family=%s goes on with what they have learned",
            theirs,
            family,
            theirs,
        )
    if other:
        log.info("  the classifiers start anew: %s", other)
    leaves = {**fresh, **found.loaded}
    return filled(params, leaves), filled(batch_stats, leaves)


def _lacking_heads(weights: Weights) -> list[str]:
    """Patterns of the auxiliary heads of which weights have nothing."""
    lacking = [h for h in AUXILIARY if not any(path.startswith(h) for path in weights.arrays)]
    return [rf"{re.escape(head)}.*" for head in lacking]


def _highest_stage(paths: Iterable[str]) -> int:
    """Of the residual network that has these paths; 4 where it is none."""
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


def _listed(found: Sequence[str], *, of: int | None = None) -> str:
    """A count and names; many names are given by the modules that they lie in."""
    total = "" if of is None else f" of {of}"
    if len(found) <= 8:
        shown = ", ".join(map(names.printable, found))
        return f"{len(found)}{total}" + (f": {shown}" if found else "")
    modules = dict.fromkeys(name.split(".")[0] for name in found)
    return f"{len(found)}{total}: {', '.join(f'{module}.*' for module in modules)}"
