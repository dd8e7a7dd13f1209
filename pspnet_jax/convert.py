"""Conversion: published weights -> a model that evaluates, predicts and starts trainings here.

* What the network is (depth, width, stem, reduction, classes) is read from the file's names and shapes;
  only the pyramid's bins are not in it, the family's are taken unless others are given.
* With a label set: a run at step 0. Without: one safetensors file with a backbone, for `init_from`.
"""

import collections
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.checkpoint import CheckpointFolder, flatten, unflatten
from pspnet_jax.config import default_config
from pspnet_jax.models.pspnet import FAMILIES, ModelOptions
from pspnet_jax.models.resnet import DEPTHS
from pspnet_jax.pretrained import FORMAT, read_file, recognize
from pspnet_jax.segmenter import Description, model_part, structure
from pspnet_jax.weights import names, safetensors
from pspnet_jax.weights.names import BACKBONE, MisfitError, Shape, Weights
from pspnet_jax.windows import choose

_BLOCK = re.compile(r"backbone\.layer(\d+)_(\d+)\.(.+)")
_PLANES = re.compile(r"(conv|norm)[12]\.\w+")

log = logging.getLogger("pspnet_jax")


def run(
    files: Sequence[str],
    *,
    output: str,
    family: str = "semseg",
    labels: str | None = None,
    pyramid_bins: tuple[int, ...] | None = None,
) -> Path:
    """The verb `convert`.

    Args:
        files: the published file.
        output: folder of the converted model, or of the backbone's file.
        family: a key of `weights.names.TABLES`.
        labels: label set of the classifier; None: the file is a backbone.
        pyramid_bins: bins per axis of each level; None: the family's.

    Returns:
        The folder or the file that was written.

    Raises:
        ValueError: for a file that cannot be read, or does not fit; nothing is written then.
        FileExistsError: where there is a model already.
    """
    if family not in names.TABLES:
        raise ValueError(f"family={family!r} is not one of {', '.join(names.TABLES)}")
    if len(files) != 1:
        raise ValueError(
            f"family '{family}' is converted from one file, {len(files)} were given: "
            f"{' '.join(files) or 'name it after the options'}"
        )
    bins = FAMILIES[family].options["pyramid_bins"] if pyramid_bins is None else pyramid_bins
    arrays, metadata = read_file(files[0])
    if metadata.get("format") == FORMAT:
        raise ValueError(f"{files[0]} is converted already: use it with --config.init_from")
    table = recognize(arrays, bins=bins, where=files[0])
    if labels is None and table is not BACKBONE:
        raise ValueError(
            f"{files[0]} is a whole network ({table.source}): say which classes it has, "
            "e.g. --labels=ade20k"
        )
    if labels is not None and table is BACKBONE:
        raise ValueError(
            f"{files[0]} is a backbone without heads, it has no classes: convert it without --labels, "
            "or start a training from it with --config.init_from"
        )
    weights = names.rename(arrays, table)
    if labels is None:
        return _convert_backbone(files[0], weights, Path(output))
    if not any(path.startswith("pyramid.") for path in weights.arrays) and pyramid_bins is None:
        bins = ()  # the authors' use_ppm=False
    return _convert_network(files[0], weights, family, bins, labels, Path(output))


