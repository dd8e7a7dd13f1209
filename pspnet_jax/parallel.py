"""Data parallelism: one mesh axis, 'data', over all devices.

* The train state is replicated, the batch is split along its first axis; `jax.jit` does the rest, so
  losses and batch statistics are those of the global batch.
* The axis type is always given: newer JAX would otherwise make it Explicit, which changes the meaning
  of ordinary code.
* What processes found apart from each other is brought together as bytes: arrays on devices would lose
  the upper halves of 64-bit numbers.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int64

from pspnet_jax.arrays import Batch
from pspnet_jax.resample import PLATFORMS, Platform

Tree = Any
"""Nested containers of arrays."""


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the single axis 'data' over `devices` (default: all)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def platform_of(mesh: Mesh) -> Platform:
    """'cpu', 'gpu' or 'tpu': what the devices of a mesh are; None for others."""
    platform = mesh.devices.flat[0].platform
    return platform if platform in PLATFORMS else None


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """Every device holds its share of the leading axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulate_steps: int = 1) -> None:
    """Raise ValueError where a global batch cannot be split evenly, naming sizes that can."""
    unit = mesh.size * accumulate_steps
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = [str(size) for size in (below, below + unit) if size > 0]
        devices = f"the {mesh.size} devices" if mesh.size > 1 else "1 device"
        parts = f" times train.accumulate_steps={accumulate_steps}" if accumulate_steps > 1 else ""
        raise ValueError(
            f"global_batch_size={batch_size} must be a multiple of {devices}{parts} "
            f"(nearest: {', '.join(nearest)})"
        )


def shard_batch(batch: Batch, mesh: Mesh) -> Batch:
    """This process's part of a global batch, placed on its devices."""
    sharding = split_batch(mesh)

    def place(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, batch)


def gather(local: bytes) -> list[bytes]:
    """What each process gives, in the order of the processes; every process calls this and receives all."""
    length = np.array([len(local)], np.int64).view(np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(length)).reshape(-1, 8).view(np.int64)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: len(local)] = np.frombuffer(local, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, padded.size)
    return [row[:size].tobytes() for row, size in zip(rows, lengths[:, 0].tolist(), strict=True)]


def sum_over_processes(counts: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
    """The sum of what each process counted, exactly; with one process the counts themselves."""
    parts = [
        np.frombuffer(part, np.int64).reshape(counts.shape) for part in gather(counts.tobytes())
    ]
    return np.stack(parts).sum(axis=0)


def on_this_process(tree: Tree) -> Tree:
    """Replicated arrays as arrays of this process alone; unchanged where there is one process."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)
