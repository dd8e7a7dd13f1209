"""Conversion: published weights -> a model that evaluates, predicts and starts trainings here.

* What the network is (depth, width, stem, reduction, classes) is read from the file's names and shapes;
  only the pyramid's bins are not in it, the family's are taken unless others are given.
* With a label set: a run at step 0. Without: one safetensors file with a backbone, for `init_from`.
"""

import collections
import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from pspnet_jax import protocols
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.checkpoint import CheckpointFolder, flatten, unflatten
from pspnet_jax.config import default_config
from pspnet_jax.models.families import FAMILIES, ModelOptions
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.models.resnet import DEPTHS
from pspnet_jax.passes import structure
from pspnet_jax.pretrained import FORMAT, read_file, recognize
from pspnet_jax.segmenter import Description, model_part
from pspnet_jax.train_step import split_model
from pspnet_jax.weights import names, safetensors
from pspnet_jax.weights.fit import Shape, fit, stem_of
from pspnet_jax.weights.names import BACKBONE, MisfitError, Weights

_BLOCK = re.compile(r"backbone\.layer(\d+)_(\d+)\.(.+)")

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
    arrays, metadata = read_file(files[0])
    if metadata.get("format") == FORMAT:
        raise ValueError(f"{files[0]} is converted already: use it with --config.init_from")
    if pyramid_bins is None and "pyramid_bins" in metadata:  # a file that `export` wrote
        pyramid_bins = tuple(json.loads(metadata["pyramid_bins"]))
    found = recognize(arrays, where=files[0])
    usual = FAMILIES[found or family].options["pyramid_bins"]
    bins = usual if pyramid_bins is None else pyramid_bins
    table = BACKBONE if found is None else names.TABLES[found](bins)
    if found not in (None, family):
        raise ValueError(f"{files[0]} is {table.source}: choose its --family={found}")
    if found is not None and labels is None:
        raise ValueError(
            f"{files[0]} is a whole network ({table.source}): say which classes it has, "
            "e.g. --labels=ade20k"
        )
    if found is None and (labels, pyramid_bins) != (None, None):
        raise ValueError(
            f"{files[0]} is a backbone without heads, it has no classes and no pyramid: convert it "
            "without --labels and --pyramid_bins, or start a training from it with --config.init_from"
        )
    weights = names.rename(arrays, table)
    options = infer_options(weights, family=family, bins=pyramid_bins, where=files[0])
    if labels is None:
        return _convert_backbone(files[0], weights, options, Path(output))
    return _convert_network(files[0], weights, options, load_label_set(labels), Path(output))


def _convert_network(
    file: str, weights: Weights, options: ModelOptions, label_set: LabelSet, output: Path
) -> Path:
    checkpoints = CheckpointFolder(output / "checkpoints")
    if checkpoints.steps() or (output / "config.json").exists():
        raise FileExistsError(f"{output} holds a model already; choose another --output")
    _check_classes(weights, label_set, file)
    family = FAMILIES[options.family]
    protocol = protocols.choose(family.protocol, label_set)
    description = Description(options, label_set, family.normalization, protocol)
    _, params, batch_stats = structure(description.network())
    shapes = {path: tuple(x.shape) for path, x in (flatten(params) | flatten(batch_stats)).items()}
    _check_amount(weights, shapes, options, file)
    found = fit(weights, shapes, where=file)
    loaded = {
        part: unflatten({path: found.loaded[path] for path in flatten(tree)})
        for part, tree in (("params", params), ("batch_stats", batch_stats))
    }
    output.mkdir(parents=True, exist_ok=True)
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
        protocol.name,
    )
    log.info("%d tensors -> %s", len(found.loaded), output)
    return output


