"""Trees of arrays: nested dictionaries with string keys, nothing else, whose leaves have dotted names."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

Tree = dict


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> leaf, sorted by name."""
    leaves = {}
    for key in sorted(tree):
        if isinstance(tree[key], Mapping):
            leaves |= flatten(tree[key], f"{prefix}{key}.")
        else:
            leaves[prefix + key] = tree[key]
    return leaves


def unflatten(leaves: Mapping[str, Any]) -> Tree:
    """Nested dictionaries from dotted names: `flatten` backwards."""
    tree: Tree = {}
    for name, leaf in leaves.items():
        *folders, last = name.split(".")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = leaf
    return tree


def filled(tree: Tree, leaves: Mapping[str, Any], prefix: str = "") -> Tree:
    """The tree with other leaves, by their dotted names; KeyError for one that is missing."""
    return {
        key: filled(value, leaves, f"{prefix}{key}.")
        if isinstance(value, dict)
        else leaves[prefix + key]
        for key, value in tree.items()
    }


def digest(tree: Tree) -> str:
    """SHA-256 over the names, types, shapes and bytes of all leaves."""
    result = hashlib.sha256()
    for name, leaf in flatten(tree).items():
        text = isinstance(leaf, str)
        array = np.frombuffer(leaf.encode(), np.uint8) if text else np.asarray(leaf)
        result.update(f"{name} {array.dtype} {array.shape}\n".encode())
        result.update(array.tobytes())
    return result.hexdigest()


def check_same_shapes(stored: Tree, wanted: Tree, *, where: str) -> None:
    """Raise ValueError listing every parameter that is missing, left over or of another shape."""
    old, new = (
        {name: tuple(np.shape(x)) for name, x in flatten(tree).items()} for tree in (stored, wanted)
    )
    faults = [f"{name} is not in the checkpoint" for name in new if name not in old]
    faults += [f"{name} is not in the network" for name in old if name not in new]
    faults += [
        f"{name} is {old[name]} in the checkpoint and {new[name]} in the network"
        for name in new
        if name in old and old[name] != new[name]
    ]
    if faults:
        shown = "\n  ".join(
            faults[:20] + ([f"... and {len(faults) - 20} more"] * (len(faults) > 20))
        )
        raise ValueError(f"{where} does not fit this network:\n  {shown}")
