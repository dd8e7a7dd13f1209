"""Weights to start from or to convert: any file or folder -> arrays by our paths.

* A run or converted model, a safetensors file of ours, or a published file (PyTorch or safetensors)
  whose names a table in `weights/names` knows; the kind is told by content, not by suffix.
* `start_from` says what was loaded, re-initialized and left out; what no rule excuses is an error.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from pspnet_jax.catalog import LabelSet
from pspnet_jax.checkpoint import Tree, flatten, unflatten
from pspnet_jax.segmenter import read_checkpoint
from pspnet_jax.weights import names, pytorch, safetensors
from pspnet_jax.weights.names import BACKBONE, Table, Weights
from pspnet_jax.weights.pytorch import WeightsFileError

FORMAT = "pspnet_jax"
"""In the metadata of safetensors files that hold our own paths and layout."""

log = logging.getLogger("pspnet_jax")


def read_file(path: Path | str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Arrays of a PyTorch or safetensors file by the names that it gives them, and its metadata.

    Raises:
        FileNotFoundError: where there is no such file.
        WeightsFileError: where it cannot be read, saying why.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    if safetensors.is_safetensors(path):
        return safetensors.read(path)
    return pytorch.read(path), {}


def recognize(keys: Iterable[str], *, bins: Sequence[int], where: str) -> Table:
    """The table whose names a published file uses.

    Raises:
        WeightsFileError: where none does, with some of the names.
    """
    keys = [key.removeprefix("module.") for key in keys]
    if any(key.startswith(("layer0.", "ppm.", "cls.")) for key in keys):
        return names.TABLES["semseg"](bins)
    if any(key.startswith("layer1.") for key in keys):
        return BACKBONE
    raise WeightsFileError(
        f"{where} holds names of no network that is known here: {', '.join(keys[:5])}, ..."
    )


def read_weights(path: Path | str, *, bins: Sequence[int]) -> tuple[Weights, LabelSet | None]:
    """The weights of a run, a converted model or a file, by our paths, and their label set if it is known.

    Args:
        path: folder or file.
        bins: of the pyramid, because published files only number its levels.
    """
    if Path(path).is_dir():
        stored = read_checkpoint(path, step="best")
        arrays = flatten(stored.part["params"]) | flatten(stored.part["batch_stats"])
        return _ours(arrays), stored.description.label_set
    arrays, metadata = read_file(path)
    if metadata.get("format") == FORMAT:
        return _ours(arrays), None
    return names.rename(arrays, recognize(arrays, bins=bins, where=str(path))), None


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
    same_classes = stored_set is None or stored_set.names == label_set.names
    fresh = flatten(params) | flatten(batch_stats)
    fit = names.fit(
        weights,
        {name: tuple(array.shape) for name, array in fresh.items()},
        where=path,
        may_be_missing=names.HEADS if weights.is_backbone else None,
        may_differ=names.CLASSIFIER,
        must_differ=None if same_classes else names.CLASSIFIER,
    )
    log.info("init_from=%s", path)
    log.info("  loaded          %s", _listed(list(fit.loaded), of=len(fresh)))
    log.info("  re-initialized  %s", _listed(fit.reinitialized, of=len(fresh)))
    log.info("  left out        %s", _listed(fit.left_out))
    _explain_classifier(fit.reinitialized, weights, stored_set, label_set)
    merged = unflatten({name: fit.loaded.get(name, array) for name, array in fresh.items()})
    return _like(params, merged), _like(batch_stats, merged)


def _ours(arrays: Mapping[str, np.ndarray]) -> Weights:
    return Weights(arrays, {path: path for path in arrays})


def _explain_classifier(
    reinitialized: Sequence[str],
    weights: Weights,
    stored_set: LabelSet | None,
    label_set: LabelSet,
) -> None:
    bias = "head.classifier.bias"
    if bias in reinitialized and bias in weights.arrays:
        log.info(
            "  the classifiers start anew: %d classes%s there, %d of '%s' here",
            weights.arrays[bias].size,
            f" of '{stored_set.name}'" if stored_set else "",
            label_set.num_classes,
            label_set.name,
        )


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
        return f"{len(found)}{total}" + (f": {', '.join(found)}" if found else "")
    modules = dict.fromkeys(name.split(".")[0] for name in found)
    return f"{len(found)}{total}: {', '.join(f'{module}.*' for module in modules)}"
