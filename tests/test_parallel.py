"""Batches over eight devices."""

import jax
import numpy as np
import pytest

from pspnet_jax import parallel
from pspnet_jax.arrays import Batch

BUDGET_SECONDS = 15


def test_batch_is_split_and_state_is_replicated():
    mesh = parallel.make_mesh()
    assert mesh.axis_names == ("data",)
    assert mesh.size == jax.device_count() == 8
    images = np.arange(16 * 2 * 2 * 3, dtype=np.uint8).reshape(16, 2, 2, 3)
    batch = Batch(images, images[..., 0], np.arange(16, dtype=np.int32), np.ones(16, bool))
    placed = parallel.shard_batch(batch, mesh)
    np.testing.assert_array_equal(placed.images, images)
    shares = [shard.data.shape[0] for shard in placed.images.addressable_shards]
    assert shares == [2] * 8
    everywhere = jax.device_put(np.ones(3), parallel.replicated(mesh))
    assert len(everywhere.addressable_shards) == 8
    assert everywhere.addressable_shards[0].data.shape == (3,)


def test_uneven_batch_names_sizes_that_fit():
    mesh = parallel.make_mesh()
    parallel.check_batch_size(16, mesh)
    with pytest.raises(
        ValueError, match=r"=12 must be a multiple of the 8 devices \(nearest: 8, 16\)"
    ):
        parallel.check_batch_size(12, mesh)
    with pytest.raises(ValueError, match=r"\(nearest: 8\)"):
        parallel.check_batch_size(3, mesh)
    parallel.check_batch_size(32, mesh, accumulate_steps=4)
    with pytest.raises(
        ValueError, match=r"8 devices times train.accumulate_steps=4 \(nearest: 32, 64\)"
    ):
        parallel.check_batch_size(40, mesh, accumulate_steps=4)
