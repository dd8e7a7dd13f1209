"""Caffe's files of weights (.caffemodel) <-> arrays by name, without Caffe, executing nothing.

* Read are names, types and strides of layers and shapes and values of their blobs, of both generations: `layer`
  and, before 2015, `layers` (V1).
* Values are read-only views of the memory-mapped file, good as long as nobody changes it. There are no
  checksums: a flipped bit in a value cannot be seen.

Numbers of fields: caffe.proto of BVLC/caffe and of hszhao/PSPNet, which adds the layer 'BN' with the blobs
slope, bias, mean and variance, each of shape [1, C, 1, 1].
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float

from pspnet_jax.weights.messages import (
    LENGTH,
    MAX_BYTES,
    MAX_SMALL_BYTES,
    NUMBER,
    Splitter,
    fields,
    make_messages,
)
from pspnet_jax.weights.pickles import FaultError, short
from pspnet_jax.weights.pytorch import WeightsFileError
from pspnet_jax.whole_files import whole_file

Blob = Float[np.ndarray, "..."]
Stride = tuple[int, int]
"""Vertical, horizontal."""

_AXES = ("num", "channels", "height", "width")
_MESSAGES = make_messages(
    {
        "Shape": {"dim": (1, "packed int64")},
        "Blob": {
            **{axis: (number, "int32") for number, axis in enumerate(_AXES, 1)},
            "data": (5, "bytes"),  # packed float, which is written as bytes are
            "shape": (7, "Shape"),
            "double_data": (8, "bytes"),
        },
        "Convolution": {
            "stride": (6, "repeated uint32"),
            "stride_h": (13, "uint32"),
            "stride_w": (14, "uint32"),
        },
        "V1Layer": {
            "name": (4, "bytes"),
            "type": (5, "int32"),
            "blobs": (6, "repeated Blob"),
            "convolution_param": (10, "Convolution"),
        },
        "Layer": {
            "name": (1, "bytes"),
            "type": (2, "bytes"),
            "blobs": (7, "repeated Blob"),
            "convolution_param": (106, "Convolution"),
        },
        "Net": {"layers": (2, "repeated V1Layer"), "layer": (100, "repeated Layer")},
    }
)
_LARGE = frozenset({"layers", "layer", "blobs", "data", "double_data"})

# How a file begins: fields of a net, then a layer's name, type, bottom or top.
_NET = dict.fromkeys((1, 2, 3, 6, 8, 100), (LENGTH,))
_NET |= {4: (NUMBER, LENGTH), 5: (NUMBER,), 7: (NUMBER,)}
_NUM_FIRST, _TEXTS = 64, (1, 2, 3, 4)
_MAX_AXES = 32  # Caffe's own limit

_WITH_KERNEL = {b"Convolution", b"Deconvolution", b"InnerProduct", 4, 39, 14}
"""Types, and their numbers in V1, whose first blob keeps its axes of length 1."""
_WRITTEN = {
    b"BN": ([1, 1, 1, 1],),
    b"Convolution": ([4], [4, 1]),
    b"InnerProduct": ([2], [2, 1]),
}
"""Type -> the numbers of axes that its blobs may have."""


def is_caffemodel(path: Path | str) -> bool:
    """Whether a file begins as a net does, up to the name of a layer; the rest may be missing."""
    with Path(path).open("rb") as file:
        return _is_net(_map(file))


def read(path: Path | str) -> tuple[dict[str, Blob], dict[str, Stride]]:
    """Blobs by 'layer.number'; by layer, the strides of the convolutions that have options beside their blobs.

    Kernels are [out, in, height, width]; other blobs lose their axes of length 1 where one other is left. Values
    are float32, float64 where the file's are; the arrays are read-only views of the mapped file.

    Raises:
        WeightsFileError: naming the file, and the layer where there is one, if it is missing, truncated, damaged,
            of another kind, without blobs, or ambiguous.
    """
    try:
        with Path(path).open("rb") as file:
            return _read(_map(file))
    except OSError as error:
        raise WeightsFileError(f"{path}: {error.strerror or error}") from None
    except FaultError as fault:
        raise WeightsFileError(f"{path} {fault}") from None


def write(path: Path | str, arrays: Mapping[str, Blob], strides: Mapping[str, Stride]) -> None:
    """Write what `read` gives, as float32; the file appears when it is complete.

    Types are told by the axes: four blobs of one are a 'BN', a first of four a 'Convolution', of two an
    'InnerProduct'.

    Raises:
        ValueError: where keys are not 'layer.number' from 0 on, a layer is of no such type, a stride is of no
            convolution, or all is more than Caffe can read.
    """
    layers: dict[str, dict[str, Blob]] = defaultdict(dict)
    for key, array in arrays.items():
        name, _, number = key.rpartition(".")
        layers[name][number] = array
    types = {name: _type_of(name, blobs) for name, blobs in layers.items()}
    if wrong := [name for name in strides if types.get(name) != b"Convolution"]:
        raise ValueError(f"strides of {', '.join(wrong)}, but no convolution of that name")
    size = sum(4 * array.size for array in arrays.values())
    if size + MAX_SMALL_BYTES * len(arrays) > MAX_BYTES:
        raise ValueError(f"{size} bytes: Caffe reads less than 2 GiB, write safetensors instead")
    with whole_file(Path(path)) as file:
        for name, blobs in layers.items():  # nets in a row are one net, by the rules of the format
            net = _MESSAGES["Net"]()
            layer = net.layer.add(name=name.encode(), type=types[name])
            for array in blobs.values():
                blob = layer.blobs.add(data=np.ascontiguousarray(array, "<f4").tobytes())
                blob.shape.dim.extend(
                    (1, array.size, 1, 1) if types[name] == b"BN" else array.shape
                )
            if name in strides:
                layer.convolution_param.stride.extend(strides[name])
            file.write(net.SerializeToString())


def _map(file: BinaryIO) -> memoryview:
    """The bytes of a file; nothing is read before it is looked at."""
    return np.memmap(file, np.uint8, mode="r").data if file.seek(0, 2) else memoryview(b"")


def _is_net(data: memoryview) -> bool:
    try:
        for field in islice(fields(data, ""), _NUM_FIRST):
            content = data[field.content : field.stop]
            if field.kind not in _NET.get(field.number, ()):
                return False
            if field.number == 1 and not _is_text(content):
                return False
            if field.number in (2, 100) and content:
                first = next(fields(content, ""))
                text = content[first.content : first.stop]
                return first.kind == LENGTH and first.number in _TEXTS and _is_text(text)
    except FaultError:
        pass
    return False


def _is_text(content: memoryview) -> bool:
    try:
        return len(content) <= MAX_SMALL_BYTES and str(content, "utf-8").isprintable()
    except UnicodeDecodeError:
        return False


def _read(data: memoryview) -> tuple[dict[str, Blob], dict[str, Stride]]:
    if not data:
        raise FaultError("is empty: download or copy it again")
    if len(data) > MAX_BYTES:
        raise FaultError(
            f"has {len(data)} bytes, a .caffemodel has less than 2 GiB: it is another file"
        )
    if not _is_net(data):
        raise FaultError(
            f"is not a .caffemodel: it begins with {bytes(data[:16])!r}. If it is a text (.prototxt), "
            "it has no weights: give the file beside it"
        )
    splitter, arrays, strides = Splitter(_MESSAGES, _LARGE), {}, {}
    _, net = splitter.split("Net", data, "the net")
    contents = [("Layer", layer) for layer in net["layer"]]
    contents += [("V1Layer", layer) for layer in net["layers"]]
    for position, (kind, content) in enumerate(contents):
        layer, large = splitter.split(kind, content, f"layer {position}")
        if not large["blobs"]:
            continue
        name = _name_of(layer, position)
        if f"{name}.0" in arrays:
            raise FaultError(f"has two layers {short(name)} with blobs: rename one in Caffe")
        for number, blob in enumerate(large["blobs"]):
            where = f"blob {number} of layer {short(name)}"
            array = _array_of(*splitter.split("Blob", blob, where), where)
            is_kernel = number == 0 and layer.type in _WITH_KERNEL
            is_row = not is_kernel and array.size == max(array.shape, default=1)
            arrays[f"{name}.{number}"] = array.reshape(-1) if is_row else array
        if layer.HasField("convolution_param"):
            strides[name] = _stride_of(layer.convolution_param, name)
    if not arrays:
        raise FaultError(
            f"holds no weights: none of its {len(contents)} layers has blobs; take the file that "
            "Caffe saved after training"
        )
    return arrays, strides


def _name_of(layer: Any, position: int) -> str:
    try:
        if name := layer.name.decode():
            return name
    except UnicodeDecodeError:
        pass
    raise FaultError(f"is damaged: layer {position} has blobs and the name {layer.name[:40]!r}")


def _array_of(blob: Any, large: Mapping[str, list[memoryview]], where: str) -> Blob:
    """Where both are there, doubles come before floats and four axes before a shape, as in Caffe."""
    is_double = any(map(len, large["double_data"]))
    parts = large["double_data" if is_double else "data"]
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    dtype = np.dtype("<f8" if is_double else "<f4")
    has_axes = any(blob.HasField(axis) for axis in _AXES)
    shape = tuple(getattr(blob, axis) for axis in _AXES) if has_axes else tuple(blob.shape.dim)
    is_shape = len(shape) <= _MAX_AXES and all(length > 0 for length in shape)
    if not is_shape or math.prod(shape) * dtype.itemsize != len(data):
        raise FaultError(
            f"is damaged: {where} has the shape {shape[:8]} and {len(data)} bytes of {dtype} values; "
            "download it again"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _stride_of(convolution: Any, name: str) -> Stride:
    """One for both axes, one for each, or by their names."""
    named = [convolution.stride_h, convolution.stride_w]
    given = named if any(named) else list(convolution.stride) or [1]
    if len(given) > 2 or not all(given):
        raise FaultError(f"has strides {given[:8]} in layer {short(name)}, as no network of images")
    return given[0], given[-1]


def _type_of(name: str, blobs: Mapping[str, Blob]) -> bytes:
    """The type of a layer, by its blobs."""
    if not name or list(blobs) != [str(number) for number in range(len(blobs))]:
        raise ValueError(
            f"blobs {', '.join(blobs)} of layer '{name}': keys must be 'layer.0', 'layer.1', ..."
        )
    axes = [array.ndim for array in blobs.values()]
    for kind, possible in _WRITTEN.items():
        if axes in possible:
            return kind
    raise ValueError(f"layer '{name}' has blobs of {axes} axes: {_WRITTEN} can be written")
