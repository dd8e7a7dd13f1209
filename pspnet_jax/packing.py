"""Trees of arrays and strings as one run of bytes, and back.

Arrays lie one after the other in the order of their names, little-endian, row by row, each at a multiple
of 64 bytes; the layout, a tree of the same keys, says what each of them is: 'float32 3 3 64', 'utf-8 120'.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

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
    layout = _described(tree)
    stream = np.zeros(size(layout), np.uint8)
    leaves = dict(_leaves(tree))
    for path, start, text in _places(layout):
        source = _bytes_of(leaves[path])
        stream[start : start + _num_bytes(text)] = source
    return Packed(stream, layout)


def unpack(packed: Packed) -> dict:
    """The tree; its arrays are views of the stream.

    Raises:
        ValueError: where the stream has not the size that the layout asks for.
    """
    stream, layout = packed
    if len(stream) != size(layout):
        raise ValueError(f"{len(stream)} bytes where the layout asks for {size(layout)}")
    tree = _empty_like(layout)
    for path, start, text in _places(layout):
        kind, *sides = text.split()
        part = stream[start : start + _num_bytes(text)]
        node = tree
        for key in path[:-1]:
            node = node[key]
        is_text = kind == _TEXT
        node[path[-1]] = (
            part.tobytes().decode()
            if is_text
            else part.view(_stored(kind)).reshape([*map(int, sides)])
        )
    return tree


def size(layout: dict) -> int:
    """Bytes of the stream; at least one."""
    ends = [start + _num_bytes(text) for _, start, text in _places(layout)]
    return max([1, *ends])


def _described(tree: dict) -> dict:
    return {
        key: _described(value) if isinstance(value, dict) else _description(value)
        for key, value in tree.items()
    }


def _stored(kind: str) -> np.dtype:
    return np.dtype(kind).newbyteorder("<")


def _description(leaf: Any) -> str:
    if isinstance(leaf, str):
        return f"{_TEXT} {len(leaf.encode())}"
    return " ".join([np.dtype(leaf.dtype).name, *map(str, leaf.shape)])


def _leaves(tree: dict, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from _leaves(tree[key], (*path, key))
        else:
            yield (*path, key), tree[key]


def _places(layout: dict) -> Iterator[tuple[tuple[str, ...], int, str]]:
    """Path, first byte and description of each leaf."""
    start = 0
    for path, text in _leaves(layout):
        yield path, start, text
        start += -(-_num_bytes(text) // _ALIGNMENT) * _ALIGNMENT


def _num_bytes(text: str) -> int:
    kind, *sides = text.split()
    itemsize = 1 if kind == _TEXT else np.dtype(kind).itemsize
    return itemsize * math.prod(map(int, sides))


def _bytes_of(leaf: Any) -> Bytes:
    if isinstance(leaf, str):
        return np.frombuffer(leaf.encode(), np.uint8)
    array = np.ascontiguousarray(leaf)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).reshape(-1).view(np.uint8)


def _empty_like(layout: dict) -> dict:
    return {key: _empty_like(v) if isinstance(v, dict) else None for key, v in layout.items()}
