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


def in_turn(monkeypatch, contributions):
    """Stands for several processes: each call of the gathering gets the same contribution of all."""
    calls = iter(contributions)
    monkeypatch.setattr(
        parallel.multihost_utils, "process_allgather", lambda local: next(calls)(np.asarray(local))
    )


def test_one_process_gathers_itself():
    assert parallel.gather(b"") == [b""]
    assert parallel.gather(b"abc") == [b"abc"]
    counts = np.array([[2**40 + 1, 0], [3, 4]])
    np.testing.assert_array_equal(parallel.sum_over_processes(counts), counts)
    tree = {"a": jax.numpy.ones(3)}
    assert parallel.on_this_process(tree)["a"] is tree["a"]


def test_bytes_of_different_lengths_come_back_in_the_order_of_the_processes(monkeypatch):
    lengths = np.array([[2], [5], [0]], np.int64).view(np.uint8)
    others = [b"ab", b"abcde", b""]
    padded = np.array([list(part.ljust(5, b"\0")) for part in others], np.uint8)
    given = []

    def second(local):
        given.append(local)
        return padded

    in_turn(monkeypatch, [lambda local: lengths, second])
    assert parallel.gather(b"ab") == others
    assert given[0].tobytes() == b"ab\0\0\0"


def test_counts_of_64_bits_are_added_exactly(monkeypatch):
    both = [np.array([2**40 + 1, 5]), np.array([2**41, -7])]
    lengths = np.array([[16], [16]], np.int64).view(np.uint8)
    in_turn(monkeypatch, [lambda _: lengths, lambda _: np.stack(both).view(np.uint8)])
    found = parallel.sum_over_processes(both[0])
    assert found.tolist() == [2**40 + 1 + 2**41, -2]
