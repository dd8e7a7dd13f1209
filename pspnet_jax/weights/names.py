"""Names of published weights and our own: one table per family, read in both directions.

* A row pairs a module's name in a published file with its path here; numbers in braces are carried over.
* Every key of a file belongs to exactly one row, or to the patterns that are left out on purpose; every
  parameter and statistic here is filled exactly once. Whatever does not fit is an error that lists all
  offenders by name, with the likely cause.
* Values are not touched: convolution kernels change from [out, in, height, width] to
  [height, width, in, out], and everything becomes float32.

Keys: hszhao/semseg's PSPNet and its ImageNet files with the deep stem; torchvision's ResNets.
"""

import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Shape = tuple[int, ...]

CONV, NORM = "conv", "norm"
_LEAVES = {
    CONV: {"weight": "kernel", "bias": "bias"},
    NORM: {
        "weight": "scale",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "variance",
    },
}
COUNTER = "num_batches_tracked"
"""Steps that PyTorch's norms counted. Nothing reads them at a fixed momentum; old files lack them."""

CLASSIFIER = r"(head|aux_head)\.classifier\.(kernel|bias)"
HEADS = r"(pyramid|head|aux_head)\..*"

_NUM_SHOWN = 20


class MisfitError(ValueError):
    """Weights do not fit a network or a table; the message lists what, and the likely cause."""


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


TABLES: dict[str, Callable[[Sequence[int]], Table]] = {"semseg": _semseg}
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
    """Keys that are known to have no place here; without the counters of norms."""
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
        return not any(re.fullmatch(HEADS, path) for path in self.arrays)


@dataclass(frozen=True)
class Fit:
    """Weights brought together with a network."""

    loaded: Mapping[str, np.ndarray]
    """Path -> float32 array."""
    reinitialized: tuple[str, ...]
    """Paths of the network that keep their initial values."""
    left_out: tuple[str, ...]
    """Keys of the file that were not used."""


def rename(source: Mapping[str, np.ndarray], table: Table) -> Weights:
    """A file's tensors under our paths, by a table; a prefix 'module.' on all keys is dropped."""
    if source and all(key.startswith("module.") for key in source):
        source = {key.removeprefix("module."): array for key, array in source.items()}
    arrays, keys, unknown, left_out = {}, {}, [], []
    for key, array in source.items():
        if key.rpartition(".")[2] == COUNTER:
            continue
        if any(re.fullmatch(pattern, key) for pattern in table.left_out):
            left_out.append(key)
            continue
        found = table.to_ours(key)
        if found is None:
            unknown.append(key)
            continue
        path, kind = found
        is_kernel = kind == CONV and path.endswith("kernel") and array.ndim == 4
        arrays[path] = array.transpose(2, 3, 1, 0) if is_kernel else array
        keys[path] = key
    return Weights(arrays, keys, tuple(unknown), tuple(left_out), table)


def publish(arrays: Mapping[str, np.ndarray], table: Table, *, steps: int) -> dict[str, np.ndarray]:
    """Arrays by our paths under published keys and in PyTorch's layout: `rename` backwards.

    Args:
        steps: what the counters of the norms say.
    """
    published = {}
    for path, array in arrays.items():
        key, kind = table.to_theirs(path)
        is_kernel = kind == CONV and path.endswith("kernel")
        published[key] = array.transpose(3, 2, 0, 1) if is_kernel else array
        if kind == NORM and path.endswith("mean"):
            published[f"{key.rpartition('.')[0]}.{COUNTER}"] = np.array(steps, np.int64)
    return published


