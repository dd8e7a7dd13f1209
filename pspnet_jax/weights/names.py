"""Names of published weights and our own: how a table of them (`tables`) is read, in both directions.

* A row pairs a module's name in a published file with its path here; numbers in braces are carried over, in
  `{block+1}` counted from 1 in the file.
* Every key of a file belongs to exactly one row, or to the patterns that are left out on purpose; what no
  row knows is kept by name, for `fit` to refuse.
* Values are not touched; convolution kernels change from [out, in, height, width] to
  [height, width, in, out], and from channels BGR to RGB where a row says so.
"""

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

CONV, NORM, LINEAR, PRELU = "conv", "norm", "linear", "prelu"
BLOB_CONV, BGR_CONV, BLOB_NORM = "Caffe's conv", "Caffe's conv of BGR", "Caffe's norm"
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
    BLOB_CONV: {"0": "kernel", "1": "bias"},
    BGR_CONV: {"0": "kernel"},
    BLOB_NORM: {"0": "scale", "1": "bias", "2": "mean", "3": "variance"},
}
# Axes of our kernels in PyTorch's.
_AXES = dict.fromkeys((CONV, BLOB_CONV, BGR_CONV), (2, 3, 1, 0)) | {LINEAR: (1, 0)}
COUNTER = "num_batches_tracked"
"""Steps that PyTorch's norms counted. Nothing reads them at a fixed momentum; old files lack them."""

_BRACES = re.compile(r"\{(\w+)(\+\d+)?\}")

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
            numbers = _numbers(row.theirs, module)
            if numbers is not None and leaf in _LEAVES[row.kind]:
                path = f"{_filled(row.ours, numbers)}.{_LEAVES[row.kind][leaf]}"
                found.append((path, row.kind))
        if len(found) > 1:
            raise MisfitError(f"{key} belongs to {len(found)} rows of the table '{self.source}'")
        return found[0] if found else None

    def has(self, path: str) -> bool:
        """Whether files have a place for a path."""
        return any(_numbers(row.ours, path.rpartition(".")[0]) is not None for row in self.rows)

    def to_theirs(self, path: str) -> tuple[str, str]:
        """(key, kind) of a path.

        Raises:
            MisfitError: where no row, or more than one, has it.
        """
        module, _, leaf = path.rpartition(".")
        found = []
        for row in self.rows:
            numbers = _numbers(row.ours, module)
            leaves = {ours: theirs for theirs, ours in _LEAVES[row.kind].items()}
            if numbers is not None and leaf in leaves:
                found.append((f"{_filled(row.theirs, numbers)}.{leaves[leaf]}", row.kind))
        if len(found) != 1:
            raise MisfitError(f"{path} has {len(found)} names in the table '{self.source}'")
        return found[0]


def _numbers(template: str, module: str) -> dict[str, int] | None:
    """The numbers that a template has braces for, as we count them; None for the name of another module."""
    match = _pattern(template).fullmatch(module)
    if match is None:
        return None
    offsets = dict(_BRACES.findall(template))
    return {name: int(text) - int(offsets[name] or 0) for name, text in match.groupdict().items()}


def _filled(template: str, numbers: Mapping[str, int]) -> str:
    return _BRACES.sub(lambda brace: str(numbers[brace[1]] + int(brace[2] or 0)), template)


@functools.cache
def _pattern(template: str) -> re.Pattern:
    """'layer{stage}.{block}' as a pattern whose groups are the numbers in braces."""
    parts = _BRACES.split(template)
    # As they are written: '01' would be another key of the same module.
    names = (rf"(?P<{name}>0|[1-9][0-9]{{0,3}})" for name in parts[1::3])
    plain = map(re.escape, parts[::3])
    return re.compile("".join(itertools.chain(*itertools.zip_longest(plain, names, fillvalue=""))))


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

    def without(self, pattern: str) -> "Weights":
        """Leaves out the paths that a pattern matches, and the counters of their norms."""
        paths = {path for path in self.arrays if re.fullmatch(pattern, path)}
        kept = {path: array for path, array in self.arrays.items() if path not in paths}
        counters = {key: mean for key, mean in self.counters.items() if mean not in paths}
        left_out = (*self.left_out, *(self.keys[path] for path in paths))
        return replace(self, arrays=kept, counters=counters, left_out=left_out)

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
            arrays[path] = _to_our_layout(array, kind) if path.endswith("kernel") else array
            keys[path] = key
    return Weights(arrays, keys, tuple(unknown), tuple(left_out), counters, table)


def _to_our_layout(kernel: np.ndarray, kind: str) -> np.ndarray:
    axes = _AXES.get(kind, ())
    if kernel.ndim != len(axes):  # `fit` will name it
        return kernel
    kernel = kernel.transpose(axes)
    return kernel[:, :, ::-1] if kind == BGR_CONV else kernel


def _to_their_layout(kernel: np.ndarray, kind: str) -> np.ndarray:
    kernel = kernel[:, :, ::-1] if kind == BGR_CONV else kernel
    return kernel.transpose(np.argsort(_AXES[kind]))


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
    """Arrays by our paths under published keys and in the layout of their files: `rename` backwards.

    Args:
        steps: what the counters of the norms say.
    """
    published = {}
    for path, array in arrays.items():
        key, kind = table.to_theirs(path)
        published[key] = _to_their_layout(array, kind) if path.endswith("kernel") else array
        if kind == NORM and path.endswith("mean"):
            published[f"{key.rpartition('.')[0]}.{COUNTER}"] = np.array(steps, np.int64)
    return published
