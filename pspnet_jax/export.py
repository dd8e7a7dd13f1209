"""Export: a model trained or converted here -> a file that is used without this package.

* `safetensors`: the weights under the names and in the layout in which the family publishes them;
  `caffemodel`: those of the paper's networks in their own format.
* `stablehlo`: the function raw images -> class scores with its weights, read by `jax.export` alone. Batch,
  height and width are symbols in it: one file for images of any size, on any of its platforms.
* A file appears when it is complete, and none is overwritten.
"""

import functools
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from flax import nnx

from pspnet_jax import stored_model
from pspnet_jax.models.families import FORWARD_OPTIONS, ModelOptions
from pspnet_jax.models.resnet import DEPTHS, Bottleneck
from pspnet_jax.passes import structure
from pspnet_jax.pretrained import OPTIONS
from pspnet_jax.segmenter import logits_function
from pspnet_jax.stored_model import Description, StoredModel
from pspnet_jax.trees import flatten
from pspnet_jax.version import __version__
from pspnet_jax.weights import caffe, names, safetensors, tables
from pspnet_jax.weights.fit import AUXILIARY
from pspnet_jax.whole_files import write_whole

FORMATS = ("pspnet_jax", "safetensors", "caffemodel", "stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")

log = logging.getLogger("pspnet_jax")


def run(
    checkpoint: str,
    *,
    format: str,
    output: str,
    step: str = "best",
    platforms: tuple[str, ...] | None = None,
) -> Path:
    """The verb `export`.

    Args:
        checkpoint: folder of a run or of a converted model.
        format: a member of `FORMATS`.
        output: the file; beside a stablehlo file, FILE.json says what it takes and gives.
        step: 'best', 'latest' or a number.
        platforms: where a stablehlo file can run (None: all of `PLATFORMS`).

    Raises:
        ValueError: for an unknown format or platform, or a network that the format cannot hold.
        FileExistsError: where a file exists.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if platforms is not None and format != "stablehlo":
        raise ValueError(
            f"platforms={','.join(platforms)} is an option of format=stablehlo; {format} files know none: "
            "leave it out"
        )
    platforms = PLATFORMS if platforms is None else platforms
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise ValueError(
            f"platforms={','.join(platforms)!r} must be one or more of {', '.join(PLATFORMS)}"
        )
    target = Path(output)
    for path in (target, *([_description_path(target)] if format == "stablehlo" else [])):
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another --output")
    stored = stored_model.read(checkpoint, step=step)
    if format in ("safetensors", "caffemodel"):
        _check_has_names(stored.description.model)
    if format == "pspnet_jax":
        stored_model.write_file(stored, target)
        log.info("the network of step %d, for predict and evaluate -> %s", stored.step, target)
    elif format == "safetensors":
        _write_safetensors(stored, target)
    elif format == "caffemodel":
        _write_caffemodel(stored, target)
    else:
        _write_stablehlo(stored, target, platforms=platforms, checkpoint=checkpoint)
    return target


def _check_has_names(options: ModelOptions) -> None:
    """Raise where no table says how a network's weights are called in published files."""
    if options.backbone not in DEPTHS:
        raise ValueError(
            f"there is no table of published names for PSPNets on {options.backbone}: --format=pspnet_jax holds it "
            "for this package, stablehlo for others"
        )


def _write_safetensors(stored: StoredModel, target: Path) -> None:
    options = stored.description.model
    metadata = {
        "format": "pt",
        "family": options.family,
        "backbone": options.backbone,
        OPTIONS: json.dumps({name: getattr(options, name) for name in FORWARD_OPTIONS}),
    }
    safetensors.write(target, _published(stored, target), metadata)


def _write_caffemodel(stored: StoredModel, target: Path) -> None:
    options = stored.description.model
    if options.family != "caffe":
        raise ValueError(
            f"this network is of the family '{options.family}'; --format=caffemodel is for 'caffe' alone, "
            "safetensors holds the names of each family"
        )
    others = _unusual(options, except_for=("bottleneck_stride", "pyramid_bins", "aux_width"))
    if DEPTHS[options.backbone][0] is not Bottleneck or others:
        raise ValueError(
            f"--format=caffemodel is for the paper's networks of bottlenecks; this is {options.backbone}"
            f"{', '.join(['', *others])}: --format=safetensors holds it"
        )
    where = "1x1_reduce" if options.bottleneck_stride == "1x1" else "3x3"
    strided = ("conv1_1_3x3_s2", f"conv3_1_{where}", "conv3_1_1x1_proj")
    published = sorted(_published(stored, target).items())  # blobs of a layer in their order
    caffe.write(target, dict(published), dict.fromkeys(strided, (2, 2)))


