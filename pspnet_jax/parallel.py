"""Data parallelism: one mesh axis, 'data', over all devices.

* The train state is replicated, the batch is split along its first axis; `jax.jit` does the rest, so
  losses and batch statistics are those of the global batch.
* The axis type is always given: newer JAX would otherwise make it Explicit, which changes the meaning
  of ordinary code.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pspnet_jax.arrays import Batch


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the single axis 'data' over `devices` (default: all)."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


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
