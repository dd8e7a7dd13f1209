"""Weights and a network brought together: everything fits, or an error lists all that does not.

* Every parameter and statistic of the network is filled exactly once, every key of the file is used;
  exceptions are given as a pattern.
* Values become float32; what would not be finite, a negative variance and whole numbers are refused.
"""

import collections
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from pspnet_jax.weights.names import MisfitError, Weights, printable

Shape = tuple[int, ...]

CLASSIFIER = r"(head|aux_head|presence_head)\.classifier\.(kernel|bias)"
HEADS = r"(pyramid|head|aux_head|presence_head)\..*"
AUXILIARY = ("aux_head.", "presence_head.")
"""How the paths of heads begin that only training needs."""

_DEEP_STEM = re.compile(r"backbone\.stem\.\w+[23]\.")
_PLANES = re.compile(r"backbone\.layer1_\d+\.conv[12]\.kernel")
_BLOCK = re.compile(r"backbone\.layer(\d+)_(\d+)\.(\w+)")
_NUM_SHOWN = 12  # of each kind of fault


@dataclass(frozen=True)
class Fit:
    """Weights brought together with a network."""

    loaded: Mapping[str, Float32[np.ndarray, "..."]]
    """By path."""
    reinitialized: tuple[str, ...]
    """Paths of the network that keep their initial values."""
    left_out: tuple[str, ...]
    """Keys of the file that were not used; counters of norms are not listed."""


@dataclass
class _Faults:
    """All that does not fit, by the file's keys."""

    missing: dict[str, Shape] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """In the file, in the network."""
    values: dict[str, str] = field(default_factory=dict)


def fit(
    weights: Weights,
    wanted: Mapping[str, Shape],
    *,
    where: str,
    starts_anew: str | None = None,
    likely_cause: str | None = None,
) -> Fit:
    """Bring weights and a network together.

    Args:
        weights: by our paths.
        wanted: path -> shape of every parameter and statistic of the network.
        where: the file's name, for messages.
        starts_anew: pattern of paths that keep their initial values, whatever the file has.
        likely_cause: what is known beforehand to differ, for the message.

    Raises:
        MisfitError: listing every key that is missing, unknown, of another shape or without good values,
            and the likely causes.
    """
    loaded, reinitialized, faults = {}, [], _Faults()
    for path, shape in wanted.items():
        array, key = weights.arrays.get(path), weights.key_of(path)
        if starts_anew and re.fullmatch(starts_anew, path):
            reinitialized.append(path)
        elif array is None:
            faults.missing[key] = shape
        elif array.shape != shape:
            faults.shapes[key] = (array.shape, shape)
        else:
            loaded[path] = _float32(array)
            if fault := _fault_of_values(array, loaded[path], path):
                faults.values[key] = fault
    used = set(wanted)
    faults.unknown += weights.unknown
    faults.unknown += [weights.keys[path] for path in weights.arrays if path not in used]
    faults.unknown += [key for key, mean in weights.counters.items() if mean not in used]
    if faults != _Faults():
        shapes = {path: array.shape for path, array in weights.arrays.items()}
        causes = [*_causes_in_backbone(shapes, wanted)] or [*_causes(faults)]
        causes += [likely_cause] if likely_cause else []
        lines = [*_lines(faults), *(f"likely cause: {cause}" for cause in causes)]
        raise MisfitError("\n  ".join([f"{where} does not fit:", *lines]))
    unused = [weights.keys[path] for path in reinitialized if path in weights.keys]
    return Fit(loaded, tuple(reinitialized), (*weights.left_out, *unused))


