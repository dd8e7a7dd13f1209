"""Trees as bytes and back."""

import jax.numpy as jnp
import numpy as np
import pytest

from pspnet_jax.packing import Packed, pack, size, unpack

BUDGET_SECONDS = 10

TREE = {
    "b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "nothing": {}},
    "a": jnp.asarray([1.5, -2.5], jnp.bfloat16),
    "step": np.int32(7),
    "text": "Straße",
    "empty": np.zeros((0, 3)),
    "flags": np.array([True, False]),
    "transposed": np.arange(6.0).reshape(2, 3).T,
}


def test_there_and_back():
    packed = pack(TREE)
    tree = unpack(packed)
    assert set(tree) == set(TREE)
    assert tree["text"] == "Straße"
    assert tree["b"]["nothing"] == {}
    for name in ("a", "step", "empty", "flags", "transposed"):
        assert tree[name].dtype == TREE[name].dtype
        np.testing.assert_array_equal(tree[name], TREE[name])
    np.testing.assert_array_equal(tree["b"]["kernel"], TREE["b"]["kernel"])


def test_layout_and_bytes_by_hand():
    packed = pack({"x": {"y": np.array([[1, 2]], np.uint16)}, "a": "hi"})
    assert packed.layout == {"x": {"y": "uint16 1 2"}, "a": "utf-8 2"}
    assert packed.stream.tobytes() == b"hi" + bytes(62) + b"\x01\x00\x02\x00"
    assert size(packed.layout) == 68


def test_other_byte_orders_are_turned():
    big = np.array([1, 2], ">f4")
    assert pack({"x": big}).stream.tobytes() == np.array([1, 2], "<f4").tobytes()


def test_caller_may_overwrite_its_arrays():
    array = np.ones(3)
    packed = pack({"x": array})
    array[:] = 5
    np.testing.assert_array_equal(unpack(packed)["x"], 1)


def test_nothing_is_a_byte():
    packed = pack({"x": {}})
    assert len(packed.stream) == 1
    assert unpack(packed) == {"x": {}}


def test_wrong_size_is_refused():
    stream, layout = pack({"x": np.ones(3)})
    with pytest.raises(ValueError, match="23 bytes where the layout asks for 24"):
        unpack(Packed(stream[:-1], layout))