def _published(stored: StoredModel, target: Path) -> dict[str, np.ndarray]:
    """Arrays under the names of the family; says what its files have no place for, or its code no option."""
    options = stored.description.model
    table = tables.of_network(options.family, options.pyramid_bins, stem=options.stem)
    leaves = flatten(stored.part["params"]) | flatten(stored.part["batch_stats"])
    # Only training needs auxiliary heads, and not every family publishes them.
    arrays = {
        path: np.asarray(array)
        for path, array in leaves.items()
        if not path.startswith(AUXILIARY) or table.has(path)
    }
    if options.family == "caffe":
        ours = tables.Order(options.pyramid_bins, options.pyramid_map_first)
        theirs = ours._replace(bins=tables.caffe_order(options.pyramid_bins))
        arrays = tables.in_order(arrays, ours, theirs)
    published = names.publish(arrays, table, steps=stored.step)
    log.info(
        "%d tensors and %d counters of norms with the names of %s -> %s",
        len(arrays),
        len(published) - len(arrays),
        table.source,
        target,
    )
    if left := sorted({path.split(".")[0] for path in leaves.keys() - arrays.keys()}):
        log.info("left out: %s, which files of this family do not have", ", ".join(left))
    if others := _unusual(options):
        log.warning("other than its family: %s; their code needs the same", ", ".join(others))
    return published


def _unusual(options: ModelOptions, *, except_for: tuple[str, ...] = ()) -> list[str]:
    """Options of the forward pass in which a network differs from its family's on the same backbone."""
    usual = ModelOptions.resolve({**asdict(options), **dict.fromkeys(FORWARD_OPTIONS)})
    return [
        f"{name}={getattr(options, name)} ({getattr(usual, name)})"
        for name in FORWARD_OPTIONS
        if name not in except_for and getattr(options, name) != getattr(usual, name)
    ]


def _write_stablehlo(
    stored: StoredModel, target: Path, *, platforms: tuple[str, ...], checkpoint: str
) -> None:
    exported = exported_function(stored, platforms=platforms)
    description = json.dumps(describe(stored, exported, checkpoint=checkpoint), indent=1) + "\n"
    contents = {_description_path(target): description.encode(), target: exported.serialize()}
    # The function last: where it lies, its description does.
    for path, content in contents.items():
        write_whole(path, content)
    log.info(
        "logits of images of any size, with the weights of step %d, for %s -> %s (%.0f MB), described in %s",
        stored.step,
        ", ".join(platforms),
        target,
        target.stat().st_size / 1e6,
        _description_path(target),
    )


def exported_function(stored: StoredModel, *, platforms: tuple[str, ...]) -> jax.export.Exported:
    """uint8 [batch, height, width, 3] -> f32[batch, height, width, classes], as `Segmenter.logits`.

    Raises:
        ValueError: for a network in float64.
    """
    if stored.description.model.dtype == "float64":
        raise ValueError(
            "model.dtype='float64' cannot be exported: reading it would need JAX_ENABLE_X64, and TPUs have no "
            "float64; --format=safetensors and pspnet convert make a float32 network of it"
        )
    side = smallest_side(stored.description)
    # A sum, because constraints of symbols are lost in files (jax 0.10); each symbol is at least 1.
    beyond = f" + {side - 1}" if side > 1 else ""
    batch, height, width = jax.export.symbolic_shape(f"batch, height{beyond}, width{beyond}")
    images = jax.ShapeDtypeStruct((batch, height, width, 3), np.uint8)
    return jax.export.export(jax.jit(logits_function(stored)), platforms=platforms)(images)


@functools.lru_cache(maxsize=16)
def smallest_side(description: Description) -> int:
    """The smallest height and width of images, pixels, that the network takes."""
    graphdef, *arrays = structure(description.network())
    rule = description.model.size_rule

    def feature_maps(params, batch_stats, images):
        return nnx.merge(graphdef, params, batch_stats).backbone(images, train=False).last

    def is_empty(side: int) -> bool:
        shape = (1, rule.padded(side), rule.padded(side), 3)
        images = jax.ShapeDtypeStruct(shape, np.float32)
        try:
            jax.eval_shape(feature_maps, *arrays, images)
        except ValueError:  # nothing is left to halve
            return True
        return False

    return next(side for side in range(1, 1000) if not is_empty(side))


def describe(
    stored: StoredModel, exported: jax.export.Exported, *, checkpoint: str
) -> Mapping[str, Any]:
    """What FILE.json holds: whatever is needed to use the function, and where it comes from."""
    label_set, model = stored.description.label_set, stored.description.model
    return {
        "input": {
            "dtype": "uint8",
            "shape": ["batch", "height", "width", 3],
            "meaning": "RGB as read from a file, 0 .. 255; normalized inside",
            "smallest_side": smallest_side(stored.description),
        },
        "output": {
            "dtype": "float32",
            "shape": ["batch", "height", "width", label_set.num_classes],
            "meaning": "class scores (logits) at input size; the largest one's position is the class",
        },
        "labels": {"name": label_set.name, "names": label_set.names, "palette": label_set.colors},
        "platforms": exported.platforms,
        "jax": jax.__version__,
        "calling_convention": exported.calling_convention_version,
        "pspnet_jax": __version__,
        "checkpoint": {"path": checkpoint, "step": stored.step, "digest": stored.digest},
        "inside": {
            "normalization": asdict(stored.description.normalization),
            "sides_padded_to": asdict(model.size_rule),
            "model": asdict(model),
        },
    }


def _description_path(target: Path) -> Path:
    return target.with_name(target.name + ".json")
