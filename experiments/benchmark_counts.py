"""What is counted instead of measured: multiply-accumulates, and bytes that devices exchange."""

import math
import re
from typing import Any

import jax
from flax import nnx
from jax.extend import core

from pspnet_jax.models.families import ModelOptions
from pspnet_jax.models.layers import NoRandomNumbers
from pspnet_jax.models.pspnet import PSPNet
from pspnet_jax.train_step import split_model

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-broadcast",
    "collective-permute",
)
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}


# Multiply-accumulates


def network_macs(options: ModelOptions, num_classes: int, side: int) -> tuple[int, int]:
    """Of the published network (family `semseg`, ResNet, output stride 8) for one square image.

    Every convolution counts as kernel elements times positions of its output, zeros of the padding
    included. The head convolves the map and its stretched levels at the map's size, as published;
    the package's own order of pooling, convolution and stretching has fewer.

    Args:
        options: of which backbone, width, stem and pyramid count.
        num_classes: channels of the logits.
        side: of the image, 8n + 1 pixels.

    Returns:
        Those of the forward pass at inference, and those of the auxiliary head, which training adds.
        Norms, pools and the stretching of logits are not counted.
    """
    model = nnx.eval_shape(lambda: PSPNet(options, num_classes, rng=NoRandomNumbers()))
    _, params, _ = split_model(model)
    forward = aux = 0
    for path, leaf in jax.tree.leaves_with_path(params):
        keys = tuple(key.key for key in path)
        if keys[-1] != "kernel":
            continue
        macs = math.prod(leaf.shape) * _positions(keys, leaf.shape[0], side)
        if keys[0] == "aux_head":
            aux += macs
        else:
            forward += macs
    return forward, aux


def _positions(keys: tuple[str, ...], kernel_size: int, side: int) -> int:
    """Of the output of a convolution, by the path of its kernel."""
    if keys[0] == "pyramid":
        return int(keys[1].removeprefix("level")) ** 2
    half = (side + 1) // 2
    quarter = (half + 1) // 2
    if keys[1] == "stem":
        return half**2
    if keys[0] == "backbone" and keys[1].startswith("layer1_"):
        return quarter**2
    # The stride of a bottleneck is in its second convolution, that of a basic block in its first.
    if keys[1:3] == ("layer2_0", "conv1") and kernel_size == 1:
        return quarter**2
    return ((quarter + 1) // 2) ** 2


def program_macs(function: Any, *arguments: object) -> int:
    """Of all convolutions and matrix products that tracing a function finds.

    A loop counts as often as it runs; a convolution counts the zeros of padding and dilation, too.
    """
    return _jaxpr_macs(jax.make_jaxpr(function)(*arguments).jaxpr)


def _jaxpr_macs(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        out = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        params = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += out * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = params["dimension_numbers"].rhs_spec[0]
            total += out * math.prod(kernel) // kernel[features]
        else:
            inner = sum(map(_jaxpr_macs, core.jaxprs_in_params(params)))
            total += inner * (params["length"] if equation.primitive.name == "scan" else 1)
    return total


# Collectives

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?) (?P<kind>[a-z-]+)\(")
_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\w*\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(
    r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


def collective_bytes(hlo: str) -> dict[str, dict[str, int]]:
    """What a compiled program hands to collectives: kind -> {'count', 'bytes'} of one execution.

    Bytes are those of the operands on one device, in loops as often as these run (a loop whose
    trips XLA does not know counts once).

    Args:
        hlo: text of an optimized HLO module, as `compiled.as_text()` gives it.
    """
    computations, entry = _computations(hlo)
    found: dict[str, dict[str, int]] = {}

    def visit(name: str, times: int) -> None:
        lines = computations[name]
        shapes = {match["name"]: match["shape"] for match, _ in lines}
        for match, line in lines:
            kind = match["kind"].removesuffix("-start")
            if kind in COLLECTIVES:
                operands = line[match.end() :].split(")", 1)[0]
                row = found.setdefault(kind, {"count": 0, "bytes": 0})
                row["count"] += times
                row["bytes"] += times * sum(
                    _num_bytes(shapes[word]) for word in re.findall(r"%([\w.-]+)", operands)
                )
                continue
            trips = _TRIPS.search(line)
            inner = times * int(trips[1]) if trips and kind == "while" else times
            for called in _CALLED.finditer(line):
                for word in re.findall(r"[\w.-]+", called[1] or called[2]):
                    visit(word, inner)

    visit(entry, 1)
    return found


def _computations(hlo: str) -> tuple[dict[str, list[tuple[re.Match, str]]], str]:
    """Instructions (match, line) by computation, and the name of the entry."""
    computations: dict[str, list[tuple[re.Match, str]]] = {}
    current, entry = "", ""
    for line in hlo.splitlines():
        if line[:1] not in ("", " ") and (head := _COMPUTATION.match(line)):
            current = head["name"]
            computations[current] = []
            entry = current if head["entry"] else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append((match, line))
    if not entry:
        raise ValueError("no ENTRY computation in the text: compiled.as_text() has one")
    return computations, entry


def _num_bytes(shape: str) -> int:
    """Of an array or tuple as HLO writes it."""
    total = 0
    for match in _ARRAY.finditer(shape):
        dtype = match["dtype"]
        width = _BYTES.get(dtype) or int(re.sub(r"\D", "", dtype) or 0) // 8
        total += width * math.prod(int(n) for n in match["shape"].split(",") if n)
    return total
