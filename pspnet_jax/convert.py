"""Conversion: published weights -> a model that evaluates, predicts and starts trainings here.

* What the network is (depth, width, stem, stages, reduction, classes) is read from the file's names and
  shapes; what they do not tell is the family's unless other values are given, or `export` wrote them beside.
* With a label set: a run at step 0. Without: one safetensors file with a backbone, for `init_from`.
"""

import collections
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from pspnet_jax import protocols
from pspnet_jax.catalog import LabelSet, load_label_set
from pspnet_jax.checkpoint import CheckpointFolder
from pspnet_jax.config import default_config
from pspnet_jax.models.families import FAMILIES, ModelOptions
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.models.resnet import DEPTHS
from pspnet_jax.passes import structure
from pspnet_jax.pretrained import beyond, read_file, recognize, told_by
from pspnet_jax.stored_model import FILE_FORMAT, Description, model_part
from pspnet_jax.train_step import split_model
from pspnet_jax.trees import filled, flatten
from pspnet_jax.weights import names, safetensors, tables
from pspnet_jax.weights.fit import Shape, fit, stem_of
from pspnet_jax.weights.names import MisfitError, Weights

_NUM_FILES = {"csail": 2}
"""Family -> how many files it publishes, where these are not one."""
_BLOCK = re.compile(r"backbone\.layer(\d+)_(\d+)\.(.+)")

log = logging.getLogger("pspnet_jax")


def run(
    files: Sequence[str],
    *,
    output: str,
    family: str = "semseg",
    labels: str | None = None,
    **told: Any,
) -> Path:
    """The verb `convert`.

    Args:
        files: the published file; of CSAIL's networks both, the encoder's and the decoder's.
        output: folder of the converted model, or of the backbone's file.
        family: a key of `models.families.FAMILIES`.
        labels: label set of the classifier; None: the file is a backbone.
        told: options of the network that the file does not tell; None or none: the family's.

    Returns:
        The folder or the file that was written.

    Raises:
        ValueError: for a file that cannot be read, or does not fit; nothing is written then.
        FileExistsError: where there is a model already.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is not one of {', '.join(FAMILIES)}")
    if not files:
        raise ValueError("which file? Name it after the options")
    where = " and ".join(files)
    arrays, known = _read_all(files)
    known = _agreed(known, told, where)
    found = recognize(arrays, where=where)
    source = tables.of_file(found, (), arrays).source
    if found not in (None, family):
        raise ValueError(f"{where} is {source}: choose its --family={found}")
    if len(files) > _NUM_FILES.get(family, 1):
        count = "two files, encoder and decoder" if family in _NUM_FILES else "one file"
        raise ValueError(
            f"family '{family}' is converted from {count}, {len(files)} were given: {' '.join(files)}"
        )
    if found is not None and labels is None:
        raise ValueError(
            f"{where} is a whole network ({source}): say which classes it has, e.g. --labels=ade20k"
        )
    if found is None and (labels is not None or known):
        raise ValueError(
            f"{where} is a backbone without heads, it has no classes and no pyramid: "
            + ("give the decoder's file too, or " if family in _NUM_FILES else "")
            + "convert it without --labels and the options of a pyramid, or start a training from it with "
            "--config.init_from"
        )
    if found is None:
        known |= {"num_stages": 4}  # whole, whatever a family leaves out
    order = tables.order_of({**FAMILIES[family].options, **known})
    weights = tables.read(found, order, arrays)
    options = infer_options(weights, family=family, told=known, where=where)
    weights = weights.without(beyond(options.num_stages))
    if labels is None:
        return _convert_backbone(where, weights, options, Path(output))
    return _convert_network(where, weights, options, load_label_set(labels), Path(output))


def _agreed(known: dict[str, Any], told: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a file says and what the command says, which must not be another thing."""
    told = {name: value for name, value in told.items() if value is not None}
    for name in told.keys() & known.keys():
        if told[name] != known[name]:
            raise ValueError(f"{where} says {name}={known[name]}: leave --{name}={told[name]} out")
    return known | told


