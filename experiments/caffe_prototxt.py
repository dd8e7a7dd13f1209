"""Runs a network that is described by a Caffe prototxt file, with PyTorch: the layers that PSPNet has.

`parse` reads the text format, `run` goes through the layers from top to bottom in TEST phase. Blobs are
looked up under `LAYER.INDEX`, as in `caffe_torch`. Rounding of pooled sizes and the rule of `Interp` are
those of the layers in hszhao/PSPNet.
"""

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

_TOKEN = re.compile(r'#.*|"[^"]*"|[{}]|[^\s{}":]+')

Message = dict[str, list]
"""Field -> all its values in order; a value is text or a message."""


def parse(text: str) -> Message:
    """The message that a text in protobuf's text format stands for."""
    tokens = [token for token in _TOKEN.findall(text) if not token.startswith("#")]
    root: Message = {}
    stack = [root]
    i = 0
    while i < len(tokens):
        if tokens[i] == "}":
            stack.pop()
            i += 1
            continue
        field, value = tokens[i], tokens[i + 1]
        i += 2
        if value == "{":
            inner: Message = {}
            stack[-1].setdefault(field, []).append(inner)
            stack.append(inner)
        else:
            stack[-1].setdefault(field, []).append(value.strip('"'))
    if len(stack) != 1:
        raise ValueError("brackets do not match")
    return root


def run(network: Message, blobs: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, set[str]]:
    """What the last layer gives, and the keys of the blobs that were used.

    Args:
        network: of `parse`.
        blobs: by `LAYER.INDEX`.
        images: what its input is fed with.

    Raises:
        KeyError: for a blob that is not there, and for a type of layer that PSPNet does not have.
        ValueError: for images of another size than the input of the file.
    """
    size = [int(side) for side in network["input_dim"][2:]]
    if list(images.shape[2:]) != size:
        raise ValueError(f"images are {list(images.shape[2:])}, the input is {size}")
    tops = {network["input"][0]: images}
    used: set[str] = set()
    top = ""
    for layer in network["layer"]:
        name, top = layer["name"][0], layer["top"][0]
        inputs = [tops[bottom] for bottom in layer["bottom"]]
        keys = []
        while f"{name}.{len(keys)}" in blobs:
            keys.append(f"{name}.{len(keys)}")
        used.update(keys)
        tops[top] = _LAYERS[layer["type"][0]](layer, inputs, [blobs[key] for key in keys])
    return tops[top], used


def _number(message: Message, field: str, default: int) -> int:
    return int(message.get(field, [default])[0])


def _convolution(layer: Message, inputs: list[Tensor], blobs: list[Tensor]) -> Tensor:
    (options,) = layer["convolution_param"]
    kernel, *bias = blobs
    has_bias = options.get("bias_term", ["true"])[0] == "true"
    shape = (_number(options, "num_output", 0), *[_number(options, "kernel_size", 0)] * 2)
    if (kernel.shape[0], *kernel.shape[2:]) != shape or len(bias) != has_bias:
        raise ValueError(f"{layer['name'][0]}: blobs {[list(b.shape) for b in blobs]}")
    return F.conv2d(
        inputs[0],
        kernel,
        *bias,
        stride=_number(options, "stride", 1),
        padding=_number(options, "pad", 0),
        dilation=_number(options, "dilation", 1),
    )


def _norm(layer: Message, inputs: list[Tensor], blobs: list[Tensor]) -> Tensor:
    slope, bias, mean, variance = (blob.flatten() for blob in blobs)
    epsilon = float(layer["bn_param"][0].get("eps", [1e-5])[0])
    return F.batch_norm(inputs[0], mean, variance, slope, bias, eps=epsilon)


def _pooling(layer: Message, inputs: list[Tensor], blobs: list[Tensor]) -> Tensor:
    (options,) = layer["pooling_param"]
    pool = {"MAX": F.max_pool2d, "AVE": F.avg_pool2d}[options["pool"][0]]
    stride, padding = _number(options, "stride", 1), _number(options, "pad", 0)
    kernel_size = _number(options, "kernel_size", 0)
    return pool(inputs[0], kernel_size, stride=stride, padding=padding, ceil_mode=True)


def _interp(layer: Message, inputs: list[Tensor], blobs: list[Tensor]) -> Tensor:
    (options,) = layer["interp_param"]
    height, width = inputs[0].shape[2:]
    zoom = _number(options, "zoom_factor", 0)
    if zoom:
        size = [side + (side - 1) * (zoom - 1) for side in (height, width)]
    else:
        size = [_number(options, "height", 0), _number(options, "width", 0)]
    return F.interpolate(inputs[0], size=size, mode="bilinear", align_corners=True)


def _eltwise(layer: Message, inputs: list[Tensor], blobs: list[Tensor]) -> Tensor:
    if layer["eltwise_param"][0]["operation"] != ["SUM"]:
        raise KeyError(layer["eltwise_param"][0]["operation"])
    return inputs[0] + inputs[1]


_LAYERS = {
    "Convolution": _convolution,
    "BN": _norm,
    "ReLU": lambda layer, inputs, blobs: F.relu(inputs[0]),
    "Pooling": _pooling,
    "Eltwise": _eltwise,
    "Concat": lambda layer, inputs, blobs: torch.cat(inputs, dim=1),
    "Interp": _interp,
    "Dropout": lambda layer, inputs, blobs: inputs[0],
}