def stem_of(shapes: Mapping[str, Shape]) -> str:
    """'deep', 'v1c' or '7x7', by the shapes of a residual network; one path of a deep stem's is enough."""
    if not any(map(_DEEP_STEM.match, shapes)):
        return "7x7"
    planes = collections.Counter(s[-1] for p, s in shapes.items() if _PLANES.fullmatch(p) and s)
    width = planes.most_common(1)[0][0] if planes else 0
    first = shapes.get("backbone.stem.conv1.kernel", (width,))
    return "v1c" if first[-1:] == (width // 2,) else "deep"


def _float32(array: np.ndarray) -> Float32[np.ndarray, "..."]:
    with np.errstate(all="ignore"):
        real = array.real if np.iscomplexobj(array) else array
        return np.array(real, np.float32, order="C")


def _fault_of_values(array: np.ndarray, loaded: np.ndarray, path: str) -> str | None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"holds {array.dtype}, not floating values"
    if not np.isfinite(loaded).all():
        return "holds values that are not finite in float32"
    if path.endswith(".variance") and (loaded < 0).any():
        return "holds negative variances"
    return None


def _lines(faults: _Faults) -> list[str]:
    """One line a fault, a few of each kind."""
    kinds = (
        [f"{printable(key)} is missing" for key in faults.missing],
        [f"{printable(key)} is not known" for key in faults.unknown],
        [
            f"{printable(key)} is {list(have)}, the network has {list(want)} (in our layout)"
            for key, (have, want) in faults.shapes.items()
        ],
        [f"{printable(key)} {fault}" for key, fault in faults.values.items()],
    )
    lines = []
    for kind in kinds:
        lines += kind[:_NUM_SHOWN]
        if len(kind) > _NUM_SHOWN:
            lines.append(f"... and {len(kind) - _NUM_SHOWN} more like that")
    return lines


def _causes_in_backbone(have: Mapping[str, Shape], want: Mapping[str, Shape]) -> Iterable[str]:
    """Differences of kind between two residual networks; one of them explains a hundred keys."""
    (blocks, convs), (wanted_blocks, wanted_convs) = _blocks(have), _blocks(want)
    if (
        sum(abs(a - b) for a, b in zip(blocks, wanted_blocks, strict=True)) > 1
        or convs != wanted_convs
    ):
        yield (
            f"the file's stages have {blocks} blocks of {convs} convolutions, the network's "
            f"{wanted_blocks} of {wanted_convs}: another backbone or depth (--config.model.backbone)"
        )
    stem, wanted_stem = stem_of(have), stem_of(want)
    if stem != wanted_stem:
        yield (
            f"the file's stem is {stem}, the network's {wanted_stem}: torchvision's ResNets have 7x7, the "
            f"authors' ImageNet files deep, ResNetV1c v1c (--config.model.stem={stem})"
        )


def _blocks(paths: Iterable[str]) -> tuple[tuple[int, ...], int]:
    """Blocks of each stage, and convolutions of most blocks."""
    found = [match.groups() for match in map(_BLOCK.match, paths) if match]
    blocks = {(stage, block) for stage, block, _ in found}
    threes = {(stage, block) for stage, block, leaf in found if leaf == "conv3"}
    counts = tuple(sum(stage == str(n) for stage, _ in blocks) for n in range(1, 5))
    return counts, 3 if 2 * len(threes) > len(blocks) else 2


def _causes(faults: _Faults) -> Iterable[str]:
    """What most often lies behind such faults, the most telling first."""
    missing, unknown, shapes = faults.missing, faults.unknown, faults.shapes
    for key in list(missing)[:3]:
        nearest = difflib.get_close_matches(key, unknown, n=1, cutoff=0.8)
        if nearest:
            yield f"'{printable(nearest[0])}' in the file is '{key}' under another name"
    for key, (have, want) in list(shapes.items())[:3]:
        if sorted(have) == sorted(want):
            yield f"{printable(key)} is transposed"
    levels = [key for key in [*missing, *unknown] if key.startswith(("ppm.", "pyramid."))]
    if any(key.startswith("fc.") for key in unknown):
        yield "the file is a backbone trained on ImageNet (it has fc.*), not a whole PSPNet"
    elif len(levels) > 1:
        yield "the file's pyramid has other bins than the network's, or none"
    elif len(shapes) > _NUM_SHOWN:
        yield "the file has another width (--config.model.width)"
    elif len(unknown) > 1 and not missing and not shapes:
        yield "the file has more than this network: another depth or family"
    elif len(missing) > 1 and not unknown and not shapes:
        yield "the file is incomplete, or of a shallower network"
