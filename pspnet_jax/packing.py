"""Trees of arrays and strings as one run of bytes, and back.

Arrays lie one after the other in the order of their names, little-endian, row by row, each at a multiple
of 64 bytes; the layout, a tree of the same keys, says what each of them is: 'float32 3 3 64', 'utf-8 120'.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8

Bytes = UInt8[np.ndarray, "bytes"]
_ALIGNMENT = 64
_TEXT = "utf-8"


class Packed(NamedTuple):
    """The bytes of a tree, and what they are."""

    stream: Bytes
    layout: dict
    """Nested as the tree; of each leaf its type and its sides, or the number of bytes of a string."""


def pack(tree: dict) -> Packed:
    """Copies of all leaves; those on devices are fetched."""
    layout = jax.tree.map(_description, tree)
    stream = np.zeros(size(layout), np.uint8)
    for leaf, (_, place) in zip(jax.tree.leaves(tree), _places(layout), strict=True):
        stream[place] = _bytes_of(leaf)
    return Packed(stream, layout)


def unpack(packed: Packed) -> dict:
    """The tree; its arrays are views of the stream.

    Raises:
        ValueError: where the stream has not the size that the layout asks for.
    """
    stream, layout = packed
    if len(stream) != size(layout):
        raise ValueError(f"{len(stream)} bytes where the layout asks for {size(layout)}")
    leaves = [_leaf(stream[place], text) for text, place in _places(layout)]
    return jax.tree.unflatten(jax.tree.structure(layout), leaves)


def size(layout: dict) -> int:
    """Bytes of the stream; at least one."""
    return max([1, *(place.stop for _, place in _places(layout))])


def _places(layout: dict) -> Iterator[tuple[str, slice]]:
    """Description and bytes of each leaf."""
    start = 0
    for text in jax.tree.leaves(layout):
        kind, *sides = text.split()
        itemsize = 1 if kind == _TEXT else np.dtype(kind).itemsize
        end = start + itemsize * math.prod(map(int, sides))
        yield text, slice(start, end)
        start = -(-end // _ALIGNMENT) * _ALIGNMENT


def _description(leaf: Any) -> str:
    if isinstance(leaf, str):
        return f"{_TEXT} {len(leaf.encode())}"
    return " ".join([np.dtype(leaf.dtype).name, *map(str, leaf.shape)])


def _bytes_of(leaf: Any) -> Bytes:
    if isinstance(leaf, str):
        return np.frombuffer(leaf.encode(), np.uint8)
    array = np.ascontiguousarray(leaf)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)


def _leaf(part: Bytes, text: str) -> Any:
    kind, *sides = text.split()
    if kind == _TEXT:
        return part.tobytes().decode()
    return part.view(np.dtype(kind).newbyteorder("<")).reshape([*map(int, sides)])
