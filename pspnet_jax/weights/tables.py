"""The names of published weights, one table for each kind of file.

Keys of the PSPNets of hszhao/semseg, of hszhao/PSPNet (Caffe), open-mmlab/mmsegmentation,
qubvel-org/segmentation_models.pytorch, CSAILVision/semantic-segmentation-pytorch and, on a ResNet,
Lextal/pspnet-pytorch; of torchvision's ResNets and those with a deep stem.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from pspnet_jax.weights.names import (
    BGR_CONV,
    BLOB_CONV,
    BLOB_NORM,
    CONV,
    LINEAR,
    NORM,
    PRELU,
    MisfitError,
    Row,
    Table,
    Weights,
    printable,
    rename,
)


def _with_norm(conv: str, norm: str, ours: str, number: object = "") -> tuple[Row, Row]:
    """A convolution and the norm behind it."""
    return Row(conv, f"{ours}.conv{number}", CONV), Row(norm, f"{ours}.norm{number}", NORM)


_BLOCKS = (
    *_with_norm(
        "layer{stage}.{block}.conv{n}",
        "layer{stage}.{block}.bn{n}",
        "backbone.layer{stage}_{block}",
        "{n}",
    ),
    *_with_norm(
        "layer{stage}.{block}.downsample.0",
        "layer{stage}.{block}.downsample.1",
        "backbone.layer{stage}_{block}.shortcut",
    ),
)
_STEM = _with_norm("conv{n}", "bn{n}", "backbone.stem", "{n}")
_CLASSIFIER = r"fc\.(weight|bias)"
"""Of ImageNet."""


def _sequence(module: str) -> tuple[Row, ...]:
    """A deep stem whose convolutions, norms and ReLUs are numbered through."""
    return tuple(
        row
        for n in (1, 2, 3)
        for row in _with_norm(f"{module}.{3 * n - 3}", f"{module}.{3 * n - 2}", "backbone.stem", n)
    )


def _levels(bins: Sequence[int], conv: str, norm: str) -> tuple[Row, ...]:
    """Of the pyramid: templates with `{i}` for the place of a level among them."""
    return tuple(
        row
        for i, size in enumerate(bins)
        for row in _with_norm(conv.format(i=i), norm.format(i=i), f"pyramid.level{size}")
    )


def _below(module: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(Row(f"{module}.{row.theirs}", row.ours, row.kind) for row in rows)


BACKBONE = Table(
    source="a ResNet with torchvision's names (the authors' have three convolutions in the stem)",
    rows=(*_STEM, *_BLOCKS),
    left_out=(_CLASSIFIER,),
)
_MMSEG_BACKBONE = replace(BACKBONE, rows=(*_sequence("stem"), *_BLOCKS))


def _semseg(bins: Sequence[int]) -> Table:
    levels = _levels(bins, "ppm.features.{i}.1", "ppm.features.{i}.2")
    heads = (
        row
        for theirs, ours in (("cls", "head"), ("aux", "aux_head"))
        for row in (
            *_with_norm(f"{theirs}.0", f"{theirs}.1", ours),
            Row(f"{theirs}.4", f"{ours}.classifier", CONV),
        )
    )
    return Table("hszhao/semseg's PSPNet", (*_sequence("layer0"), *_BLOCKS, *levels, *heads))


def _caffe(bins: Sequence[int]) -> Table:
    def pair(theirs: str, ours: str, layer: str = "conv", kind: str = BLOB_CONV) -> list[Row]:
        norm = layer.replace("conv", "norm")
        return [
            Row(theirs, f"{ours}.{layer}", kind),
            Row(f"{theirs}/bn", f"{ours}.{norm}", BLOB_NORM),
        ]

    blocks = [
        row
        for stage in (1, 2, 3, 4)
        for theirs, layer in (
            ("1x1_reduce", "conv1"),
            ("3x3", "conv2"),
            ("1x1_increase", "conv3"),
            ("1x1_proj", "shortcut.conv"),
        )
        for row in pair(
            f"conv{stage + 1}_{{block+1}}_{theirs}", f"backbone.layer{stage}_{{block}}", layer
        )
    ]
    rows = [
        *pair("conv1_1_3x3_s2", "backbone.stem", "conv1", BGR_CONV),
        *pair("conv1_2_3x3", "backbone.stem", "conv2"),
        *pair("conv1_3_3x3", "backbone.stem", "conv3"),
        *blocks,
        *(row for n in bins for row in pair(f"conv5_3_pool{n}_conv", f"pyramid.level{n}")),
        *pair("conv5_4", "head"),
        Row("conv6", "head.classifier", BLOB_CONV),
    ]
    return Table("hszhao/PSPNet's network of Caffe", tuple(rows))


def _mmseg(bins: Sequence[int], *, stem: str = "v1c") -> Table:
    levels = _levels(bins, "decode_head.psp_modules.{i}.1.conv", "decode_head.psp_modules.{i}.1.bn")
    heads = (
        *_with_norm("decode_head.bottleneck.conv", "decode_head.bottleneck.bn", "head"),
        Row("decode_head.conv_seg", "head.classifier", CONV),
        *_with_norm("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn", "aux_head"),
        Row("auxiliary_head.conv_seg", "aux_head.classifier", CONV),
    )
    rows = _STEM if stem == "7x7" else _sequence("stem")
    backbone = _below("backbone", (*rows, *_BLOCKS))
    return Table("mmsegmentation's PSPNet", (*backbone, *levels, *heads))


def _smp(bins: Sequence[int]) -> Table:
    levels = _levels(bins, "decoder.psp.blocks.{i}.pool.1.0", "decoder.psp.blocks.{i}.pool.1.1")
    heads = (
        *_with_norm("decoder.conv.0", "decoder.conv.1", "head"),
        Row("segmentation_head.0", "head.classifier", CONV),
    )
    return Table(
        "segmentation_models_pytorch's PSPNet",
        (*_below("encoder", (*_STEM, *_BLOCKS)), *levels, *heads),
        left_out=(r"classification_head\..*",),
    )


def _csail(bins: Sequence[int]) -> Table:
    levels = _levels(bins, "ppm.{i}.1", "ppm.{i}.2")
    heads = (
        *_with_norm("conv_last.0", "conv_last.1", "head"),
        Row("conv_last.4", "head.classifier", CONV),
        *_with_norm("cbr_deepsup.0", "cbr_deepsup.1", "aux_head"),
        Row("conv_last_deepsup", "aux_head.classifier", CONV),
    )
    return Table(
        "CSAILVision's encoder and PPM decoder",
        (*_STEM, *_BLOCKS, *levels, *heads),
        left_out=(_CLASSIFIER, r".*\.(_tmp_running_mean|_tmp_running_var|_running_iter)"),
    )


def _lextal(bins: Sequence[int]) -> Table:
    levels = (
        Row(f"psp.stages.{i}.1", f"pyramid.level{size}.conv", CONV) for i, size in enumerate(bins)
    )
    heads = (
        Row("psp.bottleneck", "head.fuse", CONV),
        *_with_norm("up_{n}.conv.0", "up_{n}.conv.1", "head.up{n}"),
        Row("up_{n}.conv.2", "head.up{n}.activation", PRELU),
        Row("final.0", "head.classifier", CONV),
        Row("classifier.0", "presence_head.hidden", LINEAR),
        Row("classifier.2", "presence_head.classifier", LINEAR),
    )
    backbone = _below("feats", (*_STEM, *_BLOCKS))
    return Table("Lextal/pspnet-pytorch's PSPNet on a ResNet", (*backbone, *levels, *heads))


# Family -> its table, given the bins of the pyramid: files number the levels.
_TABLES: dict[str, Callable[[Sequence[int]], Table]] = {
    "semseg": _semseg,
    "caffe": _caffe,
    "mmseg": _mmseg,
    "smp": _smp,
    "csail": _csail,
    "lextal": _lextal,
}
_FUSING = ("head.conv.kernel", "head.fuse.kernel")
# How keys begin that no family further up has.
_BEGINNINGS = {
    "semseg": ("layer0.", "ppm.features.", "cls."),
    "caffe": ("conv1_1_3x3_s2", "conv5_3_pool", "conv5_4", "conv6."),
    "mmseg": ("decode_head.", "auxiliary_head.", "backbone."),
    "smp": ("encoder.", "decoder.", "segmentation_head."),
    "csail": ("ppm.", "conv_last", "cbr_deepsup."),
    "lextal": ("feats.", "psp.", "up_"),
}


def of_network(family: str, bins: Sequence[int], *, stem: str) -> Table:
    """The table of a family.

    Args:
        bins: of the pyramid.
        stem: of the backbone; mmsegmentation names that of 7x7 otherwise.
    """
    return _mmseg(bins, stem=stem) if family == "mmseg" else _TABLES[family](bins)


def of_file(family: str | None, bins: Sequence[int], keys: Iterable[str]) -> Table:
    """The table for the keys of a file, of a family or (None) of a backbone."""
    if family is None:
        return _MMSEG_BACKBONE if any(key.startswith("stem.") for key in keys) else BACKBONE
    is_7x7 = any(key.startswith("backbone.conv1.") for key in keys)
    return of_network(family, bins, stem="7x7" if is_7x7 else "v1c")


class Order(NamedTuple):
    """In which a head takes the map and the levels of the pyramid."""

    bins: tuple[int, ...]
    map_first: bool = True


def order_of(options: Mapping[str, Any]) -> Order:
    """That of a network with these options."""
    return Order(options["pyramid_bins"], options["pyramid_map_first"])


def read(family: str | None, order: Order, arrays: Mapping[str, np.ndarray]) -> Weights:
    """The tensors of a file by our paths, for a network whose head takes the pyramid in this order.

    Caffe's names say the bins, and its head takes the widest levels first: they are put into the order.
    """
    weights = rename(arrays, of_file(family, order.bins, arrays))
    if family != "caffe":
        return weights
    theirs = order._replace(bins=caffe_order(order.bins))
    return replace(weights, arrays=in_order(weights.arrays, theirs, order))


def caffe_order(bins: Sequence[int]) -> tuple[int, ...]:
    """In which the levels stand before the head of the paper's networks."""
    return tuple(sorted(bins, reverse=True))