def _convert_network(
    file: str,
    weights: Weights,
    family: str,
    bins: tuple[int, ...],
    labels: str,
    output: Path,
) -> Path:
    checkpoints = CheckpointFolder(output / "checkpoints")
    if checkpoints.steps() or (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model already; choose another --output")
    label_set = load_label_set(labels)
    shapes = {path: array.shape for path, array in weights.arrays.items()}
    options = infer_options(shapes, family=family, bins=bins)
    _check_classes(shapes, label_set, file)
    description = Description(
        options,
        label_set,
        FAMILIES[family].normalization,
        choose(FAMILIES[family].protocol, label_set),
    )
    _, params, batch_stats = structure(description)
    fit = names.fit(weights, _shapes(params, batch_stats), where=file)
    loaded = {
        part: unflatten({path: fit.loaded[path] for path in flatten(tree)})
        for part, tree in (("params", params), ("batch_stats", batch_stats))
    }
    with checkpoints:
        checkpoints.save(0, {"model": model_part(description, **loaded)}, mean_iou=None)
    log.info(
        "%s: PSPNet on %s, width %d, stem %s, pyramid %s, %d classes of '%s', protocol %s",
        file,
        options.backbone,
        options.width,
        options.stem,
        options.pyramid_bins,
        label_set.num_classes,
        label_set.name,
        description.protocol.name,
    )
    log.info("%d tensors -> %s", len(fit.loaded), output)
    return output


def _convert_backbone(file: str, weights: Weights, output: Path) -> Path:
    shapes = {path: array.shape for path, array in weights.arrays.items()}
    options = infer_options(shapes, family="semseg", bins=())
    label_set = load_label_set("ade20k")  # its classifier is not looked at
    family = FAMILIES[options.family]
    description = Description(options, label_set, family.normalization, choose("whole", label_set))
    _, params, batch_stats = structure(description)
    wanted = {
        path: shape
        for path, shape in _shapes(params, batch_stats).items()
        if path.startswith("backbone.")
    }
    fit = names.fit(weights, wanted, where=file)
    target = output / f"{options.backbone}.safetensors"
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another --output")
    metadata = {"format": FORMAT, "backbone": options.backbone, "stem": options.stem}
    safetensors.write(target, fit.loaded, metadata)
    log.info(
        "%s: %s, width %d, stem %s; %d tensors -> %s; left out: %s",
        file,
        options.backbone,
        options.width,
        options.stem,
        len(fit.loaded),
        target,
        ", ".join(fit.left_out) or "nothing",
    )
    return target


def infer_options(
    shapes: Mapping[str, Shape], *, family: str, bins: tuple[int, ...]
) -> ModelOptions:
    """The options of the network that has (nearly) these parameters.

    Nearly, because one missing or foreign key must not change the answer: it is named when the weights
    are fitted to the network.

    Args:
        shapes: of arrays by our paths and in our layout.
        bins: of the pyramid.

    Raises:
        MisfitError: where there is no residual network in it.
    """
    blocks = {m.groups() for m in map(_BLOCK.fullmatch, shapes) if m}
    if not blocks:
        raise MisfitError("the file holds no residual blocks (layer1.0.conv1.weight, ...)")
    section: dict[str, Any] = {**default_config().model.to_dict(), "family": family}
    section["backbone"] = _depth(blocks)
    section["width"] = _width(shapes)
    section["stem"] = (
        "deep" if any(re.match(r"backbone\.stem\.\w+[23]\.", p) for p in shapes) else "7x7"
    )
    section["pyramid_bins"] = bins
    # Unreduced levels are the pooled maps themselves: nothing of them is in a file.
    section["pyramid_reduction"] = not bins or any(p.startswith("pyramid.") for p in shapes)
    return ModelOptions.resolve(section)


def _depth(blocks: set[tuple[str, ...]]) -> str:
    """The backbone whose blocks differ least from those found."""
    bottlenecks = {block[:2] for block in blocks if block[2].startswith("conv3")}
    expansion = 4 if 2 * len(bottlenecks) > len({block[:2] for block in blocks}) else 1
    found = {(int(stage), int(i)) for stage, i, _ in blocks}

    def difference(name: str) -> int:
        counts = DEPTHS[name][1]
        return len(found ^ {(s + 1, i) for s, count in enumerate(counts) for i in range(count)})

    return min(
        (n for n, (kind, _) in DEPTHS.items() if kind.expansion == expansion), key=difference
    )


def _width(shapes: Mapping[str, Shape]) -> int:
    """Planes of the first stage, as most layers of the blocks say."""
    votes: collections.Counter[int] = collections.Counter()
    for path, shape in shapes.items():
        match = _BLOCK.fullmatch(path)
        if match and _PLANES.fullmatch(match[3]) and shape:
            votes[shape[-1] // 2 ** (int(match[1]) - 1)] += 1
    return votes.most_common(1)[0][0]


def _check_classes(shapes: Mapping[str, Shape], label_set: LabelSet, file: str) -> None:
    found = {
        shapes[p][-1] for p in ("head.classifier.bias", "aux_head.classifier.bias") if p in shapes
    }
    if found and label_set.num_classes not in found:
        raise MisfitError(
            f"{file} has {found.pop()} classes, label set '{label_set.name}' has "
            f"{label_set.num_classes}: choose the --labels it was trained on"
        )


def _shapes(params: dict, batch_stats: dict) -> dict[str, Shape]:
    leaves = flatten(params) | flatten(batch_stats)
    return {path: tuple(leaf.shape) for path, leaf in leaves.items()}
