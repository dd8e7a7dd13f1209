"""Names of published weights and our own: one table per family, read in both directions.

* A row pairs a module's name in a published file with its path here; numbers in braces are carried over.
* Every key of a file belongs to exactly one row, or to the patterns that are left out on purpose; what no
  row knows is kept by name, for `fit` to refuse.
* Values are not touched; convolution kernels change from [out, in, height, width] to
  [height, width, in, out].

Keys: hszhao/semseg's PSPNet and its ImageNet files with the deep stem; torchvision's ResNets;
Lextal/pspnet-pytorch's PSPNet on a ResNet.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

CONV, NORM, LINEAR, PRELU = "conv", "norm", "linear", "prelu"
_LEAVES = {
    CONV: {"weight": "kernel", "bias": "bias"},
    LINEAR: {"weight": "kernel", "bias": "bias"},
    PRELU: {"weight": "slope"},
    NORM: {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "variance",
    },
}
# Axes of our kernels in PyTorch's.
_AXES = {CONV: (2, 3, 1, 0), LINEAR: (1, 0)}
COUNTER = "num_batches_tracked"
"""Steps that PyTorch's norms counted. Nothing reads them at a fixed momentum; old files lack them."""

_PREFIXES = ("module.", "_orig_mod.")
"""What PyTorch's DataParallel and compile put before every key."""


class MisfitError(ValueError):
    """Weights do not fit a table or a network; the message lists what, and the likely cause."""


@dataclass(frozen=True)
class Row:
    """One module, or one kind of module: its name in the file, its path here, what it is."""

    theirs: str
    ours: str
    kind: str


@dataclass(frozen=True)
class Table:
    """The names of one kind of file."""

    source: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    """Patterns of keys that are known and have no place here."""

    def to_ours(self, key: str) -> tuple[str, str] | None:
        """(path, kind) of a key; None where no row knows it.

        Raises:
            MisfitError: where two rows do.
        """
        module, _, leaf = key.rpartition(".")
        found = []
        for row in self.rows:
            match = _pattern(row.theirs).fullmatch(module)
            if match and leaf in _LEAVES[row.kind]:
                path = f"{row.ours.format(**match.groupdict())}.{_LEAVES[row.kind][leaf]}"
                found.append((path, row.kind))
        if len(found) > 1:
            raise MisfitError(f"{key} belongs to {len(found)} rows of the table '{self.source}'")
        return found[0] if found else None

    def to_theirs(self, path: str) -> tuple[str, str]:
        """(key, kind) of a path.

        Raises:
            MisfitError: where no row, or more than one, has it.
        """
        module, _, leaf = path.rpartition(".")
        found = []
        for row in self.rows:
            match = _pattern(row.ours).fullmatch(module)
            leaves = {ours: theirs for theirs, ours in _LEAVES[row.kind].items()}
            if match and leaf in leaves:
                found.append((f"{row.theirs.format(**match.groupdict())}.{leaves[leaf]}", row.kind))
        if len(found) != 1:
            raise MisfitError(f"{path} has {len(found)} names in the table '{self.source}'")
        return found[0]


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """'layer{stage}.{block}' as a pattern whose groups are the numbers in braces."""
    parts = re.split(r"\{(\w+)\}", template)
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = (rf"(?P<{name}>\d+)" for name in parts[1::2])
    return re.compile("".join(parts))


_BLOCKS = (
    Row("layer{stage}.{block}.conv{n}", "backbone.layer{stage}_{block}.conv{n}", CONV),
    Row("layer{stage}.{block}.bn{n}", "backbone.layer{stage}_{block}.norm{n}", NORM),
    Row("layer{stage}.{block}.downsample.0", "backbone.layer{stage}_{block}.shortcut.conv", CONV),
    Row("layer{stage}.{block}.downsample.1", "backbone.layer{stage}_{block}.shortcut.norm", NORM),
)

BACKBONE = Table(
    source="a ResNet with torchvision's names (the authors' have three convolutions in the stem)",
    rows=(
        Row("conv{n}", "backbone.stem.conv{n}", CONV),
        Row("bn{n}", "backbone.stem.norm{n}", NORM),
        *_BLOCKS,
    ),
    left_out=(r"fc\.(weight|bias)",),  # the classifier of ImageNet
)


def _semseg(bins: Sequence[int]) -> Table:
    stem = [
        row
        for n in (1, 2, 3)
        for row in (
            Row(f"layer0.{3 * n - 3}", f"backbone.stem.conv{n}", CONV),
            Row(f"layer0.{3 * n - 2}", f"backbone.stem.norm{n}", NORM),
        )
    ]
    levels = [
        row
        for i, size in enumerate(bins)
        for row in (
            Row(f"ppm.features.{i}.1", f"pyramid.level{size}.conv", CONV),
            Row(f"ppm.features.{i}.2", f"pyramid.level{size}.norm", NORM),
        )
    ]
    heads = [
        row
        for theirs, ours in (("cls", "head"), ("aux", "aux_head"))
        for row in (
            Row(f"{theirs}.0", f"{ours}.conv", CONV),
            Row(f"{theirs}.1", f"{ours}.norm", NORM),
            Row(f"{theirs}.4", f"{ours}.classifier", CONV),
        )
    ]
    return Table("hszhao/semseg's PSPNet", (*stem, *_BLOCKS, *levels, *heads))