def in_order(arrays: Mapping[str, np.ndarray], have: Order, want: Order) -> dict[str, np.ndarray]:
    """Arrays by our paths, the head's kernel for levels in another order.

    Args:
        have: in which the head takes them.
        want: the same bins in another order; other bins change nothing: `fit` will name what is wrong.
    """
    path = next((path for path in _FUSING if path in arrays), None)
    if path is None or have == want or sorted(have.bins) != sorted(want.bins):
        return {**arrays}
    kernel = arrays[path]
    levels = [arrays.get(f"pyramid.level{n}.conv.kernel") for n in have.bins]
    sizes = [0 if level is None else level.shape[-1] for level in levels]
    if not any(sizes) and kernel.ndim == 4:  # levels without reduction are as wide as the map
        sizes = [kernel.shape[2] // (len(have.bins) + 1)] * len(have.bins)
    if kernel.ndim != 4 or 0 in sizes or kernel.shape[2] <= sum(sizes):
        return {**arrays}
    num_channels = kernel.shape[2] - sum(sizes)
    sizes.insert(0 if have.map_first else len(sizes), num_channels)
    parts = np.split(kernel, np.cumsum(sizes)[:-1], axis=2)
    of_map = parts.pop(0 if have.map_first else -1)
    by_bins = dict(zip(have.bins, parts, strict=True))
    ordered = [by_bins[n] for n in want.bins]
    ordered.insert(0 if want.map_first else len(ordered), of_map)
    return {**arrays, path: np.concatenate(ordered, axis=2)}


def recognize(keys: Iterable[str]) -> str | None:
    """The family whose names these are.

    Raises:
        MisfitError: where they are no known network's.
    """
    keys = list(keys)
    for family, beginnings in _BEGINNINGS.items():
        if any(key.startswith(beginnings) for key in keys):
            return family
    if any(key.startswith("layer1.") for key in keys):
        return None
    raise MisfitError(", ".join(map(printable, keys[:5])))
