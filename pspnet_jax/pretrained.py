"""Weights to start from or to convert: any file or folder -> arrays by our paths.

* A run or converted model, a safetensors file of ours, or a published file (PyTorch, safetensors or Caffe)
  whose names a table in `weights/tables` knows; the kind is told by content, not by suffix.
* `start_from` says what was loaded, re-initialized and left out; what no rule excuses is an error.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax import stored_model
from pspnet_jax.catalog import LabelSet
from pspnet_jax.models.families import FAMILIES, FORWARD_OPTIONS, ModelOptions
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
    options: Mapping[str, Any] = MappingProxyType({})
    """Those of `FORWARD_OPTIONS` that are known of that network."""


def read_weights(path: Path | str, *, model: ModelOptions) -> Source:
    """The weights of a run, a converted model or a file, by our paths.

    Args:
        path: folder or file.
        model: of the network that they are for, into whose order the parts of the pyramid are put.
    """
    path = stored_model.find(path)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 and not (path / "checkpoints").exists():
        path = files[0]  # the folder of a converted backbone
    if path.is_dir() or stored_model.describes_itself(path):
        stored = stored_model.read(path, step="best")
        log.info("%s: step %d", path, stored.step)
        theirs = stored.description.model
        weights = _ours(flatten(stored.part["params"]) | flatten(stored.part["batch_stats"]))
        options = {name: getattr(theirs, name) for name in FORWARD_OPTIONS}
        source = Source(weights, stored.description.label_set, theirs.family, options)
        have = tables.order_of(asdict(theirs))
    else:
        arrays, metadata = read_file(path)
        if metadata.get("format") == stored_model.FILE_FORMAT:
            return Source(_ours(arrays))
        family = recognize(arrays, where=str(path))
        options = told_by(metadata, where=str(path))
        have = _published_order(family, options, model)
        source = Source(tables.read(family, have, arrays), None, family, options)
    ordered = tables.in_order(source.weights.arrays, have, tables.order_of(asdict(model)))
    return source._replace(weights=replace(source.weights, arrays=ordered))


def told_by(metadata: Mapping[str, str], *, where: str) -> dict[str, Any]:
    """Options that a published file tells beside its arrays; most tell none.

    Raises:
        WeightsFileError: for what is no option of a forward pass.
    """
    try:
        told = dict(json.loads(metadata.get(OPTIONS, "{}")))
    except (ValueError, TypeError) as error:
        raise WeightsFileError(f"{where}: its metadata cannot be read ({error})") from None
    told = {name: tuple(x) if isinstance(x, list) else x for name, x in told.items()}
    for name, value in told.items():
        usual = FAMILIES["semseg"].options[name] if name in FORWARD_OPTIONS else None
        numbers = value if isinstance(value, tuple) else ()
        if type(value) is not type(usual) or any(type(number) is not int for number in numbers):
            raise WeightsFileError(
                f"{where}: its metadata say {name[:80]!r}: {str(value)[:80]!r}, which is no option of a network here"
            )
    return told


def _published_order(
    family: str | None, options: Mapping[str, Any], model: ModelOptions
) -> tables.Order:
    """Published files only number the levels: in the order that they tell, or that is their family's; in that of
    the network where it is of the same family, or has other bins."""
    of_network = tables.order_of(asdict(model))
    usual = FAMILIES[family].options if family and family != model.family else {}
    bins = usual.get("pyramid_bins", of_network.bins)
    if sorted(bins) != sorted(of_network.bins):
        bins = of_network.bins
    return tables.Order(
        options.get("pyramid_bins", bins),
        options.get("pyramid_map_first", usual.get("pyramid_map_first", of_network.map_first)),
    )


def start_from(
    path: str, params: Tree, batch_stats: Tree, *, model: ModelOptions, label_set: LabelSet
) -> tuple[Tree, Tree]:
    """Parameters and statistics of a new network with all that a file or folder has for it.

    Backbones leave the heads as they are, weights without an auxiliary head leave that; other classes leave the
    classifiers. Another family, and options of the forward pass that the weights were trained with and the network
    has not, are told.

    Args:
        model: of the network.
        label_set: of the network.

    Returns:
        New trees.

    Raises:
        MisfitError: for anything else that does not fit, listing it all.
    """
    weights, stored_set, theirs, options = read_weights(path, model=model)
    fresh = flatten(params) | flatten(batch_stats)
    weights = weights.without(beyond(_highest_stage(fresh)))
    other, anew = None, [HEADS]
    if not weights.is_backbone:
        other = _other_classes(weights, stored_set, label_set)
        anew = [*_lacking_heads(weights), *([CLASSIFIER] if other else [])]
    is_foreign = theirs not in (None, model.family)
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
    if others := _other_options(options, model):
        log.info("  trained with    %s", ", ".join(others))
    if is_foreign:
        log.warning(
            "  these are weights of the family '%s', whose network computes other things from them than that of "
            "'%s': --config.model.family=%s goes on with what they have learned",
            theirs,
            model.family,
            theirs,
        )
    if other:
        log.info("  the classifiers start anew: %s", other)
    leaves = {**fresh, **found.loaded}
    return filled(params, leaves), filled(batch_stats, leaves)


def _other_options(options: Mapping[str, Any], model: ModelOptions) -> list[str]:
    """What is known of the weights' network and is otherwise in this one, but for the order that was mended."""
    wrong = {name for name, value in options.items() if value != getattr(model, name)}
    wrong.discard("pyramid_map_first")
    if sorted(options.get("pyramid_bins", ())) == sorted(model.pyramid_bins):
        wrong.discard("pyramid_bins")
    return [f"{name}={options[name]} (here {getattr(model, name)})" for name in sorted(wrong)]


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