def _read_all(files: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays of all files, and the options that they tell beside them."""
    arrays: dict[str, np.ndarray] = {}
    known: dict[str, Any] = {}
    for file in files:
        found, metadata = read_file(file)
        if metadata.get("format") == FILE_FORMAT:
            raise ValueError(f"{file} is converted already: use it with --config.init_from")
        twice = sorted(arrays.keys() & found.keys())
        if twice:
            raise ValueError(f"{' and '.join(files)} both have {', '.join(twice[:5])}")
        arrays |= found
        known |= told_by(metadata, where=file)
    return arrays, known


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
        part: filled(tree, found.loaded)
        for part, tree in (("params", params), ("batch_stats", batch_stats))
    }
    output.mkdir(parents=True, exist_ok=True)
    with checkpoints:
        checkpoints.save(0, {"model": model_part(description, **loaded)}, mean_iou=None)
    log.info(
        "%s: PSPNet on %s, width %d, stem %s, stride %d, pyramid %s, corners %s, %d classes of '%s', protocol %s",
        file,
        options.backbone,
        options.width,
        options.stem,
        options.output_stride,
        options.pyramid_bins,
        "aligned" if options.align_corners else "not aligned",
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
    metadata = {"format": FILE_FORMAT, "backbone": options.backbone, "stem": options.stem}
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
    weights: Weights, *, family: str, told: Mapping[str, Any] = MappingProxyType({}), where: str
) -> ModelOptions:
    """The options of the network that has (nearly) these parameters.

    Nearly, because one missing or foreign key must not change the answer: it is named when the weights
    are fitted to the network.

    Args:
        weights: by our paths and in our layout.
        told: options that are known; without bins the family's are taken, or none where the head sees no
            pyramid.
        where: the file's name, for messages.

    Raises:
        MisfitError: where there is no residual network in it.
    """
    shapes = {path: array.shape for path, array in weights.arrays.items()}
    blocks = {m.groups() for m in map(_BLOCK.fullmatch, shapes) if m}
    width = _width(shapes)
    if not blocks or width is None:
        unknown = ", ".join(map(names.printable, weights.unknown[:5]))
        missing = "the encoder's file is missing, or it " if family in _NUM_FILES else ""
        raise MisfitError(
            f"{where} holds no residual blocks (layer1.0.conv1.weight, ...): {missing}is no ResNet"
            + (f"; keys that are not known: {unknown}" if unknown else "")
        )
    section: dict[str, Any] = {**default_config().model.to_dict(), **told, "family": family}
    section["backbone"], section["width"] = _depth(blocks), width
    section["stem"] = told.get("stem", stem_of(shapes))
    stage1 = width * DEPTHS[section["backbone"]][0].expansion  # channels that it gives
    levels = [s for p, s in shapes.items() if p.startswith("pyramid.") and len(s) == 4]
    num_stages = _stages_below(levels, stage1)
    # Families that cut networks off do not dilate those that they do not cut.
    if levels and min(num_stages, FAMILIES[family].options["num_stages"]) < 4:
        section["num_stages"] = num_stages = told.get("num_stages", num_stages)
        section["output_stride"] = section["output_stride"] or 2 ** (num_stages + 1)
    channels, bins = stage1 * 2 ** (num_stages - 1), section["pyramid_bins"]
    head = shapes.get("head.conv.kernel", ())
    if bins is None and not levels and len(head) == 4 and head[2] == channels:
        section["pyramid_bins"] = ()  # the authors' use_ppm=False
    # Unreduced levels are the pooled maps themselves: nothing of them is in a file.
    unreduced = bins and not levels and len(head) == 4 and head[2] == channels * (1 + len(bins))
    section["pyramid_reduction"] = told.get("pyramid_reduction", False if unreduced else None)
    if not weights.is_backbone and not any(path.startswith("aux_head.") for path in shapes):
        # Not every file has the auxiliary head, which only training needs.
        usual = FAMILIES[family].options["aux_heads"]
        section["aux_heads"] = tuple(name for name in usual if name != "pixel")
    return ModelOptions.resolve(section)


def _stages_below(levels: Sequence[Shape], stage1: int) -> int:
    """Stages of the backbone below the pyramid, by the channels that its levels take."""
    taken = collections.Counter(shape[2] for shape in levels).most_common(1)
    ratio = taken[0][0] / stage1 if taken else 8
    return {2.0: 2, 4.0: 3}.get(ratio, 4)


def _depth(blocks: set[tuple[str, ...]]) -> str:
    """The backbone whose blocks differ least from those found, in the stages that there are at all."""
    bottlenecks = {block[:2] for block in blocks if block[2].startswith("conv3")}
    expansion = 4 if 2 * len(bottlenecks) > len({block[:2] for block in blocks}) else 1
    found = {(int(stage), int(i)) for stage, i, _ in blocks}
    stages = {stage for stage, _ in found}

    def difference(name: str) -> int:
        counts = DEPTHS[name][1]
        wanted = {(s, i) for s in stages & {1, 2, 3, 4} for i in range(counts[s - 1])}
        return len(found ^ wanted)

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
            and match[1] in ("1", "2", "3", "4")
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