def _lextal(bins: Sequence[int]) -> Table:
    backbone = (
        Row("feats.conv1", "backbone.stem.conv1", CONV),
        Row("feats.bn1", "backbone.stem.norm1", NORM),
        *(Row(f"feats.{row.theirs}", row.ours, row.kind) for row in _BLOCKS),
    )
    levels = (
        Row(f"psp.stages.{i}.1", f"pyramid.level{size}.conv", CONV) for i, size in enumerate(bins)
    )
    heads = (
        Row("psp.bottleneck", "head.fuse", CONV),
        Row("up_{n}.conv.0", "head.up{n}.conv", CONV),
        Row("up_{n}.conv.1", "head.up{n}.norm", NORM),
        Row("up_{n}.conv.2", "head.up{n}.activation", PRELU),
        Row("final.0", "head.classifier", CONV),
        Row("classifier.0", "presence_head.hidden", LINEAR),
        Row("classifier.2", "presence_head.classifier", LINEAR),
    )
    return Table("Lextal/pspnet-pytorch's PSPNet on a ResNet", (*backbone, *levels, *heads))


TABLES: dict[str, Callable[[Sequence[int]], Table]] = {"semseg": _semseg, "lextal": _lextal}
"""Family -> its table, given the bins of the pyramid (files number the levels)."""


@dataclass(frozen=True)
class Weights:
    """Arrays by our paths and in our layout, and where they come from."""

    arrays: Mapping[str, np.ndarray]
    keys: Mapping[str, str]
    """Path -> key in the file, for messages."""
    unknown: tuple[str, ...] = ()
    """Keys that no row knows."""
    left_out: tuple[str, ...] = ()
    """Keys that are known to have no place here."""
    counters: Mapping[str, str] = field(default_factory=dict)
    """Key of a norm's counter -> path of its mean."""
    table: Table | None = None
    """That gave the paths; None where the file has our own."""

    def key_of(self, path: str) -> str:
        """How the file calls a path, or would."""
        if path in self.keys or self.table is None:
            return self.keys.get(path, path)
        try:
            return self.table.to_theirs(path)[0]
        except MisfitError:  # a backbone's table knows no heads
            return path

    @property
    def is_backbone(self) -> bool:
        return all(path.startswith("backbone.") for path in self.arrays)

    @property
    def num_classes(self) -> tuple[int, ...]:
        """What the biases of the pixel classifiers say, ascending; one number where they agree."""
        biases = ("head.classifier.bias", "aux_head.classifier.bias")
        return tuple(sorted({self.arrays[path].size for path in biases if path in self.arrays}))


def rename(source: Mapping[str, np.ndarray], table: Table) -> Weights:
    """A file's tensors under our paths, by a table."""
    arrays, keys, unknown, left_out, counters = {}, {}, [], [], {}
    for key, array in source.items():
        module, _, leaf = key.rpartition(".")
        found = table.to_ours(f"{module}.running_mean" if leaf == COUNTER else key)
        if any(re.fullmatch(pattern, key) for pattern in table.left_out):
            left_out.append(key)
        elif found is None:
            unknown.append(key)
        elif leaf == COUNTER:
            counters[key] = found[0]
        else:
            path, kind = found
            axes = _AXES.get(kind, ()) if path.endswith("kernel") else ()
            arrays[path] = array.transpose(axes) if axes and array.ndim == len(axes) else array
            keys[path] = key
    return Weights(arrays, keys, tuple(unknown), tuple(left_out), counters, table)


def without_prefix(source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without what wrappers put before every key.

    Raises:
        MisfitError: where some keys have it and some do not.
    """
    for prefix in _PREFIXES:
        lacking = [key for key in source if not key.startswith(prefix)]
        if source and not lacking:
            return without_prefix({k.removeprefix(prefix): v for k, v in source.items()})
        if len(lacking) < len(source):
            raise MisfitError(
                f"{len(source) - len(lacking)} keys begin with '{prefix}', {len(lacking)} do not: "
                f"{', '.join(map(printable, lacking[:5]))}"
            )
    return dict(source)


def printable(key: str) -> str:
    """A key of a file that anybody may have written, for messages."""
    return key if key.isprintable() and len(key) <= 120 else repr(key[:80])


def publish(arrays: Mapping[str, np.ndarray], table: Table, *, steps: int) -> dict[str, np.ndarray]:
    """Arrays by our paths under published keys and in PyTorch's layout: `rename` backwards.

    Args:
        steps: what the counters of the norms say.
    """
    published = {}
    for path, array in arrays.items():
        key, kind = table.to_theirs(path)
        axes = _AXES.get(kind, ()) if path.endswith("kernel") else ()
        published[key] = array.transpose(np.argsort(axes)) if axes else array
        if kind == NORM and path.endswith("mean"):
            published[f"{key.rpartition('.')[0]}.{COUNTER}"] = np.array(steps, np.int64)
    return published