def _convert_backbone(file: str, weights: Weights, options: ModelOptions, output: Path) -> Path:
    target = output / f"{options.backbone}.safetensors"
    if target.exists():
        raise FileExistsError(f"{target} exists; choose another --output")
    model = nnx.eval_shape(lambda: PSPNet(options, 2, rng=NoRandomNumbers()))
    _, params, batch_stats = split_model(model)
    leaves = flatten(params) | flatten(batch_stats)
    shapes = {p: tuple(x.shape) for p, x in leaves.items() if p.startswith("backbone.")}
    _check_amount(weights, shapes, options, file)
    found = fit(weights, shapes, where=file)
    metadata = {"format": FORMAT, "backbone": options.backbone, "stem": options.stem}
    safetensors.write(target, found.loaded, metadata)
    log.info(
        "%s: %s, width %d, stem %s; %d tensors -> %s; left out: %s",
        file,
        options.backbone,
        options.width,
        options.stem,
        len(found.loaded),
        target,
        ", ".join(found.left_out) or "nothing",
    )
    return target


def infer_options(
    weights: Weights, *, family: str, bins: tuple[int, ...] | None, where: str
) -> ModelOptions:
    """The options of the network that has (nearly) these parameters.

    Nearly, because one missing or foreign key must not change the answer: it is named when the weights
    are fitted to the network.

    Args:
        weights: by our paths and in our layout.
        bins: of the pyramid; None: the family's, or none where the head sees no pyramid.
        where: the file's name, for messages.

    Raises:
        MisfitError: where there is no residual network in it.
    """
    shapes = {path: array.shape for path, array in weights.arrays.items()}
    blocks = {m.groups() for m in map(_BLOCK.fullmatch, shapes) if m}
    width = _width(shapes)
    if not blocks or width is None:
        unknown = ", ".join(map(names.printable, weights.unknown[:5]))
        raise MisfitError(
            f"{where} holds no residual blocks (layer1.0.conv1.weight, ...)"
            + (f"; keys that are not known: {unknown}" if unknown else "")
        )
    section: dict[str, Any] = {**default_config().model.to_dict(), "family": family}
    section["backbone"], section["width"] = _depth(blocks), width
    section["stem"] = stem_of(shapes)
    has_levels = any(path.startswith("pyramid.") for path in shapes)
    channels = 8 * width * DEPTHS[section["backbone"]][0].expansion
    head = shapes.get("head.conv.kernel", ())
    if bins is None and not has_levels and len(head) == 4 and head[2] == channels:
        bins = ()  # the authors' use_ppm=False
    section["pyramid_bins"] = bins
    # Unreduced levels are the pooled maps themselves: nothing of them is in a file.
    unreduced = bins and not has_levels and len(head) == 4 and head[2] == channels * (1 + len(bins))
    section["pyramid_reduction"] = False if unreduced else None
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


def _width(shapes: Mapping[str, Shape]) -> int | None:
    """Planes of the first stage, as most convolutions of the blocks say; None where there are none."""
    votes: collections.Counter[int] = collections.Counter()
    for path, shape in shapes.items():
        match = _BLOCK.fullmatch(path)
        if (
            match
            and match[3] in ("conv1.kernel", "conv2.kernel")
            and len(shape) == 4
            and all(shape)
        ):
            votes[shape[-1] // 2 ** (int(match[1]) - 1)] += 1
    return max(votes.most_common(1)[0][0], 1) if votes else None


def _check_amount(
    weights: Weights, shapes: Mapping[str, Shape], options: ModelOptions, file: str
) -> None:
    """Refuse a file that only claims to be large, before memory is taken for what it claims."""
    held = sum(array.size for array in weights.arrays.values())
    claimed = sum(math.prod(shape) for shape in shapes.values())
    if claimed > 4 * held:
        raise MisfitError(
            f"{file} has the names of {options.backbone} of width {options.width}, {claimed:,} values, but "
            f"holds {held:,}: it is damaged or no such network"
        )


def _check_classes(weights: Weights, label_set: LabelSet, file: str) -> None:
    counts = weights.num_classes
    if counts and label_set.num_classes not in counts:
        raise MisfitError(
            f"{file} has {'/'.join(map(str, counts))} classes, label set '{label_set.name}' has "
            f"{label_set.num_classes}: choose the --labels it was trained on"
        )