def fit(
    weights: Weights,
    wanted: Mapping[str, Shape],
    *,
    where: str,
    may_be_missing: str | None = None,
    may_differ: str | None = None,
    must_differ: str | None = None,
) -> Fit:
    """Bring weights and a network together; everything must fit but what is excused by a pattern.

    Args:
        weights: by our paths.
        wanted: path -> shape of every parameter and statistic of the network.
        where: the file's name, for messages.
        may_be_missing: pattern of paths that keep their initial values where the file lacks them.
        may_differ: pattern of paths that keep them where the file's have another shape.
        must_differ: pattern of paths that keep them whatever the file has.

    Raises:
        MisfitError: listing every key that is missing, unknown, left over, of another shape or not
            finite, and the likely cause.
    """
    loaded, reinitialized, faults = {}, [], _Faults()
    for path, shape in wanted.items():
        key = weights.key_of(path)
        array = weights.arrays.get(path)
        if _matches(must_differ, path) or (array is None and _matches(may_be_missing, path)):
            reinitialized.append(path)
        elif array is None:
            faults.missing[key] = shape
        elif array.shape != shape and _matches(may_differ, path):
            reinitialized.append(path)
        elif array.shape != shape:
            faults.shapes[key] = (array.shape, shape)
        elif not np.isfinite(array).all():
            faults.values.append(key)
        else:
            loaded[path] = array
    faults.extra += [
        *weights.unknown,
        *(weights.keys[p] for p in weights.arrays if p not in wanted),
    ]
    faults.stems = (_stem(weights.arrays), _stem(wanted))
    if message := faults.message():
        raise MisfitError(f"{where} does not fit:\n  {message}")
    differing = [weights.keys[path] for path in reinitialized if path in weights.keys]
    return Fit(
        {path: np.array(array, np.float32, order="C") for path, array in loaded.items()},
        tuple(reinitialized),
        (*weights.left_out, *differing),
    )


def _matches(pattern: str | None, path: str) -> bool:
    return pattern is not None and re.fullmatch(pattern, path) is not None


def _stem(paths: Iterable[str]) -> str:
    return "deep" if any(path.startswith("backbone.stem.conv2") for path in paths) else "7x7"


class _Faults:
    """Everything that does not fit, for one message. All but the stems by the file's keys."""

    def __init__(self):
        self.missing: dict[str, Shape] = {}
        self.extra: list[str] = []
        self.shapes: dict[str, tuple[Shape, Shape]] = {}
        self.values: list[str] = []
        self.stems: tuple[str, str] = ("", "")
        """In the file, in the network."""

    def message(self) -> str:
        """One line each, then the likely causes; nothing where all fits."""
        lines = [f"{key} is missing" for key in self.missing]
        lines += [f"{key} is not known" for key in self.extra]
        lines += [
            f"{key} is {list(have)}, the network has {list(want)} (in our layout)"
            for key, (have, want) in self.shapes.items()
        ]
        lines += [f"{key} holds values that are not finite" for key in self.values]
        more = len(lines) - _NUM_SHOWN
        causes = [f"likely cause: {cause}" for cause in self.causes()]
        shown = lines[:_NUM_SHOWN] + ([f"... and {more} more"] if more > 0 else [])
        return "\n  ".join(shown + causes)

    def causes(self) -> Iterable[str]:
        """What most often lies behind such faults, the most telling first."""
        have, want = self.stems
        if have != want and (self.shapes or self.missing or self.extra):
            yield (
                f"the file's stem is {have}, the network's {want}: torchvision's ResNets have 7x7, the "
                f"authors' ImageNet files deep; --config.model.stem={have} takes this file"
            )
            return
        if self.missing and self.extra:
            for key in list(self.missing)[:3]:
                nearest = difflib.get_close_matches(key, self.extra, n=1, cutoff=0.8)
                if nearest:
                    yield f"'{nearest[0]}' in the file is '{key}' under another name"
        for key, (have, want) in list(self.shapes.items())[:3]:
            if sorted(have) == sorted(want):
                yield f"{key} is transposed"
        if any(key.startswith("fc.") for key in self.extra):
            yield "the file is a backbone trained on ImageNet (it has fc.*), not a whole PSPNet"
        elif len(self.shapes) > _NUM_SHOWN:
            yield "the file has another width, or other blocks"
        elif self.extra and not self.missing and not self.shapes:
            yield "the file has more than this network: another depth, bins or family"
        elif len(self.missing) > len(self.shapes) and not self.extra:
            yield "the file is incomplete, or of a shallower network"
